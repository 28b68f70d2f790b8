"""What autoscale.py promises: kappa_t bounds Adam's update exactly, no weight ever outgrows its predicted
scale, and FP8AdamW is an AdamW whose FP8 copies are those of its weights."""
import copy
import math
import pickle

import pytest
import torch
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, RMSprop

import autoscale
from autoscale import (MIN_SCALE, MUON, FP8AdamW, WeightScales, adam_update_bound, adamw_update,
                       check_optimizer, geometric_sum, muon_step_bound, worst_case_gradients)
from conftest import DEVICE, for_devices, let_kernels_run, needs_muon, needs_triton
from fp8_formats import E4M3, cast
from microscale import RECIPES, quantize_weight

BETAS = [(0.9, 0.95), (0.9, 0.999), (0.95, 0.95), (0.0, 0.99), (0.9, 0.81), (0.95, 0.9)]
SHAPES = [(7, 5), (1, 1), (33,), (2, 3, 4)]

pytestmark = pytest.mark.usefixtures("one_thread")
for_betas = pytest.mark.parametrize("betas", BETAS, ids=str)
for_bounded_betas = pytest.mark.parametrize("betas", BETAS[:3], ids=str)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def ragged_weights(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter((0.1 * torch.randn(s, generator=generator)).to(device)) for s in SHAPES]


def amax(weights):
    return torch.stack([w.detach().abs().max() for w in weights])


def assert_below_scale(weights, scales):
    """No weight exceeds 448 scale, in float64, where the product is exact, and without any tolerance."""
    assert (amax(weights).double() <= 448 * scales.scale.double()).all()


# ---------------------------------------------------------------------------------------------------
# The bound

@for_betas
@pytest.mark.parametrize("t", [1, 2, 3, 10, 100, 1000])
def test_closed_form_is_the_direct_sum(betas, t):
    beta1, beta2 = betas
    a = [(1 - beta1) * beta1**i for i in range(t)]
    b = [(1 - beta2) * beta2**i for i in range(t)]
    sums = math.sqrt(math.fsum(x * x / y for x, y in zip(a, b)))
    direct = sums * math.sqrt(1 - beta2**t) / (1 - beta1**t)
    # 1 - beta^t cancels to some 1e-3, which costs the direct sum three of its 16 digits, not the closed form
    assert adam_update_bound(t, *betas) == pytest.approx(direct, rel=1e-12)


@pytest.mark.parametrize("ratio", [0.0, 1e-300, 0.5, 1 - 1e-9, 1 - 2**-53, 1.0, 1 + 2**-52, 1 + 1e-9, 1.5])
@pytest.mark.parametrize("t", [1, 2, 50, 1000])
def test_geometric_sum_is_accurate_around_one(ratio, t):
    assert geometric_sum(ratio, t) == pytest.approx(math.fsum(ratio**i for i in range(t)), rel=1e-13)


@for_betas
def test_the_bound_begins_at_the_learning_rate_and_never_decreases(betas):
    """So it covers a weight that counts fewer steps. log kappa_t^2 = f(x + d) - 2 f(x) + f(x - d), where
    f(x) = log S(e^-x), and f'' = 1 / (4 sinh(x/2)^2) - t^2 / (4 sinh(tx/2)^2) never falls as t grows."""
    bounds = [adam_update_bound(t, *betas) for t in range(1, 500)]
    assert bounds[0] == 1.0 and all(b >= a * (1 - 1e-15) for a, b in zip(bounds, bounds[1:]))


@pytest.mark.parametrize("t, betas, bound", [
    (10**9, (0.9, 0.95), 1.165), (10**9, (0.9, 0.999), 7.270), (10**9, (0.95, 0.95), 1.0),
    (10**9, (0.95, 0.9), math.inf), *((t, (0.9, 0.81), (t / 19) ** 0.5) for t in (10**3, 10**6, 10**9)),
    (1, (0.9, 0.0), 1.0), (2, (0.9, 0.0), math.inf), (2, (0.0, 0.0), 1.0)], ids=str)
