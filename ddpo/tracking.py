"""What a run measures: means over an epoch, the time its phases take, RUN/metrics.jsonl and RUN/evaluation.jsonl, and
wandb or TensorBoard."""

import json
import os
import time
from netrc import NetrcParseError, netrc

import torch

from ddpo.options import flatten


def start_tracker(accelerator, run_dir, config):
    """Starts wandb or TensorBoard if `config.tracker` asks for it. wandb never asks for a login: without a key it
    records offline."""
    if not config.tracker:
        return
    if config.tracker == "wandb" and "WANDB_MODE" not in os.environ and not _has_wandb_key():
        os.environ["WANDB_MODE"] = "offline"
        accelerator.print(f"wandb: no API key, so it records offline; later: wandb sync {run_dir}/wandb/offline-*")
    options = {"wandb": {"dir": run_dir, "name": os.path.basename(run_dir)}}
    options = options if config.tracker == "wandb" else {}
    try:
        accelerator.init_trackers("ddpo", config=flatten(config), init_kwargs=options)
    except Exception as error:  # a server that cannot be reached must not cost the run
        _give_up_tracker(accelerator, config.tracker, error)


def _give_up_tracker(accelerator, name, error):
    accelerator.trackers = []
    reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    print(f"warning: {name} failed ({reason}); the run goes on without it, metrics.jsonl has everything", flush=True)


def _has_wandb_key():
    try:
        return bool(os.environ.get("WANDB_API_KEY") or netrc().authenticators("api.wandb.ai"))
    except (OSError, NetrcParseError):
        return False


class Stopwatch:
    """Seconds of an epoch and of its phases. `lap` is called where the device has been waited for, as the loop does
    to read images, rewards and gradient norms: it costs no synchronisation of its own."""

    def __init__(self):
        self.start = self.last = time.perf_counter()
        self.cpu_start = time.process_time()
        self.seconds = {}

    def lap(self, phase):
        """Counts the time since the last lap to a phase, and that since the start to "seconds" and, of this process's
        cores, to "cpu_seconds"."""
        now = time.perf_counter()
        self.seconds["seconds"], self.seconds["cpu_seconds"] = now - self.start, time.process_time() - self.cpu_start
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now


def log_metrics(accelerator, run_dir, metrics, name="metrics"):
    """Appends one line to RUN/NAME.jsonl, and sends its numbers to the tracker."""
    with open(os.path.join(run_dir, f"{name}.jsonl"), "a") as f:
        f.write(json.dumps(metrics) + "\n")
        f.flush()
        os.fsync(f.fileno())
    if not accelerator.trackers:
        return
    prefix = "" if name == "metrics" else f"{name}/"
    numbers = {prefix + k: v for k, v in flatten(metrics).items() if k != "epoch" and ".by_prompt." not in k}
    try:
        accelerator.log(numbers, step=metrics["epoch"])
    except Exception as error:
        _give_up_tracker(accelerator, "the tracker", error)


class Means:
    """What is logged of an epoch's minibatches: means, and highest values. They are kept on the device, so that adding
    to them does not wait for it."""

    def __init__(self):
        self._sums, self._highest, self._seen = {}, {}, {}

    def add(self, **values):
        """Adds tensors (B,), to be averaged."""
        for key, value in values.items():
            self._sums[key] = self._sums.get(key, 0) + value.sum()

    def highest(self, **values):
        """Takes tensors (B,) whose highest value is wanted."""
        for key, value in values.items():
            self._highest[key] = torch.maximum(self._highest.get(key, value.new_zeros(())), value.max())

    def latest(self, key, count, accelerator):
        """Mean, over all processes, of the `count` values that were added since this was last asked for."""
        total = accelerator.reduce(self._sums[key], "sum")
        latest, self._seen[key] = total - self._seen.get(key, 0), total
        return float(latest) / count

    def over(self, count, accelerator):
        """{name: sum over all processes / count, or highest value of any}."""
        means = {key: float(accelerator.reduce(value, "sum")) / count for key, value in self._sums.items()}
        return means | {key: float(accelerator.gather(value).max()) for key, value in self._highest.items()}
