"""As much of LSF's bsub, bjobs and bkill as emsr uses, after IBM's documentation: jobs are processes of this machine.

    lsf_standin.py bsub < script | bjobs -noheader -o ... | bkill NUMBER ...

Its files are in the folder LSF_STANDIN: a pid by job number. One queue exists, `normal`.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

FOLDER = Path(os.environ["LSF_STANDIN"])


def bsub() -> int:
    script = sys.stdin.read()
    asked = dict(re.findall(r"^#BSUB -(\w) (.+)$", script, re.MULTILINE))
    if asked.get("q", "normal") != "normal":
        print(f"{asked['q']}: No such queue. Job not submitted.", file=sys.stderr)
        return 255
    number = 1 + max((int(path.name) for path in FOLDER.glob("[0-9]*")), default=0)
    path = FOLDER / f"script.{number}"
    path.write_text(script)
    with (FOLDER / f"output.{number}").open("w") as output:
        job = subprocess.Popen(
            ["bash", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    (FOLDER / str(number)).write_text(str(job.pid))
    print(f"Job <{number}> is submitted to default queue <normal>.")
    return 0


def bjobs() -> int:
    there = [path.name for path in FOLDER.glob("[0-9]*") if _lives(int(path.read_text()))]
    if not there:
        print("No unfinished job found", file=sys.stderr)
        return 255
    for number in there:
        print(f"{number}|RUN|-")
    return 0


def bkill(numbers: list[str]) -> int:
    for number in numbers:
        for sent in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(int((FOLDER / number).read_text()), sent)
            except ProcessLookupError:
                break
        print(f"Job <{number}> is being terminated")
    return 0


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    sys.exit({"bsub": bsub, "bjobs": bjobs}[command]() if command != "bkill" else bkill(arguments))
