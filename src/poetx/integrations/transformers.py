"""``transformers``' Trainer, and every trainer made from it (TRL's among them): one call before ``train()``."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from poetx.config import PoetConfig
from poetx.conversion_report import ConversionReport
from poetx.convert import convert_
from poetx.errors import UserError
from poetx.layers.poet import PoetLinear
from poetx.layers.walk import converted_layers
from poetx.merge import merge_every as merge_every_so_many
from poetx.methods.base import merge_handle
from poetx.optim.build import build_optimizer
from poetx.optim.groups import param_groups
from poetx.optim.single_step.optimizer import POETX
from poetx.training_check import check_training

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments


#: Values of ``TrainingArguments.optim`` that mean what is built here: AdamW.
_ADAMW = ("adamw_torch", "adamw_torch_fused")


def attach(
    trainer: Trainer,
    config: PoetConfig | None = None,
    *,
    poet_lr: float | None = None,
    angle: float | None = None,
    merge_every: int | None = None,
    norm_growth: float = 0.0,
    state_dtype: str = "auto",
) -> ConversionReport | None:
    """Have ``trainer`` train by POET-X: convert its model, build the optimizer, merge, log, and check the first steps.

    The optimizer is made when training starts, from ``trainer.args``: ``learning_rate``, ``weight_decay``,
    ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon`` for all that is not rotated, and its schedule for everything.
    The trainer's loggers get both rates, and after a merge its largest angle and norm drift. Checkpoints hold plain
    weights and the layers' state: they resume to the bit and load in ``from_pretrained``; write the plain model with
    :func:`poetx.save_pretrained`.

    Args:
        config: how to convert the model; None: it is converted already.
        poet_lr: rate of the rotations, for ``method="poet-x"``; a quarter of ``learning_rate`` is the paper's.
        angle: radians a step, for ``method="single-step"``; None: :class:`poetx.POETX`'s own.
        merge_every: optimizer steps between merges; None: 200, on a quantized base 400, as in the papers.
        norm_growth: of :class:`poetx.POETX`.
        state_dtype: of AdamW's moments, as in :func:`poetx.optim.build_optimizer`.

    Returns:
        What was converted, None without ``config``.

    Raises:
        UserError: a setting of the trainer that would be without effect (``optim``, ``optimizers``, ``model_init``) or
            that POET-X cannot run with (fp16, FSDP, DeepSpeed, weights synchronized to vLLM by name), a number outside
            its range, or an argument here that the method does not have. The model is then unchanged.
    """
    _check(trainer)
    model: Any = trainer.model
    method = config.method if config else _method(model)
    own = {"poet_lr": poet_lr, "merge_every": merge_every, "angle": angle, "norm_growth": norm_growth or None}
    foreign = ("poet_lr", "merge_every") if method == "single-step" else ("angle", "norm_growth")
    for name in foreign:
        if own[name] is not None:
            raise UserError(f"{name}={own[name]}: has no effect on a model of method={method!r}; leave it out")
    if method == "poet-x" and poet_lr is None:
        raise UserError(
            "poet_lr is missing, the rate of the rotations; a quarter of learning_rate is the paper's: "
            f"poet_lr={trainer.args.learning_rate / 4:g}"
        )
    settings = {"args": trainer.args, "state_dtype": state_dtype, **own}
    _try(method, settings)
    report = convert_(model, config) if config else None
    trainer.optimizer_cls_and_kwargs = (_Optimizer, settings)  # pyright: ignore[reportAttributeAccessIssue]
    # First, so that every other one logs what this one adds.
    trainer.callback_handler.callbacks.insert(0, PoetCallback())
    return report


def _check(trainer: Trainer) -> None:
    if not all(hasattr(trainer, name) for name in ("args", "model", "optimizer")):
        raise UserError(f"attach: {type(trainer).__name__} was given for a transformers.Trainer")
    args: Any = trainer.args
    wrong = {
        "optimizers": trainer.optimizer is not None,
        "optimizer_cls_and_kwargs": getattr(trainer, "optimizer_cls_and_kwargs", None) is not None,
        "model_init": getattr(trainer, "model_init", None) is not None,
        f"optim={getattr(args.optim, 'value', args.optim)}": args.optim not in _ADAMW,
        f"optim_args={args.optim_args}": bool(args.optim_args),
    }
    for name in (name for name, is_set in wrong.items() if is_set):
        raise UserError(f"{name} of the trainer: attach builds the optimizer (AdamW and the rotations); leave it out")
    wrong = {
        "fp16": args.fp16 or args.fp16_full_eval,
        "fsdp": bool(args.fsdp),
        "deepspeed": bool(args.deepspeed),
        "use_vllm": bool(getattr(args, "use_vllm", False)),
    }
    for name in (name for name, is_set in wrong.items() if is_set):
        raise UserError(
            f"{name} of the trainer: is not supported; " + ("use bf16" if name == "fp16" else "train without it")
        )


def _method(model: torch.nn.Module) -> str:
    first = next((layer for _, layer in converted_layers(model)), None)
    if first is None:
        raise UserError("the trainer's model is not converted; give attach a PoetConfig")
    return first.config.method


def _try(method: Any, settings: dict[str, Any]) -> None:
    """Build a tiny model's optimizer, which raises on every setting that would be refused when training starts."""
    linear: Any = torch.nn.utils.skip_init(torch.nn.Linear, 2, 2)
    torch.nn.init.eye_(linear.weight)
    tiny = torch.nn.Sequential(linear)
    convert_(tiny, PoetConfig(method=method, block_size=2))
    _Optimizer()(tiny, **settings)


