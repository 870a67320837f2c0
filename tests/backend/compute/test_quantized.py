"""Packed weights: their codes against DeepSpeed's, what they are worth, and products with them on CPU."""

import pytest
import torch
from deepspeed.inference.quantization.utils import DeQuantizer, Quantizer

from backend.compute.quantized import cpu, packed
from backend.compute.quantized.packed import Packed, Scheme, joined, pack, widened
from backend.compute.quantized.product import product
from backend.compute.quantized.scheme import scheme_of
from backend.config import EngineConfig
from backend.errors import LoadError

CPU = torch.device("cpu")
SCHEMES = [
    Scheme("int8", 0),
    Scheme("int8", 64),
    Scheme("int8", 64, symmetric=False),
    Scheme("int4", 32),
    Scheme("int4", 64),
    Scheme("int4", 32, symmetric=False),
    Scheme("fp8", 0),
]
ERRORS = {"int8": 0.015, "int4": 0.16, "fp8": 0.04}
"""Of a random weight, relative to its norm: what rounding alone makes."""


def weight(rows=96, width=128, dtype=torch.float32):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to(dtype)


def made(full, scheme):
    place = Packed.empty(scheme, *full.shape, full.dtype, CPU)
    place.fill(full)
    return place


def names(scheme):
    return f"{scheme.kind}-{scheme.group}-{'sym' if scheme.symmetric else 'asym'}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_the_asymmetric_form_is_deepspeeds_bit_for_bit(bits, group, dtype):
    full = weight(dtype=dtype)
    settings = {"num_bits": bits, "group_size": group, "group_dim": 1, "symmetric": False}
    codes, scale, least = Quantizer(settings).quantize(full)
    ours = made(full, Scheme(f"int{bits}", group, symmetric=False))
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.scale, scale[..., 0])
    assert torch.equal(ours.offset, least[..., 0])
    assert torch.equal(ours.full(), DeQuantizer(settings, dtype).dequantize(codes, scale, least))


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_a_packed_weight_is_nearly_the_full_one(scheme):
    full = weight()
    error = (made(full, scheme).full() - full).norm() / full.norm()
    assert 0.001 < error < ERRORS[scheme.kind]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_a_product_is_that_of_the_full_weight(scheme, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "SLICE", 1 << 12)  # several slices, the last one smaller
    place, bias = made(weight(dtype=dtype), scheme), weight(1, 96, dtype)[0]
    close = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for tokens in (1, 3, 40):
        x = weight(tokens, 128, dtype)
        want = x.float() @ place.full().float().T + bias.float()
        got = product(x[None], place, bias)[0]
        assert got.dtype == dtype
        assert float((got.float() - want).abs().max() / want.abs().max()) < close


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_rows_of_a_joined_weight_are_its_parts(scheme):
    parts = [weight(32), weight(64)]
    whole = joined([Packed.empty(scheme, len(part), 128, torch.float32, CPU) for part in parts])
    whole.rows(0, 32).fill(parts[0])
    whole.rows(32, 96).fill(parts[1])
    assert torch.equal(whole.full(), torch.cat([made(part, scheme).full() for part in parts]))


@pytest.mark.parametrize("scheme", SCHEMES, ids=names)
def test_rounding_some_rows_at_a_time_changes_nothing(scheme, monkeypatch):
    full = weight()
    at_once = pack(full, scheme)
    monkeypatch.setattr(packed, "AT_ONCE", 1000)
    place = made(full, scheme)
    assert torch.equal(place.codes.view(torch.uint8), at_once.codes.view(torch.uint8))
    assert torch.equal(place.scale, at_once.scale)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_columns_of_several_ranks_have_the_scale_of_the_whole_rows(kind):
    full, scheme = weight(), Scheme(kind, 0)
    place = made(full, scheme)
    parts, said = [full[:, :80], full[:, 80:]], {"max": [], "sum": []}

    def agree(own, how):
        said[how].append(own)
        return answers[how]

    ends = [packed._ends(part[:, None], scheme) for part in parts]
    whole_ends = torch.maximum(*ends)
    errors = sum(packed._errors(part[:, None], whole_ends, scheme) for part in parts)
    answers = {"max": whole_ends, "sum": errors}
    for part, columns in zip(parts, (slice(0, 80), slice(80, 128)), strict=True):
        rank = Packed.empty(scheme, *part.shape, full.dtype, CPU).agreed(agree)
        rank.fill(part)
        assert torch.equal(rank.full(), place.full()[:, columns])
    assert torch.equal(torch.maximum(*said["max"]), whole_ends)
    torch.testing.assert_close(sum(said["sum"]), errors)


def test_int4_is_asymmetric_and_the_others_symmetric_where_nothing_is_said():
    forms = {kind: scheme_of(EngineConfig(model="m", quantization=kind)) for kind in ("int8", "int4", "fp8")}
    assert forms["int8"] == Scheme("int8", 64) and forms["fp8"] == Scheme("fp8", 0)
    assert forms["int4"] == Scheme("int4", 32, symmetric=False)
    given = {"model": "m", "quantization": "int4", "quantization_symmetric": "true", "quantization_group": "64"}
    assert scheme_of(EngineConfig.from_parameters(given)) == Scheme("int4", 64)
    assert scheme_of(EngineConfig(model="m")) is None


def test_scales_of_int4_are_searched_for():
    full = torch.cat([weight(), torch.zeros(1, 128)])
    rounded = (full.view(97, 4, 32) / (largest := full.view(97, 4, 32).abs().amax(-1, keepdim=True) / 7)).round()
    plain = (rounded * largest).nan_to_num().flatten(1)
    ours = made(full, Scheme("int4", 32)).full()
    assert (ours - full).norm() < 0.85 * (plain - full).norm()
    assert torch.equal(ours[-1], full[-1])


def test_float8_is_widened_exactly():
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes & 127 != 127].view(torch.float8_e4m3fn)
    assert torch.equal(widened(codes), codes.float())


def test_odd_groups_and_weights_that_do_not_fit_are_refused():
    with pytest.raises(LoadError, match="groups of 48"):
        Packed.empty(Scheme("int4", 48), 8, 128, torch.float32, CPU)
    with pytest.raises(LoadError, match="does not fit"):
        Packed.empty(Scheme("int4", 32), 8, 128, torch.float32, CPU).fill(weight())


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"quantization": "int3"}, "quantization must be one of int8, int4, fp8"),
        ({"quantization_group": 64}, "quantization_group is set, quantization is not"),
        ({"quantization_symmetric": False}, "quantization_symmetric is set, quantization is not"),
        ({"quantization": "fp8", "quantization_group": 64}, "fp8 has one scale a row"),
        ({"quantization": "fp8", "quantization_symmetric": False}, "fp8 is always symmetric"),
        ({"quantization": "int4", "quantization_group": 48}, "must be 0 or one of 32, 64"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_by_name(given, why):
    with pytest.raises(LoadError, match=why):
        EngineConfig(model="m", **given)


def test_8b_in_int4_takes_less_than_7_gb():
    """Llama-3.1-8B: embedding and head, of 128,256 by 4,096 each, stay in bfloat16."""
    layer = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 2 + [(4096, 14336)]
    scheme = scheme_of(EngineConfig(model="m", quantization="int4"))
    packed_bytes = sum(Packed.empty(scheme, *shape, torch.bfloat16, torch.device("meta")).nbytes for shape in layer)
    assert 6.3e9 < 32 * packed_bytes + 2 * 128256 * 4096 * 2 < 7e9
