"""Every task but generate: config.pbtxt, model.py and the table of tasks agree; each folder is covered by itself."""

import ast
import itertools
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelQueuePolicy

from backend.tasks import TASKS

DOCUMENT = (Path(__file__).parents[2] / "docs" / "contracts.md").read_text()
REPOSITORY = Path(__file__).parents[2] / "model_repository"
FOLDERS = sorted(path.parent.name for path in REPOSITORY.glob("*/config.pbtxt") if path.parent.name != "generate")
REQUIRED = {
    "qa": {"question", "context"},
    "rerank": {"query", "texts"},
    "text_to_image": {"prompt"},
    "zero_shot_image": {"image", "labels"},
}
"""Inputs that may not be left out; of the other tasks it is `text`."""


def config_of(task):
    return text_format.Parse((REPOSITORY / task / "config.pbtxt").read_text(), ModelConfig())


def code(task):
    """model.py without its docstring, and with the task's name apart."""
    tree = ast.parse((REPOSITORY / task / "1" / "model.py").read_text())
    (named,) = [node for node in tree.body if isinstance(node, ast.Assign)]
    rest = [ast.dump(node) for node in tree.body[1:] if node is not named]
    return ast.get_docstring(tree), ast.unparse(named), rest


def test_every_folder_is_a_task():
    assert "embed" in FOLDERS and set(FOLDERS) <= set(TASKS)


@pytest.mark.parametrize("task", FOLDERS)
def test_model_py_differs_by_task_and_docstring_only(task):
    docstring, named, rest = code(task)
    assert docstring.startswith(f"{task}: ") and named == f"TASK = '{task}'"
    assert rest == code("embed")[2]


@pytest.mark.parametrize("task", [*FOLDERS, "generate"])
def test_every_task_exports_its_metrics_while_it_serves(task):
    """From when it serves, since nobody ends what a failed start leaves, until its service is closed."""
    (model,) = (node for node in ast.parse((REPOSITORY / task / "1" / "model.py").read_text()).body
                if isinstance(node, ast.ClassDef))  # fmt: skip
    lines = {each.name: [ast.unparse(line) for line in each.body] for each in model.body}
    exporter = "self.exporter = Exporter(args, self.service.tally, self.service.close)"
    assert lines["initialize"][1:] == ["self.service.start()", exporter]
    assert lines["finalize"] == ["self.service.close()", "self.exporter.close()"]


@pytest.mark.parametrize("task", FOLDERS)
def test_config_gathers_and_refuses(task):
    config = config_of(task)
    policy = config.dynamic_batching.default_queue_policy
    assert config.name == task and config.backend == "python" and config.max_batch_size > 0
    assert not config.model_transaction_policy.decoupled
    assert policy.timeout_action == ModelQueuePolicy.REJECT and policy.allow_timeout_override
    assert policy.default_timeout_microseconds > 0 and policy.max_queue_size > 0
    assert all(tensor.allow_ragged_batch for tensor in config.input if -1 in tensor.dims)  # else lengths are kept apart


@pytest.mark.parametrize("task", FOLDERS)
def test_only_what_is_asked_about_is_required(task):
    config = config_of(task)
    required = {tensor.name for tensor in config.input if not tensor.optional}
    assert required == REQUIRED.get(task, {"text"})
    for tensors in (config.input, config.output):
        assert len({tensor.name for tensor in tensors}) == len(tensors)


def documented(task, first):
    """(type, dims) by name of a table in the task's section of docs/contracts.md."""
    section = DOCUMENT[DOCUMENT.index(f"\n## {task}\n") + 4 :]
    section = section[: section.index("\n## ")]
    rows = section[section.index(f"| {first} |") :].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in itertools.takewhile(bool, rows)]
    return {name: (kind, int(dims)) for name, kind, dims, _ in cells}


@pytest.mark.parametrize("task", FOLDERS)
def test_config_is_what_the_document_says(task):
    config = config_of(task)
    for first, tensors in (("input", config.input), ("output", config.output)):
        kinds = {t.name: DataType.Name(t.data_type).removeprefix("TYPE_").replace("STRING", "BYTES") for t in tensors}
        assert {t.name: (kinds[t.name], *t.dims) for t in tensors} == documented(task, first)
        assert [*kinds] == [*documented(task, first)]
