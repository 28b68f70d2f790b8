"""
Train a language model in FP8.

    python train.py --fp8 moss                  # any machine, no data needed: learns Python's own source text
    python train.py --fp8 none                  # the same run in BF16 (FP32 on a CPU), to compare with
    python train.py --model 1b --data tokens/   # a preset of model.py on your own data
    python train.py --resume                    # go on from the newest checkpoint in out/, with its options
    torchrun --nproc_per_node 8 train.py --model 1b --data tokens/ --accum 64        # eight GPUs of one node
    torchrun --nnodes 4 --nproc_per_node 8 --max-restarts 3 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \\
        train.py --resume --model olmo-7b --data tokens/ --shard                     # on each of four nodes

Runs that differ in `--fp8` alone see the same data in the same order from the same initial weights. With the
same `--accum`, so do runs on any number of GPUs. Reading order: the options; what FP8 adds to training; the loop;
what the loop calls (what is watched, data, several ranks, the run's folder); what there is besides training.
"""
import argparse
import dataclasses
import gc
import glob
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
import sysconfig
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from autoscale import FP8AdamW, WeightScales, check_optimizer
from fp8_formats import E4M3, picture
from microscale import ALL, HAS_TRITON, RECIPES, Quantized, has_fp8_tensor_cores, transpose
from model import PRESETS, RECOMPUTE, Transformer, flops_per_token


class UserError(Exception):
    """A mistake of the user's: the message names the value, the reason and the fix. Exit code 2."""


class RunError(Exception):
    """The run went wrong and cannot go on. Exit code 1."""


def need(condition, message):
    if not condition:
        raise UserError(message)


# ------------------------------------------------------------------------------------------------------------
# Options

