"""A user's files: images of any mode and format, read upright in 8-bit RGB, and texts in UTF-8."""

import os
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from diffseg.errors import DiffsegError

# What a folder of images may hold; those that Pillow cannot read (HEIC, raw files, videos) are refused by name, not
# passed over.
SUFFIXES = tuple(
    ".arw .avi .avif .bmp .cr2 .dng .gif .heic .heif .jfif .jp2 .jpe .jpeg .jpg .mkv .mov .mp4 .nef .pgm .png .ppm "
    ".svg .tga .tif .tiff .webm .webp".split()
)
ORIENTATION = 0x0112  # EXIF's; 1 is upright
TURNS = dict(
    enumerate("FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split(), 2)
)


def decode(path: str | os.PathLike) -> Image.Image:
    """Return a file's image in its own mode, decoded whole; of several frames (GIF, TIFF, MPO) the first.

    Raises a DiffsegError for a file that is missing, broken, too large for Pillow, or no image that it reads.
    """
    try:
        with open(path, "rb") as file, Image.open(file) as picture:  # a mapped TIFF that is turned has sheared rows
            picture.load()
            return picture
    except FileNotFoundError:
        raise DiffsegError(f"{path} is missing; put the file there, or take its name out of the list.") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise DiffsegError(
            f"{path} is truncated or no image that can be read ({error}); give a whole JPEG or PNG file."
        ) from error


def read_picture(picture: Image.Image | str | os.PathLike, upright: bool = True) -> Image.Image:
    """Return an image, or a file's, in 8-bit RGB.

    upright: the camera's orientation (EXIF) is obeyed. Transparency shows white, and 16 bits become 8 (65535 is white).
    Raises a DiffsegError for what `decode` refuses, and for a mode whose white is not defined (32 bits, floats).
    """
    name = "the image" if isinstance(picture, Image.Image) else picture
    if not isinstance(picture, Image.Image):
        picture = decode(picture)
    deep = picture.mode.startswith("I;16") or (picture.mode, picture.format) == ("I", "PNG")  # older Pillow: I
    try:
        picture = turned_upright(picture) if upright else picture
        if deep:
            picture = Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
        if picture.mode in ("I", "F"):
            raise ValueError("no value of it is known to be white")
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")
    except ValueError as error:
        raise DiffsegError(f"{name} has the mode {picture.mode} ({error}); convert it to 8-bit RGB.") from error


def turned_upright(picture: Image.Image) -> Image.Image:
    """Return an image as its EXIF says that it is held; as it is where EXIF is damaged. (Pillow's exif_transpose writes
    the whole of EXIF anew, and fails by a damaged entry of any kind.)"""
    try:
        turn = TURNS.get(picture.getexif().get(ORIENTATION))
    except Exception:  # Pillow raises a handful of kinds
        return picture
    return picture if turn is None else picture.transpose(Image.Transpose[turn])


def picture_files(folder: Path) -> list[Path]:
    """Return the files below a folder that are named as images are, sorted by path; hidden ones are passed over.

    Raises a DiffsegError for a name that is not UTF-8.
    """
    paths = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    return sorted(path for path in paths if is_visible(path, folder))


def is_visible(path: Path, folder: Path) -> bool:
    """Return whether no part of the path below `folder` begins with a dot, as .ipynb_checkpoints does.

    Raises a DiffsegError for a visible name that is not UTF-8, because no list or table could hold it.
    """
    path = path.relative_to(folder)
    hidden = any(part.startswith(".") for part in path.parts)
    if not hidden:
        check_name(path)
    return not hidden


def check_name(path: Path) -> None:
    """Raise a DiffsegError for a path that is not UTF-8."""
    if any("\udc80" <= letter <= "\udcff" for letter in str(path)):
        raise DiffsegError(f"the file name {os.fsencode(path)!r} is not UTF-8; rename the file.")


def read_text(path: str | os.PathLike) -> str:
    """Return a UTF-8 file's text, without a byte order mark. Raises a DiffsegError for another coding."""
    try:
        return Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DiffsegError(f"{path}, line {line}, is not UTF-8 ({error.reason}); save the file as UTF-8.") from error
