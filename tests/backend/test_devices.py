"""Which GPUs are seen, against a stand-in for NVML; and what the configuration becomes on this machine."""

import sys
from types import SimpleNamespace

import pytest

from backend import devices
from backend.config import EngineConfig


class NVMLError(Exception):
    pass


def nvml(count):
    """A machine of `count` GPUs with 100, 101, ... free bytes, named by index or GPU-<index>."""

    def by_index(index):
        if index >= count:
            raise NVMLError
        return index

    def by_uuid(name):
        if not name.startswith("GPU-"):
            raise NVMLError
        return by_index(int(name.removeprefix("GPU-")))

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: count,
        nvmlDeviceGetHandleByIndex=by_index,
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(free=100 + handle),
    )


@pytest.mark.parametrize(
    ("count", "visible", "free"),
    [
        (2, None, [100, 101]),
        (2, "1,0", [101, 100]),
        (2, "GPU-1", [101]),
        (2, "", []),
        (1, "0,1", [100]),
        (2, "-1", []),
        (0, None, []),
    ],
)
def test_gpus_are_seen_as_cuda_sees_them(monkeypatch, count, visible, free):
    monkeypatch.setitem(sys.modules, "pynvml", nvml(count))
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.free_gpu_memory() == free


def test_auto_is_the_gpu_where_there_is_one(monkeypatch):
    config = EngineConfig(model="m")
    monkeypatch.setattr(devices, "free_gpu_memory", lambda: [1])
    assert devices.resolved(config).device == "cuda" and devices.resolved(config).step_tokens == 2048
    monkeypatch.setattr(devices, "free_gpu_memory", list)
    assert devices.resolved(config).device == "cpu" and devices.resolved(config).kv_cache_fraction == 0.1


def test_what_was_set_stays():
    config = EngineConfig(model="m", device="cpu", step_tokens=7, kv_cache_fraction=0.5, threads=3)
    assert devices.resolved(config) == config


def test_host_memory_is_positive():
    assert 0 < devices.free_host_memory() < 1 << 50


@pytest.mark.parametrize(
    ("lines", "vendor"),
    [("processor : 0\nvendor_id\t: AuthenticAMD\nmodel : 2\n", "AuthenticAMD"), ("CPU part : 1\n", "")],
)
def test_the_processors_vendor(monkeypatch, lines, vendor):
    monkeypatch.setattr(devices.Path, "read_text", lambda path: lines)
    assert devices.cpu_vendor() == vendor
