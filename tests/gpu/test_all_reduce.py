"""The kernel that sums between GPUs: each rank a process, beside NCCL's sums on two GPUs.

    pytest -s -m gpu tests/gpu/test_all_reduce.py     # under a minute; prints µs a sum, beside NCCL's with a norm

TRITON_INTERPRET=1 runs the kernel on CPU: ranks are forked, and their inboxes lie in memory that they share.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROOT = Path(__file__).parents[2]
WIDTH, WORLD = 4096, 2
LIMIT = 55
"""Seconds that the ranks get."""


def parts(dtype, world, tokens, width, salt):
    generator = torch.Generator().manual_seed(salt)
    made = [torch.randn(tokens, width, generator=generator).to(dtype) for _ in range(world)]
    for part in made:
        part[:, ::3] = -0.0  # the pattern that no rank may send
    return made


SIZES = (1, 3, 1, 1, 140, 2, 3, 129, 1)
"""Tokens of the calls; more than the kernel's programs among them."""


def rank_of_the_interpreter(rank, world, dtype, width, inboxes, results):
    from backend.compute.dense.peers import PROGRAMS, summed

    torch.set_num_threads(1)
    turns = torch.zeros(PROGRAMS, dtype=torch.int32)
    weight = torch.linspace(0.5, 1.5, width).to(dtype)
    for call, tokens in enumerate(SIZES):
        part = parts(dtype, world, tokens, width, call)[rank]
        hidden = parts(dtype, 1, tokens, width, 100 + call)[0]
        time.sleep(0.02 * ((call + rank) % 2))
        way = call % 4
        given = (hidden if way in (0, 1) else None, weight if way in (0, 2) else None)
        found = summed(part, *given, 1e-5, inboxes, turns, rank, 10**6)
        results[call][rank, 0] = hidden
        if way != 1:  # which leaves the part as it is
            results[call][rank, 1] = found


@pytest.mark.skipif(not INTERPRETED, reason="for the interpreter")
@pytest.mark.parametrize(("dtype", "world"), [(torch.float32, 2), (torch.bfloat16, 2), (torch.float16, 3)], ids=str)
def test_ranks_in_processes_of_their_own_get_the_same_sums(dtype, world):
    width, room = 24, 24 * max(SIZES) + 8
    values = torch.int32 if dtype.itemsize == 4 else torch.int16
    empty = torch.iinfo(values).min
    inboxes = tuple(torch.full((2, world, room), empty, dtype=values).share_memory_() for _ in range(world))
    results = [torch.zeros(world, 2, tokens, width, dtype=dtype).share_memory_() for tokens in SIZES]
    fork = multiprocessing.get_context("fork")
    given = (world, dtype, width, inboxes, results)
    ranks = [fork.Process(target=rank_of_the_interpreter, args=(rank, *given), daemon=True) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(LIMIT)
        assert process.exitcode == 0
    assert all(bool((inbox == empty).all()) for inbox in inboxes), "what was read is empty again"
    close = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    weight = torch.linspace(0.5, 1.5, width).to(dtype).float()
    for call, tokens in enumerate(SIZES):
        total = sum(part.float() for part in parts(dtype, world, tokens, width, call))
        before = parts(dtype, 1, tokens, width, 100 + call)[0].float()
        way = call % 4
        after = before + total if way in (0, 1) else before
        x = after if way == 0 else total
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight
        hidden, found = results[call][:, 0], results[call][:, 1]
        assert all(torch.equal(results[call][0], other) for other in results[call]), call
        torch.testing.assert_close(hidden[0].float(), after, rtol=close, atol=close)
        if way != 1:
            torch.testing.assert_close(found[0].float(), normed if way != 3 else total, rtol=close, atol=close)


@pytest.mark.skipif(not INTERPRETED, reason="for the interpreter")
def test_a_rank_may_be_one_sum_ahead():
    """What it sent for the next sum does not take the place of what the late one has not read."""
    from backend.compute.dense.peers import PROGRAMS, summed

    width, world, sizes, patience = 24, 2, (3, 3, 1, 3), 5
    empty = torch.iinfo(torch.int16).min
    inboxes = tuple(torch.full((2, world, 4 * width), empty, dtype=torch.int16) for _ in range(world))
    turns = [torch.zeros(PROGRAMS, dtype=torch.int32) for _ in range(world)]
    made = [parts(torch.float16, world, tokens, width, call) for call, tokens in enumerate(sizes)]
    calls = [0] * max(sizes)
    for call in range(0, len(sizes), 2):
        late, ahead = [each[0].clone() for each in made[call : call + 2]], made[call : call + 2]
        for _, part in ahead:
            sent = torch.where(part.view(torch.int16) == empty, 0, part.view(torch.int16))
            for token, row in enumerate(sent):
                inboxes[0][calls[token] % 2, 1, token * width :][:width] = row
                calls[token] += 1
        for part in late:
            summed(part, None, None, 0.0, inboxes, turns[0], 0, patience)
        for part, (mine, others) in zip(late, ahead, strict=True):
            assert torch.equal(part, (mine.float() + others.float()).half())
            found = summed(others.clone(), None, None, 0.0, inboxes, turns[1], 1, patience)
            assert torch.equal(found, part)
    assert all(bool((inbox == empty).all()) for inbox in inboxes)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or torch.cuda.device_count() < WORLD, reason=f"{WORLD} GPUs needed")
