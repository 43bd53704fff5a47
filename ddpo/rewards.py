"""Rewards. Each is a function

    rewards, info = reward(images, prompts, metadata)

images: B PIL images; prompts: B strings; metadata: B dicts that came with the prompts. rewards: (B,) numbers, higher is
better; info: a dict of (B,) numbers to log by their mean. To add one: write the function, add its name to REWARDS.
"""

import io
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ddpo import InputError


def jpeg_size(images):
    """(B,) sizes in kB (1000 bytes) of the images as JPEG of quality 95, Pillow's defaults otherwise (the paper)."""

    def size(image):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95)
        return buffer.tell() / 1000

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow encodes outside the interpreter lock
        return np.array(list(pool.map(size, images)), dtype=np.float32)


def jpeg_incompressibility(images, prompts, metadata):
    """Size as JPEG, in kB."""
    sizes = jpeg_size(images)
    return sizes, {"jpeg_kb": sizes}


def jpeg_compressibility(images, prompts, metadata):
    """Minus the size as JPEG, in kB."""
    sizes = jpeg_size(images)
    return -sizes, {"jpeg_kb": sizes}


REWARDS = {"jpeg_compressibility": jpeg_compressibility, "jpeg_incompressibility": jpeg_incompressibility}


def compute_rewards(reward, images, prompts, metadata, timeout=0):
    """Calls a reward and checks what it returns.

    Args:
        timeout: seconds after which a reward that has not returned is given up; 0: never.
    Returns:
        rewards (B,) float32 and info, a dict of (B,) arrays.
    Raises:
        InputError naming the reward, and the prompt where one is to blame, if the reward raises, hangs, or returns
        something else than B finite numbers and a dict.
    """
    name, count = getattr(reward, "__name__", str(reward)), len(images)
    outcome = []

    def call():
        try:
            outcome.append(reward(images, prompts, metadata))
        except Exception as error:
            outcome.append(error)

    if timeout:
        thread = threading.Thread(target=call, name="reward", daemon=True)
        thread.start()
        thread.join(timeout)
    else:
        call()
    if not outcome:
        raise InputError(f"reward {name} gave no answer for {count} images within reward_timeout = {timeout:g} seconds")
    result = outcome[0]
    if isinstance(result, Exception):
        reason = f"{type(result).__name__}: {result}"
        raise InputError(f"reward {name} raised {reason} (first of its prompts: {prompts[0]!r})") from result
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
        raise InputError(f"reward {name} must return a pair (rewards, info dict), not {type(result).__name__}")
    checked = {}
    for key, values in {"": result[0], **result[1]}.items():
        what = f"reward {name}" + (f", info {key!r}," if key else "")
        try:
            checked[key] = np.asarray(values, dtype=np.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{what} must return numbers: {error}") from error
        if checked[key].shape != (count,):
            raise InputError(f"{what} returned shape {checked[key].shape} for {count} images: it must be ({count},)")
        for prompt, value in zip(prompts, checked[key].tolist()):
            if not np.isfinite(value):
                raise InputError(f"{what} returned {value} for the prompt {prompt!r}: it must be finite")
    return checked.pop(""), checked
