"""Stores: where layers lie while they do not compute, host memory or a file without a name. Not what is in a layer."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from backend.errors import LoadError

CHUNK = 8 << 20
READERS = 8
"""Reads that a disk has at once; a single one leaves it idle between them."""
_IN_MEMORY = ("tmpfs", "ramfs")
_locked: list[mmap.mmap] = []
"""Mapped for good, as ranks need theirs: CUDA would hold whatever is mapped there next for locked, too."""


def host_memory(nbytes: int, device: torch.device, refused: Callable[[int], object] = int) -> Tensor:
    """Whole pages; for a GPU locked, so that it copies them by itself while the host goes on.  # uint8 [nbytes]

    Where CUDA locks only what it allocates (`refused` gets its error), they are torch's, rounded up to a power of two.
    LoadError where it has none.
    """
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # large pages are locked and copied with less ado; not every kernel has them
        pages.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    if device.type != "cuda":
        return memory
    error = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), nbytes, 0))
    if error == 0:
        _locked.append(pages)
        return memory
    refused(error)
    with suppress(RuntimeError):  # CUDA tells its error again at the next launch: let that be this one
        torch.ones(1, device=device)
    try:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        raise LoadError(f"{nbytes >> 20} MiB of host memory cannot be locked for offload: CUDA error {error}") from None


class Store(Protocol):
    """Regions, one a layer, in the order in which they were asked for."""

    @property
    def place(self) -> str:
        """Where they lie, in words."""

    def region(self, nbytes: int) -> Tensor:
        """A new region's memory, to be filled.  # uint8 [nbytes]"""

    def tidy(self) -> None:
        """Let go of memory that holds what is stored already; while regions are being filled too."""

    def close_regions(self) -> None:
        """All are filled, and nothing refers to their memory any more."""

    def whole(self, index: int) -> Tensor | None:
        """A region as it lies, if it lies in memory."""

    def read(self, index: int, into: Tensor) -> None:
        """Copy a region into host memory of at least its size."""


class Memory:
    """A store in host memory."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._regions = device, list[Tensor]()
        self._refused: list[int] = []

    @property
    def place(self) -> str:
        if not self._refused:
            return "host memory"
        return f"host memory of torch's (up to twice as much, for locking gave CUDA error {self._refused[0]})"

    def region(self, nbytes: int) -> Tensor:
        self._regions.append(host_memory(nbytes, self._device, self._refused.append))
        return self._regions[-1]

    def tidy(self) -> None:
        pass

    def close_regions(self) -> None:
        pass

    def whole(self, index: int) -> Tensor | None:
        return self._regions[index]

    def read(self, index: int, into: Tensor) -> None:
        into[: len(self._regions[index])].copy_(self._regions[index])


class File:
    """A store on disk, which is gone with this process, however that ends: its file has no name."""

    def __init__(self, folder: str) -> None:
        self._folder = checked(folder)
        self._file = _nameless(self._folder)
        self._direct = self._file
        self._sizes, self._starts = list[int](), list[int]()
        self._mapped: list[mmap.mmap] = []
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="offload-read")

    @property
    def place(self) -> str:
        return f"a file in {self._folder}"

    def region(self, nbytes: int) -> Tensor:
        start = self._starts[-1] + self._sizes[-1] if self._starts else 0
        try:
            os.posix_fallocate(self._file, start, nbytes)  # else a full disk would be a SIGBUS while it is filled
        except OSError as error:
            raise LoadError(f"offload_folder {str(self._folder)!r} has no room: {error.strerror}") from None
        self._starts.append(start)
        self._sizes.append(nbytes)
        self._mapped.append(mmap.mmap(self._file, nbytes, offset=start))
        return torch.frombuffer(self._mapped[-1], dtype=torch.uint8)

    def tidy(self) -> None:
        for mapped in self._mapped:
            mapped.madvise(mmap.MADV_DONTNEED)  # the file keeps what was written

    def close_regions(self) -> None:
        self.tidy()
        self._mapped.clear()
        os.fsync(self._file)
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)
        with suppress(OSError):  # not every file system can
            self._direct = os.open(f"/proc/self/fd/{self._file}", os.O_RDONLY | os.O_DIRECT)

    def whole(self, index: int) -> Tensor | None:
        return None

    def read(self, index: int, into: Tensor) -> None:
        """Past the file system's cache, which would hold what is needed last; several parts at once."""
        memory = memoryview(into.numpy().data)[: self._sizes[index]]
        reads = [self._pool.submit(self._part, memory, self._starts[index], at) for at in range(0, len(memory), CHUNK)]
        for read in reads:
            read.result()

    def _part(self, memory: memoryview, start: int, at: int) -> None:
        part = memory[at : at + CHUNK]
        while part:
            count = os.preadv(self._direct, [part], start + at)
            if count <= 0:
                raise OSError(f"the file of offload_folder {str(self._folder)!r} ends early")
            part, at = part[count:], at + count


def checked(folder: str) -> Path:
    """The folder, or the temporary one if none is named; LoadError where it is none, or lies in memory."""
    path = Path(folder or tempfile.gettempdir())
    if not path.is_dir() or not os.access(path, os.W_OK):
        raise LoadError(f"offload_folder {str(path)!r} is not a folder that can be written to")
    if kind := next((kind for kind in _file_systems(path) if kind in _IN_MEMORY), None):
        raise LoadError(f"offload_folder {str(path)!r} lies in memory ({kind}); name one on a disk")
    return path


def _file_systems(folder: Path) -> Iterator[str]:
    """Kind of the file system that a folder lies in (Linux proc(5), mountinfo)."""
    number = os.stat(folder).st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[2] == device:
            yield after.split()[0]


def _nameless(folder: Path) -> int:
    with suppress(OSError):
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_EXCL, 0o600)
    file, name = tempfile.mkstemp(prefix="tritonspeed-offload-", dir=folder)
    os.unlink(name)
    return file
