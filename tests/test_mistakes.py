"""Law 7: every mistake in volume.yaml gives one clear message, exit code 2, and touches nothing."""

from __future__ import annotations

import copy
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import texture, tree, write_lr

from pipeline import run
from pipeline.base.errors import ConfigError
from pipeline.config.volume import Config, keys, load
from pipeline.config.yaml_file import parse_bytes

WRONG_TYPES: list[Any] = [
    "x",
    -1,
    1.5,
    True,
    None,
    [],
    {},
    [1],
    {"a": 1},
    "",
    float("nan"),
    float("inf"),
    10**30,
    "\u0000",
]

FULL: dict[str, Any] = {
    "source": {
        "url": "lr.zarr",
        "mip": 0,
        "array": "0",
        "box": {"start": [0, 0, 0], "stop": [4, 32, 32]},
        "voxel_size_nm": [45, 32, 32],
        "intensity_window": None,
        "invert": False,
        "missing_chunks": "error",
        "bad_sections": {"list": [2], "detect": False, "rule": "nearest", "output": "empty"},
        "mask": {"url": "mask.zarr", "mip": 0},
        "skip_empty": False,
    },
    "target": {
        "url": "sr",
        "format": "ome-zarr",
        "chunk_shape": [2, 64, 64],
        "shard_shape": [2, 128, 128],
        "encoding": "blosc-zstd",
        "mips": "auto",
        "fidelity": True,
    },
    "network": {
        "name": "bicubic",
        "scale": 8,
        "preset": None,
        "weights": None,
        "sha256": None,
        "cell": 64,
        "halo": 8,
        "precision": "float32",
        "batch": 1,
    },
    "work": {
        "slab_shape": [2, 16, 16],
        "retries": 3,
        "stall_s": 600,
        "in_flight": 2,
        "budget": {"output_bytes": "10TB"},
    },
    "cluster": {"kind": "local", "workers": 2, "gpus_per_worker": 0, "measured": "doctor.json", "price_per_hour": 2.5},
}
MAY_BE_NULL = {
    "array",
    "box",
    "voxel_size_nm",
    "intensity_window",
    "mask",
    "chunk_shape",
    "shard_shape",
    "encoding",
    "preset",
    "weights",
    "sha256",
    "cell",
    "halo",
}
MAY_BE_NULL |= {"precision", "batch", "slab_shape", "budget", "workers", "address", "gpus_per_worker"}
MAY_BE_NULL |= {"measured", "price_per_hour"}

