"""Checkpoints: a directory that is either whole or not there, and never a pickle.

    checkpoints/step-00000123/model.safetensors      the model's state_dict, tied tensors once
                              optimizer.safetensors  tensors of the optimizer state, "<parameter name>//<key>"
                              rng.safetensors        states of torch's generators
                              state.json             step, counters, group options, aliases of tied tensors
                              recipe.yaml            the resolved recipe
                              manifest.json          format version, size and sha256 of every file above

Everything is written to a hidden directory, synced to disk and renamed. Loading checks the manifest first.
"""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from poetx.errors import UserError, one_line
from poetx.files import new_directory, read_json, reason, remove, remove_at_once, sha256
from poetx.models import not_finite
from poetx.optimizer_restart import COUNTERS

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})$")
_FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "recipe.yaml")
_SEPARATOR = "//"  # cannot occur in a dotted parameter name


_Count = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TrainState(_Strict):
    """What the loop must remember besides model and optimizer. Plain JSON values."""

    step: _Count = 0
    skipped_steps: _Count = 0
    bad_steps_in_a_row: _Count = 0
    data_fingerprint: str = ""
    aliases: dict[str, str] = {}  # tied tensors: name -> the name that is stored


class _Options(_Strict, extra="allow"):
    """A parameter group's settings, whatever its optimizer has, and its counts of merges."""

    steps_since_merge: _Count = 0
    merges: _Count = 0


class _Group(_Strict):
    names: list[str]
    options: _Options


class _OptimizerState(_Strict):
    groups: list[_Group]
    values: dict[str, dict[str, Any]]  # parameter name -> entries of its state that are no tensors
    extra: dict[str, Any]  # the rest of the optimizer's state_dict


class _Saved(_Strict):
    """The contents of ``state.json``."""

    train: TrainState
    optimizer: _OptimizerState


class BrokenCheckpoint(Exception):
    """A checkpoint directory whose files do not match its manifest. The message is one line."""


def checkpoint_dir(run_dir: Path) -> Path:
    """Where the checkpoints of a run lie."""
    return run_dir / "checkpoints"


def checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint directories of a run, oldest first, whole or not."""
    found = [path for path in checkpoint_dir(run_dir).glob("step-*") if _NAME.search(path.name)]
    return sorted(found, key=step_of)


def check_linked(run_dir: Path, names: Iterable[str] = ("checkpoints",)) -> None:
    """Raise :class:`UserError` where a directory of the run is a link to what is gone, as with an unmounted disk."""
    for place in (run_dir / name for name in names):
        if place.is_symlink() and not place.exists():
            raise UserError(
                f"{place}: is a link to {place.readlink()}, which is not there; bring that back, or remove the link"
            )


def check_is_run(place: Path) -> None:
    """Raise :class:`UserError` where ``place`` is one of a run's checkpoints, which look like a run."""
    if (place / MANIFEST).is_file() and (place / "recipe.yaml").is_file():
        raise UserError(
            f"{place}: is a checkpoint; give its run, {place.resolve().parent.parent}, read at its newest one"
        )


def step_of(path: Path) -> int:
    """The step in a checkpoint directory's name."""
    match = _NAME.search(path.name)
    assert match, path
    return int(match.group(1))


def save_checkpoint(
    run_dir: Path,
    *,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    recipe_yaml: str,
    keep: int,
) -> Path:
    """Write ``step-<state.step>``, one whole tensor after another, and remove all but the newest ``keep``.

    The first rank writes. Where parameters are sharded the others call this, too, and hand over what they have.

    Raises:
        UserError: the disk is full or not writable; earlier checkpoints are as they were.
    """
    from poetx.distributed.ranks import rank
    from poetx.distributed.rows import whole_on_first
    from poetx.distributed.sharded import reshard_

    final = checkpoint_dir(run_dir) / f"step-{state.step:08d}"
    reshard_(model)
    tensors, state.aliases = _without_aliases(model)
    optimizer_tensors, optimizer_json = _split_optimizer(model, optimizer)
    whole = whole_on_first([*tensors.values(), *optimizer_tensors.values()])
    remedy = "continue with --resume; earlier checkpoints are untouched"
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: collections.deque(whole, maxlen=0))  # whatever fails here, others are waiting
        if rank():
            return final
        temporary = stack.enter_context(new_directory(final, remedy=remedy, sync=True))
        document = {"train": state.model_dump(), "optimizer": optimizer_json}
        _write_files(temporary, (tensors, optimizer_tensors), whole, document, recipe_yaml)
        files = {
            file.name: {"size": file.stat().st_size, "sha256": sha256(file)} for file in sorted(temporary.iterdir())
        }
        manifest = json.dumps({"format": FORMAT, "files": files}, indent=1)
        (temporary / MANIFEST).write_text(manifest, encoding="utf-8")
    for old in [path for path in checkpoints(run_dir) if step_of(path) <= state.step][:-keep]:
        try:
            remove_at_once(old)
        except OSError as error:
            logger.warning("%s: could not be removed (%s)", old, reason(error))
    return final


