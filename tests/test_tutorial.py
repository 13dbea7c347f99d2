"""docs/tutorial.ipynb prints what its committed outputs say: its code runs here without Jupyter."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CELLS = json.loads((ROOT / "docs/tutorial.ipynb").read_text())["cells"]
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
PLAYER = """
import contextlib, io, json, sys

namespace, printed = {}, []
for source in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(source, namespace)
    printed.append(out.getvalue())
json.dump(printed, sys.stdout)
"""


def is_tagged(cell, *tags):
    return not set(tags).isdisjoint(cell["metadata"].get("tags", []))


def play(cells, folder):
    """What each code cell prints. They run in one fresh process, in a docs/ beside links to the
    code, so that the repository's own out/ and the user's cache stay as they are."""
    for path in [*ROOT.glob("*.py"), ROOT / "lib", ROOT / "assets"]:
        (folder / path.name).symlink_to(path)
    (folder / "docs").mkdir()
    process = subprocess.run(
        [sys.executable, "-c", PLAYER],
        input=json.dumps(["".join(cell["source"]) for cell in cells]),
        cwd=folder / "docs",
        env=os.environ | {"XDG_CACHE_HOME": str(folder / "cache")},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def committed(cell):
    streams = [output for output in cell["outputs"] if output["output_type"] == "stream"]
    return "".join(text for stream in streams for text in stream["text"])


def tolerance(number, rest, points):
    """By how much a printed number may differ on another processor. rest: its line after it.
    points: for an accuracy."""
    unit = 10.0 ** -len(number.partition(".")[2])  # one of the last digit that is printed
    if "." not in number:
        return unit if "%" in rest else 0  # shares of prompts may differ; shapes and counts may not
    return points if rest.startswith(" %") else max(unit, 1e-3 * abs(float(number)))


def assert_alike(printed, expected, points=0.3):
    """The same words, and the same numbers within their tolerance."""
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", expected).split()
    for printed_line, line in zip(printed.splitlines(), expected.splitlines()):
        if "features from the cache" in line:
            continue
        found = NUMBER.findall(printed_line)
        for value, match in zip(found, NUMBER.finditer(line), strict=True):
            allowed = tolerance(match[0], line[match.end() :], points)
            assert abs(float(value) - float(match[0])) <= allowed * 1.001, (printed_line, line)


def test_every_cell_up_to_the_training_prints_what_is_committed(tmp_path):
    cells = [c for c in CELLS if c["cell_type"] == "code" and not is_tagged(c, "slow", "exercise")]
    for cell, printed in zip(cells, play(cells, tmp_path), strict=True):
        assert_alike(printed, committed(cell))


@pytest.mark.slow
def test_training_and_exercises_print_what_is_committed_and_what_the_folded_answers_say(tmp_path):
    cells = [cell for cell in CELLS if cell["cell_type"] == "code"]
    n_exercises = 0
    for cell, printed in zip(cells, play(cells, tmp_path), strict=True):
        expected, points = committed(cell), 0.3
        if is_tagged(cell, "exercise"):
            assert expected == ""  # or it would give the answer away
            answer = "".join(CELLS[CELLS.index(cell) + 1]["source"])
            expected = re.search(r"```text\n(.*?)```", answer, re.DOTALL)[1]
            # Without guidance or words, rounding alone has moved accuracies by up to 0.7.
            points = 1.0
            n_exercises += 1
        assert_alike(printed, expected, points)
    assert n_exercises == 6
