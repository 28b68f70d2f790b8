"""
The model: a decoder like LLaMA and OLMo, whose linear layers can run in FP8.

    python model.py             # parameters, FLOPs and memory of every preset under every recipe

    x = embed(tokens)
    for each block:   x = x + out(attention(rope(qkv(norm1(x)))))           linear layers: qkv, out
                      x = x + down(silu(gate(norm2(x))) * up(norm2(x)))     linear layers: gate_up, down
    logits = head(norm(x))

A recipe (microscale.py) quantizes the four linear layers of every block: in OLMo-7B 94% of the parameters
and 93% of the arithmetic. The rest stays in BF16 (FP32 on a CPU). The optimizer sees FP32 weights. In a
mixture of experts, a block has many gate_up and down; a router chooses a few of them for each token. LLaMA,
Mistral (while its window is no shorter than the sequence) and OLMo 1 are such decoders: "Models of others".

Most recipes quantize layer by layer what norm, attention or SwiGLU has computed. In "The dataflow of moss"
below, the kernel that computes a number also quantizes it, if it can. Saved for the backward pass: in FP8
the inputs of the linear layers and [gate, up]; in BF16 the inputs of both halves of a block, q, k, v and the
output of attention.
"""
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint

from fp8_formats import E4M3, FORMATS, cast, uncast
from gemm_kernel import Groups, fp8_linear, grouped_reference, matmul, transpose_for_wgrad, wgrad_factor
from microscale import (ALL, NORM_EPS, NORMS, RECIPES, Quantized, Recipe, block_amax, cdiv, check_name,
                        combine, diffuse, fold_loss, quantize, quantize_norm, quantize_rows, quantize_swiglu,
                        quantize_swiglu_gradient, quantize_weight, rope, rope_into, saturated_share,
                        scale_from_amax, swiglu)


@dataclass(frozen=True)
class ModelConfig:
    seq: int                  # longest sequence
    d: int                    # width of the residual stream
    layers: int
    heads: int
    ffn: int                  # width inside SwiGLU
    vocab: int = 50304        # that of GPT-2 and of OLMo, padded to a multiple of 128
    kv_heads: int = 0         # grouped-query attention: heads share this many keys and values; 0 = heads
    norm: str = "rms"         # "rms": RMSNorm with a weight | "layer": LayerNorm without parameters (OLMo)
    norm_eps: float = NORM_EPS
    tied: bool = False        # the head reuses the embedding
    rope_theta: float = 10000.0
    experts: int = 0          # 0: one SwiGLU in a block. Otherwise a mixture of so many, of width ffn each,
    top_k: int = 0            # of which a token uses this many

    def __post_init__(self):
        check_name("norm", self.norm, ("rms", "layer"))
        for name, value in vars(self).items():
            if name not in ("kv_heads", "norm", "tied", "experts", "top_k") and not value > 0:
                raise ValueError(f"{name} = {value} is not possible: it must be larger than 0")
        if not min(self.experts, 1) <= self.top_k <= self.experts:
            raise ValueError(f"top_k = {self.top_k} of {self.experts} experts: take 1 to all of them")
        if self.d % (2 * self.heads) or self.kv_heads < 0 or self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"d = {self.d}, heads = {self.heads}, kv_heads {self.kv_heads}: d has to be a "
                             f"multiple of 2 heads, and heads of kv_heads")

    head_dim = property(lambda self: self.d // self.heads)
    kv_dim = property(lambda self: (self.kv_heads or self.heads) * self.head_dim)


RECOMPUTE = ("none", "block")   # what the backward pass computes again, from its saved input
FUSED = Recipe("moss", (1, ALL), (ALL, ALL), rule="up", weight_scale="predicted")   # "The dataflow of moss"
PRESETS = {
    "nano": ModelConfig(vocab=256, seq=128, d=128, layers=4, heads=4, ffn=384),
    "124m": ModelConfig(seq=1024, d=768, layers=12, heads=12, ffn=2048, tied=True),
    "1b": ModelConfig(seq=2048, d=2048, layers=16, heads=16, ffn=8192, norm="layer", tied=True),
    "olmo-7b": ModelConfig(seq=2048, d=4096, layers=32, heads=32, ffn=11008, norm="layer"),
    "llama2-7b": ModelConfig(vocab=32000, seq=4096, d=4096, layers=32, heads=32, ffn=11008),
    "nano-moe": ModelConfig(vocab=256, seq=128, d=128, layers=4, heads=4, ffn=256, experts=8, top_k=2),
    "moe-1b": ModelConfig(seq=2048, d=1024, layers=16, heads=16, ffn=512, experts=32, top_k=8, tied=True),
    "olmoe-1b-7b": ModelConfig(seq=4096, d=2048, layers=16, heads=16, ffn=1024, experts=64, top_k=8),
}


# ---------------------------------------------------------------------------------------------------
# The layers, the loss and the decoder

# torch.compile fuses what has no kernel of ours. torch.compiler.set_stance("force_eager") switches it off.
compiled = torch.compile(dynamic=False) if torch.cuda.is_available() else lambda function: function
norm = compiled(lambda x, kind, weight, eps: NORMS[kind](x, weight, eps))
compiled_swiglu = compiled(swiglu)
# Rounds once. In BF16, x * factor rounds the factor, too: 1/3 is then off by 0.2%.
scaled = compiled(lambda x, factor, dtype: (x.float() * factor).to(dtype))


@compiled
def add_scaled_(total, x, factor):
    total += x.float() * factor   # moves 10 bytes per number; `scaled` and autograd's sum 18


class Linear(nn.Module):
    """Compute y = x W^T, as the recipe says. W (out, in) is the FP32 master weight. With `experts` it is
    (experts out, in): each has `out` rows of it, for its group of x. `requantize` makes FP8 copies, once per
    optimizer step. Copies older than W are refused, if PyTorch counts the change (not weight.data.mul_(2)).
    Blocks of `moss` call fused functions instead of `forward`: see "The dataflow of moss"."""

    def __init__(self, d_in, d_out, recipe, name, std=0.02, experts=0):
        super().__init__()
        multiple = 128 if experts else 16
        if recipe and (d_in % multiple or d_out % multiple):
            raise ValueError(f"layer {name}: in = {d_in} or out = {d_out} is no multiple of {multiple}, as "
                             f"--fp8 {recipe} needs: change d, ffn or the heads, or train with --fp8 none")
        self.weight = nn.Parameter(torch.empty(max(experts, 1) * d_out, d_in))
        if std:
            nn.init.normal_(self.weight, std=std)
        self.name, self.recipe, self.experts = name, recipe, experts
        self.copies = self.made_of = None   # FP8 (W, W^T), and which weight they were made of
        self.accumulates = False   # True: the backward of `moss`, and of the head, adds to weight.grad itself

    def forward(self, x, groups=None):
        if groups:
            return grouped_linear(self, x, groups)
        if not self.recipe:
            return F.linear(x, self.weight.to(x.dtype))
        return fp8_linear(x, self.weight, self.w, self.w_t, self.recipe)

    def requantize(self, scale=None):
        """Make the FP8 copies. `scale`, float32, is for recipes with one per matrix. None: measure it."""
        if self.recipe:
            per_matrix, weight = self.recipe.weight_scale != "block", self.weight.detach()
            if per_matrix and scale is None and self.experts:   # one for each
                amax = block_amax(weight, (len(weight) // self.experts, ALL))
                scale = scale_from_amax(amax, E4M3, self.recipe.weight_rule)
            scale = scale.detach().view(-1, 1) if per_matrix and scale is not None else None
            self.set_copies(quantize_weight(weight, self.recipe, scale))

    def set_copies(self, copies):
        """Take FP8 (W, W^T) as copies of the weight as it is now."""
        w = self.weight   # w.detach() keeps its memory from being given to a later weight
        self.copies, self.made_of = copies, (w, w.detach(), w._version)

    def is_current(self):
        """Return whether the copies were made of the weight as it is now."""
        w, memory, version = self.made_of or (None, None, None)
        return w is self.weight and w.data_ptr() == memory.data_ptr() and w._version == version

    @torch.compiler.disable
    def current_copies(self):
        """Return FP8 (W, W^T). RuntimeError if the weight has changed since they were made."""
        if not self.is_current():
            raise RuntimeError(f"layer {self.name}: its weight has no FP8 copies, or has changed since: call "
                               f"requantize() of each of model.linears() after every change of weights")
        return self.copies

    w = property(lambda self: self.current_copies()[0])     # (out, in), for fprop
    w_t = property(lambda self: self.current_copies()[1])   # (in, out), for dgrad

    def __getstate__(self):   # for copy.deepcopy and pickle: current copies become those of the copied weight
        return {**self.__dict__, "copies": self.copies if self.is_current() else None, "made_of": None}

    def __setstate__(self, state):
        super().__setstate__(state)
        if self.copies:
            self.set_copies(self.copies)


# PyTorch does not count the step of a fused optimizer as a change of its weights: let it count.
register_optimizer_step_post_hook(lambda optimizer, *_: torch.autograd.graph.increment_version(
    [p for group in optimizer.param_groups if group.get("fused") for p in group["params"]]))


class Norm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.kind, self.eps = config.norm, config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.d)) if self.kind == "rms" else None

    def forward(self, x, compute=None):
        """Return norm(x). With compute = quantize_norm, return it in FP8, one scale per row of x (T, d)."""
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return (compute or norm)(x, self.kind, weight, eps=self.eps)


@compiled
def rope_and_split(qkv, cos, sin, d, kv_dim, head_dim):
    """Split qkv (B, T, d + 2 kv_dim) into q, k and v (B, T, their heads, head_dim), and turn q and k."""
    q, k, v = (z.unflatten(-1, (-1, head_dim)) for z in qkv.split((d, kv_dim, kv_dim), dim=-1))
    return rope(q, cos, sin), rope(k, cos, sin), v


@torch.inference_mode(False)   # a table made while generating serves training as well
def rope_table(seq, head_dim, theta, device=None):
    """Return cos and sin (seq, head_dim / 2) of the angle t theta^(-2 i / head_dim) at position t, pair i."""
    rates = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(seq, device=device, dtype=torch.float32), rates)
    return angles.cos(), angles.sin()


