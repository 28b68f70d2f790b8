"""README.md and assets/RESULTS.md are true where a machine can tell: files, links, commands, code, tables."""

import dataclasses
import json
import re
import shlex
import statistics
from pathlib import Path

import pytest
import torch

import autoscale
import gemm_kernel
import microscale
import model
import train

ROOT = Path(__file__).parent.parent
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "assets/RESULTS.md")}
README, RESULTS = PAGES.values()
SHELL = [line.split(" # ")[0].strip() for block in re.findall(r"```sh\n(.*?)```", README + RESULTS, re.DOTALL)
         for line in block.replace("\\\n", " ").splitlines()]
PROSE = re.sub(r"```.*?```", "", README + RESULTS, flags=re.DOTALL)
INLINE = re.findall(r"`([^`\n]+(?:\n[^`\n]+)*)`", PROSE)
COMMANDS = dict.fromkeys(" ".join(text.split()) for text in SHELL + INLINE if "train.py " in text)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200 and max(map(len, README.splitlines())) <= 120


def test_every_file_that_they_name_exists():
    named = {name for text in SHELL + INLINE for name in re.findall(r"[\w/]+\.(?:py|txt)\b", text)}
    assert {"train.py", "microscale.py", "requirements.txt"} <= named
    assert [name for name in named if not (ROOT / name).exists()] == []


def anchors(page):
    """Return the names that GitHub gives to the sections of a page."""
    titles = re.findall(r"^##+ (.+)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_to_a_section_a_file_or_the_web(name):
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[name]):
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert link.startswith("https://") or target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_table_of_contents_of_the_results_has_every_section():
    assert anchors(RESULTS) == set(re.findall(r"\]\(#([^)]+)\)", RESULTS.split("\n## ")[0]))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_line_is_understood(command):
    arguments = command.split("train.py", 1)[1].replace("--layers N", "--layers 4")
    config = train.parse_config(shlex.split(arguments))
    assert config.model in (None, *model.PRESETS)
    assert all(name in microscale.RECIPES for name in (config.fp8 or "moss").split(","))


def test_every_option_that_they_name_is_one():
    known = {f.name for f in dataclasses.fields(train.Config)} | {"help"}
    torchruns = {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "max-restarts"}
    named = {name for text in SHELL + INLINE for name in re.findall(r"--([a-zA-Z][\w-]*)", text)}
    assert {name.replace("-", "_") for name in named - torchruns} - known == set()


def test_everything_that_the_fork_section_names_exists():
    names = re.findall(r"`([A-Za-z_]\w+)`", README.split("## Fork it")[1])
    assert {"quantize_swiglu_gradient", "quantize_norm", "FUSED"} <= set(names)
    code = "".join((ROOT / f"{file}.py").read_text("utf-8") for file in ("microscale", "model", "train"))
    defined = set(re.findall(r"^ *(?:def |class )?(\w+)(?: =|\()", code, re.MULTILINE))
    assert set(names) - defined == set()


def python_block(part):
    """Return the one block of Python in the README that contains `part`."""
    block, = (code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if part in code)
    return block


def idea_and_layer(w_scale, T=48, K=80, N=64):
    """Return [(README's, fp8_linear's)] of the output, dX and dW under this weight scale, on a CPU.

    Numbers and tokens are of all sizes, so that folding rounds. A token is zero in X, another one in dY.
    """
    torch.manual_seed(0)
    sizes = (torch.exp(3 * torch.randn(T, C)) * 2.0 ** torch.randint(-8, 9, (T, 1)) for C in (K, N))
    x, dy = (size * torch.randn_like(size) for size in sizes)
    x[3], dy[4] = 0, 0
    x[5, 0], x[6, 0] = 448 * 2.0**20, 449 * 2.0**20   # one just fits under 2^20, the other does not
    x *= 2.0**-30   # so that a token of zeros must not be the one with the largest scale
    weight = torch.rand(N, K) * 2 - 1
    names, recipe, w_scale = {}, microscale.RECIPES["moss"], torch.full((1, 1), w_scale)
    exec(python_block("class MossLinear"), names)
    copies, results = microscale.quantize_weight(weight, recipe, w_scale), []
    for layer in (lambda x, weight: names["MossLinear"].apply(x, weight, w_scale),
                  lambda x, weight: gemm_kernel.fp8_linear(x, weight, *copies, recipe)):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
        y = layer(*leaves)
        y.backward(dy)
        results.append((y.detach(), leaves[0].grad, leaves[1].grad))
    return list(zip(*results))


def test_the_idea_in_plain_pytorch_is_the_linear_layer_of_moss_bit_for_bit():
    """Under a weight scale that is a power of two: it gives the same before a sum as after it."""
    assert all(torch.equal(mine, theirs) for mine, theirs in idea_and_layer(w_scale=2.0**-8))


def test_under_any_weight_scale_the_idea_differs_by_the_rounding_of_float32_only():
    y, dx, dw = idea_and_layer(w_scale=1 / 448)
    assert torch.equal(*dw)   # no weight scale is in it
    assert all((mine - theirs).norm() < 1e-6 * theirs.norm() for mine, theirs in (y, dx))


