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
    done = subprocess.run(
        command, env=environ, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("noop_slabs.py", ("2000", "1")),
        ("many_workers.py", ("500", "8")),
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


def test_nothing_is_named_after_a_slab_in_dask() -> None:
    """Prefixes, groups and spans live as long as the scheduler: one of each at most, whatever the number of slabs."""
    code = "import noop_slabs; from parts.dask_processes import apart\n    with apart(1) as client: print(noop_slabs.measure(client, 3000)['names_that_stay'])"
    environ = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'benchmarks'}"}
    script = f"if __name__ == '__main__':\n    {code}\n"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environ,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    )
    kept = ast.literal_eval(done.stdout)
    assert kept["tasks"] == 0
    assert max(kept["prefixes"], kept["groups"], kept["spans"]) <= 1


def test_a_finished_ledger_loads_at_once() -> None:
    """A million slabs in two seconds, ten million in five: CPU time, for machines are shared."""
    few, many, again = (ast.literal_eval(line) for line in benchmark("resume.py", "1000000", "10000000").splitlines())
    assert few["cpu_s"] < 1
    assert many["cpu_s"] < 5
    assert again["cpu_s"] < 4, "most of it imports"


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
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environ,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    )
    assert 0.85 <= float(done.stdout) <= 1.15
