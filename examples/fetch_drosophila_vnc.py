"""Gets a real ssTEM stack of a Drosophila larva's ventral nerve cord, and makes the 8 times coarser source of
drosophila-vnc.yaml.

    python examples/fetch_drosophila_vnc.py [--out DIR]

The stack is taken from $EMSR_SHARED/data/drosophila-vnc-stack1/raw.tif where that is there, else fetched section by
section from the authors' repository (14 MB; needs the package pooch). Either way its voxels are checked by their
sha256.

Data: Gerhard S, Funke J, Martel J, Cardona A, Fetter R. Segmented anisotropic ssTEM dataset of neural tissue. figshare,
2013, doi 10.6084/m9.figshare.856713. Licence CC BY-NC-SA 3.0: name the authors, not for commerce, share alike. It holds
for what is made from them too.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from make_phantom import MARK, SCALE, holds
from numpy.typing import NDArray

from models.degrade import degrade
from pipeline.base.command import guarded
from pipeline.base.errors import SourceError
from pipeline.convert import convert
from pipeline.storage.conversion.section_files import open_stack

URL = "https://raw.githubusercontent.com/unidesigner/groundtruth-drosophila-vnc/4a5f051466d24d8dc1e855ab55658bb1b1dcd6bf/stack1/raw"
SECTIONS = 20
VOXELS_SHA256 = "b845f8b459993f5ca6135daba76a4069bdddca65770f5171f4c3518765f391da"
"""Of the bytes of the uint8 array (20, 1024, 1024): the same however the sections are packed."""
LICENCE = "CC BY-NC-SA 3.0"
CREDIT = "Gerhard et al. 2013, doi 10.6084/m9.figshare.856713"
LR_VOXEL_NM = (45.0, 4.6 * SCALE, 4.6 * SCALE)
"""The authors give 45 to 50 nm for the thickness of a section."""
NAME = "drosophila-vnc-lr.zarr"


def stack_files() -> Path:
    """A multi-page TIFF or a folder of sections with the HR stack, fetched where it has to be. SourceError where it
    cannot be had.
    """
    shared = os.environ.get("EMSR_SHARED")
    near = Path(shared) / "data" / "drosophila-vnc-stack1" / "raw.tif" if shared else None
    if near and near.exists():
        return near
    try:
        import pooch
    except ImportError:
        raise SourceError(
            "the package pooch is not installed", "", "Install it (pip install pooch), or set EMSR_SHARED"
        ) from None
    folder = Path(pooch.os_cache("emsr")) / "drosophila-vnc-stack1"
    for z in range(SECTIONS):
        name = f"{z:02d}.tif"
        try:
            # No checksum here: that of all voxels is known, and is checked before anything is made of them.
            pooch.retrieve(f"{URL}/{name}", known_hash=None, fname=name, path=folder)
        except Exception as error:
            why = " ".join(str(error).split())[:200]
            raise SourceError(
                f"{URL}/{name} cannot be fetched ({why})",
                "",
                "Check the connection and run this again: what is there is kept",
            ) from error
    return folder


def read_checked(path: Path) -> NDArray[np.uint8]:
    """The HR stack in `path`, (20, 1024, 1024). SourceError where its voxels are not the known ones."""
    stack = open_stack(path)
    voxels = np.stack([stack.read(z) for z in range(stack.shape.z)])
    found = hashlib.sha256(voxels.tobytes()).hexdigest()
    if found != VOXELS_SHA256:
        raise SourceError(f"{path} holds voxels with sha256 {found}", VOXELS_SHA256, "Remove it and run this again")
    return voxels.astype(np.uint8, copy=False)


def make(out: Path) -> bool:
    """Write NAME into `out`; False where it is there already."""
    recipe = {"made_from": VOXELS_SHA256, "reduced": SCALE, "licence": LICENCE, "credit": CREDIT}
    if holds(out / NAME, recipe):
        return False
    lr = np.stack([degrade(section, SCALE) for section in read_checked(stack_files())])
    convert(
        lr, out / NAME, LR_VOXEL_NM, attributes={MARK: {**recipe, "sha256": hashlib.sha256(lr.tobytes()).hexdigest()}}
    )
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Make the source of drosophila-vnc.yaml from a real ssTEM stack. "
        "The licence of the data is CC BY-NC-SA 3.0."
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parent / "data",
        help="folder to write to (default: data beside this script)",
    )
    args = parser.parse_args(argv)
    return guarded(lambda: _report(args.out, make(args.out)))


def _report(out: Path, made: bool) -> int:
    print(
        f"{out / NAME} {'is written' if made else 'is there already, nothing to do'}. Data: {CREDIT}; licence {LICENCE}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
