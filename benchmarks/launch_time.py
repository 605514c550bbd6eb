"""The time from the command to the tenth step of a real run of `python -m titan_fast.train`, including everything that
comes first (imports, the check of compiled gradients, the rehearsed step, tokenizer and text).

Text is prepared beforehand, as for any long training. There are two starts, without any compiled code and with it. The
second one trains on, so that a real run's steps, with all that watches over them, can be compared with the
benchmark's.
"""

import json
import re
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.train_process import watched
from benchmarks.train_record import join
from benchmarks.workloads import LLAMA_1B

ROOT = Path(__file__).resolve().parents[1]
PART = "launch"
STEP = 10
STEADY_STEPS, UNTIMED_STEPS = 70, 20
"""How far the second start trains, and from when on its speed counts."""
LIMIT_SECONDS = 200.0
STARTS = ("cold caches", "compiled code kept")
ONE_GPU = {
    "model.flavor": LLAMA_1B.flavor,
    "training.seq_len": LLAMA_1B.seq_len,
    "training.local_batch_size": LLAMA_1B.batch,
    "training.mixed_precision_param": "bfloat16",
    "parallelism.single_device": "masters",
    "compile.enable": True,
}
TINY = {
    "model.dim": 32, "model.n_layers": 1, "model.n_heads": 4, "model.n_kv_heads": 2, "model.ffn_dim": 48,
    "training.seq_len": 32, "training.local_batch_size": 1, "training.global_batch_size": 1,
}  # fmt: skip
COMMON = {
    "metrics.log_freq": STEP,
    "metrics.sample_prompt": "",
    "checkpoint.enable": False,
    "validation.enable": False,
}


def command(run_dir: Path, text: Path, smoke: bool, steps: int = STEP) -> list[str]:
    """One start, on token shards with their tokenizer."""
    options: dict[str, Any] = (TINY if smoke else ONE_GPU) | COMMON
    options |= {"job.dump_folder": run_dir, "training.dataset_path": text, "training.steps": steps}
    words = [word for key, value in options.items() for word in (f"--{key}", *_words(value))]
    return [sys.executable, "-m", "titan_fast.train", *words]


def prepare_text(folder: Path, environment: dict[str, str]) -> Path:
    """Token shards of this project's own code, with a small tokenizer: the text does not matter here."""
    words = ["--training.dataset_path", str(ROOT / "titan_fast"), "--model.vocab_size", "1024"]
    program = [sys.executable, "-m", "titan_fast.data", "prepare", *words, "--out", str(folder / "text")]
    if problem := watched(program, environment, folder, folder / "text", limit=LIMIT_SECONDS):
        raise RuntimeError(f"no text: {problem}")
    return folder / "text"


def _words(value: Any) -> list[str]:
    return str(value).split(" ") if value != "" else [""]


def measure(out: Path, environment: dict[str, str], machine: dict[str, Any], smoke: bool) -> dict[str, Any]:
    """The rows of all starts; each joins the part's file as soon as it is known. environment: of the processes;
    machine: what is known about it."""
    folder = Path(environment["TORCHINDUCTOR_CACHE_DIR"]).parent / "launch"
    shutil.rmtree(folder, ignore_errors=True)
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}
    folder.mkdir(parents=True)
    answer: dict[str, Any] = {"environment": machine, "rows": []}
    text: Path | None = None
    for number, start in enumerate(STARTS):
        row = {"cell": PART, "part": PART, "variant": start, "commit": machine.get("commit")}
        row["model"] = "a tiny one" if smoke else LLAMA_1B.name
        try:
            text = text or prepare_text(folder, environment)
            steps = STEP if number == 0 else STEADY_STEPS
            row |= one_start(command(folder / f"run-{number}", text, smoke, steps), folder, environment | cache)
        except (OSError, RuntimeError) as error:
            row["error"] = f"{type(error).__name__}: {error}"
        answer["rows"].append(row)
        join([row], machine, PART, out)
    return answer


def one_start(words: list[str], folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Seconds until `metrics.jsonl` has the tenth step, by when the device has done it, since its loss is logged; the
    run's own account of its start; and its speed, where it trains on."""
    run_dir = Path(words[words.index("--job.dump_folder") + 1])
    metrics = run_dir / "metrics.jsonl"
    found: dict[str, Any] = {}
    started = time.monotonic()

    def heard() -> None:
        for step in [line["step"] for line in lines_of(metrics)]:
            found.setdefault(f"seconds_to_step_{step}", time.monotonic() - started)

    problem = watched(words, environment, folder, metrics, heard, LIMIT_SECONDS, LIMIT_SECONDS)
    if f"seconds_to_step_{STEP}" not in found:
        found["error"] = problem or f"it ended without step {STEP}"
    if start := start_of(run_dir / "train.log"):
        found["start"] = start
    timed = [line for line in lines_of(metrics) if line["step"] > UNTIMED_STEPS]
    if speeds := [line["tokens_per_second"] for line in timed if "tokens_per_second" in line]:  # not the end's line
        found["tokens_per_second"] = statistics.median(speeds)
    return found


def start_of(log: Path) -> str:
    """The run's own line about its start: the seconds in total, and of each part. "" if it did not get that far."""
    lines = re.findall(r"^\S+ \S+ start +(.+)$", log.read_text() if log.exists() else "", re.MULTILINE)
    return lines[-1] if lines else ""


def lines_of(metrics: Path) -> list[dict[str, Any]]:
    """The complete lines of steps in metrics.jsonl."""
    text = metrics.read_text() if metrics.exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [line for line in map(json.loads, lines) if "step" in line]