def opt(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    # what to train; a default of None depends on the preset (DEFAULTS) or the machine (`resolve`)
    fp8: str = opt(None, f"recipe of the linear layers: {', '.join(RECIPES)} (default: moss)")
    model: str = opt(None, f"preset: {', '.join(PRESETS)} (default: 124m on a GPU, nano on a CPU)")
    layers: int = opt(None, "blocks of the model (default: the preset's)")
    data: str = opt(None, "folder of .bin, .npy or text files, one file, or a pattern in quotes: 'tokens/*.bin' "
                          "(default: Python's standard library)")
    out: str = opt("out", "folder for checkpoints and log; an earlier run in it is renamed, never overwritten")
    steps: int = opt(None, "optimizer steps of the whole run (default: by preset)")
    batch: int = opt(None, "sequences per micro-batch and rank (default: by preset)")
    accum: int = opt(None, "micro-batches per step, over all ranks together (default: by preset)")
    seq: int = opt(None, "tokens per sequence (default: the preset's)")
    # optimizer: AdamW
    lr: float = opt(None, "peak learning rate; falls to a tenth along a cosine (default: by preset)")
    warmup: int = opt(None, "steps of linear warm-up (default: a tenth of the steps, at most 2000)")
    beta1: float = opt(0.9, "decay of the gradient's mean")
    beta2: float = opt(0.95, "decay of the gradient's square")
    weight_decay: float = opt(0.1, "decoupled weight decay, not on norms")
    clip: float = opt(1.0, "largest norm of the gradient; a larger one is scaled down to it")
    rescale_interval: int = opt(500, "steps between measurements of predicted weight scales; 0 = never")
    spike: float = opt(100, "skip a step whose gradient norm is so many times the median of 100; 0 = never")
    max_skips: int = opt(5, "stop after so many skipped steps in a row: spikes, or a loss that is not finite")
    # watching and saving
    log_every: int = opt(10, "steps between lines on the terminal and in log.jsonl")
    eval_every: int = opt(None, "steps between evaluations and checkpoints (default: a fifth, at most 250)")
    eval_batches: int = opt(16, "micro-batches per evaluation, over all ranks together")
    keep: int = opt(2, "checkpoints to keep; the one of the best validation loss stays as well")
    tensorboard: str = opt(None, "folder to write the log to as well, for tensorboard")
    # time, memory, place
    recompute: str = opt("none", "what the backward pass computes again: none, or block (all but its input)")
    eager: bool = opt(False, "do without torch.compile, which a GPU uses for what is not FP8")
    shard: bool = opt(False, "ranks keep FP32 weights and Adam's moments of their share of the layers alone "
                             "(ZeRO-1), and exchange FP8 weights; for --fp8 moss")
    seed: int = opt(1337, "of the initial weights and of the order of the data")
    device: str = opt(None, "cpu, cuda or cuda:N (default: cuda if there is one)")
    # one of these, instead of beginning a run
    resume: bool = opt(False, "go on from the newest checkpoint in --out, with its options, or begin")
    eval_only: bool = opt(False, "loss of the newest checkpoint in --out, for each recipe in --fp8 a,b,c")
    sample: str = opt(None, "text (or token ids) for the newest checkpoint in --out to go on with")
    plot: str = opt(None, "FILE.png: draw the losses of the runs in --out (a,b,c); needs matplotlib")
    bench: bool = opt(False, "time the recipes in --fp8 (a,b,c; default: all), --steps (10) on random tokens")
    given = ()   # no option: the names of those that the command line gave


MODES = ("resume", "eval_only", "sample", "plot", "bench")
DEFAULTS = {   # batch and learning rate as models of these sizes are usually trained; two fit a coffee break
    "nano": dict(batch=32, accum=1, steps=150, lr=4e-3),
    "124m": dict(batch=64, accum=1, steps=600, lr=1e-3),
    "1b": dict(batch=16, accum=64, steps=100_000, lr=4e-4),
    "olmo-7b": dict(batch=1, accum=2048, steps=100_000, lr=3e-4),
    "llama2-7b": dict(batch=1, accum=1024, steps=100_000, lr=3e-4)}
LIMITS = {   # the least and the most that make sense
    **dict.fromkeys("layers batch accum seq steps log_every eval_every max_skips keep".split(), (1, 2**31 - 1)),
    "eval_batches": (1, 2**20), "warmup": (0, 2**31 - 1), "rescale_interval": (0, 2**31 - 1),
    "lr": (1e-30, 10), "clip": (1e-30, 1e30), "spike": (0, 1e30), "weight_decay": (0, 10),
    "beta1": (0, 1 - 1e-9), "beta2": (0, 1 - 1e-9), "seed": (0, 2**63 - 1)}


def parse_config(argv=None):
    """Return the Config of a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    modes = parser.add_mutually_exclusive_group()
    for f in dataclasses.fields(Config):
        text = f.metadata["help"] + (f" (default: {f.default})" if f.default not in (None, False) else "")
        kind = {"action": "store_true"} if f.default is False else {"type": f.type, "metavar": f.name.upper()}
        names = dict.fromkeys((f"--{f.name}", f"--{f.name.replace('_', '-')}"))   # --max_skips or --max-skips
        (modes if f.name in MODES else parser).add_argument(*names, help=text.replace("%", "%%"), **kind)
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        need(value != "", f"--{name} is empty: give it a value, or leave it out")
    config = Config(**given)
    config.given = given
    return config


def recall(c, saved, say):
    """Take from the options of a checkpoint's run those that the command line does not give. Say what differs."""
    for name, value in saved.items():
        if name in (*MODES, "out", "device") or not hasattr(c, name):   # a fork may know fewer options
            continue
        if name not in c.given:
            setattr(c, name, value)
        elif getattr(c, name) != value:
            say(f"note: --{name} was {value} and is now {getattr(c, name)}")


def resolve(c, device, world):
    """Fill in the defaults that depend on preset and machine. UserError for what cannot work."""
    c.model = c.model or ("124m" if device.type == "cuda" else "nano")
    c.fp8 = c.fp8 or (",".join(RECIPES) if c.bench else "moss")
    recipes = c.fp8.split(",") if c.bench or c.eval_only else [c.fp8]
    for option, values, known in (("fp8", recipes, RECIPES), ("model", [c.model], PRESETS),
                                  ("recompute", [c.recompute], RECOMPUTE)):
        for value in values:
            need(value in known, f"--{option} {value} is unknown: choose one of {', '.join(known)}")
    defaults = DEFAULTS[c.model] | {"layers": PRESETS[c.model].layers, "seq": PRESETS[c.model].seq}
    for name, value in (defaults | {"steps": 10, "accum": 1} if c.bench else defaults).items():
        if getattr(c, name) is None:
            setattr(c, name, max(value, world) if name == "accum" else value)
    c.warmup = min(c.steps // 10, 2000) if c.warmup is None else c.warmup
    c.eval_every = min(max(c.steps // 5, 1), 250) if c.eval_every is None else c.eval_every
    c.data = c.data and os.path.abspath(c.data)   # so that --resume finds it from any folder
    for name, (least, most) in LIMITS.items():
        need(least <= getattr(c, name) <= most,
             f"--{name} {getattr(c, name)} must lie between {least:g} and {most:g}")
    need(c.batch * max(c.seq, c.eval_batches) < 2**31,
         f"--batch {c.batch}: with --seq {c.seq} and --eval_batches {c.eval_batches} no machine holds it, lower it")
    need(c.fp8 == "none" or c.batch * c.seq % 16 == 0,
         f"--batch {c.batch} x --seq {c.seq} = {c.batch * c.seq} tokens, not a multiple of 16, which --fp8 {c.fp8} "
         f"needs to sum over them: change --batch or --seq")
    need(c.accum % world == 0, f"--accum {c.accum} micro-batches do not divide by {world} ranks: use --accum "
                               f"{-(-c.accum // world) * world}")
    need(not c.shard or all(fp8 != "none" and RECIPES[fp8].weight_scale == "predicted" for fp8 in recipes),
         f"--shard is for recipes that predict weight scales, like --fp8 moss, not {c.fp8}: to measure them a rank "
         f"would have to see all weights")
    return c


# ------------------------------------------------------------------------------------------------------------
# What FP8 adds to training: weight scales, and FP8 copies of the weights, made once per optimizer step

def make_optimizer(model, c, shards=None):
    """Return AdamW with the same groups under every recipe: quantized weights, other matrices, norms (no decay).

    Recipes that predict weight scales use FP8AdamW, which writes the FP8 copies as well.
    """
    layers = {layer.weight: layer for layer in model.linears() if layer.recipe}
    kinds = [], [], []
    for p in model.parameters():
        if p.requires_grad and (shards is None or shards.mine(p)):
            kinds[0 if p in layers else 1 if p.dim() >= 2 else 2].append(p)
    groups = [{"params": params, "weight_decay": decay}
              for params, decay in zip(kinds, (c.weight_decay, c.weight_decay, 0.0)) if params]
    options = dict(lr=c.lr, betas=(c.beta1, c.beta2), fused=model.embed.weight.is_cuda)
    if model.recipe is None or model.recipe.weight_scale != "predicted":
        return torch.optim.AdamW(groups, **options)
    return FP8AdamW(groups, [layers[p] for p in kinds[0] if layers[p].recipe.weight_scale != "block"], **options)


def make_scales(model, optimizer, c):
    """Return the WeightScales of all layers (autoscale.py), or None if the recipe does not scale per tensor."""
    if model.recipe is None or model.recipe.weight_scale == "block":
        return None
    if model.recipe.weight_scale == "predicted":
        try:
            check_optimizer(optimizer)
        except ValueError as e:
            raise UserError(f"--fp8 {c.fp8} cannot predict weight scales: {e}; or use --fp8 tensor") from None
    weights = [layer.weight for layer in model.linears()]
    return WeightScales(weights, model.recipe.weight_scale, c.rescale_interval)


def requantize(model, scales, shards=None):
    """Make the FP8 copies of all weights anew; with shards, of those that this rank owns."""
    for i, layer in enumerate(model.linears()):
        if shards is None or shards.mine(layer.weight):
            layer.requantize(None if scales is None else scales.scale[i])


def update_weights(optimizer, model, scales, lr, update, c, shards=None):
    """Take optimizer step number `update`, from 1, and make the FP8 copies of the new weights.

    A predicted scale is known before the step, so FP8AdamW writes the copies along with the weights. A measured
    one, at each step or once in --rescale_interval, has to wait for the new weights, and so have the copies.
    """
    measured = scales is None or scales.measures(update)
    if not measured:
        scales.update(lr, (c.beta1, c.beta2), c.weight_decay, update)
    optimizer.step()
    if scales and measured:
        scales.update(lr, (c.beta1, c.beta2), c.weight_decay, update)
    if measured or not getattr(optimizer, "layers", None):   # else FP8AdamW has written the copies
        requantize(model, scales, shards)
    if shards:
        shards.share(scales, measured)


# ------------------------------------------------------------------------------------------------------------
# The loop

@dataclass
class Progress:
    """Where a run is. Beside weights, moments and scales a checkpoint holds no more: nothing random is drawn while
    training, and the step says which data come next."""
    step: int = 0               # steps done
    updates: int = 0            # those that changed the weights: Adam's count
    skipped: int = 0            # those that did not
    best: tuple = (1e30, 0)     # the best validation loss, and its step
    norms: list = field(default_factory=list)   # of the gradient, in the last 100 updates


def learning_rate(step, c):
    """Return that of optimizer step `step`, from 0: linear warm-up, then a cosine to a tenth of the peak."""
    if step < c.warmup:
        return c.lr * (step + 1) / (c.warmup + 1)
    progress = (step - c.warmup) / max(c.steps - c.warmup, 1)
    return c.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(progress, 1))))


def make_model(c, device, vocab=None):
    """Return the Transformer. On a GPU BF16 is compiled whole; under FP8 model.py compiles what is not ours."""
    preset = PRESETS[c.model]
    try:
        with torch.device(device):
            config = replace(preset, layers=c.layers, seq=c.seq, vocab=vocab or preset.vocab)
            model = Transformer(config, c.fp8, c.recompute)
    except ValueError as e:
        raise UserError(e) from None
    torch.compiler.set_stance("force_eager" if c.eager else "default")
    if device.type == "cuda" and c.fp8 == "none" and not c.eager:
        model.compile(dynamic=False)
    return model


def build(c, device):
    """Return (model, training Batches, validation Batches). UserError for what is wrong with data or shapes."""
    try:
        train_tokens, val_tokens, vocab = open_data(c.data)
    except OSError as e:
        raise UserError(f"--data: {e.filename} cannot be read ({e.strerror}): check its permissions") from None
    torch.manual_seed(c.seed)
    model = make_model(c, device, vocab)
    return model, *(Batches(tokens, c, model.config.vocab) for tokens in (train_tokens, val_tokens))


def forward_backward(model, batches, step, c, ranks, shards=None, watching=False):
    """Compute the gradients of one optimizer step, averaged over micro-batches and ranks.

    Return this rank's share of the mean loss. With `watching`, the layers record what quantizing changes, in the
    last micro-batch alone, because that takes time.
    """
    loss_sum = torch.zeros((), device=ranks.device)
    mine = range(ranks.rank, c.accum, ranks.world)
    for micro in mine:
        tokens, targets = batches.step(step, micro, ranks.device)
        sends = ranks.world > 1 and micro == mine[-1]
        for layer in getattr(model, "module", model).linears():
            layer.accumulates = not sends   # DDP and shards wait for gradients in autograd's hooks
            layer.health = {} if watching and layer.recipe and micro == mine[-1] else None
        if shards:
            shards.sending = sends
        with model.no_sync() if ranks.world > 1 and not shards and not sends else nullcontext():
            loss = model(tokens, targets)
            (loss / len(mine)).backward()   # DDP averages over the ranks, and so do shards
        loss_sum += loss.detach() / c.accum
    return loss_sum


@torch.no_grad()
def evaluate(model, batches, ranks):
    """Return the mean validation loss in nats per token, over all ranks."""
    total = torch.zeros((), device=ranks.device)
    for i in range(ranks.rank, batches.config.eval_batches, ranks.world):
        total += model(*batches.evaluation(i, ranks.device))
    return all_reduce(total).item() / batches.config.eval_batches


def train(config):
    """Make the whole run. Return its summary; None if nothing was left to do, or if a signal ended it."""
    with ExitStack() as files:   # closes log and lock
        return run(config, start_ranks(config.device), files)


def run(config, ranks, files):
    device, main, say, out = ranks.device, ranks.rank == 0, ranks.say, Path(config.out)
    out = out.resolve() if out.is_symlink() else out   # an earlier run is renamed where it lies
    saved = newest_checkpoint(out, ranks) if config.resume else None
    if saved:
        recall(config, saved["config"], say)
    elif config.resume:
        say(f"note: there is no checkpoint in {out} yet: the run begins")
    c = resolve(config, device, ranks.world)
    progress = Progress(**saved["progress"]) if saved else Progress()
    if progress.step >= c.steps:
        say(f"{saved['path']} is at step {progress.step} of {c.steps}: the run is done; raise --steps to go on")
        return None
    check_folders(c)
    model, train_batches, val_batches = build(c, device)
    read = [len(train_batches.tokens), len(val_batches.tokens)]
    check_same([asdict(replace(c, device=None, data=None, out=None)), read],   # paths may differ between nodes
               "options or data: start all with the same command, and give every node all files of --data")
    if saved:
        state = load_state(saved, model)
        restore_weights(state, model)
    for p in model.parameters() if ranks.world > 1 else ():
        dist.broadcast(p.data, 0)   # from one seed, GPUs of two kinds draw two sets of numbers
    owner = owners(model, ranks.world)
    shards = Shards(model, owner, ranks) if c.shard and ranks.world > 1 else None
    optimizer = make_optimizer(model, c, shards)
    scales = make_scales(model, optimizer, c)
    if saved:
        restore_training(state, saved, model, optimizer, scales, progress, c, read, say)
        del state
    requantize(model, scales, shards)
    if shards:
        shards.share(scales, measured=True)
    ddp = data_parallel(model, device) if ranks.world > 1 and not shards else model

    say("config  " + "  ".join(f"{k}={v}" for k, v in asdict(c).items()))
    size = sum(p.numel() for p in model.parameters())
    say(f"model   {c.model}: {size:,} parameters, vocabulary {model.config.vocab}")
    say("data    {:,} training and {:,} validation tokens of {}".format(*read, c.data or "Python's own source"))
    say(f"fp8     {c.fp8}: {numerics(c.fp8, device)}")
    if saved:
        say(f"resumed {saved['path']}, written by {len(saved['files'])} ranks, on {ranks.world}")
    stop.in_loop = True
    val_loss = evaluate(model, val_batches, ranks)
    say(f"step {progress.step:>{len(str(c.steps))}}/{c.steps}  validation loss {val_loss:.4f}")

    # From here on files are written.
    log = Log(out, c, ranks, progress.step, files) if main else None
    saver = Saver(out, c.keep, ranks)
    trained = [p for p in model.parameters() if p.requires_grad and (not shards or shards.mine(p))]
    tokens_per_step, first_step, in_a_row, stopping = c.accum * c.batch * c.seq, progress.step, 0, False
    started, last_step, last_time = time.perf_counter(), first_step, time.perf_counter()
    while progress.step < c.steps and not stopping:
        step, lr = progress.step, learning_rate(progress.step, c)
        for group in optimizer.param_groups:
            group["lr"] = lr
        logging = (step + 1) % c.log_every == 0 or step + 1 == c.steps
        loss = forward_backward(ddp, train_batches, step, c, ranks, shards, watching=logging)
        if device.type == "cuda":   # which is still busy; from here on this process waits for it
            train_batches.prefetch(step + 1, ranks.rank, device)
        health = scale_health(model, scales, shards) if logging else {}
        norm = shards.norm() if shards else get_total_norm([p.grad for p in trained if p.grad is not None])
        # All ranks learn the mean loss, whether one was told to stop, and how many have written their part of a
        # checkpoint: the one wait for the GPU in a step.
        flags = torch.tensor([float(stop.received), float(saver.written())], device=device)
        shared = all_reduce(torch.cat((loss.view(1), flags)))
        loss, stopping, written, norm_value = torch.cat((shared, norm.view(1))).tolist()

        spike = len(progress.norms) >= 20 and norm_value > (c.spike or 1e30) * statistics.median(progress.norms)
        if math.isfinite(loss) and math.isfinite(norm_value) and not spike:
            progress.updates, in_a_row = progress.updates + 1, 0
            progress.norms = [*progress.norms[-99:], norm_value]
            clip_grads_with_norm_(trained, c.clip, norm)
            update_weights(optimizer, model, scales, lr, progress.updates, c, shards)
        else:
            progress.skipped, in_a_row = progress.skipped + 1, in_a_row + 1
            say(f"step {step + 1}: loss {loss}, gradient norm {norm_value}: skipped, the weights stay")
            if in_a_row >= c.max_skips:
                saver.finish()
                first = first_non_finite(model, *train_batches.step(step, ranks.rank, device))
                raise RunError(f"{in_a_row} steps in a row had to be skipped, first {first}: lower --lr or look "
                               f"at the data; {last_good(out)}")
        model.zero_grad(set_to_none=ddp is model)   # DDP: the gradients stay in its buckets, one copy
        progress.step = step = step + 1

        evaluating = step % c.eval_every == 0 or step == c.steps
        if evaluating:
            val_loss = evaluate(model, val_batches, ranks)
            progress.best = min(progress.best, (val_loss, step))
            check_same(scales and scales.scale.tolist(), "weight scales: do all run the same code?")
        if (evaluating or stopping) and not in_a_row:   # what skips steps is not worth keeping
            saver.save(own_state(model, optimizer, owner, scales, ranks),
                       {"step": step, "progress": asdict(progress), "read": read, "config": asdict(c),
                        "model_config": asdict(model.config)})
        elif written == ranks.world:
            saver.finish()
        if logging or evaluating or stopping:
            speed = (step - last_step) * tokens_per_step / (time.perf_counter() - last_time)
            record = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm_value, "skipped": progress.skipped,
                      "tokens_per_s": round(speed, 1), **mfu(model, speed / ranks.world, device), **health,
                      **({"val_loss": val_loss} if evaluating else {})}
            if main:
                log.write(record)
            left = (time.perf_counter() - started) / (step - first_step) * (c.steps - step)
            say(progress_line(record, c, left))
            last_step, last_time = step, time.perf_counter()
    seconds = time.perf_counter() - started
    if not saver.finish():
        raise RunError(f"the last checkpoint is missing: make room in {out}, then go on with --resume")
    if progress.step < c.steps:
        say(f"stopped by a signal; {last_good(out)}; go on with --resume --out {out}")
        return None
    if main:
        say(f"\n--- sample ---\n{sample(model, val_batches, device, c.seed)}\n--- summary ---")
    summary = {"recipe": c.fp8, "numerics": numerics(c.fp8, device), "steps": step,
               "tokens": step * tokens_per_step, "train_loss": round(loss, 4), "val_loss": round(val_loss, 4),
               "skipped_steps": progress.skipped, "time": clock(seconds),
               "tokens_per_s": round((step - first_step) * tokens_per_step / seconds)}
    if device.type == "cuda":
        summary["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    for key, value in summary.items():
        say(f"{key:16} {value:,}" if isinstance(value, int) else f"{key:16} {value}")
    return summary


# ------------------------------------------------------------------------------------------------------------
# What is watched

def scale_health(model, scales, shards=None):
    """Return, for the log, predicted / true weight scale (below 1 weights saturate), and the means over the layers
    of the shares of values that saturate or that folding changes (model.py)."""
    health = {}
    if scales is not None:
        ratio = scales.headroom()
        mine = torch.tensor([shards is None or shards.mine(w) for w in scales.weights], device=ratio.device)
        ends = torch.stack([torch.where(mine, end, -math.inf).max() for end in (ratio, -ratio)])
        most, minus_least = (all_reduce(ends, dist.ReduceOp.MAX) if shards else ends).tolist()
        health.update(scale_ratio=most, scale_ratio_min=-minus_least)
    records = [layer.health for layer in model.linears() if layer.health]
    for key in dict.fromkeys(key for record in records for key in record):
        health[key] = torch.stack([record[key] for record in records if key in record]).mean().item()
    for layer in model.linears():
        layer.health = None   # so that no evaluation is counted
    return health


@torch.no_grad()
def first_non_finite(model, tokens, targets):
    """Return what is not finite: the output of the first such layer, else the first gradient from the loss back."""
    bad = []   # hooks and `fused` stay as they are made here: the run ends
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(
                lambda _, __, y, name=name: None if y.isfinite().all() else bad.append(f"the output of {name}"))
    for block in model.blocks:
        block.fused = False   # layer by layer, up to rounding the same numbers
    with torch.compiler.set_stance("force_eager"):   # a compiled model would not call the hooks
        model(tokens, targets)
    for name, p in reversed(list(model.named_parameters())):
        if p.grad is not None and not p.grad.isfinite().all():
            bad.append(f"the gradient of {name}")
    return bad[0] if bad else "the loss or the norm of the gradient"


def clock(seconds):
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{int(seconds) % 60:02}s"


def progress_line(record, c, seconds_left):
    parts = {"loss": "loss {loss:.4f}  lr {lr:.2e}  grad {grad_norm:.2f}  {tokens_per_s:,.0f} tok/s",
             "mfu": "MFU {mfu:.1%}", "scale_ratio": "scale x{scale_ratio:.3f}",
             "saturated": "saturated {saturated:.2%}, {saturated_grad:.2%}",   # of activations, of gradients
             "folded": "folded {folded:.2%}, {folded_grad:.2%}, {folded_wgrad:.2%}",   # and of those in wgrad
             "val_loss": "validation loss {val_loss:.4f}"}
    shown = "  ".join(text.format(**record) for key, text in parts.items() if key in record)
    return f"step {record['step']:>{len(str(c.steps))}}/{c.steps}  {shown}  {clock(seconds_left)} left"


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def numerics(fp8, device):
    """Return in one line what computes the linear layers here, in training and evaluation alike."""
    on = f"on {device_name(device)}"
    if fp8 == "none":
        return f"{'BF16' if device.type == 'cuda' else 'FP32'} {on}"
    why = "without Triton" if device.type == "cuda" and not HAS_TRITON else "which has no FP8 kernels"
    return f"FP8 kernels {on}" if has_fp8_tensor_cores(device) else f"FP8 emulated {on}, {why}"


# Dense BF16 peak in TFLOP/s by the vendors' data sheets, by a part of the device's name: the first match counts.
BF16_PEAK = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H800": 989, "A100": 312,
             "A800": 312, "L40S": 362, "L40": 181, "L4": 121, "4090": 165, "3090": 71}


