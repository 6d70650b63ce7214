"""`python tests/run_standin.py volume.yaml` is the main job with the stand-in network in the client and its workers.

Local workers load this file before they begin, so the installation below reaches them too.
"""

from __future__ import annotations

import sys

import standin

standin.install()

if __name__ == "__main__":
    from pipeline.run import main

    standin.reach_workers(__file__)
    sys.exit(main())
