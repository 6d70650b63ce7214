"""Benchmarks run once, small and untimed, so that they cannot rot; the memory promise is held here."""

from __future__ import annotations

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


@pytest.mark.parametrize(("name", "arguments"), [("noop_slabs.py", ("2000", "1")), ("overlap.py", ("4", "32")), ("map_overlap.py", ("16", "16", "1"))])
def test_benchmarks_run(name: str, arguments: tuple[str, ...]) -> None:
    assert benchmark(name, *arguments)


@pytest.mark.parametrize(("case", "slabs"), [("Case('blosc-zstd', 32, 1)", 4), ("GPEMSR", 2)])
def test_a_workers_peak_is_within_15_percent_of_the_promise(case: str, slabs: int) -> None:
    code = f"import memory; print(memory.measure(memory.{case}, {slabs})['peak_over_promise'])"
    environ = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'benchmarks'}"}
    script = f"if __name__ == '__main__':\n    {code}\n"
    done = subprocess.run([sys.executable, "-c", script], env=environ, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=200)
    assert 0.85 <= float(done.stdout) <= 1.15
