"""Imports point one way, and importing does nothing."""

import ast
import contextlib
import functools
import importlib
import re
import subprocess
import sys
from pathlib import Path

import poetx
from poetx.recipe.sections import every_key

ROOT = Path(poetx.__file__).parent
#: Lower may not import higher.
ORDER = (
    ("errors", "lazy"),
    ("files",),
    ("config",),
    ("ops",),
    ("distributed",),
    ("layers",),
    ("conversion_report", "targets"),
    ("find_shared",),
    ("plain_model",),
    ("convert",),
    ("materialize", "merge", "one_rate", "optimizer_restart", "spectra"),
    ("optim", "savings", "training_check"),
    ("memory",),  # measuring is below the loop
    ("recipe",),
    ("models",),
    ("methods",),
    ("data",),
    ("train",),
    ("runs", "planner"),  # planning is above the recipe and takes the loop's step
    ("bench", "integrations"),
    ("compare",),
    ("cli",),
)
LEVELS = {name: level for level, names in enumerate(ORDER) for name in names}
#: Former homes that only forward, and the two that start something.
LEVELS |= {"stack": len(ORDER), "__main__": len(ORDER)}


@functools.cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def level(parts):
    return LEVELS[parts[0].removesuffix(".py")]


def test_imports_point_one_way():
    checked = 0
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).parts
        if parts == ("__init__.py",):
            continue
        for node in ast.walk(tree(path)):
            names = []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names = [node.module or ""]
                assert node.module != "poetx", f"{path}: import from the module that has it, not from poetx"
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                target = name.split(".")
                if target[0] == "poetx" and len(target) > 1 and target[1] in LEVELS:
                    checked += 1
                    assert level(target[1:]) <= level(parts), f"{path} imports {name}"
    assert checked > 20


def test_files_stay_readable():
    for path in ROOT.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 500, f"{path} is too long to see at once"


def test_every_public_name_is_there() -> None:
    for name in poetx.__all__:
        assert getattr(poetx, name).__name__ == name
    assert set(poetx.__all__) <= set(dir(poetx))


def test_modules_that_pages_name_are_found_without_an_import_of_their_own():
    names = ("optim.build_optimizer", "savings.offload_frozen_", "distributed", "integrations")
    code = "import poetx; " + "; ".join(f"poetx.{name}" for name in names)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_import_is_silent_waits_for_torch_until_it_is_needed_and_leaves_it_alone():
    code = (
        "import sys, poetx, poetx.cli;"
        "assert not {'torch', 'transformers', 'triton'} & set(sys.modules);"
        "import torch; before = torch.get_rng_state(), torch.get_default_dtype(); poetx.PoetConfig(); poetx.convert_;"
        "assert torch.equal(before[0], torch.get_rng_state()) and before[1] == torch.get_default_dtype()"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_no_public_name_is_also_a_module_of_its_package():
    """Importing the module would replace the name: ``from poetx.planner import estimate`` would mean either."""
    for path in ROOT.rglob("__init__.py"):
        package = ".".join(("poetx", *path.parent.relative_to(ROOT).parts))
        names = getattr(importlib.import_module(package), "__all__", ())
        modules = {p.stem for p in path.parent.glob("*.py")} | {
            p.parent.name for p in path.parent.glob("*/__init__.py")
        }
        assert not modules & set(names), package


def calls_by_file(*names):
    """Which file calls a function or method of these names, and which of them."""
    found = {}
    for path in ROOT.rglob("*.py"):
        called = {
            getattr(node.func, "attr", getattr(node.func, "id", ""))
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Call)
        }
        if called & set(names):
            found[path.relative_to(ROOT).as_posix()] = called & set(names)
    return found


def test_there_is_one_training_step():
    """Backward and an optimizer's step after it: nobody writes the two again."""
    both = {file for file, names in calls_by_file("backward", "step").items() if names == {"backward", "step"}}
    assert both == {"train/step.py"}


def test_there_is_one_llama_builder():
    assert set(calls_by_file("LlamaConfig")) == {"models.py"}


def test_there_is_one_config_world():
    """No class but a recipe's sections, and what they are made of, has many of a recipe's keys as its fields."""
    keys = {key for section in every_key().values() for key in section}
    owners = {"config.py", "recipe/sections.py", "recipe/loading.py", "recipe/shorthands.py"}
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef) and path.relative_to(ROOT).as_posix() not in owners:
                fields = {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}  # type: ignore[union-attr]
                assert len(fields & keys) < 5, f"{path}: {node.name} has {sorted(fields & keys)}"


def test_messages_and_docstrings_name_what_there_is():
    """``poetx.name(`` in a text is a public name, a module or something in one."""
    for path in sorted(ROOT.rglob("*.py")):
        for dotted in re.findall(r"poetx\.([a-z_][\w.]*)\(", path.read_text(encoding="utf-8")):
            found = poetx
            for part in dotted.split("."):
                with contextlib.suppress(ImportError):
                    importlib.import_module(f"{getattr(found, '__name__', '')}.{part}")
                assert hasattr(found, part), f"{path.relative_to(ROOT)}: poetx.{dotted}"
                found = getattr(found, part)