#: Optimizers of :func:`attach`.
_MADE: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


class _Optimizer:
    """The factory that the Trainer makes and calls when training starts."""

    def __call__(
        self,
        model: torch.nn.Module,
        *,
        args: TrainingArguments,
        state_dtype: str,
        poet_lr: float | None,
        merge_every: int | None,
        angle: float | None,
        norm_growth: float | None,
    ) -> torch.optim.Optimizer:
        betas = (args.adam_beta1, args.adam_beta2)
        adamw: dict[str, Any] = {"betas": betas, "eps": args.adam_epsilon, "state_dtype": state_dtype}
        lr, weight_decay = args.learning_rate, args.weight_decay
        if _method(model) == "single-step":
            more: dict[str, Any] = {} if angle is None else {"angle": angle}
            optimizer = POETX(
                model,
                lr,
                weight_decay=weight_decay,
                norm_growth=norm_growth or 0.0,
                dense_optimizer=lambda groups: build_optimizer(groups, lr=lr, **adamw),
                **more,
            )
            _MADE.add(optimizer)
            return optimizer
        assert poet_lr is not None
        groups = param_groups(model, lr=lr, poet_lr=poet_lr, weight_decay=weight_decay)
        optimizer = build_optimizer(groups, lr=lr, **adamw)
        merge_every_so_many(optimizer, model, _usual_gap(model) if merge_every is None else merge_every)
        _MADE.add(optimizer)
        return optimizer


def _usual_gap(model: torch.nn.Module) -> int:
    packed = (isinstance(layer, PoetLinear) and layer.packed_weight is not None for _, layer in converted_layers(model))
    return 400 if any(packed) else 200


class PoetCallback(TrainerCallback):
    """Adds to the Trainer's log lines: ``lr_…`` of each parameter group, and after merges what the last one folded.

    When training begins it has :func:`poetx.check_training` watch the first steps and log what does not learn.
    """

    def __init__(self) -> None:
        self._logged = 0  # merges

    def on_train_begin(self, args: Any, state: Any, control: Any, **context: Any) -> None:
        optimizer = _inner(context["optimizer"])
        if optimizer not in _MADE:
            raise UserError(
                f"{type(optimizer).__name__} was made beside the one of poetx's attach (by a create_optimizer of the "
                "trainer's own, or trainer.optimizer = ...), and would not train the rotations as they are meant to; "
                "leave that out, or train without attach (poetx.merge_every, or poetx.POETX)"
            )
        handle = merge_handle(optimizer)
        self._logged = handle.merges if handle else 0
        if state.global_step == 0:
            check_training(context["model"], optimizer)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **context: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        optimizer = _inner(context["optimizer"])
        facts: dict[str, Any] = {f"lr_{group['name']}": group["lr"] for group in optimizer.param_groups}
        handle = merge_handle(optimizer)
        if handle is not None and handle.report is not None and handle.merges > self._logged:
            self._logged = handle.merges
            report = handle.report
            facts |= {"merges": handle.merges, "merge_angle": report.angle, "norm_drift": report.norm_drift}
        logs |= facts
        state.log_history[-1] |= facts


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer under Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
