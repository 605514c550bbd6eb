"""Command lines whose errors look like all others here: one sentence and exit status 2, no usage text, no boxes."""

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
    """Parses `argv` (None: the process's own) into a dataclass or one of a union of subcommands. ConfigError where that
    is not possible; `--help` prints the manual and exits with status 0."""
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
    """tyro's error message, as for a terminal that is wide enough not to break lines within a value."""
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


# What follows is the manual, or the other members of a union, which did not match either.
_MORE = re.compile(r"Argument helptext|For full helptext|Got errors:")
_RULE = re.compile("[\u2500\u2570\u256f+-]*")


def _sentence(refusal: str) -> str:
    """tyro's error message as a sentence, without its box, title, colours and manual. Sections become parts of the
    sentence, their items a list; explanations of items, which are indented further, are left out."""
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
