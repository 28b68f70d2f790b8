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
import functools
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import tracemalloc
import zlib
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DEVICE, ON_HOPPER

import autoscale
import model
import train
from microscale import HAS_TRITON, RECIPES, quantize_weight
from model import PRESETS, Block, Transformer

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}   # of other processes, before a test changes it
CPU = torch.device("cpu")
ONE = train.Ranks(0, 1, CPU)
SAMPLE = train.sample
TEXT = "the quick brown fox jumps over the lazy dog.\n" * 100
TINY = ("--device cpu --model nano --layers 1 --seq 16 --batch 2 --accum 1 --steps 4 "
        "--log_every 1 --eval_every 2 --eval_batches 1").split()
LAYERS = 4   # quantized ones of a block: qkv, out, gate_up and down

for_recipes = pytest.mark.parametrize("recipe", RECIPES)
pytestmark = pytest.mark.usefixtures("one_thread", "quick")


@pytest.fixture
def quick(monkeypatch):
    """No signal has been received yet, and no sample is made: 200 tokens take longer than these runs."""
    monkeypatch.setattr(train, "stop", SimpleNamespace(received=False, in_loop=False))
    monkeypatch.setattr(train, "sample", lambda *_: "")


def tiny_in(folder):
    """Return a function that gives the command line of a short run. The later of equal options counts."""
    (folder / "text.txt").write_text(TEXT)

    def command(more="", out="out"):
        return [*TINY, "--data", str(folder / "text.txt"), "--out", str(folder / out), *more.split()]
    return command


@pytest.fixture
def tiny(tmp_path):
    return tiny_in(tmp_path)


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
    for word in words:
        assert word in lines[0]
    assert contents(folder) == before


def newest(out):
    return train.checkpoints(out)[0]


def steps_in(out):
    return [int(path.name[5:]) for path in train.checkpoints(out)]


def checkpoint(out):
    """Return {"parameters", "scales", and what the manifest says} of the newest whole checkpoint."""
    saved = train.newest_checkpoint(out, ONE)
    parts = [torch.load(saved["path"] / name, weights_only=True) for name in saved["files"]]
    parameters = {name: kept for part in parts for name, kept in part["parameters"].items()}
    return {**saved, "parameters": parameters, "scales": parts[0]["scales"]}


def weights(out):
    return {name: kept["weight"] for name, kept in checkpoint(out)["parameters"].items()}


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def config(**values):
    """Return a resolved configuration, for what takes one apart from a run."""
    c = train.Config(**{"model": "nano", "layers": 1, "seq": 16, "batch": 2, **values})
    return train.resolve(c, CPU, 1)


def same(a, b):
    """Return whether these are bit for bit the same tensors in the same nest of dicts and lists."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_state(one, other, parts=("parameters", "scales", "progress")):
    one, other = checkpoint(one), checkpoint(other)
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


def save_at_once(monkeypatch):
    """Let training wait for its checkpoints."""
    save = train.Saver.save
    monkeypatch.setattr(train.Saver, "save", lambda self, *state: (save(self, *state), self.finish()))


def on_model(monkeypatch, action):
    """Call `action(model)` on the run's model, with its initial weights, before training."""
    before_call(monkeypatch, train, "owners", lambda net, _: action(net))


def poison_gradient(monkeypatch, steps, factor=math.nan):
    """Multiply the gradient of one weight in these steps, from 0 (for --accum 1)."""
    count = itertools.count()
    on_model(monkeypatch, lambda net: net.blocks[0].down.weight.register_hook(
        lambda grad: grad * factor if next(count) in steps else grad))


def record_batches(monkeypatch):
    """Return a list of ((step, micro-batch), tokens) that fills while a run reads its training data."""
    seen, original = [], train.Batches.step

    def spy(self, step, micro, device):
        seen.append(((step, micro), original(self, step, micro, device)))
        return seen[-1][1]
    monkeypatch.setattr(train.Batches, "step", spy)
    return seen


def record_states(monkeypatch):
    """Return a list of what a run would have written as checkpoints."""
    states = []
    monkeypatch.setattr(train.Saver, "save", lambda self, own, content: states.append(
        copy.deepcopy({**own, **content["progress"]})))
    return states


