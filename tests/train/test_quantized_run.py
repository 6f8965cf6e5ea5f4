"""A run on a quantized base: recipe keys, resume, export, and a pretrained start."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from builders import Tiny, edit_tensors
from poetx import poet_layers
from poetx.errors import UserError
from poetx.methods.base import convert_model
from poetx.models import build_model
from poetx.runs.load import load_run, rebuild_run
from poetx.train.checkpoint import find_checkpoint, load_model
from poetx.train.run import train

CPU = torch.device("cpu")
XQ = ("poet.mode=mem", "poet.weight_format=int8", "poet.group_size=16")
#: Largest relative difference between the logits of the quantized run and of its float32 export: the merge at the
#: export is exact, and what is left is the training order's own error.
EXPORT = 1e-3


@pytest.mark.parametrize(("weight_format", "residual"), [("int8", "false"), ("nf4", "true")])
def test_a_run_keeps_its_format_and_exports_what_it_trained(tiny: Tiny, weight_format: str, residual: str) -> None:
    """Seven steps: the rotations of two have to be folded into the export."""
    settings = (f"poet.weight_format={weight_format}", f"poet.weight_extra_bits={residual}", "train.steps=7")
    straight = train(tiny(*XQ, *settings))
    rebuilt = rebuild_run(straight.run_dir, CPU)
    load_model(find_checkpoint(straight.run_dir)[0], rebuilt.model)
    formats = {layer.packed_weight.format.name for _, layer in poet_layers(rebuilt.model) if layer.packed_weight}
    assert formats == {weight_format}
    ids = torch.arange(16)[None]
    with torch.no_grad():
        quantized = rebuilt.model.eval()(input_ids=ids).logits
        exported = load_run(str(straight.run_dir / "export"), device="cpu").model(input_ids=ids).logits
    assert ((quantized - exported).norm() / quantized.norm()).item() < EXPORT


def test_a_pretrained_checkpoint_is_quantized_layer_by_layer_and_never_loaded_whole(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    plain = build_model(tiny("train.dtype=float32"), vocab_size=320, end_of_text_id=0, device=CPU)
    plain.save_pretrained(tmp_path / "pretrained")
    sizes = [f"model.{key}=null" for key in ("hidden_size", "intermediate_size", "num_layers", "num_heads")]
    recipe = tiny(*sizes, *XQ, "train.dtype=float32", "poet.init=keep", f"model.pretrained={tmp_path / 'pretrained'}")
    with monkeypatch.context() as patch:
        patch.delattr(transformers.AutoModelForCausalLM, "from_pretrained")
        model = build_model(recipe, vocab_size=320, end_of_text_id=0, device=CPU)
        assert next(model.parameters()).is_meta
        convert_model(model, recipe, CPU)
    ids = torch.arange(16)[None]
    with torch.no_grad():
        want, got = plain(input_ids=ids).logits, model(input_ids=ids).logits
    assert 0 < ((got - want).norm() / want.norm()).item() < 0.02

    # Names that the files have otherwise: loaded whole, as any model.
    file = tmp_path / "pretrained" / "model.safetensors"
    from safetensors.torch import save_file

    tensors = {name.removeprefix("model."): value for name, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    model = build_model(recipe, vocab_size=320, end_of_text_id=0, device=CPU)
    assert not next(model.parameters()).is_meta


def test_a_scale_that_is_not_finite_is_no_checkpoint(tiny: Tiny) -> None:
    path = train(tiny(*XQ, "train.steps=1", "train.export=false")).checkpoint
    assert path is not None
    name = "model.layers.0.mlp.up_proj.packed_weight.scale"
    scale = load_file(path / "model.safetensors")[name]
    edit_tensors(path, "model.safetensors", {name: scale.index_fill(0, torch.tensor(3), float("inf"))})
    with pytest.raises(UserError, match=rf"step-00000001: NaN or infinity in {name}"):
        load_run(str(path.parents[1]))


def test_mistakes_carry_the_key(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"poet\.mode='fast' with weight_format='int8'.*use mode='mem'"):
        tiny("poet.weight_format=int8")
    with pytest.raises(UserError, match=r"poet\.weight_format='int7'"):
        tiny("poet.mode=mem", "poet.weight_format=int7")
