"""
Train a language model in FP8.

    python train.py --fp8 moss                  # any machine, no data needed: learns Python's own source text
    python train.py --fp8 none                  # the same run in BF16 (FP32 on a CPU), to compare with
    python train.py --model 1b --data tokens/   # a preset of model.py on your own data
    python train.py --resume                    # go on from the newest checkpoint in out/, with its options
    python train.py --init Llama-2-7b-hf/ --data texts/    # fine-tune a model of Hugging Face's
    python train.py --export tuned/             # write the newest checkpoint in out/ as such a model
    torchrun --nproc_per_node 8 train.py --model 1b --data tokens/ --accum 64        # eight GPUs of one node
    torchrun --nnodes 4 --nproc_per_node 8 --max-restarts 3 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
        --shutdown-timeout 600 train.py --resume --model olmo-7b --data tokens/ --shard   # on each of 4 nodes

Runs that differ in `--fp8` alone see the same data in the same order from the same initial weights. With the
same `--accum`, so do runs on any number of GPUs. Below: options; what FP8 adds; the loop; what it needs.
"""
import argparse
import gc
import glob
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import sys
import time
import zlib
from bisect import bisect
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")   # PyTorch: large pages, for the copies of a checkpoint

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from autoscale import MUON, FP8AdamW, WeightScales, check_optimizer, muon_step_bound
from fp8_formats import E4M3, picture
from gemm_kernel import matmul, times
from microscale import ALL, HAS_TRITON, RECIPES, kernels_run_on, quantize, transposed
from model import (PRESETS, RECOMPUTE, ModelConfig, Transformer, calibrate, config_for, config_of,
                   flops_per_token, idle_weights, load_weights, save_folder, spread_experts, watch)


class UserError(Exception):
    """A mistake of the user: the message names the value, the reason and the fix. Exit code 2."""


class RunError(Exception):
    """The run went wrong and cannot go on. Exit code 1."""


def need(condition, message, error=UserError):
    if not condition:
        raise error(message)


@contextmanager
def blaming(option):
    """Turn what goes wrong with files, shapes and settings that the user gave into a UserError."""
    try:
        yield
    except (OSError, ValueError, ImportError) as e:
        install = f": pip install {e.name}" if isinstance(e, ImportError) else ""
        raise UserError(f"{option}: {str(e).partition(chr(10))[0]}{install}") from None


# ------------------------------------------------------------------------------------------------------------
# Options

def opt(default, help, least=None, most=2**31):
    return field(default=default, metadata={"help": help, "limits": (least, most)})


@dataclass
class Config:
    # what to train; a default of None depends on the preset (DEFAULTS) or the machine (`resolve`)
    fp8: str = opt(None, f"recipe of the linear layers: {', '.join(RECIPES)} (default: moss)")
    model: str = opt(None, f"preset: {', '.join(PRESETS)} (default: 124m on a GPU, nano on a CPU)")
    init: str = opt(None, "folder of Hugging Face's transformers: the model and its weights to begin with")
    layers: int = opt(None, "blocks of the model (default: the preset's)", 1, 1000)
    data: str = opt(None, "folder, file or 'pattern' of .bin, .npy or text (default: Python's own source)")
    tokenizer: str = opt(None, "tokenizer.json, for text (default: that in --init; else a byte is a token)")
    out: str = opt("out", "folder for checkpoints and log; an earlier run in it is renamed, not overwritten")
    steps: int = opt(None, "optimizer steps of the whole run (default: by preset)", 1)
    batch: int = opt(None, "sequences per micro-batch and rank (default: by preset)", 1)
    accum: int = opt(None, "micro-batches per step, over all ranks together (default: by preset)", 1)
    seq: int = opt(None, "tokens per sequence (default: the preset's)", 1, 2**24)
    # optimizer
    optimizer: str = opt("adamw", "adamw, or muon for the blocks' matrices and AdamW for all else")
    lr: float = opt(None, "peak learning rate; a cosine takes it to a tenth (default: by preset)", 1e-30, 10)
    warmup: int = opt(None, "steps of linear warm-up (default: a tenth of the steps, at most 2000)", 0)
    beta1: float = opt(0.9, "decay of the gradient's mean", 0, 1 - 1e-9)
    beta2: float = opt(0.95, "decay of the gradient's square", 0, 1 - 1e-9)
    weight_decay: float = opt(0.1, "decoupled weight decay, not on norms", 0, 10)
    clip: float = opt(1.0, "largest norm of the gradient; a larger one is scaled down to it", 1e-30, 1e30)
    rescale_interval: int = opt(500, "steps between measurements of predicted weight scales; 0 = never", 0)
    spike: float = opt(100, "skip a step whose gradient norm is so many times the median; 0 = never", 0, 1e30)
    max_skips: int = opt(5, "stop after so many skipped steps in a row: spikes, or a loss not finite", 1)
    # watching and saving
    log_every: int = opt(10, "steps between lines on the terminal and in log.jsonl", 1)
    eval_every: int = opt(None, "steps between evaluations and checkpoints (default: a fifth, up to 250)", 1)
    eval_batches: int = opt(16, "micro-batches per evaluation, over all ranks together", 1, 2**20)
    keep: int = opt(2, "checkpoints to keep, the newest ones", 1)
    tensorboard: str = opt(None, "folder to write the log to as well, for tensorboard")
    # time, memory, place
    recompute: str = opt("none", "what the backward pass computes again: none, or block (all but its input)")
    eager: bool = opt(False, "GPU: launch kernels one by one, not a micro-batch at once as a CUDA graph")
    shard: bool = opt(False, "each rank keeps moments and FP32 weights of its share; for recipes like moss")
    expert_parallel: int = opt(1, "ranks that share the experts of a layer: 1, or all ranks", 1)
    seed: int = opt(1337, "of the initial weights and of the order of the data", 0, 2**63 - 1)
    device: str = opt(None, "cpu, cuda or cuda:N (default: cuda if there is one)")
    # one of these, instead of beginning a run
    resume: bool = opt(False, "go on from the newest checkpoint in --out, with its options, or begin")
    eval_only: bool = opt(False, "loss of the newest checkpoint in --out, for each recipe in --fp8 a,b,c")
    calibrate: int = opt(0, "with --eval_only: diffuse errors of weights (GPFQ) on so many tokens", 0)
    sample: str = opt(None, "text (or token ids) for the newest checkpoint in --out to go on with")
    export: str = opt(None, "folder: write the newest checkpoint in --out, or --init, for transformers")
    plot: str = opt(None, "FILE.png: draw the losses of the runs in --out (a,b,c); needs matplotlib")
    bench: bool = opt(False, "time the recipes in --fp8 (a,b,c; default: all) on random tokens")
    given = ()   # no option: the names of those that the command line gave


MODES = ("resume", "eval_only", "sample", "export", "plot", "bench")
DEFAULTS = {   # batch and learning rate as models of these sizes are usually trained; three are quick
    "nano": dict(batch=32, accum=1, steps=150, lr=4e-3),
    "nano-moe": dict(batch=32, accum=1, steps=150, lr=4e-3),
    "124m": dict(batch=64, accum=1, steps=600, lr=1e-3),
    "moe-1b": dict(batch=16, accum=16, steps=25_000, lr=4e-4),
    "olmoe-1b-7b": dict(batch=4, accum=256, steps=100_000, lr=4e-4),
    "1b": dict(batch=16, accum=64, steps=100_000, lr=4e-4),
    "olmo-7b": dict(batch=1, accum=2048, steps=100_000, lr=3e-4),
    "llama2-7b": dict(batch=1, accum=1024, steps=100_000, lr=3e-4)}
FINE_TUNING = dict(batch=4, accum=8, steps=1000, lr=2e-5)   # of --init


