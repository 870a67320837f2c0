"""What is shipped: the wheel, the scripts, the Dockerfile."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SCRIPTS = sorted(path for path in (ROOT / "scripts").iterdir() if path.is_file())
SHELL = [*(path for path in SCRIPTS if path.read_text().startswith("#!/usr/bin/env bash")), ROOT / ".ci" / "run"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def run(*line, **options):
    return subprocess.run(line, capture_output=True, text=True, check=False, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-cache-dir", "--quiet", "--wheel-dir", str(folder)]
    done = run(sys.executable, "-m", "pip", "wheel", *options, str(ROOT))
    assert done.returncode == 0, done.stderr
    (made,) = folder.iterdir()
    return made


def test_the_wheel_holds_packages_types_and_model_repository(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = run("git", "-C", str(ROOT), "ls-files", "backend", "client", "model_repository").stdout.split()
    for name in tracked:
        expected = name if not name.startswith("model_repository") else f"backend/{name}"
        assert expected in names or not (ROOT / name).exists(), name
    tops = {name.split("/")[0] for name in names}
    assert tops == {"backend", "client", f"tritonspeed-{PROJECT['project']['version']}.dist-info"}


def test_the_client_in_the_wheel_stands_alone(wheel, tmp_path):
    """With nothing of the server's extra in reach, and the model repository's templates found inside the package."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = """
import sys
blocked = "torch transformers deepspeed safetensors psutil tqdm".split()
sys.modules.update(dict.fromkeys(blocked))
import client, client.cli
assert client.__file__.startswith(sys.argv[1]), client.__file__
from backend import repository
assert "generate" in repository.tasks()
assert str(repository._templates()).startswith(sys.argv[1])
"""
    path = [str(tmp_path)]
    done = run(sys.executable, "-c", code, str(tmp_path), cwd=tmp_path, env=os.environ | {"PYTHONPATH": path[0]})
    assert done.returncode == 0, done.stderr


def test_the_console_script_is_there():
    done = run(str(Path(sys.executable).parent / "tritonspeed"), "--help")
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout


def test_installed_versions_are_within_the_pins():
    from importlib.metadata import version

    from packaging.requirements import Requirement

    extras = PROJECT["project"]["optional-dependencies"]
    for text in [*PROJECT["project"]["dependencies"], *extras["server"], *extras["samples"], *extras["dev"]]:
        pin = Requirement(text)
        assert pin.specifier.contains(version(pin.name), prereleases=True), text


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_scripts_parse_and_stop_at_errors(path):
    assert run("bash", "-n", str(path)).returncode == 0
    text = path.read_text()
    assert "set -euo pipefail" in text
    assert os.access(path, os.X_OK)


def test_the_install_script_and_the_project_name_the_same_versions():
    text = (ROOT / "scripts" / "install").read_text()
    extras = PROJECT["project"]["optional-dependencies"]
    (torch,) = (pin for pin in extras["server"] if pin.startswith("torch"))
    assert f"'{torch}'" in text
    for pin in extras["local"]:
        assert pin in text, pin


def test_install_is_nothing_with_a_python_given(tmp_path):
    copy = tmp_path / "scripts" / "install"
    copy.parent.mkdir()
    shutil.copy(ROOT / "scripts" / "install", copy)
    done = run(str(copy), env=os.environ | {"TRITONSPEED_PYTHON": sys.executable})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / ".venv").exists()


def test_install_says_which_python_it_needs(tmp_path):
    clone, tools = tmp_path / "clone", tmp_path / "bin"
    (clone / "scripts").mkdir(parents=True)
    tools.mkdir()
    shutil.copy(ROOT / "scripts" / "install", clone / "scripts")
    (clone / "pyproject.toml").write_text("")
    for name in ("bash", "cat", "sha256sum", "dirname", "readlink", "mkdir", "flock"):
        (tools / name).symlink_to(shutil.which(name))
    (tools / "python3").write_text("#!/bin/sh\n[ $1 = -V ] && echo Python 3.9.1\nexit 1\n")
    (tools / "python3").chmod(0o755)
    done = run(str(clone / "scripts" / "install"), env={"PATH": str(tools)})
    assert done.returncode == 1
    assert done.stderr == "install | Python 3.11 or 3.12 is needed; python3 here is Python 3.9.1\n"


def test_dockerfile_lints():
    done = run(str(Path(sys.executable).parent / "hadolint"), str(ROOT / "Dockerfile"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_dockerfile_is_above_the_security_floor():
    from backend.launcher.tritonserver import SAFE_RELEASE

    (tag,) = re.findall(r"^FROM \S+/tritonserver:(\d\d\.\d\d)-py3$", DOCKERFILE, re.M)
    assert tuple(map(int, tag.split("."))) >= tuple(map(int, SAFE_RELEASE.split(".")))


def test_dockerfile_ends_as_a_user_without_rights():
    users = re.findall(r"^USER (\S+)", DOCKERFILE, re.M)
    assert users and users[-1] not in ("0", "root")
    after = DOCKERFILE[DOCKERFILE.rindex("\nUSER ") :]
    assert not re.search(r"^(RUN|COPY|ADD)", after, re.M)  # nothing that it could write to later
    assert not re.search(r"^ADD |chown|chmod", DOCKERFILE, re.M)


def test_dockerfile_copies_all_that_the_wheel_is_built_from():
    copied = {word for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.M) for word in line.split()}
    allowed = set(re.findall(r"^!(\S+)", (ROOT / ".dockerignore").read_text(), re.M))
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert (
        copied
        == allowed
        == {*packages["packages"], *packages["force-include"], "pyproject.toml", "README.md", "LICENSE"}
    )


def test_ci_runs_the_tests():
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("exec ./scripts/test")
