"""Denoising Diffusion Policy Optimization (arXiv 2305.13301). `train.py` is the algorithm; these are its parts."""

import difflib
import os
import sys

# transformers would say at import that torchvision is missing; no processor here needs it. policy.py turns warnings on.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


class InputError(ValueError):
    """What the user gave cannot work. The message is one line that says what is wrong and what to do."""


def run_script(main):
    """Runs a script's main(); an InputError ends it with its one line and exit code 1."""
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")


def cpu_cores():
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def use_cpu(threads, processes):
    """Sets this process's CPU threads (0: cores / processes) and returns them. `accelerate launch` allows one, and more
    than cores / processes would be far slower. torch is not imported by this module's other users."""
    import torch

    threads = threads or max(1, cpu_cores() // processes)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    return threads


def nearest(name, choices):
    """ " Did you mean X?", or nothing if no choice is near."""
    found = difflib.get_close_matches(str(name), list(choices), n=1, cutoff=0.5)
    return f" Did you mean {found[0]}?" if found else ""


def choose(kind, name, choices):
    """choices[name]; or an InputError that names the nearest choice, and all."""
    if name not in choices:
        raise InputError(f"unknown {kind} {name!r}.{nearest(name, choices)} There is: {', '.join(choices)}")
    return choices[name]
