"""
The model: a decoder like LLaMA and OLMo, whose linear layers can run in FP8.

    python model.py             # parameters, FLOPs and memory of every preset under every recipe

    x = embed(tokens)
    for each block:   x = x + out(attention(rope(qkv(norm(x)))))        (linear layers: qkv, out)
                      x = x + down(silu(gate(norm(x))) * up(norm(x)))   (linear layers: gate_up, down)
    logits = head(norm(x))

The four linear layers of a block hold 94% of the parameters of OLMo-7B and do 93% of its arithmetic: they
are what a recipe quantizes. Embedding, norms, attention and head stay in BF16 (FP32 on a CPU); the weights that
the optimizer sees are FP32.

`moss` computes a block in three pieces, each with its own backward pass (below: "The dataflow of moss"), so that most
numbers become FP8 in the kernel that makes them, and only FP8 waits for the backward pass where FP8 will do.
The other recipes quantize what PyTorch's norm, attention and SwiGLU hand to each linear layer.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from fp8_formats import E4M3, FORMATS
from gemm_kernel import fp8_linear, matmul, transpose_for_wgrad
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
        kv_heads = self.kv_heads or self.heads
        for name, value, divisor in (("d", self.d, 2 * self.heads), ("heads", self.heads, kv_heads)):
            if value % divisor:
                raise ValueError(f"{name} = {value} must be a multiple of {divisor}: "
                                 f"choose another {name}, heads or kv_heads (heads {self.heads}, kv_heads {kv_heads})")
        if self.norm not in ("rms", "layer"):
            raise ValueError(f"norm {self.norm!r} is unknown: choose 'rms' or 'layer'")

    @property
    def head_dim(self):
        return self.d // self.heads

    @property
    def kv_dim(self):
        return (self.kv_heads or self.heads) * self.head_dim


RECOMPUTE = ("none", "block")

PRESETS = {
    "nano": ModelConfig(vocab=256, seq=128, d=128, layers=4, heads=4, ffn=384),
    "124m": ModelConfig(vocab=50304, seq=1024, d=768, layers=12, heads=12, ffn=2048, tied=True),
    "1b": ModelConfig(vocab=50304, seq=2048, d=2048, layers=16, heads=16, ffn=8192, norm="layer", tied=True),
    "olmo-7b": ModelConfig(vocab=50304, seq=2048, d=4096, layers=32, heads=32, ffn=11008, norm="layer"),
    "llama2-7b": ModelConfig(vocab=32000, seq=4096, d=4096, layers=32, heads=32, ffn=11008),
}


# ---------------------------------------------------------------------------------------------------
# Layers

WATCHED = 256   # rows of X and dY that the log's shares are counted in

# What has no kernel of ours is left to torch.compile. torch.compiler.set_stance("force_eager") switches that off.
compiled = partial(torch.compile, dynamic=False) if torch.cuda.is_available() else lambda function: function


class Linear(nn.Module):
    """y = x W^T without bias, computed as the recipe says. W (out, in) is the FP32 master weight."""

    def __init__(self, d_in, d_out, recipe, name):
        super().__init__()
        for axis, size in (("in", d_in), ("out", d_out)):
            if recipe and size % 16:
                raise ValueError(f"layer {name}: {axis} = {size} is not a multiple of 16, which --fp8 {recipe} "
                                 f"needs to tile it: change d, ffn or the heads, or train with --fp8 none")
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.name, self.recipe = name, recipe
        self.copies = self.made_of = None   # FP8 W and W^T, made once per optimizer step, and of which weight
        self.accumulates = False   # `moss`: wgrad adds to weight.grad itself; hooks of autograd do not see it
        self.health = None         # a dict while the health of this layer's scales is being watched
        self.register_load_state_dict_post_hook(Linear.forget_copies)

    def forget_copies(self, _=None):
        """They are those of other weights now: the model asks for `requantize`."""
        self.copies = None

    def requantize(self, scale=None):
        """Makes the FP8 copies from the master weight; `scale` () float32 for recipes with one per tensor."""
        if self.recipe:
            scale = None if scale is None else scale.detach().view(1, 1)
            self.set_copies(quantize_weight(self.weight.detach(), self.recipe, scale))

    def set_copies(self, copies):
        """Takes FP8 (W, W^T) as those of the weight as it is now."""
        self.copies, self.made_of = copies, (self.weight.data_ptr(), self.weight._version)

    def current_copies(self):
        """Returns FP8 (W, W^T). RuntimeError if the weight has changed since they were made."""
        if self.copies is None or self.made_of != (self.weight.data_ptr(), self.weight._version):
            raise RuntimeError(f"layer {self.name}: its weight has no FP8 copies, or has changed since they were made: "
                               f"call requantize() of each of model.linears() after every change of weights")
        return self.copies

    w = property(lambda self: self.current_copies()[0])     # (out, in), for fprop
    w_t = property(lambda self: self.current_copies()[1])   # (in, out), for dgrad

    def forward(self, x):
        if not self.recipe:
            return F.linear(x, self.weight.to(x.dtype))
        y = fp8_linear(x, self.weight, self.w, self.w_t, self.recipe)
        self.watch(x, "")
        if self.health is not None and y.requires_grad:
            y.register_hook(lambda dy: self.watch(dy, "_grad"))
        return y

    def watch(self, x, suffix, make=lambda rows: rows):
        """Records which shares of X, or with suffix "_grad" of dY, saturate and are changed by folding, in the first
        WATCHED rows of make(x). (In dY of gate_up it changes a few more: `swiglu_backward` scales by a bound.)"""
        if self.health is None:
            return
        x = make(x.detach().reshape(-1, x.shape[-1])[:WATCHED].float())
        fmt = FORMATS[self.recipe.grad_format] if suffix else E4M3
        x_q = quantize(x, fmt, self.recipe.act_block, self.recipe.rule)
        self.health["saturated" + suffix] = saturated_share(x, x_q)
        if self.recipe.act_block == (1, ALL):
            self.health["folded" + suffix] = fold_loss(x, fmt)[0]

    def extra_repr(self):
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, fp8={self.recipe or 'none'}"


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
    """qkv (B, T, d + 2 kv_dim) -> q (B, T, heads, head_dim) and k, turned, and v (B, T, kv_heads, head_dim)."""
    q, k, v = (z.unflatten(-1, (-1, head_dim)) for z in qkv.split((d, kv_dim, kv_dim), dim=-1))
    return rope(q, cos, sin), rope(k, cos, sin), v


compiled_swiglu = compiled(swiglu)


def rope_table(seq, head_dim, theta, device=None):
    """cos and sin (seq, head_dim / 2), float32: position t turns pair i by the angle t theta^(-2 i / head_dim)."""
    rates = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(seq, device=device, dtype=torch.float32), rates)
    return angles.cos(), angles.sin()


def attention(q, k, v, cache=None):
    """q (B, T, heads, head_dim), k and v (B, T, kv_heads, head_dim) -> what the heads look up, (B, T, d).

    cache, while a text is being written: a dict with k and v of the tokens before, to which those of these are added.
    """
    causal = not cache   # a single new token sees all that came before
    if cache is not None:
        k, v = (torch.cat((cache[name], z), dim=1) if cache else z for name, z in (("k", k), ("v", v)))
        cache.update(k=k, v=v)
    y = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)), is_causal=causal,
                                       enable_gqa=q.shape[2] != k.shape[2])
    return y.transpose(1, 2).flatten(2)


# ---------------------------------------------------------------------------------------------------
# The dataflow of moss

# The functions below compute this recipe. A block of any other, or of a RECIPES["moss"] that is not equal to it, runs
# layer by layer, as Block.forward reads.
FUSED = Recipe("moss", (1, ALL), (ALL, ALL), rule="up", weight_scale="predicted")


@compiled
def norm_backward(dy, x, weight, kind, d_residual):
    """Of y = norm(x) weight: dy, x, d_residual (T, d), weight (d) or None -> dx + d_residual, d weight or None.

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


