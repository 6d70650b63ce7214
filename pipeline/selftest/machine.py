"""What this machine has: processor, memory, files, disk, torch, driver, GPUs."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from pipeline.config.urls import local_path
from pipeline.process.device import torch_version

ASK_S = 20
"""Seconds that nvidia-smi is waited for: it hangs where a GPU has fallen off the bus."""


def describe(target: str | None = None) -> dict[str, Any]:
    """What the machine has, as JSON. `target` is the url of volume.yaml's target. "problems" are sentences for a user,
    each with what to do.
    """
    import torch
    from distributed.system import memory_limit

    soft, hard = (None if n == resource.RLIM_INFINITY else n for n in resource.getrlimit(resource.RLIMIT_NOFILE))
    driver, gpus = _nvidia()
    return {
        "platform": platform.platform(),
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "memory_bytes": int(memory_limit()),
        "open_files": {"soft": soft, "hard": hard},
        "free_disk_bytes": _free_disk(target),
        "python": platform.python_version(),
        "torch": torch_version(),
        "driver": driver,
        "gpus": gpus,
        "gpus_of_torch": torch.cuda.device_count(),
        "problems": problems(driver, gpus),
    }


def usable_cores() -> int:
    """Cores that this process may use: affinity and the container's quota count."""
    from dask.system import cpu_count

    return int(cpu_count())


def problems(driver: str | None, gpus: list[str]) -> list[str]:
    """What keeps torch from the NVIDIA GPUs that `nvidia-smi` lists."""
    import torch

    built, found = torch.version.cuda, []
    if gpus and built is None and torch.version.hip is None:
        found.append(
            f"torch {torch.__version__} is built without CUDA, so {len(gpus)} GPU(s) are not used. "
            "Install torch and torchvision with CUDA"
        )
    elif gpus and not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        found.append(
            f"torch is built for CUDA {built} and sees no GPU, and driver {driver} lists {len(gpus)}. "
            + (
                f"CUDA_VISIBLE_DEVICES is {hidden!r}: unset it"
                if hidden is not None
                else "Update the driver, or install a torch built for an older CUDA"
            )
        )
    for i in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(i)
        if not supports(torch.cuda.get_arch_list(), capability):
            found.append(
                f"torch {torch_version()} has no kernels for {torch.cuda.get_device_name(i)} (compute capability "
                f"{capability[0]}.{capability[1]}); it has {', '.join(torch.cuda.get_arch_list())}. "
                "Install a torch that is built for it"
            )
    return found


def supports(built: list[str], capability: tuple[int, int]) -> bool:
    """Whether kernels for `built`, such as sm_80 and compute_90, run on a GPU of this compute capability.

    Machine code (sm) runs on the same major version from its minor version on, code that the driver translates
    (compute) on all later versions.
    """
    for name in built:
        kind, _, digits = name.partition("_")
        number = digits.rstrip("af")
        if not number.isdigit():
            continue
        version = (int(number[:-1]), int(number[-1]))
        if version <= capability and (kind == "compute" or version[0] == capability[0]):
            return True
    return not built


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _nvidia() -> tuple[str | None, list[str]]:
    """The driver's version and the names of the GPUs; None and [] where there is no `nvidia-smi`, or it fails."""
    command = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None, []
    rows = [line.split(", ", 1) for line in said.splitlines() if ", " in line]
    return (rows[0][0], [row[1] for row in rows]) if rows else (None, [])


def _free_disk(target: str | None) -> dict[str, int]:
    """Free bytes by folder: that of temporary files, and the nearest one of a local target that is there."""
    folders = [Path(tempfile.gettempdir())]
    if target is not None and (path := local_path(target)) is not None:
        folders += [next(folder for folder in (path, *path.parents) if folder.is_dir())]
    return {str(folder): shutil.disk_usage(folder).free for folder in folders}
