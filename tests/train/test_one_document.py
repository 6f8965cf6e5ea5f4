"""Passes without positions do not look at them, and those with positions do as ever."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, masking_utils

from poetx.train.one_document import one_document
from poetx.train.step import language_loss

IDS = torch.arange(24).view(2, 12) * 5 % 97
PACKED = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]).expand(2, 12)


@pytest.fixture
def model():
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return AutoModelForCausalLM.from_config(LlamaConfig(**shape, num_attention_heads=2))


def looks(monkeypatch):
    """Counts how often transformers looks whether a value is true."""
    seen = []
    plain = torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: (seen.append(1), plain(tensor))[1])
    return seen


@pytest.mark.parametrize("chunked", [False, True])
def test_a_pass_looks_at_no_value(model, chunked, monkeypatch):
    forward = model.base_model if chunked else model
    want = torch.nn.functional.cross_entropy(model(input_ids=IDS).logits.flatten(0, 1), IDS.flatten(), reduction="sum")
    monkeypatch.setattr("poetx.savings.chunked_loss._check_labels", lambda *args: None)  # on a CPU at once
    seen = looks(monkeypatch)
    loss, _ = language_loss(model, forward, IDS, IDS, chunked=chunked)
    assert not seen
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    model(input_ids=IDS, use_cache=False)
    assert seen, "elsewhere transformers looks"


@pytest.mark.parametrize("capturing", [False, True])
def test_attention_has_no_mask_whether_captured_or_not(model, capturing, monkeypatch):
    masks = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def attention(*args, attn_mask=None, **settings):
        masks.append(attn_mask)
        return plain(*args, attn_mask=attn_mask, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    language_loss(model, model, IDS, IDS, chunked=False)
    assert masks == [None, None]
    masks.clear()
    language_loss(model, model, IDS, IDS, PACKED, chunked=False)
    assert all(mask is not None for mask in masks)


def test_packed_documents_see_themselves_only(model):
    packed, _ = language_loss(model, model, IDS, IDS, PACKED, chunked=False)
    parts = [
        language_loss(model, model, ids.contiguous(), ids.contiguous(), chunked=False)[0]
        for ids in IDS.split([5, 7], 1)
    ]
    assert packed.item() == pytest.approx(sum(part.item() for part in parts), rel=1e-5)


def test_only_here_and_only_for_models_of_transformers(model):
    with one_document(model):
        assert masking_utils.find_packed_sequence_indices(PACKED) is None
        found = []
        other = threading.Thread(target=lambda: found.append(masking_utils.find_packed_sequence_indices(PACKED)))
        other.start()
        other.join()
        assert found[0] is not None
        with one_document(torch.nn.Linear(2, 2)):
            assert masking_utils.find_packed_sequence_indices(PACKED) is not None
        assert masking_utils.find_packed_sequence_indices(PACKED) is None
    assert masking_utils.find_packed_sequence_indices(PACKED) is not None
