"""`python -m titan_fast.data prepare|join|show`: token shards before a run, and what a step of a run was trained on."""

import argparse
import itertools
import json
import logging
import shlex
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from titan_fast import config as configuration
from titan_fast import run_history
from titan_fast.checkpoint import read_state
from titan_fast.command_line import Parser
from titan_fast.config import Config, is_hub, sample_range, skipped_samples
from titan_fast.corpus import RowLedger
from titan_fast.data import (
    DataRank,
    build_tokenizer,
    check_column_is_read,
    first_sample,
    local_corpus,
    training_order,
)
from titan_fast.errors import ConfigError, DataError, command
from titan_fast.manifest import checkpoints
from titan_fast.prepared import PreparedTokens, check_empty, is_prepared, join, prepare
from titan_fast.tokenizer import load_tokenizer


@command
def main() -> None:
    """The command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    parser = Parser(
        prog="python -m titan_fast.data",
        description="Token shards. Every option of titan_fast.train (--config, --training.dataset_path, "
        "--model.tokenizer_path, ...) says which data and which tokenizer.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("prepare", help="tokenize a data set into a folder for --training.dataset_path")
    writing.add_argument("--out", required=True, type=Path, help="the folder to write")
    writing.add_argument("--max-documents", type=int, help="read at most so many documents")
    joining = commands.add_parser("join", help="make one folder of several that prepare has written")
    joining.add_argument("parts", nargs="+", type=Path, metavar="PART", help="a folder, in the order of the documents")
    joining.add_argument("--out", required=True, type=Path, help="the folder to write")
    joining.add_argument(
        "--weights", type=numbers, metavar="W,W,...", help="how often an epoch of training has each part; default once"
    )
    showing = commands.add_parser("show", help="print the documents of one step of a run")
    what = showing.add_mutually_exclusive_group(required=True)
    what.add_argument("--step", type=int, help="the step, as the log counts: the first is 1")
    what.add_argument("--samples", metavar="FIRST:LAST", help="samples, as the lines about bad steps give them")
    showing.add_argument("--data-parallel-degree", type=int, help="of the run, where neither config nor log say")
    showing.add_argument("--characters", type=int, default=160, help="how much of each document's text to print")
    options, rest = parser.parse_known_args()
    if options.command == "show" and options.characters < 1:
        raise ConfigError(f"--characters is {options.characters}, not at least 1", "change it")
    if options.command == "prepare":
        prepare_folder(configuration.parse(rest), options.out.absolute(), options.max_documents)
    elif options.command == "join":
        if rest:
            raise ConfigError(f"join takes folders and --out, and {rest[0]} is given", "leave it out")
        index = join(options.parts, options.out.absolute(), options.weights)
        print(f"{options.out}: {_in_words(index, options.out)}")  # noqa: T201
    else:
        _check_shown(rest, options)
        run_dir = Path(configuration.parse(rest).job.dump_folder)
        if options.step is not None:
            lines = step_documents(run_dir, options.step, options.data_parallel_degree, options.characters)
        else:
            samples = sample_range(options.samples, "--samples")
            lines = sample_documents(run_dir, *samples, options.characters)
        for line in lines:
            print(line)  # noqa: T201


def numbers(words: str) -> list[float]:
    """Of W,W,...; its name is in the message about others."""
    return [float(word) for word in words.split(",")]


def _check_shown(rest: list[str], options: argparse.Namespace) -> None:
    """ConfigError for options that would have no effect, because a run's own config says what it was trained on."""
    names = [word.partition("=")[0] for word in rest if word.startswith("--")]
    if others := [name for name in names if name not in ("--config", "--job.dump_folder", "--help")]:
        raise ConfigError(f"show reads the run's own config, and {others[0]} is given", "give --job.dump_folder alone")
    if options.samples is not None and options.data_parallel_degree is not None:
        raise ConfigError("--data-parallel-degree is for --step, and --samples is given", "leave it out")


