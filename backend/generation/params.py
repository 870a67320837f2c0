"""Options: all that one prompt's caller asks for, from the sources where it may stand. It does not know the prompt."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

from backend.config import EngineConfig
from backend.errors import InvalidInput, LoadError
from backend.generation.parameter import INT32, NAMED, check, shown
from backend.generation.sequence import SamplingParams
from backend.generation.tokenizer import Tokenizer
from backend.json_file import optional, values_of

MAX_STOP_CHARACTERS = 1024
MAX_STOP_IDS = 256
MAX_SALT_BYTES = 256
MAX_JSON_BYTES = 1 << 20

LATER = frozenset({"structured_outputs", "guided_decoding_guide_type", "guided_decoding_guide"})
_TRANSPORT = frozenset({"sequence_id", "sequence_start", "sequence_end", "binary_data_output"})
"""Request parameters that Triton's own protocol sets, beside those that begin with triton_."""
_HEADERS = frozenset({"traceparent", "tracestate", "x-request-id"})
"""Request parameters that Triton makes of a caller's headers, written as the caller wrote them."""


@dataclass(frozen=True)
class Limits:
    """What the model and its configuration bound."""

    default_max_tokens: int = 256
    max_samples: int = 64
    max_stop_strings: int = 16
    vocab_size: int = INT32
    """Width of the logits; a stop token beyond it could never come."""

    @classmethod
    def of(cls, config: EngineConfig, vocab_size: int = INT32) -> Limits:
        return cls(config.default_max_tokens, config.max_prompts, config.max_stop_strings, vocab_size)


@dataclass(frozen=True)
class Defaults:
    """What a model's own folder says about generating: generation_config.json, apart from do_sample."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    eos_ids: frozenset[int] = frozenset()

    @classmethod
    @values_of("generation_config.json or config.json")
    def from_folder(cls, folder: str | Path) -> Defaults:
        """LoadError names the file and the value that cannot be used."""
        folder = Path(folder)
        given = optional(folder / "generation_config.json")
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        try:
            values = {name: NAMED[name].read(name, given[name]) for name in names if given.get(name) is not None}
            return cls(**values, eos_ids=_eos_ids(folder, given))
        except InvalidInput as error:
            raise LoadError(f"{folder / 'generation_config.json'}: {error}") from None


@dataclass(frozen=True)
class Options:
    """All that one prompt's caller asks for."""

    params: SamplingParams
    n: int = 1
    max_length: int | None = None
    stream: bool = False
    exclude_input: bool = False
    return_finish_reason: bool = False
    return_num_input_tokens: bool = False
    return_num_output_tokens: bool = False
    return_cumulative_logprob: bool = False
    return_logprobs: bool = False
    priority: int = 0
    timeout: float = inf
    """Seconds."""
    cache_salt: str = ""

    def params_for(self, prompt_tokens: int) -> SamplingParams:
        """`params` with max_length, which counts the prompt, taken into max_tokens."""
        if self.max_length is None:
            return self.params
        if (room := self.max_length - prompt_tokens) < 1:
            raise InvalidInput(f"max_length {self.max_length} leaves no room after {prompt_tokens} prompt tokens")
        most = min(self.params.max_tokens, room)
        check(self.params.min_tokens <= most, f"min_tokens {self.params.min_tokens} is more than max_length allows")
        return replace(self.params, max_tokens=most)


def parse(
    parameters: Mapping[str, object],
    sampling_parameters: str | bytes | None,
    inputs: Mapping[str, object],
    defaults: Defaults,
    limits: Limits,
) -> Options:
    """One prompt's options, from three sources of rising precedence.

    The request's own parameters; a JSON object as text; and the model's other tensors by name, as bytes, numbers and
    lists. A value None counts as not given. Strings stand for the numbers and booleans that they spell. InvalidInput
    names the field, the limit and the actual value.
    """
    values: dict[str, Any] = {}
    for source in (_of_triton(parameters), _of_json(sampling_parameters), inputs):
        values |= _read(source, limits)
    return _options(values, defaults, limits)


