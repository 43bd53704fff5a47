"""Redraws the figures from the committed results of `python -m scripts.sweep`, as PNG and SVG.

    python -m scripts.figures fig4

fig4: reward against reward queries, a panel per task, a curve per algorithm: the mean over seeds, in a band from the
lowest to the highest. Each algorithm is drawn at its best learning rate of config/sweeps.py; the others are printed.
"""

import argparse
import glob
import json
import os

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from config.sweeps import BEST  # noqa: E402
from ddpo import InputError, choose, run_script  # noqa: E402

LABELS = {"ddpo_is": "DDPO-IS", "ddpo_sf": "DDPO-SF", "rwr": "RWR", "rwr_sparse": "RWR-sparse"}
plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
plt.rcParams["svg.hashsalt"] = "ddpo"  # the same file for the same numbers


def read_jobs(folder):
    """[{"task", "algorithm", "rate", "seed", "queries", "reward"}] of all finished jobs in a sweep's folder."""
    jobs = []
    for path in sorted(glob.glob(os.path.join(folder, "*", "job.json"))):
        run = os.path.dirname(path)
        with open(os.path.join(run, "config.json")) as f:
            config = json.load(f)
        with open(os.path.join(run, "metrics.jsonl")) as f:
            lines = [json.loads(line) for line in f]
        jobs.append({
            "task": config["reward"], "algorithm": config["algorithm"], "rate": config["train"]["learning_rate"],
            "seed": config["seed"], "queries": [line["reward_queries"] for line in lines],
            "reward": np.array([line["reward_mean"] for line in lines]),
        })  # fmt: skip
    if not jobs:
        raise InputError(f"{folder} has no finished job: run python -m scripts.sweep {os.path.basename(folder)}")
    return jobs


def fig4(jobs):
    """Returns the figure; prints the last two rounds' mean reward of every job."""
    for job in jobs:
        last = f"{job['reward'][0]:.3f} to {job['reward'][-2:].mean():.3f}"
        print(f"{job['task']} {job['algorithm']} lr {job['rate']:g} seed {job['seed']}: {last}")
    tasks = sorted({job["task"] for job in jobs})
    figure, panels = plt.subplots(1, len(tasks), figsize=(3.6 * len(tasks), 2.8), squeeze=False, layout="constrained")
    for task, axes in zip(tasks, panels[0]):
        for i, (algorithm, label) in enumerate(LABELS.items()):
            drawn = [
                j for j in jobs if (j["task"], j["algorithm"], j["rate"]) == (task, algorithm, BEST.get(algorithm))
            ]
            if not drawn:
                continue
            rewards = np.stack([job["reward"] for job in drawn])
            seeds = f"{label} ({len(drawn)} seed{'s' * (len(drawn) > 1)})"
            axes.plot(drawn[0]["queries"], rewards.mean(0), color=f"C{i}", label=seeds)
            axes.fill_between(
                drawn[0]["queries"], rewards.min(0), rewards.max(0), color=f"C{i}", alpha=0.2, linewidth=0
            )
        axes.set(title=task, xlabel="reward queries", ylabel="mean reward (kB)" if "jpeg" in task else "mean reward")
        axes.legend(fontsize=7)
    return figure


FIGURES = {"fig4": fig4}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help=f"one of: {', '.join(FIGURES)}")
    parser.add_argument("--results", default="results/sweeps")
    parser.add_argument("--output", default="results/figures")
    args = parser.parse_args()
    draw = choose("figure", args.name, FIGURES)
    figure = draw(read_jobs(os.path.join(args.results, args.name)))
    os.makedirs(args.output, exist_ok=True)
    for kind in ("png", "svg"):
        path = os.path.join(args.output, f"{args.name}.{kind}")
        figure.savefig(path, dpi=200, metadata={"Date": None} if kind == "svg" else None)
        print(path)


if __name__ == "__main__":
    run_script(main)
