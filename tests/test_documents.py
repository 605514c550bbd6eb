"""Attention within documents: packed documents train as each of them would alone."""

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from shapes import LLAMA2, LLAMA3
from torch import Tensor
from torch.nn.attention import SDPBackend

from titan_fast import canary, documents, ops, parallel
from titan_fast.config import Compile, Kernels, MeshDegrees, model_shape, parse
from titan_fast.documents import Separators, any_number_of, many, split_in_two, visible, with_flash
from titan_fast.errors import ConfigError, NumericsError
from titan_fast.flavors import ModelShape
from titan_fast.loader import Loader, Step
from titan_fast.loss import LinearCrossEntropy, root_gradient
from titan_fast.model import Llama, init_weights
from titan_fast.ops import REFERENCE, Ops, Workload, attention_with, build_ops
from titan_fast.parallel import check_cuda_graph
from titan_fast.train import main

CPU = torch.device("cpu")
BOS, EOS = 1, 2
LENGTHS = ((5, 2, 9), (16,), (3, 13))
"""Of the documents of three sequences."""


def packed(generator: torch.Generator) -> Tensor:
    """Tokens [3, 16]: each document is BOS, text, EOS, and one has no text."""
    tokens = torch.randint(3, 128, (3, 16), generator=generator)
    for row, lengths in enumerate(LENGTHS):
        for begin, end in itertools.pairwise(np.cumsum([0, *lengths]).tolist()):
            tokens[row, begin], tokens[row, end - 1] = BOS, EOS
    return tokens


@pytest.mark.parametrize(
    ("bos", "eos", "rows", "expected"),
    [
        (1, 2, [[1, 5, 2, 1, 6, 2], [7, 2, 1, 8, 9, 9]], [0, 3, 6, 8, 12]),
        (1, 2, [[2, 1, 2, 1, 2, 1], [5, 5, 5, 5, 5, 2]], [0, 1, 3, 5, 6, 12]),
        (1, 2, [[5, 1, 5, 2, 2, 5]], [0, 6]),  # neither a BOS nor an EOS by itself lies between documents
        (None, 2, [[5, 2, 6, 2, 2, 7]], [0, 2, 4, 5, 6]),
        (4, 4, [[4, 5, 4, 4, 6, 4], [4, 4, 5, 5, 4, 4]], [0, 3, 6, 7, 11, 12]),  # one token for both
    ],
)
def test_documents_begin_between_eos_and_bos(
    bos: int | None, eos: int, rows: list[list[int]], expected: list[int]
) -> None:
    found = Separators(bos, eos).bounds(np.array(rows))
    assert found.dtype == np.int32 and found.tolist() == expected


def test_a_token_sees_what_is_before_it_in_its_document() -> None:
    bounds = torch.tensor([0, 3, 4, 7, 8], dtype=torch.int32)
    seen = visible(bounds, 2, 4)
    starts = [0, 0, 0, 3, 4, 4, 4, 7]
    for place in range(8):
        row, query = divmod(place, 4)
        assert seen[row, 0, query].tolist() == [starts[place] <= row * 4 + key <= place for key in range(4)]


def model_of(shape: ModelShape, chosen: Ops = REFERENCE) -> Llama:
    model = Llama(shape, chosen, LinearCrossEntropy(chosen, 16, 0.0)).double()
    init_weights(model, 0)
    return model


def step(model: Llama, tokens: Tensor, labels: Tensor, bounds: Tensor | None = None) -> tuple[float, list[Tensor]]:
    """(sum of losses, gradients)."""
    loss = model(tokens, labels, torch.ones((), dtype=torch.float64), bounds=bounds)
    loss.backward(root_gradient(loss))
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return loss.item(), gradients