def parse_config(argv=None):
    """Return the Config of a command line."""
    parser = argparse.ArgumentParser(description=__doc__, argument_default=argparse.SUPPRESS,
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_mutually_exclusive_group()
    for f in fields(Config):
        text = f.metadata["help"] + (f" (default: {f.default})" if f.default not in (None, False) else "")
        switch = "store_true" if f.name in MODES else argparse.BooleanOptionalAction   # --no-shard as well
        kind = {"action": switch} if f.type is bool else {"type": f.type, "metavar": f.name.upper()}
        names = dict.fromkeys((f"--{f.name}", f"--{f.name.replace('_', '-')}"))   # --max_skips or --max-skips
        (modes if f.name in MODES else parser).add_argument(*names, help=text.replace("%", "%%"), **kind)
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        need(value != "", f"--{name} is empty: give it a value, or leave it out")
        if name in ("data", "init", "tokenizer"):   # for --resume elsewhere
            given[name] = os.path.abspath(value)
    config = Config(**given)
    config.given = given
    return config


def resolve(c, device, world, saved=None):
    """Fill in the defaults that depend on preset and machine. UserError for what cannot work."""
    c.model = c.model or (None if c.init else "124m" if device.type == "cuda" else "nano")
    c.fp8 = c.fp8 or (",".join(RECIPES) if c.bench else "moss")
    recipes = c.fp8.split(",") if c.bench or c.eval_only else [c.fp8]
    names = [("fp8", fp8, RECIPES) for fp8 in recipes]
    names += [("optimizer", c.optimizer, ("adamw", "muon"))]
    names += [("model", c.model, PRESETS)] * (c.model is not None) + [("recompute", c.recompute, RECOMPUTE)]
    for option, value, known in names:
        need(value in known, f"--{option} {value} is unknown: choose one of {', '.join(known)}")
    shape, beside = shape_of(c, saved), os.path.join(c.init or "", "tokenizer.json")
    c.tokenizer = c.tokenizer or (beside if c.init and os.path.exists(beside) else None)
    seq = min(shape.seq, 2048) if c.init else shape.seq
    defaults = DEFAULTS.get(c.model, FINE_TUNING) | {"layers": shape.layers, "seq": seq}
    for name, value in (defaults | {"steps": 10, "accum": 1} if c.bench else defaults).items():
        if getattr(c, name) is None:
            setattr(c, name, max(value, world) if name == "accum" else value)
    c.warmup = min(c.steps // 10, 2000) if c.warmup is None else c.warmup
    c.eval_every = min(max(c.steps // 5, 1), 250) if c.eval_every is None else c.eval_every
    for f in fields(c):
        value, (low, high) = getattr(c, f.name), f.metadata["limits"]
        need(low is None or low <= value <= high, f"--{f.name} {value} must lie between {low} and {high}")
    need(c.batch * max(c.seq, 64 * c.eval_batches) < 2**31,   # tokens; places of windows take 8 bytes each
         f"--batch {c.batch}: too much with --seq {c.seq}, --eval_batches {c.eval_batches}: lower it")
    need(not c.init or saved or (c.layers, max(c.seq, shape.seq)) == (shape.layers, shape.seq),
         f"--layers {c.layers}, --seq {c.seq}: {c.init} has {shape.layers}, and at most {shape.seq} tokens")
    need(c.fp8 == "none" or c.batch * c.seq % 16 == 0, f"--batch {c.batch} x --seq {c.seq}: FP8 sums over a "
         f"multiple of 16, not over {c.batch * c.seq} tokens: change --batch or --seq")
    n = c.expert_parallel
    need(n == 1 or n == world and shape.experts and shape.experts % n == c.eval_batches % n == 0,
         f"--expert_parallel {n}: there are {world} ranks, {shape.experts} experts and --eval_batches "
         f"{c.eval_batches}: give 1, or the number of ranks if it divides both others")
    need(c.accum % world == 0,
         f"--accum {c.accum} does not divide by {world} ranks: use --accum {-(-c.accum // world) * world}")
    need(not c.calibrate or c.eval_only, f"--calibrate {c.calibrate} is for --eval_only: leave it out")
    need(not c.shard or all(fp8 != "none" and RECIPES[fp8].weight_scale == "predicted" for fp8 in recipes),
         f"--shard is for recipes that predict weight scales, like --fp8 moss, not {c.fp8}: give --no-shard")
    return c


def shape_of(c, saved=None):
    """Return the ModelConfig of the preset --model; of --init that of the folder, or of its checkpoint."""
    if not c.init:
        return PRESETS[c.model]
    if saved:
        return ModelConfig(**saved["model_config"])
    with blaming(f"--init {c.init}"):
        found = config_of(Path(c.init))
        theirs = config_for(found)
    with blaming(f"--model {c.model}, leave it out"):
        for name, value in config_for(PRESETS[c.model]).items() if c.model else ():
            need(name == "max_position_embeddings" or theirs[name] == value,
                 f"--model {c.model} has {name} {value}, {c.init} {theirs[name]}: leave --model out")
    return found


# ------------------------------------------------------------------------------------------------------------
# What FP8 adds to training: weight scales, and FP8 copies of the weights, made once per optimizer step

def make_optimizer(model, c, mine=lambda p: True):
    """Return AdamW with three groups under every recipe: quantized weights, other matrices, norms (no decay).
    Recipes that predict weight scales use FP8AdamW, which writes the FP8 copies as well. --optimizer muon is
    Muon for the blocks' matrices, with steps as large as AdamW's; its `others`, an AdamW, step the rest."""
    muon, linears = c.optimizer == "muon", model.linears()
    layers = {layer.weight: layer for layer in linears if (layer.recipe or muon) and mine(layer.weight)}
    trained = [p for p in model.parameters() if p.requires_grad and mine(p)]
    others = [p for p in trained if p not in layers]
    groups = [dict(params=[p for p in trained if p in layers], weight_decay=c.weight_decay),
              dict(params=[p for p in others if p.dim() >= 2], weight_decay=c.weight_decay),
              dict(params=[p for p in others if p.dim() < 2], weight_decay=0.0)]
    options = dict(lr=c.lr, betas=(c.beta1, c.beta2), fused=model.embed.weight.is_cuda)
    if muon:
        need(MUON and not model.config.experts, "--optimizer muon needs PyTorch 2.9 or newer and no experts, "
                                                "which are many matrices in one weight: use adamw")
        optimizer = MUON(groups[:1], lr=c.lr, adjust_lr_fn="match_rms_adamw")
        optimizer.others = torch.optim.AdamW(groups[1:], **options)
        optimizer.others.state = optimizer.state   # one for the checkpoint
        optimizer.register_step_post_hook(lambda *_: optimizer.others.step())
        return optimizer
    if model.recipe is None or model.recipe.weight_scale != "predicted":
        return torch.optim.AdamW(groups, **options)
    return FP8AdamW(groups, layers.values(), **options)   # frozen ones, too: predictions move their scales


def make_scales(model, optimizer, c):
    """Return the WeightScales of all layers (autoscale.py), None if the recipe does not scale per tensor."""
    mode = model.recipe.weight_scale if model.recipe else "block"
    if mode == "predicted":
        with blaming(f"--fp8 {c.fp8} cannot predict weight scales, use --fp8 tensor"):
            check_optimizer(optimizer)
    weights, parts = zip(*((layer.weight, layer.experts or 1) for layer in model.linears()))
    return WeightScales(weights, mode, c.rescale_interval, parts) if mode != "block" else None


def requantize(run):
    """Make the FP8 copies of all weights anew, or of those that this rank owns."""
    for layer in run.model.linears():
        if run.mine(layer.weight):
            before = layer.copies
            layer.requantize(run.scale_of.get(layer.weight))
            keep_place(run, layer, before)


def keep_place(run, layer, before):
    """Move new copies of a weight to where those before were: that is where a CUDA graph reads them."""
    if run.captures and before:
        for place, new in zip(before, layer.copies):
            place.data.copy_(new.data)
            place.scale.copy_(new.scale)
        layer.set_copies(before)


def clip(run, norm):
    """Scale gradients of this total norm down to --clip. FP8AdamW multiplies as it reads them."""
    if isinstance(run.optimizer, FP8AdamW):
        run.optimizer.factor = (run.c.clip / (norm + 1e-6)).clamp(max=1)   # as PyTorch does
    else:
        clip_grads_with_norm_(run.trained, run.c.clip, norm)


def update_weights(run, lr, update):
    """Take optimizer step number `update`, from 1, and make the FP8 copies of the new weights. If scales are
    predicted before the step, FP8AdamW writes the copies with the weights. Else `requantize` makes them."""
    c, scales = run.c, run.scales
    measured = scales is None or scales.measures(update)
    if not measured:
        scales.update(lr, (c.beta1, c.beta2), c.weight_decay, update, run.muon_bound)
    run.optimizer.step()
    if scales and measured:
        scales.rescale()
    if measured or not getattr(run.optimizer, "layers", None):   # else FP8AdamW has written the copies
        requantize(run)
    if run.sharded:
        send_weights(run)


# ------------------------------------------------------------------------------------------------------------
# The loop

def learning_rate(step, c):
    """Return that of optimizer step `step`, from 0: linear warm-up, then a cosine to a tenth of the peak."""
    if step < c.warmup:
        return c.lr * (step + 1) / (c.warmup + 1)
    progress = (step - c.warmup) / max(c.steps - c.warmup, 1)
    return c.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(progress, 1))))


def forward_backward(run, step):
    """Compute the gradients of one optimizer step, averaged over micro-batches and ranks. Return this rank's
    share of the mean loss, its tokens for each expert (layers, experts), and its last (tokens, targets)."""
    c, ranks, loss_sum = run.c, run.ranks, torch.zeros((), device=run.ranks.device)
    loads = torch.zeros(c.layers, run.model.config.experts, device=ranks.device)
    mine, steady = range(ranks.rank, c.accum, ranks.world), run.captures and keeps_places(run)
    for micro in mine:
        tokens, targets = run.batches.step(step, micro, ranks.device)
        sends = ranks.world > 1 and micro == mine[-1]
        run.ddp.require_backward_grad_sync = sends   # what DDP.no_sync sets
        for layer in (*run.model.linears(), run.model.head):   # DDP sends only what autograd adds to .grad
            layer.accumulates = not sends or layer.weight in run.experts
        compute = replay if steady and run.captures and not sends else micro_batch   # no graph sends
        with run.graph.memory() if run.graph and sends else nullcontext():   # for what forward keeps
            loss = compute(run, tokens, targets, len(mine))
        loss_sum += loss / c.accum
        if loads.numel():
            loads += run.model.loads
        if ranks.device.type == "cuda":   # it is still busy: read this rank's next micro-batch ahead
            run.batches.step(*divmod(step * c.accum + micro + ranks.world, c.accum), ranks.device)
    if run.experts:   # they have seen the tokens of all ranks, whose losses DDP averages
        torch._foreach_div_([p.grad for p in run.experts if p.grad is not None], ranks.world)
    return loss_sum, loads, (tokens, targets)


def micro_batch(run, tokens, targets, count):
    """Add the gradients of one of `count` micro-batches to .grad. Return its loss."""
    loss = run.ddp(tokens, targets)
    (loss / count).backward()   # DDP averages over the ranks
    return loss.detach()


def can_capture(run):
    """Return whether micro-batches become CUDA graphs (of several ranks all but the last of a step): on GPUs,
    if they do not wait for the host. (Experts on several ranks, or layer by layer under a recipe, do.)"""
    waits = any(block.router and block.qkv.recipe and not block.fused for block in run.model.blocks)
    some = run.ranks.world == 1 or run.c.accum > run.ranks.world
    return run.ranks.device.type == "cuda" and some and not (run.c.eager or run.experts or waits)


def keeps_places(run):
    """Return whether the gradients and the FP8 copies are where they were a step before, as a graph needs. By
    then all that it launches has been compiled, too. Else forget the graph, and its memory."""
    if run.places is None:   # in the first step; DDP moves gradients once, as its second step begins
        run.places = []
        return False
    used = [p.grad for p in run.trained]
    used += [x for layer in run.model.linears() for q in layer.copies or () for x in (q.data, q.scale)]
    before, run.places = run.places, [None if x is None else x.data_ptr() for x in used]
    steady = None not in run.places and run.places == before
    run.graph = run.graph if steady else None
    return steady


def replay(run, tokens, targets, count):
    """Compute `micro_batch` by a CUDA graph, which the host launches at once, and not kernel by kernel."""
    try:
        run.graph = run.graph or capture(run, tokens.clone(), targets.clone(), count)
    except RuntimeError as e:   # torch.OutOfMemoryError or CUDA's own; it holds that memory, until here
        if "out of memory" not in str(e):
            raise
        run.captures = False
    if not run.graph:
        replace(run.ranks, rank=0).say(   # whichever it is
            f"note: rank {run.ranks.rank} has no memory for a CUDA graph: it goes on as with --eager")
        return micro_batch(run, tokens, targets, count)
    run.graph.tokens.copy_(tokens)
    run.graph.targets.copy_(targets)
    run.graph.replay()
    run.model.loads = run.graph.loads
    return run.graph.loss


def capture(run, tokens, targets, count):
    """Return the graph: `replay` computes `micro_batch` of what is in tokens and targets then."""
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.MemPool()
    with torch.cuda.graph(graph, pool.id, torch.cuda.current_stream(), capture_error_mode="thread_local"):
        loss = micro_batch(run, tokens, targets, count)
    loads = getattr(run.model, "loads", None)
    return SimpleNamespace(tokens=tokens, targets=targets, loss=loss, loads=loads, replay=graph.replay,
                           memory=partial(torch.cuda.use_mem_pool, pool))


def evaluate(run, gradient=False):
    """Return the mean validation loss of all ranks, in nats per token. `gradient` adds up the gradients."""
    total, count = torch.zeros((), device=run.ranks.device), run.c.eval_batches
    with torch.set_grad_enabled(gradient):
        for i in range(run.ranks.rank, count, run.ranks.world):
            loss = run.model(*run.val_batches.evaluation(i, run.ranks.device))
            if gradient:
                loss.backward()
            total += loss.detach()
    return all_reduce(total).item() / count


def train(c):
    """Make the whole run. Return its summary; None if nothing was left to do, or if a signal ended it."""
    ranks, saved = start(c)
    if saved and saved["step"] >= c.steps:
        return ranks.say(f"{c.out} is at step {saved['step']} of {c.steps}: the run is done; raise --steps")
    run = build(c, ranks, saved)
    if ranks.world > 1:
        run.ddp = data_parallel(run.model, ranks.device, run.experts)
    ranks.say("config  " + "  ".join(f"{k}={v}" for k, v in asdict(c).items()))
    size = sum(p.numel() * (ranks.world if p in run.experts else 1) for p in run.model.parameters())
    ranks.say(f"model   {c.model or c.init}: {size:,} parameters, "
              f"vocabulary {run.model.config.vocab}; {len(run.batches.tokens):,} training and "
              f"{len(run.val_batches.tokens):,} validation tokens of {c.data or 'Python source code'}")
    ranks.say(f"fp8     {c.fp8}: {numerics(c.fp8, ranks.device)}")
    if run.experts:
        ranks.say(exchanged(run))
    if saved:
        ranks.say(f"resumed {saved['path']}, which {len(saved['files'])} ranks wrote, on {ranks.world}")
        if saved["tokens"] != len(run.batches.tokens):
            ranks.say(f"note: --data had {saved['tokens']} training tokens: windows come in another order")
    stop.in_loop = True   # from here on a signal lets the loop save
    ranks.say(f"step {run.progress.step}/{c.steps}  validation loss {evaluate(run):.4f}")
    with run_folder(c, ranks, run.progress.step) as log, ThreadPoolExecutor(1) as writer:   # from here on
        return loop(run, log, Saver(run, writer))


def gradient_norm(run):
    """Return the norm of the gradients of all parameters, those of experts on other ranks as well."""
    norm, of_experts = (get_total_norm([p.grad for p in run.trained if p.grad is not None and
                                        (p in run.experts) == spread]) for spread in (False, True))
    return (norm.square() + all_reduce(of_experts.square())).sqrt() if run.experts else norm


def loop(run, log, saver):
    """Train from run.progress.step to the last step. Return the summary, None if a signal ended the loop."""
    c, ranks, model, progress = run.c, run.ranks, run.model, run.progress
    tokens_per_step, first_step, in_a_row, stopping = c.accum * c.batch * c.seq, progress.step, 0, False
    started, last_step, last_time = time.perf_counter(), first_step, time.perf_counter()
    while progress.step < c.steps and not stopping:
        step, lr = progress.step, learning_rate(progress.step, c)
        for optimizer in (run.optimizer, getattr(run.optimizer, "others", run.optimizer)):
            for group in optimizer.param_groups:
                group["lr"] = lr
        logging = (step + 1) % c.log_every == 0 or step + 1 == c.steps
        loss, loads, last_batch = forward_backward(run, step)
        health = scale_health(run, *last_batch) if logging else {}
        norm = gradient_norm(run)
        # All learn the mean loss, and whether a rank was told to stop: the one wait for the GPU in a step.
        shared = all_reduce(torch.cat((loss.view(1), loss.new_tensor([stop.received]), loads.flatten())))
        loss, stopping, norm_value = torch.cat((shared[:2], norm.view(1))).tolist()
        loads = shared[2:].view_as(loads)

        watched = c.spike and len(progress.norms) >= 20
        largest = c.spike * statistics.median(progress.norms) if watched else sys.float_info.max
        if math.isfinite(loss) and norm_value <= largest:   # false for NaN
            in_a_row, progress.norms = 0, [*progress.norms[-99:], norm_value]
            clip(run, norm)
            update_weights(run, lr, step + 1 - progress.skipped)
            model.balance(loads)
        else:
            progress.skipped, in_a_row = progress.skipped + 1, in_a_row + 1
            ranks.say(f"step {step + 1}: loss {loss}, gradient norm {norm_value}: skipped, the weights stay")
            if in_a_row >= c.max_skips:
                saver.finish()
                first = (f"a gradient of over --spike {c.spike} times the median"
                         if math.isfinite(loss + norm_value) else first_non_finite(run, step))
                raise RunError(f"{in_a_row} steps in a row had to be skipped, first {first}: lower --lr or "
                               f"look at the data; {last_good(c.out)}")
        # DDP: the gradients stay in its buckets, one copy. A graph: they stay where it adds to them.
        model.zero_grad(set_to_none=run.ddp is model and not run.captures)
        progress.step = step = step + 1
        now = time.perf_counter()

        evaluating = step % c.eval_every == 0 or step == c.steps
        if evaluating:
            health["val_loss"] = evaluate(run)
            check_same([scale.tolist() for w, scale in run.scale_of.items() if w not in run.experts],
                       "weight scales: do all run the same code?")
        # While steps are skipped none is written. At the end one is: a finite loss says the weights are good.
        ending = (stopping or step == c.steps) and math.isfinite(loss)
        if ending or evaluating and not in_a_row:
            saver.save()
        if logging and loads.numel():   # 1 if all experts of a layer got as many tokens
            health["load"] = (loads.amax(1) / loads.mean(1)).max().item()
        if logging or evaluating or stopping:
            speed = (step - last_step) * tokens_per_step / (now - last_time)   # of training alone
            record = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm_value,
                      "skipped": progress.skipped, "tokens_per_s": round(speed, 1), **health,
                      **mfu(model, speed / ranks.world, ranks.device)}
            log(record)
            ranks.say(progress_line(record, c, (c.steps - step) * tokens_per_step / speed))
            last_step, last_time = step, time.perf_counter()
    seconds = time.perf_counter() - started
    saved = saver.finish()
    need(saved, f"the last checkpoint is missing: make room in {c.out}, then go on with --resume", RunError)
    if progress.step < c.steps:
        return ranks.say(f"stopped by a signal; {last_good(c.out)}; go on with --resume --out {c.out}")
    summary = {"recipe": c.fp8, "numerics": numerics(c.fp8, ranks.device), "steps": step,
               "tokens": step * tokens_per_step, "train_loss": round(loss, 4),
               "val_loss": round(record["val_loss"], 4), "skipped_steps": progress.skipped,
               **bits_per_byte(run, record["val_loss"]), "time": str(timedelta(seconds=round(seconds))),
               "tokens_per_s": round((step - first_step) * tokens_per_step / seconds)}
    if ranks.device.type == "cuda":
        summary["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    ranks.say("\n--- sample ---")   # which takes a while
    text = "" if ranks.rank and not run.experts else sample(run)   # experts of all ranks are needed
    ranks.say(f"{text}\n--- summary ---")
    for key, value in summary.items():
        ranks.say(f"{key:16} {value:{',' if isinstance(value, int) else ''}}")
    return summary


# ------------------------------------------------------------------------------------------------------------
# Before the loop: from options, or from a checkpoint, to what it needs

def start(c):
    """Return Ranks, and the manifest of the checkpoint that --resume reads, or, if --init is not given, one
    of --eval_only, --sample and --export. Options that the command line does not give come from its run."""
    ranks, reporting = start_ranks(c.device), c.eval_only or c.sample or c.export
    saved = newest_checkpoint(c.out, ranks) if c.resume or reporting and not c.init else None
    need(saved or c.init or not reporting, f"there is no checkpoint in {c.out}: check --out, or train first")
    if c.resume and not saved:
        ranks.say(f"note: there is no checkpoint in {c.out} yet: the run begins")
    for name, was in saved["config"].items() if saved else ():
        if name in (*MODES, "out", "device") or not hasattr(c, name):   # an option may have left since
            continue
        if name not in c.given:
            setattr(c, name, was)
        elif getattr(c, name) != was:
            need(name not in ("beta1", "beta2", "optimizer"),
                 f"--{name} was {was}, as the moments in the checkpoint are: leave it out")
            ranks.say(f"note: --{name} was {was} and is now {getattr(c, name)}")
    inputs = () if reporting or c.bench else (".", c.data or ".", c.init or ".", c.tokenizer or ".")
    for inside in map(os.path.realpath, inputs):
        need(not os.path.isdir(c.out) or not Path(inside).is_relative_to(os.path.realpath(c.out)),
             f"--out {c.out} holds {inside}, and the next run renames it: give a folder of its own")
    if reporting:   # then every rank has all weights
        c.shard, c.eager, c.expert_parallel = False, True, 1
    resolve(c, ranks.device, 1 if reporting else ranks.world, saved)
    if ranks.device.type == "cuda" and not c.eager:
        torch.cuda.set_stream(torch.cuda.Stream())   # PyTorch does not record its default stream
    return ranks, saved


def make_model(c, device, vocab, saved=None):
    """Return the Transformer. On a GPU BF16 is compiled whole; model.py compiles parts of FP8."""
    with blaming(f"--model {c.model or c.init}"), torch.device(device):
        config = replace(shape_of(c, saved), layers=c.layers, seq=c.seq, vocab=vocab)
        model = Transformer(config, c.fp8, c.recompute)
    if device.type == "cuda" and c.fp8 == "none" and c.expert_parallel == 1:
        model.compile(dynamic=False)
    return model


def build(c, ranks, saved=None):
    """Return a run: data (not for --bench), model, optimizer and scales, as in `saved` if that is given."""
    with blaming("--data"):
        parts = () if c.bench or c.export or c.sample and c.tokenizer else open_data(c.data)
    paths = dict.fromkeys(("data", "out", "init", "tokenizer", "device"))   # may differ
    check_same([asdict(replace(c, **paths)), *map(len, parts)],
               "options or data: start all with the same command, and give every node all files of --data")
    run = SimpleNamespace(c=c, ranks=ranks, sharded=c.shard and ranks.world > 1, tokenizer=None, graph=None)
    run.tokenizer_crc = run.places = None
    vocab = saved["model_config"]["vocab"] if saved and not parts else shape_of(c, saved).vocab
    run.is_text = parts and parts[0].dtype == np.uint8
    if c.tokenizer and not c.bench and not c.export:
        with blaming("--tokenizer"):
            run.tokenizer = open_tokenizer(c.tokenizer)
        run.tokenizer_crc = zlib.crc32(run.tokenizer.to_str().encode())   # megabytes: once, not at every save
        size = max(run.tokenizer.get_vocab().values()) + 1
        need(size <= vocab or not c.init, f"--tokenizer {c.tokenizer} has {size} tokens, the model {vocab}")
        vocab = vocab if c.init else max(vocab, -(-size // 128) * 128)
        parts = [encode(part, run) for part in parts] if run.is_text else parts
    elif run.is_text:
        need(not c.init or vocab == 256, f"--data is text, and {c.init} has no tokenizer: give --tokenizer")
        vocab = 256
    run.batches, run.val_batches = [Batches(tokens, c, vocab) for tokens in parts] or (None, None)
    torch.manual_seed(c.seed)
    run.model = run.ddp = make_model(c, ranks.device, vocab, saved)
    with blaming(f"--init {c.init}"):
        if c.init and not saved:
            load_weights(run.model, Path(c.init))
    for p in run.model.parameters() if ranks.world > 1 and not saved else ():
        dist.broadcast(p.data, 0)   # from one seed, GPUs of two kinds draw two sets of numbers
    run.experts = set()   # those that only this rank has
    if c.expert_parallel > 1:
        spread_experts(run.model, dist.new_group())
        run.experts = {layer.weight for layer in run.model.linears() if layer.experts}
    run.owner = owners(run.model, ranks.world) | dict.fromkeys(run.experts, ranks.rank)
    run.mine = lambda p: not run.sharded or run.owner[p] == ranks.rank   # whether this rank steps p
    if run.sharded:
        drop_weights(run)
    run.captures = can_capture(run)
    run.trained = [p for p in run.model.parameters() if p.requires_grad]
    run.optimizer = make_optimizer(run.model, c, run.mine)
    run.scales, run.muon_bound = make_scales(run.model, run.optimizer, c), None
    run.scale_of = dict(zip(run.scales.weights, run.scales.views)) if run.scales else {}   # by weight
    if run.scales and c.optimizer == "muon":   # the same at every step
        group, weights = run.optimizer.param_groups[0], run.scales.weights
        run.muon_bound = run.scales.scale.new_tensor([muon_step_bound(group, w.shape) for w in weights])
    # Nothing random is drawn in training: a checkpoint holds this, weights, moments and scales, and no more.
    run.progress = SimpleNamespace(step=0, skipped=0, norms=[])   # norms of the last 100 gradients in use
    if saved:
        restore(run, saved)
    requantize(run)
    if run.sharded:
        send_weights(run)
    return run


# ------------------------------------------------------------------------------------------------------------
# What is watched

def scale_health(run, tokens, targets):
    """Return, for the log, the largest and the least headroom, and what quantizing changes (`watch`)."""
    health = {}
    if run.scales is not None:
        headroom = run.scales.headroom().cpu().split(run.scales.parts)
        own = [x for x, weight in zip(headroom, run.scales.weights) if run.mine(weight)]
        ratios = torch.cat(sum(gather(own), [])).tolist()   # below 1 weights saturate
        health.update(scale_ratio=max(ratios), scale_ratio_min=min(ratios))
    if run.c.fp8 != "none":
        with run.graph.memory() if run.graph else nullcontext():   # it is free between micro-batches
            records = watch(run.model, tokens, targets)
        for key in dict.fromkeys(key for record in records for key in record):
            health[key] = torch.stack([record[key] for record in records if key in record]).mean().item()
    return health


@torch.no_grad()
def first_non_finite(run, step):
    """Return what is not finite: the first such output of a layer, else the first gradient from the end."""
    def look(name, x):
        if x is not None and not all(y.isfinite().all() for y in (x if isinstance(x, tuple) else (x,))):
            bad.append(name)
    bad = []
    # Blocks with hooks run layer by layer. A module ends before the one that holds it.
    for name, module in list(run.model.named_modules())[1:]:
        module.register_forward_hook(lambda _, __, y, name=f"the output of {name}": look(name, y))
    with torch.compiler.set_stance("force_eager"):   # a compiled model would not call the hooks
        run.model(*run.batches.step(step, run.ranks.rank, run.ranks.device))
    for name, p in reversed(list(run.model.named_parameters())):
        look(f"the gradient of {name}", p.grad)
    return bad[0] if bad else "the loss or the norm of the gradient"


def progress_line(record, c, seconds_left):
    line = (f"step {record['step']}/{c.steps}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
            f"grad {record['grad_norm']:.2f}  {record['tokens_per_s']:,.0f} tok/s")
    for name in ("mfu", "saturated", "folded"):   # shares; of X, of dY, and folded across tokens for wgrad
        shares = [f"{value:.2%}" for key, value in record.items() if key.startswith(name)]
        line += f"  {name} {', '.join(shares)}" if shares else ""
    for name, key in (("scale x", "scale_ratio"), ("load x", "load"), ("validation loss ", "val_loss")):
        line += f"  {name}{record[key]:.4f}" if key in record else ""
    return f"{line}  {timedelta(seconds=round(seconds_left))} left"


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def numerics(fp8, device):
    """Return in one line what computes the linear layers here, in training and evaluation alike."""
    plain = "BF16" if device.type == "cuda" else "FP32"
    eight = "FP8 kernels" if kernels_run_on(device) else "FP8 emulated"
    return f"{plain if fp8 == 'none' else eight} on {device_name(device)}"


# Dense BF16 peak in TFLOP/s, from data sheets, by a part of the device's name. The first match counts.
BF16_PEAK = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312}


def mfu(model, tokens_per_s, device):
    """Return {"mfu": the share of the BF16 peak that a rank reaches}, {} where the peak is not known."""
    peak = next((1e12 * peak for part, peak in BF16_PEAK.items() if part in device_name(device)), None)
    return {"mfu": round(tokens_per_s * flops_per_token(model) / peak, 4)} if peak else {}


def sample(run, prompt=None):
    """Return what the model writes after `prompt`: "def ", or the first 16 tokens of the validation data."""
    vocab, device = run.model.config.vocab, run.ranks.device
    if run.tokenizer:
        text = os.fsencode(prompt or "def ").decode("utf-8", "replace")
        ids = run.tokenizer.encode(text).ids   # with the token that begins a text, if it has one
    elif run.is_text:
        ids = list(os.fsencode(prompt or "def "))
    elif not prompt:
        tokens = run.val_batches.tokens
        ids = tokens.read(0, min(16, len(tokens))).tolist()
    else:
        ids = [int(word) if re.fullmatch("[0-9]{1,9}", word) else -1 for word in prompt.split()]
    need(ids and all(0 <= i < vocab for i in ids),
         f"--sample {prompt}: this model reads token ids below {vocab}, give some of them")
    generator = torch.Generator(device).manual_seed(run.c.seed)
    written = run.model.generate(torch.tensor([ids], device=device), 200, generator=generator)[0].tolist()
    if run.tokenizer:
        return run.tokenizer.decode(written)
    return bytes(written).decode("utf-8", "replace") if run.is_text else " ".join(map(str, written))


# ------------------------------------------------------------------------------------------------------------
# Data: tokens that lie in files and stay there

class Tokens:
    """Tokens in files that follow each other, read window by window."""

    def __init__(self, files, dtype, nbytes=0):   # files: (path, offset in bytes, number of tokens)
        self.files, self.dtype = [file for file in files if file[2]], dtype
        self.starts = [0, *itertools.accumulate(count for _, _, count in self.files)]
        self.bytes = nbytes or (len(self) if dtype == np.uint8 else 0)   # of the text, if they are of text

    def __len__(self):
        return self.starts[-1]

    def read(self, start, count, vocab=math.inf):
        """Return tokens start ... start + count - 1 as int64. UserError for one outside the vocabulary."""
        pieces, stop = [], start + count
        while start < stop:
            i = bisect(self.starts, start)
            path, offset, _ = self.files[i - 1]
            offset += (start - self.starts[i - 1]) * self.dtype.itemsize
            take = min(stop, self.starts[i]) - start
            with blaming(f"--data: {path} has changed"):   # mapped each time: a map keeps what it touched
                piece = np.memmap(str(path), self.dtype, "r", offset, (take,)).astype(np.int64)
            for token in piece[(piece < 0) | (piece >= vocab)][:1]:
                raise UserError(f"token id {token} in {path} is outside the model's vocabulary of {vocab}: "
                                f"give the --model that it is for (GPT-2's: --model 124m), or other --data")
            pieces.append(piece)
            start += take
        return np.concatenate(pieces)


def token_file(path):
    """Return (path, offset, tokens, dtype) of a .npy array, an llm.c shard, nanoGPT's uint16, or text."""
    size, suffix = path.stat().st_size, path.suffix.lower()
    if suffix == ".npy":
        array, reason = attempt(np.lib.format.open_memmap, path, "r")
        need(array is not None, f"--data: {path} is no .npy file ({reason}): use numpy.save")
        need(array.ndim == 1 and array.dtype.kind in "iu" and array.itemsize > 1,   # bytes are for text
             f"--data: {path} holds {array.dtype} {array.shape}: save integers of 16 bits or more in a row")
        return path, array.offset, len(array), array.dtype
    if suffix != ".bin":
        return path, 0, size, np.dtype(np.uint8)
    header = np.fromfile(path, np.int32, 256)   # of llm.c's shards: magic, version, number of tokens
    offset = 1024 if len(header) > 2 and header[0] == 20240520 else 0
    need(size % 2 == 0 and (not offset or header[1] == 1 and size == offset + 2 * int(header[2])),
         f"--data: {path} has {size} bytes: no uint16 tokens, nor shards of version 1; copy it again")
    return path, offset, (size - offset) // 2, np.dtype(np.uint16)


def files_below(folder, seen):
    """Yield the files in a folder and below, links followed. OSError for a folder that cannot be read."""
    seen.add(os.path.realpath(folder))
    for path in sorted(map(Path, os.scandir(folder))):
        if path.name[0] == "." or path.name in ("__pycache__", "site-packages"):
            continue
        if not path.is_dir():
            yield path
        elif os.path.realpath(path) not in seen:   # else a link leads back
            yield from files_below(path, seen)


def data_files(source):
    """Return (the files that --data names, each once, in a fixed order; the folder that holds them)."""
    root = Path(source or os.path.dirname(os.__file__))
    if root.is_dir():
        top, files = root, [p for p in files_below(root, set()) if source or p.suffix == ".py"]
    else:   # one file, or a pattern
        files = [root] if root.exists() else [Path(name) for name in glob.glob(str(root), recursive=True)]
        need(files, f"--data {root} does not exist: give a folder, a file or a pattern, or leave it out")
        if glob.has_magic(str(root.parent)) or root.name == "**":   # glob passes over what it cannot read
            base = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), root.parts))
            list(files_below(base, set()))
        top = Path(os.path.commonpath([p.parent for p in files]))
    of_a_run = re.compile(r"(.*/)?(log[.]jsonl|step_[0-9]{8,}([.]tmp)?/(manifest[.]json|rank_[0-9]+[.]pt))")
    files = [p for p in files if p.is_file() and not of_a_run.fullmatch(p.as_posix())]
    files.sort(key=lambda p: (-len(p.parts), p.parts))   # of several links to a file the shortest stays
    files = sorted({os.path.realpath(p): p for p in files}.values())
    tokens = [p for p in files if p.suffix.lower() in (".bin", ".npy")]
    return tokens or [p for p in files if np.fromfile(p, np.uint8, 1024).all()], top   # text has no zeros


