"""Any config and any data file: success, or a sentence with a documented exit status, but no other exception.

TITAN_FAST_FUZZ is the number of cases of each test; without it a small, fixed set is tried.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from titan_fast import manifest, safe_unpickle
from titan_fast.config import Config, known_keys, mesh_degrees, parse, to_dict
from titan_fast.corpus import RowLedger, open_corpus
from titan_fast.errors import ConfigError, DataError
from titan_fast.run_directory import open_run_directory

CASES = int(os.environ.get("TITAN_FAST_FUZZ", "60"))
FIXED = "TITAN_FAST_FUZZ" not in os.environ
pytestmark = pytest.mark.timeout(120 if FIXED else 7200)

fuzz = settings(
    max_examples=CASES, deadline=None, derandomize=FIXED, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)  # fmt: skip

KEYS = sorted(known_keys())
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.integers(-3, 9) | st.floats() | st.text(max_size=12)
    | st.sampled_from(["auto", "none", "full", "True", "1e3", "-1", "0x10", "nan", "", " ", "--help", "a b", "\x00"])
)  # fmt: skip
TOML_SCALARS = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=12) | st.dates()
TOML_VALUES = st.recursive(
    TOML_SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(KEYS) | st.sampled_from([key.replace("_", "-") for key in KEYS]) | st.text(max_size=14)


def accepted(argv: list[str]) -> Config | None:
    """The config, or None if it was refused with a sentence."""
    try:
        config = parse(argv)
    except ConfigError as error:
        assert error.exit_status == 2 and "\n" not in str(error), repr(str(error))
        return None
    except SystemExit as stop:
        assert stop.code in (0, None) and any(word in ("-h", "--help") for word in argv), argv
        return None
    assert parse_again(config) == config, "the saved config is the same config"
    return config


def parse_again(config: Config) -> Config:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        path.write_text(tomli_w.dumps(to_dict(config)), encoding="utf-8")
        return parse(["--config", str(path)])


@fuzz
@given(st.lists(st.tuples(NAMES, SCALARS, st.booleans()), max_size=6), st.integers(1, 64))
@example([("training.seq_len", "9" * 400, False)], 1)
@example([("model.dim", 0, False), ("model.n_heads", 0, False)], 3)
def test_any_command_line(options: list[tuple[str, Any, bool]], processes: int) -> None:
    argv = []
    for name, value, joined in options:
        argv += [f"--{name}={value}"] if joined else [f"--{name}", str(value)]
    config = accepted(argv)
    if config is not None:
        try:
            mesh_degrees(config.parallelism, processes)
        except ConfigError as error:
            assert error.exit_status == 2


@fuzz
@given(st.lists(st.text(max_size=16), max_size=5))
@example(["--", "x"])
@example(["-", "-h"])
def test_any_words(argv: list[str]) -> None:
    accepted(argv)


@fuzz
@given(
    st.dictionaries(
        st.sampled_from(sorted({key.partition(".")[0] for key in KEYS})) | st.text(max_size=8),
        st.dictionaries(
            st.sampled_from([key.partition(".")[2] for key in KEYS]) | st.text(max_size=8), TOML_VALUES, max_size=4
        ) | TOML_VALUES,
        max_size=4,
    )
)  # fmt: skip
def test_any_toml_tree(tree: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.toml"
        path.write_text(tomli_w.dumps(tree), encoding="utf-8")
        accepted(["--config", str(path)])


@fuzz
@given(st.binary(max_size=300))
@example(b"\xff\xfe")
@example(b"[a]\nb = " + b"[" * 5000)
@example(b"a = 1979-05-27T07:32:00Z")
def test_any_bytes_as_config(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.toml"
        path.write_bytes(content)
        accepted(["--config", str(path)])
        (Path(folder) / "config.toml").write_bytes(content)  # as what an earlier run has left
        try:
            open_run_directory(parse([f"--job.dump_folder={folder}"]))
        except ConfigError as error:
            assert error.exit_status == 2


SUFFIXES = [".txt", ".md", ".jsonl", ".json", ".parquet", ".csv", ".jsonl.gz", ".txt.zst", ".csv.gz", ".parquet.zst"]
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
ROWS = st.lists(st.dictionaries(st.sampled_from(["text", "id"]), JSON_VALUES, max_size=2), max_size=8)
NEARLY_JSON = ROWS.map(lambda rows: "\n".join(json.dumps(row) for row in rows).encode())
CONTENT = st.binary(max_size=400) | NEARLY_JSON | st.tuples(NEARLY_JSON, st.binary(max_size=9)).map(b"".join)


def read_all(path: Path) -> None:
    """Reads it as training data is read: documents of text, or a DataError."""
    try:
        corpus = open_corpus(path, "text")
        for document in corpus.documents(RowLedger()):
            assert isinstance(document.text, str)
            document.text.encode()  # no lone surrogates: a tokenizer would fail on them later
    except DataError as error:
        assert error.exit_status == 3 and "\n" not in str(error), repr(str(error))


@fuzz
@given(CONTENT, st.sampled_from(SUFFIXES))
@example(b"[" * 20_000, ".json")
@example(b'{"text": ' + b"[" * 20_000, ".jsonl")
@example(b'text\n"' + b"x" * 200_000, ".csv")
@example(b"", ".parquet")
@example(b"PAR1" * 4, ".parquet")
def test_any_bytes_as_data(content: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"any{suffix}"
        path.write_bytes(content)
        read_all(path)


def compressed(content: bytes, suffix: str) -> bytes:
    import gzip

    import pyarrow

    if suffix.endswith(".gz"):
        return gzip.compress(content, mtime=0)
    return pyarrow.compress(content, codec="zstd", asbytes=True) if suffix.endswith(".zst") else content


def good_file(suffix: str) -> bytes:
    texts = [f"document {number} of a file that was whole" for number in range(40)]
    if ".parquet" in suffix:
        import io

        import pyarrow
        import pyarrow.parquet

        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), buffer, write_page_checksum=True)
        return buffer.getvalue()
    if ".csv" in suffix:
        return ("text\n" + "\n".join(f'"{text}"' for text in texts)).encode()
    if ".json" in suffix and ".jsonl" not in suffix:
        return json.dumps([{"text": text} for text in texts]).encode()
    return "\n".join(json.dumps({"text": text}) if ".jsonl" in suffix else text for text in texts).encode()


@fuzz
@given(
    st.sampled_from(SUFFIXES),
    st.lists(st.tuples(st.floats(0, 0.9999), st.integers(0, 255)), max_size=6),
    st.floats(0, 1),
    st.booleans(),
)
def test_a_good_file_damaged_anyhow(
    suffix: str, edits: list[tuple[float, int]], keep: float, compresses_first: bool
) -> None:
    content = bytearray(good_file(suffix))
    if compresses_first:
        content = bytearray(compressed(bytes(content), suffix))
    for place, byte in edits:
        content[int(place * len(content))] = byte
    content = content[: int(keep * len(content)) + 1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"any{suffix}"
        path.write_bytes(bytes(content) if compresses_first else compressed(bytes(content), suffix))
        read_all(path)


@fuzz
@given(st.binary(max_size=200))
@example(b"]r\xff\xff\xff\x7f.")  # a memo of 2^31 entries
@example(b"\x96\xff\xff\xff\xff\xff\x00\x00\x00.")  # a bytearray of a terabyte
def test_any_bytes_as_metadata(content: bytes) -> None:
    import pickle

    for prefix in (b"", b"\x80\x04", b"\x80\x02ctorch\nSize\n"):
        with pytest.raises(pickle.UnpicklingError):
            safe_unpickle.load_metadata(prefix + content)


@fuzz
@given(st.binary(max_size=200) | JSON_VALUES.map(lambda value: json.dumps(value).encode()))
@example(b'{"format": 1, "files": {"../../x": [1, "a"]}}')
@example(b'{"format": 1, "files": {"a": [NaN, "a"]}}')
@example(b'{"format": 1, "files": {"\\u0000": [1, "a"]}}')
@example(b'{"format": 1, "files": {"a": 1e999}}')
@example(b"[" * 100_000)
def test_any_bytes_as_manifest(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "step-1").mkdir()
        (Path(name) / "step-1" / manifest.NAME).write_bytes(content)
        problem = manifest.problem(Path(name) / "step-1")
        whole = b'"files": {}' in content
        assert problem is not None or whole, content
