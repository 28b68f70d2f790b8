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

from microscale import check_name
from model import ModelConfig

NORMS = {"LlamaForCausalLM": "rms", "MistralForCausalLM": "rms", "OlmoForCausalLM": "layer"}
FIELDS = {"d": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
          "kv_heads": "num_key_value_heads", "ffn": "intermediate_size", "seq": "max_position_embeddings",
          "vocab": "vocab_size", "tied": "tie_word_embeddings", "rope_theta": "rope_theta",
          "norm_eps": "rms_norm_eps"}
COMPUTED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "clip_qkv": None,
            "type": "default", "rope_type": "default", "partial_rotary_factor": 1}   # all else is refused


# ---------------------------------------------------------------------------------------------------
# The model

def config_of(folder):
    """Return the ModelConfig of `folder`/config.json. ValueError names what model.py does not compute."""
    c = json.loads((folder / "config.json").read_text("utf-8"))
    c = {**c, **(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}   # transformers 4, and 5
    architecture = (c.get("architectures") or ["none"])[0]
    check_name(f"{folder}/config.json: architecture", architecture, NORMS)
    ours = {name: c[theirs] for name, theirs in FIELDS.items() if c.get(theirs) is not None}
    for name in ("d", "layers", "heads", "ffn", "vocab", "seq"):
        if type(ours.get(name)) is not int:
            raise ValueError(f"{folder}/config.json: {FIELDS[name]} = {ours.get(name)}: give a whole number")
    config = ModelConfig(**ours, norm=NORMS[architecture])
    for name, value in {**COMPUTED, "head_dim": config.head_dim}.items():
        if c.get(name) not in (value, None):
            raise ValueError(f"{folder}/config.json: {name} = {c[name]}, and model.py only computes {value}: "
                             f"take another model")
    return replace(config, seq=min(config.seq, c.get("sliding_window") or config.seq))


def config_for(config):
    """Return what config.json says of a ModelConfig. ValueError for experts, which these models lack."""
    if config.experts:
        raise ValueError(f"{config.experts} experts: LLaMA and OLMo, which can be written, have none")
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
    weights, index, files = weights_by_name(model), folder / "model.safetensors.index.json", {}
    if index.exists():
        files = json.loads(index.read_text("utf-8"))["weight_map"]
    for file in sorted(set(files.values())) or ["model.safetensors"]:
        try:
            with safe_open(folder / file, "pt") as tensors:
                for name in tensors.keys():
                    if name.endswith("rotary_emb.inv_freq") or model.config.tied and name == "lm_head.weight":
                        continue   # a table that old files hold; the embedding once more
                    tensor, weight = tensors.get_tensor(name), weights.pop(name, torch.empty(0))
                    if tensor.shape != weight.shape or not tensor.is_floating_point():
                        raise ValueError(f"{folder / file}: {name} is {tensor.dtype} {[*tensor.shape]}, and "
                                         f"{[*weight.shape] if len(weight) else 'unknown'} in model.py")
                    weight.copy_(tensor)
        except SafetensorError as e:
            raise ValueError(f"{folder / file} is damaged ({e}): copy it again") from None
    if weights:
        raise ValueError(f"{folder} lacks {len(weights)} weights, first {next(iter(weights))}")


@torch.no_grad()
def save_folder(model, folder, init=None, tokenizer=None, part="5GB"):
    """Write `folder`: the weights in BF16, in files of at most `part`, config.json, and the tokenizer. What
    `init`, the folder that the model began with, says besides, stays. OSError if `folder` is not empty."""
    from huggingface_hub import save_torch_state_dict
    weights = {name: weight.to("cpu", torch.bfloat16) for name, weight in weights_by_name(model).items()}
    config, unfinished = config_for(model.config), folder.with_name(folder.name + ".tmp")
    if folder.exists():
        folder.rmdir()
    unfinished.mkdir(parents=True)   # if it is there, an export was killed, or is at work
    for path in init.glob("*.json") if init else ():
        if not path.name.endswith("index.json"):
            shutil.copy(path, unfinished)
    if (unfinished / "config.json").exists():   # it may allow longer sequences than it was trained on here
        known = json.loads((unfinished / "config.json").read_text("utf-8"))
        config = {**config, **known, "torch_dtype": "bfloat16", "dtype": "bfloat16"}
    (unfinished / "config.json").write_text(json.dumps(config, indent=1))
    if tokenizer:
        shutil.copy(tokenizer, unfinished / "tokenizer.json")
    save_torch_state_dict(weights, unfinished, max_shard_size=part)
    unfinished.rename(folder)


# ---------------------------------------------------------------------------------------------------
# Text

def open_tokenizer(path):
    """Return the tokenizer of a tokenizer.json. ValueError if that is none."""
    from tokenizers import Tokenizer
    try:
        return Tokenizer.from_file(str(path))
    except Exception as e:   # the package raises no other
        raise ValueError(f"{path} is no tokenizer.json ({e}): give one of Hugging Face's") from None


def token_cache(files, tokenizer, folder):
    """Return where the tokens of text are or will be: a name that a checksum gives to the tokenizer and the
    names, sizes and times of `files`, of (path, offset, bytes)."""
    stats = [(str(path), offset, count, os.stat(path).st_size, os.stat(path).st_mtime_ns)
             for path, offset, count in files]
    about = json.dumps([stats, tokenizer.to_str()]).encode()
    return Path(folder) / f"{hashlib.sha256(about).hexdigest()[:20]}.bin"


def pieces(files):
    """Yield (about a million bytes of text, up to the end of a line; their number; whether its file ends)."""
    for path, offset, count in files:
        with open(path, "rb") as file:
            file.seek(offset)
            while count and (piece := file.read(min(count, 1 << 20))):
                piece += file.readline(count - len(piece))
                count -= len(piece)
                yield piece.decode("utf-8", "replace"), len(piece), not count


def write_tokens(path, files, tokenizer, dtype, say):
    """Write tokens of text, encoded on all cores, to `path`; after each file that of the end of a text."""
    ends = [tokenizer.token_to_id(name) for name in ("<|endoftext|>", "<|end_of_text|>", "</s>")]
    end = [i for i in ends if i is not None][:1]
    if not end:
        raise ValueError("the tokenizer has no token for the end of a text, such as <|endoftext|> or </s>")
    stream, done, total, begin = pieces(files), 0, sum(count for *_, count in files), time.perf_counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".tmp"), "wb") as file:
        while batch := list(itertools.islice(stream, 64)):
            encoded = tokenizer.encode_batch([piece for piece, _, _ in batch], add_special_tokens=False)
            for encoding, (_, size, ends) in zip(encoded, batch):
                np.array(encoding.ids + end * ends, dtype).tofile(file)
                done += size
            left = timedelta(seconds=round((time.perf_counter() - begin) * (total / done - 1)))
            say(f"tokenized {done:,} of {total:,} bytes  {left} left")
    path.with_suffix(".tmp").replace(path)
