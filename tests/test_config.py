"""The config parser: precedence, and one sentence for every kind of mistake."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from titan_fast import config as settings
from titan_fast.config import (
    Config,
    Model,
    Parallelism,
    Training,
    from_dict,
    grad_accum_steps,
    known_keys,
    mesh_degrees,
    model_shape,
    parse,
    to_dict,
    without_effect,
)
from titan_fast.errors import ConfigError
from titan_fast.flavors import FLAVORS


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(list(argv))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text('[training]\nseq_len = 64\nsteps = 7\n[model]\nflavor = "llama3_8b"\n')
    return path


def test_nothing_gives_the_defaults() -> None:
    assert parse([]) == Config()


def test_file_before_defaults_command_line_before_file(toml: Path) -> None:
    for argv in (["--config", str(toml), "--training.steps", "9"], ["--training.steps=9", f"--config={toml}"]):
        training = parse(argv).training
        assert (training.seq_len, training.steps, training.local_batch_size) == (64, 9, Training().local_batch_size)
    assert parse(["--config", str(toml)]).model.flavor == "llama3_8b"


def test_the_last_word_counts() -> None:
    assert parse(["--training.steps", "9", "--training.steps", "8"]).training.steps == 8


@pytest.mark.parametrize("argv", [["--metrics.sample_prompt", "-x"], ["--metrics.sample_prompt=--foo bar"]])
def test_a_value_may_begin_with_a_dash(argv: list[str]) -> None:
    assert parse(argv).metrics.sample_prompt == argv[-1].removeprefix("--metrics.sample_prompt=")


@pytest.mark.parametrize(
    "key",
    [
        "job.dump_folder", "training.dataset_path", "validation.dataset_path", "training.dataset",
        "model.tokenizer_path", "compile.cache_folder", "checkpoint.initial_load_path",
    ],
)  # fmt: skip
def test_an_empty_path_is_refused(key: str) -> None:
    """As from an unset shell variable."""
    with pytest.raises(ConfigError, match=rf"{key} is empty"):
        parse([f"--{key}", ""])


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    paths = [
        "checkpoint.folder", "checkpoint.initial_load_path", "compile.cache_folder", "job.dump_folder",
        "metrics.save_tb_folder", "model.tokenizer_path", "profiling.save_memory_snapshot_folder",
        "profiling.save_traces_folder", "training.dataset_path", "validation.dataset_path",
    ]  # fmt: skip
    for key in known_keys():
        if key in paths:
            assert settings._value(parse([f"--{key}=~/x"]), key) == "/home/me/x"
            assert settings._value(parse([f"--{key}=x~/~y"]), key) == "x~/~y"
        else:
            assert "folder" not in key and "path" not in key
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.toml").write_text('[job]\ndump_folder = "~/x"\ndescription = "~/x"\n[training]\ndataset = "~/x"')
    config = parse(["--config=~/run.toml"])
    assert config.job.dump_folder == f"{tmp_path}/x" and config.job.description == config.training.dataset == "~/x"


def test_hyphens_are_underscores() -> None:
    assert parse(["--training.seq-len", "17"]).training.seq_len == 17


@pytest.mark.parametrize(
    ("word", "value"),
    [("True", True), ("False", False), ("true", True), ("false", False)],
)
def test_flags_take_a_word(word: str, value: bool) -> None:
    assert parse(["--compile.enable", word]).compile.enable is value
    assert parse(["--model.tied", word]).model.tied is value


def test_toml_booleans_and_floats(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[compile]\nenable = true\n[optimizer]\nlr = 1\neps = 1e-9\n[lr_scheduler]\ndecay_ratio = 0.25\n")
    config = parse(["--config", str(path)])
    assert config.compile.enable is True
    assert (config.optimizer.lr, config.optimizer.eps, config.lr_scheduler.decay_ratio) == (1.0, 1e-9, 0.25)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--training.seq_length", "5"], "unknown key 'training.seq_length'; did you mean training.seq_len?"),
        (["--trainin.steps", "5"], "did you mean training.steps?"),
        (["--steps", "5"], "did you mean training.steps?"),
        (["--validation.step", "5"], "did you mean validation.steps?"),
        (["--memory_estimation.enable", "5"], "see --help for all keys"),
        (["--checkpoint.export_dtype", "5"], "see --help for all keys"),
        (["--training.warmup_steps", "5"], "did you mean lr_scheduler.warmup_steps?"),
        (["--parallelism.pipeline_parallel_degree", "1"], "there is no pipeline parallelism here"),
        (["--model.name", "llama3"], "leave it out, model.flavor names the model"),
        (["--job.config-file=x.toml"], "unknown key 'job.config_file'; did you mean --config?"),
        (["--seq_len", "5"], "unknown key 'seq_len'; did you mean training.seq_len?"),
        (["--optimizer.learning_rate", "5"], "unknown key 'optimizer.learning_rate'"),
        (["--training.lr", "5"], "unknown key 'training.lr'; did you mean optimizer.lr?"),
        (["--zzzz", "5"], "unknown key 'zzzz'; see --help for all keys"),
        (["train"], "unexpected argument 'train'"),
        (["--training.steps"], "key 'training.steps' has no value"),
        (["--config", "a", "b"], "--config takes one path, not 2"),
        (["--config", "a", "--config", "b"], "--config is given twice"),
        (["--model.flavor", "llama3_8bb"], "unknown model.flavor 'llama3_8bb'; did you mean llama3_8b?"),
    ],
)
def test_unknown_names(argv: list[str], sentence: str) -> None:
    assert sentence in refusal(*argv)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--training.steps", "many"], ["wrong type", "training.steps", "many"]),
        (["--training.steps", "1.5"], ["wrong type", "training.steps", "1.5"]),
        (["--training.steps", "/a" * 90], ["wrong type", f"'{'/a' * 90}'"]),  # wider than a terminal
        (["--training.steps", "1", "2"], ["training.steps takes one value, not 2: '1', '2'; quote"]),
        (
            ["--metrics.sample_prompt", "def\nmain", *"abc"],
            [r"takes one value, not 4: 'def\nmain', 'a', 'b' and 1 more;"],
        ),
        (["--training.steps", "a---b[bold]x[/bold]|"], ["'a---b[bold]x[/bold]|';"]),
        (["--training.steps", "Value error"], ["'Value error';"]),
        (["--model.rope_scaling", "8", "1", "4"], ["wrong type", "FLOAT FLOAT FLOAT INT", "['8', '1', '4'];"]),
        (["--optimizer.lr", "inf"], ["optimizer.lr is inf, not a finite number"]),
        (["--optimizer.lr", "nan"], ["optimizer.lr is nan, not a finite number"]),
        (["--optimizer.lr", "-1"], ["optimizer.lr is -1.0, not 0 or more"]),
        (["--compile.enable", "maybe"], ["wrong type", "compile.enable", "maybe"]),
        (["--optimizer.name", "Adam"], ["wrong type", "optimizer.name", "Adam"]),
        (["--kernels.rope", "cuda"], ["wrong type", "kernels.rope", "cuda"]),
        (["--activation_checkpoint.mode", "some"], ["wrong type", "activation_checkpoint.mode", "some"]),
    ],
)
def test_wrong_types(argv: list[str], parts: list[str]) -> None:
    sentence = refusal(*argv)
    for part in parts:
        assert part in sentence


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"[training\nsteps = 1\n", "the config file is not valid TOML"),
        (b"\xff\xfe[training]\n", "the config file is not valid TOML"),
        (b"{'training': {'steps': 1}}", "the config file is not valid TOML"),
        (b"steps = 1\n", "key 'steps' stands outside a table"),
        (b"[[training]]\nsteps = 1\n", "[[training]] is a list of tables"),
        (b"[training]\nstep = 1\n", "unknown key 'training.step'; did you mean training.steps?"),
        (b'[training]\nsteps = "3"\n', "training.steps is the text '3', and takes none; write"),
        (b'[compile]\nenable = "true"\n', "compile.enable is the text 'true', and takes none"),
        (b"[training]\nsteps = 1.5\n", "wrong type"),
        (b"[training.more]\nsteps = 1\n", "training.more"),
        (b"[training]\nsteps = [1]\n", "training.steps is the list [1], and takes one value; leave out the brackets"),
        (b'[compile]\ncomponents = [["blocks"]]\n', "wrong type"),
        (b"[job.dump_folder]\nx = 1\n", "job.dump_folder is a table, and takes one value; write it as NAME = VALUE"),
        (b"[model.rope_scaling]\nfactor = 8\n", "model.rope_scaling is a table, and takes a list"),
        (b"[quantize.linear.float8]\nenable = true\n", "unknown key 'quantize.linear'"),
        (b"[compile]\ncomponents = []\n", "key 'compile.components' has no value"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, part: str) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    assert part in refusal("--config", str(path))


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbf[training]\nsteps = 3\n")
    assert parse(["--config", str(path)]).training.steps == 3


def test_an_empty_folder_is_in_no_other_ones_way() -> None:
    said = refusal("--checkpoint.folder", "")
    assert "checkpoint.folder is ''" in said and "each other's way" not in said


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ("--model.dim 100000000000000000000", "dim 100000000000000000000 is more than 2,147,483,648"),
        ("--model.n_layers 100000000000000", "n_layers 100000000000000 is more than 10,000"),
        (
            f"--model.rope_scaling 8 1 4 {10**23}",
            "original_max_seq_len 100000000000000000000000 is not positive and at",
        ),
        (f"--training.local_batch_size {10**21}", "not a finite number below 2^63"),
        ("--training.local_batch_size 10000000", "training.local_batch_size is 10000000, not between 1 and 2^20"),
        (f"--training.global_batch_size {10**15}", "neither -1 nor between 1 and 2^40"),
        (f"--training.steps {2**63}", f"training.steps is {2**63}, not a finite number below 2^63"),
        ("--job.dry_run True --job.world_size 4294967296", "job.world_size is 4294967296, not between 1 and 2^20"),
        ("--job.dump_folder a\0b", "job.dump_folder is 'a\\x00b', which is not UTF-8 text without NUL"),
        ("--job.dump_folder a\udcff", "which is not UTF-8 text without NUL"),
    ],
)
def test_absurd_values(options: str, part: str) -> None:
    assert part in refusal(*options.split())


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ("--checkpoint.folder ..", "checkpoint.folder is '..', which is the run directory or holds it"),
        ("--checkpoint.folder .", "which is the run directory or holds it"),
        ("--checkpoint.folder=", "checkpoint.folder is ''"),
        ("--checkpoint.folder x/../train.log", "and the run has a train.log of its own"),
        ("--metrics.save_tb_folder data/tb", "and the run has a data of its own"),
        ("--profiling.save_traces_folder checkpoint", "'checkpoint' and checkpoint.folder are in each other's way"),
        ("--profiling.save_memory_snapshot_folder tb/x", "'tb/x' and metrics.save_tb_folder are in each other's way"),
        ("--job.dump_folder /a/b --checkpoint.folder /a", "checkpoint.folder is '/a', which is the run directory or"),
        ("--job.dump_folder /a --checkpoint.folder /a/run.lock", "and the run has a run.lock of its own"),
    ],
)
def test_folders_in_each_others_way(options: str, part: str) -> None:
    assert part in refusal(*options.split())


def test_folders_elsewhere() -> None:
    parse(["--job.dump_folder", "/a/run", "--checkpoint.folder", "../checkpoints", "--metrics.save_tb_folder", "/a/tb"])


def test_missing_file_and_folder(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.toml")
    assert (
        refusal("--config", missing)
        == f"cannot read the config file: No such file or directory [{missing}]; check the path"
    )
    assert "Is a directory" in refusal("--config", str(tmp_path))


RANGES = {
    "training.seq_len": (["0", "-1"], ["1"]),
    "training.local_batch_size": (["0"], ["1"]),
    "training.global_batch_size": (["0", "-2"], ["-1", "1"]),
    "training.steps": (["0", "-5"], ["1"]),
    "training.max_norm": (["-0.1", "nan", "inf"], ["0"]),
    "training.gc_freq": (["0"], ["1"]),
    "loss.chunk_size": (["-1"], ["0"]),
    "loss.z_loss": (["-1e-9"], ["0"]),
    "optimizer.lr": (["-1", "nan", "inf"], ["0"]),
    "optimizer.beta1": (["1", "-0.1"], ["0", "0.999"]),
    "optimizer.beta2": (["1", "1.5"], ["0", "0.999"]),
    "optimizer.eps": (["-1", "0"], ["1e-20"]),
    "optimizer.weight_decay": (["-1"], ["0"]),
    "lr_scheduler.warmup_steps": (["-1"], ["0"]),
    "lr_scheduler.total_steps": (["0"], ["1"]),
    "lr_scheduler.decay_ratio": (["-0.1", "1.1"], ["0", "1"]),
    "lr_scheduler.min_lr_factor": (["-0.1", "1.1"], ["0", "1"]),
    "parallelism.data_parallel_replicate_degree": (["0", "-1"], ["1"]),
    "parallelism.data_parallel_shard_degree": (["0", "-2"], ["-1", "1"]),
    "parallelism.tensor_parallel_degree": (["0"], ["1"]),
    "activation_checkpoint.memory_budget": (["-0.1", "1.1"], ["0", "1"]),
    "training.max_skipped_steps": (["0"], ["1"]),
    "checkpoint.interval": (["-1"], ["0"]),
    "checkpoint.interval_minutes": (["-1", "inf"], ["0"]),
    "checkpoint.max_failed_saves": (["0"], ["1"]),
    "checkpoint.keep_latest_k": (["-1"], ["0"]),
    "checkpoint.keep_every": (["-1"], ["0"]),
    "checkpoint.load_step": (["-2"], ["-1", "0"]),
    "validation.freq": (["0"], ["1"]),
    "validation.steps": (["0"], ["1"]),
    "metrics.log_freq": (["0"], ["1"]),
    "metrics.sample_freq": (["-1"], ["0"]),
    "metrics.sample_tokens": (["0"], ["1"]),
    "profiling.profile_freq": (["0"], ["1"]),
    "comm.init_timeout_seconds": (["0"], ["1"]),
    "comm.timeout_seconds": (["0"], ["1"]),
    "checkpoint.save_timeout_seconds": (["0"], ["1"]),
    "debug.seed": (["-1", str(2**63)], ["0", str(2**63 - 1)]),
}


def with_value(key: str, word: str) -> Config:
    """A Config with one value, made without the parser, which would take seconds for a hundred."""
    table, _, name = key.partition(".")
    kinds = settings.known_keys()[key].type
    value: Any = int(word) if word.lstrip("-").isdecimal() and "float" not in str(kinds) else float(word)
    config = Config()
    return dataclasses.replace(config, **{table: dataclasses.replace(getattr(config, table), **{name: value})})


@pytest.mark.parametrize("key", RANGES)
def test_ranges(key: str) -> None:
    refused, accepted = RANGES[key]
    for word in refused:
        with pytest.raises(ConfigError) as caught:
            settings.validate(with_value(key, word))
        value = getattr(getattr(with_value(key, word), key.partition(".")[0]), key.partition(".")[2])
        assert f"{key} is {value}, " in str(caught.value)
    for word in accepted:
        settings.validate(with_value(key, word))


def test_every_number_has_a_range() -> None:
    """A new numeric setting needs one, here and in the code."""
    numbers = {key for key, field in known_keys().items() if any(kind in str(field.type) for kind in ("int", "float"))}
    numbers = {key for key in numbers if "Literal" not in str(known_keys()[key].type)}
    shape = {f"model.{name}" for name in settings.SHAPE_KEYS}  # judged together, by ModelShape.problems
    # world_size has one too, and is refused without dry_run before it is looked at.
    assert numbers - shape - {"job.world_size"} <= set(RANGES)


def test_validation_is_part_of_parsing() -> None:
    assert refusal("--training.steps", "0").startswith("training.steps is 0, not at least 1; ")


def test_all_that_is_wrong_is_said_at_once() -> None:
    said = refusal("--training.steps", "0", "--optimizer.lr", "-1", "--training.seq_len", "4096")
    assert said.startswith("3 settings are wrong: ") and "\n" not in said
    for part in ("training.steps is 0", "optimizer.lr is -1.0", "training.seq_len 4096 is beyond the 2048 tokens"):
        assert part in said
    said = refusal("--traning.steps", "5", "--optimizer.lrr", "1")
    assert "did you mean training.steps?" in said and "did you mean optimizer.lr?" in said


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--training.seq_len", "4096"], "training.seq_len 4096 is beyond the 2048 tokens that debug is made for"),
        (["--model.n_heads", "7"], "dim 192 is not divisible by n_heads 7"),
        (["--model.n_kv_heads", "4"], "n_heads 6 is not divisible by n_kv_heads 4"),
        (["--model.n_heads", "192", "--model.n_kv_heads", "1"], "head dimension 1 (dim / n_heads) is odd"),
        (["--model.ffn_dim", "-4"], "ffn_dim -4 is not positive"),
        (["--activation_checkpoint.selective_ac_option", "ops"], "'ops' is neither a positive integer nor 'op'"),
        (["--activation_checkpoint.selective_ac_option", "0"], "'0' is neither a positive integer nor 'op'"),
        (
            ["--metrics.sample_tokens", "2049"],
            "metrics.sample_tokens 2049 is beyond the 2048 tokens that debug is made",
        ),
        (
            ["--profiling.enable_profiling", "True", "--training.steps", "99"],
            "profiling.profile_freq 100 is beyond the 99 steps of the run",
        ),
        (
            ["--training.dataset_config", "en"],
            "training.dataset_config is 'en', and the data does not come from the hub",
        ),
        (
            ["--training.dataset_revision", "main", "--training.dataset", "c4", "--training.dataset_path", "README.md"],
            "training.dataset_revision is 'main', and the data does not come from the hub",
        ),
        (
            ["--training.skip_samples", "1:2", "--training.dataset", "c4"],
            "training.skip_samples is given, and a stream's samples have no numbers",
        ),
        (
            ["--training.skip_samples", "1:2,7:5"],
            "training.skip_samples is '7:5', not FIRST:LAST",
        ),
        (
            ["--checkpoint.load_step", "5", "--checkpoint.enable", "False"],
            "checkpoint.load_step is 5, and checkpoint.enable False loads none",
        ),
    ],
)
def test_combinations(argv: list[str], sentence: str) -> None:
    assert sentence in refusal(*argv)


def test_model_overrides() -> None:
    shape = model_shape(Model(flavor="llama3_8b", n_layers=2, vocab_size=100))
    assert shape == dataclasses.replace(FLAVORS["llama3_8b"], n_layers=2, vocab_size=100)


def test_round_trip() -> None:
    argv = ["--model.flavor", "llama3_8b", "--training.dataset_path", "a b", "--compile.enable", "True"]
    config = parse([*argv, "--optimizer.lr", "0.1", "--lr_scheduler.decay_ratio", "0.3", "--job.description", ""])
    assert config != Config()
    assert from_dict(to_dict(config)) == config
    assert from_dict(to_dict(Config())) == Config()


def test_the_saved_config_is_a_config_file(tmp_path: Path) -> None:
    config = parse(["--training.steps", "3", "--job.description", 'a "word" \u00e9', "--model.dim", "96"])
    path = tmp_path / "saved.toml"
    path.write_text(tomli_w.dumps(to_dict(config)), encoding="utf-8")
    assert parse(["--config", str(path)]) == config


@pytest.mark.parametrize(
    ("replicate", "shard", "tensor", "world", "expected"),
    [(1, -1, 1, 1, (1, 1, 1)), (1, -1, 1, 8, (1, 8, 1)), (2, -1, 2, 16, (2, 4, 2)), (1, 4, 2, 8, (1, 4, 2))],
)
def test_mesh(replicate: int, shard: int, tensor: int, world: int, expected: tuple[int, int, int]) -> None:
    degrees = mesh_degrees(Parallelism(replicate, shard, tensor), world)
    assert (degrees.replicate, degrees.shard, degrees.tensor) == expected
    assert degrees.data * degrees.tensor == world


@pytest.mark.parametrize(
    ("replicate", "shard", "tensor", "world", "numbers"),
    [
        (1, 3, 2, 8, "1 x data_parallel_shard_degree 3 x tensor_parallel_degree 2 = 6"),
        (1, -1, 3, 8, "= 6"),
        (4, -1, 1, 2, "= 4"),
    ],
)
def test_mesh_that_does_not_fit(replicate: int, shard: int, tensor: int, world: int, numbers: str) -> None:
    with pytest.raises(ConfigError) as caught:
        mesh_degrees(Parallelism(replicate, shard, tensor), world)
    assert numbers in str(caught.value)
    assert f"the world size is {world}; " in str(caught.value)


def test_accumulation() -> None:
    assert grad_accum_steps(Training(local_batch_size=2), 4) == 1
    assert grad_accum_steps(Training(local_batch_size=2, global_batch_size=24), 4) == 3
    sentence = (
        "training.global_batch_size 20 is not divisible by local_batch_size 2 x data-parallel degree 4 = 8; "
        "change one of them"
    )
    with pytest.raises(ConfigError) as caught:
        grad_accum_steps(Training(local_batch_size=2, global_batch_size=20), 4)
    assert str(caught.value) == sentence
    with pytest.raises(ConfigError, match="global_batch_size 4 is not divisible"):
        grad_accum_steps(Training(local_batch_size=2, global_batch_size=4), 4)


def documented_fields() -> dict[str, bool]:
    """Every field of every dataclass in config.py, and whether a docstring follows it."""
    found = {}
    for node in ast.parse(Path(settings.__file__).read_text()).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for this, following in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(this, ast.AnnAssign) and isinstance(this.target, ast.Name):
                text = (
                    following.value.value
                    if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                    else ""
                )
                found[f"{node.name}.{this.target.id}"] = isinstance(text, str) and len(text) > 5
    return found


def test_every_field_has_a_docstring() -> None:
    fields = {
        name: documented for name, documented in documented_fields().items() if not name.startswith("MeshDegrees")
    }
    assert len(fields) >= len(known_keys())
    assert [name for name, documented in fields.items() if not documented] == []


def train(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "titan_fast.train", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_help_is_complete() -> None:
    result = train("--help")
    assert result.returncode == 0
    assert [key for key in known_keys() if f"--{key}" not in result.stdout] == []
    assert "Peak learning rate." in result.stdout
    assert "--config FILE" in result.stdout


def test_help_does_without_what_takes_seconds_to_import() -> None:
    code = """
import runpy, sys
sys.argv = ["train", "--help"]
try:
    runpy.run_module("titan_fast.train", run_name="__main__")
except SystemExit as end:
    imported = [name for name in ("datasets", "torch", "triton") if sys.modules.get(name)]
    sys.exit(f"{end.code} {imported}")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stderr.strip() == "0 []"


def test_a_mistake_is_one_line_and_status_2() -> None:
    result = train("--training.seq_length", "5")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "titan_fast: unknown key 'training.seq_length'; did you mean training.seq_len?\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", []),
        ("--compile.enable True --compile.max_autotune True", []),
        (
            "--compile.max_autotune True --compile.components blocks",
            [
                "compile.components ('blocks',): compile.enable is False",
                "compile.max_autotune True: compile.enable is False",
            ],
        ),
        ("--validation.enable False", []),
        (
            "--checkpoint.enable False --checkpoint.save_timeout_seconds 60",
            ["checkpoint.save_timeout_seconds 60.0: checkpoint.enable is False"],
        ),
        (
            "--loss.implementation torch --loss.chunk_size 2048",
            ["loss.chunk_size 2048: loss.implementation is 'torch'"],
        ),
        (
            "--training.dataset_split test",
            ["training.dataset_split 'test': the data does not come from the hub"],
        ),
        ("--training.dataset c4 --training.dataset_split test", []),
        ("--validation.enable False --validation.freq 7", ["validation.freq 7: validation.enable is False"]),
        (
            "--activation_checkpoint.mode full --activation_checkpoint.memory_budget 0.3",
            ["activation_checkpoint.memory_budget 0.3: activation_checkpoint.mode is 'full'"],
        ),
        ("--profiling.enable_memory_snapshot True --profiling.profile_freq 5", []),
        (
            "--profiling.profile_freq 5",
            ["profiling.profile_freq 5: profiling.enable_profiling is False and "
             "profiling.enable_memory_snapshot is False"],
        ),
        (
            "--parallelism.fsdp_reshard_after_forward never",
            ["parallelism.fsdp_reshard_after_forward 'never': a single device without FSDP2"],
        ),
    ],
)  # fmt: skip
def test_settings_without_effect_are_told(options: str, said: list[str]) -> None:
    assert without_effect(parse(options.split()), shards=0) == said


def test_buffers_without_effect_where_nothing_is_gathered() -> None:
    config = parse(["--parallelism.fsdp_buffers", "direct"])
    said = "parallelism.fsdp_buffers 'direct': the shard degree is 1, so that no weight is gathered"
    assert without_effect(config, shards=1) == [said] and not without_effect(config, shards=2)


def test_every_switch_of_a_setting_is_one() -> None:
    keys = known_keys()
    tables = {key.partition(".")[0] for key in keys}
    for needs in (*settings._NEEDS, settings._OF_FSDP):
        assert set(needs.settings) <= keys.keys() | tables and set(needs.switches) <= keys.keys()
    assert not without_effect(parse(["--parallelism.fsdp_buffers", "flat"]), shards=2)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_no_config_sets_what_has_no_effect(path: Path) -> None:
    assert not without_effect(parse(["--config", str(path)]), shards=2)
