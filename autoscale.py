"""
Weight scales without a max-reduction: how far can Adam move a weight in one step?

    python autoscale.py                   # tables: the bound, a prediction at work, what it costs and saves
    python autoscale.py --plot FILE.png   # the second table as a picture (needs matplotlib)

An FP8 weight is stored as E4M3(W / scale). The scale must be at least the *true scale*, max|W| / 448, or the
largest weights saturate. Measuring it after every step reads every weight once more, which costs bandwidth.
MOSS (arXiv 2511.05811) predicts it: one Adam step moves a weight by at most the learning rate eta, so

    s_t = s_0 + eta t / 448          because |m_hat / sqrt(v_hat)| <= 1      (its Theorem 2)

is large enough. Only every 500 steps a *rescale* measures the true scale. This file keeps the idea and
repairs the bound: |m_hat / sqrt(v_hat)| can exceed 1. Its exact supremum kappa_t comes from Cauchy-Schwarz
(adam_update_bound). With decoupled weight decay lambda and any schedule eta_t, this scale is large enough:

    s_t = s_{t-1} |1 - eta_t lambda| + eta_t kappa_t / 448

Its *headroom*, scale / true scale, costs next to no accuracy up to about 2^10. It never falls below 1 under
Adam and AdamW with decoupled decay, for any gradients (clipped, noisy, or none), for amsgrad, whose v is only
larger, and in exact arithmetic for any eps. Muon's steps have a bound of another kind (muon_step_bound). SGD,
Lion and L2 decay move weights by other rules.
"""
import argparse
import inspect
import math

import torch
from torch.utils.benchmark import Timer

from fp8_formats import E4M3, cast, picture
from microscale import ALL, HAS_TRITON, MIN_SCALE, cdiv, kernels_run_on, quantize, sqnr, transpose

if HAS_TRITON:
    import triton
    import triton.language as tl
    from microscale import to_fp8


# ---------------------------------------------------------------------------------------------------
# The bound

def adam_update_bound(t: int, beta1: float, beta2: float) -> float:
    """kappa_t: the largest |m_hat / sqrt(v_hat)| that any t gradients can cause, bias correction included.

    The gradient g_i of i steps ago enters m with weight a_i = (1 - beta1) beta1^i, and g_i^2 enters v with
    weight b_i = (1 - beta2) beta2^i. Cauchy-Schwarz for a_i g_i = (a_i / sqrt(b_i)) (sqrt(b_i) g_i), i < t:

        |m| <= sqrt(sum a_i^2 / b_i) sqrt(v),         with equality if g_i is proportional to a_i / b_i

    Bias correction divides m by sum a_i = 1 - beta1^t, and v by sum b_i = 1 - beta2^t. All these sums are
    geometric. With S(r) = 1 + r + ... + r^(t-1) the factors 1 - beta1 and 1 - beta2 cancel:

        kappa_t = sqrt(S(beta1^2 / beta2) S(beta2)) / S(beta1)

    It is 1 at t = 1 and never decreases. It stays 1 only for beta1 = beta2, where Theorem 2 is right. For
    beta1^2 >= beta2 it grows without limit, and beta2 = 0 < beta1 makes it infinite at t = 2. Raises
    ValueError for t < 1 and for a beta outside [0, 1).
    """
    if t < 1 or not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"{t = }, {beta1 = }, {beta2 = }: Adam counts steps from 1; choose betas in [0, 1)")
    ratio = beta1 * beta1 / beta2 if beta2 > 0 else (math.inf if beta1 > 0 else 0.0)
    return math.sqrt(geometric_sum(ratio, t) * geometric_sum(beta2, t)) / geometric_sum(beta1, t)


def geometric_sum(ratio: float, t: int) -> float:
    """Return 1 + ratio + ... + ratio^(t-1), accurate to a few ulp also where ratio is close to 1."""
    if t == 1 or ratio == 0:
        return 1.0
    if ratio == 1:
        return float(t)
    log_power = t * math.log(ratio)
    return math.expm1(log_power) / (ratio - 1) if log_power < 700 else math.inf