def find_checkpoint(run_dir: Path) -> tuple[Path, list[str]]:
    """The newest whole checkpoint, and one line about every newer one that is broken.

    Raises:
        UserError: there is none, none is whole, or one holds another step than its name says or was written by a newer
            version of poetx.
    """
    check_is_run(run_dir)
    check_linked(run_dir)
    if (place := checkpoint_dir(run_dir)).is_file():
        raise UserError(f"{place}: is a file, not the directory of the run's checkpoints; move it away")
    problems: list[str] = []
    for path in reversed(checkpoints(run_dir)):
        try:
            verify(path)
        except BrokenCheckpoint as error:
            problems.append(str(error))
            continue
        step = read_state(path).step
        if step != step_of(path):
            name = f"step-{step:08d}"
            raise UserError(f"{path}: holds step {step} by its state.json; call it {name} again, or remove it")
        return path, problems
    if problems:
        raise UserError(f"no whole checkpoint in {checkpoint_dir(run_dir)}: {problems[0]}")
    raise UserError(f"{run_dir}: no checkpoints yet; train it with poetx train, without --resume")


def verify(path: Path) -> None:
    """Check every file against the manifest.

    Raises:
        BrokenCheckpoint: a file is missing, has another size, or other bytes.
        UserError: the format is newer than this version of poetx reads.
    """
    try:
        manifest = read_json(path / MANIFEST)
        version, files = int(manifest["format"]), dict(manifest["files"])
        expected = {name: (int(facts["size"]), str(facts["sha256"])) for name, facts in files.items()}
    except (UserError, KeyError, TypeError, ValueError, OverflowError):
        raise BrokenCheckpoint(f"{path / MANIFEST}: missing or unreadable") from None
    if version > FORMAT:
        raise UserError(f"{path}: checkpoint format {version}, this poetx reads up to {FORMAT}; update poetx")
    if left_out := [name for name in _FILES if name not in expected]:
        raise BrokenCheckpoint(f"{path / MANIFEST}: does not list {left_out[0]}")
    for name, (size, digest) in expected.items():
        file = path / name
        if not file.is_file():
            raise BrokenCheckpoint(f"{file}: missing")
        if file.stat().st_size != size:
            raise BrokenCheckpoint(f"{file}: {file.stat().st_size} bytes instead of {size}")
        if sha256(file) != digest:
            raise BrokenCheckpoint(f"{file}: its contents have changed (sha256 differs)")


def read_state(path: Path) -> TrainState:
    """The loop's own state in a verified checkpoint.

    Raises:
        UserError: ``state.json`` has unknown keys, lacks one, or has values of another kind.
    """
    return _read(path).train


def _read(path: Path) -> _Saved:
    file = path / "state.json"
    try:
        saved = _Saved.model_validate(read_json(file))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        what = "unknown key" if first["type"] == "extra_forbidden" else first["msg"]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{file}: {key}: {what}; edited, or of another version of poetx") from None
    if unknown := saved.train.aliases.values() - tensor_shapes(path).keys():
        raise UserError(f"{file}: train.aliases name {min(unknown)}, which model.safetensors does not have")
    return saved


def tensor_shapes(path: Path, name: str = "model.safetensors") -> dict[str, list[int]]:
    """Shapes of the model's tensors in a checkpoint, tied ones once, or of those in another file of it."""
    from safetensors import safe_open

    with _readable(path / name) as file, safe_open(file, framework="pt") as tensors:
        return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118


