"""Any row that Triton lets through is an item or InvalidInput, for every task; so are an answer's torn images."""

import io
import sys
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from backend.config import EngineConfig
from backend.errors import InvalidInput, ServingError
from backend.tasks import find
from backend.tasks.pictures import read

sys.path.insert(0, str(Path(__file__).parent))

from targets import ROOT, TASKS, fair
from tiny_tasks import inputs, write

SHORT = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def encoded(kind, mode="RGB", side=16):
    file = io.BytesIO()
    Image.effect_noise((side, side), 50).convert(mode).save(file, kind, exif=exif() if kind != "PNG" else b"")
    return file.getvalue()


def exif():
    found = Image.Exif()
    found[0x0112] = 6  # turned by a quarter
    return found.tobytes()


@cache
def pictures():
    return [encoded(kind) for kind in ("PNG", "JPEG", "WEBP")] + [encoded("PNG", "L")]


@st.composite
def torn(draw):
    """An image's file, whole or with bytes changed, lost or put in."""
    data = bytearray(draw(st.sampled_from(pictures())))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


WORDS = [b"", b"{}", b"[MASK]", b"a [MASK] b", b"mean", b"cls", b"simple", b"png", b"raw", b"\0", b"\xff", b"x" * 300]
TEXT = st.one_of(st.sampled_from(WORDS), st.text(max_size=80).map(lambda text: text.encode("utf-8", "surrogatepass")),
                 st.binary(max_size=40))  # fmt: skip
VALUES = {
    "STRING": TEXT,
    "INT32": st.one_of(st.integers(-(2**31), 2**31 - 1), st.integers(-2, 20), st.sampled_from([8, 32, 64])),
    "UINT64": st.integers(0, 2**64 - 1),
    "FP32": st.one_of(st.floats(width=32), st.floats(0, 1, width=32)),
    "BOOL": st.booleans(),
}


def rows_of(task):
    """Rows as `backend.triton.rows` makes them: any of the inputs of config.pbtxt, of their types."""
    columns = {}
    for name, kind, dims in inputs(task):
        value = st.one_of(TEXT, torn()) if "image" in name else VALUES[kind]
        columns[name] = st.lists(value, max_size=5) if dims == "-1" else value
    assert columns, task
    return st.fixed_dictionaries({}, optional=columns)


def test_every_task_of_the_repository_is_here():
    served = {path.parent.name for path in (ROOT / "model_repository").glob("*/config.pbtxt")}
    assert served == {*TASKS, "generate"}  # whose rows: tests/backend/generation/test_params and ./test_generate_rows


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Tasks by name, made when first asked for."""
    tasks = {}

    def task(name):
        if name not in tasks:
            folder = write(name, tmp_path_factory.mktemp(name))
            tasks[name] = find(name)(folder, EngineConfig(model=str(folder), device="cpu", max_prompt_bytes=200))
        return tasks[name]

    return task


@pytest.mark.filterwarnings("ignore:::PIL")
@pytest.mark.parametrize("name", TASKS)
def test_any_row_is_an_item_or_invalid_input(made, name):
    task = made(name)

    @SHORT
    @given(rows_of(name))
    def holds(row):
        try:
            item = task.parse(row)
        except InvalidInput as error:
            return fair(str(error))
        (pieces,) = task.prepare([item])
        if isinstance(pieces, ServingError):
            assert isinstance(pieces, InvalidInput)
        else:
            assert sorted(place for batch in task.cut(pieces) for place in batch) == [*range(len(pieces))]

    holds()


@pytest.mark.filterwarnings("ignore:::PIL")
@settings(max_examples=300, deadline=None)
@given(torn(), st.sampled_from(["RGB", "L"]))
def test_any_file_is_an_image_or_invalid_input(data, mode):
    try:
        pixels = read(data, "image", mode, 1 << 12)
    except InvalidInput:
        return
    assert pixels.shape[2:] == ((3,) if mode == "RGB" else ()) and pixels.shape[0] * pixels.shape[1] <= 1 << 12
