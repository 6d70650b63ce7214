"""How long the workers of a run are busy and what that costs, by a slab tried here or by the rates of a device."""

from __future__ import annotations

import math
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

    @property
    def busy(self) -> int:
        """The workers that get a slab, of which no two share one."""
        return max(1, min(self.workers, math.ceil(self.slabs)))

    def together(self, hours: Hours) -> str:
        """How long the workers take together: as long as one with its share of the slabs."""
        return duration(math.ceil(self.slabs / self.busy) / max(self.slabs, 1) * hours.workers)

    def money(self, hours: Hours) -> str:
        """What these hours cost; nothing where no price is known."""
        return "" if self.price is None else few_digits(hours.workers * self.price)

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
                few_digits(hours.device),
                duration(hours.workers),
                self.together(hours),
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


def few_digits(value: float) -> str:
    """Two digits after the point, or two digits that are not 0 where the value is small."""
    return f"{value:,.2f}" if value >= 0.1 or not value else f"{value:.2g}"


def duration(hours: float) -> str:
    """So many hours, minutes or seconds, in words."""
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{hours * 60:.1f} minutes" if hours * 60 >= 1 else f"{hours * 3600:.1f} seconds"
