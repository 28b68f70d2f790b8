"""The quantizers: scales of every recipe, two levels and the fold, the transpose; norm, SwiGLU and RoPE. The
kernels give the same bits, but for what another route through float32 moves over a tie."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from conftest import DEVICE, ON_HOPPER, let_kernels_run, needs_triton
from torch.nn import functional as F

import microscale as ms
from fp8_formats import (E2M1, E4M3, E5M2, FORMATS, INT8, cast, decode, encode, floor_log2, grid,
                         relative_error, round_to_format, uncast)
from microscale import ALL, RECIPES

SHAPES = [(1, 16), (7, 1), (130, 16), (5, 48), (33, 160), (64, 300), (3, 1024), (3, 2049)]
HALVES = [(7, 1), (5, 48), (3, 1024), (2, 4100)]   # R, F: the kernels of SwiGLU read 4096 columns at a time
BLOCKS = [((1, 32), "floor"), ((1, 32), "up"), ((1, 128), "fp32"), ((1, ALL), "up"), ((1, ALL), "fp32")]

each_format = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=["e4m3", "e5m2"])
each_recipe = pytest.mark.parametrize("recipe", [*filter(None, RECIPES.values())], ids=str)


def quantize_as(recipe, x):
    return ms.quantize_reference(x, FORMATS[recipe.act_format], recipe.act_block, recipe.rule)


def random_rows(R, C, seed=0, device="cpu"):
    """Rows of very different size, a row of zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(R, C, generator=generator) * torch.exp(3 * torch.randn(R, 1, generator=generator))
    if R > 1:
        x[R // 2] = 0
    return x.to(device)


def layouts(R, C, largest=24, **kwargs):
    """Rows with a mean, |x| <= 32: float32, bfloat16, columns of a wider tensor, a transpose."""
    wide, tall = (random_rows(*shape, **kwargs).clamp(-largest, largest) for shape in ((R, C + 5), (C, R)))
    wide, tall = wide + wide.abs() / 4, tall + tall.abs() / 4
    return wide[:, :C].contiguous(), wide[:, :C].bfloat16(), wide[:, 3:C + 3], tall.t()


def assert_same(a, b):
    """Bit for bit, scales and data; data of blocks whose scale is NaN may be any."""
    torch.testing.assert_close(a.scale.float(), b.scale.float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(a.dequantize(), b.dequantize(), rtol=0, atol=0, equal_nan=True)
    fine = ms.expand_blocks(a.scale.float(), a.data.shape, a.block).isfinite().expand(a.data.shape)
    assert torch.equal(a.data.view(torch.uint8)[fine], b.data.view(torch.uint8)[fine])


def assert_rounds(q, x, fmt, amax=None):
    """q is x (R, C) under a power of two per row (of amax (R, 1), or of max|x|), give or take what float32
    may do to x on another route.

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


def where(name, kernels):
    """The function as it runs where there are kernels, which then compute all of it, or where none are."""
    def run(*args):
        with pytest.MonkeyPatch.context() as patch:
            let_kernels_run(kernels, patch)
            if kernels:
                patch.setattr(ms, "quantize_reference", None)
                patch.setattr(ms, "rope", None)
            return getattr(ms, name)(*args)
    return run


def both_ways(name):
    """In PyTorch, and by the kernel."""
    kernel = pytest.param(where(name, True), marks=needs_triton)
    return pytest.mark.parametrize("run", [where(name, False), kernel], ids=["pytorch", "kernel"])


# ---------------------------------------------------------------------------------------------------
# Scales

@each_format
def test_up_rule_gives_the_smallest_power_of_two_under_which_the_maximum_fits(fmt):
    powers = torch.tensor([2.0**exponent for exponent in range(-100, 100)])
    top = fmt.max * powers
    below, above = top.nextafter(0 * top), top.nextafter(2 * top)
    for amax, scale in (below, powers), (top, powers), (above, 2 * powers):
        assert torch.equal(ms.scale_from_amax(amax, fmt, "up"), scale)


def test_nothing_saturates_but_what_is_above_448_times_the_whole_scale():
    x = random_rows(64, 96)
    for rule in ("fp32", "up"):
        assert ms.saturated_share(x, ms.quantize_reference(x, rule=rule), E4M3) == 0
    x = torch.tensor([[500.0] + [3.0] * 31])
    q = ms.quantize_reference(x, rule="floor")   # that of mx
    assert q.scale.float().item() == 1 and q.dequantize()[0, 0] == 448
    assert ms.saturated_share(x, q, E4M3) == 1 / 32
    q = ms.quantize_two_level(x[:, 1:], global_scale=0.37)
    even = ms.quantize(x.expand(4, 32) * torch.randn(4, 1), INT8, (1, 32), "floor")
    assert ms.saturated_share(even.dequantize(), even, INT8) == 0
    assert ms.saturated_share(x[:, 1:], q, E4M3) == 0 and ms.saturated_share(200 * x[:, 1:], q, E4M3) == 1


@each_format
def test_the_rounded_reciprocal_of_an_fp32_scale_still_puts_any_maximum_on_the_largest_number(fmt):
    x = torch.linspace(1, 2, 4097) * 2.0**torch.tensor([-110, -7, 0, 9, 127])[:, None]   # blocks of one value
    x = x[x.isfinite()].view(-1, 1)
    assert (ms.quantize_reference(x, fmt, (1, ALL), "fp32").data.float() == fmt.max).all()


@pytest.mark.parametrize("rule", ms.RULES)
def test_nan_and_inf_spoil_what_shares_a_scale_with_them_and_nothing_else_and_zeros_stay_zero(rule):
    x, bad = random_rows(7, 64), torch.zeros(7, 64, dtype=torch.bool)   # row 3 is zero
    x[0, 5], x[2, 0], x[4, 31], bad[[0, 2, 4], :32] = math.nan, math.inf, -math.inf, True
    for q in (ms.quantize_reference(x, E4M3, (1, 32), rule), ms.quantize_two_level(x, global_scale=1.0)):
        y = q.dequantize()
        assert y[bad].isnan().all() and y[~bad].isfinite().all() and (y[3] == 0).all()
    for row in (0, 2, 4):   # a global scale is shared by all
        assert ms.quantize_two_level(x[row:row + 2]).dequantize().isnan().all()


WITHOUT_A_KERNEL = [*itertools.product(["e4m3"], ((1, 16), (1, 48), (1, 512), (2, 32))),
                    *itertools.product(["int8", "e2m1"], ((1, 32), (1, ALL), (ALL, ALL)))]


@pytest.mark.parametrize("name, block", WITHOUT_A_KERNEL, ids=str)
def test_blocks_and_formats_without_a_kernel_are_emulated_where_the_kernels_run(name, block, kernels):
    x, fmt = random_rows(4, 1000, device=DEVICE).clamp(-24, 24), FORMATS[name]
    expected, q = ms.quantize_reference(x, fmt, block, "up"), ms.quantize(x, fmt, block, "up")
    assert q.block == block and torch.equal(q.dequantize(), expected.dequantize())
    two_level = replace(in_fp8(x), global_scale=x.new_full((1, 1), 3.0))   # as no kernel of SwiGLU reads it
    for h in (q, two_level) if fmt is E4M3 else ():
        expected = where("quantize_swiglu_gradient", False)(h, x[:, :500])
        assert_same(ms.quantize_swiglu_gradient(h, x[:, :500]), expected)


@pytest.mark.parametrize("block, rule", [*BLOCKS, ((32, 1), "floor"), ((128, 1), "fp32"), ((ALL, 1), "up"),
                                         ((128, 128), "fp32"), ((ALL, ALL), "fp32"), ((3, 5), "up")], ids=str)
def test_each_block_is_rounded_under_its_own_scale_at_ragged_ends_and_along_any_axis_moved_last(block, rule):
    x = random_rows(150, 130).view(150, 10, 13).movedim(0, -1).reshape(-1, 150)
    x[:, -1] *= 1000
    q = ms.quantize_reference(x, E4M3, block, rule)
    br, bc = (n if b == ALL else b for b, n in zip(block, x.shape))
    for rows, kept, scales in zip(x.split(br), q.dequantize().split(br), q.scale.float(), strict=True):
        for part, y, scale in zip(rows.split(bc, 1), kept.split(bc, 1), scales, strict=True):   # by hand
            assert scale == ms.scale_from_amax(part.abs().amax(), E4M3, rule)
            assert torch.equal(y, cast(part * (1 / scale), E4M3).float() * scale)


def test_error_diffusion_makes_up_for_what_the_weights_before_have_lost():
    torch.manual_seed(0)
    weight, mix = torch.randn(24, 64), torch.randn(12, 64)
    x, fresh = (torch.randn(T, 12) @ mix / 3 + 0.4 * torch.randn(T, 64) for T in (1024, 1024))
    x[:, 5] = 0   # an input that is never there leaves its weight as it is
    for name in ("mx", "mxfp6", "mxfp4"):
        recipe = RECIPES[name]
        rounded = ms.quantize_weight(weight, recipe)[0]
        q = ms.diffuse(weight, x, quantize_as(recipe, x).dequantize(), recipe)
        assert torch.equal(q.scale.float(), rounded.scale.float())
        assert torch.equal(q.data[:, 5].float(), rounded.data[:, 5].float())
        seen = quantize_as(recipe, fresh).dequantize()
        plain, diffused = (ms.sqnr(fresh @ weight.t(), seen @ z.dequantize().t()) for z in (rounded, q))
        assert diffused > plain + 0.5
    # by hand: the error of the first weight is all that the second has to carry
    weight, x = torch.tensor([[1.2, 1.0]] + [[6.0, 6.0]]), torch.ones(3, 2)
    q = ms.diffuse(weight.repeat(1, 16), x.repeat(1, 16), x.repeat(1, 16), RECIPES["mxfp4"]).dequantize()
    assert q[0, :4].tolist() == [1.0, 1.0, 1.5, 1.0]   # sums 1.2, 2.2, 3.4, 4.4: owed 0.2, 0.2, 0.4 + ...


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("rule", ["floor", "up"])
def test_a_block_is_that_of_the_specification_of_mx(fmt, rule):
    """OCP MX v1.0, 6.3: the scale is 2^(floor(log2 max|x|) - emax); elements are the nearest numbers, ties to
    an even code, the largest beyond it. "up" takes the first power of two that leaves nothing beyond it."""
    x = random_rows(34, 64)[:16] * torch.logspace(0, -4, 64)   # without the row of zeros
    x[0, :32] = grid(fmt)[-1] * 2.0**-9 * torch.linspace(1, 0, 32)
    ties = (grid(fmt)[1:] + grid(fmt)[:-1])[-30:] / 2
    x[0, 1:len(ties) + 1] = 2.0**-9 * ties
    q, values = ms.quantize(x, fmt, (1, 32), rule), grid(fmt).tolist()
    for block, scale, y in zip(x.view(32, 32), q.scale.flatten(), q.dequantize().view(32, 32)):
        largest = block.abs().max().item()
        k = math.frexp(largest)[1] - 1 - fmt.emax
        k += rule == "up" and largest > values[-1] * 2.0**k
        assert scale.float() == 2.0**k
        for number, got in zip(block.tolist(), y.tolist()):
            nearest = min(range(len(values)), key=lambda i: (abs(abs(number) * 2.0**-k - values[i]), i % 2))
            assert got == math.copysign(values[nearest] * 2.0**k, number)


# ---------------------------------------------------------------------------------------------------
# Two levels, the fold and the transpose

@pytest.mark.parametrize("s", [None, 3, torch.tensor(0.37), torch.tensor([[5e-3]]),
                               torch.tensor(0.1).double()])
def test_two_levels_are_the_fp32_scale_of_the_tensor_or_a_given_one_and_powers_of_two(s):
    x = random_rows(64, 256)
    q = ms.quantize_two_level(x, global_scale=s)
    assert q.scale.dtype == torch.float8_e8m0fnu and (q.scale.float().max() == 1 or s is not None)
    s = (x.abs().amax() / 448).view(1, 1) if s is None else torch.as_tensor(s).float()
    assert q.global_scale.dtype == torch.float32 and torch.equal(q.global_scale, s)
    one_level = ms.quantize_reference(x / s, E4M3, (1, 32), "up")
    assert_same(replace(q, global_scale=None), one_level)
    assert torch.equal(q.dequantize(), one_level.dequantize() * s)


@pytest.mark.parametrize("growth", [1.7, 1000, 1e-3])
def test_the_scale_of_the_step_before_costs_no_accuracy_when_the_tensor_grows(growth):
    x = random_rows(64, 256, seed=1)
    stale = ms.quantize_two_level(x).global_scale
    x = x * growth
    fresh, other = ms.quantize_two_level(x), ms.quantize_two_level(x, global_scale=stale)
    assert ms.saturated_share(x, other, E4M3) == 0
    # where the maximum falls between two powers of two is chance: worth some tenths of a dB, up or down
    assert abs(ms.sqnr(x, fresh.dequantize(), group=32) - ms.sqnr(x, other.dequantize(), group=32)) < 0.5


@pytest.mark.parametrize("s", [None, 0.37], ids=["fresh", "stale"])
def test_folding_equals_quantizing_once_per_row_but_for_numbers_about_2_to_the_14_below_their_row(s):
    x = random_rows(64, 512)
    x[:, 480:] *= 2**-12   # the last block of each row becomes subnormal, in part
    q = ms.quantize_two_level(x, global_scale=s)
    folded = ms.fold(q)
    assert folded.scale.shape == (64, 1) and folded.global_scale is None   # s is in it
    normal = folded.data.float().abs() > E4M3.min_normal   # the smallest may be rounded up to it
    assert normal.float().mean() > 0.9
    once = ms.quantize_reference(x / q.global_scale, E4M3, (1, ALL), "up")
    assert torch.equal(folded.scale, once.scale * q.global_scale)
    assert torch.equal(folded.data.float()[normal], once.data.float()[normal])
    changed = folded.dequantize() != q.dequantize()
    assert changed.any() and not changed[normal].any()
    # the row's maximum lies above 224 scales, and a number is subnormal below 2^-6 of one
    assert (x.abs() < x.abs().amax(1, keepdim=True) * 2**-6 / 224)[changed].all()


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


def test_transpose_with_row_factors_equals_quantizing_once_where_normal_and_else_rounds_to_nearest_even():
    x = random_rows(48, 80)
    q = ms.quantize_reference(x, E4M3, (1, ALL), "up")
    common = q.scale.max()
    moved = where("transpose", False)(q.data, q.scale / common)
    once = ms.quantize_reference(x.t(), E4M3, (ALL, ALL), "fp32", scale=common.view(1, 1))
    normal = once.data.float().abs() >= E4M3.min_normal
    assert normal.any() and torch.equal(moved.float()[normal], once.data.float()[normal])
    q = torch.tensor([[1.0, 1.125, 1.875, 1.25]]).to(torch.float8_e4m3fn)
    moved = where("transpose", False)(q, torch.tensor([[2.0**-8]]))   # the grid there has a step of 2^-9
    assert (moved.float() / 2**-9).flatten().tolist() == [2.0, 2.0, 4.0, 2.0]   # 2, 2.25, 3.75, 2.5 -> even 2


def test_scaling_aware_transpose_keeps_the_accuracy_of_one_rounding_and_quantizing_twice_does_not():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 512, generator=generator) * torch.logspace(-1, 1, 256)[:, None]
    moss, group = ms.QUANTIZERS["moss"], ms.QUANTIZERS["group"]
    moved, once, twice = ms.transpose_tokens(x), group(x.t()), group(group(x).dequantize().t())
    assert moved.data.shape == (512, 256) and moved.data.is_contiguous()
    assert ms.sqnr(x.t(), moved.dequantize()) == pytest.approx(ms.sqnr(x, moss(x).dequantize()), abs=0.01)
    # two independent roundings have twice the noise, 3 dB; FP32 scales store the maxima exactly, so not quite
    assert ms.sqnr(x.t(), twice.dequantize()) < ms.sqnr(x.t(), once.dequantize()) - 2
    assert ms.sqnr(x.t(), twice.dequantize()) < ms.sqnr(x.t(), moved.dequantize()) - 1.5


# ---------------------------------------------------------------------------------------------------
# The operations around a linear layer: norms, SwiGLU, RoPE

EQUATIONS = {
    "rms": lambda x, w: x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt() * w,
    "layer": lambda x, w: (x - x.mean(1, keepdim=True)) / (x.var(1, False, keepdim=True) + 1e-5).sqrt(),
}


@both_ways("quantize_norm")
@pytest.mark.parametrize("shape", [*SHAPES, (5, 1000)], ids=str)
@each_format
@pytest.mark.parametrize("kind", EQUATIONS)
def test_norm_rows_are_the_equation_in_float32_then_the_quantizer(kind, fmt, shape, run):
    weight = random_rows(1, shape[1], seed=1, device=DEVICE)[0]
    for x in layouts(*shape, device=DEVICE):
        w = weight.to(x.dtype)
        assert_rounds(run(x, kind, w, fmt), EQUATIONS[kind](x.double(), w.double()), fmt)


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


@both_ways("quantize_swiglu")
@pytest.mark.parametrize("shape", HALVES, ids=str)
def test_swiglu_rows_are_the_equation_rounded_once_and_h_rounded_once(shape, run):
    for h in layouts(shape[0], 2 * shape[1], device=DEVICE):
        (a, h_q), (gate, up) = run(h), h.double().chunk(2, dim=1)
        assert_rounds(a, gate / (1 + (-gate).exp()) * up, E4M3)
        assert_same(h_q, in_fp8(h))


@both_ways("quantize_swiglu_gradient")
@pytest.mark.parametrize("shape", [*HALVES, (16, 300)], ids=str)
def test_swiglu_backward_is_the_gradient_that_autograd_gives_at_the_h_that_was_kept(shape, run):
    R, width = shape
    for h, da in zip(layouts(R, 2 * width, device=DEVICE), layouts(R, width, seed=1, device=DEVICE)):
        h_q = in_fp8(h)
        q, gradient = run(h_q, da), swiglu_gradient(h_q.dequantize().double(), da.double())
        assert_rounds(q, gradient, E4M3, bound_of_gradient(h_q.dequantize(), da))
        # rounded once: E4M3 has 31 to 32 dB
        assert R != 16 or ms.sqnr(gradient, q.dequantize(), group=600) > 30


def test_the_bound_of_the_swiglu_gradient_holds_and_is_seldom_far():
    """silu' is largest at a gate of 2.3994. There d gate comes within 2e-4 of the bound, nowhere above it."""
    gate = torch.linspace(-60, 60, 120_001, dtype=torch.float64)[:, None]
    for up in (0.0, 1.0, 1e3):
        h, da = torch.cat((gate, torch.full_like(gate, up)), dim=1), torch.full_like(gate, -3.0)
        largest, bound = swiglu_gradient(h, da).abs().amax(dim=1, keepdim=True), bound_of_gradient(h, da)
        assert (largest <= bound).all()
    assert (largest > (1 - 2e-4) * bound).any()   # with up = 1e3
    h, da = in_fp8(torch.randn(200, 2048)), torch.randn(200, 1024)
    of_maximum = in_fp8(swiglu_gradient(h.dequantize(), da)).scale
    ratio = where("quantize_swiglu_gradient", False)(h, da).scale / of_maximum
    assert ratio.min() == 1 and ratio.max() <= 4 and ratio.mean() < 1.5


SPOILABLE = {   # what is made of x (R, 600), a list
    **{kind: lambda x, kernels, kind=kind: [where("quantize_norm", kernels)(x, kind, torch.ones_like(x[0]))]
       for kind in ms.NORMS},
    "swiglu": lambda x, kernels: where("quantize_swiglu", kernels)(x),
    "swiglu backward": lambda x, kernels: [where("quantize_swiglu_gradient", kernels)(in_fp8(x), x[:, :300])],
}


@pytest.mark.filterwarnings("ignore:(invalid value|overflow)")   # NumPy's, in Triton's interpreter
@pytest.mark.parametrize("name", SPOILABLE)
def test_nan_and_inf_spoil_the_row_that_is_made_of_them_and_no_other_and_zeros_stay_zero(name, kernels):
    x = random_rows(7, 600, device=DEVICE).clamp(-24, 24)   # row 3 is zero
    fine = SPOILABLE[name](x, kernels)
    x[0, 3], x[2, 599], x[4, 290] = float("nan"), float("inf"), float("-inf")
    for q, before in zip(SPOILABLE[name](x, kernels), fine):
        assert q.scale[[0, 2, 4]].isnan().all() and q.dequantize()[[0, 2, 4]].isnan().all()
        assert torch.equal(q.dequantize()[[1, 3, 5, 6]], before.dequantize()[[1, 3, 5, 6]])
        assert before.scale.isfinite().all() and (before.dequantize()[3] == 0).all()


@pytest.mark.filterwarnings("ignore:overflow")
@both_ways("quantize_swiglu")
def test_an_overflow_spoils_the_row_of_the_product_alone(run):
    h = random_rows(7, 600, device=DEVICE).clamp(-24, 24)
    h[6, [290, 590]] = 1e30
    a, h_q = run(h)
    assert a.dequantize().isnan().all(1).tolist() == [False] * 6 + [True]
    assert a.dequantize()[:6].isfinite().all() and h_q.dequantize().isfinite().all()


def angles(T, head_dim):
    """cos, sin (T, head_dim / 2)."""
    angle = torch.randn(T, head_dim // 2, generator=torch.Generator().manual_seed(9)) * 10
    return angle.cos().to(DEVICE), angle.sin().to(DEVICE)


def heads(B, T, n, head_dim, seed=0):
    """(B, T, n, head_dim), tokens of very different size."""
    return random_rows(B * T, n * head_dim, seed, DEVICE).view(B, T, n, head_dim)


# A pair, x_i and x_{i + head_dim/2}, is a complex number. Roundings move it by up to 2^-22 of itself. In
# BF16 that is a code next to a tie, and the interpreter cuts bits off where a GPU rounds.
@pytest.mark.parametrize("dtype, code", [(torch.float32, 0), (torch.bfloat16, 2**-7)], ids=str)
@pytest.mark.parametrize("T, n, head_dim", [(1, 3, 6), (5, 3, 16), (33, 2, 64), (1, 40, 64)])
@both_ways("rope_into")
def test_rope_turns_in_place_or_elsewhere_and_touches_nothing_else(run, T, n, head_dim, dtype, code):
    whole, (cos, sin) = heads(4, T + 1, n + 3, head_dim).to(dtype), angles(T, head_dim)
    x, inside = whole[:-1, 1:, 1:-2], torch.zeros_like(whole, dtype=torch.bool)
    turned = torch.complex(*x.double().chunk(2, dim=-1)) * torch.complex(cos.double(), sin.double())[:, None]
    expected, pair = torch.cat((turned.real, turned.imag), dim=-1), turned.abs().repeat(1, 1, 1, 2)
    assert torch.equal(ms.rope(x, cos, sin), ms.rope(x.float(), cos, sin).to(dtype))   # is rounded once
    inside[:-1, 1:, 1:-2] = True
    for source in (x.clone(), x.transpose(1, 2).contiguous().transpose(1, 2), x):   # x itself last: in place
        before, other = whole.clone(), torch.zeros_like(whole)
        out = x if source is x else other[:-1, 1:, 1:-2]
        run(out, source, cos, sin)
        assert ((out - expected).abs() <= code * expected.abs() + 2**-22 * pair).all()
        assert torch.equal(whole[~inside], before[~inside]) and not other[~inside].any()


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
    data = ms.examples()
    for name in ("1% of channels x 50", "X of down: SwiGLU"):
        tensor, group, two_level = ranking(data[name], INT8)
        assert tensor + 1 < group < two_level - 1
    tensor, group, two_level = ranking(data["Gaussian"], INT8)
    assert tensor + 1 < two_level < group - 1
    for x in data.values():
        tensor, group, two_level = ranking(x, E4M3)
        assert two_level == pytest.approx(tensor, abs=0.01)


def test_every_cell_of_the_tables_is_text_about_data_that_are_there():
    for name, x in ms.examples(R=64, C=128, heads=2).items():
        assert x.isfinite().all() and x.any() and not x.requires_grad and len(x) == 64, name
        assert all(isinstance(cell(x), str) for _, columns, _ in ms.TABLES for cell in columns.values())


# ---------------------------------------------------------------------------------------------------
# The kernels give the same bits, and every device keeps the same promises

# No recipe has rows of a format that is not FP8: PyTorch quantizes them. The interpreter takes a second for a
# case: there all shapes are those of one format, and all formats have one shape.
CASES = [(shape, name, *block) for shape in SHAPES for name, fmt in FORMATS.items() for block in BLOCKS
         if (fmt.dtype or block[0] != (1, ALL)) and (ON_HOPPER or fmt is E4M3 or shape == (33, 160))]


@needs_triton
@pytest.mark.parametrize("shape, name, block, rule", CASES, ids=str)
def test_quantize_kernel_equals_reference_bit_for_bit_at_nan_and_inf_too(shape, name, block, rule):
    fmt = FORMATS[name]
    for x, spoiled in itertools.product(layouts(*shape, largest=math.inf, device=DEVICE), (False, True)):
        if spoiled:
            x[0, -1], x[-1, 0], x[-1, -1] = math.nan, math.inf, -math.inf
        expected = ms.quantize_reference(x, fmt, block, rule)
        assert_same(where("quantize", True)(x, fmt, block, rule), expected)


@both_ways("quantize")
@each_format
def test_a_given_scale_is_used_as_it_is_whatever_the_block_and_may_saturate(fmt, run):
    x = random_rows(20, 300, device=DEVICE)
    scale = (x.abs().max() / fmt.max / 4).view(1, 1)
    reference = ms.quantize_reference(x, fmt, (ALL, ALL), "fp32", scale)
    assert_same(run(x, fmt, (1, 32), "up", scale), reference)
    assert reference.data.float().abs().max() == fmt.max


@needs_triton
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_format
def test_transpose_kernel_equals_reference_bit_for_bit(shape, fmt):
    q = ms.quantize_reference(random_rows(*shape, device=DEVICE), fmt, (1, ALL), "up")
    for factor in (None, q.scale / q.scale.max()):
        expected = where("transpose", False)(q.data, factor)
        assert torch.equal(ms.transpose_triton(q.data, factor).view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("recipe", [*filter(None, RECIPES.values()),
                                    ms.Recipe("mine", (1, 128), (1, 128), "fp32", "block")], ids=str)
def test_both_fp8_copies_of_a_weight_stand_for_the_same_weight(recipe):
    w = random_rows(96, 256, device=DEVICE)
    scale = None if recipe.weight_scale == "block" else (w.abs().max() / 448).view(1, 1)
    a, b = ms.quantize_weight(w, recipe, scale)
    assert a.data.shape == (96, 256) and b.data.shape == (256, 96)
    assert a.block == b.block == recipe.weight_block
    if recipe.weight_block[0] == recipe.weight_block[1]:
        assert torch.equal(a.dequantize(), b.dequantize().t())
    else:   # blocks lie along each sum, so W is rounded twice, each time from the master weight
        assert all(ms.sqnr(*z) > (25 if recipe.name != "mxfp4" else 15)   # two bits of fraction fewer
                   for z in ((w, a.dequantize()), (w.t(), b.dequantize())))


@each_recipe
def test_what_is_dequantized_in_bfloat16_is_rounded_once(recipe):
    q = quantize_as(recipe, random_rows(33, 160))
    assert torch.equal(q.dequantize(torch.bfloat16), q.dequantize().bfloat16())


def everything(x):
    """{name: what it makes} for all functions that quantize x (R, 2 n), or work on what is quantized."""
    R, C = x.shape
    q, fine = ms.quantize(x, E4M3, (1, ALL), "up"), ms.quantize(x, E5M2, (1, 32), "floor")
    scale, factor = (x.new_full(shape, 0.5).requires_grad_(x.requires_grad) for shape in ((1, 1), (R, 1)))
    two_level, four = ms.quantize_two_level(x, global_scale=scale), x.detach().view(1, R, 1, C)
    angles = [x.new_full((R, C // 2), 0.5) for _ in range(2)]
    a, h = ms.quantize_swiglu(x)
    made = {
        "quantize": [ms.quantize(x, fmt, *rule) for rule in BLOCKS for fmt in FORMATS.values()],
        "given": [ms.quantize(x, scale=scale), ms.quantize_reference(x, E4M3, (1, ALL), "up", factor)],
        "two_level": [two_level, ms.quantize_two_level(x)], "tensor": [ms.quantize(x, E4M3, (ALL, ALL))],
        "fold": [ms.fold(two_level), ms.fold(fine)], "fold_loss": ms.fold_loss(x),
        "saturated_share": [ms.saturated_share(x, *z) for z in ((q, E4M3), (fine, E5M2), (two_level, E4M3))],
        "transpose": [ms.transpose(q.data), ms.transpose(fine.data, factor)],
        "weight": [z for name, r in RECIPES.items() if r for z in ms.quantize_weight(
            x, r, None if r.weight_scale == "block" else scale)],
        "swiglu": [a, h, ms.quantize_swiglu_gradient(h, x[:, :C // 2])],
        "formats": [cast(x, E5M2), uncast(q.data), round_to_format(x, INT8), encode(x, E2M1), floor_log2(x),
                    *(decode(encode(z, E4M3), E4M3) for z in (x, x.new_full((1,), math.nan))), grid(E5M2),
                    x.new_tensor(relative_error(E4M3, 3))]}
    ms.rope_into(turned := torch.empty_like(four), four, *angles)
    made["rope"] = [turned, ms.rope(four, *angles)]
    made["quantize_norm"] = [ms.quantize_norm(x, kind, x[0] if R else None) for kind in ms.NORMS]
    return made


def tensors(made):
    """All tensors in it; of a Quantized also its number."""
    for name, values in made.items():
        for value in values:
            whole = isinstance(value, ms.Quantized)
            parts = (value.data, value.scale, value.dequantize()) if whole else (value,)
            yield from ((name, part) for part in parts)


def test_no_gradient_comes_out_of_a_quantizer(kernels):
    x = random_rows(6, 64, device=DEVICE).requires_grad_()
    assert [name for name, tensor in tensors(everything(x)) if tensor.requires_grad] == []
    with pytest.raises(ValueError, match="requires a gradient.*use rope"):
        ms.rope_into(torch.empty(1, 6, 1, 64), x.view(1, 6, 1, 64), *torch.ones(2, 6, 32, device=DEVICE))


@pytest.mark.parametrize("default", ["device", "dtype"])
def test_the_results_for_a_tensor_on_a_cpu_do_not_depend_on_the_defaults_of_pytorch(default):
    x = random_rows(6, 64)
    expected = [tensor for _, tensor in tensors(everything(x))]
    torch.set_default_device("meta") if default == "device" else torch.set_default_dtype(torch.float64)
    try:
        made = list(tensors(everything(x)))
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for (name, tensor), other in zip(made, expected, strict=True):
        assert tensor.dtype == other.dtype, name
        torch.testing.assert_close(tensor.float(), other.float(), rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [(0, 64), (0, 0), (3, 0)], ids=str)
def test_an_empty_tensor_is_quantized_to_an_empty_one_under_the_smallest_scales(shape, kernels):
    made = everything(torch.empty(shape, device=DEVICE))
    for q in made["quantize"]:
        assert q.data.shape == q.dequantize().shape == shape and (q.scale.float() == ms.MIN_SCALE).all()
    assert [q.data.shape for q in made["swiglu"]] == [(shape[0], shape[1] // 2), shape, shape]
    assert made["transpose"][0].shape == shape[::-1] and made["fold"][0].scale.shape == (shape[0], 1)
    assert made["fold_loss"] == (0, 0) and made["saturated_share"] == [0, 0, 0]
    assert (made["tensor"][0].scale == ms.MIN_SCALE).all()


def in_blocks(block, scale, outer=None):
    return ms.Quantized(in_fp8(X).data, torch.ones(scale), block, outer)


X, TABLE, Z = torch.ones(4, 64), torch.ones(4, 8), torch.ones(2, 4, 3, 16)
REFUSED = {   # each message names the value and what it has to be
    "norm 'relu' is unknown: choose one of none, rms, layer$": lambda: ms.quantize_norm(X, "relu"),
    "rule 'ceil' is unknown: choose one of fp32": lambda: ms.quantize(X, E4M3, (1, ALL), "ceil"),
    "'ceil' is unknown": lambda: ms.quantize_reference(X, rule="ceil"),
    r"x has shape \(64,\).*\(any, any\)": lambda: ms.quantize(X[0]),
    "x has .*int32: .*torch.float32 or": lambda: ms.quantize(X.int()),
    "x has .*dtype torch.float8_e4m3fn": lambda: ms.quantize_norm(X.to(torch.float8_e4m3fn), "none"),
    r"scale has .*\(3, 1\).*\(1, 1\)": lambda: ms.quantize(X, E4M3, (1, ALL), "up", X[:3, :1]),
    "group measures.*give none": lambda: ms.quantize_weight(X, RECIPES["group"], X[:1, :1]),
    "two levels have blocks": lambda: replace(RECIPES["moss"], rule="two-level"),
    "needs \\(1, n\\)": lambda: replace(RECIPES["moss"], act_format="e3m2"),
    "rounding half_away": lambda: replace(RECIPES["moss"], rounding="half_away"),
    "predicted.* rounded to even": lambda: replace(RECIPES["moss-exact"], rule="up", rounding="half_away"),
    "format 'fp4' is unknown": lambda: replace(RECIPES["mx"], act_format="fp4"),
    r"'group'.*\(128, 128\).*predicted": lambda: replace(RECIPES["group"], weight_scale="predicted"),
    r"weight has .*\(32,\).*\(64,\)": lambda: ms.quantize_norm(X, "rms", torch.ones(32)),
    r"row_factor.*\(4, 1\)": lambda: ms.transpose(in_fp8(X).data, torch.ones(1, 4)),
    "q has .*float32: .*float8_e4m3fn or torch.float8_e5m2": lambda: ms.transpose(X),
    r"h has .*\(4, 5\).*\(any, 4\)": lambda: ms.quantize_swiglu(X[:, :5]),
    r"h has .*\(4, 64\) .*\(any, 40\), .*twice": lambda: ms.quantize_swiglu_gradient(in_fp8(X), X[:, :20]),
    r"da has .*\(3, 32\).*\(4, any\)": lambda: ms.quantize_swiglu_gradient(in_fp8(X), X[:3, :32]),
    r"x has .*\(any, any, any, 4\)": lambda: ms.rope_into(Z, Z[..., :5], TABLE, TABLE),
    r"out has .*\(2, 3, 3, 16\).*\(2, 4, 3, 16\)": lambda: ms.rope_into(Z[:, 1:], Z, TABLE, TABLE),
    r"cos has .*\(1, 8\).*\(4, 8\)": lambda: ms.rope_into(Z, Z, TABLE[:1], TABLE),
    r"sin has .*\(4, 1\).*\(4, 8\)": lambda: ms.rope_into(Z, Z, TABLE, TABLE[:, :1]),
    "of a matrix": lambda: ms.Quantized(in_fp8(X).data[0], torch.ones(1, 1), (ALL, ALL)),
    r"\(4, 64\) in blocks \(1, 32\) need scales \(4, 2\)": lambda: in_blocks((1, 32), (1, 1)),
    "one global scale or none": lambda: in_blocks((1, ALL), (4, 1), outer=torch.ones(2)),
    r"need scales \(4, 1\).*got \[2, 1\]": lambda: ms.fold(in_blocks((2, 32), (2, 2))),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_together_is_refused_with_the_reason_on_every_device(message, kernels):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


def test_kernels_for_a_gpu_that_is_not_the_current_one_are_refused_with_the_fix(monkeypatch):
    monkeypatch.setattr(ms, "capability", lambda device: (9, 0))
    monkeypatch.setattr(ms, "HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert [ms.kernels_run_on(device) for device in ("cuda:0", "cuda", "cpu")] == [True, True, False]
    with pytest.raises(ValueError, match=r"on cuda:1.*cuda:0: call torch.cuda.set_device\(1\)"):
        ms.kernels_run_on(torch.device("cuda", 1))


@needs_triton
def test_kernels_read_arguments_of_any_strides():
    x, quarter = random_rows(20, 16, device=DEVICE).clamp(-24, 24), torch.full((20, 1), 0.25, device=DEVICE)
    data, apart = in_fp8(x).data, torch.cat((quarter, torch.ones_like(quarter)), dim=1)[:, :1]
    moved = where("transpose", False)(data, quarter)
    assert torch.equal(ms.transpose_triton(data, apart).float(), moved.float())
    assert torch.equal(ms.transpose_triton(data.t()).float(), data.float())
    h, da = in_fp8(x.t()[:, :10]), x.t()[:, 10:15]
    near = replace(h, data=h.data.contiguous())
    assert_same(ms.quantize_swiglu_gradient_triton(h, da), ms.quantize_swiglu_gradient_triton(near, da))
    apart, x, results = [z[:, ::2] for z in angles(5, 32)], heads(2, 5, 3, 16), []
    for halves in (apart, [z.contiguous() for z in apart]):
        results.append(torch.empty_like(x))
        ms.rope_triton(results[-1], x, *halves)
    assert torch.equal(*results)
