"""Other batch systems than Slurm, and many jobs at once: SGE for real, PBS by Slurm's own qsub, LSF by a stand-in."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sge_here
import slurm_here
from conftest import GUARD_S, REPOSITORY, TESTS, main_job, texture, tree, volume_yaml, wait_until, write_lr

from pipeline.cluster import batch
from pipeline.cluster.batch_systems import SYSTEMS
from pipeline.cluster.job_submitter import JobSubmitter, array_script
from pipeline.config.cluster import ClusterConfig

JOB = {"walltime": "01:00:00", "memory": "1GB", "cores": 2}
KEYS: dict[str, dict[str, Any]] = {
    "slurm": JOB,
    "lsf": JOB,
    "pbs": JOB,
    "sge": JOB | {"parallel_environment": "smp"},
}
PBS_COMMANDS = Path("/opt/emsr-tests/pbs")
"""Where .ci/run lays the qsub, qstat and qdel of Debian's slurm-wlm-torque, which cannot be installed beside SGE."""


def of_kind(kind: str, workers: int = 1, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "host": "127.0.0.1", "workers": workers, kind: KEYS[kind] | more}


@pytest.fixture(scope="module")
def system(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, dict[str, str]]]:
    """The kind that a test asks for, and the variables by which its commands are found."""
    kind: str = request.param
    with contextlib.ExitStack() as stack:
        if kind == "sge":
            if reason := sge_here.why_not():
                pytest.skip(reason)
            yield kind, stack.enter_context(sge_here.sge())
        elif kind == "pbs":
            if reason := slurm_here.why_not():
                pytest.skip(reason)
            if not PBS_COMMANDS.exists():
                pytest.skip(f"no qsub of Slurm's is at {PBS_COMMANDS} (.ci/run lays it there)")
            commands = tmp_path_factory.mktemp("pbs")
            for name in ("qsub", "qstat", "qdel"):
                (commands / name).symlink_to(PBS_COMMANDS / name)
            for name in ("sbatch", "salloc", "srun", "scancel"):
                (commands / name).symlink_to(str(shutil.which(name)))
            conf = stack.enter_context(slurm_here.slurm())
            yield kind, {"SLURM_CONF": str(conf), "PATH": f"{commands}:{os.environ['PATH']}"}
        else:
            folder = tmp_path_factory.mktemp("lsf")
            commands = folder / "bin"
            commands.mkdir()
            for name in ("bsub", "bjobs", "bkill"):
                (commands / name).write_text(f'#!/bin/sh\nexec {sys.executable} {TESTS}/lsf_standin.py {name} "$@"\n')
                (commands / name).chmod(0o755)
            yield kind, {"LSF_STANDIN": str(folder), "PATH": f"{commands}:{os.environ['PATH']}"}


EACH = pytest.mark.parametrize("system", ["sge", "pbs", "lsf"], indirect=True)