def mfu(model, tokens_per_s, device):
    """Return {"mfu": the share of the BF16 peak that a rank's FLOPs reach}, {} where the peak is not known."""
    peak = next((1e12 * peak for part, peak in BF16_PEAK.items() if part in device_name(device)), None)
    return {"mfu": round(tokens_per_s * flops_per_token(model) / peak, 4)} if peak else {}


def sample(model, batches, device, seed, prompt=None, count=200):
    """Return what the model writes after `prompt`: "def ", or the first 16 tokens of the validation data."""
    is_text = batches.tokens.dtype == np.uint8
    if is_text:
        ids = list(os.fsencode("def " if prompt is None else prompt))
    elif prompt is None:
        ids = batches.tokens.read(0, min(16, len(batches.tokens))).tolist()
    else:
        ids = [int(word) if re.fullmatch("[0-9]{1,9}", word) else -1 for word in prompt.split()]
    need(0 <= min(ids, default=-1) <= max(ids, default=-1) < model.config.vocab,
         f"--sample {prompt}: this model was trained on token ids below {model.config.vocab}, give some of them")
    generator = torch.Generator(device).manual_seed(seed)
    tokens = model.generate(torch.tensor([ids], device=device), count, generator=generator)[0].tolist()
    return bytes(tokens).decode("utf-8", "replace") if is_text else " ".join(map(str, tokens))