def test_known_bounds_which_have_a_limit_only_for_beta1_squared_below_beta2(t, betas, bound):
    assert adam_update_bound(t, *betas) == pytest.approx(bound, abs=1e-3)


@for_betas
@pytest.mark.parametrize("t", [1, 2, 30, 200])
def test_adamw_attains_the_bound_on_the_worst_case_and_exceeds_it_on_no_other(betas, t):
    torch.manual_seed(0)
    worst, bound = worst_case_gradients(t, *betas), adam_update_bound(t, *betas)
    assert adamw_update(worst, *betas) == pytest.approx(bound, rel=1e-9)
    assert bound > 1 or t == 1 or betas[0] == betas[1]
    for _ in range(10):
        assert adamw_update(worst + 0.1 * torch.randn(()) * torch.randn(t), *betas) <= bound * (1 + 1e-12)


# ---------------------------------------------------------------------------------------------------
# Predicted scales: nothing outgrows them

GRADIENTS = {   # over many magnitudes
    "gaussian": lambda shape, step: torch.randn(shape),
    "cauchy": lambda shape, step: torch.randn(shape) / torch.randn(shape),
    "constant": lambda shape, step: torch.full(shape, -1.0),   # drives every weight away from zero
    "growing": lambda shape, step: torch.full(shape, -((0.9 / 0.95) ** (60 - step % 60))),   # a worst case
    "sparse": lambda shape, step: torch.randn(shape) * (torch.rand(shape) < 0.02),
    "zero": lambda shape, step: torch.zeros(shape)}


def train(weights, scales, optimizer, first, last, kind="gaussian", clip=True, lr=None):
    """Take steps first..last on gradients that depend on the step alone; return the scales after each."""
    group, seen = optimizer.param_groups[0], []
    for step in range(first, last + 1):
        torch.manual_seed(step)
        for w in weights:
            w.grad = GRADIENTS[kind](w.shape, step).to(w.device)
        if clip:
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
        group["lr"] = lr or 0.02 * min(step / 20, 0.5 + 0.5 * math.cos(math.pi * step / 200))
        optimizer.step()
        scales.update(group["lr"], group["betas"], group["weight_decay"], step)
        if scales.measures(step):
            assert torch.equal(scales.scale, amax(weights) / 448)
        else:
            assert_below_scale(weights, scales)
        seen.append(scales.scale.clone())
    return torch.stack(seen)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"eps": 1e-15}, {"foreach": True}], ids=str)
@for_bounded_betas
@pytest.mark.parametrize("kind", GRADIENTS)
def test_no_weight_ever_exceeds_its_predicted_scale(kind, betas, options):
    weights = ragged_weights()
    optimizer = AdamW(weights, betas=betas, weight_decay=0.1, **options)
    check_optimizer(optimizer)
    scales = WeightScales(weights, interval=0)
    train(weights, scales, optimizer, 1, 100, kind, clip=kind == "gaussian")
    assert not any(scales.measures(step) for step in range(1, 101))


@pytest.mark.parametrize("zeroed_first", [False, True])
@pytest.mark.parametrize("lr, decay", [(1e-2, 2.0), (2.0, 1.2), (-1e-2, 2.0)])   # 1 - 2.4 flips the weights
@for_bounded_betas
def test_weights_decay_if_they_have_gradients_and_never_exceed_their_scales(betas, lr, decay, zeroed_first):
    """Adam leaves the others alone, and counts fewer steps for them. The gradients are the worst case."""
    has_gradient = (lambda step: False, lambda step: step < 30, lambda step: step > 90, lambda step: True,
                    lambda step: 40 < step < 120, lambda step: step % 3 == 0, lambda step: step**2 % 7 < 3)
    weights = [torch.nn.Parameter(torch.full((3,), 5.0)) for _ in has_gradient]
    optimizer = AdamW(weights, betas=betas, eps=1e-15, weight_decay=decay)
    optimizer.param_groups[0]["lr"], factor = lr, abs(1 - lr * decay)
    scales, worst = WeightScales(weights, interval=0), -worst_case_gradients(150, *betas).float()
    for step in range(1, 151):
        for w, has_one in zip(weights, has_gradient):
            count = int(optimizer.state[w].get("step", 0))
            w.grad = worst[count].expand(3).clone() if has_one(step) else None
        optimizer.step()
        if zeroed_first:
            optimizer.zero_grad()
        factors = torch.tensor([max(factor, 1) if w.grad is None else factor for w in weights]).double()
        growth = abs(lr) * adam_update_bound(step, *betas) * autoscale.UPDATE_SLACK / 448
        expected = scales.scale * (factors * autoscale.WEIGHT_SLACK).float() + growth
        scales.update(torch.tensor(lr, dtype=torch.float64), betas, decay, step)
        assert torch.equal(scales.scale, expected)
        assert_below_scale(weights, scales)


