"""`python tests/run_gpu_facts.py volume.yaml` is the main job on workers whose devices say that they are GPUs.

They compute on the CPU that they are. The client's device is what it is: it runs the other branch below.
"""

from __future__ import annotations

import sys

import standin

if __name__ == "__main__":
    from pipeline.run import main

    standin.reach_workers(__file__)
    sys.exit(main())
else:
    from pipeline.process import device

    device.facts = lambda _: device.Facts("cuda stand-in", 80 << 30, ("float32", "tf32", "bfloat16", "float16"))
