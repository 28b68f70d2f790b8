"""
What train.py promises: same data and start for every recipe, resume bit for bit, no NaN in a weight, errors in a line.

    $ python -m pytest tests/test_train.py

The runs are tiny: nano with one block, 16 tokens x 2 sequences, a few steps. They run in this process. Several ranks are
copies of it (`on_ranks`), and what needs a process of its own runs beside the tests (BESIDE, conftest.py).
"""

import copy
import dataclasses
import errno
import functools
import gc
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
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ON_HOPPER

import model
import train
from microscale import RECIPES
from model import PRESETS, Block, Transformer

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}   # of other processes, before a test changes it
CPU = torch.device("cpu")
ONE = train.Ranks(0, 1, CPU)
TEXT = "the quick brown fox jumps over the lazy dog.\n" * 100
TINY = ("--device cpu --model nano --layers 1 --seq 16 --batch 2 --accum 1 --steps 4 "
        "--log_every 1 --eval_every 2 --eval_batches 1").split()
LAYERS = 4   # quantized ones of a block: qkv, out, gate_up and down

for_recipes = pytest.mark.parametrize("recipe", RECIPES)
pytestmark = pytest.mark.usefixtures("one_thread", "no_signal_yet")


@pytest.fixture
def no_signal_yet(monkeypatch):
    monkeypatch.setattr(train, "stop", SimpleNamespace(received=False, in_loop=False))


@pytest.fixture
def no_sample(monkeypatch):
    """200 generated tokens take longer than these runs."""
    monkeypatch.setattr(train, "sample", lambda *_: "")


def tiny_in(folder):
    """Return a function that gives the command line of a short run. Of an option given twice the later one counts."""
    (folder / "text.txt").write_text(TEXT)

    def command(more="", out="out"):
        return [*TINY, "--data", str(folder / "text.txt"), "--out", str(folder / out), *more.split()]
    return command


@pytest.fixture
def tiny(tmp_path):
    return tiny_in(tmp_path)


def run(command):
    return train.train(train.parse_config(command))


def newest(out):
    return train.checkpoints(out)[0]


def steps_in(out):
    return [int(path.name[5:]) for path in train.checkpoints(out)]


def checkpoint(out):
    """Return {"parameters", "scales", and what the manifest says} of the newest whole checkpoint."""
    saved = train.newest_checkpoint(out, ONE)
    parts = [torch.load(saved["path"] / name, weights_only=True) for name in saved["files"]]
    return {**saved, "parameters": {name: kept for part in parts for name, kept in part["parameters"].items()},
            "scales": next((part["scales"] for part in parts if part["scales"]), None)}


def weights(out):
    return {name: kept["weight"] for name, kept in checkpoint(out)["parameters"].items()}


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def config(**values):
    """Return a resolved configuration, for what takes one apart from a run."""
    return train.resolve(train.Config(**{"model": "nano", "layers": 1, "seq": 16, "batch": 2, **values}), CPU, 1)


def same(a, b):
    """Return whether these are bit for bit the same tensors in the same nest of dicts and lists."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_state(one, other):
    one, other = checkpoint(one), checkpoint(other)
    return all(same(one[part], other[part]) for part in ("parameters", "scales", "progress"))


# ------------------------------------------------------------------------------------------------------------
# Spies: what a run sees, and what is done to it


def do_at_step(monkeypatch, step, action):
    """Call `action` as the data of optimizer step `step`, from 0, are read (once: for --accum 1)."""
    original = train.Batches.step

    def spy(self, number, micro, device):
        if number == step:
            action()
        return original(self, number, micro, device)
    monkeypatch.setattr(train.Batches, "step", spy)


def save_at_once(monkeypatch):
    """Let training wait for its checkpoints."""
    save = train.Saver.save
    monkeypatch.setattr(train.Saver, "save", lambda self, *state: (save(self, *state), self.finish()))


def on_model(monkeypatch, action):
    """Call `action(model)` on the run's model, with its initial weights, before anything is trained."""
    original = train.make_optimizer

    def spy(model, *arguments):
        action(model)
        return original(model, *arguments)
    monkeypatch.setattr(train, "make_optimizer", spy)


def record_batches(monkeypatch):
    """Return a list of ((step, micro-batch), tokens) that fills while a run reads its training data."""
    seen, original = [], train.Batches.step

    def spy(self, step, micro, device):
        tokens, targets = original(self, step, micro, device)
        seen.append(((step, micro), tokens))
        return tokens, targets
    monkeypatch.setattr(train.Batches, "step", spy)
    return seen


def record_states(monkeypatch):
    """Return a list of what a run would have written as checkpoints."""
    states = []
    monkeypatch.setattr(train.Saver, "save", lambda self, own, content: states.append(
        copy.deepcopy({**own, **content["progress"]})))
    return states


def poison_gradient(monkeypatch, name, steps):
    """Make the gradient of one weight NaN in these steps, from 0 (for --accum 1)."""
    def add_hook(model):
        count = itertools.count()
        weight = dict(model.named_parameters())[name]
        weight.register_hook(lambda grad: torch.full_like(grad, math.nan) if next(count) in steps else grad)
    on_model(monkeypatch, add_hook)


ALWAYS = range(10**6)


def interrupted(command, step, monkeypatch):
    """Make a run that a signal reaches in its step number `step`, from 0."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "stop", SimpleNamespace(received=False, in_loop=False))
        do_at_step(patch, step, train.on_signal)
        assert train.main(command) == 0


# ------------------------------------------------------------------------------------------------------------
# Every recipe trains, and from the same start on the same data


@for_recipes
def test_every_recipe_learns_on_a_cpu(recipe, tiny, no_sample):
    summary = run(tiny(f"--fp8 {recipe} --layers 2 --seq 32 --batch 4 --steps 30 --eval_every 30 --log_every 30"))
    # Ignorance is ln 256 = 5.5, letter frequencies alone give 3.0; measured 0.5 to 0.6 for all recipes.
    assert summary["val_loss"] < 1.5
    assert summary["recipe"] == recipe and summary["steps"] == 30 and summary["skipped_steps"] == 0


def train_py(folder, more="", code=None, **options):
    """Run `python train.py`, or Python code in its place, as a process of its own."""
    command = [*(["-c", code] if code else ["train.py"]), *tiny_in(folder)(more)]
    return subprocess.run([sys.executable, *command], cwd=ROOT, timeout=120,
                          **{"env": ENVIRONMENT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True,
                             **options})


def train_without_triton(folder):
    return train_py(folder, code="import sys; sys.modules['triton'] = None; import train; sys.exit(train.main())")


def test_moss_trains_where_triton_cannot_be_installed(beside):
    done = beside["test_moss_trains_where_triton_cannot_be_installed"].result()
    assert done.returncode == 0 and done.stdout.count("emulated") == 2, done.stderr   # at the start, in the summary


def test_all_recipes_see_the_same_batches_from_the_same_weights(tiny, monkeypatch, no_sample):
    seen, starts = {}, []
    on_model(monkeypatch, lambda model: starts.append(copy.deepcopy(model.state_dict())))
    for recipe in RECIPES:
        with monkeypatch.context() as patch:
            seen[recipe] = record_batches(patch)
            run(tiny(f"--fp8 {recipe} --steps 2 --accum 2"))
    assert [key for key, _ in seen["none"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(same(seen["none"], other) for other in seen.values())
    assert len(starts) == len(RECIPES) and all(same(starts[0], other) for other in starts)


def test_another_seed_gives_other_weights_and_other_batches(tiny, monkeypatch, no_sample):
    starts, batches = [], record_batches(monkeypatch)
    on_model(monkeypatch, lambda model: starts.append(copy.deepcopy(model.state_dict())))
    for seed in (1, 2):
        run(tiny(f"--fp8 none --steps 1 --seed {seed}"))
    assert not same(starts[0]["embed.weight"], starts[1]["embed.weight"])
    assert not same(batches[0], batches[1])


def own_source(**options):
    return train.Batches(train.open_data(str(ROOT / "train.py"))[0], config(**options), 256)


def test_every_step_and_every_micro_batch_has_its_own_data():
    batches = own_source(accum=2)
    seen = [batches.step(step, micro, CPU)[0] for step in (0, 1, 2) for micro in (0, 1)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(seen, 2))


@pytest.mark.parametrize("n", [1, 2, 3, 17, 1000, 4096])
def test_a_shuffled_order_visits_every_number_once(n):
    order, other = ([train.shuffled(i, n, keys) for i in range(n)] for keys in ([11, 12, 13, 14], [21, 22, 23, 24]))
    assert sorted(order) == sorted(other) == list(range(n))
    if n >= 17:
        assert order != sorted(order) and order != other


def test_an_epoch_reads_every_window_once_and_the_next_one_in_another_order():
    batches = own_source()
    n = batches.windows
    epochs = [[batches.start(epoch * n + i) for i in range(n)] for epoch in (0, 1)]
    for starts in epochs:
        assert set(np.diff(sorted(starts))) == {16}   # side by side
        assert min(starts) >= 0 and max(starts) + 16 < len(batches.tokens)
    assert np.argsort(epochs[0]).tolist() != np.argsort(epochs[1]).tolist()


def test_steps_go_on_where_the_step_before_ended():
    batches = own_source(accum=2)
    seen = torch.cat([batches.step(step, micro, CPU)[0] for step in (0, 1) for micro in (0, 1)])
    expected = torch.stack([torch.from_numpy(batches.tokens.read(batches.start(i), 16)) for i in range(8)])
    assert torch.equal(seen, expected)


def test_targets_are_the_tokens_one_place_further():
    x, y = own_source().step(0, 0, CPU)
    assert x.shape == y.shape == (2, 16)
    assert torch.equal(x[:, 1:], y[:, :-1])


def numbered(folder, c):
    """Return Batches of the numbers 0 ... 999 as tokens."""
    np.save(folder / "numbers.npy", np.arange(1000))
    return train.Batches(train.open_data(folder / "numbers.npy")[0], c, 1000)


def test_a_batch_that_was_read_ahead_is_the_batch_of_that_step(tmp_path):
    ahead, behind = (numbered(tmp_path, train.Config(seq=8, batch=2, accum=2)) for _ in range(2))
    ahead.prefetch(5, 1, CPU)
    assert torch.equal(ahead.step(2, 0, CPU)[0], behind.step(2, 0, CPU)[0])   # another one than was read ahead
    ahead.prefetch(5, 1, CPU)
    assert all(map(torch.equal, ahead.step(5, 1, CPU), behind.step(5, 1, CPU)))


def test_half_the_batch_and_twice_the_accumulation_read_the_same_tokens(tmp_path):
    whole, halves = (numbered(tmp_path, train.Config(seq=8, batch=8 // accum, accum=accum)) for accum in (1, 2))
    assert torch.equal(whole.step(1, 0, CPU)[0], torch.cat([halves.step(1, micro, CPU)[0] for micro in (0, 1)]))


def test_moss_takes_the_adamw_of_pytorch_as_well(tiny, tmp_path, monkeypatch, no_sample):
    run(tiny("--fp8 moss --rescale_interval 2", "ours"))
    monkeypatch.setattr(train, "FP8AdamW", lambda groups, layers, **options: torch.optim.AdamW(groups, **options))
    run(tiny("--fp8 moss --rescale_interval 2", "theirs"))
    assert same_state(tmp_path / "ours", tmp_path / "theirs")


def test_a_run_with_another_optimizer_goes_on(tiny, tmp_path, monkeypatch, no_sample):
    monkeypatch.setattr(train, "make_optimizer", lambda model, c, shards=None: torch.optim.RMSprop(
        model.parameters(), lr=c.lr, momentum=0.9))
    run(tiny("--fp8 tensor", "whole"))
    interrupted(tiny("--fp8 tensor"), 1, monkeypatch)
    run(tiny("--fp8 tensor --resume"))
    assert same_state(tmp_path / "whole", tmp_path / "out")


def test_recomputing_activations_changes_no_bit_of_a_run(tiny, tmp_path, no_sample):
    run(tiny("--fp8 moss", "kept"))
    run(tiny("--fp8 moss --recompute block", "again"))
    assert same_state(tmp_path / "kept", tmp_path / "again")


FREEZE = {"embedding": "embed", "norm": "norm1", "linear layer": "down", "blocks": "blocks", "all but the head": ""}


def freeze(which):
    """Let make_model freeze these weights. (In a copy of this process, or restored by a monkeypatch.)"""
    make = train.make_model

    def frozen(*arguments):
        net = make(*arguments)
        for name, p in net.named_parameters():
            p.requires_grad_(FREEZE[which] not in name or name == "head.weight")
        return net
    return frozen


@pytest.mark.parametrize("recipe", ["none", "tensor", "moss"])
@pytest.mark.parametrize("which", FREEZE)
def test_frozen_weights_stay_as_they_are_and_the_others_train(which, recipe, tiny, monkeypatch, no_sample):
    states = record_states(monkeypatch)
    monkeypatch.setattr(train, "make_model", freeze(which))
    run(tiny(f"--fp8 {recipe} --eval_every 1"))
    first, last = ({name: kept["weight"] for name, kept in states[i]["parameters"].items()} for i in (0, -1))
    for name in first:
        frozen = FREEZE[which] in name and name != "head.weight"
        assert torch.equal(first[name], last[name]) == frozen, name


@pytest.mark.parametrize("recipe", [None, "tensor", "group"])
def test_a_block_may_have_another_precision_than_the_others(recipe, tiny, tmp_path, monkeypatch, no_sample):
    make = train.make_model

    def mixed(c, *arguments):
        net = make(c, *arguments)
        net.blocks[1] = Block(net.config, RECIPES[recipe] if recipe else None, "blocks.1", "none")
        return net
    monkeypatch.setattr(train, "make_model", mixed)
    summary = run(tiny("--fp8 moss --layers 2", "whole"))
    assert summary["skipped_steps"] == 0 and math.isfinite(summary["val_loss"])
    interrupted(tiny("--fp8 moss --layers 2"), 1, monkeypatch)
    run(tiny("--fp8 moss --layers 2 --resume"))
    assert same_state(tmp_path / "whole", tmp_path / "out")


def test_layers_is_the_number_of_blocks(tiny, tmp_path, no_sample):
    run(tiny("--fp8 none --layers 2 --steps 1"))
    assert {name.split(".")[1] for name in weights(tmp_path / "out") if name.startswith("blocks.")} == {"0", "1"}


# ------------------------------------------------------------------------------------------------------------
# Several ranks

has_fork = pytest.mark.skipif(ON_HOPPER or not hasattr(os, "fork"),
                              reason="a process that has used a GPU cannot be copied")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_copy(job, rank=None, world=1, port=0, printed=os.devnull):
    """Call job(), which returns an exit code, in a copy of this process, as a rank of several. Return its id."""
    pid = os.fork()
    if pid == 0:
        code, sys.stdout = 99, open(printed, "w", buffering=1)
        sys.stderr, train.sample = sys.stdout, lambda *_: ""
        if rank is not None:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
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


def exit_code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def on_ranks(world, job, folder):
    """Call job(rank) in `world` copies of this process. Return their exit codes and what each printed."""
    port, printed = free_port(), [folder / f"rank_{rank}.printed" for rank in range(world)]
    pids = [start_copy(functools.partial(job, rank), rank, world, port, printed[rank]) for rank in range(world)]
    return [exit_code(pid) for pid in pids], [path.read_text() for path in printed]


def train_on(world, command, folder):
    """Run a command line on several ranks (or on one: in a copy of this process)."""
    codes, printed = on_ranks(world, lambda rank: train.main(command), folder)
    assert codes == [0] * world, printed
    return printed


def drawn_elsewhere(rank):
    """Let rank 1 draw other initial weights, as another kind of GPU would from the same seed."""
    build = train.build

    def other(c, device):
        net, *batches = build(c, device)
        for p in net.parameters() if rank == 1 else ():
            p.data.mul_(1.5)
        return net, *batches
    return other


def checks_buckets():
    """Let DDP's gradients lie in its buckets from the first micro-batch on: beside them they would take memory twice."""
    forward_backward = train.forward_backward

    def checked(net, *arguments, **options):
        where = lambda: [p.grad.data_ptr() for p in net.parameters()] if hasattr(net, "module") else "no DDP"
        before, loss = where(), forward_backward(net, *arguments, **options)
        assert before == where()
        return loss
    return checked


