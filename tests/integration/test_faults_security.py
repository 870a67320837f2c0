"""What listens where, and what prompts can do to logs and metrics. docs/faults.md, 26 and 27."""

import re
from ipaddress import ip_address

import psutil
import pytest
import tiny_diffusion
from guests import guest, metrics
from serving import answers, eventually, failure, request

pytestmark = pytest.mark.server

MARK = "Xq7Zforged"
HOSTILE = f"{MARK}\nI0101 00:00:00.000000 1 server.cc:1] {MARK}\r\x1b[31m{MARK}\x1b]0;{MARK}\x07"


def listening(processes):
    """Addresses of the processes' listening sockets."""
    found = [each for process in processes for each in process.net_connections("inet")]
    return [each.laddr for each in found if each.status == psutil.CONN_LISTEN]


def test_everything_listens_on_loopback_alone(served):
    """The server's three ports; what ranks open for each other: backend/generation/test_faults_steps."""
    found = listening(served.processes())
    assert {address.port for address in found} >= set(served.ports)
    assert [at for at in found if not ip_address(at.ip.removeprefix("::ffff:")).is_loopback] == []


def ask_everything(served):
    """The mark in every place that a caller can write to, accepted and refused."""
    for stream in (False, True):
        assert answers(served.ask(request("tiny", HOSTILE, max_tokens=2, stream=stream)))
    good = {"text_input": HOSTILE, "max_tokens": 2, "stop_words": [MARK]}
    assert served.post("tiny/generate", {**good, "sampling_parameters": "{}"})[0] == 200
    assert served.post("tiny/generate", {**good, "temperature": -1})[0] == 400
    for wrong in ({"sampling_parameters": f'{{"{MARK}": 1}}'}, {"sampling_parameters": HOSTILE}, {"temperature": -1.0}):
        assert failure(served.ask(request("tiny", HOSTILE, **wrong))).startswith("InvalidInput: ")
    assert failure(served.ask(request("tiny", HOSTILE, {MARK: HOSTILE}))).startswith("InvalidInput: ")
    assert failure(served.ask(request("tiny", HOSTILE, {"timeout": 1}, max_tokens=400))).startswith("Deadline")
    assert served.post(f"{MARK}/generate", good)[0] == 404
    call = served.ask(request("single", HOSTILE, stream=True, max_tokens=8000, ignore_eos=True))
    next(call)
    call.cancel()


def test_prompts_reach_neither_logs_nor_metrics(served):
    ask_everything(served)
    with served.pipeline("single") as pipe:
        assert eventually(lambda: pipe("the", max_tokens=1).num_output_tokens == 1, 10)
    logs = "".join(path.read_text(errors="replace") for path in served.run.glob("*.log"))
    assert "tritonspeed | tiny | ready in" in logs
    for written in (logs, served.said):
        assert MARK not in written and "\x1b" not in written
    assert not any(MARK in key for key in metrics(served))


def test_a_prompt_too_long_for_an_image_reaches_no_log(served, tmp_path):
    """Of which diffusers warns, quoting it."""
    mark = "xqzforged"  # of letters that the model's tokenizer knows
    folder, long = tiny_diffusion.save("sd", tmp_path / "sd"), " ".join([mark] * 30)
    with (
        guest(served, "text_to_image", "draws", folder, device="cpu") as name,
        served.of("text_to_image", name) as pipe,
    ):
        assert pipe(long, negative_prompt=long, num_inference_steps=1)
    logs = "".join(path.read_text(errors="replace") for path in served.run.glob("*.log"))
    assert "tritonspeed | draws | ready in" in logs
    for written in (logs, served.said):
        assert mark not in re.sub(r"\W", "", written.lower())


def test_labels_of_metrics_are_of_the_server_alone(served):
    known = {"model", "version", "gpu_uuid", "le", "quantile", "reason", "finished_reason"}
    for key in metrics(served):
        assert set(re.findall(r'(\w+)="', key)) <= known, key
