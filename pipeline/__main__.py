"""`emsr COMMAND ...` and `python -m pipeline COMMAND ...`: the same mains as `python -m pipeline.COMMAND`."""

from __future__ import annotations

import importlib
import sys

from pipeline import __version__
from pipeline.base.output import protected

COMMANDS = {
    "run": "super-resolve a volume, or resume",
    "status": "what the ledger says",
    "verify": "read the target again and compare",
    "view": "look at it in Neuroglancer",
    "convert": "TIFF or PNG sections into OME-Zarr",
    "train": "train one stage of the network on your volume",
    "evaluate": "score volumes against ground truth",
    "doctor": "check what this machine computes, and how fast",
}


def main(argv: list[str] | None = None) -> int:
    args = sys.argv[1:] if argv is None else argv
    if args == ["--version"]:
        with protected():
            print(f"emsr {__version__}")
        return 0
    if not args or args[0] not in COMMANDS:
        lines = "\n".join(f"  {name:<9} {what}" for name, what in COMMANDS.items())
        wanted_help = not args or args[0] in ("-h", "--help")
        with protected():
            print(
                ("" if wanted_help else f"emsr: no command {args[0]!r}\n") + f"usage: emsr COMMAND ...\n{lines}",
                file=sys.stdout if wanted_help else sys.stderr,
            )
        return 0 if wanted_help else 2
    return int(importlib.import_module(f"pipeline.{args[0]}").main(args[1:]))


if __name__ == "__main__":
    sys.exit(main())
