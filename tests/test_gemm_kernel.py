"""The matrix product against float64, the linear layer's output and each of its gradients, on every recipe."""

import math
import re

import pytest
import torch
from conftest import DEVICE

import gemm_kernel as gk
from fp8_formats import E4M3, E5M2, FORMATS, uncast
from microscale import (ALL, HAS_TRITON, RECIPES, Quantized, fold, quantize_reference, quantize_two_level,
                        quantize_weight, sqnr)

FP8_RECIPES = [name for name in RECIPES if name != "none"]
VARIANTS = {"tensor": ((ALL, ALL), (ALL, ALL), "fp32"), "moss": ((1, ALL), (ALL, ALL), "up"),
            "group": ((1, 128), (128, 128), "fp32"), "group, wgrad": ((1, 128), (1, 128), "fp32"),
            "per 32": ((1, 32), (1, 32), "floor")}

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def quantized_pair(M, N, K, variant, fmt_b=E4M3):
    torch.manual_seed(M * N + K)
    block_a, block_b, rule = VARIANTS[variant]
    a = quantize_reference(torch.randn(M, K, device=DEVICE), E4M3, block_a, rule)
    b = quantize_reference(torch.randn(N, K, device=DEVICE), fmt_b, block_b, rule)
    return a, b, a.dequantize().double() @ b.dequantize().double().t()


# ---------------------------------------------------------------------------------------------------
# The product

@needs_triton
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("M, N, K", [(1, 1, 16), (1, 3, 32), (64, 64, 128), (100, 200, 272), (17, 130, 1040)])
@pytest.mark.parametrize("promote", [False, True], ids=["fast", "promoted"])
def test_kernel_equals_float64_on_the_same_fp8_operands(variant, M, N, K, promote):
    a, b, exact = quantized_pair(M, N, K, variant)
    # the tensor core keeps about 14 bits of a running sum, which costs 5e-4 at K = 1040; the interpreter sums in FP32
    tolerance = 1e-3 if DEVICE == "cuda" else 1e-6
    assert gk.relative_error(gk.matmul_triton(a, b, torch.float32, promote), exact) < tolerance


@needs_triton
@pytest.mark.parametrize("M, N", [(3, 5), (70, 200)])
def test_setting_partial_sums_aside_loses_nothing(M, N):
    a, b, exact = quantized_pair(M, N, 5 * 2048 + 48, "moss")   # five times, and a rest
    tolerance = 1e-3 if DEVICE == "cuda" else 1e-6              # of 2048 terms in the tensor core; FP32 elsewhere
    assert gk.relative_error(gk.matmul_triton(a, b, torch.float32, promote=True), exact) < tolerance


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("M, N", [(1, 1), (50, 36), (17, 130), (140, 264)])   # rows that TMA can write, and others
def test_a_residual_is_added_before_the_result_is_rounded(M, N, dtype):
    a, b, exact = quantized_pair(M, N, 256, "moss")
    residual = 100 * torch.randn(M, N, device=DEVICE, dtype=dtype)
    got = gk.matmul_triton(a, b, torch.float32, add=residual)
    assert gk.relative_error(got, exact + residual.double()) < 1e-4
    assert gk.relative_error(gk.matmul(a, b, torch.float32, add=residual), exact + residual.double()) < 1e-4


@needs_triton
@pytest.mark.parametrize("variant", ["tensor", "group, wgrad", "per 32"])
@pytest.mark.parametrize("multiply", [gk.matmul, gk.matmul_triton])
def test_products_of_micro_batches_accumulate_in_float32_in_place(variant, multiply):
    gradient, total = torch.zeros(40, 72, device=DEVICE), torch.zeros(40, 72, dtype=torch.float64, device=DEVICE)
    for K in (32, 64, 128):
        a, b, exact = quantized_pair(40, 72, K, variant)
        assert multiply(a, b, torch.float32, promote=True, add=gradient, out=gradient) is gradient
        total += exact
    tolerance = 3e-3 if DEVICE == "cuda" else 1e-6   # per 32 multiplies in BF16 on a GPU and rounds each product
    assert gk.relative_error(gradient, total) < tolerance


