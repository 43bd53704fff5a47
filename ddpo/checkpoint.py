"""Saving and resuming a run.

RUN/checkpoints/epoch_0010/ holds the weights after 10 epochs (lora/, unet/ or transformer/, for anyone to load) and
state.pt, the trainer's own: optimizer, gradient scaler, reward statistics, and the weights themselves where the former
holds their moving average. There is no generator to save, since all randomness is a function of (seed, epoch, sample).
A checkpoint is written beside its place and renamed when it is whole, and only then are older ones removed.
"""

import glob
import json
import os
import re
import shutil

import torch
from accelerate import PartialState

from ddpo.errors import InputError
from ddpo.policy import load_weights, save_weights
from ddpo.sharding import gather, is_sharded, spread

TEMPORARY = ".tmp"  # behind the name of a checkpoint that is being written


def list_checkpoints(run_dir):
    """The finished checkpoints of a run, oldest first."""
    parent = os.path.join(run_dir, "checkpoints")
    names = os.listdir(parent) if os.path.isdir(parent) else []
    return sorted((os.path.join(parent, n) for n in names if re.fullmatch(r"epoch_\d+", n)), key=epoch_of)


def epoch_of(folder):
    """The number of epochs that a checkpoint's folder names."""
    return int(os.path.basename(folder).removeprefix("epoch_"))


def save_checkpoint(run_dir, epoch, policy, optimizer, tracker, keep, writes=True):
    """Writes the checkpoint of a run after `epoch` epochs, then removes all but the newest `keep` (0: keeps all). What
    is sharded is gathered for it: all processes call it then, of which one `writes`.

    Raises InputError if it cannot be written, with the older checkpoints as they were.
    """
    folder = os.path.join(run_dir, "checkpoints", f"epoch_{epoch:04d}")
    temporary = folder + TEMPORARY
    for left in glob.glob(os.path.join(glob.escape(run_dir), "checkpoints", "*" + TEMPORARY)):  # by a run killed here
        shutil.rmtree(left, ignore_errors=True)
    state = {**optimizer.state_dict(), "tracker": tracker.state_dict()}
    if policy.ema:
        state |= {"ema": policy.ema.state_dict(), "weights": [p.detach() for p in policy.trainable_parameters()]}
    if is_sharded(policy.trainable_parameters()):
        state = gather(state)
    if not writes:
        with policy.averaged():
            save_weights(policy, None)
        return
    try:
        os.makedirs(temporary)
        with policy.averaged():
            save_weights(policy, temporary)
        trainer_state = os.path.join(temporary, "state.pt")
        torch.save({**state, "epoch": epoch}, trainer_state)
        for parent, _, files in os.walk(temporary):
            for name in files:
                shutil.copymode(trainer_state, os.path.join(parent, name))  # safetensors' own is for the owner alone
                with open(os.path.join(parent, name), "rb") as f:
                    os.fsync(f.fileno())
    except Exception as error:  # a full disk; the formats' writers each have their own error for it
        shutil.rmtree(temporary, ignore_errors=True)
        kept = list_checkpoints(run_dir)
        raise InputError(
            f"the checkpoint after epoch {epoch - 1} could not be written: {str(error).strip().splitlines()[0]}. "
            + (f"The last good one is {kept[-1]}: make room, then --config.resume={run_dir}" if kept else "")
        ) from error
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(temporary, folder)
    older = [c for c in list_checkpoints(run_dir) if epoch_of(c) < epoch]
    for old in older[: max(0, len(older) - keep + 1)] if keep else []:
        shutil.rmtree(old)


def load_checkpoint(run_dir, policy, optimizer, tracker):
    """Restores the newest checkpoint that can be read; says which ones it passed over. Returns the epochs it has done:
    0 if the run was stopped before it saved any.

    Raises InputError if none can be read, or if it is of another kind of run (LoRA, full, rank).
    """
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints:
        PartialState().print(f"{run_dir} has no checkpoint yet: it starts from the beginning", flush=True)
        return 0
    for folder in reversed(checkpoints):
        try:
            state = torch.load(os.path.join(folder, "state.pt"), map_location="cpu", weights_only=True)
            load_weights(policy, folder)
        except InputError:
            raise
        except Exception as error:  # a damaged file: every format has its own error
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error) else repr(error)
            PartialState().print(f"passing over {folder}, which cannot be read: {reason}", flush=True)
            continue
        if "ema" in state:
            with torch.no_grad():
                for p, value in zip(policy.trainable_parameters(), state["weights"]):
                    p.copy_(spread(value, p))
        if policy.ema:
            policy.start_ema(policy.ema.decay)  # from the weights just read, unless there is an average already
            if "ema" in state:
                shadow = map(spread, state["ema"]["shadow_params"], policy.trainable_parameters())
                own = {"decay": policy.ema.decay, "shadow_params": list(shadow)}
                policy.ema.load_state_dict(state["ema"] | own)
                policy.ema.to(policy.device)
        optimizer.load_state_dict(state)
        tracker.load_state_dict(state["tracker"])
        return state["epoch"]
    raise InputError(f"nothing to resume: no checkpoint in {run_dir}/checkpoints can be read")


def truncate_metrics(run_dir, epoch):
    """Drops what a run that resumes after `epoch` epochs will write again: the lines of metrics.jsonl from `epoch` on,
    the lines of evaluation.jsonl after it (which count the epochs done), and incomplete lines."""
    for name, first_dropped in (("metrics", epoch), ("evaluation", epoch and epoch + 1)):
        path = os.path.join(run_dir, f"{name}.jsonl")
        if os.path.exists(path):
            with open(path) as f:
                lines = [line for line in f if line.endswith("\n")]
            try:
                kept = [line for line in lines if json.loads(line)["epoch"] < first_dropped]
            except (ValueError, LookupError, TypeError) as error:
                raise InputError(f"{path} has a line that is not an epoch's metrics: remove it, then resume") from error
            with open(path + ".tmp", "w") as f:
                f.writelines(kept)
            os.replace(path + ".tmp", path)