def open_data(source):
    """Return [training Tokens, validation Tokens] of --data. Validation data are token files with the word
    val, valid or validation in their path below --data, or a text file of that name (val.txt). Without these
    it is a twentieth: of 40 files or more, those that a checksum of names selects; else the last tokens."""
    paths, top = data_files(source)
    files = [token_file(path) for path in paths]
    total, kinds = sum(count for _, _, count, _ in files), sorted({str(dtype) for *_, dtype in files})
    need(total, f"--data {source} holds no tokens: .bin and .npy files are read, or text (no zero bytes)")
    need(len(kinds) == 1, f"--data {source} mixes {' and '.join(kinds)} tokens: keep one kind per folder")
    dtype, names = files[0][3], [path.relative_to(top).as_posix() for path in paths]
    word = "val(id|idation)?([.][^/]*)?" if dtype == np.uint8 else r"(.*[\W_])?val(id|idation)?([\W_].*)?"
    held_out = [bool(source and len(paths) > 1 and re.fullmatch(word, name, re.I | re.S)) for name in names]
    if not any(held_out) and len(paths) >= 40:
        held_out = [zlib.crc32(os.fsencode(name)) % 20 == 0 for name in names]
    left, parts = int(total * (1 - 0.05)), ([], [])
    for (path, offset, count, _), out in zip(files, held_out):
        take = count * (not out) if any(held_out) else min(left, count)   # one file may be cut in two
        parts[0].append((path, offset, take))
        parts[1].append((path, offset + take * dtype.itemsize, count - take))
        left -= take
    return [Tokens(part, dtype) for part in parts]


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
    """Return where tokens of `files`, (path, offset, bytes), are kept: elsewhere when one of them changes."""
    stats = [(str(path), *part, path.stat().st_size, path.stat().st_mtime_ns) for path, *part in files]
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
                need(piece, f"{path} has become shorter: begin again", OSError)
                ends = not count and file.tell() == os.stat(path).st_size   # validation may begin within it
                yield piece.decode("utf-8", "replace"), len(piece), ends


