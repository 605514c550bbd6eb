"""Tokenizers: round trips, special tokens, and each kind compared with another implementation of the same rules."""

import base64
import hashlib
import io
import json
import random
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from titan_fast.checkpoint import tokenizer_of
from titan_fast.errors import DataError
from titan_fast.tokenizer import (
    LLAMA3_SPLIT,
    TiktokenTokenizer,
    Tokenizer,
    check_vocabulary,
    copy_tokenizer,
    is_same,
    llama3_special_tokens,
    load_tokenizer,
    train_sentencepiece,
)

STDLIB = Path(sysconfig.get_path("stdlib"))
TEXTS = [(STDLIB / name).read_text() for name in ("argparse.py", "typing.py", "tarfile.py", "difflib.py", "ast.py")]
AWKWARD = [
    "",
    " ",
    "\n",
    "a\tb\r\nc   d\n\n  ",
    "\u2581 x\u2581\u2581 \u2581",
    "nul \x00 and \x1f",
    "e\u0301 \ufdfa \ufb01 \u00a0 \u3000 \u200b \ufeff",
    "日本語 🎉 👩‍👩‍👧 \U0010ffff",
    "<s></s><unk><0x41><|begin_of_text|><|end_of_text|><|reserved_special_token_0|>",
    " leading and trailing ",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one small tokenizer of each kind; the tiktoken ranks and the HF json hold the same merges."""
    folder = tmp_path_factory.mktemp("tokenizers")
    train_sentencepiece(TEXTS, 1000, folder / "sentencepiece.model", seed=0)
    reference = byte_level_bpe(TEXTS, 1500)
    to_byte = {character: byte for byte, character in zip(*bytes_and_characters(), strict=True)}
    lines = [
        base64.b64encode(bytes(to_byte[c] for c in piece)) + b" %d\n" % rank
        for piece, rank in sorted(reference.get_vocab().items(), key=lambda item: item[1])
    ]
    (folder / "tiktoken.model").write_bytes(b"".join(lines))
    reference.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    (folder / "hf").mkdir()
    reference.save(str(folder / "hf" / "tokenizer.json"))
    return folder


def byte_level_bpe(texts: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Llama 3's scheme, by Hugging Face's implementation."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def bytes_and_characters() -> tuple[list[int], list[str]]:
    """How byte-level BPE writes bytes: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return printable + others, [chr(b) for b in printable] + [chr(256 + n) for n in range(len(others))]


@pytest.fixture(scope="module", params=["sentencepiece.model", "tiktoken.model", "hf"])
def tokenizer(request: pytest.FixtureRequest, folder: Path) -> Tokenizer:
    return load_tokenizer(folder / request.param)


@pytest.fixture(scope="module")
def all_three(folder: Path) -> list[Tokenizer]:
    return [load_tokenizer(folder / name) for name in ("sentencepiece.model", "tiktoken.model", "hf")]


def test_the_kind_is_decided_by_content(folder: Path, tmp_path: Path) -> None:
    for name, kind in (
        ("sentencepiece.model", "sentencepiece"),
        ("tiktoken.model", "tiktoken"),
        ("hf/tokenizer.json", "tokenizers"),
    ):
        misleading = tmp_path / "tokenizer.json"
        misleading.write_bytes((folder / name).read_bytes())
        found = load_tokenizer(misleading)
        assert found.kind == kind
        assert found.fingerprint == hashlib.sha256(misleading.read_bytes()).hexdigest()


def test_a_folder_is_searched(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "tokenizer.model").write_bytes((folder / "tiktoken.model").read_bytes())
    assert load_tokenizer(tmp_path).kind == "tiktoken"
    (tmp_path / "tokenizer.model").write_bytes((folder / "sentencepiece.model").read_bytes())
    assert load_tokenizer(tmp_path).kind == "sentencepiece"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"{}",
        b'{"model": 3}',
        b'{"model"',
        b"\n\x05abc",
        b"\x00" * 64,
        b"PK\x03\x04",
        b"\n" + b"\xff" * 99,
    ],
)
def test_other_content_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"unknown kind.*sentencepiece.*tiktoken.*tokenizer\.json") as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)