def packed_and_alone(model: Llama) -> tuple[list[Any], list[Any]]:
    """Loss and gradients of a packed batch, and the sums of those of its documents, each of which is run alone and from
    position 0."""
    tokens = packed(torch.Generator().manual_seed(0))
    labels = torch.randint(0, 128, tokens.shape, generator=torch.Generator().manual_seed(1))
    bounds = torch.from_numpy(Separators(BOS, EOS).bounds(tokens.numpy()))
    assert bounds.tolist() == np.cumsum([0, *itertools.chain(*LENGTHS)]).tolist()
    loss, gradients = step(model, tokens, labels, bounds)
    alone: list[Any] = [0.0, *(torch.zeros_like(g) for g in gradients)]
    for begin, end in itertools.pairwise(bounds.tolist()):
        part = step(model, tokens.flatten()[None, begin:end], labels.flatten()[None, begin:end])
        alone = [total + x for total, x in zip(alone, [part[0], *part[1]], strict=True)]
    return [loss, *gradients], alone


def assert_equal(found: list[Any], expected: list[Any]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()  # rotary tables are float32


@pytest.mark.parametrize("shape", [LLAMA2, LLAMA3], ids=["llama2", "llama3"])
def test_packed_documents_train_as_each_of_them_alone(shape: ModelShape) -> None:
    assert_equal(*packed_and_alone(model_of(dataclasses.replace(shape, vocab_size=128))))


def test_without_the_mask_they_would_not() -> None:
    model = model_of(LLAMA3)
    alone = packed_and_alone(model)[1]
    tokens = packed(torch.Generator().manual_seed(0))
    labels = torch.randint(0, 128, tokens.shape, generator=torch.Generator().manual_seed(1))
    found = step(model, tokens, labels)
    names = [name for name, _ in model.named_parameters()]
    qkv = names.index("blocks.0.attention.qkv.weight")
    assert (found[1][qkv] - alone[1:][qkv]).norm() > 0.1 * alone[1:][qkv].norm()


def varlen_by_formula(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, same: Tensor, longest: int, longest_k: int, **options: Any
) -> Tensor:
    """What torch.nn.attention.varlen.varlen_attn computes on a GPU: q [T, H, E], k and v [T, K, E], causal."""
    assert same is bounds and bounds.dtype == torch.int32 and options.pop("window_size") == (-1, 0)
    assert options in ({}, {"enable_gqa": True}) and longest == longest_k
    assert bounds[0] == 0 and bounds[-1] == len(q) and int(bounds.diff().max()) <= longest
    parts = []
    for begin, end in itertools.pairwise(bounds.tolist()):
        a, b, c = (x[begin:end].transpose(0, 1) for x in (q, k, v))
        parts.append(F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=True).transpose(0, 1))
    return torch.cat(parts)


def test_gpus_pack_documents_for_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "varlen_attn", varlen_by_formula)
    chosen = dataclasses.replace(REFERENCE, attention=with_flash(REFERENCE.attention))
    assert_equal(*packed_and_alone(model_of(LLAMA3, chosen)))


def test_flash_attention_is_given_views() -> None:
    """Rotary embedding writes [B, S, heads, E] memory, so that nothing is copied to pack it."""
    qkv = torch.randn(2, 16, LLAMA3.qkv_dim)
    tables = torch.ones(16, LLAMA3.head_dim // 2), torch.zeros(16, LLAMA3.head_dim // 2)
    for x in REFERENCE.rope(qkv, *tables, LLAMA3.n_heads, LLAMA3.n_kv_heads):
        assert x.transpose(1, 2).flatten(0, 1).data_ptr() == x.data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "shared", "width"), [(8, 8, 128), (8, 2, 128), (8, 2, 64)])
def test_flash_attention_stays_within_documents_on_a_gpu(heads: int, shared: int, width: int) -> None:
    """Against attention with a mask in float32, with documents of a token, of a whole sequence and between."""
    rows, seq_len, device = 3, 1024, torch.device("cuda")
    cuts = [0, 1, 300, 1024, 2048, 2049, 2050, 3000, 3072]
    bounds = torch.tensor(cuts, dtype=torch.int32, device=device)
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int) -> Tensor:
        memory = torch.randn(rows, seq_len, heads, width, generator=generator, device=device)
        return memory.transpose(1, 2)

    q, k, v, gradient = normal(heads), normal(shared), normal(shared), normal(heads)
    found = []
    for dtype, attention in (
        (torch.bfloat16, with_flash(REFERENCE.attention)),
        (torch.float32, attention_with([SDPBackend.MATH])),
    ):
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in (q.bfloat16(), k.bfloat16(), v.bfloat16())]
        out = attention(*inputs, bounds)
        found.append([out.detach(), *torch.autograd.grad(out, inputs, gradient.bfloat16().to(dtype))])
    for ours, exact in zip(*found, strict=True):
        assert (ours.float() - exact).norm() < 0.01 * exact.norm()


def workload(dtype: str = "bfloat16") -> Workload:
    return Workload(LLAMA3, 32, 1, 0, compiled=False, dtype=dtype, document_mask=True)


@pytest.mark.parametrize(
    ("setting", "dtype", "said"),
    [
        ("auto", "float32", "training.document_mask takes no float32 on CUDA"),
        ("cudnn", "bfloat16", "kernels.attention 'cudnn' cannot stay within documents on CUDA"),
        ("math", "bfloat16", "kernels.attention 'math' cannot stay within documents on CUDA"),
    ],
)
def test_what_gpus_cannot_do_is_refused(setting: Any, dtype: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ConfigError, match=said):
        build_ops(Kernels(attention=setting), torch.device("cuda"), workload(dtype), "sm_90")
    words = [f"--kernels.attention={setting}", f"--training.mixed_precision_param={dtype}"]
    for masked in ("False", "True"):  # a dry run for the GPU refuses it too
        config = parse([*words, f"--training.document_mask={masked}"])
        with pytest.raises(ConfigError, match=said) if masked == "True" else nullcontext():
            parallel.check(config, model_shape(config.model), MeshDegrees(1, 1, 1), torch.device("cuda"))


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (varlen_by_formula, None),
        (lambda q, *_, **__: 1.05 * varlen_by_formula(q, *_, **__), "its result is off by 5"),
        (lambda *_, **__: 1 / 0, "division by zero; turn training.document_mask off"),
    ],
)
def test_flash_attention_is_tried_first(
    kernel: Callable[..., Tensor], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On this device in the GPU's place."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(documents, "varlen_attn", kernel)
    ops._try_flash.cache_clear()
    tried = ops._try_flash
    monkeypatch.setattr(ops, "_try_flash", lambda *given, **options: tried(*given[:-1], CPU, **options))
    if said is None:
        built = build_ops(Kernels(attention="auto"), torch.device("cuda"), workload(), "sm_90")
        assert built.reasons[0] == ("attention", "flash", "within documents")
        return
    with pytest.raises(ConfigError, match=said):
        build_ops(Kernels(attention="auto"), torch.device("cuda"), workload(), "sm_90")


def test_a_cpu_takes_a_mask() -> None:
    built = build_ops(Kernels(), CPU, workload("float32"))
    assert built.reasons[0] == ("attention", "flash", "torch's fused CPU attention, within documents")


def test_graphs_of_a_gpus_step_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"training\.document_mask"):
        check_cuda_graph(torch.device("cuda"), shards=False, document_mask=True)
    check_cuda_graph(torch.device("cuda"), shards=False, document_mask=False)


def test_any_number_of_documents_is_one_graph() -> None:
    graphs = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    model = model_of(LLAMA3).float()
    model.blocks[0].compile(backend=count, fullgraph=True, dynamic=False)
    tokens = packed(torch.Generator().manual_seed(0))
    for separators in (Separators(BOS, EOS), Separators(None, 500), Separators(None, BOS), Separators(None, 77)):
        bounds = any_number_of(torch.from_numpy(separators.bounds(tokens.numpy())))
        model(tokens, bounds=bounds)
    assert graphs == 1