@pytest.fixture(scope="module", params=["none", "moss", "moss --shard"])
def two_ranks(request, tmp_path_factory):
    """(the folder of a run on two ranks, the command line that made it)"""
    if ON_HOPPER or not hasattr(os, "fork"):
        pytest.skip("a process that has used a GPU cannot be copied")
    folder = tmp_path_factory.mktemp("ranks")
    command = tiny_in(folder)(f"--fp8 {request.param} --accum 2 --steps 3 --eval_every 3 --eval_batches 2 "
                              f"--rescale_interval 2", "two")

    def job(rank):
        train.build, train.forward_backward = drawn_elsewhere(rank), checks_buckets()
        return train.main(command)
    codes, printed = on_ranks(2, job, folder)
    assert codes == [0, 0] and printed[1] == "", printed
    return folder, command


def test_two_ranks_train_the_same_weights_as_one(two_ranks, no_sample):
    # Bit for bit: two micro-batches leave one addition, whose order does not matter, and halving is exact. (From four
    # micro-batches on, the sums are taken in another order, and Adam makes large updates of tiny differences.)
    folder, command = two_ranks
    run([*command, "--out", str(folder / "one")])
    assert same_state(folder / "one", folder / "two")


def test_two_ranks_write_one_log_with_the_health_of_all_scales(two_ranks, no_sample):
    folder, command = two_ranks
    run([*command, "--out", str(folder / "alone")])
    alone, two = ([(r["step"], r.get("scale_ratio"), r.get("scale_ratio_min")) for r in read_log(folder / out)]
                  for out in ("alone", "two"))
    assert alone == two and [step for step, *_ in two] == [1, 2, 3]


def test_a_checkpoint_of_two_ranks_goes_on_in_one_as_if_it_had_been_one(two_ranks, no_sample, capsys):
    folder, command = two_ranks
    run([*command, "--out", str(folder / "first")])
    shutil.copytree(folder / "two", folder / "then")
    for out in ("first", "then"):
        run([*command, "--steps", "5", "--resume", "--out", str(folder / out)])
    assert "at step 3; 2 ranks wrote it, 1 go on\n" in capsys.readouterr().out
    assert same(weights(folder / "first"), weights(folder / "then"))


@has_fork
@pytest.mark.parametrize("writers, shard", [(1, ""), (2, " --shard"), (3, "")])
def test_a_checkpoint_is_read_by_any_number_of_ranks_bit_for_bit(writers, shard, tiny, tmp_path):
    more = "--fp8 moss --accum 6 --eval_batches 6 --eval_every 2"
    train_on(writers, tiny(f"{more} --steps 2{shard}", "written"), tmp_path)

    for readers, shard in ((1, ""), (2, " --shard"), (3, "")):
        shutil.copytree(tmp_path / "written", tmp_path / "read")

        def read_and_write(rank):
            train.update_weights = lambda *_: None   # so that the next checkpoint holds what was read of this one
            return train.main(tiny(f"{more} --steps 3 --resume{shard}", "read"))
        codes, printed = on_ranks(readers, read_and_write, tmp_path)
        assert codes == [0] * readers, printed
        before, after = checkpoint(tmp_path / "written"), checkpoint(tmp_path / "read")
        assert (before["step"], len(before["files"])) == (2, writers)
        assert (after["step"], len(after["files"])) == (3, readers)
        assert same(before["parameters"], after["parameters"]) and same(before["scales"], after["scales"])
        shutil.rmtree(tmp_path / "read")


@has_fork
@pytest.mark.parametrize("shard", ["", " --shard"])
def test_a_resumed_run_on_two_ranks_equals_the_uninterrupted_one_bit_for_bit(shard, tiny, tmp_path):
    more = f"--fp8 moss --accum 4 --steps 6 --eval_batches 2 --rescale_interval 5{shard}"
    train_on(2, tiny(more, "whole"), tmp_path)

    def stopped(rank):
        read = train.Batches.step
        train.Batches.step = lambda self, step, *rest: (
            train.on_signal() if step == 2 and rank == 1 else None, read(self, step, *rest))[1]
        return train.main(tiny(more))
    codes, printed = on_ranks(2, stopped, tmp_path)
    assert codes == [0, 0] and steps_in(tmp_path / "out") == [3, 2], printed
    train_on(2, ["--device", "cpu", "--resume", "--out", str(tmp_path / "out")], tmp_path)
    assert same_state(tmp_path / "whole", tmp_path / "out")


@has_fork
@pytest.mark.parametrize("recipe", ["none", "moss", "moss --shard"])
@pytest.mark.parametrize("which", FREEZE)
def test_two_ranks_train_a_partly_frozen_model_as_one_does(which, recipe, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "make_model", freeze(which))
    more = f"--fp8 {recipe} --accum 2 --eval_batches 2 --clip 1e30"   # shards sum the norm in another order
    train_on(1, tiny(more, "one"), tmp_path)
    train_on(2, tiny(more, "two"), tmp_path)
    one, two = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    assert same(one["parameters"], two["parameters"]) and same(one["scales"], two["scales"])


@has_fork
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_micro_batches_of_one_process(world, tiny, tmp_path):
    command = tiny("--fp8 none --accum 4 --steps 2 --eval_batches 4")

    def record(rank):
        seen, read = [], train.Batches.step

        def spy(self, step, micro, device):
            seen.append(((step, micro), read(self, step, micro, device)[0]))
            return read(self, step, micro, device)
        train.Batches.step = spy
        code = train.main(command)
        torch.save(seen, tmp_path / f"seen_{rank}")
        return code
    batches = []
    for ranks in (1, world):
        assert on_ranks(ranks, record, tmp_path)[0] == [0] * ranks
        batches.append(sorted((batch for rank in range(ranks) for batch in torch.load(tmp_path / f"seen_{rank}")),
                              key=lambda batch: batch[0]))
    assert len(batches[0]) == 8 and same(*batches)


@has_fork
def test_ranks_with_other_options_or_other_data_are_stopped(tiny, tmp_path):
    (tmp_path / "other.txt").write_text(2 * TEXT)
    for more in ("--lr 1", f"--data {tmp_path / 'other.txt'}"):
        codes, printed = on_ranks(2, lambda rank: train.main(tiny("--accum 2 " + more * rank)), tmp_path)
        assert codes == [1, 1] and "the same command, and give every node all files of --data" in printed[0], printed
        assert not (tmp_path / "out").exists()


@has_fork
def test_ranks_may_find_the_same_data_in_different_places(tiny, tmp_path):
    (tmp_path / "copy.txt").write_text(TEXT)
    more = f"--fp8 none --accum 2 --eval_batches 2 --data {tmp_path / 'copy.txt'}"
    codes, printed = on_ranks(2, lambda rank: train.main(tiny("--fp8 none --accum 2 --eval_batches 2") if rank == 0
                                                         else tiny(more)), tmp_path)
    assert codes == [0, 0], printed


def test_ranks_that_see_other_checkpoints_are_stopped(tiny, monkeypatch, no_sample):
    run(tiny("--fp8 none"))
    monkeypatch.setattr(train, "gather", lambda thing: [thing, [*thing, "step_00000009"]])
    with pytest.raises(train.RunError, match="different checkpoints: --out .* a folder that all nodes see"):
        run(tiny("--resume"))


def test_ranks_whose_scales_differ_are_stopped(tiny, monkeypatch):
    monkeypatch.setattr(train, "gather", lambda thing: [thing, [1.0] if isinstance(thing[0], float) else thing])
    with pytest.raises(train.RunError, match="different weight scales"):
        run(tiny("--fp8 moss"))


@pytest.mark.parametrize("end", [train.UserError("x: y"), train.RunError("x: y")])
def test_a_mistake_is_an_error_of_every_rank(end, monkeypatch, capsys):
    def fails(config):
        raise end
    monkeypatch.setattr(train, "train", fails)
    monkeypatch.setenv("RANK", "3")
    assert train.main([]) == (2 if isinstance(end, train.UserError) else 1)
    assert capsys.readouterr().err == "rank 3: error: x: y\n"


def test_a_rank_that_owns_no_scale_has_no_health_to_add():
    c = config(fp8="moss")
    net = train.make_model(c, CPU)
    scales = train.make_scales(net, train.make_optimizer(net, c), c)
    health = train.scale_health(net, scales, SimpleNamespace(mine=lambda p: False))
    assert health["scale_ratio"] == -math.inf and health["scale_ratio_min"] == math.inf


def test_owners_share_the_parameters_evenly_and_hold_the_only_numbers():
    shards = []
    for rank in range(4):
        net = Transformer(PRESETS["nano"], "moss")
        shards.append(train.Shards(net, train.owners(net, 4), train.Ranks(rank, 4, CPU)))
        for p in shards[-1].layers:
            assert p.untyped_storage().nbytes() == (4 * p.numel() if shards[-1].mine(p) else 4)
    loads = [sum(p.numel() for p in s.parameters if s.mine(p)) for s in shards]
    assert max(loads) < 1.1 * min(loads) and sum(loads) == sum(p.numel() for p in net.parameters())


def test_more_ranks_than_parameters_cannot_share_them():
    net = train.make_model(config(fp8="moss"), CPU)
    with pytest.raises(train.UserError, match="--shard: 1000 ranks are more than the"):
        train.Shards(net, train.owners(net, 1000), train.Ranks(0, 1000, CPU))


def test_sharded_ranks_exchange_scales_at_true_rescales_only_whatever_they_own():
    c = config(fp8="moss", rescale_interval=2)
    net = train.make_model(c, CPU)
    optimizer = train.make_optimizer(net, c)
    scales, exchanged = train.make_scales(net, optimizer, c), []
    shards = SimpleNamespace(mine=lambda p: True, share=lambda scales, measured: exchanged.append(measured))
    train.requantize(net, scales, shards)
    for update in (1, 2, 3, 4):   # the optimizer of this CPU has no layers, like that of a rank that owns none
        train.update_weights(optimizer, net, scales, 1e-3, update, c, shards)
    assert exchanged == [False, True, False, True]


