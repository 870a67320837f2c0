"""Targets: what reads what callers and servers send, each a function of bytes that raises only at a fault of ours.

`TARGETS` names a maker for each, which gets an empty folder to work in. Those of model folders: targets_folders.
"""

import io
import json
import re
import sys
import warnings
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1] / "fakes"))

import tiny_encoders
import tiny_tasks
from draw import Draw
from PIL import Image
from tiny_tasks import arguments, inputs, outputs

from backend import journal, spans
from backend.config import EngineConfig
from backend.errors import InvalidInput, ServingError
from backend.generation.parameter import PARAMETERS
from backend.generation.params import Defaults
from backend.generation.request import Request
from backend.generation.tokenizer import Tokenizer
from backend.tasks import TASKS as tasks_there
from backend.tasks import find
from backend.tasks.pictures import read
from client import errors
from client.errors import Error
from client.generate import questions as generate_questions
from client.generate import rows
from client.tensors import decode
from client.transport import Response

ROOT = Path(__file__).parents[2]
Target = Callable[[bytes], None]
TASKS = [*tasks_there]
MORE: dict[str, dict] = {"qa": {"top_k": 2}, "text_to_image": {"options": {"format": "raw"}}}
"""What a call of the client is given besides what it must have."""
NAMES = [*dict.fromkeys(name for each in PARAMETERS for name in (each.name, *each.aliases)), "traceparent", "x"]


def fair(message: str, most: int = 2000) -> None:
    """One line, and not the input again."""
    assert "\n" not in message and len(message) < most, message[:200]


# ---- rows


def value(draw: Draw, name: str, kind: str):
    if kind != "STRING":
        return {"INT32": partial(draw.integer, 4), "UINT64": lambda: draw.integer(8) % 2**64,
                "FP32": draw.real, "BOOL": draw.yes}[kind]()  # fmt: skip
    return torn(draw) if "image" in name and draw.yes() else draw.string()


def row(draw: Draw, task: str) -> dict:
    """As `backend.triton.rows` makes them."""
    found = {}
    for name, kind, dims in inputs(task):
        if draw.yes():
            found[name] = (
                [value(draw, name, kind) for _ in range(draw.below(5))] if dims == "-1" else value(draw, name, kind)
            )
    return found


@cache
def pictures() -> list[bytes]:
    found = []
    for kind, mode in (("PNG", "RGB"), ("JPEG", "RGB"), ("WEBP", "RGB"), ("PNG", "L"), ("PNG", "P"), ("PNG", "RGBA")):
        Image.linear_gradient("L").resize((16, 16)).convert(mode).save(file := io.BytesIO(), kind)
        found.append(file.getvalue())
    return found


def torn(draw: Draw) -> bytes:
    """An image's file with bytes changed, lost or put in."""
    data = bytearray(draw.one(pictures()))
    for _ in range(draw.below(4)):
        at = draw.below(len(data) + 1)
        data[at : at + draw.below(8)] = draw.take(draw.below(8))
    return bytes(data)


def tasks(name: str, folder: Path) -> Target:
    """Rows of a task, parsed and prepared."""
    config = EngineConfig(model=str(folder), device="cpu", max_prompt_bytes=200, max_pixels=1 << 12, step_tokens=64)
    if not any(folder.iterdir()):
        tiny_tasks.write(name, folder)
    task = find(name)(folder, config)
    image = "image" in name
    if image:
        warnings.simplefilter("ignore")  # PIL's, on torn files

    def target(data: bytes) -> None:
        try:
            item = task.parse(row(Draw(data), name))
        except InvalidInput as error:
            return fair(str(error))
        (pieces,) = task.prepare([item])
        if isinstance(pieces, ServingError):
            assert isinstance(pieces, InvalidInput)
            return fair(str(pieces))
        assert sorted(at for batch in task.cut(pieces) for at in batch) == [*range(len(pieces))]
        task.batch(pieces)

    return target


# ---- generate

CHATML = "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
STRICT = (
    "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    "{{ messages | tojson }}{{ strftime_now('%Y') }}"
)


def engine(folder: Path, template: str = CHATML) -> SimpleNamespace:
    """What parsing needs of one."""
    tiny_encoders.save_tokenizer(folder, "roberta", 300, chat_template=template)
    config = EngineConfig(model=str(folder), max_prompt_bytes=64, max_prompts=4)
    return SimpleNamespace(config=config, defaults=Defaults(), vocab=300, tokenizer=Tokenizer.from_folder(folder))


def parsed(rows: list[dict], parameters: dict, of: SimpleNamespace) -> None:
    try:
        found = Request.parse(rows, parameters, of)
        for prompt in found.prompts:
            prompt.check(32, of.vocab)
    except InvalidInput as error:
        return fair(str(error))
    assert len(found.prompts) == len(rows)


def generate(folder: Path) -> Target:
    """Rows and the request's own parameters."""
    of = engine(folder)

    def target(data: bytes) -> None:
        draw = Draw(data)
        parameters = draw.fields(NAMES, lambda: draw.one([draw.yes, partial(draw.integer, 8), draw.text, draw.real])())
        given = [row(draw, "generate") for _ in range(1 + draw.below(3))]
        if draw.yes():
            given[0]["sampling_parameters"] = json.dumps(draw.fields(NAMES)).encode()
        parsed(given, parameters, of)

    return target


