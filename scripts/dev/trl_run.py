"""A run of trl 0.23.1's DDPOTrainer under `scripts.time_to_reward`, which runs this in an environment of its own. It
writes metrics.jsonl and evaluation.jsonl as train.py does; the same code judges it, on the same prompts and noise."""

import json
import sys
import time
from pathlib import Path

import torch

from config.base import get_config
from ddpo.evaluation import choose_prompts, evaluate, load_classifier
from ddpo.policy import load_policy
from ddpo.prompts import get_prompts
from ddpo.rewards import REWARDS
from scripts.dev.bench_trl import make_trainer


def main(options):
    folder = Path(options["run_dir"])
    for name in ("metrics", "evaluation"):  # a run that was cut off begins anew
        (folder / f"{name}.jsonl").unlink(missing_ok=True)
    trainer, pipeline = make_trainer(options)
    judge = load_policy(options["model"], 0, "fp32", "cpu")  # whose UNet is trl's while it judges
    judge.set_timesteps(options["sample.num_steps"])
    classifier = load_classifier(str(Path(options["model"], "classifier")))
    pairs = choose_prompts(get_prompts(options["prompts"]), options["evaluate.limit"])
    sample = get_config().sample
    sample.guidance_scale, sample.num_steps = options["sample.guidance_scale"], options["sample.num_steps"]
    sample.batch_size = 16
    passes = []
    pipeline.unet.register_forward_pre_hook(
        lambda _, inputs: passes.append(len(inputs[0]) * (3 if torch.is_grad_enabled() else 1))
    )

    def log(name, line):
        with open(folder / f"{name}.jsonl", "a") as f:
            f.write(json.dumps(line) + "\n")

    def judged(epoch):
        own, judge.denoiser = judge.denoiser, pipeline.unet.eval()
        rewards = {"reward_mean": REWARDS[options["reward"]]}
        log("evaluation", {"epoch": epoch, **evaluate(
            judge, {"seen": pairs}, options["evaluate.count"], rewards, sample, classifier=classifier
        )[0]})  # fmt: skip
        judge.denoiser = own

    judged(0)
    step = 0
    for epoch in range(options["num_epochs"]):
        passes.clear()
        start, cpu_start = time.perf_counter(), time.process_time()
        step = trainer.step(epoch, step)
        log("metrics", {
            "epoch": epoch, "seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start,
            "reward_queries": (epoch + 1) * options["sample.images_per_epoch"], "network_passes": sum(passes),
        })  # fmt: skip
        if (epoch + 1) % options["evaluate.every"] == 0:
            judged(epoch + 1)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
