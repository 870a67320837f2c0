"""The metrics of every model: names, kinds, meanings. It does not know who counts, nor how they get out.

docs/metrics.md is the same table for people. Names and meanings that vLLM has are vLLM's, so that its dashboards and
autoscalers work; its counters end in _total where they are served, whatever its documentation calls them, so both are.
"""

from __future__ import annotations

from typing import NamedTuple

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
REASONS = ("stop", "length", "cancelled", "deadline", "error")
"""How a sequence, or a request of one answer, may end."""


def _bounds(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split()))


SECONDS = _bounds("0.001 0.0025 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640")
TOKEN_SECONDS = _bounds("0.001 0.0025 0.005 0.0075 0.01 0.015 0.02 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.5 1 2.5")


class Metric(NamedTuple):
    """One name that is served: which number of a Tally it shows, and as what."""

    name: str
    kind: str
    number: str
    meaning: str
    buckets: tuple[float, ...] = ()
    """Upper bounds, of a histogram."""
    reasons: tuple[str, ...] = ("",)
    """Values of its label `finished_reason`; one empty value: it has none."""


def _both(name: str, number: str, meaning: str, reasons: tuple[str, ...] = ("",)) -> tuple[Metric, Metric]:
    """A counter of vLLM's under both of its names."""
    first = Metric(name, COUNTER, number, meaning, reasons=reasons)
    return first, first._replace(name=f"{name}_total")


TASK = (
    Metric("tritonspeed_ranks_up", GAUGE, "ranks_up", "ranks that serve; 0 while they load or restart, or have failed"),
    Metric("tritonspeed_state", GAUGE, "state", "1 serves, 2 loads or restarts, 3 has failed for good, 0 unloaded"),
    Metric("tritonspeed_last_step_seconds", GAUGE, "last_step", "Unix time of the last finished step; 0: none yet"),
    Metric("tritonspeed_restarts_total", COUNTER, "restarts", "times that the ranks were started again"),
    Metric("tritonspeed_load_seconds", GAUGE, "load_seconds", "how long the last start of the ranks took"),
    Metric("tritonspeed_batch_tokens", GAUGE, "batch_tokens", "mean tokens (pictures) of the last second's steps"),
    Metric("tritonspeed_padding_ratio", GAUGE, "padding_ratio", "padding's share of the last second's tokens"),
    Metric("tritonspeed_proof_difference", GAUGE, "proof_difference", "of outputs from the plain computation's"),
    Metric("tritonspeed_heartbeat_seconds", GAUGE, "heartbeat", "Unix time of the last push; 0: unloaded"),
    Metric("vllm:e2e_request_latency_seconds", HISTOGRAM, "latency", "from arrival to last token or answer", SECONDS),
    *_both("vllm:request_success", "finished", "sequences (tasks: requests) that ended, by how", REASONS),
)  # fmt: skip
"""Of every task."""
GENERATE = (
    *TASK,
    Metric("tritonspeed_refused_total", COUNTER, "refused", "requests refused because too many ran or waited"),
    Metric("vllm:prompt_tokens_total", COUNTER, "prompt_tokens", "prompt tokens of sequences that got a first token"),
    Metric("vllm:generation_tokens_total", COUNTER, "generation_tokens", "tokens generated"),
    Metric("vllm:num_requests_running", GAUGE, "running", "sequences that run"),
    Metric("vllm:num_requests_waiting", GAUGE, "waiting", "sequences that wait to run"),
    Metric("vllm:kv_cache_usage_perc", GAUGE, "kv_usage", "share of the KV cache's blocks that are held"),
    *_both("vllm:prefix_cache_queries", "prefix_queries", "tokens looked up in the prefix cache"),
    *_both("vllm:prefix_cache_hits", "prefix_hits", "tokens found in the prefix cache"),
    *_both("vllm:num_preemptions", "preemptions", "sequences put back to waiting because KV blocks ran out"),
    Metric("vllm:time_to_first_token_seconds", HISTOGRAM, "first_token", "from arrival to the first token", SECONDS),
    Metric("vllm:time_per_output_token_seconds", HISTOGRAM, "token", "a sequence's mean after the 1st", TOKEN_SECONDS),
    Metric("vllm:request_queue_time_seconds", HISTOGRAM, "queue", "from arrival to the first step", SECONDS),
)  # fmt: skip