def linear_backward(dy_q, x_q, layer, dtype):
    """Quantized dY (T, N), X (T, K) of one layer -> dX (T, K), dW (N, K) or None if it was added to weight.grad, or if
    the weight is frozen.

    For that wgrad reads and writes 8 bytes a weight; writing dW and adding it in a kernel of its own takes 16.
    """
    dx = matmul(dy_q, layer.w_t, dtype, promote=True)
    if not layer.weight.requires_grad:
        return dx, None
    grad = layer.weight.grad if layer.accumulates else None
    dw = matmul(*transpose_for_wgrad(dy_q, x_q), layer.weight.dtype, promote=True, add=grad, out=grad)
    return dx, dw if grad is None else None


def quantize_rows(x, layer, suffix="", kind="none", norm_weight=None):
    """x (T, width) -> Quantized norm(x), one power of two per token, watched for the log as X or dY of `layer`."""
    norm_weight = None if norm_weight is None else norm_weight.to(x.dtype)   # as Norm computes it for other recipes
    layer.watch(x, suffix, lambda rows: NORMS[kind](rows, None if norm_weight is None else norm_weight.float()))
    return norm_rows(x, kind, norm_weight)


class NormQKV(torch.autograd.Function):
    """x (B, T, d) -> q (B, T, heads, head_dim) and k after RoPE, v (B, T, kv_heads, head_dim); and x.

    x is returned, too, for the residual connection: so the gradient that comes back along it arrives here, and is added
    where that of the norm is written. Keeps x; norm(x) in FP8, or makes it again (`recompute`). q, k and v, which
    attention keeps, are one tensor: RoPE turns them in place. Their gradients are turned back where they become FP8.
    """

    @staticmethod
    def forward(ctx, x, norm_weight, weight, cos, sin, layer, config, recompute):
        rows = x.flatten(0, 1)
        x_q = quantize_rows(rows, layer, "", config.norm, norm_weight)
        ctx.save_for_backward(x, norm_weight, cos, sin, *(() if recompute else (x_q.data, x_q.scale)))
        ctx.layer, ctx.kind = layer, config.norm
        qkv = matmul(x_q, layer.w, x.dtype).view(*x.shape[:2], -1, config.head_dim)
        heads = [n // config.head_dim for n in (config.d, config.kv_dim, config.kv_dim)]
        rope_(qkv[:, :, :-heads[2]], cos, sin)   # all heads but those of v
        return *qkv.split(heads, dim=2), x

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk, dv, residual):
        (x, norm_weight, cos, sin, *kept), layer = ctx.saved_tensors, ctx.layer
        rows = x.flatten(0, 1)
        x_q = Quantized(*kept, (1, ALL)) if kept else quantize_rows(rows, layer, "", ctx.kind, norm_weight)
        if layer.health is not None:
            first = (z[:cdiv(WATCHED, x.shape[1]), :WATCHED] for z in (dq, dk, dv))
            layer.watch(qkv_gradient(*first, cos[:WATCHED], sin[:WATCHED]), "_grad")
        dx, dw = linear_backward(rope_backward(dq, dk, dv, cos, sin), x_q, layer, x.dtype)
        dx, d_norm = norm_backward(dx, rows, norm_weight, ctx.kind, residual.flatten(0, 1))
        return dx.view_as(x), d_norm, dw, None, None, None, None, None


