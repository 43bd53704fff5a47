"""Runs many trainings and what belongs to them, several at a time, none twice: for scripts.sweep and
scripts.compare_preferences."""

import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections import namedtuple
from datetime import timedelta

from ddpo.checkpoint import list_checkpoints
from ddpo.errors import InputError

PRELOAD = ["train", "scripts.simulate_rater", "scripts.train_dpo", "scripts.train_reward"]

# Something to make, after others: `commands` are (function, *arguments), one after the other, each in a process of its
# own; `run` is the folder of the run that it trains, if it does.
Step = namedtuple("Step", "name needs commands run", defaults=((), (), ""))


# -------------------------------------------------------------------------------------------------------- the commands
def module(name, arguments):
    """`python -m NAME ARGUMENTS`, in this process."""
    sys.argv = [name, *map(str, arguments)]
    print("python -m", *sys.argv, flush=True)
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def train(name, run, epochs, options):
    """Trains a run until it has done so many epochs, or resumes it. name: train or scripts.train_dpo."""
    resume = os.path.exists(f"{run}/config.json")
    if resume and any(checkpoint.endswith(f"epoch_{epochs:04d}") for checkpoint in list_checkpoints(run)):
        return
    where = f"--config.{'resume' if resume else 'run_dir'}={run}"
    module(name, [*options, f"--config.num_epochs={epochs}", where])


def execute(command, log):
    """Runs a command in this new process, with its output at the end of a file."""
    os.setsid()  # Ctrl-C reaches the script alone, which passes it on
    with open(log, "a") as f:
        for stream in (1, 2):
            os.dup2(f.fileno(), stream)
    function, *arguments = command
    function(*arguments)


# --------------------------------------------------------------------------------------------------------- running them
def needed(steps, names, done):
    """The names, and those of all steps that these need, in the order of the steps, but for those `done`."""
    found, new = set(), set(names) - done
    while new:
        found |= new
        new = {need for name in new for need in steps[name].needs} - found - done
    return [name for name in steps if name in found]


def run_steps(steps, names, logs, jobs, collect, minutes=0.0, done=(), start="forkserver"):
    """Makes steps, and what they need.

    Args:
        steps: {name: Step}. names: those that are wanted.
        logs: the folder of NAME.txt, what its commands print.
        jobs: how many are made at a time.
        collect: function of (Step, seconds), called when it is done; what it returns is printed.
        minutes: after which to stop, as Ctrl-C does: what is being trained finishes its epoch and saves. 0: never.
        done: names of steps that are not to be made again.
        start: of multiprocessing. A fork server imports once what all import, which takes longer than a short run.
    Returns:
        (names of failed steps, names of those that were not made).
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # to have asked for a GPU must not break it in a fork
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.makedirs(logs, exist_ok=True)
    done = set(done)
    waiting, running, failed, seconds = needed(steps, names, done), {}, [], []
    context = multiprocessing.get_context(start)
    if start == "forkserver":
        context.set_forkserver_preload(PRELOAD)
    until, total = time.time() + 60 * minutes, len(waiting)
    print(f"{total} steps to make", flush=True)
    try:
        while waiting or running:
            ready = [name for name in waiting if done.issuperset(steps[name].needs)]
            while ready and len(running) < jobs:
                name = ready.pop(0)
                waiting.remove(name)
                running[name] = [None, list(steps[name].commands), time.time()]
            if not running:
                break  # what is waiting needs a step that failed
            for name, (process, commands, since) in list(running.items()):
                if process is not None and process.exitcode is None:
                    continue
                if process is not None and process.exitcode:
                    del running[name]
                    failed.append(name)
                    print(f"{name} failed: see {logs}/{name}.txt", flush=True)
                elif commands:
                    process = context.Process(target=execute, args=(commands.pop(0), f"{logs}/{name}.txt"))
                    process.start()
                    running[name][0] = process
                else:
                    del running[name]
                    seconds.append(time.time() - since)
                    said = collect(steps[name], seconds[-1])
                    done.add(name)
                    made, left = total - len(waiting) - len(running) - len(failed), len(waiting) + len(running)
                    left = timedelta(seconds=round(left * sum(seconds) / len(seconds) / jobs))
                    print(f"[{made}/{total}] {name}: {seconds[-1]:.0f} s{', ' * bool(said)}{said or ''}; "
                          f"about {left} left", flush=True)  # fmt: skip
            if minutes and time.time() > until:
                raise KeyboardInterrupt
            time.sleep(0.05)
    except BaseException as error:
        print("stopping: what is being trained finishes its epoch and saves", flush=True)
        processes = [process for process, *_ in running.values() if process is not None and process.exitcode is None]
        for process in processes:
            os.kill(process.pid, signal.SIGINT)
        for process in processes:
            process.join()
        if not isinstance(error, KeyboardInterrupt):
            raise
    return failed, waiting + list(running)


def end(failed, left):
    """Says what `run_steps` left, or raises InputError naming the steps that failed."""
    if left:
        print(f"{len(left)} steps left: the same command goes on with them")
    if failed:
        raise InputError(f"{len(failed)} step(s) failed: {', '.join(failed)}")