def test_two_gpus(tmp_path):
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path / "ranks")], env=environment)
        for rank in range(WORLD)
    ]
    try:
        end = time.monotonic() + LIMIT
        while time.monotonic() < end and None in (codes := [rank.poll() for rank in ranks]) and not any(codes):
            time.sleep(0.1)
        assert codes == [0] * WORLD
    finally:
        for rank in ranks:
            rank.kill()


def rank_on_a_gpu(rank: int, file: str) -> None:
    from backend.compute import all_reduce

    os.environ.update({all_reduce.NO_MULTICAST: "1", "NCCL_NVLS_ENABLE": "0", "NCCL_SOCKET_IFNAME": "lo"})
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", store=dist.FileStore(file, WORLD), rank=rank, world_size=WORLD, device_id=device)
    plain, kept = all_reduce.Sums(device), []
    for dtype in (torch.float32, torch.bfloat16):
        made, how = all_reduce.sums(WIDTH, dtype, device)
        assert isinstance(made, all_reduce.OneShot), how
        kept.append(made)  # a peer may still write to it
        for tokens in (1, 2, 7, 16, 32, 64, 128, 129, 256):
            part = parts(dtype, WORLD, tokens, WIDTH, tokens)[rank].to(device)
            found, want = made.total(part.clone()), plain.total(part.clone())
            assert all_reduce._close(want, found), (dtype, tokens)
            every = torch.empty(WORLD, *found.shape, dtype=dtype, device=device)
            dist.all_gather_into_tensor(every.flatten(0, 1), found)
            assert torch.equal(every[0], every[1]), (dtype, tokens)
    replayed(made, rank, device)
    timed(made, plain, rank, device)


def replayed(made, rank: int, device: torch.device) -> None:
    """1,000 sums of two sizes in a graph, while one rank or the other is late."""
    few, many = (torch.full((tokens, WIDTH), 1.0 + rank, dtype=torch.bfloat16, device=device) for tokens in (1, 200))
    hidden, wide = torch.zeros_like(few), torch.zeros_like(many)

    def work():
        hidden.zero_()
        wide.zero_()
        for _ in range(50):
            made.add(hidden, few)
            made.add(wide, many)

    graph = captured(work)
    for turn in range(10):
        if turn % WORLD == rank:
            torch.cuda._sleep(20_000_000)
        graph.replay()
        assert bool((hidden == 150).all()) and bool((wide == 150).all())
    for turn in range(20):  # run ahead
        if turn % 3 == rank:
            torch.cuda._sleep(2_000_000)
        graph.replay()
    assert bool((hidden == 150).all()) and bool((wide == 150).all())


def timed(made, plain, rank: int, device: torch.device) -> None:
    weight = torch.ones(WIDTH, dtype=torch.bfloat16, device=device)
    for tokens in (1, 8, 16, 32, 64, 128, 256, 1024, 2048):
        hidden = torch.zeros(tokens, WIDTH, dtype=torch.bfloat16, device=device)
        part, each = torch.zeros_like(hidden), {}
        for name, sums in (("one kernel", made), ("NCCL", plain)):
            graph = captured(lambda s=sums, h=hidden, p=part: [s.normed(h, p, weight, 1e-5) for _ in range(64)])
            graph.replay()
            torch.cuda.synchronize()
            dist.barrier()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(10):
                graph.replay()
            end.record()
            torch.cuda.synchronize()
            each[name] = start.elapsed_time(end) / 640 * 1000
        if rank == 0:
            print(f"{tokens} tokens, sum and norm, µs:", {name: round(value, 2) for name, value in each.items()})


def captured(work):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


if __name__ == "__main__":
    code = 1
    try:
        rank_on_a_gpu(int(sys.argv[1]), sys.argv[2])
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)  # destroying an NCCL group that a graph captured hangs