def interrupted(command, step, monkeypatch):
    """Make a run that a signal reaches in its step number `step`, from 0."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "stop", SimpleNamespace(received=False, in_loop=False))
        do_at_step(patch, step, train.on_signal)
        assert train.main(command) == 0


# ------------------------------------------------------------------------------------------------------------
# Every recipe trains, and from the same start on the same data

@for_recipes
def test_every_recipe_learns_on_a_cpu(recipe, tiny):
    summary = run(tiny(f"--fp8 {recipe} --layers 2 --seq 32 --batch 4 --steps 30 --eval_every 30"))
    # Ignorance is ln 256 = 5.5, letter frequencies alone give 3.0; measured 0.5 to 0.7 for all recipes.
    assert summary["val_loss"] < 1.5
    assert summary["recipe"] == recipe and summary["steps"] == 30 and summary["skipped_steps"] == 0


def train_py(folder, more="", code=None, **options):
    """Run `python train.py`, or Python code in its place, as a process of its own."""
    command = [*(["-c", code] if code else ["train.py"]), *tiny_in(folder)(more)]
    usual = dict(env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=120)
    return subprocess.run([sys.executable, *command], cwd=ROOT, **{**usual, **options})


def test_moss_trains_where_triton_cannot_be_installed(beside):
    done = beside["test_moss_trains_where_triton_cannot_be_installed"].result()
    assert done.returncode == 0 and done.stdout.count("emulated") == 2, done.stderr   # at both ends


def test_all_recipes_see_the_same_batches_from_the_same_weights(tiny, monkeypatch):
    seen, starts = {}, []
    on_model(monkeypatch, lambda net: starts.append(copy.deepcopy(net.state_dict())))
    for recipe in RECIPES:
        with monkeypatch.context() as patch:
            seen[recipe] = record_batches(patch)
            run(tiny(f"--fp8 {recipe} --steps 2 --accum 2"))
    assert [key for key, _ in seen["none"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(same(seen["none"], other) for other in seen.values())
    assert len(starts) == len(RECIPES) and all(same(starts[0], other) for other in starts)


def test_another_seed_gives_other_weights_and_other_batches(tiny, monkeypatch):
    starts, batches = [], record_batches(monkeypatch)
    on_model(monkeypatch, lambda net: starts.append(net.embed.weight.detach().clone()))
    for seed in (1, 2):
        run(tiny(f"--fp8 none --steps 1 --seed {seed}"))
    assert not same(starts[0], starts[1]) and not same(batches[0], batches[1])


def own_source(**options):
    return train.Batches(train.open_data(str(ROOT / "train.py"))[0], config(**options), 256)


@pytest.mark.parametrize("n", [1, 2, 3, 17, 1000, 4096])
def test_a_shuffled_order_visits_every_number_once(n):
    order, other = ([train.shuffled(i, n, [key] * 4) for i in range(n)] for key in (11, 21))
    assert sorted(order) == sorted(other) == list(range(n))
    assert n < 17 or (order != sorted(order) and order != other)


def test_an_epoch_reads_every_window_once_and_the_next_one_in_another_order():
    batches = own_source()
    n = batches.windows
    epochs = [[batches.start(epoch * n + i) for i in range(n)] for epoch in (0, 1)]
    for starts in epochs:
        assert set(np.diff(sorted(starts))) == {16}   # side by side
        assert min(starts) >= 0 and max(starts) + 16 < len(batches.tokens)
    assert np.argsort(epochs[0]).tolist() != np.argsort(epochs[1]).tolist()


def test_steps_go_on_where_the_step_before_ended_however_they_are_cut():
    tokens, starts = own_source().tokens, own_source().start
    expected = torch.stack([torch.from_numpy(tokens.read(starts(i), 17)) for i in range(8)])
    for batch, accum in ((2, 2), (4, 1), (1, 4)):   # half the batch, twice the accumulation
        batches = own_source(batch=batch, accum=accum)
        for part, first in ((0, 0), (1, 1)):   # inputs, and targets: the tokens one place further
            seen = [batches.step(step, micro, CPU)[part] for step in (0, 1) for micro in range(accum)]
            assert torch.equal(torch.cat(seen), expected[:, first:first + 16])


def test_a_batch_that_was_read_ahead_is_not_read_again(monkeypatch):
    batches, reads = own_source(), []
    before_call(monkeypatch, train.Batches, "load", lambda *_: reads.append(1))
    ahead = batches.step(2, 0, CPU)
    assert batches.step(2, 0, CPU) is ahead and len(reads) == 1
    assert not same(batches.step(3, 0, CPU), ahead) and not same(own_source(seed=1).step(2, 0, CPU), ahead)


FREEZE = {"embedding": "embed", "norm": "norm1", "linear": "down", "blocks": "blocks", "all but the head": ""}


def is_frozen(which, name):
    return FREEZE[which] in name and name != "head.weight"


def freeze(which, monkeypatch):
    on_model(monkeypatch, lambda net: [p.requires_grad_(not is_frozen(which, name))
                                       for name, p in net.named_parameters()])


@pytest.mark.parametrize("recipe", ["none", "tensor", "moss"])
@pytest.mark.parametrize("which", FREEZE)
def test_frozen_weights_stay_as_they_are_and_the_others_train(which, recipe, tiny, monkeypatch):
    states = record_states(monkeypatch)
    freeze(which, monkeypatch)
    run(tiny(f"--fp8 {recipe} --eval_every 1"))
    first, last = states[0]["parameters"], states[-1]["parameters"]
    for name in first:
        assert torch.equal(first[name]["weight"], last[name]["weight"]) == is_frozen(which, name), name


@pytest.mark.parametrize("recipe", [None, "tensor", "group"])
def test_a_block_may_have_another_precision_than_the_others(recipe, tiny, tmp_path, monkeypatch):
    on_model(monkeypatch, lambda net: net.blocks.__setitem__(
        1, Block(net.config, RECIPES[recipe] if recipe else None, "blocks.1", "none")))
    assert run(tiny("--fp8 moss --layers 2", "whole"))["skipped_steps"] == 0
    interrupted(tiny("--fp8 moss --layers 2"), 1, monkeypatch)
    run(go_on(tmp_path / "out"))
    assert same_state(tmp_path / "whole", tmp_path / "out")


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("fused", [False, True])
def test_the_copies_that_an_update_leaves_are_current_whoever_writes_them(fused, monkeypatch):
    monkeypatch.setattr(autoscale, "kernels_run_on", lambda device: True)
    by_kernel, device = [], torch.device(DEVICE)
    before_call(monkeypatch, autoscale, "adamw_triton", lambda *_: by_kernel.append(update))
    c = config(fp8="moss", rescale_interval=2)
    net = train.make_model(c, device)
    optimizer = train.make_optimizer(net, c)
    for group in optimizer.param_groups:
        group["fused"] = fused   # as a GPU's are
    scales = train.make_scales(net, optimizer, c)
    train.requantize(net, scales)
    for update in range(1, 5):   # of which two measure their scales
        net(*torch.randint(256, (2, 2, 16), device=device)).backward()
        train.update_weights(optimizer, net, scales, c.lr, update, c)
        for layer, scale in zip(net.linears(), scales.scale.view(-1, 1, 1), strict=True):
            expected = quantize_weight(layer.weight.detach(), layer.recipe, scale)
            for copied, wanted in zip((layer.w, layer.w_t), expected):   # which raise if they are not current
                assert same(copied.data.view(torch.uint8), wanted.data.view(torch.uint8))
                assert same(copied.scale, wanted.scale)
    assert by_kernel == [update for update in range(1, 5) for _ in range(LAYERS)]


# ------------------------------------------------------------------------------------------------------------
# Several ranks

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_copy(job, rank=None, world=1, port=0, printed=os.devnull):
    """Call job(), which returns an exit code, in a copy of this process, maybe as a rank. Return its id."""
    pid = os.fork()
    if pid == 0:
        code, sys.stdout = 99, open(printed, "w", buffering=1)
        sys.stderr, train.sample = sys.stdout, lambda *_: ""
        if rank is not None:
            os.environ |= dict(RANK=f"{rank}", WORLD_SIZE=f"{world}", MASTER_ADDR="localhost",
                               MASTER_PORT=f"{port}")
        torch.set_num_threads(1)   # renews PyTorch's pool: several threads that did so at once would fail
        try:
            code = job()
            if code == 0 and train.dist.is_initialized():
                train.dist.barrier()   # none leaves while another still needs it
            for thread in threading.enumerate():
                if thread is not threading.current_thread() and not thread.daemon:
                    thread.join()
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    return pid


def on_ranks(world, job, folder):
    """Call job(rank) in `world` copies of this process. Return their exit codes and what each printed."""
    if ON_HOPPER or not hasattr(os, "fork"):
        pytest.skip("a process that has used a GPU cannot be copied")
    port, printed = free_port(), [folder / f"rank_{rank}.printed" for rank in range(world)]
    pids = [start_copy(functools.partial(job, rank), rank, world, port, printed[rank])
            for rank in range(world)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return codes, [path.read_text() for path in printed]


def train_on(world, command, folder):
    codes, printed = on_ranks(world, lambda rank: train.main(command), folder)
    assert codes == [0] * world, printed


@pytest.fixture(scope="module", params=["none", "moss", "moss --shard"])
def two_ranks(request, tmp_path_factory):
    """(the folder of a run on two ranks, the command line that made it)"""
    folder = tmp_path_factory.mktemp("ranks")
    command = tiny_in(folder)(f"--fp8 {request.param} --accum 2 --steps 3 --eval_every 3 --eval_batches 2 "
                              f"--rescale_interval 2", "two")
    build, forward_backward = train.build, train.forward_backward

    def drawn_elsewhere(c, device):   # another kind of GPU draws other initial weights from the same seed
        net, *batches = build(c, device)
        for p in net.parameters():
            p.data.mul_(1.5)
        return net, *batches

    def in_buckets(net, *arguments, **options):   # DDP's gradients: beside its buckets they take memory twice
        def where():
            return [p.grad.data_ptr() for p in net.parameters()] if hasattr(net, "module") else "no DDP"
        before, loss = where(), forward_backward(net, *arguments, **options)
        assert before == where()
        return loss

    def job(rank):
        train.build, train.forward_backward = drawn_elsewhere if rank == 1 else build, in_buckets
        return train.main(command)
    codes, printed = on_ranks(2, job, folder)
    assert codes == [0, 0] and printed[1] == "", printed
    return folder, command


def test_two_ranks_train_the_same_weights_as_one_and_write_one_log(two_ranks):
    # Bit for bit: two micro-batches leave one addition, whose order does not matter, and halving is exact.
    # (From four on, the order of the sums differs, and Adam makes large updates of tiny differences.)
    folder, command = two_ranks
    run([*command, "--out", str(folder / "one")])
    assert same_state(folder / "one", folder / "two")
    one, two = ([(r["step"], r.get("scale_ratio"), r.get("scale_ratio_min")) for r in read_log(folder / out)]
                for out in ("one", "two"))
    assert one == two and [step for step, *_ in two] == [1, 2, 3]


def test_a_checkpoint_of_two_ranks_goes_on_in_one_as_if_it_had_been_one(two_ranks):
    folder, command = two_ranks
    run([*command, "--out", str(folder / "first")])
    shutil.copytree(folder / "two", folder / "then")
    for out in ("first", "then"):
        run(go_on(folder / out, "--resume --steps 5"))
    assert same(weights(folder / "first"), weights(folder / "then"))


@pytest.mark.parametrize("writers, shard", [(1, ""), (2, " --shard"), (3, "")])
def test_a_checkpoint_is_read_by_any_number_of_ranks_bit_for_bit(writers, shard, tiny, tmp_path):
    more = "--fp8 moss --accum 6 --eval_batches 6"
    train_on(writers, tiny(f"{more} --steps 2{shard}", "written"), tmp_path)
    for readers, shard in ((1, ""), (2, " --shard"), (3, "")):
        shutil.copytree(tmp_path / "written", tmp_path / "read")

        def read_and_write(rank):
            train.update_weights = lambda *_: None   # the next checkpoint holds what was read
            return train.main(tiny(f"{more} --steps 3 --resume{shard}", "read"))
        codes, printed = on_ranks(readers, read_and_write, tmp_path)
        assert codes == [0] * readers, printed
        steps_and_files = [(c["step"], len(c["files"])) for c in map(checkpoint, tmp_path.glob("[rw][er]*"))]
        assert sorted(steps_and_files) == [(2, writers), (3, readers)]
        assert same_state(tmp_path / "written", tmp_path / "read", ("parameters", "scales"))
        shutil.rmtree(tmp_path / "read")


@pytest.mark.parametrize("shard", ["", " --shard"])
def test_a_resumed_run_on_two_ranks_equals_the_uninterrupted_one_bit_for_bit(shard, tiny, tmp_path):
    more = f"--fp8 moss --accum 4 --steps 6 --eval_batches 2 --rescale_interval 5{shard}"
    train_on(2, tiny(more, "whole"), tmp_path)

    def stopped(rank):
        before_call(pytest.MonkeyPatch(), train.Batches, "step", lambda self, step, *_: (
            train.on_signal() if step == 2 and rank == 1 else None))
        return train.main(tiny(more))
    codes, printed = on_ranks(2, stopped, tmp_path)
    assert codes == [0, 0] and steps_in(tmp_path / "out") == [3, 2], printed
    train_on(2, go_on(tmp_path / "out"), tmp_path)
    assert same_state(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize("recipe", ["none", "moss", "moss --shard"])
@pytest.mark.parametrize("which", FREEZE)
def test_two_ranks_train_a_partly_frozen_model_as_one_does(which, recipe, tiny, tmp_path, monkeypatch):
    freeze(which, monkeypatch)
    more = f"--fp8 {recipe} --accum 2 --eval_batches 2 --clip 1e30"   # shards sum the norm in another order
    for world in (1, 2):
        train_on(world, tiny(more, f"on {world}"), tmp_path)
    assert same_state(tmp_path / "on 1", tmp_path / "on 2", ("parameters", "scales"))


def test_ranks_with_other_options_or_other_data_are_stopped(tiny, tmp_path):
    for name, text in (("copy.txt", TEXT), ("other.txt", 2 * TEXT)):
        (tmp_path / name).write_text(text)
    for more, code in ("--lr 1", 1), (f"--data {tmp_path}/other.txt", 1), (f"--data {tmp_path}/copy.txt", 0):
        codes, printed = on_ranks(2, lambda rank: train.main(
            tiny("--accum 2 --eval_batches 2 " + more * rank)), tmp_path)
        assert codes == [code] * 2 and ("different options or data" in printed[0]) == bool(code), printed
        assert (tmp_path / "out").exists() == (code == 0)


@pytest.mark.parametrize("part, error", [(str, "different checkpoints: --out .* a folder that all nodes see"),
                                         (float, "different weight scales")])
def test_ranks_that_disagree_are_stopped(part, error, tiny, tmp_path, monkeypatch):
    interrupted(tiny("--fp8 moss"), 0, monkeypatch)

    def gather(thing):
        return [thing, [] if isinstance(thing, list) and isinstance(thing[0], part) else thing]
    monkeypatch.setattr(train, "gather", gather)
    with pytest.raises(train.RunError, match=error):
        run(go_on(tmp_path / "out"))


def test_owners_share_the_parameters_evenly_and_hold_the_only_numbers():
    shards = []
    for rank in range(4):
        net = Transformer(PRESETS["nano"], "moss")
        shards.append(train.Shards(net, train.owners(net, 4), train.Ranks(rank, 4, CPU)))
        for p in shards[-1].layers:
            assert p.untyped_storage().nbytes() == (4 * p.numel() if shards[-1].mine(p) else 4)
    loads = [sum(p.numel() for p in s.parameters if s.mine(p)) for s in shards]
    assert max(loads) < 1.1 * min(loads) and sum(loads) == sum(p.numel() for p in net.parameters())
    with pytest.raises(train.UserError, match="--shard: 1000 ranks are more than the"):
        train.Shards(net, train.owners(net, 1000), train.Ranks(0, 1000, CPU))


def test_scales_are_measured_on_all_ranks_if_a_weight_of_one_exceeds_them(tiny, tmp_path, monkeypatch):
    interrupted(tiny("--fp8 moss"), 1, monkeypatch)
    rescaled = []
    monkeypatch.setattr(train, "all_reduce", lambda x, op=None: x if op is None else x.new_tensor(-0.9))
    before_call(monkeypatch, train.WeightScales, "rescale", lambda self: rescaled.append(len(rescaled)))
    run(go_on(tmp_path / "out"))
    assert rescaled == [0, 1]   # at the start, as always, and then because of another rank


def test_ranks_that_cannot_meet_say_so_in_one_line(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert_refused(tiny(), ["the ranks cannot meet"], tmp_path, capsys, code=1)


def test_micro_batches_that_ranks_cannot_share_are_refused_with_a_number_that_works():
    with pytest.raises(train.UserError, match="--accum 3 .* 2 ranks: use --accum 4"):
        train.resolve(train.Config(model="nano", accum=3), CPU, world=2)


def killed_under_torchrun(folder):
    """Return (folder, command line, end) of a run of torchrun on two ranks. One is killed at its step 6."""
    (folder / "script.py").write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train
real, once = train.forward_backward, {str(folder / "once")!r}
def killed(model, batches, step, c, ranks, *rest, **options):
    if step == 6 and ranks.rank == 1 and not os.path.exists(once):
        open(once, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return real(model, batches, step, c, ranks, *rest, **options)
train.forward_backward, train.sample = killed, lambda *_: ""
code = train.main()
train.gc.collect()
train.dist.destroy_process_group()
sys.exit(code)
""")
    command = tiny_in(folder)("--fp8 moss --accum 2 --steps 8 --eval_batches 2 --resume")
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--max-restarts", "3",
                "--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{free_port()}"]
    done = subprocess.run([sys.executable, *torchrun, str(folder / "script.py"), *command], env=ENVIRONMENT,
                          timeout=60, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return folder, command, done


def test_torchrun_restarts_a_run_whose_rank_was_killed_and_nothing_of_it_shows_in_the_weights(beside):
    folder, command, done = beside["test_torchrun_restarts_a_run"].result()
    assert done.returncode == 0 and done.stdout.count("the run begins") == 1, done.stdout
    assert len(re.findall("resumed .*/step_0000000[246]", done.stdout)) == 1   # the second start goes well
    assert "failed to connect" not in done.stdout and not (folder / "out.1").exists()
    run([*command, "--out", str(folder / "whole")])
    assert same_state(folder / "out", folder / "whole")


def test_a_restart_without_resume_does_not_go_on_with_an_earlier_run(tiny, tmp_path, monkeypatch, capsys):
    run(tiny("--fp8 none --steps 2"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert "resumed" not in said(tiny("--fp8 none --steps 2 --seed 1"), capsys).out
    assert steps_in(tmp_path / "out.1") == steps_in(tmp_path / "out") == [2]


# What a GPU computes in an order of its own gets a fixed one, so that runs can be compared bit for bit.
ON_GPUS = """
import os, sys, types
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
sys.path.insert(0, {root!r})
import torch, train
torch.use_deterministic_algorithms(True)
train.sample = lambda *_: ""
forward_backward = train.forward_backward

def as_two_ranks_would(model, batches, step, c, ranks, shards=None, watching=False):
    "On one GPU: the gradients of both micro-batches rounded to BF16 and added, as two ranks do that."
    losses, sent = [], []
    for rank in (0, 1):
        losses.append(forward_backward(model, batches, step, c, train.Ranks(rank, 2, ranks.device), shards))
        sent.append([p.grad.bfloat16() / 2 for p in model.parameters()])
        model.zero_grad()
    for p, first, second in zip(model.parameters(), *sent):
        p.grad = (first + second).float()
    return sum(losses)

shards = types.SimpleNamespace(sending=False)   # so that forward_backward looks for no DDP
if "RANK" not in os.environ:
    forward_backward = lambda *a, real=train.forward_backward: real(*a[:5], shards)
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
    assert same_state(tmp_path / "one", tmp_path / "two", ("parameters", "scales"))


@pytest.mark.gpu
@pytest.mark.parametrize("first, then", [("moss", "none"), ("none", "moss"), ("tensor", "moss"),
                                         ("moss", "moss")])
def test_on_a_gpu_a_checkpoint_goes_on_under_any_recipe(first, then, tiny, tmp_path, monkeypatch):
    interrupted(tiny(f"--device cuda --fp8 {first}"), 2, monkeypatch)
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
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has 79 GiB."):
        ["CUDA out of memory: halve --batch and double --accum"],
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory"):
        ["halve --batch and double --accum"],
    MemoryError(): ["out of memory: halve --batch and double --accum"],
    OSError(errno.ESTALE, "Stale file handle", "tokens.bin"): ["Stale file handle: 'tokens.bin'"]}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_what_goes_wrong_with_the_machine_is_said_in_one_line(error, tmp_path, monkeypatch, capsys):
    def fails(config):
        raise error
    monkeypatch.setattr(train, "train", fails)
    monkeypatch.setenv("RANK", "0")
    assert_refused([], ERRORS[error], tmp_path, capsys, code=1)


def test_an_error_of_the_program_itself_is_not_hidden(tiny, monkeypatch):
    on_model(monkeypatch, lambda net: net.no_such_method())
    with pytest.raises(AttributeError, match="no_such_method"):
        train.main(tiny())


def test_a_bad_token_ends_the_run_with_a_line_that_names_its_file(tiny, tmp_path, monkeypatch, capsys):
    path = tmp_path / "tokens.npy"
    np.save(path, np.zeros(4000, np.int32))
    do_at_step(monkeypatch, 2, lambda: np.save(path, np.full(4000, 999, np.int32)))
    lines = said(tiny(f"--fp8 none --data {path}"), capsys, code=2).err.splitlines()
    assert len(lines) == 1 and f"token id 999 in {path} is outside the model's vocabulary of 256" in lines[0]


def write_to_a_full_disk(folder):
    with open("/dev/full" if os.path.exists("/dev/full") else os.devnull, "w") as full:
        return train_py(folder, "--fp8 none", stdout=full)


@pytest.mark.parametrize("where", ["full disk", "closed stdout"])
def test_output_that_cannot_be_written_does_not_end_the_run(where, beside):
    done = beside[where].result()
    assert done.returncode == 0 and "rror" not in done.stderr, done.stderr


def test_a_run_needs_not_be_in_the_main_thread(tiny):
    with train.ThreadPoolExecutor() as pool:
        assert pool.submit(train.main, tiny("--fp8 none")).result() == 0


SIGNALS = {   # when: (in which function, which signal, exit code, what stands on stdout, the checkpoint)
    "SIGINT at the start": ("model.Transformer.__init__", signal.SIGINT, 0, "", 0),
    "SIGTERM at the start": ("model.Transformer.__init__", signal.SIGTERM, 0, "", 0),
    "SIGINT in a step": ("model.Transformer.forward", signal.SIGINT, 0, "stopped by a signal; ", 1),
    "SIGTERM in the last checkpoint": ("torch.save", signal.SIGTERM, 0, "time             0:00:0", 4),
    "SIGTERM in the sample": ("model.Transformer.generate", signal.SIGTERM, 0, "time             0:00:0", 4),
    "SIGKILL in the first evaluation": ("model.Transformer.forward", signal.SIGKILL, -9,
                                        "fp8     none: FP32 on CPU\n", 0)}


def signal_in(name, folder):
    """Run train.py as a process that a signal reaches in each call of a function. It prints ASCII alone."""
    function, number, *_ = SIGNALS[name]
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "PYTHONUNBUFFERED"}
    return train_py(folder, f"--fp8 none --eval_every 4 --out {folder}/größer", f"""
import os, runpy, sys, time, model, torch
original = {function}
def spy(*arguments, **options):
    os.kill(os.getpid(), {int(number)})
    time.sleep(0.1)
    return original(*arguments, **options)
{function} = spy
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
""", env={**environment, "PYTHONIOENCODING": "ascii"}), steps_in(folder / "größer")


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_at_any_time_is_no_error_and_what_was_printed_is_there(name, beside):
    (done, steps), (_, _, code, printed, last) = beside[name].result(), SIGNALS[name]
    assert done.returncode == code and printed in done.stdout and steps == [last] * (last > 0), done
    assert not re.search("error|Traceback", done.stderr)   # PyTorch may warn there that it finds no CUDA
    assert ("stopped by a signal before the first step\n" in done.stderr) == ("start" in name)


@pytest.mark.parametrize("step", [0, 2])
def test_a_signal_lets_the_step_finish_saves_and_exits_0(step, tiny, tmp_path, monkeypatch, capsys):
    do_at_step(monkeypatch, step, train.on_signal)
    last = said(tiny("--fp8 none --steps 6 --log_every 6 --eval_every 6"), capsys).out.splitlines()[-1]
    assert steps_in(tmp_path / "out") == [r["step"] for r in read_log(tmp_path / "out")] == [step + 1]
    assert f"stopped by a signal; {newest(tmp_path / 'out')} is the last good" in last
    assert last.endswith(f"go on with --resume --out {tmp_path / 'out'}")


def test_a_signal_during_the_first_evaluation_is_heard_too(tiny, tmp_path, monkeypatch):
    before_call(monkeypatch, train, "evaluate", train.on_signal)
    assert run(tiny("--fp8 none")) is None and steps_in(tmp_path / "out") == [1]


# ------------------------------------------------------------------------------------------------------------
# Resume: bit for bit, with the options of the run

@pytest.mark.parametrize("recipe", ["none", "tensor", "moss"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(recipe, tiny, tmp_path, monkeypatch):
    command = f"--fp8 {recipe} --steps 6 --rescale_interval 5"   # the true rescale comes after the resume
    run(tiny(command, "whole"))
    interrupted(tiny(command), 2, monkeypatch)
    run(go_on(tmp_path / "out"))
    assert same_state(tmp_path / "whole", tmp_path / "out")
    logs = [read_log(tmp_path / name) for name in ("whole", "out")]
    for key in ("step", "loss", "lr", "grad_norm"):
        assert [r[key] for r in logs[0]] == [r[key] for r in logs[1]], key


def test_skipped_steps_survive_a_resume(tiny, tmp_path, monkeypatch):
    poison_gradient(monkeypatch, {1})
    interrupted(tiny("--fp8 moss --steps 6"), 2, monkeypatch)
    run(go_on(tmp_path / "out"))
    progress = checkpoint(tmp_path / "out")["progress"]
    assert (progress["step"], progress["updates"], progress["skipped"]) == (6, 5, 1)


UNUSUAL = ("--fp8 tensor --lr 1e-3 --weight_decay 0 --warmup 1 --beta1 0.8 --beta2 0.9 --clip 2 --keep 3 "
           "--seed 5 --rescale_interval 7 --spike 50 --max_skips 4 --log_every 3 --eval_every 1 "
           "--eval_batches 3 --recompute block")


def test_resume_takes_options_that_are_not_given_and_says_what_differs(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(tiny(UNUSUAL))
    before = checkpoint("out")["config"]
    command = go_on("out", "--resume --steps 5 --seed 5 --data text.txt")   # two of them as they were
    notes = [line for line in said(command, capsys).out.splitlines() if "note: " in line]
    after = checkpoint("out")["config"]
    assert {name for name in before if before[name] != after[name]} == {"steps", "resume", "out"}
    assert notes == ["note: --steps was 4 and is now 5"]


def test_a_fork_may_have_removed_and_added_options(tiny, tmp_path, monkeypatch, capsys):
    interrupted(tiny("--fp8 none --spike 7"), 1, monkeypatch)
    path = newest(tmp_path / "out") / "manifest.json"
    content = json.loads(path.read_text())["content"]
    content["config"].pop("spike"), content["config"].update(dropout=0.1)
    path.write_text(json.dumps({"checksum": zlib.crc32(json.dumps(content).encode()), "content": content}))
    assert "had --dropout 0.1, an option that does not exist" in said(go_on(tmp_path / "out"), capsys).out
    assert checkpoint(tmp_path / "out")["config"]["spike"] == 100


@pytest.mark.parametrize("mode", ["--resume", "--eval-only --fp8 none,moss"])
def test_what_a_run_switched_on_can_be_switched_off_again(mode, tiny, tmp_path, monkeypatch):
    interrupted(tiny("--fp8 moss --shard"), 1, monkeypatch)
    assert train.main(go_on(tmp_path / "out", mode + " --no-shard")) == 0


def test_resume_without_a_checkpoint_begins_a_run_and_says_so(tiny, tmp_path, capsys):
    assert "the run begins" in said(tiny("--fp8 none --resume"), capsys).out
    assert steps_in(tmp_path / "out") == [4, 2]


def test_resume_without_a_checkpoint_moves_the_log_of_an_earlier_run_aside(tiny, tmp_path):
    run(tiny("--fp8 none"))
    log = (tmp_path / "out/log.jsonl").read_bytes()
    for path in train.checkpoints(tmp_path / "out"):
        shutil.rmtree(path)
    run(tiny("--fp8 none --resume"))
    assert (tmp_path / "out.1/log.jsonl").read_bytes() == log


def test_resume_on_data_of_another_size_says_so(tiny, tmp_path, monkeypatch, capsys):
    interrupted(tiny("--fp8 none"), 2, monkeypatch)
    path = Path(checkpoint(tmp_path / "out")["config"]["data"])
    path.write_text(path.read_text() * 2)
    assert "training tokens: windows are read in another order" in said(go_on(tmp_path / "out"), capsys).out


def test_resume_of_a_run_that_is_done_changes_nothing(tiny, tmp_path, capsys):
    run(tiny("--fp8 none"))
    before = contents(tmp_path)
    assert "at step 4 of 4: the run is done; raise --steps" in said(go_on(tmp_path / "out"), capsys).out
    assert contents(tmp_path) == before


def test_a_checkpoint_goes_on_under_another_recipe_and_says_so(tiny, tmp_path, monkeypatch, capsys):
    interrupted(tiny("--fp8 none"), 2, monkeypatch)
    command = go_on(tmp_path / "out", "--resume --fp8 moss")
    assert "--fp8 was none and is now moss" in said(command, capsys).out
    assert checkpoint(tmp_path / "out")["scales"]["scale"].shape == (LAYERS,)


def test_scales_that_their_weights_exceed_are_measured_at_resume(tiny, tmp_path, monkeypatch):
    interrupted(tiny("--fp8 moss"), 2, monkeypatch)
    load = train.WeightScales.load_state_dict
    monkeypatch.setattr(train.WeightScales, "load_state_dict", lambda self, state: load(
        self, {**state, "scale": state["scale"] / 2}))
    run(go_on(tmp_path / "out"))
    assert read_log(tmp_path / "out")[-1]["scale_ratio_min"] >= 1


@pytest.mark.parametrize("option, was", [("--beta1", 0.9), ("--beta2", 0.95)])
def test_resume_with_other_betas_than_those_of_the_moments_is_refused(option, was, tiny, tmp_path, capsys):
    run(tiny("--fp8 moss"))
    command = go_on(tmp_path / "out", f"--resume --steps 6 {option}")
    assert_refused([*command, "0.8"], [f"{option} was {was}", "leave it out"], tmp_path, capsys)
    assert train.main([*command, str(was)]) == 0


def test_resume_of_another_model_is_refused(tiny, tmp_path, monkeypatch, capsys):
    run(tiny("--fp8 none --steps 1"))
    monkeypatch.setitem(train.PRESETS, "nano", dataclasses.replace(PRESETS["nano"], ffn=256))
    command = go_on(tmp_path / "out", "--resume --steps 2")
    assert_refused(command, ["ffn = 384", "not 256", "--model"], tmp_path, capsys)


def test_after_a_crash_and_a_resume_the_log_has_every_step_once(tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        save_at_once(patch)
        do_at_step(patch, 3, lambda: 1 / 0)   # step 3 is in the log, the last checkpoint is of step 2
        with pytest.raises(ZeroDivisionError):
            run(tiny("--fp8 none"))
    run(go_on(tmp_path / "out"))
    assert [record["step"] for record in read_log(tmp_path / "out")] == [1, 2, 3, 4]


@pytest.mark.parametrize("line", ['{"note": "lr lowered"}', "not JSON", "[1, 2]", "", '{"step": null}',
                                  '{"step": "third", "loss": 1}', "line breaks: \u2028 \x0c \x85 and more"])
def test_a_line_of_the_users_stays_in_the_log_and_one_cut_short_does_not(line, tiny, tmp_path, monkeypatch):
    interrupted(tiny("--fp8 none"), 1, monkeypatch)
    log = tmp_path / "out" / "log.jsonl"
    log.write_text(log.read_text() + line + '\n{"step": 2, "lo', encoding="utf-8")
    run(go_on(tmp_path / "out"))
    lines = log.read_text(encoding="utf-8").split("\n")[:-1]
    assert lines.pop(2) == line and [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


# ------------------------------------------------------------------------------------------------------------
# Checkpoints, and the folder of a run

def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_said_and_leaves_the_last_good_checkpoint(tiny, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        save_at_once(patch)
        do_at_step(patch, 3, lambda: patch.setattr(torch, "save", full_disk))
        out, err = said(tiny("--fp8 none"), capsys, code=1)
    for words in ("step 4 could not be written", "No space left on device", f"make room in {tmp_path}/out",
                  f"{newest(tmp_path / 'out')} is the last good"):
        assert words in out
    assert len(err.splitlines()) == 1 and "the last checkpoint is missing" in err
    assert steps_in(tmp_path / "out") == [2] and not list((tmp_path / "out").glob("*.tmp"))
    assert run(go_on(tmp_path / "out"))["steps"] == 4


@pytest.mark.parametrize("victim", [0, 1])
def test_a_full_disk_of_one_rank_costs_a_checkpoint_and_not_the_run(victim, tiny, tmp_path):
    def job(rank):
        calls = itertools.count()
        if rank == victim:
            before_call(pytest.MonkeyPatch(), torch, "save", lambda *_: next(calls) == 0 and full_disk())
        return train.main(tiny("--fp8 none --accum 2 --eval_batches 2"))
    codes, printed = on_ranks(2, job, tmp_path)
    assert codes == [0, 0] and "warning: the checkpoint of step 2 could not be written" in printed[0]
    assert steps_in(tmp_path / "out") == [4] and checkpoint(tmp_path / "out")["step"] == 4


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_log_that_cannot_be_written_does_not_end_the_run(tiny, monkeypatch, capsys):
    def open_full(path, *arguments, **options):
        return open("/dev/full" if "log.jsonl" in str(path) else path, *arguments, **options)
    monkeypatch.setattr(train, "open", open_full, raising=False)
    printed = said(tiny("--fp8 none"), capsys).out
    assert "warning: step 4 is not in log.jsonl ([Errno 28] No space left on device)" in printed


def test_a_run_keeps_the_newest_checkpoints_that_were_written(tiny, tmp_path, monkeypatch):
    poison_gradient(monkeypatch, {3})   # a step that is skipped leaves no checkpoint
    run(tiny("--fp8 none --steps 6 --eval_every 1 --keep 3"))
    assert steps_in(tmp_path / "out") == [6, 5, 3]


def test_while_steps_are_skipped_no_checkpoint_is_written_and_none_removed(tiny, tmp_path, monkeypatch):
    poison_gradient(monkeypatch, range(3, 7))
    folders = []
    before_call(monkeypatch, train, "evaluate", lambda *_: folders.append(steps_in(tmp_path / "out")))
    save_at_once(monkeypatch)
    run(tiny("--fp8 none --steps 9 --eval_every 1 --keep 1 --max_skips 9 --lr 1e-30"))
    assert [max(steps, default=0) for steps in folders] == [0, 0, 1, 2, 3, 3, 3, 3, 3, 8]
    assert len({tuple(steps) for steps in folders[4:9]}) == 1


def test_a_last_step_that_is_skipped_for_its_gradient_is_saved(tiny, tmp_path, monkeypatch, capsys):
    poison_gradient(monkeypatch, [3])
    run(tiny("--fp8 none --steps 4 --eval_every 3"))
    assert steps_in(tmp_path / "out") == [4, 3]
    assert "the run is done" in said(go_on(tmp_path / "out"), capsys).out


def test_data_that_shrink_while_they_are_read_are_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "a.bin"
    np.zeros(2000, np.uint16).tofile(path)
    tokens = train.Tokens([(path, 0, 2000)], np.uint16)
    os.truncate(path, 100)
    with pytest.raises(train.UserError, match="a.bin has changed"):
        tokens.read(1000, 10)


@pytest.mark.parametrize("x", [torch.randn(5, 7).t(), torch.tensor(3.0), torch.empty(0, 4),
                               torch.arange(1000), torch.randn(1025, 1027).t()], ids=lambda x: f"{x.dim()}d")
def test_what_is_saved_has_the_numbers_of_the_original_and_memory_of_its_own(x):
    net = torch.nn.ParameterDict({name: torch.nn.Parameter(x.clone(), False) for name in "ab"})
    optimizer = SimpleNamespace(state={net["a"]: {"exp_avg": x.t(), "step": 1}})
    own = train.own_state(SimpleNamespace(model=net, owner={net["a"]: 0, net["b"]: 1}, ranks=ONE, scales=None,
                                          optimizer=optimizer))
    before = x.clone()
    for tensor in (net["a"].data, x):   # the next step, while the file is being written
        tensor.zero_()
    assert same(own["parameters"], {"a": {"weight": before, "exp_avg": before.t(), "step": 1}})


def flip(path, where):
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    path.write_bytes(data)


FILES = "rank_0.pt", "rank_1.pt", "manifest.json"
DAMAGE = {**{f"a bit of {name}": lambda path, name=name: flip(path / name, 0.6) for name in FILES},
          **{f"an empty {name}": lambda path, name=name: os.truncate(path / name, 0) for name in FILES},
          **{f"no {name}": lambda path, name=name: (path / name).unlink() for name in FILES},
          "the manifest's first byte": lambda path: flip(path / "manifest.json", 0),
          "a cut file": lambda path: os.truncate(path / "rank_1.pt", 100),
          "another program's manifest": lambda path: (path / "manifest.json").write_text('[{"files": 1}]'),
          "a number as manifest": lambda path: (path / "manifest.json").write_text('{"content": 3}'),
          "an empty folder": lambda path: (shutil.rmtree(path), path.mkdir()),
          "a file in place of the folder": lambda path: (shutil.rmtree(path), path.write_text("x")),
          "a name of a later step": lambda path: path.rename(path.with_name("step_00000009")),
          "a name of more digits": lambda path: path.rename(path.with_name("step_000000100000"))}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """The folder of a run with checkpoints of two files each, of steps 2 and 4 of 4."""
    folder = tmp_path_factory.mktemp("two")
    train_on(2, tiny_in(folder)("--fp8 none --accum 2 --eval_batches 2"), folder)
    return folder / "out"


@pytest.mark.parametrize("damage", DAMAGE)
def test_resume_falls_back_past_a_damaged_checkpoint_and_says_so(damage, two_checkpoints, tmp_path, capsys):
    out = shutil.copytree(two_checkpoints, tmp_path / "out")
    DAMAGE[damage](newest(out))
    damaged, older = train.checkpoints(out)
    printed = said(go_on(out), capsys).out
    assert f"note: {damaged} is damaged" in printed and f"resumed {older}" in printed
    assert f"{damaged} was moved to {damaged}.1" in printed and Path(f"{damaged}.1").exists()
    assert steps_in(out) == [4, 2]


def test_a_checkpoint_may_be_damaged_twice(tiny, tmp_path):
    run(tiny("--fp8 none"))
    for _ in range(2):
        flip(newest(tmp_path / "out") / "rank_0.pt", 0.5)
        assert train.main(go_on(tmp_path / "out")) == 0
    assert steps_in(tmp_path / "out") == [4, 2]
    assert sorted(path.suffix for path in (tmp_path / "out").glob("step_00000004*")) == ["", ".1", ".2"]


def test_the_newest_checkpoint_is_that_of_the_highest_step_however_long_its_name(tmp_path):
    for name in ("step_00000009", "step_100000000", "step_99999999", "step_8", "step_00000010.tmp", "step_x"):
        (tmp_path / name).mkdir()
    assert steps_in(tmp_path) == [100_000_000, 99_999_999, 9, 8]


@pytest.mark.parametrize("mode", ["--resume", "--eval-only", "--sample a"])
def test_where_no_checkpoint_is_whole_nothing_goes_on(mode, tiny, tmp_path, capsys):
    run(tiny("--fp8 none --steps 1"))
    flip(newest(tmp_path / "out") / "rank_0.pt", 0.5)
    assert_refused(go_on(tmp_path / "out", mode), ["is whole: restore one from a copy"], tmp_path, capsys)


def reached(out):
    """Return the newest step in a folder in which all that looks like a checkpoint is whole."""
    for path in train.checkpoints(out):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "checkpoints", lambda _: [path])
            assert train.newest_checkpoint(out, ONE)["step"] == int(path.name[5:])
    return max(steps_in(out), default=0)


@pytest.mark.parametrize("world, kills", [(1, 20), (2, 8)])
def test_kill_9_at_any_instant_loses_only_the_steps_since_the_last_checkpoint(world, kills, tiny, tmp_path):
    command, instants, steps = "--fp8 moss --steps 60 --accum 2 --eval_batches 2", random.Random(0), 0
    train_on(world, tiny(command, "whole"), tmp_path)
    for _ in range(kills):
        if steps == 60:   # a fast machine: once more from the start
            shutil.rmtree(tmp_path / "out")
            steps = 0
        port, job = free_port(), lambda: train.main(tiny(command + " --resume"))
        pids = [start_copy(job, rank if world > 1 else None, world, port) for rank in range(world)]
        time.sleep(instants.uniform(0.01, 0.25) + 0.4 * (world > 1))
        for pid in instants.sample(pids, world):   # either of them first
            os.kill(pid, signal.SIGKILL)
            time.sleep(0.05 * (world > 1))
        for pid in pids:
            os.waitpid(pid, 0)
        assert reached(tmp_path / "out") >= steps   # nothing that was saved is ever lost
        steps = reached(tmp_path / "out")
    train_on(world, tiny(command + " --resume"), tmp_path)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "out"))
    assert [record["step"] for record in read_log(tmp_path / "out")] == list(range(1, 61))


def test_a_second_run_in_the_same_folder_is_refused(tiny, tmp_path, monkeypatch, capsys):
    interrupted(tiny("--fp8 none"), 1, monkeypatch)
    with train.ExitStack() as files:
        train.lock(tmp_path / "out", files)
        for more in ("", " --resume"):
            assert_refused(tiny("--fp8 none" + more), ["is in use by another run"], tmp_path, capsys)
    assert train.main(tiny("--fp8 none --steps 1")) == 0


def test_a_file_system_without_locks_is_no_obstacle(tiny, monkeypatch):
    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", full_disk)
    assert run(tiny("--fp8 none --steps 2"))["steps"] == 2


def test_an_earlier_run_is_renamed_and_never_overwritten(tiny, tmp_path):
    runs = []
    for seed in (1, 2, 3):
        run(tiny(f"--fp8 none --steps 1 --seed {seed}"))
        runs.append(weights(tmp_path / "out"))
    assert all(same(weights(tmp_path / name), run) for name, run in zip(("out.1", "out.2", "out"), runs))


def test_an_output_folder_that_is_a_link_stays_one(tiny, tmp_path):
    (tmp_path / "large disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "large disk")
    for _ in range(2):
        run(tiny("--fp8 none --steps 1"))
    assert (tmp_path / "out").resolve() == tmp_path / "large disk" and (tmp_path / "large disk.1").is_dir()


# ------------------------------------------------------------------------------------------------------------
# Mistakes: exit code 2, one line that says what, why and what to do. An earlier run stays where it is

@pytest.fixture
def earlier(tiny):
    """An earlier run in the folder where the next one is to begin."""
    run(tiny("--fp8 none --steps 1"))


def write_tokens(path, tokens, dtype=np.uint16):
    np.asarray(tokens, dtype).tofile(path)


def write_shard(path, tokens, version=1, count=None):
    """Write llm.c's format: 256 int32, of which three are used, then the tokens."""
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, np.uint16).tobytes())


def write_truncated(path):
    np.save(path, np.zeros(1000, np.uint16))
    os.truncate(path, 500)


def write_two_kinds(path):
    path.mkdir()
    np.save(path / "a.npy", np.zeros(999, np.int32))
    write_tokens(path / "b.bin", [0] * 999)


BAD_DATA = {   # name of the file: (how it is made, what the line says)
    "nowhere": (lambda p: None, ["nowhere", "does not exist", "give a folder, a file or a pattern"]),
    "empty.txt": (lambda p: p.touch(), ["empty.txt", "holds no tokens", "are read"]),
    "empty_folder": (lambda p: p.mkdir(), ["empty_folder", "holds no tokens", "are read"]),
    "short.txt": (lambda p: p.write_text("ten bytes."), ["has 9 tokens", "--seq 16", "give more data"]),
    "no_val.txt": (lambda p: p.write_text("x" * 100), ["has 5 tokens", "--seq 16", "give more data"]),
    "big_id.bin": (lambda p: write_tokens(p, [3, 256] * 500), ["token id 256", "big_id.bin", "for --model"]),
    "negative.npy": (lambda p: np.save(p, np.full(999, -7)), ["token id -7", "negative.npy", "for --model"]),
    "odd.bin": (lambda p: p.write_bytes(b"x" * 1001), ["odd.bin", "1001 bytes", "uint16"]),
    "old.bin": (lambda p: write_shard(p, [1] * 999, version=7), ["old.bin", "version 1"]),
    "cut.bin": (lambda p: write_shard(p, [1] * 999, count=1000), ["cut.bin", "3022 bytes", "copy it again"]),
    "header.bin": (lambda p: write_tokens(p, [20240520, 1, 9], np.int32), ["header.bin", "12 bytes"]),
    "matrix.npy": (lambda p: np.save(p, np.zeros((9, 9), np.uint16)), ["matrix.npy", "(9, 9)"]),
    "packed.npz": (lambda p: np.savez(p, np.zeros(999, np.uint16)), ["packed.npz", "zero bytes"]),
    "float.npy": (lambda p: np.save(p, np.zeros(999, np.float32)), ["float.npy", "float32", "integers"]),
    "garbage.npy": (lambda p: p.write_bytes(b"garbage" * 99), ["garbage.npy", "no .npy file", "numpy.save"]),
    "empty.npy": (lambda p: p.touch(), ["empty.npy", "no .npy file", "numpy.save"]),
    "cut.npy": (write_truncated, ["cut.npy", "no .npy file", "numpy.save"]),
    "renamed.npy": (lambda p: np.savez(p.open("wb"), np.zeros(999)), ["renamed.npy", "no .npy file"]),
    "header.npy": (lambda p: p.write_bytes(b"\x93NUMPY\x01\0\x10\0{'descr': (((((\n"), ["no .npy file"]),
    "two_kinds": (write_two_kinds, ["int32 and uint16", "one kind per folder"]),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_refused(name, tiny, tmp_path, earlier, capsys):
    make, words = BAD_DATA[name]
    make(tmp_path / name)
    assert_refused(tiny(f"--data {tmp_path / name}"), words, tmp_path, capsys)


OUT_OF_RANGE = {   # numbers that make no sense
    **dict.fromkeys("layers steps batch accum seq log_every eval_every eval_batches max_skips keep".split(),
                    "0 -3 9223372036854775808 99999999999999999999999999"),
    **dict.fromkeys("warmup rescale_interval seed".split(), "-1 9223372036854775808"),
    **dict.fromkeys("lr clip".split(), "0.0 -0.001 nan inf 1e300 1e-300"), "weight_decay": "-0.1 nan 1e300",
    **dict.fromkeys("beta1 beta2".split(), "1.0 -0.5 nan"), "spike": "-1.0 nan inf"}
BAD_OPTIONS = {   # options: what the line says
    "--model gpt5": ["--model gpt5", "unknown", "nano, 124m"],
    "--fp8 e3m4": ["--fp8 e3m4", "unknown", "none, tensor, group, mx, moss"],
    "--bench --fp8 none,e3m4": ["--fp8 e3m4", "unknown"],
    "--fp8 none,moss": ["--fp8 none,moss", "unknown"],   # several only to --bench and --eval-only
    "--fp8 none,moss --sample a": ["--fp8 none,moss", "unknown"],
    "--fp8 none,e3m4 --eval-only": ["--fp8 e3m4", "unknown: choose one of none, "],
    "--recompute act": ["--recompute act", "none, block"],
    "--bench --shard": ["--shard is for recipes that predict", "none"],
    "--fp8 tensor --shard": ["--shard is for recipes that predict", "tensor"],
    "--device tpu": ["--device tpu", "use cpu"],
    "--device meta": ["--device meta", "use cpu"],
    "--device cuda:99": ["--device cuda:99", "use --device cpu"],
    "--device cuda:٣": ["--device cuda:٣", "use cpu"],
    "--batch 1 --seq 24": ["--batch 1", "--seq 24", "24 tokens", "multiple of 16", "change --batch or --seq"],
    "--fp8 moss --beta1 0.95 --beta2 0.9": ["0.95", "0.9", "bound"],   # autoscale.py has no bound for these
    "--sample a --out nothing": ["no checkpoint in nothing", "check --out"],
    "--eval-only --out nothing": ["no checkpoint in nothing", "check --out"],
    **{options: [f"{options} cannot be written", "choose another"] for options in (
        "--tensorboard text.txt", "--tensorboard text.txt/board", "--out text.txt", "--out text.txt/out")},
    **{f"--out {folder}": [f"--out {folder.split()[0]} ", "folder of its own"] for folder in (
        ".", "..", "exp --data exp/text.txt", "exp --data exp/*.txt", "exp --data exp")},   # it gets renamed
    f"--out {'x' * 300}": ["--out", "File name too long"],
    "--layers 1001": ["--layers 1001 must lie between 1 and 1000"],
    "--seq 16777217": ["--seq 16777217 must lie between"],
    "--batch 134217728": ["--batch 134217728", "too much with --seq 16, --eval_batches 1: lower it"],
    **{f"--{name} {value}": [f"--{name} {value}", "must lie between"] for name in OUT_OF_RANGE
       for value in OUT_OF_RANGE[name].split()},
}
for name in ("lr", "clip", "weight_decay"):   # Python writes it in another way
    BAD_OPTIONS[f"--{name} 1e300"] = [f"--{name} 1e+300 must lie between"]


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_an_option_that_cannot_work_is_refused(options, tiny, tmp_path, earlier, monkeypatch, capsys):
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp" / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    assert_refused(tiny(options), BAD_OPTIONS[options], tmp_path, capsys)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(train.Config) if f.type is str])
def test_an_empty_value_is_refused(name, tiny, tmp_path, earlier, capsys):
    assert_refused([*tiny(), f"--{name}", ""], [f"--{name} is empty: give it a value"], tmp_path, capsys)


MODES = ["--resume", "--eval_only", "--sample a", "--plot a.png", "--bench"]


@pytest.mark.parametrize("options", ["--learning_rate 1", "--step 5", "--steps many", "--steps 1.5",
                                     "--steps", *map(" ".join, itertools.combinations(MODES, 2))])
def test_unknown_or_malformed_options_and_several_modes_are_refused(options, tiny, tmp_path, earlier, capsys):
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train.main(tiny(options))
    assert stop.value.code == 2 and contents(tmp_path) == before
    assert options.split()[0] in capsys.readouterr().err.splitlines()[-1]


def test_a_preset_that_a_recipe_cannot_tile_is_refused_by_layer(tiny, tmp_path, monkeypatch, earlier, capsys):
    monkeypatch.setitem(train.PRESETS, "nano", dataclasses.replace(PRESETS["nano"], ffn=40))
    assert_refused(tiny("--fp8 moss"), ["blocks.0.down", "40", "--fp8 none"], tmp_path, capsys)


# ------------------------------------------------------------------------------------------------------------
# Data

def read_data(path):
    """Return all training tokens and all validation tokens of --data."""
    return tuple(tokens.read(0, len(tokens)).tolist() if len(tokens) else []
                 for tokens in train.open_data(str(path))[:2])


def test_token_files_of_one_kind_are_read_together(tmp_path):
    np.save(tmp_path / "corpus_train_1.npy", np.arange(1000, 2000, dtype=np.uint16))
    write_tokens(tmp_path / "corpus_train_2.bin", range(2000, 3000))   # nanoGPT's
    write_shard(tmp_path / "corpus_train_3.bin", range(3000, 4000))    # llm.c's
    write_shard(tmp_path / "corpus_val_0.bin", range(50000, 50100))
    assert read_data(tmp_path) == (list(range(1000, 4000)), list(range(50000, 50100)))
    assert train.open_data(tmp_path)[2] is None   # the files do not say the vocabulary: the preset does


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64", ">u2"])
def test_npy_files_may_hold_any_integers(dtype, tmp_path):
    np.save(tmp_path / "tokens.npy", np.arange(1000).astype(dtype))
    assert read_data(tmp_path / "tokens.npy") == (list(range(950)), list(range(950, 1000)))


def write_texts(folder, count):
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:03}.txt").write_text(f"file {i}. " * (i + 1))


@pytest.mark.parametrize("count", [1, 39])
def test_a_few_text_files_are_their_bytes_and_the_end_the_validation_data(count, tmp_path):
    write_texts(tmp_path / "few", count)
    training, validation = read_data(tmp_path / "few")
    everything = b"".join(path.read_bytes() for path in sorted((tmp_path / "few").iterdir()))
    assert bytes(training) + bytes(validation) == everything
    assert 0.05 * len(everything) <= len(validation) < 0.05 * len(everything) + 1
    assert train.open_data(tmp_path)[2] == 256


def test_many_text_files_are_split_by_file_the_same_way_wherever_they_lie(tmp_path):
    for name in ("many", "copy"):
        write_texts(tmp_path / name, 200)
    splits = [[{path.name for path, _, _ in tokens.files} for tokens in train.open_data(folder)[:2]]
              for folder in (tmp_path / "many", tmp_path / "many", tmp_path / "copy")]
    assert splits[0] == splits[1] == splits[2]
    training, validation = splits[0]
    assert not training & validation and len(training | validation) == 200
    assert 2 <= len(validation) <= 20   # a twentieth of 200 is 10, give or take 3 deviations


@pytest.mark.parametrize("name", ["val", "valid", "validation", "VAL", "Valid", "Validation"])
def test_files_named_after_validation_are_the_validation_data(name, tmp_path):
    paths = "train.bin", "retrieval.bin", f"{name}.bin", f"shard_{name}_0.bin", f"{name}/x.bin"
    for i, path in enumerate(paths):
        (tmp_path / "tokens" / path).parent.mkdir(parents=True, exist_ok=True)
        write_tokens(tmp_path / "tokens" / path, [i] * 10)
    for i, path in enumerate(("train.txt", "interval.txt", f"{name}.txt", name)):
        (tmp_path / path).write_text(str(i) * 10)
    for data, held_out in ((tmp_path / "tokens", {2, 3, 4}), (tmp_path / "*", {ord("2"), ord("3")})):
        training, validation = map(set, read_data(data))
        assert validation == held_out and len(training) == 2


def test_names_of_validation_data_mean_the_same_in_a_pattern_as_in_a_folder(tmp_path):
    for folder, value in (("train", 1), ("val", 2)):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "a.npy", np.full(100, value, np.int32))
        (tmp_path / folder / "validation.txt").write_text(folder * 100)   # not at the top: like other text
    for pattern in ("", "*/*.npy", "**/*.npy"):
        assert read_data(tmp_path / pattern)[1] == [2] * 100
    assert list(map(len, read_data(tmp_path / "**/*.txt"))) == [760, 40]   # the last twentieth


