"""Reward models of one's own: votes with a known law in, the law out; and the real command line, on the tiny CLIP."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from PIL import Image

from ddpo import reward_model as rm
from ddpo import rewards
from ddpo.errors import InputError
from ddpo.features import FEATURES, load_features

CLIP = str(ROOT / "models/emoji/clip")


def bradley_terry(n, rng, dimension=8):
    """Embeddings (2n, D), pairs (n, 2), votes (n,) drawn by Bradley and Terry's law, and the true linear taste (D,)."""
    taste = rng.normal(size=dimension)
    embeddings = rng.normal(size=(2 * n, dimension)) * np.linspace(0.02, 1, dimension) + 3  # a cone, like CLIP's
    index = np.arange(2 * n).reshape(n, 2)
    margin = (embeddings[index[:, 0]] - embeddings[index[:, 1]]) @ taste
    votes = (rng.random(n) < 1 / (1 + np.exp(-margin))).astype(np.float32)
    return torch.tensor(embeddings, dtype=torch.float32), torch.tensor(index), torch.tensor(votes), taste


def test_bradley_terry_recovers_the_taste():
    """With many votes the head is the law's own weights, in its own units, and predicts votes that it has not seen as
    well as the law does."""
    embeddings, index, votes, taste = bradley_terry(3000, np.random.default_rng(0))
    head, held_out, _ = rm.learn(embeddings, index, votes)
    std = embeddings.std(0)
    learned = (head.weight[0] * std).numpy()  # a weight matters by what its input varies
    np.testing.assert_allclose(learned, taste * std.numpy(), atol=0.2)
    margin = ((embeddings[index[:, 0]] - embeddings[index[:, 1]]).double() @ torch.tensor(taste)).numpy()
    truth = rm.vote_losses(margin, votes.numpy(), True).mean()
    assert truth - 0.005 < rm.vote_losses(held_out, votes.numpy(), True).mean() < truth + 0.005


def test_ratings_recover_an_affine_law_and_a_ridge_is_chosen_by_what_is_held_out():
    rng = np.random.default_rng(0)
    features = torch.tensor(rng.normal(size=(60, 48)) + 5)
    features[:, 0] *= 30
    scores = 7 + 0.1 * (features[:, 0].numpy() - 150)
    head, held_out, _ = rm.learn(features, torch.arange(60), scores)
    np.testing.assert_allclose(head(features.float()).squeeze(1), scores, atol=0.1)
    assert np.corrcoef(held_out, scores)[0, 1] > 0.9
    noise = rng.normal(size=60)  # with as many dimensions as ratings to learn from, a soft ridge would fit it
    _, held_out, ridge = rm.learn(features, torch.arange(60), noise)
    assert ((held_out - noise) ** 2).mean() < 1.5 * noise.var() and ridge > 1e-2


@pytest.mark.parametrize("choices", [True, False])
def test_the_fit_is_the_minimum_also_in_fewer_dimensions(choices):
    """The gradient vanishes, by finite differences of the formula, and the span of the rows loses nothing."""
    rng = np.random.default_rng(0)
    rows, target, ridge = rng.normal(size=(12, 30)), rng.integers(0, 3, 12) / 2, 0.03

    def objective(w, bias):
        p = 1 / (1 + np.exp(-rows @ w))
        losses = -target * np.log(p) - (1 - target) * np.log(1 - p) if choices else (rows @ w + bias - target) ** 2 / 2
        return losses.mean() + ridge / 2 * (w**2).sum()

    short, span = rm.in_span(rows)
    assert short.shape == (12, 12)
    np.testing.assert_allclose(short @ span.T, rows, atol=1e-10)
    w, bias = rm.fit_ridge(short, target, ridge, choices)
    w, least = span @ w, objective(span @ w, bias)
    for step in rng.normal(size=(20, 30)) * 1e-3:
        assert objective(w + step, bias) > least and objective(w - step, bias) > least
        slope = (objective(w + step, bias) - objective(w - step, bias)) / 2
        assert abs(slope) < 1e-6 * np.linalg.norm(step) / 1e-3
    assert bias == 0 if choices else objective(w, bias + 1e-3) > least < objective(w, bias - 1e-3)


def test_features_that_never_change_say_nothing():
    embeddings, index, votes, _ = bradley_terry(50, np.random.default_rng(0))
    constant = torch.full((len(embeddings), 3), 1000.0)
    constant[:, 1] += torch.rand(len(embeddings)) * 1e-4  # a float32's rounding
    head, held_out, _ = rm.learn(torch.cat([embeddings, constant], 1), index, votes)
    assert (head.weight[0, -3:] == 0).all() and np.isfinite(held_out).all()


