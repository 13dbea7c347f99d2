"""One way to read a picture; and albums, photos that belong to no dataset."""

import csv
import glob
import io
import os
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from lib.runs import BadInput, read_lines, replacing

# Pillow's remark on images that it reads well.
warnings.filterwarnings("ignore", "Palette images with Transparency")
Image.MAX_IMAGE_PIXELS = 2**29  # it refuses twice as many, 4 GB; phones take 200 megapixels
# All that Pillow can open, but for films and scientific containers that it only recognises.
IMAGE_SUFFIXES = {
    suffix
    for suffix, kind in Image.registered_extensions().items()
    if kind in Image.OPEN and kind not in ("MPEG", "HDF5", "BUFR", "GRIB", "FITS")
}
ORIENTATION = 0x0112  # in EXIF data
_T = Image.Transpose
TURNS = {2: _T.FLIP_LEFT_RIGHT, 3: _T.ROTATE_180, 4: _T.FLIP_TOP_BOTTOM, 5: _T.TRANSPOSE}
TURNS |= {6: _T.ROTATE_270, 7: _T.TRANSVERSE, 8: _T.ROTATE_90}  # its value: what sets it right
not_turned = {}  # the names of images whose orientation could not be read


def open_photo(file, as_coop=False):
    """An image file as an RGB PIL image. Raises BadInput if its pixels cannot be read.

    as_coop: as CoOp reads it; else as `upright_rgb` makes it.
    """
    error = None
    for source in (Path, _bare_png):
        try:
            with Image.open(source(file)) as image:
                image.filename = str(file)
                return image.convert("RGB") if as_coop else upright_rgb(image)
        except Exception as caught:  # on damaged bytes Pillow may stumble in any way
            error = error or caught
    raise BadInput(f"cannot read the image {file}: {error}") from error


def _bare_png(file):
    """A PNG file with its pixels and orientation alone: Pillow gives up at other chunks that are
    damaged or very long, as texts and colour profiles are."""
    content = Path(file).read_bytes()
    if content[:4] != b"\x89PNG":
        raise ValueError("not a PNG file")
    at, kept = 8, [content[:8]]
    while at < len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")  # length, kind, data, checksum
        kind, chunk = content[at + 4 : at + 8], content[at:end]
        if kind[:1].isupper():  # PNG's way to say that nobody can do without it
            kept.append(chunk)
        elif kind == b"eXIf":
            kept += [chunk[:-4], zlib.crc32(chunk[4:-4]).to_bytes(4, "big")]
        at = end
    return io.BytesIO(b"".join(kept))


def upright_rgb(image):
    """A PIL image turned as its EXIF data says, in RGB. More than 8 bits per pixel are scaled down
    instead of cut off: 16-bit grey to its upper half, other numbers by their own range."""
    image.load()  # turns a TIFF
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # not `ImageOps.exif_transpose`: what else EXIF holds is of no concern
        turn = None
        not_turned[getattr(image, "filename", "") or "an image in memory"] = True
    if turn is not None and image.format != "TIFF":
        image = image.transpose(turn)
        image.info = {}  # or it would be turned again
    if image.mode.startswith(("I", "F")):
        pixels = np.asarray(image, dtype=np.float64)
        low, high = (0, 65535) if image.mode.startswith("I;16") else (pixels.min(), pixels.max())
        image = Image.fromarray(((pixels - low) * (255 / max(high - low, 1e-9))).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def say_what_was_not_turned():
    if not_turned:
        which = f"{len(not_turned)}, first {next(iter(not_turned))}"
        print(f"photos not turned, as their EXIF data is damaged: {which}", file=sys.stderr)
        not_turned.clear()


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
