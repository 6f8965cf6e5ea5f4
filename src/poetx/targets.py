"""Which linear layers of a model rotate, and why the others do not.

A rotated weight keeps its singular values, so a matrix that must grow from nothing cannot learn by rotation: zero
matrices and fresh task heads stay ordinary, whatever their name, unless ``target_modules`` names the head.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from poetx.config import PoetConfig, list_hint, name_matches
from poetx.errors import UserError, nearest
from poetx.layers.base import DTYPES, NOT_FINITE, is_finite, unsupported
from poetx.layers.prequantized import is_foreign

K = TypeVar("K")
ZERO = "its weight is zero, or next to the others': a rotation of nothing stays nothing"
ONE = "it has one element, which no rotation moves"
#: Norms a row between which squares, and the codes of a ``weight_format``, neither vanish nor overflow in float32.
_SMALLEST, _LARGEST = 1e-15, 1e15
#: A weight whose norm a row is below this part of the median layer's could only grow, which a held norm forbids.
_NEXT_TO_NOTHING = 1e-3


@dataclass(frozen=True)
class Targets:
    """The linear layers that a config reaches: by first name, every place each stands in, and why others are not.

    ``for_cause``: of the latter, those that stay dense by what they are, not because a setting says so.
    """

    layers: dict[str, nn.Module]
    places: dict[nn.Module, list[str]]
    reasons: dict[nn.Module, str]
    for_cause: set[nn.Module]


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is the transposed linear layer of ``transformers``: by name, so that nothing need be imported."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def find_targets(model: nn.Module, config: PoetConfig, *, foreign: bool = False, replaced: bool = True) -> Targets:
    """Which layers of ``model`` to rotate: ``nn.Linear`` and ``Conv1D`` within the config's patterns, and with
    ``foreign`` linear layers that bitsandbytes or torchao have quantized.

    Not those with hooks, other tensors or another forward of their own, or whose weight the model multiplies by without
    calling them, if they are to be ``replaced``; not adapters of PEFT, task heads (unless ``target_modules`` names
    them) and, where the weight is kept, matrices of zeros.

    Raises:
        UserError: none is left; one of them is float16, or holds inf or NaN where its weight is kept.
    """
    places: dict[nn.Module, list[str]] = defaultdict(list)
    owners: dict[Any, set[int]] = defaultdict(set)
    for name, module in model.named_modules(remove_duplicate=False):
        places[module].append(name)
        for parameter in module.parameters(recurse=False):
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise UserError(
                    f"{name}: its size is not known yet (a lazy module); run one forward pass of the model first"
                )
            owners[_memory(parameter)].add(id(module))
    shared = {memory for memory, modules in owners.items() if len(modules) > 1}
    everything = config.target_modules == "all-linear"
    causes = dict.fromkeys(adapters(model), "an adapter of PEFT, or held by one")
    causes |= read_directly(model) if replaced else {}
    heads = task_heads(model) if everything else {}

    reasons: dict[nn.Module, str] = {}
    layers: dict[str, nn.Module] = {}
    for_cause: set[nn.Module] = set()
    linears = [m for m in places if type(m) is nn.Linear or is_conv1d(m) or (foreign and is_foreign(m))]
    matched = False
    for module in linears:
        name = places[module][0]
        if not everything and not name_matches(name, config.target_modules):
            reason = "not in target_modules"
        elif module in heads:
            reason = heads[module]
            if reason != OUTPUT:
                for_cause.add(module)
        elif name_matches(name, config.exclude_modules):
            reason = "in exclude_modules"
        else:
            matched = True
            reason = _refusal(module, shared, foreign=foreign, replaced=replaced)
            if reason == ONE:
                for_cause.add(module)
            if module in causes and (reason is None or "PEFT" in causes[module]):
                reason = causes[module]
                for_cause.add(module)
        if reason is not None:
            reasons[module] = reason
        elif not (foreign and is_foreign(module)) and (dtype := cast(Tensor, module.weight).dtype) not in DTYPES:
            remedy = "exclude it" if dtype.is_complex else "convert the model to bfloat16 or float32 first"
            raise UserError(f"{name}: {unsupported(dtype)}; {remedy}")
        else:
            layers[name] = module
    if config.init == "keep":
        dense: dict[str, Any] = {
            name: m.weight for name, m in layers.items() if not is_foreign(m) and not m.weight.is_meta
        }
        norms = {name: norm_per_row(weight) for name, weight in dense.items()}
        for name, norm in norms.items():
            if not norm.isfinite() and not is_finite(dense[name]):
                raise UserError(f"{name}: inf or NaN in {NOT_FINITE}")
        for name in next_to_nothing(norms):
            module = layers.pop(name)
            reasons[module] = ZERO
            for_cause.add(module)
    if config.residual_scale != 1 and layers and not any(map(config.writes_to_residual, layers)):
        endings = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
        raise UserError(
            f"residual_scale={config.residual_scale}: no layer to convert is in residual_modules; name those that "
            f"write to the residual stream (the layers end in {endings})"
            + list_hint("residual_modules", config.residual_modules, layers)
        )
    if not layers:
        _raise_no_match(config, [places[m][0] for m in linears], [reasons[m] for m in linears] if matched else [])
    return Targets(layers, dict(places), reasons, for_cause)


def _memory(parameter: Tensor) -> Any:
    """What tied parameters have in common: the object, or (``a.weight.data = b.weight.data``) where the values are."""
    if not (has_values(parameter) and parameter.numel()):
        return id(parameter)
    return parameter.device, parameter.data_ptr()


def _refusal(module: nn.Module, shared: set[Any], *, foreign: bool, replaced: bool) -> str | None:
    """Why a linear layer that the patterns reach is left alone, or None if it is to be converted or rotated."""
    weight = module.weight
    if not isinstance(weight, nn.Parameter):
        return "its weight is computed (a parametrization or pruning); remove that first"
    if _memory(weight) in shared:
        return "its weight is tied to another layer's"
    if not weight.requires_grad and not (foreign and is_foreign(module)):
        return "frozen (requires_grad=False)"
    if weight.numel() == 0:
        return "it has no elements"
    if weight.numel() == 1:
        return ONE
    if hasattr(module, "parametrizations"):
        return "parametrized; remove the parametrization first"
    if not replaced:
        return None
    hooks = [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks]
    if not (foreign and is_foreign(module)):
        hooks += [value for key, value in vars(module).items() if key.endswith("_hooks")]
        hooks += [weight._backward_hooks, getattr(weight, "_post_accumulate_grad_hooks", None)]
        if module._buffers or module._modules or module._parameters.keys() - {"weight", "bias"}:
            return "it holds parameters, buffers or modules beside its weight, which conversion would lose"
    if "forward" in vars(module) or hasattr(module, "_hf_hook"):
        return "its forward has been replaced, which conversion would lose; convert before that"
    if any(hooks):
        return "it has hooks, which conversion would lose; convert before registering them"
    return None


def _raise_no_match(config: PoetConfig, names: list[str], reasons: list[str]) -> None:
    if not names:
        raise UserError("the model has no nn.Linear (or Conv1D) layer to convert")
    if reasons:
        why = "; ".join(f"{name} is {reason}" for name, reason in list(zip(names, reasons, strict=True))[:3])
        raise UserError(f"target_modules={config.target_modules!r}: every layer it matches must stay as it is: {why}")
    wanted = config.target_modules
    word = wanted if isinstance(wanted, str) else ", ".join(wanted)
    endings = sorted({name.rpartition(".")[2] for name in names})
    raise UserError(
        f"target_modules={wanted!r}: matches no linear layer outside exclude_modules={config.exclude_modules!r}"
        f"{list_hint('target_modules', wanted, names) or nearest(word, endings)}; the model's linear layers end in "
        f"{', '.join(endings)}"
    )


# -- matrices of zeros ------------------------------------------------------------------------------------------------


def has_values(weight: torch.Tensor) -> bool:
    """Whether a weight can be looked at: not on the meta device, no fake or symbolic tensor."""
    return not weight.is_meta and type(weight.detach()) is torch.Tensor


def norm_per_row(weight: torch.Tensor) -> torch.Tensor:
    """‖W‖ / √rows, a scalar that does not depend on the layer's shape for usual weights; the least one of a stack."""
    norms = torch.linalg.vector_norm(weight.detach(), dim=(-2, -1), dtype=torch.float64)
    return norms.min() / max(1, weight.shape[-2]) ** 0.5


