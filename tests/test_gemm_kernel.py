"""The matrix product against float64, and the linear layer's output and each gradient, for every recipe."""

import itertools
import math
import re
from dataclasses import replace

import pytest
import torch
from conftest import DEVICE, let_kernels_run, needs_triton

import gemm_kernel as gk
from fp8_formats import E4M3, E5M2, FORMATS, uncast
from gemm_kernel import product_error, relative_error
from microscale import (ALL, HAS_TRITON, RECIPES, Quantized, fold, quantize_reference, quantize_two_level,
                        quantize_weight, sqnr)

VARIANTS = {"tensor": ((ALL, ALL), (ALL, ALL), "fp32"), "moss": ((1, ALL), (ALL, ALL), "up"),
            "group": ((1, 128), (128, 128), "fp32"), "group, wgrad": ((1, 128), (1, 128), "fp32"),
            "per 32": ((1, 32), (1, 32), "floor"), "E5M2": ((1, ALL), (ALL, ALL), "fp32")}

each_product = pytest.mark.parametrize("multiply", [gk.matmul] + ([gk.matmul_triton] if HAS_TRITON else []))
each_recipe = pytest.mark.parametrize("name", [name for name in RECIPES if name != "none"])


def randn(*shape, **options):
    return torch.randn(*shape, device=DEVICE, **options)


def quantized_pair(M, N, K, variant="moss"):
    torch.manual_seed(M * N + K)
    block_a, block_b, rule = VARIANTS[variant]
    return (quantize_reference(randn(M, K), E5M2 if variant == "E5M2" else E4M3, block_a, rule),
            quantize_reference(randn(N, K), E4M3, block_b, rule))


def as_they_are(numbers, block=(ALL, ALL)):
    """Return numbers (R, C) of E4M3 as a Quantized with scales of 1."""
    numbers = torch.as_tensor(numbers, dtype=torch.float32, device=DEVICE)
    scales = numbers.new_ones(len(numbers) if block == (1, ALL) else 1, 1)
    return Quantized(numbers.to(E4M3.dtype), scales, block)


def zeros(*shape, block=(ALL, ALL)):
    return as_they_are(torch.zeros(shape), block)


# ---------------------------------------------------------------------------------------------------
# The product

SHAPES = [(1, 1, 16), (1, 3, 32), (50, 36, 256), (64, 64, 128), (100, 200, 272), (17, 130, 1040),
          (2100, 4200, 272) if DEVICE == "cuda" else (140, 300, 272)]   # the last in the largest tiles


# 14 bits of a running sum cost 5e-4 at K = 1040. On a GPU `matmul` rounds operands with scales per 32 to BF16
def tolerance(multiply, variant):
    return 1e-6 if DEVICE == "cpu" else 3e-3 if (multiply, variant) == (gk.matmul, "per 32") else 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("M, N, K", SHAPES)
@pytest.mark.parametrize("promote", [False, True], ids=["fast", "promoted"])
@each_product
def test_a_product_and_a_residual_equal_float64_on_the_same_fp8_operands(multiply, variant, M, N, K, promote):
    a, b = quantized_pair(M, N, K, variant)
    assert product_error(multiply(a, b, torch.float32, promote), a, b) < tolerance(multiply, variant)
    for residual in (randn(M, N), randn(M, N).bfloat16()):   # in float32 it fills shared memory most
        y = multiply(a, b, torch.float32, promote, add=100 * residual)
        assert product_error(y, a, b, 100 * residual) < tolerance(multiply, variant)


@needs_triton
@pytest.mark.parametrize("M, N", [(3, 5), (70, 200)])
def test_promoting_a_sum_loses_nothing_where_fast_accumulation_would(M, N):
    a, b = quantized_pair(M, N, 8 * 2048 + 48)   # promoted eight times, and a rest. Fast: 3e-3 on a GPU
    y = gk.matmul_triton(a, b, torch.float32, promote=True)
    assert product_error(y, a, b) < tolerance(gk.matmul_triton, "moss")


