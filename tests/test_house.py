"""The order of the house: which file may import which, and what each of them waits for."""

import ast
import subprocess
import sys

import pytest
from conftest import HERE

ROOT = HERE.parent
SCRIPTS = {"prompts", "router", "losses", "data", "train", "eval"}
FILES = [
    *ROOT.glob("*.py"),
    *(f for of in ("lib", "tools", "forks") for f in ROOT.glob(f"{of}/*.py")),
]


def imports(file):
    """Everything that a file imports, wherever in the file it does; `from a import b` may be both
    a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


IMPORTS = {".".join(f.relative_to(ROOT).with_suffix("").parts): imports(f) for f in FILES}
OURS = {name: found & IMPORTS.keys() - {name} for name, found in IMPORTS.items()}


def test_lib_imports_no_script_and_only_tests_import_tools_and_forks():
    assert OURS.keys() >= SCRIPTS
    for name, others in OURS.items():
        assert not name.startswith("lib.") or not others & SCRIPTS, name
        for apart in ("tools", "forks"):
            assert name.startswith(apart) or not any(o.startswith(apart) for o in others), name


@pytest.mark.parametrize("name", ["prompts", "router", "losses"])
def test_the_method_imports_torch_and_clip_alone(name):
    outside = {other.split(".")[0] for other in IMPORTS[name]} - sys.stdlib_module_names
    assert outside <= {"torch", "clip", "prompts", "router", "losses"}


def test_train_starts_without_what_takes_long_to_import():
    slow = "{'matplotlib', 'torchvision', 'clip'}"
    command = [sys.executable, "-c", f"import sys, train; print({slow} & sys.modules.keys())"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
