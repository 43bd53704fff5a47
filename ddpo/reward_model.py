"""A learned reward: frozen CLIP image embeddings and a small head, from ratings or from choices between pictures.

Ratings y of pictures x: the head f is fitted by regression, min sum (f(x) - y)^2. Choices between a and b follow
Bradley and Terry (1952), P(a is chosen) = sigmoid(f(a) - f(b)); a tie counts as half a choice of each. Every vote of
every rater is one term, so a picture or pair that several people judged weighs by their number.

A reward model is a folder: reward.json, head.safetensors, evaluation.json and evaluation.png. `scripts.train_reward`
makes it, `--config.reward=learned:FOLDER` uses it.
"""

import csv
import hashlib
import io
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from tqdm import tqdm

from ddpo.clip import embed_images, load_clip
from ddpo.errors import InputError

VOTES = {"left": 1.0, "right": 0.0, "tie": 0.5}


# ----------------------------------------------------------------------------------------------------------- the data
def read_jsonl(path):
    """The objects of a JSONL file. A line that begins as one and lacks its end, which a kill leaves, is passed over.

    Raises InputError that names the line that is not JSON, or the file that cannot be read.
    """
    records = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        line = line.strip()
        try:
            if line:
                records.append(json.loads(line))
        except ValueError as error:
            if not line.startswith("{") or line.endswith("}"):
                raise InputError(f"{path}, line {number} is not JSON: {error}") from error
    return records


def _read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', '') or 'it is not UTF-8 text'}") from error


def read_choices(paths, repeats=False):
    """The votes in JSONL files of `scripts.annotate`, oldest first, without those that were undone. What a rater said
    when a pair was asked a second time, to see how sure they are, is left out unless `repeats`.

    Each is {"pair", "prompt", "left", "right", "choice": left, right, tie or skip, "rater"}; the pictures' paths are
    relative to the file's folder.
    """
    votes = {}
    for path in map(str, paths):
        for record in read_jsonl(path):
            try:
                repeat, choice = record.get("repeat", False), record["choice"]
                key = (path, record["rater"], record["pair"], repeat)
                if choice not in (*VOTES, "skip", "undo"):
                    raise ValueError(f"{choice!r} is none of left, right, tie, skip, undo")
                votes.pop(key, None)
                if choice != "undo" and (repeats or not repeat):
                    folder = os.path.dirname(path)
                    sides = {side: os.path.join(folder, record[side]) for side in ("left", "right")}
                    votes[key] = {**record, **sides}
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise InputError(f"{path}: {record} is not a choice of scripts.annotate ({error})") from error
    return list(votes.values())


def read_ratings(path, images=""):
    """(image path, score, rater) of each line of a CSV or JSONL with the columns image, score and, if several people
    rated, rater; or of AVA's own list, whose score is the mean of the ten vote counts for 1 to 10.

    Args:
        path: NAME.csv, NAME.jsonl, or AVA's NAME.txt ("index id n1 ... n10 tags").
        images: folder of the pictures; default: the file's own.
    Raises:
        InputError that names the line that does not fit, or if no picture is there. If some are not, their ratings
        are left out, and it says so.
    """
    folder = images or os.path.dirname(path)
    ratings = []
    try:
        if path.endswith(".jsonl"):
            rows = read_jsonl(path)
        elif path.endswith(".csv"):
            rows = list(csv.DictReader(io.StringIO(_read_text(path), newline="")))
        else:
            rows = [line.split() for line in _read_text(path).splitlines() if line.strip()]
    except csv.Error as error:
        raise InputError(f"{path} is not CSV: {error}") from error
    for number, row in enumerate(rows, 1):
        try:
            if isinstance(row, list):
                score = np.average(np.arange(1, 11), weights=np.array(row[2:12], dtype=float))
                name, rater = f"{row[1]}.jpg", "AVA"
            else:
                name, score, rater = row["image"], float(row["score"]), str(row.get("rater") or "")
            if not (name and np.isfinite(score)):
                raise ValueError(f"image {name!r}, score {score}")
            ratings.append((os.path.join(folder, name), score, rater))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise InputError(f"{path}, entry {number} has no image and score: {row} ({error})") from error
    there = {name for name, _, _ in ratings if os.path.isfile(name)}
    if not there:
        raise InputError(f"{path}: none of its {len(ratings)} pictures is in {folder or '.'}, the first being "
                         f"{ratings[0][0] if ratings else 'none'}. Which folder holds them?")  # fmt: skip
    kept = [rating for rating in ratings if rating[0] in there]
    if len(kept) < len(ratings):
        print(f"{len(ratings) - len(kept)} of {len(ratings)} ratings left out: no such pictures in {folder or '.'}")
    return kept


