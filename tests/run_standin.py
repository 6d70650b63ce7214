"""`python tests/run_standin.py volume.yaml` is the main job with the stand-in network in the client and its workers.

Workers are spawned and import this file again, so the installation below reaches them too.
"""

from __future__ import annotations

import sys

import standin

standin.install()

if __name__ == "__main__":
    from pipeline.run import main

    sys.exit(main())
