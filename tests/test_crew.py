"""Whose fault a failure is, and which workers a run may have: decisions, nearly all without a cluster."""

from __future__ import annotations

import dataclasses
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import texture, volume_yaml, wait_until, write_lr
from distributed import Client, LocalCluster, get_worker
from sleepy import job_of

from pipeline.base.errors import ClusterError, LedgerError
from pipeline.config import urls
from pipeline.config import volume as config
from pipeline.plan.receipt import QUARANTINED, WRITTEN, Receipt
from pipeline.prepare.prepare import prepare
from pipeline.schedule.aside import MAX_RESTARTS, Aside
from pipeline.schedule.crew import Crew
from pipeline.schedule.exam import CREW, Exam, read_crew
from pipeline.schedule.faults import MAX_IN_A_ROW, MAX_PROVEN, Faults
from pipeline.schedule.leases import Capacity, Leases
from pipeline.schedule.results import CHECKS, Results
from pipeline.schedule.worker_deaths import MAX_DEATHS, WorkerDeaths
from pipeline.storage.kv import Store
from pipeline.storage.ledger import Ledger
from pipeline.worker.job import Fitness, Job, Process, Question, Runtime

CPU = Runtime("torch 2.6", "cpu x86_64")
GPU = Runtime("torch 2.6", "cuda A")
OLD = Runtime("torch 2.4", "cpu x86_64")


def no_check(job: Job, question: Question) -> Fitness:
    raise AssertionError("no worker is asked here")


def worker(number: int) -> Process:
    return Process(f"tcp://10.0.0.{number}:1", f"host{number}", number)


def exam(folder: Path, mixed: bool = False, resumed: bool = False) -> Exam:
    return Exam(dataclasses.replace(job_of(str(folder / "sr"), 1, 1), run="r"), no_check, mixed, resumed)


def failed(index: int, where: str, fault: str = "OSError") -> Receipt:
    return Receipt(index, QUARANTINED, error=f"{fault}: no such luck", fault=fault, worker=where)


def test_one_other_library_among_many_is_left_out(tmp_path: Path) -> None:
    aside = exam(tmp_path).settle({worker(1): CPU, worker(2): OLD, worker(3): CPU})
    assert list(aside) == [worker(2)]
    assert "torch 2.4" in aside[worker(2)]


@pytest.mark.parametrize("found", [(CPU, CPU, GPU), (CPU, OLD)])
def test_other_devices_and_a_draw_are_refused_with_both_named(found: tuple[Runtime, ...], tmp_path: Path) -> None:
    with pytest.raises(ClusterError) as refused:
        exam(tmp_path).settle({worker(n): runtime for n, runtime in enumerate(found)})
    for text in ("host0", f"host{len(found) - 1}", str(found[0]), str(found[-1]), "cluster.mixed"):
        assert text in str(refused.value)


def test_what_wrote_so_far_decides_on_a_resume(tmp_path: Path) -> None:
    """A target begun on a GPU is not finished on a CPU, unless the file allows it; then both are on record."""
    first = exam(tmp_path)
    first.settle({worker(1): GPU})
    first.record()
    assert exam(tmp_path, resumed=True).settle({worker(1): CPU, worker(2): GPU}).keys() == {worker(1)}
    with pytest.raises(ClusterError, match=r"begun with torch 2.6 on cuda A; .*host1.* has torch 2.6 on cpu"):
        exam(tmp_path, resumed=True).settle({worker(1): CPU})
    allowed = exam(tmp_path, mixed=True, resumed=True)
    assert not allowed.settle({worker(1): CPU})
    allowed.record()
    assert [entry["device"] for entry in read_crew(Store(f"file://{tmp_path}/sr.emsr"))] == ["cuda A", "cpu x86_64"]
    assert not exam(tmp_path).settle({worker(1): CPU}), "where nothing was written, nothing binds"


def test_a_run_that_waited_while_another_one_wrote_begins_again(tmp_path: Path) -> None:
    """Workers of Slurm may come after hours. What the other run computed with binds this one, which has not read it."""
    waits, writes = exam(tmp_path), exam(tmp_path)
    for one, runtime in ((waits, CPU), (writes, GPU)):
        one.settle({worker(1): runtime})
    writes.record()
    with pytest.raises(LedgerError, match="another run has written"):
        waits.record()
    assert [entry["device"] for entry in read_crew(Store(f"file://{tmp_path}/sr.emsr"))] == ["cuda A"]


