"""Training steps on a CPU: this project against a plain loop over Hugging Face's LlamaForCausalLM, eager and compiled.

    python -m benchmarks.bench_cpu [--rounds 7] [--steps 4] [--out benchmarks/results/cpu_train.json]

One process, with the same shape, batch, data, optimizer and clipping. A round times every contender in turn, so that a
slow moment of the machine affects all of them; results are medians over rounds.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.cpu_rates import processor, spread, write
from benchmarks.provenance import commit
from titan_fast.compilation import compile_model
from titan_fast.config import Compile, CompileComponent, Optimizer
from titan_fast.flavors import FLAVORS
from titan_fast.hf import hf_config, to_hf
from titan_fast.loss import LinearCrossEntropy
from titan_fast.model import Llama, init_weights
from titan_fast.ops import REFERENCE
from titan_fast.optim import build_optimizer, clip_grad_norm_, step_unless

SHAPE = FLAVORS["debug"]
BATCH, SEQ_LEN, CHUNK, MAX_NORM = 8, 256, 512, 1.0
Step = Callable[[Tensor, Tensor], float]


def our_model() -> Llama:
    model = Llama(SHAPE, REFERENCE, LinearCrossEntropy(REFERENCE, CHUNK), max_seq_len=SEQ_LEN)
    init_weights(model, 0)
    return model


def our_step(components: tuple[CompileComponent, ...]) -> Step:
    model = our_model()
    if components:
        compile_model(model, Compile(enable=True, components=components))
    optimizer = build_optimizer(model, Optimizer())
    scale, good = torch.tensor(1.0 / (BATCH * SEQ_LEN)), torch.tensor(0.0)

    def step(tokens: Tensor, labels: Tensor) -> float:
        loss = model(tokens, labels, scale)
        loss.backward()
        clip_grad_norm_(model.parameters(), MAX_NORM, loss.detach())
        step_unless(optimizer, good)
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def hugging_face_step(compiled: bool) -> Step:
    settings: dict[str, Any] = {**hf_config(SHAPE), "attn_implementation": "sdpa", "use_cache": False}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(dict(to_hf(dict(our_model().named_parameters()), SHAPE)))
    if compiled:
        for layer in model.model.layers:
            layer.compile()
    adamw = Optimizer()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=adamw.lr,
        betas=(adamw.beta1, adamw.beta2),
        eps=adamw.eps,
        weight_decay=adamw.weight_decay,
        fused=True,
    )

    def step(tokens: Tensor, labels: Tensor) -> float:
        logits = model(input_ids=tokens).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


CONTENDERS: dict[str, Callable[[], Step]] = {
    "titan_fast eager": lambda: our_step(()),
    "titan_fast compiled blocks and loss": lambda: our_step(("blocks", "norm", "loss")),
    "titan_fast compiled model": lambda: our_step(("model",)),
    "Hugging Face eager": lambda: hugging_face_step(compiled=False),
    "Hugging Face compiled layers": lambda: hugging_face_step(compiled=True),
}


def measure(rounds: int, steps: int) -> dict[str, list[float]]:
    """tokens/s of each contender in each round."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(SHAPE.vocab_size, (steps, BATCH, SEQ_LEN + 1), generator=generator)
    contenders = {name: build() for name, build in CONTENDERS.items()}
    first_losses = {name: [step(row[:, :-1], row[:, 1:]) for row in data] for name, step in contenders.items()}
    _check_same_task(first_losses)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        order = list(contenders)
        for name in order[number % len(order) :] + order[: number % len(order)]:
            started = time.perf_counter()
            for row in data:
                contenders[name](row[:, :-1], row[:, 1:])
            seconds[name].append(time.perf_counter() - started)
    tokens = steps * BATCH * SEQ_LEN
    return {name: [tokens / value for value in values] for name, values in seconds.items()}


def _check_same_task(losses: dict[str, list[float]]) -> None:
    """From the same weights and data, losses must agree, or the comparison would mean nothing."""
    expected = losses["Hugging Face eager"]
    for name, values in losses.items():
        if any(abs(a - b) > 2e-3 * b for a, b in zip(values, expected, strict=True)):
            sys.exit(f"bench_cpu: the losses of {name}, {values}, differ from Hugging Face's, {expected}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="per round and contender")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rates = measure(arguments.rounds, arguments.steps)
    result = {
        "what": "training tokens/s on a CPU, one process",
        "machine": {"processor": processor(), "cores": os.cpu_count(), "threads": arguments.threads},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "shape": {"flavor": "debug", "batch": BATCH, "seq_len": SEQ_LEN, "loss_chunk": CHUNK},
        "rounds": arguments.rounds,
        "steps_per_round": arguments.steps,
        "commit": commit(),
        "tokens_per_second": {name: spread(values) for name, values in rates.items()},
        "ratios": {
            # Each is of one round, since other load on the machine slows all of a round.
            f"{ours} against {theirs}": spread([a / b for a, b in zip(rates[ours], rates[theirs], strict=True)], 3)
            for ours in rates
            for theirs in rates
            if ours.startswith("titan_fast") and theirs.startswith("Hugging Face")
        },
    }
    write(result, arguments.out)


if __name__ == "__main__":
    main()
