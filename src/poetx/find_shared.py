"""Which layers of a model permute features alike, under ``permutation="shared"``: found out, not told by names."""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
import sys
import weakref
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from poetx.config import PoetConfig
from poetx.layers.shared_features import GLOBAL_HOOKS, SharedFeatures
from poetx.ops.rebuild import saved_tensor_hooks
from poetx.targets import Targets, is_conv1d

#: Layer names → what the layer has in common with others, by side ("in", "out").
Shared = dict[str, dict[str, SharedFeatures]]
#: Leading sizes that a module is tried with: sequences of some tokens, of one, and tokens alone. The first must work.
_TRIED = ((2, 3), (1, 1), (4,))
#: Entries of a list or dictionary among a module's attributes, from which on it is not copied.
_MANY = 100
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class _NotShared(Exception):
    """The module does something with its features that depends on their order, or may."""


def find_shared(model: nn.Module, found: Targets, config: PoetConfig) -> Shared:
    """What the layers of ``found`` have in common with others, before they are converted.

    Among the direct children of one module: layers whose outputs another one reads after nothing but elementwise
    operations (:func:`inner_features`), and layers of one input size, but for those and for the ones that write to the
    residual stream, which read the same tensor if any do. If they do not, each gathers its own all the same.
    """
    shared: Shared = defaultdict(dict)
    outside = {id(module): module for module in model.modules()}
    for (name, parent), children in _families(model, found, config).items():
        readers, writers = inner_features(
            parent, {child: found.layers[full] for child, full in children.items()}, outside
        )
        groups = [(readers, writers)] if writers else []
        alike: dict[int, list[str]] = defaultdict(list)
        for child, full in children.items():
            if child not in readers and not config.writes_to_residual(full) and not isinstance(parent, _CONTAINERS):
                alike[_sizes(found.layers[full])[0]].append(child)
        groups += [(same, []) for same in alike.values() if len(same) > 1]
        for readers, writers in groups:
            features = SharedFeatures(name, parent, readers, writers)
            for side, names in (("in", readers), ("out", writers)):
                for child in names:
                    shared[children[child]][side] = features
    return shared


def _families(model: nn.Module, found: Targets, config: PoetConfig) -> dict[tuple[str, nn.Module], dict[str, str]]:
    """Modules with several layers that may share: (name, module) → name in the module → full name."""
    families: dict[tuple[str, nn.Module], dict[str, str]] = defaultdict(dict)
    for full, layer in found.layers.items():
        parents = {model.get_submodule(place.rpartition(".")[0]) for place in found.places[layer]}
        if len(parents) == 1 and config.for_layer(full).permutation == "shared":
            name, _, child = full.rpartition(".")
            families[name, parents.pop()][child] = full
    return {family: children for family, children in families.items() if len(children) > 1}


def _sizes(layer: Any) -> tuple[int, int]:
    """(in_features, out_features)."""
    m, n = layer.weight.shape[::-1] if is_conv1d(layer) else (layer.out_features, layer.in_features)
    return n, m