@pytest.mark.parametrize("start, kind, lr, decay, steps, limit", [
    # beta1 = beta2: every update is lr, and only the slack is left over
    (torch.full((1, 3), 0.5), "constant", 1e-4, 0.1, 2000, 1.005),
    # only decay, as lr is far below an ulp: rounding could lift a weight
    (torch.linspace(0, 1000, 300).view(100, 3), "zero", 1e-9, 1e6, 200, 1.0002)], ids=["updates", "decay"])
def test_the_bound_survives_rounding_where_it_is_tight(start, kind, lr, decay, steps, limit):
    weights = [torch.nn.Parameter(w.clone()) for w in start]
    optimizer = AdamW(weights, betas=(0.95, 0.95), eps=1e-15, weight_decay=decay)
    scales = WeightScales(weights, interval=0)
    train(weights, scales, optimizer, 1, steps, kind, clip=False, lr=lr)
    assert (scales.headroom() < limit).all()


@pytest.mark.parametrize("capturable", [False, pytest.param(True, marks=needs_gpu)])   # corrections in FP32
def test_the_bound_survives_fp32_adam_on_the_worst_case(capturable):
    betas, options = (0.9, 0.999), dict(lr=1.0, eps=1e-15, weight_decay=0.0, capturable=capturable)
    weight = torch.nn.Parameter(torch.zeros(1, device="cuda" if capturable else "cpu"))
    optimizer, scales = AdamW([weight], betas=betas, **options), WeightScales([weight])
    for step, gradient in enumerate(worst_case_gradients(150, *betas), start=1):
        weight.grad = gradient.float().reshape(1).to(weight.device)
        weight.data.zero_()
        scales.rescale()
        optimizer.step()
        scales.update(1.0, betas, 0.0, step)
        assert_below_scale([weight], scales)
    assert weight.abs() > 2.5 and scales.headroom() < 1.005   # far above Theorem 2's one learning rate


def test_a_prediction_does_not_look_at_the_weights_and_a_rescale_at_the_step_that_is_given_does():
    """The scales do not count calls: an optimizer step that is skipped leaves them alone."""
    weights = ragged_weights()
    scales = WeightScales(weights, interval=10)
    before = scales.scale.clone()
    for w, value in zip(weights, (math.nan, math.inf)):
        w.data.fill_(value)
    scales.update(1e-3, (0.9, 0.95), 0.0, step=9)
    assert scales.scale.isfinite().all() and (scales.scale > before).all()
    scales.update(1e-3, (0.9, 0.95), 0.0, step=10)
    assert scales.scale[0].isnan() and scales.scale[1].isinf() and torch.equal(scales.scale[2:], before[2:])


# ---------------------------------------------------------------------------------------------------
# Devices, state, and wrong use

