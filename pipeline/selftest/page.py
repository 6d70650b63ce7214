"""The doctor's finding as one page of text, the verdict first."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.selftest.findings import DeviceFound, Diagnosis

WIDTH = 118
"""Columns where there is no terminal."""


def print_page(found: Diagnosis) -> None:
    """Print it on standard output."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False, markup=False, soft_wrap=True)
    console.print(f"emsr {found.emsr} doctor, {found.date}")
    for line in verdict(found):
        console.print(line)
    for line in _machine(found.machine):
        console.print(line)
    for device in found.devices:
        _device(console, device)


def verdict(found: Diagnosis) -> list[str]:
    """Which device computes something else, and what; or that none does."""
    wrong = [f"verdict      WRONG: {device.kind}: {what}" for device in found.devices for what in device.wrong()]
    good = ", ".join(device.kind for device in found.devices)
    return wrong or [f"verdict      right: computes what it should: {good}"]


def _machine(has: dict[str, Any]) -> list[str]:
    files, gpus = has["open_files"], has["gpus"]
    driver = f"driver {has['driver']}, {len(gpus)} GPU(s)" if has["driver"] else "no NVIDIA driver (no nvidia-smi)"
    return [
        *(f"mend         {problem}" for problem in has["problems"]),
        f"machine      {has['cpu']}, {has['usable_cores']} of {has['cores']} cores, {_gb(has['memory_bytes'])} memory",
        f"files        {_count(files['soft'])} open at most, `ulimit -n` may raise it to {_count(files['hard'])}",
        "disk         " + ", ".join(f"{_gb(free)} free in {path}" for path, free in has["free_disk_bytes"].items()),
        f"system       {has['platform']}, {driver}",
        f"software     Python {has['python']}, torch {has['torch']}",
    ]


def _device(console: Console, device: DeviceFound) -> None:
    products = ", ".join(f"{name} {rate:.3g}" for name, rate in device.matrix_tflops.items())
    console.print(f"\n{device.kind}, {_gb(device.memory_bytes)}; TFLOP/s of a large matrix product: {products}")
    vectors = _table(
        "reference vector", "precision", "PSNR dB", "largest difference", "indices changed", "wanted", "verdict"
    )
    for v in device.vectors:
        vectors.add_row(
            v.name,
            v.precision,
            _psnr(v.psnr_db) if v.difference is not None else "overflows",
            "" if v.difference is None else f"{v.difference:.1e}",
            str(v.indices_changed),
            f"{v.least_psnr_db:.0f} dB" if v.tolerance is None else f"{v.tolerance:.0e}, none changed",
            "right" if v.ok else "WRONG",
        )
    console.print()
    console.print(vectors)
    same = _table("same bytes", "twice", "at another place beside others")
    for s in device.same:
        same.add_row(s.precision, *("yes" if equal else "NO" for equal in (s.twice, s.other_place)))
    console.print()
    console.print(same)
    rates = _table(
        "network", "cell+halo", "precision", "batch", "encode ms", "fuse ms", "Mvoxel/s", "TFLOP/s", "share",
        "PSNR dB", "indices", "GB, formula",
    )  # fmt: skip
    for r in device.rates:
        rates.add_row(
            f"{r.preset or r.name} x{r.scale}",
            f"{r.cell}+{r.halo}",
            r.precision,
            str(r.batch),
            f"{r.encode_ms:.1f}",
            f"{r.fuse_ms:.1f}",
            f"{r.sr_voxels_per_s / 1e6:.3g}",
            f"{r.tflops:.3g}",
            f"{r.share:.0%}",
            _psnr(r.psnr_db),
            str(r.indices_changed),
            ("" if r.peak_bytes is None else f"{r.peak_bytes / 1e9:.2f}, ") + f"{r.formula_bytes / 1e9:.2f}",
        )
    console.print()
    console.print(rates)
    for note in device.notes:
        console.print(f"note         {note}")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, no_wrap=True, justify="left" if not i else "right")
    return table


def _psnr(value: float | None) -> str:
    return "equal" if value is None else f"{value:.1f}"


def _count(limit: int | None) -> str:
    return "any number" if limit is None else f"{limit:,}"


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