def worst_case_gradients(t: int, beta1: float, beta2: float) -> torch.Tensor:
    """Return the t gradients, oldest first, with which step t attains the bound: (t,) float64, largest = 1.

    The gradient of i steps ago is proportional to (beta1 / beta2)^i. For beta1 < beta2 they grow by the same
    factor every step: m follows the large recent ones while v still remembers the small old ones. beta2 > 0.
    """
    adam_update_bound(t, beta1, beta2)   # refuses impossible arguments
    gradients = torch.pow(beta1 / beta2, torch.arange(t - 1, -1, -1, dtype=torch.float64, device="cpu"))
    return gradients / gradients.max()


def muon_step_bound(group, shape) -> float:
    """The largest entry of a step of torch.optim.Muon on a weight of this shape, over the learning rate, with
    room for rounding. `group` is its parameter group.

    Muon divides a matrix by its Frobenius norm, so that no singular value x exceeds 1 (in BF16: 1.01), and
    takes Newton-Schulz steps, which leave the singular vectors and turn each x into

        p(x) = a x + b x^3 + c x^5                (a, b, c) = `ns_coefficients` of the parameter group

    If x <= M before a step, then |p(x)| <= max |p| over [0, M] after it, which lies at M or where p'(x) = 0.
    An entry of a matrix is at most its largest singular value: by default 1.2024 after 5 steps. A diagonal
    gradient attains it. Most do not: an entry of a wide matrix is about 1 / sqrt(width) of the norm. Last,
    `adjust_lr_fn` multiplies the learning rate by a factor for the shape (rows, columns).
    """
    (a, b, c), largest, (rows, columns) = group["ns_coefficients"], 1.01, shape
    root = math.sqrt(max(9 * b * b - 20 * a * c, 0))
    turns = [sign / (10 * c) for sign in (-3 * b - root, -3 * b + root)] if c else [-a / (3 * b or math.inf)]
    for _ in range(group["ns_steps"]):
        inside = [math.sqrt(square) for square in turns if 0 < square < largest * largest]
        largest = min(max(abs(a * x + b * x**3 + c * x**5) for x in (largest, *inside)), 1e9)
    if group["adjust_lr_fn"] == "match_rms_adamw":
        return MUON_SLACK * largest * 0.2 * math.sqrt(max(rows, columns))
    return MUON_SLACK * largest * math.sqrt(max(1, rows / columns))


# ---------------------------------------------------------------------------------------------------
# The scales

# Room for rounding (skip this at first). In FP32, of unit u = 2^-24, weights and scales together are rounded
# at most 7 times in a step (decay factor, product, sum; division by 448 at a rescale). With 8u the bound
# holds for them as computed. In 500 steps that adds 0.02% to a scale.
WEIGHT_SLACK = 1 + 2**-21
# Adam's update has a relative error below 5.5u / (1 - beta1^2 / beta2) from the recursions for m and v. Bias
# corrections in FP32 (capturable=True, for CUDA graphs) add up to 2u / (1 - beta2). For the betas that
# check_optimizer accepts, both together stay below 2^-9. Twice that is 0.4% of an update.
UPDATE_SLACK = 1 + 2**-8
# Newton-Schulz steps round to BF16, by 2^-9 of an entry. Such errors point in all directions: their matrix
# has a norm of about 2^-9 of that of what is rounded, at any shape. 0.06% was seen, and 3% are allowed.
MUON_SLACK = 1 + 2**-5


