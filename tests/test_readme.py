"""The README is true where a machine can tell: files, options, commands and code in it are those of the repository."""

import dataclasses
import json
import re
import shlex
import statistics
from pathlib import Path

import pytest

import microscale
import train
from model import PRESETS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = [line.split(" # ")[0].strip() for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
         for line in block.splitlines()]
INLINE = re.findall(r"`([^`\n]+(?:\n[^`\n]+)*)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL))
COMMANDS = [" ".join(text.split()) for text in SHELL + INLINE if re.search(r"\w+\.py", text)]


def test_every_file_that_it_names_exists():
    named = {name for text in SHELL + INLINE for name in re.findall(r"[\w/]+\.(?:py|txt)\b", text)}
    assert {"train.py", "microscale.py", "requirements.txt"} <= named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_link_leads_to_a_file_or_to_the_web():
    links = re.findall(r"\]\(([^)]+)\)", README)
    headings = {f"#{title.lower().replace(' ', '-')}" for title in re.findall(r"^#+ (.+)$", README, re.MULTILINE)}
    assert links and all(link.startswith("https://") or link in headings or (ROOT / link).exists() for link in links)


@pytest.mark.parametrize("command", [c for c in COMMANDS if "train.py " in c and "--help" not in c])
def test_every_command_line_is_understood(command):
    arguments = shlex.split(command.split("train.py", 1)[1].replace("--layers N", "--layers 4"))
    arguments = [a for a in arguments if a != "..."]
    while "&&" in arguments:
        arguments = arguments[:arguments.index("&&")]
    config = train.parse_config(arguments)
    assert config.model in (None, *PRESETS)
    assert all(name in microscale.RECIPES for name in (config.fp8 or "moss").split(","))


def test_every_option_that_it_names_is_one():
    known = {f.name for f in dataclasses.fields(train.Config)} | {"help"}
    torchruns = {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "max-restarts", "shutdown-timeout"}
    named = {name for text in SHELL + INLINE for name in re.findall(r"--([a-zA-Z][\w-]*)", text)}
    assert {name.replace("-", "_") for name in named - torchruns} - known == set()


def test_the_recipes_that_it_adds_train(monkeypatch, tmp_path, one_thread):
    monkeypatch.setattr(microscale, "RECIPES", dict(microscale.RECIPES))
    for module in (train, __import__("model")):
        monkeypatch.setattr(module, "RECIPES", microscale.RECIPES)
    code, = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    before = set(microscale.RECIPES)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 100)
    exec(code, dict(vars(microscale)))   # where it says that the lines go
    monkeypatch.setattr(train, "sample", lambda *_: "")
    for name in set(microscale.RECIPES) - before:
        summary = train.train(train.parse_config(
            f"--device cpu --fp8 {name} --data {tmp_path / 'text.txt'} --seq 32 --batch 4 --steps 30 --eval_batches 2 "
            f"--eval_every 30 --log_every 30 --out {tmp_path / name}".split()))
        assert summary["recipe"] == name and summary["val_loss"] < 1   # letter frequencies alone give 3.12


def log_of(name):
    """The records of a run in assets/runs, which ended, skipped no step and says what it ran on."""
    records = [json.loads(line) for line in open(ROOT / f"assets/runs/{name}/log.jsonl")]
    first, last = records[0], records[-1]
    assert last["step"] == first["config"]["steps"] and last["skipped"] == 0 and first["hardware"], name
    return records


def losses_of_seeds(runs, steps):
    """The table of final losses of `runs`, the first part of their names, a model's. They are those of the logs.
    -> {first cell of a row: (losses of its seeds, mean)}"""
    model, aside = runs.split("-")[0], "sums of fprop set aside every 512 of K"
    title = rf"^\| `{model}`, {steps:,} steps \|(.*) \| mean \|\n.*\n((?:\|.*\n)+)"
    header, rows = re.search(title, README, re.MULTILINE).groups()
    seeds, table = re.findall(r"seed (\d+)", header), {}
    for row in rows.splitlines():
        what, *losses, mean = (cell.strip() for cell in row[1:-1].split("|"))
        recipe, addition = re.match(rf"`([\w-]+)`(?:, (again|{aside}))?", what).groups()
        suffix = {None: "", "again": "-again", aside: "-aside"}[addition]
        finals = []
        for seed, loss in zip(seeds, losses, strict=True):
            if not loss:   # not run
                continue
            name = f"{runs}-{recipe}{suffix}-{seed}"
            records = log_of(name)
            config, last = records[0]["config"], records[-1]
            assert (config["model"], config["fp8"], config["seed"]) == (model, recipe, int(seed)), name
            assert records[0].get("changed") == (aside if addition == aside else None), name
            assert last["step"] == steps and loss == f"{last['val_loss']:.4f}", name
            finals.append(last["val_loss"])
        average = sum(finals) / len(finals)
        assert mean == (f"{average:.4f}" if len(finals) == len(seeds) else ""), what
        table[what] = finals, average
    return table


def test_the_losses_of_124m_are_those_of_the_logs_and_the_means_of_none_and_moss_are_equal():
    """Within 0.3%; and the prediction of the scales of weights is never too small."""
    table = losses_of_seeds("124m", 1500)
    assert len(table["`none`"][0]) == len(table["`moss`"][0]) == 3
    assert abs(table["`moss`"][1] / table["`none`"][1] - 1) < 0.003
    for seed in (1337, 1338, 1339):
        ratios = [r["scale_ratio_min"] for r in log_of(f"124m-moss-{seed}") if "scale_ratio_min" in r]   # not of a stop
        assert len(ratios) == 30 and min(ratios) >= 1


def test_the_losses_of_1b_are_those_of_the_logs():
    assert set(losses_of_seeds("1b", 500)) >= {"`none`", "`moss`", "`moss`, again"}


def test_at_1b_moss_ends_within_the_seeds_of_none():
    table = losses_of_seeds("1b-long", 1500)
    seeds = table["`none`"][0]
    assert len(seeds) == len(table["`moss`"][0]) == 5 and min(seeds) < table["`moss`"][1] < max(seeds)
    behind = [100 * (moss / none - 1) for moss, none in zip(table["`moss`"][0], seeds)]
    assert f"{statistics.mean(behind):.2f} ± {statistics.stdev(behind) / 5 ** 0.5:.2f}% behind" in README


def test_the_losses_beside_the_name_of_a_log_are_those_of_that_log():
    """Of its last validations: as many as the row has numbers."""
    rows = re.findall(r"^\|.*?\| ([\d. |]+) \| `([\w-]+)` \|$", README, re.MULTILINE)
    assert len(rows) >= 6
    for losses, name in rows:
        found = [f"{record['val_loss']:.4f}" for record in log_of(name) if "val_loss" in record]
        losses = losses.split(" | ")
        assert losses == found[-len(losses):], name
