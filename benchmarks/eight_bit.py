"""Eight-bit states of AdamW side by side: ours, torchao's, and float32 as the measure of both.

    python -m benchmarks.eight_bit --out benchmarks/results/eight_bit.jsonl

``lag``: the mean second moment over float32's, 1500 steps after gradients fell to a twentieth, of all elements at once
and (``lag_beside``) of all but one in 128; 1 is right.
``path``: relative error of the weights after 200 steps of stationary gradients. ``loss``: a small Llama in the paper's
form, on the bytes of README and docs, merged every 25 steps, for each seed. ``starts_anew``: the first steps after a
merge are those of a new optimizer. ``resumes``: saved, loaded into a new one and continued, the same to the bit.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import poetx
from benchmarks.record import append, provenance
from poetx.optim import AdamW
from poetx.optim.adamw import _load


def _torchao(groups: Any, **settings: Any) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(groups, **settings)


KINDS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "float32": torch.optim.AdamW,
    "ours": lambda groups, **settings: AdamW(groups, state_dtype="int8", **settings),
    "torchao": _torchao,
}


def _moment(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> torch.Tensor:
    """The second moment, in float32."""
    state = optimizer.state[parameter]
    if isinstance(optimizer, AdamW):
        return _load(state, "exp_avg_sq", slice(0, parameter.numel()), torch.float32).view_as(parameter)
    moment = state["exp_avg_sq"]
    return moment.dequantize() if type(moment) is not torch.Tensor else moment


def follow(kind: str, sizes: list[float], kept: int = 0, seed: int = 0) -> tuple[torch.Tensor, float]:
    """Weights after one step for each size of a random gradient, [64, 128], and the mean second moment.

    The last ``kept`` columns have size 1 all the time and are not in that mean.
    """
    generator = torch.Generator().manual_seed(seed)
    parameter = nn.Parameter(torch.zeros(64, 128))
    spread = torch.logspace(-1, 0, 128)
    optimizer = KINDS[kind]([parameter], lr=1e-2, weight_decay=0.0)
    for size in sizes:
        parameter.grad = torch.randn(64, 128, generator=generator) * spread
        parameter.grad[:, : 128 - kept] *= size
        optimizer.step()
    return parameter.detach(), float(_moment(optimizer, parameter)[:, : 128 - kept].mean())


class Run:
    """A small Llama, its optimizer and its text."""

    def __init__(self, kind: str, seed: int) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 1}
        config = LlamaConfig(vocab_size=256, hidden_size=128, intermediate_size=256, **heads)
        self.model = LlamaForCausalLM(config).train()
        poetx.convert_(self.model, poetx.PoetConfig(block_size=128, init="normalized", seed=seed))
        groups = poetx.param_groups(self.model, lr=3e-3, poet_lr=1e-3)
        self.optimizer = KINDS[kind](groups, weight_decay=0.0)
        self.handle = poetx.merge_every(self.optimizer, self.model, steps=25)
        root = Path(poetx.__file__).parents[2]
        text = b"".join(path.read_bytes() for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))])
        self.text, self.seed, self.done = torch.frombuffer(bytearray(text), dtype=torch.uint8), seed, 0

    def windows(self, step: int, count: int = 4) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + step)
        starts = torch.randint(0, len(self.text) - 32, (count,), generator=generator)
        return torch.stack([self.text[start : start + 32] for start in starts]).long()

    def train(self, steps: int) -> None:
        for _ in range(steps):
            ids = self.windows(self.done)
            self.model(input_ids=ids, labels=ids).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.done += 1

    @torch.no_grad()
    def loss(self) -> float:
        ids = self.windows(999, 64)
        return float(self.model(input_ids=ids, labels=ids).loss)

    def rotations(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for _, layer in poetx.poet_layers(self.model) for p in layer.rotations])


def _same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def starts_anew(kind: str) -> bool:
    """Whether the first step after a merge turns as that of a new optimizer does, within its rounding noise."""
    run, fresh = Run(kind, 0), Run(kind, 0)
    run.train(25)
    fresh.model.load_state_dict(run.model.state_dict())
    fresh.done = 25
    run.train(1)
    fresh.train(1)
    return bool((run.rotations() - fresh.rotations()).norm() < 1e-3 * fresh.rotations().norm())


def resumes(kind: str) -> bool:
    run, other = Run(kind, 0), Run(kind, 0)
    run.train(27)
    other.model.load_state_dict(run.model.state_dict())
    file = io.BytesIO()  # torchao's states cannot be copied
    torch.save(run.optimizer.state_dict(), file)
    file.seek(0)
    other.optimizer.load_state_dict(torch.load(file, weights_only=False))
    other.done = run.done
    run.train(3)
    other.train(3)
    return _same(run.model, other.model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    still, fall = [1.0] * 200, [1.0] * 100 + [0.05] * 1500
    path = follow("float32", still)[0]
    moments = [follow("float32", fall, kept)[1] for kept in (0, 1)]
    for kind in args.kinds:
        row: dict[str, Any] = {"benchmark": "eight-bit", "kind": kind, "steps": args.steps, "seeds": args.seeds}
        row["lag"], row["lag_beside"] = (follow(kind, fall, kept)[1] / moments[kept] for kept in (0, 1))
        row["path"] = float((follow(kind, still)[0] - path).norm() / path.norm())
        row["starts_anew"], row["resumes"] = starts_anew(kind), resumes(kind)
        row["loss"] = []
        for seed in args.seeds:
            run = Run(kind, seed)
            run.train(args.steps)
            row["loss"].append(run.loss())
        row |= provenance(torch.device("cpu"))
        print(row)
        if args.out:
            append(args.out, [row])


if __name__ == "__main__":
    main()
