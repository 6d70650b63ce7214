"""Whether a compressed file unpacks to more than a bound, found without unpacking more than that."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

BLOCK = 1 << 18
BROTLI_BLOCK = 64
"""Bytes given to brotli at a time: what comes out of so few is bounded by its format, some 100 MB."""


def exceeds(path: Path, most: int) -> bool:
    """Whether the file, compressed as its suffix says, unpacks to more than `most` bytes.

    Raises what its decompressor raises where it is damaged.
    """
    size = 0
    for block in _blocks(path):
        size += len(block)
        if size > most:
            return True
    return False


def unpacked(path: Path) -> bytes:
    """The file's bytes, unpacked; for one that does not exceed a bound. Raises as `exceeds` does."""
    return b"".join(_blocks(path))


def _blocks(path: Path) -> Iterator[bytes]:
    if path.suffix == ".br":
        import brotli

        decompressor = brotli.Decompressor()
        with path.open("rb") as file:
            while piece := file.read(BROTLI_BLOCK):
                yield decompressor.process(piece)
        return
    with path.open("rb") as file:
        unpacked = _READERS[path.suffix](file) if path.suffix in _READERS else file
        while block := unpacked.read(BLOCK):
            yield block


def _zstd(file: IO[bytes]) -> IO[bytes]:
    import zstandard

    return zstandard.ZstdDecompressor().stream_reader(file)


_READERS: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zstd": _zstd,
}
