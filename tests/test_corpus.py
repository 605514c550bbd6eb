"""Documents from files of every kind, and what happens to rows and files that are bad."""

import csv
import errno
import gzip
import json
import os
import random
import sysconfig
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from titan_fast import corpus as corpus_module
from titan_fast.corpus import RowLedger, open_corpus, stdlib_corpus
from titan_fast.errors import DataError

TEXTS = ["first\ntwo lines", "zweiter \u00fc \U0001f389", 'third, "quoted"\r\nwith \t tabs', "fourth"]


def read(path: Path, column: str = "text") -> tuple[list[str], RowLedger]:
    ledger = RowLedger()
    return [document.text for document in open_corpus(path, column).documents(ledger)], ledger


def write_rows(path: Path, texts: list) -> None:
    """Rows with a text field and another, in the format given by the suffix."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)))
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"id": n, "text": text} for n, text in enumerate(texts)], indent=2))
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("id", "text"), *enumerate(texts)])
    else:
        table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
        pyarrow.parquet.write_table(table, path, row_group_size=3, write_page_checksum=True)


def compress(path: Path, suffix: str) -> Path:
    packed = path.with_name(path.name + suffix)
    if suffix == ".gz":
        packed.write_bytes(gzip.compress(path.read_bytes()))
    else:
        half = len(path.read_bytes()) // 2  # two frames, as parallel compressors write
        parts = (path.read_bytes()[:half], path.read_bytes()[half:])
        packed.write_bytes(b"".join(pyarrow.compress(part, "zstd", asbytes=True) for part in parts))
    path.unlink()
    return packed


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_rows_of_every_kind(kind: str, compression: str, tmp_path: Path) -> None:
    path = tmp_path / f"data{kind}"
    write_rows(path, TEXTS)
    if compression:
        path = compress(path, compression)
    texts, ledger = read(path)
    assert texts == TEXTS
    assert ledger.rows == 4 and not ledger.summary()


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_text_files_in_folders_are_read_in_sorted_order(compression: str, tmp_path: Path) -> None:
    names = ["b/2.md", "a.txt", "b/10.txt", "c.py", "b/d/x.TXT"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}\r\n", newline="")
        if compression:
            compress(tmp_path / name, compression)
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "y.txt").write_text("no")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    corpus = open_corpus(tmp_path, "text")
    documents = list(corpus.documents(RowLedger()))
    expected = ["a.txt", "b/10.txt", "b/2.md", "b/d/x.TXT", "c.py"]
    assert [document.file for document in documents] == [name + compression for name in expected]
    assert [document.text for document in documents] == [f"text of {name}\r\n" for name in expected]
    assert corpus.other_files == 1


def test_json_may_be_one_row_over_many_lines_or_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"text": "alone"}, indent=2))
    (tmp_path / "b.json").write_text('{"text": "x"}\n{"text": "y"}\n')
    (tmp_path / "c.json").write_bytes(b'\xef\xbb\xbf[{"text": "with a byte order mark"}]')
    (tmp_path / "d.json").write_bytes(b'\xef\xbb\xbf{\n "text": "over lines, with a mark"\n}\n')
    assert read(tmp_path)[0] == ["alone", "x", "y", "with a byte order mark", "over lines, with a mark"]


BAD_LINES = [
    (b'{"text": "good"}', None),
    (b'{"other": 1}', "without 'text'"),
    (b'{"text": null}', "null"),
    (b'{"text": 7}', "not a string"),
    (b'{"text": "\xff\xfe"}', "invalid UTF-8"),
    (b'{"text": ""}', "empty"),
    (b'{"text": " \\n "}', "empty"),
    (b'{"text": "broken', "broken JSON"),
    (b"[" * 100_000, "broken JSON"),
    (b'["text"]', "not an object"),
    (b"", None),
    (b'{"text": "a\\ud800b"}', "with lone surrogates replaced"),
]


def test_bad_json_lines_are_counted_with_their_place(tmp_path: Path) -> None:
    lines = [line for line, _ in BAD_LINES] + [b'{"text": "good %d"}' % n for n in range(20)]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    texts, ledger = read(tmp_path)
    assert texts == ["good", "a\ufffdb", *(f"good {n}" for n in range(20))]
    reasons = [reason for _, reason in BAD_LINES if reason]
    assert ledger.passed_over | ledger.mended == {reason: reasons.count(reason) for reason in reasons}
    for number, (_, reason) in enumerate(BAD_LINES, start=1):
        if reason and reason not in [earlier for _, earlier in BAD_LINES[: number - 1]]:
            assert ledger.first_place[reason] == f"rows.jsonl:{number}"
    assert ledger.rows == len(lines) - 1  # a blank line is no row
    assert ledger.summary().startswith("9 of 31 rows skipped: 1 without 'text' (first rows.jsonl:2)")
    assert "1 of 31 rows repaired: 1 with lone surrogates replaced (first rows.jsonl:12)" in ledger.summary()


def test_bad_csv_rows(tmp_path: Path) -> None:
    content = b'id,text\n1,good\n\n2\n3,\n4,"caf\xe9"\n5,"x"y\n6,"over\ntwo lines"\n' + b"7,more\n" * 5
    (tmp_path / "rows.csv").write_bytes(content)
    texts, ledger = read(tmp_path)
    assert texts == ["good", "over\ntwo lines", *["more"] * 5]
    assert ledger.passed_over == {"null": 1, "empty": 1, "invalid UTF-8": 1, "broken CSV": 1}
    assert ledger.first_place["broken CSV"] == "rows.csv:7"


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv", ".txt.gz"])
def test_a_file_in_utf_16_is_passed_over(kind: str, tmp_path: Path) -> None:
    """As written by PowerShell's >."""
    content = "\n".join(["text", *['{"text": "hello"}'] * 9]).encode("utf-16")
    (tmp_path / f"a{kind}").write_bytes(gzip.compress(content) if kind.endswith(".gz") else content)
    with pytest.raises(DataError, match=r"1 of 1 rows skipped: 1 whole file in UTF-16, not UTF-8 \(first a"):
        read(tmp_path)
    (tmp_path / "good.txt").write_text("some text")
    texts, ledger = read(tmp_path)
    assert texts == ["some text"] and ledger.rows == 2