class WeightScales:
    """The FP32 scales of FP8 weights in one vector, so that predicting all of them is one tiny operation.

    weights   FP32 parameters of any shapes on one device, updated in place by the optimizer
    mode      "predicted": grow by the bound, and rescale every `interval` steps, 0 for never (MOSS)
              "current": rescale after every step (just-in-time scaling)
    parts     for each weight, how many scales it has, for as many equal groups of rows (experts); default 1

    self.scale, (n,) float32, is all of the state. Checkpoints need it: without it a resumed run quantizes
    otherwise. It only changes in place: a layer may keep self.views[i], the scales of weight i. The scale of
    zeros is MIN_SCALE. A prediction does not look at weights: only a rescale shows a NaN or Inf.
    """

    def __init__(self, weights, mode="predicted", interval=500, parts=None):
        self.weights, self.mode, self.interval = list(weights), mode, interval
        if mode not in ("predicted", "current") or interval < 0:
            raise ValueError(f"{mode = }, {interval = }: use 'predicted' or 'current', and 0 or more steps")
        if not self.weights or any(w.dtype != torch.float32 for w in self.weights):
            raise ValueError("the bound is proved for FP32 master weights; pass a list of float32 tensors")
        device, *others = sorted({str(w.device) for w in self.weights})
        if others:
            raise ValueError(f"weights on {device} and {others[0]}; make one WeightScales for each device")
        self.parts = list(parts or [1] * len(self.weights))
        self.scale = torch.empty(sum(self.parts), dtype=torch.float32, device=device)
        self.views = self.scale.split(self.parts)
        self.rescale()

    @torch.no_grad()
    def true_scale(self) -> torch.Tensor:
        """Return max|W| / 448 of each group of weights, (n,). All are read; the host does not wait for it."""
        # One pass: 0.17 ms for 11008 x 16384 on an H200. w.abs().amax(), which writes a copy, takes 0.52 ms.
        minima, maxima = zip(*((w if w.numel() else w.new_zeros(n)).reshape(n, -1).aminmax(dim=1)
                               for w, n in zip(self.weights, self.parts)))
        amax = torch.maximum(torch.cat(maxima), -torch.cat(minima))
        return (amax / E4M3.max).clamp_min(MIN_SCALE)

    def headroom(self) -> torch.Tensor:
        """Return scale / true scale, (n,). Below 1 large weights saturate, above 1 top codes go unused."""
        return self.scale / self.true_scale()

    def rescale(self) -> None:
        """Measure every scale: at the start, or after loading other weights."""
        self.scale.copy_(self.true_scale())

    def measures(self, step: int) -> bool:
        """Return whether update() reads the new weights at this step. If so, call update() after step() of
        the optimizer, else before that of FP8AdamW, which needs the new scales. Others take either order."""
        return self.mode == "current" or (self.interval > 0 and step % self.interval == 0)

    def update(self, lr, betas, weight_decay: float, step: int, bound=None) -> None:
        """Move the scales by one optimizer step. Call it once for each that is taken (`measures`: when).

        lr, betas and the decoupled weight_decay are those of that step, for all weights; `step` is Adam's
        count, from 1. For Muon give its `bound` (n,), muon_step_bound for each, and no betas. The host does
        not wait for the GPU (unless lr is a tensor there).

        Adam skips a weight whose .grad is None: it does not decay, so its scale does not shrink. Its scale
        still grows, because zero_grad() may have come before update(). Such a weight counts fewer of Adam's
        steps, but `step` is safe for it, because kappa_t never decreases.
        """
        if self.measures(step):
            return self.rescale()
        lr = float(lr)
        decay = abs(1 - lr * weight_decay)
        if decay >= 1 or all(w.grad is not None for w in self.weights):
            self.scale.mul_(decay * WEIGHT_SLACK)   # all scales at once
        else:   # a weight without gradient does not decay
            for w, scale in zip(self.weights, self.views):
                scale.mul_((1 if w.grad is None else decay) * WEIGHT_SLACK)
        bound = adam_update_bound(step, *betas) * UPDATE_SLACK if bound is None else bound
        self.scale.add_(abs(lr) * bound / E4M3.max)


# ---------------------------------------------------------------------------------------------------
# The optimizers: which ones the bound covers, and one that writes FP8 weights