def test_evaluation_of_calibrated_predictions():
    """Votes drawn from the predicted probabilities are calibrated; the same votes against doubled margins are not."""
    rng = np.random.default_rng(0)
    margin = rng.normal(size=20000) * 2
    votes = (rng.random(20000) < 1 / (1 + np.exp(-margin))).astype(float)
    good, bad = rm.evaluate_choices(margin, votes), rm.evaluate_choices(margin * 3, votes)
    assert good["calibration_error"] < 0.015 < 0.08 < bad["calibration_error"]
    best = 1 / (1 + np.exp(-abs(margin)))  # the accuracy that the votes' own noise allows
    assert good["accuracy"] == bad["accuracy"] == pytest.approx(best.mean(), abs=0.01)
    assert good["log_loss"] < bad["log_loss"] and sum(n for _, _, n in good["calibration"]) == 20000
    ties = rm.evaluate_choices(np.array([1.0, -1.0, 5.0]), np.array([1.0, 1.0, 0.5]))
    assert ties["accuracy"] == 0.5 and ties["votes"] == 3  # the tie is neither right nor wrong


def test_evaluation_of_sure_predictions():
    """float32's probability of a margin of 20 is 1: such votes count in the bins, and their loss is a number."""
    result = rm.evaluate_choices(np.float32([20, 18, -20, 1]), np.float32([1, 1, 1, 0]))
    assert sum(votes for _, _, votes in result["calibration"]) == 4
    # log(1 + exp(-margin)) for those that were preferred, log(1 + exp(margin)) for the one that was not
    np.testing.assert_allclose(result["log_loss"], (20 + np.log1p(np.e)) / 4, rtol=1e-6)


def test_evaluation_of_ratings():
    target = np.array([1.0, 2.0, 3.0, 3.0])
    assert rm.evaluate_ratings(target * 10, target)["accuracy"] == 1.0
    assert rm.evaluate_ratings(target * 10, target)["rank_correlation"] == pytest.approx(1)
    result = rm.evaluate_ratings(np.array([2.0, 1.0, 3.0, 4.0]), target)  # one of the five ordered pairs is wrong
    assert result["accuracy"] == pytest.approx(4 / 5) and result["rmse"] == pytest.approx(np.sqrt(3 / 4))
    twice = np.repeat(target, 2)  # two raters, who differ: an image cannot be ordered before itself
    result = rm.evaluate_ratings(twice, twice + np.tile([-0.3, 0.3], 4), np.repeat(np.arange(4), 2))
    assert result["accuracy"] == 1.0 and result["rmse"] == pytest.approx(0.3) and result["votes"] == 8


def test_agreement_counts_pairs_of_raters():
    assert rm.agreement(["a", "a", "a", "b", "c", "c"], [1, 1, 0, 1, 0.5, 1]) == pytest.approx(1 / 3)
    assert rm.agreement(["a", "b"], [1, 0]) is None


def test_held_out_pictures_are_never_trained_on():
    rng = np.random.default_rng(0)
    for index in (rng.integers(0, 150, (200, 2)), np.repeat(np.arange(60), 3)):  # shared images; several raters
        parts = list(rm.folds(index, 5, seed=0))
        assert sorted(np.concatenate([held for _, held in parts])) == list(range(len(index)))
        for train, held in parts:
            assert len(train) and not set(index[train].ravel().tolist()) & set(index[held].ravel().tolist())
    assert [(len(a), len(b)) for a, b in rm.folds(np.arange(200).reshape(100, 2), 5, seed=0)] == [(80, 20)] * 5
    with pytest.raises(InputError, match="share so many images"):
        rm.learn(torch.rand(4, 3), torch.tensor([[0, 1], [0, 2], [0, 3]] * 10), torch.tensor([1.0, 0.0, 1.0] * 10))


def test_undo_skip_and_cut_lines(tmp_path):
    clicks = ("x", 0, "left"), ("y", 0, "right"), ("x", 1, "tie"), ("x", 1, "undo"), ("x", 1, "right"), ("x", 2, "skip")
    lines = [{"pair": i, "left": "a.png", "right": "b.png", "choice": c, "rater": r} for r, i, c in clicks]
    path = tmp_path / "choices.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"pair": 3, "ch')
    votes = rm.read_choices([path])
    assert [(v["rater"], v["pair"], v["choice"]) for v in votes] == [
        ("x", 0, "left"), ("y", 0, "right"), ("x", 1, "right"), ("x", 2, "skip")]  # fmt: skip
    assert votes[0]["left"] == str(tmp_path / "a.png")


