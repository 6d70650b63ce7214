"""What the threads that draw samples wait for, said and ended where a training waits for them."""

from __future__ import annotations

import math
from concurrent.futures import Future, wait

from models.training.ahead import Drawn, Waits
from pipeline.base.waits import LOOK_S, Progress, Step, current, waiting


class SampleWaits(Waits):
    """The training's own thread waits for what the threads that draw wait for: the longest wait of them is said.

    It is ended by the limit of one answer, as if that thread had asked itself; drawing alone takes what time it takes.
    """

    def __init__(self) -> None:
        self._threads: list[Progress] = []

    def begin_thread(self) -> None:
        progress = Progress()
        current.set(progress)
        self._threads.append(progress)

    def wait_for(self, drawn: Future[Drawn], step: int) -> None:
        while not drawn.done():
            of_threads = self._steps()
            longest = min((s for s in of_threads if s.what), key=lambda s: s.at, default=None)
            what = f"the samples of step {step + 1}"
            with waiting(longest.what, longest.extra_s) if longest else waiting(what, math.inf):
                while self._steps() == of_threads and wait([drawn], LOOK_S).not_done:
                    pass

    def _steps(self) -> list[Step]:
        return [progress.step for progress in list(self._threads)]
