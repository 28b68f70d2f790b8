"""Model sizes against the published ones, the counts against what PyTorch holds, and what a decoder must not do."""

import dataclasses

import pytest
import torch

import model as m
from microscale import RECIPES
from model import PRESETS, ModelConfig, Transformer

TINY = ModelConfig(vocab=64, seq=32, d=64, layers=2, heads=4, ffn=96)


def make(config=TINY, fp8="none"):
    torch.manual_seed(0)
    model = Transformer(config, fp8)
    by_tensor = model.recipe and model.recipe.weight_scale != "block"
    for layer in model.linears():
        layer.requantize(layer.weight.abs().max() / 448 if by_tensor else None)
    return model


def tokens(B=2, T=32, vocab=64):
    return torch.randint(0, vocab, (B, T), generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------------------------------------------
# Counts

@pytest.mark.parametrize("preset, published", [("olmo-7b", 6_888_095_744), ("llama2-7b", 6_738_415_616),
                                               ("1b", 1_176_764_416)])
def test_parameter_counts_equal_the_published_ones(preset, published):
    with torch.device("meta"):
        model = Transformer(PRESETS[preset])
    assert sum(p.numel() for p in model.parameters()) == published == m.parameter_count(PRESETS[preset])[1]


@pytest.mark.parametrize("change", [{}, {"tied": True}, {"norm": "layer"}, {"kv_heads": 2}], ids=str)
def test_parameter_formula_equals_what_the_model_holds(change):
    config = dataclasses.replace(TINY, **change)
    linear, total = m.parameter_count(config)
    model = Transformer(config)
    assert total == sum(p.numel() for p in model.parameters())
    assert linear == sum(layer.weight.numel() for layer in model.linears())


def test_flops_equal_those_that_pytorch_counts():
    from torch.utils.flop_counter import FlopCounterMode
    config = dataclasses.replace(TINY, seq=32)
    model, x = make(config), tokens()
    with FlopCounterMode(display=False) as counter:
        model(x, x).backward()
    # of attention PyTorch counts the masked half as well: only the rest is compared
    counts = counter.get_flop_counts()["Global"]
    products = sum(v for k, v in counts.items() if "attention" not in str(k))
    attention = 6 * config.layers * config.d * config.seq * x.numel()
    assert products + attention == m.flops_per_token(config) * x.numel()


@pytest.mark.parametrize("fp8", RECIPES)
@pytest.mark.parametrize("change", [{}, {"kv_heads": 2}], ids=str)
def test_activation_count_equals_what_autograd_keeps(fp8, change):
    config = ModelConfig(vocab=512, seq=64, d=256, layers=2, heads=4, ffn=512, norm="layer", **change)
    model, x = make(config, fp8), tokens(4, 64, 512)
    model(x)   # makes the RoPE table
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.rope)}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x, x)
    expected = m.memory(config, fp8, x.numel(), element=4)["activations"]
    # not in the formula: statistics of norm and attention, and a scale per row: a few bytes per token and layer
    assert sum(kept.values()) == pytest.approx(expected, rel=0.02)


# ---------------------------------------------------------------------------------------------------
# The decoder

def test_first_loss_is_that_of_a_uniform_guess():
    assert make()(tokens(), tokens()).item() == pytest.approx(torch.log(torch.tensor(64.0)).item(), abs=0.1)


@pytest.mark.parametrize("fp8", ["none", "group", "mx", "moss"])
def test_no_token_sees_a_later_one(fp8):
    """`tensor` is left out: its scale per tensor is a function of all tokens, later ones included."""
    model, x = make(fp8=fp8), tokens()
    y = x.clone()
    y[:, 20:] = 0
    assert torch.equal(model(x)[:, :20], model(y)[:, :20])


def test_rope_turns_by_the_distance_alone():
    cos, sin = m.rope_table(16, 8, 10000.0, "cpu")
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    q, k = (m.rope(z.expand(1, 16, 1, 8), cos, sin)[0, :, 0] for z in (q, k))
    scores = q @ k.t()
    for distance in (-3, 0, 5):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_layer_norm_preset_has_no_norm_parameters_and_rms_has():
    names = [n for n, _ in Transformer(dataclasses.replace(TINY, norm="layer")).named_parameters() if "norm" in n]
    assert names == []
    assert len([n for n, _ in Transformer(TINY).named_parameters() if "norm" in n]) == 2 * TINY.layers + 1


def test_tied_head_is_the_embedding():
    model = Transformer(dataclasses.replace(TINY, tied=True))
    assert model.head.weight is model.embed.weight


def test_grouped_query_attention_equals_repeated_keys_and_values():
    few, many = make(dataclasses.replace(TINY, kv_heads=2)), make(TINY)
    many.load_state_dict({**many.state_dict(), **{k: v for k, v in few.state_dict().items() if "qkv" not in k}})
    for a, b in zip(few.blocks, many.blocks):
        q, k, v = a.qkv.weight.detach().split((64, 32, 32))
        repeated = [w.view(2, 1, 16, 64).expand(2, 2, 16, 64).reshape(64, 64) for w in (k, v)]
        b.qkv.weight.data = torch.cat((q, *repeated))
    torch.testing.assert_close(few(tokens()), many(tokens()))


# ---------------------------------------------------------------------------------------------------
# Recipes in the model

@pytest.mark.parametrize("fp8", [name for name in RECIPES if name != "none"])
def test_fp8_changes_loss_and_gradients_by_little(fp8):
    exact, quantised = make(), make(fp8=fp8)
    losses = [model(tokens(), tokens(T=32)) for model in (exact, quantised)]
    for loss in losses:
        loss.backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), abs=0.01)
    for (name, p), q in zip(exact.named_parameters(), quantised.parameters()):
        similarity = torch.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0)
        assert similarity > 0.98, name   # E5M2 gradients (tensor) keep 3 bits: 12% error at most, 4% on average


def test_print_shows_the_recipe_of_each_layer():
    one_block = dataclasses.replace(TINY, layers=1)   # equal blocks are printed once
    assert str(make(one_block, "moss")).count("fp8=moss") == 4
    assert str(make(one_block)).count("fp8=none") == 5   # the head, which no recipe quantises, says so too


def test_initial_weights_are_the_same_under_every_recipe():
    states = [make(fp8=fp8).state_dict() for fp8 in RECIPES]
    assert all(torch.equal(states[0][k], s[k]) for s in states for k in states[0])


def test_widths_that_fp8_cannot_tile_are_refused_at_construction_by_layer_name():
    with pytest.raises(ValueError, match=r"layer blocks.0.gate_up: out = 200 .* multiple of 16, .*--fp8 moss"):
        Transformer(dataclasses.replace(TINY, ffn=100), "moss")
    Transformer(dataclasses.replace(TINY, ffn=100), "none")


@pytest.mark.parametrize("change, message", [({"d": 66}, "d = 66"), ({"kv_heads": 3}, "heads = 4"),
                                             ({"norm": "batch"}, "'batch'")])
def test_impossible_shapes_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_unknown_recipe_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="'fp4'.*none, tensor, group, mx, moss"):
        Transformer(TINY, "fp4")


def test_health_counts_saturation_only_while_it_is_watched():
    model = make(fp8="moss")
    model(tokens())
    assert all(layer.health is None for layer in model.linears())
    for layer in model.linears():
        layer.health = {}
    model(tokens(), tokens()).backward()
    for layer in model.linears():
        assert layer.health["saturated"] == layer.health["saturated_grad"] == 0
        assert 0 <= layer.health["folded"] < 0.05 and 0 <= layer.health["folded_grad"] < 0.5
