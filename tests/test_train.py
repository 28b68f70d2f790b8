"""
What train.py promises: same data and start for every recipe, resume bit for bit, no NaN in a weight, errors in a line.

    $ python -m pytest tests/test_train.py

The runs are tiny (nano, 16 tokens x 2 sequences, a few steps) and in this process, but for those of two ranks.
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
import time
import tracemalloc
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ON_HOPPER

import model
import train
from microscale import RECIPES
from model import ModelConfig, PRESETS, Transformer

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}   # of other processes, before a test changes it
CPU = torch.device("cpu")
TEXT = "the quick brown fox jumps over the lazy dog.\n" * 100
TINY = ("--device cpu --model nano --seq 16 --batch 2 --accum 1 --steps 4 "
        "--log_every 1 --eval_every 2 --eval_batches 1").split()
LAYERS = 4 * PRESETS["nano"].layers   # quantized ones: qkv, out, gate_up and down of each block

for_recipes = pytest.mark.parametrize("recipe", RECIPES)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def no_sample(monkeypatch):
    """200 generated tokens take longer than these runs."""
    monkeypatch.setattr(train, "sample", lambda *_: "")


def tiny_in(folder):
    """-> a function that gives the command line of a run of half a second. Where an option is given twice, the later
    one counts."""
    (folder / "text.txt").write_text(TEXT)

    def command(more="", out="out"):
        return [*TINY, "--data", str(folder / "text.txt"), "--out", str(folder / out), *more.split()]
    return command


@pytest.fixture
def tiny(tmp_path):
    return tiny_in(tmp_path)


def changed_train(folder, changes):
    """-> a script that does what train.py does, after these changes."""
    (folder / "script.py").write_text(f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import train
{changes}
code = train.main(sys.argv[1:])
train.gc.collect()
train.dist.destroy_process_group()
sys.exit(code)
""")
    return str(folder / "script.py")


def run(command):
    return train.train(train.parse_config(command))


def newest(out):
    return train.checkpoints(out)[0]


def checkpoint(out):
    return torch.load(newest(out), weights_only=True)


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def config(**values):
    """A resolved configuration, for what takes one apart from a run."""
    return train.resolve(train.Config(**{"model": "nano", "seq": 16, "batch": 2, **values}), CPU, 1)


def same(a, b):
    """Bit for bit the same tensors in the same nest of dicts and lists."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ---------------------------------------------------------------------------------------------------
# Spies: what a run sees, and what is done to it


def do_at_step(monkeypatch, step, action):
    """Calls `action` as the data of optimizer step `step`, from 0, is read (once: for --accum 1)."""
    original = train.Batches.step

    def spy(self, number, micro, device):
        if number == step:
            action()
        return original(self, number, micro, device)
    monkeypatch.setattr(train.Batches, "step", spy)


def save_at_once(monkeypatch):
    """Training waits for its checkpoints, as the end of a process does, of which a test has only one."""
    save = train.Saver.save
    monkeypatch.setattr(train.Saver, "save", lambda self, state: (save(self, state), self.thread.join()))


def on_model(monkeypatch, action):
    """Calls `action(model)` on the run's model, with its initial weights, before anything is trained."""
    original = train.make_optimizer

    def spy(model, *arguments):
        action(model)
        return original(model, *arguments)
    monkeypatch.setattr(train, "make_optimizer", spy)


def record_batches(monkeypatch):
    """-> list of ((step, micro-batch), tokens) that fills while a run reads its training data."""
    seen, original = [], train.Batches.step

    def spy(self, step, micro, device):
        tokens, targets = original(self, step, micro, device)
        seen.append(((step, micro), tokens))
        return tokens, targets
    monkeypatch.setattr(train.Batches, "step", spy)
    return seen


def record_states(monkeypatch):
    """-> list of what a run would have written as checkpoints: with --eval_every 1 its state after every step."""
    states = []
    monkeypatch.setattr(train.Saver, "save", lambda self, state: states.append(copy.deepcopy(state)))
    return states


def poison_gradient(monkeypatch, name, steps):
    """Makes the gradient of one weight NaN in these steps, from 0 (for --accum 1)."""
    def add_hook(model):
        count = itertools.count()
        weight = dict(model.named_parameters())[name]
        weight.register_hook(lambda grad: torch.full_like(grad, math.nan) if next(count) in steps else grad)
    on_model(monkeypatch, add_hook)


ALWAYS = range(10**6)


# ---------------------------------------------------------------------------------------------------
# Every recipe trains, and from the same start on the same data


@for_recipes
def test_every_recipe_learns_on_a_cpu(recipe, tiny, no_sample):
    summary = run(tiny(f"--fp8 {recipe} --seq 32 --batch 4 --steps 30 --eval_every 30 --log_every 30"))
    # Ignorance is ln 256 = 5.5, letter frequencies alone give 3.0; measured 0.5 to 0.6 for all recipes.
    assert summary["val_loss"] < 1.5
    assert summary["recipe"] == recipe and summary["steps"] == 30 and summary["skipped_steps"] == 0


def train_without_triton(folder):
    code = "import sys; sys.modules['triton'] = None; import train; sys.exit(train.main(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-c", code, *tiny_in(folder)()], cwd=ROOT, env=ENVIRONMENT,
                          capture_output=True, text=True)


def test_moss_trains_where_triton_cannot_be_installed(beside):
    done = beside["test_moss_trains_where_triton_cannot_be_installed"].result()
    assert done.returncode == 0 and done.stdout.count("emulated") == 2, done.stderr   # at the start, in the summary


def test_all_recipes_start_from_the_same_weights(tiny, monkeypatch, no_sample):
    weights = []
    on_model(monkeypatch, lambda model: weights.append(copy.deepcopy(model.state_dict())))
    for recipe in RECIPES:
        run(tiny(f"--fp8 {recipe} --steps 1"))
    assert len(weights) == len(RECIPES)
    assert all(same(weights[0], other) for other in weights[1:])