def test_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No such file .*; check the path; README\.md, Tokenizers, says how"):
        load_tokenizer(tmp_path / "none.model")
    with pytest.raises(DataError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", AWKWARD)
def test_round_trip_of_awkward_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= id < tokenizer.vocab_size for id in ids)
    assert tokenizer.encode_batch([text, "x"])[0] == ids


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(text=st.text())
def test_round_trip_of_any_text(all_three: list[Tokenizer], text: str) -> None:
    for tokenizer in all_three:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_lone_surrogates_become_the_replacement_character(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83c\udf89")) == "🎉"
    assert tokenizer.encode_batch(["ok", "a\ud800b"])[1] == tokenizer.encode("a\ufffdb")


def test_special_tokens_in_text_are_text(tokenizer: Tokenizer) -> None:
    special = {tokenizer.bos_id, tokenizer.eos_id}
    for text in ("<|end_of_text|>", "<|begin_of_text|>", "</s>", "<s>", "x<|end_of_text|>y", "x</s> y"):
        assert not special & set(tokenizer.encode(text))
        assert not special & {id for ids in tokenizer.encode_batch([text, text]) for id in ids}


def hugging_face_model(kind: str) -> tokenizers.Tokenizer:
    """One whose model has the special tokens among its own pieces."""
    special = ["<unk>", "<s>", "</s>"]
    lines = "\n".join(TEXTS).split("\n")
    options: dict[str, Any] = {"vocab_size": 300, "special_tokens": special, "show_progress": False}
    if kind == "unigram":
        made = tokenizers.Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer: Any = trainers.UnigramTrainer(unk_token="<unk>", **options)
    elif kind == "wordlevel":
        made = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(**options)
    else:
        made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", ignore_merges=kind == "whole words"))
        trainer = trainers.BpeTrainer(**options)
        if kind == "whole words":  # else there is no pre-tokenizer
            made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.train_from_iterator(lines[:600], trainer)
    return made


@pytest.mark.parametrize("kind", ["unigram", "wordlevel", "whole words", "merges"])
def test_a_model_that_has_the_names_among_its_pieces_reads_them_as_text(kind: str, tmp_path: Path) -> None:
    made = hugging_face_model(kind)
    made.save(str(tmp_path / "tokenizer.json"))
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))  # scores have been rounded
    tokenizer = load_tokenizer(tmp_path)
    ends = {made.token_to_id("<s>"), made.token_to_id("</s>")}
    assert {tokenizer.bos_id, tokenizer.eos_id} == ends
    for text in ("one </s> two", "one</s>two", "<s>", "</s></s> <s></s>", "<</s>>"):
        assert not ends & set(tokenizer.encode(text))
        assert tokenizer.encode_batch([text, "x"])[0] == tokenizer.encode(text)
    for text in TEXTS:
        plain = text.replace("</s>", "").replace("<s>", "")
        assert tokenizer.encode(plain) == made.encode(plain, add_special_tokens=False).ids


def test_an_end_that_is_no_special_token_in_the_file_is_text_in_a_text(folder: Path, tmp_path: Path) -> None:
    made = tokenizers.Tokenizer.from_file(str(folder / "hf" / "tokenizer.json"))
    made.add_tokens(["<stop>"])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<stop>"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id == made.token_to_id("<stop>") == tokenizer.vocab_size - 1
    assert tokenizer.decode(ids := tokenizer.encode("one<stop>two")) == "one<stop>two" and tokenizer.eos_id not in ids


def test_an_end_that_a_text_cannot_be_kept_from_is_refused(tmp_path: Path) -> None:
    """It is also the model's token for unknown words."""
    hugging_face_model("wordlevel").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<unk>"}))
    with pytest.raises(DataError, match="a text can end or begin a document: '<s>' in it is read as one"):
        load_tokenizer(tmp_path)


