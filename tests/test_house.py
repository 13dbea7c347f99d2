"""The order of the house: what imports what, how long a file may be, what a visitor sees first."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = {"prompts", "router", "losses", "data", "train", "eval"}
FILES = [*ROOT.glob("*.py"), *ROOT.glob("lib/*.py"), *ROOT.glob("tools/*.py")]


def module_name(file):
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


MODULES = {module_name(file): file for file in FILES}


def imports(file):
    """The modules of this project that a file imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found & MODULES.keys()


def test_the_top_level_is_the_method():
    assert {file.stem for file in ROOT.glob("*.py")} >= SCRIPTS


@pytest.mark.parametrize("name", MODULES)
def test_lib_imports_no_script_and_nobody_imports_tools(name):
    for other in imports(MODULES[name]):
        assert not other.startswith("tools") or name.startswith("tools")
        assert not (name.startswith("lib") and other in SCRIPTS)


def test_imports_have_no_circles():
    below = {name: imports(file) - {name} for name, file in MODULES.items()}
    while below:
        ready = {name for name, others in below.items() if not others}
        assert ready, f"a circle among {sorted(below)}"
        below = {name: others - ready for name, others in below.items() if name not in ready}


def test_the_method_depends_on_torch_and_little_else():
    assert imports(MODULES["router"]) == imports(MODULES["losses"]) == set()
    assert {name for name in imports(MODULES["prompts"]) if not name.startswith("lib")} == set()
    assert {name for name in imports(MODULES["data"]) if not name.startswith("lib")} == set()
