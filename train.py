"""
Trains a language model in FP8.

    python train.py --fp8 moss                         # any machine, no data needed: learns Python's own source text
    python train.py --fp8 none                         # the same run in BF16 (FP32 on a CPU), to compare with
    python train.py --model 1b --data tokens/          # a preset of model.py on your own data
    torchrun --nproc_per_node 8 train.py --model 1b --data tokens/ --accum 64                # eight GPUs of one node
    torchrun --nnodes 4 --nproc_per_node 8 --max-restarts 3 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py ...
    python train.py --resume                           # go on from the newest checkpoint in out/

Options are the fields of Config below; `--help` lists them. Runs that differ in `--fp8` alone see the same data in
the same order from the same initial weights; with the same `--accum`, so do runs on any number of GPUs.
"""

import argparse
import dataclasses
import errno
import functools
import gc
import glob
import io
import itertools
import json
import math
import os
import re
import shlex
import signal
import statistics
import sys
import sysconfig
import threading
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from autoscale import FP8AdamW, WeightScales, check_optimizer
from fp8_formats import E4M3, picture
from microscale import ALL, HAS_TRITON, RECIPES, Quantized, cdiv, has_fp8_tensor_cores, transpose
from model import PRESETS, RECOMPUTE, Linear, Transformer, flops_per_token

if HAS_TRITON:
    import triton


class UserError(Exception):
    """A mistake of the user's: the message names the value, the reason and the fix. Exit code 2."""


class RunError(Exception):
    """The run went wrong and cannot go on. Exit code 1."""


UNREADABLE = (UserError, OSError, ValueError)   # what reading a batch raises where data have gone wrong since the start


# ---------------------------------------------------------------------------------------------------
# Options

def opt(default, help):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass
class Config:
    # what to train
    fp8: str = opt(None, f"recipe of the linear layers: {', '.join(RECIPES)} (default: moss)")
    model: str = opt(None, f"preset: {', '.join(PRESETS)} (default: 124m on a GPU, nano on a CPU)")
    layers: int = opt(None, "blocks of the model (default: the preset's)")
    data: str = opt(None, "folder of .bin, .npy or text files, one such file, or a pattern in quotes: 'tokens/*.bin' "
                          "(default: Python's standard library)")
    out: str = opt("out", "folder for checkpoint and log; an earlier run in it is renamed, never overwritten")
    # how long, how much at a time (defaults: DEFAULTS[model])
    steps: int = opt(None, "optimizer steps of the whole run (default: by preset)")
    batch: int = opt(None, "sequences per micro-batch and rank (default: by preset)")
    accum: int = opt(None, "micro-batches per optimizer step, over all ranks together (default: by preset)")
    seq: int = opt(None, "tokens per sequence (default: the preset's)")
    # optimizer: AdamW
    lr: float = opt(None, "peak learning rate; falls to a tenth along a cosine (default: by preset)")
    warmup: int = opt(None, "steps of linear warm-up (default: a tenth of the steps, at most 2000)")
    beta1: float = opt(0.9, "decay of the gradient's mean")
    beta2: float = opt(0.95, "decay of the gradient's square")
    weight_decay: float = opt(0.1, "decoupled weight decay, not on norms")
    clip: float = opt(1.0, "largest norm of the gradient; a larger one is scaled down to it")
    rescale_interval: int = opt(500, "steps between true rescales of predicted weight scales; 0 = never")
    spike: float = opt(100, "skip a step whose gradient norm is this many times the median of the last 100 (20 at "
                            "least); 0 = never")
    max_skips: int = opt(5, "stop after this many skipped steps in a row: spikes, and losses and gradients not finite")
    # watching and saving
    log_every: int = opt(10, "steps between lines on the terminal and in log.jsonl")
    eval_every: int = opt(None, "steps between evaluations and checkpoints (default: a fifth of all, at most 250)")
    eval_batches: int = opt(16, "micro-batches per evaluation, over all ranks together")
    keep: int = opt(2, "checkpoints to keep; the one of the best validation loss stays, too")
    tensorboard: str = opt(None, "folder to write the log to as well, for tensorboard")
    resume: bool = opt(False, "go on from the newest checkpoint in --out that is whole")
    # time and memory
    recompute: str = opt("none", "made again in the backward pass instead of kept: none, act (of moss, the FP8 inputs "
                                 "of qkv, out and gate_up) or block (all but the inputs of blocks)")
    eager: bool = opt(False, "do without torch.compile, which a GPU uses for what is not FP8")
    # instead of training
    eval_only: bool = opt(False, "report validation loss and perplexity of the newest checkpoint in --out; losses and "
                                 "gradients under several recipes in --fp8 (a,b,c)")
    sample: str = opt(None, "text (or token ids) that the newest checkpoint in --out is to go on with")
    plot: str = opt(None, "FILE.png: draw the losses of the runs in --out (a,b,c); needs matplotlib")
    bench: bool = opt(False, "time the recipes in --fp8 (a,b,c; default: all), --steps (10) on random tokens each")
    # several ranks
    shard: bool = opt(False, "each rank keeps FP32 weights and Adam's moments of its share of the layers only "
                             "(ZeRO-1), and ranks exchange FP8 weights; --fp8 moss")
    # where
    seed: int = opt(1337, "of the initial weights and of the order of the data")
    device: str = opt(None, "cpu, cuda or cuda:N (default: cuda if there is one)")


# Batch and learning rate as the models of these sizes are usually trained; the first two rows fit a coffee break.
DEFAULTS = {
    "nano": dict(batch=32, accum=1, steps=150, lr=4e-3),
    "124m": dict(batch=64, accum=1, steps=600, lr=1e-3),
    "1b": dict(batch=16, accum=64, steps=100_000, lr=4e-4),
    "olmo-7b": dict(batch=1, accum=2048, steps=100_000, lr=3e-4),
    "llama2-7b": dict(batch=1, accum=1024, steps=100_000, lr=3e-4),
}


