"""What a run leaves behind: RUN/config.json, metrics.jsonl and images/, always; by options evaluation.jsonl, and
wandb or TensorBoard."""

import json
import os
import time
from netrc import NetrcParseError, netrc

from ddpo.errors import InputError
from ddpo.guards import lock_run
from ddpo.options import NO_EFFECT, flatten, read_options


def start_run(run_dir, config):
    """Makes the run's folder and writes its config.json; on a resume, says which options are others than before."""
    try:
        os.makedirs(os.path.join(run_dir, "images"), exist_ok=True)
    except OSError as error:
        raise InputError(f"run_dir {run_dir!r} cannot be made: {error}") from error
    lock_run(run_dir)
    path, new = os.path.join(run_dir, "config.json"), flatten(config)
    if os.path.exists(path):
        old = read_options(run_dir)
        for key in sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k)):
            if key not in ("run_dir", "resume", "num_epochs"):
                matters = (
                    "changes no result" if key in NO_EFFECT else "MATTERS: the run is no longer one of either value"
                )
                print(f"{run_dir}: {key} was {old.get(key)!r}, now {new.get(key)!r} ({matters})", flush=True)
    with open(path + ".tmp", "w") as f:
        json.dump(config.to_dict(), f, indent=2)
    os.replace(path + ".tmp", path)


def describe_run(run_dir, config, first_epoch, prompt_count, trained_weights, trained_steps):
    """What a run is about to do, in two lines."""
    sample, updates = config.sample, config.train.updates_per_epoch
    per_update = sample.images_per_epoch // updates
    method = f"LoRA of rank {config.lora_rank}" if config.lora_rank else "full finetuning"
    return (
        f"{run_dir}: {config.reward} on {config.prompts} ({prompt_count} prompts), {config.algorithm}, {method} of "
        f"{config.model} ({trained_weights / 1e6:.2f}M weights), {config.precision}\n"
        f"epochs {first_epoch} to {config.num_epochs - 1}, each {sample.images_per_epoch} images of {sample.num_steps} "
        f"steps, {updates * config.train.inner_epochs} updates of {per_update} x {trained_steps} transitions"
    )


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
    to read pictures, rewards and gradient norms: it costs no synchronisation of its own."""

    def __init__(self):
        self.start = self.last = time.perf_counter()
        self.seconds = {}

    def lap(self, phase):
        """Counts the time since the last lap to a phase, and that since the start to "seconds"."""
        now = time.perf_counter()
        self.seconds["seconds"] = now - self.start
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
