"""Measures what the neighbouring sections and the prior gain: the network stage of a recipe, with parts replaced.

    PYTHONPATH=.:examples/train EMSR_SHARED=... python benchmarks/ablation.py TISSUE WORK [steps=700] [VARIANT ...]

TISSUE is flyem-medulla or drosophila-vnc. WORK is the folder in which examples/train/builtin_weights.py has trained the
stages flow, vqgan and indexer-x8. Every variant is trained for the same number of steps; its scores are those of the
held-out windows after the last step. The variants are whole, alone, mpf, pod and three_da (default: all of them).
`alone` shows the network the centre section five times. The last three replace a module by residual blocks with about
as many parameters (paper, table 5).
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
        gain = last["psnr"] - last["bicubic_psnr"]
        print(f"| {name} | {steps} | {last['psnr']:.3f} | {gain:+.3f} | {last['lpips']:.4f} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
