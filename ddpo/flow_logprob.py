"""One step of a flow-matching model as a Gaussian policy: p(x_s' | x_s, c) = N(mu(x_s, s, model_output), std^2 I).

With s the noise level sigma (1: pure noise), s' the next one, dt = s' - s < 0, and v ~ noise - x_0 the model's output,

    x_s = (1 - s) x_0 + s noise,    x_0 = x_s - s v,    eps = x_s + (1 - s) v,    score = -eps / s.

The model itself is an ODE, dx = v ds, whose step has no density. What makes it a policy is noise, by one of KINDS:

    sde     Flow-GRPO (arXiv 2505.05470): the SDE of the ODE's marginals, with g = noise_level * sqrt(s / (1 - s))
    dance   DanceGRPO (arXiv 2505.07818): the same with a constant g = noise_level, there called eta

                mean = x + (v + g^2 / (2 s) * eps) dt,    std = g sqrt(-dt)

    cps     Flow-CPS (arXiv 2509.05952): DDIM's step, whose coefficients suit the next noise level whatever the step

                mean = (1 - s') x_0 + s' cos(a) eps,    std = s' sin(a),    a = noise_level * pi / 2

Rules for the ends. Where s is exactly 1, "sde" takes the second noise level of the schedule for that in its
denominator, so the first step's std is the noise level, whatever the schedule. The last step goes to s' = 0, with the
formulas as they are: "cps" is then deterministic. A noise level of 0 is the Euler step of the ODE, for every kind.

Everything here is float32, whatever precision the network runs in.
"""

import math

import torch

from ddpo.ddim_logprob import gaussian_log_prob
from ddpo.errors import InputError, choose

KINDS = {  # name -> the noise level that its authors train with
    "sde": 0.7,
    "cps": 0.8,
    "dance": 0.3,
}


def check_noise(noise_level, kind):
    """Raises InputError for an unknown kind of step, or a noise level that it cannot have."""
    usual = choose("kind of flow step", kind, KINDS)
    most = 1.0 if kind == "cps" else math.inf  # cps: of an angle's quarter turn
    if not 0 <= noise_level <= most or noise_level == math.inf:
        limit = "0 to 1" if kind == "cps" else "at least 0 and finite"
        raise InputError(f"noise level {noise_level} of a {kind} step must be {limit}; its authors use {usual}")


def sigmas_of(scheduler, timestep, like):
    """The noise levels s and s' of B steps, as columns to multiply `like` (B, ...) with, and the schedule's second.

    timestep: (B,) of the scheduler's timesteps, or one for all. Raises InputError for another one, where that can be
    seen without waiting for a device; there its step is nan.
    """
    if getattr(scheduler, "sigmas", None) is None or scheduler.config.get("invert_sigmas"):
        raise InputError(f"{type(scheduler).__name__} is not the scheduler of a flow that falls from sigma 1 to 0")
    if len(scheduler.sigmas) != len(scheduler.timesteps) + 1:
        raise InputError("the scheduler has no denoising steps yet: call its set_timesteps first")
    sigmas, timesteps = (t.to(like.device, torch.float32) for t in (scheduler.sigmas, scheduler.timesteps))
    timestep = torch.as_tensor(timestep, device=like.device).float().expand(len(like))
    found = timesteps == timestep[:, None]  # (B, T)
    known, index = found.any(dim=1), found.float().argmax(dim=1)
    if not like.is_cuda and not known.all():
        raise InputError(
            f"timestep {float(timestep[~known][0]):g} is none of the scheduler's {len(timesteps)} timesteps"
        )
    column = [-1] + [1] * (like.ndim - 1)
    s = torch.where(known, sigmas[index], torch.nan).reshape(column)
    return s, sigmas[index + 1].reshape(column), sigmas[1]


