"""Redraws a figure from the committed results of its sweeps (config/sweeps.py), as PNG and SVG.

    python -m scripts.figures fig4

Curves are means over seeds, in a band from the lowest to the highest. A curve for which several learning rates were
tried is drawn at the best one; what every job came to is printed, the others' too.
"""

import argparse
import os
import re

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from config.base import get_config  # noqa: E402
from config.sweeps import ABLATIONS, SWEEPS  # noqa: E402
from ddpo import prompts  # noqa: E402
from ddpo.errors import InputError, check_folder, choose, run_script  # noqa: E402
from ddpo.evaluation import split_prompts  # noqa: E402
from ddpo.images import grid_columns  # noqa: E402
from ddpo.losses import ALGORITHMS  # noqa: E402
from ddpo.options import flatten  # noqa: E402
from scripts.plot import plot_band  # noqa: E402
from scripts.results import gain_while_named, least_named, read_pictures, read_results  # noqa: E402
from scripts.sweep import best_rates, final_reward  # noqa: E402

LABELS = {
    "ddpo_is": "DDPO-IS", "ddpo_sf": "DDPO-SF", "rwr": "RWR", "rwr_sparse": "RWR-sparse", "best_of_n": "best of n",
    "nft": "NFT", "awm": "AWM", "ram": "RAM", "dpo": "online DPO",
    "preset": "the preset", "careless": "three times its learning rate, no KL penalty",
    "rank_1": "rank 1", "rank_4": "rank 4", "rank_16": "rank 16", "rank_64": "rank 64", "full": "full",
    "compressibility": "compressibility: - kB", "incompressibility": "incompressibility: kB",
    "aesthetic": "a reward learned from choices", "flow": "compressibility, flow model: - kB", "cps": "CPS",
}  # fmt: skip
plt.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
plt.rcParams["svg.hashsalt"] = "ddpo"  # the same file for the same numbers


class Job:
    """A finished run of a sweep."""

    def __init__(self, line, pictures):
        """line: of the sweep's results. pictures: {curve: {epoch: image grid}} of the first seed."""
        name = re.fullmatch(r"([^-]+)-(.+)-lr(.+)-seed(\d+)", line["run"]).groups()
        self.panel, self.curve, self.rate, self.seed = *name[:2], float(name[2]), int(name[3])
        self.metrics, self.evaluations, self.facts = line["metrics"], line["evaluations"], line
        self.options = flatten(get_config()) | line["options"]
        self.grids = pictures.get(f"{self.panel}-{self.curve}", {})

    def evaluated(self, section, key):
        """A measure of all evaluations: (E,), e.g. of "seen, stochastic" the "diversity"."""
        return np.array([evaluation[section][key] for evaluation in self.evaluations])

    def queries_evaluated(self):
        """(E,) reward queries before each evaluation."""
        return np.array([e["epoch"] for e in self.evaluations]) * self.options["sample.images_per_epoch"]

    def passes_evaluated(self):
        """(E,) predictions of the network that training took before each evaluation, a batch of n images being n."""
        passes = np.cumsum([0, *self.metrics["network_passes"]])
        return passes[[e["epoch"] for e in self.evaluations]]


def read_jobs(results, sweep):
    """A sweep's finished jobs at the best learning rate of each curve. Prints all; InputError if there are none."""
    lines = read_results(os.path.join(results, f"{sweep}.jsonl"))
    if not lines:
        raise InputError(f"{results}/{sweep}.jsonl has no finished job: run python -m scripts.sweep {sweep}")
    pictures = read_pictures(os.path.join(results, f"{sweep}.png"))
    jobs = [Job(lines[name], pictures) for name in sorted(lines)]
    best = best_rates(sweep, SWEEPS[sweep](), lines)
    for job in jobs:
        chosen = best.get(f"{job.panel}-{job.curve}") == job.rate
        print(
            f"{job.panel} {job.curve} lr {job.rate:g}{'*' if chosen else ''} seed {job.seed}: "
            f"{job.metrics['reward_mean'][0]:.3f} to {final_reward(job.facts):.3f}, {job.facts['seconds']:.0f} s"
        )
    return [job for job in jobs if best.get(f"{job.panel}-{job.curve}") == job.rate]


