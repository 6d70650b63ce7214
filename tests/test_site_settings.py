"""Dask's configuration of a site: what forbids a cluster is one message with the key and where it is set."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import main_job, texture, tree, volume_yaml, write_lr

from pipeline.cluster.site_settings import start_failed


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_lr(tmp_path / "lr.zarr", texture((2, 16, 16)))
    return volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", network__name="nearest")


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("DASK_DISTRIBUTED__WORKER__PRELOAD", '["no_such_module"]', "No module named 'no_such_module'"),
        ("DASK_DISTRIBUTED__NANNY__PRELOAD", '["no_such_module"]', "No module named 'no_such_module'"),
        ("DASK_DISTRIBUTED__SCHEDULER__PRELOAD", '["no_such_module"]', "No module named 'no_such_module'"),
        ("DASK_TEMPORARY_DIRECTORY", "/proc/nope", "No such file or directory"),
        ("DASK_DISTRIBUTED__COMM__TLS__MIN_VERSION", "7", "is not supported"),
        ("DASK_DISTRIBUTED__SCHEDULER", "abc", "a mapping of keys to values"),
        ("DASK_DISTRIBUTED__LOGGING", "5", "Dask cannot read its configuration"),
        ("DASK_INTERNAL_INHERIT_CONFIG", "x", "Dask cannot read its configuration"),
    ],
)
def test_a_variable_that_forbids_the_cluster(path: Path, variable: str, value: str, said: str) -> None:
    before = tree(path.parent)
    done = main_job(path, "run", check=False, **{variable: value})
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert variable in done.stderr
    assert "Traceback" not in done.stderr
    assert tree(path.parent) == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("distributed: [unclosed\n", "is malformed"),
        ("distributed:\n  worker:\n    preload: [no_such_module]\n", "distributed.worker.preload"),
        ("distributed:\n  scheduler: 7\n", "distributed.scheduler: 7"),
        ("temporary-directory: /proc/nope\n", "temporary-directory"),
    ],
)
def test_a_file_that_forbids_the_cluster(path: Path, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "site.yaml").write_text(text)
    done = main_job(path, "run", check=False, DASK_CONFIG=str(tmp_path / "conf"))
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "site.yaml" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_a_site_may_ask_for_ends_well(path: Path) -> None:
    """The cluster has encryption. It does without what would end it."""
    main_job(
        path,
        "run",
        DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION="True",
        DASK_DISTRIBUTED__COMM__DEFAULT_SCHEME="ucx",
        DASK_DISTRIBUTED__SCHEDULER__IDLE_TIMEOUT="10ms",
        DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL="abc",
        DASK_DISTRIBUTED__SCHEDULER__WORK_STEALING="False",
        DASK_DISTRIBUTED__WORKER__MULTIPROCESSING_METHOD="fork",
    )


def test_the_first_cause_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a chain of errors, and in one line of bounded length."""
    monkeypatch.setenv("DASK_DISTRIBUTED__SOMETHING", "quoted-value")
    try:
        try:
            raise ValueError("first\n" + "x" * 1000 + "quoted-value")
        except ValueError as error:
            raise RuntimeError("second") from error
    except RuntimeError as error:
        message = str(start_failed("nothing starts", error))
    assert "ValueError: first x" in message
    assert "second" not in message
    assert "distributed.something (environment variable DASK_DISTRIBUTED__SOMETHING)" in message
    assert len(message) < 600
