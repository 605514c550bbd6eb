"""Training from given weights: every way of sharding the model gets the same ones, and a run starts with them."""

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folders import assert_same_tensors, edit_json, hf_folder, meta_folder, tensors
from safetensors.torch import load_file, save_file
from shapes import LLAMA2, LLAMA3
from small_runs import build, config_of, named_whole
from torch import Tensor
from worlds import Task, results, run_world

from titan_fast import loop
from titan_fast.config import Config, from_options, model_of, to_dict
from titan_fast.distributed import World
from titan_fast.errors import CheckpointError
from titan_fast.flavors import ModelShape, RopeScaling
from titan_fast.hf import read_parameter
from titan_fast.hf_convert import export_checkpoint, import_model
from titan_fast.initial_weights import foreign_weights, load_initial_weights
from titan_fast.loop import train
from titan_fast.model import Llama, init_weights
from titan_fast.tokenizer import train_sentencepiece

TWO_BY_TWO = {"parallelism.data_parallel_shard_degree": 2, "parallelism.tensor_parallel_degree": 2}
HSDP = {"parallelism.data_parallel_shard_degree": 2, "parallelism.data_parallel_replicate_degree": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp": {},
    "fsdp x tp": TWO_BY_TWO,
    "hsdp, ac": HSDP | {"activation_checkpoint.mode": "full"},
}


def loaded(world: World, path: Path, shape: ModelShape, options: dict[str, Any]) -> dict[str, Tensor]:
    model = build(config_of(options, world.size), shape, world)
    load_initial_weights(model, path, shape)
    return {name.replace("_checkpoint_wrapped_module.", ""): t for name, t in named_whole(model).items()}


def refusal(world: World, path: Path, shape: ModelShape, hidden_from: int | None) -> str:
    """The error, with the folder hidden from one rank, if any."""
    model = build(config_of({}, world.size), shape, world)
    with pytest.raises(CheckpointError) as caught:
        load_initial_weights(model, path if world.rank != hidden_from else path / "elsewhere", shape)
    return str(caught.value)


@pytest.fixture(scope="module")
def world_of_four(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Any]]]:
    """What four processes loaded, by source and layout. LLAMA2's 131 rows of vocabulary do not divide by 4, and a
    quarter of LLAMA3's packed projection is half a group."""
    folder = tmp_path_factory.mktemp("initial")
    hf_folder(LLAMA3, folder / "hf")
    hf_folder(LLAMA2, folder / "uneven")
    meta_folder(LLAMA3, folder / "meta", 2)
    hf_folder(LLAMA3, folder / "half", torch.bfloat16)
    infinite = load_file(hf_folder(LLAMA3, folder / "infinite") / "model.safetensors")
    infinite["lm_head.weight"][-1, 0] = math.inf
    save_file(infinite, folder / "infinite" / "model.safetensors", metadata={"format": "pt"})
    import_model(folder / "half", folder / "run" / "checkpoint")
    tasks = [Task(f"hf, {name}", loaded, (folder / "hf", LLAMA3, layout)) for name, layout in LAYOUTS.items()]
    tasks += [
        Task("uneven", loaded, (folder / "uneven", LLAMA2, {})),
        Task("meta", loaded, (folder / "meta", LLAMA3, TWO_BY_TWO)),
        Task("half", loaded, (folder / "run", LLAMA3, TWO_BY_TWO)),
        Task("hidden", refusal, (folder / "hf", LLAMA3, 1)),
        Task("not finite", refusal, (folder / "infinite", LLAMA3, None)),  # in one rank's part
    ]
    return folder, run_world(4, tasks, folder / "world")


@pytest.mark.parametrize(
    ("task", "source"),
    [*((f"hf, {name}", "hf") for name in LAYOUTS), ("uneven", "uneven"), ("meta", "meta"), ("half", "half")],
)
def test_every_rank_gets_its_part(task: str, source: str, world_of_four: tuple[Path, dict[str, list[Any]]]) -> None:
    folder, found = world_of_four
    weights = foreign_weights(folder / source)
    assert weights is not None
    for rank in results(found, task):
        for name, tensor in rank.items():
            assert torch.equal(tensor, read_parameter(weights, name).float()), name