def test_scales_are_measured_on_all_ranks_if_a_weight_of_one_exceeds_them(tiny, tmp_path, monkeypatch, no_sample):
    interrupted(tiny("--fp8 moss"), 1, monkeypatch)
    rescaled, original = [], train.WeightScales.rescale
    monkeypatch.setattr(train, "all_reduce", lambda tensor, op=None: tensor if op is None else tensor.new_tensor(-0.9))
    monkeypatch.setattr(train.WeightScales, "rescale", lambda self: rescaled.append(1) or original(self))
    run(tiny("--resume"))
    assert rescaled


def test_ranks_that_cannot_meet_say_so_in_one_line(tiny, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert train.main(tiny()) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "the ranks cannot meet" in lines[0]


def test_micro_batches_that_ranks_cannot_share_are_refused_with_a_number_that_works():
    with pytest.raises(train.UserError, match="--accum 3 .* 2 ranks: use --accum 4"):
        train.resolve(train.Config(model="nano", accum=3), CPU, world=2)


def killed_under_torchrun(folder):
    """Return (folder, command line, torchrun's end) of a run on two ranks, of which one is killed at its step 6."""
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
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--max-restarts", "3",
                "--rdzv_backend", "c10d", "--rdzv_endpoint", f"localhost:{free_port()}", str(folder / "script.py")]
    return folder, command, subprocess.run([*torchrun, *command], env=ENVIRONMENT, timeout=120, text=True,
                                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_torchrun_restarts_a_run_whose_rank_was_killed_and_the_weights_are_those_of_an_unharmed_one(
        beside, no_sample):
    folder, command, done = beside["test_torchrun_restarts_a_run"].result()
    assert done.returncode == 0 and "the run begins" in done.stdout, done.stdout
    assert len(re.findall("resumed .* at step [246]; 2 ranks wrote it, 2 go on\n", done.stdout)) == 1, done.stdout
    assert not (folder / "out.1").exists()
    run([*command, "--out", str(folder / "whole")])
    assert same_state(folder / "out", folder / "whole")


def test_a_restart_without_resume_does_not_go_on_with_an_earlier_run(tiny, tmp_path, monkeypatch, no_sample, capsys):
    run(tiny("--fp8 none --steps 2"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run(tiny("--fp8 none --steps 2 --seed 1"))
    assert "resumed" not in capsys.readouterr().out
    assert steps_in(tmp_path / "out.1") == steps_in(tmp_path / "out") == [2]


# What a GPU computes in an order of its own is put into a fixed one, so that runs can be compared bit for bit.
ON_GPUS = """
import os, sys
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
sys.path.insert(0, {root!r})
import torch, train
torch.use_deterministic_algorithms(True)
train.sample = lambda *_: ""
forward_backward = train.forward_backward

def sent_in_fp32(_, bucket):
    return train.dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(lambda done: done.value()[0])

def as_two_ranks_would(model, batches, step, c, ranks, shards=None, watching=False):
    "On one GPU: the gradients of both micro-batches rounded and added as two ranks do that."
    losses, sent = [], []
    for rank in (0, 1):
        losses.append(forward_backward(model, batches, step, c, train.Ranks(rank, 2, ranks.device), shards=True))
        sent.append([p.grad.bfloat16() / 2 for p in model.parameters()])
        model.zero_grad()
    for p, first, second in zip(model.parameters(), *sent):
        p.grad = (first + second).float()
    return sum(losses)

if {how!r} == "sent in FP32":
    train.bf16_compress_hook = sent_in_fp32
if {how!r} == "as two ranks would":
    train.forward_backward = as_two_ranks_would
code = train.main(sys.argv[1:])
train.gc.collect()
if train.dist.is_initialized():
    train.dist.destroy_process_group()
sys.exit(code)
"""


@pytest.fixture(scope="module")
def on_gpus(tmp_path_factory):
    """Return a function of (number of GPUs, more options, how gradients are added) that trains 3 steps of two
    micro-batches and returns what its checkpoint holds."""
    folder = tmp_path_factory.mktemp("gpus")
    (folder / "text.txt").write_text(TEXT)

    @functools.cache
    def run(gpus, more, how=""):
        out = folder / f"{gpus}{more}{how}".replace(" ", "")
        (folder / "script.py").write_text(ON_GPUS.format(root=str(ROOT), how=how))
        command = [*TINY, *f"--device cuda --eager --seq 64 --accum 2 --steps 3 --eval_every 3 --eval_batches 2 "
                           f"--rescale_interval 2 {more}".split(),
                   "--data", str(folder / "text.txt"), "--out", str(out)]
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
        done = subprocess.run([sys.executable, *(launcher if gpus > 1 else []), str(folder / "script.py"), *command],
                              timeout=180, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return {part: checkpoint(out)[part] for part in ("parameters", "scales")}
    return run


needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.gpu
@needs_two_gpus
@pytest.mark.parametrize("recipe", ["none", "moss"])
def test_two_gpus_train_the_same_weights_as_one_if_gradients_are_sent_in_fp32(recipe, on_gpus):
    assert same(on_gpus(1, f"--fp8 {recipe}"), on_gpus(2, f"--fp8 {recipe}", "sent in FP32"))


@pytest.mark.gpu
@needs_two_gpus
@pytest.mark.parametrize("recipe, shard", [("none", ""), ("moss", ""), ("moss", " --shard")])
def test_two_gpus_train_the_same_weights_as_one_that_rounds_gradients_to_bf16_as_they_do(recipe, shard, on_gpus):
    assert same(on_gpus(1, f"--fp8 {recipe}", "as two ranks would"), on_gpus(2, f"--fp8 {recipe}{shard}"))


@pytest.mark.gpu
@pytest.mark.parametrize("first, then", [("moss", "none"), ("none", "moss"), ("tensor", "moss"), ("moss", "moss")])
def test_on_a_gpu_a_checkpoint_goes_on_under_any_recipe(first, then, tiny, tmp_path, monkeypatch, no_sample):
    interrupted(tiny(f"--device cuda --fp8 {first}"), 2, monkeypatch)
    summary = run(tiny(f"--device cuda --fp8 {then} --resume"))
    assert summary["steps"] == 4 and math.isfinite(summary["val_loss"])
    if first == then:
        straight = run(tiny(f"--device cuda --fp8 {first}", out="straight"))
        assert same(weights(tmp_path / "out"), weights(tmp_path / "straight"))
        assert summary["val_loss"] == straight["val_loss"]


# ------------------------------------------------------------------------------------------------------------
# Errors that are not the user's


def fails_with(error, monkeypatch):
    def train_in_vain(config):
        raise error
    monkeypatch.setattr(train, "train", train_in_vain)


def test_a_rank_whose_peer_died_says_so_in_one_line(monkeypatch, capsys):
    fails_with(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:39127. And so on."),
               monkeypatch)
    monkeypatch.setenv("RANK", "0")
    assert train.main([]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "another rank is gone" in lines[0] and "--max-restarts with --resume" in lines[0]


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError()], ids=lambda error: type(error).__name__)
def test_too_little_memory_is_said_in_one_line_with_what_to_change(error, monkeypatch, capsys):
    fails_with(error, monkeypatch)
    assert train.main([]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "halve --batch and double --accum" in lines[0]


def test_an_error_of_the_program_itself_is_not_hidden(monkeypatch):
    fails_with(RuntimeError("expected scalar type Float but found Half"), monkeypatch)
    with pytest.raises(RuntimeError, match="expected scalar type"):
        train.main([])


def test_an_error_of_the_file_system_is_said_in_one_line(monkeypatch, capsys):
    fails_with(OSError(errno.ESTALE, "Stale file handle", "tokens.bin"), monkeypatch)
    assert train.main([]) == 1
    assert capsys.readouterr().err == f"error: [Errno {errno.ESTALE}] Stale file handle: 'tokens.bin'\n"


def test_a_file_system_without_locks_is_no_obstacle(tiny, monkeypatch, no_sample):
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")
    monkeypatch.setattr(fcntl, "flock", flock)
    assert run(tiny("--fp8 none --steps 2"))["steps"] == 2


def test_a_bad_token_ends_the_run_with_a_line_that_names_its_file(tiny, tmp_path, monkeypatch, capsys):
    path = tmp_path / "tokens.npy"
    np.save(path, np.zeros(4000, np.int32))
    do_at_step(monkeypatch, 2, lambda: np.save(path, np.full(4000, 999, np.int32)))
    assert train.main(tiny(f"--fp8 none --data {path}")) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and f"token id 999 in {path} is outside the model's vocabulary of 256" in lines[0]


def write_to_a_full_disk(folder):
    with open("/dev/full" if os.path.exists("/dev/full") else os.devnull, "w") as full:
        return train_py(folder, "--fp8 none", stdout=full)


def write_to_a_closed_stdout(folder):
    return train_py(folder, "--fp8 none", stdout=None, preexec_fn=lambda: os.close(1))


@pytest.mark.parametrize("where", ["full disk", "closed stdout"])
def test_output_that_cannot_be_written_does_not_end_the_run(where, beside, tmp_path):
    done = beside[where].result()
    assert done.returncode == 0 and "rror" not in done.stderr, done.stderr


def kill_while_it_prints(folder):
    """Return what was printed, into a file and in ASCII, by a run that was killed after some steps."""
    (folder / "größer.txt").write_bytes("größer ".encode() * 100)
    out = folder / "größer"
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "PYTHONUNBUFFERED"}
    with open(folder / "printed", "w") as printed:
        process = subprocess.Popen([sys.executable, "train.py", *TINY, "--fp8", "none", "--steps", "4000", "--out", out,
                                    "--data", folder / "größer.txt"], cwd=ROOT, stdout=printed,
                                   env={**environment, "PYTHONIOENCODING": "ascii"})
        while process.poll() is None and not ((out / "log.jsonl").exists() and read_log(out)):
            time.sleep(0.05)
        time.sleep(0.2)
        process.kill()
        process.wait()
    return (folder / "printed").read_text()


def test_what_a_run_prints_is_there_at_once_and_in_any_encoding(beside):
    assert "step    1/4000" in beside["test_what_a_run_prints"].result()


def test_a_run_needs_not_be_in_the_main_thread(tiny, no_sample):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(train.main(tiny("--fp8 none"))))
    thread.start()
    thread.join()
    assert codes == [0]


# ------------------------------------------------------------------------------------------------------------
# Signals


def signal_in(method, number, folder):
    """Run train.py as a process that a signal reaches in each call of a method of the model."""
    return train_py(folder, "--fp8 none", f"""
import os, runpy, sys, model
original = model.Transformer.{method}
def spy(self, *arguments, **options):
    os.kill(os.getpid(), {int(number)})
    return original(self, *arguments, **options)
model.Transformer.{method} = spy
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
""")


SIGNALS = {"SIGINT at the start": ("__init__", signal.SIGINT), "SIGTERM at the start": ("__init__", signal.SIGTERM),
           "SIGINT in a step": ("forward", signal.SIGINT), "SIGTERM in the sample": ("generate", signal.SIGTERM)}
PRINTED = {"at the start": "", "in a step": "stopped by a signal; ", "in the sample": "time             0m"}


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_at_any_time_is_no_error(name, beside):
    done = beside[name].result()
    assert done.returncode == 0 and PRINTED[name.split(" ", 1)[1]] in done.stdout, done
    assert done.stderr == ("stopped by a signal before the first step\n" if "start" in name else "")


@pytest.mark.parametrize("step", [0, 2])
def test_a_signal_lets_the_step_finish_saves_and_exits_0(step, tiny, tmp_path, monkeypatch, capsys):
    do_at_step(monkeypatch, step, train.on_signal)
    assert train.main(tiny("--fp8 none --steps 6 --log_every 6 --eval_every 6")) == 0
    assert steps_in(tmp_path / "out") == [step + 1]
    assert [record["step"] for record in read_log(tmp_path / "out")] == [step + 1]
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"stopped by a signal; {newest(tmp_path / 'out')} is the last good" in last
    assert last.endswith(f"go on with --resume --out {tmp_path / 'out'}")


def test_a_signal_during_the_first_evaluation_is_heard_too(tiny, tmp_path, monkeypatch, no_sample):
    original = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *arguments: (train.on_signal(), original(*arguments))[1])
    assert run(tiny("--fp8 none")) is None and steps_in(tmp_path / "out") == [1]


def test_a_signal_while_the_last_checkpoint_is_written_waits_for_it(tiny, tmp_path, monkeypatch, no_sample):
    finish = train.Saver.finish
    monkeypatch.setattr(train.Saver, "finish", lambda self: (train.on_signal(), finish(self))[1])
    assert run(tiny("--fp8 none --eval_every 4"))["steps"] == 4 and steps_in(tmp_path / "out") == [4]


# ------------------------------------------------------------------------------------------------------------
# Resume: bit for bit, with the options of the run

INTERRUPTED = "--steps 6 --rescale_interval 5"   # stops after step 3; a true rescale of moss comes after the resume


@pytest.mark.parametrize("recipe", ["none", "tensor", "moss"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(recipe, tiny, tmp_path, monkeypatch, no_sample):
    run(tiny(f"--fp8 {recipe} {INTERRUPTED}", "whole"))
    interrupted(tiny(f"--fp8 {recipe} {INTERRUPTED}", "parts"), 2, monkeypatch)
    assert checkpoint(tmp_path / "parts")["step"] == 3
    run(["--device", "cpu", "--resume", "--out", str(tmp_path / "parts")])
    assert same_state(tmp_path / "whole", tmp_path / "parts")
    logs = [read_log(tmp_path / name) for name in ("whole", "parts")]
    for key in ("step", "loss", "lr", "grad_norm"):
        assert [r[key] for r in logs[0]] == [r[key] for r in logs[1]], key


UNUSUAL = ("--fp8 tensor --lr 1e-3 --weight_decay 0 --warmup 1 --beta1 0.8 --beta2 0.9 --clip 2 --rescale_interval 7 "
           "--spike 50 --max_skips 4 --log_every 3 --eval_every 1 --eval_batches 3 --keep 3 --seed 5 --recompute block")


def test_resume_takes_every_option_of_the_run_that_is_not_given(tiny, tmp_path, no_sample, capsys):
    run(tiny(UNUSUAL))
    before = checkpoint(tmp_path / "out")["config"]
    capsys.readouterr()
    run(["--device", "cpu", "--resume", "--out", str(tmp_path / "out"), "--steps", "5"])
    after = checkpoint(tmp_path / "out")["config"]
    assert {name for name in before if before[name] != after[name]} == {"steps", "resume"}
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert notes == ["note: --steps was 4 and is now 5"]


def test_an_option_that_is_given_as_it_was_is_nothing_to_note(tiny, tmp_path, monkeypatch, no_sample, capsys):
    monkeypatch.chdir(tmp_path)
    command = [*tiny("--fp8 none"), "--data", "text.txt", "--out", "out"]
    interrupted(command, 1, monkeypatch)
    run([*command, "--resume"])
    assert "note: " not in capsys.readouterr().out


def rewrite(path, change):
    """Change what the manifest of a checkpoint says, and its checksum."""
    content = json.loads((path / "manifest.json").read_text())["content"]
    change(content)
    text = json.dumps({"checksum": zlib.crc32(json.dumps(content).encode()), "content": content})
    (path / "manifest.json").write_text(text)


def test_options_that_a_fork_removed_are_said_and_those_that_it_added_get_their_default(tiny, tmp_path, monkeypatch,
                                                                                        no_sample, capsys):
    interrupted(tiny("--fp8 none"), 1, monkeypatch)

    def as_another_fork(content):
        content["config"]["dropout"] = 0.1
        del content["config"]["spike"]
    rewrite(newest(tmp_path / "out"), as_another_fork)
    run(["--device", "cpu", "--resume", "--out", str(tmp_path / "out")])
    assert "note: the run had --dropout 0.1, an option that does not exist any more" in capsys.readouterr().out
    assert checkpoint(tmp_path / "out")["config"]["spike"] == 100


def test_eval_only_and_sample_take_the_options_of_the_run_too(tiny, tmp_path, no_sample, capsys):
    run(tiny("--fp8 none --seq 8"))
    for mode in (["--eval-only"], ["--sample", "a"]):
        capsys.readouterr()
        assert train.main(["--device", "cpu", *mode, "--out", str(tmp_path / "out")]) == 0
        assert "note: " not in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["--resume", "--eval-only --fp8 none,moss"])
def test_what_a_run_switched_on_can_be_switched_off_again(mode, tiny, tmp_path, monkeypatch, no_sample):
    interrupted(tiny("--fp8 moss --shard --eager"), 1, monkeypatch)
    command = ["--device", "cpu", "--out", str(tmp_path / "out"), *mode.split(), "--no-shard", "--no-eager"]
    assert train.main(command) == 0


def test_resume_without_a_checkpoint_begins_a_run_and_says_so(tiny, tmp_path, no_sample, capsys):
    assert run(tiny("--fp8 none --resume"))["steps"] == 4
    assert f"there is no checkpoint in {tmp_path / 'out'} yet: the run begins" in capsys.readouterr().out


def test_resume_of_a_run_that_is_done_changes_nothing(tiny, tmp_path, no_sample, capsys):
    run(tiny("--fp8 none"))
    before = contents(tmp_path)
    assert train.main(["--device", "cpu", "--resume", "--out", str(tmp_path / "out")]) == 0
    assert "at step 4 of 4: the run is done; raise --steps to go on" in capsys.readouterr().out
    assert contents(tmp_path) == before


def test_a_run_that_is_done_goes_on_with_more_steps(tiny, tmp_path, no_sample):
    run(tiny("--fp8 none"))
    assert run(["--device", "cpu", "--resume", "--out", str(tmp_path / "out"), "--steps", "6"])["steps"] == 6
    assert [record["step"] for record in read_log(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]


def test_skipped_steps_survive_a_resume(tiny, tmp_path, monkeypatch, no_sample):
    with monkeypatch.context() as patch:
        poison_gradient(patch, "blocks.0.down.weight", {1})
        interrupted(tiny(f"--fp8 moss {INTERRUPTED}"), 2, monkeypatch)
    run(tiny(f"--fp8 moss {INTERRUPTED} --resume"))
    progress = checkpoint(tmp_path / "out")["progress"]
    assert (progress["step"], progress["updates"], progress["skipped"]) == (6, 5, 1)


def test_a_checkpoint_goes_on_under_another_recipe_and_says_so(tiny, tmp_path, monkeypatch, no_sample, capsys):
    interrupted(tiny("--fp8 none"), 2, monkeypatch)
    assert run(tiny("--fp8 moss --resume"))["steps"] == 4
    assert "--fp8 was none and is now moss" in capsys.readouterr().out
    assert checkpoint(tmp_path / "out")["scales"]["scale"].shape == (LAYERS,)


def test_scales_that_their_weights_exceed_are_measured_at_resume(tiny, tmp_path, monkeypatch, no_sample):
    interrupted(tiny("--fp8 moss"), 2, monkeypatch)
    load = train.load_state

    def with_small_scales(*arguments):
        state = load(*arguments)
        state["scales"]["scale"] = state["scales"]["scale"] / 2
        return state
    monkeypatch.setattr(train, "load_state", with_small_scales)
    run(tiny("--fp8 moss --resume"))
    assert read_log(tmp_path / "out")[-1]["scale_ratio_min"] >= 1


def test_moments_of_other_betas_are_left_behind_and_no_weight_exceeds_its_scale(tiny, tmp_path, no_sample, capsys):
    more = "--fp8 moss --lr 4e-3 --warmup 0 --rescale_interval 0 --eval_every 4"
    run(tiny(more + " --steps 4 --beta2 0.999"))
    run(tiny(more + " --steps 16 --beta2 0.82 --resume"))
    assert "Adam's moments begin anew" in capsys.readouterr().out
    assert min(record["scale_ratio_min"] for record in read_log(tmp_path / "out")) >= 1


def test_other_data_under_the_same_name_are_said_at_resume(tiny, tmp_path, monkeypatch, no_sample, capsys):
    monkeypatch.setattr(train, "evaluate", lambda *_: 1.0)
    run(tiny("--fp8 none --steps 2"))
    (tmp_path / "text.txt").write_text(2 * TEXT)
    monkeypatch.setattr(train, "evaluate", lambda *_: 2.0)
    run(["--device", "cpu", "--resume", "--steps", "4", "--out", str(tmp_path / "out")])
    assert "note: --data held 4,275 training and 225 validation tokens" in capsys.readouterr().out
    assert checkpoint(tmp_path / "out")["progress"]["best"] == [2.0, 4]   # losses on other data are no rivals


def test_a_best_checkpoint_is_not_compared_across_validation_data(tiny, tmp_path, monkeypatch, no_sample):
    monkeypatch.setattr(train, "evaluate", lambda *_: 1.0)
    run(tiny("--fp8 none --steps 2"))
    monkeypatch.setattr(train, "evaluate", lambda *_: 2.0)
    run(tiny("--fp8 none --resume --eval_batches 2"))
    assert checkpoint(tmp_path / "out")["progress"]["best"] == [2.0, 4]


def test_resume_of_another_model_is_refused(tiny, tmp_path, monkeypatch, no_sample, capsys):
    run(tiny("--fp8 none --steps 1"))
    capsys.readouterr()
    monkeypatch.setitem(train.PRESETS, "nano", dataclasses.replace(PRESETS["nano"], ffn=256))
    assert_refused(tiny("--fp8 none --resume"), ["ffn = 384", "ffn = 256", "use the --model"], tmp_path, capsys)


# ------------------------------------------------------------------------------------------------------------
# The log of a run that goes on


def test_after_a_crash_and_a_resume_the_log_has_every_step_once(tiny, tmp_path, monkeypatch, no_sample):
    def crash():
        raise MemoryError
    with monkeypatch.context() as patch:
        save_at_once(patch)
        do_at_step(patch, 3, crash)   # step 3 is in the log, the last checkpoint is of step 2
        with pytest.raises(MemoryError):
            run(tiny("--fp8 none"))
    run(tiny("--fp8 none --resume"))
    assert [record["step"] for record in read_log(tmp_path / "out")] == [1, 2, 3, 4]


FOREIGN = ['{"note": "lr lowered"}', "not JSON", "[1, 2]", "7", "", '{"step": "third", "loss": "high"}',
           '{"step": null}', '{"step": {}}', "Zeilenumbr\u00fcche: \u2028 \x0c \x85 gibt es viele"]


@pytest.mark.parametrize("line", FOREIGN)
def test_a_line_of_the_users_stays_in_the_log_and_harms_nothing(line, tiny, tmp_path, monkeypatch, no_sample):
    interrupted(tiny("--fp8 none"), 1, monkeypatch)
    log = tmp_path / "out" / "log.jsonl"
    log.write_text(log.read_text() + line + "\n", encoding="utf-8")
    run(tiny("--fp8 none --resume"))
    lines = log.read_text(encoding="utf-8").split("\n")[:-1]
    assert lines[2] == line and [json.loads(lines[i])["step"] for i in (0, 1, 3, 4)] == [1, 2, 3, 4]


def test_a_log_line_that_a_crash_cut_short_is_dropped_at_resume(tiny, tmp_path, monkeypatch, no_sample):
    interrupted(tiny("--fp8 none"), 2, monkeypatch)
    with open(tmp_path / "out" / "log.jsonl", "a") as log:
        log.write('{"step": 2, "lo')
    run(tiny("--fp8 none --resume"))
    assert [record["step"] for record in read_log(tmp_path / "out")] == [1, 2, 3, 4]


class FullDisk:
    """A file that takes nothing."""

    def write(self, *_):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_line_of_the_log_that_cannot_be_written_does_not_end_the_run(tiny, monkeypatch, no_sample, capsys):
    write = train.Log.write
    monkeypatch.setattr(train.Log, "write", lambda self, record: (setattr(self, "file", FullDisk()), write(self, record)))
    assert run(tiny("--fp8 none"))["steps"] == 4
    assert "warning: step 2 is not in the log (No space left on device)" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# Checkpoints


def full_disk(state, f):
    f.write(b"half a checkpoint")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_said_and_leaves_the_last_good_checkpoint(tiny, tmp_path, monkeypatch, no_sample, capsys):
    with monkeypatch.context() as patch:
        save_at_once(patch)
        do_at_step(patch, 3, lambda: patch.setattr(torch, "save", full_disk))
        assert train.main(tiny("--fp8 none")) == 1   # the last checkpoint is missing
    out, err = capsys.readouterr()
    assert "step 4 could not be written" in out and f"make room in {tmp_path / 'out'}" in out
    assert f"{newest(tmp_path / 'out')} is the last good checkpoint" in out and "No space left on device" in out
    assert len(err.splitlines()) == 1 and "the last checkpoint is missing" in err
    assert steps_in(tmp_path / "out") == [2] and not list((tmp_path / "out").glob("*.tmp"))
    assert run(tiny("--fp8 none --resume"))["steps"] == 4


@has_fork
@pytest.mark.parametrize("victim", [0, 1])
def test_a_full_disk_of_one_rank_costs_a_checkpoint_and_not_the_run(victim, tiny, tmp_path):
    def job(rank):
        save, calls = torch.save, itertools.count()
        if rank == victim:
            torch.save = lambda state, f: full_disk(state, f) if next(calls) == 0 else save(state, f)
        return train.main(tiny("--fp8 none --accum 2 --eval_batches 2"))
    codes, printed = on_ranks(2, job, tmp_path)
    assert codes == [0, 0] and "warning: the checkpoint of step 2 could not be written" in printed[0]
    assert steps_in(tmp_path / "out") == [4] and checkpoint(tmp_path / "out")["step"] == 4


def test_nothing_that_goes_wrong_with_a_checkpoint_passes_for_success(tmp_path, monkeypatch, capsys):
    def save(*_):
        raise MemoryError
    monkeypatch.setattr(torch, "save", save)
    saver = train.Saver(tmp_path, 1, ONE)
    saver.save({}, {"step": 5, "progress": {"best": [1.0, 3]}})
    assert not saver.finish() and "MemoryError" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_run_keeps_the_last_checkpoints_and_the_best(tiny, tmp_path, monkeypatch, no_sample):
    losses = iter([9.0, 3.0, 1.0, 2.0, 4.0, 5.0, 6.0])
    monkeypatch.setattr(train, "evaluate", lambda *_: next(losses))   # the first one is of the start
    run(tiny("--fp8 none --steps 6 --eval_every 1 --keep 2"))
    assert steps_in(tmp_path / "out") == [6, 5, 2]
    assert checkpoint(tmp_path / "out")["progress"]["best"] == [1.0, 2]


def test_while_steps_are_skipped_no_checkpoint_is_written_and_none_removed(tiny, tmp_path, monkeypatch, no_sample):
    poison_gradient(monkeypatch, "blocks.0.down.weight", range(3, 7))
    folders, evaluate = [], train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *a: (folders.append(steps_in(tmp_path / "out")), evaluate(*a))[1])
    save_at_once(monkeypatch)
    run(tiny("--fp8 none --steps 9 --eval_every 1 --keep 1 --max_skips 9 --lr 1e-30"))
    assert [max(steps, default=0) for steps in folders] == [0, 0, 1, 2, 3, 3, 3, 3, 3, 8]
    assert max(steps_in(tmp_path / "out")) == 9


def test_the_best_checkpoint_is_one_that_was_written(tiny, tmp_path, monkeypatch, no_sample):
    poison_gradient(monkeypatch, "blocks.0.down.weight", {2})
    losses = iter([9.0, 5.0, 2.0, 1.0, 6.0, 7.0, 8.0])   # the third step is skipped
    monkeypatch.setattr(train, "evaluate", lambda *_: next(losses))
    run(tiny("--fp8 none --steps 6 --eval_every 1 --keep 1"))
    assert steps_in(tmp_path / "out") == [6, 2]


def test_a_long_run_saves_every_250_steps():
    assert [config(steps=steps).eval_every for steps in (3, 600, 100_000)] == [1, 120, 250]


@pytest.mark.parametrize("x", [torch.randn(5, 7).t(), torch.tensor(3.0), torch.empty(0, 4), torch.arange(1000),
                               torch.randn(1025, 1027).t()], ids=["transposed", "scalar", "empty", "integers", "large"])
def test_a_copy_on_the_cpu_has_the_numbers_of_the_original_and_memory_of_its_own(x):
    before, copied = x.clone(), train.on_cpu({"x": x, "y": 1})
    x.zero_()
    assert same(copied, {"x": before, "y": 1})


def test_what_is_saved_is_the_state_when_save_was_called(tiny, tmp_path, monkeypatch, no_sample):
    run(tiny("--fp8 none --steps 1", "short"))
    write = train.Saver.write
    monkeypatch.setattr(train.Saver, "write", lambda self, own: (time.sleep(0.2), write(self, own))[1])
    run(tiny("--fp8 none --eval_every 1 --keep 9 --lr 4e-3 --warmup 0"))   # the next step meets a slow disk
    for name in ("manifest.json", "rank_0.pt"):
        assert (tmp_path / "out" / "step_00000001" / name).exists()
    first = torch.load(tmp_path / "out" / "step_00000001" / "rank_0.pt")["parameters"]
    short = checkpoint(tmp_path / "short")["parameters"]
    assert same(first, short)


def flip(path, where):
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def rename_to(step):
    return lambda path: path.rename(path.with_name(f"step_{step}"))


DAMAGE = {"a bit of the first rank's file": lambda path: flip(path / "rank_0.pt", 0.5),
          "a bit of the second rank's file": lambda path: flip(path / "rank_1.pt", 0.9),
          "a bit of the manifest": lambda path: flip(path / "manifest.json", 0.6),
          "the manifest's first byte": lambda path: flip(path / "manifest.json", 0),
          "a cut file": lambda path: os.truncate(path / "rank_1.pt", 100),
          "an empty file": lambda path: os.truncate(path / "rank_0.pt", 0),
          "an empty manifest": lambda path: os.truncate(path / "manifest.json", 0),
          "a missing file": lambda path: (path / "rank_1.pt").unlink(),
          "a missing manifest": lambda path: (path / "manifest.json").unlink(),
          "another program's manifest": lambda path: (path / "manifest.json").write_text('[{"files": 1}]'),
          "a number as manifest": lambda path: (path / "manifest.json").write_text('{"content": 3, "checksum": 1}'),
          "an empty folder": lambda path: (shutil.rmtree(path), path.mkdir()),
          "a file in place of the folder": lambda path: (shutil.rmtree(path), path.write_text("x")),
          "a name of a later step": rename_to("00000009"), "a name of more digits": rename_to("000000100000")}


@pytest.fixture(scope="module")
def with_two_checkpoints(tmp_path_factory):
    """A folder with checkpoints of two files each, of steps 2 and 4 of 4."""
    if ON_HOPPER or not hasattr(os, "fork"):
        pytest.skip("a process that has used a GPU cannot be copied")
    folder = tmp_path_factory.mktemp("two")
    train_on(2, tiny_in(folder)("--fp8 none --accum 2 --eval_batches 2"), folder)
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_resume_falls_back_past_a_damaged_checkpoint_and_says_so(damage, with_two_checkpoints, tmp_path, no_sample,
                                                                 capsys):
    out = shutil.copytree(with_two_checkpoints / "out", tmp_path / "out")
    DAMAGE[damage](newest(out))
    damaged, older = train.checkpoints(out)
    assert run(["--device", "cpu", "--resume", "--out", str(out)])["steps"] == 4
    printed = capsys.readouterr().out
    assert f"note: {damaged} is damaged" in printed and f"resumed {older} at step 2" in printed
    assert f"note: {damaged} is now called {damaged.name}.damaged" in printed
    assert steps_in(out) == [4, 2] and damaged.with_suffix(".damaged").exists()


def test_a_checkpoint_may_be_damaged_twice(tiny, tmp_path, no_sample):
    run(tiny("--fp8 none"))
    for _ in range(2):
        flip(newest(tmp_path / "out") / "rank_0.pt", 0.5)
        assert train.main(tiny("--fp8 none --resume")) == 0
    assert steps_in(tmp_path / "out") == [4, 2]


def test_the_newest_checkpoint_is_that_of_the_highest_step_however_long_its_name(tmp_path):
    for name in ("step_00000009", "step_100000000", "step_99999999", "step_8", "step_00000010.tmp", "step_x"):
        (tmp_path / name).mkdir()
    assert steps_in(tmp_path) == [100_000_000, 99_999_999, 9, 8]


@pytest.mark.parametrize("options", ["--resume", "--eval-only", "--sample a"])
def test_where_no_checkpoint_is_whole_nothing_goes_on(options, tiny, tmp_path, no_sample, capsys):
    run(tiny("--fp8 none --steps 1"))
    capsys.readouterr()
    flip(newest(tmp_path / "out") / "rank_0.pt", 0.5)
    before = contents(tmp_path)
    assert train.main(tiny(f"--fp8 none {options}")) == 2
    assert "is whole: restore one from a copy" in capsys.readouterr().err and contents(tmp_path) == before


def reached(out):
    """Return the newest step in a folder, after looking at every checkpoint: what has the name of one is whole."""
    for path in train.checkpoints(out):
        only = out.with_name("only")
        only.mkdir()
        os.symlink(path, only / path.name)
        assert train.newest_checkpoint(only, ONE)["step"] == int(path.name[5:])
        shutil.rmtree(only)
    return max(steps_in(out), default=0)


@has_fork
@pytest.mark.parametrize("world, kills", [(1, 20), (2, 8)])
def test_kill_9_at_many_instants_loses_no_more_than_the_steps_since_the_last_checkpoint(world, kills, tiny, tmp_path):
    command, instants, steps = "--fp8 moss --steps 60 --eval_every 2 --accum 2 --eval_batches 2", random.Random(0), 0
    train_on(world, tiny(command, "whole"), tmp_path)
    for _ in range(kills):
        if steps == 60:   # a fast machine: once more from the start
            shutil.rmtree(tmp_path / "out")
            steps = 0
        port, job = free_port(), lambda: train.main(tiny(command + " --resume"))
        pids = [start_copy(job, rank if world > 1 else None, world, port) for rank in range(world)]
        time.sleep(instants.uniform(0.01, 0.25) + 0.5 * (world > 1))
        for pid in instants.sample(pids, world):   # either of them first; the other notices, or is killed too
            os.kill(pid, signal.SIGKILL)
            time.sleep(0.05 * (world > 1))
        for pid in pids:
            exit_code(pid)
        assert reached(tmp_path / "out") >= steps   # nothing that was saved is ever lost
        steps = reached(tmp_path / "out")
    train_on(world, tiny(command + " --resume"), tmp_path)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "out"))
    assert [record["step"] for record in read_log(tmp_path / "out")] == list(range(1, 61))


