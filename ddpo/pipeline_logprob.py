"""The trajectory sampler: text-to-image sampling that keeps every latent, and the log-prob of every step.

`predict_noise` is the one place where the network is called and where classifier-free guidance is applied, for sampling
and for training alike: a policy that samples with guidance and trains without it has a meaningless importance ratio.
"""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ddpo.ddim_logprob import ddim_step_kl, ddim_step_with_logprob


class Trajectories(NamedTuple):
    """What B prompts became in T steps. `latents[:, 0]` is pure noise, `latents[:, T]` the picture's latent."""

    images: list  # B PIL images, or none if `on_images` was given them
    latents: torch.Tensor  # (B, T + 1, C, H, W) float32, on the policy's device
    log_probs: torch.Tensor  # (B, T) float32: log p(latents[:, t + 1] | latents[:, t]), mean over dimensions
    timesteps: torch.Tensor  # (T,) the scheduler's timesteps, falling


def _generator(*key):
    """Of the CPU, so that what it draws is the same on every device."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def draw_noise(shape, seed, epoch, index):
    """All standard normal noise of sample `index` of an epoch."""
    return torch.randn(shape, generator=_generator(seed, epoch, index, 2))


def step_log_prob(policy, x_t, x_next, timesteps, prompt_embeds, negative_embeds, guidance_scale, eta, with_kl=False):
    """log p_theta(x_{t-1} | x_t, c) of B steps that were taken, from `x_t` to `x_next`, (B, C, H, W) each.

    Other arguments: as for `predict_noise` and `ddim_step_with_logprob`.
    Returns:
        log_prob (B,) float32, and KL(p_theta || p_base) of the steps (B,) if `with_kl`, else None.
    """
    arguments = (policy, x_t, timesteps, prompt_embeds, negative_embeds, guidance_scale)
    output, kl = predict_noise(*arguments), None
    _, log_prob = ddim_step_with_logprob(policy.scheduler, output, timesteps, x_t, eta, prev_sample=x_next)
    if with_kl:
        with torch.no_grad(), policy.base():
            base_output = predict_noise(*arguments)
        kl = ddim_step_kl(policy.scheduler, output, base_output, timesteps, x_t, eta)
    return log_prob, kl


def sample_log_prob(policy, x_0, keys, prompt_embeds, negative_embeds, prompt_dropout):
    """What base models are trained to raise: minus the denoising error, which bounds log p_theta(x_0 | c) from below up
    to weights of the timesteps (DDPM, arXiv 2006.11239, section 3.4).

    log_prob = -mean (network(x_t, t, c) - target)^2,  x_t = sqrt(alpha_t) x_0 + sqrt(1 - alpha_t) noise

    with t uniform over the training timesteps and the target by `prediction_type`: noise, v or x_0.

    Args:
        x_0: (B, C, H, W), latents.
        keys: B tuples of integers, each of which alone determines its sample's t, noise and dropout.
        prompt_embeds, negative_embeds: as for `predict_noise`.
        prompt_dropout: share of the samples that get the empty prompt instead, which keeps guidance working.
    Returns:
        (B,) float32.
    """
    scheduler, drawn = policy.scheduler, []
    for key in keys:
        generator = _generator(*key, 4)
        t = torch.randint(scheduler.config.num_train_timesteps, (), generator=generator)
        drawn.append((t, torch.rand((), generator=generator), torch.randn(x_0.shape[1:], generator=generator)))
    t, dropout, noise = (torch.stack(values).to(x_0.device) for values in zip(*drawn))
    embeds = torch.where((dropout < prompt_dropout)[:, None, None], negative_embeds, prompt_embeds)
    target = {"epsilon": noise, "v_prediction": scheduler.get_velocity(x_0, noise, t), "sample": x_0}
    error = policy.forward(scheduler.add_noise(x_0, noise, t), t, embeds) - target[scheduler.config.prediction_type]
    return -(error**2).mean(dim=(1, 2, 3))


def predict_noise(policy, latents, timesteps, prompt_embeds, negative_embeds, guidance_scale):
    """The network's output with classifier-free guidance: uncond + guidance_scale * (cond - uncond).

    Args:
        policy: a `ddpo.policy.Policy`.
        latents: (B, C, H, W).
        timesteps: (B,).
        prompt_embeds: (B, L, D) of the prompts.
        negative_embeds: (1, L, D) of the empty prompt.
        guidance_scale: 1 is no guidance (one forward pass instead of two).
    Returns:
        (B, C, H, W) float32.
    """
    if guidance_scale == 1:
        return policy.forward(latents, timesteps, prompt_embeds)
    both = torch.cat([negative_embeds.expand_as(prompt_embeds), prompt_embeds])
    output = policy.forward(torch.cat([latents, latents]), torch.cat([timesteps, timesteps]), both)
    uncond, cond = output.chunk(2)
    return uncond + guidance_scale * (cond - uncond)


@torch.no_grad()
def sample_with_logprob(
    policy, prompts, noise, guidance_scale, eta, batch_size=0, progress=None, stop=None, on_images=None
):
    """Samples one picture per prompt and records its trajectory.

    Args:
        policy: a `ddpo.policy.Policy`, its scheduler set to T timesteps.
        prompts: B strings.
        noise: function of an index i in 0..B-1 that returns the (T + 1, C, H, W) standard normal noise of picture i:
            the initial latent, then one for each step. Nothing else is random: `batch_size` changes no result.
        guidance_scale, eta: see `predict_noise` and `ddim_step_with_logprob`.
        batch_size: pictures per forward pass; 0 for all at once.
        progress: label of a progress bar, None for none.
        stop: function asked before each batch whether to give up.
        on_images: function called with (first index, images) of each batch, as soon as they are there; they are then
            not kept, which for 256 pictures of 512x512 would take 0.2 GB.
    Returns:
        Trajectories, or None if `stop` said so.
    """
    scheduler, count = policy.scheduler, len(prompts)
    timesteps = scheduler.timesteps.to(policy.device)
    initial_scale = float(scheduler.init_noise_sigma)
    batch_size = batch_size or count
    images, trajectories, all_log_probs = [], None, []
    bar = tqdm(total=count * len(timesteps), desc=progress, unit="step", leave=False, disable=progress is None)
    for start in range(0, count, batch_size):
        if stop is not None and stop():
            bar.close()
            return None
        batch = range(start, min(start + batch_size, count))
        prompt_embeds = policy.embed([prompts[i] for i in batch])
        negative_embeds = policy.embed([""])
        batch_noise = torch.stack([noise(i) for i in batch]).to(policy.device)  # (b, T + 1, C, H, W)
        if trajectories is None:  # in one piece from the start: at Stable Diffusion's size they are most of a gigabyte
            trajectories = torch.empty((count, *batch_noise.shape[1:]), device=policy.device)
        latents = trajectories[start : start + len(batch)]
        latents[:, 0] = x_t = batch_noise[:, 0] * initial_scale
        log_probs = []
        for step, t in enumerate(timesteps):
            t = t.expand(len(batch))
            output = predict_noise(policy, x_t, t, prompt_embeds, negative_embeds, guidance_scale)
            x_t, log_prob = ddim_step_with_logprob(scheduler, output, t, x_t, eta, noise=batch_noise[:, step + 1])
            latents[:, step + 1] = x_t
            log_probs.append(log_prob)
            bar.update(len(batch))
        if on_images is None:
            images += decode(policy, x_t)
        else:
            on_images(start, decode(policy, x_t))
        all_log_probs.append(torch.stack(log_probs, dim=1))
    bar.close()
    return Trajectories(images, trajectories, torch.cat(all_log_probs), timesteps)


def decode(policy, latents):
    """Latents (B, C, H, W) -> B PIL images, through the VAE in float32; so many at a time as make four of 512x512."""
    images = []
    for part in latents.split(max(1, 4 * 64 * 64 // latents[0, 0].numel())):
        pixels = policy.vae.decode(part / policy.vae.config.scaling_factor).sample
        pixels = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte()
        images += [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]
    return images