@pytest.mark.parametrize("variant", ["tensor", "group, wgrad", "per 32"])
@each_product
def test_products_of_micro_batches_accumulate_in_place_in_the_dtype_of_the_sum(variant, multiply):
    gradient = torch.zeros(40, 72, device=DEVICE)
    for K in (32, 64, 128):
        (a, b), before = quantized_pair(40, 72, K, variant), gradient.clone()
        assert multiply(a, b, promote=True, add=gradient, out=gradient) is gradient
        assert product_error(gradient, a, b, before) < tolerance(multiply, variant)   # in BF16 2e-3


@needs_triton
def test_the_kernel_takes_tensors_of_any_strides_and_writes_to_any_address():
    a, b = quantized_pair(32, 48, 64)
    a.data, a.scale = a.data.t().contiguous().t(), a.scale.repeat(1, 3)[:, :1]
    out = torch.empty(32 * 48 + 1, device=DEVICE)[1:].view(32, 48)   # TMA writes to multiples of 16 bytes
    assert product_error(gk.matmul_triton(a, b, out=out), a, b) < 1e-3


def test_torch_scaled_mm_agrees_on_scales_per_tensor():
    a, b = quantized_pair(32, 64, 96, "tensor")
    theirs = torch._scaled_mm(a.data, b.data.t(), a.scale[0, 0], b.scale[0, 0], out_dtype=torch.bfloat16)
    # two roundings to BF16 of sums that were taken in another order
    assert relative_error(gk.matmul(a, b, torch.bfloat16), theirs.double()) < 4e-3


REFUSED = {  # message: what `matmul` gets in place of an A of (16, 64), with a B of (32, 64)
    r"K = 32 and 64: both must be the same": {"a": zeros(16, 32)},
    r"K = 24 and 24.*multiple of 16; pad them": {"a": zeros(16, 24), "b": zeros(32, 24)},
    r"shape \(32,\).*contiguous \(16, 32\)": {"add": torch.zeros(32)},
    r"shape \(16, 16\).*contiguous \(16, 32\)": {"out": torch.zeros(16, 16)},
    r"strides \(1, 16\): a contiguous": {"out": torch.zeros(32, 16).t()},
    r"float64.*it sums in float32": {"out_dtype": torch.float64},
    r"int32.*it sums in float32": {"out": torch.zeros(16, 32, dtype=torch.int32)},
    r"meta.*move them to one device": {"add": torch.zeros(16, 32, device="meta")},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_the_kernel_cannot_multiply_is_refused_on_every_device(message):
    with pytest.raises(ValueError, match=message):
        gk.matmul(**{"a": zeros(16, 64), "b": zeros(32, 64), **REFUSED[message]})


@pytest.mark.parametrize("M, N, K", [(0, 32, 16), (16, 0, 32), (16, 32, 0), (0, 0, 0)])
def test_an_empty_product_is_zeros_and_starts_no_kernel(M, N, K, monkeypatch):
    let_kernels_run(True, monkeypatch)
    monkeypatch.setattr(gk, "matmul_triton", None, raising=False)
    a, b, ones = zeros(M, K, block=(1, ALL)), zeros(N, K), torch.ones(M, N, device=DEVICE)
    assert torch.equal(gk.matmul(a, b, torch.float32), torch.zeros_like(ones))
    assert torch.equal(gk.matmul(a, b, add=ones, out=ones.clone()), ones)


@pytest.mark.parametrize("multiply", [gk.matmul, gk.matmul_reference])
def test_no_gradient_leaves_a_product(multiply):
    a, b = quantized_pair(16, 32, 64)
    a.scale.requires_grad_(), b.scale.requires_grad_()
    assert not multiply(a, b).requires_grad


def per_token(x, fmt=E4M3, **given):
    return replace(quantize_reference(x, fmt, (1, ALL), "up"), **given)


HOW = {"two-level": quantize_two_level, "folded": lambda x: fold(quantize_two_level(x)),
       "per token": per_token, "global scale": lambda x: per_token(x, global_scale=x.new_tensor(3.0)),
       "INT8": lambda x: per_token(x, FORMATS["int8"])}
NO_KERNEL = [((1, 128), (ALL, ALL)), ((1, ALL), (1, ALL)), ((ALL, ALL), (128, 128)), ((1, 64), (1, 128)),
             ((1, 128), (ALL, 128)), ((1, 16), (1, 16)), ((1, 256), (1, 256)), ((128, ALL), (ALL, ALL)),
             ("folded", (1, 32)),
             *itertools.product(["two-level", "global scale", "INT8"], [(1, 32), (ALL, ALL)])]


@pytest.mark.parametrize("one, other", NO_KERNEL, ids=str)
def test_what_the_kernel_does_not_take_is_multiplied_in_bf16(one, other, monkeypatch):
    torch.manual_seed(0)
    let_kernels_run(True, monkeypatch)
    monkeypatch.setattr(gk, "matmul_triton", None, raising=False)
    a, b = (HOW[how](x) if how in HOW else quantize_reference(x, E4M3, how, "fp32")
            for how, x in ((one, randn(48, 256)), (other, randn(32, 256))))
    for a, b in ((a, b), (b, a)):   # operands and output are rounded, to 1.66e-3 each at most
        assert product_error(gk.matmul(a, b, torch.float32), a, b) < 3.5e-3


# ---------------------------------------------------------------------------------------------------
# What the program shows: products timed, and what the tensor core keeps of a sum

@needs_triton
def test_the_geometric_means_of_our_product_and_of_pytorchs_are_over_the_same_twelve(monkeypatch, capsys):
    ms = iter(range(1, 100))
    monkeypatch.setattr(gk, "measure", lambda M, N, K, fprop: {
        way: (next(ms), 0.0) for way in ("BF16", "_scaled_mm", "as trained", *["promoted"] * fprop)})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "any GPU")
    gk.show_products()
    rows = dict(re.findall(r"^  (as trained|_scaled_mm) (.*) of 12 products$", capsys.readouterr().out, re.M))
    ours, theirs = ([float(number) for number in rows[way].split()] for way in ("as trained", "_scaled_mm"))
    assert ours[0] / ours[1] == pytest.approx(theirs[0], rel=2e-3)   # three digits are printed


