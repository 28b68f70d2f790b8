"""
The model: a decoder like LLaMA and OLMo, whose linear layers can run in FP8.

    python model.py             # parameters, FLOPs and memory of every preset under every recipe

    x = embed(tokens)
    for each block:   x = x + out(attention(rope(qkv(norm1(x)))))           linear layers: qkv, out
                      x = x + down(silu(gate(norm2(x))) * up(norm2(x)))     linear layers: gate_up, down
    logits = head(norm(x))

A recipe (microscale.py) quantizes the four linear layers of every block. In OLMo-7B they hold 94% of the parameters
and do 93% of the arithmetic. Embedding, norms, attention and head stay in BF16 (FP32 on a CPU). The optimizer sees
FP32 weights.

Most recipes run layer by layer: PyTorch computes norm, attention and SwiGLU, and each linear layer quantizes what it
reads. `moss` computes the same block with three fused functions ("The dataflow of moss" below). There the kernel that
computes a number also quantizes it, wherever that is possible, and most of what is saved for the backward pass is FP8.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint

from fp8_formats import E4M3, FORMATS, cast, format_of, uncast
from gemm_kernel import fp8_linear, matmul, transpose_for_wgrad, wgrad_factor
from microscale import (ALL, NORM_EPS, NORMS, RECIPES, Quantized, Recipe, cdiv, fold_loss, norm_rows, qkv_gradient,
                        quantize, quantize_weight, rope, rope_, rope_backward, saturated_share, stores_e8m0, swiglu,
                        swiglu_backward, swiglu_gradient, swiglu_rows)


# ---------------------------------------------------------------------------------------------------
# Shapes

@dataclass(frozen=True)
class ModelConfig:
    vocab: int
    seq: int                  # longest sequence
    d: int                    # width of the residual stream
    layers: int
    heads: int
    ffn: int                  # width inside SwiGLU
    kv_heads: int = 0         # grouped-query attention: heads share this many keys and values; 0 = heads
    norm: str = "rms"         # "rms": RMSNorm with a weight | "layer": LayerNorm without parameters (OLMo)
    tied: bool = False        # the head reuses the embedding
    rope_theta: float = 10000.0

    def __post_init__(self):
        for name in ("vocab", "seq", "d", "layers", "heads", "ffn", "rope_theta"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)} must be larger than 0")
        kv_heads = self.kv_heads or self.heads
        for name, value, divisor in (("d", self.d, 2 * self.heads), ("heads", self.heads, kv_heads)):
            if divisor < 0 or value % divisor:
                raise ValueError(f"{name} = {value} must be a multiple of {divisor}: choose another {name}, heads or "
                                 f"kv_heads (heads {self.heads}, kv_heads {kv_heads})")
        if self.norm not in ("rms", "layer"):
            raise ValueError(f"norm {self.norm!r} is unknown: choose 'rms' or 'layer'")

    @property
    def head_dim(self):
        return self.d // self.heads

    @property
    def kv_dim(self):
        return (self.kv_heads or self.heads) * self.head_dim


RECOMPUTE = ("none", "block")   # what the backward pass computes again instead of reading it from memory

PRESETS = {
    "nano": ModelConfig(vocab=256, seq=128, d=128, layers=4, heads=4, ffn=384),
    "124m": ModelConfig(vocab=50304, seq=1024, d=768, layers=12, heads=12, ffn=2048, tied=True),
    "1b": ModelConfig(vocab=50304, seq=2048, d=2048, layers=16, heads=16, ffn=8192, norm="layer", tied=True),
    "olmo-7b": ModelConfig(vocab=50304, seq=2048, d=4096, layers=32, heads=32, ffn=11008, norm="layer"),
    "llama2-7b": ModelConfig(vocab=32000, seq=4096, d=4096, layers=32, heads=32, ffn=11008),
}


# ---------------------------------------------------------------------------------------------------
# Layers

# torch.compile fuses what has no kernel of ours. torch.compiler.set_stance("force_eager") switches it off.
compiled = partial(torch.compile, dynamic=False) if torch.cuda.is_available() else lambda function: function


class Linear(nn.Module):
    """Compute y = x W^T without bias, as the recipe says. W (out, in) is the FP32 master weight.

    `copies` are FP8 W (out, in), which fprop reads, and FP8 W^T (in, out), which dgrad reads. `requantize` makes them,
    once per optimizer step. Copies of a weight that has changed since are refused. One kind of change is not noticed,
    because PyTorch does not count it: in place through `.data`, as in weight.data.mul_(2).
    """

    def __init__(self, d_in, d_out, recipe, name, std=0.02):
        super().__init__()
        for axis, size in (("in", d_in), ("out", d_out)):
            if recipe and size % 16:
                raise ValueError(f"layer {name}: {axis} = {size} is not a multiple of 16, which --fp8 {recipe} "
                                 f"needs to tile it: change d, ffn or the heads, or train with --fp8 none")
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        if std:
            nn.init.normal_(self.weight, std=std)
        self.name, self.recipe = name, recipe
        self.copies = self.made_of = None
        self.accumulates = False   # `moss`: wgrad adds to weight.grad itself; hooks of autograd do not see it
        self.health = None         # a dict while the log watches this layer's scales

    def requantize(self, scale=None):
        """Make the FP8 copies. `scale` () float32 is for recipes with one scale per weight; None: it is measured."""
        if self.recipe:
            given = scale is not None and self.recipe.weight_scale != "block"
            scale = scale.detach().view(1, 1) if given else None
            self.set_copies(quantize_weight(self.weight.detach(), self.recipe, scale))

    def set_copies(self, copies):
        """Take FP8 (W, W^T) as copies of the weight as it is now."""
        # the detached weight keeps its memory from being used again, so that no other weight gets its address
        self.copies, self.made_of = copies, (self.weight, self.weight.detach(), version(self.weight))

    def is_current(self):
        """Return whether the copies were made of the weight as it is now."""
        if self.copies is None:
            return False
        weight, data, number = self.made_of
        return weight is self.weight and data.data_ptr() == weight.data_ptr() and number == version(weight)

    @torch.compiler.disable
    def current_copies(self):
        """Return FP8 (W, W^T). RuntimeError if the weight has changed since they were made."""
        if not self.is_current():
            raise RuntimeError(f"layer {self.name}: its weight has no FP8 copies, or has changed since they were made: "
                               f"call requantize() of each of model.linears() after every change of weights")
        return self.copies

    w = property(lambda self: self.current_copies()[0])     # (out, in), for fprop
    w_t = property(lambda self: self.current_copies()[1])   # (in, out), for dgrad

    def __getstate__(self):
        """Give a copy or a pickle the FP8 copies, too, if they are current."""
        return {**self.__dict__, "copies": self.copies if self.is_current() else None, "made_of": None}

    def __setstate__(self, state):
        super().__setstate__(state)
        if self.copies:
            self.set_copies(self.copies)

    def forward(self, x):
        if not self.recipe or not x.numel():
            return F.linear(x, self.weight.to(x.dtype))
        y = fp8_linear(x, self.weight, self.w, self.w_t, self.recipe)
        watch_layer(self, x, y)
        return y

    def extra_repr(self):
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, fp8={self.recipe or 'none'}"


def version(weight):
    """Return PyTorch's count of the changes of a tensor in place. (Tensors of inference mode have none.)"""
    return None if weight.is_inference() else weight._version


