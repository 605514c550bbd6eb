"""The order and the state of data, compared with a slow plain implementation, for every split, interrupted anywhere."""

import ast
import dataclasses
import errno
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import runs
import tokenizers
import torch
from datasets.distributed import split_dataset_by_node
from datasets.exceptions import DatasetNotFoundError

from titan_fast import config as configuration
from titan_fast import data, data_command, hub, manifest, prepared
from titan_fast import loader as reading
from titan_fast.config import Config, parse
from titan_fast.corpus import Document, RowLedger, open_corpus
from titan_fast.errors import CheckpointError, ConfigError, DataError
from titan_fast.hub import StreamSource, in_shuffled_files, open_stream
from titan_fast.loader import Loader, Share
from titan_fast.prepared import PreparedTokens, SampleOrder, check_empty, is_prepared, join, prepare
from titan_fast.run_lock import _identity
from titan_fast.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

CPU = torch.device("cpu")
SEQ_LEN = 16


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece([Path(data.__file__).read_text()] * 2, 400, path, seed=0)
    return load_tokenizer(path)


def texts(count: int) -> list[str]:
    """Documents of very different lengths, with their number in every word."""
    return [" ".join(f"d{n}w{word}" for word in range(1 + (n * 7) % 23)) for n in range(count)]


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(230)))
    return path


