"""The layers that `emsr view` shows, and the boxes of quarantined tasks. A new layer goes into `layers`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.base.errors import SourceError, TargetError, UserError
from pipeline.base.geometry import ZYX
from pipeline.config import urls
from pipeline.config.access import s3_endpoint
from pipeline.config.volume import Config
from pipeline.plan.receipt import QUARANTINED
from pipeline.prepare import recorded
from pipeline.storage.sources.metadata import Folder
from pipeline.storage.sources.open import open_source
from pipeline.viewer.data_source import Native, Triple, read_native
from pipeline.viewer.state import Layer, Mark, viewer_state

_NOT_SHOWN = ("float16", "float64")
"""Types that Neuroglancer lacks, of those that sources have."""
MAX_MARKS = 1000
"""Quarantined tasks that are shown."""


@dataclass(frozen=True)
class Scene:
    """What is shown: layers from bottom to top, SR among them, and boxes above them."""

    layers: Sequence[Layer]
    title: str
    quarantined: Sequence[Mark]

    def state(self) -> dict[str, Any]:
        """Neuroglancer's state, with the SR layer in focus."""
        return viewer_state(self.layers, _sr(self.layers), self.title, self.quarantined)


def open_scene(config: Config, title: str) -> Scene:
    """The layers of a run and its quarantined tasks. Raises SourceError, TargetError, LedgerError."""
    found = layers(config)
    return Scene(found, title, quarantined(config, _sr(found)))


def _sr(found: Sequence[Layer]) -> Layer:
    return next(layer for layer in found if layer.name == "SR")


def layers(config: Config) -> list[Layer]:
    """LR, SR and, where there is one, fidelity, from bottom to top, with the URLs of the volumes themselves.

    Reads metadata only. Raises SourceError, or TargetError where the target is absent or of another volume.yaml.
    """
    source, scale = config.source, config.network.scale
    info = open_source(source).info
    lr = _native(source.url, source.mip, source.array, info.zyx)
    if lr is None:
        raise SourceError(f"{source.url} has no metadata that Neuroglancer reads", "OME-Zarr, Zarr, N5 or precomputed")
    if info.dtype in _NOT_SHOWN:
        lr = replace(lr, unreadable=f"voxels of {info.dtype}")
    first = _corner(info.corner_nm, info.bounds.start, info.voxel_size_nm)
    found = [
        Layer(
            "LR",
            browser_url(source.url),
            lr,
            info.voxel_size_nm,
            first,
            contrast=source.intensity_window,
            inverted=source.invert,
        )
    ]
    region = source.box.box if source.box else info.bounds
    corner = _corner(info.corner_nm, region.start, info.voxel_size_nm)
    z, y, x = info.voxel_size_nm
    target = config.target.url
    sr = _native(target)
    if sr is None:
        raise TargetError(
            f"{target} holds no volume yet",
            "",
            "Make it with `emsr run` and the same volume.yaml, then view it",
        )
    _check_shape(target, sr, region.shape.lateral(scale))
    found.append(Layer("SR", browser_url(target), sr, (z, y / scale, x / scale), corner))
    fidelity = _native(f"{target}/fidelity")
    if fidelity is not None:
        _check_shape(f"{target}/fidelity", fidelity, region.shape)
        url = f"{browser_url(target)}/fidelity"
        found.append(Layer("fidelity", url, fidelity, info.voxel_size_nm, corner, heat=True, visible=False))
    return found


def _corner(origin: Triple, voxel: ZYX, size: Triple) -> Triple:
    """The lower corner in nm of `voxel`. `origin` is that of voxel (0, 0, 0), `size` the voxel size; both in nm."""
    z, y, x = (o + i * s for o, i, s in zip(origin, voxel, size, strict=True))
    return z, y, x


def _native(
    url: str, level: int = 0, array: str | None = None, zyx: tuple[int, int, int] | None = None
) -> Native | None:
    kind, bare = urls.split_format(url)
    folder = Folder(bare)
    try:
        native = read_native(folder.data, kind, level, array, zyx)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, ArithmeticError, RecursionError) as error:
        saw = f"{url} has metadata that cannot be understood ({type(error).__name__}: {error})"
        raise UserError(saw, "a whole volume", "Check that its writing ended") from None
    if native is None and folder.refused is not None:
        raise folder.refused
    return native


def _check_shape(url: str, native: Native, wanted: ZYX) -> None:
    if native.shape != wanted:
        saw = f"{url} holds {native.shape} voxels, but this volume.yaml describes {wanted} (z, y, x)"
        raise TargetError(saw, "", "View it with the volume.yaml it was made from")


def browser_url(url: str) -> str:
    """The URL as Neuroglancer reads it: without a format prefix, s3:// with the endpoint that the environment names."""
    _, url = urls.split_format(url)
    endpoint = s3_endpoint(url) if url.startswith("s3://") else None
    if endpoint is not None:
        return f"s3+{endpoint.rstrip('/')}/{url.removeprefix('s3://')}"
    return url


def quarantined(config: Config, sr: Layer) -> list[Mark]:
    """The boxes of up to MAX_MARKS quarantined tasks, each with the first line of the reason; `sr` is the SR layer.

    Empty where the target has no ledger. Raises LedgerError where that is damaged.
    """
    found = recorded.read(config.target.url, "view")
    if found is None:
        return []
    marks = []
    for _, index in zip(range(MAX_MARKS), found.ledger.indices(QUARANTINED), strict=False):
        box = found.plan.box(index)
        low, high = (_corner(sr.corner_nm, voxel, sr.voxel_nm) for voxel in (box.start, box.stop))
        description = f"task {index}, {found.plan.describe(index)}: {found.ledger.why(index).first_line}"
        marks.append(Mark(f"task {index}", low, high, description))
    return marks
