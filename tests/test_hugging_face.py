"""Models of others come in and go out unchanged, and what model.py does not compute is refused by name."""

import json
import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import model as m
import train
from model import ModelConfig, Transformer

safetensors = pytest.importorskip("safetensors.torch")
tokenizers = pytest.importorskip("tokenizers")

TINY = ModelConfig(seq=64, d=64, layers=2, heads=4, ffn=96, vocab=320, norm_eps=1e-6)
CONFIGS = {"LLaMA": TINY, "grouped queries": replace(TINY, kv_heads=2, rope_theta=5e5),
           "tied": replace(TINY, tied=True), "OLMo": replace(TINY, norm="layer", norm_eps=1e-5)}
TEXT = "the quick brown fox jumps over the lazy dog, and runs on.\n"


def make(config, seed=0):
    """Return a model whose weights are all different, and exact in BF16."""
    torch.manual_seed(seed)
    model = Transformer(config)
    for p in model.parameters():
        p.data = (torch.randn_like(p) * 0.2 + (p.dim() == 1)).bfloat16().float()
    return model


def tokenizer_file(path, size=300, end="<|endoftext|>"):
    """Train a tokenizer of pairs of bytes, fill it up to `size` tokens, and write it."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT * 3], vocab_size=280, special_tokens=[end], show_progress=False)
    tokenizer.add_tokens([f"<{i}>" for i in range(size - tokenizer.get_vocab_size())])
    tokenizer.save(str(path))
    return tokenizer


@pytest.fixture
def folder(tmp_path):
    """A model with a tokenizer."""
    path = tmp_path / "model"
    m.save_folder(make(TINY), path)
    tokenizer_file(path / "tokenizer.json")
    return path


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts"
    path.mkdir()
    for i in range(3):
        (path / f"{i}.txt").write_text(TEXT * (200 + i))
    return path


def change_config(folder, *without, **values):
    path = folder / "config.json"
    c = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in c.items() if name not in without}))


def tensors_of(folder):
    files = map(safetensors.load_file, folder.glob("*.safetensors"))
    return {name: x for tensors in files for name, x in tensors.items()}


def loaded(folder):
    model = Transformer(m.config_of(folder))
    m.load_weights(model, folder)
    return model


def run(*argv):
    return train.main([str(arg) for arg in argv])


def assert_refused(capsys, message, *argv):
    """In one line, which has this message, and with exit code 2."""
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# ---------------------------------------------------------------------------------------------------
# The model

def forward(weights, c, tokens):
    """Return the logits of LLaMA, from its published equations alone, in float64."""
    w = {name: x.double() for name, x in weights.items()}
    head_dim, kv = c["hidden_size"] // c["num_attention_heads"], c["num_key_value_heads"]
    T, x = len(tokens), w["model.embed_tokens.weight"][tokens]
    angles = torch.arange(T)[:, None] * c["rope_theta"] ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    turn = torch.polar(torch.ones_like(angles), angles)                              # (T, head_dim / 2)

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + c["rms_norm_eps"]).sqrt() * w[f"{name}.weight"]

    def heads(x, rotate):   # (T, n head_dim) -> (n, T, head_dim)
        a, b = x.view(T, -1, 2, head_dim // 2).permute(2, 1, 0, 3)
        z = torch.complex(a, b) * (turn if rotate else 1)
        return torch.cat((z.real, z.imag), dim=-1)

    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        n = norm(x, at + "input_layernorm")
        q, k, v = (heads(n @ w[f"{at}self_attn.{p}_proj.weight"].t(), p != "v") for p in "qkv")
        k, v = (z.repeat_interleave(len(q) // kv, dim=0) for z in (k, v))
        scores = (q @ k.mT / math.sqrt(head_dim)).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        y = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + y @ w[at + "self_attn.o_proj.weight"].t()
        n = norm(x, at + "post_attention_layernorm")
        gate, up = (n @ w[f"{at}mlp.{p}_proj.weight"].t() for p in ("gate", "up"))
        x = x + (gate * torch.sigmoid(gate) * up) @ w[at + "mlp.down_proj.weight"].t()
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return norm(x, "model.norm") @ head.t()


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "OLMo"])
def test_logits_are_those_of_the_published_equations(name, tmp_path):
    folder, tokens = tmp_path / "out", torch.arange(3, 43)
    m.save_folder(make(CONFIGS[name]), folder)
    expected = forward(tensors_of(folder), json.loads((folder / "config.json").read_text()), tokens)
    assert (loaded(folder)(tokens[None])[0] - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_what_is_written_and_writes_what_is_read(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours, tokens = make(CONFIGS[name]), torch.arange(3, 43)[None]
    m.save_folder(ours, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").float()
    assert type(theirs).__name__ == ("OlmoForCausalLM" if name == "OLMo" else "LlamaForCausalLM")
    expected = theirs(tokens).logits
    torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    theirs.save_pretrained(tmp_path / "back")
    again = loaded(tmp_path / "back")
    assert again.config == replace(ours.config, kv_heads=ours.config.kv_heads or ours.config.heads)
    assert all(map(torch.equal, ours.parameters(), again.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_come_from_files_of_any_float_and_in_any_order(dtype, folder, tmp_path):
    tensors = {name: x.to(dtype) for name, x in tensors_of(folder).items()}   # FP16 rounds the small ones
    (folder / "model.safetensors").unlink()
    names = sorted(tensors, reverse=True)   # q, k and v of a layer lie in different files
    where = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(names)}
    for i in range(3):
        safetensors.save_file({name: tensors[name] for name in names[i::3]}, folder / f"part-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "stray.safetensors").write_text("no part of the model")
    weights = m.weights_by_name(loaded(folder))
    assert all(torch.equal(p, tensors[name].float()) for name, p in weights.items())


def test_large_models_are_written_in_parts_with_an_index(tmp_path):
    model = make(TINY)
    m.save_folder(model, tmp_path / "out", part="50KB")
    files = [*(tmp_path / "out").glob("*.safetensors")]
    assert len(files) > 2
    for file in files:
        with safetensors.safe_open(file, "pt") as part:
            assert part.metadata()["format"] == "pt" and file.stat().st_size < 60_000
    assert all(map(torch.equal, model.parameters(), loaded(tmp_path / "out").parameters()))


@pytest.mark.parametrize("name, value, message", [
    ("architectures", ["Qwen3ForCausalLM"], "architecture 'Qwen3ForCausalLM' is unknown"),
    ("attention_bias", True, "attention_bias = True"), ("mlp_bias", True, "mlp_bias = True"),
    ("clip_qkv", 8.0, "clip_qkv = 8.0"), ("hidden_act", "gelu", "hidden_act = gelu"),
    ("head_dim", 32, "head_dim = 32"), ("rope_scaling", {"type": "linear", "factor": 2.0}, "type = linear"),
    ("rope_parameters", {"rope_type": "llama3"}, "rope_type = llama3"),
    ("partial_rotary_factor", 0.5, "partial_rotary_factor = 0.5"), ("num_attention_heads", 3, "d = 64"),
    ("is_causal", False, "is_causal = False"), ("quantization_config", {"bits": 4}, "quantization_config = "),
    ("model_type", "olmo", "model_type = olmo"), ("tie_word_embeddings", "no", "tie_word_embeddings = no"),
    ("num_key_value_heads", 0, "num_key_value_heads = 0"), ("sliding_window", "64", "sliding_window = 64"),
    ("rope_parameters", {"rope_theta": "9"}, "rope_theta = 9"), ("rms_norm_eps", "1e-6", "rms_norm_eps = "),
    ("hidden_size", None, "hidden_size = None"), ("vocab_size", "many", "vocab_size = many")], ids=str)
def test_what_the_model_does_not_compute_is_refused_by_name(name, value, message, folder, capsys):
    change_config(folder, **{name: value})
    assert_refused(capsys, message, "--eval_only", "--init", folder)


MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
OLMO = {"architectures": ["OlmoForCausalLM"], "model_type": "olmo"}


@pytest.mark.parametrize("without, change, expected", [
    ("", {**MISTRAL, "sliding_window": 32}, {"seq": 32}),   # a window that is shorter bounds the sequence
    ("", {**MISTRAL, "max_position_embeddings": 6000}, {"seq": 4096}),   # Mistral's own window
    ("", {**OLMO, "rms_norm_eps": 1e-3}, {"norm_eps": 1e-5}),            # OLMo's own
    ("rope_theta", {"rope_parameters": {"rope_theta": 123.0}}, {"rope_theta": 123.0}),   # of transformers 5
    ("rms_norm_eps rope_theta rope_parameters num_key_value_heads tie_word_embeddings", {},
     {"norm_eps": 1e-6, "rope_theta": 1e4, "kv_heads": 0, "tied": False})], ids=str)
def test_what_a_config_says_and_does_not_say_is_as_in_transformers(without, change, expected, folder):
    change_config(folder, *without.split(), **change)
    config = m.config_of(folder)
    assert {name: getattr(config, name) for name in expected} == expected


UP, Q_NORM = "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_norm.weight"


def change_tensor(folder, name, change):
    tensors = tensors_of(folder)
    tensors[name] = change(tensors.pop(name, None))
    safetensors.save_file({k: x for k, x in tensors.items() if x is not None}, folder / "model.safetensors")


BROKEN = {   # what is said: what was done
    f"lacks 1 weights, first {UP}": lambda folder: change_tensor(folder, UP, lambda x: None),
    f"{UP} is torch.int8": lambda folder: change_tensor(folder, UP, lambda x: x.to(torch.int8)),
    f"{UP} is torch.bfloat16 [95, 64], and [96, 64]":
        lambda folder: change_tensor(folder, UP, lambda x: x[:-1].clone()),
    f"{Q_NORM} is torch.bfloat16 [16], and unknown":
        lambda folder: change_tensor(folder, Q_NORM, lambda _: torch.ones(16, dtype=torch.bfloat16)),
    "lm_head.weight is not the embedding": lambda folder: change_config(folder, tie_word_embeddings=True),
    "holds list": lambda folder: (folder / "config.json").write_text("[]"),
    "is damaged": lambda folder: os.truncate(folder / "model.safetensors", 50_000),
    "model.safetensors": lambda folder: (folder / "model.safetensors").unlink(),
    "names no files of this folder": lambda folder: [
        (folder / "model.safetensors").rename(folder / "../elsewhere"),
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../elsewhere"}}')]}


@pytest.mark.parametrize("message", BROKEN)
def test_a_folder_with_other_weights_is_refused_and_the_weight_is_named(message, folder, texts, capsys):
    BROKEN[message](folder)
    assert_refused(capsys, message, "--eval_only", "--init", folder, "--data", texts)


# ---------------------------------------------------------------------------------------------------
# Text

def test_text_becomes_all_of_the_tokenizers_tokens_and_each_file_ends_with_that_of_its_end(texts, tmp_path):
    tokenizer = tokenizer_file(tmp_path / "t.json")
    (texts / "2.txt").write_text(TEXT * 19_000)   # is encoded in two pieces, which end with a line
    expected = sum((tokenizer.encode(path.read_text()).ids + [0] for path in sorted(texts.iterdir())), [])
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    tokenizer.enable_truncation(8)   # it may cut texts and fill them up elsewhere, but not here
    tokenizer.enable_padding(length=10**6)
    tokenizer.save(str(tmp_path / "t.json"))
    files = [(path, 0, path.stat().st_size) for path in sorted(texts.iterdir())]
    assert len(list(train.pieces(files))) == 4
    tokenizer = train.open_tokenizer(tmp_path / "t.json")
    train.write_tokens(tmp_path / "tokens.bin", files, tokenizer, np.dtype(np.uint32), lambda text: None)
    assert np.fromfile(tmp_path / "tokens.bin", np.uint32).tolist() == expected


def test_a_file_that_becomes_shorter_ends_in_an_error_and_part_of_one_in_no_end_of_text(texts):
    size = (texts / "0.txt").stat().st_size
    with pytest.raises(OSError, match="has become shorter"):
        list(train.pieces([(texts / "0.txt", 0, size + 5)]))
    halves = [(texts / "0.txt", 0, 100), (texts / "0.txt", 100, size - 100)]
    assert [ends for *_, ends in train.pieces(halves)] == [False, True]


def test_text_is_encoded_once_and_again_when_a_file_or_the_tokenizer_changes(texts, tmp_path):
    path = texts / "0.txt"
    tokenizer, files = tokenizer_file(tmp_path / "t.json"), [(path, 0, path.stat().st_size)]
    first = train.token_cache(files, tokenizer, tmp_path)
    assert train.token_cache(files, tokenizer, tmp_path) == first
    assert train.token_cache(files, tokenizer_file(tmp_path / "t.json", size=301), tmp_path) != first
    path.write_text(path.read_text().replace("quick", "slow!"))   # as long as before
    assert train.token_cache(files, tokenizer, tmp_path) != first


# ---------------------------------------------------------------------------------------------------
# With train.py

TUNE = ("--fp8 moss --steps 4 --batch 2 --accum 1 --seq 32 --eval_batches 2 --eval_every 2 "
        "--device cpu").split()


def begin(*argv):
    c = train.parse_config([str(arg) for arg in argv])
    return train.build(c, *train.start(c))


def test_a_model_is_tuned_resumed_and_written_for_others(folder, texts, tmp_path, monkeypatch, capsys):
    out, exported, generate = tmp_path / "out", tmp_path / "tuned", Transformer.generate
    monkeypatch.setattr(Transformer, "generate", lambda *args, **kw: generate(*args[:2], 8, **kw))   # short
    change_config(folder, eos_token_id=0)
    assert run("--init", folder, "--data", texts, "--out", out, *TUNE) == 0
    assert "tokenized" in capsys.readouterr().out
    whole = torch.load(out / "step_00000004/rank_0.pt")
    (out / "step_00000004").rename(tmp_path / "aside")
    (folder / "model.safetensors").rename(tmp_path / "gone")   # a checkpoint needs the folder no more
    assert run("--resume", "--out", out) == 0
    assert "tokenized" not in capsys.readouterr().out   # the cache serves
    again = torch.load(out / "step_00000004/rank_0.pt")
    assert all(torch.equal(x, again[name][key]) for name, kept in whole.items() for key, x in kept.items())
    assert run("--export", exported, "--out", out) == 0
    config = json.loads((exported / "config.json").read_text())
    assert config["eos_token_id"] == 0 and config["max_position_embeddings"] == 64
    assert (exported / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()
    for name, p in loaded(exported).named_parameters():
        assert torch.equal(p, whole[name]["weight"].bfloat16().float()), name
    assert run("--export", exported, "--out", out) == 2 and "not empty" in capsys.readouterr().err
    assert run("--sample", "the quick", "--out", out) == 0
    assert capsys.readouterr().out.startswith("the quick")


def test_data_beside_the_cache_are_the_same_when_the_run_goes_on(folder, texts, monkeypatch, capsys):
    """--out lies in the data: what is cached there is no text and no file of tokens."""
    monkeypatch.chdir(texts)
    assert run("--init", folder, "--data", ".", "--out", "out/", *TUNE, "--steps", 2) == 0
    assert Path("out.tokens").is_dir() and "note" not in capsys.readouterr().out
    assert run("--resume", "--steps", 4) == 0
    printed = capsys.readouterr().out
    assert "tokenized" not in printed and "note: --data" not in printed
    tokenizer_file(folder / "tokenizer.json", size=301)
    assert run("--resume", "--steps", 6) == 2 and "has changed" in capsys.readouterr().err


def test_an_export_changes_no_bit_and_one_that_has_failed_leaves_nothing_behind(folder, tmp_path, capsys):
    out = tmp_path / "x"
    assert_refused(capsys, "no tokenizer.json", "--init", folder, "--export", out,
                   "--tokenizer", folder / "config.json")
    (folder / "config.json").chmod(0o444)   # as on a disk that others share
    assert run("--init", folder, "--export", out) == 0 and [*tmp_path.glob("x*")] == [out]
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1   # all can read all of it, or none
    before, after = tensors_of(folder), tensors_of(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(x.view(torch.int16), after[name].view(torch.int16)) for name, x in before.items())
    (tmp_path / "y.tmp").mkdir()
    assert_refused(capsys, "remove it", "--init", folder, "--export", tmp_path / "y")


def test_a_direct_cast_compares_recipes_in_nats_and_bits_per_byte(folder, texts, tmp_path, capsys):
    assert run("--eval-only", "--init", folder, "--data", texts, "--fp8", "none,moss", *TUNE[4:-2],
               "--out", tmp_path / "out") == 0
    none, moss = capsys.readouterr().out.splitlines()[-2:]
    assert none.startswith(f"{folder}  none") and moss.startswith(f"{folder}  moss") and "gradient" in moss
    nats, bits = (float(none.split(name)[1].split()[0]) for name in ("validation loss", "bits per byte"))
    validation = train.open_data(texts)[1].files   # (path, offset, bytes)
    tokenizer = train.open_tokenizer(folder / "tokenizer.json")
    cached = train.token_cache(validation, tokenizer, tmp_path / "out.tokens")
    tokens, size = cached.stat().st_size // 4, sum(count for _, _, count in validation)
    assert bits == pytest.approx(nats / math.log(2) * tokens / size, rel=1e-3)


def test_calibrating_changes_the_loss_of_4_bits_and_not_that_of_none(folder, texts, tmp_path, capsys):
    losses = []
    for tokens in (0, 256):
        assert run("--eval-only", "--init", folder, "--data", texts, "--fp8", "none,mxfp4", *TUNE[4:-2],
                   "--out", tmp_path / "out", "--calibrate", tokens) == 0
        losses.append(re.findall(r"validation loss (\S+)", capsys.readouterr().out))
    (none, rounded), (again, diffused) = losses
    assert none == again and rounded != diffused


def test_scales_are_those_of_the_weights_that_were_loaded(folder, texts, tmp_path):
    run = begin("--init", folder, "--data", texts, "--out", tmp_path / "out", *TUNE)
    weight = tensors_of(folder)["model.layers.0.self_attn.o_proj.weight"].float()
    assert run.scales.views[1].item() == pytest.approx(weight.abs().max().item() / 448)
    assert run.model.blocks[0].out.is_current()


def test_a_preset_grows_to_the_vocabulary_of_a_tokenizer(texts, tmp_path):
    tokenizer_file(tmp_path / "t.json", size=300)
    run = begin("--tokenizer", tmp_path / "t.json", "--data", texts, "--model", "nano", *TUNE,
                "--out", tmp_path / "out")
    assert run.model.config.vocab == 384   # 300 up to a multiple of 128


@pytest.mark.parametrize("argv, message", [
    ("--init nowhere", "config.json"), ("--init bare", "has no tokenizer"),
    ("--init model --model 124m", "--model 124m has hidden_size 768"),
    ("--init model --model nano-moe", "8 experts"), ("--init model --calibrate 9", "--eval_only"),
    ("--init model --out .", "holds"), ("--init model --seq 128", "at most 64 tokens"),
    ("--init model --layers 1", "has 2,"),
    ("--init model --tokenizer big.json", "has 330 tokens, the model 320"),
    ("--init model --tokenizer model/config.json", "is no tokenizer.json"),
    ("--init model --tokenizer endless.json", "no token for the end of a text"),
    ("--export somewhere", "no checkpoint"), ("--export texts --init model", "not empty")])
def test_mistakes_are_one_line_and_exit_code_2(argv, message, folder, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    m.save_folder(make(TINY), tmp_path / "bare")
    tokenizer_file(tmp_path / "big.json", size=330)
    tokenizer_file(tmp_path / "endless.json", end="<pad>")
    assert_refused(capsys, message, *argv.split(), "--data", "texts", "--device", "cpu")
    assert not Path("out").exists()


@pytest.mark.parametrize("package", ["safetensors", "tokenizers", "huggingface_hub"])
def test_a_missing_package_is_named_with_its_command(package, folder, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    mode = ["--export", tmp_path / "x"] if package == "huggingface_hub" else ["--eval_only", "--data", texts]
    assert_refused(capsys, f"pip install {package}", *mode, "--init", folder, "--device", "cpu",
                   "--out", tmp_path / "out")
