"""`python -m pipeline.training.rank RANK FOLDER`: what a training starts for each device after its first.

The configuration is one line of JSON on standard input, which stays open as long as rank 0 lives.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from models.training.ranks import Ranks
from pipeline.base.command import guarded
from pipeline.config.stage import StageConfig
from pipeline.training.processes import end_with_input
from pipeline.training.run import run_rank


def main(rank: int, folder: Path) -> int:
    config = StageConfig.model_validate_json(sys.stdin.buffer.readline())
    end_with_input()
    return guarded(lambda: _run(config, rank, folder))


def _run(config: StageConfig, rank: int, folder: Path) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # rank 0 decides for all when to stop
    run_rank(config, Ranks(rank, config.devices), folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2])))
