"""A simulated person with a taste that is written down, to see what a learned reward recovers of it.

    python -m scripts.simulate_rater choose --pairs runs/pairs --count 500      (votes, in scripts.annotate's format)
    python -m scripts.simulate_rater rate --pairs runs/pairs --count 500        (scores 1 to 10, as CSV)
    python -m scripts.simulate_rater check --pairs runs/pairs --first 1500 --count 600 --rewards learned:FOLDER ...
    python -m scripts.simulate_rater measure --run runs/NAME                    (the true taste before and after a run)
    python -m scripts.simulate_rater plot --results results/preferences/runs.jsonl         (what was measured, by votes)

The reward model sees the votes, never `taste`. The pairs come from `scripts.annotate --draw_only`. The rater is noisy
as Bradley and Terry have it: P(a is chosen) = sigmoid((taste(a) - taste(b)) / TEMPERATURE), and calls it a tie when the
two are nearly the same to them.
"""

import argparse
import csv
import json
import os
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ddpo import prompts, rewards
from ddpo.errors import DRAWINGS, InputError, at_least, check_output, run_script, seed
from ddpo.evaluation import load_classifier, named_animals
from ddpo.images import image_grid
from ddpo.reward_model import rank_correlation
from ddpo.seeds import numpy_generator
from scripts.results import add_result, read_results
from scripts.sample import draw_at_scales, open_run

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

TEMPERATURE = 0.45  # in units of taste, whose standard deviation over the base model's images is about 1
TIE = 0.15  # closer than this, in the rater's noisy eyes, is a tie
RATING_NOISE = 0.7  # standard deviation of a rating's noise, in units of taste
BORDER = 10  # pixels; the frame of the image that counts as background


def taste(image):
    """How much the simulated person likes a 64 x 64 picture: warm colours, a calm background, a large animal in the
    middle. Returns a dict of the three parts, each about 0 on average and 1 in standard deviation over the base model's
    images, and of "taste", their weighted sum, scaled likewise.
    """
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
    frame = np.ones(pixels.shape[:2], dtype=bool)
    frame[BORDER:-BORDER, BORDER:-BORDER] = False
    warm = (pixels[frame][:, 0] - pixels[frame][:, 2]).mean()  # red over blue, of the background
    # The mean step between neighbouring pixels of the frame: none on a plain background, many on a pattern.
    steps_x, steps_y = np.abs(np.diff(pixels, axis=1)).mean(-1), np.abs(np.diff(pixels, axis=0)).mean(-1)
    busy = (steps_x[frame[:, 1:]].mean() + steps_y[frame[1:]].mean()) / 2
    # How far the middle differs from the background's mean colour, beyond what the background itself does.
    distance = np.abs(pixels - pixels[frame].mean(0)).mean(-1)
    large = distance[~frame].mean() - distance[frame].mean()
    parts = {
        "warm": (warm - WARM[0]) / WARM[1],
        "calm": (BUSY[0] - busy) / BUSY[1],
        "large": (large - LARGE[0]) / LARGE[1],
    }
    return {**parts, "taste": (parts["warm"] + parts["calm"] + 0.5 * parts["large"]) / 1.5}


# Mean and standard deviation over the base model's images.
WARM, BUSY, LARGE = (0.132, 0.192), (0.0147, 0.0101), (0.097, 0.053)