@EACH
def test_a_job_that_is_deleted_is_replaced(system: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    """Somebody deletes the only job while its worker holds slabs. Another one is submitted; every byte is right, and no
    job is left in the end.
    """
    kind, found = system
    write_lr(tmp_path / "lr.zarr", texture((6, 40, 32)))
    small = {"network__name": "nearest", "work__slab_shape": [2, 16, 16]}
    main_job(volume_yaml(tmp_path / "local.yaml", "lr.zarr", "undisturbed", **small))
    path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", cluster=of_kind(kind), **small)
    hold = tmp_path / "hold"
    environ = {
        **os.environ,
        **found,
        "PYTHONPATH": f"{REPOSITORY}:{TESTS}",
        "DASK_DISTRIBUTED__WORKER__PRELOAD": str(TESTS / "run_standin.py"),  # jobs get the client's environment
        "STANDIN_DELAY_S": "0.05",
        "STANDIN_HOLD": str(hold),
    }
    with subprocess.Popen(
        [sys.executable, str(TESTS / "run_standin.py"), str(path)],
        env=environ,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    ) as client:
        wait_until(lambda: len(list((tmp_path / "sr").rglob("c/*/*/*"))) > 3 or client.poll() is not None)
        assert client.poll() is None, client.communicate()
        hold.touch()
        (first,) = jobs(kind, environ)
        subprocess.run([*SYSTEMS[kind].cancel, first], env=environ, check=True, capture_output=True)
        wait_until(lambda: first not in jobs(kind, environ), "the job is not deleted")
        hold.unlink()
        _, said = client.communicate(timeout=GUARD_S)
    assert client.returncode == 0, said
    assert '"quarantined": 0' in said
    assert tree(tmp_path / "sr") == tree(tmp_path / "undisturbed")
    wait_until(lambda: not jobs(kind, environ), "jobs outlive the run")


@EACH
def test_a_job_that_is_not_taken_is_told(system: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    """A queue that does not exist: the batch system's own words, exit code 2, nothing written."""
    kind, found = system
    write_lr(tmp_path / "lr.zarr", texture((2, 16, 16)))
    path = volume_yaml(
        tmp_path / "v.yaml", "lr.zarr", "sr", cluster=of_kind(kind, queue="no_queue"), network__name="nearest"
    )
    before = tree(tmp_path)
    said = main_job(path, "run", check=False, **found)
    assert said.returncode == 2, said.stderr
    assert "would not take the job: " in said.stderr
    assert "no_queue" in said.stderr
    assert "Traceback" not in said.stderr
    assert tree(tmp_path) == before


def jobs(kind: str, environ: dict[str, str]) -> set[str]:
    """The jobs that are there, as emsr asks for them, but in a process of its own."""
    code = f"from pipeline.cluster.batch_systems import SYSTEMS; print(*SYSTEMS[{kind!r}].jobs())"
    clean = {**environ, "PYTHONPATH": str(REPOSITORY)}
    clean.pop("DASK_DISTRIBUTED__WORKER__PRELOAD", None)
    return set(
        subprocess.run(
            [sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True
        ).stdout.split()
    )


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        ("lsf", ["#BSUB -q gpu", '#BSUB -P "em"', "#BSUB -n 2", "#BSUB -W 25:30", '#BSUB -gpu "num=1"']),
        (
            "pbs",
            ["#PBS -q gpu", "#PBS -A em", "#PBS -l select=1:ncpus=2:mem=1024mb:ngpus=1", "#PBS -l walltime=25:30:00"],
        ),
        (
            "sge",
            ["#$ -q gpu", "#$ -P em", "#$ -pe smp 2", "#$ -l mem_free=1024M", "#$ -l h_rt=25:30:00", "#$ -l gpu=1"],
        ),
    ],
)
def test_what_a_job_asks_for(kind: str, lines: list[str]) -> None:
    """Cores, memory, walltime, queue and GPU in the words of each system; the user's own lines after them."""
    names = {"queue": "gpu", "account" if kind == "pbs" else "project": "em"}
    asked = {"walltime": "1-01:30:00", "memory": "1GiB", "extra_directives": ["-M own"], "prologue": ["module load x"]}
    script = batch.script(
        ClusterConfig.model_validate(of_kind(kind, **asked, **names) | {"gpus_per_worker": 1}), 2, None
    )
    for line in [*lines, lines[0].split()[0] + " -M own", "module load x"]:
        assert f"{line}\n" in script
    assert "--lifetime 91200s" in script  # 91,800 s less twice five minutes


def test_cores_of_sge_need_a_parallel_environment() -> None:
    with pytest.raises(Exception, match=r"parallel_environment is not given.*qconf -spl"):
        batch.script(ClusterConfig.model_validate(of_kind("sge") | {"sge": JOB}), 2, None)


def test_an_array_gives_each_job_its_worker(tmp_path: Path) -> None:
    """The script of an array, run by bash for every index, starts the worker of that name and no other."""
    single = "#!/usr/bin/env bash\n#SBATCH -n 1\n\nexport A=b\necho worker --name em-7 --nthreads 2\n"
    names = ["em-7", "em-12", "em-13"]
    path = tmp_path / "job.sh"
    path.write_text(array_script(single, names, "INDEX"))
    for index, name in enumerate(names):
        said = subprocess.run(["bash", path], env={"INDEX": str(index)}, capture_output=True, text=True, check=True)
        assert said.stdout == f"worker --name {name} --nthreads 2\n"
    assert array_script(single, names[:1], "INDEX") == single


SBATCH = """#!/bin/sh
# A stand-in that takes arrays of up to {most} jobs, and {all} in all.
n=$(expr "$1" : '--array=0-\\(.*\\)') && n=$((n + 1)) || n=1
echo "$n" >> {folder}/asked
taken=$(cat {folder}/taken 2>/dev/null || echo 0)
if [ "$n" -gt {most} ] || [ $((taken + n)) -gt {all} ]; then
    echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2
    exit 1
fi
echo $((taken + n)) > {folder}/taken
echo "Submitted batch job $((100 + taken))"
"""


@pytest.mark.parametrize(("most", "all_", "submissions"), [(1000, 5000, 3), (100, 5000, 46), (1000, 1700, 99)])
def test_many_jobs_take_few_submissions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, all_: int, submissions: int
) -> None:
    """2,500 jobs: arrays of a thousand, smaller ones where the site refuses these; where a user may have no more, as
    many as are allowed, and the words of the refusal.
    """
    (tmp_path / "sbatch").write_text(SBATCH.format(most=most, all=all_, folder=tmp_path))
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    made = [
        SimpleNamespace(
            name=f"em-{i}", job_script=lambda i=i: f"#!/bin/sh\nw --name em-{i} -x\n", job_id_regexp=r"(?P<job_id>\d+)"
        )
        for i in range(2500)
    ]

    async def submit() -> tuple[JobSubmitter, list[str | None]]:
        submitter = JobSubmitter(SYSTEMS["slurm"], 1000)
        return submitter, await asyncio.gather(*(submitter.submit(job) for job in made))

    submitter, numbers = asyncio.run(submit())
    taken = [number for number in numbers if number is not None]
    assert len(taken) == len(set(taken)) == min(2500, all_)
    assert len((tmp_path / "asked").read_text().split()) <= submissions
    assert ("QOSMaxSubmitJobPerUserLimit" in submitter.refused) == (all_ < 2500)
