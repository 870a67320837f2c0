"""Model folders good and bad, by files alone."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest

from backend.errors import LoadError
from backend.model_folder import Checkpoint, resolve

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 72,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "vocab_size": 50,
    "dtype": "bfloat16",
}
SHAPES = {
    "model.embed_tokens.weight": (50, 72),
    "model.layers.0.self_attn.q_proj.weight": (72, 72),
    "model.layers.0.self_attn.k_proj.weight": (24, 72),
    "model.layers.0.mlp.up_proj.weight": (100, 72),
    "model.norm.weight": (72,),
}


def header(shapes: dict[str, tuple[int, ...]]) -> bytes:
    """A safetensors file of BF16 zeros, by its own definition: length, JSON, data."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


def write(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    (folder / "model.safetensors").write_bytes(header(SHAPES))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path / "model")


def test_torch_is_never_imported() -> None:
    code = "import sys, backend.checkpoint; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_a_folder_says(model: Path) -> None:
    opened = Checkpoint.open(model)
    assert opened.model_type == "llama"
    assert opened.architectures == ["LlamaForCausalLM"]
    assert opened.vocab_size == 50
    assert opened.dtype == "bfloat16"
    assert opened.max_model_len == 128
    assert opened.files == [model / "model.safetensors"]
    norm = opened.tensors["model.norm.weight"]
    assert (norm.shape, norm.bytes) == ((72,), 144)


def test_the_dtype_is_that_of_the_weights_where_the_config_is_silent(tmp_path: Path) -> None:
    assert Checkpoint.open(write(tmp_path, dtype=None)).dtype == "bfloat16"
    assert Checkpoint.open(write(tmp_path, dtype=None, torch_dtype="float16")).dtype == "float16"


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}}, 128),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}}, 512),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}, 128),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 128),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, 128),
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 64}}, 64),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0}, "sliding_attention": {}}}, 256),
        ({"max_position_embeddings": None, "n_positions": 77}, 77),
        ({"max_position_embeddings": None}, 0),
        ({"text_config": {"max_position_embeddings": 99}}, 99),
    ],
)
def test_the_longest_text(tmp_path: Path, changes: dict[str, Any], length: int) -> None:
    assert Checkpoint.open(write(tmp_path, **changes)).max_model_len == length


def _index(folder: Path, names: dict[str, str]) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def test_several_files(model: Path) -> None:
    parts = dict(list(SHAPES.items())[:2]), dict(list(SHAPES.items())[2:])
    _index(model, {name: f"part-{number}.safetensors" for number, part in enumerate(parts) for name in part})
    for number, part in enumerate(parts):
        (model / f"part-{number}.safetensors").write_bytes(header(part))
    assert set(Checkpoint.open(model).tensors) == set(SHAPES)
    (model / "part-1.safetensors").write_bytes(header(parts[0]))
    with pytest.raises(LoadError, match=r"up_proj.*does not hold it"):
        Checkpoint.open(model)
    (model / "part-1.safetensors").unlink()
    with pytest.raises(LoadError, match=r"part-1\.safetensors is missing"):
        Checkpoint.open(model)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "weights.bin", 7])
def test_an_index_may_only_name_files_beside_it(model: Path, name: Any) -> None:
    _index(model, {"model.norm.weight": name})
    with pytest.raises(LoadError, match="not a safetensors file beside it"):
        Checkpoint.open(model)


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:-1],
        lambda whole: whole[:20],
        lambda whole: b"",
        lambda whole: struct.pack("<Q", 1 << 62) + whole[8:],
        lambda whole: whole[:8] + b"\xff" + whole[9:],
        lambda whole: whole + b"extra",
    ],
)
def test_a_damaged_file_is_named(model: Path, damage: Any) -> None:
    file = model / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(LoadError, match=r"model\.safetensors is corrupt or truncated"):
        Checkpoint.open(model)


@pytest.mark.parametrize(
    ("text", "reason"), [("{", "cannot be read"), ("[]", "JSON object"), ("[" * 100_000, "cannot be read")]
)
def test_a_bad_config_is_named(model: Path, text: str, reason: str) -> None:
    (model / "config.json").write_text(text)
    with pytest.raises(LoadError, match=reason):
        Checkpoint.open(model)


def test_pickle_is_refused_and_nothing_at_all_too(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(LoadError, match=r"pickle can run code and is refused.*save_pretrained"):
        Checkpoint.open(model)
    (model / "pytorch_model.bin").unlink()
    with pytest.raises(LoadError, match="holds no weights"):
        Checkpoint.open(model)
    (model / "config.json").unlink()
    with pytest.raises(LoadError, match="not a Hugging Face model folder"):
        Checkpoint.open(model)


def test_a_root_is_not_left(tmp_path: Path) -> None:
    root = tmp_path / "root"
    inside, outside = write(root / "a" / "model"), write(tmp_path / "outside")
    (root / "link").symlink_to(outside)
    assert resolve("a/model", root) == inside.resolve()
    assert resolve(str(inside), root) == inside.resolve()
    for name in ("../outside", str(outside), "link", "a/../../outside"):
        with pytest.raises(LoadError, match="leads out of the model root"):
            resolve(name, root)
    with pytest.raises(LoadError, match="no such model folder"):
        resolve("b", root)
    (inside / "tokenizer.json").symlink_to(outside / "config.json")
    with pytest.raises(LoadError, match=r"leads out.*tokenizer\.json"):
        resolve("a/model", root)


@pytest.mark.parametrize("place", ["unet/weights", "unet", "linked/weights"])
def test_a_link_deep_in_a_model_does_not_leave_the_root(tmp_path: Path, place: str) -> None:
    root = tmp_path / "root"
    model, outside = write(root / "model"), write(tmp_path / "outside")
    (root / "beside").mkdir()
    (model / "linked").symlink_to(root / "beside")
    (model / "loop").symlink_to(model)
    assert resolve("model", root) == model.resolve()
    (model / place).parent.mkdir(exist_ok=True)
    (model / place).symlink_to(outside)
    with pytest.raises(LoadError, match="leads out of the model root"):
        resolve("model", root)
