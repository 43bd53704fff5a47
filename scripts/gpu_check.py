"""Measures on this machine what can only be computed elsewhere, and writes one JSON to be attached to an issue:

    python -m scripts.gpu_check --output gpu_check.json

Random weights of Stable Diffusion 1.5's size (--size), since speed and memory do not depend on their values. In about
six minutes on an H100: its ceilings; |ratio - 1| before any update, per precision and attention backend; and per
denoising step and training pass milliseconds, kernels, waits for the device, memory, and the share of the matrix
ceiling, at several batch sizes; --compile adds torch.compile. Every section is printed and saved as soon as it is
there; one that fails says why and the others go on. Without a GPU it runs to its end with --size tiny, which shows no
more than that it runs.
"""

import argparse
import contextlib
import json
import tempfile
import time
import warnings

import diffusers
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from config.base import get_config
from ddpo.errors import InputError, at_least, check_output, run_script
from ddpo.hardware import peak_memory_gb
from ddpo.likelihood import Rollout
from ddpo.losses import ALGORITHMS
from ddpo.pipeline_logprob import draw_noise, sample_with_logprob
from ddpo.policy import load_policy
from scripts.make_random_model import SIZES, make_random_model
from scripts.provenance import commit, processor

BACKENDS = {
    "default": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
STEPS = (2, 6)  # denoising steps of the two runs whose difference gives the cost of one
REPEATS = 3


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function, device):
    """Of the fastest of REPEATS calls, after one to warm up."""
    function()
    taken = []
    for _ in range(REPEATS):
        synchronise(device)
        start = time.perf_counter()
        function()
        synchronise(device)
        taken.append(time.perf_counter() - start)
    return min(taken)


def ceilings(device):
    """TFLOP/s of a large matrix product per precision, and GB/s of a copy, bytes read and written."""
    n = 8192 if device.type == "cuda" else 512
    result = {}
    for name, dtype, tf32 in (("bf16", torch.bfloat16, 0), ("tf32", torch.float32, 1), ("fp32", torch.float32, 0)):
        torch.backends.cuda.matmul.allow_tf32 = bool(tf32)
        a, b = torch.randn(2, n, n, device=device, dtype=dtype)
        result[f"{name}_tflops"] = 2 * n**3 / seconds(lambda a=a, b=b: a @ b, device) / 1e12
    torch.backends.cuda.matmul.allow_tf32 = False
    source = torch.randn(2**28 if device.type == "cuda" else 2**22, device=device)
    target = torch.empty_like(source)
    result["copy_gb_s"] = 2 * source.nbytes / seconds(lambda: target.copy_(source), device) / 1e9
    return result


class Work:
    """Sampling and training of `batch_size` pictures by a policy, as train.py does both."""

    def __init__(self, policy, batch_size):
        self.policy, self.batch_size, self.config = policy, batch_size, get_config()
        self.prompts = [f"a picture of {i}" for i in range(batch_size)]

    def sample(self, steps):
        """Trajectories of so many steps, and the pictures decoded."""
        self.policy.set_timesteps(steps)
        shape = (steps + 1, *self.policy.latent_shape())
        return sample_with_logprob(
            self.policy, self.prompts, lambda i: draw_noise(shape, 0, 0, i), self.config.sample.guidance_scale,
            self.policy.noise_level(self.config.sample), keep_steps=True,
        )  # fmt: skip

    def rollout(self, steps):
        """A function of a step that trains on it, adding to the gradients, and returns |ratio - 1| (B,)."""
        algorithm = ALGORITHMS["ddpo_is"]
        everyone = torch.arange(self.batch_size, device=self.policy.device)
        trajectories = self.sample(steps)
        rollout = Rollout(self.policy, self.config, algorithm, 0, everyone.tolist(), self.prompts, trajectories)
        advantages = torch.linspace(-1, 1, self.batch_size, device=self.policy.device)

        def train(step):
            terms = rollout.score(everyone, torch.full_like(everyone, step))
            loss, _ = algorithm.loss(terms, advantages, self.config.train)
            (loss.sum() / self.batch_size).backward()
            return terms.ratio_error()

        return train


def exactness(load, batch_size):
    """The largest |ratio - 1| before any update, over the steps of a batch, per precision and attention backend."""
    result = {}
    for precision in ("fp32", "tf32", "bf16", "fp16"):
        policy = load(4, precision)
        forward = policy.forward
        for name, backend in BACKENDS.items():

            def with_backend(*inputs, backend=backend, forward=forward):  # of the UNet alone
                with sdpa_kernel(backend) if backend is not None else contextlib.nullcontext():
                    return forward(*inputs)

            policy.forward = with_backend
            try:
                train = Work(policy, batch_size).rollout(STEPS[1])
                errors = torch.stack([train(step) for step in range(STEPS[1])])
            except RuntimeError as error:
                result[f"{precision}, {name}"] = f"not available: {str(error).splitlines()[0]}"
                continue
            result[f"{precision}, {name}"] = float(errors.max()) if errors.isfinite().all() else "not finite"
    return result


