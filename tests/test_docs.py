"""The documents say what the code does: keys, defaults, commands, flags, modules, links."""

from __future__ import annotations

import contextlib
import importlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from conftest import REPOSITORY
from pydantic import BaseModel

from pipeline import __version__
from pipeline.__main__ import COMMANDS
from pipeline.config import stage as train_config
from pipeline.config import table as evaluate_config
from pipeline.config import yaml_file
from pipeline.config.volume import Config, keys, load

PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("deploy/*.md")])
README_COMMANDS = {
    "Install and run": "python3 -m venv ~/emsr && ~/emsr/bin/pip install . "
    "&& ~/emsr/bin/python examples/make_phantom.py && ~/emsr/bin/emsr run examples/quickstart.yaml",
    "Install and test": "python3 -m venv ~/emsr && ~/emsr/bin/pip install '.[test]' "
    "&& ~/emsr/bin/python -m pytest -n 2 --dist loadfile",
}
FLAGS = {
    "run": ["volume", "--dry-run"],
    "status": ["volume"],
    "verify": ["volume", "--sample", "--requeue"],
    "view": ["volume", "--state", "--port"],
    "convert": ["SOURCE", "TARGET", "--voxel-size-nm", "--chunk"],
    "train": ["stage"],
    "evaluate": ["table"],
    "doctor": ["volume", "--json"],
}
"""Flags are few: what changes a run stands in volume.yaml."""


def page(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(("heading", "command"), README_COMMANDS.items())
def test_the_readme_has_the_commands_that_ci_extracts(heading: str, command: str) -> None:
    """The first fenced block after each heading is one line, and .ci/run's own program finds just that."""
    after = page("README.md").split(f"\n## {heading}\n", 1)[1]
    block = re.search(r"^```\w*\n(.*?)^```$", after, re.M | re.S)
    assert block is not None
    assert block[1] == command + "\n"
    program = re.search(r"awk -v heading=\"## \$1\" '(.*)' README\.md", page(".ci/run"))
    assert program is not None
    assert f"command_of '{heading}'" in page(".ci/run")
    if shutil.which("awk") is None:
        pytest.skip("no awk here")
    found = subprocess.run(
        ["awk", "-v", f"heading=## {heading}", program[1], "README.md"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == command + "\n"


def yaml_blocks() -> list[Any]:
    found = []
    for path in PAGES:
        for n, block in enumerate(re.findall(r"^```yaml\n(.*?)^```$", path.read_text(encoding="utf-8"), re.M | re.S)):
            found.append(pytest.param(block, id=f"{path.relative_to(REPOSITORY)}-{n}"))
    return found


@pytest.mark.parametrize("block", yaml_blocks())
def test_every_yaml_block_is_a_valid_file(block: str, tmp_path: Path) -> None:
    """A stage.yaml has `stage`, a table.yaml `volumes`; all others are volume.yaml."""
    (tmp_path / "block.yaml").write_text(block, encoding="utf-8")
    found = yaml.safe_load(block)
    read = train_config.load if "stage" in found else evaluate_config.load if "volumes" in found else load
    read(tmp_path / "block.yaml")


def test_every_key_of_training_and_evaluation_is_documented() -> None:
    for name, model in {"training": train_config.StageConfig, "evaluation": evaluate_config.TableConfig}.items():
        words = set(re.findall(r"\w+", page(f"docs/{name}.md")))
        wanted = {key for allowed in yaml_file.keys(model).values() for key in allowed}
        assert wanted <= words, wanted - words


@pytest.mark.parametrize("path", sorted((REPOSITORY / "examples" / "train").rglob("*.yaml")), ids=lambda p: p.stem)
def test_training_examples_are_valid(path: Path) -> None:
    train_config.load(path)


def key_paths() -> set[str]:
    return {".".join((*path, key)) for path, allowed in keys().items() for key in allowed}


def test_every_key_is_documented_and_no_other() -> None:
    text = page("docs/volume-yaml.md")
    named = set(re.findall(r"`((?:source|target|network|work|cluster)(?:\.\w+)*)`", text))
    assert named == key_paths()


def test_every_page_names_only_keys_that_exist() -> None:
    for path in [p for p in PAGES if p.name not in ("training.md", "evaluation.md")]:
        for name in re.findall(
            r"`((?:source|target|network|work|cluster)\.\w+(?:\.\w+)*)[`:]", path.read_text(encoding="utf-8")
        ):
            assert name in key_paths(), f"{path.name}: {name}"


def test_defaults_are_those_of_the_code() -> None:
    """Third column of the tables of keys."""
    stated = dict(re.findall(r"^\| `([\w.]+)` \| [^|]+ \| ([^|]+) \|", page("docs/volume-yaml.md"), re.M))
    assert set(stated) == {name for name in key_paths() if "." in name}
    for name, text in stated.items():
        model: type[BaseModel] = Config
        *parents, last = name.split(".")
        for parent in parents:
            (model,) = _models_in(model.model_fields[parent].annotation)
        field = model.model_fields[last]
        if field.is_required():
            assert text == "required", name
        elif isinstance(field.default, BaseModel):
            assert text == "none listed", name
        elif field.default is None:
            assert text == "none", name
        else:
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            assert yaml.safe_load(text.strip("`")) == default, name


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def test_the_design_names_every_room_and_its_files() -> None:
    """One row of the table for each room, with its files and no other."""
    section = page("docs/design.md").split("\n## 2. Rooms\n", 1)[1].split("\n## 3.", 1)[0]
    rows = {
        room: set(re.findall(r"`(\w+)`", text))
        for room, text in re.findall(r"^\| `([\w/]+)` \| (.*) \|$", section, re.M)
    }
    pipeline = REPOSITORY / "pipeline"
    rooms = {str(p.parent.relative_to(pipeline)) for p in pipeline.rglob("*/__init__.py")}
    assert set(rows) == rooms
    for room, named in rows.items():
        assert {p.stem for p in (pipeline / room).glob("*.py")} - {"__init__"} == named, room


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_are_frozen(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        importlib.import_module(f"pipeline.{command}").main(["--help"])
    found = re.findall(r"^  (?:-h, )?(-{0,2}\w[\w-]*)", capsys.readouterr().out, re.M)
    assert sorted(found) == sorted([*FLAGS[command], "--help"])


@pytest.mark.parametrize("command", COMMANDS)
def test_the_readme_names_every_command_and_flag(command: str) -> None:
    text = page("README.md")
    assert f"`emsr {command} " in text
    for flag in FLAGS[command]:
        assert not flag.startswith("--") or flag in text or flag == "--chunk"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", path.read_text(encoding="utf-8")):
        assert "://" not in target
        assert (path.parent / target).exists(), target


def test_versions_agree() -> None:
    assert f"## {__version__}" in page("CHANGELOG.md")
    assert yaml.safe_load(page("CITATION.cff"))["version"] == __version__


def test_containers_publish_to_this_machine_only() -> None:
    compose = yaml.safe_load(page("deploy/compose.yaml"))
    assert set(compose["services"]) == {"scheduler", "worker", "client"}
    for service in compose["services"].values():
        assert "network_mode" not in service
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", []))