def choose(difference, rng):
    """The vote of the noisy rater on a pair with this difference of taste, left minus right."""
    felt = difference + TEMPERATURE * rng.logistic()  # its sign is then Bradley and Terry's
    return "tie" if abs(felt) < TIE else "left" if felt > 0 else "right"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("choose", "rate", "check", "measure", "plot"))
    parser.add_argument("--pairs", default="", help="a folder with pairs.jsonl")
    parser.add_argument("--first", type=at_least(0), default=0, help="the first pair that is judged")
    parser.add_argument(
        "--count", type=at_least(1), default=500, help="choose: pairs; rate, check: images; measure: per animal"
    )
    parser.add_argument("--rewards", nargs="+", default=[], help="check: what is compared with the taste")
    parser.add_argument("--seed", type=seed, default=0, help="of the rater's noise; measure: of the images")
    parser.add_argument("--output", default="", help="default: PAIRS/choices.jsonl, PAIRS/ratings.csv, RUN/taste.json")
    parser.add_argument("--run", default="", help="measure: a run's folder")
    parser.add_argument("--results", default="", help="plot: what to draw; measure: a file to add the run to as well")
    parser.add_argument("--base", default="", help="measure: a file that keeps what the base model's images measure")
    parser.add_argument("--checkpoint", default="", help="measure: a name in RUN/checkpoints; default: the newest")
    args = parser.parse_args()
    if args.what in ("measure", "plot"):
        return {"measure": measure, "plot": plot}[args.what](args)
    from scripts.annotate import read_pairs, shown  # imports a web server, which a machine that measures may lack

    folder, rater = Path(args.pairs), f"simulated-{args.seed}"
    pairs = read_pairs(folder / "pairs.jsonl")[args.first :]
    needed = args.count if args.what == "choose" else -(-args.count // 2)
    if len(pairs) < needed:
        raise InputError(f"{folder} has {len(pairs)} pairs from {args.first} on, and {needed} are needed")
    output = args.output or folder / ("ratings.csv" if args.what == "rate" else "choices.jsonl")
    if args.what != "check" and os.path.exists(output):  # a person's clicks, maybe
        raise InputError(f"{output} is there already: choose another --output")
    check_output(str(output))
    rng = numpy_generator("rater", args.seed)
    names = [name for pair in pairs[:needed] for name in pair["images"]]
    likes = {name: taste(Image.open(folder / name)) for name in tqdm(names, "looking")}
    if args.what == "check":
        pictures = [Image.open(folder / name) for name in names[: args.count]]
        texts = [pair["prompt"] for pair in pairs[:needed] for _ in range(2)][: args.count]
        parts = ("taste", "warm", "calm", "large")
        for reward in args.rewards:
            values, _ = rewards.get_reward(reward)(pictures, texts, [{}] * len(texts))
            shares = {part: rank_correlation(values, [likes[n][part] for n in names[: args.count]]) for part in parts}
            print(f"{reward}: rank correlation on {len(pictures)} images with "
                  + ", ".join(f"{part} {rho:.3f}" for part, rho in shares.items()))  # fmt: skip
        return
    if args.what == "rate":
        with open(output, "w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow(("image", "score", "rater"))
            for name in names[: args.count]:
                felt = 5.5 + 1.5 * (likes[name]["taste"] + RATING_NOISE * rng.normal())
                writer.writerow((name, int(np.clip(round(felt), 1, 10)), rater))
        return print(output)
    as_liked, clear = 0, 0
    with open(output, "w") as f:
        for pair in pairs[:needed]:
            left, right = shown(pair, rater)
            difference = likes[left]["taste"] - likes[right]["taste"]
            vote = choose(difference, rng)
            clear += vote != "tie"
            as_liked += vote == ("left" if difference > 0 else "right")
            record = {"pair": pair["pair"], "prompt": pair["prompt"], "left": left, "right": right, "choice": vote}
            f.write(json.dumps({**record, "rater": rater, "time": time.time()}) + "\n")
    print(f"{output}: {needed} choices, {needed - clear} ties; {as_liked / clear:.1%} of the others are what the taste "
          "itself would choose, which no reward model can beat")  # fmt: skip


@torch.no_grad()
def measure(args):
    """The true taste, its parts, the tiny CLIP's alignment and the classifier's verdict on the same prompts and noise
    before and after a run. Writes RUN/taste.json, and RUN/images/taste.png with the first noise of some animals.
    The base model's images, the same for all runs, are only drawn if the file --base is not there yet."""
    config, policy, folder = open_run(args.run, args.checkpoint)
    output, pictures_at = args.output or f"{args.run}/taste.json", f"{args.run}/images/taste.png"
    for path in (output, pictures_at, *filter(None, [args.results, args.base])):
        check_output(path)
    texts = [prompt for prompt, _ in prompts.common_animals()] * args.count
    judges = [config.reward] if config.reward not in ("", "clipscore:models/emoji/clip") else []
    judges = {name: rewards.get_reward(name, policy.device) for name in [*judges, "clipscore:models/emoji/clip"]}
    result, grids, scales = {"pictures": len(texts)}, [], (0.0, 1.0)
    if args.base and os.path.exists(args.base):
        result["base"], scales = json.loads(Path(args.base).read_text()), (1.0,)
    for name, pictures in draw_at_scales(policy, folder, texts, config.sample, 2_000_000 + args.seed * 10**6, scales):
        tastes = [taste(picture) for picture in pictures]
        named = named_animals(pictures, load_classifier("models/emoji/classifier"))
        result[name] = {
            **{key: float(np.mean([t[key] for t in tastes])) for key in tastes[0]},
            "taste_std": float(np.std([t["taste"] for t in tastes])),
            **{key: float(judge(pictures, texts, [{}] * len(texts))[0].mean()) for key, judge in judges.items()},
            "classifier_accuracy": float(np.mean([a == b.split()[-1] for a, b in zip(named, texts)])),
        }
        grids.append(pictures[:45:3])
    image_grid(sum(grids, []), [t.split()[-1] for t in texts[:45:3]] * len(grids), columns=15).save(pictures_at)
    if args.base and not os.path.exists(args.base):
        Path(args.base).write_text(json.dumps(result["base"]))
    print(json.dumps(result, indent=1))
    if args.results:
        facts = {"taste": [result]}
        if config.reward.startswith("learned:"):
            learned = json.loads(Path(config.reward.removeprefix("learned:"), "reward.json").read_text())
            facts["reward_model"] = {key: learned[key] for key in ("kind", "votes")}
        add_result(args.results, args.run, os.path.basename(os.path.normpath(args.run)), facts)
    with open(output, "w") as f:
        json.dump(result, f, indent=1)


def plot(args):
    """Draws the true taste after finetuning against the votes that each run's reward model had learned from."""
    output, groups, before = args.output or os.path.splitext(args.results)[0] + ".png", {}, []
    check_output(output, DRAWINGS)
    for line in (line for line in read_results(args.results).values() if {"taste", "reward_model"} <= line.keys()):
        measured, learned = line["taste"][0], line["reward_model"]
        points = groups.setdefault(learned["kind"], {}).setdefault(learned["votes"], [])
        points.append(measured["finetuned"]["taste"])
        before.append(measured["base"]["taste"])
    if not groups:
        raise InputError(f"--results {args.results!r} has no run with a learned reward that was measured")
    figure, axes = plt.subplots(figsize=(5, 3.2), constrained_layout=True)
    for marker, (kind, points) in zip("os", sorted(groups.items())):
        votes = sorted(points)
        (line,) = axes.plot(votes, [np.mean(points[n]) for n in votes], linewidth=1)
        x, y = zip(*((n, value) for n in votes for value in points[n]))
        axes.plot(x, y, marker, color=line.get_color(), alpha=0.6, label=kind)
    axes.axhline(np.mean(before), color="gray", linestyle=":", label="base model")
    ticks = sorted({n for points in groups.values() for n in points})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.minorticks_off()
    axes.set_xlabel("votes that the reward model learned from")
    axes.set_ylabel("true taste after DDPO")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=150)


if __name__ == "__main__":
    run_script(main)
