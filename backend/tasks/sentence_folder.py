"""What a folder of sentence-transformers says about making vectors; it knows neither torch nor requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from backend.errors import LoadError
from backend.json_file import content, optional, values_of
from backend.model_folder import Checkpoint
from backend.tasks.task import Array

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "Tanh": np.tanh,
    "Identity": lambda vector: vector,
    "ReLU": lambda vector: np.maximum(vector, 0),
}
_MODES = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "last", "max_tokens": "max"}
_HONOURED = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}


@dataclass(frozen=True)
class Dense:
    """A linear layer behind the pooling."""

    weight: Array  # [out, in]
    bias: Array  # [out]
    activation: str

    def __call__(self, vector: Array) -> Array:
        """Apply it.  # [in] -> [out]"""
        made: Array = _ACTIVATIONS[self.activation](self.weight @ vector + self.bias)
        return made


@dataclass(frozen=True)
class Pooling:
    """How vectors are made; the defaults hold for folders that are not sentence-transformers'."""

    kind: str
    dimensions: int
    normalize: bool
    stated_dimensions: int = 0
    """To which vectors are cut unless a request says otherwise; 0: not stated."""
    dense: tuple[Dense, ...] = ()
    include_prompt: bool = True
    """Whether the prompt's own tokens are pooled too."""
    lower: bool = False
    max_seq_length: int = 0
    """0: not stated."""
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str = ""


@values_of("one of the model's files of sentence-transformers")
def pooling_of(folder: Path, checkpoint: Checkpoint) -> Pooling:
    """LoadError for a module or a setting that is not honoured."""
    modules = [_module(each, folder) for each in _modules(folder)]
    _check_order(folder, [name for name, _ in modules])
    where = dict(modules)
    stated = optional(where["Pooling"] / "config.json") if modules else {}
    transformer = _transformer(where.get("Transformer", folder), folder)
    dense = tuple(_dense(path) for name, path in modules if name == "Dense")
    general = optional(folder / "config_sentence_transformers.json")
    prompts = {name: text for name, text in (general.get("prompts") or {}).items() if isinstance(text, str)}
    return Pooling(
        kind=_kind(stated, checkpoint),
        dimensions=len(dense[-1].bias) if dense else hidden(checkpoint),
        normalize="Normalize" in where or not modules,
        stated_dimensions=int(general.get("truncate_dim") or 0),
        dense=dense,
        include_prompt=bool(stated.get("include_prompt", True)),
        lower=bool(transformer.get("do_lower_case")),
        max_seq_length=int(transformer.get("max_seq_length") or 0),
        prompts=prompts,
        default_prompt=prompts.get(general.get("default_prompt_name") or "", ""),
    )


def _modules(folder: Path) -> list[dict[str, Any]]:
    """The folder's list; none where it has no such file."""
    path = folder / "modules.json"
    found = content(path) if path.is_file() else []
    if not isinstance(found, list):
        raise LoadError(f"{path} must hold a JSON list")
    return found


def _module(stated: Any, folder: Path) -> tuple[str, Path]:
    """Its name and its folder, which must lie in the model's."""
    given = stated if isinstance(stated, dict) else {}
    name, path = given.get("type"), given.get("path")
    if not isinstance(name, str) or not isinstance(path, str) or "\0" in path:
        raise LoadError(f"{folder / 'modules.json'} must give each module's type and path")
    if not (folder / path).resolve().is_relative_to(folder.resolve()):
        raise LoadError(f"{folder / 'modules.json'}: the path {path!r:.80} leads out of the model's folder")
    return name.rsplit(".", 1)[-1], folder / path


@values_of("config.json")
def hidden(checkpoint: Checkpoint) -> int:
    """Numbers in a token's vector."""
    config = checkpoint.text_config
    found = next((config[name] for name in ("hidden_size", "dim", "d_model", "n_embd") if config.get(name)), None)
    if found is None:
        raise LoadError("config.json does not say how wide the model is (hidden_size)")
    return int(found)


def _check_order(folder: Path, names: list[str]) -> None:
    """Transformer, Pooling, any number of Dense, Normalize or not."""
    file = folder / "modules.json"
    if other := [name for name in names if name not in ("Transformer", "Pooling", "Dense", "Normalize")]:
        raise LoadError(f"{file} has a module {other[0]}, which is not supported")
    inner = names[2:-1] if names[-1:] == ["Normalize"] else names[2:]
    if names and (names[:2] != ["Transformer", "Pooling"] or set(inner) - {"Dense"}):
        raise LoadError(f"{file} lists {', '.join(names)}: this order of modules is not supported")


def _transformer(path: Path, folder: Path) -> dict[str, Any]:
    """sentence_bert_config.json, checked."""
    if path.resolve() != folder.resolve():
        raise LoadError(
            f"{folder / 'modules.json'} puts the transformer in {path.name}: serve it from the folder itself"
        )
    found = optional(folder / "sentence_bert_config.json")
    modality = found.get("modality_config") or {}
    honoured = (
        found.get("transformer_task", "feature-extraction") == "feature-extraction"
        and found.get("module_output_name", "token_embeddings") == "token_embeddings"
        and modality.get("text", _HONOURED["text"]) == _HONOURED["text"]
        and not found.get("processing_kwargs")
        and not found.get("query_expansion")
    )
    if not honoured:
        raise LoadError(f"{folder / 'sentence_bert_config.json'} asks for more than the last hidden state of texts")
    return found


def _dense(path: Path) -> Dense:
    settings = optional(path / "config.json")
    activation = str(settings.get("activation_function", "torch.nn.modules.activation.Tanh")).rsplit(".", 1)[-1]
    plain = all(settings.get(name, "sentence_embedding") in (None, "sentence_embedding") for name in _ENDS)
    if activation not in _ACTIVATIONS or not plain or settings.get("use_residual"):
        raise LoadError(f"{path}: this dense layer is not supported (activation {activation})")
    try:
        tensors = load_file(path / "model.safetensors")
        weight = tensors["linear.weight"].astype(np.float32)
    except (OSError, KeyError, TypeError, SafetensorError) as error:
        raise LoadError(f"{path / 'model.safetensors'} cannot be read: {error}") from None
    return Dense(weight, tensors.get("linear.bias", np.zeros(len(weight))).astype(np.float32), activation)


_ENDS = ("module_input_name", "module_output_name")


def _kind(stated: dict[str, Any], checkpoint: Checkpoint) -> str:
    mode = stated.get("pooling_mode")  # as newer releases write it
    modes = [mode] if isinstance(mode, str) else list(mode or ())
    modes += [
        name.removeprefix("pooling_mode_") for name, on in stated.items() if name.startswith("pooling_mode_") and on
    ]
    kinds = [_MODES.get(name, name) for name in modes]
    if len(kinds) > 1 or (kinds and kinds[0] not in _MODES.values()):
        raise LoadError(f"the model pools by {' and '.join(kinds)}, which is not supported")
    causal = any(name.endswith("ForCausalLM") for name in checkpoint.architectures)
    return kinds[0] if kinds else "last" if causal and not stated else "mean"
