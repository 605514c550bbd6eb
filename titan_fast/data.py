"""Batches for training and validation: which data, who reads what, one thread that reads ahead, and the exact state.

Local text is tokenized once into token shards in the run directory (`prepared`), and the state is one global sample
index. Hub streams (`hub`) are tokenized as they come, and each data-parallel rank has its own state.
`python -m titan_fast.data prepare` writes token shards ahead of a run; `show` prints what a step was trained on.
"""

import hashlib
import json
import logging
import random
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from titan_fast.config import Config, Training, grad_accum_steps, is_hub, model_shape, skipped_samples
from titan_fast.corpus import TEXT_SUFFIXES, Corpus, RowLedger, open_corpus, stdlib_corpus
from titan_fast.documents import Separators
from titan_fast.errors import DataError
from titan_fast.loader import Loader, Share, Step
from titan_fast.prepared import FORMAT_VERSION, PreparedTokens, SampleOrder, is_prepared, prepare
from titan_fast.run_directory import TOKENIZER_NAME, is_new
from titan_fast.tokenizer import Tokenizer, check_vocabulary, load_tokenizer, train_sentencepiece

log = logging.getLogger(__name__)

HOLD_OUT_EVERY = 100
"""Documents 0, 100, 200, ... are for validation when no other data is."""
LARGE_HOLD_OUT = 0.05
"""Where more than this part of the tokens is held out, a run says how much it is."""


