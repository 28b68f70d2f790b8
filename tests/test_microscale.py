"""The quantisers: every recipe's scales, MOSS's two levels and the fold, the transpose, and the kernels' equality with them."""

import pytest
import torch
from conftest import DEVICE

import microscale as ms
from fp8_formats import E2M1, E2M3, E3M2, E4M3, E5M2, INT8
from microscale import ALL, RECIPES

FP8 = {"e4m3": E4M3, "e5m2": E5M2}
SHAPES = [(1, 16), (5, 48), (33, 160), (64, 300), (7, 1)]
BLOCKS = [((1, 32), "floor"), ((1, 32), "up"), ((1, 128), "fp32"), ((1, ALL), "up"), ((1, ALL), "fp32")]

needs_triton = pytest.mark.skipif(not ms.HAS_TRITON, reason="Triton is not installed")


def random_rows(R, C, seed=0, device="cpu"):
    """Rows of very different size, a row of zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(R, C, generator=generator) * torch.exp(3 * torch.randn(R, 1, generator=generator))
    if R > 1:
        x[R // 2] = 0
    return x.to(device)


def assert_same(a, b):
    """Bit for bit, scales and data; data of blocks whose scale is NaN may be any."""
    torch.testing.assert_close(a.scale.float(), b.scale.float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(a.dequantize(), b.dequantize(), rtol=0, atol=0, equal_nan=True)
    fine = ms.expand_blocks(a.scale.float(), a.data.shape, a.block).isfinite().expand(a.data.shape)
    assert torch.equal(a.data.view(torch.uint8)[fine], b.data.view(torch.uint8)[fine])


# ---------------------------------------------------------------------------------------------------
# Scales

@pytest.mark.parametrize("fmt", FP8.values(), ids=FP8)
@pytest.mark.parametrize("exponent", range(-100, 100, 7))
def test_up_rule_gives_the_smallest_power_of_two_under_which_the_maximum_fits(fmt, exponent):
    top = torch.tensor(fmt.max) * 2.0**exponent
    above = torch.nextafter(top, torch.tensor(torch.inf))
    below = torch.nextafter(top, torch.tensor(0.0))
    scales = ms.scale_from_amax(torch.stack((below, top, above)), fmt, "up")
    assert scales.tolist() == [2.0**exponent, 2.0**exponent, 2.0**(exponent + 1)]


@pytest.mark.parametrize("rule", ["fp32", "up"])
def test_nothing_saturates_when_the_scale_rounds_up(rule):
    x = random_rows(64, 96)
    q = ms.quantize_reference(x, E4M3, (1, 32), rule)
    assert ms.saturated_share(x, q) == 0


def test_the_floor_rule_of_mx_saturates_above_448_times_its_scale():
    x = torch.tensor([[500.0] + [1.0] * 31])
    q = ms.quantize_reference(x, E4M3, (1, 32), "floor")
    assert q.scale.float().item() == 1 and q.dequantize()[0, 0] == 448
    assert ms.saturated_share(x, q) == 1 / 32


def test_fp32_rule_puts_the_maximum_of_each_block_exactly_on_the_largest_number():
    x = random_rows(8, 256) + 1.0
    q = ms.quantize_reference(x, E4M3, (1, 128), "fp32")
    assert (q.data.float().abs().view(8, 2, 128).amax(-1) == 448).all()


@pytest.mark.parametrize("rule", ["fp32", "floor", "up"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_spoil_their_block_and_no_other(rule, bad):
    x = random_rows(3, 64)
    x[0, 5] = bad
    y = ms.quantize_reference(x, E4M3, (1, 32), rule).dequantize()
    assert y[0, :32].isnan().all()
    assert y[0, 32:].isfinite().all() and y[1:].isfinite().all()


@pytest.mark.parametrize("rule", ["fp32", "floor", "up"])
def test_zeros_stay_zero(rule):
    q = ms.quantize_reference(torch.zeros(2, 40), E4M3, (1, 32), rule)
    assert (q.dequantize() == 0).all() and q.scale.float().isfinite().all()


def test_an_unknown_rule_is_refused_by_name():
    with pytest.raises(ValueError, match="'ceil'.*choose"):
        ms.quantize_reference(torch.ones(2, 2), rule="ceil")


@pytest.mark.parametrize("block", [(1, 32), (1, 128), (128, 128), (1, ALL), (ALL, ALL), (3, 5)])
def test_ragged_last_blocks_get_scales_of_their_own(block):
    x = random_rows(130, 150)
    x[:, -1] *= 1000
    q = ms.quantize_reference(x, E4M3, block, "fp32")
    br, bc = (n if b == ALL else b for b, n in zip(block, x.shape))
    assert q.scale.shape == (-(-130 // br), -(-150 // bc))
    last = x[-(130 % br or br):, -(150 % bc or bc):]
    assert q.scale[-1, -1] == last.abs().amax() / 448


@pytest.mark.parametrize("fmt", [E4M3, E5M2, E3M2, E2M3, E2M1, INT8], ids=lambda f: f.name)
@pytest.mark.parametrize("rule", ["floor", "up"])
def test_every_mx_element_format_quantises_within_half_a_step_of_its_largest_number(fmt, rule):
    x = random_rows(16, 64)
    q = ms.quantize_reference(x, fmt, (1, 32), rule)
    scale = ms.expand_blocks(q.scale.float(), x.shape, q.block)
    step = 2.0**(fmt.emax - fmt.mantissa_bits)   # between the two largest numbers
    inside = x.abs() <= fmt.max * scale
    assert ((x - q.dequantize()).abs() <= step / 2 * scale)[inside].all()


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "none"])
def test_quantising_again_changes_nothing(name):
    recipe = RECIPES[name]
    q = ms.quantize_reference(random_rows(32, 256), E4M3, recipe.act_block, recipe.rule)
    again = ms.quantize_reference(q.dequantize(), E4M3, recipe.act_block, recipe.rule)
    # exact with power-of-two scales; an FP32 scale is 448 / 448 of itself, give or take a rounding of 2^-24
    torch.testing.assert_close(again.dequantize(), q.dequantize(), rtol=0 if recipe.rule != "fp32" else 2**-22, atol=0)


# ---------------------------------------------------------------------------------------------------
# Two levels and the fold

def test_two_level_local_scales_are_powers_of_two_and_at_most_one():
    q = ms.quantize_two_level(random_rows(16, 96))
    local = q.scale.float()
    assert q.scale.dtype == torch.float8_e8m0fnu and local.max() == 1
    assert (torch.frexp(local).mantissa == 0.5).all()


@pytest.mark.parametrize("stale", [1.0, 1e-3, 37.0, 1e5])
def test_a_stale_global_scale_costs_no_accuracy_and_saturates_nothing(stale):
    x = random_rows(64, 256)
    fresh, other = ms.quantize_two_level(x), ms.quantize_two_level(x, global_scale=stale)
    # s moves where numbers fall between two powers of two: that is worth some tenths of a dB, up or down
    assert abs(ms.group_sqnr(x, fresh.dequantize()) - ms.group_sqnr(x, other.dequantize())) < 0.5
    assert other.dequantize().abs().max() >= x.abs().max() * (1 - 2**-4)


def test_folding_equals_quantising_once_per_row_wherever_the_number_is_normal():
    x = random_rows(64, 512)
    folded = ms.fold(ms.quantize_two_level(x, global_scale=1.0))
    direct = ms.quantize_reference(x, E4M3, (1, ALL), "up")
    assert torch.equal(folded.scale, direct.scale)
    normal = direct.data.float().abs() >= E4M3.min_normal
    assert normal.float().mean() > 0.9
    assert torch.equal(folded.data.float()[normal], direct.data.float()[normal])


def test_folding_loses_only_what_is_2_to_the_14_below_its_row():
    x = random_rows(64, 512)
    change = ms.fold(ms.quantize_two_level(x)).dequantize() - ms.quantize_two_level(x).dequantize()
    row = x.abs().amax(1, keepdim=True)
    assert (x.abs() < row * 2**-14).expand_as(change)[change != 0].all()


def test_fold_loss_reports_the_share_and_the_energy_of_what_changed():
    x = torch.full((1, 64), 2.0**-16 * 1.0625)   # subnormal beside a 448, and not on the subnormals' grid
    x[0, 0] = 448
    share, energy = ms.fold_loss(x)
    assert share == 32 / 64 and 0 < energy < 1e-8
    assert ms.fold_loss(torch.ones(4, 64)) == (0, 0)


def test_moss_rescues_small_tokens_that_a_scale_per_tensor_loses():
    x = random_rows(64, 256)
    moss, tensor = (ms.quantize_reference(x, E4M3, RECIPES[n].act_block, RECIPES[n].rule) for n in ("moss", "tensor"))
    assert ms.group_sqnr(x, moss.dequantize()) > 31 > ms.group_sqnr(x, tensor.dequantize()) + 5


# ---------------------------------------------------------------------------------------------------
# The scaling-aware transpose

def test_transpose_with_row_factors_equals_quantising_once_wherever_the_result_is_normal():
    x = random_rows(48, 80)
    q = ms.quantize_reference(x, E4M3, (1, ALL), "up")
    common = q.scale.max()
    moved = ms.transpose_reference(q.data, q.scale / common)
    once = ms.quantize_reference(x.t(), E4M3, (ALL, ALL), "fp32", scale=common.view(1, 1))
    normal = once.data.float().abs() >= E4M3.min_normal
    assert normal.any() and torch.equal(moved.float()[normal], once.data.float()[normal])


def test_transpose_rounds_a_result_that_turns_subnormal_to_nearest_even():
    q = torch.tensor([[1.0, 1.125, 1.875, 1.25]]).to(torch.float8_e4m3fn)
    moved = ms.transpose_reference(q, torch.tensor([[2.0**-8]]))   # the grid there has a step of 2^-9
    assert (moved.float() / 2**-9).flatten().tolist() == [2.0, 2.0, 4.0, 2.0]   # 2, 2.25, 3.75, 2.5 -> even 2


# ---------------------------------------------------------------------------------------------------
# The kernels give the same bits

@needs_triton
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fmt", FP8.values(), ids=FP8)
@pytest.mark.parametrize("block, rule", BLOCKS, ids=str)
def test_quantise_kernel_equals_reference_bit_for_bit(shape, fmt, block, rule):
    x = random_rows(*shape, device=DEVICE)
    for layout in (x, x.t().contiguous().t(), x.bfloat16()):
        assert_same(ms.quantize_triton(layout, fmt, block, rule), ms.quantize_reference(layout, fmt, block, rule))


@needs_triton
@pytest.mark.parametrize("fmt", FP8.values(), ids=FP8)
@pytest.mark.parametrize("block, rule", BLOCKS, ids=str)
def test_quantise_kernel_passes_nan_and_inf_on(fmt, block, rule):
    x = random_rows(6, 96, device=DEVICE)
    x[0, 3], x[2, 40], x[4, 95] = float("nan"), float("inf"), float("-inf")
    assert_same(ms.quantize_triton(x, fmt, block, rule), ms.quantize_reference(x, fmt, block, rule))


@needs_triton
@pytest.mark.parametrize("fmt", FP8.values(), ids=FP8)
def test_quantise_kernel_with_a_given_scale_saturates_and_rounds_like_the_reference(fmt):
    x = random_rows(20, 300, device=DEVICE)
    scale = (x.abs().max() / fmt.max / 4).view(1, 1)
    kernel, reference = (f(x, fmt, (ALL, ALL), "fp32", scale) for f in (ms.quantize_triton, ms.quantize_reference))
    assert_same(kernel, reference)
    assert reference.data.float().abs().max() == fmt.max


@needs_triton
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fmt", FP8.values(), ids=FP8)
def test_transpose_kernel_equals_reference_bit_for_bit(shape, fmt):
    q = ms.quantize_reference(random_rows(*shape, device=DEVICE), fmt, (1, ALL), "up")
    for factor in (None, q.scale / q.scale.max()):
        expected = ms.transpose_reference(q.data, factor, fmt)
        assert torch.equal(ms.transpose_triton(q.data, factor, fmt).view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "none"])
def test_both_fp8_copies_of_a_weight_stand_for_the_same_weight(name):
    w = random_rows(96, 160, device=DEVICE)
    recipe = RECIPES[name]
    scale = None if recipe.weight_scale == "block" else (w.abs().max() / 448).view(1, 1)
    a, b = ms.quantize_weight(w, recipe, scale)
    assert a.data.shape == (96, 160) and b.data.shape == (160, 96)
    if name == "mx":   # E8M0 blocks lie along each sum, so W is rounded twice, each time from the master weight
        assert ms.sqnr(w, a.dequantize()) > 25 and ms.sqnr(w.t(), b.dequantize()) > 25
    else:
        assert torch.equal(a.dequantize(), b.dequantize().t())