CONTRADICTIONS: list[tuple[str, Any, str]] = [
    ("source.url", "nowhere.zarr", "nowhere"),
    ("source.url", "ftp://host/x", "ftp"),
    ("source.url", "n5://lr.zarr", "attributes.json"),
    ("source.url", "precomputed://lr.zarr", "info file"),
    ("source.url", "s3://", "bucket"),
    ("source.url", "~nosuchuser/lr.zarr", "knows no home for its ~"),
    ("source.url", "x" * 300, "at most 255 bytes"),
    ("source.mip", 7, "mip"),
    ("source.array", "nope", "nope"),
    ("source.box", {"start": [0, 0, 0], "stop": [99, 32, 32]}, "reaches out"),
    ("source.box", {"start": [-1, 0, 0], "stop": [4, 32, 32]}, "reaches out"),
    ("source.box", {"start": [4, 0, 0], "stop": [4, 32, 32]}, "greater than"),
    ("source.box", {"start": [0, 0, 0]}, "stop"),
    ("source.voxel_size_nm", [45, 0, 32], "positive"),
    ("source.voxel_size_nm", [45, 99, 32], "voxel_size_nm"),
    ("source.intensity_window", [0, 256], "0 to 255"),
    ("source.intensity_window", [-1, 255], "0 to 255"),
    ("source.intensity_window", [0.5, 255], "0 to 255"),
    ("source.intensity_window", [9, 3], "low < high"),
    ("source.missing_chunks", {"fill": 256}, "255"),
    ("source.missing_chunks", {"value": 0}, "fill"),
    ("source.missing_chunks", "zero", "error"),
    ("source.bad_sections", {"list": [400]}, "400"),
    ("source.bad_sections", {"list": [-1]}, "-1"),
    ("source.bad_sections", {"list": list(range(6))}, "every section"),
    ("source.bad_sections", {"list": [1], "rule": "refuse"}, "refuse"),
    ("source.bad_sections", {"output": "black"}, "empty"),
    ("source.bad_sections", {"rule": "furthest"}, "nearest"),
    ("source.mask", {"url": "nomask"}, "nomask"),
    ("source.mask", {"mip": 1}, "url"),
    ("target.url", "lr.zarr", "lie in one another"),
    ("target.url", "lr.zarr/sub", "lie in one another"),
    ("target.url", "https://host/sr", "read only"),
    ("target.url", "s3://bucket", "root"),
    ("target.url", "n5://sr", "n5"),
    ("target.url", "occupied", "did not plan"),
    ("target.format", "zarr", "ome-zarr"),
    ("target.format", "precomputed", "encoding"),
    ("target.chunk_shape", [2, 48, 64], "multiple"),
    ("target.chunk_shape", [0, 64, 64], "at least 1"),
    ("target.shard_shape", [3, 128, 128], "whole"),
    ("target.shard_shape", [2, 128, 100], "multiple"),
    ("target.encoding", "jpeg", "ome-zarr"),
    ("target.encoding", "lzma", "zstd"),
    ("target.mips", 0, "1"),
    ("target.mips", 15, "one voxel"),
    ("target.mips", "some", "auto"),
    ("network.name", "gpemsr", "network.weights is not given"),
    ("network.name", "edvr", "not in this version"),
    ("network.name", "bicubc", "bicubic"),
    ("network.scale", 4, "8"),
    ("network.scale", 8.5, "8"),
    ("network.preset", "paper", "preset"),
    ("network.weights", "builtin", "weights"),
    ("network.sha256", "abc", "64 hexadecimal"),
    ("network.sha256", "0" * 64, "sha256"),
    ("network.cell", 60, "multiple of 8"),
    ("network.cell", 0, "8"),
    ("network.halo", 5, "multiple of 8"),
    ("network.halo", 0, "cell borders"),
    ("network.precision", "float64", "float32"),
    ("network.precision", "float16", "precision"),
    ("network.batch", 0, "1"),
    ("network.batch", 65, "64"),
    ("network.batch", 2, "Remove network.batch"),
    ("work.slab_shape", [3, 16, 16], "whole shards"),
    ("work.slab_shape", [2, 17, 16], "whole shards"),
    ("work.retries", -1, "0"),
    ("work.stall_s", 0, "1"),
    ("work.in_flight", 0, "1"),
    ("work.budget", {"output_bytes": "1kB"}, "budget"),
    ("work.budget", {"output_bytes": "much"}, "500GB"),
    ("work.budget", {"bytes": 3}, "output_bytes"),
    ("cluster.kind", "condor", "local"),
    ("cluster", {"kind": "slurm", "host": "lo"}, "cluster.slurm"),
    ("cluster", {"kind": "slurm", "slurm": {"walltime": "12:00:00", "memory": "8GB"}}, "cluster.host"),
    ("cluster", {"kind": "slurm", "host": "lo", "slurm": {"walltime": 43200, "memory": "8GB"}}, "in quotes"),
    ("cluster", {"kind": "slurm", "host": "lo", "slurm": {"walltime": "0:00:00", "memory": "8GB"}}, "in quotes"),
    ("cluster", {"kind": "slurm", "host": "lo", "slurm": {"walltime": "12:00:00", "memory": "much"}}, "500GB"),
    ("cluster", {"kind": "slurm", "host": "lo", "slurm": {"walltime": "12:00:00"}}, "memory"),
    ("cluster", {"kind": "kubernetes"}, "cluster.kubernetes"),
    ("cluster", {"kind": "kubernetes", "kubernetes": {"image": "\n", "memory": 1}}, "one line"),
    (
        "cluster",
        {"kind": "kubernetes", "workers": 1, "adapt": {"maximum": 2}, "kubernetes": {"image": "x", "memory": 1}},
        "not both",
    ),
    (
        "cluster",
        {"kind": "kubernetes", "adapt": {"minimum": 3, "maximum": 2}, "kubernetes": {"image": "x", "memory": 1}},
        "adapt.minimum",
    ),
    (
        "cluster",
        {"kind": "address", "address": "tcp://a:1", "security": {"ca_file": "a", "cert_file": "b", "key_file": "c"}},
        "tls://",
    ),
    (
        "cluster",
        {"kind": "address", "address": "tls://a:1", "security": {"ca_file": "a", "cert_file": "b", "key_file": "c"}},
        "cannot be read",
    ),
    ("cluster.adapt", {"maximum": 2}, "cluster.kind"),
    ("cluster.host", "lo", "cluster.kind"),
    ("cluster.kind", "address", "cluster.address"),
    ("cluster.workers", 0, "1"),
    ("cluster.address", "tcp://here:1", "cluster.kind"),
    ("cluster.gpus_per_worker", -2, "0"),
    ("cluster.gpus_per_worker", 2, "1"),
    ("cluster.measured", "two\nlines", "one line"),
    ("cluster.price_per_hour", 0, "greater than 0"),
    ("cluster.price_per_hour", True, "number"),
    ("cluster.price_per_hour", float("inf"), "finite number"),
]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_lr(tmp_path / "lr.zarr", texture((6, 48, 40)))
    write_lr(tmp_path / "mask.zarr", texture((6, 48, 40)))
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "thesis.txt").write_text("do not delete")
    return tmp_path


