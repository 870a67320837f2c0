"""Offload: where tensors lie, what streams when, what is refused; and models that give what they give without it."""

import errno
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))

from decoding import local, play, sequence, settings
from encoder_shards import compute
from tiny import save_llama
from tiny_encoders import write

from backend.compute.encoders.load import load_encoder
from backend.compute.offload import offload, stores
from backend.compute.offload.offload import Offload, stack
from backend.compute.offload.places import PAGE, Layout, empty_places, split_off
from backend.compute.offload.stores import File, Memory, checked, host_memory
from backend.compute.offload.stream import Stream
from backend.compute.offload.transfers import ToCuda, ToHost
from backend.compute.quantized.packed import Packed, Scheme, pack
from backend.config import EngineConfig
from backend.devices import resolved
from backend.errors import LoadError
from backend.generation.sequence import SamplingParams
from backend.held import residents
from backend.model_folder import Checkpoint

CPU = torch.device("cpu")
GREEDY = SamplingParams(max_tokens=8, temperature=0.0)
PACKED = {"quantization": "int4", "quantization_group": 32}
CHECKED = "backend.compute.offload.offload"


@pytest.fixture(autouse=True)
def environment():
    """A rank in this process sets variables for DeepSpeed."""
    torch.set_num_threads(1)
    with patch.dict(os.environ):
        yield


class Halves(nn.Module):
    """Two views of one tensor, a packed weight, and a vector."""

    def __init__(self, scheme):
        super().__init__()
        merged = torch.empty(6, 4, device="meta")
        self.upper, self.lower = (nn.Parameter(part, requires_grad=False) for part in merged.split([2, 4]))
        self.whole = merged
        self.packed = Packed.empty(scheme, 3, 8, torch.float32, torch.device("meta"))
        self.bias = nn.Parameter(torch.empty(4, device="meta"), requires_grad=False)


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
def test_views_stay_views_and_packed_weights_move_too(kind):
    module = Halves(scheme := Scheme(kind, 0))
    wide, narrow = split_off(empty_places([module]))
    assert {place.name for place in narrow} == {"bias"}
    layout = Layout(wide)
    assert layout.nbytes == PAGE
    layout.put(first := torch.empty(layout.nbytes, dtype=torch.uint8))
    full = torch.randn(3, 8)
    module.whole.copy_(torch.arange(24).view(6, 4))
    module.packed.take(pack(full, scheme))
    assert module.upper.tolist() == module.whole[:2].tolist() and module.lower.tolist() == module.whole[2:].tolist()
    want = module.packed.full()
    layout.put(second := torch.zeros_like(first))
    assert not module.lower.any()
    second.copy_(first)
    assert torch.equal(module.packed.full(), want) and module.lower.tolist() == torch.arange(8, 24).view(4, 4).tolist()
    assert isinstance(module.upper, nn.Parameter)


class Recorded:
    """Transfers that note what was asked for, and fill a slot with the layer's number when it is waited for."""

    def __init__(self):
        self.started = []

    def start(self, index, slot):
        self.started.append(index)
        return lambda: slot.fill_(index)


def streaming(count):
    """Layers that tell what their slot holds as they compute."""
    seen, moves, slots = [], Recorded(), [torch.zeros(1, dtype=torch.uint8) for _ in range(2)]
    layers = [nn.Identity() for _ in range(count)]
    for index, layer in enumerate(layers):
        layer.forward = lambda value, index=index: seen.append((index, int(slots[index % 2])))
    return Stream(layers, slots, moves), layers, seen, moves


def test_layers_come_ahead_of_their_turn_round_and_round():
    _, layers, seen, moves = streaming(4)
    for _ in range(2):
        for layer in layers:
            layer(0)
    assert all(index == held for index, held in seen)
    assert moves.started == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]  # each once a round: the last two are for the next


@pytest.mark.parametrize("order", [[2, 0, 3, 3, 1], [0, 0, 1, 2, 0, 1, 2, 3], [3, 2, 1, 0]])
def test_in_any_other_order_each_layer_still_has_its_own_weights(order):
    _, layers, seen, _ = streaming(4)
    for index in order:
        layers[index](0)
    assert seen == [(index, index) for index in order]


def test_a_step_that_broke_off_costs_the_next_one_nothing_but_time():
    _, layers, seen, _ = streaming(4)
    layers[1].forward, usual = (lambda value: 1 / value), layers[1].forward
    layers[0](0)
    with pytest.raises(ZeroDivisionError):
        layers[1](0)
    layers[1].forward = usual
    seen.clear()
    for layer in layers:
        layer(0)
    assert seen == [(index, index) for index in range(4)]


