"""A learned reward: features of a frozen network and a linear head, from ratings or from choices between images.

Ratings y of images x: the head f is fitted by regression, min sum (f(x) - y)^2. Choices between a and b follow
Bradley and Terry (1952), P(a is chosen) = sigmoid(f(a) - f(b)); a tie counts as half a choice of each. Every vote of
every rater is one term, so an image or pair that several people judged weighs by their number.

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
from tqdm import tqdm

from ddpo.errors import InputError
from ddpo.features import load_features
from ddpo.seeds import numpy_generator

VOTES = {"left": 1.0, "right": 0.0, "tie": 0.5}
FOLDS = 5  # of the votes, each held out once
RIDGES = 10.0 ** np.arange(0, -4.5, -0.5)  # of `fit_ridge`, the stiffest first


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

    Each is {"pair", "prompt", "left", "right", "choice": left, right, tie or skip, "rater"}; the images' paths are
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
        images: folder of the images; default: the file's own.
    Raises:
        InputError that names the line that does not fit, or if no image is there. If some are not, their ratings
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
        raise InputError(f"{path}: none of its {len(ratings)} images is in {folder or '.'}, the first being "
                         f"{ratings[0][0] if ratings else 'none'}. Which folder holds them?")  # fmt: skip
    kept = [rating for rating in ratings if rating[0] in there]
    if len(kept) < len(ratings):
        print(f"{len(ratings) - len(kept)} of {len(ratings)} ratings left out: no such images in {folder or '.'}")
    return kept


def picture_keys(paths):
    """{path: a hash of the image's pixels, or None if it cannot be read} of image files."""

    def key(path):
        try:
            picture = _open(path)
            return path, hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()
        except InputError:
            return path, None

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside the interpreter lock
        return dict(tqdm(pool.map(key, sorted(paths)), "reading", len(paths), unit="picture", leave=False))


def cached_features(kind, network, paths, cache, device="cpu", precision="fp32", batch_size=32):
    """Features (N, D), on the CPU, of N different image files (see `ddpo.features.load_features`), from the folder
    `cache` where they are known already.

    The cache goes by the files' content, the network's weights and its preprocessing, so it never returns those of
    another image or model of the same name.
    """
    embed, tensors = load_features(kind, network, device, precision)
    digest = hashlib.sha256(kind.encode())
    for tensor in tensors:
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    file = Path(cache) / f"{digest.hexdigest()[:16]}.safetensors"
    known = load_file(file) if file.exists() else {}
    keys = [hashlib.sha256(Path(path).read_bytes()).hexdigest()[:32] for path in paths]
    missing = [i for i, key in enumerate(keys) if key not in known]
    bar = tqdm(total=len(missing), desc=kind, unit="picture", disable=not missing)
    try:
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            for i, features in zip(batch, embed([_open(paths[i]) for i in batch], batch_size).cpu()):
                known[keys[i]] = features.clone()
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
        raise InputError(f"cannot read the image {path}: {error}") from error


# ------------------------------------------------------------------------------------------------------------ the head
def standardise(features):
    """(features (M, D) float64 with mean 0, and variance 1 / D in every dimension; (mean, scale) (D,) that did it).
    Dimensions whose variance is only rounding become 0: they say nothing."""
    features = features.double().numpy()
    mean, std = features.mean(0), features.std(0)
    scale = np.where(std > 1e-5 * abs(mean) + 1e-12, 1 / np.maximum(std, 1e-12), 0) / features.shape[1] ** 0.5
    return (features - mean) * scale, (mean, scale)


def in_span(rows):
    """(Z (N, R), V (D, R)) with rows (N, D) = Z V^T, V^T V = 1 and R <= min(N, D): a ridge's minimum lies in the span
    of the rows, so its search takes no more dimensions than that."""
    if rows.shape[1] <= len(rows):
        return rows, np.eye(rows.shape[1])
    values, vectors = np.linalg.eigh(rows @ rows.T)
    kept = values > 1e-10 * values[-1]
    lengths = np.sqrt(values[kept])
    return vectors[:, kept] * lengths, rows.T @ vectors[:, kept] / lengths


def fit_ridge(rows, target, ridge, choices, start=None):
    """The weights (R,) and bias of the minimum of

        mean loss(rows w + bias, target) + ridge / 2 |w|^2

    over rows (N, R): for choices, rows being differences of two images' features, loss is the cross-entropy of
    Bradley and Terry, and the bias 0; for ratings half the squared error. Both are convex: there is one minimum.
    start: where the search begins.
    """
    from scipy.optimize import minimize  # slow to import, and every start imports this file
    from scipy.special import expit

    if not choices:  # the bias that is best for any weights makes the means equal, and the rest is linear equations
        centre, level = rows.mean(0), target.mean()
        x = rows - centre
        penalty = ridge * np.eye(rows.shape[1])
        w = np.linalg.solve(x.T @ x / len(x) + penalty, x.T @ (target - level) / len(x))
        return w, level - centre @ w

    def loss(w):
        margin = rows @ w
        value = (np.logaddexp(0, margin) - target * margin).mean() + ridge / 2 * w @ w
        return value, rows.T @ (expit(margin) - target) / len(rows) + ridge * w

    start = np.zeros(rows.shape[1]) if start is None else start
    options = {"maxiter": 2000, "maxfun": 4000, "gtol": 1e-7, "ftol": 1e-12}
    return minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x, 0.0


def vote_losses(predicted, target, choices):
    """(N,) losses of `fit_ridge` at predictions."""
    return np.logaddexp(0, predicted) - target * predicted if choices else (predicted - target) ** 2 / 2


def folds(pictures, count, seed):
    """Yields (rows to train on, rows held out) for each of `count` parts of N votes on `pictures`, (N, 2) or (N,).

    Votes on the same images are in one part, and training votes that share an image with the part held out are left
    out: else it would be measured on images that were trained on.
    """
    pictures = pictures if pictures.ndim == 2 else pictures[:, None]
    groups = {}
    for row, names in enumerate(pictures.tolist()):
        groups.setdefault(tuple(sorted(names)), []).append(row)
    groups = list(groups.values())
    order = numpy_generator("split", seed).permutation(len(groups))
    for k in range(count):
        held = np.array([row for i in order[k::count] for row in groups[i]], dtype=int)
        free = ~np.isin(pictures, pictures[held]).any(1)
        yield np.flatnonzero(free), held


def choose_ridge(rows, target, parts, choices):
    """The ridge of RIDGES with the least loss on the votes held out. parts: of `folds`."""
    losses = np.zeros(len(RIDGES))
    for train, held in parts:
        w = None
        for i, ridge in enumerate(RIDGES):
            w, bias = fit_ridge(rows[train], target[train], ridge, choices, w)
            losses[i] += vote_losses(rows[held] @ w + bias, target[held], choices).sum()
    return float(RIDGES[np.argmin(losses)])


def learn(features, index, target, seed=0):
    """Fits a linear head, and says how good it is on votes that it has not seen.

    Args:
        features: (M, D).
        index, target: the N votes: rows of `features`, (N, 2) for choices or (N,) for ratings, and (N,) floats, in
            [0, 1] for choices.
        seed: of the folds.
    Returns:
        head: a Linear of D features, fitted to all votes.
        held_out: (N,) what heads that had not seen a vote's images predict of it: f(left) - f(right), or the rating.
            Their ridge, too, was chosen without them.
        ridge: the head's.
    Raises:
        InputError if the votes share so many images that none can be held out.
    """
    choices, index = index.ndim == 2, np.asarray(index)
    target = np.asarray(target, dtype=np.float64)
    standard, (mean, scale) = standardise(features)
    rows = standard[index[:, 0]] - standard[index[:, 1]] if choices else standard[index]
    rows, span = in_span(rows)
    held_out, outer = np.zeros(len(target)), list(folds(index, FOLDS, seed))
    for train, held in outer:
        inner = list(folds(index[train], FOLDS, seed))
        if min(len(part) for pair in inner for part in pair) < 1:
            raise InputError("the votes share so many images that none can be held out: rate more different ones")
        ridge = choose_ridge(rows[train], target[train], inner, choices)
        w, bias = fit_ridge(rows[train], target[train], ridge, choices)
        held_out[held] = rows[held] @ w + bias
    ridge = choose_ridge(rows, target, outer, choices)
    w, bias = fit_ridge(rows, target, ridge, choices)
    weight = (span @ w) * scale  # of the features as they are
    head = torch.nn.Linear(len(weight), 1).requires_grad_(False)
    head.weight.copy_(torch.from_numpy(weight))
    head.bias.fill_(bias - mean @ weight)
    return head, held_out, ridge


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
    and vote; `log_loss`; `calibration`, a list of (mean predicted probability, share of left votes, votes) over bins of
    equal width; and `calibration_error`, their mean distance weighted by votes. What cannot be told from votes that are
    all the same is None.
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

    Returns a dict: `accuracy`, the share of image pairs with different mean ratings that are put in the right order;
    `accuracy_interval`, to either side 1.96 standard deviations that this share has for n images in random order
    (Kendall's tau, 2 accuracy - 1, then has the variance 2 (2n + 5) / (9n (n - 1)));
    `rank_correlation` (Spearman) of the images' means; and of the single ratings `rmse`; `r2`; `calibration`, a list
    of (mean prediction, mean rating, images) over bins of equally many; and `calibration_error`, their mean distance.
    What cannot be told from ratings that are all the same is None.
    """
    _, place, count = np.unique(
        np.arange(len(target)) if pictures is None else pictures, return_inverse=True, return_counts=True
    )
    means, truth = (np.bincount(place, values) / count for values in (predicted, target))
    right = different = 0
    for i in range(len(truth)):  # row by row: all pairs of AVA's images would fill the memory
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
def make_head(dimension, hidden=0):
    """f: (..., D) -> (..., 1). Linear; older reward models may have one hidden layer."""
    if not hidden:
        return torch.nn.Linear(dimension, 1)
    return torch.nn.Sequential(torch.nn.Linear(dimension, hidden), torch.nn.GELU(), torch.nn.Linear(hidden, 1))


def save_reward_model(folder, head, features, encoder, details):
    """Writes reward.json and head.safetensors. features, encoder: of `load_features`. details: what else reward.json
    should say. An encoder that is a folder is named by its place relative to this one."""
    os.makedirs(folder, exist_ok=True)
    encoder = os.path.relpath(encoder, folder) if os.path.isdir(encoder) else encoder
    weights, description = (os.path.join(folder, name) for name in ("head.safetensors", "reward.json"))
    save_file(head.state_dict(), weights)
    with open(description, "w") as f:
        json.dump({"features": features, "encoder": encoder, **details}, f, indent=1)
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
        encoder = encoder_of(folder)
        kind, hidden = description.get("features", "embedding"), description.get("hidden", 0)  # older ones have others
        state = load_file(os.path.join(folder, "head.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise InputError(
            f"the folder holds no reward model ({error}). python -m scripts.train_reward --output FOLDER makes one"
        ) from error
    embed, _ = load_features(kind, encoder, device, precision)
    head = make_head(embed([Image.new("RGB", (64, 64))], 1).shape[1], hidden)
    try:
        head.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"its head does not fit {encoder}: {' '.join(str(error).split())}") from error
    head.to(device).requires_grad_(False)

    def learned(images, prompts, metadata):
        """The head's value of each image, in the unit of the ratings, or in nats of preference for choices."""
        return head(embed(images, batch_size)).squeeze(-1).cpu().numpy(), {}

    return learned
