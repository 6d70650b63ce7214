"""Faults of many kinds leave the bytes of an undisturbed run and a closed ledger (laws 1 and 3).

tests/fault_harness.py does more of them.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from fault_scene import Scene, undisturbed
from faults import FAULTS, do, lacks

QUICK = ("kill-client", "slab-hangs", "full-disk", "shard-swapped", "unreadable-lock", "metadata-rots", "web-fails")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return (folder, *undisturbed(folder, None))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in FAULTS]
)
def test_nothing_is_lost(name: str, base: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    if reason := lacks(name):
        pytest.skip(reason)
    folder, source, keys = base
    do(name, Scene(tmp_path, source, keys, folder, random.Random(1)))
