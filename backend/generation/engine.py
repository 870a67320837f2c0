"""Engine: the thread that turns prompts into tokens, step by step. It does not know Triton, torch or who is asking.

Callers leave work in an inbox and read a Stream; everything else (scheduler, rank group, books) belongs to the thread.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from itertools import chain
from queue import Empty, SimpleQueue

from backend import fit, model_folder
from backend.config import EngineConfig
from backend.devices import resolved
from backend.errors import DeadlineExceeded, EngineDown, ServingError, serving
from backend.generation.account import Account
from backend.generation.admission import Admission
from backend.generation.blocks import BlockPool
from backend.generation.budget import Budget
from backend.generation.capacity import share
from backend.generation.completion import Completion
from backend.generation.params import Defaults
from backend.generation.plan import Sampled, pack
from backend.generation.prompt import Prompt
from backend.generation.scheduler import Chunk, Scheduler, prompt_tokens
from backend.generation.stream import Delta, News, Stream
from backend.generation.text import Text
from backend.generation.tokenizer import Tokenizer
from backend.ranks.group import RankGroup, Report
from backend.ranks.lifecycle import IDLE_CHECK, STUCK, Hooks, Lifecycle, unloaded
from backend.tally import reason_of

DECODER = "backend.compute.decoder:Decoder"
NO_ROOM = (
    "the device has no memory left for this step of the request; ask for fewer samples (n) or less text (max_tokens), "
    "or load the model with a smaller step_tokens or kv_cache_fraction"
)
TURN = 0.0005
"""Seconds that another thread keeps the interpreter while the engine's wants it; Python's 5 ms are several steps."""

HAND_OVER = 50e-6
"""Seconds that the engine's thread sleeps after first tokens, so that they do not wait for the next step to be planned:
their senders get the interpreter at once, else only after TURN. The device has a step to do meanwhile."""


class Engine:
    """Serves one generative model. `start`, then `open` or `run` from any thread, then `close`."""

    def __init__(self, config: EngineConfig, report: Report = print, worker: str = DECODER) -> None:
        self.config = resolved(config)
        self.folder = model_folder.resolve(config.model, model_folder.root())
        self.config = replace(self.config, model=str(self.folder))
        self._account = Account()
        self.tally = self._account.tally
        self.tally.patience = self.config.step_timeout + STUCK
        self._report = report
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._open: dict[int, Completion] = {}
        self._sent: deque[list[Chunk]] = deque()
        self._admission = Admission(self.config, self.tally)
        self._forecast = self._admission.forecast
        self._group = RankGroup(self.config, worker, report, meanwhile=self._meanwhile)
        hooks = Hooks(
            load=self._load,
            serve=self._serve,
            fail_begun=partial(self._fail_all, but=self._untouched),
            fail_all=self._fail_all,
            meanwhile=self._meanwhile,
        )
        self._life = Lifecycle(self.config, self._group, self.tally, report, hooks)

    # ---- any thread

    def start(self) -> None:
        """Load, warm up and begin to serve; LoadError with a one-line reason otherwise."""
        for line in fit.check(self.config).report():
            self._report(line)
        self.tokenizer = Tokenizer.from_folder(self.folder)
        self.defaults = Defaults.from_folder(self.folder)
        sys.setswitchinterval(TURN)
        self._life.start()

    @property
    def healthy(self) -> bool:
        return not self._life.down

    def check(self) -> int:
        """Raise RuntimeError unless the books of blocks and slots balance; how many sequences are open."""
        done: Future[int] = Future()

        def look() -> None:
            try:
                self._scheduler.check()
                done.set_result(self._scheduler.num_running + self._scheduler.num_waiting)
            except RuntimeError as error:
                done.set_exception(error)

        self._inbox.put(look)
        return done.result(self.config.step_timeout)

    def open(self, prompts: list[Prompt], notify: Callable[[bool], None]) -> Stream:
        """Queue the prompts as one request, to be followed by `leave`.

        `notify` is called on the engine's thread when there is news, with whether a sequence ended.
        """
        self._life.check()
        for prompt in prompts:
            prompt.check(self.max_model_len, self.vocab)
        stream = Stream(sum(prompt.n for prompt in prompts), notify)
        tokens = sum(len(prompt.token_ids) * prompt.n for prompt in prompts)
        self._admission.enter(stream, stream.sequences, tokens)
        self._inbox.put(partial(self._add, prompts, stream))
        return stream

    def leave(self, stream: Stream) -> None:
        """The caller has all, or has gone: what is left of its request ends before the next step."""
        self._admission.leave(stream, stream.sequences)
        if not stream.done:
            self._inbox.put(partial(self._abort, stream))

    def run(self, prompts: list[Prompt], timeout: float | None = None) -> Iterator[list[Delta]]:
        """The news of a request as it comes, for threads; `timeout` seconds between two looks."""
        news = threading.Event()
        stream = self.open(prompts, lambda ended: news.set())
        try:
            while not stream.done:
                if not news.wait(timeout):
                    raise EngineDown(f"no news for {timeout} s")
                news.clear()
                if deltas := stream.take():
                    yield deltas
        finally:
            self.leave(stream)

    def close(self) -> None:
        """End the ranks and every request still open."""
        self._life.closing.set()
        self._inbox.put(lambda: None)  # wakes an idle thread
        self._life.close()

    # ---- the engine's thread

    def _serve(self) -> None:
        depth = self.config.run_ahead
        while not self._life.closing.is_set():
            self._drain(wait=not self._sent and self._scheduler.idle)
            self._expire()
            self._pace()
            if chunks := self._scheduler.schedule():
                self._group.send("step", plan := pack(chunks, self.config.block_size))
                self._sent.append(chunks)
                self._budget.sent(prompt_tokens(chunks))
                self._account.sent(chunks, len(plan.input_ids), self._open)
            if len(self._sent) > (depth if chunks else 0):
                sampled = self._receive()
                self.tally.done()
                self._budget.received()
                self._commit(self._sent.popleft(), sampled)
            self._account.turn(self._scheduler)
            self._forecast.turn(self._scheduler.num_waiting)

    def _pace(self) -> None:
        """How much of the next step prompts may take."""
        late = 0 < self.config.target_ttft_ms < 1e3 * self._forecast.seconds
        self._scheduler.prefill_budget = self._budget.tokens(late)

    def _receive(self) -> Sampled:
        """The oldest step's tokens; deadlines hold meanwhile, and `close` need not wait for a rank that hangs."""
        limit, begun = self.config.step_timeout, time.monotonic()
        while not self._group.answering(min(IDLE_CHECK, limit)) and time.monotonic() - begun < limit:
            self._expire()
            if self._life.closing.is_set():
                raise unloaded()
        sampled: Sampled = self._group.receive(limit, since=begun)[0]
        return sampled

    def _drain(self, wait: bool) -> None:
        """Do what callers left; if told so, wait for some and look after the ranks meanwhile."""
        try:
            if wait:
                self._inbox.get(timeout=IDLE_CHECK)()
            for _ in range(self._inbox.qsize()):
                self._inbox.get()()
        except Empty:
            self._group.check()

    def _add(self, prompts: list[Prompt], stream: Stream) -> None:
        """Without the prefix cache each prompt gets a salt of its own: its samples share blocks, others find none."""
        try:
            sequences = (
                prompt.sequences(self.max_model_len, prompt.salt if self.config.prefix_cache else os.urandom(16))
                for prompt in prompts
            )
            for index, seq in enumerate(chain.from_iterable(sequences)):
                self._open[seq.arrival] = Completion(seq, stream, index, Text(self.tokenizer, seq.params.stop))
                self._scheduler.add(seq)
        except Exception as error:  # whatever is wrong with one request must not end the others
            self._end(stream, serving(error))

    def _commit(self, chunks: list[Chunk], sampled: Sampled) -> None:
        """Record a computed step and tell its readers."""
        logprobs = None if sampled.logprobs is None else sampled.logprobs.tolist()
        told: dict[Stream, bool] = {}
        begun = False
        for lost in sampled.lost:  # before what the step has not computed is offered to others as a known prefix
            if completion := self._open.get(chunks[lost].seq.arrival):
                self._end(completion.stream, ServingError(NO_ROOM))
        accepted = self._scheduler.commit(chunks, sampled.token_ids.tolist())
        self.tally.generation_tokens += len(accepted)
        for seq, token, row in accepted:
            if (completion := self._open.get(seq.arrival)) is None:
                continue  # a moment ago another sequence of its request failed
            stream = completion.stream
            begun = begun or not completion.first
            try:
                stream.put(self._news(completion, token, logprobs[row] if logprobs else None))
            except Exception as error:  # a tokenizer's bug must not end the neighbours
                self._end(stream, serving(error))
            told[stream] = bool(seq.finish_reason) or told.get(stream, False)
        for stream, ended in told.items():
            stream.ring(ended)
        if begun:
            time.sleep(HAND_OVER)

    def _news(self, completion: Completion, token: int, logprob: float | None) -> News:
        """One more token; ends the sequence when it completes a stop string."""
        seq, text = completion.seq, completion.seen(token)
        if completion.text.stopped:
            self._scheduler.finish(seq, "stop")
            seq.finish_reason = "stop"  # also where this was the last token allowed
        if not completion.first:
            self._account.first(completion)
            self._admission.began(completion.stream, seq.prompt_length)
        if seq.finish_reason:
            self._account.last(completion)
            del self._open[seq.arrival]
        return completion.news(token, text, logprob)

    def _expire(self) -> None:
        for seq in self._scheduler.expire(time.monotonic()):
            if completion := self._open.get(seq.arrival):
                self._end(completion.stream, DeadlineExceeded("the request's time limit passed before it was done"))

    def _end(self, stream: Stream, error: ServingError) -> None:
        stream.fail(error)
        self._abort(stream, reason_of(error))

    def _abort(self, stream: Stream, reason: str = "cancelled") -> None:
        for completion in [c for c in self._open.values() if c.stream is stream]:
            self._scheduler.abort(completion.seq)
            del self._open[completion.seq.arrival]
            self.tally.ended(reason)

    # ---- start and restart

    def _load(self) -> str:
        """Share out the memory of ranks that have just started, and warm them up."""
        limit = self.config.load_timeout
        capacities = self._group.call("capacity", timeout=limit)
        self.vocab = capacities[0].vocab_size
        blocks, self.max_model_len = share(self.config, capacities)
        self._group.call("allocate", blocks, self.max_model_len, timeout=limit)
        proofs = self._group.call("warm_up", timeout=limit)
        self.tally.proof_difference = max((proof for proof in proofs if proof), default=0.0)
        self._renew(blocks)
        size, longest = self.config.block_size, self.max_model_len
        return f": {blocks} KV blocks of {size} tokens, sequences up to {longest} tokens"

    def _renew(self, blocks: int) -> None:
        """An empty cache and nothing under way; whatever is open waits, in its order."""
        self._sent.clear()
        self._scheduler = Scheduler(
            BlockPool(blocks, self.config.block_size),
            self.config.max_sequences,
            self.config.step_tokens,
            self.config.kv_headroom,
        )
        self._budget = Budget(self.config.target_itl_ms / 1e3, self.config.block_size, self.config.step_tokens)
        self._forecast.restart()
        self._account.opened()
        for completion in [*self._open.values()]:
            if completion.seq.arrival in self._open:  # else another sequence of its request has just found no room
                self._requeue(completion)

    def _requeue(self, completion: Completion) -> None:
        seq = completion.seq
        seq.reset()
        try:
            if seq.prompt_length + seq.params.max_tokens > self.max_model_len:
                raise EngineDown(f"after a restart there is room for {self.max_model_len} tokens only")
            self._scheduler.add(seq)
        except ServingError as error:
            self._end(completion.stream, error)

    def _meanwhile(self) -> None:
        """While ranks are started again: callers may leave, and deadlines hold."""
        if self._life.restarting:
            self._drain(wait=False)
            self._expire()
            self.tally.waiting = self._scheduler.num_waiting

    def _untouched(self) -> set[Stream]:
        """Requests none of whose sequences has had a step."""
        waiting = Counter(c.stream for c in self._open.values() if not c.begun and c.seq.slot < 0)
        return {stream for stream, count in waiting.items() if count == stream.sequences}

    def _fail_all(self, error: ServingError, but: Callable[[], set[Stream]] = set) -> None:
        """End every request, those that are still in the inbox included, `but` some, which wait from now on."""
        self._drain(wait=False)
        kept = but()
        failed = [c for c in self._open.values() if c.stream not in kept]
        for completion in failed:
            del self._open[completion.seq.arrival]
            self.tally.ended(reason_of(error))
        if failed:
            self._renew(self._scheduler.pool.num_blocks)
        for stream in dict.fromkeys(c.stream for c in failed):
            stream.fail(error)
