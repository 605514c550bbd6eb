"""Masks secrets in settings and command lines before these are written or shown."""

import re
from typing import Any

MASK = "<redacted>"
# Every repetition below is bounded or begins where no other match can: text comes from models and files, and the time
# that it takes must not grow with its square.
# With a password, which may hold "/" and "@", all up to the last "@" of the word; "host:port/" begins no password.
_URL_USER = re.compile(r"://(?:[^/\s@:'\"]*:(?!\d{1,5}/)(?:(?!://)[^\s'\"])*|[^/\s'\"]+)@")
_VALUE = r"\"(?:\\.|[^\"\\]){1,4096}\"|'(?:\\.|[^'\\]){1,4096}'|\\\"[^\"\\]{1,4096}\\\"|[\"']?[^\s&;,'\"]+"
_IS = r"[ \t]{0,8}(?::=|=(?!=)|:(?!//))[ \t]{0,8}"
_WORDS = "secret|password|passwd|passphrase|(?:api|access|account|private)[_-]?key|credential|signature"
# "token" only ends a name, since max_tokens, token_budget and tokenizer are no secrets; and where it may as well be a
# word ("token: none", "ms per token: 5.2"), only what looks like a key is one. A "pass" may be forward.
_NAME = (
    rf"(?:(?:{_WORDS})[a-z0-9_.-]{{0,64}}|(?<![a-z0-9])sig|pwd|(?<!forward.)(?<!backward.)(?<![a-z])pass(?=\\?[\"']|=)"
    rf"|token(?=\\?[\"']|=|%3d|{_IS}(?:\\?[\"']|(?=[^\s,;]{{8}})(?=[^\s\d]{{0,64}}\d)[^\sa-z]{{0,64}}[a-z])))"
    r"(?![a-z0-9_.-])"
)
_ASSIGNED = re.compile(rf"(?is)({_NAME}\\?[\"']?(?:{_IS}|%3d))({_VALUE})")
_OPTION = re.compile(
    rf"(?is)(?<![^\s'\"])(--?[a-z0-9_.-]{{0,64}}(?:(?:{_WORDS})s?|pwd|token)[ \t]{{1,8}})(?!-)({_VALUE})"
)
_HEADER = re.compile(
    rf"(?is)(authorization\\?[\"']?{_IS}\\?[\"']?(?:(?:bearer|basic|token|digest)[ \t]{{1,8}})?)([^\s'\",;\\]+)"
)
_SCHEME = re.compile(r"\b((?:[Bb]earer|BEARER|Basic|BASIC)[ \t]{1,8})(?=\S+[A-Z0-9=])([A-Za-z0-9._~+/-]{8,}=*)")
# The formats of issuers: Hugging Face, OpenAI and similar, GitHub, GitLab, AWS, Google, Slack, JSON web tokens.
_ISSUED = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}"
    r"|glpat-[A-Za-z0-9_-]{16,}|A[KS]IA[0-9A-Z]{16}|AIza[0-9A-Za-z_-]{30,}|xox[abprs]-[0-9A-Za-z-]{10,}"
    r"|eyJ[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]+){0,2})"
)


def redact(text: str) -> str:
    """`text` without user names and passwords in URLs, values of names and options like `token=` and `--password`,
    what authorizes a request, and keys of known formats."""
    text = _URL_USER.sub(rf"://{MASK}@", text)
    for pattern in (_ASSIGNED, _OPTION):
        text = pattern.sub(_without_value, text)
    for pattern in (_HEADER, _SCHEME):
        text = pattern.sub(rf"\1{MASK}", text)
    return _ISSUED.sub(MASK, text)


def _without_value(match: re.Match[str]) -> str:
    """A name and the mask. What is around the value stays: quotes, closing brackets, and, in a path that has the name
    in it, the rest of the path."""
    name, value = match.groups()
    if value[0] in "\\'\"" and value[-1] in "'\"":
        quote = value[: 1 + (value[0] == "\\")]
        return f"{name}{quote}{MASK}{quote}"
    end = len(value.rstrip(")]}"))
    before = match.string[max(0, match.start() - 200) : match.start()]
    if "/" in re.split(r"[\s'\"?&;]", before)[-1] and "/" in value:
        end = min(end, value.index("/"))
    return f"{name}{MASK}{value[end:]}" if end else match[0]


def redacted(value: Any) -> Any:
    """Every string in a tree of dicts and lists through `redact`."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redacted(item) for item in value)
    return value
