"""The doctor's round: every device, every precision, within a stated time."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from models.vectors import VECTORS
from pipeline import __version__
from pipeline.base.errors import DataError, EmsrError, TooLargeError
from pipeline.base.geometry import ZYX, Box
from pipeline.config.volume import Config, NetworkConfig, SourceConfig
from pipeline.inference.defaults import for_workers, lattice_for
from pipeline.inference.describe import describe
from pipeline.inference.network import Network
from pipeline.plan.network_spec import NetworkSpec
from pipeline.process import device
from pipeline.selftest import machine, rates, same, vectors
from pipeline.selftest.findings import DeviceFound, Diagnosis
from pipeline.selftest.networks import Formula, Window, with_precision
from pipeline.storage.sources.open import open_source

Say = Callable[[str], None]
LARGE = Box(ZYX(0, 0, 0), ZYX(1 << 12, 1 << 16, 1 << 16))
"""A volume whose lattice and batch are those of most."""
RATES_S = {"cuda": 100.0, "cpu": 24.0}
"""Seconds within which networks are timed on one device, on a CPU its own; what would begin later is left out, but for
the first.
"""
SIZES = {"cuda": (("small", 64, 1), ("paper", 64, 1), ("paper", 64, 8), ("paper", 128, 4), ("small", 128, 8))}
"""Without a volume.yaml: preset, cell and batch of what is timed, most important first. A CPU times SMALLEST."""
SMALLEST = ("small", 32, 1)
SAME_CPU_CELL, SAME_CUDA_BATCH = 16, 4
"""What is computed twice: on a CPU small tiles without a halo, on a GPU so many tiles at once."""
CPU_SHARE = 0.5
"""Of a matrix product's rate, what a network reaches on a CPU at least: with it the time of a tile is foreseen."""
WINDOWS_TIMED = 4.5
"""A CPU computes so many windows' operations (each of one section and one window) to time one of them."""


def diagnose(config: Config | None, say: Say) -> Diagnosis:
    """Check every GPU that torch sees, and the CPU. With a volume.yaml its network is timed, as a first run on such
    devices would compute it, and what it asks for must work. `say` is told what is done now.

    Raises NetworkError where the network of `config` cannot be had.
    """
    say("what this machine has")
    found = Diagnosis(
        __version__,
        time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        machine.describe(None if config is None else config.target.url),
        [],
    )
    if config is not None:
        say("the weights of its network")
        Network(with_precision(describe(config.network), "float32"), torch.device("cpu"))
    bounds, unread = (LARGE, "") if config is None else _bounds(config.source, say)
    with tempfile.TemporaryDirectory(prefix="emsr-doctor-") as folder:
        formula = Formula(Path(folder))
        gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
        for on in [*gpus, torch.device("cpu")]:
            asked = None if config is None else _as_run(config.network, bounds, on)
            checkup = _Checkup(on, found.machine["memory_bytes"], formula, asked, say)
            checkup.found.notes += [unread] if unread else []
            known = any(before.kind == checkup.found.kind for before in found.devices)
            found.devices.append(checkup.found)
            checkup.all(timed=not known)
    return found


