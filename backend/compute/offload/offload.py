"""Offload: where the layers of one rank's model lie, and which of them stay on the device; not what they compute.

DeepSpeed's ZeRO-Inference (Aminabadi et al. 2022): weights in host memory or on disk, each layer on the device only
while it computes, the next one on its way meanwhile. docs/offload.md says why its own engine is not what streams here.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from itertools import chain

import torch
from torch import nn

from backend.compute.offload.places import Layout, Place, empty_places, on_device, split_off
from backend.compute.offload.stores import File, Memory, Store, checked
from backend.compute.offload.stream import Stream
from backend.compute.offload.transfers import transfers
from backend.config import EngineConfig
from backend.devices import free_host_memory
from backend.errors import LoadError
from backend.held import SLOTS, residents

TIDY_BYTES = 64 << 20
"""Of the checkpoint read, after which what is on disk leaves memory."""

Progress = Callable[[float], None]


class Offload:
    """Used in turn: a model of empty tensors gets `allocate`, is filled, and gets `start`."""

    def __init__(self, config: EngineConfig, world: int, device: torch.device) -> None:
        self._kind, self._folder, self._cap = config.offload, config.offload_folder, config.device_memory << 20
        self._world, self._device = world, device
        self._store: Store = File(self._folder) if self._kind == "nvme" else Memory(device)
        self._stream: Stream | None = None
        self.told = ""
        """What came of it, in words."""

    @classmethod
    def of(cls, config: EngineConfig, world: int, device: torch.device) -> Offload | None:
        """None where the configuration wants none."""
        return cls(config, world, device) if config.offload else None

    def allocate(self, model: nn.Module) -> None:
        """Memory for every tensor that is on the meta device: the layers' in the store, the others' on the device.

        LoadError where it does not fit.
        """
        layers = [(layer, empty_places([layer])) for layer in stack(model)]
        layouts, stay = _divided([places for _, places in layers], empty_places([model]))
        fixed = Layout(stay).nbytes
        resident = _residents([layout.nbytes for layout in layouts], fixed, self._cap)
        stay += chain.from_iterable(layout.places for index, layout in enumerate(layouts) if index in resident)
        streamed = [index for index in range(len(layouts)) if index not in resident]
        self._layers, self._layouts = [layers[index][0] for index in streamed], [layouts[index] for index in streamed]
        self._check_room(self.moved)
        for layout in self._layouts:
            layout.put(self._store.region(layout.nbytes))
        self.told = self._words(on_device(stay, self._device), len(layouts))

    def watched(self, progress: Progress) -> Progress:
        """The same progress of filling, during which memory is let go of."""
        tidied, total = 0.0, self.moved

        def tell(share: float) -> None:
            nonlocal tidied
            if (share - tidied) * total >= TIDY_BYTES:
                self._store.tidy()
                tidied = share
            progress(share)

        return tell

    def start(self) -> None:
        """All tensors are filled: from now on the layers stream."""
        if not self._layers:
            return
        moves, size = transfers(self._store, self._device), max(layout.nbytes for layout in self._layouts)
        slots = [moves.slot(size) for _ in range(SLOTS)]
        for index, layout in enumerate(self._layouts):
            layout.put(slots[index % SLOTS])
        self._store.close_regions()
        self._stream = Stream(self._layers, slots, moves)

    @property
    def moved(self) -> int:
        """Bytes of weights that come to the device in a step."""
        return sum(layout.nbytes for layout in self._layouts)

    def round(self) -> None:
        """Bring every layer to the device once, with nothing computed meanwhile: the way's own speed."""
        if self._stream:
            self._stream.round()

    def prove(self, compute: Callable[[], torch.Tensor]) -> None:
        """LoadError where a layer's weights are read out of its turn, when its slot holds something else."""
        if self._stream is None:
            return
        usual = compute()
        with self._stream.bare():
            bare = compute()
        if not torch.equal(usual, bare):
            raise LoadError("offload does not fit this model: weights of a layer are used outside that layer")

    def _check_room(self, needed: int) -> None:
        """Before anything is written; all ranks see about the same."""
        where, free = "host memory", free_host_memory()
        if self._kind == "nvme":
            folder = checked(self._folder)
            where, free = f"offload_folder {str(folder)!r}", shutil.disk_usage(folder).free
        if free < needed * self._world:
            raise LoadError(f"{where} has {free >> 20} MiB free; offload needs {needed * self._world >> 20} MiB there")

    def _words(self, held: int, count: int) -> str:
        if not self._layouts:
            return f"offload: all {count} layers stay on the device, {held >> 20} MiB"
        slots = SLOTS * max(layout.nbytes for layout in self._layouts)
        return (
            f"offload: {len(self._layouts)} of {count} layers come from {self._store.place},"
            f" {self.moved >> 20} MiB a step; weights take {held + slots >> 20} MiB of the device"
        )


def stack(model: nn.Module) -> list[nn.Module]:
    """The layers that are called one after the other: of the lists that lie in no other list, the one of most weights.

    LoadError where there is none.
    """
    lists, inner = list[nn.ModuleList](), set[int]()
    for module in model.modules():  # outer ones first
        if isinstance(module, nn.ModuleList) and id(module) not in inner:
            lists.append(module)
            inner.update(id(each) for each in module.modules())
    if not lists:
        raise LoadError(f"offload needs a list of layers, which {type(model).__name__} has not")
    return [*max(lists, key=lambda each: Layout(empty_places([each])).nbytes)]


def _divided(layers: list[list[Place]], every: list[Place]) -> tuple[list[Layout], list[Place]]:
    """The layout of each layer's part that can stream, and all places that stay on the device.

    What two layers share stays, and what one shares with the rest of the model.
    """
    wide = [split_off(places)[0] for places in layers]
    owners = Counter(storage for places in layers for storage in {place.storage for place in places})
    within = Counter(place.storage for places in layers for place in places)
    total = Counter(place.storage for place in every)
    alone = {storage for storage, count in owners.items() if count == 1 and within[storage] == total[storage]}
    layouts = [Layout([place for place in places if place.storage in alone]) for places in wide]
    moved = {place.storage for layout in layouts for place in layout.places}
    return layouts, [place for place in every if place.storage not in moved]


def _residents(sizes: list[int], fixed: int, cap: int) -> set[int]:
    """Which layers stay on the device, evenly spread; LoadError where a step needs more than the cap."""
    count, largest = len(sizes), max(sizes)
    if count <= SLOTS or 0 < fixed + sum(sizes) <= cap:
        staying, least = count, fixed + sum(sizes)
    else:
        staying, least = residents(count, largest, fixed, cap), fixed + (SLOTS + count % SLOTS) * largest
    if cap and least > cap:
        raise LoadError(f"device_memory of {cap >> 20} MiB is too little: a step needs {-(-least >> 20)} MiB")
    return {index * count // staying for index in range(staying)}
