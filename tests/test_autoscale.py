"""
What autoscale.py promises: kappa_t bounds Adam's update exactly, no weight ever outgrows its predicted scale,
and FP8AdamW is an AdamW whose FP8 copies are those of its weights.

    $ python -m pytest tests/test_autoscale.py
"""
import copy
import math
import pickle

import pytest
import torch

import autoscale
from autoscale import (MIN_SCALE, FP8AdamW, WeightScales, adam_update_bound, adamw_update, check_optimizer,
                       geometric_sum, worst_case_gradients)
from conftest import DEVICE
from fp8_formats import E4M3, cast
from microscale import HAS_TRITON, RECIPES, quantize_weight

BETAS = [(0.9, 0.95), (0.9, 0.999), (0.95, 0.95), (0.0, 0.99), (0.9, 0.81), (0.95, 0.9)]
SHAPES = [(7, 5), (1, 1), (33,), (2, 3, 4)]
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])

pytestmark = pytest.mark.usefixtures("one_thread")
for_betas = pytest.mark.parametrize("betas", BETAS, ids=str)
for_bounded_betas = pytest.mark.parametrize("betas", BETAS[:3], ids=str)
for_modes = pytest.mark.parametrize("mode", ["predicted", "current"])
for_devices = pytest.mark.parametrize("device", DEVICES)
for_copies = pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
                                     ids=["deepcopy", "pickle"])