def next_to_nothing(norms: Mapping[K, torch.Tensor]) -> list[K]:
    """The layers whose norm a row is zero, in effect, or below a thousandth of the median of all that are not zero.

    Raises:
        UserError: a norm so large that its square would overflow.
    """
    if not norms:
        return []
    values = torch.stack([norm.cpu().double() for norm in norms.values()])
    if (values > _LARGEST).any():
        name, size = next((name, size) for name, size in zip(norms, values.tolist(), strict=True) if size > _LARGEST)
        where = name if isinstance(name, str) else f"a parameter of shape {tuple(getattr(name, 'shape', ()))}"
        raise UserError(f"{where}: its norm is {size:.1e} a row; its square may overflow: scale it down")
    others = values[values > _SMALLEST]
    limit = max(_SMALLEST, _NEXT_TO_NOTHING * float(others.median()) if others.numel() else 0.0)
    return [name for name, value in zip(norms, values.tolist(), strict=True) if value <= limit]


# -- output layers and task heads -------------------------------------------------------------------------------------

#: Parts of the names of embeddings and output layers, for parameters of which nothing but a name is known.
_ENDS = ("embed", "wte", "wpe", "lm_head")


def is_named_like_an_end(name: str) -> bool:
    """Whether a parameter's name is that of an embedding or output layer."""
    return any(part in name.lower() for part in _ENDS)


