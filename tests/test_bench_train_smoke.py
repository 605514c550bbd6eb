"""The end-to-end benchmark, rehearsed: parts run and measure what they say, and tables show what is in the JSON."""

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tape import TapeRecorder
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import fake_world, limits, train_cell, train_rows, train_suite, train_table
from benchmarks.least_step import PRODUCTS, limits_from
from benchmarks.parity import difference
from benchmarks.random_tokens import END_OF_DOCUMENT, RandomTokens
from benchmarks.step_timing import Length
from benchmarks.train_cell import Bench, run_cell, world_of
from benchmarks.train_cells import NARROW, PARTS, TUNING_LEVERS, WIDE, cells
from benchmarks.train_record import described
from benchmarks.variants import How
from benchmarks.workloads import (
    COMPILED,
    EAGER_REFERENCE,
    LLAMA_1B,
    NONE,
    POINTWISE,
    RANK0,
    REFERENCE,
    SELECTIVE_OP,
    SMOKE_SEQ_LEN,
    Cell,
    Variant,
    config_of,
    rehearsed,
)
from titan_fast import parallel
from titan_fast.checkpoint import tensors_of
from titan_fast.cuda_graph import WARM_UP_STEPS
from titan_fast.model import Llama

CPU = torch.device("cpu")
HOW = How(smoke=True, length=Length(1, 2, 1), profiles=False)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder written by a rehearsal of the first cell of three parts."""
    folder = tmp_path_factory.mktemp("results")
    arguments = ["--smoke", "--cells", "1", "--parts", "limits,rank0,peers", "--out", str(folder), "--commit", "0123"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train_suite, "end_on_sigterm", lambda: None)
        patched.setenv("BENCHMARK_COMMIT", "")  # put back at the end
        train_suite.main("", arguments)
    return folder


def test_a_rehearsal_leaves_a_file_per_part(results: Path) -> None:
    assert {path.name for path in results.iterdir()} == {
        "limits-cpu.json", "train-cpu-rank0.json", "train-cpu-peers.json",
    }  # fmt: skip
    rows = json.loads((results / "train-cpu-rank0.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["compiled, auto", "compiled, kernels"]
    for row in rows:
        assert "error" not in row and row["world"] == 64 and row["communication"].startswith("left out")
        assert row["step_seconds"]["timed"] == 2 and row["complete"] and row["commit"] == "0123"
        assert row["profile"]["seconds"]["idle"] >= 0
        assert row["tokens_per_second"] == pytest.approx(row["tokens_per_step"] / row["step_seconds"]["median"])
        assert 0 < row["fraction_of_limit"] == pytest.approx(row["least_step"]["total"] / row["step_seconds"]["median"])
    assert "titan" not in rows[0].get("mfu", {})  # a CPU has no known peak
    assert "triton" in rows[1]["choices"]["swiglu"]


def test_tables_show_what_the_files_hold(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "train.png"
    arguments = ["--results", str(results), "--picture", str(picture)]
    assert train_table.main([*arguments, "--rehearsal"]) == 0
    text = capsys.readouterr().out
    row = json.loads((results / "train-cpu-rank0.json").read_text())["rows"][0]
    assert f"| compiled, auto | {row['tokens_per_second']:,.0f} |" in text
    assert picture.with_stem("train-cpu").stat().st_size > 5000
    train_table.main(arguments)  # rehearsals are not shown unless asked for
    assert "No device has been measured." in capsys.readouterr().out


def test_a_cell_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    options = train_suite._arguments("").parse_args(["--smoke", "--no-profile", "--out", str(tmp_path)])
    (cell,) = [cell for cell in cells(("slices",)) if "8B, 2 layers" in cell.name]
    options.cache = tmp_path / "cache"
    answer, problem = train_suite.Suite(options)._in_a_child(cell, ["compiled, auto"], lambda answer: None)
    (row,) = answer["rows"]
    assert problem == "" and "error" not in row and row["complete"] and row["step_seconds"]["median"] > 0
    assert answer["environment"]["smoke"] and list(tmp_path.glob(".answer*")) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_cell_of_every_part_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Except for what needs a GPU, or a package that is not installed, and says so."""
    monkeypatch.setattr(train_suite, "end_on_sigterm", lambda: None)
    train_suite.main("", ["--smoke", "--parts", "all", "--out", str(tmp_path), "--cache", str(tmp_path / "cache")])
    files = [json.loads(path.read_text()) for path in tmp_path.glob("train-*.json")]
    assert {content["part"] for content in files} == set(PARTS) - {"limits"}
    rows = {(row["cell"], row["variant"]): row for content in files for row in content["rows"]}
    wanted = {(cell.name, variant.name) for cell in cells(PARTS) for variant in cell.variants}
    assert wanted <= rows.keys()
    excuses = (
        "CUDA", "GPU", "torchtitan", "liger", "no torch.nn.functional", "the device is cpu", "aot_eager", "SM89",
        "'fa4' is not available",
        "for CPU backend",  # products of float8 by row, with torch 2.11
    )  # fmt: skip
    errors = {name: row["error"] for name, row in rows.items() if "error" in row}
    unexcused = {name: error for name, error in errors.items() if not any(words in error for words in excuses)}
    # Triton's interpreter does not make tensors of plain numbers, and one of Liger's kernels calls `offset.to`.
    assert all("Liger eager" in cell and "Interpreter" in error for (cell, _), error in unexcused.items()), unexcused
    assert sum("error" not in row for row in rows.values()) > 0.6 * len(rows)
    (device,) = train_rows.load(tmp_path, rehearsal=True)
    assert "seconds to step 1" in train_table.markdown(device)


