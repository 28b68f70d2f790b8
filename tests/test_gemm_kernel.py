"""The matrix product against float64, and the linear layer's output and each gradient, for every recipe."""

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
PRODUCTS = [gk.matmul] + ([gk.matmul_triton] if HAS_TRITON else [])
each_recipe = pytest.mark.parametrize("name", FP8_RECIPES)


def randn(*shape, **options):
    return torch.randn(*shape, device=DEVICE, **options)


def exact_product(a, b):
    return a.dequantize().double() @ b.dequantize().double().t()


def quantized_pair(M, N, K, variant, fmt_b=E4M3):
    torch.manual_seed(M * N + K)
    block_a, block_b, rule = VARIANTS[variant]
    a = quantize_reference(randn(M, K), E4M3, block_a, rule)
    b = quantize_reference(randn(N, K), fmt_b, block_b, rule)
    return a, b, exact_product(a, b)


# ---------------------------------------------------------------------------------------------------
# The product

@needs_triton
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("M, N, K", [(1, 1, 16), (1, 3, 32), (64, 64, 128), (100, 200, 272), (17, 130, 1040)])
@pytest.mark.parametrize("promote", [False, True], ids=["fast", "promoted"])
def test_kernel_equals_float64_on_the_same_fp8_operands(variant, M, N, K, promote):
    a, b, exact = quantized_pair(M, N, K, variant)
    # 14 bits of a running sum cost 5e-4 at K = 1040; the interpreter sums in FP32
    tolerance = 1e-3 if DEVICE == "cuda" else 1e-6
    assert gk.relative_error(gk.matmul_triton(a, b, torch.float32, promote), exact) < tolerance


@needs_triton
@pytest.mark.parametrize("M, N", [(3, 5), (70, 200)])
def test_promoting_a_sum_loses_nothing(M, N):
    a, b, exact = quantized_pair(M, N, 5 * 2048 + 48, "moss")   # five times, and a rest
    tolerance = 1e-3 if DEVICE == "cuda" else 1e-6              # of 2048 terms in the tensor core
    assert gk.relative_error(gk.matmul_triton(a, b, torch.float32, promote=True), exact) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("M, N", [(1, 1), (50, 36), (17, 130), (140, 264)])   # rows TMA can write, and others
@pytest.mark.parametrize("multiply", PRODUCTS)
def test_a_residual_is_added_before_the_result_is_rounded(M, N, dtype, multiply):
    a, b, exact = quantized_pair(M, N, 256, "moss")
    residual = 100 * randn(M, N, dtype=dtype)
    assert gk.relative_error(multiply(a, b, torch.float32, add=residual), exact + residual.double()) < 1e-4


@pytest.mark.parametrize("variant", ["tensor", "group, wgrad", "per 32"])
@pytest.mark.parametrize("multiply", PRODUCTS)
def test_products_of_micro_batches_accumulate_in_float32_in_place(variant, multiply):
    gradient, total = torch.zeros(40, 72, device=DEVICE), 0
    for K in (32, 64, 128):
        a, b, exact = quantized_pair(40, 72, K, variant)
        assert multiply(a, b, torch.float32, promote=True, add=gradient, out=gradient) is gradient
        total += exact
    tolerance = 3e-3 if DEVICE == "cuda" else 1e-6   # per 32 multiplies in BF16 on a GPU, and rounds
    assert gk.relative_error(gradient, total) < tolerance


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
    for residual in (None, randn(M, N)):
        y = gk.matmul_triton(a, b, torch.float32, promote, residual)
        assert gk.relative_error(y, exact if residual is None else exact + residual) < 1e-3


@pytest.mark.gpu   # the interpreter cuts bits off where a GPU rounds to BF16
def test_bf16_output_is_the_float32_output_rounded_once():
    a, b, _ = quantized_pair(70, 90, 256, "moss")
    assert torch.equal(gk.matmul_triton(a, b), gk.matmul_triton(a, b, torch.float32).bfloat16())


@needs_triton
def test_the_kernel_takes_tensors_of_any_strides_and_writes_to_any_address():
    a, b, exact = quantized_pair(32, 48, 64, "moss")
    a.data, a.scale = a.data.t().contiguous().t(), a.scale.repeat(1, 3)[:, :1]
    out = torch.empty(32 * 48 + 1, device=DEVICE)[1:].view(32, 48)   # TMA writes to multiples of 16 bytes
    assert gk.relative_error(gk.matmul_triton(a, b, out=out), exact) < 1e-3


