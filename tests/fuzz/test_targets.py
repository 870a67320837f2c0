"""Every target of scripts/fuzz on its seeds and some random bytes, and what guided fuzzing has found so far."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from targets import SEEDS, TARGETS, TASKS
from targets_folders import BERT, FOLDER_SEEDS, FOLDERS, INDEX, LLAMA, header, put

from backend import checkpoint, fit
from backend.config import EngineConfig
from backend.errors import LoadError
from backend.model_folder import Checkpoint
from backend.tasks import find
from backend.tasks.labels import labels_of
from backend.tasks.pipeline_folder import PIPELINES, PipelineFolder
from client import classify
from client.errors import ServerError
from client.generate import rows

CONFIG = EngineConfig(model="m", device="cpu")


@pytest.mark.filterwarnings("ignore:::PIL")
@pytest.mark.parametrize("name", [name for name in (*TARGETS, *FOLDERS) if name not in TASKS])
def test_some_bytes(name, tmp_path):
    """The tasks' rows are in test_task_rows."""
    target = (TARGETS | FOLDERS)[name](tmp_path)
    chance = random.Random(name)
    for data in [b"", *(SEEDS | FOLDER_SEEDS).get(name, list)()]:
        target(data)
    for _ in range(40):
        target(chance.randbytes(chance.randrange(300)))


@pytest.mark.parametrize(
    "changes",
    [{"architectures": [True]}, {"architectures": [None, "x"]}, {"head_dim": [1]}, {"num_key_value_heads": [1]},
     {"head_dim": -1}, {"hidden_size": 1}],
)  # fmt: skip
def test_configurations_of_wrong_kinds(changes, tmp_path):
    put(tmp_path / "config.json", LLAMA | changes)
    (tmp_path / "model.safetensors").write_bytes(header({"x": [2]}))
    with pytest.raises(LoadError):
        fit.check(EngineConfig(model=str(tmp_path), device="cpu"))


def test_a_projection_without_dimensions(tmp_path):
    put(tmp_path / "config.json", LLAMA)
    (tmp_path / "model.safetensors").write_bytes(header({"a.q_proj.weight": [], "b.k_proj.weight": []}))
    assert checkpoint.share_heads(Checkpoint.open(tmp_path), 2) == (1, 1)


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_a_quantised_matrix_without_columns(quantization, tmp_path):
    put(tmp_path / "config.json", LLAMA | {"max_position_embeddings": 64})
    shapes = {f"layers.0.attn.{part}_proj.weight": [8, 0] for part in "qk"}
    (tmp_path / "model.safetensors").write_bytes(header(shapes))
    with pytest.raises(LoadError):
        fit.check(EngineConfig(model=str(tmp_path), device="cpu", quantization=quantization))


@pytest.mark.parametrize("heads", [[4], "many", float("inf")])
def test_heads_of_an_encoder_that_are_no_number(heads, tmp_path):
    put(tmp_path / "config.json", BERT | {"num_attention_heads": heads})
    (tmp_path / "model.safetensors").write_bytes(header({"x": [2]}))
    with pytest.raises(LoadError):
        find("embed")(tmp_path, CONFIG)


@pytest.mark.parametrize("count", [-1, 10**9, 10**30, "x", [3], float("inf")])
def test_labels_that_cannot_be_counted(count, tmp_path):
    put(tmp_path / "config.json", {"num_labels": count})
    (tmp_path / "model.safetensors").write_bytes(header({"x": [2]}))
    with pytest.raises(LoadError):
        labels_of(Checkpoint.open(tmp_path))


@pytest.mark.parametrize(
    ("file", "wrong"),
    [("model_index.json", {"x": []}), ("model_index.json", {"a" * 5000: ["diffusers", "X"]}),
     ("unet/config.json", {"patch_size": {"a": 1}}), ("unet/config.json", {"sample_size": {"a": 1}}),
     ("unet/config.json", {"sample_size": -3}), ("vae/config.json", {"block_out_channels": 7}),
     ("vae/config.json", {"block_out_channels": [1] * 5000}),
     ("scheduler/scheduler_config.json", {"num_train_timesteps": None}),
     ("scheduler/scheduler_config.json", {"num_train_timesteps": "0"})],
)  # fmt: skip
def test_pipelines_of_wrong_kinds(file, wrong, tmp_path):
    for name in (*PIPELINES.values(), "vae", "scheduler"):
        put(tmp_path / name / "config.json", {})
    put(tmp_path / "scheduler" / "scheduler_config.json", {})
    put(tmp_path / "model_index.json", INDEX)
    assert PipelineFolder.open(tmp_path).steps == 1000
    put(tmp_path / file, json.loads((tmp_path / file).read_text()) | wrong)
    with pytest.raises(LoadError):
        PipelineFolder.open(tmp_path)


@pytest.mark.parametrize("logprobs", [7, "[", "\0"])
def test_logprobs_that_are_no_json(logprobs):
    with pytest.raises(ServerError):
        rows({"text_output": np.array([["a"]], object), "logprobs": np.array([[logprobs]], object)})


def test_an_answer_without_rows():
    with pytest.raises(ServerError):
        classify.questions("a").read([[{"label": np.array("a"), "score": np.array(0.5)}]])
