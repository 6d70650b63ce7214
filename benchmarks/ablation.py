"""What the neighbours and the prior are worth: the network stage of a built-in recipe, whole and with parts of it off, the same steps each.

    PYTHONPATH=.:examples/train EMSR_SHARED=... python benchmarks/ablation.py flyem-medulla WORK [steps=700] [whole alone mpf pod three_da]

WORK is the folder in which examples/train/builtin_weights.py has trained flow, vqgan and indexer-x8. Scores are those of the held-out windows after the
last step. `alone` shows the network the centre section five times; the others put residual blocks with as many parameters in a module's place (paper, table 5).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from builtin_weights import TISSUES, stage_yaml, write

from pipeline import train

VARIANTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "alone": {"alone": True},
    "mpf": {"mpf": False},
    "pod": {"pod": False},
    "three_da": {"three_da": False},
}


def main(tissue: str, work: str, steps: str = "700", *variants: str) -> None:
    shared = Path(os.environ["EMSR_SHARED"]).resolve()
    print("| variant | steps | PSNR (dB) | over bicubic | LPIPS (Alex) |")
    print("|---|---|---|---|---|")
    for name in variants or VARIANTS:
        body = stage_yaml("network-x8", TISSUES[tissue], shared)
        body |= {"output": f"ablation-{name}", "steps": int(steps), "validate_every": int(steps)}
        body["network"] = body["network"] | VARIANTS[name]
        if train.main([str(write(Path(work) / f"ablation-{name}.yaml", body))]):
            raise SystemExit(1)
        last = json.loads((Path(work) / f"ablation-{name}" / "metrics.jsonl").read_text().splitlines()[-1])
        print(
            f"| {name} | {steps} | {last['psnr']:.3f} | {last['psnr'] - last['bicubic_psnr']:+.3f} | {last['lpips']:.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