@pytest.mark.parametrize("pattern", ["", "/**"])
def test_what_is_hidden_binary_cached_or_of_a_run_is_no_text(pattern, tiny, tmp_path):
    run(tiny("--fp8 none --steps 1"))
    for name in (".git/config", "__pycache__/a.txt", ".hidden.txt", "out/step_00000006.1/a.json",
                 "out/step_00000008.tmp/a", "out/log.tmp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(TEXT)
    (tmp_path / "picture.png").write_bytes(b"\0" * 100)
    (tmp_path / "step_2024").mkdir()
    (tmp_path / "step_2024" / "step_1.txt").write_text(TEXT)   # no names that a run gives
    expected = 3 if pattern else 2   # a pattern says itself what it wants, but of hidden files and of runs
    assert sum(map(len, read_data(str(tmp_path) + pattern))) == expected * len(TEXT)


@pytest.mark.parametrize("data", ["a[1]", "a[1]/t[2].npy", "a[[]1]/*.npy"])
def test_a_name_that_looks_like_a_pattern_is_read_and_so_is_a_pattern(data, tmp_path):
    (tmp_path / "a[1]").mkdir()
    np.save(tmp_path / "a[1]" / "t[2].npy", np.arange(100, dtype=np.int32))
    (tmp_path / "a[1]" / "u.txt").write_text(TEXT)
    assert sum(map(len, read_data(tmp_path / data))) == 100


@pytest.mark.parametrize("pattern", ["d", "d/**/*.txt", "d/**", "d/*/*.txt"])
def test_a_file_behind_links_counts_once_so_that_no_validation_data_are_copies(pattern, tmp_path):
    (tmp_path / "elsewhere").mkdir(), (tmp_path / "d" / "a").mkdir(parents=True)
    (tmp_path / "elsewhere" / "b.txt").write_text("b" * 1000)
    (tmp_path / "d" / "a" / "a.txt").write_text("a" * 1000)
    (tmp_path / "d" / "a" / "loop").symlink_to(tmp_path / "d")
    (tmp_path / "d" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "d" / "again").symlink_to(tmp_path / "elsewhere")
    assert sorted(sum(read_data(tmp_path / pattern), [])) == [ord("a")] * 1000 + [ord("b")] * 1000


@pytest.mark.parametrize("pattern", ["", "**/*.txt", "*/*.txt", "**"])
def test_a_folder_that_cannot_be_read_is_an_error(pattern, tiny, tmp_path, monkeypatch, earlier, capsys):
    locked, scandir = tmp_path / "d" / "locked", os.scandir
    for folder in (locked, tmp_path / "d" / "open"):
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text(TEXT)

    def refuse(path="."):   # file permissions do not bind root
        if os.fspath(path) == str(locked) and sys._getframe(1).f_code.co_filename != __file__:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refuse)
    err = said(tiny(f"--data {tmp_path / 'd' / pattern}"), capsys, code=2).err
    assert "Permission denied" in err and str(locked) in err and not (tmp_path / "out.1").exists()


