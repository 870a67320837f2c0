"""Generate and AsyncGenerate against a fake server: prompts, options, lists, streams."""

import asyncio
import json
import threading

import numpy as np
import pytest
from fake_triton import Failure, row, until

from client.errors import Error, InvalidInput, Overloaded, ServerError
from client.generate import Delta, Generated
from client.sampling import ALIASES, DEFAULTS, KEYS
from client.tasks import async_pipeline, pipeline


@pytest.fixture
def pipe(server):
    with pipeline("generate", host="127.0.0.1", port=server.port, timeout=20) as made:
        yield made


def run(coroutine):
    return asyncio.run(coroutine)


def connected(server, **options):
    return async_pipeline("generate", host="127.0.0.1", port=server.port, timeout=20, **options)


def test_a_prompt_gives_its_completion(server, pipe):
    found = pipe("hello world")
    assert found == Generated("HELLO WORLD", "stop", 3, 2, None, None, 0)
    assert str(found) == "HELLO WORLD"
    assert server.requests[0].model == "generate"


def test_what_is_asked_by_default(server, pipe):
    pipe("x")
    received = server.requests[0]
    asked = {name: value.item() for name, value in received.inputs.items()}
    assert asked == {"text_input": b"x", "stream": False, **DEFAULTS}
    assert all(value.shape == (1, 1) for value in received.inputs.values())
    assert "triton_grpc_error" not in received.metadata  # with it, errors that come at once crash Triton 2.51


def test_the_time_limit_travels_in_microseconds(server, pipe):
    pipe("x", timeout=7)
    assert 6_000_000 < server.requests[0].parameters["timeout"] <= 7_000_000


def test_every_option_is_sent_typed(server, pipe):
    values = {
        "max_tokens": 5, "min_tokens": 1, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1,
        "repetition_penalty": 1.1, "frequency_penalty": 0.2, "presence_penalty": 0.3, "seed": 2**64 - 1, "n": 1,
        "stop": ["a", "é"], "stop_token_ids": [1, 2], "ignore_eos": True, "exclude_input_in_output": True,
        "return_finish_reason": True, "return_num_input_tokens": True, "return_num_output_tokens": True,
        "return_cumulative_logprob": True, "return_logprobs": True, "cache_salt": "s", "priority": -2,
        "max_length": 9, "do_sample": False,
    }  # fmt: skip
    assert values.keys() == KEYS.keys()
    pipe("x", **values)
    received = server.requests[0]
    assert received.inputs["stop_words"].tolist() == [[b"a", "é".encode()]]
    assert received.inputs["stop_token_ids"].tolist() == [[1, 2]]
    assert received.inputs["seed"].item() == 2**64 - 1
    types = {received.datatypes[key.tensor]: key.kind for key in KEYS.values() if key.tensor}
    assert types == {"INT32": "int32s", "FP32": "fp32", "UINT64": "uint64", "BOOL": "bool", "BYTES": "strings"}
    assert all(key.tensor in received.inputs for key in KEYS.values() if key.tensor)
    others = json.loads(received.inputs["sampling_parameters"].item())
    assert others == {"cache_salt": "s", "priority": -2, "max_length": 9, "do_sample": False}
    assert received.parameters.keys() == {"timeout"}  # Triton's own


@pytest.mark.parametrize("alias", ALIASES)
def test_other_servers_names(server, pipe, alias):
    key = KEYS[ALIASES[alias]]
    pipe("x", **{alias: "7" if key.kind == "strings" else 7})
    assert int(server.requests[0].inputs[key.tensor].item()) == 7
    with pytest.raises(InvalidInput, match=alias):
        pipe("x", **{alias: 1, key.name: 1})


def test_none_is_left_to_the_model(server, pipe):
    pipe("x", temperature=None, return_finish_reason=None)
    assert not {"temperature", "return_finish_reason"} & server.requests[0].inputs.keys()


def test_an_unknown_option_is_named_with_the_known_ones(server, pipe):
    with pytest.raises(InvalidInput, match=r"'tempertaure'.*temperature") as caught:
        pipe("x", tempertaure=1)
    assert all(name in str(caught.value) for name in KEYS)
    assert not server.requests


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_tokens": 1.5}, "max_tokens"), ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 2**31}, "2147483647"), ({"max_tokens": None, "top_k": [1]}, "top_k"),
        ({"seed": -1}, "seed"), ({"seed": 2**64}, "seed"), ({"temperature": "0.5"}, "temperature"),
        ({"temperature": float("nan")}, "finite"), ({"top_p": float("inf")}, "finite"), ({"min_p": 1e300}, "finite"),
        ({"temperature": 10**400}, "temperature must be a finite number, not an integer of 1329 bits"),
        ({"top_p": -(10**5000)}, "top_p must be a finite"), ({"seed": 10**5000}, "seed must be from 0"),
        ({"stop": [1]}, "stop"), ({"stop": b"x"}, "stop"), ({"stop": "\ud800"}, "surrogate"), ({"stop": 3}, "stop"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids"), ({"ignore_eos": 1}, "ignore_eos"), ({"n": "2"}, "n must"),
        ({"cache_salt": 1}, "cache_salt"), ({"timeout": 0}, "timeout"), ({"timeout": float("nan")}, "timeout"),
    ],
)  # fmt: skip
def test_wrong_values_never_leave(server, pipe, options, named):
    with pytest.raises(InvalidInput, match=named):
        pipe("x", **options)
    assert not server.requests


