"""`python -m pipeline.verify` where plan.json is lost, and the metadata that name the plan too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import run_here, texture, volume_yaml, write_lr
from test_verify import SHAPE, book_of, files, finished

from pipeline import run, verify
from pipeline.config import volume as configuration
from pipeline.plan.receipt import PENDING
from pipeline.prepare.prepare import prepare


def test_damage_is_queued_also_where_the_plan_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = finished(tmp_path)
    (tmp_path / "sr.emsr" / "plan.json").unlink()
    files(tmp_path / "sr" / "0" / "c")[-1].unlink()
    assert verify.main([str(path), "--requeue"]) == 1
    assert "requeued" in capsys.readouterr().out
    book = book_of(prepare(configuration.load(path)))
    assert book.count(PENDING) == 3, "the slab, and a block of each coarser level"


def test_detected_bad_sections_outlive_a_lost_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The provenance keeps them; where that is lost too, verify says so, and does not plan without them."""
    voxels = texture(SHAPE)
    voxels[3] = 90
    write_lr(tmp_path / "lr.zarr", voxels)
    path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", source__bad_sections={"detect": True})
    run_here(path)
    kept = (tmp_path / "sr.emsr" / "plan.json").read_bytes()
    assert json.loads(kept)["spec"]["source"]["bad_sections"], "the test needs one"
    (tmp_path / "sr.emsr" / "plan.json").write_bytes(kept[:100])
    assert verify.main([str(path)]) == 1
    assert "0 damaged" in capsys.readouterr().out
    root = (tmp_path / "sr" / "zarr.json").read_bytes()
    (tmp_path / "sr" / "zarr.json").write_bytes(root[:100])
    assert verify.main([str(path)]) == 2
    assert "which sections are bad" in capsys.readouterr().err
    assert run.main([str(path)]) == 0
    assert (tmp_path / "sr.emsr" / "plan.json").read_bytes() == kept
    assert (tmp_path / "sr" / "zarr.json").read_bytes() == root