@register_optimizer_step_post_hook
def count_change(optimizer, *_):
    """Count the step of a fused optimizer as a change of its weights: PyTorch counts only what others change."""
    torch.autograd.graph.increment_version([p for group in optimizer.param_groups if group.get("fused")
                                            for p in group["params"]])


class Norm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.kind = config.norm
        self.weight = nn.Parameter(torch.ones(config.d)) if self.kind == "rms" else None

    def forward(self, x):
        return norm(x, self.kind, None if self.weight is None else self.weight.to(x.dtype))


@compiled
def norm(x, kind, weight):
    return NORMS[kind](x, weight)


@compiled
def rope_and_split(qkv, cos, sin, d, kv_dim, head_dim):
    """Split qkv (B, T, d + 2 kv_dim) into q (B, T, heads, head_dim), k and v (B, T, kv_heads, head_dim); turn q and k."""
    q, k, v = (z.unflatten(-1, (-1, head_dim)) for z in qkv.split((d, kv_dim, kv_dim), dim=-1))
    return rope(q, cos, sin), rope(k, cos, sin), v


compiled_swiglu = compiled(swiglu)


def rope_table(seq, head_dim, theta, device=None):
    """Return cos and sin (seq, head_dim / 2), float32: position t turns pair i by the angle t theta^(-2 i / head_dim)."""
    rates = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(seq, device=device, dtype=torch.float32), rates)
    return angles.cos(), angles.sin()


