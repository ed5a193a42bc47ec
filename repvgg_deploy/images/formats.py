"""What a file is, told from its first bytes: an image that is read here, an image that is not, or something else."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError
from ..files.signatures import HEAD_BYTES, NUMPY_MAGIC, PLAN_MAGICS, ZIP_MAGICS, name_foreign

IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".mpo", ".ppm",
    ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".tga", ".avif",
})  # fmt: skip
"""Suffixes of files that are taken for images before they are opened; of all others the content is looked at."""
RAW_SUFFIXES = frozenset({
    ".arw", ".cr2", ".cr3", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".rw2", ".srw",
})  # fmt: skip
"""Photographs as the sensor saw them: most begin as a TIFF does, and hold a thumbnail that would be read instead."""
_READ = (
    b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+",
    b"\0\0\0\x0cjP  \r\n\x87\n", b"\xffO\xffQ",
)  # fmt: skip
_CONVERT = "convert it to JPEG or PNG: {how}"
_MAGICK = "magick FILE FILE.png"
_UNREAD = (
    (b"\xff\x0a", "a JPEG XL image", "djxl FILE FILE.png"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image", "djxl FILE FILE.png"),
    (b"8BPS", "a Photoshop document", _MAGICK),
    (b"%!PS", "a PostScript drawing", "gs -sDEVICE=png16m -o FILE.png FILE"),
    (b"%PDF", "a PDF document", "pdftoppm -png FILE FILE"),
    (b"\0\0\1\0", "a Windows icon", _MAGICK),
    (b"\x76\x2f\x31\x01", "an OpenEXR image", "scale it to 8 bits: only you know which value is white"),
    (b"#?RADIANCE", "a Radiance HDR image", "scale it to 8 bits: only you know which value is white"),
    (b"DDS ", "a DirectDraw texture", _MAGICK),
    (b"qoif", "a QOI image", _MAGICK),
    (b"II\xbc", "a JPEG XR image", "JxrDecApp -i FILE -o FILE.bmp"),
    (b"SIMPLE  =", "a FITS image", "scale it to 8 bits: only you know which value is white"),
    (b"FUJIFILMCCD-RAW", "a camera's raw file", "darktable-cli FILE FILE.png"),
    (b"IIRO", "a camera's raw file", "darktable-cli FILE FILE.png"),
    (b"IIU\0", "a camera's raw file", "darktable-cli FILE FILE.png"),
    (b"BPG\xfb", "a BPG image", "bpgdec -o FILE.png FILE"),
)
_TO_FILES = "write its images to files, or to an .npz: numpy.savez(file, images=…, labels=…)"
_NO_IMAGES = (
    (ZIP_MAGICS, "a zip archive", "unpack it, and give the folder"),
    (b"PAR1", "a Parquet file", _TO_FILES),
    (b"\x80", "a pickle", _TO_FILES),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", _TO_FILES),
    (NUMPY_MAGIC, "a NumPy array", _TO_FILES),
    (b"\x89PNG", "a PNG image that was copied as text, or is cut off", "copy it again, as it is (in binary mode)"),
    (PLAN_MAGICS, "a TensorRT plan", "give an image file in its place"),
)
_ISO_UNREAD = {
    **dict.fromkeys(
        (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"),
        ("a HEIC image (an iPhone's photo)", "heif-convert FILE FILE.jpg"),
    ),
    b"crx ": ("a camera's raw file", "darktable-cli FILE FILE.png"),
}
_DICOM_OFFSET = 128
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)
_PNM = re.compile(rb"P[1-6][ \t\r\n]+(#|[0-9])")


class Unread(NamedTuple):
    """What a file is that is not read here, in words with an article, and what to do about it."""

    what: str
    remedy: str
    is_image: bool


def is_read(head: bytes) -> bool:
    """Whether a file that begins so is an image of a format that is read here. Of TGA there is nothing to tell by."""
    if head.startswith(_READ):
        return head[8:10] != b"CR"  # a Canon raw file, behind the beginning of a TIFF
    if head.startswith(b"RIFF"):
        return head[8:12] == b"WEBP"
    if head.startswith(b"BM"):
        return int.from_bytes(head[14:18], "little") in _BMP_HEADERS
    if head[4:8] == b"ftyp":
        return _brands(head)[0] in (b"avif", b"avis")
    return _PNM.match(head) is not None


def name_unread(path: Path, head: bytes) -> Unread | None:
    """What a file is that is no image of a format that is read here; None where nothing is known of it.

    Args:
        path: Its suffix tells a camera's raw file, and its name stands in the remedy.
        head: Its first HEAD_BYTES, or all of a shorter one.
    """
    if path.suffix.lower() in RAW_SUFFIXES:
        return Unread("a camera's raw file", _CONVERT.format(how="darktable-cli FILE FILE.png"), True)
    if is_read(head):
        return None
    found = next(((what, how) for magic, what, how in _UNREAD if head.startswith(magic)), None)
    if found is None and head[4:8] == b"ftyp":
        found = next((_ISO_UNREAD[brand] for brand in _brands(head) if brand in _ISO_UNREAD), None)
        if found is None:
            return Unread("a video", "extract its frames: ffmpeg -i FILE frames/%06d.png", False)
    if found is None and head[_DICOM_OFFSET:].startswith(b"DICM"):
        found = ("a DICOM image", "dcmj2pnm +on FILE FILE.png")
    if found is None and b"<svg" in head:
        found = ("an SVG drawing", "rsvg-convert -o FILE.png FILE")
    if found is None and head.startswith(b"II*\0"):
        found = ("a camera's raw file", "darktable-cli FILE FILE.png")
    if found is not None:
        return Unread(found[0], _CONVERT.format(how=found[1]), True)
    if known := next((named[1:] for named in _NO_IMAGES if head.startswith(named[0])), None):
        return Unread(*known, False)
    foreign = name_foreign(path, head, "image")
    return None if foreign is None else Unread(*foreign, False)


def _brands(head: bytes) -> list[bytes]:
    """The brands of an ISO base media file, the major one first (ISO/IEC 14496-12, `ftyp`)."""
    size = min(int.from_bytes(head[:4], "big"), len(head))
    return [head[8:12], *(head[at : at + 4] for at in range(16, size - 3, 4))]


def read_head(path: Path | str) -> bytes:
    """The first HEAD_BYTES of a file, or all of a shorter one.

    Raises:
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        return file.read(HEAD_BYTES)


