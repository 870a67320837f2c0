"""EngineConfig: how one model is loaded and served. It does not know what the model is asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from backend.errors import LoadError, require

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("", "int8", "int4", "fp8")
QUANTIZATION_GROUPS = (32, 64, 128, 256, 512, 1024)
DEVICES = ("auto", "cpu", "cuda")
OFFLOADS = ("", "cpu", "nvme")
KV_DTYPES = ("auto", "fp8")

_IGNORED = {"EXECUTION_ENV_PATH", "FORCE_CPU_ONLY_INPUT_TENSORS", "TRITON_BATCH_STRATEGY_PATH"}
"""Parameters of config.pbtxt that Triton itself reads."""

_OFFLOADED = {"max_sequences": "1024", "step_timeout": "600"}
"""Defaults with `offload`: a step lasts as long as the weights travel, whatever it computes."""

_FLAGS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True)
class EngineConfig:
    """One model's parameters, as named in config.pbtxt. Zero means: derived when the model is loaded."""

    model: str
    """Folder of a Hugging Face checkpoint (config.json and safetensors)."""
    tensor_parallel: int = 1
    """Ranks; on CUDA one per GPU."""
    dtype: str = "auto"
    """Weights, activations and KV cache; auto is the checkpoint's own on CUDA, float32 on CPU."""
    kv_cache_dtype: str = "auto"
    """fp8: keys and values are kept in 8 bits (float8_e4m3fn): twice as many tokens; auto: in dtype."""
    device: str = "auto"
    max_model_len: int = 0
    """Longest prompt plus completion, tokens; 0: the model's own limit, or what the KV cache holds."""
    block_size: int = 16
    """Tokens in one block of the KV cache."""
    kv_cache_fraction: float = 0.0
    """Share of the memory that is free after loading; 0: 0.9 on CUDA, 0.1 on CPU."""
    num_blocks: int = 0
    """KV blocks; overrides kv_cache_fraction."""
    max_sequences: int = 256
    """Sequences that run together."""
    step_tokens: int = 0
    """Token budget of a step, or of a task's micro-batch; 0: on CUDA 2048 (tasks: 16384), on CPU 512."""
    max_waiting: int = 1024
    """Sequences that may wait; one more is refused (Overloaded)."""
    max_queue_seconds: float = 0.0
    """Wait for a first step, as forecast, past which a new request is refused (Overloaded); 0: max_waiting alone."""
    kv_headroom: float = 0.0
    """Share of the KV blocks the running sequences are expected to need that admission leaves free; 1: hardly any is
    preempted, and fewer run together."""
    target_itl_ms: float = 0.0
    """Time of a step, and so between a stream's tokens, to which prompts are cut; 0: each step takes what it can."""
    target_ttft_ms: float = 0.0
    """Forecast wait above which steps may take half as long again as target_itl_ms; 0: never."""
    prefix_cache: bool = True
    """Whether requests find each other's KV blocks of a common prefix."""
    run_ahead: int = 1
    """Steps that are sent before the tokens of the oldest of them have come back, beyond that one."""
    quantization: str = ""
    """Linear layers of the repeated blocks in int8, int4 or fp8, rounded as they are read; empty: in dtype."""
    quantization_group: int = 0
    """Columns of a row that share a scale; 0: 32 for int4, 64 for int8, all for fp8."""
    quantization_symmetric: bool | None = None
    """Whether zero is the middle code; false: DeepSpeed's form, each group from its least to its greatest value. Left
    out: false for int4, else true."""
    offload: str = ""
    """Where the layers lie while they do not compute: cpu (host memory), nvme (a file); empty: on the device."""
    offload_folder: str = ""
    """With offload nvme: the folder, on a disk, of that file; empty: the one for temporary files."""
    device_memory: int = 0
    """With offload: MiB of the device for weights; as many layers stay there as fit; 0: what a step needs."""
    cuda_graphs: bool = True
    compile: bool = True
    """Whether image models are compiled on CUDA as they load: a minute or two the first time, seconds once cached."""
    split_denoiser: bool = False
    """Whether the ranks of an image model have a part of the denoiser's blocks each and draw every image together, for
    one that is too large for a device; false: each has it whole and draws images of its own, which is faster."""
    fused_kernels: bool = True
    """Whether decoder layers of known structure are computed by fused kernels, and texts of encoders without padding
    (CUDA); each is tried at load."""
    threads: int = 0
    """CPU threads of a rank; 0: the cores shared evenly among the ranks on CPU, 1 on CUDA."""
    default_max_tokens: int = 256
    max_prompt_bytes: int = 1 << 20
    """All prompts of one request together (of token ids, their number); of other tasks each text, or list of texts."""
    max_prompts: int = 64
    """Prompts in one request, times n; a directory that deploy or serve writes gets a max_batch_size for as many."""
    max_texts: int = 256
    """Texts that one row of a request may hold (rerank's, zero_shot_image's labels)."""
    max_pixels: int = 1 << 22
    """Width times height of an image, made or sent."""
    max_steps: int = 200
    """Denoising steps."""
    max_images: int = 16
    """Images that one row of a request may ask for."""
    max_stop_strings: int = 16
    step_timeout: float = 60.0
    """Seconds after which a step that has not answered counts as a hung rank."""
    heartbeat_timeout: float = 10.0
    """Seconds after which an idle rank that gives no sign of life counts as hung; 0: none is asked for."""
    load_timeout: float = 1800.0
    max_restarts: int = 5
    """Starts in a row that fail, or that serve for less than restarts.SETTLED, before the model stays down."""
    journal: bool = True
    """Whether each request is a line of the log once it is over: its id, tokens and times, never what was asked."""
    restart_backoff: float = 0.5
    """Seconds before the first restart; doubles with each failed one, up to 30."""

    def __post_init__(self) -> None:
        require(self.dtype in DTYPES, f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        require(self.device in DEVICES, f"device must be one of {', '.join(DEVICES)}, not {self.device!r}")
        kinds = ", ".join(KV_DTYPES)
        require(self.kv_cache_dtype in KV_DTYPES, f"kv_cache_dtype must be one of {kinds}, not {self.kv_cache_dtype!r}")
        fraction = self.kv_cache_fraction
        require(0 <= fraction < 1, f"kv_cache_fraction must be at least 0 and below 1, not {fraction}")
        for name in _POSITIVE:
            require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        alone = self.split_denoiser and self.tensor_parallel == 1
        require(not alone, "split_denoiser is set, tensor_parallel is 1: there is nobody to share it with")
        self._check_offload()
        for field in fields(self):
            if field.type in ("int", "float"):
                value = getattr(self, field.name)
                require(value >= 0, f"{field.name} must not be negative, not {value}")
        self._check_quantization()

    def _check_quantization(self) -> None:
        kind, group = self.quantization, self.quantization_group
        require(kind in QUANTIZATIONS, f"quantization must be one of int8, int4, fp8 or empty, not {kind!r}")
        require(bool(kind) or not group, "quantization_group is set, quantization is not")
        require(bool(kind) or self.quantization_symmetric is None, "quantization_symmetric is set, quantization is not")
        require(kind != "fp8" or not group, "quantization_group: fp8 has one scale a row")
        require(kind != "fp8" or self.symmetric, "quantization_symmetric: fp8 is always symmetric")
        sizes = ", ".join(map(str, QUANTIZATION_GROUPS))
        require(group in (0, *QUANTIZATION_GROUPS), f"quantization_group must be 0 or one of {sizes}, not {group}")

    def _check_offload(self) -> None:
        kind = self.offload
        require(kind in OFFLOADS, f"offload must be cpu, nvme or empty, not {kind!r}")
        require(kind == "nvme" or not self.offload_folder, "offload_folder is set, offload is not nvme")
        require(bool(kind) or not self.device_memory, "device_memory is set, offload is not")

    @property
    def symmetric(self) -> bool:
        """`quantization_symmetric`, or what it is where it is left out."""
        given = self.quantization_symmetric
        return self.quantization != "int4" if given is None else given

    @property
    def group(self) -> int:
        """`quantization_group`, or what it is where it is left out; 0: all of a row."""
        return self.quantization_group or {"int4": 32, "int8": 64}.get(self.quantization, 0)

    def refuse(self, why: str, *names: str) -> None:
        """LoadError that names the first of these parameters that is not its default, and says why it must be."""
        usual = {field.name: field.default for field in fields(self)}
        for name in names:
            require(getattr(self, name) == usual[name], f"{name} {getattr(self, name)!r}: {why}")

    @classmethod
    def from_parameters(cls, given: Mapping[str, str]) -> EngineConfig:
        """From strings by name; LoadError names what is unknown, missing or malformed."""
        types = {field.name: str(field.type) for field in fields(cls)}
        given = {name: value for name, value in given.items() if name not in _IGNORED}
        if unknown := sorted(given.keys() - types.keys()):
            near = get_close_matches(unknown[0], types, 3) or types
            raise LoadError(f"unknown parameter {unknown[0]!r} in config.pbtxt; known: {', '.join(near)}")
        require(bool(given.get("model")), "parameter 'model' is missing in config.pbtxt")
        if given.get("offload"):
            given = {**_OFFLOADED, **given}
        return cls(**{name: _parse(name, types[name].removesuffix(" | None"), value) for name, value in given.items()})

    @classmethod
    def from_triton(cls, args: Mapping[str, str]) -> EngineConfig:
        """From the arguments of a Triton model's `initialize`."""
        parameters = json.loads(args["model_config"]).get("parameters", {})
        return cls.from_parameters({name: value["string_value"] for name, value in parameters.items()})


_POSITIVE = (
    "tensor_parallel",
    "block_size",
    "max_sequences",
    "default_max_tokens",
    "max_prompt_bytes",
    "max_prompts",
    "max_texts",
    "max_pixels",
    "max_steps",
    "max_images",
    "step_timeout",
    "load_timeout",
)


def _parse(name: str, kind: str, value: str) -> Any:
    try:
        if kind == "bool":
            return _FLAGS[value.strip().lower()]
        return {"int": int, "float": float, "str": str}[kind](value)
    except (ValueError, KeyError):
        raise LoadError(f"parameter {name!r} in config.pbtxt must be of type {kind}, not {value!r}") from None
