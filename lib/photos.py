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
    """The files that paths, folders (with all below them) and patterns name, each once.

    Raises BadInput for one that names nothing.
    """
    found = []
    for path in paths:
        if os.path.isdir(path):
            files = [f for f in Path(path).rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES]
        else:
            files = [Path(path)] if os.path.exists(path) else map(Path, glob.glob(path))
        files = sorted(f for f in files if f.is_file())
        if not files:
            raise BadInput(f"{path} names no image")
        found += files
    return list(dict.fromkeys(found))


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
    than two."""
    names = read_lines(names) if os.path.isfile(names) else names.split(",")
    names = [name.strip() for name in names if name.strip()]
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise BadInput("--names needs two class names at least, each once")
    return names


def check_outside(folder, *files):
    """Raises BadInput for a file that would lie in a run's folder, or in a folder that is not
    there. files: paths or None."""
    for file in filter(None, files):
        if file.resolve().is_relative_to(Path(folder).resolve()):
            raise BadInput(f"{file} would lie in the run's own folder: name another place")
        if not file.absolute().parent.is_dir():
            raise BadInput(f"there is no folder for {file}")


def write_csv(file, rows, templates):
    """One line per photo: its path, its best classes with probabilities, every prompt's weight.

    rows: (path, [(class name, probability), ...], weights, ...) of each photo.
    """
    heads = [f"{what} {i + 1}" for i in range(len(rows[0][1])) for what in ("class", "probability")]
    with replacing(file) as scratch, open(scratch, "w", newline="", encoding="utf-8") as out:
        table = csv.writer(out)
        table.writerow(["image", *heads, *templates])
        for photo, answers, weights, *_ in rows:
            cells = [cell for name, x in answers for cell in (name, f"{x:.6f}")]
            table.writerow([photo, *cells, *(f"{w:.6f}" for w in weights)])