CLICK = '{"pair": 0, "left": "a.png", "right": "b.png", "choice": "left", "rater": "x"}'


@pytest.mark.parametrize(
    "text, message",
    [
        (b"\xff\xfe\x00", "cannot read .* not UTF-8"),
        (b"image,score\nb.png,3\n", "line 1 is not JSON"),
        (f"{CLICK}\n\n[1, 2}}\n{CLICK}\n".encode(), "line 3 is not JSON"),
        (b"5\n", "5 is not a choice"),
        (b'{"choice": "left"}\n', "not a choice .*'rater'"),
        (CLICK.replace('"left",', '"both",').encode(), "not a choice .*'both' is none of left, right"),
        (CLICK.replace("0", "[0]").encode(), "not a choice"),
    ],
)
def test_rubbish_instead_of_choices_is_named(tmp_path, text, message):
    path = tmp_path / "choices.jsonl"
    path.write_bytes(text)
    with pytest.raises(InputError, match=message) as error:
        rm.read_choices([path])
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("r.csv", b"\x89PNG\r\n", "not UTF-8"), ("r.csv", b"", "none of its 0"),
        ("r.csv", b"score,image\n5\n", "entry 1"),
        ("r.csv", b"image,score\nb.png,good\n", "entry 1"), ("r.csv", b"image,score\nb.png,nan\n", "entry 1.*nan"),
        ("r.csv", b"image,score\nc.png,1\n", "none of its 1"), ("r.csv", b"image,score\nb.png,1\n,2\n", "entry 2"),
        ("r.csv", b'image,score\n"' + b"b" * 200_000 + b'",1\n', "not CSV"), ("r.jsonl", b"5\n", "entry 1"),
        ("r.jsonl", b'{"image": 5, "score": 5}\n', "entry 1"), ("AVA.txt", b"1 b 0 0 0 0 0 0 0 0 0 0 1\n", "entry 1"),
        ("AVA.txt", b"1 b 0 0 1 0\n", "entry 1"), ("AVA.txt", b"1\n", "entry 1"),
    ],
)  # fmt: skip
def test_rubbish_instead_of_ratings_is_named(tmp_path, name, text, message):
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    path = str(tmp_path / name)
    with pytest.raises(InputError, match="cannot read"):
        rm.read_ratings(path)
    (tmp_path / name).write_bytes(text)
    with pytest.raises(InputError, match=message) as error:
        rm.read_ratings(path)
    assert path in str(error.value)


