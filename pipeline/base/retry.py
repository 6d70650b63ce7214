"""Another try after a passing fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import tenacity

from pipeline.base.errors import TransientError

T = TypeVar("T")


def retrying(call: Callable[[], T], retries: int, again: Callable[[], None] = lambda: None) -> T:
    """`call`, up to `retries` more times after a TransientError, with exponential jitter; the last one is raised. `again` is
    told of every further try.
    """
    retryer = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(TransientError),
        stop=tenacity.stop_after_attempt(retries + 1),
        wait=tenacity.wait_random_exponential(multiplier=0.5, max=30),
        before_sleep=lambda _: again(),
        reraise=True,
    )
    return retryer(call)
