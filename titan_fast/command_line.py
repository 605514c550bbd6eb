"""Command lines that refuse as everything here does: one sentence and exit status 2, no usage text, no boxes."""

import argparse
import io
import os
import re
from contextlib import redirect_stderr, suppress
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
    try:
        with redirect_stderr(io.StringIO()):
            return tyro.cli(kind, prog=prog, args=argv, use_underscores=True)
    except SystemExit as stop:
        if not stop.code:
            raise
        sentence = _sentence(_refusal(kind, argv, prog))
        dashed = "write --name=VALUE where the value begins with a dash; " * ("Missing value" in sentence)
        raise ConfigError(sentence, f"{dashed}see --help") from stop


def _refusal(kind: type[T], argv: list[str] | None, prog: str) -> str:
    """tyro's words, on a terminal so wide that it breaks no line within a value."""
    captured, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100000"
    try:
        with redirect_stderr(captured), suppress(SystemExit):
            tyro.cli(kind, prog=prog, args=argv, use_underscores=True)
    finally:
        if columns is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = columns
    return captured.getvalue()


# The manual, and the parts of a union that did not match either.
_MORE = re.compile(r"Argument helptext|For full helptext|Got errors:")
_RULE = re.compile("[\u2500\u2570\u256f+-]*")


def _sentence(refusal: str) -> str:
    """tyro's words, which stand in a box with a title, without either, colours and manual. Its sections become parts of
    a sentence, their items a list; what is said of an item stands further to the right, and is left out."""
    parts, margin = [""], 0
    for line in re.sub(r"\x1b\[[0-9;]*m|\[/?bold\](?=FLOAT|`)", "", refusal).strip().splitlines()[1:]:
        inside = line.replace("\u2502", " ").rstrip()
        words = inside.strip().removeprefix("Error parsing ")
        if _MORE.match(words):
            break
        if _RULE.fullmatch(words):
            parts.append("")
            continue
        indent = len(inside) - len(inside.lstrip())
        if not parts[-1]:
            parts[-1], margin = words, indent
        elif indent < margin + 8:
            parts[-1] += (" " if parts[-1].endswith(":") else ", ") + words
    return "; ".join(part for part in parts if part).strip(" .")
