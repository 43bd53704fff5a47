"""The algorithms side by side. Each raises the likelihood of samples with a high weight; they differ in:

    weigh        what multiplies a sample's loss: its advantage, or a weight made of its reward
    loss         of that and of how likely the sample is under the weights being trained
    process      "reverse": a loss on each denoising step x_t -> x_{t-1} that was taken (likelihood.Transitions), or
                 "forward": on the final x_0 with new noise (likelihood.Draws), or "one step": on x_0 as a function of
                 the noise, by a generator that takes one step (likelihood.Generated)
    needs        what the terms must hold: "old", of the weights that sampled, "base", of the base model
    skips_zeros  whether samples of weight 0 are left out, so that they cost nothing
    pairs        whether a minibatch holds pairs of samples of one prompt, with the same timestep and noise

All have the same signatures:

    advantages = weigh(rewards, advantages, prompts, config)    (N,), (N,), N strings -> (N,) float64
    loss, info = loss(terms, advantages, options)               Transitions, Draws or Generated, (B,) -> (B,),
                                                                {name: (B,)}

N: the samples of an epoch, over all processes; `weigh` gets the advantages of ddpo/stat_tracking.py. B: a minibatch of
transitions or draws. options: `config.train`. The loss is averaged over an optimizer update; info has no gradient and
is logged by its mean.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from ddpo.drift import drift
from ddpo.likelihood import mean_square

# ----------------------------------------------------------------------------------------- what multiplies the loss


def clipped_advantage(rewards, advantages, prompts, config):
    """clip(A, -advantage_clip, advantage_clip)."""
    return np.clip(advantages, -config.train.advantage_clip, config.train.advantage_clip)


def softmax_weight(rewards, advantages, prompts, config):
    """RWR: exp(inverse_temperature * reward), divided by its mean over the epoch, or with `weight_per_prompt` over the
    samples of the same prompt. An inverse temperature of 0 weighs all by 1: plain finetuning on one's own samples."""
    weight = np.empty(len(rewards))
    for compared in _compared(prompts, config):
        tilt = np.exp(config.train.inverse_temperature * (rewards[compared] - rewards[compared].max()))
        weight[compared] = tilt / tilt.mean()
    return weight


def percentile_weight(rewards, advantages, prompts, config):
    """RWR-sparse: 1 for rewards at or above `keep_percentile` of the epoch (or of the prompt), 0 for others, divided by
    the mean. Samples of weight 0 cost nothing: they are not trained on."""
    weight = np.empty(len(rewards))
    for compared in _compared(prompts, config):
        kept = rewards[compared] >= np.percentile(rewards[compared], config.train.keep_percentile)
        weight[compared] = kept / kept.mean()
    return weight


def _compared(prompts, config):
    """Masks (N,) of the samples that are compared with one another."""
    prompts = np.asarray(prompts)
    per_prompt = config.train.weight_per_prompt
    return [prompts == p for p in np.unique(prompts)] if per_prompt else [np.full(len(prompts), True)]


def best_weight(rewards, advantages, prompts, config):
    """Best of n: n for the image of each prompt's group with the highest reward, 0 for the others; so the mean is 1.
    0 for all where the rewards of a group are equal."""
    groups = rewards.reshape(-1, config.sample.images_per_prompt)
    weight = np.zeros_like(groups, dtype=np.float64)
    weight[np.arange(len(groups)), groups.argmax(1)] = groups.shape[1] * (np.ptp(groups, axis=1) > 0)
    return weight.ravel()


def best_and_worst(rewards, advantages, prompts, config):
    """n / 2 for the best image of each prompt's group of n, -n / 2 for the worst, 0 for the others: the mean over all
    of |weight| is 1. 0 for all where the rewards of a group are equal."""
    return (best_weight(rewards, None, None, config) - best_weight(-rewards, None, None, config)) / 2


