"""What fp8_formats.py promises. Nearly everything is exact, so nearly every test compares bits: against
torch's float8 dtypes for the two formats that have one, and against a search of the grid for all six."""
import math

import pytest
import torch

import fp8_formats
from conftest import for_devices
from fp8_formats import E2M1, E2M3, E3M2, E4M3, E5M2, FORMATS, INT8
from fp8_formats import cast, decode, encode, floor_log2, grid, pow2, round_to_format, uncast

OTHERS = [E3M2, E2M3, E2M1, INT8]   # without codes of Inf and NaN

for_all_formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
for_fp8 = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=["e4m3", "e5m2"])
for_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)


def assert_same(actual, expected):
    """Same dtype, shape and values, with NaN in the same places and the same sign on every zero."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    not_nan = ~expected.isnan()
    assert torch.equal(actual[not_nan].signbit(), expected[not_nan].signbit())


def ties(fmt):
    """The midpoints between neighbors, and the neighbors: (low, tie, high), exact in float32"""
    low, high = grid(fmt)[:-1], grid(fmt)[1:]
    return low, (low + high) / 2, high


def values_of(dtype, fmt):
    """All values of 16 bits. Of more: the grid, ties and what is next to them, edges, random bits (of every
    binade, subnormals, Inf and NaN), and all of that negative."""
    if dtype.itemsize == 2:
        return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    # Next to the first tie, half a subnormal step, adding 0.5 and taking the floor would go wrong
    low, tie, high = (x.to(dtype) for x in ties(fmt))
    edges = [0, 1e-45, 1e-30, fmt.max, 1.01 * fmt.max, 2 * fmt.max, torch.finfo(dtype).max, math.inf]
    bits = torch.randint(256, (100_000 * dtype.itemsize,), generator=torch.Generator().manual_seed(0))
    x = torch.cat((low, tie, tie.nextafter(low), tie.nextafter(high), torch.tensor(edges, dtype=dtype),
                   bits.to(torch.uint8).view(dtype)))
    return torch.cat((x, -x))


def nearest_by_search(x, fmt, rounding):
    """Look x up in the grid. A tie goes to an even code, which is the index in the grid, or outwards."""
    values, magnitude = grid(fmt).double(), x.double().abs()
    below = torch.searchsorted(values, magnitude.nan_to_num(0), right=True) - 1
    above = (below + 1).clamp(max=len(values) - 1)
    middle = (values[below] + values[above]) / 2
    go_up = (magnitude > middle) | ((magnitude == middle) & ((below % 2 == 1) | (rounding == "half_away")))
    rounded = torch.where(go_up, values[above], values[below])
    return torch.where(x.isnan(), torch.nan, torch.copysign(rounded, x.double())).to(x.dtype)


# ---------------------------------------------------------------------------------------------------
# The formats, against the table of the MX specification

@pytest.mark.parametrize("fmt, bits, bias, emax, largest, normal, subnormal", [
    (E5M2, 8, 15, 15, 57344, 2**-14, 2**-16),
    (E4M3, 8, 7, 8, 448, 2**-6, 2**-9),
    (E3M2, 6, 3, 4, 28, 2**-2, 2**-4),
    (E2M3, 6, 1, 2, 7.5, 1, 2**-3),
    (E2M1, 4, 1, 2, 6, 1, 2**-1),
    (INT8, 8, 1, 0, 127 / 64, 1, 2**-6),
])
def test_numbers_and_grid_of_a_format_are_those_of_the_specification(
        fmt, bits, bias, emax, largest, normal, subnormal):
    assert (fmt.bits, fmt.bias, fmt.emax) == (bits, bias, emax)
    assert (fmt.max, fmt.min_normal, fmt.min_subnormal) == (largest, normal, subnormal)
    fractions = [i * subnormal / normal for i in range(round(normal / subnormal))]
    expected = [normal * x for x in fractions]
    expected += [2.0**e * (1 + x) for e in range(1 - bias, emax + 1) for x in fractions]
    assert grid(fmt).tolist() == [x for x in expected if x <= largest]   # beyond it, in E4M3, there is NaN


def test_int8_codes_are_twos_complement_and_no_value_becomes_minus_two_or_minus_zero():
    n = torch.arange(-128, 128)
    assert_same(decode((n & 0xFF).to(torch.uint8), INT8), n / 64)
    values = torch.tensor([-2.0, -torch.inf, 0.0, -0.0, -1e-30])
    assert encode(values, INT8).tolist() == [0x81, 0x81, 0, 0, 0]   # 0x81: -127


# ---------------------------------------------------------------------------------------------------
# Codes

@for_devices
@for_fp8
def test_all_256_codes_decode_as_in_torch_and_uncast_from_any_layout(fmt, device):
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    q = codes.view(fmt.dtype)
    assert_same(decode(codes, fmt), q.float())
    for part in (q, q.view(16, 16).t(), q.view(16, 16)[3:, ::2], q[:0]):
        assert_same(uncast(part), part.float())
    assert fp8_formats.format_of(q) == fmt


@for_devices
@for_all_formats
def test_encode_inverts_decode_nan_gets_the_all_ones_code_and_codes_count_the_grid_upwards(fmt, device):
    codes = torch.arange(1 << fmt.bits, dtype=torch.uint8, device=device)
    if fmt is INT8:
        codes = codes[codes != 0x80]  # -2, which is off the symmetric grid
    values = decode(codes, fmt)
    nan = values.isnan()
    assert torch.equal(encode(values[~nan], fmt, saturate=False), codes[~nan])   # of a float's -0, too
    assert (encode(values[nan], fmt) & 0x7F == 0x7F).all() and nan.any() == fmt.has_nan
    assert encode(grid(fmt), fmt).tolist() == list(range(len(grid(fmt))))


# ---------------------------------------------------------------------------------------------------
# Exponents and E8M0

@for_devices
@for_dtypes
def test_floor_log2_is_exact_at_any_finite_number_and_clamps_as_expected_at_the_others(dtype, device):
    x = values_of(dtype, INT8)
    if dtype.itemsize > 2:
        powers = torch.tensor([2.0**e for e in range(-1074, 1024)], dtype=dtype)   # some are 0 in float32
        x = torch.cat((powers, powers.nextafter(0 * powers), powers.nextafter(powers + math.inf), x))
    x = x[x.isfinite() & (x != 0)].to(device)
    assert floor_log2(x).tolist() == [math.frexp(v)[1] - 1 for v in x.tolist()]
    others = floor_log2(x.new_tensor([0.0, -0.0, math.inf, -math.inf, math.nan]))
    assert others.dtype == torch.int32 and others.clamp(-127, 127).tolist() == [-127, -127, 127, 127, 127]


@for_devices
def test_pow2_is_exact_and_leaves_the_range_as_zero_and_inf(device):
    exponents = torch.arange(-149, 128, device=device)
    assert pow2(exponents).tolist() == [math.ldexp(1, e) for e in exponents.tolist()]
    assert pow2(torch.tensor([-1000, -150, 128, 1000], device=device)).tolist() == [0, 0, math.inf, math.inf]


@for_devices
def test_all_256_e8m0_codes_decode_as_in_torch_and_encode_inverts_decode_and_clamps(device):
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    values = fp8_formats.e8m0_decode(codes)
    assert_same(values.cpu(), codes.cpu().view(torch.float8_e8m0fnu).float())
    assert torch.equal(fp8_formats.e8m0_encode(floor_log2(values[:255])), codes[:255])
    beyond = torch.tensor([-1000, -128, 128, 1000], dtype=torch.int32, device=device)
    assert fp8_formats.e8m0_encode(beyond).tolist() == [0, 0, 254, 254]   # never 255, which is NaN


# ---------------------------------------------------------------------------------------------------
# Rounding to nearest

@for_devices
@for_dtypes   # float64 is rounded once, and not through float32
@for_all_formats
@pytest.mark.parametrize("rounding", ["nearest_even", "half_away"])
def test_all_goes_to_the_nearest_value_ties_to_even_or_outwards_zeros_keep_their_sign_and_nan_stays(
        fmt, rounding, dtype, device):
    assert_same(grid(fmt).to(dtype).float(), grid(fmt))   # every dtype holds it
    x = values_of(dtype, fmt)
    expected = nearest_by_search(x, fmt, rounding).to(device)   # max for all beyond it
    for saturate in {True, fmt.has_nan}:   # a format without special codes saturates in either case
        assert_same(round_to_format(x.to(device), fmt, rounding, saturate), expected)


@for_devices
@for_dtypes
@for_fp8
def test_cast_equals_round_to_format_and_torchs_cast_after_a_clamp_bit_for_bit(fmt, dtype, device):
    x = values_of(dtype, fmt).to(device)
    rounded = round_to_format(x, fmt)
    assert cast(x, fmt).dtype == fmt.dtype
    assert_same(cast(x, fmt).to(dtype), rounded)
    if dtype != torch.float64:   # which torch rounds twice
        assert_same(x.clamp(-fmt.max, fmt.max).to(fmt.dtype).to(dtype), rounded)


def test_a_power_of_two_scale_adds_range_to_a_float_and_precision_to_an_integer():
    x = torch.linspace(1, 2, 1000)
    rounded, scaled_too_small = (round_to_format(x / factor, E4M3) * factor for factor in (1, 4096))
    assert_same(round_to_format(x / 32, E4M3) * 32, rounded)  # 1/32 is still normal
    assert (scaled_too_small - x).abs().max() > 10 * (rounded - x).abs().max()  # 1/4096 is subnormal
    error = torch.tensor([fp8_formats.relative_error(INT8, k) for k in range(4)])
    assert (error[1:] / error[:-1]).tolist() == pytest.approx([2] * 3, rel=0.01)  # a bit; 1%: a finite grid


# ---------------------------------------------------------------------------------------------------
# Stochastic rounding

def stochastic(x, fmt, seed):
    generator = torch.Generator(device=x.device).manual_seed(seed)
    return round_to_format(x, fmt, rounding="stochastic", generator=generator)


@for_devices
@for_all_formats
def test_stochastic_rounding_picks_both_neighbors_repeats_with_its_seed_keeps_the_grid_and_nan(fmt, device):
    low, tie, high = (x.to(device) for x in ties(fmt))
    draws = torch.stack([stochastic(tie, fmt, seed) for seed in range(64)])
    assert ((draws == low) | (draws == high)).all()
    assert (draws == low).any(dim=0).all() and (draws == high).any(dim=0).all()  # all the same: once in 2^63
    assert_same(stochastic(tie, fmt, seed=63), draws[63])
    values = torch.cat([-grid(fmt), grid(fmt), torch.tensor([math.nan])]).to(device)
    assert_same(stochastic(values, fmt, seed=0), values)


@for_devices
@pytest.mark.parametrize("x", [1.01, 1.1, -300.0, 2**-9 * 2.3, 2**-9 * 0.1])
def test_stochastic_rounding_is_unbiased(x, device):
    draws = stochastic(torch.full((200_000,), x, device=device), E4M3, seed=0).double()
    standard_error = draws.std() / math.sqrt(len(draws))
    assert standard_error > 0
    assert abs(draws.mean() - x) < 5 * standard_error  # five sigma: a fair rounding fails once in two million


# ---------------------------------------------------------------------------------------------------
# Overflow

@pytest.mark.parametrize("fmt, tie, after, beyond",
                         [(E4M3, 464, 448, torch.nan), (E5M2, 61440, torch.inf, torch.inf)])
def test_overflow_is_decided_after_rounding_and_nan_stays(fmt, tie, after, beyond):
    """448 is even, so 464 stays; 57344 is odd, so 61440 overflows."""
    near = [fmt.max, math.nextafter(tie, 0), tie, math.nextafter(tie, 1e9), torch.nan, torch.inf]
    x = torch.tensor(near, dtype=torch.float64)
    expected = torch.tensor([fmt.max, fmt.max, after, beyond, torch.nan, beyond], dtype=torch.float64)
    assert_same(round_to_format(x, fmt, saturate=False), expected)
    assert_same(round_to_format(-x, fmt, saturate=False), -expected)
    assert (encode(x[-1:], fmt, saturate=False) == {E4M3: 0x7F, E5M2: 0x7C}[fmt]).all()


# ---------------------------------------------------------------------------------------------------
# Arguments, shapes, and the script

@pytest.mark.parametrize("error, match, call", [
    (ValueError, "nearest_even", lambda: round_to_format(torch.ones(1), E4M3, rounding="down")),
    (TypeError, "int64", lambda: round_to_format(torch.tensor([1, 2, 3]), E4M3)),
    (TypeError, "int64", lambda: encode(torch.tensor([1, 2, 3]), E4M3)),
    (TypeError, "int64", lambda: floor_log2(torch.tensor([1, 2, 3]))),
    (TypeError, "uint8", lambda: decode(torch.tensor([1, 2, 3]), E4M3)),
    (TypeError, "float8_e4m3fn or float8_e5m2.*float32", lambda: fp8_formats.format_of(torch.zeros(2))),
    *((ValueError, "round_to_format", lambda fmt=fmt: cast(torch.ones(1), fmt)) for fmt in OTHERS),
    *((ValueError, "no code for NaN", lambda fmt=fmt: encode(torch.tensor([1, math.nan]), fmt))
      for fmt in OTHERS)])
def test_unknown_roundings_other_dtypes_and_formats_and_nan_without_a_code_are_refused(error, match, call):
    with pytest.raises(error, match=match):
        call()


@for_all_formats
@pytest.mark.parametrize("x", [
    torch.tensor(3.3), torch.empty(0, 5), torch.linspace(-9, 9, 105).view(3, 5, 7),
    torch.linspace(-9, 9, 35).view(5, 7).T, torch.linspace(-9, 9, 70).view(7, 10)[::2, ::3],
    torch.linspace(-9, 9, 7).expand(4, 7)], ids=["0-d", "empty", "3-d", "transposed", "strided", "expanded"])
def test_any_shape_and_stride_gives_what_its_flat_copy_gives(fmt, x):
    flat = x.reshape(-1).clone()
    assert_same(round_to_format(x, fmt), round_to_format(flat, fmt).view(x.shape))
    assert torch.equal(encode(x, fmt), encode(flat, fmt).view(x.shape))
    assert torch.equal(floor_log2(x), floor_log2(flat).view(x.shape))
    codes = (x * 10).to(torch.int32).to(torch.uint8)  # keeps x's strides
    assert_same(decode(codes, fmt), decode(codes.reshape(-1).clone(), fmt).view(x.shape))
    if fmt.dtype:
        assert_same(cast(x, fmt).float(), round_to_format(x, fmt))


def test_the_script_prints_its_tables(capsys):
    fp8_formats.print_formats()
    fp8_formats.print_grids()
    fp8_formats.print_errors()
    printed = capsys.readouterr().out
    assert all(fmt.name in printed for fmt in FORMATS.values())
    assert "0 0.5 1 1.5 2 3 4 6" in printed
    assert printed.count("->") == 3  # every table says how to read it
