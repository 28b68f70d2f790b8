"""
The FP8 matrix product on Hopper, and the linear layer made of three of them.

    python gemm_kernel.py       # every variant against float64; on a GPU also time and TFLOP/s

All operands are stored with the summed axis last and contiguous, which is the one layout that Hopper's FP8
tensor cores read:

    Y (M, N) = A (M, K) B (N, K)^T          A ~ Q_a scale_a,  B ~ Q_b scale_b

Where do the scales go? If they change along K, sum_k s_k q_a q_b needs the running sum multiplied out every 32
or 128 of K, by ordinary FP32 instructions, while the tensor cores wait. If they do not, they leave the sum,

    Y[m, n] = scale_a[m] scale_b[n] sum_k Q_a[m, k] Q_b[n, k]

and the main loop is nothing but tensor-core work (MOSS, arXiv 2511.05811; microscale.py says how a
microscaled activation gets there: `fold`). A linear layer does this three times,

    fprop   Y  (T, N) = X  (T, K)   W  (N, K)^T         sums over K
    dgrad   dX (T, K) = dY (T, N)   W^T(K, N)^T         sums over N
    wgrad   dW (N, K) = dY^T(N, T)  X^T(K, T)^T         sums over the tokens T

Hopper's FP8 tensor cores keep about 14 bits of a running sum. fprop lives with that (relative error 1.3e-3 at
K = 4096, 2.5e-3 at 11008); dgrad and wgrad add their partial sums to an FP32 accumulator every 8 x 128 of K (5e-4).
"""

import os

import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"   # run alone on a CPU: the kernels run in Triton's interpreter

from fp8_formats import E4M3, FORMATS
from microscale import (ALL, HAS_TRITON, MIN_SCALE, Quantized, has_fp8_tensor_cores, quantize, quantize_reference,
                        transpose)

if HAS_TRITON:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor


# ---------------------------------------------------------------------------------------------------
# The product: reference, then kernel

def matmul_reference(a, b, out_dtype=torch.float32):
    """Quantized a (M, K), b (N, K) -> (M, N): the product of what they stand for, summed in float32."""
    return (a.dequantize() @ b.dequantize().t()).to(out_dtype)


def matmul(a, b, out_dtype=torch.bfloat16, promote=False):
    """Quantized a (M, K), b (N, K) -> (M, N) in `out_dtype`, by the fastest way this device has.

    promote: add partial sums to an FP32 accumulator (dgrad, wgrad). Operands with a power-of-two scale per 32 of K are
    exact in BF16, and BF16 products are faster on Hopper than scaling in the loop.
    """
    if not has_fp8_tensor_cores(a.data.device):
        return matmul_reference(a, b, out_dtype)
    if a.block[1] == 32:
        product = a.dequantize(torch.bfloat16) @ b.dequantize(torch.bfloat16).t()
        return product.to(out_dtype)
    return matmul_triton(a, b, out_dtype, promote)


