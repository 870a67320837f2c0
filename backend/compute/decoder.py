"""Decoder: a rank's worker for generation; it turns plans into tokens. It does not know requests or text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backend.checkpoint import dtype_name
from backend.compute import blocks, norms, onednn, prompt_graphs, rope_table
from backend.compute.all_reduce import agree
from backend.compute.attention import reference
from backend.compute.attention.families import length_limit
from backend.compute.attention.step import Step
from backend.compute.cache import KVCache, bytes_per_block, kept_as, probe
from backend.compute.dense.base import ops
from backend.compute.footprint import footprint
from backend.compute.graphs import DecodeGraph, Inputs, sizes
from backend.compute.load import load
from backend.compute.offload.offload import Offload
from backend.compute.prompt_graphs import PromptGraph
from backend.compute.proof import check, difference, plain_modules, shaken
from backend.compute.quantized import trial
from backend.compute.quantized.layer import packed_weights
from backend.compute.room import Room, nothing, told
from backend.compute.sampler import BROKEN, Sampler
from backend.compute.tensor_parallel import VocabParallelHead, join
from backend.compute.upload import download, upload
from backend.config import DTYPES, EngineConfig
from backend.devices import free_host_memory, gib
from backend.errors import LoadError, one_line
from backend.generation.capacity import Capacity
from backend.generation.plan import LAST_TOKEN, Ints, Plan, Sampled, Sampling
from backend.model_folder import Checkpoint, resolve
from backend.ranks.rank import Birth, Deferred

SHORT, LONG = 24, 300
"""Tokens of the output proof's prompts."""


