"""A tiny CLIP of random weights, with its tokenizer and image processor."""

import torch
import transformers
from tiny_encoders import save_tokenizer


def write_clip(folder, heads=4):
    folder.mkdir(parents=True, exist_ok=True)
    size = save_tokenizer(folder, "roberta")
    block = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=heads, projection_dim=16
    )
    text = dict(block, vocab_size=size, max_position_embeddings=64, bos_token_id=0, eos_token_id=2, pad_token_id=1)
    vision = dict(block, image_size=32, patch_size=8)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16, initializer_factor=5.0)
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    sizes = dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.CLIPImageProcessorPil(**sizes).save_pretrained(folder)
    return folder