def test_batch_equals_one_by_one(tokenizer: Tokenizer) -> None:
    texts = [*TEXTS, *AWKWARD]
    assert [list(ids) for ids in tokenizer.encode_batch(texts)] == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch([]) == []


def test_tiktoken_equals_hugging_face_with_the_same_merges(all_three: list[Tokenizer]) -> None:
    _, ours, theirs = all_three
    assert ours.vocab_size == 1500 + 256
    assert (ours.bos_id, ours.eos_id) == (1500, 1501)  # begin and end of text, the first two after the ranks
    for text in [*TEXTS, *AWKWARD, "I'll've 12345 ÀÉ\n\n \n x  \t\r\n"]:
        assert ours.encode(text) == theirs.encode(text)


def test_sentencepiece_equals_the_library(folder: Path, all_three: list[Tokenizer]) -> None:
    library = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sentencepiece.model"))
    for text in TEXTS:
        assert all_three[0].encode(text) == library.encode(text)
    assert (all_three[0].bos_id, all_three[0].eos_id) == (library.bos_id(), library.eos_id())


def test_llama3_special_ids() -> None:
    """The published ids of Llama 3.1 (128,000 ranks)."""
    ids = llama3_special_tokens(128_000)
    published = {
        "<|begin_of_text|>": 128_000,
        "<|end_of_text|>": 128_001,
        "<|finetune_right_pad_id|>": 128_004,
        "<|start_header_id|>": 128_006,
        "<|eot_id|>": 128_009,
        "<|python_tag|>": 128_010,
        "<|reserved_special_token_247|>": 128_255,
    }
    assert published.items() <= ids.items()
    assert sorted(ids.values()) == list(range(128_000, 128_256))


def test_tiktoken_survives_long_runs(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "tiktoken.model")
    assert isinstance(tokenizer, TiktokenTokenizer)
    for text in ("a" * 1_000_000, " " * 300_000, "word " * 200_000, "x" * 30_000 + " " * 60_000 + "y" * 30_000):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        parts = tokenizer._parts(text)
        assert "".join(parts) == text
        longest = max(len(run) for part in parts for run in (*part.split(), *part.split("a")) if run)
        assert longest <= 25_000 or len(set(text)) > 1
        assert max(map(len, parts)) <= 400_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [*lines, b"!!! 1500"], "not base64"),
        (lambda lines: [*lines, b"YWJjZGVmZw== 7777"], "ranks are not 0 to"),
        (lambda lines: [b"QUJDREVG 0", *lines[1:]], "1 of the 256 single bytes"),
        (lambda lines: [*lines, b"YWI= x"], "not base64 and a rank"),
    ],
)
def test_broken_rank_files(change, message: str, folder: Path, tmp_path: Path) -> None:
    lines = (folder / "tiktoken.model").read_bytes().splitlines()
    path = tmp_path / "ranks"
    path.write_bytes(b"\n".join(change(lines)))
    with pytest.raises(DataError, match=message):
        load_tokenizer(path)


