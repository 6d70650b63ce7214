"""Faults of sources and servers: metadata and chunks that change, stores that fail, clocks that jump."""

from __future__ import annotations

import glob
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import boto3
import fault_servers
from conftest import texture, volume_yaml, write_lr
from fault_cluster import cluster, kill, workers
from fault_scene import SHAPE, Scene, hold

FAKETIME = glob.glob("/usr/lib/*/faketime/libfaketimeMT.so.1")


def source_changed(scene: Scene) -> None:
    """The source's metadata change under way: a worker that opens it then ends the run, and the next run is refused.

    Once they are restored a third run goes on.
    """
    document = scene.own() / "0" / "zarr.json"
    before = document.read_bytes()
    with scene.command("run", str(scene.yaml), STANDIN_DELAY_S="0.2") as client:
        alive = scene.under_way(client)
        document.write_bytes(before.replace(b'"fill_value": 0', b'"fill_value": 7'))
        if found := workers(client):
            kill(found[0].pid)
        code, said = scene.end(client)
    changed = "changed while the run was going on" in said
    hold(not alive or (code in (1, 2) and changed), "wrong answer", f"{code}: {said}")
    scene.run(2, "fingerprint was")
    document.write_bytes(before)
    scene.crash(scene.last_ended())


def _broken_chunk(breaks: Callable[[Scene, Path], object], apart: bool) -> Callable[[Scene], None]:
    def fault(scene: Scene) -> None:
        source = scene.own()
        if not apart:
            _mended_chunk(scene, source, breaks)
            return
        with cluster(scene):
            _mended_chunk(scene, source, breaks)

    return fault


def _mended_chunk(scene: Scene, source: Path, breaks: Callable[[Scene, Path], object]) -> None:
    chunk = scene.rng.choice(sorted(f for f in (source / "0" / "c").rglob("*") if f.is_file()))
    whole = chunk.read_bytes()
    breaks(scene, chunk)
    said = scene.answer("run", want=(1, 2))
    hold("Chunk" in said or "chunk" in said, "wrong answer", said)
    chunk.write_bytes(whole)
    scene.run()


def _cut(scene: Scene, chunk: Path) -> None:
    chunk.write_bytes(chunk.read_bytes()[: scene.rng.randrange(1, 40)])


def _lose(scene: Scene, chunk: Path) -> None:
    chunk.unlink()


chunk_cut, chunk_absent = _broken_chunk(_cut, False), _broken_chunk(_lose, False)
chunk_cut_apart, chunk_absent_apart = _broken_chunk(_cut, True), _broken_chunk(_lose, True)


def chunk_absent_for_a_moment(scene: Scene) -> None:
    """Chunks are away for half a second under way, as on a network file system; whatever the run answers, the next one
    closes.
    """
    chunks = sorted(f for f in (scene.own() / "0" / "c").rglob("*") if f.is_file())
    with scene.command("run", str(scene.yaml), STANDIN_DELAY_S="0.1") as client:
        for _ in range(3):
            if scene.under_way(client):
                away = scene.rng.sample(chunks, min(4, len(chunks)))
                for chunk in away:
                    chunk.rename(chunk.with_name(f"{chunk.name}.away"))
                time.sleep(0.5)
                for chunk in away:
                    chunk.with_name(f"{chunk.name}.away").rename(chunk)
        code, said = scene.end(client)
    hold(code in (0, 1), "wrong answer", f"{code}: {said}")
    scene.run()


def source_mended_in_place(scene: Scene) -> None:
    """A cluster that stays has done another job of the same source before its voxels were replaced."""
    source = scene.own()
    shutil.move(source, f"{source}.right")
    write_lr(source, texture(SHAPE, seed=5))
    with cluster(scene):
        named = scene.yaml.read_text()
        scene.yaml.write_text(named.replace(str(scene.place), str(scene.folder / "first")))
        scene.run()
        shutil.rmtree(source)
        shutil.move(f"{source}.right", source)
        scene.yaml.write_text(named)
        scene.run()


