"""Targets: what reads the files of a model's folder and config.pbtxt. Whatever they hold, it is read or LoadError."""

import json
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

from draw import Draw
from targets import CHATML, TASKS, Target, tiny_encoders  # first: it makes the rest importable

from backend import encoders, families, fit
from backend.config import EngineConfig
from backend.errors import InvalidInput, LoadError
from backend.generation.params import Defaults
from backend.generation.tokenizer import Tokenizer
from backend.json_file import content, optional
from backend.model_folder import Checkpoint
from backend.quantized_folder import LAYOUTS
from backend.tasks import find, sentence_folder
from backend.tasks.labels import labels_of, scoring
from backend.tasks.pipeline_folder import PIPELINES, PipelineFolder

CONFIG = EngineConfig(model="m", device="cpu")
KEYS = """
    hidden_size n_embd dtype torch_dtype vocab_size max_position_embeddings n_positions architectures text_config
    rope_scaling rope_parameters rope_type factor model_type layer_types eos_token_id temperature top_p top_k
    is_encoder_decoder quantization_config num_attention_heads n_heads num_key_value_heads num_hidden_layers head_dim
    id2label num_labels problem_type pad_token_id original_max_position_embeddings alibi attn_config state_size
""".split()  # noqa: SIM905
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "hidden_size": 16, "max_position_embeddings": 64, "vocab_size": 30, "eos_token_id": 2,
    "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
}  # fmt: skip
BERT = {
    "model_type": "bert", "architectures": ["BertForSequenceClassification"], "num_attention_heads": 4,
    "hidden_size": 16, "max_position_embeddings": 64, "vocab_size": 30, "id2label": {"0": "a", "1": "b"},
}  # fmt: skip


def allowed(*reads: Callable[[], object]) -> None:
    """Each is read, or refused in a message that is no book."""
    for each in reads:
        try:
            each()
        except LoadError as error:
            if len(str(error)) > 20_000:
                raise AssertionError("a book of an error") from error