def attention(q, k, v):
    """Return weighted values (B, T, d) of q (B, T, heads, head_dim), k and v (B, T, kv_heads, head_dim)."""
    y = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)), is_causal=True,
                                       enable_gqa=q.shape[2] != k.shape[2])
    return y.transpose(1, 2).flatten(2)


@compiled
def loss_and_gradient_(logits, targets, count):
    """Return the sum of -log p[target] of logits (T, vocab); overwrite these with (p - onehot) / count."""
    z = logits.float()
    log_sum = z.logsumexp(-1, keepdim=True)
    loss = (log_sum - z.gather(1, targets[:, None])).sum()
    hit = torch.arange(z.shape[1], device=z.device) == targets[:, None]
    logits.copy_(((z - log_sum).exp() - hit.float()) / count)
    return loss


class HeadLoss(torch.autograd.Function):
    """Compute the mean cross-entropy of x W^T, of x (T, d), W (vocab, d) and targets (T), in FP32 for `CHUNK`
    tokens at a time. The gradient overwrites the logits: 1.5 GiB at 16384 x 50304; PyTorch's own keeps 9."""
    CHUNK = 4096

    @staticmethod
    @torch.compiler.disable(recursive=False)
    def forward(ctx, x, weight, targets, training, head):
        w, total = weight.to(x.dtype), torch.zeros((), device=x.device)
        logits = x.new_empty(len(x) if training else min(len(x), HeadLoss.CHUNK), len(w))
        for i in range(0, len(x), HeadLoss.CHUNK):
            rows, at = x[i:i + HeadLoss.CHUNK], i if training else 0
            part = torch.mm(rows, w.t(), out=logits[at:at + len(rows)])
            total += loss_and_gradient_(part, targets[i:i + len(rows)], len(x))
        ctx.save_for_backward(x, weight, w, logits)
        ctx.head = head
        return total / len(x)

    @staticmethod
    @torch.compiler.disable(recursive=False)
    @once_differentiable
    def backward(ctx, dloss):
        x, weight, w, gradient = ctx.saved_tensors
        dw = gradient.t() @ x
        if ctx.head.accumulates and weight.grad is not None:
            dw = add_scaled_(weight.grad, dw, dloss)
        else:
            dw = scaled(dw, dloss, weight.dtype)
        return scaled(gradient @ w, dloss, x.dtype), dw, None, None, None


@torch.compiler.disable(recursive=False)   # a model that is compiled whole leaves this as it is
def head_loss(x, head, targets):
    """Return the loss of x (..., d). ValueError unless targets (...) are int64, one for each token."""
    if (targets.shape, targets.dtype, targets.device) != (x.shape[:-1], torch.int64, x.device):
        raise ValueError(f"targets {tuple(targets.shape)}, {targets.dtype} on {targets.device}: one for each "
                         f"token is needed, {tuple(x.shape[:-1])}, torch.int64 on {x.device}")
    return HeadLoss.apply(x.flatten(0, -2), head.weight, targets.flatten(), torch.is_grad_enabled(), head)