def test_all_recipes_see_the_same_batches(tiny, monkeypatch, no_sample):
    seen = {}
    for recipe in RECIPES:
        with monkeypatch.context() as patch:
            seen[recipe] = record_batches(patch)
            run(tiny(f"--fp8 {recipe} --steps 2 --accum 2"))
    assert [key for key, _ in seen["none"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(same(seen["none"], other) for other in seen.values())


def test_another_seed_gives_other_weights_and_other_batches(tiny, monkeypatch, no_sample):
    weights, batches = [], record_batches(monkeypatch)
    on_model(monkeypatch, lambda model: weights.append(copy.deepcopy(model.state_dict())))
    for seed in (1, 2):
        run(tiny(f"--fp8 none --steps 1 --seed {seed}"))
    assert not same(weights[0]["embed.weight"], weights[1]["embed.weight"])
    assert not same(batches[0], batches[1])


def test_every_step_and_every_micro_batch_has_its_own_data():
    tokens, _, vocab = train.open_data(str(ROOT / "train.py"))
    batches = train.Batches(tokens, config(accum=2), vocab, "training")
    seen = [batches.step(step, micro, CPU)[0] for step in (0, 1, 2) for micro in (0, 1)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(seen, 2))


@pytest.mark.parametrize("n", [1, 2, 3, 17, 1000, 4096])
def test_a_shuffled_order_visits_every_number_once(n):
    order, other = ([train.shuffled(i, n, keys) for i in range(n)] for keys in ([11, 12, 13, 14], [21, 22, 23, 24]))
    assert sorted(order) == sorted(other) == list(range(n))
    if n >= 17:
        assert order != sorted(order) and order != other


def numbered(folder, c):
    """Batches of the numbers 0 ... 999 as tokens."""
    np.save(folder / "numbers.npy", np.arange(1000))
    return train.Batches(train.open_data(folder / "numbers.npy")[0], c, 1000, "training")


def test_a_batch_that_was_read_ahead_is_the_batch_of_that_step(tmp_path):
    ahead, behind = (numbered(tmp_path, train.Config(seq=8, batch=2, accum=2)) for _ in range(2))
    ahead.prefetch(5, 1, CPU)
    assert torch.equal(ahead.step(2, 0, CPU)[0], behind.step(2, 0, CPU)[0])   # a resumed or skipped step, say
    ahead.prefetch(5, 1, CPU)
    assert all(map(torch.equal, ahead.step(5, 1, CPU), behind.step(5, 1, CPU)))


def test_a_batch_that_cannot_be_read_ahead_is_an_error_when_it_is_needed(tmp_path):
    np.save(tmp_path / "tokens.npy", np.zeros(64, np.int32))
    batches = train.Batches(train.open_data(tmp_path)[0], train.Config(seq=8, batch=2, accum=1), 50, "training")
    np.save(tmp_path / "tokens.npy", np.full(64, 99, np.int32))
    batches.prefetch(1, 0, CPU)
    with pytest.raises(train.UserError, match="token id 99 in .*tokens.npy"):
        batches.step(1, 0, CPU)


def test_an_epoch_reads_every_window_once_and_the_next_one_in_another_order():
    tokens, _, vocab = train.open_data(str(ROOT / "train.py"))
    batches = train.Batches(tokens, config(), vocab, "training")
    epochs = [[batches.start(epoch, i) for i in range(batches.windows)] for epoch in (0, 1)]
    for starts in epochs:
        assert set(np.diff(sorted(starts))) == {16}   # side by side
        assert min(starts) >= 0 and max(starts) + 16 < len(tokens)
    assert np.argsort(epochs[0]).tolist() != np.argsort(epochs[1]).tolist()


def test_steps_go_on_where_the_step_before_ended():
    tokens, _, vocab = train.open_data(str(ROOT / "train.py"))
    batches = train.Batches(tokens, config(accum=2), vocab, "training")
    seen = torch.cat([batches.step(step, micro, CPU)[0] for step in (0, 1) for micro in (0, 1)])
    expected = torch.stack([torch.from_numpy(tokens.read(batches.start(0, i), 16)) for i in range(8)])
    assert torch.equal(seen, expected)


def test_targets_are_the_tokens_one_place_further():
    tokens, _, vocab = train.open_data(str(ROOT / "train.py"))
    x, y = train.Batches(tokens, config(), vocab, "training").step(0, 0, CPU)
    assert x.shape == y.shape == (2, 16)
    assert torch.equal(x[:, 1:], y[:, :-1])


class FakeDDP(torch.nn.Module):
    """One rank of several, without the others."""

    def __init__(self, module, **_):
        super().__init__()
        self.module = module

    def forward(self, *arguments):
        return self.module(*arguments)

    def no_sync(self):
        return nullcontext()


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_micro_batches_of_one_process(world, tiny, monkeypatch, no_sample):
    monkeypatch.setattr(train, "DistributedDataParallel", FakeDDP)

    def batches_of(rank, world):
        with monkeypatch.context() as patch:
            patch.setattr(train, "start_ranks", lambda _: train.Ranks(rank, world, CPU))
            seen = record_batches(patch)
            run(tiny("--fp8 none --accum 4 --steps 2 --eval_batches 4"))
        return seen
    alone = batches_of(0, 1)
    together = [batch for rank in range(world) for batch in batches_of(rank, world)]
    assert same(sorted(together, key=lambda batch: batch[0]), alone)


def test_moss_takes_the_adamw_of_pytorch_as_well(tiny, tmp_path, monkeypatch, no_sample):
    run(tiny("--fp8 moss --rescale_interval 2", "ours"))
    monkeypatch.setattr(train, "FP8AdamW", lambda groups, layers, **options: torch.optim.AdamW(groups, **options))
    run(tiny("--fp8 moss --rescale_interval 2", "theirs"))
    assert same(checkpoint(tmp_path / "ours")["model"], checkpoint(tmp_path / "theirs")["model"])


def test_a_run_with_another_optimizer_goes_on(tiny, tmp_path, monkeypatch, no_sample):
    monkeypatch.setattr(train, "make_optimizer", lambda model, c, shards=None: torch.optim.RMSprop(
        model.parameters(), lr=c.lr, momentum=0.9))
    run(tiny("--fp8 tensor"))
    whole = checkpoint(tmp_path / "out")["optimizer"]
    newest(tmp_path / "out").unlink()   # that of step 4
    run(tiny("--fp8 tensor --resume"))
    assert same(checkpoint(tmp_path / "out")["optimizer"], whole)


def test_only_rank_0_writes(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train, "DistributedDataParallel", FakeDDP)
    monkeypatch.setattr(train, "start_ranks", lambda _: train.Ranks(1, 2, CPU))
    run(tiny("--fp8 none --accum 2 --steps 2 --eval_batches 2"))
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------------------------------------------
# Two processes


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("shards, text", [
    (None, "4.0 MiB of gradients in BF16, all-reduced"),
    (True, "4.0 MiB of gradients in BF16, to their owners, 1.0 MiB of weights in FP8, "
           "2.0 MiB of other weights in BF16")])
def test_the_log_says_what_the_ranks_send_in_a_step(shards, text):
    weight, other = torch.empty(1024, 1024, device="meta"), torch.empty(2**20, device="meta")
    model = SimpleNamespace(parameters=lambda: [weight, other], linears=lambda: [SimpleNamespace(weight=weight)])
    assert train.traffic(model, torch.device("cuda"), shards) == text


# Rank 1 draws other initial weights, as another kind of GPU would from the same seed: those of rank 0 are to count. And
# the gradients lie in DDP's buckets from the first micro-batch on: others beside them would be 4 bytes per parameter.
TWO_RANKS = """
build, forward_backward = train.build, train.forward_backward

def drawn_elsewhere(c, device):
    model, *batches = build(c, device)
    for p in model.parameters() if os.environ["RANK"] == "1" else ():
        p.data.mul_(1.5)
    return model, *batches

def in_buckets(model, *arguments, **options):
    where = lambda: [p.grad.data_ptr() for p in model.parameters()] if hasattr(model, "module") else "no DDP"
    before, loss = where(), forward_backward(model, *arguments, **options)
    assert before == where()
    return loss

train.build, train.forward_backward = drawn_elsewhere, in_buckets
"""


def train_on_two_ranks(recipe, folder):
    """-> (the folder of a run on two processes, the command line that made it)"""
    command = tiny_in(folder)(f"--fp8 {recipe} --accum 2 --steps 3 --eval_every 3 --eval_batches 2 "
                              f"--rescale_interval 2", "two")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
                           "--master_port", str(free_port()), changed_train(folder, TWO_RANKS), *command],
                          timeout=90, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ranks   2, each sends per step: " in done.stdout
    return folder, command


ON_TWO_RANKS = {f"{recipe} on two ranks": functools.partial(train_on_two_ranks, recipe)
                for recipe in ("none", "moss", "moss --shard")}


@pytest.fixture(scope="module", params=ON_TWO_RANKS)
def two_ranks(request, beside):
    return beside[request.param].result()


def test_two_processes_train_the_same_weights_as_one(two_ranks, no_sample):
    # Bit for bit: two micro-batches leave one addition, whose order does not matter, and halving is exact. (From four
    # micro-batches on, the sums are taken in another order, and Adam makes large updates of tiny differences.)
    folder, command = two_ranks
    run([*command, "--out", str(folder / "one")])
    one, two = checkpoint(folder / "one"), checkpoint(folder / "two")
    for part in ("model", "optimizer", "scales"):
        assert same(one[part], two[part]), part


def test_a_checkpoint_of_two_processes_goes_on_in_one_as_if_it_had_been_one(two_ranks, no_sample, capsys):
    folder, command = two_ranks
    more = [*command, "--steps", "5"]   # another schedule than the first three steps had, but for both the same
    run([*command, "--out", str(folder / "first")])
    run([*more, "--resume", "--out", str(folder / "first")])
    shutil.copytree(folder / "two", folder / "then")
    assert "ranks are" not in capsys.readouterr().out
    run([*(word for word in more if word != "--shard"), "--resume", "--out", str(folder / "then")])
    assert "at step 3; 2 ranks are 1 now\n" in capsys.readouterr().out
    assert same(checkpoint(folder / "first")["model"], checkpoint(folder / "then")["model"])


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
        losses.append(forward_backward(model, batches, step, c, train.Ranks(rank, 2, ranks.device)))
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
    """(number of GPUs, more options, how gradients are added) -> checkpoint after 3 steps of two micro-batches."""
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
        return checkpoint(out)
    return run


needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.gpu
@needs_two_gpus
@pytest.mark.parametrize("recipe", ["none", "moss"])
def test_two_gpus_train_the_same_weights_as_one_if_gradients_are_sent_in_fp32(recipe, on_gpus):
    one, two = on_gpus(1, f"--fp8 {recipe}"), on_gpus(2, f"--fp8 {recipe}", "sent in FP32")
    for part in ("model", "optimizer", "scales"):
        assert same(one[part], two[part]), part


@pytest.mark.gpu
@needs_two_gpus
@pytest.mark.parametrize("recipe, shard", [("none", ""), ("moss", ""), ("moss", " --shard")])
def test_two_gpus_train_the_same_weights_as_one_that_rounds_gradients_to_bf16_as_they_do(recipe, shard, on_gpus):
    one, two = on_gpus(1, f"--fp8 {recipe}", "as two ranks would"), on_gpus(2, f"--fp8 {recipe}{shard}")
    for part in ("model", "optimizer", "scales"):
        assert same(one[part], two[part]), part


def test_two_processes_log_the_health_of_all_scales_whoever_owns_them(two_ranks, no_sample):
    folder, command = two_ranks
    run([*command, "--out", str(folder / "alone")])
    alone, two = ([(r.get("scale_ratio"), r.get("scale_ratio_min")) for r in read_log(folder / out)]
                  for out in ("alone", "two"))
    assert alone == two


def test_a_rank_that_owns_no_scale_has_no_health_to_add():
    c = config(fp8="moss")
    model = train.make_model(c, CPU)
    scales = train.make_scales(model, train.make_optimizer(model, c), c)
    health = train.scale_health(model, scales, SimpleNamespace(mine=lambda p: False))
    assert health["scale_ratio"] == -math.inf and health["scale_ratio_min"] == math.inf


def test_more_ranks_than_parameters_cannot_share_them():
    with pytest.raises(train.UserError, match="--shard: 1000 ranks are more than the"):
        train.Shards(train.make_model(config(fp8="moss"), CPU), train.Ranks(0, 1000, CPU))


def test_ranks_that_resume_at_different_steps_are_stopped(tiny, monkeypatch):
    def all_max(tensor):   # another rank found a later checkpoint
        return torch.stack((tensor[0] + torch.tensor([4, 0]), tensor[1] - torch.tensor([2, 0])))
    monkeypatch.setattr(train, "all_max", all_max)
    with pytest.raises(train.RunError, match="steps 2 to 4: --out .* has to be one folder"):
        run(tiny())


def test_ranks_with_other_options_or_other_data_are_stopped(tiny, monkeypatch):
    numbers = []
    monkeypatch.setattr(train, "extremes", lambda tensor: numbers.append(tensor[1].item()) or (tensor, tensor))
    monkeypatch.setattr(train, "make_optimizer", lambda *_: 1 / 0)   # what follows is not of interest
    for more in ("", "--device cpu", "--lr 1", "--out elsewhere", "--data " + str(ROOT / "README.md")):
        with pytest.raises(ZeroDivisionError):
            run(tiny(more))
    assert [number == numbers[0] for number in numbers] == [True, True, False, True, False]

    monkeypatch.setattr(train, "extremes", lambda tensor: (tensor, tensor + torch.tensor([0, 1])))
    with pytest.raises(train.RunError, match="the same command.*all files of --data"):
        run(tiny())


def test_scales_are_measured_on_all_ranks_if_a_weight_of_one_exceeds_them(monkeypatch):
    monkeypatch.setattr(train, "all_max", lambda worst: worst.new_tensor(-0.9))
    anchored = []
    scales = SimpleNamespace(load_state_dict=lambda _: None, headroom=lambda: torch.tensor([1.0, 1.2]),
                             anchor=lambda: anchored.append(1))
    train.restore_scales({"config": {"fp8": "moss"}, "scales": None}, scales, config(fp8="moss"))
    assert anchored


def test_ranks_that_torchrun_starts_anew_for_other_nodes_go_on_too(tiny, monkeypatch, no_sample, capsys):
    """Nodes that come and go are no restarts to torchrun, but its store knows that this job has claimed the folder."""
    kept = set()
    store = SimpleNamespace(check=lambda keys: set(keys) <= kept, set=lambda key, _: kept.add(key))
    monkeypatch.setattr(train, "start_ranks", lambda _: train.Ranks(0, 1, CPU, store))
    for steps in (2, 4):
        run(tiny(f"--fp8 none --steps {steps}"))
    assert "at step 2" in capsys.readouterr().out


def restart_after_a_start_in_vain(folder):
    """-> (where the next run has to move the checkpoint of an earlier one, that run, which torchrun starts twice)"""
    command = tiny_in(folder)("--fp8 none --steps 2")
    subprocess.run([sys.executable, "train.py", *command], cwd=ROOT, env=ENVIRONMENT, check=True,
                   capture_output=True)
    earlier = newest(folder / "out")
    script = changed_train(folder, """
train.sample = lambda *_: ""
real = train.build
def killed(*arguments):
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
train.build = killed
""")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--max-restarts", "1", "--rdzv_backend", "c10d",
                "--rdzv_endpoint", f"localhost:{free_port()}", script]
    done = subprocess.run([*torchrun, *command, "--seed", "1"], env=ENVIRONMENT, capture_output=True, text=True,
                          timeout=90)
    return folder / "out.1" / earlier.name, done


def test_a_restart_after_a_start_in_vain_does_not_go_on_with_an_earlier_run(beside):
    earlier, done = beside["test_a_restart_after_a_start_in_vain"].result()
    assert done.returncode == 0 and "resumed" not in done.stdout, done.stderr
    assert earlier.exists()


def test_a_run_that_torchrun_restarts_goes_on_from_the_last_checkpoint(tiny, tmp_path, monkeypatch, no_sample, capsys):
    more = "--fp8 moss --steps 4 --eval_every 2"
    with monkeypatch.context() as patch:
        save_at_once(patch)
        do_at_step(patch, 2, lambda: patch.setattr(train, "forward_backward", None))   # "dies" at the fourth step
        with pytest.raises(TypeError):
            run(tiny(more))
    gc.collect()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run(tiny(more))
    assert "resumed" in capsys.readouterr().out
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    run(tiny(more, "whole"))
    assert same(checkpoint(tmp_path / "out")["model"], checkpoint(tmp_path / "whole")["model"])


