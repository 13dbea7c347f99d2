"""Reads image files, and finds the photos of albums, which belong to no dataset."""

import io
import os
import re
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from lib.errors import BadInput, out_of_memory

# Pillow warns about these images, but reads them correctly.
warnings.filterwarnings("ignore", "Palette images with Transparency")
Image.MAX_IMAGE_PIXELS = 2**29  # Pillow refuses twice as many, 4 GB; phones take 200 megapixels
# All that Pillow can open, except videos and scientific containers, which it only recognises.
IMAGE_SUFFIXES = {
    suffix
    for suffix, kind in Image.registered_extensions().items()
    if kind in Image.OPEN and kind not in ("MPEG", "HDF5", "BUFR", "GRIB", "FITS")
}
ORIENTATION = 0x0112  # in EXIF data
_T = Image.Transpose
TURNS = {2: _T.FLIP_LEFT_RIGHT, 3: _T.ROTATE_180, 4: _T.FLIP_TOP_BOTTOM, 5: _T.TRANSPOSE}
TURNS |= {6: _T.ROTATE_270, 7: _T.TRANSVERSE, 8: _T.ROTATE_90}  # {its value: what corrects it}
remarks = {}  # {what was guessed or could not be used: the images' names}


def open_photo(file, as_coop=False):
    """An image file as an RGB PIL image. Raises BadInput if its pixels cannot be read.

    as_coop: convert it as CoOp does; otherwise `upright_rgb` converts it.
    """
    error = None
    for source in (Path, _bare_png):
        try:
            with Image.open(source(file)) as image:
                image.filename = str(file)
                return image.convert("RGB") if as_coop else upright_rgb(image)
        except Exception as caught:  # Pillow may raise anything on damaged bytes
            if out_of_memory(caught):
                raise
            error = error or caught
    raise BadInput(f"cannot read the image {file}: {error}") from error


def _bare_png(file):
    """A PNG file reduced to its pixels and orientation: Pillow fails if other chunks, such as texts
    and colour profiles, are damaged or very long."""
    content = Path(file).read_bytes()
    if content[:4] != b"\x89PNG":
        raise ValueError("not a PNG file")
    at, kept = 8, [content[:8]]
    while at < len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")  # length, kind, data, checksum
        kind, chunk = content[at + 4 : at + 8], content[at:end]
        if kind[:1].isupper():  # PNG marks chunks that no reader may skip this way
            kept.append(chunk)
        elif kind == b"eXIf":
            kept += [chunk[:-4], zlib.crc32(chunk[4:-4]).to_bytes(4, "big")]
        at = end
    return io.BytesIO(b"".join(kept))


def upright_rgb(image):
    """A PIL image in RGB, rotated as its EXIF data says. Pixels of more than 8 bits are scaled down
    instead of cut off: 16-bit grey by its full range, 12 bits stored in 16 by theirs, other types
    by the range of the image's values. NaN, infinities and missing pixels become black."""
    image.load()  # rotates a TIFF
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # not `ImageOps.exif_transpose`, which also reads other EXIF data
        turn = None
        _remark(image, "photos not turned, as their EXIF data is damaged")
    if turn is not None and image.format != "TIFF":
        image = image.transpose(turn)
        image.info = {}  # or it would be rotated again
    if image.mode.startswith(("I", "F")):
        pixels = np.asarray(image, dtype=np.float64)
        known = np.isfinite(pixels) & (abs(pixels) < 1e30) & ~np.isin(pixels, _no_data(image))
        if not known.any():
            raise ValueError("none of its pixels is a number")
        low, high = pixels[known].min(), pixels[known].max()
        if image.mode.startswith("I;16"):
            low, high = 0, 4095 if high < 4096 else 65535
            if high == 4095:
                _remark(
                    image, "16-bit images read as 12 bits, as none of their pixels is above 4,095"
                )
        scaled = (np.where(known, pixels, low) - low) * (255 / max(high - low, 1e-9))
        image = Image.fromarray(scaled.astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def _no_data(image):
    """The values that mark a missing pixel: common ones, and the one in a TIFF's GDAL tag."""
    tag = str(getattr(image, "tag_v2", {}).get(42113, "")).strip(" \0")
    return [-9999, -32768, *([float(tag)] if re.fullmatch(r"[-+.\de]+", tag) else [])]


def _remark(image, what):
    name = getattr(image, "filename", "") or "an image in memory"
    remarks.setdefault(what, {})[name] = True


def say_remarks():
    """Prints what was guessed or could not be used in the images read since the last call."""
    for what, names in remarks.items():
        print(f"{what}: {len(names)}, first {next(iter(names))}", file=sys.stderr)
    remarks.clear()


# ------------------------------------------------------------------------------ finding pictures


def is_image(path):
    """Whether a path has the suffix of an image."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


def files_below(folder, above=()):
    """Yields the paths of all files below a folder, relative to it and in sorted order, without
    hidden ones. Links to folders are followed; circular ones count as files, like dead links."""
    above = (*above, os.path.realpath(folder))
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name[0] == ".":
            continue
        is_folder = os.path.isdir(entry) if entry.is_symlink() else entry.is_dir()
        if is_folder and os.path.realpath(entry) not in above:
            yield from (f"{entry.name}/{file}" for file in files_below(entry.path, above))
        else:
            yield entry.name
