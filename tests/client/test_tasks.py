"""The tasks of one answer a request against a fake server: shapes, types, a few rows a request, order, filling."""

import asyncio
import io
from pathlib import Path

import fake_tasks
import numpy as np
import pytest
import tiny_tasks
from fake_triton import Failure, echo, until
from PIL import Image

import client
from client import Answer, DeadlineExceeded, Entity, Filled, InvalidInput, Label, Overloaded, Ranked, ServerError
from client.rows import MOST

ONE_ANSWER = [task for task in client.tasks.TASKS if task not in ("generate", "text_to_image")]


@pytest.fixture(params=["sync", "async"])
def ask(server, request):
    """Call a task of the fake server, blocking or not."""

    def ask(task, *arguments, concurrency=16, **options):
        where = {"host": "127.0.0.1", "port": server.port, "concurrency": concurrency, "timeout": 20}
        server.script = getattr(fake_tasks, task) if server.script is echo else server.script
        if request.param == "sync":
            with client.pipeline(task, **where) as pipe:
                return pipe(*arguments, **options)

        async def session():
            async with client.async_pipeline(task, **where) as pipe:
                return await pipe(*arguments, **options)

        return asyncio.run(session())

    return ask


def asked(server):
    """The tensors of the requests, with their types and shapes."""
    return [
        {name: (received.datatypes[name], array.shape) for name, array in received.inputs.items()}
        for received in server.requests
    ]


def test_embed_one(server, ask):
    vector = ask("embed", "abc")
    assert vector.dtype == np.float32
    assert vector.tolist() == [3, ord("a"), 0.5]
    vector[0] = 1  # it is the caller's own
    assert asked(server) == [{"text": ("BYTES", (1, 1))}]
    assert server.requests[0].model == "embed"


def test_embed_options(server, ask):
    options = {"normalize": False, "truncate": True, "dimensions": 2, "pooling": "cls", "prompt": "é: "}
    assert ask("embed", ["a", "bc"], **options).shape == (2, 2)
    kinds = {"normalize": "BOOL", "truncate": "BOOL", "dimensions": "INT32", "pooling": "BYTES", "prompt": "BYTES"}
    assert asked(server) == [{"text": ("BYTES", (2, 1))} | {name: (kind, (2, 1)) for name, kind in kinds.items()}]
    assert server.requests[0].inputs["prompt"].tolist() == [["é: ".encode()]] * 2
    assert server.requests[0].inputs["dimensions"].tolist() == [[2], [2]]


def test_options_of_none_are_the_models(server, ask):
    ask("embed", "a", dimensions=None, timeout=None)
    assert asked(server) == [{"text": ("BYTES", (1, 1))}]


@pytest.mark.parametrize("count", [1, MOST, MOST + 1, 5 * MOST - 1])
@pytest.mark.parametrize("concurrency", [1, 16])
def test_long_lists_are_cut_and_joined_in_order(server, ask, count, concurrency):
    texts = ["x" * (1 + at) for at in range(count)]
    vectors = ask("embed", texts, dimensions=1, concurrency=concurrency)
    assert vectors.tolist() == [[1 + at] for at in range(count)]
    sizes = sorted(shapes["text"][1][0] for shapes in asked(server))
    assert sizes == sorted([min(MOST, count - start) for start in range(0, count, MOST)])
    assert all(shapes["dimensions"][1] == shapes["text"][1] for shapes in asked(server))


def test_long_lists_are_sent_by_length_and_come_back_in_order(server, ask):
    texts = ["x" * (1 + at * 37 % (2 * MOST)) + f" {at}" for at in range(2 * MOST)]
    assert [found[0].label for found in ask("classify", texts)] == texts
    ends = [{len(text) for (text,) in received.inputs["text"].tolist()} for received in server.requests]
    first, last = sorted(ends, key=max)
    assert max(first) <= min(last) + 1


