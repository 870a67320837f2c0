"""Tiny diffusers pipelines of random weights, each a folder as `save_pretrained` writes it, in about a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WORDS = ["a", "red", "blue", "circle", "square", "the", "digit", "three", "seven", "ugly"]


def save(kind: str, folder: Path, **options: Any) -> Path:
    """A pipeline of the kind "sd", "sd2", "sdxl", "sd3" or "pixart"; images of 32 x 32 (pixart 64) unless asked."""
    import torch

    torch.manual_seed(0)
    pipeline = {"sd": _sd, "sd2": _sd2, "sdxl": _sdxl, "sd3": _sd3, "pixart": _pixart}[kind](**options)
    pipeline.save_pretrained(folder)
    return folder


def _sd(safety: bool = False, inpaint: bool = False) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline, StableDiffusionPipeline
    from transformers import CLIPImageProcessor, CLIPTextModel

    return (StableDiffusionInpaintPipeline if inpaint else StableDiffusionPipeline)(
        vae=_vae(),
        text_encoder=CLIPTextModel(_clip_text()),
        tokenizer=_tokenizer(),
        unet=_unet(in_channels=9 if inpaint else 4),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=_safety_checker() if safety else None,
        feature_extractor=CLIPImageProcessor(size=30, crop_size=30) if safety else None,
        requires_safety_checker=safety,
    )


def _sd2() -> Any:
    """As 2.1: the scheduler takes velocities, attention projects by linear layers, the text encoder is OpenCLIP's."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_clip_text(hidden_act="gelu")),
        tokenizer=_tokenizer(),
        unet=_unet(use_linear_projection=True),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", clip_sample=False, steps_offset=1, prediction_type="v_prediction"
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    unet = _unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        cross_attention_dim=64,
    )
    return StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_clip_text()),
        text_encoder_2=CLIPTextModelWithProjection(_clip_text()),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        add_watermarker=False,
    )


def _sd3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=1, in_channels=16, out_channels=16, num_layers=1, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64,
        pos_embed_max_size=32,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(latent_channels=16, shift_factor=0.1),
        text_encoder=CLIPTextModelWithProjection(_clip_text()),
        tokenizer=_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(_clip_text()),
        tokenizer_2=_tokenizer(),
        text_encoder_3=T5EncoderModel(_t5(64)),
        tokenizer_3=_t5_tokenizer(),
    )


def _pixart() -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
    from transformers import T5EncoderModel

    transformer = PixArtTransformer2DModel(
        sample_size=32, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=4, caption_channels=32,
        in_channels=4, cross_attention_dim=32, out_channels=8, norm_type="ada_norm_single",
        use_additional_conditions=False,
    )  # fmt: skip
    return PixArtAlphaPipeline(
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
        vae=_vae(),
        text_encoder=T5EncoderModel(_t5(32)),
        tokenizer=_t5_tokenizer(),
    )


def _vae(latent_channels: int = 4, **more: Any) -> Any:
    """Halves twice less than the real ones: one pixel of latents is 2 x 2 pixels of the image."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16), in_channels=3, out_channels=3, latent_channels=latent_channels, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=32, **more,
    )  # fmt: skip


def _unet(in_channels: int = 4, cross_attention_dim: int = 32, **more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16, in_channels=in_channels, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=2, cross_attention_dim=cross_attention_dim, **more,
    )  # fmt: skip


def _clip_text(**more: Any) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=77, projection_dim=32, bos_token_id=0, eos_token_id=1, pad_token_id=1, **more,
    )  # fmt: skip


def _t5(size: int) -> Any:
    from transformers import T5Config

    return T5Config(vocab_size=64, d_model=size, d_kv=8, d_ff=37, num_layers=1, num_heads=2)


def _safety_checker() -> Any:
    """Random weights and thresholds below every similarity: it objects to every image."""
    import torch
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    part = dict(hidden_size=32, intermediate_size=37, num_hidden_layers=1, num_attention_heads=4)
    text = dict(part, vocab_size=64, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    vision = dict(part, image_size=30, patch_size=15)
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    with torch.no_grad():
        checker.concept_embeds_weights.fill_(-2.0)
        checker.concept_embeds.normal_()
        checker.special_care_embeds.normal_()
        checker.special_care_embeds_weights.fill_(-2.0)
    return checker


def _tokenizer() -> Any:
    """Letters with and without an end-of-word mark, nothing merged."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz,."
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def _t5_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=120
    )
