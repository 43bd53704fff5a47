"""Advantages per prompt: rewards normalised by the recent rewards of the same prompt."""

from collections import deque

import numpy as np


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
            advantages[mine] = (rewards[mine] - reference.mean()) / (reference.std() + 1e-6)
        self.round += 1
        return advantages

    def state_dict(self):
        return {"round": self.round, "buffers": {prompt: list(b) for prompt, b in self.buffers.items()}}

    def load_state_dict(self, state):
        self.round = state["round"]
        self.buffers = {p: deque(map(tuple, b), maxlen=self.buffer_size) for p, b in state["buffers"].items()}
