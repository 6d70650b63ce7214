"""Bad sections of a run, listed or detected: whether they are allowed, and what is recorded and printed of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.base.errors import SourceError
from pipeline.base.limits import MAX_BAD_SECTIONS
from pipeline.config.volume import BadSectionsConfig
from pipeline.plan.plan import Plan
from pipeline.sections.survey import Survey
from pipeline.storage.volume import Source, VolumeInfo

LISTED = "listed"
"""The reason recorded for a section that volume.yaml lists."""
MAX_SHOWN = 20
"""Sections named in a message."""

Detect = Callable[[Survey, Source], dict[int, str]]
"""Detects the bad sections among those of a survey: z -> reason, without the listed ones."""


def listed(config: BadSectionsConfig, info: VolumeInfo) -> dict[int, str]:
    """The sections that volume.yaml lists: z -> reason.

    Raises SourceError where one lies outside the volume or none may be bad.
    """
    span = range(info.bounds.start.z, info.bounds.stop.z)
    if outside := [z for z in config.list if z not in span]:
        raise SourceError(
            f"source.bad_sections.list names section {outside[0]}",
            f"sections {span.start} to {span.stop - 1}",
            "Correct the list",
        )
    bad = dict.fromkeys(sorted(config.list), LISTED)
    check_allowed(config, bad, info)
    return bad


def check_allowed(config: BadSectionsConfig, bad: dict[int, str], info: VolumeInfo) -> None:
    """Raises SourceError where the rule refuses bad sections, or no good one is left. `bad` is z -> reason."""
    if bad and config.rule == "refuse":
        named = [f"{z} ({why})" for z, why in bad.items()][:MAX_SHOWN] + ["..."] * (len(bad) > MAX_SHOWN)
        raise SourceError(
            f"{len(bad)} bad sections, {', '.join(named)}, and source.bad_sections.rule is refuse",
            "",
            "Repair them, or use rule: nearest",
        )
    if len(bad) > MAX_BAD_SECTIONS:
        raise SourceError(
            f"{len(bad):,} sections are bad",
            f"at most {MAX_BAD_SECTIONS:,}, all of which the plan records",
            "Repair the volume first, or cut a source.box",
        )
    if len(bad) == info.bounds.shape.z:
        raise SourceError(
            "every section is bad: source.bad_sections leaves none", "at least one good one", "Correct the list"
        )


def record(plan: Plan, bad: dict[int, str], output: str) -> dict[int, dict[str, Any]]:
    """What plan and provenance say of each bad section, by z.

    `why` is the reason, `stand_in` the z of the section that replaces it in windows, `output` what its own output
    section is made from (source.bad_sections.output).
    """
    return {z: {"why": why, "stand_in": plan.section(z), "output": output} for z, why in bad.items()}


def detected(recorded: dict[str, dict[str, Any]]) -> dict[int, str]:
    """The detected sections of a record, z -> reason. KeyError, TypeError or ValueError where the record is damaged."""
    return {int(z): str(one["why"]) for z, one in recorded.items() if one["why"] != LISTED}


def left_empty(recorded: dict[str, dict[str, Any]], first: int) -> frozenset[int]:
    """The sections of a record whose output is left empty, counted from section `first`."""
    return frozenset(int(z) - first for z, one in recorded.items() if one["output"] == "empty")


def describe(recorded: dict[str, dict[str, Any]]) -> list[str]:
    """A line to print for each section of a record, up to MAX_SHOWN of them."""
    made = {"neighbours": "its output is made from its neighbours", "empty": "its output is left empty"}
    lines = [
        f"bad section  {z}: {one['why']}; {one['stand_in']} stands in, {made[one['output']]}"
        for z, one in list(recorded.items())[:MAX_SHOWN]
    ]
    return lines + ([f"bad section  and {len(recorded) - MAX_SHOWN} more"] if len(recorded) > MAX_SHOWN else [])
