"""Measures how long a finished ledger takes to load, and how long `emsr run` takes to say that a run is finished.

    python benchmarks/resume.py [slabs=1000000] [loaded=10000000]

The first ledger belongs to a real job: `emsr run` is called on it in a process of its own, imports included. No Dask
client is made before something is left to do. Printed are wall and CPU seconds.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml
import zarr
from parts.dask_processes import environment

from pipeline.config import volume as configuration
from pipeline.config.urls import sidecar
from pipeline.plan.receipt import WRITTEN
from pipeline.prepare.place import claim
from pipeline.prepare.prepare import prepare
from pipeline.storage.kv import Store
from pipeline.storage.ledger import FLUSH_RECORDS, RECORD, SNAPSHOT_EVERY, Ledger


class Finished(Ledger):
    """A ledger that writes the segments and snapshots of a finished run, a block of records at a time."""

    def finish(self) -> None:
        for start in range(0, self.tasks, FLUSH_RECORDS):
            records = np.zeros(min(FLUSH_RECORDS, self.tasks - start), RECORD)
            records["index"], records["state"] = np.arange(start, start + len(records)), WRITTEN
            self._apply(records)
            self._seq += 1
            self._put(f"segment-{self._seq:010d}-{self.run_id}", records.tobytes())
            if self._seq % SNAPSHOT_EVERY == 0:
                self._put(f"snapshot-{self._seq:010d}-{self.run_id}", self._pack_snapshot())


def load(folder: str, tasks: int) -> dict[str, float]:
    Finished(Store(f"file://{folder}"), "d" * 64, tasks, "r").finish()
    began, used = time.perf_counter(), time.process_time()
    ledger = Ledger(Store(f"file://{folder}"), "d" * 64, tasks, "s")
    ledger.load()
    assert ledger.counts()["written"] == tasks
    return {
        "loaded": tasks,
        "wall_s": round(time.perf_counter() - began, 2),
        "cpu_s": round(time.process_time() - used, 2),
    }


def run_again(folder: Path, slabs: int) -> dict[str, float]:
    """Times `emsr run` of a finished job of about this many slabs of 8 x 8 voxels. Its source holds no voxels."""
    side = round(slabs**0.5)
    zarr.create_array(folder / "lr", shape=(1, 8 * side, 8 * side), chunks=(1, 1024, 1024), dtype="uint8")
    body = {
        "source": {"url": "lr", "voxel_size_nm": [45, 32, 32]},
        "target": {"url": "sr", "chunk_shape": [1, 64, 64], "shard_shape": [1, 64, 64], "mips": 1, "fidelity": False},
        "network": {"name": "nearest", "scale": 8},
        "work": {"slab_shape": [1, 8, 8]},
    }
    path = folder / "volume.yaml"
    path.write_text(yaml.safe_dump(body))
    prepared = prepare(configuration.load(path))
    store = Store(sidecar(prepared.job.target.url))
    claim(prepared)
    Finished(store, prepared.job.digest, prepared.job.plan.tasks, "r").finish()
    began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.run", str(path)], env=environment(), capture_output=True, text=True, check=True
    )
    wall, now = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "is complete" in done.stdout
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return {"run_again": prepared.job.plan.tasks, "wall_s": round(wall, 2), "cpu_s": round(cpu, 2)}


if __name__ == "__main__":
    slabs, loaded = (int(a) for a in sys.argv[1:] + ["1000000", "10000000"][len(sys.argv) - 1 :])
    with tempfile.TemporaryDirectory() as folder:
        for name, tasks in (("few", slabs), ("many", loaded)):
            print(load(f"{folder}/{name}", tasks), flush=True)
        print(run_again(Path(folder), slabs))
