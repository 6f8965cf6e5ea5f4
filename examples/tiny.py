"""What the examples share: a tiny model, its text, and the three ways to train by POET-X. Put yours in their places."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import poetx

#: None: an ordinary model, whose matrices :class:`poetx.POETX` rotates without conversion.
FORMS: dict[str, poetx.PoetConfig | None] = {
    "poet-x": poetx.PoetConfig(block_size=16),
    "single-step": poetx.PoetConfig(method="single-step", block_size=16),
    "drop-in": None,
}
LR = 3e-3  # of all that is not rotated
#: What else each form is told: radians a step, or the rate of rotations that live for so many steps until a merge.
SETTINGS: dict[str, dict[str, Any]] = {
    "poet-x": {"poet_lr": 1e-2, "merge_every": 2},
    "single-step": {"angle": 0.03},
    "drop-in": {"angle": 0.03, "block_size": 16},
}


def tiny_model() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, bos_token_id=1, eos_token_id=2))


def rows(count: int = 24) -> list[dict[str, Any]]:
    """``count`` texts of 12 tokens, which count up in a circle of 8: there is something to learn."""
    texts = [3 + (start + torch.arange(12)) % 8 for start in range(count)]
    return [{"input_ids": text, "labels": text} for text in texts]


def tiny_tokenizer() -> Any:
    """A word for every token: t3, t4, …"""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"t{i}": i for i in range(3, 64)}}
    model = Tokenizer(WordLevel(words, unk_token="<pad>"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="</s>")


def optimizer_for(model: torch.nn.Module, form: str) -> torch.optim.Optimizer:
    """Convert the model, and build the optimizer of the form: all that POET-X needs in a loop of one's own."""
    config, settings = FORMS[form], SETTINGS[form]
    if config is not None:
        poetx.convert_(model, config)
    if form != "poet-x":
        return poetx.POETX(model, lr=LR, **settings)
    optimizer = torch.optim.AdamW(poetx.param_groups(model, lr=LR, poet_lr=settings["poet_lr"]))
    poetx.merge_every(optimizer, model, steps=settings["merge_every"])
    return optimizer


def save(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, path)


def load(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The step that :func:`save` was called at."""
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"]


def run(main: Callable[..., tuple]) -> None:
    """``python examples/NAME.py [FORM]``: train under runs/NAME, print the losses."""
    script = Path(sys.argv[0])
    print(main(sys.argv[1] if sys.argv[1:] else "poet-x", Path("runs") / script.stem)[1])
