"""A model, its optimizers and one step, made as a user would make them, on tensors that take no memory."""

from __future__ import annotations

import copy
import functools
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from poetx.config import PoetConfig
from poetx.convert import convert_
from poetx.errors import UserError, nearest
from poetx.layers.walk import poet_layers
from poetx.optim.build import build_optimizer
from poetx.optim.gradient_release import release_gradients
from poetx.optim.groups import param_groups
from poetx.optim.poetx import POETX
from poetx.planner.setup import SHAPES, SINGLE_STEP, TrainingSetup
from poetx.savings.activation_checkpointing import checkpoint_layers_
from poetx.savings.chunked_loss import chunk_loss_

logger = logging.getLogger(__name__)


def read_config(model: Any) -> Any:
    """A ``transformers`` config from a name of :data:`SHAPES`, a ``config.json``, a directory with one, or itself.

    Raises:
        UserError: no such name or file, or a file that is not a model's config.
    """
    from transformers import AutoConfig, LlamaConfig, PretrainedConfig

    if isinstance(model, PretrainedConfig):
        return model
    if isinstance(model, str) and model in SHAPES:
        hidden, mlp, layers, heads, kv_heads, vocabulary = SHAPES[model]
        return LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
        )
    path = Path(model).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"model={model}: no such shape or config.json{nearest(str(model), SHAPES)}; shapes: {', '.join(SHAPES)}"
        )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if "model_type" not in values:
            raise UserError(f"model={model}: not a model's config (it has no model_type)")
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"model={model}: not a model's config ({' '.join(str(error).split())})") from None


def with_layers(config: Any, layers: int) -> Any:
    """The same config with fewer decoder layers."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return config


def meta_model(config: Any, setup: TrainingSetup) -> nn.Module:
    """The dense model on the meta device, in the dtype its weights train in; eager attention where no other is.

    Raises:
        UserError: a config that ``transformers`` builds no model from.
    """
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if setup.method == "adamw-mixed" else getattr(torch, setup.dtype)
    with torch.device("meta"):
        try:
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").train()
        except ValueError:
            try:
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
            except ValueError as error:
                raise UserError(f"model_type={config.model_type}: {' '.join(str(error).split())}") from None
    _say_eager(config.model_type)
    return model.train()


@functools.cache
def _say_eager(model_type: str) -> None:
    logger.warning(
        "%s: transformers has no fused attention for it; estimated with attn_implementation='eager', whose scores are "
        "tokens × tokens",
        model_type,
    )


def prepare_(model: nn.Module, setup: TrainingSetup) -> nn.Module:
    """Convert the dense meta model as the setup says and switch its savings on; the model to train."""
    if setup.is_poet:
        config = PoetConfig(
            method="single-step" if setup.method in SINGLE_STEP else "poet-x",
            block_size=setup.block_size,
            update="free" if setup.spectrum == "free" else "rotation",
            mode=SINGLE_STEP.get(setup.method, setup.method),  # type: ignore[arg-type]
            rotation_dtype=setup.rotation_dtype,
            neumann_order=setup.neumann_order,  # type: ignore[arg-type]
            weight_format=setup.weight_format,
            group_size=setup.group_size,
            weight_extra_bits=setup.weight_extra_bits,
        )
        convert_(model, config)
    elif setup.method == "lora":
        model = _with_lora(model, setup.lora_rank)
    if setup.activation_checkpointing:
        checkpoint_layers_(model, recompute=setup.recompute)
    if setup.chunked_loss:
        chunk_loss_(model)
    return model


def _with_lora(model: nn.Module, rank: int) -> nn.Module:
    try:
        import peft  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("method='lora': needs peft; pip install peft") from None
    config = peft.LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.device("meta"):
        return peft.get_peft_model(model, config, autocast_adapter_dtype=False)  # type: ignore[arg-type]


def fake_(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace meta tensors by fake CPU tensors of the same shape, tied ones by one."""
    memo: dict[int, Any] = {}
    with mode:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if id(parameter) not in memo:
                        fresh = torch.empty_like(parameter, device="cpu")
                        memo[id(parameter)] = nn.Parameter(fresh, requires_grad=parameter.requires_grad)
                    module._parameters[name] = memo[id(parameter)]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    if id(buffer) not in memo:
                        memo[id(buffer)] = torch.empty_like(buffer, device="cpu")
                    module._buffers[name] = memo[id(buffer)]