MAX_BETA_RATIO = 0.999  # of beta1^2 / beta2; from 1 on, kappa_t grows without limit
MIN_EPS = 1e-15         # with less, squared gradients that underflow FP32 leave v = 0 under an m > 0
MUON = getattr(torch.optim, "Muon", None)   # from PyTorch 2.9 on
MAX_MUON = 4            # of |p|; coefficients that let it grow do not orthogonalize


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError unless the prediction is proved for every parameter group of `optimizer`."""
    def refuse(reason):
        raise ValueError(f"{type(optimizer).__name__}: {reason}; use torch.optim.AdamW with usual settings, "
                         "or WeightScales(..., mode='current')")
    if type(optimizer) is MUON:
        for group in optimizer.param_groups:
            bound = muon_step_bound(group, (1, 1))
            if not (bound < MAX_MUON and group["eps"] >= MIN_EPS):
                refuse(f"ns_coefficients {group['ns_coefficients']}, eps {group['eps']}: {bound:.3g} lr")
        return
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW, FP8AdamW):   # subclasses may differ
        refuse("weight scales are predicted from the bound on the updates of Adam and Muon")
    for group in optimizer.param_groups:
        (beta1, beta2), eps, decay = map(float, group["betas"]), group["eps"], group["weight_decay"]
        adam_update_bound(1, beta1, beta2)   # refuses betas outside [0, 1)
        if decay != 0 and not group["decoupled_weight_decay"]:
            refuse(f"weight_decay = {decay} goes into the gradient, so weights do not shrink by lr * decay")
        if beta1 * beta1 > MAX_BETA_RATIO * beta2:
            refuse(f"betas = {(beta1, beta2)}: the bound grows (almost) without limit as beta1^2 nears beta2")
        if group["capturable"] and beta2 > 0.9999:
            refuse(f"{beta2 = } with capturable = True rounds bias corrections by more than the bound allows")
        if not eps >= MIN_EPS:
            refuse(f"{eps = } is less than {MIN_EPS}, too small for squared gradients that underflow FP32")


class FP8AdamW(torch.optim.AdamW):
    """torch.optim.AdamW that, on a GPU with FP8 tensor cores, also writes the FP8 copies of some weights.

    The scale of the new weight is known before the new weight is. So one pass over memory does it all: read
    p, g, m, v; write p, m, v, and W and W^T in FP8: 30 bytes per parameter. A scale that has to be measured
    takes 38: the finished weight is read again to find it, and once more to quantize.

    layers   objects with `weight` (N, K) FP32; `copies`, its Quantized W (N, K) and W^T (K, N), or None; and
             `requantize(scale)`, which renews them. Their scales are WeightScales.views. They have to be
             those of the new weights when step() is called, or its closure returns. Else requantize after it.

    State and results are those of AdamW, to rounding. AdamW itself steps weights that the kernel does not
    take, and they are requantized. On other devices, and in a copy of this optimizer, it is AdamW alone.

    factor   of all gradients, a tensor of one number, for clipping; None: 1. The kernel multiplies what it
             reads, and does not write it: .grad of its weights stays as it is.
    """
    layers, factor = (), None

    def __init__(self, groups, layers, **options):
        super().__init__(groups, **options)
        self.layers = [layer for layer in layers if kernels_run_on(layer.weight.device)]
        self._step_supports_amp_scaling = False   # torch.amp unscales gradients before the step

    @torch.no_grad()
    def step(self, closure=None):
        """Step all weights with a gradient, renew the copies of all layers, and return the closure's loss."""
        with torch.enable_grad():
            loss = closure() if closure else None
        group_of = {p: group for group in self.param_groups for p in group["params"]}
        gradients, others = {}, []   # of weights that the kernel steps; layers with copies still to renew
        for layer in self.layers:
            p, group = layer.weight, group_of.get(layer.weight, {})
            group["fused"] = False   # after a fused step model.py would call these copies out of date
            if layer.copies and self.kernel_takes(p, group, layer.copies[0]):
                self.step_with_copies(p, group, *layer.copies)
                gradients[p], p.grad = p.grad, None   # so that nothing is left for AdamW
            elif layer.copies:
                others.append(layer)
        rest = [p.grad for p in group_of if p.grad is not None]
        if rest and self.factor is not None:
            torch._foreach_mul_(rest, self.factor)
        # AdamW's step without the hooks that PyTorch wraps around every step(): those of this one have run
        inspect.unwrap(torch.optim.AdamW.step, stop=lambda f: not hasattr(f, "hooked"))(self)
        for p, gradient in gradients.items():
            p.grad = gradient
        for layer in others:   # their weights or at least their scales have changed
            layer.requantize(layer.copies[0].scale if layer.copies[0].block[1] == ALL else None)
        return loss

    def kernel_takes(self, p, group, w) -> bool:
        """Return whether p has a gradient, options that the kernel knows, and tensors as it needs them."""
        if p.grad is None or w.block[1] != ALL or not group.get("decoupled_weight_decay"):
            return False
        odd = any(group[name] for name in ("amsgrad", "maximize", "capturable", "differentiable"))
        moments = (self.state.get(p, {}).get(name, p) for name in ("exp_avg", "exp_avg_sq"))
        return not odd and all(x.is_contiguous() for x in (p, *moments))

    def step_with_copies(self, p, group, w, w_t):
        state = self.state[p]
        if not state:
            state.update(step=torch.tensor(0.0, device="cpu"), exp_avg=torch.zeros_like(p),
                         exp_avg_sq=torch.zeros_like(p))
        state["step"] = state["step"].cpu() + 1   # on the host, as an argument; a loaded one moves there once
        adamw_triton(p, p.grad.contiguous(), state["exp_avg"], state["exp_avg_sq"], w.data, w_t.data, w.scale,
                     float(group["lr"]), [float(beta) for beta in group["betas"]], group["eps"],
                     group["weight_decay"], int(state["step"]), self.factor)


