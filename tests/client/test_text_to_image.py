"""TextToImage and AsyncTextToImage against a transport that answers as the model does."""

import asyncio
import sys
from io import BytesIO

import numpy as np
import pytest
from fake_triton import decode
from PIL import Image
from tritonclient import utils
from tritonclient.grpc import service_pb2

from client.errors import InvalidInput, ServerError
from client.text_to_image import AsyncTextToImage, TextToImage

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 8, 3), dtype=np.uint8)


class Context:
    def invocation_metadata(self):
        return ()


class Model:
    """Answers each request with its images, all of PIXELS; the last prompt of a batch has an image less."""

    def __init__(self, **changes):
        self.asked, self.changes = [], changes

    def answer(self, request):
        inputs = decode(request, Context()).inputs
        self.asked.append({name: value.reshape(-1).tolist() for name, value in inputs.items()})
        count = int(inputs["num_images_per_prompt"].item()) if "num_images_per_prompt" in inputs else 1
        seed = int(inputs["seed"].item()) if "seed" in inputs else 77
        written = file(inputs["format"].item().decode() if "format" in inputs else "png")
        outputs = {
            "image": np.array([[written] * count + [b""]], np.object_),
            "seed": np.array([[*range(seed, seed + count), 0]], np.uint64),
            "height": np.array([[16]], np.int32),
            "width": np.array([[8]], np.int32),
            "nsfw_content_detected": np.array([[*[False] * (count - 1), count > 2, False]]),
        }
        response = service_pb2.ModelInferResponse()
        for name, array in {**outputs, **self.changes}.items():
            datatype = utils.np_to_triton_dtype(array.dtype)
            response.outputs.add(name=name, datatype=datatype, shape=array.shape)
            raw = utils.serialize_byte_tensor(array).item() if datatype == "BYTES" else array.tobytes()
            response.raw_output_contents.append(raw)
        return response


class Sync(Model):
    def infer(self, request, limits):
        yield self.answer(request)


class Async(Model):
    async def infer(self, request, limits):
        yield self.answer(request)


def file(format_):
    if format_ == "raw":
        return PIXELS.tobytes()
    written = BytesIO()
    Image.fromarray(PIXELS).save(written, format_)
    return written.getvalue()


@pytest.fixture
def model():
    return Sync()


@pytest.fixture
def pipe(model):
    return TextToImage("text_to_image", model, concurrency=1)


def test_a_prompt_gives_an_image_with_its_seed(pipe, model):
    (image,) = pipe("a red circle")
    assert np.array_equal(np.asarray(image), PIXELS)
    assert image.info["seed"] == 77
    assert "nsfw_content_detected" not in image.info
    assert model.asked == [{"prompt": [b"a red circle"]}]


@pytest.mark.parametrize("format_", ["png", "jpeg", "webp", "raw"])
def test_every_format_becomes_an_image(pipe, model, format_):
    (image,) = pipe("a", format=format_)
    assert image.size == (8, 16) and image.mode == "RGB"
    assert model.asked[0]["format"] == [format_.encode()]
    if format_ in ("png", "raw"):
        assert np.array_equal(np.asarray(image), PIXELS)


def test_several_images_of_several_prompts_in_order(pipe, model):
    found = pipe(["a", "b"], num_images_per_prompt=3, seed=[10, 20])
    assert [image.info["seed"] for image in found] == [10, 11, 12, 20, 21, 22]
    assert [image.info.get("nsfw_content_detected", False) for image in found] == [False, False, True] * 2
    assert [asked["prompt"] for asked in model.asked] == [[b"a"], [b"b"]]


def test_one_seed_is_for_every_prompt(pipe, model):
    pipe(["a", "b"], seed=2**64 - 8)
    assert [asked["seed"] for asked in model.asked] == [[2**64 - 8]] * 2


def test_no_prompts_are_no_images(pipe, model):
    assert pipe([]) == []
    assert not model.asked


def test_every_option_is_sent(pipe, model, tmp_path):
    path = tmp_path / "mask.png"
    Image.fromarray(PIXELS[..., 0]).save(path)
    pipe(
        "a", negative_prompt="ugly", num_inference_steps=3, guidance_scale=2.5, height=16, width=8, strength=0.5,
        image=Image.fromarray(PIXELS), mask_image=path, timeout=5,
    )  # fmt: skip
    (asked,) = model.asked
    image, mask = asked.pop("image")[0], asked.pop("mask_image")[0]
    assert np.array_equal(np.asarray(Image.open(BytesIO(image))), PIXELS)
    assert mask == path.read_bytes()
    assert asked == {
        "prompt": [b"a"], "negative_prompt": [b"ugly"], "num_inference_steps": [3], "guidance_scale": [2.5],
        "height": [16], "width": [8], "strength": [0.5],
    }  # fmt: skip


def test_pixels_are_an_image_too(pipe, model):
    pipe("a", image=PIXELS, mask_image=PIXELS[..., 0])
    assert np.array_equal(np.asarray(Image.open(BytesIO(model.asked[0]["image"][0]))), PIXELS)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"steps": 3}, "steps"), ({"height": "8"}, "height"), ({"seed": [1, 2]}, "2 seeds"), ({"seed": -1}, "seed"),
        ({"guidance_scale": float("nan")}, "guidance_scale"), ({"image": PIXELS / 2}, "image must"),
        ({"image": "/no/such/file.png"}, "file"), ({"image": 3}, "image"),
    ],
)  # fmt: skip
def test_wrong_values_never_leave(pipe, model, options, named):
    with pytest.raises(InvalidInput, match=named):
        pipe("a", **options)
    assert not model.asked


def test_without_pillow_nothing_is_asked(pipe, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InvalidInput, match="pip install pillow"):
        pipe("a")
    assert not model.asked


def test_an_answer_of_another_task_is_an_error():
    response = Sync()
    response.answer = lambda request: service_pb2.ModelInferResponse()
    with pytest.raises(ServerError, match="another task"):
        TextToImage("text_to_image", response)("a")


def test_async():
    model = Async()

    async def draw():
        return await AsyncTextToImage("text_to_image", model)(["a", "b"], seed=5, timeout=5)

    found = asyncio.run(draw())
    assert [image.info["seed"] for image in found] == [5, 5]
    assert np.array_equal(np.asarray(found[1]), PIXELS)
