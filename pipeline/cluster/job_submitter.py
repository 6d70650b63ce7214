"""Jobs submitted and cancelled together: where the batch system has arrays, one submission for up to a thousand."""

from __future__ import annotations

import asyncio
import re
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.cluster.batch_systems import System, in_words

GATHER_S = 0.1
"""So long submissions and cancellations are gathered before the first command."""
AT_ONCE = 8
"""Commands that run at the same time, where each is for one job."""
CANCELLED_TOGETHER = 500
ANSWER_S = 120.0
"""A submission that has not answered after so long counts as refused."""
_NAMES = "EMSR_WORKERS"


class JobSubmitter:
    """It lives in the event loop of one Dask cluster; `submit` and `cancel` are called there.

    `size` is how many jobs one submission may hold; where an array is refused it is halved, since a site may allow a
    user fewer jobs. `refused` are the batch system's words about the last submission, "" where it was taken, and
    `refusals` how many were refused one after the other. `taken` is how many jobs it has taken in all.
    """

    def __init__(self, system: System, size: int) -> None:
        self._system, self.size = system, size
        self._waiting: list[tuple[Any, asyncio.Future[str | None]]] = []
        self._leaving: list[str] = []
        self._submitting: asyncio.Task[None] | None = None
        self._cancelling: asyncio.Task[None] | None = None
        self.refused, self.refusals, self.taken = "", 0, 0

    async def submit(self, job: Any) -> str | None:
        """Submit dask-jobqueue's `job` and return its number; None where the batch system refuses it."""
        number: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._waiting.append((job, number))
        if self._submitting is None or self._submitting.done():
            self._submitting = asyncio.create_task(self._submit_all())
        return await number

    async def cancel(self, number: str) -> None:
        """Cancel a job; nothing happens where it has ended."""
        self._leaving.append(number)
        if self._cancelling is None or self._cancelling.done():
            self._cancelling = asyncio.create_task(self._cancel_all())
        await asyncio.shield(self._cancelling)

    async def _submit_all(self) -> None:
        await asyncio.sleep(GATHER_S)
        while self._waiting:
            parts = self._next_parts()
            numbers = await asyncio.gather(*(self._submit(part) for part in parts))
            for part, found in zip(parts, numbers, strict=True):
                if found is None and len(part) > 1:
                    self.size = max(1, len(part) // 2)
                    self._waiting[:0] = part
                elif found is None:  # so would be those that wait
                    self._answer(part, [None])
                    self._answer(self._waiting, [None] * len(self._waiting))
                    self._waiting = []
                else:
                    self._answer(part, found)

    def _next_parts(self) -> list[list[tuple[Any, asyncio.Future[str | None]]]]:
        parts: list[list[tuple[Any, asyncio.Future[str | None]]]] = []
        while self._waiting and len(parts) < (1 if self.size > 1 else AT_ONCE):
            parts.append(self._waiting[: self.size])
            del self._waiting[: self.size]
        return parts

    def _answer(self, part: Sequence[tuple[Any, asyncio.Future[str | None]]], numbers: Sequence[str | None]) -> None:
        for (_, answer), number in zip(part, numbers, strict=True):
            if not answer.done():
                answer.set_result(number)

    async def _submit(self, part: Sequence[tuple[Any, Any]]) -> list[str | None] | None:
        """The numbers of these jobs; None where they are refused."""
        jobs = [job for job, _ in part]
        array = [f"--array=0-{len(jobs) - 1}"] if len(jobs) > 1 else []
        script = array_script(jobs[0].job_script(), [job.name for job in jobs], self._system.index)
        command = [*self._system.submit, *array]
        if self._system.by_stdin:
            code, said, error = await _call(command, script)
        else:
            with tempfile.TemporaryDirectory() as folder:  # which nobody else can write in
                path = Path(folder) / "job.sh"
                path.write_text(script, encoding="utf-8")
                code, said, error = await _call([*command, str(path)])
        number = re.search(jobs[0].job_id_regexp, said)
        if code or number is None:
            self.refused = in_words([error, said]) or f"{self._system.submit[0]} ended with exit code {code}"
            self.refusals += 1
            return None
        self.refused, self.refusals, self.taken = "", 0, self.taken + len(jobs)
        first = number["job_id"]
        return [f"{first}_{i}" for i in range(len(jobs))] if array else [first]

    async def _cancel_all(self) -> None:
        await asyncio.sleep(GATHER_S)
        while self._leaving:
            numbers = self._leaving[:CANCELLED_TOGETHER]
            del self._leaving[:CANCELLED_TOGETHER]
            await _call([*self._system.cancel, *numbers])


def array_script(script: str, names: Sequence[str], index: str) -> str:
    """The job script of the first worker of `names` as that of all of them: each job takes the name at its `index`."""
    if len(names) == 1:
        return script
    name = f"--name {names[0]} "
    assert script.count(name) == 1
    lines = script.replace(name, f'--name "${{{_NAMES}[${index}]}}" ').rstrip().split("\n")
    listed = " ".join(shlex.quote(one) for one in names)
    return "\n".join([*lines[:-1], f"{_NAMES}=({listed})", lines[-1], ""])


async def _call(command: Sequence[str], given: str = "") -> tuple[int, str, str]:
    """Exit code, standard output and error of a command; 1 and why where it cannot be run or does not answer."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
    except OSError as error:
        return 1, "", f"`{command[0]}` cannot be run ({error})"
    try:
        said, error_text = await asyncio.wait_for(process.communicate(given.encode()), ANSWER_S)
    except TimeoutError:
        process.kill()
        await process.wait()
        return 1, "", f"`{command[0]}` does not answer within {ANSWER_S:g} s"
    return process.returncode or 0, said.decode(errors="replace"), error_text.decode(errors="replace")
