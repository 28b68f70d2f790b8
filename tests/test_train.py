"""
What train.py promises: one start and the same data for all recipes, resume bit for bit, no NaN in a weight,
and mistakes said in a line.

    $ python -m pytest tests/test_train.py

The runs are tiny: nano with one block, 16 tokens x 2 sequences, a few steps. They run in this process. Ranks
are copies of it (`on_ranks`). What needs another process runs beside the tests (BESIDE, conftest.py).
"""

import copy
import dataclasses
import errno
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import zlib
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import DEFAULT, MagicMock, Mock

import numpy as np
import pytest
import torch
from conftest import DEVICE, ON_HOPPER, needs_muon

import autoscale
import model
import train
from microscale import HAS_TRITON, RECIPES, quantize_weight
from model import PRESETS, Block, Transformer

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}   # of other processes, before a test changes it
CPU = torch.device("cpu")
GENERATE = Transformer.generate
TEXT = "the quick brown fox jumps over the lazy dog.\n" * 100
TINY = ("--device cpu --model nano --layers 1 --seq 16 --batch 2 --accum 1 --steps 4 "
        "--log_every 1 --eval_every 2 --eval_batches 1").split()
KILLED = "--fp8 moss --accum 2 --steps 8 --eval_batches 2 --resume"   # one of two ranks, under torchrun
STATE = "parameters", "progress"   # of a checkpoint
LAYERS = 4   # quantized ones of a block: qkv, out, gate_up and down
MOE, MUON = "--model nano-moe", "--optimizer muon"

pytestmark = pytest.mark.usefixtures("one_thread", "quick")


@pytest.fixture
def quick(monkeypatch):
    """No signal has been received yet, and no sample is made: 200 tokens take longer than these runs."""
    monkeypatch.setattr(train, "stop", SimpleNamespace(received=False, in_loop=False))
    monkeypatch.setattr(Transformer, "generate", lambda self, prompt, *_, **__: prompt)


def tiny_in(folder):
    """Return a function that gives the command line of a short run. The later of equal options counts."""
    (folder / "text.txt").write_text(TEXT)

    def command(more="", out="out"):
        return [*TINY, "--data", str(folder / "text.txt"), "--out", str(folder / out), *shlex.split(more)]
    return command


@pytest.fixture
def tiny(tmp_path):
    return tiny_in(tmp_path)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def run(command):
    return train.train(train.parse_config(command))


def go_on(out, more="--resume"):
    """Return a command line that leaves all options to the run in `out`."""
    return ["--device", "cpu", "--out", str(out), *more.split()]


def said(command, capsys, code=0):
    """Run a command line that ends with this exit code. Return what it printed, as .out and .err."""
    capsys.readouterr()
    assert train.main(command) == code
    return capsys.readouterr()


def contents(folder):
    paths = [Path(top, name) for top, _, names in os.walk(folder) for name in names if ".tmp" not in top]
    return {path: path.read_bytes() for path in paths if path.name != ".lock"}   # .tmp: still being removed


def assert_refused(command, words, folder, capsys, code=2):
    """One line on stderr says all these words, and no file is touched."""
    before, lines = contents(folder), said(command, capsys, code).err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert [word for word in words if word not in lines[0]] == [], lines
    assert contents(folder) == before


def steps_in(out):
    return [int(path.name[5:]) for path in train.checkpoints(out)]


def states(out):
    """Return [{"parameters", and what the manifest says}] of the checkpoints, the newest first."""
    found = []
    for path in train.checkpoints(out):
        saved = json.loads((path / "manifest.json").read_text())["content"]
        parts = [torch.load(path / name, weights_only=True) for name in saved["files"]]
        parameters = {}
        for name, kept in (item for part in parts for item in part.items()):
            if name in parameters:   # experts that were spread over the ranks
                kept = {k: torch.cat((parameters[name][k], x)) if x.dim() else x for k, x in kept.items()}
            parameters[name] = kept
        found.append({**saved, "parameters": parameters})
    return found


def weights(out):
    return {name: kept["weight"] for name, kept in states(out)[0]["parameters"].items()}


def read_log(out):
    lines = (out / "log.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]   # JSON has no NaN nor Infinity


def config(**values):
    """Return a resolved configuration, for what takes one apart from a run."""
    return train.resolve(train.Config(**dict(model="nano", layers=1, seq=16, batch=2) | values), CPU, 1)


def same(a, b):
    """Return whether these are bit for bit the same tensors in the same nest of dicts and lists."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_state(one, other, parts=STATE):
    """Return whether the newest checkpoints in two folders hold the same."""
    one, other = states(one)[0], states(other)[0]
    return all(same(one[part], other[part]) for part in parts)


# ------------------------------------------------------------------------------------------------------------
# Spies: what a run sees, and what is done to it

def before_call(monkeypatch, owner, name, action):
    """Call action(*arguments) before each call of a function."""
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **k: (action(*a), original(*a, **k))[1])


def do_at_step(monkeypatch, step, action):
    """Call `action` as the data of optimizer step `step`, from 0, are read (for --accum 1 on a CPU once)."""
    before_call(monkeypatch, train.Batches, "step", lambda _, number, *__: number == step and action())


def on_model(monkeypatch, action):
    """Call action(model) on each new model, with its initial weights, before it trains."""
    init = Transformer.__init__
    monkeypatch.setattr(Transformer, "__init__", lambda net, *a: (init(net, *a), action(net))[0])


def poison(monkeypatch, steps, factor=math.nan, part="gradient"):
    """Multiply the gradient of one weight, or the loss, in these steps, from 0 (for --accum 1)."""
    now = []
    before_call(monkeypatch, train.Batches, "step", lambda _, step, *__: now.append(step))

    def spoil(x):
        return x * factor if now and now[-1] in steps else x

    def on_loss(net, inputs, loss):
        return spoil(loss) if torch.is_grad_enabled() else loss   # not in an evaluation
    on_model(monkeypatch, lambda net: net.blocks[0].down.weight.register_hook(spoil)
             if part == "gradient" else net.register_forward_hook(on_loss))


# ------------------------------------------------------------------------------------------------------------
# Other processes, and copies of this one as ranks

def train_py(folder, more="", code=None, launcher=(), shell=(), **options):
    """Run `python train.py`, or Python code in its place, as a process of its own."""
    command = [*launcher, *(["-c", code] if code else ["train.py"]), *tiny_in(folder)(more)]
    usual = dict(env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=120)
    return subprocess.run([*shell, sys.executable, *command], cwd=ROOT, **{**usual, **options})


def signal_at(function, call, number):
    """Return code for train_py. From this call of a function (of model.py, PyTorch) on, each sends a signal
    to its process: of several ranks, to rank 1 in its first life."""
    return f"""
import itertools, os, runpy, sys, time, model, torch
original, calls = {function}, itertools.count(1)
hit = os.environ.get("RANK", "1") == "1" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
def spy(*arguments, **options):
    if next(calls) >= {call} and hit:
        os.kill(os.getpid(), {int(number)})
        time.sleep(0.1)
    return original(*arguments, **options)
{function} = spy
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def on_ranks(world, job, code=0, meanwhile=lambda copies: None):
    """Call job(rank) in copies of this process, which end with this exit code. Return what each printed."""
    if ON_HOPPER or "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("a process that has used a GPU cannot be copied")
    port, files = str(free_port()), [tempfile.TemporaryFile("w+") for _ in range(world)]

    def copied(rank):
        sys.stdout = sys.stderr = files[rank]
        if world > 1:
            os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="localhost",
                               MASTER_PORT=port)
        torch.set_num_threads(1)   # renews PyTorch's pool: several threads that did so at once would fail
        code = job(rank)
        if world > 1 and code == 0:
            torch.distributed.barrier()   # none leaves while another still needs it
        sys.exit(code)
    fork = multiprocessing.get_context("fork")
    copies = [fork.Process(target=copied, args=(rank,)) for rank in range(world)]
    for process in copies:
        process.start()
    meanwhile(copies)
    for process in copies:
        process.join()
    printed = [(file.seek(0), file.read())[1] for file in files]
    assert [process.exitcode for process in copies] == [code] * world or code is None, printed
    return printed


def train_on(world, command, stop_at=None):
    """Run a command line on this many ranks. A signal reaches the last one in step `stop_at`, from 0."""
    def job(rank):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "stop", SimpleNamespace(received=False, in_loop=False))
            if rank == world - 1:
                do_at_step(patch, stop_at, train.on_signal)
            return train.main(command)
    assert on_ranks(world, job) if world > 1 else job(0) == 0


# ------------------------------------------------------------------------------------------------------------
# Every recipe trains, and from the same start on the same data

@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_learns_and_logs_what_it_can_lose(recipe, tiny, out, monkeypatch):
    weights, folds = [], []
    before_call(monkeypatch, model, "quantize_weight", lambda *_: weights.append(1))
    before_call(monkeypatch, model, "fold_loss", lambda *_: folds.append(1))
    summary = run(tiny(f"--fp8 {recipe} --seq 32 --batch 4 --accum 2 --steps 20 --log_every 10"))
    assert summary["val_loss"] < 1   # measured 0.30; ignorance is ln 256 = 5.5, letter frequencies give 3.0
    assert summary["recipe"] == recipe and summary["steps"] == 20 and summary["skipped_steps"] == 0
    assert len(weights) == (0 if recipe == "none" else 21 * LAYERS)   # at the start, and after each step
    assert len(folds) == (2 * LAYERS * 2 if recipe == "moss" else 0)   # X and dY, in each logged step
    expected = {"saturated", "saturated_grad"} if recipe != "none" else set()
    expected |= {"folded", "folded_grad", "folded_wgrad"} if recipe == "moss" else set()
    assert {key for key in read_log(out)[-1] if key.startswith(("folded", "saturated"))} == expected


