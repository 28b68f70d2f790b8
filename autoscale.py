"""
Weight scales without a max-reduction: how far can Adam move a weight in one step?

    python autoscale.py                   # tables: the bound, a prediction at work, what it costs and saves
    python autoscale.py --plot FILE.png   # the second table as a picture (needs matplotlib)

An FP8 weight is stored as E4M3(W / scale), and scale must be at least max|W| / 448 or the largest weights
saturate. Reading every weight after every step just to find its maximum costs memory bandwidth. MOSS
(arXiv 2511.05811) predicts the maximum instead: one Adam step moves a weight by at most the learning rate eta, so

    s_t = s_0 + eta t / 448          because |m_hat / sqrt(v_hat)| <= 1      (its Theorem 2)

is large enough, and only every 500 steps is the true maximum taken: a true rescale, or anchor. This file keeps the
idea and repairs the bound: |m_hat / sqrt(v_hat)| can exceed 1. Its exact supremum kappa_t comes from Cauchy-Schwarz
(adam_update_bound), and with decoupled weight decay lambda and any schedule eta_t a scale that provably suffices is

    s_t = s_{t-1} |1 - eta_t lambda| + eta_t kappa_t / 448

Covered: Adam and AdamW, with decoupled decay, any gradients (clipped, accumulated, noisy), amsgrad (its v is only
larger), and any eps in exact arithmetic. L2 decay, added to the gradient, is one more gradient: then the bound holds
without the factor |1 - eta lambda|. SGD, Lion, Adafactor and others move weights by other rules: not covered.
"""
import argparse
import math

import torch
from torch.utils.benchmark import Timer

from fp8_formats import E4M3, cast, picture
from microscale import ALL, HAS_TRITON, MIN_SCALE, cdiv, has_fp8_tensor_cores, quantize, sqnr, transpose

if HAS_TRITON:
    import triton
    import triton.language as tl

    from microscale import to_fp8

# Room for FP32 rounding (unit u = 2^-24), so that the bound holds for the weights and scales as computed.
# A weight and its scale are rounded at most 7 times a step between them (decay factor, product, sum; the
# division by 448 at an anchor), so 8u suffices. In 500 steps that adds 0.02% to a scale.
WEIGHT_SLACK = 1 + 2**-21
# Adam's update has a relative error below 5.5u / (1 - beta1^2 / beta2) from its recursions for m and v, and below
# 2u / (1 - beta2) where bias corrections are computed in FP32 (capturable=True, for CUDA graphs). For
# beta1^2 <= 0.999 beta2 and beta2 <= 0.9999 both together stay below 2^-9. Twice that is 0.4% of an update.
UPDATE_SLACK = 1 + 2**-8
MAX_BETA_RATIO = 0.999  # of beta1^2 / beta2; from 1 on, kappa_t grows without limit
MIN_EPS = 1e-15         # with less, squared gradients that underflow FP32 leave v = 0 under an m > 0


# ---------------------------------------------------------------------------------------------------
# The bound

def geometric_sum(ratio: float, t: int) -> float:
    """1 + ratio + ... + ratio^(t-1), accurate to a few ulp also where ratio is close to 1."""
    if t == 1 or ratio == 0:
        return 1.0
    if ratio == 1:
        return float(t)
    log_power = t * math.log(ratio)
    return math.expm1(log_power) / (ratio - 1) if log_power < 700 else math.inf


def check_adam_arguments(t: int, beta1: float, beta2: float) -> None:
    if t < 1:
        raise ValueError(f"t = {t}: Adam counts its steps from 1")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name} = {beta} gives no moving average; choose it in [0, 1), for example 0.9")