@pytest.mark.parametrize("K, promote_every, mean, measured", [
    (4096, None, 0.0, 1.3e-3), (16384, None, 0.0, 3.1e-3), (16384, None, 2.0, 0.26),
    (16384, 2048, 0.0, 0.85e-3), (16384, 2048, 2.0, 0.028)])
def test_the_model_of_the_tensor_core_has_the_errors_of_an_h200(K, promote_every, mean, measured):
    torch.manual_seed(0)
    a, b = (as_they_are(uncast(q.data)) for q in gk.operands(64, 64, K, "moss", DEVICE, mean))
    # other numbers change an error by 2%; what BF16 cannot hold stays in the kernel's sum, not in the model's
    assert product_error(gk.tensor_core_sum(a, b, promote_every), a, b) == pytest.approx(measured, rel=0.06)


def test_the_model_of_the_tensor_core_adds_exactly_what_needs_no_more_than_14_bits():
    a = as_they_are([[2.0 ** -6] * 64, [0.0] * 64, [448.0] * 32 + [2.0 ** -6] * 32])
    b = as_they_are(torch.ones(1, 64))
    a.scale, b.scale = 8 * a.scale, b.scale / 8
    assert gk.tensor_core_sum(a, b).tolist() == [[1], [0], [448 * 32]]   # 32 x 2^-6 is below 2^-13 of that


@pytest.mark.parametrize("a, b, kept", [
    (16, 16, 13), (24, 24, 13), (2 ** -6, 256, 13), (2 ** -7, 256, 12), (2 ** -9, 256, 10)])