# ------------------------------------------------------------------------------------------------------------
# The folder of a run


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*") if path.name != ".lock"}


def test_a_second_run_in_the_same_folder_is_refused(tiny, tmp_path, no_sample, capsys):
    run(tiny("--fp8 none --steps 1"))
    with train.ExitStack() as files:
        train.lock(tmp_path / "out", files)
        before = contents(tmp_path)
        for more in ("", " --resume --steps 2"):
            assert train.main(tiny("--fp8 none --steps 1" + more)) == 2
            assert "is in use by another run" in capsys.readouterr().err
        assert contents(tmp_path) == before
    assert train.main(tiny("--fp8 none --steps 1")) == 0


def test_an_earlier_run_is_renamed_and_never_overwritten(tiny, tmp_path, no_sample):
    runs = []
    for seed in (1, 2, 3):
        run(tiny(f"--fp8 none --steps 1 --seed {seed}"))
        runs.append(weights(tmp_path / "out"))
    assert all(same(weights(tmp_path / name), run) for name, run in zip(("out.1", "out.2", "out"), runs))


def test_an_output_folder_that_is_a_link_stays_one(tiny, tmp_path, no_sample):
    (tmp_path / "large disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "large disk")
    for _ in range(2):
        run(tiny("--fp8 none --steps 1"))
    assert (tmp_path / "out").resolve() == tmp_path / "large disk" and (tmp_path / "large disk.1").is_dir()


@pytest.mark.parametrize("out, data", [(".", "text.txt"), ("..", "text.txt"), ("exp", "exp/data"), ("exp", "exp/*.bin"),
                                       ("exp", "exp")])
def test_an_output_folder_whose_renaming_would_take_other_things_along_is_refused(out, data, tiny, tmp_path,
                                                                                   monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert_refused([*tiny(), "--out", out, "--data", data], [f"--out {out} ", "folder of its own"], tmp_path, capsys)


# ------------------------------------------------------------------------------------------------------------
# Mistakes: exit code 2, one line that says what, why and what to do. An earlier run stays where it is


def assert_refused(command, words, folder, capsys):
    before = contents(folder)
    assert train.main(command) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    for word in words:
        assert word in lines[0], lines
    assert contents(folder) == before


@pytest.fixture
def earlier(tiny, no_sample, capsys):
    """The folder of an earlier run, in which the next one is to begin."""
    run(tiny("--fp8 none --steps 1"))
    capsys.readouterr()


def write_tokens(path, tokens, dtype=np.uint16):
    np.asarray(tokens, dtype).tofile(path)


def write_shard(path, tokens, magic=20240520, version=1, count=None):
    """Write llm.c's format: 256 int32, of which three are used, then the tokens."""
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, np.uint16).tobytes())


