"""Draws a base model and a finetuned one side by side, on the same prompts and noise.

    python -m scripts.sample --run runs/NAME --prompts "a cat" "a dog riding a bike" --count 4
    python -m scripts.sample --run runs/NAME --prompts "a cat" --count 4 --rl_scale 0 0.5 1 1.5 2

Writes the grid to RUN/images/samples.png (or --output): a row per prompt and model, base above finetuned.

--rl_scale s draws with the prediction base + s (finetuned - base) in place of the finetuned one's: a dial from the base
model (0) to the finetuned one (1) and beyond, without training again. With several values, a row holds one prompt and
noise along s.
"""

import argparse
import json
import os

import torch
from ml_collections import ConfigDict

from config.base import get_config
from ddpo import prompts
from ddpo.checkpoint import list_checkpoints
from ddpo.errors import PICTURES, InputError, at_least, check_output, finite, run_script, seed
from ddpo.images import image_grid
from ddpo.pipeline_logprob import sample_with_logprob
from ddpo.policy import load_policy, load_weights


def open_run(run, checkpoint=""):
    """The config of a run, its policy as it was before training, and the folder of its newest or a named checkpoint:
    `load_weights(policy, folder)` makes it the finetuned one."""
    try:
        with open(os.path.join(run, "config.json")) as f:
            saved = json.load(f)
        config = ConfigDict(get_config().to_dict())  # of options that the run is older than, their defaults
        config.update(saved)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{run!r} is not a run: it has no config.json that can be read") from error
    folders = {os.path.basename(folder): folder for folder in list_checkpoints(run)}
    if checkpoint and checkpoint not in folders:
        raise InputError(f"{run} has no checkpoint {checkpoint!r}: there is {', '.join(folders) or 'none'}")
    if not folders:
        raise InputError(f"{run} has no checkpoint yet")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # A new LoRA adds nothing, so this is the base model.
    policy = load_policy(config.model, config.lora_rank, config.precision, device, config.lora_targets)
    return config, policy, folders[checkpoint] if checkpoint else list_checkpoints(run)[-1]


def at_scales(policy, folder, scales=(0.0, 1.0)):
    """Makes the policy of `open_run` each of base + s (finetuned - base) in turn, the finetuned weights being those in
    `folder`. Yields a name of each: "base" for s = 0, "finetuned" for 1."""
    policy.keep_base()
    load_weights(policy, folder)
    for scale in scales:
        policy.rl_scale = scale
        yield {0: "base", 1: "finetuned"}.get(scale, f"s = {scale:g}")


def draw_at_scales(policy, folder, texts, sample, seed, scales=(0.0, 1.0)):
    """Draws one image per text at each scale of `at_scales`: (name, PIL images). The noise of image i is that of
    generator seed + i. sample: a run's config.sample."""
    policy.prepare_sampling(sample)
    shape = policy.noise_shape(sample)

    def noise(i):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed + i))

    for name in at_scales(policy, folder, scales):
        options = (sample.guidance_scale, policy.noise_level(sample), sample.batch_size)
        yield name, sample_with_logprob(policy, texts, noise, *options, progress=name).images


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="a run's folder")
    parser.add_argument("--checkpoint", default="", help="a name in RUN/checkpoints; default: the newest")
    parser.add_argument("--prompts", nargs="+", default=["a cat", "a dog", "a horse", "a butterfly"])
    parser.add_argument("--count", type=at_least(1), default=8, help="images per prompt")
    parser.add_argument("--steps", type=at_least(0), default=0, help="denoising steps; default: the run's")
    parser.add_argument("--guidance_scale", type=at_least(0, float), default=0, help="default: the run's")
    parser.add_argument("--eta", type=at_least(-1, float), default=-1, help="noise level; 0: none; default: the run's")
    parser.add_argument("--seed", type=seed, default=0, help="of the noise")
    scale = "instead of the finetuned model: base + s (finetuned - base); several values make a row of each noise"
    parser.add_argument("--rl_scale", type=finite, nargs="+", default=[1.0], metavar="s", help=scale)
    parser.add_argument("--output", default="", help="default: RUN/images/samples.png")
    args = parser.parse_args()

    config, policy, folder = open_run(args.run, args.checkpoint)
    output = args.output or os.path.join(args.run, "images", "samples.png")
    check_output(output, PICTURES)
    sample = config.sample
    sample.num_steps = args.steps or sample.num_steps
    sample.guidance_scale = args.guidance_scale or sample.guidance_scale
    if args.eta > 1:
        raise InputError(f"--eta {args.eta:g} must be at most 1")
    if args.eta >= 0:
        sample[policy.family.noise_option] = args.eta
    prompts.check_length(args.prompts, policy.pipe.tokenizer)
    texts = [prompt for prompt in args.prompts for _ in range(args.count)]
    along = len(args.rl_scale) > 1
    scales = args.rl_scale if along else [0.0, *args.rl_scale]
    names, drawn = zip(*draw_at_scales(policy, folder, texts, sample, args.seed * 10**6, scales))
    if along:
        images = [picture for same_noise in zip(*drawn) for picture in same_noise]
        labels = [label for text in texts for label in [text] + [""] * (len(scales) - 1)]
        grid = image_grid(images, labels, len(scales), heads=[f"s = {scale:g}" for scale in scales])
    else:
        images, labels = [], []
        for row, prompt in enumerate(args.prompts):
            for name, pictures in zip(names, drawn):
                images += pictures[row * args.count : (row + 1) * args.count]
                labels += [f"{name}: {prompt}"] + [""] * (args.count - 1)
        grid = image_grid(images, labels, args.count)
    grid.save(output)
    print(output)


if __name__ == "__main__":
    run_script(main)