def attention(q, k, v, cache=None):
    """Return what the heads look up, (B, T, d), of q (B, T, heads, head_dim), k and v (B, T, kv_heads, head_dim).

    cache: while a text is generated, a dict with k and v of the tokens before; k and v of these tokens are added to it.
    """
    if cache is not None:
        k, v = (torch.cat((cache[name], z), dim=1) if cache else z for name, z in (("k", k), ("v", v)))
        cache.update(k=k, v=v)
    y = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)), enable_gqa=q.shape[2] != k.shape[2],
                                       is_causal=q.shape[1] > 1)   # a single new token sees all that came before
    return y.transpose(1, 2).flatten(2)


# ---------------------------------------------------------------------------------------------------
# The decoder

class Block(nn.Module):
    """Compute x + out(attention(rope(qkv(norm1(x))))) =: x, and then x + down(swiglu(gate_up(norm2(x)))).

    recipe      of its linear layers; None: in high precision. The blocks of a model may differ.
    recompute   "block": only x is saved, and the backward pass computes the block again
    """

    def __init__(self, config, recipe, name, recompute):
        super().__init__()
        if recompute not in RECOMPUTE:
            raise ValueError(f"recompute {recompute!r} is unknown: choose one of {', '.join(RECOMPUTE)}")
        self.config, self.recompute, self.fused = config, recompute, recipe == FUSED
        self.norm1, self.norm2 = Norm(config), Norm(config)
        small = 0.02 / (2 * config.layers) ** 0.5   # for the two layers that write to the residual stream
        self.qkv = Linear(config.d, config.d + 2 * config.kv_dim, recipe, f"{name}.qkv")
        self.out = Linear(config.d, config.d, recipe, f"{name}.out", small)
        self.gate_up = Linear(config.d, 2 * config.ffn, recipe, f"{name}.gate_up")
        self.down = Linear(config.ffn, config.d, recipe, f"{name}.down", small)

    def forward(self, x, cos, sin, cache=None):
        if self.recompute == "block" and torch.is_grad_enabled() and cache is None:
            return checkpoint(self.compute, x, cos, sin, use_reentrant=False)
        return self.compute(x, cos, sin, cache)

    def compute(self, x, cos, sin, cache=None):
        if x.numel() and can_fuse(self):
            return fused_block(self, x, cos, sin, cache)
        q, k, v = rope_and_split(self.qkv(self.norm1(x)), cos, sin, self.config.d, self.config.kv_dim,
                                 self.config.head_dim)
        x = x + self.out(attention(q, k, v, cache))
        return x + self.down(compiled_swiglu(self.gate_up(self.norm2(x))))