def test_all_recipes_see_the_same_batches_from_the_same_weights_and_another_seed_gives_others(tiny):
    def seen(options):
        calls = []
        with pytest.MonkeyPatch.context() as patch:
            on_model(patch, lambda net: calls.append(copy.deepcopy(net.state_dict())))
            patch.setattr(train, "watch", lambda *_: [])
            before_call(patch, Transformer, "forward", lambda net, *batch: calls.append(batch))
            run(tiny(f"{options} --steps 2 --accum 2"))
        return calls
    weights, evaluated, *batches, _ = calls = seen("--fp8 none")
    assert len(batches) == 4 and all(same(calls, seen(f"--fp8 {recipe}")) for recipe in RECIPES)
    other_weights, other_evaluated, *other_batches, _ = seen("--fp8 none --seed 1")
    assert same(evaluated, other_evaluated) and not same(weights, other_weights)
    assert not any(map(same, batches, other_batches))


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("fused, down", [(False, {}), (True, {}), (False, {"frozen": True}),
                                         (False, {"recipe": RECIPES["group"]})], ids=str)
def test_the_copies_that_an_update_leaves_are_current_whoever_writes_them(fused, down, tiny, monkeypatch):
    """Also those of a frozen weight, whose scale grows like the others', and of a layer of another recipe."""
    monkeypatch.setattr(autoscale, "kernels_run_on", lambda device: True)
    by_kernel = []
    before_call(monkeypatch, autoscale, "adamw_triton", lambda *_: by_kernel.append(1))
    on_model(monkeypatch, lambda net: vars(net.blocks[0].down).update(down) or (
        net.blocks[0].down.weight.requires_grad_("frozen" not in down)))

    def check(run, *_):
        for group in run.optimizer.param_groups:
            group["fused"] = fused   # as a GPU's are
        for layer, scale in zip(run.model.linears(), run.scales.scale.view(-1, 1, 1), strict=True):
            scale = scale if layer.recipe.weight_scale == "predicted" else None
            expected = quantize_weight(layer.weight.detach(), layer.recipe, scale)
            for copied, wanted in zip((layer.w, layer.w_t), expected):   # which raise if they are not current
                assert same(copied.data.view(torch.uint8), wanted.data.view(torch.uint8))
                assert same(copied.scale, wanted.scale)
    before_call(monkeypatch, train, "update_weights", check)
    run(tiny(f"--fp8 moss --device {DEVICE} --steps 4 --rescale_interval 2"))   # the second measures scales
    assert len(by_kernel) == 4 * (LAYERS - len(down))


@needs_muon
def test_scales_grow_by_the_bound_of_muons_step_and_not_of_adams(tiny):
    c = train.parse_config(tiny(f"--fp8 moss {MUON} --weight_decay 0"))
    run = train.build(c, train.start(c)[0])
    before = run.scales.scale.clone()
    train.forward_backward(run, 0)
    train.update_weights(run, 0.01, 1)
    group = run.optimizer.param_groups[0]
    bounds = [autoscale.muon_step_bound(group, layer.weight.shape) for layer in run.model.linears()]
    expected = 0.01 * torch.tensor(bounds) / 448
    torch.testing.assert_close(run.scales.scale - before, expected, rtol=1e-4, atol=0)   # a slack of 2^-21


# ------------------------------------------------------------------------------------------------------------
# Several ranks

@pytest.mark.parametrize("recipe", ["none", "tensor", "moss", "moss --shard"])
@pytest.mark.parametrize("part, more", [
    ("nothing", ""), ("embed", ""), ("down", ""), ("", ""), ("nothing", MOE),
    pytest.param("nothing", MUON, marks=needs_muon)])
def test_weights_train_if_not_frozen_and_on_two_ranks_as_on_one(part, more, recipe, tiny, tmp_path,
                                                                monkeypatch):
    # Bit for bit: two micro-batches leave one addition, whose order does not matter, and halving is exact.
    # (From four on, the order of the sums differs, and Adam makes large updates of tiny differences.)
    on_model(monkeypatch, lambda net: [p.requires_grad_(False) for name, p in net.named_parameters()
                                       if part in name and name != "head.weight"])
    clip = 1 if part == "nothing" else 1e30   # shards sum the norm in another order
    command = (f"--fp8 {recipe} {more} --accum 2 --eval_batches 2 --eval_every 1 --keep 9 --clip {clip} "
               f"--rescale_interval 2")
    run(tiny(command, "one"))
    last, *_, first = [state["parameters"] for state in states(tmp_path / "one")]
    for name in first:
        assert same(first[name]["weight"], last[name]["weight"]) == (part in name and name != "head.weight")
    places = []

    def check(run, *_):   # DDP's gradients stay in its buckets: beside these they take memory twice
        places.append([p.grad.data_ptr() for p in run.ddp.parameters() if p.requires_grad])
        assert places[0] == places[-1]

    def job(rank):
        before_call(monkeypatch, train, "forward_backward", check)
        before_call(monkeypatch, train, "gradient_norm", check)
        if rank == 1:   # another kind of GPU draws other initial weights from the same seed
            on_model(monkeypatch, lambda net: [p.data.mul_(1.5) for p in net.parameters()])
        return train.main(tiny(command, "two"))
    assert on_ranks(2, job)[1] == ""
    assert same_state(tmp_path / "one", tmp_path / "two", STATE if part == "nothing" else ["parameters"])
    one, two = ([[r.get(key) for key in ("step", "scale_ratio", "scale_ratio_min", "load")]
                 for r in read_log(tmp_path / name)] for name in ("one", "two"))
    assert one == two and [step for step, *_ in two] == [1, 2, 3, 4]
    assert recipe == "none" or min(least for _, _, least, _ in two) >= 1 - 1e-6
    assert more != MOE or min(load for *_, load in two) > 1


@pytest.mark.parametrize("recipe", ["none", "tensor", "mx", "moss --shard", "moss --recompute block",
                                    "none, starved", "moss, starved"])
def test_experts_spread_over_two_ranks_train_as_on_one(recipe, tiny, tmp_path, monkeypatch):
    """Each rank adds up what its experts give, so sums are in another order, and a few numbers fall to the
    other side of a tie of FP8: 1e-6 of the loss in FP32, 1e-3 under scales per token. Scales that several
    tokens share, `tensor` and wgrad of `mx`, are those of the tokens of both ranks: 1e-2. Of a rank that is
    starved, the experts get no token."""
    recipe, _, starved = recipe.partition(", ")
    if starved:
        on_model(monkeypatch, lambda net: net.blocks[0].router.bias.data[:2].fill_(9))   # scores are below 1
    more = f"--model nano-moe --accum 4 --eval_batches 4 --rescale_interval 3 --clip 0.5 --fp8 {recipe}"
    train_on(1, tiny(more, "one"))
    train_on(2, tiny(f"{more} --expert_parallel 2", "two"))
    for one, two in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two"), strict=True):
        for key in ("loss", "grad_norm", "val_loss", "load"):
            tolerance = {"none": 1e-6, "tensor": 1e-2, "mx": 1e-2}.get(recipe, 1e-3)
            tolerance *= 10 if key in ("grad_norm", "load") else 1
            assert one.get(key, 0) == pytest.approx(two.get(key, 0), rel=tolerance), (key, one["step"])
        assert not starved or two["load"] == 4   # two of eight experts get all


SHARDED = {1: "", 2: "--shard", 3: ""}   # options by the number of ranks
SPREAD = {ranks: f"--model nano-moe --expert_parallel {ranks}" for ranks in (1, 2, 4)}


@pytest.mark.parametrize("writers, written, read", [
    *((writers, more, SHARDED) for writers, more in SHARDED.items()),
    (1, SPREAD[1], SPREAD), (2, SPREAD[2] + " --shard", SPREAD)])
def test_a_checkpoint_is_read_by_any_number_of_ranks_bit_for_bit(writers, written, read, tiny, tmp_path):
    more = "--fp8 moss --accum {0} --eval_batches {0}".format(math.lcm(writers, *read))
    train_on(writers, tiny(f"{more} --steps 2 {written}", "written"))
    for readers, options in read.items():
        shutil.copytree(tmp_path / "written", tmp_path / f"by {readers}")

        def read_and_write(rank):
            train.update_weights = Transformer.balance = lambda *_: None   # the next holds what was read
            return train.main(tiny(f"{more} --steps 3 --resume {options}", f"by {readers}"))
        on_ranks(readers, read_and_write)
        last, first = states(tmp_path / f"by {readers}")
        assert (len(last["files"]), len(first["files"])) == (readers, writers)
        assert same(last["parameters"], first["parameters"])


@pytest.mark.parametrize("options, factor, error", [
    ("--data copy.txt", 1, None), ("--data longer.txt", 1, "different options or data"),
    ("--lr 1", 1, "different options or data"), ("--out other", 1, "different checkpoints: .* all nodes see"),
    ("", 2, "different weight scales"), ("", 0.5, None)])   # where weights exceed them, all measure them anew
def test_ranks_that_disagree_are_stopped(options, factor, error, tiny, tmp_path, out, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"copy.txt": TEXT, "longer.txt": 2 * TEXT})
    command = "--fp8 moss --accum 2 --eval_batches 2 --resume "
    train_on(1, tiny(command), stop_at=1)
    before, load = contents(out), torch.load

    def scaled(path, **options):
        content = load(path, **options)
        for kept in content.values() if "mmap" in options else ():   # of a checkpoint
            kept |= {"scale": factor * kept["scale"]} if "scale" in kept else {}
        return content

    def job(rank):
        torch.load = scaled if rank == 1 else load
        return train.main(tiny(command + options * rank))
    assert re.search(error or "--- summary ---", on_ranks(2, job, 1 if error else 0)[0])
    assert steps_in(out) == ([2] if error else [4, 2])
    assert contents(out) == before if error and options else read_log(out)[-1]["scale_ratio_min"] >= 1