if HAS_TRITON:
    @triton.jit
    def _gemm_kernel(a_desc, b_desc, c_ptr, a_scale_ptr, b_scale_ptr, M, N, K,
                     BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SMS: tl.constexpr,
                     IN_LOOP: tl.constexpr, PROMOTE: tl.constexpr, A_PER_ROW: tl.constexpr,
                     B_ROWS: tl.constexpr, FLATTEN: tl.constexpr):
        """C (M, N) = scale_a scale_b A (M, K) B (N, K)^T. Persistent: SMS programs walk over all tiles of C.

        IN_LOOP     scales (K/BLOCK_K, M) and (K/BLOCK_K, N/B_ROWS) multiply every partial product; else they are
                    applied once at the end: scale_a (M) if A_PER_ROW else (1), scale_b (1).
        PROMOTE     0: the tensor core keeps the sum; p: it is added to FP32 registers every p x BLOCK_K of K.
        Loads past the edge of A or B give zeros, which add nothing; stores are masked.
        """
        GROUP_M: tl.constexpr = 8  # tiles are walked in columns of 8, so that they share B in the L2 cache
        tiles_m = tl.cdiv(M, BLOCK_M)
        tiles_n = tl.cdiv(N, BLOCK_N)
        k_tiles = tl.cdiv(K, BLOCK_K)
        for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, SMS, flatten=FLATTEN):
            first_m = tile // (GROUP_M * tiles_n) * GROUP_M
            group_m = min(tiles_m - first_m, GROUP_M)
            m0 = (first_m + tile % (GROUP_M * tiles_n) % group_m) * BLOCK_M
            n0 = (tile % (GROUP_M * tiles_n) // group_m) * BLOCK_N
            m = m0 + tl.arange(0, BLOCK_M)
            n = n0 + tl.arange(0, BLOCK_N)

            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            partial = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            b_groups = tl.cdiv(N, B_ROWS)
            for k in range(k_tiles):
                a = a_desc.load([m0, k * BLOCK_K])
                b = b_desc.load([n0, k * BLOCK_K])
                if IN_LOOP:
                    a_scale = tl.load(a_scale_ptr + k * M + m, mask=m < M, other=0.0)
                    b_scale = tl.load(b_scale_ptr + k * b_groups + n // B_ROWS, mask=n < N, other=0.0)
                    acc += tl.dot(a, b.T) * (a_scale[:, None] * b_scale[None, :])
                else:
                    partial = tl.dot(a, b.T, partial)
                    if PROMOTE:
                        if (k + 1) % PROMOTE == 0:
                            acc += partial
                            partial = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)

            if PROMOTE:
                acc += partial
            elif not IN_LOOP:
                acc = partial
            if not IN_LOOP:
                if A_PER_ROW:
                    acc *= (tl.load(a_scale_ptr + m, mask=m < M, other=0.0) * tl.load(b_scale_ptr))[:, None]
                else:
                    acc *= tl.load(a_scale_ptr) * tl.load(b_scale_ptr)
            # The tile passes through shared memory on its way out. Half at a time, or it would not fit beside A and B.
            halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
            left, right = tl.split(halves)
            n = n0 + tl.arange(0, BLOCK_N // 2)
            c_ptrs = c_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
            inside = (m < M)[:, None] & (n < N)[None, :]
            tl.store(c_ptrs, left.to(c_ptr.dtype.element_ty), mask=inside)
            inside = (m < M)[:, None] & (n + BLOCK_N // 2 < N)[None, :]
            tl.store(c_ptrs + BLOCK_N // 2, right.to(c_ptr.dtype.element_ty), mask=inside)

    def tile_shape(M, N, sms, hopper=True):
        """(BLOCK_M, BLOCK_N, warps, stages): the largest tile of which there are enough to occupy every SM.

        Chosen on an H200. Newer GPUs get small tiles, which fit into the shared memory of all of them.
        """
        for shape in ((128, 256, 8, 3), (128, 128, 8, 4), (64, 128, 4, 4)) if hopper else ((64, 128, 4, 2),):
            if triton.cdiv(M, shape[0]) * triton.cdiv(N, shape[1]) >= sms:
                return shape
        return 64, 64, 4, 4 if hopper else 2

    def matmul_triton(a, b, out_dtype=torch.bfloat16, promote=False):
        """Quantized a (M, K), b (N, K) -> (M, N). Scales per row, per tensor, or every 32 or 128 of K.

        Raises ValueError where K is not a multiple of 16: the tensor memory accelerator moves 16 bytes at least.
        """
        (M, K), N = a.data.shape, b.data.shape[0]
        if K % 16:
            raise ValueError(f"FP8 GEMM with K = {K}: the summed axis must be a multiple of 16; pad it with zeros")
        in_loop = a.block[1] != ALL
        sms = torch.cuda.get_device_properties(a.data.device).multi_processor_count if a.data.is_cuda else 4
        hopper = not a.data.is_cuda or torch.cuda.get_device_capability(a.data.device) == (9, 0)
        BLOCK_M, BLOCK_N, warps, stages = tile_shape(M, N, sms, hopper)
        BLOCK_K = a.block[1] if in_loop else 128
        if in_loop and BLOCK_N == 256:  # a second accumulator has to fit into the registers
            BLOCK_N, stages = 128, 4
        c = torch.empty(M, N, device=a.data.device, dtype=out_dtype)
        scales = [s.float().t().contiguous() for s in (a.scale, b.scale)]
        _gemm_kernel[(min(sms, triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N)),)](
            TensorDescriptor.from_tensor(a.data, [BLOCK_M, BLOCK_K]),
            TensorDescriptor.from_tensor(b.data, [BLOCK_N, BLOCK_K]), c, *scales, M, N, K,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, SMS=sms, IN_LOOP=in_loop, PROMOTE=8 if promote else 0,
            A_PER_ROW=a.block[0] == 1, B_ROWS=max(b.block[0], 1), FLATTEN=not promote and not in_loop,
            num_warps=warps, num_stages=stages)
        return c


# ---------------------------------------------------------------------------------------------------
# The linear layer

class FP8Linear(torch.autograd.Function):
    """Y = X W^T with all three products in FP8. Between forward and backward it keeps X in FP8 only.

    x (T, K) any float dtype; weight (N, K), the master weight, receives the gradient; w and w_t are
    `quantize_weight(weight)`, made once per optimizer step; recipe: microscale.RECIPES.
    """

    @staticmethod
    def forward(ctx, x, weight, w, w_t, recipe):
        x_q = quantize(x, E4M3, recipe.act_block, recipe.rule)
        # Scales per row or tensor leave the FP8 numbers good for wgrad, too. Blocks along K do not: there X is
        # quantised once more, along T, from the unquantised X, so that no value is rounded twice.
        saved = x_q if recipe.act_block[1] == ALL else quantize(x.t(), E4M3, recipe.act_block, recipe.rule)
        ctx.save_for_backward(saved.data, saved.scale)
        ctx.w_t, ctx.recipe, ctx.weight_dtype = w_t, recipe, weight.dtype
        return matmul(x_q, w, x.dtype)

    @staticmethod
    def backward(ctx, dy):
        recipe, fmt = ctx.recipe, FORMATS[ctx.recipe.grad_format]
        saved = Quantized(*ctx.saved_tensors, recipe.act_block)
        dy_q = quantize(dy, fmt, recipe.act_block, recipe.rule)
        dx = matmul(dy_q, ctx.w_t, dy.dtype, promote=True) if ctx.needs_input_grad[0] else None
        if recipe.act_block[1] == ALL:
            dy_t, x_t = transpose_for_wgrad(dy_q, saved, fmt)
        else:
            dy_t, x_t = quantize(dy.t(), fmt, recipe.act_block, recipe.rule), saved
        return dx, matmul(dy_t, x_t, ctx.weight_dtype, promote=True), None, None, None


def transpose_for_wgrad(dy, x, dy_fmt):
    """Quantized dY (T, N), X (T, K), scales per row or per tensor -> dY^T (N, T), X^T (K, T), one scale per tensor.

    dW[n, k] = sum_t s_dy[t] s_x[t] dY[t, n] X[t, k]: the scales of a token cannot leave a sum over tokens. Their
    product, taken relative to its largest, is multiplied into dY^T, exactly as long as the result is normal: a
    token loses bits only where its whole share of dW is 2^-14 of another token's. X^T is X, moved.
    """
    scale = dy.scale * x.scale                                    # (T, 1) or (1, 1)
    common = scale.amax().clamp(min=MIN_SCALE).view(1, 1)
    factor = scale / common if dy.block[0] == 1 else None
    dy_t = Quantized(transpose(dy.data, factor, dy_fmt), common, (ALL, ALL))
    return dy_t, Quantized(transpose(x.data), torch.ones_like(common), (ALL, ALL))


def fp8_linear(x, weight, w, w_t, recipe):
    """x (..., K) -> (..., N), differentiable in x and weight. See FP8Linear."""
    y = FP8Linear.apply(x.reshape(-1, x.shape[-1]), weight, w, w_t, recipe)
    return y.view(*x.shape[:-1], weight.shape[0])


# ---------------------------------------------------------------------------------------------------
# What `python gemm_kernel.py` shows

VARIANTS = {  # name: (block of A, block of B, scale rule, promote)
    "epilogue only (moss)": ((1, ALL), (ALL, ALL), "up", False),
    "epilogue, promoted": ((1, ALL), (ALL, ALL), "up", True),
    "in loop per 128 (group)": ((1, 128), (128, 128), "fp32", False),
    "in loop per 32": ((1, 32), (1, 32), "floor", False),
}


def relative_error(y, exact):
    return ((y.double() - exact).norm() / exact.norm()).item()


def operands(M, N, K, variant, device):
    """Random Quantized A (M, K) and B (N, K) for a variant."""
    block_a, block_b, rule, _ = VARIANTS[variant]
    return (quantize_reference(torch.randn(M, K, device=device), E4M3, block_a, rule),
            quantize_reference(torch.randn(N, K, device=device), E4M3, block_b, rule))


def main():
    gpu = has_fp8_tensor_cores("cuda") if torch.cuda.is_available() else False
    device = "cuda" if gpu else "cpu"
    torch.manual_seed(0)
    if gpu:
        from triton.testing import do_bench
        print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, Triton {triton.__version__}\n")
        shapes = ((16384, 4096, 4096), (16384, 22016, 4096), (16384, 4096, 11008))
    else:
        kernel = "the kernel in Triton's interpreter" if HAS_TRITON else "no Triton here: the PyTorch reference"
        print(f"Errors on a CPU ({kernel}); times need a GPU of compute capability 9.0\n")
        shapes = ((64, 96, 256), (100, 72, 1040))
    multiply = matmul_triton if HAS_TRITON else lambda a, b, dtype, promote: matmul_reference(a, b, dtype)

    print(f"{'M x N x K':>20}  {'scales':24}{'error':>9}" + ("      ms  TFLOP/s  x BF16" if gpu else ""))
    for M, N, K in shapes:
        if gpu:
            x, w = (torch.randn(n, K, device=device, dtype=torch.bfloat16) for n in (M, N))
            bf16 = do_bench(lambda: x @ w.t(), return_mode="median")
            print(f"{f'{M} x {N} x {K}':>20}  {'BF16 (cuBLAS)':24}{'':>9}{bf16:8.3f}{2e-9 * M * N * K / bf16:9.0f}")
        for variant, (_, _, _, promote) in VARIANTS.items():
            # float64 of the whole product is slow, and a strip of it shows the same error
            a, b = operands(min(M, 512), N, K, variant, device)
            exact = a.dequantize().double() @ b.dequantize().double().t()
            error = relative_error(multiply(a, b, torch.float32, promote), exact)
            line = f"{f'{M} x {N} x {K}':>20}  {variant:24}{error:9.1e}"
            if gpu:
                a, b = operands(M, N, K, variant, device)
                ms = do_bench(lambda: multiply(a, b, torch.bfloat16, promote), return_mode="median")
                line += f"{ms:8.3f}{2e-9 * M * N * K / ms:9.0f}{bf16 / ms:8.2f}"
            print(line)
    print("\n-> error: against float64 on the same FP8 operands. With scales outside the sum the main loop is tensor-\n"
          "   core work alone. Every rescale inside it makes the tensor cores wait for FP32 arithmetic on the tile.")


if __name__ == "__main__":
    main()