def write_truncated(path):
    np.save(path, np.zeros(1000, np.uint16))
    path.write_bytes(path.read_bytes()[:500])


def write_two_kinds(path):
    path.mkdir()
    for dtype in (np.uint16, np.int32):
        np.save(path / f"{dtype.__name__}.npy", np.zeros(999, dtype))


BAD_DATA = {   # name of the file: (how it is made, what the line says)
    "nowhere": (lambda p: None, ["nowhere", "does not exist", "give a folder, a file or a pattern"]),
    "empty.txt": (lambda p: p.touch(), ["empty.txt", "holds no tokens", "are read"]),
    "empty_folder": (lambda p: p.mkdir(), ["empty_folder", "holds no tokens", "are read"]),
    "short.txt": (lambda p: p.write_text("ten bytes."), ["has 9 tokens", "--seq 16", "give more data"]),
    "no_val.txt": (lambda p: p.write_text("x" * 100), ["has 5 tokens", "--seq 16", "give more data"]),
    "big_id.bin": (lambda p: write_tokens(p, [3, 256] * 500), ["token id 256", "big_id.bin", "256", "--model nano"]),
    "negative.npy": (lambda p: np.save(p, np.full(999, -7)), ["token id -7", "negative.npy", "--model nano"]),
    "odd.bin": (lambda p: p.write_bytes(b"x" * 1001), ["odd.bin", "1001 bytes", "uint16 tokens are read"]),
    "old.bin": (lambda p: write_shard(p, [1] * 999, version=7), ["old.bin", "20240520        7", "version 1"]),
    "cut.bin": (lambda p: write_shard(p, [1] * 999, count=1000), ["cut.bin", "3022 bytes", "1000", "copy it again"]),
    "header.bin": (lambda p: write_tokens(p, [20240520], np.int32), ["header.bin", "4 bytes", "whole shards"]),
    "matrix.npy": (lambda p: np.save(p, np.zeros((9, 9), np.uint16)), ["matrix.npy", "(9, 9)", "one-dimensional"]),
    "packed.npz": (lambda p: np.savez(p, np.zeros(999, np.uint16)), ["packed.npz", "holds no tokens", "zero bytes"]),
    "float.npy": (lambda p: np.save(p, np.zeros(999, np.float32)), ["float.npy", "float32", "integers"]),
    "garbage.npy": (lambda p: p.write_bytes(b"garbage" * 99), ["garbage.npy", "no .npy file", "numpy.save"]),
    "empty.npy": (lambda p: p.touch(), ["empty.npy", "no .npy file", "numpy.save"]),
    "cut.npy": (write_truncated, ["cut.npy", "no .npy file", "numpy.save"]),
    "renamed.npy": (lambda p: np.savez(p.open("wb"), np.zeros(999)), ["renamed.npy", "no .npy file", "numpy.save"]),
    "header.npy": (lambda p: p.write_bytes(b"\x93NUMPY\x01\x00\x10\x00{'descr': (((((\n"), ["header.npy", "no .npy"]),
    "two_kinds": (write_two_kinds, ["int32 and uint16", "one kind per folder"]),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_refused(name, tiny, tmp_path, earlier, capsys):
    make, words = BAD_DATA[name]
    make(tmp_path / name)
    assert_refused([*tiny(), "--data", str(tmp_path / name)], words, tmp_path, capsys)


HUGE = 2**63
BAD_OPTIONS = {   # options: what the line says
    "--model gpt5": ["--model gpt5", "unknown", "nano, 124m"],
    "--fp8 e3m4": ["--fp8 e3m4", "unknown", "none, tensor, group, mx, moss"],
    "--bench --fp8 none,e3m4": ["--fp8 e3m4", "unknown"],
    "--fp8 none,moss": ["--fp8 none,moss", "unknown"],   # several only to --bench and --eval-only
    "--fp8 none,moss --sample a": ["--fp8 none,moss", "unknown"],
    "--fp8 none,e3m4 --eval-only": ["--fp8 e3m4", "unknown: choose one of none, "],
    "--recompute all": ["--recompute all", "none, block"],
    "--recompute act": ["--recompute act", "none, block"],
    "--bench --shard": ["--shard is for recipes that predict", "none"],
    "--fp8 tensor --shard": ["--shard is for recipes that predict", "tensor"],
    "--device tpu": ["--device tpu", "no device", "use cpu"],
    "--device cuda:99": ["--device cuda:99", "GPU 99", "use --device cpu"],
    "--device cuda:٣": ["--device cuda:٣", "no device", "use cpu"],
    "--device meta": ["--device meta", "not supported", "use cpu"],
    "--batch 1 --seq 24": ["--batch 1", "--seq 24", "24 tokens", "multiple of 16", "change --batch or --seq"],
    "--fp8 moss --beta1 0.95 --beta2 0.9": ["0.95", "0.9", "bound"],   # autoscale.py has no bound for these
    "--sample ² --out nothing": ["no checkpoint in nothing", "check --out"],
    "--eval-only --out nothing": ["no checkpoint in nothing", "check --out"],
    "--tensorboard text.txt": ["--tensorboard text.txt cannot be written", "choose another"],
    "--tensorboard text.txt/board": ["--tensorboard text.txt/board cannot be written", "choose another"],
    "--out text.txt": ["--out text.txt cannot be written", "choose another"],
    "--out text.txt/out": ["--out text.txt/out cannot be written", "choose another"],
    f"--out {'x' * 300}": ["--out xxx", "File name too long"],
    f"--batch {2**20} --seq 1024": ["--batch 1048576", "is more than any machine holds", "lower --batch"],
    **{f"--{name} {value}": [f"--{name} ", "must lie between 1 and"] for value in (0, -3, HUGE, 10**25) for name in
       ("layers", "steps", "batch", "accum", "seq", "log_every", "eval_every", "eval_batches", "max_skips", "keep")},
    **{f"--{name} {value}": [f"--{name} {float(value) if '.' in value or value in ('nan', 'inf') else value}",
                             "must lie between"] for name, value in
       [("warmup", "-1"), ("warmup", str(HUGE)), ("rescale_interval", "-1"), ("rescale_interval", str(HUGE)),
        ("weight_decay", "-0.1"), ("weight_decay", "nan"), ("weight_decay", "1e300"), ("lr", "0.0"), ("lr", "-0.001"),
        ("lr", "nan"), ("lr", "inf"), ("lr", "1e300"), ("lr", "1e-300"), ("clip", "0.0"), ("clip", "1e300"),
        ("clip", "nan"), ("beta1", "1.0"), ("beta2", "-0.5"), ("beta1", "nan"), ("spike", "-1.0"), ("spike", "nan"),
        ("seed", "-1"), ("seed", str(HUGE))] if "e" not in value},
    **{f"--{name} {value}": [f"--{name} ", "must lie between"] for name, value in
       [("lr", "1e300"), ("lr", "1e-300"), ("weight_decay", "1e300"), ("clip", "1e300")]},
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_an_option_that_cannot_work_is_refused(options, tiny, tmp_path, earlier, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert_refused(tiny(options), BAD_OPTIONS[options], tmp_path, capsys)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(train.Config) if f.type is str])
def test_an_empty_value_is_refused(name, tiny, tmp_path, earlier, capsys):
    assert_refused([*tiny(), f"--{name}", ""], [f"--{name} is empty: give it a value, or leave it out"], tmp_path, capsys)


@pytest.mark.parametrize("options", ["--learning_rate 1", "--step 5", "--steps many", "--steps 1.5", "--steps"] + [
    f"{a} {b}" for a, b in itertools.combinations(["--resume", "--eval-only", "--sample a", "--plot a.png", "--bench"], 2)])
def test_unknown_and_malformed_options_and_several_modes_are_refused(options, tiny, tmp_path, earlier, capsys):
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train.main(tiny(options))
    assert stop.value.code == 2 and contents(tmp_path) == before
    assert options.split()[0].replace("-only", "_only") in capsys.readouterr().err.splitlines()[-1]


def test_options_are_spelled_with_underscores_or_dashes():
    assert train.parse_config(["--max_skips", "3"]) == train.parse_config(["--max-skips", "3"])


def test_a_preset_that_a_recipe_cannot_tile_is_refused_by_layer(tiny, tmp_path, monkeypatch, earlier, capsys):
    monkeypatch.setitem(train.PRESETS, "nano", dataclasses.replace(PRESETS["nano"], ffn=40))
    assert_refused(tiny("--fp8 moss"), ["blocks.0.down", "40", "--fp8 none"], tmp_path, capsys)


# ------------------------------------------------------------------------------------------------------------
# Data formats


def all_of(tokens):
    return tokens.read(0, len(tokens)).tolist() if len(tokens) else []


def names_of(tokens):
    return [path.name for path, _, _ in tokens.files]


def test_nanogpt_files_are_uint16_and_val_bin_is_the_validation_data(tmp_path):
    write_tokens(tmp_path / "train.bin", range(1000))
    write_tokens(tmp_path / "val.bin", range(50000, 50100))
    training, validation, vocab = train.open_data(str(tmp_path))
    assert all_of(training) == list(range(1000))
    assert all_of(validation) == list(range(50000, 50100))
    assert vocab is None   # the file does not say: the preset does


def test_llm_c_shards_are_read_behind_their_header(tmp_path):
    write_shard(tmp_path / "corpus_val_000000.bin", range(100))
    write_shard(tmp_path / "corpus_train_000001.bin", range(1000, 2000))
    write_shard(tmp_path / "corpus_train_000002.bin", range(2000, 3000))
    training, validation, _ = train.open_data(str(tmp_path))
    assert all_of(training) == list(range(1000, 3000)) and all_of(validation) == list(range(100))


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64", ">u2"])
def test_npy_files_may_hold_any_integers(dtype, tmp_path):
    np.save(tmp_path / "tokens.npy", np.arange(1000).astype(dtype))
    training, validation, _ = train.open_data(str(tmp_path / "tokens.npy"))
    assert all_of(training) == list(range(950)) and all_of(validation) == list(range(950, 1000))


def test_npy_and_bin_files_of_one_kind_are_read_together(tmp_path):
    np.save(tmp_path / "train.npy", np.zeros(999, np.uint16))
    write_tokens(tmp_path / "val.bin", [1] * 99)
    write_shard(tmp_path / "b.bin", [2] * 9)
    training, validation, _ = train.open_data(str(tmp_path))
    assert all_of(training) == [2] * 9 + [0] * 999 and all_of(validation) == [1] * 99


def test_a_text_file_is_its_bytes_and_its_end_the_validation_data(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    training, validation, vocab = train.open_data(str(tmp_path / "text.txt"))
    assert bytes(all_of(training)) + bytes(all_of(validation)) == TEXT.encode()
    assert len(validation) == len(TEXT) // 20 and vocab == 256


def write_texts(folder, count):
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:03}.txt").write_text(f"file {i}. " * (i + 1))


def test_a_few_text_files_are_split_by_position(tmp_path):
    write_texts(tmp_path / "few", 39)
    training, validation, _ = train.open_data(str(tmp_path / "few"))
    everything = b"".join((tmp_path / "few" / f"{i:03}.txt").read_bytes() for i in range(39))
    assert bytes(all_of(training)) + bytes(all_of(validation)) == everything
    assert 0.05 * len(everything) <= len(validation) < 0.05 * len(everything) + 1


def test_many_text_files_are_split_by_file_the_same_way_wherever_they_lie(tmp_path):
    write_texts(tmp_path / "many", 200)
    write_texts(tmp_path / "copy", 200)
    splits = [[set(names_of(tokens)) for tokens in train.open_data(str(tmp_path / name))[:2]]
              for name in ("many", "many", "copy")]
    assert splits[0] == splits[1] == splits[2]
    training, validation = splits[0]
    assert not training & validation and len(training | validation) == 200
    assert 2 <= len(validation) <= 20   # a twentieth of 200 is 10; by a checksum, so give or take 3 deviations


@pytest.mark.parametrize("name", ["val", "valid", "validation", "VAL", "Valid", "Validation"])
def test_files_named_after_validation_are_the_validation_data(name, tmp_path):
    for kind in ("text", "tokens"):
        (tmp_path / kind).mkdir()
    for training, held_out in (("train.txt", f"{name}.txt"), ("interval.txt", name)):
        (tmp_path / "text" / training).write_text("a" * 1000)
        (tmp_path / "text" / held_out).write_text("b" * 500)
    for i, path in enumerate(("train.bin", "retrieval.bin", f"{name}.bin", f"shard_{name}_0.bin", f"{name}/x.bin")):
        (tmp_path / "tokens" / path).parent.mkdir(exist_ok=True)
        write_tokens(tmp_path / "tokens" / path, [i] * 100)
    for kind, expected in (("text", [ord("b")]), ("tokens", [2, 3, 4])):
        training, validation, _ = train.open_data(str(tmp_path / kind))
        assert sorted(set(all_of(validation))) == expected and not set(all_of(training)) & set(expected)


def test_names_of_validation_data_mean_the_same_in_a_pattern_as_in_a_folder(tmp_path):
    for folder, value in (("train", 1), ("val", 2)):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "a.npy", np.full(100, value, np.int32))
        (tmp_path / folder / "validation.txt").write_text(folder * 100)   # not at the top: like other text
    for pattern in ("", "*/*.npy", "**/*.npy"):
        assert all_of(train.open_data(str(tmp_path / pattern))[1]) == [2] * 100
    train_tokens, val_tokens, _ = train.open_data(str(tmp_path / "**/*.txt"))
    assert len(val_tokens) == 40 and len(train_tokens) == 760   # the last twentieth