class _Checkup:
    """The round of one device."""

    def __init__(
        self, on: torch.device, memory_bytes: int, formula: Formula, asked: NetworkSpec | None, say: Say
    ) -> None:
        self._on, self._formula, self._asked = on, formula, asked
        facts = device.facts(on)
        self.found = DeviceFound(facts.kind, facts.memory_bytes if on.type == "cuda" else memory_bytes)
        self._precisions = tuple(
            precision for precision in facts.precisions if self._is_asked(precision) or _is_native(on, precision)
        )
        self._clock = time.process_time if on.type == "cpu" else time.monotonic
        self._say: Say = lambda text: say(f"{self.found.kind}: {text}")

    def all(self, timed: bool) -> None:
        """Every check; one that the device cannot go on after becomes its `error`. Of GPUs of one kind one is timed."""
        if self._on.type == "cuda":
            torch.cuda.set_device(self._on)
        try:
            for precision in self._precisions:
                self.found.matrix_tflops[precision] = rates.matrix_tflops(self._on, precision)
            self._vectors()
            self._same()
            if timed:
                self._rates()
            else:
                self.found.notes.append("networks were timed on the first GPU of this kind")
        except (EmsrError, RuntimeError) as error:
            if device.out_of_memory(error) or isinstance(error, TooLargeError):
                self.found.notes.append("not all was looked at: others hold the memory of this device")
                return
            self.found.error = f"{type(error).__name__}: {str(error).splitlines()[0]}"

    def _vectors(self) -> None:
        for vector in VECTORS:
            spec = self._formula.spec(vector)
            for precision in self._precisions:
                self._say(f"reference vector {vector.name}, {precision}")
                network = Network(with_precision(spec, precision), self._on)
                may_overflow = precision == "float16" and not self._is_asked(precision)
                self.found.vectors.append(vectors.check(network, vector, may_overflow))

    def _is_asked(self, precision: str) -> bool:
        return self._asked is not None and self._asked.precision == precision

    def _same(self) -> None:
        if self._on.type == "cpu":
            spec = self._formula.spec(VECTORS[0])
            spec = replace(spec, lattice=replace(spec.lattice, halo=0))
            cell, batch = SAME_CPU_CELL, 1
        else:
            spec = self._asked or self._formula.spec(VECTORS[2])
            cell, batch = spec.lattice.cell, max(SAME_CUDA_BATCH, spec.batch)
        for precision in self._able(spec):
            self._say(f"the same tiles again, {precision}")
            with self._left_out(f"{precision}: same bytes not looked at", precision):
                self.found.same.append(same.check(Network(with_precision(spec, precision, cell, batch), self._on)))

    def _rates(self) -> None:
        end = self._clock() + RATES_S[self._on.type]
        for spec in self._timed():
            if self.found.rates and self._clock() > end:
                self.found.notes.append(f"{_name(spec)} not timed: no time left")
                continue
            self._say(f"{_name(spec)}, a window in float32")
            with self._left_out(f"{_name(spec)} not timed", "float32"):
                self._in_each_precision(spec, rates.one_window(Network(spec, self._on)), end)

    def _in_each_precision(self, spec: NetworkSpec, float32: Window, end: float) -> None:
        """Time a network; `float32` is what it makes of a window in that precision."""
        for precision in self._able(spec):
            what = f"{_name(spec)}, {precision}"
            if self.found.rates and self._clock() > end:
                self.found.notes.append(f"{what} not timed: no time left")
                continue
            self._say(f"time of {what}")
            with self._left_out(f"{what} not timed", precision):
                self._time(with_precision(spec, precision, batch=spec.batch), float32)

    def _time(self, spec: NetworkSpec, float32: Window) -> None:
        network = Network(spec, self._on)
        window = float32 if spec.precision == "float32" else rates.one_window(network)
        self.found.rates.append(rates.measure(network, self.found.matrix_tflops[spec.precision], window, float32))
        self.found.notes += [f"{_name(spec)}, {spec.precision}: {note}" for note in network.notes]

    def _able(self, spec: NetworkSpec) -> tuple[str, ...]:
        """The precisions of a network: interpolation has float32 alone."""
        return self._precisions if spec.weights else ("float32",)

    def _timed(self) -> Iterator[NetworkSpec]:
        """The networks to be timed, in float32."""
        if self._asked is not None:
            yield self._fitting(with_precision(self._asked, "float32", batch=self._asked.batch))
            return
        for preset, cell, batch in SIZES.get(self._on.type, (SMALLEST,)):
            vector = next(vector for vector in VECTORS if (vector.preset, vector.scale) == (preset, 8))
            yield with_precision(self._formula.spec(vector), "float32", cell, batch)

    def _fitting(self, spec: NetworkSpec) -> NetworkSpec:
        """`spec`, on a CPU with the largest cell that can be timed in half of the time, since there are other
        precisions.
        """
        if self._on.type != "cpu":
            return spec
        for cell in range(spec.lattice.cell, 0, -8):
            fits = with_precision(spec, "float32", cell)
            if self._foreseen_s(fits) < RATES_S["cpu"] / 2:
                break
        if cell < spec.lattice.cell:
            self.found.notes.append(f"timed with cell {cell}: cell {spec.lattice.cell} would take too long here")
        return fits

    def _foreseen_s(self, spec: NetworkSpec) -> float:
        """Seconds that timing it takes on a CPU."""
        rate = self.found.matrix_tflops["float32"] * 1e12 * CPU_SHARE
        return WINDOWS_TIMED * rates.spec_operations(spec) / rate

    @contextmanager
    def _left_out(self, what: str, precision: str) -> Iterator[None]:
        """An overflow that nobody asked for, and too little memory, are notes."""
        try:
            yield
        except TooLargeError as error:
            self.found.notes.append(f"{what}: {error.saw}")
        except DataError:
            if precision != "float16" or self._is_asked(precision):
                raise
            self.found.notes.append(f"{what}: it overflows")
        except RuntimeError as error:
            if not device.out_of_memory(error):
                raise
            self.found.notes.append(f"{what}: no memory for it")


def _name(spec: NetworkSpec) -> str:
    return f"{spec.preset or spec.name} x{spec.scale}, cell {spec.lattice.cell}, batch {spec.batch}"


def _is_native(on: torch.device, precision: str) -> bool:
    """Whether the device multiplies in this precision by itself: CPUs at most bfloat16."""
    if on.type == "cuda" or precision == "float32":
        return True
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    return precision == "bfloat16" and any(flag in flags for flag in ("avx512_bf16", "amx_bf16"))


def _as_run(network: NetworkConfig, bounds: Box, on: torch.device) -> NetworkSpec:
    """What a first run computes of a volume with these bounds where all workers have this device."""
    spec = describe(network)
    spec = replace(spec, lattice=lattice_for(spec, network, bounds))
    return for_workers(spec, network, bounds, [device.facts(on)])


def _bounds(source: SourceConfig, say: Say) -> tuple[Box, str]:
    """The source's voxels, which decide the lattice; LARGE, and why, where it cannot be opened here."""
    say("the source's size")
    try:
        return open_source(source).info.bounds, ""
    except EmsrError as error:
        return LARGE, f"the tiles are those of a large volume, since the source cannot be opened here: {error}"
