"""The results that are committed: one file per sweep, a JSON line per finished run, and for those whose figure shows
some, a PNG of image grids.

run            its name
options        those that differ from config/base.py, by dotted name
metrics        {key of metrics.jsonl: a list of its values, one per epoch}
evaluations    the lines of evaluation.jsonl
command, commit, hardware, threads, seconds, weights_mb
"""

import json
import os

import numpy as np
from PIL import Image, PngImagePlugin

from config.base import get_config
from ddpo.errors import InputError
from ddpo.options import flatten, read_options
from ddpo.reward_model import read_jsonl


def read_results(path):
    """{run's name: its line}, metrics as arrays (epochs,); {} if there is no such file."""
    if not os.path.exists(path):
        return {}
    lines = read_jsonl(path)
    try:
        for line in lines:
            line["metrics"] = {key: np.array(values) for key, values in line["metrics"].items()}
        return {line["run"]: line for line in lines}
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path} has a line that is not the result of a run") from error


def least_named(base):
    """The share of animals that a classifier must still name after finetuning: 95%, or if it names only a share `base`
    of the base model's, 95% of that."""
    return 0.95 if base >= 0.95 else 0.95 * base


def gain_while_named(evaluations, section="seen, stochastic"):
    """The reward that a run gained while its images stayed what they are: at the point where the share of animals that
    a classifier names first falls below `least_named`, by a straight line between evaluations; at the last evaluation
    if it never does.

    Args:
        evaluations: lines of evaluation.jsonl, the base model's first.
    Returns:
        The gain, in the unit of the reward, and whether the share did fall.
    """
    rewards, named = (
        np.array([line[section][key] for line in evaluations]) for key in ("reward_mean", "classifier_accuracy")
    )
    share = least_named(named[0])
    for before, after in zip(range(len(named)), range(1, len(named))):
        if named[after] < share <= named[before]:
            part = (named[before] - share) / (named[before] - named[after])
            return rewards[before] + part * (rewards[after] - rewards[before]) - rewards[0], True
    return rewards[-1] - rewards[0], False


def read_metrics(run):
    """{key: array over epochs} of a run's metrics.jsonl: those keys that all its lines have."""
    path = os.path.join(run, "metrics.jsonl")
    lines = read_jsonl(path) if os.path.exists(path) else []
    if not lines:
        raise InputError(f"{run!r} is not a run with a finished epoch: no lines in its metrics.jsonl")
    if not all(isinstance(line, dict) for line in lines):
        raise InputError(f"{path} has a line that is not an epoch's metrics")
    return {key: np.array([line[key] for line in lines]) for key in lines[0] if all(key in line for line in lines)}


def add_result(path, run_dir, name, facts):
    """Adds a finished run to a file of results, or replaces it there. facts: what its folder does not say, {name:
    value}. Returns its line."""
    line = {"run": name, **facts, **summarise(run_dir)}
    lines = {}
    if os.path.exists(path):
        with open(path) as f:
            lines = {json.loads(text)["run"]: text for text in f}
    lines[name] = json.dumps(line) + "\n"
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path + ".tmp", "w") as f:
        f.writelines(lines[run] for run in sorted(lines))
    os.replace(path + ".tmp", path)
    return read_results(path)[name]


def summarise(run_dir):
    """What a run's own files say: its options, metrics and evaluations, to six digits."""
    defaults = flatten(get_config())
    options = {
        k: v for k, v in read_options(run_dir).items() if defaults.get(k) != v and k not in ("run_dir", "resume")
    }
    metrics = {key: [to_six_digits(v) for v in values.tolist()] for key, values in read_metrics(run_dir).items()}
    path = os.path.join(run_dir, "evaluation.jsonl")
    evaluations = [to_six_digits(line) for line in read_jsonl(path)] if os.path.exists(path) else []
    return {"options": options, "metrics": metrics, "evaluations": evaluations}


def read_pictures(path):
    """{curve: {epoch: its image grid}} of a sweep's PNG; {} if there is no such file."""
    if not os.path.exists(path):
        return {}
    montage = Image.open(path).convert("RGB")
    rows = json.loads(montage.info.pop("rows"))
    width, height = montage.width // max(map(len, rows.values())), montage.height // len(rows)
    sizes = json.loads(montage.info.pop("sizes", "{}"))  # of those that do not fill their cells
    pictures = {}
    for y, (curve, epochs) in enumerate(rows.items()):
        w, h = sizes.get(curve, (width, height))
        corners = ((epoch, x * width, y * height) for x, epoch in enumerate(epochs))
        pictures[curve] = {epoch: montage.crop((left, top, left + w, top + h)) for epoch, left, top in corners}
    return pictures


def add_pictures(path, curve, grids):
    """Adds {epoch: image grid} of a curve to a sweep's PNG, or replaces them there: a row per curve, a column per
    epoch, both named in the PNG's own text, as is the size of a curve's grids, which other versions drew larger."""
    rows = read_pictures(path) | {curve: grids}
    sizes = {name: next(iter(row.values())).size for name, row in rows.items()}
    width, height = (max(size) for size in zip(*sizes.values()))
    montage = Image.new("RGB", (width * max(map(len, rows.values())), height * len(rows)), "white")
    for y, row in enumerate(rows.values()):
        for x, grid in enumerate(row.values()):
            montage.paste(grid, (x * width, y * height))
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    text = PngImagePlugin.PngInfo()
    text.add_text("rows", json.dumps({curve: list(row) for curve, row in rows.items()}))
    text.add_text("sizes", json.dumps(sizes))
    montage.save(path + ".tmp", format="png", pnginfo=text, optimize=True)
    os.replace(path + ".tmp", path)


def to_six_digits(value):
    """A nest of dicts with its floats rounded to six significant digits."""
    if isinstance(value, dict):
        return {key: to_six_digits(item) for key, item in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value
