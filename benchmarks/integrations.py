"""Train by POET-X in everybody's loops and write down what holds: the table of docs/integrations.md.

    python -m benchmarks.integrations                 # all examples; needs the extra: pip install '.[integrations]'
    python -m benchmarks.integrations --loops trainer

Each example is trained four times on a tiny model, in float32 on the CPU. *trains*: the loss falls, and every matrix of
the plain model has moved. *accumulates*: two halves of every batch give the weights of the whole one, up to rounding.
*resumes*: from the checkpoint of the middle, read into a model with other random weights, to the bit. *loads*: in
``AutoModelForCausalLM``, with the same logits.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import RESULTS, append, provenance

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
FORMS = ("poet-x", "single-step", "drop-in")
#: Examples, the libraries they need, and what they are called in the table.
LOOPS = {
    "own_loop": ((), "a loop of your own"),
    "trainer": (("accelerate",), "transformers' Trainer"),
    "trl_sft": (("trl", "datasets"), "TRL's SFTTrainer"),
    "accelerate_loop": (("accelerate",), "Accelerate"),
    "fabric_loop": (("lightning",), "Lightning Fabric"),
    "lightning_module": (("lightning",), "Lightning's Trainer"),
    "ddp": ((), "DistributedDataParallel, 2 ranks by torchrun"),
}
CHECKS = ("trains", "accumulates", "resumes", "loads")
_RANKS = 2


def check(loop: str, form: str, directory: Path) -> dict[str, bool]:
    """Run an example four times under ``directory``; which of :data:`CHECKS` hold. With ``ddp``: on every rank."""
    from transformers import AutoModelForCausalLM

    example, tiny = _example(loop), _example("tiny")
    whole, losses = example.main(form, directory / "whole")
    logits = _logits(whole)
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory / "whole/export")
    trained, start = loaded.state_dict(), tiny.tiny_model().state_dict()
    halves, _ = example.main(form, directory / "halves", accumulation=2)

    def elsewhere() -> Any:
        model = tiny.tiny_model()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        return model

    used, example.tiny_model = example.tiny_model, elsewhere
    try:
        resumed, later = example.main(form, directory / "whole", resume=True)
    finally:
        example.tiny_model = used
    return {
        "trains": losses[-1] < 0.95 * losses[0]
        and all(not torch.equal(value, start[key]) for key, value in trained.items() if value.ndim == 2),
        "accumulates": _distance(halves.state_dict(), whole.state_dict()) < 1e-3 * _distance(trained, start),
        "resumes": later[-1] == losses[-1]
        and all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items()),
        "loads": torch.allclose(_logits(loaded), logits, atol=1e-5),
    }


def check_on_ranks(forms: Sequence[str], directory: Path) -> dict[str, dict[str, bool]]:
    """:func:`check` of the DDP example under torchrun: what holds on every rank, by form."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={_RANKS}"]
    command += ["-m", "benchmarks.integrations", "--rank-in", str(directory), *forms]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return held_on_all(directory, forms)


def check_on_rank(rank: int, directory: str, forms: Sequence[str]) -> None:
    """:func:`check` of the DDP example on one rank of a process group, for :func:`held_on_all`."""
    held = {form: check("ddp", form, Path(directory) / form) for form in forms}
    (Path(directory) / f"{rank}.json").write_text(json.dumps(held))
    torch.distributed.barrier()


def held_on_all(directory: Path, forms: Sequence[str]) -> dict[str, dict[str, bool]]:
    """What held on every rank, by form."""
    ranks = [json.loads((directory / f"{rank}.json").read_text()) for rank in range(_RANKS)]
    return {form: {name: all(rank[form][name] for rank in ranks) for name in CHECKS} for form in forms}


def _rank(directory: Path, forms: Sequence[str]) -> None:
    torch.distributed.init_process_group("gloo")
    check_on_rank(torch.distributed.get_rank(), str(directory), forms)
    torch.distributed.destroy_process_group()
    os._exit(0)  # torch 2.13: a thread of the group that outlives the interpreter's shutdown aborts the process


def _example(name: str) -> Any:
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(name)


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    return model.eval()(torch.arange(3, 15)[None]).logits


def _distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    return sum(float((first[key].double() - second[key].double()).square().sum()) for key in first) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--loops", default=",".join(LOOPS))
    parser.add_argument("--rank-in", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("forms", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_in:
        _rank(options.rank_in, options.forms)
    for loop in options.loops.split(","):
        libraries, title = LOOPS[loop]
        with tempfile.TemporaryDirectory() as directory:
            place = Path(directory)
            if loop == "ddp":
                held = check_on_ranks(FORMS, place)
            else:
                with contextlib.redirect_stdout(io.StringIO()):
                    held = {form: check(loop, form, place / form) for form in FORMS}
        used = ("torch", "transformers", *libraries)
        versions = {name: importlib.metadata.version(name) for name in used}
        facts = {"versions": versions, **provenance(torch.device("cpu"))}
        append(RESULTS / "integrations.jsonl", [{"loop": loop, "form": form, **held[form], **facts} for form in FORMS])
        print(f"{title}: {json.dumps(held)}")


if __name__ == "__main__":
    main()
