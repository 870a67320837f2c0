"""Encoders as one rank loads them: equal to plain transformers', whole and split, with each head; or refused."""

import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))

from encoder_shards import plain, sharded
from tiny_encoders import write

FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "deberta-v2")
WHOLE = ("modernbert", "mpnet")
BASE, SEQUENCE, MASKED, TOKENS, SPANS = (
    "AutoModel",
    "AutoModelForSequenceClassification",
    "AutoModelForMaskedLM",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
)
OWN = {name: {"type_vocab_size": 1, "max_position_embeddings": 66} for name in ("camembert", "mpnet")}


def noisy(folder, family, auto, **config):
    """A checkpoint of which biases and norms are random too: what is added twice shows."""
    write(folder, family, auto, **(OWN.get(family, {}) | config))
    model = getattr(transformers, auto).from_pretrained(folder)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in {id(value): value for value in model.parameters()}.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    return folder


def changed(cases, folder, key, change):
    """A copy of a checkpoint with other tensors."""
    source, auto = cases[key]
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = change(load_file(source / "model.safetensors"))
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, folder / "model.safetensors")
    return folder, auto


def without(part):
    return lambda old: {name: value for name, value in old.items() if part not in name}


def unusual(cases, root):
    """Checkpoints that hold more, less or other tensors than save_pretrained() writes."""
    table, head, bias = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder", "cls.predictions.bias"
    changes = {
        "tied twice": (MASKED, lambda old: old | {f"{head}.weight": old[table]}),
        "tied by its head's bias": (MASKED, lambda old: without(bias)(old) | {f"{head}.bias": old[bias]}),
        "not tied": (MASKED, lambda old: old | {f"{head}.weight": old[table] * 2}),
        "headless": (SEQUENCE, without("classifier")),
        "unpooled": (BASE, without("pooler")),
        "foreign": (BASE, lambda old: old | {"encoder.layer.0.extra.weight": torch.ones(2)}),
    }
    return {
        ("bert", name): changed(cases, root / name, ("bert", auto), change) for name, (auto, change) in changes.items()
    }


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Folder and class by a name to ask for."""
    root, found = tmp_path_factory.mktemp("encoders"), {}
    for family in (*FAMILIES, *WHOLE):
        for auto in (BASE, SEQUENCE, MASKED) if family in FAMILIES else (BASE, SEQUENCE):
            found[family, auto] = (noisy(root / f"{family}-{auto}", family, auto, num_labels=3), auto)
    for auto in (TOKENS, SPANS):
        found["bert", auto] = (noisy(root / f"bert-{auto}", "bert", auto), auto)
    for auto in (SEQUENCE, MASKED):  # a head that is not wanted
        found["bert", f"{BASE} of {auto}"] = (found["bert", auto][0], BASE)
    return found | unusual(found, root)


@pytest.fixture(scope="module")
def computed(cases):
    """By world, then case: what each rank computed."""
    return {
        world: dict(zip(cases, zip(*sharded([*cases.values()], world), strict=True), strict=True)) for world in (1, 2)
    }


def names(families, autos):
    return [(family, auto) for family in families for auto in autos]


EVERY = [
    *names(FAMILIES, (BASE, SEQUENCE, MASKED)),
    *names(["bert"], (TOKENS, SPANS, f"{BASE} of {SEQUENCE}", f"{BASE} of {MASKED}")),
]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("family", "auto"), EVERY)
def test_a_split_encoder_equals_transformers(cases, computed, family, auto, world):
    expected = plain(*cases[family, auto])
    for made in computed[world][family, auto]:
        assert isinstance(made, torch.Tensor), made
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.01


@pytest.mark.parametrize(("family", "auto"), names(WHOLE, (BASE, SEQUENCE)))
def test_what_cannot_be_split_is_refused_with_the_reason_and_right_when_whole(cases, computed, family, auto):
    torch.testing.assert_close(computed[1][family, auto][0], plain(*cases[family, auto]), rtol=1e-5, atol=1e-5)
    for error in computed[2][family, auto]:
        assert error.startswith(f"{family} cannot be split over 2 ranks: its ")


@pytest.mark.parametrize("world", [1, 2])
def test_ties_are_settled_by_what_the_checkpoint_holds(cases, computed, world):
    expected = plain(*cases["bert", MASKED])
    for made in ("tied twice", "tied by its head's bias"):
        torch.testing.assert_close(computed[world]["bert", made][0], expected, rtol=1e-5, atol=1e-5)
    apart = computed[world]["bert", "not tied"][0]
    torch.testing.assert_close(apart, plain(*cases["bert", "not tied"]), rtol=1e-5, atol=1e-5)
    assert (apart - expected).abs().max() > 0.1


@pytest.mark.parametrize("world", [1, 2])
def test_missing_and_foreign_tensors_are_named(cases, computed, world):
    made = computed[world]
    assert "no tensor for classifier." in made["bert", "headless"][0]
    torch.testing.assert_close(made["bert", "unpooled"][0], plain(*cases["bert", BASE]), rtol=1e-5, atol=1e-5)
    assert "'encoder.layer.0.extra.weight' of the checkpoint has no place" in made["bert", "foreign"][0]