@needs_triton
@pytest.mark.parametrize("name", ["add", "out"])
def test_what_is_added_to_must_have_the_shape_of_the_product(name):
    a, b, _ = quantized_pair(16, 32, 64, "moss")
    with pytest.raises(ValueError, match=rf"{name} has shape \(32, 16\).*\(16, 32\) is needed"):
        gk.matmul_triton(a, b, torch.float32, **{name: torch.zeros(32, 16, device=DEVICE)})


@needs_triton
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda f: f.name)
def test_kernel_multiplies_e4m3_with_either_format(fmt):
    a, b, exact = quantized_pair(48, 80, 256, "moss", fmt)
    assert gk.relative_error(gk.matmul_triton(a, b, torch.float32), exact) < 1e-3


@needs_triton
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("promote", [False, True], ids=["fast", "promoted"])
def test_the_largest_tiles_fit_into_shared_memory_with_float32_output(variant, promote):
    M, N = (2100, 4200) if DEVICE == "cuda" else (140, 300)   # enough tiles of 128 x 256 for every SM, ragged
    a, b, exact = quantized_pair(M, N, 272, variant)
    assert gk.relative_error(gk.matmul_triton(a, b, torch.float32, promote), exact) < 1e-3
    residual = torch.randn(M, N, device=DEVICE)
    assert gk.relative_error(gk.matmul_triton(a, b, torch.float32, promote, residual), exact + residual) < 1e-3


@pytest.mark.gpu   # the interpreter cuts bits off where a GPU rounds to BF16
def test_bf16_output_is_the_float32_output_rounded_once():
    a, b, _ = quantized_pair(70, 90, 256, "moss")
    assert torch.equal(gk.matmul_triton(a, b, torch.bfloat16), gk.matmul_triton(a, b, torch.float32).bfloat16())


@pytest.mark.gpu
def test_promotion_holds_the_error_at_k_16384_that_fast_accumulation_loses():
    a, b, exact = quantized_pair(512, 512, 16384, "tensor")
    fast, promoted = (gk.relative_error(gk.matmul_triton(a, b, torch.bfloat16, p), exact) for p in (False, True))
    assert promoted < 2e-3 < fast   # BF16 rounding of the output alone is 1.66e-3


@pytest.mark.parametrize("K, aside, mean, measured", [
    (4096, None, 0.0, 1.3e-3), (16384, None, 0.0, 3.1e-3), (16384, None, 2.0, 0.26), (16384, 2048, 0.0, 0.85e-3),
    (16384, 2048, 2.0, 0.028)])
def test_the_model_of_the_tensor_core_has_the_errors_that_were_measured_on_an_h200(K, aside, mean, measured):
    torch.manual_seed(0)
    # other random numbers change an error by 2%; `promote` keeps what BF16 cannot hold in the sum, the model nothing
    assert gk.errors_of_tensor_core(K, [aside], mean) == pytest.approx([measured], rel=0.06)


def test_the_model_of_the_tensor_core_adds_exactly_what_needs_no_more_than_14_bits():
    a, b = torch.tensor([[2.0 ** -6] * 64, [0.0] * 64, [448.0] * 32 + [2.0 ** -6] * 32]), torch.ones(1, 64)
    assert gk.tensor_core_sum(a, b).flatten().tolist() == [1.0, 0.0, 448 * 32]   # 32 x 2^-6 is below 2^-13 of that


@pytest.mark.parametrize("a, b, kept", [
    (16, 16, 13), (24, 24, 13), (2 ** -6, 256, 13), (2 ** -7, 256, 12), (2 ** -9, 256, 10)])
