"""Runs that can be trusted: the same on any batch size, and nothing lost when stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, SMALL, command_line, launch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from test_processes import distance
from test_train import metrics, weights

import train
from config.base import get_config
from ddpo import rewards
from ddpo.checkpoint import epoch_of, list_checkpoints, save_checkpoint
from ddpo.optimizer import Optimizer
from ddpo.policy import load_policy
from ddpo.stat_tracking import PerPromptStatTracker


# ------------------------------------------------------------------------------------------------------ memory knobs
def record(model, monkeypatch, run, batch_size, options):
    """What a run computes on its way: every epoch's latents and advantages, every update's gradients; its weights."""
    seen = {"latents": [], "prompts": [], "rewards": [], "advantages": [], "gradients": [], "weights": []}
    sample, stats = train.sample_with_logprob, train.PerPromptStatTracker.update
    clip, load = torch.nn.utils.clip_grad_norm_, train.load_policy

    def sample_(*args, **kwargs):
        out = sample(*args, **kwargs)
        if kwargs["progress"] != "grid":
            seen["latents"].append(out.latents)
        return out

    def stats_(self, prompts, values):
        seen["prompts"].append(prompts)
        seen["rewards"].append(values)
        seen["advantages"].append(torch.as_tensor(stats(self, prompts, values)))
        return seen["advantages"][-1].numpy()

    def clip_(parameters, norm):
        seen["gradients"].append([p.grad.clone() for p in parameters])
        return clip(parameters, norm)

    def load_(*args):
        policy = load(*args)
        seen["weights"] = policy.trainable_parameters()
        return policy

    with monkeypatch.context() as patch:
        patch.setattr(train, "sample_with_logprob", sample_)
        patch.setattr(train.PerPromptStatTracker, "update", stats_)
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip_)
        patch.setattr(train, "load_policy", load_)
        patch.setattr("ddpo.interrupt.signal.signal", lambda *_: None)  # pytest keeps its Ctrl-C
        config = get_config()
        config.update_from_flattened_dict({
            **SMALL, "model": model, "run_dir": str(run), "num_epochs": 3, "grid_every": 0, "reward": "by_prompt",
            "sample.batch_size": batch_size, "train.batch_size": batch_size, **options,
        })  # fmt: skip
        train.train(config, "test")
    return seen


KNOBS = {
    "lora": {"lora_rank": 4},
    "rwr": {"lora_rank": 0, "algorithm": "rwr", "train.inverse_temperature": 0.02, "train.inner_epochs": 2},
}


@pytest.mark.parametrize("options", KNOBS.values(), ids=KNOBS)
def test_memory_knobs_change_nothing(tiny, tmp_path, monkeypatch, options):
    """Batches of 1, 3 and 16 against each other; the JPEG reward to a few bytes. From the first update on Adam divides
    each gradient by its own size: where a gradient is nothing but rounding, the weight takes a full step of rounding.
    Weights are therefore compared by norm, against how far they were trained."""

    def reward(images, prompts, metadata):
        jpeg.append(rewards.jpeg_size(images))
        return [zlib.crc32(prompt.encode()) % 97 for prompt in prompts], {}

    monkeypatch.setitem(rewards.REWARDS, "by_prompt", reward)
    runs, sizes = {}, {}
    for batch in (16, 3, 1):
        jpeg = []
        runs[batch], sizes[batch] = record(tiny, monkeypatch, tmp_path / str(batch), batch, options), jpeg
    rank = options["lora_rank"]
    start = train.load_policy(tiny, rank, "fp32", "cpu", get_config().lora_targets).trainable_parameters()
    for batch in (3, 1):
        run, whole = runs[batch], runs[16]
        assert abs(np.concatenate(sizes[batch])[:8] - np.concatenate(sizes[16])[:8]).max() < 5e-3  # kB
        assert all(torch.equal(a, b) for a, b in zip(run["advantages"], whole["advantages"]))
        assert distance(run["latents"][:1], whole["latents"][:1]) < 1e-5
        assert distance(run["gradients"][0], whole["gradients"][0]) < 1e-5
        trained = [w.detach() - s.detach() for w, s in zip(whole["weights"], start)]
        again = [w.detach() - s.detach() for w, s in zip(run["weights"], start)]
        assert distance(again, trained) < 1e-3


# --------------------------------------------------------------------------------------------- killed, stopped, full
@pytest.mark.parametrize("size, kills", [("tiny", 2), ("tiny_sd35", 1)])
def test_killed_runs_end_as_if_nothing_had_happened(tmp_path, size, kills):
    """The script that kills a run at random moments (results/reliability has 50 of its kills)."""
    command = [sys.executable, "-m", "scripts.dev.kill_runs", "--kills", str(kills), "--per_run", "3", "--seed", "1"]
    command += ["--size", size]
    result = subprocess.run([*command, "--output", tmp_path / "kills.json"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "kills.json").read_text())
    assert found["kills"] == kills == sum(found["killed_in"].values()) and found["differing"] == []


def start_and_wait(line, **options):
    """Starts a run and returns once it has printed `line`."""
    process = subprocess.Popen(
        command_line(**options), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "SABOTAGE": "slow"}, start_new_session=True,
    )  # fmt: skip
    output = ""
    while line not in output:
        character = process.stdout.read(1)
        assert character, output
        output += character
    return process


@pytest.mark.parametrize("number, whom", [(signal.SIGINT, "group"), (signal.SIGTERM, "launcher")])
def test_interrupted_runs_are_saved(tiny, tmp_path, number, whom):
    """Ctrl-C reaches launcher and run, as a scheduler's SIGTERM may; `kill` may reach the launcher alone."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    options = {"model": tiny, "train__learning_rate": 1e-3, "num_epochs": 4, "save_every": 10, "reward": "sabotaged"}
    options |= {"script": "tests/saboteur.py"}
    process = start_and_wait("epoch   1 ", run_dir=run, **options)
    if whom == "group":
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    output = process.stdout.read()  # until the run itself ends, which may be after its launcher
    process.wait()
    assert f"{number.name}: saved after" in output and f"--config.resume={run}" in output
    done = len(metrics(run))
    assert 2 <= done < 4
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"epoch_{done:04d}"]
    if (number, whom) == (signal.SIGINT, "group"):  # and it goes on as if nothing had happened
        for options["run_dir"], more in ((whole, {}), ("", {"resume": run})):
            launch(env={"SABOTAGE": "slow"}, direct=True, **options, **more)
        assert metrics(whole) == metrics(run)
        assert all(torch.equal(a, b) for a, b in zip(weights(whole, 4).values(), weights(run, 4).values()))


