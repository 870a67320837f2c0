"""Request: from one request's values to prompts, and from what they become to its answers. It does not know Triton.

Values come as one mapping a prompt (input name to scalar or list, BYTES as bytes); answers are arrays by output name.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.errors import InvalidInput
from backend.generation.engine import Engine
from backend.generation.params import Defaults, Limits, Options, decode_text, parse
from backend.generation.prompt import Prompt
from backend.generation.stream import Delta
from backend.generation.tokenizer import Tokenizer

SOURCES = ("text_input", "input_ids", "messages")
ANSWER = ("stream", "exclude_input", *(f.name for f in fields(Options) if f.name.startswith("return_")))
"""Options that concern a request's answers rather than one prompt."""
Outputs = dict[str, NDArray[Any]]


@dataclass
class Request:
    """One request: its prompts, and what its caller wants to know of them."""

    prompts: list[Prompt]
    options: Options
    """The first prompt's; what concerns the answer is the same for all."""
    texts: list[str]
    """The prompts' own text, by prompt; of prompts that came as ids only if the answer repeats it."""
    tokenizer: Tokenizer
    _whole: dict[int, Delta] = field(default_factory=dict)

    @classmethod
    def parse(cls, rows: list[dict[str, Any]], parameters: Mapping[str, Any], engine: Engine) -> Request:
        """Check and tokenise; InvalidInput names the field, the limit and the value."""
        config = engine.config
        if not rows:
            raise InvalidInput(f"exactly one of {', '.join(SOURCES)} must be given")
        limits = Limits.of(config, engine.vocab)
        options = [_options(row, parameters, engine.defaults, limits) for row in rows]
        if (total := sum(one.n for one in options)) > config.max_prompts:
            raise InvalidInput(
                f"the request asks for {total} sequences (prompts x n), the limit is {config.max_prompts} (max_prompts)"
            )
        for name in ANSWER:
            if len({getattr(one, name) for one in options}) > 1:
                raise InvalidInput(f"{name} must be the same for all prompts of a request")
        size = sum(len(row.get(name, b"")) for row in rows for name in SOURCES)
        if size > config.max_prompt_bytes:
            raise InvalidInput(
                f"the request's prompts have {size} bytes, the limit is {config.max_prompt_bytes} (max_prompt_bytes)"
            )
        sources = [_source(row, engine.tokenizer, echoed=not options[0].exclude_input) for row in rows]
        prompts = [_prompt(ids, one) for (ids, _), one in zip(sources, options, strict=True)]
        return cls(prompts, options[0], [text for _, text in sources], engine.tokenizer)

    def answer(self, deltas: list[Delta]) -> Outputs | None:
        """What to send now: the news itself when streaming, else everything once all is there."""
        if self.options.stream:
            return self._outputs(deltas)
        for delta in deltas:
            if known := self._whole.get(delta.index):
                known.extend(delta)
            else:
                self._whole[delta.index] = delta
        sequences = sum(prompt.n for prompt in self.prompts)
        if len(self._whole) < sequences or not all(delta.finish_reason for delta in self._whole.values()):
            return None
        return self._outputs([self._whole[index] for index in range(sequences)])

    def _outputs(self, deltas: list[Delta]) -> Outputs:
        """Every output is [rows, 1]."""
        wanted = self.options
        prompts = [self._prompt_of(delta.index) for delta in deltas]
        starts = [self.texts[prompt] if not wanted.exclude_input else "" for prompt in prompts]
        outputs = {
            "text_output": _bytes([start + delta.text for start, delta in zip(starts, deltas, strict=True)]),
            "index": _column([delta.index for delta in deltas], np.int32),
        }
        if wanted.return_finish_reason:
            outputs["finish_reason"] = _bytes([delta.finish_reason for delta in deltas])
        if wanted.return_num_input_tokens:
            outputs["num_input_tokens"] = _column([len(self.prompts[p].token_ids) for p in prompts], np.uint32)
        if wanted.return_num_output_tokens:
            outputs["num_output_tokens"] = _column([len(delta.token_ids) for delta in deltas], np.uint32)
        if wanted.return_cumulative_logprob:
            outputs["cumulative_logprob"] = _column([delta.cumulative_logprob for delta in deltas], np.float32)
        if wanted.return_logprobs:
            outputs["logprobs"] = _bytes([self._logprobs(delta) for delta in deltas])
        return outputs

    def _prompt_of(self, index: int) -> int:
        for number, prompt in enumerate(self.prompts):
            if index < prompt.n:
                return number
            index -= prompt.n
        raise IndexError(index)

    def _logprobs(self, delta: Delta) -> str:
        pairs = zip(delta.token_ids, delta.logprobs or [], strict=True)
        entries = [
            {"token_id": token, "token": self.tokenizer.decode([token], skip_special_tokens=False), "logprob": value}
            for token, value in pairs
        ]
        return json.dumps(entries)


def _options(row: Mapping[str, Any], parameters: Mapping[str, Any], defaults: Defaults, limits: Limits) -> Options:
    typed = {name: value for name, value in row.items() if name not in (*SOURCES, "sampling_parameters")}
    return parse(parameters, row.get("sampling_parameters"), typed, defaults, limits)


def _source(row: Mapping[str, Any], tokenizer: Tokenizer, echoed: bool) -> tuple[array[int], str]:
    """The prompt's token ids, and its text; for ids, which are many, the text only if it is `echoed`."""
    given = [name for name in SOURCES if name in row]
    if len(given) != 1:
        raise InvalidInput(f"exactly one of {', '.join(SOURCES)} must be given, not {' and '.join(given) or 'none'}")
    value = row[given[0]]
    if given[0] == "input_ids":
        size = tokenizer.vocab_size
        return array("i", value), tokenizer.decode([id_ for id_ in value if 0 <= id_ < size]) if echoed else ""
    text = decode_text(value, given[0])
    if given[0] == "text_input":
        return array("i", tokenizer.encode(text)), text
    text = _whole(tokenizer.chat(_messages(text)))
    return array("i", tokenizer.encode(text, add_special_tokens=False)), text


def _whole(text: str) -> str:
    """Text that a JSON escape has not smuggled half a character or a NUL into."""
    try:
        return decode_text(text.encode(), "messages")
    except UnicodeEncodeError:
        raise InvalidInput("messages hold half of a surrogate pair") from None


def _messages(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidInput("messages is not a JSON list") from None


def _prompt(ids: array[int], options: Options) -> Prompt:
    params = options.params_for(len(ids))
    return Prompt(ids, params, options.n, options.priority, options.timeout, options.cache_salt.encode())


def _column(values: list[Any], dtype: Any) -> NDArray[Any]:
    return np.array(values, dtype).reshape(-1, 1)


def _bytes(texts: list[str]) -> NDArray[Any]:
    return _column([text.encode() for text in texts], object)
