"""Stateless randomness: every random number is a function of its stream's name and a few integers, such as (seed,
epoch, sample). So batch sizes, the number of processes and a resume change none of them."""

import numpy as np
import torch

STREAMS = {
    "prompt": 1,  # of a sample: (seed, epoch, sample)
    "noise": 2,  # of a sample's trajectory: (seed, epoch, sample)
    "timesteps": 3,  # that an update trains on: (seed, epoch, inner epoch, update)
    "denoising": 4,  # timestep, noise and dropout of the denoising loss: (seed, epoch, sample)
    "rater": 4,  # a simulated person's mistakes: (seed,), shorter than any key of "denoising"
    "pairs": 6,  # the order of choices: (seed, pass)
    "features": 7,  # the noise under which a UNet sees pictures: (0,)
    "split": 5,  # of choices and ratings, into those trained on and those held out: (seed,)
}


def numpy_generator(stream, *key):
    """The NumPy generator of a stream at a key of integers."""
    return np.random.default_rng((*key, STREAMS[stream]))


def torch_generator(stream, *key):
    """The torch generator of a stream at a key of integers: the CPU's, so that every device gets the same numbers."""
    sequence = np.random.SeedSequence((*key, STREAMS[stream]))
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
