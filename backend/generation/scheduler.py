"""Scheduler: decides which tokens the next step computes, and records what came of it.

It does not know how a step is computed, nor who reads the tokens.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

from backend.errors import InvalidInput
from backend.generation.admission import Headroom
from backend.generation.blocks import BlockPool
from backend.generation.heap import Heap
from backend.generation.sequence import Sequence

HELD_BACK = 16
"""Waiting sequences that are passed over in a step because a running one computes their prefix; looking costs time."""


class Chunk(NamedTuple):
    """Tokens `start` to `start + length` of a sequence, to be computed in one step."""

    seq: Sequence
    start: int
    length: int
    samples: bool
    """Whether it reaches the end of what exists, so that the step yields the next token."""
    first: bool
    """Whether the sequence has just been given its slot."""
    blocks: array[int]
    """The sequence's own array, which grows with it; the sequence has another one once it lost these blocks."""


class Accepted(NamedTuple):
    """A sampled token that became part of its sequence."""

    seq: Sequence
    token_id: int
    row: int
    """Index into the arrays of what the step sampled."""


class Scheduler:
    """Waiting and running sequences. There is no prefill phase and no decode phase.

    A sequence has tokens whose keys and values are not computed yet, and a step computes some of them: a new prompt,
    the rest of a long one, one more token and a restart after preemption are one case (Dynamic SplitFuse).

    Any number of steps may be scheduled before the first of them is committed; they must be computed and committed in
    order. So a sequence that ends or is preempted gives up its blocks and slot at once: steps sent before may still
    write there, but any step that uses them for another comes later.
    """

    def __init__(self, pool: BlockPool, max_sequences: int, step_tokens: int, kv_headroom: float = 0.0) -> None:
        self.pool = pool
        self.step_tokens = step_tokens
        self.prefill_budget = step_tokens
        """Of those, at least 1, for chunks that are more than one more token; set between steps."""
        self._headroom = Headroom(kv_headroom, pool)
        self.preemptions = 0
        """Sequences put back to waiting so far, because blocks ran out."""
        # No more sequences than a step has tokens: so each running one advances in every step, and none starves.
        self._free_slots = list(range(min(max_sequences, step_tokens)))[::-1]
        self._waiting = Heap(_order)
        self._deadlines = Heap(lambda seq: (seq.deadline, seq.arrival))
        self._running: dict[Sequence, None] = {}

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def idle(self) -> bool:
        return not self._running and not self._waiting

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence, unless it was aborted before; InvalidInput if it could never be computed."""
        if seq.finish_reason:
            return
        limit = self.pool.num_blocks * self.pool.block_size
        prompt, new = seq.prompt_length, seq.params.max_tokens
        if prompt < 1 or new < 1:
            raise InvalidInput(f"prompt and max_tokens must be at least 1 token, not {prompt} and {new}")
        if prompt + new - 1 > limit:  # the last token is never computed
            raise InvalidInput(f"prompt ({prompt}) plus max_tokens ({new}) exceeds the KV cache's {limit + 1} tokens")
        self._waiting.push(seq)
        if seq.deadline < float("inf"):
            self._deadlines.push(seq)

    def abort(self, seq: Sequence, reason: str = "cancelled") -> None:
        """End `seq` wherever it is; tokens of it that are in flight will be dropped."""
        self.finish(seq, reason)

    def finish(self, seq: Sequence, reason: str) -> None:
        """End `seq` for `reason`, unless it has ended before, and free its blocks and slot."""
        if seq.finish_reason:
            return
        seq.finish_reason = reason
        if reason in ("stop", "length"):
            self._headroom.ended(seq)
        self._waiting.discard(seq)
        self._deadlines.discard(seq)
        if seq in self._running:
            self._leave(seq)

    def expire(self, now: float) -> list[Sequence]:
        """End the sequences whose deadline is at or before `now`, in time.monotonic() seconds."""
        expired = []
        while (seq := self._deadlines.first()) and seq.deadline <= now:
            self.finish(seq, "deadline")
            expired.append(seq)
        return expired

    def schedule(self) -> list[Chunk]:
        """Choose the next step: at most one chunk a sequence, together at most `step_tokens` long.

        Empty, though not `idle`, when nothing can be done before a step in flight is committed.
        """
        chunks = self._continue_running()
        budget = self.step_tokens - sum([chunk.length for chunk in chunks])
        return chunks + self._admit_waiting(min(budget, self.prefill_budget - prompt_tokens(chunks)))

    def commit(self, chunks: list[Chunk], token_ids: list[int]) -> list[Accepted]:
        """Record a computed step: `token_ids` holds one token for each chunk that samples, in order."""
        if len(token_ids) != (rows := sum([chunk.samples for chunk in chunks])):
            raise ValueError(f"{len(token_ids)} tokens for {rows} rows")
        accepted = []
        sampled = enumerate(token_ids)
        for chunk in chunks:
            seq = chunk.seq
            if chunk.blocks is seq.blocks:
                self.pool.publish(seq, chunk.start, chunk.start + chunk.length)
            if chunk.samples:
                row, token_id = next(sampled)
                seq.in_flight -= 1
                if not seq.finish_reason:
                    accepted.append(Accepted(seq, token_id, row))
                    self._append(seq, token_id)
        return accepted

    def check(self) -> None:
        """RuntimeError unless blocks and slots balance with the sequences that run."""
        self.pool.check(self._running)
        taken = sorted([seq.slot for seq in self._running] + self._free_slots)
        if taken != list(range(len(taken))) or any(seq in self._waiting for seq in self._running):
            raise RuntimeError("the books of the scheduler do not balance: slots")

    def _continue_running(self) -> list[Chunk]:
        chunks = []
        budget, prefill = self.step_tokens, self.prefill_budget
        for seq in sorted(self._running, key=_turn):
            if not budget:
                break
            if seq.slot < 0 or seq.room <= 0:  # preempted a moment ago, or all it may ask for is in flight
                continue
            prompt = seq.pending > 1
            length = min(seq.pending, budget, prefill) if prompt else 1
            if not length:
                break  # those with one more token came before
            if self.pool.grow(seq, seq.computed + length) or self._preempt_for(seq, seq.computed + length):
                chunks.append(_advance(seq, length))
                budget -= length
                prefill -= length * prompt
        return chunks

    def _admit_waiting(self, budget: int) -> list[Chunk]:
        """Give waiting sequences their first chunks, in their order, until one finds no room."""
        chunks: list[Chunk] = []
        held_back: list[Sequence] = []
        if budget <= 0 or not self._free_slots or not self._waiting:
            return chunks
        needed = self._headroom.need(self._running)
        while budget and self._free_slots and len(held_back) < HELD_BACK and (seq := self._waiting.first()):
            if self.pool.awaits(seq):
                held_back.append(seq)
                self._waiting.discard(seq)
            elif seq.in_flight or not self.pool.admit(seq, spare=self._spare(seq, needed)):
                break
            else:
                self._enter(seq)
                needed += self._headroom.need([seq])
                length = min(seq.pending, budget)
                chunks.append(_advance(seq, length, first=True))
                budget -= length
        for seq in held_back:
            self._waiting.push(seq)
        return chunks

    def _spare(self, seq: Sequence, needed: int) -> int:
        """Blocks to be left free: without one for each running sequence the next steps would preempt this one again."""
        if not self._running:
            return 0
        return max(len(self._running), self._headroom.blocks(needed + self._headroom.need([seq])))

    def _preempt_for(self, seq: Sequence, length: int) -> bool:
        """Preempt until there are blocks for `length` tokens of `seq`; False if it was itself preempted.

        Who is preempted has no chunk in this step yet: only sequences with one token to go need more blocks than they
        were admitted with, they come first in a step, the oldest before the others, and the youngest is preempted.
        """
        while not self.pool.grow(seq, length):
            victim = max(self._running, key=_order)
            self._leave(victim)
            self._waiting.push(victim)
            self.preemptions += 1
            if victim is seq:
                return False
        return True

    def _append(self, seq: Sequence, token_id: int) -> None:
        seq.tokens.append(token_id)
        if token_id in seq.params.stop_token_ids:
            self.finish(seq, "stop")
        elif len(seq.tokens) - seq.prompt_length == seq.params.max_tokens:
            self.finish(seq, "length")

    def _enter(self, seq: Sequence) -> None:
        self._waiting.discard(seq)
        self._running[seq] = None
        seq.slot = self._free_slots.pop()

    def _leave(self, seq: Sequence) -> None:
        del self._running[seq]
        self._free_slots.append(seq.slot)
        seq.slot = -1
        self.pool.release(seq)


def _order(seq: Sequence) -> tuple[int, int]:
    """Who is admitted first, and preempted last."""
    return seq.priority, seq.arrival


def _turn(seq: Sequence) -> tuple[bool, int, int]:
    """Whose turn it is: one more token costs nobody much, so it comes before the rest of any prompt."""
    return seq.pending > 1, seq.priority, seq.arrival


def prompt_tokens(chunks: list[Chunk]) -> int:
    """Tokens of the chunks that are more than one more token."""
    return sum([chunk.length for chunk in chunks if chunk.length > 1 or not chunk.samples])


def _advance(seq: Sequence, length: int, first: bool = False) -> Chunk:
    """Cut the next chunk of `seq`, whose tokens from now on count as computed."""
    samples = length == seq.pending
    chunk = Chunk(seq, seq.computed, length, samples, first, seq.blocks)
    seq.computed += length
    seq.in_flight += samples
    return chunk
