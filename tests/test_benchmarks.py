"""Benchmarks run once, small and untimed, so that they cannot rot; the memory promise is held here."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY


def benchmark(name: str, *arguments: str) -> str:
    environ = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'benchmarks'}"}
    command = [sys.executable, str(REPOSITORY / "benchmarks" / name), *arguments]
    done = subprocess.run(command, env=environ, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("noop_slabs.py", ("2000", "1")),
        ("overlap.py", ("4", "32")),
        ("map_overlap.py", ("16", "16", "1")),
        ("network_speed.py", ("peak", "8", "8", "1")),
        ("network_speed.py", ("memory", "8", "8")),
        ("lattice.py", ("small", "phantom", "8", "16", "1", "16", "8")),
        ("precision.py", ("small", "phantom", "8", "16", "1", "bfloat16,contiguous,batch2")),
    ],
)
def test_benchmarks_run(name: str, arguments: tuple[str, ...]) -> None:
    assert benchmark(name, *arguments)


@pytest.mark.parametrize("scale", ["8", "16"])
def test_the_authors_way_gives_the_same_voxels(scale: str) -> None:
    """Their loop, written over our weights with PyTorch's own operators, against the sliding window."""
    found = ast.literal_eval(benchmark("network_speed.py", "slab", scale, "8", "1").splitlines()[-1])
    assert found["from_authors"] < 1e-5
    assert found["indices_equal"] == 1
    assert found["residual_std"] > 0.05


@pytest.mark.parametrize(("case", "slabs"), [("Case('blosc-zstd', 32, 1)", 4), ("GPEMSR", 2)])
def test_a_workers_peak_is_within_15_percent_of_the_promise(case: str, slabs: int) -> None:
    code = f"import memory; print(memory.measure(memory.{case}, {slabs})['peak_over_promise'])"
    environ = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'benchmarks'}"}
    script = f"if __name__ == '__main__':\n    {code}\n"
    done = subprocess.run([sys.executable, "-c", script], env=environ, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=200)
    assert 0.85 <= float(done.stdout) <= 1.15
