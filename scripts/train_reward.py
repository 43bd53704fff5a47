"""Trains a reward model of your own, from choices between two pictures or from ratings of single ones.

    python -m scripts.train_reward --choices runs/annotations/choices.jsonl --output runs/my-reward
    python -m scripts.train_reward --ratings ratings.csv --images FOLDER --output runs/my-reward
    python -m scripts.train_reward --ratings AVA.txt --images AVA/images --output runs/my-reward
    accelerate launch train.py --config config/emoji.py:aesthetic --config.reward=learned:runs/my-reward

--choices takes files of scripts.annotate, of any number of raters. --ratings takes a CSV or JSONL with the columns
image, score and, if several people rated, rater; or AVA's list of vote counts.

A fifth of the pictures or pairs is held out to be measured on, another fifth of the rest stops the training early. The
head that is saved is then trained on everything, for as many epochs (--no_refit: it is the one that was measured).
"""

import argparse
import json
import os

import matplotlib
import numpy as np
import torch

from ddpo.errors import InputError, at_least, check_folder, run_script, seed
from ddpo.reward_model import (
    VOTES,
    agreement,
    cached_embeddings,
    evaluate_choices,
    evaluate_ratings,
    picture_keys,
    read_choices,
    read_ratings,
    save_reward_model,
    train_head,
)
from ddpo.seeds import numpy_generator

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FEWEST = 20  # votes; with fewer nothing can be held out


def split(index, seed):
    """Splits votes into training, validation and held-out rows: about 64, 16 and 20%.

    index (N, 2) or (N,): the pictures of each vote. Votes on the same pictures stay together, and training votes that
    share a picture with a later part are left out: else it would be measured on pictures it has seen.
    Returns three arrays of rows.
    """
    index = index.reshape(len(index), -1)
    groups = {}
    for row, pictures in enumerate(index.tolist()):
        groups.setdefault(tuple(sorted(pictures)), []).append(row)
    keys = list(groups)
    order = numpy_generator("split", seed).permutation(len(keys))
    held, stop = max(1, round(0.2 * len(keys))), max(1, round(0.16 * len(keys)))
    parts, taken = [], set()
    for chosen in (order[:held], order[held : held + stop], order[held + stop :]):
        free = [keys[k] for k in chosen if not taken & set(keys[k])]
        taken |= {picture for key in free for picture in key}
        parts.append(np.array([row for key in free for row in groups[key]], dtype=int))
    return parts[2], parts[1], parts[0]