def test_a_csv_row_that_a_comma_cut_is_passed_over(tmp_path: Path) -> None:
    rows = ["id,text", "1,good", "2,one, two", "3,a comma at the end,", *["4,more"] * 3]
    (tmp_path / "rows.csv").write_text("\n".join(rows))
    texts, ledger = read(tmp_path)
    assert texts == ["good", "a comma at the end", *["more"] * 3]
    assert ledger.passed_over == {"more fields than the header": 1}
    assert ledger.first_place["more fields than the header"] == "rows.csv:3"


def test_a_stray_quote_in_csv_is_counted_by_the_lines_it_swallows(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text\n" + "good\n" * 10 + '"never closed\n' + "lost\n" * 5)
    texts, ledger = read(tmp_path)
    assert texts == ["good"] * 10
    assert ledger.passed_over == {"broken CSV": 6}
    assert ledger.first_place["broken CSV"] == "rows.csv:12"


@pytest.mark.parametrize("kind", ["string", "string_view"])
def test_bad_parquet_rows(kind: str, tmp_path: Path) -> None:
    is_view = kind == "string_view"
    of_bytes, of_text = (
        (pyarrow.binary_view(), pyarrow.string_view()) if is_view else (pyarrow.binary(), pyarrow.string())
    )
    raw = pyarrow.array([b"good", b"\xff", None, b"", b"also good", b"and good"], of_bytes)
    text = pyarrow.Array.from_buffers(of_text, 6, raw.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "rows.parquet")
    texts, ledger = read(tmp_path / "rows.parquet")
    assert texts == ["good", "also good", "and good"]
    assert ledger.passed_over == {"invalid UTF-8": 1, "null": 1, "empty": 1}
    assert ledger.first_place["null"] == "rows.parquet:3"


@pytest.mark.parametrize("strings", [pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())])
def test_other_arrow_strings(strings: pyarrow.DataType, tmp_path: Path) -> None:
    column = pyarrow.array(["a", "b", "a"]).cast(strings)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "rows.parquet")
    assert read(tmp_path)[0] == ["a", "b", "a"]


def test_a_huge_document_is_cut(tmp_path: Path) -> None:
    huge = "".join(f"line {n} of a very long document, with some words in it\n" for n in range(900_000))
    assert len(huge) > 50_000_000
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": huge}) + "\n" + json.dumps({"text": "small"}) + "\n")
    texts, ledger = read(tmp_path)
    assert "".join(texts) == huge + "small" and texts[-1] == "small"
    assert max(map(len, texts)) <= corpus_module.LONGEST_DOCUMENT
    assert list(ledger.mended.values()) == [1] and not ledger.passed_over


