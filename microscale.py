"""
Scales: how a tensor becomes FP8. Four main recipes, MOSS's two levels, and why a scale per token is enough.

    $ python microscale.py    # what each recipe keeps of a tensor; on a GPU also the time of each kernel

A quantizer stores X (R, C) as FP8 numbers Q (R, C) and a few scales, X ~ Q * scale. A row is a token, and C
is the axis that a matrix product will sum over. The recipes differ in how many values share a scale:

    recipe   activations X, gradients dY    weights                       stands for
    moss     a power of two per token       FP32 per tensor, predicted    MOSS (arXiv 2511.05811)
    tensor   FP32 per tensor                FP32 per tensor               Transformer Engine, torchao
    group    FP32 per 1 x 128               FP32 per 128 x 128            COAT, DeepSeek-V3
    mx       E8M0 per 1 x 32                E8M0 per 1 x 32               OCP Microscaling v1.0

Words that all files use:

    amax         max|x| over the values that share a scale
    E8M0         a byte that holds a power of two
    saturate     become the largest number of the format (448 in E4M3), as all values beyond it do
    subnormal    smaller than the smallest normal number (2^-6 in E4M3), and stored with fewer bits
    fold         multiply scales, relative to the largest of them, into the FP8 numbers: one is left. Two
                 folds occur here: of the blocks of a row (`fold`), and of the tokens (in wgrad)
    fprop, dgrad, wgrad    the products of a linear layer: Y = X W^T, dX = dY W, dW = dY^T X
    SQNR         signal-to-quantization-noise ratio, 10 log10(sum x^2 / sum error^2) dB; 6 dB are one bit

So `--fp8 moss` gives each token the smallest power of two under which its row fits, and rounds once. The
paper has blocks X_i of 32 neighbors along C, with scales ss_i, and a scale s of the whole tensor
(`quantize_two_level`):

    s_i = max|X_i| / 448    s = max_i s_i  (FP32)    ss_i = 2^ceil(log2(s_i / s))  (E8M0)
    Q_i = E4M3(X_i / (s ss_i))                       X_i ~ Q_i s ss_i

Two observations reduce these two levels to one power of two per token:

  - A tensor core, the part of a GPU that multiplies small matrices, sums Q_a Q_b along C at full speed only
    if no scale changes along C. So the ss_i of a row would have to be folded, which rounds again what becomes
    subnormal, at some 2^-14 of the row's maximum. `moss` has the row's scale from the start.
  - Any s will do: the ss_i make up for it. With s = 1 the noise changes by less than a dB, no pass over the
    tensor finds a maximum, no state is carried on, and a token's numbers do not depend on other tokens.
"""
import math
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch.nn import functional as F

from fp8_formats import E4M3, E5M2, FORMATS, INT8, cast, floor_log2, format_of, pow2, round_to_format, uncast

try:
    import triton
    import triton.language as tl
    HAS_TRITON = True
except ImportError:  # macOS, Windows: all but the kernels still runs, in plain PyTorch
    HAS_TRITON = False

ALL = -1               # a block that spans the whole axis
MIN_SCALE = 2.0**-126  # smallest normal FP32: the scale of a block of zeros, so that 0 / scale = 0
RULES = ("fp32", "floor", "up")   # by which a block gets its scale
HELD_AS = {fmt: fmt.dtype or E4M3.dtype for fmt in FORMATS.values()} | {INT8: torch.int8}   # in Quantized


# ---------------------------------------------------------------------------------------------------
# A quantized tensor, and which scale its blocks get

@dataclass
class Quantized:
    """Hold X (R, C) as FP8 `data` and scales: X[r, c] ~ data[r, c] scale[r // br, c // bc] global_scale.
    Formats of fewer bits are FP8 data as well: all numbers of E3M2, E2M3 and E2M1 are numbers of E4M3.

    `block` is (br, bc), ALL the whole axis; a last block may be smaller. `scale` has a number for each block,
    float32, or float8_e8m0fnu (one byte) for powers of two of small blocks. `global_scale`, one float32, is
    the paper's first level. ValueError for other shapes. No gradient passes."""
    data: torch.Tensor
    scale: torch.Tensor
    block: tuple
    global_scale: torch.Tensor = None

    def __post_init__(self):
        shape, outer = self.data.shape, self.global_scale
        expected = scale_shape(shape, self.block) if len(shape) == 2 else "of a matrix"
        if self.scale.shape != expected or outer is not None and outer.numel() != 1:
            raise ValueError(f"data {tuple(shape)} in blocks {self.block} need scales {expected}, and one "
                             f"global scale or none: got {[*self.scale.shape]} and {outer}")
        self.scale = self.scale.detach() if self.scale.requires_grad else self.scale

    @torch.no_grad()
    def dequantize(self, dtype=torch.float32):
        """Return X (R, C) in `dtype`, rounded once. Exact in bfloat16 where all scales are powers of two."""
        scale = expand_blocks(self.scale.float(), self.data.shape, self.block)
        if dtype == torch.bfloat16 and self.scale.dtype == torch.float8_e8m0fnu and self.global_scale is None:
            return uncast(self.data, dtype) * scale.to(dtype)
        x = uncast(self.data) * scale
        return (x if self.global_scale is None else x * self.global_scale).to(dtype)


