"""Folders without a tokenizer.json: another process asks transformers for one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from backend.errors import LoadError
from backend.generation import tokenizer
from backend.generation.tokenizer import Tokenizer

TEXTS = ["Hello, world!", " leading\n\n  and trailing ", "東京 🙂 naïve café", "</s>not an end", ""]
SPECIAL = {"gpt2": ["<|endoftext|>"], "opt": ["<s>", "<pad>", "</s>", "<unk>"]}


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITONSPEED_PYTHON", sys.executable)


def save_old(folder: Path, family: str) -> Path:
    """vocab.json and merges.txt, as GPT-2 and OPT were published."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL[family], initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(["Hello, world! leading and trailing"] * 9, trainer)
    trained.model.save(str(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    ends = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    config = {"tokenizer_class": "GPT2Tokenizer", **(ends | {"add_bos_token": True} if family == "opt" else {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_vocabulary_and_merges_give_what_transformers_gives(tmp_path: Path, family: str) -> None:
    mine, theirs = Tokenizer.from_folder(save_old(tmp_path, family)), AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("Hello")["input_ids"][0] == theirs.bos_token_id or family == "gpt2"
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert mine.encode(text) == ids
        assert mine.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        assert mine.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert mine.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json",
        "merges.txt",
        "tokenizer_config.json",
        "vocab.json",
    ]


def test_this_process_stays_light(tmp_path: Path) -> None:
    script = (
        "import sys; from backend.generation.tokenizer import Tokenizer; made = Tokenizer.from_folder(sys.argv[1]);"
        "print(made.encode('Hello'), [name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", script, save_old(tmp_path, "gpt2")], capture_output=True, text=True)
    assert found.stdout.endswith("] []\n"), found.stderr


def test_what_transformers_cannot_read_is_one_line(tmp_path: Path) -> None:
    save_old(tmp_path, "gpt2")
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(LoadError, match=f"^the tokenizer in {tmp_path} cannot be read: ") as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_code_of_the_checkpoint_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "strange"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["mine.Mine", None]}}))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(LoadError, match="cannot be read"):
        Tokenizer.from_folder(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_conversion_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\nexec sleep 600\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setenv("TRITONSPEED_PYTHON", str(tmp_path / "python"))
    monkeypatch.setattr(tokenizer, "CONVERSION_TIMEOUT", 0.2)
    with pytest.raises(LoadError, match="timed out"):
        Tokenizer.from_folder(tmp_path)
