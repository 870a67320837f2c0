"""Both transports against fake servers: time limits, retries, failover, cancellation, TLS, large messages."""

import asyncio
import subprocess
import threading
from contextlib import aclosing

import grpc
import pytest
from fake_triton import Failure, FakeTriton, row, serving, until

from client.aio import AsyncGrpcTransport
from client.channel import Endpoint, Tls, is_local
from client.errors import Cancelled, DeadlineExceeded, Error, InvalidInput, ServerError, Unavailable
from client.limits import Attempts, Limits
from client.tensors import decode, encode, strings
from client.transport import GrpcTransport
from client.watchdog import Watchdog

FAST = Limits(timeout=20, idle_timeout=10, retries=2)


def ask():
    return encode("m", {"text_input": strings(b"hi")})


def read_blocking(endpoint, limits):
    transport = GrpcTransport(endpoint)
    try:
        return [decode(response)["text_output"].item() for response in transport.infer(ask(), limits)]
    finally:
        transport.close()


def read_async(endpoint, limits):
    async def session():
        transport = AsyncGrpcTransport(endpoint)
        try:
            async with aclosing(transport.infer(ask(), limits)) as responses:
                return [decode(response)["text_output"].item() async for response in responses]
        finally:
            await transport.close()

    return asyncio.run(session())


@pytest.fixture(params=[read_blocking, read_async], ids=["sync", "async"])
def read(request):
    return request.param


def to(*servers):
    return Endpoint.of(addresses=[server if isinstance(server, str) else server.address for server in servers])


def failing(code, message, times=10**9):
    left = threading.Semaphore(times) if times < 10**9 else None

    def script(received):
        if left is None or left.acquire(blocking=False):
            raise Failure(code, message)
        yield row("ok", "stop")

    return script


def closed_port():
    """An address where nobody listens."""
    fake = FakeTriton()
    fake.stop()
    return fake.address


def test_responses_in_order(server, read):
    server.script = lambda received: iter([row(str(i)) for i in range(200)])
    assert read(to(server), FAST) == [str(i) for i in range(200)]


@pytest.mark.parametrize("message", ["EngineDown: restarting", "Overloaded: full", "not at ready state"])
def test_unavailable_is_tried_again(server, read, message):
    server.script = failing("UNAVAILABLE", message, times=2)
    assert read(to(server), FAST) == ["ok"]
    assert len(server.requests) == 3


def test_tries_are_bounded(server, read):
    server.script = failing("UNAVAILABLE", "EngineDown: restarting")
    with pytest.raises(Unavailable, match="restarting"):
        read(to(server), FAST)
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("UNAVAILABLE", "DeadlineExceeded: 1 s"),
        ("INVALID_ARGUMENT", "InvalidInput: x"),
        ("INTERNAL", "ServingError: x"),
    ],
)
def test_nothing_else_is_tried_again(server, read, code, message):
    server.script = failing(code, message)
    with pytest.raises(Error):
        read(to(server), FAST)
    assert len(server.requests) == 1


def test_never_again_after_the_first_byte(server, read):
    def script(received):
        yield row("some")
        raise Failure("UNAVAILABLE", "EngineDown: died")

    server.script = script
    with pytest.raises(Unavailable, match="died"):
        read(to(server), FAST)
    assert len(server.requests) == 1


def test_nobody_there(read):
    with pytest.raises(Unavailable, match="tritonspeed list"):
        read(to(closed_port()), FAST)


def test_failover_needs_no_retries(server, read):
    assert read(to(closed_port(), server), Limits(20, 10, retries=0)) == ["HI"]
    assert read(to(closed_port(), closed_port(), server), Limits(20, 10, retries=0)) == ["HI"]


def test_requests_go_round(server):
    with serving() as other:
        transport = GrpcTransport(to(server, other))
        for _ in range(4):
            list(transport.infer(ask(), FAST))
        transport.close()
        assert (len(server.requests), len(other.requests)) == (2, 2)


def test_a_server_that_dies_in_mid_stream(read):
    with serving() as dying:

        def script(received):
            yield row("some")
            threading.Thread(target=dying.stop).start()
            received.gone.wait(10)

        dying.script = script
        with pytest.raises((Unavailable, Cancelled, ServerError)):
            read(to(dying), FAST)


def test_a_stream_that_falls_silent(server, read):
    def script(received):
        yield row("some")
        received.gone.wait(15)

    server.script = script
    with pytest.raises(DeadlineExceeded, match=r"0\.2 s; raise idle_timeout"):
        read(to(server), Limits(timeout=20, idle_timeout=0.2))
    assert until(server.requests[0].gone.is_set)
    with pytest.raises(DeadlineExceeded, match="idle_timeout"):
        read(to(server), Limits(timeout=None, idle_timeout=0.2))


def test_the_first_answer_may_take_longer_than_a_chunk(server, read):
    def script(received):
        received.gone.wait(0.5)
        yield row("ok", "stop")

    server.script = script
    assert read(to(server), Limits(timeout=20, idle_timeout=0.1)) == ["ok"]


def test_without_a_timeout_the_first_wait_is_bounded_too(server, read):
    server.script = lambda received: iter([received.gone.wait(15)][:0])
    with pytest.raises(DeadlineExceeded, match="idle_timeout"):
        read(to(server), Limits(timeout=None, idle_timeout=0.2))


