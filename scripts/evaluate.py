"""Measures a base model and its finetuned version on the same prompts and noise: the run's own reward, and whether an
image classifier that no reward uses still names the animal.

    python -m scripts.evaluate --run runs/NAME

For runs on the common animals, alone or at their activities. Writes RUN/evaluation.json. --guidance_scale 2 asks what a
policy trained without guidance draws with it.
"""

import argparse
import json
import os

import numpy as np
import torch
from transformers import AutoModelForImageClassification

from ddpo import prompts, rewards, run_script
from scripts.sample import base_and_finetuned, open_run


@torch.no_grad()
def named_animals(images, folder):
    """The label that the classifier in `folder` gives each of B PIL images."""
    classifier = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float()
    labels = torch.cat([classifier(batch / 127.5 - 1).logits.argmax(1) for batch in pixels.split(64)])
    return [classifier.config.id2label[label] for label in labels.tolist()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="a run's folder")
    parser.add_argument("--checkpoint", default="", help="a name in RUN/checkpoints; default: the newest")
    parser.add_argument("--count", type=int, default=4, help="pictures per prompt")
    parser.add_argument("--prompts", default="", help="default: the run's")
    parser.add_argument("--seed", type=int, default=1_000_000, help="of the noise")
    parser.add_argument("--guidance_scale", type=float, default=0, help="default: the run's")
    parser.add_argument("--output", default="", help="default: RUN/evaluation.json")
    parser.add_argument("--classifier", default="models/emoji/classifier")
    args = parser.parse_args()

    config, policy, folder = open_run(args.run, args.checkpoint)
    sample = config.sample
    reward = rewards.get_reward(config.reward, policy.device, config.get("reward_options"))
    texts, metadata = zip(*prompts.get_prompts(args.prompts or config.prompts) * args.count)
    animals = [entry.get("animal", text.split()[-1]) for text, entry in zip(texts, metadata)]
    sample.guidance_scale = args.guidance_scale or sample.guidance_scale
    result = {"pictures": len(texts), "guidance_scale": sample.guidance_scale}
    for name, pictures in base_and_finetuned(policy, folder, texts, sample, args.seed):
        values, info = rewards.compute_rewards(reward, pictures, texts, metadata)
        named = named_animals(pictures, args.classifier)
        result[name] = {
            "reward_mean": float(values.mean()),
            **{key: float(value.mean()) for key, value in info.items()},
            "classifier_accuracy": float(np.mean([a == b for a, b in zip(named, animals)])),
        }
    print(json.dumps(result, indent=1))
    with open(args.output or os.path.join(args.run, "evaluation.json"), "w") as f:
        json.dump(result, f, indent=1)


if __name__ == "__main__":
    run_script(main)
