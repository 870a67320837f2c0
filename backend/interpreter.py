"""The Python that other processes of ours run in. It does not know what they do."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def python() -> str:
    """Path of a real interpreter with our packages: TRITONSPEED_PYTHON, else this process's own, else PATH's.

    Inside Triton's stub sys.executable may be empty or the stub itself; its packages are those of PATH's python3.
    """
    own = sys.executable if Path(sys.executable or "").name.startswith("python") else None
    return os.environ.get("TRITONSPEED_PYTHON") or own or shutil.which("python3") or "python3"