def picture_keys(paths):
    """{path: a hash of the picture's pixels, or None if it cannot be read} of picture files."""

    def key(path):
        try:
            picture = _open(path)
            return path, hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()
        except InputError:
            return path, None

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside the interpreter lock
        return dict(tqdm(pool.map(key, sorted(paths)), "reading", len(paths), unit="picture", leave=False))


def cached_embeddings(encoder, paths, cache, device="cpu", precision="fp32", batch_size=32):
    """Unit CLIP embeddings (N, D) of N different picture files, from the folder `cache` where they are known already.

    The cache goes by the files' content and the encoder's weights and preprocessing, so it never returns those of
    another picture or model of the same name.
    """
    clip = load_clip(encoder, device, precision)
    digest = hashlib.sha256(repr(clip[1].image_processor.to_dict()).encode())
    for weight in (*clip[0].vision_model.parameters(), clip[0].visual_projection.weight):
        digest.update(weight.cpu().contiguous().view(torch.uint8).numpy())
    file = Path(cache) / f"{digest.hexdigest()[:16]}.safetensors"
    known = load_file(file) if file.exists() else {}
    keys = [hashlib.sha256(Path(path).read_bytes()).hexdigest()[:32] for path in paths]
    missing = [i for i, key in enumerate(keys) if key not in known]
    bar = tqdm(total=len(missing), desc="embedding", unit="picture", disable=not missing)
    try:
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            for i, embedding in zip(batch, embed_images(clip, [_open(paths[i]) for i in batch], batch_size).cpu()):
                known[keys[i]] = embedding.clone()
            bar.update(len(batch))
    finally:  # what is known is kept, whatever came between
        bar.close()
        if missing and known:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(known, f"{file}.tmp")
            os.replace(f"{file}.tmp", file)
    return torch.stack([known[key] for key in keys])


def _open(path):
    try:
        return Image.open(path).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's for damaged files
        raise InputError(f"cannot read the picture {path}: {error}") from error


# ------------------------------------------------------------------------------------------------------------ the head
def make_head(dimension, hidden=0):
    """f: (..., D) -> (..., 1). Linear, or with one hidden layer."""
    if not hidden:
        return torch.nn.Linear(dimension, 1)
    return torch.nn.Sequential(torch.nn.Linear(dimension, hidden), torch.nn.GELU(), torch.nn.Linear(hidden, 1))


def head_loss(head, embeddings, index, target):
    """(N,) losses. index (N, 2): cross-entropy of Bradley-Terry, target in [0, 1]; index (N,): squared error."""
    scores = head(embeddings[index]).squeeze(-1)
    if index.ndim == 2:
        return F.binary_cross_entropy_with_logits(scores[:, 0] - scores[:, 1], target, reduction="none")
    return (scores - target) ** 2