def parse_config(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    for f in dataclasses.fields(Config):
        text = f.metadata["help"] + ("" if f.default is None or f.default is False else f" (default: {f.default})")
        kind = {"action": "store_true"} if f.default is False else {"type": f.type, "metavar": f.name.upper()}
        names = dict.fromkeys((f"--{f.name}", f"--{f.name.replace('_', '-')}"))   # --max_skips or --max-skips
        parser.add_argument(*names, default=f.default, help=text.replace("%", "%%"), **kind)
    return Config(**vars(parser.parse_args(argv)))


def resolve(c, device, world):
    """Fills in the defaults that depend on preset, device and number of ranks; refuses what cannot work."""
    c.model = c.model or ("124m" if device.type == "cuda" else "nano")
    c.fp8 = c.fp8 or (",".join(RECIPES) if c.bench else "moss")
    for fp8 in c.fp8.split(",") if c.bench or c.eval_only and c.sample is None else [c.fp8]:
        if fp8 not in RECIPES:
            raise UserError(f"--fp8 {fp8} is no recipe: choose one of {', '.join(RECIPES)}")
        if c.shard and (fp8 == "none" or RECIPES[fp8].weight_scale != "predicted"):
            raise UserError(f"--shard is for recipes that predict weight scales, like --fp8 moss, not {fp8}: else a "
                            f"rank has to see all weights")
    if c.model not in PRESETS:
        raise UserError(f"--model {c.model} is no preset: choose one of {', '.join(PRESETS)}")
    if c.recompute not in RECOMPUTE:
        raise UserError(f"--recompute {c.recompute} is unknown: choose one of {', '.join(RECOMPUTE)}")
    defaults = DEFAULTS[c.model] | {"layers": PRESETS[c.model].layers, "seq": PRESETS[c.model].seq}
    for name, value in (defaults | {"steps": 10, "accum": 1} if c.bench else defaults).items():
        if getattr(c, name) is None:
            setattr(c, name, max(value, world) if name == "accum" else value)
    c.warmup = min(c.steps // 10, 2000) if c.warmup is None else c.warmup
    c.eval_every = min(max(c.steps // 5, 1), 250) if c.eval_every is None else c.eval_every
    for names, allowed, must in (
            ("layers steps batch accum seq log_every eval_every eval_batches max_skips keep", lambda v: v >= 1,
             "be at least 1"),
            ("lr clip", lambda v: 0 < v < math.inf, "be a positive number"),
            ("weight_decay warmup rescale_interval spike", lambda v: 0 <= v < math.inf, "not be negative"),
            ("beta1 beta2", lambda v: 0 <= v < 1, "lie in [0, 1)"),
            ("seed", lambda v: 0 <= v < 2**63, "lie in [0, 2^63)")):
        for name in names.split():
            if not allowed(getattr(c, name)):
                raise UserError(f"--{name} {getattr(c, name)} must {must}")
    if c.data == "":
        raise UserError("--data is empty: give a folder or a file, or leave --data out")
    writes = not (c.bench or c.eval_only or c.sample is not None)
    inside = (path.is_relative_to(Path(c.out).resolve()) for path in (Path.cwd(), Path(c.data or ".").resolve()))
    if writes and any(inside):
        raise UserError(f"--out {c.out} holds the current folder or --data, and is renamed when another run begins in "
                        f"it: give a folder of its own")
    if c.accum % world:
        raise UserError(f"--accum {c.accum} micro-batches do not divide by {world} ranks: "
                        f"use --accum {cdiv(c.accum, world) * world}")
    if c.recompute == "act" and c.fp8 != "moss" and not c.bench:
        raise UserError(f"--recompute act is for --fp8 moss, not {c.fp8}: use --recompute block")
    if c.fp8 != "none" and c.batch * c.seq % 16:
        raise UserError(f"--batch {c.batch} x --seq {c.seq} = {c.batch * c.seq} tokens, not a multiple of 16, which "
                        f"--fp8 {c.fp8} needs to sum over them: change --batch or --seq")
    return c


# ---------------------------------------------------------------------------------------------------
# Data: tokens that lie in files and stay there

class Tokens:
    """A sequence of tokens spread over files, read window by window through numpy.memmap.

    parts: list of (path, offset in bytes, number of tokens); dtype: what one token is in the files.
    A file is mapped anew for each window: a map that lives on keeps every page that it has touched.
    """

    def __init__(self, parts, dtype):
        self.parts, self.dtype = [p for p in parts if p[2] > 0], np.dtype(dtype)
        self.ends = np.cumsum([count for _, _, count in self.parts], dtype=np.int64)

    def __len__(self):
        return int(self.ends[-1]) if self.parts else 0

    def read(self, start, count):
        """Tokens start ... start + count - 1 as int64, across file boundaries."""
        pieces, i = [], int(np.searchsorted(self.ends, start, side="right"))
        while count > 0:
            path, offset, size = self.parts[i]
            first = start - (int(self.ends[i]) - size)
            take = min(count, size - first)
            window = np.memmap(str(path),   # of a Path, memmap looks up every folder on the way
                               self.dtype, mode="r", offset=offset + first * self.dtype.itemsize, shape=(take,))
            pieces.append(window.astype(np.int64))
            start, count, i = start + take, count - take, i + 1
        return np.concatenate(pieces)

    def file_at(self, position):
        return self.parts[int(np.searchsorted(self.ends, position, side="right"))][0]

    def split(self, fraction):
        """(all but the last `fraction` of the tokens, the rest)."""
        cut, head, tail, done = int(len(self) * (1 - fraction)), [], [], 0
        for path, offset, count in self.parts:
            n = min(max(cut - done, 0), count)
            head.append((path, offset, n))
            tail.append((path, offset + n * self.dtype.itemsize, count - n))
            done += count
        return Tokens(head, self.dtype), Tokens(tail, self.dtype)


SHARD_MAGIC, SHARD_HEADER = 20240520, 1024   # llm.c, modded-nanogpt: 256 int32, then uint16 tokens


def token_file(path):
    """(part, dtype) of one file, by what is in it: .npy array, llm.c shard, nanoGPT uint16, or text as bytes."""
    size = path.stat().st_size
    if path.suffix == ".npy":
        try:
            array = np.load(path, mmap_mode="r")
        except Exception as e:   # what numpy raises depends on what is wrong with the file
            raise UserError(f"--data: {path} is not a readable .npy file ({str(e).partition(chr(10))[0]}): write it "
                            f"with numpy.save") from None
        if getattr(array, "ndim", 0) != 1 or array.dtype.kind not in "iu":
            what = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
            raise UserError(f"--data: {path} holds {what}: tokens must be a one-dimensional array of integers")
        return (path, getattr(array, "offset", 0), len(array)), array.dtype
    if path.suffix != ".bin":
        return (path, 0, size), np.dtype(np.uint8)
    header = np.fromfile(path, np.int32, 256)
    if len(header) and header[0] == SHARD_MAGIC:
        if len(header) < 256 or header[1] != 1:
            raise UserError(f"--data: {path} is a shard of version {header[1:2]}: only version 1 (uint16) is read")
        if size != SHARD_HEADER + 2 * int(header[2]):
            raise UserError(f"--data: {path} should hold {header[2]} tokens but has {size} bytes: copy it again")
        return (path, SHARD_HEADER, int(header[2])), np.dtype(np.uint16)
    if size % 2:
        raise UserError(f"--data: {path} has an odd number of bytes ({size}): uint16 tokens are expected")
    return (path, 0, size // 2), np.dtype(np.uint16)


def list_files(root, pattern="*"):
    """The files to read below a folder: token files if there are any, else all text files, in a fixed order."""
    files = sorted(p for p in root.rglob(pattern) if p.is_file() and not any(
        part.startswith(".") or part in ("__pycache__", "site-packages") for part in p.relative_to(root).parts))
    for suffix in (".bin", ".npy"):
        if found := [p for p in files if p.suffix == suffix]:
            return found
    return [p for p in files if is_text(p)]


def is_text(path):
    return np.fromfile(path, np.uint8, 1024).all()   # no zero bytes


def open_data(source):
    """--data -> (train, val: Tokens, vocabulary or None if the files do not say).

    Validation data are token files whose path below --data has the word "val", or a text file val.* in the folder (of
    a pattern: the one that holds all its files). Without these it is a twentieth: of the files, chosen by a checksum of
    their names, if there are at least 40, else of the tokens, the last ones.
    """
    root = Path(sysconfig.get_paths()["stdlib"] if source is None else source)
    matches = sorted(p for p in map(Path, glob.glob(str(root), recursive=True)) if p.is_file())
    if not root.exists() and not matches:
        raise UserError(f"--data {root} does not exist: give a folder or a file, or a pattern, or leave --data out")
    files = [root] if root.is_file() else [   # but not what a run writes, for --out may lie among the data
        p for p in matches or list_files(root, "*.py" if source is None else "*")
        if p.name != "log.jsonl" and p.suffix not in (".pt", ".damaged")]
    if root.is_file() and root.suffix not in (".bin", ".npy") and not is_text(root):
        raise UserError(f"--data {root} is neither .bin nor .npy, and no text either, for it has zero bytes: write its "
                        f"tokens to one of these")
    parts, dtypes = zip(*map(token_file, files)) if files else ((), ())
    if len(set(dtypes)) > 1:
        kinds = " and ".join(sorted({str(dtype) for dtype in dtypes}))
        raise UserError(f"--data {root} mixes {kinds} tokens: keep one kind per folder")
    if sum(count for _, _, count in parts) == 0:
        raise UserError(f"--data {root} holds no tokens: .bin, .npy or text files are read")
    top = root if root.is_dir() else os.path.commonpath([p.parent for p in files])
    names = [p.relative_to(top).as_posix() for p in files]
    of_text = files[0].suffix not in (".bin", ".npy")
    named_val = r"^val(idation)?(\.[^/]*)?$" if of_text else r"(?<![^\W_])val(idation)?(?![^\W_])"
    chosen = set()
    if source is not None and len(files) > 1:
        chosen = {p for p, name in zip(files, names) if re.search(named_val, name)}
    if not chosen and len(files) >= 40:
        chosen = {p for p, name in zip(files, names) if zlib.crc32(name.encode()) % 20 == 0}
    if chosen:
        train, val = (Tokens([part for part in parts if (part[0] in chosen) == held_out], dtypes[0])
                      for held_out in (False, True))
    else:
        train, val = Tokens(parts, dtypes[0]).split(0.05)
    return train, val, 256 if dtypes[0] == np.uint8 else None


def shuffled(number, n, keys):
    """The place of `number` in a random order of 0 ... n - 1 that is nowhere written down. keys: random numbers.

    A Feistel network shuffles all numbers of 2 b bits: (left, right) -> (right, left ^ f(right)) can be undone whatever
    f does, so no two numbers meet. One that lands at n or above is sent through again until it lands below.
    """
    golden = 0x9E3779B97F4A7C15   # 2^64 / golden ratio: a product with it carries every bit into the upper half
    bits = (max(n - 1, 1).bit_length() + 1) // 2   # half of those of a number
    while True:
        for key in keys:
            left, right = number >> bits, number & (1 << bits) - 1
            mixed = (right + key) * golden >> 32 & (1 << bits) - 1
            number = right << bits | left ^ mixed
        if number < n:
            return number


@functools.lru_cache(2)
def epoch_order(seed, epoch, slack):
    """(where the first window begins, 0 ... slack, and the keys of the shuffle)."""
    rng = np.random.default_rng((seed, epoch))
    return int(rng.integers(slack + 1)), *rng.integers(1 << 62, size=4).tolist()


class Batches:
    """Windows of `seq` + 1 tokens: which ones depends on seed and step, never on the number of ranks.

    The data are cut into windows; every epoch visits each of them once, in an order of its own.
    """

    def __init__(self, tokens, config, vocab, what):
        self.tokens, self.config, self.vocab = tokens, config, vocab
        self.windows, self.ready = (len(tokens) - 1) // config.seq, None
        if len(tokens) < config.seq + 1:
            raise UserError(f"the {what} data has {len(tokens)} tokens, fewer than one sequence of --seq {config.seq} "
                            f"+ 1: give more data or a shorter --seq")
        self.read(np.linspace(0, len(tokens) - config.seq - 1, 64))   # a wrong vocabulary shows now, not hours later

    def read(self, starts):
        """Start positions -> (B, seq + 1) int64. UserError names the file of a token that the model does not know."""
        windows = np.stack([self.tokens.read(int(start), self.config.seq + 1) for start in starts])
        if windows.max() >= self.vocab or windows.min() < 0:
            i, j = np.argwhere((windows >= self.vocab) | (windows < 0))[0]
            raise UserError(f"token id {windows[i, j]} in {self.tokens.file_at(int(starts[i]) + j)} is outside the "
                            f"model's vocabulary of {self.vocab}: is this the right data for "
                            f"--model {self.config.model}?")
        return windows

    def load(self, starts, device):
        """Start positions -> inputs, targets (B, seq) int64 on the device."""
        windows = torch.from_numpy(self.read(starts))
        if device.type == "cuda":
            windows = windows.pin_memory().to(device, non_blocking=True)
        return windows[:, :-1], windows[:, 1:]

    def step(self, step, micro, device):
        """Micro-batch number `micro` (over all ranks) of a training step: the next windows of the epoch's order."""
        ready, self.ready = self.ready, None
        if ready and ready[0] == (step, micro):
            return ready[1]
        numbers = (step * self.config.accum + micro) * self.config.batch + np.arange(self.config.batch)
        return self.load([self.start(*divmod(int(number), self.windows)) for number in numbers], device)

    def prefetch(self, step, micro, device):
        """Reads what `step` will be asked for, while the GPU still computes. If it fails, `step` will say so."""
        with suppress(*UNREADABLE):
            self.ready = (step, micro), self.step(step, micro, device)

    def start(self, epoch, number):
        """Where window `number` of an epoch starts. Each epoch has its own order, and its own edges between windows."""
        slack = len(self.tokens) - 1 - self.windows * self.config.seq
        first, *keys = epoch_order(self.config.seed, epoch, slack)
        return first + self.config.seq * shuffled(number, self.windows, keys)

    def evaluation(self, i, device):
        """Micro-batch number i of eval_batches: evenly spaced windows, the same at every evaluation."""
        c = self.config
        starts = np.linspace(0, len(self.tokens) - c.seq - 1, c.eval_batches * c.batch).astype(np.int64)
        return self.load(starts.reshape(c.eval_batches, c.batch)[i], device)


# ---------------------------------------------------------------------------------------------------
# Devices and ranks

def tell(text):
    """Prints. Output that cannot be written, to a full disk or a closed pipe, is no reason to end a run."""
    with suppress(OSError):
        print(text)


@dataclass
class Ranks:
    rank: int
    world: int
    device: torch.device
    store: object = None   # torchrun's: what is written there outlives restarts

    def say(self, text):
        if self.rank == 0:
            tell(text)


def start_ranks(device):
    """The device of this process; joins the others if torchrun started it."""
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:[1-9]?\d)?", name):
        raise UserError(f"--device {name} is no device, or not supported: use cpu, cuda or cuda:N")
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
    if device.type == "cuda":
        needed = max((device.index or 0) + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        if needed > torch.cuda.device_count():
            raise UserError(f"--device {name}: GPU {needed - 1} is needed, but PyTorch sees "
                            f"{torch.cuda.device_count()} GPUs: use --device cpu or start fewer ranks")
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return Ranks(0, 1, device)
    try:
        store, rank, world = next(rendezvous("env://"))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world,
                                store=dist.PrefixStore(name_of_start(store, rank, world), store),
                                timeout=timedelta(minutes=30),   # ranks may wait while a checkpoint is written
                                device_id=device if device.type == "cuda" else None)
    except (ValueError, dist.DistError) as e:
        raise RunError(f"the ranks cannot meet ({str(e).splitlines()[0]}): start them with torchrun, and give each job "
                       f"a --master_port or --rdzv_endpoint of its own") from None
    return Ranks(rank, world, device, store)


def name_of_start(store, rank, world):
    """A name that all ranks have in common, and that no earlier start of theirs had.

    torchrun keeps its store when it starts ranks again, with the addresses of the dead in it, and counts restarts node
    by node. So each rank leaves a number of its own, and rank 0 answers it with the name, until all have heard it.
    """
    mine = os.urandom(8).hex()
    if rank > 0:
        store.set(f"rank {rank}", mine)
        name = store.get(f"answer to {mine}").decode()
        store.add(f"{name} heard", 1)
        return name
    while store.add(f"{mine} heard", 0) < world - 1:
        for other in range(1, world):
            if store.check([f"rank {other}"]):
                store.set(f"answer to {store.get(f'rank {other}').decode()}", mine)
        time.sleep(0.05)
    return mine


def all_sum(tensor):
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_max(tensor):
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def extremes(tensor):
    """(least, most) of each number over all ranks."""
    most, minus_least = all_max(torch.stack((tensor, -tensor)))
    return -minus_least, most


# Dense BF16 peak in TFLOP/s by the vendors' data sheets, found by a part of the device's name, first match wins.
BF16_PEAK = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H800": 989,
             "A100": 312, "A800": 312, "L40S": 362, "L40": 181, "L4": 121, "4090": 165, "3090": 71}


def bf16_peak(device):
    """Peak FLOP/s that MFU is measured against, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for part, peak in BF16_PEAK.items() if part in name), None)


def peak_memory(device):
    """Bytes: what the GPU's allocator held at most, or on a CPU the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    except ImportError:   # Windows
        return 0


def numerics(fp8, device):
    """One line: what computes the linear layers here."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    if fp8 == "none":
        return f"{'BF16' if device.type == 'cuda' else 'FP32'} on {name}, training and evaluation alike"
    if has_fp8_tensor_cores(device):
        return f"FP8 kernels on {name}, training and evaluation alike"
    why = "Triton is not installed" if device.type == "cuda" and not HAS_TRITON else "no FP8 kernels for it"
    return f"FP8 emulated on {name} ({why}): quantize, dequantize, multiply; training and evaluation alike"


# ---------------------------------------------------------------------------------------------------
# Checkpoints

CHECKPOINT = re.compile(r"step_(\d+)_([0-9a-f]{8})\.pt")   # the step, and the CRC32 of the file


def checkpoints(out):
    """The checkpoints in a folder, the newest first."""
    return sorted((p for p in out.glob("step_*.pt") if CHECKPOINT.fullmatch(p.name)), reverse=True)


def checksum(path):
    crc = 0
    with open(path, "rb") as f:
        while block := f.read(2**24):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


class SummedFile(io.BufferedWriter):
    """A file, and the CRC32 of all that was written to it."""
    crc = 0

    def write(self, data):
        self.crc = zlib.crc32(data, self.crc)
        return super().write(data)


def write_checkpoint(out, state):
    """Written beside its place and renamed into it: a crash leaves a whole file or none. -> its path."""
    temporary = out / "checkpoint.tmp"
    with SummedFile(open(temporary, "wb", buffering=0)) as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    path = out / f"step_{state['step']:08}_{f.crc:08x}.pt"
    os.replace(temporary, path)
    return path


def on_cpu(state):
    """A copy of nested dicts and lists whose tensors lie in the CPU's memory. Training waits for it: by one thread it
    takes 6 s for 10 GB, by eight 0.8 s."""
    if isinstance(state, torch.Tensor):
        if state.numel() < 2**20:   # starting threads takes longer
            return state.detach().to("cpu", copy=True)
        copy = torch.empty(state.shape, dtype=state.dtype)
        parts = copy.view(-1).chunk(8), state.detach().reshape(-1).chunk(8)
        with ThreadPoolExecutor(8) as pool:   # zero_ touches memory that is new, which takes longer than copying
            list(pool.map(lambda new, old: new.zero_().copy_(old), *parts))
        return copy
    if isinstance(state, dict):
        return {key: on_cpu(value) for key, value in state.items()}
    return [on_cpu(value) for value in state] if isinstance(state, (list, tuple)) else state


class Saver:
    """Writes checkpoints in the background, while training goes on, and keeps the last few and the best."""

    def __init__(self, out, keep, say):
        self.out, self.keep, self.say, self.thread, self.failed = out, keep, say, None, None

    def save(self, state):
        """Returns at once, or when the file before is written. The state must not change any more: see `on_cpu`."""
        self.wait()
        self.thread = threading.Thread(target=self.write, args=(state,))
        self.thread.start()

    def write(self, state):
        self.failed = None
        try:
            newest = write_checkpoint(self.out, state)
            for old in [path for path in checkpoints(self.out) if path != newest][self.keep - 1:]:
                if int(CHECKPOINT.fullmatch(old.name)[1]) != state["best"][1]:
                    old.unlink()
        except Exception as e:   # a full disk is a RuntimeError of torch.save; nothing here may pass for success
            self.failed = (f"the checkpoint of step {state['step']} could not be written ({e.__class__.__name__}: "
                           f"{str(e).partition(chr(10))[0]}): make room in {self.out}")
            (self.out / "checkpoint.tmp").unlink(missing_ok=True)

    def wait(self):
        """Until the file is written. Says so if it was not; -> whether it was."""
        if self.thread:
            self.thread.join()
            self.thread = None
            if self.failed:
                self.say(f"warning: {self.failed}; {last_good(self.out)}")
        return not self.failed


def last_good(out):
    return f"{checkpoints(out)[0]} is the last good one" if checkpoints(out) else "nothing was saved yet"


def load_checkpoint(out, model_config, say):
    """The newest checkpoint that is whole -> (its path, the state)."""
    if not checkpoints(out):
        raise UserError(f"there is no checkpoint in {out}: check --out, or train without --resume")
    for path in checkpoints(out):
        try:
            if checksum(path) == CHECKPOINT.fullmatch(path.name)[2]:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)   # ranks share one copy
                break
            reason = "its checksum is wrong"
        except Exception as e:   # what torch.load raises depends on what is wrong with the file
            reason = type(e).__name__
        say(f"note: {path} is damaged ({reason}); looking for the one before it")
    else:
        raise UserError(f"no checkpoint in {out} is whole: restore one from a copy, or train without --resume")
    if not isinstance(state, dict) or "model_config" not in state:
        raise UserError(f"--resume: {path} is no checkpoint of this program: check --out")
    for name, value in dataclasses.asdict(model_config).items():
        if name != "seq" and state["model_config"].get(name) != value:
            raise UserError(f"--resume: {path} holds a model with {name} = {state['model_config'].get(name)}, but "
                            f"{name} = {value} is asked for: use the --model and --data that it was trained with")
    return path, state


def lock(out):
    """A file that stays locked until this process ends, however it ends. UserError if another one holds it."""
    try:
        import fcntl
    except ImportError:   # Windows
        return None
    held = open(out / ".lock", "a")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--out {out} is in use by another run: give each run a folder of its own") from None
    except OSError as e:
        if e.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):   # a file system without locks: do without
            raise
    return held


def open_log(out, resumed_at):
    """log.jsonl, open for appending; lines that a crashed run wrote after its last checkpoint are cut off."""
    path = out / "log.jsonl"
    if path.exists():   # without --resume the folder of an earlier run has been renamed
        kept, temporary = [], path.with_suffix(".tmp")
        for line in path.read_text(errors="replace").splitlines():
            with suppress(ValueError):   # a line that the crash cut short
                if json.loads(line)["step"] <= resumed_at:
                    kept.append(line + "\n")
        temporary.write_text("".join(kept))
        os.replace(temporary, path)
    return open(path, "a", buffering=1)


def claim(out, c, step):
    """Makes the run's folder its own, renaming that of an earlier run -> (lock, log, tensorboard's writer or None)."""
    try:
        if c.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
        held = lock(out) if out.exists() else None
        if not c.resume and ((out / "log.jsonl").exists() or checkpoints(out)):
            for below in {path.parent for path in out.rglob(".lock")} - {out}:
                lock(below)   # a run that goes on there would lose its folder
            names = (out.with_name(f"{out.name}.{n}") for n in itertools.count(1))
            earlier = out.rename(next(name for name in names if not name.exists()))
            tell(f"an earlier run in {out} was moved to {earlier}")
            held = None   # the lock went with the folder
        out.mkdir(parents=True, exist_ok=True)
        board = None
        if c.tensorboard:   # only now: it may lie in `out`
            board = SummaryWriter(c.tensorboard, purge_step=step + 1 if c.resume else None)
        return held or lock(out), open_log(out, step), board
    except ImportError:
        raise UserError("--tensorboard needs tensorboard: pip install tensorboard, or leave it out") from None
    except OSError as e:
        raise UserError(f"--out {out} cannot be written ({e.strerror}): choose another folder") from None


# ---------------------------------------------------------------------------------------------------
# Parts of the loop

def learning_rate(step, c):
    """Of optimizer step number `step`, from 0: linear warm-up, then a cosine down to a tenth of the peak."""
    if step < c.warmup:
        return c.lr * (step + 1) / (c.warmup + 1)
    progress = (step - c.warmup) / max(c.steps - c.warmup, 1)
    return c.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(progress, 1))))


def make_model(c, device, vocab=None):
    """BF16 is compiled whole on a GPU. FP8 recipes compile the pieces that are not ours (model.py)."""
    config = dataclasses.replace(PRESETS[c.model], layers=c.layers, seq=c.seq, vocab=vocab or PRESETS[c.model].vocab)
    try:
        with torch.device(device):
            model = Transformer(config, c.fp8, c.recompute)
    except ValueError as e:
        raise UserError(e) from None
    torch.compiler.set_stance("force_eager" if c.eager else "default")
    if device.type == "cuda" and c.fp8 == "none" and not c.eager:
        model.compile(dynamic=False)
    return model


def make_optimizer(model, c, shards=None):
    """AdamW in the same groups under every recipe: quantized weights, other matrices, and norms without decay."""
    layers = {layer.weight: layer for layer in model.linears()}
    kinds = [], [], []   # quantized weights, other matrices, norms
    for p in model.parameters():
        if shards is None or shards.mine(p):
            kinds[0 if p in layers else 1 if p.dim() >= 2 else 2].append(p)
    groups = [{"params": params, "weight_decay": decay}
              for params, decay in zip(kinds, (c.weight_decay, c.weight_decay, 0.0)) if params]
    options = dict(lr=c.lr, betas=(c.beta1, c.beta2), fused=model.embed.weight.is_cuda)
    if model.recipe and model.recipe.weight_scale == "predicted":
        return FP8AdamW(groups, [layers[p] for p in kinds[0]], **options)
    return torch.optim.AdamW(groups, **options)


def make_scales(model, optimizer, c):
    """The FP32 scale of every FP8 weight (autoscale.py), or None where a recipe scales by blocks or not at all."""
    if model.recipe is None or model.recipe.weight_scale == "block":
        return None
    if model.recipe.weight_scale == "predicted":
        try:
            check_optimizer(optimizer)
        except ValueError as e:
            raise UserError(f"--fp8 {c.fp8} cannot predict weight scales: {e}; or train with --fp8 tensor") from None
    return WeightScales([layer.weight for layer in model.linears()], model.recipe.weight_scale, c.rescale_interval)


def requantize(model, scales, shards=None):
    """New FP8 copies of all weights; with shards, of those that this rank owns."""
    for i, layer in enumerate(model.linears()):
        if shards is None or shards.mine(layer.weight):
            layer.requantize(None if scales is None else scales.scale[i])


class Shards:
    """ZeRO stage 1 by whole parameters: each has one rank that owns its FP32 weights and moments and takes its steps.

        after backward   gradients: summed in BF16 (FP32 on a CPU), sent to the owner while the backward pass goes on
        after the step   quantized weights: W in FP8 from the owner to all, each of which makes its W^T of it;
                         embedding, head and norms in BF16 (FP32 on a CPU), in which the model computes with them

    Scales are predicted, by the same arithmetic on all ranks: only where they are measured are they exchanged.
    """

    def __init__(self, model, ranks):
        self.ranks, self.layers = ranks, {layer.weight: layer for layer in model.linears()}
        self.parameters, self.sent, self.sending = list(model.parameters()), [], False
        self.dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
        if ranks.world > len(self.parameters):
            raise UserError(f"--shard: {ranks.world} ranks are more than the {len(self.parameters)} parameters to own: "
                            f"use fewer ranks, or leave --shard out")
        self.owner, load = {}, [0] * ranks.world
        for p in sorted(self.parameters, key=lambda p: -p.numel()):   # the largest first, to the least loaded rank
            self.owner[p] = load.index(min(load))
            load[self.owner[p]] += p.numel()
            p.register_post_accumulate_grad_hook(self.send)
        for p in self.layers:
            if not self.mine(p):
                p.data = p.data.new_zeros(1, 1).expand(p.shape)   # a shape without the numbers

    def mine(self, p):
        return self.owner[p] == self.ranks.rank

    def send(self, p):
        """Called in the backward pass when the gradient of p is complete; the last micro-batch's goes out."""
        if not self.sending:
            return
        gradient = p.grad.to(self.dtype) / self.ranks.world
        p.grad = p.grad if self.mine(p) else None
        self.sent.append((p, gradient, dist.reduce(gradient, self.owner[p], async_op=True)))
        if len(self.sent) > 8:   # waits for the oldest, mostly long since there, to free its memory
            self.receive(self.sent.pop(0))

    def receive(self, message):
        p, gradient, work = message
        work.wait()
        if self.mine(p):
            p.grad.copy_(gradient)

    def norm(self):
        """Waits for the gradients -> the norm of all of them, also of those that other ranks own."""
        while self.sent:
            self.receive(self.sent.pop(0))
        zero = torch.zeros((), device=self.parameters[0].device)
        norms = [get_total_norm([p.grad]) if self.mine(p) else zero for p in self.parameters]
        return torch.linalg.vector_norm(all_sum(torch.stack(norms)))

    def share(self, scales, measured):
        """Sends what the owners have to all ranks, after a step or at the start."""
        if measured:   # what a rank does not own looks like zeros to it
            all_max(scales.scale)
        work = []
        for i, (p, layer) in enumerate(self.layers.items()):
            if layer.w is None:
                scale = scales.scale[i].view(1, 1)
                data = torch.empty(p.shape, dtype=E4M3.dtype, device=p.device)
                layer.w, layer.w_t = Quantized(data, scale, (ALL, ALL)), Quantized(None, scale, (ALL, ALL))
            work.append(dist.broadcast(layer.w.data.view(torch.uint8), self.owner[p], async_op=True))
        others = {p: p.data.to(self.dtype) for p in self.owner if p not in self.layers}
        work += [dist.broadcast(data, self.owner[p], async_op=True) for p, data in others.items()]
        for message in work:
            message.wait()
        for p, data in others.items():
            if not self.mine(p):
                p.data.copy_(data)
        for p, layer in self.layers.items():
            if not self.mine(p):
                layer.w_t.data = transpose(layer.w.data)

    def collect(self, p, tensor):
        """The owner's tensor of the shape of p, on all ranks."""
        tensor = tensor if self.mine(p) else torch.empty(p.shape, device=p.device)
        dist.broadcast(tensor, self.owner[p])
        return tensor


def data_parallel(model, device):
    """DDP. Micro-batches are summed in FP32; on GPUs the sum travels in BF16, while the backward pass goes on."""
    gpu = device.type == "cuda"
    # Gradients that are there move into DDP's buckets. Those that a first micro-batch makes lie beside them until the
    # last one: 4 bytes per parameter that a run needs only once, when it begins or goes on.
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    # On CPUs, looking for unused parameters keeps DDP from another order of its sums after the first step, which a
    # resumed run would not have had. (On GPUs attention alone makes two runs differ.)
    ddp = DistributedDataParallel(model, device_ids=[device.index] if gpu else None, gradient_as_bucket_view=True,
                                  find_unused_parameters=not gpu, init_sync=False)   # `train` has sent the weights
    if gpu:
        ddp.register_comm_hook(None, bf16_compress_hook)
    return ddp


def traffic(model, device, shards):
    """One line: how much the ranks exchange in a step, by what it is."""
    everything = sum(p.numel() for p in model.parameters())
    linear = sum(layer.weight.numel() for layer in model.linears())
    name, width = ("BF16", 2) if device.type == "cuda" else ("FP32", 4)
    parts = [(width * everything, f"of gradients in {name}, {'to their owners' if shards else 'all-reduced'}")]
    if shards:
        parts += [(linear, "of weights in FP8"), (width * (everything - linear), f"of other weights in {name}")]
    return ", ".join(f"{size / 2**20:,.1f} MiB {what}" for size, what in parts)


def update_weights(optimizer, model, scales, lr, update, c, shards=None):
    """Optimizer step number `update`, from 1, and then the FP8 copies: once per step, not once per micro-batch.

    A scale that is predicted is there before the step, and FP8AdamW writes the copies along with the weights. One that
    is measured, at each step or once in --rescale_interval, has to wait for the weights, and so have the copies.
    """
    predicted = scales is not None and not scales.measures(update)
    if predicted:
        scales.update(lr, (c.beta1, c.beta2), c.weight_decay, update)
    optimizer.step()
    if scales and not predicted:
        scales.update(lr, (c.beta1, c.beta2), c.weight_decay, update)
    if not predicted or not getattr(optimizer, "layers", None):   # else FP8AdamW has written them
        requantize(model, scales, shards)
    if shards:
        shards.share(scales, measured=not predicted)


@torch.no_grad()
def evaluate(model, batches, ranks):
    """Mean validation loss in nats per token, over all ranks."""
    total = torch.zeros((), device=ranks.device)
    for i in range(ranks.rank, batches.config.eval_batches, ranks.world):
        try:
            tokens, targets = batches.evaluation(i, ranks.device)
        except UNREADABLE as e:   # costs this evaluation, not the run
            tell(f"rank {ranks.rank}, validation data: {e}")
            total += math.nan
        else:
            total += model(tokens, targets)
    return all_sum(total).item() / batches.config.eval_batches


def check_scales_agree(scales, ranks):
    """Predicted scales are never sent: the same arithmetic gives the same numbers everywhere, or something is wrong."""
    if scales and ranks.world > 1 and not torch.equal(*extremes(scales.scale)):
        raise RunError("the ranks have different weight scales: do all run the same version of the code?")


@torch.no_grad()
def first_non_finite(model, tokens, targets):
    """The first layer whose output is not finite, else the first whose gradient was not, from the loss backwards."""
    bad = []   # hooks and `fused` stay as they are made here: the run ends
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda _, __, y, name=name: None if y.isfinite().all() else bad.append(name))
    for block in model.blocks:
        block.fused = False   # layer by layer, up to rounding the same numbers
    with torch.compiler.set_stance("force_eager"):   # a compiled model would not call the hooks
        model(tokens, targets)
    if bad:
        return f"the output of {bad[0]}"
    for name, p in reversed(list(model.named_parameters())):
        if p.grad is not None and not p.grad.isfinite().all():
            return f"the gradient of {name}"
    return "the loss or the norm of the gradient"


def scale_health(model, scales, shards=None):
    """Predicted / true weight scale (below 1 weights saturate); shares of X and dY cut off and changed by folding.

    This ends the watching, so that no evaluation is counted.
    """
    health = {}
    if scales is not None:
        ratio = scales.headroom()
        known = torch.tensor([shards is None or shards.mine(w) for w in scales.weights], device=ratio.device)
        ends = torch.stack([torch.where(known, end, -math.inf).max() for end in (ratio, -ratio)])
        most, least = (all_max(ends) if shards else ends).tolist()
        health.update(scale_ratio=most, scale_ratio_min=-least)
    records = [layer.health for layer in model.linears() if layer.health]
    for key in records[0] if records else ():
        health[key] = torch.stack([r[key] for r in records]).mean().item()
    for layer in model.linears():
        layer.health = None
    return health


def clock(seconds):
    seconds = int(seconds)
    return f"{seconds // 3600}h{seconds % 3600 // 60:02}m" if seconds >= 3600 else f"{seconds // 60}m{seconds % 60:02}s"


def progress_line(record, c, seconds_left):
    parts = {"loss": "loss {loss:.4f}  lr {lr:.2e}  grad {grad_norm:.2f}  {tokens_per_s:,.0f} tok/s",
             "mfu": "MFU {mfu:.1%}", "scale_ratio": "scale x{scale_ratio:.3f}",
             "saturated": "saturated {saturated:.2%}, {saturated_grad:.2%}",   # of activations, and of gradients
             "folded": "folded {folded:.2%}, {folded_grad:.2%}", "val_loss": "validation loss {val_loss:.4f}"}
    shown = [text.format(**record) for key, text in parts.items() if key in record]
    return "  ".join([f"step {record['step']:>{len(str(c.steps))}}/{c.steps}", *shown, f"{clock(seconds_left)} left"])


def about_run(c, ranks):
    """What one has to know to repeat a run: command, options, versions, hardware."""
    name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    return {"command": shlex.join(sys.argv), "config": dataclasses.asdict(c), "hardware": f"{ranks.world} x {name}",
            "torch": torch.__version__, "triton": triton.__version__ if HAS_TRITON else None,
            "python": sys.version.split()[0]}


def sample(model, batches, device, seed, prompt=None, count=200):
    """What the model writes after `prompt`, by default "def " or the first 16 token ids of the validation data."""
    is_text = batches.tokens.dtype == np.uint8
    if prompt == "":
        raise UserError("--sample is empty: give a text, or token ids, to go on with")
    if is_text:
        prompt = list(("def " if prompt is None else prompt).encode(errors="surrogateescape"))
    elif prompt is None:
        prompt = batches.tokens.read(0, min(16, len(batches.tokens))).tolist()
    else:
        prompt = [int(word) if word.isdigit() else -1 for word in prompt.split()]
    if not 0 <= min(prompt, default=-1) <= max(prompt, default=-1) < model.config.vocab:
        raise UserError(f"--sample: {prompt} is not a sequence of token ids below {model.config.vocab}: this model was "
                        f"trained on token ids, give some of them")
    generator = torch.Generator(device).manual_seed(seed)
    tokens = model.generate(torch.tensor([prompt], device=device), count, generator=generator)[0].tolist()
    return bytes(tokens).decode("utf-8", "replace") if is_text else " ".join(map(str, tokens))


# ---------------------------------------------------------------------------------------------------
# The run

class StopSignal:
    """SIGINT or SIGTERM ask the loop to finish its step, save and leave; a second one ends the process at once.

    The same signal may come twice: `timeout` sends it to the process and to its group, and under torchrun it comes from
    the terminal or the scheduler and from torchrun. What follows within half a second, or 5 under torchrun, is that.
    """

    def __enter__(self):
        self.received = False
        self.previous = {s: signal.signal(s, self.receive) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def receive(self, number, _):
        if not self.received:
            self.received, self.since = True, time.monotonic()
        elif time.monotonic() - self.since > (5 if "TORCHELASTIC_RUN_ID" in os.environ else 0.5):
            self.__exit__()
            os.kill(os.getpid(), number)

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def build(c, device):
    """(model, training and validation Batches). All that can be wrong with data and shapes is found here."""
    try:
        train_tokens, val_tokens, vocab = open_data(c.data)
    except OSError as e:
        raise UserError(f"--data: {e.filename} cannot be read ({e.strerror}): check its permissions") from None
    torch.manual_seed(c.seed)
    model = make_model(c, device, vocab)
    return (model, Batches(train_tokens, c, model.config.vocab, "training"),
            Batches(val_tokens, c, model.config.vocab, "validation"))


def claim_key(c):
    return f"claimed {Path(c.out).resolve()}"


def started_again(c, ranks):
    """Whether torchrun starts this run again, after a rank had died or a node had come, and it has a checkpoint.

    torchrun counts the former alone, node by node. And if no start before this one came as far as claiming the folder,
    what lies in it belongs to another run.
    """
    store = ranks.store
    was_claimed, was_started = (store is not None and store.check([key]) for key in (claim_key(c), "started"))
    restarts = all_sum(torch.tensor(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), device=ranks.device)).item()
    if store is not None:
        store.set("started", "")
    return bool((was_claimed or restarts > 0 and not was_started) and checkpoints(Path(c.out)))


def check_ranks_agree(c, ranks, step, read):
    """RunError unless all ranks have the same options, data of the same sizes `read`, and the same checkpoint."""
    told = {**dataclasses.asdict(c), "device": None, "data": None, "out": None}   # paths may differ from node to node
    mine = torch.tensor([step, zlib.crc32(json.dumps([told, read]).encode())], device=ranks.device)
    least, most = (end.tolist() for end in extremes(mine))
    if least[1] != most[1]:
        raise RunError("the ranks have different options or data: start all of them with the same command, and give "
                       "every node all files of --data")
    if least[0] != most[0]:
        raise RunError(f"the ranks found checkpoints of steps {least[0]} to {most[0]}: --out {c.out} has to be one "
                       f"folder that all nodes see")


def collect_state(model, optimizer, shards, main):
    """Weights and moments by the names of the parameters, in the CPU's memory of rank 0."""
    weights, moments, started = {}, {}, len(optimizer.state) > 0
    for name, p in model.named_parameters():
        kept = {"weight": p.data, **optimizer.state.get(p, {})}
        if shards:
            for key in ("weight", "exp_avg", "exp_avg_sq") if started else ("weight",):
                kept[key] = shards.collect(p, kept.get(key))
            kept["step"] = next((s["step"] for s in optimizer.state.values()), None)   # all parameters step together
        if main:
            kept = on_cpu(kept)
            weights[name] = kept.pop("weight")
            moments[name] = kept if started else {}
    return weights, moments


@torch.no_grad()
def restore_weights(state, model):
    for name, p in model.named_parameters():
        p.copy_(state["model"][name])


def note_changes(state, c, names, say):
    """Says which of these options had other values when the state was saved; -> their names."""
    changed = [name for name in names if getattr(c, name) != state["config"][name]]
    for name in changed:
        say(f"note: --{name} was {state['config'][name]} and is now {getattr(c, name)}")
    return set(changed)


def restore_moments(state, model, optimizer):
    """Of the optimizer only moments and step counts: its settings are those of this run."""
    names = {p: name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            for key, value in state["optimizer"][names[p]].items():   # step counts of a kernel of ours lie on the CPU
                device = p.device if key != "step" or group.get("fused") else "cpu"
                optimizer.state[p][key] = value.to(device, copy=True)


def restore_scales(state, scales, c):
    """Bit for bit: measuring them anew would make a resumed run differ from an uninterrupted one. They are measured
    where the recipe is another one now, or where a weight exceeds what its scale allows."""
    if scales:
        if state["config"]["fp8"] == c.fp8:
            scales.load_state_dict(state["scales"])
        if state["config"]["fp8"] != c.fp8 or all_max(-scales.headroom().min()) > -1:   # all ranks or none
            scales.rescale()


def restore_training(state, model, optimizer, scales, c, read, say):
    """Moments and scales, as far as they still hold under the options and data of today, and a note of what changed.

    -> (updates that the moments have seen, [best validation loss, its step])
    """
    updates, best = state["updates"], state["best"]
    other_data = tuple(state.get("read", read)) != read
    if other_data:
        say("note: --data held {:,} training and {:,} validation tokens, and now holds {:,} and {:,}".format(
            *state["read"], *read))
    changed = note_changes(state, c, [n for n in state["config"] if n not in ("resume", "device", "out")], say)
    if other_data or changed & {"data", "seq", "batch", "eval_batches"}:   # no longer the same validation loss
        best = [math.inf, 0]
    if changed & {"beta1", "beta2"}:
        say("note: Adam's moments begin anew, for they were means under other betas")
        updates = 0   # no bound of Adam's steps holds for moments of two kinds
    else:
        restore_moments(state, model, optimizer)
    restore_scales(state, scales, c)
    return updates, best


def forward_backward(model, batches, step, c, ranks, shards=None, watching=False):
    """Gradients of one optimizer step, averaged over micro-batches and ranks -> this rank's share of the mean loss.

    watching: the layers note the health of their scales, in the last micro-batch alone, for it takes time.
    """
    loss_sum = torch.zeros((), device=ranks.device)
    mine = range(ranks.rank, c.accum, ranks.world)
    layers = getattr(model, "module", model).linears()
    for micro in mine:
        try:
            (tokens, targets), readable = batches.step(step, micro, ranks.device), True
        except UNREADABLE as e:   # the other ranks wait for this one: go on, and let all skip
            tell(f"step {step + 1}, rank {ranks.rank}: {e}")
            tokens = targets = torch.zeros(c.batch, c.seq, dtype=torch.int64, device=ranks.device)
            readable = False
        sends = ranks.world > 1 and micro == mine[-1]   # DDP and shards wait for gradients in autograd's hooks
        for layer in layers:
            layer.accumulates = not sends
            layer.health = {} if watching and layer.recipe and micro == mine[-1] else None
        if shards:
            shards.sending = sends
        with model.no_sync() if ranks.world > 1 and not shards and not sends else nullcontext():
            loss = model(tokens, targets) * (1.0 if readable else math.nan)
            (loss / len(mine)).backward()     # DDP averages over the ranks, and so do shards
        loss_sum += loss.detach() / c.accum
    return loss_sum


def train(config):
    """The whole run; returns its summary as a dict, or None if a signal ended it."""
    ranks = start_ranks(config.device)
    device, main, say = ranks.device, ranks.rank == 0, ranks.say
    c = resolve(config, device, ranks.world)
    again = started_again(c, ranks)
    c.resume = c.resume or again
    model, train_batches, val_batches = build(c, device)
    parameters = list(model.parameters())
    read = len(train_batches.tokens), len(val_batches.tokens)
    out, best = Path(c.out), [math.inf, 0]   # validation loss, and at which step
    out = out.resolve() if out.is_symlink() else out   # an earlier run is renamed where it lies
    norms = deque(maxlen=100)                # of the gradients of the last steps taken

    step = updates = skipped = in_a_row = 0   # steps taken; those that changed the weights, and those that did not
    if c.resume:
        checkpoint, state = load_checkpoint(out, model.config, say)
        step, skipped = state["step"], state["skipped"]
        norms.extend(state["norms"])
        if step >= c.steps and again:   # a rank died after the last checkpoint
            say(f"{checkpoint} is at step {step} of {c.steps}: the run is done")
            return None
        if step >= c.steps:
            raise UserError(f"--resume: {checkpoint} is at step {step} of {c.steps}, nothing is left to do: "
                            f"raise --steps")
        restore_weights(state, model)
    check_ranks_agree(c, ranks, step, read)
    for p in parameters if dist.is_initialized() else ():
        dist.broadcast(p.data, 0)   # from one seed, GPUs of two kinds draw two sets of numbers
    shards = Shards(model, ranks) if c.shard and ranks.world > 1 else None
    optimizer = make_optimizer(model, c, shards)
    scales = make_scales(model, optimizer, c)
    if c.resume:
        updates, best = restore_training(state, model, optimizer, scales, c, read, say)
        before = state.get("ranks", ranks.world)
        del state   # 12 bytes per parameter of host memory
    requantize(model, scales, shards)
    if shards:
        shards.share(scales, measured=True)

    # From here on files are written.
    held, log, board = claim(out, c, step) if main else (None, None, None)
    if main and ranks.store is not None:
        ranks.store.set(claim_key(c), "")
    for path in checkpoints(out) if main and c.resume else ():
        if path > checkpoint:   # damaged, else it would have been taken
            say(f"note: {path.name} is now called {path.rename(path.with_suffix('.damaged')).name}")
    say("config  " + "  ".join(f"{k}={v}" for k, v in dataclasses.asdict(c).items()))
    say(f"model   {c.model}: {sum(p.numel() for p in parameters):,} parameters, vocabulary {model.config.vocab}")
    say("data    {:,} training and {:,} validation tokens of {}".format(*read, c.data or "the Python standard library"))
    say(f"fp8     {c.fp8}: {numerics(c.fp8, device)}")
    if ranks.world > 1:
        say(f"ranks   {ranks.world}, each sends per step: {traffic(model, device, shards)}")
    if c.resume:
        changed = f"; {before} ranks are {ranks.world} now" if before != ranks.world else ""
        say(f"resumed {checkpoint} at step {step}{changed}")

    ddp = data_parallel(model, device) if ranks.world > 1 and not shards else model
    tokens_per_step = c.accum * c.batch * c.seq
    peak = bf16_peak(device)

    saver = Saver(out, c.keep, say)

    def save():   # nothing random is drawn while training, and the data's place is the step: this is all there is
        saver.wait()   # else a second copy of everything would be in memory
        weights, moments = collect_state(model, optimizer, shards, main)
        if main:
            saver.save({"model": weights, "optimizer": moments,
                        "scales": on_cpu(scales.state_dict()) if scales else None, "step": step, "updates": updates,
                        "skipped": skipped, "best": best, "norms": list(norms), "ranks": ranks.world, "read": read,
                        "config": dataclasses.asdict(c), "model_config": dataclasses.asdict(model.config)})

    about = about_run(c, ranks)   # stands in the first line of the log
    with StopSignal() as stop:
        val_loss = evaluate(model, val_batches, ranks)
        say(f"step {step:>{len(str(c.steps))}}/{c.steps}  validation loss {val_loss:.4f}")
        started = last_time = time.perf_counter()
        first_step, last_step, stopping = step, step, False
        while step < c.steps and not stopping:
            lr = learning_rate(step, c)
            for group in optimizer.param_groups:
                group["lr"] = lr
            logging = (step + 1) % c.log_every == 0 or step + 1 == c.steps
            loss = forward_backward(ddp, train_batches, step, c, ranks, shards, watching=logging)
            if device.type == "cuda":   # which is still busy; from here on this process waits for it
                train_batches.prefetch(step + 1, ranks.rank, device)
            health = scale_health(model, scales, shards) if logging else {}
            norm = shards.norm() if shards else get_total_norm([p.grad for p in parameters])
            flag = torch.tensor(float(stop.received), device=device)
            # All ranks learn the mean loss and whether one was told to stop: the one wait for the GPU in a step.
            loss, stopping, norm_value = torch.cat((all_sum(torch.stack((loss, flag))), norm.view(1))).tolist()

            spike = c.spike and len(norms) >= 20 and norm_value > c.spike * statistics.median(norms)
            if math.isfinite(loss) and math.isfinite(norm_value) and not spike:
                norms.append(norm_value)
                torch.nn.utils.clip_grads_with_norm_(parameters, c.clip, norm)
                updates, in_a_row = updates + 1, 0
                update_weights(optimizer, model, scales, lr, updates, c, shards)
            else:
                skipped, in_a_row = skipped + 1, in_a_row + 1
                say(f"step {step + 1}: loss {loss}, gradient norm {norm_value}: skipped, the weights stay as they were")
                if in_a_row >= c.max_skips:
                    try:
                        first = first_non_finite(model, *train_batches.step(step, ranks.rank, device))
                    except UNREADABLE as e:
                        first = f"its data: {e}"
                    saver.wait()
                    raise RunError(f"{in_a_row} steps in a row had to be skipped, first {first}: lower --lr or look at "
                                   f"the data; {last_good(out)}")
            model.zero_grad(set_to_none=ddp is model)   # DDP: the gradients stay in its buckets, one copy
            step += 1

            evaluating = step % c.eval_every == 0 or step == c.steps
            if logging or evaluating or stopping:
                tokens_per_s = (step - last_step) * tokens_per_step / (time.perf_counter() - last_time)
                record = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm_value,
                          "tokens_per_s": round(tokens_per_s, 1)}
                if peak:
                    record["mfu"] = round(tokens_per_s * flops_per_token(model.config) / ranks.world / peak, 4)
                record.update(health, skipped=skipped)
                if evaluating:
                    record["val_loss"] = val_loss = evaluate(model, val_batches, ranks)
                    check_scales_agree(scales, ranks)
                    best = min(best, [val_loss, step])
                if evaluating or stopping:
                    save()
                if main:
                    finite = {k: v if np.isfinite(v) else None for k, v in record.items()}   # JSON knows no NaN
                    try:
                        log.write(json.dumps({**finite, **about}) + "\n")
                        for key, value in record.items() if board else ():
                            board.add_scalar(key, value, step)
                        about = {}
                    except OSError as e:
                        say(f"warning: step {step} is not in the log ({e.strerror}): make room in {out}")
                left = (time.perf_counter() - started) / (step - first_step) * (c.steps - step)
                say(progress_line(record, c, left))
                last_step, last_time = step, time.perf_counter()
        seconds = time.perf_counter() - started
        if not saver.wait():   # a signal must not end the process before the last checkpoint is written
            raise RunError(saver.failed)
    if step < c.steps:
        say("stopped by a signal and saved; go on with the same command and --resume")
        return None

    if main:
        with suppress(OSError):   # what could not be written was said above
            log.close()
        say(f"\n--- sample ---\n{sample(model, val_batches, device, c.seed)}\n--- summary ---")
    summary = {"recipe": c.fp8, "numerics": numerics(c.fp8, device), "steps": step, "tokens": step * tokens_per_step,
               "train_loss": round(loss, 4), "val_loss": round(val_loss, 4), "skipped_steps": skipped,
               "tokens_per_s": round((step - first_step) * tokens_per_step / seconds),
               "peak_memory_gib": round(peak_memory(device) / 2**30, 2), "time": clock(seconds)}
    for key, value in summary.items():
        say(f"{key:16} {value:,}" if isinstance(value, int) else f"{key:16} {value}")
    return summary


# ---------------------------------------------------------------------------------------------------
# Instead of training: what a checkpoint can do, what the logs show

def restore_quantized(state, model, c):
    """The weights of a checkpoint, and what the recipe of this model makes of them."""
    restore_weights(state, model)
    scales = make_scales(model, make_optimizer(model, c), c)
    restore_scales(state, scales, c)
    requantize(model, scales)


def report(c, ranks):
    """--eval_only and --sample, of the newest whole checkpoint. Writes nothing."""
    device, say = ranks.device, ranks.say
    model, _, batches = build(c, device)
    path, state = load_checkpoint(Path(c.out), model.config, say)
    note_changes(state, c, ("fp8", "data", "seq"), say)   # of a sample, too: the data say whether tokens are text
    restore_quantized(state, model, c)
    if c.eval_only:
        loss = evaluate(model, batches, ranks)
        say(f"{path}: step {state['step']}, validation loss {loss:.4f}, perplexity "
            f"{torch.tensor(loss).exp():.3f}, {numerics(c.fp8, device)}")
    if c.sample is not None:
        say(sample(model, batches, device, c.seed, c.sample))


def compare(c, ranks):
    """--eval_only of several recipes: loss and gradient of the same micro-batches at the same weights. Writes nothing.

    Runs that differ in rounding alone drift apart, and then chance has a part in their losses; here it has none. The
    error of a gradient is ||g - g_first|| / ||g_first||, where g_first is that of the first recipe: over all parameters
    and over each kind of quantized layer. To compare it with: how far the gradient of one micro-batch is from the mean.
    """
    if ranks.world > 1:
        raise UserError(f"--eval-only --fp8 {c.fp8}: {ranks.world} ranks cannot share it, run it without torchrun")
    recipes = [dataclasses.replace(c, fp8=fp8) for fp8 in c.fp8.split(",")]
    model, _, batches = build(recipes[0], ranks.device)
    path, state = load_checkpoint(Path(c.out), model.config, print)
    note_changes(state, c, ("data", "seq"), print)
    kinds, first = {"gradient": "", "qkv": ".qkv.", "out": ".out.", "gate_up": ".gate_up.", "down": ".down."}, None
    for recipe in recipes:
        model = model or make_model(recipe, ranks.device, batches.vocab)   # the first is there
        restore_quantized(state, model, recipe)
        loss, gradient, deviation = mean_gradient(model, batches, ranks.device)
        if first is None:
            first = gradient
            print(f"{path}: step {state['step']}; {c.eval_batches} micro-batches of {c.batch} x {c.seq} validation "
                  f"tokens; the gradient of one is {deviation:.0%} away from their mean\n\n"
                  f"{'recipe':12}{'loss':>8}" + "".join(f"{kind:>10}" for kind in kinds))
        errors = []
        for part in kinds.values():
            names = [name for name in first if part in name]
            difference = get_total_norm([gradient[name] - first[name] for name in names])
            errors.append(difference / get_total_norm([first[name] for name in names]))
        print(f"{recipe.fp8:12}{loss:8.4f}" + "".join(f"{error:10.2%}" for error in errors), flush=True)
        model = gradient = None
        gc.collect()   # a compiled model refers to itself: the next one needs its memory


def mean_gradient(model, batches, device):
    """Of the validation micro-batches -> mean loss; {name: mean gradient}; how far that of one is from it, relative."""
    count, loss, square = batches.config.eval_batches, 0.0, 0.0
    mean = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i in range(count):
        one = model(*batches.evaluation(i, device))
        one.backward()
        loss += one.item() / count
        for name, p in model.named_parameters():
            mean[name].add_(p.grad, alpha=1 / count)
        square += get_total_norm([p.grad for p in model.parameters()]).item() ** 2 / count
        model.zero_grad()
    norm = get_total_norm(list(mean.values())).item()
    return loss, mean, math.sqrt(max(square - norm ** 2, 0) * count / max(count - 1, 1)) / norm


def plot_runs(folders, path):
    """Training losses as lines, validation losses as dots, of the runs in these folders; those behind others wider."""
    with picture(path, yscale="log", xlabel="step", ylabel="loss in nats per token; dots: validation") as axes:
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:.3g}")
        axes.yaxis.set_minor_formatter(lambda y, _: f"{y:.3g}")
        for behind, folder in zip(reversed(range(len(folders))), folders):
            try:
                records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            except (OSError, ValueError) as e:
                raise UserError(f"--plot: {folder} has no log to draw ({e}): give folders as --out a,b") from None
            steps, losses, val_losses = ([r.get(key) for r in records] for key in ("step", "loss", "val_loss"))
            line, = axes.plot(steps, losses, label=folder.name, lw=1 + 2 * behind)
            axes.plot(steps, val_losses, "o", ms=4 + 3 * behind, color=line.get_color())


