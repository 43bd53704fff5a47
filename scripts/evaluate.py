"""Measures a base model and its finetuned version on the same prompts and noise (a run itself does so every few epochs,
with --config.evaluate.every=5).

    python -m scripts.evaluate --run runs/NAME --rewards jpeg_compressibility clipscore:models/emoji/clip

On prompts that the run has trained on and on others, sampled stochastically as in training and deterministically (eta
0): the run's own reward; rewards that it was not trained on, which is where overoptimisation shows; diversity, the mean
cosine distance between the CLIP embeddings of images of the same prompt; and the share of images in which a
classifier, which no reward uses, names the animal. --guidance_scale 2 asks what a policy trained without guidance draws
with it. Writes RUN/evaluation.json and RUN/images/evaluation.png, a row of base images above each row of finetuned.

--rl_scale 0 0.5 1 1.5 2 measures base + s (finetuned - base), see scripts.sample, in place of these two, and draws the
frontier along s, animals named against the run's reward, to RUN/images/frontier.png.
"""

import argparse
import json

import matplotlib

from ddpo import prompts, rewards
from ddpo.clip import load_clip
from ddpo.errors import InputError, at_least, check_output, finite, run_script, seed
from ddpo.evaluation import choose_prompts, evaluate, load_classifier, split_prompts
from ddpo.images import image_grid
from scripts.sample import at_scales, open_run

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def draw_frontier(path, sections, scales):
    """Draws the share of animals named against the run's reward, a line along the scales for each of the sections,
    {"seen, stochastic": {name: measures}, ...}, whose names are in the order of the scales."""
    figure, axes = plt.subplots(figsize=(5, 3.4), constrained_layout=True)
    for section, measured in sections.items():
        points = [(values["reward_mean"], values["classifier_accuracy"]) for values in measured.values()]
        axes.plot(*zip(*points), marker="o", label=section)
        for scale, point in zip(scales, points):
            axes.annotate(f"{scale:g}", point, xytext=(3, 3), textcoords="offset points", fontsize=7)
    axes.set(xlabel="the run's reward", ylabel="share of animals named")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="a run's folder")
    parser.add_argument("--checkpoint", default="", help="a name in RUN/checkpoints; default: the newest")
    parser.add_argument("--prompts", default="", help="those that the run has seen; default: the run's")
    other = "prompt set; default: what the run's held_out kept from training, or animal_activities or common_animals"
    parser.add_argument("--held_out", default="", help=other)
    parser.add_argument("--limit", type=at_least(1), default=45, help="at most this many prompts of each kind")
    parser.add_argument("--count", type=at_least(1), default=4, help="images per prompt, at least 2")
    parser.add_argument("--rewards", nargs="*", default=[], help="to measure besides the run's own")
    parser.add_argument("--seed", type=seed, default=0, help="of the noise; runs use 0 for their own")
    parser.add_argument("--guidance_scale", type=at_least(0, float), default=0, help="default: the run's")
    scale = "measure base + s (finetuned - base) for each of these; default: 0 and 1, base and finetuned"
    parser.add_argument("--rl_scale", type=finite, nargs="+", default=[0.0, 1.0], metavar="s", help=scale)
    parser.add_argument("--output", default="", help="default: RUN/evaluation.json")
    parser.add_argument("--clip", default="models/emoji/clip", help="CLIP whose embeddings measure diversity")
    parser.add_argument("--classifier", default="models/emoji/classifier", help="classifier of animals; empty: none")
    args = parser.parse_args()
    if args.count < 2:
        raise InputError(f"--count {args.count}: diversity takes at least 2 images of each prompt")

    config, policy, folder = open_run(args.run, args.checkpoint)
    output, pictures_at = args.output or f"{args.run}/evaluation.json", f"{args.run}/images/evaluation.png"
    check_output(output)
    check_output(pictures_at)
    seen_set, held_out_set = args.prompts or config.prompts, args.held_out
    share = config.get("held_out", 0.0) if seen_set == config.prompts else 0.0
    seen, held_out = split_prompts(prompts.get_prompts(seen_set), share)
    if held_out_set or not held_out:
        held_out_set = held_out_set or ("common_animals" if seen_set == "animal_activities" else "animal_activities")
        held_out = prompts.get_prompts(held_out_set)
    sets = {"seen": choose_prompts(seen, args.limit), "held_out": choose_prompts(held_out, args.limit, seen)}
    if not sets["held_out"]:
        raise InputError(f"--held_out {held_out_set}: the run has seen all of its prompts")
    everything = sets["seen"] + sets["held_out"]
    prompts.check_length([prompt for prompt, _ in everything], policy.pipe.tokenizer)
    options, sample = config.get("reward_options"), config.sample
    if not (config.reward or args.rewards):
        raise InputError(f"{args.run} was trained without a reward: say by which to measure it, --rewards NAME ...")
    own = config.reward or args.rewards[0]
    judges = {"reward_mean": rewards.get_reward(own, policy.device, options, everything)}
    judges |= {name: rewards.get_reward(name, policy.device, options, everything) for name in args.rewards}
    clip = load_clip(args.clip, policy.device)
    classifier = load_classifier(args.classifier) if args.classifier else None
    sample.guidance_scale = args.guidance_scale or sample.guidance_scale
    policy.prepare_sampling(sample)

    result = {"prompts": {"seen": seen_set, "held_out": held_out_set or f"{share:g} of {seen_set}"}}
    result |= {"count": args.count, "guidance_scale": sample.guidance_scale}
    scales = list(dict.fromkeys(args.rl_scale))
    columns, rows, sections = min(8, *map(len, sets.values())), {}, {}
    for name in at_scales(policy, folder, scales):
        measured, pictures = evaluate(policy, sets, args.count, judges, sample, clip, classifier, args.seed)
        for section, values in measured.items():
            sections.setdefault(section, {})[name] = values
            rows.setdefault(section, {})[name] = pictures[section][:columns]
    result |= sections
    shown = [(f"{name}: {section}", row) for section, named in sorted(rows.items()) for name, row in named.items()]
    labels = [text for label, _ in shown for text in [label] + [""] * (columns - 1)]
    grid = image_grid([picture for _, row in shown for picture in row], labels, columns)
    grid.save(pictures_at)
    named = {kind: m for kind, m in sections.items() if all("classifier_accuracy" in v for v in m.values())}
    if len(scales) > 2 and named:
        draw_frontier(f"{args.run}/images/frontier.png", named, scales)
    print(json.dumps(result, indent=1))
    with open(output, "w") as f:
        json.dump(result, f, indent=1)


if __name__ == "__main__":
    run_script(main)
