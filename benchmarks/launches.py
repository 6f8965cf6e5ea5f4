"""How many kernels a GPU is asked for in one training step, counted on fake tensors: no GPU, and none of its memory.

    python -m benchmarks.launches llama-8b --methods single-step,fast,mem --out launches.jsonl
    python -m benchmarks.launches llama-8b --methods single-step --layer

Model, conversion, optimizer and step are those of ``poetx train``, on the fake tensors that memory is planned with. An
operator of torch counts as one kernel, a multi-tensor one as torch cuts it, a Triton launch as one, views and
allocations as none. ``--layer``: each shape of rotated layer by itself, forward and backward, without the rest, with
the bytes that its kernels move: every tensor that one is given once, twice where it is read and written.
``--decoder-layer``: all rotated layers of one decoder layer, which make their blocks together, as in a training step;
of shared permutations the whole step is to be counted, as they hold in the modules' own forward only.
"""

from __future__ import annotations

import argparse
import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.record import append, provenance
from poetx.bench.step import by_method
from poetx.layers.base import ConvertedLinear
from poetx.layers.blocks_together import blocks_together, groups_of
from poetx.layers.walk import poet_layers, single_step_layers
from poetx.methods.base import convert_model, method_of
from poetx.models import model_config, settled
from poetx.ops import block_diagonal, cayley, single_step
from poetx.ops.dispatch import SMALLEST_BLOCK
from poetx.ops.library import transparent_operators
from poetx.optim import adamw
from poetx.optim.single_step import together
from poetx.planner.estimate import meta_model, planned_recipe, vocabulary
from poetx.planner.fake import NumbersAreOne, fake_, fuse_attention_
from poetx.recipe import Recipe, load_recipe
from poetx.train.step import TrainingStep

_NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh", "set_"}
#: Of a Triton kernel: which of its tensors it both reads and writes.
_READ_AND_WRITTEN = {"add_kernel": (2, 3, 4, 5)}
_NOTHING |= {"device", "scalar_tensor"}  # the latter makes constants on the host
#: torch's multi-tensor kernels: elements to a thread block, thread blocks to a launch, tensors to a launch by lists.
_CHUNK, _CHUNKS, _TENSORS = 65536, 320, {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}