def test_binary_hidden_and_cached_files_are_no_text(tmp_path):
    write_texts(tmp_path / "folder", 2)
    for name in (".git/config", "__pycache__/a.txt", "picture.png", ".hidden.txt"):
        path = tmp_path / "folder" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\0" * 100 if name == "picture.png" else b"x" * 100)
    training, validation, _ = train.open_data(str(tmp_path / "folder"))
    assert {*names_of(training), *names_of(validation)} == {"000.txt", "001.txt"}


@pytest.mark.parametrize("pattern", ["", "/**"])
def test_what_a_run_writes_among_the_data_is_none_of_them(pattern, tiny, tmp_path, no_sample):
    (tmp_path / "step_1.txt").write_text(TEXT)   # no name that a run gives
    (tmp_path / "text.txt").write_text(TEXT)
    run(tiny("--fp8 none --steps 1"))
    (tmp_path / "out" / "step_00000006.damaged").mkdir()
    (tmp_path / "out" / "step_00000006.damaged" / "manifest.json").write_text(TEXT)
    assert sum(map(len, train.open_data(str(tmp_path) + pattern)[:2])) == 2 * len(TEXT)


def test_a_pattern_names_data_files(tmp_path):
    for i in range(3):
        np.save(tmp_path / f"part{i}.npy", np.full(100, i, np.int32))
    np.save(tmp_path / "other.npy", np.full(100, 9, np.int32))
    training, validation, _ = train.open_data(str(tmp_path / "part*.npy"))
    assert len(training) + len(validation) == 300 and set(training.read(0, 285)) == {0, 1, 2}