def test_a_file_name_that_is_no_utf8_is_only_a_name(tiny, tmp_path):
    write_texts(tmp_path / "data", 40)
    odd = os.path.join(os.fsencode(tmp_path / "data"), b"caf\xe9.txt")
    try:
        shutil.copy(os.fsencode(tmp_path / "data" / "039.txt"), odd)
    except OSError:
        pytest.skip("a file system that takes UTF-8 alone")
    for data in (str(tmp_path / "data"), os.fsdecode(odd)):
        assert train.main([*tiny("--fp8 none --steps 1 --seq 8"), "--data", data]) == 0


def test_read_across_files_is_a_slice_of_their_concatenation(tmp_path):
    files, everything = [], np.arange(16)
    for i, (first, size) in enumerate(((0, 5), (5, 0), (5, 1), (6, 7), (13, 3))):   # windows span three
        files.append((tmp_path / f"{i}.bin", 2 * i, size))   # behind i other tokens, of two bytes each
        write_tokens(files[-1][0], [99] * i + [*everything[first:first + size], 99])
    tokens = train.Tokens(files, np.uint16)
    assert len(tokens) == 16
    for first in range(16):
        for count in range(1, 17 - first):
            window = tokens.read(first, count, vocab=16)
            assert window.dtype == np.int64 and np.array_equal(window, everything[first:first + count])