def test_a_late_worker_with_something_else(tmp_path: Path) -> None:
    run = exam(tmp_path)
    run.settle({worker(1): CPU})
    assert run.refuse_late(CPU) == ""
    assert "cuda A" in run.refuse_late(GPU)
    assert run.job.runtimes == (CPU,)
    mixed = exam(tmp_path, mixed=True)
    mixed.settle({worker(1): CPU})
    mixed.record()
    assert mixed.refuse_late(GPU) == ""
    assert b"cuda A" in (Store(f"file://{tmp_path}/sr.emsr").get(CREW) or b"")
    assert mixed.job.runtimes == ()


def test_nothing_is_left_of_a_check(tmp_path: Path) -> None:
    """Neither the token nor the folders that were made for it, however deep; what was there stays."""
    write_lr(tmp_path / "lr.zarr", texture((4, 16, 16)))
    (tmp_path / "there").mkdir()
    path = volume_yaml(tmp_path / "v.yaml", tmp_path / "lr.zarr", tmp_path / "there/not/yet/sr.zarr")
    run = Exam(dataclasses.replace(prepare(config.load(path)).job, run="r"), no_check)
    run.begin()
    assert (tmp_path / "there/not/yet/sr.zarr.emsr/token-r-client").read_bytes() == b"r"
    run.end()
    assert not list((tmp_path / "there").iterdir())


def test_a_failed_task_is_tried_on_another_worker_once(tmp_path: Path) -> None:
    job = job_of(str(tmp_path), 1, 3)
    ledger = Ledger(Store(f"file://{tmp_path}"), "d" * 64, 3, "r")
    leases, capacity = Leases(job.plan, ledger, range(3), 0.0), Capacity(2, 2)
    lease = leases.next(0.0, capacity)
    assert lease is not None
    assert not leases.ended(lease, [failed(0, "a:1")], others=True)
    again = leases.next(0.0, capacity)
    assert again is not None
    assert (again.span, again.failed_on) == (range(1), "a:1")
    assert not leases.ended(again, []), "its worker was set aside meanwhile"
    again = leases.next(0.0, capacity)
    assert again is not None
    assert (again.span, again.failed_on) == (range(1), "a:1")
    assert [r.index for r in leases.ended(again, [failed(0, "b:1")], others=True)] == [0]
    last = leases.next(0.0, capacity)
    assert last is not None
    assert [r.index for r in leases.ended(last, [failed(1, "a:1")], others=False)] == [1], "there is no other worker"


def test_a_worker_is_bad_that_dies_with_what_others_finish() -> None:
    """Three times, and not one that has finished something in between."""
    deaths = WorkerDeaths()
    for task in range(2):
        deaths.died("a", [task])
        assert not deaths.finished("b", [task])
    assert not deaths.finished("a", [3]), "no death is open now, and it has finished something"
    deaths.died("a", [2])
    assert not deaths.finished("b", [2])
    deaths.died("a", [3])
    assert not deaths.finished("a", [9])
    for task in range(4, 6):
        deaths.died("a", [task])
        assert not deaths.finished("b", [task])
    deaths.died("a", [6, 7])
    assert not deaths.finished("b", [6]), "the other one that was with it is not finished yet"
    assert deaths.finished("c", [7, 8]) == ["a"]


def test_a_worker_that_has_finished_something_has_no_deaths_behind_it() -> None:
    deaths = WorkerDeaths()
    for task in range(MAX_DEATHS):
        deaths.died("a", [task])
    assert not deaths.finished("a", [9])
    assert not deaths.finished("b", range(MAX_DEATHS))


def test_no_worker_is_bad_where_a_task_kills_them_all() -> None:
    """What is beside such a task when it kills is finished by others, and proves nothing."""
    deaths = WorkerDeaths()
    for task in range(1, MAX_DEATHS + 3):
        deaths.died("a", [0, task])
        assert not deaths.finished("b", [task])
    for _ in range(MAX_DEATHS):
        deaths.died("a", [])  # with nothing that anybody could finish
    assert not deaths.finished("b", [1])


def test_a_worker_is_bad_where_others_write_what_failed_on_it() -> None:
    faults = Faults()
    for index in range(MAX_PROVEN):
        faults.answered([failed(index, "a:1")], [])
    assert faults.doubtful() == ["a:1"]
    assert not faults.tried_again("a:1", Receipt(0, WRITTEN, worker="b:1"))
    assert not faults.tried_again("a:1", Receipt(1, WRITTEN, worker="b:1"))
    assert faults.tried_again("a:1", Receipt(2, WRITTEN, worker="c:1"))
    assert "no such luck" in faults.why("a:1")


