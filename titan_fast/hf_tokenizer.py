"""Writes a tokenizer as the files that transformers loads one from."""

import json
import shutil
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from titan_fast.tokenizer import (
    CONFIG_BESIDE,
    LLAMA3_SPLIT,
    Tokenizer,
    copy_tokenizer,
    llama3_special_tokens,
    read_ranks,
)

_SPACE = "\u2581"  # sentencepiece's symbol for a space
_PROBES = (
    "The quick brown fox's 12345 jumps,\n\tover   the lazy dog.\r\n", " begins and ends ", "  ", "a",
    "na\u00efve \ufb01 e\u0301 \u00bd \u2122 \u3000 \u00a0 \u65e5\u672c\u8a9e \U0001f389",
    "def f(x):\n    return {x: [x] * 10}\n",
)  # fmt: skip


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_seq_len: int) -> str:
    """Writes the files and says in words what they are. They give the tokenizer's own ids, except for a text with
    sentencepiece's space symbol in it, which transformers reads as a space."""
    common: dict[str, Any] = {
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 adds one that Llama does not accept
    }
    if tokenizer.kind == "sentencepiece":
        return _write_sentencepiece(tokenizer, folder, common)
    if tokenizer.kind == "tiktoken":
        return _write_ranks(tokenizer.path, folder, common)
    if CONFIG_BESIDE not in copy_tokenizer(tokenizer, folder):
        loaded = tokenizers.Tokenizer.from_file(str(tokenizer.path))
        names = {"eos_token": loaded.id_to_token(tokenizer.eos_id)}
        if tokenizer.bos_id is not None:
            names["bos_token"] = loaded.id_to_token(tokenizer.bos_id)
        _write_config(folder, common | names | {"tokenizer_class": "PreTrainedTokenizerFast"})
    return "tokenizer: tokenizer.json, copied"


def _write_config(folder: Path, content: Mapping[str, Any]) -> None:
    (folder / CONFIG_BESIDE).write_text(json.dumps(content, indent=2) + "\n")


def _write_tokenizer(folder: Path, tokenizer: tokenizers.Tokenizer) -> None:
    """Like its `save`, which however raises no OSError for a full disk."""
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")


def _write_sentencepiece(tokenizer: Tokenizer, folder: Path, common: dict[str, Any]) -> str:
    """Copies the file, and writes a tokenizer.json if that gives the same ids, as it does for byte-pair models that do
    not normalise, such as Llama 2's and those trained here. (transformers, reading the file itself, loses a space at
    the beginning of a text.)"""
    processor = sentencepiece.SentencePieceProcessor()
    processor.Load(str(tokenizer.path))
    shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
    ids = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "unk_token": processor.unk_id()}
    common = common | {key: processor.id_to_piece(id) for key, id in ids.items() if id >= 0}
    made = _from_sentencepiece(processor)
    if all(made.encode(text, add_special_tokens=False).ids == tokenizer.encode(text) for text in _PROBES):
        _write_tokenizer(folder, made)
        _write_config(folder, common | {"tokenizer_class": "PreTrainedTokenizerFast"})
        return "tokenizer: the sentencepiece model, copied, and a tokenizer.json made from it"
    _write_config(folder, common | {"tokenizer_class": "LlamaTokenizer", "legacy": False})
    return (
        "tokenizer: the sentencepiece model, copied; it is not a byte-pair model without normalisation, so "
        "transformers may give other ids than were trained on"
    )


def _from_sentencepiece(processor: sentencepiece.SentencePieceProcessor) -> tokenizers.Tokenizer:
    """Turns byte-pair pieces and scores into vocabulary and merges. Of all neighbours, sentencepiece joins those whose
    piece has the highest score, the leftmost first."""
    pieces = [processor.id_to_piece(id) for id in range(processor.vocab_size())]
    controls = [piece for id, piece in enumerate(pieces) if processor.is_control(id) or processor.is_unknown(id)]
    marked = {id for id in range(len(pieces)) if processor.is_byte(id) or processor.is_unused(id)}
    joined = {piece: id for id, piece in enumerate(pieces) if id not in marked and piece not in controls}
    merges = [
        (-processor.get_score(id), id, joined[piece[:cut]], joined[piece[cut:]])
        for piece, id in joined.items()
        for cut in range(1, len(piece))
        if piece[:cut] in joined and piece[cut:] in joined
    ]
    made = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: id for id, piece in enumerate(pieces)},
            merges=[(pieces[left], pieces[right]) for *_, left, right in sorted(merges)],
            unk_token=processor.id_to_piece(processor.unk_id()),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[Any] = [normalizers.Replace(" ", _SPACE)]
    undo: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if processor.id_to_piece(processor.encode("a")[:1])[0].startswith(_SPACE):
        steps.insert(0, normalizers.Prepend(_SPACE))
        undo.append(decoders.Strip(" ", 1, 0))
    made.normalizer = normalizers.Sequence(steps)
    made.decoder = decoders.Sequence(undo)
    made.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True) for name in controls])
    if processor.bos_id() >= 0:
        made.post_processor = _bos_first(pieces[processor.bos_id()], processor.bos_id())
    return made


def _bos_first(bos: str, bos_id: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
    )


def _write_ranks(path: Path, folder: Path, common: dict[str, Any]) -> str:
    """A tokenizer.json for a Llama 3 rank file: byte-level BPE with the same ranks, split and special tokens."""
    ranks = read_ranks(path.read_bytes(), path)
    letters = _letters()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    ordered = sorted(ranks, key=lambda token: ranks[token])
    merges = [pair for token in ordered if (pair := _last_merge(token, ranks)) is not None]
    vocabulary = {spelled(token): rank for token, rank in ranks.items()}
    spelled_merges = [(spelled(left), spelled(right)) for left, right in merges]
    # As in tiktoken, a piece of text that is a token becomes that token, whether or not merges lead to it.
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=spelled_merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = llama3_special_tokens(len(ranks))
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True) for name in special])
    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    tokenizer.post_processor = _bos_first(bos, special[bos])
    _write_tokenizer(folder, tokenizer)
    _write_config(folder, common | {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos})
    return "tokenizer: a tokenizer.json made from the rank file"


def _last_merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that `token` is merged from; None for a single byte, or if merging does not lead to it."""
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 2:
        pairs = [(ranks.get(left + right, len(ranks)), at) for at, (left, right) in enumerate(pairwise(parts))]
        rank, at = min(pairs)
        if rank >= ranks[token]:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _letters() -> list[str]:
    """GPT-2's printable letter for each byte: itself where it is printable in Latin-1, else the next from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