def prepare_folder(config: Config, out: Path, max_documents: int | None) -> None:
    """Writes the config's training data to `out`; DataError where it cannot."""
    if max_documents is not None and max_documents < 1:
        raise ConfigError(f"--max-documents is {max_documents}, not at least 1", "change it")
    training = config.training
    if training.dataset_path and is_prepared(Path(training.dataset_path)):
        raise DataError("the data is prepared already", "use the folder as it is", training.dataset_path)
    check_empty(out)
    corpus = None if is_hub(training) else local_corpus(training, training.dataset_path)
    if corpus is not None:
        check_column_is_read(training, [corpus])
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = build_tokenizer(config, DataRank(Path(scratch), torch.device("cpu")))
        started = time.monotonic()
        ledger = RowLedger()
        if corpus is None:
            from titan_fast.hub import all_documents

            documents, source = all_documents(training, ledger, max_documents)
        else:
            documents = itertools.islice(corpus.documents(ledger), max_documents)
            name = training.dataset_path or "stdlib"
            source = {"name": name, "fingerprint": corpus.fingerprint(), "max_documents": max_documents}
        source["text_column"] = training.text_column
        index = prepare(documents, tokenizer, out, source=source, ledger=ledger)
    seconds = time.monotonic() - started
    if summary := ledger.summary():
        print(summary)  # noqa: T201
    speed = f" in {seconds:.1f} s: {index['tokens'] / seconds:,.0f} tokens/s"
    print(f"{out}: {_in_words(index, out, speed)}")  # noqa: T201


def _in_words(index: dict[str, Any], out: Path, speed: str = "") -> str:
    return (
        f"{index['documents']:,} documents, {index['tokens']:,} tokens of {index['dtype']}{speed}; use it by "
        f"--training.dataset_path {shlex.quote(str(out))}"
    )


def step_documents(run_dir: Path, step: int, data_parallel_degree: int | None, characters: int) -> Iterator[str]:
    """`sample_documents` for a step: of the samples that the log gives for it, or for the logged step before it. A log
    of an older version gives none; then ConfigError if the batch has changed, or the data was begun again."""
    if step < 1:
        raise ConfigError(f"--step is {step}, and the first step is 1", "change it")
    if data_parallel_degree is not None and data_parallel_degree < 1:
        raise ConfigError(f"--data-parallel-degree is {data_parallel_degree}, not at least 1", "change it")
    config = _config_of(run_dir)
    logged = list(run_history.read(run_dir / "metrics.jsonl"))
    samples = _samples_by_log(run_dir, step, config, logged) if data_parallel_degree is None else None
    if samples is None:
        samples = _samples_by_batch(run_dir, step, config, data_parallel_degree, logged)
    last = max((record["step"] for record in logged), default=0)
    yield f"step {step}:" + ("" if not logged or step <= last else f" not in the log, which ends with step {last}")
    yield from sample_documents(run_dir, *samples, characters)


def _samples_by_log(run_dir: Path, step: int, config: Config, logged: list[dict[str, Any]]) -> tuple[int, int] | None:
    """First and last sample of a step. The first step of every start is logged, so from one logged step to the next
    the batch is the same."""
    found = {record["step"]: record["data"] for record in logged if "last_sample" in record.get("data", {})}
    if (before := max((at for at in found if at <= step), default=None)) is None:
        return None
    first, last = found[before]["first_sample"], found[before]["last_sample"]
    for later, data in sorted(found.items()):
        if later > before and data["first_sample"] <= last:
            raise ConfigError(
                f"the run's data was begun again after step {step}, at step {later} or before, and may be others since",
                "give --samples FIRST:LAST",
                str(run_dir),
            )
    batch, skipped = last + 1 - first, skipped_samples(config.training)
    after = min((at for at in found if at > before), default=step)
    if after > step and found[after]["first_sample"] == first + (after - before) * batch:
        skipped = []  # nothing was in between, whatever the config skips now
    firsts = [first]
    for _ in range(before + 1, max(step + 1, after)):
        firsts.append(first_sample(firsts[-1] + batch, batch, skipped))
    if after > step > before:
        size = found[after]["last_sample"] + 1 - found[after]["first_sample"]
        if first_sample(firsts[-1] + batch, size, skipped) != found[after]["first_sample"]:
            raise ConfigError(
                f"steps {before} and {after} of the log do not fit training.skip_samples as it is now",
                "give --samples FIRST:LAST",
                str(run_dir),
            )
    first = firsts[step - before]
    return first, first + batch - 1