def flow_step_mean_std(scheduler, model_output, timestep, sample, noise_level, kind="sde"):
    """Mean and standard deviation of x_s' given x_s.

    Args:
        scheduler: diffusers' FlowMatchEulerDiscreteScheduler, after `set_timesteps`.
        model_output: the network's output v, (B, C, H, W), or (B, L, C) of packed latents.
        timestep: (B,) of the scheduler's timesteps, or one for all.
        sample: as model_output, x_s.
        noise_level: 0 is the ODE's Euler step.
        kind: one of KINDS.
    Returns:
        mean, as model_output, and std (B, 1, 1, 1) or (B, 1, 1), both float32.
    Raises:
        InputError for an unknown kind, a noise level out of its range, shapes that differ, a scheduler of another sort
        or without timesteps, and a timestep that is not the scheduler's.
    """
    check_noise(noise_level, kind)
    if model_output.shape != sample.shape:
        raise InputError(f"model_output {tuple(model_output.shape)} and sample {tuple(sample.shape)} differ in shape")
    v, x = model_output.float(), sample.float()
    s, s_next, second = sigmas_of(scheduler, timestep, x)
    dt = s_next - s
    x_0, eps = x - s * v, x + (1 - s) * v
    if kind == "cps":
        angle = noise_level * math.pi / 2
        return (1 - s_next) * x_0 + s_next * math.cos(angle) * eps, s_next * math.sin(angle)
    if kind == "dance":  # eps / s as its authors compute it, with their rounding: 1e-4 at the smallest s
        drift = v + noise_level**2 / 2 * (x - x_0 * (1 - s)) / s**2
        return x + drift * dt, noise_level * (-dt).sqrt()
    g = noise_level * (s / (1 - torch.where(s == 1, second, s))).sqrt()
    pull = g**2 / (2 * s)
    return x * (1 + pull * dt) + v * (1 + pull * (1 - s)) * dt, g * (-dt).sqrt()


def flow_log_prob(value, mean, std, kind="sde"):
    """The log-prob of a step, averaged (not summed) over the latent's dimensions.

    "sde" and "dance": `gaussian_log_prob`, so 0 for a step without noise. "cps": as its authors have it,
    -(value - mean)^2, the Gaussian's without 1 / (2 std^2) and normaliser: each step then weighs 2 std^2 times what
    it would, and the last one, which has no noise, is finite: 0 for the value that was drawn, and without gradient.

    Args:
        value, mean: (B, ...). std: (B, 1, ...).
    Returns:
        (B,) float32.
    """
    if kind == "cps":
        return -((value - mean) ** 2).mean(dim=tuple(range(1, mean.ndim)))
    return gaussian_log_prob(value, mean, std)


def flow_step_with_logprob(
    scheduler, model_output, timestep, sample, noise_level, prev_sample=None, noise=None, kind="sde"
):
    """Takes a step, or scores one that was taken.

    Args:
        scheduler, model_output, timestep, sample, noise_level, kind: as for `flow_step_mean_std`.
        prev_sample: as sample, the x_s' to score; None to draw it.
        noise: as sample, the standard normal noise to draw x_s' with; None to draw that too.
    Returns:
        prev_sample, as sample but float32 and without gradient, and its log_prob (B,) float32, see `flow_log_prob`.
    Raises:
        InputError as `flow_step_mean_std`, and for a prev_sample or noise of another shape than sample.
    """
    mean, std = flow_step_mean_std(scheduler, model_output, timestep, sample, noise_level, kind)
    for name, given in (("prev_sample", prev_sample), ("noise", noise)):
        if given is not None and given.shape != sample.shape:
            raise InputError(f"{name} {tuple(given.shape)} and sample {tuple(sample.shape)} differ in shape")
    if prev_sample is None:
        noise = torch.randn_like(mean) if noise is None else noise.float()
        prev_sample = mean + std * noise
    prev_sample = prev_sample.detach().float()
    return prev_sample, flow_log_prob(prev_sample, mean, std, kind)
