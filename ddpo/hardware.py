"""What the hardware allows: CPU threads, batch sizes that fit into memory, the memory used."""

import gc
import os
import sys

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from ddpo.errors import InputError
from ddpo.pipeline_logprob import decode, predict_noise

# A CPU gains nothing from batches of more latent pixels than this (one image of Stable Diffusion, 16 of the embedded
# model), see results/bench. A GPU is filled except for this share of its free memory, for rewards and fragmentation.
CPU_LATENT_PIXELS = 64 * 64
GPU_SPARE = 0.1
# How CUDA's libraries say that they are out of memory, some without the words: cuBLAS when its workspace does not fit,
# cuDNN when the workspace of no algorithm does.
OUT_OF_MEMORY = (
    "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED", "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", "CUSOLVER_STATUS_ALLOC_FAILED",
    "unable to find an engine to execute", "Unable to find a valid cuDNN algorithm",
)  # fmt: skip


def out_of_memory(error):
    """Whether an exception says that the device's memory did not suffice."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


def cpu_cores():
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def use_cpu(threads, processes):
    """Sets this process's CPU threads (0: cores / processes) and returns them. `accelerate launch` allows one, and more
    than cores / processes would be far slower."""
    threads = threads or max(1, cpu_cores() // processes)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    return threads


def fit_batch_sizes(policy, config, updates, share, kept):
    """Batch sizes with which a step of sampling and one of training fit into memory, which is tried.

    A size of 0 becomes the other one; where both are 0, or the given ones do not fit, both become the largest divisor
    of `share` that fits, so that training composes its batches as sampling does. On a CPU, which has no out-of-memory
    error, given sizes are not tried. All processes get the same.

    Args:
        updates: of an inner epoch. share: samples that a process has in each.
        kept: latents that are kept of each (`likelihood.latents_kept`).
    Returns:
        sample.batch_size, train.batch_size.
    Raises:
        InputError if not even a single sample fits.
    """
    if policy.sharding:  # a process that runs out of memory would leave the others waiting
        if 0 in (config.sample.batch_size, config.train.batch_size):
            raise InputError("with FSDP no batch sizes are tried: give --config.sample.batch_size and train.batch_size")
        return config.sample.batch_size, config.train.batch_size
    given = [size for size in (config.sample.batch_size, config.train.batch_size) if size]
    on_cpu, noise_shape = policy.device.type == "cpu", policy.noise_shape(config.sample)
    if len(given) == 2 and on_cpu:
        return tuple(given)
    most = max(1, CPU_LATENT_PIXELS // (noise_shape[-2] * noise_shape[-1])) if on_cpu else share
    equal = [(size, size) for size in range(min(given, default=most), 0, -1) if share % size == 0]
    tried = [(given[0], given[-1]), *(sizes for sizes in equal if sizes != (given[0], given[-1]))] if given else equal
    for sizes in tried:
        if _fits(policy, config, updates * share, kept, *sizes):
            break
        print(f"out of memory with sample.batch_size = {sizes[0]} and train.batch_size = {sizes[1]}", flush=True)
    else:
        raise InputError(
            "out of memory with one image: --config.train.gradient_checkpointing=True, --config.precision=bf16, a LoRA "
            "(--config.lora_rank=4), smaller images (--config.sample.height, width) and fewer images "
            "(--config.sample.images_per_epoch) need less"
        )
    if policy.device.type == "cuda":  # the trials are not the run's
        torch.cuda.reset_peak_memory_stats(policy.device)
    sizes = min(gather_object([sizes]))
    if sizes != (config.sample.batch_size, config.train.batch_size):
        PartialState().print(f"batch sizes: {sizes[0]} images when sampling, {sizes[1]} transitions when training")
    return sizes


def _fits(policy, config, count, kept, sampled, trained):
    """Whether there is memory for a sampling step, a decoding, and a step of training, beside what a run holds
    meanwhile: `kept` latents of `count` samples and the optimizer's two moments (gradients come with the step)."""
    held, empty, guidance = [], policy.embed([""]), config.sample.guidance_scale
    noise_shape, parameters = policy.noise_shape(config.sample), policy.trainable_parameters()

    def output(size):
        t = policy.scheduler.timesteps[:1].to(policy.device).expand(size)
        latents = torch.zeros(size, *noise_shape[1:], device=policy.device)
        return predict_noise(policy, latents, t, empty.expand(size), empty, guidance)

    try:
        held += [torch.empty_like(p) for p in parameters for _ in range(2)]
        held += [torch.empty(count, kept, *noise_shape[1:], device=policy.device)]
        if policy.device.type == "cuda":
            spare = int(GPU_SPARE * torch.cuda.mem_get_info(policy.device)[0])  # of what other programs leave, too
            held += [torch.empty(spare, dtype=torch.uint8, device=policy.device)]
        with torch.set_grad_enabled(config.compile):  # see Policy.forward
            latents = output(sampled).detach()
        with torch.no_grad():
            decode(policy, latents)
        output(trained).square().mean().backward()
        return True
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return False
    finally:
        for p in parameters:
            p.grad = None
        held.clear()
        gc.collect()  # the traceback of an error holds the network's activations
        if policy.device.type == "cuda":
            torch.cuda.empty_cache()


def peak_memory_gb(device):
    """Most memory (1e9 bytes) that this process's tensors held on its GPU since the last call; on a CPU the most that
    the process ever held (0: not known)."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