def test_a_run_that_torchrun_restarts_after_its_last_step_is_done(tiny, monkeypatch, no_sample, capsys):
    run(tiny("--fp8 none"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train.main(tiny("--fp8 none")) == 0 and "at step 4 of 4" in capsys.readouterr().out


def kill_a_rank(nodes, victim, folder):
    """-> (folder, command line, exit codes of torchrun on each node, all that was printed) of a run on two ranks, of
    which one is killed at its step 6"""
    script = changed_train(folder, f"""
open({str(folder / "starts")!r}, "a").write(".")
real = train.forward_backward
def killed(model, batches, step, c, ranks, *rest, **options):
    if step == 6 and not os.path.exists({str(folder / "once")!r} + str(ranks.rank)):
        open({str(folder / "once")!r} + str(ranks.rank), "w").close()
        if ranks.rank == {victim}:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep({2 * (nodes - 1)})   # the other node learns of it from torchrun, and does not count a restart
    return real(model, batches, step, c, ranks, *rest, **options)
train.forward_backward, train.sample = killed, lambda *_: ""
""")
    command = tiny_in(folder)("--fp8 moss --accum 2 --steps 8 --eval_batches 2")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes), "--nproc_per_node",
                str(2 // nodes), "--max-restarts", "3", "--rdzv_backend", "c10d", "--rdzv_id", "test",
                "--rdzv_endpoint", f"localhost:{free_port()}", script, *command]
    agents = [subprocess.Popen(torchrun, stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.STDOUT, env=ENVIRONMENT)
              for _ in range(nodes)]
    printed = "".join(agent.communicate(timeout=120)[0] for agent in agents)
    return folder, command, [agent.returncode for agent in agents], printed


WITH_A_RANK_KILLED = {"rank 0 of one node": functools.partial(kill_a_rank, 1, 0),
                      "rank 1 of one node": functools.partial(kill_a_rank, 1, 1),
                      "rank 1 of two nodes": functools.partial(kill_a_rank, 2, 1)}
BESIDE = {"test_moss_trains_where_triton_cannot_be_installed": train_without_triton, **ON_TWO_RANKS,
          "test_a_restart_after_a_start_in_vain": restart_after_a_start_in_vain,
          **WITH_A_RANK_KILLED}   # in the order in which the tests need them


@pytest.mark.parametrize("which", WITH_A_RANK_KILLED)
def test_torchrun_restarts_a_run_whose_rank_was_killed_and_the_weights_are_those_of_an_unharmed_one(
        which, beside, no_sample):
    folder, command, codes, printed = beside[which].result()
    assert set(codes) == {0}, printed
    assert len(re.findall("resumed .* at step [246]\n", printed)) == 1, printed
    assert (folder / "starts").read_text() == "...."   # two ranks, and both once more: the first attempt went well
    assert not (folder / "out.1").exists()
    run([*command, "--out", str(folder / "whole")])
    assert same(checkpoint(folder / "out")["model"], checkpoint(folder / "whole")["model"])


def test_sharded_ranks_exchange_scales_at_true_rescales_only_whatever_they_own(tiny):
    c = config(fp8="moss", rescale_interval=2)
    model = train.make_model(c, CPU)
    optimizer = train.make_optimizer(model, c)
    scales, exchanged = train.make_scales(model, optimizer, c), []
    shards = SimpleNamespace(mine=lambda p: True, share=lambda scales, measured: exchanged.append(measured))
    train.requantize(model, scales, shards)
    shards.share(scales, measured=True)   # at the start, as `train` does
    for update in (1, 2, 3, 4):   # the optimizer of this CPU has no layers, like that of a rank that owns none
        train.update_weights(optimizer, model, scales, 1e-3, update, c, shards)
    assert exchanged == [True, False, True, False, True]


def test_ranks_that_cannot_meet_say_so_in_one_line(tiny, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert train.main(tiny()) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "the ranks cannot meet" in lines[0]


def test_a_rank_whose_peer_died_says_so_in_one_line(monkeypatch, capsys):
    def train_until_the_peer_dies(config):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:39127. And so on.")
    monkeypatch.setattr(train, "train", train_until_the_peer_dies)
    monkeypatch.setenv("RANK", "0")
    assert train.main([]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "another rank is gone" in lines[0] and "--max-restarts" in lines[0]


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError()], ids=lambda error: type(error).__name__)
def test_too_little_memory_is_said_in_one_line_with_what_to_change(error, monkeypatch, capsys):
    def train_in_too_little_memory(config):
        raise error
    monkeypatch.setattr(train, "train", train_in_too_little_memory)
    assert train.main([]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "halve --batch and double --accum" in lines[0]


def test_an_error_of_the_program_itself_is_not_hidden(monkeypatch):
    def train_with_a_bug(config):
        raise RuntimeError("expected scalar type Float but found Half")
    monkeypatch.setattr(train, "train", train_with_a_bug)
    with pytest.raises(RuntimeError, match="expected scalar type"):
        train.main([])


def test_half_the_batch_and_twice_the_accumulation_read_the_same_tokens(tmp_path):
    whole, halves = (numbered(tmp_path, train.Config(seq=8, batch=8 // accum, accum=accum)) for accum in (1, 2))
    assert torch.equal(whole.step(1, 0, CPU)[0], torch.cat([halves.step(1, micro, CPU)[0] for micro in (0, 1)]))


def test_two_processes_write_one_log(two_ranks):
    folder, _ = two_ranks
    assert [record["step"] for record in read_log(folder / "two")] == [1, 2, 3]


# ---------------------------------------------------------------------------------------------------
# Resume, and how a run ends early

INTERRUPTED = "--steps 6 --rescale_interval 5"   # stops after step 3; a true rescale of moss comes after the resume


def run_interrupted(tiny, recipe, monkeypatch, out):
    with monkeypatch.context() as patch:
        do_at_step(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
        assert train.main(tiny(f"--fp8 {recipe} {INTERRUPTED}", out)) == 0


@pytest.mark.parametrize("recipe", ["none", "tensor", "moss"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(recipe, tiny, tmp_path, monkeypatch, no_sample):
    run(tiny(f"--fp8 {recipe} {INTERRUPTED}", "whole"))
    run_interrupted(tiny, recipe, monkeypatch, "parts")
    assert checkpoint(tmp_path / "parts")["step"] == 3
    run(tiny(f"--fp8 {recipe} {INTERRUPTED} --resume", "parts"))
    whole, parts = (checkpoint(tmp_path / name) for name in ("whole", "parts"))
    for part in ("model", "optimizer", "scales", "step", "updates", "skipped"):
        assert same(whole[part], parts[part]), part
    logs = [read_log(tmp_path / name) for name in ("whole", "parts")]
    for key in ("step", "loss", "lr", "grad_norm"):
        assert [r[key] for r in logs[0]] == [r[key] for r in logs[1]], key


def test_skipped_steps_survive_a_resume(tiny, tmp_path, monkeypatch, no_sample):
    with monkeypatch.context() as patch:
        poison_gradient(patch, "blocks.0.down.weight", {1})
        run_interrupted(tiny, "moss", monkeypatch, "out")
    run(tiny(f"--fp8 moss {INTERRUPTED} --resume"))
    state = checkpoint(tmp_path / "out")
    assert (state["step"], state["updates"], state["skipped"]) == (6, 5, 1)


def test_after_a_crash_and_a_resume_the_log_has_every_step_once(tiny, tmp_path, monkeypatch, no_sample):
    def crash():
        raise MemoryError
    with monkeypatch.context() as patch:
        save_at_once(patch)
        do_at_step(patch, 3, crash)   # step 3 is in the log, the last checkpoint is of step 2
        with pytest.raises(MemoryError):
            run(tiny("--fp8 none"))
    gc.collect()   # the exception kept the run's frame, and with it the lock of its folder
    run(tiny("--fp8 none --resume"))
    assert [record["step"] for record in read_log(tmp_path / "out")] == [1, 2, 3, 4]


def test_a_checkpoint_goes_on_under_another_recipe_and_says_so(tiny, tmp_path, monkeypatch, no_sample, capsys):
    run_interrupted(tiny, "none", monkeypatch, "out")
    assert run(tiny(f"--fp8 moss {INTERRUPTED} --resume"))["steps"] == 6
    assert "--fp8 was none and is now moss" in capsys.readouterr().out
    assert checkpoint(tmp_path / "out")["scales"]["scale"].shape == (LAYERS,)


def test_scales_that_their_weights_exceed_are_measured_at_resume(tiny, tmp_path, monkeypatch, no_sample):
    with monkeypatch.context() as patch:
        do_at_step(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
        assert run(tiny("--fp8 moss")) is None
    state = checkpoint(tmp_path / "out")
    state["scales"]["scale"] /= 2
    newest(tmp_path / "out").unlink()
    train.write_checkpoint(tmp_path / "out", state)
    run(tiny("--fp8 moss --resume"))
    assert read_log(tmp_path / "out")[-1]["scale_ratio_min"] >= 1


@pytest.mark.gpu
@pytest.mark.parametrize("first, then", [("moss", "none"), ("none", "moss"), ("tensor", "moss"), ("moss", "moss")])
def test_on_a_gpu_a_checkpoint_goes_on_under_any_recipe(first, then, tiny, tmp_path, monkeypatch, no_sample):
    with monkeypatch.context() as patch:
        do_at_step(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
        assert run(tiny(f"--device cuda --fp8 {first}")) is None
    summary = run(tiny(f"--device cuda --fp8 {then} --resume"))
    assert summary["steps"] == 4 and math.isfinite(summary["val_loss"])
    if first == then:
        straight = run(tiny(f"--device cuda --fp8 {first}", out="straight"))
        assert same(checkpoint(tmp_path / "out")["model"], checkpoint(tmp_path / "straight")["model"])
        assert summary["val_loss"] == straight["val_loss"]


def test_moments_of_other_betas_are_left_behind_and_no_weight_exceeds_its_scale(tiny, tmp_path, no_sample):
    more = "--fp8 moss --lr 4e-3 --warmup 0 --rescale_interval 0 --eval_every 4"
    run(tiny(more + " --steps 4 --beta2 0.999"))
    run(tiny(more + " --steps 16 --beta2 0.82 --resume"))
    assert min(record["scale_ratio_min"] for record in read_log(tmp_path / "out")) >= 1


def test_a_log_line_that_a_crash_cut_short_is_dropped_at_resume(tiny, tmp_path, monkeypatch, no_sample):
    with monkeypatch.context() as patch:
        do_at_step(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
        assert run(tiny("--fp8 none")) is None
    with open(tmp_path / "out" / "log.jsonl", "a") as log:
        log.write('{"step": 2, "lo')
    run(tiny("--fp8 none --resume"))
    assert [record["step"] for record in read_log(tmp_path / "out")] == [1, 2, 3, 4]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_finish_saves_and_exits_0(number, tiny, tmp_path, monkeypatch, capsys):
    do_at_step(monkeypatch, 2, lambda: signal.raise_signal(number))
    before = signal.getsignal(number)
    assert train.main(tiny("--fp8 none --steps 6 --log_every 6 --eval_every 6")) == 0
    assert checkpoint(tmp_path / "out")["step"] == 3
    assert [record["step"] for record in read_log(tmp_path / "out")] == [3]
    assert "--resume" in capsys.readouterr().out
    assert signal.getsignal(number) == before


def test_a_signal_during_the_first_evaluation_is_heard_too(tiny, tmp_path, monkeypatch, no_sample):
    original, signals = train.evaluate, iter([signal.SIGTERM])

    def evaluate(*arguments):
        for number in itertools.islice(signals, 1):
            signal.raise_signal(number)
        return original(*arguments)
    monkeypatch.setattr(train, "evaluate", evaluate)
    assert run(tiny("--fp8 none")) is None and checkpoint(tmp_path / "out")["step"] == 1


def test_a_run_gives_the_signals_back(tiny, no_sample):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run(tiny("--fp8 none --steps 1"))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.fixture
def heard():
    """SIGINT as Python starts with it, unless a shell put it into the background, which ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_ends_the_run_at_once(tiny, monkeypatch, heard):
    def twice():
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.6)
        signal.raise_signal(signal.SIGINT)
    do_at_step(monkeypatch, 2, twice)
    with pytest.raises(KeyboardInterrupt):
        train.main(tiny("--fp8 none"))


def full_disk(state, f):
    f.write(b"half a checkpoint")
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("torchrun, pause", [(False, 0), (True, 0), (True, 0.6)])
def test_a_signal_that_a_supervisor_sends_twice_is_one(torchrun, pause, monkeypatch):
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    with train.StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(pause)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received


def test_a_signal_while_the_last_checkpoint_is_written_waits_for_it(tiny, tmp_path, monkeypatch, no_sample):
    original, too_late = train.write_checkpoint, []

    def write(out, state):
        if state["step"] == 4:
            time.sleep(0.5)   # the loop has ended
            os.kill(os.getpid(), signal.SIGTERM)
        return original(out, state)
    monkeypatch.setattr(train, "write_checkpoint", write)
    before = signal.signal(signal.SIGTERM, lambda *_: too_late.append(1))
    run(tiny("--fp8 none"))
    signal.signal(signal.SIGTERM, before)
    assert not too_late and "step_00000004" in newest(tmp_path / "out").name


def test_a_damaged_checkpoint_takes_no_place_of_a_good_one(tiny, tmp_path, no_sample, capsys):
    more = "--fp8 none --eval_every 1 --keep 2"
    run(tiny(more))
    newest(tmp_path / "out").write_bytes(b"damaged")
    run(tiny(more + " --steps 5 --resume"))   # from step 3: those of 4 and 5 are good
    assert [train.load_checkpoint(tmp_path / "out", PRESETS["nano"], print)[1]["step"],
            *(int(path.name[5:13]) for path in train.checkpoints(tmp_path / "out"))] == [5, 5, 4]
    damaged, = (tmp_path / "out").glob("*.damaged")
    assert damaged.read_bytes() == b"damaged" and damaged.name in capsys.readouterr().out


def test_a_long_run_saves_every_250_steps():
    assert [config(steps=steps).eval_every for steps in (3, 600, 100_000)] == [1, 120, 250]


def test_validation_data_that_cannot_be_read_cost_one_evaluation(tiny, tmp_path, monkeypatch, no_sample, capsys):
    original, calls = train.Batches.evaluation, itertools.count()

    def evaluation(self, i, device):
        if next(calls) == 1:   # after step 2
            raise OSError(errno.EIO, "Input/output error")
        return original(self, i, device)
    monkeypatch.setattr(train.Batches, "evaluation", evaluation)
    assert math.isfinite(run(tiny("--fp8 none"))["val_loss"])
    assert [record.get("val_loss", 0) is None for record in read_log(tmp_path / "out")] == [False, True, False, False]
    assert len(train.checkpoints(tmp_path / "out")) == 2 and checkpoint(tmp_path / "out")["best"][1] == 4
    assert "validation data: [Errno 5] Input/output error" in capsys.readouterr().out


def test_a_line_of_the_log_that_cannot_be_written_does_not_end_the_run(tiny, monkeypatch, no_sample, capsys):
    original = train.open_log

    def open_log(*arguments):
        log = original(*arguments)

        def write(text):
            raise OSError(errno.ENOSPC, "No space left on device")
        return SimpleNamespace(write=write, close=log.close)
    monkeypatch.setattr(train, "open_log", open_log)
    assert run(tiny("--fp8 none"))["steps"] == 4
    assert "warning: step 2 is not in the log (No space left on device)" in capsys.readouterr().out


def test_what_a_run_prints_is_there_at_once_and_in_any_encoding(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    (tmp_path / "text.txt").write_bytes("größer ".encode() * 100)
    with open(tmp_path / "printed", "w") as printed:
        process = subprocess.Popen([sys.executable, "train.py", *TINY, "--steps", "4000", "--data", str(tmp_path),
                                    "--out", str(tmp_path / "größer")], cwd=ROOT, stdout=printed,
                                   env={**environment, "PYTHONIOENCODING": "ascii"})
        while not (tmp_path / "größer" / "log.jsonl").exists() or not read_log(tmp_path / "größer"):
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(0.2)
        process.kill()
        process.wait()
    assert "step    1/4000" in (tmp_path / "printed").read_text()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_output_that_cannot_be_written_does_not_end_the_run(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "train.py", *TINY, "--fp8", "none", "--data", str(tmp_path),
                               "--out", str(tmp_path / "out")],
                              cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 0 and "rror" not in done.stderr and checkpoint(tmp_path / "out")["step"] == 4


def test_an_error_of_the_file_system_is_said_in_one_line(tiny, monkeypatch, capsys):
    def build(*_):
        raise OSError(errno.ESTALE, "Stale file handle", "tokens.bin")
    monkeypatch.setattr(train, "build", build)
    assert train.main(tiny()) == 1
    assert capsys.readouterr().err == f"error: [Errno {errno.ESTALE}] Stale file handle: 'tokens.bin'\n"


def test_nothing_that_goes_wrong_with_a_checkpoint_passes_for_success(tmp_path, monkeypatch):
    def write(out, state):
        raise MemoryError
    monkeypatch.setattr(train, "write_checkpoint", write)
    saver = train.Saver(tmp_path, 1, print)
    saver.save({"step": 5, "best": [1.0, 3]})
    assert not saver.wait() and "MemoryError" in saver.failed


def test_a_file_system_without_locks_is_no_obstacle(tiny, monkeypatch, no_sample):
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")
    monkeypatch.setattr(fcntl, "flock", flock)
    assert run(tiny("--fp8 none --steps 2"))["steps"] == 2


def test_a_run_whose_data_are_gone_says_so(tiny, monkeypatch, no_sample):
    original = train.Batches.step

    def step(self, number, micro, device):
        if number >= 2:
            raise OSError(errno.ENOENT, "No such file")
        return original(self, number, micro, device)
    monkeypatch.setattr(train.Batches, "step", step)
    with pytest.raises(train.RunError, match="first its data: .*No such file"):
        run(tiny("--fp8 none --max_skips 2"))


def test_a_full_disk_is_said_and_leaves_the_last_good_checkpoint(tiny, tmp_path, monkeypatch, no_sample, capsys):
    with monkeypatch.context() as patch:
        save_at_once(patch)
        do_at_step(patch, 3, lambda: patch.setattr(torch, "save", full_disk))
        assert train.main(tiny("--fp8 none")) == 1   # the last checkpoint is missing
    out, err = capsys.readouterr()
    good = str(newest(tmp_path / "out"))
    assert f"No space left on device): make room in {tmp_path / 'out'}; {good} is the last good one" in out
    assert len(err.splitlines()) == 1 and "step 4 could not be written" in err
    assert checkpoint(tmp_path / "out")["step"] == 2
    assert not (tmp_path / "out" / "checkpoint.tmp").exists()
    assert run(tiny("--fp8 none --resume"))["steps"] == 4


def test_a_run_goes_on_when_a_checkpoint_fails_and_a_later_one_does_not(tiny, tmp_path, monkeypatch, no_sample):
    torch_save = torch.save
    save_at_once(monkeypatch)
    do_at_step(monkeypatch, 1, lambda: monkeypatch.setattr(torch, "save", full_disk))
    do_at_step(monkeypatch, 3, lambda: monkeypatch.setattr(torch, "save", torch_save))
    assert train.main(tiny("--fp8 none")) == 0
    assert [checkpoint(tmp_path / "out")["step"], len(train.checkpoints(tmp_path / "out"))] == [4, 1]


def test_a_run_keeps_the_last_checkpoints_and_the_best(tiny, tmp_path, monkeypatch, no_sample):
    losses = iter([9.0, 3.0, 1.0, 2.0, 4.0, 5.0, 6.0])
    monkeypatch.setattr(train, "evaluate", lambda *_: next(losses))   # the first one is of the start
    run(tiny("--fp8 none --steps 6 --eval_every 1 --keep 2"))
    steps = [int(path.name.split("_")[1]) for path in train.checkpoints(tmp_path / "out")]
    assert steps == [6, 5, 2]
    assert checkpoint(tmp_path / "out")["best"] == [1.0, 2]


@pytest.mark.parametrize("x", [torch.randn(5, 7).t(), torch.tensor(3.0), torch.empty(0, 4), torch.arange(1000),
                               torch.randn(1025, 1027).t()], ids=["transposed", "scalar", "empty", "integers", "large"])
def test_a_copy_on_the_cpu_has_the_numbers_of_the_original_and_memory_of_its_own(x):
    before, copied = x.clone(), train.on_cpu({"x": [x, 1]})["x"]
    x.zero_()
    assert same(copied, [before, 1])


def test_what_is_saved_is_the_state_when_save_was_called(tmp_path):
    weight, saver = torch.zeros(3), train.Saver(tmp_path, 1, print)
    saver.save(train.on_cpu({"model": {"w": weight}, "step": 1, "best": [0.0, 1]}))
    weight += 1   # the step after, while the file is being written
    assert saver.wait() and checkpoint(tmp_path)["model"]["w"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("damage", ["cut", "one bit"])
def test_resume_falls_back_past_a_damaged_checkpoint_and_says_so(damage, tiny, tmp_path, no_sample, capsys):
    run(tiny("--fp8 none"))
    path, older = train.checkpoints(tmp_path / "out")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data[:-100] if damage == "cut" else data)
    assert run(tiny("--fp8 none --resume"))["steps"] == 4
    printed = capsys.readouterr().out
    assert f"{path} is damaged (its checksum is wrong)" in printed and f"resumed {older} at step 2" in printed


def fork(command):
    """Runs the command in a copy of this process; -> its id."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(train.main(command))
    return pid


@pytest.mark.skipif(ON_HOPPER or not hasattr(os, "fork"), reason="a process that has used a GPU cannot be copied")
def test_kill_9_at_twenty_instants_loses_no_more_than_the_steps_since_the_last_checkpoint(tiny, tmp_path, no_sample):
    command, instants = "--fp8 moss --steps 60 --eval_every 2", random.Random(0)
    run(tiny(command, "whole"))
    kills, out, reached = 0, tmp_path / "killed", 0
    while kills < 20:
        if reached == 60:   # a fast machine: once more from the start
            shutil.rmtree(out)
            reached = 0
        pid = fork(tiny(command + (" --resume" if train.checkpoints(out) else ""), "killed"))
        time.sleep(instants.uniform(0.01, 0.25))
        os.kill(pid, signal.SIGKILL)
        kills += not os.waitpid(pid, 0)[1] == 0
        for path in train.checkpoints(out):   # a name that looks whole is whole
            assert train.checksum(path) == train.CHECKPOINT.fullmatch(path.name)[2]
        steps = [int(path.name.split("_")[1]) for path in train.checkpoints(out)]
        assert max(steps, default=0) >= reached   # nothing that was saved is ever lost
        reached = max(steps, default=0)
    if reached < 60:
        assert train.main(tiny(command + (" --resume" if reached else ""), "killed")) == 0
    assert same(checkpoint(tmp_path / "whole")["model"], checkpoint(out)["model"])
    assert [record["step"] for record in read_log(out)] == list(range(1, 61))


def test_a_second_run_in_the_same_folder_is_refused(tiny, tmp_path, no_sample, capsys):
    (tmp_path / "out").mkdir()
    held = train.lock(tmp_path / "out")
    for more in ("", " --resume"):
        assert train.main(tiny("--fp8 none --steps 1" + (more if train.checkpoints(tmp_path / "out") else ""))) == 2
        assert "is in use by another run" in capsys.readouterr().err
    held.close()
    assert train.main(tiny("--fp8 none --steps 1")) == 0


def test_a_folder_with_a_running_run_below_it_is_not_renamed(tiny, tmp_path, no_sample, capsys):
    run(tiny("--fp8 none --steps 1"))
    (tmp_path / "out" / "second").mkdir()
    held = train.lock(tmp_path / "out" / "second")
    assert train.main(tiny("--fp8 none --steps 1")) == 2
    assert "second is in use by another run" in capsys.readouterr().err and not (tmp_path / "out.1").exists()
    held.close()
    assert train.main(tiny("--fp8 none --steps 1")) == 0 and (tmp_path / "out.1" / "second").exists()


def test_an_earlier_run_is_renamed_and_never_overwritten(tiny, tmp_path, no_sample):
    runs = []
    for seed in (1, 2, 3):
        run(tiny(f"--fp8 none --steps 1 --seed {seed}"))
        runs.append(newest(tmp_path / "out").read_bytes())
    assert [newest(tmp_path / name).read_bytes() for name in ("out.1", "out.2", "out")] == runs


def test_an_output_folder_that_is_a_link_stays_one(tiny, tmp_path, no_sample):
    (tmp_path / "large disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "large disk")
    for _ in range(2):
        run(tiny("--fp8 none --steps 1"))
    assert (tmp_path / "out").resolve() == tmp_path / "large disk" and (tmp_path / "large disk.1").is_dir()


@pytest.mark.parametrize("out, data", [(".", "text.txt"), ("..", "text.txt"), ("exp", "exp/data"), ("exp", "exp/*.bin"),
                                       ("exp", "exp")])
def test_an_output_folder_whose_renaming_would_take_other_things_along_is_refused(out, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(train.UserError, match=f"--out {re.escape(out)} .*folder of its own"):
        config(out=out, data=data)


def test_the_current_folder_can_be_the_output_twice(tiny, tmp_path, monkeypatch, no_sample):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for _ in range(2):
        assert train.main(tiny("--fp8 none --steps 1 --out .")) in (0, 2)   # done or refused, but no traceback


# ---------------------------------------------------------------------------------------------------
# Mistakes: exit code 2, one line that says what, why and what to do, and nothing written


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(command, words, folder, capsys):
    before = contents(folder)
    assert train.main(command) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    for word in words:
        assert word in lines[0]
    assert contents(folder) == before


def write_tokens(path, tokens, dtype=np.uint16):
    np.asarray(tokens, dtype).tofile(path)


def write_shard(path, tokens, magic=20240520, version=1, count=None):
    """llm.c's format: 256 int32, of which three are used, then the tokens."""
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, np.uint16).tobytes())


def write_truncated(path):
    np.save(path, np.zeros(1000, np.uint16))
    path.write_bytes(path.read_bytes()[:500])


BAD_DATA = {   # name of the file: (how it is made, what the line says)
    "nowhere": (lambda p: None, ["nowhere", "does not exist", "give a folder or a file"]),
    "empty.txt": (lambda p: p.touch(), ["empty.txt", "holds no tokens", "are read"]),
    "empty_folder": (lambda p: p.mkdir(), ["empty_folder", "holds no tokens", "are read"]),
    "short.txt": (lambda p: p.write_text("ten bytes."), ["training data has 9 tokens", "--seq 16", "give more data"]),
    "no_val.txt": (lambda p: p.write_text("x" * 100), ["validation data has 5 tokens", "--seq 16", "give more data"]),
    "big_id.bin": (lambda p: write_tokens(p, [3, 256] * 500), ["token id 256", "big_id.bin", "256", "--model nano"]),
    "negative.npy": (lambda p: np.save(p, np.full(999, -7)), ["token id -7", "negative.npy", "--model nano"]),
    "odd.bin": (lambda p: p.write_bytes(b"x" * 1001), ["odd.bin", "1001", "uint16 tokens are expected"]),
    "old.bin": (lambda p: write_shard(p, [1] * 999, version=7), ["old.bin", "version", "7", "only version 1"]),
    "cut.bin": (lambda p: write_shard(p, [1] * 999, count=1000), ["cut.bin", "1000 tokens", "3022 bytes", "copy it"]),
    "header.bin": (lambda p: write_tokens(p, [20240520], np.int32), ["header.bin", "version", "only version 1"]),
    "matrix.npy": (lambda p: np.save(p, np.zeros((9, 9), np.uint16)), ["matrix.npy", "(9, 9)", "one-dimensional"]),
    "packed.npz": (lambda p: np.savez(p, np.zeros(999, np.uint16)), ["packed.npz", "neither .bin nor", "zero bytes"]),
    "float.npy": (lambda p: np.save(p, np.zeros(999, np.float32)), ["float.npy", "float32", "integers"]),
    "garbage.npy": (lambda p: p.write_bytes(b"garbage" * 99), ["garbage.npy", "not a readable", "numpy.save"]),
    "cut.npy": (write_truncated, ["cut.npy", "not a readable", "numpy.save"]),
    "renamed.npy": (lambda p: np.savez(p.open("wb"), np.zeros(999)), ["renamed.npy", "NpzFile", "one-dimensional"]),
    "header.npy": (lambda p: p.write_bytes(b"\x93NUMPY\x01\x00\x10\x00{'descr': (((((\n"), ["header.npy", "readable"]),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_refused(name, tiny, tmp_path, capsys):
    make, words = BAD_DATA[name]
    make(tmp_path / name)
    assert_refused(tiny(f"--data {tmp_path / name}"), words, tmp_path, capsys)


def test_tokens_of_two_types_in_a_folder_are_refused(tiny, tmp_path, capsys):
    (tmp_path / "mixed").mkdir()
    for dtype in (np.uint16, np.int32):
        np.save(tmp_path / "mixed" / f"{dtype.__name__}.npy", np.zeros(999, dtype))
    assert_refused(tiny(f"--data {tmp_path / 'mixed'}"), ["int32 and uint16", "one kind per folder"], tmp_path, capsys)


BAD_OPTIONS = {   # options: what the line says
    "--model gpt5": ["--model gpt5", "no preset", "nano, 124m"],
    "--fp8 e3m4": ["--fp8 e3m4", "no recipe", "none, tensor, group, mx, moss"],
    "--bench --fp8 none,e3m4": ["--fp8 e3m4", "no recipe"],
    "--fp8 none,moss": ["--fp8 none,moss", "no recipe"],   # several only to --bench and --eval-only
    "--fp8 none,moss --eval-only --sample a": ["--fp8 none,moss", "no recipe"],
    "--fp8 none,e3m4 --eval-only": ["--fp8 e3m4", "no recipe: choose one of none, "],
    "--recompute all": ["--recompute all", "none, act, block"],
    "--bench --shard": ["--shard is for recipes that predict", "none"],
    "--fp8 group --recompute act": ["--recompute act", "group", "--recompute block"],
    "--device tpu": ["--device tpu", "no device", "use cpu"],
    "--device cuda:99": ["--device cuda:99", "GPU 99", "use --device cpu"],
    "--device meta": ["--device meta", "not supported", "use cpu"],
    "--batch 1 --seq 24": ["--batch 1", "--seq 24", "24 tokens", "multiple of 16", "change --batch or --seq"],
    "--warmup -1": ["--warmup -1", "negative"],
    "--rescale_interval -1": ["--rescale_interval -1", "negative"],
    "--weight_decay -0.1": ["--weight_decay -0.1", "negative"],
    "--weight_decay nan": ["--weight_decay nan", "negative"],
    "--lr 0": ["--lr 0", "positive"],
    "--lr -0.001": ["--lr -0.001", "positive"],
    "--lr nan": ["--lr nan", "positive"],
    "--lr inf": ["--lr inf", "positive"],
    "--clip 0": ["--clip 0", "positive"],
    "--beta1 1": ["--beta1 1", "[0, 1)"],
    "--beta2 -0.5": ["--beta2 -0.5", "[0, 1)"],
    "--fp8 moss --beta1 0.95 --beta2 0.9": ["0.95", "0.9", "bound"],   # autoscale.py has no bound for these
    "--seed -1": ["--seed -1"],
    "--seed 99999999999999999999": ["--seed 99999999999999999999"],
    **{f"--{name} {value}": [f"--{name} {value}", "at least 1"] for value in (0, -3) for name in
       ("layers", "steps", "batch", "accum", "seq", "log_every", "eval_every", "eval_batches", "max_skips")},
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_an_option_that_cannot_work_is_refused(options, tiny, tmp_path, capsys):
    assert_refused(tiny(options), BAD_OPTIONS[options], tmp_path, capsys)


@pytest.mark.parametrize("options", ["--learning_rate 1", "--step 5", "--steps many", "--steps"])
def test_unknown_and_malformed_options_are_refused(options, tiny, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(tiny(options))
    assert stop.value.code == 2
    assert options.split()[0] in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_options_are_spelled_with_underscores_or_dashes():
    assert train.parse_config(["--max_skips", "3"]) == train.parse_config(["--max-skips", "3"])


def test_micro_batches_that_ranks_cannot_share_are_refused_with_a_number_that_works():
    with pytest.raises(train.UserError, match="--accum 3 .* 2 ranks: use --accum 4"):
        train.resolve(train.Config(model="nano", accum=3), CPU, world=2)


def test_an_output_folder_that_is_a_file_is_refused(tiny, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert_refused(tiny("--fp8 none"), ["--out", "cannot be written", "choose another"], tmp_path, capsys)


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r != "none"])
def test_a_width_that_a_recipe_cannot_tile_is_refused_by_layer(recipe):
    shape = dataclasses.replace(PRESETS["nano"], ffn=40)
    with pytest.raises(ValueError, match="layer blocks.0.down: in = 40 .* multiple of 16.*change d, ffn"):
        Transformer(shape, recipe)
    Transformer(shape, "none")


def test_a_preset_that_a_recipe_cannot_tile_is_refused_by_layer(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(train.PRESETS, "nano", dataclasses.replace(PRESETS["nano"], ffn=40))
    assert_refused(tiny("--fp8 moss"), ["blocks.0.down", "40", "--fp8 none"], tmp_path, capsys)


@pytest.mark.parametrize("wrong, named", [(dict(d=100), "d = 100 must be a multiple of 8"),
                                          (dict(kv_heads=3), "heads = 4 must be a multiple of 3"),
                                          (dict(norm="batch"), "norm 'batch' is unknown")])
def test_a_shape_that_does_not_divide_is_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        ModelConfig(**{**dict(vocab=256, seq=16, d=128, layers=1, heads=4, ffn=64), **wrong})


def test_resume_without_a_checkpoint_is_refused(tiny, tmp_path, capsys):
    assert_refused(tiny("--resume"), ["--resume", str(tmp_path / "out"), "check --out"], tmp_path, capsys)


def test_resume_of_another_configuration_is_refused(tiny, tmp_path, monkeypatch, no_sample, capsys):
    run(tiny("--fp8 none --steps 1"))
    capsys.readouterr()
    monkeypatch.setitem(train.PRESETS, "nano", dataclasses.replace(PRESETS["nano"], ffn=256))
    assert_refused(tiny("--fp8 none --resume"), ["ffn = 384", "ffn = 256", "use the --model"], tmp_path, capsys)


@pytest.mark.parametrize("state", [{"model": {}, "iter_num": 5, "step": 1}, [1, 2, 3]], ids=["a dict", "a list"])
def test_resume_from_another_programs_checkpoint_is_refused(state, tiny, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    made = tmp_path / "file"
    torch.save(state, made)
    made.rename(tmp_path / "out" / f"step_00000001_{train.checksum(made)}.pt")
    assert_refused(tiny("--fp8 none --resume"), ["--resume", "step_00000001", "no checkpoint of"], tmp_path, capsys)


@pytest.mark.parametrize("content", [b"", b"garbage" * 1000])
def test_resume_where_no_checkpoint_is_whole_is_refused(content, tiny, tmp_path, no_sample, capsys):
    run(tiny("--fp8 none --steps 1"))
    capsys.readouterr()
    newest(tmp_path / "out").write_bytes(content)
    assert_refused(tiny("--fp8 none --resume"), ["--resume", "no checkpoint in", "is whole"], tmp_path, capsys)


# ---------------------------------------------------------------------------------------------------
# Data formats


def all_of(tokens):
    return tokens.read(0, len(tokens)).tolist() if len(tokens) else []


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
    assert all_of(training) == list(range(1000, 3000))
    assert all_of(validation) == list(range(100))


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64", ">u2"])
def test_npy_files_may_hold_any_integers(dtype, tmp_path):
    np.save(tmp_path / "tokens.npy", np.arange(1000).astype(dtype))
    training, validation, _ = train.open_data(str(tmp_path / "tokens.npy"))
    assert all_of(training) == list(range(950))
    assert all_of(validation) == list(range(950, 1000))


def test_a_text_file_is_its_bytes_and_its_end_the_validation_data(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    training, validation, vocab = train.open_data(str(tmp_path / "text.txt"))
    assert bytes(all_of(training)) + bytes(all_of(validation)) == TEXT.encode()
    assert len(validation) == len(TEXT) // 20
    assert vocab == 256


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


def test_a_text_file_named_val_is_the_validation_data(tmp_path):
    (tmp_path / "train.txt").write_text("a" * 1000)
    (tmp_path / "val.txt").write_text("b" * 500)
    train_data, val_data, vocab = train.open_data(tmp_path)
    assert (len(train_data), len(val_data), vocab) == (1000, 500, 256)
    assert set(val_data.read(0, 500)) == {ord("b")}


def test_only_the_whole_word_val_names_validation_data(tmp_path):
    for name in ("interval.bin", "retrieval.bin", "shard_val_0.bin"):
        np.arange(100, dtype=np.uint16).tofile(tmp_path / name)
    train_data, val_data, _ = train.open_data(tmp_path)
    assert [path.name for path, _, _ in val_data.parts] == ["shard_val_0.bin"] and len(train_data) == 200


def test_many_text_files_are_split_by_file_the_same_way_wherever_they_lie(tmp_path):
    write_texts(tmp_path / "many", 200)
    write_texts(tmp_path / "copy", 200)
    first, again, moved = (train.open_data(str(tmp_path / name))[:2] for name in ("many", "many", "copy"))
    names = [[{part[0].name for part in tokens.parts} for tokens in split] for split in (first, again, moved)]
    assert names[0] == names[1] == names[2]
    training, validation = names[0]
    assert not training & validation and len(training | validation) == 200
    assert 2 <= len(validation) <= 20   # a twentieth of 200 is 10; by a checksum, so give or take 3 deviations


def test_binary_hidden_and_cached_files_are_no_text(tmp_path):
    write_texts(tmp_path / "folder", 2)
    for name in (".git/config", "__pycache__/a.txt", "picture.png", ".hidden.txt"):
        path = tmp_path / "folder" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\0" * 100 if name == "picture.png" else b"x" * 100)
    training, validation, _ = train.open_data(str(tmp_path / "folder"))
    assert {part[0].name for part in training.parts + validation.parts} == {"000.txt", "001.txt"}


def test_read_across_files_is_a_slice_of_their_concatenation(tmp_path):
    pieces, start = [], 0
    for size in (5, 0, 1, 7, 3):   # an empty file, and windows that span three
        pieces.append((np.arange(start, start + size, dtype=np.uint16), tmp_path / f"{len(pieces)}.bin"))
        write_tokens(pieces[-1][1], pieces[-1][0])
        start += size
    tokens = train.Tokens([(path, 0, len(piece)) for piece, path in pieces], np.uint16)
    everything = np.concatenate([piece for piece, _ in pieces]).astype(np.int64)
    assert len(tokens) == 16
    for first in range(16):
        for count in range(1, 17 - first):
            window = tokens.read(first, count)
            assert window.dtype == np.int64 and np.array_equal(window, everything[first:first + count])
        assert tokens.file_at(first) == next(path for piece, path in pieces if first in piece)


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.3, 0.5, 0.99, 1.0])
def test_split_cuts_the_sequence_in_two_and_loses_nothing(fraction, tmp_path):
    write_shard(tmp_path / "a.bin", range(60))
    write_tokens(tmp_path / "b.bin", range(60, 100))
    tokens = train.Tokens([(tmp_path / "a.bin", 1024, 60), (tmp_path / "b.bin", 0, 40)], np.uint16)
    head, tail = tokens.split(fraction)
    assert all_of(head) + all_of(tail) == list(range(100))
    assert len(tail) == pytest.approx(100 * fraction, abs=1)   # to a token: a cut lies between two


def test_a_large_file_is_read_window_by_window(tmp_path):
    with open(tmp_path / "large.bin", "wb") as f:
        f.truncate(2**30)   # a hole: takes no space on the disk
    tracemalloc.start()
    training, validation, _ = train.open_data(str(tmp_path / "large.bin"))
    batches = train.Batches(training, config(), 256, "training")
    for step in range(10):
        batches.step(step, 0, CPU)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(training) + len(validation) == 2**29
    assert peak < 2**20   # bytes; measured 40 kB


def test_the_default_corpus_is_split_by_file_the_same_way_twice():
    (training, validation, vocab), again = train.open_data(None), train.open_data(None)
    assert training.parts == again[0].parts and validation.parts == again[1].parts
    assert vocab == 256
    files = [{part[0] for part in tokens.parts} for tokens in (training, validation)]
    assert not files[0] & files[1]
    assert all(path.suffix == ".py" and "site-packages" not in path.parts for path in files[0] | files[1])
    assert 0.02 < len(validation) / (len(training) + len(validation)) < 0.1   # a twentieth of the files, not of bytes


def test_the_default_corpus_is_read_window_by_window(monkeypatch):
    training, _, vocab = train.open_data(None)
    sizes, original = [], np.memmap
    monkeypatch.setattr(np, "memmap", lambda *a, **k: sizes.append(k["shape"][0]) or original(*a, **k))
    train.Batches(training, config(), vocab, "training").step(0, 0, CPU)
    assert len(sizes) >= 64 + 2   # 64 windows are looked at in the beginning, a batch has 2
    assert max(sizes) <= 17       # 16 tokens and the one after


def test_a_run_on_token_files_ends_with_a_sample_however_short_the_sequence(tiny, tmp_path):
    write_tokens(tmp_path / "train.bin", [1, 2, 3, 4] * 50)
    write_tokens(tmp_path / "val.bin", [1, 2, 3, 4] * 3)
    assert run(tiny(f"--data {tmp_path} --fp8 none --seq 8 --steps 1"))["steps"] == 1


# ---------------------------------------------------------------------------------------------------
# Loss and gradients that are not finite

POISONED = "blocks.1.down"


@pytest.mark.parametrize("recipe", ["none", "moss"])
def test_a_step_with_a_nan_gradient_is_skipped_and_counted(recipe, tiny, monkeypatch, no_sample):
    poison_gradient(monkeypatch, f"{POISONED}.weight", {2})
    states = record_states(monkeypatch)   # after steps 1 to 4
    summary = run(tiny(f"--fp8 {recipe} --eval_every 1"))
    for part in ("model", "scales", "optimizer"):
        assert same(states[2][part], states[1][part]), part
    for before, after in ((0, 1), (2, 3)):
        assert not same(states[before]["model"], states[after]["model"])
    assert [state["skipped"] for state in states] == [0, 0, 1, 1]
    assert [state["updates"] for state in states] == [1, 2, 2, 3]
    assert summary["skipped_steps"] == 1


def test_an_infinite_loss_is_skipped_too(tiny, monkeypatch, no_sample):
    original, calls = Transformer.forward, itertools.count()

    def forward(self, tokens, targets=None):   # call 0 is the evaluation before the first step
        return original(self, tokens, targets) * (math.inf if next(calls) == 1 else 1)
    monkeypatch.setattr(Transformer, "forward", forward)
    states = record_states(monkeypatch)
    assert run(tiny("--fp8 none"))["skipped_steps"] == 1
    assert all(weight.isfinite().all() for weight in states[-1]["model"].values())


def test_skips_that_are_not_in_a_row_do_not_stop_the_run(tiny, monkeypatch, no_sample):
    poison_gradient(monkeypatch, f"{POISONED}.weight", {0, 1, 3, 4})
    record_states(monkeypatch)
    assert run(tiny("--fp8 none --steps 6 --max_skips 3"))["skipped_steps"] == 4


def assert_stops(command, words, capsys):
    """Exit code 1 and one line on stderr."""
    assert train.main(command) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    for word in words:
        assert word in lines[0]


THREE_SKIPS = "3 steps in a row had to be skipped"


def test_a_run_whose_outputs_stay_nan_stops_and_names_the_layer(tiny, monkeypatch, capsys):
    on_model(monkeypatch, lambda model: model.blocks[1].down.register_forward_hook(lambda _, __, y: y * math.nan))
    assert_stops(tiny("--fp8 mx --max_skips 3"), [THREE_SKIPS, f"the output of {POISONED}"], capsys)


def test_a_run_whose_gradients_stay_nan_stops_and_names_the_layer(tiny, monkeypatch, capsys):
    poison_gradient(monkeypatch, f"{POISONED}.weight", ALWAYS)
    assert_stops(tiny("--fp8 none --max_skips 3"), [THREE_SKIPS, f"the gradient of {POISONED}.weight"], capsys)


def test_a_run_that_stops_leaves_its_last_good_checkpoint_and_names_it(tiny, tmp_path, monkeypatch, capsys):
    poison_gradient(monkeypatch, f"{POISONED}.weight", range(2, 10**6))
    assert_stops(tiny("--fp8 none --steps 9 --max_skips 3 --eval_every 2"), ["step_00000004", "last good one"], capsys)
    assert all(weight.isfinite().all() for weight in checkpoint(tmp_path / "out")["model"].values())


def test_a_run_that_never_saved_names_no_checkpoint(tiny, tmp_path, monkeypatch, capsys):
    poison_gradient(monkeypatch, f"{POISONED}.weight", ALWAYS)
    assert train.main(tiny("--fp8 none --max_skips 2 --eval_every 4")) == 1
    assert not train.checkpoints(tmp_path / "out")
    assert "nothing was saved yet" in capsys.readouterr().err


def poisoned_model(recipe, weight_value):
    """nano with one value of a weight replaced, and a batch for it."""
    torch.manual_seed(0)
    net = Transformer(dataclasses.replace(PRESETS["nano"], seq=16), recipe)
    layer = dict(net.named_modules())[POISONED]
    with torch.no_grad():
        layer.weight[3, 5] = layer.weight[3, 5] if weight_value is None else weight_value
    c = config(fp8=recipe)
    train.requantize(net, train.make_scales(net, train.make_optimizer(net, c), c))
    return net, torch.randint(256, (2, 16)), torch.randint(256, (2, 16))


@for_recipes
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_first_layer_whose_output_is_not_finite_is_found(recipe, value):
    assert train.first_non_finite(*poisoned_model(recipe, value)) == f"the output of {POISONED}"


def test_the_first_layer_is_found_in_a_compiled_model_too():
    torch._dynamo.reset()
    net, tokens, targets = poisoned_model("none", None)
    net.compile(backend="aot_eager", dynamic=False)
    with torch.no_grad():
        net(tokens, targets)   # now there is a graph that knows no hooks
        dict(net.named_modules())[POISONED].weight[3, 5] = math.nan
    assert train.first_non_finite(net, tokens, targets) == f"the output of {POISONED}"


@pytest.mark.parametrize("recipe", ["none", "moss"])
def test_a_gradient_that_alone_is_not_finite_is_found(recipe):
    net, tokens, targets = poisoned_model(recipe, None)
    net(tokens, targets).backward()
    nothing = "the loss or the norm of the gradient"   # all is finite
    assert train.first_non_finite(net, tokens, targets) == nothing
    dict(net.named_modules())[POISONED].weight.grad[0, 0] = math.nan
    assert train.first_non_finite(net, tokens, targets) == f"the gradient of {POISONED}.weight"


# ---------------------------------------------------------------------------------------------------
# The log, the schedule, evaluations


def test_the_log_has_a_json_object_per_line(tiny, tmp_path, no_sample):
    run(tiny("--fp8 none --steps 6 --log_every 2 --eval_every 3"))
    records = read_log(tmp_path / "out")
    assert [record["step"] for record in records] == [2, 3, 4, 6]
    for record in records:
        assert {"step", "loss", "lr", "grad_norm", "tokens_per_s", "skipped"} <= record.keys()
        assert record["tokens_per_s"] > 0
    assert [record["step"] for record in records if "val_loss" in record] == [3, 6]


def test_the_first_line_of_the_log_says_what_was_run_on_what(tiny, tmp_path, no_sample):
    run(tiny("--fp8 none --seed 7"))
    first, *others = read_log(tmp_path / "out")
    assert first["config"]["seed"] == 7 and first["config"]["model"] == "nano" and first["command"]
    assert first["torch"] == torch.__version__ and first["hardware"] == f"1 x {os.cpu_count()} CPU cores"
    assert not any("config" in record for record in others)


def test_the_summary_is_the_end_of_the_log(tiny, tmp_path, no_sample):
    summary, last = run(tiny("--fp8 none")), read_log(tmp_path / "out")[-1]
    assert summary["train_loss"] == round(last["loss"], 4)
    assert summary["val_loss"] == round(last["val_loss"], 4)
    assert summary["tokens"] == 4 * 2 * 16   # steps x sequences x tokens


def test_the_log_shows_how_healthy_the_scales_of_moss_are(tiny, tmp_path, no_sample):
    run(tiny("--fp8 moss --steps 6 --rescale_interval 4"))
    for record in read_log(tmp_path / "out"):
        assert record["scale_ratio"] >= record["scale_ratio_min"] >= 1   # no weight outgrows its predicted scale
        assert record["saturated"] == 0                                  # rule "up": no activation is cut off
        assert 0 <= record["folded"] < 0.05                              # measured 0.0003 to 0.001


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


def test_the_log_stays_json_where_a_number_is_not_finite(tiny, tmp_path, monkeypatch, no_sample):
    poison_gradient(monkeypatch, f"{POISONED}.weight", {1})
    run(tiny("--fp8 none"))
    for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)   # called for NaN and Infinity, which JSON does not know


def test_the_learning_rate_warms_up_to_its_peak_and_falls_along_a_cosine_to_a_tenth():
    c = config(steps=110, warmup=10, lr=2.0)
    rates = [train.learning_rate(step, c) for step in range(111)]
    assert rates[0] == pytest.approx(2 / 11)   # warm-up begins above zero: no step is wasted
    assert np.diff(rates[:11]) == pytest.approx(2 / 11)
    assert rates[10] == max(rates) == 2.0
    assert rates[60] == pytest.approx((2.0 + 0.2) / 2)
    assert all(np.diff(rates[10:]) < 0)
    assert rates[110] == pytest.approx(0.2)


def test_without_warm_up_the_first_step_has_the_peak_learning_rate():
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
    norms = {id(p) for name, p in net.named_parameters() if "norm" in name}
    assert {id(p) for p in spared["params"]} == norms
    assert sum(len(group["params"]) for group in (*decayed, spared)) == len(list(net.parameters()))


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r != "none"])
def test_weights_are_quantized_once_per_optimizer_step(recipe, tiny, monkeypatch, no_sample):
    calls, original = [], model.quantize_weight
    monkeypatch.setattr(model, "quantize_weight", lambda *a: calls.append(0) or original(*a))
    run(tiny(f"--fp8 {recipe} --steps 3 --accum 4"))
    assert len(calls) == (1 + 3) * LAYERS   # at the start, and after each step; not per micro-batch or evaluation


@pytest.mark.parametrize("recipe", ["none", "moss"])
def test_an_evaluation_gives_the_same_number_twice(recipe):
    training, validation, vocab = train.open_data(str(ROOT / "train.py"))
    net = poisoned_model(recipe, None)[0]
    batches = train.Batches(validation, config(fp8=recipe, eval_batches=3), vocab, "validation")
    random_state = torch.get_rng_state()
    first, second = (train.evaluate(net, batches, train.Ranks(0, 1, CPU)) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), random_state)


def test_evaluating_more_often_changes_no_weight(tiny, monkeypatch, no_sample):
    states = record_states(monkeypatch)
    run(tiny("--fp8 moss --eval_every 1"))
    run(tiny("--fp8 moss --eval_every 4"))
    assert len(states) == 5   # one run saved 4 times, the other once
    assert same(states[3]["model"], states[4]["model"])


def test_watching_the_scales_changes_no_weight(tiny, monkeypatch, no_sample):
    states = record_states(monkeypatch)
    for log_every in (1, 4):
        run(tiny(f"--fp8 moss --eval_every 4 --log_every {log_every}"))
    assert same(states[0]["model"], states[1]["model"])


# ---------------------------------------------------------------------------------------------------
# The command line


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


# ---------------------------------------------------------------------------------------------------
# --bench

BENCH = "--bench --device cpu --model nano --layers 1 --seq 16 --batch 2 --steps 2".split()


def test_bench_prints_a_row_for_every_recipe_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(BENCH) == 0
    rows = capsys.readouterr().out.splitlines()[-len(RECIPES):]
    assert [row.split()[0] for row in rows] == list(RECIPES)
    assert list(tmp_path.iterdir()) == []


def test_bench_counts_the_tokens_of_all_micro_batches_and_one_optimizer_step(capsys):
    c = train.resolve(train.parse_config([*BENCH, "--accum", "3", "--fp8", "none,moss"]), CPU, 1)
    for row in train.bench(c, CPU).values():
        seconds = (3 * row["fwd+bwd ms"] + row["optimizer ms"]) / 1e3
        assert row["tokens/s"] == pytest.approx(3 * 2 * 16 / seconds)
    assert " nan" not in capsys.readouterr().out.replace("nano", "")   # what a CPU does not know is a dash


def test_bench_compares_with_bf16_only_where_that_was_timed(capsys):
    c = train.resolve(train.parse_config([*BENCH, "--fp8", "moss,none"]), CPU, 1)
    rows = train.bench(c, CPU)
    assert math.isnan(rows["moss"]["x none"]) and rows["none"]["x none"] == 1


@pytest.mark.parametrize("recompute", ["act", "block"])
def test_recomputing_activations_changes_no_bit_of_a_run(recompute, tiny, tmp_path, no_sample):
    run(tiny("--fp8 moss", out="kept"))
    run(tiny(f"--fp8 moss --recompute {recompute}", out="again"))
    assert same(checkpoint(tmp_path / "kept")["model"], checkpoint(tmp_path / "again")["model"])


def test_layers_is_the_number_of_blocks(tiny, tmp_path, no_sample):
    run(tiny("--fp8 none --layers 2"))
    names = checkpoint(tmp_path / "out")["model"]
    assert {name.split(".")[1] for name in names if name.startswith("blocks.")} == {"0", "1"}


# ---------------------------------------------------------------------------------------------------
# What else can go wrong with data and losses, and what a checkpoint can do

def test_a_corrupted_batch_is_skipped_counted_and_named(tiny, tmp_path, monkeypatch, no_sample, capsys):
    np.save(tmp_path / "tokens.npy", np.arange(4000, dtype=np.int32) % 256)
    command = tiny(f"--fp8 none --data {tmp_path / 'tokens.npy'} --steps 6")
    monkeypatch.setitem(train.PRESETS, "nano", dataclasses.replace(PRESETS["nano"], vocab=256))

    def corrupt():
        np.save(tmp_path / "tokens.npy", np.full(4000, 999, np.int32))

    def mend():
        np.save(tmp_path / "tokens.npy", np.arange(4000, dtype=np.int32) % 256)
    do_at_step(monkeypatch, 2, corrupt)
    do_at_step(monkeypatch, 3, mend)
    assert run(command)["skipped_steps"] == 1
    assert f"step 3, rank 0: token id 999 in {tmp_path / 'tokens.npy'}" in capsys.readouterr().out


def test_a_gradient_out_of_all_proportion_is_skipped(tiny, monkeypatch, no_sample):
    losses, original = iter(range(10**6)), train.forward_backward

    def spy(model, *arguments, **options):
        loss = original(model, *arguments, **options)
        if next(losses) == 25:
            for p in model.parameters():
                p.grad *= 1e4
        return loss
    monkeypatch.setattr(train, "forward_backward", spy)
    states = record_states(monkeypatch)
    assert run(tiny("--fp8 none --steps 28 --eval_every 1"))["skipped_steps"] == 1
    assert same(states[25]["model"], states[24]["model"]) and not same(states[26]["model"], states[25]["model"])


def test_eval_only_reports_the_loss_that_the_run_ended_with_and_its_perplexity(tiny, tmp_path, no_sample, capsys):
    loss = run(tiny("--fp8 moss"))["val_loss"]
    before = sorted(p.name for p in (tmp_path / "out").iterdir())
    capsys.readouterr()
    assert train.main(tiny("--fp8 moss --steps 9 --eval-only --resume")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1   # and no note that other options had other values
    assert f"step 4, validation loss {loss:.4f}, perplexity " in lines[0]
    perplexity = float(lines[0].split("perplexity ")[1].split(",")[0])
    assert perplexity == pytest.approx(math.exp(loss), rel=2e-4)   # the summary rounds the loss to 4 digits
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == before


def test_ranks_share_an_evaluation_and_rank_0_reports_it(tiny, monkeypatch, no_sample, capsys):
    run(tiny("--fp8 none"))
    capsys.readouterr()
    seen = []
    monkeypatch.setattr(train, "evaluate", lambda model, batches, ranks: seen.append(ranks.rank) or 1.0)
    for rank in (1, 0):
        monkeypatch.setattr(train, "start_ranks", lambda _, rank=rank: train.Ranks(rank, 2, CPU))
        assert train.main(tiny("--fp8 none --eval-only --accum 2")) == 0
        assert ("validation loss 1.0000" in capsys.readouterr().out) == (rank == 0)
    assert seen == [1, 0]


def test_another_recipe_or_other_data_than_those_of_the_training_are_said(tiny, no_sample, capsys):
    run(tiny("--fp8 none"))
    capsys.readouterr()
    assert train.main(tiny("--fp8 moss --eval-only --seq 32")) == 0
    printed = capsys.readouterr().out
    assert "--fp8 was none" in printed and "--seq was 16" in printed


def test_a_perplexity_beyond_all_numbers_is_inf(tiny, monkeypatch, no_sample, capsys):
    run(tiny("--fp8 none"))
    monkeypatch.setattr(train, "evaluate", lambda *_: 1e4)
    assert train.main(tiny("--fp8 none --eval-only")) == 0 and "perplexity inf" in capsys.readouterr().out


def test_a_run_is_evaluated_from_within_its_folder(tiny, tmp_path, monkeypatch, no_sample):
    run(tiny("--fp8 none"))
    monkeypatch.chdir(tmp_path / "out")
    assert train.main([*tiny("--fp8 none --eval-only"), "--out", "."]) == 0


def test_recipes_are_compared_at_the_weights_of_a_checkpoint(tiny, tmp_path, no_sample, capsys):
    run(tiny("--fp8 moss --steps 8 --eval_batches 3"))
    before = sorted(p.name for p in (tmp_path / "out").iterdir())
    capsys.readouterr()
    assert train.main(tiny(f"--fp8 {','.join(RECIPES)} --eval-only --eval_batches 3")) == 0
    head, _, titles, *rows = capsys.readouterr().out.splitlines()
    assert "step 8; 3 micro-batches of 2 x 16 validation tokens" in head
    assert titles.split() == ["recipe", "loss", "gradient", "qkv", "out", "gate_up", "down"]
    for recipe, row in zip(RECIPES, rows, strict=True):
        name, loss, *errors = row.split()
        assert name == recipe and train.main(tiny(f"--fp8 {recipe} --eval-only --eval_batches 3")) == 0
        assert f"validation loss {loss}," in capsys.readouterr().out
        errors = [float(error.rstrip("%")) for error in errors]
        # Every one of some six roundings on the way, to 3 or (tensor) 2 bits, is wrong by 2.6% or 5% of the value.
        assert errors == [0] * 5 if recipe == "none" else 0.5 < min(errors) <= max(errors) < 20
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == before


def test_the_mean_gradient_is_that_of_all_micro_batches_together(tiny):
    c = train.resolve(train.parse_config(tiny("--fp8 none --eval_batches 3")), CPU, 1)
    model, _, batches = train.build(c, CPU)
    loss, gradient, deviation = train.mean_gradient(model, batches, CPU)
    pairs = [batches.evaluation(i, CPU) for i in range(3)]
    expected = model(*(torch.cat(side) for side in zip(*pairs)))
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    flat = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(torch.cat([g.flatten() for g in gradient.values()]), flat, rtol=1e-4, atol=1e-6)
    ones = []
    for pair in pairs:
        model.zero_grad()
        model(*pair).backward()
        ones.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert deviation == pytest.approx((torch.stack(ones).var(0).sum().sqrt() / flat.norm()).item(), rel=1e-3)


def test_a_comparison_of_recipes_is_for_one_process(tiny, monkeypatch, capsys):
    monkeypatch.setattr(train, "start_ranks", lambda _: train.Ranks(0, 2, CPU))
    assert train.main(tiny("--fp8 none,moss --eval-only")) == 2
    assert "2 ranks cannot share it, run it without torchrun" in capsys.readouterr().err


def test_other_data_under_the_same_name_are_said_at_resume(tiny, tmp_path, monkeypatch, no_sample, capsys):
    monkeypatch.setattr(train, "evaluate", lambda *_: 1.0)
    run(tiny("--fp8 none --steps 2"))
    (tmp_path / "text.txt").write_text(2 * TEXT)
    monkeypatch.setattr(train, "evaluate", lambda *_: 2.0)
    run(tiny("--fp8 none --resume"))
    assert "4,275 training and 225 validation tokens" in capsys.readouterr().out.split("note: ")[1].splitlines()[0]
    assert checkpoint(tmp_path / "out")["best"] == [2.0, 4]


def test_a_best_checkpoint_is_not_compared_across_validation_data(tiny, tmp_path, monkeypatch, no_sample):
    monkeypatch.setattr(train, "evaluate", lambda *_: 1.0)
    run(tiny("--fp8 none --steps 2"))
    monkeypatch.setattr(train, "evaluate", lambda *_: 2.0)
    run(tiny("--fp8 none --resume --eval_batches 2"))
    assert checkpoint(tmp_path / "out")["best"] == [2.0, 4]


def test_sample_goes_on_with_a_text(tiny, capsys):
    run(tiny("--fp8 none"))
    capsys.readouterr()
    assert train.main([*tiny("--fp8 none"), "--sample", "the quick"]) == 0
    written = capsys.readouterr().out
    assert "the quick" in written and len(written.encode()) >= len("the quick") + 200
    assert train.main([*tiny("--fp8 none"), "--sample", "\udcff"]) == 0   # how Python takes a byte that is no text
    capsys.readouterr()
    assert train.main([*tiny("--fp8 none"), "--sample", ""]) == 2
    assert "--sample is empty" in capsys.readouterr().err


def test_plot_draws_the_losses_of_several_runs(tiny, tmp_path, no_sample, capsys):
    pytest.importorskip("matplotlib")
    for name in ("a", "b"):
        run(tiny("--fp8 none", name))
    out = f"{tmp_path / 'a'},{tmp_path / 'b'}"
    assert train.main(["--plot", str(tmp_path / "curves.png"), "--out", out]) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert train.main(["--plot", str(tmp_path / "curves.png"), "--out", str(tmp_path / "none")]) == 2
    assert "has no log to draw" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="curves.xyz.*png"):
        train.main(["--plot", str(tmp_path / "curves.xyz"), "--out", out])


def test_tensorboard_says_what_is_missing(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train.main(tiny(f"--fp8 none --tensorboard {tmp_path / 'board'}")) == 2
    assert "pip install tensorboard" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_tensorboard_may_write_into_the_folder_of_the_run(tiny, tmp_path, monkeypatch, no_sample):
    def writer(folder, purge_step):
        assert purge_step is None   # a resumed run draws nothing twice
        Path(folder).mkdir(parents=True)
        return SimpleNamespace(add_scalar=lambda key, value, step: (Path(folder) / key).touch())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=writer))
    for _ in range(2):   # the second run renames the folder of the first
        run(tiny(f"--fp8 none --tensorboard {tmp_path / 'out' / 'board'}"))
    assert all((tmp_path / out / "board" / "val_loss").exists() for out in ("out", "out.1"))


@pytest.mark.parametrize("pattern", ["", "/**"])
def test_what_a_run_writes_among_the_data_is_none_of_them(pattern, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    before = sum(map(len, train.open_data(str(tmp_path) + pattern)[:2]))
    (tmp_path / "out").mkdir()
    for name in ("log.jsonl", "step_00000004_deadbeef.pt", "step_00000006_deadbeef.damaged"):
        (tmp_path / "out" / name).write_text(TEXT)
    assert sum(map(len, train.open_data(str(tmp_path) + pattern)[:2])) == before == len(TEXT)


def test_a_pattern_names_data_files(tmp_path):
    for i in range(3):
        np.save(tmp_path / f"part{i}.npy", np.full(100, i, np.int32))
    np.save(tmp_path / "other.npy", np.full(100, 9, np.int32))
    train_tokens, val_tokens, _ = train.open_data(str(tmp_path / "part*.npy"))
    assert len(train_tokens) + len(val_tokens) == 300 and set(train_tokens.read(0, 285)) == {0, 1, 2}


def test_names_of_validation_data_mean_the_same_in_a_pattern_as_in_a_folder(tmp_path):
    for folder, value in (("train", 1), ("val", 2)):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "a.npy", np.full(100, value, np.int32))
        (tmp_path / folder / "validation.txt").write_text(folder * 100)   # not in the tree's root: like other text
    for pattern in ("", "*/*.npy", "**/*.npy"):
        _, val_tokens, _ = train.open_data(str(tmp_path / pattern))
        assert all_of(val_tokens) == [2] * 100
    train_tokens, val_tokens, _ = train.open_data(str(tmp_path / "**/*.txt"))
    assert len(val_tokens) == 40 and len(train_tokens) == 760   # the last twentieth


def test_a_file_whose_name_looks_like_a_pattern_is_read(tmp_path):
    np.save(tmp_path / "tokens[1].npy", np.arange(100, dtype=np.int32))
    train_tokens, val_tokens, _ = train.open_data(str(tmp_path / "tokens[1].npy"))
    assert len(train_tokens) + len(val_tokens) == 100


def test_ranks_whose_scales_differ_are_stopped(monkeypatch):
    scales = train.WeightScales([torch.ones(2, 2)])
    monkeypatch.setattr(train, "all_max", lambda ends: ends * torch.tensor([[2.0], [1.0]]))   # most, and minus least
    with pytest.raises(train.RunError, match="different weight scales"):
        train.check_scales_agree(scales, train.Ranks(0, 2, CPU))


def test_owners_share_the_parameters_evenly_and_hold_the_only_numbers(monkeypatch):
    shards = []
    for rank in range(4):
        with torch.device("cpu"):
            net = Transformer(PRESETS["nano"], "moss")
        shards.append(train.Shards(net, train.Ranks(rank, 4, CPU)))
        for p in shards[-1].layers:
            assert p.untyped_storage().nbytes() == (4 * p.numel() if shards[-1].mine(p) else 4)
    loads = [sum(p.numel() for p in s.parameters if s.mine(p)) for s in shards]
    assert max(loads) < 1.1 * min(loads) and sum(loads) == sum(p.numel() for p in net.parameters())


def test_shard_is_for_moss(tiny, tmp_path, capsys):
    assert_refused(tiny("--fp8 tensor --shard"), ["--shard is for recipes that predict", "tensor"], tmp_path, capsys)