def adam_update_bound(t: int, beta1: float, beta2: float) -> float:
    """kappa_t: the largest |m_hat / sqrt(v_hat)| that any t gradients can cause, bias correction included.

    The gradient g_i of i steps ago enters m with weight a_i = (1 - beta1) beta1^i, and g_i^2 enters v with
    weight b_i = (1 - beta2) beta2^i. Cauchy-Schwarz for a_i g_i = (a_i / sqrt(b_i)) (sqrt(b_i) g_i), i < t:

        |m| <= sqrt(sum a_i^2 / b_i) sqrt(v),         with equality where g_i ~ a_i / b_i

    Bias correction divides m by sum a_i = 1 - beta1^t, and v by sum b_i = 1 - beta2^t. All these sums are
    geometric. With S(r) = 1 + r + ... + r^(t-1) the factors 1 - beta1 and 1 - beta2 cancel:

        kappa_t = sqrt(S(beta1^2 / beta2) S(beta2)) / S(beta1)

    It is 1 at t = 1. After that it stays 1 only for beta1 = beta2, where Theorem 2 is right. For
    beta1^2 >= beta2 it grows without limit, and beta2 = 0 < beta1 makes it infinite at t = 2.

    Raises ValueError for t < 1 and for a beta outside [0, 1).
    """
    check_adam_arguments(t, beta1, beta2)
    ratio = beta1 * beta1 / beta2 if beta2 > 0 else (math.inf if beta1 > 0 else 0.0)
    return math.sqrt(geometric_sum(ratio, t) * geometric_sum(beta2, t)) / geometric_sum(beta1, t)


