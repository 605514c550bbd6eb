"""The command itself: a small run from text to sample, and every wrong input's sentence and exit status."""

import errno
import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import runs
import torch

from titan_fast import loop, run_history
from titan_fast.config import parse
from titan_fast.errors import NumericsError
from titan_fast.generate import load_model
from titan_fast.train import main

TINY = [
    "--model.dim=32", "--model.n_layers=1", "--model.n_heads=2", "--model.n_kv_heads=1", "--model.ffn_dim=48",
    "--model.vocab_size=300", "--training.seq_len=32", "--training.local_batch_size=2", "--training.steps=6",
    "--validation.freq=3", "--validation.steps=2", "--metrics.log_freq=1", "--metrics.sample_tokens=8",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 small documents, each in its own file."""
    folder = tmp_path_factory.mktemp("text")
    words = random.Random(0).choices(["alpha", "beta", "gamma", "delta", "def", "return", "of", "the"], k=8000)
    for i in range(120):
        (folder / f"{i:03}.txt").write_text(" ".join(words[i * 60 : i * 60 + 60]))
    return folder


def arguments(text: Path, run_dir: Path, *more: str) -> list[str]:
    return [*TINY, f"--training.dataset_path={text}", f"--job.dump_folder={run_dir}", *more]


def run(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["titan_fast.train", *argv])
    main()


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_everything_in_its_directory(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = tmp_path / "run"
    run(arguments(text, run_dir), monkeypatch)
    steps = [record for record in records(run_dir) if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert set(steps[0]) >= {
        "step", "loss", "grad_norm", "lr", "tokens_per_second", "mfu", "memory_gib", "data_wait_fraction",
        "tokens_seen", "elapsed_seconds",
    }  # fmt: skip
    assert [record["tokens_seen"] for record in steps] == [step * 2 * 32 for step in range(1, 7)]
    assert [record["lr"] for record in steps] == pytest.approx([step * 1e-3 for step in range(1, 7)])
    assert abs(steps[0]["loss"] - math.log(300)) < 1
    validations = [record for record in records(run_dir) if "validation_loss" in record]
    assert [record["step"] for record in validations] == [3, 6]
    assert validations[-1]["validation_loss"] == pytest.approx(runs.held_out_loss(run_dir, 2), rel=1e-5)
    for name in ("config.toml", "train.log", "loss_curve.png", "checkpoint/step-6/state.json", "tb"):
        assert (run_dir / name).exists(), name

    log = (run_dir / "train.log").read_text()
    start = re.search(r" start +(\S+) s(: .+)?$", log, re.MULTILINE)
    assert start is not None, log
    parts = [float(seconds) for seconds in re.findall(r" (\d+\.\d)(?:,|$)", start[2] or "")]
    assert sum(parts) <= float(start[1]) + 0.5 and steps[0]["elapsed_seconds"] > float(start[1]) - 0.05  # rounded

    model, tokenizer, config = load_model(run_dir, torch.device("cpu"))
    assert config.model.dim == 32 and tokenizer.vocab_size == 300
    tokens = torch.tensor([tokenizer.encode("alpha beta")])
    assert torch.isfinite(model(tokens)).all()


def test_a_run_needs_no_triton(text: Path, tmp_path: Path) -> None:
    """macOS has none. Then everything is plain PyTorch, and a kernel that is asked for is refused."""
    command = "import sys; sys.modules['triton'] = None; from titan_fast.train import main; main()"  # no such module

    def started(folder: str, *more: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-c", command, *arguments(text, tmp_path / folder, "--training.steps=2", *more)]
        return subprocess.run(argv, capture_output=True, text=True)

    done = started("plain")
    assert done.returncode == 0, done.stderr
    assert [record["step"] for record in records(tmp_path / "plain") if "loss" in record] == [1, 2]
    refused = started("asked", "--kernels.rms_norm=triton")
    assert refused.returncode == 2
    assert "needs the triton package, which is not installed" in refused.stderr


@pytest.mark.parametrize("all_decay", [True, False])
def test_a_step_is_that_of_the_config(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, all_decay: bool
) -> None:
    """AdamW's first step by its formula, from the moments after it: m = (1 - beta1) g, v = (1 - beta2) g^2."""
    lr, beta1, beta2, eps, decay, max_norm = 2e-3, 0.6, 0.7, 1e-4, 0.2, 0.01
    options = [
        f"--optimizer.lr={2 * lr}", "--lr_scheduler.warmup_steps=2", "--lr_scheduler.total_steps=9",
        f"--optimizer.beta1={beta1}", f"--optimizer.beta2={beta2}", f"--optimizer.eps={eps}",
        f"--optimizer.weight_decay={decay}", f"--training.max_norm={max_norm}", "--training.steps=1",
        f"--optimizer.decay_norms_and_embeddings={all_decay}",
    ]  # fmt: skip
    true_step, squares = loop.Run.step, []

    def step(self: loop.Run, number: int) -> Any:
        before = [p.detach().clone() for p in self.model.parameters()]
        outcome = true_step(self, number)
        for old, (name, new) in zip(before, self.model.named_parameters(), strict=True):
            decays = decay if all_decay or not ("norm" in name or "embedding" in name) else 0.0
            state = self.optimizer.state[new]
            g = state["exp_avg"] / (1 - beta1)
            torch.testing.assert_close(state["exp_avg_sq"], (1 - beta2) * g.square())
            torch.testing.assert_close(new.detach(), old - lr * decays * old - lr * g / (g.abs() + eps))
            squares.append(g.square().sum().item())
        return outcome

    monkeypatch.setattr(loop.Run, "step", step)
    run(arguments(text, tmp_path, *options), monkeypatch)
    assert math.sqrt(sum(squares)) == pytest.approx(max_norm, rel=1e-4)
    (record,) = [record for record in records(tmp_path) if "loss" in record]
    assert record["lr"] == pytest.approx(lr) and record["grad_norm"] > 2 * max_norm


def test_accumulated_passes_give_the_loss_of_one(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = []
    for size in (4, 2, 1):
        run_dir = tmp_path / str(size)
        batch = [f"--training.local_batch_size={size}", "--training.global_batch_size=4"]
        run(arguments(text, run_dir, *batch, "--validation.enable=False"), monkeypatch)
        losses.append([record["loss"] for record in records(run_dir) if "loss" in record])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[2] == pytest.approx(losses[0], rel=1e-6)


def test_a_finished_run_started_again_changes_nothing(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run(arguments(text, tmp_path), monkeypatch)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    run(arguments(text, tmp_path), monkeypatch)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert "raise training.steps to go on" in capfd.readouterr().out


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_does_harm(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of step 4 is made NaN; the weights must remain those of step 3."""
    kept: dict[int, dict[str, torch.Tensor]] = {}
    true_forward_backward = loop.forward_backward
    calls = 0

    def sabotaged(model: torch.nn.Module, *rest: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        kept[calls] = {name: p.detach().clone() for name, p in model.named_parameters()}
        kept[0] = dict(model.named_parameters())
        loss = true_forward_backward(model, *rest)  # type: ignore[arg-type]
        if calls == 4:
            next(iter(model.parameters())).grad[0] = math.nan  # type: ignore[index]
        return loss

    monkeypatch.setattr(loop, "forward_backward", sabotaged)
    with pytest.raises(NumericsError, match=r"step 4.*not finite"):
        loop.train(parse(arguments(text, tmp_path)))
    assert calls == 4
    said = (tmp_path / "train.log").read_text()
    assert "ended by NumericsError: the loss (" in said and re.search(r" failed +step +4/", said), said
    assert all(torch.equal(kept[4][name], value) for name, value in kept[0].items())


WRONG: dict[str, tuple[int, str, list[str]]] = {
    "unknown key": (2, "unknown key 'training.seq_lem'; did you mean training.seq_len?", ["--training.seq_lem=4"]),
    "wrong type": (2, "--training.steps", ["--training.steps=many"]),
    "missing config": (2, "No such file", ["--config=nowhere.toml"]),
    "beyond the model's context": (2, "training.seq_len 4096 is beyond the 2048", ["--training.seq_len=4096"]),
    "global batch": (2, "global_batch_size 7 is not divisible by local_batch_size 2 x data-parallel degree 1 = 2",
                     ["--training.global_batch_size=7"]),
    "steps": (2, "training.steps is 0", ["--training.steps=0"]),
    "mesh": (2, "data_parallel_shard_degree 3 x tensor_parallel_degree 1 = 3",
             ["--parallelism.data_parallel_shard_degree=3"]),
    "kernel without a GPU": (2, "kernels.rope", ["--kernels.rope=triton"]),
    "missing data": (3, "nowhere", ["--training.dataset_path=nowhere"]),
    "missing tokenizer": (3, "nowhere.model", ["--model.tokenizer_path=nowhere.model"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_gets_one_line_and_its_status(
    name: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, sentence, extra = WRONG[name]
    if name == "kernel without a GPU":
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as stopped:
        run(arguments(text, tmp_path / "run", *extra), monkeypatch)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == status
    assert lines[0].startswith("titan_fast: ") and sentence in lines[0] and ";" in lines[0]


def test_a_tokenizer_of_an_unknown_kind_is_refused(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    strange = tmp_path / "tokenizer.model"
    strange.write_bytes(b"\x00\x01 what is this")
    with pytest.raises(SystemExit) as stopped:
        run(arguments(text, tmp_path / "run", f"--model.tokenizer_path={strange}"), monkeypatch)
    assert stopped.value.code == 3 and str(strange) in capsys.readouterr().err


def test_a_dump_folder_that_is_a_file_is_refused(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        run(arguments(text, tmp_path / "file" / "run"), monkeypatch)
    assert stopped.value.code == 2 and "job.dump_folder cannot be written" in capsys.readouterr().err


def test_a_full_disk_is_refused_at_once(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, content: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SystemExit) as stopped:
        run(arguments(text, tmp_path / "run"), monkeypatch)
    assert stopped.value.code == 2
    assert "job.dump_folder cannot be written: No space left on device" in capsys.readouterr().err
    assert not list((tmp_path / "run").iterdir())


def test_a_disk_that_fills_up_is_one_line(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(record: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_history, "encode", full)
    with pytest.raises(SystemExit) as stopped:
        run(arguments(text, tmp_path), monkeypatch)
    assert stopped.value.code == 4
    assert "titan_fast: the disk is full: No space left on device; make room" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--checkpoint.enable=False", "--checkpoint.folder=other"])
def test_a_run_with_checkpoints_is_not_begun_over(
    option: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(arguments(text, tmp_path), monkeypatch)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        run(arguments(text, tmp_path, option), monkeypatch)
    assert stopped.value.code == 2 and "a new run would overwrite its history" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_the_folder_of_another_run_is_left_alone(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(arguments(text, tmp_path), monkeypatch)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stopped:
        run(arguments(text, tmp_path, "--model.ffn_dim=64"), monkeypatch)
    assert stopped.value.code == 2
    assert "model.ffn_dim was 48 and is 64" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_run_that_a_signal_kills_says_where_it_was(tmp_path: Path) -> None:
    """As when token shards are cut off while they are mapped."""
    program = (
        "import sys, numpy as np; from titan_fast.train import main; main()\n"
        "tokens = np.memmap('shard', 'u1', 'r'); open('shard', 'w').close(); int(tokens[0])"
    )
    (tmp_path / "shard").write_bytes(b"x")
    command = [sys.executable, "-c", program, "--job.print_config", "True"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=runs.environment(), cwd=tmp_path)
    assert done.returncode == -signal.SIGBUS and "[job]" in done.stdout
    assert done.stderr.startswith("Fatal Python error: Bus error") and 'File "<string>", line 2' in done.stderr


def test_the_printed_config_has_no_secret(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(["--job.print_config", "True", "--training.dataset_path", "s3://me:hunter2@bucket/x"], monkeypatch)
    assert 'dataset_path = "s3://<redacted>@bucket/x"' in capsys.readouterr().out


def test_standard_error_that_is_no_file_stops_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", io.StringIO())
    monkeypatch.setattr("faulthandler.is_enabled", lambda: False)
    monkeypatch.setattr("sys.argv", ["train", "--job.print_config", "True"])
    main()


def test_help_is_a_manual_and_quick_to_come() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "titan_fast.train", "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    assert "--training.seq_len INT" in done.stdout and "Tokens per sequence" in done.stdout


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ([], "float32"),
        (["--training.mixed_precision_param", "bfloat16"], "bfloat16, with float32 masters"),
        (
            ["--training.mixed_precision_param", "bfloat16", "--parallelism.single_device", "fsdp"],
            "float32 shards, gathered as bfloat16 by FSDP2 through flat buffers",
        ),
        (
            ["--training.enable_cpu_offload", "True", "--parallelism.fsdp_buffers", "direct"],
            "float32 shards, gathered as float32 by FSDP2 through flat buffers",
        ),
    ],
)
def test_the_first_lines_say_what_is_kept_of_weights(
    options: list[str], weights: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop.train(parse([*arguments(text, tmp_path), *options, "--training.steps", "1"]))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("weights")]
    assert line.split(maxsplit=1)[1].startswith(weights)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("CXX", "/does/not/exist", "compile.enable on a CPU needs a C++ compiler, and none works; install g++"),
        ("TORCH_COMPILE_DISABLE", "1", "an environment variable (TORCH_COMPILE_DISABLE) turns torch.compile off"),
        ("TORCHDYNAMO_DISABLE", "1", "an environment variable (TORCHDYNAMO_DISABLE) turns torch.compile off"),
    ],
)
def test_a_machine_that_cannot_compile_is_told_in_a_sentence(
    name: str, value: str, sentence: str, data: Path, tmp_path: Path
) -> None:
    words = runs.arguments(data, tmp_path / "run", compile__enable=True)
    done = subprocess.run(
        [sys.executable, "-m", "titan_fast.train", *words],
        capture_output=True, text=True, env=runs.environment(**{name: value}), timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