def test_a_line_too_long_to_read_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "LONGEST_ROW", 1000)
    rows = [{"text": "a"}, {"text": "b" * 5000}, {"text": "c" * 983}, {"text": "d"}, {"text": "e"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts, ledger = read(tmp_path)
    assert [text[0] for text in texts] == ["a", "c", "d", "e"]
    assert ledger.passed_over == {"longer than 1000 bytes": 1}
    assert ledger.rows == 5


def test_few_text_files_are_cut_at_line_ends(tmp_path: Path) -> None:
    text = "".join(f"{n}: {'x' * (n % 90)}\n" for n in range(20_000))
    (tmp_path / "book.txt").write_text(text)
    texts, _ = read(tmp_path / "book.txt")
    assert "".join(texts) == text
    assert 90 <= len(texts) <= 110
    short = text[: text.index("\n", 5000) + 1]
    (tmp_path / "short.txt").write_text(short)
    texts, _ = read(tmp_path)
    assert "".join(texts) == text + short
    assert 90 <= len(texts) <= 110 and texts[-1] == short
    for number in range(100):
        (tmp_path / f"z{number}.txt").write_text("more\n")
    assert all(piece.endswith("\n") for piece in texts)
    assert len(read(tmp_path)[0]) == 102  # where there are many, a file is a document


def test_text_without_line_ends_is_cut_between_characters(tmp_path: Path) -> None:
    text = "ab" + "\u00e9\u20ac\U0001f389a" * 30_000  # so that 3,000 bytes end inside a character
    (tmp_path / "line.txt").write_text(text, encoding="utf-8")
    texts, ledger = read(tmp_path / "line.txt")
    assert "".join(texts) == text and len(texts) > 50
    assert not ledger.summary()


def test_only_the_first_character_of_a_file_is_a_byte_order_mark(tmp_path: Path) -> None:
    text = ("\ufeff" + "a" * 2045) * 30  # one line, of which each piece of 2048 bytes begins with it
    (tmp_path / "line.txt").write_text(text, encoding="utf-8")
    texts, _ = read(tmp_path / "line.txt")
    assert "".join(texts) == text[1:] and len(texts) == 30


def test_invalid_utf8_in_a_text_file_costs_one_piece(tmp_path: Path) -> None:
    lines = [b"line %d of some text\n" % n for n in range(5000)]
    lines[2500] = b"bad \xff byte\n"
    (tmp_path / "book.txt").write_bytes(b"".join(lines))
    texts, ledger = read(tmp_path / "book.txt")
    assert ledger.passed_over == {"invalid UTF-8": 1}
    assert ledger.first_place["invalid UTF-8"] == "book.txt:2501"
    assert 4800 < sum(text.count("\n") for text in texts) < 5000


def test_the_standard_library_without_its_tests() -> None:
    corpus = stdlib_corpus()
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root).as_posix() for path in corpus.files]
    assert "argparse.py" in names and "json/decoder.py" in names
    assert not [name for name in names if {"test", "tests", "idle_test", "site-packages"} & set(name.split("/"))]
    assert [name.split("/") for name in names] == sorted(name.split("/") for name in names)
    ledger = RowLedger()
    documents = {document.file: document.text for document in corpus.documents(ledger)}
    assert documents["argparse.py"].encode() == (root / "argparse.py").read_bytes()
    assert len(documents) + ledger.passed_over.get("empty", 0) == len(names)


def test_fingerprint_follows_the_files(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    before = open_corpus(tmp_path, "text").fingerprint()
    assert open_corpus(tmp_path, "text").fingerprint() == before
    assert open_corpus(tmp_path, "body").fingerprint() != before
    (tmp_path / "b.txt").write_text("longer")
    assert open_corpus(tmp_path, "text").fingerprint() != before


def test_what_is_no_file_is_counted_and_not_read(tmp_path: Path) -> None:
    """A link to nothing, a pipe that nobody writes to, a linked folder."""
    (tmp_path / "real.txt").write_text("real")
    (tmp_path / "nothing.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "linked").symlink_to(tmp_path.parent)
    corpus = open_corpus(tmp_path, "text")
    assert [path.name for path in corpus.files] == ["real.txt"] and corpus.other_files == 3


def test_a_file_that_is_linked_to_is_read_once(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere.txt"
    folder.mkdir()
    elsewhere.write_text("elsewhere")
    (folder / "real.txt").write_text("real")
    for name, target in {
        "a": folder / "real.txt",
        "b": elsewhere,
        "c": folder / "b.txt",
        "z": Path("real.txt"),
    }.items():
        (folder / f"{name}.txt").symlink_to(target)
    corpus = open_corpus(folder, "text")
    assert [path.name for path in corpus.files] == ["b.txt", "real.txt"] and corpus.other_files == 3


def test_a_run_directory_in_the_data_is_not_read(tmp_path: Path) -> None:
    """Its growing log would otherwise make another data set at each start. A folder with only a config is not one."""
    (tmp_path / "real.txt").write_text("real")
    for name in ("outputs/run/config.toml", "outputs/run/run.lock", "outputs/run/checkpoint/step-5/state.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "config.toml").touch()
    (tmp_path / "package" / "module.py").write_text("pass")
    corpus = open_corpus(tmp_path, "text")
    assert [path.name for path in corpus.files] == ["module.py", "real.txt"] and corpus.other_files == 2
    before = corpus.fingerprint()
    (tmp_path / "outputs" / "run" / "run.lock").rename(tmp_path / "outputs" / "run" / "metrics.jsonl")
    assert open_corpus(tmp_path, "text").fingerprint() == before


def test_token_shards_in_the_data_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("real")
    (tmp_path / "shards").mkdir()
    for name in ("index.json", "offsets.bin", "origins.bin", "tokens-00000.bin"):
        (tmp_path / "shards" / name).touch()
    corpus = open_corpus(tmp_path, "text")
    assert [path.name for path in corpus.files] == ["real.txt"] and corpus.other_files == 1


def test_a_folder_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real.txt").write_text("real")
    (tmp_path / "closed").mkdir()
    scan = os.scandir

    def refusing(path: Any) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match=r"a folder cannot be read: Permission denied \[.*closed\]"):
        open_corpus(tmp_path, "text")


def refused(path: Path, column: str = "text") -> str:
    with pytest.raises(DataError) as caught:
        read(path, column)
    assert str(path) in str(caught.value) or path.name in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_a_mark_is_no_text(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("the quick brown fox\n".encode(encoding) * 20)
    (tmp_path / "b.txt").write_text("the quick brown fox, and one \0 among letters\n" * 20)
    texts, ledger = read(tmp_path)
    assert "".join(texts) == (tmp_path / "b.txt").read_text()
    assert ledger.first_place == {"with NUL for every eighth character and more (UTF-16, or no text)": "a.txt:1"}


def test_data_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "no such file or folder" in refused(tmp_path / "nowhere")
    assert "it is empty" in refused(tmp_path)
    (tmp_path / "x.exe").write_text("x")
    assert "unknown kind (.exe)" in refused(tmp_path / "x.exe")
    assert "none of its 1 files is of a known kind (.exe)" in refused(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path.parent)
    assert "none of its 2 files is of a known kind" in refused(tmp_path)
    (tmp_path / "plain").write_text("x")
    assert "unknown kind (no suffix)" in refused(tmp_path / "plain")


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_column_that_no_row_has_names_those_there_are(kind: str, tmp_path: Path) -> None:
    write_rows(tmp_path / f"rows{kind}", TEXTS)
    assert "no row has the text column 'body'; the columns are id, text" in refused(tmp_path / f"rows{kind}", "body")


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_table_without_the_column_among_texts_is_passed_over(kind: str, tmp_path: Path) -> None:
    write_rows(tmp_path / f"b{kind}", ["one", "two"])
    for name in ("a.txt", "c.txt"):
        (tmp_path / name).write_text("some text, much more than in the table" * 200)
    texts, ledger = read(tmp_path, "body")
    assert len(texts) >= 2
    assert list(ledger.first_place.values()) == [f"b{kind}" + (":1" if "json" in kind else "")]
    assert "without 'body' (first b" in ledger.summary()


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet"])
def test_a_table_without_the_column_that_is_most_of_the_data_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    write_rows(tmp_path / f"data{kind}", TEXTS * 100)
    (tmp_path / "README.md").write_text("a data set")
    with pytest.raises(DataError, match=rf"no row has the text column 'body'; .* \[data\{kind}.*or give data that"):
        read(tmp_path, "body")


def test_data_of_which_the_larger_part_lacks_the_column_is_refused_as_that(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "some words\n" * 5)
    (tmp_path / "b.csv").write_text("name\n" + "some other words\n" * 50)
    with pytest.raises(
        DataError, match=r"most of the data lacks the text column 'text'; the columns are name \[b.csv\]"
    ):
        read(tmp_path)


def test_a_missing_column_is_said_before_everything_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * 20}) + "\n" for _ in range(30_000)))
    ledger = RowLedger()
    with pytest.raises(DataError, match="no row has the text column 'body'"):
        list(open_corpus(path, "body").documents(ledger))
    assert ledger.rows < 30_000


