"""
What autoscale.py promises: kappa_t bounds Adam's update exactly, and no weight ever outgrows its predicted scale.

    $ python -m pytest tests/test_autoscale.py
"""
import copy
import math

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

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
for_betas = pytest.mark.parametrize("betas", BETAS, ids=str)
for_devices = pytest.mark.parametrize("device", DEVICES)


pytestmark = pytest.mark.usefixtures("one_thread")


def ragged_weights(device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter((0.1 * torch.randn(shape, generator=generator)).to(device)) for shape in SHAPES]


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
def test_the_first_update_is_at_most_the_learning_rate(betas):
    assert adam_update_bound(1, *betas) == 1.0


@pytest.mark.parametrize("betas, limit", [((0.9, 0.95), 1.165), ((0.9, 0.999), 7.270), ((0.95, 0.95), 1.0)], ids=str)
def test_known_limits(betas, limit):
    assert adam_update_bound(10**9, *betas) == pytest.approx(limit, abs=1e-3)


@pytest.mark.parametrize("betas", [(0.95, 0.9), (0.9, 0.81)], ids=str)
def test_grows_without_limit_unless_beta1_squared_is_below_beta2(betas):
    bounds = [adam_update_bound(10**k, *betas) for k in range(8)]
    assert all(later > 1.2 * earlier or later == math.inf for earlier, later in zip(bounds[1:], bounds[2:]))
    assert bounds[-1] > 100


@pytest.mark.parametrize("arguments, named", [((0, 0.9, 0.95), "t = 0"), ((5, 1.0, 0.95), "beta1 = 1.0"),
                                              ((5, 0.9, -0.1), "beta2 = -0.1"), ((5, 0.9, math.nan), "beta2 = nan")])
def test_impossible_arguments_are_named(arguments, named):
    for function in (adam_update_bound, worst_case_gradients):
        with pytest.raises(ValueError, match=named):
            function(*arguments)


def test_without_memory_in_v_there_is_no_bound():
    assert adam_update_bound(1, 0.9, 0.0) == 1.0
    assert adam_update_bound(2, 0.9, 0.0) == math.inf
    assert adam_update_bound(2, 0.0, 0.0) == 1.0


@for_betas
@pytest.mark.parametrize("t", [1, 2, 30, 200])
def test_adamw_attains_the_bound_on_the_worst_case_and_exceeds_one(betas, t):
    attained = adamw_update(worst_case_gradients(t, *betas), *betas)
    assert attained == pytest.approx(adam_update_bound(t, *betas), rel=1e-9)
    if t > 1 and betas[0] != betas[1]:
        assert attained > 1


@for_betas
def test_no_other_gradients_exceed_the_bound(betas):
    torch.manual_seed(0)
    worst = worst_case_gradients(40, *betas)
    for _ in range(40):
        gradients = worst + 0.1 * torch.randn(()) * torch.randn(40)
        assert adamw_update(gradients, *betas) <= adam_update_bound(40, *betas) * (1 + 1e-12)


# ---------------------------------------------------------------------------------------------------
# Predicted scales: nothing outgrows them


def gradients_of(kind, shape, step):
    """One step's gradient, over many magnitudes; "constant" drives every weight away from zero."""
    if kind == "gaussian":
        return torch.randn(shape)
    if kind == "cauchy":
        return torch.randn(shape) / torch.randn(shape)
    if kind == "student":
        return torch.distributions.StudentT(2.0).sample(shape)
    if kind == "constant":
        return torch.full(shape, -1.0)
    if kind == "growing":  # the worst case of betas (0.9, 0.95), again and again
        return torch.full(shape, -((0.9 / 0.95) ** (60 - step % 60)))
    if kind == "sparse":
        return torch.randn(shape) * (torch.rand(shape) < 0.02)


def warmup_cosine(step, steps, peak):
    return peak * min(step / 20, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def train(weights, scales, optimizer, first, last, kind="gaussian", peak=0.02, clip=1.0, check=None):
    """Steps first..last of a 200-step schedule, on gradients that depend on the step alone."""
    group = optimizer.param_groups[0]
    for step in range(first, last + 1):
        torch.manual_seed(step)
        for w in weights:
            w.grad = gradients_of(kind, w.shape, step).to(w.device)
        if clip:
            torch.nn.utils.clip_grad_norm_(weights, clip)
        group["lr"] = warmup_cosine(step, 200, peak)
        optimizer.step()
        scales.update(group["lr"], group["betas"], group["weight_decay"], step)
        if check:
            check(weights, scales)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"eps": 1e-15}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.95, 0.95)], ids=str)
