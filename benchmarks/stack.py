"""Do the memory savings train as well? The demo model on the demo's text, once for each set of savings and each seed.

    python -m benchmarks.stack --steps 100 --seeds 0 1 2 --out benchmarks/results/stack.jsonl

Initial weights, batches and schedule are those of the seed; rows that the file has already are left out. Like is
compared with like: a released gradient can be clipped by its own norm only, so every run, the plain one too, clips
embeddings and head each by its own norm and all other gradients by theirs together.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import poetx
from benchmarks.record import append, provenance
from poetx.data.prepare import prepare_data
from poetx.data.sampler import batch_windows, evenly_spread
from poetx.methods.base import large_parameters
from poetx.optim import SMMF, AdamW, HFac, release_gradients
from poetx.recipe import load_recipe
from poetx.savings import checkpoint_layers_, chunk_loss_
from poetx.train.schedule import lr_factor

PLAIN: dict[str, Any] = {
    "dtype": "float32",
    "mode": "fast",
    "rotation_dtype": "float32",
    "state": "torch",
    "release": False,
    "saving": False,
    "base": None,
    "base_lr": 1.0,  # times the recipe's rate, for what is no rotation
}
_BF16 = {"dtype": "bfloat16", "rotation_dtype": "bfloat16", "mode": "mem"}
_STACK = {"rotation_dtype": "bfloat16", "mode": "mem", "state": "int8", "release": True, "saving": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16, torch's AdamW: the paper's": _BF16,
    "bf16, stochastic rounding": _BF16 | {"state": "bfloat16"},
    "bf16, stochastic rounding, checkpointing and chunked loss": _BF16 | {"state": "bfloat16", "saving": True},
    "bf16, full stack": _BF16 | _STACK,
    "float32, full stack": _STACK,
    "float32, checkpointing and chunked loss": {"mode": "mem", "saving": True},
}
for _rate in (0.1, 0.5, 1.0, 2.0):
    VARIANTS[f"bf16, full stack, SMMF at {_rate:g} of the rate"] = _BF16 | _STACK | {"base": "smmf", "base_lr": _rate}
VARIANTS["bf16, full stack, H-Fac"] = _BF16 | _STACK | {"base": "hfac"}


def train(recipe: Any, data: Any, variant: dict[str, Any], *, steps: int, seed: int) -> tuple[float, float]:
    """Validation loss after ``steps`` and seconds a step."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    options, shape, settings = PLAIN | variant, recipe.model, recipe.optimizer
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=recipe.data.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            pad_token_id=None,
        ),
        dtype=torch.float32,  # drawn alike for every dtype
    )
    model = model.to(getattr(torch, options["dtype"])).train()
    changes = {"rotation_dtype": options["rotation_dtype"], "mode": options["mode"], "seed": seed}
    poetx.convert_(model, poetx.PoetConfig.from_dict(recipe.poet.config.to_dict() | changes))
    if options["saving"]:
        chunk_loss_(checkpoint_layers_(model))
    groups = poetx.param_groups(model, lr=settings.lr * options["base_lr"], poet_lr=settings.poet_lr)
    optimizers = _optimizers(groups, options)
    handle = poetx.merge_every(optimizers[0], model, steps=recipe.merge_every)
    large = large_parameters(model)
    if options["release"]:
        for optimizer in optimizers:
            release_gradients(optimizer, large, max_norm=settings.clip)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    started = time.perf_counter()
    for step in range(steps):
        factor = lr_factor(step, steps=steps, warmup_steps=settings.warmup_steps, min_ratio=settings.min_lr_ratio)
        for optimizer, rates in zip(optimizers, peaks, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        windows = batch_windows(step, batch_size=recipe.train.batch_size, windows=len(data.train), seed=seed)
        inputs, labels, _ = data.train.batch(windows)
        _loss(model, inputs, labels).backward()
        _clip(model, large, settings.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    seconds = (time.perf_counter() - started) / steps
    assert handle.merges == steps // recipe.poet.merge_every
    return validate(model, data, recipe), seconds


def _clip(model: nn.Module, large: list[nn.Parameter], limit: float) -> None:
    alone = {id(p) for p in large}
    for parameter in large:  # those released have no gradient any more, and were clipped so
        torch.nn.utils.clip_grad_norm_([parameter], limit)
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if id(p) not in alone], limit)


def _optimizers(groups: list[dict[str, Any]], options: dict[str, Any]) -> list[torch.optim.Optimizer]:
    def adamw(params: Any) -> torch.optim.Optimizer:
        if options["state"] == "torch":
            return torch.optim.AdamW(params, weight_decay=0.0)
        return AdamW(params, weight_decay=0.0, state_dtype=options["state"])

    if options["base"] is None:
        return [adamw(groups)]
    kinds: dict[str, Any] = {"smmf": SMMF, "hfac": HFac}
    rotations = [copy.copy(group) for group in groups if group["name"] == "rotations"]
    return [adamw(rotations), kinds[options["base"]]([g for g in groups if g["name"] != "rotations"])]


def _loss(model: Any, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return model(input_ids=inputs, labels=labels, shift_labels=labels, use_cache=False).loss


@torch.no_grad()
def validate(model: Any, data: Any, recipe: Any) -> float:
    model.eval()
    windows = evenly_spread(recipe.train.eval_windows, len(data.validation))
    losses = [float(_loss(model, *data.validation.batch(windows[i : i + 8])[:2])) for i in range(0, len(windows), 8)]
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch-size", type=int, default=2, help="sequences in a batch; the recipe has 8")
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), help="these variants (default: all)")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, appended to")
    args = parser.parse_args()
    recipe = load_recipe("demo", [f"train.batch_size={args.batch_size}"])
    data = prepare_data(recipe)
    origin = provenance(torch.device("cpu"))
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    done = {(row["variant"], row["seed"], row["steps"], row.get("batch_size", 8)) for row in map(json.loads, lines)}
    for seed in args.seeds:
        for name in args.only or VARIANTS:
            if (name, seed, args.steps, args.batch_size) in done:
                continue
            loss, seconds = train(recipe, data, VARIANTS[name], steps=args.steps, seed=seed)
            row = {
                "benchmark": "stack",
                "variant": name,
                "settings": PLAIN | VARIANTS[name],
                "seed": seed,
                "steps": args.steps,
                "batch_size": args.batch_size,
                "validation_loss": round(loss, 5),
                "seconds_a_step": round(seconds, 3),
            }
            append(args.out, [row | origin])
            print(f"{name:45} seed {seed}  {loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