class Block(nn.Module):
    """Compute a block. The blocks of a model may have different recipes; None is high precision."""

    def __init__(self, config, recipe, name, recompute):
        super().__init__()
        check_name("recompute", recompute, RECOMPUTE)
        self.config, self.recompute, self.fused = config, recompute, recipe == FUSED
        self.norm1, self.norm2 = Norm(config), Norm(config)
        small = 0.02 / (2 * config.layers) ** 0.5   # for the layers that write to the residual stream
        self.qkv = Linear(config.d, config.d + 2 * config.kv_dim, recipe, f"{name}.qkv")
        self.out = Linear(config.d, config.d, recipe, f"{name}.out", small)
        self.gate_up = Linear(config.d, 2 * config.ffn, recipe, f"{name}.gate_up", experts=config.experts)
        self.down = Linear(config.ffn, config.d, recipe, f"{name}.down", small, config.experts)
        self.router = Router(config) if config.experts else None
        self.peers = None   # the process group over which its experts are spread

    def forward(self, x, cos, sin):
        """Return the output (B, T, d); of a mixture also how many tokens each expert got, (experts,)."""
        if self.recompute == "block" and torch.is_grad_enabled():
            return checkpoint(self.compute, x, cos, sin, use_reentrant=False, preserve_rng_state=False)
        return self.compute(x, cos, sin)

    def compute(self, x, cos, sin):
        if x.numel() and can_fuse(self):
            return fused_block(self, x, cos, sin)
        qkv, c = self.qkv(self.norm1(x)), self.config
        q, k, v = rope_and_split(qkv, cos, sin, c.d, c.kv_dim, c.head_dim)
        x = x + self.out(attention(q, k, v))
        if self.router:
            return mixture(self, x)
        return x + self.down(compiled_swiglu(self.gate_up(self.norm2(x))))


class Transformer(nn.Module):
    """The decoder. `fp8` names the recipe of all blocks, `recompute` is one of RECOMPUTE."""

    def __init__(self, config, fp8="none", recompute="none"):
        super().__init__()
        check_name("recipe", fp8, RECIPES)
        self.config, self.recipe, self.recompute = config, RECIPES[fp8], recompute
        self.embed = nn.Embedding(config.vocab, config.d)
        nn.init.normal_(self.embed.weight, std=0.02)
        head = Linear(config.d, config.vocab, None, "head", std=0 if config.tied else 0.02)   # without recipe
        if config.tied:
            head.weight = self.embed.weight
        self.blocks = nn.ModuleList(Block(config, self.recipe, f"blocks.{i}", recompute)
                                    for i in range(config.layers))
        self.norm, self.head = Norm(config), head
        self.rope = rope_table(config.seq, config.head_dim, config.rope_theta)   # DDP would send buffers

    def balance(self, loads):
        """Balance the routers, once per optimizer step, by the loads (layers, experts) of all its tokens."""
        for router, load in zip((block.router for block in self.blocks if block.router), loads):
            router.balance(load)

    def linears(self):
        """Return the linear layers of the blocks in the order of the forward pass."""
        return [m for m in self.blocks.modules() if isinstance(m, Linear)]

    def forward(self, tokens, targets=None):
        """Return logits (B, T, vocab) of tokens (B, T); with targets (B, T), the mean loss in nats."""
        T, c = tokens.shape[1], self.config
        if T > c.seq:
            raise ValueError(f"{T} tokens: this model reads at most {c.seq}, its config.seq")
        if self.rope[0].device != tokens.device:   # the model has moved
            self.rope = rope_table(c.seq, c.head_dim, c.rope_theta, tokens.device)
        cos, sin = (table[:T] for table in self.rope)
        x = self.embed(tokens).to(torch.bfloat16 if tokens.is_cuda else torch.float32)   # (B, T, d)
        loads = []
        for block in self.blocks:
            x = block(x, cos, sin)
            if block.router:
                x, load = x
                loads.append(load)
        if loads:
            self.loads = torch.stack(loads)   # (layers, experts): how many of these tokens each expert got
        x = self.norm(x)
        return self.head(x) if targets is None else head_loss(x, self.head, targets)

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")   # every length would be compiled anew
    def generate(self, tokens, count, temperature=0.8, generator=None):
        """Return tokens (1, T) and `count` more, each sampled; temperature 0 takes the likeliest."""
        if not tokens.shape[1] or not temperature >= 0:
            raise ValueError(f"{tokens.shape[1]} tokens, temperature {temperature}: the least are 1 and 0")
        for _ in range(count):
            logits = self(tokens[:, -self.config.seq:])[:, -1].float()
            new = logits.argmax(-1, keepdim=True)
            if temperature:
                new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            tokens = torch.cat((tokens, new), dim=1)
        return tokens


# ---------------------------------------------------------------------------------------------------
# A mixture of experts, layer by layer

def mixture(block, x):
    """Return x + sum over the chosen experts e of p_e down_e(silu(gate_e(n)) up_e(n)), n = norm2(x), of x
    (B, T, d); and how many tokens each expert got, (E,). Each token is copied into a row for every choice.
    The rows are sorted by expert, so that each multiplies a group of neighbors, and their results are added
    up. p_e goes into the input of down_e, which is linear: where that is quantized, it costs no pass."""
    n = block.norm2(x).flatten(0, 1)                                                      # (T, d)
    score, chosen = block.router(n)                                                       # (T, top_k)
    peers = block.peers
    n, p = (exchange(z, of_all, sum_of_all, peers) for z in (n, probabilities(score)))    # of all ranks
    r = route_in(block, chosen, 128 if block.gate_up.recipe else 1)
    h = block.gate_up(blank(Move.apply(n, r.token, r.row), peers), r.groups)              # (R, 2 ffn)
    a = compiled_swiglu(h) * blank(r.in_rows(p), peers)[:, None]                          # (R, ffn)
    y = blank(block.down(a.to(x.dtype), r.groups), peers)                                 # (R, d)
    y = exchange(Move.apply(y, r.row, r.token), sum_of_all, of_all, peers)                # (T, d)
    return x + y.view_as(x), r.load


class Router(nn.Module):
    """Choose top_k of E experts for each token. They count as much as their share p of the scores. `balance`
    moves a bias, which steers who is chosen and nothing else: no term of the loss has to (arXiv 2408.15664).

        score = sigmoid(W x)    chosen: the top_k largest score + bias    p = score / sum of the chosen scores
    """

    def __init__(self, config):
        super().__init__()
        self.top_k = config.top_k
        self.weight = nn.Parameter(torch.empty(config.experts, config.d).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(config.experts), requires_grad=False)   # checkpoints have it

    def forward(self, x):
        """Return the chosen experts of x (T, d), (T, top_k) int64, and before them their scores, float32."""
        return choose(x, self.weight, self.bias, self.top_k)

    @torch.no_grad()
    def balance(self, load, rate=1e-3):
        """Raise the bias of experts that got fewer tokens than the mean, `load` (E,); lower the others'."""
        self.bias.add_(rate * (load.mean() - load).sign())
        self.bias.sub_(self.bias.mean())


