"""embed against sentence-transformers and transformers, on the real MiniLM and on tiny random models."""

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))

import transformers
from serving_tasks import served
from tiny_encoders import save_tokenizer, write

from backend import samples
from backend.config import EngineConfig
from backend.errors import InvalidInput, LoadError
from backend.tasks.embed import Embed, pool, without_prompts
from backend.tasks.task import decode

TEXTS = [
    "A",
    "",
    "That is a happy person",
    "That is a very happy person",
    "Der schnelle braune Fuchs springt über den faulen Hund; Straße, Übermut, naïve café.",
    "東京は日本の首都です。人口は約1400万人。",
    "Привет, мир! Как дела сегодня?",
    "مرحبا بالعالم",
    "🙂🙃 emoji \t and\n lines   and  spaces ",
    "x" * 300,
    "the quick brown fox " * 40,
    "a longer text about rivers, and some " * 100,
    *(f"number {n} " * n for n in range(1, 40, 3)),
]


def ask(service, texts, **options):
    return service(*({"text": text.encode(), **options} for text in texts))


@pytest.fixture
def serving():
    """Services by folder, closed at the end."""
    with ExitStack() as opened:
        yield lambda folder, **settings: opened.enter_context(served("embed", folder, **settings))


@pytest.fixture(scope="module")
def minilm():
    return samples.fetch("embed")


def sentence(folder):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


def test_the_real_model_gives_sentence_transformers_vectors(serving, minilm):
    service, reference = serving(minilm), sentence(minilm)
    made = ask(service, TEXTS)
    np.testing.assert_allclose(made["embedding"], reference.encode(TEXTS), atol=1e-4)
    assert made["embedding"][2] @ made["embedding"][3] == pytest.approx(0.943, abs=5e-4)
    lengths = [int(mask.sum()) for mask in reference.preprocess(TEXTS)["attention_mask"]]
    assert made["num_tokens"][:, 0].tolist() == lengths
    for text, row in zip(TEXTS[:6], made["embedding"][:6], strict=True):  # alone as in company
        np.testing.assert_allclose(ask(service, [text])["embedding"][0], row, atol=1e-5)
    whole = ask(service, TEXTS[2:4], normalize=False)["embedding"]
    short = ask(service, TEXTS[2:4], dimensions=7)["embedding"]
    np.testing.assert_allclose(short, whole[:, :7] / np.linalg.norm(whole[:, :7], axis=1, keepdims=True), atol=1e-6)
    with pytest.raises(InvalidInput, match="the text has 702 tokens, the model takes 256"):
        ask(service, ["word " * 700], truncate=False)


POOLINGS = {"mean": "mean", "cls": "cls", "max": "max", "last": "lasttoken"}


def sentence_folder(folder, kind="mean", normalize=True, dense=(), **general):
    """A tiny folder as sentence-transformers saves it."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    write(folder / "plain", "bert", "AutoModel")
    include = general.pop("include_prompt", True)
    body = Transformer(str(folder / "plain"))
    modules = [body, Pooling(32, pooling_mode=POOLINGS[kind], include_prompt=include), *dense]
    if normalize:
        from sentence_transformers.base.modules import Normalize

        modules.append(Normalize())
    SentenceTransformer(modules=modules, device="cpu", **general).save(str(folder / "saved"))
    return folder / "saved"


SENTENCES = ["the quick brown fox", "Über naïve cafés", "a", "Berlin writes to the United Nations " * 12]


def vectors(task, folder, rows):
    """Through the CPU half, and the device half over the plain model, without a rank."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    items = [task.parse(row) for row in rows]
    pieces = [own[0] for own in task.prepare(items)]
    batch = task.batch(pieces)
    mask = torch.tensor(np.arange(batch.lengths.max()) < batch.lengths[:, None]).long()
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    ids[mask.bool()] = torch.tensor(batch.input_ids).long()
    with torch.inference_mode():
        answers = Embed.forward(model(input_ids=ids, attention_mask=mask), batch, mask).numpy()
    finish = zip(items, pieces, answers, strict=True)
    return task.outputs([task.finish(item, [piece], [answer]) for item, piece, answer in finish])["embedding"]