def worst_case_gradients(t: int, beta1: float, beta2: float) -> torch.Tensor:
    """The t gradients, oldest first, with which Adam's step t attains the bound: (t,) float64, largest = 1.

    g_i ~ (beta1 / beta2)^i, i steps ago. For beta1 < beta2 they grow by the same factor every step: m follows
    the large recent ones while v still remembers the small old ones. Needs beta2 > 0.
    """
    check_adam_arguments(t, beta1, beta2)
    steps_ago = torch.arange(t - 1, -1, -1, dtype=torch.float64)
    gradients = torch.pow(beta1 / beta2, steps_ago)
    return gradients / gradients.max()


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError unless the prediction is proved for every parameter group of `optimizer`.

    Coupled (L2) decay is refused although kappa_t covers it: its param_groups carry a weight_decay by which
    the weights do not shrink, and handing that to update() would break the bound.
    """
    name = type(optimizer).__name__
    fix = "use torch.optim.AdamW with usual settings, or WeightScales(..., mode='current')"
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW, FP8AdamW):  # a subclass may step differently
        raise ValueError(f"{name}: weight scales are predicted from the bound on Adam's update; {fix}")
    for group in optimizer.param_groups:
        (beta1, beta2), eps, decay = group["betas"], group["eps"], group["weight_decay"]
        if decay != 0 and not group["decoupled_weight_decay"]:
            raise ValueError(f"{name}: weight_decay = {decay} goes into the gradient, so the weights do not shrink by "
                             f"1 - lr * weight_decay; {fix}")
        if beta1 * beta1 > MAX_BETA_RATIO * beta2:
            raise ValueError(f"{name}: betas = {(beta1, beta2)} have beta1^2 > {MAX_BETA_RATIO} beta2, so the bound "
                             f"grows (almost) without limit; {fix}")
        if group["capturable"] and beta2 > 0.9999:
            raise ValueError(f"{name}: beta2 = {beta2} with capturable = True, whose FP32 bias corrections round by "
                             f"more than the bound has room for; {fix}")
        if eps < MIN_EPS:
            raise ValueError(f"{name}: eps = {eps} is less than {MIN_EPS}, too small for squared gradients that "
                             f"underflow FP32; {fix}")


# ---------------------------------------------------------------------------------------------------
# The scales

class WeightScales:
    """The FP32 scales of n FP8 weights in one vector, so that predicting all layers is one tiny operation.

    weights   FP32 master weights of any shapes on one device, updated in place by the optimizer
    mode      "predicted"  grow by the bound, and take the true maximum every `interval` steps (MOSS)
              "current"    true maximum after every step (just-in-time scaling)
              "delayed"    largest maximum of the last `history` steps before this one, as Transformer Engine
                           does: quantizing need not wait for a reduction, but growing weights saturate (no recipe
                           uses it)
    interval  steps between true maxima in predicted mode; 0 = never

    self.scale, (n,) float32, only changes in place: a layer may keep the view scale[i]. An all-zero weight
    gets MIN_SCALE. A NaN or Inf weight makes its scale NaN or Inf once its maximum is taken; the prediction
    does not look at weights and stays finite until then.
    """
    MODES = ("predicted", "current", "delayed")

    def __init__(self, weights, mode="predicted", interval=500, history=16):
        if mode not in self.MODES:
            raise ValueError(f"mode = {mode!r} is unknown; choose one of {', '.join(self.MODES)}")
        if interval < 0 or history < 1:
            raise ValueError(f"need interval >= 0 and history >= 1, got interval = {interval}, history = {history}")
        if not weights or any(w.dtype != torch.float32 for w in weights):
            raise ValueError("the bound is proved for FP32 master weights; pass a list of float32 tensors")
        self.weights, self.mode, self.interval = list(weights), mode, interval
        self.scale = torch.empty(len(weights), device=weights[0].device)
        rows = history if mode == "delayed" else 0
        self.scale_history = self.scale.new_empty(rows, len(weights))  # row t % history: true scale after step t
        self.rescale()

    @torch.no_grad()
    def true_scale(self) -> torch.Tensor:
        """max|W| / 448 of each weight, (n,): reads every weight, but the host does not wait for it."""
        # One pass: 0.17 ms for 11008 x 16384 on an H200, where w.abs().amax(), which writes a copy, takes 0.52 ms.
        minima, maxima = zip(*(w.aminmax() for w in self.weights))
        amax = torch.maximum(torch.stack(maxima), -torch.stack(minima))
        return (amax / E4M3.max).clamp_min(MIN_SCALE)

    def headroom(self) -> torch.Tensor:
        """scale / true_scale, (n,). Below 1 the largest weights saturate, above 1 the top codes go unused."""
        return self.scale / self.true_scale()

    def measures(self, step: int) -> bool:
        """Whether update() at this step reads the new weights: then call it after optimizer.step(). Else call it before
        if FP8AdamW is the optimizer, which writes the weights under the new scales; for others either order will do."""
        return self.mode != "predicted" or (self.interval > 0 and step % self.interval == 0)

    def rescale(self) -> None:
        """Set every scale to the true one and forget the history, at the start or after loading other weights."""
        self.scale.copy_(self.true_scale())
        self.scale_history.copy_(self.scale.expand_as(self.scale_history))

    def update(self, lr: float, betas: tuple, weight_decay: float, step: int) -> None:
        """Follow an optimizer step. Call it once for each that is not skipped, when `measures` says.

        lr, betas and the decoupled weight_decay are those of that step; `step` is Adam's own count, from 1.
        Since |W_t| <= |1 - lr weight_decay| |W_{t-1}| + lr kappa_t, the same recursion bounds the scale. The
        absolute value keeps that true where lr weight_decay > 1. The host never waits for the GPU.
        """
        if self.mode == "delayed":
            self.scale.copy_(self.scale_history.amax(dim=0))
            self.scale_history[step % len(self.scale_history)] = self.true_scale()
        elif self.measures(step):
            self.rescale()
        else:
            decay = abs(1 - lr * weight_decay) * WEIGHT_SLACK
            growth = lr * adam_update_bound(step, *betas) * UPDATE_SLACK / E4M3.max
            self.scale.mul_(decay).add_(growth)

    def state_dict(self) -> dict:
        """A copy of the state, of fixed size. A run resumed without it would quantize with other scales."""
        return {"mode": self.mode, "scale": self.scale.clone(), "scale_history": self.scale_history.clone()}

    def load_state_dict(self, state: dict) -> None:
        """Restore a state bit for bit. ValueError if it has another mode, number of weights or history."""
        saved, mine = ((s["mode"], *s["scale"].shape, len(s["scale_history"])) for s in (state, self.state_dict()))
        if saved != mine:
            raise ValueError(f"the saved scales have (mode, weights, history) = {saved}, these have {mine}; build "
                             "WeightScales as it was when saved, or do not load and call anchor() instead")
        self.scale.copy_(state["scale"])
        self.scale_history.copy_(state["scale_history"])


# ---------------------------------------------------------------------------------------------------
# The optimizer that writes FP8 weights

class FP8AdamW(torch.optim.AdamW):
    """torch.optim.AdamW that, on a GPU with FP8 tensor cores, also writes the FP8 copies of some weights.

    Because the scale of the new weight is known before the new weight is, one pass over memory does it all: read
    p, g, m, v; write p, m, v, and W and W^T in FP8: 30 bytes per parameter. A scale that has to be measured takes
    38: the finished weight is read again to find it, and once more to quantize.

    groups   of parameters, as for AdamW; weights of layers share no group with others
    layers   objects with `weight` (N, K) FP32 and its FP8 `copies`, Quantized W (N, K) and W^T (K, N), whose scale
             is a view of WeightScales.scale; that has to hold the scale of the new weights when step() is called, or
             the copies have to be made again afterwards, as train.py does at a true rescale

    State and results are those of AdamW (to rounding; options are lr, betas, eps, weight_decay and fused). Elsewhere it
    is AdamW alone and writes no copies.
    """

    def __init__(self, groups, layers, **options):
        super().__init__(groups, **options)
        self.layers = [layer for layer in layers if has_fp8_tensor_cores(layer.weight.device)]
        ours = {layer.weight for layer in self.layers}
        for group in self.param_groups:
            count = sum(p in ours for p in group["params"])
            if 0 < count < len(group["params"]):
                raise ValueError(f"a group of {len(group['params'])} parameters holds {count} weights with FP8 copies: "
                                 "put those into a group of their own")
            if count:   # so that the step count, which the kernel's arguments depend on, stays on the host
                group["fused"] = False

    @torch.no_grad()
    def step(self):
        copies = {layer.weight: layer.copies for layer in self.layers}
        done = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p in copies and p.grad is not None:
                    self.step_with_copies(p, *copies[p], group)
                    done[p], p.grad = p.grad, None   # so that nothing is left for AdamW
        super().step()
        for p, grad in done.items():
            p.grad = grad

    def step_with_copies(self, p, w, w_t, group):
        state = self.state[p]
        if not state:
            state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state["step"] += 1
        adamw_triton(p, p.grad, state["exp_avg"], state["exp_avg_sq"], w.data, w_t.data, w.scale, group["lr"],
                     group["betas"], group["eps"], group["weight_decay"], int(state["step"]))


def adamw_reference(p, g, m, v, w, w_t, scale, lr, betas, eps, weight_decay, step):
    """One AdamW step on p (N, K) in place, as torch.optim.AdamW does it; then w (N, K), w_t (K, N) = E4M3(p / scale).

        m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
        p = (1 - lr weight_decay) p - lr m_hat / (sqrt(v_hat) + eps)         m_hat, v_hat: divided by 1 - beta^step
    """
    beta1, beta2 = betas
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    p.mul_(1 - lr * weight_decay)
    p.addcdiv_(m, (v.sqrt() / math.sqrt(1 - beta2**step)).add_(eps), value=-lr / (1 - beta1**step))
    w.copy_(cast(p * (1 / scale), E4M3))
    w_t.copy_(w.t())


if HAS_TRITON:
    @triton.jit
    def _adamw_kernel(p_ptr, g_ptr, m_ptr, v_ptr, w_ptr, w_t_ptr, scale_ptr, N, K, decay, one_minus_beta1, beta2,
                      one_minus_beta2, v_root_correction, eps, step_size, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
        """`adamw_reference` on one tile: every number is read once and written once."""
        n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = (n < N)[:, None] & (k < K)[None, :]
        at = n[:, None] * K + k[None, :]
        p = tl.load(p_ptr + at, mask=inside, other=0.0)
        g = tl.load(g_ptr + at, mask=inside, other=0.0)
        m = tl.load(m_ptr + at, mask=inside, other=0.0)
        v = tl.load(v_ptr + at, mask=inside, other=0.0)
        m += one_minus_beta1 * (g - m)
        v = beta2 * v + one_minus_beta2 * g * g
        p = p * decay - step_size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), v_root_correction) + eps)
        tl.store(p_ptr + at, p, mask=inside)
        tl.store(m_ptr + at, m, mask=inside)
        tl.store(v_ptr + at, v, mask=inside)
        w = to_fp8(p * tl.div_rn(1.0, tl.load(scale_ptr)))
        tl.store(w_ptr + at, w, mask=inside)
        tl.store(w_t_ptr + k[:, None] * N + n[None, :], tl.trans(w), mask=tl.trans(inside))

    def adamw_triton(p, g, m, v, w, w_t, scale, lr, betas, eps, weight_decay, step):
        """`adamw_reference` in one pass over memory. All tensors contiguous."""
        (N, K), (beta1, beta2) = p.shape, betas
        grid = (cdiv(N, 64), cdiv(K, 64))   # with 8 warps the fastest of eleven shapes on an H200
        _adamw_kernel[grid](p, g, m, v, w, w_t, scale, N, K, 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2,
                            math.sqrt(1 - beta2**step), eps, lr / (1 - beta1**step), BLOCK_N=64, BLOCK_K=64,
                            num_warps=8)


# ---------------------------------------------------------------------------------------------------
# What `python autoscale.py` shows

def adamw_update(gradients, beta1, beta2):
    """|m_hat / sqrt(v_hat)| of the last step when torch.optim.AdamW meets these gradients in float64."""
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight], lr=1.0, betas=(beta1, beta2), eps=1e-60, weight_decay=0.0)
    for gradient in gradients:
        weight.grad = gradient.reshape(1)
        weight.data.zero_()  # in the end the weight is the last update alone
        optimizer.step()
    return weight.abs().item()


def print_bound():
    print("1. Largest |m_hat / sqrt(v_hat)|, which Theorem 2 says is 1; last column: torch's AdamW, worst case\n")
    print("   beta1   beta2    t = 1      10     100    1000    limit   AdamW, t = 1000")
    for betas in ((0.95, 0.95), (0.9, 0.95), (0.9, 0.98), (0.9, 0.99), (0.9, 0.999), (0.0, 0.999), (0.95, 0.9)):
        bounds = "".join(f"{adam_update_bound(t, *betas):8.3f}" for t in (1, 10, 100, 1000, 10**9))
        print(f"   {betas[0]:5}{betas[1]:8} {bounds}{adamw_update(worst_case_gradients(1000, *betas), *betas):18.3f}")
    print("-> AdamW attains the bound, so it cannot be improved. Theorem 2 holds for beta1 = beta2 only: with betas\n"
          "   (0.9, 0.95) an update can be 1.17 learning rates, and with (0.9, 0.999), PyTorch's default, 7.27.\n")


def regression_run(steps=800, interval=200):
    """Learn a 64 x 64 linear map with AdamW. Returns a list of (step, lr, true, predicted, delayed scale)."""
    torch.manual_seed(0)
    target, weight = torch.randn(64, 64), torch.nn.Parameter(0.02 * torch.randn(64, 64))
    betas, weight_decay = (0.9, 0.95), 0.1
    optimizer = torch.optim.AdamW([weight], betas=betas, weight_decay=weight_decay)
    check_optimizer(optimizer)
    predicted, delayed = WeightScales([weight], interval=interval), WeightScales([weight], mode="delayed")
    rows = []
    for step in range(1, steps + 1):
        lr = 0.01 * min(step / 100, 0.5 + 0.5 * math.cos(math.pi * step / steps))  # warm-up, then cosine
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        (torch.randn(128, 64) @ (weight - target).T).square().mean().backward()
        optimizer.step()
        for scales in (predicted, delayed):
            scales.update(lr, betas, weight_decay, step)
        rows.append((step, lr, *(s.item() for s in (predicted.true_scale(), predicted.scale, delayed.scale))))
    return rows


def print_prediction(rows):
    print("2. A 64 x 64 regression, AdamW (0.9, 0.95), decay 0.1: scale anchored every 200 steps, predicted between\n")
    print("   step      lr  true scale  predicted   ratio  headroom, bits  delayed / true")
    for step, lr, true, predicted, delayed in rows:
        if step == 1 or step % 100 == 0 or step % 200 == 199:
            print(f"   {step:4}{lr:8.4f}{true:12.6f}{predicted:11.6f}{predicted / true:8.3f}"
                  f"{math.log2(predicted / true):16.3f}{delayed / true:16.3f}")
    too_small = [sum(row[i] < row[2] for row in rows) for i in (3, 4)]  # predicted, delayed
    headroom = math.log2(max(row[3] / row[2] for row in rows))
    shortfall = 1 - min(row[4] / row[2] for row in rows)
    print(f"-> Predicted: too small in {too_small[0]} of {len(rows)} steps, too large by {headroom:.1f} bits at most.\n"
          f"   Delayed: too small in {too_small[1]} steps, by up to {shortfall:.0%}, as it trails growing weights.\n")


def print_headroom_cost():
    print("3. What headroom costs: E4M3 of a Gaussian 1024 x 1024 weight, scale = 2^bits max|W| / 448\n")
    print("   headroom, bits  SQNR, dB  subnormal, |W / scale| < 2^-6")
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    for bits in (0, 1, 2, 4, 6, 8, 9, 10, 11, 12, 13, 14):
        scale = WeightScales([weight]).scale * 2**bits
        approximation = cast(weight / scale, E4M3).float() * scale
        subnormal = ((weight / scale).abs() < E4M3.min_normal).float().mean().item()
        print(f"   {bits:14}{sqnr(weight, approximation):10.2f}{subnormal:14.1%}")
    print("-> Free for about 10 bits, because E4M3 carries its own exponent. Once most weights are subnormal, a bit\n"
          "   costs 6 dB. (An outlier 2^k times the other weights has spent k of these bits already.)\n")


def print_timing():
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} thread"
    print(f"4. One update of all scales, us, median ± interquartile range; {device}, torch {torch.__version__}\n")
    print("   weights              predicted    just-in-time amax")
    for count, *shape in [(1, 1024, 1024), (1, 4096, 4096), (7, 4096, 4096)] + cuda * [(1, 11008, 16384)]:
        weights = [torch.randn(shape, device="cuda" if cuda else "cpu") for _ in range(count)]
        line = f"   {count} x {shape[0]:5} x {shape[1]:5}"
        for mode in ("predicted", "current"):
            scales = WeightScales(weights, mode, interval=0)
            timer = Timer("scales.update(1e-3, (0.9, 0.95), 0.1, 100)", globals={"scales": scales})
            result = timer.blocked_autorange(min_run_time=0.3)
            line += f"{result.median * 1e6:12.1f} ± {result.iqr * 1e6:<5.1f}"
        print(line)
    print("-> A prediction costs the same for any size and number of weights; an amax reads them all.\n")


def print_optimizer_timing():
    """On a GPU: FP8AdamW's kernel against what a measured scale needs, AdamW (fused), amax, cast and transpose."""
    from triton.testing import do_bench
    print("5. One AdamW step that leaves FP8 W and W^T, ms (median)\n")
    print("   weight             one pass   TB/s   AdamW alone   AdamW, amax, cast, transpose")
    for N, K in ((4096, 4096), (22016, 4096), (11008, 16384)):
        p, g, m = (torch.randn(N, K, device="cuda") for _ in range(3))
        v, scale = torch.rand(N, K, device="cuda"), torch.full((1, 1), 0.01, device="cuda")
        w, w_t = (torch.empty(shape, device="cuda", dtype=E4M3.dtype) for shape in ((N, K), (K, N)))
        once = do_bench(lambda: adamw_triton(p, g, m, v, w, w_t, scale, 1e-3, (0.9, 0.95), 1e-8, 0.1, 10),
                        return_mode="median")
        p.grad = g
        optimizer = torch.optim.AdamW([p], lr=1e-3, fused=True)
        scales = WeightScales([p], "current")

        def in_passes():
            optimizer.step()
            scales.update(1e-3, (0.9, 0.95), 0.1, 1)
            transpose(quantize(p, E4M3, (ALL, ALL), "fp32", scales.scale.view(1, 1)).data)
        alone, passes = (do_bench(f, return_mode="median") for f in (optimizer.step, in_passes))
        print(f"   {N:5} x {K:5}{once:16.3f}{30e-9 * N * K / once:7.2f}{alone:14.3f}{passes:17.3f}")
    print("-> The scale is known before the weight, so the FP8 copies ride along with the update.\n")


def plot_prediction(rows, path):
    steps, _, true, predicted, _ = zip(*rows)
    with picture(path, xlabel="step", ylabel="weight scale", title="The prediction stays above the truth") as axes:
        axes.plot(steps, predicted, label="predicted, anchored every 200 steps")
        axes.plot(steps, true, label="true, max|W| / 448")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Predicted FP8 weight scales: the bound, its headroom, its cost.")
    parser.add_argument("--plot", metavar="FILE.png", help="also draw the prediction (needs matplotlib)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the operations here are small; on a busy machine more threads only wait
    print_bound()
    rows = regression_run()
    print_prediction(rows)
    if args.plot:
        plot_prediction(rows, args.plot)
    print_headroom_cost()
    print_timing()
    if torch.cuda.is_available() and has_fp8_tensor_cores("cuda"):
        print_optimizer_timing()