def test_the_canary_looks_within_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled block that attends beyond its document is seen."""
    aot = dataclasses.replace(Compile(), enable=True, backend="aot_eager")
    given = LLAMA3, REFERENCE, aot, torch.float32, CPU, 2, 16
    assert canary.check_compiled_gradients(*given, document_mask=True) < 1e-5
    torch.compiler.reset()
    beyond = dataclasses.replace(REFERENCE, attention=lambda q, k, v, bounds: REFERENCE.attention(q, k, v))
    with pytest.raises(NumericsError, match="is off by"):
        canary.check_compiled_gradients(LLAMA3, beyond, *given[2:], document_mask=True)


def test_what_is_compared_has_two_documents_a_sequence() -> None:
    assert split_in_two(2, 9, CPU).tolist() == [0, 3, 9, 12, 18]
    assert split_in_two(2, 1, CPU).tolist() == [0, 0, 1, 1, 2]


def test_the_dry_step_has_many_documents() -> None:
    assert many(2, 130, CPU).tolist() == [0, 64, 128, 130, 194, 258, 260]


class Rows:
    """A source of one sequence a step."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows, self.read = rows, 0
        self.identity: dict[str, Any] = {}

    def describe(self) -> str:
        return ""

    def next_step(self, stopping: Any) -> Step:
        row = np.array([self.rows[self.read % len(self.rows)]])
        self.read += 1
        return Step([(row, row)], {}, self.read)

    def state(self) -> int:
        return self.read

    def load_state(self, state: int) -> None:
        self.read = state

    def state_to_json(self, state: int) -> dict[str, Any]:
        return {}


def test_batches_have_the_bounds_of_their_documents() -> None:
    rows = [[1, 5, 2, 1, 6, 2], [7, 2, 1, 8, 9, 9]]
    loader = Loader(Rows(rows), CPU, Separators(1, 2))
    found = [next(loader)[0].bounds for _ in rows]
    assert [bounds.tolist() for bounds in found if bounds is not None] == [[0, 3, 6], [0, 2, 6]]
    loader.close()
    plain = Loader(Rows(rows), CPU)
    assert next(plain)[0].bounds is None
    plain.close()


def losses(run_dir: Path) -> dict[int, tuple[float, float | None]]:
    """By step: the loss, and that of validation."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    validation = {record["step"]: record["validation_loss"] for record in records if "validation_loss" in record}
    return {r["step"]: (r["loss"], validation.get(r["step"])) for r in records if "loss" in r}


def test_a_run_within_documents_continues_as_if_it_had_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for i in range(120):
        (text / f"{i}.txt").write_text(" ".join(f"{word} of {i}" for word in ("alpha", "beta", "gamma", "delta")))
    seen: list[Tensor | None] = []
    forward = Llama.forward

    def watched(self: Llama, *given: Any, bounds: Tensor | None = None) -> Tensor:
        seen.append(bounds)
        return forward(self, *given, bounds=bounds)

    monkeypatch.setattr(Llama, "forward", watched)

    def run(name: str, *more: str) -> dict[int, tuple[float, float | None]]:
        places = [f"--training.dataset_path={text}", f"--job.dump_folder={tmp_path / name}"]
        monkeypatch.setattr(sys, "argv", ["titan_fast.train", *TINY, *places, *more])
        main()
        return losses(tmp_path / name)

    masked = "--training.document_mask=True"
    whole = run("whole", masked, "--training.dry_step=always")
    assert len(seen) == 1 + 4 + 2  # the dry step, training, validation
    assert seen[0] is not None and seen[0].tolist() == [0, 32, 64]
    assert all(bounds is not None and len(bounds) > 1 + 2 and bounds[-1] == 2 * 32 for bounds in seen[1:])
    run("parts", masked, "--training.steps=2", "--lr_scheduler.total_steps=4")
    assert run("parts", masked) == whole
    seen.clear()
    run("plain", "--training.dry_step=always")
    assert seen == [None] * 7


TINY = [
    "--model.dim=32", "--model.n_layers=1", "--model.n_heads=2", "--model.n_kv_heads=1", "--model.ffn_dim=48",
    "--model.vocab_size=300", "--training.seq_len=32", "--training.local_batch_size=2", "--training.steps=4",
    "--validation.freq=2", "--validation.steps=1", "--metrics.log_freq=1", "--metrics.sample_prompt=",
]  # fmt: skip