def test_the_model_of_the_tensor_core_keeps_as_much_beside_a_product_as_an_h200(a, b, kept):
    """14 bits of a sum: of 2^e those down to 2^(e - 13). But the exponent of a subnormal is that of 2^-6."""
    e = math.floor(math.log2(a * b))
    for k in (kept, kept + 1):
        root = 2.0 ** ((e - k) // 2)                                                       # root x rest = 2^(e - k)
        total = gk.tensor_core_sum(torch.tensor([[a, root]]), torch.tensor([[b, 2.0 ** (e - k) / root]])).item()
        assert total - a * b == (2.0 ** (e - k) if k == kept else 0)


@pytest.mark.gpu
@pytest.mark.parametrize("mean, spread", [(0, 0), (2, 0), (0, 3)], ids=["cancelling", "one sign", "far apart"])
@pytest.mark.parametrize("M, N, K", [(64, 64, 16), (100, 72, 2320), (64, 64, 8192), (2304, 2048, 256)])
def test_the_model_of_the_tensor_core_is_the_tensor_core_bit_for_bit(M, N, K, mean, spread):
    torch.manual_seed(0)
    a, b = (quantize_reference((torch.randn(n, K, device=DEVICE) + mean) * torch.exp2(spread * torch.randn(
        n, K, device=DEVICE)), E4M3, block, "up") for n, block in ((M, (1, ALL)), (N, (ALL, ALL))))
    model = gk.tensor_core_sum(uncast(a.data), uncast(b.data)) * a.scale * b.scale   # these are powers of two
    assert torch.equal(gk.matmul_triton(a, b, torch.float32), model)


UNEQUAL = [((1, 128), (ALL, ALL)), ((1, ALL), (1, ALL)), ((ALL, ALL), (128, 128)), ((1, 64), (1, 128)),
           ((1, 128), (ALL, 128)), ((1, 16), (1, 16)), ((1, 256), (1, 256))]   # the kernel multiplies 32 to 128 at once


@pytest.mark.parametrize("block_a, block_b", UNEQUAL, ids=str)
def test_scales_that_the_kernel_cannot_apply_are_multiplied_in_bf16(block_a, block_b):
    torch.manual_seed(0)
    a, b = (quantize_reference(torch.randn(n, 256, device=DEVICE), E4M3, block, "fp32")
            for n, block in ((48, block_a), (32, block_b)))
    exact = a.dequantize().double() @ b.dequantize().double().t()
    # on a GPU operands and output are rounded, to 1.66e-3 each
    assert gk.relative_error(gk.matmul(a, b, torch.float32), exact) < 3.5e-3


@needs_triton
@pytest.mark.parametrize("block_a, block_b", UNEQUAL, ids=str)
def test_scales_that_the_kernel_cannot_apply_are_refused_by_it(block_a, block_b):
    a, b = (quantize_reference(torch.ones(n, 256, device=DEVICE), E4M3, block, "fp32")
            for n, block in ((48, block_a), (32, block_b)))
    with pytest.raises(ValueError, match="use matmul, which multiplies such blocks in BF16"):
        gk.matmul_triton(a, b)


@pytest.mark.parametrize("how", [lambda q: q, fold], ids=["two-level", "folded"])
@pytest.mark.parametrize("block_b", [(1, 32), (ALL, ALL)], ids=str)
def test_a_global_scale_is_part_of_the_product(how, block_b, monkeypatch):
    torch.manual_seed(0)
    a = how(quantize_two_level(torch.randn(48, 256, device=DEVICE)))
    b = quantize_reference(torch.randn(32, 256, device=DEVICE), E4M3, block_b, "up")
    exact = a.dequantize().double() @ b.dequantize().double().t()
    monkeypatch.setattr(gk, "has_fp8_tensor_cores", lambda _: HAS_TRITON)
    assert gk.relative_error(gk.matmul(a, b, torch.float32), exact) < 3.5e-3   # at most: both made BF16


def test_a_global_scale_is_part_of_wgrad():
    torch.manual_seed(0)
    dy, x = (fold(quantize_two_level(s * torch.randn(64, n, device=DEVICE))) for s, n in ((1e-3, 32), (10, 48)))
    exact = dy.dequantize().double().t() @ x.dequantize().double()
    assert gk.relative_error(gk.matmul(*gk.transpose_for_wgrad(dy, x, E4M3), torch.float32), exact) < 3.5e-3


def test_numbers_that_are_not_fp8_are_multiplied_where_the_kernel_runs(monkeypatch):
    torch.manual_seed(0)
    a, b = (quantize_reference(torch.randn(n, 256, device=DEVICE), FORMATS["e2m1"], block, "up")
            for n, block in ((48, (1, ALL)), (32, (ALL, ALL))))
    exact = a.dequantize().double() @ b.dequantize().double().t()
    monkeypatch.setattr(gk, "has_fp8_tensor_cores", lambda _: HAS_TRITON)
    assert gk.relative_error(gk.matmul(a, b, torch.float32), exact) < 3.5e-3


@needs_triton
def test_k_that_the_memory_accelerator_cannot_move_is_refused_with_the_fix():
    data, scale = torch.zeros(4, 24, device=DEVICE).to(torch.float8_e4m3fn), torch.ones(1, 1, device=DEVICE)
    a = Quantized(data, scale, (ALL, ALL))
    with pytest.raises(ValueError, match="K = 24.*multiple of 16; pad"):
        gk.matmul_triton(a, a)


@needs_triton
def test_operands_of_different_k_are_refused_by_the_kernel():
    a, b = (quantized_pair(16, 16, K, "tensor")[0] for K in (32, 64))
    with pytest.raises(ValueError, match="K = 32 and 64"):
        gk.matmul_triton(a, b)


@needs_triton
def test_the_kernel_takes_operands_of_any_strides():
    a, b, exact = quantized_pair(32, 48, 64, "moss")
    a.data, a.scale = a.data.t().contiguous().t(), a.scale.repeat(1, 3)[:, :1]
    assert gk.relative_error(gk.matmul_triton(a, b, torch.float32), exact) < 1e-3


def test_a_sum_is_kept_in_the_dtype_of_what_it_is_written_to():
    a, b, exact = quantized_pair(16, 32, 64, "moss")
    total = torch.full((16, 32), 1e3, device=DEVICE)
    gk.matmul(a, b, add=total, out=total)
    assert gk.relative_error(total, exact + 1e3) < 1e-5   # in BF16, the default, it would be 2e-3


def test_torch_scaled_mm_agrees_on_scales_per_tensor():
    a, b, _ = quantized_pair(32, 64, 96, "tensor")
    theirs = torch._scaled_mm(a.data, b.data.t(), a.scale.view(()), b.scale.view(()), out_dtype=torch.bfloat16)
    # two roundings to BF16 of sums that were taken in another order
    assert gk.relative_error(gk.matmul(a, b, torch.bfloat16), theirs.double()) < 4e-3


# ---------------------------------------------------------------------------------------------------
# The linear layer

def linear_case(name, T, N, K, dtype=torch.float32):
    """(x, weight, FP8 weight copies, dy) with tokens of different size, as in a trained model."""
    torch.manual_seed(T + N + K)
    x = (torch.randn(T, K) * torch.exp(torch.randn(T, 1))).to(DEVICE, dtype).requires_grad_()
    weight = (0.02 * torch.randn(N, K)).to(DEVICE).requires_grad_()
    dy = (1e-4 * torch.randn(T, N) * torch.exp(torch.randn(T, 1))).to(DEVICE, dtype)
    recipe = RECIPES[name]
    scale = None if recipe.weight_scale == "block" else (weight.detach().abs().max() / 448).view(1, 1)
    return x, weight, quantize_weight(weight.detach(), recipe, scale), dy


def run_linear(name, x, weight, copies, dy):
    x.grad = weight.grad = None
    y = gk.fp8_linear(x, weight, *copies, RECIPES[name])
    y.backward(dy)
    return {"output": y.detach(), "x.grad": x.grad, "weight.grad": weight.grad}


@pytest.mark.parametrize("name", FP8_RECIPES)
@pytest.mark.parametrize("T, N, K", [(64, 96, 128), (48, 32, 272), (16, 144, 80)])
def test_output_and_each_gradient_are_close_to_the_unquantized_layer(name, T, N, K):
    x, weight, copies, dy = linear_case(name, T, N, K)
    got = run_linear(name, x, weight, copies, dy)
    X, W, dY = (t.detach().double() for t in (x, weight, dy))
    exact = {"output": X @ W.t(), "x.grad": dY @ W, "weight.grad": dY.t() @ X}
    # E4M3 keeps 4 bits: 31 dB per operand, 28 dB for a product of two. E5M2 (gradients of `tensor`) keeps 3: 25 and
    # 24 dB; one scale per tensor drowns small tokens, mx cuts off the top of its blocks: 1 to 2 dB less.
    lowest = {"output": 25, "x.grad": 22 if name == "tensor" else 25, "weight.grad": 22 if name == "tensor" else 25}
    assert {k: sqnr(exact[k], got[k]) > lowest[k] for k in got} == {k: True for k in got}


@pytest.mark.parametrize("name", FP8_RECIPES)
@pytest.mark.parametrize("T, N, K", [(64, 96, 128), (48, 32, 272), (16, 144, 80)])
def test_each_product_is_exact_on_the_operands_as_quantized(name, T, N, K):
    """tensor and moss use one FP8 copy of X and of dY for all products, group and mx one for each axis."""
    x, weight, (w, w_t), dy = linear_case(name, T, N, K)
    got = run_linear(name, x, weight, (w, w_t), dy)
    recipe = RECIPES[name]

    def quantized(z, fmt=E4M3):
        return quantize_reference(z.detach(), fmt, recipe.act_block, recipe.rule).dequantize().double()

    fmt, once = gk.FORMATS[recipe.grad_format], name in ("tensor", "moss")
    dY, W, W_t = quantized(dy, fmt), w.dequantize().double(), w_t.dequantize().double()
    dY_t, X_t = (dY.t(), quantized(x).t()) if once else (quantized(dy.t(), fmt), quantized(x.t()))
    exact = {"output": quantized(x) @ W.t(), "x.grad": dY @ W_t.t(), "weight.grad": dY_t @ X_t.t()}
    # In wgrad moss multiplies the token scales into dY^T, which may turn subnormal: 2^-14 of the largest token.
    # mx multiplies in BF16 on a GPU, and its gradient of the weight is rounded to BF16 before it is float32.
    tolerance = (3e-3 if name == "mx" else 1e-3) if DEVICE == "cuda" else 1e-5
    for what, value in got.items():
        assert gk.relative_error(value, exact[what]) < tolerance, what


@pytest.mark.parametrize("name", FP8_RECIPES)
def test_the_layer_gives_the_same_bits_twice(name):
    case = linear_case(name, 64, 96, 128)
    first, second = run_linear(name, *case), run_linear(name, *case)
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("name", FP8_RECIPES)
def test_gradients_accumulate_over_micro_batches(name):
    x, weight, copies, dy = linear_case(name, 32, 48, 64)
    once = run_linear(name, x, weight, copies, dy)["weight.grad"].clone()
    gk.fp8_linear(x, weight, *copies, RECIPES[name]).backward(dy)
    assert torch.equal(weight.grad, 2 * once)


@pytest.mark.parametrize("name", FP8_RECIPES)
def test_recomputing_the_activation_changes_no_bit(name):
    x, weight, copies, dy = linear_case(name, 32, 48, 64)
    plain = run_linear(name, x, weight, copies, dy)
    x.grad = weight.grad = None
    y = torch.utils.checkpoint.checkpoint(gk.fp8_linear, x, weight, *copies, RECIPES[name], use_reentrant=False)
    y.backward(dy)
    assert torch.equal(x.grad, plain["x.grad"]) and torch.equal(weight.grad, plain["weight.grad"])


@pytest.mark.parametrize("name", FP8_RECIPES)
def test_a_second_derivative_is_an_error(name):
    x, weight, copies, dy = linear_case(name, 32, 48, 64)
    dx, = torch.autograd.grad(gk.fp8_linear(x, weight, *copies, RECIPES[name]).tanh().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()


@pytest.mark.parametrize("name", FP8_RECIPES)
def test_a_frozen_weight_costs_no_product_and_gets_no_gradient(name, monkeypatch):
    x, weight, copies, dy = linear_case(name, 32, 48, 64)
    weight.requires_grad_(False)
    y, products, multiply = gk.fp8_linear(x, weight, *copies, RECIPES[name]), [], gk.matmul
    monkeypatch.setattr(gk, "matmul", lambda *args, **options: products.append(1) or multiply(*args, **options))
    y.backward(dy)
    assert len(products) == 1 and x.grad is not None and weight.grad is None


@pytest.mark.parametrize("name", FP8_RECIPES)
def test_only_fp8_is_kept_of_the_activation(name):
    x, weight, copies, _ = linear_case(name, 64, 96, 128)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gk.fp8_linear(x, weight, *copies, RECIPES[name])
    data = [t for t in kept if t.numel() == x.numel()]
    assert [t.element_size() for t in data] == [1]
    assert sum(t.nbytes for t in kept) < 1.2 * x.numel()   # the rest are scales


@pytest.mark.parametrize("name", FP8_RECIPES)
def test_nan_in_the_input_or_the_gradient_is_not_hidden(name):
    x, weight, copies, dy = linear_case(name, 32, 48, 64)
    with torch.no_grad():
        x[3, 5] = float("nan")
    assert run_linear(name, x, weight, copies, dy)["output"][3].isnan().all()
    x, weight, copies, dy = linear_case(name, 32, 48, 64)
    dy[3, 5] = float("inf")
    got = run_linear(name, x, weight, copies, dy)
    assert not got["x.grad"][3].isfinite().any() and not got["weight.grad"].isfinite().all()


@pytest.mark.parametrize("name", FP8_RECIPES)
def test_zero_gradients_give_zero_gradients(name):
    x, weight, copies, dy = linear_case(name, 32, 48, 64)
    got = run_linear(name, x, weight, copies, torch.zeros_like(dy))
    assert (got["x.grad"] == 0).all() and (got["weight.grad"] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", FP8_RECIPES)
def test_kernels_on_a_gpu_agree_with_the_emulation(name, monkeypatch):
    case = linear_case(name, 512, 384, 768, torch.bfloat16)
    kernels = run_linear(name, *case)
    for module in ("gemm_kernel", "microscale"):
        monkeypatch.setattr(f"{module}.has_fp8_tensor_cores", lambda _: False)
    emulated = run_linear(name, *case)
    for what in kernels:   # BF16 rounding of the output is 1.66e-3, fast accumulation at K = 768 less than 1e-3
        assert gk.relative_error(kernels[what], emulated[what].double()) < 4e-3, what


# ---------------------------------------------------------------------------------------------------
# The table

@needs_triton
def test_the_geometric_means_of_our_product_and_of_pytorchs_are_over_the_same_twelve(monkeypatch, capsys):
    ms = iter(range(1, 100))
    monkeypatch.setattr(gk, "time_product", lambda M, N, K, variants, fast: {
        name: next(ms) for name in ("BF16", "_scaled_mm", *variants)})
    monkeypatch.setattr(gk, "error_of", lambda *_: 0.0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "any GPU")
    gk.show_times()
    rows = dict(re.findall(r"^  (as trained|_scaled_mm)(.*)$", capsys.readouterr().out, re.MULTILINE))
    ours, theirs = ([float(number) for number in rows[name].split()] for name in sorted(rows, reverse=True))
    assert ours[0] / ours[1] == pytest.approx(theirs[0], rel=2e-3)   # three digits are printed
