"""The fake server for every test of the client."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fakes"))

from fake_triton import FakeTriton


@pytest.fixture
def server():
    """A fake server; set its `script`."""
    fake = FakeTriton()
    yield fake
    fake.stop()
