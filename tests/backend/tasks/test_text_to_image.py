"""TextToImage's CPU half: what it refuses, what it draws together, what it answers; without a model's weights."""

import json
import subprocess
import sys
from io import BytesIO

import numpy as np
import pytest
from google.protobuf import text_format
from PIL import Image
from tritonclient.grpc import model_config_pb2

from backend.config import EngineConfig
from backend.errors import InvalidInput, LoadError, ServingError
from backend.tasks.pictures import FORMATS, read, write
from backend.tasks.text_to_image import TextToImage

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)


def save(folder, kind="StableDiffusionPipeline", vae_levels=4, side=64, patch=None, **parts):
    """What the CPU half reads of a pipeline."""
    denoiser = "unet" if "unet" in parts or kind.startswith(("StableDiffusionP", "StableDiffusionI")) else "transformer"
    index = {"_class_name": kind, "_diffusers_version": "0", "requires_safety_checker": False, **parts}
    for name, value in {
        "vae": {"block_out_channels": [8] * vae_levels},
        denoiser: {"sample_size": side, "patch_size": patch},
        "scheduler": {"num_train_timesteps": 1000},
    }.items():
        (folder / name).mkdir(parents=True)
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / name / file).write_text(json.dumps(value))
        index.setdefault(name, ["diffusers", "Part"])
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def made(folder, **changes):
    return TextToImage(folder, EngineConfig(model=str(folder), **changes))


@pytest.fixture
def task(tmp_path):
    return made(save(tmp_path / "sd"), max_images=8)


def file(pixels=PIXELS, format_="png"):
    written = BytesIO()
    Image.fromarray(pixels).save(written, format_)
    return written.getvalue()


def row(**given):
    return {"prompt": b"a red circle", **given}


def pieces(task, *rows):
    items = [task.parse(each) for each in rows]
    return items, [piece for found in task.prepare(items) for piece in found]


def test_it_loads_nothing_heavy():
    code = (
        "import sys, backend.tasks.text_to_image as t;"
        "print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"prompt": b"\xff"}, "prompt"), ({"prompt": b"x" * (1 << 20) + b"y"}, "1048577 bytes"),
        ({"negative_prompt": b"\xff"}, "negative_prompt"),
        ({"num_inference_steps": 0}, "num_inference_steps"), ({"num_inference_steps": 201}, r"200 \(max_steps\)"),
        ({"guidance_scale": float("nan")}, "guidance_scale"), ({"guidance_scale": float("inf")}, "guidance_scale"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"height": 2**20}, r"pixels.*\(max_pixels\)"), ({"width": 12}, "width must be a multiple of 8"),
        ({"height": 500, "width": 512}, "height must be a multiple of 8"), ({"height": 0, "width": 8}, "height"),
        ({"height": -8, "width": -8}, "height"), ({"height": 4096, "width": 1032}, r"4227072 pixels.*\(max_pixels\)"),
        ({"height": 2**31 - 8, "width": 2**31 - 8}, "limit"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"), ({"num_images_per_prompt": 9}, r"8 \(max_images\)"),
        ({"format": b"gif"}, "png, jpeg, webp, raw"), ({"strength": 0.5}, "strength"),
        ({"image": file()}, "mask_image"), ({"mask_image": file()}, "together"),
        ({"image": b"GIF89a", "mask_image": file()}, "image is not"),
        ({"image": file(format_="bmp"), "mask_image": file()}, "image is not"),
        ({"image": file()[:200], "mask_image": file()}, "image is not"),
        ({"image": file(), "mask_image": file(PIXELS[:8])}, "same size"),
        ({"image": file(), "mask_image": file(), "strength": 0.0}, "strength"),
        ({"image": file(), "mask_image": file(), "strength": 0.1, "num_inference_steps": 5}, "leaves none"),
    ],
)  # fmt: skip
def test_bad_values_are_named(task, given, named):
    with pytest.raises(InvalidInput, match=named):
        task.parse(row(**given))


