"""Tiny checkpoints of random weights with a tokenizer of their own, made on the fly."""

from pathlib import Path

TEXT = "the quick brown fox jumps over the lazy dog. Über naïve café 東京 🙂 0123456789 " * 4


def save_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level BPE with <unk>, <s>, </s> as 0, 1, 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: vocab_size - 3]
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}'
    )


def save_llama(folder: Path, vocab_size: int = 300, **changes: object) -> Path:
    """A two-layer Llama in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(
        vocab_size=vocab_size, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**shape, **changes})).save_pretrained(folder)
    save_tokenizer(folder, vocab_size)
    return folder
