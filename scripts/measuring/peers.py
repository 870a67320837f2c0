"""transformers as a contender, in a process of its own with the same dtype, device and threads.

`generate`: requests in batches, left-padded to the longest, each as long as its longest output; tokens that nobody
asked for do not count. `continuous`: transformers' own continuous batching. The process is
`python -m measuring.peers WAY MODEL DEVICE DTYPE THREADS SHARE`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from measuring.figures import Trace
from measuring.remote import Remote, answer
from measuring.workloads import Request

BATCH = 128
"""Sequences of one `generate`, at the most."""


class Peer:
    """Either of them, from the bench's side."""

    def __init__(self, way: str, parameters: Mapping[str, str], share: float = 0.0) -> None:
        from backend.config import EngineConfig
        from backend.devices import resolved

        config = resolved(EngineConfig.from_parameters(parameters))
        cuda = config.device == "cuda"
        dtype = config.dtype if config.dtype != "auto" else "bfloat16" if cuda else "float32"
        threads = str(config.threads * config.tensor_parallel)
        environment = {"OMP_NUM_THREADS": threads, "TRANSFORMERS_VERBOSITY": "error"}
        self._remote = Remote(
            "measuring.peers", way, config.model, config.device, dtype, threads, str(share), env=environment
        )
        self._remote.receive()

    def run(self, requests: list[Request], clients: int) -> list[Trace]:
        """Traces in the order of the requests."""
        traces: list[Trace] = self._remote.ask((requests, clients))
        return traces

    def close(self) -> None:
        self._remote.close()


def begin(way: str, folder: str, device: str, dtype: str, threads: str, share: str) -> Callable[[Any], list[Trace]]:
    """Load the model; the function of (requests, clients)."""
    import torch

    torch.set_num_threads(int(threads))
    model = loaded(folder, device, dtype)
    run = partial(generate, model) if way == "generate" else Continuous(model, float(share)).run
    return lambda question: run(*question)


def loaded(folder: str, device: str, dtype: str) -> Any:
    """The model as transformers loads it, and never at its end."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.generation_config.eos_token_id = None
    return model.to(device).eval()


def generate(model: Any, requests: list[Request], clients: int) -> list[Trace]:
    """Batch after batch: of as many as there are clients, or of BATCH."""
    if any(request.at for request in requests):
        raise ValueError("generate takes no requests that come later")
    start, traces, size = time.perf_counter(), [], min(clients or BATCH, BATCH)
    for first in range(0, len(requests), size):
        batch = requests[first : first + size]
        begun = time.perf_counter() - start if clients else 0.0
        times = [when - start for when in _batch(model, batch)]
        traces += [Trace(begun, [(when, 1) for when in times[: request.output]]) for request in batch]
    return traces


def _batch(model: Any, batch: list[Request]) -> list[float]:
    """When each token of the longest came (time.perf_counter)."""
    import torch

    longest, output = max(len(each.ids) for each in batch), max(each.output for each in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(batch):
        ids[row, longest - len(request.ids) :] = torch.tensor(request.ids)
        mask[row, longest - len(request.ids) :] = 1
    times: list[float] = []

    def clock(seen: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        seen[0, -1].item()  # on CUDA: wait until the token is there
        times.append(time.perf_counter())
        return torch.zeros(len(seen), dtype=torch.bool, device=seen.device)

    model.generate(
        ids.to(model.device), attention_mask=mask.to(model.device), do_sample=False, min_new_tokens=output,
        max_new_tokens=output, pad_token_id=0, stopping_criteria=[clock],
    )  # fmt: skip
    return times


class Continuous:
    """transformers' manager of continuous batching, started once."""

    def __init__(self, model: Any, share: float) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        greedy = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1
        )
        settings = ContinuousBatchingConfig(max_memory_percent=share or None)
        self._manager = model.init_continuous_batching(generation_config=greedy, continuous_batching_config=settings)
        if model.device.type == "cuda":
            self._manager.warmup()
        self._manager.start()

    def close(self) -> None:
        self._manager.stop(block=True, timeout=10)

    def run(self, requests: list[Request], clients: int) -> list[Trace]:
        start, traces = time.perf_counter(), [Trace(request.at) for request in requests]
        names: dict[str, int] = {}
        sent = done = 0
        while done < len(requests):
            while sent < len(requests) and self._due(requests[sent], start, clients, sent - done):
                if clients:
                    traces[sent].start = time.perf_counter() - start
                names[self._send(requests[sent])] = sent
                sent += 1
            result = self._manager.get_result(timeout=0.001 if sent < len(requests) else 0.1)
            if result is not None:
                traces[names[result.request_id]].arrivals = _arrivals(result, start)
                done += 1
            elif not self._manager.is_running():
                raise RuntimeError("transformers' continuous batching ended")
        return traces

    def _due(self, request: Request, start: float, clients: int, running: int) -> bool:
        return running < clients if clients else time.perf_counter() >= start + request.at

    def _send(self, request: Request) -> str:
        name = self._manager.add_request(
            request.ids, max_new_tokens=request.output, record_timestamps=True, eos_token_id=-1
        )
        if name is None:
            raise RuntimeError("transformers' continuous batching takes no requests")
        return str(name)


def _arrivals(result: Any, start: float) -> list[tuple[float, int]]:
    if result.error is not None:
        raise RuntimeError(result.error)
    return [(when - start, 1) for when in result.timestamps]


if __name__ == "__main__":
    answer(lambda: begin(*sys.argv[1:]))
