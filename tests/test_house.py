"""The order of the house: which file may import which, and what each of them waits for."""

import ast
import os
import shutil
import subprocess
import sys

import pytest
from conftest import HERE

ROOT = HERE.parent
SCRIPTS = {"prompts", "router", "losses", "data", "train", "eval"}
FILES = [*ROOT.glob("*.py"), *ROOT.glob("lib/*.py"), *ROOT.glob("tools/*.py")]


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


def run_alone(*words, folder):
    """What a Python of its own prints, which finds no other modules than those in the folder."""
    command, environment = [sys.executable, *words], {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_lib_imports_no_script_and_only_tests_import_tools():
    assert OURS.keys() >= SCRIPTS
    for name, others in OURS.items():
        assert not name.startswith("lib.") or not others & SCRIPTS, name
        assert name.startswith("tools.") or not any(o.startswith("tools.") for o in others), name


@pytest.mark.parametrize("name", ["prompts", "router", "losses"])
def test_the_method_imports_torch_and_clip_alone(name):
    outside = {other.split(".")[0] for other in IMPORTS[name]} - sys.stdlib_module_names
    assert outside <= {"torch", "clip", "prompts", "router", "losses"}


def test_the_method_can_be_taken_along(tmp_path):
    for file in ("prompts.py", "router.py", "losses.py", "tests/alone.py"):
        shutil.copy(ROOT / file, tmp_path)
    lines = [line.split() for line in run_alone("alone.py", folder=tmp_path)]
    (image, gate, text), (last_image, last_gate, last_text) = (
        map(float, line[1::2]) for line in (lines[0], lines[-1])
    )
    assert last_image < 0.7 * image and last_gate < 0.97 * gate and last_text < 0.9 * text


def test_train_starts_without_what_takes_long_to_import():
    slow = "{'matplotlib', 'torchvision', 'clip'}"
    said = run_alone("-c", f"import sys, train; print({slow} & sys.modules.keys())", folder=ROOT)
    assert said == ["set()"]
