"""Tiny layers streamed from host memory for many steps, with random delays, beside the same layers on the device.

    python -m benchmarks.stream_stress --steps 1000 --out benchmarks/results/stream_stress.jsonl

Copies arrive when they like, their memory holds NaN until then, and once more when they are given up; values on their
way back to host memory are overwritten with NaN as soon as nobody may read them. Layers run in any order, some twice,
some not at all, some recomputed by activation checkpointing; a pass is interrupted in its forward, its backward or its
step, only evaluated, while somebody writes the weights, or repeated before the step; merges and writes from outside
come in between. Every output, every weight and every state is compared, to the bit.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import random
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from benchmarks.record import append, provenance
from poetx import POETX, PoetConfig, PoetLinear, SingleStepLinear, merge_
from poetx.layers.walk import converted_layers
from poetx.ops.host import Copy, FileCopy, HostQueue, Return

CPU = torch.device("cpu")
WIDTH = 8
DELAYS = (0, 0, 1e-4, 1e-3)  # seconds
FORMS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "dense": ({}, torch.float32),
    "bfloat16 with extra bits": ({"weight_extra_bits": True}, torch.bfloat16),
    "int8": ({"weight_format": "int8", "group_size": 8}, torch.float32),
    "single-step, free": ({"method": "single-step", "update": "free"}, torch.bfloat16),
    "single-step, rotations": ({"method": "single-step", "update": "rotation"}, torch.float32),
}


class Interrupted(Exception):
    """What comes in the middle of a pass or a step."""


class Poisoned(Copy):
    """Its memory holds NaN once more when the queue gives it up."""

    late = random.Random(0)

    def is_of(self, tensors: tuple[Tensor, ...]) -> bool:
        fits = super().is_of(tensors)
        if not fits:
            self.arrived()
            poison(self._copies)
        return fits


class LateCopy(Poisoned):
    """Arrives when it likes; until then its memory holds NaN."""

    def _fill(self) -> None:
        poison(self._copies)
        self._thread = later(super()._fill, self.late)

    def arrived(self) -> tuple[Tensor, ...]:
        self._thread.join()
        return super().arrived()


class LateRead(Poisoned, FileCopy):
    """The same out of a file, one after the other."""

    def _start(self) -> None:
        poison(self._copies)
        super()._start()

    def _fill(self) -> None:
        time.sleep(self.late.choice(DELAYS))
        super()._fill()


class LateReturn(Return):
    """Is written when it likes, or never begins; what was read holds NaN as soon as it is over."""

    late = random.Random(1)
    fails = 0.0
    _thread: threading.Thread | None = None

    def _fill(self, *, wait: bool) -> None:
        if self.late.random() < self.fails:
            raise Interrupted
        self._thread = later(lambda: super(LateReturn, self)._fill(wait=wait), self.late)

    def over(self, *, on_host: bool = False) -> None:
        if self._thread is not None:
            self._thread.join()
            poison(self._values)


class LateQueue(HostQueue):
    start_copy = LateCopy
    start_read = LateRead
    start_return = LateReturn


def later(what: Any, late: random.Random) -> threading.Thread:
    delay = late.choice(DELAYS)

    def run() -> None:
        time.sleep(delay)
        with torch.no_grad():
            what()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def poison(tensors: Any) -> None:
    for tensor in tensors:
        tensor.fill_(float("nan") if tensor.is_floating_point() else 85)


def layers(count: int, form: str = "dense") -> nn.ModuleList:
    settings, dtype = FORMS[form]
    config = PoetConfig(block_size=4, mode="mem", init="normalized", **settings)
    kind = SingleStepLinear if config.method == "single-step" else PoetLinear
    made = [kind(WIDTH, WIDTH, False, config=config, name=str(number), dtype=dtype) for number in range(count)]
    return nn.ModuleList(made)


def in_host_memory(model: nn.Module, queue: HostQueue) -> None:
    """On the CPU too, where :func:`poetx.savings.offload_frozen_` sees no sense in it."""
    for _, layer in converted_layers(model):
        layer.keep_in_host_memory_(queue, CPU)


class _Side:
    """One of the two models, with what trains it."""

    def __init__(self, model: nn.ModuleList) -> None:
        self.model = model
        single = any(isinstance(layer, SingleStepLinear) for layer in model)
        self.optimizer = POETX(model, angle=0.02) if single else None

    def run(self, order: list[int], x: Tensor, plan: dict[str, Any]) -> Tensor:
        """One pass, and what ``plan`` says of it."""
        y = x
        for number, place in enumerate(order):
            layer = self.model[place]
            if plan["recomputed"] and number % 2:
                product = torch.utils.checkpoint.checkpoint(layer, y, use_reentrant=False)
            else:
                product = layer(y)
            y = torch.tanh(product + y)
            if plan["evaluates"]:  # somebody writes the one that comes next, whose copy is under way
                write(self.model[order[(number + 1) % len(order)]])
            if plan["stops"] == ("forward", number):
                return y.detach()
            if plan["stops"] == ("backward", number):
                y.register_hook(_stop)
        if not plan["evaluates"]:
            with contextlib.suppress(Interrupted):
                y.float().square().mean().backward()
        return y.detach()

    def step(self, *, merges: bool) -> int:
        """Step, as often as something interrupts it; how often that was."""
        interrupted = 0
        while self.optimizer is not None:
            try:
                self.optimizer.step()
                return interrupted
            except Interrupted:
                interrupted += 1
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
                    parameter.grad = None
        if merges:
            merge_(self.model)
        return 0

    def state(self) -> dict[str, Tensor]:
        found = dict(self.model.state_dict())
        for number, (_, layer) in enumerate(converted_layers(self.model)):
            if self.optimizer is not None:
                found |= {f"{number}//{key}": value for key, value in self.optimizer.state[layer.weight].items()}
        return found


@torch.no_grad()
def write(layer: Any) -> None:
    """Change what a layer's weight is stored in, from outside."""
    next(t for t in layer.frozen_weight.stored.tensors if t.is_floating_point()).mul_(-1)