def draw(path, evaluation, kind, margin, target):
    """Draws the held-out votes: how sure against how often right, or predicted against given."""
    figure, axes = plt.subplots(figsize=(4, 3.6), constrained_layout=True)
    if kind == "ratings":
        axes.scatter(margin, target, s=6, alpha=0.3, label="held-out pictures")
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
    parser.add_argument("--images", default="", help="folder of the rated pictures; default: that of --ratings")
    parser.add_argument("--output", required=True, help="the reward model's folder")
    parser.add_argument("--encoder", default="openai/clip-vit-large-patch14", help="CLIP: hub name or folder")
    parser.add_argument("--hidden", type=at_least(0), default=0, help="width of a hidden layer; 0: a linear head")
    parser.add_argument("--epochs", type=at_least(1), default=300, help="at most")
    parser.add_argument("--patience", type=at_least(1), default=20, help="epochs without a better validation loss")
    parser.add_argument("--learning_rate", type=at_least(0, float), default=1e-2)
    parser.add_argument("--weight_decay", type=at_least(0, float), default=10.0)
    parser.add_argument("--seed", type=seed, default=0, help="of the split, the head and the order")
    parser.add_argument("--no_refit", action="store_true", help="save the head that was measured")
    parser.add_argument("--cache", default="runs/embeddings", help="folder of the embeddings known already")
    args = parser.parse_args()
    for folder in (args.output, args.cache):
        check_folder(folder)

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
        raise InputError(f"the picture {missing} is not there")
    keys = picture_keys({name for names in pictures for name in names})
    damaged = sorted(name for name, key in keys.items() if key is None)
    if damaged:
        whole = [row for row, names in enumerate(pictures) if not any(keys[name] is None for name in names)]
        print(f"{len(target) - len(whole)} votes left out, on {len(damaged)} pictures that cannot be read: "
              + ", ".join(damaged[:5]) + (", ..." if len(damaged) > 5 else ""))  # fmt: skip
        pictures, raters, target = [pictures[row] for row in whole], [raters[row] for row in whole], target[whole]
    if len(target) < FEWEST:
        raise InputError(f"there are {len(target)} votes; with fewer than {FEWEST} nothing can be held out")
    if target.min() == target.max():
        raise InputError(f"all {len(target)} votes are the same: there is nothing to learn from them")
    # A picture is its content: a copy under another name must not be held out while it is trained on.
    names = list({keys[name]: name for name in sorted({name for pair in pictures for name in pair})}.values())
    place = {keys[name]: i for i, name in enumerate(names)}
    index = torch.tensor([[place[keys[name]] for name in pair] for pair in pictures]).squeeze(-1)
    agreed = None
    if kind == "choices":  # two raters may have seen a pair the other way round
        pairs = index.tolist()
        votes = [vote if pair == sorted(pair) else 1 - vote for pair, vote in zip(pairs, target.tolist())]
        agreed = agreement([tuple(sorted(pair)) for pair in pairs], votes)
    target = torch.from_numpy(target)
    print(f"{len(target)} votes by {len(set(raters))} rater(s) on {len(names)} pictures"
          + (f", {int((target == 0.5).sum())} ties" if kind == "choices" else "")
          + (f"; where two voted on the same pair, {agreed:.1%} agree" if agreed is not None else ""))  # fmt: skip

    device = "cuda" if torch.cuda.is_available() else "cpu"
    embeddings = cached_embeddings(args.encoder, names, args.cache, device)
    train, validation, held_out = split(index.numpy(), args.seed)
    dropped = len(target) - len(train) - len(validation) - len(held_out)
    if min(len(train), len(validation), len(held_out)) < 2:
        raise InputError("the votes share so many pictures that none can be held out: rate more different ones")
    options = dict(hidden=args.hidden, seed=args.seed, learning_rate=args.learning_rate, weight_decay=args.weight_decay)
    scale = (0.0, 1.0) if kind == "choices" else (target[train].mean().item(), target[train].std().item())
    scaled = (target - scale[0]) / scale[1]
    stopping = (index[validation], scaled[validation])
    head, epochs = train_head(
        embeddings, index[train], scaled[train], stopping, args.epochs, args.patience, **options, progress="training"
    )
    values = head(embeddings[index[held_out]]).squeeze(-1)
    if not values.isfinite().all():
        raise InputError("the training diverged: a lower --learning_rate or --weight_decay may help")
    given = target[held_out].numpy()
    if kind == "choices":
        margin = (values[:, 0] - values[:, 1]).numpy()
        evaluation = evaluate_choices(margin, given, index[held_out].numpy())
    else:
        margin = (values * scale[1] + scale[0]).numpy()
        evaluation = evaluate_ratings(margin, given, index[held_out].numpy())
    if not args.no_refit:
        head, _ = train_head(embeddings, index, scaled, epochs=epochs, **options, progress="training on all")
    last = head if not args.hidden else head[-1]
    with torch.no_grad():
        if kind == "ratings":  # back to the unit of the ratings
            last.weight *= scale[1]
            last.bias *= scale[1]
            last.bias += scale[0]
        else:  # only differences matter: zero is the mean of these pictures
            last.bias -= head(embeddings).mean()
    details = {
        "kind": kind, "votes": len(target), "raters": len(set(raters)), "pictures": len(names), "epochs": epochs,
        "trained_on": len(train) if args.no_refit else len(target), "rater_agreement": agreed, "seed": args.seed,
    }  # fmt: skip
    save_reward_model(args.output, head, args.encoder, args.hidden, details)
    with open(os.path.join(args.output, "evaluation.json"), "w") as f:
        json.dump(evaluation, f, indent=1)
    draw(os.path.join(args.output, "evaluation.png"), evaluation, kind, margin, given)
    verdict = f"use it: accelerate launch train.py --config.reward=learned:{args.output}"
    if evaluation["accuracy"] is None or not evaluation["accuracy_interval"][0] > 0.5:
        low, high = evaluation["accuracy_interval"] or (0, 1)
        verdict = f"not better than chance: the 95% interval of its held-out accuracy is {low:.1%} to {high:.1%}. "
        verdict += "More votes, on other pictures, or another --encoder may help"
    print(
        f"trained on {len(train)} votes for {epochs} epochs, stopped by {len(validation)}"
        + (f"; {dropped} left out because they share pictures with those held out" if dropped else "")
        + f"\nheld-out ({len(held_out)} votes): "
        + "  ".join(f"{k} {v:.3f}" for k, v in evaluation.items() if isinstance(v, float))
        + f"\n{verdict}"
    )


if __name__ == "__main__":
    run_script(main)
