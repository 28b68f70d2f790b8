"""
The FP8 matrix product on Hopper, and the linear layer made of three of them.

    python gemm_kernel.py       # what a tensor core loses of a sum; on a GPU also error and time of products

Every product here is Y (M, N) = A (M, K) B (N, K)^T. A and B are FP8 numbers Q times scales, stored with K,
the summed axis, last and contiguous: Hopper's FP8 tensor cores read no other layout. If scales change every
32 or 128 of K, the partial sum over these must be multiplied by them before it is added to the sum.
Ordinary FP32 instructions do that, and the tensor cores wait for them. Other scales leave the sum:

    Y[m, n] = scale_a[m] scale_b sum_k Q_a[m, k] Q_b[n, k]

Then the main loop over K is work for the tensor cores alone. The scales are applied once, after the loop, in
the *epilogue* (MOSS, arXiv 2511.05811). microscale.py says why one scale per row is enough for `moss`.

A linear layer with K inputs and N outputs computes three products for T tokens. (Each is an A B^T, whose ^T
is the last of its line. W^T, dY^T and X^T are copies that are stored transposed.)

    fprop   Y  (T, N) = X   (T, K)  W  (N, K)^T       sums over the inputs K
    dgrad   dX (T, K) = dY  (T, N)  W^T(K, N)^T       sums over the outputs N
    wgrad   dW (N, K) = dY^T(N, T)  X^T(K, T)^T       sums over the tokens T
"""
import statistics
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fp8_formats import E4M3, E5M2, EXPONENT_OF_ZERO, FORMATS, floor_log2, pow2, uncast
from microscale import (ALL, HAS_TRITON, KERNEL_WIDTHS, MIN_SCALE, RECIPES, Quantized, block_amax, cdiv,
                        kernels_run_on, quantize, quantize_reference, transpose, transposed)

if HAS_TRITON:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor


# ---------------------------------------------------------------------------------------------------
# The product

def matmul_reference(a, b, out_dtype=torch.float32, add=None, dtype=torch.float32, groups=None, way="fprop"):
    """Multiply Quantized a (M, K), b (N, K) -> (M, N): dequantize both to `dtype`, multiply, add `add`."""
    a, b = a.dequantize(dtype), b.dequantize(dtype)
    product = grouped_reference(a, b, groups, way) if groups else a @ b.t()
    return (product if add is None else product + add.detach().float()).to(out_dtype)


@dataclass
class Groups:
    """Say which rows of a matrix belong to which of E groups (the experts of model.py). They are sorted by
    group, and a group begins at a multiple of 128: a tile of a product has one. Rows at the end have none."""
    first: torch.Tensor     # (E + 1,) int32: rows first[e] ... first[e + 1] - 1 are those of group e
    of_tile: torch.Tensor   # (rows / 128,) int32: the group of each 128 rows
    count = property(lambda self: len(self.first) - 1)   # E


def grouped_reference(a, b, groups, way):
    """Multiply each group of rows by a matrix of its own. Rows of no group give zeros.

        fprop   Y (R, N)    = X (R, K) W_e(N, K)^T       b: W (E N, K), the matrices one below the other
        dgrad   dX (R, K)   = dY (R, N) W_e^T(K, N)^T    b: W^T (K, E N), side by side
        wgrad   dW (E N, K) = dY^T(N, R) X^T(K, R)^T     each sum over the rows of one group
    """
    first = groups.first.tolist()
    rows = map(slice, first, first[1:])
    if way == "wgrad":
        return torch.cat([a[:, r] @ b[:, r].t() for r in rows])
    matrices = b.chunk(groups.count, dim=0 if way == "fprop" else 1)
    product = torch.cat([a[r] @ matrix.t() for r, matrix in zip(rows, matrices)])
    return F.pad(product, (0, 0, 0, len(a) - len(product)))


