"""Sequence: one text being generated, its tokens and how many of them are computed. It does not know who asked."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from itertools import count
from math import inf

_arrivals = count()


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence's tokens are chosen and when it ends; values as validated by `params.py`."""

    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0
    """64 bits; with the index of the token it fixes every random number."""
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    """Tokens that end the sequence; holds the model's own unless ignore_eos was asked for."""
    logprobs: bool = False

    @property
    def penalised(self) -> bool:
        """Whether the choice of a token depends on how often earlier ones occurred."""
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0


@dataclass(eq=False, slots=True)
class Sequence:
    """Tokens and their place in the KV cache. Written by the Scheduler alone, between steps."""

    tokens: array[int]
    """int32 ids: the prompt, then the completion as it grows."""
    params: SamplingParams = SamplingParams()
    priority: int = 0
    """Lower goes first."""
    deadline: float = inf
    """time.monotonic() seconds."""
    salt: bytes = b""
    """Sequences share KV blocks only with sequences of the same salt."""
    arrival: int = field(default_factory=_arrivals.__next__)
    blocks: array[int] = field(default_factory=lambda: array("i"))
    keys: list[bytes] = field(default_factory=list)
    """Content keys of the full blocks of `tokens`, extended as they fill."""
    computed: int = 0
    """Tokens whose keys and values are in the cache, or will be when the steps sent so far are done."""
    in_flight: int = 0
    """Tokens that sent steps will sample and that are not yet in `tokens`."""
    slot: int = -1
    """Row of the ranks' per-sequence state while running."""
    finish_reason: str = ""
    """stop, length, cancelled or deadline; empty while alive."""
    prompt_length: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)

    def reset(self) -> None:
        """Forget the cache of ranks that are gone; for what has not run yet."""
        self.blocks, self.computed, self.in_flight, self.slot = array("i"), 0, 0, -1
        self.keys.clear()

    @property
    def pending(self) -> int:
        """Tokens that exist, or will when the steps in flight are done, and are not computed."""
        return len(self.tokens) + self.in_flight - self.computed

    @property
    def completion(self) -> array[int]:
        return self.tokens[self.prompt_length :]

    @property
    def room(self) -> int:
        """New tokens that may still be asked for, those in flight counted."""
        return self.params.max_tokens - (len(self.tokens) - self.prompt_length) - self.in_flight
