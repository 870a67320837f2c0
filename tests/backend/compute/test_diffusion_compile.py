"""Compiled models of a pipeline: once for any number of images, never while serving, and left alone where wrong."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from backend.compute.images.compiled import Compiled, fuse
from backend.compute.images.diffusion import Diffusion
from backend.compute.images.pipeline import denoiser_of
from backend.config import EngineConfig
from backend.ranks.group import RankGroup
from backend.ranks.rank import Birth
from backend.tasks.text_to_image import TextToImage

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))

import tiny_diffusion

PROMPTS = ["a red circle", "the digit three", "a blue square"]


@pytest.fixture(autouse=True)
def _forget():
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_diffusion.save("sd", tmp_path_factory.mktemp("sd"))


def made(folder, say=print, **changes):
    config = EngineConfig(**{"model": str(folder), "device": "cpu", "threads": 1, **changes})
    return Diffusion(Birth("", config, 0, 1, "", 0), say)


def asked(count, **given):
    return dict(
        prompts=PROMPTS[:count], seeds=[1, 2, 3][:count], negative_prompts=None, images=None, masks=None,
        settings={"num_inference_steps": 2, "guidance_scale": 3.0, **given},
    )  # fmt: skip


def draw(worker, count, **given):
    answer = worker.forward(asked(count, **given))
    return np.stack([image for image, _ in (answer() if callable(answer) else answer)])


class Layer(torch.nn.Module):
    def forward(self, values, scale=2.0):
        return (values.sin() * scale,)


def test_one_compilation_serves_every_number_of_images_and_none_happens_while_serving(folder):
    plain, worker, counter = made(folder), made(folder), CompileCounter()
    worker._compiled = [Compiled(denoiser_of(worker._pipeline), "denoiser", print, counter)]
    worker.warm_up()
    assert counter.frame_count == 1
    for count in (1, 2, 3):
        assert np.array_equal(draw(worker, count), draw(plain, count))
    given = {"guidance_scale": 1.0, "height": 48, "width": 48}
    assert np.array_equal(draw(worker, 1, **given), draw(plain, 1, **given))
    assert counter.frame_count == 1


def test_one_row_and_many_are_learnt_apart_and_other_shapes_run_as_they_are():
    layer, counter, told = Layer(), CompileCounter(), []
    compiled = Compiled(layer, "layer", told.append, counter)
    for rows in (1, 2, 5):
        torch.testing.assert_close(layer(torch.ones(rows, 3))[0], torch.ones(rows, 3).sin() * 2)
    assert counter.frame_count == 2
    compiled.settle()
    layer(torch.ones(7, 3))
    layer(torch.ones(2, 4))
    layer(torch.ones(2, 3), scale=3.0)
    assert counter.frame_count == 2
    assert [line for line in told if "is compiled" in line]


def test_a_compiler_that_fails_is_told_and_the_model_runs_as_it_is():
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    layer, told = Layer(), []
    Compiled(layer, "layer", told.append, broken)
    for _ in range(2):
        torch.testing.assert_close(layer(torch.ones(2, 3))[0], torch.ones(2, 3).sin() * 2)
    assert len([line for line in told if "the layer is not compiled" in line and "no compiler here" in line]) == 1


def test_more_rows_than_a_compilation_holds_for_are_told_and_run_as_they_are():
    class Narrow(Layer):
        def forward(self, values):
            return values.sin() if values.shape[0] < 64 else values.cos()

    layer, counter, told = Narrow(), CompileCounter(), []
    compiled = Compiled(layer, "layer", told.append, counter)
    layer(torch.ones(2, 3))
    compiled.settle()
    for rows in (63, 64, 64, 65):
        values = torch.ones(rows, 3)
        torch.testing.assert_close(layer(values), values.sin() if rows < 64 else values.cos())
    assert counter.frame_count == 1
    assert [line.split()[0] for line in told if "does not hold for them" in line] == ["64", "65"]


def test_a_model_that_fixes_the_number_of_rows_is_compiled_for_each_that_it_meets():
    """As PixArt's does to torch 2.11."""

    class Fixed(Layer):
        def forward(self, values):
            return (values.sin() * {2: 3.0, 3: 4.0, 4: 5.0}[values.shape[0]],)

    layer, counter, told = Fixed(), CompileCounter(), []
    compiled = Compiled(layer, "layer", told.append, counter)
    for rows in (2, 4):
        torch.testing.assert_close(layer(torch.ones(rows, 3))[0], torch.ones(rows, 3).sin() * (rows + 1))
    assert len([line for line in told if "the layer is compiled" in line]) == 2, told
    compiled.settle()
    before = counter.frame_count
    for rows in (2, 4, 3):
        torch.testing.assert_close(layer(torch.ones(rows, 3))[0], torch.ones(rows, 3).sin() * (rows + 1))
    assert before >= 2 and counter.frame_count == before
    assert not [line for line in told if "not compiled" in line or "does not hold" in line]


@pytest.mark.parametrize("wrong", [1.5, float("nan")])
def test_a_compiled_model_that_computes_something_else_is_not_used(wrong):
    def distorting(graph, inputs):
        return lambda *values: tuple(value * wrong for value in graph(*values))

    layer, told = Layer(), []
    Compiled(layer, "layer", told.append, distorting)
    for _ in range(2):
        torch.testing.assert_close(layer(torch.ones(2, 3))[0], torch.ones(2, 3).sin() * 2)
    assert any("its result differs by" in line for line in told)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "pixart"])
def test_fused_projections_change_no_pixel_and_take_no_memory_twice(kind, tmp_path):
    worker = made(tiny_diffusion.save(kind, tmp_path))
    before, denoiser = draw(worker, 2), denoiser_of(worker._pipeline)
    fuse(denoiser)
    assert np.abs(draw(worker, 2).astype(int) - before).max() <= 1
    fused = [module for module in denoiser.modules() if hasattr(module, "to_qkv")]
    assert fused
    for module in fused:
        assert module.to_q.weight.data_ptr() == module.to_qkv.weight.data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "pixart"])
def test_compiled_on_cuda(kind, tmp_path):
    told = []
    folder = tiny_diffusion.save(kind, tmp_path)
    workers = [made(folder, told.append, device="cuda", dtype="float32", compile=on) for on in (True, False)]
    for worker in workers:
        assert 0 <= worker.warm_up().proof < 0.05
    assert [line for line in told if line.startswith("output proof: within ")]
    assert [line for line in told if "the denoiser is compiled" in line], told
    for count in (1, 3, 2):
        found, expected = (draw(worker, count).astype(int) for worker in workers)
        assert np.abs(found - expected).max() <= 4


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU or none")
@pytest.mark.parametrize("split", [False, True])
def test_two_gpus_draw_what_one_does(split, folder):
    given = {"device": "cuda", "dtype": "float32"}
    alone = made(folder, **given, compile=False)
    config = EngineConfig(model=str(folder), tensor_parallel=2, split_denoiser=split, **given)
    group = RankGroup(config, TextToImage.worker, print)
    group.start()
    try:
        group.call("warm_up", timeout=300)
        for count in (1, 2, 3):
            answers = group.call("forward", asked(count), timeout=120)
            images = [next(each for each in ranks if each is not None)[0] for ranks in zip(*answers, strict=True)]
            assert np.abs(np.stack(images).astype(int) - draw(alone, count)).max() <= 4
    finally:
        group.close()
