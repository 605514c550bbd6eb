"""A rank of a world that does not exist: what it holds, what it refuses, and that the shipped configs pass."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import environment

from titan_fast.config import MeshDegrees, model_shape, parse
from titan_fast.dry_run import as_on_a_gpu, dry_run
from titan_fast.errors import ConfigError
from titan_fast.flops import parameter_count

CONFIGS = Path(__file__).parents[1] / "configs"


def words(**options: Any) -> list[str]:
    """A command line; keys with __ for the dot."""
    made = {"job__dry_run": True, "compile__enable": False} | options
    return [word for key, value in made.items() for word in (f"--{key.replace('__', '.')}", str(value))]


def held(output: str) -> dict[str, float]:
    """Bytes by part, as printed."""
    units = {"MiB": 2**20, "GiB": 2**30}
    found = re.findall(r"^  (.+?) +([\d.]+) (MiB|GiB)$", output, re.MULTILINE)
    return {name: float(number) * units[unit] for name, number, unit in found}


MESHES = {
    "one": (1, 1, 1, 1),
    "FSDP": (64, 1, 64, 1),
    "HSDP with TP": (16, 2, 4, 2),
    "TP alone": (2, 1, 1, 2),
}


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_what_a_rank_holds(mesh: tuple[int, int, int, int], capsys: pytest.CaptureFixture[str]) -> None:
    size, replicate, shard, tensor = mesh
    config = parse(
        words(
            job__world_size=size,
            parallelism__data_parallel_replicate_degree=replicate,
            parallelism__tensor_parallel_degree=tensor,
        )
    )
    dry_run(config)
    output = capsys.readouterr().out
    assert f"rank 0 of {size}" in output and f"{replicate} replicate x {shard} shard x {tensor} tensor" in output
    parts, parameters = held(output), parameter_count(model_shape(config.model)) / (shard * tensor)
    # Norms are whole on each tensor-parallel rank, and a shard is rounded up to 512 bytes a tensor; that is under 4%.
    # One device keeps bfloat16 weights besides their float32 masters.
    assert parts["parameters"] == pytest.approx((6 if size == 1 else 4) * parameters, rel=0.04)
    assert parts["optimizer state"] == pytest.approx(8 * parameters, rel=0.04)


def test_what_no_kernel_can_do_fails_here_too() -> None:
    config = parse(words(job__world_size=2, parallelism__tensor_parallel_degree=2, kernels__reemit="triton"))
    with pytest.raises(ConfigError, match="tensor_parallel_degree 2 puts a gather between them"):
        dry_run(config)


def test_recomputation_shows(capsys: pytest.CaptureFixture[str]) -> None:
    kept = {}
    for mode in ("none", "pointwise", "full"):
        dry_run(parse(words(job__world_size=8, activation_checkpoint__mode=mode)))
        kept[mode] = held(capsys.readouterr().out)["saved activations"]
    assert kept["full"] < kept["pointwise"] < kept["none"]


def test_what_is_offloaded_is_in_host_memory(capsys: pytest.CaptureFixture[str]) -> None:
    fullest = []
    for offload in (False, True):
        dry_run(parse(words(job__world_size=8, training__enable_cpu_offload=offload)))
        output = capsys.readouterr().out
        assert output.count(", in host memory") == (2 if offload else 0)
        found = re.search(r"^fullest moment +([\d.]+) MiB", output, re.MULTILINE)
        assert found is not None, output
        fullest.append(float(found[1]) * 2**20)
        parts = held(output.replace(", in host memory", ""))
    assert fullest[0] - fullest[1] == pytest.approx(parts["parameters"] + parts["optimizer state"], abs=2**15)


def test_the_clusters_errors() -> None:
    with pytest.raises(ConfigError, match="n_heads 6 is not divisible by tensor_parallel_degree 4"):
        dry_run(parse(words(job__world_size=8, parallelism__tensor_parallel_degree=4)))
    with pytest.raises(ConfigError, match=r"3 .*= 3, and the world size is 8; change .* or --job.world_size$"):
        dry_run(parse(words(job__world_size=8, parallelism__data_parallel_shard_degree=3)))
    with pytest.raises(ConfigError, match=r"without blocks compiled by inductor"):
        options = {"parallelism__tensor_parallel_degree": 2, "parallelism__enable_async_tensor_parallel": True}
        dry_run(parse(words(job__world_size=8, **options)))


@pytest.mark.parametrize(("options", "wide"), [({}, True), ({"kernels__reemit": "triton"}, False)])
def test_gradients_are_as_wide_as_in_the_run(options: dict[str, str], wide: bool) -> None:
    config = parse(words(job__world_size=2, **options))
    assert as_on_a_gpu(config, MeshDegrees(1, 2, 1)).parallelism.fsdp_wide_gradients is wide


def test_a_world_size_without_a_dry_run() -> None:
    with pytest.raises(ConfigError, match=r"job\.world_size is 8, and without job\.dry_run"):
        parse(["--job.world_size", "8"])
    with pytest.raises(ConfigError, match=r"job\.world_size is 0, not between 1 and 2\^20"):
        parse(words(job__world_size=0))


def test_two_launch_methods_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="started 2 processes: two launch methods at once"):
        dry_run(parse(words(job__world_size=8)))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("llama3_70b", 512), ("llama2_13b", 64)])
def test_shipped_configs_pass(name: str, size: int) -> None:
    command = [sys.executable, "-m", "titan_fast.train", "--config", str(CONFIGS / f"{name}.toml")]
    done = subprocess.run(
        [*command, "--job.dry_run", "True", "--job.world_size", str(size)],
        capture_output=True, text=True, env=environment(), timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"rank 0 of {size}" in done.stdout and "fullest moment" in done.stdout
