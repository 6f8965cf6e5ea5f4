"""OFT: the rotated input against plain torch, and a run on a pretrained model against peft's own OFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from builders import Tiny, llama, train_losses
from helpers import TOLERANCE, random_skew, relative_error
from poetx.config import PoetConfig
from poetx.convert import convert_, to_dense_
from poetx.errors import UserError
from poetx.layers.oft import OFTLinear
from poetx.methods.oft import OFT
from poetx.ops import reference
from poetx.train.run import train


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(12, 8, 4), (11, 6, 4), (5, 7, 9)], ids=str)
def test_output_and_gradients_are_those_of_plain_torch(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    n, m, block_size = sizes
    linear: Any = nn.Linear(n, m, dtype=dtype)
    layer: Any = OFTLinear.from_linear(linear, config=PoetConfig(method="oft", block_size=block_size))
    q = random_skew(n, layer.block_size_in).to(layer.skew_in.dtype)
    with torch.no_grad():
        layer.skew_in.copy_(q)
    x: Any = torch.randn(2, 3, n, dtype=dtype)
    g = torch.randn(2, 3, m, dtype=dtype)
    x.requires_grad_()
    twin_x: Any = x.detach().double().requires_grad_()
    twin_q: Any = q.double().requires_grad_()
    rotation = reference.rotation_of_blocks(twin_q, n, layer.block_size_in, 3)
    want = (twin_x @ rotation) @ linear.weight.detach().double().T + linear.bias.detach().double()
    want.backward(g.double())
    got = layer(x)
    got.backward(g)
    assert relative_error(got, want) < TOLERANCE[dtype]
    assert relative_error(x.grad, twin_x.grad) < TOLERANCE[dtype]
    assert relative_error(layer.skew_in.grad, twin_q.grad) < TOLERANCE[dtype]
    assert relative_error(layer.bias.grad, g.double().sum((0, 1))) < TOLERANCE[dtype]
    assert relative_error(layer.dense_weight(), (rotation @ linear.weight.detach().double().T).T) < TOLERANCE[dtype]


def test_a_quantized_weight_stays_as_it_is_and_its_rotation_is_folded_at_the_end() -> None:
    model: Any = llama()
    convert_(model, PoetConfig(method="oft", block_size=16, weight_format="int8"))
    ids = torch.randint(97, (2, 9))
    for name, parameter in model.named_parameters():
        if "skew_in" in name:
            nn.init.normal_(parameter, std=0.02)
    codes = {name: buffer.clone() for name, buffer in model.named_buffers() if "codes" in name}
    want = model(input_ids=ids).logits
    want.square().mean().backward()
    assert all(p.grad.norm() > 0 for n, p in model.named_parameters() if "skew_in" in n)
    assert all(torch.equal(buffer, codes[name]) for name, buffer in model.named_buffers() if name in codes)
    assert relative_error(to_dense_(model)(input_ids=ids).logits, want) < 1e-5


def test_settings_that_a_rotation_of_the_input_has_not_are_refused() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"init": "normalized"}, "init='normalized' with method='oft'"),
        ({"weight_extra_bits": True}, "weight_extra_bits=True with method='oft'"),
    ]
    for settings, words in cases:
        with pytest.raises(UserError, match=words):
            PoetConfig(method="oft", **settings)


def peft_oft(method: OFT, model: nn.Module) -> None:
    import peft

    config: Any = peft.OFTConfig(r=0, oft_block_size=8, target_modules="all-linear", task_type="CAUSAL_LM")
    assert (config.use_cayley_neumann, config.num_cayley_neumann_terms) == (True, 5)
    peft.inject_adapter_in_model(config, model)


def test_a_pretrained_model_trains_as_by_peft_and_its_export_loads(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """peft's five terms are I + 2Q + 2Q² + 2Q³ + Q⁴, which is order 3 here."""
    pytest.importorskip("peft")
    start = train(tiny("method=adamw", "optimizer.lr=0.02", run_dir="start")).run_dir / "export"
    before = AutoModelForCausalLM.from_pretrained(start).state_dict()
    source = [f"model.pretrained={start}", "optimizer.lr=0.02", "train.steps=20", "optimizer.clip=0.1"]
    source += [f"model.{key}=null" for key in ("hidden_size", "intermediate_size", "num_layers", "num_heads")]
    settings = ["method=oft", "poet.block_size=8", *source]
    result = train(tiny(*settings, run_dir="ours"))
    ours = train_losses(result.run_dir)
    assert sum(ours[-4:]) < sum(ours[:4]) - 0.2
    exported = AutoModelForCausalLM.from_pretrained(result.run_dir / "export").state_dict()
    moved = {name for name, value in exported.items() if not torch.equal(value, before[name])}
    assert moved == {name for name in exported if "proj" in name}
    for name in moved:
        assert (
            relative_error(exported[name] @ exported[name].T, before[name] @ before[name].T) < 0.05
        )  # turned, but for θ⁴
    monkeypatch.setattr(OFT, "apply_", peft_oft)
    theirs = train_losses(train(tiny(*settings, "train.export=false", run_dir="peft")).run_dir)
    assert ours == pytest.approx(theirs, abs=1e-4)
