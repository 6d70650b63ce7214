"""What stand-ins of workers answer, where what many workers cost a client is measured: receipts of work nobody did."""

from __future__ import annotations

from pipeline.config import urls
from pipeline.plan.receipt import WRITTEN, Receipt
from pipeline.storage.kv import Store
from pipeline.worker.job import Fitness, Job, LeaseResult, Question, Runtime

SLABS, THREADS = 2_000_000, 2
TASK_S = 39.0
"""What a slab of FAFB takes: the leases of 20,000 threads have five of them."""


def answer(job: Job, start: int, stop: int, max_s: float) -> LeaseResult:
    """Receipts as a worker makes them, of tasks that nobody ran."""
    who = f"node{start // 5 % 5000}:{start // 5 % 10_000}"
    receipts = (
        Receipt(i, WRITTEN, i, 90 << 20, TASK_S, worker=who, read_s=1.0, network_s=30.0, write_s=8.0, voxels=128 << 20)
        for i in range(start, stop)
    )
    return LeaseResult(tuple(receipts), 6 << 30, 2 << 30)


def fit(job: Job, question: Question) -> Fitness:
    Store(urls.sidecar(job.target.url)).put(question.reply, job.run.encode())
    return Fitness(Runtime("torch", "cpu"), 2 << 30)