@compiled
def choose(x, weight, bias, top_k):
    score = F.linear(x.float(), weight.float()).sigmoid()                                 # (T, E)
    chosen = (score + bias).topk(top_k).indices                                           # (T, top_k)
    return score.gather(1, chosen), chosen


def probabilities(score):
    """Return p of the chosen scores (T, top_k)."""
    return score / score.sum(1, keepdim=True)


@compiled
def router_gradient(dp, score, chosen, x, weight):
    """Return the gradients of x (T, d) and W (E, d) from dp (T, top_k), that of p. With S the sum of scores,
    d score = (dp - sum(dp p)) / S, and d(W x) = d score score (1 - score)."""
    p, total = probabilities(score), score.sum(1, keepdim=True)
    d_score = (dp - (dp * p).sum(1, keepdim=True)) / total
    dz = score.new_zeros(len(x), len(weight)).scatter(1, chosen, d_score * score * (1 - score))
    return (dz @ weight.float()).to(x.dtype), (dz.t() @ x.float()).to(weight.dtype)


@dataclass
class Routes:
    """Say which rows (R,) of the experts' products the choices of T tokens are. FP8 needs a multiple of 128
    for each expert: its rows are filled up with copies of the last token, whose p is 0. R is the most that
    this may take. It depends on no value, so the host need not wait for the GPU; rows may be left over."""
    token: torch.Tensor    # (R,) int64: whose copy a row is
    row: torch.Tensor      # (T, top_k) int64: where each choice is
    load: torch.Tensor     # (E,) float32: how many tokens each expert gets
    groups: Groups         # which rows are each expert's

    def in_rows(self, p):
        """Return p (T, top_k) in the rows (R,) of the choices, and 0 in the others."""
        return p.new_zeros(len(self.token)).scatter(0, self.row.flatten(), p.flatten())