def test_mostly_bad_rows_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n' * 9 + '{"text": null}\n' * 10)
    assert "most rows cannot be used: 10 of 19 rows skipped: 10 null (first rows.jsonl:10)" in refused(path)
    path.write_text('{"text": "good"}\n' * 10 + '{"text": null}\n' * 10)
    assert len(read(path)[0]) == 10


def test_empty_rows_are_usual_unless_all_are(tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / f"{number}.py").touch()
    (tmp_path / "real.py").write_text("pass")
    texts, ledger = read(tmp_path)
    assert texts == ["pass"] and ledger.passed_over == {"empty": 9} and ledger.rows == 10
    (tmp_path / "real.py").write_text("\n")
    assert "most rows cannot be used: 10 of 10 rows skipped: 10 empty (first 0.py:1)" in refused(tmp_path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(bytes(content))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def test_a_damaged_block_of_gzip_is_named(tmp_path: Path) -> None:
    """Its first bytes are the deflate stream's, where zlib raises an error of its own."""
    path = tmp_path / "rows.txt.gz"
    content = bytearray(gzip.compress(b"hello world " * 5000))
    content[12] ^= 0x55
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot read the file"):
        read(path)


def test_a_text_in_csv_may_be_long(tmp_path: Path) -> None:
    csv.field_size_limit(131_072)  # Python's default
    path = tmp_path / "rows.csv"
    path.write_text("text\n" + "a" * 200_000 + "\nb\n")
    assert [len(text) for text in read(path)[0]] == [200_000, 1]


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty])
@pytest.mark.parametrize("kind", [".parquet", ".jsonl.gz", ".jsonl.zst"])
def test_a_damaged_file_is_named(kind: str, damage, tmp_path: Path) -> None:
    chance = random.Random(0)  # nothing twice: a damaged reference to earlier text must lead to other text
    texts = [" ".join(str(chance.random()) for _ in range(9)) for _ in range(500)]
    path = tmp_path / f"rows{kind.removesuffix('.gz').removesuffix('.zst')}"
    if kind == ".parquet":
        table = pyarrow.table({"text": texts})
        pyarrow.parquet.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    else:
        write_rows(path, texts)
    if kind != path.suffix:
        path = compress(path, Path(kind).suffix)
    assert read(path)[0] == texts
    damage(path)
    if damage is empty and kind != ".parquet":
        assert read(path)[0] == []  # an empty archive is an empty file; that there is no document is said later
    elif damage is flip_a_bit and kind == ".jsonl.zst":
        refuse_or_differ(path, texts)
    else:
        assert str(path) in refused(path)


def refuse_or_differ(path: Path, texts: list[str]) -> None:
    """zstd frames carry a checksum only when the writer asked for one."""
    try:
        assert read(path)[0] != texts
    except DataError as error:
        assert str(path) in str(error)


def test_a_zstd_window_too_large_is_said_so(tmp_path: Path) -> None:
    """A frame made by hand: magic number, no flags, a window of 256 MiB, and one last block of three raw bytes."""
    path = tmp_path / "rows.txt.zst"
    for exponent, usable in ((17, True), (18, False)):
        path.write_bytes(b"\x28\xb5\x2f\xfd" + bytes([0, exponent << 3]) + (1 | 3 << 3).to_bytes(3, "little") + b"abc")
        if usable:
            assert read(path)[0] == ["abc"]
        else:
            assert "compress it again with a window of 128 MiB at most" in refused(path)


def test_a_broken_json_array_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"text": "a"}, {"text": ')
    assert "the JSON file is broken" in refused(tmp_path / "rows.json")


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    content=st.one_of(
        st.binary(max_size=300),
        st.lists(st.sampled_from([line for line, _ in BAD_LINES]), max_size=6).map(b"\n".join),
        st.text(alphabet='text",\n\r{}[]:\x00\ud800é ', max_size=80).map(lambda s: s.encode("utf-8", "surrogatepass")),
    ),
    suffix=st.sampled_from(
        [".txt", ".jsonl", ".json", ".csv", ".parquet", ".txt.gz", ".jsonl.gz", ".csv.gz", ".json.zst"]
    ),
)
def test_any_bytes_give_documents_or_a_sentence(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"any{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    try:
        texts, ledger = read(path)
    except DataError as error:
        assert "\n" not in str(error)
        return
    for text in texts:
        assert text.encode() and not text.isspace()
    assert sum(ledger.passed_over.values()) <= ledger.rows