@for_devices
def test_scales_are_float32_maxima_on_the_device_of_the_weights_whatever_the_defaults(device, request):
    others = torch.randn(300, 257, device=device).T, torch.randn(64, 64, device=device)[::2]
    weights, zeros = [*ragged_weights(device), *others], [torch.zeros(n, 2, device=device) for n in (3, 0)]
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(torch.float64)
    with torch.device("meta"):
        scales, on_meta = WeightScales(iter(weights + zeros)), WeightScales([torch.empty(3).float()])
        assert scales.scale.tolist() == [*(amax(weights) / 448).tolist(), MIN_SCALE, MIN_SCALE]
        for each, place in (scales, device), (on_meta, "meta"):
            each.update(1e-3, (0.9, 0.95), 0.1, 1)
            assert (each.headroom().dtype, each.headroom().device.type) == (torch.float32, place)


@needs_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_update_never_makes_the_host_wait(request):
    scales = WeightScales(ragged_weights("cuda"), interval=3)
    request.addfinalizer(lambda: torch.cuda.set_sync_debug_mode("default"))
    torch.cuda.set_sync_debug_mode("error")
    for step, decay in (1, 0.0), (2, 0.1), (3, 0.1):   # all scales at once, one by one, measured
        scales.update(1e-3, (0.9, 0.95), decay, step)
        scales.headroom()


@for_devices
@pytest.mark.parametrize("mode, measured", [("predicted", [0, 40]), ("current", [*range(61)])])
def test_a_resumed_run_continues_bit_for_bit_and_views_of_its_scales_stay(mode, measured, device, tmp_path):
    weights = ragged_weights(device)
    scales, optimizer = WeightScales(weights, mode, interval=40), AdamW(weights)
    train(weights, scales, optimizer, 1, 25)
    torch.save((weights, optimizer.state_dict(), scales.scale), tmp_path / "checkpoint.pt")
    uninterrupted = train(weights, scales, optimizer, 26, 60)
    weights, moments, saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    scales, optimizer = WeightScales(weights, mode, interval=40), AdamW(weights)
    assert [step for step in range(61) if scales.measures(step)] == measured
    view = scales.scale[1]
    optimizer.load_state_dict(moments)
    scales.scale.copy_(saved)
    assert torch.equal(train(weights, scales, optimizer, 26, 60), uninterrupted)
    assert view.item() == scales.scale[1].item()


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "eps": 1e-12}, {"lr": torch.tensor(1.0)}], ids=str)
def test_adam_and_adamw_are_accepted_with_decoupled_decay(options):
    check_optimizer(AdamW(ragged_weights(), **options))
    check_optimizer(FP8AdamW(ragged_weights(), [], **options))
    check_optimizer(Adam(ragged_weights(), **options))
    check_optimizer(Adam(ragged_weights(), weight_decay=0.1, decoupled_weight_decay=True))


OTHERS = SGD, RMSprop, Adagrad, NAdam, Adamax, type("Other", (AdamW,), {})   # whose step() may be another
FIX = ".*mode='current'"


@pytest.mark.parametrize("optimizer_class, options, named", [
    *((optimizer_class, {}, optimizer_class.__name__ + FIX) for optimizer_class in OTHERS),
    (Adam, {"weight_decay": 0.1}, "goes into the gradient.*AdamW"), (AdamW, {"eps": math.nan}, "eps = nan"),
    (AdamW, {"betas": (0.95, 0.9)}, "without limit" + FIX), (AdamW, {"eps": 0.0}, "eps = 0.0" + FIX),
    (AdamW, {"betas": (torch.tensor(0.9), torch.tensor(1.0))}, "beta2 = 1.0"),
    (AdamW, {"betas": (0.9, 0.99999), "capturable": True}, "capturable" + FIX)], ids=str)
def test_what_is_outside_the_proof_is_refused_in_any_group_with_the_fix(optimizer_class, options, named):
    first, *others = ragged_weights()
    optimizer = optimizer_class([{"params": [first]}, {"params": others, **options}], lr=1e-3)
    with pytest.raises(ValueError, match=named):
        check_optimizer(optimizer)


