"""Tests start a Grid Engine of their own: Debian's sge_qmaster and sge_execd, all their files in one folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from conftest import wait_until

LIBRARY = Path("/usr/lib/gridengine")
PACKAGED = Path("/usr/share/gridengine")

BOOTSTRAP = """admin_user none
default_domain none
ignore_fqdn true
spooling_method classic
spooling_lib libspoolc
spooling_params {folder}/cell/common;{folder}/qmaster
binary_path /usr/sbin
qmaster_spool_dir {folder}/qmaster
security_mode none
listener_threads 2
worker_threads 2
scheduler_threads 1
"""
HOST = """hostname {host}
load_scaling NONE
complex_values NONE
user_lists NONE
xuser_lists NONE
projects NONE
xprojects NONE
usage_scaling NONE
report_variables NONE
"""
PARALLEL = """pe_name smp
slots 99
user_lists NONE
xuser_lists NONE
start_proc_args NONE
stop_proc_args NONE
allocation_rule $pe_slots
control_slaves FALSE
job_is_first_task TRUE
urgency_slots min
accounting_summary FALSE
qsort_args NONE
"""
QUEUE = {
    "qname": "em.q",
    "load_thresholds": "NONE",
    "pe_list": "smp",
    "slots": "8",
    "shell": "/bin/sh",
    "shell_start_mode": "posix_compliant",
}


def why_not() -> str | None:
    """The result says why no Grid Engine can be started here; it is None where one can."""
    programs = ("sge_qmaster", "sge_execd", "qsub", "qstat", "qconf")
    missing = [name for name in programs if shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin") is None]
    if missing or not (LIBRARY / "spooldefaults").exists():
        return (
            f"Grid Engine is not installed here ({', '.join(missing)} missing; "
            "Debian: gridengine-master gridengine-exec gridengine-client)"
        )
    return None if os.geteuid() == 0 else "sge_execd runs jobs as root only"


@contextlib.contextmanager
def sge() -> Iterator[dict[str, str]]:
    """This yields the variables by which the commands of Grid Engine find it. Jobs that are left are deleted."""
    with tempfile.TemporaryDirectory(prefix="sge-") as name, contextlib.ExitStack() as stack:
        folder, host = Path(name), socket.gethostname().split(".")[0]
        folder.chmod(0o755)
        (folder / "cell" / "common").mkdir(parents=True)
        (folder / "qmaster" / "job_scripts").mkdir(parents=True)
        (folder / "execd").mkdir()
        (folder / "util").symlink_to(PACKAGED / "util")
        for binaries in ("bin", "utilbin"):
            (folder / binaries).symlink_to(Path("/var/lib/gridengine") / binaries)
        common = folder / "cell" / "common"
        (common / "bootstrap").write_text(BOOTSTRAP.format(folder=folder))
        (common / "act_qmaster").write_text(host + "\n")
        (common / "host_aliases").write_text(" ".join([host, *_other_names(host)]) + "\n")
        qmaster, execd = _free_ports()
        found = {
            "SGE_ROOT": str(folder),
            "SGE_CELL": "cell",
            "SGE_QMASTER_PORT": str(qmaster),
            "SGE_EXECD_PORT": str(execd),
        }
        environ = {**os.environ, **found, "PATH": os.environ["PATH"] + ":/usr/sbin"}

        def do(*command: str) -> str:
            return subprocess.run(command, env=environ, cwd=folder, capture_output=True, text=True, check=True).stdout

        do(f"{LIBRARY}/spoolinit", "classic", "libspoolc", f"{common};{folder}/qmaster", "init")
        plain = (PACKAGED / "default-configuration").read_text().splitlines()
        changed = {
            "execd_spool_dir": str(folder / "execd"),
            "min_uid": "0",
            "min_gid": "0",
            "load_report_time": "00:00:01",
        }
        _write(folder / "global", plain, changed)
        do(f"{LIBRARY}/spooldefaults", "configuration", str(folder / "global"))
        do(f"{LIBRARY}/spooldefaults", "complexes", str(PACKAGED / "util" / "resources" / "centry"))
        do(f"{LIBRARY}/spooldefaults", "usersets", str(PACKAGED / "util" / "resources" / "usersets"))
        do(f"{LIBRARY}/spooldefaults", "managers", "root")
        with (folder / "log").open("w") as log:
            _start(stack, "sge_qmaster", environ, log)
            wait_until(lambda: _answers(environ), "sge_qmaster does not answer")
            do("qconf", "-as", host)
            (folder / "host").write_text(HOST.format(host=host))
            do("qconf", "-Ae", str(folder / "host"))
            (folder / "parallel").write_text(PARALLEL)
            do("qconf", "-Ap", str(folder / "parallel"))
            _write(folder / "queue", do("qconf", "-sq").splitlines(), QUEUE | {"hostlist": host})
            do("qconf", "-Aq", str(folder / "queue"))
            sooner = {"schedule_interval": "0:0:1", "flush_submit_sec": "1", "flush_finish_sec": "1"}
            _write(folder / "scheduler", do("qconf", "-ssconf").splitlines(), sooner)
            do("qconf", "-Msconf", str(folder / "scheduler"))
            _start(stack, "sge_execd", environ, log)
            wait_until(lambda: "lx-amd64" in do("qstat", "-f"), "no queue of Grid Engine gets its host")
            stack.callback(_clear, environ)
            yield found


def _write(path: Path, lines: list[str], changed: dict[str, str]) -> None:
    """The configuration `lines`, "key value" each, with other values of these keys."""
    kept = [line for line in lines if line.strip() and not line.startswith("#") and line.split()[0] not in changed]
    path.write_text("\n".join([*kept, *(f"{key} {value}" for key, value in changed.items())]) + "\n")


def _other_names(host: str) -> list[str]:
    """What /etc/hosts calls this machine as well: Grid Engine takes the first name of an address for its name."""
    lines = [line.split("#")[0].split() for line in Path("/etc/hosts").read_text().splitlines()]
    ours = {line[0] for line in lines if host in line[1:]}
    return sorted({name for line in lines if line and line[0] in ours for name in line[1:]} - {host})


def _start(stack: contextlib.ExitStack, program: str, environ: dict[str, str], log: object) -> None:
    daemon = {**environ, "SGE_ND": "1"}  # in the foreground
    process = subprocess.Popen([f"/usr/sbin/{program}"], env=daemon, stdout=log, stderr=log)  # type: ignore[call-overload]
    stack.callback(_end, process)


def _answers(environ: dict[str, str]) -> bool:
    return subprocess.run(["qconf", "-sconf"], env=environ, capture_output=True, check=False).returncode == 0


def _clear(environ: dict[str, str]) -> None:
    subprocess.run(["qdel", "-f", "-u", "root"], env=environ, capture_output=True, check=False)


def _free_ports() -> list[int]:
    with socket.socket() as a, socket.socket() as b:
        a.bind(("127.0.0.1", 0))
        b.bind(("127.0.0.1", 0))
        return [a.getsockname()[1], b.getsockname()[1]]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
