"""Text to token ids and back: sentencepiece (Llama 2), tiktoken ranks (Llama 3) and HF tokenizer.json, one protocol.

`load_tokenizer` tells the three apart by the file's content. `encode` never adds BOS or EOS, and never turns the name
of a special token in the text into that token: a document cannot end itself by what it says."""

import base64
import binascii
import hashlib
import io
import itertools
import json
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tiktoken
import tokenizers

from titan_fast.errors import DataError

NAMES_IN_FOLDER = ("tokenizer.model", "tokenizer.json", "original/tokenizer.model")
"""Where a tokenizer is looked for in a folder, in this order."""


class Tokenizer(Protocol):
    """What the project needs of a tokenizer."""

    path: Path
    """The file that it was read from."""
    kind: str
    """sentencepiece, tiktoken or tokenizers."""
    vocab_size: int
    """One more than the largest id."""
    bos_id: int | None
    """The id that begins a document, where the family has one."""
    eos_id: int
    """The id that ends a document."""
    fingerprint: str
    """sha256 of the file."""
    files: dict[str, bytes]
    """What `load_tokenizer` reads the same tokenizer from, by name in a folder. Kept in memory, since the files may be
    moved or replaced while a run goes on."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS and EOS."""
        ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of each, on all processors that this process may use."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text; bytes that are no UTF-8 become U+FFFD."""
        ...


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a file, in a folder that holds one of `NAMES_IN_FOLDER`, or in a checkpoint; DataError where
    there is none."""
    path = _tokenizer_file(Path(path))
    try:
        content = path.read_bytes()
    except OSError as error:
        hint = "; README.md, Tokenizers, says how to get Meta's" if isinstance(error, FileNotFoundError) else ""
        raise DataError(f"cannot read the tokenizer: {error.strerror}", f"check the path{hint}", str(path)) from error
    if content.lstrip()[:1] == b"{" and _is_hugging_face(content):
        return HuggingFaceTokenizer(path, content)
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?(\n|$)", content):
        return TiktokenTokenizer(path, content)
    if content[:1] == b"\n":  # the tag of a ModelProto's first field, its pieces
        processor = sentencepiece.SentencePieceProcessor()
        try:
            loaded = processor.LoadFromSerializedProto(content) and processor.vocab_size() > 0
        except RuntimeError:
            loaded = False
        if loaded:
            return SentencePieceTokenizer(path, content, processor)
    raise DataError(
        "the tokenizer file is of an unknown kind",
        "give a sentencepiece model, a tiktoken rank file (base64 and rank on each line), or an HF tokenizer.json",
        str(path),
    )


CONFIG_BESIDE = "tokenizer_config.json"
"""Names the special tokens of the tokenizer.json beside it."""


def copy_tokenizer(tokenizer: Tokenizer, folder: Path) -> list[str]:
    """Writes the tokenizer's files into `folder`, which is created if it does not exist. Returns their names."""
    folder.mkdir(exist_ok=True)
    for name, content in tokenizer.files.items():
        (folder / name).write_bytes(content)
    return list(tokenizer.files)