def test_scales_of_another_recipe_are_measured(tiny, out, monkeypatch):
    run(tiny("--fp8 tensor --steps 2"))
    kept = states(out)[0]["parameters"]
    # From large weights, so that scales that are not measured again would be too large, not too small.
    on_model(monkeypatch, lambda net: [p.data.mul_(4) for p in net.parameters()])
    c = train.parse_config(go_on(out, "--resume --fp8 moss --steps 4"))
    again = train.build(c, *train.start(c))
    assert all(same(p.data, kept[name]["weight"]) for name, p in again.model.named_parameters())
    assert torch.equal(again.scales.scale, again.scales.true_scale())


def test_owners_share_the_parameters_evenly_and_hold_the_only_numbers():
    loads = []
    for rank in range(4):
        net = Transformer(PRESETS["nano"], "moss")
        owner = train.owners(net, 4)
        run = SimpleNamespace(model=net, owner=owner, mine=lambda p: owner[p] == rank,
                              ranks=train.Ranks(rank, 4, CPU))
        train.drop_weights(run)
        for w in (layer.weight for layer in net.linears()):
            assert w.untyped_storage().nbytes() == 4 * (w.numel() if run.mine(w) else 1)
        loads.append(sum(p.numel() for p in net.parameters() if run.mine(p)))
    assert max(loads) < 1.1 * min(loads) and sum(loads) == sum(p.numel() for p in net.parameters())
    run.ranks.world = 1000
    with pytest.raises(train.UserError, match="--shard: 1000 ranks are more than the"):
        train.drop_weights(run)


def killed_under_torchrun(folder):
    """Return the folder and the end of a run on two ranks, one of which is killed in its seventh step."""
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--max-restarts", "3",
                "--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{free_port()}"]
    kill = signal_at("model.Transformer.forward", 17, signal.SIGKILL)   # those of `watch` count as well
    return folder, train_py(folder, KILLED, kill, [*torchrun, "--no-python", sys.executable])


def test_torchrun_restarts_a_run_whose_rank_was_killed_and_nothing_of_it_shows_in_the_weights(beside):
    folder, done = beside["test_torchrun_restarts_a_run"].result()
    assert done.returncode == 0 and done.stdout.count("the run begins") == 1, done
    assert len(re.findall("resumed .*/step_0000000[246]", done.stdout)) == 1   # the second start goes well
    assert "failed to connect" not in done.stdout + done.stderr and not (folder / "out.1").exists()
    assert [record["step"] for record in read_log(folder / "out")] == [1, 2, 3, 4, 5, 6, 7, 8]   # each once
    run(tiny_in(folder)(KILLED, "whole"))
    assert same_state(folder / "out", folder / "whole")


# What a GPU computes in an order of its own gets a fixed one, so that runs can be compared bit for bit.
ON_GPUS = """
import os, sys
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
sys.path.insert(0, {root!r})
import torch, train
torch.use_deterministic_algorithms(True)
train.sample = lambda *_: ""
forward_backward = train.forward_backward

def as_two_ranks_would(run, step):
    "On one GPU: the gradients of both micro-batches rounded to BF16 and added, as two ranks do that."
    losses, sent, ranks = [], [], run.ranks
    for rank in (0, 1):
        run.ranks = train.Ranks(rank, 2, ranks.device)
        loss, loads, batch = forward_backward(run, step)
        losses.append(loss)
        sent.append([p.grad.bfloat16() / 2 for p in run.model.parameters()])
        run.model.zero_grad()
    for p, first, second in zip(run.model.parameters(), *sent):
        p.grad = (first + second).float()
    run.ranks = ranks
    return sum(losses), loads, batch

if "RANK" not in os.environ:
    train.forward_backward = as_two_ranks_would
code = train.main(sys.argv[1:])
train.gc.collect()
if train.dist.is_initialized():
    train.dist.destroy_process_group()
sys.exit(code)
"""


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("recipe", ["none", "moss", "moss --shard"])
def test_two_gpus_train_the_same_weights_as_one_that_sends_gradients_in_bf16(recipe, tiny, tmp_path):
    (tmp_path / "script.py").write_text(ON_GPUS.format(root=str(ROOT)))
    more = (f"--device cuda --seq 64 --accum 2 --steps 3 --eval_every 3 --eval_batches 2 "
            f"--rescale_interval 2 --fp8 {recipe}")
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    for name, launcher in (("one", []), ("two", torchrun)):
        done = subprocess.run([sys.executable, *launcher, str(tmp_path / "script.py"), *tiny(more, name)],
                              env={**ENVIRONMENT, "TORCH_COMPILE_DISABLE": "1"}, timeout=180,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    assert same_state(tmp_path / "one", tmp_path / "two", ["parameters"])


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [*RECIPES, "moss --model nano-moe", "none --model nano-moe",
                                    "moss --recompute block"])
