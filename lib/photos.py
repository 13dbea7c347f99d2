"""Photos that belong to no dataset: finding and opening them, and a table of what is on them."""

import csv
import glob
import os
import sys
from pathlib import Path

from lib.errors import BadInput
from lib.files import read_lines, replacing
from lib.readers import IMAGE_SUFFIXES, open_photo

AT_ONCE = 32  # photos in memory


def find_photos(paths):
    """The files that paths, folders (with all below them, but nothing hidden) and patterns name,
    each once. Raises BadInput for one that names nothing, and for a folder that cannot be read."""
    found = []
    for path in paths:
        if os.path.isdir(path):
            files = _photos_below(path)
        else:
            files = [Path(path)] if os.path.exists(path) else map(Path, glob.glob(path))
        files = sorted(f for f in files if f.is_file())
        if not files:
            raise BadInput(f"{path} names no image")
        found += files
    return list(dict.fromkeys(found))


def _photos_below(folder):
    def refuse(error):
        raise BadInput(f"cannot read the folder {error.filename}: {error.strerror}")

    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if name[0] != "."]
        for name in files:
            if name[0] != "." and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                yield Path(parent, name)


def open_photos(files):
    """Yields (files, PIL images) of some readable photos at a time, turned as their EXIF data says;
    names the others on standard error."""
    for start in range(0, len(files), AT_ONCE):
        photos = {}
        for file in files[start : start + AT_ONCE]:
            try:
                photos[file] = open_photo(file)
            except BadInput as error:
                print(error, file=sys.stderr)
        if photos:
            yield list(photos), list(photos.values())


def read_names(names):
    """Class names: a file with one per line, or separated by commas. Raises BadInput for fewer
    than two, or for two that CLIP, which reads lower case, cannot tell apart."""
    listed = read_lines(names) if os.path.isfile(names) else names.split(",")
    listed = [name.strip() for name in listed if name.strip()]
    if len(listed) < 2 or len({name.casefold() for name in listed}) < len(listed):
        hint = "" if "," in names or os.path.isfile(names) else f", and there is no file {names!r}"
        raise BadInput(f"--names needs two class names at least, each once{hint}")
    return listed


def check_outputs(folder, inputs, *outputs):
    """Raises BadInput for an output that would lie in the run's folder, in no folder, or in the
    place of an input or another output. outputs: paths or None."""
    taken = {Path(path).resolve() for path in inputs}
    for file in (file for file in outputs if file is not None):
        if file.resolve().is_relative_to(Path(folder).resolve()):
            raise BadInput(f"{file} would lie in the run's own folder: name another place")
        if file.is_dir() or not os.access(file.absolute().parent, os.W_OK):
            raise BadInput(f"cannot write {file}")
        if file.resolve() in taken:
            raise BadInput(f"{file} would replace a file that is needed: name another")
        taken.add(file.resolve())


def write_csv(file, rows, templates):
    """One line per photo: its path, its best classes with probabilities, every prompt's weight.

    rows: (path, [(class name, probability), ...], weights, ...) of each photo.
    """
    heads = [f"{what} {i + 1}" for i in range(len(rows[0][1])) for what in ("class", "probability")]
    with (
        replacing(file) as scratch,
        open(scratch, "w", newline="", encoding="utf-8", errors="surrogateescape") as out,
    ):
        table = csv.writer(out)
        table.writerow(["image", *heads, *templates])
        for photo, answers, weights, *_ in rows:
            cells = [cell for name, x in answers for cell in (name, f"{x:.6f}")]
            table.writerow([photo, *cells, *(f"{w:.6f}" for w in weights)])