def write_tokens(path, files, tokenizer, dtype, say):
    """Write tokens of text, encoded on all cores, to `path`; after each file that of the end of a text."""
    ends = [tokenizer.token_to_id(name) for name in ("<|endoftext|>", "<|end_of_text|>", "</s>")]
    end = [i for i in ends if i is not None][:1]
    need(end, "the tokenizer has no token for the end of a text, like <|endoftext|> or </s>", ValueError)
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


def encode(text, run):
    """Return Tokens of --tokenizer for Tokens of bytes. Rank 0 encodes them, once, to a file beside --out."""
    ranks, dtype = run.ranks, np.dtype(np.uint32)
    path = token_cache(text.files, run.tokenizer, f"{os.path.abspath(run.c.out)}.tokens")
    if ranks.rank == 0:
        write = partial(write_tokens, path, text.files, run.tokenizer, dtype, ranks.say)
        error = None if path.exists() else attempt(write)[1]
        ranks.store.set(path.name, error or "")
    ranks.store.wait([path.name], timedelta(days=7))   # a collective would not wait for hours
    error = ranks.store.get(path.name).decode()
    need(not error, f"--tokenizer {run.c.tokenizer}: {path} cannot be written: {error}")
    return Tokens([(path, 0, path.stat().st_size // dtype.itemsize)], dtype, text.bytes)


def shuffled(number, n, keys):
    """Return the place of `number` in a random order of 0 ... n - 1 that is nowhere written down. A Feistel
    network shuffles all numbers of 2 b bits: (left, right) -> (right, left ^ f(right)) can be undone for any
    f, so no two numbers meet. One that lands at n or above goes through again."""
    golden = 0x9E3779B97F4A7C15   # 2^64 / golden ratio: a product with it carries every bit upwards
    bits = (max(n - 1, 1).bit_length() + 1) // 2   # half of those of a number
    while True:
        for key in keys:
            left, right = number >> bits, number & (1 << bits) - 1
            number = right << bits | left ^ ((right + key) * golden >> 32) & ((1 << bits) - 1)
        if number < n:
            return number


class Batches:
    """Windows of `seq` + 1 tokens: which ones depends on seed and step, never on the number of ranks. Every
    epoch cuts the data into windows, at edges of its own, and visits each once, in an order of its own."""

    def __init__(self, tokens, c, vocab):
        self.tokens, self.c, self.vocab = tokens, c, vocab
        self.windows = (len(tokens) - 1) // c.seq
        need(self.windows > 0, f"--data has {len(tokens)} tokens for training or validation, fewer than one "
                               f"sequence of --seq {c.seq} + 1: give more data or a shorter --seq")
        self.load(np.linspace(0, len(tokens) - c.seq - 1, 64))   # a wrong vocabulary shows now

    def load(self, starts, device=torch.device("cpu")):
        """Return inputs, targets (B, seq) int64."""
        windows = [self.tokens.read(int(start), self.c.seq + 1, self.vocab) for start in starts]
        windows = torch.from_numpy(np.stack(windows))
        if device.type == "cuda":
            windows = windows.pin_memory().to(device, non_blocking=True)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()   # as what a graph reads

    def start(self, number):
        """Return where window `number`, counted through all epochs, starts."""
        epoch, number = divmod(number, self.windows)
        rng = np.random.default_rng((self.c.seed, epoch))
        edge = int(rng.integers(len(self.tokens) - self.windows * self.c.seq))
        keys = rng.integers(1 << 62, size=4).tolist()
        return edge + self.c.seq * shuffled(number, self.windows, keys)

    @lru_cache(1)   # so that the loop can read ahead
    def step(self, step, micro, device):
        """Return micro-batch `micro`, counted over all ranks, of a step: the next windows of the epoch."""
        first = (step * self.c.accum + micro) * self.c.batch
        return self.load([self.start(first + i) for i in range(self.c.batch)], device)

    def evaluation(self, i, device):
        """Return micro-batch i of eval_batches: evenly spaced windows, the same at every evaluation."""
        starts = np.linspace(0, len(self.tokens) - self.c.seq - 1, self.c.eval_batches * self.c.batch)
        return self.load(starts[i * self.c.batch:(i + 1) * self.c.batch], device)


# ------------------------------------------------------------------------------------------------------------
# Several ranks

stop = SimpleNamespace(received=False, in_loop=False)   # what a signal has told this process


def on_signal(*_):
    """Before the loop, end the process. In the loop, let it finish its step, save and leave."""
    first, stop.received = not stop.received, True
    if first and not stop.in_loop:
        raise KeyboardInterrupt


@dataclass
class Ranks:
    rank: int
    world: int
    device: torch.device
    store: object = None   # what all ranks can read

    def say(self, text):
        """Print on rank 0. Output that cannot be written does not end a run."""
        try:
            if self.rank == 0:
                print(text)
        except OSError:
            sys.stdout = None   # print does nothing from here on


def start_ranks(name):
    """Return the Ranks of this process, which joins the others if torchrun started it. After a restart by
    torchrun they meet under a name of its own, because its store still has the addresses of the dead. (A
    restart for a node that joins or leaves is not counted: then start all of them anew.)"""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    need(re.fullmatch("cpu|cuda(:[0-9]{1,2})?", name), f"--device {name} is unknown: use cpu, cuda or cuda:N")
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
    gpu, count = device.type == "cuda", torch.cuda.device_count()
    need(not gpu or device.index < count, f"--device {name}: {device} is not one of {count} GPUs here: use "
                                          f"--device cpu or start fewer ranks")
    torch.get_device_module(device).set_device(device)
    if "RANK" not in os.environ:
        return Ranks(0, 1, device, dist.HashStore())
    try:
        store, rank, world = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=rank, world_size=world,
                                timeout=timedelta(minutes=30), device_id=device if gpu else None)
    except (ValueError, dist.DistError) as e:
        raise RunError(f"the ranks cannot meet ({str(e).splitlines()[0]}): use torchrun, and give each "
                       f"job a --master_port or --rdzv_endpoint of its own") from None
    return Ranks(rank, world, device, store)


def all_reduce(tensor, op=dist.ReduceOp.SUM):
    if dist.is_initialized():
        dist.all_reduce(tensor, op)
    return tensor


def gather(thing, group=None):
    """Return the list of what all ranks have."""
    things = [thing] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(things, thing, group)
    return things


def check_same(thing, what):
    need(all(other == thing for other in gather(thing)), f"the ranks have different {what}", RunError)


def exchanged(run):
    """Return in one line what experts that are spread over the ranks receive."""
    c, n, d = run.c, run.ranks.world, run.model.config.d
    passes = 3 if c.recompute == "block" else 2   # forward, backward, and forward again
    tokens = passes * c.layers * c.accum // n * (n - 1) * c.batch * c.seq   # of other ranks
    plain = d * (2 if run.ranks.device.type == "cuda" else 4)   # bytes of one
    sent = d + 4 if run.model.blocks[0].fused else plain        # FP8 and a scale
    return (f"experts {run.model.config.experts // n} of each layer on a rank. It receives, each step, "
            f"{tokens * sent / 1e6:,.1f} MB of tokens and gradients (not in FP8 {tokens * plain / 1e6:,.1f}) "
            f"and {tokens * plain / 1e6:,.1f} MB of sums, besides 16 bytes for each choice of an expert")


def data_parallel(model, device, experts=()):
    """Return DDP. It sums micro-batches in FP32. On GPUs the sum travels in BF16. It ignores `experts`."""
    gpu = device.type == "cuda"
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        model, [name for name, p in model.named_parameters() if p in experts])
    for p in model.parameters():   # for DDP's buckets; those of a first micro-batch would lie beside them
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    # On CPUs, looking for unused parameters keeps DDP from changing the order of its sums after the first
    # step, which a resumed run would notice. (On GPUs attention alone makes two runs differ.)
    ddp = DistributedDataParallel(model, device_ids=[device.index] if gpu else None, init_sync=False,
                                  gradient_as_bucket_view=True, find_unused_parameters=not gpu)
    if gpu:
        ddp.register_comm_hook(None, bf16_compress_hook)
    return ddp


def owners(model, world):
    """Return {parameter: the rank that writes it to checkpoints and, with --shard, owns it}: even shares."""
    owner, load = {}, [0] * world
    for p in sorted(model.parameters(), key=lambda p: -p.numel()):
        owner[p] = load.index(min(load))
        load[owner[p]] += p.numel()
    return owner


def drop_weights(run):
    """Leave the FP32 numbers of each quantized weight to its owner alone. The others keep its shape."""
    need(run.ranks.world <= len(run.owner), f"--shard: {run.ranks.world} ranks are more than the "
         f"{len(run.owner)} parameters to own: use fewer ranks, or leave --shard out")
    for layer in run.model.linears():
        if layer.recipe and not run.mine(layer.weight):
            layer.weight.data = layer.weight.data.new_zeros(1, 1).expand(layer.weight.shape)
            layer.requantize()   # copies of zeros: `send_weights` overwrites them


def send_weights(run):
    """Send what the owners have to all ranks, after a step or at the start: quantized weights W in FP8, of
    which each rank makes W^T; all others in FP32."""
    largest = all_reduce(run.scales.scale.clone(), dist.ReduceOp.MAX).split(run.scales.parts)
    for (p, scale), of_owner in zip(run.scale_of.items(), largest):
        if not run.mine(p):   # here the weight looks like zeros when it is measured
            scale.copy_(of_owner)
    layers = {layer.weight: layer for layer in run.model.linears() if layer.recipe}
    for p, owner in run.owner.items():
        if p not in run.experts:
            data = layers[p].copies[0].data if p in layers else p.data
            dist.broadcast(data.view(torch.uint8), owner)
    for p, layer in layers.items():
        if not run.mine(p):
            w, before = replace(layer.copies[0], scale=run.scale_of[p].view(-1, 1)), layer.copies
            layer.set_copies((w, transposed(w)))
            keep_place(run, layer, before)


# ------------------------------------------------------------------------------------------------------------
# The run's folder: checkpoints and log

def checkpoints(out):
    """Return the checkpoints in a folder, which are folders step_00000100 and so on, the newest first."""
    found = [path for path in Path(out).glob("step_*") if re.fullmatch("step_[0-9]+", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def last_good(out):
    return f"{checkpoints(out)[0]} is the last good checkpoint" if checkpoints(out) else "nothing was saved"


def attempt(function, *args):
    """Return (what the function returns, None), or (None, what went wrong as text)."""
    try:
        return function(*args), None
    except Exception as e:   # a full disk is a RuntimeError of torch.save; nothing passes for success
        return None, f"{type(e).__name__}: {e}".partition("\n")[0]


class Saver:
    """Write checkpoints in the background, while training goes on. All ranks call its methods together. Each
    writes what it owns to a file in step_00000100.tmp/. When all files are whole, rank 0 adds manifest.json,
    with their checksums, and renames the folder: a crash leaves a whole checkpoint or none."""

    def __init__(self, run, writer):
        self.run, self.out, self.writer, self.last = run, Path(run.c.out), writer, None
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None   # of the writers

    def save(self):
        """Copy the weights and moments that this rank writes to the CPU's memory, and begin to write them."""
        def copy(x):   # zero_ touches memory that is new, which takes longer than copying
            return torch.empty(x.shape, dtype=x.dtype).zero_().copy_(x)
        self.finish()
        run = self.run
        torch.get_device_module(run.ranks.device).synchronize()   # threads do not wait for this one's stream
        with ThreadPoolExecutor(16) as pool:   # training waits: for 10 GB one thread takes 6 s, 16 take 0.8 s
            jobs = {name: {key: pool.submit(copy, x) for key, x in {
                        "weight": p.data, **({"scale": run.scale_of[p]} if p in run.scale_of else {}),
                        **run.optimizer.state.get(p, {})}.items()}
                    for name, p in run.model.named_parameters() if run.owner[p] == run.ranks.rank}
        state = {name: {key: job.result() for key, job in kept.items()} for name, kept in jobs.items()}
        content = {"step": run.progress.step, "progress": dict(vars(run.progress)), "config": asdict(run.c),
                   "model_config": asdict(run.model.config), "tokens": len(run.batches.tokens),
                   "tokenizer": run.tokenizer_crc}
        self.last = self.writer.submit(self.write, state, content)

    def finish(self):
        """Wait until the checkpoint that was begun is whole, or has failed. Return whether it was saved."""
        done, error = attempt(self.last.result) if self.last else (True, None)
        # A rank that went on writing would take answers to one checkpoint for another's.
        need(not error, f"another rank is gone ({error}): go on with --resume", RunError)
        return done

    def write(self, state, content):
        """Return whether the checkpoint was written. Raise what ends the talk with the other ranks."""
        folder, ranks = self.out / f"step_{content['step']:08}.tmp", self.run.ranks
        parts = gather(attempt(write_file, folder / f"rank_{ranks.rank}.pt", state), self.group)
        error = next((error for _, error in parts if error), None)
        if not error and ranks.rank == 0:
            _, error = attempt(self.commit, folder, {**content, "files": dict(part for part, _ in parts)})
        if error and ranks.rank == 0:
            ranks.say(f"warning: the checkpoint of step {content['step']} could not be written ({error}): "
                      f"make room in {self.out}; {last_good(self.out)}")
            shutil.rmtree(folder, ignore_errors=True)
        return not gather(error, self.group)[0]   # rank 0 knows

    def commit(self, folder, content):
        """Write the manifest, rename the folder, and remove old ones."""
        with open(folder / "manifest.json", "w") as f:
            json.dump({"checksum": zlib.crc32(json.dumps(content).encode()), "content": content}, f)
            f.flush()
            os.fsync(f.fileno())
        folder.rename(folder.with_suffix(""))
        for old in checkpoints(self.out)[self.run.c.keep:]:   # what is half removed must not look whole
            attempt(old.rename, old.with_suffix(".tmp"))
            shutil.rmtree(old.with_suffix(".tmp"), ignore_errors=True)


def write_file(path, state):
    path.parent.mkdir(exist_ok=True)
    torch.serialization.set_crc32_options(False)   # the CRC of the whole file is enough
    torch.save(state, path)
    with open(path, "r+b") as f:   # Windows syncs no file that is open to be read
        os.fsync(f.fileno())
    return path.name, size_and_crc(path)


def size_and_crc(path):
    data = np.memmap(path, mode="r")
    return [len(data), zlib.crc32(data)]


def read_manifest(path, ranks):
    """Return the content of a manifest. Raise what is wrong with it or the files that this rank checks."""
    manifest = json.loads((path / "manifest.json").read_text())
    content = manifest["content"]
    need(zlib.crc32(json.dumps(content).encode()) == manifest["checksum"],
         "the checksum of its manifest is wrong", ValueError)
    need(content["step"] == int(path.name[5:]), f"it is of step {content['step']}", ValueError)
    for name, written in list(content["files"].items())[ranks.rank::ranks.world]:
        need(size_and_crc(path / name) == written, f"{name} is not what was written", ValueError)
    return {**content, "path": path}


def newest_checkpoint(out, ranks):
    """Return the manifest of the newest checkpoint that is whole, None where there is no checkpoint."""
    found = checkpoints(out)
    check_same([path.name for path in found], f"checkpoints: --out {out} is not a folder that all nodes see")
    for path in found:
        saved, damage = attempt(read_manifest, path, ranks)
        damage = next(filter(None, gather(damage)), None)
        if not damage:
            return saved
        ranks.say(f"note: {path} is damaged ({damage}); looking for the one before it")
    need(not found, f"no checkpoint in {out} is whole: restore one from a copy, or train without --resume")


@torch.no_grad()
def restore(run, saved):
    """Restore weights and scales; to go on training, Adam's moments too. All by name, and bit for bit.
    Scales are measured if the recipe is another one now, or if a weight exceeds what its scale allows."""
    for name, value in asdict(run.model.config).items():
        was = saved["model_config"].get(name, value)
        need(name == "seq" or was == value,
             f"{saved['path']} has {name} = {was}, not {value}: use that run's --model, --layers and --data")
    parts = [torch.load(saved["path"] / name, map_location="cpu", weights_only=True, mmap=True)
             for name in saved["files"]]   # weights_only: no code of a file's is run
    same = saved["config"]["fp8"] == run.c.fp8
    for name, p in run.model.named_parameters():
        if run.mine(p):
            pieces = [part[name] for part in parts if name in part]   # several of experts that were spread
            kept = {key: torch.cat([piece[key] for piece in pieces]) if len(pieces) > 1 and x.dim() else x
                    for key, x in pieces[0].items() if run.c.resume or key in ("weight", "scale")}
            if p in run.experts:
                kept = {key: x.chunk(run.ranks.world)[run.ranks.rank] if x.dim() else x
                        for key, x in kept.items()}
            p.copy_(kept.pop("weight"))
            scale = kept.pop("scale", None)
            if same and p in run.scale_of:
                run.scale_of[p].copy_(scale)
            if run.c.resume:
                run.optimizer.state[p] = {key: x.to(p.device, copy=True) for key, x in kept.items()}
    if run.c.resume:
        need(saved["tokenizer"] == run.tokenizer_crc,
             f"--tokenizer {run.c.tokenizer} has changed: bring back the run's")
        run.progress = SimpleNamespace(**saved["progress"])
    if run.scales:
        least = all_reduce(run.scales.headroom().min(), dist.ReduceOp.MIN)   # of all ranks
        if not same or least < 1:
            run.scales.rescale()


def lock(out, files):
    """Make a folder and lock it for this run, until `files` closes. UserError if another run holds it."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
        fcntl.flock(files.enter_context(open(out / ".lock", "a")), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--out {out} is in use by another run: give each a folder of its own") from None
    except (ImportError, OSError):   # Windows, or a file system without locks: do without
        pass


def read_log(path):
    """Yield (line, record) for the whole lines of a log. The record is {} for what a user wrote."""
    for line in path.read_bytes().decode(errors="replace").split("\n")[:-1] if path.exists() else ():
        record, _ = attempt(json.loads, line)
        ours = isinstance(record, dict) and isinstance(record.get("step"), int)
        yield line + "\n", record if ours else {}


def move_aside(path):
    """Rename a folder to the first name that is free, path.1, path.2 and so on, and return it."""
    names = (path.with_name(f"{path.name}.{n}") for n in itertools.count(1))
    return path.rename(next(name for name in names if not name.exists()))


@contextmanager
def run_folder(c, ranks, step):
    """Hold --out for this run alone, and yield log(record), which adds to log.jsonl and to tensorboard.
    An earlier run is moved aside, or cut down to what it had done at the checkpoint of `step`."""
    if ranks.rank:
        yield lambda record: None
        return
    out = Path(c.out).resolve()   # behind a link as well, a run is renamed where it lies
    path = out / "log.jsonl"
    with ExitStack() as files:
        if c.tensorboard:
            with blaming(f"--tensorboard {c.tensorboard} cannot be written, choose another folder"):
                Path(c.tensorboard).mkdir(parents=True, exist_ok=True)
            with blaming(f"--tensorboard {c.tensorboard}"):
                from torch.utils.tensorboard import SummaryWriter
        with blaming(f"--out {c.out} cannot be written, choose another folder"):
            lock(out, files)
            if (not c.resume or step == 0) and (path.exists() or checkpoints(out)):
                ranks.say(f"an earlier run in {out} was moved to {move_aside(out)}")
                lock(out, files)
            for unfinished in out.glob("step_*.tmp"):
                shutil.rmtree(unfinished, ignore_errors=True)
            for newer in checkpoints(out):
                if int(newer.name[5:]) > step:   # damaged, else it would have been taken
                    ranks.say(f"note: {newer} was moved to {move_aside(newer)}")
            before = [line for line, record in read_log(path) if record.get("step", 0) <= step]
            path.with_suffix(".tmp").write_bytes("".join(before).encode())
            path.with_suffix(".tmp").replace(path)
        board = c.tensorboard and files.enter_context(SummaryWriter(c.tensorboard, purge_step=step + 1))
        about = {"command": shlex.join(sys.argv), "config": asdict(c), "python": sys.version.split()[0],
                 "torch": torch.__version__, "triton": HAS_TRITON and sys.modules["triton"].__version__,
                 "hardware": f"{ranks.world} x {device_name(ranks.device)}, {os.cpu_count()} CPU cores"}

        def append(record):
            finite = {key: x if math.isfinite(x) else None for key, x in record.items()}   # JSON has no NaN
            with open(path, "a") as file:
                file.write(json.dumps({**finite, **about}) + "\n")
            about.clear()   # it stands in the first line alone

        def draw(record):
            for key, value in record.items() if board else ():
                board.add_scalar(key, value, record["step"])

        def log(record):
            for where, write in (("log.jsonl", append), ("--tensorboard", draw)):
                if error := attempt(write, record)[1]:
                    ranks.say(f"warning: step {record['step']} is not in {where} ({error})")
        yield log


# ------------------------------------------------------------------------------------------------------------
# Instead of training: what a checkpoint can do, what the logs show, how fast a step is

def report(c):
    """Do what --eval_only, --sample and --export ask of the newest whole checkpoint, or of --init. Several
    recipes in --fp8 are compared at the same weights: their losses, and the error of their gradients against
    that of the first, ||g - g_first|| / ||g_first||."""
    ranks, saved = start(c)
    recipes, first = c.fp8.split(","), None
    need(len(recipes) == 1 and not c.export or ranks.world == 1,
         "--eval_only of several recipes, or --export: run it without torchrun")
    for fp8 in recipes:
        run = build(replace(c, fp8="none" if c.export else fp8), ranks, saved)
        if c.export:
            with blaming(f"--export {c.export}"):
                if c.tokenizer:
                    open_tokenizer(c.tokenizer)
                save_folder(run.model, Path(c.export), c.init and Path(c.init), c.tokenizer)
            return ranks.say(f"wrote {c.export}")
        if c.sample:
            return ranks.say(sample(run, c.sample))
        if c.calibrate and fp8 != "none":
            need(not run.model.config.experts, "--calibrate: a mixture of experts cannot be, leave it out")
            windows = range(max(c.calibrate // c.seq, 1))   # of the training data
            calibrate(run.model, run.batches.load(map(run.batches.start, windows), ranks.device)[0])
        loss = evaluate(run, gradient=len(recipes) > 1)
        line = f"{saved['path'] if saved else c.init}  {fp8:8}  {numerics(fp8, ranks.device)}  "
        results = {"validation loss": loss, **bits_per_byte(run, loss)}
        line += "  ".join(f"{name} {value:.4f}" for name, value in results.items())
        if len(recipes) > 1:
            gradient = [p.grad for p in run.model.parameters() if p.grad is not None]
            first = first or gradient
            error = get_total_norm([g - g0 for g, g0 in zip(gradient, first)]) / get_total_norm(first)
            line += f"  gradient {error:.2%} off"
        ranks.say(line)
        run = gradient = None
        gc.collect()   # a compiled model refers to itself: the next one needs its memory


def bits_per_byte(run, loss):
    """Return {"bits per byte": of a loss in nats per token}, {} where the data are no text."""
    size, count = run.val_batches.tokens.bytes, len(run.val_batches.tokens)
    return {"bits per byte": round(loss / math.log(2) * count / size, 4)} if size else {}


def plot_runs(c):
    """Draw losses, and the largest load of experts over their mean, of runs in the folders --out a,b,c."""
    folders = [Path(folder) for folder in c.out.split(",")]
    with picture(c.plot, yscale="log", xlabel="step", ylabel="loss, nats/token; dots: validation") as axes:
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:.3g}")
        axes.yaxis.set_minor_formatter(lambda y, _: f"{y:.3g}")
        for behind, folder in zip(reversed(range(len(folders))), folders):
            records = [record for _, record in read_log(folder / "log.jsonl")
                       if isinstance(record.get("loss"), (int, float))]
            need(records, f"--plot: {folder} has no log to draw: give the folders of runs as --out a,b")
            steps, losses, val_losses, loads = (
                [record.get(key) for record in records] for key in ("step", "loss", "val_loss", "load"))
            line, = axes.plot(steps, losses, label=folder.name, lw=1 + 2 * behind)
            axes.plot(steps, val_losses, "o", ms=4 + 3 * behind, color=line.get_color())
            if any(loads):
                axes.plot(steps, loads, "--", lw=1, color=line.get_color())
                axes.set_ylabel("loss, nats/token; dots: validation; broken: load")


def bench(c):
    """Time the recipes one after another on random tokens, by the functions of the loop. Return {name: its
    row of the table}. Medians of: forward + backward, the mean over --accum micro-batches; clipping and the
    optimizer's step. `x none` compares the first alone. `kept`: what forward leaves for backward. `limit`:
    what `least_seconds` counts, as a share of the time."""
    ranks, _ = start(c)
    need(ranks.world == 1, "--bench times one rank: run it without torchrun")
    device, rows, gpu = ranks.device, {}, ranks.device.type == "cuda"
    print(f"{device_name(device)}, PyTorch {torch.__version__}; {c.model}, {c.layers} layers, {c.accum} x "
          f"{c.batch} x {c.seq} tokens, recompute {c.recompute}; medians of {c.steps} steps\n")
    wait, memory = torch.get_device_module(device).synchronize, torch.cuda.memory_allocated   # 0 on a CPU
    for fp8 in c.fp8.split(","):
        run, times = build(replace(c, fp8=fp8), ranks), []
        tokens = torch.randint(run.model.config.vocab, (2, c.batch, c.seq), device=device)
        run.batches = SimpleNamespace(step=lambda *_: tokens)
        before = memory()
        loss = run.model(*tokens)
        kept = memory() - before
        del loss
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        for step in range(c.steps + 3):   # the first three warm up
            wait()
            begin = time.perf_counter()
            forward_backward(run, step)
            wait()
            middle = time.perf_counter()
            clip(run, gradient_norm(run))
            update_weights(run, c.lr, step + 1)
            wait()
            times.append((middle - begin, time.perf_counter() - middle))
            run.model.zero_grad(set_to_none=not run.captures)
        first, second = (1e3 * statistics.median(part) for part in zip(*times[3:]))
        speed = 1e3 * c.accum * c.batch * c.seq / (first + second)
        rows[fp8] = row = {"fwd+bwd ms": first / c.accum, "optimizer ms": second, "tokens/s": speed,
                           **mfu(run.model, speed, device)}
        if gpu:
            row |= {"peak GiB": torch.cuda.max_memory_allocated() / 2**30, "kept GiB": kept / 2**30}
        if kernels_run_on(device):
            row["limit"] = least_seconds(run, kept) / (first + second) * 1e3
        row["x none"] = rows["none"]["fwd+bwd ms"] / row["fwd+bwd ms"] if "none" in rows else math.nan
        if len(rows) == 1:
            print("recipe  ", *(f"{name:>13}" for name in row))
        print(f"{fp8:8}", *(f"{x:>13,.{0 if x > 1000 else 3}f}" for x in row.values()))
        run = None
        gc.collect()   # a compiled model refers to itself: its weights would count as the next one's memory
    return rows


@lru_cache
def rates(device):
    """Return the FLOP/s of BF16 and of FP8 products, and the bytes/s of a copy, that a GPU reaches."""
    x = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    (q, w), y = (quantize(x, E4M3, (n, ALL), "up") for n in (1, ALL)), torch.empty_like(x)
    ms = times({"bf16": lambda: x @ x.t(), "fp8": lambda: matmul(q, w), "copy": lambda: y.copy_(x)})
    return 2e3 * 8192**3 / ms["bf16"], 2e3 * 8192**3 / ms["fp8"], 2e3 * x.nbytes / ms["copy"]


def least_seconds(run, kept):
    """Return the time of a step's products and of its least traffic, at `rates`. A micro-batch writes and
    reads what forward keeps, and the FP32 gradients. The optimizer moves 30 bytes per parameter."""
    c, model, (bf16, fp8, copy) = run.c, run.model, rates(run.ranks.device)
    tokens, size = c.accum * c.batch * c.seq, sum(p.numel() for p in run.trained)
    total, linear = flops_per_token(model), sum(layer.weight.numel() for layer in model.linears())
    in_fp8 = 6 * (linear - idle_weights(model)) if model.recipe else 0
    traffic = c.accum * 2 * (kept + 4 * size) + 30 * size
    return tokens * (in_fp8 / fp8 + (total - in_fp8) / bf16) + traffic / copy


def main(argv=None):
    """Run the command line. Return the exit code."""
    try:
        c = parse_config(argv)
        reporting = c.eval_only or c.sample or c.export
        action = plot_runs if c.plot else bench if c.bench else report if reporting else train
        action(c)
        return 0
    except KeyboardInterrupt:
        code, message = 0, "stopped by a signal before the first step"
    except (UserError, RunError, OSError) as e:
        code, message = 2 if isinstance(e, UserError) else 1, f"error: {e}"
    except (MemoryError, RuntimeError) as e:   # torch.OutOfMemoryError is a RuntimeError
        code, reason = 1, str(e).split("\n")[0].split(". ")[0][:160]
        if isinstance(e, MemoryError) or re.search("out of memory|DefaultCPUAllocator", str(e)):
            message = (f"error: {reason or 'out of memory'}: halve --batch and double --accum, "
                       f"which trains the same in less memory, or add --recompute block (or --eager)")
        elif "captur" in str(e):
            message = f"error: a micro-batch does not become a CUDA graph ({reason}): give --eager"
        elif "RANK" in os.environ and re.search("connection|gloo|nccl", str(e), re.IGNORECASE):
            message = f"error: another rank is gone ({reason}): torchrun --max-restarts with --resume goes on"
        else:
            raise
    rank = int(os.environ.get("RANK", 0))
    print(f"rank {rank}: {message}" if rank else message, file=sys.stderr)
    return code


if __name__ == "__main__":
    if sys.stdout:   # it is None where it was closed. In a file as well, a line is there when it is printed
        sys.stdout.reconfigure(line_buffering=True, errors="replace")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    code = main()
    if dist.is_initialized() and code:   # the others wait in a collective, and NCCL would wait for them
        os._exit(code)
    if dist.is_initialized():
        gc.collect()   # frees DDP, which holds the process group, whose threads must end before Python does
        dist.destroy_process_group()
    sys.exit(code)
