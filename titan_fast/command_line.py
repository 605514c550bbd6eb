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
        raise ConfigError(message, f"see {self.prog} --help")


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
        raise ConfigError(_sentence(captured.getvalue()), f"see {prog} --help") from stop


# What tyro says twice, what is in boxes of their own, and the parts of a union that did not match either.
_HEADINGS = (
    r"Parsing error|Value error|Required options|Error parsing|Invalid choice(?= invalid)|Unrecognized options(?= U)"
)
_MORE = r"Argument helptext|For full helptext|Got errors:|Available subcommands:"


def _sentence(refusal: str) -> str:
    """tyro's words without their frame, colours and manual."""
    text = re.sub(r"\x1b\[[0-9;]*m|\[/?bold\]|[\u2500-\u257f]|-{3,}|^[|+]|[|+]$", " ", refusal, flags=re.MULTILINE)
    text = re.split(_MORE, re.sub(r"\s+", " ", text))[0]
    return re.sub(_HEADINGS, "", text).strip(" .")
