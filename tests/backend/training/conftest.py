"""An encoder of random weights that the trainings can start from, and one thread."""

import pytest


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """Five layers of BERT; its tokenizer knows the facts' commoner words and all letters."""
    from itertools import islice

    from transformers import BertConfig, BertModel, BertTokenizerFast

    from backend.training.facts import examples

    folder = tmp_path_factory.mktemp("encoder")
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters)]
    tokens += sorted({word for row in islice(examples(9, held_out=False), 200) for word in row.context.lower().split()})
    (folder / "vocab.txt").write_text("\n".join(tokens))
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 5}
    BertModel(BertConfig(vocab_size=len(tokens), max_position_embeddings=512, **sizes)).save_pretrained(folder)
    return folder
