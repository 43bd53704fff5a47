"""Draws a base model and a finetuned one side by side, on the same prompts and noise.

    python -m scripts.sample --run runs/NAME --prompts "a cat" "a dog riding a bike" --count 4

Writes the grid to RUN/images/samples.png (or --output): a row per prompt and model, base above finetuned.
"""

import argparse
import json
import os

import torch
from ml_collections import ConfigDict

from ddpo import prompts
from ddpo.checkpoint import list_checkpoints
from ddpo.errors import InputError, at_least, run_script
from ddpo.images import image_grid
from ddpo.pipeline_logprob import sample_with_logprob
from ddpo.policy import load_policy, load_weights


def open_run(run, checkpoint=""):
    """The config of a run, its policy as it was before training, and the folder of its newest or a named checkpoint:
    `load_weights(policy, folder)` makes it the finetuned one."""
    try:
        with open(os.path.join(run, "config.json")) as f:
            config = ConfigDict(json.load(f))
    except OSError as error:
        raise InputError(f"{run!r} is not a run: it has no config.json") from error
    folders = {os.path.basename(folder): folder for folder in list_checkpoints(run)}
    if checkpoint and checkpoint not in folders:
        raise InputError(f"{run} has no checkpoint {checkpoint!r}: there is {', '.join(folders) or 'none'}")
    if not folders:
        raise InputError(f"{run} has no checkpoint yet")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # A new LoRA adds nothing, so this is the base model.
    policy = load_policy(config.model, config.lora_rank, config.precision, device, config.lora_targets)
    return config, policy, folders[checkpoint] if checkpoint else list_checkpoints(run)[-1]


def base_and_finetuned(policy, folder, texts, sample, seed):
    """Draws one picture per text, by the policy as it is and then with the weights in `folder`: ("base", PIL images),
    ("finetuned", PIL images). The noise of picture i is that of generator seed + i, `sample` a run's config.sample."""
    policy.set_timesteps(sample.num_steps)
    shape = policy.noise_shape(sample)

    def noise(i):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed + i))

    for name in ("base", "finetuned"):
        if name == "finetuned":
            load_weights(policy, folder)
        options = (sample.guidance_scale, sample.eta, sample.batch_size)
        yield name, sample_with_logprob(policy, texts, noise, *options, progress=name).images


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="a run's folder")
    parser.add_argument("--checkpoint", default="", help="a name in RUN/checkpoints; default: the newest")
    parser.add_argument("--prompts", nargs="+", default=["a cat", "a dog", "a horse", "a butterfly"])
    parser.add_argument("--count", type=at_least(1), default=8, help="pictures per prompt")
    parser.add_argument("--steps", type=at_least(0), default=0, help="denoising steps; default: the run's")
    parser.add_argument("--guidance_scale", type=at_least(0, float), default=0, help="default: the run's")
    parser.add_argument("--eta", type=at_least(-1, float), default=-1, help="0: deterministic; default: the run's")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the noise")
    parser.add_argument("--output", default="", help="default: RUN/images/samples.png")
    args = parser.parse_args()

    config, policy, folder = open_run(args.run, args.checkpoint)
    sample = config.sample
    sample.num_steps = args.steps or sample.num_steps
    sample.guidance_scale = args.guidance_scale or sample.guidance_scale
    sample.eta = sample.eta if args.eta < 0 else args.eta
    prompts.check_length(args.prompts, policy.pipe.tokenizer)
    texts = [prompt for prompt in args.prompts for _ in range(args.count)]
    pictures = dict(base_and_finetuned(policy, folder, texts, sample, args.seed * 10**6))
    images, labels = [], []
    for row in range(len(args.prompts)):
        for name, drawn in pictures.items():
            images += drawn[row * args.count : (row + 1) * args.count]
            labels += [f"{name}: {args.prompts[row]}"] + [""] * (args.count - 1)
    output = args.output or os.path.join(args.run, "images", "samples.png")
    image_grid(images, labels, columns=args.count).save(output)
    print(output)


if __name__ == "__main__":
    run_script(main)
