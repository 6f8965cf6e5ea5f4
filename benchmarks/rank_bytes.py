"""What a step of the 3B shape sends under data parallel, over what AdamW's sends, in weights of either dtype.

    python -m benchmarks.text --out TEXT
    python -m benchmarks.rank_bytes --text TEXT/text.jsonl --out benchmarks/results/rank_bytes.jsonl

Bytes that one rank hands to all-reduce, or to an exchange that sends as much, added up from the shapes of what is
averaged: gradients, and the momenta of single-step matrices. ``of_ddp`` is the share of what AdamW sends under
torch's ``DistributedDataParallel``, every gradient whole. ``of_adamw`` is that of AdamW by ``poetx train``, which sends
the embedding's rows that the batch has tokens of, as for any method: how many these are is counted in batches of the
recipe on a text, by a tokenizer of the recipe's size trained on it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.record import append, provenance
from poetx.data.prepare import prepare_data
from poetx.data.sampler import batch_windows
from poetx.distributed.gradients import embeddings
from poetx.methods.base import convert_model, method_of
from poetx.models import build_model
from poetx.optim.single_step.optimizer import POETX
from poetx.recipe import Recipe, load_recipe
from poetx.train.step import average_of

SHAPE, BLOCK_SIZE, VOCABULARY = "llama-3b", 256, 32000
FORMS: dict[str, list[str]] = {
    "fast, mem": ["method=fast"],
    "int8": ["method=int8"],
    "single-step, free": ["method=single-step"],
    "single-step, rotation": ["method=single-step", "poet.update=rotation"],
    "adamw": ["method=adamw"],
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="what batches are counted on")
    parser.add_argument("--out", type=Path, help="append JSON lines here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        rows = rows_of(touched(args.text, Path(directory)))
    for row in rows:
        print(row)
    if args.out:
        append(args.out, [row | provenance(torch.device("cpu")) for row in rows])


if __name__ == "__main__":
    main()
