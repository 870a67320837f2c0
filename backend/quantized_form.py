"""Form: what config.json says of weights that are quantized already, and which of that is served.

It knows neither the tensors (quantized_folder) nor what their codes mean (compute/quantized/checkpoints).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from backend.config import EngineConfig
from backend.errors import LoadError, require

if TYPE_CHECKING:
    from backend.model_folder import Checkpoint

KEYS = ("quantization_config", "compression_config")
"""Of config.json; the second is compressed-tensors' older name."""
SCATTERED = (
    "quantization_config: desc_act with groups cannot be split over ranks: a group's columns are scattered over all of"
    " them; use tensor_parallel 1"
)


@dataclass(frozen=True)
class Form:
    """How a checkpoint's quantized layers are stored."""

    layout: str
    """A key of quantized_folder.LAYOUTS."""
    kind: str
    """int4, int8 or fp8, as EngineConfig.quantization."""
    group: int = 0
    """Columns of a row that share a scale; 0: all of them."""
    symmetric: bool = True
    rows: int = 1
    """Rows that share a scale; 0: all of them."""
    ordered: bool = False
    """Whether the columns of a group may be any: the order is then stored too."""

    @property
    def bits(self) -> int:
        return 4 if self.kind == "int4" else 8

    def bytes(self, shape: tuple[int, ...]) -> float:
        """Of a weight of that shape as compute/quantized keeps it: codes, and float32 scales and offsets by row."""
        outputs, width = shape
        groups = width // (self.group or max(width, 1))
        return outputs * (width * self.bits / 8 + groups * (4 if self.symmetric else 8)) + 8 * width * self.ordered


def form_of(config: Mapping[str, Any]) -> Form | None:
    """Of config.json; None where it is not quantized. LoadError names what of it is not served."""
    key = next((key for key in KEYS if config.get(key) is not None), None)
    if key is None:
        return None
    given = config[key]
    method = given.get("quant_method") if isinstance(given, dict) else None
    if not isinstance(method, str) or method not in METHODS:
        raise LoadError(f"{key}: quant_method {method!r} is not served; known: {', '.join(METHODS)}")
    return METHODS[method](given)


def _gptq(given: dict[str, Any]) -> Form:
    bits, group = _one(given, "gptq", "bits", (4, 8)), _group(given, "gptq")
    layout = given.get("checkpoint_format") or given.get("format") or "gptq"
    check(layout in ("gptq", "gptq_v2"), f"gptq: format {layout!r} is not served; gptq and gptq_v2 are")
    check(not given.get("is_marlin_format"), "gptq: is_marlin_format is not served")
    changed = [name for name in given.get("dynamic") or () if not str(name).startswith("-:")]
    check(not changed, f"gptq: dynamic {changed[:1]} gives layers forms of their own, which is not served")
    ordered = bool(given.get("desc_act") and group and not given.get("static_groups"))
    return Form(layout, f"int{bits}", group, bool(given.get("sym", True)), ordered=ordered)


def _awq(given: dict[str, Any]) -> Form:
    _one({"bits": 4} | given, "awq", "bits", (4,))
    version = str(given.get("version") or given.get("format") or "gemm").lower()
    check(version == "gemm", f"awq: version {version!r} is not served; gemm is")
    check(given.get("backend") != "llm-awq", "awq: backend 'llm-awq' stores weights in another order")
    check(given.get("zero_point", True) is True, "awq: zero_point false is not served")
    return Form("awq", "int4", _group(given, "awq"), symmetric=False)


def _fp8(given: dict[str, Any]) -> Form:
    block = given.get("weight_block_size", [128, 128])
    for name, usual in (("scale_fmt", "float"), ("expert_dtype", "fp8"), ("fmt", "e4m3")):
        _one({name: usual} | given, "fp8", name, (usual,))
    check(not given.get("modules_to_convert"), "fp8: modules_to_convert is not served")
    if block is None:
        return Form("blocks", "fp8", rows=0)
    rows, columns = _block(block, "fp8: weight_block_size")
    return Form("blocks", "fp8", columns, rows=rows)