@pytest.fixture(scope="module")
def shards(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> PreparedTokens:
    folder = tmp_path_factory.mktemp("shards") / "prepared"
    documents = [Document(text, "rows", n) for n, text in enumerate(texts(120))]
    with pytest.MonkeyPatch.context() as patch:  # several shards, several batches
        patch.setattr("titan_fast.prepared.SHARD_TOKENS", 700)
        patch.setattr("titan_fast.prepared._BATCH_DOCUMENTS", 11)
        prepare(documents, tokenizer, folder, source={"name": "test"}, ledger=RowLedger())
    return PreparedTokens(folder, verify=True)


def make_config(corpus: Path | None, *options: str) -> Config:
    words = [
        "--training.seq_len",
        str(SEQ_LEN),
        "--training.local_batch_size",
        "2",
        "--model.vocab_size",
        "400",
        *options,
    ]
    return configuration.parse(words + (["--training.dataset_path", str(corpus)] if corpus else []))


def make_loader(
    config: Config, tokenizer: Tokenizer, run_dir: Path, dp_rank: int = 0, dp_degree: int = 1, build: Any = None
) -> Loader:
    rank = data.DataRank(run_dir, CPU, dp_rank, dp_degree, is_main=dp_rank == 0)
    return (build or data.build_loader)(config, tokenizer, rank)


@pytest.fixture
def make(corpus_file: Path, tokenizer: Tokenizer, tmp_path: Path) -> Iterator[Callable[..., Loader]]:
    """A loader over the corpus file; closed at the end."""
    made: list[Loader] = []

    def build(*options: str, dp_rank: int = 0, dp_degree: int = 1) -> Loader:
        made.append(make_loader(make_config(corpus_file, *options), tokenizer, tmp_path, dp_rank, dp_degree))
        return made[-1]

    yield build
    for loader in made:
        loader.close()


def order_of(loader: Loader) -> SampleOrder:
    source = loader._source
    assert isinstance(source, data.TokenSource)
    return source._order


def rows_of(batches: list) -> list[tuple[int, ...]]:
    """Each sample of a step with its last label: seq_len + 1 tokens."""
    rows = []
    for batch in batches:
        assert batch.tokens.dtype == batch.labels.dtype == torch.int64
        assert batch.tokens.shape == batch.labels.shape
        assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
        rows += [
            (*tokens, label) for tokens, label in zip(batch.tokens.tolist(), batch.labels[:, -1].tolist(), strict=True)
        ]
    return rows


def plain_samples(shards: PreparedTokens, documents: list[int], seq_len: int, seed: int, epoch: int) -> list:
    """The definition of an epoch: the permuted documents are joined and cut every seq_len tokens, and every k-th of
    these windows is taken, where k is the first number from 0.618034 of their count on that reaches all of them."""
    keys = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(len(documents)).tolist()
    joined: list[int] = []
    for _, document in sorted(zip(keys, documents, strict=True)):
        joined += shards.document(document).tolist()
    windows = [tuple(joined[at : at + seq_len + 1]) for at in range(0, len(joined) - seq_len, seq_len)]
    for step in itertools.count(round(0.618034 * len(windows))):
        visited = [(i * step) % len(windows) for i in range(len(windows))]
        if len(set(visited)) == len(windows):
            return [windows[i] for i in visited]
    raise AssertionError("no step reaches every window")


def ours(order: SampleOrder, first: int, count: int) -> list[tuple[int, ...]]:
    tokens, labels = order.read(first, count)
    return [(*row, last) for row, last in zip(tokens.tolist(), labels[:, -1].tolist(), strict=True)]


def test_shards_hold_every_document_once(shards: PreparedTokens, tokenizer: Tokenizer) -> None:
    assert len(shards.index["shards"]) > 3 and shards.documents == 120
    for number, text in enumerate(texts(120)):
        expected = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        assert shards.document(number).tolist() == expected
        assert shards.origin(number) == f"rows:{number}"
    assert shards.tokens == sum(len(shards.document(number)) for number in range(120))
    assert max(shard["tokens"] for shard in shards.index["shards"]) <= 700


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_ids_are_kept_in_two_bytes_where_they_fit(
    vocab_size: int, dtype: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "vocab_size", vocab_size)
    monkeypatch.setattr(tokenizer, "encode_batch", lambda texts: [[vocab_size - 1] for _ in texts])
    prepare([Document("text", "rows", 1)], tokenizer, tmp_path / "prepared", source={"name": "x"}, ledger=RowLedger())
    written = PreparedTokens(tmp_path / "prepared")
    assert written.index["dtype"] == dtype
    assert written.document(0).tolist() == [tokenizer.bos_id, vocab_size - 1, tokenizer.eos_id]


@pytest.mark.parametrize("seq_len", [1, 7, 16, 333])
def test_samples_equal_a_plain_implementation(seq_len: int, shards: PreparedTokens) -> None:
    chosen = [number for number in range(120) if number % 10]
    order = SampleOrder(shards, np.array(chosen), seq_len, seed=5)
    expected = [row for epoch in range(3) for row in plain_samples(shards, chosen, seq_len, 5, epoch)]
    assert order.samples_per_epoch * 3 == len(expected)
    assert ours(order, 0, len(expected)) == expected  # in one go, over two epochs' ends
    another = SampleOrder(shards, np.array(chosen), seq_len, seed=5)
    for index in np.random.default_rng(0).permutation(len(expected))[:200]:  # in any order, one by one
        assert ours(another, int(index), 1) == expected[index : index + 1]


def test_the_disk_is_asked_for_many_documents_before_one_is_waited_for(
    shards: PreparedTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(prepared, "_advise", lambda *words: asked.append(words))
    order = SampleOrder(shards, np.arange(shards.documents), 16, 0)
    tokens, _ = order.read(0, 2)
    pieces = sum(len(list(order.pieces(sample))) for sample in (0, 1))  # one more each where a label begins a document
    number = len(asked) // 2
    assert tokens.shape == (2, 16) and pieces <= number <= pieces + 2
    assert [advice for *_, advice in asked] == [prepared._WILL_NEED] * number + [prepared._POPULATE_READ] * number
    width = np.dtype(shards.index["dtype"]).itemsize
    assert sum(length for _, length, _ in asked[:number]) >= 2 * 17 * width
    assert all(begin % 4096 == 0 for begin, *_ in asked)


def test_an_epoch_loses_and_repeats_nothing_but_the_remainder(shards: PreparedTokens) -> None:
    order = SampleOrder(shards, np.arange(120), SEQ_LEN, seed=1)
    for epoch in range(2):
        first = epoch * order.samples_per_epoch
        windows = [order._place(first + i)[1] for i in range(order.samples_per_epoch)]
        assert sorted(windows) == list(range(order.samples_per_epoch))
        read = dict(zip(windows, ours(order, first, order.samples_per_epoch), strict=True))
        rows = [read[window] for window in range(order.samples_per_epoch)]
        joined = [token for row in rows for token in row[:-1]] + [rows[-1][-1]]
        documents = order._epoch(epoch)[0]
        everything = np.concatenate([shards.document(number) for number in documents]).tolist()
        assert sorted(documents) == list(range(120))
        assert joined == everything[: len(everything) - order.dropped_tokens]
        assert 0 <= order.dropped_tokens < SEQ_LEN


def test_epochs_and_seeds_reshuffle(shards: PreparedTokens) -> None:
    orders = [
        SampleOrder(shards, np.arange(120), SEQ_LEN, seed)._epoch(epoch)[0] for seed in (0, 1) for epoch in (0, 1)
    ]
    assert all(sorted(order) == list(range(120)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert all(not np.array_equal(order, np.arange(120)) for order in orders)


def test_a_saved_position_means_the_same_samples_in_every_version() -> None:
    """A checkpoint has the number of the next sample, and nothing that says in which order. Whoever changes the order
    gives `TokenSource.identity` another key, so that older positions are refused, and then these numbers."""
    lengths = np.array([5, 3, 9, 4, 8, 2, 6])
    tokens: Any = SimpleNamespace(documents=7, lengths=lambda numbers: lengths[numbers])
    order = SampleOrder(tokens, np.arange(7), seq_len=6, seed=42)
    assert order.samples_per_epoch == 6
    assert [list(order.pieces(sample)) for sample in range(8)] == [
        [(0, 0, 5), (1, 0, 1)],
        [(6, 5, 1), (5, 0, 2), (3, 0, 3)],
        [(2, 8, 1), (6, 0, 5)],
        [(2, 2, 6)],
        [(4, 4, 4), (2, 0, 2)],
        [(1, 1, 2), (4, 0, 4)],
        [(3, 0, 4), (4, 0, 2)],
        [(0, 1, 4), (1, 0, 2)],
    ]


def test_the_order_of_an_epoch_takes_twenty_bytes_a_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the ranks of a host holds it, and a trillion tokens are a billion documents."""
    monkeypatch.setattr("titan_fast.prepared._LENGTHS_TOGETHER", 1000)
    count = 200_000
    tokens = SimpleNamespace(documents=count, offsets=np.arange(count + 1) * 5)
    tokens.lengths = lambda numbers: PreparedTokens.lengths(tokens, numbers)  # type: ignore[arg-type]
    tokens.mixed = lambda documents: documents
    config, trained_on = make_config(None), np.flatnonzero(np.arange(count) % data.HOLD_OUT_EVERY)
    tracemalloc.start()
    try:
        order = data.training_order(config, tokens)  # type: ignore[arg-type]
        made, most = (size / count for size in tracemalloc.get_traced_memory())
        assert made < 4.5 and most < 14
        for epoch in (0, 1):
            tracemalloc.reset_peak()
            documents, bounds = order._epoch(epoch)
            assert tracemalloc.get_traced_memory()[1] / count < 4 + 20 + 1
            assert (np.sort(documents) == trained_on).all()
            assert (bounds == np.arange(len(documents) + 1) * 5).all()
            del documents, bounds
    finally:
        tracemalloc.stop()


def test_pieces_say_what_a_sample_is_made_of(shards: PreparedTokens) -> None:
    order = SampleOrder(shards, np.arange(120), SEQ_LEN, seed=2)
    for sample in (0, 1, 17, order.samples_per_epoch - 1, order.samples_per_epoch + 3):
        parts = [shards.document(number)[start : start + count] for number, start, count in order.pieces(sample)]
        assert np.concatenate(parts).tolist() == order.read(sample, 1)[0][0].tolist()


@pytest.mark.parametrize(
    ("dp_degree", "local", "passes"), [(1, 8, 1), (2, 4, 1), (4, 2, 1), (2, 2, 2), (1, 2, 4), (8, 1, 1)]
)
def test_every_split_reads_the_same_global_samples(dp_degree: int, local: int, passes: int, make: Callable) -> None:
    options = ("--training.global_batch_size", "8", "--training.local_batch_size")
    whole = make(*options, "8")
    loaders = [make(*options, str(local), dp_rank=rank, dp_degree=dp_degree) for rank in range(dp_degree)]
    for step in range(12):
        expected = rows_of(next(whole))
        steps = [next(loader) for loader in loaders]
        assert all(len(step) == passes for step in steps)
        by_pass = [row for turn in range(passes) for step in steps for row in rows_of(step[turn : turn + 1])]
        assert by_pass == expected
        for loader in loaders:
            assert loader.position() == whole.position()
            assert loader.state_dict() == whole.state_dict()
        assert whole.position()["first_sample"] == 8 * step
        assert whole.position()["last_sample"] == 8 * step + 7


def test_resumed_anywhere_equals_uninterrupted(make: Callable) -> None:
    whole = make()
    per_epoch = order_of(whole).samples_per_epoch
    steps, epochs = [], []
    for _ in range(per_epoch + 4):  # two samples each: past two epochs' ends
        steps.append(rows_of(next(whole)))
        epochs.append(whole.position()["epoch"])
    assert epochs == [2 * step // per_epoch for step in range(len(steps))] and epochs[-1] == 2  # of the first sample
    at_the_end = per_epoch // 2 if per_epoch % 2 == 0 else per_epoch
    for first_stop, second_stop in ((0, 0), (1, 2), (3, 11), (at_the_end, at_the_end + 1), (at_the_end - 1, per_epoch)):
        got: list = []
        state = None
        for stop in (first_stop, second_stop, len(steps)):
            loader = make()
            if state is not None:
                loader.load_state_dict(json.loads(json.dumps(state)))
            got += [rows_of(next(loader)) for _ in range(stop - len(got))]
            state = loader.state_dict()
            loader.close()
            assert loader.state_dict() == state
        assert got == steps


def test_resumed_on_another_degree_goes_on_with_the_same_samples(make: Callable) -> None:
    options = ("--training.global_batch_size", "4", "--training.local_batch_size")
    whole = make(*options, "4")
    expected = [rows_of(next(whole)) for _ in range(9)]
    got, state = [], None
    for dp_degree, local in ((2, 2), (4, 1), (1, 2)):
        loaders = [make(*options, str(local), dp_rank=rank, dp_degree=dp_degree) for rank in range(dp_degree)]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(state)
        for _ in range(3):
            steps = [next(loader) for loader in loaders]
            turns = range(len(steps[0]))
            got.append([row for turn in turns for step in steps for row in rows_of(step[turn : turn + 1])])
        state = loaders[-1].state_dict()
    assert got == expected


def test_a_state_of_other_data_is_refused(make: Callable) -> None:
    state = make().state_dict()
    for options, name in (
        (("--debug.seed", "1"), "seed was 0 and is 1"),
        (("--training.seq_len", "8"), "seq_len was 16 and is 8"),
        (("--validation.enable", "False"), "held_out_every was 100 and is 0"),
    ):
        with pytest.raises(CheckpointError, match=name):
            make(*options).load_state_dict(state)
    with pytest.raises(CheckpointError, match="fingerprint was 'x' and is"):
        make().load_state_dict({**state, "fingerprint": "x"})
    with pytest.raises(CheckpointError, match="kind was 'stream' and is 'tokens'"):
        make().load_state_dict({**state, "kind": "stream"})
    with pytest.raises(CheckpointError, match="seed was None and is 0"):
        make().load_state_dict({})


def test_validation_is_every_hundredth_document_and_never_trained_on(
    corpus_file: Path, tokenizer: Tokenizer, make: Callable, tmp_path: Path
) -> None:
    training = make()
    tokens = order_of(training).tokens
    held = {0, 100, 200}
    assert set(order_of(training).documents.tolist()) == set(range(230)) - held
    config = make_config(corpus_file)
    validation = make_loader(config, tokenizer, tmp_path, build=data.build_validation_loader)
    assert set(order_of(validation).documents.tolist()) == held
    first = [rows_of(next(validation)) for _ in range(9)]
    validation.reset()
    assert validation.position() == {}
    assert [rows_of(next(validation)) for _ in range(9)] == first
    assert validation.position()["epoch"] > 0  # three documents: it has come round
    chosen = order_of(validation)
    assert ours(chosen, 0, 2) == first[0]
    assert plain_samples(tokens, sorted(held), SEQ_LEN, 0, 0)[:2] == first[0]
    validation.close()


def test_ranks_share_the_validation_batches_out(corpus_file: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    def build(local: int, dp_rank: int, dp_degree: int) -> Loader:
        batch = ["--training.local_batch_size", str(local), "--training.global_batch_size", "4"]
        config = make_config(corpus_file, *batch)
        return make_loader(config, tokenizer, tmp_path, dp_rank, dp_degree, data.build_validation_loader)

    whole, accumulating, *ranks = loaders = [build(4, 0, 1), build(1, 0, 1), build(2, 0, 2), build(2, 1, 2)]
    for _ in range(5):
        rows = rows_of(next(whole))
        assert rows == rows_of(next(accumulating)), "whatever the passes"
        assert rows == [row for rank in ranks for row in rows_of(next(rank))]
    for loader in loaders:
        loader.close()


def test_validation_on_its_own_path_or_none(corpus_file: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "words of validation " * 30}) + "\n")
    config = make_config(corpus_file, "--validation.dataset_path", str(other))
    loader = make_loader(config, tokenizer, tmp_path)
    assert len(order_of(loader).documents) == 230
    validation = make_loader(config, tokenizer, tmp_path, build=data.build_validation_loader)
    assert "words of validation" in tokenizer.decode(next(validation)[0].tokens[0].tolist())
    validation.close()
    config = make_config(corpus_file, "--validation.enable", "False")
    assert make_loader(config, tokenizer, tmp_path, build=data.build_validation_loader) is None
    assert len(order_of(make_loader(config, tokenizer, tmp_path)).documents) == 230


def test_the_default_run_reads_the_standard_library(tmp_path: Path) -> None:
    config = configuration.parse([])
    rank = data.DataRank(tmp_path, CPU)
    tokenizer = data.build_tokenizer(config, rank)
    again = data.build_tokenizer(config, dataclasses.replace(rank, is_main=False))
    assert tokenizer.fingerprint == again.fingerprint and tokenizer.vocab_size == 4096
    loader = data.build_loader(config, tokenizer, rank)
    assert order_of(loader).tokens_per_epoch > 1_000_000
    assert "stdlib: " in loader.describe()
    folders = sorted((tmp_path / "data").glob("*/index.json"))
    written = folders[0].stat().st_mtime_ns
    data.build_loader(config, tokenizer, rank)
    assert len(folders) == 1
    assert folders[0].stat().st_mtime_ns == written  # it was not prepared twice
    text = "".join(tokenizer.decode(row) for _ in range(10) for row in next(loader)[0].tokens.tolist())
    loader.close()
    assert all(word in text for word in ("def ", "self.", "return ", "import "))


def test_the_tokenizer_is_trained_again_on_more_data_until_there_is_a_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corpus, run = tmp_path / "corpus", tmp_path / "run"
    corpus.mkdir()
    (corpus / "a.txt").write_text(Path(data.__file__).read_text())
    config = make_config(corpus)

    def fingerprint(run_dir: Path = run) -> str:
        return data.build_tokenizer(config, data.DataRank(run_dir, CPU)).fingerprint

    with caplog.at_level("INFO"):
        first = fingerprint()
        assert fingerprint() == first and "made anew" not in caplog.text
        (corpus / "b.txt").write_text(Path(__file__).read_text())
        second = fingerprint()
        assert second != first and second == fingerprint(tmp_path / "fresh")
        assert "the data is not what" in caplog.text
    (run / "checkpoint" / "step-5").mkdir(parents=True)
    (corpus / "c.txt").write_text(Path(configuration.__file__).read_text())
    assert fingerprint() == second


def test_changed_and_damaged_data_is_prepared_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(50)))
    config = make_config(path)
    before = make_loader(config, tokenizer, tmp_path)
    (shard,) = (tmp_path / "data").glob("*/tokens-00000.bin")
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(bytes(content))
    after = make_loader(config, tokenizer, tmp_path)
    assert after.state_dict() == before.state_dict()
    assert shard.read_bytes() != bytes(content)
    with path.open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    with pytest.raises(CheckpointError, match="fingerprint was"):
        make_loader(config, tokenizer, tmp_path).load_state_dict(before.state_dict())


def test_prepared_shards_are_used_as_they_are(shards: PreparedTokens, tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = make_config(shards.folder)
    own = data.build_tokenizer(config, data.DataRank(tmp_path, CPU))
    assert own.fingerprint == tokenizer.fingerprint
    loader = make_loader(config, own, tmp_path)
    assert len(order_of(loader).documents) == 118
    assert rows_of(next(loader)) == plain_samples(shards, [n for n in range(120) if n % 100], SEQ_LEN, 0, 0)[:2]
    loader.close()
    assert not list((tmp_path / "data").glob("*/tokens-*"))


def test_another_text_column_than_the_shards_were_made_of_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder, source = tmp_path / "prepared", {"name": "x", "text_column": "body"}
    prepare([Document("text", "rows", 1)], tokenizer, folder, source=source, ledger=RowLedger())
    more = ("--job.dump_folder", str(tmp_path / "run"), "--training.text_column")
    data.check(make_config(folder, *more, "text"))  # as by default
    data.check(make_config(folder, *more, "body"))
    with pytest.raises(DataError, match=r"training\.text_column is 'words', and the shards were made of 'body'"):
        data.check(make_config(folder, *more, "words"))
    (tmp_path / "rows.txt").write_text("validation text")
    data.check(make_config(folder, *more, "words", "--validation.dataset_path", str(tmp_path / "rows.txt")))


def test_a_text_column_for_texts_is_refused(tmp_path: Path) -> None:
    texts, rows = tmp_path / "texts.txt", tmp_path / "rows.jsonl"
    texts.write_text("some text")
    rows.write_text('{"body": "text"}\n')
    more = ("--job.dump_folder", str(tmp_path / "run"), "--training.text_column", "body")
    data.check(make_config(rows, *more))
    data.check(make_config(texts, *more, "--validation.dataset_path", str(rows)))
    message = r"training\.text_column is 'body', and the data has no columns: \.txt.* \[.*\]; leave it out"
    with pytest.raises(DataError, match=message):
        data.check(make_config(texts, *more))
    with pytest.raises(DataError, match=message):
        data_command.prepare_folder(make_config(texts, *more), tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


def test_shards_that_do_not_fit_are_refused(shards: PreparedTokens, tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = tmp_path / "other.model"
    train_sentencepiece([Path(data.__file__).read_text()], 390, other, seed=0)
    with pytest.raises(DataError, match="made with another tokenizer"):
        make_loader(make_config(shards.folder), load_tokenizer(other), tmp_path)
    with pytest.raises(DataError, match="400 ids and the model's vocabulary 399"):
        make_loader(make_config(shards.folder, "--model.vocab_size", "399"), tokenizer, tmp_path)


@pytest.fixture
def stopping_at(tmp_path: Path) -> Callable[[str], Tokenizer]:
    """The same tokenizer.json, with a tokenizer_config.json that names this end of text."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.train_from_iterator(
        texts(9), tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens(["<stop>", "<turn>"])

    def load(end: str) -> Tokenizer:
        folder = tmp_path / f"ends in {end}"
        folder.mkdir(exist_ok=True)
        made.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
        return load_tokenizer(folder)

    return load


def test_shards_of_another_end_are_refused_or_made_again(
    stopping_at: Callable, corpus_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The end of text is named beside a tokenizer.json, whose own content is the same."""
    first, second = stopping_at("<stop>"), stopping_at("<turn>")
    assert first.fingerprint == second.fingerprint and first.eos_id != second.eos_id
    prepared = tmp_path / "prepared"
    prepare([Document(t, "rows", 1) for t in texts(40)], first, prepared, source={}, ledger=RowLedger())
    make_loader(make_config(prepared), first, tmp_path / "run")
    with pytest.raises(
        DataError, match=rf"another tokenizer \(BOS and EOS None and {first.eos_id}, the run's None and "
    ):
        make_loader(make_config(prepared), second, tmp_path / "run")
    config = make_config(corpus_file)
    state = make_loader(config, first, tmp_path / "run").state_dict()
    again = make_loader(config, second, tmp_path / "run")
    assert "preparing the data again: the shards were made with another tokenizer" in caplog.text
    assert order_of(again).tokens.document(1)[-1] == second.eos_id
    with pytest.raises(CheckpointError, match="fingerprint was"):
        again.load_state_dict(state)


def test_a_stream_of_another_end_is_refused(stopping_at: Callable, stream_files: list[str]) -> None:
    share = Share(0, 1, 2, 1)
    dataset = open_files(stream_files)
    saved, other = (
        Loader(StreamSource(dataset, "test", "text", stopping_at(end), share, SEQ_LEN, 3), CPU)
        for end in ("<stop>", "<turn>")
    )
    state = saved.state_dict()
    with pytest.raises(CheckpointError, match="bos_and_eos was"):
        other.load_state_dict(state)
    older = {key: value for key, value in state.items() if key != "bos_and_eos"}
    saved.load_state_dict(older)


@pytest.mark.parametrize("name", ["tokens-00001.bin", "offsets.bin", "tokenizer.model"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_shards_are_named(name: str, damage: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "prepared"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("titan_fast.prepared.SHARD_TOKENS", 300)
        prepare([Document(t, "rows", 1) for t in texts(40)], tokenizer, folder, source={}, ledger=RowLedger())
    path = folder / name
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        content[len(content) // 2] ^= 16
        path.write_bytes(bytes(content[:-1] if damage == "truncate" else content))
    said = {"flip": "has changed", "truncate": "bytes, not", "remove": "is missing"}[damage]
    with pytest.raises(DataError, match=said) as caught:
        make_loader(make_config(folder), tokenizer, tmp_path)
    assert name in str(caught.value)


def parts_of(documents: list[Document], cuts: list[int], tokenizer: Tokenizer, folder: Path) -> list[Path]:
    """Token shards of the documents between `cuts`, in folders of their own; each has skipped an empty row."""
    paths = []
    for number, (begin, end) in enumerate(itertools.pairwise(cuts)):
        ledger = RowLedger(rows=end - begin + 1)
        ledger.pass_over("empty", f"{documents[begin].file}:{begin}")
        paths.append(folder / f"part-{number}")
        prepare(documents[begin:end], tokenizer, paths[-1], source={"name": str(number)}, ledger=ledger)
    return paths


def test_joined_parts_are_what_one_preparation_of_all_is(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("titan_fast.prepared.SHARD_TOKENS", 700)
    monkeypatch.setattr("titan_fast.prepared._LENGTHS_TOGETHER", 7)
    documents = [Document(text, f"file{n // 30}", n) for n, text in enumerate(texts(120))]
    (whole,) = parts_of(documents, [0, 120], tokenizer, tmp_path / "whole")
    parts = parts_of(documents, [0, 50, 51, 120], tokenizer, tmp_path / "parts")
    words = ["titan_fast.data", "join", *map(str, parts), "--out", str(tmp_path / "joined")]
    monkeypatch.setattr(sys, "argv", words)
    data_command.main()
    assert "120 documents" in capsys.readouterr().out
    shards = sorted((tmp_path / "joined").glob("tokens-*.bin"))
    assert len(shards) > 3 and all(path.stat().st_nlink == 2 for path in shards)  # they take no room
    shutil.rmtree(tmp_path / "parts")

    once, joined = PreparedTokens(whole), PreparedTokens(tmp_path / "joined", verify=True)
    numbers = np.arange(120)
    for one, other in zip(once.read_documents(numbers), joined.read_documents(numbers), strict=True):
        assert one.tolist() == other.tolist()
    sources = [0] * 50 + [1] + [2] * 69
    assert [joined.origin(n) for n in range(120)] == [f"{sources[n]}/{once.origin(n)}" for n in range(120)]
    again = join([tmp_path / "joined"], tmp_path / "again")
    assert again["files"] == joined.index["files"], "whose source has been said"
    for name in ("documents", "tokens", "dtype", "vocab_size", "bos_id", "eos_id", "tokenizer"):
        assert joined.index[name] == once.index[name]
    assert joined.index["rows"] == {
        "read": 123, "passed_over": {"empty": 3}, "mended": {}, "first_place": {"empty": "file0:0"}
    }  # fmt: skip
    assert load_tokenizer(tmp_path / "joined").fingerprint == tokenizer.fingerprint
    config = make_config(tmp_path / "joined")
    rows = [rows_of(next(make_loader(config, tokenizer, tmp_path / "run", rank, 2))) for rank in range(2)]
    expected = plain_samples(once, [n for n in range(120) if n % 100], SEQ_LEN, 0, 0)
    assert rows == [expected[:2], expected[2:4]]


def test_an_epoch_has_each_parts_documents_as_often_as_its_weight_says(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [Document(text, "rows", n) for n, text in enumerate(texts(250))]
    parts = parts_of(documents, [0, 100, 200, 250], tokenizer, tmp_path)
    words = ["titan_fast.data", "join", *map(str, parts), "--out", str(tmp_path / "mixed"), "--weights", "2.25,0.5,1"]
    monkeypatch.setattr(sys, "argv", words)
    data_command.main()
    tokens = PreparedTokens(tmp_path / "mixed")
    config = make_config(tmp_path / "mixed")
    order = data.training_order(config, tokens)
    often = np.bincount(order.documents, minlength=250)
    assert not often[[0, 100, 200]].any(), "held out for validation"
    assert set(often[1:100]) == {2, 3} and often[:100].sum() == 2 * 99 + 25
    assert set(often[101:200]) == {0, 1} and often[100:200].sum() == 50  # 49.5
    assert (often[201:] == 1).all()
    assert np.array_equal(np.bincount(order._epoch(1)[0], minlength=250), often), "the same ones in every epoch"
    # Over an epoch each copy is trained on once, with all its tokens.
    seen = Counter[int]()
    for sample in range(order.samples_per_epoch):
        for document, _, count in order.pieces(sample):
            seen[document] += count
    lengths = tokens.lengths(np.arange(250))
    missed = often * lengths - np.array([seen[n] for n in range(250)])
    assert (missed >= 0).all() and missed.sum() == order.dropped_tokens + 1 <= SEQ_LEN + 1
    assert tokens.fingerprint != PreparedTokens(_joined(parts, tmp_path / "plain")).fingerprint
    assert "(weights 2.25, 0.5, 1): 322 documents" in make_loader(config, tokenizer, tmp_path / "run").describe()
    again = join(
        [tmp_path / "mixed", parts_of(documents, [0, 30], tokenizer, tmp_path / "more")[0]], tmp_path / "a", [2, 3]
    )
    assert [(own["documents"], own["weight"]) for own in again["mixture"]] == [(100, 4.5), (100, 1), (50, 2), (30, 3)]
    with pytest.raises(
        ConfigError, match="2250 is the weight of a part of a part; give weights with which it is at most"
    ):
        join([tmp_path / "mixed"], tmp_path / "none", [1000])
    nan = float("nan")
    for weights, message in (([1.0], "1 weights for 3 parts"), ([1, 0, 1], "a weight is 0"), ([1, nan, 1], "nan")):
        with pytest.raises(ConfigError, match=message):
            join(parts, tmp_path / "none", weights)


def _joined(parts: list[Path], folder: Path) -> Path:
    join(parts, folder)
    return folder


def test_parts_that_do_not_belong_together_are_not_joined(tokenizer: Tokenizer, tmp_path: Path) -> None:
    documents = [Document(text, "rows", n) for n, text in enumerate(texts(20))]
    first, second = parts_of(documents, [0, 10, 20], tokenizer, tmp_path)
    train_sentencepiece([Path(data.__file__).read_text()], 390, tmp_path / "other.model", seed=0)
    (other,) = parts_of(documents, [0, 20], load_tokenizer(tmp_path / "other.model"), tmp_path / "other")
    out = tmp_path / "out"
    for parts, message in (
        (
            [first, other],
            r"vocab_size is 400 in \S*part-0 and 390 here .*part-0\]; prepare all parts with one tokenizer",
        ),
        ([first, second, first], "part-0 has the same documents"),
        ([first, tmp_path], "holds no token shards|index.json"),
    ):
        with pytest.raises(DataError, match=message):
            join(parts, out)
    next(second.glob("tokens-*.bin")).write_bytes(b"")
    with pytest.raises(DataError, match="has 0 bytes"):
        join([first, second], out)
    assert not out.exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "of the format titan_fast tokens 2, not titan_fast tokens 1"),
        ({"sizes": None}, "damaged: sizes is 'None'"),
        ({"documents": "20"}, "damaged: documents is '20'"),
        ({"dtype": "float64"}, "damaged: dtype is 'float64'"),
        ({"rows": {}}, "damaged: rows has no read"),
        ({"shards": [{"name": "tokens-00000.bin"}]}, "damaged: a shard is"),
        ({"sizes": {}}, "damaged: it has no size or no sha256 of offsets.bin"),
        ({"mixture": [{"documents": 19, "weight": 1}]}, "damaged: mixture is"),
        ({"mixture": [20]}, "damaged: mixture is"),
        ({"mixture": [{"documents": 25, "weight": 1}, {"documents": -5, "weight": 1}]}, "damaged: mixture is"),
        ({"mixture": [{"documents": 20, "weight": math.inf}]}, "damaged: mixture is"),
        ({"mixture": [{"documents": 20, "weight": 1e9}]}, "damaged: mixture is"),
        ({"eos_id": None}, "damaged: eos_id is 'None'"),
        ({"bos_id": "1"}, "damaged: it has no bos_id"),
        ({"documents": 10**12}, r"damaged: offsets.bin has 168 bytes, and what it holds 8000000000008 \[\S*part-0\]"),
        ({"documents": 19}, "damaged: offsets.bin has 168 bytes, and what it holds 160"),
        ({"documents": 0}, "damaged: it has 0 documents in 1 shards"),
        ({"documents": -1}, "damaged: it has -1 documents in 1 shards"),
        ({"shards": []}, "damaged: it has 20 documents in 0 shards"),
        ({"shards": [{"name": "tokens-00000.bin", "tokens": 0}]}, "in 1 shards, the smallest of 0"),
        (
            {"shards": [{"name": "tokens-00000.bin", "tokens": 10**30}]},
            r"damaged: it has \d+ tokens, and its shards 1000",
        ),
        (
            {"shards": [{"name": "tokens-00000.bin", "tokens": 10**12}], "tokens": 10**12},
            r"damaged: tokens-00000.bin has \d+ bytes, and what it holds 2000000000000",
        ),
    ],
)
def test_a_damaged_index_is_a_sentence(
    changes: dict[str, Any], message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (part,) = parts_of([Document(text, "rows", n) for n, text in enumerate(texts(20))], [0, 20], tokenizer, tmp_path)
    index = json.loads((part / "index.json").read_text())
    PreparedTokens(part)
    (part / "index.json").write_text(json.dumps(index | changes))
    with pytest.raises(DataError, match=message):
        PreparedTokens(part)


OFFSETS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none are the first document's": lambda offsets: offsets + 1,
    "they end beyond the shards": lambda offsets: offsets * 100,
    "they are negative": lambda offsets: -offsets,
    "they are shuffled": lambda offsets: np.concatenate([offsets[:1], offsets[-2:0:-1], offsets[-1:]]),
    "one is negative": lambda offsets: np.where(np.arange(len(offsets)) == 5, -3, offsets),
    "one is the least": lambda offsets: np.where(np.arange(len(offsets)) == 5, -(2**63), offsets),
    "one is beyond the shards": lambda offsets: np.where(np.arange(len(offsets)) == 5, 2**50, offsets),
}


@pytest.mark.parametrize("name", OFFSETS)
def test_offsets_that_are_none_are_a_sentence(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Where they are read: by training, before room is made for an epoch."""
    (part,) = parts_of([Document(text, "rows", n) for n, text in enumerate(texts(20))], [0, 20], tokenizer, tmp_path)
    path = part / "offsets.bin"
    OFFSETS[name](np.fromfile(path, "<i8")).astype("<i8").tofile(path)
    with pytest.raises(DataError, match=r"offsets.bin is damaged: documents do not begin .* \[\S*part-0\]; prepare"):
        data.training_order(make_config(part), PreparedTokens(part))


def test_a_document_that_would_lie_in_two_shards_is_a_sentence(many_shards: Path) -> None:
    path = many_shards / "offsets.bin"
    offsets = np.fromfile(path, "<i8")
    first = PreparedTokens(many_shards).index["shards"][0]["tokens"]
    offsets[offsets == first] += 1
    offsets.astype("<i8").tofile(path)
    with pytest.raises(DataError, match=r"offsets\.bin is damaged"):
        list(PreparedTokens(many_shards).read_documents(np.arange(200)))


@pytest.mark.parametrize("where", ["sizes", "shards"])
@pytest.mark.parametrize("name", ["../x", "/abs", "a/b", "..", "", "index.json"])
def test_an_index_names_no_file_outside_its_folder(name: str, where: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Joining would write to it, or make it a part of what is joined."""
    (part,) = parts_of([Document("text", "rows", 1)], [0, 1], tokenizer, tmp_path / "parts")
    index = json.loads((part / "index.json").read_text())
    index["sizes"][name], index["sha256"][name] = 0, "0" * 64
    if where == "shards":
        index["shards"].append({"name": name, "tokens": 0})
    (part / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=rf"index.json is damaged: it names the file {name!r} \[\S*part-0\]; prepare"):
        join([part], tmp_path / "joined")


def test_what_is_copied_is_written_into_no_other_part(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A file of the first part that has the name of what will be a link to the second's shard."""
    documents = [Document(text, "rows", n) for n, text in enumerate(texts(20))]
    first, second = parts_of(documents, [0, 10, 20], tokenizer, tmp_path)
    index = json.loads((first / "index.json").read_text())
    (first / "tokens-00001.bin").write_bytes(b"other")
    index["sizes"]["tokens-00001.bin"], index["sha256"]["tokens-00001.bin"] = 5, "0" * 64
    (first / "index.json").write_text(json.dumps(index))
    join([first, second], tmp_path / "joined")
    PreparedTokens(second, verify=True)
    assert PreparedTokens(tmp_path / "joined", verify=True).documents == 20


@pytest.mark.parametrize("content", ["", "[]", "{}", "[" * 100_000])
def test_what_is_no_index_is_a_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(content)
    assert not is_prepared(tmp_path)
    with pytest.raises(DataError, match=r"holds no token shards|of the format None"):
        PreparedTokens(tmp_path)


def test_parts_of_different_columns_have_none_in_common(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folders = []
    for column in ("a", "b"):
        folders.append(tmp_path / column)
        document = Document(f"text of {column}", "rows", 1)
        prepare([document], tokenizer, folders[-1], source={"name": column, "text_column": column}, ledger=RowLedger())
    assert "text_column" not in join(folders, tmp_path / "both")["source"]
    assert join(folders[:1], tmp_path / "one")["source"]["text_column"] == "a"


def test_a_file_system_that_cannot_map_files_is_named(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (part,) = parts_of([Document(text, "rows", n) for n, text in enumerate(texts(20))], [0, 20], tokenizer, tmp_path)

    def memmap(*words: object, **more: object) -> None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(np, "memmap", memmap)
    for use in (lambda: PreparedTokens(part).document(3), lambda: join([part], tmp_path / "joined")):
        with pytest.raises(DataError, match=r"cannot map files into memory \[\S*part-0\]; copy the folder"):
            use()
    assert not (tmp_path / "joined").exists()


@pytest.fixture
def many_shards(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A folder of more shards than a process has open."""
    folder = tmp_path / "prepared"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("titan_fast.prepared.SHARD_TOKENS", 50)
        prepare([Document(t, "rows", 1) for t in texts(200)], tokenizer, folder, source={}, ledger=RowLedger())
    return folder


def test_a_process_has_few_shards_open_at_a_time(many_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a file descriptor, and 15T tokens are 55,000 shards."""
    monkeypatch.setattr("resource.getrlimit", lambda which: (16, 16))
    before = len(list(Path("/proc/self/fd").iterdir()))
    tokens = PreparedTokens(many_shards)
    assert len(tokens.index["shards"]) > 40
    for _ in range(2):
        read = [len(document) for document in tokens.read_documents(np.arange(200))]
    assert read == tokens.lengths(np.arange(200)).tolist()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1 + 4 + 2


def test_one_rank_looks_at_every_shard_and_the_others_at_their_names(
    many_shards: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    true_stat = Path.stat

    def stat(self: Path, **options: Any) -> os.stat_result:
        looked.append(self.name)
        return true_stat(self, **options)

    monkeypatch.setattr(Path, "stat", stat)
    make_loader(make_config(many_shards), tokenizer, tmp_path, dp_rank=0, dp_degree=2)
    names = {path.name for path in many_shards.glob("tokens-*.bin")}
    assert len(names) > 40 and names <= set(looked)
    looked.clear()
    make_loader(make_config(many_shards), tokenizer, tmp_path, dp_rank=1, dp_degree=2)
    assert not names.intersection(looked)
    (many_shards / min(names)).unlink()
    with pytest.raises(DataError, match="is missing"):
        make_loader(make_config(many_shards), tokenizer, tmp_path, dp_rank=1, dp_degree=2)


def test_a_shard_that_is_cut_off_on_one_host_is_seen_when_it_is_read(many_shards: Path) -> None:
    tokens = PreparedTokens(many_shards, sizes=False)
    with (many_shards / "tokens-00001.bin").open("ab") as file:
        file.truncate(10)
    with pytest.raises(DataError, match="has 10 bytes"):
        list(tokens.read_documents(np.arange(200)))


def test_nothing_half_written_is_left(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def interrupted() -> Iterator[Document]:
        yield Document("text", "rows", 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(interrupted(), tokenizer, tmp_path / "prepared", source={"name": "x"}, ledger=RowLedger())
    with pytest.raises(DataError, match="has no document"):
        prepare([], tokenizer, tmp_path / "prepared", source={"name": "x"}, ledger=RowLedger())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("keep")
    with pytest.raises(DataError, match="is not empty"):
        prepare([Document("x", "y", 1)], tokenizer, tmp_path / "mine", source={"name": "x"}, ledger=RowLedger())
    with pytest.raises(DataError, match="is a file"):
        prepare(
            [Document("x", "y", 1)], tokenizer, tmp_path / "mine" / "file", source={"name": "x"}, ledger=RowLedger()
        )
    with pytest.raises(DataError, match=r"cannot be written: .*mine/file is a file"):
        check_empty(tmp_path / "mine" / "file" / "prepared")
    assert (tmp_path / "mine" / "file").read_text() == "keep"
    check_empty(tmp_path / "saves" / "step-5")
    (tmp_path / "saves" / "step-4").mkdir(parents=True)
    (tmp_path / "saves" / "step-4" / manifest.NAME).touch()
    with pytest.raises(DataError, match="has the name of a checkpoint"):
        check_empty(tmp_path / "saves" / "step-5")


def test_one_process_at_a_time_writes_a_folder_and_what_a_killed_one_left_is_removed(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder, refusals = tmp_path / "prepared", []

    def write(documents: Iterator[Document]) -> None:
        prepare(documents, tokenizer, folder, source={"name": "x"}, ledger=RowLedger())

    def while_another_begins() -> Iterator[Document]:
        yield Document("first", "rows", 1)
        with pytest.raises(ConfigError) as caught:
            write(iter([Document("other", "rows", 1)]))
        refusals.append(str(caught.value))
        yield Document("second", "rows", 2)

    left = tmp_path / ".prepared.tmp"
    (left / "shards").mkdir(parents=True)
    (left / "shards" / "tokens-00007.bin").write_text("of one that was killed")
    dead = _identity() | {"pid": 2**22 + 1, "token": "dead"}
    (left / "run.lock").write_text(json.dumps(dead))
    write(while_another_begins())
    (refusal,) = refusals
    assert f"another run is using the folder for the token shards: process {os.getpid()} on" in refusal
    assert PreparedTokens(folder, verify=True).documents == 2
    assert sorted(path.name for path in folder.iterdir()) == sorted([
        "index.json", "offsets.bin", "origins.bin", "tokenizer.model", "tokens-00000.bin",
    ])  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["prepared"]


def test_too_little_data_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"

    def refuse(rows: list[str], message: str, *options: str, dp_degree: int = 1, build: Any = None) -> None:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
        with pytest.raises(DataError, match=message):
            make_loader(make_config(path, *options), tokenizer, tmp_path, dp_degree=dp_degree, build=build)

    refuse([], "has no document")
    refuse([" "] * 3, r"most rows cannot be used: 3 of 3 .* 3 empty")
    few = (
        "3 documents to train on, besides 1 held out for validation, are fewer than the 4 .*validation.enable to False"
    )
    refuse(["word " * 500] * 4, few, dp_degree=4)
    refuse(
        ["word " * 8] * 5,
        r"tokens to train on make \d sequences of 16, fewer than the 20",
        *("--training.local_batch_size", "20"),
    )
    refuse(["alone " * 500], "0 documents to train on, besides 1 held out for validation, are fewer than the 1")
    refuse(["a"] + ["word " * 500] * 4, "1 validation documents have 3 tokens", build=data.build_validation_loader)
    with pytest.raises(DataError, match="no such file"):
        make_loader(make_config(tmp_path / "nowhere"), tokenizer, tmp_path)


@pytest.mark.parametrize(("first", "said"), [(1000, True), (10, False)])
def test_a_large_hold_out_is_said(
    first: int, said: bool, tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With few documents, the first may be a large part of all."""
    rows = [{"text": "word " * words} for words in [first] + [500] * 9]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    make_loader(make_config(tmp_path / "rows.jsonl"), tokenizer, tmp_path, build=data.build_validation_loader).close()
    found = [r.getMessage() for r in caplog.records if "held out" in r.getMessage()]
    assert len(found) == said
    if said:
        assert re.match("WARNING: 18% of the data is held out for validation: 1 of its 10 documents", found[0])


def test_validation_text_that_counts_more_than_once_is_said(
    corpus_file: Path, tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def warnings(steps: int, dp_rank: int = 0) -> tuple[int, list[str]]:
        caplog.clear()
        options = ["--training.local_batch_size", "1", "--validation.steps", str(steps)]
        config = make_config(corpus_file, *options)
        loader = make_loader(config, tokenizer, tmp_path, dp_rank, 2, build=data.build_validation_loader)
        return order_of(loader).samples_per_epoch, [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]

    sequences, _ = warnings(1)
    assert sequences > 2 and warnings(sequences // 2)[1] == []
    (line,) = warnings(sequences // 2 + 1)[1]
    assert line.startswith(f"WARNING: a validation measures {2 * (sequences // 2 + 1)} sequences, and its text has")
    assert warnings(sequences // 2 + 1, dp_rank=1)[1] == [], "once is enough"


def test_an_error_of_the_main_rank_is_every_ranks(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = make_config(tmp_path / "nowhere")
    for rank in (0, 1):
        with pytest.raises(DataError, match="no such file or folder"):
            make_loader(config, tokenizer, tmp_path, dp_rank=rank, dp_degree=2)


def test_what_is_no_file_is_not_called_missing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match="it is neither a file nor a folder"):
        open_corpus(tmp_path / "pipe.txt", "text")


def test_a_file_that_is_named_as_a_data_set_of_the_hub(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("some text")
    with pytest.raises(DataError, match=r"text\.txt is here: give it with training\.dataset_path; or "):
        open_stream(parse(["--training.dataset", str(file)]).training)


def test_only_the_main_rank_prepares_and_the_others_wait(
    corpus_file: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    barrier = threading.Barrier(2)
    loaders: dict[int, Loader] = {}

    def wait() -> None:
        barrier.wait(20)

    def build(rank: int) -> None:
        if rank == 0:
            time.sleep(0.2)  # the other must not look before the barrier
        place = data.DataRank(tmp_path, CPU, rank, 2, is_main=rank == 0, barrier=wait)
        loaders[rank] = data.build_loader(config, tokenizer, place)

    config = make_config(corpus_file)  # tyro parses in one thread at a time
    threads = [threading.Thread(target=build, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loaders[0].state_dict() == loaders[1].state_dict()
    assert len(list((tmp_path / "data").glob("*/index.json"))) == 1


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "titan_fast data"]


def test_batches_have_no_gaps(make: Callable, stream: Callable) -> None:
    """Else the host would wait at their copy to a GPU, and a compiled model would be compiled again after the dry
    step."""
    for loader in (make(), make("--training.local_batch_size", "1"), stream()):
        for batch in next(loader):
            assert batch.tokens.stride() == batch.labels.stride() == (SEQ_LEN, 1)


def test_the_thread_ends_with_the_loader(make: Callable) -> None:
    before = len(reading_threads())
    loader = make()
    next(loader)
    assert len(reading_threads()) == before + 1
    while loader._reader is not None and not loader._reader._queue.full():  # then the thread waits for room
        time.sleep(0.01)
    loader.close()
    loader.close()
    assert len(reading_threads()) == before
    after = rows_of(next(loader))  # used again, it goes on
    assert loader.position()["first_sample"] == 2 and after
    loader.close()


def test_a_forgotten_loader_ends_its_thread(corpus_file: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    before = len(reading_threads())
    loader = make_loader(make_config(corpus_file), tokenizer, tmp_path)
    next(loader)
    del loader
    assert len(reading_threads()) == before


def test_an_error_in_the_thread_surfaces_at_next_again_and_again(
    make: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = make()
    order = order_of(loader)
    next(loader)
    loader.close()
    monkeypatch.setattr(order.tokens, "_shard", lambda number: np.full(10**4, 400))
    for _ in range(2):
        with pytest.raises(DataError, match="token id 400 is beyond the model's vocabulary of 400"):
            for _ in range(5):
                next(loader)


@pytest.mark.parametrize("end", ["first token", "last label"])
def test_a_token_beyond_the_vocabulary_at_either_end_is_seen(
    end: str, make: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first token is not a label, the last is only a label."""
    order = order_of(loader := make())
    loader.close()
    read = order.read

    def read_with_it(start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        tokens, labels = (ids.copy() for ids in read(start, count))
        ids, position = (tokens, 0) if end == "first token" else (labels, -1)
        ids[0, position] = 400
        return tokens, labels

    monkeypatch.setattr(order, "read", read_with_it)
    with pytest.raises(DataError, match="token id 400 is beyond"):
        loader._source.next_step(threading.Event())


def test_a_read_that_outlasts_a_reset_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a file server that is away for a while."""
    hangs, back = threading.Event(), threading.Event()

    class Numbers(data.TokenSource):
        def __init__(self) -> None:
            self._next_sample, self.identity = 0, {}

        def next_step(self, stopping: threading.Event) -> reading.Step:
            first = self._next_sample
            if first == 3 and not hangs.is_set():
                hangs.set()
                back.wait(60)
            self._next_sample = first + 1
            return reading.Step([(np.full((1, 2), first),) * 2], {"first_sample": first}, first + 1)

    monkeypatch.setattr(reading, "time", SimpleNamespace(monotonic=lambda: 100 * time.monotonic(), perf_counter=float))
    numbers = reading.Loader(Numbers(), torch.device("cpu"))
    next(numbers)
    assert hangs.wait(60)
    threading.Timer(1.0, back.set).start()  # long after `close` has given up
    numbers.reset()
    seen = []
    for _ in range(8):
        seen.append(int(next(numbers)[0].tokens[0, 0]))
        time.sleep(0.4)
    numbers.close()
    assert seen == list(range(8))


def test_waiting_is_counted(make: Callable) -> None:
    loader = make()
    inner = loader._source.next_step
    delays = iter([0.5])
    loader._source.next_step = lambda stopping: (time.sleep(next(delays, 0.0)), inner(stopping))[1]
    for _ in range(4):
        next(loader)
    assert loader.wait_seconds > 0.2


def test_token_shards_are_durable_before_they_have_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = runs.Disk(monkeypatch)
    disk.assert_made_durable(runs.prepare(tmp_path))


# Streams: the class that reads from the hub, with a local streamed data set.


@pytest.fixture(scope="module")
def stream_files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("stream")
    for shard, rows in enumerate(np.array_split(np.array(texts(150), dtype=object), 6)):
        (folder / f"{shard}.jsonl").write_text("".join(json.dumps({"text": row, "n": 1}) + "\n" for row in rows))
    return sorted(map(str, folder.glob("*.jsonl")))


def open_files(files: list[str]) -> datasets.IterableDataset:
    cache = str(Path(files[0]).parent / "cache")  # not ~/.cache, where each call would leave a lock of its own
    stream = datasets.load_dataset("json", data_files=files, split="train", streaming=True, cache_dir=cache)
    assert isinstance(stream, datasets.IterableDataset)
    return stream


@pytest.fixture
def stream(stream_files: list[str], tokenizer: Tokenizer) -> Callable[..., Loader]:
    def build(rank: int = 0, degree: int = 1, dataset: Any = None, passes: int = 2, column: str = "text") -> Loader:
        dataset = dataset or in_shuffled_files(open_files(stream_files), seed=3)
        source = StreamSource(dataset, "test", column, tokenizer, Share(rank, degree, 2, passes), SEQ_LEN, seed=3)
        return Loader(source, CPU)

    return build


def stream_documents(files: list[str], rank: int, degree: int, epochs: int) -> list[str]:
    """The documents that a rank reads, by `datasets` alone."""
    part = split_dataset_by_node(in_shuffled_files(open_files(files), seed=3), rank, degree)
    read = []
    for epoch in range(epochs):
        part.set_epoch(epoch)
        read += [row["text"] for row in part]
    return read


@pytest.mark.parametrize(("rank", "degree"), [(0, 1), (1, 2), (3, 4)])
def test_a_stream_is_packed_without_loss_over_epochs(
    rank: int, degree: int, stream: Callable, stream_files: list[str], tokenizer: Tokenizer
) -> None:
    documents = stream_documents(stream_files, rank, degree, epochs=3)
    joined = [id for text in documents for id in (tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id)]
    expected = [tuple(joined[at : at + SEQ_LEN + 1]) for at in range(0, len(joined) - SEQ_LEN, SEQ_LEN)]
    loader = stream(rank, degree)
    got = [row for _ in range(len(expected) // 4) for row in rows_of(next(loader))]
    loader.close()
    assert got == expected[: len(got)]
    assert loader.position()["epoch"] >= 2


def test_a_step_of_a_stream_that_ends_with_a_document_has_its_last_label(
    tmp_path: Path, stream: Callable, tokenizer: Tokenizer
) -> None:
    """Its label is the first token of the next document."""
    words = ("a" * n for n in range(1, 100))
    word = next(word for word in words if len(tokenizer.encode(word)) == SEQ_LEN - 2)  # with its ends, one sequence
    file = tmp_path / "documents.jsonl"
    file.write_text(f"{json.dumps({'text': word})}\n" * 40)
    loader = stream(dataset=open_files([str(file)]))
    document = (tokenizer.bos_id, *tokenizer.encode(word), tokenizer.eos_id)
    for _ in range(20):  # documents come in groups, and the last step of each ends with it
        assert rows_of(next(loader)) == [(*document, tokenizer.bos_id)] * 4
    loader.close()


def test_stream_ranks_share_the_documents_out(stream_files: list[str]) -> None:
    for degree in (1, 2, 3, 4):
        read = [text for rank in range(degree) for text in stream_documents(stream_files, rank, degree, epochs=1)]
        assert Counter(read) == Counter(texts(150))


def test_a_stream_is_read_one_file_after_another(stream_files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    names = {json.loads(line)["text"]: name for name in stream_files for line in Path(name).read_text().splitlines()}
    read = [names[text] for text in stream_documents(stream_files, 0, 1, epochs=1)]
    order = [name for name, _ in itertools.groupby(read)]
    assert sorted(order) == stream_files != order
    monkeypatch.setattr(datasets, "__version__", "4.8.0")
    with pytest.raises(DataError, match=r"datasets 4\.8\.0 loses rows .*; install datasets>=5\.1"):
        in_shuffled_files(open_files(stream_files), seed=3)


def test_a_stream_resumed_twice_equals_the_uninterrupted_one(stream: Callable) -> None:
    whole = stream(1, 2)
    steps = [rows_of(next(whole)) for _ in range(120)]
    assert whole.position()["epoch"] >= 1  # over an epoch's end
    whole.close()
    for stops in ((0, 1, 120), (5, 6, 120), (20, 60, 120), (50, 51, 52, 100, 120)):
        got: list = []
        state = None
        for stop in stops:
            loader = stream(1, 2)
            if state is not None:
                loader.load_state_dict(json.loads(json.dumps(state)))
            got += [rows_of(next(loader)) for _ in range(stop - len(got))]
            state = loader.state_dict()
            assert state["next_sample"] == 8 * len(got)
            loader.close()
        assert got == steps


def test_the_tokens_that_a_stream_holds_are_saved_as_one_text_and_read_as_a_list_too(stream: Callable) -> None:
    loader, new, old = stream(), stream(), stream()
    next(loader)
    saved = json.loads(json.dumps(loader.state_dict()))
    assert isinstance(saved["left_over"], str)
    new.load_state_dict(saved)
    held = new._source.state().left_over
    assert len(held) and held.tolist() == loader._state.left_over.tolist()
    old.load_state_dict({**saved, "left_over": held.tolist()})
    assert rows_of(next(old)) == rows_of(next(new)) == rows_of(next(loader))


def test_a_stream_at_the_end_of_its_epoch(stream: Callable, stream_files: list[str]) -> None:
    """From the state right after the last document of an epoch, the next epoch's first document follows."""
    whole = stream(passes=1)
    steps, states = [], []
    for _ in range(200):
        steps.append(rows_of(next(whole)))
        states.append(whole.state_dict())
    whole.close()
    for at in [n for n in range(199) if states[n]["epoch"] != states[n + 1]["epoch"]]:
        loader = stream(passes=1)
        loader.load_state_dict(states[at])
        assert [rows_of(next(loader)) for _ in range(3)] == steps[at + 1 : at + 4]
        loader.close()


def test_a_stream_state_of_another_rank_or_degree_is_refused(stream: Callable) -> None:
    state = stream(0, 2).state_dict()
    with pytest.raises(CheckpointError, match="rank was 0 and is 1"):
        stream(1, 2).load_state_dict(state)
    with pytest.raises(CheckpointError, match="dp_degree was 2 and is 1"):
        stream(0, 1).load_state_dict(state)
    del state["files_at_once"]  # as when several files were read in turn
    with pytest.raises(CheckpointError, match="files_at_once was None and is 1"):
        stream(0, 2).load_state_dict(state)


class Flaky:
    """Rows from a generator that loses its connection now and then."""

    def __init__(self, failures: set[int]) -> None:
        self.failures, self.given = failures, 0

    def rows(self, shards: list[int]) -> Iterator[dict[str, str]]:
        for shard in shards:
            for n in range(40):
                self.given += 1
                if self.given in self.failures:
                    raise ConnectionError("the line is dead")
                yield {"text": f"shard{shard} row{n}"}

    def dataset(self) -> Any:
        features = datasets.Features({"text": datasets.Value("string")})
        examples = datasets.iterable_dataset.ExamplesIterable(
            lambda shards: enumerate(self.rows(shards)), {"shards": list(range(3))}
        )
        return datasets.IterableDataset(examples, info=datasets.DatasetInfo(features=features))


def test_a_lost_connection_is_made_again_without_loss(stream: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "RETRY_SECONDS", (0, 0))
    expected = stream(dataset=Flaky(set()).dataset())
    flaky = Flaky({30, 31, 90, 135})
    loader = stream(dataset=flaky.dataset())
    assert [rows_of(next(loader)) for _ in range(30)] == [rows_of(next(expected)) for _ in range(30)]
    assert flaky.given > 135
    loader.close()
    expected.close()


def test_a_connection_that_stays_lost_is_an_error_with_its_place(
    stream: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "RETRY_SECONDS", (0, 0))
    loader = stream(dataset=Flaky(set(range(50, 10_000))).dataset())
    with pytest.raises(DataError, match=r"the stream broke: the line is dead, for 0 s \[test:\d+, epoch 0"):
        for _ in range(100):
            next(loader)
    assert not loader._reader.get.__self__._queue.qsize()  # type: ignore[union-attr]
    loader.close()


def test_a_lost_connection_is_given_up_before_the_others_are(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "RETRY_SECONDS", (0, 3, 3, 3, 60))
    clock = [100.0]

    class Stopping(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            clock[0] += timeout or 0
            return False

    monkeypatch.setattr(hub, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    dataset = Flaky(set(range(50, 10_000))).dataset()
    source = StreamSource(dataset, "test", "text", tokenizer, Share(0, 1, 2, 2), SEQ_LEN, 3, patience=5)
    with pytest.raises(DataError, match=r"the stream broke: the line is dead, for 3 s"):
        for _ in range(100):
            source.next_step(Stopping())
    assert clock == [103.0]


def test_a_stream_says_where_every_rank_reads_all_of_it(stream: Callable) -> None:
    """Six files."""
    assert "6 files in an order drawn from seed 3, 3 for each of 2 data-parallel ranks" in stream(0, 2).describe()
    assert "6 files do not divide by 4 data-parallel ranks, so each rank reads all" in stream(0, 4).describe()


def test_closing_does_not_wait_for_a_retry(stream: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "RETRY_SECONDS", (60,))
    loader = stream(dataset=Flaky({60}).dataset())
    next(loader)
    time.sleep(0.3)
    started = time.monotonic()
    loader.close()
    assert time.monotonic() - started < 30


def test_a_stream_without_the_column_or_without_rows_is_refused_at_once(stream: Callable) -> None:
    with pytest.raises(DataError, match="no row has the text column 'body'; the columns are n, text"):
        stream(column="body")
    with pytest.raises(DataError, match="no row for data-parallel rank 2 of 3"):
        stream(2, 3, dataset=datasets.Dataset.from_dict({"text": ["a", "b"]}).to_iterable_dataset())


def test_bad_rows_of_a_stream(stream: Callable) -> None:
    rows = {"text": ["good one here", None, None, None, "good two here", None, " "] * 30}
    good = datasets.Dataset.from_dict({"text": ["good one here", "good two here"] * 30}).to_iterable_dataset()
    with pytest.raises(DataError, match="most rows cannot be used: 150 of 210 rows skipped: 120 null"):
        loader = stream(dataset=datasets.Dataset.from_dict(rows).to_iterable_dataset())
        for _ in range(100):
            next(loader)
    with pytest.raises(DataError, match="150 of 150 rows skipped: 150 empty"):  # and not read for ever
        next(stream(dataset=datasets.Dataset.from_dict({"text": [""] * 150}).to_iterable_dataset()))
    rows["text"] += ["good one here", "good two here"] * 60
    loader, expected = stream(dataset=datasets.Dataset.from_dict(rows).to_iterable_dataset()), stream(dataset=good)
    assert [rows_of(next(loader)) for _ in range(5)] == [rows_of(next(expected)) for _ in range(5)]
    assert loader.state_dict()["left_over"]
    loader.close()
    expected.close()


def test_a_hub_that_cannot_be_reached_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'allenai/c4' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    config = configuration.parse(["--training.dataset", "c4"])
    with pytest.raises(DataError, match=r"cannot be reached for the data set 'allenai.c4'.*; check the network"):
        data.build_tokenizer(config, data.DataRank(tmp_path, CPU))
    mistyped = configuration.parse(["--training.dataset", "stdli"])
    with pytest.raises(DataError, match=r"data set 'stdli'.*; did you mean stdlib\? check the network"):
        data.build_tokenizer(mistyped, data.DataRank(tmp_path, CPU))


def test_hub_names_and_no_validation_for_streams(tokenizer: Tokenizer, stream_files: list[str], tmp_path: Path) -> None:
    config = configuration.parse(
        ["--training.dataset", "c4", "--training.seq_len", "16", "--comm.timeout_seconds", "50"]
    )
    with pytest.MonkeyPatch.context() as patch:
        hub = Hub({"a" * 40: stream_files})
        patch.setattr(datasets, "load_dataset_builder", hub)
        loader = make_loader(config, tokenizer, tmp_path)
        assert isinstance(loader._source, StreamSource) and loader._source._patience == 40
        assert make_loader(config, tokenizer, tmp_path, build=data.build_validation_loader) is None
        folder = tmp_path / "prepared"
        given = dataclasses.replace(config, model=dataclasses.replace(config.model, tokenizer_path=str(tokenizer.path)))
        data_command.prepare_folder(given, folder, max_documents=20)
    assert hub.asked[0] == ("allenai/c4", "en", None, "train")
    assert next(loader)[0].tokens.shape == (4, 16)
    loader.close()
    prepared = PreparedTokens(folder, verify=True)
    assert prepared.documents == 20 and is_prepared(folder)
    assert prepared.index["source"]["name"] == "allenai/c4/en/train" and prepared.index["source"]["commit"] == "a" * 40


class Hub:
    """In place of `datasets.load_dataset_builder`: the files of each commit, the last one the newest."""

    def __init__(self, commits: dict[str, list[str]]) -> None:
        self.commits = commits
        self.asked: list[tuple[str | None, ...]] = []

    def __call__(self, name: str, config: str | None, revision: str | None) -> Any:
        commit = [*self.commits][0 if revision == "v1" else -1] if revision in (None, "v1") else revision
        if commit not in self.commits:
            raise DatasetNotFoundError(f"Revision '{revision}' doesn't exist for dataset '{name}'")

        def as_streaming_dataset(split: str) -> datasets.IterableDataset:
            self.asked.append((name, config, revision, split))
            return open_files(self.commits[commit])

        return SimpleNamespace(hash=commit, as_streaming_dataset=as_streaming_dataset)


def test_a_stream_goes_on_at_the_commit_with_which_it_began(
    stream_files: list[str], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the hub's data set has got other files since."""
    old, new = "a" * 40, "b" * 40
    hub = Hub({old: stream_files[:4]})
    monkeypatch.setattr(datasets, "load_dataset_builder", hub)

    def build(*more: str) -> Loader:
        words = ["--training.dataset", "someone/text", "--training.seq_len", "16", *more]
        return make_loader(configuration.parse(words), tokenizer, tmp_path)

    whole = build()
    assert f"someone/text/train, commit {old}: streamed from 4 files" in whole.describe()
    steps = [rows_of(next(whole)) for _ in range(5)]
    state = json.loads(json.dumps(whole.state_dict()))
    steps += [rows_of(next(whole)) for _ in range(60)]
    whole.close()
    hub.commits = {old: stream_files[:4], new: stream_files}
    later = build()
    assert f"commit {new}: streamed from 6 files" in later.describe()
    later.load_state_dict(state)
    assert f"commit {old}: streamed from 4 files" in later.describe()
    assert [rows_of(next(later)) for _ in range(60)] == steps[5:]
    assert later.state_dict()["commit"] == old
    later.close()

    without = {key: value for key, value in state.items() if key != "commit"}  # as saved by an older version
    later = build()
    later.load_state_dict(without)
    assert later.state_dict()["commit"] == new
    later.close()
    with pytest.raises(CheckpointError, match=r"dataset was 'someone/text/train' and is 'someone/text/train@v1'"):
        build("--training.dataset_revision", "v1").load_state_dict(state)
    hub.commits = {new: stream_files}
    with pytest.raises(DataError, match=f"commit {old} .* cannot be opened: .*; begin the data again, at the newest"):
        build().load_state_dict(state)


def test_a_revision_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset_builder", Hub({"a" * 40: []}))
    config = configuration.parse(["--training.dataset", "c4", "--training.dataset_revision", "v7"])
    with pytest.raises(DataError, match=r"cannot be opened: Revision 'v7' doesn't exist .*; check .*dataset_revision"):
        open_stream(config.training)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--samples 1:2 --debug.seed 7", "show reads the run's own config, and --debug.seed is given"),
        ("--step 1 --training.dataset_path=nowhere", "and --training.dataset_path is given"),
        ("--samples 1:2 --data-parallel-degree 2", "--data-parallel-degree is for --step"),
    ],
)
def test_show_refuses_what_would_change_nothing(
    words: str, part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["data", "show", "--job.dump_folder", "nowhere", *words.split()])
    with pytest.raises(SystemExit) as ended:
        data_command.main()
    assert ended.value.code == 2 and part in capsys.readouterr().err


@pytest.mark.parametrize(
    ("first", "skipped", "begins"),
    [
        (8, [], 8),
        (8, [(0, 7), (12, 99)], 8),
        (8, [(11, 11)], 12),
        (8, [(8, 8)], 9),
        (8, [(0, 8)], 9),
        (8, [(14, 20), (10, 10)], 21),
        (8, [(9, 30), (10, 12)], 31),
    ],
)
def test_a_step_begins_after_the_samples_that_are_skipped(
    first: int, skipped: list[tuple[int, int]], begins: int
) -> None:
    assert data.first_sample(first, 4, skipped) == begins


def test_show_prints_the_documents_of_a_step(
    corpus_file: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tomli_w

    config = make_config(corpus_file, "--training.global_batch_size", "4")
    (tmp_path / "config.toml").write_text(tomli_w.dumps(configuration.to_dict(config)))
    loader = make_loader(config, tokenizer, tmp_path)
    step = list(itertools.islice(loader, 3))[2]
    loader.close()
    lines = list(data_command.step_documents(tmp_path, 3, None, 10_000))
    assert lines[:2] == ["step 3:", "samples 8 to 11, epoch 0"]
    assert lines[1:] == list(data_command.sample_documents(tmp_path, 8, 11, 10_000))
    epoch = data.training_order(config, PreparedTokens(data_command._shards_of(tmp_path, config))).samples_per_epoch
    assert next(data_command.sample_documents(tmp_path, epoch - 1, epoch, 9)).endswith(f" to {epoch}, epochs 0 to 1")
    moved = tmp_path.with_name(f"{tmp_path.name}-moved")
    shutil.move(tmp_path, moved)
    assert list(data_command.step_documents(moved, 3, None, 10_000)) == lines
    shutil.move(moved, tmp_path)
    printed = [line for line in lines[2:] if line.startswith("  ")]
    words = [ast.literal_eval(line.split(": ", 1)[1]) for line in printed]
    tokens = [token for batch in step for row in batch.tokens.tolist() for token in row]
    assert tokenizer.decode(tokens).replace(" ", "") == "".join(words).replace(" ", "")
    first = printed[0].strip()
    line = int(first.split("rows.jsonl:")[1].split()[0])
    assert words[0] in json.loads(corpus_file.read_text().splitlines()[line - 1])["text"]
    # If the batch depends on the number of processes, the log tells it.
    free = make_config(corpus_file)
    (tmp_path / "config.toml").write_text(tomli_w.dumps(configuration.to_dict(free)))
    with pytest.raises(ConfigError, match="its log says nothing of it"):
        list(data_command.step_documents(tmp_path, 3, None, 10_000))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 2, "tokens_seen": 2 * 4 * 16}) + "\n")
    assert list(data_command.step_documents(tmp_path, 3, None, 10_000)) == [
        "step 3: not in the log, which ends with step 2", *lines[1:],
    ]  # fmt: skip
    (tmp_path / "config.toml").write_text(tomli_w.dumps(configuration.to_dict(config)))
    # The first two steps had half the batch, so the current one does not determine the third step's samples.
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 2, "tokens_seen": 2 * 2 * 16}) + "\n")
    with pytest.raises(ConfigError, match=r"after step 2 .* 64 tokens, which is not 2 times 4 x 16: .* once \["):
        list(data_command.step_documents(tmp_path, 3, None, 10_000))
    (tmp_path / "config.toml").write_text(tomli_w.dumps(configuration.to_dict(free)))
    with pytest.raises(ConfigError, match=r"which is not 2 times 8 x 16: .* or --data-parallel-degree 4 is wrong"):
        list(data_command.step_documents(tmp_path, 3, 4, 10_000))


@pytest.mark.parametrize(
    ("logged", "skip", "step", "found"),
    [
        ({1: 0, 10: 36, 12: 44}, "19:22", 8, (28, 31)),  # the setting is newer than these steps
        ({1: 0, 10: 36, 12: 48}, "60:63", 11, "steps 10 and 12 of the log do not fit"),  # something else was skipped
        ({1: 0, 10: 40, 20: 80}, "", 5, "steps 1 and 10 of the log do not fit"),  # it was another once
        ({1: 0, 10: 40, 20: 80}, "8:11", 3, (12, 15)),
        ({1: 0, 10: 40, 20: 80}, "8:11", 15, (60, 63)),
        ({1: 0, 10: 40, 20: 80}, "8:11", 20, (80, 83)),
        ({1: 0, 10: 36}, "44:47", 13, (52, 55)),  # after the last logged step, as the run would go on
    ],
)
def test_samples_of_a_step_are_what_the_log_allows(
    logged: dict[int, int], skip: str, step: int, found: tuple[int, int] | str, tmp_path: Path
) -> None:
    """Four samples a step."""
    settings = configuration.parse(["--training.skip_samples", skip] if skip else [])
    lines = [{"step": at, "data": {"first_sample": first, "last_sample": first + 3}} for at, first in logged.items()]
    with pytest.raises(ConfigError, match=found) if isinstance(found, str) else nullcontext():
        assert data_command._samples_by_log(tmp_path, step, settings, lines) == found


def test_an_unclosed_loader_does_not_hold_up_the_interpreter(
    corpus_file: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import sys, pathlib, torch
from titan_fast import config, data
settings = config.parse(["--training.seq_len", "16", "--training.dataset_path", {str(corpus_file)!r}])
tokenizer = data.load_tokenizer({str(tokenizer.path)!r})
loader = data.build_loader(settings, tokenizer, data.DataRank(pathlib.Path({str(tmp_path)!r}), torch.device("cpu")))
next(loader)
sys.exit(7)
"""
    )
    root = str(Path(data.__file__).parents[1])
    ended = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=180, env=os.environ | {"PYTHONPATH": root}
    )
    assert ended.returncode == 7 and not ended.stderr, ended.stderr