def test_ava_and_tables(tmp_path):
    for name in ("953619.jpg", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    lines = "1 953619 0 1 5 17 38 36 15 6 5 1 1 22 1396\n", "2 953958 10 7 15 26 26 21 10 8 1 2 0 0 0\n"
    (tmp_path / "AVA.txt").write_text("".join(lines))
    counts = np.array([0, 1, 5, 17, 38, 36, 15, 6, 5, 1])
    ((name, score, _),) = rm.read_ratings(str(tmp_path / "AVA.txt"))  # the second image is not there
    assert name.endswith("953619.jpg") and score == pytest.approx((counts * np.arange(1, 11)).sum() / counts.sum())
    (tmp_path / "r.csv").write_text("image,score,rater\nb.png,3.5,ann\nb.png,4,bob\n")
    assert [(s, r) for _, s, r in rm.read_ratings(str(tmp_path / "r.csv"))] == [(3.5, "ann"), (4.0, "bob")]
    (tmp_path / "r.jsonl").write_text('{"image": "b.png", "score": 2}\n')
    assert rm.read_ratings(str(tmp_path / "r.jsonl")) == [(str(tmp_path / "b.png"), 2.0, "")]


def test_votes_that_are_all_alike_say_nothing_of_order():
    ties = rm.evaluate_choices(np.array([1.0, -1.0]), np.array([0.5, 0.5]))
    assert ties["accuracy"] is None and ties["rank_correlation"] is None and ties["log_loss"] > 0
    same = rm.evaluate_ratings(np.array([1.0, 2.0]), np.array([3.0, 3.0]))
    assert same["accuracy"] is None and same["r2"] is None and same["rmse"] == pytest.approx(np.sqrt(2.5))


def test_a_damaged_picture_is_named_and_the_others_embeddings_kept(tmp_path, monkeypatch):
    paths = [str(tmp_path / f"{name}.png") for name in "abc"]
    for path, colour in zip(paths, ("red", "green", "blue")):
        Image.new("RGB", (64, 64), colour).save(path)
    Path(paths[1]).write_bytes(Path(paths[1]).read_bytes()[:60])
    with pytest.raises(InputError, match="cannot read the image .*b.png"):
        rm.cached_features("embedding", CLIP, paths, tmp_path / "cache", batch_size=1)
    _, tensors = load_features("embedding", CLIP)
    monkeypatch.setattr(rm, "load_features", lambda *arguments: (None, tensors))
    assert rm.cached_features("embedding", CLIP, paths[:1], tmp_path / "cache").shape[0] == 1


def test_a_reward_model_works_from_any_directory(tmp_path, monkeypatch):
    """Its encoder was named from another one."""
    monkeypatch.chdir(ROOT)
    rm.save_reward_model(str(tmp_path / "model"), rm.make_head(64), "embedding", "models/emoji/clip", {})
    monkeypatch.chdir(tmp_path)
    for model in ("model", ROOT / "models/emoji-taste"):
        values, _ = rewards.get_reward(f"learned:{model}")([Image.new("RGB", (64, 64))], [""], [{}])
        assert np.isfinite(values).all()


def test_intervals_hold_chance_as_often_as_they_say():
    """Votes by coins, on predictions that know nothing of them: a lower end above 1/2 is a false claim."""
    rng, false = np.random.default_rng(0), {"choices": 0, "ratings": 0}
    for _ in range(400):
        votes = rm.evaluate_choices(rng.normal(size=30), rng.integers(0, 2, 30).astype(float))
        ratings = rm.evaluate_ratings(rng.normal(size=15), rng.normal(size=15))
        for kind, result in (("choices", votes), ("ratings", ratings)):
            low, high = result["accuracy_interval"]
            assert low <= result["accuracy"] <= high
            false[kind] += low > 0.5
    assert max(false.values()) <= 20 and false["ratings"] > 0  # 10 are expected at most
    sure = rm.evaluate_choices(np.ones(4), np.ones(4))
    assert sure["accuracy"] == 1 and sure["accuracy_interval"][0] == pytest.approx(0.025**0.25)  # p^4 = 2.5%
    again = rm.evaluate_choices(np.ones(8), np.ones(8), np.array([[0, 1], [1, 0]] * 4))  # one pair, eight times
    assert again["accuracy_interval"][0] == pytest.approx(0.025)


def test_a_folder_that_is_no_reward_model(tmp_path):
    (tmp_path / "head.safetensors").write_text("?" * 99)
    for text in ("[]", "{", '{"encoder": "models/emoji/clip"}', '{"encoder": "models/emoji/clip", "hidden": 0}'):
        (tmp_path / "reward.json").write_text(text)
        with pytest.raises(InputError, match=f"^reward learned:{tmp_path}: the folder holds no reward model"):
            rewards.get_reward(f"learned:{tmp_path}")


def test_the_cache_knows_pictures_by_their_content(tmp_path, monkeypatch):
    paths = [str(tmp_path / name) for name in ("a.png", "b.png")]
    for path, colour in zip(paths, ("red", "blue")):
        Image.new("RGB", (64, 64), colour).save(path)
    first = rm.cached_features("embedding", CLIP, paths, tmp_path / "cache")
    calls, (embed, tensors) = [], load_features("embedding", CLIP)
    counted = (lambda images, n: calls.append(len(images)) or embed(images, n)), tensors
    monkeypatch.setattr(rm, "load_features", lambda *arguments: counted)
    assert torch.equal(rm.cached_features("embedding", CLIP, paths, tmp_path / "cache"), first) and not calls
    Image.new("RGB", (64, 64), "red").save(paths[1])  # another image of the same name
    changed = rm.cached_features("embedding", CLIP, paths, tmp_path / "cache")
    assert not calls and torch.equal(changed[1], first[0])  # known already, as a.png
    Image.new("RGB", (64, 64), "green").save(paths[1])
    assert not torch.equal(rm.cached_features("embedding", CLIP, paths, tmp_path / "cache")[1], first[1])
    assert calls == [1]


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """160 coloured images, liked for their redness: as CSV, and as votes of two raters, one of whom errs."""
    folder, rng = tmp_path_factory.mktemp("judged"), np.random.default_rng(0)
    names, redness = [f"{i}.png" for i in range(160)], rng.uniform(0, 1, 160)
    for name, red in zip(names, redness):
        pixels = rng.integers(0, 60, (64, 64, 3)) + np.array([200 * red, 100, 200 * (1 - red)])
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name)
    with open(folder / "ratings.csv", "w", newline="") as f:
        csv.writer(f).writerows([("image", "score"), *((n, 5 + 3 * r) for n, r in zip(names, redness))])
    with open(folder / "choices.jsonl", "w") as f:
        for rater, flip in (("ann", 0.0), ("bob", 0.1)):
            for pair, (a, b) in enumerate(np.arange(160).reshape(80, 2)):
                better = (redness[a] > redness[b]) != (rng.random() < flip)
                left, right = (a, b) if rater == "ann" else (b, a)
                sides = {"left": names[left], "right": names[right]}
                choice = "left" if better == (rater == "ann") else "right"
                f.write(json.dumps({"pair": pair, "prompt": "", **sides, "choice": choice, "rater": rater}) + "\n")
    return folder, [str(folder / name) for name in names], redness


