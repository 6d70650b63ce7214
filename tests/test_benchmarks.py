"""Benchmarks run once, small and untimed, so that they cannot rot; the memory promise is held here."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from conftest import REPOSITORY, SHARED

from models import read_metadata

sys.path += [str(REPOSITORY / folder) for folder in ("benchmarks", "examples", "examples/train")]
import builtin_weights
from make_phantom import phantom
from parts import fafb

from pipeline import train
from pipeline.convert import convert

pytestmark = pytest.mark.timeout(1200)  # a guard against hanging: a loaded machine takes minutes for what takes seconds


def python(*command: str) -> str:
    """The output of a Python process that can import the benchmarks and the recipe of the built-in weights."""
    places = [REPOSITORY, REPOSITORY / "benchmarks", REPOSITORY / "examples" / "train"]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places)), "EMSR_SHARED": str(SHARED)}
    done = subprocess.run(
        [sys.executable, *command], env=environ, cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def benchmark(name: str, *arguments: str) -> str:
    return python(str(REPOSITORY / "benchmarks" / name), *arguments)


def rows(table: str) -> dict[str, list[str]]:
    """The lines of Markdown tables, the heads too: the other cells by the first one."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {first: cells for first, *cells in lines}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("noop_slabs.py", ("2000", "1")),
        ("many_workers.py", ("500", "8")),
        ("overlap.py", ("4", "32")),
        ("overlap.py", ("device", "3", "64", "1")),
        ("encoding.py", ("32", "1")),
        ("map_overlap.py", ("16", "16", "1")),
        ("durable_writes.py", ("2", "16", "1")),
        ("network_speed.py", ("peak", "8", "8", "1")),
        ("network_speed.py", ("memory", "8", "8")),
        ("lattice.py", ("small", "phantom", "8", "16", "1", "16", "8")),
        ("precision.py", ("small", "phantom", "8", "16", "1", "bfloat16,contiguous,batch2")),
    ],
)
def test_benchmarks_run(name: str, arguments: tuple[str, ...]) -> None:
    assert benchmark(name, *arguments)


def test_encodings_of_targets_are_compared(tmp_path: Path) -> None:
    """jxl and blosc-zstd lose nothing, which the script itself looks at, and jxl stores less."""
    raw = np.random.default_rng(0).integers(0, 9, (8, 256, 256)) + np.arange(256) // 2 + 60
    tifffile.imwrite(tmp_path / "raw.tif", raw.astype(np.uint8))
    lines = benchmark("target_encodings.py", str(tmp_path / "raw.tif"), "builtin", "32", "1").splitlines()
    stored = {tuple(line.strip("| ").split(" | ")[:2]): float(line.strip("| ").split(" | ")[2]) for line in lines[2:]}
    assert stored["gpemsr", "jxl"] < stored["gpemsr", "blosc-zstd"]
    assert stored["bicubic", "jxl"] < stored["bicubic", "blosc-zstd"]
    assert stored["gpemsr", "raw"] == 1


def test_the_script_for_a_gpu_runs(tmp_path: Path) -> None:
    """On the day that a GPU is lent it must not be broken: every part runs to its end here, as small as it can."""
    environ = dict(os.environ) | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        ["bash", str(REPOSITORY / "benchmarks/gpu/run.sh"), "--smoke", str(tmp_path)],
        capture_output=True,
        text=True,
        env=environ,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + (tmp_path / "errors.txt").read_text()
    found = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert not [line for line in found if {"error", "failed", "stopped"} & line.keys()]
    same = next(line for line in found if "same" in line)
    assert same["twice"]
    assert same["other_place"]
    assert {line.get("training") for line in found} >= {"flow", "vqgan", "indexer", "network"}
    assert {"matrix_tflops", "operator", "kernels", "authors_way", "run"} <= {key for line in found for key in line}


def test_nothing_is_named_after_a_slab_in_dask() -> None:
    """Prefixes, groups and spans live as long as the scheduler, whatever the number of slabs.

    There is one prefix or group at most. A span begins whenever no lease is out, as on a
    loaded machine a few times.
    """
    script = """
import noop_slabs
from parts.dask_processes import apart
if __name__ == "__main__":
    with apart(1) as client:
        print(noop_slabs.measure(client, 3000)["names_that_stay"])
"""
    kept = ast.literal_eval(python("-c", script))
    assert kept["tasks"] == 0
    assert max(kept["prefixes"], kept["groups"]) <= 1
    assert kept["spans"] < 30


def test_a_finished_ledger_loads_at_once() -> None:
    """A million slabs in two seconds, ten million in five: CPU time, for machines are shared."""
    few, many, again = (ast.literal_eval(line) for line in benchmark("resume.py", "1000000", "10000000").splitlines())
    assert few["cpu_s"] < 1
    assert many["cpu_s"] < 5
    assert again["cpu_s"] < 4, "most of it imports"


@pytest.mark.parametrize("scale", ["8", "16"])
def test_the_authors_way_gives_the_same_voxels(scale: str) -> None:
    """A stand-in for their loop, written over our weights with PyTorch's own operators, against the sliding window."""
    found = ast.literal_eval(benchmark("network_speed.py", "slab", scale, "8", "1").splitlines()[-1])
    assert found["from_authors"] < 1e-5
    assert found["indices_equal"] == 1
    assert found["residual_std"] > 0.05


@pytest.mark.parametrize(("case", "slabs"), [("Case('blosc-zstd', 32, 1)", 4), ("GPEMSR", 2)])
def test_a_workers_peak_is_within_15_percent_of_the_promise(case: str, slabs: int) -> None:
    script = f"""
import memory
if __name__ == "__main__":
    print(memory.measure(memory.{case}, {slabs})["peak_over_promise"])
"""
    assert 0.85 <= float(python("-c", script)) <= 1.15


