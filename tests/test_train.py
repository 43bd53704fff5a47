"""The real command line, end to end, on pipelines with few random weights."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import SMALL, launch
from conftest import run as run_command
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

import train
from config.base import get_config
from ddpo import rewards
from ddpo.errors import InputError


def metrics(run):
    """The lines of metrics.jsonl without time and memory."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k and "memory" not in k} for line in lines]


def weights(run, epoch):
    return load_file(run / f"checkpoints/epoch_{epoch:04d}/lora/pytorch_lora_weights.safetensors")


@pytest.mark.parametrize(
    "model, rank, precision",
    [
        ("tiny", 4, "fp32"),
        ("tiny", 0, "bf16"),
        ("tiny_v", 4, "bf16"),
        ("tiny_xl", 4, "bf16"),
        ("tiny_xl", 0, "fp32"),
    ],
)
def test_end_to_end(request, tmp_path, model, rank, precision):
    model, run = request.getfixturevalue(model), tmp_path / "run"
    result = launch(
        model=model,
        run_dir=run,
        lora_rank=rank,
        precision=precision,
        train__learning_rate=1e-3,
        direct=(model, rank) != ("tiny", 4),
    )
    lines = metrics(run)
    assert [line["epoch"] for line in lines] == [0, 1]
    assert [line["reward_queries"] for line in lines] == [8, 16]
    expected = {"reward_mean", "reward_std", "loss", "approx_kl", "clip_fraction", "ratio_error", "grad_norm"}
    assert all(expected <= line.keys() and all(np.isfinite(v) for v in line.values()) for line in lines)
    assert all(line["ratio_error"] == 0 for line in lines)  # sampled and trained in like batches
    assert lines[-1]["approx_kl"] > 0 and lines[-1]["grad_norm"] > 0
    assert json.loads((run / "config.json").read_text())["model"] == model
    assert Image.open(run / "images/epoch_0000.png").size == Image.open(run / "images/epoch_0002.png").size
    assert str(run) in result.stdout
    base = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    folder = run / "checkpoints/epoch_0002"
    if rank:
        state = load_file(folder / "lora/pytorch_lora_weights.safetensors")
        assert any(v.abs().max() > 0 for k, v in state.items() if "lora_B" in k)  # they begin as 0
        base.load_lora_weights(str(folder / "lora"))
    else:
        old, new = base.unet.state_dict(), UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
        assert all(v.dtype == torch.float32 for v in new.values())
        assert any(not torch.equal(old[k], new[k]) for k in old)