def matmul(a, b, out_dtype=torch.bfloat16, promote=False, add=None, out=None, groups=None, way="fprop"):
    """Multiply Quantized a (M, K), b (N, K) -> (M, N) in the fastest way this device has. It has no gradient.

    promote   move the upper 16 bits of the running sum out of the tensor core every 2048 of K (`promote`)
    add, out  (M, N): a residual to add, and where to write, in the dtype of `out`; add = out accumulates
    groups    multiply each group of rows by a matrix of its own, as `grouped_reference`; way: which product

    Without FP8 kernels this multiplies in FP32. With them, BF16 serves what the kernel cannot multiply, and
    blocks of 32, where the kernel is slower. BF16 is exact for powers of two (`mx`), else it rounds.
    """
    check_product(a, b, out_dtype, add, out, groups, way)
    tensor_cores = kernels_run_on(a.data.device)
    if tensor_cores and a.block[1] != 32 and kernel_can_multiply(a, b, groups, way):
        return matmul_triton(a, b, out_dtype, promote, add, out, groups, way)
    dtype = torch.bfloat16 if tensor_cores else torch.float32
    product = matmul_reference(a, b, out_dtype if out is None else out.dtype, add, dtype, groups, way)
    return product if out is None else out.copy_(product)


def kernel_can_multiply(a, b, groups=None, way="fprop"):
    """Tell if there are FP8 numbers, with scales that the kernel applies after its loop over K or in it."""
    fp8 = all(q.data.numel() and q.data.dtype in (E4M3.dtype, E5M2.dtype) and q.global_scale is None
              for q in (a, b))
    one = b.scale.numel() == groups.count if groups and way != "wgrad" else b.block == (ALL, ALL)
    after = a.block in ((1, ALL), (ALL, ALL)) and one   # a scale for each row of A, and one for each B
    inside = a.block[0] == 1 and b.block[0] != ALL and a.block[1] == b.block[1] in KERNEL_WIDTHS
    return fp8 and (after or inside and not groups)


