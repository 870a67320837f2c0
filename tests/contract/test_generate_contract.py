"""generate's tensors and errors are the same in config.pbtxt, backend, client and docs/contracts.md."""

import ast
import re
import sys
import types
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import triton_to_np_dtype

from backend import errors
from backend.config import EngineConfig
from backend.generation.parameter import INT32, NAMED, PARAMETERS, UINT64
from backend.generation.params import MAX_JSON_BYTES, MAX_SALT_BYTES, MAX_STOP_CHARACTERS, MAX_STOP_IDS, Limits, Options
from backend.generation.request import SOURCES, Request
from backend.generation.stream import Delta
from client import errors as client_errors
from client.generate import Delta as ClientDelta
from client.generate import Generated, one, rows
from client.sampling import ALIASES, JSON_TENSOR, KEYS, Sampling, encode_options
from client.tensors import decode, encode

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "contracts.md").read_text()
PROMPTS = {"text_input": ("BYTES", 1), "input_ids": ("INT32", -1), "messages": ("BYTES", 1)}
WIRE = {"string": "BYTES", "strings": "BYTES", "int32s": "INT32", "int32": "INT32", "uint64": "UINT64", "fp32": "FP32",
        "bool": "BOOL"}  # fmt: skip
"""The client's kinds."""


@pytest.fixture(scope="module")
def config():
    text = (ROOT / "model_repository" / "generate" / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def tensors(described):
    """Type and dim by name, of config.pbtxt's inputs or outputs."""
    names = {tensor.name: (_type(tensor), *tensor.dims) for tensor in described}
    assert len(names) == len(described)
    return names


def _type(tensor):
    return model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_").replace("STRING", "BYTES")


def table(first, heading="## generate"):
    """The rows, as lists of cells, of the document's table whose first column is `first`."""
    lines = DOCUMENT[DOCUMENT.index(heading) :].splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith(f"| {first} |"))
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


# ---- inputs


def test_config_is_what_the_contract_says_in_general(config):
    assert config.model_transaction_policy.decoupled and config.max_batch_size > 0
    assert all(tensor.optional for tensor in config.input)
    assert set(SOURCES) == set(PROMPTS)


def test_inputs_of_config_and_parameters(config):
    stated = {name: (p.type, -1 if p.many else 1) for p in PARAMETERS for name in p.inputs}
    assert tensors(config.input) == PROMPTS | {"sampling_parameters": ("BYTES", 1)} | stated
    assert all(name in NAMED and NAMED[name].name == p.name for p in PARAMETERS for name in p.inputs)


def test_inputs_of_config_and_document(config):
    stated = {name: (kind, int(dims)) for name, kind, dims, _ in table("input")}
    assert tensors(config.input) == stated
    assert [*tensors(config.input)] == [*stated]  # in the same order too


def test_lists_of_the_adapter():
    """backend.triton cannot be imported outside Triton; its table can be read. It holds all tasks' lists."""
    inputs = {}
    for file in sorted((ROOT / "model_repository").glob("*/config.pbtxt")):
        inputs |= tensors(text_format.Parse(file.read_text(), model_config_pb2.ModelConfig()).input)
    tree = ast.parse((ROOT / "backend" / "triton.py").read_text())
    (value,) = [node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "LISTS"]
    assert set(ast.literal_eval(value.args[0])) == {name for name, (_, dim) in inputs.items() if dim < 0}


def test_every_key_of_the_document_is_read():
    """Those of the paragraph on request parameters: keys without a tensor, MII's names, and what comes later."""
    text = DOCUMENT[DOCUMENT.index("Request parameters (") : DOCUMENT.index("| output |")]
    named = {name for name in re.findall(r"`([a-z_]+)`", text) if name != "sampling_parameters"}
    without_tensor = {name for name in NAMED if not any(name in p.inputs for p in PARAMETERS)}
    assert named & set(NAMED) >= without_tensor - {"stop"} and "key `stop`" in DOCUMENT
    assert named - set(NAMED) <= {"parameters", "structured_outputs"}