def test_empty_lists_ask_nothing(server, ask):
    assert ask("embed", []).shape == (0, 0)
    for task in ("classify", "token_classification", "fill_mask"):
        assert ask(task, []) == []
    assert ask("qa", [], []) == []
    assert ask("zero_shot_image", [], ["a"]) == []
    assert not server.requests


def test_classify(server, ask):
    assert ask("classify", "good", top_k=2, raw_scores=True) == [Label("good", 0.75), Label("other", 0.25)]
    assert asked(server)[0] == {"text": ("BYTES", (1, 1)), "top_k": ("INT32", (1, 1)), "raw_scores": ("BOOL", (1, 1))}


def test_filled_labels_are_dropped(ask):
    assert ask("classify", ["a", "b"]) == [[Label("a", 0.75), Label("other", 0.25)], [Label("b", 0.75)]]


def test_classify_pairs(server, ask):
    assert ask("classify", ("a", "b")) == [Label("a", 0.75), Label("b", 0.25)]
    assert len(ask("classify", [("a", "b"), ("c", "d"), ("e", "f")])) == 3
    assert asked(server)[1] == {"text": ("BYTES", (3, 1)), "text_pair": ("BYTES", (3, 1))}


def test_qa(server, ask):
    answer = Answer("Ada", 0.5, 0, 3)
    assert ask("qa", question="who?", context="Ada did") == answer
    assert ask("qa", question="who?", context="Ada", top_k=2, doc_stride=9) == [answer]
    assert asked(server)[1] == {
        "question": ("BYTES", (1, 1)), "context": ("BYTES", (1, 1)), "top_k": ("INT32", (1, 1)),
        "doc_stride": ("INT32", (1, 1)),
    }  # fmt: skip


def test_qa_lists(server, ask):
    assert [found.answer for found in ask("qa", ["a?", "b?"], ["x y", "z"])] == ["x", "z"]
    assert [found.answer for found in ask("qa", "a?", ["x y", "z"])] == ["x", "z"]
    assert [found.answer for found in ask("qa", ["a?", "b?"], "x y")] == ["x", "x"]
    found = ask("qa", ["a?", "b?"], ["x y", "z"], top_k=3)
    assert [[answer.answer for answer in answers] for answers in found] == [["x", "y"], ["z"]]
    with pytest.raises(InvalidInput, match="2 questions but 1 contexts"):
        ask("qa", ["a?", "b?"], ["x"])


def test_qa_without_any_answer_is_an_error(server, ask):
    def script(received):
        yield {"answer": [""], "score": np.zeros((1, 1), np.float32)} | dict.fromkeys(
            ("start", "end"), np.array([[-1]], np.int32)
        )

    server.script = script
    with pytest.raises(ServerError, match="no answer"):
        ask("qa", "a?", "b")


def test_rerank(server, ask):
    texts = ["bb", "a", "ccc"]
    assert ask("rerank", "q", texts) == [Ranked(2, 3.0, "ccc"), Ranked(0, 2.0, "bb"), Ranked(1, 1.0, "a")]
    assert ask("rerank", "q", texts, top_k=1, raw_scores=True) == [Ranked(2, 3.0, "ccc")]
    assert asked(server)[1] == {
        "query": ("BYTES", (1, 1)), "texts": ("BYTES", (1, 3)), "top_k": ("INT32", (1, 1)),
        "raw_scores": ("BOOL", (1, 1)),
    }  # fmt: skip
    for wrong in ([], "text"):
        with pytest.raises(InvalidInput, match="texts"):
            ask("rerank", "q", wrong)


def test_rerank_refuses_a_place_that_was_not_asked_about(server, ask):
    server.script = lambda received: iter([{"index": [5], "score": np.ones((1, 1), np.float32)}])
    with pytest.raises(ServerError, match="text 5 of 1"):
        ask("rerank", "q", ["a"])