class _Standin(nn.Module):
    """In the place of a linear layer: remembers what it is given, and gives what it is told to."""

    def __init__(self, sizes: tuple[int, int], generator: torch.Generator) -> None:
        super().__init__()
        self.in_features, self.out_features = sizes
        self.weight = torch.empty(0, dtype=torch.float64)  # some modules ask for its dtype
        self.bias = None
        self.generator, self.region = generator, saved_tensor_hooks()

    def expect(self, leading: tuple[int, ...]) -> None:
        """Begin anew, with numbers of these leading sizes."""
        self.leading, self.given = leading, []
        self.told = torch.randn(*leading, self.out_features, generator=self.generator, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape != (*self.leading, self.in_features) or self.given:
            raise _NotShared("this is not what the layer takes, or not the first that it takes")
        if not torch.is_grad_enabled() or saved_tensor_hooks() is not self.region:
            raise _NotShared("a part of the module is checkpointed")
        self.given.append(x)
        return self.told.clone()


def inner_features(
    parent: nn.Module, children: Mapping[str, nn.Module], outside: Mapping[int, nn.Module] | None = None
) -> tuple[list[str], list[str]]:
    """(readers, writers) among linear layers of a module, where readers take what elementwise operations make of what
    the writers make; two empty lists where there are none.

    Tried out on a copy of the module with something else in the place of the layers: its own forward runs on a few
    numbers. It must hand its input to the writers. Then, where the writers' features come in other orders, the readers
    must get theirs, and the writers their gradients, in these, and all else must stay; with several shapes, and both
    while training and not, but without dropout. A module has none that takes more than one argument, has parameters or
    buffers beside those of the layers (which may become what orders the features), hooks, a patched forward, or
    attributes that its forward changes; or that fails.

    Args:
        children: all linear layers that are direct children and are to be converted, by name.
        outside: modules that are not copied, even if an attribute leads to them, by ``id``.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(unset_fake_temporarily())
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))  # a module may draw numbers
        stack.callback(random.setstate, random.getstate())
        if "torch._dynamo" in sys.modules:  # compiled parts keep their graphs for what they are given in earnest
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        generator = torch.Generator().manual_seed(0)
        for width in dict.fromkeys(_sizes(layer)[0] for layer in children.values()):
            try:
                return _tried(parent, children, dict(outside or {}), width, generator)
            except (Exception, SystemExit):  # whatever a module raises that is made for other inputs
                continue
    return [], []


def _tried(
    parent: nn.Module,
    children: Mapping[str, nn.Module],
    outside: dict[int, nn.Module],
    width: int,
    generator: torch.Generator,
) -> tuple[list[str], list[str]]:
    found: set[tuple[tuple[str, ...], tuple[str, ...]]] = set()
    for leading in _TRIED:
        for training in (False, True):
            standins = {name: _Standin(_sizes(layer), generator) for name, layer in children.items()}
            module = _copy(parent, children, standins, outside, training=training)
            x = torch.randn(*leading, width, generator=generator, dtype=torch.float64).requires_grad_(training)
            try:
                found.add(_tried_once(module, standins, x, generator))
            except _NotShared:
                raise
            except Exception:  # no input for it, perhaps
                if leading == _TRIED[0]:
                    raise
    if len(found) != 1:
        raise _NotShared("other layers at other inputs")
    readers, writers = found.pop()
    return list(readers), list(writers)


def _copy(
    parent: nn.Module,
    children: Mapping[str, nn.Module],
    standins: Mapping[str, _Standin],
    outside: dict[int, nn.Module],
    *,
    training: bool,
) -> Any:
    layers = {id(part) for layer in children.values() for part in layer.modules()}
    inside = [module for module in parent.modules() if id(module) not in layers]
    takes = [parameter.kind for parameter in inspect.signature(parent.forward).parameters.values()]
    if takes not in ([inspect.Parameter.POSITIONAL_OR_KEYWORD], [inspect.Parameter.POSITIONAL_ONLY]):
        raise _NotShared("it takes something else, too")
    if "forward" in vars(parent) or any(GLOBAL_HOOKS):
        raise _NotShared("patched, or somebody looks at all modules")
    if hasattr(type(parent).forward, "_torchdynamo_orig_callable"):
        raise _NotShared("compiled")
    for module in inside:
        if any(t is not None and t.numel() > 1 for t in (*module._parameters.values(), *module._buffers.values())):
            raise _NotShared("something else is learnt or kept there")
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(hooks):
            raise _NotShared("somebody looks at it")
    within = {id(module) for module in inside}
    memo: dict[int, Any] = {key: module for key, module in outside.items() if key not in within}
    for part in inside:
        for key, value in vars(part).items():
            if isinstance(value, list | tuple | dict | set):
                if len(value) > _MANY:
                    raise _NotShared("it has too much to copy")
            elif not isinstance(value, nn.Module) and key not in ("training", "_modules"):
                memo[id(value)] = value  # a config, a function: not to be copied
    memo |= {id(children[name]): standin for name, standin in standins.items()}
    module = copy.deepcopy(parent, memo).train(training)
    for part in module.modules():
        if isinstance(part, _DropoutNd):
            part.p = 0.0
    return module


def _tried_once(
    module: nn.Module, standins: Mapping[str, _Standin], x: Tensor, generator: torch.Generator
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    for standin in standins.values():
        standin.expect(tuple(x.shape[:-1]))
    if _keeps_something(module, standins, x.detach()):
        raise _NotShared("its features are kept somewhere")
    for standin in standins.values():
        standin.told.requires_grad_()
    out, given, _ = _run(module, standins, x)
    writers = tuple(name for name, tensor in given.items() if _same(tensor, x))
    readers = tuple(name for name in given if name not in writers)
    sizes = {standins[name].out_features for name in writers} | {standins[name].in_features for name in readers}
    if not writers or not readers or len(sizes) > 1:
        raise _NotShared("no layer reads what others write")
    (features,) = sizes
    told = {name: standins[name].told for name in writers}
    factors = [torch.randn(given[name].shape, generator=generator, dtype=torch.float64) for name in readers]
    grads = torch.autograd.grad([given[name] for name in readers], list(told.values()), factors)
    for order in _orders(features, generator):
        for name in writers:
            standins[name].told = told[name].detach()[..., order].requires_grad_()
        again, now, _ = _run(module, standins, x)
        ordered = [factor[..., order] for factor in factors]
        new = torch.autograd.grad([now[name] for name in readers], [standins[name].told for name in writers], ordered)
        same = [_same(now[name], given[name][..., order] if name in readers else given[name]) for name in given]
        same += [_same(grad, before[..., order]) for grad, before in zip(new, grads, strict=True)]
        if not all(same) or not _same(again, out):
            raise _NotShared("the order of features matters")
    return readers, writers


def _run(
    module: nn.Module, standins: Mapping[str, _Standin], x: Tensor
) -> tuple[Any, dict[str, Tensor], list[weakref.ref[Tensor]]]:
    """What the module gives, what its layers were given, and what was made meanwhile."""
    before = _attributes(module)
    for standin in standins.values():
        standin.given = []
    with _Watch([x, *(standin.told for standin in standins.values())]) as watch:
        out = module.forward(x)
    if _attributes(module) != before or not all(standin.given for standin in standins.values()):
        raise _NotShared("it keeps something, or leaves a layer out")
    return out, {name: standin.given[0] for name, standin in standins.items()}, watch.made


def _keeps_something(module: nn.Module, standins: Mapping[str, _Standin], x: Tensor) -> bool:
    """Whether anything that is made in the module's forward stays. Without a graph, which keeps tensors itself."""
    made = _run(module, standins, x)[2]
    for standin in standins.values():
        standin.given = []
    return any(tensor() is not None for tensor in made)


class _Watch(TorchDispatchMode):
    """Sees to it that no tensor of several entries is read or written but what is given and made inside."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.storages = [tensor.untyped_storage() for tensor in given]
        self.known = {storage._cdata for storage in self.storages}
        self.made: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs or {})):
            if isinstance(leaf, Tensor) and leaf.numel() > 1 and leaf.untyped_storage()._cdata not in self.known:
                raise _NotShared("it reads or writes what is kept elsewhere")
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.storages.append(leaf.untyped_storage())
                self.known.add(self.storages[-1]._cdata)
                self.made.append(weakref.ref(leaf))
        return out


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What an object is made of, as far as its forward may change it."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return id(value), [(key, id(item)) for key, item in value.items()]
        return id(value), [id(item) for item in value] if isinstance(value, list | tuple | set) else None

    return {
        f"{name}.{key}": kept(value)
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if not isinstance(part, _Standin)
    }


def _orders(features: int, generator: torch.Generator) -> list[Tensor]:
    """A cycle of all and one exchange, of which every order can be composed, and any one."""
    every = torch.arange(features)
    exchange = torch.cat([every[:2].flip(0), every[2:]])
    return [every.roll(1), exchange, torch.randperm(features, generator=generator)]


def _same(new: Any, old: Any) -> bool:
    """Up to rounding; vectorized and scalar loops may differ in it."""
    return isinstance(new, Tensor) and new.shape == old.shape and torch.allclose(new, old, rtol=1e-9, atol=1e-12)
