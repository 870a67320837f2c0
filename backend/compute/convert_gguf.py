"""GGUF to a Hugging Face folder: `python -m backend.compute.convert_gguf FILE FOLDER`. It knows SmolLM2 alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
"""SmolLM2's: <|im_start|> and <|im_end|>."""


def convert(source: Path, folder: Path) -> None:
    """Writes config, safetensors in bfloat16, tokenizer with its chat template, and generation_config."""
    torch.set_num_threads(1)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name)
    _plain(model).save_pretrained(folder)


def _plain(model: Any) -> Any:
    """The same model without the marks of its quantized source, which would have it loaded as GGUF again."""
    given = model.config.to_dict()
    given.pop("quantization_config", None)
    given.update(ENDS, dtype="bfloat16")
    with torch.device("meta"):
        plain: Any = LlamaForCausalLM(LlamaConfig(**given))
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = GenerationConfig(**ENDS)
    return plain.to(torch.bfloat16)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