class TokenSource:
    """Steps out of token shards. A step has the global samples that follow those of the step before, but for those that
    are skipped, dealt out pass by pass, and within a pass rank by rank."""

    def __init__(
        self,
        order: SampleOrder,
        share: Share,
        vocab_size: int,
        name: str,
        held_out: int = 0,
        skipped: Sequence[tuple[int, int]] = (),
    ) -> None:
        """skipped: first and last of samples that no step may have."""
        self._order, self._share, self._vocab_size, self._name = order, share, vocab_size, name
        self._skipped = skipped
        self._next_sample = 0
        self.identity = {
            "kind": "tokens",
            "fingerprint": order.tokens.fingerprint,
            "tokenizer": order.tokens.index["tokenizer"],
            "seq_len": order.seq_len,
            "seed": order.seed,
            "held_out_every": held_out,
        }

    def describe(self) -> str:
        order = self._order
        return (
            f"{self._name}: {len(order.documents):,} documents, {order.tokens_per_epoch:,} tokens; an epoch is "
            f"{order.samples_per_epoch:,} sequences of {order.seq_len} and leaves {order.dropped_tokens} tokens over"
        )

    def next_step(self, stopping: threading.Event) -> Step:
        share = self._share
        first = first_sample(self._next_sample, share.global_batch_size, self._skipped)
        per_pass = share.dp_degree * share.local_batch_size
        starts = [first + turn * per_pass + share.dp_rank * share.local_batch_size for turn in range(share.passes)]
        passes = [self._order.read(start, share.local_batch_size) for start in starts]
        for tokens, labels in passes:
            largest = max(int(tokens.max()), int(labels.max()))
            if largest >= self._vocab_size:
                raise DataError(
                    f"token id {largest} is beyond the model's vocabulary of {self._vocab_size}",
                    "prepare the data again with the run's tokenizer",
                    f"{self._order.tokens.folder}, samples {first} and on",
                )
        self._next_sample = first + share.global_batch_size
        last = self._next_sample - 1
        position = {"epoch": first // self._order.samples_per_epoch, "first_sample": first, "last_sample": last}
        return Step(passes, position, self._next_sample)

    def state(self) -> int:
        return self._next_sample

    def load_state(self, state: Any) -> None:
        self._next_sample = int(state["next_sample"] if isinstance(state, dict) else state)

    def state_to_json(self, state: int) -> dict[str, Any]:
        return {"next_sample": state}


def first_sample(first: int, count: int, skipped: Sequence[tuple[int, int]]) -> int:
    """Where a step of `count` samples begins, that would begin at `first` but for those that are skipped."""
    for begin, end in sorted(skipped):
        if begin < first + count and end >= first:
            first = end + 1
    return first


def check(config: Config) -> None:
    """DataError for local data that is missing or of no known kind, for token shards of another text column, and for a
    tokenizer that is missing or too large. Reads only names, the shards' index and the tokenizer. For the process that
    prepares the data."""
    training, validation = config.training, config.validation
    other = [validation.dataset_path] if validation.enable and validation.dataset_path is not None else []
    paths = ([] if is_hub(training) else [training.dataset_path]) + other
    text = [path for path in paths if path is None or not is_prepared(Path(path))]
    corpora = [local_corpus(training, path) for path in text]
    if not is_hub(training) and is_new(config, Path(config.job.dump_folder)):
        if not text:
            _check_column(training, Path(str(training.dataset_path)))
        elif len(text) == len(paths):
            check_column_is_read(training, corpora)
    if config.model.tokenizer_path:
        check_vocabulary(load_tokenizer(Path(config.model.tokenizer_path)), model_shape(config.model).vocab_size)


def _check_column(training: Training, folder: Path) -> None:
    """DataError where the shards were made of another text column than the one that is asked for."""
    made_of = PreparedTokens(folder).index["source"].get("text_column", training.text_column)
    if training.text_column not in (made_of, Training.text_column):
        raise DataError(
            f"training.text_column is {training.text_column!r}, and the shards were made of {made_of!r}",
            "leave it out, or prepare the data again with it",
            str(folder),
        )


def check_column_is_read(training: Training, corpora: Iterable[Corpus]) -> None:
    """DataError where a text column is asked for, but all of the data is plain text, which has no columns."""
    if training.text_column != Training.text_column and not any(corpus.has_rows for corpus in corpora):
        raise DataError(
            f"training.text_column is {training.text_column!r}, and the data has no columns: "
            f"{', '.join(TEXT_SUFFIXES)} are read as they are",
            "leave it out",
            training.dataset_path or training.dataset,
        )


@dataclass(frozen=True)
class DataRank:
    """The process that asks for data."""

    run_dir: Path
    device: torch.device
    dp_rank: int = 0
    """Which of the `dp_degree` parts of each batch it reads."""
    dp_degree: int = 1
    is_main: bool = True
    """Whether it prepares the data, while the others wait in `barrier`."""
    barrier: Callable[[], None] = lambda: None


def build_tokenizer(config: Config, rank: DataRank) -> Tokenizer:
    """The tokenizer that the config names, or that of the prepared data, or one trained on the corpus and kept in the
    run directory. Until there is a checkpoint, that one is trained again when the corpus changes.

    DataError when there is none, or the model's vocabulary is too small for it. Every rank calls it.
    """
    training, run_dir, vocab_size = config.training, rank.run_dir, model_shape(config.model).vocab_size
    path = Path(config.model.tokenizer_path) if config.model.tokenizer_path else None
    if path is None and training.dataset_path and is_prepared(Path(training.dataset_path)):
        path = Path(training.dataset_path)
    if path is None:
        trained, learned_from = run_dir / TOKENIZER_NAME, run_dir / "data" / "tokenizer_corpus.txt"

        def train() -> str:
            if trained.exists() and not is_new(config, run_dir):
                return str(trained)
            corpus = "" if is_hub(training) else local_corpus(training, training.dataset_path).fingerprint()
            is_stale = learned_from.exists() and learned_from.read_text() != corpus
            if trained.exists() and is_stale:
                log.info("the data is not what %s was trained on, and there is no checkpoint: it is made anew", trained)
            if is_stale or not trained.exists():
                texts = sample_texts(training, config.debug.seed)
                train_sentencepiece(texts, vocab_size, trained, config.debug.seed)
                learned_from.write_text(corpus)
                log.info("trained a sentencepiece tokenizer of %d pieces on the corpus: %s", vocab_size, trained.name)
            return str(trained)

        path = Path(_decided_by_main(rank, "tokenizer", train))
    tokenizer = load_tokenizer(path)
    check_vocabulary(tokenizer, vocab_size)
    return tokenizer


def sample_texts(training: Training, seed: int) -> Iterator[str]:
    """Documents to train a tokenizer on, the files in an order drawn from `seed`."""
    if is_hub(training):
        from titan_fast.hub import first_documents

        return (document.text for document in first_documents(training, seed))
    corpus = local_corpus(training, training.dataset_path)
    files = list(corpus.files)
    random.Random(seed).shuffle(files)
    return (document.text for document in corpus.documents(RowLedger(), files))


def local_corpus(training: Training, dataset_path: str | None) -> Corpus:
    """The documents of a file or folder, or of this Python's standard library."""
    return stdlib_corpus() if dataset_path is None else open_corpus(Path(dataset_path), training.text_column)


def build_loader(config: Config, tokenizer: Tokenizer, rank: DataRank) -> Loader:
    """The training data of this rank; DataError, on every rank, when the data cannot be trained on."""
    training = config.training
    passes = grad_accum_steps(training, rank.dp_degree)
    share = Share(rank.dp_rank, rank.dp_degree, training.local_batch_size, passes)
    if is_hub(training):
        from titan_fast.hub import hub_source

        patience = 0.8 * config.comm.timeout_seconds  # at the whole of it the waiting ranks would see a hang
        source = hub_source(training, tokenizer, share, config.debug.seed, patience)
        return Loader(source, rank.device, _separators(config, tokenizer))
    tokens = _open_tokens(config, training.dataset_path, tokenizer, rank, "training")
    order = training_order(config, tokens)
    name = training.dataset_path or training.dataset
    every = HOLD_OUT_EVERY if _holds_out(config) else 0
    _check_amount(order, share, name, -(-tokens.documents // every) if every else 0)
    if tokens.mixture:
        weights = ", ".join(f"{part['weight']:g}" for part in tokens.mixture)
        name += f" (weights {weights})"
    vocab_size, skipped = model_shape(config.model).vocab_size, skipped_samples(training)
    source = TokenSource(order, share, vocab_size, name, every, skipped)
    return Loader(source, rank.device, _separators(config, tokenizer))


def training_order(config: Config, tokens: PreparedTokens) -> SampleOrder:
    """The samples that are trained on: all documents but those held out for validation, as often as the shards' mixture
    says."""
    documents = np.arange(tokens.documents, dtype=np.uint32 if tokens.documents < 2**32 else np.int64)
    if _holds_out(config):
        documents = np.delete(documents, np.s_[::HOLD_OUT_EVERY])
    return SampleOrder(tokens, tokens.mixed(documents), config.training.seq_len, config.debug.seed)


def build_validation_loader(config: Config, tokenizer: Tokenizer, rank: DataRank) -> Loader | None:
    """The validation data of this rank, without an end, or None when there is none. A step of it has as many sequences
    as one of training, so that the same ones are measured on whatever the ranks and passes."""
    training, validation = config.training, config.validation
    if not validation.enable:
        return None
    if validation.dataset_path is None and is_hub(training):
        if rank.is_main:
            log.info("no validation: a streamed data set has no held-out documents; set validation.dataset_path")
        return None
    passes = grad_accum_steps(training, rank.dp_degree)
    share = Share(rank.dp_rank, rank.dp_degree, training.local_batch_size, passes)
    held_out = _holds_out(config)
    path, name = (training.dataset_path, "training") if held_out else (validation.dataset_path, "validation")
    tokens = _open_tokens(config, path, tokenizer, rank, name, quietly=held_out)
    documents = np.arange(0, tokens.documents, HOLD_OUT_EVERY if held_out else 1)
    order = SampleOrder(tokens, documents, training.seq_len, config.debug.seed)
    if order.samples_per_epoch == 0:
        raise DataError(
            f"the {len(documents)} validation documents have {order.tokens_per_epoch} tokens, fewer than one sequence "
            f"of {training.seq_len} and its label",
            "give validation.dataset_path, more data, or set validation.enable to False",
        )
    measured = validation.steps * share.global_batch_size
    if rank.is_main and measured > order.samples_per_epoch:
        log.warning(
            "WARNING: a validation measures %d sequences, and its text has %d, which therefore count more than once; "
            "lower validation.steps (now %d) or give more text",
            measured,
            order.samples_per_epoch,
            validation.steps,
        )
    part = order.tokens_per_epoch / tokens.tokens
    if held_out and rank.is_main and part > LARGE_HOLD_OUT:
        log.warning(
            "WARNING: %.0f%% of the data is held out for validation: %d of its %d documents, which differ in length; "
            "validation.dataset_path takes other data, validation.enable False trains on all",
            100 * part,
            len(documents),
            tokens.documents,
        )
    name = f"validation ({path or training.dataset})"
    source = TokenSource(order, share, model_shape(config.model).vocab_size, name)
    return Loader(source, rank.device, _separators(config, tokenizer))


def _separators(config: Config, tokenizer: Tokenizer) -> Separators | None:
    return Separators(tokenizer.bos_id, tokenizer.eos_id) if config.training.document_mask else None


def _holds_out(config: Config) -> bool:
    return config.validation.enable and config.validation.dataset_path is None


def _check_amount(order: SampleOrder, share: Share, name: str, held_out: int) -> None:
    if len(order.documents) < share.dp_degree:
        besides = f", besides {held_out} held out for validation," if held_out else ""
        raise DataError(
            f"{len(order.documents)} documents to train on{besides} are fewer than the {share.dp_degree} data-parallel "
            "ranks",
            "give more data, or fewer ranks" + (", or set validation.enable to False" if held_out else ""),
            name,
        )
    if order.samples_per_epoch < share.global_batch_size:
        raise DataError(
            f"{order.tokens_per_epoch} tokens to train on make {order.samples_per_epoch} sequences of {order.seq_len}, "
            f"fewer than the {share.global_batch_size} of one batch",
            "give more data, or a smaller training.seq_len or batch",
            name,
        )


def _open_tokens(
    config: Config, dataset_path: str | None, tokenizer: Tokenizer, rank: DataRank, name: str, quietly: bool = False
) -> PreparedTokens:
    """The shards of a prepared folder or of a corpus, checked against the run's tokenizer and vocabulary.

    `quietly`: they were opened before, so they are neither verified nor reported on again.
    """

    def prepare_once() -> str:
        if dataset_path and is_prepared(Path(dataset_path)):
            tokens = PreparedTokens(Path(dataset_path), verify=not quietly)
        else:
            corpus = local_corpus(config.training, dataset_path)
            tokens = _prepare_in(rank.run_dir, corpus, source, tokenizer, verify=not quietly)
        rows = tokens.index["rows"]
        ledger = RowLedger("", "", rows["read"], rows["passed_over"], rows["mended"], rows["first_place"])
        if not quietly and (summary := ledger.summary()):
            log.warning("%s: %s", source, summary)
        return str(tokens.folder.absolute())

    source, vocab_size = dataset_path or "stdlib", model_shape(config.model).vocab_size
    tokens = PreparedTokens(Path(_decided_by_main(rank, name, prepare_once)), sizes=False)
    _check_tokenizer(tokens, tokenizer)
    if tokens.index["vocab_size"] > vocab_size:
        raise DataError(
            f"the shards have {tokens.index['vocab_size']} ids and the model's vocabulary {vocab_size}",
            "set model.vocab_size to at least that",
            str(tokens.folder),
        )
    return tokens


def _check_tokenizer(tokens: PreparedTokens, tokenizer: Tokenizer) -> None:
    """DataError where the shards hold other tokens than this tokenizer makes."""
    index = tokens.index
    if index["tokenizer"] != tokenizer.fingerprint:
        what = f"sha256 {index['tokenizer'][:12]}..., the run's is {tokenizer.fingerprint[:12]}..."
    elif (index["bos_id"], index["eos_id"]) != (tokenizer.bos_id, tokenizer.eos_id):
        what = (
            f"BOS and EOS {index['bos_id']} and {index['eos_id']}, the run's {tokenizer.bos_id} and {tokenizer.eos_id}"
        )
    else:
        return
    raise DataError(
        f"the shards were made with another tokenizer ({what})",
        "set model.tokenizer_path to theirs, or prepare the data again",
        str(tokens.folder),
    )


def _prepare_in(run_dir: Path, corpus: Corpus, name: str, tokenizer: Tokenizer, verify: bool) -> PreparedTokens:
    """The corpus's shards in the run directory; written unless they are there already, whole and of this tokenizer."""
    key = hashlib.sha256(json.dumps([corpus.fingerprint(), tokenizer.fingerprint, FORMAT_VERSION]).encode())
    folder = run_dir / "data" / key.hexdigest()[:16]
    if folder.exists():
        try:
            tokens = PreparedTokens(folder, verify)
            _check_tokenizer(tokens, tokenizer)
            return tokens
        except DataError as error:
            log.warning("preparing the data again: %s", error)
            shutil.rmtree(folder)
    if corpus.other_files:
        words = "%d files of other kinds, linked folders, run directories or token shards in %s are not read"
        log.info(words, corpus.other_files, corpus.root)
    ledger = RowLedger()
    source = {"name": name, "fingerprint": corpus.fingerprint(), "text_column": corpus.text_column}
    prepare(corpus.documents(ledger), tokenizer, folder, source=source, ledger=ledger)
    return PreparedTokens(folder)


def _decided_by_main(rank: DataRank, name: str, decide: Callable[[], str]) -> str:
    """Calls `decide` on the main rank and returns its result on every rank, through a file. A DataError is raised on
    every rank too."""
    path = rank.run_dir / "data" / f"{name}.json"
    if rank.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            outcome: dict[str, Any] = {"value": decide()}
        except DataError as error:
            outcome = {"error": [error.what, error.fix, error.where]}
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(outcome), encoding="utf-8")
        temporary.replace(path)
    rank.barrier()
    outcome = json.loads(path.read_bytes())
    if "error" in outcome:
        raise DataError(*outcome["error"])
    return outcome["value"]


if __name__ == "__main__":
    from titan_fast.data_command import main

    main()
