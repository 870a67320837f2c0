"""What the trainings share."""

import torch

from backend.training import steps


def test_one_seed_one_order():
    steps.settle(3)
    first = steps.draw(range(20)), torch.rand(2).tolist()
    steps.settle(3)
    assert (steps.draw(range(20)), torch.rand(2).tolist()) == first
    assert sorted(first[0]) == list(range(20)) != first[0]


def test_batches_hold_all_rows_and_rows_of_about_one_length():
    batches = steps.alike(["aaa", "b", "cccc", "dd", "e"], 2, len)
    assert batches == [["b", "e"], ["dd", "aaa"], ["cccc"]]


def test_the_rate_rises_and_then_falls_to_nothing():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    schedule, rates = steps.falling(optimizer, 10, warm=4), []
    for _ in steps.bar(10, "test"):
        rates.append(optimizer.param_groups[0]["lr"])
        steps.step((weight - 1).square().sum(), [weight], optimizer, schedule)
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True) and optimizer.param_groups[0]["lr"] == 0.0
    assert weight.item() > 0


def test_bfloat16_only_where_the_processor_has_it(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    assert not steps._has_bfloat16(cpuinfo)
    cpuinfo.write_text("flags : fpu avx512f\n")
    assert not steps._has_bfloat16(cpuinfo)
    cpuinfo.write_text("flags : fpu avx512_bf16\n")
    assert steps._has_bfloat16(cpuinfo)