def refused(place: Path, text: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one message of a run that must end with exit code 2 and leave every file as it was."""
    path = place / "volume.yaml"
    path.write_text(text)
    before = tree(place)
    code = run.main([str(path)])
    said = capsys.readouterr()
    assert code == 2, f"exit code {code} for:\n{text}\n{said.err}"
    assert "Traceback" not in said.err
    assert "a fault inside emsr" not in said.err, said.err
    assert said.err.strip()
    assert max(len(line) for line in said.err.splitlines()) < 700
    assert tree(place) == before, "something was written"
    return said.err


def changed(path: tuple[str, ...], value: Any) -> str:
    body = copy.deepcopy(FULL)
    parent = body
    for part in path[:-1]:
        parent = parent[part]
    parent[path[-1]] = value
    return yaml.safe_dump(body)


def leaves(body: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    return [p for k, v in body.items() for p in ([(*path, k)] + (leaves(v, (*path, k)) if isinstance(v, dict) else []))]


def test_the_full_example_is_accepted(place: Path) -> None:
    (place / "volume.yaml").write_text(yaml.safe_dump(FULL))
    assert load(place / "volume.yaml").source.url.endswith("lr.zarr")
    assert run.main([str(place / "volume.yaml")]) == 0


@pytest.mark.parametrize(
    ("key", "value", "word"), CONTRADICTIONS, ids=[f"{k}={str(v)[:24]}" for k, v, _ in CONTRADICTIONS]
)
def test_contradictions_are_refused_by_name(
    key: str, value: Any, word: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert word in refused(place, changed(tuple(key.split(".")), value), capsys)


def test_wrong_types_in_every_key(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each key with each value of a wrong type: refused, or (where the value happens to be allowed) as before."""
    count = 0
    for path in leaves(FULL):
        for value in WRONG_TYPES:
            if value is None and path[-1] in MAY_BE_NULL:
                continue
            text = changed(path, value)
            try:
                (place / "volume.yaml").write_text(text)
                config = load(place / "volume.yaml")
            except ConfigError:
                pass
            else:
                if _could_be_meant(path, value, config):
                    continue
            said = refused(place, text, capsys)
            assert "volume.yaml:" in said or "emsr:" in said
            count += 1
    assert count > 200


def _could_be_meant(path: tuple[str, ...], value: Any, config: Config) -> bool:
    """Wrong-looking values that are right: a flag that is true, an empty mapping of optional keys, a free name."""
    return (
        path[-1] in ("skip_empty", "fidelity", "detect", "invert")
        or path[0] in ("work", "cluster")
        or value in ({}, [])
        or ((path[-1], value) in (("url", "x"), ("list", [1])) and path[:2] != ("source", "url"))
    )


def test_unknown_keys_name_the_nearest(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, allowed in keys().items():
        for key in allowed:
            body = copy.deepcopy(FULL)
            parent: Any = body
            for part in path:
                parent = parent.get(part) if isinstance(parent, dict) else None
            if not isinstance(parent, dict):
                continue
            parent[key + "s" if not key.endswith("s") else key[:-1]] = 1
            said = refused(place, yaml.safe_dump(body), capsys)
            assert "unknown key" in said
            assert f"Did you mean {key}?" in said


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "[]",
        "source: [",
        "source: {url: a",
        "\t- x",
        "source:\n  url: a\n url: b",
        "!!python/object:os.system {}",
        "source: &a\n  b: *a",
        "? [1]\n: 2",
        "1: 2",
        "source: {url: x}\nsource: {url: y}",
        "%",
        "\x07",
        "{" * 60,
    ],
)
def test_what_is_not_yaml_is_refused(text: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "volume.yaml" in refused(place, text, capsys)


@pytest.mark.parametrize("name", ["missing.yaml", ".", "binary.yaml"])
def test_files_that_cannot_be_read(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    assert run.main([str(tmp_path / name)]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_an_address_where_nobody_listens(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.cluster.connect.CONNECT_S", 1)
    body = copy.deepcopy(FULL) | {"cluster": {"kind": "address", "address": "tcp://127.0.0.1:9"}}
    assert "no Dask scheduler answers" in refused(place, yaml.safe_dump(body), capsys)


def test_an_address_where_somebody_speaks_no_dask(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.cluster.connect.CONNECT_S", 1)
    monkeypatch.setattr("pipeline.cluster.patient_client.HANDSHAKE_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        body = copy.deepcopy(FULL) | {"cluster": {"kind": "address", "address": address}}
        assert "perhaps another program listens there" in refused(place, yaml.safe_dump(body), capsys)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("10TB", 10**13),
        ("1.5 GiB", 3 * 2**29),
        (7, 7),
        ("7", 7),
        ("2kB", None),
        ("2KB", 2000),
        ("-1", None),
        (True, None),
    ],
)
def test_sizes(text: object, size: int | None) -> None:
    if size is None:
        with pytest.raises(ValueError, match="500GB"):
            parse_bytes(text)
    else:
        assert parse_bytes(text) == size