def test_a_large_file_is_read_window_by_window(tmp_path):
    with open(tmp_path / "large.bin", "wb") as f:
        f.truncate(2**30)   # a hole: takes no space on the disk
    tracemalloc.start()
    training, validation, _ = train.open_data(str(tmp_path / "large.bin"))
    batches = train.Batches(training, config(), 256)
    for step in range(10):
        batches.step(step, 0, CPU)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(training) + len(validation) == 2**29
    assert peak < 2**20   # bytes; measured 40 kB


def test_the_default_corpus_is_pythons_own_source_split_by_file():
    training, validation, vocab = train.open_data(None)
    files = [{path for path, _, _ in tokens.files} for tokens in (training, validation)]
    assert vocab == 256 and not files[0] & files[1]
    assert all(path.suffix == ".py" and "site-packages" not in path.parts for path in files[0] | files[1])
    assert 0.02 < len(validation) / (len(training) + len(validation)) < 0.1   # a twentieth of the files


# ------------------------------------------------------------------------------------------------------------
# Loss and gradients that are not finite

@pytest.mark.parametrize("recipe", ["none", "moss"])
def test_a_step_with_a_nan_gradient_is_skipped_and_counted(recipe, tiny, monkeypatch):
    poison_gradient(monkeypatch, {2})
    saved, seen = record_states(monkeypatch), []
    before_call(monkeypatch, train, "forward_backward", lambda net, *_: seen.append(
        copy.deepcopy(net.state_dict())))
    assert run(tiny(f"--fp8 {recipe} --eval_every 1"))["skipped_steps"] == 1
    assert [same(a, b) for a, b in zip(seen, seen[1:])] == [False, False, True]   # before steps 1 to 4
    assert [(s["step"], s["updates"], s["skipped"]) for s in saved] == [(1, 1, 0), (2, 2, 0), (4, 3, 1)]