def is_same(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether both turn a document into the same tokens. BOS and EOS of a tokenizer.json are not in its fingerprint."""
    return (one.fingerprint, one.bos_id, one.eos_id) == (other.fingerprint, other.bos_id, other.eos_id)


def _tokenizer_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for folder in (path, path / "tokenizer"):  # a checkpoint has its own there
        for name in NAMES_IN_FOLDER:
            if (folder / name).is_file():
                return folder / name
    raise DataError("the folder holds no tokenizer", f"put one of {', '.join(NAMES_IN_FOLDER)} there", str(path))


def _is_hugging_face(content: bytes) -> bool:
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(parsed, dict) and isinstance(parsed.get("model"), dict)


def check_vocabulary(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """DataError when the tokenizer has ids that the model has no embedding for."""
    if tokenizer.vocab_size > model_vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model's vocabulary {model_vocab_size}",
            "set model.vocab_size to at least that, or use another tokenizer",
            str(tokenizer.path),
        )


def valid_unicode(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates, which UTF-8 cannot hold, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def available_processors() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class SentencePieceTokenizer:
    """A sentencepiece model. Llama 2's works as usual (it puts a space before the text). For those trained here,
    decoding gives back exactly what was encoded."""

    kind = "sentencepiece"

    def __init__(self, path: Path, content: bytes, processor: sentencepiece.SentencePieceProcessor) -> None:
        self.path = path
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.files = {"tokenizer.model": content}
        self._processor = processor
        self.vocab_size = processor.vocab_size()
        bos, eos = processor.bos_id(), processor.eos_id()
        if eos < 0:
            raise DataError("the sentencepiece model has no end-of-sentence piece", "train it with one", str(path))
        self.bos_id: int | None = bos if bos >= 0 else None
        self.eos_id: int = eos
        self._space_bytes = self._bytes_of_space_symbol()

    def _bytes_of_space_symbol(self) -> list[int] | None:
        """sentencepiece writes a space as U+2581, so a real U+2581 in a text would come back as a space. Spelled as
        three byte pieces, which this returns, it does not. None for models that normalise anyway; for those we do what
        every encoder does."""
        first = self._processor.id_to_piece(self._processor.encode("a")[:1])
        pieces = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]
        if first == ["a"] and all(self._processor.is_byte(piece) for piece in pieces):
            return pieces
        return None

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        texts = [valid_unicode(text) for text in texts]
        threads = min(len(texts), available_processors())
        if self._space_bytes is None or not any("\u2581" in text for text in texts):
            return self._processor.encode(texts, num_threads=threads)
        return [self._encode_around_space_symbol(text) for text in texts]

    def _encode_around_space_symbol(self, text: str) -> list[int]:
        assert self._space_bytes is not None
        first, *rest = self._processor.encode(text.split("\u2581"))
        return first + [id for part in rest for id in (*self._space_bytes, *part)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(id) for id in ids])


LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 cuts text before merging bytes. Source: the model's published tokenizer."""

LLAMA3_RESERVED = 256
"""Ids after the ranks that are special tokens."""


def llama3_special_tokens(first_id: int) -> dict[str, int]:
    """Llama 3.1's 256 special tokens, name to id, from `first_id` on; Llama 3 has the same ids for those it names."""
    named = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>",
        "<|reserved_special_token_2|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
    ]
    unnamed = [f"<|reserved_special_token_{n}|>" for n in range(3, 3 + LLAMA3_RESERVED - len(named))]
    return {name: first_id + offset for offset, name in enumerate(named + unnamed)}


class TiktokenTokenizer:
    """A tiktoken rank file, with Llama 3's split pattern and special tokens."""

    kind = "tiktoken"

    # Llama 3's own encoder cuts text at these lengths too. tiktoken's regular expression overflows the stack on
    # millions of characters, and its merging takes quadratic time in a run without a boundary.
    _MOST_CHARACTERS = 400_000
    _LONGEST_RUN = 25_000

    def __init__(self, path: Path, content: bytes) -> None:
        self.path = path
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.files = {"tokenizer.model": content}
        ranks = read_ranks(content, path)
        special = llama3_special_tokens(len(ranks))
        self._encoding = tiktoken.Encoding(
            path.name, pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=special
        )
        self.vocab_size = len(ranks) + len(special)
        self.bos_id: int | None = special["<|begin_of_text|>"]
        self.eos_id: int = special["<|end_of_text|>"]

    def encode(self, text: str) -> list[int]:
        parts = self._parts(valid_unicode(text))
        return [id for part in parts for id in self._encoding.encode_ordinary(part)]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        parts = [self._parts(valid_unicode(text)) for text in texts]
        flat = [part for document in parts for part in document]
        encoded = iter(self._encoding.encode_ordinary_batch(flat, num_threads=available_processors()))
        joined = []
        for document in parts:
            pieces = list(itertools.islice(encoded, len(document)))
            joined.append(pieces[0] if len(pieces) == 1 else [id for piece in pieces for id in piece])
        return joined

    def _parts(self, text: str) -> list[str]:
        if len(text) < self._LONGEST_RUN:
            return [text]
        starts = range(0, len(text), self._MOST_CHARACTERS)
        return [part for start in starts for part in self._cut_runs(text[start : start + self._MOST_CHARACTERS])]

    def _cut_runs(self, text: str) -> list[str]:
        """`text` cut so that no part has more than `_LONGEST_RUN` characters in a row that are all spaces or all
        not."""
        words = text.split()
        longest, spaces = max(map(len, words), default=0), len(text) - sum(map(len, words))
        if longest <= self._LONGEST_RUN and spaces <= self._LONGEST_RUN:
            return [text]
        cuts = [0]
        for run in re.finditer(r"\s+|\S+", text):
            cuts += range(run.start() + self._LONGEST_RUN, run.end(), self._LONGEST_RUN)
        return [text[start:end] for start, end in itertools.pairwise([*cuts, len(text)])]

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode([int(id) for id in ids])


