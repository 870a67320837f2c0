"""Splits loaded models on CPU ranks of their own and hands back what each rank computed."""

from __future__ import annotations

import torch
from rank_processes import Ranks


def models():
    """One of each class, of random weights, the same in every process. Hidden sizes are not the number of heads'."""
    import transformers as t

    torch.manual_seed(0)
    block = dict(hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, projection_dim=24)
    text = dict(block, vocab_size=64, max_position_embeddings=32, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    vision = dict(block, hidden_size=48, num_attention_heads=6, image_size=32, patch_size=8)
    clip = t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24, initializer_factor=3.0)
    t5 = t.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=6)
    gated = t.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return {
        "clip": t.CLIPModel(clip),
        "text": t.CLIPTextModel(t.CLIPTextConfig(**text)),
        "projected": t.CLIPTextModelWithProjection(t.CLIPTextConfig(**text)),
        "t5": t.T5EncoderModel(t5),
        "gated t5": t.T5EncoderModel(gated),
    }


def compute(model):
    """All of the model's floating point answers, as one vector."""
    generator = torch.Generator().manual_seed(3)
    given = {"input_ids": torch.randint(2, 60, (2, 12), generator=generator)}
    given["attention_mask"] = torch.ones(2, 12, dtype=torch.int64)
    given["attention_mask"][1, 7:] = 0
    if hasattr(model, "vision_model"):
        given["pixel_values"] = torch.randn(3, 3, 32, 32, generator=generator)
    with torch.inference_mode():
        answer = model.eval()(**given).to_tuple()
    return torch.cat([each.flatten() for each in answer if isinstance(each, torch.Tensor)])


def split_and_computed(world):
    """What each rank computes: by rank, then name."""
    return Ranks(world, _split_and_computed).results()


def _split_and_computed(rank, world):
    from backend.compute.split_loaded import split

    found = {}
    for name, model in models().items():
        before = sum(value.numel() for value in model.parameters())
        split(model, rank, world, torch.device("cpu"))
        found[name] = compute(model), sum(value.numel() for value in model.parameters()) / before
    return found
