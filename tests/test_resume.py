"""An interrupted run equals an uninterrupted one: bit for bit in the same layout, up to rounding in another."""

import json
import math
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import runs
import safetensors.torch
import torch
from torchrun import start

from titan_fast import checkpoint, loop, manifest, run_history, versions
from titan_fast.config import parse
from titan_fast.data_command import prepare_folder, step_documents
from titan_fast.errors import CheckpointError, ConfigError, TitanFastError
from titan_fast.run_directory import differences
from titan_fast.tokenizer import load_tokenizer

pytestmark = pytest.mark.timeout(240)

STEPS = 12


class Interrupted(Exception):
    pass


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    true_step = loop.Run.step

    def stepping(self: loop.Run, number: int) -> Any:
        if number == step:
            raise Interrupted
        return true_step(self, number)

    monkeypatch.setattr(loop.Run, "step", stepping)


def assert_same_run(a: Path, b: Path, step: int, processes: int = 1) -> None:
    """The same losses, tensors, random states, data position and counters, bit for bit."""
    assert runs.losses(a) == runs.losses(b)
    first, second = runs.checkpoint(a, step), runs.checkpoint(b, step)
    runs.assert_same_tensors(first, second)
    for rank in range(processes):
        name = f"rng-{rank}.safetensors"
        assert (first / name).read_bytes() == (second / name).read_bytes()
    states = [json.loads((folder / "state.json").read_text()) for folder in (first, second)]
    one, other = ({**state, "elapsed_seconds": 0} for state in states)
    assert one == other


ONE_PROCESS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16, FSDP2": {
        "training__mixed_precision_param": "bfloat16",
        "parallelism__single_device": "fsdp",
        **runs.MEASURED,
    },
    "bfloat16, masters": {"training__mixed_precision_param": "bfloat16", **runs.MEASURED},
    "compiled": {"compile__enable": True},
}