def test_on_a_gpu_a_graph_trains_as_single_kernels_do(recipe, tiny):
    """To rounding: attention adds up its gradients in no fixed order."""
    command = f"--device cuda --seq 64 --accum 3 --steps 5 --rescale_interval 2 --fp8 {recipe}"
    eager, graph = run(tiny(f"{command} --eager", "eager")), run(tiny(command, "graph"))
    assert graph["val_loss"] == pytest.approx(eager["val_loss"], rel=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("first, then", [("moss", "none"), ("none", "moss"), ("tensor", "moss"),
                                         ("moss", "moss")])
def test_on_a_gpu_a_checkpoint_goes_on_under_any_recipe(first, then, tiny, tmp_path):
    train_on(1, tiny(f"--device cuda --fp8 {first}"), stop_at=2)
    summary = run(tiny(f"--device cuda --fp8 {then} --resume"))
    assert summary["steps"] == 4 and math.isfinite(summary["val_loss"])
    if first == then:
        assert run(tiny(f"--device cuda --fp8 {first}", "straight"))["val_loss"] == summary["val_loss"]
        assert same(weights(tmp_path / "out"), weights(tmp_path / "straight"))


# ------------------------------------------------------------------------------------------------------------
# What is nobody's mistake: errors of the machine, output that cannot be written, signals

ERRORS = {   # of the run: what the one line on stderr says
    RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:39127. And so on."):
        ["another rank is gone", "--max-restarts with --resume"],
    torch.OutOfMemoryError("CUDA out of memory. Tried to"): ["CUDA out of memory: halve --batch and double"],
    RuntimeError("DefaultCPUAllocator: can't allocate memory"): ["halve --batch and double --accum"],
    MemoryError(): ["out of memory: halve --batch and double --accum"],
    OSError(errno.ESTALE, "Stale file handle", "tokens.bin"): ["Stale file handle: 'tokens.bin'"],
    None: ["the ranks cannot meet"],   # without MASTER_ADDR
    RuntimeError("The size of tensor a (2) must match that of b (3)"): None}   # the program's own: not hidden


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_what_goes_wrong_with_the_machine_is_said_in_one_line(error, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    if error:
        monkeypatch.setattr(train, "train", Mock(side_effect=error))
    if ERRORS[error]:
        assert_refused(tiny(), ERRORS[error], tmp_path, capsys, code=1)
    else:
        with pytest.raises(RuntimeError, match="The size of tensor"):
            train.main(tiny())


@pytest.mark.parametrize("where", ["full disk", "closed stdout", "no Triton"])
def test_a_run_does_not_need_a_terminal_nor_triton(where, beside):
    done = beside[where].result()
    assert done.returncode == 0 and "rror" not in done.stderr, done.stderr
    assert where != "no Triton" or done.stdout.count("FP8 emulated") == 2   # moss, said at both ends


FORWARD = "model.Transformer.forward"
SIGNALS = {   # when: (from which call of which function on, signal, exit code, what is printed, checkpoint)
    "SIGTERM at the start": ("model.Transformer.__init__", 1, signal.SIGTERM, 0, "", 0),
    "SIGINT in the evaluation": (FORWARD, 1, signal.SIGINT, 0, "stopped by a signal; ", 1),
    "SIGTERM in a step": (FORWARD, 4, signal.SIGTERM, 0, "step_00000003 is the last good", 3),
    "SIGTERM in the last checkpoint": ("torch.save", 1, signal.SIGTERM, 0, "val_loss         ", 4),
    "SIGTERM in the sample": ("model.Transformer.generate", 1, signal.SIGTERM, 0, "val_loss         ", 4),
    "SIGKILL in the evaluation": (FORWARD, 1, signal.SIGKILL, -9, "none: FP32 on CPU\n", 0)}


def signal_in(name, folder):
    """Run train.py as a process that signals reach. It prints ASCII alone."""
    more = f"--fp8 none --eval_every 4 --log_every 4 --out {folder}/größer"
    return folder / "größer", train_py(folder, more, signal_at(*SIGNALS[name][:3]), env={
        **ENVIRONMENT, "PYTHONUNBUFFERED": "", "PYTHONIOENCODING": "ascii"})


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_at_any_time_saves_and_is_no_error_and_what_was_printed_is_there(name, beside):
    (out, done), (*_, code, printed, last) = beside[name].result(), SIGNALS[name]
    assert done.returncode == code and printed in done.stdout and steps_in(out) == [last] * (last > 0), done
    assert not re.search("error|Traceback", done.stderr)   # PyTorch may warn there that it finds no CUDA
    assert ("stopped by a signal before the first step\n" in done.stderr) == ("start" in name)
    assert not last or [record["step"] for record in read_log(out)] == [last]
    assert "last good" not in printed or "; go on with --resume --out /" in done.stdout


# ------------------------------------------------------------------------------------------------------------
# Resume: bit for bit, with the options of the run

@pytest.mark.parametrize("world, options, change", [
    (1, "none", None), (1, "tensor", None), (1, "moss", None), (2, "moss", None), (2, "moss --shard", None),
    *((1, "moss --layers 2", recipe) for recipe in ("none", "tensor", "group")), (1, "moss", "skip"),
    (1, f"tensor {MOE}", None), (2, f"moss --shard {MOE}", None),
    *((2, f"{recipe} {MOE} --expert_parallel 2", None) for recipe in ("none", "moss --shard")),
    *(pytest.param(world, f"{recipe} {MUON}", None, marks=needs_muon)
      for world, recipe in ((1, "none"), (1, "tensor"), (1, "moss"), (2, "moss --shard")))])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(world, options, change, tiny, out, monkeypatch,
                                                            capsys):
    if change == "skip":
        poison(monkeypatch, {0, 5})   # a last step that is skipped for its gradient is saved, too
    elif change:   # the second block is of another recipe
        on_model(monkeypatch, lambda net: net.blocks.__setitem__(
            1, Block(net.config, RECIPES[change], "blocks.1", "none")))
    command = (f"--fp8 {options} --accum {1 if world == 1 else 4} --eval_batches 2 --steps 6 "
               f"--rescale_interval 5")   # the true rescale comes after the resume
    train_on(world, tiny(command, "whole"))
    train_on(world, tiny(command), stop_at=2)
    assert steps_in(out) == [3, 2] and states(out)[0]["progress"]["skipped"] == (change == "skip")
    train_on(world, go_on(out))
    whole, done = out.with_name("whole"), contents(out)
    assert same_state(whole, out) and steps_in(out)[0] == 6
    assert world > 1 or "at step 6 of 6: the run is done; raise --steps" in said(go_on(out), capsys).out
    assert contents(out) == done
    logs = [[[r[key] for key in ("step", "loss", "lr", "grad_norm", "skipped")] for r in read_log(folder)]
            for folder in (whole, out)]
    assert logs[0] == logs[1] and len(logs[0]) == 6


def test_resume_takes_options_that_are_not_given_and_says_what_differs(tiny, out, monkeypatch, capsys):
    monkeypatch.chdir(out.parent)
    run(tiny("--fp8 moss --shard --lr 1e-3 --weight_decay 0 --warmup 1 --beta1 0.8 --beta2 0.9 --clip 2 "
             "--keep 3 --seed 5 --rescale_interval 7 --spike 50 --max_skips 4 --log_every 3 --eval_every 1 "
             "--eval_batches 3 --recompute block"))
    path = train.checkpoints(out)[0] / "manifest.json"
    content = json.loads(path.read_text())["content"]
    content["config"].update(dropout=0.1)   # an option that a fork had, and one that it did not have
    content["config"].pop("spike")
    path.write_text(json.dumps({"checksum": zlib.crc32(json.dumps(content).encode()), "content": content}))
    Path("text.txt").write_text(2 * TEXT)
    command = go_on("out", "--resume --steps 5 --fp8 tensor --no-shard --beta1 0.8 --data text.txt")
    printed, before = said(command, capsys).out.splitlines(), content["config"]
    now = states(out)[0]
    assert {name for name in now["config"] if now["config"][name] != before.get(name)} == {
        "steps", "fp8", "shard", "resume", "out", "spike"}
    assert now["config"]["spike"] == 100
    assert sum("scale" in kept for kept in now["parameters"].values()) == LAYERS
    assert all(f"  {name}={value}" in printed[3] for name, value in now["config"].items())
    assert [line for line in printed if "note: " in line] == [
        "note: --fp8 was moss and is now tensor", "note: --steps was 4 and is now 5",
        "note: --shard was True and is now False",
        "note: --data had 4275 training tokens: windows come in another order"]


def test_lines_of_the_users_stay_in_the_log_and_one_cut_short_does_not(tiny, out):
    train_on(1, tiny("--fp8 none"), stop_at=1)
    users = ['{"note": "lr lowered"}', "not JSON", "[1, 2]", "", '{"step": null}',
             '{"step": "third", "loss": 1}', "line breaks: \u2028 \x0c \x85 and more"]
    log = out / "log.jsonl"
    log.write_text("\n".join([*log.read_text().splitlines(), *users, '{"step": 2, "lo']), encoding="utf-8")
    run(go_on(out))
    lines = log.read_text(encoding="utf-8").split("\n")[:-1]
    assert lines[2:9] == users
    assert [json.loads(line)["step"] for line in lines[:2] + lines[9:]] == [1, 2, 3, 4]


# ------------------------------------------------------------------------------------------------------------
# Checkpoints, and the folder of a run

@pytest.mark.parametrize("world, victim, call, left", [(1, 0, 2, [2]), (2, 0, 1, [4]), (2, 1, 1, [4])])
def test_a_full_disk_of_one_rank_costs_a_checkpoint_and_not_the_run(world, victim, call, left, tiny, out):
    def job(rank):
        full = OSError(errno.ENOSPC, "No space left on device")
        ends = [full if (rank, i) == (victim, call) else DEFAULT for i in (1, 2)]   # of the two calls
        torch.save = Mock(wraps=torch.save, side_effect=ends)
        return train.main(tiny("--fp8 none --accum 2 --eval_batches 2"))
    printed = on_ranks(world, job, 2 - world)[0]
    words = [f"warning: the checkpoint of step {2 * call} could not be written (OSError: [Errno 28] No space",
             f"make room in {out}"]
    if world == 1:   # it was the last one
        words += ["error: the last checkpoint is missing", f"{out}/step_00000002 is the last good"]
    assert [word for word in words if word not in printed] == [], printed
    assert steps_in(out) == left and not list(out.glob("*.tmp"))
    assert train.main(go_on(out)) == 0 and steps_in(out)[0] == 4


def test_a_rank_that_loses_the_others_while_a_checkpoint_is_written_writes_no_more(tiny, out):
    def job(rank):
        gather, calls = train.gather, itertools.count(1)

        def fails(thing, group=None):
            if rank == 1 and group is not None and next(calls) == 3:   # its file of the second one is written
                raise MemoryError("no room")
            return gather(thing, group)
        train.gather = fails
        return train.main(tiny("--fp8 none --accum 2 --eval_batches 2 --eval_every 1 --keep 9"))
    assert "another rank is gone (MemoryError: no room)" in on_ranks(2, job, 1)[1]
    assert steps_in(out) == [1] and train.main(go_on(out)) == 0 and steps_in(out)[0] == 4


def test_the_second_of_two_early_signals_is_ignored():
    with pytest.raises(KeyboardInterrupt):
        train.on_signal()
    train.on_signal()


def test_a_checkpoint_that_is_written_while_training_goes_on_is_of_its_own_step(tiny, tmp_path, monkeypatch):
    run(tiny("--fp8 moss", "at once"))
    trained = threading.Event()
    before_call(monkeypatch, torch, "save", lambda *_: trained.wait(60))
    do_at_step(monkeypatch, 3, trained.set)
    run(tiny("--fp8 moss", "later"))
    assert [state["step"] for state in states(tmp_path / "later")] == [4, 2]
    assert all(same([one[part] for part in STATE], [other[part] for part in STATE])
               for one, other in zip(states(tmp_path / "at once"), states(tmp_path / "later")))


FILES = "rank_0.pt", "rank_1.pt", "manifest.json"
DAMAGE = {**{f"a bit of {name}": lambda path, name=name: flip(path / name, 0.6) for name in FILES},
          **{f"an empty {name}": lambda path, name=name: os.truncate(path / name, 0) for name in FILES},
          **{f"no {name}": lambda path, name=name: (path / name).unlink() for name in FILES},
          "the manifest's first byte": lambda path: flip(path / "manifest.json", 0),
          "the file of another step": lambda path: shutil.copy(
              path.with_name("step_00000002") / "rank_1.pt", path),
          "another program's manifest": lambda path: (path / "manifest.json").write_text('[{"files": 1}]'),
          "a file in place of the folder": lambda path: (shutil.rmtree(path), path.write_text("x")),
          "a name of a later step": lambda path: path.rename(path.with_name("step_00000009")),
          "a name of more digits": lambda path: path.rename(path.with_name("step_000000000009"))}


def flip(path, where):
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """The folder of a run with checkpoints of two files each, of steps 2 and 4 of 4."""
    folder = tmp_path_factory.mktemp("two")
    train_on(2, tiny_in(folder)("--fp8 none --accum 2 --eval_batches 2"))
    return folder / "out"


@pytest.mark.parametrize("damage", DAMAGE)
def test_resume_falls_back_past_a_damaged_checkpoint_and_says_so(damage, two_checkpoints, tmp_path, capsys):
    out = shutil.copytree(two_checkpoints, tmp_path / "out")
    DAMAGE[damage](train.checkpoints(out)[0])
    damaged, older = train.checkpoints(out)
    Path(f"{damaged}.1").mkdir()   # it was damaged before
    printed = said(go_on(out), capsys).out
    assert f"note: {damaged} is damaged" in printed and f"resumed {older}" in printed
    assert f"{damaged} was moved to {damaged}.2" in printed and Path(f"{damaged}.2").exists()
    assert steps_in(out) == [4, 2]


@pytest.mark.parametrize("world, kills", [(1, 20), (2, 8)])
def test_kill_9_at_any_instant_costs_only_the_steps_since_a_checkpoint(world, kills, tiny, tmp_path, out):
    command, instants, steps = "--fp8 moss --steps 60 --accum 2 --eval_batches 2", random.Random(0), 0

    def kill(copies):
        time.sleep(instants.uniform(0.01, 0.25) + 0.4 * (world > 1))
        for process in instants.sample(copies, world):   # either of them first
            process.kill()
            time.sleep(0.05 * (world > 1))
    train_on(world, tiny(command, "whole"))
    for _ in range(kills):
        if steps == 60:   # a fast machine: once more from the start
            shutil.rmtree(out)
            steps = 0
        on_ranks(world, lambda rank: train.main(tiny(command + " --resume")), None, kill)
        before, steps = steps, max((state["step"] for state in states(out)), default=0)
        assert steps >= before   # nothing that was saved is ever lost
    train_on(world, tiny(command + " --resume"))
    assert same(weights(tmp_path / "whole"), weights(out))
    assert [record["step"] for record in read_log(out)] == list(range(1, 61))


def test_a_second_run_in_the_same_folder_is_refused(tiny, tmp_path, monkeypatch, capsys):
    do_at_step(monkeypatch, 1, lambda: [   # before a checkpoint is being written
        assert_refused(tiny("--fp8 none" + more), ["is in use by another run"], tmp_path, capsys)
        for more in ("", " --resume")])
    assert run(tiny("--fp8 none"))["steps"] == 4   # unharmed
    assert train.main(tiny("--fp8 none --steps 1")) == 0


def test_an_earlier_run_is_renamed_also_behind_a_link(tiny, tmp_path, out, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")   # without --resume not even then it goes on
    logs, disk = [], tmp_path / "large disk"
    disk.mkdir()
    out.symlink_to(disk)
    for more in ("--seed 1", "--seed 2", "--resume"):
        for path in train.checkpoints(out) if more == "--resume" else ():
            shutil.rmtree(path)   # where there is no checkpoint it begins a run
        printed = said(tiny(f"--fp8 none --steps 1 {more}"), capsys).out
        assert ("the run begins" in printed) == (more == "--resume")
        logs.append(read_log(out))
    assert logs == [read_log(tmp_path / name) for name in ("large disk.1", "large disk.2", "large disk")]
    assert out.resolve() == disk and steps_in(out) == steps_in(tmp_path / "large disk.1") == [1]


# ------------------------------------------------------------------------------------------------------------
# Mistakes: exit code 2, one line that says what, why and what to do. An earlier run stays where it is

def write(path, content):
    """Make a folder (of a dict), a link (to a Path), text or bytes, or a file of tokens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict):
        path.mkdir(exist_ok=True)
        for name, part in content.items():
            write(path / name, part)
    elif isinstance(content, Path):
        path.symlink_to(content)
    elif isinstance(content, (str, bytes)):
        path.write_bytes(os.fsencode(content))
    elif path.suffix == ".npy":
        np.save(path, content)
    else:
        np.asarray(content, np.uint16).tofile(path)


def shard(tokens, version=1, count=None):
    """Return a file in llm.c's format: 256 int32, of which three are used, then the tokens."""
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, version, len(tokens) if count is None else count
    return header.tobytes() + np.asarray(tokens, np.uint16).tobytes()


BAD_DATA = {   # name of the file: (what is in it, what the line says)
    "empty.txt": ("", ["empty.txt", "holds no tokens", "are read"]),
    "empty_folder": ({}, ["empty_folder", "holds no tokens", "are read"]),
    "short.txt": ("ten bytes.", ["has 9 tokens", "--seq 16", "give more data"]),
    "no_val.txt": ("x" * 100, ["has 5 tokens", "--seq 16", "give more data"]),
    "big_id.bin": ([3, 256] * 500, ["token id 256 in", "big_id.bin is outside", "of 256", "--model 124m"]),
    "big_in_training": ({"train.bin": [256] * 999, "val.bin": [3] * 999}, ["token id 256 in", "train.bin"]),
    "negative.npy": (np.full(999, -7), ["token id -7", "negative.npy", "or other --data"]),
    "odd.bin": ("x" * 1001, ["odd.bin", "1001 bytes", "uint16"]),
    "old.bin": (shard([1] * 999, version=7), ["old.bin", "version 1"]),
    "cut.bin": (shard([1] * 999, count=1000), ["cut.bin", "3022 bytes", "copy it again"]),
    "header.bin": (shard([])[:12], ["header.bin", "12 bytes"]),
    "matrix.npy": (np.zeros((9, 9), np.uint16), ["matrix.npy", "(9, 9)"]),
    "packed.npz": (b"PK\3\4\0" * 99, ["packed.npz", "zero bytes"]),
    "float.npy": (np.zeros(999, np.float32), ["float.npy", "float32", "save integers"]),
    "bytes.npy": (np.zeros(999, np.uint8), ["bytes.npy", "uint8", "16 bits or more"]),   # bytes are text
    **{f"{name}.npy": (content, [f"{name}.npy is no .npy file", "numpy.save"]) for name, content in {
        "garbage": "garbage" * 99, "empty": "", "header": b"\x93NUMPY\x01\0\x10\0{'descr': (((((\n",
        "cut": b"\x93NUMPY\x01\0;\0{'descr': '<f8', 'fortran_order': False, 'shape': (999,), }"}.items()},
    "two_kinds": ({"a.npy": np.zeros(999, np.int32), "b.bin": [0] * 999}, ["int32 and uint16", "per folder"])}
OUT_OF_RANGE = {   # numbers that make no sense
    **dict.fromkeys("steps batch accum log_every eval_every eval_batches max_skips keep".split(),
                    "0 -3 9223372036854775808"), "layers": "0 1001", "seq": "0 16777217",
    **dict.fromkeys("warmup rescale_interval seed".split(), "-1 9223372036854775808"),
    **dict.fromkeys("lr clip".split(), "0.0 -0.001 nan inf 1e+300 1e-300"), "weight_decay": "-0.1 nan 1e+300",
    **dict.fromkeys("beta1 beta2".split(), "1.0 -0.5 nan"), "spike": "-1.0 nan inf"}
MISTAKES = {   # options: what the line says
    "--model gpt5": ["--model gpt5", "unknown", "nano, 124m"],
    "--model narrow": ["blocks.0.down", "40", "--fp8 none"],   # no recipe's tiles fit
    "--fp8 e3m4": ["--fp8 e3m4", "unknown", "none, tensor, group, mx, moss"],
    "--bench --fp8 none,e3m4": ["--fp8 e3m4", "unknown: choose one of none, "],
    "--fp8 none,moss": ["--fp8 none,moss", "unknown"],   # several only to --bench and --eval-only
    "--fp8 none,moss --sample a": ["--fp8 none,moss", "unknown"],
    "--recompute act": ["--recompute act", "none, block"],
    "--bench --shard": ["--shard is for recipes that predict", "none"],
    "--expert_parallel 2": ["--expert_parallel 2", "1 ranks", "give 1"],
    "--fp8 tensor --shard": ["--shard is for recipes that predict", "tensor"],
    **{f"--device {name}": [f"--device {name}", "use cpu"] for name in ("tpu", "meta", "cuda:٣")},
    "--device cuda:99": ["--device cuda:99", "use --device cpu"],
    "--batch 1 --seq 24": ["--batch 1", "--seq 24", "24 tokens", "multiple of 16", "change --batch or --seq"],
    "--fp8 moss --beta1 0.95 --beta2 0.9": ["0.95", "0.9", "bound"],   # autoscale.py has no bound for these
    "--resume --steps 6 --beta1 0.8": ["--beta1 was 0.9", "leave it out"],   # Adam's moments are made with it
    "--resume --steps 6 --optimizer muon": ["--optimizer was adamw", "leave it out"],
    "--optimizer muon --model nano-moe": ["--optimizer muon", "no experts", "use adamw"],
    "--resume --steps 6 --beta2 0.8": ["--beta2 was 0.95", "leave it out"],
    "--resume --steps 6 --layers 2": ["layers = 1", "not 2", "--model"],
    "--sample a --out nothing": ["no checkpoint in nothing", "check --out"],
    "--eval-only --out nothing": ["no checkpoint in nothing", "check --out"],
    **{f"{mode} --out damaged": ["no checkpoint in damaged is whole: restore one from a copy"]
       for mode in ("--resume", "--sample a", "--eval-only")},
    "--tensorboard board": ["--tensorboard board: ", "pip install tensorboard"],
    **{options: [f"{options} cannot be written", "choose another"] for options in (
        "--tensorboard text.txt", "--tensorboard text.txt/board", "--out text.txt", "--out text.txt/out")},
    **{f"--out {folder}": [f"--out {folder.split()[0]} ", "folder of its own"] for folder in (
        ".", "..", "exp --data exp/text.txt", "exp --data exp/*.txt", "exp --data exp")},   # it gets renamed
    f"--out {'x' * 300}": ["--out", "File name too long"],
    "--batch 134217728": ["--batch 134217728", "too much with --seq 16, --eval_batches 1: lower it"],
    **{f"--{name} {value}": [f"--{name} {value} must lie between"] for name in OUT_OF_RANGE
       for value in OUT_OF_RANGE[name].split()},
    **{f"--{f.name} ''": [f"--{f.name} is empty: give it a value"] for f in dataclasses.fields(train.Config)
       if f.type is str},
    **{f"--data {x}": ["Permission denied", "locked"] for x in ("d", "d/**/*.txt", "d/*/*.txt", "d/**")},
    "--data nowhere": ["nowhere", "does not exist", "give a folder, a file or a pattern"],
    **{f"--data {name}": words for name, (_, words) in BAD_DATA.items()}}
MODES = ["--resume", "--eval_only", "--sample a", "--plot a.png", "--bench", "--export a"]


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory):
    """A folder with all that MISTAKES name, and an earlier run, which stays where the next was to begin."""
    folder = tmp_path_factory.mktemp("mistaken")
    run(tiny_in(folder)("--fp8 none --steps 1"))
    flip(shutil.copytree(folder / "out", folder / "damaged") / "step_00000001/rank_0.pt", 0.5)
    write(folder, {"exp/text.txt": TEXT, "d/locked/a.txt": TEXT, "d/open/a.txt": TEXT,
                   **{name: content for name, (content, _) in BAD_DATA.items()}})
    return folder


@pytest.mark.parametrize("options", MISTAKES)
def test_what_cannot_work_is_refused_in_one_line(options, mistaken, monkeypatch, capsys):
    scandir = os.scandir

    def refuse(path="."):   # file permissions do not bind root
        if os.fspath(path).endswith("d/locked"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.chdir(mistaken)
    monkeypatch.setitem(sys.modules, "tensorboard", None)   # as if it were not installed
    monkeypatch.setitem(train.PRESETS, "narrow", dataclasses.replace(PRESETS["nano"], ffn=40))
    monkeypatch.setitem(train.DEFAULTS, "narrow", train.DEFAULTS["nano"])
    assert_refused(tiny_in(mistaken)(options), MISTAKES[options], mistaken, capsys)


@pytest.mark.parametrize("options", ["--learning_rate 1", "--step 5", "--steps many", "--steps 1.5",
                                     "--steps", *map(" ".join, itertools.combinations(MODES, 2))])
def test_unknown_or_malformed_options_and_several_modes_are_refused(options, tiny, tmp_path, capsys):
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train.main(tiny(options))
    assert stop.value.code == 2 and contents(tmp_path) == before
    assert options.split()[0] in capsys.readouterr().err.splitlines()[-1]


# ------------------------------------------------------------------------------------------------------------
# Data

@pytest.mark.parametrize("n", [1, 2, 3, 17, 1000, 4096])
def test_an_epoch_reads_every_window_once_and_the_next_one_in_another_order(n, tmp_path):
    write(tmp_path, {"train.bin": np.zeros(16 * n + 6), "val.bin": [0]})
    batches = train.Batches(train.open_data(tmp_path)[0], config(), 256)
    epochs = [[batches.start(epoch * n + i) for i in range(n)] for epoch in (0, 1)]
    for starts in epochs:
        assert set(np.diff(sorted(starts))) <= {16}   # side by side
        assert min(starts) >= 0 and max(starts) + 16 < len(batches.tokens)
    orders = [np.argsort(starts).tolist() for starts in epochs]
    assert n < 17 or orders[0] != orders[1] and list(range(n)) not in orders


def test_steps_go_on_where_the_step_before_ended_however_they_are_cut():
    tokens = train.open_data(str(ROOT / "train.py"))[0]
    starts = train.Batches(tokens, config(), 256).start
    expected = torch.stack([torch.from_numpy(tokens.read(starts(i), 17)) for i in range(8)])
    for batch, accum in ((2, 2), (4, 1), (1, 4)):   # half the batch, twice the accumulation
        batches = train.Batches(tokens, config(batch=batch, accum=accum), 256)
        for part, first in ((0, 0), (1, 1)):   # inputs, and targets: the tokens one place further
            seen = [batches.step(step, micro, CPU)[part] for step in (0, 1) for micro in range(accum)]
            assert torch.equal(torch.cat(seen), expected[:, first:first + 16])
    assert batches.step(1, 3, CPU) is batches.step(1, 3, CPU)   # what was read ahead is not read again
    other = train.Batches(tokens, config(batch=1, accum=4, seed=1), 256)
    assert not same(batches.step(1, 3, CPU), other.step(1, 3, CPU))


def parts(tokens):
    """Return what is for training and, a twentieth, for validation."""
    first = int(0.95 * len(tokens))
    return tokens[:first], tokens[first:]


NAMES = "val", "valid", "validation", "VAL", "Validation"
FEW = {f"{i:02}.txt": f"file {i}. " * (i + 1) for i in range(39)}
LIKE_A_PATTERN = {"a[1]": {"t[2].npy": np.arange(100), "u.txt": TEXT}}
LINKS = {"d/a/a.txt": "a" * 1000, "elsewhere/b.txt": "b" * 1000, "d/a/loop": Path("../../d"),
         "d/linked": Path("../elsewhere"), "d/again": Path("../elsewhere")}
BELOW = {"train": {"a.npy": np.full(100, 1), "validation.txt": "train" * 100},
         "val": {"a.npy": np.full(100, 2), "validation.txt": "val" * 100}}
HIDDEN = {"a.txt": TEXT, "step_2024/step_1.txt": TEXT, "__pycache__/a.txt": TEXT, ".hidden.txt": TEXT,
          ".git/config": TEXT, "picture.png": b"\0" * 100, "out/log.jsonl": TEXT}
SPLITS = {   # what it shows: (files, --data, training tokens, validation tokens)
    "files of one kind are read together": (
        {"corpus_train_1.npy": np.arange(1000, 2000, dtype=np.uint16), "corpus_val_0.bin": shard(range(500)),
         "corpus_train_2.bin": range(2000, 3000), "corpus_train_3.bin": shard(range(3000, 4000))},
        "", range(1000, 4000), range(500)),
    **{f"a .npy file of {dtype}": ({"a.npy": np.arange(1000).astype(dtype)}, "", *parts(range(1000)))
       for dtype in ("uint16", "int32", "int64", ">u2")},
    "the end of one text": ({"a.txt": TEXT}, "", *parts(TEXT)),
    "the end of a few texts": (FEW, "", *parts("".join(FEW.values()))),
    **{f"tokens named {name}": ({"interval.bin": [0], "train.bin": [1], f"{name}.bin": [2],
                                 f"shard_{name}_0.bin": [2], name: {"x.bin": [2]}}, "", [0, 1], [2, 2, 2])
       for name in NAMES},
    **{f"text named {name}": ({"interval.txt": "0", "train.txt": "1", f"{name}.txt": "2", name: "2"},
                              "*", "01", "22") for name in NAMES},
    **{f"names below {data}": (BELOW, data, [1] * 100, [2] * 100) for data in ("", "*/*.npy", "**/*.npy")},
    "text below the top is like other text": (BELOW, "**/*.txt", *parts("train" * 100 + "val" * 100)),
    "hidden, binary, cached, and of a run": (HIDDEN, "", *parts(2 * TEXT)),
    "a pattern says what it wants": (HIDDEN, "**", *parts(3 * TEXT)),
    **{f"{data} looks like a pattern": (LIKE_A_PATTERN, data, *parts(range(100)))
       for data in ("a[1]", "a[1]/t[2].npy", "a[[]1]/*.npy")},
    **{f"{data} with a file behind links counts it once": (LINKS, data, *parts("a" * 1000 + "b" * 1000))
       for data in ("d", "d/**/*.txt", "d/**", "d/*/*.txt")}}


@pytest.mark.parametrize("what", SPLITS)
def test_data_are_read_and_split(what, tmp_path):
    files, data, *expected = SPLITS[what]
    write(tmp_path, files)
    read = train.open_data(str(tmp_path / data))
    is_text = isinstance(expected[0], str)
    assert [part.read(0, len(part)).tolist() for part in read] == [
        list(part.encode() if is_text else part) for part in expected]
    assert all((part.dtype == np.uint8) == is_text for part in read)   # a model of bytes has 256 tokens


def test_many_text_files_are_split_by_file_the_same_way_wherever_they_lie(tiny, tmp_path):
    odd = os.fsdecode(b"caf\xe9") if sys.platform == "linux" else "café"   # a name need not be UTF-8
    texts = {f"{odd}{i}.txt": f"file {i}. " for i in range(200)}
    write(tmp_path, {"many": texts, odd: texts})
    splits = [[{path.name for path, _, _ in tokens.files} for tokens in train.open_data(folder)]
              for folder in (tmp_path / "many", tmp_path / "many", tmp_path / odd)]
    assert splits[0] == splits[1] == splits[2]
    training, validation = splits[0]
    assert not training & validation and len(training | validation) == 200
    assert 2 <= len(validation) <= 20   # a twentieth of 200 is 10, give or take 3 deviations
    assert train.main(tiny(f"--fp8 none --steps 1 --seq 8 --data {tmp_path / odd}")) == 0


def test_read_across_files_is_a_slice_of_their_concatenation_or_says_what_has_changed(tmp_path):
    everything = np.arange(16)
    for i, (first, size) in enumerate(((0, 5), (5, 0), (5, 1), (6, 7), (13, 3))):   # windows span three
        tokens = everything[first:first + size]
        write(tmp_path / f"{i}.bin", shard(tokens) if i % 2 else tokens)   # behind a header, and not
    write(tmp_path / "val.bin", [0])
    tokens = train.open_data(tmp_path)[0]
    for first, last in itertools.combinations(range(17), 2):
        window = tokens.read(first, last - first, vocab=16)
        assert window.dtype == np.int64 and np.array_equal(window, everything[first:last])
    os.truncate(tmp_path / "4.bin", 2)
    with pytest.raises(train.UserError, match="4.bin has changed"):
        tokens.read(12, 4)


def test_a_large_file_is_read_window_by_window(tmp_path):
    with open(tmp_path / "large.bin", "wb") as f:
        f.truncate(2**30)   # a hole: takes no space on the disk
    tracemalloc.start()
    training, validation = train.open_data(tmp_path / "large.bin")
    batches = train.Batches(training, config(), 256)
    for step in range(10):
        batches.step(step, 0, CPU)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(training) + len(validation) == 2**29 and peak < 2**20   # bytes; measured 40 kB


def test_the_default_corpus_is_pythons_own_source_split_by_file():
    training, validation = train.open_data(None)
    files = [{path for path, _, _ in tokens.files} for tokens in (training, validation)]
    assert training.dtype == np.uint8 and not files[0] & files[1]
    assert all(path.suffix == ".py" and "site-packages" not in path.parts for path in files[0] | files[1])
    assert 0.02 < len(validation) / (len(training) + len(validation)) < 0.1   # a twentieth of the files


# ------------------------------------------------------------------------------------------------------------
# Loss and gradients that are not finite

@pytest.mark.parametrize("options, steps, factor, part", [
    ("--fp8 none", {2}, math.nan, "gradient"), ("--fp8 moss", {2}, math.nan, "gradient"),
    ("--fp8 none", {1}, math.inf, "loss"), ("--fp8 none --steps 28", {25}, 1e6, "gradient"),
    ("--fp8 none --steps 6 --max_skips 3", {0, 1, 3, 4}, math.nan, "gradient"),   # not so many in a row
    (f"--fp8 moss {MOE}", {0, 1, 2}, math.nan, "gradient")])
def test_a_bad_step_is_skipped_and_counted(options, steps, factor, part, tiny, out, monkeypatch):
    poison(monkeypatch, steps, factor, part)
    summary = run(tiny(f"{options} --eval_every 1 --keep 3"))
    good = [step for step in range(summary["steps"]) if step not in steps]
    saved, losses = states(out)[0], [record["val_loss"] for record in read_log(out)]
    assert summary["skipped_steps"] == saved["progress"]["skipped"] == len(steps)
    biases = [saved["parameters"].pop(name)["weight"] for name in weights(out) if "router.bias" in name]
    assert all(0 < bias.abs().max() <= 2e-3 * len(good) for bias in biases)
    assert {int(kept["step"]) for kept in saved["parameters"].values()} == {len(good)}   # Adam's own count
    assert steps_in(out) == [step + 1 for step in reversed(good)][:3]   # the newest that were written
    assert {i + 1 for i, (a, b) in enumerate(zip(losses, losses[1:])) if a == b} == steps - {0}
    assert all(weight.isfinite().all() for weight in weights(out).values())


@pytest.mark.parametrize("recipe, value", [
    *itertools.product(RECIPES, (math.nan, math.inf)), ("none, compiled", math.nan)])
def test_outputs_that_stay_bad_end_the_run_which_names_the_layer(recipe, value, tiny, monkeypatch, capsys):
    def spoil(net):
        net.blocks[1].down.weight.data[3, 5] = value
        if "compiled" in recipe:   # its graph knows no hooks
            torch._dynamo.reset()
            net.compile(backend="aot_eager", dynamic=False)
    on_model(monkeypatch, spoil)
    err = said(tiny(f"--fp8 {recipe.split(',')[0]} --layers 2 --max_skips 3"), capsys, code=1).err
    assert re.search("error: 3 steps in a row.* the output of blocks.1.down: .*nothing was saved", err), err


@pytest.mark.parametrize("recipe, factor", [*itertools.product(("none", "moss"), (math.nan, 1e36)),
                                            (f"moss {MOE}", math.nan)])
def test_gradients_that_stay_bad_end_the_run(recipe, factor, tiny, out, monkeypatch, capsys):
    first = ("the gradient of blocks.0.down.weight" if math.isnan(factor) else
             "the loss or the norm of the gradient")   # all is finite
    poison(monkeypatch, range(3, 9), factor)
    err = said(tiny(f"--fp8 {recipe} --steps 9 --max_skips 3 --eval_every 1 --keep 1"), capsys, code=1).err
    assert len(err.splitlines()) == 1 and first in err and f"{out}/step_00000003 is the last good" in err
    assert steps_in(out) == [3] and all(weight.isfinite().all() for weight in weights(out).values())


# ------------------------------------------------------------------------------------------------------------
# The log, the schedule, evaluations

def test_the_log_has_a_json_object_per_line(tiny, out, monkeypatch):
    poison(monkeypatch, {1})
    summary = run(tiny("--fp8 none --steps 6 --log_every 2 --eval_every 3 --seed 7"))
    first, *others = records = read_log(out)
    assert [record["step"] for record in records] == [2, 3, 4, 6]
    assert [record["step"] for record in records if "val_loss" in record] == [3, 6]
    assert all({"step", "loss", "lr", "grad_norm", "tokens_per_s", "skipped"} <= r.keys() for r in records)
    assert [r["config"]["seed"] for r in records if "config" in r] == [7] and first["command"]
    assert (first["torch"], first["hardware"]) == (torch.__version__, f"1 x CPU, {os.cpu_count()} CPU cores")
    assert summary["train_loss"] == round(others[-1]["loss"], 4) and summary["tokens"] == 6 * 2 * 16
    assert summary["val_loss"] == round(others[-1]["val_loss"], 4)


def test_the_log_and_the_terminal_show_how_healthy_the_scales_of_moss_are(tiny, out, monkeypatch, capsys):
    monkeypatch.setitem(train.BF16_PEAK, "CPU", 1)
    printed = said(tiny("--fp8 moss --steps 6 --rescale_interval 4"), capsys).out
    records = {record["step"]: record for record in read_log(out)}
    for record in records.values():
        assert record["scale_ratio"] >= record["scale_ratio_min"] >= 1   # no weight outgrows its scale
        assert record["saturated"] == record["saturated_grad"] == 0      # rule "up": nothing is cut off
        assert 0 <= record["folded"] < 0.05                              # measured 0.0003 to 0.001
        assert 0 <= record["folded_grad"] < 0.2 and 0 <= record["folded_wgrad"] < 0.2
        loss = f"  validation loss {record['val_loss']:.4f}" if "val_loss" in record else ""
        assert (f"step {record['step']}/6  loss {record['loss']:.4f}  lr {record['lr']:.2e}  grad "
                f"{record['grad_norm']:.2f}  {record['tokens_per_s']:,.0f} tok/s  mfu {record['mfu']:.2%}  "
                f"saturated 0.00%, 0.00%  folded {record['folded']:.2%}, {record['folded_grad']:.2%}, "
                f"{record['folded_wgrad']:.2%}  scale x{record['scale_ratio']:.4f}{loss}  0:00:0") in printed
    ratio = [None, *(records[step]["scale_ratio"] for step in range(1, 7))]
    assert ratio[1] == ratio[5] == 1 and ratio[4] > ratio[3] > ratio[2] > 1   # before the update


def test_the_learning_rate_warms_up_to_its_peak_and_falls_along_a_cosine_to_a_tenth():
    c = config(steps=110, warmup=10, lr=2.0)
    rates = [train.learning_rate(step, c) for step in range(111)]
    assert rates[0] == pytest.approx(2 / 11)   # warm-up begins above zero: no step is wasted
    assert np.diff(rates[:11]) == pytest.approx(2 / 11)
    assert rates[10] == max(rates) == train.learning_rate(0, config(steps=100, warmup=0, lr=2.0)) == 2.0
    assert all(np.diff(rates[10:]) < 0)
    assert [rates[60], rates[110]] == pytest.approx([(2.0 + 0.2) / 2, 0.2])


def test_the_optimizer_takes_the_scheduled_learning_rate_and_decays_no_norms(tiny, out, monkeypatch):
    used = []
    before_call(monkeypatch, train, "update_weights", lambda this, *_: used.append(
        {group["lr"] for group in this.optimizer.param_groups}))
    run(tiny("--fp8 none --steps 6 --warmup 2"))
    rates = [train.learning_rate(i, config(steps=6, warmup=2)) for i in range(6)]
    assert used == [{rate} for rate in rates] and [r["lr"] for r in read_log(out)] == rates
    net = Transformer(PRESETS["nano"], "none")
    *decayed, spared = train.make_optimizer(net, config(weight_decay=0.3)).param_groups
    assert {group["weight_decay"] for group in decayed} == {0.3} and spared["weight_decay"] == 0.0
    assert set(spared["params"]) == {p for name, p in net.named_parameters() if "norm" in name}
    assert sum(len(group["params"]) for group in (*decayed, spared)) == len(list(net.parameters()))


@pytest.fixture
def replays(monkeypatch):
    """Let micro-batches become graphs on a CPU. Nothing can be recorded there: replaying computes. Return the
    graph of each replay."""
    replayed = []

    def capture(run, tokens, targets, count):
        def replay():
            graph.loss.copy_(train.micro_batch(run, tokens, targets, count))
            graph.loads = getattr(run.model, "loads", None)
            replayed.append(graph)
        graph = SimpleNamespace(tokens=tokens, targets=targets, replay=replay, loss=torch.zeros(()),
                                memory=nullcontext)
        return graph
    monkeypatch.setattr(train, "capture", capture)
    return replayed


@pytest.mark.parametrize("recipe", [*RECIPES, f"moss {MOE}", pytest.param(f"moss {MUON}", marks=needs_muon)])
def test_evaluating_more_often_recomputing_and_graphs_change_no_weight(recipe, tiny, tmp_path, monkeypatch,
                                                                       replays):
    usual = f"--fp8 {recipe} --layers 2 --accum 2 --steps 5 --rescale_interval 2 --eval_every 4 --log_every 4"
    run(tiny(usual, "as usual"))
    for more in ("--eval_every 1 --log_every 1", "--recompute block"):
        run(tiny(f"{usual} {more}", more))
        assert same_state(tmp_path / "as usual", tmp_path / more)
    monkeypatch.setattr(train, "can_capture", lambda run: True)
    run(tiny(usual, "graphs"))   # the third step on: all find every tensor where it was
    assert len(replays) == 3 * 2 and len(set(map(id, replays))) == 1
    assert same_state(tmp_path / "as usual", tmp_path / "graphs")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to"), RuntimeError(
    "CUDA error: out of memory"), RuntimeError("operation not permitted when stream is capturing")], ids=str)
