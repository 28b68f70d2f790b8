"""
The FP8 matrix product on Hopper, and the linear layer made of three of them.

    python gemm_kernel.py       # every variant against float64; on a GPU also time and TFLOP/s

All operands are stored with the summed axis last and contiguous, which is the one layout that Hopper's FP8
tensor cores read:

    Y (M, N) = A (M, K) B (N, K)^T          A ~ Q_a scale_a,  B ~ Q_b scale_b

Where do the scales go? If they change along K, the product of every 32 or 128 of K has to be multiplied by its scales
before it is added to the sum, by ordinary FP32 instructions, while the tensor cores wait. If not, they leave the sum,

    Y[m, n] = scale_a[m] scale_b[n] sum_k Q_a[m, k] Q_b[n, k]

and the main loop over K applies none. What follows it does, the *epilogue* (MOSS, arXiv 2511.05811; microscale.py says
why one scale per row will do for `moss`). A linear layer from K inputs to N outputs does this three times for T tokens
(the last ^T of a line is that of A B^T, the others name copies that are stored transposed),

    fprop   Y  (T, N) = X  (T, K)   W  (N, K)^T         sums over K
    dgrad   dX (T, K) = dY (T, N)   W^T(K, N)^T         sums over N
    wgrad   dW (N, K) = dY^T(N, T)  X^T(K, T)^T         sums over the tokens T

Hopper's FP8 tensor cores keep 14 bits of a running sum and cut off the rest (`tensor_core_sum` says how). Where terms
cancel, as they mostly do, that costs 1.3e-3 of the result at K = 4096 and 3.1e-3 at 16384. Where nearly all have one
sign (operands of mean 2 and deviation 1), every cut goes the same way, and at 16384 a quarter of the sum is gone. dgrad
and wgrad set the upper 16 bits of the sum aside every 16 x 128 of K (`promote`, as CUTLASS calls it), which leaves
0.85e-3 at any K where terms cancel, and 2.8% at 16384 where the signs agree. fprop lives with the cuts, as in torchao:
there setting aside takes 5% more time, every 4 x 128 of K 16%, and training ended no lower with it.
"""

import functools
import os
import statistics

import torch
from torch.autograd.function import once_differentiable

if __name__ == "__main__" and not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)):
    os.environ["TRITON_INTERPRET"] = "1"   # run alone, and not on a Hopper: the kernels run in Triton's interpreter

from fp8_formats import E4M3, EXPONENT_OF_ZERO, FORMATS, floor_log2, pow2, uncast
from microscale import (ALL, HAS_TRITON, KERNEL_WIDTHS, MIN_SCALE, Quantized, cdiv, has_fp8_tensor_cores,
                        measured_scale, quantize, quantize_both, quantize_reference, transpose)

if HAS_TRITON:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor


# ---------------------------------------------------------------------------------------------------
# The product: reference, then kernel

def matmul_reference(a, b, out_dtype=torch.float32, add=None, dtype=torch.float32):
    """Quantized a (M, K), b (N, K) -> (M, N): the product of what they stand for, both made `dtype`, plus `add`."""
    product = a.dequantize(dtype) @ b.dequantize(dtype).t()
    return (product if add is None else product + add.float()).to(out_dtype)


def tensor_core_sum(a, b, aside=None):
    """a (M, K) b (N, K)^T, E4M3 numbers in float32, summed as an H200's tensor cores do, bit for bit.

    32 products and the sum so far are aligned to the largest exponent e among them: that of a product is the sum of
    its factors' (of subnormals that of the smallest normal number, 2^-6). Of each, what lies below 2^(e - 13) is cut
    off; the rest is added exactly, and the first 14 bits of that are the new sum.

    aside: after so many of K the sum is added to one in FP32, and begins anew.
    """
    total = acc = a.new_zeros(len(a), len(b))
    e_a, e_b = (floor_log2(x).clamp(min=E4M3.emin).masked_fill(x == 0, EXPONENT_OF_ZERO) for x in (a, b))
    for k in range(0, a.shape[1], 32):
        terms = torch.cat((a[:, None, k:k + 32] * b[:, k:k + 32], acc[..., None]), dim=2)      # (M, N, 33)
        e = torch.cat((e_a[:, None, k:k + 32] + e_b[:, k:k + 32], floor_log2(acc)[..., None]), dim=2)
        unit = pow2((e.amax(dim=2, keepdim=True) - 13).clamp(min=-126))
        acc = ((terms / unit).trunc() * unit).sum(dim=2)
        acc = (acc.view(torch.int32) & -1024).view(torch.float32)                              # 13 of 23 fraction bits
        if aside and (k + 32) % aside == 0:
            total, acc = total + acc, torch.zeros_like(acc)
    return total + acc


