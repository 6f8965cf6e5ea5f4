"""What to convert and how: one frozen dataclass that goes to and from JSON."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from poetx.errors import UserError, nearest

T = TypeVar("T")
Mode = Literal["fast", "mem", "weight"]
Init = Literal["keep", "normalized", "uniform"]
NeumannOrder = Literal[3, 7, "exact"]
Method = Literal["poet-x", "single-step", "oft"]
Permutation = Literal["random", "shared", "contiguous"]
Update = Literal["rotation", "free"]
#: How rotated layers run inside checkpointed decoder layers: :func:`poetx.savings.checkpoint_layers_`.
Recompute = Literal["auto", "fast", "mem"]

#: Endings of the names of layers that write to the residual stream: Llama, Mistral, Qwen, Gemma; GPT-2; OPT, GPT-J;
#: NeoX, BLOOM, Falcon; Phi, BERT; T5, ModernBERT.
RESIDUAL_MODULES = (
    *("o_proj", "down_proj", "c_proj", "out_proj", "fc2", "fc_out"),
    *("dense_4h_to_h", "attention.dense", "self_attention.dense", "self_attn.dense", "output.dense", "o", "wo", "Wo"),
)

#: How the frozen weight can be stored below bfloat16; see :mod:`poetx.ops.quantize`.
WEIGHT_FORMATS = ("int8", "int4", "nf4", "fp8", *(f"bipolar-int{bits}" for bits in range(2, 9)))

_CHOICES: dict[str, tuple[Any, ...]] = {
    "method": get_args(Method),
    "update": get_args(Update),
    "mode": get_args(Mode),
    "permutation": get_args(Permutation),
    "init": get_args(Init),
    "neumann_order": get_args(NeumannOrder),
    "rotation_dtype": ("float32", "bfloat16", "float64"),
    "weight_format": (None, *WEIGHT_FORMATS),
}

_OF_FRESH = ("poet-x", "single-step")
#: The methods that have a setting, where not all of them do.
METHODS_OF: dict[str, tuple[str, ...]] = {
    "update": ("single-step",),
    "weight_extra_bits": ("poet-x",),
    "permutation": ("poet-x",),
    "neumann_order": ("poet-x", "oft"),
    "weight_format": ("poet-x", "oft"),
    **dict.fromkeys(("mode", "init", "init_scale", "residual_scale", "residual_modules"), _OF_FRESH),
}
#: Settings that ``overrides`` can change for some layers.
PER_LAYER = (
    *("block_size", "update", "mode", "init_scale", "permutation", "neumann_order"),
    *("rotation_dtype", "weight_extra_bits", "weight_format", "group_size"),
)

#: Former names of settings, and former values where they have others now.
RENAMED = {"weight_residual": "weight_extra_bits", "spectrum": "update"}
_FORMER_VALUES = {"spectrum": {"fixed": "rotation"}}
#: Former settings of single steps that are gone, with what they did as all that is left.
GONE = {"partitions": (1, "one partition"), "partition_kind": ("structured", "contiguous blocks")}


def name_matches(name: str, patterns: str | tuple[str, ...]) -> bool:
    """PEFT's rule: one string is a regular expression for the whole name, several are names or endings."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def override_matches(name: str, pattern: str) -> bool:
    """Whether a layer's dotted name is what a pattern of ``PoetConfig.overrides`` means."""
    return name_matches(name, (pattern,)) or fnmatch.fnmatchcase(name, pattern)


def list_hint(key: str, patterns: str | tuple[str, ...], names: Iterable[str]) -> str:
    """What to write where one string has names that a list would find among ``names``; else nothing."""
    known, words = list(names), [word.strip() for word in patterns.split(",")] if isinstance(patterns, str) else []
    if not words or not all(any(name_matches(name, (word,)) for name in known) for word in words):
        return ""
    return (
        f"; one string is a regular expression for the whole name, a list has names and their endings: write "
        f"poet.{key}=[{','.join(words)}], or {key}={words} in Python"
    )


def current_name(key: str, value: Any) -> tuple[str, Any]:
    """Name and value of today for a setting that an older version may have written."""
    former = _FORMER_VALUES.get(key, {})
    return RENAMED.get(key, key), former.get(value, value) if isinstance(value, str) else value