def test_an_interrupt_before_anything_new_leaves_the_checkpoint_alone(tiny, tmp_path):
    """It is there already, and a kill while it is replaced would lose it. Absl's --no... holds, too."""
    run = tmp_path / "run"
    launch(model=tiny, run_dir=run, num_epochs=1, direct=True)
    before = (run / "checkpoints/epoch_0001/state.pt").stat()
    options = {"script": "tests/saboteur.py", "env": {"SABOTAGE": "interrupts"}, "reward": "sabotaged", "direct": True}
    result = launch("--noconfig.train.guidance", resume=run, check=False, **options)
    assert result.returncode == 128 + signal.SIGTERM and "SIGTERM: saved after 1 epochs" in result.stdout
    assert "train.guidance was True, now False (changes the result" in result.stdout
    after = (run / "checkpoints/epoch_0001/state.pt").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize("keep", [0, 1, 2, 3, 5])
def test_as_many_checkpoints_as_asked_for_are_kept(tiny, tmp_path, keep):
    policy = load_policy(tiny, 1, "fp32", "cpu")
    optimizer = Optimizer(policy.trainable_parameters(), get_config(), Accelerator(cpu=True))
    for epoch in range(1, 9):
        save_checkpoint(str(tmp_path), epoch, policy, optimizer, PerPromptStatTracker(1, 1), keep)
        kept = sorted(epoch_of(folder) for folder in list_checkpoints(str(tmp_path)))
        assert kept == list(range(1, epoch + 1))[-keep:]


def test_a_full_disk_leaves_the_last_good_checkpoint(tiny, tmp_path):
    """No file may grow beyond some kilobytes in the second part: its checkpoint cannot be written."""
    run = tmp_path / "run"
    launch(model=tiny, run_dir=run, num_epochs=1, direct=True)
    smallest = min(f.stat().st_size for f in (run / "checkpoints/epoch_0001").rglob("*.*"))
    largest = max(f.stat().st_size for f in (run / "checkpoints/epoch_0001").rglob("*.*"))
    limit = (smallest + largest) // 2
    result = launch(resume=run, model=tiny, grid_every=0, num_epochs=2, direct=True, check=False, file_limit=limit)
    assert result.returncode == 1 and "error: the checkpoint after epoch 1 could not be written" in result.stderr
    assert f"The last good one is {run}/checkpoints/epoch_0001" in result.stderr
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["epoch_0001"]
    launch(resume=run, num_epochs=2, direct=True)
    assert len(metrics(run)) == 2


