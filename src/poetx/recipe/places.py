"""Where recipes are, and the paths in one as they are meant where it is read."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from poetx.errors import UserError, nearest
from poetx.recipe.shorthands import SIZED_RECIPES

RECIPE_DIR = Path(__file__).resolve().parent.parent / "recipes"
PATHS = (
    "data.train",
    "data.validation",
    "data.tokenizer",
    "data.chat_template",
    "data.cache_dir",
    "model.config",
    "model.pretrained",
    "model.offload_dir",
)
_TEXTS = ("data.train", "data.validation")
#: Of tokenizers that have no ``tokenizer.json``.
_OWN_TOKENIZERS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")


def builtin_recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted([*(path.stem for path in RECIPE_DIR.glob("*.yaml")), *SIZED_RECIPES])


def recipe_path(source: str) -> Path:
    """The YAML file meant by a built-in name, a path, or a run directory."""
    if source in SIZED_RECIPES:
        return RECIPE_DIR / "llama.yaml"
    if source in builtin_recipes():
        return RECIPE_DIR / f"{source}.yaml"
    path = Path(source)
    if path.is_dir():
        path = path / "recipe.yaml"
        if not path.is_file():
            meant = kept_recipe(source)
            if (path.parent / "config.json").is_file():
                meant = f"; it is a model: train it by poetx train sft model.pretrained={source}"
            raise UserError(f"{source}: a directory without recipe.yaml is not a run{meant}")
        return path
    if not path.is_file():
        known, file = ", ".join(builtin_recipes()), path.with_name(f"{path.name}.yaml")
        meant = f"; did you mean {file}?" if file.is_file() else nearest(source, builtin_recipes())
        raise UserError(f"{source}: no such recipe{meant} (built in: {known}; or a path)")
    return path


def make_absolute(values: dict[str, Any]) -> None:
    """Paths as they are meant here and now, so that a run can be resumed from another directory."""
    if isinstance(values.get("run_dir"), str):
        values["run_dir"] = _expanded("run_dir", values["run_dir"])
    for key in PATHS:
        section, _, name = key.partition(".")
        part = values.get(section)
        if isinstance(part, dict) and part.get(name):
            part[name] = _absolute(key, part[name])


def found_instead(path: Path, file: str) -> str:
    """What is at ``path`` where ``file``, of a model or tokenizer, is not, and what to do."""
    if not path.exists():
        name = os.path.relpath(path)
        return "no such file or directory" + (
            "" if name.startswith("..") else f"; for a model of the Hub, first: hf download {name} --local-dir DIR"
        )
    if (path / "export" / file).is_file():
        return f"is a run; the model that it exported is {path / 'export'}"
    if (path / "manifest.json").is_file() and (path / "recipe.yaml").is_file():
        run = path.resolve().parent.parent
        return f"is a checkpoint; give {run / 'export'}, which poetx export {run} DIR writes as well"
    if (path / "adapter_config.json").is_file():
        return "is an adapter alone; merge it into its model, and give what that saves"
    own = next((name for name in _OWN_TOKENIZERS if (path / name).is_file()), None)
    if own and file == "tokenizer.json":
        return f"no {file} there but {own}; AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) makes it of that"
    return f"no {file} there"


def kept_recipe(source: str) -> str:
    """Where a run whose recipe is damaged or gone has it once more."""
    kept = sorted(Path(source).glob("checkpoints/step-*/recipe.yaml"))
    return f"; its newest checkpoint has it: cp {kept[-1]} {source}" if kept else ""


def _absolute(key: str, value: Any) -> Any:
    """A path, each of several, or each with its weight."""
    if isinstance(value, list | tuple):
        return [_absolute(key, item) for item in value]
    if isinstance(value, dict):
        return {_absolute(key, path): weight for path, weight in value.items()}
    if not isinstance(value, str) or value == "builtin" or (key in _TEXTS and is_hub_name(value)):
        return value
    if re.match(r"\w+://", value):
        raise UserError(f"{key}={value}: is an address; download it first, and give the path of what is there then")
    return os.path.abspath(_expanded(key, value))  # noqa: PTH100


def _expanded(key: str, path: str) -> str:
    expanded = os.path.expanduser(path)  # noqa: PTH111
    if expanded.startswith("~"):
        raise UserError(f"{key}={path}: there is no such user; write ./{path} for a name that begins with ~")
    return expanded


def is_hub_name(source: str) -> bool:
    """Whether ``org/name``, ``org/name:config`` or ``org/name:config:split`` means a data set on the Hub: where there
    is no such path, nor a directory ``org``.
    """
    fits = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]*){0,2}", source)
    return bool(fits) and not Path(source).suffix[1:].isalpha() and not Path(source).parent.exists()


def is_prepared(source: Any) -> bool:
    """Whether ``source`` is a directory of tokens that ``poetx data`` made."""
    place = Path(source).expanduser() if isinstance(source, str) and source else None
    return place is not None and all((place / name).is_file() for name in ("meta.json", "train.bin"))
