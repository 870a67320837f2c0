"""What a Triton with the tasks of one answer a request would say, computed from the inputs alone."""

from __future__ import annotations

import numpy as np

WIDTH = 3


def embed(received):
    """The text's length, its first character and 0.5; as many numbers as asked for."""
    texts = [text.decode() for text in received.inputs["text"].reshape(-1)]
    width = int(received.inputs["dimensions"][0, 0]) if "dimensions" in received.inputs else WIDTH
    vectors = np.array([[len(text), ord(text[0]), 0.5] for text in texts], np.float32)[:, :width]
    yield {"embedding": vectors, "num_tokens": np.array([[len(text)] for text in texts], np.int32)}


def classify(received):
    """Each text is a label itself, and so is its pair; the odd rows lack the second one."""
    rows = received.inputs["text"].reshape(-1)
    pairs = received.inputs["text_pair"].reshape(-1) if "text_pair" in received.inputs else [b"other"] * len(rows)
    second = [pair if at % 2 == 0 else b"" for at, pair in enumerate(pairs)]
    scores = np.array([[0.75, 0.25 if at % 2 == 0 else 0] for at in range(len(rows))], np.float32)
    yield {"label": np.array([*zip(rows, second, strict=True)], np.object_).reshape(-1, 2), "score": scores}


def qa(received):
    """The context's first words, from the left; the second one is filling where the context has one only."""
    found = [context.decode().split(" ") for context in received.inputs["context"].reshape(-1)]
    width = int(received.inputs["top_k"][0, 0]) if "top_k" in received.inputs else 1
    rows = [[(word, 0.5, at, at + len(word)) for at, word in enumerate(words)][:width] for words in found]
    yield _columns(rows, width, ("", 0.0, -1, -1), answer=None, score=np.float32, start=np.int32, end=np.int32)


def rerank(received):
    """Longer texts fit better; the last place is filling."""
    texts = received.inputs["texts"][0]
    order = sorted(range(len(texts)), key=lambda at: -len(texts[at]))
    if "top_k" in received.inputs:
        order = order[: int(received.inputs["top_k"].item())]
    rows = [[(at, float(len(texts[at]))) for at in order]]
    yield _columns(rows, len(order) + 1, (-1, 0.0), index=np.int32, score=np.float32)


def token_classification(received):
    """Words with a capital."""
    rows = []
    for text in (text.decode() for text in received.inputs["text"].reshape(-1)):
        starts = [at for at, letter in enumerate(text) if letter.isupper()]
        words = [text[at:].split(" ")[0] for at in starts]
        rows.append([("PER", 0.5, word, at, at + len(word)) for at, word in zip(starts, words, strict=True)])
    width = max(map(len, rows))
    yield _columns(
        rows, width, ("", 0.0, "", -1, -1), entity=None, score=np.float32, word=None, start=np.int32, end=np.int32
    )


def fill_mask(received):
    """One token a text, though two were asked for; the token's text is empty."""
    rows = [[("", 0.5, at, text.decode())] for at, text in enumerate(received.inputs["text"].reshape(-1))]
    yield _columns(rows, 2, ("", 0.0, -1, ""), token_str=None, score=np.float32, token=np.int32, sequence=None)


def zero_shot_image(received):
    """The labels from behind."""
    labels = received.inputs["labels"][:, ::-1]
    yield {"label": labels, "score": np.full(labels.shape, 0.5, np.float32)}


def text_to_image(received):
    """One red image of the size asked for."""
    from io import BytesIO

    from PIL import Image

    count = int(received.inputs["num_images_per_prompt"].item()) if "num_images_per_prompt" in received.inputs else 1
    file = BytesIO()
    Image.new("RGB", (4, 2), "red").save(file, "png")
    yield {
        "image": np.array([[file.getvalue()] * count], np.object_),
        "seed": np.array([[*range(7, 7 + count)]], np.uint64),
        "height": np.array([[2]], np.int32),
        "width": np.array([[4]], np.int32),
        "nsfw_content_detected": np.array([[False] * count]),
    }


def _columns(rows, width, filling, **types):
    """Rows of tuples as one array for each of their values."""
    full = [[*row, *[filling] * (width - len(row))] for row in rows]
    return {
        name: np.array(
            [[value[at] if dtype else value[at].encode() for value in row] for row in full], dtype or np.object_
        )
        for at, (name, dtype) in enumerate(types.items())
    }