# Switching


@pytest.fixture
def bench() -> Iterator[Bench]:
    cell = rehearsed(Cell("single", LLAMA_1B, (EAGER_REFERENCE,)))
    with world_of(cell, CPU, smoke=True) as world:
        made = Bench(cell, world, smoke=True)
        yield made
        made.close()


def test_a_switched_model_computes_the_same_loss(bench: Bench) -> None:
    tokens = torch.randint(128, (2, 8), generator=torch.Generator().manual_seed(0))
    losses, scale = {}, torch.tensor(1 / 16)
    plain = REFERENCE | NONE
    variants = {
        "plain": plain,
        "compiled": COMPILED | plain,
        "pointwise": COMPILED | REFERENCE | POINTWISE,
        "selective": REFERENCE | SELECTIVE_OP,
        "carried": plain | {"kernels.carry_residual": True},
        "no chunks": plain | {"loss.chunk_size": 0},
        "plain again": plain,
    }
    for name, options in variants.items():
        bench.configure(config_of(bench.cell.workload, options, smoke=True))
        losses[name] = bench.model(tokens, tokens, scale).item()
        if name == "carried":
            assert all(block.carry_residual for block in bench.model.blocks)
    assert losses["plain again"] == losses["plain"]
    assert all(loss == pytest.approx(losses["plain"], rel=1e-2) for loss in losses.values())


def test_a_variant_is_put_on_again_as_it_was(bench: Bench) -> None:
    work = bench.cell.workload
    bench.configure(config_of(work, COMPILED | REFERENCE | POINTWISE, smoke=True))
    block = bench.model.blocks[0]
    before = (block._compiled_call_impl, block.forward, bench.model.head.loss)
    config, kept = bench.config, bench.face()
    bench.configure(config_of(work, REFERENCE, smoke=True))
    assert block._compiled_call_impl is None and "forward" not in block.__dict__
    bench.put_on(kept)
    assert (block._compiled_call_impl, block.forward, bench.model.head.loss) == before
    assert bench.config is config


def test_one_of_two_variants_attends_within_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    (cell,) = cells(("levers-documents",))
    seen: list[bool] = []
    forward = Llama.forward

    def watched(self: Llama, *given: Any, bounds: Tensor | None = None) -> Tensor:
        seen.append(bounds is not None)
        return forward(self, *given, bounds=bounds)

    monkeypatch.setattr(Llama, "forward", watched)
    eager = (dataclasses.replace(v, options=v.options | {"compile.enable": False}) for v in cell.variants)
    few = rehearsed(dataclasses.replace(cell, variants=tuple(eager)))
    rows = run_cell(few, CPU, dataclasses.replace(HOW, length=Length(1, 4, 2)))
    assert all("error" not in row and row["step_seconds"]["timed"] == 4 for row in rows)
    assert seen.count(True) == seen.count(False) >= 5 and {True, False} == {seen[0], seen[-1]}
    environment = {"device": "NVIDIA H100 80GB HBM3", "smoke": True}
    assert ["mfu" in described(few, row, environment, None) for row in rows] == [True, False]