def test_without_memory_for_a_graph_a_run_goes_on_and_other_errors_are_said(error, tiny, monkeypatch, capsys):
    monkeypatch.setattr(train, "can_capture", lambda run: True)
    monkeypatch.setattr(train, "capture", Mock(side_effect=error))
    ended, (out, err) = train.main(tiny("--fp8 moss --steps 5")), capsys.readouterr()
    if "memory" in str(error):
        assert ended == 0 and out.count("note: rank 0 has no memory for a CUDA graph") == 1
    else:
        assert ended == 1 and "give --eager" in err


@pytest.mark.parametrize("recipe", ["none", "tensor", "moss", "moss --shard"])
def test_on_two_ranks_graphs_change_no_weight_and_the_micro_batch_that_sends_is_none(
        recipe, tiny, tmp_path, monkeypatch, replays):
    usual = f"--fp8 {recipe} --accum 6 --steps 5 --eval_batches 2 --rescale_interval 2"
    on_ranks(2, lambda rank: train.main(tiny(usual, "as usual")))
    monkeypatch.setattr(train, "can_capture", lambda run: True)
    on_ranks(2, lambda rank: train.main(tiny(usual, "graphs")) or len(replays) != 3 * (6 // 2 - 1))
    assert same_state(tmp_path / "as usual", tmp_path / "graphs")


# ------------------------------------------------------------------------------------------------------------
# The command line, and what there is besides training

def test_help_shows_every_option_with_its_help_and_default(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        train.main(["--help"])
    shown = "".join(capsys.readouterr().out.split())   # argparse breaks lines, also at hyphens
    for field in dataclasses.fields(train.Config):
        assert f"--{field.name}" in shown and "".join(field.metadata["help"].split()) in shown, field.name
        assert field.default in (None, False) or f"(default:{field.default})" in shown
    assert train.parse_config(["--max_skips", "3"]) == train.parse_config(["--max-skips", "3"])


def test_every_preset_has_defaults_that_every_recipe_can_run():
    assert train.DEFAULTS.keys() == PRESETS.keys()
    for preset, recipe in itertools.product(PRESETS, RECIPES):
        c = train.resolve(train.Config(model=preset, fp8=recipe), CPU, 1)
        assert None not in [getattr(c, name) for name in ("steps", "batch", "accum", "seq", "lr", "warmup")]
    assert [config(steps=steps).eval_every for steps in (3, 600, 100_000)] == [1, 120, 250]
    with pytest.raises(train.UserError, match="--accum 3 .* 2 ranks: use --accum 4"):
        train.resolve(train.Config(model="nano", accum=3), CPU, world=2)


def test_bench_times_every_recipe_all_micro_batches_and_one_optimizer_step(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = "--bench --device cpu --model nano --layers 1 --seq 16 --batch 2 --steps 1 --accum 2".split()
    rows = said(command, capsys).out.splitlines()[-len(RECIPES):]
    assert [row.split()[0] for row in rows] == list(RECIPES) and list(tmp_path.iterdir()) == []
    rows = train.bench(train.parse_config([*command, "--fp8", "moss,none"]))
    for row in rows.values():   # 2 x 2 x 16 tokens a step
        assert row["tokens/s"] == pytest.approx(64e3 / (2 * row["fwd+bwd ms"] + row["optimizer ms"]))
    assert math.isnan(rows["moss"]["x none"]) and rows["none"]["x none"] == 1   # none comes after moss


@pytest.mark.parametrize("recipe", ["none", "moss"])
def test_the_limit_of_a_step_counts_its_products_and_its_least_traffic(recipe, tiny, monkeypatch):
    c = train.parse_config(tiny(f"--fp8 {recipe} --accum 3"))
    run = train.build(c, train.start(c)[0])
    monkeypatch.setattr(train, "rates", lambda device: (1e3, 2e3, 1e6))   # FLOP/s in BF16, in FP8; bytes/s
    tokens, size = 3 * c.batch * c.seq, sum(p.numel() for p in run.model.parameters())
    flops = train.flops_per_token(run.model)
    linear = 6 * sum(layer.weight.numel() for layer in run.model.linears())
    products = flops / 1e3 if recipe == "none" else linear / 2e3 + (flops - linear) / 1e3
    traffic = 3 * (2 * 5000 + 8 * size) + 30 * size   # 5000 bytes are kept
    assert train.least_seconds(run, 5000) == pytest.approx(tokens * products + traffic / 1e6)


def test_eval_only_compares_recipes_and_gives_the_last_loss(tiny, tmp_path, out, monkeypatch, capsys):
    on_model(monkeypatch, lambda net: net.norm.weight.requires_grad_(False))   # it has no gradient
    run(tiny("--fp8 moss --shard --steps 8 --eval_batches 2"))
    loss, before = read_log(out)[-1]["val_loss"], contents(tmp_path)
    monkeypatch.chdir(out)   # from within its folder, too
    alone = {recipe: said(go_on(".", f"--eval-only --fp8 {recipe}"), capsys).out.splitlines()[-1]
             for recipe in ("none", "tensor", "moss")}
    expected = ["step_00000008", "moss", "FP8 emulated on CPU", f"validation loss {loss:.4f}",
                    f"bits per byte {loss / math.log(2):.4f}"]
    assert re.split("  +", alone["moss"]) == expected
    rows = said(go_on(".", f"--eval-only --fp8 {','.join(RECIPES)}"), capsys).out.splitlines()[-len(RECIPES):]
    for recipe, row in zip(RECIPES, rows, strict=True):
        # Each of some six roundings on the way, to 3 or (tensor) 2 bits, is wrong by 2.6% or 5% of the value.
        line, error = row.removesuffix("% off").split("  gradient ")
        assert line == alone.get(recipe, line) and recipe in line.split()
        assert float(error) == 0 if recipe == "none" else 0.5 < float(error) < 20
    assert on_ranks(2, lambda rank: train.main(go_on(".", "--eval-only"))) == [alone["moss"] + "\n", ""]
    printed = on_ranks(2, lambda rank: train.main(go_on(".", "--eval-only --fp8 none,moss")), 2)
    assert "run it without torchrun" in printed[0] and contents(tmp_path) == before


@pytest.mark.parametrize("prompt", ["the quick", "\udcff"])   # a byte that is no text, as Python takes it
def test_sample_goes_on_with_a_text(prompt, tiny, out, monkeypatch, capsys):
    run(tiny("--fp8 none"))
    monkeypatch.setattr(Transformer, "generate", GENERATE)
    written = said([*go_on(out, "--sample"), prompt], capsys).out
    assert written.startswith(prompt.replace("\udcff", "\ufffd")) and len(written.encode()) >= 200


def test_sample_takes_token_ids_of_the_model_alone(tiny, tmp_path, out, monkeypatch, capsys):
    write(tmp_path, {"train.bin": [1, 2, 3, 4] * 50, "val.bin": [1, 2, 3, 4] * 3})   # short of a usual prompt
    run(tiny(f"--fp8 none --seq 8 --steps 1 --data {tmp_path}"))
    command = go_on(out, "--sample")
    monkeypatch.setattr(Transformer, "generate", GENERATE)
    for prompt in ("²", "٣", "1_0", "-1", "256", "9" * 5000, "one", " ", "1 2 3.0"):
        assert_refused([*command, prompt], [f"--sample {prompt}", "token ids below 256"], tmp_path, capsys)
    assert said([*command, "1 2 3"], capsys).out.startswith("1 2 3 ")


def test_plot_draws_the_losses_of_several_runs_and_names_a_missing_package(tiny, tmp_path, capsys):
    for name in ("a", "b"):
        run(tiny("--fp8 none", name))
    with open(tmp_path / "a" / "log.jsonl", "a") as log:   # the user's lines, and one that a crash cut short
        log.write('{"note": "hm"}\n{"loss": "high", "step": 3}\n{"loss": 3}\n{"step": 5, "loss": 1.')
    command = ["--out", f"{tmp_path / 'a'},{tmp_path / 'b'}", "--plot"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="pip install matplotlib"):
        patch.setitem(sys.modules, "matplotlib", None)   # as if it were not installed
        train.main([*command, "unused.png"])
    pytest.importorskip("matplotlib")
    assert train.main([*command, str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert_refused(["--out", str(tmp_path), "--plot", "x.png"], ["has no log to draw"], tmp_path, capsys)
    with pytest.raises(SystemExit, match="curves.xyz.*png"):
        train.main([*command, str(tmp_path / "curves.xyz")])


def test_tensorboard_draws_nothing_twice_and_what_it_cannot_write_ends_no_run(tiny, out, monkeypatch, capsys):
    def draw(key, value, step):
        if step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
    board, made = MagicMock(), []   # in place of torch.utils.tensorboard
    board.SummaryWriter.side_effect = lambda folder, purge_step: (
        made.append((purge_step, len(read_log(out)))) or DEFAULT)
    writer = board.SummaryWriter.return_value
    add_scalar = writer.__enter__.return_value.add_scalar = Mock(side_effect=draw)
    monkeypatch.setitem(sys.modules, "tensorboard", torch)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    train_on(1, tiny(f"--fp8 none --tensorboard {out}/board"), stop_at=2)
    assert "warning: step 4 is not in --tensorboard (OSError: [Errno 28]" in said(go_on(out), capsys).out
    assert [call.args[2] for call in add_scalar.call_args_list if call.args[0] == "loss"] == [1, 2, 3]
    assert writer.__exit__.call_count == 2   # or the last numbers are lost
    assert [record["step"] for record in read_log(out)] == [1, 2, 3, 4]
    run(tiny(f"--fp8 none --tensorboard {out}/board"))   # whose events do not go to the run before it
    assert made == [(1, 0), (4, 3), (1, 0)]


FULL = "/dev/full" if os.path.exists("/dev/full") else os.devnull
# subprocess's preexec_fn would fork, which stops for ever where NumPy's threads multiply in the meantime
WITHOUT_STDOUT = ("sh", "-c", 'exec "$@" >&-', "sh")
WITHOUT_TRITON = "import sys; sys.modules['triton'] = None; import train; exit(train.main())"
BESIDE = {
    "test_torchrun_restarts_a_run": killed_under_torchrun,
    "full disk": lambda folder: train_py(folder, "--fp8 none", stdout=open(FULL, "w")),
    "closed stdout": lambda folder: train_py(folder, shell=WITHOUT_STDOUT),
    "no Triton": lambda folder: train_py(folder, code=WITHOUT_TRITON),
    **{name: lambda folder, name=name: signal_in(name, folder) for name in SIGNALS}}
