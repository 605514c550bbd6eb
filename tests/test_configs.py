"""Every shipped config can run as its header says, and the numbers in the header agree with each other."""

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest
import torch

from titan_fast.config import Config, grad_accum_steps, mesh_degrees, model_shape, parse
from titan_fast.flops import flops_per_token, mfu
from titan_fast.model import rope_tables

CONFIGS = {path.stem: path for path in (Path(__file__).parents[1] / "configs").glob("*.toml")}

# As published: devices, sequence, sequences per device, recomputation, sequences per step, peak learning rate. The two
# of Llama 3.2 are ours.
SETTINGS = {
    "debug": (1, 256, 4, "none", 4, 6e-3),
    "llama2_7b": (128, 4096, 2, "none", 256, 3e-4),
    "llama2_13b": (64, 4096, 2, "none", 128, 3e-4),
    "llama2_70b": (64, 4096, 1, "selective", 64, 1.5e-4),
    "llama3_8b": (64, 8192, 1, "selective", 64, 3e-4),
    "llama3_70b": (64, 8192, 1, "full", 64, 1.5e-4),
    "llama3_1b": (1, 8192, 4, "none", 64, 3e-4),
    "llama3_3b": (8, 8192, 2, "none", 64, 3e-4),
}


def load(name: str) -> Config:
    return parse(["--config", str(CONFIGS[name])])


def header(name: str) -> str:
    """The comment at the top, as one line."""
    lines = CONFIGS[name].read_text().split("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in lines)
    return " ".join(line.removeprefix("#").strip() for line in lines)


def test_no_config_is_left_out() -> None:
    assert set(CONFIGS) == set(SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name: str) -> None:
    config = load(name)
    devices, seq_len, local_batch, mode, global_batch, lr = SETTINGS[name]
    training = config.training
    assert (training.seq_len, training.local_batch_size, config.optimizer.lr) == (seq_len, local_batch, lr)
    assert config.activation_checkpoint.mode == mode
    degrees = mesh_degrees(config.parallelism, devices)
    assert local_batch * degrees.data * grad_accum_steps(training, degrees.data) == global_batch
    assert config.model.flavor == name
    assert config.job.dump_folder == f"outputs/{name}"
    assert config.compile.enable == (name != "debug")


def test_debug_is_the_default() -> None:
    assert load("debug") == Config()


def test_hybrid_sharding_of_the_7b() -> None:
    degrees = mesh_degrees(load("llama2_7b").parallelism, 128)
    assert (degrees.replicate, degrees.shard) == (16, 8)


@pytest.mark.parametrize("name", sorted(set(SETTINGS) - {"debug"}))
def test_header_says_hardware_and_speed(name: str) -> None:
    text = header(name)
    assert re.search(r"on (one|\d+) (GPUs?|A100)", text)
    assert re.search(r"Expected: (published \d+ tokens/s per GPU|no published figure)", text)
    assert re.search("not measured here", text, re.IGNORECASE)
    devices = re.search(r"on (\d+) (GPUs|A100)", text)
    assert int(devices[1] if devices else 1) == SETTINGS[name][0]


@pytest.mark.parametrize("name", sorted(set(SETTINGS) - {"debug"}))
def test_header_says_how_its_batch_compares_with_the_papers(name: str) -> None:
    devices, seq_len, _, _, global_batch, _ = SETTINGS[name]
    assert f"a step has {global_batch * seq_len:,} tokens" in header(name)
    if found := re.search(r"4M tokens \(training.global_batch_size (\d+)\)", header(name)):
        assert int(found[1]) * seq_len == 4 * 2**20
        training = dataclasses.replace(load(name).training, global_batch_size=int(found[1]))
        assert grad_accum_steps(training, devices) > 1


@pytest.mark.parametrize("name", ["llama3_1b", "llama3_3b"])
def test_header_says_how_to_leave_rotary_wavelengths_alone(name: str) -> None:
    found = re.search(r"--(model\.rope_scaling [\d ]+\d)", header(name))
    assert found is not None
    shape = model_shape(parse(["--config", str(CONFIGS[name]), *f"--{found[1]}".split()]).model)
    given, plain = (rope_tables(s, 64) for s in (shape, dataclasses.replace(shape, rope_scaling=None)))
    assert all(torch.equal(a, b) for a, b in zip(given, plain, strict=True))


@pytest.mark.parametrize("name", ["llama2_13b", "llama2_70b", "llama3_8b", "llama3_70b"])
def test_published_speed_and_mfu_of_the_header_agree(name: str) -> None:
    found = re.search(r"published (\d+) tokens/s per GPU, MFU ([\d.]+)% by the palm formula", header(name))
    assert found is not None
    config = load(name)
    per_token = flops_per_token(model_shape(config.model), config.training.seq_len, "palm")
    assert 100 * mfu(float(found[1]), per_token, 312e12) == pytest.approx(float(found[2]), abs=0.1)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_file_overrides_what_it_names(name: str) -> None:
    """Every value in the file is in the config."""
    config = load(name)
    for table, keys in tomllib.loads(CONFIGS[name].read_text()).items():
        for key, value in keys.items():
            assert getattr(getattr(config, table), key) == value, f"{table}.{key}"
