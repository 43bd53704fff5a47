"""Draws a metric of one or more runs against reward queries.

    python -m scripts.plot runs/A runs/B --key jpeg_kb --output runs/curve.png

A run is a folder with metrics.jsonl; a file of results/ stands for all of its runs. Runs whose names differ only in
what follows "-seed" are one curve: the mean, in a band from the lowest to the highest. Runs of scripts.train_dpo, which
ask no reward, are drawn against epochs: --key accuracy.
"""

import argparse
import os
from fnmatch import fnmatch

import matplotlib
import numpy as np

from ddpo.errors import DRAWINGS, InputError, check_output, run_script
from scripts.results import read_metrics, read_results

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def plot_band(axes, x, y, name, **line_style):
    """Draws the mean of y (seeds, points) in a band from the lowest to the highest; returns its colour."""
    (line,) = axes.plot(x, y.mean(0), label=f"{name} ({len(y)} seed{'s' * (len(y) > 1)})", **line_style)
    axes.fill_between(x, y.min(0), y.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
    return line.get_color()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--key", default="reward_mean")
    parser.add_argument("--only", nargs="+", default=["*"], help="names of runs to draw, * for any letters")
    parser.add_argument("--output", default="runs/curve.png")
    args = parser.parse_args()
    check_output(args.output, DRAWINGS)
    groups, runs, x_key = {}, {}, "reward_queries"
    for path in args.runs:
        found = {path: read_metrics(path)} if not path.endswith(".jsonl") else {
            run: line["metrics"] for run, line in read_results(path).items()
        }  # fmt: skip
        if not found:
            raise InputError(f"{path} has no results")
        runs |= {run: values for run, values in found.items() if any(fnmatch(run, name) for name in args.only)}
    if not runs:
        raise InputError(f"no run is called {' or '.join(args.only)}")
    drawn = {run: metrics for run, metrics in runs.items() if args.key in metrics}
    if not drawn:
        known = dict.fromkeys(key for metrics in runs.values() for key in metrics)
        raise InputError(f"no run has {args.key!r}: there is {', '.join(known)}")
    if len(drawn) < len(runs):
        print(f"left out, without {args.key}: {', '.join(run for run in runs if run not in drawn)}")
    if not all(x_key in metrics for metrics in drawn.values()):
        x_key = "epoch"
    for run, metrics in drawn.items():
        name = os.path.basename(os.path.normpath(run)).split("-seed")[0]
        groups.setdefault(name, []).append((metrics[x_key], metrics[args.key]))
    figure, axes = plt.subplots(figsize=(5, 3.2), constrained_layout=True)
    for name, curves in groups.items():
        length = min(len(y) for _, y in curves)  # beyond it there is no mean: a run that went on is drawn by itself
        x, y = curves[0][0][:length], np.stack([y[:length] for _, y in curves])
        color = plot_band(axes, x, y, name)
        for queries, values in curves:
            axes.plot(queries[length - 1 :], values[length - 1 :], color=color, linewidth=0.8, alpha=0.6)
    axes.set_xlabel(x_key.replace("_", " "))
    axes.set_ylabel({"jpeg_kb": "JPEG size (kB)"}.get(args.key, args.key))
    if len(axes.lines) > 4:  # they would be written over
        columns = 1 if max(map(len, groups)) > 25 else 2
        figure.set_figheight(3.2 + 0.15 * len(groups) / columns)
        figure.legend(loc="outside lower center", ncols=columns, fontsize=7, frameon=False)
    else:
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.output, dpi=150)
    print(args.output)


if __name__ == "__main__":
    run_script(main)
