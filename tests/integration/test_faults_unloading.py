"""A model that Triton 2.51 cannot let go of gives up its ranks all the same, and can be loaded again. Line 17."""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import eventually, gone, request

from backend import repository

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]
SECONDS, THREADS = 8, 8
"""Of streams that are cancelled at their last response: in six of six tries one of them is never let go of."""


def leave_at_the_last_response(served, name):
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        call = served.ask(request(name, "the", max_tokens=1, stream=True))
        next(call)
        call.cancel()


def test_ranks_end_though_the_server_cannot_unload(served, tiny):
    """Whether it can or, as nearly always here, cannot."""
    name = "stuck"
    repository.write(served.repository, "generate", name, {"model": str(tiny), "max_model_len": "64"})
    try:
        with served.control() as control, ThreadPoolExecutor(THREADS) as threads:
            control.load(name, 180)
            ranks = served.family(name)[1]
            for each in [threads.submit(leave_at_the_last_response, served, name) for _ in range(THREADS)]:
                each.result()
            control.unload(name, 60)
            assert ranks and gone(ranks, 90) == []
            control.load(name, 180)
            with served.pipeline(name) as pipe:
                assert pipe("the", max_tokens=2, ignore_eos=True).num_output_tokens == 2
            again = eventually(lambda: newest(served, name), 30)
            control.unload(name, 60)
            assert gone(again, 90) == []
    finally:
        shutil.rmtree(served.repository / name)


def newest(served, name):
    """The ranks of whichever stub of it has some."""
    stubs = [p for p in served.processes("triton_python_backend_stub") if f"/{name}/" in " ".join(p.cmdline())]
    return [rank for stub in stubs for rank in stub.children() if "backend.ranks.rank" in " ".join(rank.cmdline())]
