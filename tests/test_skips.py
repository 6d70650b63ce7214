"""No law is skipped in silence: with EMSR_ALLOWED_SKIPS set, as `.ci/run` sets it, any other skip is a failure."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, TESTS

KINDS = {
    "in_a_test": "def test_b(): pytest.skip('no anvil here')",
    "in_a_fixture": "@pytest.fixture\ndef anvil(): pytest.skip('no anvil here')\ndef test_b(anvil): pass",
    "by_a_mark": "@pytest.mark.skipif(True, reason='no anvil here')\ndef test_b(): pass",
    "by_unittest": "import unittest\n@unittest.skip('no anvil here')\nclass TestB(unittest.TestCase):\n def test(_): 0",
    "of_a_module": "pytest.skip('no anvil here', allow_module_level=True)",
    "by_an_import": "pytest.importorskip('anvil', reason='no anvil here')",
}


def run(folder: Path, allowed: str | None) -> tuple[int, str]:
    """A process runs pytest with the hooks of our conftest on a file of each kind and on a test expected to fail."""
    for kind, test in KINDS.items():
        (folder / f"test_{kind}.py").write_text(f"import pytest\n{test}\n")
    (folder / "test_expected.py").write_text("import pytest\n@pytest.mark.xfail\ndef test_a(): assert False\n")
    environ = {key: v for key, v in os.environ.items() if key not in ("EMSR_ALLOWED_SKIPS", "PYTEST_ADDOPTS")}
    if allowed is not None:
        environ["EMSR_ALLOWED_SKIPS"] = allowed
    flags = ["-rfEs", "-p", "conftest", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--rootdir=."]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *flags],
        cwd=folder,
        env=environ | {"PYTHONPATH": f"{REPOSITORY}:{TESTS}"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("allowed", ["", "no hammer here\nanvil"])
def test_every_kind_of_skip_is_a_failure(allowed: str, tmp_path: Path) -> None:
    code, said = run(tmp_path, allowed)
    assert code == 1
    for kind in KINDS:
        assert f"test_{kind}.py" in said.partition("short test summary")[2], f"{kind} is not told:\n{said}"
    assert "this skip is not allowed here: no anvil here" in said
    assert "1 failed, 1 xfailed, 5 errors" in said.splitlines()[-1], said


@pytest.mark.parametrize("allowed", [None, "no hammer here\nno anvil\n"])
def test_without_the_variable_or_with_its_reason_a_skip_is_told_and_no_failure(
    allowed: str | None, tmp_path: Path
) -> None:
    code, said = run(tmp_path, allowed)
    assert code == 0, said
    assert "no anvil here" in said
    assert f"{len(KINDS)} skipped, 1 xfailed" in said.splitlines()[-1], said


def test_ci_sets_the_variable_before_it_tests() -> None:
    script = (REPOSITORY / ".ci" / "run").read_text()
    assert 0 < script.find("\nexport EMSR_ALLOWED_SKIPS=") < script.find("command_of 'Install and test'")
