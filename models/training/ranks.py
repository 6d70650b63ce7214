"""The processes that train one network together, one per device: what they add up, average and decide in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, distributed
from torch.nn import Parameter


@dataclass(frozen=True)
class Ranks:
    """This process is number `rank` of `count`. With more than one, torch.distributed's default group connects them,
    by nccl for tensors on GPUs and by gloo for those on CPUs, and all of them call each method in the same order. A
    lone process needs no group. `waits` makes a context in which this rank waits for the others; what is on a GPU is
    only queued, and waited for in `read`.
    """

    rank: int = 0
    count: int = 1
    waits: Callable[[], AbstractContextManager[None]] = field(default=nullcontext, compare=False)

    def sum(self, value: Tensor) -> Tensor:
        """The sum of all ranks' tensors of one shape."""
        if self.count == 1:
            return value
        total = value.detach().clone()
        with self.waits():
            distributed.all_reduce(total)
        return total

    def gather(self, value: Tensor) -> Tensor:
        """All ranks' tensors of one shape, one after the other along the first dimension."""
        if self.count == 1:
            return value
        own = value.detach().contiguous()
        parts = [torch.empty_like(own) for _ in range(self.count)]
        with self.waits():
            distributed.all_gather(parts, own)
        return torch.cat(parts)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any rank."""
        return flag if self.count == 1 else bool(self.sum(torch.tensor(float(flag))) > 0)

    def read(self, values: dict[str, Tensor]) -> dict[str, float]:
        """The mean of each single number over the ranks. All have the same names; it is not finite where one of them is
        not. Waits until the device, and those of the other ranks, have come so far.
        """
        total = self.sum(torch.stack([value.detach().double() for value in values.values()])) / self.count
        with self.waits() if self.count > 1 else nullcontext():
            return dict(zip(values, total.tolist(), strict=True))

    def average_gradients(self, parameters: Iterable[Parameter]) -> None:
        """Replace the gradient of each parameter that has one by its mean over the ranks."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.count == 1 or not gradients:
            return
        mean = self.sum(torch.cat([g.flatten() for g in gradients])) / self.count
        for gradient, part in zip(gradients, torch.split(mean, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view(gradient.shape))

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Give each tensor the values that it has in rank 0."""
        if self.count == 1:
            return
        for tensor in tensors:
            sent = tensor.detach().contiguous()
            with self.waits():
                distributed.broadcast(sent, 0)
            tensor.detach().copy_(sent)


ALONE = Ranks()