def ragged_weights(device="cpu", seed=0):
    """Parameters of several shapes; they have gradients, so that they decay."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.nn.Parameter((0.1 * torch.randn(s, generator=generator)).to(device)) for s in SHAPES]
    for w in weights:
        w.grad = torch.zeros_like(w)
    return weights


def amax(weights):
    return torch.stack([w.detach().abs().max() for w in weights])


def assert_below_scale(weights, scales):
    """No weight exceeds 448 * scale: in float64, where the product is exact, and without any tolerance."""
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


@pytest.mark.parametrize("t, beta1, beta2, named", [(0, 0.9, 0.95, "t = 0"), (5, 1.0, 0.95, "beta1 = 1.0"),
                                                    (5, 0.9, -0.1, "beta2 = -0.1"), (5, math.nan, 0, "nan")])
def test_impossible_arguments_are_named(t, beta1, beta2, named):
    for function in (adam_update_bound, worst_case_gradients):
        with pytest.raises(ValueError, match=named):
            function(t, beta1, beta2)


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
    "student": lambda shape, step: torch.distributions.StudentT(2.0).sample(shape),
    "constant": lambda shape, step: torch.full(shape, -1.0),   # drives every weight away from zero
    "growing": lambda shape, step: torch.full(shape, -((0.9 / 0.95) ** (60 - step % 60))),   # a worst case
    "sparse": lambda shape, step: torch.randn(shape) * (torch.rand(shape) < 0.02)}


def train(weights, scales, optimizer, first, last, kind="gaussian", clip=True, check=lambda *_: None):
    """Steps first..last of a 200-step schedule, on gradients that depend on the step alone."""
    group = optimizer.param_groups[0]
    for step in range(first, last + 1):
        torch.manual_seed(step)
        for w in weights:
            w.grad = GRADIENTS[kind](w.shape, step).to(w.device)
        if clip:
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
        group["lr"] = 0.02 * min(step / 20, 0.5 + 0.5 * math.cos(math.pi * step / 200))   # warm-up, cosine
        optimizer.step()
        scales.update(group["lr"], group["betas"], group["weight_decay"], step)
        check(weights, scales)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"eps": 1e-15}, {"foreach": True}], ids=str)
@for_bounded_betas
@pytest.mark.parametrize("kind", GRADIENTS)
def test_no_weight_ever_exceeds_its_predicted_scale(kind, betas, options):
    weights = ragged_weights()
    optimizer = torch.optim.AdamW(weights, betas=betas, weight_decay=0.1, **options)
    check_optimizer(optimizer)
    scales = WeightScales(weights, interval=0)
    train(weights, scales, optimizer, 1, 100, kind, kind in ("gaussian", "student"), assert_below_scale)


PRESENT = [lambda step: False, lambda step: step < 30, lambda step: step > 90, lambda step: 40 < step < 120,
           lambda step: step % 3 == 0, lambda step: step * step % 7 < 3, lambda step: True]


@pytest.mark.parametrize("zero_grad_first", [False, True])
@pytest.mark.parametrize("lr, decay", [(1e-2, 2.0), (2.0, 1.2)])   # 1 - lr decay = -1.4 flips the weights
@for_bounded_betas
def test_weights_with_gradients_at_some_steps_only_stay_below_their_scales(betas, lr, decay, zero_grad_first):
    """Adam then neither moves nor decays them, and counts fewer steps. Their gradients are the worst case."""
    weights = [torch.nn.Parameter(torch.full((3,), 5.0)) for _ in PRESENT]
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=betas, eps=1e-15, weight_decay=decay)
    scales, worst = WeightScales(weights, interval=0), -worst_case_gradients(150, *betas).float()
    counts = [0] * len(weights)
    for step in range(1, 151):
        optimizer.zero_grad()
        for i, (w, present) in enumerate(zip(weights, PRESENT)):
            if present(step):
                w.grad, counts[i] = worst[counts[i]].expand(3).clone(), counts[i] + 1
        optimizer.step()
        if zero_grad_first:
            optimizer.zero_grad()
        scales.update(lr, betas, decay, step)
        assert_below_scale(weights, scales)


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2, dtype=torch.float64), -1e-2], ids=str)
def test_only_weights_with_a_gradient_decay(lr):
    weights, before = ragged_weights(), WeightScales(ragged_weights()).scale
    growth = 1e-2 * adam_update_bound(7, 0.9, 0.95) * autoscale.UPDATE_SLACK / 448
    decayed, kept = (before * (factor * autoscale.WEIGHT_SLACK) + growth
                     for factor in (abs(1 - float(lr) * 50), max(1.0, 1 - float(lr) * 50)))
    for missing in (0, 2, 4):
        for w in weights[:missing]:
            w.grad = None
        scales = WeightScales(weights)
        scales.update(lr, (0.9, 0.95), 50, 7)
        assert torch.equal(scales.scale, torch.cat((kept[:missing], decayed[missing:])))


@pytest.mark.parametrize("start, gradient, lr, decay, limit", [
    (0.5, -0.3, 1e-4, 0.1, 1.005),     # beta1 = beta2: every update is lr, and only the slack is left over
    (1000, 0.0, 1e-9, 1e6, 1.0002)])   # only decay, as lr is far below an ulp: rounding could lift a weight
def test_the_bound_survives_rounding_where_it_is_tight(start, gradient, lr, decay, limit):
    torch.manual_seed(0)
    count = 1 if gradient else 100
    weights = [torch.nn.Parameter(start * torch.rand(3) ** (gradient == 0)) for _ in range(count)]
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.95, 0.95), eps=1e-15, weight_decay=decay)
    scales = WeightScales(weights, interval=0)
    for step in range(1, 2001 if gradient else 201):
        for w in weights:
            w.grad = torch.full((3,), gradient)
        optimizer.step()
        scales.update(lr, (0.95, 0.95), decay, step)
        assert_below_scale(weights, scales)
    assert (scales.headroom() < limit).all()


@pytest.mark.parametrize("capturable", [False, True])
def test_the_bound_survives_fp32_adam_on_the_worst_case(capturable):
    if capturable and not torch.cuda.is_available():
        pytest.skip("capturable AdamW, which computes bias corrections in FP32, runs on a GPU only")
    betas, options = (0.9, 0.999), dict(lr=1.0, eps=1e-15, weight_decay=0.0, capturable=capturable)
    weight = torch.nn.Parameter(torch.zeros(1, device="cuda" if capturable else "cpu"))
    optimizer, scales = torch.optim.AdamW([weight], betas=betas, **options), WeightScales([weight])
    for step, gradient in enumerate(worst_case_gradients(150, *betas), start=1):
        weight.grad = gradient.float().reshape(1).to(weight.device)
        weight.data.zero_()
        scales.rescale()
        optimizer.step()
        scales.update(1.0, betas, 0.0, step)
        assert_below_scale([weight], scales)
    assert weight.abs().item() > 2.5  # far above Theorem 2's one learning rate
    assert scales.headroom().item() < 1.005


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


@pytest.mark.parametrize("mode, interval", [("predicted", 50), ("predicted", 0), ("current", 0)])
def test_a_rescale_takes_the_true_maximum_at_exactly_the_interval(mode, interval):
    weights = ragged_weights()
    scales = WeightScales(weights, mode, interval)
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.95))
    for step in range(1, 151):
        train(weights, scales, optimizer, step, step)
        measured = mode == "current" or interval > 0 and step % interval == 0
        assert torch.equal(scales.scale, amax(weights) / 448) == scales.measures(step) == measured
        assert (scales.headroom() >= 1).all()


# ---------------------------------------------------------------------------------------------------
# The other modes, devices, and state


@for_devices
def test_true_scale_is_the_maximum_of_every_ragged_weight(device):
    others = torch.randn(300, 257, device=device).T, torch.randn(64, 64, device=device)[::2]
    weights = [*ragged_weights(device), *others]
    scales = WeightScales(iter(weights))
    assert (scales.scale.shape, scales.scale.dtype, scales.scale.device.type) == ((6,), torch.float32, device)
    assert torch.equal(scales.true_scale(), amax(weights) / 448)


@for_modes
def test_a_weight_of_zeros_or_without_numbers_gets_a_small_positive_scale(mode):
    scales = WeightScales([torch.zeros(3, 2), torch.ones(2), torch.zeros(0, 4)], mode)
    assert scales.scale.tolist() == [MIN_SCALE, torch.tensor(1 / 448).item(), MIN_SCALE]
    assert (torch.zeros(3, 2) / scales.scale[0] == 0).all()


@for_devices
@for_modes
def test_a_view_of_a_scale_stays_valid_and_a_state_is_a_copy(mode, device):
    weights = ragged_weights(device)
    scales = WeightScales(weights, mode, interval=2)
    view, state, saved = scales.scale[1], scales.state_dict(), copy.deepcopy(scales.state_dict())
    for step in (1, 2, 3):
        weights[1].data.add_(0.01)
        scales.update(1e-2, (0.9, 0.95), 0.0, step)
        assert view.item() == scales.scale[1].item()
    assert torch.equal(state["scale"], saved["scale"])
    scales.load_state_dict(WeightScales(ragged_weights(device, seed=1), mode).state_dict())
    assert view.item() == scales.scale[1].item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@for_modes
def test_update_never_makes_the_host_wait(mode):
    weights = ragged_weights("cuda")
    scales, weights[0].grad = WeightScales(weights, mode, interval=2), None
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (1, 2, 3):
            scales.update(1e-3, (0.9, 0.95), 0.1, step)
            scales.headroom()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_scales_are_float32_on_the_device_of_the_weights():
    """... whatever the default device and dtype are; weights on the meta device have scales there."""
    on_cpu = ragged_weights()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            for device, weights in (("cpu", on_cpu), ("meta", [torch.empty(3, dtype=torch.float32)])):
                scales = WeightScales(weights)
                scales.update(1e-3, (0.9, 0.95), 0.1, 1)
                scales.load_state_dict(scales.state_dict())
                assert (scales.scale.dtype, scales.headroom().device.type) == (torch.float32, device)
    finally:
        torch.set_default_dtype(torch.float32)


@for_modes
def test_a_resumed_run_continues_bit_for_bit(mode, tmp_path):
    def run(weights, first, last, state=None):
        optimizer, scales = torch.optim.AdamW(weights), WeightScales(weights, mode, interval=40)
        if state:
            optimizer.load_state_dict(state["optimizer"])
            scales.load_state_dict(state["scales"])
        seen = []
        train(weights, scales, optimizer, first, last, check=lambda _, s: seen.append(s.scale.clone()))
        return seen, {"weights": weights, "optimizer": optimizer.state_dict(), "scales": scales.state_dict()}
    uninterrupted, _ = run(ragged_weights(), 1, 60)
    torch.save(run(ragged_weights(), 1, 25)[1], tmp_path / "checkpoint.pt")
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    continued, _ = run(checkpoint["weights"], 26, 60, checkpoint)
    assert torch.equal(torch.stack(continued), torch.stack(uninterrupted[25:]))


@pytest.mark.parametrize("broken", [
    None, {}, {"mode": "current"}, {"scale": None}, {"scale": [1.0] * 4}, {"scale": torch.ones(3)},
    {"scale": torch.ones(4, dtype=torch.float64)}, {"scale": torch.ones(4, 1)}], ids=str)
def test_another_state_is_refused_and_changes_nothing(broken):
    scales = WeightScales(ragged_weights())
    before = scales.state_dict()
    with pytest.raises(ValueError, match="build WeightScales as it was when saved"):
        scales.load_state_dict({**before, **broken} if broken else broken)
    assert torch.equal(scales.scale, before["scale"])


@for_copies
def test_a_copy_of_scales_looks_at_its_own_weights(copied):
    weights = ragged_weights()
    scales = WeightScales(weights)
    others, theirs = copied((weights, scales))
    assert all(a is b for a, b in zip(others, theirs.weights, strict=True))
    others[0].data.mul_(2)
    theirs.rescale()
    assert torch.equal(theirs.headroom(), torch.ones(4)) and theirs.scale[0] == 2 * scales.scale[0]


# ---------------------------------------------------------------------------------------------------
# Wrong use is refused


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "eps": 1e-12}, {"lr": torch.tensor(1.0)}], ids=str)
def test_adam_and_adamw_are_accepted_with_decoupled_decay(options):
    check_optimizer(torch.optim.AdamW(ragged_weights(), **options))
    check_optimizer(FP8AdamW(ragged_weights(), [], **options))
    check_optimizer(torch.optim.Adam(ragged_weights(), **options))
    check_optimizer(torch.optim.Adam(ragged_weights(), weight_decay=0.1, decoupled_weight_decay=True))
    with pytest.raises(ValueError, match="goes into the gradient.*AdamW"):
        check_optimizer(torch.optim.Adam(ragged_weights(), weight_decay=0.1))


class OtherAdam(torch.optim.AdamW):
    """A subclass may replace step(), so its type says nothing about the bound."""


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad,
                                             torch.optim.NAdam, torch.optim.Adamax, OtherAdam])
def test_unsupported_optimizers_are_refused_with_the_fix(optimizer_class):
    with pytest.raises(ValueError, match=f"{optimizer_class.__name__}.*mode='current'"):
        check_optimizer(optimizer_class(ragged_weights(), lr=1e-3))


@pytest.mark.parametrize("options, named", [
    ({"betas": (0.95, 0.9)}, "without limit.*mode='current'"), ({"eps": 0.0}, "eps = 0.0.*mode='current'"),
    ({"eps": math.nan}, "eps = nan"), ({"betas": (torch.tensor(0.9), torch.tensor(1.0))}, "beta2 = 1.0"),
    ({"betas": (0.9, 0.99999), "capturable": True}, "capturable.*mode='current'")], ids=str)
def test_settings_outside_the_proof_are_refused_in_any_group(options, named):
    first, *others = ragged_weights()
    optimizer = torch.optim.AdamW([{"params": [first]}, {"params": others, **options}])
    with pytest.raises(ValueError, match=named):
        check_optimizer(optimizer)


@pytest.mark.parametrize("options, named", [
    ({"mode": "static"}, "mode = 'static'"), ({"interval": -1}, "interval = -1"), ({"weights": []}, "FP32"),
    ({"weights": [torch.ones(2, dtype=torch.bfloat16)]}, "float32"),
    ({"weights": [torch.ones(2), torch.ones(2, device="meta")]}, "on cpu and meta")], ids=str)
def test_impossible_settings_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        WeightScales(**{"weights": ragged_weights(), **options})


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
# The optimizer that writes FP8 weights

SETTINGS = dict(lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
for_shapes = pytest.mark.parametrize("shape", [(16, 32), (128, 64), (130, 33), (1, 1), (300, 17)], ids=str)
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def bits(x):
    return x.view(torch.uint8)


def adamw_state(shape, device):
    """p, g, m, v of a weight in the middle of training, and room for its FP8 copies."""
    torch.manual_seed(0)
    p, g, m = (factor * torch.randn(shape, device=device) for factor in (0.02, 1.0, 0.1))
    w, w_t = (torch.empty(s, device=device).to(E4M3.dtype) for s in (shape, shape[::-1]))
    return p, g, m, torch.rand(shape, device=device) ** 4, w, w_t


@for_shapes
def test_reference_step_is_that_of_torch_adamw(shape):
    p, g, m, v, w, w_t = adamw_state(shape, "cpu")
    theirs, scale = torch.nn.Parameter(p.clone()), torch.tensor([[1e-4]])
    optimizer = torch.optim.AdamW([theirs], **SETTINGS)
    theirs.grad = g.clone()
    state = {"step": torch.tensor(6.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    optimizer.state[theirs] = state
    optimizer.step()
    with torch.device("meta"):   # the default device is not asked
        autoscale.adamw_reference(p, g, m, v, w, w_t, scale, **SETTINGS, step=7)
    for ours, name in ((m, "exp_avg"), (v, "exp_avg_sq")):
        assert torch.equal(ours, state[name]), name
    assert torch.equal(p, theirs.detach()) and torch.equal(bits(w), bits(cast(p * (1 / scale), E4M3)))


@needs_triton
@for_shapes
def test_kernel_equals_the_reference_to_rounding_on_ragged_shapes(shape):
    scale = torch.full((1, 1), 1e-4, device=DEVICE)
    ours, reference = adamw_state(shape, DEVICE), adamw_state(shape, DEVICE)
    autoscale.adamw_triton(*ours, scale, **SETTINGS, step=7)
    autoscale.adamw_reference(*reference, scale, **SETTINGS, step=7)
    for name, a, b in zip("pgmv", ours, reference):
        # a GPU contracts a product and a sum into one rounding: 2 of 2^-24 of the largest term
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7 * b.abs().max().item(), msg=name)


@needs_triton
@pytest.mark.parametrize("shape", [(128, 64), (130, 33)], ids=str)
def test_kernel_writes_exactly_the_fp8_numbers_of_the_weight_it_wrote(shape):
    p, g, m, v, w, w_t = adamw_state(shape, DEVICE)
    scale = (p.abs().max() / 448 * 0.9).view(1, 1)   # too small: the largest weights saturate, none turns NaN
    autoscale.adamw_triton(p, g, m, v, w, w_t, scale, **SETTINGS, step=7)
    assert torch.equal(bits(w), bits(cast(p / scale, E4M3))) and torch.equal(bits(w_t), bits(w).t())


@pytest.fixture
def kernels(monkeypatch):
    """FP8AdamW uses its kernel on every device: on a CPU in Triton's interpreter."""
    if not HAS_TRITON:
        pytest.skip("Triton is not installed")
    monkeypatch.setattr(autoscale, "kernels_run_on", lambda device: True)


