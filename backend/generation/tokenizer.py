"""Tokenizer: text to token ids and back, and chats to text, as transformers does for the same folder.

It knows neither torch nor transformers, which take seconds to import: where the folder has no tokenizer.json, another
process asks them for one.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from backend.errors import InvalidInput, LoadError
from backend.interpreter import python
from backend.json_file import optional

_log = logging.getLogger(__name__)

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
CONVERSION_TIMEOUT = 300.0
"""Seconds for transformers to read a folder's tokenizer."""
ROLES = ("system", "developer", "user", "assistant", "tool")


class Tokenizer:
    """One model's tokenizer and chat template; safe to use from several threads."""

    def __init__(self, rust: tokenizers.Tokenizer, config: Mapping[str, Any], template: str | None = None) -> None:
        """From the `tokenizers` object, tokenizer_config.json's content and the chat template."""
        rust.no_truncation()
        rust.no_padding()
        self._rust, self._template = rust, template
        self.special_tokens = {name: _content(config[name]) for name in NAMED if config.get(name)}
        """By transformers' name: bos_token, eos_token and so on."""
        rust.add_special_tokens(_special(rust, config))
        self.cleans_up = _cleans_up(rust, config)
        """Whether decode() drops the spaces before punctuation that WordPiece models leave."""
        self.byte_ids = _byte_ids(rust)
        """Tokens that stand for one byte each; a run of them is decoded together."""
        added = rust.get_added_tokens_decoder().items()
        self._special_ids = frozenset(token_id for token_id, token in added if token.special)
        self.silent = cache(self._is_silent)
        """silent(token_id): whether decode() passes the token over, because it is special or unknown."""
        self._render = cache(self._compile)
        self._cutting: tokenizers.Tokenizer | None = None
        self._cut_side = str(config.get("truncation_side") or "right")

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Of a Hugging Face checkpoint; LoadError where there is none or it cannot be read."""
        folder = Path(folder)
        try:
            config = _config(folder)
            return cls(_load(folder), config, _template(folder, config))
        except LoadError:
            raise
        except Exception as error:  # `tokenizers` raises plain Exception
            raise LoadError(f"the tokenizer in {folder} cannot be read: {error}") from error

    @property
    def vocab_size(self) -> int:
        """Tokens, the added ones counted; a model's logits may be wider."""
        return int(self._rust.get_vocab_size(with_added_tokens=True))

    def token_id(self, token: str) -> int | None:
        return self._rust.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids, with the model's own opening tokens unless the text is a chat, whose template has written them."""
        # As a batch of one, which lets other threads run meanwhile; encode() does not.
        return list(self._rust.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids)

    def encodings(self, texts: Sequence[str | tuple[str, str]]) -> list[tokenizers.Encoding]:
        """Many texts or pairs of texts at once, on all cores: ids, kinds of tokens, offsets in characters."""
        return list(self._rust.encode_batch([*texts]))

    def truncated(self, text: str | tuple[str, str], length: int) -> tokenizers.Encoding:
        """A text or pair cut to `length` tokens, the special ones included; of a pair the longer text is cut first."""
        cutting = tokenizers.Tokenizer.from_str(self._rust.to_str()) if self._cutting is None else self._cutting
        self._cutting = cutting
        cutting.enable_truncation(length, strategy="longest_first", direction=self._cut_side)
        return cutting.encode_batch([text])[0]

    @property
    def marks_subwords(self) -> bool:
        """Whether tokens that go on with a word say so by a prefix, as WordPiece's do."""
        return bool(getattr(self._rust.model, "continuing_subword_prefix", None))

    def join(self, tokens: Sequence[str]) -> str:
        """The text of tokens by their names."""
        return str(self._rust.decoder.decode([*tokens])) if self._rust.decoder else " ".join(tokens)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text = self.decode_raw(token_ids, skip_special_tokens)
        return clean_up(text) if self.cleans_up else text

    def decode_raw(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """As decode(), before clean_up(): the part that may be done piece by piece."""
        return str(self._rust.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def chat(self, messages: object) -> str:
        """The text of a chat [{"role", "content"}, ...] up to where the assistant answers.

        To be encoded with add_special_tokens=False. InvalidInput names what is wrong with the messages.
        """
        _check_messages(messages)
        if self._template is None:
            raise InvalidInput("messages: this model has no chat template; send text_input instead")
        try:
            return self._render().render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **self.special_tokens
            )
        except Exception as error:  # a template may fail in any way
            raise InvalidInput(f"messages: the model's chat template refuses them: {error}") from error

    def _compile(self) -> jinja2.Template:
        return _environment().from_string(self._template or "")

    def _is_silent(self, token_id: int) -> bool:
        return token_id in self._special_ids or self._rust.id_to_token(token_id) is None


def clean_up(text: str) -> str:
    """As transformers' clean_up_tokenization: no spaces before punctuation and English contractions."""
    for tail in (".", "?", "!", ",", "' ", "n't", "'m", "'s", "'ve", "'re"):
        text = text.replace(" " + tail, tail.rstrip())
    return text


def _load(folder: Path) -> tokenizers.Tokenizer:
    file = folder / "tokenizer.json"
    if file.is_file():
        return tokenizers.Tokenizer.from_file(str(file))
    _log.info("no tokenizer.json in %s: converting with transformers, which takes seconds", folder)
    with tempfile.TemporaryDirectory(prefix="tritonspeed-tokenizer-") as scratch:
        _convert(folder, converted := Path(scratch) / "tokenizer.json")
        return tokenizers.Tokenizer.from_file(str(converted))


def _convert(folder: Path, file: Path) -> None:
    """In a process of its own: 400 MB are gone with it, and Triton's stub cannot import all that transformers needs."""
    line = [python(), "-P", "-m", "backend.compute.convert_tokenizer", str(folder), str(file)]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(line, check=False, env=offline, capture_output=True, text=True, timeout=CONVERSION_TIMEOUT)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise LoadError(f"the tokenizer in {folder} cannot be read: {reason}")


def _config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; special_tokens_map.json overrides it where the config lists no added tokens."""
    config = optional(folder / "tokenizer_config.json")
    older = {} if "added_tokens_decoder" in config else optional(folder / "special_tokens_map.json")
    return config | older


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _content(token: object) -> str:
    return str(token["content"] if isinstance(token, Mapping) else token)


def _special(rust: tokenizers.Tokenizer, config: Mapping[str, Any]) -> list[tokenizers.AddedToken]:
    """The tokens that the config calls special, whatever tokenizer.json says of them."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    named = [token for key, token in config.items() if key.endswith("_token") and isinstance(token, str | Mapping)]
    known = {token.content: token for token in rust.get_added_tokens_decoder().values()}
    contents = map(_content, [*named, *(extra.values() if isinstance(extra, Mapping) else extra)])
    new = tokenizers.AddedToken
    return [known.get(content) or new(content, special=True, normalized=False) for content in contents]


def _cleans_up(rust: tokenizers.Tokenizer, config: Mapping[str, Any]) -> bool:
    forced = config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    wanted = bool(config.get("clean_up_tokenization_spaces", False))
    return wanted and bool(forced or type(rust.model).__name__ != "BPE")


def _byte_ids(rust: tokenizers.Tokenizer) -> frozenset[int]:
    """Ids of <0x00> to <0xFF>, where the decoder takes them for bytes."""
    if "ByteFallback" not in repr(rust.decoder):
        return frozenset()
    ids: Iterable[int | None] = (rust.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(token_id for token_id in ids if token_id is not None)


def _check_messages(messages: object) -> None:
    if not isinstance(messages, list) or not messages:
        raise InvalidInput('messages must be a JSON list, not empty, of {"role": ..., "content": ...}')
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise InvalidInput(f"messages[{number}] must be an object with exactly role and content")
        if message["role"] not in ROLES:
            raise InvalidInput(
                f"messages[{number}].role must be one of {', '.join(ROLES)}, not {message['role']!r:.80}"
            )
        if not isinstance(message["content"], str):
            kind = type(message["content"]).__name__
            raise InvalidInput(f"messages[{number}].content must be a string, not {kind}")


class _Generation(Extension):
    """{% generation %} marks the assistant's words for training; here it only passes them on."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    """What transformers documents for writers of chat templates; sandboxed, since templates come with the weights."""
    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], cache_size=0
    )
    found.filters["tojson"] = _to_json
    found.globals["raise_exception"] = _refuse
    found.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return found


def _to_json(value: object, ensure_ascii: bool = False, **layout: Any) -> str:
    """Unlike jinja's own filter, this one escapes no HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **layout)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
