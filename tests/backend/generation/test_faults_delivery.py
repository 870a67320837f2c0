"""A look at whether the caller is still there, when there is no news for it: nothing is sent."""

from types import SimpleNamespace

from backend.generation.delivery import Delivery
from backend.generation.request import Request
from backend.generation.stream import Stream


class Asked:
    def __init__(self):
        self.sent = []

    def cancelled(self):
        return False

    def send(self, outputs):
        self.sent.append(outputs)


def test_a_look_without_news_sends_nothing():
    options = SimpleNamespace(
        stream=True, exclude_input=True, return_finish_reason=False, return_num_input_tokens=False,
        return_num_output_tokens=False, return_cumulative_logprob=False, return_logprobs=False,
    )  # fmt: skip
    outbox, asked = [], Asked()
    delivery = Delivery(Request([], options, [], None), asked, outbox.append, lambda *due: None)
    delivery.stream = Stream(1, delivery.notify)
    delivery.release()
    delivery.look()
    assert outbox == [delivery]
    assert not delivery.send(0.1)
    assert asked.sent == []
