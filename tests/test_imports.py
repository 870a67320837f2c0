"""The import arrows of ARCHITECTURE.md, read from the source and, for what is heavy, from a fresh interpreter."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
_SENTENCE = re.search(r"`errors`[^.;]* may be imported by all", (ROOT / "ARCHITECTURE.md").read_text())
FREE = {f"backend.{name}" for name in re.findall(r"`(\w+)`", _SENTENCE[0])}
"""What everything in backend may import."""


@cache
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


def offending(folder, *forbidden, allowed=()):
    """What the files of a folder import of that, by file; none of those in `allowed` are looked at."""
    found = {
        str(file.relative_to(ROOT)): [module for module in imports(file) if within(module, *forbidden)]
        for file in files(folder)
        if not within(name(file), *allowed)
    }
    assert found, f"{folder} has no files"
    return {file: modules for file, modules in found.items() if modules}


def test_generation_imports_neither_torch_nor_triton_nor_compute():
    forbidden = (
        "torch",
        "triton_python_backend_utils",
        "tritonclient",
        "deepspeed",
        "backend.compute",
        "backend.triton",
    )
    assert offending("backend/generation", *forbidden) == {}


def test_only_the_adapter_knows_tritons_python_api():
    assert list(offending("backend", "triton_python_backend_utils")) == ["backend/triton.py"]


def test_only_ranks_import_compute():
    heavy = ("backend.compute", "torch", "deepspeed")
    assert offending("backend", *heavy, allowed=("backend.compute", "backend.training")) == {}


def test_compute_knows_plans_and_ranks_but_not_the_engine():
    plans, tasks = (
        ("backend.generation.plan", "backend.generation.capacity"),
        ("backend.tasks.find", "backend.tasks.text"),
    )
    allowed = ("backend.compute", "backend.ranks.rank", *plans, *tasks, *FREE)
    found = offending("backend/compute", "backend")
    wrong = {
        file: [m for m in modules if not within(m, *allowed) and not any(within(a, m) for a in allowed)]
        for file, modules in found.items()
    }
    assert {file: modules for file, modules in wrong.items() if modules} == {}


def test_what_all_may_import_knows_nothing_else_of_ours():
    for module in FREE:
        own = {found for found in imports(ROOT / f"{module.replace('.', '/')}.py") if within(found, "backend")}
        assert {found for found in own - {"backend"} if not within(found, *FREE)} == set(), module


def test_tasks_import_neither_torch_nor_transformers_nor_compute():
    forbidden = ("torch", "transformers", "diffusers", "deepspeed", "backend.compute", "backend.triton")
    assert offending("backend/tasks", *forbidden) == {}


def test_nobody_imports_the_training_programs():
    """They run in processes of their own."""
    for folder in ("backend", "client", "model_repository"):
        assert offending(folder, "backend.training", allowed=("backend.training",)) == {}


def test_the_client_needs_no_torch():
    assert offending("client", "torch", "transformers", "deepspeed") == {}


STUB = [name(file) for file in files("backend/tasks") if file.name != "__init__.py"]


def test_what_runs_in_the_stub_and_the_client_loads_nothing_heavy():
    """One after the other in a fresh interpreter: the first that loads something is named."""
    modules = ["client", "backend.generation.engine", "backend.generation.request", *STUB]
    code = """
import importlib, sys
for module in sys.argv[1:]:
    importlib.import_module(module)
    if heavy := {"torch", "transformers", "diffusers", "deepspeed"} & set(sys.modules):
        sys.exit(f"{module} loads {heavy}")
"""
    done = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