def decode_text(data: bytes, name: str = "text_input") -> str:
    """UTF-8 text, not empty and without NUL; InvalidInput says where it is not."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{name} is not valid UTF-8: byte {error.start} ({data[error.start]:#04x})") from None
    if not text:
        raise InvalidInput(f"{name} is empty")
    if (at := text.find("\0")) >= 0:
        raise InvalidInput(f'{name} has "\\0" at character {at}')
    return text


# ---- where values come from


def _of_triton(parameters: Mapping[str, object]) -> Mapping[str, object]:
    return {k: v for k, v in parameters.items() if not _of_transport(k)}


def _of_transport(name: str) -> bool:
    return name in _TRANSPORT or name.startswith("triton_") or name.lower() in _HEADERS


def _of_json(text: str | bytes | None) -> Mapping[str, object]:
    if not text:
        return {}
    if len(text) > MAX_JSON_BYTES:
        raise InvalidInput(f"sampling_parameters has {len(text)} bytes, the limit is {MAX_JSON_BYTES}")
    try:
        found = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise InvalidInput("sampling_parameters is nested too deeply") from None
    except ValueError as error:
        raise InvalidInput(f"sampling_parameters is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise InvalidInput(f"sampling_parameters must be a JSON object, not {shown(found)}")
    return found


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise InvalidInput(f"{shown(twice)} stands twice in sampling_parameters")
    return found


def _read(source: Mapping[str, object], limits: Limits) -> dict[str, Any]:
    """Values of one source by their canonical names."""
    values: dict[str, Any] = {}
    most = {"stop_words": limits.max_stop_strings, "stop_token_ids": MAX_STOP_IDS}
    for name, given in source.items():
        check(name not in LATER, f"{name} is not supported yet")
        if (parameter := NAMED.get(name)) is None:
            raise InvalidInput(f"unknown parameter {shown(name)}; known: {', '.join(NAMED)}")
        if given is None:
            continue
        value = parameter.read(name, given, most.get(parameter.name, INT32))
        if values.setdefault(parameter.name, value) != value:
            raise InvalidInput(f"{name} is given with another value as {parameter.name} or one of its other names")
    return values


# ---- what they mean together


def _options(values: dict[str, Any], defaults: Defaults, limits: Limits) -> Options:
    get = values.get
    check(get("n", 1) <= limits.max_samples, f"n is {get('n')}, the limit is {limits.max_samples} (max_prompts)")
    stream = get("stream", False)
    return Options(
        params=_params(values, defaults, limits),
        n=get("n", 1),
        max_length=get("max_length"),
        stream=stream,
        exclude_input=_exclude_input(values, stream),
        return_finish_reason=get("return_finish_reason", False),
        return_num_input_tokens=get("return_num_input_tokens", False),
        return_num_output_tokens=get("return_num_output_tokens", False),
        return_cumulative_logprob=get("return_cumulative_logprob", False),
        return_logprobs=get("return_logprobs", False),
        priority=get("priority", 0),
        timeout=get("timeout", 0) / 1e6 or inf,
        cache_salt=_salt(get("cache_salt", "")),
    )


def _params(values: dict[str, Any], defaults: Defaults, limits: Limits) -> SamplingParams:
    get = values.get
    most, least = _lengths(values, limits)
    return SamplingParams(
        max_tokens=most,
        min_tokens=least,
        temperature=get("temperature", defaults.temperature) if get("do_sample", True) else 0.0,
        top_p=get("top_p", defaults.top_p),
        top_k=max(0, get("top_k", defaults.top_k)),
        min_p=get("min_p", defaults.min_p),
        repetition_penalty=get("repetition_penalty", defaults.repetition_penalty),
        frequency_penalty=get("frequency_penalty", 0.0),
        presence_penalty=get("presence_penalty", 0.0),
        seed=values["seed"] if "seed" in values else secrets.randbits(64),
        stop=_stop(get("stop_words", ())),
        stop_token_ids=_stop_ids(values, defaults, limits),
        logprobs=get("return_logprobs", False) or get("return_cumulative_logprob", False),
    )


def _lengths(values: dict[str, Any], limits: Limits) -> tuple[int, int]:
    """Most and least new tokens; max_length alone replaces the default of max_tokens."""
    most = values.get("max_tokens", INT32 if "max_length" in values else limits.default_max_tokens)
    least = values.get("min_tokens", 0)
    check(least <= most, f"min_tokens is {least}, more than max_tokens {most}")
    return most, least


def _stop(stop: tuple[str, ...]) -> tuple[str, ...]:
    for at, text in enumerate(stop):
        check(bool(text), f"stop_words[{at}] is empty")
        size = len(text)
        check(
            size <= MAX_STOP_CHARACTERS, f"stop_words[{at}] has {size} characters, the limit is {MAX_STOP_CHARACTERS}"
        )
    return tuple(dict.fromkeys(stop))


def _stop_ids(values: dict[str, Any], defaults: Defaults, limits: Limits) -> frozenset[int]:
    ids = values.get("stop_token_ids", ())
    for token_id in ids:
        check(token_id < limits.vocab_size, f"stop_token_ids has {token_id}, the vocabulary {limits.vocab_size} ids")
    return frozenset(ids) | (frozenset() if values.get("ignore_eos", False) else defaults.eos_ids)


def _exclude_input(values: dict[str, Any], stream: bool) -> bool:
    exclude = values.get("exclude_input_in_output")
    if "return_full_text" in values:
        contrary = not values["return_full_text"]
        check(exclude in (None, contrary), "return_full_text contradicts exclude_input_in_output")
        exclude = contrary
    check(not stream or exclude is not False, "a streamed answer holds no prompt: exclude_input_in_output must be true")
    return stream if exclude is None else bool(exclude)


def _salt(text: str) -> str:
    size = len(text.encode())
    check(size <= MAX_SALT_BYTES, f"cache_salt has {size} bytes, the limit is {MAX_SALT_BYTES}")
    return text


# ---- the model's folder


def _eos_ids(folder: Path, generation: Mapping[str, Any]) -> frozenset[int]:
    """The ids that end a text: of generation_config.json, else config.json, else the tokenizer's end token."""
    config = optional(folder / "config.json")
    for source in (generation, config, config.get("text_config") or {}):
        if (found := source.get("eos_token_id")) is not None:
            return frozenset(_ids(found))
    if not (folder / "tokenizer_config.json").is_file():
        return frozenset()
    tokenizer = Tokenizer.from_folder(folder)
    token_id = tokenizer.token_id(tokenizer.special_tokens.get("eos_token", ""))
    return frozenset() if token_id is None else frozenset({token_id})


def _ids(found: object) -> Iterable[int]:
    ids: tuple[int, ...] = NAMED["stop_token_ids"].read("eos_token_id", found)
    return ids