def test_one_writer_per_run(tiny, tmp_path):
    run = tmp_path / "run"
    options = {"model": tiny, "reward": "sabotaged", "script": "tests/saboteur.py"}
    process = start_and_wait("epoch   0 ", run_dir=run, num_epochs=50, save_every=1, direct=True, **options)
    result = launch(resume=run, direct=True, check=False, env={"SABOTAGE": "slow"}, num_epochs=60, **options)
    process.kill()
    process.stdout.read()
    assert result.returncode == 1 and f"error: {run} is being written by another process" in result.stderr


def test_resuming_says_what_differs_and_whether_it_matters(tiny, tmp_path):
    run = tmp_path / "run"
    launch(model=tiny, run_dir=run, num_epochs=1, direct=True)
    result = launch(resume=run, direct=True, train__batch_size=2, train__clip_range=0.5, train__adam_weight_decay=0.3)
    assert "train.batch_size was 4, now 2 (changes no result)" in result.stdout
    assert "train.clip_range was 0.01, now 0.5 (changes the result" in result.stdout
    assert "train.adam_weight_decay was 0.0001, now 0.3 (changes the result" in result.stdout
    group = torch.load(run / "checkpoints/epoch_0002/state.pt")["optimizer"]["param_groups"][0]
    assert group["weight_decay"] == 0.3 and group["betas"] == (0.9, 0.999)
    result = launch(resume=run, direct=True, check=False)
    assert "has done 2 epochs: to go on, --config.num_epochs=4" in result.stderr


def test_resuming_says_what_changed_under_a_run(tiny, tmp_path):
    """The text of its prompts, the base model's weights and the reward's: nothing of which its options tell."""
    model, clip, prompts, run = tmp_path / "model", tmp_path / "clip", tmp_path / "prompts.txt", tmp_path / "run"
    shutil.copytree(tiny, model)
    shutil.copytree(ROOT / "models/emoji/clip", clip)
    prompts.write_text("a cat\na dog\n")
    options = {"model": model, "reward": f"clipscore:{clip}", "prompts": prompts, "save_every": 1, "direct": True}
    launch(run_dir=run, num_epochs=1, **options)
    assert "changed since" not in launch(resume=run, num_epochs=2, **options).stdout
    prompts.write_text("a cat\na horse\n")
    for path in (model / "unet/diffusion_pytorch_model.safetensors", clip / "model.safetensors"):
        save_file({key: value * 1.001 for key, value in load_file(path).items()}, path, {"format": "pt"})
    said = launch(resume=run, num_epochs=3, **options).stdout
    for what in ("the prompts", f"the base model {model}", f"the reward model {clip}"):
        assert f"{run}: {what} changed since the run began" in said


# ----------------------------------------------------------------------------------------------- failing parts around
def test_a_reward_that_hangs(tiny, tmp_path):
    start = time.time()
    result = launch(
        model=tiny, run_dir=tmp_path / "run", reward="sabotaged", reward_timeout=1.0, check=False, direct=True,
        script="tests/saboteur.py", env={"SABOTAGE": "hangs"},
    )  # fmt: skip
    assert result.returncode == 1 and time.time() - start < 500  # the reward would sleep for 1,000 seconds
    assert "error: reward hangs gave no answer for 4 images within reward_timeout = 1 seconds" in result.stderr


def test_a_reward_that_fails_later_costs_no_epoch(tiny, tmp_path):
    """What stands is saved first, and the run goes on from there as if nothing had happened."""
    options = {"model": tiny, "reward": "sabotaged", "script": "tests/saboteur.py", "train__learning_rate": 1e-3}
    run, whole = tmp_path / "run", tmp_path / "whole"
    result = launch(run_dir=run, env={"SABOTAGE": "fails later"}, check=False, direct=True, **options)
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1 and "fails_later raised ConnectionError: the server is gone" in error
    assert f"Saved after 1 epochs; to go on: --config.resume={run}" in error
    launch(resume=run, env={"SABOTAGE": "by prompt"}, direct=True, **options)
    launch(run_dir=whole, env={"SABOTAGE": "by prompt"}, direct=True, **options)
    assert metrics(whole) == metrics(run)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole, 2).values(), weights(run, 2).values()))


