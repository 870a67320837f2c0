"""What CUDA graphs of a pipeline need beside them: timesteps on the host, inputs renewed; on a GPU also the graphs."""

import inspect

import diffusers
import pytest
import torch

from backend.compute.images.graphs import HOST_STEPS, ForwardGraphs, _renew, keep_steps_on_host


@pytest.mark.parametrize("name", HOST_STEPS)
def test_timesteps_stay_on_the_host_and_are_the_same(name):
    usual, scheduler = getattr(diffusers, name)(), getattr(diffusers, name)()
    before = inspect.signature(scheduler.set_timesteps)
    keep_steps_on_host(scheduler)
    usual.set_timesteps(7)
    scheduler.set_timesteps(7, device="meta")
    assert scheduler.timesteps.device.type == "cpu"
    assert torch.equal(scheduler.timesteps, usual.timesteps)
    assert inspect.signature(scheduler.set_timesteps) == before, "pipelines look which arguments it takes"


def test_other_schedulers_are_left_alone():
    scheduler = diffusers.LCMScheduler()
    keep_steps_on_host(scheduler)
    scheduler.set_timesteps(4, device="meta")
    assert scheduler.timesteps.device.type == "meta"


@pytest.mark.parametrize("given", [torch.tensor(801), torch.tensor(3.5).expand(4), torch.arange(4.0), torch.ones(0)])
def test_an_input_is_renewed_whatever_its_form(given):
    own = torch.zeros(given.shape, dtype=given.dtype)
    _renew(own, given)
    assert torch.equal(own, given)


class Layer(torch.nn.Module):
    def forward(self, values, step, scale=2.0):
        return values.sin() * scale + step, None


@pytest.mark.gpu
def test_a_graph_answers_as_the_model_does_and_in_memory_of_its_own():
    layer, told = Layer(), []
    ForwardGraphs(layer, torch.device("cuda"), torch.cuda.graph_pool_handle(), told.append)
    found = []
    for step in range(4):
        values = torch.full((3, 2), float(step), device="cuda")
        found.append((layer(values, torch.tensor(step)), values.sin() * 2 + step))
    for (answer, nothing), expected in found:
        assert nothing is None
        torch.testing.assert_close(answer, expected)
    assert not told


@pytest.mark.gpu
def test_what_cannot_be_captured_runs_as_it_is():
    class Waiting(torch.nn.Module):
        def forward(self, values):
            return values * float(values.sum().item())

    layer, told = Waiting(), []
    ForwardGraphs(layer, torch.device("cuda"), torch.cuda.graph_pool_handle(), told.append)
    for _ in range(4):
        torch.testing.assert_close(layer(torch.ones(3, device="cuda")), torch.full((3,), 3.0, device="cuda"))
    assert len(told) == 1
    torch.rand(3, device="cuda")  # see tests/gpu/test_capture.py