def sampling_json(folder: Path) -> Target:
    """sampling_parameters as any bytes."""
    of = engine(folder)
    return lambda data: parsed([{"text_input": b"a", "sampling_parameters": data}], {}, of)


def messages(folder: Path) -> Target:
    """Any bytes as messages, and drawn ones, for two templates."""
    both = [engine(folder, text) for text in (CHATML, STRICT)]

    def target(data: bytes) -> None:
        draw = Draw(data)
        of, raw = draw.one(both), draw.yes()
        chat = [draw.changed({"role": "user", "content": draw.text()}, ["role"]) for _ in range(draw.below(3))]
        parsed([{"messages": draw.rest() if raw else json.dumps(chat).encode()}], {}, of)

    return target


def images(_: Path) -> Target:
    """Any bytes as an image's file."""
    warnings.simplefilter("ignore")

    def target(data: bytes) -> None:
        for mode in ("RGB", "L"):
            try:
                pixels = read(data, "image", mode, 1 << 12)
            except InvalidInput as error:
                fair(str(error))
            else:
                assert pixels.shape[2:] == ((3,) if mode == "RGB" else ())
                assert pixels.shape[0] * pixels.shape[1] <= 1 << 12

    return target


# ---- answers, headers

TYPES = ["BYTES", "INT32", "FP32", "UINT64", "BOOL", "FP16", "BF16", "", "NOTHING"]
FITTING = {"FP32": b"\0\0\0\x3f", "INT32": bytes(4), "UINT64": bytes(8), "BOOL": b"\1", "BYTES": b"\1\0\0\0a"}


def answers(_: Path) -> Target:
    """What a server may send, as protobuf or drawn, to each task's part of the client."""
    calls = {name: import_module(f"client.{name}").questions(*arguments(name), **MORE.get(name, {})) for name in TASKS}
    names = {name: outputs(name) for name in TASKS}
    calls["generate"] = generate_questions("a", {})
    names["generate"] = ["text_output", "index", "finish_reason", "logprobs", "num_input_tokens"]

    def target(data: bytes) -> None:
        draw = Draw(data)
        task = draw.one([*calls])
        try:
            found = decode(_response(draw, names[task]))
            if task == "generate":
                rows(found)
            calls[task].read([[found] * (1 + draw.below(2))])
        except Error as error:
            str(error)

    return target


def _response(draw: Draw, names: list[str]) -> Response:
    response = Response()
    if draw.yes():
        try:
            response.ParseFromString(draw.rest())
        except Exception:  # gRPC's own business
            return Response()
        return response
    for name in names if draw.yes() else [draw.one(names) for _ in range(draw.below(5))]:
        kind, shape = draw.one(TYPES), [draw.integer(8) for _ in range(draw.below(4))]
        raw = draw.take(draw.below(40))
        if draw.yes():  # one that fits
            shape, kind = [1, 1], draw.one([*FITTING])
            raw = FITTING[kind] if draw.yes() or kind != "BYTES" else len(raw).to_bytes(4, "little") + raw
        response.outputs.add(name=name, datatype=kind, shape=shape)
        response.raw_output_contents.append(raw)
    return response


def failures(_: Path) -> Target:
    """The text of any refusal."""
    codes, names = [*errors._BY_CODE, "INTERNAL", "OK", ""], [*errors._BY_NAME, ""]

    def target(data: bytes) -> None:
        draw = Draw(data)
        code, text = draw.one(codes), f"{draw.text()}message: {draw.one(names)}: {draw.rest().decode(errors='replace')}"
        assert isinstance(errors.failure(code, text, draw.text()), Error)

    return target


def headers(_: Path) -> Target:
    """traceparent, x-request-id: one line of JSON, and spans of hexadecimal ids."""

    def target(data: bytes) -> None:
        draw = Draw(data)
        entry = journal.Entry(None, SimpleNamespace(request_id=draw.text(), trace=""), begun=draw.real())
        line = json.dumps(journal._line(entry, ValueError(draw.text()) if draw.yes() else None, entry.begun))
        assert "\n" not in line and len(line) < 1000
        trace = draw.rest().decode("utf-8", "replace")
        for span in spans.spans_of(trace, entry, 1.0, spans.Told()):
            assert re.fullmatch("[0-9a-f]{32}", span["traceId"]) and re.fullmatch("[0-9a-f]{16}", span["parentSpanId"])

    return target


TARGETS: dict[str, Callable[[Path], Target]] = {
    "generate": generate,
    "sampling_json": sampling_json,
    "messages": messages,
    "images": images,
    "answers": answers,
    "failures": failures,
    "headers": headers,
    **{name: partial(tasks, name) for name in TASKS},
}
PARENT = b"\0" * 8 + b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SEEDS: dict[str, Callable[[], list[bytes]]] = {
    "images": pictures,
    "sampling_json": lambda: [b'{"max_tokens": 2, "stop": ["a"]}', b'{"n": 1e2, "seed": "7"}', b"{}"],
    "messages": lambda: [
        b'\0\1\0[{"role": "user", "content": "a"}]',
        b'\1\1\0[{"role": "user", "content": "\\ud800"}]',
    ],
    "headers": lambda: [PARENT],
}
"""To begin with."""