class Launches(TorchDispatchMode):
    """Counts, by name and by phase, and bytes of what is given to each by name."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "before"
        self.counts: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[str] = Counter()

    def add(self, name: str, count: int = 1, *, given: Any = (), again: Any = ()) -> None:
        self.counts[self.phase, name] += count
        self.bytes[name] += _size(_tensors(given)) + sum(t.numel() * t.element_size() for t in _tensors(again))

    def total(self, phase: str) -> int:
        return sum(count for (at, _), count in self.counts.items() if at == phase)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name.startswith("_foreach_"):
            self.add(name, _multi_tensor([leaf for leaf in args if isinstance(leaf, (list, tuple))]))
        elif name == "zeros" and out.ndim == 0:
            pass  # the gradient of an anchor, on the host
        elif not (name in _NOTHING or func.is_view or all(map(_on_the_host, _tensors((args, out))))):
            written = [a.name for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
            in_place = bool(written) and written[0] == func._schema.arguments[0].name
            self.add(name, given=(args, kwargs, out), again=args[:1] if in_place else ())
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _size(tensors: list[Tensor]) -> int:
    """Bytes of these tensors; of several views of the same memory, once."""
    spans: dict[int, list[tuple[int, int]]] = {}
    for tensor in tensors:
        start = tensor.storage_offset() * tensor.element_size()
        span = (start, start + tensor.numel() * tensor.element_size())
        spans.setdefault(tensor.untyped_storage()._cdata, []).append(span)
    total = 0
    for here in spans.values():
        end = 0
        for first, last in sorted(here):
            total += max(0, last - max(first, end))
            end = max(end, last)
    return total


def _on_the_host(tensor: Tensor) -> bool:
    """Counters and seeds."""
    return tensor.dtype == torch.int64 and tensor.numel() <= 2


def _multi_tensor(lists: list[Any]) -> int:
    pairs = [pair for pair in zip(*lists, strict=True) if not _on_the_host(pair[0])]
    if len({tensor.dtype for pair in pairs for tensor in _tensors(pair)}) > 1:
        return len(pairs)  # one after the other
    chunks = sum(-(-pair[0].numel() // _CHUNK) for pair in pairs)
    return max(-(-chunks // _CHUNKS), -(-len(pairs) // _TENSORS[len(lists)]))


@contextlib.contextmanager
def as_on_a_gpu(counts: Launches) -> Iterator[None]:
    """Fake tensors take the ways that tensors on a GPU take; Triton kernels are counted and not run."""
    from poetx.ops.triton import adamw as adamw_kernels
    from poetx.ops.triton import cayley as cayley_kernels
    from poetx.ops.triton import single_step as single_step_kernels

    def use(tensor: Tensor, block_size: int = SMALLEST_BLOCK, **settings: Any) -> bool:
        fits = tensor.dtype in settings.get("dtypes", (torch.float32, torch.bfloat16))
        return fits and block_size >= SMALLEST_BLOCK and settings.get("missing") is None

    def gather(x_NF: Tensor, perm: Tensor, out: Tensor | None = None) -> Tensor:
        out = x_NF.new_empty(x_NF.shape[0], perm.numel()) if out is None else out
        counts.add("permute_kernel", given=(x_NF, perm, out))
        return out

    def inverse(perm: Tensor) -> Tensor:
        back = torch.empty_like(perm)
        counts.add("inverse_kernel", given=(perm, back))
        return back

    product = block_diagonal._wide_product

    def wide_product(*arguments: Any) -> Tensor:
        out = product(*arguments)
        counts.add("bmm", given=(arguments, out))
        return out

    def launch(kernel: Any, *arguments: Any, **settings: Any) -> None:
        name = kernel.fn.__name__
        again = [arguments[1:][place] for place in _READ_AND_WRITTEN.get(name, ())]  # the first is the grid
        counts.add(name, given=arguments, again=again)

    with contextlib.ExitStack() as stack:
        for module in (adamw, cayley, single_step, together):
            stack.enter_context(mock.patch.object(module, "use_triton", use))
        for module in (adamw_kernels, cayley_kernels, single_step_kernels):
            stack.enter_context(mock.patch.object(module, "launch", launch))
        for name, function in (("gather", gather), ("inverse", inverse), ("_wide_product", wide_product)):
            stack.enter_context(mock.patch.object(block_diagonal, name, function))
        stack.enter_context(transparent_operators(device_type="cuda"))
        yield


def of_a_step(recipe: Recipe, sequences: int, length: int) -> tuple[Launches, int]:
    """Launches of the third step of ``recipe`` (either side has been written once), and its rotated layers' number."""
    _, plan = planned_recipe(recipe, (), None)
    plan = settled(plan, torch.device("cuda"))
    model = meta_model(model_config(plan, vocab_size=vocabulary(plan), end_of_text_id=0), plan)
    fuse_attention_(model)
    convert_model(model, plan, None)
    mode, counts = FakeTensorMode(allow_non_fake_inputs=True), Launches()
    fake_(model, mode)
    with mode, NumbersAreOne() as numbers:
        optimizer = method_of(plan).build_optimizer(model, plan.train.steps, foreach=True)

        def enter(phase: str) -> None:
            numbers.phase = counts.phase = phase

        step = TrainingStep.of(plan, model, optimizer, phase=enter)
        ids = torch.zeros(sequences, length, dtype=torch.long)
        with as_on_a_gpu(counts), counts:
            for _ in range(3):
                counts.counts.clear()
                step.take([(ids, ids)], clip=plan.optimizer.clip or None)
    return counts, len(_rotated(model))