def test_the_model_of_the_tensor_core_keeps_as_much_beside_a_product_as_an_h200(a, b, kept):
    """14 bits of a sum: of 2^e those down to 2^(e - 13). But the exponent of a subnormal is that of 2^-6."""
    e = math.floor(math.log2(a * b))
    for k in (kept, kept + 1):
        root = 2.0 ** ((e - k) // 2)                                              # root x rest = 2^(e - k)
        total = gk.tensor_core_sum(as_they_are([[a, root]]), as_they_are([[b, 2.0 ** (e - k) / root]]))
        assert total.item() - a * b == (2.0 ** (e - k) if k == kept else 0)


@pytest.mark.gpu
@pytest.mark.parametrize("mean, spread", [(0, 0), (2, 0), (0, 3)], ids=["cancel", "one sign", "far apart"])
@pytest.mark.parametrize("M, N, K", [(64, 64, 16), (100, 72, 2320), (64, 64, 8192), (2304, 2048, 256)])
def test_the_kernel_sums_as_its_model_bit_for_bit_and_rounds_once_to_bf16(M, N, K, mean, spread):
    torch.manual_seed(0)
    a, b = (quantize_reference((randn(n, K) + mean) * torch.exp2(spread * randn(n, K)), E4M3, block, "up")
            for n, block in ((M, (1, ALL)), (N, (ALL, ALL))))
    model = gk.tensor_core_sum(a, b)
    assert torch.equal(gk.matmul_triton(a, b, torch.float32), model)
    assert torch.equal(gk.matmul_triton(a, b), model.bfloat16())   # the interpreter would cut bits off


# ---------------------------------------------------------------------------------------------------
# The linear layer

@pytest.mark.parametrize("how", ["per token", "global scale", "folded"])
def test_wgrad_of_scales_per_token_is_exact_on_the_operands(how):
    torch.manual_seed(0)
    dy, x = (HOW[how](size * randn(64, n) * randn(64, 1).exp()) for size, n in ((1e-3, 32), (10, 48)))
    factor, common = gk.wgrad_factor(dy, x)
    assert factor.shape == (64, 1) and common.shape == (1, 1) and factor.max() == 1
    assert how == "folded" or (factor.frexp().mantissa == 0.5).all()   # powers of two
    exact = dy.dequantize().double().t() @ x.dequantize().double()
    assert relative_error(gk.matmul(*gk.transpose_for_wgrad(dy, x), torch.float32), exact) < 1e-3


@pytest.mark.parametrize("tokens, block", [(16, (ALL, ALL)), (1, (1, ALL))], ids=str)
def test_wgrad_without_scales_of_the_same_tokens_is_refused(tokens, block):
    rows, other = zeros(16, 64, block=(1, ALL)), zeros(tokens, 64, block=block)
    for pair in ((rows, other), (other, rows)):
        with pytest.raises(ValueError, match=r"the same tokens, both quantized in blocks \(1, ALL\)"):
            gk.transpose_for_wgrad(*pair)


def linear_case(name, T=32, N=48, K=64, dtype=torch.float32):
    """(x, weight, FP8 weight copies, dy) with tokens of different size, as in a trained model."""
    torch.manual_seed(T + N + K)
    x = (torch.randn(T, K) * torch.exp(torch.randn(T, 1))).to(DEVICE, dtype).requires_grad_()
    weight = (0.02 * torch.randn(N, K)).to(DEVICE).requires_grad_()
    dy = (1e-4 * torch.randn(T, N) * torch.exp(torch.randn(T, 1))).to(DEVICE, dtype)
    recipe = RECIPES[name]
    scale = None if recipe.weight_scale == "block" else (weight.detach().abs().max() / 448).view(1, 1)
    return x, weight, quantize_weight(weight.detach(), recipe, scale), dy


def run_linear(name, x, weight, copies, dy, linear=gk.fp8_linear):
    x.grad = weight.grad = None
    y = linear(x, weight, *copies, RECIPES[name])
    y.backward(dy)
    return {"output": y.detach(), "x.grad": x.grad, "weight.grad": weight.grad}


@each_recipe
@pytest.mark.parametrize("T, N, K", [(64, 96, 128), (48, 32, 272), (16, 144, 80), (128, 384, 768)])
def test_products_are_exact_on_the_operands_as_quantized_and_close_to_the_unquantized(name, T, N, K):
    """tensor and moss use one FP8 copy of X and of dY for all products, group and mx one for each axis."""
    x, weight, (w, w_t), dy = linear_case(name, T, N, K)
    got, recipe = run_linear(name, x, weight, (w, w_t), dy), RECIPES[name]

    def quantized(z, fmt=FORMATS[recipe.act_format]):
        return quantize_reference(z.detach(), fmt, recipe.act_block, recipe.rule).dequantize().double()

    fmt, once = FORMATS[recipe.grad_format], name in ("tensor", "moss")
    dY, W, W_t = quantized(dy, fmt), w.dequantize().double(), w_t.dequantize().double()
    dY_t, X_t = (dY.t(), quantized(x).t()) if once else (quantized(dy.t(), fmt), quantized(x.t()))
    exact = {"output": quantized(x) @ W.t(), "x.grad": dY @ W_t.t(), "weight.grad": dY_t @ X_t.t()}
    # In wgrad moss multiplies the scales of tokens into dY^T, which may turn subnormal: 2^-14 of the largest.
    # mx multiplies in BF16 on a GPU, and its gradient of the weight is rounded to BF16 before it is float32.
    in_bf16 = "mx" in name or name == "moss-exact"
    largest = (4e-3 if in_bf16 else 1e-3) if DEVICE == "cuda" else 1e-5
    # E4M3 keeps 4 bits: 31 dB per operand, 28 dB for a product of two. E5M2 (gradients of `tensor`) keeps 3:
    # 25 and 24 dB. A scale per tensor drowns small tokens, mx cuts off the top of its blocks: 1 to 2 dB less.
    # E3M2 keeps 3 bits as well, and little range: both operands 22 dB. E2M1 (weights of mxfp4) keeps 2.
    X, W, dY = (z.detach().double() for z in (x, weight, dy))
    unquantized = {"output": X @ W.t(), "x.grad": dY @ W, "weight.grad": dY.t() @ X}
    for what, value in got.items():
        assert relative_error(value, exact[what]) < largest, what
        least = {"mxfp4": 15, "mxfp6": 19, "tensor": 25 if what == "output" else 22}.get(name, 25)
        assert sqnr(unquantized[what], value) > least, what


@each_recipe
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_strides_and_recomputation_change_no_bit_and_gradients_have_the_dtypes_of_their_tensors(name, dtype):
    x, weight, copies, dy = linear_case(name, dtype=dtype)
    dy = dy[:1].expand(32, 48)                                                 # as y.sum(0) hands it back
    plain = run_linear(name, x, weight, copies, dy.contiguous())
    x = x.detach().t().contiguous().t().view(2, 16, 64).requires_grad_()
    got = run_linear(name, x, weight, copies, dy.view(2, 16, 48), linear=lambda *args: (
        torch.utils.checkpoint.checkpoint(gk.fp8_linear, *args, use_reentrant=False)))
    assert got["output"].dtype == got["x.grad"].dtype == dtype and got["weight.grad"].dtype == torch.float32
    assert all(torch.equal(got[what].view_as(plain[what]), plain[what]) for what in got)


@each_recipe
@pytest.mark.parametrize("shape", [(0,), (0, 16), (3, 0), (2, 16)], ids=str)
def test_no_tokens_and_gradients_of_zero_give_gradients_of_zero(name, shape):
    (_, weight, copies, _), x = linear_case(name), randn(*shape, 64, dtype=torch.bfloat16, requires_grad=True)
    got = run_linear(name, x, weight, copies, torch.zeros(*shape, 48, device=DEVICE, dtype=x.dtype))
    assert got["output"].shape == (*shape, 48)
    assert torch.equal(got["x.grad"], torch.zeros_like(x)) and torch.equal(got["weight.grad"], 0 * weight)


@each_recipe
def test_a_second_derivative_is_an_error(name):
    x, weight, copies, _ = linear_case(name)
    loss = gk.fp8_linear(x, weight, *copies, RECIPES[name]).tanh().sum()
    dx, = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()


@each_recipe
@pytest.mark.parametrize("frozen", ["weight", "x"])
def test_what_is_frozen_costs_no_product_and_gets_no_gradient(name, frozen, monkeypatch):
    case, products, multiply = linear_case(name), [], gk.matmul
    plain = run_linear(name, *case)
    case[frozen == "weight"].requires_grad_(False)
    monkeypatch.setattr(gk, "matmul", lambda *args, **how: products.append(1) or multiply(*args, **how))
    got = run_linear(name, *case)
    assert len(products) == 2 and got.pop(f"{frozen}.grad") is None   # fprop, and dgrad or wgrad
    assert all(torch.equal(got[what], plain[what]) for what in got)


@each_recipe
def test_nan_in_the_input_or_the_gradient_is_not_hidden(name):
    x, weight, copies, dy = linear_case(name)
    broken = x.detach().index_fill(0, torch.tensor([3], device=DEVICE), float("nan")).requires_grad_()
    assert run_linear(name, broken, weight, copies, dy)["output"][3].isnan().all()
    dy[3, 5] = float("inf")
    got = run_linear(name, x, weight, copies, dy)
    assert not got["x.grad"][3].isfinite().any() and not got["weight.grad"].isfinite().all()