@pytest.mark.parametrize("named, call", [
    ("t = 0", lambda: adam_update_bound(0, 0.9, 0.95)), ("nan", lambda: adam_update_bound(5, math.nan, 0)),
    ("beta1 = 1.0", lambda: adam_update_bound(5, 1.0, 0.95)),
    ("beta2 = -0.1", lambda: worst_case_gradients(5, 0.9, -0.1)),
    ("mode = 'static'", lambda: WeightScales([torch.ones(2)], "static")),
    ("interval = -1", lambda: WeightScales([torch.ones(2)], interval=-1)), ("FP32", lambda: WeightScales([])),
    ("float32", lambda: WeightScales([torch.ones(2, dtype=torch.bfloat16)])),
    ("on cpu and meta", lambda: WeightScales([torch.ones(2), torch.ones(2, device="meta")]))])
def test_impossible_arguments_are_named(named, call):
    with pytest.raises(ValueError, match=named):
        call()


def test_the_tables_show_what_they_claim(capsys):
    autoscale.print_bound()
    rows = autoscale.regression_run(steps=60, interval=20)
    assert all(rows[i][4] == max(row[2] for row in rows[i - 16:i]) for i in range(16, 60))   # delayed
    autoscale.print_prediction(rows)
    autoscale.print_headroom_cost()
    printed = capsys.readouterr().out
    assert "1.162   1.165   1.165             1.165" in printed  # (0.9, 0.95): bound, limit, and AdamW itself
    assert "Predicted: too small in 0 of 60 steps" in printed
    assert printed.count("->") == 3


# ---------------------------------------------------------------------------------------------------
# Muon

def adversaries(shape, steps):
    """Yield (name, gradients (steps, *shape))."""
    noise = torch.randn(steps, *shape, generator=torch.Generator().manual_seed(sum(shape)))
    step, diagonal, huge = torch.arange(steps)[:, None, None], 0 * noise, noise.clone()
    diagonal.diagonal(dim1=1, dim2=2).copy_(torch.logspace(0, -4, min(shape)))   # its singular values
    huge[:, 0, 0] = 1e4
    return {"noise": noise, "the same": noise[:1].expand(steps, *shape), "diagonal": diagonal,
            "alternating": noise[:1] * (-1)**step, "low rank": noise[:, :, :1] * noise[:1, :1],
            "one huge": huge, "zeros": 0 * noise, "growing": noise * 2.0**step,
            "1e-30": 1e-30 * noise, "1e30": 1e30 * noise}.items()


@needs_muon
@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (48, 48), (24, 160), (160, 24)], ids=str)
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("momentum, nesterov, decay", [(0.95, True, 0.1), (0, False, 0), (0.9, False, 1)])
def test_no_gradient_takes_a_weight_of_muon_beyond_what_its_predicted_scale_allows(
        shape, adjust, momentum, nesterov, decay, steps=12):
    for name, gradients in adversaries(shape, steps):
        weight = torch.nn.Parameter(0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(1)))
        optimizer = MUON([weight], momentum=momentum, nesterov=nesterov, weight_decay=decay,
                         adjust_lr_fn=adjust)
        check_optimizer(optimizer)
        scales = WeightScales([weight], interval=0)
        for step, gradient in enumerate(gradients, 1):
            optimizer.param_groups[0]["lr"] = lr = 0.05 * min(step / 4, 1.2 - step / 12)
            weight.grad = gradient.clone()
            optimizer.step()
            scales.update(lr, None, decay, step, muon_step_bound(optimizer.param_groups[0], shape))
            assert weight.isfinite().all() and scales.headroom() >= 1, (name, step)


@needs_muon
@pytest.mark.parametrize("shape", [(4, 4), (2, 9), (9, 2)], ids=str)
def test_a_diagonal_gradient_attains_the_bound_on_muons_step(shape):
    largest = 0
    for x in torch.linspace(0.002, 0.01, 100).tolist():   # the largest p(...p(x)) lies at 0.0041
        weight = torch.nn.Parameter(torch.zeros(shape))
        optimizer = MUON([weight], lr=1.0, weight_decay=0.0)
        weight.grad = torch.zeros(shape)
        weight.grad[0, 0], weight.grad[1, 1] = x, math.sqrt(1 - x * x)
        optimizer.step()
        largest = max(largest, weight.abs().max().item())
    bound = muon_step_bound(optimizer.param_groups[0], shape) / autoscale.MUON_SLACK
    assert bound == pytest.approx(1.2024 * max(1, shape[0] / shape[1]) ** 0.5, abs=1e-3)
    assert 0.995 * bound < largest < bound * autoscale.MUON_SLACK