@dataclass(frozen=True)
class Step:
    """One training step, phase by phase, and the optimizers it takes."""

    forward: Callable[[], Tensor]
    optimizers: tuple[torch.optim.Optimizer, ...]

    def run(self, enter: Callable[[str], None] = lambda phase: None) -> None:
        """Forward, backward, step, gradients dropped; ``enter`` is told when each phase begins."""
        enter("forward")
        loss = self.forward()
        enter("backward")
        loss.backward()
        enter("step")
        for optimizer in self.optimizers:
            optimizer.step()
        enter("after")
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def training_step(model: nn.Module, input_ids: Tensor, setup: TrainingSetup) -> Step:
    """Optimizers over ``model`` and the closure of its forward pass, ``input_ids`` [batch, tokens] its labels too."""
    optimizers = build_optimizers(model, setup)
    if setup.release_gradients:
        for optimizer in optimizers:
            dense = optimizer.base if isinstance(optimizer, POETX) else optimizer
            if dense is not None:
                release_gradients(dense, large_dense_parameters(model))
    mixed = setup.method == "adamw-mixed"

    def forward() -> Tensor:
        with torch.autocast(input_ids.device.type, dtype=torch.bfloat16, enabled=mixed):
            return model(input_ids=input_ids, labels=input_ids, use_cache=False).loss

    return Step(forward, tuple(optimizers))


def large_dense_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trainable matrices that are no rotation: embeddings and head, and everything in a dense model."""
    rotations = {id(p) for _, layer in poet_layers(model) for p in layer.rotations}
    return [p for p in model.parameters() if p.requires_grad and p.ndim >= 2 and id(p) not in rotations]


def build_optimizers(model: nn.Module, setup: TrainingSetup) -> list[torch.optim.Optimizer]:
    """The optimizers of the setup, each parameter in one of them. Learning rates do not matter here."""
    foreach = setup.device == "cuda"  # what torch.optim chooses there by itself
    options: dict[str, Any] = {"state_dtype": setup.optimizer_state, "foreach": foreach}
    if setup.method in SINGLE_STEP:
        return [POETX(model, dense_optimizer=lambda rest: build_optimizer(rest, setup.base_optimizer, **options))]
    if setup.is_poet:
        groups = param_groups(model, lr=1e-3, poet_lr=1e-3)
        return [build_optimizer(groups, dense_optimizer=setup.base_optimizer, **options)]
    trainable = [p for p in model.parameters() if p.requires_grad]
    if setup.method == "muon":
        return _muon(model, trainable, foreach)
    if setup.method == "adamw-8bit":
        options["state_dtype"] = "int8"
    return [
        build_optimizer([{"params": trainable}], "adafactor" if setup.method == "adafactor" else "adamw", **options)
    ]


def _muon(model: nn.Module, trainable: list[nn.Parameter], foreach: bool) -> list[torch.optim.Optimizer]:
    outside = {id(p) for module in (model.get_input_embeddings(), model.get_output_embeddings()) for p in _of(module)}  # type: ignore[operator]
    matrices = [p for p in trainable if p.ndim == 2 and id(p) not in outside]
    kept = {id(p) for p in matrices}
    rest = [p for p in trainable if id(p) not in kept]
    return [torch.optim.Muon(matrices), torch.optim.AdamW(rest, foreach=foreach)]


def _of(module: nn.Module | None) -> list[nn.Parameter]:
    return [] if module is None else list(module.parameters())
