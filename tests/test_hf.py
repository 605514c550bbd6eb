"""Import and export of Hugging Face folders, judged by what transformers and safetensors write and read."""

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folders import assert_same_tensors, edit_json, hf_folder, tensors
from safetensors.torch import load_file, save_file
from shapes import ALL, LLAMA2, LLAMA3, LLAMA31, TIED
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from titan_fast import hf, manifest
from titan_fast.config import from_dict, model_shape
from titan_fast.errors import CheckpointError, ConfigError, DataError
from titan_fast.flavors import FLAVORS, ModelShape
from titan_fast.generate import Sampling, generate, load_model
from titan_fast.hf import hf_config, hf_sizes, our_sizes, read_parameter, shape_from_hf
from titan_fast.hf_convert import export_checkpoint, import_model
from titan_fast.hf_files import HuggingFaceFolder, plan_shards
from titan_fast.initial_weights import CheckpointWeights
from titan_fast.tokenizer import train_sentencepiece

ONE_GROUP = dataclasses.replace(LLAMA3, n_kv_heads=1)  # q, k and v of it are views of one matrix
SHAPES = ALL | {"one group": ONE_GROUP}
BIG = 10**9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SHAPES)
def test_round_trip_is_bit_exact(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    sharded = dtype is torch.float32
    source = hf_folder(SHAPES[name], tmp_path / "source", dtype, "60KB" if sharded else "1GB")
    assert (source / "model.safetensors.index.json").exists() == sharded
    import_model(source, tmp_path / "ours")
    assert manifest.problem(tmp_path / "ours" / "step-0") is None
    export_checkpoint(tmp_path / "ours", tmp_path / "back", None, 60_000 if sharded else BIG)
    assert_same_tensors(tensors(source), tensors(tmp_path / "back"))

    import_model(tmp_path / "back", tmp_path / "again")
    one, two = (CheckpointWeights(tmp_path / folder / "step-0") for folder in ("ours", "again"))
    assert_same_tensors(dict(one), dict(two))
    assert model_shape(from_dict(hf_tables(one.path)).model) == SHAPES[name]


def hf_tables(checkpoint: Path) -> dict[str, Any]:
    import tomllib

    return tomllib.loads((checkpoint / "config.toml").read_text())


def test_shards_are_no_larger_than_asked_and_the_index_names_each_tensor(tmp_path: Path) -> None:
    import_model(hf_folder(LLAMA2, tmp_path / "source"), tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "back", None, 50_000)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    files = {file.name: load_file(file) for file in (tmp_path / "back").glob("*.safetensors")}
    assert {(name, file) for file, held in files.items() for name in held} == set(index["weight_map"].items())
    assert index["metadata"]["total_size"] == sum(t.nbytes for held in files.values() for t in held.values())
    assert all(sum(t.nbytes for t in held.values()) <= 50_000 for held in files.values())
    assert plan_shards({"a": 3, "b": 3, "c": 9, "d": 1}, 6) == [["a", "b"], ["c"], ["d"]]


def test_conversion_of_dtype_is_asked_for_and_said(tmp_path: Path) -> None:
    source = hf_folder(LLAMA3, tmp_path / "source")
    import_model(source, tmp_path / "ours")
    lines = export_checkpoint(tmp_path / "ours", tmp_path / "half", torch.bfloat16, BIG)
    assert "bfloat16, converted from float32" in lines[0]
    assert_same_tensors({name: t.bfloat16() for name, t in tensors(source).items()}, tensors(tmp_path / "half"))
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16
    assert "converted" not in export_checkpoint(tmp_path / "ours", tmp_path / "same", torch.float32, BIG)[0]


TEXT = "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. " * 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama2", "llama3.1", "tied"])
def test_transformers_says_the_same(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Equal logits and greedy text, from the exported folder by transformers and from the checkpoint by ourselves."""
    train_sentencepiece([TEXT], 300, tmp_path / "tokenizer.model", seed=0)
    shape = dataclasses.replace(ALL[name], vocab_size=300)
    import_model(hf_folder(shape, tmp_path / "source", dtype), tmp_path / "ours", tmp_path / "tokenizer.model")
    export_checkpoint(tmp_path / "ours", tmp_path / "back", None, BIG)
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    ours, our_tokenizer, _ = load_model(tmp_path / "ours", torch.device("cpu"))

    tokens = torch.randint(300, (1, 200 if shape.max_seq_len > 200 else 60))
    with torch.no_grad():
        logits, expected = ours(tokens), theirs(tokens).logits
    assert ((logits - expected).norm() / expected.norm()).item() < 1e-5

    assert our_tokenizer.encode(TEXT) == their_tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert their_tokenizer.decode(our_tokenizer.encode(TEXT)) == TEXT
    inputs = their_tokenizer("the quick brown", return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == [our_tokenizer.bos_id, *our_tokenizer.encode("the quick brown")]
    new = torch.cat(list(generate(ours, inputs["input_ids"], 30, Sampling(temperature=0))), dim=1)
    found = theirs.generate(**inputs, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(torch.cat((inputs["input_ids"], new), dim=1), found)


def test_small_files_of_the_source_come_back(tmp_path: Path) -> None:
    train_sentencepiece([TEXT], 300, tmp_path / "tokenizer.model", seed=0)
    shape = dataclasses.replace(LLAMA3, vocab_size=300)
    import_model(hf_folder(shape, tmp_path / "first"), tmp_path / "ours", tmp_path / "tokenizer.model")
    export_checkpoint(tmp_path / "ours", tmp_path / "source", None, BIG)
    edit_json(tmp_path / "source" / "generation_config.json", eos_token_id=[2, 7], temperature=0.6)
    import_model(tmp_path / "source", tmp_path / "again")
    export_checkpoint(tmp_path / "again", tmp_path / "back", None, BIG)
    for name in ("generation_config.json", "tokenizer_config.json", "tokenizer.model"):
        assert (tmp_path / "back" / name).read_bytes().split() == (tmp_path / "source" / name).read_bytes().split()
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == [2, 7]
    # What no import has put there is not handed on.
    imported, moved = tmp_path / "again" / "step-0", tmp_path / "again" / "being-written"
    for name in ("model.safetensors", "pytorch_model.bin", "modeling_llama.py"):
        (imported / "hf" / name).write_text("not ours")
    (imported / manifest.NAME).unlink()
    manifest.publish(imported.rename(moved), imported)
    export_checkpoint(tmp_path / "again", tmp_path / "third", None, BIG)
    assert {path.name for path in (tmp_path / "third").iterdir()} == {
        path.name for path in (tmp_path / "back").iterdir()
    }
    assert_same_tensors(tensors(tmp_path / "third"), tensors(tmp_path / "back"))


def test_a_vocabulary_that_is_too_small_is_refused(tmp_path: Path) -> None:
    train_sentencepiece([TEXT], 300, tmp_path / "tokenizer.model", seed=0)
    with pytest.raises(DataError, match="300 ids and the model's vocabulary 131"):
        import_model(hf_folder(LLAMA2, tmp_path / "source"), tmp_path / "ours", tmp_path / "tokenizer.model")


# config.json


@pytest.mark.parametrize("shape", [*FLAVORS.values(), *SHAPES.values()])
def test_shape_comes_back_from_its_config(shape: ModelShape) -> None:
    assert shape_from_hf(json.loads(json.dumps(hf_config(shape)))) == shape


@pytest.mark.parametrize("shape", [LLAMA2, LLAMA3, LLAMA31, TIED])
def test_shape_is_read_from_transformers_own_config(shape: ModelShape) -> None:
    """Whatever the installed version's layout, and whatever it fills in by itself."""
    assert shape_from_hf(json.loads(LlamaConfig(**hf_config(shape)).to_json_string(use_diff=False))) == shape


def test_missing_keys_mean_what_transformers_takes_them_for() -> None:
    least = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "intermediate_size": 96, "vocab_size": 131}  # fmt: skip
    full = LlamaConfig(**{key: value for key, value in least.items() if key != "model_type"})
    expected = shape_from_hf(json.loads(full.to_json_string(use_diff=False)))
    assert shape_from_hf(least) == expected == ModelShape(64, 2, 4, 4, 96, 131, 2048, norm_eps=1e-6)


FACTORS = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"rope_type": "llama3", **FACTORS}},
        {"rope_scaling": {"type": "llama3", **FACTORS}},
        {
            "rope_scaling": ...,
            "rope_theta": ...,
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **FACTORS},
        },
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000, **FACTORS}},
    ],
)
def test_every_spelling_of_the_scaling_is_read(changes: dict[str, Any]) -> None:
    assert shape_from_hf(changed(hf_config(LLAMA31), changes)) == LLAMA31


