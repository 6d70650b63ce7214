"""How long the workers of a run are busy and what that costs, by a slab tried here or by the rates of a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.table import Table

from pipeline.plan.network_spec import NetworkSpec
from pipeline.plan.plan import Plan
from pipeline.plan.price import network_calls, slab_seconds
from pipeline.plan.rates import Fit, MeasuredDevice
from pipeline.worker.job import SlabCost


@dataclass(frozen=True)
class Hours:
    """Hours of all slabs: what their devices compute, and what the workers take, who read and encode beside it."""

    device: float
    workers: float


@dataclass(frozen=True)
class Fleet:
    """The workers of a run, each with `in_flight` threads, and `price`, what an hour of one costs.

    `slabs` are those to compute, without what a mask spares. `slabs_in_lease` tells from the seconds that a thread
    takes for a slab how many make a lease.
    """

    workers: int
    in_flight: int
    slabs: float
    price: float | None
    slabs_in_lease: Callable[[float], int]

    def hours(self, cost: SlabCost, network_s: float) -> Hours:
        """Hours where the network takes `network_s` for a slab, and the rest takes what it took here."""
        busy_s = slab_seconds(cost.read_s, network_s, cost.write_s, self.in_flight)
        return Hours(self.slabs * network_s / 3600, self.slabs * busy_s / 3600)

    def money(self, hours: Hours) -> str:
        """What these hours cost; nothing where no price is known."""
        return "" if self.price is None else f"{hours.workers * self.price:,.2f}"

    def table(self, plan: Plan, network: NetworkSpec, device: MeasuredDevice, cost: SlabCost) -> Table:
        """A row for each precision in which the network was measured on the device."""
        kind = "GPU" if device.is_gpu else "CPU"
        table = Table("precision", "ms a tile", "measured at", f"{kind}-hours", "1 worker", f"{self.workers:,} workers")
        if self.price is not None:
            table.add_column(f"cost at {self.price:g}/h")
        for precision, fit in device.fits(network).items():
            hours = self.hours(cost, self.network_seconds(plan, network.batch, fit, cost))
            cells = [
                f"{precision} (chosen)" if precision == network.precision else precision,
                f"{fit.tile_ms:.1f}",
                str(fit.rate),
                f"{hours.device:,.2f}",
                duration(hours.workers),
                duration(hours.workers / self.workers),
            ]
            table.add_row(*cells, *([] if self.price is None else [self.money(hours)]))
        return table

    def network_seconds(self, plan: Plan, batch: int, fit: Fit, cost: SlabCost) -> float:
        """Seconds of the device for a slab. The longer a lease, the fewer sections are encoded twice; the faster a
        slab, the longer a lease.
        """
        leased, longer, seconds = 0, 1, 0.0
        while longer > leased:
            leased = longer
            seconds = fit.seconds(network_calls(plan, batch, leased)) / plan.slabs
            thread_s = self.in_flight * slab_seconds(cost.read_s, seconds, cost.write_s, self.in_flight)
            longer = min(self.slabs_in_lease(thread_s), plan.grid.z)
        return seconds


def duration(hours: float) -> str:
    """So many hours, or minutes, in words."""
    return f"{hours:,.1f} hours" if hours >= 1 else f"{max(hours * 60, 0.1):.1f} minutes"
