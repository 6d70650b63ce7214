"""Bad sections of a run, listed or detected: what is allowed, what is recorded of each, and how it is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.base.errors import SourceError
from pipeline.config.volume import BadSectionsConfig
from pipeline.plan.plan import Plan
from pipeline.sections.survey import Survey
from pipeline.storage.volume import Source, VolumeInfo

LISTED = "listed"
SHOWN = 20

Look = Callable[[Survey, Source], dict[int, str]]
"""How sections are looked at: z -> why of the bad ones that are not listed."""


def listed(config: BadSectionsConfig, info: VolumeInfo) -> dict[int, str]:
    """z -> why. SourceError for sections that are not there."""
    span = range(info.bounds.start.z, info.bounds.stop.z)
    if outside := [z for z in config.list if z not in span]:
        raise SourceError(
            f"source.bad_sections.list names section {outside[0]}",
            f"sections {span.start} to {span.stop - 1}",
            "Correct the list",
        )
    bad = dict.fromkeys(sorted(config.list), LISTED)
    allowed(config, bad, info)
    return bad


def allowed(config: BadSectionsConfig, bad: dict[int, str], info: VolumeInfo) -> None:
    """SourceError where the rule refuses bad sections, or no good one is left."""
    if bad and config.rule == "refuse":
        some = ", ".join(f"{z} ({why})" for z, why in list(bad.items())[:SHOWN]) + (", ..." if len(bad) > SHOWN else "")
        raise SourceError(
            f"{len(bad)} bad sections, {some}, and source.bad_sections.rule is refuse",
            "",
            "Repair them, or use rule: nearest",
        )
    if len(bad) == info.bounds.shape.z:
        raise SourceError(
            "every section is bad: source.bad_sections leaves none", "at least one good one", "Correct the list"
        )


def record(plan: Plan, bad: dict[int, str], output: str) -> dict[int, dict[str, Any]]:
    """What plan and provenance say of each: why, which section stands in for it in windows, and what its own output is made from."""
    return {z: {"why": why, "stand_in": plan.section(z), "output": output} for z, why in bad.items()}


def detected(recorded: dict[str, dict[str, Any]]) -> dict[int, str]:
    """z -> why of a record's sections that were not listed. KeyError or TypeError where it is damaged."""
    return {int(z): str(one["why"]) for z, one in recorded.items() if one["why"] != LISTED}


def told(recorded: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each of a record's sections, up to SHOWN."""
    made = {"neighbours": "its output is made from its neighbours", "empty": "its output is left empty"}
    lines = [
        f"bad section  {z}: {one['why']}; {one['stand_in']} stands in, {made[one['output']]}"
        for z, one in list(recorded.items())[:SHOWN]
    ]
    return lines + ([f"bad section  and {len(recorded) - SHOWN} more"] if len(recorded) > SHOWN else [])
