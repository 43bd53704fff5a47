"""What a reward costs: time, reward queries and network passes until it is reached with the animals intact.

    python -m scripts.time_to_reward                                     # all contestants, seeds 0, 1 and 2
    python -m scripts.time_to_reward --contestants ddpo_is ram --seeds 0
    python -m scripts.time_to_reward --draw                              # the figure alone, from the JSON

Contestants train the embedded model for small JPEG files on the same machine, one after the other, seed by seed; those
of trl by scripts/dev/trl_run.py, in an environment that is made for it. After every epoch the same judge draws the 45
animals, two images of each, always of the same noise and with guidance 3. A target is a fall of their JPEG size by
15% or 20% with at least 95% of the animals named; between two evaluations the cost is interpolated. What judging costs
is not counted. A run that is there already is not run again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from config.contestants import CONTESTANTS, JUDGE  # noqa: E402
from ddpo.errors import InputError, at_least, choose, run_script  # noqa: E402
from ddpo.reward_model import read_jsonl  # noqa: E402
from scripts.dev.bench import make_trl  # noqa: E402
from scripts.provenance import commit, processor  # noqa: E402

TARGETS, LEAST_NAMED = (0.15, 0.20), 0.95
COSTS = {  # of an epoch's metrics -> what it is called in the table
    "seconds": "seconds", "cpu_seconds": "CPU seconds", "reward_queries": "reward queries",
    "network_passes": "network passes",
}  # fmt: skip


def run(name, seed, folder, threads, trl_folder):
    """Trains a contestant with a seed, unless it has been; returns its run's folder."""
    run_dir = Path(folder, f"{name}-seed{seed}")
    options = JUDGE | CONTESTANTS[name] | {"seed": seed, "threads": threads, "run_dir": str(run_dir)}
    if not (run_dir / "done").exists():
        print(f"{name}, seed {seed}", flush=True)
        if name.startswith("trl"):
            command = [make_trl(trl_folder), "-m", "scripts.dev.trl_run", json.dumps(options)]
        else:
            preset = options.pop("config")
            given = [f"--config.{key}={value}" for key, value in options.items()]
            resume = (run_dir / "checkpoints").exists()
            given += [f"--config.resume={run_dir}"] if resume else []
            command = [sys.executable, "train.py", "--config", preset, *given]
        run_dir.mkdir(parents=True, exist_ok=True)
        with open(run_dir / "log.txt", "a") as log:
            if subprocess.run(command, stdout=log, stderr=log).returncode:
                raise InputError(f"{name}, seed {seed} failed: {run_dir}/log.txt says why")
        (run_dir / "done").touch()
    return run_dir


def measure(run_dir):
    """{"gain": (E,) relative to the base model, "named": (E,), and (E,) of each of COSTS up to that evaluation}."""
    metrics, evaluations = (read_jsonl(Path(run_dir, f"{name}.jsonl")) for name in ("metrics", "evaluation"))
    judged = [line["seen, stochastic"] for line in evaluations]
    size = np.array([line["reward_mean"] for line in judged])
    curves = {"gain": size / size[0], "named": np.array([line["classifier_accuracy"] for line in judged])}
    curves["gain"] = 1 - curves["gain"]
    queries = np.diff([0, *(line["reward_queries"] for line in metrics)])  # which are logged as a running total
    for cost in COSTS:
        each = queries if cost == "reward_queries" else [line[cost] for line in metrics]
        curves[cost] = np.array([np.sum(each[: line["epoch"]]) for line in evaluations])
    return curves


def cost_to(target, curves):
    """{cost: its amount} when the gain first reaches `target` with the animals named, linearly interpolated between
    evaluations; None if that never happens."""
    gain, named = curves["gain"], curves["named"]
    for i in range(1, len(gain)):
        if gain[i] >= target > gain[i - 1]:
            share = (target - gain[i - 1]) / (gain[i] - gain[i - 1])
            if named[i - 1] + share * (named[i] - named[i - 1]) >= LEAST_NAMED:
                return {cost: float(curves[cost][i - 1] + share * np.diff(curves[cost])[i - 1]) for cost in COSTS}
    return None


def table(results):
    """Markdown: a row per contestant, for each target the median over seeds of each cost, and how many reached it."""
    head = [f"-{target:.0%}: {label}" for target in TARGETS for label in (*COSTS.values(), "reached")]
    lines = ["| | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for name, seeds in results.items():
        cells = []
        for target in TARGETS:
            reached = [seed[str(target)] for seed in seeds.values() if seed[str(target)]]
            medians = [f"{np.median([r[cost] for r in reached]):,.0f}" if reached else "-" for cost in COSTS]
            cells += [*medians, f"{len(reached)} of {len(seeds)}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results, path):
    """The gain against each cost but the clock's seconds, a line per seed, a cross where fewer than 95% are named."""
    costs = [cost for cost in COSTS if cost != "seconds"]
    figure, axes = plt.subplots(1, len(costs), figsize=(4 * len(costs), 3.6), sharey=True, layout="constrained")
    for axis, cost in zip(axes, costs):
        for i, (name, seeds) in enumerate(results.items()):
            for k, curves in enumerate(seed["curves"] for seed in seeds.values()):
                x, gain, lost = np.array(curves[cost]), 100 * np.array(curves["gain"]), np.array(curves["named"])
                axis.plot(x, gain, color=f"C{i}", lw=1, label=name if k == 0 else None)
                lost = lost < LEAST_NAMED
                axis.plot(x[lost], gain[lost], "x", color=f"C{i}", ms=5)
        axis.set_xlabel(COSTS[cost])
        axis.locator_params(axis="x", nbins=5)
        for target in TARGETS:
            axis.axhline(100 * target, color="0.8", lw=0.8, zorder=0)
    axes[0].set_ylabel("smaller JPEG files by, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.suptitle("Cost of a reward (cross: fewer than 95% of the animals are named)", fontsize=10)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--contestants", nargs="+", default=list(CONTESTANTS), metavar="NAME", help="of config/contestants.py"
    )
    parser.add_argument("--seeds", nargs="+", type=at_least(0), default=[0, 1, 2], metavar="N")
    parser.add_argument("--threads", type=at_least(1), default=1, help="CPU threads of each run (1)")
    parser.add_argument("--folder", default="runs/time_to_reward", help="where the runs go")
    parser.add_argument("--trl_folder", default="runs/bench/trl", help="a virtual environment for trl")
    parser.add_argument("--json", default="results/bench/time-to-reward.json", help="what was measured")
    parser.add_argument("--draw", action="store_true", help="only the figure and the table, from --json")
    args = parser.parse_args()
    path = Path(args.json)
    results = json.loads(path.read_text()) if path.exists() else {"contestants": {}}
    if not args.draw:
        for name in args.contestants:
            choose("contestant", name, CONTESTANTS)
        path.parent.mkdir(parents=True, exist_ok=True)
        for seed in args.seeds:
            for name in args.contestants:
                curves = measure(run(name, seed, args.folder, args.threads, args.trl_folder))
                line = {str(target): cost_to(target, curves) for target in TARGETS}
                line["curves"] = {key: [float(f"{v:.6g}") for v in values] for key, values in curves.items()}
                facts = {"commit": commit(), "hardware": processor(), "threads": args.threads}
                results["contestants"].setdefault(name, {})[str(seed)] = line | facts
                path.write_text(json.dumps(results, indent=1))
    if not results["contestants"]:
        raise InputError(f"{path} holds no measurement: leave --draw out")
    print(table(results["contestants"]))
    draw(results["contestants"], path.with_suffix(".png"))


if __name__ == "__main__":
    run_script(main)
