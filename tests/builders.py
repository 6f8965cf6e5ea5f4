"""What several test files build: small models, small runs, and what is read off them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from poetx.files import sha256
from poetx.layers.walk import poet_layers
from poetx.recipe import Recipe
from poetx.train import step
from poetx.train.metrics import TIMING_KEYS, read_metrics
from poetx.train.progress import Reporter
from poetx.train.run import RunResult

Tiny = Callable[..., Recipe]


class At(Reporter):
    """Calls ``action`` when the given step has been recorded."""

    def __init__(self, step: int, action: Callable[[], Any]) -> None:
        self.at, self.action = step, action
        self.notes: list[str] = []

    def step(self, entry: dict[str, Any]) -> None:
        if entry["step"] == self.at:
            self.action()

    def note(self, text: str) -> None:
        self.notes.append(text)


def curve(run_dir: Path) -> list[dict[str, Any]]:
    """Every metrics line without its timing."""
    return [
        {key: value for key, value in entry.items() if key not in TIMING_KEYS}
        for entry in read_metrics(run_dir / "metrics.jsonl")
    ]


def weights(result: RunResult) -> dict[str, torch.Tensor]:
    return result.model.state_dict()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def poison(monkeypatch: Any, *calls: int) -> None:
    """Make the loss of these forward calls in training NaN."""
    original, count = step.language_loss, iter(range(10_000))

    def language_loss(*args: Any, **settings: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        loss, router = original(*args, **settings)
        return loss * float("nan") if next(count) in calls else loss, router

    monkeypatch.setattr(step, "language_loss", language_loss)


def descend(loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One step against the gradient of ``loss``, which is gone afterwards."""
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def train_losses(run_dir: Path) -> list[float]:
    """Training losses of a run, step by step."""
    return [entry["loss"] for entry in read_metrics(run_dir / "metrics.jsonl") if entry["event"] == "train"]


def rehash(path: Path, name: str) -> None:
    """Write the new hash of a changed file into the manifest, too."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"size": (path / name).stat().st_size, "sha256": sha256(path / name)}
    (path / "manifest.json").write_text(json.dumps(manifest))


def edit_tensors(path: Path, name: str, changes: dict[str, torch.Tensor | None]) -> None:
    tensors = load_file(path / name) | changes
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, path / name)
    rehash(path, name)


def llama(**settings):
    defaults = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 104,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**(defaults | settings))).eval()


def gpt2():
    config = GPT2Config(vocab_size=97, n_positions=32, n_embd=48, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def mlp():
    return nn.Sequential(nn.Linear(11, 20), nn.GELU(), nn.Linear(20, 13), nn.GELU(), nn.Linear(13, 7))


def function(model, dtype):
    with torch.no_grad():
        if isinstance(model, nn.Sequential):
            return model(torch.randn(5, 11, generator=torch.Generator().manual_seed(0)).to(dtype))
        ids = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(0))
        return model(input_ids=ids).logits


MODELS = [llama, gpt2, mlp]


def turn(model, angle=0.3):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, layer in poet_layers(model):
            for skew in layer.rotations:
                noise = torch.randn(skew.shape, generator=generator) * angle / 10
                skew.copy_(noise)


SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def small_config(layers=2, **changes):
    return LlamaConfig(**(SMALL | {"num_hidden_layers": layers} | changes))