def test_token_classification(server, ask):
    found = ask("token_classification", ["by Ada and Grace", "nobody"], aggregation="simple")
    assert found == [[Entity("PER", 0.5, "Ada", 3, 6), Entity("PER", 0.5, "Grace", 11, 16)], []]
    assert ask("token_classification", "nobody") == []  # the tensors are [1, 0]
    assert asked(server)[0] == {"text": ("BYTES", (2, 1)), "aggregation": ("BYTES", (2, 1))}


def test_fill_mask(server, ask):
    assert ask("fill_mask", "a [MASK]", top_k=2) == [Filled("", 0.5, 0, "a [MASK]")]
    assert [each[0].sequence for each in ask("fill_mask", ["a", "b"])] == ["a", "b"]
    assert asked(server)[0] == {"text": ("BYTES", (1, 1)), "top_k": ("INT32", (1, 1))}


def test_zero_shot_image(server, ask, tmp_path):
    image = Image.new("RGB", (2, 2), "red")
    image.save(tmp_path / "x.png")
    data = (tmp_path / "x.png").read_bytes()
    labels = [Label("dog", 0.5), Label("cat", 0.5)]
    for given in (str(tmp_path / "x.png"), tmp_path / "x.png", data, image):
        assert ask("zero_shot_image", given, ["cat", "dog"]) == labels
        assert server.requests[-1].inputs["image"].item() == data
    assert ask("zero_shot_image", [data, image], ["cat", "dog"], hypothesis_template="a {}") == [labels, labels]
    assert asked(server)[-1] == {
        "image": ("BYTES", (2, 1)), "labels": ("BYTES", (2, 2)), "hypothesis_template": ("BYTES", (2, 1)),
    }  # fmt: skip
    for wrong in ("/nowhere.png", 3, [3]):
        with pytest.raises(InvalidInput, match="image"):
            ask("zero_shot_image", wrong, ["cat"])
    for wrong in ([], [""], "cat"):
        with pytest.raises(InvalidInput, match="labels"):
            ask("zero_shot_image", data, wrong)


