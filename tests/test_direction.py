"""Which way is up: a run's gradient against one computed with plain torch, and rewards that rise."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL
from diffusers import DDIMScheduler, StableDiffusionPipeline
from test_processes import distance
from test_reliability import record
from torch.distributions import Normal

import train
from config.base import get_config
from ddpo import rewards
from ddpo.policy import load_policy
from ddpo.seeds import torch_generator

OPTIONS = {"lora_rank": 4, "num_epochs": 1, "sample.guidance_scale": 5.0, "train.learning_rate": 1e-3}


def redness(images, prompts, metadata):
    pixels = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return (pixels[..., 0] - pixels[..., 2]).mean((1, 2)) / 10, {}


@pytest.fixture
def recorded(tiny, monkeypatch, tmp_path):
    """recorded(options) trains for an epoch: what it saw, and a copy of the network as it was before."""

    def run(options):
        monkeypatch.setitem(rewards.REWARDS, "by_prompt", redness)
        seen = record(tiny, monkeypatch, tmp_path / "run", 4, {**OPTIONS, **options})
        policy = load_policy(tiny, 4, "fp32", "cpu", get_config().lora_targets, 0)
        return seen, policy.denoiser, policy.trainable_parameters()

    return run


def embeddings(model, prompts):
    pipe = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    ids = pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        return pipe.text_encoder(ids)[0]


def policy_gradient(unet, parameters, model, latents, prompts, advantages):
    """The gradient of minus the mean over transitions of A log p(x_{t-1} | x_t, c), log p a mean over dimensions, by
    the formulas of the paper and of DDIM (eta 1, guidance 5), one transition at a time."""
    scheduler = DDIMScheduler.from_pretrained(model, subfolder="scheduler")
    steps = latents.shape[1] - 1
    scheduler.set_timesteps(steps)
    embeds, empty = embeddings(model, prompts), embeddings(model, [""])
    loss = 0
    for i in range(len(prompts)):
        for k, t in enumerate(scheduler.timesteps.tolist()):
            x, previous = latents[i : i + 1, k], t - 1000 // steps
            unconditional, conditional = (unet(x, t, e).sample for e in (empty, embeds[i : i + 1]))
            noise = unconditional + 5.0 * (conditional - unconditional)
            alpha = scheduler.alphas_cumprod[t]
            alpha_prev = scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod
            sigma = ((1 - alpha_prev) / (1 - alpha)).sqrt() * (1 - alpha / alpha_prev).sqrt()
            x_0 = (x - (1 - alpha).sqrt() * noise) / alpha.sqrt()
            mean = alpha_prev.sqrt() * x_0 + (1 - alpha_prev - sigma**2).sqrt() * noise
            loss = loss - advantages[i] * Normal(mean, sigma).log_prob(latents[i : i + 1, k + 1]).mean()
    return torch.autograd.grad(loss / (len(prompts) * steps), parameters)


def clipped(gradients):
    norm = torch.stack([g.norm() for g in gradients]).norm()
    return [g / max(1.0, norm) for g in gradients]


@pytest.mark.parametrize("algorithm", ["ddpo_is", "ddpo_mask", "ddpo_smooth"])
def test_the_first_gradient_is_the_policy_gradient(tiny, recorded, algorithm):
    """Minus the mean of advantage x grad log p over the first update's transitions, recomputed from the run's recorded
    trajectories, rewards and prompts; and nowhere near that of turned or shifted advantages."""
    seen, unet, parameters = recorded({"algorithm": algorithm})
    reward, prompts = np.asarray(seen["rewards"][0]), seen["prompts"][0][:4]
    advantages = np.clip((reward - reward.mean()) / reward.std(), -5, 5)
    latents = seen["latents"][0][:4]  # of two updates of four samples
    expected = policy_gradient(unet, parameters, tiny, latents, prompts, advantages[:4])
    assert distance(seen["gradients"][0], expected) < 1e-3
    for wrong in (-advantages, np.roll(advantages, 1), np.roll(advantages, -1)):
        gradient = policy_gradient(unet, parameters, tiny, latents, prompts, wrong[:4])
        assert distance(seen["gradients"][0], gradient) > 0.2


def test_the_first_gradient_of_rwr_is_that_of_the_weighted_denoising_loss(tiny, recorded):
    seen, unet, parameters = recorded(
        {"algorithm": "rwr", "train.inverse_temperature": 2.0, "train.prompt_dropout": 0.5}
    )
    reward, prompts = np.asarray(seen["rewards"][0]), seen["prompts"][0][:4]
    weights = np.exp(2.0 * reward) / np.exp(2.0 * reward).mean()
    scheduler = DDIMScheduler.from_pretrained(tiny, subfolder="scheduler")
    embeds, empty = embeddings(tiny, prompts), embeddings(tiny, [""])

    def gradient(weights):
        loss = 0
        for i in range(4):
            generator = torch_generator("denoising", 0, 0, i)  # seed, epoch, sample
            level, dropout = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
            t, given = int(1000 * level), empty if dropout < 0.5 else embeds[i : i + 1]
            x_0 = seen["latents"][0][i : i + 1, -1]
            noise = torch.randn(x_0.shape, generator=generator)
            alpha = scheduler.alphas_cumprod[t]
            x_t = alpha.sqrt() * x_0 + (1 - alpha).sqrt() * noise
            loss = loss + weights[i] * torch.nn.functional.mse_loss(unet(x_t, t, given).sample, noise)
        return torch.autograd.grad(loss / 4, parameters)

    assert distance(seen["gradients"][0], gradient(weights)) < 1e-3
    assert distance(seen["gradients"][0], gradient(np.roll(weights, 1))) > 0.05


ONE_UPDATE = {"train.draws": 4, "train.updates_per_epoch": 1, "train.learning_rate": 3e-4}
CLIMBS = {  # for time, the others have only the gradients above or tests/test_forward_losses.py
    "ddpo_is": {},
    "ddpo_sf": {"train.updates_per_epoch": 1},
    "rwr": {
        "train.inverse_temperature": 0.5,
        "train.inner_epochs": 2,
        "num_epochs": 3,
        "evaluate.every": 3,
        "train.timestep_choice": "random",
    },
    "nft": ONE_UPDATE,
    "dpo": {"train.draws": 4, "sample.images_per_prompt": 4, "train.updates_per_epoch": 4},
}


def gain(folder, monkeypatch, algorithm):
    """How far a short run of the embedded model raises its reward on fixed prompts and noise; and the standard error
    of that."""
    monkeypatch.setitem(rewards.REWARDS, "redness", redness)
    monkeypatch.setattr("ddpo.interrupt.signal.signal", lambda *_: None)  # pytest keeps its Ctrl-C
    config = get_config()
    config.update_from_flattened_dict({
        **SMALL, "model": str(ROOT / "models/emoji"), "run_dir": str(folder), "reward": "redness", "lora_rank": 0,
        "algorithm": algorithm, "num_epochs": 2, "grid_every": 0, "grid_images": 1, "sample.num_steps": 4,
        "sample.images_per_epoch": 32, "sample.batch_size": 8, "sample.guidance_scale": 1.0, "train.batch_size": 8,
        "train.updates_per_epoch": 4, "train.learning_rate": 1e-4, "train.clip_range": 1e-2,
        "train.timestep_choice": "first", "train.timestep_fraction": 0.5, "evaluate.every": 2, "evaluate.limit": 24,
        "evaluate.count": 1, **CLIMBS[algorithm],
    })  # fmt: skip
    train.train(config, "test")
    lines = [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]
    before, after = (np.array(list(line["seen, stochastic"]["by_prompt"].values())) for line in lines)
    return (after - before).mean(), (after - before).std() / len(after) ** 0.5


@pytest.mark.parametrize("algorithm", CLIMBS)
def test_it_raises_its_reward(tmp_path, monkeypatch, algorithm):
    up, error = gain(tmp_path / "run", monkeypatch, algorithm)
    assert up > 4 * error, (up, error)