def rows(texts=SENTENCES, **options):
    return [{"text": text.encode(), **options} for text in texts]


@pytest.mark.parametrize("kind", POOLINGS)
@pytest.mark.parametrize("normalize", [True, False])
def test_pooling_and_normalising_are_as_the_folder_says(tmp_path, kind, normalize):
    folder = sentence_folder(tmp_path, kind, normalize)
    task = Embed(folder, EngineConfig(model=str(folder)))
    np.testing.assert_allclose(vectors(task, folder, rows()), sentence(folder).encode(SENTENCES), atol=1e-5)


@pytest.mark.parametrize("include_prompt", [True, False])
def test_prompts_by_name_as_text_and_by_default(tmp_path, include_prompt):
    prompts = {"query": "the lazy dog: ", "passage": "a movie "}
    folder = sentence_folder(
        tmp_path, prompts=prompts, default_prompt_name="query", include_prompt=include_prompt, normalize=False
    )
    task, reference = Embed(folder, EngineConfig(model=str(folder))), sentence(folder)
    texts = SENTENCES[:3]
    for options, given in (
        ({}, {}),
        ({"prompt": b"passage"}, {"prompt_name": "passage"}),
        ({"prompt": b"over Japan "}, {"prompt": "over Japan "}),
        ({"prompt": b""}, {"prompt": ""}),
    ):
        expected = reference.encode(texts, **given)
        np.testing.assert_allclose(vectors(task, folder, rows(texts, **options)), expected, atol=1e-5)


def test_dense_layers_and_a_stated_length_of_vectors(tmp_path):
    from sentence_transformers.base.modules import Dense

    torch.manual_seed(5)
    dense = [Dense(32, 48), Dense(48, 24, bias=False, activation_function=torch.nn.Identity())]
    folder = sentence_folder(tmp_path, normalize=False, dense=dense, truncate_dim=9)
    task = Embed(folder, EngineConfig(model=str(folder)))
    expected = sentence(folder).encode(SENTENCES)
    assert expected.shape == (4, 9)
    np.testing.assert_allclose(vectors(task, folder, rows()), expected, atol=1e-5)
    assert vectors(task, folder, rows(dimensions=24)).shape == (4, 24)
    with pytest.raises(InvalidInput, match="dimensions must be from 1 to 24"):
        task.parse(rows(dimensions=25)[0])


def rewrite(folder, name, change):
    file = folder / name
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(change(content)))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("modules.json", lambda old: [*old, {"type": "st.models.LSTM", "path": "3"}], "a module LSTM"),
        ("modules.json", lambda old: old[:1], "this order of modules"),
        ("modules.json", lambda old: [old[0], old[2], old[1]], "this order of modules"),
        ("modules.json", lambda old: [old[0] | {"path": "0_Transformer"}, *old[1:]], "0_Transformer"),
        ("modules.json", lambda old: [{"type": "st.StaticEmbedding", "path": ""}], "StaticEmbedding"),
        ("modules.json", lambda old: [old[0], old[1] | {"path": "../1_Pooling"}, old[2]], "leads out"),
        ("modules.json", lambda old: [*old[:2], {"type": "st.Dense", "path": "/etc"}, old[2]], "leads out"),
        ("modules.json", lambda old: [old[0], {"type": "st.Pooling"}, old[2]], "each module's type and path"),
        ("modules.json", lambda old: ["Transformer"], "each module's type and path"),
        ("modules.json", lambda old: [old[0], old[1] | {"path": ["1_Pooling"]}], "each module's type and path"),
        ("1_Pooling/config.json", lambda old: {"pooling_mode": ["mean", "max"]}, "mean and max"),
        ("1_Pooling/config.json", lambda old: {"pooling_mode_weightedmean_tokens": True}, "weightedmean"),
        ("sentence_bert_config.json", lambda old: {"transformer_task": "fill-mask"}, "last hidden state"),
    ],
)
def test_what_is_not_honoured_is_refused_at_load(tmp_path, name, change, words):
    folder = sentence_folder(tmp_path)
    rewrite(folder, name, change)
    with pytest.raises(LoadError, match=words):
        Embed(folder, EngineConfig(model=str(folder)))


