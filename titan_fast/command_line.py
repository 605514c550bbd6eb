"""Command lines that refuse as everything here does: one sentence and exit status 2, no usage text, no boxes."""

import argparse
import io
import re
from contextlib import redirect_stderr
from typing import NoReturn, TypeVar

import tyro

from titan_fast.errors import ConfigError

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(" ".join(message.split()), "see --help")


def read(kind: type[T], argv: list[str] | None, prog: str) -> T:
    """What `argv` (None: the process's own) says, as a dataclass or a union of subcommands. ConfigError where it cannot
    be read; `--help` prints the manual and exits with status 0."""
    captured = io.StringIO()
    try:
        with redirect_stderr(captured):
            return tyro.cli(kind, prog=prog, args=argv, use_underscores=True)
    except SystemExit as stop:
        if not stop.code:
            raise
        sentence = _sentence(captured.getvalue())
        dashed = "write --name=VALUE where the value begins with a dash; " * ("Missing value" in sentence)
        raise ConfigError(sentence, f"{dashed}see --help") from stop


# The manual, and the parts of a union that did not match either.
_MORE = re.compile(r"Argument helptext|For full helptext|Got errors:")


def _sentence(refusal: str) -> str:
    """tyro's words, which stand in a box with a title, without either, colours and manual."""
    words = []
    for line in re.sub(r"\x1b\[[0-9;]*m|\[/?bold\](?=FLOAT|`)", "", refusal).strip().splitlines()[1:]:
        inside = line.strip("\u2502| ").removeprefix("Error parsing ")
        if _MORE.match(inside):
            break
        if inside.strip("\u2500\u2570\u256f-+"):
            words.append(inside)
    return " ".join(words).strip(" .")