def put(path: Path, document: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")


def header(shapes: dict[str, list[int]]) -> bytes:
    """A safetensors file of zeros."""
    stated, at = {}, 0
    for name, shape in shapes.items():
        size = 4
        for side in shape:
            size *= side
        stated[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(stated).encode()
    return struct.pack("<Q", len(text)) + text + bytes(at)


def _weights(draw: Draw) -> bytes:
    layer = "layers.0.attn"
    shapes = {f"{layer}.q_proj.weight": [16, 16], f"{layer}.k_proj.weight": [8, 16], "embed_tokens.weight": [30, 16]}
    if draw.yes():
        shapes = {
            draw.one([*shapes, "x"]): [draw.below(40) for _ in range(draw.below(3))] for _ in range(draw.below(3))
        }
    return header(shapes)


def language_model(folder: Path) -> Target:
    """config.json and generation_config.json of one that generates, beside weights of any shapes."""

    def target(data: bytes) -> None:
        draw = Draw(data)
        put(folder / "config.json", draw.changed(LLAMA, KEYS))
        put(folder / "generation_config.json", draw.fields(KEYS))
        (folder / "model.safetensors").write_bytes(_weights(draw))
        packed = dict(quantization=draw.one(["", "int8", "int4", "fp8"]), kv_cache_dtype=draw.one(["auto", "fp8"]))
        config = replace(
            CONFIG, model=str(folder), tensor_parallel=1 + draw.below(3), max_model_len=draw.below(3) * 8, **packed
        )
        forecast = partial(fit.check, config, draw.one(["generate", "embed"]))
        allowed(partial(Defaults.from_folder, folder), lambda: forecast().report(), partial(_facts, folder))

    return target


def quantized(folder: Path) -> Target:
    """A checkpoint that says it is quantized already: what it says of that, and tensors of any shapes."""
    more = "desc_act static_groups sym version checkpoint_format dynamic strategy block_structure kv_cache_scheme"
    names = [*QUANTIZED, *more.split(), "sparsity_config", "weight_block_size", "input_activations"]

    def target(data: bytes) -> None:
        draw = Draw(data)
        form = draw.changed(QUANTIZED | {"quant_method": draw.one(["gptq", "awq", "compressed-tensors", "fp8"])}, names)
        put(folder / "config.json", LLAMA | {draw.one(["quantization_config", "compression_config"]): form})
        endings = [ending for layout in LAYOUTS.values() for ending in layout.roles]
        shapes = {
            f"a.0.q_proj.{end}": [draw.below(20) * 8 for _ in range(draw.below(3))] for end in dict.fromkeys(endings)
        }
        shapes = {name: shape for name, shape in shapes.items() if draw.below(4)}
        content = header(shapes | {"a.0.q_proj.qweight": [2, 16], "a.0.q_proj.qzeros": [1, 2]})
        (folder / "model.safetensors").write_bytes(content.replace(b'"F32"', draw.one([b'"I32"', b'"F32"'])))
        config = replace(CONFIG, model=str(folder), tensor_parallel=1 + draw.below(2))
        allowed(lambda: fit.check(config).report(), partial(_facts, folder))

    return target


QUANTIZED = {
    "bits": 4,
    "group_size": -1,
    "config_groups": {"a": {"format": "pack-quantized", "weights": {"num_bits": 4, "type": "int", "group_size": 16}}},
}


def _facts(folder: Path) -> object:
    found = Checkpoint.open(folder)
    families.refusal(found.config)
    return found.dtype, found.vocab_size, found.max_model_len, found.files


def encoder(folder: Path) -> Target:
    """config.json and tokenizer_config.json of an encoder with a head."""
    tiny_encoders.save_tokenizer(folder, "bert")
    stated = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "model.safetensors").write_bytes(header({"x": [2]}))

    def target(data: bytes) -> None:
        draw = Draw(data)
        put(folder / "config.json", draw.changed(BERT, KEYS))
        put(folder / "tokenizer_config.json", draw.changed(stated, ["model_max_length"]))
        name = draw.one([name for name in TASKS if name != "text_to_image"])
        config = replace(CONFIG, tensor_parallel=1 + draw.below(3), max_model_len=draw.below(3) * 8)
        allowed(lambda: find(name)(folder, config), partial(_head, folder, config))

    return target


def _head(folder: Path, config: EngineConfig) -> None:
    found = Checkpoint.open(folder)
    allowed(
        lambda: encoders.check_task(found, config.tensor_parallel),
        lambda: encoders.longest(found, 0),
        lambda: scoring(found.config, len(labels_of(found))),
    )


MODULES = [
    {"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "1"},
    {"type": "x.Dense", "path": "2"}, {"type": "x.Normalize", "path": "3"},
]  # fmt: skip
POOLING = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True, "include_prompt": True}
GENERAL = {"prompts": {"query": "q: "}, "default_prompt_name": "query", "truncate_dim": 8}
TRANSFORMER = {"do_lower_case": False, "max_seq_length": 32, "modality_config": {"text": {"method": "forward"}}}
DENSE = {"in_features": 16, "out_features": 4, "activation_function": "torch.nn.modules.linear.Identity"}


def sentence(folder: Path) -> Target:
    """The files of sentence-transformers."""
    put(folder / "config.json", BERT)
    (folder / "model.safetensors").write_bytes(header({"x": [2]}))

    def target(data: bytes) -> None:
        draw = Draw(data)
        put(folder / "modules.json", draw.changed(MODULES, ["type", "path"]))
        put(folder / "1" / "config.json", draw.changed(POOLING, ["pooling_mode", "pooling_mode_x"]))
        put(folder / "config_sentence_transformers.json", draw.changed(GENERAL, []))
        put(folder / "sentence_bert_config.json", draw.changed(TRANSFORMER, ["transformer_task", "query_expansion"]))
        put(folder / "2" / "config.json", draw.changed(DENSE, ["use_residual", "module_input_name"]))
        sides = [draw.below(5) for _ in range(draw.below(4))] if draw.yes() else [4, 16]
        (folder / "2" / "model.safetensors").write_bytes(header({"linear.weight": sides, "linear.bias": sides[:1]}))
        allowed(lambda: _vector(sentence_folder.pooling_of(folder, Checkpoint.open(folder))))

    return target


def _vector(pooling: sentence_folder.Pooling) -> None:
    """What is read can be used, but for widths that do not fit each other."""
    assert pooling.dimensions >= 0 and isinstance(pooling.default_prompt, str)


INDEX = {
    "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1", "unet": ["diffusers", "UNet"],
    "vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "X"], "safety_checker": [None, None],
}  # fmt: skip


def pipeline(folder: Path) -> Target:
    """The files of diffusers."""
    for name in (*PIPELINES.values(), "vae", "scheduler"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "unet" / "model.safetensors").write_bytes(header({"x": [2]}))
    here = replace(CONFIG, model=str(folder))

    def target(data: bytes) -> None:
        draw = Draw(data)
        index = INDEX | {"_class_name": draw.one([*PIPELINES])}
        put(folder / "model_index.json", draw.changed(index, [*PIPELINES]) if draw.yes() else index)
        put(
            folder / "unet" / "config.json",
            sample := draw.changed({"sample_size": 8, "patch_size": 2}, ["sample_size"]),
        )
        put(folder / "transformer" / "config.json", sample)
        put(folder / "vae" / "config.json", draw.changed({"block_out_channels": [32, 64]}, []))
        put(folder / "scheduler" / "scheduler_config.json", draw.changed({"num_train_timesteps": 1000}, []))
        allowed(
            lambda: _size(PipelineFolder.open(folder)),
            lambda: find("text_to_image")(folder, CONFIG),
            partial(fit.check, here, "text_to_image"),
        )

    return target


def _size(found: PipelineFolder) -> None:
    assert found.multiple > 0 and found.side > 0 and found.steps > 0, found


def tokenizer(folder: Path) -> Target:
    """tokenizer.json, tokenizer_config.json and special_tokens_map.json; a text encoded where they can be read."""
    tiny_encoders.save_tokenizer(folder, "bert", 60, chat_template=CHATML)
    files = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    named = ["added_tokens_decoder", "extra_special_tokens", "chat_template", "unk_token", "truncation_side"]

    def target(data: bytes) -> None:
        draw = Draw(data)
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            put(folder / name, draw.changed(files.get(name, {}), named))
        if draw.yes():
            put(folder / "tokenizer.json", draw.changed(files["tokenizer.json"], named))
        else:
            put(folder / "tokenizer.json", files["tokenizer.json"])
        allowed(lambda: _said(Tokenizer.from_folder(folder)))

    return target


def _said(found: Tokenizer) -> None:
    with suppress(InvalidInput):  # of a template that is none
        found.chat([{"role": "user", "content": "a"}])
    found.decode(found.encode("the quick brown"))


def chat_template(folder: Path) -> Target:
    """Any text as a template."""
    tiny_encoders.save_tokenizer(folder, "bert", 60)

    def target(data: bytes) -> None:
        (folder / "chat_template.jinja").write_bytes(data)
        allowed(lambda: _said(Tokenizer.from_folder(folder)))

    return target


def json_files(folder: Path) -> Target:
    """Any bytes as a file of JSON, and as the weights' index."""
    put(folder / "config.json", LLAMA)

    def target(data: bytes) -> None:
        for name in ("any.json", "model.safetensors.index.json"):
            (folder / name).write_bytes(data)
        path = folder / "any.json"
        allowed(partial(content, path), partial(optional, path), partial(Checkpoint.open, folder))

    return target


def safetensors(folder: Path) -> Target:
    """Any bytes as a weight file's head."""
    put(folder / "config.json", LLAMA)

    def target(data: bytes) -> None:
        draw = Draw(data)
        text = draw.rest() if draw.yes() else json.dumps(draw.json()).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
        allowed(partial(_facts, folder), partial(fit.check, replace(CONFIG, model=str(folder))))

    return target


def pbtxt(_: Path) -> Target:
    """Parameters of config.pbtxt, as Triton hands them on."""
    names = [field.name for field in fields(EngineConfig)]

    def target(data: bytes) -> None:
        draw = Draw(data)
        given = {
            "model": "m",
            **draw.fields([*names, "bogus"], lambda: str(draw.one([draw.text, draw.real, draw.json])())),
        }
        stated = {name: {"string_value": text} for name, text in given.items()}
        allowed(lambda: _served(EngineConfig.from_triton({"model_config": json.dumps({"parameters": stated})})))

    return target


def _served(config: EngineConfig) -> None:
    assert config.step_timeout > 0 and config.max_prompts > 0


FOLDERS: dict[str, Callable[[Path], Target]] = {
    "language_model": language_model,
    "quantized": quantized,
    "encoder": encoder,
    "sentence": sentence,
    "pipeline": pipeline,
    "tokenizer": tokenizer,
    "chat_template": chat_template,
    "json_files": json_files,
    "safetensors": safetensors,
    "pbtxt": pbtxt,
}
FOLDER_SEEDS: dict[str, Callable[[], list[bytes]]] = {
    "chat_template": lambda: [CHATML.encode(), b"{% generation %}{{ messages[0].content }}{% endgeneration %}"],
    "json_files": lambda: [b'{"weight_map": {"a": "model.safetensors"}}', b"[" * 3000],
}
