"""Other projects' training steps get what they expect, and run where they can."""

import dataclasses
import importlib.util

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import peers, train_cell
from benchmarks.peers import PEERS, Made, attention_backends, hugging_face, run_peer
from benchmarks.step_timing import Length
from benchmarks.train_cells import cells
from benchmarks.variants import How
from benchmarks.workloads import SMOKE_SEQ_LEN, Cell, config_of, rehearsed, shape_of
from titan_fast.flavors import FLAVORS
from titan_fast.loader import Loader

CPU, META = torch.device("cpu"), torch.device("meta")
HOW = How(smoke=True, length=Length(1, 2, 1), profiles=False)


def cell_of(peer: str, part: str = "peers") -> Cell:
    return rehearsed(next(cell for cell in cells((part,)) if cell.peer == peer))


@pytest.mark.parametrize(
    ("peer", "home"),
    [("torchtitan pure bfloat16", CPU), ("torchtitan as shipped", CPU), ("Hugging Face + Liger", META)],
)
def test_batches_come_where_the_peers_step_wants_them(
    monkeypatch: pytest.MonkeyPatch, peer: str, home: torch.device
) -> None:
    """torchtitan counts labels in a tensor on the host, and moves the batch itself. The device here is `meta`, which
    like CUDA is not the host."""
    seen: list[torch.device] = []
    loaders: list[Loader] = []

    def make(*_: object) -> Made:
        def step() -> None:
            (batch,) = next(loaders[-1])
            seen.extend((batch.tokens.device, batch.labels.device))
            valid = torch.tensor(0)
            if peer.startswith("torchtitan"):
                valid += (batch.labels != -100).sum()  # as its train_step does

        return Made(loaders.append, step, lambda: 1.0, {})

    monkeypatch.setitem(PEERS, peer, make)
    (row,) = run_peer(cell_of(peer), META, HOW)
    assert "error" not in row and set(seen) == {home}