class Layer:
    """What FP8AdamW asks of a layer."""

    def __init__(self, weight, scale, recipe="moss"):
        self.weight, self.recipe = weight, RECIPES[recipe]
        self.requantize(scale)

    def requantize(self, scale):
        scale = None if scale is None else scale.view(1, 1)
        self.copies = quantize_weight(self.weight.detach(), self.recipe, scale)

    def assert_same_copies(self, other):
        for a, b in zip(self.copies, other.copies):
            assert torch.equal(bits(a.data), bits(b.data)) and torch.equal(a.scale, b.scale)


class Run:
    """Two weights with FP8 copies and a vector, trained by either optimizer as train.py does it."""

    def __init__(self, optimizer_class=FP8AdamW, **options):
        torch.manual_seed(0)
        self.parameters = [torch.nn.Parameter(0.02 * torch.randn(shape, device=DEVICE))
                           for shape in ((48, 80), (7, 33), (9,))]
        self.scales = WeightScales(self.parameters[:2], interval=8)
        self.layers = [Layer(p, scale) for p, scale in zip(self.parameters, self.scales.scale)]
        self.make(optimizer_class, **options)

    def make(self, optimizer_class, **options):
        arguments = (self.layers,) if optimizer_class is FP8AdamW else ()
        self.optimizer = optimizer_class(self.parameters, *arguments, **SETTINGS, **options)

    def give_gradients(self, step):
        generator = torch.Generator("cpu").manual_seed(step)
        for p in self.parameters:
            p.grad = torch.randn(p.shape, generator=generator, device="cpu").to(p.device)

    def step(self, step, change=lambda run, p: None):
        self.give_gradients(step)
        change(self, self.parameters[0])
        gradients, measures = [p.grad for p in self.parameters], self.scales.measures(step)
        if not measures:
            self.scales.update(3e-3, (0.9, 0.95), 0.1, step)
        self.optimizer.step()
        if measures:
            self.scales.update(3e-3, (0.9, 0.95), 0.1, step)
        if measures or not getattr(self.optimizer, "layers", None):
            for layer, scale in zip(self.layers, self.scales.scale):
                layer.requantize(scale)
        assert all(p.grad is gradient for p, gradient in zip(self.parameters, gradients))

    def assert_same(self, other):
        for a, b in zip(self.parameters, other.parameters):   # 20 steps of a few roundings of 2^-24 each
            torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-5, atol=1e-6)
        for layer, scale in zip(self.layers, self.scales.scale):
            if layer.copies:
                layer.assert_same_copies(Layer(layer.weight, scale))