def test_an_infinite_loss_is_skipped_too(tiny, monkeypatch):
    original, calls, states = Transformer.forward, itertools.count(), record_states(monkeypatch)
    monkeypatch.setattr(Transformer, "forward", lambda self, *a: (   # call 0 is the first evaluation
        original(self, *a) * (math.inf if next(calls) == 1 else 1)))
    assert run(tiny("--fp8 none"))["skipped_steps"] == 1
    assert all(kept["weight"].isfinite().all() for kept in states[-1]["parameters"].values())


def test_a_gradient_out_of_all_proportion_is_skipped(tiny, monkeypatch):
    poison_gradient(monkeypatch, {25}, factor=1e6)
    states = record_states(monkeypatch)
    assert run(tiny("--fp8 none --steps 28 --eval_every 1"))["skipped_steps"] == 1
    assert [state["step"] for state in states] == [*range(1, 26), 27, 28]


def test_skips_that_are_not_in_a_row_do_not_stop_the_run(tiny, monkeypatch):
    poison_gradient(monkeypatch, {0, 1, 3, 4})
    assert run(tiny("--fp8 none --steps 6 --max_skips 3"))["skipped_steps"] == 4


def test_a_run_whose_outputs_stay_nan_stops_and_names_the_layer(tiny, monkeypatch, capsys):
    on_model(monkeypatch, lambda net: net.blocks[0].down.register_forward_hook(lambda _, __, y: y * math.nan))
    err = said(tiny("--fp8 mx --max_skips 3"), capsys, code=1).err
    for words in ("error: 3 steps in a row", "the output of blocks.0.down", "nothing was saved"):
        assert words in err