# ------------------------------------------------------------------------------------------------------------
# Data: tokens that lie in files and stay there

class Tokens:
    """Tokens `first` and on, `count` of them, in files that follow each other, read window by window.

    files: list of (path, offset in bytes, tokens); dtype: what one token is in them.
    """

    def __init__(self, files, dtype, first=0, count=None):
        self.files, self.dtype, self.first = [file for file in files if file[2]], np.dtype(dtype), first
        self.ends = np.cumsum([size for _, _, size in self.files], dtype=np.int64)
        self.count = sum(size for _, _, size in files) - first if count is None else count

    def __len__(self):
        return self.count

    def file_of(self, position):
        return int(np.searchsorted(self.ends, self.first + position, side="right"))

    def read(self, start, count):
        """Return tokens start ... start + count - 1 as int64, across file boundaries."""
        pieces, stop = [], start + count
        while start < stop:
            i = self.file_of(start)
            path, offset, _ = self.files[i]
            take = min(stop - start, int(self.ends[i]) - self.first - start)
            skip = self.first + start - (int(self.ends[i]) - self.files[i][2])
            pieces.append(np.memmap(str(path),   # mapped anew each time: a map keeps all pages that it touched
                                    self.dtype, "r", offset + skip * self.dtype.itemsize, (take,)).astype(np.int64))
            start += take
        return np.concatenate(pieces)


