"""A Stable Diffusion pipeline that draws handwritten digits: `python -m backend.training.digits FOLDER`.

It knows how the parts are built and trained; what they learn from is handwriting.py.
"""

# mypy: disable-error-code="no-untyped-call"
# diffusers' annotations are partial.

from __future__ import annotations

import argparse
import copy
import json
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from backend.training.handwriting import NAMES, SIDE, WORDINGS, real, recognised
from backend.training.steps import bar, falling, mixed, save_json, settle, step

LENGTH = 16
"""Tokens of a prompt. The longest wording has seven."""
BATCH = 32
DROPPED = 0.1
"""Share of the prompts that are left empty in training, so that guidance has something to lead away from."""


@dataclass(frozen=True)
class Amount:
    """For how many steps each part is trained, and by how many digits it is judged."""

    autoencoder: int = 300
    unet: int = 1200
    drawn: int = 40


def train(folder: Path, amount: Amount) -> dict[str, Any]:
    """Writes the pipeline, and metrics.json with the share of its digits that a classifier of real ones recognises."""
    settle(seed=0)
    pictures, digits = real()
    autoencoder = _autoencoder(pictures, amount.autoencoder)
    tokenizer = _tokenizer()
    encoder, unet = _text_model(tokenizer), _unet()
    _learn_to_denoise(_latents(autoencoder, pictures), digits, _Words(tokenizer), encoder, unet, amount.unet)
    pipeline = _pipeline(autoencoder, tokenizer, encoder, unet)
    pipeline.save_pretrained(folder, safe_serialization=True)
    metrics = {"recognised": recognised(pipeline, amount.drawn), "of": amount.drawn}
    save_json(folder / "metrics.json", metrics)
    return metrics


def _autoencoder(pictures: Tensor, steps: int) -> Any:
    """To 4 channels of 8 x 8 and back; its scaling factor makes the latents' spread 1."""
    model: Any = AutoencoderKL(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIDE,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = falling(optimizer, steps, warm=20)
    for _ in bar(steps, "autoencoder"):
        real = pictures[torch.randint(len(pictures), (BATCH,))]
        with mixed():
            hidden = model.encode(real).latent_dist
            drawn = model.decode(hidden.sample()).sample
        loss = F.mse_loss(drawn.float(), real) + 1e-4 * hidden.kl().float().mean() / 256
        step(loss, model.parameters(), optimizer, schedule)
    model.eval()
    model.register_to_config(scaling_factor=1 / _encode(model, pictures).std().item())
    return model


@torch.no_grad()
def _encode(autoencoder: Any, pictures: Tensor) -> Tensor:
    return torch.cat([autoencoder.encode(part).latent_dist.mean for part in pictures.split(256)])


def _latents(autoencoder: Any, pictures: Tensor) -> Tensor:
    latents: Tensor = _encode(autoencoder, pictures) * autoencoder.config.scaling_factor
    return latents


def _tokenizer() -> Any:
    """CLIP's kind, of all bytes and of the words that the prompts hold."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges(alphabet)
    letters = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    tokens = dict.fromkeys([*letters, *(a + b for a, b in merges), "<|startoftext|>", "<|endoftext|>"])
    with tempfile.TemporaryDirectory() as scratch:
        save_json(Path(scratch, "vocab.json"), {token: i for i, token in enumerate(tokens)})
        Path(scratch, "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
        return CLIPTokenizer.from_pretrained(scratch, model_max_length=LENGTH)


def _merges(alphabet: list[str]) -> list[tuple[str, str]]:
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    prompts = [wording.format(name) for wording in WORDINGS for name in NAMES]
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator(prompts, trainer)
    return [(a, b) for a, b in json.loads(bpe.to_str())["model"]["merges"]]


def _text_model(tokenizer: Any) -> Any:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            projection_dim=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _unet() -> Any:
    return UNet2DConditionModel(
        sample_size=SIDE // 4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def _noise() -> Any:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


class _Words:
    """The prompts' token ids, [digits + 1, wordings, LENGTH]; the last row is the empty prompt."""

    def __init__(self, tokenizer: Any) -> None:
        rows = [[wording.format(name) for wording in WORDINGS] for name in NAMES] + [[""] * len(WORDINGS)]
        self._ids = torch.stack([tokenizer(row, padding="max_length", return_tensors="pt").input_ids for row in rows])

    def some(self, digits: Tensor) -> Tensor:
        """A prompt for each digit, now and then none: [n, LENGTH]."""
        asked = torch.where(torch.rand(len(digits)) < DROPPED, len(NAMES), digits)
        return self._ids[asked, torch.randint(len(WORDINGS), digits.shape)]


def _learn_to_denoise(latents: Tensor, digits: Tensor, words: _Words, encoder: Any, unet: Any, steps: int) -> None:
    """Trains text encoder and UNet as one; what is kept is the running average of their weights, which draws better."""
    both = nn.ModuleList([encoder, unet])
    average = copy.deepcopy(both)
    optimizer = torch.optim.AdamW(both.parameters(), lr=1.5e-3, weight_decay=0.0)
    schedule, noise = falling(optimizer, steps, warm=50), _noise()
    for i in bar(steps, "denoising"):
        chosen = torch.randint(len(latents), (BATCH,))
        loss = _denoising_loss(latents[chosen], words.some(digits[chosen]), encoder, unet, noise)
        step(loss, both.parameters(), optimizer, schedule)
        _follow(average, both, decay=min(0.995, i / (i + 10)))
    both.load_state_dict(average.state_dict())
    both.eval()


def _denoising_loss(clean: Tensor, ids: Tensor, encoder: Any, unet: Any, noise: Any) -> Tensor:
    added = torch.randn_like(clean)
    times = torch.randint(noise.config.num_train_timesteps, (len(clean),))
    with mixed():
        hidden = encoder(ids)[0]
        guessed = unet(noise.add_noise(clean, added, times), times, hidden).sample
    return F.mse_loss(guessed.float(), added)


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def _pipeline(autoencoder: Any, tokenizer: Any, encoder: Any, unet: Any) -> Any:
    return StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=_noise(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m backend.training.digits")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    print(json.dumps(train(options.folder, Amount())))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word: nothing is half written
    main()
