"""FSDP2 without its copies. test_parallel has that it trains like one process."""

from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from shapes import LLAMA3
from small_runs import build, config_of
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from worlds import Task, World, results, run_world

from titan_fast import direct_fsdp, parallel
from titan_fast.config import Config, from_options, mesh_degrees, model_shape
from titan_fast.errors import CommunicationError, ConfigError

CPU = torch.device("cpu")
DIRECT = {"parallelism.fsdp_buffers": "direct"}
RANKS = 4
SHAPES = ((8, 3), (5, 2), (131, 4), (3,), (4,), (1, 7))  # rows that the ranks divide, and rows that they do not


@pytest.fixture
def another_fsdp(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch in whose FSDP2 a function has another parameter."""
    monkeypatch.setitem(direct_fsdp._flat, "foreach_all_gather_copy_out", lambda result, params: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_rank_is_sent_the_rows_that_it_keeps(dtype: torch.dtype) -> None:
    gradients = [torch.randn(shape).to(dtype) for shape in SHAPES]
    rows = [-(-shape[0] // RANKS) * RANKS for shape in SHAPES]
    total = sum(n * gradient[0].numel() for n, gradient in zip(rows, gradients, strict=True))
    flat = torch.full((total,), torch.nan)
    direct = direct_fsdp.DirectReduceScatter().allocate((total,), dtype=torch.float32, device=CPU)
    direct_fsdp._copy_in(list(gradients), flat, RANKS)
    direct_fsdp._copy_in(list(gradients), direct, RANKS)
    parts = direct.parts  # type: ignore[attr-defined]
    for rank in range(RANKS):
        own = torch.cat([part.view(RANKS, -1)[rank] for part in parts])
        assert torch.equal(own, flat.view(RANKS, -1)[rank])
    assert direct.untyped_storage().nbytes() == 4
    for part, gradient, shape in zip(parts, gradients, SHAPES, strict=True):
        in_place = part.data_ptr() == gradient.data_ptr()
        assert in_place == (dtype == torch.float32 and shape[0] % RANKS == 0)


@pytest.mark.parametrize(
    ("asked", "device", "direct"),
    [("auto", "cpu", False), ("auto", "cuda", True), ("flat", "cuda", False), ("direct", "cpu", True)],
)
def test_auto_is_for_gpus(asked: str, device: str, direct: bool) -> None:
    assert parallel.buffers_are_direct(of(asked).parallelism, device) == direct


@pytest.mark.usefixtures("another_fsdp")
def test_an_unknown_fsdp_is_left_alone() -> None:
    assert not parallel.buffers_are_direct(of("auto").parallelism, "cuda")
    settings = of("direct")
    with pytest.raises(ConfigError, match=r"foreach_all_gather_copy_out is not the function that is known.*use flat"):
        parallel.check(settings, model_shape(settings.model), mesh_degrees(settings.parallelism, RANKS), CPU)


def kinds_of_collectives(world: World) -> tuple[set[str], set[str]]:
    """The classes of all units' collectives: as built, and after they were removed again."""
    model = build(config_of(DIRECT, world.size), LLAMA3, world)

    def kinds() -> set[str]:
        units = [m._get_fsdp_state()._fsdp_param_group for m in model.modules() if isinstance(m, FSDPModule)]
        found = [(unit._all_gather_comm, unit._reduce_scatter_comm) for unit in units if unit is not None]
        return {type(one).__name__ for pair in found for one in pair}

    built = kinds()
    direct_fsdp.use(model, False)
    return built, kinds()


def grouped(world: World, broken: str) -> str:
    """What `check` reports for this world's collectives if one of them is changed."""
    model = build(config_of(DIRECT, world.size), LLAMA3, world)
    gather, reduce = direct_fsdp.DirectAllGather.gather_each, direct_fsdp.DirectReduceScatter.reduce_each

    def late(self: Any, outputs: list[Tensor], inputs: list[Tensor], group: Any) -> None:
        gather(self, outputs[1:], inputs[1:], group)

    def failing(self: Any, outputs: list[Tensor], inputs: list[Tensor], group: Any) -> None:
        raise RuntimeError("no such collective")

    def doubled(self: Any, outputs: list[Tensor], inputs: list[Tensor], group: Any, op: Any) -> None:
        reduce(self, outputs, [2 * one for one in inputs], group, op)

    try:
        if broken in ("gather", "absent"):
            function = late if broken == "gather" else failing
            direct_fsdp.DirectAllGather.gather_each = function  # type: ignore[method-assign]
        if broken == "reduce":
            direct_fsdp.DirectReduceScatter.reduce_each = doubled  # type: ignore[method-assign]
        direct_fsdp.check(model, CPU)
    except CommunicationError as error:
        return str(error)
    finally:
        direct_fsdp.DirectAllGather.gather_each = gather  # type: ignore[method-assign]
        direct_fsdp.DirectReduceScatter.reduce_each = reduce  # type: ignore[method-assign]
    return ""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    tasks = [Task("kinds", kinds_of_collectives)]
    tasks += [Task(broken, grouped, (broken,)) for broken in ("nothing", "gather", "reduce", "absent")]
    return run_world(2, tasks, tmp_path_factory.mktemp("world"))


def test_units_use_what_they_are_told(found: dict[str, list[Any]]) -> None:
    direct, flat = {"DirectAllGather", "DirectReduceScatter"}, {"DefaultAllGather", "DefaultReduceScatter"}
    assert results(found, "kinds") == [(direct, flat)] * 2


def test_wrong_grouped_collectives_are_seen(found: dict[str, list[Any]]) -> None:
    assert results(found, "nothing") == ["", ""]
    for broken in ("gather", "reduce"):
        assert all("of 2 ranks give wrong numbers; use" in words for words in results(found, broken))
    assert all("of 2 ranks fail: no such collective; use" in words for words in results(found, "absent"))


def test_a_run_checks_them_before_its_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(model: nn.Module, device: torch.device) -> None:
        assert isinstance(model, FSDPModule)
        raise CommunicationError("grouped collectives give wrong numbers", "use flat")

    monkeypatch.setattr(direct_fsdp, "check", check)
    more = {"training__mixed_precision_param": "bfloat16", "parallelism__single_device": "fsdp"}
    with pytest.raises(CommunicationError, match="wrong numbers"):
        runs.run(runs.write_documents(tmp_path / "text.jsonl"), tmp_path / "run", **more)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("size", [2, 1249, 16_384])
def test_numbers_that_are_right_are_right_on_any_number_of_ranks(size: int) -> None:
    """A ring adds the ranks' numbers one after another, in float32."""
    rank = size - 1
    sent: list[Tensor] = []

    class Ring:
        def size(self) -> int:
            return size

        def rank(self) -> int:
            return rank

        def allgather_into_tensor_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], _: Any) -> None:
            for output, own in zip(outputs, inputs, strict=True):
                # (a + 10 r) mod 251, as the own numbers say of the own rank
                number = torch.arange(len(own)).repeat(size) + 10 * torch.arange(size).repeat_interleave(len(own))
                output.copy_(number % 251)
                assert torch.equal(output[-len(own) :], own)

        def reduce_scatter_tensor_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], _: Any) -> None:
            for output, everyones in zip(outputs, inputs, strict=True):
                output.zero_()
                for _ in range(size):  # whose inputs are alike
                    output += everyones.view(size, -1)[rank]
                sent.append(output)

    assert direct_fsdp._numbers_are_right(Ring(), CPU)  # type: ignore[arg-type]
    assert all(output.max() > 200 * size for output in sent[:1])


def of(buffers: str) -> Config:
    return from_options({"parallelism.fsdp_buffers": [buffers]})
