"""The trajectory sampler: text-to-image sampling that keeps every latent, and the log-prob of every step.

`predict_noise` is the one place where the network is called and where classifier-free guidance is applied, for sampling
and for training alike: a policy that samples with guidance and trains without it has a meaningless importance ratio.
"""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from ddpo.seeds import torch_generator


class Trajectories(NamedTuple):
    """What B prompts became in T steps, on the policy's device. `latents[:, 0]` is pure noise, `latents[:, -1]` the
    image's latent; without `keep_steps` the latter is all there is, and there are no means and log-probs."""

    images: list  # B PIL images, or none if `on_images` was given them
    latents: torch.Tensor  # (B, T + 1, C, H, W) float32, or (B, 1, C, H, W)
    means: torch.Tensor  # (B, T, C, H, W) float32: of the Gaussian that latents[:, t + 1] was drawn from
    log_probs: torch.Tensor  # (B, T) float32: log p(latents[:, t + 1] | latents[:, t]), mean over dimensions
    timesteps: torch.Tensor  # (T,) the scheduler's timesteps, falling


def draw_noise(shape, seed, epoch, index):
    """All standard normal noise of sample `index` of an epoch."""
    return torch.randn(shape, generator=torch_generator("noise", seed, epoch, index))


def predict_noise(policy, latents, timesteps, prompt_embeds, negative_embeds, guidance_scale):
    """The network's output with classifier-free guidance: uncond + guidance_scale * (cond - uncond).

    Args:
        policy: a `ddpo.policy.Policy`.
        latents: (B, C, H, W).
        timesteps: (B,).
        prompt_embeds: Conditions of the B prompts, from `policy.embed`.
        negative_embeds: Conditions of the empty prompt.
        guidance_scale: 1 is no guidance (one forward pass instead of two). A network that is told it (FLUX.1-dev)
            takes one pass in any case.
    Returns:
        (B, C, H, W) float32.
    """
    if guidance_scale == 1 or policy.family.told_guidance:
        return policy.forward(latents, timesteps, prompt_embeds, guidance_scale)
    both = negative_embeds.expand(len(prompt_embeds)).join(prompt_embeds)
    output = policy.forward(torch.cat([latents, latents]), torch.cat([timesteps, timesteps]), both)
    uncond, cond = output.chunk(2)
    return uncond + guidance_scale * (cond - uncond)


@torch.no_grad()
def sample_with_logprob(
    policy,
    prompts,
    noise,
    guidance_scale,
    eta,
    batch_size=0,
    keep_steps=False,
    progress=None,
    stop=None,
    on_images=None,
):
    """Samples one image per prompt and, with `keep_steps`, records its trajectory.

    Args:
        policy: a `ddpo.policy.Policy`, its scheduler set to T timesteps.
        prompts: B strings.
        noise: function of an index i in 0..B-1 that returns the (T + 1, C, H, W) standard normal noise of image i:
            the initial latent, then one for each step. Nothing else is random: `batch_size` changes no result.
        guidance_scale: see `predict_noise`.
        eta: noise of the steps, DDIM's eta or a flow's noise level (`policy.noise_level`); 0 draws without.
        batch_size: images per forward pass; 0 for all at once.
        progress: label of a progress bar, None for none.
        stop: function asked before each batch whether to give up.
        on_images: function called with (first index, images) of each batch, as soon as they are there; the images are
            then not kept, which would take 0.2 GB for 256 images of 512x512.
    Returns:
        Trajectories, or None if `stop` said so.
    """
    count = len(prompts)
    timesteps = policy.scheduler.timesteps.to(policy.device)
    batch_size = batch_size or count
    images, latents = [], None
    bar = tqdm(total=count * len(timesteps), desc=progress, unit="step", leave=False, disable=progress is None)
    for start in range(0, count, batch_size):
        if stop is not None and stop():
            bar.close()
            return None
        batch = range(start, min(start + batch_size, count))
        rows = slice(batch.start, batch.stop)
        prompt_embeds, negative_embeds = policy.embed(prompts[rows]), policy.embed([""])
        batch_noise = torch.stack([noise(i) for i in batch]).to(policy.device)  # (b, T + 1, C, H, W)
        if latents is None:  # in one piece from the start: of 256 images of Stable Diffusion they are 0.9 GB
            shape, kept = batch_noise.shape[2:], len(timesteps) if keep_steps else 0
            latents = torch.empty(count, kept + 1, *shape, device=policy.device)
            means = torch.empty(count, kept, *shape, device=policy.device)
            log_probs = torch.empty(count, kept, device=policy.device)
        latents[rows, 0] = x_t = batch_noise[:, 0]
        with policy.masters.unchanged():
            for step, t in enumerate(timesteps):
                t = t.expand(len(batch))
                output = predict_noise(policy, x_t, t, prompt_embeds, negative_embeds, guidance_scale)
                mean, std = policy.step_mean_std(output, t, x_t, eta)
                x_t = mean + std * batch_noise[:, step + 1]
                if keep_steps:
                    latents[rows, step + 1], means[rows, step] = x_t, mean
                    log_probs[rows, step] = policy.step_log_prob(x_t, mean, std)
                bar.update(len(batch))
        latents[rows, -1] = x_t
        if on_images is None:
            images += decode(policy, x_t)
        else:
            on_images(start, decode(policy, x_t))
    bar.close()
    return Trajectories(images, latents, means, log_probs, timesteps)


@torch.no_grad()
def encode(vae, images, width, height):
    """Latents (B, C, h, w), as the denoiser takes them, of B PIL images that are cut and scaled to width x height
    pixels: the means that the VAE gives them."""
    images = [ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS) for image in images]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    latents, config = vae.encode(pixels.to(vae.device) / 127.5 - 1).latent_dist.mode(), vae.config
    return (latents - config.shift_factor if config.shift_factor else latents) * config.scaling_factor


def decode(policy, latents):
    """Latents (B, C, H, W) -> B PIL images, through the VAE in float32; so many at a time as make four of 512x512."""
    images, config = [], policy.vae.config
    for part in latents.split(max(1, 4 * 64 * 64 // latents[0, 0].numel())):
        part = part / config.scaling_factor
        pixels = policy.vae.decode(part + config.shift_factor if config.shift_factor else part).sample
        pixels = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte()
        images += [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]
    return images
