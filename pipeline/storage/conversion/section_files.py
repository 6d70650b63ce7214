"""Stacks of sections in image files: a multi-page TIFF, or a folder with one TIFF or PNG file per section."""

from __future__ import annotations

import logging
import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

from pipeline.base.errors import SourceError, UserError
from pipeline.base.geometry import ZYX
from pipeline.base.waits import waiting
from pipeline.storage import kv

Section = NDArray[np.uint8] | NDArray[np.uint16]

_SUFFIXES = {".tif": "TIFF", ".tiff": "TIFF", ".png": "PNG"}
_DTYPES = ("uint8", "uint16")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_COLOURS = {2: "RGB colour", 3: "a colour palette", 4: "grey with transparency", 6: "RGB colour with transparency"}
_LOST = re.compile(r"invalid page offset|corrupt|failed to|incomplete", re.IGNORECASE)


@dataclass(frozen=True)
class Stack:
    """Sections in z order. `read(z)` returns one as (y, x) in `dtype` and may be called from several threads.

    `shape` is (sections, rows, columns). `names` are the file name, or page of a file, of each section; `remarks` are
    notes to print for the user.
    """

    shape: ZYX
    dtype: str
    names: tuple[str, ...]
    read: Callable[[int], Section]
    remarks: tuple[str, ...] = ()

    @classmethod
    def of(cls, volume: Section) -> Stack:
        """A stack of an array (z, y, x) in memory.

        Raises SourceError where it is not of three axes, or not uint8 or uint16.
        """
        if volume.ndim != 3 or volume.size == 0:
            raise SourceError(f"an array of shape {volume.shape}", "sections as (z, y, x), none of them empty")
        _check_dtype("array", volume.dtype)
        names = tuple(f"section {z}" for z in range(len(volume)))
        return cls(
            ZYX.of(volume.shape),
            volume.dtype.name,
            names,
            lambda z: volume[z].astype(volume.dtype.newbyteorder("="), copy=False),
        )


def open_stack(path: str | Path) -> Stack:
    """The stack in a TIFF file or a folder. All headers are read and compared here, voxels only by `Stack.read`.

    Raises SourceError where nothing is there, where files differ in shape or type, are not grey of uint8 or uint16, or
    cannot be read.
    """
    path = Path(os.path.expanduser(path))
    with waiting(str(path)):
        is_folder, exists = os.path.isdir(path), os.path.exists(path)
    if is_folder:
        return _open_folder(path)
    if not exists:
        raise SourceError(f"{path} is not there", "a multi-page TIFF file, or a folder of TIFF or PNG sections")
    kind = _SUFFIXES.get(path.suffix.lower())
    if kind == "PNG":
        raise SourceError(
            f"{path} is a single PNG image",
            "a volume",
            "Put the sections into a folder, one file each, and give the folder",
        )
    if kind is None:
        raise SourceError(
            f"{path} is not a TIFF file by its name",
            "a .tif or .tiff file, or a folder of .tif, .tiff or .png sections",
        )
    _, pages = _open_tiff(path)
    names = tuple(f"{path.name} page {i}" for i in range(len(pages)))
    return _stack([p.header for p in pages], names, lambda z: pages[z].read())


def natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key by which `s2` comes before `s10`; names that differ only in leading zeros keep a fixed order."""
    parts = re.split(r"(\d+)", name.lower())
    return [(1, int(part), "") if i % 2 else (0, 0, part) for i, part in enumerate(parts)], name


@dataclass(frozen=True)
class _Header:
    height: int
    width: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.height} x {self.width} {self.dtype}"


@dataclass(frozen=True)
class _Page:
    """One section of a TIFF file; `read` returns its voxels (y, x)."""

    header: _Header
    read: Callable[[], Section]


def _stack(
    headers: Sequence[_Header], names: tuple[str, ...], read: Callable[[int], Section], remarks: tuple[str, ...] = ()
) -> Stack:
    first = headers[0]
    for name, header in zip(names, headers, strict=True):
        if header != first:
            raise SourceError(
                f"{name} is {header}, {names[0]} is {first} (rows x columns)",
                "sections of one shape and one type",
                "Remove or convert it",
            )
    return Stack(ZYX(len(headers), first.height, first.width), first.dtype, names, read, remarks)


def _open_folder(folder: Path) -> Stack:
    with _reading(folder):
        entries = [p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")]
    files = sorted((p for p in entries if p.suffix.lower() in _SUFFIXES), key=lambda p: natural_key(p.name))
    kinds = sorted({_SUFFIXES[p.suffix.lower()] for p in files})
    if not files:
        raise SourceError(
            f"{folder} holds no sections ({len(entries)} files, none ends in .tif, .tiff or .png)",
            "one TIFF or PNG file per section",
        )
    if len(kinds) > 1:
        raise SourceError(f"{folder} holds both TIFF and PNG files", "sections of one kind", "Move one kind elsewhere")
    remarks = []
    if len(entries) > len(files):
        remarks.append(f"{len(entries) - len(files)} other files in the folder are ignored")
    if gaps := _gaps([p.name for p in files]):
        remarks.append(f"file numbers {gaps} are not there: sections are stored one after another, without a gap")
    if len(files) > 1 and (unnumbered := [p.name for p in files if not re.search(r"\d", p.name)]):
        shown = ", ".join(unnumbered[:3]) + (", ..." if len(unnumbered) > 3 else "")
        remarks.append(f"{len(unnumbered)} names have no number: {shown} stand in the order of the alphabet")
    if kinds == ["PNG"]:
        return _stack(
            [_png_header(p) for p in files], tuple(p.name for p in files), lambda z: _read_png(files[z]), tuple(remarks)
        )
    return _stack(
        [_tiff_header(p) for p in files], tuple(p.name for p in files), lambda z: _read_tiff(files[z]), tuple(remarks)
    )


def _gaps(names: Sequence[str]) -> str:
    """The missing numbers as text, such as `3, 7-9`, where names differ in one number only; else ""."""
    split = [re.split(r"(\d+)", name) for name in names]
    if len({len(parts) for parts in split}) != 1:
        return ""
    varying = [i for i, column in enumerate(zip(*split, strict=True)) if len(set(column)) > 1]
    if len(varying) != 1 or varying[0] % 2 == 0:
        return ""
    numbers = [int(parts[varying[0]]) for parts in split]
    runs = [(a + 1, b - 1) for a, b in pairwise(numbers) if b - a > 1]
    words = [str(a) if a == b else f"{a}-{b}" for a, b in runs[:5]]
    return ", ".join(words) + (f" and {len(runs) - 5} more" if len(runs) > 5 else "")


def _check_dtype(name: str, dtype: np.dtype[Any]) -> None:
    if dtype.name not in _DTYPES:
        raise SourceError(
            f"{name} holds {dtype.name}", "uint8 or uint16", "Rescale the grey values to one of them first"
        )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Within the block, whatever a decoder raises becomes a SourceError that names `path`."""
    try:
        kv.refuse_special(path)
        with waiting(str(path)):
            yield
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise SourceError(
            f"{path} cannot be read ({why})", "a whole, undamaged image file", "Restore it from its source"
        ) from error


def _png_header(path: Path) -> _Header:
    with _reading(path), path.open("rb") as file:
        head = file.read(26)
    if len(head) < 26 or not head.startswith(_PNG_SIGNATURE):
        raise SourceError(
            f"{path} cannot be read (no PNG header)", "a whole, undamaged image file", "Restore it from its source"
        )
    width, height, bits, colour = struct.unpack(">IIBB", head[16:26])
    if colour != 0:
        raise SourceError(
            f"{path} holds {_PNG_COLOURS.get(colour, f'PNG colour type {colour}')}",
            "grey images",
            "Convert to grey first",
        )
    if bits not in (8, 16):
        raise SourceError(f"{path} has {bits} bits per pixel", "8 or 16 bits per pixel", "Convert it first")
    return _Header(height, width, f"uint{bits}")


def _read_png(path: Path) -> Section:
    with _reading(path):
        image: Section = imagecodecs.png_decode(path.read_bytes())
    return image


def _tiff_header(path: Path) -> _Header:
    tif, pages = _open_tiff(path)
    with tif:
        if len(pages) != 1:
            raise SourceError(
                f"{path} holds {len(pages)} sections",
                "one section per file in a folder",
                "Give the file itself, or split it",
            )
        return pages[0].header


def _read_tiff(path: Path) -> Section:
    tif, pages = _open_tiff(path)
    with tif:
        return pages[0].read()