def test_a_run_whose_gradients_stay_nan_names_layer_and_last_checkpoint(tiny, tmp_path, monkeypatch, capsys):
    poison_gradient(monkeypatch, range(2, 10**6))
    err = said(tiny("--fp8 none --steps 9 --max_skips 3"), capsys, code=1).err
    assert len(err.splitlines()) == 1 and "the gradient of blocks.0.down.weight" in err
    assert f"{tmp_path / 'out' / 'step_00000002'} is the last good" in err
    assert all(weight.isfinite().all() for weight in weights(tmp_path / "out").values())


def poisoned_model(recipe, weight_value=None):
    """Return a model with one value of a weight replaced, that weight, and a batch."""
    torch.manual_seed(0)
    net, c = Transformer(dataclasses.replace(PRESETS["nano"], seq=16, layers=2), recipe), config(fp8=recipe)
    weight = net.blocks[1].down.weight
    with torch.no_grad():
        weight[3, 5] = weight[3, 5] if weight_value is None else weight_value
    train.requantize(net, train.make_scales(net, train.make_optimizer(net, c), c))
    return net, weight, torch.randint(256, (2, 16)), torch.randint(256, (2, 16))


@for_recipes
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_first_layer_whose_output_is_not_finite_is_found(recipe, value):
    net, _, *batch = poisoned_model(recipe, value)
    assert train.first_non_finite(net, *batch) == "the output of blocks.1.down"


def test_the_first_layer_is_found_in_a_compiled_model_too():
    torch._dynamo.reset()
    net, weight, *batch = poisoned_model("none")
    net.compile(backend="aot_eager", dynamic=False)
    with torch.no_grad():
        net(*batch)   # now there is a graph that knows no hooks
        weight[3, 5] = math.nan
    assert train.first_non_finite(net, *batch) == "the output of blocks.1.down"


@pytest.mark.parametrize("recipe", ["none", "moss"])
def test_a_gradient_that_alone_is_not_finite_is_found(recipe):
    net, weight, *batch = poisoned_model(recipe)
    net(*batch).backward()
    assert train.first_non_finite(net, *batch) == "the loss or the norm of the gradient"   # all is finite
    weight.grad[0, 0] = math.nan
    assert train.first_non_finite(net, *batch) == "the gradient of blocks.1.down.weight"


# ------------------------------------------------------------------------------------------------------------
# The log, the schedule, evaluations

