"""
Models of others: weights and tokenizers in folders that Hugging Face's transformers, 4 and 5, write and read.

    python train.py --init Llama-2-7b-hf/ --data texts/ --out tuned    # fine-tune one
    python train.py --out tuned --export tuned-hf/                     # write it for other tools

A folder holds config.json, weights in *.safetensors, and mostly tokenizer.json. LLaMA, Mistral (while its
window is no shorter than the sequence) and OLMo 1 are what model.py computes. Both sides turn pairs
(x_i, x_{i + head_dim/2}) for RoPE, so that weights need no permutation; here q, k and v are rows of one
matrix, and gate and up of another. Needs pip install safetensors tokenizers, which are imported where used.
"""
import hashlib
import itertools
import json
import os
import shutil
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

from microscale import NORM_EPS, check_name
from model import ModelConfig

NORMS = {"LlamaForCausalLM": "rms", "MistralForCausalLM": "rms", "OlmoForCausalLM": "layer"}
FIELDS = {"d": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
          "kv_heads": "num_key_value_heads", "ffn": "intermediate_size", "seq": "max_position_embeddings",
          "vocab": "vocab_size", "tied": "tie_word_embeddings", "rope_theta": "rope_theta",
          "norm_eps": "rms_norm_eps"}
COMPUTED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "clip_qkv": None,
            "type": "default", "rope_type": "default", "partial_rotary_factor": 1, "is_causal": True,
            "quantization_config": None}   # all else is refused
BESIDE = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "*.jinja",
          "vocab.json", "merges.txt")      # what belongs to a model besides weights


# ---------------------------------------------------------------------------------------------------
# The model

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
    check_name(f"{folder}/config.json: architecture", architecture, [*NORMS])
    if c.get("model_type", "?") not in ("?", architecture.removesuffix("ForCausalLM").lower()):
        refuse(f"model_type = {c['model_type']}", f"the architecture is {architecture}")
    ours = {name: c[theirs] for name, theirs in FIELDS.items() if c.get(theirs) is not None}
    kinds = {"tied": (bool,), "rope_theta": (int, float), "norm_eps": (int, float)}
    for name in {"d", "layers", "heads", "ffn", "vocab", "seq", *ours}:
        value, number = ours.get(name), name != "tied"
        if type(value) not in kinds.get(name, (int,)) or number and not value > 0:
            refuse(f"{FIELDS[name]} = {value}", "a positive number is needed, or to tie, true or false")
    ours["norm_eps"] = ours.get("norm_eps", 1e-6) if NORMS[architecture] == "rms" else NORM_EPS
    config = ModelConfig(**ours, norm=NORMS[architecture])
    for name, value in {**COMPUTED, "head_dim": config.head_dim}.items():
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
            "architectures": [f"{name}ForCausalLM"], "model_type": name.lower(),
            "torch_dtype": "bfloat16", "dtype": "bfloat16"}   # its name in transformers 4, and in 5


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
    """Fill a model from the safetensors in `folder`, one tensor at a time. ValueError for a weight too many
    or too few, one of another shape, and a damaged file."""
    from safetensors import SafetensorError, safe_open
    weights, files, tied = weights_by_name(model), ["model.safetensors"], None
    index = folder / "model.safetensors.index.json"
    if index.exists() and not (folder / files[0]).exists():
        where = read_json(index).get("weight_map")
        files = sorted(set(map(str, where.values()))) if isinstance(where, dict) else []
        if not files or any(os.path.basename(file) != file for file in files):
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
    else belongs to the model in `init`, the folder that it began with, comes along. OSError if `folder` is
    not empty, or if `folder`.tmp is there; ValueError if `init` has become another model's."""
    from huggingface_hub import save_torch_state_dict
    weights = {name: weight.to("cpu", torch.bfloat16) for name, weight in weights_by_name(model).items()}
    config, unfinished = config_for(model.config), folder.with_name(folder.name + ".tmp")
    if tokenizer:
        open_tokenizer(tokenizer)
    if folder.exists():
        folder.rmdir()
    try:
        unfinished.mkdir(parents=True)
    except FileExistsError:
        raise ValueError(f"{unfinished} is there: an export was killed, or is at work; remove it") from None
    try:
        for path in {path for name in BESIDE for path in (init.glob(name) if init else ())}:
            shutil.copyfile(path, unfinished / path.name)
        if (unfinished / "config.json").exists():   # it may allow longer sequences than were trained here
            config = {**config, **read_json(unfinished / "config.json"), "torch_dtype": "bfloat16",
                      "dtype": "bfloat16"}
        (unfinished / "config.json").write_text(json.dumps(config, indent=1))
        written = replace(config_of(unfinished), seq=model.config.seq, kv_heads=model.config.kv_heads)
        if written != model.config:
            raise ValueError(f"{init}/config.json has become that of another model: move the folder away")
        if tokenizer:
            shutil.copyfile(tokenizer, unfinished / "tokenizer.json")
        save_torch_state_dict(weights, unfinished, max_shard_size=part)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------
# Text

def open_tokenizer(path):
    """Return the tokenizer of a tokenizer.json. ValueError if that is none."""
    from tokenizers import Tokenizer
    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()   # it would cut texts, and fill others up
        tokenizer.no_padding()
        return tokenizer
    except Exception as e:   # the package raises no other
        raise ValueError(f"{path} is no tokenizer.json ({e}): give one of Hugging Face's") from None


def token_cache(files, tokenizer, folder):
    """Return where the tokens of text are or will be: a name that a checksum gives to the tokenizer and the
    names, sizes and times of `files`, of (path, offset, bytes)."""
    stats = [(str(path), offset, count, os.stat(path).st_size, os.stat(path).st_mtime_ns)
             for path, offset, count in files]
    about = json.dumps([stats, tokenizer.to_str()]).encode()
    return Path(folder) / f"{hashlib.sha256(about).hexdigest()[:20]}.u32"


def pieces(files):
    """Yield (about a million bytes of text, up to the end of a line; their number; whether its file ends)."""
    for path, offset, count in files:
        with open(path, "rb") as file:
            file.seek(offset)
            while count:
                piece = file.read(min(count, 1 << 20))
                piece += file.readline(count - len(piece))
                count -= len(piece)
                if not piece:
                    raise OSError(f"{path} has become shorter: begin again")
                ends = not count and file.tell() == os.stat(path).st_size   # validation may begin within it
                yield piece.decode("utf-8", "replace"), len(piece), ends


def write_tokens(path, files, tokenizer, dtype, say):
    """Write tokens of text, encoded on all cores, to `path`; after each file that of the end of a text."""
    ends = [tokenizer.token_to_id(name) for name in ("<|endoftext|>", "<|end_of_text|>", "</s>")]
    end = [i for i in ends if i is not None][:1]
    if not end:
        raise ValueError("the tokenizer has no token for the end of a text, such as <|endoftext|> or </s>")
    stream, done, total, begin = pieces(files), 0, sum(count for *_, count in files), time.perf_counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    with open(unfinished, "wb") as file:
        while batch := list(itertools.islice(stream, 64)):
            encoded = tokenizer.encode_batch([piece for piece, _, _ in batch], add_special_tokens=False)
            for encoding, (_, size, ends) in zip(encoded, batch):
                np.array(encoding.ids + end * ends, dtype).tofile(file)
                done += size
            left = timedelta(seconds=round((time.perf_counter() - begin) * (total / done - 1)))
            say(f"tokenized {done:,} of {total:,} bytes  {left} left")
    unfinished.replace(path)