class LinearResidual(torch.autograd.Function):
    """x (T, K), residual (T, N) -> residual + x W^T. Keeps x in FP8, or (`recompute`) x, as attention does anyway."""

    @staticmethod
    def forward(ctx, x, residual, weight, layer, recompute):
        x_q = quantize_rows(x, layer)
        ctx.save_for_backward(*((x,) if recompute else (x_q.data, x_q.scale)))
        ctx.layer, ctx.dtype = layer, x.dtype
        return matmul(x_q, layer.w, x.dtype, add=residual)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        kept = ctx.saved_tensors
        x_q = Quantized(*kept, (1, ALL)) if len(kept) == 2 else quantize_rows(*kept, ctx.layer)
        dx, dw = linear_backward(quantize_rows(dy, ctx.layer, "_grad"), x_q, ctx.layer, ctx.dtype)
        return dx, dy, dw, None, None


class NormSwiGLUResidual(torch.autograd.Function):
    """x (T, d) -> x + down(silu(gate(norm(x))) up(norm(x))), the second half of a block.

    One function, so that the gradient of gate and up goes from the kernel that makes it to the products that read it in
    FP8: between two functions autograd would ask for BF16. Keeps x, and in FP8 the inputs of both layers and
    [gate, up]; makes norm(x) again (`recompute`).
    """

    @staticmethod
    def forward(ctx, x, norm_weight, gate_up_weight, down_weight, gate_up, down, kind, recompute):
        x_q = quantize_rows(x, gate_up, "", kind, norm_weight)
        h = matmul(x_q, gate_up.w, x.dtype)                                            # (T, 2 ffn)
        down.watch(h, "", swiglu)
        a_q, h_q = swiglu_rows(h)                                                      # (T, ffn), (T, 2 ffn)
        ctx.save_for_backward(x, norm_weight, h_q.data, h_q.scale, a_q.data, a_q.scale,
                              *(() if recompute else (x_q.data, x_q.scale)))
        ctx.layers, ctx.kind = (gate_up, down), kind
        return matmul(a_q, down.w, x.dtype, add=x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x, norm_weight, *kept), (gate_up, down) = ctx.saved_tensors, ctx.layers
        h_q, a_q, *x_q = (Quantized(*kept[i:i + 2], (1, ALL)) for i in range(0, len(kept), 2))
        da, dw_down = linear_backward(quantize_rows(dy, down, "_grad"), a_q, down, x.dtype)
        dh_q = swiglu_backward(h_q, da)
        if gate_up.health is not None:
            first = Quantized(h_q.data[:WATCHED], h_q.scale[:WATCHED], h_q.block)
            gate_up.watch(swiglu_gradient(first.dequantize(), da[:WATCHED]), "_grad")
        x_q = x_q[0] if x_q else quantize_rows(x, gate_up, "", ctx.kind, norm_weight)
        dx, dw_gate_up = linear_backward(dh_q, x_q, gate_up, x.dtype)
        return *norm_backward(dx, x, norm_weight, ctx.kind, dy), dw_gate_up, dw_down, None, None, None, None