def test_one_ranks_failure_is_every_ranks(world_of_four: tuple[Path, dict[str, list[Any]]]) -> None:
    folder, found = world_of_four
    assert results(found, "hidden") == [results(found, "hidden")[1]] * 4
    assert f"there is no such folder [{folder / 'hf' / 'elsewhere'}]" in results(found, "hidden")[0]
    assert len(set(results(found, "not finite"))) == 1
    assert "lm_head.weight has values that are not finite" in results(found, "not finite")[0]


TEXT = "".join(f"line {n}: the quick brown fox jumps over {n * n} lazy dogs\n" for n in range(400))
SHAPE = dataclasses.replace(LLAMA3, vocab_size=300)


def run_config(folder: Path, **options: Any) -> Config:
    """A run of one step that changes nothing, since its learning rate is 0."""
    (folder / "text").mkdir(exist_ok=True)
    for number in range(4):
        (folder / "text" / f"{number}.txt").write_text(TEXT)
    fixed = {"job.dump_folder": folder / "run", "training.dataset_path": folder / "text", "training.seq_len": 32,
             "training.local_batch_size": 2, "training.steps": 1, "optimizer.lr": 0, "validation.enable": False,
             "metrics.enable_tensorboard": False, "metrics.sample_prompt": ""}  # fmt: skip
    model = {
        f"model.{key}": value
        for key, value in to_dict(dataclasses.replace(Config(), model=model_of(SHAPE)))["model"].items()
    }
    words = {key.replace("__", "."): value for key, value in (fixed | model | options).items()}
    return from_options({key: [str(value)] for key, value in words.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_begins_with_the_folders_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    source = hf_folder(SHAPE, tmp_path / "hf", dtype)
    train(run_config(tmp_path, checkpoint__initial_load_path=source))
    assert "weights from" in (tmp_path / "run" / "train.log").read_text()
    export_checkpoint(tmp_path / "run", tmp_path / "back", dtype, 10**9)
    assert_same_tensors(tensors(source), tensors(tmp_path / "back"))

    # And from what that run has saved, which includes the first run's tokenizer.
    again = tmp_path / "again"
    again.mkdir()
    train(run_config(again, checkpoint__initial_load_path=tmp_path / "run"))
    export_checkpoint(again / "run", tmp_path / "back again", dtype, 10**9)
    assert_same_tensors(tensors(source), tensors(tmp_path / "back again"))


def test_what_headers_tell_is_refused_before_data_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop.distributed, "start", lambda *_: pytest.fail("the ranks met"))
    source = hf_folder(SHAPE, tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"n_layers is \d there and 1 here"):
        train(run_config(tmp_path, checkpoint__initial_load_path=source, model__n_layers=1))
    train_sentencepiece(iter([TEXT]), SHAPE.vocab_size, source / "tokenizer.model", 1)
    with pytest.raises(CheckpointError, match=rf"came with a tokenizer.*; add --model.tokenizer_path {source}"):
        train(run_config(tmp_path, checkpoint__initial_load_path=source))
    imported = tmp_path / "imported"
    import_model(source, imported)
    with pytest.raises(CheckpointError, match=rf"add --model.tokenizer_path {imported / 'step-0' / 'tokenizer'}"):
        train(run_config(tmp_path, checkpoint__initial_load_path=imported))
    monkeypatch.undo()
    train(run_config(tmp_path, checkpoint__initial_load_path=source, model__tokenizer_path=source))
    assert "WARNING" not in (tmp_path / "run" / "train.log").read_text()
    monkeypatch.setattr(loop.distributed, "start", lambda *_: pytest.fail("the ranks met"))
    other, last = tmp_path / "other", tmp_path / "run" / "checkpoint" / "step-1"
    with pytest.raises(CheckpointError, match=rf"add --model.tokenizer_path {last / 'tokenizer'}"):
        train(run_config(tmp_path, checkpoint__initial_load_path=tmp_path / "run", job__dump_folder=other))
    with (last / "config.toml").open("a") as file:
        file.write("[none]\nof = 1\n")
    with pytest.raises(CheckpointError, match=r"the checkpoint is not loaded \(config.toml: \d+ bytes, not \d+\)"):
        train(run_config(tmp_path, checkpoint__initial_load_path=tmp_path / "run", job__dump_folder=other))


def test_another_tokenizer_than_the_weights_came_with_is_warned_of(tmp_path: Path) -> None:
    train(run_config(tmp_path))
    again, source = tmp_path / "again", tmp_path / "run"
    again.mkdir()
    options = {"checkpoint__initial_load_path": source, "checkpoint__enable": False}
    train(run_config(again, **options))
    assert "another tokenizer" not in (again / "run" / "train.log").read_text()
    other = again / "other.model"
    train_sentencepiece(iter([TEXT.upper()]), SHAPE.vocab_size, other, 1)
    train(run_config(again, **options, job__dump_folder=again / "warned", model__tokenizer_path=other))
    log = (again / "warned" / "train.log").read_text()
    assert "WARNING: these weights came with another tokenizer than" in log
    assert f"--model.tokenizer_path {source / 'checkpoint' / 'step-1' / 'tokenizer'} takes theirs" in log


def test_a_run_goes_on_from_its_own_checkpoint(tmp_path: Path) -> None:
    """After the folder was removed, with weights that are no longer the folder's."""
    source = hf_folder(SHAPE, tmp_path / "hf")
    options = {"checkpoint__initial_load_path": source, "optimizer.lr": 1e-3}
    train(run_config(tmp_path, **options))
    shutil.rmtree(source)
    train(run_config(tmp_path, **options, training__steps=2))
    log = (tmp_path / "run" / "train.log").read_text()
    assert log.count("weights from") == 1 and (tmp_path / "run" / "checkpoint" / "step-2").is_dir()
    assert log.count("goes on from step-1; checkpoint.initial_load_path is not read again") == 1
    assert "WARNING: checkpoint.initial_load_path" not in log
    train(run_config(tmp_path, **options | {"checkpoint__initial_load_path": "/nowhere"}, training__steps=2))
    said = f"WARNING: checkpoint.initial_load_path was '{source}' and is '/nowhere', which is not read"
    assert said in (tmp_path / "run" / "train.log").read_text()


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    source = hf_folder(LLAMA3, tmp_path / "hf")
    model = Llama(LLAMA3)
    init_weights(model, seed=0)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    def attempt(**changes: Any) -> str:
        with pytest.raises(CheckpointError) as caught:
            load_initial_weights(model, source, dataclasses.replace(LLAMA3, **changes))
        return str(caught.value)

    assert "n_layers is 2 there and 3 here [" in attempt(n_layers=3)
    assert "tied is False there and True here" in attempt(tied=True)
    assert "rope_theta is 500000.0 there and 10000.0 here" in attempt(rope_theta=1e4)
    assert "--checkpoint.initial_load_changes True" in attempt(norm_eps=1e-6)
    edit_json(source / "config.json", hidden_act="gelu")
    assert "hidden_act is 'gelu'" in attempt()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_a_longer_context_is_accepted_when_told_and_said(tmp_path: Path) -> None:
    source = hf_folder(LLAMA3, tmp_path / "hf")
    longer = dataclasses.replace(LLAMA3, max_seq_len=512, rope_scaling=RopeScaling(8.0, original_max_seq_len=64))
    said = load_initial_weights(Llama(longer), source, longer, allow_changes=True)
    assert "other than there: rope_scaling is None there and RopeScaling(factor=8.0" in said
    load_initial_weights(Llama(LLAMA3), source, dataclasses.replace(LLAMA3, max_seq_len=512))  # changes no weight


def test_values_are_not_rounded_in_silence(tmp_path: Path) -> None:
    source = hf_folder(LLAMA3, tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"float32 there and torch\.bfloat16 here, which cannot hold every value"):
        load_initial_weights(Llama(LLAMA3).bfloat16(), source, LLAMA3)
    import_model(source, tmp_path / "ours")
    with pytest.raises(CheckpointError, match="which cannot hold every value"):
        load_initial_weights(Llama(LLAMA3).bfloat16(), tmp_path / "ours", LLAMA3)