@compiled
def route(chosen, E, align=128):
    """Return the Routes of the chosen experts (T, top_k), of E. Each begins at a multiple of `align`."""
    (T, k), device = chosen.shape, chosen.device
    R = cdiv(T * k + (align - 1) * E, align) * align if T else 0
    expert, order = chosen.flatten().sort(stable=True)                        # (T k,): choices by expert
    load = (expert[:, None] == torch.arange(E, device=device)).sum(0)         # (E,)
    first = F.pad((cdiv(load, align) * align).cumsum(0), (1, 0))              # (E + 1,): its first row
    filled = first[:-1] - load.cumsum(0) + load    # (E,): rows that fill up the experts before it
    rows = torch.arange(T * k, device=device) + filled[expert]                # (T k,): of the sorted choices
    token = torch.full((R,), T - 1, device=device).scatter(0, rows, order // k)
    row = torch.empty_like(order).scatter(0, order, rows).view(T, k)
    of_tile = (torch.arange(0, R, align, device=device)[:, None] >= first[1:-1]).sum(1)
    return Routes(token, row, load.float(), Groups(first.int(), of_tile.int()))


def move(x, source):
    """Return rows x[source]; of `source` (T, k) the sums of k rows each."""
    return x[source] if source.dim() == 1 else combine(x, source)


class Move(torch.autograd.Function):
    """Return move(x, source). The gradient is move(dy, back): it also gathers, so no two additions race."""

    @staticmethod
    def forward(ctx, x, source, back):
        ctx.save_for_backward(back)
        return move(x, source)

    @staticmethod
    def backward(ctx, dy):
        return move(dy, *ctx.saved_tensors), None, None


def grouped_linear(layer, x, groups):
    """Multiply the rows of each expert, of x (R, in), by its matrix -> (R, out)."""
    E, weights = layer.experts, layer.weight.unflatten(0, (layer.experts, -1))            # (E, out, in)
    if not layer.recipe and x.is_cuda:
        return F.grouped_mm(x, weights.to(x.dtype).transpose(1, 2), offs=groups.first[1:])
    if not layer.recipe:
        return grouped_reference(x, layer.weight.to(x.dtype), groups, "fprop")
    sizes = groups.first.diff().tolist()   # the host waits to know them
    rows = x[:sum(sizes)].split(sizes)
    operands = zip(rows, weights, by_expert(layer.w, E, 0), by_expert(layer.w_t, E, 1))
    y = torch.cat([fp8_linear(*each, layer.recipe) for each in operands])
    return F.pad(y, (0, 0, 0, len(x) - len(y)))


def by_expert(q, E, axis):
    """Return the Quantized matrices of E experts, which q holds along `axis`."""
    block = (ALL, ALL) if ALL in q.block else q.block
    return [Quantized(*each, block) for each in zip(q.data.chunk(E, axis), q.scale.chunk(E, axis))]


# ---------------------------------------------------------------------------------------------------
# Experts on several ranks. Each rank has as many of every layer. All ranks get all tokens, in FP8 (with the
# recipe moss), and add up what their experts make of them; the sums come back in BF16. A token chooses top_k
# experts: for up to top_k ranks this moves no more bytes than a copy of the token for each choice would.

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor   # before PyTorch 2.13
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def spread_experts(model, peers):
    """Leave to each rank of a process group its experts, in order, of all that it has now."""
    for block in model.blocks:
        block.peers = peers
        for layer in (block.gate_up, block.down):
            layer.experts //= peers.size()
            layer.weight.data = layer.weight.data.chunk(peers.size())[peers.rank()].clone()


def of_all(x, peers):
    """Return the rows of all ranks (n T, ...), one rank's after the other's, of x (T, ...)."""
    if peers is None:
        return x
    out = x.new_empty(peers.size() * len(x), *x.shape[1:])
    all_gather(out.view(torch.uint8), x.contiguous().view(torch.uint8), group=peers)   # they know no FP8
    return out


def sum_of_all(x, peers):
    """Return the sums over the ranks of those rows (T, ...) of x (n T, ...) that are this rank's."""
    if peers is None:
        return x
    out = x.new_empty(len(x) // peers.size(), *x.shape[1:])
    reduce_scatter(out, x.contiguous(), group=peers)
    return out


class Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, there, back, peers):
        ctx.back = lambda dy: back(dy, peers)
        return there(x, peers)

    @staticmethod
    def backward(ctx, dy):
        return ctx.back(dy), None, None, None


def exchange(x, there, back, peers):
    """Return there(x, peers), whose gradient is back(dy, peers), if experts are spread. Else return x."""
    return x if peers is None else Exchange.apply(x, there, back, peers)


def route_in(block, chosen, align=128):
    """Return the Routes of the chosen experts (T, top_k). If experts are spread, they lead from the tokens of
    all ranks to the experts of this one. The host waits to know how many rows that takes (so launch before
    what does not need to know). One row more, the last, stands for all choices of experts elsewhere: it is
    made zero, and no product reads it."""
    if block.peers is None:
        return route(chosen, block.config.experts, align)
    E, experts = block.gate_up.experts, torch.arange(block.config.experts, device=chosen.device)
    load = (chosen.flatten()[:, None] == experts).sum(0).float()   # bincount would wait as well
    here = of_all(chosen, block.peers) - E * block.peers.rank()
    r = route(torch.where((here >= 0) & (here < E), here, E), E + 1, align)   # those elsewhere come last
    used = int(r.groups.first[E])
    R = used + align
    token, of_tile = F.pad(r.token, (0, align))[:R], F.pad(r.groups.of_tile, (0, 1))[:R // align]
    row = torch.where(r.row < used, r.row, R - 1)
    return Routes(token, row, load, Groups(r.groups.first[:-1], of_tile.clamp(max=E - 1)))


def blank(x, peers):
    """Return x (R, ...) with zeros in the last row, if experts are spread."""
    return x if peers is None else F.pad(x[:-1], (0, 0) * (x.dim() - 1) + (0, 1))


def add_rows(x, rows, add, peers):
    """Return `combine` of x (R, C) and `add`; if experts are spread, the sums of all ranks plus `add`."""
    if peers is None:
        return combine(x, rows, add)
    x[-1] = 0   # as `blank`, without a copy
    return add + sum_of_all(combine(x, rows), peers)


# ---------------------------------------------------------------------------------------------------
# The dataflow of moss. Blocks with this recipe take it; blocks with any other run layer by layer.

def can_fuse(block):
    """Return False where fused functions would pass over a fork's change: other modules, recipes, hooks."""
    def plain(m):
        hooked = m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        return not hooked and (type(m) in (Norm, Router) or type(m) is Linear and m.recipe == FUSED)
    return block.fused and all(plain(m) for m in block.children())


def fused_block(block, x, cos, sin):
    """Return what block.compute returns for x (B, T, d)."""
    shape, norm, gate_up, down = x.shape, block.norm2.weight, block.gate_up.weight, block.down.weight
    q, k, v, x = NormQKV.apply(x, block.norm1.weight, block.qkv.weight, cos, sin, block)
    x, y = x.flatten(0, 1), attention(q, k, v).flatten(0, 1)                          # (B T, d)
    if block.router:
        x, load = FusedMixture.apply(x + block.out(y), norm, block.router.weight, gate_up, down, block)
        return x.view(shape), load
    return OutNormSwiGLU.apply(x, y, norm, block.out.weight, gate_up, down, block).view(shape)


class NormQKV(torch.autograd.Function):
    """Compute q (B, T, heads, head_dim) and k after RoPE, and v, of x (B, T, d); and return x, too. The
    residual connection reads that x: so its gradient arrives in `backward`, for norm_backward to add."""

    @staticmethod
    def forward(ctx, x, norm_weight, weight, cos, sin, block):
        c, kv_heads = block.config, block.config.kv_dim // block.config.head_dim
        x_q = block.norm1(x.flatten(0, 1), quantize_norm)                               # (B T, d)
        qkv = matmul(x_q, block.qkv.w, x.dtype).view(*x.shape[:2], -1, c.head_dim)
        qk = qkv[:, :, :-kv_heads]
        rope_into(qk, qk, cos, sin)
        ctx.save_for_backward(x, norm_weight, cos, sin, x_q.data, x_q.scale)
        ctx.block = block
        return *qkv.split((c.heads, kv_heads, kv_heads), dim=2), x   # one tensor, which attention saves

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk, dv, residual):
        x, norm_weight, cos, sin, *x_q = ctx.saved_tensors
        dy_q = quantize_rows(qkv_gradient(dq, dk, dv, cos, sin))                      # (B T, d + 2 kv_dim)
        dx, dw = linear_backward(dy_q, Quantized(*x_q, (1, ALL)), ctx.block.qkv, x.dtype)
        c, residual = ctx.block.config, residual.flatten(0, 1)
        dx, d_norm = norm_backward(dx, x.flatten(0, 1), norm_weight, c.norm, residual, c.norm_eps)
        return dx.view_as(x), d_norm, dw, None, None, None


def qkv_gradient(dq, dk, dv, cos, sin):
    """Return the gradient of [q, k, v] (B T, d + 2 kv_dim), from those of rope(q) (B, T, heads, head_dim), of
    rope(k) and of v (B, T, kv_heads, head_dim): RoPE turns by an angle, its gradient turns back."""
    (B, T, heads, head_dim), kv_heads, sin = dq.shape, dk.shape[2], -sin
    dqkv = dq.new_empty(B, T, heads + 2 * kv_heads, head_dim)
    to_q, to_k, to_v = dqkv.split((heads, kv_heads, kv_heads), dim=2)
    rope_into(to_q, dq, cos, sin)
    rope_into(to_k, dk, cos, sin)
    to_v.view(torch.int32).copy_(dv.contiguous().view(torch.int32))   # two numbers of BF16 at a time
    return dqkv.view(B * T, -1)


class OutNormSwiGLU(torch.autograd.Function):
    """Compute x = x + out(y), then x + down(silu(gate(norm(x))) * up(norm(x))), of x, y (T, d). It is one
    function because the gradient of [gate, up] is FP8, and between functions autograd passes BF16."""

    @staticmethod
    def forward(ctx, x, y, norm_weight, out_weight, gate_up_weight, down_weight, block):
        y_q = quantize_rows(y)
        x = matmul(y_q, block.out.w, x.dtype, add=x)
        x_q = block.norm2(x, quantize_norm)                                           # (T, d)
        h = matmul(x_q, block.gate_up.w, x.dtype)                                     # (T, 2 ffn)
        a_q, h_q = quantize_swiglu(h)                                                 # (T, ffn), (T, 2 ffn)
        ctx.save_for_backward(x, norm_weight, *(t for q in (y_q, x_q, h_q, a_q) for t in (q.data, q.scale)))
        ctx.block = block
        return matmul(a_q, block.down.w, x.dtype, add=x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dz):
        (x, norm_weight, *saved), block, c = ctx.saved_tensors, ctx.block, ctx.block.config
        y_q, x_q, h_q, a_q = (Quantized(*saved[i:i + 2], (1, ALL)) for i in (0, 2, 4, 6))
        da, dw_down = linear_backward(quantize_rows(dz), a_q, block.down, x.dtype)
        dh_q = quantize_swiglu_gradient(h_q, da)                                      # (T, 2 ffn)
        dx, dw_gate_up = linear_backward(dh_q, x_q, block.gate_up, x.dtype)
        dx, d_norm = norm_backward(dx, x, norm_weight, c.norm, dz, c.norm_eps)
        dy, dw_out = linear_backward(quantize_rows(dx), y_q, block.out, x.dtype)
        return dx, dy, d_norm, dw_out, dw_gate_up, dw_down, None


class FusedMixture(torch.autograd.Function):
    """Compute `mixture` of x (T, d) with one quantization of X and one of dY per token, not one per choice:
    the copies in the rows are copies of FP8. X is saved as (T, d), and copied again for wgrad."""

    @staticmethod
    def forward(ctx, x, norm_weight, router_weight, gate_up_weight, down_weight, block):
        score, chosen = block.router(block.norm2(x))                                      # (T, top_k)
        p = of_all(probabilities(score), block.peers)                                     # (T, top_k)
        x_q = quantized_of_all(block.norm2(x, quantize_norm), block.peers)                # (T, d)
        r = route_in(block, chosen)
        p = r.in_rows(p)                                                                  # (R,)
        h = matmul(take(x_q, r.token), block.gate_up.w, x.dtype, groups=r.groups)         # (R, 2 ffn)
        a_q, h_q = quantize_swiglu(h, p)                                             # (R, ffn), (R, 2 ffn)
        y = matmul(a_q, block.down.w, x.dtype, groups=r.groups)                           # (R, d)
        ctx.save_for_backward(x, norm_weight, score, chosen, p, r.token, r.row, r.groups.first,
                              r.groups.of_tile, *(t for q in (x_q, h_q, a_q) for t in (q.data, q.scale)))
        ctx.block = block
        ctx.mark_non_differentiable(r.load)
        return add_rows(y, r.row, x, block.peers), r.load

    @staticmethod
    @once_differentiable
    def backward(ctx, dz, _):
        (x, norm_weight, score, chosen, p, token, row, first, of_tile, *saved) = ctx.saved_tensors
        x_q, h_q, a_q = (Quantized(*saved[i:i + 2], (1, ALL)) for i in (0, 2, 4))
        groups, block = Groups(first, of_tile), ctx.block
        dy_q = take(quantized_of_all(quantize_rows(dz), block.peers), token)              # (R, d)
        da, dw_down = linear_backward(dy_q, a_q, block.down, x.dtype, groups)             # (R, ffn)
        dh_q, dp = quantize_swiglu_gradient(h_q, da, p)                                   # (R, 2 ffn), (R,)
        dx, dw_gate_up = linear_backward(dh_q, take(x_q, token), block.gate_up, x.dtype, groups)
        dp = sum_of_all(blank(dp, block.peers)[row], block.peers)                         # (T, top_k)
        dn, dw = router_gradient(dp, score, chosen, block.norm2(x), block.router.weight)
        c, dx = block.config, add_rows(dx, row, dn, block.peers)
        dx, d_norm = norm_backward(dx, x, norm_weight, c.norm, dz, c.norm_eps)
        return dx, d_norm, dw if block.router.weight.requires_grad else None, dw_gate_up, dw_down, None


def quantized_of_all(q, peers):
    """Return the rows of all ranks of Quantized q, which has one scale per row."""
    return q if peers is None else Quantized(of_all(q.data, peers), of_all(q.scale, peers), q.block)


def take(q, index):
    """Return rows q[index] of Quantized q, which has one scale per row. They move 8 bytes at a time."""
    return Quantized(q.data.view(torch.int64)[index].view(q.data.dtype), q.scale[index], q.block)


def linear_backward(dy, x, layer, dtype, groups=None):
    """Return dX (T, K) and dW (N, K) of Quantized dY (T, N) and X (T, K). dW is None if the weight is frozen,
    or if wgrad has added it to weight.grad itself: that moves 8 bytes per weight, not 16."""
    dx = matmul(dy, layer.w_t, dtype, promote=True, groups=groups, way="dgrad")
    if not layer.weight.requires_grad:
        return dx, None
    grad = layer.weight.grad if layer.accumulates else None
    dw = matmul(*transpose_for_wgrad(dy, x, groups), layer.weight.dtype, promote=True, add=grad, out=grad,
                groups=groups, way="wgrad")
    return dx, dw if grad is None else None


@compiled
def norm_backward(dy, x, weight, kind, d_residual, eps=NORM_EPS):
    """Return dx + d_residual (T, d) and d weight (d) or None, of y = norm(x) weight for dy (T, d). In float32
    dx = (g - mean(g) - x_hat mean(g x_hat)) / deviation, g = dy weight. RMSNorm subtracts no mean(g)."""
    dtype, x, dy = dy.dtype, x.float(), dy.float()
    x = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    inverse = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    x_hat = x * inverse
    d_weight = None if weight is None else (dy * x_hat).sum(0)
    g = dy if weight is None else dy * weight.to(dtype).float()   # the forward pass rounds it, too
    dx = g - x_hat * (g * x_hat).mean(-1, keepdim=True)
    dx = dx - g.mean(-1, keepdim=True) if kind == "layer" else dx
    return (dx * inverse + d_residual.float()).to(dtype), d_weight


# ---------------------------------------------------------------------------------------------------
# Models of others: folders that Hugging Face's transformers, 4 and 5, write and read. Both sides turn pairs
# (x_i, x_{i + head_dim/2}) for RoPE, so that weights need no permutation; here q, k and v are rows of one
# matrix, gate and up of another.

ARCHITECTURES = {"LlamaForCausalLM": "rms", "MistralForCausalLM": "rms", "OlmoForCausalLM": "layer"}
FIELDS = {"d": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
          "kv_heads": "num_key_value_heads", "ffn": "intermediate_size", "seq": "max_position_embeddings",
          "vocab": "vocab_size", "tied": "tie_word_embeddings", "rope_theta": "rope_theta",
          "norm_eps": "rms_norm_eps"}
COMPUTED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "clip_qkv": None,
            "type": "default", "rope_type": "default", "partial_rotary_factor": 1, "is_causal": True,
            "quantization_config": None}   # all else is refused