def _stop(gradient: Tensor) -> None:
    raise Interrupted


def stress(
    form: str,
    steps: int,
    *,
    seed: int = 0,
    prefetch: int = 1,
    keep: int = 0,
    count: int = 4,
    directory: Path | None = None,
) -> dict[str, Any]:
    """Run both, and compare; weights in files of ``directory``, if one is given.

    Raises:
        AssertionError: they differ.
    """
    model = layers(count, form)
    there = copy.deepcopy(model)
    queue = LateQueue(prefetch, keep, directory)
    in_host_memory(there, queue)
    sides = _Side(model), _Side(there)
    choose = random.Random(seed)
    Poisoned.late, LateReturn.late = random.Random(seed), random.Random(seed + 1)
    usual, interrupted, stopped = list(range(count)), 0, 0
    for number in range(steps):
        for part in range(choose.choice((1, 1, 2))):
            order = usual if choose.random() < 0.7 else choose.choices(usual, k=choose.randint(1, count + 2))
            where = choose.choice((None, None, None, "forward", "backward")), choose.randrange(len(order))
            plan = {"recomputed": choose.random() < 0.3, "evaluates": choose.random() < 0.1, "stops": where}
            stopped += where[0] is not None
            x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(2 * number + part))
            outcomes = [side.run(order, x.to(FORMS[form][1]), plan) for side in sides]
            assert torch.equal(*outcomes), f"{form}: step {number}: another output"
        merges = choose.random() < 0.1
        LateReturn.fails = choose.choice((0, 0, 0.1))
        counts = [side.step(merges=merges) for side in sides]
        interrupted += sum(counts)
        if choose.random() < 0.1:  # somebody writes a weight between two passes
            for side in sides:
                write(side.model[1])
        states = [side.state() for side in sides]
        for name, value in states[0].items():
            assert torch.equal(value, states[1][name]), f"{form}: step {number}: another {name}"
    assert all(value.isfinite().all() for value in states[0].values()), f"{form}: not finite"
    found = {"loads": queue.loads, "missed": queue.missed, "writes": queue.writes}
    return {"form": form, "steps": steps, "stopped": stopped, "interrupted_steps": interrupted} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--prefetch", type=int, default=2, help="copies ahead")
    parser.add_argument("--keep", type=int, default=3, help="weights that stay on the device in a pass")
    parser.add_argument("--directory", type=Path, help="weights in files there, a disk's")
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for form in args.forms:
        began = time.perf_counter()
        row = stress(form, args.steps, seed=args.seed, prefetch=args.prefetch, keep=args.keep, directory=args.directory)
        row |= {"in_files": True} if args.directory else {}
        row |= {"prefetch": args.prefetch, "keep": args.keep, "seconds": round(time.perf_counter() - began, 1)}
        print(row, flush=True)
        if args.out:
            head = {"benchmark": "stream_stress", "seed": args.seed, "identical": True}
            append(args.out, [head | row | provenance(CPU)])


if __name__ == "__main__":
    main()
