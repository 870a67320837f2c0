from __future__ import annotations

import pytest

from backend.generation.budget import STRETCH, Budget


class Steps:
    """Steps of a made-up time, one ahead as the engine sends them."""

    def __init__(self, target: float, fixed: float = 0.008, each: float = 25e-6, most: int = 2048) -> None:
        self.time, self.free, self.fixed, self.each = 100.0, 0.0, fixed, each
        self.budget = Budget(target, 16, most, lambda: self.time)
        self.ends: list[float] = []

    def send(self, tokens: int) -> float:
        """Its time."""
        took = self.fixed + self.each * tokens
        self.budget.sent(tokens)
        self.free = max(self.free, self.time) + took
        self.ends.append(self.free)
        if len(self.ends) > 1:
            self.receive()
        return took

    def receive(self) -> None:
        self.time = max(self.time, self.ends.pop(0))
        self.budget.received()


@pytest.mark.parametrize("fixed", [0.0, 0.001, 0.008, 0.015])
def test_no_step_takes_longer_than_the_target_and_prompts_get_the_room_there_is(fixed: float) -> None:
    steps = Steps(0.020, fixed)
    times = [steps.send(steps.budget.tokens()) for _ in range(100)]
    assert max(times) <= 0.0201
    assert min(times[60:]) > 0.018


def test_it_follows_steps_that_become_slower() -> None:
    steps = Steps(0.020)
    for _ in range(50):
        steps.send(steps.budget.tokens())
    steps.fixed = 0.014
    times = [steps.send(steps.budget.tokens()) for _ in range(150)]
    assert max(times[-50:]) <= 0.021


def test_decode_steps_between_prompts_teach_what_is_fixed() -> None:
    steps = Steps(0.020)
    for _ in range(40):
        steps.send(0)
        steps.send(512)
    assert steps.budget.tokens() == pytest.approx((0.020 - 0.008) / 25e-6, rel=0.02)
    assert steps.budget.tokens(late=True) == pytest.approx((STRETCH * 0.020 - 0.008) / 25e-6, rel=0.02)


@pytest.mark.parametrize("steps_between", [50, 300, 20_000])
def test_a_stretch_without_prompts_leaves_what_they_may_take(steps_between: int) -> None:
    steps = Steps(0.020)
    for _ in range(60):
        steps.send(steps.budget.tokens())
    for _ in range(steps_between):
        steps.send(0)
    times = [steps.send(steps.budget.tokens()) for _ in range(5)]
    assert min(times) > 0.0195 and max(times) < 0.0205


def test_a_stretch_without_prompts_teaches_what_is_fixed_by_then() -> None:
    steps = Steps(0.020)
    for _ in range(60):
        steps.send(steps.budget.tokens())
    for step in range(1000):
        steps.fixed = 0.008 + 0.010 * step / 1000  # contexts grow
        steps.send(0)
    times = [steps.send(steps.budget.tokens()) for _ in range(40)]
    assert max(times) < 0.021 and min(times) > 0.0185


def test_a_target_that_cannot_be_met_leaves_prompts_a_block() -> None:
    steps = Steps(0.001)
    for _ in range(20):
        steps.send(steps.budget.tokens())
    assert steps.budget.tokens() == 16


def test_a_generous_target_gives_all_there_is() -> None:
    steps = Steps(10.0)
    for _ in range(20):
        steps.send(steps.budget.tokens())
    assert steps.budget.tokens() == 2048


def test_without_a_target_every_step_takes_what_it_can() -> None:
    steps = Steps(0.0)
    assert [steps.send(steps.budget.tokens()) > 0 for _ in range(3)] == [True] * 3
    assert steps.budget.tokens() == steps.budget.tokens(late=True) == 2048


def test_idle_time_is_no_step_time() -> None:
    steps = Steps(0.020)
    for _ in range(20):
        steps.send(64)
        steps.receive()
        steps.time += 5.0
    assert steps.budget.tokens() > 16


def test_steps_without_prompts_alone_tell_nothing_of_prompts() -> None:
    steps = Steps(0.020)
    for _ in range(20):
        steps.send(0)
    assert steps.budget.tokens() == 16
