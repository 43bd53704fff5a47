"""Redraws a figure from the committed results of its sweep (config/sweeps.py), as PNG and SVG.

    python -m scripts.figures fig4

Reward against reward queries: the mean over seeds, in a band from the lowest to the highest. A curve whose learning
rate was chosen is drawn at the best one; the last two rounds' mean reward of every job is printed, the others' too.
"""

import argparse
import glob
import os
import re

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from config.sweeps import BEST, SWEEPS  # noqa: E402
from ddpo import InputError, choose, run_script  # noqa: E402
from scripts.plot import plot_band, read_metrics  # noqa: E402

LABELS = {
    "ddpo_is": "DDPO-IS",
    "ddpo_sf": "DDPO-SF",
    "rwr": "RWR",
    "rwr_sparse": "RWR-sparse",
    "unweighted": "no reward",
}
plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
plt.rcParams["svg.hashsalt"] = "ddpo"  # the same file for the same numbers


def read_jobs(folder):
    """[(panel, curve, learning rate, seed, reward queries (epochs,), mean rewards (epochs,))] of a sweep's finished
    jobs. Raises InputError if there are none."""
    jobs = []
    for path in sorted(glob.glob(os.path.join(folder, "*", "job.json"))):
        run = os.path.dirname(path)
        panel, curve, rate, seed = re.fullmatch(r"([^-]+)-(.+)-lr(.+)-seed(\d+)", os.path.basename(run)).groups()
        metrics = read_metrics(run)
        jobs.append((panel, curve, float(rate), int(seed), metrics["reward_queries"], metrics["reward_mean"]))
    if not jobs:
        raise InputError(f"{folder} has no finished job: run python -m scripts.sweep {os.path.basename(folder)}")
    return jobs


def draw(jobs, best):
    """A panel for each that the jobs name, a curve for each that it has. best: {curve: learning rate}."""
    panels = sorted({job[0] for job in jobs})
    columns, rows = min(3, len(panels)), -(-len(panels) // 3)
    size = (3.4 * columns, 2.7 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axes, panel in zip(grid.flat, panels):
        curves = sorted({job[1] for job in jobs if job[0] == panel})
        for curve in curves:
            mine = [job for job in jobs if job[:2] == (panel, curve) and job[2] == best.get(curve, job[2])]
            if not mine:
                continue
            queries, rewards = mine[0][4], np.stack([job[5] for job in mine])
            plot_band(axes, queries, rewards, LABELS.get(curve, curve))
        axes.set(title=panel, xlabel="reward queries", ylabel="mean reward")
        if axes.lines:
            axes.legend(fontsize=7, ncols=2, loc="upper left", bbox_to_anchor=(0, -0.24))
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help=f"one of: {', '.join(SWEEPS)}")
    parser.add_argument("--results", default="results/sweeps")
    parser.add_argument("--output", default="results/figures")
    args = parser.parse_args()
    choose("sweep", args.name, SWEEPS)
    jobs = read_jobs(os.path.join(args.results, args.name))
    for panel, curve, rate, seed, _, rewards in jobs:
        print(f"{panel} {curve} lr {rate:g} seed {seed}: {rewards[0]:.3f} to {rewards[-2:].mean():.3f}")
    figure = draw(jobs, BEST.get(args.name, {}))
    os.makedirs(args.output, exist_ok=True)
    for kind in ("png", "svg"):
        path = os.path.join(args.output, f"{args.name}.{kind}")
        figure.savefig(path, dpi=200, metadata={"Date": None} if kind == "svg" else None)
        print(path)


if __name__ == "__main__":
    run_script(main)
