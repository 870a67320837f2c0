"""Checkpoint: what a Hugging Face model folder holds, read from JSON and safetensors headers alone.

It knows neither torch nor whether the model can be served; nothing here reads a weight.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from backend.errors import LoadError, require
from backend.families import original, rope_limit, rope_type, ropes
from backend.json_file import required, values_of
from backend.quantized_folder import layers
from backend.quantized_form import Form

MODEL_ROOT = "TRITONSPEED_MODEL_ROOT"
"""Environment variable: the folder that every model must lie in."""

KIND = "Hugging Face model folder"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
"""Bytes of a safetensors dtype; those left out take one (8-bit types and narrower ones, rounded up)."""

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

_LENGTHS = ["max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx"]

_ENDLESS = 1 << 30
"""Tokens; tokenizers without a limit state 1e30."""

PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def root() -> Path | None:
    """Return the folder that every model must lie in, if the environment names one."""
    return Path(os.environ[MODEL_ROOT]) if os.environ.get(MODEL_ROOT) else None


def resolve(model: str, root: Path | None) -> Path:
    """Find the folder of `model`, links followed. LoadError if there is none, or something in it leads out of the root.

    Without a root any folder is allowed, and a relative one is looked for in the working directory.
    """
    folder = (Path(model) if root is None else root / model).expanduser().resolve()
    if root is not None:
        _check_inside(folder, root.resolve(), model)
    if not folder.is_dir():
        raise LoadError(f"no such model folder: {folder}")
    if root is not None:
        _check_links(folder, root.resolve(), model)
    return folder


def _check_links(folder: Path, root: Path, model: str) -> None:
    """In every folder below too, those behind links included, each once: links may make a loop."""
    seen, left = {folder}, [folder]
    while left:
        for path in left.pop().iterdir():
            if path.is_symlink():
                _check_inside(path, root, model)
            if path.is_dir() and (target := path.resolve()) not in seen:
                seen.add(target)
                left.append(target)


def _check_inside(path: Path, root: Path, model: str) -> None:
    if not path.resolve().is_relative_to(root):
        raise LoadError(f"model {model!r} leads out of the model root {root} ({path.name})")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a checkpoint, by its header."""

    name: str
    dtype: str
    """As safetensors names it: F32, BF16, F16, ..."""
    shape: tuple[int, ...]
    file: Path
    form: Form | None = None
    """Of a quantized layer's weight, which the checkpoint holds in `parts`; its dtype is then that of its scales."""
    parts: tuple[Tensor, ...] = ()

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        if self.parts:
            return sum(part.bytes for part in self.parts)
        return self.numel * _BYTES.get(self.dtype, 1)


@dataclass(frozen=True)
class Checkpoint:
    """A model folder: its config.json and the headers of its tensors."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def open(cls, folder: Path | str) -> Checkpoint:
        """LoadError names the file that is missing, truncated or malformed."""
        folder = Path(folder)
        config = required(folder / "config.json", KIND)
        return cls(folder, config, _layers(config, _read_tensors(folder)))

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type") or "")

    @property
    @values_of("config.json")
    def architectures(self) -> list[str]:
        return list(map(str, self.config.get("architectures") or []))

    @property
    def files(self) -> list[Path]:
        return sorted({tensor.file for tensor in self.tensors.values()})

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's part of config.json: a multimodal model nests it."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    @cached_property
    def dtype(self) -> str:
        """float32, bfloat16 or float16: what config.json says, else what most bytes are stored in."""
        for config in (self.config, self.text_config):
            named = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
            if named in _DTYPES.values():
                return named
        stored = dict.fromkeys(_DTYPES, 0)
        for tensor in self.tensors.values():
            if tensor.dtype in stored:
                stored[tensor.dtype] += tensor.bytes
        return _DTYPES[max(stored, key=stored.__getitem__)]

    @property
    @values_of("config.json")
    def vocab_size(self) -> int:
        return int(self.text_config.get("vocab_size", 0))

    @cached_property
    @values_of("config.json")
    def max_model_len(self) -> int:
        """Tokens that the model was made for; 0 if config.json does not say.

        YaRN reaches `factor` times its original length. Other kinds of RoPE state the scaled length already; see
        `families.rope_limit` for those that count less.
        """
        config = self.text_config
        length = next((int(config[name]) for name in _LENGTHS if config.get(name)), 0)
        for rope in ropes(config):
            if rope_type(rope) == "yarn":
                length = max(length, int((original(rope, config) or length) * float(rope.get("factor") or 1)))
        return min(length, rope_limit(config) or length)


def longest_text(asked: int, positions: int, stated: int = 0) -> int:
    """Tokens of the longest text: as asked, else the lesser of the model's positions and what else is stated.

    0 is: not said, and so is what no text could reach. LoadError where more is asked than there are positions, or
    nothing is said.
    """
    fits = not (asked and positions) or asked <= positions
    require(fits, f"max_model_len {asked} is more than the model's {positions} positions")
    limits = [limit for limit in (positions, stated) if 0 < limit < _ENDLESS]
    require(bool(asked or limits), "config.json names no maximum length: set max_model_len")
    return asked or min(limits)


@values_of("config.json")
def _layers(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return layers(config, tensors)


def stored(folder: Path) -> list[Tensor]:
    """Tensors of every part of a pipeline's folder; not the variants of the same ones (`model.fp16.safetensors`)."""
    parts = sorted(part for part in folder.iterdir() if part.is_dir())
    files = [file for part in parts for file in sorted(part.glob("*.safetensors")) if file.stem.count(".") == 0]
    return [tensor for file in files for tensor in _read_header(file).values()]


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    if (folder / INDEX).exists():
        return _read_indexed(folder)
    files = [folder / SINGLE] if (folder / SINGLE).exists() else sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise LoadError(_no_weights(folder, files))
    return _read_header(files[0])


def _read_indexed(folder: Path) -> dict[str, Tensor]:
    index = required(folder / INDEX, KIND).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise LoadError(f"{folder / INDEX} has no weight_map")
    headers: dict[str, dict[str, Tensor]] = {}
    for name in sorted(set(index.values()), key=str):
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise LoadError(f"{folder / INDEX} names {name!r}, which is not a safetensors file beside it")
        headers[name] = _read_header(folder / name)
    if lost := sorted(name for name, file in index.items() if name not in headers[file]):
        raise LoadError(f"{folder / INDEX} puts {lost[0]!r} in {index[lost[0]]}, which does not hold it")
    return {name: headers[file][name] for name, file in index.items()}


def _read_header(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise LoadError(f"weight file {file} is missing: the download is not complete")
    try:
        with safe_open(file, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                name: Tensor(name, part.get_dtype(), tuple(part.get_shape()), file) for name, part in slices.items()
            }
    except (SafetensorError, OSError, ValueError) as error:
        raise LoadError(f"weight file {file} is corrupt or truncated: {error}") from None


def _no_weights(folder: Path, files: list[Path]) -> str:
    if files:
        return f"{folder} holds {len(files)} safetensors files and no {INDEX}"
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if not pickled:
        return f"{folder} holds no weights: expected {SINGLE} or {INDEX}"
    return (
        f"{folder} holds pickled weights only ({pickled[0]}); pickle can run code and is refused. Convert them once, if"
        " you trust them: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
    )
