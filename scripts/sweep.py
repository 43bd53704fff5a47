"""Runs a sweep of config/sweeps.py, one job after another, and keeps what the figures need.

    python -m scripts.sweep fig4 --jobs 2

Each job is a run of train.py with one CPU thread (--threads), in runs/sweeps/NAME/JOB. First every learning rate to
try runs on one seed, then the best ones on the others. A job that is done becomes a line of results/sweeps/NAME.jsonl
(see scripts/results.py). Where the figure shows images (PICTURED), those of the first seed at the best learning rate
go to NAME.png beside it. Jobs that are there already are skipped. A sweep that was stopped with Ctrl-C or killed goes
on where it was when it is started again: a job that had begun resumes from its last checkpoint.
"""

import argparse
import glob
import os
import shlex
import sys

import torch
from PIL import Image

from config.base import get_config
from config.sweeps import JUDGED, PICTURED, SEEDS, SWEEPS, job_of, seed_jobs, tuning_jobs
from ddpo.checkpoint import list_checkpoints
from ddpo.errors import InputError, at_least, check_folder, choose, run_script
from ddpo.options import NO_EFFECT, flatten, load_preset, read_options
from scripts.jobs import Step, end, run_steps, train
from scripts.provenance import commit, processor
from scripts.results import (
    add_pictures,
    add_result,
    gain_while_named,
    read_metrics,
    read_results,
    summarise,
)  # fmt: skip


def train_options(options, threads):
    """The command line of a job, after train.py and without the number of epochs and where it runs."""
    given = {key: value for key, value in options.items() if key not in ("config", "num_epochs")} | {"threads": threads}
    return ["--config", options["config"], *(f"--config.{key}={value}" for key, value in given.items())]


def check_options(where, made, options):
    """Raises InputError if the options that a run was `made` with, by dotted name, are not those that a job with these
    `options` would have now. where: what holds the run."""
    wanted = flatten(load_preset(options["config"])) | options
    for key in sorted(wanted.keys() - {"config"}):
        if str(made[key]) != str(wanted[key]) and (key in options or key not in NO_EFFECT):
            raise InputError(f"{where} was made with other options ({key} {made[key]}, now {wanted[key]}): remove it")


def collect(run_dir, results, sweep, job, facts):
    """Adds a finished run to the sweep's results, and its image grids if it is the best so far of the first seed's.
    Returns its line."""
    metrics = read_metrics(run_dir)
    weights = glob.glob(os.path.join(list_checkpoints(run_dir)[-1], "*", "*.safetensors"))  # in lora/ or unet/
    facts["seconds"] = round(float(metrics["seconds"].sum()), 1)
    facts["weights_mb"] = round(sum(map(os.path.getsize, weights)) / 1e6, 3)
    path = os.path.join(results, f"{sweep}.jsonl")
    curves, finished = SWEEPS[sweep](), read_results(path) | {job: summarise(run_dir) | {"metrics": metrics}}
    for curve, rate in best_rates(sweep, curves, finished).items():
        if sweep in PICTURED and job == job_of(curve, curves[curve], rate, SEEDS[0])[0]:
            grids = sorted(glob.glob(os.path.join(glob.escape(run_dir), "images", "epoch_*.png")))
            grids = grids if read_options(run_dir)["grid_every"] else grids[-1:]
            pictures = {int(grid[-8:-4]): Image.open(grid) for grid in grids}  # epoch_0012.png
            add_pictures(os.path.join(results, f"{sweep}.png"), curve, pictures)
    return add_result(path, run_dir, job, facts)  # last: it marks the job as done


def final_reward(line):
    """The mean reward of a run's last three epochs. line: of a sweep's results."""
    return line["metrics"]["reward_mean"][-3:].mean()


def best_rates(sweep, curves, results):
    """{curve: learning rate} by the finished jobs on the first seed: the one with the highest final reward, or in the
    sweeps JUDGED the highest gain in reward while 95% of the animals are named. results: {job: its line}."""
    best = {}
    for curve, options in curves.items():
        jobs = {rate: job_of(curve, options, rate, SEEDS[0])[0] for rate in options["train.learning_rate"]}
        lines = {rate: results[job] for rate, job in jobs.items() if job in results}
        if sweep in JUDGED:
            outcomes = {rate: gain_while_named(line["evaluations"])[0] for rate, line in lines.items()}
        else:
            outcomes = {rate: final_reward(line) for rate, line in lines.items()}
        if outcomes:
            best[curve] = max(outcomes, key=outcomes.get)
    return best


def run_jobs(jobs, args):
    """Runs {name: options}, args.jobs at a time, without those that are done. Returns what `jobs.run_steps` does."""
    path, runs = os.path.join(args.results, f"{args.name}.jsonl"), os.path.join(args.runs, args.name)
    results, defaults, steps = read_results(path), flatten(get_config()), {}
    for job, options in jobs.items():
        run, command = os.path.join(runs, job), train_options(options, args.threads)
        steps[job] = Step(job, (), [(train, "train", run, options["num_epochs"], command)], run)
        if job in results:
            check_options(f"{path}: {job}", defaults | results[job]["options"], options)
        elif os.path.exists(os.path.join(run, "config.json")):
            check_options(run, read_options(run), options)
    cores = "" if torch.cuda.is_available() else f", {os.cpu_count()} cores"
    machine = {"commit": commit("train.py", "ddpo", "config"), "hardware": processor() + cores, "threads": args.threads}

    def collect_job(step, seconds):
        _, _, _, epochs, options = step.commands[0]
        command = "python " + shlex.join(["train.py", *options, f"--config.num_epochs={epochs}"])
        line = collect(step.run, args.results, args.name, step.name, {"command": command, **machine})
        rewards = line["metrics"]["reward_mean"]
        return f"reward {rewards[0]:.3f} to {rewards[-1]:.3f}"

    waiting = [job for job in jobs if job not in results]
    print(f"{args.name}: {len(jobs)} jobs, {len(jobs) - len(waiting)} of them done", flush=True)
    return run_steps(steps, waiting, os.path.join(runs, "logs"), args.jobs, collect_job, args.minutes)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help=f"one of: {', '.join(SWEEPS)}")
    parser.add_argument("--jobs", type=at_least(1), default=1, help="how many run at a time")
    parser.add_argument("--threads", type=at_least(1), default=1, help="CPU threads of each")
    parser.add_argument("--minutes", type=at_least(0, float), default=0.0, help="stop after so many; 0: never")
    parser.add_argument("--results", default="results/sweeps")
    parser.add_argument("--runs", default="runs/sweeps")
    args = parser.parse_args()

    curves = choose("sweep", args.name, SWEEPS)()
    for folder in (args.results, args.runs):
        check_folder(folder)
    failed, left = run_jobs(tuning_jobs(curves), args)
    if not left:
        best = best_rates(args.name, curves, read_results(os.path.join(args.results, f"{args.name}.jsonl")))
        print("learning rates: " + ", ".join(f"{curve} {rate:g}" for curve, rate in best.items()), flush=True)
        others, left = run_jobs(seed_jobs(curves, best), args)
        failed += others
    end(failed, left)
    if left and not args.minutes:  # Ctrl-C
        sys.exit(130)


if __name__ == "__main__":
    run_script(main)
