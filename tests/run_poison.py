"""This is the main job with a network that ends its process where a tile's first voxel has the value in POISON."""

from __future__ import annotations

import os
import sys

import standin

import models
from models.baselines.interpolation import Nearest


class Poison(Nearest):
    def encode_section(self, section):  # type: ignore[no-untyped-def]
        if round(float(section[0, 0, 0, 0]) * 255) == int(os.environ["POISON"]):
            os._exit(9)
        return section


models.build = lambda name, scale, preset=None: Poison(scale)

if __name__ == "__main__":
    from pipeline.run import main

    standin.reach_workers(__file__)
    sys.exit(main())