def kernel_can_scale(a, b):
    """Whether the kernel can apply these scales: A's per row or one, and one of B; or both in equal steps along K."""
    if a.global_scale is not None or b.global_scale is not None:
        return False
    if a.block[1] == ALL:
        return a.block[0] in (1, ALL) and b.block == (ALL, ALL)
    return a.block[0] == 1 and b.block[0] != ALL and a.block[1] == b.block[1] and b.block[1] in KERNEL_WIDTHS


def matmul(a, b, out_dtype=torch.bfloat16, promote=False, add=None, out=None):
    """Quantized a (M, K), b (N, K) -> (M, N) in `out_dtype`, by the fastest way this device has.

    promote   set the upper bits of the running sum aside every 2048 of K (dgrad, wgrad)
    add, out  (M, N): the product is added to `add` (a residual) and written to `out`; with add = out it accumulates

    With a scale per 32 of K, operands made BF16 and a BF16 product are faster on Hopper than scaling in the loop, and
    exact under powers of two (`mx`); other scales round them. Blocks that the kernel cannot scale go the same way.
    """
    fp8 = has_fp8_tensor_cores(a.data.device)
    if fp8 and a.data.itemsize == b.data.itemsize == 1 and a.block[1] != 32 and kernel_can_scale(a, b):
        return matmul_triton(a, b, out_dtype, promote, add, out)
    out_dtype = out_dtype if out is None else out.dtype
    product = matmul_reference(a, b, out_dtype, add, torch.bfloat16 if fp8 else torch.float32)
    return product if out is None else out.copy_(product)


PROMOTE_EVERY = 16   # x 128 of K: half of the error that rounding the output to BF16 adds, where terms cancel