class Decoder:
    """One rank's weights, KV cache, per-slot state and CUDA graphs. Every rank gets every plan, in order."""

    def __init__(self, birth: Birth, progress: Callable[[str], None]) -> None:
        self._config, self._rank, self._world = birth.config, birth.rank, birth.world
        self._progress = progress if birth.rank == 0 else lambda text: None
        self._checkpoint = Checkpoint.open(resolve(birth.config.model, None))
        self._dtype = dtype_of(birth.config, self._checkpoint)
        self._device = join(birth, progress)
        self._kept = kept_as(birth.config.kv_cache_dtype, self._dtype, self._device)
        self._room = Room(self._device, birth.world)
        self._offload = Offload.of(birth.config, birth.world, self._device)
        self._model = load(
            birth.config, birth.rank, birth.world, self._device, self._dtype, self._told_share(), offload=self._offload
        )
        self._progress(self._offload.told if self._offload else f"weights: {gib(footprint(self._model))} a rank")
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # what merging projections let go of
            if not self._offload:
                trial.tried(trial.multiplied(self._model))
        self._specs = probe(self._model, self._device)
        self._ops = ops(self._device.type)
        self._fused = birth.config.fused_kernels and blocks.pays(self._device)
        if self._fused:
            self._fuse()
        self._onednn = not self._fused and birth.config.fused_kernels and onednn.pays(self._device, self._dtype)
        if self._onednn:
            self._progress(f"{onednn.install(self._model)} linear layers by oneDNN")
        self._sampler = Sampler(self._checkpoint.vocab_size, self._config.max_sequences, self._device)
        slots = self._config.max_sequences + 1  # one for padding
        self._last = torch.zeros(slots, dtype=torch.int64, device=self._device)
        self._graphs: dict[int, DecodeGraph] = {}
        self._prompts: dict[int, PromptGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None

    def _fuse(self) -> None:
        """What transformers computes in many kernels, in few."""
        self._progress(blocks.install(self._model, self._specs, self._world, self._dtype, self._device))
        norms.replace(self._model)
        for module in self._model.modules():
            if isinstance(module, VocabParallelHead):
                module.project = blocks.projected

    def capacity(self) -> Capacity:
        """What fits beside the weights and the largest step's activations."""
        size, config, longest = self._config.block_size, self._config, self._longest()
        if self._device.type == "cuda":
            self.allocate(-(-config.step_tokens // size) + 1, longest)
            first = prefill(config.step_tokens, min(config.step_tokens, longest), size, config.max_sequences)
            self._room.per_token = self._room.peak(lambda: self._run(first)) / len(first.input_ids)
            most = decode(config.max_sequences, costly=True)
            self._room.per_row = self._room.peak(lambda: self._run(most)) / len(most.rows)  # its memory stays reserved
            del self._cache
            free = torch.cuda.mem_get_info()[0]
        else:
            free = free_host_memory() // self._world
        blocks = int(free * config.kv_cache_fraction) // bytes_per_block(self._specs, size, self._kept)
        return Capacity(blocks, longest, self._checkpoint.vocab_size)

    def _longest(self) -> int:
        """Tokens of the longest sequence that the model was made for, and that neighbours do not change."""
        stated = self._checkpoint.max_model_len or self._config.max_model_len
        return min(stated, length_limit(self._model.config) or stated)

    def allocate(self, num_blocks: int, max_model_len: int) -> None:
        """Make the KV cache, for sequences up to `max_model_len` tokens."""
        self._max_model_len = max_model_len
        self._cache = KVCache(self._specs, num_blocks, self._config.block_size, self._kept, self._device)
        if self._fused:
            rope_table.install(self._model, max_model_len, self._dtype, self._device)

    @torch.inference_mode()
    def warm_up(self) -> float:
        """A prefill of the full budget, CUDA graphs of prompts, a decode of every size that has one (else of one and of
        all), and the output proof, whose difference it returns.
        """
        config, longest = self._config, min(self._max_model_len, self._cache.num_blocks * self._config.block_size)
        self._run(prefill(config.step_tokens, longest, config.block_size, config.max_sequences))
        graphs = self._device.type == "cuda" and config.cuda_graphs
        if graphs:
            self._capture_prompts()
        captured = sizes(config.max_sequences)[::-1] if graphs else [1, config.max_sequences]
        for done, size in enumerate(captured):  # the largest first: the others fit into its memory
            if graphs:
                self._graphs[size] = self._capture(size)
            self._run(decode(size))
            self._progress(f"warm-up: decode of {size} sequences, {done + 1} of {len(captured)}")
        self._room.hold(self._room.bytes(config.step_tokens, config.max_sequences))  # captures gave it back
        if self._offload:
            self._offload.prove(lambda: self._proof(None, graphs=False))
        return self.prove()

    @torch.inference_mode()
    def prove(self) -> float:
        """How far its logits are from those of plain torch on the same weights; LoadError where that is too far.

        Two prompts, and one more token.
        """
        packed = packed_weights(self._model).values()
        if self._before_last() < 1:
            return 0.0  # no token may follow another
        if not packed and not self._fused and not self._graphs and not self._onednn:
            return 0.0  # plain torch is what serves
        ways = {}
        with plain_modules(self._model):
            plain = self._proof(reference, graphs=False)
        if packed:
            with plain_modules(self._model, products=False):
                ways["quantization"] = self._proof(reference, graphs=False)
        ways["fused_kernels"] = self._proof(None, graphs=False)
        if self._graphs:
            ways["cuda_graphs"] = self._proof(None, graphs=True)
        rounded = {torch.float8_e4m3fn for weight in packed if weight.scheme.kind == "fp8"}  # activations of prompts
        dtypes = (self._dtype, self._kept, *rounded)
        found = check(ways, plain, *dtypes, noise=lambda: self._noise(plain, *dtypes))
        if self._device.type == "cuda":
            taken = torch.cuda.memory_reserved(self._device)
            self._progress(f"memory: {gib(taken)} a rank, {gib(self._cache.nbytes)} of it KV cache")
        self._progress(f"output proof: logits within {found:.2g} of their spread of the plain computation's")
        return found

    def _noise(self, plain: Tensor, *dtypes: torch.dtype) -> float:
        """How far the plain computation's logits move when each layer rounds what it adds another way."""
        layers = blocks.layers_of(self._model, len(self._specs)) or ()
        with plain_modules(self._model), shaken(layers, *dtypes):
            found = difference(self._proof(reference, graphs=False), plain)
        self._progress(f"output proof: rounding alone moves logits by {found:.2g} of their spread")
        return found

    def _before_last(self) -> int:
        """Tokens before the last one of the longest sequence."""
        return min(self._cache.num_blocks * self._config.block_size, self._max_model_len) - 1

    def _proof(self, kernel: Any, graphs: bool) -> Tensor:
        """Logits [3, vocabulary] after two made-up prompts, which kernels for many tokens and for fewer compute, and
        after one more token.
        """
        size, limit = self._config.block_size, self._before_last()
        ids = (np.arange(LONG + 1, dtype=np.int32) * 7919 + 13) % self._checkpoint.vocab_size

        def after(count: int) -> Tensor:
            plan = replace(prefill(count, count, size, 1), input_ids=ids[:count])
            return self._logits(plan, kernel, graphs)[0].clone()

        few = min(SHORT, limit)
        prompts = [after(min(LONG, limit, self._config.step_tokens)), after(few)]
        more = following(few, ids[few : few + 1], size)
        last = self._graphs[min(self._graphs)].replay(more)[0] if graphs else self._logits(more, kernel)
        return torch.stack([*prompts, last[0]])

    def step(self, plan: Plan) -> Sampled | Deferred:
        """Compute the plan, less the chunks that there is no memory for; the answer of rank 0 counts."""
        kept, lost = self._room.keep(plan, self._needs)
        if not lost:
            return self._answer(*self._run(plan))
        self._progress(f"no device memory for {len(lost)} of {len(plan.slots)} sequences of a step")
        return told(self._answer(*(self._run(kept) if len(kept.slots) else nothing(self._device))), plan, lost)

    def _needs(self, plan: Plan) -> int:
        """Bytes that computing it allocates, for Room."""
        graph = self._size(plan) > 0
        if graph and plan.sampling.plain:
            return 0
        return self._room.bytes(0 if graph else len(plan.input_ids), len(plan.rows))

    def _size(self, plan: Plan) -> int:
        """Sequences of the graph that computes it; 0: none does."""
        return min((size for size in self._graphs if size >= len(plan.rows)), default=0) if plan.decode else 0

    @torch.inference_mode()
    def _run(self, plan: Plan) -> tuple[Tensor, Tensor | None]:
        """Sampled token ids [R] and log-probabilities [R] or None, on the device."""
        if size := self._size(plan):
            logits, tokens = self._graphs[size].replay(plan)
            if plan.sampling.plain:
                return tokens, None
        else:
            logits = self._logits(plan, graphs=True)
        slots, rows = self._put(plan.slots).long(), self._put(plan.rows)
        token_ids, logprobs = self._sampler.sample(logits, plan.sampling, slots[rows], plan.histories)
        if self._world > 1 and self._device.type == "cuda" and not plan.sampling.greedy:
            torch.distributed.broadcast(token_ids, 0)  # a scan on CUDA may round differently on another GPU
        self._last[slots[rows]] = token_ids.clamp(min=0)  # of a broken row too: the next step is already on its way
        return token_ids, logprobs

    def _logits(self, plan: Plan, kernel: Any = None, graphs: bool = False) -> Tensor:
        """[R, vocabulary], of the last token of each chunk that samples; `kernel` in place of the usual attention."""
        if graphs and (size := prompt_graphs.covering(self._prompts, len(plan.input_ids))):
            return self._prompts[size].replay(plan, Step.from_plan(plan, self._device, self._cache))
        count = len(plan.rows)
        ids, slots = self._put(plan.input_ids), self._put(np.repeat(plan.slots, np.diff(plan.query_starts)))
        ends = self._put(plan.query_starts[1:][plan.rows] - 1 if count else np.zeros(1, np.int64)).long()
        step = Step.from_plan(plan, self._device, self._cache)
        step = step if kernel is None else replace(step, kernel=kernel)
        known = self._known(ids.long(), slots.long())
        return self._forward(known, self._put(plan.positions).long(), step, ends)[:count]

    def _known(self, ids: Tensor, slots: Tensor) -> Tensor:
        """int64 [T] with the tokens that only the ranks know."""
        return torch.where(ids == LAST_TOKEN, self._last[slots], ids)

    def _forward(self, ids: Tensor, positions: Tensor, step: Step, keep: Tensor | int) -> Tensor:
        output = self._model(
            input_ids=ids[None], position_ids=positions[None], use_cache=False, step=step, logits_to_keep=keep
        )
        logits: Tensor = output.logits[0]
        return logits

    def _capture_prompts(self) -> None:
        config, places = self._config, prompt_graphs.Places()
        step = Step.from_plan(prefill(1, 1, config.block_size, 1), self._device, self._cache)

        def forward(ids: Tensor, positions: Tensor, slots: Tensor, step: Step, ends: Tensor) -> Tensor:
            return self._forward(self._known(ids, slots), positions, step, ends)

        reason = ""
        try:
            for size in prompt_graphs.sizes(config.step_tokens)[::-1]:
                inputs = prompt_graphs.Inputs(self._cache, size, min(size, config.max_sequences), len(self._last) - 1)
                self._prompts[size] = PromptGraph(forward, inputs, step, places, self._pool)
        except RuntimeError as error:  # code that waits for the device, say: then Python launches each kernel
            reason = one_line(error)
        if not agree(self._world, self._device, not reason):
            self._prompts.clear()
            self._progress(f"warm-up: prompts without graphs: {reason or 'another rank cannot capture them'}")
            return
        seconds = self._most([graph.seconds() for graph in self._prompts.values()])
        soonest = prompt_graphs.soonest(dict(zip(self._prompts, seconds, strict=True)))
        self._prompts = {size: self._prompts[by] for size, by in soonest.items()}
        graphs = len(set(soonest.values()))
        self._progress(f"warm-up: prompts of up to {config.step_tokens} tokens in {graphs} graphs")

    def _most(self, values: list[float]) -> list[float]:
        """The largest of all ranks, of each."""
        if self._world == 1:
            return values
        found = torch.tensor(values, device=self._device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return [float(value) for value in found.tolist()]

    def _capture(self, size: int) -> DecodeGraph:
        width = -(-self._max_model_len // self._config.block_size)
        return DecodeGraph(self, Inputs(self._cache, size, width, len(self._last) - 1), self._pool)

    def forward(self, ids: Tensor, positions: Tensor, slots: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """One token a sequence, for graphs.Decode."""
        logits = self._forward(self._known(ids, slots), positions, step, 0)
        values, tokens = self._ops.best(logits)
        self._last[slots] = tokens  # of a broken row too: the next step is already on its way
        return logits, torch.where(values - values == 0, tokens.int(), BROKEN)  # what is not finite minus itself is NaN

    def draw(self, logits: Tensor, words: Tensor, slots: Tensor) -> Tensor:
        """By each row's temperature and limits, for graphs.Decode."""
        tokens = self._sampler.draw(logits, words)
        if self._world > 1:
            torch.distributed.broadcast(tokens, 0)
        self._last[slots] = tokens.clamp(min=0)
        return tokens.int()

    def _answer(self, token_ids: Tensor, values: Tensor | None) -> Sampled | Deferred:
        if self._device.type != "cuda":
            return Sampled(token_ids.int().numpy(), values.float().numpy() if values is not None else None)
        arrived = download(token_ids.int(), *(() if values is None else (values,)))

        def answer() -> Sampled:
            ids, *logprobs = (each.numpy() for each in arrived())
            return Sampled(ids, logprobs[0] if logprobs else None)

        return answer

    def _put(self, values: NDArray[Any]) -> Tensor:
        return upload(values, self._device)

    def _told_share(self) -> Callable[[float], None]:
        """Progress in tenths of the weights."""
        told = 0

        def tell(share: float) -> None:
            nonlocal told
            if int(share * 10) > told:
                told = int(share * 10)
                self._progress(f"loaded {told * 10} % of the weights")

        return tell


def dtype_of(config: EngineConfig, checkpoint: Checkpoint) -> torch.dtype:
    """The configured type; auto is the checkpoint's on CUDA and float32 on CPU."""
    name = dtype_name(config, checkpoint, config.device)
    dtype: torch.dtype | None = getattr(torch, name, None)
    if dtype is None or name not in DTYPES:
        raise LoadError(f"the checkpoint's dtype {name} cannot be served; set dtype to float32, bfloat16 or float16")
    return dtype


def prefill(tokens: int, longest: int, block_size: int, sequences: int) -> Plan:
    """A made-up step of `tokens` tokens, in at most `sequences` chunks of at most `longest`, for warm-up."""
    lengths = [min(longest, tokens - start) for start in range(0, tokens, longest)][:sequences]
    width = -(-longest // block_size)
    return made_up(
        np.array(lengths, np.int32), np.tile(np.arange(width, dtype=np.int32), (len(lengths), 1)), block_size
    )


def decode(sequences: int, costly: bool = False) -> Plan:
    """A made-up step of one token for each of `sequences`; `costly`: sampled in the way that takes most memory."""
    plan = made_up(np.ones(sequences, np.int32), np.zeros((sequences, 1), np.int32), 1)
    if not costly:
        return plan
    wide = np.full(sequences, 0.9, np.float32)
    sampling = replace(plan.sampling, temperature=wide, top_p=wide, presence_penalty=wide, logprobs=True)
    return replace(plan, sampling=sampling)


def following(before: int, ids: Ints, block_size: int) -> Plan:
    """A step of one more token after `before` tokens in the first blocks."""
    blocks = np.arange(-(-(before + 1) // block_size), dtype=np.int32)[None]
    at, length = np.array([before], np.int32), np.array([before + 1], np.int32)
    usual = made_up(np.ones(1, np.int32), blocks, block_size)
    return replace(usual, input_ids=ids, positions=at, kv_slots=at.astype(np.int64), kv_lengths=length)


def made_up(lengths: Ints, tables: Ints, block_size: int) -> Plan:
    """A plan of whole sequences of zeros that overwrite each other's blocks; all sample greedily."""
    count = len(lengths)
    positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    zeros, ones = np.zeros(count, np.float32), np.ones(count, np.float32)
    ints, longs = np.zeros(count, np.int32), np.zeros(count, np.int64)
    return Plan(
        input_ids=np.zeros(len(positions), np.int32),
        positions=positions,
        kv_slots=positions.astype(np.int64),
        query_starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        kv_lengths=lengths.astype(np.int32),
        block_tables=tables,
        slots=np.arange(count, dtype=np.int32),
        rows=np.arange(count, dtype=np.int64),
        sampling=Sampling(
            zeros, ones, ints, zeros, ones, zeros, zeros, longs, longs, np.zeros((0, 2), np.int64), False
        ),
    )
