"""The workers that may get leases now. What is asked for every lease is answered without a pass over all of them."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Collection

TRIES = 4
"""So many times the wanted number are drawn, to be left with enough that are not to be avoided."""


class Usable:
    """Workers by address, each with its threads and its name (HOST:PID, or "" while it is not known)."""

    def __init__(self) -> None:
        self._addresses: list[str] = []
        self._facts: dict[str, tuple[int, int, str]] = {}
        """Place in the list, threads, name."""
        self._by_name: defaultdict[str, set[str]] = defaultdict(set)
        self.threads = 0
        """Those of all of them."""

    def __len__(self) -> int:
        return len(self._addresses)

    def __contains__(self, address: object) -> bool:
        return address in self._facts

    @property
    def addresses(self) -> Collection[str]:
        """All of them, in no order."""
        return self._facts.keys()

    def put(self, address: str, threads: int, name: str) -> None:
        """Take it in, or learn its name."""
        if self._facts.get(address, (0, 0, None))[1:] == (threads, name):
            return
        self.discard(address)
        self._facts[address] = len(self._addresses), threads, name
        self._addresses.append(address)
        self._by_name[name].add(address)
        self.threads += threads

    def discard(self, address: str) -> None:
        """Leave it out. The last one of the list takes its place."""
        if address not in self._facts:
            return
        place, threads, name = self._facts.pop(address)
        last = self._addresses.pop()
        if last != address:
            self._addresses[place] = last
            self._facts[last] = place, *self._facts[last][1:]
        self._by_name[name].discard(address)
        if not self._by_name[name]:
            del self._by_name[name]
        self.threads -= threads

    def named(self, names: Collection[str]) -> int:
        """How many of them have one of these names."""
        return sum(len(self._by_name[name]) for name in names if name in self._by_name)

    def some(self, count: int, avoid: Collection[str]) -> list[str]:
        """Up to `count` addresses at random, none whose name is in `avoid` as long as there is another one."""
        drawn = random.sample(self._addresses, min(TRIES * count, len(self._addresses)))
        found = [address for address in drawn if self._facts[address][2] not in avoid][:count]
        if found or self.named(avoid) == len(self):
            return found or drawn[:count]
        others = [address for address, (_, _, name) in self._facts.items() if name not in avoid]
        return random.sample(others, min(count, len(others)))
