"""bench_steps' part `packed`: products with packed weights beside their bytes' floor and the library's bf16 product."""

from __future__ import annotations

import argparse
from typing import Any

from measuring.floors import Ceiling
from measuring.report import Report
from measuring.shapes import SHAPES, Shape

SWEPT = 48
"""Candidates of a sweep."""
BUDGET = 20.0
"""Seconds of timing for each case of a sweep."""
GROUPS = {"int4": 32, "int8": 64, "fp8": 0}
"""As a configuration that names none has them."""


def packed(report: Report, options: argparse.Namespace, limit: Ceiling) -> None:
    """Each projection of --shape, kind of --quantization and batch of --batches; with --sweep the best programs too."""
    import torch

    from measuring.packed import calls, products

    device = torch.device("cuda")
    shape = SHAPES[options.shape or "llama-3.1-8b"] if not options.model else Shape.of(options.model)
    kinds = [kind for kind in options.quantization.split(",") if kind] or list(GROUPS)
    batches = sorted(map(int, options.batches.split(",")))
    report.head(
        "Packed products", "product", "kind", "batch", "µs", "GB/s", "of floor", "bf16 µs", "bf16 / packed"
    )  # fmt: skip
    with torch.inference_mode():
        for product in products(shape):
            times = {batch: _full(report, product, batch, device) for batch in batches}
            for kind in kinds:
                weights = _weights(kind, options.group, product, device)
                for batch in batches:
                    for name, call in calls(kind, product, batch, device).items():
                        _row(report, product, name, batch, call, weights, times[batch], limit)
                del weights
                torch.cuda.empty_cache()
        if options.sweep:
            for product in products(shape):
                for kind in kinds:
                    _swept(report, product, kind, options.group, batches)


def _full(report: Report, product: Any, batch: int, device: Any) -> float | None:
    """Seconds of the better of the library's product and the project's own, in bf16."""
    import torch

    from measuring.packed import call_of, full_weights, library_of, time_of

    def least() -> float:
        weights = full_weights(product, device)
        return min(time_of(make(product, batch, device), weights) for make in (call_of, library_of))

    found = report.attempt(f"bf16 {product.name} {batch}", least)
    torch.cuda.empty_cache()
    return float(found) if found else None


def _scheme(kind: str, group: int) -> Any:
    """As a configuration has it that says no more: int4 with offsets."""
    from backend.compute.quantized.packed import Scheme

    return Scheme(kind, group if group and kind != "fp8" else GROUPS[kind], symmetric=kind != "int4")


def _weights(kind: str, group: int, product: Any, device: Any) -> list[Any]:
    from measuring.packed import packed_weights

    return list(packed_weights(_scheme(kind, group), product, device))


def _row(
    report: Report, product: Any, kind: str, batch: int, call: Any, weights: list[Any], full: float | None,
    limit: Ceiling,
) -> None:  # fmt: skip
    from measuring.packed import time_of

    taken = report.attempt(f"{kind} {product.name} {batch}", lambda: time_of(call, weights))
    if not taken:
        return
    size = weights[0].nbytes
    floor = max(size / limit.bandwidth, 2 * batch * product.outputs * product.width / limit.flops)
    report.row({
        "product": product.name, "kind": kind, "batch": batch, "µs": taken * 1e6, "GB/s": size / taken / 1e9,
        "of floor": floor / taken, "bf16 µs": full and full * 1e6, "bf16 / packed": full and full / taken,
    })  # fmt: skip


def _swept(report: Report, product: Any, kind: str, group: int, batches: list[int]) -> None:
    from backend.compute.dense.packed_shape import TILED
    from measuring.packed_sweep import ruled, sweep

    scheme = _scheme(kind, group)
    for batch in batches:
        if batch > TILED:
            continue
        title = f"{kind} {product.name} {batch}"
        found = report.attempt(f"sweep {title}", lambda: sweep(product, scheme, batch, SWEPT, BUDGET))  # noqa: B023
        if not found:
            continue
        rule = ruled(product, scheme, batch)
        usual = next((taken for taken, candidate in found if candidate == rule), None)
        report.head(f"Sweep of {title}: {len(found)} tried; the rule's {rule}", "what", "µs", "of the rule's")
        for taken, candidate in found[:4]:
            report.row(
                {"what": str(candidate), "µs": taken * 1e6, "of the rule's": usual and taken / usual},
                {"case": title},
            )
