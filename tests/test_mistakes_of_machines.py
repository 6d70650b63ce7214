"""Law 7 for the machine: each condition is exit code 2 and a line or two that name it, and nothing is touched.

Real processes, on one short volume that all of them share: whatever a condition touched would be seen by the next.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import GUARD_S, REPOSITORY, texture, tree, volume_yaml, write_lr

from pipeline.base.errors import ClusterError
from pipeline.process import children

PYTHON = sys.executable

# (what is amiss, a line of bash in which $EMSR is the command, words of the message)
CONDITIONS: list[tuple[str, str, tuple[str, ...]]] = [
    # Dask's configuration of the site
    ("malformed variable", "DASK_DISTRIBUTED__WORKER__PRELOAD='[unclosed' $EMSR run v.yaml", ("WORKER__PRELOAD",)),
    ("preload raises", "DASK_DISTRIBUTED__SCHEDULER__PRELOAD=raises.py $EMSR run v.yaml", ("boom", ".preload")),
    ("no uvloop", "DASK_DISTRIBUTED__ADMIN__EVENT_LOOP=uvlop $EMSR run v.yaml", ("uvlop", "admin.event-loop")),
    ("no number", "DASK_DISTRIBUTED__SCHEDULER__WORKER_SATURATION=x1y2 $EMSR run v.yaml", ("worker-saturation",)),
    ("no such folder", "DASK_TEMPORARY_DIRECTORY=$PWD/a/b $EMSR run v.yaml", ("temporary-directory",)),
    ("no list", "DASK_CONFIG=list $EMSR status v.yaml", ("must have a dict", "site.yaml")),
    ("no text", "DASK_CONFIG=binary $EMSR status v.yaml", ("site.yaml", "decode")),
    ("no folder for a log", "DASK_CONFIG=log $EMSR status v.yaml", ("/nowhere/x.log", "log", "DASK_CONFIG")),
    ("no handler", "DASK_CONFIG=handler $EMSR status v.yaml", ("nohandler", "handler", "DASK_CONFIG")),
    # libraries
    ("no library", "PYTHONPATH=missing:$PYTHONPATH $EMSR run v.yaml", ("rich cannot be imported", "pip")),
    ("no library -m", "PYTHONPATH=missing:$PYTHONPATH $PYTHON -m pipeline.run v.yaml", ("rich cannot be imported",)),
    ("broken library", "PYTHONPATH=broken:$PYTHONPATH $EMSR status v.yaml", ("tensorstore cannot", "GLIBCXX_9")),
    ("broken torch", "PYTHONPATH=torchless:$PYTHONPATH $EMSR run v.yaml", ("torch cannot be", "libcudart.so.99")),
    ("old torch", "PYTHONPATH=old:$PYTHONPATH $EMSR run v.yaml", ("torch 1.0 is installed", "emsr needs torch>=")),
    # standard streams
    ("full disk, status", "$EMSR status v.yaml >/dev/full", ("No space left",)),
    ("full disk, price", "$EMSR run --dry-run v.yaml >/dev/full", ("No space left",)),
    # paths
    ("no file", "$EMSR run nowhere.yaml", ("cannot be read",)),
    ("a loop", "$EMSR run loop.yaml", ("Too many levels of symbolic links",)),
    ("a sidecar that is a loop", "$EMSR status ring.yaml", ("ring.emsr/plan.json", "links lead in a circle")),
    ("UTF-16", "$EMSR run utf16.yaml", ("not UTF-8 text",)),
    ("endless", "$EMSR run /dev/zero", ("holds more than",)),
    ("no argument", "$EMSR run", ("usage: emsr run", "required: volume")),
    ("no argument -m", "$PYTHON -m pipeline.train", ("usage: python -m pipeline.train", "required: stage")),
    ("bytes", "cd $'caf\\xe9' && $EMSR run v.yaml", ("is not UTF-8", "Rename it")),
    ("other locale", "LC_ALL=POSIX PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 $EMSR status é.yaml", ("é.yaml: cannot be",)),
    ("deleted folder", "mkdir gone && cd gone && rmdir ../gone && $EMSR verify ../v.yaml", ("folder was deleted",)),
    ("an archive", "PYTHONPATH=emsr.zip $EMSR run v.yaml", ("lies in the archive", "Unpack it")),
    ("another pipeline", "PYTHONPATH=other:$PYTHONPATH $EMSR run v.yaml", ("Wanted: emsr's own",)),
    # limits
    ("memory", "ulimit -v 1000000; $EMSR run v.yaml", ("ulimit -v",)),
    ("no temporary folder", "ulimit -f 0; $EMSR run v.yaml", ("Set TMPDIR",)),
    # clusters
    ("nobody's certificates", "$EMSR run tls.yaml", ("needs certificates", "cluster.security")),
    ("site's certificates", "DASK_DISTRIBUTED__COMM__TLS__CA_FILE=/nowhere/ca DASK_DISTRIBUTED__COMM__TLS__CLIENT__CERT"
     "=/nowhere/c $EMSR run tls.yaml", ("/nowhere/ca cannot be read",)),
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("machine")
    write_lr(folder / "lr.zarr", texture((2, 16, 16)))
    volume_yaml(folder / "v.yaml", "lr.zarr", "sr")
    for name, address in (("tls", "tls://127.0.0.1:9"), ("host", "tcp://no.such.host.invalid:1")):
        volume_yaml(folder / f"{name}.yaml", "lr.zarr", "sr", cluster={"kind": "address", "address": address})
    volume_yaml(folder / "port.yaml", "lr.zarr", "sr", cluster={"kind": "address", "address": "tcp://127.0.0.1:99999"})
    (folder / "utf16.yaml").write_text((folder / "v.yaml").read_text(), encoding="utf-16")
    (folder / "loop.yaml").symlink_to("loop.yaml")
    volume_yaml(folder / "ring.yaml", "lr.zarr", "ring")
    (folder / "ring.emsr").symlink_to("ring.emsr")
    (folder / "raises.py").write_text("raise RuntimeError('boom')\n")
    for name, text in {
        "list": b"- a\n- b\n",
        "binary": b"\xff\xfe\x00",
        "log": b"logging: {version: 1, handlers: {f: {class: logging.FileHandler, filename: /nowhere/x.log}}}\n",
        "handler": b"logging: {version: 1, root: {handlers: [nohandler]}}\n",
    }.items():
        (folder / name).mkdir()
        (folder / name / "site.yaml").write_bytes(text)
    for name, module, line in [
        ("missing", "rich", "raise ModuleNotFoundError(\"No module named 'rich'\", name='rich')"),
        ("broken", "tensorstore", "raise ImportError('libstdc++.so.6: version GLIBCXX_9 not found')"),
        ("torchless", "torch", "raise OSError('libcudart.so.99: cannot open shared object file')"),
        ("old", "torch", "__version__ = '1.0'"),
    ]:
        (folder / name).mkdir()
        (folder / name / f"{module}.py").write_text(line + "\n")
    (folder / "old" / "torch-1.0.dist-info").mkdir()
    (folder / "old" / "torch-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch\nVersion: 1.0\n"
    )
    (folder / "other" / "pipeline").mkdir(parents=True)
    (folder / "other" / "pipeline" / "__init__.py").touch()
    with zipfile.ZipFile(folder / "emsr.zip", "w") as archive:
        for path in (REPOSITORY / "emsr").glob("*.py"):
            archive.write(path, f"emsr/{path.name}")
    latin = os.fsencode(folder) + b"/caf\xe9"
    os.mkdir(latin)
    shutil.copy(folder / "v.yaml", latin + b"/v.yaml")
    return folder


def said_by(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), "EMSR": f"{PYTHON} -m emsr", "PYTHON": PYTHON}
    environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="backslashreplace",
        check=False,
        timeout=GUARD_S,
    )


@pytest.mark.parametrize(("line", "words"), [c[1:] for c in CONDITIONS], ids=[c[0] for c in CONDITIONS])
def test_a_condition_of_the_machine_is_named(line: str, words: tuple[str, ...], place: Path) -> None:
    before = tree(place)
    done = said_by(line, place)
    assert done.returncode == 2, done.stderr
    for word in words:
        assert word in done.stderr
    for never in ("Traceback", "a fault inside emsr", "Warning"):
        assert never not in done.stderr
    assert len(done.stderr.splitlines()) <= 2, done.stderr
    assert tree(place) == before


def test_what_a_file_system_names_in_another_encoding_is_found(place: Path) -> None:
    """Whatever the locale: volume.yaml is in UTF-8, and so are the names of files."""
    volume_yaml(place / "é.yaml", "lr.zarr", "é")
    done = said_by("LC_ALL=POSIX PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 $EMSR status é.yaml", place)
    (place / "é.yaml").unlink()
    assert done.returncode == 1, done.stderr
    assert "nothing was run" in done.stdout


def test_a_reader_that_has_seen_enough_is_no_mistake(place: Path) -> None:
    done = said_by("set -o pipefail; $EMSR status v.yaml | true", place)
    assert done.returncode == 1
    assert not done.stderr


def test_a_machine_that_does_not_reach_itself_is_told_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "LOOPBACK", "192.0.2.1")  # of no machine (RFC 5737)
    with pytest.raises(ClusterError, match=r"does not reach itself at 192\.0\.2\.1 .*ip link set lo up"):
        children.refuse_without_loopback()


def test_the_end_of_the_time_on_a_processor_is_told_once(place: Path) -> None:
    """The kernel repeats the signal each second, and would kill a command that is closing what it has open."""
    (place / "spins.py").write_text(
        "import time\n"
        "from pipeline.base.command import guarded\n"
        "def work():\n"
        "    try:\n"
        "        while True: pass\n"
        "    finally:\n"
        "        while time.process_time() < 3.2: pass\n"
        "print(guarded(work))\n"
        "while time.process_time() < 4.4: pass\n"
    )
    done = said_by("ulimit -St 1; $PYTHON spins.py", place)
    (place / "spins.py").unlink()
    assert (done.returncode, done.stdout) == (0, "130\n")
    assert "interrupted by SIGXCPU" in done.stderr
