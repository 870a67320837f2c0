"""Output proof of image models: what is put in a model's place answers as it did, or is refused by name."""

import sys
from math import isnan
from pathlib import Path

import pytest
import torch

from backend.compute.images.compiled import distance, fuse
from backend.compute.images.diffusion import Diffusion
from backend.compute.images.graphs import ForwardGraphs
from backend.compute.images.pipeline import denoiser_of
from backend.compute.images.witness import Witness
from backend.config import EngineConfig
from backend.errors import LoadError
from backend.ranks.rank import Birth
from backend.tasks.text import Ready

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))

import tiny_diffusion

KINDS = ("sd", "sd3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.set_num_threads(1)
    return {kind: tiny_diffusion.save(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def made(folder, said=None):
    """A worker whose models have been seen as they are."""
    config = EngineConfig(model=str(folder), device="cpu", threads=1)
    worker = Diffusion(Birth("", config, 0, 1, "", 0), (said if said is not None else []).append)
    worker._witnesses = worker._seen_plain()
    return worker


class Replaying(ForwardGraphs):
    """Repeats the model's own computation in place of a graph, a little wrong where asked to."""

    def __init__(self, model, wrong=1.0):
        self.replays, self.wrong = 0, wrong
        super().__init__(model, torch.device("cpu"), None, print)

    def _capture(self, leaves, shape):
        outer = self

        class Replay:
            def replay(self, leaves):
                outer.replays += 1
                return (outer._plain(leaves, shape)[0] * outer.wrong,)

        return Replay()


class Spoiling:
    """In place of a compiled model: right as long as it learns."""

    def __init__(self, model):
        self._forward, self._wrong, model.forward = model.forward, 1.0, self

    def __call__(self, *values, **named):
        found = self._forward(*values, **named)
        return found * self._wrong if isinstance(found, torch.Tensor) else (found[0] * self._wrong,)

    def settle(self):
        self._wrong = 1.5


def test_nothing_is_compared_where_plain_torch_serves(folders):
    config = EngineConfig(model=str(folders["sd"]), device="cpu", threads=1)
    assert Diffusion(Birth("", config, 0, 1, "", 0), print).warm_up() == Ready()


@pytest.mark.parametrize("kind", KINDS)
def test_what_answers_alike_passes_with_its_difference(folders, kind):
    said = []
    worker = made(folders[kind], said)
    fuse(denoiser_of(worker._pipeline))
    graphs = Replaying(denoiser_of(worker._pipeline), 1.001)
    ready = worker.warm_up()
    assert 0.0009 < ready.proof < 0.0011 and graphs.replays
    assert said[-1] == "output proof: within 0.001 of the largest value of the plain models'"
    assert not worker._witnesses


def test_a_graph_that_is_wrong_is_refused(folders):
    worker = made(folders["sd"])
    Replaying(denoiser_of(worker._pipeline), 1.2)
    with pytest.raises(LoadError, match=r"with cuda_graphs the denoiser .* 0\.2 of .* set cuda_graphs to false"):
        worker.warm_up()


@pytest.mark.parametrize(("part", "graphs"), [("denoiser", True), ("denoiser", False), ("decoder", False)])
def test_a_compiled_model_that_becomes_wrong_after_its_trial_is_refused(folders, part, graphs):
    worker = made(folders["sd"])
    model = denoiser_of(worker._pipeline) if part == "denoiser" else worker._pipeline.vae.decoder
    worker._compiled = [Spoiling(model)]
    if graphs:
        Replaying(model)
    with pytest.raises(LoadError, match=f"with compile the {part} differs .* set compile to false"):
        worker.warm_up()


def test_no_number_is_refused():
    layer = torch.nn.Linear(2, 2)
    witness = Witness(layer, "layer")
    with torch.no_grad(), witness.watching():
        layer(torch.ones(1, 2))
    with torch.no_grad(), pytest.raises(LoadError, match="nan of its largest value"):
        witness.confirm({"compile": lambda values: layer(values) * float("nan")})
    assert isnan(distance((torch.ones(1), torch.full((1,), float("nan"))), (torch.ones(1), torch.ones(1))))


def test_a_model_that_was_called_in_another_dtype_is_asked_in_that_one():
    layer = torch.nn.Linear(2, 2).half()
    witness = Witness(layer, "layer")
    layer.float()
    with torch.no_grad(), witness.watching():
        layer(torch.ones(1, 2))
    layer.half()
    with torch.no_grad():
        assert witness.confirm({"compile": layer}) == 0
    assert layer.weight.dtype == torch.float16


def test_an_answer_that_cannot_be_looked_into_proves_nothing():
    class Opaque(torch.nn.Module):
        def forward(self, values):
            return {values}

    witness = Witness(layer := Opaque(), "layer")
    with witness.watching():
        layer(torch.ones(1))
    assert witness.confirm({"compile": layer}) == 0


def test_what_was_never_called_proves_nothing():
    assert Witness(torch.nn.Linear(2, 2), "layer").confirm({"compile": print}) == 0