if HAS_TRITON:
    @triton.jit
    def halves(x):
        """(M, N) -> columns 0 ... N/2 - 1 and the others. One thread holds n and n + N/2: nothing moves."""
        M: tl.constexpr = x.shape[0]
        N: tl.constexpr = x.shape[1]
        return tl.split(tl.permute(tl.reshape(x, (M, 2, N // 2)), (0, 2, 1)))

    @triton.jit
    def low(pair):
        """pair (M, N/2) int32: two BF16 numbers each, column n in the low bits, n + N/2 in the high -> column n."""
        return (pair << 16).to(tl.float32, bitcast=True)

    @triton.jit
    def high(pair):
        return (pair & -65536).to(tl.float32, bitcast=True)

    @triton.jit
    def promote(acc, pair):
        """Sets the upper 16 bits of a running sum aside: acc (M, N) float32, pair (M, N/2) int32 -> the same.

        A second accumulator of 128 x 256 numbers would take the other half of all registers, and there would be none
        left to work with. The upper half of a float32 is a BF16 number, and two of them fit into one register. What
        they cannot hold, the lower 16 bits, stays in the running sum: nothing is lost, and the sum is small again.
        """
        M: tl.constexpr = acc.shape[0]
        N: tl.constexpr = acc.shape[1]
        left, right = halves(acc)
        left += low(pair)
        right += high(pair)
        pair = ((left.to(tl.int32, bitcast=True) >> 16) & 65535) | (right.to(tl.int32, bitcast=True) & -65536)
        rest = tl.join(left - low(pair), right - high(pair))                             # (M, N/2, 2)
        return tl.reshape(tl.permute(rest, (0, 2, 1)), (M, N)), pair

    @triton.jit
    def store_tile(tile, c_desc, c_ptr, add_ptr, m0, n0, M, N, ADD: tl.constexpr, TMA_STORE: tl.constexpr):
        m = m0 + tl.arange(0, tile.shape[0])
        n = n0 + tl.arange(0, tile.shape[1])
        at = m.to(tl.int64)[:, None] * N + n[None, :]
        inside = (m < M)[:, None] & (n < N)[None, :]
        if ADD:
            tile += tl.load(add_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if TMA_STORE:
            c_desc.store([m0, n0], tile.to(c_ptr.dtype.element_ty))
        else:
            tl.store(c_ptr + at, tile.to(c_ptr.dtype.element_ty), mask=inside)

    @triton.jit
    def _gemm_kernel(a_desc, b_desc, c_desc, c_ptr, add_ptr, a_scale_ptr, b_scale_ptr, M, N, K,
                     BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PROGRAMS: tl.constexpr,
                     IN_LOOP: tl.constexpr, PROMOTE: tl.constexpr, A_PER_ROW: tl.constexpr, B_ROWS: tl.constexpr,
                     ADD: tl.constexpr, TMA_STORE: tl.constexpr, QUARTERS: tl.constexpr, FLATTEN: tl.constexpr):
        """C (M, N) = scale_a scale_b A (M, K) B (N, K)^T [+ ADD]. Persistent: PROGRAMS programs walk over all tiles.

        IN_LOOP     scales (K/BLOCK_K, M) and (K/BLOCK_K, N/B_ROWS) multiply every partial product; else they are
                    applied once at the end: scale_a (M) if A_PER_ROW else (1), scale_b (1).
        PROMOTE     0: the tensor core keeps the sum; p: it is set aside every p x BLOCK_K of K.
        FLATTEN     tile and K loop become one, so that the next tile is fetched while this one is written.
        TMA_STORE   the tensor memory accelerator writes the tile: it can, if rows start at multiples of 16 bytes.
        Loads past the edge of A or B give zeros, which add nothing. The tile passes through shared memory on its way
        out, in halves or QUARTERS: whole, it would not fit beside A and B.
        """
        GROUP_M: tl.constexpr = 12  # tiles are walked in columns of 12: the 132 SMs share 12 of A and 11 of B in L2
        tiles_m = tl.cdiv(M, BLOCK_M)
        tiles_n = tl.cdiv(N, BLOCK_N)
        k_tiles = tl.cdiv(K, BLOCK_K)
        for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=FLATTEN):
            first_m = tile // (GROUP_M * tiles_n) * GROUP_M
            group_m = min(tiles_m - first_m, GROUP_M)
            m0 = (first_m + tile % (GROUP_M * tiles_n) % group_m) * BLOCK_M
            n0 = (tile % (GROUP_M * tiles_n) // group_m) * BLOCK_N
            m = m0 + tl.arange(0, BLOCK_M)
            n = n0 + tl.arange(0, BLOCK_N)

            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            if PROMOTE:
                pair = tl.zeros((BLOCK_M, BLOCK_N // 2), dtype=tl.int32)
            for k in range(k_tiles):
                a = a_desc.load([m0, k * BLOCK_K])
                b = b_desc.load([n0, k * BLOCK_K])
                if IN_LOOP:
                    a_scale = tl.load(a_scale_ptr + k * M + m, mask=m < M, other=0.0)[:, None]
                    b_scale_row = b_scale_ptr + k * tl.cdiv(N, B_ROWS)
                    if B_ROWS % BLOCK_N == 0:
                        a_scale *= tl.load(b_scale_row + n0 // B_ROWS)
                        acc += tl.dot(a, b.T) * a_scale
                    else:
                        acc += tl.dot(a, b.T) * (a_scale * tl.load(b_scale_row + n // B_ROWS, mask=n < N, other=0.0))
                else:
                    acc = tl.dot(a, b.T, acc)
                    if PROMOTE:
                        if (k + 1) % PROMOTE == 0 and k + 1 < k_tiles:
                            acc, pair = promote(acc, pair)

            left, right = halves(acc)
            if PROMOTE:
                left += low(pair)
                right += high(pair)
            if not IN_LOOP:
                scale = tl.load(a_scale_ptr + m * A_PER_ROW, mask=m < M, other=0.0) * tl.load(b_scale_ptr)
                left *= scale[:, None]
                right *= scale[:, None]
            if QUARTERS:
                W: tl.constexpr = BLOCK_N // 4
                first, second = halves(left)
                third, fourth = halves(right)
                store_tile(first, c_desc, c_ptr, add_ptr, m0, n0, M, N, ADD, TMA_STORE)
                store_tile(second, c_desc, c_ptr, add_ptr, m0, n0 + W, M, N, ADD, TMA_STORE)
                store_tile(third, c_desc, c_ptr, add_ptr, m0, n0 + 2 * W, M, N, ADD, TMA_STORE)
                store_tile(fourth, c_desc, c_ptr, add_ptr, m0, n0 + 3 * W, M, N, ADD, TMA_STORE)
            else:
                store_tile(left, c_desc, c_ptr, add_ptr, m0, n0, M, N, ADD, TMA_STORE)
                store_tile(right, c_desc, c_ptr, add_ptr, m0, n0 + BLOCK_N // 2, M, N, ADD, TMA_STORE)

    def tile_shape(M, N, sms, in_loop=False, hopper=True):
        """(BLOCK_M, BLOCK_N, warps, stages, programs per SM): the largest tile of which there is one for every SM.

        Chosen on an H200. With scales in the loop, small tiles, three programs to an SM: while one of them scales,
        the tensor cores work for another. Newer GPUs get small tiles, which fit into the shared memory of all of them.
        """
        if in_loop:
            return 64, 128, 4, 3, 3
        for shape in ((128, 256, 8, 3), (128, 128, 8, 4), (64, 128, 4, 4)) if hopper else ((64, 128, 4, 2),):
            if cdiv(M, shape[0]) * cdiv(N, shape[1]) >= sms:
                return *shape, 1
        return 64, 64, 4, 4 if hopper else 2, 1

    @functools.cache
    def sms_and_hopper(device):
        """(number of SMs, compute capability is 9.0); 4 and True for the interpreter."""
        if device.type != "cuda":
            return 4, True
        return torch.cuda.get_device_properties(device).multi_processor_count, \
            torch.cuda.get_device_capability(device) == (9, 0)

    def matmul_triton(a, b, out_dtype=torch.bfloat16, promote=False, add=None, out=None):
        """Quantized a (M, K), b (N, K) -> (M, N), as `matmul`.

        Raises ValueError for scales that are not as `kernel_can_scale` says, for operands of different K, and where K
        is not a multiple of 16: the tensor memory accelerator moves 16 bytes at least.
        """
        (M, K), N = a.data.shape, b.data.shape[0]
        if not kernel_can_scale(a, b):
            raise ValueError(f"FP8 GEMM of blocks {a.block} and {b.block}: scales along K have to change on both sides "
                             f"at once, every {KERNEL_WIDTHS}, else B has one scale; use matmul, which multiplies such "
                             f"blocks in BF16")
        if b.data.shape[1] != K:
            raise ValueError(f"FP8 GEMM of K = {K} and {b.data.shape[1]}: operands are (M, K) and (N, K)")
        if K % 16:
            raise ValueError(f"FP8 GEMM with K = {K}: the summed axis must be a multiple of 16; pad it with zeros")
        in_loop = a.block[1] != ALL
        sms, hopper = sms_and_hopper(a.data.device)
        BLOCK_M, BLOCK_N, warps, stages, programs = tile_shape(M, N, sms, in_loop, hopper)
        BLOCK_K = a.block[1] if in_loop else 128
        c = torch.empty(M, N, device=a.data.device, dtype=out_dtype) if out is None else out
        for name, tensor in (("add", add), ("out", out)):
            if tensor is not None and (tensor.shape != (M, N) or not tensor.is_contiguous()):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}: a contiguous ({M}, {N}) is needed")
        quarters = BLOCK_N == 256 and (c.element_size() > 2 or add is not None)
        tma_store = N * c.element_size() % 16 == 0
        # in the loop, the scales of one step along K lie side by side
        scales = [(s.float().t() if in_loop else s).contiguous() for s in (a.scale, b.scale)]
        _gemm_kernel[(min(sms * programs, cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N)),)](
            TensorDescriptor.from_tensor(a.data.contiguous(), [BLOCK_M, BLOCK_K]),
            TensorDescriptor.from_tensor(b.data.contiguous(), [BLOCK_N, BLOCK_K]),
            TensorDescriptor.from_tensor(c, [BLOCK_M, BLOCK_N // (4 if quarters else 2)]) if tma_store else None,
            c, add, *scales, M, N, K, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, PROGRAMS=sms * programs,
            IN_LOOP=in_loop, PROMOTE=PROMOTE_EVERY if promote else 0, A_PER_ROW=int(a.block[0] == 1),
            B_ROWS=max(b.block[0], 1), ADD=add is not None, TMA_STORE=tma_store, QUARTERS=quarters,
            FLATTEN=not promote and not in_loop, num_warps=warps, num_stages=stages)
        return c


# ---------------------------------------------------------------------------------------------------
# The linear layer

def quantize_for_both_sums(x, fmt, recipe):
    """X (T, C) -> Quantized X for the sum over C, and for the sum over T, wgrad, X^T. Under a scale per token that has
    to wait, for `transpose_for_wgrad` looks at the scales of X and dY together: then it is X again."""
    if recipe.act_block == (ALL, ALL):   # one scale serves along both axes
        return quantize_both(x, fmt, measured_scale(x, fmt, recipe.rule))
    q = quantize(x, fmt, recipe.act_block, recipe.rule)
    if recipe.act_block == (1, ALL):     # `transpose_for_wgrad` makes X^T of it when it is needed
        return q, q
    return q, quantize(x.t(), fmt, recipe.act_block, recipe.rule)   # along T from the unquantized X: rounded once


class FP8Linear(torch.autograd.Function):
    """Y = X W^T with all three products in FP8. Between forward and backward it keeps X in FP8 only. (For all recipes
    but `moss`, which has fused functions in model.py.)

    x (T, K) any float dtype; weight (N, K), the master weight, receives the gradient; w and w_t are
    `quantize_weight(weight)`, made once per optimizer step; recipe: microscale.RECIPES.
    """

    @staticmethod
    def forward(ctx, x, weight, w, w_t, recipe):
        x_q, saved = quantize_for_both_sums(x, E4M3, recipe)
        ctx.save_for_backward(saved.data, saved.scale)
        ctx.w_t, ctx.recipe, ctx.weight_dtype = w_t, recipe, weight.dtype
        return matmul(x_q, w, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        recipe, fmt = ctx.recipe, FORMATS[ctx.recipe.grad_format]
        x_kept = Quantized(*ctx.saved_tensors, recipe.act_block)
        dy_q, dy_kept = quantize_for_both_sums(dy, fmt, recipe)
        dy_t, x_t = transpose_for_wgrad(dy_q, x_kept) if recipe.act_block == (1, ALL) else (dy_kept, x_kept)
        dx = matmul(dy_q, ctx.w_t, dy.dtype, promote=True) if ctx.needs_input_grad[0] else None
        dw = matmul(dy_t, x_t, ctx.weight_dtype, promote=True) if ctx.needs_input_grad[1] else None
        return dx, dw, None, None, None


def transpose_for_wgrad(dy, x):
    """Quantized dY (T, N), X (T, K), a scale per token -> dY^T (N, T), X^T (K, T), one scale per tensor.

    dW[n, k] = sum_t s_dy[t] s_x[t] dY[t, n] X[t, k]: the scales of a token cannot leave a sum over tokens. Their
    product, taken relative to its largest, is multiplied into dY^T, exactly as long as the result is normal: only
    numbers of about 2^-14 of the largest possible, or less, lose bits. X^T is X transposed, unchanged.

    This reads and writes FP8 twice, 93 us for 16384 x 4096 together with the quantizer. Writing rows and columns from
    one reading of BF16 would need the largest scale before the first token is read; a kernel that reads a slab of
    tokens twice, the second time out of the L2 cache, took 99 us for it.
    """
    scale = dy.scale * x.scale                                    # (T, 1)
    common = scale.amax().clamp(min=MIN_SCALE).view(1, 1)
    dy_t = Quantized(transpose(dy.data, scale / common), common, (ALL, ALL))
    return dy_t, Quantized(transpose(x.data), torch.ones_like(common), (ALL, ALL))


def fp8_linear(x, weight, w, w_t, recipe):
    """x (..., K) -> (..., N), differentiable in x and weight. See FP8Linear."""
    y = FP8Linear.apply(x.reshape(-1, x.shape[-1]), weight, w, w_t, recipe)
    return y.view(*x.shape[:-1], weight.shape[0])


# ---------------------------------------------------------------------------------------------------
# What `python gemm_kernel.py` shows

VARIANTS = {  # name: (block of A, block of B, scale rule, promote)
    "epilogue only": ((1, ALL), (ALL, ALL), "up", False),
    "epilogue, promoted": ((1, ALL), (ALL, ALL), "up", True),
    "in loop, per 128": ((1, 128), (128, 128), "fp32", False),
    "in loop, per 32": ((1, 32), (1, 32), "floor", False),
}


def relative_error(y, exact):
    return ((y.double() - exact).norm() / exact.norm()).item()


def operands(M, N, K, variant, device, mean=0.0):
    """Random Quantized A (M, K) and B (N, K) for a variant."""
    block_a, block_b, rule, _ = VARIANTS[variant]
    return (quantize_reference(torch.randn(M, K, device=device) + mean, E4M3, block_a, rule),
            quantize_reference(torch.randn(N, K, device=device) + mean, E4M3, block_b, rule))


def error_of(variant, M, N, K, device, mean=0.0):
    """Of the FP32 output against float64, on the same FP8 operands. A strip of 512 rows shows it as well as all."""
    a, b = operands(min(M, 512), N, K, variant, device, mean)
    exact = a.dequantize().double() @ b.dequantize().double().t()
    multiply = matmul_triton if HAS_TRITON else lambda a, b, dtype, _: matmul_reference(a, b, dtype)
    return relative_error(multiply(a, b, torch.float32, VARIANTS[variant][3]), exact)


def errors_of_tensor_core(K, asides, mean=0.0):
    """Of tensor_core_sum against float64, on the same operands, set aside in each of these ways."""
    a, b = (uncast(q.data) for q in operands(64, 64, K, "epilogue only", "cpu", mean))
    exact = a.double() @ b.double().t()
    return [relative_error(tensor_core_sum(a, b, aside), exact) for aside in asides]


def show_errors_on_a_cpu():
    kernel = "the kernel in Triton's interpreter" if HAS_TRITON else "no Triton here: the PyTorch reference"
    print(f"Errors on a CPU ({kernel}), where sums are kept in FP32; times need a GPU of compute capability 9.0\n")
    for M, N, K in ((64, 96, 256), (100, 72, 2320)):
        for variant in VARIANTS:
            print(f"{f'{M} x {N} x {K}':>20}  {variant:20}{error_of(variant, M, N, K, 'cpu'):9.1e}")
    print("""
-> All variants compute the same product, of operands that were scaled in different ways.

Sums as tensor cores keep them, by a model of these (tensor_core_sum): error, and where all terms have one sign

   sum set aside        K = 2048            4096           16384""")
    asides = (None, 2048, 512)
    columns = [errors_of_tensor_core(K, asides, mean) for K in (2048, 4096, 16384) for mean in (0.0, 2.0)]
    for aside, errors in zip(asides, zip(*columns)):
        print(f"   {f'every {aside} of K' if aside else 'never':16}" + "".join(
            f"{cancelling:9.1e}{one_sign:7.1%}" for cancelling, one_sign in zip(errors[::2], errors[1::2])))
    print("\n-> `moss` sets the sums of dgrad and wgrad aside every 2048 of K, and those of fprop never.")


def layer_products(T=16384, d=4096, ffn=11008):
    """The twelve products of a 7B layer: [(name, M, N, K)]."""
    layers = {"qkv": (3 * d, d), "out": (d, d), "gate_up": (2 * ffn, d), "down": (d, ffn)}   # (N, K)
    return [(f"{layer} {pass_}", *shape) for layer, (N, K) in layers.items()
            for pass_, shape in (("fprop", (T, N, K)), ("dgrad", (T, K, N)), ("wgrad", (N, K, T)))]


def times(functions, rounds=3):
    """{name: function} -> {name: median ms}. A busy GPU slows down: every other round goes in the opposite order."""
    from triton.testing import do_bench
    ms = {name: [] for name in functions}
    for i in range(rounds):
        for name in list(functions)[::-1 if i % 2 else 1]:
            ms[name].append(do_bench(functions[name], warmup=60, rep=60, return_mode="median"))
    return {name: statistics.median(values) for name, values in ms.items()}


def time_product(M, N, K, variants, fast):
    """{name: median ms} of BF16, torch._scaled_mm and the variants, BF16 output, random data."""
    x, w = (torch.randn(n, K, device="cuda", dtype=torch.bfloat16) for n in (M, N))
    functions, one = {"BF16": lambda: x @ w.t()}, torch.ones((), device="cuda")
    a, b = operands(M, N, K, "epilogue only", "cuda")
    functions["_scaled_mm"] = lambda: torch._scaled_mm(a.data, b.data.t(), one, one, out_dtype=torch.bfloat16,
                                                       use_fast_accum=fast)
    for v in variants:
        functions[v] = lambda v=v, ab=operands(M, N, K, v, "cuda"): matmul_triton(*ab, torch.bfloat16, VARIANTS[v][3])
    if "in loop, per 32" in variants:   # what `mx` does here, the operands made ready in BF16
        functions["per 32, in BF16"] = lambda ab=operands(M, N, K, "in loop, per 32", "cuda"): (
            ab[0].dequantize(torch.bfloat16) @ ab[1].dequantize(torch.bfloat16).t())
    return times(functions)


def show_times():
    """The twelve products as a training step computes them, then the other variants on the four of fprop."""
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, Triton {triton.__version__}; BF16 output\n")
    print(f"{'':15}{'M x N x K':>22}  {'scales':20}{'error':>8}      ms  TFLOP/s  x BF16  x _scaled_mm")
    ratios = {}
    for name, M, N, K in layer_products():
        fprop = name.endswith("fprop")
        ours = "epilogue only" if fprop else "epilogue, promoted"
        ms = time_product(M, N, K, list(VARIANTS) if fprop else [ours], fast=fprop)
        for variant, t in ms.items():
            error = f"{error_of(variant, M, N, K, 'cuda'):8.1e}" if variant in VARIANTS else f"{'':8}"
            print(f"{name:15}{f'{M} x {N} x {K}':>22}  {variant:20}{error}{t:8.3f}{2e-9 * M * N * K / t:9.0f}"
                  f"{ms['BF16'] / t:8.2f}{ms['_scaled_mm'] / t:14.2f}")
            row = variant if variant in ("BF16", "_scaled_mm") else f"fprop, {variant}"
            row = "as trained" if variant == ours else row
            ratios.setdefault(row, []).append((ms["BF16"] / t, ms["_scaled_mm"] / t))
    print("\ngeometric means, of all twelve or of fprop: x BF16, x _scaled_mm (fast accumulation in fprop only)")
    for row, pairs in ratios.items():
        print(f"  {row:28}" + "".join(f"{statistics.geometric_mean(column):8.3f}" for column in zip(*pairs)))
    print("\nerror at K = 16384, and where all terms of a sum have one sign")
    for variant in list(VARIANTS)[:3]:
        errors = (error_of(variant, 512, 512, 16384, "cuda", mean) for mean in (0.0, 2.0))
        print(f"  {variant:28}" + "".join(f"{error:9.1e}" for error in errors))
    print("""
-> error: of the FP32 output against float64, on the same FP8 operands. With scales outside the sum the main loop is
   tensor-core work alone. Scales inside multiply every partial product of 32 or 128 by FP32 instructions, which take
   about as long as the 32 or 128 products themselves, and the tensor cores wait. Folding (microscale.py) takes no time
   here: what it does is done when the operand is quantized.""")


if __name__ == "__main__":
    torch.manual_seed(0)
    if torch.cuda.is_available() and has_fp8_tensor_cores("cuda"):
        show_times()
    else:
        show_errors_on_a_cpu()
