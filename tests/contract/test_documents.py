"""What README.md and docs/parameters.md say of parameters and of the client is true, and links lead somewhere."""

import ast
import builtins
import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

import client
from backend.config import DEVICES, DTYPES, KV_DTYPES, OFFLOADS, QUANTIZATIONS, EngineConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PARAMETERS = (ROOT / "docs" / "parameters.md").read_text()
CHOICES = {
    "device": DEVICES,
    "dtype": DTYPES,
    "kv_cache_dtype": KV_DTYPES,
    "quantization": QUANTIZATIONS,
    "offload": OFFLOADS,
}


def rows(document):
    """Default and meaning by key, of every table of parameters."""
    found = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*) \|$", document, re.MULTILINE)
    assert found and len({key for key, *_ in found}) == len(found)
    return {key: (default, meaning) for key, default, meaning in found}


def written(default):
    """A default as one would write it in config.pbtxt."""
    if isinstance(default, bool):
        return str(default).lower()
    return {MISSING: "required", None: "left out", "": "off"}.get(default) or (
        default if isinstance(default, str) else f"{default:.15g}"
    )


def test_every_parameter_and_its_default():
    stated = {key: default for key, (default, _) in rows(PARAMETERS).items()}
    assert stated == {field.name: written(field.default) for field in fields(EngineConfig)}


@pytest.mark.parametrize("document", [PARAMETERS, README], ids=["parameters", "readme"])
def test_every_choice_of_a_parameter(document):
    stated = rows(document)
    for key in CHOICES.keys() & stated.keys():
        default, meaning = stated[key]
        assert {*re.findall(r"`(\w+)`", meaning)} | {default} >= {*CHOICES[key]} - {""}, key


def test_the_readme_names_parameters_as_they_are():
    every = rows(PARAMETERS)
    for key, (default, _) in rows(README).items():
        assert default.startswith(every[key][0]), key


def test_the_readmes_python_compiles_and_names_what_the_client_exports():
    """All of its snippets as one program: a later one goes on where an earlier one imported."""
    tree = ast.parse("\n".join(re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)))
    compile(tree, "README.md", "exec")
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom | ast.Import)]
    assert imports and all(isinstance(node, ast.ImportFrom) and node.module == "client" for node in imports)
    imported = {alias.name for node in imports for alias in node.names}
    assert imported <= set(client.__all__)
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    made = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    used = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    assert used <= made | imported | set(dir(builtins))


DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("deploy/**/*.md")]


def anchors(document):
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", document.read_text()):
        path, _, anchor = link.partition("#")
        there = document.parent / path if path else document
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), link