def _compressed(given: dict[str, Any]) -> Form:
    name = "compressed-tensors"
    for key in ("kv_cache_scheme", "transform_config"):
        check(not given.get(key), f"{name}: {key} is not served")
    sparsity = given.get("sparsity_config") or {}
    check(sparsity.get("format", "dense") == "dense", f"{name}: sparsity_config is not served")
    groups = given.get("config_groups")
    check(isinstance(groups, dict) and bool(groups), f"{name}: config_groups is missing")
    forms = {_scheme(group if isinstance(group, dict) else {}, given) for group in groups.values()}  # type: ignore[union-attr]
    check(len(forms) == 1, f"{name}: config_groups of several forms are not served")
    return forms.pop()


def _scheme(group: dict[str, Any], given: dict[str, Any]) -> Form:
    name, weights = "compressed-tensors", group.get("weights")
    layout = group.get("format") or given.get("format")
    check(isinstance(weights, dict), f"{name}: config_groups without weights are not served")
    check(layout in _FORMATS, f"{name}: format {layout!r} is not served; known: {', '.join(_FORMATS)}")
    check(not group.get("output_activations"), f"{name}: output_activations are not served")
    assert isinstance(weights, dict)
    _one({"actorder": None} | weights, name, "actorder", (None, False, "weight", "static", "dynamic"))
    bits, number = weights.get("num_bits", 8), weights.get("type", "int")
    kind = "fp8" if number == "float" else f"int{bits}"
    check(kind in _FORMATS[layout], f"{name}: {layout} of {bits} bits ({number}) is not served")  # type: ignore[index]
    check(kind != "fp8" or bits == 8, f"{name}: floats of {bits} bits are not served")
    symmetric = bool(weights.get("symmetric", True))
    check(symmetric or kind != "fp8", f"{name}: floats with a zero point are not served")
    columns, rows = _shares(weights)
    return Form(_FORMATS[layout][0], kind, columns, symmetric, rows)  # type: ignore[index]


def _shares(weights: dict[str, Any]) -> tuple[int, int]:
    """Columns and rows that share a scale, by the strategy."""
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("group" if isinstance(size, int) and size > 0 else "tensor")
    if strategy == "block":
        rows, columns = _block(weights.get("block_structure"), "compressed-tensors: block_structure")
        return columns, rows
    if strategy == "group":
        return _group(weights, "compressed-tensors"), 1
    check(strategy in ("channel", "tensor"), f"compressed-tensors: strategy {strategy!r} is not served")
    return 0, 1 if strategy == "channel" else 0


_FORMATS = {
    "pack-quantized": ("packed", "int4", "int8"),
    "int-quantized": ("plain", "int8"),
    "float-quantized": ("plain", "fp8"),
    "naive-quantized": ("plain", "int8", "fp8"),
}
"""compressed-tensors' format -> the layout, and the kinds in it."""
METHODS: dict[str, Callable[[dict[str, Any]], Form]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
    "fp8": _fp8,
}


def _one(given: Mapping[str, Any], method: str, name: str, served: tuple[Any, ...]) -> Any:
    value = given.get(name)
    known = ", ".join(str(each) for each in served if each)
    check(
        any(value is each or value == each for each in served),
        f"{method}: {name} {value!r} is not served; served: {known}",
    )
    return value


def _group(given: Mapping[str, Any], method: str) -> int:
    size = given.get("group_size", 128)
    whole = isinstance(size, int) and (size == -1 or (size > 0 and size % 8 == 0))
    check(whole, f"{method}: group_size {size!r} is not served; -1 and multiples of 8 are")
    return max(int(size), 0)


def _block(block: Any, name: str) -> tuple[int, int]:
    good = isinstance(block, list | tuple) and len(block) == 2 and all(isinstance(x, int) and x > 0 for x in block)
    check(good, f"{name} {block!r} is not served; two numbers are")
    return int(block[0]), int(block[1])


def kind_of(checkpoint: Checkpoint) -> str:
    """Of its quantized layers: int4, int8 or fp8; empty: it has none."""
    form = form_of(checkpoint.config)
    return form.kind if form else ""


def check_asked(checkpoint: Checkpoint, config: EngineConfig) -> None:
    """LoadError where weights that are quantized already cannot be served as the configuration wants."""
    form = form_of(checkpoint.config)
    if form and config.quantization:
        raise LoadError(
            f"quantization {config.quantization}: the checkpoint is quantized already ({form.kind}); leave it out"
        )
    if form and form.ordered and config.tensor_parallel > 1:
        raise LoadError(SCATTERED)


def check(holds: bool, message: str) -> None:
    """LoadError with this message, and the key that it is about, unless it holds."""
    require(holds, f"quantization_config: {message}")
