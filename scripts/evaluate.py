"""Measures a base model and its finetuned version on the same prompts and noise.

    python -m scripts.evaluate --run runs/NAME --rewards jpeg_compressibility clipscore:models/emoji/clip

On prompts that the run has seen and on others, sampled stochastically as in training and deterministically (eta 0):
the run's own reward; rewards that it was not trained on, which is where overoptimisation shows; diversity, the mean
cosine distance between the CLIP embeddings of pictures of the same prompt; and the share of pictures in which a
classifier, which no reward uses, names the animal. --guidance_scale 2 asks what a policy trained without guidance draws
with it. Writes RUN/evaluation.json and RUN/images/evaluation.png, a row of base pictures above each row of finetuned.
"""

import argparse
import json
import os

import numpy as np
import torch
from transformers import AutoModelForImageClassification

from ddpo import InputError, prompts, rewards, run_script
from ddpo.clip import embed_images, load_clip
from ddpo.tracking import image_grid
from scripts.sample import base_and_finetuned, open_run


@torch.no_grad()
def named_animals(images, folder):
    """The label that the classifier in `folder` gives each of B PIL images."""
    classifier = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float()
    labels = torch.cat([classifier(batch / 127.5 - 1).logits.argmax(1) for batch in pixels.split(64)])
    return [classifier.config.id2label[label] for label in labels.tolist()]


def diversity(embeddings, count):
    """Mean cosine distance between two of the `count` pictures of the same prompt, whose unit embeddings (count * P, D)
    are in the order of P prompts, `count` times. With s the sum over a prompt's pictures, the mean cosine is
    (|s|^2 - count) / (count^2 - count)."""
    sums = embeddings.reshape(count, -1, embeddings.shape[-1]).sum(0)
    return float(1 - ((sums.square().sum(-1) - count) / (count**2 - count)).mean())


def choose_held_out(name, limit, seen):
    """At most `limit` (prompt, metadata) pairs of a prompt set, always the same ones, none of them among the pairs
    `seen`. Raises InputError if there are none."""
    prompts_seen = {prompt for prompt, _ in seen}
    pairs = [pair for pair in prompts.get_prompts(name) if pair[0] not in prompts_seen]
    if not pairs:
        raise InputError(f"--held_out {name}: the run has seen all of its prompts")
    chosen = np.random.default_rng(0).permutation(len(pairs))[:limit]
    return [pairs[i] for i in sorted(chosen)]


def measure(pictures, pairs, count, judges, clip, classifier):
    """{name: mean} of what is measured of PIL images, which are in the order of the (prompt, metadata) pairs, `count`
    times."""
    texts, metadata = map(list, zip(*pairs * count))
    result = {"diversity": diversity(embed_images(clip, pictures), count)}
    for name, judge in judges.items():
        values, info = rewards.compute_rewards(judge, pictures, texts, metadata)
        result |= {name: float(values.mean()), **{key: float(value.mean()) for key, value in info.items()}}
    if classifier:
        animals = [m.get("animal", text.split()[-1]) for text, m in zip(texts, metadata)]
        named = named_animals(pictures, classifier)
        result["classifier_accuracy"] = float(np.mean([a == b for a, b in zip(named, animals)]))
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="a run's folder")
    parser.add_argument("--checkpoint", default="", help="a name in RUN/checkpoints; default: the newest")
    parser.add_argument("--prompts", default="", help="those that the run has seen; default: the run's")
    parser.add_argument("--held_out", default="", help="prompt set; default: animal_activities, or else common_animals")
    parser.add_argument("--limit", type=int, default=45, help="how many held-out prompts at most")
    parser.add_argument("--count", type=int, default=4, help="pictures per prompt, at least 2")
    parser.add_argument("--rewards", nargs="*", default=[], help="beside the run's own")
    parser.add_argument("--seed", type=int, default=1_000_000, help="of the noise")
    parser.add_argument("--guidance_scale", type=float, default=0, help="default: the run's")
    parser.add_argument("--output", default="", help="default: RUN/evaluation.json")
    parser.add_argument("--clip", default="models/emoji/clip", help="whose embeddings diversity is measured by")
    parser.add_argument("--classifier", default="models/emoji/classifier", help="of animals; empty: none")
    args = parser.parse_args()
    if args.count < 2:
        raise InputError(f"--count {args.count}: diversity takes at least 2 pictures of each prompt")

    config, policy, _ = open_run(args.run, args.checkpoint)
    seen = args.prompts or config.prompts
    held_out = args.held_out or ("common_animals" if seen == "animal_activities" else "animal_activities")
    sets = {"seen": prompts.get_prompts(seen)}
    sets["held_out"] = choose_held_out(held_out, args.limit, sets["seen"])
    texts = [prompt for pairs in sets.values() for prompt, _ in pairs * args.count]
    prompts.check_length(texts, policy.pipe.tokenizer)
    options = config.get("reward_options")
    judges = {"reward_mean": rewards.get_reward(config.reward, policy.device, options)}
    judges |= {name: rewards.get_reward(name, policy.device, options) for name in args.rewards}
    clip = load_clip(args.clip, policy.device)

    sample = config.sample
    sample.guidance_scale = args.guidance_scale or sample.guidance_scale
    result = {"prompts": {"seen": seen, "held_out": held_out}, "count": args.count,
              "guidance_scale": sample.guidance_scale}  # fmt: skip
    columns, rows = min(8, *map(len, sets.values())), {}
    for sampling, eta in (("stochastic", sample.eta), ("deterministic", 0.0)):
        _, policy, folder = open_run(args.run, args.checkpoint)  # anew: the last one has been finetuned
        sample.eta = eta
        for name, pictures in base_and_finetuned(policy, folder, texts, sample, args.seed):
            first = 0
            for kind, pairs in sets.items():
                part = pictures[first : first + len(pairs) * args.count]
                first += len(part)
                measured = measure(part, pairs, args.count, judges, clip, args.classifier)
                result.setdefault(f"{kind}, {sampling}", {})[name] = measured
                rows[f"{kind}, {sampling}", name] = part[:columns]
    labels = [text for section, name in sorted(rows) for text in [f"{name}: {section}"] + [""] * (columns - 1)]
    grid = image_grid([picture for row in sorted(rows) for picture in rows[row]], labels, columns)
    grid.save(os.path.join(args.run, "images", "evaluation.png"))
    print(json.dumps(result, indent=1))
    with open(args.output or os.path.join(args.run, "evaluation.json"), "w") as f:
        json.dump(result, f, indent=1)


if __name__ == "__main__":
    run_script(main)