def train_head(embeddings, index, target, validation=None, epochs=300, patience=20, hidden=0, seed=0,
               learning_rate=1e-2, weight_decay=10.0, batch_size=64, progress="training"):  # fmt: skip
    """Fits a head with AdamW.

    Args:
        embeddings: (M, D).
        index, target: see `head_loss`; (N, 2) or (N,) rows of `embeddings`, and (N,) float.
        validation: (index, target) for early stopping: the weights of the best epoch are kept, and training ends
            `patience` epochs after it. None: `epochs` epochs.
    Returns:
        the head, and the number of epochs it was trained.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = make_head(embeddings.shape[1], hidden)
    # CLIP's embeddings lie in a narrow cone; standardised, all directions train at one pace. Undone at the end.
    used = embeddings[index.flatten().unique()]
    mean, std = used.mean(0), used.std(0).clamp_min(1e-6)
    standard = (embeddings - mean) / std
    optimizer = torch.optim.AdamW(head.parameters(), learning_rate, weight_decay=weight_decay)
    best, best_epoch, best_state = float("inf"), 0, None
    bar = tqdm(range(1, epochs + 1), progress, unit="epoch", leave=False)
    for epoch in bar:
        for batch in torch.randperm(len(target), generator=generator).split(batch_size):
            optimizer.zero_grad()
            head_loss(head, standard, index[batch], target[batch]).mean().backward()
            optimizer.step()
        if validation is not None:
            with torch.no_grad():
                loss = head_loss(head, standard, *validation).mean().item()
            bar.set_postfix(validation_loss=f"{loss:.4f}")
            if loss < best:
                best, best_epoch = loss, epoch
                best_state = {k: v.clone() for k, v in head.state_dict().items()}
            elif epoch >= best_epoch + patience:
                break
    bar.close()
    if best_state:
        head.load_state_dict(best_state)
    first = head if not hidden else head[0]
    with torch.no_grad():  # f((x - mean) / std) as a function of x
        first.weight /= std
        first.bias -= first.weight @ mean
    return head.requires_grad_(False), best_epoch or epochs


# ------------------------------------------------------------------------------------------------------ how good it is
def rank_correlation(a, b):
    """Spearman's; None if one of them is constant."""
    from scipy.stats import spearmanr  # slow to import, and every start imports this file

    return float(spearmanr(a, b).statistic) if np.ptp(a) and np.ptp(b) else None


def exact_interval(share, count):
    """The exact 95% confidence interval (low, high) of a share of `count` independent trials."""
    from scipy.stats import binomtest  # slow to import

    interval = binomtest(round(share * count), count).proportion_ci()
    return float(interval.low), float(interval.high)


def evaluate_choices(margin, target, pictures=None, bins=5):
    """What f(left) - f(right) (N,) says of votes (N,) in {0, 0.5, 1} on `pictures` (N, 2), integers; by default each
    vote is on a pair of its own.

    Returns a dict: `accuracy` over the votes that are no ties; `accuracy_interval`, its exact 95% confidence interval
    (Clopper and Pearson, 1934), for which all votes on one pair count as one; `rank_correlation` (Spearman) of margin
    and vote;
    `log_loss`; `calibration`, a list of (mean predicted probability, share of left votes, votes) over bins of equal
    width; and `calibration_error`, their mean distance weighted by votes. What votes that are all alike do not say is
    None.
    """
    probability = 1 / (1 + np.exp(-margin.astype(np.float64)))  # float32's is 1 from a margin of 17 on
    clear = target != 0.5
    accuracy = float(((margin > 0) == (target == 1))[clear].mean()) if clear.any() else None
    pairs = np.arange(len(target)) if pictures is None else np.sort(pictures, axis=1)
    different = len(np.unique(pairs[clear], axis=0))
    calibration, place = [], np.minimum(probability * bins, bins - 1).astype(int)  # probability 1 is in the last bin
    for inside in (place == i for i in range(bins)):
        if inside.any():
            calibration.append((float(probability[inside].mean()), float(target[inside].mean()), int(inside.sum())))
    clipped = probability.clip(1e-12, 1 - 1e-12)
    return {
        "votes": len(target),
        "accuracy": accuracy,
        "accuracy_interval": accuracy if accuracy is None else exact_interval(accuracy, different),
        "rank_correlation": rank_correlation(margin, target),
        "log_loss": float(-(target * np.log(clipped) + (1 - target) * np.log(1 - clipped)).mean()),
        "calibration": calibration,
        "calibration_error": float(sum(abs(p - y) * n for p, y, n in calibration) / len(target)),
    }


