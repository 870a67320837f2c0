"""The ranks' process group and the output head split over it; not how DeepSpeed shards, nor where weights come from.

Source of the column and row split that DeepSpeed applies: Shoeybi et al. 2019, Megatron-LM.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from hashlib import sha256
from math import ceil
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.cpp_extension import _get_build_directory

from backend.errors import LoadError
from backend.ranks.rank import Birth

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
_SHARED_BYTES = 67 << 20
"""What DeepSpeed's shared-memory all-reduce takes there for each rank."""

_TIMEOUT = timedelta(minutes=10)
"""For a collective; a first start compiles DeepSpeed's operator meanwhile. Steps have the parent's watchdog."""

_BUILDS = " (DeepSpeed compiles its shared-memory all-reduce when it is first used: about a minute)"

_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
"""The newer name of the same collective (torch 2.13), the older one in torch 2.11."""


def join(birth: Birth, progress: Callable[[str], None]) -> torch.device:
    """This rank's device, its threads set, and the rank one of its group's; see `connect`."""
    device = torch.device(f"cuda:{birth.rank}" if birth.config.device == "cuda" else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(max(1, birth.config.threads))
    if birth.world > 1 and birth.rank == 0:
        progress(f"joining {birth.world} ranks" + (_BUILDS if device.type == "cpu" else ""))
    connect(birth.rank, birth.world, device, Path(birth.folder))
    return device


def connect(rank: int, world: int, device: torch.device, folder: Path | str) -> None:
    """Join the group of `world` ranks: gloo with DeepSpeed's shared-memory all-reduce on CPU, NCCL on CUDA.

    `folder` is the group's own temporary folder, the same for all its ranks and new each time: the ranks meet through a
    file in it, so no port or name is fixed. One group a process. Call it before deepspeed is imported. LoadError if
    there is no room in /dev/shm.
    """
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ["LOCAL_RANK"] = str(device.index or 0) if device.type == "cuda" else str(rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world == 1:
        return
    _listen_on_loopback()
    store = dist.FileStore(str(Path(folder) / "ranks"), world)  # type: ignore[attr-defined]
    backend = "nccl" if device.type == "cuda" else "gloo"
    bound = device if device.type == "cuda" else None
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_TIMEOUT, device_id=bound)
    _adopt(rank, world, device, Path(folder))


def _listen_on_loopback() -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast hangs where the fabric manager forbids it
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")


def _adopt(rank: int, world: int, device: torch.device, folder: Path) -> None:
    """Let DeepSpeed use torch's group. Its buffer in /dev/shm is named after MASTER_ADDR and MASTER_PORT."""
    name = "tritonspeed-" + sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    if device.type == "cpu":
        _check_room(world)
    with _environment(LOCAL_SIZE=str(world), MASTER_ADDR=name, MASTER_PORT="0", RANK=str(rank), WORLD_SIZE=str(world)):
        import deepspeed

        if device.type == "cpu":
            build_all_reduce()
        deepspeed.init_distributed(verbose=False)
    dist.barrier()  # from here on every rank has mapped every buffer, so the names can go
    (_SHARED_MEMORY / f"deepspeed_allreduce_buffer_{os.getuid()}_{name}_0_{rank}").unlink(missing_ok=True)


def build_all_reduce() -> None:
    """Compile DeepSpeed's operator, or find it compiled, one process at a time.

    torch's own lock around that is a file, which a killed process leaves behind: every later start would wait for ever.
    Ours ends with the process that holds it, and whoever has it may take torch's away. The ninja is the interpreter's
    own, not the first on PATH: each version of ninja builds anew what another has built.
    """
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    folder = Path(_get_build_directory(builder.name, False))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    with (folder.parent / f".{folder.name}.lock").open("w") as lock, _environment(PATH=path):
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        builder.load(verbose=False)


def _check_room(world: int) -> None:
    """All ranks see about the same, before any has written; a short write there would be a SIGBUS at the first step."""
    with suppress(FileNotFoundError):
        free, needed = shutil.disk_usage(_SHARED_MEMORY).free, _SHARED_BYTES * world
        if free < needed:
            raise LoadError(f"{_SHARED_MEMORY} has {free >> 20} MiB free; {world} ranks need {needed >> 20} MiB")


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def all_gather(shard: torch.Tensor, world: int) -> torch.Tensor:
    """Stack the ranks' equally shaped shards.  # [...] -> [world, ...]"""
    if world == 1:
        return shard.unsqueeze(0)
    whole = shard.new_empty((world, *shard.shape))
    _gather(whole.view(-1, *shard.shape[1:]), shard.contiguous())
    return whole


Project = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""Hidden states [..., hidden], weight [rows, hidden] and bias to [..., rows]."""


class VocabParallelHead(nn.Module):
    """The output projection; each rank holds some rows of the vocabulary and gets the logits of all.

    All ranks hold equally many rows, so one plain gather does. Where they do not divide the vocabulary, the last ones
    overlap their neighbours instead of being padded, which lets a tied head be a view of the embedding.
    """

    project: Project = staticmethod(nn.functional.linear)

    def __init__(self, vocab: int, hidden: int, bias: bool, rank: int, world: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.vocab, self.world = vocab, world
        self.size = ceil(vocab / world)
        self.starts = [min(index * self.size, vocab - self.size) for index in range(world)]
        self.rows = slice(self.starts[rank], self.starts[rank] + self.size)
        self.weight = _parameter(self.size, hidden, dtype=dtype)  # [rows, hidden]
        self.bias = _parameter(self.size, dtype=dtype) if bias else None  # [rows]

    def tie(self, embedding: nn.Parameter) -> None:
        """Share the rows of the (whole) embedding. # [vocab, hidden]"""
        self.weight = nn.Parameter(embedding.detach()[self.rows], requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of the whole vocabulary, on every rank.  # [..., hidden] -> [..., vocab]"""
        shard = self.project(hidden, self.weight, self.bias)
        return shard if self.world == 1 else self._join(all_gather(shard, self.world))

    def _join(self, shards: torch.Tensor) -> torch.Tensor:
        """Put the ranks' rows side by side, each overlap once.  # [world, ..., rows] -> [..., vocab]"""
        if self.vocab == self.size * self.world:
            return shards.movedim(0, -2).flatten(-2)
        parts = [shard[..., index * self.size - start :] for index, (shard, start) in enumerate(self._placed(shards))]
        return torch.cat(parts, dim=-1)

    def _placed(self, shards: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
        return list(zip(shards.unbind(0), self.starts, strict=True))


def _parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device="meta"), requires_grad=False)