# ---------------------------------------------------------------------------------------------------
# How fast is a step?

COLUMNS = {  # of the table that --bench prints: (width, format)
    "fwd+bwd ms": (11, ".2f"), "optimizer ms": (14, ".2f"), "tokens/s": (11, ",.0f"), "MFU": (8, ".1%"),
    "x none": (8, ".3f"), "peak GiB": (10, ".2f"), "kept GiB": (10, ".3f"), "compile s": (11, ".1f")}


def bench(c, device):
    """Times the recipes one after another on random tokens; -> {name: its row of COLUMNS}. Writes no files.

    Medians: forward + backward of a micro-batch; the optimizer's step. tokens/s and MFU count --accum of the first and
    one of the second, `x none` the first alone. `kept` is what a forward pass leaves for the backward pass, and
    `compile` what the first step took longer than the others.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, PyTorch {torch.__version__}; {c.model}, {c.layers} layers, {c.batch} x {c.seq} tokens, "
          f"recompute {c.recompute}; medians of {c.steps} steps\n")
    print(f"{'recipe':20}" + "".join(f"{title:>{width}}" for title, (width, _) in COLUMNS.items()))
    rows = {}
    rivals = ["torchao tensorwise", "torchao rowwise"] if device.type == "cuda" and find_spec("torchao") else []
    for fp8 in c.fp8.split(",") + rivals:
        rows[fp8] = row = bench_recipe(c, fp8, device)
        gc.collect()   # a compiled model refers to itself: its weights would count as the next one's memory
        row["x none"] = rows["none"]["fwd+bwd ms"] / row["fwd+bwd ms"] if "none" in rows else math.nan
        cells = (f"{row[title]:{width}{form}}" if math.isfinite(row[title]) else f"{'-':>{width}}"
                 for title, (width, form) in COLUMNS.items())
        print(f"{fp8:20}" + "".join(cells), flush=True)
    return rows


def use_torchao(model, kind):
    """Hands the linear layers of the blocks over to torchao's float8 training."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    for block in model.blocks:
        for name, layer in list(block.named_children()):
            if isinstance(layer, Linear):
                theirs = torch.nn.Linear(*layer.weight.shape[::-1], bias=False, device="meta")
                theirs.weight = layer.weight
                setattr(block, name, theirs)
    convert_to_float8_training(model.blocks, config=Float8LinearConfig.from_recipe_name(kind))


