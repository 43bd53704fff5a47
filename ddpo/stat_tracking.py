"""Advantages: how much better a sample did than others that it is compared with. All have one signature:

    advantages = advantage(prompts, rewards, tracker)    N strings, (N,), PerPromptStatTracker -> (N,) float64

for one round of N samples, over all processes. "Group": the samples of the round that share a prompt, at least
`sample.images_per_prompt` of them.
"""

from collections import deque

import numpy as np


def per_prompt(prompts, rewards, tracker):
    """(r - mean) / std over the recent rewards of the same prompt, this round's and earlier ones (the paper)."""
    return tracker.update(prompts, rewards)


def per_group(prompts, rewards, tracker):
    """(r - mean) / std over the group (GRPO, arXiv 2402.03300). Sums to zero in each group."""
    return _by_group(prompts, rewards, lambda r: _normalise(r, r))


def leave_one_out(prompts, rewards, tracker):
    """r - mean of the others in the group: unbiased, since a sample's baseline does not depend on it (RLOO; LOOP for
    diffusion, arXiv 2503.00897). Sums to zero in each group. Normalised by nothing: it has the reward's own unit, which
    train.advantage_clip and the learning rate have to suit."""
    return _by_group(prompts, rewards, lambda r: (r - r.mean()) * len(r) / max(len(r) - 1, 1))


def whole_round(prompts, rewards, tracker):
    """(r - mean) / std over the whole round, whatever the prompt: easy prompts then look like good samples."""
    rewards = np.asarray(rewards, dtype=np.float64)
    return _normalise(rewards, rewards)


ADVANTAGES = {
    "per_prompt": per_prompt,
    "per_group": per_group,
    "leave_one_out": leave_one_out,
    "whole_round": whole_round,
}


def _normalise(rewards, reference):
    """(r - mean) / (std + 1e-6), std that of the population."""
    return (rewards - reference.mean()) / (reference.std() + 1e-6)


def _by_group(prompts, rewards, function):
    prompts, rewards = np.asarray(prompts), np.asarray(rewards, dtype=np.float64)
    advantages = np.empty(len(rewards))
    for prompt in np.unique(prompts):
        advantages[prompts == prompt] = function(rewards[prompts == prompt])
    return advantages


class PerPromptStatTracker:
    """Keeps the last `buffer_size` rewards of every prompt (the paper: 32, used once 16 are there).

    A prompt that is still rare uses the statistics of the whole round. Deviation from the paper: rewards older than
    `max_age` rounds are forgotten (0: never). When prompts outnumber samples, a buffer would else compare today's
    policy with the one of dozens of rounds ago, and everything would look like progress.
    """

    def __init__(self, buffer_size, min_count, max_age=0):
        self.buffer_size, self.min_count, self.max_age = buffer_size, min_count, max_age
        self.buffers = {}  # prompt -> deque of (round, reward)
        self.round = 0

    def update(self, prompts, rewards):
        """Takes one round of samples: B prompts and (B,) rewards. Returns (B,) float64 advantages.

        advantage = (reward - mean) / (std + 1e-6), std that of the population.
        """
        prompts, rewards = np.asarray(prompts), np.asarray(rewards, dtype=np.float64)
        for prompt, reward in zip(prompts.tolist(), rewards.tolist()):
            self.buffers.setdefault(prompt, deque(maxlen=self.buffer_size)).append((self.round, reward))
        advantages = np.empty(len(rewards))
        for prompt in np.unique(prompts).tolist():
            mine = prompts == prompt
            recent = [r for when, r in self.buffers[prompt] if not self.max_age or self.round - when < self.max_age]
            reference = np.array(recent) if len(recent) >= self.min_count else rewards
            advantages[mine] = _normalise(rewards[mine], reference)
        self.round += 1
        return advantages

    def state_dict(self):
        return {"round": self.round, "buffers": {prompt: list(b) for prompt, b in self.buffers.items()}}

    def load_state_dict(self, state):
        self.round = state["round"]
        self.buffers = {p: deque(map(tuple, b), maxlen=self.buffer_size) for p, b in state["buffers"].items()}
