"""One way to read a picture; and albums, photos that belong to no dataset."""

import csv
import glob
import os
import sys
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lib.runs import BadInput, read_lines, replacing

# Pillow's remarks on images that it reads well.
warnings.filterwarnings("ignore", "Palette images with Transparency")
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
# All that Pillow can open, but for films and scientific containers that it only recognises.
IMAGE_SUFFIXES = {
    suffix
    for suffix, kind in Image.registered_extensions().items()
    if kind in Image.OPEN and kind not in ("MPEG", "HDF5", "BUFR", "GRIB", "FITS")
}


def open_photo(file, as_coop=False):
    """An image file as an RGB PIL image. Raises BadInput if it cannot be read.

    as_coop: as CoOp reads it; else as `upright_rgb` makes it.
    """
    try:
        with Image.open(file) as image:
            return image.convert("RGB") if as_coop else upright_rgb(image)
    except Exception as error:  # on damaged bytes Pillow may stumble in any way
        raise BadInput(f"cannot read the image {file}: {error}") from error


def upright_rgb(image):
    """A PIL image turned as its EXIF data says, in RGB. More than 8 bits per pixel are scaled down
    instead of cut off: 16-bit grey to its upper half, other numbers by their own range."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        pixels = np.asarray(image, dtype=np.float64)
        low, high = (0, 65535) if image.mode.startswith("I;16") else (pixels.min(), pixels.max())
        image = Image.fromarray(((pixels - low) * (255 / max(high - low, 1e-9))).astype(np.uint8))
    return image.convert("RGB")


# -------------------------------------------------------------------------------------- albums


def find_photos(paths):
    """The files that paths, folders (with all below them, but nothing hidden) and patterns name,
    each once. Raises BadInput for one that names nothing."""
    found = []
    for path in paths:
        if os.path.isdir(path):
            files = _photos_below(Path(path))
        else:
            files = [Path(path)] if os.path.exists(path) else map(Path, glob.glob(path))
        files = sorted(f for f in files if f.is_file())
        if not files:
            raise BadInput(f"{path} names no image")
        found += files
    return list(dict.fromkeys(found))


def _photos_below(folder):
    for path in folder.iterdir():
        if path.name[0] == ".":
            continue
        if path.is_dir() and not path.is_symlink():  # a link may lead to where it is
            yield from _photos_below(path)
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            yield path


def open_photos(files):
    """Yields (file, PIL image) of each readable photo; names the others on standard error."""
    for file in files:
        try:
            image = open_photo(file)
        except BadInput as error:
            print(error, file=sys.stderr)
            continue
        yield file, image


def read_names(names):
    """Class names: a file with one per line, or separated by commas. Raises BadInput for fewer
    than two, or for two that CLIP, which reads lower case, cannot tell apart."""
    listed = read_lines(names) if os.path.isfile(names) else names.split(",")
    listed = [name.strip() for name in listed if name.strip()]
    if len(listed) < 2 or len({name.casefold() for name in listed}) < len(listed):
        hint = "" if "," in names or os.path.isfile(names) else f", and there is no file {names!r}"
        raise BadInput(f"--names needs two class names at least, each once{hint}")
    return listed


def check_output(file, run_folder, inputs):
    """Raises BadInput for an output file that would lie in the run's folder or in no folder, or
    would replace an input."""
    if file.resolve().is_relative_to(Path(run_folder).resolve()):
        raise BadInput(f"{file} would lie in the run's own folder: name another place")
    if file.is_dir() or not os.access(file.absolute().parent, os.W_OK):
        raise BadInput(f"cannot write {file}")
    if file.resolve() in {Path(path).resolve() for path in inputs}:
        raise BadInput(f"{file} would replace a file that is needed: name another")


def write_csv(file, rows, templates):
    """One line per photo: its path, its best classes with probabilities, every prompt's weight.

    rows: (path, [(class name, probability), ...], weights) of each photo.
    """
    heads = [f"{what} {i + 1}" for i in range(len(rows[0][1])) for what in ("class", "probability")]
    with (
        replacing(file) as scratch,
        open(scratch, "w", newline="", encoding="utf-8", errors="surrogateescape") as out,
    ):
        table = csv.writer(out)
        table.writerow(["image", *heads, *templates])
        for photo, answers, weights in rows:
            cells = [cell for name, x in answers for cell in (name, f"{x:.6f}")]
            table.writerow([photo, *cells, *(f"{w:.6f}" for w in weights)])
