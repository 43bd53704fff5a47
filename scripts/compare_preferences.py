"""From a person's choices to a finetuned model: the ways there, on the same choices, judged by the true taste.

    python -m scripts.compare_preferences --jobs 2                               # all of it: days on a CPU
    python -m scripts.compare_preferences --jobs 12 --minutes 3                  # a GPU: as much as there is time for
    python -m scripts.compare_preferences --choices 150 --raters 0 --methods dpo reward_ddpo
    python -m scripts.compare_preferences --draw                                 # table and figure alone

    dpo          Diffusion-DPO on the choices (scripts.train_dpo)
    sft          supervised finetuning on the chosen images, the baseline
    reward_ddpo  a reward model (scripts.train_reward), and DDPO on it
    dpo_ddpo     some epochs of DPO, its LoRA merged into the base model, then DDPO with the reward model
    dpo_rounds   DPO in three rounds: each shows the rater new images, of the model as it is by then, for a third of
                 the choices, and goes on with all choices so far

A rater is scripts.simulate_rater with a seed of its own, which is that of all training, too; fewer choices are the
first of more. Everything lands in --folder: pairs, votes, reward models, runs, logs. A run that is done becomes a line
of --results. Whatever is there already is not made again, and a run that was stopped, by Ctrl-C or --minutes, goes on
from its last checkpoint when the same command is given again.
"""

import argparse
import json
import os
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
from diffusers import DiffusionPipeline

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from ddpo.errors import DRAWINGS, InputError, at_least, check_folder, check_output, run_script, seed  # noqa: E402
from ddpo.options import read_options  # noqa: E402
from scripts.jobs import Step, end, module, run_steps, train  # noqa: E402
from scripts.provenance import commit, processor  # noqa: E402
from scripts.results import add_result, read_metrics, read_results  # noqa: E402

LABELS = {
    "dpo": "DPO", "sft": "finetuning on the chosen", "reward_ddpo": "reward model, DDPO",
    "dpo_ddpo": "DPO, then DDPO", "dpo_rounds": "DPO in three rounds",
}  # fmt: skip
EPOCHS = {  # after which it is measured
    "dpo": (4, 8, 12), "sft": (8, 16), "reward_ddpo": (4, 8), "dpo_ddpo": (4, 8), "dpo_rounds": (4, 8, 12),
}  # fmt: skip
ROUNDS = 3
EPOCH = 8  # of DPO before DDPO follows, and of all in the figure


# ----------------------------------------------------------------------------------------------------------- the steps
def plan(args):
    """The steps in the order of their importance: {name: Step}. A run is called METHOD-CHOICES-raterSEED."""
    folder, pairs, most = args.folder, f"{args.folder}/pairs", max(args.choices)
    draw = ["--config", "config/emoji.py", "--pairs", most, "--draw_only", "--output", pairs]
    steps = [Step(f"pairs-{most}", (), [(module, "scripts.annotate", draw)])]
    for count in args.choices:
        for rater in args.raters:
            case, votes = f"{count}-rater{rater}", f"{pairs}/choices-{count}-rater{rater}.jsonl"
            choose = ["choose", "--pairs", pairs, "--count", count, "--seed", rater, "--output", votes]
            steps.append(Step(f"votes-{case}", (f"pairs-{most}",), [(vote, votes, choose)]))
            learn = ["--choices", votes, "--model", "models/emoji", "--seed", rater]
            learn += ["--output", f"{folder}/reward-{case}", "--cache", f"{folder}/features-{case}"]
            steps.append(Step(f"reward-{case}", (f"votes-{case}",), [(module, "scripts.train_reward", learn)]))
    steps += [run_step(method, n, rater, args) for n in args.choices for method in LABELS for rater in args.raters]
    return {step.name: step for step in steps}