def test_neighbours_gain_nothing_where_all_sections_are_the_same(tmp_path: Path) -> None:
    """The window of centre 2 is one section five times, which is what the third column shows the network."""
    sections = phantom((4, 128, 128))
    stack = np.concatenate([sections[:1].repeat(5, 0), sections[1:]])
    tifffile.imwrite(tmp_path / "stack.tif", stack)
    weights = REPOSITORY / "models" / "builtin" / "flyem-medulla-x8.safetensors"
    table = rows(benchmark("neighbours.py", str(weights), str(tmp_path / "stack.tif"), "2", "6", "128"))
    scores = {name: [float(cell) for cell in cells] for name, cells in table.items() if name != "centre"}
    assert list(scores) == ["2", "3", "4", "5", "mean"]
    assert scores["2"][1] == scores["2"][2]
    assert scores["5"][1] != scores["5"][2]
    assert all(cells[0] == scores["2"][0] for cells in (scores["3"], scores["4"]))
    assert scores["mean"] == pytest.approx(np.mean([scores[z] for z in "2345"], 0), abs=0.001)


def test_a_small_volume_on_one_cell_computes_no_voxel_but_its_own(tmp_path: Path) -> None:
    """16 x 16 LR voxels: the usual tile of 96 x 96 has 36 times as many."""
    tifffile.imwrite(tmp_path / "stack.tif", phantom((5, 256, 256)))
    weights = REPOSITORY / "models" / "builtin" / "flyem-medulla-x8.safetensors"
    printed = benchmark("small_volumes.py", str(weights), str(tmp_path / "stack.tif"), "2", "3", "16", "2", "0")
    usual, one = ([cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines()[2:])
    assert usual[:3] == ["16", "64", "16"]
    assert one[:3] == ["16", "16", "0"]
    assert usual[4].startswith("+0.000")
    assert (usual[5], one[5]) == ("36.00", "1.00")


def test_a_training_step_on_a_crop_twice_as_wide_takes_four_times_the_operations() -> None:
    """SPyNet is nothing but convolutions; all four stages run."""
    table = rows(benchmark("training.py", "small", "8", "1", "128"))
    wide = rows(benchmark("training.py", "small", "8", "1", "256", "flow"))
    assert list(table) == ["stage", "flow", "vqgan", "indexer", "network"]
    assert list(wide) == ["stage", "flow"]
    assert float(wide["flow"][2]) == pytest.approx(4 * float(table["flow"][2]), rel=0.01)
    before, peak = (float(table["network"][i].removesuffix(" GiB")) for i in (4, 5))
    assert before < peak, "a step holds feature maps"


def test_variants_of_an_ablation_are_other_networks_with_scores_of_the_same_windows(
    tmp_path: Path, shared_data: Path
) -> None:
    """One step each, of a phantom as large as the recipe's crop, after earlier stages of one step."""
    tissue = builtin_weights.TISSUES["drosophila-vnc"]
    convert(phantom((20, 128, 128)), tmp_path / "hr.zarr", tissue.voxel_size_nm)
    for stage in ("flow", "vqgan", "indexer-x8"):
        body = builtin_weights.stage_yaml(stage, tissue, SHARED) | {"steps": 1, "batch": 1}
        body["data"]["crop"] = 128
        assert train.main([str(builtin_weights.write(tmp_path / f"{stage}.yaml", body))]) == 0
    table = rows(benchmark("ablation.py", "drosophila-vnc", str(tmp_path), "1", "whole", "mpf"))
    assert list(table) == ["variant", "whole", "mpf"]
    psnr, gain, lpips = (np.array([float(table[name][i]) for name in ("whole", "mpf")]) for i in (1, 2, 3))
    bicubic = psnr - gain
    assert bicubic[0] == pytest.approx(bicubic[1], abs=0.002)
    assert psnr[0] != psnr[1]
    assert ((lpips > 0) & (lpips < 2)).all()
    made = {name: read_metadata(tmp_path / f"ablation-{name}" / "last.safetensors").params for name in ("whole", "mpf")}
    assert (made["whole"].mpf, made["mpf"].mpf) == (True, False)


def test_the_price_of_fafb_is_the_one_in_the_document(tmp_path: Path) -> None:
    """All but what depends on how real EM compresses; random voxels do not compress, constant ones do."""
    for name, voxels in {
        "noise": np.random.default_rng(0).integers(0, 256, (8, 128, 128), np.uint8),
        "constant": np.full((8, 128, 128), 99, np.uint8),
    }.items():
        (tmp_path / name).mkdir()
        tifffile.imwrite(tmp_path / name / "raw.tif", voxels)
    paths = (str(tmp_path / name / "raw.tif") for name in ("noise", "constant"))
    printed = rows(benchmark("price_of_fafb.py", *paths))
    documented = rows((REPOSITORY / "docs" / "price-of-fafb.md").read_text())
    depend = {label for label in printed if label.startswith("stored") or label in ("noise", "constant")}
    depend |= {label for label in printed if label.endswith("and back")}
    same = {label: cells for label, cells in printed.items() if label not in depend}
    assert len(same) == 15, "a head and fourteen rows"
    assert same.items() <= documented.items()
    labels = ("stored over raw, mip 0, coarser", "stored: mip 0, all, fidelity at most")
    share, stored = (float(printed[label][0].split(",")[0]) for label in labels)
    assert 1 <= share < 1.05
    assert stored == pytest.approx(share * fafb.TISSUE * fafb.FINE.product / 1e12, rel=0.01)
    assert float(printed["constant"][0]) < 0.02
