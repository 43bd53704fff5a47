"""Kills a run with SIGKILL at random moments, resumes it each time, and compares the end with a run left alone.

    python -m scripts.dev.kill_runs --kills 50 --output results/reliability/kills.json

The run trains a tiny random model through train.py. Half of the kills come at any moment after the start; the others
wait for one phase (sampling, reward, update, writing a checkpoint) and strike somewhere in it. A run is killed several
times in a row before it may finish. Then weights, optimizer state, reward statistics and metrics.jsonl must equal those
of the undisturbed run to the bit, but for the clock's entries. Exit code 1 if anything differs.
"""

import argparse
import collections
import json
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import threading
import time

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from ddpo.errors import at_least, run_script, seed
from scripts.make_random_model import make_random_model
from scripts.provenance import commit

PHASES = {  # the function of our code that the main thread is in -> the phase
    "sample_with_logprob": "sampling", "compute_rewards": "reward", "score": "update",
    "clip_grad_norm_": "update",
    "save_checkpoint": "checkpoint", "truncate_metrics": "metrics", "log_metrics": "metrics",
    "load_checkpoint": "resuming", "draw_grid": "grid", "load_policy": "loading",
}  # fmt: skip
EPOCHS = 6


def phase_now():
    """The innermost known phase that the main thread is in."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    while frame is not None:
        if frame.f_code.co_name in PHASES:
            return PHASES[frame.f_code.co_name]
        frame = frame.f_back
    return "elsewhere"


def kill_thread(seed, note, seconds):
    """Kills this process at a random moment, having noted the phase. Which moment is a function of `seed`; `seconds` is
    how long the sampling and training of a whole run take."""
    rng = random.Random(seed)
    target = rng.choice(["", "", "", "", "sampling", "reward", "update", "checkpoint"])
    if target:
        skip = rng.randrange(4)  # times that the phase is let pass
        for _ in range(skip):
            while phase_now() != target:
                time.sleep(0.0005)
            while phase_now() == target:
                time.sleep(0.0005)
        while phase_now() != target:
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.02))
    else:
        while phase_now() != "sampling":
            time.sleep(0.001)
        time.sleep(rng.uniform(0, seconds))
    with open(note, "w") as f:
        json.dump({"target": target or "any", "phase": phase_now()}, f)
    os.kill(os.getpid(), signal.SIGKILL)


def run(arguments, log, seed=None, note=None, seconds=0):
    """train.py in a child process, which is forked: importing torch and diffusers takes longer than the run."""
    child = os.fork()
    if child == 0:
        sys.stdout.flush()
        with open(log, "a") as f:
            os.dup2(f.fileno(), 1)
            os.dup2(f.fileno(), 2)
        sys.argv = ["train.py", *arguments]
        if seed is not None:
            threading.Thread(target=kill_thread, args=(seed, note, seconds), daemon=True).start()
        code = 1
        try:
            runpy.run_path("train.py", run_name="__main__")
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(bool(error.code))
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def final_state(run_dir):
    """What must be equal: weights, trainer state, and metrics without what a clock decides."""
    folder = os.path.join(run_dir, "checkpoints", f"epoch_{EPOCHS:04d}")
    state = torch.load(os.path.join(folder, "state.pt"), weights_only=True)
    weights = load_file(os.path.join(folder, "lora", "pytorch_lora_weights.safetensors"))
    with open(os.path.join(run_dir, "metrics.jsonl")) as f:
        metrics = [json.loads(line) for line in f]
    metrics = [{k: v for k, v in m.items() if "second" not in k and "memory" not in k} for m in metrics]
    return {"weights": weights, "optimizer": state["optimizer"], "tracker": state["tracker"], "metrics": metrics}


def same(a, b):
    """Whether two nests of dicts, lists, tensors and values are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=at_least(1), default=50)
    parser.add_argument("--per_run", type=at_least(1), default=5, help="kills of one run before it may finish")
    parser.add_argument("--seed", type=seed, default=0, help="of the moments of the kills")
    parser.add_argument("--size", choices=("tiny", "tiny_xl", "tiny_sd35"), default="tiny", help="the random model")
    parser.add_argument("--output", default="", help="a JSON file for the result")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start, work = time.time(), tempfile.mkdtemp()
    model = str(make_random_model(args.size, os.path.join(work, "model")))
    options = {
        "model": model, "lora_rank": 4, "num_epochs": EPOCHS, "save_every": 1, "keep_checkpoints": 2, "threads": 1,
        "prompts": "common_animals", "grid_images": 2, "sample.num_steps": 4, "sample.images_per_epoch": 16,
        "sample.batch_size": 4, "train.batch_size": 4, "train.updates_per_epoch": 2, "train.learning_rate": 1e-3,
        "stats.min_count": 2,
    }  # fmt: skip
    fresh = [f"--config.{k}={v}" for k, v in options.items()]
    whole = os.path.join(work, "whole")
    if run([*fresh, f"--config.run_dir={whole}"], os.path.join(work, "whole.log")):
        sys.exit(open(os.path.join(work, "whole.log")).read())
    expected = final_state(whole)
    with open(os.path.join(whole, "metrics.jsonl")) as f:
        seconds = sum(json.loads(line)["seconds"] for line in f)
    phases, differing, killed, number, attempts = collections.Counter(), [], 0, 0, 0
    bar = tqdm(total=args.kills, unit="kill")
    while killed < args.kills:
        run_dir = os.path.join(work, f"run{number}")
        log, note = run_dir + ".log", run_dir + ".note"
        left = min(args.per_run, args.kills - killed)
        while True:
            begun = os.path.exists(os.path.join(run_dir, "config.json"))
            arguments = [f"--config.resume={run_dir}"] if begun else [*fresh, f"--config.run_dir={run_dir}"]
            attempts += 1  # one that ended before its kill came is not tried again with the same moment
            code = run(arguments, log, args.seed * 100_000 + attempts if left else None, note, seconds)
            if code == -signal.SIGKILL:
                with open(note) as f:
                    phases[json.load(f)["phase"]] += 1
                killed, left = killed + 1, left - 1
                bar.update()
            elif code == 0:  # finished, perhaps before its kill came
                break
            else:
                sys.exit(f"the run ended with exit code {code}:\n{open(log).read()}")
        found = final_state(run_dir)
        differing += [f"run {number}: {key}" for key in expected if not same(expected[key], found[key])]
        number += 1
    bar.close()
    result = {
        "kills": killed, "runs": number, "killed_in": dict(phases), "differing": differing,
        "size": args.size, "seed": args.seed, "seconds": round(time.time() - start), "commit": commit(),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.output:
        os.makedirs(os.path.dirname(args.output) or ".", exist_ok=True)
        with open(args.output, "w") as f:
            json.dump(result, f, indent=1)
    shutil.rmtree(work)
    sys.exit(bool(differing))


if __name__ == "__main__":
    run_script(main)