@needs_muon
@pytest.mark.parametrize("options", [dict(ns_coefficients=(5.0, -1.0, 3.0)), dict(eps=0.0)], ids=str)
def test_settings_of_muon_under_which_a_weight_may_grow_without_bound_are_refused(options):
    with pytest.raises(ValueError, match="Muon: ns_coefficients"):
        check_optimizer(MUON([torch.nn.Parameter(torch.ones(2, 2))], **options))


# ---------------------------------------------------------------------------------------------------
# FP8AdamW

SETTINGS = dict(lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
for_shapes = pytest.mark.parametrize("experts, shape", [
    (1, (16, 32)), (1, (128, 64)), (1, (130, 33)), (1, (1, 1)), (1, (300, 17)), (4, (160, 72))], ids=str)


@pytest.fixture
def with_kernel(monkeypatch):
    """FP8AdamW uses its kernel on every device."""
    pytest.importorskip("triton")
    let_kernels_run(True, monkeypatch)


def bits(x):
    return x.view(torch.uint8)


def adamw_state(shape, experts, device):
    """p, g, m, v of a weight in the middle of training, room for its FP8 copies, and a scale for each expert
    that is too small: large weights saturate, none turns NaN."""
    torch.manual_seed(0)
    p, g, m = (factor * torch.randn(shape, device=device) for factor in (0.02, 1.0, 0.1))
    w, w_t = (torch.empty(s, device=device).to(E4M3.dtype) for s in (shape, shape[::-1]))
    scale = p.view(experts, -1).abs().amax(dim=1, keepdim=True) / 448 * 0.9
    return p, g, m, torch.rand(shape, device=device) ** 4, w, w_t, scale


def assert_copies(p, w, w_t, scale):
    """The FP8 numbers are those of p, each under the scale of its expert."""
    each = scale.repeat_interleave(len(p) // len(scale), dim=0)
    assert torch.equal(bits(w), bits(cast(p * (1 / each), E4M3))) and torch.equal(bits(w_t), bits(w).t())


@for_shapes
def test_reference_step_is_that_of_torch_adamw(experts, shape):
    p, g, m, v, w, w_t, scale = adamw_state(shape, experts, "cpu")
    theirs = torch.nn.Parameter(p.clone())
    optimizer = AdamW([theirs], **SETTINGS)
    state = {"step": torch.tensor(6.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    theirs.grad, optimizer.state[theirs] = g.clone(), state
    optimizer.step()
    with torch.device("meta"):   # the default device is not asked
        autoscale.adamw_reference(p, g, m, v, w, w_t, scale, **SETTINGS, step=7)
    for ours, other in (p, theirs.detach()), (m, state["exp_avg"]), (v, state["exp_avg_sq"]):
        assert torch.equal(ours, other)
    assert_copies(p, w, w_t, scale)


@needs_triton
@for_shapes
@pytest.mark.parametrize("factor", [None, 0.3])
def test_kernel_equals_the_reference_to_rounding_and_writes_fp8_numbers_of_its_weight(experts, shape, factor):
    ours, reference = (adamw_state(shape, experts, DEVICE) for _ in range(2))
    factor = factor and torch.tensor(factor, device=DEVICE)
    autoscale.adamw_triton(*ours, **SETTINGS, step=7, factor=factor)
    autoscale.adamw_reference(*reference, **SETTINGS, step=7, factor=factor)
    for name, a, b in zip("pgmv", ours, reference):
        # a GPU contracts a product and a sum into one rounding: 2 of 2^-24 of the largest term
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7 * b.abs().max().item(), msg=name)
    assert_copies(ours[0], *ours[4:])


class Layer:
    """What FP8AdamW asks of a layer."""

    def __init__(self, weight, scale, recipe="moss"):
        self.weight, self.recipe = weight, RECIPES[recipe]
        self.requantize(scale)

    def requantize(self, scale):
        self.copies = quantize_weight(self.weight.detach(), self.recipe, scale)


class Run:
    """Two weights, with FP8 copies if the optimizer writes them, and a vector, trained as in train.py."""

    def __init__(self, optimizer_class=FP8AdamW, **options):
        torch.manual_seed(0)
        self.parameters = [torch.nn.Parameter(0.02 * torch.randn(shape, device=DEVICE))
                           for shape in ((48, 80), (7, 33), (9,))]
        self.scales = WeightScales(self.parameters[:2], interval=0)
        self.make(optimizer_class, **options)

    def make(self, optimizer_class, **options):
        pairs = zip(self.parameters, self.scales.scale.view(-1, 1, 1))
        self.layers = [Layer(*pair) for pair in pairs if optimizer_class is FP8AdamW]
        layers = [self.layers] if self.layers else []
        self.optimizer = optimizer_class(self.parameters, *layers, **SETTINGS, **options)

    def give_gradients(self, step):
        generator = torch.Generator("cpu").manual_seed(step)
        for p in self.parameters:
            p.grad = torch.randn(p.shape, generator=generator, device="cpu").to(p.device)

    def step(self, step, change=lambda run, p: None):
        self.give_gradients(step)
        change(self, self.parameters[0])
        gradients = [p.grad for p in self.parameters]
        self.scales.update(3e-3, (0.9, 0.95), 0.1, step)
        self.optimizer.step()
        assert all(p.grad is gradient for p, gradient in zip(self.parameters, gradients))

    def assert_same(self, other):
        for a, b in zip(self.parameters, other.parameters):   # 20 steps of a few roundings of 2^-24 each
            torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-5, atol=1e-6)
        for layer, scale in zip(self.layers, self.scales.scale.view(-1, 1, 1)):
            scale = scale if layer.recipe.name == "moss" else None
            with pytest.MonkeyPatch.context() as patch:
                let_kernels_run(False, patch)   # PyTorch tells what the kernels have to write, and sooner
                new = quantize_weight(layer.weight, layer.recipe, scale)
            for a, b in zip(layer.copies or (), new):
                assert torch.equal(bits(a.data), bits(b.data)) and torch.equal(a.scale, b.scale)


def clip(run, p):
    """Multiply all gradients by 0.3: FP8AdamW does it by itself."""
    if isinstance(run.optimizer, FP8AdamW):
        run.optimizer.factor = torch.tensor(0.3, device=p.device)
    else:
        torch._foreach_mul_([p.grad for p in run.parameters], 0.3)


CHANGES = {   # of a run and its first weight, before each step
    "clipped": clip, "clipped, and no gradient": lambda run, p: [clip(run, p), setattr(p, "grad", None)],
    "none": lambda run, p: None,
    "no gradient": lambda run, p: setattr(p, "grad", None),
    "frozen later": lambda run, p: setattr(p, "grad", None if len(run.optimizer.state) else p.grad),
    "in no group": lambda run, p: run.optimizer.param_groups[0].update(params=run.parameters[1:]),
    "no copies": lambda run, p: [setattr(layer, "copies", None) for layer in run.layers[:1]],
    "scales per block": lambda run, p: [layer.__init__(p, None, "mx") for layer in run.layers[:1]],
    "gradient transposed": lambda run, p: setattr(p, "grad", p.grad.t().contiguous().t()),
    "weight transposed": lambda run, p: setattr(p, "data", p.data.t().contiguous().t()),
    "lr in a tensor": lambda run, p: run.optimizer.param_groups[0].update(lr=torch.tensor(3e-3)),
    "amsgrad": lambda run, p: run.optimizer.param_groups[0].update(amsgrad=True),
    "maximize": lambda run, p: run.optimizer.param_groups[0].update(maximize=True),
    "coupled decay": lambda run, p: run.optimizer.param_groups[0].update(decoupled_weight_decay=False)}


@pytest.mark.parametrize("change", CHANGES)
def test_fp8_adamw_trains_as_torch_adamw_and_its_copies_follow_the_weight(with_kernel, change):
    """Whatever the kernel does not know is left to AdamW. (The bound does not hold for coupled decay.)"""
    ours, theirs = Run(), Run(AdamW)
    for step in range(1, 21):
        ours.step(step, CHANGES[change])
        theirs.step(step, CHANGES[change])
        ours.assert_same(theirs)
        assert (ours.scales.headroom() >= 1).all() or change == "coupled decay"
        assert (ours.layers[0].copies is None) == (change == "no copies")


def test_without_fp8_tensor_cores_it_is_torch_adamw_bit_for_bit(monkeypatch):
    let_kernels_run(False, monkeypatch)
    ours, theirs = Run(), Run(AdamW)
    for step in range(1, 10):
        ours.step(step)
        theirs.step(step)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters, theirs.parameters))