def current_keys(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings of :class:`PoetConfig` as older versions wrote them, under the names of this one.

    Args:
        prefix: of the settings' names in messages.

    Raises:
        UserError: an old and a new name with different values; a setting that is gone and would train otherwise.
    """
    new = {key: value for key, value in values.items() if key not in RENAMED and key not in GONE}
    for key, value in values.items():
        name, now = current_name(key, value)
        if key in RENAMED and new.setdefault(name, now) != now:
            raise UserError(
                f"{prefix}{key}={value!r} with {prefix}{name}={new[name]!r}: {key} is the former name of {name}, and "
                f"the two differ; leave {prefix}{key} out"
            )
    if new.get("method", "poet-x") == "single-step":
        for key, (left, words) in GONE.items():
            if (value := values.get(key, left)) != left:
                raise UserError(
                    f"{prefix}{key}={value}: of a version before; single steps have {words} on a side since then, "
                    "because larger blocks did better at equal state. Leave it out and start anew, with a larger "
                    "block_size, or use the version the run was started with"
                )
        if values.keys() & GONE.keys():  # what these left out meant rotations
            new.setdefault("update", "rotation")
    return new


def _with_older_names(cls: type[T]) -> type[T]:
    """Let a config be made with settings of older versions, too, and say so."""
    made: Any = cls.__init__

    @functools.wraps(made)
    def __init__(self: T, **settings: Any) -> None:
        new = current_keys(settings)
        for key in settings.keys() & (RENAMED.keys() | GONE.keys()):
            now, effect = RENAMED.get(key), ""
            if now is None and "update" in new.keys() - settings.keys():
                effect = f", and still means update={new['update']!r}; give update"
            text = f"is {now}={new[now]!r} now" if now else f"is gone{effect or ', and has no effect'}"
            warnings.warn(f"PoetConfig: {key}={settings[key]!r} {text}", DeprecationWarning, stacklevel=2)
        made(self, **new)

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


@_with_older_names
@dataclass(frozen=True, kw_only=True)
class PoetConfig:
    """Settings of :func:`poetx.convert_`.

    Attributes:
        method: ``"poet-x"``, the paper's: rotations live for a few hundred steps between merges. ``"single-step"``:
            they are folded at every step by :class:`poetx.POETX`, and the layer is a plain product. ``"oft"``: OFTv2,
            rotations of the input alone, of blocks of neighbours, before a weight that is given; never merged before
            :func:`poetx.to_dense_`.
        block_size: width b of the orthogonal blocks, the one knob between memory and expressiveness. A side
            shorter than b gets one block of its own length; a side that b does not divide gets a shorter last
            block.
        mode: ``"fast"`` keeps the product with the frozen weight for backward; ``"mem"`` keeps the layer's
            input only and recomputes the rest. ``"weight"``, of ``"poet-x"``: R·W0·P is built from dense R and P at
            every forward and autograd does the rest, as in the original POET: the same function in several times the
            memory and time. ``"oft"`` keeps its input only whatever this is.
        update: of ``"single-step"``: ``"free"`` moves the weight by maps I + E whose blocks need not be rotations, and
            holds ‖W‖ only. ``"rotation"`` turns it, so that its singular values stay: half the state, and 0.13 nats
            worse after 0.8M tokens, at the best angle of each (docs/single-step.md).
        init: ``"keep"`` leaves the weight, and so the model's function, alone (the only right choice for a
            pretrained model). ``"normalized"`` draws a Gaussian and scales every row to norm ``init_scale``.
            ``"uniform"`` makes all singular values ``init_scale``.
        init_scale: factor on the freshly drawn weight; must be 1 with ``init="keep"``.
        residual_scale: a further factor on fresh weights of the layers that write to the residual stream, which then
            starts near the embedding alone; must be 1 with ``init="keep"``.
        residual_modules: which layers these are, in PEFT's meaning, as for ``target_modules``. The usual names of
            ``transformers`` models unless given.
        permutation: which features of a side share a block, with ``"poet-x"``. ``"random"``, the paper's: others after
            every merge, so that in time all of them mix; activations are gathered for it five times a layer and step
            (six with *mem*). ``"shared"``: as random, but alike where layers read the same features (q, k and v; gate
            and up), which *fast* gathers once for all of them, and where one reads what others make with nothing but
            elementwise operations between (the MLP's inner features), which are not gathered at all: half of the
            passes over activations, a third of their bytes. Who hooks such a layer sees its features as ever, at the
            price of gathering them.
            ``"contiguous"``: neighbours, for good; nothing is gathered, and every b × b part of the weight keeps its
            singular values.
        neumann_order: highest power k of the Neumann series in the Cayley–Neumann parametrization, 3 (the
            paper's) or 7, or ``"exact"`` for the Cayley transform itself.
        target_modules: ``"all-linear"``, or names (a module matches when its dotted name equals or ends with
            one), or one regular expression that must match the whole dotted name (PEFT's meaning).
        exclude_modules: the same, for what to leave alone.
        seed: with the layer's name and its merge count, decides every permutation and fresh weight.
        rotation_dtype: dtype of the packed rotation parameters. float32 whatever the model's dtype, because
            steps of 2.5e-4 vanish below half a unit in the last place of bfloat16. Of ``"single-step"``: dtype of the
            momentum, which bfloat16 serves with stochastic rounding.
        weight_extra_bits: keep 8 more bits of a bfloat16 weight in an int8 tensor (3 bytes a weight in all), which
            only merging reads and writes; with a ``weight_format`` 4 more bits of it. Without them, rounding noise of
            merges drowns small singular values, of which a pretrained weight has many. None: with ``init="keep"``, not
            with fresh weights. Nothing changes for a float32 weight; true where all are is in the conversion report.
            Formerly ``weight_residual``, still taken.
        weight_format: store the frozen weight as ``"int8"`` or ``"int4"`` (affine), ``"nf4"``, ``"fp8"`` (e4m3) or
            ``"bipolar-int2"`` … ``"bipolar-int8"``, dequantized on the fly (POET-XQ). None: in the model's dtype.
            Needs ``mode="mem"``: what *fast* saves for backward would cost more than the format spares.
        group_size: neighbours in a row that share a scale in such a format.
        overrides: pattern → settings of the layers that it matches, such as ``{"*.mlp.*": {"update": "free"}}``; of
            several patterns that set the same the last counts. A pattern is a layer's dotted name, its ending, or has
            ``*``, ``?`` and ``[…]`` as for file names; it must match a layer that is converted. Of :data:`PER_LAYER`.

    Raises:
        UserError: a value outside its range.
    """

    method: Method = "poet-x"
    block_size: int = 256
    update: Update = "free"
    mode: Mode = "fast"
    init: Init = "keep"
    init_scale: float = 1.0
    residual_scale: float = 1.0
    residual_modules: str | tuple[str, ...] = RESIDUAL_MODULES
    permutation: Permutation = "random"
    neumann_order: NeumannOrder = 3
    target_modules: str | tuple[str, ...] = "all-linear"
    exclude_modules: str | tuple[str, ...] = ("lm_head",)
    seed: int = 0
    rotation_dtype: str = "float32"
    weight_extra_bits: bool | None = None
    weight_format: str | None = None
    group_size: int = 128
    overrides: dict[str, dict[str, Any]] | None = dataclasses.field(default=None, hash=False)

    def __post_init__(self) -> None:
        if isinstance(self.block_size, bool) or not isinstance(self.block_size, int) or self.block_size < 2:
            raise UserError(
                f"block_size={self.block_size!r}: must be a whole number of at least 2 (256 or 512 are usual)"
            )
        for field, choices in _CHOICES.items():
            value = getattr(self, field)
            if not any(value == choice and type(value) is type(choice) for choice in choices):
                raise UserError(
                    f"{field}={value!r}: must be one of {', '.join(map(repr, choices))}"
                    + nearest(str(value), [str(choice) for choice in choices])
                )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise UserError(f"seed={self.seed!r}: must be a whole number")
        for field in ("init_scale", "residual_scale"):
            scale = getattr(self, field)
            if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < float("inf"):
                raise UserError(f"{field}={scale!r}: must be a positive number")
            if self.init == "keep" and scale != 1:
                raise UserError(
                    f"{field}={scale}: init='keep' leaves the weight alone; use init='normalized' or {field}=1"
                )
        if not isinstance(self.weight_extra_bits, bool | None):
            raise UserError(f"weight_extra_bits={self.weight_extra_bits!r}: must be true, false or null")
        if isinstance(self.group_size, bool) or not isinstance(self.group_size, int) or self.group_size < 2:
            raise UserError(f"group_size={self.group_size!r}: must be a whole number of at least 2 (128 is usual)")
        if self.method == "single-step" and (self.weight_extra_bits or self.weight_format is not None):
            raise UserError(
                "method='single-step' with weight_extra_bits or weight_format: it folds the weight at every step; "
                "use method='poet-x' for those"
            )
        if self.mode == "weight" and self.method != "poet-x":
            raise UserError(f"mode='weight' with method={self.method!r}: is for method='poet-x'; use fast or mem")
        if self.method == "oft" and self.init != "keep":
            raise UserError(
                f"init={self.init!r} with method='oft': it turns the weights that a model has; use init='keep'"
            )
        if self.method == "oft" and self.weight_extra_bits:
            raise UserError(
                "weight_extra_bits=True with method='oft': are for merges, which it has none of; leave it out"
            )
        if self.weight_format is not None and self.mode != "mem" and self.method != "oft":
            raise UserError(
                f"mode={self.mode!r} with weight_format={self.weight_format!r}: fast keeps a product of the layer for "
                "backward, which costs more memory than the format spares; use mode='mem'"
            )
        for field in ("target_modules", "exclude_modules", "residual_modules"):
            value = getattr(self, field)
            if isinstance(value, list):
                object.__setattr__(self, field, tuple(value))
            elif not isinstance(value, (str, tuple)):
                raise UserError(f"{field}={value!r}: must be a string or a sequence of names")
            try:
                re.compile(value if isinstance(value, str) else "")
            except re.error as error:
                raise UserError(f"{field}={value!r}: not a regular expression ({error})") from None
        if self.overrides is not None:
            self._check_overrides(self.overrides)

    def _check_overrides(self, overrides: Any) -> None:
        """Raise :class:`UserError` where ``overrides`` are no settings of layers, or of another method's."""
        if not isinstance(overrides, Mapping):
            raise UserError(f"overrides={overrides!r}: must be {{pattern: {{setting: value}}}}")
        plain = {}
        for pattern, own in overrides.items():
            where = f"overrides[{pattern!r}]"
            if not isinstance(pattern, str) or not isinstance(own, Mapping) or not own:
                raise UserError(f"{where}={own!r}: must be {{setting: value}}, with a pattern of names before it")
            own = plain[pattern] = {str(key): value for key, value in own.items()}
            for key in own:
                if key not in PER_LAYER:
                    why = "is the same for all layers" if hasattr(self, key) else "unknown setting"
                    raise UserError(f"{where}: {key}: {why}{nearest(key, PER_LAYER)}; there are {', '.join(PER_LAYER)}")
                if self.method not in METHODS_OF.get(key, (self.method,)):
                    raise UserError(f"{where}: {key} has no effect with method={self.method!r}; leave it out")
            try:
                settled = dataclasses.replace(self, overrides=None, **own)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            if "group_size" in own and settled.weight_format is None:
                raise UserError(f"{where}: group_size has no effect without a weight_format; leave it out")
        object.__setattr__(self, "overrides", plain or None)

    def for_layer(self, name: str) -> PoetConfig:
        """The settings of the layer of this dotted name: these, with the overrides that match it."""
        settings: dict[str, Any] = {}
        for pattern, own in (self.overrides or {}).items():
            if override_matches(name, pattern):
                settings |= own
        return dataclasses.replace(self, overrides=None, **settings) if self.overrides else self

    @property
    def keeps_extra_bits(self) -> bool:
        """``weight_extra_bits``, settled where it is None."""
        if self.weight_extra_bits is None:
            return self.method == "poet-x" and self.init == "keep"
        return self.weight_extra_bits

    @property
    def rounds_momenta(self) -> bool:
        """Whether backward draws noise: it adds to momenta of bfloat16."""
        return self.method == "single-step" and self.rotation_dtype == "bfloat16"

    def writes_to_residual(self, name: str) -> bool:
        """Whether ``residual_modules`` match a layer's dotted name."""
        return name_matches(name, self.residual_modules)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, as :meth:`from_dict` takes them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PoetConfig:
        """The inverse of :meth:`to_dict`, older versions' included. Raises :class:`UserError` on an unknown key."""
        known, values = [field.name for field in dataclasses.fields(cls)], current_keys(values)
        for key in values:
            if key not in known:
                raise UserError(f"PoetConfig: unknown key {key!r}{nearest(key, known)}")
        return cls(**values)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> PoetConfig:
        return cls.from_dict(json.loads(text))
