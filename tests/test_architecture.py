"""Imports point one way, and importing does nothing."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import poetx

ROOT = Path(poetx.__file__).parent
#: Lower may not import higher.
ORDER = (
    ("errors", "lazy"),
    ("files",),
    ("config",),
    ("ops",),
    ("layers",),
    ("conversion_report", "targets"),
    ("convert",),
    ("materialize", "merge", "spectra", "distributed"),
    ("optim", "savings"),
    ("memory",),  # measuring is below the loop
    ("shorthands", "sections", "former_recipes", "recipe"),
    ("models",),
    ("methods",),
    ("data",),
    ("train",),
    ("runs", "planner"),  # planning is above the recipe and takes the loop's step
    ("bench",),
    ("cli",),
)
LEVELS = {name: level for level, names in enumerate(ORDER) for name in names}
#: Former homes that only forward, and the two that start something.
LEVELS |= {"stack": len(ORDER), "__main__": len(ORDER)}


def level(parts):
    return LEVELS[parts[0].removesuffix(".py")]


def test_imports_point_one_way():
    checked = 0
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).parts
        if parts == ("__init__.py",):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
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


def test_import_is_silent_and_leaves_torch_alone():
    code = (
        "import torch; before = torch.get_rng_state(), torch.get_default_dtype(); import poetx, sys;"
        "assert torch.equal(before[0], torch.get_rng_state()) and before[1] == torch.get_default_dtype();"
        "assert 'transformers' not in sys.modules and 'triton' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_files_stay_readable():
    for path in ROOT.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 500, f"{path} is too long to see at once"


def test_every_public_name_is_there_and_torch_is_not_imported_before_it_is_needed():
    for name in poetx.__all__:
        assert getattr(poetx, name).__name__ == name
    assert set(poetx.__all__) <= set(dir(poetx))
    code = "import sys, poetx, poetx.cli; assert 'torch' not in sys.modules; poetx.PoetConfig(); poetx.convert_"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_no_public_name_is_also_a_module_of_its_package():
    """Importing the module would replace the name: ``from poetx.planner import estimate`` would mean either."""
    for path in ROOT.rglob("__init__.py"):
        package = ".".join(("poetx", *path.parent.relative_to(ROOT).parts))
        names = getattr(importlib.import_module(package), "__all__", ())
        modules = {p.stem for p in path.parent.glob("*.py")} | {
            p.parent.name for p in path.parent.glob("*/__init__.py")
        }
        assert not modules & set(names), package
