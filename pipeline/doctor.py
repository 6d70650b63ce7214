"""`emsr doctor [volume.yaml]`: whether this machine computes what it should, and how fast."""

from __future__ import annotations

import argparse
import json
import sys
import time

from emsr import start
from pipeline.base.command import guarded
from pipeline.config import volume as configuration
from pipeline.config.volume import Config


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=start.program("doctor"),
        description="Check what this machine's devices compute, and how fast. Starts no cluster.",
    )
    parser.add_argument("volume", nargs="?", help="path of volume.yaml: its network is timed")
    parser.add_argument("--json", action="store_true", help="print the finding as JSON")
    args = parser.parse_args(argv)
    return guarded(
        lambda: doctor(None if args.volume is None else configuration.load(args.volume), args.json), prints=True
    )


def doctor(config: Config | None = None, as_json: bool = False) -> int:
    """Exit code 0 where every device computes what it should, 1 where one does not. Raises UserError."""
    began = time.monotonic()

    def say(what: str) -> None:
        print(f"emsr: {time.monotonic() - began:3.0f} s, {what}", file=sys.stderr, flush=True)

    say("loading torch")
    from pipeline.selftest.diagnose import diagnose
    from pipeline.selftest.page import print_page

    found = diagnose(config, say)
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        print_page(found)
    return 0 if found.ok else 1


if __name__ == "__main__":
    sys.exit(main())