def test_the_log_has_a_json_object_per_line(tiny, tmp_path, monkeypatch):
    poison_gradient(monkeypatch, {1})   # JSON does not know NaN and Infinity
    summary = run(tiny("--fp8 none --steps 6 --log_every 2 --eval_every 3 --seed 7"))
    first, *others = records = [json.loads(line, parse_constant=pytest.fail) for line in
                                (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 3, 4, 6]
    assert [record["step"] for record in records if "val_loss" in record] == [3, 6]
    assert all({"step", "loss", "lr", "grad_norm", "tokens_per_s", "skipped"} <= r.keys() for r in records)
    assert first["config"]["seed"] == 7 and first["command"] and first["torch"] == torch.__version__
    assert first["hardware"] == f"1 x CPU, {os.cpu_count()} CPU cores"
    assert not any("config" in record for record in others)
    assert summary["train_loss"] == round(others[-1]["loss"], 4) and summary["tokens"] == 6 * 2 * 16
    assert summary["val_loss"] == round(others[-1]["val_loss"], 4)


def test_a_line_of_progress_shows_shares_scale_and_time():
    record = dict(step=10, loss=2.5, lr=4e-3, grad_norm=0.75, skipped=0, tokens_per_s=12345.6, mfu=0.4,
                  scale_ratio=1.3254, scale_ratio_min=1.0, saturated=0.0, saturated_grad=0.01, folded=0.02,
                  folded_grad=0.03, folded_wgrad=0.04, val_loss=2.25)
    assert train.progress_line(record, config(steps=12), 73.4) == (
        "step 10/12  loss 2.5000  lr 4.00e-03  grad 0.75  12,346 tok/s  mfu 40.00%  saturated 0.00%, 1.00%  "
        "folded 2.00%, 3.00%, 4.00%  scale x1.3254  validation loss 2.2500  0:01:13 left")


def test_the_log_shows_how_healthy_the_scales_of_moss_are(tiny, tmp_path):
    run(tiny("--fp8 moss --steps 6 --rescale_interval 4"))
    records = {record["step"]: record for record in read_log(tmp_path / "out")}
    for record in records.values():
        assert record["scale_ratio"] >= record["scale_ratio_min"] >= 1   # no weight outgrows its scale
        assert record["saturated"] == record["saturated_grad"] == 0      # rule "up": nothing is cut off
        assert 0 <= record["folded"] < 0.05                              # measured 0.0003 to 0.001
        assert 0 <= record["folded_grad"] < 0.2 and 0 <= record["folded_wgrad"] < 0.2
    ratio = [None, *(records[step]["scale_ratio"] for step in range(1, 7))]
    assert ratio[1] == ratio[5] == 1 and ratio[4] > ratio[3] > ratio[2] > 1   # before the update


@for_recipes
def test_recipes_log_what_they_can_lose_and_quantize_weights_once_a_step(recipe, tiny, tmp_path, monkeypatch):
    weights, folds = [], []
    before_call(monkeypatch, model, "quantize_weight", lambda *_: weights.append(1))
    before_call(monkeypatch, model, "fold_loss", lambda *_: folds.append(1))
    run(tiny(f"--fp8 {recipe} --accum 3 --steps 4 --log_every 2 --eval_every 1"))
    assert len(weights) == (0 if recipe == "none" else (1 + 4) * LAYERS)   # at the start, and after each step
    assert len(folds) == (2 * LAYERS * 2 if recipe == "moss" else 0)   # X and dY, once a logged step
    expected = {"saturated", "saturated_grad"} if recipe != "none" else set()
    expected |= {"folded", "folded_grad", "folded_wgrad"} if recipe == "moss" else set()
    shown = read_log(tmp_path / "out")[1]
    assert {key for key in shown if key.startswith(("folded", "saturated"))} == expected


def test_the_learning_rate_warms_up_to_its_peak_and_falls_along_a_cosine_to_a_tenth():
    c = config(steps=110, warmup=10, lr=2.0)
    rates = [train.learning_rate(step, c) for step in range(111)]
    assert rates[0] == pytest.approx(2 / 11)   # warm-up begins above zero: no step is wasted
    assert np.diff(rates[:11]) == pytest.approx(2 / 11)
    assert rates[10] == max(rates) == train.learning_rate(0, config(steps=100, warmup=0, lr=2.0)) == 2.0
    assert rates[60] == pytest.approx((2.0 + 0.2) / 2) and all(np.diff(rates[10:]) < 0)
    assert rates[110] == pytest.approx(0.2)


def test_the_optimizer_gets_the_scheduled_learning_rate(tiny, tmp_path, monkeypatch):
    used = []
    before_call(monkeypatch, train, "update_weights", lambda optimizer, *_: used.append(
        {group["lr"] for group in optimizer.param_groups}))
    run(tiny("--fp8 none --steps 6 --warmup 2"))
    rates = [train.learning_rate(i, config(steps=6, warmup=2)) for i in range(6)]
    assert used == [{rate} for rate in rates] and [r["lr"] for r in read_log(tmp_path / "out")] == rates


def test_weight_decay_spares_the_norms():
    net = Transformer(PRESETS["nano"], "none")
    *decayed, spared = train.make_optimizer(net, config(weight_decay=0.3)).param_groups
    assert {group["weight_decay"] for group in decayed} == {0.3} and spared["weight_decay"] == 0.0
    assert set(spared["params"]) == {p for name, p in net.named_parameters() if "norm" in name}
    assert sum(len(group["params"]) for group in (*decayed, spared)) == len(list(net.parameters()))


@for_recipes
@pytest.mark.parametrize("more", ["--eval_every 1 --log_every 1", "--recompute block"])
def test_evaluating_more_often_and_recomputing_change_no_weight(more, recipe, tiny, tmp_path):
    usual = f"--fp8 {recipe} --layers 2 --accum 2 --eval_every 4 --log_every 4 "
    run(tiny(usual, "as usual"))
    run(tiny(usual + more, more))
    assert same_state(tmp_path / "as usual", tmp_path / more)


# ------------------------------------------------------------------------------------------------------------
# The command line, and what there is besides training

def test_help_shows_every_option_with_its_help_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
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


def test_the_resolved_configuration_is_printed_and_saved(tiny, tmp_path, capsys):
    printed = said(tiny("--fp8 none --steps 2"), capsys).out
    saved = checkpoint(tmp_path / "out")["config"]
    assert saved.keys() == {field.name for field in dataclasses.fields(train.Config)}
    assert all(f"{name}={value}" in printed for name, value in saved.items())
    assert saved["lr"] == train.DEFAULTS["nano"]["lr"]   # not given above


BENCH = "--bench --device cpu --model nano --layers 1 --seq 16 --batch 2 --steps 2".split()


def test_bench_prints_a_row_for_every_recipe_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = said(BENCH, capsys).out.splitlines()[-len(RECIPES):]
    assert [row.split()[0] for row in rows] == list(RECIPES) and list(tmp_path.iterdir()) == []


def test_bench_counts_the_tokens_of_all_micro_batches_and_one_optimizer_step():
    c = train.resolve(train.parse_config([*BENCH, "--accum", "3", "--fp8", "moss,none"]), CPU, 1)
    rows = train.bench(c, CPU)
    for row in rows.values():
        seconds = (3 * row["fwd+bwd ms"] + row["optimizer ms"]) / 1e3
        assert row["tokens/s"] == pytest.approx(3 * 2 * 16 / seconds)
    assert math.isnan(rows["moss"]["x none"]) and rows["none"]["x none"] == 1   # none comes after moss


def test_eval_only_reports_the_last_loss_on_any_number_of_ranks(tiny, tmp_path, monkeypatch, capsys):
    loss = run(tiny("--fp8 moss --eval_batches 4"))["val_loss"]
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path / "out")   # from within its folder, too
    line = said(go_on(".", "--eval-only"), capsys).out
    assert re.split("  +", line) == ["step_00000004", "moss", "FP8 emulated on CPU",
                                     f"validation loss {loss:.4f}\n"]
    assert contents(tmp_path) == before
    assert on_ranks(2, lambda rank: train.main(go_on(".", "--eval-only")), tmp_path) == ([0, 0], [line, ""])


def test_recipes_are_compared_at_the_weights_of_a_checkpoint(tiny, tmp_path, monkeypatch, capsys):
    run(tiny("--fp8 moss --steps 8 --eval_batches 3"))
    before, losses = contents(tmp_path), []
    for recipe in RECIPES:
        alone = said(go_on(tmp_path / "out", f"--fp8 {recipe} --eval-only"), capsys).out
        losses.append(alone.split("validation loss ")[1].strip())
    rows = said(go_on(tmp_path / "out", f"--fp8 {','.join(RECIPES)} --eval-only"), capsys).out.splitlines()
    for recipe, loss, row in zip(RECIPES, losses, rows[-len(RECIPES):], strict=True):
        assert row.split()[1] == recipe and f"loss {loss} " in row
        # Each of some six roundings on the way, to 3 or (tensor) 2 bits, is wrong by 2.6% or 5% of the value.
        error = float(re.search("gradient +([0-9.]+)%", row)[1])
        assert error == 0 if recipe == "none" else 0.5 < error < 20
    assert contents(tmp_path) == before
    monkeypatch.setattr(train, "start_ranks", lambda _: train.Ranks(0, 2, CPU))
    command = go_on(tmp_path / "out", "--fp8 none,moss --eval-only")
    assert_refused(command, ["without torchrun"], tmp_path, capsys)


def test_recipes_are_compared_at_partly_frozen_weights(tiny, tmp_path, monkeypatch):
    freeze("norm", monkeypatch)
    run(tiny("--fp8 moss"))
    assert train.main(go_on(tmp_path / "out", "--fp8 none,moss --eval-only")) == 0


@pytest.mark.parametrize("prompt", ["the quick", "\udcff"])   # a byte that is no text, as Python takes it
def test_sample_goes_on_with_a_text(prompt, tiny, tmp_path, monkeypatch, capsys):
    run(tiny("--fp8 none"))
    monkeypatch.setattr(train, "sample", SAMPLE)
    written = said([*go_on(tmp_path / "out", "--sample"), prompt], capsys).out
    assert written.startswith(prompt.replace("\udcff", "\ufffd")) and len(written.encode()) >= 200


@pytest.mark.parametrize("prompt", ["²", "٣", "1_0", "-1", "256", "9" * 5000, "one", " ", "1 2 3.0"])
def test_sample_takes_token_ids_of_the_model_alone(prompt, tiny, tmp_path, monkeypatch, capsys):
    write_tokens(tmp_path / "train.bin", [1, 2, 3, 4] * 50)
    write_tokens(tmp_path / "val.bin", [1, 2, 3, 4] * 3)   # shorter than a usual prompt
    monkeypatch.setattr(train, "sample", SAMPLE)
    run(tiny(f"--fp8 none --seq 8 --steps 1 --data {tmp_path}"))
    command = go_on(tmp_path / "out", "--sample")
    assert_refused([*command, prompt], [f"--sample {prompt}", "token ids below 256"], tmp_path, capsys)
    assert said([*command, "1 2 3"], capsys).out.startswith("1 2 3 ")


def test_plot_draws_the_losses_of_several_runs(tiny, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for name in ("a", "b"):
        run(tiny("--fp8 none", name))
    with open(tmp_path / "a" / "log.jsonl", "a") as log:   # the user's lines, and one that a crash cut short
        log.write('{"note": "hm"}\n{"loss": "high", "step": "third"}\n{"loss": 3}\n{"step": 5, "loss": 1.')
    command = ["--out", f"{tmp_path / 'a'},{tmp_path / 'b'}", "--plot"]
    assert train.main([*command, str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert_refused(["--out", str(tmp_path), "--plot", "x.png"], ["has no log to draw"], tmp_path, capsys)
    with pytest.raises(SystemExit, match="curves.xyz.*png"):
        train.main([*command, str(tmp_path / "curves.xyz")])


def test_tensorboard_says_what_is_missing(tiny, tmp_path, monkeypatch, earlier, capsys):
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    assert_refused(tiny(f"--tensorboard {tmp_path / 'board'}"), ["pip install tensorboard"], tmp_path, capsys)


@pytest.fixture
def board(monkeypatch):
    """A tensorboard that touches a file for each curve. `fails` is the error of its next number."""
    seen = SimpleNamespace(fails=None, closed=0)

    @contextmanager
    def writer(folder, purge_step):
        def add_scalar(key, value, step):
            if seen.fails:
                raise seen.fails
            (Path(folder) / key).touch()
        Path(folder).mkdir(parents=True, exist_ok=True)
        seen.purge_step = purge_step
        yield SimpleNamespace(add_scalar=add_scalar)
        seen.closed += 1
    monkeypatch.setattr(train, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=writer))
    return seen


def test_tensorboard_may_lie_in_the_runs_folder_and_draws_nothing_twice(tiny, tmp_path, board, monkeypatch):
    command = tiny(f"--fp8 none --tensorboard {tmp_path / 'out' / 'board'}")
    run(command)
    interrupted(command, 2, monkeypatch)   # renames the folder of the first run
    assert all((tmp_path / out / "board" / "loss").exists() for out in ("out", "out.1"))
    assert board.purge_step == 1
    run(go_on(tmp_path / "out"))
    assert board.purge_step == 4 and board.closed == 3   # or the last numbers are lost


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), ValueError("I/O on closed file")])
def test_what_tensorboard_cannot_write_is_not_blamed_on_the_log(error, tiny, tmp_path, board, capsys):
    board.fails = error
    printed = said(tiny(f"--fp8 none --tensorboard {tmp_path / 'board'}"), capsys).out
    assert [record["step"] for record in read_log(tmp_path / "out")] == [1, 2, 3, 4]
    assert "warning: step 2 is not in --tensorboard (" in printed


WITHOUT_TRITON = functools.partial(
    train_py, code="import sys; sys.modules['triton'] = None; import train; exit(train.main())")
BESIDE = {"test_moss_trains_where_triton_cannot_be_installed": WITHOUT_TRITON,
          "test_torchrun_restarts_a_run": killed_under_torchrun,
          "full disk": write_to_a_full_disk,
          "closed stdout": functools.partial(train_py, stdout=None, preexec_fn=lambda: os.close(1)),
          **{name: functools.partial(signal_in, name) for name in SIGNALS}}