OUTPUT = "the output layer"
HEAD = "a task head: it lies outside the model's backbone and must grow; name it in target_modules to rotate it"


def task_heads(model: nn.Module) -> dict[nn.Module, str]:
    """Output embeddings, the linear layers that ``AutoModelFor…`` puts behind its backbone (``score``, ``classifier``,
    ``qa_outputs``, …), those that a wrapper puts beside a ``transformers`` model (``v_head``), and in a model of any
    other kind the one layer that maps to the rows of its largest embedding; each with the reason."""
    heads: dict[nn.Module, str] = {}
    inner = [module for module in model.modules() if _is_pretrained(module)]
    for module in inner:
        base = getattr(module, getattr(module, "base_model_prefix", "") or "-", None)
        if isinstance(base, nn.Module) and base is not module:
            heads |= dict.fromkeys(_linears_beside(module, {id(base)}), HEAD)
    if not _is_pretrained(model) and inner:
        heads |= dict.fromkeys(_linears_beside(model, {id(module) for module in inner}), HEAD)
    for module in [model, *inner]:
        head = _output_embeddings(module)
        if isinstance(head, nn.Module):
            heads[head] = OUTPUT
    if not inner and (head := _output_by_shape(model)) is not None:
        heads[head] = OUTPUT
    return heads


def _is_pretrained(module: nn.Module) -> bool:
    return any(
        kind.__name__ == "PreTrainedModel" and kind.__module__.startswith("transformers")
        for kind in type(module).__mro__
    )


def _output_embeddings(model: nn.Module) -> Any:
    getter: Any = getattr(model, "get_output_embeddings", None)
    try:
        return getter() if callable(getter) else None
    except (NotImplementedError, AttributeError):
        return None


def _linears_beside(module: nn.Module, backbones: set[int]) -> Iterator[nn.Module]:
    """Linear layers in those parts of ``module`` that hold no backbone and are no stack of layers themselves."""
    for child in module.children():
        inside = list(child.modules())
        if id(child) in backbones or any(isinstance(part, nn.ModuleList) and _is_stack(part) for part in inside):
            continue
        if any(id(part) in backbones for part in inside):
            if not _is_pretrained(child):
                yield from _linears_beside(child, backbones)
            continue
        if not any(_is_pretrained(part) for part in inside):
            yield from (part for part in inside if isinstance(part, nn.Linear) or is_conv1d(part))