def test_numpy_scalars_are_numbers(server, pipe):
    pipe("x", max_tokens=np.int64(3), temperature=np.float32(0.5), ignore_eos=np.bool_(True))
    assert server.requests[0].inputs["max_tokens"].item() == 3


@pytest.mark.parametrize(
    ("prompt", "name", "sent"),
    [
        ([1, 2, 3], "input_ids", [[1, 2, 3]]),
        (np.array([4, 5]), "input_ids", [[4, 5]]),
        (("a",), "text_input", [[b"a"]]),
        ("ü\0", "text_input", [["ü\0".encode()]]),
    ],
)
def test_kinds_of_prompt(server, pipe, prompt, name, sent):
    server.script = lambda received: iter([row("T", "stop")])
    found = pipe(prompt)
    assert (found[0] if isinstance(prompt, tuple) else found).text == "T"
    assert server.requests[0].inputs[name].tolist() == sent


def test_a_chat_goes_as_messages(server, pipe):
    server.script = lambda received: iter([row("T", "stop")])
    chat = [{"role": "system", "content": "é"}, {"role": "user", "content": "hi"}]
    assert pipe(chat).text == "T"
    assert json.loads(server.requests[0].inputs["messages"].item()) == chat
    assert [found.text for found in pipe([chat, chat])] == ["T", "T"]


@pytest.mark.parametrize(
    "prompt",
    [b"bytes", 3, None, [{"role": "user"}], ["a", 1], [[]], [1, "a"], [-1], [2**31], "\ud800", [1.5], np.array([1.5]),
     [{"role": "user", "content": object()}], [{"role": "user", "content": "a"}, "b"]],
)  # fmt: skip
def test_what_is_no_prompt(server, pipe, prompt):
    with pytest.raises(InvalidInput, match="prompt"):
        pipe(prompt)
    assert not server.requests


def test_a_wrong_prompt_of_a_list_is_numbered(server, pipe):
    with pytest.raises(InvalidInput, match="prompt 1 "):
        pipe(["a", "\ud800"])
    assert not server.requests


def test_lists_keep_their_order_whoever_ends_first(server, pipe):
    barrier, last = threading.Barrier(3), threading.Event()

    def script(received):
        barrier.wait(10)  # all three run at once
        if received.prompt == "a":
            last.wait(10)
        else:
            last.set()
        yield row(received.prompt.upper(), "stop")

    server.script = script
    assert [found.text for found in pipe(["a", "b", "c"])] == ["A", "B", "C"]
    assert pipe([]) == []


def test_lists_are_bounded(server):
    running, peak, lock = 0, 0, threading.Lock()

    def script(received):
        nonlocal running, peak
        with lock:
            running += 1
            peak = max(peak, running)
        until(lambda: peak > 1, 5)
        with lock:
            running -= 1
        yield row(received.prompt, "stop")

    server.script = script
    prompts = [str(i) for i in range(12)]
    with pipeline("generate", host="127.0.0.1", port=server.port, concurrency=2, timeout=20) as pipe:
        assert [found.text for found in pipe(prompts)] == prompts
    assert peak == 2
    peak = 0
    assert [found.text for found in run(_ask(connected(server, concurrency=2), prompts))] == prompts
    assert peak == 2


async def _ask(pipe, prompt, **options):
    async with pipe:
        return await pipe(prompt, **options)


def _one_fails(received):
    if received.prompt == "bad":
        raise Failure("INVALID_ARGUMENT", "InvalidInput: bad prompt")
    received.gone.wait(15)
    yield row("late", "stop")


def test_a_failure_of_one_ends_the_others(server, pipe):
    server.script = _one_fails
    with pytest.raises(InvalidInput, match="bad prompt"):
        pipe(["a", "bad", "c"])
    assert until(lambda: all(received.gone.is_set() for received in server.requests))


def test_a_failure_of_one_ends_the_others_async(server):
    server.script = _one_fails
    with pytest.raises(InvalidInput, match="bad prompt"):
        run(_ask(connected(server), ["a", "bad", "c"]))
    assert until(lambda: all(received.gone.is_set() for received in server.requests))


def test_samples_come_in_the_order_of_their_index(server, pipe):
    answer = {"text_output": ["c", "a", "b"], "index": [2, 0, 1], "finish_reason": ["stop", "length", "stop"]}
    server.script = lambda received: iter([answer])
    found = pipe("x", n=3)
    assert [(one.text, one.finish_reason, one.index) for one in found] == [
        ("a", "length", 0), ("b", "stop", 1), ("c", "stop", 2),
    ]  # fmt: skip
    assert [[one.text for one in each] for each in pipe(["x", "y"], n=3)] == [["a", "b", "c"]] * 2