# ---------------------------------------------------------------------------------------------------
# The decoder

class Block(nn.Module):
    """x + out(attention(rope(qkv(norm1(x))))), then x + down(swiglu(gate_up(norm2(x))))."""

    def __init__(self, config, recipe, name, recompute):
        super().__init__()
        self.config, self.fused, self.recompute_act = config, recipe == FUSED, recompute == "act"
        self.norm1, self.norm2 = Norm(config), Norm(config)
        self.qkv = Linear(config.d, config.d + 2 * config.kv_dim, recipe, f"{name}.qkv")
        self.out = Linear(config.d, config.d, recipe, f"{name}.out")
        self.gate_up = Linear(config.d, 2 * config.ffn, recipe, f"{name}.gate_up")
        self.down = Linear(config.ffn, config.d, recipe, f"{name}.down")

    def forward(self, x, cos, sin, cache=None):
        if self.fused:
            return self.forward_moss(x, cos, sin, cache)
        q, k, v = rope_and_split(self.qkv(self.norm1(x)), cos, sin, self.config.d, self.config.kv_dim,
                                 self.config.head_dim)
        x = x + self.out(attention(q, k, v, cache))
        return x + self.down(compiled_swiglu(self.gate_up(self.norm2(x))))

    def forward_moss(self, x, cos, sin, cache):
        (B, T, d), config, recompute = x.shape, self.config, self.recompute_act
        q, k, v, x = NormQKV.apply(x, self.norm1.weight, self.qkv.weight, cos, sin, self.qkv, config, recompute)
        y = attention(q, k, v, cache).view(B * T, d)
        x = LinearResidual.apply(y, x.reshape(B * T, d), self.out.weight, self.out, recompute)
        x = NormSwiGLUResidual.apply(x, self.norm2.weight, self.gate_up.weight, self.down.weight, self.gate_up,
                                     self.down, config.norm, recompute)
        return x.view(B, T, d)


@compiled
def loss_and_gradient_(logits, targets, count):
    """logits (T, vocab), targets (T) -> sum of -log p[target]; logits become their gradient, (p - onehot) / count."""
    z = logits.float()
    log_sum = z.logsumexp(-1, keepdim=True)
    loss = (log_sum - z.gather(1, targets[:, None])).sum()
    hit = torch.arange(z.shape[1], device=z.device) == targets[:, None]
    logits.copy_(((z - log_sum).exp() - hit.float()) / count)
    return loss


@compiled
def scaled(x, factor):
    """x times factor, rounded once. (A GPU rounds the factor to the dtype of x first: in BF16 1/3 is off by 0.2%.)"""
    return (x.float() * factor).to(x.dtype)