@pytest.mark.parametrize(
    ("layers", "cap", "staying"),
    [(4, 0, 0), (5, 0, 1), (80, 0, 0), (10, 38, 2), (10, 73, 6), (10, 45, 2), (9, 66, 5)],
)
def test_how_many_layers_stay(layers, cap, staying):
    found = residents(layers, 7, 10, cap)
    assert found == staying and (layers - found) % 2 == 0
    assert not cap or 10 + (2 + found) * 7 <= cap


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_gives_back_what_was_put_in_and_has_no_name(tmp_path, direct, monkeypatch):
    if not direct:
        monkeypatch.setattr(os, "O_DIRECT", 1 << 30)  # as if the file system knew it not
        monkeypatch.setattr(os, "O_TMPFILE", 1 << 30)
    monkeypatch.setattr(stores, "CHUNK", 2 * PAGE)
    store, sizes = File(str(tmp_path)), [5 * PAGE, PAGE]
    values = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]
    for value in values:
        store.region(len(value)).copy_(value)
        store.tidy()
    store.close_regions()
    moves = ToHost(store)
    slot = moves.slot(5 * PAGE)
    for index, value in enumerate(values):
        moves.start(index, slot)()
        assert torch.equal(slot[: len(value)], value)
    assert list(tmp_path.iterdir()) == []  # so a killed rank leaves nothing behind


def test_memory_gives_back_what_was_put_in():
    store = Memory(CPU)
    store.region(PAGE).fill_(7)
    store.read(0, into := torch.zeros(2 * PAGE, dtype=torch.uint8))
    assert into[:PAGE].eq(7).all() and not into[PAGE:].any()


class Cudart:
    """CUDA's runtime, where it locks no memory."""

    def __init__(self, error):
        self.cudaHostRegister = lambda address, nbytes, flags: error


def test_what_is_locked_stays_mapped(monkeypatch):
    """Another mapping would else get its address, which CUDA still knows as locked."""
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Cudart(0))
    addresses = {host_memory(PAGE, torch.device("cuda")).data_ptr() for _ in range(5)}
    assert len(addresses) == 5
    store = Memory(torch.device("cuda"))
    assert store.region(PAGE).nbytes == PAGE and store.place == "host memory"


def test_memory_that_cuda_does_not_lock_is_torchs_own(monkeypatch):
    launched, empty = [], torch.empty
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Cudart(801))
    monkeypatch.setattr(torch, "ones", lambda *_, device: launched.append(device))
    store = Memory(torch.device("cuda"))
    with patch.object(torch, "empty", lambda size, dtype, pin_memory: empty(size, dtype=dtype)):
        assert store.region(PAGE).nbytes == PAGE
    assert "locking gave CUDA error 801" in store.place and launched  # so that no later launch is told of the error
    refusal = RuntimeError("CUDA error: out of memory")
    with patch.object(torch, "empty", side_effect=refusal), pytest.raises(LoadError, match="locked for offload: CUDA"):
        store.region(PAGE)


@pytest.mark.parametrize(("device", "index"), [("cuda", 3), ("cuda:1", 1)])
def test_the_thread_that_reads_is_on_the_ranks_gpu(monkeypatch, device, index):
    chosen = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    ToCuda(Memory(CPU), torch.device(device))._thread.submit(int).result()
    assert chosen == [index]


def test_folders_that_cannot_hold_the_file(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "none"):
        with pytest.raises(LoadError, match=r"offload_folder .* is not a folder that can be written to"):
            checked(str(path))
    with pytest.raises(LoadError, match=r"offload_folder '/dev/shm' lies in memory \(tmpfs\)"):
        checked("/dev/shm")
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(LoadError, match=r"offload_folder .* has no room: No space left on device"):
        File(str(tmp_path)).region(PAGE)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"offload": "disk"}, "offload must be cpu, nvme or empty, not 'disk'"),
        ({"offload": "cpu", "offload_folder": "/tmp"}, "offload_folder is set, offload is not nvme"),
        ({"device_memory": "100"}, "device_memory is set, offload is not"),
        ({"offload": "cpu", "device_memory": "-1"}, "device_memory must not be negative"),
    ],
)
def test_bad_keys(given, reason):
    with pytest.raises(LoadError, match=reason):
        EngineConfig.from_parameters({"model": "m"} | given)