def test_zero_shot_images_as_pixels(server, ask):
    """Arrays of two or three dimensions are one image each, of four a list of them."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    labels = [Label("dog", 0.5), Label("cat", 0.5)]

    def seen():
        files = server.requests[-1].inputs["image"].reshape(-1)
        return [np.asarray(Image.open(io.BytesIO(file))) for file in files]

    for one in (pixels[0], pixels[0, ..., 0], pixels[0, :, ::2]):
        assert ask("zero_shot_image", one, ["cat", "dog"]) == labels
        np.testing.assert_array_equal(seen(), [one])
    for several in ([*pixels], pixels):
        assert ask("zero_shot_image", several, ["cat", "dog"]) == [labels] * 3
        np.testing.assert_array_equal(seen(), pixels)
    asked = len(server.requests)
    for wrong in (pixels[0] / 255, pixels[0, ..., :2], [pixels], pixels[0, 0, 0], pixels[0, :0]):
        with pytest.raises(InvalidInput, match="image must be"):
            ask("zero_shot_image", wrong, ["cat"])
    assert len(server.requests) == asked


@pytest.mark.parametrize(
    ("arguments", "options", "named"),
    [
        (("embed", 3), {}, "text must be a string"),
        (("embed", ["a", None]), {}, "text 1 must be a string"),
        (("embed", "\ud800"), {}, "surrogate"),
        (("embed", "a"), {"dimensions": "2"}, "dimensions must be a whole number"),
        (("embed", "a"), {"truncate": 1}, "truncate must be True or False"),
        (("embed", "a"), {"normalise": True}, "'normalise'; known: normalize"),
        (("classify", ["a", ("b", "c")]), {}, "not both"),
        (("classify", ("a", "b", "c")), {}, "two texts"),
        (("classify", "a"), {"top_k": 2**31}, "top_k must be from"),
        (("qa", "a?", 3), {}, "context must be a string"),
        (("fill_mask", {"a": 1}), {}, "text must be a string"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked(server, ask, arguments, options, named):
    with pytest.raises(InvalidInput, match=named):
        ask(*arguments, **options)
    assert not server.requests


@pytest.mark.parametrize("task", ONE_ANSWER)
def test_an_answer_of_another_kind_is_refused(server, ask, task):
    server.script = lambda received: iter([{"text_output": ["hello"]}])
    with pytest.raises(ServerError, match="another task"):
        ask(task, *tiny_tasks.arguments(task))


def test_exactly_one_answer_is_taken():
    class Silent:
        def infer(self, request, limits):
            yield from ()

        def close(self):
            pass

    with client.pipeline("embed", transport=Silent()) as pipe, pytest.raises(ServerError, match="0 answers"):
        pipe("a")


def test_an_answer_of_too_few_rows_is_refused(server, ask):
    server.script = lambda received: iter([{"embedding": np.zeros((1, 3), np.float32)}])
    with pytest.raises(ServerError, match="1 rows of embedding, not 2"):
        ask("embed", ["a", "b"])


def test_vectors_of_two_lengths_are_refused(server, ask):
    def script(received):
        count = len(received.inputs["text"])
        yield {"embedding": np.zeros((count, 3 if count == MOST else 4), np.float32)}

    server.script = script
    with pytest.raises(ServerError, match="length"):
        ask("embed", ["a"] * (MOST + 1))


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("InvalidInput: the text has 600 tokens", InvalidInput),
        ("[request id: <id_unknown>] Exceeds maximum queue size", Overloaded),
        ("[request id: <id_unknown>] Request timeout expired", DeadlineExceeded),
    ],
)
def test_a_servers_error_is_ours(server, ask, said, kind):
    server.script = lambda received: iter([said])
    with pytest.raises(kind):
        ask("embed", ["a"] * (MOST + 1))


@pytest.mark.parametrize(("message", "tries"), [("EngineDown: restarting", 3), ("Exceeds maximum queue size", 3),
                                                ("Request timeout expired", 1)])  # fmt: skip
def test_what_is_tried_again(server, ask, message, tries):
    def script(received):
        if len(server.requests) < 3:
            raise Failure("UNAVAILABLE", message)
        yield from fake_tasks.embed(received)

    server.script = script
    if tries == 3:
        assert ask("embed", "a").shape == (3,)
    else:
        with pytest.raises(DeadlineExceeded, match="expired"):
            ask("embed", "a")
    assert len(server.requests) == tries


def test_tasks_of_one_answer_are_not_streamed(server, ask):
    ask("embed", "a")
    assert not server.requests[0].streamed
    server.script = lambda received: echo(received)
    ask("generate", "a")
    assert server.requests[1].streamed


def test_a_late_answer_is_waited_for_no_longer(server, ask):
    server.script = lambda received: iter([received.gone.wait(15)][:0])
    with pytest.raises(DeadlineExceeded, match=r"0\.3 s; raise timeout="):
        ask("embed", "a", timeout=0.3)
    assert until(server.requests[0].gone.is_set)


def test_one_failed_request_fails_its_list(server, ask):
    def script(received):
        if len(received.inputs["text"]) < MOST:
            raise Failure("INVALID_ARGUMENT", "InvalidInput: the last text")
        yield from fake_tasks.embed(received)

    server.script = script
    with pytest.raises(InvalidInput, match="the last text"):
        ask("embed", ["a"] * (2 * MOST + 1))


def test_every_task_is_there_twice():
    from client.tasks import ASYNC_TASKS, TASKS

    assert [*TASKS] == [*ASYNC_TASKS]
    assert [kind.__name__ for kind in ASYNC_TASKS.values()] == [f"Async{kind.__name__}" for kind in TASKS.values()]
    assert all((Path(client.__file__).parent / f"{task}.py").exists() for task in TASKS)
