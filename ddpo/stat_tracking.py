"""Advantages: how much better a sample did than others that it is compared with. All have one signature:

    advantages = advantage(prompts, rewards, tracker)    N strings, (N,), PerPromptStatTracker -> (N,) float64

for the N samples of an epoch, over all processes. "Group": the samples of the epoch that share a prompt, at least
`sample.images_per_prompt` of them.
"""

from collections import deque

import numpy as np


def per_prompt(prompts, rewards, tracker):
    """(r - mean) / std over the recent rewards of the same prompt, this epoch's and earlier ones (the paper)."""
    return tracker.update(prompts, rewards)


def per_group(prompts, rewards, tracker):
    """(r - mean) / std over the group (GRPO, arXiv 2402.03300). Sums to zero in each group."""
    return _by_group(prompts, rewards, lambda r: _normalise(r, r))


def leave_one_out(prompts, rewards, tracker):
    """r - mean of the others in the group: unbiased, since a sample's baseline does not depend on it (RLOO; LOOP for
    diffusion, arXiv 2503.00897). Sums to zero in each group. Normalised by nothing: it has the reward's own unit, which
    train.advantage_clip and the learning rate have to suit."""
    return _by_group(prompts, rewards, lambda r: (r - r.mean()) * len(r) / max(len(r) - 1, 1))


def whole_epoch(prompts, rewards, tracker):
    """(r - mean) / std over the whole epoch, whatever the prompt: easy prompts then look like good samples."""
    rewards = np.asarray(rewards, dtype=np.float64)
    return _normalise(rewards, rewards)


ADVANTAGES = {
    "per_prompt": per_prompt,
    "per_group": per_group,
    "leave_one_out": leave_one_out,
    "whole_epoch": whole_epoch,
}


def _normalise(rewards, reference):
    """(r - mean) / (std + 1e-6), std that of the population."""
    return (rewards - reference.mean()) / (reference.std() + 1e-6)


def _shrink(prompt, whole, shrinkage):
    """Mean and std of a prompt's rewards, drawn towards those of the whole epoch, as if it had `shrinkage` more rewards
    that are distributed as all are."""
    share = len(prompt) / (len(prompt) + shrinkage)
    mean = share * prompt.mean() + (1 - share) * whole.mean()
    variance = share * prompt.var() + (1 - share) * whole.var()
    return mean, np.sqrt(variance)


def _by_group(prompts, rewards, function):
    prompts, rewards = np.asarray(prompts), np.asarray(rewards, dtype=np.float64)
    advantages = np.empty(len(rewards))
    for prompt in np.unique(prompts):
        advantages[prompts == prompt] = function(rewards[prompts == prompt])
    return advantages


class PerPromptStatTracker:
    """Keeps the last `buffer_size` rewards of every prompt (the paper: 32, used once 16 are there).

    A prompt that is still rare uses the statistics of the whole epoch. Two deviations from the paper, both by option.
    With `shrinkage` there is no threshold: a prompt's statistics are drawn towards the epoch's, the less the more
    rewards it has; the best value is the variance within a prompt over that between prompts. And rewards older than
    `max_age` epochs are forgotten (0: never). Where prompts outnumber samples, a buffer would otherwise compare today's
    policy with that of dozens of epochs ago, and every sample would look better than average.
    """

    def __init__(self, buffer_size, min_count, max_age=0, shrinkage=0.0):
        self.buffer_size, self.min_count, self.max_age, self.shrinkage = buffer_size, min_count, max_age, shrinkage
        self.buffers = {}  # prompt -> deque of (epoch, reward)
        self.epoch = 0

    def update(self, prompts, rewards):
        """Takes the samples of an epoch: N prompts and (N,) rewards. Returns (N,) float64 advantages.

        advantage = (reward - mean) / (std + 1e-6), std that of the population.
        """
        prompts, rewards = np.asarray(prompts), np.asarray(rewards, dtype=np.float64)
        for prompt, reward in zip(prompts.tolist(), rewards.tolist()):
            self.buffers.setdefault(prompt, deque(maxlen=self.buffer_size)).append((self.epoch, reward))
        advantages = np.empty(len(rewards))
        for prompt in np.unique(prompts).tolist():
            mine = prompts == prompt
            recent = [r for when, r in self.buffers[prompt] if not self.max_age or self.epoch - when < self.max_age]
            if self.shrinkage:
                mean, std = _shrink(np.array(recent), rewards, self.shrinkage)
                advantages[mine] = (rewards[mine] - mean) / (std + 1e-6)
            else:
                reference = np.array(recent) if len(recent) >= self.min_count else rewards
                advantages[mine] = _normalise(rewards[mine], reference)
        self.epoch += 1
        return advantages

    def state_dict(self):
        return {"epoch": self.epoch, "buffers": {prompt: list(b) for prompt, b in self.buffers.items()}}

    def load_state_dict(self, state):
        self.epoch = state["epoch"]
        self.buffers = {p: deque(map(tuple, b), maxlen=self.buffer_size) for p, b in state["buffers"].items()}