def test_of_one_side_the_other_is_the_models_own(task):
    _, found = pieces(task, row(height=64), row(width=task.folder.side, height=64), row(width=64), row())
    sizes = [{name: dict(piece.settings).get(name) for name in ("height", "width")} for piece in found]
    side = task.folder.side
    assert sizes == [
        {"height": 64, "width": side}, {"height": 64, "width": side}, {"height": side, "width": 64},
        {"height": None, "width": None},
    ]  # fmt: skip
    assert task.cut(found) == [[0, 1], [2], [3]]


def test_a_prompt_is_needed(task):
    with pytest.raises(InvalidInput, match="prompt is missing"):
        task.parse({})


def test_a_large_image_is_refused_before_it_is_unpacked(task, monkeypatch):
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(InvalidInput, match="3000 x 2000"):
        task.parse(row(image=file(np.zeros((2000, 3000), np.uint8)), mask_image=file()))


def test_what_is_not_given_is_left_to_the_pipeline(task):
    _, (piece,) = pieces(task, row())
    assert task.batch([piece])["settings"] == {}
    assert task.batch([piece])["negative_prompts"] is None
    assert 0 <= piece.seed < 2**32


def test_seeds_are_drawn_anew_and_count_on(task):
    seeds = {pieces(task, row())[1][0].seed for _ in range(20)}
    assert len(seeds) > 15
    _, found = pieces(task, row(seed=2**64 - 2, num_images_per_prompt=3))
    assert [piece.seed for piece in found] == [2**64 - 2, 2**64 - 1, 0]


def test_images_of_the_same_settings_are_drawn_together(task):
    _, found = pieces(
        task,
        row(seed=1, num_inference_steps=5),
        row(seed=2, num_inference_steps=6),
        row(seed=3, num_inference_steps=5, prompt=b"b", format=b"jpeg"),
        row(seed=4, num_inference_steps=5, negative_prompt=b"n"),
        row(seed=5, num_inference_steps=5, guidance_scale=2.0),
        row(seed=6, num_inference_steps=5, image=file(), mask_image=file()),
    )
    assert task.cut(found) == [[0, 2], [1], [3], [4], [5]]
    batch = task.batch([found[0], found[2]])
    assert (batch["prompts"], batch["seeds"]) == (["a red circle", "b"], [1, 3])
    assert batch["settings"] == {"num_inference_steps": 5}
    assert task.batch(found[3:4])["negative_prompts"] == ["n"]
    assert np.array_equal(task.batch(found[5:])["images"][0], PIXELS)
    assert task.batch(found[5:])["masks"][0].shape == (16, 24)


def test_a_batch_has_the_pixels_of_the_largest_image_on_each_rank(tmp_path):
    folder = save(tmp_path / "sd")  # 512 x 512 of its own
    for ranks in (1, 2):
        task = made(folder, max_pixels=3 * 2**18, tensor_parallel=ranks)
        _, found = pieces(task, row(num_images_per_prompt=7), row(height=1024, width=768))
        assert [len(batch) for batch in task.cut(found)] == {1: [3, 3, 1, 1], 2: [6, 1, 1]}[ranks]


def test_the_ranks_images_are_joined_in_order(task):
    assert task.join([["a", None, "c"], [None, "b", None]]) == ["a", "b", "c"]
    assert task.join([["a"], ["a"]]) == ["a"]


@pytest.mark.parametrize("format_", FORMATS)
def test_an_answers_rows(task, format_):
    items, found = pieces(task, row(seed=4, num_images_per_prompt=2, format=format_.encode()), row(seed=9))
    drawn = [(PIXELS, False), (PIXELS, True), (PIXELS[:8], False)]
    outputs = task.outputs([task.finish(items[0], found[:2], drawn[:2]), task.finish(items[1], found[2:], drawn[2:])])
    assert outputs["seed"].tolist() == [[4, 5], [9, 0]]
    assert outputs["height"].tolist() == [[16], [8]] and outputs["width"].tolist() == [[24], [24]]
    assert outputs["nsfw_content_detected"].tolist() == [[False, True], [False, False]]
    assert outputs["image"][1, 1] == b""
    if format_ == "raw":
        assert outputs["image"][0, 1] == PIXELS.tobytes()
    else:
        opened = Image.open(BytesIO(outputs["image"][0, 1]))
        assert (opened.format, opened.size) == (format_.upper(), (24, 16))
    config = text_format.Parse(_config(), model_config_pb2.ModelConfig())
    types = {"image": object, "seed": np.uint64, "height": np.int32, "width": np.int32}
    assert {each.name for each in config.output} == outputs.keys()
    assert all(outputs[name].dtype == kind for name, kind in types.items())


