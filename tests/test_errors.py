"""What ends a command with one sentence, and what happens to its console without ending it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import runs


def run(body: str, **options) -> "subprocess.CompletedProcess[str]":
    """Runs a process whose `main` is `body`, with the handling of errors that all commands have."""
    program = (
        f"import os, sys, socket\nfrom titan_fast.errors import command\n@command\ndef main():\n    {body}\nmain()"
    )
    options = {"stdout": subprocess.PIPE, "env": runs.environment()} | options
    command = [*options.pop("before", ()), sys.executable, "-c", program]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60, **options)


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_has_gone_ends_a_command_in_silence(lines: int) -> None:
    """Whether it is noticed while writing, or in the flush at the end."""
    reader, writer = os.pipe()
    os.close(reader)
    done = run(f"for _ in range({lines}): print('a line of some length')", stdout=writer)
    os.close(writer)
    assert done.returncode == 141 and not done.stderr


def test_a_broken_connection_is_no_reader_that_has_gone() -> None:
    done = run("a, b = socket.socketpair(); b.close(); a.send(b'x')")
    assert done.returncode == 1 and "BrokenPipeError" in done.stderr


def test_a_console_that_is_not_utf_8_shows_escapes() -> None:
    done = run("print('\\u00e9')", env=runs.environment(PYTHONIOENCODING="ascii"))
    assert done.returncode == 0 and done.stdout == "\\xe9\n"


def test_a_failure_that_nobody_reads_keeps_its_exit_status() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    body = "from titan_fast.errors import DataError; print('x'); os.dup2(1, 2); raise DataError('what', 'fix')"
    done = run(body, stdout=writer, env=runs.environment(PYTHONUNBUFFERED=""))
    os.close(writer)
    assert done.returncode == 3


@pytest.mark.parametrize("closed", ["1", "2"])
def test_a_console_that_was_closed_at_the_start_is_as_good_as_any(closed: str) -> None:
    body = "from titan_fast.config import parse; parse(['--training.steps', 'x'])"
    done = run(body, before=["sh", "-c", f'exec "$@" {closed}>&-', "sh"])
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("titan_fast: a value has the wrong type") == (closed == "1")


def test_a_name_that_is_too_long_is_refused() -> None:
    done = run(f"open('{'x' * 300}')")
    assert done.returncode == 2 and done.stderr.startswith("titan_fast: no such path: File name too long [xxx")


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("EIO", 4, "the disk fails: Input/output error [/a/file]; fix it"),
        ("EROFS", 4, "the disk fails: Read-only file system [/a/file]"),
        ("ESTALE", 4, "the disk fails: Stale file handle [/a/file]"),
        ("EMFILE", 2, "no file can be opened: Too many open files [/a/file]; allow more (ulimit -n)"),
    ],
)
def test_a_disk_that_fails_is_told_in_a_line(name: str, status: int, words: str) -> None:
    done = run(f"import errno, os; raise OSError(errno.{name}, os.strerror(errno.{name}), '/a/file')")
    assert done.returncode == status and done.stderr.startswith(f"titan_fast: {words}")
    assert len(done.stderr.splitlines()) == 1


def test_a_refusal_is_one_line_whatever_it_quotes() -> None:
    done = run("from titan_fast.errors import DataError; raise DataError('a\\nb\\x1b[1m', 'fix')")
    assert done.returncode == 3 and done.stderr == "titan_fast: a\\nb\\x1b[1m; fix\n"


def test_a_refusal_quotes_no_secret() -> None:
    done = run("from titan_fast.errors import DataError; raise DataError('no file', 'fix', 's3://me:hunter2@b/x')")
    assert done.returncode == 3 and done.stderr == "titan_fast: no file [s3://<redacted>@b/x]; fix\n"
    done = run("from titan_fast.config import parse; parse(['--training.steps', 'password=hunter2'])")
    assert done.returncode == 2 and "password=<redacted>" in done.stderr and "hunter2" not in done.stderr
    done = run("import errno; raise OSError(errno.EIO, 'failed', '/a?token=hunter2')")
    assert done.returncode == 4 and "[/a?token=<redacted>]" in done.stderr and "hunter2" not in done.stderr


def test_an_interrupt_is_told_in_a_line() -> None:
    done = run("raise KeyboardInterrupt")
    assert done.returncode == 130 and done.stderr == "titan_fast: interrupted; start again as before\n"


def test_a_path_that_this_user_may_not_use_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch(mode=0o000)
    as_user = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []  # modes bind it
    done = run(f"open({str(tmp_path / 'file')!r})", before=as_user)
    assert done.returncode == 2
    assert done.stderr.startswith(f"titan_fast: not allowed: Permission denied [{tmp_path / 'file'}]; ")


def test_a_file_that_is_too_large_for_its_limit_is_no_full_disk(tmp_path: Path) -> None:
    write = f"import pathlib; pathlib.Path({str(tmp_path / 'large')!r}).write_bytes(bytes(99))"
    done = run(f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9, 9)); {write}")
    assert done.returncode == 4 and "a file is too large for its limit (ulimit -f)" in done.stderr, done.stderr


def test_what_all_ranks_have_to_say_is_said_once() -> None:
    done = runs.torchrun(4, "-m", "titan_fast.train", "--training.seq_length", "5")
    output = runs.finish(done)
    said = output.count("unknown key 'training.seq_length'")
    assert done.returncode == 1 and 1 <= said <= 2, output  # twice where the first is slow to start


def test_what_only_a_later_rank_has_to_say_is_said_too() -> None:
    body = "from titan_fast.errors import ConfigError; raise ConfigError('of rank 1', 'mend it')"
    done = run(body, env=runs.environment(LOCAL_RANK="1"))
    assert done.returncode == 2 and "of rank 1" in done.stderr