@pytest.mark.parametrize("data", ["a[1]", "a[1]/t[2].npy"])
def test_a_name_that_looks_like_a_pattern_is_read(data, tmp_path):
    (tmp_path / "a[1]").mkdir()
    np.save(tmp_path / "a[1]" / "t[2].npy", np.arange(100, dtype=np.int32))
    training, validation, _ = train.open_data(str(tmp_path / data))
    assert len(training) + len(validation) == 100


@pytest.mark.parametrize("pattern", ["d", "d/**/*.txt", "d/**", "d/*/*.txt"])
def test_a_file_behind_links_counts_once_and_no_validation_data_are_copies_of_training_data(pattern, tmp_path):
    (tmp_path / "elsewhere").mkdir(), (tmp_path / "d" / "a").mkdir(parents=True)
    (tmp_path / "elsewhere" / "b.txt").write_text("b" * 1000)
    (tmp_path / "d" / "a" / "a.txt").write_text("a" * 1000)
    (tmp_path / "d" / "a" / "loop").symlink_to(tmp_path / "d")
    (tmp_path / "d" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "d" / "again").symlink_to(tmp_path / "elsewhere")
    training, validation, _ = train.open_data(str(tmp_path / pattern))
    assert sorted(all_of(training) + all_of(validation)) == [ord("a")] * 1000 + [ord("b")] * 1000


@pytest.mark.parametrize("pattern", ["", "**/*.txt", "**", "*/*.txt"])
def test_a_folder_that_cannot_be_read_is_an_error(pattern, tiny, tmp_path, monkeypatch, earlier, capsys):
    for name in ("open", "locked"):
        (tmp_path / "d" / name).mkdir(parents=True)
        (tmp_path / "d" / name / "a.txt").write_text(TEXT)
    scandir = os.scandir

    def locked(path="."):
        if "locked" in os.fspath(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)
    with monkeypatch.context() as patch:   # file permissions do not bind root
        patch.setattr(os, "scandir", locked)
        assert train.main([*tiny(), "--data", str(tmp_path / "d" / pattern)]) == 2
    assert f"{tmp_path / 'd' / 'locked'} cannot be read (Permission denied)" in capsys.readouterr().err
    assert steps_in(tmp_path / "out") == [1]


def test_a_file_name_that_is_no_utf8_is_only_a_name(tiny, tmp_path, no_sample):
    folder = os.fsencode(tmp_path / "data")
    os.mkdir(folder)
    try:
        for name in [b"%d.txt" % i for i in range(40)] + [b"caf\xe9.txt"]:
            with open(os.path.join(folder, name), "w") as f:
                f.write("hello\n" * 99)
    except OSError:
        pytest.skip("a file system that takes UTF-8 alone")
    assert train.main([*tiny("--fp8 none --steps 1"), "--data", str(tmp_path / "data")]) == 0
    assert train.main([*tiny("--fp8 none --steps 1"), "--data", os.fsdecode(folder + b"/caf\xe9.txt")]) == 0


def test_read_across_files_is_a_slice_of_their_concatenation(tmp_path):
    pieces, start = [], 0
    for size in (5, 0, 1, 7, 3):   # an empty file, and windows that span three
        pieces.append((np.arange(start, start + size, dtype=np.uint16), tmp_path / f"{len(pieces)}.bin"))
        write_tokens(pieces[-1][1], pieces[-1][0])
        start += size
    files, everything = [(path, 0, len(piece)) for piece, path in pieces], np.concatenate([p for p, _ in pieces])
    whole, inner = train.Tokens(files, np.uint16), train.Tokens(files, np.uint16, 3, 10)
    assert (len(whole), len(inner)) == (16, 10)
    for first in range(16):
        for count in range(1, 17 - first):
            window = whole.read(first, count)
            assert window.dtype == np.int64 and np.array_equal(window, everything[first:first + count])
    assert np.array_equal(inner.read(1, 9), everything[4:13])


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
    assert 0.02 < len(validation) / (len(training) + len(validation)) < 0.1   # a twentieth of the files, not of bytes


def test_a_run_on_token_files_ends_with_a_sample_however_short_the_sequence(tiny, tmp_path):
    write_tokens(tmp_path / "train.bin", [1, 2, 3, 4] * 50)
    write_tokens(tmp_path / "val.bin", [1, 2, 3, 4] * 3)
    assert run(tiny(f"--data {tmp_path} --fp8 none --seq 8 --steps 1"))["steps"] == 1


# ------------------------------------------------------------------------------------------------------------
# Loss and gradients that are not finite

POISONED = "blocks.0.down"


@pytest.mark.parametrize("recipe", ["none", "moss"])
def test_a_step_with_a_nan_gradient_is_skipped_and_counted(recipe, tiny, monkeypatch, no_sample):
    save, states = record_states(monkeypatch), []
    update = train.forward_backward
    poison_gradient(monkeypatch, f"{POISONED}.weight", {2})
    monkeypatch.setattr(train, "forward_backward", lambda net, *a, **k: (
        states.append(copy.deepcopy(net.state_dict())), update(net, *a, **k))[1])
    summary = run(tiny(f"--fp8 {recipe} --eval_every 1"))
    assert [same(a, b) for a, b in itertools.pairwise(states)] == [False, False, True]
    assert [(state["step"], state["updates"], state["skipped"]) for state in save] == [(1, 1, 0), (2, 2, 0), (4, 3, 1)]
    assert summary["skipped_steps"] == 1


def test_an_infinite_loss_is_skipped_too(tiny, monkeypatch, no_sample):
    original, calls = Transformer.forward, itertools.count()

    def forward(self, tokens, targets=None):   # call 0 is the evaluation before the first step
        return original(self, tokens, targets) * (math.inf if next(calls) == 1 else 1)
    monkeypatch.setattr(Transformer, "forward", forward)
    states = record_states(monkeypatch)
    assert run(tiny("--fp8 none"))["skipped_steps"] == 1
    assert all(kept["weight"].isfinite().all() for kept in states[-1]["parameters"].values())


def test_a_gradient_out_of_all_proportion_is_skipped(tiny, monkeypatch, no_sample):
    steps, original = itertools.count(), train.forward_backward

    def spy(net, *arguments, **options):
        loss = original(net, *arguments, **options)
        if next(steps) == 25:
            for p in net.parameters():
                p.grad *= 1e4
        return loss
    monkeypatch.setattr(train, "forward_backward", spy)
    states = record_states(monkeypatch)
    assert run(tiny("--fp8 none --steps 28 --eval_every 1"))["skipped_steps"] == 1
    assert [state["step"] for state in states] == [*range(1, 26), 27, 28]


def test_skips_that_are_not_in_a_row_do_not_stop_the_run(tiny, monkeypatch, no_sample):
    poison_gradient(monkeypatch, f"{POISONED}.weight", {0, 1, 3, 4})
    assert run(tiny("--fp8 none --steps 6 --max_skips 3"))["skipped_steps"] == 4


def assert_stops(command, words, capsys):
    """Exit code 1 and one line on stderr."""
    assert train.main(command) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: 3 steps in a row had to be skipped"), lines
    for word in words:
        assert word in lines[0]


def test_a_run_whose_outputs_stay_nan_stops_and_names_the_layer(tiny, monkeypatch, capsys):
    on_model(monkeypatch, lambda net: net.blocks[0].down.register_forward_hook(lambda _, __, y: y * math.nan))
    assert_stops(tiny("--fp8 mx --max_skips 3"), [f"the output of {POISONED}", "nothing was saved yet"], capsys)


def test_a_run_whose_gradients_stay_nan_names_the_layer_and_its_last_good_checkpoint(tiny, tmp_path, monkeypatch,
                                                                                     capsys):
    poison_gradient(monkeypatch, f"{POISONED}.weight", range(2, 10**6))
    assert_stops(tiny("--fp8 none --steps 9 --max_skips 3 --eval_every 2"),
                 [f"the gradient of {POISONED}.weight", f"{tmp_path / 'out' / 'step_00000002'} is the last good"], capsys)
    assert all(weight.isfinite().all() for weight in weights(tmp_path / "out").values())


def poisoned_model(recipe, weight_value):
    """Return nano with one value of a weight replaced, and a batch for it."""
    torch.manual_seed(0)
    net = Transformer(dataclasses.replace(PRESETS["nano"], seq=16, layers=2), recipe)
    layer = dict(net.named_modules())["blocks.1.down"]
    with torch.no_grad():
        layer.weight[3, 5] = layer.weight[3, 5] if weight_value is None else weight_value
    c = config(fp8=recipe)
    train.requantize(net, train.make_scales(net, train.make_optimizer(net, c), c))
    return net, torch.randint(256, (2, 16)), torch.randint(256, (2, 16))


@for_recipes
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_first_layer_whose_output_is_not_finite_is_found(recipe, value):
    assert train.first_non_finite(*poisoned_model(recipe, value)) == "the output of blocks.1.down"


def test_the_first_layer_is_found_in_a_compiled_model_too():
    torch._dynamo.reset()
    net, tokens, targets = poisoned_model("none", None)
    net.compile(backend="aot_eager", dynamic=False)
    with torch.no_grad():
        net(tokens, targets)   # now there is a graph that knows no hooks
        dict(net.named_modules())["blocks.1.down"].weight[3, 5] = math.nan
    assert train.first_non_finite(net, tokens, targets) == "the output of blocks.1.down"


@pytest.mark.parametrize("recipe", ["none", "moss"])
def test_a_gradient_that_alone_is_not_finite_is_found(recipe):
    net, tokens, targets = poisoned_model(recipe, None)
    net(tokens, targets).backward()
    assert train.first_non_finite(net, tokens, targets) == "the loss or the norm of the gradient"   # all is finite
    dict(net.named_modules())["blocks.1.down"].weight.grad[0, 0] = math.nan
    assert train.first_non_finite(net, tokens, targets) == "the gradient of blocks.1.down.weight"


# ------------------------------------------------------------------------------------------------------------
# The log, the schedule, evaluations


def test_the_log_has_a_json_object_per_line(tiny, tmp_path, monkeypatch, no_sample):
    poison_gradient(monkeypatch, f"{POISONED}.weight", {1})   # JSON does not know NaN and Infinity
    summary = run(tiny("--fp8 none --steps 6 --log_every 2 --eval_every 3 --seed 7"))
    records = [json.loads(line, parse_constant=pytest.fail) for line in
               (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 3, 4, 6]
    assert [record["step"] for record in records if "val_loss" in record] == [3, 6]
    for record in records:
        assert {"step", "loss", "lr", "grad_norm", "tokens_per_s", "skipped"} <= record.keys()
    first, *others = records   # what was run on what
    assert first["config"]["seed"] == 7 and first["config"]["model"] == "nano" and first["command"]
    assert first["torch"] == torch.__version__ and first["hardware"] == f"1 x {os.cpu_count()} CPU cores"
    assert not any("config" in record for record in others)
    assert summary["train_loss"] == round(others[-1]["loss"], 4)
    assert summary["val_loss"] == round(others[-1]["val_loss"], 4)
    assert summary["tokens"] == 6 * 2 * 16   # steps x sequences x tokens


def test_the_log_shows_how_healthy_the_scales_of_moss_are(tiny, tmp_path, no_sample):
    run(tiny("--fp8 moss --steps 6 --rescale_interval 4"))
    for record in read_log(tmp_path / "out"):
        assert record["scale_ratio"] >= record["scale_ratio_min"] >= 1   # no weight outgrows its predicted scale
        assert record["saturated"] == record["saturated_grad"] == 0      # rule "up": nothing is cut off
        assert 0 <= record["folded"] < 0.05                              # measured 0.0003 to 0.001
        assert 0 <= record["folded_grad"] < 0.2 and 0 <= record["folded_wgrad"] < 0.2


@for_recipes
def test_each_recipe_logs_what_it_can_lose(recipe, tiny, tmp_path, no_sample):
    run(tiny(f"--fp8 {recipe} --steps 1"))
    fold = {"folded", "folded_grad", "folded_wgrad"} if recipe == "moss" else set()
    saturated = {"saturated", "saturated_grad"} if recipe != "none" else set()
    shown = {key for key in read_log(tmp_path / "out")[0] if key.startswith(("folded", "saturated"))}
    assert shown == fold | saturated


def test_one_micro_batch_of_a_step_that_is_logged_is_watched_and_no_evaluation(tiny, monkeypatch, no_sample):
    watched, original = [], model.fold_loss
    monkeypatch.setattr(model, "fold_loss", lambda *arguments: watched.append(1) or original(*arguments))
    run(tiny("--fp8 moss --accum 3 --steps 4 --log_every 2 --eval_every 1"))
    assert len(watched) == 2 * LAYERS * 2   # two steps, X and dY


def test_the_scales_of_moss_are_exact_after_a_true_rescale(tiny, tmp_path, no_sample):
    run(tiny("--fp8 moss --steps 6 --rescale_interval 4"))
    ratio = {record["step"]: record["scale_ratio"] for record in read_log(tmp_path / "out")}
    assert ratio[1] == ratio[5] == 1   # seen before the update of the step: of steps 0 and 4
    assert ratio[4] > ratio[3] > ratio[2] > 1


def test_the_learning_rate_warms_up_to_its_peak_and_falls_along_a_cosine_to_a_tenth():
    c = config(steps=110, warmup=10, lr=2.0)
    rates = [train.learning_rate(step, c) for step in range(111)]
    assert rates[0] == pytest.approx(2 / 11)   # warm-up begins above zero: no step is wasted
    assert np.diff(rates[:11]) == pytest.approx(2 / 11)
    assert rates[10] == max(rates) == 2.0
    assert rates[60] == pytest.approx((2.0 + 0.2) / 2)
    assert all(np.diff(rates[10:]) < 0)
    assert rates[110] == pytest.approx(0.2)
    assert train.learning_rate(0, config(steps=100, warmup=0, lr=2.0)) == 2.0


def test_the_optimizer_gets_the_scheduled_learning_rate(tiny, tmp_path, monkeypatch, no_sample):
    command, used, original = tiny("--fp8 none --steps 6 --warmup 2"), [], train.update_weights

    def spy(optimizer, *arguments):
        used.append({group["lr"] for group in optimizer.param_groups})
        original(optimizer, *arguments)
    monkeypatch.setattr(train, "update_weights", spy)
    run(command)
    c = train.resolve(train.parse_config(command), CPU, 1)
    assert [record["lr"] for record in read_log(tmp_path / "out")] == [train.learning_rate(i, c) for i in range(6)]
    assert used == [{train.learning_rate(i, c)} for i in range(6)]


def test_weight_decay_spares_the_norms():
    net = Transformer(PRESETS["nano"], "none")
    *decayed, spared = train.make_optimizer(net, config(weight_decay=0.3)).param_groups
    assert {group["weight_decay"] for group in decayed} == {0.3} and spared["weight_decay"] == 0.0
    assert {id(p) for p in spared["params"]} == {id(p) for name, p in net.named_parameters() if "norm" in name}
    assert sum(len(group["params"]) for group in (*decayed, spared)) == len(list(net.parameters()))


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r != "none"])
def test_weights_are_quantized_once_per_optimizer_step(recipe, tiny, monkeypatch, no_sample):
    calls, original = [], model.quantize_weight
    monkeypatch.setattr(model, "quantize_weight", lambda *a: calls.append(0) or original(*a))
    run(tiny(f"--fp8 {recipe} --steps 3 --accum 4"))
    assert len(calls) == (1 + 3) * LAYERS   # at the start, and after each step; not per micro-batch or evaluation


