"""Exported tokenizers: transformers' ids, compared with this project's own encoders'."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from test_tokenizer import AWKWARD, TEXTS, byte_level_bpe, bytes_and_characters
from transformers import AutoTokenizer

from titan_fast.hf_tokenizer import write_tokenizer
from titan_fast.tokenizer import load_tokenizer, train_sentencepiece

SAMPLES = [*AWKWARD, *(text[:3000] for text in TEXTS), "naïve  12345678 don't\r\n\tHeLLo", "x" * 90, "\u00a0\u3000"]


def agrees(source: Path, out: Path, texts: list[str]) -> None:
    """Equal ids for every text: without special tokens, and with them, which puts BOS first."""
    out.mkdir()
    ours = load_tokenizer(source)
    write_tokenizer(ours, out, 512)
    theirs = AutoTokenizer.from_pretrained(out)
    for text in texts:
        ids = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ids == ours.encode(text), text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert theirs.model_max_length == 512
    valid = [text for text in texts if ours.decode(ours.encode(text)) == text]
    assert len(valid) > len(texts) / 2
    for text in valid:
        assert theirs.decode(ours.encode(text), clean_up_tokenization_spaces=False) == text


def without_space_symbol(texts: list[str]) -> list[str]:
    return [text for text in texts if "\u2581" not in text]


def test_sentencepiece_trained_here(tmp_path: Path) -> None:
    train_sentencepiece(TEXTS, 1000, tmp_path / "tokenizer.model", seed=0)
    # Control characters of Llama's alphabet are spelled in bytes by both; the space symbol is documented as different.
    agrees(tmp_path / "tokenizer.model", tmp_path / "out", without_space_symbol(SAMPLES))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.encode("def")[0] == theirs.bos_token_id


def test_sentencepiece_that_puts_a_space_first_as_llama_2_does(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "tokenizer"), model_type="bpe", vocab_size=1000,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=3,
        max_sentence_length=100_000,
    )  # fmt: skip
    agrees(tmp_path / "tokenizer.model", tmp_path / "out", without_space_symbol(SAMPLES))


@pytest.mark.parametrize(
    "changes", [{"model_type": "unigram"}, {"model_type": "bpe", "normalization_rule_name": "nmt_nfkc"}]
)
def test_sentencepiece_that_cannot_be_copied_exactly_is_said_to_be(changes: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    options: dict[str, Any] = {
        "byte_fallback": True,
        "minloglevel": 3,
        "max_sentence_length": 100_000,
    }
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "t"), vocab_size=600, **options, **changes
    )
    (tmp_path / "out").mkdir()
    assert "may give other ids" in write_tokenizer(load_tokenizer(tmp_path / "t.model"), tmp_path / "out", 512)
    assert not (tmp_path / "out" / "tokenizer.json").exists() and (tmp_path / "out" / "tokenizer.model").exists()


def test_llama_3_ranks(tmp_path: Path) -> None:
    to_byte = {character: byte for byte, character in zip(*bytes_and_characters(), strict=True)}
    pieces = sorted(byte_level_bpe(TEXTS, 1500).get_vocab().items(), key=lambda item: item[1])
    lines = [base64.b64encode(bytes(to_byte[c] for c in piece)) + b" %d\n" % rank for piece, rank in pieces]
    # A token that no merges lead to, as among Llama 3's ranks: it is still found if it is a whole word.
    unreachable = "qzqzj"
    lines.append(base64.b64encode(unreachable.encode()) + b" %d\n" % len(lines))
    source = tmp_path / "tokenizer.model"
    source.write_bytes(b"".join(lines))
    assert load_tokenizer(source).encode(unreachable) == [1500]
    agrees(source, tmp_path / "out", [*SAMPLES, unreachable, f"a {unreachable} b{unreachable}"])
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.encode("def")[0] == theirs.bos_token_id
    assert theirs.encode("<|eot_id|>", add_special_tokens=False) == [1501 + 9]
    again = load_tokenizer(tmp_path / "out")
    assert [again.encode(text) for text in TEXTS] == [load_tokenizer(source).encode(text) for text in TEXTS]


@pytest.mark.parametrize("with_config", [False, True])
def test_tokenizer_json(with_config: bool, tmp_path: Path) -> None:
    made = byte_level_bpe(TEXTS, 1200)
    made.add_special_tokens(["<s>", "</s>"])
    (tmp_path / "source").mkdir()
    made.save(str(tmp_path / "source" / "tokenizer.json"))
    if with_config:
        config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast",
                  "model_max_length": 512}  # fmt: skip
        (tmp_path / "source" / "tokenizer_config.json").write_text(json.dumps(config))
    agrees(tmp_path / "source" / "tokenizer.json", tmp_path / "out", SAMPLES)
    same = (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "source" / "tokenizer.json").read_bytes()
    assert same and tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).get_vocab_size() == 1202
