"""How many files and connections this process may have open: raised as far as the system lets it, or refused."""

from __future__ import annotations

import resource
from contextlib import suppress

from pipeline.base.errors import ClusterError
from pipeline.base.words import counted

MAX_WANTED = 1 << 20
"""No process of emsr needs more, and a limit without a bound makes some programs that inherit it close them all."""


def raise_limit() -> int:
    """Raise this process's soft limit (RLIMIT_NOFILE) to the hard one. Returns what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_WANTED if hard == resource.RLIM_INFINITY else min(hard, MAX_WANTED)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return soft if soft != resource.RLIM_INFINITY else MAX_WANTED
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def refuse_too_few(workers: int, each: int, beside: int) -> None:
    """Raise the limit. Raises ClusterError where it does not do for `workers` of `each` descriptors and `beside`."""
    allowed, needed = raise_limit(), workers * each + beside
    if allowed < needed:
        raise ClusterError(
            f"{counted(workers, 'worker')} need about {needed:,} open files and connections of this process, which may "
            f"have {allowed:,}",
            f"a hard limit (`ulimit -Hn`) of {needed:,}, or at most {max(0, (allowed - beside) // each):,} workers",
            "Raise it (LimitNOFILE= of a systemd service, /etc/security/limits.conf, `docker run --ulimit nofile=`), "
            "or take a scheduler of its own (cluster.kind: address)",
        )