def _tensors(file: Path, like: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a file; of those that belong to sharded ones, by name, what this rank keeps."""
    from poetx.train.tensor_file import read_tensors

    with _readable(file):
        return read_tensors(file, like or {})


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[Path]:
    from safetensors import SafetensorError

    try:
        yield file
    except SafetensorError as error:
        raise UserError(f"{file}: cannot be read ({one_line(error)})") from None


def load_model(path: Path, model: torch.nn.Module) -> None:
    """Restore the model's state in place from a verified checkpoint.

    Raises:
        UserError: names or shapes differ from the model's, or a weight is not finite, which none is when it is saved.
    """
    from poetx.distributed.sharded import reshard_

    reshard_(model)
    tensors = _tensors(path / "model.safetensors", model.state_dict())
    for alias, stored in read_state(path).aliases.items():
        tensors[alias] = tensors[stored]
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        what = textwrap.shorten(str(error), 400, placeholder=" …")
        raise UserError(f"{path}: does not fit the model of this recipe: {what}") from None
    if broken := not_finite(model):
        raise UserError(f"{path}: NaN or infinity in {broken[0]}; remove this checkpoint to go back to the one before")


def load_optimizer(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore optimizer state and group options. Whatever hooks keep state there must be registered already.

    Raises:
        UserError: the parameter groups or the parameters that have a state differ.
    """
    saved = _read(path).optimizer
    current = _state_by_parameter(optimizer)
    groups = current["param_groups"]
    names = _names_by_index(model, optimizer)
    if [group.names for group in saved.groups] != [[names[i] for i in group["params"]] for group in groups]:
        raise UserError(f"{path}: the optimizer's parameter groups differ from this recipe's")
    of = dict(model.named_parameters())
    keys = tensor_shapes(path, "optimizer.safetensors")
    like = {}
    for name, key in (key.rpartition(_SEPARATOR)[::2] for key in keys):
        if name in of:  # what is there already may be whole on every rank, as a momentum of rotations is
            like[f"{name}{_SEPARATOR}{key}"] = optimizer.state.get(of[name], {}).get(key, of[name])
    tensors = _tensors(path / "optimizer.safetensors", like)
    entries: dict[Any, Any] = {key.rpartition(_SEPARATOR)[::2]: tensor for key, tensor in tensors.items()}
    entries |= {(name, key): value for name, values in saved.values.items() for key, value in values.items()}
    index_of = {name: index for index, name in names.items()}
    state: dict[int, dict[str, Any]] = {}
    for (name, key), value in entries.items():
        if name not in index_of:
            raise UserError(f"{path}: has a state of the optimizer for {name}, which this recipe does not train")
        state.setdefault(index_of[name], {})[key] = value
    for group, stored in zip(groups, saved.groups, strict=True):
        for counter in COUNTERS:
            group.pop(counter, None)  # without them nobody knows which permutations come next
        options = stored.options.model_dump(exclude_unset=True)
        group.update({key: _untuple(value, group.get(key)) for key, value in options.items()})
    try:
        optimizer.load_state_dict({**current, **saved.extra, "state": state, "param_groups": groups})
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: its optimizer state does not fit: {one_line(error)}") from None


def load_rng(path: Path) -> None:
    """Restore torch's CPU generator, and those of the CUDA devices that are still there."""
    import torch

    states = _tensors(path / "rng.safetensors")
    try:
        torch.set_rng_state(states.pop("cpu"))
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            if (state := states.get(f"cuda:{index}")) is not None:
                torch.cuda.set_rng_state(state, index)
    except (KeyError, RuntimeError, TypeError) as error:
        raise UserError(f"{path}: its generator states cannot be restored ({one_line(error)})") from None


def remove_leftovers(run_dir: Path) -> None:
    """Remove what a killed process left half-written."""
    for path in checkpoint_dir(run_dir).glob(".step-*.tmp*"):
        remove(path)


def _write_files(
    directory: Path,
    tensors: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]],
    whole: Iterator[torch.Tensor],
    document: dict[str, Any],
    recipe_yaml: str,
) -> None:
    from poetx.train.tensor_file import save_tensors

    for name, own in zip(("model", "optimizer"), tensors, strict=True):
        save_tensors(directory / f"{name}.safetensors", own, whole)
    rng = _rng_states()
    save_tensors(directory / "rng.safetensors", rng, iter(rng.values()))
    (directory / "state.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    (directory / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")


def _without_aliases(model: torch.nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors of the model that are the very same memory once only, and name -> stored name for the others."""
    from poetx.distributed.sharded import is_sharded, local
    from poetx.train.tensor_file import by_size

    parameters = dict(model.named_parameters(remove_duplicate=False))
    stored: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    owner: dict[Any, str] = {}
    for name, tensor in model.state_dict().items():
        place: Any = (tensor.device, local(tensor).data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if is_sharded(tensor):  # of which there may be nothing on this rank
            place = id(parameters[name])
        if tensor.numel() and place in owner:
            aliases[name] = owner[place]
            continue
        owner[place] = name
        stored[name] = tensor.detach()
    return by_size(stored), aliases


def _split_optimizer(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The optimizer's state_dict as tensors by name and everything else as JSON."""
    import torch

    from poetx.train.tensor_file import by_size

    whole = _state_by_parameter(optimizer)
    names = _names_by_index(model, optimizer)
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, entries in whole["state"].items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{names[index]}{_SEPARATOR}{key}"] = value.detach()
            else:
                values.setdefault(names[index], {})[key] = value
    groups = [
        {
            "names": [names[index] for index in group["params"]],
            "options": {key: value for key, value in group.items() if key != "params"},
        }
        for group in whole["param_groups"]
    ]
    extra = {key: value for key, value in whole.items() if key not in ("state", "param_groups")}
    return by_size(tensors), {"groups": groups, "values": values, "extra": extra}


def _state_by_parameter(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its state_dict, with no state in the groups, which are written as JSON."""
    return getattr(optimizer, "plain_state_dict", optimizer.state_dict)()


def _names_by_index(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[int, str]:
    """state_dict() numbers parameters in the order of the groups; this gives their names in the model."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {index: name_of[id(parameter)] for index, parameter in enumerate(ordered)}


def _rng_states() -> dict[str, torch.Tensor]:
    import torch

    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states.update({f"cuda:{i}": torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())})
    return states


def _untuple(value: Any, current: Any) -> Any:
    """JSON has no tuples: give an option back the type it has in the fresh optimizer."""
    return tuple(value) if isinstance(current, tuple) and isinstance(value, list) else value
