"""The algorithms side by side. Each raises the likelihood of the samples that it weighs up, by three choices:

    weigh      what multiplies a sample's loss: its advantage, or a weight made of its reward
    loss       of that and of how likely the sample is under the weights being trained
    process    "reverse": a loss on each denoising step x_t -> x_{t-1} that was taken (likelihood.Transitions), or
               "forward": on the final x_0, noised anew (likelihood.Draws)

All have the same signatures:

    advantages = weigh(rewards, advantages, prompts, options)   (N,), (N,), N strings -> (N,) float64
    loss, info = loss(terms, advantages, options)               Transitions or Draws, (B,) -> (B,), {name: (B,)}

N: the samples of an epoch, over all processes; `weigh` gets the advantages of ddpo/stat_tracking.py. B: a minibatch of
transitions or draws. options: `config.train`. The loss is averaged over an optimizer update; info has no gradient and
is logged by its mean.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

# ----------------------------------------------------------------------------------------- what multiplies the loss


def clipped_advantage(rewards, advantages, prompts, options):
    """DDPO: clip(A, -advantage_clip, advantage_clip)."""
    return np.clip(advantages, -options.advantage_clip, options.advantage_clip)


def softmax_weight(rewards, advantages, prompts, options):
    """RWR: exp(inverse_temperature * reward), divided by its mean over the epoch, or with `weight_per_prompt` over the
    samples of the same prompt. An inverse temperature of 0 weighs all by 1: plain finetuning on one's own samples."""
    weight = np.empty(len(rewards))
    for compared in _compared(prompts, options):
        tilt = np.exp(options.inverse_temperature * (rewards[compared] - rewards[compared].max()))
        weight[compared] = tilt / tilt.mean()
    return weight


def percentile_weight(rewards, advantages, prompts, options):
    """RWR-sparse: 1 for rewards at or above `keep_percentile` of the epoch (or of the prompt), 0 for others, divided by
    the mean. Samples of weight 0 cost nothing: they are not trained on."""
    weight = np.empty(len(rewards))
    for compared in _compared(prompts, options):
        kept = rewards[compared] >= np.percentile(rewards[compared], options.keep_percentile)
        weight[compared] = kept / kept.mean()
    return weight


def _compared(prompts, options):
    """Masks (N,) of the samples that are compared with one another."""
    prompts = np.asarray(prompts)
    return [prompts == p for p in np.unique(prompts)] if options.weight_per_prompt else [np.full(len(prompts), True)]


# --------------------------------------------------------------------------------------------------------------- losses


def ddpo_is(terms, advantages, options):
    """DDPO with importance sampling: PPO's clipped surrogate on single denoising steps (the paper, section 4.3).

    ratio = p_theta / p_old;  loss = max(-A * ratio, -A * clip(ratio, 1 - clip_range, 1 + clip_range))
    """
    ratio = torch.exp(terms.log_prob - terms.old_log_prob)
    clipped = ratio.clamp(1 - options.clip_range, 1 + options.clip_range)
    return torch.maximum(-advantages * ratio, -advantages * clipped), policy_shift(terms, options)


def ddpo_mask(terms, advantages, options):
    """DDPO with a mask in place of the clip (Flow-DPPO, arXiv 2606.11025): a step's term is dropped where its exact
    divergence D = `kl_old` has reached `kl_range` and the update would carry it further.

    loss = -A * ratio, or 0 where D >= kl_range and A * (ratio - 1) > 0

    Deviation: theirs is a flow-matching policy; a DDIM step is a Gaussian of known mean and std as well.
    """
    ratio = torch.exp(terms.log_prob - terms.old_log_prob)
    dropped = (terms.kl_old >= options.kl_range) & (advantages * (ratio - 1) > 0)
    info = policy_shift(terms, options) | {"clip_fraction": dropped.float()}
    return torch.where(dropped, 0.0, -advantages * ratio), info


def ddpo_smooth(terms, advantages, options):
    """DDPO with a penalty in place of the clip: DRPO (arXiv 2606.09821), restated for Gaussian steps with the exact
    divergence D = `kl_old`. A step that has gone too far is drawn back, where the clip and the mask leave it alone.

    loss = -A * ratio + (|A| / kl_range) * D

    Deviation: DRPO penalises (ratio - 1)^2, weighed by a token's probability, for which a density has no counterpart.
    """
    ratio = torch.exp(terms.log_prob - terms.old_log_prob)
    return -advantages * ratio + advantages.abs() / options.kl_range * terms.kl_old, policy_shift(terms, options)


def ddpo_sf(terms, advantages, options):
    """DDPO with the score function, REINFORCE: the policy gradient itself (the paper, section 4.3). It holds only at
    the weights that sampled, so an epoch allows one update.

    loss = -A * log p_theta
    """
    return -advantages * terms.log_prob, {}


def rwr(terms, weights, options):
    """Reward-weighted regression (the paper, section 4.2, after Lee et al., arXiv 2302.12192): the ordinary denoising
    loss on the samples x_0, weighted. Nothing ties it to the weights that sampled, so an epoch allows many updates.

    loss = w * |network(x_t) - target|^2
    """
    return weights * terms.error, {}


def policy_shift(terms, options):
    """How far the policy has moved from the one that sampled: exactly, and as the steps that were taken tell."""
    log_ratio = (terms.log_prob - terms.old_log_prob).detach()
    return {
        "kl_old": terms.kl_old.detach(),
        "approx_kl": 0.5 * log_ratio**2,
        "clip_fraction": (torch.expm1(log_ratio).abs() > options.clip_range).float(),
    }


class Algorithm(NamedTuple):
    weigh: Callable
    loss: Callable
    process: str


ALGORITHMS = {
    "ddpo_is": Algorithm(clipped_advantage, ddpo_is, "reverse"),
    "ddpo_sf": Algorithm(clipped_advantage, ddpo_sf, "reverse"),
    "ddpo_mask": Algorithm(clipped_advantage, ddpo_mask, "reverse"),
    "ddpo_smooth": Algorithm(clipped_advantage, ddpo_smooth, "reverse"),
    "rwr": Algorithm(softmax_weight, rwr, "forward"),
    "rwr_sparse": Algorithm(percentile_weight, rwr, "forward"),
}