def run_step(method, count, rater, args):
    """The training by a method on a rater's choices, and the measuring after its EPOCHS."""
    folder, case = args.folder, f"{count}-rater{rater}"
    run, reward, merged = f"{folder}/{method}-{case}", f"{folder}/reward-{case}", f"{folder}/merged-{case}"
    epochs, commands, needs = args.epochs or EPOCHS[method], [], [f"votes-{case}"]
    options = [f"--config.seed={rater}", "--config.threads=1"]
    options += [f"--config.save_every={np.gcd.reduce(epochs)}", "--config.keep_checkpoints=0", "--config.grid_every=0"]
    if torch.cuda.is_available():  # all images of an epoch at once, and all transitions, or pairs, of an update
        options += ["--config.sample.batch_size=128", "--config.train.batch_size=80"]
    options += [f"--config.{pair}" for pair in args.options]
    if method in ("dpo", "sft"):
        votes = ["--choices", f"{folder}/pairs/choices-{case}.jsonl", "--loss", method]
        commands.append((train, "scripts.train_dpo", run, epochs[-1], [*votes, *options]))
    elif method == "dpo_rounds":
        needs, files = [], []
        for k in range(ROUNDS):
            pairs = f"{folder}/pairs-{method}-{case}-{k}"
            source = ["--run", run] if k else ["--config", "config/emoji.py"]
            draw = [*source, "--pairs", count // ROUNDS, "--draw_only", "--output", pairs, "--seed", k]
            files.append(f"{pairs}/choices.jsonl")
            choose = ["choose", "--pairs", pairs, "--count", count // ROUNDS, "--seed", 100 * k + rater]
            commands += [(module, "scripts.annotate", draw), (vote, files[-1], choose)]
            until = epochs[-1] * (k + 1) // ROUNDS
            commands.append((train, "scripts.train_dpo", run, until, ["--choices", *files, *options]))
    else:
        options = ["--config", "config/emoji.py:aesthetic", f"--config.reward=learned:{reward}", *options]
        needs.append(f"reward-{case}")
        if method == "dpo_ddpo":
            needs.append(f"dpo-{case}")
            commands.append((merge, f"{folder}/dpo-{case}", f"epoch_{EPOCH:04d}", merged))
            options.append(f"--config.model={merged}")
        commands.append((train, "train", run, epochs[-1], options))
    for epoch in epochs:
        name = f"epoch_{epoch:04d}"
        look = ["measure", "--run", run, "--checkpoint", name, "--count", args.pictures]
        look += ["--output", f"{run}/{name}.json"]
        if method != "dpo_ddpo":  # which has a base model of its own
            look += ["--base", f"{folder}/base-{args.pictures}.json"]
        commands.append((module, "scripts.simulate_rater", look))
    return Step(f"{method}-{case}", tuple(needs), commands, run)


# -------------------------------------------------------------------------------------------------------- the commands
def vote(path, arguments):
    """The simulated rater's, who refuses to write over votes."""
    if not os.path.exists(path):
        module("scripts.simulate_rater", arguments)


def merge(run, checkpoint, folder):
    """Writes the pipeline of a run's base model with the LoRA of a checkpoint added to its weights."""
    pipe = DiffusionPipeline.from_pretrained(read_options(run)["model"])
    pipe.load_lora_weights(f"{run}/checkpoints/{checkpoint}/lora")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(folder)


def collect_step(step, seconds, args, machine):
    """Marks a finished step, and if it is a run adds it to the results."""
    marks = Path(args.folder, "done")
    marks.mkdir(exist_ok=True)
    (marks / step.name).write_text(f"{seconds:.1f}\n")
    if not step.run:
        return
    method, count, rater = step.name.split("-")
    epochs = args.epochs or EPOCHS[method]
    measured = {epoch: json.loads(Path(step.run, f"epoch_{epoch:04d}.json").read_text()) for epoch in epochs}
    facts = {"method": method, "choices": int(count), "rater": int(rater.removeprefix("rater")), "taste": measured}
    facts["seconds_before"] = {}  # what is needed took
    for need in step.needs:
        if need.startswith("reward"):
            facts["seconds_before"]["reward"] = float(Path(args.folder, "done", need).read_text())
        elif need.startswith("dpo"):
            seconds = read_metrics(f"{args.folder}/{need}")["seconds"][:EPOCH]
            facts["seconds_before"]["dpo"] = round(float(seconds.sum()), 1)
    add_result(args.results, step.run, step.name, facts | machine)


# ---------------------------------------------------------------------------------------------------------- the figure
def gains(line):
    """{epoch: (rise of the true taste in standard deviations of the base model's images, share named)} of a run.
    The base model is that of the first method, also where DDPO began from a model that DPO had made."""
    return {
        int(epoch): ((m["finetuned"]["taste"] - line["base"]["taste"]) / line["base"]["taste_std"],
                     m["finetuned"]["classifier_accuracy"])
        for epoch, m in line["taste"].items()
    }  # fmt: skip


def read_runs(path):
    """The lines of the results, each with "base", what the base model's own images measure, if they were compared."""
    lines = list(read_results(path).values())
    base = next((m["base"] for line in lines if line.get("method") != "dpo_ddpo" for m in line["taste"].values()), None)
    if base is None:
        raise InputError(f"{path} has no run of the base model itself yet: run --methods dpo first")
    return [line | {"base": base} for line in lines]


def table(lines):
    """Markdown: a row per number of choices, method and epoch, with the raters' values."""
    heads = "choices", "method", "epochs", "true taste", "mean", "warm", "calm", "large", "named", "seconds"
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    cells = {}
    for line in lines:
        for epoch in line["taste"]:
            cells.setdefault((line["choices"], list(LABELS).index(line["method"]), int(epoch)), []).append(line)
    for (count, method, epoch), group in sorted(cells.items()):
        group = sorted(group, key=lambda line: line["rater"])
        pairs = [gains(line)[epoch] for line in group]
        after = [line["taste"][str(epoch)]["finetuned"] for line in group]
        parts = [f"{np.mean([a[part] for a in after]):.2f}" for part in ("warm", "calm", "large")]
        seconds = np.mean([line["metrics"]["seconds"][:epoch].sum() + sum(line["seconds_before"].values())
                           for line in group])  # fmt: skip
        rows.append(
            f"| {count:,} | {list(LABELS.values())[method]} | {epoch} | "
            f"{', '.join(f'{taste:+.2f}' for taste, _ in pairs)} | {np.mean([taste for taste, _ in pairs]):+.2f} | "
            + " | ".join(parts)
            + f" | {', '.join(f'{named:.0%}' for _, named in pairs)} | {seconds:.0f} |"
        )
    return "\n".join(rows)


def draw(lines, path):
    """True taste and animals named against the number of choices, after EPOCH epochs, and one against the
    other at all epochs that were measured. A point per rater; lines are means."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    counts = sorted({line["choices"] for line in lines})
    for i, (method, label) in enumerate(LABELS.items()):
        own = [line for line in lines if line["method"] == method]
        if not own:
            continue
        for axis, value in zip(axes, (0, 1)):
            points = {}
            for line in sorted(own, key=lambda line: line["choices"]):
                values = gains(line)
                points.setdefault(line["choices"], []).append(values.get(EPOCH, max(values.items())[1])[value])
            axis.plot(list(points), [np.mean(v) for v in points.values()], color=f"C{i}", lw=1.2, label=label)
            axis.plot([n for n, v in points.items() for _ in v], [x for v in points.values() for x in v], "o",
                      color=f"C{i}", ms=3, alpha=0.5)  # fmt: skip
        both = [pair for line in own for pair in gains(line).values()]
        axes[2].plot(*zip(*both), "o", color=f"C{i}", ms=3, alpha=0.6)
    base = lines[0]["base"]["classifier_accuracy"]
    axes[1].axhline(base, color="gray", ls=":")
    axes[2].plot(0, base, "k+", ms=9)
    for axis in axes[:2]:
        axis.set_xscale("log")
        axis.set_xticks(counts, [f"{n:,}" for n in counts])
        axis.minorticks_off()
        axis.set_xlabel("choices")
    axes[0].set_ylabel("rise of the true taste, base std")
    axes[1].set_ylabel("animals named")
    axes[2].set_xlabel("rise of the true taste, base std")
    axes[2].set_ylabel("animals named")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whole = at_least(1)
    # Of most interest first: it may be stopped at any time.
    parser.add_argument("--choices", type=whole, nargs="+", default=[150, 500, 50, 1500], metavar="N")
    parser.add_argument("--raters", type=seed, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--methods", nargs="+", default=list(LABELS), choices=LABELS, metavar="NAME")
    parser.add_argument("--jobs", type=whole, default=1, help="how many at a time, each with one CPU thread")
    parser.add_argument("--minutes", type=at_least(0, float), default=0.0, help="stop after so many; 0: never")
    parser.add_argument("--epochs", type=whole, nargs="+", help="after which runs are measured, the last ending them")
    parser.add_argument("--pictures", type=whole, default=4, help="per animal, that a run is judged by")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="of train.py, for all runs")
    parser.add_argument("--folder", default="runs/preferences", help="where everything is made")
    parser.add_argument("--results", default="results/preferences/methods.jsonl")
    parser.add_argument("--figure", default="results/preferences/methods.png")
    parser.add_argument("--prepare", action="store_true", help="only pairs, votes and reward models")
    parser.add_argument("--draw", action="store_true", help="only the table and the figure, of --results")
    args = parser.parse_args()
    check_output(args.results)
    check_output(args.figure, DRAWINGS)
    failed = left = []
    if not args.draw:
        check_folder(args.folder)
        steps, finished = plan(args), read_results(args.results)
        wanted = [name for name, step in steps.items() if name.split("-")[0] in args.methods and name not in finished]
        names = [name for name, step in steps.items() if not step.run] if args.prepare else wanted
        machine = {"commit": commit(), "hardware": processor(), "jobs": args.jobs}
        collect = partial(collect_step, args=args, machine=machine)
        done = {name for name in steps if Path(args.folder, "done", name).exists()} - set(wanted)
        failed, left = run_steps(steps, names, f"{args.folder}/logs", args.jobs, collect, args.minutes, done)
    if read_results(args.results):
        lines = read_runs(args.results)
        print(table(lines))
        draw(lines, args.figure)
        print(f"wrote {args.figure}")
    end(failed, left)


if __name__ == "__main__":
    run_script(main)