def bench_recipe(c, fp8, device):
    torch.manual_seed(c.seed)
    c = dataclasses.replace(c, fp8="none" if fp8.startswith("torchao") else fp8)
    model = make_model(c, device)
    optimizer = make_optimizer(model, c)
    scales = make_scales(model, optimizer, c)
    requantize(model, scales)
    if fp8.startswith("torchao"):
        use_torchao(model, fp8.split()[1])
    inputs, targets = torch.randint(model.config.vocab, (2, c.batch, c.seq), device=device)
    gpu, times, kept = device.type == "cuda", [], math.nan
    wait = torch.cuda.synchronize if gpu else lambda: None
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    for step in range(c.steps + 3):   # the first three warm up
        wait()
        start, before = time.perf_counter(), torch.cuda.memory_allocated() if gpu else 0
        loss = model(inputs, targets)
        if gpu:
            kept = torch.cuda.memory_allocated() - before
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
            "MFU": tokens * flops_per_token(model.config) / seconds / (bf16_peak(device) or math.nan),
            "peak GiB": peak_memory(device) / 2**30 if gpu else math.nan, "kept GiB": kept / 2**30,
            "compile s": times[0][0] - forward_backward}


def main(argv=None):
    """Runs the command line; returns the exit code."""
    try:
        config = parse_config(argv)
        if config.plot:
            plot_runs([Path(folder) for folder in config.out.split(",")], config.plot)
        elif config.bench or config.eval_only or config.sample is not None:
            ranks = start_ranks(config.device)
            c = resolve(config, ranks.device, 1)
            bench(c, ranks.device) if c.bench else compare(c, ranks) if "," in c.fp8 else report(c, ranks)
        else:
            train(config)
        return 0
    except UserError as e:
        code, message = 2, e
    except (RunError, OSError) as e:
        code, message = 1, e
    except (MemoryError, RuntimeError) as e:   # torch.OutOfMemoryError is a RuntimeError; on a CPU it has no name
        code, reason = 1, str(e).split("\n")[0].split(". ")[0][:160]
        if re.search("out of memory|DefaultCPUAllocator", str(e)) or isinstance(e, MemoryError):
            message = (f"{reason or 'out of memory'}: halve --batch and double --accum, which trains the same in less "
                       f"memory, or add --recompute block; python model.py counts what models need")
        elif "RANK" in os.environ and re.search("connection|gloo|nccl", str(e), re.IGNORECASE):
            message = (f"another rank is gone or cannot be reached ({reason}): its messages say why; "
                       f"torchrun --max-restarts goes on from the last checkpoint")
        else:
            raise
    rank = int(os.environ.get("RANK", 0))
    print(f"rank {rank}: error: {message}" if rank else f"error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True, errors="replace")   # in a file, too, a line is there when it is printed
    code = main()
    try:
        sys.stdout.flush()
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