def test_what_the_ranks_refused_is_raised(task):
    items, found = pieces(task, row())
    with pytest.raises(ServingError, match="no memory"):
        task.finish(items[0], found, [ServingError("no memory")])


def test_png_keeps_every_pixel_and_a_turned_photo_is_set_upright():
    assert np.array_equal(read(write(PIXELS, "png"), "image", "RGB", 1000), PIXELS)
    turned = BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.fromarray(PIXELS).save(turned, "png", exif=exif)
    assert read(turned.getvalue(), "image", "RGB", 1000).shape == (24, 16, 3)


def test_config_pbtxt_has_what_is_read(task):
    config = text_format.Parse(_config(), model_config_pb2.ModelConfig())
    given = {each.name for each in config.input} - {"prompt", "negative_prompt", "format", "image", "mask_image"}
    assert given == task._parameters.keys()
    assert not config.model_transaction_policy.decoupled
    assert not config.response_cache.enable
    assert config.dynamic_batching.default_queue_policy.max_queue_size > 0
    EngineConfig.from_parameters({key: value.string_value for key, value in config.parameters.items()})


def _config():
    from pathlib import Path

    return (Path(__file__).parents[3] / "model_repository" / "text_to_image" / "config.pbtxt").read_text()


# ---- which folders


def test_sizes_follow_the_vae_and_the_patches(tmp_path):
    assert made(save(tmp_path / "sd")).folder.multiple == 8
    assert made(save(tmp_path / "small", vae_levels=2, side=16)).folder.side == 32
    pixart = made(save(tmp_path / "pixart", "PixArtAlphaPipeline", patch=2))
    assert pixart.folder.multiple == 16
    with pytest.raises(InvalidInput, match="PixArtAlphaPipeline does not inpaint"):
        pixart.parse(row(image=file(), mask_image=file()))


def test_a_model_that_only_inpaints_needs_an_image(tmp_path):
    task = made(save(tmp_path / "inpaint", "StableDiffusionInpaintPipeline"))
    with pytest.raises(InvalidInput, match="only inpaints"):
        task.parse(row())
    assert task.parse(row(image=file(), mask_image=file())).pictures[0].mask is not None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kind": "FluxPipeline"}, "FluxPipeline"),
        ({"kind": ["pipeline", "Mine"]}, "Mine"),
        ({"unet": ["my_code", "MyUNet"]}, "my_code"),
        ({"text_encoder": ["transformers", "CLIPTextModel"]}, "text_encoder is missing"),
    ],
)
def test_what_cannot_be_served_is_refused(tmp_path, changes, named):
    folder = save(tmp_path / "sd")
    index = json.loads((folder / "model_index.json").read_text())
    changes = {"_class_name" if name == "kind" else name: value for name, value in changes.items()}
    (folder / "model_index.json").write_text(json.dumps({**index, **changes}))
    with pytest.raises(LoadError, match=named):
        made(folder)


def test_pickled_weights_are_refused(tmp_path):
    folder = save(tmp_path / "sd")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(LoadError, match="safetensors"):
        made(folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    made(folder)


@pytest.mark.parametrize(("content", "named"), [("{", "cannot be read"), ("[]", "JSON object"), (None, "missing")])
def test_a_broken_index_is_named(tmp_path, content, named):
    folder = save(tmp_path / "sd")
    (folder / "model_index.json").unlink()
    if content:
        (folder / "model_index.json").write_text(content)
    with pytest.raises(LoadError, match=named):
        made(folder)


def test_weights_are_not_packed(tmp_path):
    with pytest.raises(LoadError, match="quantization 'int8': pipelines of images are served in dtype"):
        made(save(tmp_path / "sd"), quantization="int8")
