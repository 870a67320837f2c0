"""Workloads by name: how many requests of which lengths arrive when. They know neither server nor engine.

Lengths and arrival times come from a fixed seed, so every contender and round has the same; token ids are new each
time, else a prefix cache would answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

IDS = (3, 30000)
"""Prompts are random ids from here: every vocabulary that is measured has them."""


@dataclass(frozen=True)
class Lengths:
    """Of one request, tokens."""

    prompt: int
    output: int
    at: float = 0.0
    """Seconds after the start; nobody has to be done before."""


@dataclass(frozen=True)
class Request:
    """One prompt, the tokens to generate and when it comes."""

    ids: list[int]
    output: int
    at: float = 0.0


@dataclass(frozen=True)
class Workload:
    """Requests, and how they come."""

    name: str
    lengths: tuple[Lengths, ...]
    clients: int = 0
    """So many each send their next request when the one before is done; 0: requests come at their times."""
    prefix: int = 0
    """Tokens that all prompts begin with."""

    def requests(self, chance: random.Random) -> list[Request]:
        """With new token ids."""
        shared = [chance.randrange(*IDS) for _ in range(self.prefix)]
        return [
            Request(shared + [chance.randrange(*IDS) for _ in range(each.prompt - self.prefix)], each.output, each.at)
            for each in self.lengths
        ]

    @property
    def longest(self) -> int:
        return max(each.prompt + each.output for each in self.lengths)

    @property
    def output(self) -> int:
        return sum(each.output for each in self.lengths)

    def of_size(self, count: int) -> Workload:
        """Its first `count` requests."""
        return replace(self, lengths=self.lengths[:count])


def normal(prompt: int, output: int, count: int, spread: float = 0.3) -> tuple[Lengths, ...]:
    """Both lengths normal around these means, with a standard deviation of `spread` of them."""
    chance = random.Random(0)
    drawn = ((chance.gauss(mean, spread * mean) for mean in (prompt, output)) for _ in range(count))
    return tuple(Lengths(*(max(1, round(length)) for length in pair)) for pair in drawn)


def uniform(low: int, high: int, count: int) -> tuple[Lengths, ...]:
    chance = random.Random(0)
    return tuple(Lengths(chance.randint(low, high), chance.randint(low, high)) for _ in range(count))


def log_normal(prompt: int, output: int, count: int, most: int = 2048) -> tuple[Lengths, ...]:
    """Both lengths log-normal with these means, sigma 0.8, cut at `most`."""
    chance, sigma = random.Random(0), 0.8

    def length(mean: int) -> int:
        return min(most, max(1, round(mean * chance.lognormvariate(-sigma * sigma / 2, sigma))))

    return tuple(Lengths(length(prompt), length(output)) for _ in range(count))


def poisson(lengths: tuple[Lengths, ...], rate: float) -> tuple[Lengths, ...]:
    """The same requests, `rate` of them a second."""
    chance, at, timed = random.Random(1), 0.0, []
    for each in lengths:
        at += chance.expovariate(rate)
        timed.append(replace(each, at=at))
    return tuple(timed)


@dataclass(frozen=True)
class Sizes:
    """What the command line says of a workload's size; 0 and () leave the workload's own."""

    requests: int = 0
    clients: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()


def _closed(name: str, lengths: Callable[[int], tuple[Lengths, ...]], sizes: Sizes, prefix: int = 0) -> list[Workload]:
    """One for each number of clients; few clients send fewer requests, for they take longer."""
    return [
        Workload(f"{name}, {clients} clients", lengths(sizes.requests or min(512, 16 * clients)), clients, prefix)
        for clients in sizes.clients or (1, 4, 16, 64)
    ]


def _fast_gen(name: str, sizes: Sizes) -> list[Workload]:
    """With rates: the same requests at those, whoever sends them."""
    pairs = ((2600, 60), (1200, 128))
    if sizes.rates:
        return [
            Workload(
                f"{name} {prompt}/{output} {rate:g}/s", poisson(normal(prompt, output, sizes.requests or 512), rate)
            )
            for prompt, output in pairs
            for rate in sizes.rates
        ]
    return [
        each
        for prompt, output in pairs
        for each in _closed(f"{name} {prompt}/{output}", lambda n, p=prompt, o=output: normal(p, o, n), sizes)  # type: ignore[misc]
    ]


def _pairs(name: str, sizes: Sizes) -> list[Workload]:
    pairs = ((128, 128), (1000, 1000), (2048, 128), (2048, 2048))
    count = sizes.requests or 512
    return [Workload(f"{name} {p}/{o}", (Lengths(p, o),) * count) for p, o in pairs]


def _shared_chat(name: str, sizes: Sizes) -> list[Workload]:
    lengths = log_normal(202, 179, sizes.requests or 256)
    rates = sizes.rates or (4, 8, 16, 32)
    timed = [Workload(f"{name} {rate:g}/s", poisson(lengths, rate)) for rate in rates]
    return [*timed, Workload(f"{name} at once", lengths)]


def _prefixed(name: str, sizes: Sizes) -> list[Workload]:
    changed = replace(sizes, clients=sizes.clients or (32,), requests=sizes.requests or 128)
    return _closed(f"{name} 2000+200/200", lambda count: (Lengths(2200, 200),) * count, changed, prefix=2000)


NAMED: dict[str, Callable[[str, Sizes], list[Workload]]] = {
    "W1": _fast_gen,
    "W2": _fast_gen,
    "W3": _pairs,
    "W4": lambda name, sizes: [Workload(name, uniform(100, 1024, sizes.requests or 256))],
    "W5": _shared_chat,
    "W7": _prefixed,
    "W8": lambda name, sizes: [Workload(f"{name} 1024/256", (Lengths(1024, 256),) * (sizes.requests or 4), clients=1)],
}


def named(names: list[str], sizes: Sizes) -> list[Workload]:
    """W1 to W8, or one of their parts, W3:1000/1000; with a number of requests of its own, W3:1000/1000*256."""
    found = []
    for each_name in names:
        name, _, requests = each_name.partition("*")
        whole, _, part = name.partition(":")
        own = replace(sizes, requests=int(requests)) if requests else sizes
        found += [each for each in NAMED[whole](whole, own) if part in each.name]
    return found


def streams(counts: list[int], prompt: int, output: int) -> list[Workload]:
    """So many equal requests at once."""
    return [Workload(f"{count} streams {prompt}/{output}", (Lengths(prompt, output),) * count) for count in counts]