def test_a_reward_that_fails_in_one_of_two_processes(tiny, tmp_path):
    options = {
        "model": tiny,
        "reward": "sabotaged",
        "script": "tests/saboteur.py",
        "sample__batch_size": 2,
        "direct": True,
    }
    result = launch(run_dir=tmp_path, env={"SABOTAGE": "fails later on rank 1"}, check=False, processes=2, **options)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert (
        len(errors) == 1 and "ConnectionError: the server is gone" in errors[0] and "Saved after 1 epochs" in errors[0]
    )
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["epoch_0001"]


def test_a_tracker_that_cannot_be_reached(tiny, tmp_path):
    env = {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "2"}
    result = launch(model=tiny, run_dir=tmp_path / "a", tracker="wandb", env=env, direct=True)
    assert "warning: wandb failed" in result.stdout and len(metrics(tmp_path / "a")) == 2
    env = {"SABOTAGE": "the tracker breaks later"}
    result = launch(
        model=tiny, run_dir=tmp_path / "b", tracker="tensorboard", env=env, direct=True, script="tests/saboteur.py"
    )
    assert result.stdout.count("warning: the tracker failed (the server is gone)") == 1
    assert len(metrics(tmp_path / "b")) == 2


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_gradient_that_is_not_finite(tiny, tmp_path, precision):
    result = launch(
        model=tiny, run_dir=tmp_path / "run", algorithm="not_finite", check=False, direct=True, precision=precision,
        script="tests/saboteur.py", env={"SABOTAGE": "the gradient is not finite"},
    )  # fmt: skip
    error = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1 and len(error) == 1
    assert "epoch 0, update " in error[0] and "not finite at timestep" in error[0] and "of 'a" in error[0]
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_ratio_that_is_off_is_warned_of(tiny, tmp_path):
    options = {"script": "tests/saboteur.py", "env": {"SABOTAGE": "training has dropout"}, "direct": True}
    result = launch(model=tiny, run_dir=tmp_path / "run", num_epochs=1, **options)
    assert "warning: before any update the ratio is off by" in result.stdout + result.stderr
    assert metrics(tmp_path / "run")[0]["ratio_error"] > get_config().train.clip_range


def test_a_constant_reward_is_warned_of(tiny, tmp_path):
    result = launch(
        model=tiny, run_dir=tmp_path / "run", reward="sabotaged", direct=True, script="tests/saboteur.py",
        env={"SABOTAGE": "constant"},
    )  # fmt: skip
    assert "warning: epoch 0: the reward is 3 for all: nothing to learn" in result.stdout


# ----------------------------------------------------------------------------------------------------- half precision
def test_full_finetuning_in_bf16_keeps_updates_below_its_rounding(tiny, tmp_path):
    """Steps of 1e-6 on weights of about 0.1, where bfloat16's neighbours are 5e-4 apart: they must add up."""
    run = tmp_path / "run"
    launch(model=tiny, run_dir=run, lora_rank=0, precision="bf16", train__learning_rate=1e-6, direct=True)
    before = UNet2DConditionModel.from_pretrained(f"{tiny}/unet").state_dict()
    after = load_file(run / "checkpoints/epoch_0002/unet/diffusion_pytorch_model.safetensors")
    moved = torch.cat([(after[k] - before[k]).abs().flatten() for k in before if before[k].ndim == 4])
    rounded = torch.cat(
        [(after[k].bfloat16() != before[k].bfloat16()).flatten() for k in before if before[k].ndim == 4]
    )
    assert (moved > 0).float().mean() > 0.9 and moved.max() < 1e-5
    assert rounded.float().mean() < 0.05  # a half-precision copy would have lost nearly all of it


def test_old_log_probs_are_computed_again_where_batches_would_round_differently(tiny, tmp_path):
    options = {"model": tiny, "direct": True, "num_epochs": 1, "sample__batch_size": 4}
    for precision, batch_size, again in (("fp32", 4, False), ("fp32", 3, True), ("bf16", 4, False), ("bf16", 3, True)):
        run = tmp_path / f"{precision}-{batch_size}"
        result = launch(run_dir=run, train__batch_size=batch_size, precision=precision, **options)
        assert ("old log-probs are computed again" in result.stdout) == again
        assert metrics(run)[0]["ratio_error"] == 0