class Transformer(nn.Module):
    """Compute logits (B, T, vocab) of tokens (B, T), or with targets (B, T) int64 the mean cross-entropy in nats.

    fp8         the name of a recipe
    recompute   "block" saves memory: the backward pass computes every block a second time
    """

    def __init__(self, config, fp8="none", recompute="none"):
        super().__init__()
        if fp8 not in RECIPES:
            raise ValueError(f"recipe {fp8!r} is unknown: choose one of {', '.join(RECIPES)}")
        self.config, self.recipe, self.recompute = config, RECIPES[fp8], recompute
        self.embed = nn.Embedding(config.vocab, config.d)
        nn.init.normal_(self.embed.weight, std=0.02)
        head = Linear(config.d, config.vocab, None, "head", std=0 if config.tied else 0.02)   # never quantized
        if config.tied:
            head.weight = self.embed.weight
        self.blocks = nn.ModuleList(Block(config, self.recipe, f"blocks.{i}", recompute) for i in range(config.layers))
        self.norm, self.head = Norm(config), head
        self.rope = rope_table(config.seq, config.head_dim, config.rope_theta)   # no buffers: DDP would send them

    def linears(self):
        """Return the linear layers of the blocks, which the recipe quantizes, in the order of the forward pass."""
        return [m for m in self.blocks.modules() if isinstance(m, Linear)]

    def forward(self, tokens, targets=None, caches=None):
        """Return logits (B, T, vocab), or with targets the mean loss in nats per token.

        caches: an empty dict per block. They keep the keys and values of these tokens for the tokens that follow.
        Raises ValueError for more tokens than the model reads, and for targets that do not fit the tokens;
        RuntimeError where FP8 copies of weights are missing or out of date.
        """
        T, start = tokens.shape[1], caches[0]["k"].shape[1] if caches and caches[0] else 0
        if start + T > self.config.seq:
            raise ValueError(f"{start + T} tokens: this model reads at most {self.config.seq}, its config.seq")
        if start and T > 1:
            raise ValueError(f"{T} tokens after {start} in the cache: they would see each other; pass one at a time")
        if targets is not None and targets.shape != tokens.shape:
            raise ValueError(f"targets have shape {tuple(targets.shape)}, tokens {tuple(tokens.shape)}: each token "
                             f"needs one target, the token after it")
        if self.rope[0].device != tokens.device:   # the model has moved
            self.rope = rope_table(self.config.seq, self.config.head_dim, self.config.rope_theta, tokens.device)
        cos, sin = (table[start:start + T] for table in self.rope)
        x = self.embed(tokens).to(torch.bfloat16 if tokens.is_cuda else torch.float32)   # (B, T, d)
        for i, block in enumerate(self.blocks):
            x = block(x, cos, sin, caches[i] if caches else None)
        x = self.norm(x)
        if targets is None:
            return self.head(x)                                                          # (B, T, vocab)
        return head_loss(x.flatten(0, 1), self.head.weight, targets.flatten())

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")   # every length would be compiled anew
    def generate(self, tokens, count, temperature=0.8, generator=None):
        """Return tokens (1, T) and `count` more, sampled one at a time. Temperature 0 takes the likeliest.

        The keys and values of earlier tokens are kept. When they fill the longest sequence, its second half begins a
        new one. Raises ValueError for an empty prompt and for a negative temperature.
        """
        if not tokens.shape[1]:
            raise ValueError("the prompt is empty: the model needs at least one token to go on from")
        if not temperature >= 0:
            raise ValueError(f"temperature = {temperature} must be 0 (the likeliest token) or larger")
        caches, new = [{} for _ in self.blocks], tokens[:, -self.config.seq:]
        for _ in range(count):
            if caches[0] and caches[0]["k"].shape[1] == self.config.seq:
                caches, new = [{} for _ in self.blocks], tokens[:, -(self.config.seq + 1) // 2:]
            logits = self(new, caches=caches)[:, -1].float()
            if temperature:
                new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            else:
                new = logits.argmax(-1, keepdim=True)
            tokens = torch.cat((tokens, new), dim=1)
        return tokens


# ---------------------------------------------------------------------------------------------------
# The dataflow of moss

# The functions below compute this recipe. A block with any other recipe runs layer by layer, and so does one whose
# RECIPES["moss"] a fork has changed.
FUSED = Recipe("moss", (1, ALL), (ALL, ALL), rule="up", weight_scale="predicted")


def fused_block(block, x, cos, sin, cache):
    """Compute a block (B, T, d) with fused functions."""
    (B, T, d), kind = x.shape, block.config.norm
    q, k, v, x = NormQKV.apply(x, block.norm1.weight, block.qkv.weight, cos, sin, block.qkv, block.config)
    y = attention(q, k, v, cache).view(B * T, d)
    x = LinearResidual.apply(y, x.reshape(B * T, d), block.out.weight, block.out)
    x = NormSwiGLUResidual.apply(x, block.norm2.weight, block.gate_up.weight, block.down.weight, block.gate_up,
                                 block.down, kind)
    return x.view(B, T, d)


def can_fuse(block):
    """Return False where the fused functions would pass over what a fork has changed: a layer that was replaced, that
    has another recipe, or that has hooks."""
    layers, norms = (block.qkv, block.out, block.gate_up, block.down), (block.norm1, block.norm2)
    return (block.fused and all(type(m) is Linear and m.recipe == FUSED for m in layers)
            and all(type(m) is Norm for m in norms) and not any(has_hooks(m) for m in layers + norms))


def has_hooks(m):
    return bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)


