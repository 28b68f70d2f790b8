"""README.md and assets/RESULTS.md are true where a machine can tell: files, links, commands, code, tables."""

import ast
import json
import re
import shlex
import statistics
from pathlib import Path
from unittest.mock import patch

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
CODE = [line.split(" # ")[0].strip() for block in re.findall(r"```sh\n(.*?)```", README + RESULTS, re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()]
CODE += re.findall(r"`([^`\n]+(?:\n[^`\n]+)*)`", re.sub(r"```.*?```", "", README + RESULTS, flags=re.DOTALL))
COMMANDS = dict.fromkeys(" ".join(text.split()) for text in CODE if "train.py " in text)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 230 and max(map(len, README.splitlines())) <= 120


def test_every_file_and_option_and_all_that_the_fork_section_names_exist():
    files = set(re.findall(r"[\w/]+\.(?:py|txt)\b", "\n".join(CODE)))
    assert "train.py" in files and [name for name in files if not (ROOT / name).exists()] == []
    torchruns = {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "max-restarts",
                 "shutdown-timeout"}
    options = set(re.findall(r"--([a-zA-Z][\w-]*)", "\n".join(CODE))) - torchruns
    assert options - set(vars(train.Config())) == {"help"}
    names = set(re.findall(r"`([A-Za-z_]\w+)`", README.split("## Fork it")[1]))
    code = "".join((ROOT / f"{file}.py").read_text("utf-8") for file in ("microscale", "model", "train"))
    defined = set(re.findall(r"^ *(?:def |class )?(\w+)(?: =|\()", code, re.MULTILINE))
    assert "FUSED" in names and names - defined == set()


def test_what_the_readme_says_to_read_first_is_there_and_short():
    """The README up to the quick start, the text at the top of each file, and what is named beside it."""
    count = README[:README.index("## Quick start")].count("\n")
    for file, named in re.findall(r"^\| `(\w+)\.py` \| [^|]* \| ([^|]*) \|", README, re.MULTILINE):
        tree = ast.parse((ROOT / f"{file}.py").read_text("utf-8"))
        parts = {getattr(part, "name", ast.unparse(part).split(" = ")[0]): part for part in tree.body}
        read = [tree.body[0], *(parts[name] for name in re.findall(r"`(\w+)`", named))]
        assert len(read) > 2
        count += sum(part.end_lineno - part.lineno + 1 for part in read)
    assert 650 <= count <= 750   # "700 lines"


def anchors(page):
    """Return the names that GitHub gives to the sections of a page."""
    titles = re.findall(r"^##+ (.+)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_to_a_section_a_file_or_the_web_and_the_contents_have_every_section(name):
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[name]):
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert link.startswith("https://") or target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link
    contents = set(re.findall(r"\]\(#([^)]+)\)", PAGES[name].split("\n## ")[0]))
    assert name == "README.md" or contents == anchors(PAGES[name])   # the README has none


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_line_is_understood(command):
    config = train.parse_config(shlex.split(command.replace("layers N", "layers 4").split("train.py", 1)[1]))
    assert config.model in (None, *model.PRESETS)
    assert all(name in microscale.RECIPES for name in (config.fp8 or "moss").split(","))


def python_block(part):
    """Return the one block of Python in the README that contains `part`."""
    block, = (code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if part in code)
    return block


@pytest.mark.parametrize("w_scale, tolerance", [(2.0**-8, 0), (1 / 448, 1e-6)])
def test_the_idea_in_plain_pytorch_is_the_linear_layer_of_moss(w_scale, tolerance, T=48, K=80, N=64):
    """Bit for bit if the weight scale is a power of two: it gives the same before a sum as after it."""
    torch.manual_seed(0)
    # numbers and tokens are of all sizes, so that folding rounds; a token is zero in X, another one in dY
    x, dy = (torch.exp(3 * torch.randn(T, C)) * 2.0 ** torch.randint(e, e + 17, (T, 1)) * torch.randn(T, C)
             for C, e in ((K, -38), (N, -8)))   # so small that zeros must not get the largest scale
    x[3], dy[4] = 0, 0
    x[5, 0], x[6, 0] = 448 * 2.0**-10, 449 * 2.0**-10   # one just fits under 2^-10, the other does not
    weight, w_scale = torch.rand(N, K) * 2 - 1, torch.full((1, 1), w_scale)
    names, recipe = {}, microscale.RECIPES["moss"]
    (x1, w1), (x2, w2) = ([tensor.clone().requires_grad_() for tensor in (x, weight)] for _ in range(2))
    exec(python_block("class MossLinear"), names)
    y1 = names["MossLinear"].apply(x1, w1, w_scale)
    y2 = gemm_kernel.fp8_linear(x2, w2, *microscale.quantize_weight(weight, recipe, w_scale), recipe)
    y1.backward(dy), y2.backward(dy)
    assert torch.equal(w1.grad, w2.grad)   # no weight scale is in it
    assert all((a - b).norm() <= tolerance * b.norm() for a, b in ((y1, y2), (x1.grad, x2.grad)))


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


@patch.dict(microscale.RECIPES)
def test_the_recipes_that_a_fork_adds_train(monkeypatch, tmp_path, one_thread):
    before, text = set(microscale.RECIPES), tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog.\n" * 100)
    exec(python_block("RECIPES["), dict(vars(microscale)))   # where it says that the lines go
    monkeypatch.setattr(train, "sample", lambda *_: "")
    for name in set(microscale.RECIPES) - before:
        summary = train.train(train.parse_config(
            f"--device cpu --fp8 {name} --data {text} --seq 32 --batch 4 --steps 30 --eval_batches 2 "
            f"--eval_every 30 --log_every 30 --out {tmp_path / name}".split()))
        assert summary["recipe"] == name and summary["val_loss"] < 1   # letter frequencies alone give 3.12


def log_of(name, **config):
    """Return the records of a run in assets/runs, which ended well and says what it ran on."""
    first, *_, last = records = [json.loads(line) for line in open(ROOT / f"assets/runs/{name}/log.jsonl")]
    assert last["step"] == first["config"]["steps"] and last["skipped"] == 0 and first["hardware"], name
    headroom = [record["scale_ratio_min"] for record in records if "scale_ratio_min" in record]
    assert min(headroom, default=1) >= 1 and (len(headroom) >= 10 or "moss" not in name), name
    assert config.items() <= first["config"].items(), name
    return records


MODELS = {   # in the tables of RESULTS.md, by the names of the logs: how it is called, and its options
    **{runs: (f"`{name}`", {"model": name}) for runs, name in (
        ("124m", "124m"), ("1b", "1b"), ("1b-long", "1b"), ("moe-1b", "moe-1b"), ("124m-tokens", "124m"))},
    **{f"{n}-muon": (f"`{n}` with Muon", {"model": n, "optimizer": "muon"}) for n in ("124m", "1b")},
    "20m": ("20M", {"model": "124m", "layers": 3}), "smollm2": ("SmolLM2", {"init": "smollm2"})}


def losses_of_seeds(runs, steps):
    """Return {first cell of a row: losses of its seeds} of a table that equals the logs of these runs."""
    (model_name, options), table = MODELS[runs], {}
    suffixes = {"": "", ", again": "-again", ", fprop promoted every 512 of K": "-aside"}
    tables = RESULTS.split(f"| {model_name}, {steps:,} steps |")
    header, _, *rows = tables[1].split("\n\n")[0].splitlines()
    for row in rows:
        what, *cells, mean, spread = (cell.strip() for cell in row[1:-1].split("|"))
        _, recipe, addition = what.split("`")
        losses, name = [], f"{runs}-{recipe}{suffixes[addition]}"
        for seed, cell in zip(re.findall(r"seed (\d+)", header), cells, strict=True):
            if cell:   # else it was not run
                log = log_of(f"{name}-{seed}", fp8=recipe, seed=int(seed), steps=steps, **options)
                losses.append(log[-1]["val_loss"])
                assert cell == f"{losses[-1]:.4f}" and ("changed" in log[0]) == ("-aside" in name)
        assert mean == (f"{statistics.mean(losses):.4f}" if len(losses) == len(cells) else ""), what
        assert spread == (f"{max(losses) - min(losses):.4f}" if len(losses) > 1 else ""), what
        table[what] = losses
    return table


@pytest.mark.parametrize("runs, steps, rows", [
    ("124m", 1500, 5), ("1b", 500, 8), ("1b-long", 1500, 3), ("moe-1b", 1000, 2), ("124m-tokens", 1000, 2),
    ("124m-muon", 500, 4), ("1b-muon", 400, 2), ("20m", 600, 5), ("smollm2", 200, 2)])
def test_the_losses_of_seeds_are_those_of_the_logs_whose_scales_were_never_too_small(runs, steps, rows):
    assert len(losses_of_seeds(runs, steps)) == rows


@pytest.mark.parametrize("runs, seeds, said", [
    ("124m", 3, "differ by {:.2f}%"), ("1b-long", 5, "{:.2f} ± {:.2f}% behind")])
def test_moss_differs_from_none_by_less_than_seeds_do_and_both_pages_say_by_how_much(runs, seeds, said):
    none, moss = (losses_of_seeds(runs, 1500)[name] for name in ("`none`", "`moss`"))
    means = [statistics.mean(losses) for losses in (none, moss)]
    assert len(none) == len(moss) == seeds and min(none) < means[1] < max(none)
    cells = f"{means[0]:.4f} | {means[1]:.4f} | {means[1] - means[0]:+.4f} | {max(none) - min(none):.4f}"
    assert f"| `{runs.split('-')[0]}` | 1,500 | {seeds} | {cells.replace('-', '−')} |" in README
    behind = [100 * (b / a - 1) for a, b in zip(none, moss)]
    difference, error = abs(statistics.mean(behind)), statistics.stdev(behind) / seeds ** 0.5
    assert said.format(difference, error) in RESULTS and (difference < 0.3 or runs == "1b-long")


def test_the_loss_beside_the_name_of_a_log_is_that_of_the_log():
    rows = re.findall(r"^\|.*?\| ([\d.]+) \| `([\w-]+)` \|$", RESULTS, re.MULTILINE)
    assert len(rows) == 6 and all(loss == f"{log_of(name)[-1]['val_loss']:.4f}" for loss, name in rows)
