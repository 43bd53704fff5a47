"""trl 0.23.1's DDPOTrainer under `scripts.dev.bench`, which runs this in an environment of its own: an epoch, a JSON
line, and so on once a line of input comes.

    runs/bench/trl/bin/python -m scripts.dev.bench_trl '{"model": "models/emoji", ...}'

Its trainer is used as its examples use it. Its parts are timed by wrapping the two methods that sample and score.
"""

import argparse
import itertools
import json
import random
import resource
import sys
import time

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image

from ddpo.errors import InputError, run_script
from ddpo.prompts import get_prompts
from ddpo.rewards import REWARDS

PASSED_ON = ("train.learning_rate", "train.clip_range")  # where the bench keeps trl's defaults


def make_trainer(options):
    """trl's trainer and its pipeline, with options by the names of config/base.py; others keep trl's defaults."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        torch.set_num_threads(options["threads"])
    PartialState(cpu=not on_gpu)  # its pipeline logs before its trainer has made one
    try:
        from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
    except ImportError as error:
        raise InputError(f"trl 0.23.1 is not installed here ({error})") from error

    per_update = options["sample.images_per_epoch"] // options["train.updates_per_epoch"]
    config = DDPOConfig(
        mixed_precision={"bf16": "bf16", "fp16": "fp16"}.get(options["precision"], "no"),
        allow_tf32=options["precision"] != "fp32",
        project_kwargs={"project_dir": options["run_dir"]},
        sample_num_steps=options["sample.num_steps"],
        sample_guidance_scale=options["sample.guidance_scale"],
        sample_batch_size=options["sample.batch_size"],
        sample_num_batches_per_epoch=options["sample.images_per_epoch"] // options["sample.batch_size"],
        train_batch_size=options["train.batch_size"],
        train_gradient_accumulation_steps=per_update // options["train.batch_size"],
        per_prompt_stat_tracking=True,
        per_prompt_stat_tracking_buffer_size=32,
        save_freq=10**9,
        seed=options.get("seed", 0),
        **{ours.replace(".", "_"): options[ours] for ours in PASSED_ON if ours in options},
    )
    prompts, reward = get_prompts(options["prompts"]), REWARDS[options["reward"]]
    rng = random.Random(options.get("seed", 0))

    def reward_fn(images, prompts, metadata):
        """Its images are tensors (B, 3, H, W) in 0..1."""
        arrays = (images * 255).round().clamp(0, 255).to(torch.uint8).cpu().permute(0, 2, 3, 1).numpy()
        values, _ = reward([Image.fromarray(a) for a in arrays], prompts, metadata)
        return torch.as_tensor(np.asarray(values)), {}

    pipeline = DefaultDDPOStableDiffusionPipeline(options["model"], use_lora=options["lora_rank"] > 0)
    return DDPOTrainer(config, reward_fn, lambda: rng.choice(prompts), pipeline), pipeline


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("options", type=json.loads, help="JSON: {dotted name of an option: its value}")
    options = parser.parse_args().options
    on_gpu, seconds = torch.cuda.is_available(), {}

    def timed(method, part):
        def wrapped(*args, **kwargs):
            start = time.perf_counter()
            result = method(*args, **kwargs)
            if on_gpu:
                torch.cuda.synchronize()
            seconds[part] = time.perf_counter() - start
            return result

        return wrapped

    trainer, pipeline = make_trainer(options)
    trainer._generate_samples = timed(trainer._generate_samples, "seconds_sampling")
    trainer.compute_rewards = timed(trainer.compute_rewards, "seconds_rewards")
    passes = []  # sizes of the UNet's batches: what is compared must be the same arithmetic
    pipeline.unet.register_forward_pre_hook(lambda _, inputs: passes.append((torch.is_grad_enabled(), len(inputs[0]))))

    step = 0
    for epoch in itertools.count():
        passes.clear()
        start, cpu_start = time.perf_counter(), time.process_time()
        step = trainer.step(epoch, step)
        if on_gpu:
            torch.cuda.synchronize()
        total = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0
        metrics = {
            "epoch": epoch, "seconds": total, "cpu_seconds": time.process_time() - cpu_start, **seconds,
            "seconds_training": total - sum(seconds.values()),
            "peak_memory_gb": peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
            "sampled_rows": sum(size for grad, size in passes if not grad),
            "trained_rows": sum(size for grad, size in passes if grad),
        }  # fmt: skip
        print(json.dumps(metrics), flush=True)
        if not sys.stdin.readline():
            return


if __name__ == "__main__":
    run_script(main)
