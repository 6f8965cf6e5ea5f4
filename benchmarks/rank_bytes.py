"""What a step of the 3B shape sends under data parallel, over what AdamW's sends, in weights of either dtype.

    python -m benchmarks.text --out TEXT
    python -m benchmarks.rank_bytes --text TEXT/text.jsonl --out benchmarks/results/rank_bytes.jsonl
    python -m benchmarks.rank_bytes --fsdp --ranks 8 --out benchmarks/results/rank_bytes.jsonl

Bytes that one rank hands to all-reduce, or to an exchange that sends as much, added up from the shapes of what is
averaged: gradients, and the momenta of single-step matrices. ``of_ddp`` is the share of what AdamW sends under
torch's ``DistributedDataParallel``, every gradient whole. ``of_adamw`` is that of AdamW by ``poetx train``, which sends
the embedding's rows that the batch has tokens of, as for any method: how many these are is counted in batches of the
recipe on a text, by a tokenizer of the recipe's size trained on it.

With ``--fsdp``: what a rank sends in a step of ``parallel: fsdp``, of real steps on fake tensors in a process group
that sends nothing, every collective counted as a ring sends it: of the whole (N - 1) / N for an all-gather, a
reduce-scatter and an all-to-all, 2 (N - 1) / N for an all-reduce; means over all ranks, and over two steps, as a
single step writes its sides in turn. Shares are of what AdamW sends under ``DistributedDataParallel``, all gradients
all-reduced whole. Gathers of weights that do not train are apart, as is what a fold asks of other ranks' rows.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.record import RESULTS, append, provenance, rows_in
from poetx.data.prepare import prepare_data
from poetx.data.sampler import batch_windows
from poetx.distributed.gradients import embeddings
from poetx.methods.base import convert_model, method_of
from poetx.models import build_model, model_config
from poetx.optim.single_step.optimizer import POETX
from poetx.planner.estimate import meta_model, part_of
from poetx.planner.fake import NumbersAreOne, fake_, fake_ranks, fuse_attention_
from poetx.recipe import Recipe, load_recipe
from poetx.train.sharding import all_ranks, shard_model_
from poetx.train.step import TrainingStep, average_of

SHAPE, BLOCK_SIZE, VOCABULARY = "llama-3b", 256, 32000
#: What a step under FSDP2 sends; and collectives that send the whole once around a ring.
KINDS = ("frozen, gathered", "trained, gathered", "trained, reduced", "folded rows")
ONCE = ("_reduce_scatter_base_", "alltoall_base_", "allgather_")
FORMS: dict[str, list[str]] = {
    "fast, mem": ["method=fast"],
    "int8": ["method=int8"],
    "single-step, free": ["method=single-step"],
    "single-step, rotation": ["method=single-step", "poet.update=rotation"],
    "adamw": ["method=adamw"],
}
FSDP_FORMS = {
    "fast": ["method=fast"],
    "fast, rotations in bfloat16": ["method=fast", "poet.rotation_dtype=bfloat16"],
    "mem": ["method=mem"],
    **{form: words for form, words in FORMS.items() if form != "fast, mem"},
}
BATCHES = 8


def sent_by_shapes(recipe: Recipe, vocab_size: int, rows: float = 1.0) -> int:
    """Bytes of what a step averages, where this share of the rows of its embedding has a gradient."""
    device = torch.device("meta")
    with device:
        model = build_model(recipe, vocab_size=vocab_size, end_of_text_id=0, device=device)
    convert_model(model, recipe, None)
    total = average_of((p for p in model.parameters() if p.requires_grad), model, overlap=False).nbytes
    total -= round((1 - rows) * sum(p.nbytes for p in embeddings(model)))
    optimizer = method_of(recipe).build_optimizer(model, recipe.train.steps)
    if isinstance(optimizer, POETX):
        total += sum(m.momenta.numel() * m.sent_dtype.itemsize for m in optimizer._matrices or ())
    return total


class Sent(TorchDispatchMode):
    """Bytes that this rank sends, as a ring does, by what they are of; see the module's text.

    Args:
        model: after ``fully_shard``, whose gathers are told apart by their size.
    """

    def __init__(self, model: nn.Module, ranks: int) -> None:
        super().__init__()
        self.ranks, self.of = ranks, dict.fromkeys(KINDS, 0.0)
        self.gathers: dict[int, int] = {}  # how much of a gather of so many bytes trains
        for module in model.modules():
            if isinstance(module, FSDPModule):
                inside = [m for m in module.modules() if m is not module and isinstance(m, FSDPModule)]
                inner = {p for m in inside for p in m.parameters()}
                own = [p for p in module.parameters() if isinstance(p, DTensor) and p not in inner]
                sizes = [(ranks * -(-p.shape[0] // ranks) * p[0].numel() * p.itemsize, p.requires_grad) for p in own]
                whole = sum(size for size, _ in sizes)
                trained = sum(size for size, trains in sizes if trains)
                assert self.gathers.setdefault(whole, trained) == trained, "two kinds of gathers have one size"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            whole = max(sum(t.nbytes for t in tree_leaves(arg) if isinstance(t, torch.Tensor)) for arg in args)
            ring = (self.ranks - 1) / self.ranks
            if name == "_allgather_base_":
                trained = self.gathers[whole]
                self.of["frozen, gathered"] += ring * (whole - trained)
                self.of["trained, gathered"] += ring * trained
            elif name == "send":
                self.of["folded rows"] += whole
            elif name != "recv_":
                self.of["trained, reduced"] += {"allreduce_": 2, **dict.fromkeys(ONCE, 1)}[name] * ring * whole
        return func(*args, **(kwargs or {}))


def sent_by_all(recipe: Recipe, ranks: int) -> dict[str, float]:
    """:func:`sent_sharded` of the whole depth, mean over the ranks; all layers are alike, so a few say it."""
    layers = int(recipe.model.num_layers or 0)
    one, two = (recipe.with_keys({"model.num_layers": depth}) for depth in (1, 2))
    few, more = sent_sharded(one, ranks), sent_sharded(two, ranks)
    sent = {kind: few[kind] + (layers - 1) * (more[kind] - few[kind]) for kind in KINDS}
    if few["folded rows"]:  # all else is the same on every rank
        sent["folded rows"] = layers * fmean(sent_sharded(one, ranks, rank)["folded rows"] for rank in range(ranks))
    return sent


def sent_sharded(recipe: Recipe, ranks: int, rank: int = 0) -> dict[str, float]:
    """Bytes of :data:`KINDS` that a rank sends in a step of a sharded model, mean of two; every row has a gradient."""
    recipe = part_of(recipe, ranks)
    config = model_config(recipe, vocab_size=recipe.data.vocab_size, end_of_text_id=0)
    model, mode = meta_model(config, recipe), FakeTensorMode(allow_non_fake_inputs=True)
    with fake_ranks(ranks, rank):
        fuse_attention_(model)
        convert_model(model, recipe, None)
        fake_(model, mode)
        place = torch.device("cpu")
        mesh = all_ranks(place)
        with mode, NumbersAreOne() as numbers:
            shard_model_(model, place, mesh)
            optimizer = method_of(recipe).build_optimizer(model, recipe.train.steps)
            step = TrainingStep.of(recipe, model, optimizer, phase=lambda phase: setattr(numbers, "phase", phase))
            tokens = torch.zeros(1, 8, dtype=torch.long)
            with Sent(model, ranks) as sent:
                for _ in range(2):
                    step.take([(tokens, tokens)], clip=recipe.optimizer.clip or None)
    return {kind: size / 2 for kind, size in sent.of.items()}


def touched(text: Path, directory: Path) -> float:
    """Mean share of the vocabulary that is among the tokens of a batch of the recipe."""
    settings = [f"data.train={text}", f"data.cache_dir={directory}", f"data.vocab_size={VOCABULARY}"]
    recipe = load_recipe(SHAPE, settings)
    windows = prepare_data(recipe).train
    shares = []
    for step in range(BATCHES):
        asked = batch_windows(step, batch_size=recipe.train.batch_size, windows=windows.order, seed=recipe.train.seed)
        shares.append(windows.batch(asked)[0].unique().numel() / VOCABULARY)
    return fmean(shares)


def rows_of(share: float) -> list[dict[str, Any]]:
    rows = []
    for dtype in ("float32", "bfloat16"):
        blocks = f"poet.block_size={BLOCK_SIZE}"
        recipes = {
            form: load_recipe(SHAPE, [*words, f"train.dtype={dtype}", *([blocks] * (form != "adamw"))], text=False)
            for form, words in FORMS.items()
        }
        whole, sent = ({f: sent_by_shapes(r, VOCABULARY, rows) for f, r in recipes.items()} for rows in (1.0, share))
        rows += [
            {"benchmark": "bytes", "shape": SHAPE, "block_size": BLOCK_SIZE, "dtype": dtype, "form": form}
            | {"touched_rows": round(share, 4), "bytes": sent[form], "bytes_all_rows": whole[form]}
            | {"of_adamw": round(sent[form] / sent["adamw"], 4), "of_ddp": round(sent[form] / whole["adamw"], 4)}
            | {"all_rows_of_ddp": round(whole[form] / whole["adamw"], 4)}
            for form in FORMS
        ]
    return rows


def fsdp_rows(share: float, ranks: int) -> Iterator[dict[str, Any]]:
    for dtype, form in product(("float32", "bfloat16"), FSDP_FORMS):
        if form.endswith("in bfloat16") and dtype == "float32":
            continue
        common = [f"train.dtype={dtype}", "train.sample_tokens=0", "parallel=fsdp"]
        blocks = [f"poet.block_size={BLOCK_SIZE}"] * (form != "adamw")
        recipe = load_recipe(SHAPE, [*FSDP_FORMS[form], *common, *blocks], text=False)
        ring = (ranks - 1) / ranks
        unit = 2 * ring * sent_by_shapes(load_recipe(SHAPE, ["method=adamw", *common], text=False), VOCABULARY)
        sent = sent_by_all(recipe, ranks)
        every_row = sent["trained, gathered"] + sent["trained, reduced"]
        untouched = (
            ring * (1 - share) * VOCABULARY * int(recipe.model.hidden_size or 0) * getattr(torch, dtype).itemsize
        )
        sent["trained, reduced"] -= untouched
        yield (
            {"benchmark": "fsdp_bytes", "shape": SHAPE, "block_size": BLOCK_SIZE, "dtype": dtype, "form": form}
            | {"ranks": ranks, "touched_rows": round(share, 4)}
            | {kind: round(size) for kind, size in sent.items()}
            | {"of_ddp": round((every_row - untouched) / unit, 4), "all_rows_of_ddp": round(every_row / unit, 4)}
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", type=Path, help="what batches are counted on")
    what.add_argument(
        "--fsdp", action="store_true", help="sharded steps, of batches as the rows of --text counted them"
    )
    parser.add_argument("--ranks", type=int, default=8, help="of sharded steps")
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    args = parser.parse_args()
    if args.fsdp:
        rows = fsdp_rows(rows_in(RESULTS / "rank_bytes.jsonl")[-1]["touched_rows"], args.ranks)
    else:
        with tempfile.TemporaryDirectory() as directory:
            rows = rows_of(touched(args.text, Path(directory)))
    for row in rows:
        print(row, flush=True)
        if args.out:
            append(args.out, [row | provenance(torch.device("cpu"))])


if __name__ == "__main__":
    main()