def test_hugging_face_compiles_all_layers_with_one_graph_and_the_last_norm_with_another() -> None:
    cell = cell_of("Hugging Face", "peers-3b")
    cell = dataclasses.replace(
        cell, workload=dataclasses.replace(cell.workload, options=cell.workload.options | {"model.n_layers": 12})
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    (row,) = run_peer(cell, CPU, HOW)
    assert "error" not in row and row["complete"] and row["versions"]["transformers"]
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    assert row["graphs"] == {"compiled": 2, "breaks": 0}
    assert torch._dynamo.config.recompile_limit == train_cell.RECOMPILE_LIMIT


def test_a_search_gives_a_peer_larger_batches() -> None:
    found = cell_of("Hugging Face + Liger", "best")
    cell = dataclasses.replace(found, peer="Hugging Face", variants=found.variants[:2])
    sizes: list[tuple[int, ...]] = []
    honest = peers._hugging_face_loss

    def seen(model: object, batch: peers.Batch, liger: bool) -> torch.Tensor:
        sizes.append(tuple(batch.tokens.shape))
        return honest(model, batch, liger)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(peers, "_hugging_face_loss", seen)
        rows = run_peer(cell, CPU, HOW)
    assert [row["variant"] for row in rows] == ["batch 2", "batch 4"]
    assert all(row["complete"] for row in rows)
    assert list(dict.fromkeys(sizes)) == [(2, SMOKE_SEQ_LEN), (4, SMOKE_SEQ_LEN)]


def test_hugging_face_takes_the_attention_that_is_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    first, *_ = attention_backends(torch.device("cuda"))
    assert first == SDPBackend.CUDNN_ATTENTION
    capability = (8, 0)
    first, *_ = attention_backends(torch.device("cuda"))
    assert first == SDPBackend.FLASH_ATTENTION


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
def test_compiled_layers_are_not_cut_by_ligers_kernels_and_the_loss_is_ligers(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "forward", LlamaForCausalLM.forward)  # Liger replaces it for good
    rows = []
    for peer in ("Hugging Face", "Hugging Face + Liger"):
        torch._dynamo.reset()
        rows += run_peer(cell_of(peer, "peers-3b"), CPU, HOW)
    plain, liger = rows
    assert liger["graphs"] == plain["graphs"] == {"compiled": 2, "breaks": 0}
    assert LlamaForCausalLM.forward.__module__.startswith("liger_kernel")
    # Liger's mean leaves out each sequence's last token, here one of 8.
    assert liger["last_loss"] == pytest.approx(plain["last_loss"], rel=5e-3)


def test_what_a_peer_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    work = cell_of("Hugging Face + Liger").workload
    with pytest.raises(RuntimeError, match="need a GPU"):
        hugging_face(config_of(work, {}, True), shape_of(work, True), CPU, liger=True)


@pytest.mark.skipif(importlib.util.find_spec("torchtitan") is None, reason="torchtitan is not installed")
@pytest.mark.parametrize(
    ("peer", "part"),
    [
        ("torchtitan pure bfloat16", "best"),
        ("torchtitan as shipped", "peers"),
        ("torchtitan as shipped", "peers-rank0"),
    ],
)
def test_torchtitans_trainer_trains(peer: str, part: str) -> None:
    rows = run_peer(cell_of(peer, part), CPU, HOW)
    assert all("error" not in row and row["complete"] for row in rows), rows


@pytest.mark.skipif(importlib.util.find_spec("torchtitan") is None, reason="torchtitan is not installed")
def test_torchtitan_has_the_attention_of_our_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here torch's own flash stands for FlashAttention 4's."""
    activated: list[tuple[object, ...]] = []
    seen: list[list[SDPBackend]] = []
    monkeypatch.setattr(peers, "activate_flash", lambda *of: activated.append(of))
    cell = cell_of("torchtitan pure bfloat16", "peers-fa4")
    shape, use = shape_of(cell.workload, True), peers._use_attention

    def noted(model: nn.Module, backends: list[SDPBackend]) -> None:
        use(model, backends)
        seen.extend(module.sdpa_backends for module in model.modules() if hasattr(module, "sdpa_backends"))  # type: ignore[misc]

    monkeypatch.setattr(peers, "_use_attention", noted)
    (row,) = run_peer(cell, CPU, HOW)
    assert "error" not in row and row["complete"]
    assert activated == [("fa4", shape.n_heads // shape.n_kv_heads, shape.head_dim, torch.bfloat16, CPU)]
    assert seen == [[SDPBackend.FLASH_ATTENTION]] * shape.n_layers


def test_without_a_package_no_peer_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "activate_flash", lambda *of: pytest.fail("activated"))
    work = cell_of("torchtitan pure bfloat16").workload
    config, shape = config_of(work, {}, True), shape_of(work, True)
    assert peers.chosen_attention(config, shape, CPU) == attention_backends(CPU)


def test_a_loop_for_one_device_is_no_rank_of_many() -> None:
    one = dataclasses.replace(cell_of("torchtitan as shipped", "peers-rank0"), peer="Hugging Face")
    with pytest.raises(ValueError, match="Hugging Face is a loop for one device, and 4 were asked for"):
        run_peer(one, CPU, HOW)


def test_torchtitans_shape_is_ours() -> None:
    """Its feed-forward width is a formula, here solved for the multiplier."""
    work = cell_of("torchtitan pure bfloat16").workload

    class Llama3:
        TransformerModelArgs = staticmethod(lambda **given: given)

    for name in ("llama3_1b", "llama3_8b"):
        shape = FLAVORS[name] if not FLAVORS[name].tied else dataclasses.replace(FLAVORS[name], tied=False)
        given = peers._torchtitan_args(Llama3, shape)
        width = int(given["ffn_dim_multiplier"] * int(8 * shape.dim / 3))
        multiple = given["multiple_of"]
        assert multiple * ((width + multiple - 1) // multiple) == shape.ffn_dim
    words = peers._torchtitan_arguments(config_of(work, {"compile.enable": True}, True), "name", as_shipped=False)
    assert words[words.index("--training.dtype") + 1] == "bfloat16" and words[-1] == "--compile.enable"
    assert "--model.converters" not in words
    rowwise = {"float8.enable": True, "float8.recipe_name": "rowwise"}
    words = peers._torchtitan_arguments(config_of(work, rowwise, True), "name", as_shipped=False)
    assert words[words.index("--model.converters") + 1] == "quantize.linear.float8"
    assert words[words.index("--quantize.linear.float8.recipe_name") + 1] == "rowwise"
