"""constraints.txt: what CI ran. It names all that setup.cfg asks for, in versions that setup.cfg allows."""

from __future__ import annotations

import configparser
import re

import pytest
from conftest import REPOSITORY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# dask-cuda names one version of Dask, and CI has no GPU.
NOT_IN_CI = {"dask-cuda"}
LINES = (REPOSITORY / "constraints.txt").read_text().splitlines()


def wanted() -> list[Requirement]:
    """All requirements of setup.cfg, those of its extras included; emsr itself is left out."""
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    texts = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    lines = [line for text in texts for line in text.splitlines() if line and not line.startswith("#")]
    found = [Requirement(line) for line in lines]
    return [r for r in found if canonicalize_name(r.name) not in {"emsr", *NOT_IN_CI}]


@pytest.mark.parametrize("line", LINES)
def test_a_line_is_a_name_and_one_version(line: str) -> None:
    """So no path of a machine and no address of an index is in it."""
    assert re.fullmatch(r"[A-Za-z0-9][\w.\-]*==[\w.+!]+", line)


def test_every_requirement_is_named_in_a_version_that_it_allows() -> None:
    pinned = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in LINES)}
    assert len(pinned) == len(LINES)
    for requirement in wanted():
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} is {version} in constraints.txt"