def test_a_worker_is_not_bad_where_the_slab_is() -> None:
    """Its tasks fail elsewhere too; or it writes others in between."""
    faults = Faults()
    for index in range(9):
        faults.answered([failed(index, "a:1", "DamagedChunkError")], [])
        assert not faults.tried_again("a:1", failed(index, "b:1", "DamagedChunkError"))
    for index in range(9):
        faults.answered([failed(index, "a:1")], [])
        assert not faults.tried_again("a:1", Receipt(index, WRITTEN, worker="b:1"))
        faults.answered([Receipt(20 + index, WRITTEN, worker="a:1")], [])
    assert not faults.doubtful()


def test_many_of_one_kind_in_a_row_on_all_workers_end_the_run() -> None:
    faults = Faults()
    for index in range(MAX_IN_A_ROW - 1):
        faults.answered([failed(index, f"{'ab'[index % 2]}:1")], [])
        faults.refuse_row(2)
    faults.answered([failed(8, "b:1")], [])
    with pytest.raises(ClusterError, match=r"8 tasks in a row failed alike on 2 workers.*OSError: no such luck"):
        faults.refuse_row(2)
    faults.answered([Receipt(9, WRITTEN, worker="b:1")], [])
    faults.refuse_row(2)


def test_rows_that_end_no_run() -> None:
    """Those of one worker alone, of different kinds, of voxels that are missing or damaged where they are stored."""
    for names, kinds in (("a", ["OSError"]), ("ab", ["OSError", "TypeError"]), ("ab", ["MissingChunkError"])):
        faults = Faults()
        for index in range(40):
            faults.answered([failed(index, f"{names[index % len(names)]}:1", kinds[index % len(kinds)])], [])
        faults.refuse_row(2)


def fit_but_one(job: Job, question: Question) -> Fitness:
    """The worker called 1 dies of this check."""
    if get_worker().name == 1:
        os._exit(9)
    Store(urls.sidecar(job.target.url)).put(question.reply, job.run.encode())
    return Fitness(CPU, 0)


def test_a_worker_that_dies_of_every_check_is_set_aside_by_name(tmp_path: Path) -> None:
    """Its nanny gives it new processes; the other one is fit."""
    run = Exam(dataclasses.replace(job_of(f"{tmp_path}/sr", 1, 1), run="r"), fit_but_one)
    told: list[str] = []
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, memory_limit=0) as cluster,
        Client(cluster) as client,
    ):
        crew = Crew(client, run, lambda who, why: told.append(why))

        def answered() -> bool:
            crew.look()
            return crew.answered == 1

        def told_of_one() -> bool:
            crew.look()
            return bool(told)

        wait_until(answered)
        crew.settle()
        wait_until(told_of_one)
        assert crew.capacity() == Capacity(1, 1)
        crew.close()
    (why,) = told
    assert f"ended {MAX_RESTARTS} times while it opened the job" in why


def test_deaths_beside_leases_are_not_the_check_s() -> None:
    """A lease that kills its process again and again kills the check that waits behind it."""
    told: list[str] = []
    aside = Aside(lambda who, why: told.append(who))
    for number in range(2 * MAX_RESTARTS):
        aside.ended(f"tcp://h:{number}", "nanny")
        aside.died(f"tcp://h:{number}", "nanny", beside_leases=True)
        assert aside.restarting, "leases are kept away from its next process"
    assert not told
    aside.answered("nanny")
    assert not aside.restarting
    for number in range(MAX_RESTARTS):
        assert not told
        aside.died(f"tcp://h:{number}", "nanny", beside_leases=False)
    assert told == [f"worker tcp://h:{MAX_RESTARTS - 1}"]
    assert aside.holds("nanny")
    assert "3 times while it opened the job" in str(aside.error())


def test_answers_between_deaths_make_a_worker_fit_again() -> None:
    told: list[str] = []
    aside = Aside(lambda who, why: told.append(who))
    for _ in range(4):
        for number in range(MAX_RESTARTS - 1):
            aside.died(f"tcp://h:{number}", "nanny", beside_leases=False)
        aside.answered("nanny")
    assert not told


class Nobody:
    """An error that the client's emsr does not know: another commit's."""

    def __reduce__(self) -> tuple[object, ...]:
        return eval, ("__import__('pipeline.gone')",)


def test_an_answer_that_this_emsr_cannot_read_is_the_workers_fault() -> None:
    """It comes from another commit, and must not end the run of the others."""
    heard = []
    client = SimpleNamespace(subscribe_topic=lambda topic, receive: heard.append(receive))
    results = Results(client, "check-", CHECKS)  # type: ignore[arg-type]
    message = {"key": "check-1", "where": ("tcp://10.0.0.1:1", "host1", 1), "ended": pickle.dumps(Nobody())}
    heard[0]((0.0, message))
    ended = results.take("check-1")
    assert ended is not None
    assert (ended.process, type(ended.outcome)) == (worker(1), ClusterError)