def transposed(x):
    return x.detach().t().contiguous().t()


def set_options(**options):
    return lambda run, p: run.optimizer.param_groups[0].update(options)


CHANGES = {   # of a run and its first weight, before each step
    "none": lambda run, p: None,
    "no gradient": lambda run, p: setattr(p, "grad", None),
    "frozen later": lambda run, p: setattr(p, "grad", None if len(run.optimizer.state) else p.grad),
    "in no group": lambda run, p: run.optimizer.param_groups[0].update(params=run.parameters[1:]),
    "no copies": lambda run, p: setattr(run.layers[0], "copies", None),
    "gradient transposed": lambda run, p: setattr(p, "grad", transposed(p.grad)),
    "weight transposed": lambda run, p: setattr(p, "data", transposed(p)),
    "lr in a tensor": set_options(lr=torch.tensor(3e-3)),
    "amsgrad": set_options(amsgrad=True), "maximize": set_options(maximize=True),
    "coupled decay": set_options(decoupled_weight_decay=False)}


@pytest.mark.parametrize("change", CHANGES)
def test_fp8_adamw_trains_as_torch_adamw_and_its_copies_follow_the_weight(kernels, change):
    """Whatever the kernel does not know is left to AdamW. (The bound does not hold for coupled decay.)"""
    ours, theirs = Run(), Run(torch.optim.AdamW)
    for step in range(1, 21):
        ours.step(step, CHANGES[change])
        theirs.step(step, CHANGES[change])
        ours.assert_same(theirs)
        assert (ours.scales.headroom() >= 1).all() or change == "coupled decay"
        assert (ours.layers[0].copies is None) == (change == "no copies" and step % 8 != 0)