@pytest.mark.parametrize(
    "changes",
    [pytest.param(v, id=k, marks=pytest.mark.slow if k == "compiled" else ()) for k, v in ONE_PROCESS.items()],
)
def test_one_process_goes_on_bit_for_bit(
    changes: dict[str, Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"lr_scheduler__warmup_steps": 7, "training__global_batch_size": 4, "checkpoint__interval": 3}
    more |= {"training__steps": STEPS} | changes
    runs.run(data, tmp_path / "whole", **more)
    for step in (5, 8):  # interrupted twice; each time steps are done again
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            interrupt_at(patch, step)
            runs.run(data, tmp_path / "parts", **more)
    runs.run(data, tmp_path / "parts", **more)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", STEPS)
    times = [record["elapsed_seconds"] for record in runs.logged(tmp_path / "parts")]
    state = json.loads((runs.checkpoint(tmp_path / "parts", STEPS) / "state.json").read_text())
    assert times == sorted(times) and state["elapsed_seconds"] >= times[-1], "time goes on too"


def test_the_random_state_goes_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the model draws random numbers, but a draw after a resume would give the right one."""
    drawn: dict[str, dict[int, float]] = {"whole": {}, "parts": {}}
    true_step = loop.Run.step

    def stepping(self: loop.Run, number: int) -> Any:
        drawn[self.run_dir.name][number] = torch.rand(()).item()
        return true_step(self, number)

    monkeypatch.setattr(loop.Run, "step", stepping)
    runs.run(data, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_at(patch, 8)
        runs.run(data, tmp_path / "parts")
    runs.run(data, tmp_path / "parts")
    assert drawn["parts"] == drawn["whole"] and len(set(drawn["whole"].values())) == 10


def ledger(path: Path, processes: int, tokenizer: Any) -> dict[int, str]:
    """Step -> the text of its global batch, in order, from the last time that the step was run."""
    steps: dict[int, dict[int, list[list[list[int]]]]] = {}
    for rank in range(processes):
        for line in Path(f"{path}-{rank}").read_text().splitlines():
            record = json.loads(line)
            steps.setdefault(record["step"], {})[rank] = record["tokens"]
    texts = {}
    for step, by_rank in sorted(steps.items()):
        passes = range(len(by_rank[0]))
        rows = [row for index in passes for rank in sorted(by_rank) for row in by_rank[rank][index]]
        texts[step] = tokenizer.decode([token for row in rows for token in row])
    return texts


def torchrun(
    processes: int, data: Path, folder: Path, faults: list[dict[str, Any]], flags: tuple[str, ...] = (), **changes: Any
) -> tuple[int, str]:
    """(exit status, output) of a run under torchrun with faults."""
    process = start(processes, data, folder, faults, flags, **changes)
    output = runs.finish(process, 150)
    assert process.returncode is not None
    return process.returncode, output


def test_two_processes_restarted_twice_lose_and_repeat_nothing(data: Path, tmp_path: Path) -> None:
    """torchrun restarts the group after a kill, twice; a ledger of all tokens, and the result, are compared with an
    uninterrupted run's."""
    more: dict[str, Any] = {"training__steps": STEPS, "checkpoint__interval": 3} | runs.MEASURED
    status, output = torchrun(
        2, data, tmp_path / "whole", [{"what": "ledger", "path": str(tmp_path / "whole-ledger"), "rank": None}], **more
    )
    assert status == 0, output
    faults = [
        {"what": "ledger", "path": str(tmp_path / "parts-ledger"), "attempt": None},
        {"what": "kill", "rank": 1, "step": 5, "attempt": 0},
        {"what": "kill", "rank": 0, "step": 11, "attempt": 1},
    ]
    status, output = torchrun(2, data, tmp_path / "parts", faults, ("--max-restarts=2",), **more)
    assert status == 0, output
    assert "after step 3," in output and "after step 9," in output
    tokens_seen = [record["tokens_seen"] for record in runs.logged(tmp_path / "parts")]
    assert tokens_seen == [step * 2 * 2 * 32 for step in range(1, STEPS + 1)], "of both ranks"
    assert_same_run(tmp_path / "whole", tmp_path / "parts", STEPS, processes=2)
    tokenizer = load_tokenizer(data)
    whole, parts = (ledger(tmp_path / f"{name}-ledger", 2, tokenizer) for name in ("whole", "parts"))
    assert whole == parts and list(whole) == list(range(1, STEPS + 1))
    numbers = re.findall(r"<(\d+)>", "".join(whole.values()))
    assert len(numbers) > 50 and len(set(numbers)) == len(numbers), "within an epoch each document comes once"


def validations(folder: Path) -> list[tuple[int, float]]:
    records = run_history.validations(run_history.read(folder / "metrics.jsonl"))
    return [(record["step"], record["validation_loss"]) for record in records]


def test_a_measurement_that_a_stop_left_out_is_made_at_the_next_start(data: Path, tmp_path: Path) -> None:
    """Including that of the last step, if the process was killed after its save."""
    more: dict[str, Any] = {"training__steps": 6} | runs.MEASURED | {"metrics__sample_prompt": ""}
    status, output = torchrun(2, data, tmp_path / "whole", [], **more)
    assert status == 0, output
    expected = validations(tmp_path / "whole")
    assert [step for step, _ in expected] == [3, 6]
    folder = tmp_path / "parts"
    status, output = torchrun(2, data, folder, [{"what": "signal", "name": "SIGTERM", "rank": 1, "step": 3}], **more)
    assert status == 0 and not validations(folder), output
    dies = {"what": "kill_in", "function": "titan_fast.loop:validation_loss", "call": 2}
    status, output = torchrun(2, data, folder, [{"what": "signal", "name": "SIGTERM", "step": 6}, dies], **more)
    assert status != 0 and validations(folder) == expected[:1], output
    for _ in range(2):  # it is owed once
        status, output = torchrun(2, data, folder, [], **more)
        assert status == 0 and validations(folder) == expected, output


def test_other_text_to_measure_on_is_told(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, told = tmp_path / "held-out.jsonl", "the text of validation is another than before"
    more: dict[str, Any] = runs.MEASURED | {"validation__dataset_path": text, "metrics__sample_prompt": ""}
    runs.write_documents(text, 200)
    for steps in (4, 8):
        runs.run(data, tmp_path / "run", **more, training__steps=steps)
    assert told not in capsys.readouterr().out
    runs.write_documents(text, 150)
    runs.run(data, tmp_path / "run", **more, training__steps=9)
    assert f"{told}; its losses are not to be compared with those up to step 8" in capsys.readouterr().out
    runs.run(data, tmp_path / "run", **more, training__steps=10)
    assert told not in capsys.readouterr().out


def test_tokens_per_second_are_of_each_device_whatever_ranks_share(data: Path, tmp_path: Path) -> None:
    """Two tensor-parallel ranks read the same tokens, so each counts half. By the run's own clock."""
    folder = tmp_path / "run"
    more = {"parallelism__tensor_parallel_degree": 2, "checkpoint__enable": False, "training__steps": 30}
    output = runs.finish(start(2, data, folder, [], **more))
    records = runs.logged(folder)
    assert len(records) == 30, output
    assert records[-1]["tokens_seen"] == 30 * 2 * 32
    seconds = sum(2 * 32 / (record["tokens_per_second"] * 2) for record in records[1:])
    elapsed = records[-1]["elapsed_seconds"] - records[0]["elapsed_seconds"]
    assert 0.75 * elapsed < seconds < 1.05 * elapsed


LAYOUTS = [
    (4, {"parallelism__data_parallel_shard_degree": 4}),
    (4, {"parallelism__data_parallel_shard_degree": 2, "parallelism__tensor_parallel_degree": 2}),
    (1, {}),
    (4, {"parallelism__data_parallel_shard_degree": 2, "parallelism__data_parallel_replicate_degree": 2}),
]


def test_another_layout_goes_on_to_rounding(data: Path, tmp_path: Path) -> None:
    """FSDP 4, then FSDP 2 x TP 2, one process, HSDP 2 x 2, with a vocabulary that no degree divides."""
    more: dict[str, Any] = {"training__global_batch_size": 8, "checkpoint__interval": 2, "lr_scheduler__total_steps": 8}
    more |= {"lr_scheduler__warmup_steps": 2, "optimizer__lr": 1e-3, "checkpoint__keep_latest_k": 0}
    runs.run(data, tmp_path / "one", **more, training__steps=8)
    for turn, (processes, layout) in enumerate(LAYOUTS):
        faults = [{"what": "dump", "path": str(tmp_path / f"resumed-{turn}"), "rank": None}]
        status, output = torchrun(
            processes, data, tmp_path / "many", faults, **more, **layout, training__steps=2 * turn + 2
        )
        assert status == 0, output
        if turn:
            saved = runs.tensors(runs.checkpoint(tmp_path / "many", 2 * turn))
            resumed = safetensors.torch.load_file(tmp_path / f"resumed-{turn}")
            assert saved.keys() == resumed.keys()
            assert all(torch.equal(saved[name], resumed[name]) for name in saved), "weights and moments, bit for bit"
    one, many = runs.losses(tmp_path / "one"), runs.losses(tmp_path / "many")
    assert list(one) == list(many) == list(range(1, 9))
    for step, loss in one.items():
        assert math.isclose(many[step], loss, rel_tol=1e-6), (step, loss, many[step])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model__ffn_dim": 96}, "model.ffn_dim was 64 and is 96"),
        ({"model__vocab_size": 400}, "model.vocab_size was 331 and is 400"),
        ({"training__seq_len": 16}, "training.seq_len was 32 and is 16"),
        ({"debug__seed": 1}, "debug.seed was 0 and is 1"),
        ({"training__text_column": "words"}, "training.text_column was 'text' and is 'words'"),
    ],
)
def test_other_mathematics_is_refused_with_the_fields(
    change: dict[str, Any], words: str, data: Path, tmp_path: Path
) -> None:
    runs.run(data, tmp_path / "run", training__steps=2)
    with pytest.raises(ConfigError, match=words):
        runs.run(data, tmp_path / "run", **{"training__steps": 3, **change})
    (tmp_path / "run" / "config.toml").unlink()  # the checkpoint itself knows
    with pytest.raises(ConfigError, match=words) as caught:
        runs.run(data, tmp_path / "run", **{"training__steps": 3, **change})
    assert "--checkpoint.data_state reset" in str(caught.value)