def read_ranks(content: bytes, path: Path) -> dict[bytes, int]:
    """The tokens of a rank file and their ranks, 0 and up without a gap; DataError where it is none."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise DataError("a line is not base64 and a rank", "fix the rank file", f"{path}:{number}") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise DataError(f"the {len(ranks)} ranks are not 0 to {len(ranks) - 1}", "fix the rank file", str(path))
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise DataError(f"{len(missing)} of the 256 single bytes have no rank", "fix the rank file", str(path))
    return ranks


class HuggingFaceTokenizer:
    """An HF tokenizer.json. BOS and EOS are what tokenizer_config.json beside it says, or else the known names."""

    kind = "tokenizers"

    _BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>")
    _EOS_NAMES = ("<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>")

    def __init__(self, path: Path, content: bytes) -> None:
        self.path = path
        self.fingerprint = hashlib.sha256(content).hexdigest()
        with self._used():
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        self._tokenizer.no_truncation()  # both may be set in the file, and would lose or add tokens
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # in a text, their names are only text
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1
        names, beside = _special_names(path.with_name(CONFIG_BESIDE))
        self.files = {"tokenizer.json": content} | beside
        self.bos_id: int | None = self._special_id(ids, "bos_token", names, self._BOS_NAMES)
        eos_id = self._special_id(ids, "eos_token", names, self._EOS_NAMES)
        if eos_id is None and "eos_token" in names:
            raise DataError(f"no end-of-text token: {CONFIG_BESIDE}'s eos_token is null", "name one there", str(path))
        if eos_id is None:
            raise DataError(
                f"no end-of-text token: none of {', '.join(self._EOS_NAMES)} is in its vocabulary",
                "put a tokenizer_config.json with eos_token beside it",
                str(path),
            )
        self.eos_id: int = eos_id
        self._read_special_names_as_text()

    @contextmanager
    def _used(self) -> Iterator[None]:
        """DataError where the file's content makes tokenizers fail. It raises bare Exception, or, where its Rust code
        panics, a BaseException whose class cannot be imported."""
        try:
            yield
        except BaseException as error:
            if not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
                raise
            raise DataError(f"the tokenizer.json cannot be used: {error}", "fix it", str(self.path)) from error

    def _read_special_names_as_text(self) -> None:
        """`encode_special_tokens` turns off the search for special tokens, but the model may also have their names
        among its own pieces. Cutting the text after a name's first character prevents that it ever sees a whole name.
        DataError if BOS or EOS can still come out of a text."""
        names = {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}
        found = [self._tokenizer.id_to_token(id) for id in (self.bos_id, self.eos_id) if id is not None]
        ends = [name for name in found if name is not None]
        self._tokenizer.add_special_tokens([name for name in ends if name not in names])
        model = self._tokenizer.model
        pieces = self._tokenizer.get_vocab(with_added_tokens=False)
        cuts = [
            f"{re.escape(name[0])}(?={re.escape(name[1:])})"
            for name in sorted(names.union(ends))
            if name[1:] and name in pieces and any(token.id == pieces[name] for token in model.tokenize(name))
        ]
        if cuts:
            split = tokenizers.pre_tokenizers.Split(tokenizers.Regex("|".join(cuts)), "isolated")
            own = self._tokenizer.pre_tokenizer
            self._tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split] if own is None else [own, split])
        for name in ends:
            if {self.bos_id, self.eos_id} & set(self.encode(name)):
                raise DataError(
                    f"a text can end or begin a document: {name!r} in it is read as one of the tokens that do",
                    "use another tokenizer, or name other ends in a tokenizer_config.json beside it",
                    str(self.path),
                )

    def _special_id(
        self, ids: dict[str, int], key: str, names: dict[str, str | None], known: tuple[str, ...]
    ) -> int | None:
        if key not in names:
            return next((ids[name] for name in known if name in ids), None)
        name = names[key]
        if name is not None and name not in ids:
            raise DataError(
                f"tokenizer_config.json's {key} {name!r} is not in the vocabulary", "fix it", str(self.path)
            )
        return None if name is None else ids[name]

    def encode(self, text: str) -> list[int]:
        with self._used():
            return self._tokenizer.encode(valid_unicode(text), add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        texts = [valid_unicode(text) for text in texts]
        with self._used():
            return [encoded.ids for encoded in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        with self._used():
            return self._tokenizer.decode([int(id) for id in ids], skip_special_tokens=False)


def _special_names(path: Path) -> tuple[dict[str, str | None], dict[str, bytes]]:
    """The names that tokenizer_config.json gives to the special tokens, and the file; both empty without one."""
    if not path.is_file():
        return {}, {}
    try:
        content = path.read_bytes()
        config: Any = json.loads(content)
        if not isinstance(config, dict):
            raise TypeError("not an object")
        found = {key: config[key] for key in ("bos_token", "eos_token") if key in config}
        names = {key: name["content"] if isinstance(name, dict) else name for key, name in found.items()}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{CONFIG_BESIDE} cannot be read", "fix or remove it", str(path)) from error
    for key, name in names.items():
        if not isinstance(name, str | None):
            raise DataError(f"{CONFIG_BESIDE}'s {key} is {name!r}, not a text", "fix or remove it", str(path))
    return names, {CONFIG_BESIDE: content}


TRAINING_CHARACTERS = 2_000_000
"""`train_sentencepiece` learns from at most so many characters: half a second on one core."""
_POOL_CHARACTERS = 32_000_000
_LONGEST_LINE = 4_000  # characters; sentencepiece skips longer ones, counting in bytes
_FEWEST_PIECES = 3 + 256  # unknown, BOS, EOS and the byte pieces


def train_sentencepiece(texts: Iterable[str], vocab_size: int, path: Path, seed: int) -> None:
    """Learns a BPE with byte fallback from `texts` and writes it to `path`: the same file for the same texts and seed.

    The tokenizer is lossless: no normalisation, all whitespace kept, anything unknown spelled in bytes. The documents
    to learn from are drawn from the first 32 million characters. DataError with both numbers when they cannot fill the
    vocabulary."""
    if vocab_size <= _FEWEST_PIECES:
        raise DataError(
            f"a vocabulary of {vocab_size} has no room for {_FEWEST_PIECES} bytes and special pieces and one more",
            "set model.vocab_size higher",
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_lines_to_learn_from(texts, seed)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=4 * _LONGEST_LINE,
            num_threads=1,
            minloglevel=3,
        )
    except (RuntimeError, OSError) as error:
        raise _training_failure(error, vocab_size) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(model.getvalue())
    temporary.replace(path)


def _lines_to_learn_from(texts: Iterable[str], seed: int) -> list[str]:
    pool, held = [], 0
    for text in texts:
        pool.append(valid_unicode(text[:_POOL_CHARACTERS]))
        held += len(pool[-1])
        if held >= _POOL_CHARACTERS:
            break
    random.Random(seed).shuffle(pool)
    lines, taken = [], 0
    for line in itertools.chain.from_iterable(text.split("\n") for text in pool):
        lines += [line[start : start + _LONGEST_LINE] for start in range(0, len(line), _LONGEST_LINE)]
        taken += len(line)
        if taken >= TRAINING_CHARACTERS:
            break
    return lines


def _training_failure(error: Exception, vocab_size: int) -> DataError:
    most = re.search(r"value <= (\d+)", str(error))
    if most:
        return DataError(
            f"a vocabulary of {vocab_size} is more than the {most[1]} pieces that the text can fill",
            "give more text, a smaller model.vocab_size, or model.tokenizer_path",
        )
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
        return DataError(
            f"a vocabulary of {vocab_size} is less than the {least[1]} pieces that the text's characters take",
            "set model.vocab_size higher, or model.tokenizer_path",
        )
    return DataError(
        f"no tokenizer with {vocab_size} pieces can be learned from this text: {str(error).strip()[:200]}",
        "give more text or model.tokenizer_path",
    )