def token_file(path):
    """Return ((path, offset, tokens), dtype) of a .npy array, an llm.c shard, nanoGPT's uint16, or text."""
    size, suffix = path.stat().st_size, path.suffix.lower()
    if suffix == ".npy":
        try:
            array = np.load(path, mmap_mode="r")
            need(array.ndim == 1 and array.dtype.kind in "iu", f"--data: {path} holds {array.dtype} of shape "
                 f"{array.shape}: tokens are a one-dimensional array of integers")
        except (ValueError, EOFError, AttributeError) as e:
            raise UserError(f"--data: {path} is no .npy file of tokens ({str(e).partition(chr(10))[0]}): write it "
                            f"with numpy.save") from None
        return (path, getattr(array, "offset", 0), len(array)), array.dtype
    if suffix != ".bin":
        return (path, 0, size), np.dtype(np.uint8)
    header = np.fromfile(path, np.int32, 256)   # of llm.c and modded-nanogpt: magic, version, number of tokens
    is_shard = len(header) > 2 and header[0] == 20240520
    need(size % 2 == 0 and (not is_shard or header[1] == 1 and size == 1024 + 2 * int(header[2])),
         f"--data: {path} has {size} bytes and begins with {header[:3]}: uint16 tokens are read, and whole shards of "
         f"version 1; copy it again")
    return (path, 1024, int(header[2])) if is_shard else (path, 0, size // 2), np.dtype(np.uint16)


def files_below(root):
    """Return the files in a folder and below, behind links as well. OSError for a folder that cannot be read."""
    def fail(error):
        raise error
    found, seen = [], set()
    for folder, below, names in os.walk(root, onerror=fail, followlinks=True):
        new = os.path.realpath(folder) not in seen   # else a link led back here
        seen.add(os.path.realpath(folder))
        below[:] = [n for n in below if new and n not in ("__pycache__", "site-packages") and n[0] != "."]
        found += [Path(folder, name) for name in names if new and name[0] != "."]
    return found


def data_files(source):
    """Return (the files that --data names, each once, in a fixed order; the folder that holds them)."""
    root = Path(source or sysconfig.get_paths()["stdlib"])
    if root.is_dir():
        top, files = root, [p for p in files_below(root) if source or p.suffix == ".py"]
    else:   # one file, or a pattern
        files = [root] if root.exists() else [Path(name) for name in glob.glob(str(root), recursive=True)]
        need(files, f"--data {root} does not exist: give a folder, a file or a pattern, or leave it out")
        if "**" in root.parts:   # glob passes over folders that cannot be read: this does not
            files_below(Path(*itertools.takewhile(lambda part: not glob.has_magic(part), root.parts)))
        top = Path(os.path.commonpath([p.parent for p in files]))
    of_runs = "step_[0-9]+([.].*)?|log[.](jsonl|tmp)"   # names of what runs write
    once = {os.path.realpath(p): p for p in sorted(files, key=lambda p: (-len(p.parts), p.parts)) if p.is_file()
            and not any(re.fullmatch(of_runs, part) for part in p.relative_to(top).parts)}
    files = sorted(once.values(), key=lambda p: p.parts)
    tokens = [p for p in files if p.suffix.lower() in (".bin", ".npy")]
    return tokens or [p for p in files if np.fromfile(p, np.uint8, 1024).all()], top   # text has no zero bytes


def open_data(source):
    """Return (training Tokens, validation Tokens, vocabulary or None if the files do not say) of --data.

    Validation data are token files with the word val, valid or validation in their path below --data, or a text
    file of that name (val.txt). Without these it is a twentieth: of the files, chosen by a checksum of their
    names, if there are at least 40, else of the tokens, the last ones.
    """
    paths, top = data_files(source)
    files, dtypes = zip(*map(token_file, paths)) if paths else ((), ())
    total = sum(count for _, _, count in files)
    need(total, f"--data {source} holds no tokens: .bin and .npy files are read, or text (no zero bytes)")
    need(len(set(dtypes)) == 1, f"--data {source} mixes {' and '.join(sorted({str(d) for d in dtypes}))} tokens: "
                                f"keep one kind per folder")
    dtype, names = dtypes[0], [path.relative_to(top).as_posix() for path in paths]
    word = "val(id|idation)?([.][^/]*)?" if dtype == np.uint8 else r"(.*[\W_])?val(id|idation)?([\W_].*)?"
    held_out = [source is not None and len(paths) > 1 and bool(re.fullmatch(word, n, re.I | re.S)) for n in names]
    if not any(held_out) and len(paths) >= 40:
        held_out = [zlib.crc32(os.fsencode(name)) % 20 == 0 for name in names]
    if any(held_out):
        train, val = (Tokens([file for file, out in zip(files, held_out) if out == wanted], dtype)
                      for wanted in (False, True))
    else:
        cut = int(total * (1 - 0.05))
        train, val = Tokens(files, dtype, 0, cut), Tokens(files, dtype, cut)
    return train, val, 256 if dtype == np.uint8 else None


def shuffled(number, n, keys):
    """Return the place of `number` in a random order of 0 ... n - 1 that is nowhere written down.

    A Feistel network shuffles all numbers of 2 b bits: (left, right) -> (right, left ^ f(right)) can be undone
    whatever f does, so no two numbers meet. One that lands at n or above goes through again until it is below.
    """
    golden = 0x9E3779B97F4A7C15   # 2^64 / golden ratio: a product with it carries every bit into the upper half
    bits = (max(n - 1, 1).bit_length() + 1) // 2   # half of those of a number
    while True:
        for key in keys:
            left, right = number >> bits, number & (1 << bits) - 1
            number = right << bits | left ^ (right + key) * golden >> 32 & (1 << bits) - 1
        if number < n:
            return number


class Batches:
    """Windows of `seq` + 1 tokens: which ones depends on seed and step, never on the number of ranks.

    The data are cut into windows. Every epoch visits each of them once, in an order and with edges of its own.
    """

    def __init__(self, tokens, config, vocab):
        self.tokens, self.config, self.vocab = tokens, config, vocab
        self.windows, self.ready = (len(tokens) - 1) // config.seq, None
        need(self.windows > 0, f"--data has {len(tokens)} tokens for training or validation, fewer than one "
                               f"sequence of --seq {config.seq} + 1: give more data or a shorter --seq")
        self.load(np.linspace(0, len(tokens) - config.seq - 1, 64))   # a wrong vocabulary shows now, not later

    def load(self, starts, device=torch.device("cpu")):
        """Return inputs, targets (B, seq) int64. UserError for a token that the model does not know."""
        windows = np.stack([self.tokens.read(int(start), self.config.seq + 1) for start in starts])
        for i, j in np.argwhere((windows >= self.vocab) | (windows < 0))[:1]:
            path = self.tokens.files[self.tokens.file_of(int(starts[i]) + int(j))][0]
            raise UserError(f"token id {windows[i, j]} in {path} is outside the model's vocabulary of "
                            f"{self.vocab}: is this the right data for --model {self.config.model}?")
        windows = torch.from_numpy(windows)
        if device.type == "cuda":
            windows = windows.pin_memory().to(device, non_blocking=True)
        return windows[:, :-1], windows[:, 1:]

    def start(self, number):
        """Return where window `number`, counted through all epochs, starts."""
        epoch, number = divmod(number, self.windows)
        rng = np.random.default_rng((self.config.seed, epoch))
        edge = int(rng.integers(len(self.tokens) - self.windows * self.config.seq))
        keys = rng.integers(1 << 62, size=4).tolist()
        return edge + self.config.seq * shuffled(number, self.windows, keys)

    def step(self, step, micro, device):
        """Return micro-batch `micro`, counted over all ranks, of a step: the next windows of the epoch's order."""
        ready, self.ready = self.ready, None
        if ready and ready[0] == (step, micro):
            return ready[1]
        first = (step * self.config.accum + micro) * self.config.batch
        return self.load([self.start(first + i) for i in range(self.config.batch)], device)

    def prefetch(self, step, micro, device):
        """Read what `step` will be asked for, while the GPU still computes."""
        self.ready = (step, micro), self.step(step, micro, device)

    def evaluation(self, i, device):
        """Return micro-batch i of eval_batches: evenly spaced windows, the same at every evaluation."""
        c = self.config
        starts = np.linspace(0, len(self.tokens) - c.seq - 1, c.eval_batches * c.batch).astype(np.int64)
        return self.load(starts[i * c.batch:(i + 1) * c.batch], device)


# ------------------------------------------------------------------------------------------------------------
# Several ranks

stop = SimpleNamespace(received=False, in_loop=False)   # what a signal has told this process


def on_signal(*_):
    """SIGINT or SIGTERM ask the loop to finish its step, save and leave. Before it they end the process.

    Further signals change nothing, for schedulers and torchrun send several. kill -9 ends a run at once, and costs
    the steps since the last checkpoint.
    """
    stop.received = True
    if not stop.in_loop:
        raise KeyboardInterrupt


@dataclass
class Ranks:
    rank: int
    world: int
    device: torch.device

    def say(self, text):
        """Print on rank 0. Output that cannot be written, to a full disk or a closed pipe, does not end a run."""
        with suppress(OSError):
            if self.rank == 0:
                print(text)


def start_ranks(name):
    """Return the Ranks of this process, which joins the others if torchrun started it.

    PyTorch keeps the starts of torchrun apart by the number of restarts. (A node that joins or leaves is not
    counted as one: then start all of them anew.)
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    need(re.fullmatch("cpu|cuda(:[0-9]{1,2})?", name), f"--device {name} is unknown: use cpu, cuda or cuda:N")
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
    gpu = device.type == "cuda"
    if gpu:
        needed = max((device.index or 0) + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        need(needed <= torch.cuda.device_count(), f"--device {name}: {needed} GPUs are needed, PyTorch sees "
             f"{torch.cuda.device_count()}: use --device cpu or start fewer ranks")
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return Ranks(0, 1, device)
    try:   # 30 minutes: ranks may wait while a checkpoint is written
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(minutes=30),
                                device_id=device if gpu else None)
    except (ValueError, dist.DistError) as e:
        raise RunError(f"the ranks cannot meet ({str(e).splitlines()[0]}): start them with torchrun, and give "
                       f"each job a --master_port or --rdzv_endpoint of its own") from None
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def all_reduce(tensor, op=dist.ReduceOp.SUM):
    if dist.is_initialized():
        dist.all_reduce(tensor, op)
    return tensor


def gather(thing):
    """Return the list of what all ranks have."""
    things = [thing] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(things, thing)
    return things


def check_same(thing, what):
    if any(other != thing for other in gather(thing)):
        raise RunError(f"the ranks have different {what}")


def data_parallel(model, device):
    """Return DDP. Micro-batches are summed in FP32; on GPUs the sum travels in BF16, during the backward pass."""
    gpu = device.type == "cuda"
    for p in model.parameters():   # for DDP's buckets; those of a first micro-batch would lie beside them
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    # On CPUs, looking for unused parameters keeps DDP from another order of its sums after the first step, which
    # a resumed run would not have had. (On GPUs attention alone makes two runs differ.)
    ddp = DistributedDataParallel(model, device_ids=[device.index] if gpu else None, init_sync=False,
                                  gradient_as_bucket_view=True, find_unused_parameters=not gpu)
    if gpu:
        ddp.register_comm_hook(None, bf16_compress_hook)
    return ddp


def owners(model, world):
    """Return {parameter: its rank}, which writes it to checkpoints and with --shard owns it: the largest first, each
    to the least loaded rank."""
    owner, load = {}, [0] * world
    for p in sorted(model.parameters(), key=lambda p: -p.numel()):
        owner[p] = load.index(min(load))
        load[owner[p]] += p.numel()
    return owner


class Shards:
    """ZeRO stage 1 by whole parameters: each has one rank that keeps its FP32 weights and moments and steps them.

        after backward   gradients: summed in BF16 (FP32 on a CPU), sent to the owner during the backward pass
        after the step   quantized weights: W in FP8 from the owner to all, each of which makes its W^T of it;
                         embedding, head and norms in BF16 (FP32 on a CPU), in which the model computes with them

    Scales are predicted, by the same arithmetic on all ranks. Only where they are measured are they exchanged.
    """

    def __init__(self, model, owner, ranks):
        self.owner, self.ranks, self.sent, self.sending = owner, ranks, [], False
        self.layers = {layer.weight: layer for layer in model.linears() if layer.recipe}
        self.dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
        self.parameters = list(model.parameters())
        need(ranks.world <= len(self.parameters), f"--shard: {ranks.world} ranks are more than the "
             f"{len(self.parameters)} parameters to own: use fewer ranks, or leave --shard out")
        for p in self.parameters:
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(self.send)
            if p in self.layers and not self.mine(p):
                p.data = p.data.new_zeros(1, 1).expand(p.shape)   # a shape without the numbers

    def mine(self, p):
        return self.owner[p] == self.ranks.rank

    def send(self, p):
        """Called in the backward pass when the gradient of p is complete; the last micro-batch's goes out."""
        if not self.sending:
            return
        gradient = p.grad.to(self.dtype) / self.ranks.world
        p.grad = p.grad if self.mine(p) else p.detach()   # no memory, but WeightScales sees that there was one
        self.sent.append((p, gradient, dist.reduce(gradient, self.owner[p], async_op=True)))
        if len(self.sent) > 8:   # waits for the oldest, mostly long since there, to free its memory
            self.receive(*self.sent.pop(0))

    def receive(self, p, gradient, work):
        work.wait()
        if self.mine(p):
            p.grad.copy_(gradient)

    def norm(self):
        """Wait for the gradients. Return the norm of all of them, also of those that other ranks own."""
        while self.sent:
            self.receive(*self.sent.pop(0))
        zero = torch.zeros((), device=self.ranks.device)
        norms = [get_total_norm([p.grad]) if self.mine(p) and p.grad is not None else zero
                 for p in self.parameters]
        return torch.linalg.vector_norm(all_reduce(torch.stack(norms)))

    def share(self, scales, measured):
        """Send what the owners have to all ranks, after a step or at the start."""
        if measured:   # the weights that a rank does not own look like zeros to it
            all_reduce(scales.scale, dist.ReduceOp.MAX)
        for w, scale in zip(scales.weights, scales.scale.view(-1, 1, 1)):
            if w in self.layers and self.layers[w].copies is None:
                data = torch.empty(w.shape, dtype=E4M3.dtype, device=w.device)
                self.layers[w].set_copies((Quantized(data, scale, (ALL, ALL)), None))
        rest = {p: p.data.to(self.dtype) for p in self.parameters if p not in self.layers}
        sent = {p: layer.copies[0].data.view(torch.uint8) for p, layer in self.layers.items()} | rest
        for work in [dist.broadcast(data, self.owner[p], async_op=True) for p, data in sent.items()]:
            work.wait()
        for p in sent:
            if not self.mine(p) and p in rest:
                p.data.copy_(rest[p])
            elif not self.mine(p):
                w = self.layers[p].copies[0]
                self.layers[p].set_copies((w, Quantized(transpose(w.data), w.scale, w.block)))


# ------------------------------------------------------------------------------------------------------------
# The run's folder: checkpoints and log

def checkpoints(out):
    """Return the checkpoints in a folder, which are folders step_00000100 and so on, the newest first."""
    found = [path for path in out.glob("step_*") if re.fullmatch("step_[0-9]+", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def last_good(out):
    return f"{checkpoints(out)[0]} is the last good checkpoint" if checkpoints(out) else "nothing was saved yet"


def on_cpu(state):
    """Return a copy of nested dicts whose tensors lie in the CPU's memory. Training waits for it: for 10 GB one
    thread takes 6 s, and eight take 0.8 s."""
    if isinstance(state, dict):
        return {key: on_cpu(value) for key, value in state.items()}
    if not isinstance(state, torch.Tensor):
        return state
    copy = torch.empty(state.shape, dtype=state.dtype)
    parts = (t.reshape(-1).chunk(8 if t.numel() > 2**20 else 1) for t in (copy, state.detach()))
    with ThreadPoolExecutor(8) as pool:   # zero_ touches memory that is new, which takes longer than copying
        list(pool.map(lambda new, old: new.zero_().copy_(old), *parts))
    return copy


def own_state(model, optimizer, owner, scales, ranks):
    """Return what this rank writes to a checkpoint: weight and moments of the parameters that it owns, by name."""
    own = {name: {"weight": p.data, **optimizer.state.get(p, {})}
           for name, p in model.named_parameters() if owner[p] == ranks.rank}
    return on_cpu({"parameters": own, "scales": scales.state_dict() if scales and ranks.rank == 0 else None})


def sums(path):
    """Return [size in bytes, CRC32] of a file."""
    data = np.memmap(path, mode="r")
    return [len(data), zlib.crc32(data)]


class Saver:
    """Write checkpoints in the background, while training goes on. All ranks call its methods together.

    Each rank writes a file with what it owns into step_00000100.tmp/. When the files of all are whole, rank 0
    writes manifest.json, with their sizes and checksums, and renames the folder: a crash leaves a whole checkpoint
    or none.
    """

    def __init__(self, out, keep, ranks):
        self.out, self.keep, self.ranks, self.thread, self.ok = out, keep, ranks, None, True

    def save(self, own, content):
        """Begin to write. `own` must not change any more; `content` goes into the manifest."""
        self.finish()
        self.content, self.folder = content, self.out / f"step_{content['step']:08}.tmp"
        self.thread = threading.Thread(target=self.write, args=(own,))
        self.thread.start()

    def write(self, own):
        try:
            self.folder.mkdir(exist_ok=True)
            path = self.folder / f"rank_{self.ranks.rank}.pt"
            torch.save(own, path)
            with open(path) as f:
                os.fsync(f.fileno())
            self.result = {path.name: sums(path)}
        except Exception as e:   # a full disk is a RuntimeError of torch.save; nothing may pass for success here
            self.result = f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"

    def written(self):
        """Return whether this rank has written its file of a checkpoint that is not finished yet."""
        return self.thread is not None and not self.thread.is_alive()

    def finish(self):
        """Wait until the checkpoint that was begun is whole, or has failed. Return whether it was saved."""
        if self.thread is None:
            return self.ok
        self.thread.join()
        self.thread, results = None, gather(self.result)
        error = next((result for result in results if isinstance(result, str)), None)
        if not error:   # the rest is rank 0's
            error = gather(self.commit(results) if self.ranks.rank == 0 else None)[0]
        self.ok = error is None
        if error:
            self.ranks.say(f"warning: the checkpoint of step {self.content['step']} could not be written ({error}): "
                           f"make room in {self.out}; {last_good(self.out)}")
            shutil.rmtree(self.folder, ignore_errors=True)
        return self.ok

    def commit(self, results):
        """Write the manifest, rename the folder, remove old ones. Return an error as text, or None."""
        content = {**self.content, "files": {name: read for result in results for name, read in result.items()}}
        try:
            with open(self.folder / "manifest.json", "w") as f:
                json.dump({"checksum": zlib.crc32(json.dumps(content).encode()), "content": content}, f)
                f.flush()
                os.fsync(f.fileno())
            os.rename(self.folder, self.folder.with_suffix(""))
            for old in checkpoints(self.out)[self.keep:]:
                if int(old.name[5:]) != content["progress"]["best"][1]:
                    gone = old.rename(old.with_suffix(".tmp"))   # what is half removed must not look whole
                    threading.Thread(target=shutil.rmtree, args=(gone, True)).start()
        except OSError as e:
            return f"{type(e).__name__}: {e.strerror}"


def read_manifest(path):
    """Return its content. ValueError if it is not what was written, or if the folder has the name of another step."""
    manifest = json.loads((path / "manifest.json").read_text())
    content = manifest["content"]
    if zlib.crc32(json.dumps(content).encode()) != manifest["checksum"]:
        raise ValueError("the checksum of its manifest is wrong")
    if content["step"] != int(path.name[5:]):
        raise ValueError(f"it was written as that of step {content['step']}")
    return {**content, "path": path}


def newest_checkpoint(out, ranks):
    """Return the manifest of the newest checkpoint that is whole, None where there is none. Ranks share the reading.

    UserError if none of several is whole, RunError if the ranks do not see the same folder.
    """
    found = checkpoints(out)
    check_same([path.name for path in found], f"checkpoints: --out {out} has to be a folder that all nodes see")
    for path in found:
        try:
            saved, reason = read_manifest(path), None
            for i, (name, written) in enumerate(saved["files"].items()):
                if i % ranks.world == ranks.rank and sums(path / name) != written:
                    reason = f"{name} is not what was written"
        except (OSError, ValueError, LookupError, TypeError) as e:
            reason = str(e) if type(e) is ValueError else type(e).__name__
        reason = next(filter(None, gather(reason)), None)
        if not reason:
            return saved
        ranks.say(f"note: {path} is damaged ({reason}); looking for the one before it")
    need(not found, f"no checkpoint in {out} is whole: restore one from a copy, or train without --resume")


def load_state(saved, model):
    """Return {"parameters": by name, "scales"} of a checkpoint; what is not used is not read from its files."""
    for name, value in asdict(model.config).items():
        was = saved["model_config"].get(name, value)
        need(name == "seq" or was == value, f"{saved['path']} holds a model with {name} = {was}, but {name} = {value} "
             f"is asked for: use the --model and --data that it was trained with")
    parts = [torch.load(saved["path"] / name, map_location="cpu", weights_only=True, mmap=True)
             for name in saved["files"]]
    return {"parameters": {name: kept for part in parts for name, kept in part["parameters"].items()},
            "scales": next((part["scales"] for part in parts if part["scales"]), None)}


@torch.no_grad()
def restore_weights(state, model):
    for name, p in model.named_parameters():
        p.copy_(state["parameters"][name]["weight"])


def restore_scales(state, saved, scales, c):
    """Restore the weight scales bit for bit, or a resumed run would differ from an uninterrupted one. Measure them
    if the recipe is another one now, or if a weight exceeds what its scale allows."""
    if scales:
        if saved["config"]["fp8"] == c.fp8:
            scales.load_state_dict(state["scales"])
        exceeded = all_reduce(-scales.headroom().min(), dist.ReduceOp.MAX) > -1   # on any rank
        if saved["config"]["fp8"] != c.fp8 or exceeded:
            scales.rescale()


def restore_training(state, saved, model, optimizer, scales, progress, c, read, say):
    """Restore moments and scales, as far as they hold under the options and data of today."""
    changed = {name for name, value in saved["config"].items() if getattr(c, name, value) != value}
    if saved["read"] != read:
        say("note: --data held {:,} training and {:,} validation tokens, and now holds {:,} and {:,}".format(
            *saved["read"], *read))
    same_loss = saved["read"] == read and not changed & {"data", "seq", "batch", "eval_batches"}
    progress.best = tuple(progress.best) if same_loss else Progress.best
    if changed & {"beta1", "beta2"}:   # no bound of Adam's steps holds for moments of two kinds
        say("note: Adam's moments begin anew, for they were means under other betas")
        progress.updates = 0
    names = {p: name for name, p in model.named_parameters()}
    for group in optimizer.param_groups if progress.updates else ():   # settings are those of this run
        for p in group["params"]:
            for key, value in state["parameters"][names[p]].items():
                if key != "weight":   # a step count lies on the CPU, but for PyTorch's fused AdamW
                    device = p.device if key != "step" or group.get("fused") else "cpu"
                    optimizer.state[p][key] = value.to(device, copy=True)
    restore_scales(state, saved, scales, c)


def check_folders(c):
    """UserError for folders that cannot be written, or whose renaming would take other things along."""
    for option, folder in (("out", c.out), ("tensorboard", c.tensorboard)):
        path = Path(folder or ".").absolute()
        nearest = next(p for p in (path, *path.parents) if p.exists())
        need(nearest.is_dir() and os.access(nearest, os.W_OK),
             f"--{option} {folder} cannot be written, because of {nearest}: choose another folder")
    for path in (Path.cwd(), Path(c.data or ".")):
        need(not path.resolve().is_relative_to(Path(c.out).resolve()), f"--out {c.out} holds {path}, and is renamed "
             f"when another run begins in it: give a folder of its own")
    need(not c.tensorboard or find_spec("tensorboard"),
         "--tensorboard needs tensorboard: pip install tensorboard, or leave it out")


def lock(out, files):
    """Lock a folder for this run, until `files` closes. UserError if another run holds it."""
    with suppress(ImportError):   # Windows
        import fcntl
        held = files.enter_context(open(out / ".lock", "a"))
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {out} is in use by another run: give each run a folder of its own") from None
        except OSError:   # a file system without locks: do without
            pass


def read_log(path):
    """Return (line, record) for the lines of a log. The record is {} for what a user wrote; a last line that a crash
    cut short is left out."""
    pairs = []
    for line in path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else ():
        record = None
        with suppress(ValueError):
            record = json.loads(line)
        if line.endswith("\n"):
            pairs.append((line, record if isinstance(record, dict) else {}))
    return pairs


class Log:
    """log.jsonl in a folder that is this run's alone, and tensorboard's copy of it."""

    def __init__(self, out, c, ranks, step, files):
        """Move an earlier run aside, or cut off what it left after its last checkpoint, that of `step`."""
        self.say, path = ranks.say, out / "log.jsonl"
        name = device_name(ranks.device) if ranks.device.type == "cuda" else f"{os.cpu_count()} CPU cores"
        self.about = {   # what one has to know to repeat the run, in the first line
            "command": shlex.join(sys.argv), "config": asdict(c), "hardware": f"{ranks.world} x {name}",
            "torch": torch.__version__, "triton": sys.modules["triton"].__version__ if HAS_TRITON else None,
            "python": sys.version.split()[0]}
        try:
            if out.exists():
                lock(out, files)
            if not c.resume and (path.exists() or checkpoints(out)):
                names = (out.with_name(f"{out.name}.{n}") for n in itertools.count(1))
                earlier = out.rename(next(name for name in names if not name.exists()))
                self.say(f"an earlier run in {out} was moved to {earlier}")
            if not out.exists():
                out.mkdir(parents=True)
                lock(out, files)
            for unfinished in out.glob("step_*.tmp"):
                shutil.rmtree(unfinished)
            for newer in checkpoints(out):
                if int(newer.name[5:]) > step:   # damaged, else it would have been taken
                    self.say(f"note: {newer} is now called {newer.rename(newer.with_suffix('.damaged')).name}")
            kept = [line for line, record in read_log(path) if record.get("step", 0) <= step]
            path.with_suffix(".tmp").write_text("".join(kept))
            os.replace(path.with_suffix(".tmp"), path)
            self.file, self.board = files.enter_context(open(path, "a", buffering=1)), None
            if c.tensorboard:
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(c.tensorboard, purge_step=step + 1 if c.resume else None)
        except OSError as e:
            raise UserError(f"--out {out} cannot be written ({e.strerror}): choose another folder") from None

    def write(self, record):
        finite = {key: value if math.isfinite(value) else None for key, value in record.items()}   # JSON has no NaN
        where = "the log"
        try:
            self.file.write(json.dumps({**finite, **self.about}) + "\n")
            self.about, where = {}, "--tensorboard"
            for key, value in record.items() if self.board else ():
                self.board.add_scalar(key, value, record["step"])
        except OSError as e:
            self.say(f"warning: step {record['step']} is not in {where} ({e.strerror}): make room for it")


# ------------------------------------------------------------------------------------------------------------
# Instead of training: what a checkpoint can do, what the logs show, how fast a step is

def report(c, ranks):
    """--eval_only and --sample, of the newest whole checkpoint. Writes nothing.

    Several recipes in --fp8 are compared at the same weights, where chance has no part: the loss, and the error of
    the gradient of that, ||g - g_first|| / ||g_first||, with g_first of the first recipe.
    """
    saved = newest_checkpoint(Path(c.out), ranks)
    need(saved, f"there is no checkpoint in {c.out}: check --out, or train first")
    recall(c, saved["config"], ranks.say)
    c, first = resolve(c, ranks.device, 1), None
    recipes = [replace(c, fp8=fp8) for fp8 in c.fp8.split(",")]
    need(len(recipes) == 1 or ranks.world == 1, "--eval-only of several recipes: run it without torchrun")
    model, _, batches = build(recipes[0], ranks.device)
    for recipe in recipes:
        model = model or make_model(recipe, ranks.device, batches.vocab)   # the first is there
        state = load_state(saved, model)
        restore_weights(state, model)
        scales = make_scales(model, make_optimizer(model, recipe), recipe)
        restore_scales(state, saved, scales, recipe)
        requantize(model, scales)
        if c.sample is not None:
            ranks.say(sample(model, batches, ranks.device, c.seed, c.sample))
        elif len(recipes) == 1:
            loss = evaluate(model, batches, ranks)
            ranks.say(f"{saved['path']}: step {saved['step']}, validation loss {loss:.4f}, perplexity "
                      f"{np.exp(loss):.3f}, {numerics(c.fp8, ranks.device)}")
        else:
            loss = 0.0
            for i in range(c.eval_batches):   # gradients add up
                one = model(*batches.evaluation(i, ranks.device)) / c.eval_batches
                one.backward()
                loss += one.item()
            gradient = [p.grad for p in model.parameters()]
            first = first or gradient
            error = get_total_norm([g - g0 for g, g0 in zip(gradient, first)]) / get_total_norm(first)
            ranks.say(f"{saved['path']}  {recipe.fp8:8}  loss {loss:.4f}  gradient {error:.2%} off")
        model = gradient = None
        gc.collect()   # a compiled model refers to itself: the next one needs its memory


def plot_runs(folders, path):
    """Draw training losses as lines, validation losses as dots, of the runs in these folders; earlier ones wider."""
    with picture(path, yscale="log", xlabel="step", ylabel="loss in nats per token; dots: validation") as axes:
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:.3g}")
        axes.yaxis.set_minor_formatter(lambda y, _: f"{y:.3g}")
        for behind, folder in zip(reversed(range(len(folders))), folders):
            records = [record for _, record in read_log(folder / "log.jsonl") if "loss" in record]
            need(records, f"--plot: {folder} has no log to draw: give the folders of runs as --out a,b")
            steps, losses, val_losses = ([r.get(key) for r in records] for key in ("step", "loss", "val_loss"))
            line, = axes.plot(steps, losses, label=folder.name, lw=1 + 2 * behind)
            axes.plot(steps, val_losses, "o", ms=4 + 3 * behind, color=line.get_color())


COLUMNS = {  # of the table that --bench prints: format
    "fwd+bwd ms": "12.2f", "optimizer ms": "14.2f", "tokens/s": "12,.0f", "MFU": "8.1%", "x none": "8.3f",
    "peak GiB": "10.2f", "kept GiB": "10.3f", "compile s": "11.1f"}


def bench(c, device):
    """Time the recipes one after another on random tokens. Return {name: its row of COLUMNS}. Writes no files.

    Medians: forward + backward of a micro-batch; the optimizer's step. tokens/s and MFU count --accum of the first and
    one of the second, `x none` the first alone. `kept` is what a forward pass leaves for the backward pass, and
    `compile` what the first step took longer than the others.
    """
    print(f"{device_name(device)}, PyTorch {torch.__version__}; {c.model}, {c.layers} layers, {c.batch} x {c.seq} "
          f"tokens, recompute {c.recompute}; medians of {c.steps} steps\n\nrecipe  "
          + "".join(f"{title:>{re.match('[0-9]+', form)[0]}}" for title, form in COLUMNS.items()))
    rows = {}
    for fp8 in c.fp8.split(","):
        rows[fp8] = row = bench_recipe(replace(c, fp8=fp8), device)
        gc.collect()   # a compiled model refers to itself: its weights would count as the next one's memory
        row["x none"] = rows["none"]["fwd+bwd ms"] / row["fwd+bwd ms"] if "none" in rows else math.nan
        print(f"{fp8:8}" + "".join(f"{row[title]:{form}}" for title, form in COLUMNS.items()), flush=True)
    return rows


def bench_recipe(c, device):
    torch.manual_seed(c.seed)
    model = make_model(c, device)
    optimizer = make_optimizer(model, c)
    scales = make_scales(model, optimizer, c)
    requantize(model, scales)
    inputs, targets = torch.randint(model.config.vocab, (2, c.batch, c.seq), device=device)
    gpu, times = device.type == "cuda", []
    wait, memory = (torch.cuda.synchronize, torch.cuda.memory_allocated) if gpu else (lambda: None, lambda: math.nan)
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    for step in range(c.steps + 3):   # the first three warm up
        wait()
        start, before = time.perf_counter(), memory()
        loss = model(inputs, targets)
        kept = memory() - before
        loss.backward()
        wait()
        middle = time.perf_counter()
        update_weights(optimizer, model, scales, c.lr, step + 1, c)
        wait()
        times.append((middle - start, time.perf_counter() - middle))
        optimizer.zero_grad()
    forward_backward, update = (statistics.median(column) for column in zip(*times[3:]))
    tokens, seconds = c.accum * c.batch * c.seq, c.accum * forward_backward + update
    return {"fwd+bwd ms": 1e3 * forward_backward, "optimizer ms": 1e3 * update, "tokens/s": tokens / seconds,
            "MFU": mfu(model, tokens / seconds, device).get("mfu", math.nan), "kept GiB": kept / 2**30,
            "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if gpu else math.nan,
            "compile s": times[0][0] - forward_backward}


def main(argv=None):
    """Run the command line. Return the exit code."""
    try:
        config = parse_config(argv)
        if config.plot:
            plot_runs([Path(folder) for folder in config.out.split(",")], config.plot)
        elif config.bench:
            device = start_ranks(config.device).device
            bench(resolve(config, device, 1), device)
        elif config.eval_only or config.sample is not None:
            report(config, start_ranks(config.device))
        else:
            train(config)
        return 0
    except KeyboardInterrupt:
        code, message = 0, "stopped by a signal before the first step"
    except UserError as e:
        code, message = 2, f"error: {e}"
    except (RunError, OSError) as e:
        code, message = 1, f"error: {e}"
    except (MemoryError, RuntimeError) as e:   # torch.OutOfMemoryError is a RuntimeError; on a CPU it has no name
        code, reason = 1, str(e).split("\n")[0].split(". ")[0][:160]
        if re.search("out of memory|DefaultCPUAllocator", str(e)) or isinstance(e, MemoryError):
            message = (f"error: {reason or 'out of memory'}: halve --batch and double --accum, which trains the same "
                       f"in less memory, or add --recompute block; python model.py counts what models need")
        elif "RANK" in os.environ and re.search("connection|gloo|nccl", str(e), re.IGNORECASE):
            message = (f"error: another rank is gone or cannot be reached ({reason}): its messages say why; torchrun "
                       f"--max-restarts with --resume goes on from the last checkpoint")
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
    try:
        sys.stdout and sys.stdout.flush()
    except OSError:   # Python would try once more, and exit with another code
        sys.stdout = None
    if dist.is_initialized() and code:   # the others wait in a collective, and NCCL would wait for them
        for thread in threading.enumerate():
            if thread is not threading.main_thread() and not thread.daemon:   # a checkpoint is being written
                thread.join()
        sys.stderr.flush()
        os._exit(code)
    if dist.is_initialized():
        gc.collect()   # frees DDP: what still holds the process group keeps its threads running into Python's end
        dist.destroy_process_group()
    sys.exit(code)