def test_a_start_that_failed_before_its_data_is_no_run(data: Path, tmp_path: Path) -> None:
    with pytest.raises(TitanFastError, match="no such file or folder"):
        runs.run(tmp_path / "typo", tmp_path / "run", training__steps=1, model__tokenizer_path=data)
    runs.run(data, tmp_path / "run", training__steps=1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"training__dataset_path": "/nowhere"}, "no such file or folder .*/nowhere"),
        ({"validation__enable": True, "validation__dataset_path": "/nowhere"}, "no such file or folder .*/nowhere"),
        ({"model__tokenizer_path": "/nowhere"}, "cannot read the tokenizer"),
        ({"checkpoint__initial_load_path": "/nowhere"}, "no such folder .*initial_load_path"),
        ({"checkpoint__load_step": 7}, r"no checkpoint of step 7; there are none"),
    ],
)
def test_what_is_not_there_is_said_before_the_ranks_meet(
    change: dict[str, Any], words: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop.distributed, "start", lambda *_: pytest.fail("the ranks met"))
    with pytest.raises(TitanFastError, match=words):
        runs.run(data, tmp_path / "run", **({"training__steps": 1} | change))


def test_other_data_is_refused_or_begun_again(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    text = runs.write_documents(other / "documents.jsonl", count=700)
    more: dict[str, Any] = {"model__tokenizer_path": str(data)}
    runs.run(text, tmp_path / "run", **more, training__steps=4)
    text.write_text(text.read_text() + json.dumps({"text": "one more"}) + "\n")  # the same path, other content
    with pytest.raises(TitanFastError, match="fingerprint was"):
        runs.run(text, tmp_path / "run", **more, training__steps=6)
    capsys.readouterr()
    runs.run(text, tmp_path / "run", **more, training__steps=6, checkpoint__data_state="reset")
    assert "the data begins again" in capsys.readouterr().out
    runs.run(text, tmp_path / "run", **more, training__steps=8, checkpoint__data_state="reset")
    said = capsys.readouterr().out
    assert "begins again" not in said, "what can be continued is continued"
    state = json.loads((runs.checkpoint(tmp_path / "run", 8) / "state.json").read_text())
    assert state["data"]["next_sample"] == 4 * 2, "steps 5 to 8 of 2 sequences each"
    assert list(step_documents(tmp_path / "run", 8, None, 80))[:2] == ["step 8:", "samples 6 to 7, epoch 0"]
    with pytest.raises(ConfigError, match=r"data was begun again after step 4, at step 5 or before"):
        next(step_documents(tmp_path / "run", 4, None, 80))
    with pytest.raises(ConfigError, match=r"after step 5 the run's data stood at sample 2, .* begun again"):
        next(step_documents(tmp_path / "run", 8, 1, 80))


def test_the_shards_of_text_that_has_changed_are_gone_on_with(data: Path, tmp_path: Path) -> None:
    """As where a newer version reads it otherwise, or a standard library is another Python's."""
    text, run_dir = runs.write_documents(tmp_path / "documents.jsonl", count=700), tmp_path / "run"
    more: dict[str, Any] = {"model__tokenizer_path": str(data)}
    runs.run(text, tmp_path / "whole", **more, training__steps=4)
    runs.run(text, run_dir, **more, training__steps=2, lr_scheduler__total_steps=4)
    (shards,) = (path.parent for path in (run_dir / "data").glob("*/index.json"))
    shown = list(step_documents(run_dir, 2, None, 80))
    text.write_text(json.dumps({"text": "one more"}) + "\n" + text.read_text())
    with pytest.raises(CheckpointError, match=r"in the run's folder data, and --training.dataset_path takes them"):
        runs.run(text, run_dir, **more, training__steps=4)
    assert list(step_documents(run_dir, 2, None, 80)) == shown, "not of the shards that were refused"
    runs.run(shards, run_dir, **more, training__steps=4)
    assert_same_run(tmp_path / "whole", run_dir, 4)
    saved = tomllib.loads((runs.checkpoint(run_dir, 2) / "config.toml").read_text())
    now = tomllib.loads((run_dir / "config.toml").read_text())
    del saved["training"]["dataset_path"]
    assert differences(saved, now, runs.checkpoint(run_dir, 2), reset_data=False) == []
    (refused,) = differences(saved, now, None, reset_data=False)
    assert refused == f"training.dataset_path was None and is {str(shards)!r}"


def test_validation_makes_no_graph(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be kept, and the reported loss would have the terms of training, as z_loss."""
    true_loss, graphs = loop.validation_loss, []

    def validation_loss(model: torch.nn.Module, *more: Any) -> float:
        hook = model.register_forward_pre_hook(lambda *_: graphs.append(torch.is_grad_enabled()))
        try:
            return true_loss(model, *more)  # type: ignore[arg-type]
        finally:
            hook.remove()

    monkeypatch.setattr(loop, "validation_loss", validation_loss)
    runs.run(data, tmp_path, **runs.MEASURED | {"training__steps": 1, "metrics__sample_prompt": ""})
    assert graphs and not any(graphs)


def test_what_is_compiled_is_told_at_its_step_and_of_its_part(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The dry step compiles before the first step, and a late graph of a run that goes on is of the run's step."""
    torch._dynamo.reset()
    more: dict[str, Any] = {"compile__enable": True, "compile__backend": "aot_eager", "compile__components": "blocks"}
    runs.run(data, tmp_path, **more, training__steps=5, compile__canary=False, training__dry_step="always")
    said = capsys.readouterr().out
    assert re.search(r"compiled 1 graph in \d+\.\d s, 0\.0 s of it in the first step, which took ", said), said
    true_pass = loop.forward_backward

    def forward_backward(model: Any, batches: Any, scale: Any) -> Any:
        if len(lengths) == 3:  # the run's ninth step has shorter sequences than all others
            batches = [batch._replace(tokens=batch.tokens[:, :16], labels=batch.labels[:, :16]) for batch in batches]
        lengths.append(batches[0].tokens.shape[1])
        return true_pass(model, batches, scale)

    lengths: list[int] = []
    monkeypatch.setattr(loop, "forward_backward", forward_backward)
    torch._dynamo.reset()
    runs.run(data, tmp_path, **more, training__steps=10, compile__canary=True)
    said = capsys.readouterr().out
    assert "compiled 1 graph in " in said, "the one that is compared with plain PyTorch"
    assert lengths == [32, 32, 32, 16, 32] and "built another graph of forward at step 9: " in said, said


def test_after_going_back_the_samples_that_were_bad_are_left_out(data: Path, tmp_path: Path) -> None:
    run, more = tmp_path / "run", {"checkpoint__interval": 2, "metrics__log_freq": 4, "training__global_batch_size": 4}
    more |= {"training__steps": 8, "checkpoint__keep_latest_k": 0}
    runs.run(data, run, **more)
    more |= {"checkpoint__load_step": 2, "training__skip_samples": "100:120,18:21,13:16"}
    runs.run(data, run, **more | {"training__steps": 4})
    runs.run(data, run, **more)  # goes on from step 4, and skips the same
    told = [list(step_documents(run, step, None, 80))[1] for step in range(1, 10)]
    starts = [0, 4, 8, 22, 26, 30, 34, 38, 42]  # step 4 would have had 12 to 15, and then 17 to 20
    assert told == [f"samples {start} to {start + 3}, epoch 0" for start in starts]
    state = json.loads((runs.checkpoint(run, 8) / "state.json").read_text())
    assert state["data"]["next_sample"] == 42


def test_the_log_tells_a_steps_samples_where_the_batch_has_changed(data: Path, tmp_path: Path) -> None:
    run, more = tmp_path / "run", {"checkpoint__interval": 100, "metrics__log_freq": 3}
    runs.run(data, run, **more, training__steps=5, training__global_batch_size=4)
    runs.run(data, run, **more, training__steps=9, training__global_batch_size=2)
    told = [list(step_documents(run, step, None, 80))[1] for step in (1, 2, 3, 5, 6, 7, 9, 10)]
    expected = ["0 to 3", "4 to 7", "8 to 11", "16 to 19", "20 to 21", "22 to 23", "26 to 27", "28 to 29"]
    assert told == [f"samples {samples}, epoch 0" for samples in expected]


def test_data_that_was_moved_is_gone_on_with(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under another spelling, and in another place; other shards there are refused by their content."""
    text = runs.write_documents(tmp_path / "text.jsonl", count=300)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data, tmp_path / "shards")
    more: dict[str, Any] = {"training__steps": 2}
    runs.run(Path("shards"), tmp_path / "run", **more, model__tokenizer_path="shards/tokenizer.model")
    runs.run(Path("text.jsonl"), tmp_path / "of-text", **more, model__tokenizer_path="shards")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "shards", tmp_path / "elsewhere" / "shards")
    shards, more = tmp_path / "elsewhere" / "shards", {"training__steps": 4}
    runs.run(shards, tmp_path / "run", **more, model__tokenizer_path=shards)
    runs.run(text, tmp_path / "of-text", **more, model__tokenizer_path=shards)
    assert list(runs.losses(tmp_path / "run")) == list(runs.losses(tmp_path / "of-text")) == [1, 2, 3, 4]
    other = tmp_path / "other"
    command = ["--training.dataset_path", str(text), "--model.tokenizer_path", str(shards)]
    prepare_folder(parse(command), other, None)
    with pytest.raises(CheckpointError, match="fingerprint was"):
        runs.run(other, tmp_path / "run", training__steps=6, model__tokenizer_path=shards)
    shutil.copy(text, tmp_path / "copy.jsonl")
    with pytest.raises(ConfigError, match=r"dataset_path was .*text.jsonl' and is .*copy.jsonl'"):
        runs.run(tmp_path / "copy.jsonl", tmp_path / "of-text", training__steps=6, model__tokenizer_path=shards)


def test_a_batch_that_follows_the_processes_is_warned_of(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.run(data, tmp_path / "run", training__steps=2, validation__enable=True)
    status, output = torchrun(2, data, tmp_path / "run", [], training__steps=3, validation__enable=True)
    assert status == 0, output
    assert "a validation batch was 2 sequences and is 4: its losses are of other text than before" in output
    said = "a step was 2 sequences at world size 1 and is 4 at 2; --training.global_batch_size 2 "
    assert f"{said}--training.local_batch_size 1 keeps it" in output
    last = run_history.validations(run_history.read(tmp_path / "run" / "metrics.jsonl"))[-1]
    held_out = runs.held_out_loss(tmp_path / "run", 4)
    assert last == {"step": 3, "validation_loss": pytest.approx(held_out, rel=1e-5)}, "of what both ranks read"
    options: dict[str, Any] = {"training__global_batch_size": 4, "validation__enable": True}
    capsys.readouterr()
    runs.run(data, tmp_path / "run", training__steps=4, **options)
    assert "a step was" not in capsys.readouterr().out


def test_what_has_changed_is_told(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs.run(data, tmp_path, training__steps=2, lr_scheduler__decay_ratio=0.2)
    changes = {
        "parallelism__fsdp_buffers": "flat", "compile__components": "blocks", "float8__recipe_name": "rowwise",
        "kernels__carry_residual": False, "validation__freq": 7,
    }  # fmt: skip
    runs.run(data, tmp_path, training__steps=3, **changes)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("changed since")]
    assert line == (
        "changed since step 2: training.steps 2 -> 3, lr_scheduler.decay_ratio 0.2 -> None, "
        "parallelism.fsdp_buffers auto -> flat, compile.components ['blocks', 'norm', 'loss', 'optimizer'] -> "
        "['blocks'], float8.recipe_name tensorwise -> rowwise, kernels.carry_residual None -> False, "
        "validation.freq 100 -> 7"
    )


def test_another_torch_is_told(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = torch.__version__
    with monkeypatch.context() as older:
        older.setattr(torch, "__version__", "2.11.0+old")
        runs.run(data, tmp_path, training__steps=2)
    runs.run(data, tmp_path, training__steps=3)
    assert f"step 2 was computed with torch 2.11.0+old, and this is {here}: what follows may" in capsys.readouterr().out
    runs.run(data, tmp_path, training__steps=4)
    assert "was computed with torch" not in capsys.readouterr().out


def test_another_kind_of_device_is_told(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = torch.backends.cpu.get_cpu_capability()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX9")
        runs.run(data, tmp_path, training__steps=2)
    runs.run(data, tmp_path, training__steps=3)
    assert f"step 2 was computed on a CPU with AVX9, and this is a CPU with {here}" in capsys.readouterr().out
    runs.run(data, tmp_path, training__steps=4)
    assert "was computed on" not in capsys.readouterr().out


def test_another_commit_is_told(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for code, steps in (("0.1.0, commit aaa", 2), ("0.1.0, commit bbb", 3), ("", 4), ("0.1.0, commit ccc", 5)):
        monkeypatch.setattr("titan_fast.checkpointer.code_version", lambda code=code: code)
        runs.run(data, tmp_path, training__steps=steps)
        told = "titan_fast 0.1.0, commit aaa, and this is 0.1.0, commit bbb: what" in capsys.readouterr().out
        assert told == (steps == 3), code
        assert checkpoint.read_state(runs.checkpoint(tmp_path, steps))["code"] == code


def test_the_commit_is_of_the_checkout_that_has_the_file(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.com")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    file, other = tmp_path / "package" / "a.py", tmp_path / "b.py"
    file.parent.mkdir()
    file.touch()
    other.touch()
    assert versions.commit(file, (":(top)package",)) == "", "no checkout"
    git("init")
    git("add", "b.py")
    git("commit", "-m", "b")
    assert versions.commit(file, (":(top)package",)) == "", "in another's checkout"
    git("add", "package")
    git("commit", "-m", "a")
    name = versions.commit(file, (":(top)package",))
    assert re.fullmatch("[0-9a-f]{12}", name)
    other.write_text("changed")
    assert versions.commit(file, (":(top)package",)) == name
    file.write_text("changed")
    assert versions.commit(file, (":(top)package",)) == f"{name}+"


def test_a_longer_schedule_is_warned_of(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    constant = {"lr_scheduler__warmup_steps": 0, "lr_scheduler__decay_ratio": 0.5, "optimizer__lr": 1e-3}
    runs.run(data, tmp_path, training__steps=4, **constant)
    capsys.readouterr()
    runs.run(data, tmp_path, training__steps=8, lr_scheduler__total_steps=4, **constant)
    assert "learning rate of" not in capsys.readouterr().out
    runs.run(data, tmp_path, training__steps=40, **constant)
    said = capsys.readouterr().out
    assert "WARNING: step 8 was trained at a learning rate of 1.00e-04, which is 1.00e-03 in today's schedule" in said
    assert "--lr_scheduler.total_steps 4 keeps the schedule" in said


def test_another_seed_is_accepted_when_told(data: Path, tmp_path: Path) -> None:
    runs.run(data, tmp_path / "run", training__steps=3)
    before = runs.tensors(runs.checkpoint(tmp_path / "run", 3))
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    runs.run(data, tmp_path / "run", training__steps=4, debug__seed=1, checkpoint__data_state="reset")
    runs.run(data, tmp_path / "copy", training__steps=4)
    changed, same = (runs.losses(tmp_path / name)[4] for name in ("run", "copy"))
    assert changed != same
    assert manifest.problem(runs.checkpoint(tmp_path / "run", 3)) is None and len(before) > 20


def test_an_epoch_may_end_at_a_save(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step of an epoch is saved; then the next epoch's first step follows, as without the interruption."""
    text = runs.write_documents(tmp_path / "few.jsonl", count=48)
    more: dict[str, Any] = {"model__tokenizer_path": str(data), "checkpoint__interval": 1, "training__steps": 24}
    seen: dict[str, dict[int, Any]] = {"whole": {}, "parts": {}}
    true_step = loop.Run.step

    def stepping(self: loop.Run, number: int) -> Any:
        outcome = true_step(self, number)
        seen[self.run_dir.name][number] = self.loader.position()
        return outcome

    monkeypatch.setattr(loop.Run, "step", stepping)
    runs.run(text, tmp_path / "whole", **more)
    ends = [step for step in range(1, 24) if seen["whole"][step]["epoch"] != seen["whole"][step + 1]["epoch"]]
    assert ends, "24 steps are more than an epoch"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_at(patch, ends[0] + 1)
        runs.run(text, tmp_path / "parts", **more)
    runs.run(text, tmp_path / "parts", **more)
    assert seen["parts"] == seen["whole"]
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 24)
