"""Which samples a process draws, and which transitions make an update and a minibatch.

Sample i of an epoch belongs to optimizer update i // samples_per_update, and an update's samples are split over the
processes in order. So neither batch sizes nor the number of processes change what is computed.
"""

import numpy as np
import torch

from ddpo.errors import choose
from ddpo.seeds import numpy_generator


def own_samples(images_per_epoch, updates, rank, processes):
    """Indices, among an epoch's samples, of those that a process draws: (updates, samples of an update)."""
    return np.arange(images_per_epoch).reshape(updates, processes, -1)[:, rank]


def plan_updates(config, algorithm, epoch, advantages):
    """The minibatches of every update of an epoch, in order: a list of updates, inner epoch by inner epoch, each a list
    of (sample, step) index tensors.

    Args:
        algorithm: of ddpo/losses.py. On the reverse process each update sees all or some of its samples' steps, on the
            forward process `train.draws` of each, numbered through all inner epochs; without the samples that weigh
            nothing, if the algorithm skips those.
        advantages: (N,) of this process's samples.
    """
    options, num_steps, plan = config.train, config.sample.num_steps, []
    together = samples_together(config, algorithm)
    batch_size = max(together, options.batch_size // together * together)
    choose_steps = choose("timestep choice", options.timestep_choice, TIMESTEPS)
    for inner_epoch in range(options.inner_epochs):
        for update, samples in enumerate(torch.arange(len(advantages)).chunk(options.updates_per_epoch)):
            samples = samples.to(advantages.device)
            if algorithm.process == "forward":
                steps = inner_epoch * options.draws + np.arange(options.draws)
                if algorithm.skips_zeros:
                    kept = samples[advantages[samples] != 0]
                    samples = kept if len(kept) else samples[:2]  # every process needs a gradient to add
            else:
                generator = numpy_generator("timesteps", config.seed, epoch, inner_epoch, update)
                steps = choose_steps(generator, num_steps, trained_steps(config, algorithm.process))
            steps = torch.as_tensor(steps, device=samples.device)
            plan.append(minibatches(samples, steps, batch_size))
    return plan


def trained_steps(config, process):
    """How many transitions, or draws, of each sample an update sees."""
    if process == "forward":
        return config.train.draws
    return round(config.train.timestep_fraction * config.sample.num_steps)


def samples_together(config, algorithm):
    """How many samples, one after the other, a minibatch must not part: a pair, or all of a prompt."""
    if algorithm.process == "one step":
        return config.sample.images_per_prompt
    return 2 if algorithm.pairs else 1


def minibatches(samples, steps, batch_size):
    """All pairs of S samples and K steps, as a list of (sample, step) index tensors (B,), B <= batch_size.

    They run step by step, so that batches are composed as in sampling: rounding is then the same, and the importance
    ratio exactly 1 before any update.
    """
    sample, step = samples.repeat(len(steps)), steps.repeat_interleave(len(samples))
    return list(zip(sample.split(batch_size), step.split(batch_size)))


# Which `count` of the T steps an update trains on: rule(generator, T, count) -> their indices, rising; 0 is the
# noisiest. Deviation from ddpo-pytorch: steps are drawn per update, not per sample.


def random_steps(generator, num_steps, count):
    """Any, drawn again for each update."""
    return np.sort(generator.choice(num_steps, count, replace=False))


def window_of_steps(generator, num_steps, count):
    """Consecutive steps from a random start, drawn again for each update (after MixGRPO, arXiv 2507.21802, whose
    window slides, and which samples deterministically outside of it)."""
    return generator.integers(num_steps - count + 1) + np.arange(count)


def first_steps(generator, num_steps, count):
    """The noisiest, which decide what the image shows."""
    return np.arange(count)


TIMESTEPS = {"random": random_steps, "window": window_of_steps, "first": first_steps}