# ---- ranges

POWERS = {INT32: "2^31 - 1", UINT64: "2^64 - 1", -INT32 - 1: "-2^31"}


def spoken(parameter):
    low, high = (POWERS.get(value, f"{value:g}") for value in (parameter.low, parameter.high))
    return f"{'above ' if parameter.open else ''}{low} to {high}"


def test_ranges_of_parameters_and_document():
    stated = {name: text for names, text in table("key", "### Ranges") for name in names.split(", ")}
    limits = Limits.of(EngineConfig("m"))
    bounded = {
        "n": f"1 to `max_prompts` ({limits.max_samples})",
        "stop_words": f"`max_stop_strings` ({limits.max_stop_strings}), each of 1 to {MAX_STOP_CHARACTERS:,} char",
        "stop_token_ids": f"{MAX_STOP_IDS}, each from {NAMED['stop_token_ids'].low} ",
        "cache_salt": f"{MAX_SALT_BYTES} bytes",
        "sampling_parameters": f"{MAX_JSON_BYTES >> 20} MiB",
    } | dict.fromkeys(PROMPTS, "`max_prompt_bytes` (")
    plain = [p for p in PARAMETERS if p.type not in ("BOOL", "BYTES") and p.name not in bounded]
    assert {name: text for name, text in stated.items() if name not in bounded} == {p.name: spoken(p) for p in plain}
    for name, beginning in bounded.items():
        assert stated[name].startswith(beginning), name


def test_defaults_of_limits_and_document():
    """Wherever a limit that can be configured is named with its default."""
    stated = re.findall(r"`(max_\w+)` \(([\d,]+|\d+ MiB)\)", DOCUMENT)
    assert {"max_prompts", "max_texts", "max_prompt_bytes", "max_pixels", "max_images", "max_steps"} <= {*dict(stated)}
    for name, default in stated:
        found = getattr(EngineConfig("m"), name)
        assert default == (f"{found >> 20} MiB" if name.endswith("bytes") else f"{found:,}"), name
    (meaning,) = [row[-1] for row in table("input") if row[0] == "max_tokens"]
    assert f"default {EngineConfig('m').default_max_tokens}," in meaning


# ---- the client's side


def test_keys_of_the_client(config):
    inputs = tensors(config.input)
    for key in KEYS.values():
        assert key.name in NAMED, key
        parameter = NAMED[key.name]
        assert (WIRE[key.kind], key.kind in ("strings", "int32s")) == (parameter.type, parameter.many)
        assert not key.tensor or inputs[key.tensor] == (WIRE[key.kind], -1 if parameter.many else 1)
        assert bool(key.tensor) == bool(parameter.inputs)
    assert JSON_TENSOR in inputs and set(Sampling.__annotations__) | {"n"} == set(KEYS)
    assert {NAMED[name].name for name in ALIASES} == {NAMED[name].name for name in ALIASES.values()}


def test_all_that_the_server_takes_the_client_has():
    offered = {NAMED[name].name for name in KEYS} | {"stream", "timeout", "return_full_text"}  # arguments of their own
    assert offered == {parameter.name for parameter in PARAMETERS}


def test_what_the_client_sends(config):
    """Types and shapes as encoded, for every key at once and every kind of prompt."""
    numbers = {"int32": 1, "uint64": 1, "fp32": 0.5, "bool": True, "int32s": [1, 2]}
    values = numbers | {"string": "s", "strings": ["a", "b"]}
    options = encode_options({name: values[key.kind] for name, key in KEYS.items()})
    for prompt in ("text", [1, 2, 3], [{"role": "user", "content": "x"}]):
        for tensor in encode("m", one(prompt, {}, stream=True) | options).inputs:
            kind, dim = tensors(config.input)[tensor.name]
            assert tensor.datatype == kind
            assert tensor.shape[0] == 1 and (tensor.shape[1] == 1 or dim == -1), tensor.name


# ---- outputs


class Tokens:
    """As much of a tokenizer as an answer takes."""

    def decode(self, ids, skip_special_tokens=True):
        return "é" * len(ids)