@pytest.mark.parametrize("answers", [[], [{"text_output": ["a", "b"]}], [row("a"), row("b")], [row("a", index=1)]])
def test_a_wrong_number_of_answers_is_refused(server, pipe, answers):
    server.script = lambda received: iter(answers)
    with pytest.raises(ServerError, match="completions"):
        pipe("x")


def test_logprobs(server, pipe):
    answer = row("a", "stop") | {"cumulative_logprob": [-1.5], "logprobs": ['[{"token": "a", "logprob": -1.5}]']}
    server.script = lambda received: iter([answer])
    found = pipe("x", return_logprobs=True, return_cumulative_logprob=True)
    assert found.cumulative_logprob == -1.5
    assert found.logprobs == [{"token": "a", "logprob": -1.5}]


def test_a_stream_is_text(server, pipe):
    deltas = list(pipe.stream("once upon a time"))
    assert "".join(deltas) == "ONCE UPON A TIME"
    assert [delta.finish_reason for delta in deltas] == ["", "", "", "stop"]
    assert all(isinstance(delta, Delta) and delta.text == delta and delta.index == 0 for delta in deltas)
    assert deltas[0].num_output_tokens == 1
    assert server.requests[0].stream


def test_rows_of_one_response_are_deltas_of_their_own(server, pipe):
    answer = {"text_output": ["a", "b"], "index": [1, 0], "finish_reason": ["stop", "stop"]}
    server.script = lambda received: iter([answer])
    assert [(delta, delta.index) for delta in pipe.stream("x", n=2)] == [("a", 1), ("b", 0)]


def test_deltas_come_before_the_end(server, pipe):
    go = threading.Event()

    def script(received):
        yield row("first ")
        go.wait(10)
        yield row("last", "stop")

    server.script = script
    stream = pipe.stream("x")
    assert next(stream) == "first "
    go.set()
    assert list(stream) == ["last"]


def test_a_stream_that_ends_early_is_no_whole_text(server, pipe):
    server.script = lambda received: iter([row("cut")])
    with pytest.raises(ServerError, match="0 of 1"):
        list(pipe.stream("x"))


def test_an_error_in_mid_stream_keeps_what_came(server, pipe):
    def script(received):
        yield row("some ")
        raise Failure("UNAVAILABLE", "EngineDown: a rank died")

    server.script = script
    came = []
    with pytest.raises(Error, match="a rank died"):
        came.extend(pipe.stream("x"))  # extend keeps what came before the error
    assert came == ["some "]
    assert len(server.requests) == 1  # never sent twice once text came


def test_stream_options_are_checked_at_once(pipe):
    with pytest.raises(InvalidInput, match="unknown option"):
        pipe.stream("x", nonsense=1)


def _endless(received):
    while not received.gone.is_set():
        yield row("more ")


def test_leaving_the_loop_cancels(server, pipe):
    server.script = _endless
    for delta in pipe.stream("x"):
        assert delta == "more "
        break
    assert until(server.requests[0].gone.is_set)


def test_close_cancels(server, pipe):
    server.script = _endless
    stream = pipe.stream("x")
    next(stream)
    stream.close()
    assert until(server.requests[0].gone.is_set)


def test_async_call_and_stream(server):
    async def session():
        async with connected(server) as pipe:
            one = await pipe("a b")
            many = await pipe(["a", "b"], n=2)
            return one, many, [delta async for delta in pipe.stream("c d")]

    one, many, deltas = run(session())
    assert one.text == "A B"
    assert [[sample.text for sample in samples] for samples in many] == [["A", "A"], ["B", "B"]]
    assert deltas == ["C ", "D"]
    assert deltas[-1].finish_reason == "stop"


def test_async_errors_and_truncation(server):
    server.script = lambda received: iter([row("cut")])

    async def session():
        async with connected(server) as pipe:
            with pytest.raises(ServerError, match="0 of 1"):
                _ = [delta async for delta in pipe.stream("x")]
            with pytest.raises(InvalidInput, match="unknown"):
                await pipe("x", nonsense=1)

    run(session())


def test_async_leaving_the_loop_and_cancelling_the_task_cancel(server):
    server.script = _endless

    async def session():
        async with connected(server) as pipe:
            async for _ in pipe.stream("x"):
                break
            assert await asyncio.to_thread(until, server.requests[0].gone.is_set)
            task = asyncio.ensure_future(_drain(pipe))
            assert await asyncio.to_thread(until, lambda: len(server.requests) == 2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(until, server.requests[1].gone.is_set)

    run(session())


async def _drain(pipe):
    async for _ in pipe.stream("x"):
        pass


def test_overload_is_told(server):
    def script(received):
        raise Failure("UNAVAILABLE", "Overloaded: 1024 wait")
        yield

    server.script = script
    with pipeline("generate", host="127.0.0.1", port=server.port, retries=0) as pipe, pytest.raises(Overloaded):
        pipe("x")
