"""`python tests/run_impatient.py COMMAND ...` is that command of emsr, which says a wait after 1 s.

It ends a wait after `WAIT_S` seconds (4), and a run after `NO_WORKER_S` (60) without a worker. Workers import this
file too, so that the constants below reach them. With STANDIN_HOLD the network is the stand-in.
"""

from __future__ import annotations

import importlib
import os
import sys

import standin

from pipeline.base import waits
from pipeline.schedule import absence, check_workers, crew, execute, paused

waits.SAY_S, waits.LIMIT_S, waits.END_S = 1.0, float(os.environ.get("WAIT_S", "4")), 3.0
paused.LOOK_S, paused.MIN_PAUSE_S = 0.5, 1.0
absence.NO_WORKER_S = check_workers.NO_WORKER_S = crew.NO_WORKER_S = float(os.environ.get("NO_WORKER_S", "60"))
execute.DRAIN_S = 10.0
if "STANDIN_HOLD" in os.environ:
    standin.install()

if __name__ == "__main__":
    standin.reach_workers(__file__)
    sys.exit(importlib.import_module(f"pipeline.{sys.argv[1]}").main(sys.argv[2:]))
