"""Measures what an install costs: minutes, bytes on disk and packages, in a fresh environment without pip's cache.

python benchmarks/install.py [requirement=.]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path


def measure(requirement: str) -> dict[str, float]:
    """Minutes of wall time and GB on disk of the environment, and how many packages are in it, pip among them."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        environ = {**os.environ, "PIP_NO_CACHE_DIR": "1", "PIP_QUIET": "2"}
        began = time.monotonic()
        subprocess.run([f"{folder}/bin/python", "-m", "pip", "install", requirement], env=environ, check=True)
        minutes = (time.monotonic() - began) / 60
        files = [path.lstat() for path in Path(folder).rglob("*")]
        packages = list(Path(folder).glob("lib/python*/site-packages/*.dist-info"))
    on_disk = sum(512 * file.st_blocks for file in files)
    return {"minutes": round(minutes, 1), "gb": round(on_disk / 1e9, 2), "packages": len(packages)}


if __name__ == "__main__":
    print(measure(sys.argv[1] if len(sys.argv) > 1 else "."))