class _Warnings(logging.Handler):
    """Collects tifffile's log. It only logs that a file is cut off, and leaves out the pages beyond."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def _logged_warnings() -> Iterator[list[str]]:
    """The messages that tifffile logs within the block; they are not printed."""
    logger = logging.getLogger("tifffile")
    handler, propagate = _Warnings(), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield handler.messages
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def _open_tiff(path: Path) -> tuple[tifffile.TiffFile, list[_Page]]:
    """The open file, and every section in it. Raises SourceError where it is damaged or holds none."""
    with _reading(path), _logged_warnings() as messages:
        tif = tifffile.TiffFile(path)
        tif.filehandle.set_lock(True)
        pages = [page for series in tif.series for page in _series_pages(path, tif, series)]
    if lost := [message for message in messages if _LOST.search(message.replace(repr(tif), ""))]:
        raise SourceError(
            f"{path} is cut off or damaged ({lost[0][:200]})",
            "a whole, undamaged image file",
            "Restore it from its source",
        )
    if not pages:
        raise SourceError(f"{path} holds no images", "at least one section")
    return tif, pages


def _series_pages(path: Path, tif: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> Iterator[_Page]:
    """The sections of one series of a TIFF file. Raises SourceError where they are not whole grey images (z, y, x)."""
    axes = {axis: n for axis, n in zip(series.axes, series.shape, strict=True) if n > 1 or axis in "YX"}
    keyframe = series.keyframe
    if keyframe.photometric in (tifffile.PHOTOMETRIC.PALETTE, tifffile.PHOTOMETRIC.RGB) or "S" in axes:
        raise SourceError(
            f"{path} holds colour images ({keyframe.photometric.name.lower()})", "grey images", "Convert to grey first"
        )
    _check_dtype(str(path), series.dtype)
    if keyframe.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
        raise SourceError(
            f"{path} stores white as 0 (MinIsWhite)",
            "black as 0",
            "Invert it first, so that the grey values mean what they show",
        )
    if "C" in axes:
        raise SourceError(
            f"{path} holds {axes['C']} channels by its metadata",
            "one channel",
            "Keep one; if these are sections, save them with axes ZYX",
        )
    if len(axes) > 3 or list(axes)[-2:] != ["Y", "X"]:
        raise SourceError(
            f"{path} has axes {series.axes} of {series.shape}", "sections (z, y, x)", "Save one stack per file"
        )
    height, width = axes["Y"], axes["X"]
    depth = int(np.prod(list(axes.values())[:-2], dtype=int))
    header = _Header(height, width, series.dtype.name)
    if series.dataoffset is not None:
        # One piece, uncompressed; ImageJ describes such stacks of over 4 GB by their first page alone.
        stored = np.dtype(tif.byteorder + series.dtype.char)
        size = height * width * stored.itemsize
        if series.dataoffset + depth * size > tif.filehandle.size:
            raise SourceError(
                f"{path} is cut off: {depth} sections of {header} do not fit it",
                "a whole file",
                "Restore it from its source",
            )
        yield from (
            _Page(header, partial(_read_plain, path, header, stored, series.dataoffset + z * size))
            for z in range(depth)
        )
        return
    pages = list(series.pages)
    if len(pages) != depth:
        raise SourceError(
            f"{path} has {len(pages)} pages for {depth} sections",
            "one page per section",
            "Save it without volumetric tiles",
        )
    for page in pages:
        if not all(page.databytecounts) or not all(page.dataoffsets):
            raise SourceError(
                f"{path} has a hole in page {page.index}: a part without data",
                "every section whole",
                "Restore it from its source",
            )
        if any(o + n > tif.filehandle.size for o, n in zip(page.dataoffsets, page.databytecounts, strict=True)):
            raise SourceError(
                f"{path} is cut off: page {page.index} ends after the file does",
                "a whole file",
                "Restore it from its source",
            )
        yield _Page(header, partial(_read_page, path, page, header))


def _read_plain(path: Path, header: _Header, stored: np.dtype[Any], offset: int) -> Section:
    """An uncompressed section, from `offset` bytes into the file, in the byte order of `stored`."""
    with _reading(path):
        voxels = np.fromfile(path, stored, header.height * header.width, offset=offset)
        return voxels.reshape(header.height, header.width).astype(header.dtype, copy=False)


def _read_page(path: Path, page: tifffile.TiffPage | tifffile.TiffFrame, header: _Header) -> Section:
    with _reading(path):
        voxels: Section = page.asarray(maxworkers=1).reshape(header.height, header.width)
    return voxels