def changed(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in (config | changes).items() if value is not ...}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
        ({"model_type": ...}, "model_type is None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is ['LlamaForSequenceClassification']"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is {'quant_method': 'fp8'}"),
        ({"head_dim": 24}, "head_dim is 24"),
        ({"num_key_value_heads": 3}, "n_heads 4 is not divisible by n_kv_heads 3"),
        ({"num_attention_heads": 5}, "dim 64 is not divisible by n_heads 5"),
        ({"hidden_size": "64"}, "hidden_size is '64', not an integer"),
        ({"hidden_size": True}, "hidden_size is True, not an integer"),
        ({"vocab_size": ...}, "vocab_size is None"),
        ({"vocab_size": 0}, "vocab_size 0 is not positive"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small', not a number"),
        ({"rope_theta": 10**400}, "rope_theta is beyond any float"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is None"),
        ({"rope_scaling": {"rope_type": "llama3", **FACTORS, "factor": 0}}, "factor 0.0 is not positive"),
        ({"rope_scaling": 8.0}, "rope_scaling is 8.0, not a table"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        (
            {"rope_scaling": {"rope_type": "llama3", **FACTORS}, "rope_parameters": {"rope_type": "default"}},
            "differ",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_represented_is_refused_by_key_and_value(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        shape_from_hf(changed(hf_config(LLAMA2), changes))
    assert words in str(caught.value) and "\n" not in str(caught.value)


# Damaged, incomplete and misfit folders


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: rewritten(folder, lambda held: held.pop(name))


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def truncated(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


def indexed(weight_map: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return damage


NORM, QUERY = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"
DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda folder: (folder / "config.json").unlink(), "neither config.json nor params.json is there"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
    (lambda folder: (folder / "config.json").write_text("[]"), "config.json is not a JSON object"),
    (lambda folder: (folder / "model.safetensors").unlink(), "neither model.safetensors nor model.safetensors.index"),
    (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "only pickled *.bin files"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "damaged or not safetensors"),
    (truncated, "damaged or not safetensors"),
    (without(NORM), f"{NORM} missing"),
    (lambda folder: rewritten(folder, lambda held: held.update(more=torch.ones(1))), "more unknown to this model"),
    (
        lambda folder: rewritten(folder, lambda held: held.update({QUERY: held[QUERY][1:].clone()})),
        f"{QUERY} of another size than the config's: [63, 64], not [64, 64]",
    ),
    (lambda folder: edit_json(folder / "config.json", vocab_size=130), "lm_head.weight of another size"),
    (lambda folder: edit_json(folder / "config.json", tie_word_embeddings=True), "lm_head.weight differs from"),
    (lambda folder: rewritten(folder, lambda held: held.update({NORM: held[NORM].to(torch.int8)})), f"{NORM} is I8"),
    (
        lambda folder: rewritten(folder, lambda held: held.update({QUERY: held[QUERY].half()})),
        "have different dtypes torch.float16, torch.float32, torch.float32",
    ),
    (lambda folder: rewritten(folder, lambda held: held[QUERY][3, 5].fill_(math.inf)), f"{QUERY} has values that"),
    (lambda folder: rewritten(folder, lambda held: held[NORM][1].fill_(math.nan)), f"{NORM} has values that"),
    (lambda folder: edit_json(folder / "config.json", num_hidden_layers=10**9), "n_layers 1000000000 is more than"),
    (lambda folder: (folder / "generation_config.json").write_text("[]"), "generation_config.json is not a JSON"),
    (indexed({NORM: "model-2.safetensors"}), f"{NORM} should be in model-2.safetensors, and there is no such file"),
    (indexed({NORM: "../model.safetensors"}), "not a plain file name"),
    (indexed({"ghost": "model.safetensors"}), "ghost is in model.safetensors, which has no such tensor"),
    (indexed([]), "weight_map is not a table"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=[words[:40] for _, words in DAMAGES])
def test_a_damaged_folder_is_refused_in_a_sentence(damage: Callable[[Path], Any], words: str, tmp_path: Path) -> None:
    folder = hf_folder(LLAMA2, tmp_path / "source")
    damage(folder)
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        import_model(folder, tmp_path / "ours")
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert "cannot be written" not in str(caught.value)  # the disk is not to blame
    assert not any((tmp_path / "ours").glob("*")) and not any((tmp_path / "ours").glob(".*"))


def test_constants_of_old_files_and_a_second_copy_of_the_head_do_no_harm(tmp_path: Path) -> None:
    folder = hf_folder(TIED, tmp_path / "source")
    before = tensors(folder)
    extra = {"lm_head.weight": before["model.embed_tokens.weight"].clone(),
             "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}  # fmt: skip
    rewritten(folder, lambda held: held.update(extra))
    import_model(folder, tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "back", None, BIG)
    assert_same_tensors(before, tensors(tmp_path / "back"))


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path) -> None:
    import_model(hf_folder(LLAMA3, tmp_path / "source"), tmp_path / "ours")
    file = next((tmp_path / "ours" / "step-0").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="sha256 mismatch"):
        export_checkpoint(tmp_path / "ours", tmp_path / "back", None, BIG)
    assert not (tmp_path / "back").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    source = hf_folder(LLAMA3, tmp_path / "source")
    import_model(source, tmp_path / "ours")
    with pytest.raises(CheckpointError, match="there is a checkpoint already"):
        import_model(source, tmp_path / "ours")
    with pytest.raises(CheckpointError, match="it already exists"):
        export_checkpoint(tmp_path / "ours", source, None, BIG)


def test_any_part_of_a_parameter_is_that_part_of_the_whole(tmp_path: Path) -> None:
    found = HuggingFaceFolder(hf_folder(LLAMA3, tmp_path / "source"))
    for name, size in our_sizes(LLAMA3).items():
        whole = read_parameter(found, name)
        for start, stop in ((0, 1), (3, 41), (size[0] // 2, size[0]), (0, size[0])):
            window = (slice(start, stop), *(slice(length // 4, length // 2) for length in size[1:]))
            assert torch.equal(read_parameter(found, name, window), whole[window]), (name, window)


def test_only_the_groups_of_a_part_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LLAMA3's packed projection has two groups of (4 + 2) x 8 rows; the part lies in the second."""
    found = HuggingFaceFolder(hf_folder(LLAMA3, tmp_path / "source"))
    windows: dict[str, Any] = {}
    read = found.read
    monkeypatch.setattr(found, "read", lambda name, window: windows.update({name: window}) or read(name, window))
    read_parameter(found, "blocks.1.attention.qkv.weight", (slice(50, 60), slice(0, 64)))
    rows = {name.split(".")[-2]: window[0] for name, window in windows.items()}
    assert rows == {"q_proj": slice(32, 64), "k_proj": slice(8, 16), "v_proj": slice(8, 16)}


# The command, and its memory


def run_command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["titan_fast.hf", *map(str, words)])
    try:
        hf.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    source, ours, back = tmp_path / "source", tmp_path / "ours", tmp_path / "back"
    hf_folder(LLAMA31, source)
    assert run_command(monkeypatch, "import", source, "--out", ours) == 0
    said = capsys.readouterr().out
    assert f"wrote {ours / 'step-0'}" in said and "--model.rope_scaling 8.0 1.0 4.0 64 --checkpoint" in said
    assert run_command(monkeypatch, "export", ours / "step-0", "--out", back, "--max_shard_gb", "0.0001") == 0
    assert_same_tensors(tensors(source), tensors(back))
    assert len(list(back.glob("*.safetensors"))) > 1
    assert len({file.stat().st_mode for file in back.iterdir()}) == 1
    capsys.readouterr()
    assert run_command(monkeypatch, "export", tmp_path, "--out", back / "more") == 4
    assert capsys.readouterr().err.startswith("titan_fast: no checkpoint here [")
    for size in ("0", "nan", "inf"):
        assert run_command(monkeypatch, "export", ours, "--out", tmp_path / "x", "--max_shard_gb", size) == 2
    edit_json(source / "config.json", hidden_act="gelu")
    assert run_command(monkeypatch, "import", source, "--out", tmp_path / "y") == 2
    capsys.readouterr()
    assert run_command(monkeypatch, "import", source) == 2
    assert capsys.readouterr().err == "titan_fast: Missing from titan_fast.hf import: --out PATH; see --help\n"
    assert run_command(monkeypatch, "import") == 2
    assert capsys.readouterr().err == "titan_fast: Missing from titan_fast.hf import: PATH, --out PATH; see --help\n"
    for words in (["imprt", source], [source, "--out", tmp_path / "y"]):
        assert run_command(monkeypatch, *words) == 2
        said = f"titan_fast: {str(words[0])!r} is neither import nor export; write one of them first; see --help\n"
        assert capsys.readouterr().err == said
    (tmp_path / "saves" / "step-5").mkdir(parents=True)
    (tmp_path / "saves" / "step-5" / manifest.NAME).touch()
    edit_json(source / "config.json", hidden_act="silu")
    assert run_command(monkeypatch, "import", source, "--out", tmp_path / "saves" / "step-6") == 4
    assert "beside checkpoints it would be taken for one" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "saves").iterdir()] == ["step-5"]


_MEASURE = """
import sys
from pathlib import Path
from titan_fast.hf_convert import export_checkpoint, import_model
for folder in map(Path, sys.argv[1:]):
    import_model(folder, folder / "ours")
    export_checkpoint(folder / "ours", folder / "back", None, 10_000_000)
    # Not getrusage: its peak is inherited from the process that started this one.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) * 1024)
"""


def deep_folder(n_layers: int, folder: Path) -> int:
    """Makes a model's folder; the bytes of its weights."""
    shape = ModelShape(384, n_layers, 8, 4, 1536, vocab_size=512, max_seq_len=64)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config(shape)))
    weights = {name: torch.randn(size) for name, size in hf_sizes(shape).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in weights.values())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process's memory is read from /proc")
def test_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    few, many = deep_folder(2, tmp_path / "few"), deep_folder(14, tmp_path / "many")
    command = [sys.executable, "-c", _MEASURE, str(tmp_path / "few"), str(tmp_path / "many")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    least, most = map(int, done.stdout.split())  # the most that the process had so far
    assert many - few > 100_000_000
    assert most - least < 0.2 * (many - few), f"{most - least:,} bytes more for {many - few:,} bytes more of weights"


def test_a_parameter_that_hugging_faces_llama_lacks() -> None:
    with pytest.raises(CheckpointError, match=r"blocks\.3\.attention\.q_norm\.weight has no name"):
        hf.hf_names("blocks.3.attention.q_norm.weight")