def test_documents_have_the_wanted_length() -> None:
    ((tokens, labels),) = RandomTokens(4, 8192, 100, document=128).next_step(None).passes
    assert 200 < (tokens == END_OF_DOCUMENT).sum() < 320 and (tokens[:, 1:] == labels[:, :-1]).all()
    assert set(range(100)) == set(tokens.flatten().tolist())


def test_a_recorded_variant_takes_turns_with_an_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU's replacement for CUDA graphs; without it the row says that nothing can be recorded."""
    (cell,) = cells(("levers-graph",))
    eager, recorded = (v for v in cell.variants if v.name in ("eager, reference", "eager, reference, CUDA graph"))
    few = rehearsed(dataclasses.replace(cell, variants=(eager, recorded)))
    assert "the device is cpu" in run_cell(few, CPU, HOW)[1]["error"]
    recorders: list[TapeRecorder] = []

    def new_recorder(device: torch.device) -> TapeRecorder:
        recorders.append(TapeRecorder())
        return recorders[-1]

    monkeypatch.setattr(parallel, "check_cuda_graph", lambda *_: None)
    monkeypatch.setattr(train_cell, "CudaRecorder", new_recorder)
    how = dataclasses.replace(HOW, length=Length(3, 4, 2))
    rows = run_cell(few, CPU, how)
    assert [row["variant"] for row in rows] == ["eager, reference", "eager, reference, CUDA graph"]
    assert all("error" not in row and row["step_seconds"]["timed"] == 4 for row in rows)
    (recorder,) = recorders
    assert recorder.replays == 3 + 4 - WARM_UP_STEPS


def test_a_larger_batch_is_another_loader(bench: Bench) -> None:
    bench.configure(config_of(bench.cell.workload, REFERENCE | {"training.local_batch_size": 4}, smoke=True))
    bench.step()
    assert bench.config.training.local_batch_size == 4 and next(bench.loader)[0].tokens.shape == (4, SMOKE_SEQ_LEN)


def test_what_comes_to_the_same_code_runs_once_and_what_fails_is_reported() -> None:
    torchs = Variant("no such attention", REFERENCE | {"kernels.attention": "cudnn"})
    auto = Variant("eager, auto", {})
    rows = run_cell(rehearsed(Cell("single", LLAMA_1B, (EAGER_REFERENCE, auto, torchs))), CPU, HOW)
    assert rows[1]["same_as"] == "eager, reference" and rows[1]["step_seconds"] == rows[0]["step_seconds"]
    assert "'cudnn' exists on CUDA only" in rows[2]["error"] and "step_seconds" not in rows[2]


PLAIN = Variant("plain", REFERENCE)


