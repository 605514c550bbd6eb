"""An exported model in lm-eval, on a task made here, has the log-likelihoods of this project's own model."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folders import hf_folder
from shapes import LLAMA31

from titan_fast.flavors import ModelShape
from titan_fast.generate import load_model
from titan_fast.hf_convert import export_checkpoint, import_model
from titan_fast.tokenizer import train_sentencepiece

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install titan_fast[eval]")

QUESTIONS = [
    {"question": f"{a} and {b} make", "choices": [str(a + b), str(a + b + 1), "a fox"], "answer": 0}
    for a in range(3, 7)
    for b in (1, 20)
]
TASK = """
task: sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""


def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError("a test must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")


def test_log_likelihoods_are_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_network(monkeypatch)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    text = " ".join(f"{q['question']} {' '.join(q['choices'])}" for q in QUESTIONS)
    train_sentencepiece([text * 20], 290, tmp_path / "tokenizer.model", seed=0)
    shape = ModelShape(**{**vars(LLAMA31), "vocab_size": 290})
    import_model(hf_folder(shape, tmp_path / "source"), tmp_path / "ours", tmp_path / "tokenizer.model")
    export_checkpoint(tmp_path / "ours", tmp_path / "export", None, 10**9)
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "sums.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))

    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "export"), "dtype": "float32", "add_bos_token": True},
        tasks=["sums"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
    )
    model, tokenizer, _ = load_model(tmp_path / "ours", torch.device("cpu"))
    assert tokenizer.bos_id is not None
    right = 0
    for sample in results["samples"]["sums"]:
        question, found = sample["doc"], [response[0][0] for response in sample["resps"]]
        expected = []
        for choice in question["choices"]:
            context = [tokenizer.bos_id, *tokenizer.encode(question["question"])]
            whole = [tokenizer.bos_id, *tokenizer.encode(f"{question['question']} {choice}")]
            with torch.no_grad():
                logprobs = model(torch.tensor([whole[:-1]]))[0].double().log_softmax(-1)
            positions = range(len(context), len(whole))
            expected.append(sum(logprobs[at - 1, whole[at]].item() for at in positions))
        assert found == pytest.approx(expected, abs=1e-4)
        right += expected.index(max(expected)) == question["answer"]
    assert len(results["samples"]["sums"]) == len(QUESTIONS)
    assert results["results"]["sums"]["acc,none"] == right / len(QUESTIONS)
