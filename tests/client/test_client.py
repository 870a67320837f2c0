"""The package as a whole: what it exports and what it does not import."""

import subprocess
import sys

import pytest

import client


def test_all_is_complete_and_importable():
    assert sorted(client.__all__) == client.__all__
    modules = {name for name, value in vars(client).items() if type(value).__name__ == "module"}
    public = {name for name in vars(client) if not name.startswith("_")} - modules
    assert public == set(client.__all__)
    assert all(callable(getattr(client, name)) for name in client.__all__)


def test_every_error_is_exported():
    assert {name for name in vars(client.errors) if isinstance(vars(client.errors)[name], type)} <= set(client.__all__)


@pytest.mark.parametrize("module", ["client", "client.cli"])
def test_nothing_heavy_and_no_backend_is_imported(module):
    code = f"import {module}, sys; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "client" in loaded and "numpy" in loaded
    assert not {"torch", "transformers", "deepspeed", "tokenizers", "safetensors", "backend", "PIL"} & set(loaded)


@pytest.mark.parametrize("make", [client.pipeline, client.async_pipeline])
@pytest.mark.parametrize("task", ["translate", "nonsense"])
def test_a_task_that_is_not_there(make, task):
    with pytest.raises(client.InvalidInput, match=rf"'{task}'; available: generate"):
        make(task)


@pytest.mark.parametrize(("options", "named"), [({"port": 0}, "port"), ({"concurrency": 0}, "concurrency")])
def test_wrong_options(options, named):
    with pytest.raises(client.InvalidInput, match=named):
        client.pipeline("generate", **options)


def test_a_transport_of_ones_own():
    class Canned:
        def infer(self, request, limits):
            raise client.Overloaded(f"full: {request.model_name}")

        def close(self):
            pass

    with client.pipeline("generate", name="m", transport=Canned()) as pipe, pytest.raises(client.Overloaded, match="m"):
        pipe("x")
