"""The Python that other processes of ours run in. It does not know what they do."""

from __future__ import annotations

import os
import shutil
import sys


def python() -> str:
    """Path of a real interpreter: inside Triton's stub sys.executable is none."""
    return os.environ.get("TRITONSPEED_PYTHON") or shutil.which("python3") or sys.executable
