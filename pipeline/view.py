"""`python -m pipeline.view volume.yaml`: source and target as coinciding layers in Neuroglancer."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from pipeline.base.command import guarded
from pipeline.base.errors import SourceError, TargetError, UserError
from pipeline.base.geometry import ZYX
from pipeline.config import urls
from pipeline.config import volume as volume_yaml
from pipeline.config.volume import Config
from pipeline.prepare import recorded
from pipeline.storage.kv import Store
from pipeline.storage.ledger import QUARANTINED
from pipeline.storage.sources.open import open_source
from pipeline.viewer.data_source import Native, Triple, read_native
from pipeline.viewer.file_server import HOST, serving
from pipeline.viewer.state import Layer, Mark, public_link, viewer_state

MARKED = 1000


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 0 (Ctrl-C included), 2 for a user's mistake, 1 for other errors of ours."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.view", description="Look at a volume and its super-resolved target in Neuroglancer."
    )
    parser.add_argument("volume", help="the volume.yaml of the run")
    parser.add_argument(
        "--state", action="store_true", help="print Neuroglancer's state as JSON and end; nothing is served"
    )
    parser.add_argument(
        "--port",
        type=_port,
        default=0,
        metavar="N",
        help="serve the viewer on port N and local volumes on N+1 (for ssh tunnels)",
    )
    args = parser.parse_args(argv)
    return guarded(lambda: _view(args.volume, args.state, args.port))


def _view(volume: str, state: bool, port: int) -> int:
    try:
        config = volume_yaml.load(volume)
        found = layers(config)
        scene = _Scene(found, os.path.basename(volume), quarantined(config, _sr(found)))
        for layer in found:
            if layer.native.unreadable:
                print(
                    f"{layer.name}: Neuroglancer does not read {layer.native.unreadable}, so this layer stays empty there.",
                    file=sys.stderr,
                )
        if state:
            _print_state(scene)
        else:
            _show(scene, port)
    except KeyboardInterrupt:
        # Ctrl-C is how looking ends.
        return 0
    return 0


def layers(config: Config) -> list[Layer]:
    """LR, SR and, where there is one, fidelity, from bottom to top; their URLs are those of the volumes themselves.

    Reads metadata only. Raises SourceError, or TargetError where the target is absent or was made from another volume.yaml.
    """
    source, scale = config.source, config.network.scale
    info = open_source(source).info
    lr = _native(source.url, source.mip, source.array)
    if lr is None:
        raise SourceError(f"{source.url} has no metadata that Neuroglancer reads", "OME-Zarr, Zarr, N5 or precomputed")
    first = _corner(info.corner_nm, info.bounds.start, info.voxel_size_nm)
    found = [Layer("LR", browser_url(source.url), lr, info.voxel_size_nm, first, contrast=source.intensity_window)]
    region = source.box.box if source.box else info.bounds
    corner = _corner(info.corner_nm, region.start, info.voxel_size_nm)
    z, y, x = info.voxel_size_nm
    target = config.target.url
    sr = _native(target)
    if sr is None:
        raise TargetError(
            f"{target} holds no volume yet",
            "",
            "Make it with `python -m pipeline.run` and the same volume.yaml, then view it",
        )
    _check_shape(target, sr, region.shape.lateral(scale))
    found.append(Layer("SR", browser_url(target), sr, (z, y / scale, x / scale), corner))
    fidelity = _native(f"{target}/fidelity")
    if fidelity is not None:
        _check_shape(f"{target}/fidelity", fidelity, region.shape)
        found.append(
            Layer(
                "fidelity",
                f"{browser_url(target)}/fidelity",
                fidelity,
                info.voxel_size_nm,
                corner,
                heat=True,
                visible=False,
            )
        )
    return found


def _corner(origin: Triple, voxel: ZYX, size: Triple) -> Triple:
    """Lower corner of `voxel` on the grid whose voxel (0, 0, 0) has its lower corner at `origin`; nm."""
    z, y, x = (o + i * s for o, i, s in zip(origin, voxel, size, strict=True))
    return z, y, x


def _native(url: str, level: int = 0, array: str | None = None) -> Native | None:
    kind, _ = urls.split_format(url)
    try:
        return read_native(Store(url).get, kind, level, array)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, ZeroDivisionError) as error:
        saw = f"{url} has metadata that cannot be understood ({type(error).__name__}: {error})"
        raise UserError(saw, "a whole volume", "Check that its writing ended") from None


def _check_shape(url: str, native: Native, wanted: ZYX) -> None:
    if native.shape != wanted:
        saw = f"{url} holds {native.shape} voxels, but this volume.yaml describes {wanted} (z, y, x)"
        raise TargetError(saw, "", "View it with the volume.yaml it was made from")


def browser_url(url: str) -> str:
    """The URL as Neuroglancer reads it: no format prefix; s3:// through the endpoint that the environment names, if any."""
    _, url = urls.split_format(url)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if url.startswith("s3://") and endpoint:
        return f"s3+{urlsplit(endpoint).scheme}://{urlsplit(endpoint).netloc}/{url.removeprefix('s3://')}"
    return url