def read_text(path: Path, what: str, remedy: str) -> str:
    """A text file in UTF-8, or in UTF-16 with its mark; without the mark, line ends as they are.

    Args:
        path: The file.
        what: What it is read as, for messages.
        remedy: What to give in its place.

    Raises:
        InputError: It cannot be read, or is something else; the message says what.
    """
    special = name_special(path)
    if special is not None:
        raise InputError(f"{path}: is {special}, expected {what}", remedy=remedy)
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error  # without the path, which stands before it
        raise InputError(f"{path}: cannot be read as {what}: {reason}", remedy=remedy) from error
    foreign = name_unread(path, data[:HEAD_BYTES])
    if foreign is not None or is_read(data[:HEAD_BYTES]):
        found = "an image" if foreign is None else foreign.what
        raise InputError(f"{path}: is {found}, expected {what}", remedy=remedy)
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(
            f"{path}: cannot be read as {what}: line {line} is not in UTF-8 (byte 0x{data[error.start]:02x})",
            remedy=f"save it as UTF-8; {remedy}",
        ) from error


def name_special(path: Path | str) -> str | None:
    """`a pipe`, `a device`, `a socket`: what is never opened, because that could wait for ever; None for all else."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return None
    kinds = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))
    known = next((what for is_kind, what in kinds if is_kind(mode)), None)
    return known or ("a socket" if stat.S_ISSOCK(mode) else None)