def test_torch_amp_unscales_the_gradients_before_the_step():
    weight = torch.nn.Parameter(torch.ones(16, 16))
    assert torch.optim.AdamW([weight], fused=True)._step_supports_amp_scaling
    assert not FP8AdamW([weight], [], fused=True)._step_supports_amp_scaling


def test_without_fp8_tensor_cores_it_is_torch_adamw_bit_for_bit(monkeypatch):
    monkeypatch.setattr(autoscale, "kernels_run_on", lambda device: False)
    ours, theirs = Run(), Run(torch.optim.AdamW)
    for step in range(1, 10):
        ours.step(step)
        theirs.step(step)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters, theirs.parameters))


@pytest.mark.parametrize("first", [FP8AdamW, torch.optim.AdamW])
@pytest.mark.parametrize("second", [FP8AdamW, torch.optim.AdamW])
@pytest.mark.parametrize("fused", [False, True])
def test_state_goes_from_either_optimizer_to_the_other(kernels, first, second, fused):
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


@for_copies
def test_a_copy_of_fp8_adamw_is_an_adamw_without_layers(kernels, copied):
    run, plain = Run(fused=True), Run(torch.optim.AdamW)
    run.step(1)
    plain.step(1)
    run.optimizer, run.parameters = copied((run.optimizer, run.parameters))
    run.layers = []
    run.step(2)
    plain.step(2)
    assert type(run.optimizer) is FP8AdamW and run.optimizer.layers == ()
    run.assert_same(plain)


def test_closures_hooks_and_schedulers_see_each_step_once(kernels):
    torch.optim.AdamW([torch.zeros(1)])   # PyTorch wraps AdamW.step() in calls of the hooks when one is made
    run, calls = Run(), []
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


def test_a_group_may_come_later_under_any_default_device(kernels):
    run = Run()
    run.optimizer.param_groups[0]["params"] = run.parameters[2:]
    with torch.device("meta" if DEVICE == "cpu" else DEVICE):   # on a GPU AdamW itself fails under another
        run.step(1)
        run.optimizer.add_param_group({"params": run.parameters[:2], "weight_decay": 0.0})
        run.step(2)
    assert [run.optimizer.state[p]["step"].item() for p in run.parameters] == [1, 1, 2]
    assert all(run.optimizer.state[p]["step"].device.type == "cpu" for p in run.parameters)


def test_copies_with_a_scale_per_block_are_renewed_with_scales_of_their_own(kernels):
    run = Run()
    layer = run.optimizer.layers[0] = Layer(run.parameters[0], None, recipe="mx")
    run.step(1)
    layer.assert_same_copies(Layer(layer.weight, None, recipe="mx"))