def web_fails(scene: Scene) -> None:
    """A third of a web server's answers are 500, 503, 429, cut off, silent or slow: a few runs at most close."""
    (scene.folder / "own").mkdir()
    with fault_servers.web(str(scene.folder / "own"), scene.rng.randrange(1 << 30)) as server:
        scene.own(server.url)
        server.share = 1 / 3
        for _ in range(5):
            with scene.command("run", str(scene.yaml), TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS="2") as command:
                code, said = scene.end(command)
            if code == 0:
                break
        hold(code == 0, "wrong answer", said)
        server.share = 0.0
        scene.check()
        scene.verifies = False


def _web_dies(*kinds: str) -> Callable[[Scene], None]:
    def fault(scene: Scene) -> None:
        (scene.folder / "own").mkdir()
        with fault_servers.web(str(scene.folder / "own")) as server:
            scene.own(server.url, work__stall_s=30)
            server.kinds, server.silence_s = kinds, 100.0
            environ = {"TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "2", "STANDIN_DELAY_S": "0.1"}
            with scene.command("run", str(scene.yaml), **environ) as client:
                if scene.under_way(client):
                    server.share = 1.0
                code, said = scene.end(client)
            hold(code in (0, 1, 2), "wrong answer", f"{code}: {said}")
            server.share = 0.0
            scene.run()
            scene.check()
            scene.verifies = False

    return fault


web_dies, web_falls_silent = _web_dies("dead"), _web_dies("silence")


def failing_s3(scene: Scene) -> None:
    """A third of the requests to S3 fails by 500, 503, 429, a cut or silence, whether carried out or not."""
    with fault_servers.s3(seed=scene.rng.randrange(1 << 30)) as gateway:
        environ = fault_servers.s3_environment(gateway)
        environ["TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS"] = "2"  # so silence of gateway.silence_s is given up
        client = boto3.client(
            "s3",
            endpoint_url=gateway.url,
            region_name="us-east-1",
            aws_access_key_id="nobody",
            aws_secret_access_key="nothing",
        )
        client.create_bucket(Bucket="brain")
        source = Path(scene.source)
        for file in source.rglob("*"):
            if file.is_file():
                client.put_object(Bucket="brain", Key=f"in/{file.relative_to(source)}", Body=file.read_bytes())
        gateway.share = 1 / 3
        volume_yaml(scene.yaml, "s3://brain/in", "s3://brain/out", **scene.keys)
        code, said = 2, ""
        for _ in range(5):  # a command may give up, with a message; the next one goes on
            with scene.command("run", str(scene.yaml), **environ) as command:
                code, said = scene.end(command)
            if code == 0:
                break
        gateway.share = 0
        scene.answer("verify", **environ)
        scene.verifies = False
        hold(code == 0, "wrong answer", said)
        hold(set(gateway.requests) >= {*fault_servers.KINDS}, "wrong answer", gateway.requests)
        for item in (
            client.get_paginator("list_objects_v2").paginate(Bucket="brain", Prefix="out").search("Contents[].Key")
        ):
            file = (
                scene.folder / "sr" / item.removeprefix("out/")
                if item.startswith("out/")
                else scene.folder / "sr.emsr" / item.removeprefix("out.emsr/")
            )
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(client.get_object(Bucket="brain", Key=item)["Body"].read())
        for name in ("zarr.json", "fidelity/zarr.json"):  # they name the source, which is another one here
            shutil.copy(scene.undisturbed / "sr" / name, scene.folder / "sr" / name)


def clock_jumps(scene: Scene) -> None:
    """The clock of all processes jumps under way: forward by hours, back by a minute.

    tensorstore's thread pool waits by the time of day, so that a clock set back holds it up for as long.
    `pipeline.cluster.steady_clock` spares what Dask would wait.
    """
    scene.write()
    clock = scene.folder / "clock"
    clock.write_text("+0s")
    # Only what tells the time of day jumps, as when a real clock is set.
    environ = {
        "LD_PRELOAD": FAKETIME[0],
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    with scene.command("run", str(scene.yaml), STANDIN_DELAY_S="0.05", **environ) as client:
        for _ in range(3):
            if scene.under_way(client):
                clock.write_text(f"{scene.rng.choice((-60, -5, 60, 9000)):+d}s")
        code, said = scene.end(client)
    hold(code == 0, "wrong answer", said)