def by_curve(jobs, panel):
    """{curve: its jobs, one per seed} of a panel, in the order of the sweep."""
    jobs = [job for job in jobs if job.panel == panel]
    order = [label for label in LABELS if any(job.curve == label for job in jobs)]
    order += sorted({job.curve for job in jobs} - set(order))
    return {curve: [job for job in jobs if job.curve == curve] for curve in order}


def rewards_of(jobs):
    """(S, epochs) mean rewards of S jobs."""
    return np.stack([job.metrics["reward_mean"] for job in jobs])


def grid_pictures(grid, count, ratio=1.0):
    """The images in a run's image grid of `count` (ddpo/images.py: image_grid). ratio: of height to width."""
    columns = grid_columns(count)
    width, height = grid.width // columns, grid.height // -(-count // columns)
    corners = [(i % columns * width, i // columns * height) for i in range(count)]
    return [grid.crop((x, y, x + width - 2, y + round((width - 2) * ratio))) for x, y in corners]


def show(axes, job, epoch, indices, title):
    """Some images of a job's image grid after so many epochs, below each other."""
    height, width = job.options["sample.height"], job.options["sample.width"]  # 0, 0: the model's own, a square
    pictures = grid_pictures(job.grids[epoch], job.options["grid_images"], height / width if height and width else 1.0)
    axes.imshow(np.concatenate([np.asarray(pictures[i]) for i in indices]))
    axes.set_title(title, fontsize=7)
    axes.set_axis_off()


def draw_over_training(axes_of, job, indices):
    """Images of the same prompts and noise over training: an axes for each grid of a job."""
    epochs = list(job.grids)
    for axes, step in zip(axes_of, np.linspace(0, len(epochs) - 1, len(axes_of)).round().astype(int)):
        queries = epochs[step] * job.options["sample.images_per_epoch"]
        show(axes, job, epochs[step], indices, f"{queries} queries")


def draw_fig4(jobs):
    """What each algorithm gained on fixed noise, a column per task: against reward queries and against network passes.
    Below, what the first seed draws last. A dot per evaluation is hollow where a classifier that is no reward names
    fewer animals than `least_named`. Prints the gain up to there."""
    panels = [label for label in LABELS if any(job.panel == label for job in jobs)] or sorted({j.panel for j in jobs})
    curves = list(dict.fromkeys(curve for panel in panels for curve in by_curve(jobs, panel)))
    colours = dict(zip(curves, plt.cm.tab10.colors))
    rows = {"reward queries": Job.queries_evaluated, "network passes": Job.passes_evaluated}
    figure = plt.figure(figsize=(3.3 * max(2, len(panels)), 2.2 + 2.2 * len(rows)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.3 * len(rows), 1])
    grid = above.subplots(len(rows), len(panels), squeeze=False, sharey="col")
    for column, panel in zip(grid.T, panels):
        mine = by_curve(jobs, panel)
        for axes, (xlabel, x_of) in zip(column, rows.items()):
            for curve, its in mine.items():
                draw_gains(axes, its, x_of, colours[curve])
            axes.set(xlabel=xlabel)
        column[0].set_title(LABELS.get(panel, panel))
        for curve, its in mine.items():
            gains = [gain_while_named(job.evaluations) for job in its]
            print(f"{panel} {curve}: " + ", ".join(
                f"{gain:+.2f}{' (95% named)' if fell else ''}" for gain, fell in gains))  # fmt: skip
    for axes in grid[:, 0]:
        axes.set_ylabel("gain in reward")
    handles = [plt.Line2D([], [], color=colours[curve], marker=".") for curve in curves]
    above.legend(handles, [LABELS.get(c, c) for c in curves], loc="outside lower center", ncols=5, fontsize=8)
    for panel, strip in zip(panels, np.atleast_1d(below.subfigures(1, len(panels)))):
        mine = by_curve(jobs, panel)
        for axes, (curve, its) in zip(strip.subplots(1, len(mine), squeeze=False)[0], mine.items()):
            named = np.mean([job.evaluated("seen, stochastic", "classifier_accuracy")[-1] for job in its])
            name = "\n".join(LABELS.get(curve, curve).replace("-", " ").split())
            show(axes, its[0], max(its[0].grids), range(min(3, its[0].options["grid_images"])), f"{name}\n{named:.0%}")
    return figure


def draw_newer(jobs, newer):
    """The same for the newer algorithms, beside fig4's DDPO-IS."""
    return draw_fig4([job for job in jobs if job.curve == "ddpo_is"] + newer)


def draw_flow(jobs, newer, flow):
    """The same for the flow model, beside the same reward and judge on the model that DDIM draws."""
    return draw_fig4([job for job in jobs + newer if job.panel == "compressibility"
                      and job.curve in ("ddpo_is", "nft", "awm")] + flow)  # fmt: skip


def draw_gains(axes, jobs, x_of, colour):
    """The mean gain of a curve's seeds over the base model at each evaluation, in a band from lowest to highest."""
    rewards = np.array([job.evaluated("seen, stochastic", "reward_mean") for job in jobs])
    named = np.mean([job.evaluated("seen, stochastic", "classifier_accuracy") for job in jobs], axis=0)
    gains, x = rewards - rewards[:, :1], np.mean([x_of(job) for job in jobs], axis=0)
    axes.plot(x, gains.mean(0), color=colour, linewidth=1.2)
    axes.fill_between(x, gains.min(0), gains.max(0), color=colour, alpha=0.12, linewidth=0)
    colours = ["white" if n < least_named(named[0]) else colour for n in named]
    axes.scatter(x, gains.mean(0), s=14, color=colours, edgecolors=[colour], linewidths=0.8, zorder=3)


def draw_fig5(jobs):
    """Alignment over training, a curve per activity; below, images of the same prompts and noise."""
    figure = plt.figure(figsize=(6, 5.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.2, 1])
    panels = above.subplots(1, 2, sharey=True)
    for axes, kind in zip(panels, ("seen", "held_out")):
        for activity in prompts.ACTIVITIES:
            scores = [
                [np.mean([v for prompt, v in by_prompt.items() if prompt.endswith(activity)]) for by_prompt in
                 job.evaluated(f"{kind}, stochastic", "by_prompt")] for job in jobs
            ]  # fmt: skip
            plot_band(axes, jobs[0].queries_evaluated(), np.array(scores), activity)
        axes.set(title=f"prompts {'trained on' if kind == 'seen' else 'held out'}", xlabel="reward queries")
    panels[0].set_ylabel("CLIPScore")
    above.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7)
    indices = range(min(3, jobs[0].options["grid_images"]))
    draw_over_training(below.subplots(1, 5), jobs[0], indices)
    options = jobs[0].options
    trained_on = split_prompts(prompts.get_prompts(options["prompts"]), options["held_out"])[0]
    texts = [prompt for prompt, _ in trained_on[:: max(1, len(trained_on) // options["grid_images"])]]
    below.suptitle("; ".join(texts[i] for i in indices), fontsize=8)
    return figure


def draw_fig6(aligned, compressed):
    """Gains on prompts trained on and held out, sampled with noise and without: an arrow per seed, from base to
    finetuned by the presets."""
    compressed = [job for job in compressed if job.curve == "preset"]
    figure, panels = plt.subplots(1, 2, figsize=(6.4, 2.7), layout="constrained")
    sections = [f"{kind}, {s}" for s in ("stochastic", "deterministic") for kind in ("seen", "held_out")]
    for axes, jobs, title in zip(
        panels, (compressed, aligned), ("animals: - kB", "animals with activities: CLIPScore"), strict=True
    ):
        for x, section in enumerate(sections):
            scores = np.array([job.evaluated(section, "reward_mean")[[0, -1]] for job in jobs])
            colour = "C0" if section.startswith("seen") else "C1"
            for seed, pair in enumerate(scores):
                axes.annotate("", (x + 0.15 * (seed - 1), pair[1]), (x + 0.15 * (seed - 1), pair[0]),
                              arrowprops={"arrowstyle": "->", "color": colour})  # fmt: skip
            axes.plot([x] * len(scores), scores[:, 0], "_", color="0.4", markersize=20)
            axes.plot([x] * len(scores), scores[:, 1], " ")  # arrows alone would not widen the axes
        names = [s.replace("held_out", "held out").replace(", ", "\n") for s in sections]
        axes.set_xticks(range(len(sections)), names, fontsize=7)
        axes.set_title(title)
        axes.margins(0.1)
    return figure


def draw_fig7(jobs):
    """The preset, and what it prevents: the reward, and what it was not trained on; images of the same noise below.
    Animals held out from training are dashed."""
    curves = by_curve(jobs, jobs[0].panel)
    figure = plt.figure(figsize=(9, 5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1, 1])
    panels = above.subplots(1, 4)
    measures = {
        "reward_mean": "reward: - kB", "clipscore:models/emoji/clip": "CLIPScore", "classifier_accuracy":
        "animal named", "diversity": "diversity",
    }  # fmt: skip
    for axes, (key, title) in zip(panels, measures.items()):
        for curve, its in curves.items():
            for kind, style in (("seen", "-"), ("held_out", "--")):
                values = np.stack([job.evaluated(f"{kind}, stochastic", key) for job in its])
                label = LABELS[curve] + (", held out" if kind == "held_out" else "")
                colour = "C0" if curve == "preset" else "C3"
                plot_band(axes, its[0].queries_evaluated(), values, label, color=colour, linestyle=style)
        axes.set(title=title, xlabel="reward queries")
    above.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    for part, (curve, its) in zip(below.subfigures(1, len(curves)), curves.items()):
        part.suptitle(LABELS[curve], fontsize=8)
        draw_over_training(part.subplots(1, 4), its[0], range(min(3, its[0].options["grid_images"])))
    return figure


def draw_lora(jobs):
    """Reward curves by rank and of full finetuning, and what each costs."""
    figure, panels = plt.subplots(1, 4, figsize=(9, 2.7), layout="constrained", width_ratios=[2, 1, 1, 1])
    curves = by_curve(jobs, jobs[0].panel)
    colours = []
    for curve, mine in curves.items():
        name = f"{LABELS.get(curve, curve)}, {mine[0].rate:g}"
        colours.append(plot_band(panels[0], mine[0].metrics["reward_queries"], rewards_of(mine), name))
    panels[0].set(title="mean reward (- kB), learning rate", xlabel="reward queries")
    panels[0].legend(fontsize=6)
    costs = {
        "CPU seconds an epoch": lambda job: np.median(job.metrics["cpu_seconds"]),
        "peak memory, GB": lambda job: job.metrics["peak_memory_gb"][-1],
        "weights saved, MB": lambda job: job.facts["weights_mb"],
    }
    for axes, (title, cost) in zip(panels[1:], costs.items()):
        for x, (mine, colour) in enumerate(zip(curves.values(), colours)):
            axes.bar(x, np.median([cost(job) for job in mine]), color=colour)
        axes.set_title(title, fontsize=8)
    for axes in panels[1:]:
        axes.set_xticks(range(len(curves)), [LABELS.get(c, c).removeprefix("rank ") for c in curves], fontsize=7)
    return figure


def draw_ablations(jobs):
    """A column per option: above what the reward gained over the base model, below the change by a judge that was not
    trained on. A dot per seed, a bar for the mean; the default is in grey."""
    default = [job for job in jobs if job.panel == "default"]
    figure, grid = plt.subplots(2, len(ABLATIONS), figsize=(10, 4), sharey="row", layout="constrained")
    measures = {"reward_mean": "gain in reward (kB)", "classifier_accuracy": "animal named, change"}
    for column, (option, (default_label, values)) in enumerate(ABLATIONS.items()):
        groups = {default_label: default} | {str(v): [j for j in jobs if (j.panel, j.curve) == (option, str(v))]
                                             for v in values}  # fmt: skip
        for axes, key in zip(grid[:, column], measures):
            for x, mine in enumerate(groups.values()):
                scores = [np.diff(job.evaluated("seen, stochastic", key)[[0, -1]])[0] for job in mine]
                axes.bar(x, np.mean(scores), color="0.75" if mine is default else "C0", alpha=0.5)
                axes.plot([x] * len(scores), scores, ".", color="0.2", markersize=4)
            axes.set_xticks(range(len(groups)), groups, fontsize=6, rotation=30, ha="right")
            axes.axhline(0, color="0.4", linewidth=0.8)
        grid[0, column].set_title(option.replace("_", " "), fontsize=9)
    for axes, label in zip(grid[:, 0], measures.values()):
        axes.set_ylabel(label)
    return figure


def draw_frontier():
    """What each setting of results/working_point gained, against the animals that a classifier still names: a line per
    run, from the base model on, a dot per evaluation. Prints the gain at which 95% are named."""
    figure, panels = plt.subplots(1, 3, figsize=(12, 6.2), sharey=True, layout="constrained")
    titles = ("without guidance", "guided, on the denoising steps", "guided, on the finished image")
    for axes, title in zip(panels, titles):
        axes.set_prop_cycle(color=plt.cm.tab20.colors)
        axes.set(title=title, xlabel="gain in reward, % of the base model's JPEG size")
        axes.axhline(95, color="0.6", linewidth=0.8, linestyle=":")
    for name, line in read_results("results/working_point/runs.jsonl").items():
        forward = ALGORITHMS[line["options"].get("algorithm", "ddpo_is")].process == "forward"
        axes = panels[name.startswith("guided") + forward]
        sections = [evaluation["seen, stochastic"] for evaluation in line["evaluations"]]
        rewards, named = (np.array([s[key] for s in sections]) for key in ("reward_mean", "classifier_accuracy"))
        gains = (rewards - rewards[0]) / abs(rewards[0])
        axes.plot(100 * gains, 100 * named, ".-", label=name.removeprefix("guided, "), linewidth=1)
        at, fell = gain_while_named(line["evaluations"])
        print(f"{name}: {gains[-1]:+.1%} with {named[-1]:.1%} named at the end; "
              + (f"{at / abs(rewards[0]):+.1%} at 95% named" if fell else "95% are named throughout"))  # fmt: skip
    panels[0].set_ylabel("animals named, %")
    for axes in panels:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=7)
    return figure


FIGURES = {  # name -> how it is drawn, from the jobs of these sweeps
    "fig4": (draw_fig4, "fig4"),
    "newer": (draw_newer, "fig4", "newer"),
    "flow": (draw_flow, "fig4", "newer", "flow"),
    "fig5": (draw_fig5, "fig5"),
    "fig6": (draw_fig6, "fig5", "fig7"),
    "fig7": (draw_fig7, "fig7"),
    "lora": (draw_lora, "lora"),
    "ablations": (draw_ablations, "ablations"),
    "frontier": (draw_frontier,),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help=f"one of: {', '.join(FIGURES)}")
    parser.add_argument("--results", default="results/sweeps")
    parser.add_argument("--output", default="results/figures")
    args = parser.parse_args()
    draw, *sweeps = choose("figure", args.name, FIGURES)
    check_folder(args.output)
    figure = draw(*(read_jobs(args.results, sweep) for sweep in sweeps))
    os.makedirs(args.output, exist_ok=True)
    for kind in ("png", "svg"):
        path = os.path.join(args.output, f"{args.name}.{kind}")
        figure.savefig(path, dpi=200, metadata={"Date": None} if kind == "svg" else None)
        print(path)


if __name__ == "__main__":
    run_script(main)