@pytest.mark.parametrize("recipe", ["none", "moss"])
def test_an_evaluation_gives_the_same_number_twice(recipe):
    net = poisoned_model(recipe, None)[0]
    batches = own_source(fp8=recipe, eval_batches=3)
    random_state = torch.get_rng_state()
    assert train.evaluate(net, batches, ONE) == train.evaluate(net, batches, ONE)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_evaluating_and_watching_more_often_changes_no_weight(tiny, tmp_path, no_sample):
    for every in (1, 4):
        run(tiny(f"--fp8 moss --eval_every {every} --log_every {every}", f"every {every}"))
    assert same(weights(tmp_path / "every 1"), weights(tmp_path / "every 4"))


# ------------------------------------------------------------------------------------------------------------
# The command line, and what there is besides training


def test_help_shows_every_option_with_its_help_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    shown = "".join(capsys.readouterr().out.split())   # argparse breaks lines, also at hyphens
    for field in dataclasses.fields(train.Config):
        assert f"--{field.name}" in shown
        assert "".join(field.metadata["help"].split()) in shown, field.name
        if field.default is not None and field.default is not False:
            assert f"(default:{field.default})" in shown


def test_every_preset_has_defaults_that_every_recipe_can_run():
    assert train.DEFAULTS.keys() == PRESETS.keys()
    for preset, recipe in itertools.product(PRESETS, RECIPES):
        c = train.resolve(train.Config(model=preset, fp8=recipe), CPU, 1)
        assert None not in [getattr(c, name) for name in ("steps", "batch", "accum", "seq", "lr", "warmup")]


def test_the_resolved_configuration_is_printed_and_saved(tiny, tmp_path, no_sample, capsys):
    run(tiny("--fp8 none --steps 2"))
    printed, saved = capsys.readouterr().out, checkpoint(tmp_path / "out")["config"]
    assert saved.keys() == {field.name for field in dataclasses.fields(train.Config)}
    for name, value in saved.items():
        assert f"{name}={value}" in printed
    assert saved["lr"] == train.DEFAULTS["nano"]["lr"]   # not given above


BENCH = "--bench --device cpu --model nano --layers 1 --seq 16 --batch 2 --steps 2".split()


def test_bench_prints_a_row_for_every_recipe_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(BENCH) == 0
    rows = capsys.readouterr().out.splitlines()[-len(RECIPES):]
    assert [row.split()[0] for row in rows] == list(RECIPES) and list(tmp_path.iterdir()) == []


def test_bench_counts_the_tokens_of_all_micro_batches_and_one_optimizer_step():
    c = train.resolve(train.parse_config([*BENCH, "--accum", "3", "--fp8", "moss,none"]), CPU, 1)
    rows = train.bench(c, CPU)
    for row in rows.values():
        seconds = (3 * row["fwd+bwd ms"] + row["optimizer ms"]) / 1e3
        assert row["tokens/s"] == pytest.approx(3 * 2 * 16 / seconds)
    assert math.isnan(rows["moss"]["x none"]) and rows["none"]["x none"] == 1   # BF16 was not timed before moss


def test_eval_only_reports_the_loss_that_the_run_ended_with_and_its_perplexity(tiny, tmp_path, no_sample, capsys):
    loss, before = run(tiny("--fp8 moss"))["val_loss"], contents(tmp_path)
    capsys.readouterr()
    assert train.main(tiny("--eval-only")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and f"step 4, validation loss {loss:.4f}, perplexity " in lines[0]
    perplexity = float(lines[0].split("perplexity ")[1].split(",")[0])
    assert perplexity == pytest.approx(math.exp(loss), rel=2e-4)   # the summary rounds the loss to 4 digits
    assert contents(tmp_path) == before


@has_fork
def test_ranks_share_an_evaluation_and_rank_0_reports_it(tiny, tmp_path, no_sample, capsys):
    run(tiny("--fp8 none --eval_batches 4"))
    capsys.readouterr()
    command = ["--device", "cpu", "--eval-only", "--out", str(tmp_path / "out")]
    assert train.main(command) == 0
    alone, (codes, printed) = capsys.readouterr().out, on_ranks(2, lambda rank: train.main(command), tmp_path)
    assert codes == [0, 0] and printed == [alone, ""]


def test_a_perplexity_beyond_all_numbers_is_inf(tiny, monkeypatch, no_sample, capsys):
    run(tiny("--fp8 none"))
    monkeypatch.setattr(train, "evaluate", lambda *_: 1e4)
    assert train.main(tiny("--fp8 none --eval-only")) == 0 and "perplexity inf" in capsys.readouterr().out


def test_a_run_is_evaluated_from_within_its_folder(tiny, tmp_path, monkeypatch, no_sample):
    run(tiny("--fp8 none"))
    monkeypatch.chdir(tmp_path / "out")
    assert train.main(["--device", "cpu", "--eval-only", "--out", "."]) == 0


def test_recipes_are_compared_at_the_weights_of_a_checkpoint(tiny, tmp_path, no_sample, capsys):
    run(tiny("--fp8 moss --steps 8 --eval_batches 3"))
    before = contents(tmp_path)
    losses = {}
    for recipe in RECIPES:
        capsys.readouterr()
        assert train.main(tiny(f"--fp8 {recipe} --eval-only --steps 8 --eval_batches 3")) == 0
        losses[recipe] = capsys.readouterr().out.split("validation loss ")[1].split(",")[0]
    assert train.main(tiny(f"--fp8 {','.join(RECIPES)} --eval-only --eval_batches 3")) == 0
    rows = capsys.readouterr().out.splitlines()[-len(RECIPES):]
    for recipe, row in zip(RECIPES, rows, strict=True):
        _, name, _, loss, _, error, _ = row.split()
        assert (name, loss) == (recipe, losses[recipe])
        # Every one of some six roundings on the way, to 3 or (tensor) 2 bits, is wrong by 2.6% or 5% of the value.
        assert error == "0.00%" if recipe == "none" else 0.5 < float(error.rstrip("%")) < 20
    assert contents(tmp_path) == before


def test_a_comparison_of_recipes_is_for_one_process(tiny, monkeypatch, no_sample, capsys):
    run(tiny("--fp8 none"))
    monkeypatch.setattr(train, "start_ranks", lambda _: train.Ranks(0, 2, CPU))
    assert train.main(tiny("--fp8 none,moss --eval-only")) == 2
    assert "2 ranks cannot share it, run it without torchrun" in capsys.readouterr().err


def test_sample_goes_on_with_a_text(tiny, capsys):
    run(tiny("--fp8 none"))
    capsys.readouterr()
    assert train.main([*tiny("--fp8 none"), "--sample", "the quick"]) == 0
    written = capsys.readouterr().out
    assert "the quick" in written and len(written.encode()) >= len("the quick") + 200
    assert train.main([*tiny("--fp8 none"), "--sample", "\udcff"]) == 0   # how Python takes a byte that is no text


@pytest.mark.parametrize("prompt", ["²", "٣", "1_0", "-1", "256", "9" * 5000, "one", " ", "1 2 3.0"])
def test_sample_takes_token_ids_of_the_model_alone(prompt, tiny, tmp_path, no_sample, monkeypatch, capsys):
    np.save(tmp_path / "t.npy", np.arange(999) % 200)
    run(tiny(f"--fp8 none --steps 1 --data {tmp_path / 't.npy'}"))
    monkeypatch.undo()
    capsys.readouterr()
    command = ["--device", "cpu", "--out", str(tmp_path / "out"), "--sample"]
    assert_refused([*command, prompt], [f"--sample {prompt} is not a sequence of token ids below 256"], tmp_path, capsys)
    assert train.main([*command, "1 2 3"]) == 0 and capsys.readouterr().out.startswith("1 2 3 ")


def test_plot_draws_the_losses_of_several_runs(tiny, tmp_path, no_sample, capsys):
    pytest.importorskip("matplotlib")
    for name in ("a", "b"):
        run(tiny("--fp8 none", name))
    with open(tmp_path / "a" / "log.jsonl", "a") as log:   # the user's, and a line that a crash cut short
        log.write('{"note": "hm"}\n{"loss": "high", "step": "third"}\n{"loss": 3}\n{"step": 5, "loss": 1.')
    out = f"{tmp_path / 'a'},{tmp_path / 'b'}"
    assert train.main(["--plot", str(tmp_path / "curves.png"), "--out", out]) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert train.main(["--plot", str(tmp_path / "curves.png"), "--out", str(tmp_path / "none")]) == 2
    assert "has no log to draw" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="curves.xyz.*png"):
        train.main(["--plot", str(tmp_path / "curves.xyz"), "--out", out])


def test_tensorboard_says_what_is_missing(tiny, tmp_path, monkeypatch, earlier, capsys):
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    assert_refused(tiny(f"--tensorboard {tmp_path / 'board'}"), ["pip install tensorboard"], tmp_path, capsys)


@pytest.fixture
def board(monkeypatch):
    """A tensorboard that touches a file for each curve. `fails` is the error of its next number."""
    calls = SimpleNamespace(fails=None, closed=0)

    class Writer:
        def __init__(self, folder, purge_step=None):
            self.folder, calls.purge_step = Path(folder), purge_step
            self.folder.mkdir(parents=True, exist_ok=True)

        def add_scalar(self, key, value, step):
            if calls.fails:
                raise calls.fails
            (self.folder / key).touch()

        def close(self):
            calls.closed += 1
    monkeypatch.setattr(train, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    return calls


def test_tensorboard_may_write_into_the_folder_of_the_run(tiny, tmp_path, board, no_sample):
    for _ in range(2):   # the second run renames the folder of the first
        run(tiny(f"--fp8 none --tensorboard {tmp_path / 'out' / 'board'}"))
    assert all((tmp_path / out / "board" / "val_loss").exists() for out in ("out", "out.1"))
    assert board.closed == 2   # or the last numbers would be lost with its thread


def test_a_resumed_run_draws_nothing_twice(tiny, tmp_path, board, monkeypatch, no_sample):
    interrupted(tiny(f"--fp8 none --tensorboard {tmp_path / 'board'}"), 2, monkeypatch)
    assert board.purge_step is None
    run(tiny("--resume"))
    assert board.purge_step == 4


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("I/O on closed file")])
def test_what_tensorboard_cannot_write_is_not_blamed_on_the_log(error, tiny, tmp_path, board, no_sample, capsys):
    board.fails = error
    assert run(tiny(f"--fp8 none --tensorboard {tmp_path / 'board'}"))["steps"] == 4
    assert [record["step"] for record in read_log(tmp_path / "out")] == [1, 2, 3, 4]
    assert "warning: step 2 is not in --tensorboard (" in capsys.readouterr().out


BESIDE = {"test_moss_trains_where_triton_cannot_be_installed": train_without_triton,
          "test_torchrun_restarts_a_run": killed_under_torchrun,
          "full disk": write_to_a_full_disk, "closed stdout": write_to_a_closed_stdout,
          "test_what_a_run_prints": kill_while_it_prints,
          **{name: functools.partial(signal_in, *SIGNALS[name]) for name in SIGNALS}}