BESIDE = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "*.jinja",
          "vocab.json", "merges.txt")      # what belongs to a model besides weights


def read_json(path):
    """Return the object in a file. ValueError if there is none."""
    value = json.loads(path.read_text("utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, no object in braces")
    return value


def config_of(folder):
    """Return the ModelConfig of `folder`/config.json. ValueError names what model.py does not compute."""
    def refuse(what, instead):
        raise ValueError(f"{folder}/config.json: {what}, and {instead}")
    c = read_json(folder / "config.json")
    for nested in ("rope_parameters", "rope_scaling"):   # of transformers 5, and of 4, which comes first
        c = {**c, **(c[nested] if isinstance(c.get(nested), dict) else {})}
    architecture, = (c.get("architectures") or ["none"])[:1]
    check_name(f"{folder}/config.json: architecture", architecture, [*ARCHITECTURES])
    ours = {name: c[theirs] for name, theirs in FIELDS.items() if c.get(theirs) is not None}
    kinds = {"tied": (bool,), "rope_theta": (int, float), "norm_eps": (int, float)}
    for name in {"d", "layers", "heads", "ffn", "vocab", "seq", *ours}:
        value = ours.get(name)
        if type(value) not in kinds.get(name, (int,)) or name != "tied" and not value > 0:
            refuse(f"{FIELDS[name]} = {value}", "a positive number is needed, or to tie, true or false")
    ours["norm_eps"] = ours.get("norm_eps", 1e-6) if ARCHITECTURES[architecture] == "rms" else NORM_EPS
    config = ModelConfig(**ours, norm=ARCHITECTURES[architecture])
    kind = architecture.removesuffix("ForCausalLM").lower()
    for name, value in {**COMPUTED, "head_dim": config.head_dim, "model_type": kind}.items():
        if c.get(name) not in (value, None):
            refuse(f"{name} = {c[name]}", f"model.py only computes {value}: take another model")
    window = c.get("sliding_window", 4096 if "Mistral" in architecture else None)
    if window is not None and (type(window) is not int or window < 1):
        refuse(f"sliding_window = {window}", "a positive number is needed")
    return replace(config, seq=min(config.seq, window or config.seq))


def config_for(config):
    """Return what config.json says of a ModelConfig. ValueError for what neither LLaMA nor OLMo has."""
    if config.experts or config.norm == "layer" and config.norm_eps != NORM_EPS:
        raise ValueError(f"{config.experts} experts, {config.norm} norm eps {config.norm_eps}: LLaMA and "
                         f"OLMo, which can be written, have no experts, and OLMo's eps is {NORM_EPS}")
    name = "Llama" if config.norm == "rms" else "Olmo"
    c = {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
    return {**c, "num_key_value_heads": config.kv_heads or config.heads, "hidden_act": "silu",
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
            "architectures": [f"{name}ForCausalLM"], "model_type": name.lower()}


def weights_by_name(model):
    """Return {name in a folder: weight here}. Some are rows of one here, views that share its memory."""
    weights = {"model.embed_tokens": model.embed.weight, "model.norm": model.norm.weight,
               "lm_head": None if model.config.tied else model.head.weight}
    for i, block in enumerate(model.blocks):
        q, k, v = block.qkv.weight.split((block.config.d, block.config.kv_dim, block.config.kv_dim))
        gate, up = block.gate_up.weight.chunk(2)
        parts = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v, "mlp.gate_proj": gate,
                 "mlp.up_proj": up, "self_attn.o_proj": block.out.weight, "mlp.down_proj": block.down.weight,
                 "input_layernorm": block.norm1.weight, "post_attention_layernorm": block.norm2.weight}
        weights |= {f"model.layers.{i}.{name}": weight for name, weight in parts.items()}
    return {f"{name}.weight": weight for name, weight in weights.items() if weight is not None}


@torch.no_grad()
def load_weights(model, folder):
    """Fill a model from the safetensors in `folder`, one tensor at a time. ValueError if they do not fit."""
    from safetensors import SafetensorError, safe_open
    weights, files, tied = weights_by_name(model), ["model.safetensors"], None
    index = folder / "model.safetensors.index.json"
    if index.exists() and not (folder / files[0]).exists():
        where = read_json(index).get("weight_map")
        files = sorted(set(map(str, where.values()))) if isinstance(where, dict) else []
        if not files or any(Path(file).name != file for file in files):
            raise ValueError(f"{index}: its weight_map names no files of this folder: copy it again")
    for file in files:
        try:
            with safe_open(folder / file, "pt") as tensors:
                for name in tensors.keys():
                    if name.endswith("rotary_emb.inv_freq"):   # a table that old files hold
                        continue
                    tensor, weight = tensors.get_tensor(name), weights.pop(name, torch.empty(0))
                    if model.config.tied and name == "lm_head.weight":   # the embedding once more
                        tied = tensor
                        continue
                    if tensor.shape != weight.shape or not tensor.is_floating_point():
                        raise ValueError(f"{folder / file}: {name} is {tensor.dtype} {[*tensor.shape]}, and "
                                         f"{[*weight.shape] if len(weight) else 'unknown'} in model.py")
                    weight.copy_(tensor)
        except SafetensorError as e:
            raise ValueError(f"{folder / file} is damaged ({e}): copy it again") from None
    if tied is not None and not torch.equal(tied.to(model.embed.weight), model.embed.weight):
        raise ValueError(f"{folder}: lm_head.weight is not the embedding, though config.json ties them")
    if weights:
        raise ValueError(f"{folder} lacks {len(weights)} weights, first {next(iter(weights))}")


@torch.no_grad()
def save_folder(model, folder, init=None, tokenizer=None, part="5GB"):
    """Write `folder`: the weights in BF16, in files of at most `part`, config.json, and the tokenizer. What
    else belongs to the model in `init`, the folder that it began with, comes along. ValueError if `folder` is
    not empty, if `folder`.tmp is there, or if `init` has become another model's."""
    from huggingface_hub import save_torch_state_dict
    weights = {name: weight.to("cpu", torch.bfloat16) for name, weight in weights_by_name(model).items()}
    config, unfinished = config_for(model.config), folder.with_name(folder.name + ".tmp")
    if folder.exists():
        if any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty: give a new folder")
        folder.rmdir()
    if unfinished.exists():
        raise ValueError(f"{unfinished} is there: an export was killed, or is at work; remove it")
    unfinished.mkdir(parents=True)
    try:
        for path in {path for name in BESIDE for path in (init.glob(name) if init else ())}:
            shutil.copyfile(path, unfinished / path.name)
        if (unfinished / "config.json").exists():   # it may allow longer sequences than were trained here
            config |= read_json(unfinished / "config.json")
        config |= {"torch_dtype": "bfloat16", "dtype": "bfloat16"}   # in transformers 4, and in 5
        (unfinished / "config.json").write_text(json.dumps(config, indent=1))
        written = replace(config_of(unfinished), seq=model.config.seq, kv_heads=model.config.kv_heads)
        if written != model.config:
            raise ValueError(f"{init}/config.json has become that of another model: move the folder away")
        if tokenizer:
            shutil.copyfile(tokenizer, unfinished / "tokenizer.json")
        save_torch_state_dict(weights, unfinished, max_shard_size=part)
        for path in unfinished.glob("*.safetensors"):   # which only the user could read
            shutil.copymode(unfinished / "config.json", path)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------
# What is watched and counted

def shares_lost(x, dy, recipe):
    """Return the shares of X (T, K) and ("_grad") of dY (T, N) that saturate, and that folding blocks of 32
    into a scale per token changes; and ("folded_wgrad") of FP8 dY, that the fold across tokens changes."""
    rows = x.any(1) & dy.any(1)   # one of both is zero where a row fills up those of an expert
    x, dy, x_fmt, dy_fmt = x[rows], dy[rows], FORMATS[recipe.act_format], FORMATS[recipe.grad_format]
    x_q, dy_q = (quantize(z, fmt, recipe.act_block, recipe.rule, None, recipe.rounding)
                 for z, fmt in ((x, x_fmt), (dy, dy_fmt)))
    shares = {"saturated": saturated_share(x, x_q, x_fmt),
              "saturated_grad": saturated_share(dy, dy_q, dy_fmt)}
    if recipe.act_block == (1, ALL):
        exact = uncast(dy_q.data) * wgrad_factor(dy_q, x_q)[0]
        shares |= {"folded": fold_loss(x)[0], "folded_grad": fold_loss(dy, dy_fmt)[0],
                   "folded_wgrad": (uncast(cast(exact, dy_fmt)) != exact).float().mean().nan_to_num()}
    return shares


@torch.compiler.set_stance("force_eager")
def watch(model, tokens, targets):
    """Return `shares_lost` of each FP8 layer of up to 8 blocks, evenly spaced, for some 512 tokens. They run
    layer by layer, forward and backward, for this alone. Gradients that .grad holds stay as they are."""
    calls = []
    for layer in (*model.linears(), model.head):
        layer.accumulates = False   # train.py sets it anew
    blocks = model.blocks[::cdiv(len(model.blocks), 8)]   # all would take 0.4 s at 7B
    hooks = [layer.register_forward_hook(lambda layer, x, y: calls.append((layer.recipe, x[0], y)))   # unfuse
             for layer in blocks.modules() if isinstance(layer, Linear) and layer.recipe]
    T = min(tokens.shape[1], 512)
    rows = len(tokens) if T % 16 else 512 // T   # wgrad sums over a multiple of 16 tokens
    loss = model(tokens[:rows, :T], targets[:rows, :T])
    seen = [(recipe, x.detach().flatten(0, -2), y) for recipe, x, y in calls if y.requires_grad]
    gradients = torch.autograd.grad(loss, [y for _, _, y in seen]) if seen else ()
    for hook in hooks:
        hook.remove()
    return [shares_lost(x, dy.flatten(0, -2), recipe) for (recipe, x, _), dy in zip(seen, gradients)]


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def calibrate(model, tokens):
    """Quantize the weights anew by error diffusion, each layer on the inputs that it gets from tokens (B, T)
    when those before it have been. For evaluation: the copies that backward reads stay."""
    for layer in model.linears():
        seen = []
        hook = layer.register_forward_hook(lambda layer, x, y: seen.append(x[0].flatten(0, -2).float()))
        model(tokens)
        hook.remove()
        x, recipe = seen[0], layer.recipe
        x_q = quantize(x, FORMATS[recipe.act_format], recipe.act_block, recipe.rule, None, recipe.rounding)
        layer.set_copies((diffuse(layer.weight, x, x_q.dequantize(), recipe), layer.copies[1]))


def flops_per_token(model):
    """Return the FLOPs of training on one token: 6 per weight of a product (2 forward, 4 backward), and 12 d
    per layer for each token that causal attention sees, seq / 2 on average."""
    products = sum(m.weight.numel() for m in model.modules() if isinstance(m, (Linear, nn.Linear, Router)))
    return 6 * (products - idle_weights(model)) + 6 * len(model.blocks) * model.config.d * model.config.seq


def idle_weights(model):
    """Return how many weights a token does not meet: those of the experts that it does not choose."""
    top_k = model.config.top_k
    return sum(m.weight.numel() // m.experts * (m.experts - top_k) for m in model.linears() if m.experts)


def memory(model, tokens, ranks=1, element=2):
    """Return the bytes of a training step over this many tokens, by use; `element` bytes per BF16 number. Of
    several ranks (train.py --shard) each keeps a share of the moments and of the blocks' linear weights."""
    linear = sum(layer.weight.numel() for layer in model.linears())
    total, (vocab, d) = sum(p.numel() for p in model.parameters()), model.head.weight.shape
    saved = [saved_by_block(block, element) for block in model.blocks]   # without scales, up to 3% of FP8
    if model.recompute == "block":   # the inputs of all blocks, and all of one block
        saved = [max(saved), element * d * (len(saved) - 1)]
    saved += [element * (2 * d + vocab)]   # input and output of the last norm, gradient of the logits
    return {"weights": 4 * (total - linear + linear / ranks),
            "copies": 2 * (linear + vocab * d),   # what the products read: W and W^T in FP8, or W in BF16
            "gradients": 4 * total, "optimizer": 8 * total / ranks, "activations": tokens * sum(saved)}


def saved_by_block(block, element):
    """Return the bytes per token that a block saves for the backward pass, without rows that fill up."""
    qkv, out, *hidden, down = [m for m in block.modules() if isinstance(m, Linear)]
    rows = block.config.top_k or 1   # of the experts' products, for each token
    (width, d), ffn = qkv.weight.shape, rows * down.weight.shape[1]
    copies = rows if not block.fused else block.peers.size() if block.peers else 1   # of X for the experts
    inputs = d + out.weight.shape[1] + d * copies + ffn   # of the linear layers
    hidden = rows * sum(m.weight.shape[0] // (m.experts or 1) for m in hidden)   # [gate, up]
    saved = element * (3 * d + width)   # the inputs of both halves, the attention output, [q, k, v]
    saved += inputs if qkv.recipe else element * (inputs - d)   # in BF16 `out` reads the attention output
    # layer by layer also q and k before RoPE, and silu(gate)
    return saved + (hidden if block.fused else element * (hidden + width - block.config.kv_dim + ffn))


if __name__ == "__main__":
    for preset, config in PRESETS.items():
        with torch.device("meta"):
            models = {fp8: Transformer(config, fp8) for fp8 in RECIPES}
            models["moss, block"] = Transformer(config, "moss", recompute="block")
        uses = {run: memory(model, config.seq) for run, model in models.items()}
        uses["moss, 8 GPUs"] = memory(models["moss"], config.seq, ranks=8)
        size, flops = sum(p.numel() for p in models["none"].parameters()), flops_per_token(models["none"])
        active = f" ({size - idle_weights(models['none']):,} active)" if config.experts else ""
        print(f"{preset}: {size:,} parameters{active}, {flops / 1e9:.2f} GFLOP per token; GiB for one "
              f"sequence of {config.seq}:\n{'':16}" + "".join(f"{k:>13}" for k in (*uses["none"], "total")))
        for run, use in uses.items():
            print(f"    {run:12}" + "".join(f"{v / 2**30:13.3f}" for v in (*use.values(), sum(use.values()))))
        print()