def test_the_deadline_ends_a_stream_that_goes_on(server, read):
    def script(received):
        while not received.gone.wait(0.02):
            yield row("more")

    server.script = script
    with pytest.raises(DeadlineExceeded, match=r"0\.3 s; raise timeout="):
        read(to(server), Limits(timeout=0.3, idle_timeout=10))
    assert until(server.requests[0].gone.is_set)
    assert 0 < server.requests[0].parameters["timeout"] <= 300_000


def test_tries_share_one_deadline(server, read):
    server.script = failing("UNAVAILABLE", "EngineDown: restarting")
    with pytest.raises((Unavailable, DeadlineExceeded)):
        read(to(server), Limits(timeout=0.5, retries=1000))
    sent = [received.parameters["timeout"] for received in server.requests]
    assert sent == sorted(sent, reverse=True)
    assert len(sent) < 10


def test_an_error_inside_an_ok(server, read):
    server.script = lambda received: iter(["InvalidInput: x"])
    with pytest.raises(InvalidInput, match="x"):
        read(to(server), FAST)


def test_large_messages(server, read):
    text = "x" * (9 << 20)
    server.script = lambda received: iter([row(text, "stop")])
    assert read(to(server), FAST) == [text]


def test_close_from_another_thread_ends_the_wait(server):
    server.script = lambda received: iter([received.gone.wait(15)][:0])
    transport = GrpcTransport(to(server))
    responses = transport.infer(ask(), FAST)
    threading.Thread(target=lambda: until(lambda: server.requests) and responses.close()).start()
    with pytest.raises(Cancelled):
        next(responses)
    assert until(server.requests[0].gone.is_set)
    with pytest.raises(Cancelled):
        next(responses)
    transport.close()


def test_close_ends_the_pause_between_tries():
    transport = GrpcTransport(to(closed_port()))
    responses = transport.infer(ask(), Limits(timeout=60, retries=1000))
    threading.Timer(0.3, responses.close).start()
    with pytest.raises(Cancelled):
        next(responses)
    transport.close()


def test_aclose_from_another_task_ends_the_wait(server):
    server.script = lambda received: iter([received.gone.wait(15)][:0])

    async def session():
        transport = AsyncGrpcTransport(to(server))
        responses = transport.infer(ask(), FAST)
        reader = asyncio.ensure_future(anext(responses))
        assert await asyncio.to_thread(until, lambda: server.requests)
        await responses.aclose()
        with pytest.raises(Cancelled):
            await reader
        await transport.close()

    asyncio.run(session())


def test_tls(tmp_path, read):
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subject = ["-subj", "/CN=tritonspeed.test", "-addext", "subjectAltName=DNS:tritonspeed.test"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    subprocess.run([*command, "-keyout", key, "-out", certificate, *subject], check=True, capture_output=True)
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
    with serving(credentials=credentials) as fake:
        trusted = Tls(ca=certificate, server_name="tritonspeed.test")
        assert read(Endpoint.of("127.0.0.1", fake.port, tls=trusted), FAST) == ["HI"]
        with pytest.raises(Unavailable):
            read(Endpoint.of("127.0.0.1", fake.port, tls=True), Limits(5, 5, retries=0))


def test_headers_are_sent(server, read):
    read(Endpoint.of(addresses=[server.address], headers={"Authorization": "Bearer x"}), FAST)
    assert server.requests[0].metadata["authorization"] == "Bearer x"


def test_addresses():
    assert Endpoint.of("::1", 1).addresses == ("[::1]:1",)
    assert Endpoint.of("a", 1, ["b:2", "c:3"]).addresses == ("b:2", "c:3")
    assert is_local("localhost") and is_local("127.0.0.9") and is_local("[::1]") and not is_local("example.org")
    for wrong in ({"port": 0}, {"port": 65536}, {"port": "8001"}, {"addresses": ["nope"]}, {"addresses": "a:1"}):
        with pytest.raises(InvalidInput):
            Endpoint.of(**wrong)
    with pytest.raises(InvalidInput, match="nowhere"):
        Tls(ca="/nowhere.pem").credentials()


@pytest.mark.parametrize(
    "wrong", [{"timeout": -1}, {"timeout": "3"}, {"timeout": 10**400}, {"idle_timeout": 0}, {"retries": -1}]
)
def test_limits_are_checked(wrong):
    with pytest.raises(InvalidInput, match=next(iter(wrong))):
        Limits(**wrong)


def test_pauses_grow_and_end():
    attempts = Attempts(2, Limits(timeout=100, retries=9), start=1)
    error = Unavailable("x", "UNAVAILABLE")
    visited, pauses = [attempts.address], []
    for _ in range(10):
        pauses.append(attempts.after(error))
        visited.append(attempts.address)
    assert visited == [1, 0] * 5 + [1]
    assert pauses[0] == 0
    assert all(0.05 * 2**i <= pause <= 0.1 * 2**i for i, pause in enumerate(pauses[1:5]))
    assert max(pauses) <= 2
    with pytest.raises(Unavailable):
        attempts.after(error)


def test_the_watchdog_ends_late_waits_only():
    dog, rung = Watchdog(), threading.Event()
    with dog.limit(60, lambda: pytest.fail("too early")), dog.limit(0.05, rung.set):
        assert rung.wait(10)
    rung.clear()
    with dog.limit(0.02, rung.set):
        pass
    with dog.limit(None, rung.set):
        assert not rung.wait(0.2)
