"""All kinds of faults by name, what each needs of the machine, and what must hold after one."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import fault_crews as crews
import fault_locks as locks
import fault_processes as processes
import fault_records as records
import fault_slabs as slabs
import fault_sources as sources
import fault_storage as storage
from fault_scene import Scene

FAULTS: dict[str, Callable[[Scene], None]] = {
    "kill-workers": processes.kill_workers,
    "kill-client": processes.kill_client,
    "kill-everything": processes.kill_everything,
    "kill-nanny": processes.kill_nanny,
    "kill-scheduler": processes.kill_scheduler,
    "scheduler-stops-for-a-while": processes.scheduler_stops_for_a_while,
    "worker-stops-for-a-while": processes.worker_stops_for_a_while,
    "worker-stops-for-good": processes.worker_stops_for_good,
    "workers-end-by-lifetime": processes.workers_end_by_lifetime,
    "terminal-ends": processes.terminal_ends,
    "asked-to-end": processes.asked_to_end,
    "asked-twice": processes.asked_twice,
    "asked-early": processes.asked_early,
    "nobody-listens": processes.nobody_listens,
    "small-files-only": processes.small_files_only,
    "few-files-open": processes.few_files_open,
    "few-requests-a-second": processes.few_requests_a_second,
    "slab-fails": slabs.slab_fails,
    "slab-hangs": slabs.slab_hangs,
    "slab-exhausts-memory": slabs.slab_exhausts_memory,
    "two-clients": locks.two_clients,
    "two-runs-at-once": locks.two_runs_at_once,
    "suspended-client": locks.suspended_client,
    "unreadable-lock": locks.unreadable_lock,
    "lock-of-a-dead-machine": locks.lock_of_a_dead_machine,
    "left-lock-files": locks.left_lock_files,
    "full-disk": storage.full_disk,
    "read-only": storage.read_only,
    "disk-full-for-a-while": storage.disk_full_for_a_while,
    "shard-flipped": storage.shard_flipped,
    "shard-cut": storage.shard_cut,
    "shard-zeroed": storage.shard_zeroed,
    "shard-extended": storage.shard_extended,
    "shard-lost": storage.shard_lost,
    "shard-swapped": storage.shard_swapped,
    "shard-rots-under-way": storage.shard_rots_under_way,
    "metadata-rots": storage.metadata_rots,
    "target-moves": storage.target_moves,
    "sidecar-lost": storage.sidecar_lost,
    "another-plan": storage.another_plan,
    "segment-damaged": records.segment_damaged,
    "segment-lost-behind-a-snapshot": records.segment_lost_behind_a_snapshot,
    "snapshot-damaged": records.snapshot_damaged,
    "snapshots-lost": records.snapshots_lost,
    "plan-damaged": records.plan_damaged,
    "reasons-damaged": records.reasons_damaged,
    "verify-killed": records.verify_killed,
    "requeue-during-a-run": records.requeue_during_a_run,
    "source-changed": sources.source_changed,
    "chunk-cut": sources.chunk_cut,
    "chunk-cut-on-a-standing-cluster": sources.chunk_cut_apart,
    "chunk-absent": sources.chunk_absent,
    "chunk-absent-on-a-standing-cluster": sources.chunk_absent_apart,
    "chunk-absent-for-a-moment": sources.chunk_absent_for_a_moment,
    "source-mended-in-place": sources.source_mended_in_place,
    "web-fails": sources.web_fails,
    "web-dies": sources.web_dies,
    "web-falls-silent": sources.web_falls_silent,
    "failing-s3": sources.failing_s3,
    "clock-jumps": sources.clock_jumps,
    "worker-without-source": crews.worker_without_source,
    "worker-elsewhere": crews.worker_elsewhere,
    "worker-that-only-reads": crews.worker_that_only_reads,
    "worker-with-a-full-disk": crews.worker_with_a_full_disk,
    "worker-of-another-commit": crews.worker_of_another_commit,
    "target-moves-on-a-standing-cluster": crews.target_moves_on_a_standing_cluster,
    "two-jobs-on-a-standing-cluster": crews.two_jobs_on_a_standing_cluster,
}

_NEEDS_MODULE = {
    "pipeline.storage.swapped_file": (
        "suspended-client unreadable-lock lock-of-a-dead-machine left-lock-files two-runs-at-once"
    ),
    "pipeline.worker.stored": (
        "metadata-rots segment-lost-behind-a-snapshot plan-damaged shard-rots-under-way requeue-during-a-run"
    ),
    "pipeline.base.waits": "workers-end-by-lifetime few-requests-a-second web-dies web-falls-silent",
    "pipeline.schedule.crew": (
        "worker-without-source worker-elsewhere worker-that-only-reads worker-with-a-full-disk worker-of-another-commit"
    ),
}
"""Kinds by the module that minds them: without it a fault of that kind is known to do harm."""
_NEEDS_ROOT = (
    *("full-disk", "read-only", "disk-full-for-a-while", "suspended-client", "two-runs-at-once"),
    *("worker-without-source", "worker-elsewhere", "worker-that-only-reads", "worker-with-a-full-disk"),
)


def lacks(name: str) -> str:
    """The result says what this machine lacks for a fault; it is empty where the fault can be done."""
    for module, names in _NEEDS_MODULE.items():
        if name in names.split() and importlib.util.find_spec(module) is None:
            return f"there is no {module}"
    if name in _NEEDS_ROOT and not crews.may_mount():
        return "mounts and namespaces of one's own need root"
    if name == "clock-jumps" and not sources.FAKETIME:
        return "libfaketime is not installed"
    return ""


def do(name: str, scene: Scene) -> None:
    """One fault is done, and Broken names what does not hold after it."""
    FAULTS[name](scene)
    scene.check()