class HeadLoss(torch.autograd.Function):
    """x (T, d), W (vocab, d), targets (T) -> mean cross-entropy of x W^T, in FP32 for `CHUNK` tokens at a time.

    The gradient of the logits is made along with the loss, in their place, and kept in the dtype of x: of 16384 tokens
    and 50304 words it is 1.5 GiB in BF16, where PyTorch's cross-entropy holds the logits, and what it makes of them, in
    FP32: 9 GiB.
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
    return HeadLoss.apply(x, weight, targets, torch.is_grad_enabled())   # inside of it, gradients are always off


class Transformer(nn.Module):
    """tokens (B, T) int64 -> logits (B, T, vocab); with targets (B, T) -> the mean cross-entropy in nats.

    recompute  what is made again in the backward pass instead of being kept: "none"; "act", of `moss` the FP8 inputs
               of qkv, out and gate_up, from what norms and attention keep in BF16 anyway; "block", all but x
    """

    def __init__(self, config, fp8="none", recompute="none"):
        super().__init__()
        if fp8 not in RECIPES:
            raise ValueError(f"recipe {fp8!r} is unknown: choose one of {', '.join(RECIPES)}")
        if recompute not in RECOMPUTE:
            raise ValueError(f"recompute {recompute!r} is unknown: choose one of {', '.join(RECOMPUTE)}")
        self.config, self.recipe, self.recompute = config, RECIPES[fp8], recompute
        self.embed = nn.Embedding(config.vocab, config.d)
        self.blocks = nn.ModuleList(Block(config, self.recipe, f"blocks.{i}", recompute) for i in range(config.layers))
        self.norm = Norm(config)
        self.head = Linear(config.d, config.vocab, None, "head")   # no recipe: never quantized
        if config.tied:
            self.head.weight = self.embed.weight
        self.rope = rope_table(config.seq, config.head_dim, config.rope_theta)   # no buffers: DDP would send them
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Normal with deviation 0.02; the layers that write to the residual stream 1 / sqrt(2 layers) of that."""
        nn.init.normal_(self.embed.weight, std=0.02)
        if not self.config.tied:
            nn.init.normal_(self.head.weight, std=0.02)
        for layer in self.linears():
            writes_residual = layer.name.endswith((".out", ".down"))
            nn.init.normal_(layer.weight, std=0.02 / (2 * self.config.layers) ** 0.5 if writes_residual else 0.02)

    def linears(self):
        """The linear layers of the blocks, which the recipe quantizes, in the order of the forward pass."""
        return [m for m in self.blocks.modules() if isinstance(m, Linear)]

    def forward(self, tokens, targets=None, caches=None):
        """tokens (B, T) -> logits (B, T, vocab), or with targets (B, T) the mean loss in nats per token.

        caches: an empty dict per block, which keep the keys and values of these tokens for the ones that follow.
        Raises ValueError for more tokens than the model reads, RuntimeError before FP8 weights were made.
        """
        T, start = tokens.shape[1], caches[0]["k"].shape[1] if caches and caches[0] else 0
        if start + T > self.config.seq:
            raise ValueError(f"{start + T} tokens: this model reads at most {self.config.seq}, its config.seq")
        if start and T > 1:
            raise ValueError(f"{T} tokens after {start} in the cache: they would see each other; pass one at a time")
        if self.rope[0].device != tokens.device:
            self.rope = tuple(table.to(tokens.device) for table in self.rope)
        cos, sin = (table[start:start + T] for table in self.rope)
        x = self.embed(tokens).to(torch.bfloat16 if tokens.is_cuda else torch.float32)   # (B, T, d)
        for i, block in enumerate(self.blocks):
            if self.recompute == "block" and torch.is_grad_enabled() and not caches:
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin, caches[i] if caches else None)
        x = self.norm(x)
        if targets is None:
            return self.head(x)                                                          # (B, T, vocab)
        return head_loss(x.flatten(0, 1), self.head.weight, targets.flatten())

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")   # every length would be compiled anew
    def generate(self, tokens, count, temperature=0.8, generator=None):
        """tokens (1, T) -> (1, T + count), sampled one at a time. Keys and values of earlier tokens are kept; when they
        reach the longest sequence, the second half of it begins a new one."""
        caches, new = [{} for _ in self.blocks], tokens[:, -self.config.seq:]
        for _ in range(count):
            if caches[0] and caches[0]["k"].shape[1] == self.config.seq:
                caches, new = [{} for _ in self.blocks], tokens[:, -(self.config.seq + 1) // 2:]
            logits = self(new, caches=caches)[:, -1].float() / temperature
            new = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            tokens = torch.cat((tokens, new), dim=1)
        return tokens


# ---------------------------------------------------------------------------------------------------
# Counting

def parameter_count(c):
    """(parameters in the quantized linear layers, all parameters)."""
    linear = c.layers * (c.d * (c.d + 2 * c.kv_dim) + c.d * c.d + 3 * c.d * c.ffn)
    norms = (2 * c.layers + 1) * c.d if c.norm == "rms" else 0
    return linear, linear + norms + c.vocab * c.d * (1 if c.tied else 2)


def flops_per_token(c):
    """Training FLOPs per token: 6 per weight of a matrix product (2 forward, 4 backward), and causal attention.

    Attention: a token looks at seq / 2 others on average. For each, score and weighted value cost 2 d each forward, and
    4 d each backward: 6 d seq in every layer. The embedding is a look-up and counts nothing.
    """
    linear, _ = parameter_count(c)
    return 6 * (linear + c.vocab * c.d) + 6 * c.layers * c.d * c.seq


def memory(c, fp8, tokens, element=2, recompute="none", ranks=1):
    """Bytes of a training step over this many tokens, by use; `element` bytes per BF16 activation.

    Every recipe keeps FP32 weights, gradients and two Adam moments: 16 bytes per parameter. With ranks > 1 (train.py
    --shard) a rank keeps its share of the moments and of the quantized layers' FP32 weights. `copies` are what the
    matrix products read: W and W^T in FP8, or W in BF16. `activations` are what waits for the backward pass:

        all, in BF16               block input d; q, k and v d + 2 kv; attention output d; input of the second half d
        but for moss, in BF16      q and k before RoPE d + kv; gate and up 2 ffn; silu(gate) ffn
        moss, in FP8               gate and up 2 ffn
        inputs of linear layers    qkv d, out d, gate_up d, down ffn: in FP8, or in BF16 (that of out is the attention
                                   output, kept anyway); of moss with recompute = "act" the last alone
        with recompute = "block"   of all these the block inputs alone, and one block at a time
        per token, once            final norm's input and output 2 d, gradient of the logits vocab
    """
    linear, total = parameter_count(c)
    recipe = RECIPES[fp8]
    layer = element * (4 * c.d + 2 * c.kv_dim)
    if recipe == FUSED:
        layer += (0 if recompute == "act" else 3 * c.d) + 3 * c.ffn
    elif recipe:
        layer += element * (c.d + c.kv_dim + 3 * c.ffn)
        layer += quantized_bytes(recipe.act_block, recipe.rule) * (3 * c.d + c.ffn)
    else:
        layer += element * (3 * c.d + c.kv_dim + 4 * c.ffn)
    copies = 2 * quantized_bytes(recipe.weight_block, recipe.rule) * linear if recipe else element * linear
    layers = element * c.d * (c.layers - 1) + layer if recompute == "block" else c.layers * layer
    per_token = layers + element * (2 * c.d + c.vocab)
    return {"weights": 4 * (total - linear + linear / ranks), "copies": copies + element * c.vocab * c.d,
            "gradients": 4 * total, "optimizer": 8 * total / ranks, "activations": tokens * per_token}


def quantized_bytes(block, rule):
    """Bytes per value in FP8 with its share of its block's scale, which is one byte in E8M0 and else four."""
    return 1.0 if ALL in block else 1 + (1 if stores_e8m0(block, rule) else 4) / (block[0] * block[1])


if __name__ == "__main__":
    for name, c in PRESETS.items():
        _, total = parameter_count(c)
        print(f"{name}: {total:,} parameters, {flops_per_token(c) / 1e9:.2f} GFLOP per token; "
              f"GiB for one sequence of {c.seq}:")
        print(f"    {'':12}" + "".join(f"{use:>13}" for use in memory(c, "none", c.seq)) + f"{'total':>13}")
        for row, fp8, options in [(fp8, fp8, {}) for fp8 in RECIPES] + [
                ("moss, act", "moss", {"recompute": "act"}), ("moss, block", "moss", {"recompute": "block"}),
                ("moss, 8 GPUs", "moss", {"ranks": 8})]:
            use = memory(c, fp8, c.seq, **options)
            print(f"    {row:12}" + "".join(f"{v / 2**30:13.3f}" for v in (*use.values(), sum(use.values()))))
        print()
