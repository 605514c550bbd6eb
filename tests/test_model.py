"""The model, compared with Hugging Face's LlamaForCausalLM; its published sizes, cache and initial weights."""

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from gradients import gradient
from shapes import ALL, LLAMA2, LLAMA3, LLAMA31, TIED
from titan_kernels import reference
from transformers import LlamaConfig, LlamaForCausalLM

from titan_fast.config import from_options
from titan_fast.errors import ConfigError
from titan_fast.flavors import FLAVORS, ModelShape
from titan_fast.flops import parameter_count
from titan_fast.generate import Sampling, generate, generate_text, next_token
from titan_fast.generate import main as generate_command
from titan_fast.hf import hf_config, pack_qkv, to_hf, unpack_qkv
from titan_fast.loss import LinearCrossEntropy
from titan_fast.model import KVCache, Llama, init_values, init_weights, rope_tables
from titan_fast.ops import REFERENCE
from titan_fast.step import meta_model


def build(shape: ModelShape, **ops_changes: object) -> Llama:
    ops = dataclasses.replace(REFERENCE, **ops_changes)
    model = Llama(shape, ops, LinearCrossEntropy(ops, chunk_size=7))
    init_weights(model, seed=1)
    return model


@pytest.mark.parametrize(("seq_len", "longest"), [(32, 44), (64, 64)])
def test_positions_reach_the_end_of_a_sample(seq_len: int, longest: int) -> None:
    """Of a prompt with one token per byte, BOS before it, and 40 sampled tokens."""
    options = {"training.seq_len": [str(seq_len)], "metrics.sample_prompt": ["é<"], "metrics.sample_tokens": ["40"]}
    assert meta_model(from_options(options), LLAMA3, REFERENCE).cos.shape == (longest, LLAMA3.head_dim // 2)


def hugging_face_twin(model: Llama) -> LlamaForCausalLM:
    twin = LlamaForCausalLM(LlamaConfig(**{**hf_config(model.shape), "attn_implementation": "eager"}))
    weights = dict(to_hf(dict(model.named_parameters()), model.shape))
    missing = twin.load_state_dict(weights, strict=False).missing_keys
    assert missing == (["lm_head.weight"] if model.shape.tied else [])
    return twin


def random_tokens(shape: ModelShape, length: int = 48) -> torch.Tensor:
    return torch.randint(shape.vocab_size, (2, length), generator=torch.Generator().manual_seed(3))


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


UNITS = {"norm_linear": reference.norm_linear, "swiglu_linear": reference.swiglu_linear}


@pytest.mark.parametrize("changes", [{}, {"carry_residual": True}, UNITS], ids=["", "carried residual", "in units"])
@pytest.mark.parametrize("name", ALL)
def test_logits_and_gradients_equal_hugging_face(name: str, changes: dict[str, Any]) -> None:
    shape = ALL[name]
    model = build(shape, **changes)
    twin = hugging_face_twin(model)
    length = 200 if shape is LLAMA31 else 48  # beyond the original context, where scaling shows
    tokens = random_tokens(shape, length)
    logits, expected = model(tokens), twin(tokens).logits
    assert relative(logits, expected) < 1e-5

    labels = tokens.roll(-1, 1)
    F.cross_entropy(expected.flatten(0, 1), labels.flatten()).backward()
    model(tokens, labels, torch.tensor(1.0 / labels.numel())).backward()
    ours = dict(to_hf({name: gradient(p) for name, p in model.named_parameters()}, shape))
    theirs = {name: gradient(p) for name, p in twin.named_parameters()}
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert relative(ours[key], theirs[key]) < 1e-5, key


def test_rope_scaling_changes_the_tables_as_hugging_face_does() -> None:
    plain = dataclasses.replace(LLAMA31, rope_scaling=None)
    assert not torch.equal(rope_tables(LLAMA31, 64)[0], rope_tables(plain, 64)[0])
    rotary = LlamaForCausalLM(LlamaConfig(**hf_config(LLAMA31))).model.rotary_emb
    cos, sin = rotary(torch.zeros(1), torch.arange(512)[None])
    ours = rope_tables(LLAMA31, 512)
    torch.testing.assert_close(ours[0], cos[0, :, : LLAMA31.head_dim // 2], rtol=0, atol=2e-5)
    torch.testing.assert_close(ours[1], sin[0, :, : LLAMA31.head_dim // 2], rtol=0, atol=2e-5)


@pytest.mark.parametrize("flavor", FLAVORS)
def test_module_has_as_many_parameters_as_the_formula_says(flavor: str) -> None:
    with torch.device("meta"):
        model = Llama(FLAVORS[flavor])
    assert sum(p.numel() for p in model.parameters()) == parameter_count(FLAVORS[flavor])


def test_packing_qkv_keeps_groups_whole() -> None:
    q, k, v = (torch.randn(heads * LLAMA3.head_dim, LLAMA3.dim) for heads in (8, 2, 2))
    packed = pack_qkv(q, k, v, LLAMA3)
    for before, after in zip((q, k, v), unpack_qkv(packed, LLAMA3), strict=True):
        assert torch.equal(before, after)
    # Half of the rows are one key/value head with its four query heads, so each of two ranks has what it needs.
    half = packed[: len(packed) // 2]
    assert torch.equal(half, torch.cat((q[: len(q) // 2], k[: len(k) // 2], v[: len(v) // 2])))


def test_cache_gives_the_logits_of_the_whole_sequence() -> None:
    model = build(LLAMA3)
    tokens = random_tokens(LLAMA3, 20)
    with torch.no_grad():
        whole = model(tokens)
        caches = [KVCache() for _ in model.blocks]
        parts = [model(tokens[:, :12], caches=caches)]
        parts += [model(tokens[:, i : i + 1], caches=caches, start=i) for i in range(12, 20)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)


def test_text_goes_up_to_the_length_of_the_models_tables() -> None:
    model, greedy = build(LLAMA3), Sampling(temperature=0)
    prompt = random_tokens(LLAMA3, model.max_seq_len - 3)[:1]
    assert len(list(generate(model, prompt, 3, greedy))) == 3
    with pytest.raises(ConfigError, match=r"61 prompt tokens \+ 4 new ones are more than the 64 "):
        next(generate(model, prompt, 4, greedy))


def test_greedy_text_equals_hugging_face() -> None:
    model = build(LLAMA3)
    prompt = random_tokens(LLAMA3, 9)[:1]
    new = torch.cat(list(generate(model, prompt, 20, Sampling(temperature=0))), dim=1)
    twin = hugging_face_twin(model)
    expected = cast(Any, twin).generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(torch.cat((prompt, new), dim=1), expected)


@pytest.mark.parametrize(("bos_id", "prompt"), [(3, [7, 8]), (3, []), (None, [7, 8]), (None, [])])
def test_text_is_the_prompt_and_what_follows_without_what_begins_the_document(
    bos_id: int | None, prompt: list[int]
) -> None:
    decoded: list[list[int]] = []
    tokenizer = SimpleNamespace(
        bos_id=bos_id, eos_id=4, vocab_size=LLAMA3.vocab_size, encode=lambda text: prompt, decode=decoded.append
    )
    model, greedy = build(LLAMA3), Sampling(temperature=0)
    generate_text(model, cast(Any, tokenizer), "", 5, greedy, torch.device("cpu"))
    read = torch.tensor([([] if bos_id is None else [bos_id]) + prompt or [4]])
    new = [int(token) for token in generate(model, read, 5, greedy)]
    assert decoded == [prompt + new[: new.index(4) if 4 in new else None]]


def test_text_has_no_token_that_the_tokenizer_lacks() -> None:
    class Few:
        """A tokenizer with 5 ids, for a model with many more."""

        vocab_size, bos_id, eos_id = 5, None, 0

        def encode(self, text: str) -> list[int]:
            return [1]

        def decode(self, ids: list[int]) -> str:
            assert len(ids) > 1 and max(ids) < self.vocab_size
            return "text"

    model = build(LLAMA3)
    model.head.weight.data[0] = 0.0
    sampling = Sampling(temperature=100.0, top_k=0)
    assert generate_text(model, cast(Any, Few()), "x", 20, sampling, torch.device("cpu")) == "text"


def test_sampling_obeys_top_k_and_top_p() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    generator = torch.Generator().manual_seed(0)

    def seen(**changes: float) -> set[int]:
        sampling = Sampling(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0} | changes)  # type: ignore[arg-type]
        return {int(next_token(logits, sampling, generator)) for _ in range(300)}

    assert seen() == {0, 1, 2, 3}
    assert seen(top_k=2) == {0, 1}
    assert seen(top_p=0.79) == {0, 1}
    assert seen(top_p=0.81) == {0, 1, 2}
    assert seen(top_p=0.1) == {0}
    assert seen(temperature=0) == seen(temperature=0.01) == {0}


def test_a_seed_draws_the_same_text_again() -> None:
    model, prompt = build(LLAMA3), random_tokens(LLAMA3, 9)[:1]

    def drawn(seed: int) -> list[int]:
        return torch.cat(list(generate(model, prompt, 20, Sampling(seed=seed))), dim=1).flatten().tolist()

    assert drawn(1) == drawn(1) != drawn(2)


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    one, two, other = build(LLAMA3), build(LLAMA3), Llama(LLAMA3)
    init_weights(other, seed=2)
    for (name, a), b, c in zip(one.named_parameters(), two.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert name.endswith("norm.weight") or not torch.equal(a, c), name
    gate, up = (one.get_parameter(f"blocks.0.feed_forward.{name}.weight") for name in ("gate", "up"))
    assert not torch.equal(gate, up)


@pytest.mark.parametrize(
    ("name", "shape", "deviation"),
    [
        ("embedding.weight", LLAMA3, 1.0),
        ("embedding.weight", TIED, 64**-0.5),
        ("head.weight", LLAMA3, 64**-0.5),
        ("blocks.1.attention.qkv.weight", LLAMA3, 0.02),
        ("blocks.1.feed_forward.up.weight", LLAMA3, 0.02),
        ("blocks.1.attention.out.weight", LLAMA3, 0.01),  # both: 0.02 / sqrt(2 x 2 layers)
        ("blocks.1.feed_forward.down.weight", LLAMA3, 0.01),
    ],
)
def test_initial_weights_are_normal_and_cut_at_three_deviations(name: str, shape: ModelShape, deviation: float) -> None:
    values = init_values(name, torch.Size((512, 512)), shape, 0, "cpu")
    assert values.std().item() == pytest.approx(0.98658 * deviation, rel=0.01)  # of a normal that is cut there
    assert 2.9 * deviation < values.abs().max() <= 3 * deviation


def test_first_loss_is_that_of_a_uniform_guess() -> None:
    for shape in (LLAMA2, LLAMA3, LLAMA31):  # a tied model first predicts the token it has just read
        model, tokens = build(shape), random_tokens(shape)
        loss = model(tokens, tokens.roll(-1, 1), torch.tensor(1 / tokens.numel()))
        assert abs(loss.item() - torch.tensor(float(shape.vocab_size)).log().item()) < 0.7


@pytest.mark.parametrize("words", ["--temperature nan", "--temperature 1e-40", "--temperature inf", f"--seed {2**64}"])
def test_a_draw_that_is_none_is_refused(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["generate", "--checkpoint", "nowhere", *words.split()])
    with pytest.raises(SystemExit) as ended:
        generate_command()
    assert ended.value.code == 2


def test_what_is_generated_cannot_steer_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither can the prompt, which is repeated."""
    monkeypatch.setattr("titan_fast.generate.load_model", lambda *_: (None, None, None))
    monkeypatch.setattr("titan_fast.generate.generate_text", lambda model, tokenizer, prompt, *_: prompt + "\x07\n\tb")
    monkeypatch.setattr(
        "sys.argv", ["generate", "--checkpoint", "somewhere", "--prompt", "a\x1b[2J", "--device", "cpu"]
    )
    generate_command()
    assert capsys.readouterr().out == "a\ufffd[2J\ufffd\n\tb\n"