@pytest.fixture
def few_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many batches as can be learnt in the few steps here."""
    monkeypatch.setattr(train_cell, "PARITY_BATCHES", 4)


def compared(*variants: Variant, steps: int = 40) -> list[dict[str, Any]]:
    (cell, *_) = cells(("parity-optimizer",))
    how = dataclasses.replace(HOW, length=Length(1, steps, 1))
    return run_cell(rehearsed(dataclasses.replace(cell, variants=(PLAIN, *variants))), CPU, how)


@pytest.mark.usefixtures("few_batches")
def test_losses_of_levers_are_compared_with_plain_ones_while_they_fall() -> None:
    fsdp = Variant("FSDP2", REFERENCE | {"parallelism.single_device": "fsdp"})
    whole = Variant("refused", {"compile.enable": True, "kernels.attention": "cudnn"})
    rows = compared(fsdp, Variant("chunk 4", REFERENCE | {"loss.chunk_size": 4}), whole)
    assert rows[0]["parity"]["largest"] == 0 and "'cudnn' exists on CUDA only" in rows[3]["error"]
    for row in rows[:3]:
        assert row["parity"]["learnt"] and len(row["losses"]) == 40 and row["complete"]
        assert row["parity"]["largest"] < 2e-2


@pytest.mark.usefixtures("few_batches")
def test_a_wrong_gradient_shows_in_the_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_half_the_chunks(self: Any, logits: torch.Tensor, *rest: Any) -> torch.Tensor:
        loss = honest(self, logits, *rest)
        logits[: len(logits) // 2] = 0.0
        return loss

    honest = train_cell.LinearCrossEntropy.differentiate_
    right = compared()[0]["losses"]
    monkeypatch.setattr(train_cell.LinearCrossEntropy, "differentiate_", of_half_the_chunks)
    wrong = compared()[0]["losses"]
    assert difference(torch.tensor(wrong), torch.tensor(right), 4.85)["largest"] > 0.2


def test_losses_that_do_not_fall_prove_nothing() -> None:
    flat = torch.full((50,), 4.85)
    assert not difference(flat, flat, 4.85)["learnt"]


def test_a_process_that_begins_with_an_eager_variant_has_compiled_adamw_for_the_others() -> None:
    whole = Variant("compiled optimizer", COMPILED | {"compile.components": ["blocks", "optimizer"]})
    cell = rehearsed(Cell("levers-graph", LLAMA_1B, (EAGER_REFERENCE, whole)))
    with world_of(cell, CPU, smoke=True) as world:
        bench = Bench(cell, world, smoke=True)
        updates = []
        for variant in cell.variants:
            bench.switch_to(variant)
            updates.append(bench.optimizer._update)  # type: ignore[union-attr]
        assert updates[0] is None and updates[1] is not None
        bench.close()


def test_the_compilers_levers_reach_the_update_of_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled before the first step."""
    built: list[tuple[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda function, **how: built.append((function.__name__, how)) or function)
    inductor = {"compile.backend": "inductor"}
    variants = (Variant("base", COMPILED | inductor), Variant("tuned", COMPILED | TUNING_LEVERS[0].options | inductor))
    cell = rehearsed(Cell("levers-descent", LLAMA_1B, variants))
    with world_of(cell, CPU, smoke=True) as world:
        bench = Bench(cell, world, smoke=True)
        for variant, options in zip(cell.variants, (None, {"coordinate_descent_tuning": True}), strict=True):
            built.clear()
            bench.switch_to(variant)
            assert [how.get("options") for name, how in built if name == "update"] == [options]
        bench.close()


# Rank 0 of many


BOTH_BUFFERS = pytest.mark.parametrize("buffers", ["flat", "direct"])


def rank0_cell(buffers: str) -> Cell:
    options = EAGER_REFERENCE.options | {"parallelism.fsdp_buffers": buffers}
    return rehearsed(Cell("rank0", RANK0["8b"], (Variant("eager", options),)))


def backward(bench: Bench) -> None:
    batches = next(bench.loader)
    bench.model(batches[0].tokens, batches[0].labels, torch.tensor(0.1)).backward()


@BOTH_BUFFERS
def test_gathered_weights_are_random_and_gradients_real(buffers: str) -> None:
    cell = rank0_cell(buffers)
    with world_of(cell, CPU, smoke=True) as world:
        bench = Bench(cell, world, smoke=True)
        assert world.size == 4 and tensors_of(bench.model)["model.embedding.weight"].to_local().shape[0] == 128 // 4  # type: ignore[attr-defined]
        bench.configure(bench.config)
        backward(bench)
        fake_world.assert_reduces_real_gradients(bench.model)
        bench.close()


def test_a_policy_of_fsdp_changes_no_gradient() -> None:
    """Buffers, and when weights are freed, are switched on one model and back. Wide gradients are rounded less."""
    cell = rank0_cell("flat")
    tokens = torch.randint(128, (2, 8), generator=torch.Generator().manual_seed(0))
    gradients = []
    with world_of(cell, CPU, smoke=True) as world:
        bench = Bench(cell, world, smoke=True)
        faces = []
        for buffers, reshard in (("flat", "default"), ("direct", "default"), ("direct", "never"), ("flat", "always")):
            options = {"parallelism.fsdp_buffers": buffers, "parallelism.fsdp_reshard_after_forward": reshard}
            bench.configure(config_of(cell.workload, REFERENCE | NARROW | options, smoke=True))
            faces.append(bench.face())
        bench.configure(config_of(cell.workload, REFERENCE | WIDE, smoke=True))
        for face in (bench.face(), *faces, faces[0]):
            bench.put_on(face)
            for parameter in bench.model.parameters():
                parameter.grad = None
            bench.model(tokens, tokens, torch.tensor(0.1)).backward()
            kind = type(bench.model.blocks[0]._get_fsdp_state()._fsdp_param_group._all_gather_comm)  # type: ignore[attr-defined]
            direct = bench.config.parallelism.fsdp_buffers == "direct"
            assert kind is (fake_world.CopyEachToAll if direct else fake_world.CopyToAll)
            gradients.append([p.grad.to_local().clone() for p in bench.model.parameters()])  # type: ignore[union-attr]
        bench.close()
    wide, one, *others = gradients
    for other in others:
        assert all(map(torch.equal, other, one))
    assert not all(map(torch.equal, wide, one))
    for exact, rounded in zip(wide, one, strict=True):
        assert (exact - rounded).norm() <= 4e-3 * exact.norm()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels on a CPU need Triton's interpreter")
@pytest.mark.parametrize("n", [1, 7, 64, 2 * fake_world.BLOCK, 5 * fake_world.BLOCK + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_are_filled_by_few_programs(n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, with three programs instead of a GPU's."""
    monkeypatch.setattr(fake_world, "MULTIPROCESSORS", 3)
    shard, memory = torch.randn(n).to(dtype), torch.full((6, n), torch.nan, dtype=dtype)
    fake_world.launch_fill(memory[1:5], shard)
    assert torch.equal(memory[1:5], shard.expand(4, n)) and memory[0].isnan().all() and memory[5].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("n", [64, 917_504, 917_507])
def test_slots_of_a_gpu(n: int) -> None:
    shard = torch.randn(n, device="cuda").bfloat16()
    slots = torch.full((64, n), torch.nan, dtype=torch.bfloat16, device="cuda")
    fake_world.fill_slots(slots, shard)
    assert torch.equal(slots, shard.expand(64, n))


@BOTH_BUFFERS
@pytest.mark.parametrize("broken", ["zeros", "unwritten"])
def test_a_gather_that_is_not_real_is_noticed(broken: str, buffers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(output: torch.Tensor, group: Any) -> None:
        output.view(group.size(), -1)[1:].fill_(0.0 if broken == "zeros" else float("nan"))

    def call(self: object, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, **_: Any) -> None:
        fill(output_tensor, group)

    def each(self: object, outputs: list[torch.Tensor], inputs: list[torch.Tensor], group: Any) -> None:
        for output in outputs:
            fill(output, group)

    monkeypatch.setattr(fake_world.CopyToAll, "__call__", call)
    monkeypatch.setattr(fake_world.CopyEachToAll, "gather_each", each)
    cell = rank0_cell(buffers)
    with world_of(cell, CPU, smoke=True) as world:
        bench = Bench(cell, world, smoke=True)
        with pytest.raises(AssertionError, match="is not random"):
            bench.configure(bench.config)
        bench.close()


@BOTH_BUFFERS
@pytest.mark.parametrize("unit", ["embedding", "blocks.0", "head"])
def test_no_unit_is_left_out(unit: str, buffers: str) -> None:
    """Its own shard is zero here, as if it had not been initialised."""
    cell = rank0_cell(buffers)
    with world_of(cell, CPU, smoke=True) as world:
        bench = Bench(cell, world, smoke=True)
        with torch.no_grad():
            for parameter in bench.model.get_submodule(unit).parameters():
                parameter.to_local().zero_()  # type: ignore[attr-defined]
        with pytest.raises(AssertionError, match="is not random"):
            bench.configure(bench.config)
        bench.close()


@BOTH_BUFFERS
def test_a_gradient_that_is_not_real_is_noticed(buffers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(self: object, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, **_: Any) -> None:
        output_tensor.fill_(0.0)

    def each(self: object, outputs: list[torch.Tensor], inputs: list[torch.Tensor], group: Any, op: Any) -> None:
        torch._foreach_zero_(outputs)

    monkeypatch.setattr(fake_world.TakeOwn, "__call__", call)
    monkeypatch.setattr(fake_world.TakeOwnOfEach, "reduce_each", each)
    cell = rank0_cell(buffers)
    with world_of(cell, CPU, smoke=True) as world:
        bench = Bench(cell, world, smoke=True)
        bench.configure(bench.config)
        backward(bench)
        with pytest.raises(AssertionError, match="is zero or not finite"):
            fake_world.assert_reduces_real_gradients(bench.model)
        bench.close()


def test_measured_limits_calibrate_the_planner(results: Path) -> None:
    content = json.loads((results / "limits-cpu.json").read_text())
    assert set(content["rates"]) == {"gemm", "bandwidth", "attention_forward", "attention_backward"}
    assert all(rate > 0 for rate in content["rates"].values()) and content["attention"] == "flash"
    assert limits_from(content).bandwidth == content["rates"]["bandwidth"] and content["complete"]
    assert content["float8_by_shape"].keys() == limits.float8_matrices(smoke=True).keys()
    for recipes in content["float8_by_shape"].values():
        assert recipes.keys() == {"tensorwise", "rowwise"}
        for recipe, rates in recipes.items():
            if "error" in rates:  # a CPU of torch 2.11 has no scale for each row
                assert recipe == "rowwise" and "per-tensor scaling" in rates["error"]
            else:
                assert min(rates[name] for name in PRODUCTS) > 0


def test_limits_know_attention_of_packages_where_they_are(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts in the least time of a step, but not in the planner's default. Here torch's own replaces it."""
    content = json.loads((results / "limits-cpu.json").read_text())
    for backends in content["attention_by_call"].values():
        assert list(backends) == ["flash", "fa3", "fa4"]
        assert "'fa4' is not available with torch" in backends["fa4"]["error"]
    activated: list[tuple[Any, ...]] = []
    monkeypatch.setattr(limits, "activate_flash", lambda *of: activated.append(of))
    call = next(iter(limits.calls_of(smoke=True)[1].values()))
    found = limits._package_rates("fa4", call, CPU, 1, 2)
    assert activated == [("fa4", call.n_heads // call.n_kv_heads, call.head_dim, torch.bfloat16, CPU)]
    assert found.keys() == {"forward", "backward"} and min(found.values()) > 0
    fast = {"forward": 1e15, "backward": 1e15}
    content["attention_by_call"] = {call.key: {"flash": found, "fa4": fast}}
    assert limits._best_attention(content["attention_by_call"])[0] == "flash"
    assert limits_from(content).attention_seconds(call) == (call.flops / 1e15, 2.5 * call.flops / 1e15, "fa4")


def test_interrupted_limits_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    honest = limits._gemm_rates

    def rates(matrix: Any, *rest: Any) -> dict[str, float]:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(matrix.key)
        return honest(matrix, *rest)

    monkeypatch.setattr(limits, "_gemm_rates", rates)
    with pytest.raises(KeyboardInterrupt):
        limits.main(["--smoke", "--out", str(tmp_path)])
    assert train_suite.known_limits(tmp_path) is None  # as long as they are not whole
    first = json.loads((tmp_path / "limits-cpu.unfinished").read_text())
    monkeypatch.setattr(limits, "_gemm_rates", lambda *a: measured.append(a[0].key) or honest(*a))
    limits.main(["--smoke", "--out", str(tmp_path)])
    whole = json.loads((tmp_path / "limits-cpu.json").read_text())
    assert len(set(measured)) == len(measured) and whole["complete"]
    assert first["gemm_by_shape"].items() <= whole["gemm_by_shape"].items()
    assert whole["rates"]["bandwidth"] == first["rates"]["bandwidth"]
    measured.clear()
    monkeypatch.setattr(limits, "_gemm_rates", rates)
    with pytest.raises(KeyboardInterrupt):
        limits.main(["--smoke", "--out", str(tmp_path)])  # once more from the beginning
    assert json.loads((tmp_path / "limits-cpu.json").read_text()) == whole
    machine = whole["environment"]
    other_driver = machine | {"versions": machine["versions"] | {"driver": "another"}}
    assert limits.unfinished(tmp_path / "limits-cpu.unfinished", other_driver)["gemm_by_shape"].keys() == set(measured)
    other_torch = machine | {"versions": machine["versions"] | {"torch": "another"}}
    assert limits.unfinished(tmp_path / "limits-cpu.unfinished", other_torch) == {}


@pytest.mark.parametrize("error", [torch.AcceleratorError("lost"), AssertionError("none such"), SystemExit(1)])
def test_a_package_takes_nothing_from_the_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Its attention is last, and may fail in any way, or end the process."""

    def broken(version: str, *rest: Any) -> dict[str, Any]:
        raise error

    monkeypatch.setattr(limits, "_package_rates", broken)
    with pytest.raises(SystemExit) if isinstance(error, SystemExit) else nullcontext():
        limits.main(["--smoke", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "limits-cpu.json").read_text())
    assert train_suite.known_limits(tmp_path) is not None and found["rates"]["gemm"] > 0
    tried = [rates for backends in found["attention_by_call"].values() for n, rates in backends.items() if n != "flash"]
    number = {torch.AcceleratorError: 1, AssertionError: 2 * len(found["attention_by_call"])}.get(type(error), 0)
    assert tried == [{"error": f"{type(error).__name__}: {error}"}] * number
