"""The rank processes of this process's engines and services, as the system knows them."""

from __future__ import annotations

import psutil


def ranks() -> list[int]:
    """Their process ids, in the order in which they were started."""
    alive = [each for each in psutil.Process().children() if each.status() != psutil.STATUS_ZOMBIE]
    found = [each for each in alive if "backend.ranks.rank" in each.cmdline()]
    return [each.pid for each in sorted(found, key=lambda each: (each.create_time(), each.pid))]
