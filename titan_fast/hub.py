"""Streams from the hub: each data-parallel rank reads its own part, and its state is exact after every step.

The state is the data set's own after the last document that was read, together with the tokens that were read but not
yet trained on, and the hub's commit, at which the stream goes on whatever has been added since. The order of the files
is shuffled, not their rows, because the content of a shuffle buffer cannot be saved. A rank reads one file after
another.
"""

import base64
import copy
import itertools
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import datasets
import numpy as np
from datasets.distributed import split_dataset_by_node
from datasets.exceptions import DatasetsError

from titan_fast.config import Training
from titan_fast.corpus import Document, RowLedger, missing_column, row_texts
from titan_fast.errors import DataError, did_you_mean
from titan_fast.loader import Share, Step
from titan_fast.prepared import token_arrays
from titan_fast.tokenizer import Tokenizer

log = logging.getLogger(__name__)

KNOWN_NAMES = {"c4": ("allenai/c4", "en")}
"""Short names: the hub's name and the configuration that is the default here."""
RETRY_SECONDS = (1, 2, 4, 8, 16, 32, 60, 60, 120, 120)
"""Waits before a broken stream is tried again, as long as patience lasts. They start anew after each document read."""
_OLDEST_DATASETS = (5, 1)  # earlier ones held back a row when shuffling, even with a buffer of one, and did not save it
_ROWS_TOGETHER = 32  # tokenized in one call
_TOKEN = np.dtype("<i4")
_COMMIT = re.compile("[0-9a-f]{40}")


class StreamState(NamedTuple):
    """Where a stream stands after a step."""

    epoch: int
    rows: int
    next_sample: int
    stream: dict[str, Any] | None
    """The data set's own state."""
    left_over: np.ndarray
    """Tokens of documents that were read but not trained on."""


def hub_source(
    training: Training, tokenizer: Tokenizer, share: Share, seed: int, patience: float = float("inf")
) -> "StreamSource":
    """The configured hub data set as a source; DataError when it cannot be reached or has no such column. patience: for
    how many seconds a broken connection is tried again, while the other ranks wait."""
    dataset, commit = open_stream(training)
    return StreamSource(
        in_shuffled_files(dataset, seed),
        stream_name(training),
        training.text_column,
        tokenizer,
        share,
        training.seq_len,
        seed,
        patience,
        commit,
        lambda earlier: in_shuffled_files(open_stream(training, earlier)[0], seed),
    )


def stream_name(training: Training) -> str:
    """name/configuration/split, and @revision if one is chosen."""
    name, config = _name_and_config(training)
    path = "/".join(part for part in (name, config, training.dataset_split) if part)
    return f"{path}@{training.dataset_revision}" if training.dataset_revision else path


def _name_and_config(training: Training) -> tuple[str, str | None]:
    name, config = KNOWN_NAMES.get(training.dataset, (training.dataset, None))
    return name, training.dataset_config or config


def open_stream(training: Training, commit: str | None = None) -> tuple[datasets.IterableDataset, str | None]:
    """The hub data set, neither shuffled nor divided, and its commit (None if it is none of the hub's); DataError when
    it cannot be opened. commit: an earlier one, at which a run's stream was."""
    name, config = _name_and_config(training)
    try:
        builder = datasets.load_dataset_builder(name, config, revision=commit or training.dataset_revision)
        dataset = builder.as_streaming_dataset(split=training.dataset_split)
        return cast(datasets.IterableDataset, dataset), builder.hash if _COMMIT.fullmatch(builder.hash or "") else None
    except Exception as error:
        is_known = training.dataset in KNOWN_NAMES
        hint = "" if is_known else did_you_mean(training.dataset, ("stdlib", *KNOWN_NAMES))
        if Path(training.dataset).exists():
            hint = f"{training.dataset} is here: give it with training.dataset_path; or "
        if _is_connection_error(error):
            raise DataError(
                f"the hub cannot be reached for the data set {name!r}: {_first_line(error)}",
                f"{hint}check the network, or give local data with training.dataset_path",
            ) from error
        if isinstance(error, ValueError | DatasetsError | FileNotFoundError | RuntimeError):
            if commit:
                raise DataError(
                    f"commit {commit} of the data set {name!r}, which the run has read so far, cannot be opened: "
                    f"{_first_line(error)}",
                    "begin the data again, at the newest commit, by --checkpoint.data_state reset",
                ) from error
            raise DataError(
                f"the data set {name!r} cannot be opened: {_first_line(error)}",
                f"{hint}check training.dataset, dataset_config, dataset_revision and dataset_split",
            ) from error
        raise


def in_shuffled_files(dataset: datasets.IterableDataset, seed: int) -> datasets.IterableDataset:
    """The data set with its files in an order drawn from `seed` and the epoch, read one by one. DataError with a
    `datasets` that cannot go on from a saved state exactly."""
    if tuple(map(int, datasets.__version__.split(".")[:2])) < _OLDEST_DATASETS:
        raise DataError(
            f"datasets {datasets.__version__} loses rows of a stream that goes on from a saved state",
            "install datasets>={}.{}, or prepare the data ahead".format(*_OLDEST_DATASETS),
        )
    return dataset.shuffle(seed=seed, buffer_size=1, max_buffer_input_shards=1)