@pytest.fixture
def outputs():
    """One response with everything that may be asked for."""
    everything = {f.name: True for f in fields(Options) if f.name.startswith("return_")}
    prompt = types.SimpleNamespace(n=2, token_ids=[1, 2])
    asked = Request([prompt], Options(params=None, stream=True, exclude_input=True, **everything), ["ab"], Tokens())
    return asked.answer([Delta(index, "é", [5, 6], "stop", -1.5, [-0.5, -1.0]) for index in (0, 1)])


def test_outputs_of_request_config_and_document(config, outputs):
    stated = tensors(config.output)
    assert stated == {name: (kind, int(dims)) for name, kind, dims, _ in table("output")}
    assert [*stated] == [*outputs]
    for name, (kind, dim) in stated.items():
        assert outputs[name].shape == (2, dim)
        assert outputs[name].dtype == np.dtype(triton_to_np_dtype(kind)), name
    returned = {p.name.removeprefix("return_") for p in PARAMETERS if p.name.startswith("return_")} - {"full_text"}
    assert set(stated) == {"text_output", "index", *returned}


def test_outputs_that_the_client_reads(outputs):
    """Through the client's own decoder, nothing gets lost."""
    response = encode("m", outputs)
    read = types.SimpleNamespace(outputs=response.inputs, raw_output_contents=response.raw_input_contents)
    first, second = rows(decode(read))
    assert first == Generated("é", "stop", 2, 2, -1.5, first.logprobs, 0) and second.index == 1
    names = ("token_id", "token", "logprob")
    assert first.logprobs == [dict(zip(names, entry, strict=True)) for entry in ((5, "é", -0.5), (6, "é", -1.0))]
    assert set(Generated.__dataclass_fields__) == {"text", *outputs} - {"text_output"}
    assert {*ClientDelta.__slots__} == {*outputs} - {"text_output"}


# ---- errors

BACKEND = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}


def test_errors_of_document_backend_and_client():
    stated = table("what", "## Errors")
    assert {row[1] for row in stated} == set(BACKEND) - {"LoadError"}  # which no request meets
    for _, name, status, _, theirs in stated:
        code = status.split("/")[0].split("(")[0].split(",")[0].strip()
        grpc = {"INVALID_ARG": "INVALID_ARGUMENT"}.get(code, code)
        assert BACKEND[name].code == code
        assert code != "INVALID_ARG" or grpc in status
        by_status = client_errors.failure(grpc, BACKEND[name]("why").wire())
        in_a_stream = client_errors.failure("INTERNAL", BACKEND[name]("why").wire())
        for found in (by_status, in_a_stream):
            assert (type(found).__name__, found.code) == (theirs, grpc) and str(found).startswith("why")


def test_the_drawing_of_the_backends_errors():
    drawn = re.findall(r"^[├└─ ]*(\w+) {2,}([A-Z_]+) {2,}", errors.__doc__, re.MULTILINE)
    assert dict(drawn) == {name: kind.code for name, kind in BACKEND.items()}


class TritonError:
    """As much of Triton's as is used: its codes, and what it is made of."""

    INTERNAL, INVALID_ARG, UNAVAILABLE, CANCELLED = "INTERNAL", "INVALID_ARG", "UNAVAILABLE", "CANCELLED"

    def __init__(self, *given):
        self.given = given


def test_codes_become_tritons(monkeypatch):
    """`failure` finds each code among Triton's own."""
    fake = types.ModuleType("triton_python_backend_utils")
    fake.TRITONSERVER_RESPONSE_COMPLETE_FINAL, fake.TritonError = 1, TritonError
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake)
    monkeypatch.delitem(sys.modules, "backend.triton", raising=False)
    from backend import triton

    for name, kind in BACKEND.items():
        assert triton.failure(kind("why")).given == (f"{name}: why", kind.code)
    assert triton.failure(triton.served(KeyError("x"))).given == ("ServingError: KeyError: 'x'", "INTERNAL")
    monkeypatch.delitem(sys.modules, "backend.triton")
