"""Loads encoders on ranks of their own and hands back what each rank computed."""

from __future__ import annotations

from pathlib import Path

import torch
from rank_processes import Ranks

HEADS = {
    "AutoModel": "last_hidden_state",
    "AutoModelForSequenceClassification": "logits",
    "AutoModelForMaskedLM": "logits",
    "AutoModelForTokenClassification": "logits",
    "AutoModelForQuestionAnswering": "start_logits",
}


def inputs(model):
    """Two sequences, the second shorter, and kinds of tokens where the model tells them apart."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, min(200, model.config.vocab_size), (2, 20), generator=generator)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, 13:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, model.config.pad_token_id or 0), "attention_mask": mask}


def compute(model, auto):
    """The model's output where there is no padding."""
    given = inputs(model)
    with torch.inference_mode():
        output = getattr(model.eval()(**given), HEADS[auto])
    return (
        output * given["attention_mask"].reshape(2, 20, *[1] * (output.dim() - 2)) if output.shape[1] == 20 else output
    )


def plain(folder, auto):
    """What transformers computes."""
    import transformers

    return compute(getattr(transformers, auto).from_pretrained(folder, dtype=torch.float32), auto)


def sharded(cases, world):
    """What `world` ranks compute of each (folder, auto): by rank, then case; an error's text where it is refused."""
    return Ranks(world, _attempts, cases).results()


def _attempts(rank, world, cases):
    return [_attempt(Path(folder), auto, world) for folder, auto in cases]


def _attempt(folder, auto, world):
    from backend.compute.encoders.load import load_encoder
    from backend.errors import LoadError
    from backend.model_folder import Checkpoint

    try:
        model = load_encoder(Checkpoint.open(folder), auto, world, torch.device("cpu"), torch.float32)
        return compute(model, auto)
    except LoadError as error:
        return str(error)