def test_older_folders_state_length_case_and_pooling_their_own_way(tmp_path):
    folder = sentence_folder(tmp_path)
    rewrite(folder, "sentence_bert_config.json", lambda old: {"max_seq_length": 9, "do_lower_case": True})
    rewrite(
        folder, "1_Pooling/config.json", lambda old: {"pooling_mode_cls_token": True, "word_embedding_dimension": 32}
    )
    task = Embed(folder, EngineConfig(model=str(folder)))
    assert (task.longest, task.pooling.kind, task.pooling.lower) == (9, "cls", True)
    np.testing.assert_allclose(vectors(task, folder, rows()), sentence(folder).encode(SENTENCES), atol=1e-5)
    assert Embed(folder, EngineConfig(model=str(folder), max_model_len=20)).longest == 20


def test_a_decoder_embeds_by_its_last_token(serving, tmp_path):
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    size = save_tokenizer(tmp_path, "roberta", padding_side="left")  # which is not how it is padded here
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=size, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, **shape
    )
    transformers.Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    model = transformers.AutoModel.from_pretrained(tmp_path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    made = ask(serving(tmp_path), SENTENCES)["embedding"]
    for text, vector in zip(SENTENCES, made, strict=True):
        with torch.inference_mode():
            given = tokenizer(text, return_tensors="pt", truncation=True, max_length=64)
            last = model(**given).last_hidden_state[0, -1]
        np.testing.assert_allclose(vector, last / last.norm(), atol=1e-5)


def test_each_row_may_pool_in_its_own_way():
    hidden = torch.randn(4, 5, 3)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]])
    kinds = ["mean", "last", "max", "cls"]

    batch = SimpleNamespace(options=[{"pooling": kind, "skip": 1} for kind in kinds])
    output = SimpleNamespace(last_hidden_state=hidden)
    made = Embed.forward(output, batch, mask)
    expected = [hidden[0, 1:3].mean(0), hidden[1, 4], hidden[2, 0], hidden[3, 1]]
    torch.testing.assert_close(made, torch.stack(expected))
    assert without_prompts(mask, [0, 0, 0, 0]) is mask
    torch.testing.assert_close(pool(hidden, mask, "cls"), hidden[:, 0])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({}, "text is missing"),
        ({"text": b"\xff"}, "text is not valid UTF-8"),
        ({"text": b"a", "pooling": b"sum"}, "pooling must be one of mean, cls, last, max, not 'sum'"),
        ({"text": b"a", "dimensions": 0}, "dimensions must be from 1 to 32, not 0"),
        ({"text": b"a", "prompt": b"\xff"}, "prompt is not valid UTF-8"),
    ],
)
def test_bad_values_are_named(tmp_path, row, words):
    write(tmp_path, "bert", "AutoModel")
    with pytest.raises(InvalidInput, match=words):
        Embed(tmp_path, EngineConfig(model=str(tmp_path))).parse(row)
    assert decode("text", "name") == "text"


def test_rows_of_different_dimensions_do_not_make_one_tensor(tmp_path):
    folder = write(tmp_path, "bert", "AutoModel")
    task = Embed(folder, EngineConfig(model=str(folder)))
    with pytest.raises(InvalidInput, match="dimensions must be the same"):
        vectors(task, folder, [*rows(["a"], dimensions=3), *rows(["a"])])