def test_what_follows_from_offload_unless_it_is_set():
    given = {"model": "m", "offload": "cpu", "device": "cuda"}
    config = resolved(EngineConfig.from_parameters(given))
    assert (config.step_tokens, config.max_sequences, config.step_timeout, config.cuda_graphs) == (
        8192,
        1024,
        600,
        False,
    )
    own = resolved(
        EngineConfig.from_parameters(given | {"step_tokens": "9", "max_sequences": "8", "step_timeout": "5"})
    )
    assert (own.step_tokens, own.max_sequences, own.step_timeout) == (9, 8, 5)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Five layers of about 270 KiB."""
    return save_llama(tmp_path_factory.mktemp("llama"), num_hidden_layers=5, hidden_size=96, intermediate_size=192)


@pytest.fixture(scope="module")
def rank():
    with patch.dict(os.environ):
        yield local(said := []), said


def text(rank, folder, **given):
    """What a decoder writes."""
    config = settings(folder, **given)
    rank[1].clear()
    rank[0].open(config, 64)
    rank[0].warm_up()
    sequences = [sequence(list(range(3, 3 + count)), GREEDY) for count in (5, 11, 2)]
    play(rank[0].step, sequences, config, 64)
    return [list(each.tokens) for each in sequences]


def test_the_text_is_the_same_from_memory_and_from_disk(rank, llama, tmp_path):
    want = text(rank, llama)
    assert text(rank, llama, offload="cpu") == want
    assert "offload: 4 of 5 layers come from host memory" in " ".join(rank[1])
    assert text(rank, llama, offload="nvme", offload_folder=str(tmp_path)) == want
    assert f"offload: 4 of 5 layers come from a file in {tmp_path}" in " ".join(rank[1])


@pytest.mark.parametrize("given", [{"dtype": "bfloat16"}, PACKED | {"quantization": "int8"}, PACKED])
def test_merged_and_packed_weights_stream_too(rank, llama, given):
    want = text(rank, llama, **given)
    assert text(rank, llama, offload="nvme", **given) == want
    assert "offload: 4 of 5 layers come from a file" in " ".join(rank[1])


def test_a_cap_decides_how_many_layers_stay(rank, llama):
    want = text(rank, llama)
    assert text(rank, llama, offload="cpu", device_memory=64) == want
    assert "offload: all 5 layers stay on the device" in " ".join(rank[1])
    with pytest.raises(LoadError, match="a step needs 12 MiB"):
        offload._residents([3 << 20] * 5, 3 << 20, 8 << 20)


def test_no_room(rank, llama, tmp_path):
    with patch(f"{CHECKED}.free_host_memory", return_value=1 << 20), pytest.raises(LoadError) as refused:
        text(rank, llama, offload="cpu")
    assert str(refused.value) == "host memory has 1 MiB free; offload needs 1 MiB there"
    little = SimpleNamespace(free=1 << 19)
    with patch(f"{CHECKED}.shutil.disk_usage", return_value=little), pytest.raises(LoadError, match="has 0 MiB free"):
        text(rank, llama, offload="nvme", offload_folder=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "modernbert"])
def test_encoders_give_the_same(tmp_path, family):
    checkpoint = Checkpoint.open(write(tmp_path / family, family, "AutoModel", num_hidden_layers=4))
    want = compute(load_encoder(checkpoint, "AutoModel", 1, CPU, torch.float32), "AutoModel")
    held = Offload(EngineConfig(model="m", offload="nvme", offload_folder=str(tmp_path)), 1, CPU)
    model = load_encoder(checkpoint, "AutoModel", 1, CPU, torch.float32, None, held)
    assert "4 of 4 layers come from a file" in held.told
    held.prove(lambda: compute(model, "AutoModel"))
    assert torch.equal(compute(model, "AutoModel"), want)


class Peeking(nn.Module):
    """Uses its last layer's weight before that layer's turn."""

    def __init__(self, peeks):
        super().__init__()
        self.peeks = peeks
        self.layers = nn.ModuleList(nn.Linear(4, 4, device="meta") for _ in range(4))

    def forward(self, value):
        for layer in self.layers:
            value = layer(value) + (self.layers[3].weight.sum() if self.peeks else 0)
        return value


@pytest.mark.parametrize("peeks", [False, True])
def test_weights_that_are_read_out_of_turn_are_noticed(peeks):
    model, held = Peeking(peeks), Offload(EngineConfig(model="m", offload="cpu"), 1, CPU)
    held.allocate(model)
    for number, parameter in enumerate(model.parameters()):
        parameter.data.fill_(number / 10)
    held.start()
    with torch.inference_mode():
        if peeks:
            with pytest.raises(LoadError, match="weights of a layer are used outside that layer"):
                held.prove(lambda: model(torch.ones(4)))
        else:
            held.prove(lambda: model(torch.ones(4)))


def test_what_layers_share_stays_on_the_device():
    model = Peeking(False)
    model.layers[1].weight = model.layers[0].weight
    held = Offload(EngineConfig(model="m", offload="cpu"), 1, CPU)
    held.allocate(model)
    model.layers[0].weight.data.fill_(3)
    assert model.layers[1].weight.eq(3).all()
    assert [len(layout.places) for layout in held._layouts] == [0, 0, 1, 1]


def test_a_model_without_a_list_of_layers_is_refused():
    with pytest.raises(LoadError, match="offload needs a list of layers, which Linear has not"):
        stack(nn.Linear(2, 2))
