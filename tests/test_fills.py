"""Absent chunks: seen before a run, and given a grey value afterwards without another target (law 4)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from conftest import main_job, run_here, texture, tree, volume_yaml, write_lr
from test_inference import whole_bicubic

from pipeline import run, verify
from pipeline.base.errors import LedgerError
from pipeline.config import volume as configuration
from pipeline.config.urls import volume_name
from pipeline.prepare import fills, stored_plan
from pipeline.prepare.holes import look
from pipeline.prepare.mask_reach import reach
from pipeline.prepare.place import check_place, claim
from pipeline.prepare.prepare import prepare
from pipeline.prepare.prepared import Prepared

SHAPE = (6, 72, 64)
LATER = {"source.missing_chunks": {"fill": 9}}


def prepared(tmp_path: Path, **keys: Any) -> Prepared:
    return prepare(configuration.load(volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", **keys)))


def provenance(target: Path) -> dict[str, Any]:
    return json.loads((target / "zarr.json").read_text())["attributes"]["emsr"]


class TestStatedLater:
    def test_the_same_target_goes_on(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Run, see what is quarantined, state a fill, run again: the bytes are those of a run that began with it."""
        lr = write_lr(tmp_path / "lr.zarr", texture(SHAPE))
        (lr / "0/c/0/0/0").unlink()
        path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr")
        said = main_job(path, "run", check=False)
        assert said.returncode == 1
        assert "1 of 40 chunks are absent" in said.stderr
        assert "state source.missing_chunks: {fill: 0}, now or later" in said.stderr
        before = tree(tmp_path / "sr" / "0" / "c")
        volume_yaml(path, "lr.zarr", "sr", source__missing_chunks={"fill": 9})
        assert verify.main([str(path)]) == 1
        assert "0 of the metadata damaged" in capsys.readouterr().out, "nothing was gone on with yet"
        said = main_job(path, "run")
        assert "stated_later" in said.stderr
        voxels = texture(SHAPE)
        voxels[:4, :16, :16] = 9
        got = np.asarray(zarr.open_array(tmp_path / "sr" / "0", mode="r")).astype(int)
        assert np.abs(got - whole_bicubic(voxels, 8)).max() <= 1
        assert verify.main([str(path)]) == 0
        after = tree(tmp_path / "sr" / "0" / "c")
        assert before.items() < after.items(), "what was written stays"
        assert provenance(tmp_path / "sr")["stated_later"] == LATER
        assert provenance(tmp_path / "sr")["source"]["missing_chunks"] == "error"
        assert json.loads((tmp_path / "sr.emsr" / "report.json").read_text())["stated_later"] == LATER
        run_here(volume_yaml(tmp_path / "w.yaml", "lr.zarr", "from-the-start", source__missing_chunks={"fill": 9}))
        other, this = tree(tmp_path / "from-the-start"), tree(tmp_path / "sr")
        assert {k for k in other | this if other.get(k) != this.get(k)} == {"zarr.json"}

    @pytest.mark.parametrize("again", ["error", {"fill": 8}])
    @pytest.mark.parametrize("lost", [False, True], ids=["plan.json", "provenance"])
    def test_another_fill_is_another_plan(self, again: Any, lost: bool, tmp_path: Path) -> None:
        write_lr(tmp_path / "lr.zarr", texture(SHAPE))
        run_here(volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr"))
        claim(prepared(tmp_path, source__missing_chunks={"fill": 9}))
        if lost:
            (tmp_path / "sr.emsr/plan.json").unlink()
        assert check_place(prepared(tmp_path, source__missing_chunks={"fill": 9}))
        with pytest.raises(LedgerError):
            check_place(prepared(tmp_path, source__missing_chunks=again))

    @pytest.mark.parametrize("again", ["error", {"fill": 8}])
    def test_a_fill_of_the_beginning_stays(self, again: Any, tmp_path: Path) -> None:
        write_lr(tmp_path / "lr.zarr", texture(SHAPE))
        run_here(volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", source__missing_chunks={"fill": 9}))
        with pytest.raises(LedgerError, match="missing_chunks"):
            check_place(prepared(tmp_path, source__missing_chunks=again))

    def test_only_the_fill_may_change(self, tmp_path: Path) -> None:
        write_lr(tmp_path / "lr.zarr", texture(SHAPE))
        run_here(volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr"))
        with pytest.raises(LedgerError, match="skip_empty"):
            check_place(prepared(tmp_path, source__missing_chunks={"fill": 9}, source__skip_empty=True))

    def test_killed_between_plan_and_metadata(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """plan.json comes first: the metadata then differ from it, which verify says and the next run mends."""
        lr = write_lr(tmp_path / "lr.zarr", texture(SHAPE))
        (lr / "0/c/0/0/0").unlink()
        path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr")
        assert run.main([str(path)]) == 1
        stored_plan.write(prepared(tmp_path, source__missing_chunks={"fill": 9}))
        volume_yaml(path, "lr.zarr", "sr")
        capsys.readouterr()
        assert verify.main([str(path)]) == 2
        assert "missing_chunks.fill was 9" in capsys.readouterr().err
        volume_yaml(path, "lr.zarr", "sr", source__missing_chunks={"fill": 9})
        assert verify.main([str(path)]) == 1
        assert "zarr.json: differs from what the plan says" in capsys.readouterr().out
        assert run.main([str(path)]) == 0
        assert verify.main([str(path)]) == 0

    @pytest.mark.parametrize("change", [{"fill": 8}, "error", None])
    def test_a_changed_record_is_damage(self, change: Any, tmp_path: Path) -> None:
        write_lr(tmp_path / "lr.zarr", texture(SHAPE))
        run_here(volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr"))
        claim(prepared(tmp_path, source__missing_chunks={"fill": 9}))
        place = tmp_path / "sr.emsr/plan.json"
        body = json.loads(place.read_text())
        assert body[fills.KEY] == LATER
        place.write_text(json.dumps(body | {fills.KEY: {"source.missing_chunks": change}}))
        with pytest.raises(LedgerError, match="damaged"):
            stored_plan.read(prepared(tmp_path).store)

    def test_of_a_mask(self, tmp_path: Path) -> None:
        write_lr(tmp_path / "lr.zarr", texture(SHAPE))
        inside = np.ones((6, 18, 16), np.uint8)
        inside[4:] = 0
        mask = write_lr(tmp_path / "mask.zarr", inside, (45.0, 128.0, 128.0))
        (mask / "0/c/1/0/0").unlink()
        path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", source__mask={"url": "mask.zarr"})
        found = reach(prepare(configuration.load(path)))
        assert found is not None
        assert (found.touched, found.holes, found.unstored) == (10, 4, 0), (
            "the last two slabs of its second half lie on stored zeros"
        )
        assert "state source.mask.missing_chunks: {fill: 0}" in str(found)
        assert run.main([str(path)]) == 1
        filled = {"url": "mask.zarr", "missing_chunks": {"fill": 0}}
        assert run.main([str(volume_yaml(path, "lr.zarr", "sr", source__mask=filled))]) == 0
        assert provenance(tmp_path / "sr")["stated_later"] == {"source.mask.missing_chunks": {"fill": 0}}

    def test_of_nan(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        voxels = texture(SHAPE).astype(np.float32)
        voxels[0, 0, 0] = np.nan
        write_lr(tmp_path / "lr.zarr", voxels)
        keys = {"source__intensity_window": [0, 255]}
        path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", **keys)
        assert run.main([str(path)]) == 1
        assert "is NaN at voxel (0, 0, 0), 1 of" in capsys.readouterr().err
        assert run.main([str(volume_yaml(path, "lr.zarr", "sr", source__missing_chunks={"fill": 9}, **keys))]) == 0
        assert verify.main([str(path)]) == 0


class TestLook:
    def test_chunks_of_the_region_are_counted(self, tmp_path: Path) -> None:
        lr = write_lr(tmp_path / "lr.zarr", texture(SHAPE))
        for key in ("0/0/0", "1/4/3", "0/2/1", "1/2/1"):
            (lr / "0/c" / key).unlink()
        found = look(prepared(tmp_path))
        assert found is not None
        assert (found.absent, found.looked, found.chunks) == (4, 40, 40)
        box = {"start": [0, 32, 16], "stop": [5, 48, 40]}
        part = look(prepared(tmp_path, source__box=box))
        assert part is not None
        assert (part.absent, part.looked, part.chunks) == (2, 4, 4)
        assert look(prepared(tmp_path, source__missing_chunks={"fill": 0})) is None

    def test_none_is_absent(self, tmp_path: Path) -> None:
        write_lr(tmp_path / "lr.zarr", texture(SHAPE))
        assert str(look(prepared(tmp_path))) == "0 of 40 chunks are absent"

    def test_of_many_a_sample(self, tmp_path: Path) -> None:
        """A volume of which a tenth is stored, in one corner, as tissue in a large box is."""
        array = zarr.create_array(tmp_path / "lr.zarr", shape=(100, 200, 100), chunks=(10, 10, 10), dtype="u1")
        array[:, :20, :] = 7
        found = look(prepared(tmp_path, source__voxel_size_nm=[45, 32, 32]))
        assert found is not None
        assert (found.looked, found.chunks) == (512, 2000)
        assert 0.85 < found.absent / found.looked < 0.95

    def test_what_no_mask_touches_is_not_missed(self, tmp_path: Path) -> None:
        lr = write_lr(tmp_path / "lr.zarr", texture(SHAPE))
        inside = np.zeros(SHAPE, np.uint8)
        inside[:, :, :32] = 1
        write_lr(tmp_path / "mask.zarr", inside)
        for key in ("0/0/0", "0/0/3", "1/4/3"):
            (lr / "0/c" / key).unlink()
        found = look(prepared(tmp_path, source__mask={"url": "mask.zarr"}))
        assert found is not None
        assert found.absent == 1

    def test_what_cannot_be_read_is_left_out(self, tmp_path: Path) -> None:
        lr = write_lr(tmp_path / "lr.zarr", texture(SHAPE))
        (lr / "0/c/0/0/0").write_bytes(b"no chunk")
        (lr / "0/c/0/0/1").unlink()
        found = look(prepared(tmp_path))
        assert found is not None
        assert (found.absent, found.looked) == (1, 39)

    def test_the_proposed_fill_is_what_the_writer_left_out(self, tmp_path: Path) -> None:
        """zarr-python's own fill value through window and invert: with it, the volume reads as zarr-python reads it."""
        array = zarr.create_array(
            tmp_path / "lr.zarr", shape=SHAPE, chunks=(4, 16, 16), dtype="i2", fill_value=-32000, zarr_format=2
        )
        array[:, :16, :16] = 500
        keys = {"source__voxel_size_nm": [45, 32, 32], "source__intensity_window": [0, 1000], "source__invert": True}
        found = look(prepared(tmp_path, **keys))
        assert "state source.missing_chunks: {fill: 255}" in str(found)


class TestNames:
    @pytest.mark.parametrize(
        ("url", "name"),
        [
            ("file:///data/brain%20one.zarr", "brain one"),
            ("s3://bucket/em/sr.ome.zarr", "sr"),
            ("gs://bucket/sr-x8", "sr-x8"),
            ("file:///data/.zarr", ".zarr"),
        ],
    )
    def test_of_a_target(self, url: str, name: str) -> None:
        assert volume_name(url) == name

    def test_a_moved_target_keeps_its_name(self, tmp_path: Path) -> None:
        write_lr(tmp_path / "lr.zarr", texture(SHAPE))
        run_here(volume_yaml(tmp_path / "v.yaml", "lr.zarr", "first.zarr"))
        root = (tmp_path / "first.zarr/zarr.json").read_text()
        assert json.loads(root)["attributes"]["ome"]["multiscales"][0]["name"] == "first"
        for suffix in ("", ".emsr"):
            (tmp_path / f"first.zarr{suffix}").rename(tmp_path / f"moved.zarr{suffix}")
        path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "moved.zarr")
        assert verify.main([str(path)]) == 0
        (tmp_path / "moved.zarr.emsr/plan.json").unlink()
        assert run.main([str(path)]) == 0
        assert (tmp_path / "moved.zarr/zarr.json").read_text() == root
        assert json.loads((tmp_path / "moved.zarr.emsr/plan.json").read_text())["name"] == "first"

    def test_a_target_of_before_keeps_its_name(self, tmp_path: Path) -> None:
        """Earlier commits called every volume emsr, and plan.json said nothing of it."""
        write_lr(tmp_path / "lr.zarr", texture(SHAPE))
        path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr")
        run_here(path)
        place, root = tmp_path / "sr.emsr/plan.json", tmp_path / "sr/zarr.json"
        body = json.loads(place.read_text())
        del body["name"]
        place.write_text(json.dumps(body, indent=1))
        root.write_text(root.read_text().replace('"name": "sr"', '"name": "emsr"'))
        before = tree(tmp_path)
        assert verify.main([str(path)]) == 0
        assert run.main([str(path)]) == 0
        assert tree(tmp_path) == before
        claim(prepare(configuration.load(path)))
        assert tree(tmp_path) == before