def test_resume_is_exact(tiny, tmp_path):
    """Four epochs in one go, and two and two: the same bits, and no line doubled or missing."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = {"model": tiny, "save_every": 2, "keep_checkpoints": 1, "train__learning_rate": 1e-3}
    launch(run_dir=whole, num_epochs=4, direct=True, **options)
    launch(run_dir=parts, num_epochs=2, direct=True, **options)
    with open(parts / "metrics.jsonl", "a") as f:
        f.write('{"epoch": 2, "reward_mean": 1}\n{"epoch": 3, "rew')  # as if killed in epoch 3, after the checkpoint
    launch(resume=parts, num_epochs=4, **options)
    assert metrics(whole) == metrics(parts) and len(metrics(whole)) == 4
    one, two = weights(whole, 4), weights(parts, 4)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    state = [torch.load(r / "checkpoints/epoch_0004/state.pt") for r in (whole, parts)]
    assert state[0]["tracker"] == state[1]["tracker"]
    for a, b in zip(*(s["optimizer"]["state"].values() for s in state)):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert [p.name for p in (whole / "checkpoints").iterdir()] == ["epoch_0004"]  # older ones are removed


def test_resume_is_exact_with_the_options_of_the_ablations(tiny, tmp_path):
    """Guidance in sampling only, KL to the base, a moving average, sigma weighting, a window of steps, two passes: the
    first ratio is 1, the saved weights are the average, and two epochs in one go are one and one to the bit."""
    options = {
        "model": tiny, "direct": True, "train__guidance": False, "train__kl_weight": 0.1, "train__ema_decay": 0.9,
        "train__sigma_weighting": True, "train__timestep_choice": "window", "train__timestep_fraction": 0.67,
        "train__inner_epochs": 2, "algorithm": "ddpo_smooth", "advantage": "leave_one_out",
        "sample__images_per_prompt": 4, "train__learning_rate": 1e-3, "train__clip_range": 1e-2,
    }  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    launch(run_dir=whole, **options)
    launch(run_dir=parts, num_epochs=1, **options)
    launch(resume=parts, **options)
    assert metrics(whole) == metrics(parts)
    assert all(line["ratio_error"] == 0 and line["kl_base"] > 0 for line in metrics(whole))
    states = [torch.load(run / "checkpoints/epoch_0002/state.pt") for run in (whole, parts)]
    for a, b in zip(states[0]["weights"], states[1]["weights"], strict=True):
        assert torch.equal(a, b)
    saved = weights(whole, 2)
    assert all(torch.equal(value, weights(parts, 2)[key]) for key, value in saved.items())
    sums = [sorted(float(v.sum()) for v in w) for w in (saved.values(), states[0]["ema"]["shadow_params"])]
    assert sums[0] == sums[1] != sorted(float(v.sum()) for v in states[0]["weights"])


def test_a_run_is_not_overwritten(tiny, tmp_path):
    launch(model=tiny, run_dir=tmp_path, direct=True, num_epochs=1)
    result = launch(model=tiny, run_dir=tmp_path, direct=True, check=False)
    assert result.returncode != 0 and f"--config.resume={tmp_path}" in result.stderr


def test_bad_rewards_stop_before_any_weight_changes(tiny, tmp_path, monkeypatch):
    """A reward that turns bad within the first epoch: an error, and the weights are untouched."""
    policies = []
    load = train.load_policy
    monkeypatch.setattr(train, "load_policy", lambda *a: policies.append(load(*a)) or policies[-1])

    def half_bad(images, prompts, metadata):
        return np.where(np.arange(len(images)) < 2, 1.0, np.nan), {}

    monkeypatch.setitem(rewards.REWARDS, "half_bad", half_bad)
    config = get_config()
    config.update_from_flattened_dict({**SMALL, "model": tiny, "reward": "half_bad", "run_dir": str(tmp_path / "run")})
    with pytest.raises(InputError, match="half_bad returned nan for the prompt 'a"):
        train.train(config, "test")
    fresh = load(tiny, config.lora_rank, "fp32", "cpu", config.lora_targets, config.seed)
    for a, b in zip(policies[0].trainable_parameters(), fresh.trainable_parameters()):
        assert torch.equal(a, b) and a.grad is None


@pytest.mark.parametrize("tracker, files", [("wandb", "wandb/offline-run-*/*.wandb"), ("tensorboard", "ddpo/events.*")])
def test_trackers_never_ask_for_a_login(tiny, tmp_path, tracker, files):
    run = tmp_path / "run"
    env = {"WANDB_API_KEY": "", "NETRC": str(tmp_path / "none"), "HOME": str(tmp_path)}
    result = launch(model=tiny, run_dir=run, tracker=tracker, env=env, direct=True)
    assert list(run.glob(files)) and len(metrics(run)) == 2
    assert ("wandb sync" in result.stdout) == (tracker == "wandb")


def test_resume_passes_over_a_damaged_checkpoint_and_keeps_its_options(tiny, tmp_path):
    run = tmp_path / "run"
    launch(model=tiny, run_dir=run, num_epochs=3, save_every=1, keep_checkpoints=0, lora_rank=2, direct=True)
    (run / "checkpoints/epoch_0003/state.pt").write_bytes(b"cut short")
    (run / "checkpoints/epoch_0002/lora/pytorch_lora_weights.safetensors").write_bytes(b"cut short")
    command = [sys.executable, "train.py", f"--config.resume={run}", "--config.num_epochs=4"]  # no preset, no options
    result = run_command(command)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("passing over") == 2 and [line["epoch"] for line in metrics(run)] == [0, 1, 2, 3]
    assert json.loads((run / "config.json").read_text())["lora_rank"] == 2
    result = launch(resume=run, check=False, direct=True)
    assert "other modules or another rank" in result.stderr  # SMALL has lora_rank 4


def test_the_other_options(tiny, tmp_path):
    """fp16 with loss scaling, recomputed activations, two passes, some timesteps, groups, another size, no guidance."""
    run = tmp_path / "run"
    launch(
        model=tiny, run_dir=run, precision="fp16", train__gradient_checkpointing=True, train__inner_epochs=2,
        train__timestep_fraction=0.67, sample__images_per_prompt=4, sample__height=36, sample__guidance_scale=1.0,
        lora_rank=0, direct=True,
    )  # fmt: skip
    assert all(line["ratio_error"] == 0 and line["grad_norm"] > 0 for line in metrics(run))
    launch(resume=run, num_epochs=3, lora_rank=0, precision="fp16", direct=True)
    assert len(metrics(run)) == 3


def test_warm_up(tiny, tmp_path):
    """The first of four updates of warm-up is a quarter of the learning rate; a resumed run goes on with the second."""
    options = {"model": tiny, "direct": True, "train__updates_per_epoch": 1, "save_every": 1, "keep_checkpoints": 0}
    launch(run_dir=tmp_path / "warm", train__learning_rate=4e-3, train__warmup_updates=4, **options)
    launch(run_dir=tmp_path / "plain", train__learning_rate=1e-3, num_epochs=1, **options)
    launch(run_dir=tmp_path / "parts", train__learning_rate=4e-3, train__warmup_updates=4, num_epochs=1, **options)
    rate = {"train__learning_rate": 4e-3, "train__warmup_updates": 4}
    launch(resume=tmp_path / "parts", num_epochs=2, direct=True, train__updates_per_epoch=1, **rate)
    for epoch, other in ((1, "plain"), (2, "parts")):
        ours, theirs = weights(tmp_path / "warm", epoch), weights(tmp_path / other, epoch)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    first = weights(tmp_path / "warm", 1)
    assert any(not torch.equal(first[key], value) for key, value in ours.items())


def test_target_kl_ends_an_epochs_updates(tiny, tmp_path):
    """The first update begins at the policy that sampled, so it is always made; the second finds a divergence."""
    options = {"model": tiny, "direct": True, "train__learning_rate": 1e-3, "train__updates_per_epoch": 4}
    for target, updates in ((1e-12, 1), (1e6, 4)):
        run = tmp_path / str(updates)
        launch(run_dir=run, train__target_kl=target, **options)
        assert [line["updates"] for line in metrics(run)] == [updates] * 2
        assert all(line["kl_old"] > 0 and line["ratio_error"] == 0 for line in metrics(run))


def test_sample_and_plot_and_evaluate(tiny, tmp_path):
    """The commands that README gives for a finished run."""
    reference = tmp_path / "run"
    launch(model=tiny, run_dir=reference, train__learning_rate=0.1, direct=True)
    for command, output in (
        (
            ["evaluate", "--run", reference, "--count", "2", "--limit", "3", "--rewards", "jpeg_incompressibility"],
            reference / "images/evaluation.png",
        ),
        (
            ["sample", "--run", reference, "--prompts", "a cat", "a dog", "--count", "3"],
            reference / "images/samples.png",
        ),
        (["plot", reference, "--output", tmp_path / "curve.png"], tmp_path / "curve.png"),
    ):
        result = run_command([sys.executable, f"scripts/{command[0]}.py", *map(str, command[1:])])
        assert result.returncode == 0, result.stderr
        assert Image.open(output).size[0] > 200
    evaluation = json.loads((reference / "evaluation.json").read_text())
    for section in [
        f"{kind}, {sampling}" for kind in ("seen", "held_out") for sampling in ("stochastic", "deterministic")
    ]:
        base, finetuned = evaluation[section]["base"], evaluation[section]["finetuned"]
        assert base["reward_mean"] != finetuned["reward_mean"] == -finetuned["jpeg_incompressibility"]
        assert 0 < base["diversity"] < 2 and base["diversity"] != finetuned["diversity"]
    rows = np.asarray(Image.open(reference / "images/samples.png")).astype(float)
    rows = rows[: len(rows) // 4 * 4].reshape(4, -1, *rows.shape[1:])  # base and finetuned, for two prompts
    assert abs(rows[0] - rows[1]).mean() > 1 and abs(rows[2] - rows[3]).mean() > 1