def count_waits(function):
    """How often `function` waits for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def profile_kernels(function):
    """(kernels, their milliseconds, the ten names that take longest) of a call."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    by_name = {}
    for event in kernels:
        by_name[event.name[:80]] = by_name.get(event.name[:80], 0) + event.device_time / 1e3
    longest = dict(sorted(by_name.items(), key=lambda item: -item[1])[:10])
    return len(kernels), sum(by_name.values()), longest


def per_step(few, many):
    """Of a denoising step, from the totals of STEPS of them."""
    return (many - few) / (STEPS[1] - STEPS[0])


def cost(policy, batch_size, details=False):
    """What a denoising step and a training pass of `batch_size` pictures cost, both guided; pictures a second of as
    many steps as config/base.py has, all of them trained on. details: kernels, waits and FLOPs too."""
    device, work = policy.device, Work(policy, batch_size)
    work.sample(STEPS[0])
    peak_memory_gb(device)  # of this batch size alone from here on
    samples = [lambda n=n: work.sample(n) for n in STEPS]
    few, many = (1e3 * seconds(sample, device) for sample in samples)
    result = {"sample_ms": per_step(few, many)}
    result["decode_ms"] = few - STEPS[0] * result["sample_ms"]
    train = work.rollout(STEPS[0])
    result["train_ms"] = 1e3 * seconds(lambda: train(0), device)
    result["memory_gb"] = peak_memory_gb(device)
    total_ms = work.config.sample.num_steps * (result["sample_ms"] + result["train_ms"]) + result["decode_ms"]
    result["images_per_second"] = 1e3 * batch_size / total_ms
    if details:
        counter = FlopCounterMode(display=False)
        with counter:
            train(0)
        result["train_tflop"] = counter.get_total_flops() / 1e12
        result["train_tflops"] = result["train_tflop"] / result["train_ms"] * 1e3
        if device.type == "cuda":
            result["sample_waits"] = per_step(*map(count_waits, samples))
            result["train_waits"] = count_waits(lambda: train(0))
            counts, milliseconds, _ = zip(*map(profile_kernels, samples))
            result |= {"sample_kernels": per_step(*counts), "sample_kernel_ms": per_step(*milliseconds)}
            kernels = profile_kernels(lambda: train(0))
            result |= dict(zip(("train_kernels", "train_kernel_ms", "train_longest_ms"), kernels))
    for p in policy.trainable_parameters():
        p.grad = None
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="sd15", choices=SIZES)
    parser.add_argument("--batch_sizes", type=at_least(1), nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too; minutes")
    parser.add_argument("--output", default="gpu_check.json")
    args = parser.parse_args()
    check_output(args.output)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.size.startswith("tiny"):
        raise InputError(f"no GPU: {args.size} would take hours here, --size tiny shows that this script runs")
    middle = min(args.batch_sizes, key=lambda size: abs(size - 8))
    result = {
        "device": processor(), "commit": commit(), "size": args.size, "torch": torch.__version__,
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "diffusers": diffusers.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    print(json.dumps(result, indent=1), flush=True)

    def section(name, function):
        start = time.perf_counter()
        try:
            result[name] = function()
        except (RuntimeError, InputError) as error:  # out of memory, an unsupported operation: the rest is worth having
            result[name] = f"failed: {str(error).splitlines()[0]}"
        print(f"{name} ({time.perf_counter() - start:.0f} s): {json.dumps(result[name], indent=1)}", flush=True)
        with open(args.output, "w") as f:
            json.dump(result, f, indent=1)
        if device.type == "cuda":
            torch.cuda.empty_cache()

    section("ceilings", lambda: ceilings(device))
    with tempfile.TemporaryDirectory() as folder:
        make_random_model(args.size, folder)

        def load(lora_rank, precision):
            return load_policy(folder, lora_rank, precision, device)

        section("ratio_error", lambda: exactness(load, min(4, middle)))
        for name, rank, precision in (
            ("LoRA 4, bf16", 4, "bf16"),
            ("full, bf16", 0, "bf16"),
            ("full, fp32", 0, "fp32"),
        ):
            policy = load(rank, precision)
            for size in args.batch_sizes if rank else [middle]:
                details = size == middle
                section(f"{name}, batch {size}", lambda p=policy, s=size, d=details: cost(p, s, details=d))
            policy = None
        if args.compile:

            def compiled():
                policy = load(4, "bf16")
                policy.compile(2 * middle)
                return cost(policy, middle)

            section(f"LoRA 4, bf16, compiled, batch {middle}", compiled)


if __name__ == "__main__":
    run_script(main)