@pytest.mark.parametrize("kind", ["ratings", "choices"])
def test_the_command_line(judged, tmp_path, kind):
    folder, names, redness = judged
    source = ["--ratings", folder / "ratings.csv"] if kind == "ratings" else ["--choices", folder / "choices.jsonl"]
    command = [sys.executable, "scripts/train_reward.py", *source, "--encoder", CLIP]
    if kind == "choices":
        command += ["--model", "models/emoji", "--features", *FEATURES]
    result = run([*command, "--output", tmp_path / "model", "--cache", tmp_path / "cache"])
    assert result.returncode == 0, result.stderr
    evaluation = json.loads((tmp_path / "model/evaluation.json").read_text())
    assert evaluation["accuracy"] > 0.75 and evaluation["rank_correlation"] > 0.6
    assert f"accuracy {evaluation['accuracy']:.3f}" in result.stdout and "use it: " in result.stdout
    assert evaluation["votes"] == 160  # each is held out once
    assert Image.open(tmp_path / "model/evaluation.png").size[0] > 300
    described = json.loads((tmp_path / "model/reward.json").read_text())
    if kind == "choices":
        assert "2 rater(s)" in result.stdout and "% agree" in result.stdout
        losses = described["held_out_loss"]
        assert losses.keys() == FEATURES.keys() and described["features"] == min(losses, key=losses.get)
    reward = rewards.get_reward(f"learned:{tmp_path / 'model'}")
    values, _ = rewards.compute_rewards(reward, [Image.open(n) for n in names], [""] * 160, [{}] * 160)
    assert np.corrcoef(values, redness)[0, 1] > 0.9
    if kind == "ratings":  # in their own unit
        assert abs(values - (5 + 3 * redness)).mean() < 0.6


def test_copies_of_pictures_are_not_held_out_and_coins_teach_nothing(tmp_path):
    """Two copies of a folder, each rated by the same coin, and two images that are damaged."""
    rng, lines = np.random.default_rng(0), ["image,score"]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    for i in range(60):
        picture, score = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)), rng.integers(1, 11)
        picture.save(tmp_path / f"a/{i}.png")
        picture.save(tmp_path / f"b/copy-{i}.png", compress_level=0)
        lines += [f"a/{i}.png,{score}", f"b/copy-{i}.png,{score}"]
    for i in (3, 7):
        (tmp_path / f"a/{i}.png").write_bytes(b"damaged")
    (tmp_path / "r.csv").write_text("\n".join(lines))
    command = [sys.executable, "scripts/train_reward.py", "--ratings", tmp_path / "r.csv", "--encoder", CLIP]
    result = run([*command, "--output", tmp_path / "model", "--cache", tmp_path / "cache"])
    assert result.returncode == 0, result.stderr
    assert f"2 votes left out, on 2 images that cannot be read: {tmp_path}/a/3.png, {tmp_path}/a/7.png" in result.stdout
    assert "on 60 images" in result.stdout  # of 118 files
    assert "not better than chance: the 95% interval" in result.stdout and "use it:" not in result.stdout
    low, high = json.loads((tmp_path / "model/evaluation.json").read_text())["accuracy_interval"]
    assert low < 0.5 < high


def test_mistakes_end_with_one_line(judged, tmp_path):
    (tmp_path / "few.csv").write_text("image,score\n" + "".join(f"{i}.png,{i}\n" for i in range(5)))
    command = [sys.executable, "scripts/train_reward.py", "--ratings", tmp_path / "few.csv", "--images", judged[0]]
    result = run([*command, "--encoder", CLIP, "--output", tmp_path / "model"])
    assert result.returncode != 0 and result.stderr.splitlines()[-1].startswith("error: there are 5 votes")
    assert "Traceback" not in result.stderr and not (tmp_path / "model").exists()