class NormQKV(torch.autograd.Function):
    """Compute q (B, T, heads, head_dim) and k after RoPE, and v (B, T, kv_heads, head_dim), of x (B, T, d).

    x is returned, too, for the residual connection. So the gradient that comes back along that connection arrives here,
    and norm_backward adds it where it writes the gradient of x.
    Saved for the backward pass: x, and norm(x) in FP8. Attention saves q, k and v, which are one tensor: RoPE turns q and
    k in place. The gradients of q and k are turned back by the kernel that quantizes them.
    """

    @staticmethod
    def forward(ctx, x, norm_weight, weight, cos, sin, layer, config):
        kv_heads = config.kv_dim // config.head_dim
        x_q = quantize_rows(x.flatten(0, 1), layer, config.norm, norm_weight)          # (B T, d)
        qkv = matmul(x_q, layer.w, x.dtype).view(*x.shape[:2], -1, config.head_dim)    # (B, T, all heads, head_dim)
        rope_(qkv[:, :, :-kv_heads], cos, sin)                                         # all but those of v
        ctx.save_for_backward(x, norm_weight, cos, sin, x_q.data, x_q.scale)
        ctx.layer, ctx.kind = layer, config.norm
        return *qkv.split((config.heads, kv_heads, kv_heads), dim=2), x

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk, dv, residual):
        (x, norm_weight, cos, sin, *x_q), layer = ctx.saved_tensors, ctx.layer
        dy_q = rope_backward(dq, dk, dv, cos, sin)                                     # (B T, d + 2 kv_dim)
        dx, dw = linear_backward(dy_q, Quantized(*x_q, (1, ALL)), layer, x.dtype, lambda: qkv_gradient(
            *first_rows(dq, dk, dv), cos[:WATCHED], sin[:WATCHED]))
        dx, d_norm = norm_backward(dx, x.flatten(0, 1), norm_weight, ctx.kind, residual.flatten(0, 1))
        return dx.view_as(x), d_norm, dw, None, None, None, None


class LinearResidual(torch.autograd.Function):
    """Compute residual (T, N) + x W^T of x (T, K). Saved for the backward pass: x in FP8."""

    @staticmethod
    def forward(ctx, x, residual, weight, layer):
        x_q = quantize_rows(x, layer)
        ctx.save_for_backward(x_q.data, x_q.scale)
        ctx.layer, ctx.dtype = layer, x.dtype
        return matmul(x_q, layer.w, x.dtype, add=residual)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x_q, dy_q = Quantized(*ctx.saved_tensors, (1, ALL)), norm_rows(dy, "none")
        dx, dw = linear_backward(dy_q, x_q, ctx.layer, ctx.dtype, lambda: dy)
        return dx, dy, dw, None


class NormSwiGLUResidual(torch.autograd.Function):
    """Compute x + down(silu(gate(norm(x))) * up(norm(x))) of x (T, d): the second half of a block.

    It is one function because autograd would want the gradient of [gate, up] in BF16 between two functions. Here the
    kernel that computes it writes FP8, and the products read that.
    Saved for the backward pass: x, and in FP8 norm(x), [gate, up] and silu(gate) * up.
    """

    @staticmethod
    def forward(ctx, x, norm_weight, gate_up_weight, down_weight, gate_up, down, kind):
        x_q = quantize_rows(x, gate_up, kind, norm_weight)
        h = matmul(x_q, gate_up.w, x.dtype)                                            # (T, 2 ffn)
        a_q, h_q = swiglu_rows(h)                                                      # (T, ffn), (T, 2 ffn)
        watch(down, lambda: swiglu(h[:WATCHED].float()))
        ctx.save_for_backward(x, norm_weight, *(t for q in (x_q, h_q, a_q) for t in (q.data, q.scale)))
        ctx.layers, ctx.kind = (gate_up, down), kind
        return matmul(a_q, down.w, x.dtype, add=x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x, norm_weight, *saved), (gate_up, down) = ctx.saved_tensors, ctx.layers
        x_q, h_q, a_q = (Quantized(*saved[i:i + 2], (1, ALL)) for i in (0, 2, 4))
        da, dw_down = linear_backward(norm_rows(dy, "none"), a_q, down, x.dtype, lambda: dy)
        dh_q = swiglu_backward(h_q, da)                                                # (T, 2 ffn)
        dx, dw_gate_up = linear_backward(dh_q, x_q, gate_up, x.dtype, lambda: swiglu_gradient(
            Quantized(h_q.data[:WATCHED], h_q.scale[:WATCHED], (1, ALL)).dequantize(), da[:WATCHED]))
        return *norm_backward(dx, x, norm_weight, ctx.kind, dy), dw_gate_up, dw_down, None, None, None


