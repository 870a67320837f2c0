"""The same ids, texts and chats as transformers gives for the same folder."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from backend.errors import InvalidInput, LoadError
from backend.generation.tokenizer import Tokenizer

TEXTS = [
    "Hello, world!",
    " leading",
    "trailing ",
    "a\n\nb\tc",
    "天地玄黃 👩‍👩‍👧‍👦 नमस्ते",
    "<s>not a start</s> <|im_end|> [PAD]",
    "it 's a dog . is n't it ?",
    "",
]
CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b>&\n\n"}],
    [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "天 👍"},
    ],
]


def trained(model: str = "BPE") -> tokenizers.Tokenizer:
    if model == "BPE":
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer: Any = trainers.BpeTrainer(
            vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
        )
    else:
        made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=False)
        trainer = trainers.WordPieceTrainer(
            vocab_size=200, special_tokens=["[UNK]", "<s>", "</s>"], show_progress=False
        )
    made.train_from_iterator(TEXTS, trainer)
    return made


def with_bos(made: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    return made


def saved(folder: Path, made: tokenizers.Tokenizer, **config: Any) -> Path:
    """As a checkpoint on the hub: tokenizer.json and a configuration."""
    made.save(str(folder / "tokenizer.json"))
    base = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(base | config))
    return folder


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": False, "add_eos_token": True},
        {
            "pad_token": "[PAD]",
            "unk_token": {"__type": "AddedToken", "content": "Hello", "lstrip": True, "normalized": False},
        },
        {"additional_special_tokens": ["world", "<|im_end|>"]},
        {"model_max_length": 3, "clean_up_tokenization_spaces": True},
    ],
)
def test_ids_and_texts_are_those_of_transformers(tmp_path: Path, config: dict[str, Any], bos: bool) -> None:
    made = trained()
    folder = saved(tmp_path, with_bos(made) if bos else made, **config)
    compare(Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize("clean_up", [True, False])
def test_word_piece_is_cleaned_up_as_transformers_does(tmp_path: Path, clean_up: bool) -> None:
    folder = saved(tmp_path, trained("WordPiece"), clean_up_tokenization_spaces=clean_up)
    mine = Tokenizer.from_folder(folder)
    compare(mine, AutoTokenizer.from_pretrained(folder))
    assert (" ." in mine.decode(mine.encode("a dog ."))) != clean_up


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path: Path) -> None:
    made = trained()
    made.enable_truncation(2)
    made.enable_padding(length=9, pad_token="<s>")
    mine = Tokenizer.from_folder(saved(tmp_path, made))
    compare(mine, AutoTokenizer.from_pretrained(tmp_path))
    assert mine.decode(mine.encode("Hello, world!")) == "Hello, world!"


def test_the_older_special_tokens_map_is_read(tmp_path: Path) -> None:
    folder = saved(tmp_path, trained(), pad_token="[PAD]")
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "world", "rstrip": True}}))
    mine, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    compare(mine, theirs)
    assert mine.special_tokens == theirs.special_tokens_map


def test_what_transformers_saves_is_read(tmp_path: Path) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_object=with_bos(trained()), bos_token="<s>", eos_token="</s>")
    theirs.chat_template = "{% for m in messages %}{{ bos_token + m['content'] }}{% endfor %}"
    theirs.save_pretrained(tmp_path)
    mine = Tokenizer.from_folder(tmp_path)
    compare(mine, theirs)
    assert mine.chat(CHATS[2]) == theirs.apply_chat_template(CHATS[2], tokenize=False)


def compare(mine: Tokenizer, theirs: Any) -> None:
    assert mine.vocab_size == len(theirs)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert mine.encode(text) == list(ids)
        assert mine.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        assert mine.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert mine.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
        for token_id in ids:
            assert mine.silent(token_id) == (theirs.decode([token_id], True) == "" != theirs.decode([token_id]))


def test_unknown_ids_are_silent() -> None:
    made = Tokenizer(trained(), {})
    assert made.silent(made.vocab_size) and not made.silent(made.encode("a")[0])


def test_smollm2_equals_transformers(smollm2: Path) -> None:
    mine, theirs = Tokenizer.from_folder(smollm2), AutoTokenizer.from_pretrained(smollm2)
    compare(mine, theirs)
    for chat in CHATS:
        text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert mine.chat(chat) == text
        assert mine.encode(mine.chat(chat), add_special_tokens=False) == list(ids)


def test_a_folder_without_tokenizer_json_is_converted(tmp_path: Path) -> None:
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world", "##s", ",", "!"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocab))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    mine, theirs = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert mine.encode("hello, worlds!") == theirs("hello, worlds!")["input_ids"]
    assert mine.decode(mine.encode("hello, worlds!")) == theirs.decode(theirs("hello, worlds!")["input_ids"], True)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 1}'])
def test_a_corrupt_file_is_a_load_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(LoadError, match="cannot be read"):
        Tokenizer.from_folder(tmp_path)


def test_an_empty_folder_is_a_load_error(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="cannot be read"):
        Tokenizer.from_folder(tmp_path)


def test_a_configuration_that_is_no_object_is_a_load_error(tmp_path: Path) -> None:
    saved(tmp_path, trained())
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(LoadError, match="JSON object"):
        Tokenizer.from_folder(tmp_path)


def test_neither_torch_nor_transformers_is_imported(tmp_path: Path) -> None:
    saved(tmp_path, trained())
    script = (
        "import sys; from backend.generation import text, params; from backend.generation.tokenizer import Tokenizer;"
        "made = Tokenizer.from_folder(sys.argv[1]); made.encode('a');"
        "print([name for name in ('torch', 'transformers', 'tritonclient') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# --- chats

TEMPLATES = [
    "{% for m in messages %}{{ m.role | upper }}: {{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}",
    "{{ bos_token }}\n  {% for m in messages %}\n    {% if loop.first %}first\n    {% endif %}\n"
    "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m | tojson }}{{ [m] | tojson(indent=2) }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}\n{% endgeneration %}x{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
    "{{ tools is none }}{{ documents is none }}{{ pad_token is defined }}{{ dict(a=1) }}",
    "{% macro show(m) %}<{{ m.content[:5] }}>{% endmacro %}{% for m in messages[::-1] %}{{ show(m) }}{% endfor %}",
    "{{ strftime_now('%Y') }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_render_as_in_transformers(tmp_path: Path, template: str) -> None:
    saved(tmp_path, trained(), chat_template=template)
    mine, theirs = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for chat in CHATS:
        assert mine.chat(chat) == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def test_a_template_file_comes_before_the_configuration(tmp_path: Path) -> None:
    saved(tmp_path, trained(), chat_template="config")
    assert Tokenizer.from_folder(tmp_path).chat(CHATS[0]) == "config"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_folder(tmp_path).chat(CHATS[0]) == "file"


def test_of_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    saved(tmp_path, trained(), chat_template=[{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}])
    assert Tokenizer.from_folder(tmp_path).chat(CHATS[0]) == "d"


def test_the_date_is_today() -> None:
    assert chat_with("{{ strftime_now('%Y-%m') }}") == datetime.now().strftime("%Y-%m")


def chat_with(template: str | None, messages: object = CHATS[0]) -> str:
    return Tokenizer(trained(), {"eos_token": "</s>"}, template).chat(messages)


@pytest.mark.parametrize(
    ("template", "match"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('only even turns') }}", "only even turns"),
        ("{% for %}", "chat template"),
        ("{{ messages[7].content.x.y }}", "chat template"),
        ("{{ messages.append(1) }}", "chat template"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "chat template"),
        ("{% for i in range(1000000000) %}{% endfor %}", "chat template"),
    ],
)
def test_what_a_template_refuses_is_invalid_input(template: str | None, match: str) -> None:
    with pytest.raises(InvalidInput, match=match):
        chat_with(template)


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        (None, "JSON list"),
        ([], "not empty"),
        ({"role": "user", "content": "x"}, "JSON list"),
        (["x"], r"messages\[0\]"),
        ([{"role": "user"}], "exactly role and content"),
        ([{"role": "user", "content": "x", "name": "y"}], "exactly role and content"),
        ([{"role": "user", "content": "x"}, {"role": "root", "content": "x"}], r"messages\[1\].role .*'root'"),
        ([{"role": ["user"], "content": "x"}], "role"),
        ([{"role": "user", "content": None}], "must be a string, not NoneType"),
        ([{"role": "user", "content": [{"type": "text"}]}], "must be a string, not list"),
    ],
)
def test_bad_messages_are_invalid_input(messages: object, match: str) -> None:
    with pytest.raises(InvalidInput, match=match):
        chat_with("x", messages)
