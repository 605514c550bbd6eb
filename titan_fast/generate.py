"""Text from a model: `python -m titan_fast.generate --checkpoint DIR --prompt "def "`."""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from torch import Tensor

from titan_fast import command_line
from titan_fast.checkpoint import read_config, tokenizer_of
from titan_fast.config import Config, from_dict
from titan_fast.errors import ConfigError, command
from titan_fast.initial_weights import CheckpointWeights, checkpoint_folder
from titan_fast.metrics import printable
from titan_fast.model import KVCache, Llama
from titan_fast.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the model's distribution."""

    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = 50
    """Only the likeliest K tokens. 0: no limit."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability."""
    seed: int = 0
    """Seed of the draw."""


COLDEST = 1e-6
"""The least temperature besides 0: logits divided by less exceed float32."""


def next_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """logits: [B, V] -> [B, 1] int64."""
    if sampling.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if sampling.top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # the likelier tokens' total
        ordered = ordered.masked_fill(before >= sampling.top_p, float("-inf"))
        logits = torch.full_like(logits, float("-inf")).scatter(-1, order, ordered)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


@torch.no_grad()
def generate(
    model: Llama, prompt: Tensor, max_new_tokens: int, sampling: Sampling, vocab_size: int | None = None
) -> Iterator[Tensor]:
    """Yields the tokens that follow `prompt`, [B, S] int64, as [B, 1] each: of the first vocab_size of the model's
    vocabulary, which may be larger than the tokenizer's. The prompt is read in one pass, then each token against the
    cached keys and values of all before it."""
    if prompt.shape[1] + max_new_tokens > model.max_seq_len:
        raise ConfigError(
            f"{prompt.shape[1]} prompt tokens + {max_new_tokens} new ones are more than the {model.max_seq_len} "
            "that the model was built for",
            "ask for fewer",
        )
    generator = torch.Generator(device=prompt.device).manual_seed(sampling.seed)
    caches, tokens, start = [KVCache() for _ in model.blocks], prompt, 0
    for _ in range(max_new_tokens):
        logits = model(tokens, caches=caches, start=start)[:, -1, :vocab_size]
        start += tokens.shape[1]
        tokens = next_token(logits, sampling, generator)
        if dist.is_initialized():  # ranks may differ in a last bit, draw different tokens, and end at different places
            dist.broadcast(tokens, 0)
        yield tokens


def generate_text(
    model: Llama, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, sampling: Sampling, device: torch.device
) -> str:
    """`prompt` and what follows it, up to the end-of-document token."""
    ids = tokenizer.encode(prompt)  # a token that begins the document is read, but is not part of the text
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    given = torch.tensor([begin + ids or [tokenizer.eos_id]], device=device)
    new = []
    for token in generate(model, given, max_new_tokens, sampling, tokenizer.vocab_size):
        if (value := int(token)) == tokenizer.eos_id:
            break
        new.append(value)
    return tokenizer.decode(ids + new)


def load_model(path: Path, device: torch.device) -> tuple[Llama, Tokenizer, Config]:
    """The model of a checkpoint folder (`step-N`), or of the newest one in a run directory or its checkpoint folder, on
    one device; with its tokenizer and the config that it was trained with."""
    weights = CheckpointWeights(checkpoint_folder(path))
    with torch.device("meta"):
        model = Llama(weights.shape)
    model.to_empty(device=device)
    model.tie()
    model.init_buffers()
    weights.fill(dict(model.named_parameters()))
    if device.type == "cuda":
        model.to(torch.bfloat16)
        model.init_buffers()
    return model.eval(), load_tokenizer(tokenizer_of(weights.path)), from_dict(read_config(weights.path))


@dataclass(frozen=True)
class Arguments:
    """Samples text from a checkpoint."""

    checkpoint: str
    """A run directory, or a step-N folder in it."""
    prompt: str = "def "
    """What the text begins with."""
    max_new_tokens: int = 128
    """How many tokens to add at most."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run. auto: CUDA where there is one."""
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = Sampling()
    """How tokens are drawn."""


@command
def main() -> None:
    arguments = command_line.read(Arguments, None, "titan_fast.generate")
    sampling = arguments.sampling
    temperature = sampling.temperature
    ranges = {
        "temperature": (temperature, temperature == 0 or COLDEST <= temperature < math.inf, f"0, or {COLDEST} or more"),
        "top_p": (sampling.top_p, 0 < sampling.top_p <= 1, "above 0, at most 1"),
        "top_k": (sampling.top_k, sampling.top_k >= 0, "0 or more"),
        "max_new_tokens": (arguments.max_new_tokens, arguments.max_new_tokens >= 1, "1 or more"),
        "seed": (sampling.seed, 0 <= sampling.seed < 2**63, "0 or more, below 2^63"),
    }
    for name, (value, is_within, wanted) in ranges.items():
        if not is_within:
            raise ConfigError(f"{name} is {value}", f"it has to be {wanted}")
    name = arguments.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device is cuda, and there is none here", "use auto or cpu")
    device = torch.device(name)
    model, tokenizer, _ = load_model(Path(arguments.checkpoint), device)
    text = generate_text(model, tokenizer, arguments.prompt, arguments.max_new_tokens, sampling, device)
    sys.stdout.write(printable(text) + "\n")


if __name__ == "__main__":
    main()
