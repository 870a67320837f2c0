"""What the folder of an encoder says, and whether it can be served as a task; it knows neither torch nor transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backend.errors import LoadError
from backend.model_folder import Checkpoint

SHARDABLE_ENCODERS = frozenset("bert roberta xlm-roberta distilbert electra deberta-v2 camembert".split())  # noqa: SIM905
"""Families whose output under AutoTP equals the whole model's: tests/backend/compute/test_encoder.py shows each."""

_UNSHARDABLE = {
    "modernbert": "its queries, keys and values are one projection that DeepSpeed cuts in the wrong places",
    "mpnet": "its attention counts the heads of the whole model",
}

_OFFSET = frozenset("roberta xlm-roberta xlm-roberta-xl camembert mpnet data2vec-text roberta-prelayernorm".split())  # noqa: SIM905
"""Families whose positions begin behind the padding token's number."""


def check_task(checkpoint: Checkpoint, tensor_parallel: int) -> None:
    """LoadError unless this model can be split so, with the right result."""
    family = checkpoint.model_type
    if "quantization_config" in checkpoint.config:
        raise LoadError(f"{family}: quantised checkpoints are not supported")
    if tensor_parallel > 1 and family not in SHARDABLE_ENCODERS:
        reason = _UNSHARDABLE.get(family, "it has not been shown that DeepSpeed shards it correctly")
        raise LoadError(f"{family} cannot be split over {tensor_parallel} ranks: {reason}; use tensor_parallel 1")
    heads = int(checkpoint.config.get("num_attention_heads") or checkpoint.config.get("n_heads") or tensor_parallel)
    if heads % tensor_parallel:
        raise LoadError(f"{family} has {heads} attention heads, which {tensor_parallel} ranks cannot share evenly")


def longest(checkpoint: Checkpoint, asked: int) -> int:
    """Tokens of the longest sequence: the model's positions, the tokenizer's limit, or fewer where asked.

    LoadError where nothing says so, or more is asked than the model has.
    """
    positions = checkpoint.max_model_len
    if checkpoint.model_type in _OFFSET and positions:
        positions -= int(checkpoint.config.get("pad_token_id", 1)) + 1
    stated = _json(checkpoint.folder / "tokenizer_config.json").get("model_max_length")
    limits = [limit for limit in (positions, stated) if isinstance(limit, int) and 0 < limit < 1 << 30]
    if asked and limits and asked > max(limits):
        raise LoadError(f"max_model_len {asked} is more than the model's {max(limits)} positions")
    if not asked and not limits:
        raise LoadError("config.json names no maximum length: set max_model_len")
    return asked or min(limits)


@dataclass(frozen=True)
class Pooling:
    """How a folder of sentence-transformers makes vectors; its defaults hold for other folders."""

    kind: str
    dimensions: int
    normalize: bool
    max_seq_length: int = 0
    """0: not stated."""
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str = ""


def pooling_of(folder: Path, checkpoint: Checkpoint) -> Pooling:
    """LoadError for a module that is not honoured, or more than one way of pooling at once."""
    modules = _json(folder / "modules.json") or []
    kinds = {module["type"].rsplit(".", 1)[-1]: folder / module["path"] for module in modules}
    if other := sorted(kinds.keys() - {"Transformer", "Pooling", "Normalize"}):
        raise LoadError(f"{folder / 'modules.json'} has a module {other[0]}, which is not supported")
    stated = _json(kinds["Pooling"] / "config.json") if "Pooling" in kinds else {}
    general = _json(folder / "config_sentence_transformers.json")
    prompts = {name: text for name, text in (general.get("prompts") or {}).items() if isinstance(text, str)}
    return Pooling(
        kind=_kind(stated, checkpoint),
        dimensions=int(checkpoint.text_config.get("hidden_size") or checkpoint.text_config["dim"]),
        normalize="Normalize" in kinds or not modules,
        max_seq_length=int(_json(folder / "sentence_bert_config.json").get("max_seq_length") or 0),
        prompts=prompts,
        default_prompt=prompts.get(general.get("default_prompt_name") or "", ""),
    )


_MODES = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "last", "max_tokens": "max"}


def _kind(stated: dict[str, Any], checkpoint: Checkpoint) -> str:
    if isinstance(mode := stated.get("pooling_mode"), str):  # as newer releases write it
        modes = [mode]
    else:
        modes = [_MODES.get(name.removeprefix("pooling_mode_"), name) for name, on in stated.items()
                 if name.startswith("pooling_mode_") and on]  # fmt: skip
    if len(modes) > 1 or (modes and modes[0] not in _MODES.values()):
        raise LoadError(f"the model pools by {' and '.join(modes)}, which is not supported")
    causal = any(name.endswith("ForCausalLM") for name in checkpoint.architectures)
    return modes[0] if modes else "last" if causal else "mean"


def _json(path: Path) -> Any:
    """A file's content; nothing where there is none."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} cannot be read: {error}") from None