def quarantined(config: Config, sr: Layer) -> list[Mark]:
    """The boxes of up to MARKED tasks that were given up, with the first line of why; empty where no ledger lies beside the target."""
    found = recorded.read(config.target.url, "view")
    if found is None:
        return []
    marks = []
    for _, index in zip(range(MARKED), found.ledger.indices(QUARANTINED), strict=False):
        box = found.plan.box(index)
        low, high = (_corner(sr.corner_nm, voxel, sr.voxel_nm) for voxel in (box.start, box.stop))
        marks.append(
            Mark(
                f"task {index}",
                low,
                high,
                f"task {index}, {found.plan.place(index)}: {found.ledger.why(index).first_line}",
            )
        )
    return marks


def _sr(found: Sequence[Layer]) -> Layer:
    return next(layer for layer in found if layer.name == "SR")


@dataclass(frozen=True)
class _Scene:
    layers: Sequence[Layer]
    title: str
    quarantined: Sequence[Mark]

    def state(self) -> dict[str, Any]:
        return viewer_state(self.layers, _sr(self.layers), self.title, self.quarantined)


def _print_state(scene: _Scene) -> None:
    print(json.dumps(scene.state(), indent=2))
    local = [layer.name for layer in scene.layers if urls.local_path(layer.url)]
    if local:
        names = ", ".join(local)
        print(
            f"{names}: on this computer, which Neuroglancer reaches through a web server only. Leave out --state to have them served.",
            file=sys.stderr,
        )


def _show(scene: _Scene, port: int) -> None:
    """Serve what is local, print the link, wait for Ctrl-C."""
    folders = {layer.name: path for layer in scene.layers if (path := urls.local_path(layer.url))}
    if not folders:
        print(f"In any Neuroglancer, if the volumes are public: {public_link(scene.state())}", flush=True)
    if importlib.util.find_spec("neuroglancer") is None:
        if not folders:
            return
        raise UserError(
            "the neuroglancer package is not installed",
            "it holds the viewer",
            "pip install 'emsr[view]', or use --state",
        )
    with contextlib.ExitStack() as stack:
        bases = stack.enter_context(serving(folders, port + 1 if port else 0)) if folders else {}
        served = replace(scene, layers=[replace(layer, url=bases.get(layer.name, layer.url)) for layer in scene.layers])
        link = stack.enter_context(_neuroglancer(served.state(), port))
        print(f"Neuroglancer: {link}\nCtrl-C ends it.", flush=True)
        threading.Event().wait()


@contextlib.contextmanager
def _neuroglancer(state: dict[str, Any], port: int) -> Iterator[str]:
    """Neuroglancer's own client, served on this machine until the block ends; yields the link."""
    import neuroglancer  # an optional extra

    neuroglancer.set_server_bind_address(HOST, port)
    try:
        viewer = neuroglancer.Viewer()
    except OSError as error:
        raise UserError(
            f"port {port} on {HOST} cannot be opened ({error.strerror})",
            "a free port",
            "Give another --port, or leave it out",
        ) from None
    try:
        viewer.set_state(neuroglancer.ViewerState(state))
        yield viewer.get_viewer_url()
    finally:
        neuroglancer.stop()


def _port(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 65534):
        raise argparse.ArgumentTypeError(f"saw {text!r}, wanted a number from 1 to 65534")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