def _samples_by_batch(
    run_dir: Path, step: int, config: Config, data_parallel_degree: int | None, logged: list[dict[str, Any]]
) -> tuple[int, int]:
    """First and last sample of a step of a run whose batch and data were always the same."""
    batch = _global_batch_size(config, data_parallel_degree, logged)
    for record in logged:
        if record.get("tokens_seen", expected := record["step"] * batch * config.training.seq_len) != expected:
            given = (
                "" if data_parallel_degree is None else f", or --data-parallel-degree {data_parallel_degree} is wrong"
            )
            raise ConfigError(
                f"after step {record['step']} the run had seen {record['tokens_seen']:,} tokens, which is not "
                f"{record['step']} times {batch} x {config.training.seq_len}: its batch or sequence length was another "
                f"once{given}",
                "give --samples FIRST:LAST",
                str(run_dir),
            )
    for saved, folder in checkpoints(run_dir / config.checkpoint.folder).items():
        if (sample := read_state(folder)["data"].get("next_sample", saved * batch)) != saved * batch:
            raise ConfigError(
                f"after step {saved} the run's data stood at sample {sample:,}, which is not {saved} times {batch}: "
                "it was begun again once",
                "give --samples FIRST:LAST",
                str(run_dir),
            )
    return (step - 1) * batch, step * batch - 1


def sample_documents(run_dir: Path, first: int, last: int, characters: int) -> Iterator[str]:
    """Lines that say of which documents each of these samples of a run on local or prepared data is made. They follow
    from only the run's config and token shards."""
    config = _config_of(run_dir)
    if is_hub(config.training):
        raise DataError("the documents of a streamed data set are not kept", "prepare it before training", str(run_dir))
    tokens = PreparedTokens(_shards_of(run_dir, config))
    tokenizer = load_tokenizer(tokens.folder)
    order = training_order(config, tokens)
    began, ended = first // order.samples_per_epoch, last // order.samples_per_epoch
    yield f"samples {first} to {last}, " + (f"epoch {began}" if began == ended else f"epochs {began} to {ended}")
    for sample in range(first, last + 1):
        yield f"sample {sample}:"
        for document, start, count in order.pieces(sample):
            text = tokenizer.decode(tokens.document(document)[start : start + count].tolist())[:characters]
            place = f"{tokens.origin(document)} (document {document})"
            yield f"  {place}, tokens {start} to {start + count - 1}: {text!r}"


def _config_of(run_dir: Path) -> Config:
    path = run_dir / "config.toml"
    try:
        return configuration.from_dict(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the run's config: {error}", "check --job.dump_folder", str(path)) from error


def _shards_of(run_dir: Path, config: Config) -> Path:
    """What the run's newest checkpoint was trained on. The last start may have made others, of text that has changed,
    and then have been refused."""
    path = run_dir / "data" / "training.json"
    try:
        written = Path(json.loads(path.read_bytes())["value"])
        own = run_dir / "data" / written.name
        found = own if not written.exists() and own.exists() else written  # the run may have been moved
    except (OSError, ValueError, KeyError) as error:
        raise DataError("the run has no prepared data", "check --job.dump_folder", str(path)) from error
    saved = checkpoints(run_dir / config.checkpoint.folder) if config.checkpoint.data_state == "exact" else {}
    trained_on = read_state(saved[max(saved)])["data"].get("fingerprint") if saved else None
    for folder in (found, *filter(is_prepared, sorted((run_dir / "data").iterdir()))):
        if trained_on in (None, PreparedTokens(folder, sizes=False).fingerprint):
            return folder
    raise DataError("the run was trained on other token shards", "put them back", str(found))


def _global_batch_size(config: Config, data_parallel_degree: int | None, logged: list[dict[str, Any]]) -> int:
    """Sequences per step, from the config, or else from what the log says that the run has seen."""
    training, parallelism = config.training, config.parallelism
    if training.global_batch_size != -1:
        return training.global_batch_size
    if data_parallel_degree is not None:
        return training.local_batch_size * data_parallel_degree
    if parallelism.data_parallel_shard_degree != -1:
        ranks = parallelism.data_parallel_replicate_degree * parallelism.data_parallel_shard_degree
        return training.local_batch_size * ranks
    for record in logged:
        if record["step"] and (batch := record.get("tokens_seen", 0) // (record["step"] * training.seq_len)):
            return batch
    raise ConfigError(
        "the run's config leaves the data-parallel degree, and so the global batch, to the number of processes, and "
        "its log says nothing of it",
        "give --data-parallel-degree",
    )
