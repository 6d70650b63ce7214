"""Mutation testing: this script makes one small mistake in the code at a time and runs the tests that should fail.

    python benchmarks/mutations.py [--only FILE] [--jobs N]

The mutations and their tests are listed in mutants.py. `--only` takes a part of a file's path, and `--jobs` says how
many mutations are tried at a time (1). Each job works on a copy of the tree in a temporary folder. The tests first run
once without any mutation, and all of them must pass. A mutation is killed when one of its tests fails, or takes longer
than HANGS_S seconds. The script prints each survivor, then a table by file.

The exit code is 1 where a smaller share than WANTED of the mutations is killed. It is 2 where an old text of mutants.py
is not in its file exactly once, or where a test fails without any mutation.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import queue
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mutants import MUTANTS, SURVIVORS_EXPLAINED, Mutant

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("EMSR_SHARED", REPOSITORY.parent / "shared"))
WANTED = 0.9
LIBRARIES = ["boto3", "cloudvolume", "hypothesis", "psutil", "pytest", "tensorstore", "torch", "torchvision", "zarr"]
"""The libraries that tests import. They are loaded once, and every run of tests is a fork of that process."""
FORKS = multiprocessing.get_context("forkserver")
HANGS_S = 60.0
FAILED, NO_SUCH_TEST = (1, 2), (3, 4, 5)
"""Exit codes of pytest. FAILED: tests failed or could not be imported. NO_SUCH_TEST: an error inside pytest or in its
arguments, or no test was selected.
"""


def misplaced(mutants: list[Mutant]) -> list[str]:
    """Return a line for every mutation whose old text is not in its file exactly once, or is equal to its new text."""
    wrong = []
    for mutant in mutants:
        path = REPOSITORY / mutant.file
        count = path.read_text().count(mutant.old) if path.exists() else 0
        if count != 1 or mutant.old == mutant.new:
            wrong.append(f"{mutant.file}: {count} times, once is wanted: {mutant.old!r}")
    return wrong


def copy_of_tree(folder: Path) -> Path:
    """Copy all files that git tracks, and new ones that it does not ignore, into `folder`, which is returned."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / name)
    return folder


def test(tree: Path, tests: str) -> tuple[int, str]:
    """Run these tests in `tree`; return pytest's exit code, 1 where it hangs, and what it printed. Hypothesis draws the
    same examples every time.
    """
    with tempfile.NamedTemporaryFile("r") as said:
        child = FORKS.Process(target=in_child, args=(tree, tests, said.name))
        child.start()
        child.join(4 * HANGS_S)
        if child.is_alive():
            child.kill()
            return 1, "hung"
        return child.exitcode or 0, said.read()


def in_child(tree: Path, tests: str, said: str) -> None:
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    os.environ |= {"PYTHONPATH": str(tree), "EMSR_SHARED": str(SHARED), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    with open(said, "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    flags = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=mutations", f"--timeout={HANGS_S:.0f}"]
    code = int(pytest.main([*flags, *shlex.split(tests)]))
    sys.stdout.flush()
    os._exit(code)  # whatever threads the mutation has left hanging


def killed(tree: Path, mutant: Mutant) -> bool:
    """Say whether the tests of this mutation fail with it. Raises SystemExit where they select no test."""
    path = tree / mutant.file
    whole = path.read_text()
    path.write_text(whole.replace(mutant.old, mutant.new))
    try:
        code, said = test(tree, mutant.tests)
    finally:
        path.write_text(whole)
    if code in NO_SUCH_TEST:
        raise SystemExit(f"{mutant.tests}\n{said}")
    return code in FAILED


def indented(text: str) -> str:
    return "\n".join(f"        {line}" for line in text.splitlines())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a file's path")
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    mutants = [mutant for mutant in MUTANTS if arguments.only in mutant.file]
    if wrong := misplaced(mutants):
        print(*wrong, sep="\n")
        return 2
    os.nice(10)
    os.environ["OMP_NUM_THREADS"] = "1"
    FORKS.set_forkserver_preload(LIBRARIES)
    with tempfile.TemporaryDirectory() as folder:
        trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for job in range(arguments.jobs):
            trees.put(copy_of_tree(Path(folder, str(job))))

        def in_a_tree(mutant: Mutant) -> bool:
            tree = trees.get()
            began = time.monotonic()
            try:
                found = killed(tree, mutant)
            finally:
                trees.put(tree)
            said = "killed  " if found else "SURVIVED"
            print(
                f"{said} {time.monotonic() - began:5.1f} s  {mutant.file}: {mutant.old.strip().splitlines()[0]}",
                flush=True,
            )
            return found

        def fails_unchanged(tests: str) -> str:
            tree = trees.get()
            code, said = test(tree, tests)
            trees.put(tree)
            return f"without any mutation these fail: {tests}\n{said}" if code else ""

        with ThreadPoolExecutor(arguments.jobs) as pool:
            if wrong := list(
                filter(None, pool.map(fails_unchanged, dict.fromkeys(mutant.tests for mutant in mutants)))
            ):
                print(*wrong, sep="\n")
                return 2
            found = dict(zip(mutants, pool.map(in_a_tree, mutants), strict=True))
    return report(found)


def report(found: dict[Mutant, bool]) -> int:
    for mutant, dead in found.items():
        if not dead:
            why = SURVIVORS_EXPLAINED.get(mutant.old, "not explained")
            print(f"\nsurvivor in {mutant.file}: {why}")
            print(indented(mutant.old), "    ->", indented(mutant.new), sep="\n")
    of = Counter(mutant.file for mutant in found)
    killed_of = Counter(mutant.file for mutant, dead in found.items() if dead)
    print()
    for file, count in of.items():
        print(f"{file:55} {killed_of[file]:4} of {count:4} killed")
    share = sum(found.values()) / max(1, len(found))
    survived = len(found) - sum(found.values())
    print(f"{sum(found.values())} killed, {survived} survived: {share:.1%} of {len(found)} are killed")
    return int(share < WANTED)


if __name__ == "__main__":
    sys.exit(main())
