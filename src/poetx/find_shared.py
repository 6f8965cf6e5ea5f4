"""Which layers of a model permute features alike, under ``permutation="shared"``: found out, not told by names."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from poetx.config import PoetConfig
from poetx.layers.shared_features import SharedFeatures
from poetx.targets import Targets, is_conv1d

#: Layer names → what the layer has in common with others, by side ("in", "out").
Shared = dict[str, dict[str, SharedFeatures]]
#: Sequences, tokens of each: what a module is tried with.
_TRIED = (2, 3)


def find_shared(model: nn.Module, found: Targets, config: PoetConfig) -> Shared:
    """What the layers of ``found`` have in common with others, before they are converted.

    Among the direct children of one module: layers whose outputs another one reads after nothing but elementwise
    operations (:func:`inner_features`), and layers of one input size, but for those and for the ones that write to the
    residual stream, which read the same tensor if any do. If they do not, each gathers its own all the same.
    """
    shared: Shared = defaultdict(dict)
    for (name, parent), children in _families(model, found, config).items():
        readers, writers = inner_features(parent, {child: found.layers[full] for child, full in children.items()})
        groups = [(readers, writers)] if writers else []
        alike: dict[int, list[str]] = defaultdict(list)
        for child, full in children.items():
            if child not in readers and not config.writes_to_residual(full):
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
        self.given: list[Tensor] = []
        self.told = torch.randn(*_TRIED, self.out_features, generator=generator, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape != (*_TRIED, self.in_features):
            raise ValueError("this is not what the layer takes")
        self.given.append(x.clone())
        return self.told.clone()


@torch.no_grad()
def inner_features(parent: nn.Module, children: Mapping[str, nn.Module]) -> tuple[list[str], list[str]]:
    """(readers, writers) among linear layers of a module, where readers take what elementwise operations make of what
    the writers make; two empty lists where there are none.

    Tried out: the module's own forward runs on a few numbers, with something else in the place of the layers. It must
    hand its input to the writers. Then, where the writers' features come in other orders, the readers must get theirs
    in these, and all else must stay. A module that takes more than one tensor, or fails, has none.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(unset_fake_temporarily())
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.random.fork_rng(devices=[]))  # a module may draw numbers
        generator = torch.Generator().manual_seed(0)
        for width in dict.fromkeys(_sizes(layer)[0] for layer in children.values()):
            standins = {name: _Standin(_sizes(layer), generator) for name, layer in children.items()}
            x = torch.randn(*_TRIED, width, generator=generator, dtype=torch.float64)
            try:
                with _in_place_of(parent, standins):
                    readers, writers = _tried(parent, standins, x, generator)
            except Exception:  # whatever a module raises that is made for other inputs
                continue
            if writers:
                return readers, writers
    return [], []


@contextlib.contextmanager
def _in_place_of(parent: nn.Module, standins: Mapping[str, nn.Module]) -> Iterator[None]:
    """Without dropout, too."""
    before, modes = {name: parent._modules[name] for name in standins}, [(m, m.training) for m in parent.modules()]
    try:
        parent._modules.update(standins)
        for module in parent.modules():
            module.training = False
        yield
    finally:
        parent._modules.update(before)
        for module, mode in modes:
            module.training = mode


def _tried(
    parent: nn.Module, standins: Mapping[str, _Standin], x: Tensor, generator: torch.Generator
) -> tuple[list[str], list[str]]:
    out = parent.forward(x.clone())
    called = {name: standin for name, standin in standins.items() if standin.given}
    writers = [name for name, standin in called.items() if _same(standin.given[0], x)]
    readers = [name for name in called if name not in writers]
    sizes = {called[name].out_features for name in writers} | {called[name].in_features for name in readers}
    if not writers or not readers or len(sizes) > 1:
        return [], []
    (features,) = sizes
    if any(len(standin.given) > 1 for standin in called.values()):
        return [], []
    told = {name: called[name].told for name in writers}
    for order in _orders(features, generator):
        for name in writers:
            called[name].told = told[name][..., order]
        again = parent.forward(x.clone())
        for name, standin in standins.items():
            if len(standin.given) != 2 * (name in called):
                return [], []
            if standin.given:
                first, second = standin.given[0], standin.given.pop()
                if not _same(second, first[..., order] if name in readers else first):
                    return [], []
        if not _same(again, out):
            return [], []
    return readers, writers


def _orders(features: int, generator: torch.Generator) -> list[Tensor]:
    """A cycle of all and one exchange, of which every order can be composed, and any one."""
    every = torch.arange(features)
    exchange = torch.cat([every[:2].flip(0), every[2:]])
    return [every.roll(1), exchange, torch.randperm(features, generator=generator)]


def _same(new: Any, old: Any) -> bool:
    """Up to rounding; vectorized and scalar loops may differ in it."""
    return isinstance(new, Tensor) and new.shape == old.shape and torch.allclose(new, old, rtol=1e-9, atol=1e-12)