# ---------------------------------------------------------------------------------------------------
# The kernel

def adamw_reference(p, g, m, v, w, w_t, scale, lr, betas, eps, weight_decay, step, factor=None):
    """Take one AdamW step on p (N, K) in place, as torch does; then w (N, K), w_t (K, N) = E4M3(p / scale),
    with a scale (E, 1) for each of E groups of rows. `factor`, of one number, first multiplies g.

        m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
        p = (1 - lr weight_decay) p - lr m_hat / (sqrt(v_hat) + eps)       m_hat, v_hat: over 1 - beta^step
    """
    beta1, beta2 = betas
    g = g if factor is None else g * factor
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    p.mul_(1 - lr * weight_decay)
    p.addcdiv_(m, (v.sqrt() / math.sqrt(1 - beta2**step)).add_(eps), value=-lr / (1 - beta1**step))
    w.copy_(cast((p.unflatten(0, (len(scale), -1)) * (1 / scale)[..., None]).view_as(p), E4M3))
    w_t.copy_(w.t())


if HAS_TRITON:
    @triton.jit
    def _adamw_kernel(p_ptr, g_ptr, m_ptr, v_ptr, w_ptr, w_t_ptr, scale_ptr, factor_ptr, N, K, rows, decay,
                      one_minus_beta1, beta2, one_minus_beta2, v_root_correction, eps, step_size,
                      BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
        """Compute `adamw_reference` on one tile: every number is read once and written once."""
        n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = (n < N)[:, None] & (k < K)[None, :]
        at = n[:, None] * K + k[None, :]
        p = tl.load(p_ptr + at, mask=inside, other=0.0)
        g = tl.load(g_ptr + at, mask=inside, other=0.0)
        if factor_ptr is not None:
            g *= tl.load(factor_ptr)
        m = tl.load(m_ptr + at, mask=inside, other=0.0)
        v = tl.load(v_ptr + at, mask=inside, other=0.0)
        m += one_minus_beta1 * (g - m)
        v = beta2 * v + one_minus_beta2 * g * g
        p = p * decay - step_size * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), v_root_correction) + eps)
        tl.store(p_ptr + at, p, mask=inside)
        tl.store(m_ptr + at, m, mask=inside)
        tl.store(v_ptr + at, v, mask=inside)
        scale = tl.load(scale_ptr + n // rows, mask=n < N, other=1.0)   # each is that of so many rows
        w = to_fp8(p * tl.div_rn(1.0, scale)[:, None])
        tl.store(w_ptr + at, w, mask=inside)
        tl.store(w_t_ptr + k[:, None] * N + n[None, :], tl.trans(w), mask=tl.trans(inside))

    def adamw_triton(p, g, m, v, w, w_t, scale, lr, betas, eps, weight_decay, step, factor=None):
        """Compute `adamw_reference` in one pass over memory. All tensors have to be contiguous."""
        (N, K), (beta1, beta2) = p.shape, betas
        grid = (cdiv(N, 64), cdiv(K, 64))   # with 8 warps the fastest of eleven shapes on an H200
        _adamw_kernel[grid](p, g, m, v, w, w_t, scale, factor, N, K, N // len(scale), 1 - lr * weight_decay,
                            1 - beta1, beta2, 1 - beta2, math.sqrt(1 - beta2**step), eps,
                            lr / (1 - beta1**step), BLOCK_N=64, BLOCK_K=64, num_warps=8)


# ---------------------------------------------------------------------------------------------------
# What `python autoscale.py` shows

def print_bound():
    print("1. Largest |m_hat / sqrt(v_hat)|, which Theorem 2 says is 1; last column: torch's AdamW, "
          "worst case\n\n   beta1   beta2    t = 1      10     100    1000    limit   AdamW, t = 1000")
    for betas in (0.95, 0.95), (0.9, 0.95), (0.9, 0.98), (0.9, 0.99), (0.9, 0.999), (0.0, 0.999), (0.95, 0.9):
        bounds = "".join(f"{adam_update_bound(t, *betas):8.3f}" for t in (1, 10, 100, 1000, 10**9))
        attained = adamw_update(worst_case_gradients(1000, *betas), *betas)
        print(f"   {betas[0]:5}{betas[1]:8} {bounds}{attained:18.3f}")
    print("-> AdamW attains the bound, so it cannot be improved. Theorem 2 is right for beta1 = beta2 only:\n"
          "   with PyTorch's default, (0.9, 0.999), an update can be 7.27 learning rates.\n")


def adamw_update(gradients, beta1, beta2):
    """Return |m_hat / sqrt(v_hat)| of torch.optim.AdamW's last step on these gradients, in float64."""
    weight = torch.nn.Parameter(gradients.new_zeros(1, dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight], lr=1.0, betas=(beta1, beta2), eps=1e-60, weight_decay=0.0)
    for gradient in gradients.double():
        weight.grad = gradient.reshape(1)
        weight.data.zero_()   # in the end the weight is the last update alone
        optimizer.step()
    return weight.abs().item()


def regression_run(steps=800, interval=200):
    """Learn a 64 x 64 linear map with AdamW. Return a list of (step, lr, true, predicted, delayed scale)."""
    torch.manual_seed(0)
    target, weight = torch.randn(64, 64), torch.nn.Parameter(0.02 * torch.randn(64, 64))
    betas, decay, rows = (0.9, 0.95), 0.1, []
    optimizer = torch.optim.AdamW([weight], betas=betas, weight_decay=decay)
    scales = WeightScales([weight], interval=interval)
    measured = scales.scale.tolist()
    for step in range(1, steps + 1):
        lr = 0.01 * min(step / 100, 0.5 + 0.5 * math.cos(math.pi * step / steps))   # warm-up, then cosine
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        (torch.randn(128, 64) @ (weight - target).T).square().mean().backward()
        optimizer.step()
        scales.update(lr, betas, decay, step)
        delayed = max(measured[-16:])   # of the steps before this one, as in Transformer Engine
        measured += scales.true_scale().tolist()
        rows.append((step, lr, measured[-1], scales.scale.item(), delayed))
    return rows


def print_prediction(rows):
    print("2. A 64 x 64 regression, AdamW (0.9, 0.95), decay 0.1: a rescale every 200 steps, predicted "
          "between\n\n   step      lr  true scale  predicted  headroom  delayed's")
    for step, lr, true, scale, delayed in rows:
        if step == 1 or step % 100 == 0 or step % 200 == 199:
            print(f"{step:7}{lr:8.4f}{true:12.6f}{scale:11.6f}{scale / true:10.3f}{delayed / true:9.3f}")
    for name, i in ("Predicted", 3), ("Delayed", 4):
        headroom = [row[i] / row[2] for row in rows]
        print(f"   {name}: too small in {sum(x < 1 for x in headroom)} of {len(rows)} steps, headroom "
              f"{min(headroom):.2f} to {max(headroom):.2f}")
    print("-> A delayed scale trails growing weights, whose largest saturate. A predicted one leads.\n")


def print_headroom_cost():
    print("3. What headroom costs: E4M3 of a Gaussian 1024 x 1024 weight, scale = 2^bits max|W| / 448\n\n"
          "   headroom, bits  SQNR, dB  subnormal, |W / scale| < 2^-6")
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    for bits in (0, 1, 2, 4, 6, 8, 9, 10, 11, 12, 13, 14):
        scale = WeightScales([weight]).scale * 2**bits
        error = sqnr(weight, cast(weight / scale, E4M3).float() * scale)
        subnormal = ((weight / scale).abs() < E4M3.min_normal).float().mean().item()
        print(f"   {bits:14}{error:10.2f}{subnormal:14.1%}")
    print("-> Free for about 10 bits, because E4M3 carries its own exponent. Once most weights are subnormal,"
          " a bit\n   costs 6 dB. (An outlier 2^k times the others has spent k of these bits already.)\n")


def print_timing():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} thread"
    print(f"4. What a step does with one weight, ms (median); {name}, torch {torch.__version__}\n\n"
          "   weight             predict        amax       AdamW  FP8 copies   the last two in one pass")
    sizes = (1024, 1024), (4096, 4096), (22016, 4096), (11008, 16384)
    for N, K in sizes if device == "cuda" else sizes[:2]:
        p, g, m, v = (torch.rand(N, K, device=device) for _ in range(4))
        p.grad, scales = g, WeightScales([p], interval=0)
        scale, adamw = scales.scale.view(1, 1), torch.optim.AdamW([p], lr=1e-3, fused=True)
        tasks = [lambda: scales.update(1e-3, (0.9, 0.95), 0.1, 100), scales.rescale, adamw.step,
                 lambda: transpose(quantize(p, E4M3, (ALL, ALL), "fp32", scale).data)]
        if kernels_run_on(device):
            w, w_t = (torch.empty(shape, device=device, dtype=E4M3.dtype) for shape in ((N, K), (K, N)))
            tasks.append(lambda: adamw_triton(p, g, m, v, w, w_t, scale, 1e-3, (0.9, 0.95), 1e-8, 0.1, 10))
        timers = (Timer("task()", globals={"task": task}) for task in tasks)
        times = [1e3 * timer.blocked_autorange(min_run_time=0.3).median for timer in timers]
        print(f"   {N:5} x {K:5}" + "".join(f"{time:12.3f}" for time in times))
    print("-> An amax reads the weight; a prediction costs the same for any size. It is known before the\n"
          "   weight is, so that one pass does the step and writes both FP8 copies.\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Predicted FP8 weight scales: bound, headroom, cost.")
    parser.add_argument("--plot", metavar="FILE.png", help="also draw the prediction (needs matplotlib)")
    args = parser.parse_args()
    torch.set_num_threads(1)   # the operations here are small; on a busy machine more threads only wait
    print_bound()
    rows = regression_run()
    print_prediction(rows)
    if args.plot:
        steps, _, true, predicted, _ = zip(*rows)
        labels = dict(xlabel="step", ylabel="weight scale", title="The prediction stays above the truth")
        with picture(args.plot, **labels) as axes:
            axes.plot(steps, predicted, label="predicted, rescaled every 200 steps")
            axes.plot(steps, true, label="true, max|W| / 448")
    print_headroom_cost()
    print_timing()