def quantize_rows(x, layer, kind="none", norm_weight=None):
    """Return Quantized norm(x), a power of two per token, of x (T, width): what `layer` reads."""
    if norm_weight is not None:
        norm_weight = norm_weight.to(x.dtype)   # Norm rounds it, too
    watch(layer, lambda: NORMS[kind](x[:WATCHED].float(), None if norm_weight is None else norm_weight.float()))
    return norm_rows(x, kind, norm_weight)


def linear_backward(dy, x, layer, dtype, dy_rows):
    """Return dX (T, K) and dW (N, K) of a layer, of Quantized dY (T, N) and X (T, K).

    dW is None if the weight is frozen, and if wgrad has added it to weight.grad itself: that reads and writes 8 bytes per
    weight, where writing dW and adding it in another kernel takes 16.
    dy_rows(): the first rows of dY as they were before quantizing. It is called only while the log watches.
    """
    watch(layer, dy_rows, "_grad")
    dx = matmul(dy, layer.w_t, dtype, promote=True)
    if not layer.weight.requires_grad:
        return dx, None
    watch_wgrad(layer, dy, x)
    grad = layer.weight.grad if layer.accumulates else None
    dw = matmul(*transpose_for_wgrad(dy, x), layer.weight.dtype, promote=True, add=grad, out=grad)
    return dx, dw if grad is None else None


