"""Every input and output of generate over plain gRPC: shapes, types, rows, and one final flag for each request."""

import json

import numpy as np
import pytest
from serving import answers, finals, request

pytestmark = pytest.mark.server

ALL = {f"return_{name}": True for name in
       ("finish_reason", "num_input_tokens", "num_output_tokens", "cumulative_logprob", "logprobs")}  # fmt: skip
OUTPUTS = {"text_output": object, "index": np.int32, "finish_reason": object, "num_input_tokens": np.uint32,
           "num_output_tokens": np.uint32, "cumulative_logprob": np.float32, "logprobs": object}  # fmt: skip
THREE = np.array([[b"the quick"], ["日本 🙂".encode()], [b"fox"]], object)
GREEDY = {"max_tokens": 6, "temperature": 0.0, "exclude_input_in_output": True}


def rows(value, count=3):
    """One value for each of several prompts."""
    return np.tile(np.array([[value]], {bool: np.bool_, float: np.float32, int: np.int32}[type(value)]), (count, 1))


def one(served, *given, **tensors):
    """The only response to a request, without its id."""
    (answer,) = answers(served.ask(request("tiny", *given, **tensors)))
    answer.pop("id")
    return answer


def test_only_what_is_asked_for(served):
    answer = one(served, "the quick", max_tokens=3)
    assert set(answer) == {"text_output", "index"}
    for name in ALL:
        assert set(one(served, "the quick", max_tokens=3, **{name: True})) == {*answer, name.removeprefix("return_")}


@pytest.mark.parametrize("stream", [False, True])
def test_every_output_has_its_type_and_shape(served, stream):
    found = answers(served.ask(request("tiny", "the quick brown", stream=stream, max_tokens=9, seed=3, **ALL)))
    assert len(found) > 1 if stream else len(found) == 1
    for answer in found:
        answer.pop("id")
        assert {name: array.dtype for name, array in answer.items()} == {n: np.dtype(t) for n, t in OUTPUTS.items()}
        assert {array.shape for array in answer.values()} == {(1, 1)}
    entries = [entry for answer in found for entry in json.loads(answer["logprobs"].item())]
    assert [set(entry) for entry in entries] == [{"token_id", "token", "logprob"}] * 9
    assert sum(entry["logprob"] for entry in entries) == pytest.approx(found[-1]["cumulative_logprob"].item(), abs=1e-4)
    assert sum(answer["num_output_tokens"].item() for answer in found) == 9
    assert [answer["finish_reason"].item() for answer in found] == [""] * (len(found) - 1) + ["length"]
    assert all(entry["logprob"] < 0 for entry in entries)


def test_several_prompts_in_one_request(served):
    """Each row as if it were alone, with its own sampling; rows by index."""
    sampling = {
        "max_tokens": np.array([[4], [7], [5]], np.int32),
        "temperature": np.array([[0.0], [0.8], [1.2]], np.float32),
        "seed": np.array([[0], [5], [6]], np.uint64),
        "exclude_input_in_output": rows(True),
    }
    together = one(served, text_input=THREE, **sampling, **{name: rows(True) for name in ALL})
    assert {array.shape for array in together.values()} == {(3, 1)}
    assert together["index"].tolist() == [[0], [1], [2]]
    assert together["num_output_tokens"].tolist() == [[4], [7], [5]]
    for row in range(3):
        mine = {name: array[row : row + 1] for name, array in sampling.items()}
        alone = one(served, text_input=THREE[row : row + 1], **mine, **ALL)
        for name in ("text_output", "num_input_tokens", "finish_reason"):
            assert alone[name][0] == together[name][row]


def test_several_prompts_streamed(served):
    """Rows of the sequences that have news: joined by index they are the whole."""
    given = {"text_input": THREE, "max_tokens": rows(8), "temperature": rows(0.0)}
    whole = one(served, **given, exclude_input_in_output=rows(True))["text_output"].reshape(-1).tolist()
    joined = ["", "", ""]
    for answer in answers(served.ask(request("tiny", **given, stream=rows(True)))):
        for index, text in zip(answer["index"].reshape(-1), answer["text_output"].reshape(-1), strict=True):
            joined[index] += text
    assert joined == whole