def of_a_decoder_layer(recipe: Recipe, tokens: int) -> tuple[Counter[str], int]:
    """Launches of all rotated layers of a decoder layer, forward and backward, and their number."""
    _, plan = planned_recipe(recipe.with_keys({"model.num_layers": 1}), (), None)
    plan = settled(plan, torch.device("cuda"))
    model = meta_model(model_config(plan, vocab_size=vocabulary(plan), end_of_text_id=0), plan)
    convert_model(model, plan, None)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake_(model, mode)
    with mode:
        kept = method_of(plan).build_optimizer(model, plan.train.steps, foreach=True)
        layers, counts = _rotated(model), Launches()
        dtype = layers[0].weight_dtype
        xs = [torch.empty(tokens, layer.in_features, dtype=dtype, requires_grad=True) for layer in layers]
        gs = [torch.empty(tokens, layer.out_features, dtype=dtype) for layer in layers]
        with as_on_a_gpu(counts), counts, blocks_together(groups_of(model)):
            torch.autograd.backward([layer(x) for layer, x in zip(layers, xs, strict=True)], gs)
        del kept
    return Counter({name: count for (_, name), count in counts.counts.items()}), len(layers)


def of_a_layer(recipe: Recipe, tokens: int) -> dict[str, tuple[Counter[str], Counter[str]]]:
    """Launches of each shape of rotated layer, forward and backward, and the bytes they move, by kernel."""
    _, plan = planned_recipe(recipe.with_keys({"model.num_layers": 1}), (), None)
    plan = settled(plan, torch.device("cuda"))
    model = meta_model(model_config(plan, vocab_size=vocabulary(plan), end_of_text_id=0), plan)
    convert_model(model, plan, None)
    mode, found = FakeTensorMode(allow_non_fake_inputs=True), {}
    fake_(model, mode)
    with mode:
        kept = method_of(plan).build_optimizer(model, plan.train.steps, foreach=True)
        for layer in _rotated(model):
            counts = Launches()
            x = torch.empty(tokens, layer.in_features, dtype=layer.weight_dtype, requires_grad=True)
            g = torch.empty(tokens, layer.out_features, dtype=layer.weight_dtype)
            with as_on_a_gpu(counts), counts:
                layer(x).backward(g)
            launches = Counter({name: count for (_, name), count in counts.counts.items()})
            found[f"{layer.out_features}x{layer.in_features}"] = launches, counts.bytes
        del kept
    return found


def _rotated(model: Any) -> list[ConvertedLinear]:
    return [layer for walk in (poet_layers, single_step_layers) for _, layer in walk(model)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--methods", default="adamw,fast,mem,single-step")
    parser.add_argument("--tokens", default="1x2048", help="sequences x length")
    parser.add_argument("--layer", action="store_true", help="rotated layers one by one, no whole step")
    parser.add_argument("--decoder-layer", action="store_true", help="rotated layers of one decoder layer together")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sequences, length = map(int, args.tokens.split("x"))
    recipe = load_recipe(args.recipe, args.overrides, text=False).with_keys({"data.seq_len": length})
    rows = []
    for method in args.methods.split(","):
        row: dict[str, Any] = {"benchmark": "launches", "recipe": args.recipe, "overrides": args.overrides}
        row |= {"method": method, "sequences": sequences, "seq_len": length}
        if args.layer:
            for shape, (kernels, moved) in of_a_layer(by_method(recipe, method), sequences * length).items():
                total = {"launches": kernels.total(), "bytes": moved.total()}
                rows.append(row | {"layer": shape} | total | {"kernels": dict(kernels)})
                print(method, shape, total, dict(kernels), flush=True)
            continue
        if args.decoder_layer:
            kernels, layers = of_a_decoder_layer(by_method(recipe, method), sequences * length)
            each = {"layers": layers, "launches_per_layer": round(kernels.total() / layers, 2)}
            rows.append(row | {"decoder_layer": True} | each | {"kernels": dict(kernels)})
            print(method, each, dict(kernels), flush=True)
            continue
        counts, layers = of_a_step(by_method(recipe, method), sequences, length)
        phases = {phase: counts.total(phase) for phase in ("forward", "backward", "step")}
        most = Counter({name: count for (at, name), count in counts.counts.items() if at == "step"}).most_common(24)
        rows.append(row | {"layers": layers, "launches": phases, "step_kernels": dict(most)})
        print(method, f"{layers} rotated layers", phases)
        print("   step:", dict(most), flush=True)
    if args.out:
        append(args.out, [row | provenance(torch.device("cpu")) for row in rows])


if __name__ == "__main__":
    main()
