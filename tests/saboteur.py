"""train.py with one thing broken, which the environment variable SABOTAGE names; for the tests of what it does then."""

import os
import runpy
import signal
import sys
import threading
import time
import zlib

import numpy as np
import torch

sys.path.insert(0, ".")
from ddpo import rewards  # noqa: E402

SABOTAGE, RANK = os.environ["SABOTAGE"], int(os.environ.get("RANK", "0"))
IS_LAST_RANK = RANK == int(os.environ.get("WORLD_SIZE", "1")) - 1


def raises(images, prompts, metadata):
    raise ZeroDivisionError("oh no")


def hangs(images, prompts, metadata):
    time.sleep(1000)


def slow(images, prompts, metadata):
    time.sleep(0.5)
    return rewards.jpeg_compressibility(images, prompts, metadata)


def interrupts(images, prompts, metadata):
    os.kill(os.getpid(), signal.SIGTERM)
    return by_prompt(images, prompts, metadata)


def by_prompt(images, prompts, metadata):
    """Does not look at the image, so that no pixel's rounding matters."""
    return [zlib.crc32(prompt.encode()) % 97 for prompt in prompts], {}


def fails_later(images, prompts, metadata):
    """In the second epoch of SMALL's two batches."""
    fails_later.calls += 1
    if fails_later.calls > 2:
        raise ConnectionError("the server is gone")
    return by_prompt(images, prompts, metadata)


fails_later.calls = 0
REWARDS = {
    "one NaN": lambda images, prompts, metadata: (np.where(np.arange(len(images)) == 3, np.nan, 1.0), {}),
    "all NaN": lambda images, prompts, metadata: (np.full(len(images), np.nan), {}),
    "infinite": lambda images, prompts, metadata: (np.full(len(images), np.inf), {}),
    "too few": lambda images, prompts, metadata: (np.zeros(len(images) - 1), {}),
    "not a pair": lambda images, prompts, metadata: [1.0] * len(images),
    "text": lambda images, prompts, metadata: (["good"] * len(images), {}),
    "constant": lambda images, prompts, metadata: (np.full(len(images), 3.0), {}),
    "raises": raises, "hangs": hangs, "slow": slow, "interrupts": interrupts, "by prompt": by_prompt,
    "fails later": fails_later, "fails later on rank 1": fails_later if RANK else by_prompt,
}  # fmt: skip

if SABOTAGE in REWARDS:
    rewards.REWARDS["sabotaged"] = REWARDS[SABOTAGE]
elif SABOTAGE == "scores come late":  # as on a GPU; and the first of two batches only after the second was sampled
    submitted, start, put = threading.Semaphore(0), rewards.RewardQueue.__init__, rewards.RewardQueue.put

    def late(images, prompts, metadata):
        late.calls += 1
        if late.calls % 2 and not all(submitted.acquire(timeout=60) for _ in range(2)):
            raise TimeoutError("the second batch is not sampled while the first is scored")
        return by_prompt(images, prompts, metadata)

    def start_as_on_a_gpu(self, *arguments):
        start(self, *arguments)
        self._wait = False

    def put_and_tell(self, *arguments):
        put(self, *arguments)
        submitted.release()

    late.calls = 0
    rewards.RewardQueue.__init__, rewards.RewardQueue.put = start_as_on_a_gpu, put_and_tell
    rewards.REWARDS["sabotaged"] = late
elif SABOTAGE == "is killed later":  # between the second epoch's two updates; in one process of several
    rewards.REWARDS["sabotaged"], step, steps = by_prompt, torch.optim.AdamW.step, []

    def step_or_die(self, *args, **kwargs):
        step(self, *args, **kwargs)
        steps.append(1)
        if len(steps) == 3 and IS_LAST_RANK:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.optim.AdamW.step = step_or_die
elif SABOTAGE == "ranks drift apart" and RANK == 1:
    step = torch.optim.AdamW.step

    def drift(self, *args, **kwargs):
        step(self, *args, **kwargs)
        weight = self.param_groups[0]["params"][0]
        weight.data.view(torch.int32).view(-1)[0] += 1  # one bit of one weight

    torch.optim.AdamW.step = drift
elif SABOTAGE == "the gradient is not finite":
    from ddpo import losses

    def not_finite(terms, advantages, options):
        loss, info = losses.ddpo_is(terms, advantages, options)
        return loss * torch.where((advantages == advantages.max()) & IS_LAST_RANK, torch.inf, 1.0), info

    losses.ALGORITHMS["not_finite"] = losses.ALGORITHMS["ddpo_is"]._replace(loss=not_finite)
elif SABOTAGE == "training has dropout":
    from ddpo import likelihood

    predict = likelihood.predict_noise
    likelihood.predict_noise = lambda *args: predict(*args) * 1.02
elif SABOTAGE.startswith("memory for "):  # so many rows in a forward pass
    from ddpo.policy import Policy

    forward, passes = Policy.forward, []

    def limited(self, latents, *args):
        passes.append(len(latents))
        if len(latents) > int(SABOTAGE.split()[2]) or (SABOTAGE.endswith("then less") and len(passes) > 8):
            if "cuBLAS" in SABOTAGE:
                raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, latents, *args)

    Policy.forward = limited
elif SABOTAGE == "the tracker breaks later":
    from accelerate import Accelerator

    def log(self, *args, **kwargs):
        raise ConnectionError("the server is gone")

    Accelerator.log = log
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
