"""What it costs to sum an update's gradient over processes, beside the passes that make it: whether to overlap the two.

    torchrun --nproc-per-node 2 -m scripts.dev.gradient_sum

The embedded model on a CPU, by gloo: milliseconds of a minibatch's passes, of the sum tensor by tensor, and of that in
buckets, as ddpo/optimizer.py does it; medians. At last the latter's share of an update of config/emoji.py.
"""

import time
from statistics import median

import torch
from accelerate import Accelerator

from config.emoji import get_config
from ddpo.errors import run_script
from ddpo.optimizer import Optimizer
from ddpo.policy import load_policy
from scripts.gpu_check import Work

IMAGES = 8  # of a minibatch


def main():
    accelerator = Accelerator(cpu=True)
    torch.set_num_threads(1)
    if accelerator.is_main_process:
        print("| | tensors | MB | passes, ms | sum by tensor, ms | in buckets, ms | share |")
        print("|---|---|---|---|---|---|---|")
    for method in ("full", "lora"):
        config = get_config(f"compressibility,{method}")
        policy = load_policy(config.model, config.lora_rank, "fp32", "cpu", config.lora_targets)
        train = Work(policy, IMAGES).rollout(2)
        train(0)  # which makes the gradients
        gradients = [p.grad for p in policy.trainable_parameters()]
        in_buckets = Optimizer(policy.trainable_parameters(), config, accelerator).sum_over_processes

        def by_tensor():
            for gradient in gradients:
                accelerator.reduce(gradient, "sum")

        times = []
        for function in (lambda: train(0), by_tensor, in_buckets):
            taken = []
            for _ in range(5):
                accelerator.wait_for_everyone()
                start = time.perf_counter()
                function()
                taken.append(1e3 * (time.perf_counter() - start))
            times.append(median(taken))
        steps = round(config.sample.num_steps * config.train.timestep_fraction)
        passes = config.sample.images_per_epoch // config.train.updates_per_epoch // IMAGES * steps
        share = times[2] / (times[2] + passes / accelerator.num_processes * times[0])
        size = sum(gradient.nbytes for gradient in gradients) / 1e6
        if accelerator.is_main_process:
            print(
                f"| {method} | {len(gradients)} | {size:.1f} | {' | '.join(f'{t:.1f}' for t in times)} | {share:.1%} |"
            )


if __name__ == "__main__":
    run_script(main)
