"""Reads image files, and finds them in folders."""

import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lib.errors import BadInput, out_of_memory
from lib.files import existing

# The formats of pictures, by Pillow's names. Others are icons, containers, and documents such as
# EPS, for which Pillow starts a program. It reads HEIF only with a plugin.
FORMATS = "JPEG", "MPO", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "AVIF", "JPEG2000", "HEIF"
Image.init()  # registers all formats
Image._MAPMODES = ()  # Pillow would map files, and for that open an image again by its name
Image.MAX_IMAGE_PIXELS = 2**28  # Pillow refuses twice as many, 2 GB; phones take 200 megapixels
# Pillow warns about these images, but reads them correctly.
warnings.filterwarnings("ignore", "Palette images with Transparency|Image size")
NO_DATA = -9999, -32768  # values that often mark a missing pixel


def open_photo(photo, as_coop=False):
    """An image file as an RGB PIL image; or a PIL image or an array (H, W, 3) of uint8. Raises
    BadInput if its pixels cannot be read, and TypeError for anything else.

    as_coop: convert it as CoOp does; otherwise `upright_rgb` converts it.
    """
    if isinstance(photo, np.ndarray) and photo.dtype == np.uint8 and photo.shape[2:] == (3,):
        photo = Image.fromarray(photo)
    if not isinstance(photo, (Image.Image, str, os.PathLike)):
        raise TypeError(f"not a path, PIL image or array (H, W, 3) of uint8: {type(photo)}")
    try:
        if isinstance(photo, Image.Image):
            return upright_rgb(photo)
        with Image.open(existing(photo), formats=list(filter(Image.OPEN.get, FORMATS))) as image:
            return image.convert("RGB") if as_coop else upright_rgb(image)
    except Exception as error:  # Pillow may raise anything on damaged bytes
        if out_of_memory(error):
            raise
        raise BadInput(f"cannot read the image {photo}: {error}") from error


def upright_rgb(image):
    """A PIL image in RGB, rotated according to its EXIF data, if that is readable. What is
    transparent becomes white. Pixels of more than 8 bits are scaled down instead of clipped: 16-bit
    grey by its full range, 12 bits stored in 16 by theirs, other types by the range of the image's
    values. NaN, infinities and missing pixels become black."""
    image.load()  # errors in the pixels are raised, those in the EXIF data are not
    try:
        image = ImageOps.exif_transpose(image)
    except Exception as error:
        if out_of_memory(error):
            raise
    if not min(image.size):
        raise ValueError("it has no pixels")
    if image.mode.startswith(("I", "F")):
        pixels = np.asarray(image, dtype=np.float64)
        known = np.isfinite(pixels) & (abs(pixels) < 1e30) & ~np.isin(pixels, NO_DATA)
        if not known.any():
            raise ValueError("none of its pixels is a number")
        low, high = pixels[known].min(), pixels[known].max()
        if image.mode.startswith("I;16"):
            low, high = 0, 4095 if high < 4096 else 65535
        scaled = (np.where(known, pixels, low) - low) * (255 / max(high - low, 1e-9))
        image = Image.fromarray(scaled.astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


# ------------------------------------------------------------------------------ finding pictures


# Folders of file servers and systems, often unreadable.
SYSTEM = "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"


def is_image(path):
    """Whether a path from `files_below` has the suffix of an image and no folder that starts with
    an underscore."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    return kind in FORMATS and "/_" not in f"/{os.path.dirname(path)}"


def files_below(folder, above=()):
    """Yields the paths of all files below a folder, relative to it and in sorted order, without
    hidden ones. Links to folders are followed; circular ones count as files, like dead links and
    the folders of a system."""
    above = (*above, os.path.realpath(folder))
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name[0] == ".":
            continue
        is_folder = os.path.isdir(entry) if entry.is_symlink() else entry.is_dir()
        if is_folder and entry.name.lower() not in SYSTEM and os.path.realpath(entry) not in above:
            yield from (f"{entry.name}/{file}" for file in files_below(entry.path, above))
        else:
            yield entry.name
