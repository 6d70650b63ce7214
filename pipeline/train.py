"""`python -m pipeline.train stage.yaml`: train one stage, or go on where it stopped."""

from __future__ import annotations

import argparse
import sys

from emsr import start
from pipeline.base.command import INTERRUPTED, guarded
from pipeline.base.errors import UserError
from pipeline.config import stage as stage_yaml
from pipeline.config.stage import StageConfig


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=start.program("train"), description="Train one stage of the network, or go on where it stopped."
    )
    parser.add_argument("stage", help="path of stage.yaml")
    args = parser.parse_args(argv)
    return guarded(lambda: train(stage_yaml.load(args.stage)))


def train(config: StageConfig) -> int:
    """Exit code 0 after the last step, 130 after an interrupt: the same command goes on. Raises UserError."""
    try:
        from pipeline.training.run import run
    except ImportError as error:
        raise UserError(
            f"{error.name} is not installed", "it is needed for training", "pip install 'emsr[train]'"
        ) from None
    step = run(config)
    if step >= config.steps:
        return 0
    print(f"emsr: stopped at step {step} of {config.steps}; the same command goes on", file=sys.stderr)
    return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