def test_hugging_face_ends_are_read_from_the_config_beside_it(folder: Path, tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "hf" / "tokenizer.json"))
    tokenizer.add_special_tokens(["<start>", "<stop>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = tmp_path / "tokenizer_config.json"
    ids = tokenizer.get_vocab()

    plain = load_tokenizer(tmp_path)
    assert (plain.bos_id, plain.eos_id) == (ids["<|begin_of_text|>"], ids["<|end_of_text|>"])
    config.write_text(json.dumps({"bos_token": {"content": "<start>"}, "eos_token": "<stop>"}))
    named = load_tokenizer(tmp_path)
    assert (named.bos_id, named.eos_id) == (ids["<start>"], ids["<stop>"])
    config.write_text(json.dumps({"bos_token": None, "eos_token": "<stop>"}))
    assert load_tokenizer(tmp_path).bos_id is None
    config.write_text(json.dumps({"eos_token": None}))
    with pytest.raises(DataError, match=r"no end-of-text token: tokenizer_config\.json's eos_token is null"):
        load_tokenizer(tmp_path)
    config.write_text(json.dumps({"eos_token": "<nowhere>"}))
    with pytest.raises(DataError, match="eos_token '<nowhere>' is not in the vocabulary"):
        load_tokenizer(tmp_path)
    config.write_text(json.dumps({"eos_token": {"content": ["<stop>"]}}))
    with pytest.raises(DataError, match=r"tokenizer_config\.json's eos_token is \['<stop>'\], not a text"):
        load_tokenizer(tmp_path)
    for content in ("{", "[]"):
        config.write_text(content)
        with pytest.raises(DataError, match=r"tokenizer_config\.json cannot be read"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.hf"])
def test_a_copy_is_the_same_tokenizer(name: str, folder: Path, tmp_path: Path) -> None:
    """Whatever its file is called, because the kind is recognised by the content."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "hf" / "tokenizer.json"))
    tokenizer.add_special_tokens(["<stop>"])
    tokenizer.save(str(tmp_path / name))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": "<stop>"}))
    original = load_tokenizer(tmp_path / name)
    copy_tokenizer(original, tmp_path / "tokenizer")
    assert original.decode([*original.encode("an end"), original.eos_id]) == "an end<stop>", "it is seen in a sample"
    (tmp_path / "tokenizer_config.json").rename(tmp_path / "of another time")
    others = load_tokenizer(tmp_path / name)
    (tmp_path / "of another time").rename(tmp_path / "tokenizer_config.json")
    assert others.fingerprint == original.fingerprint and not is_same(others, original), "documents end otherwise"
    checkpoint = tmp_path / "step-0"
    checkpoint.mkdir()
    shutil.copytree(tmp_path / "tokenizer", checkpoint / "tokenizer")
    copies = (tmp_path / "tokenizer", tokenizer_of(tmp_path), checkpoint)  # of a checkpoint, which keeps its own so
    for copy in map(load_tokenizer, copies):
        assert is_same(copy, original)
        assert (
            (copy.bos_id, copy.eos_id) == (original.bos_id, original.eos_id) == (None, tokenizer.token_to_id("<stop>"))
        )


@pytest.mark.parametrize("name", ["sentencepiece.model", "tiktoken.model", "hf/tokenizer.json"])
def test_a_copy_is_of_what_was_loaded(name: str, folder: Path, tmp_path: Path) -> None:
    """The original may be moved or replaced during a run."""
    original, beside = tmp_path / "original", tmp_path / "tokenizer_config.json"
    shutil.copyfile(folder / name, original)
    beside.write_text("{}")
    loaded = load_tokenizer(original)
    for path in (original, beside):
        path.write_bytes(b"another")
    copy_tokenizer(loaded, tmp_path / "replaced")
    for path in (original, beside):
        path.unlink()
    copy_tokenizer(loaded, tmp_path / "gone")
    for copy in (tmp_path / "replaced", tmp_path / "gone"):
        assert load_tokenizer(copy).fingerprint == loaded.fingerprint
        assert (copy / beside.name).exists() == (loaded.kind == "tokenizers")


@pytest.mark.parametrize("charsmap", [b"\0\0\0", b"\xff\xff\xff\xffabc", b"\x10\0\0\0" + b"x" * 20])
def test_a_panic_of_tokenizers_is_a_sentence(charsmap: bytes, folder: Path, tmp_path: Path) -> None:
    """Of the last table it is one when a text is read."""
    content = json.loads((folder / "hf" / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    for read in ("encode", "encode_batch"):
        with pytest.raises(DataError, match=r"the tokenizer\.json cannot be used: .* \[\S*tokenizer\.json\]; fix it"):
            getattr(load_tokenizer(tmp_path), read)("abc" if read == "encode" else ["abc", "def"])


def test_an_interrupt_of_tokenizers_is_no_failure_of_the_file(folder: Path) -> None:
    tokenizer: Any = load_tokenizer(folder / "hf")
    with pytest.raises(KeyboardInterrupt), tokenizer._used():
        raise KeyboardInterrupt


def test_hugging_face_without_an_end_is_refused(tmp_path: Path) -> None:
    byte_level_bpe(["abc"], 300).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="no end-of-text token"):
        load_tokenizer(tmp_path)


def test_saved_truncation_padding_and_template_lose_and_add_nothing(folder: Path, tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "hf" / "tokenizer.json"))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=32)
    begin = "<|begin_of_text|>"
    template = tokenizers.processors.TemplateProcessing(f"{begin} $A", None, [(begin, tokenizer.token_to_id(begin))])
    tokenizer.post_processor = template
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert ours.decode(ours.encode(TEXTS[0])) == TEXTS[0]
    assert len(ours.encode("a")) == 1
    assert [len(ids) for ids in ours.encode_batch(["a", ""])] == [1, 0]


def test_a_model_with_dummy_prefix_keeps_the_usual_manners(tmp_path: Path) -> None:
    """Like Llama 2's own: a space before the text, which decoding removes again."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(TEXTS).split("\n")),
        model_writer=model,
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=3,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    library = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ours = load_tokenizer(tmp_path)
    for text in ("def main", "a\u2581b", "日本"):
        assert ours.encode(text) == library.encode(text)
    assert ours.decode(ours.encode("def main")) == "def main"


def test_training_is_deterministic_and_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path, seed in zip(paths, (0, 0, 1), strict=True):
        train_sentencepiece(iter(TEXTS * 3), 600, path, seed)
    first, second, third = (load_tokenizer(path) for path in paths)
    assert first.fingerprint == second.fingerprint
    assert first.vocab_size == second.vocab_size == third.vocab_size == 600
    assert not (captured := capfd.readouterr()).out + captured.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


def test_training_draws_a_sample(tmp_path: Path) -> None:
    """With far more text than is used, another seed draws other documents."""
    shuffled = random.Random(0)
    texts = [" ".join(shuffled.sample(TEXTS[0].split(), 2000)) + f" unique{n}" * 20 for n in range(300)]
    for seed in (0, 1):
        train_sentencepiece(texts, 500, tmp_path / str(seed), seed)
    assert load_tokenizer(tmp_path / "0").fingerprint != load_tokenizer(tmp_path / "1").fingerprint


def test_training_on_too_little_text_names_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a vocabulary of 4096 is more than the \d+ pieces"):
        train_sentencepiece(["a small text\nof two lines"], 4096, tmp_path / "t", 0)
    kanji = "".join(map(chr, range(0x4E00, 0x5800)))
    with pytest.raises(
        DataError, match=r"a vocabulary of 400 is less than the \d+ .* take; set model.vocab_size higher"
    ):
        train_sentencepiece([kanji], 400, tmp_path / "t", 0)
    with pytest.raises(DataError, match="a vocabulary of 200 has no room for 259"):
        train_sentencepiece(TEXTS, 200, tmp_path / "t", 0)
    with pytest.raises(DataError, match=r"vocabulary|learned"):
        train_sentencepiece([], 4096, tmp_path / "t", 0)
    assert not (tmp_path / "t").exists()


def test_a_vocabulary_larger_than_the_models_is_refused(tokenizer: Tokenizer) -> None:
    check_vocabulary(tokenizer, tokenizer.vocab_size)
    check_vocabulary(tokenizer, tokenizer.vocab_size + 1)
    with pytest.raises(DataError, match=f"has {tokenizer.vocab_size} ids .* {tokenizer.vocab_size - 1}"):
        check_vocabulary(tokenizer, tokenizer.vocab_size - 1)
