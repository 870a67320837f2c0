"""What has been forgotten in /dev/shm, beside servers and ranks of other tests that are at work."""

import os
import time
from pathlib import Path

from backend.launcher.leftovers import FOLDER, _mapped


def names():
    return set(os.listdir(FOLDER))


def forgotten(prefixes, before=frozenset(), seconds=5):
    """Files since `before` that begin so and that no process has open or mapped; whoever is at it gets some seconds."""
    end = time.monotonic() + seconds
    while (found := _unused(prefixes, before)) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def _unused(prefixes, before):
    found = sorted(name for name in names() - before if name.startswith(prefixes))
    used = _mapped(Path(FOLDER)) if found else set()
    return [f"{FOLDER}/{name}" for name in found if f"{FOLDER}/{name}" not in used]
