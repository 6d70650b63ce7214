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
from dataclasses import replace
from typing import Any

from emsr import start
from pipeline.base.command import guarded
from pipeline.base.errors import UserError
from pipeline.config import urls
from pipeline.config import volume as volume_yaml
from pipeline.viewer.file_server import HOST, serving
from pipeline.viewer.layers import Scene, open_scene
from pipeline.viewer.state import public_link


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 0, also after Ctrl-C; 2 for a mistake of the user's; 1 for other errors."""
    parser = argparse.ArgumentParser(
        prog=start.program("view"), description="Look at a volume and its super-resolved target in Neuroglancer."
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
        scene = open_scene(volume_yaml.load(volume), os.path.basename(volume))
        for layer in scene.layers:
            if why := layer.native.unreadable:
                print(
                    f"{layer.name}: Neuroglancer does not read {why}, so this layer stays empty there.",
                    file=sys.stderr,
                )
        if state:
            _print_state(scene)
        else:
            _show(scene, port)
    except KeyboardInterrupt:
        # Ctrl-C is the way to end the viewer.
        return 0
    return 0


def _print_state(scene: Scene) -> None:
    print(json.dumps(scene.state(), indent=2), flush=True)
    if getattr(sys.stdout, "dropped", 0):
        raise UserError("the state could not be written to standard output", "a place that takes it", "Try another one")
    local = [layer.name for layer in scene.layers if urls.local_path(layer.url)]
    if local:
        names = ", ".join(local)
        print(
            f"{names}: on this computer, which Neuroglancer reaches through a web server only. "
            "Leave out --state to have them served.",
            file=sys.stderr,
        )


def _show(scene: Scene, port: int) -> None:
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
