"""The Trainer with one call: its settings are used or refused, its logs say what merges did, its runs resume."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import poetx
from builders import llama, same
from poetx import PoetConfig, UserError, convert_, to_dense_
from poetx.integrations.transformers import attach
from poetx.layers.walk import converted_layers

pytest.importorskip("accelerate")
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fast": ({}, {"poet_lr": 1e-2, "merge_every": 2}),
    "int8": ({"mode": "mem", "weight_format": "int8", "group_size": 16}, {"poet_lr": 1e-2, "merge_every": 2}),
    "single-step": ({"method": "single-step"}, {"angle": 0.02}),
}
ROWS = torch.randint(0, 97, (32, 8), generator=torch.Generator().manual_seed(0))


def trainer(directory: Any, model: Any = None, **settings: Any) -> Trainer:
    torch.manual_seed(1)
    usual = {"max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": []}
    usual |= {"logging_steps": 1, "disable_tqdm": True, "learning_rate": 1e-3, "weight_decay": 0.1, "adam_beta2": 0.95}
    arguments = TrainingArguments(str(directory), **(usual | settings))
    dataset: Any = [{"input_ids": row, "labels": row} for row in ROWS]
    return Trainer(model or llama(), arguments, train_dataset=dataset)


@pytest.mark.parametrize("form", FORMS)
def test_one_call_trains_logs_resumes_to_the_bit_and_saves_what_was_trained(form: str, tmp_path: Any) -> None:
    config, settings = FORMS[form]

    def trained(name: str, resume: str | None = None) -> Trainer:
        made = trainer(tmp_path / name)
        report = attach(made, PoetConfig(block_size=16, **config), **settings)
        assert report is not None
        assert len(report.converted) == 14
        made.train(resume_from_checkpoint=resume)
        return made

    whole = trained("whole")
    resumed = trained("resumed", str(tmp_path / "whole/checkpoint-3"))
    assert same(resumed.model.state_dict(), whole.model.state_dict())  # type: ignore[union-attr]
    lines = [line for line in whole.state.log_history if "loss" in line]
    assert len(lines) == 6
    assert lines[-1]["loss"] < lines[0]["loss"]
    if form == "single-step":
        assert all(line["lr_rotated"] > 10 * line["lr_decay"] > 0 for line in lines[:-1])
    else:
        assert [line.get("merges") for line in lines] == [None, 1, None, 2, None, 3]
        assert all(line["merge_angle"] > 0 for line in lines[1::2])
        assert [line["lr_rotations"] / line["lr_decay"] for line in lines[:-1]] == pytest.approx([10] * 5)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole/checkpoint-6")
    model: Any = whole.model
    assert same(loaded.state_dict(), to_dense_(model).state_dict())


@pytest.mark.parametrize("form", ["fast", "single-step"])
def test_the_same_weights_as_by_hand(form: str, tmp_path: Any) -> None:
    config, settings = FORMS[form]
    with_call = trainer(tmp_path)
    attach(with_call, PoetConfig(block_size=16, **config), **settings)
    by_hand = trainer(tmp_path)
    model: Any = by_hand.model
    convert_(model, PoetConfig(block_size=16, **config))
    if form == "fast":
        groups = poetx.param_groups(model, lr=1e-3, poet_lr=1e-2, weight_decay=0.1)
        by_hand.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
        poetx.merge_every(by_hand.optimizer, model, steps=2)
    else:
        by_hand.optimizer = poetx.POETX(
            model, 1e-3, angle=0.02, dense_optimizer=lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.95)),
            weight_decay=0.1,
        )  # fmt: skip
    for each in (with_call, by_hand):
        each.train()
    assert same(with_call.model.state_dict(), model.state_dict())  # type: ignore[union-attr]


def test_matrices_that_do_not_learn_are_named(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = llama()

    def silence(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        return 0 * output

    model.get_submodule("model.layers.1.mlp").register_forward_hook(silence)
    made = trainer(tmp_path, model)
    attach(made, PoetConfig(block_size=16), poet_lr=1e-2)
    made.train()
    assert "layers.1.mlp.down_proj" in caplog.text
    assert "layers.0" not in caplog.text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optim": "adafactor"}, "optim=adafactor of the trainer: attach builds the optimizer"),
        ({"fsdp": "full_shard"}, "fsdp of the trainer: is not supported"),
    ],
)
def test_settings_of_the_trainer_without_effect_are_refused(settings: Any, words: str, tmp_path: Any) -> None:
    made = trainer(tmp_path)
    for name, value in settings.items():
        setattr(made.args, name, value)
    with pytest.raises(UserError, match=words):
        attach(made, PoetConfig(block_size=16), poet_lr=1e-2)
    assert all(type(module) is not poetx.PoetLinear for module in made.model.modules())  # type: ignore[union-attr]


def test_what_the_call_itself_lacks_or_has_too_much_is_refused(tmp_path: Any) -> None:
    made = trainer(tmp_path)
    single = PoetConfig(method="single-step", block_size=16)
    cases: list[tuple[PoetConfig | None, dict[str, Any], str]] = [
        (None, {"poet_lr": 1e-2}, "not converted; give attach a PoetConfig"),
        (PoetConfig(block_size=16), {}, r"poet_lr is missing.*: poet_lr=0.00025"),
        (PoetConfig(block_size=16), {"poet_lr": 1e-2, "angle": 0.1}, "angle=0.1: has no effect.*'poet-x'"),
        (single, {"merge_every": 3}, "merge_every=3: has no effect.*'single-step'"),
        (PoetConfig(block_size=16), {"poet_lr": 1e-2, "merge_every": 0}, "steps=0: must be a whole number"),
        (PoetConfig(block_size=16), {"poet_lr": float("nan")}, "poet_lr=nan: must be a finite number"),
        (PoetConfig(block_size=16), {"poet_lr": 1e-2, "state_dtype": "half"}, "state_dtype='half'"),
        (single, {"angle": -0.1}, "angle=-0.1: radians"),
        (single, {"norm_growth": 1.5}, "norm_growth=1.5"),
    ]
    for other in (made.args, made.model, None):
        with pytest.raises(UserError, match="was given for a transformers.Trainer"):
            attach(other, single)
    for config, arguments, words in cases:
        with pytest.raises(UserError, match=words):
            attach(made, config, **arguments)
        assert next(converted_layers(made.model), None) is None  # type: ignore[arg-type]
    made.optimizer = torch.optim.SGD(made.model.parameters(), 1e-3)  # type: ignore[union-attr]
    with pytest.raises(UserError, match="optimizers of the trainer"):
        attach(made, single)


@pytest.mark.parametrize("how", ["overridden", "set later"])
@pytest.mark.parametrize("named", [False, True])
def test_another_optimizer_than_that_of_attach_is_refused(how: str, named: bool, tmp_path: Any) -> None:
    made = trainer(tmp_path)
    attach(made, PoetConfig(block_size=16), poet_lr=1e-2)

    def create_optimizer(model: Any = None) -> torch.optim.Optimizer:
        groups = [{"params": list(made.model.parameters()), **({"name": "all"} if named else {})}]  # type: ignore[union-attr]
        made.optimizer = torch.optim.AdamW(groups, lr=1e-3)
        return made.optimizer

    if how == "overridden":
        made.create_optimizer = create_optimizer
    else:
        create_optimizer()
    with pytest.raises(UserError, match="AdamW was made beside the one of poetx's attach"):
        made.train()
