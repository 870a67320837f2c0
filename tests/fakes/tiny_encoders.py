"""Tiny encoders of random weights with any of transformers' heads, and a tokenizer made on the spot."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

TEXT = """
The quick brown fox jumps over the lazy dog while Anna Smith of Berlin writes to the United Nations about rivers.
Über naïve cafés in São Paulo: 東京 is the capital of Japan, isn't it? 0123456789
good bad great awful (film), "plot"; a-b.
I loved the wonderful movie. She hated that boring, terrible book! What is the answer? Nobody knows.
"""
WORDPIECE = ("bert", "distilbert", "deberta-v2", "electra")
BPE = ("roberta", "xlm-roberta", "modernbert")
FAMILIES = WORDPIECE + BPE

SEQUENCE = "AutoModelForSequenceClassification"

_WORDPIECE_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_BPE_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # roberta's numbers: its padding is 1

_SHAPE = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
    type_vocab_size=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3,
)  # fmt: skip
_OWN: dict[str, dict[str, Any]] = {
    "distilbert": dict(dim=32, hidden_dim=64, n_layers=2, n_heads=4, initializer_range=0.3, max_position_embeddings=64),
    "roberta": _SHAPE | dict(type_vocab_size=1, max_position_embeddings=66),
    "xlm-roberta": _SHAPE | dict(type_vocab_size=1, max_position_embeddings=66),
    "electra": _SHAPE | dict(embedding_size=16),
    "deberta-v2": _SHAPE
    | dict(relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, norm_rel_ebd="layer_norm")
    | dict(share_att_key=True, position_biased_input=False, type_vocab_size=0),
    "modernbert": dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64,
        local_attention=16, initializer_range=0.3, reference_compile=False,
    ),
}  # fmt: skip


def write(
    folder: Path,
    family: str = "bert",
    auto: str = SEQUENCE,
    vocab_size: int = 400,
    **config: Any,
) -> Path:
    """A checkpoint in float32 as save_pretrained() writes it, with its tokenizer; 64 tokens long.

    `config` are fields of the model's configuration: num_labels, id2label, problem_type, ...
    """
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    size = save_tokenizer(folder, family, vocab_size)
    made = transformers.AutoConfig.for_model(
        family, **{**_OWN.get(family, _SHAPE), **_ids(family), "vocab_size": size, **config}
    )
    torch.manual_seed(0)
    getattr(transformers, auto).from_config(made, dtype=torch.float32).eval().save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path, family: str = "bert", vocab_size: int = 400, **settings: Any) -> int:
    """WordPiece or byte-level BPE, as the family has it; the size of its vocabulary. `settings` go in its config."""
    make = _wordpiece if family in WORDPIECE else partial(_bpe, pairs=2 if family != "modernbert" else 1)
    tokenizer = make(vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    pad, unk, cls, sep, mask = _named(family)
    named = dict(pad_token=pad, unk_token=unk, cls_token=cls, sep_token=sep, mask_token=mask)
    taken = ["input_ids", "token_type_ids", "attention_mask"]
    if family not in ("bert", "electra", "deberta-v2"):
        taken.remove("token_type_ids")
    stated = dict(tokenizer_class="PreTrainedTokenizerFast", model_max_length=64, model_input_names=taken)
    (folder / "tokenizer_config.json").write_text(json.dumps({**stated, **named, **settings}))
    return int(tokenizer.get_vocab_size())


def _named(family: str) -> list[str]:
    """Padding, unknown, first, separating, mask."""
    if family in WORDPIECE:
        return _WORDPIECE_SPECIAL
    first, pad, last, unknown, mask = _BPE_SPECIAL
    return [pad, unknown, first, last, mask]


def _ids(family: str) -> dict[str, int]:
    if family in WORDPIECE:
        return dict(pad_token_id=0)
    ids = dict(pad_token_id=1, bos_token_id=0, eos_token_id=2)
    return ids | (dict(cls_token_id=0, sep_token_id=2) if family == "modernbert" else {})


def _wordpiece(vocab_size: int) -> Any:
    """Not trained: WordPiece's trainer breaks ties at random."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = [word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(TEXT))]
    letters = sorted(set("".join(words)))
    parts = [
        part for word in words for part in ([word] if len(word) % 2 or len(word) < 4 else [word[:3], "##" + word[3:]])
    ]
    tokens = [*_WORDPIECE_SPECIAL, *letters, *("##" + letter for letter in letters), *parts]
    vocab = {token: number for number, token in enumerate([*dict.fromkeys(tokens)][:vocab_size])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def _bpe(vocab_size: int, pairs: int) -> Any:
    """`pairs`: separators between two texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=_BPE_SPECIAL, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A " + "</s> " * pairs + "$B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer
