"""The quantizers: scales of every recipe, two levels and the fold, the transpose; norm, SwiGLU and RoPE. The
kernels give the same bits, but for what another route through float32 moves over a tie."""

import dataclasses

import pytest
import torch
from conftest import DEVICE
from torch.nn import functional as F

import microscale as ms
from fp8_formats import (E2M1, E2M3, E3M2, E4M3, E5M2, FORMATS, INT8, cast, decode, encode, floor_log2,
                         round_to_format, uncast)
from microscale import ALL, RECIPES

FP8 = {"e4m3": E4M3, "e5m2": E5M2}
SHAPES = [(1, 16), (5, 48), (33, 160), (64, 300), (7, 1)]
ROWS = [(7, 1), (130, 16), (5, 48), (9, 300), (5, 1000), (3, 1024), (3, 2049)]
HALVES = [(7, 1), (5, 48), (3, 1024), (2, 4100)]   # R, F: the kernels of SwiGLU read 4096 columns at a time
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


def assert_rounds(q, x, fmt, amax=None):
    """q is x (R, C) under a power of two per row, give or take what float32 may do to x on another route.
    amax (R, 1): what the scales are to be taken from, where it is not max|x|.

    Sums in another order and an approximate sigmoid (|gate| <= 32 here) move a value by less than 2^-18 of
    itself, and by 2^-22 of its row's maximum where terms cancel. Rounding is monotone, so a code lies between
    those of the two ends. Codes that differ sit next to a tie, which is rare: 1% at most.
    """
    scale = None if amax is None else ms.scale_from_amax(amax.float(), fmt, "up")
    exact = ms.quantize_reference(x.float(), fmt, (1, ALL), "up", scale)
    assert q.data.dtype == fmt.dtype and q.block == (1, ALL)
    assert torch.equal(q.scale, exact.scale)   # no maximum drawn here lies that close to fmt.max 2^k
    slack = 2**-18 * x.abs() + 2**-22 * x.abs().amax(1, keepdim=True)
    low, high = (ms.cast((x + end) / q.scale, fmt).float() for end in (-slack, slack))
    assert ((low <= q.data.float()) & (q.data.float() <= high)).all()
    assert (q.data.float() != exact.data.float()).float().mean() <= 0.01


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


@pytest.mark.parametrize("fmt", FP8.values(), ids=FP8)
def test_the_rounded_reciprocal_of_an_fp32_scale_still_puts_any_maximum_on_the_largest_number(fmt):
    x = torch.linspace(1, 2, 4097) * 2.0**torch.tensor([-110, -7, 0, 9, 127])[:, None]   # blocks of one value
    x = x[x.isfinite()].view(-1, 1)
    assert (ms.quantize_reference(x, fmt, (1, ALL), "fp32").data.float() == fmt.max).all()


@pytest.mark.parametrize("rule", ["fp32", "floor", "up"])
def test_a_scale_measured_in_a_pass_of_its_own_is_that_of_the_whole_tensor(rule):
    for x in (random_rows(33, 160), random_rows(33, 160).bfloat16(), random_rows(33, 160).t()[3:50]):
        expected = ms.scale_from_amax(ms.block_amax(x, (ALL, ALL)), E4M3, rule)
        assert torch.equal(ms.measured_scale(x, E4M3, rule), expected) and expected.shape == (1, 1)
    assert ms.measured_scale(torch.tensor([[1.0, float("nan")]]), E4M3, rule).isnan()


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


def test_a_given_scale_is_used_as_it_is_in_small_blocks_too():
    x, scale = random_rows(3, 64), torch.tensor([[0.0248]])
    assert ms.sqnr(x, ms.quantize(x, E4M3, (1, 32), "up", scale).dequantize()) > 30


def test_a_recipe_with_one_scale_per_weight_cannot_have_small_weight_blocks():
    with pytest.raises(ValueError, match=r"'mine'.*\(128, 128\).*predicted"):
        dataclasses.replace(ms.RECIPES["group"], name="mine", weight_scale="predicted")


@pytest.mark.parametrize("width", [16, 48, 512])
def test_blocks_of_any_width_are_quantized_where_the_kernels_run(width, monkeypatch):
    monkeypatch.setattr(ms, "kernels_run_on", lambda device: ms.HAS_TRITON)
    x = random_rows(4, 1000)
    assert ms.sqnr(x, ms.quantize(x.to(DEVICE), E4M3, (1, width), "up").dequantize().cpu()) > 30


@pytest.mark.parametrize("fmt", ["int8", "e2m1"])
def test_formats_that_are_not_fp8_are_emulated_where_the_kernels_run(fmt, monkeypatch):
    x, fmt = random_rows(4, 1000, device=DEVICE), FORMATS[fmt]
    expected = [ms.quantize_reference(x, fmt, block, "up").data for block in ((1, 32), (1, ALL))]
    monkeypatch.setattr(ms, "kernels_run_on", lambda device: ms.HAS_TRITON)
    for block, data in zip(((1, 32), (1, ALL)), expected):
        assert torch.equal(ms.quantize(x, fmt, block, "up").data, data)
    assert torch.equal(ms.quantize_both(x, fmt, torch.ones(1, 1, device=DEVICE))[1].data,
                       ms.to_grid(x, fmt).t())
    assert torch.equal(ms.quantize_norm(x, "none", fmt=fmt).data, data)


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
def test_every_mx_element_format_quantizes_within_half_a_step_of_its_largest_number(fmt, rule):
    x = random_rows(16, 64)
    q = ms.quantize_reference(x, fmt, (1, 32), rule)
    scale = ms.expand_blocks(q.scale.float(), x.shape, q.block)
    step = 2.0**(fmt.emax - fmt.mantissa_bits)   # between the two largest numbers
    inside = x.abs() <= fmt.max * scale
    assert ((x - q.dequantize()).abs() <= step / 2 * scale)[inside].all()


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "none"])
def test_quantizing_again_changes_nothing(name):
    recipe = RECIPES[name]
    q = ms.quantize_reference(random_rows(32, 256), E4M3, recipe.act_block, recipe.rule)
    again = ms.quantize_reference(q.dequantize(), E4M3, recipe.act_block, recipe.rule)
    # exact with power-of-two scales; an FP32 scale is 448 / 448 of itself, give or take a rounding of 2^-24
    rtol = 2**-22 if recipe.rule == "fp32" else 0
    torch.testing.assert_close(again.dequantize(), q.dequantize(), rtol=rtol, atol=0)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "none"])
def test_quantizing_the_transpose_is_quantizing_along_the_other_axis(name):
    x, recipe = random_rows(160, 300), RECIPES[name]
    moved = ms.quantize_reference(x.t(), E4M3, recipe.act_block, recipe.rule)
    across = ms.quantize_reference(x, E4M3, recipe.act_block[::-1], recipe.rule)   # of 32 x 1, 128 x 1, ...
    assert torch.equal(moved.scale.float(), across.scale.float().t())
    assert torch.equal(moved.data.float(), across.data.float().t())


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_any_axis_of_any_tensor_is_quantized_after_it_is_moved_to_the_end(axis):
    x = random_rows(40, 48 * 64).view(40, 48, 64)
    n = x.shape[axis]
    rows = x.movedim(axis, -1).reshape(-1, n)
    y = ms.quantize_reference(rows).dequantize().view(x.movedim(axis, -1).shape).movedim(-1, axis)
    for first in range(0, n, 32):   # each block of 32 by hand: one number per line through the tensor
        block, kept = x.narrow(axis, first, min(32, n - first)), y.narrow(axis, first, min(32, n - first))
        scale = ms.scale_from_amax(block.abs().amax(axis, keepdim=True), E4M3, "up")
        assert torch.equal(kept, (block / scale).to(torch.float8_e4m3fn).float() * scale)


# ---------------------------------------------------------------------------------------------------
# Two levels and the fold

def test_two_level_local_scales_are_powers_of_two_and_at_most_one():
    q = ms.quantize_two_level(random_rows(16, 96))
    local = q.scale.float()
    assert q.scale.dtype == torch.float8_e8m0fnu and local.max() == 1
    assert (torch.frexp(local).mantissa == 0.5).all()


def test_a_fresh_global_scale_is_taken_over_the_tensor_or_over_each_row():
    x = random_rows(64, 256) + 1e-3   # no row of zeros
    tensor = ms.quantize_two_level(x)
    row = ms.quantize_two_level(x, global_block=(1, ALL))
    assert torch.equal(tensor.global_scale, (x.abs().amax() / 448).view(1, 1))
    assert torch.equal(row.global_scale, x.abs().amax(1, keepdim=True) / 448)
    assert (row.scale.float().amax(1) == 1).all()   # the largest block of every row needs no more
    assert (row.data.float().abs().amax(1) == 448).all()
    for q in (tensor, row):   # half a step of the blocks' largest binade, [256, 448], is 16
        bound = 16 * q.global_scale * ms.expand_blocks(q.scale.float(), x.shape, q.block)
        assert ((q.dequantize() - x).abs() <= bound * (1 + 2**-20)).all()


GIVEN = {"number": 3, "scalar": torch.tensor(0.37), "1 x 1": torch.tensor([[5e-3]]),
         "float64": torch.tensor(0.1, dtype=torch.float64), "per row": torch.logspace(-2, 1, 64)[:, None]}


@pytest.mark.parametrize("s", GIVEN.values(), ids=GIVEN)
def test_a_given_global_scale_may_be_a_number_or_a_tensor_or_one_per_row(s):
    x = random_rows(64, 256)
    q = ms.quantize_two_level(x, global_scale=s)
    s = torch.as_tensor(s).float()
    assert q.global_scale.dtype == torch.float32 and torch.equal(q.global_scale, s)
    by_hand = ms.quantize_reference(x / s, E4M3, (1, 32), "up")          # x / s in one level
    assert torch.equal(q.data.float(), by_hand.data.float())
    assert torch.equal(q.scale.float(), by_hand.scale.float())
    assert torch.equal(q.dequantize(), by_hand.dequantize() * s)


@pytest.mark.parametrize("block", [(ALL, ALL), (1, ALL)], ids=["per tensor", "per row"])
@pytest.mark.parametrize("growth", [1.7, 1000, 1e-3])
def test_the_scale_of_the_step_before_costs_no_accuracy_when_the_tensor_grows(block, growth):
    x = random_rows(64, 256, seed=1)
    stale = ms.quantize_two_level(x, global_block=block).global_scale
    x = x * growth
    fresh, other = ms.quantize_two_level(x, global_block=block), ms.quantize_two_level(x, global_scale=stale)
    assert ms.saturated_share(x, other) == 0
    # where the maximum falls between two powers of two is chance: worth some tenths of a dB, up or down
    assert abs(ms.sqnr(x, fresh.dequantize(), group=32) - ms.sqnr(x, other.dequantize(), group=32)) < 0.5


@pytest.mark.parametrize("s", [None, 0.37, GIVEN["per row"]], ids=["fresh", "stale", "stale per row"])
@pytest.mark.parametrize("block", [(ALL, ALL), (1, ALL)], ids=["per tensor", "per row"])
def test_folding_changes_no_normal_number_under_any_global_scale(s, block):
    x = random_rows(64, 512)
    q = ms.quantize_two_level(x, global_scale=s, global_block=block)
    folded = ms.fold(q)
    assert folded.scale.shape == (64, 1) and folded.global_scale is None   # s is in it
    normal = folded.data.float().abs() > E4M3.min_normal   # the smallest may be rounded up to it
    assert normal.float().mean() > 0.9
    assert torch.equal(folded.dequantize()[normal], q.dequantize()[normal])


def test_a_global_scale_per_row_folds_into_an_fp32_scale_per_row():
    x = random_rows(64, 512)
    folded = ms.fold(ms.quantize_two_level(x, global_block=(1, ALL)))
    direct = ms.quantize_reference(x, E4M3, (1, ALL), "fp32")
    normal = direct.data.float().abs() >= E4M3.min_normal
    assert torch.equal(folded.dequantize()[normal], direct.dequantize()[normal])


def test_inf_spoils_what_shares_its_global_scale():
    x = random_rows(6, 96)
    x[1, 40] = float("inf")
    assert ms.quantize_two_level(x).dequantize().isnan().all()
    per_row = ms.quantize_two_level(x, global_block=(1, ALL)).dequantize().isnan()
    assert per_row[1].all() and per_row.sum() == 96
    given = ms.quantize_two_level(x, global_scale=1.0).dequantize().isnan()
    assert given[1, 32:64].all() and given.sum() == 32


def test_folding_equals_quantizing_once_per_row_wherever_the_number_is_normal():
    x = random_rows(64, 512)
    folded = ms.fold(ms.quantize_two_level(x, global_scale=1.0))
    direct = ms.quantize_reference(x, E4M3, (1, ALL), "up")
    assert torch.equal(folded.scale, direct.scale)
    normal = direct.data.float().abs() >= E4M3.min_normal
    assert normal.float().mean() > 0.9
    assert torch.equal(folded.data.float()[normal], direct.data.float()[normal])


def test_folding_loses_only_what_is_about_2_to_the_14_below_its_row():
    x = random_rows(64, 512)
    change = ms.fold(ms.quantize_two_level(x)).dequantize() - ms.quantize_two_level(x).dequantize()
    row = x.abs().amax(1, keepdim=True)
    # the row's maximum lies above 224 scales, and a number is subnormal below 2^-6 of one
    assert (x.abs() < row * 2**-6 / 224).expand_as(change)[change != 0].all()


def test_fold_loss_reports_the_share_and_the_energy_of_what_changed():
    x = torch.full((1, 64), 2.0**-16 * 1.0625)   # subnormal beside a 448, and not on the subnormals' grid
    x[0, 0] = 448
    share, energy = ms.fold_loss(x)
    assert share == 32 / 64 and 0 < energy < 1e-8
    assert ms.fold_loss(torch.ones(4, 64)) == (0, 0)


def test_moss_rescues_small_tokens_that_a_scale_per_tensor_loses():
    x = random_rows(64, 256)
    moss, tensor = ms.QUANTIZERS["moss"](x), ms.QUANTIZERS["tensor"](x)
    assert ms.sqnr(x, moss.dequantize(), group=32) > 31 > ms.sqnr(x, tensor.dequantize(), group=32) + 5


# ---------------------------------------------------------------------------------------------------
# The scaling-aware transpose

def test_transpose_with_row_factors_equals_quantizing_once_wherever_the_result_is_normal():
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


def test_scaling_aware_transpose_keeps_the_accuracy_of_one_rounding_and_quantizing_twice_does_not():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 512, generator=generator) * torch.logspace(-1, 1, 256)[:, None]
    moss, group = ms.QUANTIZERS["moss"], ms.QUANTIZERS["group"]
    moved, once, twice = ms.move(x), group(x.t()), group(group(x).dequantize().t())
    assert moved.data.shape == (512, 256) and moved.data.is_contiguous()
    assert ms.sqnr(x.t(), moved.dequantize()) == pytest.approx(ms.sqnr(x, moss(x).dequantize()), abs=0.01)
    # two independent roundings have twice the noise, 3 dB; FP32 scales store the maxima exactly, so not quite
    assert ms.sqnr(x.t(), twice.dequantize()) < ms.sqnr(x.t(), once.dequantize()) - 2
    assert ms.sqnr(x.t(), twice.dequantize()) < ms.sqnr(x.t(), moved.dequantize()) - 1.5


def test_powers_of_two_share_one_grid_so_a_second_rounding_along_the_other_axis_changes_nothing():
    x = random_rows(256, 256) + 1e-3
    once = ms.quantize_reference(x, E4M3, (1, 32), "up").dequantize()
    again = ms.quantize_reference(once.t(), E4M3, (1, 32), "up")
    normal = again.data.float().abs() > E4M3.min_normal   # the smallest may be rounded up to it
    assert normal.float().mean() > 0.5 and torch.equal(again.dequantize()[normal], once.t()[normal])


# ---------------------------------------------------------------------------------------------------
# What comes before a linear layer

EQUATIONS = {
    "rms": lambda x, w: x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt() * w,
    "layer": lambda x, w: (x - x.mean(1, keepdim=True)) / (x.var(1, False, keepdim=True) + 1e-5).sqrt(),
}


def in_pytorch(name):
    """The function as it runs where there are no kernels."""
    def run(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ms, "kernels_run_on", lambda _: False)
            return getattr(ms, name)(*args)
    return run


def three(name):
    """The function as this device chooses, in PyTorch, and its kernel."""
    kernel = pytest.param(getattr(ms, f"{name}_triton", None), marks=needs_triton)
    return pytest.mark.parametrize("run", [getattr(ms, name), in_pytorch(name), kernel],
                                   ids=["chosen", "pytorch", "kernel"])


def layouts(R, width, **kwargs):
    """Rows with a mean, |x| <= 32: float32, bfloat16, columns of a wider tensor, a transpose."""
    wide, tall = (random_rows(*shape, **kwargs).clamp(-24, 24) for shape in ((R, width + 5), (width, R)))
    wide, tall = wide + wide.abs() / 4, tall + tall.abs() / 4
    return wide[:, :width].contiguous(), wide[:, :width].bfloat16(), wide[:, 3:width + 3], tall.t()


@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize("kind", EQUATIONS)
def test_norm_rows_are_the_equation_in_float32_then_the_quantizer(kind, shape):
    weight = random_rows(1, shape[1], seed=1)[0]
    for x in layouts(*shape):
        w = weight.to(x.dtype)
        assert_rounds(in_pytorch("quantize_norm")(x, kind, w), EQUATIONS[kind](x.double(), w.double()), E4M3)


@pytest.mark.filterwarnings("ignore:invalid value")   # NumPy's, in Triton's interpreter
@three("quantize_norm")
@pytest.mark.parametrize("kind", ms.NORMS)
def test_nan_and_inf_spoil_the_row_that_is_made_of_them_and_no_other(kind, run):
    x, weight = random_rows(7, 600, device=DEVICE).clamp(-24, 24), torch.ones(600, device=DEVICE)
    fine = run(x, kind, weight)
    x[0, 3], x[2, 599], x[4, 290] = float("nan"), float("inf"), float("-inf")
    assert_spoilt(run(x, kind, weight), fine, [0, 2, 4])


def assert_spoilt(q, fine, rows):
    """These rows are NaN, the others those of `fine`."""
    others = [r for r in range(len(fine.scale)) if r not in rows]
    assert q.scale[rows].isnan().all() and q.dequantize()[rows].isnan().all()
    assert torch.equal(q.dequantize()[others], fine.dequantize()[others]) and fine.scale.isfinite().all()


# ---------------------------------------------------------------------------------------------------
# SwiGLU

def swiglu_gradient(h, da):
    """By autograd."""
    h = h.detach().requires_grad_()
    gate, up = h.chunk(2, dim=1)
    return torch.autograd.grad(F.silu(gate) * up, h, da)[0]


def bound_of_gradient(h, da):
    gate, up = h.double().chunk(2, dim=1)
    return torch.maximum(1.1 * (da * up).abs(), (da * gate).abs()).amax(dim=1, keepdim=True)


def in_fp8(h):
    return ms.quantize_reference(h, E4M3, (1, ALL), "up")


def test_swiglu_reads_the_gate_from_the_first_half_and_up_from_the_second():
    h = torch.tensor([[0.0, 64.0, 3.0, 3.0]])   # silu(0) = 0, silu(64) = 64
    assert ms.swiglu(h).tolist() == [[0.0, 192.0]]


@pytest.mark.parametrize("shape", HALVES, ids=str)
def test_swiglu_rows_are_the_equation_rounded_once_and_h_rounded_once(shape):
    for h in layouts(shape[0], 2 * shape[1]):
        (a, h_q), (gate, up) = in_pytorch("quantize_swiglu")(h), h.double().chunk(2, dim=1)
        assert_rounds(a, gate / (1 + (-gate).exp()) * up, E4M3)
        assert_same(h_q, in_fp8(h))


@pytest.mark.filterwarnings("ignore:(invalid value|overflow)")   # NumPy's, in Triton's interpreter
@three("quantize_swiglu")
def test_nan_and_inf_spoil_their_row_of_both_outputs_and_an_overflow_that_of_the_product_alone(run):
    h = random_rows(7, 600, device=DEVICE).clamp(-24, 24)
    fine_a, fine_h = run(h)
    h[0, 3], h[2, 599], h[4, 290] = float("nan"), float("inf"), float("-inf")   # gate, up, gate
    a, h_q = run(h)
    assert_spoilt(a, fine_a, [0, 2, 4])
    assert_spoilt(h_q, fine_h, [0, 2, 4])
    h[6, [290, 590]] = 1e30
    a, h_q = run(h)
    assert_spoilt(a, fine_a, [0, 2, 4, 6])
    assert h_q.dequantize()[6].isfinite().all()


def test_swiglu_backward_is_the_gradient_that_autograd_gives_at_the_h_that_was_kept():
    for h, da in zip(layouts(64, 600), layouts(64, 300, seed=1)):
        h_q = in_fp8(h)
        q = in_pytorch("quantize_swiglu_gradient")(h_q, da)
        gradient = swiglu_gradient(h_q.dequantize().double(), da.double())
        assert_rounds(q, gradient, E4M3, bound_of_gradient(h_q.dequantize(), da))
        assert ms.sqnr(gradient, q.dequantize(), group=600) > 30   # rounded once: E4M3 has 31 to 32 dB


def test_the_bound_of_the_swiglu_gradient_holds_and_is_seldom_far():
    """silu' is largest at a gate of 2.3994. There d gate comes within 2e-4 of the bound, nowhere above it."""
    gate = torch.linspace(-60, 60, 120_001, dtype=torch.float64)[:, None]
    for up in (0.0, 1.0, 1e3):
        h, da = torch.cat((gate, torch.full_like(gate, up)), dim=1), torch.full_like(gate, -3.0)
        largest = swiglu_gradient(h, da).abs().amax(dim=1, keepdim=True)
        assert (largest <= bound_of_gradient(h, da)).all()
    at_peak, da = torch.tensor([[2.3994, 1e3]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    assert swiglu_gradient(at_peak, da).abs().max() > (1 - 2e-4) * bound_of_gradient(at_peak, da)
    h, da = in_fp8(torch.randn(200, 2048)), torch.randn(200, 1024)
    of_maximum = in_fp8(swiglu_gradient(h.dequantize(), da)).scale
    ratio = in_pytorch("quantize_swiglu_gradient")(h, da).scale / of_maximum
    assert ratio.min() == 1 and ratio.max() <= 4 and ratio.mean() < 1.5


@pytest.mark.filterwarnings("ignore:invalid value")
@three("quantize_swiglu_gradient")
def test_swiglu_backward_of_zeros_is_zero_and_nan_and_inf_spoil_their_row_only(run):
    h, da = random_rows(7, 600, device=DEVICE).clamp(-24, 24), random_rows(7, 300, seed=1, device=DEVICE)
    h[5], da[6] = 0, 0
    fine = run(in_fp8(h), da)
    assert (fine.dequantize()[5:] == 0).all()
    h[0, 3], h[2, 599], da[4, 290] = float("nan"), float("-inf"), float("inf")
    assert_spoilt(run(in_fp8(h), da), fine, [0, 2, 4])


@three("quantize_swiglu_gradient")
def test_swiglu_backward_reads_h_of_any_strides(run):
    h, da = random_rows(40, 5, device=DEVICE).clamp(-24, 24), random_rows(5, 20, seed=1, device=DEVICE)
    assert_same(run(in_fp8(h.t()), da), run(in_fp8(h.t().contiguous()), da))


# ---------------------------------------------------------------------------------------------------
# RoPE

# B, T, heads, kv_heads, head_dim
HEADS = [(1, 1, 1, 1, 6), (2, 5, 4, 2, 16), (2, 33, 3, 1, 64), (1, 3, 33, 33, 64)]


def angles(T, head_dim):
    """cos, sin (T, head_dim / 2)."""
    angle = torch.randn(T, head_dim // 2, generator=torch.Generator().manual_seed(9)) * 10
    return angle.cos().to(DEVICE), angle.sin().to(DEVICE)


def heads(B, T, n, head_dim, seed=0):
    """(B, T, n, head_dim), tokens of very different size."""
    return random_rows(B * T, n * head_dim, seed, DEVICE).view(B, T, n, head_dim)


def head_layouts(B, T, n, head_dim, seed):
    """As heads lie in memory: one after another, tokens of a head together, beside others, strided."""
    x = heads(B, T, n, head_dim, seed)
    beside = torch.zeros(B, T, n + 3, head_dim, device=DEVICE)
    beside[:, :, 1:-2] = x
    return x, x.transpose(1, 2).contiguous().transpose(1, 2), beside[:, :, 1:-2], x.mT.contiguous().mT


def test_rope_multiplies_the_complex_numbers_x_i_and_x_of_the_other_half():
    cos, sin = angles(5, 16)
    x = heads(2, 5, 3, 16)
    turned = torch.complex(*x.double().chunk(2, dim=-1)) * torch.complex(cos.double(), sin.double())[:, None]
    exact = torch.cat((turned.real, turned.imag), dim=-1)
    assert ((ms.rope(x, cos, sin) - exact).abs() <= 2**-22 * turned.abs().repeat(1, 1, 1, 2)).all()
    assert torch.equal(ms.rope(x.bfloat16(), cos, sin), ms.rope(x.bfloat16().float(), cos, sin).bfloat16())


# A kernel may fuse a product and a sum: 2^-22 of a pair. In BF16 that is a code next to a tie, and the
# interpreter cuts bits off where a GPU rounds.
@pytest.mark.parametrize("dtype, code", [(torch.float32, 0), (torch.bfloat16, 2**-7)], ids=str)
@pytest.mark.parametrize("T, n, head_dim", [(1, 3, 6), (5, 3, 16), (33, 2, 64), (1, 40, 64)])
@pytest.mark.parametrize("name", ["rope_", pytest.param("rope_triton_", marks=needs_triton)])
def test_rope_in_place_equals_rope_and_touches_nothing_around_it(name, T, n, head_dim, dtype, code):
    whole, (cos, sin) = heads(4, T + 1, n + 3, head_dim).to(dtype), angles(T, head_dim)
    inside = torch.zeros_like(whole, dtype=torch.bool)
    x, within = (z[:-1, 1:, 1:-2] for z in (whole, inside))
    before, expected = whole.clone(), ms.rope(x, cos, sin)
    pair = torch.hypot(*x.float().chunk(2, dim=-1)).repeat(1, 1, 1, 2)
    getattr(ms, name)(x, cos, sin)
    assert ((x.float() - expected.float()).abs() <= code * expected.float().abs() + 2**-22 * pair).all()
    within.fill_(True)
    assert torch.equal(whole[~inside], before[~inside])


@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_qkv_gradient_is_what_autograd_gives_through_split_and_rope(shape):
    B, T, n, kv, head_dim = shape
    qkv = torch.randn(B * T, (n + 2 * kv) * head_dim, device=DEVICE, requires_grad=True)
    q, k, v = qkv.view(B, T, -1, head_dim).split((n, kv, kv), dim=2)
    cos, sin = angles(T, head_dim)
    gradients = [heads(B, T, count, head_dim, seed) for seed, count in enumerate((n, kv, kv))]
    (exact,) = torch.autograd.grad((ms.rope(q, cos, sin), ms.rope(k, cos, sin), v), qkv, gradients)
    gradient = ms.qkv_gradient(*gradients, cos, sin)
    assert ((gradient - exact).abs() <= 2**-22 * exact.abs().amax(1, keepdim=True)).all()
    assert_same(in_pytorch("quantize_qkv_gradient")(*gradients, cos, sin), in_fp8(gradient))


@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_the_backward_pass_of_rope_turns_back_what_rope_turned(shape):
    B, T, n, kv, head_dim = shape
    q, k, v = (heads(B, T, count, head_dim, seed) for seed, count in enumerate((n, kv, kv)))
    cos, sin = angles(T, head_dim)
    back = ms.qkv_gradient(ms.rope(q, cos, sin), ms.rope(k, cos, sin), v, cos, sin)
    x = torch.cat((q, k, v), dim=2).view(B * T, -1)
    assert ((back - x).abs() <= 2**-21 * x.abs().amax(1, keepdim=True)).all()   # two turns in float32


@needs_triton
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_rope_backward_kernel_equals_reference_but_for_float32_rounding_wherever_heads_lie(shape):
    B, T, n, kv, head_dim = shape
    cos, sin = angles(T, head_dim)
    dq, dk, dv = (head_layouts(B, T, count, head_dim, seed) for seed, count in enumerate((n, kv, kv)))
    for i, dtype in enumerate(2 * (torch.float32, torch.bfloat16)):   # no two of the three in the same layout
        gradients = [x.to(dtype) for x in (dq[i], dk[i - 1], dv[i - 2])]
        q = ms.quantize_qkv_gradient_triton(*gradients, cos, sin)
        assert_rounds(q, ms.qkv_gradient(*gradients, cos, sin), E4M3)


@pytest.mark.filterwarnings("ignore:invalid value")
@three("quantize_qkv_gradient")
def test_rope_backward_of_zeros_is_zero_and_nan_and_inf_spoil_their_row_only(run):
    dq, dk, dv = (heads(2, 5, n, 16, seed) for seed, n in enumerate((4, 2, 2)))
    for x in (dq, dk, dv):
        x[1, 4] = 0
    fine = run(dq, dk, dv, *angles(5, 16))
    assert (fine.dequantize()[9] == 0).all()
    dq[0, 1, 3, 2], dk[1, 0, 0, 15], dv[1, 2, 1, 7] = float("nan"), float("inf"), float("-inf")
    assert_spoilt(run(dq, dk, dv, *angles(5, 16)), fine, [1, 5, 7])


# ---------------------------------------------------------------------------------------------------
# What the tables say

def test_sqnr_of_a_known_error():
    x = torch.tensor([[1.0] * 32 + [100.0] * 32])
    y = x * torch.tensor([1.1] * 32 + [1.001] * 32)                       # errors of 20 dB and of 60 dB
    assert ms.sqnr(x, y, group=32) == pytest.approx(40, abs=1e-3)
    assert ms.sqnr(x, y) == pytest.approx(10 * torch.tensor(320032 / 0.64).log10().item(), abs=1e-3)


def ranking(x, fmt):
    return [ms.sqnr(x, ms.QUANTIZERS[name](x, fmt).dequantize()) for name in ("tensor", "group", "two-level")]


def test_theorem_1_holds_for_an_integer_among_outliers_and_for_a_float_nowhere():
    data = ms.synthetic_data()
    tensor, group, two_level = ranking(data["1% of channels x 50"], INT8)
    assert tensor + 1 < group < two_level - 1
    tensor, group, two_level = ranking(data["Gaussian"], INT8)
    assert tensor + 1 < two_level < group - 1
    for x in data.values():
        tensor, group, two_level = ranking(x, E4M3)
        assert two_level == pytest.approx(tensor, abs=0.01)


def test_real_data_are_the_inputs_and_output_gradients_of_the_linear_layers():
    data = ms.real_data(steps=2, batch=2, T=32, d=64)
    widths = {"X of qkv": 64, "X of out": 64, "X of gate_up": 64, "X of down": 192,
              "dY of qkv": 192, "dY of out": 64, "dY of gate_up": 384, "dY of down": 64}
    assert {name: x.shape for name, x in data.items()} == {name: (64, n) for name, n in widths.items()}
    assert all(x.isfinite().all() and x.any() and not x.requires_grad for x in data.values())
    norms = data["X of qkv"].square().mean(1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-2, atol=0)   # what a norm hands on
    for _, columns, _ in ms.TABLES:
        assert all(isinstance(cell(data["X of down"]), str) for cell in columns.values())


# ---------------------------------------------------------------------------------------------------
# The kernels give the same bits

def quantize_by_kernel(x, fmt, block, rule):
    if block == (1, ALL):
        return ms.quantize_norm_triton(x, "none", None, fmt, rule)
    return ms.quantize_triton(x, fmt, block, rule)


@needs_triton
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fmt", FP8.values(), ids=FP8)
@pytest.mark.parametrize("block, rule", BLOCKS, ids=str)
def test_quantize_kernel_equals_reference_bit_for_bit(shape, fmt, block, rule):
    x = random_rows(*shape, device=DEVICE)
    for layout in (x, x.t().contiguous().t(), x.bfloat16()):
        expected = ms.quantize_reference(layout, fmt, block, rule)
        assert_same(quantize_by_kernel(layout, fmt, block, rule), expected)


@needs_triton
@pytest.mark.parametrize("fmt", FP8.values(), ids=FP8)
@pytest.mark.parametrize("block, rule", BLOCKS, ids=str)
def test_quantize_kernel_passes_nan_and_inf_on(fmt, block, rule):
    x = random_rows(6, 96, device=DEVICE)
    x[0, 3], x[2, 40], x[4, 95] = float("nan"), float("inf"), float("-inf")
    assert_same(quantize_by_kernel(x, fmt, block, rule), ms.quantize_reference(x, fmt, block, rule))


@needs_triton
@pytest.mark.parametrize("fmt", FP8.values(), ids=FP8)
def test_quantize_kernel_with_a_given_scale_saturates_and_rounds_like_the_reference(fmt):
    x = random_rows(20, 300, device=DEVICE)
    scale = (x.abs().max() / fmt.max / 4).view(1, 1)
    reference = ms.quantize_reference(x, fmt, (ALL, ALL), "fp32", scale)
    assert_same(ms.quantize_triton(x, fmt, (ALL, ALL), "fp32", scale), reference)
    assert reference.data.float().abs().max() == fmt.max


@needs_triton
@pytest.mark.parametrize("shape", [*SHAPES, (130, 140)], ids=str)
@pytest.mark.parametrize("fmt", FP8.values(), ids=FP8)
def test_one_reading_gives_the_quantized_tensor_and_its_exact_transpose(shape, fmt):
    for x in (*layouts(*shape, device=DEVICE), random_rows(*shape[::-1], device=DEVICE).bfloat16().t()):
        for scale in (ms.measured_scale(x, fmt), ms.measured_scale(x, fmt) / 3):   # the second one saturates
            by_kernel = ms.quantize_triton(x, fmt, (ALL, ALL), "fp32", scale, True)
            for q, t in (ms.quantize_both(x, fmt, scale), by_kernel):
                assert_same(q, ms.quantize_reference(x, fmt, (ALL, ALL), "fp32", scale))
                assert torch.equal(t.data.view(torch.uint8), q.data.view(torch.uint8).t())
                assert t.data.is_contiguous() and torch.equal(t.scale, scale) and t.block == (ALL, ALL)


@needs_triton
@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize("fmt", FP8.values(), ids=FP8)
def test_rows_kernel_holds_rows_of_any_width_bit_for_bit(shape, fmt):
    for x in layouts(*shape, device=DEVICE):
        reference = in_pytorch("quantize_norm")(x, "none", None, fmt)
        assert_same(ms.quantize_norm_triton(x, "none", None, fmt), reference)


@needs_triton
@pytest.mark.parametrize("shape", ROWS, ids=str)
@pytest.mark.parametrize("fmt", FP8.values(), ids=FP8)
@pytest.mark.parametrize("kind", EQUATIONS)
def test_rows_kernel_equals_reference_but_for_float32_rounding(kind, fmt, shape):
    weight = random_rows(1, shape[1], seed=1, device=DEVICE)[0]
    for x in layouts(*shape, device=DEVICE):
        w = weight.to(x.dtype)
        assert_rounds(ms.quantize_norm_triton(x, kind, w, fmt), ms.NORMS[kind](x.float(), w.float()), fmt)


@needs_triton
@pytest.mark.parametrize("shape", HALVES, ids=str)
def test_swiglu_kernel_equals_reference_but_for_float32_rounding_of_the_product(shape):
    for h in layouts(shape[0], 2 * shape[1], device=DEVICE):
        a, h_q = ms.quantize_swiglu_triton(h)
        assert_rounds(a, ms.swiglu(h.float()), E4M3)
        assert_same(h_q, in_fp8(h))


@needs_triton
@pytest.mark.parametrize("shape", HALVES, ids=str)
def test_swiglu_backward_kernel_equals_autograd_but_for_float32_rounding(shape):
    R, width = shape
    for h, da in zip(layouts(R, 2 * width, device=DEVICE), layouts(R, width, seed=1, device=DEVICE)):
        _, h_q = ms.quantize_swiglu(h.contiguous())
        gradient = swiglu_gradient(h_q.dequantize(), da.float())
        bound = bound_of_gradient(h_q.dequantize(), da)
        assert_rounds(ms.quantize_swiglu_gradient_triton(h_q, da), gradient, E4M3, bound)


@needs_triton
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fmt", FP8.values(), ids=FP8)
def test_transpose_kernel_equals_reference_bit_for_bit(shape, fmt):
    q = ms.quantize_reference(random_rows(*shape, device=DEVICE), fmt, (1, ALL), "up")
    for factor in (None, q.scale / q.scale.max()):
        expected = ms.transpose_reference(q.data, factor)
        assert torch.equal(ms.transpose_triton(q.data, factor).view(torch.uint8), expected.view(torch.uint8))


@needs_triton
def test_transpose_kernel_reads_data_of_any_strides():
    data = ms.quantize_reference(random_rows(20, 48, device=DEVICE)).data.t()
    assert torch.equal(ms.transpose_triton(data).float(), data.t().float())


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "none"])
def test_both_fp8_copies_of_a_weight_stand_for_the_same_weight(name):
    w = random_rows(96, 160, device=DEVICE)
    recipe = RECIPES[name]
    scale = None if recipe.weight_scale == "block" else (w.abs().max() / 448).view(1, 1)
    a, b = ms.quantize_weight(w, recipe, scale)
    assert a.data.shape == (96, 160) and b.data.shape == (160, 96)
    if name == "mx":   # blocks lie along each sum, so W is rounded twice, each time from the master weight
        assert ms.sqnr(w, a.dequantize()) > 25 and ms.sqnr(w.t(), b.dequantize()) > 25
    else:
        assert torch.equal(a.dequantize(), b.dequantize().t())


def test_weight_blocks_that_lie_along_the_sum_are_made_for_each_sum():
    w, recipe = random_rows(96, 256), ms.Recipe("mine", (1, 128), (1, 128), "fp32", "block")
    a, b = ms.quantize_weight(w, recipe)
    assert a.block == b.block == (1, 128) and b.data.shape == (256, 96)
    assert ms.sqnr(w, a.dequantize()) > 25 and ms.sqnr(w.t(), b.dequantize()) > 25


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "none"])
def test_what_is_dequantized_in_bfloat16_is_rounded_once(name):
    q = ms.QUANTIZERS[name](random_rows(33, 160))
    assert torch.equal(q.dequantize(torch.bfloat16), q.dequantize().bfloat16())


# ---------------------------------------------------------------------------------------------------
# The same promises on every device

def everything(x):
    """{name: what it makes} for all functions that quantize x (R, 2 n), or work on what is quantized."""
    R, C = x.shape
    q, fine = ms.quantize(x, E4M3, (1, ALL), "up"), ms.quantize(x, E5M2, (1, 32), "floor")
    scale, factor = (x.new_full(shape, 0.5).requires_grad_(x.requires_grad) for shape in ((1, 1), (R, 1)))
    two_level, four = ms.quantize_two_level(x, global_scale=factor), x.detach().view(1, R, 1, C)
    angles = [x.new_full((R, C // 2), 0.5) for _ in range(2)]
    a, h = ms.quantize_swiglu(x)
    made = {
        "quantize": [ms.quantize(x, fmt, *rule) for rule in BLOCKS for fmt in FORMATS.values()],
        "given": [ms.quantize(x, scale=scale), ms.quantize_reference(x, E4M3, (1, ALL), "up", factor)],
        "measured_scale": [ms.measured_scale(x, E4M3, rule) for rule in ms.RULES],
        "quantize_both": ms.quantize_both(x, E4M3, scale), "two_level": [two_level, ms.quantize_two_level(x)],
        "fold": [ms.fold(two_level), ms.fold(fine)], "fold_loss": ms.fold_loss(x),
        "saturated_share": [ms.saturated_share(x, z) for z in (q, fine, two_level)],
        "transpose": [ms.transpose(q.data), ms.transpose(fine.data, factor)],
        "weight": [z for name, r in RECIPES.items() if r for z in ms.quantize_weight(
            x, r, None if r.weight_scale == "block" else scale)],
        "swiglu": [a, h, ms.quantize_swiglu_gradient(h, x[:, :C // 2])],
        "formats": [cast(x, E5M2), uncast(q.data), round_to_format(x, INT8), encode(x, E2M1), floor_log2(x),
                    decode(encode(x, E4M3), E4M3)]}
    ms.rope_(turned := four.clone(), *angles)
    made["rope"] = [turned, ms.quantize_qkv_gradient(four, four, four, *angles)]
    made["quantize_norm"] = [ms.quantize_norm(x, kind, x[0] if R else None) for kind in ms.NORMS]
    return made


def tensors(made):
    """All tensors in it; of a Quantized also its number."""
    for name, values in made.items():
        for value in values:
            whole = isinstance(value, ms.Quantized)
            parts = (value.data, value.scale, value.dequantize()) if whole else (value,)
            yield from ((name, part) for part in parts)


@pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=needs_triton)])
def test_no_gradient_comes_out_of_a_quantizer(kernels, monkeypatch):
    monkeypatch.setattr(ms, "kernels_run_on", lambda _: kernels)
    x = random_rows(6, 64, device=DEVICE).requires_grad_()
    assert [name for name, tensor in tensors(everything(x)) if tensor.requires_grad] == []
    with pytest.raises(ValueError, match="x requires a gradient.*use rope"):
        ms.rope_(x.view(1, 6, 1, 64) * 1, *torch.ones(2, 6, 32, device=DEVICE))


@pytest.mark.parametrize("default", ["device", "dtype"])
def test_the_results_for_a_tensor_on_a_cpu_do_not_depend_on_the_defaults_of_pytorch(default):
    expected = [tensor for _, tensor in tensors(everything(random_rows(6, 64)))]
    x = random_rows(6, 64)
    torch.set_default_device("meta") if default == "device" else torch.set_default_dtype(torch.float64)
    try:
        made = list(tensors(everything(x)))
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for (name, tensor), other in zip(made, expected, strict=True):
        assert tensor.dtype == other.dtype and torch.equal(tensor.float(), other.float()), name


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("shape", [(0, 64), (0, 0), (3, 0)], ids=str)
def test_an_empty_tensor_is_quantized_to_an_empty_one_under_the_smallest_scales(shape, kernels, monkeypatch):
    monkeypatch.setattr(ms, "kernels_run_on", lambda _: kernels)
    x = torch.empty(shape, device=DEVICE)
    made = everything(x)
    for q in made["quantize"]:
        assert q.data.shape == q.dequantize().shape == shape and (q.scale.float() == ms.MIN_SCALE).all()
    assert [q.data.shape for q in made["swiglu"]] == [(shape[0], shape[1] // 2), shape, shape]
    assert made["transpose"][0].shape == shape[::-1] and made["fold"][0].scale.shape == (shape[0], 1)
    assert made["fold_loss"] == (0, 0) and made["saturated_share"] == [0, 0, 0]
    assert (made["measured_scale"][0] == ms.MIN_SCALE).all()


def in_blocks(block, scale, data=(4, 64), outer=None):
    return ms.Quantized(torch.zeros(data).to(torch.float8_e4m3fn), torch.ones(scale), block, outer)


X, ONE, TABLE, Z = torch.ones(4, 64), torch.ones(1, 1), torch.ones(4, 8), torch.ones(2, 4, 3, 16)
REFUSED = {   # each names the value and what it has to be
    "norm": (lambda: ms.quantize_norm(X, "relu"), "norm 'relu' is unknown: choose one of none, rms, layer$"),
    "rule": (lambda: ms.quantize(X, E4M3, (1, ALL), "ceil"), "rule 'ceil' is unknown: choose one of fp32"),
    "rule of the reference": (lambda: ms.quantize_reference(X, rule="ceil"), "'ceil' is unknown"),
    "no matrix": (lambda: ms.quantize(X[0]), r"x has shape \(64,\).*\(any, any\)"),
    "integers": (lambda: ms.quantize(X.int()), "x has .*int32: .*torch.float32 or"),
    "FP8": (lambda: ms.quantize_norm(X.to(torch.float8_e4m3fn), "none"), "x has .*dtype torch.float8_e4m3fn"),
    "scales": (lambda: ms.quantize(X, E4M3, (1, ALL), "up", X[:, :1]), r"scale has .*\(4, 1\).*\(1, 1\)"),
    "scale": (lambda: ms.quantize_both(X, E4M3, torch.ones(())), r"scale has .*\(1, 1\)"),
    "scale of blocks": (lambda: ms.quantize_weight(X, RECIPES["group"], ONE), "group measures.*give none"),
    "weight": (lambda: ms.quantize_norm(X, "rms", torch.ones(32)), r"weight has .*\(32,\).*\(64,\)"),
    "factor": (lambda: ms.transpose(in_fp8(X).data, torch.ones(1, 4)), r"row_factor.*\(4, 1\)"),
    "no FP8": (lambda: ms.transpose(X), "q has .*float32: .*float8_e4m3fn or torch.float8_e5m2"),
    "odd": (lambda: ms.quantize_swiglu(X[:, :5]), r"h has .*\(4, 5\).*\(any, 4\)"),
    "half": (lambda: ms.quantize_swiglu_gradient(in_fp8(X), X[:, :20]),
             r"h has .*\(4, 64\) .*\(any, 40\), .*twice"),
    "rows": (lambda: ms.quantize_swiglu_gradient(in_fp8(X), X[:3, :32]), r"da has .*\(3, 32\).*\(4, any\)"),
    "odd heads": (lambda: ms.rope_(Z[..., :5], TABLE, TABLE), r"x has .*\(any, any, any, 4\)"),
    "cos": (lambda: ms.rope_(Z, TABLE[:1], TABLE), r"cos has .*\(1, 8\).*\(4, 8\)"),
    "sin": (lambda: ms.quantize_qkv_gradient(Z, Z, Z, TABLE, TABLE[:, :1]), r"sin has .*\(4, 1\).*\(4, 8\)"),
    "dv": (lambda: ms.quantize_qkv_gradient(Z, Z, Z[:, :, 1:], TABLE, TABLE), r"dv has .*\(2, 4, 3, 16\)"),
    "a row": (lambda: ms.Quantized(in_fp8(X).data[0], torch.ones(1, 1), (ALL, ALL)), "of a matrix"),
    "blocks": (lambda: in_blocks((1, 32), (1, 1)), r"\(4, 64\) in blocks \(1, 32\) need scales \(4, 2\)"),
    "global scale": (lambda: in_blocks((1, ALL), (4, 1), outer=torch.ones(2)), "global scale is"),
    "fold": (lambda: ms.fold(in_blocks((2, 32), (2, 2))), r"blocks \(2, 32\) span rows"),
}


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_together_is_refused_with_the_reason_on_every_device(name, kernels, monkeypatch):
    monkeypatch.setattr(ms, "kernels_run_on", lambda _: kernels)   # refused before any kernel starts
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_kernels_for_a_gpu_that_is_not_the_current_one_are_refused_with_the_fix(monkeypatch):
    monkeypatch.setattr(ms, "runs_kernels", lambda device: torch.device(device).type == "cuda")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert ms.kernels_run_on("cuda:0") and ms.kernels_run_on("cuda")
    assert not ms.kernels_run_on(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"on cuda:1.*cuda:0: call torch.cuda.set_device\(1\)"):
        ms.kernels_run_on(torch.device("cuda", 1))


def test_saturated_share_counts_under_the_whole_scale():
    x = torch.full((2, 64), 3.0)
    for s in (0.37, torch.tensor([[1e-3], [100.0]])):
        q = ms.quantize_two_level(x, global_scale=s)
        assert ms.saturated_share(x, q) == 0 and ms.saturated_share(200 * x, q) == 1


@needs_triton
def test_the_kernel_of_swiglu_backward_is_given_one_scale_per_row_only(monkeypatch):
    x, da = random_rows(4, 64, device=DEVICE).clamp(-24, 24), random_rows(4, 32, seed=1, device=DEVICE)
    several = [ms.quantize_reference(x, E4M3, (1, 32), "up"), ms.quantize_two_level(x, global_scale=3.0)]
    expected = [in_pytorch("quantize_swiglu_gradient")(h, da) for h in several]
    monkeypatch.setattr(ms, "kernels_run_on", lambda _: True)
    for h, q in zip(several, expected):
        assert_same(ms.quantize_swiglu_gradient(h, da), q)


@needs_triton
def test_kernels_read_factors_and_angles_of_any_strides():
    data, wide = in_fp8(random_rows(20, 48, device=DEVICE)).data, torch.full((20, 3), 0.25, device=DEVICE)
    wide[:, 1:] = 1
    expected = ms.transpose_reference(data, wide[:, :1])
    assert torch.equal(ms.transpose_triton(data, wide[:, :1]).float(), expected.float())
    (cos, sin), x = angles(5, 32), heads(2, 5, 3, 16)
    near, apart = ([z[:, ::2].contiguous() for z in (cos, sin)], [z[:, ::2] for z in (cos, sin)])
    quantized = (ms.quantize_qkv_gradient_triton(x, x, x, *angles) for angles in (apart, near))
    assert_same(*quantized)
    ms.rope_triton_(turned := x.clone(), *apart)
    ms.rope_triton_(x, *near)
    assert torch.equal(turned, x)
