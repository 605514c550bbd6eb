"""Tokens per second of tokenizing and packing, for each tokenizer, and of delivery from prepared shards.

    python -m benchmarks.bench_data [--rounds 5] [--out benchmarks/results/data.json]

The text is this machine's Python standard library. The three tokenizers are made on the fly: a sentencepiece BPE of
4,096 pieces, and a byte-level BPE of 16,384, as a tiktoken rank file and as an HF tokenizer.json. Each round times
every contender in turn; results are medians over rounds, per second of the clock and per second of one processor (which
other load on the machine disturbs less). Delivery is what the training loop does: `next(loader)` with the reading
thread, int64 batches, and the exact state taken at every step.
"""

import argparse
import base64
import importlib.metadata
import logging
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from benchmarks.cpu_rates import processor, spread, write
from benchmarks.provenance import commit
from titan_fast import config as configuration
from titan_fast.corpus import Document, RowLedger, stdlib_corpus
from titan_fast.data import DataRank, build_loader
from titan_fast.prepared import prepare
from titan_fast.tokenizer import (
    LLAMA3_SPLIT,
    Tokenizer,
    available_processors,
    load_tokenizer,
    train_sentencepiece,
)

PIECES, BYTE_LEVEL_PIECES = 4096, 16_384
DELIVERIES = {  # name: (seq_len, local batch, whether documents are cut to about 1,600 characters, like web text)
    "256 x 8": (256, 8, False),
    "2048 x 8": (2048, 8, False),
    "8192 x 2": (8192, 2, False),
    "8192 x 2, short documents": (8192, 2, True),
}
LIBRARIES = ("torch", "numpy", "sentencepiece", "tiktoken", "tokenizers")
SHORT_DOCUMENT = 1600
DELIVERED_TOKENS = 8_000_000  # per round: two passes over the corpus, with the reshuffle at the end of an epoch


def byte_level_bpe(texts: Iterator[str]) -> tokenizers.Tokenizer:
    """Llama 3's scheme with fewer merges."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=BYTE_LEVEL_PIECES, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def rank_lines(tokenizer: tokenizers.Tokenizer) -> Iterator[bytes]:
    """The same pieces in tiktoken's format; byte-level BPE spells each byte as one printable character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    to_byte = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    for piece, rank in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        yield base64.b64encode(bytes(to_byte[character] for character in piece)) + b" %d\n" % rank


def make_tokenizers(folder: Path, documents: list[Document]) -> dict[str, Tokenizer]:
    train_sentencepiece((document.text for document in documents), PIECES, folder / "sentencepiece.model", seed=0)
    reference = byte_level_bpe(document.text for document in documents)
    (folder / "tiktoken.model").write_bytes(b"".join(rank_lines(reference)))
    reference.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    reference.save(str(folder / "tokenizer.json"))
    return {
        "sentencepiece": load_tokenizer(folder / "sentencepiece.model"),
        "tiktoken": load_tokenizer(folder / "tiktoken.model"),
        "tokenizers": load_tokenizer(folder / "tokenizer.json"),
    }


def cut_short(documents: list[Document]) -> list[Document]:
    return [
        Document(text, document.file, document.line)
        for document in documents
        for start in range(0, len(document.text), SHORT_DOCUMENT)
        if (text := document.text[start : start + SHORT_DOCUMENT])
    ]


class Seconds(NamedTuple):
    """The time that something took: of the clock, and of all processors together."""

    clock: float
    processor: float


class Stopwatch:
    """Starts when created."""

    def __init__(self) -> None:
        self._clock, self._processor = time.perf_counter(), time.process_time()

    def read(self) -> Seconds:
        return Seconds(time.perf_counter() - self._clock, time.process_time() - self._processor)


def tokenize_once(documents: list[Document], tokenizer: Tokenizer, folder: Path) -> tuple[int, Seconds]:
    """(tokens, seconds) of turning documents in memory into shards on disk."""
    watch = Stopwatch()
    index = prepare(documents, tokenizer, folder, source={"name": "stdlib"}, ledger=RowLedger())
    return index["tokens"], watch.read()


def deliver_once(folder: Path, tokenizer: Tokenizer, seq_len: int, batch: int, run_dir: Path) -> tuple[int, Seconds]:
    """(tokens, seconds) from shards into batches, without the first step, which starts the thread."""
    words = ["--training.seq_len", str(seq_len), "--training.local_batch_size", str(batch)]
    settings = configuration.parse([*words, "--training.dataset_path", str(folder), "--model.flavor", "llama3_8b"])
    loader = build_loader(settings, tokenizer, DataRank(run_dir, torch.device("cpu")))
    next(loader)
    steps = DELIVERED_TOKENS // (seq_len * batch)
    watch = Stopwatch()
    for _ in range(steps):
        next(loader)
        loader.state_dict()
    seconds = watch.read()
    loader.close()
    return steps * seq_len * batch, seconds


def measure(rounds: int) -> dict[str, Any]:
    documents = list(stdlib_corpus().documents(RowLedger()))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        contenders = make_tokenizers(folder, documents)
        short = folder / "short"
        tokenize_once(cut_short(documents), contenders["sentencepiece"], short)
        tokenizing: dict[str, list[tuple[int, Seconds]]] = {key: [] for key in contenders}
        delivering: dict[str, list[tuple[int, Seconds]]] = {key: [] for key in DELIVERIES}
        for turn in range(rounds):
            for key, tokenizer in contenders.items():
                tokenizing[key].append(tokenize_once(documents, tokenizer, folder / f"{key}-{turn}"))
            for key, (seq_len, batch, is_short) in DELIVERIES.items():
                shards = short if is_short else folder / f"sentencepiece-{turn}"
                timed = deliver_once(shards, contenders["sentencepiece"], seq_len, batch, folder / "run")
                delivering[key].append(timed)
    size = sum(len(document.text.encode()) for document in documents)
    return {
        "text": {"documents": len(documents), "bytes": size},
        "tokens": {key: timed[0][0] for key, timed in tokenizing.items()},
        "tokenize_and_pack": {key: _rates(timed) for key, timed in tokenizing.items()},
        "delivery": {key: _rates(timed) for key, timed in delivering.items()},
    }


def _rates(timed: list[tuple[int, Seconds]]) -> dict[str, dict[str, float]]:
    return {
        "tokens_per_second": spread([tokens / seconds.clock for tokens, seconds in timed]),
        "tokens_per_processor_second": spread([tokens / seconds.processor for tokens, seconds in timed]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    load = os.getloadavg()[0]
    result = {
        "what": "tokens/s of tokenizing + packing into shards, and of delivery from shards",
        "machine": {"processor": processor(), "processors": available_processors(), "load_before": load},
        "commit": commit(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in LIBRARIES},
        "rounds": arguments.rounds,
        **measure(arguments.rounds),
    }
    write(result, arguments.out)


if __name__ == "__main__":
    main()
