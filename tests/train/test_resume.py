"""Every kind of run learns, goes on to the bit where it was stopped, and exports the plain model that it trained."""

from __future__ import annotations

import signal

import pytest
from transformers import AutoModelForCausalLM

from builders import At, Tiny, curve, interrupt, same, train_losses, weights
from poetx.recipe.shorthands import METHODS
from poetx.train.metrics import is_whole, read_metrics
from poetx.train.run import train

#: Every method, the weight formats being one on one weight object; and what else a step may be made of.
KINDS = {name: "" for name in METHODS if name not in ("int4", "nf4", "fp8") and not name.startswith("bipolar")}
KINDS["oft"] = "optimizer.lr=0.05"  # of rotations alone, on a model that stays random
OTHERS = {
    "nf4": "poet.weight_extra_bits=true poet.group_size=16",
    "fast, sgd": "optimizer.name=sgd optimizer.momentum=0.9",
    "fast, adafactor": "optimizer.name=adafactor",
    "fast, smmf": "optimizer.name=smmf",
    "fast, hfac": "optimizer.name=hfac",
    "fast, dense adafactor": "optimizer.dense_optimizer=adafactor",
    "fast, neighbours": "poet.permutation=contiguous",
    "fast, shared permutations": "poet.permutation=shared model.gradient_checkpointing=true",
    "fast, state in bfloat16": "optimizer.state_dtype=bfloat16",
    "fast, bfloat16": "train.dtype=bfloat16",
    "fast, bfloat16 and its state": "train.dtype=bfloat16 optimizer.state_dtype=same",
    "mem, int8 state": "optimizer.state_dtype=int8 optimizer.release_gradients=true train.chunked_loss=true "
    "optimizer.clip=null",
    "fast, dense smmf": "optimizer.dense_optimizer=smmf optimizer.state_dtype=int8 optimizer.release_gradients=true "
    "optimizer.clip=null",
    "single-step-mem, in parts": "train.micro_batch_size=2 model.gradient_checkpointing=true",
    "single-step, bfloat16": "poet.rotation_dtype=bfloat16 train.dtype=bfloat16 optimizer.state_dtype=int8",
    "single-step, smmf": "optimizer.name=smmf optimizer.release_gradients=true optimizer.clip=null "
    "train.chunked_loss=true",
    "single-step, 8 bits at the head, no look-ahead": "optimizer.name=scale optimizer.state_dtype=int8 "
    "optimizer.nesterov=false optimizer.poet_momentum=0.9 optimizer.release_gradients=true optimizer.clip=null "
    "train.micro_batch_size=2",
    "galore, 8 bits, released in parts": "optimizer.state_dtype=int8 optimizer.release_gradients=true "
    "optimizer.clip=null train.micro_batch_size=1",
    "muon, bfloat16 momentum": "optimizer.state_dtype=bfloat16",
}


@pytest.mark.parametrize("kind", KINDS | OTHERS)
def test_a_run_stopped_and_resumed_is_the_run_and_its_export_is_what_it_trained(tiny: Tiny, kind: str) -> None:
    """Merges fall at 5 and 10, the stop at 7, the checkpoints at 6 and 7; step 12 is the last."""
    method = kind.partition(",")[0]
    if method == "lora":
        pytest.importorskip("peft")
    settings = (f"method={method}", *(KINDS | OTHERS)[kind].split())
    straight = train(tiny(*settings, run_dir="straight"))
    recipe = tiny(*settings, run_dir="stopped")
    stopped = train(recipe, reporter=At(7, interrupt))
    assert (stopped.step, stopped.signum) == (7, signal.SIGINT)
    assert stopped.checkpoint == recipe.directory / "checkpoints" / "step-00000007"
    resumed = train(recipe, resume=True)
    assert resumed.signum is None
    assert curve(resumed.run_dir) == curve(straight.run_dir)
    assert same(weights(resumed), weights(straight))

    losses = train_losses(straight.run_dir)
    assert min(losses[-3:]) < losses[0] - (
        0 if any(word in kind for word in ("sgd", "adafactor", "oft", "lomo")) else 0.1
    )
    lines = read_metrics(straight.run_dir / "metrics.jsonl")
    assert all(map(is_whole, lines))  # the report leaves out what is not
    assert lines[-1]["tokens"] == straight.steps * 4 * 16
    merges = recipe.merge_every is not None
    assert [entry["step"] for entry in lines if entry.get("merged")] == [5, 10] * merges
    exported = AutoModelForCausalLM.from_pretrained(straight.run_dir / "export")
    assert same(dict(exported.named_parameters()), dict(straight.model.named_parameters()))