def _is_stack(modules: nn.ModuleList) -> bool:
    return any(len(list(item.children())) > 1 for item in modules)


def _output_by_shape(model: nn.Module) -> nn.Module | None:
    """The only linear layer outside numbered places whose weight has the shape of the largest embedding."""
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    if not embeddings:
        return None
    shape = max(embeddings, key=torch.Tensor.numel).shape
    fitting = [
        module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and not any(part.isdigit() for part in name.split("."))
        if module.weight.shape == shape
    ]
    return fitting[0] if len(fitting) == 1 else None


# -- what other code holds or reads -----------------------------------------------------------------------------------


def adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Everything inside the layers of PEFT (LoRA, IA3, prompt encoders, ``modules_to_save``), told by their classes."""
    for module in model.modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        of_peft = type(module).__module__.partition(".")[0] == "peft" and not kinds & {"PeftModel", "BaseTuner"}
        if of_peft or "BaseTunerLayer" in kinds:
            yield from module.modules()


def read_directly(model: nn.Module) -> dict[nn.Module, str]:
    """Layers by whose weight the code around them multiplies (Mamba's ``dt_proj``), if it calls them as well or not."""
    found = {}
    for module in model.modules():
        for name in _weights_read(type(module)):
            child = getattr(module, name, None)
            if isinstance(child, nn.Module):
                found[child] = f"{type(module).__name__} multiplies by its weight itself"
    return found


#: What does not use a weight's values.
_FACTS = ("dtype", "device", "shape", "ndim", "size", "is_meta", "requires_grad", "data", "grad", "numel", "dim")
_SETUP = ("__init__", "_init_weights", "init_weights", "reset_parameters", "initialize_weights", "extra_repr")


def _weights_read(kind: type) -> list[str]:
    """Names x for which a method of the class, its own or inherited, reads the values of ``self.x.weight``."""
    return sorted({name for base in kind.__mro__ for name in _weights_read_in(base)})


@functools.cache
def _weights_read_in(kind: type) -> tuple[str, ...]:
    """The same for a class without what it inherits.

    The source of a method is looked up only where its code names a ``weight``: parsing all takes longer than a step.
    """
    if kind.__module__.partition(".")[0] in ("torch", "builtins", "poetx", "peft"):
        return ()
    found: list[str] = []
    for name, value in vars(kind).items():
        method = inspect.unwrap(getattr(value, "fget", None) or getattr(value, "__func__", value))
        if name in _SETUP or not inspect.isfunction(method) or not _names_a_weight(method.__code__):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
        except (OSError, TypeError, SyntaxError):  # a method without source: seen when it trains, not before
            continue
        found += (read for node in tree.body if isinstance(node, ast.FunctionDef) for read in _reads(node))
    return tuple(found)


def _names_a_weight(code: CodeType) -> bool:
    return "weight" in code.co_names or any(isinstance(c, CodeType) and _names_a_weight(c) for c in code.co_consts)


def _reads(method: ast.FunctionDef) -> Iterable[str]:
    """Names x whose ``self.x.weight`` is used; not under an ``if`` in a method that calls ``self.x`` otherwise."""
    me = method.args.args[0].arg if method.args.args else ""
    harmless: set[int] = set()
    called: set[str] = set()
    special: set[int] = set()
    for node in ast.walk(method):
        if isinstance(node, ast.If):
            special.update(id(inner) for statement in node.body for inner in ast.walk(statement))
        if isinstance(node, ast.Attribute) and node.attr in _FACTS:
            harmless.add(id(node.value))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "type"):
            harmless.update(map(id, node.args))
        elif isinstance(node, ast.Call) and (name := _own(node.func, me)):
            called.add(name)
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load):
            name = _own(node.value, me)
            if name and id(node) not in harmless and not (name in called and id(node) in special):
                yield name


def _own(node: ast.AST, me: str) -> str | None:
    """x of an expression ``self.x``, by the name that the method has for itself."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == me:
        return node.attr
    return None
