"""The table of sampling keys: what each is called and how it is sent. It does not know what is in range."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from numpy.typing import NDArray

from client.errors import InvalidInput
from client.tensors import strings
from client.values import KINDS, Key


class Sampling(TypedDict, total=False):
    """Keyword arguments of generate, all optional; the model's own defaults apply to those not given."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    seed: int
    stop: str | list[str]
    stop_token_ids: list[int]
    ignore_eos: bool
    exclude_input_in_output: bool
    return_finish_reason: bool
    return_num_input_tokens: bool
    return_num_output_tokens: bool
    return_cumulative_logprob: bool
    return_logprobs: bool
    cache_salt: str
    priority: int
    max_length: int
    do_sample: bool


def _tensors() -> Iterable[Key]:
    for name, kind, about, *tensor in (
        ("max_tokens", "int32", "new tokens at most"),
        ("min_tokens", "int32", "new tokens at least"),
        ("temperature", "fp32", "0 is greedy"),
        ("top_p", "fp32", "smallest set of tokens with this share of the probability; 1 is off"),
        ("top_k", "int32", "most likely tokens that are considered; 0 is off"),
        ("min_p", "fp32", "least probability, as a share of the likeliest token's"),
        ("repetition_penalty", "fp32", "over prompt and completion; 1 is off"),
        ("frequency_penalty", "fp32", "for each earlier occurrence; 0 is off"),
        ("presence_penalty", "fp32", "for any earlier occurrence; 0 is off"),
        ("seed", "uint64", "the same seed gives the same text"),
        ("n", "int32", "samples of each prompt"),
        ("stop", "strings", "text that ends the completion; may be given several times", "stop_words"),
        ("stop_token_ids", "int32s", "tokens that end the completion"),
        ("ignore_eos", "bool", "go on after the model's end token"),
        ("exclude_input_in_output", "bool", "leave the prompt out of the text"),
        ("return_finish_reason", "bool", ""),
        ("return_num_input_tokens", "bool", ""),
        ("return_num_output_tokens", "bool", ""),
        ("return_cumulative_logprob", "bool", "the completion's log-probability"),
        ("return_logprobs", "bool", "each token's log-probability"),
    ):
        yield Key(name, kind, about, *tensor or [name])


KEYS: dict[str, Key] = {key.name: key for key in _tensors()} | {
    "cache_salt": Key("cache_salt", "string", "share cached prefixes only with requests of the same salt"),
    "priority": Key("priority", "int32", "lower goes first; 0 if not given"),
    "max_length": Key("max_length", "int32", "prompt and completion together, tokens"),
    "do_sample": Key("do_sample", "bool", "false is greedy"),
}

JSON_TENSOR = "sampling_parameters"
"""Carries the keys without a tensor of their own; as a request parameter, `priority` would end in Triton."""

ALIASES = {
    "min_length": "min_tokens",
    "random_seed": "seed",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_words": "stop",
}
"""Names that other servers use."""

DEFAULTS: dict[str, Any] = {
    "exclude_input_in_output": True,
    "return_finish_reason": True,
    "return_num_input_tokens": True,
    "return_num_output_tokens": True,
}
"""What this client asks for unless told otherwise."""


def encode_options(options: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """Tensors of shape [1, k]; an option of None is left to the model.

    Raises InvalidInput naming a key that is unknown, given twice or of the wrong type.
    """
    tensors: dict[str, NDArray[Any]] = {}
    others: dict[str, Any] = {}
    for name, value in (DEFAULTS | _canonical(options)).items():
        if value is None:
            continue
        row = KINDS[KEYS[name].kind](name, value)
        if KEYS[name].tensor:
            tensors[KEYS[name].tensor] = row
        else:
            others[name] = row.item().decode() if row.dtype == object else row.item()
    return tensors | ({JSON_TENSOR: strings(json.dumps(others).encode())} if others else {})


def _canonical(options: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for given, value in options.items():
        name = ALIASES.get(given, given)
        if name not in KEYS:
            raise InvalidInput(f"unknown option {given!r}; known: {', '.join(KEYS)}")
        if name in found:
            both = " and ".join(repr(each) for each in options if ALIASES.get(each, each) == name)
            raise InvalidInput(f"{both} are names of the same option: give one")
        found[name] = value
    return found
