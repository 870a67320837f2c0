"""The digit pipeline's training: its tokenizer, its prompts, and that diffusers takes what it leaves behind."""

import json

import numpy as np
import torch

from backend.training import digits, handwriting


def test_pictures_shrink_to_what_they_were_made_of():
    pictures, labels = handwriting.real()
    assert pictures.shape == (1797, 3, 32, 32) and pictures.min() >= -1 and pictures.max() <= 1
    as_drawn = ((pictures + 1) / 2).permute(0, 2, 3, 1).numpy()
    recognised = handwriting.recogniser().predict(handwriting.shrink(as_drawn))
    assert np.mean(recognised == labels.numpy()) > 0.97


def test_the_tokenizer_knows_every_prompt_by_its_words_and_any_other_by_its_bytes():
    tokenizer = digits._tokenizer()
    assert tokenizer.tokenize("a handwritten three") == ["a</w>", "handwritten</w>", "three</w>"]
    longest = max((w.format(n) for w in handwriting.WORDINGS for n in handwriting.NAMES), key=len)
    assert len(tokenizer(longest).input_ids) <= digits.LENGTH == tokenizer.model_max_length
    assert tokenizer.unk_token_id not in tokenizer("zebra Ä 三", add_special_tokens=False).input_ids


def test_some_prompts_are_empty_and_the_others_fit_the_digit():
    torch.manual_seed(0)
    tokenizer = digits._tokenizer()
    asked = torch.arange(1000) % 10
    texts = tokenizer.batch_decode(digits._Words(tokenizer).some(asked), skip_special_tokens=True)
    empty = [not text.strip() for text in texts]
    assert 50 < sum(empty) < 150
    named = zip(asked.tolist(), texts, empty, strict=True)
    assert all(text.split()[-1] == handwriting.NAMES[digit] for digit, text, none in named if not none)


def test_diffusers_draws_with_what_it_leaves_behind(tmp_path):
    from diffusers import StableDiffusionPipeline

    metrics = digits.train(tmp_path, digits.Amount(autoencoder=2, unet=2, drawn=2))
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics and metrics["of"] == 2
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("the digit three", num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 32, 32, 3) and np.isfinite(image).all()
    assert not [path for path in tmp_path.rglob("*") if path.suffix in {".bin", ".pt", ".ckpt", ".pkl"}]