def halves(rewards, advantages, prompts, config):
    """1 for the better half of the images of each prompt's group, -1 for the worse half, 0 for the middle one of an odd
    number, and for all where the rewards of a group are equal."""
    groups = rewards.reshape(-1, config.sample.images_per_prompt)
    half, order, sign = groups.shape[1] // 2, groups.argsort(1, kind="stable"), np.zeros(groups.shape)
    np.put_along_axis(sign, order[:, :half], -1.0, 1)
    np.put_along_axis(sign, order[:, -half:], 1.0, 1)
    return (sign * (np.ptp(groups, axis=1, keepdims=True) > 0)).ravel()


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


def awm(terms, advantages, options):
    """Advantage-weighted matching (arXiv 2509.25050): PPO's clipped surrogate, with minus the denoising error in the
    place of the log-prob. The old error has the same timestep and noise, so the ratio is 1 before any update.

    ratio = exp(old error - error)
    loss = max(-A ratio, -A clip(ratio, 1 +- clip_range)) + anchor_weight |output - old|^2

    Published with flow matching, without guidance, |A| <= 1, 6 draws an image, and a moving average as the anchor.
    Deviations: the error is of the network's own target, which for noise is the velocity's up to a weight of the
    timestep; the anchor is the policy that sampled, which is a moving average with `sample.averaged`.
    """
    ratio = torch.exp(mean_square(terms.old - terms.target) - terms.error)
    clipped = ratio.clamp(1 - options.clip_range, 1 + options.clip_range)
    moved = mean_square(terms.output - terms.old)
    info = {"kl_old": moved.detach(), "clip_fraction": ((ratio - 1).abs() > options.clip_range).float()}
    return torch.maximum(-advantages * ratio, -advantages * clipped) + options.anchor_weight * moved, info


def nft(terms, advantages, options):
    """DiffusionNFT (arXiv 2509.16117): a good image is fitted by a policy beyond the trained one, a bad image by its
    mirror image on the other side of the policy that sampled. So bad images push away, with a bounded force.

    r = clip(A / advantage_clip / 2 + 1/2, 0, 1),  b = nft_beta,  with x_0 as each output implies it
    plus = (1 - b) old + b output,  minus = (1 + b) old - b output
    e+- = x_0 of plus, minus, less the image's x_0
    loss = advantage_clip / b * (r |e+|^2 / sg mean |e+| + (1 - r) |e-|^2 / sg mean |e-|)

    Published with flow matching, deterministic sampling without guidance by the moving average (`sample.averaged`), and
    1e-4 of the squared distance from the base model (`train.kl_weight`). x_0 is an affine function of the output at
    x_t, whatever that predicts, so nothing deviates.
    """
    b, share = options.nft_beta, (advantages / options.advantage_clip / 2 + 0.5).clamp(0, 1)
    loss = 0
    for weight, direction in ((share, b), (1 - share, -b)):
        error = terms.x_0_scale * (terms.old + direction * (terms.output - terms.old) - terms.target)
        size = error.detach().abs().mean(dim=tuple(range(1, error.ndim)))
        loss = loss + weight * mean_square(error) / size.clamp(min=1e-5)
    return options.advantage_clip / b * loss, {"kl_old": mean_square(terms.output - terms.old).detach()}


def ram(terms, advantages, options):
    """RAM (arXiv 2605.10759): regression to the base model's output, moved by the old prediction's error, towards the
    images of positive advantage and away from the others. The base model as the starting point is the KL penalty.

    loss = |output - sg(base + ram_scale A (target - old))|^2

    Published with flow matching, ram_scale 100, timesteps drawn in proportion to t, 8 draws, and a moving average as
    the policy that samples. Deviations: the output is the network's own, for noise the velocity up to a weight of
    the timestep; timesteps are uniform.
    """
    weight = options.ram_scale * advantages.reshape(-1, *[1] * (terms.output.ndim - 1))
    aim = terms.base + weight * (terms.target - terms.old)
    return mean_square(terms.output - aim), {"kl_old": mean_square(terms.output - terms.old).detach()}