@compiled
def norm_backward(dy, x, weight, kind, d_residual):
    """Return dx + d_residual (T, d) and d weight (d) or None, of y = norm(x) weight, for dy (T, d).

        x_hat = (x - mean) / deviation,  g = dy weight,  dx = (g - mean(g) - x_hat mean(g x_hat)) / deviation

    In float32. RMSNorm subtracts no mean: there mean and mean(g) are 0.
    """
    dtype, centered = dy.dtype, kind == "layer"
    x, dy = x.float(), dy.float()
    x = x - x.mean(-1, keepdim=True) if centered else x
    inverse = (x.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
    x_hat = x * inverse
    d_weight = None if weight is None else (dy * x_hat).sum(0)
    g = dy if weight is None else dy * weight.to(dtype).float()   # the forward pass rounds it, too
    dx = g - x_hat * (g * x_hat).mean(-1, keepdim=True)
    dx = dx - g.mean(-1, keepdim=True) if centered else dx
    return (dx * inverse + d_residual.float()).to(dtype), d_weight


# ---------------------------------------------------------------------------------------------------
# What the log says about the scales of a layer

WATCHED = 256   # the first rows of X and dY, of which shares are counted


def watch(layer, rows, suffix=""):
    """Record which shares of the values of X, or with suffix "_grad" of dY, saturate and are changed by folding a row.

    rows() returns X or dY (T, width) before quantizing. (In dY of gate_up folding changes a few more values than this
    counts, because `swiglu_backward` takes its scales from a bound.)
    """
    if layer.health is None:
        return
    x = rows()[:WATCHED].float()
    fmt = FORMATS[layer.recipe.grad_format] if suffix else E4M3
    x_q = quantize(x, fmt, layer.recipe.act_block, layer.recipe.rule)
    layer.health["saturated" + suffix] = saturated_share(x, x_q)
    if layer.recipe.act_block == (1, ALL):
        layer.health["folded" + suffix] = fold_loss(x, fmt)[0]


def watch_wgrad(layer, dy, x):
    """Record which share of the values of Quantized dY (T, N) the fold across tokens changes, which wgrad needs."""
    if layer.health is None:
        return
    factor, _ = wgrad_factor(dy, x)
    folded = uncast(dy.data[:WATCHED]) * factor[:WATCHED]
    layer.health["folded_wgrad"] = (uncast(cast(folded, format_of(dy.data))) != folded).float().mean()


def watch_layer(layer, x, y):
    """Record all of it for a layer that is not fused, once the gradient of its output y is there."""
    if layer.health is None:
        return
    x, recipe = x.detach().flatten(0, -2), layer.recipe
    watch(layer, lambda: x)

    def watch_gradient(dy):
        dy = dy.flatten(0, -2)
        watch(layer, lambda: dy, "_grad")
        if recipe.act_block == (1, ALL) and layer.weight.requires_grad:
            watch_wgrad(layer, *(quantize(z, fmt, recipe.act_block, recipe.rule)
                                 for z, fmt in ((dy, FORMATS[recipe.grad_format]), (x, E4M3))))
    if y.requires_grad:
        y.register_hook(watch_gradient)


def first_rows(*tensors):
    """Return the parts of tensors (B, T, ...) that hold the first WATCHED rows (B T, ...)."""
    return (z[:cdiv(WATCHED, z.shape[1]), :WATCHED] for z in tensors)


# ---------------------------------------------------------------------------------------------------
# The loss

@compiled
def loss_and_gradient_(logits, targets, count):
    """Return the sum of -log p[target] of logits (T, vocab); replace them by their gradient, (p - onehot) / count."""
    z = logits.float()
    log_sum = z.logsumexp(-1, keepdim=True)
    loss = (log_sum - z.gather(1, targets[:, None])).sum()
    hit = torch.arange(z.shape[1], device=z.device) == targets[:, None]
    logits.copy_(((z - log_sum).exp() - hit.float()) / count)
    return loss


@compiled
def scaled(x, factor):
    """Return x times factor, rounded once. (A GPU rounds the factor to BF16 first: 1/3 would be off by 0.2%.)"""
    return (x.float() * factor).to(x.dtype)


class HeadLoss(torch.autograd.Function):
    """Compute the mean cross-entropy of x W^T, of x (T, d), W (vocab, d) and targets (T), in FP32.

    It takes `CHUNK` tokens at a time, computes the gradient of their logits along with the loss, and writes it over
    the logits, in the dtype of x. For 16384 tokens and 50304 words that is 1.5 GiB in BF16. PyTorch's cross-entropy
    keeps the logits and what it computes of them in FP32: 9 GiB.
    """
    CHUNK = 4096

    @staticmethod
    @torch.compiler.disable(recursive=False)
    def forward(ctx, x, weight, targets, training):
        w, total = weight.to(x.dtype), torch.zeros((), device=x.device)
        logits = x.new_empty(len(x) if training else min(len(x), HeadLoss.CHUNK), len(w))
        for i in range(0, len(x), HeadLoss.CHUNK):
            rows = x[i:i + HeadLoss.CHUNK]
            part = logits[i:i + len(rows)] if training else logits[:len(rows)]
            torch.mm(rows, w.t(), out=part)
            total += loss_and_gradient_(part, targets[i:i + len(rows)], len(x))
        ctx.save_for_backward(x, weight, logits)
        return total / len(x)

    @staticmethod
    @torch.compiler.disable(recursive=False)
    def backward(ctx, dloss):
        if torch.is_grad_enabled():   # create_graph=True
            raise RuntimeError("the loss has no second derivative, which create_graph=True asks for: take the loss of "
                               "the logits that a model without targets returns, under --fp8 none")
        x, weight, gradient = ctx.saved_tensors
        return scaled(gradient @ weight.to(x.dtype), dloss), (gradient.t() @ x).to(weight.dtype) * dloss, None, None


@torch.compiler.disable(recursive=False)   # a model that is compiled whole leaves this as it is
def head_loss(x, weight, targets):
    """Return the loss of HeadLoss. ValueError if targets are not one int64 per row of x, on its device."""
    if (targets.shape, targets.dtype, targets.device) != (x.shape[:1], torch.int64, x.device):
        raise ValueError(f"targets {tuple(targets.shape)} are {targets.dtype} on {targets.device}: {len(x)} of "
                         f"torch.int64 on {x.device} are needed, one for each token")
    return HeadLoss.apply(x, weight, targets, torch.is_grad_enabled())   # inside of it, gradients are always off


# ---------------------------------------------------------------------------------------------------
# Counting. All of it is read from the layers of a model, which may live on the meta device (no memory)

def parameter_count(model):
    """Return (parameters in the linear layers of the blocks, all parameters)."""
    return sum(layer.weight.numel() for layer in model.linears()), sum(p.numel() for p in model.parameters())


def flops_per_token(model):
    """Return the FLOPs of training on a token: 6 per weight of a matrix product (2 forward, 4 backward), and attention.

    Causal attention: a token looks at seq / 2 others on average. For each, score and weighted value cost 2 d each in the
    forward pass and 4 d each in the backward pass: 6 d seq per layer. The embedding is a look-up and counts nothing.
    """
    products = sum(m.weight.numel() for m in model.modules() if isinstance(m, (Linear, nn.Linear)))
    return 6 * products + 6 * len(model.blocks) * model.config.d * model.config.seq


def memory(model, tokens, ranks=1, element=2):
    """Return the bytes of a training step over this many tokens, by use; `element` bytes per BF16 activation.

    Every recipe keeps FP32 weights, gradients and two Adam moments: 16 bytes per parameter. With ranks > 1 (train.py
    --shard) a rank keeps its share of the moments and of the FP32 weights of the blocks' linear layers. `copies` are what
    the matrix products read: W and W^T in FP8, or W in BF16. `activations` are what is saved for the backward pass: that
    of the blocks (`saved_by_block`; with recompute = "block" their inputs, and one block at a time), and once per token
    the input and output of the final norm, 2 d, and the gradient of the logits, vocab.
    """
    linear, total = parameter_count(model)
    vocab, d = model.head.weight.shape
    copies = element * vocab * d
    for layer in model.linears():
        each = 2 * quantized_bytes(layer.recipe.weight_block, layer.recipe.rule) if layer.recipe else element
        copies += each * layer.weight.numel()
    saved = [saved_by_block(block, element) for block in model.blocks]
    blocks = element * d * (len(saved) - 1) + max(saved) if model.recompute == "block" else sum(saved)
    return {"weights": 4 * (total - linear + linear / ranks), "copies": copies, "gradients": 4 * total,
            "optimizer": 8 * total / ranks, "activations": tokens * (blocks + element * (2 * d + vocab))}


def saved_by_block(block, element):
    """Return the bytes per token that a block saves for the backward pass.

        all, in BF16               block input d; q, k and v d + 2 kv; attention output d; input of the second half d
        but for moss, in BF16      q and k before RoPE d + kv; gate and up 2 ffn; silu(gate) ffn
        moss, in FP8               gate and up 2 ffn
        inputs of linear layers    qkv d, out d, gate_up d, down ffn: in FP8, or in BF16 (that of out is the attention
                                   output, which is saved anyway)
    """
    qkv, out, *hidden, down = layers = [m for m in block.modules() if isinstance(m, Linear)]
    inputs, hidden = sum(m.weight.shape[1] for m in layers), sum(m.weight.shape[0] for m in hidden)
    (width, d), ffn, recipe = qkv.weight.shape, down.weight.shape[1], qkv.recipe
    always = element * (3 * d + width)
    if block.fused:
        return always + inputs + hidden
    layerwise = always + element * (width - block.config.kv_dim + hidden + ffn)
    if recipe:
        return layerwise + inputs * quantized_bytes(recipe.act_block, recipe.rule)
    return layerwise + element * (inputs - out.weight.shape[1])


def quantized_bytes(block, rule):
    """Return the bytes per value in FP8 with its share of its block's scale, which is one byte in E8M0 and else four."""
    return 1.0 if ALL in block else 1 + (1 if stores_e8m0(block, rule) else 4) / (block[0] * block[1])


if __name__ == "__main__":
    rows = [(fp8, fp8, "none", 1) for fp8 in RECIPES]
    for name, config in PRESETS.items():
        for row, fp8, recompute, ranks in rows + [("moss, block", "moss", "block", 1), ("moss, 8 GPUs", "moss", "none", 8)]:
            with torch.device("meta"):
                model = Transformer(config, fp8, recompute)
            use = memory(model, config.seq, ranks)
            if row == "none":
                print(f"{name}: {parameter_count(model)[1]:,} parameters, {flops_per_token(model) / 1e9:.2f} GFLOP per "
                      f"token; GiB for one sequence of {config.seq}:")
                print(f"    {'':12}" + "".join(f"{key:>13}" for key in use) + f"{'total':>13}")
            print(f"    {row:12}" + "".join(f"{v / 2**30:13.3f}" for v in (*use.values(), sum(use.values()))))
        print()