@pytest.mark.parametrize("kappa, enough", [(1.165, True), (1, False)])
def test_the_lines_of_the_prediction_bound_the_weights_of_adamw_and_a_bound_of_1_does_not(kappa, enough):
    assert f"{autoscale.adam_update_bound(10**5, 0.9, 0.95):.3f} for betas (0.9, 0.95)" in README
    weight = torch.nn.Parameter(torch.ones(4))
    names = dict(lr=0.1, weight_decay=0.1, kappa=kappa, w_scale=1 / 448)
    optimizer = torch.optim.AdamW([weight], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(100):
        weight.grad = torch.full((4,), -(0.95 / 0.9) ** step)   # the gradients that move a weight most
        optimizer.step()
        exec(python_block("w_scale = w_scale * abs"), names)
    assert (names["w_scale"] * 448 >= weight.max().item()) == enough


def test_the_recipes_that_a_fork_adds_train(monkeypatch, tmp_path, one_thread):
    monkeypatch.setattr(microscale, "RECIPES", dict(microscale.RECIPES))
    for module in (train, model):
        monkeypatch.setattr(module, "RECIPES", microscale.RECIPES)
    before = set(microscale.RECIPES)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 100)
    exec(python_block("RECIPES["), dict(vars(microscale)))   # where it says that the lines go
    monkeypatch.setattr(train, "sample", lambda *_: "")
    for name in set(microscale.RECIPES) - before:
        summary = train.train(train.parse_config(
            f"--device cpu --fp8 {name} --data {tmp_path / 'text.txt'} --seq 32 --batch 4 --steps 30 "
            f"--eval_batches 2 --eval_every 30 --log_every 30 --out {tmp_path / name}".split()))
        assert summary["recipe"] == name and summary["val_loss"] < 1   # letter frequencies alone give 3.12


def log_of(name):
    """Return the records of a run in assets/runs, which ended, skipped no step and says what it ran on."""
    records = [json.loads(line) for line in open(ROOT / f"assets/runs/{name}/log.jsonl")]
    first, last = records[0], records[-1]
    assert last["step"] == first["config"]["steps"] and last["skipped"] == 0 and first["hardware"], name
    return records


def losses_of_seeds(runs, steps):
    """Return {first cell of a row: losses of its seeds} of a table that equals the logs of these runs."""
    preset, promoted, table = runs.split("-")[0], "fprop promoted every 512 of K", {}
    title = rf"^\| `{preset}`, {steps:,} steps \|(.*) \| mean \| spread \|\n.*\n((?:\|.*\n)+)"
    header, rows = re.search(title, RESULTS, re.MULTILINE).groups()
    for row in rows.splitlines():
        what, *cells, mean, spread = (cell.strip() for cell in row[1:-1].split("|"))
        recipe, addition = re.match(rf"`([\w-]+)`(?:, (again|{promoted}))?$", what).groups()
        suffix, losses = {None: "", "again": "-again", promoted: "-aside"}[addition], []
        for seed, cell in zip(re.findall(r"seed (\d+)", header), cells, strict=True):
            if cell:   # else it was not run
                first, *_, last = log_of(f"{runs}-{recipe}{suffix}-{seed}")
                found = [first["config"][key] for key in ("model", "fp8", "seed")]
                assert found == [preset, recipe, int(seed)]
                assert ("changed" in first) == (addition == promoted)
                assert last["step"] == steps and cell == f"{last['val_loss']:.4f}"
                losses.append(last["val_loss"])
        assert mean == (f"{statistics.mean(losses):.4f}" if len(losses) == len(cells) else ""), what
        assert spread == (f"{max(losses) - min(losses):.4f}" if len(losses) > 1 else ""), what
        table[what] = losses
    return table


@pytest.mark.parametrize("runs, steps, rows", [("124m", 1500, 5), ("1b", 500, 8), ("1b-long", 1500, 3)])
def test_the_losses_of_seeds_are_those_of_the_logs(runs, steps, rows):
    assert len(losses_of_seeds(runs, steps)) == rows


@pytest.mark.parametrize("runs, seeds", [("124m", 3), ("1b-long", 5)])
def test_moss_differs_from_none_by_less_than_seeds_do_and_the_readme_says_so(runs, seeds):
    none, moss = (losses_of_seeds(runs, 1500)[name] for name in ("`none`", "`moss`"))
    assert len(none) == len(moss) == seeds
    means, spread = [statistics.mean(losses) for losses in (none, moss)], max(none) - min(none)
    difference = means[1] - means[0]
    assert abs(difference) < spread and min(none) < means[1] < max(none)
    assert abs(difference) < 0.003 * means[0] or runs == "1b-long"   # there it is 0.31%, as RESULTS says
    cells = [f"{value:.4f}" for value in means] + [f"{difference:+.4f}".replace("-", "−"), f"{spread:.4f}"]
    assert f"| `{runs.split('-')[0]}` | 1,500 | {seeds} | {' | '.join(cells)} |" in README


def test_moss_is_as_far_behind_at_1b_as_the_results_say():
    none, moss = (losses_of_seeds("1b-long", 1500)[name] for name in ("`none`", "`moss`"))
    behind = [100 * (b / a - 1) for a, b in zip(none, moss, strict=True)]
    assert f"{statistics.mean(behind):.2f} ± {statistics.stdev(behind) / 5 ** 0.5:.2f}% behind" in RESULTS


def test_the_predicted_scales_of_124m_were_never_too_small():
    for seed in (1337, 1338, 1339):
        headroom = [r["scale_ratio_min"] for r in log_of(f"124m-moss-{seed}") if "scale_ratio_min" in r]
        assert len(headroom) == 30 and min(headroom) >= 1


def test_the_loss_beside_the_name_of_a_log_is_that_of_the_log():
    rows = re.findall(r"^\|.*?\| ([\d.]+) \| `([\w-]+)` \|$", RESULTS, re.MULTILINE)
    assert len(rows) == 6 and all(loss == f"{log_of(name)[-1]['val_loss']:.4f}" for loss, name in rows)
