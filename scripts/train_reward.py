"""Trains a reward model of your own, from choices between two images or from ratings of single ones.

    python -m scripts.train_reward --choices runs/annotations/choices.jsonl --model MODEL --output runs/my-reward
    python -m scripts.train_reward --ratings ratings.csv --images FOLDER --output runs/my-reward
    python -m scripts.train_reward --ratings AVA.txt --images AVA/images --output runs/my-reward
    accelerate launch train.py --config config/emoji.py:aesthetic --config.reward=learned:runs/my-reward

--choices takes files of scripts.annotate, of any number of raters. --ratings takes a CSV or JSONL with the columns
image, score and, if several people rated, rater; or AVA's list of vote counts.

The reward is a linear function of features of a frozen network (ddpo/features.py): of the UNet of a diffusion model,
--model, best the one whose images are judged, or without that of the layers of a CLIP, --encoder. If several
--features are named, those are taken that best predict votes held out: each fifth of the votes is predicted from the
rest. The head that is saved has seen them all.
"""

import argparse
import json
import os

import matplotlib
import numpy as np
import torch

from ddpo.errors import InputError, check_folder, choose, run_script, seed
from ddpo.features import FEATURES, load_features
from ddpo.reward_model import (
    VOTES,
    agreement,
    cached_features,
    evaluate_choices,
    evaluate_ratings,
    learn,
    picture_keys,
    read_choices,
    read_ratings,
    save_reward_model,
    vote_losses,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FEWEST = 20  # votes; with fewer nothing can be held out


def draw(path, evaluation, kind, margin, target):
    """Draws the held-out votes: how sure against how often right, or predicted against given."""
    figure, axes = plt.subplots(figsize=(4, 3.6), constrained_layout=True)
    if kind == "ratings":
        axes.scatter(margin, target, s=6, alpha=0.3, label="held-out images")
    predicted, observed, count = map(np.array, zip(*evaluation["calibration"]))
    axes.scatter(predicted, observed, s=15 + 200 * count / count.sum(), color="tab:red", label="calibration, by votes")
    ends = [0, 1] if kind == "choices" else [min(predicted.min(), target.min()), max(predicted.max(), target.max())]
    axes.plot(ends, ends, color="gray", linewidth=1)
    axes.set_xlabel("predicted P(left)" if kind == "choices" else "predicted score")
    axes.set_ylabel("share of left votes" if kind == "choices" else "score")
    accuracy = "" if evaluation["accuracy"] is None else f"accuracy {evaluation['accuracy']:.1%}, "
    axes.set_title(f"held out: {accuracy}n = {evaluation['votes']}", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--choices", nargs="+", default=[], help="JSONL files of scripts.annotate")
    source.add_argument("--ratings", default="", help="CSV, JSONL, or AVA's text file")
    parser.add_argument("--images", default="", help="folder of the rated images; default: that of --ratings")
    parser.add_argument("--output", required=True, help="the reward model's folder")
    parser.add_argument("--features", nargs="+", metavar="NAME", help=f"the best of those named: "
                        f"{', '.join(FEATURES)}; default: unet if there is a --model, else layers")  # fmt: skip
    parser.add_argument("--encoder", default="openai/clip-vit-large-patch14", help="CLIP: hub name or folder")
    parser.add_argument("--model", default="", help="for unet, a Stable Diffusion: hub name or folder")
    parser.add_argument("--seed", type=seed, default=0, help="decides which votes are held out together")
    parser.add_argument("--cache", default="runs/embeddings", help="folder in which features are kept")
    args = parser.parse_args()
    for folder in (args.output, args.cache):
        check_folder(folder)
    networks = {"embedding": args.encoder, "layers": args.encoder, "unet": args.model}
    kinds = args.features or (["unet"] if args.model else ["layers"])
    for name in kinds:
        choose("features", name, FEATURES)
    if "unet" in kinds and not args.model:
        raise InputError("--features unet needs --model, the diffusion model whose UNet it is")

    kind = "choices" if args.choices else "ratings"
    if args.choices:
        votes = [vote for vote in read_choices(args.choices) if vote["choice"] != "skip"]
        pictures = [(vote["left"], vote["right"]) for vote in votes]
        target = np.array([VOTES[vote["choice"]] for vote in votes], dtype=np.float32)
        raters = [vote["rater"] for vote in votes]
    else:
        ratings = read_ratings(args.ratings, args.images)
        pictures = [(name,) for name, _, _ in ratings]
        target = np.array([score for _, score, _ in ratings], dtype=np.float32)
        raters = [rater for _, _, rater in ratings]
    missing = next((name for names in pictures for name in names if not os.path.isfile(name)), None)
    if missing:
        raise InputError(f"the image {missing} is not there")
    keys = picture_keys({name for names in pictures for name in names})
    damaged = sorted(name for name, key in keys.items() if key is None)
    if damaged:
        whole = [row for row, names in enumerate(pictures) if not any(keys[name] is None for name in names)]
        print(f"{len(target) - len(whole)} votes left out, on {len(damaged)} images that cannot be read: "
              + ", ".join(damaged[:5]) + (", ..." if len(damaged) > 5 else ""))  # fmt: skip
        pictures, raters, target = [pictures[row] for row in whole], [raters[row] for row in whole], target[whole]
    if len(target) < FEWEST:
        raise InputError(f"there are {len(target)} votes; with fewer than {FEWEST} nothing can be held out")
    if target.min() == target.max():
        raise InputError(f"all {len(target)} votes are the same: there is nothing to learn from them")
    # An image is its content: a copy under another name must not be held out while it is trained on.
    names = list({keys[name]: name for name in sorted({name for pair in pictures for name in pair})}.values())
    place = {keys[name]: i for i, name in enumerate(names)}
    index = torch.tensor([[place[keys[name]] for name in pair] for pair in pictures]).squeeze(-1)
    agreed = None
    if kind == "choices":  # two raters may have seen a pair the other way round
        pairs = index.tolist()
        votes = [vote if pair == sorted(pair) else 1 - vote for pair, vote in zip(pairs, target.tolist())]
        agreed = agreement([tuple(sorted(pair)) for pair in pairs], votes)
    print(f"{len(target)} votes by {len(set(raters))} rater(s) on {len(names)} images"
          + (f", {int((target == 0.5).sum())} ties" if kind == "choices" else "")
          + (f"; where two voted on the same pair, {agreed:.1%} agree" if agreed is not None else ""))  # fmt: skip

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in kinds:  # what cannot be loaded is known before the work
        load_features(name, networks[name], device)
    learned, losses = {}, {}
    for name in kinds:
        features = cached_features(name, networks[name], names, args.cache, device)
        head, predicted, ridge = learn(features, index, target, args.seed)
        if kind == "choices":  # only differences matter: zero is the mean of these images
            head.bias -= head(features).mean()
        learned[name] = head, predicted, ridge
        losses[name] = float(vote_losses(predicted, target, kind == "choices").mean())
        print(f"{name}: held-out loss {losses[name]:.4f}, with a ridge of {ridge:.2g}")
    best = min(losses, key=losses.get)
    head, predicted, ridge = learned[best]
    evaluate = evaluate_choices if kind == "choices" else evaluate_ratings
    evaluation = evaluate(predicted, target, index.numpy())
    details = {
        "kind": kind, "votes": len(target), "raters": len(set(raters)), "pictures": len(names), "ridge": ridge,
        "held_out_loss": losses, "rater_agreement": agreed, "seed": args.seed,
    }  # fmt: skip
    save_reward_model(args.output, head, best, networks[best], details)
    with open(os.path.join(args.output, "evaluation.json"), "w") as f:
        json.dump(evaluation, f, indent=1)
    draw(os.path.join(args.output, "evaluation.png"), evaluation, kind, predicted, target)
    verdict = f"use it: accelerate launch train.py --config.reward=learned:{args.output}"
    if evaluation["accuracy"] is None or not evaluation["accuracy_interval"][0] > 0.5:
        low, high = evaluation["accuracy_interval"] or (0, 1)
        verdict = f"not better than chance: the 95% interval of its held-out accuracy is {low:.1%} to {high:.1%}. "
        verdict += "More votes, on other images, or other --features may help"
    print(
        f"{best}, held out: " + "  ".join(f"{k} {v:.3f}" for k, v in evaluation.items() if isinstance(v, float))
        + f"\n{verdict}"
    )  # fmt: skip


if __name__ == "__main__":
    run_script(main)