def dpo(terms, weights, options):
    """Online DPO (Diffusion-DPO, arXiv 2311.12908) on the best and the worst image of each prompt's group, noised to
    the same timestep with the same noise.

    loss = -log sigmoid(-dpo_beta / 2 ((error - base error) of the best - (error - base error) of the worst))

    Published on pairs that people chose, once; here the pairs are the epoch's own.
    """
    error, base_error = (e.view(-1, 2).T for e in (terms.error, mean_square(terms.base - terms.target)))
    margin = preference_margin(error, base_error, options.dpo_beta)
    loss = -logsigmoid(weights.view(-1, 2)[:, 0].sign() * margin)
    return weights.abs() * loss.repeat_interleave(2), {}


def drpo(terms, sign, options):
    """DrPO (arXiv 2606.02521), for generators of one step: each image is moved towards those of its prompt's better
    half and away from the worse half (sign 1 and -1), by the force of ddpo/drift.py. Less so, towards what the base
    model draws from the same noises, and away from what the generator draws now.

    loss = sum over layers of |f / unit - sg(f / unit + force)|^2 + reference_weight |f / unit - sg(f / unit + reference
           force)|^2, each a mean over the D features f of a layer

    Published with 16 or 24 images a prompt. Deviations: theirs adds the images as they are, with a weight of 1 to
    3,000, to those that repel; there an image's copy among the better or worse ones takes part in the softmax, which
    here it does not; and its own reference force is not zero at the base model.
    """
    group, loss = terms.group, 0
    sign, itself = sign.view(-1, group), torch.eye(group, dtype=torch.bool, device=sign.device)
    ones, zeros = torch.ones_like(sign), torch.zeros_like(sign)
    for f, base in zip(terms.features, terms.base_features):
        x, base = f.view(-1, group, f.shape[-1]), base.view(-1, group, f.shape[-1])
        both = torch.cat([x, base], 1).detach()
        preference = drift(x, x, (sign > 0).float(), (sign < 0).float(), ~itself)
        reference = drift(x, both, torch.cat([zeros, ones], 1), torch.cat([ones, zeros], 1))
        for weight, (force, unit) in ((1.0, preference), (options.reference_weight, reference)):
            loss = loss + weight * mean_square((x / unit - (x / unit + force).detach()).flatten(0, 1))
    return loss, {"kl_base": terms.kl_base.detach()}


def preference_margin(error, base_error, beta):
    """How far Diffusion-DPO's implicit reward, -beta / 2 (error - base error), prefers the first image of each pair to
    the second: (B,) of denoising errors (2, B)."""
    gain = base_error - error
    return beta / 2 * (gain[0] - gain[1])


class Algorithm(NamedTuple):
    weigh: Callable
    loss: Callable
    process: str
    needs: tuple = ()
    skips_zeros: bool = False
    pairs: bool = False


ALGORITHMS = {
    "ddpo_is": Algorithm(clipped_advantage, ddpo_is, "reverse", ("old",)),
    "ddpo_sf": Algorithm(clipped_advantage, ddpo_sf, "reverse"),
    "ddpo_mask": Algorithm(clipped_advantage, ddpo_mask, "reverse", ("old",)),
    "ddpo_smooth": Algorithm(clipped_advantage, ddpo_smooth, "reverse", ("old",)),
    "rwr": Algorithm(softmax_weight, rwr, "forward"),
    "rwr_sparse": Algorithm(percentile_weight, rwr, "forward", skips_zeros=True),
    "best_of_n": Algorithm(best_weight, rwr, "forward", skips_zeros=True),
    "awm": Algorithm(clipped_advantage, awm, "forward", ("old",)),
    "nft": Algorithm(clipped_advantage, nft, "forward", ("old",)),
    "ram": Algorithm(clipped_advantage, ram, "forward", ("old", "base")),
    "drpo": Algorithm(halves, drpo, "one step", ("base",)),
    "dpo": Algorithm(best_and_worst, dpo, "forward", ("base",), skips_zeros=True, pairs=True),
}
