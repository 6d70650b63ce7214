"""What every command does around its work: one clear message for a mistake, an exit code, no traceback for a user."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from pipeline.base.errors import ConfigError, EmsrError
from pipeline.base.waits import watched_command

INTERRUPTED = 130


def guarded(work: Callable[[], int]) -> int:
    """The exit code of `work`; 2 for a user's mistake, 1 for another fault, each with a message; 130 for Ctrl-C.

    What `work` waits for is said, and does not last for ever: see `waits`.
    """
    try:
        with watched_command():
            return work()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except EmsrError as error:
        print(f"emsr: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("emsr: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return 1
    except Exception as error:
        if os.environ.get("EMSR_DEBUG"):
            traceback.print_exc()
        print(
            f"emsr: a fault inside emsr: {type(error).__name__}: {error}. "
            "Set EMSR_DEBUG=1 for the traceback and report it.",
            file=sys.stderr,
        )
        return 1