def test_a_sum_is_kept_in_the_dtype_of_what_it_is_written_to():
    a, b, exact = quantized_pair(16, 32, 64, "moss")
    total = torch.full((16, 32), 1e3, device=DEVICE)
    gk.matmul(a, b, add=total, out=total)
    assert gk.relative_error(total, exact + 1e3) < 1e-5   # in BF16, the default, it would be 2e-3


def test_torch_scaled_mm_agrees_on_scales_per_tensor():
    a, b, _ = quantized_pair(32, 64, 96, "tensor")
    theirs = torch._scaled_mm(a.data, b.data.t(), a.scale[0, 0], b.scale[0, 0], out_dtype=torch.bfloat16)
    # two roundings to BF16 of sums that were taken in another order
    assert gk.relative_error(gk.matmul(a, b, torch.bfloat16), theirs.double()) < 4e-3


def zeros(*shape, block=(ALL, ALL), scales=(1, 1)):
    data = torch.zeros(shape, device=DEVICE).to(E4M3.dtype)
    return Quantized(data, torch.ones(scales, device=DEVICE), block)


REFUSED = {  # message: what `matmul` gets in place of an A of (16, 64), with a B of (32, 64)
    r"K = 32 and 64: both must be the same": lambda: {"a": zeros(16, 32)},
    r"K = 24 and 24.*multiple of 16; pad them": lambda: {"a": zeros(16, 24), "b": zeros(32, 24)},
    r"shape \(32, 16\).*contiguous \(16, 32\)": lambda: {"add": torch.zeros(32, 16)},
    r"shape \(32,\).*contiguous \(16, 32\)": lambda: {"add": torch.zeros(32)},
    r"shape \(16, 16\).*contiguous \(16, 32\)": lambda: {"out": torch.zeros(16, 16)},
    r"strides \(1, 16\): a contiguous": lambda: {"out": torch.zeros(32, 16).t()},
    r"float64.*it sums in float32": lambda: {"out_dtype": torch.float64},
    r"int32.*it sums in float32": lambda: {"out": torch.zeros(16, 32, dtype=torch.int32)},
    r"meta.*move them to one device": lambda: {"add": torch.zeros(16, 32, device="meta")},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_the_kernel_cannot_multiply_is_refused_on_every_device(message):
    with pytest.raises(ValueError, match=message):
        gk.matmul(**{"a": zeros(16, 64), "b": zeros(32, 64), **REFUSED[message]()})


@pytest.mark.parametrize("M, N, K", [(0, 32, 16), (16, 0, 32), (16, 32, 0), (0, 0, 0)])
def test_an_empty_product_is_zeros_and_starts_no_kernel(M, N, K, monkeypatch):
    monkeypatch.setattr(gk, "kernels_run_on", lambda _: True)
    monkeypatch.setattr(gk, "matmul_triton", None, raising=False)
    a, b, ones = zeros(M, K, block=(1, ALL), scales=(M, 1)), zeros(N, K), torch.ones(M, N, device=DEVICE)
    assert torch.equal(gk.matmul(a, b, torch.float32), torch.zeros_like(ones))
    assert torch.equal(gk.matmul(a, b, add=ones, out=ones.clone()), ones)


@pytest.mark.parametrize("multiply", [gk.matmul, gk.matmul_reference])
def test_no_gradient_leaves_a_product(multiply):
    a, b, _ = quantized_pair(16, 32, 64, "moss")
    a.scale.requires_grad_(), b.scale.requires_grad_()
    assert not multiply(a, b).requires_grad


UNEQUAL = [((1, 128), (ALL, ALL)), ((1, ALL), (1, ALL)), ((ALL, ALL), (128, 128)), ((1, 64), (1, 128)),
           ((1, 128), (ALL, 128)), ((1, 16), (1, 16)), ((1, 256), (1, 256))]   # the kernel's steps: 32 to 128


@pytest.mark.parametrize("block_a, block_b", UNEQUAL, ids=str)
def test_scales_that_the_kernel_refuses_are_multiplied_in_bf16(block_a, block_b):
    torch.manual_seed(0)
    a, b = (quantize_reference(randn(n, 256), E4M3, block, "fp32")
            for n, block in ((48, block_a), (32, block_b)))
    # on a GPU operands and output are rounded, to 1.66e-3 each
    assert gk.relative_error(gk.matmul(a, b, torch.float32), exact_product(a, b)) < 3.5e-3
    if HAS_TRITON:
        with pytest.raises(ValueError, match="use matmul, which multiplies such blocks in BF16"):
            gk.matmul_triton(a, b)


OTHERS = {"two-level": lambda x: quantize_two_level(x), "folded": lambda x: fold(quantize_two_level(x)),
          "E2M1": lambda x: quantize_reference(x, FORMATS["e2m1"], (1, ALL), "up")}


@pytest.mark.parametrize("how", OTHERS)
@pytest.mark.parametrize("block_b", [(1, 32), (ALL, ALL)], ids=str)
def test_global_scales_and_numbers_that_are_not_fp8_need_no_kernel(how, block_b, monkeypatch):
    torch.manual_seed(0)
    a, b = OTHERS[how](randn(48, 256)), quantize_reference(randn(32, 256), E4M3, block_b, "up")
    monkeypatch.setattr(gk, "kernels_run_on", lambda _: HAS_TRITON)
    for a, b in ((a, b), (b, a)):
        y = gk.matmul(a, b, torch.float32)
        assert gk.relative_error(y, exact_product(a, b)) < 3.5e-3   # at most: both made BF16


# ---------------------------------------------------------------------------------------------------
# What the tensor core keeps of a sum

@pytest.mark.gpu
def test_promotion_holds_the_error_at_k_16384_that_fast_accumulation_loses():
    a, b, exact = quantized_pair(512, 512, 16384, "tensor")
    fast, promoted = (gk.relative_error(gk.matmul_triton(a, b, promote=p), exact) for p in (False, True))
    assert promoted < 2e-3 < fast   # BF16 rounding of the output alone is 1.66e-3


@pytest.mark.parametrize("K, promote_every, mean, measured", [
    (4096, None, 0.0, 1.3e-3), (16384, None, 0.0, 3.1e-3), (16384, None, 2.0, 0.26),
    (16384, 2048, 0.0, 0.85e-3), (16384, 2048, 2.0, 0.028)])
def test_the_model_of_the_tensor_core_has_the_errors_of_an_h200(K, promote_every, mean, measured):
    torch.manual_seed(0)
    # other numbers change an error by 2%; what BF16 cannot hold stays in the kernel's sum, not in the model's
    assert gk.error_of_sum(K, mean, promote_every) == pytest.approx(measured, rel=0.06)


def test_the_model_of_the_tensor_core_adds_exactly_what_needs_no_more_than_14_bits():
    a = torch.tensor([[2.0 ** -6] * 64, [0.0] * 64, [448.0] * 32 + [2.0 ** -6] * 32])
    total = gk.tensor_core_sum(a, torch.ones(1, 64)).flatten().tolist()
    assert total == [1.0, 0.0, 448 * 32]   # 32 x 2^-6 is below 2^-13 of that


@pytest.mark.parametrize("a, b, kept", [
    (16, 16, 13), (24, 24, 13), (2 ** -6, 256, 13), (2 ** -7, 256, 12), (2 ** -9, 256, 10)])
def test_the_model_of_the_tensor_core_keeps_as_much_beside_a_product_as_an_h200(a, b, kept):
    """14 bits of a sum: of 2^e those down to 2^(e - 13). But the exponent of a subnormal is that of 2^-6."""
    e = math.floor(math.log2(a * b))
    for k in (kept, kept + 1):
        root = 2.0 ** ((e - k) // 2)                                              # root x rest = 2^(e - k)
        operands = torch.tensor([[a, root]]), torch.tensor([[b, 2.0 ** (e - k) / root]])
        assert gk.tensor_core_sum(*operands).item() - a * b == (2.0 ** (e - k) if k == kept else 0)


@pytest.mark.gpu
@pytest.mark.parametrize("mean, spread", [(0, 0), (2, 0), (0, 3)], ids=["cancel", "one sign", "far apart"])
@pytest.mark.parametrize("M, N, K", [(64, 64, 16), (100, 72, 2320), (64, 64, 8192), (2304, 2048, 256)])
def test_the_model_of_the_tensor_core_is_the_tensor_core_bit_for_bit(M, N, K, mean, spread):
    torch.manual_seed(0)
    a, b = (quantize_reference((randn(n, K) + mean) * torch.exp2(spread * randn(n, K)), E4M3, block, "up")
            for n, block in ((M, (1, ALL)), (N, (ALL, ALL))))
    model = gk.tensor_core_sum(uncast(a.data), uncast(b.data)) * a.scale * b.scale   # these are powers of two
    assert torch.equal(gk.matmul_triton(a, b, torch.float32), model)


# ---------------------------------------------------------------------------------------------------
# The linear layer

def per_token(x):
    return quantize_reference(x, E4M3, (1, ALL), "up")


def under_a_global_scale(x):
    q = per_token(x / 3)
    return Quantized(q.data, q.scale, q.block, torch.full((1, 1), 3.0, device=DEVICE))


@pytest.mark.parametrize("how", [per_token, under_a_global_scale, OTHERS["folded"]])
def test_wgrad_of_scales_per_token_is_exact_on_the_operands(how):
    torch.manual_seed(0)
    dy, x = (how(size * randn(64, n) * randn(64, 1).exp()) for size, n in ((1e-3, 32), (10, 48)))
    factor, common = gk.wgrad_factor(dy, x)
    assert factor.shape == (64, 1) and common.shape == (1, 1) and factor.max() == 1
    assert how is OTHERS["folded"] or (factor.frexp().mantissa == 0.5).all()   # powers of two
    exact = dy.dequantize().double().t() @ x.dequantize().double()
    assert gk.relative_error(gk.matmul(*gk.transpose_for_wgrad(dy, x), torch.float32), exact) < 1e-3


@pytest.mark.parametrize("tokens, block", [(16, (ALL, ALL)), (1, (1, ALL))], ids=str)
def test_wgrad_without_scales_of_the_same_tokens_is_refused(tokens, block):
    rows, other = zeros(16, 64, block=(1, ALL), scales=(16, 1)), zeros(tokens, 64, block=block)
    for pair in ((rows, other), (other, rows)):
        with pytest.raises(ValueError, match=r"the same tokens, both quantized in blocks \(1, ALL\)"):
            gk.transpose_for_wgrad(*pair)


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


@each_recipe
@pytest.mark.parametrize("T, N, K", [(64, 96, 128), (48, 32, 272), (16, 144, 80)])
def test_output_and_each_gradient_are_close_to_the_unquantized_layer(name, T, N, K):
    x, weight, copies, dy = linear_case(name, T, N, K)
    got = run_linear(name, x, weight, copies, dy)
    X, W, dY = (t.detach().double() for t in (x, weight, dy))
    exact = {"output": X @ W.t(), "x.grad": dY @ W, "weight.grad": dY.t() @ X}
    # E4M3 keeps 4 bits: 31 dB per operand, 28 dB for a product of two. E5M2 (gradients of `tensor`) keeps 3:
    # 25 and 24 dB. A scale per tensor drowns small tokens, mx cuts off the top of its blocks: 1 to 2 dB less.
    lowest = {"output": 25, **dict.fromkeys(("x.grad", "weight.grad"), 22 if name == "tensor" else 25)}
    assert {k: sqnr(exact[k], got[k]) > lowest[k] for k in got} == {k: True for k in got}


@each_recipe
@pytest.mark.parametrize("T, N, K", [(64, 96, 128), (48, 32, 272), (16, 144, 80)])
def test_each_product_is_exact_on_the_operands_as_quantized(name, T, N, K):
    """tensor and moss use one FP8 copy of X and of dY for all products, group and mx one for each axis."""
    x, weight, (w, w_t), dy = linear_case(name, T, N, K)
    got = run_linear(name, x, weight, (w, w_t), dy)
    recipe = RECIPES[name]

    def quantized(z, fmt=E4M3):
        return quantize_reference(z.detach(), fmt, recipe.act_block, recipe.rule).dequantize().double()

    fmt, once = FORMATS[recipe.grad_format], name in ("tensor", "moss")
    dY, W, W_t = quantized(dy, fmt), w.dequantize().double(), w_t.dequantize().double()
    dY_t, X_t = (dY.t(), quantized(x).t()) if once else (quantized(dy.t(), fmt), quantized(x.t()))
    exact = {"output": quantized(x) @ W.t(), "x.grad": dY @ W_t.t(), "weight.grad": dY_t @ X_t.t()}
    # In wgrad moss multiplies the scales of tokens into dY^T, which may turn subnormal: 2^-14 of the largest.
    # mx multiplies in BF16 on a GPU, and its gradient of the weight is rounded to BF16 before it is float32.
    tolerance = (3e-3 if name == "mx" else 1e-3) if DEVICE == "cuda" else 1e-5
    for what, value in got.items():
        assert gk.relative_error(value, exact[what]) < tolerance, what


@each_recipe
def test_computing_again_changes_no_bit_of_the_output_or_a_gradient(name):
    x, weight, copies, dy = linear_case(name, 64, 96, 128)
    plain = run_linear(name, x, weight, copies, dy)
    x.grad = weight.grad = None
    args = x, weight, *copies, RECIPES[name]
    y = torch.utils.checkpoint.checkpoint(gk.fp8_linear, *args, use_reentrant=False)
    y.backward(dy)
    again = {"output": y, "x.grad": x.grad, "weight.grad": weight.grad}
    assert all(torch.equal(again[what], plain[what]) for what in plain)


@each_recipe
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_strides_change_no_bit_and_gradients_have_the_dtypes_of_their_tensors(name, dtype):
    x, weight, copies, dy = linear_case(name, 32, 48, 64, dtype)
    dy = dy[:1].expand(32, 48)                                                 # as y.sum(0) hands it back
    plain = run_linear(name, x, weight, copies, dy.contiguous())
    x = x.detach().t().contiguous().t().view(2, 16, 64).requires_grad_()
    got = run_linear(name, x, weight, copies, dy.view(2, 16, 48))
    assert got["output"].dtype == got["x.grad"].dtype == dtype and got["weight.grad"].dtype == torch.float32
    assert all(torch.equal(got[what].view_as(plain[what]), plain[what]) for what in got)


def test_wgrad_of_no_tokens_is_zero():
    dy, x = (zeros(0, n, block=(1, ALL), scales=(0, 1)) for n in (32, 48))
    dw = gk.matmul(*gk.transpose_for_wgrad(dy, x))
    assert dw.shape == (32, 48) and not dw.any()


@each_recipe
@pytest.mark.parametrize("shape", [(0,), (0, 16), (3, 0)], ids=str)
def test_no_tokens_give_no_output_and_a_gradient_of_zero(name, shape):
    _, weight, copies, _ = linear_case(name, 16, 48, 64)
    x = torch.zeros(*shape, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    got = run_linear(name, x, weight, copies, torch.zeros(*shape, 48, device=DEVICE, dtype=x.dtype))
    assert got["output"].shape == (*shape, 48) and got["x.grad"].shape == x.shape
    assert got["weight.grad"].shape == weight.shape and not got["weight.grad"].any()


@each_recipe
def test_a_second_derivative_is_an_error(name):
    x, weight, copies, _ = linear_case(name, 32, 48, 64)
    loss = gk.fp8_linear(x, weight, *copies, RECIPES[name]).tanh().sum()
    dx, = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()


@each_recipe
@pytest.mark.parametrize("frozen", ["weight", "x"])
def test_what_is_frozen_costs_no_product_and_gets_no_gradient(name, frozen, monkeypatch):
    x, weight, copies, dy = linear_case(name, 32, 48, 64)
    still, learns = (weight, x) if frozen == "weight" else (x, weight)
    plain = run_linear(name, x, weight, copies, dy)
    still.requires_grad_(False)
    products, multiply = [], gk.matmul
    monkeypatch.setattr(gk, "matmul", lambda *args, **how: products.append(1) or multiply(*args, **how))
    run_linear(name, x, weight, copies, dy)
    assert len(products) == 2 and still.grad is None   # fprop, and dgrad or wgrad
    assert torch.equal(learns.grad, plain["x.grad" if learns is x else "weight.grad"])


@each_recipe
def test_only_fp8_is_kept_of_the_activation(name):
    x, weight, copies, _ = linear_case(name, 64, 96, 128)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gk.fp8_linear(x, weight, *copies, RECIPES[name])
    assert [t.element_size() for t in kept if t.numel() == x.numel()] == [1]
    assert sum(t.nbytes for t in kept) < 1.2 * x.numel()   # the rest are scales


@each_recipe
def test_nan_in_the_input_or_the_gradient_is_not_hidden(name):
    x, weight, copies, dy = linear_case(name, 32, 48, 64)
    with torch.no_grad():
        x[3, 5] = float("nan")
    assert run_linear(name, x, weight, copies, dy)["output"][3].isnan().all()
    x, weight, copies, dy = linear_case(name, 32, 48, 64)
    dy[3, 5] = float("inf")
    got = run_linear(name, x, weight, copies, dy)
    assert not got["x.grad"][3].isfinite().any() and not got["weight.grad"].isfinite().all()


@each_recipe
def test_zero_gradients_give_zero_gradients(name):
    x, weight, copies, dy = linear_case(name, 32, 48, 64)
    got = run_linear(name, x, weight, copies, torch.zeros_like(dy))
    assert (got["x.grad"] == 0).all() and (got["weight.grad"] == 0).all()


@pytest.mark.gpu
@each_recipe
def test_kernels_on_a_gpu_agree_with_the_emulation(name, monkeypatch):
    case = linear_case(name, 512, 384, 768, torch.bfloat16)
    kernels = run_linear(name, *case)
    for module in ("gemm_kernel", "microscale"):
        monkeypatch.setattr(f"{module}.kernels_run_on", lambda _: False)
    emulated = run_linear(name, *case)
    for what in kernels:   # rounding the output to BF16 costs 1.66e-3, the sums at K = 768 less than 1e-3
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
