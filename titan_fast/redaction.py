"""Masks secrets in settings and command lines before these are written or shown."""

import re
from typing import Any

MASK = "<redacted>"
_URL_USER = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*://)[^/\s@'\"]+@")
# Tokens of text, and tokenizers, are not secrets.
_SECRET = "token(?!s|i[sz])|secret|password|passwd|api_?key|access_?key|credential|signature"
_NAME = rf"(?:[a-z0-9_.-]*(?:{_SECRET})[a-z0-9_.-]*|sig)"
_ASSIGNED = re.compile(rf"(?i)(?<![a-z0-9])({_NAME})(\s*[=:]\s*|%3d)(?!//)[^\s&;,'\"]+")
# The formats of issuers: Hugging Face, OpenAI and similar, GitHub, GitLab, AWS, Google, Slack, JSON web tokens.
_ISSUED = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}"
    r"|glpat-[A-Za-z0-9_-]{16,}|A[KS]IA[0-9A-Z]{16}|AIza[0-9A-Za-z_-]{30,}|xox[abprs]-[0-9A-Za-z-]{10,}"
    r"|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*)"
)


def redact(text: str) -> str:
    """`text` without user names and passwords in URLs, values of names like `token=`, and keys of known formats."""
    text = _URL_USER.sub(rf"\1{MASK}@", text)
    text = _ASSIGNED.sub(rf"\1\2{MASK}", text)
    return _ISSUED.sub(MASK, text)


def redacted(value: Any) -> Any:
    """Every string in a tree of dicts and lists through `redact`."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redacted(item) for item in value)
    return value