@pytest.mark.parametrize("first", [FP8AdamW, AdamW])
@pytest.mark.parametrize("second", [FP8AdamW, AdamW])
@pytest.mark.parametrize("fused", [False, True])
def test_state_goes_from_either_optimizer_to_the_other(with_kernel, first, second, fused):
    straight, resumed = Run(first, fused=fused), Run(first, fused=fused)
    for step in range(1, 10):
        straight.step(step)
        if step == 5:
            state = pickle.loads(pickle.dumps(resumed.optimizer.state_dict()))
            resumed.make(second, fused=fused)
            resumed.optimizer.load_state_dict(state)
        resumed.step(step)
        resumed.assert_same(straight)
    if first is second:   # bit for bit
        assert all(torch.equal(a, b) for a, b in zip(straight.parameters, resumed.parameters))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_a_run_trains_its_own_weights_without_layers(with_kernel, copied):
    run, plain = Run(fused=True), Run(AdamW)
    run.step(1)
    plain.step(1)
    run.optimizer, run.parameters, run.scales = copied((run.optimizer, run.parameters, run.scales))
    run.layers = []
    run.step(2)
    plain.step(2)
    assert type(run.optimizer) is FP8AdamW and run.optimizer.layers == ()
    run.assert_same(plain)
    assert all(w is p for w, p in zip(run.scales.weights, run.parameters))


