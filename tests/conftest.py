"""Settings of the whole suite: one thread a process, DeepSpeed's op built once, the sample model, GPU tests."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; processes that tests start inherit it
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _cuda():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _cuda():
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def smollm2():
    """The folder of SmolLM2-135M-Instruct, fetched and converted if it is not there yet."""
    from backend import samples

    return samples.fetch("generate")
