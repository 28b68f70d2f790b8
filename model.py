"""
The model: a decoder like LLaMA and OLMo, whose linear layers can run in FP8.

    python model.py             # parameters, FLOPs and memory of every preset under every recipe

    x = embed(tokens)
    for each block:   x = x + out(attention(rope(qkv(norm(x)))))        (linear layers: qkv, out)
                      x = x + down(silu(gate(norm(x))) * up(norm(x)))   (linear layers: gate_up, down)
    logits = head(norm(x))

The four linear layers of a block hold 94% of the parameters of OLMo-7B and do 93% of its arithmetic: they
are what a recipe quantises. Embedding, norms, attention and head stay in BF16 (FP32 on a CPU); the weights that
the optimizer sees are FP32.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from fp8_formats import E4M3, FORMATS
from gemm_kernel import fp8_linear
from microscale import ALL, RECIPES, fold_loss, quantize, quantize_weight, saturated_share


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


PRESETS = {
    "nano": ModelConfig(vocab=256, seq=128, d=128, layers=4, heads=4, ffn=384),
    "124m": ModelConfig(vocab=50304, seq=1024, d=768, layers=12, heads=12, ffn=2048, tied=True),
    "1b": ModelConfig(vocab=50304, seq=2048, d=2048, layers=16, heads=16, ffn=8192, norm="layer", tied=True),
    "olmo-7b": ModelConfig(vocab=50304, seq=2048, d=4096, layers=32, heads=32, ffn=11008, norm="layer"),
    "llama2-7b": ModelConfig(vocab=32000, seq=4096, d=4096, layers=32, heads=32, ffn=11008),
}


# ---------------------------------------------------------------------------------------------------
# Layers

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
        self.w = self.w_t = None   # FP8 copies of the weight, `quantize_weight`, one per optimizer step
        self.health = None         # a dict while the health of this layer's scales is being watched

    def requantize(self, scale=None):
        """Makes the FP8 copies from the master weight; `scale` () float32 for recipes with one per tensor."""
        if self.recipe:
            scale = None if scale is None else scale.detach().view(1, 1)
            self.w, self.w_t = quantize_weight(self.weight.detach(), self.recipe, scale)

    def forward(self, x):
        if not self.recipe:
            return F.linear(x, self.weight.to(x.dtype))
        y = fp8_linear(x, self.weight, self.w, self.w_t, self.recipe)
        if self.health is not None:
            self.watch(x, "")
            if y.requires_grad:
                y.register_hook(lambda dy: self.watch(dy, "_grad"))
        return y

    def watch(self, x, suffix, rows=256):
        """Records which shares of the first rows of X or dY are cut off at the top and changed by folding."""
        if self.health is None:
            return
        x = x.detach().reshape(-1, x.shape[-1])[:rows]
        fmt = FORMATS[self.recipe.grad_format] if suffix else E4M3
        x_q = quantize(x, fmt, self.recipe.act_block, self.recipe.rule)
        self.health["saturated" + suffix] = saturated_share(x, x_q, fmt)
        if self.recipe.name == "moss":
            self.health["folded" + suffix] = fold_loss(x, fmt)[0]

    def extra_repr(self):
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, fp8={self.recipe or 'none'}"


class Norm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.rms, self.shape = config.norm == "rms", (config.d,)
        self.weight = nn.Parameter(torch.ones(config.d)) if self.rms else None

    def forward(self, x):
        if self.rms:
            return F.rms_norm(x, self.shape, self.weight.to(x.dtype), eps=1e-5)
        return F.layer_norm(x, self.shape, eps=1e-5)


def rope_table(seq, head_dim, theta, device):
    """cos and sin (seq, head_dim / 2), float32: position t turns pair i by the angle t theta^(-2 i / head_dim)."""
    rates = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(seq, device=device, dtype=torch.float32), rates)
    return angles.cos(), angles.sin()


def rope(x, cos, sin):
    """Turns the pairs (x_i, x_{i + head_dim/2}) of x (B, T, heads, head_dim) by the angle of their position."""
    cos, sin = cos[:, None, :].to(x.dtype), sin[:, None, :].to(x.dtype)   # (T, 1, head_dim / 2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, config, recipe, name):
        super().__init__()
        self.config = config
        self.qkv = Linear(config.d, config.d + 2 * config.kv_dim, recipe, f"{name}.qkv")
        self.out = Linear(config.d, config.d, recipe, f"{name}.out")

    def forward(self, x, cos, sin):
        (B, T, _), c = x.shape, self.config
        q, k, v = self.qkv(x).split((c.d, c.kv_dim, c.kv_dim), dim=-1)
        q, k, v = (z.view(B, T, -1, c.head_dim) for z in (q, k, v))       # (B, T, heads, head_dim)
        q, k, v = (z.transpose(1, 2) for z in (rope(q, cos, sin), rope(k, cos, sin), v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return self.out(y.transpose(1, 2).reshape(B, T, c.d))


class SwiGLU(nn.Module):
    def __init__(self, config, recipe, name):
        super().__init__()
        self.gate_up = Linear(config.d, 2 * config.ffn, recipe, f"{name}.gate_up")
        self.down = Linear(config.ffn, config.d, recipe, f"{name}.down")

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config, recipe, name):
        super().__init__()
        self.norm1, self.attention = Norm(config), Attention(config, recipe, f"{name}.attention")
        self.norm2, self.ffn = Norm(config), SwiGLU(config, recipe, f"{name}.ffn")

    def forward(self, x, cos, sin):
        x = x + self.attention(self.norm1(x), cos, sin)
        return x + self.ffn(self.norm2(x))


class Transformer(nn.Module):
    """tokens (B, T) int64 -> logits (B, T, vocab); with targets (B, T) -> the mean cross-entropy in nats."""

    def __init__(self, config, fp8="none"):
        super().__init__()
        if fp8 not in RECIPES:
            raise ValueError(f"recipe {fp8!r} is unknown: choose one of {', '.join(RECIPES)}")
        self.config, self.recipe = config, RECIPES[fp8]
        self.embed = nn.Embedding(config.vocab, config.d)
        self.blocks = nn.ModuleList(Block(config, self.recipe, f"blocks.{i}") for i in range(config.layers))
        self.norm = Norm(config)
        self.head = Linear(config.d, config.vocab, None, "head")   # no recipe: never quantised
        if config.tied:
            self.head.weight = self.embed.weight
        self.rope = None
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
        """The layers that the recipe quantises, in the order of the forward pass."""
        return [m for m in self.blocks.modules() if isinstance(m, Linear)]

    def forward(self, tokens, targets=None):
        if self.rope is None or self.rope[0].device != tokens.device:
            self.rope = rope_table(self.config.seq, self.config.head_dim, self.config.rope_theta, tokens.device)
        cos, sin = (table[:tokens.shape[1]] for table in self.rope)
        x = self.embed(tokens).to(torch.bfloat16 if tokens.is_cuda else torch.float32)   # (B, T, d)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = self.head(self.norm(x))                                                 # (B, T, vocab)
        if targets is None:
            return logits
        return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.reshape(-1))

    @torch.no_grad()
    def generate(self, tokens, count, temperature=0.8, generator=None):
        """tokens (1, T) -> (1, T + count), sampled one at a time from the last `seq` tokens."""
        for _ in range(count):
            logits = self(tokens[:, -self.config.seq:])[:, -1].float() / temperature
            token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            tokens = torch.cat((tokens, token), dim=1)
        return tokens


# ---------------------------------------------------------------------------------------------------
# Counting

def parameter_count(c):
    """(parameters in the quantised linear layers, all parameters)."""
    linear = c.layers * (c.d * (c.d + 2 * c.kv_dim) + c.d * c.d + 3 * c.d * c.ffn)
    norms = (2 * c.layers + 1) * c.d if c.norm == "rms" else 0
    return linear, linear + norms + c.vocab * c.d * (1 if c.tied else 2)


def flops_per_token(c, seq=None):
    """Training FLOPs per token: 6 per weight of a matrix product (2 forward, 4 backward), and causal attention.

    Attention: a token looks at seq / 2 others on average; scores and weighted values cost 4 d each forward, and
    twice that backward: 6 layers d seq. The embedding is a look-up and counts nothing.
    """
    linear, _ = parameter_count(c)
    return 6 * (linear + c.vocab * c.d) + 6 * c.layers * c.d * (seq or c.seq)


def memory(c, fp8, tokens, element=2):
    """Bytes of a training step over this many tokens, by use; `element` bytes per BF16 activation.

    Every recipe keeps FP32 weights, gradients and two Adam moments: 16 bytes per parameter. `copies` are what the
    matrix products read: W and W^T in FP8, or W in BF16. `activations` are what waits for the backward pass:

        in BF16 under all recipes      block input d, qkv d + 2 kv, q and k after RoPE d + kv, attention output d,
                                       input of the second half d, gate and up 2 ffn, silu(gate) ffn
        inputs of the linear layers    d, d, d, ffn: in FP8, or in BF16 (the third is the attention output, kept anyway)
        per token, once                final norm's input and output 2 d, probabilities vocab in FP32
    """
    linear, total = parameter_count(c)
    recipe = RECIPES[fp8]
    layer = element * (5 * c.d + 3 * c.kv_dim + 3 * c.ffn)
    if recipe:
        layer += quantized_bytes(recipe.act_block) * (3 * c.d + c.ffn)
        copies = 2 * quantized_bytes(recipe.weight_block) * linear
    else:
        layer += element * (2 * c.d + c.ffn)
        copies = element * linear
    per_token = c.layers * layer + element * 2 * c.d + 4 * c.vocab
    return {"weights": 4 * total, "copies": copies + element * c.vocab * c.d, "gradients": 4 * total,
            "optimizer": 8 * total, "activations": tokens * per_token}


def quantized_bytes(block):
    """Bytes per value in FP8 with its share of a block's scale: 1 for E8M0 per 32, 4 for FP32 per 128 or 128 x 128."""
    if ALL in block:
        return 1.0
    return 1 + (1 if block[1] == 32 else 4) / (block[0] * block[1])


def main():
    for name, c in PRESETS.items():
        _, total = parameter_count(c)
        print(f"{name}: {total:,} parameters, {flops_per_token(c) / 1e9:.2f} GFLOP per token; "
              f"GiB for one sequence of {c.seq}:")
        print(f"    {'':8}" + "".join(f"{use:>13}" for use in memory(c, "none", c.seq)) + f"{'total':>13}")
        for fp8 in RECIPES:
            use = memory(c, fp8, c.seq)
            print(f"    {fp8:8}" + "".join(f"{v / 2**30:13.3f}" for v in (*use.values(), sum(use.values()))))
        print()


if __name__ == "__main__":
    main()
