"""Families of models: converting, merging, exporting keep the function; blocks of neighbours gather no activation."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from builders import turn
from helpers import relative_error
from poetx import PoetConfig, convert_, merge_, poet_layers, to_dense_
from poetx.ops.library import transparent_operators

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 44,  # which blocks of 8 do not divide
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "Llama": GROUPED | {"attention_bias": True, "mlp_bias": True},
    "Qwen3": GROUPED | {"tie_word_embeddings": True},
    "Mistral": GROUPED | {"sliding_window": 4},
    "Gemma": GROUPED,
    "GPT2": {"n_inner": 44},
    "GPTNeoX": {},
    "Phi3": GROUPED,
}
TOKENS = 2 * 13
_GATHERS = {"gather", "index", "index_select", "index_add", "index_put", "_index_put_impl_", "scatter", "scatter_add"}


def model_of(family):
    config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def logits(model):
    ids = torch.randint(1, 61, (2, 13), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids).logits


class _Gathers(TorchDispatchMode):
    """Operators that pick features or tokens of an activation by a list of indices."""

    def __enter__(self):
        self.found = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in _GATHERS and args[0].ndim > 1 and TOKENS in (args[0].shape[0], args[0].shape[:-1].numel()):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("permutation", ["random", "shared", "contiguous"])
@pytest.mark.parametrize("family", FAMILIES)
def test_conversion_merge_and_export_keep_the_function(family, permutation):
    model = model_of(family)
    before = logits(model)
    settings = {"permutation": permutation, "neumann_order": "exact"}
    report = convert_(model, PoetConfig(block_size=8, **settings))
    assert len(report.converted) == len(list(poet_layers(model))) > 3
    assert relative_error(logits(model), before) < 1e-12
    turn(model, angle=0.1)
    turned = logits(model)
    assert relative_error(turned, before) > 1e-3, "the rotations did nothing"
    for _ in range(2):
        merge_(model)
        assert relative_error(logits(model), turned) < 1e-12
    turn(model, angle=0.1)
    turned = logits(model)
    assert relative_error(logits(to_dense_(model)), turned) < 1e-12


@pytest.mark.parametrize(("mode", "by_weight"), [("fast", False), ("mem", False), ("mem", True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_neighbours_gather_no_activation(family, mode, by_weight, monkeypatch):
    monkeypatch.setattr("poetx.ops.linear.weight_is_cheaper", lambda *sizes: by_weight)
    counts = {}
    for permutation in ("random", "contiguous"):
        model = model_of(family)
        convert_(model, PoetConfig(block_size=8, mode=mode, permutation=permutation))
        with transparent_operators(), _Gathers() as gathers:
            logits(model).square().sum().backward()
        counts[permutation] = len(gathers.found)
        layers = len(list(poet_layers(model)))
    each = 0 if by_weight else 5 if mode == "fast" else 6
    assert counts == {"random": each * layers, "contiguous": 0}