def product_shape(a, b, groups, way):
    """Return M, N and K of a product, and K of b, which has to be the same."""
    (M, K), (N, K_b), E = a.data.shape, b.data.shape, groups.count if groups else 1
    return {"fprop": (M, N // E, K, K_b), "dgrad": (M, N, K, K_b // E), "wgrad": (M * E, N, K, K_b)}[way]


def check_product(a, b, out_dtype, add, out, groups, way):
    """Raise ValueError for shapes, dtypes and devices that no way takes: what runs on one runs on all."""
    M, N, K, K_b = product_shape(a, b, groups, way)
    rows, outputs = {"fprop": (M, len(b.data)), "dgrad": (M, b.data.shape[1]), "wgrad": (K, M)}[way]
    if groups and (rows != 128 * len(groups.of_tile) or outputs % (128 * groups.count)):
        raise ValueError(f"FP8 {way} of {rows} rows and {outputs} outputs in groups that have "
                         f"{128 * len(groups.of_tile)} rows: both must agree, outputs divide by 128")
    if K_b != K or K % 16:   # Hopper's tensor memory accelerator moves 16 bytes at least
        raise ValueError(f"FP8 product of K = {K} and {K_b}: both must be the same multiple of 16; pad them "
                         f"with zeros (K is the summed axis, in wgrad the tokens)")
    given = [tensor for tensor in (add, out) if tensor is not None]
    for tensor in given:
        if tensor.shape != (M, N) or not tensor.is_contiguous():
            raise ValueError(f"add or out has shape {tuple(tensor.shape)} and strides {tensor.stride()}: "
                             f"a contiguous ({M}, {N}) is needed")
    for dtype in (out_dtype, *(tensor.dtype for tensor in given)):
        if dtype not in (torch.bfloat16, torch.float32, torch.float16):
            raise ValueError(f"FP8 product in {dtype}: it sums in float32; use that, bfloat16 or float16")
    for tensor in (a.scale, b.data, b.scale, *given, *(vars(groups).values() if groups else ())):
        if tensor.device != a.data.device:
            raise ValueError(f"FP8 product on {a.data.device} and {tensor.device}: move them to one device")


# ---------------------------------------------------------------------------------------------------
# The linear layer

def fp8_linear(x, weight, w, w_t, recipe):
    """Return x W^T for x (..., K) -> (..., N), differentiable in x and weight. See FP8Linear."""
    if x.numel() == 0:   # without tokens there is nothing to quantize; gradients get the right shapes
        return F.linear(x, weight.to(x.dtype))
    y = FP8Linear.apply(x.reshape(-1, x.shape[-1]), weight, w, w_t, recipe)
    return y.view(*x.shape[:-1], weight.shape[0])


# Why promote dgrad and wgrad (move the sum out of the tensor core after every 2048 of K), and not fprop:
# A tensor core keeps about 14 bits of a running sum, and cuts off the rest. On an H200 that costs 0.3% of the
# result at K = 16384, where the terms of a sum cancel. Where all have one sign (operands of mean 2, deviation
# 1), every cut goes the same way, and 26% is lost. Promoted sums lose 0.085% and 2.8%.
#
# wgrad sums over all tokens (16,384), dgrad over up to 2 ffn outputs. Gradients of one sign, as from the mean
# of an input, would lose a part of themselves at every step, and nothing adapts to that. fprop sums over d or
# ffn inputs. Its error makes the model a slightly different function, the same at every step: weights adapt.
# Promoted, fprop takes 5% more time. Gradients at the same weights are then 6.3% off BF16's, not 13.6%,
# but the loss changes by less than 0.1%, and training at `1b` ended 0.09% lower: seeds differ by more.
class FP8Linear(torch.autograd.Function):
    """Compute Y = X W^T with all three products in FP8, and keep X for the backward pass in FP8 only.

    x (T, K) bfloat16, float16 or float32; weight (N, K), the master weight, receives the gradient; w and w_t
    are `quantize_weight(weight)`, made once per optimizer step. (`moss` has fused functions in model.py.)"""

    @staticmethod
    def forward(ctx, x, weight, w, w_t, recipe):
        x_q, x_t = quantize_for_both_sums(x, FORMATS[recipe.act_format], recipe)
        ctx.save_for_backward(x_t.data, x_t.scale, x_t.global_scale)
        ctx.w_t, ctx.recipe, ctx.weight_dtype = w_t, recipe, weight.dtype
        return matmul(x_q, w, x.dtype)   # not promoted: "Why promote" above

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        recipe, fmt, (data, scale, outer) = ctx.recipe, FORMATS[ctx.recipe.grad_format], ctx.saved_tensors
        x_t = Quantized(data, scale, recipe.act_block, outer)
        dy_q, dy_t = quantize_for_both_sums(dy, fmt, recipe)
        if recipe.act_block == (1, ALL):   # not transposed yet
            dy_t, x_t = transpose_for_wgrad(dy_t, x_t)
        dx = matmul(dy_q, ctx.w_t, dy.dtype, promote=True) if ctx.needs_input_grad[0] else None
        dw = matmul(dy_t, x_t, ctx.weight_dtype, promote=True) if ctx.needs_input_grad[1] else None
        return dx, dw, None, None, None


def quantize_for_both_sums(x, fmt, recipe):
    """Quantize x (T, C) for the product that sums over C, and x^T for wgrad, which sums over T. With a scale
    per token the second is x again: `transpose_for_wgrad` transposes it when it knows both scales."""
    options = fmt, recipe.act_block, recipe.rule, None, recipe.rounding
    q = quantize(x, *options)
    if recipe.act_block == (1, ALL):
        return q, q
    if recipe.act_block == (ALL, ALL):   # one scale serves along both axes
        return q, transposed(q)
    return q, quantize(x.t(), *options)   # of the unquantized x: rounded once


def wgrad_factor(dy, x, groups=None):
    """Split the scales of wgrad into a factor (T, 1) <= 1 of the rows of dY and one scale (1, 1) for all.

        dW[n, k] = sum_t scale_dy[t] scale_x[t] dY[t, n] X[t, k] = common sum_t factor[t] dY[t, n] X[t, k]

    Quantized dY (T, N), X (T, K) have a scale per token, else ValueError. Powers of two give powers of two.
    All groups share that scale. Rows that belong to none get the factor 0, whatever they hold."""
    if dy.block != (1, ALL) or x.block != (1, ALL) or dy.data.shape[0] != x.data.shape[0]:
        raise ValueError(f"wgrad of {len(dy.data)} tokens, blocks {dy.block}, and {len(x.data)}, {x.block}: "
                         f"pass dY and X of the same tokens, both quantized in blocks (1, ALL)")
    scale_dy, scale_x = (q.scale if q.global_scale is None else q.scale * q.global_scale for q in (dy, x))
    scale = scale_dy * scale_x                                    # (T, 1)
    if groups:
        row = torch.arange(len(scale), device=scale.device)[:, None]
        scale = torch.where(row < groups.first[-1], scale, 0)
    common = block_amax(scale, (ALL, ALL)).clamp(min=MIN_SCALE)   # (1, 1)
    return scale / common, common


def transpose_for_wgrad(dy, x, groups=None):
    """Transpose Quantized dY (T, N), X (T, K), a scale per token -> dY^T (N, T), X^T (K, T), one scale each.
    `wgrad_factor` is multiplied into dY^T. For powers of two this is exact while the result is normal: only
    numbers of about 2^-14 of the largest possible, or less, lose bits. X^T is X transposed, unchanged."""
    factor, common = wgrad_factor(dy, x, groups)
    dy_t = Quantized(transpose(dy.data, factor), common, (ALL, ALL))
    return dy_t, Quantized(transpose(x.data), torch.ones_like(common), (ALL, ALL))


# ---------------------------------------------------------------------------------------------------
# What a tensor core makes of a sum

def tensor_core_sum(a, b, promote_every=None):
    """Multiply Quantized a (M, K), b (N, K) in E4M3, summing as an H200's tensor cores do, bit for bit.

    32 products and the sum so far are aligned to the largest exponent e among them: that of a product is the
    sum of its factors' (of subnormals that of the smallest normal number, 2^-6). Of each, what lies below
    2^(e - 13) is cut off. The rest is added exactly, and its first 14 bits are the new sum.
    After `promote_every` of K the sum is added to one in FP32, and starts anew. (The kernel below leaves the
    sum's lower 16 bits where they are.)"""
    q_a, q_b = uncast(a.data), uncast(b.data)
    e_a, e_b = (floor_log2(q).clamp(min=E4M3.emin).masked_fill(q == 0, EXPONENT_OF_ZERO) for q in (q_a, q_b))
    total = acc = q_a.new_zeros(len(q_a), len(q_b))
    for k in range(0, q_a.shape[1], 32):
        terms = torch.cat((q_a[:, None, k:k + 32] * q_b[:, k:k + 32], acc[..., None]), dim=2)     # (M, N, 33)
        e = torch.cat((e_a[:, None, k:k + 32] + e_b[:, k:k + 32], floor_log2(acc)[..., None]), dim=2)
        unit = pow2((e.amax(dim=2, keepdim=True) - 13).clamp(min=-126))
        acc = ((terms / unit).trunc() * unit).sum(dim=2)
        acc = (acc.view(torch.int32) & -1024).view(torch.float32)                     # 13 of 23 fraction bits
        if promote_every and (k + 32) % promote_every == 0:
            total, acc = total + acc, torch.zeros_like(acc)
    return (total + acc) * a.scale * b.scale


# ---------------------------------------------------------------------------------------------------
# The kernel, which a GPU runs in place of `matmul_reference`

PROMOTE_EVERY = 16   # x 128 of K. The error that is left is half of that of rounding the output to BF16

if HAS_TRITON:
    @triton.jit
    def halves(x):
        """Split (M, N) into its left and right half. A thread holds columns n and n + N/2: nothing moves."""
        x = tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2))
        return tl.split(tl.permute(x, (0, 2, 1)))

    @triton.jit
    def low(pair):
        """Unpack column n of pair (M, N/2) int32: BF16 of n in the low 16 bits, of n + N/2 in the high."""
        return (pair << 16).to(tl.float32, bitcast=True)

    @triton.jit
    def promote(acc, pair):
        """Move the upper 16 bits of a sum, acc (M, N) float32, to `pair` (M, N/2) int32. The lower 16 stay in
        acc: nothing is lost, and the sum is small again. A second float32 accumulator of 128 x 256 would take
        the other half of all registers and leave none to work with. The upper half of a float32 is a BF16
        number, and two of them fit into a register."""
        left, right = halves(acc)
        left += low(pair)
        right += low(pair >> 16)
        pair = ((left.to(tl.int32, bitcast=True) >> 16) & 65535) | (right.to(tl.int32, bitcast=True) & -65536)
        rest = tl.join(left - low(pair), right - low(pair >> 16))                         # (M, N/2, 2)
        return tl.reshape(tl.permute(rest, (0, 2, 1)), acc.shape), pair

    @triton.jit
    def store_tile(tile, c_desc, c_ptr, add_ptr, m0, n0, M, N, ADDS: tl.constexpr):
        m = m0 + tl.arange(0, tile.shape[0])[:, None]
        n = n0 + tl.arange(0, tile.shape[1])[None, :]
        at, inside = m.to(tl.int64) * N + n, (m < M) & (n < N)
        if add_ptr is not None:
            tile += tl.load(add_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tile = tile.to(c_ptr.dtype.element_ty)
        if ADDS:
            c_desc.atomic_add([m0, n0], tile)
        elif c_desc is not None:
            c_desc.store([m0, n0], tile)
        else:
            tl.store(c_ptr + at, tile, mask=inside)

    @triton.jit
    def _gemm_kernel(a_desc, b_desc, c_desc, c_ptr, add_ptr, a_scale_ptr, b_scale_ptr, M, N, K,
                     first_ptr, of_tile_ptr, GROUPS: tl.constexpr, WAY: tl.constexpr,
                     BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                     PROGRAMS: tl.constexpr, IN_LOOP: tl.constexpr, PROMOTE: tl.constexpr,
                     A_PER_ROW: tl.constexpr, B_ROWS: tl.constexpr, PARTS: tl.constexpr, ADDS: tl.constexpr):
        """Compute C (M, N) = scale_a scale_b A (M, K) B (N, K)^T [+ add]. PROGRAMS programs share its tiles.

        IN_LOOP     scales (K/BLOCK_K, M) and (K/BLOCK_K, N/B_ROWS) multiply every partial product. Otherwise
                    they are applied once, at the end: scale_a (M) if A_PER_ROW else (1), scale_b (1).
        PROMOTE     0: the tensor core keeps the sum; p: the sum is promoted every p x BLOCK_K of K.
        PARTS       the tile leaves through shared memory in halves or quarters, which fit beside A and B.
        ADDS        the L2 cache adds the tile to C. Each number gets one addend: the order plays no part.
        GROUPS      > 0: so many groups of rows, as in `grouped_reference`; WAY is fprop, dgrad or wgrad.
        The tensor memory accelerator (TMA) loads A and B: past their edges zeros, which add nothing.
        """
        GROUP_M: tl.constexpr = 12  # walk tiles in columns of 12: the 132 SMs share 12 of A and 11 of B in L2
        # rows at the end have no group, and their outputs no meaning
        rows = tl.load(first_ptr + GROUPS) if GROUPS and WAY != "wgrad" else M
        tiles_m, tiles_n, k_tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
        FLATTEN: tl.constexpr = not PROMOTE and not IN_LOOP   # fetch the next tile while this one is written
        for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=FLATTEN):
            first_m = tile // (GROUP_M * tiles_n) * GROUP_M
            group_m = min(tiles_m - first_m, GROUP_M)
            m0 = (first_m + tile % (GROUP_M * tiles_n) % group_m) * BLOCK_M
            n0 = (tile % (GROUP_M * tiles_n) // group_m) * BLOCK_N
            m = m0 + tl.arange(0, BLOCK_M)
            n = n0 + tl.arange(0, BLOCK_N)
            a_row, b_row, a_col, b_col, group = m0, n0, 0, 0, 0   # where the operands of this tile begin
            if GROUPS and WAY == "wgrad":
                group = m0 // (M // GROUPS)
                a_row = m0 % (M // GROUPS)
                a_col = tl.load(first_ptr + group)
                b_col = a_col
                k_tiles = (tl.load(first_ptr + group + 1) - a_col) // BLOCK_K
            elif GROUPS:
                group = tl.load(of_tile_ptr + m0 // 128)
                if WAY == "fprop":
                    b_row += group * N
                else:
                    b_col = group * K

            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            pair = tl.zeros((BLOCK_M, BLOCK_N // 2), dtype=tl.int32)
            for k in range(k_tiles):
                a = a_desc.load([a_row, a_col + k * BLOCK_K])
                b = b_desc.load([b_row, b_col + k * BLOCK_K])
                if IN_LOOP:
                    a_scale = tl.load(a_scale_ptr + k * M + m, mask=m < M, other=0.0)[:, None]
                    b_scale_row = b_scale_ptr + k * tl.cdiv(N, B_ROWS)
                    if B_ROWS % BLOCK_N == 0:
                        a_scale *= tl.load(b_scale_row + n0 // B_ROWS)
                        acc += tl.dot(a, b.T) * a_scale
                    else:
                        acc += tl.dot(a, b.T) * (a_scale * tl.load(
                            b_scale_row + n // B_ROWS, mask=n < N, other=0.0))
                else:
                    acc = tl.dot(a, b.T, acc)
                    if PROMOTE and (k + 1) % PROMOTE == 0 and k + 1 < k_tiles:
                        acc, pair = promote(acc, pair)

            left, right = halves(acc)
            if PROMOTE:
                left += low(pair)
                right += low(pair >> 16)
            if not IN_LOOP:
                scale = tl.load(a_scale_ptr + m * A_PER_ROW, mask=m < M, other=0.0)
                scale *= tl.load(b_scale_ptr + (group if WAY != "wgrad" else 0))
                left *= scale[:, None]
                right *= scale[:, None]
            tiles = halves(left) + halves(right) if PARTS == 4 else (left, right)
            store_tile(tiles[0], c_desc, c_ptr, add_ptr, m0, n0, M, N, ADDS)
            for i in tl.static_range(1, PARTS):
                store_tile(tiles[i], c_desc, c_ptr, add_ptr, m0, n0 + i * (BLOCK_N // PARTS), M, N, ADDS)

    def tile_shape(M, N, sms, in_loop=False, hopper=True):
        """Return (BLOCK_M, BLOCK_N, warps, stages, programs per SM): the largest tile that occupies all SMs.
        Chosen on an H200. With scales in the loop: small tiles and three programs to an SM, so that tensor
        cores work for one while another scales. Newer GPUs: small tiles, which fit into any shared memory."""
        if in_loop:
            return 64, 128, 4, 3, 3
        for shape in ((128, 256, 8, 3), (128, 128, 8, 4), (64, 128, 4, 4)) if hopper else ((64, 128, 4, 2),):
            if cdiv(M, shape[0]) * cdiv(N, shape[1]) >= sms:
                return *shape, 1
        return 64, 64, 4, 4 if hopper else 2, 1

    @cache   # asking PyTorch takes the host longer than a launch
    def sms_and_hopper(device):
        """Return (number of SMs, whether it is a Hopper GPU); for the interpreter 4 and True."""
        if device.type != "cuda":
            return 4, True
        gpu = torch.cuda.get_device_properties(device)
        return gpu.multi_processor_count, (gpu.major, gpu.minor) == (9, 0)

    def matmul_triton(a, b, out_dtype=torch.bfloat16, promote=False, add=None, out=None, groups=None,
                      way="fprop"):
        """Multiply as `matmul`, which has checked that it can."""
        (M, N, K, _), in_loop = product_shape(a, b, groups, way), a.block[1] != ALL
        sms, hopper = sms_and_hopper(a.data.device)
        BLOCK_M, BLOCK_N, warps, stages, programs = tile_shape(M, N, sms, in_loop, hopper)
        BLOCK_K = a.block[1] if in_loop else 128
        c = torch.empty(M, N, device=a.data.device, dtype=out_dtype) if out is None else out
        parts = 4 if BLOCK_N == 256 and (c.element_size() > 2 or add is not None) else 2
        tma_store = N * c.element_size() % 16 == 0 and c.data_ptr() % 16 == 0   # or TMA cannot write C
        adds = tma_store and add is c and c.dtype == torch.float32 and not triton.knobs.runtime.interpret
        grouped = (groups.first, groups.of_tile, groups.count) if groups else (None, None, 0)
        scales = [(s.float().t() if in_loop else s.float()).contiguous() for s in (a.scale, b.scale)]
        _gemm_kernel[(min(sms * programs, cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N)),)](
            TensorDescriptor.from_tensor(a.data.contiguous(), [BLOCK_M, BLOCK_K]),
            TensorDescriptor.from_tensor(b.data.contiguous(), [BLOCK_N, BLOCK_K]),
            TensorDescriptor.from_tensor(c, [BLOCK_M, BLOCK_N // parts]) if tma_store else None,
            c, None if adds else add, *scales, M, N, K, *grouped, way, BLOCK_M, BLOCK_N, BLOCK_K,
            PROGRAMS=sms * programs, IN_LOOP=in_loop, PROMOTE=PROMOTE_EVERY if promote else 0,
            A_PER_ROW=int(a.block[0] == 1), B_ROWS=max(b.block[0], 1), PARTS=parts, ADDS=adds,
            num_warps=warps, num_stages=stages + adds)   # one more fits where TMA adds
        return c


# ---------------------------------------------------------------------------------------------------
# What `python gemm_kernel.py` shows

def operands(M, N, K, recipe, device, mean=0.0):
    """Return random Quantized A (M, K) and B (N, K) with the scales of a recipe; their deviation is 1."""
    recipe = RECIPES[recipe]
    return [quantize_reference(torch.randn(n, K, device=device) + mean, E4M3, block, recipe.rule)
            for n, block in ((M, recipe.act_block), (N, recipe.weight_block))]


def relative_error(y, exact):
    return ((y.double() - exact).norm() / exact.norm()).item()


def product_error(y, a, b, add=0.0):   # in float64
    return relative_error(y, a.dequantize().double() @ b.dequantize().double().t() + add)


def show_sums():
    """Print what a tensor core loses of sums of both signs, which cancel, and of one sign."""
    print("Error of a sum in a tensor core    terms of both signs       terms of one sign\n"
          "                        K = 2048    4096   16384    2048    4096   16384")
    pairs = [operands(64, 64, K, "moss", "cpu", mean) for mean in (0.0, 2.0) for K in (2048, 4096, 16384)]
    for how, every in (("never", None), ("every 2048", 2048), ("every 512", 512)):
        errors = [product_error(tensor_core_sum(a, b, every), a, b) for a, b in pairs]
        print(f"   promoted {how:12}", *(f"{error:7.2%}" for error in errors))
    print("-> A promoted sum loses the same at any length. Others lose more the longer they are.\n")


def measure(M, N, K, fprop):
    """Return {way to multiply: (median ms with BF16 output, error with FP32 output)}, of random data."""
    x, w = (torch.randn(n, K, device="cuda", dtype=torch.bfloat16) for n in (M, N))
    (a, b), one = operands(M, N, K, "moss", "cuda"), torch.ones((), device="cuda")
    ours = {"as trained": partial(matmul_triton, a, b, promote=not fprop)}
    if fprop:
        group, mx = (operands(M, N, K, recipe, "cuda") for recipe in ("group", "mx"))
        ours |= {"promoted": partial(matmul_triton, a, b, promote=True),
                 "in loop, per 128": partial(matmul_triton, *group),
                 "in loop, per 32": partial(matmul_triton, *mx),
                 "per 32, in BF16": partial(matmul, *mx)}   # as `mx` trains
    errors = {way: product_error(multiply(torch.float32), *multiply.args) for way, multiply in ours.items()}
    ways = {"BF16": lambda: x @ w.t(), "_scaled_mm": lambda: torch._scaled_mm(
        a.data, b.data.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=fprop), **ours}
    return {way: (ms, errors.get(way, float("nan"))) for way, ms in times(ways).items()}


def times(ways):
    """Return {way: median ms} of functions on the GPU."""
    ms = {way: [] for way in ways}
    for way in [*ways, *reversed(ways), *ways]:   # a busy GPU slows down
        ms[way].append(triton.testing.do_bench(ways[way], warmup=60, rep=60, return_mode="median"))
    return {way: statistics.median(ms[way]) for way in ways}


def show_products(T=16384, d=4096, ffn=11008):
    """Print the twelve products of a 7B layer as a training step computes them, and other ways for fprop."""
    print(torch.cuda.get_device_name(), f"PyTorch {torch.__version__}, Triton {triton.__version__}", sep=", ")
    print(f"{'':15}{'M x N x K':>22}  {'way':18}{'error':>8}      ms  TFLOP/s")
    ratios = {}
    for layer, N, K in (("qkv", 3 * d, d), ("out", d, d), ("gate_up", 2 * ffn, d), ("down", d, ffn)):
        for pass_, shape in (("fprop", (T, N, K)), ("dgrad", (T, K, N)), ("wgrad", (N, K, T))):
            measured = measure(*shape, fprop=pass_ == "fprop")
            for way, (ms, error) in measured.items():
                ratios.setdefault(way, []).append([measured[base][0] / ms for base in ("BF16", "_scaled_mm")])
                print(f"{layer:9}{pass_:6}{'{} x {} x {}'.format(*shape):>22}  {way:18}{error:8.1e}{ms:8.3f}"
                      f"{2e-9 * T * N * K / ms:9.0f}")
    print("geometric means: x BF16, x _scaled_mm (which accumulates fast in fprop only)")
    for way, pairs in ratios.items():
        means = (f"{statistics.geometric_mean(column):8.3f}" for column in zip(*pairs))
        print(f"  {way:18}", *means, f"  of {len(pairs)} products")
    print("-> Scaling in the loop takes FP32 instructions as long as multiplying takes the tensor cores.")


def grouped_ways(R, E, K, N):
    """Yield (product, {way: function}) for E equal groups of R random rows. Ours adds to an FP32 wgrad."""
    first = torch.arange(0, R + 1, R // E, device="cuda", dtype=torch.int32)
    groups = Groups(first, torch.arange(0, R, 128, device="cuda", dtype=torch.int32) // (R // E))
    x, dy, w = (torch.randn(n, C, device="cuda").bfloat16() for n, C in ((R, K), (R, N), (E * N, K)))
    x_q, dy_q = (quantize(z, E4M3, (1, ALL)) for z in (x, dy))
    w_q = quantize(w, E4M3, scale=torch.full((E, 1), 0.01, device="cuda"))
    dy_t, x_t = transpose_for_wgrad(dy_q, x_q, groups)
    w, w_fp8, dw = w.view(E, N, K), w_q.data.view(E, N, K), torch.zeros(E * N, K, device="cuda")
    for way, bf16, a, b, b_fp8, scales, out in (
            ("fprop", (x, w.mT), x_q, w_q, w_fp8.mT, (R, (E, N)), None),
            ("dgrad", (dy, w), dy_q, transposed(w_q), w_fp8.mT.contiguous().mT, (R, (E, K)), None),
            ("wgrad", (dy.t(), x), dy_t, x_t, x_t.data.t(), (E * N, E * K), dw)):
        ones = (torch.ones(shape, device="cuda") for shape in scales)
        fp8 = partial(torch._scaled_grouped_mm, a.data, b_fp8, *ones, first[1:], out_dtype=torch.bfloat16,
                      use_fast_accum=way == "fprop")
        ours = partial(matmul, a, b, promote=way != "fprop", add=out, out=out, groups=groups, way=way)
        yield way, {"BF16": partial(F.grouped_mm, *bf16, offs=first[1:]), "torch FP8": fp8, "ours": ours}


def show_grouped():
    """Print the speed of the products of experts, at five sizes."""
    print("\nProducts of experts, TFLOP/s\n    rows experts    K    N  product     BF16  torch FP8     ours")
    ratios = []
    for R, E, K, N in ((131072, 64, 2048, 2048), (131072, 64, 1024, 2048), (524288, 64, 2048, 2048),
                       (32768, 8, 7168, 4096), (32768, 8, 2048, 7168)):
        for product, ways in grouped_ways(R, E, K, N):
            bf16, fp8, ours = (2e-9 * R * K * N / ms for ms in times(ways).values())
            ratios.append((ours / bf16, ours / fp8))
            print(f"{R:8}{E:8}{K:5}{N:5}  {product:7}{bf16:9.0f}{fp8:11.0f}{ours:9.0f}")
    print("ours: x BF16, x torch FP8:", *(f"{statistics.geometric_mean(r):.3f}" for r in zip(*ratios)))


if __name__ == "__main__":
    torch.manual_seed(0)
    show_sums()
    if torch.cuda.is_available() and kernels_run_on("cuda"):
        show_products()
        show_grouped()
