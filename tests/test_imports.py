"""The import arrows of ARCHITECTURE.md, read from the source and, for what is heavy, from a fresh interpreter."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FREE = {"backend.errors", "backend.config", "backend.devices", "backend.families"}
FREE |= {"backend.checkpoint", "backend.model_folder", "backend.encoders", "backend.json_file"}
"""What everything in backend may import."""


def imports(file):
    """Every module that a file names in an import, wherever the statement stands."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def name(file):
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def within(module, *packages):
    return any(module == package or module.startswith(package + ".") for package in packages)


@pytest.mark.parametrize("file", files("backend/generation"), ids=lambda file: file.name)
def test_generation_imports_neither_torch_nor_triton_nor_compute(file):
    forbidden = (
        "torch",
        "triton_python_backend_utils",
        "tritonclient",
        "deepspeed",
        "backend.compute",
        "backend.triton",
    )
    assert [module for module in imports(file) if within(module, *forbidden)] == []


@pytest.mark.parametrize("file", files("backend"), ids=lambda file: str(file.relative_to(ROOT)))
def test_only_the_adapter_knows_tritons_python_api(file):
    if file.name != "triton.py":
        assert not any(within(module, "triton_python_backend_utils") for module in imports(file))


@pytest.mark.parametrize("file", files("backend"), ids=lambda file: str(file.relative_to(ROOT)))
def test_only_ranks_import_compute(file):
    if not within(name(file), "backend.compute", "backend.training"):
        assert not any(within(module, "backend.compute", "torch", "deepspeed") for module in imports(file)), file


@pytest.mark.parametrize("file", files("backend/compute"), ids=lambda file: file.name)
def test_compute_knows_plans_and_ranks_but_not_the_engine(file):
    plans, tasks = (
        ("backend.generation.plan", "backend.generation.capacity"),
        ("backend.tasks.find", "backend.tasks.text"),
    )
    allowed = ("backend.compute", "backend.ranks.rank", *plans, *tasks, *FREE)
    ours = [module for module in imports(file) if within(module, "backend")]
    assert [m for m in ours if not within(m, *allowed) and not any(within(a, m) for a in allowed)] == []


@pytest.mark.parametrize("file", files("backend/tasks"), ids=lambda file: file.name)
def test_tasks_import_neither_torch_nor_transformers_nor_compute(file):
    forbidden = ("torch", "transformers", "diffusers", "deepspeed", "backend.compute", "backend.triton")
    assert [module for module in imports(file) if within(module, *forbidden)] == []


@pytest.mark.parametrize("folder", ["backend", "client", "model_repository"])
def test_nobody_imports_the_training_programs(folder):
    """They run in processes of their own."""
    outside = [file for file in files(folder) if not within(name(file), "backend.training")]
    assert [file for file in outside if any(within(module, "backend.training") for module in imports(file))] == []


@pytest.mark.parametrize("file", files("client"), ids=lambda file: file.name)
def test_the_client_needs_no_torch(file):
    assert not any(within(module, "torch", "transformers", "deepspeed") for module in imports(file))


STUB = [name(file) for file in files("backend/tasks") if file.name != "__init__.py"]


@pytest.mark.parametrize("module", ["client", "backend.generation.engine", "backend.generation.request", *STUB])
def test_what_runs_in_the_stub_and_the_client_loads_nothing_heavy(module):
    heavy = "torch", "transformers", "diffusers", "deepspeed"
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
