"""Do the memory savings train as well? The demo model on the demo's text, once for each set of savings.

    python -m benchmarks.stack --steps 150 --out benchmarks/results/stack.jsonl

Same initial weights, batches and schedule for all; prints validation loss and its difference to the plain run.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch

import poetx
from benchmarks.record import append, provenance
from poetx.memory.build import large_dense_parameters
from poetx.stack import SMMF, AdamW, HFac, checkpoint_layers_, chunk_loss_, release_gradients
from poetx.train.data import prepare_data
from poetx.train.recipe import load_recipe
from poetx.train.sampler import batch_windows, evenly_spread
from poetx.train.schedule import lr_factor

PLAIN: dict[str, Any] = {"rotation_dtype": "float32", "state": "torch", "release": False, "saving": False, "base": None}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16 rotations and state, torch's AdamW": {"rotation_dtype": "bfloat16"},
    "checkpointing and chunked loss": {"saving": True},
    "full stack": {"rotation_dtype": "bfloat16", "state": "int8", "release": True, "saving": True},
    "full stack, float32 rotations": {"state": "int8", "release": True, "saving": True},
    "full stack, SMMF for the rest": {
        "rotation_dtype": "bfloat16",
        "state": "int8",
        "release": True,
        "saving": True,
        "base": "smmf",
    },
}


def train(recipe: Any, data: Any, variant: dict[str, Any], *, steps: int, dtype: torch.dtype) -> tuple[float, float]:
    """Validation loss after ``steps`` and seconds a step."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    options, shape, settings = PLAIN | variant, recipe.model, recipe.optimizer
    torch.manual_seed(recipe.train.seed)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=recipe.data.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            pad_token_id=None,
        ),
        dtype=dtype,
    ).train()
    config = poetx.PoetConfig.from_dict(recipe.poet.config.to_dict() | {"rotation_dtype": options["rotation_dtype"]})
    poetx.convert_(model, config)
    if options["saving"]:
        chunk_loss_(checkpoint_layers_(model))
    groups = poetx.param_groups(model, lr=settings.lr, poet_lr=settings.poet_lr)
    optimizers = _optimizers(groups, options)
    handle = poetx.merge_every(optimizers[0], model, steps=recipe.poet.merge_every)
    if options["release"]:
        for optimizer in optimizers:
            release_gradients(optimizer, large_dense_parameters(model), max_norm=settings.clip)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    started = time.perf_counter()
    for step in range(steps):
        factor = lr_factor(step, steps=steps, warmup_steps=settings.warmup_steps, min_ratio=settings.min_lr_ratio)
        for optimizer, rates in zip(optimizers, peaks, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        windows = batch_windows(
            step, batch_size=recipe.train.batch_size, windows=len(data.train), seed=recipe.train.seed
        )
        inputs, labels = data.train.batch(windows)
        _loss(model, inputs, labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    seconds = (time.perf_counter() - started) / steps
    assert handle.merges == steps // recipe.poet.merge_every
    return validate(model, data, recipe), seconds


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
    losses = [float(_loss(model, *data.validation.batch(windows[i : i + 8]))) for i in range(0, len(windows), 8)]
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), help="these variants (default: all)")
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    args = parser.parse_args()
    recipe = load_recipe("demo", [])
    data = prepare_data(recipe)
    origin, plain = provenance(torch.device("cpu")), None
    for name in args.only or VARIANTS:
        loss, seconds = train(recipe, data, VARIANTS[name], steps=args.steps, dtype=getattr(torch, args.dtype))
        plain = loss if name == "plain" else plain
        row = {
            "benchmark": "stack",
            "variant": name,
            "validation_loss": round(loss, 4),
            "difference": None if plain is None else round(loss - plain, 4),
            "steps": args.steps,
            "dtype": args.dtype,
            "seed": recipe.train.seed,
            "seconds_a_step": round(seconds, 3),
        }
        print(
            f"{name:45} {loss:.4f}  {row['difference']:+.4f}" if plain is not None else f"{name} {loss:.4f}", flush=True
        )
        if args.out:
            append(args.out, [row | origin])


if __name__ == "__main__":
    main()
