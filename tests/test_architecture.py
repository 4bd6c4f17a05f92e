"""The rooms: an import goes down, or to the left within a row."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "heterolora_kernels"

ROWS = [
    ["_env", "_version", "undo", "disk"],
    ["ops.ledger", "ops.rng", "ops.composite", "ops.rules", "ops.schema", "ops.autograd", "config", "names", "folders", "files"],
    ["backends", "backends.reference", "backends.cpu", "backends.triton.plan", "backends.triton.configs",
     "backends.triton.device", "backends.triton.forward", "backends.triton.backward", "backends.triton.finalize",
     "backends.triton.launch", "backends.triton.group", "backends.triton", "backends.triton.builds"],
    ["functional"],
    ["instances", "running", "grouping", "packing", "sites", "layers", "wrapped", "proxies", "allocation", "matching",
     "checkpoint"],
    ["distributed", "freezing", "structure", "heads", "beside", "bases", "leftovers", "reach", "state", "trials", "planning",
     "peft_fields", "peft_names", "peft_tasks", "peft_format", "peft_layers", "patching", "merging"],
    ["history", "plotting", "scoring", "synflow", "alpha_test", "search_state", "search", "shortcut_effect",
     "saved_files", "fingerprint", "native_format", "save_and_load"],
    ["callback"],
    ["cli.options", "cli.data", "cli.plot", "cli.run_folder", "cli.demo", "cli.train", "cli.search", "cli.info", "cli.export",
     "cli.bench", "cli.compile", "cli", "", "__main__"],
]
PLACE = {name: (level, column) for level, row in enumerate(ROWS) for column, name in enumerate(row)}


def _modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = _modules()


def _imports(name: str) -> set[str]:
    """Modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # `from package import module` is about the module, not about the package's own names.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            targets = [name if name.removeprefix("heterolora_kernels.") in MODULES else node.module for name in names]
        else:
            continue
        for target in targets:
            own = target.removeprefix("heterolora_kernels").lstrip(".")
            if target.startswith("heterolora_kernels") and own in MODULES and own:
                found.add(own)
    return found - {"ops"}


@pytest.mark.parametrize("name", [name for name in MODULES if name != "ops"], ids=lambda name: name or "__init__")
def test_imports_go_down_or_left(name):
    assert name in PLACE, f"{name or '__init__'} has no room"
    level, column = PLACE[name]
    for imported in _imports(name):
        other_level, other_column = PLACE[imported]
        assert (other_level, other_column) < (level, column), f"{name} imports {imported}"


@pytest.mark.parametrize("name", list(MODULES), ids=lambda name: name or "__init__")
def test_files_stay_small(name):
    assert len(MODULES[name].read_text().splitlines()) <= 550


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith("cli")], ids=lambda name: name or "__init__")
def test_no_assert_and_no_stray_print(name):
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        assert not isinstance(node, ast.Assert), f"{name}:{node.lineno} asserts"
        is_print = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        # print_trainable_parameters is what its name says.
        assert not is_print or name == "patching", f"{name}:{node.lineno} prints"
