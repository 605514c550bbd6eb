"""What is masked before it is written or shown, and what is not."""

import ast
import time
from pathlib import Path

import pytest

import titan_fast
from titan_fast.redaction import redact

SECRETS = [
    # URLs
    ("s3://key:pass@bucket/path", "s3://<redacted>@bucket/path"),
    ("https://key@x.org/a", "https://<redacted>@x.org/a"),
    ("s3://me:p@ss@bucket/x", "s3://<redacted>@bucket/x"),
    ("s3://me:pa/ss@bucket/x", "s3://<redacted>@bucket/x"),
    ("s3://a:b@c/x,s3://d:e@f/y", "s3://<redacted>@c/x,s3://<redacted>@f/y"),
    ("https://x.org/d?token=abc123&a=1", "https://x.org/d?token=<redacted>&a=1"),
    ("https://x.org/d?sig=ab%2F&a=1", "https://x.org/d?sig=<redacted>&a=1"),
    ("token%3Dabc&a", "token%3D<redacted>&a"),
    # Names and options
    ("--hf_token=abc", "--hf_token=<redacted>"),
    ("password: hunter2 next", "password: <redacted> next"),
    ("token: a1b2c3d4e5", "token: <redacted>"),
    ("pwd=x;a=b", "pwd=<redacted>;a=b"),
    ("DB_PASS=x a", "DB_PASS=<redacted> a"),
    ("passphrase=x", "passphrase=<redacted>"),
    ("SSH_PRIVATE_KEY=x", "SSH_PRIVATE_KEY=<redacted>"),
    ("AccountName=n;AccountKey=ab/cd+e==;E=f", "AccountName=n;AccountKey=<redacted>;E=f"),
    ("AWS_SECRET_ACCESS_KEY=ab/cd/e", "AWS_SECRET_ACCESS_KEY=<redacted>"),
    ("run --password X -v", "run --password <redacted> -v"),
    ("run --hf-token 'X Y' -v", "run --hf-token '<redacted>' -v"),
    # Quotes
    ('{"token": "X", "a": 1}', '{"token": "<redacted>", "a": 1}'),
    ("{'hf_token': 'X'}", "{'hf_token': '<redacted>'}"),
    (r"{\"token\": \"X\"}", r"{\"token\": \"<redacted>\"}"),
    ('PASSWORD="X y" z', 'PASSWORD="<redacted>" z'),
    (r'PASSWORD="X\" y" z', 'PASSWORD="<redacted>" z'),
    ("PASSWORD='X y", "PASSWORD=<redacted> y"),
    ('token = "abc"', 'token = "<redacted>"'),
    # Paths and brackets
    ("runs/lr=1,password=abc/checkpoint/step-2", "runs/lr=1,password=<redacted>/checkpoint/step-2"),
    ("refused [x?token=abc]; fix it", "refused [x?token=<redacted>]; fix it"),
    # Headers
    ("Authorization: Bearer abc", "Authorization: Bearer <redacted>"),
    ('{"Authorization": "Basic abc", "a": 1}', '{"Authorization": "Basic <redacted>", "a": 1}'),
    ("with Bearer abcDEF123456 sent", "with Bearer <redacted> sent"),
    ("Basic dXNlcjpwYXNzd29yZA==", "Basic <redacted>"),
    # Formats
    ("hf_" + "a1B2" * 8, "<redacted>"),
    ("AKIA" + "ABCD1234EFGH5678", "<redacted>"),
    ("eyJhbGciOiJI.eyJzdWIiOiIx.abc-_d next", "<redacted> next"),
]
NOT_SECRETS = [
    "data/tokens-00000.bin",
    "a run of 5 tokens",
    "/data/tokens: 1,500 documents",
    "--model.tokenizer_path=/data/tokenizer.model --metrics.sample_tokens=80",
    "https://x.org/tokenizer.json",
    "gs://bucket/a@b",
    "hdfs://host:9000/data@v1",
    "x=1",
    "runs/lr=3e-4,token_budget=20B/checkpoint/step-2",
    "tokens=5 tokens_seen=6 max_tokens: 7 --token_budget 8",
    "no end-of-text token: none of <s>, </s>",
    "5.2 ms per token: 5.2 ms",
    "def f(token: str) -> bool: return token == other",
    "forward_pass=0.3, first pass: 12 s, compass=5",
    "Basic training for every bearer of news",
]


@pytest.mark.parametrize(("text", "shown"), SECRETS)
def test_secrets_are_masked(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert redact(shown) == shown, "a masked config is compared with one that is masked again"


@pytest.mark.parametrize("text", NOT_SECRETS)
def test_what_is_no_secret_is_not_masked(text: str) -> None:
    assert redact(text) == text


def test_no_message_of_ours_is_mistaken_for_a_secret() -> None:
    for path in Path(titan_fast.__file__).parent.glob("*.py"):
        if path.name == "redaction.py":  # it names what it masks
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "12.5" for part in parts)
            assert redact(text) == text, f"{path.name}:{getattr(node, 'lineno', 0)}"


PIECES = [
    ".", "-", "_", "a", "a.", "://", "a://a:", "a@", "://a:@", "token", "token:", "token: 1a", "password=",
    'password="', 'password=\\"', " --", " --a", " --token ", "secret-", "/token=/", "eyJ-", "eyJaaaaaaaa.", "Bearer a",
    "authorization: ",
]  # fmt: skip


@pytest.mark.parametrize("piece", PIECES)
def test_the_time_for_a_long_text_does_not_grow_with_its_square(piece: str) -> None:
    """16,000 dots took a minute, and a model can write as many."""
    began = time.perf_counter()
    redact(piece * (100_000 // len(piece)))
    assert time.perf_counter() - began < 5