def cdiv(a, b):   # a / b rounded up; Triton's own takes the host microseconds at every launch
    return -(-a // b)


def scale_shape(shape, block):
    """Return the shape of the scales of data of `shape` (R, C): one for each block."""
    (R, C), (br, bc) = shape, block
    return 1 if br == ALL else cdiv(R, br), 1 if bc == ALL else cdiv(C, bc)


def expand_blocks(scale, shape, block):
    """Repeat the scales of blocks until they broadcast against data of `shape` (R, C)."""
    for axis in (0, 1):
        if scale.shape[axis] > 1 and block[axis] != 1:
            scale = scale.repeat_interleave(block[axis], axis).narrow(axis, 0, shape[axis])
    return scale


def block_amax(x, block):
    """Return max|x| of every block of x (R, C), float32; 0 if x is empty. NaN and Inf stay in their block."""
    if x.numel() == 0:
        return x.new_zeros(scale_shape(x.shape, block), dtype=torch.float32)
    if block == (ALL, ALL):   # by one reading: x.abs() would write a copy
        return torch.linalg.vector_norm(x, float("inf")).float().view(1, 1)
    br, bc = (n if b == ALL else b for b, n in zip(block, x.shape))
    x = F.pad(x.abs().float(), (0, -x.shape[1] % bc, 0, -x.shape[0] % br))
    return x.view(x.shape[0] // br, br, x.shape[1] // bc, bc).amax(dim=(1, 3))


def check_name(what, name, known):
    if name not in known:
        raise ValueError(f"{what} {name!r} is unknown: choose one of {', '.join(known)}")


@torch.no_grad()
def scale_from_amax(amax, fmt, rule):
    """Return the float32 scale of blocks with this max|x|; NaN for a block that holds Inf or NaN.

        "fp32"    amax / fmt.max                        the block's maximum becomes fmt.max
        "floor"   2^(floor(log2 amax) - fmt.emax)       OCP MX v1.0: the top of a binade saturates
        "up"      2^ceil(log2(amax / fmt.max))          MOSS: nothing saturates
    """
    check_name("scale rule", rule, RULES)
    amax = amax.clamp(min=fmt.max * MIN_SCALE)
    # divided by a tensor: by a Python number, CUDA multiplies with the rounded reciprocal
    scale = amax / amax.new_full((), fmt.max) if rule == "fp32" else pow2(floor_log2(amax) - fmt.emax)
    if rule == "up":   # with k = floor(log2 amax) - emax: amax <= max * 2^k, or else 2^(k+1) is needed
        scale = torch.where(amax > fmt.max * scale, 2 * scale, scale)
    return torch.where(amax.isfinite(), scale, float("nan"))


def quantize_reference(x, fmt=E4M3, block=(1, 32), rule="up", scale=None, rounding="nearest_even"):
    """Quantize x (R, C), any float dtype. (`quantize` does the same by a kernel, if one can.) The scales
    follow `rule`, unless `scale` holds them, one per block. x is multiplied by 1 / scale, rounded: on a GPU,
    dividing every value takes longer than loading it."""
    if rule == "two-level" and scale is None:
        return quantize_two_level(x, fmt)
    e8m0 = scale is None and stores_e8m0(block, rule)
    scale = scale_from_amax(block_amax(x, block), fmt, rule) if scale is None else scale
    data = to_grid(x.float() * expand_blocks(1 / scale, x.shape, block), fmt, rounding)
    return Quantized(data, scale.to(torch.float8_e8m0fnu) if e8m0 else scale, block)


def to_grid(x, fmt, rounding="nearest_even"):
    """Round float32 x to the numbers of `fmt`, held as in Quantized."""
    if fmt.dtype and rounding == "nearest_even":
        return cast(x, fmt)
    x = round_to_format(x, fmt, rounding)
    return (x / fmt.min_subnormal if fmt is INT8 else x).to(HELD_AS[fmt])


def stores_e8m0(block, rule):
    """Return whether a scale is one byte: powers of two are, unless there is only one per row or tensor."""
    return rule != "fp32" and block[1] != ALL


# ---------------------------------------------------------------------------------------------------
# The recipes. The two levels of the paper, and the fold that takes the second one out of the matrix product

@dataclass(frozen=True)
class Recipe:
    """How the linear layers of a model quantize."""
    name: str
    act_block: tuple          # block of activations and gradients, (rows, along the summed axis)
    weight_block: tuple
    rule: str                 # of activations and gradients, and of weights with weight_scale "block"
    weight_scale: str         # "block": measured at each quantization | "current", "predicted": autoscale.py
    grad_format: str = "e4m3"
    act_format: str = "e4m3"
    weight_format: str = "e4m3"
    rounding: str = "nearest_even"   # or "half_away"; or "stochastic", and a run that resumes draws others

    def __post_init__(self):
        for name in (self.act_format, self.weight_format, self.grad_format):
            check_name("format", name, FORMATS)
        check_name("rounding", self.rounding, ("nearest_even", "half_away", "stochastic"))
        check_name("rule", self.rule, (*RULES, "two-level"))
        check_name("weight_scale", self.weight_scale, ("block", "current", "predicted"))
        even = self.rounding == "nearest_even"
        fp8 = FORMATS[self.act_format].dtype and FORMATS[self.grad_format].dtype
        this = (f"recipe {self.name!r}: rounding {self.rounding}, {self.act_format}, {self.grad_format} in "
                f"{self.act_block}, weights {self.weight_format} in {self.weight_block}, {self.weight_scale}")
        if not (fp8 and even) and (self.act_block[0] != 1 or self.act_block[1] == ALL):
            raise ValueError(f"{this}: what is not FP8, or not rounded to even, needs (1, n)")
        if self.rule == "two-level" and not (self.act_block == (1, 32) and even):
            raise ValueError(f"{this}: two levels have blocks (1, 32), and are rounded to even")
        one = self.weight_block == (ALL, ALL) and self.weight_format == "e4m3" and even
        if self.weight_scale != "block" and not one:
            raise ValueError(f"{this}: any weight_scale but 'block' needs e4m3, (ALL, ALL), rounded to even")

    # under two levels a weight has the FP32 scale alone
    weight_rule = property(lambda self: "fp32" if self.rule == "two-level" else self.rule)

    def __str__(self):
        return self.name


# name, block of X and dY, block of W, rule of their scales, how W is scaled
RECIPES = {
    "none": None,
    "tensor": Recipe("tensor", (ALL, ALL), (ALL, ALL), "fp32", "current", grad_format="e5m2"),
    "group": Recipe("group", (1, 128), (128, 128), "fp32", "block"),
    "mx": Recipe("mx", (1, 32), (1, 32), "floor", "block"),
    "moss": Recipe("moss", (1, ALL), (ALL, ALL), "up", "predicted"),
    # as in the papers, to compare numerics
    "moss-exact": Recipe("moss-exact", (1, 32), (ALL, ALL), "two-level", "predicted"),
    "mx-up": Recipe("mx-up", (1, 32), (1, 32), "up", "block"),
    **{name: Recipe(name, (1, 32), (1, 32), "floor", "block", act, act, weight) for name, act, weight in (
        ("mxfp6", "e3m2", "e3m2"), ("mxfp4", "e3m2", "e2m1"), ("mxint8", "int8", "int8"))},
}


def quantize_two_level(x, fmt=E4M3, global_scale=None):
    """Quantize x (R, C) with E8M0 scales ss (R, ceil(C / 32)) under an FP32 global scale s: max_i s_i, or a
    given number or tensor () or (1, 1). Any positive one will do, while FP32 can hold max|x| / s."""
    s = scale_from_amax(block_amax(x, (ALL, ALL)), fmt, "fp32") if global_scale is None else global_scale
    s = torch.as_tensor(s, dtype=torch.float32, device=x.device).detach()
    x = x.float() / s
    if global_scale is None:  # if s was rounded down, a number exceeds 448 by a hair, and would make ss = 2
        x = x.clamp(-fmt.max, fmt.max)
    return replace(quantize(x, fmt, (1, 32), "up"), global_scale=s)


def fold(q):
    """Fold two-level q into a scale per row, s times its largest ss. Exact where the number stays normal."""
    ss = q.scale.float()
    row = block_amax(ss, (1, ALL)).clamp(min=MIN_SCALE)                            # (R, 1)
    data = to_grid(uncast(q.data) * expand_blocks(ss / row, q.data.shape, q.block), format_of(q.data))
    return Quantized(data, row if q.global_scale is None else row * q.global_scale, (1, ALL))


@torch.no_grad()
def fold_loss(x, fmt=E4M3):
    """Return what folding costs on x (R, C): the share of values that it changes, and of energy."""
    unfolded, folded = (quantize(x, fmt, block, "up").dequantize() for block in ((1, 32), (1, ALL)))
    change = folded - unfolded   # unfolded: two-level with s = 1
    energy = change.square().sum() / x.float().square().sum().clamp(min=1e-38)
    return (change != 0).float().mean().nan_to_num(), energy   # nan_to_num: of an empty x 0


def saturated_share(x, q, fmt):
    """Return the share of the values of x (R, C) beyond the largest number that their block of q can hold."""
    largest = to_grid(torch.full_like(q.data, fmt.max, dtype=torch.float32), fmt)
    limit = replace(q, data=largest).dequantize()
    return (x.abs().float() > limit * (1 + 2**-20)).float().mean().nan_to_num()   # the scale is rounded


def transpose(q, row_factor=None):
    """Transpose FP8 data (R, C) -> (C, R), times `row_factor` (R, 1), powers of two <= 1: the scaling-aware
    transpose (FP8-Flow-MoE, arXiv 2511.02302). The scale of a row cannot leave a sum over rows, so all rows
    are brought to one scale. That is exact while the result is normal, else it is rounded."""
    expect("q", q, (None, None), "rows of FP8 numbers", (E4M3.dtype, E5M2.dtype))
    expect("row_factor", row_factor, (len(q), 1), "one for each row")
    if kernels_take(q):
        return transpose_triton(q, row_factor)
    if row_factor is not None:
        q = cast(uncast(q) * row_factor, format_of(q))
    return q.t().contiguous()


def quantize_weight(weight, recipe, scale=None):
    """Quantize W (N outputs, K inputs): W for fprop, which sums over K, and W^T (K, N) for dgrad, over N. One
    scale per tensor or per square block serves both. Blocks of 1 x 32 lie along the sum: `mx` rounds W twice.
    Recipes that measure no blocks may get a `scale` (1, 1), or (E, 1) of E experts one below the other."""
    if scale is not None and recipe.weight_scale == "block":
        raise ValueError(f"recipe {recipe} measures a scale for every block of a weight: give none")
    options = FORMATS[recipe.weight_format], recipe.weight_block, recipe.weight_rule, scale, recipe.rounding
    w = quantize(weight, *options)
    if recipe.weight_block[0] != recipe.weight_block[1]:
        return w, quantize(weight.t(), *options)
    return w, transposed(w)


def transposed(w):
    """Return Quantized W^T (K, N) of Quantized W (N, K): the same FP8 numbers, where blocks fit both ways."""
    return Quantized(transpose(w.data), w.scale.t().contiguous(), w.block[::-1])


@torch.no_grad()
def diffuse(weight, x, x_q, recipe):
    """Quantize W (N, K) by error diffusion (GPFQ, arXiv 2010.15979): input after input, each weight makes up
    for what those before it have lost, on calibration inputs X (T, K), which the layer sees as X_q.

        u += x_k w_k^T     q_k = round(x_q,k u / |x_q,k|^2)     u -= x_q,k q_k^T       u (T, N); x_k: column k
    """
    q, fmt = quantize_weight(weight, recipe)[0], FORMATS[recipe.weight_format]
    scale = expand_blocks(q.scale.float(), weight.shape, q.block).expand_as(weight)
    u = x.new_zeros(len(x), len(weight))
    for k in range(weight.shape[1]):
        u.addr_(x[:, k], weight[:, k])
        size = x_q[:, k].square().sum()
        best = torch.where(size > 0, x_q[:, k] @ u / size, weight[:, k])      # (N,)
        q.data[:, k] = to_grid(best / scale[:, k], fmt, recipe.rounding)
        u.addr_(x_q[:, k], uncast(q.data[:, k]) * scale[:, k], alpha=-1)
    return q


# ---------------------------------------------------------------------------------------------------
# The operations around a linear layer. On a GPU, the kernels of the quantizers compute them, too.

NORM_EPS = 1e-5
NORMS = {  # kind: (x (R, C), weight (C) or None, eps) -> the rows that a linear layer reads
    "none": lambda x, weight, eps=NORM_EPS: x,
    "rms": lambda x, weight, eps=NORM_EPS: F.rms_norm(x, x.shape[-1:], weight, eps),
    "layer": lambda x, weight, eps=NORM_EPS: F.layer_norm(x, x.shape[-1:], eps=eps),
}


def swiglu(h):
    """Return a = silu(gate) up (..., ffn) of h = [gate, up] (..., 2 ffn)."""
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_gradient(h, da):
    """Return the gradient of h = [gate, up] (R, 2 ffn), float32, from da (R, ffn), that of a = silu(gate) up:
    d gate = da up (sigma + gate sigma (1 - sigma)),  d up = da gate sigma,  where sigma = sigmoid(gate)."""
    (gate, up), da = h.float().chunk(2, dim=1), da.float()
    sigma = gate.sigmoid()
    silu = gate * sigma
    return torch.cat((da * up * (sigma + silu * (1 - sigma)), da * silu), dim=1)


def rope(x, cos, sin):
    """Turn the pairs (x_i, x_{i + head_dim/2}) of x (B, T, heads, head_dim) by angles with these cos, sin
    (T, head_dim / 2), one for each position and pair. Computed in float32, whatever x is."""
    cos, sin = cos[:, None], sin[:, None]                                          # (T, 1, head_dim / 2)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


# ---------------------------------------------------------------------------------------------------
# The same, as a kernel where the GPU has FP8 tensor cores, or in PyTorch. Other shapes are a ValueError.

KERNEL_WIDTHS = (32, 64, 128)   # of blocks along the summed axis; tensor cores multiply FP8 32 at a time
MAX_COLUMNS = 65536   # a row has to fit into the registers of one program
MAX_ELEMENTS = 2**31  # from here on a column times its stride may exceed the 32 bits that kernels give it
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
capability = cache(torch.cuda.get_device_capability)   # it is asked for before every launch


@torch.compiler.assume_constant_result
def kernels_run_on(device):
    """Return whether our kernels run there: NVIDIA, compute capability 9.0 (Hopper) or newer, with Triton.
    ValueError for such a GPU that is not the current one, where Triton would start the kernel."""
    device = torch.device(device)
    if device.type != "cuda" or not HAS_TRITON or torch.version.hip or capability(device) < (9, 0):
        return False
    if device.index not in (None, torch.cuda.current_device()):
        raise ValueError(f"a tensor on {device}, while kernels start on the current GPU, cuda:"
                         f"{torch.cuda.current_device()}: call torch.cuda.set_device({device.index}) first")
    return True


def kernels_take(x, fmt=E4M3):
    return fmt.dtype is not None and 0 < x.numel() < MAX_ELEMENTS and kernels_run_on(x.device)


def expect(name, x, shape, meaning, dtypes=FLOATS):
    """Raise ValueError unless x, if given, has this shape (None: any size) and one of these dtypes."""
    if x is not None and (x.dtype not in dtypes or x.dim() != len(shape) or any(
            size not in (None, n) for size, n in zip(shape, x.shape))):
        sizes = str(tuple(shape)).replace("None", "any")
        raise ValueError(f"{name} has shape {tuple(x.shape)} and dtype {x.dtype}: expected {sizes}, {meaning}"
                         f", and dtype {' or '.join(map(str, dtypes))}")


def quantize(x, fmt=E4M3, block=(1, 32), rule="up", scale=None, rounding="nearest_even"):
    """Quantize x (R, C) as `quantize_reference` does, by a kernel if there is one for it. A given `scale`
    (1, 1) is that of the whole tensor, (E, 1) those of E groups of R / E rows."""
    expect("x", x, (None, None), "rows that products sum along")
    groups = 1 if scale is None else math.gcd(len(x), len(scale))   # len(scale) if that divides the rows
    expect("scale", scale, (groups, 1), "that of the tensor, or of equal groups of rows", (torch.float32,))
    check_name("scale rule", rule, (*RULES, "two-level"))
    if scale is not None:
        block = (ALL if groups == 1 else len(x) // groups, ALL)
    elif block == (ALL, ALL):
        scale = scale_from_amax(block_amax(x, block), fmt, rule)
    elif block == (1, ALL) and fmt.dtype and rounding == "nearest_even":
        return quantize_rows(x, fmt, rule)
    takes = scale is not None or rule in RULES and block[0] == 1 and block[1] in KERNEL_WIDTHS
    if takes and kernels_take(x) and rounding == "nearest_even":
        return quantize_triton(x, fmt, block, rule, scale)
    return quantize_reference(x, fmt, block, rule, scale, rounding)


def quantize_norm(x, kind, weight=None, fmt=E4M3, rule="up", eps=NORM_EPS):
    """Quantize norm(x) (R, C) under a scale per row, by `rule`. kind is of NORMS; "rms" has a weight (C)."""
    check_name("norm", kind, NORMS)
    expect("x", x, (None, None), "rows that products sum along")
    expect("weight", weight, x.shape[1:], "one for each column")
    if kernels_take(x, fmt) and x.shape[1] <= MAX_COLUMNS:
        return quantize_norm_triton(x, kind, weight, fmt, rule, eps)
    rows = NORMS[kind](x.float(), None if weight is None else weight.float(), eps)
    return quantize_reference(rows, fmt, (1, ALL), rule)


def quantize_rows(x, fmt=E4M3, rule="up"):
    """Quantize x (R, C) under a scale per row, by `rule`."""
    return quantize_norm(x, "none", None, fmt, rule)


def quantize_swiglu(h, p=None):
    """Quantize a = swiglu(h) (R, ffn), which the next layer reads, and h (R, 2 ffn) for the backward pass.
    With p (R,) float32, the probability of a row's expert, a = p swiglu(h)."""
    expect("h", h, (None, h.shape[-1] // 2 * 2), "rows [gate, up]")
    expect("p", p, h.shape[:1], "one for each row of h", (torch.float32,))
    if kernels_take(h):
        return quantize_swiglu_triton(h, p)
    a = swiglu(h.float()) * (1 if p is None else p[:, None])
    return tuple(quantize_reference(x, E4M3, (1, ALL), "up") for x in (a, h))


def quantize_swiglu_gradient(h, da, p=None):
    """Quantize `swiglu_gradient` of Quantized h (R, 2 ffn) and da (R, ffn). With p (R,), that of p swiglu(h);
    and return the gradient of p as well, the sum of da swiglu(h) (R,) float32.

    The scale is that of a bound, known before any sigmoid is taken: |d gate| <= 1.1 |da up|, for no slope of
    silu is steeper, and |d up| <= |da gate|. Mostly it is 1, 2 or 4 times that of the maximum, which costs no
    precision. (Where all gates of a row are far below zero, gradients are next to nothing, and become 0.)"""
    expect("da", da, (len(h.data), None), "a gradient for each row of h")
    expect("h", h.data, (None, 2 * da.shape[1]), "[gate, up], twice as wide as da", (E4M3.dtype, E5M2.dtype))
    expect("p", p, h.data.shape[:1], "one for each row of h", (torch.float32,))
    if kernels_take(h.data) and h.block == (1, ALL) and h.global_scale is None:
        return quantize_swiglu_gradient_triton(h, da, p)
    h, da = h.dequantize(), da.float()
    dp = None if p is None else (da * swiglu(h)).sum(1)
    da = da if p is None else da * p[:, None]
    gate, up = h.chunk(2, dim=1)
    bound = block_amax(da.abs() * torch.maximum(gate.abs(), 1.1 * up.abs()), (1, ALL))
    scale = scale_from_amax(bound, E4M3, "up")
    dh = quantize_reference(swiglu_gradient(h, da), E4M3, (1, ALL), "up", scale)
    return dh if p is None else (dh, dp)


def rope_into(out, x, cos, sin):
    """Write `rope(x, cos, sin)` to out, both (B, T, heads, head_dim); out may be x. It has no gradient."""
    expect("x", x, (None, None, None, x.shape[-1] // 2 * 2), "(B, T, heads, head_dim)")
    expect("out", out, x.shape, "as x")
    for name, angles in (("cos", cos), ("sin", sin)):
        expect(name, angles, (x.shape[1], x.shape[3] // 2), "one for each position and pair")
    if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        raise ValueError("x or out requires a gradient, which rope_into does not have: use rope")
    if kernels_take(x) and x.stride(3) == out.stride(3) == 1:
        rope_triton(out, x, cos, sin)
    else:
        out.copy_(rope(x, cos, sin))


def combine(x, rows, add=None):
    """Return x[rows[t, 0]] + x[rows[t, 1]] + ... (T, C) of x (R, C), for rows (T, k) int64, plus add (T, C).
    They are added in float32 and in this order, so that equal runs give equal bits."""
    expect("x", x, (None, None), "rows to add up")
    expect("add", add, (len(rows), x.shape[1]), "one row for each sum")
    if kernels_take(x) and x.shape[1] <= MAX_COLUMNS:
        return combine_triton(x, rows, add)
    total = x[rows].float().sum(1)
    return (total if add is None else total + add).to(x.dtype)


# ---------------------------------------------------------------------------------------------------
# The kernels. kernel[grid](...) starts a grid of *programs*, told apart by tl.program_id. Each works on a
# tile in the registers of its threads, 32 num_warps of them. tl.load and tl.store reach memory where
# `mask` is true. tl.constexpr is known when the kernel is compiled. An SM is one of the GPU's processors (an
# H200 has 132) and runs a few programs at a time. With TRITON_INTERPRET=1 NumPy runs the same code on a CPU.

def power_of_two_from(n):
    """Return the smallest power of two >= n, and >= 16: every thread casts four numbers at a time to FP8."""
    return 1 << max((n - 1).bit_length(), 4)


def empty_rows(R, C, device, fmt=E4M3):
    """Return a Quantized (R, C) with one scale per row, for a kernel to fill."""
    return Quantized(torch.empty(R, C, device=device, dtype=fmt.dtype),
                     torch.empty(R, 1, device=device, dtype=torch.float32), (1, ALL))


if HAS_TRITON:
    # The interpreter casts to FP8 by cutting bits off, so there the kernels round by arithmetic first.
    INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
    CAST_E4M3, CAST_E5M2 = (tl.constexpr(
        "{ .reg .b16 low, high; "
        f"cvt.rn.satfinite.{fmt}x2.f32 low, $2, $1; cvt.rn.satfinite.{fmt}x2.f32 high, $4, $3; "
        "mov.b32 $0, {low, high}; }") for fmt in ("e4m3", "e5m2"))
    REGISTERS = tl.constexpr("=r,f,f,f,f")
    # 1 / (1 + 2^(-x log2 e)). Triton's own takes three times as many instructions, most for subnormals.
    SIGMOID = tl.constexpr("{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; "
                           "add.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }")

    @triton.jit
    def round_to(x, MAX: tl.constexpr, EMIN: tl.constexpr, MANTISSA: tl.constexpr):
        """Round float32 to the numbers of a format: to nearest even, saturate, keep NaN. Adding and taking
        away 2^23 steps of the grid leaves x rounded to it. A step is 2^(e - mantissa bits), where e is the
        exponent of |x|, or of the smallest normal number for all that is below."""
        bits = x.to(tl.int32, bitcast=True)
        field = tl.maximum((bits & 0x7FFFFFFF) >> 23, 127 + EMIN)
        magic = (tl.minimum(field + 23 - MANTISSA, 254) << 23).to(tl.float32, bitcast=True)
        size = tl.minimum((tl.abs(x) + magic) - magic, MAX)
        signed = size.to(tl.int32, bitcast=True) | (bits & -0x80000000)
        nan: tl.constexpr = 0x7F800000 + (0x7FFFFF >> 23 - MANTISSA << 23 - MANTISSA)   # in FP8 all ones
        return tl.where(x != x, nan, signed).to(tl.float32, bitcast=True)

    @triton.jit
    def to_fp8(x, IS_E4M3: tl.constexpr = True):
        """Cast float32 to FP8, as round_to. The instruction for two numbers is spelled out: Triton 3.6
        miscompiles its own cast where bytes are stored by rows and by columns."""
        if INTERPRETED:
            x = round_to(x, 448.0, -6, 3) if IS_E4M3 else round_to(x, 57344.0, -14, 2)
            return x.to(tl.float8e4nv if IS_E4M3 else tl.float8e5)
        elif IS_E4M3:
            return tl.inline_asm_elementwise(CAST_E4M3, REGISTERS, [x], tl.float8e4nv, is_pure=True, pack=4)
        else:
            return tl.inline_asm_elementwise(CAST_E5M2, REGISTERS, [x], tl.float8e5, is_pure=True, pack=4)

    @triton.jit
    def sigmoid(x):
        if INTERPRETED:
            return tl.sigmoid(x)
        else:
            return tl.inline_asm_elementwise(SIGMOID, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)

    @triton.jit
    def magnitude(x):
        """Return |x| as integers, which sort like the numbers, then Inf, then NaN: max loses no NaN."""
        return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF

    @triton.jit
    def scale_of(amax, RULE: tl.constexpr, MAX: tl.constexpr = tl.constexpr(448.0)):
        """Return (scale, 1 / scale), float32, as `scale_from_amax`, of magnitudes (R, B) int32."""
        largest = tl.full((1, 1), MAX, tl.float32)
        smallest: tl.constexpr = MAX * 2.0**-126
        amax = tl.maximum(amax, tl.full((1, 1), smallest, tl.float32).to(tl.int32, bitcast=True))
        if RULE == "fp32":
            scale = tl.div_rn(amax.to(tl.float32, bitcast=True), largest)
            inverse = tl.div_rn(tl.full((1, 1), 1.0, tl.float32), scale)
        else:
            rounded, bits = amax, largest.to(tl.int32, bitcast=True)
            if RULE == "up":  # a mantissa above that of MAX carries into the exponent
                rounded += 0x7FFFFF - (bits & 0x7FFFFF)
            exponent = (rounded & 0x7F800000) - (bits & 0x7F800000) + (127 << 23)
            scale = exponent.to(tl.float32, bitcast=True)
            inverse = ((254 << 23) - exponent).to(tl.float32, bitcast=True)
        finite = amax < 0x7F800000
        return tl.where(finite, scale, float("nan")), tl.where(finite, inverse, float("nan"))

    @triton.jit
    def _quantize_kernel(x_ptr, q_ptr, scale_ptr, R, C, stride_r, stride_c, scale_rows, ROWS: tl.constexpr,
                         COLS: tl.constexpr, GROUP: tl.constexpr, RULE: tl.constexpr, AS_E8M0: tl.constexpr,
                         MAX: tl.constexpr, EMIN: tl.constexpr, MANTISSA: tl.constexpr, KIND: tl.constexpr):
        """Quantize a tile (ROWS, COLS) of x, any strides, under a scale per GROUP columns of a row, or under
        given scales, of `scale_rows` rows each."""
        r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        c = tl.program_id(1).to(tl.int64) * COLS + tl.arange(0, COLS)
        inside = (r < R)[:, None] & (c < C)[None, :]
        at = x_ptr + r[:, None] * stride_r + c[None, :] * stride_c
        x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if RULE == "given":
            scale = tl.load(scale_ptr + r // scale_rows, mask=r < R, other=1.0)
            x *= tl.div_rn(1.0, scale)[:, None]
        else:
            x = tl.reshape(x, (ROWS, COLS // GROUP, GROUP))
            scale, inverse = scale_of(tl.max(magnitude(x), axis=2), RULE, MAX)        # (ROWS, COLS / GROUP)
            x = tl.reshape(x * inverse[:, :, None], (ROWS, COLS))
            groups = tl.cdiv(C, GROUP)
            g = tl.program_id(1) * (COLS // GROUP) + tl.arange(0, COLS // GROUP)
            if AS_E8M0:
                scale = ((scale.to(tl.int32, bitcast=True) >> 23) & 255).to(tl.uint8)
            tl.store(scale_ptr + r[:, None] * groups + g[None, :], scale,
                     mask=(r < R)[:, None] & (g < groups)[None, :])
        if KIND == "E4M3" or KIND == "E5M2":
            q = to_fp8(x, KIND == "E4M3")
        else:
            x = round_to(x, MAX, EMIN, MANTISSA)
            # a block with a NaN has it in its scale
            q = tl.where(x == x, x * 64.0, 0.0).to(tl.int8) if KIND == "INT8" else to_fp8(x)
        tl.store(q_ptr + r[:, None] * C + c[None, :], q, mask=inside)

    def quantize_triton(x, fmt, block, rule, scale=None):
        """Quantize x (R, C), any strides, in blocks 1 x n or under `scale` (E, 1) of E groups of rows."""
        (R, C), e8m0 = x.shape, stores_e8m0(block, rule)
        if scale is not None:
            rule, rows, cols, group, scale_rows = "given", 64, 128, 128, R // len(scale)
        else:
            rows, cols, group, scale_rows = 16, 256, block[1], 1
            dtype = torch.float8_e8m0fnu if e8m0 else torch.float32
            scale = torch.empty(R, cdiv(C, group), device=x.device, dtype=dtype)
        q = torch.empty(R, C, device=x.device, dtype=HELD_AS[fmt])
        _quantize_kernel[(cdiv(R, rows), cdiv(C, cols))](
            x, q, scale.view(torch.uint8) if e8m0 else scale, R, C, *x.stride(), scale_rows, ROWS=rows,
            COLS=cols, GROUP=group, RULE=rule, AS_E8M0=e8m0, MAX=fmt.max, EMIN=fmt.emin,
            MANTISSA=fmt.mantissa_bits, KIND=fmt.name, num_warps=4)
        return Quantized(q, scale, block)

    @triton.jit
    def load_row(ptr, r, c, C, stride_r, stride_c, EVICT: tl.constexpr = tl.constexpr("")):
        """Load columns c of rows r as float32. EVICT tells L2 whether they are read again."""
        at = r[:, None] * stride_r + c[None, :] * stride_c
        return tl.load(ptr + at, mask=(c < C)[None, :], other=0.0, eviction_policy=EVICT).to(tl.float32)

    @triton.jit
    def store_row(q_ptr, x, r, c, C, stride_r, IS_E4M3: tl.constexpr = True,
                  EVICT: tl.constexpr = tl.constexpr("")):
        at = r[:, None] * stride_r + c[None, :]
        tl.store(q_ptr + at, to_fp8(x, IS_E4M3), mask=(c < C)[None, :], eviction_policy=EVICT)

    @triton.jit
    def _rows_kernel(x_ptr, weight_ptr, q_ptr, scale_ptr, R, C, stride_r, stride_c, eps, NORM: tl.constexpr,
                     ROWS: tl.constexpr, COLS: tl.constexpr, RULE: tl.constexpr, IS_E4M3: tl.constexpr):
        """Compute `quantize_norm`. A row waits in registers for its maximum. Programs past the end recompute
        the last row: a mask for the rows would cost a tenth of the bandwidth."""
        r = tl.minimum(tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), R - 1)
        c = tl.arange(0, COLS)
        x = load_row(x_ptr, r, c, C, stride_r, stride_c)
        if NORM == "layer":
            x = tl.where((c < C)[None, :], x - (tl.sum(x, axis=1) / C)[:, None], 0.0)
        if NORM == "layer" or NORM == "rms":
            x *= tl.rsqrt(tl.sum(x * x, axis=1) / C + eps)[:, None]
        if NORM == "rms" and weight_ptr is not None:
            x *= tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        amax = tl.max(magnitude(x), axis=1)[:, None]
        scale, inverse = scale_of(amax, RULE, 448.0 if IS_E4M3 else 57344.0)                 # (ROWS, 1)
        tl.store(scale_ptr + r[:, None], scale)
        store_row(q_ptr, x * inverse, r, c, C, C, IS_E4M3)

    def quantize_norm_triton(x, kind, weight=None, fmt=E4M3, rule="up", eps=NORM_EPS):
        (R, C), weight = x.shape, None if weight is None else weight.contiguous()
        q, cols = empty_rows(R, C, x.device, fmt), power_of_two_from(C)
        rows = max(2048 // cols, 1)
        _rows_kernel[(cdiv(R, rows),)](
            x, weight, q.data, q.scale, R, C, *x.stride(), eps, NORM=kind, ROWS=rows, COLS=cols,
            RULE=rule, IS_E4M3=fmt is E4M3, num_warps=4 if C <= 4096 else 8)
        return q

    @triton.jit
    def load_halves(h_ptr, r, c, F, EVICT: tl.constexpr = tl.constexpr("")):
        """Load columns c of gate and of up, rows r of h (R, 2 F)."""
        return load_row(h_ptr, r, c, F, 2 * F, 1, EVICT), load_row(h_ptr + F, r, c, F, 2 * F, 1, EVICT)

    @triton.jit
    def load_probability(p_ptr, r):
        return tl.full((1, 1), 1.0, tl.float32) if p_ptr is None else tl.load(p_ptr + r[:, None])

    @triton.jit
    def _swiglu_kernel(h_ptr, p_ptr, a_q_ptr, a_scale_ptr, h_q_ptr, h_scale_ptr, F, BLOCK: tl.constexpr):
        """Compute `quantize_swiglu` of one row, which is read twice, the second time out of the L2 cache. A
        row in registers, as above, leaves room for one program per SM, which reads nothing while it computes:
        16384 rows of 22016 numbers take 640 us, and this way 346. EVICT saves another 18 us."""
        r = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
        p = load_probability(p_ptr, r)
        a_amax, h_amax = tl.zeros((1, BLOCK), tl.int32), tl.zeros((1, BLOCK), tl.int32)
        for first in range(0, F, BLOCK):
            gate, up = load_halves(h_ptr, r, first + tl.arange(0, BLOCK), F, "evict_last")
            a_amax = tl.maximum(a_amax, magnitude(gate * sigmoid(gate) * up * p))
            h_amax = tl.maximum(h_amax, tl.maximum(magnitude(gate), magnitude(up)))
        a_scale, a_inverse = scale_of(tl.max(a_amax, axis=1)[:, None], "up")
        h_scale, h_inverse = scale_of(tl.max(h_amax, axis=1)[:, None], "up")
        tl.store(a_scale_ptr + r[:, None], a_scale)
        tl.store(h_scale_ptr + r[:, None], h_scale)
        for first in range(0, F, BLOCK):
            c = first + tl.arange(0, BLOCK)
            gate, up = load_halves(h_ptr, r, c, F, "evict_first")
            store_row(a_q_ptr, gate * sigmoid(gate) * up * p * a_inverse, r, c, F, F, EVICT="evict_first")
            store_row(h_q_ptr, gate * h_inverse, r, c, F, 2 * F, EVICT="evict_first")
            store_row(h_q_ptr + F, up * h_inverse, r, c, F, 2 * F, EVICT="evict_first")

    def row_launch(C):   # with 16 numbers a thread; 8 warps for 1024 would take 1.5 times as long
        block = min(power_of_two_from(C), 4096)
        return {"BLOCK": block, "num_warps": max(block // 512, 1)}

    def quantize_swiglu_triton(h, p=None):
        R, ffn = h.shape[0], h.shape[1] // 2
        a, h_q = (empty_rows(R, n, h.device) for n in (ffn, 2 * ffn))
        _swiglu_kernel[(R,)](h.contiguous(), p, a.data, a.scale, h_q.data, h_q.scale, ffn, **row_launch(ffn))
        return a, h_q

    @triton.jit
    def _swiglu_backward_kernel(h_ptr, h_scale_ptr, da_ptr, p_ptr, q_ptr, scale_ptr, dp_ptr, F,
                                BLOCK: tl.constexpr):
        """Compute `quantize_swiglu_gradient` of a row. It is read for the bound, then for the gradient. With
        the maximum in place of the bound all gradients are computed twice: 427 us, not 378, on an H100."""
        r = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
        h_scale, p = tl.load(h_scale_ptr + r[:, None]), load_probability(p_ptr, r)
        bound, dp = tl.zeros((1, BLOCK), tl.float32), tl.zeros((1, BLOCK), tl.float32)
        for first in range(0, F, BLOCK):
            c = first + tl.arange(0, BLOCK)
            gate, up = load_halves(h_ptr, r, c, F)
            da = load_row(da_ptr, r, c, F, F, 1) * p
            larger = tl.maximum(tl.abs(gate), 1.1 * tl.abs(up), propagate_nan=tl.PropagateNan.ALL)
            bound = tl.maximum(bound, tl.abs(da) * larger, propagate_nan=tl.PropagateNan.ALL)
        bound = tl.max(magnitude(bound), axis=1)[:, None].to(tl.float32, bitcast=True) * h_scale
        scale, inverse = scale_of(magnitude(bound), "up")
        tl.store(scale_ptr + r[:, None], scale)
        for first in range(0, F, BLOCK):
            c = first + tl.arange(0, BLOCK)
            gate, up = load_halves(h_ptr, r, c, F)
            gate, up = gate * h_scale, up * h_scale
            da, sigma = load_row(da_ptr, r, c, F, F, 1), sigmoid(gate)
            silu = gate * sigma
            dp += da * silu * up
            da *= p
            store_row(q_ptr, da * up * (sigma + silu * (1 - sigma)) * inverse, r, c, F, 2 * F)
            store_row(q_ptr + F, da * silu * inverse, r, c, F, 2 * F)
        if p_ptr is not None:
            tl.store(dp_ptr + r, tl.sum(dp, axis=1))

    def quantize_swiglu_gradient_triton(h, da, p=None):
        (R, ffn), dp = da.shape, None if p is None else torch.empty_like(p)
        q = empty_rows(R, 2 * ffn, da.device)
        _swiglu_backward_kernel[(R,)](
            h.data.contiguous(), h.scale.contiguous(), da.contiguous(), p, q.data, q.scale, dp, ffn,
            **row_launch(ffn))
        return q if p is None else (q, dp)

    @triton.jit
    def _rope_kernel(out_ptr, x_ptr, cos_ptr, sin_ptr, R, T, pairs, out_b, out_t, out_h, x_b, x_t, x_h,
                     HALF: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr):
        """Compute `rope`. One thread reads both numbers of a pair before it writes them: out may be x."""
        r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        pair = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
        inside = (r < R)[:, None] & (pair < pairs)[None, :]
        b, t = (r // T).to(tl.int64)[:, None], (r % T).to(tl.int64)[:, None]
        head, i = (pair // HALF)[None, :], (pair % HALF)[None, :]
        cos = tl.load(cos_ptr + t * HALF + i, mask=inside, other=0.0)
        sin = tl.load(sin_ptr + t * HALF + i, mask=inside, other=0.0)
        at = x_ptr + b * x_b + t * x_t + head * x_h + i
        first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
        to = out_ptr + b * out_b + t * out_t + head * out_h + i
        tl.store(to, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(to + HALF, (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=inside)

    def rope_triton(out, x, cos, sin):
        B, T, heads, head_dim = x.shape
        pairs = heads * head_dim // 2
        width = min(power_of_two_from(pairs), 1024)
        _rope_kernel[(cdiv(B * T, 2), cdiv(pairs, width))](
            out, x, cos.contiguous(), sin.contiguous(), B * T, T, pairs, *out.stride()[:3], *x.stride()[:3],
            HALF=head_dim // 2, ROWS=2, PAIRS=width, num_warps=4)

    @triton.jit
    def _combine_kernel(x_ptr, rows_ptr, add_ptr, out_ptr, C, K: tl.constexpr, BLOCK: tl.constexpr):
        """Compute `combine` of one token."""
        t, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for i in tl.static_range(K):
            row = tl.load(rows_ptr + t * K + i)
            total += tl.load(x_ptr + row * C + c, mask=c < C, other=0.0).to(tl.float32)
        if add_ptr is not None:
            total += tl.load(add_ptr + t * C + c, mask=c < C, other=0.0).to(tl.float32)
        tl.store(out_ptr + t * C + c, total.to(out_ptr.dtype.element_ty), mask=c < C)

    def combine_triton(x, rows, add=None):
        (T, k), C = rows.shape, x.shape[1]
        add = None if add is None else add.contiguous()
        out = torch.empty(T, C, device=x.device, dtype=x.dtype)
        _combine_kernel[(T,)](x.contiguous(), rows.contiguous(), add, out, C, K=k, BLOCK=power_of_two_from(C),
                              num_warps=4 if C <= 4096 else 8)
        return out

    @triton.jit
    def _transpose_kernel(q_ptr, factor_ptr, out_ptr, R, C, HAS_FACTOR: tl.constexpr, IS_E4M3: tl.constexpr,
                          BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
        """Move a tile (BLOCK_R, BLOCK_C) of q, times a factor per row, to its place in out (C, R)."""
        r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = (r < R)[:, None] & (c < C)[None, :]
        q = tl.load(q_ptr + r[:, None] * C + c[None, :], mask=inside)
        if HAS_FACTOR:
            factor = tl.load(factor_ptr + r, mask=r < R, other=0.0)
            q = to_fp8(q.to(tl.float32) * factor[:, None], IS_E4M3)
        tl.store(out_ptr + c[:, None] * R + r[None, :], tl.trans(q), mask=tl.trans(inside))

    def transpose_triton(q, row_factor=None):
        (R, C), out = q.shape, torch.empty(q.shape[::-1], device=q.device, dtype=q.dtype)
        factor = None if row_factor is None else row_factor.contiguous()
        _transpose_kernel[cdiv(R, 64), cdiv(C, 256)](
            q.contiguous(), factor, out, R, C, HAS_FACTOR=factor is not None, IS_E4M3=format_of(q) is E4M3,
            BLOCK_R=64, BLOCK_C=256, num_warps=8)
        return out


# ---------------------------------------------------------------------------------------------------
# What `python microscale.py` prints

def sqnr(x, approximation, group=None):
    """Return 10 log10(sum x^2 / sum error^2) in dB: of the tensor, or the mean over groups within rows."""
    signal = x.double().reshape(-1, group or x.numel()).square().sum(1)
    noise = (x.double() - approximation.double()).reshape(-1, group or x.numel()).square().sum(1)
    return (10 * torch.log10(signal / noise.clamp(min=1e-300)))[signal > 0].clamp(max=100).mean().item()


QUANTIZERS = {name: partial(quantize_reference, block=RECIPES[name].act_block, rule=RECIPES[name].rule)
              for name in ("tensor", "group", "mx", "moss")}
QUANTIZERS |= {"two-level": quantize_two_level, "s = 1": partial(quantize_two_level, global_scale=1.0)}


def examples(R=512, C=1024, heads=8):
    """Return Gaussian numbers, the same in other sizes, and what a transformer layer makes of such ones."""
    torch.manual_seed(0)
    x, sizes = torch.randn(R, C), torch.exp(5 * torch.randn(R, 1))
    h = torch.randn(R, 2 * C) * torch.exp(torch.randn(2 * C) / 2)   # trained channels differ as much in size
    qkv = torch.randn(3, heads, R, 64) * torch.tensor([3, 3, 1]).view(3, 1, 1, 1)   # few tokens get attention
    attention = F.scaled_dot_product_attention(*qkv.requires_grad_(), is_causal=True)
    (dqkv,) = torch.autograd.grad(attention, qkv, torch.randn_like(attention))      # (3, heads, R, head_dim)
    return {"Gaussian": x,
            "1% of channels x 50": x * torch.where(torch.arange(C) % 100 == 0, 50, 1),
            "one token x 10^4": x * torch.where(torch.arange(R) == 7, 1e4, 1)[:, None],
            "token sizes log-normal": x * sizes,
            "X of down: SwiGLU": swiglu(h),
            "dY of gate_up": swiglu_gradient(h, x),
            "dY of qkv": dqkv.permute(2, 0, 1, 3).flatten(1)}


def transpose_tokens(x):
    """Return X^T (C, R) of `moss`, under one scale: the scaling-aware transpose."""
    q = QUANTIZERS["moss"](x)
    common = q.scale.amax().view(1, 1)
    return Quantized(transpose(q.data, q.scale / common), common, (ALL, ALL))


def score(x, q):
    return f"{sqnr(x, q.dequantize()):.1f} /{sqnr(x, q.dequantize(), group=32):5.1f}"


TABLES = [
    ("1. SQNR of E4M3 in dB: of the tensor / mean over groups of 32",
     {name: lambda x, q=q: score(x, q(x)) for name, q in QUANTIZERS.items()},
     "A float has an exponent of its own: power-of-two scales add range, and no precision."),
    ("2. The same with a uniform element, an 8-bit integer",
     {n: lambda x, q=QUANTIZERS[n]: score(x, q(x, INT8)) for n in ("tensor", "group", "two-level")},
     "MOSS's Theorem 1 (tensor < group < two-level) holds here, over the tensor, where channels differ."),
    ("""3. Folding: share of values changed, energy of the change. SQNR of X^T, if both axes are summed over:
   "once" from X; "twice" from the quantized X, quantized again; "moved", its FP8 numbers under one scale""",
     {"folded": lambda x: "{:.2%} {:.0e}".format(*map(float, fold_loss(x))),
      "moved": lambda x: score(x.t(), transpose_tokens(x)),
      "2^k, twice": lambda x, q=QUANTIZERS["s = 1"]: score(x.t(), q(q(x).dequantize().t())),
      "FP32, once": lambda x, q=QUANTIZERS["group"]: score(x.t(), q(x.t())),
      "FP32, twice": lambda x, q=QUANTIZERS["group"]: score(x.t(), q(q(x).dequantize().t()))},
     "Powers of two along both axes share one grid. FP32 scales do not: rounding twice mostly costs 2 dB.")]


def show_diffusion(N=64, K=256, sizes=(64, 128, 256, 512, 4096)):
    """Print the error of a layer's output on new inputs, of which 48 directions have most of the energy."""
    torch.manual_seed(0)
    weight, directions = torch.randn(N, K), torch.randn(48, K) / 7
    new, *sets = (torch.randn(T, 48) @ directions + 0.4 * torch.randn(T, K) for T in (4096, *sizes))
    print(f"4. Error of a layer of {K} inputs: W rounded, and by error diffusion on so many tokens\n\n"
          f"   {'':10}{'rounded':>9}" + "".join(f"{T:9}" for T in sizes))
    for recipe in (RECIPES[name] for name in ("mx", "mxfp6", "mxfp4")):
        act = partial(quantize, fmt=FORMATS[recipe.act_format], rule=recipe.rule)
        ways = [quantize_weight(weight, recipe)[0]]
        ways += [diffuse(weight, x, act(x).dequantize(), recipe) for x in sets]
        errors = (sqnr(new @ weight.t(), act(new).dequantize() @ q.dequantize().t()) for q in ways)
        print(f"   {recipe.name:10}" + "".join(f"{10 ** (-error / 20):9.1%}" for error in errors))
    print("-> It takes more tokens than inputs. With fewer it fits their noise, and may do worse.\n")


def show_bandwidth(T=16384, d=4096, ffn=11008):
    """Print the time of every kernel at the sizes of a 7B layer, next to a copy that moves as many bytes."""
    from triton.testing import do_bench
    shapes = (T, d), (T, 2 * ffn), (T, ffn), (d,), (8, T // 8, 2 * d // 128, 128)
    x, h, da, row, qk = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    q, h_q = quantize(x, E4M3, (1, ALL)), quantize_swiglu(h)[1]
    factor, angles = q.scale / q.scale.max(), torch.randn(2, T // 8, 64, device="cuda").unbind()
    experts = h.view(-1, 2048)   # the same numbers as rows of experts, each of width 1024
    p, rows = torch.rand(len(experts), device="cuda"), torch.randint(T, (T // 8, 8), device="cuda")
    experts_q = quantize_swiglu(experts, p)[1]
    kernels = {  # name: (bytes it has to move, function)
        "quantize rows": (3 * T * d, lambda: quantize(x, E4M3, (1, ALL), "up")),
        "RMSNorm, quantize rows": (3 * T * d, lambda: quantize_norm(x, "rms", row)),
        "LayerNorm, quantize rows": (3 * T * d, lambda: quantize_norm(x, "layer")),
        "RoPE of q and k, in place": (8 * T * d, lambda: rope_into(qk, qk, *angles)),
        "SwiGLU, quantize rows": (7 * T * ffn, lambda: quantize_swiglu(h)),
        "SwiGLU backward, quantize rows": (6 * T * ffn, lambda: quantize_swiglu_gradient(h_q, da)),
        "SwiGLU of experts": (7 * T * ffn, lambda: quantize_swiglu(experts, p)),
        "SwiGLU of experts, backward": (
            6 * T * ffn, lambda: quantize_swiglu_gradient(experts_q, da.view(-1, 1024), p)),
        "sums of 8 rows": (2 * T * d + T * d // 4, lambda: combine(x, rows)),
        "FP8 X to X^T, a factor per row": (2 * T * d, lambda: transpose(q.data, factor))}
    print(f"5. {torch.cuda.get_device_name()}: one reading of the input; {T} tokens, d = {d}, SwiGLU {ffn}\n")
    print(f"   {'':34}     us   TB/s   share of the bandwidth of a copy")
    for name, (nbytes, function) in kernels.items():
        source, target = torch.randn(2, nbytes // 4, device="cuda", dtype=torch.bfloat16)
        ms, copy = (do_bench(f, return_mode="median") for f in (function, lambda: target.copy_(source)))
        print(f"   {name:34}{1e3 * ms:7.0f}{nbytes / ms * 1e-9:7.2f}{copy / ms:8.0%}")


if __name__ == "__main__":
    for title, columns, reading in TABLES:
        print(f"{title}\n\n   {'':22}" + "".join(f"{name:>13}" for name in columns))
        for name, x in examples().items():
            print(f"   {name:22}" + "".join(f"{column(x):>13}" for column in columns.values()))
        print(f"-> {reading}\n")
    show_diffusion()
    if torch.cuda.is_available() and kernels_run_on("cuda"):
        show_bandwidth()
