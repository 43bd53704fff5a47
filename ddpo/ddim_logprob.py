"""One DDIM step as a Gaussian policy: p(x_{t-1} | x_t, c) = N(mu(x_t, t, model_output), sigma_t^2 I).

With alpha_t the cumulative product of the noise schedule (`alphas_cumprod`), t' the previous timestep, eps and x_0 the
network's estimates of the noise and of the clean latent (DDIM, arXiv 2010.02502, equations 12 and 16):

    sigma_t = eta * sqrt((1 - alpha_t') / (1 - alpha_t)) * sqrt(1 - alpha_t / alpha_t')
    mu      = sqrt(alpha_t') * x_0 + sqrt(1 - alpha_t' - sigma_t^2) * eps
    x_t'    = mu + sigma_t * noise

Everything here is float32, whatever precision the network runs in: the importance ratio of DDPO is a difference of
log-probabilities clipped at 1e-4, which half precision cannot resolve.
"""

import math

import torch


def _column(value, like):
    """(B,) -> (B, 1, 1, 1), to multiply latents with."""
    return value.reshape(-1, *[1] * (like.ndim - 1))


def ddim_step_mean_std(scheduler, model_output, timestep, sample, eta):
    """Mean and standard deviation of x_{t-1} given x_t.

    Args:
        scheduler: diffusers' DDIMScheduler, after `set_timesteps`.
        model_output: (B, C, H, W), the network's output: the noise, v or x_0 by `scheduler.config.prediction_type`.
        timestep: (B,) integers, or one for all.
        sample: (B, C, H, W), x_t.
        eta: 0 is deterministic DDIM, 1 has the variance of DDPM.
    Returns:
        mean (B, C, H, W) and std (B, 1, 1, 1), both float32.
    """
    config = scheduler.config
    if config.get("thresholding"):
        raise NotImplementedError("a scheduler with dynamic thresholding is not supported: set thresholding to False")
    sample, model_output = sample.float(), model_output.float()
    timestep = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
    previous = timestep - config.num_train_timesteps // scheduler.num_inference_steps
    alphas = scheduler.alphas_cumprod.to(sample.device, torch.float32)
    final_alpha = torch.as_tensor(scheduler.final_alpha_cumprod, dtype=torch.float32, device=sample.device)
    alpha = _column(alphas[timestep], sample)
    # The step that ends the chain goes to `final_alpha_cumprod`, not to the schedule's timestep 0.
    alpha_prev = _column(torch.where(previous >= 0, alphas[previous.clamp(min=0)], final_alpha), sample)

    if config.prediction_type == "epsilon":
        x_0 = (sample - (1 - alpha).sqrt() * model_output) / alpha.sqrt()
        noise = model_output
    elif config.prediction_type == "v_prediction":
        x_0 = alpha.sqrt() * sample - (1 - alpha).sqrt() * model_output
        noise = alpha.sqrt() * model_output + (1 - alpha).sqrt() * sample
    elif config.prediction_type == "sample":
        x_0 = model_output
        noise = (sample - alpha.sqrt() * x_0) / (1 - alpha).sqrt()
    else:
        raise NotImplementedError(f"prediction type {config.prediction_type!r}: epsilon, v_prediction or sample")
    if config.clip_sample:  # as diffusers does it: x_0 is clipped, the noise estimate is not recomputed
        x_0 = x_0.clamp(-config.clip_sample_range, config.clip_sample_range)

    variance = (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)
    std = eta * variance.clamp(min=0).sqrt()
    mean = alpha_prev.sqrt() * x_0 + (1 - alpha_prev - std**2).clamp(min=0).sqrt() * noise
    return mean, std


def ddim_step_with_logprob(scheduler, model_output, timestep, sample, eta, prev_sample=None, noise=None):
    """Takes a DDIM step, or scores one that was taken.

    Args:
        scheduler, model_output, timestep, sample, eta: as for `ddim_step_mean_std`.
        prev_sample: (B, C, H, W), the x_{t-1} to score; None to draw it.
        noise: (B, C, H, W), the standard normal noise to draw x_{t-1} with; None to draw that too.
    Returns:
        prev_sample (B, C, H, W) float32, without gradient, and its log_prob (B,) float32, see `gaussian_log_prob`.
    """
    mean, std = ddim_step_mean_std(scheduler, model_output, timestep, sample, eta)
    if prev_sample is None:
        noise = torch.randn_like(mean) if noise is None else noise.float()
        prev_sample = mean + std * noise
    prev_sample = prev_sample.detach().float()
    return prev_sample, gaussian_log_prob(prev_sample, mean, std)


def gaussian_log_prob(value, mean, std):
    """log N(value; mean, std^2 I), averaged (not summed) over the latent's dimensions: the clip range of DDPO refers to
    this mean.

    A step with std = 0 (eta 0, or the last step of a schedule that ends at alpha = 1) is deterministic and has no
    density: its log-prob is 0, so its ratio is 1 and it contributes no gradient.

    Args:
        value, mean: (B, C, H, W). std: (B, 1, 1, 1).
    Returns:
        (B,) float32.
    """
    deterministic = std == 0
    safe_std = torch.where(deterministic, 1.0, std)
    log_prob = -(((value - mean) / safe_std) ** 2) / 2 - safe_std.log() - 0.5 * math.log(2 * math.pi)
    return torch.where(deterministic, 0.0, log_prob).mean(dim=tuple(range(1, mean.ndim)))


def gaussian_kl(mean, other_mean, std):
    """KL between two Gaussians of one std: (mean - other_mean)^2 / (2 std^2), averaged over the latent's dimensions.

    Args:
        mean, other_mean: (B, C, H, W). std: (B, 1, 1, 1).
    Returns:
        (B,) float32; 0 for a deterministic step.
    """
    kl = (mean - other_mean) ** 2 / (2 * torch.where(std == 0, 1.0, std) ** 2)
    return torch.where(std == 0, 0.0, kl).mean(dim=tuple(range(1, mean.ndim)))
