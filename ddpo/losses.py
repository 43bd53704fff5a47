"""The algorithms side by side. Each raises the likelihood of the samples that it weighs up, by three choices:

    weight       what a sample counts; computed once a round, from all its rewards
    loss         of that weight and of a log-likelihood
    likelihood   "step": log p_theta(x_{t-1} | x_t, c) of the denoising steps that were taken, which is exact; or
                 "sample": log p_theta(x_0 | c) of what came out, which has only a bound, minus the denoising error

All weights have one signature, and so have all losses:

    weight = weigh(rewards, advantages, prompts, config)             (N,), (N,), N strings -> (N,) float64
    loss, info = algorithm(log_prob, old_log_prob, weight, config)   (B,), (B,), (B,) -> (B,), {name: (B,)}

N: the samples of a round, over all processes; advantages: by ddpo/stat_tracking.py; B: a batch of transitions (or, for
"sample", of samples); log_prob: mean over the latent's dimensions, under the weights being trained; old_log_prob: the
same under the weights that sampled; config: `config.train`. The loss is to be averaged over an optimizer update; info
has no gradient and is logged by its mean.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

# -------------------------------------------------------------------------------------------------------------- weights


def clipped_advantage(rewards, advantages, prompts, config):
    """DDPO: weight = clip(advantage, -advantage_clip, advantage_clip)."""
    return np.clip(advantages, -config.advantage_clip, config.advantage_clip)


def softmax_weight(rewards, advantages, prompts, config):
    """RWR: weight = exp(inverse_temperature * reward) / its mean; the mean is that of the round, or with
    `weight_per_prompt` that of the samples with the same prompt. Inverse temperature 0 weighs all by 1: plain
    finetuning on one's own samples."""
    weight = np.empty(len(rewards))
    for compared in _compared(prompts, config):
        tilt = np.exp(config.inverse_temperature * (rewards[compared] - rewards[compared].max()))
        weight[compared] = tilt / tilt.mean()
    return weight


def percentile_weight(rewards, advantages, prompts, config):
    """RWR-sparse: 1 for rewards at or above `keep_percentile` of the round (or of the prompt), 0 for the others, over
    its mean. Those with weight 0 cost nothing: they are not trained on."""
    weight = np.empty(len(rewards))
    for compared in _compared(prompts, config):
        kept = rewards[compared] >= np.percentile(rewards[compared], config.keep_percentile)
        weight[compared] = kept / kept.mean()
    return weight


def _compared(prompts, config):
    """Masks (N,) of the samples that are compared with one another."""
    prompts = np.asarray(prompts)
    return [prompts == p for p in np.unique(prompts)] if config.weight_per_prompt else [np.full(len(prompts), True)]


# --------------------------------------------------------------------------------------------------------------- losses


def ddpo_is(log_prob, old_log_prob, weight, config):
    """DDPO with importance sampling: the clipped surrogate of PPO on single denoising steps (the paper, section 4.3).

    ratio = p_theta / p_old;  loss = max(-A * ratio, -A * clip(ratio, 1 - clip_range, 1 + clip_range))
    """
    ratio = torch.exp(log_prob - old_log_prob)
    clipped = ratio.clamp(1 - config.clip_range, 1 + config.clip_range)
    return torch.maximum(-weight * ratio, -weight * clipped), _shift(log_prob, old_log_prob, config)


def ddpo_smooth(log_prob, old_log_prob, weight, config):
    """DDPO-IS with a quadratic penalty in place of the clip: the loss is a parabola whose least is at a ratio of
    1 +- clip_range, so that a step that overshot is drawn back instead of left alone. The form is SPO's
    (arXiv 2401.16025); DRPO (arXiv 2606.09821) does so for language models, on the shift of a token's probability.

    loss = -A * ratio + |A| * (ratio - 1)^2 / (2 * clip_range)
    """
    ratio = torch.exp(log_prob - old_log_prob)
    penalty = weight.abs() * (ratio - 1) ** 2 / (2 * config.clip_range)
    return -weight * ratio + penalty, _shift(log_prob, old_log_prob, config)


def ddpo_sf(log_prob, old_log_prob, weight, config):
    """DDPO with the score function, REINFORCE: the policy gradient itself (the paper, section 4.3). It holds at the
    weights that sampled and nowhere else, so a round allows one update.

    loss = -A * log p_theta
    """
    return -weight * log_prob, {}


def rwr(log_prob, old_log_prob, weight, config):
    """Reward-weighted regression (the paper, section 4.2, after Lee et al., arXiv 2302.12192): the ordinary denoising
    loss on the samples x_0, weighted. Nothing ties it to the weights that sampled, so a round allows many updates.

    loss = weight * |target - network(x_t)|^2 = -weight * log_prob
    """
    return -weight * log_prob, {}


@torch.no_grad()
def _shift(log_prob, old_log_prob, config):
    log_ratio = log_prob - old_log_prob
    return {
        "approx_kl": 0.5 * log_ratio**2,
        "clip_fraction": (torch.expm1(log_ratio).abs() > config.clip_range).float(),
    }


# ------------------------------------------------------------------------------------------------------------ timesteps
# Which `count` of the T steps an update trains on: rule(rng, T, count) -> their indices, rising; 0 is the noisiest.


def random_steps(rng, num_steps, count):
    """Any, drawn anew for each update."""
    return np.sort(rng.choice(num_steps, count, replace=False))


def window_of_steps(rng, num_steps, count):
    """Steps that follow one another, from a place drawn anew for each update (after MixGRPO, arXiv 2507.21802, whose
    window slides, and outside of which it samples deterministically)."""
    return rng.integers(num_steps - count + 1) + np.arange(count)


def first_steps(rng, num_steps, count):
    """The noisiest, which decide what the picture shows."""
    return np.arange(count)


TIMESTEPS = {"random": random_steps, "window": window_of_steps, "first": first_steps}


class Algorithm(NamedTuple):
    weigh: Callable
    loss: Callable
    likelihood: str


ALGORITHMS = {
    "ddpo_is": Algorithm(clipped_advantage, ddpo_is, "step"),
    "ddpo_sf": Algorithm(clipped_advantage, ddpo_sf, "step"),
    "ddpo_smooth": Algorithm(clipped_advantage, ddpo_smooth, "step"),
    "rwr": Algorithm(softmax_weight, rwr, "sample"),
    "rwr_sparse": Algorithm(percentile_weight, rwr, "sample"),
}