def test_samples(served):
    """n samples of each prompt, numbered prompt x n + sample; the first is what n = 1 gives."""
    two = np.array([[b"the"], [b"quick"]], object)
    seeds = np.array([[1], [2]], np.uint64)
    given = {"max_tokens": rows(6, 2), "seed": seeds, "exclude_input_in_output": rows(True, 2)}
    answer = one(served, text_input=two, n=rows(3, 2), **given)
    texts = answer["text_output"].reshape(2, 3)
    assert answer["index"].reshape(-1).tolist() == [*range(6)]
    assert [len(set(samples)) for samples in texts] == [3, 3]
    assert one(served, text_input=two, **given)["text_output"].reshape(-1).tolist() == texts[:, 0].tolist()


def test_echo_of_the_prompt(served):
    bare = one(served, "日本 🙂", **GREEDY)["text_output"].item()
    for echo in ({}, {"exclude_input_in_output": False}, {"parameters": {"return_full_text": True}}):
        sampling = {"max_tokens": 6, "temperature": 0.0, **echo}
        assert one(served, "日本 🙂", **sampling)["text_output"].item() == "日本 🙂" + bare
    streamed = answers(served.ask(request("tiny", "日本 🙂", stream=True, max_tokens=6, temperature=0.0)))
    assert "".join(answer["text_output"].item() for answer in streamed) == bare


def test_token_ids_instead_of_text(served, tiny):
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(tiny / "tokenizer.json")).encode("the quick brown").ids
    by_text = one(served, "the quick brown", return_num_input_tokens=True, **GREEDY)
    by_ids = one(served, input_ids=ids, return_num_input_tokens=True, **GREEDY)
    assert by_ids["num_input_tokens"].item() == len(ids)
    assert {name: array.item() for name, array in by_ids.items()} == {n: a.item() for n, a in by_text.items()}
    status, body = served.post("tiny/generate", {"input_ids": ids, **GREEDY})
    assert (status, json.loads(body)["text_output"]) == (200, by_text["text_output"].item())


def test_a_chat(served):
    messages = json.dumps([{"role": "user", "content": "What is the capital of France?"}])
    given = {"max_tokens": 20, "temperature": 0.0, "exclude_input_in_output": True}
    (answer,) = answers(served.ask(request("smollm2", messages=messages, **given)))
    assert answer["text_output"].item() == "The capital of France is Paris."
    status, body = served.post("smollm2/generate", {"messages": messages, **given})
    assert (status, json.loads(body)["text_output"]) == (200, "The capital of France is Paris.")


def test_other_names_of_inputs(served):
    asked = one(served, "the", max_tokens=9, seed=11)["text_output"].item()
    assert one(served, "the", max_tokens=9, random_seed=11)["text_output"].item() == asked
    assert one(served, "the", {"max_new_tokens": 9, "random_seed": 11})["text_output"].item() == asked
    assert one(served, "the", {"priority": 3}, max_tokens=9, seed=11)["text_output"].item() == asked
    short = one(served, "the", max_tokens=9, min_length=9, seed=11, return_num_output_tokens=True)
    assert short["num_output_tokens"].item() == 9


def test_a_seed_fixes_the_text_whatever_runs_beside_it(served):
    alone = one(served, "the", max_tokens=12, seed=2**64 - 1)["text_output"].item()
    others = [request("tiny", "fox", name=str(i), max_tokens=12) for i in range(12)]
    found = answers(served.ask(*others, request("tiny", "the", name="mine", max_tokens=12, seed=2**64 - 1)))
    assert [a["text_output"].item() for a in found if a["id"] == "mine"] == [alone]


def test_one_final_each_on_a_shared_stream(served):
    """Good, bad, streamed and late requests on one stream: each ends once, errors included."""
    good = [request("tiny", "the", name=f"good {i}", max_tokens=4, stream=bool(i % 2)) for i in range(6)]
    bad = [request("tiny", "the", name=f"bad {i}", max_tokens=-i) for i in range(4)]
    late = [request("tiny", "the", {"timeout": 1}, name=f"late {i}", max_tokens=400, stream=i > 0) for i in range(2)]
    asked = [*good, *bad, *late]
    messages = list(served.ask(*asked))
    assert finals(messages) == {each.id: 1 for each in asked}
    failed = {m.infer_response.id: m.error_message.partition(":")[0] for m in messages if m.error_message}
    assert failed == {each.id: "InvalidInput" for each in bad} | {each.id: "DeadlineExceeded" for each in late}
    last = {m.infer_response.id: m.infer_response.parameters["triton_final_response"].bool_param for m in messages}
    assert all(last.values())  # nothing comes after it
