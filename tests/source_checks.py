"""Tests of sources open volumes with this, change their metadata and look at refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from source_volumes import VOXEL_NM, Written

from pipeline.base.errors import SourceError
from pipeline.config.volume import SourceConfig
from pipeline.storage.sources.open import open_source
from pipeline.storage.volume import Source


def opened(volume: Written | Path, **config: Any) -> Source:
    """This opens a volume, with a stated voxel size where its format has no place for one."""
    if isinstance(volume, Written):
        if not volume.has_voxel_size:
            config.setdefault("voxel_size_nm", VOXEL_NM)
        volume = volume.path
    return open_source(SourceConfig(url=str(volume), **config))


def refusal(volume: Written | Path | str, **config: Any) -> str:
    with pytest.raises(SourceError) as caught:
        opened(volume if isinstance(volume, Written) else Path(volume), **config)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    values = json.loads(path.read_text())
    path.write_text(json.dumps(change(values) or values))


def at(entry: dict[str, Any], **changes: Any) -> None:
    entry.update(changes)
