"""Tests start a Slurm of their own here: Debian's munged, slurmctld and slurmd, with all their files in one folder."""

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

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol")

CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
ReturnToService=2
OverTimeLimit=0
KillWait=5
MinJobAge=3600
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=16000 State=UNKNOWN
PartitionName=em Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """The result says why no Slurm can be started here; it is None where one can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin") is None]
    if missing:
        return (
            f"Slurm is not installed here ({', '.join(missing)} missing; Debian: slurmctld slurmd slurm-client munge)"
        )
    return None if os.geteuid() == 0 else "slurmd runs jobs as root only"


@contextlib.contextmanager
def slurm() -> Iterator[Path]:
    """This yields the path of slurm.conf, for SLURM_CONF. Jobs that are left are killed at the end."""
    with (
        tempfile.TemporaryDirectory(prefix="slurm-") as name,
        contextlib.ExitStack() as stack,
    ):  # short: munged's socket has little room for its path
        folder = Path(name)
        folder.chmod(0o755)  # munged wants its socket's folder open to all
        (folder / "state").mkdir()
        (folder / "spool").mkdir()
        (folder / "key").write_bytes(os.urandom(128))
        (folder / "key").chmod(0o400)
        controller, daemon = _free_ports()
        conf = folder / "slurm.conf"
        conf.write_text(
            CONF.format(host=socket.gethostname().split(".")[0], controller=controller, daemon=daemon, folder=folder)
        )
        environ = {**os.environ, "SLURM_CONF": str(conf), "PATH": os.environ["PATH"] + ":/usr/sbin"}
        munged = [
            "munged",
            "--foreground",
            f"--key-file={folder}/key",
            f"--socket={folder}/munge.socket",
            f"--pid-file={folder}/munged.pid",
        ]
        with (folder / "log").open("w") as log:
            for command in ([*munged, f"--seed-file={folder}/seed"], ["slurmctld", "-D", "-c"], ["slurmd", "-D", "-c"]):
                process = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
                stack.callback(_end, process)
                if command[0] == "munged":
                    wait_until((folder / "munge.socket").exists, "munged does not start")
            wait_until(lambda: "idle" in _nodes(environ), "no node of Slurm becomes idle")
            stack.callback(_clear, environ)
            yield conf


def _free_ports() -> list[int]:
    with socket.socket() as a, socket.socket() as b:
        a.bind(("127.0.0.1", 0))
        b.bind(("127.0.0.1", 0))
        return [a.getsockname()[1], b.getsockname()[1]]


def _nodes(environ: dict[str, str]) -> str:
    return subprocess.run(["sinfo", "--noheader"], env=environ, capture_output=True, text=True, check=False).stdout


def _clear(environ: dict[str, str]) -> None:
    subprocess.run(["scancel", "--user=root"], env=environ, check=False)
    left = ["squeue", "--noheader"]
    wait_until(lambda: not subprocess.run(left, env=environ, capture_output=True, check=False).stdout, "jobs are left")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