def evaluate_ratings(predicted, target, pictures=None, bins=5):
    """What predictions (N,) say of ratings (N,) of `pictures` (N,), integers; by default one rating of each.

    Returns a dict: `accuracy`, the share of picture pairs with different mean ratings that are put in the right order;
    `accuracy_interval`, to either side 1.96 standard deviations that this share has for n pictures in random order
    (Kendall's tau, 2 accuracy - 1, then has the variance 2 (2n + 5) / (9n (n - 1)));
    `rank_correlation` (Spearman) of the pictures' means; and of the single ratings `rmse`; `r2`; `calibration`, a list
    of (mean prediction, mean rating, pictures) over bins of equally many; and `calibration_error`, their mean distance.
    What ratings that are all alike do not say is None.
    """
    _, place, count = np.unique(
        np.arange(len(target)) if pictures is None else pictures, return_inverse=True, return_counts=True
    )
    means, truth = (np.bincount(place, values) / count for values in (predicted, target))
    right = different = 0
    for i in range(len(truth)):  # row by row: all pairs of AVA's pictures would fill the memory
        order = np.sign(means[i + 1 :] - means[i]) * np.sign(truth[i + 1 :] - truth[i])
        right, different = right + (order > 0).sum(), different + (truth[i + 1 :] != truth[i]).sum()
    n, accuracy = len(truth), float(right / different) if different else None
    spread = 1.96 * (2 * (2 * n + 5) / (9 * n * max(1, n - 1))) ** 0.5 / 2
    groups = [g for g in np.array_split(np.argsort(predicted, kind="stable"), bins) if len(g)]
    calibration = [(float(predicted[g].mean()), float(target[g].mean()), len(g)) for g in groups]
    return {
        "votes": len(target),
        "accuracy": accuracy,
        "accuracy_interval": None if accuracy is None else (max(0.0, accuracy - spread), min(1.0, accuracy + spread)),
        "rank_correlation": rank_correlation(means, truth),
        "rmse": float(np.sqrt(((predicted - target) ** 2).mean())),
        "r2": float(1 - ((predicted - target) ** 2).mean() / target.var()) if target.var() else None,
        "calibration": calibration,
        "calibration_error": float(sum(abs(p - y) * n for p, y, n in calibration) / len(target)),
    }


def agreement(items, votes):
    """The share of pairs of clear votes on the same item that agree; None if no item has two. items (N,) hashable;
    votes (N,) in {0, 0.5, 1}."""
    by_item, same, total = {}, 0, 0
    for item, vote in zip(items, votes):
        if vote != 0.5:
            for other in by_item.setdefault(item, []):
                same, total = same + (vote == other), total + 1
            by_item[item].append(vote)
    return same / total if total else None


# ---------------------------------------------------------------------------------------------------------- the folder
def save_reward_model(folder, head, encoder, hidden, details):
    """Writes reward.json and head.safetensors. details: what else reward.json should say. An encoder that is a folder
    is named by its place relative to this one."""
    os.makedirs(folder, exist_ok=True)
    encoder = os.path.relpath(encoder, folder) if os.path.isdir(encoder) else encoder
    weights, description = (os.path.join(folder, name) for name in ("head.safetensors", "reward.json"))
    save_file(head.state_dict(), weights)
    with open(description, "w") as f:
        json.dump({"encoder": encoder, "hidden": hidden, **details}, f, indent=1)
    shutil.copymode(description, weights)  # safetensors' own is for the owner alone


def encoder_of(folder):
    """The encoder of a reward model's folder: a folder, relative to that one or to where we are, or a hub name."""
    with open(os.path.join(folder, "reward.json")) as f:
        encoder = json.load(f)["encoder"]
    beside = os.path.normpath(os.path.join(folder, encoder))
    return beside if os.path.isdir(beside) else encoder


def load_reward_model(folder, device="cpu", precision="fp32", batch_size=32):
    """The reward function of a folder that `scripts.train_reward` wrote. Raises InputError if it is none."""
    try:
        with open(os.path.join(folder, "reward.json")) as f:
            description = json.load(f)
        encoder, hidden = encoder_of(folder), description["hidden"]
        state = load_file(os.path.join(folder, "head.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(
            f"the folder holds no reward model ({error}). python -m scripts.train_reward --output FOLDER makes one"
        ) from error
    clip = load_clip(encoder, device, precision)
    head = make_head(clip[0].config.projection_dim, hidden)
    try:
        head.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"its head does not fit {encoder}: {' '.join(str(error).split())}") from error
    head.to(device)

    def learned(images, prompts, metadata):
        """The head's value of each picture, in the unit of the ratings, or in nats of preference for choices."""
        with torch.no_grad():
            return head(embed_images(clip, images, batch_size)).squeeze(-1).cpu().numpy(), {}

    return learned