@pytest.mark.parametrize("kind", ["gaussian", "cauchy", "student", "constant", "growing", "sparse"])
def test_no_weight_ever_exceeds_its_predicted_scale(kind, betas, options):
    weights = ragged_weights()
    optimizer = torch.optim.AdamW(weights, betas=betas, weight_decay=0.1, **options)
    check_optimizer(optimizer)
    scales = WeightScales(weights, interval=0)
    clip = 1.0 if kind in ("gaussian", "student") else None
    train(weights, scales, optimizer, 1, 100, kind, clip=clip, check=assert_below_scale)


def test_the_bound_survives_rounding_where_every_update_is_lr():
    """With beta1 = beta2 and a constant gradient the bound is tight: nothing but the slack is left over."""
    weights = [torch.nn.Parameter(torch.full((3,), 0.5))]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, betas=(0.95, 0.95), eps=1e-15, weight_decay=0.1)
    scales = WeightScales(weights, interval=0)
    for step in range(1, 2001):
        weights[0].grad = torch.full((3,), -0.3)
        optimizer.step()
        scales.update(1e-4, (0.95, 0.95), 0.1, step)
        assert_below_scale(weights, scales)
    assert scales.headroom().item() < 1.005


def test_the_bound_survives_rounding_where_weights_only_decay():
    """Without gradients, and with an lr far below the weights' ulp, rounding alone could lift a weight above."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(1000 * torch.rand(1)) for _ in range(100)]
    optimizer = torch.optim.AdamW(weights, lr=1e-9, weight_decay=1e6)
    scales = WeightScales(weights, interval=0)
    for step in range(1, 201):
        for w in weights:
            w.grad = torch.zeros(1)
        optimizer.step()
        scales.update(1e-9, (0.9, 0.999), 1e6, step)
        assert_below_scale(weights, scales)
    assert (scales.headroom() < 1.0002).all()


@pytest.mark.parametrize("capturable", [False, True])
def test_the_bound_survives_fp32_adam_on_the_worst_case(capturable):
    if capturable and not torch.cuda.is_available():
        pytest.skip("capturable AdamW, which computes bias corrections in FP32, runs on a GPU only")
    betas = (0.9, 0.999)
    weight = torch.nn.Parameter(torch.zeros(1, device="cuda" if capturable else "cpu"))
    optimizer = torch.optim.AdamW([weight], lr=1.0, betas=betas, eps=1e-15, weight_decay=0.0, capturable=capturable)
    scales = WeightScales([weight], interval=0)
    for step, gradient in enumerate(worst_case_gradients(150, *betas), start=1):
        weight.grad = gradient.float().reshape(1).to(weight.device)
        weight.data.zero_()
        scales.rescale()
        optimizer.step()
        scales.update(1.0, betas, 0.0, step)
        assert_below_scale([weight], scales)
    assert weight.abs().item() > 2.5  # far above Theorem 2's one learning rate
    assert scales.headroom().item() < 1.005


def test_decay_larger_than_one_flips_the_weight_and_is_still_bounded():
    weights = ragged_weights()
    optimizer = torch.optim.AdamW(weights, lr=2.0, betas=(0.9, 0.95), weight_decay=1.2)  # 1 - lr * decay = -1.4
    scales = WeightScales(weights, interval=0)
    for step in range(1, 30):
        for w in weights:
            w.grad = torch.randn_like(w)
        optimizer.step()
        scales.update(2.0, (0.9, 0.95), 1.2, step)
        assert_below_scale(weights, scales)


def test_weight_decay_lets_the_scale_shrink():
    scales = WeightScales(ragged_weights(), interval=0)
    before = scales.scale.clone()
    scales.update(lr=1e-3, betas=(0.9, 0.95), weight_decay=100.0, step=1)
    growth = 1e-3 / 448
    torch.testing.assert_close(scales.scale, 0.9 * before + growth, rtol=1e-4, atol=growth / 200)


def test_the_prediction_does_not_look_at_the_weights():
    weights = ragged_weights()
    scales = WeightScales(weights, interval=3)
    weights[0].data.fill_(math.nan)
    weights[1].data.fill_(math.inf)
    for step in (1, 2):
        scales.update(1e-3, (0.9, 0.95), 0.1, step)
        assert scales.scale.isfinite().all()
    scales.update(1e-3, (0.9, 0.95), 0.1, 3)  # re-anchoring does look
    assert scales.scale[0].isnan() and scales.scale[1].isinf() and scales.scale[2:].isfinite().all()


def test_re_anchoring_takes_the_true_maximum_at_exactly_the_interval():
    weights = ragged_weights()
    scales = WeightScales(weights, interval=50)
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.95))
    for step in range(1, 151):
        train(weights, scales, optimizer, step, step)
        is_true = torch.equal(scales.scale, amax(weights) / 448)
        assert is_true == (step % 50 == 0)
        assert (scales.headroom() >= 1).all()


def test_interval_zero_never_re_anchors():
    weights = ragged_weights()
    scales = WeightScales(weights, interval=0)
    for step in range(1, 1001):
        scales.update(1e-3, (0.9, 0.95), 0.0, step)
    assert (scales.headroom() > 1).all()


def test_a_skipped_step_leaves_the_scale_alone():
    """Only update() moves a scale, and it counts by the step it is given, not by how often it was called."""
    weights = ragged_weights()
    scales = WeightScales(weights, interval=10)
    before = scales.scale.clone()
    for w in weights:  # a skipped optimizer step: gradients come and go, update() is not called
        w.grad = torch.full_like(w, math.inf)
    assert torch.equal(scales.scale, before)
    scales.update(1e-3, (0.9, 0.95), 0.0, step=9)
    assert (scales.scale > before).all()
    scales.update(1e-3, (0.9, 0.95), 0.0, step=10)
    assert torch.equal(scales.scale, before)


# ---------------------------------------------------------------------------------------------------
# The other modes


@for_devices
def test_true_scale_is_the_maximum_of_every_ragged_weight(device):
    weights = ragged_weights(device) + [torch.randn(300, 257, device=device).T, torch.randn(64, 64, device=device)[::2]]
    scales = WeightScales(weights)
    assert scales.scale.shape == (6,) and scales.scale.dtype == torch.float32 and scales.scale.device.type == device
    assert torch.equal(scales.true_scale(), amax(weights) / 448)


def test_current_mode_is_amax_over_448_after_every_step():
    weights = ragged_weights()
    scales = WeightScales(weights, mode="current")

    def check(weights, scales):
        assert torch.equal(scales.scale, amax(weights) / 448)
    train(weights, scales, torch.optim.AdamW(weights, betas=(0.9, 0.95)), 1, 20, check=check)


def test_delayed_mode_is_the_largest_maximum_of_the_previous_steps():
    weight = torch.zeros(4)
    scales = WeightScales([weight], mode="delayed", history=3)
    maxima = [5.0, 2.0, 7.0, 1.0, 1.0, 3.0, 2.0, 1.0, 1.0, 1.0]
    for step, maximum in enumerate(maxima, start=1):
        weight.fill_(-maximum)
        scales.update(1e-3, (0.9, 0.95), 0.0, step)
        previous = maxima[max(0, step - 4):step - 1]
        assert scales.scale.item() == max(torch.tensor(max(previous, default=0.0)) / 448, MIN_SCALE)


@pytest.mark.parametrize("history", [1, 4, 16])
def test_delayed_mode_forgets_a_spike_after_history_steps(history):
    weight = torch.ones(4)
    scales = WeightScales([weight], mode="delayed", history=history)
    remembered = []
    for step in range(1, 41):
        weight.fill_(100.0 if step == 5 else 1.0)
        scales.update(1e-3, (0.9, 0.95), 0.0, step)
        if scales.scale.item() > 50 / 448:
            remembered.append(step)
    assert remembered == list(range(6, 6 + history))
    assert scales.scale_history.shape == (history, 1)


def test_delayed_mode_falls_behind_growing_weights():
    weight = torch.ones(4)
    scales = WeightScales([weight], mode="delayed")
    weight.mul_(1.5)
    scales.update(0.5, (0.9, 0.95), 0.0, 1)
    assert scales.headroom().item() == pytest.approx(1 / 1.5)


@pytest.mark.parametrize("mode", WeightScales.MODES)
def test_an_all_zero_weight_gets_a_small_positive_scale(mode):
    scales = WeightScales([torch.zeros(3, 2), torch.ones(2)], mode)
    assert scales.scale.tolist() == [MIN_SCALE, torch.tensor(1 / 448).item()]
    assert (torch.zeros(3, 2) / scales.scale[0] == 0).all()


@for_devices
@pytest.mark.parametrize("mode", WeightScales.MODES)
def test_a_view_of_a_scale_stays_valid(mode, device):
    weights = ragged_weights(device)
    scales = WeightScales(weights, mode, interval=2)
    view = scales.scale[1]
    for step in (1, 2, 3):
        weights[1].data.add_(0.01)
        scales.update(1e-2, (0.9, 0.95), 0.0, step)
        assert view.item() == scales.scale[1].item()
    scales.load_state_dict(WeightScales(ragged_weights(device, seed=1), mode).state_dict())
    assert view.item() == scales.scale[1].item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("mode", WeightScales.MODES)
def test_update_never_makes_the_host_wait(mode):
    scales = WeightScales(ragged_weights("cuda"), mode, interval=2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (1, 2, 3):
            scales.update(1e-3, (0.9, 0.95), 0.1, step)
            scales.headroom()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------------------------------------------
# State


@pytest.mark.parametrize("mode", WeightScales.MODES)
def test_a_resumed_run_continues_bit_for_bit(mode, tmp_path):
    weights = ragged_weights()
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.95))
    scales = WeightScales(weights, mode, interval=40)
    train(weights, scales, optimizer, 1, 25)
    checkpoint = {"weights": [w.detach() for w in weights], "optimizer": optimizer.state_dict()}
    torch.save({**checkpoint, "scales": scales.state_dict()}, tmp_path / "checkpoint.pt")
    uninterrupted = []
    train(weights, scales, optimizer, 26, 60, check=lambda _, scales: uninterrupted.append(scales.scale.clone()))

    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed_weights = [torch.nn.Parameter(w) for w in checkpoint["weights"]]
    resumed_optimizer = torch.optim.AdamW(resumed_weights, betas=(0.9, 0.95))
    resumed_optimizer.load_state_dict(checkpoint["optimizer"])
    resumed = WeightScales(resumed_weights, mode, interval=40)
    resumed.load_state_dict(checkpoint["scales"])
    continued = []
    train(resumed_weights, resumed, resumed_optimizer, 26, 60, check=lambda _, s: continued.append(s.scale.clone()))
    assert torch.equal(torch.stack(continued), torch.stack(uninterrupted))


@pytest.mark.parametrize("mode", WeightScales.MODES)
def test_state_is_a_copy_of_fixed_size(mode):
    scales = WeightScales(ragged_weights(), mode, interval=0)
    state = scales.state_dict()
    snapshot = copy.deepcopy(state)
    for step in range(1, 40):
        scales.update(1e-2, (0.9, 0.95), 0.0, step)
    assert torch.equal(state["scale"], snapshot["scale"])
    later = scales.state_dict()
    assert all(later[key].shape == state[key].shape for key in ("scale", "scale_history"))


@pytest.mark.parametrize("other", [{"mode": "current"}, {"mode": "delayed", "history": 4}, {"fewer": True}], ids=str)
def test_state_of_other_scales_is_refused(other):
    weights = ragged_weights()
    saved = WeightScales(weights[:2] if other.pop("fewer", False) else weights, **other).state_dict()
    with pytest.raises(ValueError, match="build WeightScales as it was when saved"):
        WeightScales(weights, mode="delayed" if "history" in other else "predicted").load_state_dict(saved)


# ---------------------------------------------------------------------------------------------------
# Wrong use is refused


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "eps": 1e-12}, {"weight_decay": 0.0}], ids=str)
def test_adamw_is_accepted(options):
    check_optimizer(torch.optim.AdamW(ragged_weights(), **options))


def test_adam_is_accepted_only_without_coupled_decay():
    check_optimizer(torch.optim.Adam(ragged_weights()))
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


@pytest.mark.parametrize("options, named", [({"betas": (0.95, 0.9)}, "without limit"), ({"eps": 0.0}, "eps = 0.0"),
                                            ({"betas": (0.9, 0.99999), "capturable": True}, "capturable")])
def test_settings_outside_the_proof_are_refused_in_any_group(options, named):
    first, *others = ragged_weights()
    optimizer = torch.optim.AdamW([{"params": [first]}, {"params": others, **options}])
    with pytest.raises(ValueError, match=f"{named}.*mode='current'"):
        check_optimizer(optimizer)


@pytest.mark.parametrize("options, named", [({"mode": "static"}, "mode = 'static'"),
                                            ({"interval": -1}, "interval = -1"), ({"history": 0}, "history = 0"),
                                            ({"weights": []}, "float32"),
                                            ({"weights": [torch.ones(2, dtype=torch.bfloat16)]}, "float32")])
def test_impossible_settings_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        WeightScales(**{"weights": ragged_weights(), **options})


# ---------------------------------------------------------------------------------------------------
# The tables


def test_the_tables_show_what_they_claim(capsys):
    autoscale.print_bound()
    autoscale.print_prediction(autoscale.regression_run(steps=60, interval=20))
    autoscale.print_headroom_cost()
    printed = capsys.readouterr().out
    assert "1.162   1.165   1.165             1.165" in printed  # betas (0.9, 0.95): bound, limit, and AdamW itself
    assert "Predicted: too small in 0 of 60 steps" in printed
    assert printed.count("->") == 3


# ---------------------------------------------------------------------------------------------------
# The optimizer that writes FP8 weights


class Layer:
    """What FP8AdamW asks of a layer."""

    def __init__(self, shape, device, scale):
        self.weight = torch.nn.Parameter(0.02 * torch.randn(shape, device=device))
        self.w, self.w_t = quantize_weight(self.weight.detach(), RECIPES["moss"], scale)


def adamw_state(shape, device):
    """p, g, m, v of a weight in the middle of training, and room for its FP8 copies."""
    torch.manual_seed(0)
    p, g, m = (0.02 * torch.randn(shape, device=device), torch.randn(shape, device=device),
               0.1 * torch.randn(shape, device=device))
    v = torch.rand(shape, device=device) ** 4
    w, w_t = (torch.empty(s, device=device).to(torch.float8_e4m3fn) for s in (shape, shape[::-1]))
    return p, g, m, v, w, w_t


SETTINGS = dict(lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, step=7)


@pytest.mark.parametrize("shape", [(16, 32), (128, 64), (130, 33), (1, 1), (300, 17)], ids=str)
def test_reference_step_is_that_of_torch_adamw(shape):
    p, g, m, v, w, w_t = adamw_state(shape, "cpu")
    theirs = torch.nn.Parameter(p.clone())
    optimizer = torch.optim.AdamW([theirs], **{k: SETTINGS[k] for k in ("lr", "betas", "eps", "weight_decay")})
    theirs.grad = g.clone()
    optimizer.state[theirs] = {"step": torch.tensor(6.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    optimizer.step()
    autoscale.adamw_reference(p, g, m, v, w, w_t, torch.tensor([[1e-4]]), **SETTINGS)
    for ours, name in ((m, "exp_avg"), (v, "exp_avg_sq")):
        assert torch.equal(ours, optimizer.state[theirs][name]), name
    assert torch.equal(p, theirs.detach())


@needs_triton
@pytest.mark.parametrize("shape", [(16, 32), (128, 64), (130, 33), (1, 1), (300, 17)], ids=str)
def test_kernel_equals_the_reference_to_rounding_on_ragged_shapes(shape):
    scale = torch.full((1, 1), 1e-4, device=DEVICE)
    ours, reference = adamw_state(shape, DEVICE), adamw_state(shape, DEVICE)
    autoscale.adamw_triton(*ours, scale, **SETTINGS)
    autoscale.adamw_reference(*reference, scale, **SETTINGS)
    for name, a, b in zip("pmv", (ours[0], *ours[2:4]), (reference[0], *reference[2:4])):
        # a GPU contracts a product and a sum into one rounding: 2 of 2^-24 of the largest term
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7 * b.abs().max().item(), msg=name)


@needs_triton
@pytest.mark.parametrize("shape", [(128, 64), (130, 33)], ids=str)
def test_kernel_writes_exactly_the_fp8_numbers_of_the_weight_it_wrote(shape):
    p, g, m, v, w, w_t = adamw_state(shape, DEVICE)
    scale = (p.abs().max() / 448 * 0.9).view(1, 1)   # too small: the largest weights saturate, they do not turn NaN
    autoscale.adamw_triton(p, g, m, v, w, w_t, scale, **SETTINGS)
    assert torch.equal(w.view(torch.uint8), cast(p / scale, E4M3).view(torch.uint8))
    assert torch.equal(w_t.view(torch.uint8), w.view(torch.uint8).t())


def run_fp8_adamw(device, steps=20, restart_at=None):
    """A layer and a plain parameter trained by FP8AdamW with a predicted scale -> (weights, FP8 copies, scales)."""
    torch.manual_seed(0)
    layer = Layer((48, 80), device, torch.full((1, 1), 1e-3, device=device))
    other = torch.nn.Parameter(torch.randn(33, device=device))
    scales = WeightScales([layer.weight], interval=8)
    layer.w, layer.w_t = quantize_weight(layer.weight.detach(), RECIPES["moss"], scales.scale[0].view(1, 1))

    def make():
        groups = [{"params": [layer.weight], "weight_decay": 0.1}, {"params": [other], "weight_decay": 0.0}]
        return FP8AdamW(groups, [layer], lr=1e-2, betas=(0.9, 0.95), fused=device == "cuda")
    optimizer = make()
    for step in range(1, steps + 1):
        if step == restart_at:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = make()
            optimizer.load_state_dict(state)
        for p in (layer.weight, other):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(device)
        predicted = not scales.measures(step)
        if predicted:
            scales.update(1e-2, (0.9, 0.95), 0.1, step)
        optimizer.step()
        if not predicted:
            scales.update(1e-2, (0.9, 0.95), 0.1, step)
        if not predicted or not optimizer.layers:
            layer.w, layer.w_t = quantize_weight(layer.weight.detach(), RECIPES["moss"], scales.scale[0].view(1, 1))
    return layer.weight.detach(), other.detach(), layer.w, layer.w_t, scales


@for_devices
def test_fp8_adamw_trains_as_torch_adamw_and_its_copies_follow_the_weight(device):
    weight, other, w, w_t, scales = run_fp8_adamw(device)
    torch.manual_seed(0)
    start = 0.02 * torch.randn(48, 80, device=device), torch.randn(33, device=device)
    theirs = [torch.nn.Parameter(t) for t in start]
    groups = [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for step in range(1, 21):
        for p in theirs:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(device)
        optimizer.step()
    for a, b in zip((weight, other), theirs):   # 20 steps of a few roundings of 2^-24 each
        torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(w.scale.view(1), scales.scale) and scales.headroom() >= 1
    assert torch.equal(w.data.view(torch.uint8), cast(weight / scales.scale, E4M3).view(torch.uint8))
    assert torch.equal(w_t.data.view(torch.uint8), w.data.view(torch.uint8).t())


@pytest.mark.gpu
def test_fp8_adamw_refuses_a_group_that_mixes_weights_with_and_without_copies():
    layer = Layer((16, 16), "cuda", torch.ones(1, 1, device="cuda"))
    with pytest.raises(ValueError, match="group of 2 parameters holds 1 .* group of their own"):
        FP8AdamW([layer.weight, torch.nn.Parameter(torch.ones(3, device="cuda"))], [layer])


@for_devices
def test_fp8_adamw_goes_on_from_its_state_bit_for_bit(device):
    straight, resumed = run_fp8_adamw(device), run_fp8_adamw(device, restart_at=11)
    assert torch.equal(straight[0], resumed[0]) and torch.equal(straight[1], resumed[1])
    assert torch.equal(straight[2].data.view(torch.uint8), resumed[2].data.view(torch.uint8))
