"""The algorithms side by side. Each is one function with the same signature:

    loss, info = algorithm(log_prob, old_log_prob, advantage, config)

log_prob: (B,) log p_theta(x_{t-1} | x_t, c) of B transitions under the weights being trained, mean over dimensions;
old_log_prob: (B,) the same under the weights that sampled them; advantage: (B,) of the samples they belong to;
config: `config.train`. loss: (B,), to be averaged over all transitions of an optimizer update; info: a dict of (B,)
tensors without gradient, logged by their mean.
"""

import torch


def ddpo_is(log_prob, old_log_prob, advantage, config):
    """DDPO with importance sampling: the clipped surrogate of PPO on single denoising steps (the paper, section 4.3).

    ratio = p_theta / p_old;  loss = max(-A * ratio, -A * clip(ratio, 1 - clip_range, 1 + clip_range))
    """
    ratio = torch.exp(log_prob - old_log_prob)
    clipped = ratio.clamp(1 - config.clip_range, 1 + config.clip_range)
    loss = torch.maximum(-advantage * ratio, -advantage * clipped)
    with torch.no_grad():
        info = {
            "approx_kl": 0.5 * (log_prob - old_log_prob) ** 2,
            "clip_fraction": ((ratio - 1).abs() > config.clip_range).float(),
        }
    return loss, info


ALGORITHMS = {"ddpo_is": ddpo_is}
