"""Retries after transient errors."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TypeVar

import tenacity

from pipeline.base.errors import TransientError
from pipeline.base.waits import waiting

T = TypeVar("T")


def retrying(call: Callable[[], T], retries: int, on_retry: Callable[[], None] = lambda: None) -> T:
    """The result of `call`, which is repeated up to `retries` times while it raises TransientError.

    The waits between tries are random and grow exponentially, up to 30 s. `on_retry` is called before every repetition.
    Raises the last TransientError, and any other error at once.
    """
    retryer = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(TransientError),
        stop=tenacity.stop_after_attempt(retries + 1),
        wait=tenacity.wait_random_exponential(multiplier=0.5, max=30),
        before_sleep=lambda _: on_retry(),
        sleep=_sleep,
        reraise=True,
    )
    return retryer(call)


def _sleep(seconds: float) -> None:
    """A wait of our own, which is no stall."""
    with waiting("another try after a passing fault", math.inf):
        time.sleep(seconds)