def first_documents(training: Training, seed: int) -> Iterator[Document]:
    """The stream from its beginning, from several of the shuffled files in turn where `datasets` can."""
    return _documents(open_stream(training)[0].shuffle(seed=seed, buffer_size=1), training, RowLedger())


def all_documents(
    training: Training, ledger: RowLedger, most: int | None
) -> tuple[Iterator[Document], dict[str, str | None]]:
    """At most `most` documents of the stream in its own order; and what a prepared copy says of its source."""
    dataset, commit = open_stream(training)
    name = stream_name(training)
    source = {"name": name, "commit": commit, "fingerprint": json.dumps([name, training.text_column, most])}
    return itertools.islice(_documents(dataset, training, ledger), most), source


def _documents(dataset: datasets.IterableDataset, training: Training, ledger: RowLedger) -> Iterator[Document]:
    name = stream_name(training)
    ledger.name, ledger.column = name, training.text_column
    for row in dataset:
        ledger.count()
        for text in row_texts(row, f"{name}:{ledger.rows}", ledger):
            yield Document(text, name, ledger.rows)
    ledger.check()


class StreamSource:
    """Steps out of a streamed data set, tokenized and packed as they come."""

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        name: str,
        text_column: str,
        tokenizer: Tokenizer,
        share: Share,
        seq_len: int,
        seed: int,
        patience: float = float("inf"),
        commit: str | None = None,
        at_commit: Callable[[str], datasets.IterableDataset] | None = None,
    ) -> None:
        """`dataset` is all of it, at `commit` of the hub; this rank's part is taken here. DataError when its first row
        lacks the column. at_commit: opens it as it was."""
        _say_nothing_of_the_buffer()
        self._patience, self._commit, self._at_commit = patience, commit, at_commit
        self._name, self._column, self._tokenizer = name, text_column, tokenizer
        self._share, self._seq_len = share, seq_len
        self._ledger = RowLedger(self._name, self._column)
        self._rows_iterator: Iterator[Any] | None = None
        self._state = StreamState(0, 0, 0, None, np.empty(0, _TOKEN))
        self._take_part(dataset)
        self.identity = {
            "kind": "stream",
            "dataset": name,
            "text_column": text_column,
            "tokenizer": tokenizer.fingerprint,
            "bos_and_eos": [tokenizer.bos_id, tokenizer.eos_id],
            "seq_len": seq_len,
            "seed": seed,
            "files_at_once": 1,
            "rank": share.dp_rank,
            "dp_degree": share.dp_degree,
        }
        self._check_first_row()

    def _take_part(self, dataset: datasets.IterableDataset) -> None:
        self._files = dataset.num_shards
        self._dataset = split_dataset_by_node(dataset, rank=self._share.dp_rank, world_size=self._share.dp_degree)

    def _check_first_row(self) -> None:
        try:
            row = next(iter(self._dataset), None)
        except Exception as error:
            what = "the hub cannot be reached" if _is_connection_error(error) else "the first row cannot be read"
            raise DataError(
                f"{what}: {_first_line(error)}", "check the network and the data set", self._name
            ) from error
        if row is None:
            what = f"the data set has no row for data-parallel rank {self._share.dp_rank} of {self._share.dp_degree}"
            raise DataError(what, "give other data, or fewer ranks", self._name)
        if self._column not in row:
            raise missing_column(self._column, row, self._name)

    def describe(self) -> str:
        share = self._share
        commit = f", commit {self._commit}" if self._commit else ""
        order = (
            f"{self._name}{commit}: streamed from {self._files} files in an order drawn from seed "
            f"{self.identity['seed']}"
        )
        if self._files % share.dp_degree == 0:
            return f"{order}, {self._files // share.dp_degree} for each of {share.dp_degree} data-parallel ranks"
        return (
            f"{order}; WARNING: {self._files} files do not divide by {share.dp_degree} data-parallel ranks, so each "
            f"rank reads all of them and keeps every {share.dp_degree}th row: use a degree that divides, or prepare "
            "the data"
        )

    def state(self) -> StreamState:
        return self._state

    def state_to_json(self, state: StreamState) -> dict[str, Any]:
        # As text, for the numbers of a thousand ranks one by one take a save and every start many seconds.
        left_over = base64.b64encode(state.left_over.tobytes()).decode()
        return {**state._asdict(), "left_over": left_over, "commit": self._commit}

    def load_state(self, state: Any) -> None:
        if isinstance(state, dict):
            state = dict(state)
            self._go_to(state.pop("commit", None))  # not in what an older version has saved
            held = state["left_over"]  # a list where an older version has saved it
            tokens = np.frombuffer(base64.b64decode(held), _TOKEN) if isinstance(held, str) else np.array(held, _TOKEN)
            state = StreamState(**{**state, "left_over": tokens})
        self._state = state
        self._rows_iterator = None

    def _go_to(self, commit: str | None) -> None:
        """Where files were added or removed since, the data set's state would point into others."""
        if commit and commit != self._commit and self._at_commit is not None:
            log.info("%s goes on at commit %s, with which it began; newest: %s", self._name, commit, self._commit)
            self._take_part(self._at_commit(commit))
            self._commit = commit

    def next_step(self, stopping: threading.Event) -> Step:
        share, state = self._share, self._state
        per_pass = share.local_batch_size * self._seq_len
        used = share.passes * per_pass
        parts, held = [state.left_over], len(state.left_over)
        reading = _Progress(state.epoch, state.rows, state.stream)
        while held <= used:  # one token more than is used, for the last label
            for tokens in self._read_documents(reading, stopping):
                parts.append(tokens)
                held += len(tokens)
        run = np.concatenate(parts)
        passes = []
        for start in range(0, used, per_pass):
            window = run[start : start + per_pass + 1].astype(np.int64)
            passes.append(tuple(part.reshape(-1, self._seq_len) for part in (window[:-1], window[1:])))
        first, next_sample = state.next_sample, state.next_sample + share.global_batch_size
        self._state = StreamState(reading.epoch, reading.rows, next_sample, reading.stream, run[used:].copy())
        position = {"epoch": state.epoch, "first_sample": first, "last_sample": next_sample - 1}
        return Step(passes, position, self._state)

    def _read_documents(self, reading: "_Progress", stopping: threading.Event) -> list[np.ndarray]:
        texts: list[str] = []
        for _ in range(_ROWS_TOGETHER):
            row = self._next_row(reading, stopping)
            texts += row_texts(row, f"{self._name}:{reading.rows}", self._ledger)
            self._ledger.count()
        return token_arrays(self._tokenizer, texts, _TOKEN)

    def _next_row(self, reading: "_Progress", stopping: threading.Event) -> Any:
        """The next row of this rank's part, in the next epoch at its end; a broken connection is made again."""
        waits, empty_epochs, broke_at = iter(RETRY_SECONDS), 0, None
        while empty_epochs < 2:  # an epoch without rows is normal once: where the loaded state was its very end
            try:
                if self._rows_iterator is None:
                    self._dataset.set_epoch(reading.epoch)
                    self._dataset.load_state_dict(copy.deepcopy(reading.stream))  # type: ignore[arg-type]  # or None
                    self._rows_iterator = iter(self._dataset)
                row = next(self._rows_iterator, None)
            except Exception as error:
                self._rows_iterator = None
                broke_at = broke_at or time.monotonic()
                wait, spent = next(waits, None), time.monotonic() - broke_at
                if not _is_connection_error(error):
                    raise self._broken(_first_line(error), reading) from error
                if wait is None or spent + wait > self._patience:
                    raise self._broken(f"{_first_line(error)}, for {spent:.0f} s", reading) from error
                log.warning("%s: %s; trying again in %d s", self._name, _first_line(error), wait)
                if stopping.wait(wait):
                    raise
                continue
            if row is not None:
                reading.stream = copy.deepcopy(self._dataset.state_dict())
                reading.rows += 1
                return row
            empty_epochs += 1
            self._end_epoch(reading)
        raise self._broken("it has no row", reading)

    def _end_epoch(self, reading: "_Progress") -> None:
        self._ledger.check()
        if summary := self._ledger.summary():
            log.warning("%s, epoch %d: %s", self._name, reading.epoch, summary)
        self._ledger = RowLedger(self._name, self._column)
        reading.epoch, reading.rows, reading.stream = reading.epoch + 1, 0, None
        self._rows_iterator = None

    def _broken(self, why: str, reading: "_Progress") -> DataError:
        place = f"{self._name}:{reading.rows + 1}, epoch {reading.epoch}, data-parallel rank {self._share.dp_rank}"
        return DataError(f"the stream broke: {why}", "start again to go on from the last save", place)


@dataclass
class _Progress:
    """How far the rows have been read while a step is made."""

    epoch: int
    rows: int
    stream: dict[str, Any] | None


def _is_connection_error(error: BaseException | None) -> bool:
    """Whether another try may help: a failure of the network, under whichever library's name."""
    while error is not None:
        if isinstance(error, ConnectionError | TimeoutError):
            return True
        if type(error).__module__.split(".")[0] in ("aiohttp", "httpx", "httpcore", "requests", "urllib3"):
            return True
        error = error.__cause__
    return False


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _say_nothing_of_the_buffer() -> None:
    """`datasets` warns that a shuffle buffer's rows are lost with a saved state; ours holds none (its size is 1)."""
    logger = logging.getLogger("datasets.iterable_dataset")
    if _not_of_the_buffer not in logger.filters:
        logger.addFilter(_not_of_the_buffer)


def _not_of_the_buffer(record: logging.LogRecord) -> bool:
    return "shuffle buffer" not in record.getMessage()