def test_closures_hooks_and_schedulers_see_each_step_once_and_torch_amp_unscales_before_it(with_kernel):
    plain = AdamW([torch.zeros(1)], fused=True)   # now PyTorch wraps AdamW.step() in calls of the hooks
    run, calls = Run(fused=True), []
    assert [optimizer._step_supports_amp_scaling for optimizer in (plain, run.optimizer)] == [True, False]
    run.optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    run.optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(run.optimizer, 0.5)

    def closure():
        calls.append(torch.is_grad_enabled())
        run.give_gradients(len(calls))
        return 3.0
    assert [(run.optimizer.step(closure), scheduler.step())[0] for _ in range(2)] == [3.0, 3.0]
    assert calls == 2 * ["before", True, "after"] and scheduler.get_last_lr() == [3e-3 / 4]
    assert {state["step"].item() for state in run.optimizer.state.values()} == {2.0}


def test_a_group_may_come_later_under_any_default_device(with_kernel):
    run = Run()
    run.optimizer.param_groups[0]["params"] = run.parameters[2:]
    with torch.device("meta" if DEVICE == "cpu" else DEVICE):   # on a GPU AdamW itself fails under another
        run.step(1)
        run.optimizer.add_param_group({"params": run.parameters[:2], "weight_decay": 0.0})
        run.step(2)
    assert [run.optimizer.state[p]["step"].item() for p in run.parameters] == [1, 1, 2]
    # the third is a vector, which AdamW steps: it counts on the default device
    assert all(run.optimizer.state[p]["step"].device.type == "cpu" for p in run.parameters[:2])
