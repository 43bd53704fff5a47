"""Learning from choices without a reward model: the loss, the pairs, and the command line."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from conftest import SMALL, run
from PIL import Image
from test_policy import disturb
from test_simulate_rater import scene

from config.base import get_config
from ddpo.errors import InputError
from ddpo.likelihood import draw_timesteps_and_noise
from ddpo.policy import load_policy, load_weights
from scripts.sample import open_run
from scripts.simulate_rater import choose, taste
from scripts.train_dpo import Pairs, correct, dpo, draw_row, encode_files, hold_out, sft


def vote(left="a.png", right="b.png", choice="left", prompt="a cat"):
    return {"left": str(left), "right": str(right), "choice": choice, "prompt": prompt}


@pytest.fixture(scope="module")
def choices(tmp_path_factory):
    """choices.jsonl of 48 pairs of scenes on coloured backgrounds, by the simulated rater, who likes them warm."""
    folder, rng = tmp_path_factory.mktemp("choices"), np.random.default_rng(0)
    with open(folder / "choices.jsonl", "w") as f:
        for i in range(48):
            scenes = [scene(rng.uniform(0, 255, 3)) for _ in range(2)]
            names = [f"{i}{letter}.png" for letter in "ab"]
            for name, picture in zip(names, scenes):
                picture.save(folder / name)
            difference = np.subtract(*(taste(picture)["taste"] for picture in scenes))
            record = {"pair": i, "prompt": ["a cat", "a dog"][i % 2], "left": names[0], "right": names[1]}
            f.write(json.dumps({**record, "choice": choose(difference, rng), "rater": "simulated"}) + "\n")
    return folder / "choices.jsonl"


def pairs_of(model, votes, rank=4, dropout=0.0):
    policy = load_policy(model, rank, "fp32", "cpu")
    policy.keep_base()
    options = get_config().train
    options.prompt_dropout = dropout
    names = [v[side] for v in votes for side in ("left", "right")]
    size = policy.latent_shape()[-1] * policy.pipe.vae_scale_factor
    return Pairs(policy, votes, encode_files(policy, names, size, size), options)


@pytest.fixture(scope="module")
def votes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("votes")
    for name, colour in (("a.png", (230, 140, 60)), ("b.png", (60, 140, 230)), ("c.png", (90, 200, 90))):
        scene(colour).save(folder / name)
    a, b, c = (folder / f"{name}.png" for name in "abc")
    return [vote(a, b), vote(a, b, "right", "a dog"), vote(b, c, "tie"), vote(c, a, "left", "a dog")]


KEYS = [(0, 0, 0, i) for i in range(4)]


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("model", ["tiny", "tiny_v"])
def test_loss_and_gradient_are_the_papers(request, votes, model, rank):
    """The paper's, one pair at a time, from the pipeline's own parts and a second copy of the base model."""
    model = request.getfixturevalue(model)
    pairs, beta = pairs_of(model, votes, rank), 1000.0 if rank else 30.0
    policy, base = pairs.policy, load_policy(model, 0, "fp32", "cpu")
    disturb(policy)
    error, base_error = pairs.errors([0, 1, 3], KEYS[:3])
    loss, info = dpo(error, base_error, pairs.vote[[0, 1, 3]], beta)
    parameters = policy.trainable_parameters()
    ours = torch.autograd.grad(loss.sum(), parameters)
    draws = draw_timesteps_and_noise(policy, KEYS[:3], policy.latent_shape(), pairs.options)
    timesteps, _, noises = (values[:, 0] for values in draws)
    expected, margins = 0, []
    for i, t, noise in zip([0, 1, 3], timesteps, noises[:, None]):
        won, lost = ("left", "right") if votes[i]["choice"] == "left" else ("right", "left")
        embeds = base.pipe.encode_prompt(votes[i]["prompt"], "cpu", 1, False)[0]

        def squared(unet, side):
            pixels = torch.from_numpy(np.array(Image.open(votes[i][side]).resize((w, h), Image.Resampling.LANCZOS)))
            x_0 = base.vae.encode(pixels.permute(2, 0, 1)[None].float() / 127.5 - 1).latent_dist.mean
            x_0 = x_0 * base.vae.config.scaling_factor
            alpha = base.scheduler.alphas_cumprod[t]
            x_t = alpha.sqrt() * x_0 + (1 - alpha).sqrt() * noise
            velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * x_0
            target = noise if base.scheduler.config.prediction_type == "epsilon" else velocity
            return torch.nn.functional.mse_loss(unet(x_t, t, embeds).sample, target)

        h, w = (side * base.pipe.vae_scale_factor for side in base.latent_shape()[1:])
        with torch.no_grad():
            reference = squared(base.denoiser, won) - squared(base.denoiser, lost)
        inside = -beta / 2 * (squared(policy.denoiser, won) - squared(policy.denoiser, lost) - reference)
        expected = expected - torch.nn.functional.logsigmoid(inside)
        margins.append(inside.item())
    theirs = torch.autograd.grad(expected, parameters)
    assert min(map(abs, margins)) > 5e-3
    assert loss.sum().item() == pytest.approx(expected.item(), rel=1e-3)
    np.testing.assert_allclose(info["margin"].tolist(), margins, rtol=2e-2, atol=1e-3)
    difference, size = (torch.cat([g.flatten() for g in gs]) for gs in ([a - b for a, b in zip(ours, theirs)], theirs))
    assert difference.norm() < 0.01 * size.norm()


@pytest.mark.parametrize("rank", [0, 4])
def test_at_the_base_model_it_is_log_2_and_pushes_the_chosen_up(tiny, votes, rank):
    """A small step down the gradient lowers the chosen image's error against the rejected one's."""
    pairs = pairs_of(tiny, votes, rank)
    parameters = pairs.policy.trainable_parameters()

    def gap():
        """Of the chosen image's error over the rejected one's."""
        error, _ = pairs.errors([0, 1, 3], KEYS[:3])
        return ((error[0] - error[1]) * (2 * pairs.vote[[0, 1, 3]] - 1)).mean()

    loss, info = dpo(*pairs.errors([0, 1, 3], KEYS[:3]), pairs.vote[[0, 1, 3]], 100.0)
    np.testing.assert_array_equal(loss.detach(), np.full(3, np.float32(math.log(2))))
    assert info["accuracy"].tolist() == [0.5] * 3 and info["margin"].abs().max() == 0
    gradient, before = torch.autograd.grad(loss.mean(), parameters), gap()
    slope = sum((g**2).sum() for g in gradient)
    # There the gradient of the loss is beta / 4 of the gap's: so a step of size h lowers the gap by 4 h |g|^2 / beta.
    step = 1e-3 / float(slope)
    with torch.no_grad():
        for p, g in zip(parameters, gradient):
            p -= step * g
    assert (before - gap()).item() == pytest.approx(4e-3 / 100, rel=0.1)


def test_ties_and_the_order_of_a_pair():
    """Shown the other way round, a pair has the same loss. A tie's is lowest, log 2, where both are equally good, and
    is half a choice of each."""
    generator = torch.Generator().manual_seed(0)
    error, base_error = torch.rand(2, 50, generator=generator), torch.rand(2, 50, generator=generator)
    votes = torch.tensor([1.0, 0.0, 0.5]).repeat(17)[:50]
    loss, info = dpo(error, base_error, votes, 20.0)
    turned, turned_info = dpo(error.flip(0), base_error.flip(0), 1 - votes, 20.0)
    torch.testing.assert_close(loss, turned)
    torch.testing.assert_close(info, turned_info)
    left, right, tie = (dpo(error, base_error, torch.full((50,), v), 20.0)[0] for v in (1.0, 0.0, 0.5))
    torch.testing.assert_close(tie, (left + right) / 2)
    assert tie.min() >= math.log(2) and dpo(base_error, base_error, votes, 20.0)[0].max() == pytest.approx(math.log(2))
    margins = torch.tensor([2.0, -2.0, 0.0, 2.0, -2.0, 3.0])
    assert correct(margins, torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.5])).tolist() == [1, 0, 0.5, 0, 1, 0.5]
    torch.testing.assert_close(sft(error, None, votes, 1.0)[0], sft(error.flip(0), None, 1 - votes, 1.0)[0])
    assert torch.equal(sft(error, None, torch.ones(50), 1.0)[0], error[0])


def test_a_pairs_pictures_share_timestep_noise_and_prompt(tiny, votes):
    """Two equal images have equal errors, whatever the key; dropped prompts are the empty prompt."""
    a = votes[0]["left"]
    same = [vote(a, a, prompt="a cat"), vote(a, a, prompt="a dog")]
    for dropout in (0.0, 1.0):
        pairs = pairs_of(tiny, same, dropout=dropout)
        error, base_error = pairs.errors([0, 1, 0], KEYS[:3])
        torch.testing.assert_close(error[0], error[1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(error, base_error, rtol=0, atol=0)
        one_key = pairs.errors([0, 1], [KEYS[0]] * 2)[0]
        assert (abs(one_key[0, 0] - one_key[0, 1]) < 1e-6) == (dropout == 1) and error[0, 0] != error[0, 2]


def test_held_out_pairs_share_no_picture_with_the_others():
    """And votes on one pair, which people may have seen either way round, stay together."""
    rng = np.random.default_rng(0)
    votes = [vote(*(f"{k}.png" for k in rng.permutation(60)[:2])) for _ in range(40)]
    votes += [vote(v["right"], v["left"], "right") for v in votes]
    kept, held_out = hold_out(votes, 0.2, 0)
    shown = [{name for v in part for name in (v["left"], v["right"])} for part in (kept, held_out)]
    assert not shown[0] & shown[1] and len({frozenset((v["left"], v["right"])) for v in held_out}) == 8
    assert hold_out(votes, 0.0, 0) == (votes, []) and len(held_out) == 16
    with pytest.raises(InputError, match="leaves none"):
        hold_out(votes, 0.999, 0)


def test_every_vote_is_seen_before_one_is_seen_again():
    rows = np.array([[draw_row(0, turn * 20 + i, 20) for i in range(20)] for turn in range(3)])
    assert (np.sort(rows) == np.arange(20)).all() and len(np.unique(rows, axis=0)) == 3


def train(*arguments, **options):
    """The real command line, small; a resumed run has its options already."""
    small = SMALL | {"sample.images_per_epoch": 16, "evaluate.clip": "", "evaluate.classifier": "", "grid_images": 1}
    options = ({} if "resume" in options else small) | {k.replace("__", "."): v for k, v in options.items()}
    options = [f"--config.{k}={v}" for k, v in options.items()]
    result = run([sys.executable, "scripts/train_dpo.py", *map(str, arguments), *options])
    assert result.returncode == 0, result.stdout + result.stderr


def lines(folder, name="metrics", without=("seconds", "seconds_training", "images_per_second", "peak_memory_gb")):
    records = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in without} for record in records]


@pytest.mark.parametrize("rank", [0, 4])
def test_resume_is_exact_and_batches_change_nothing(tiny, choices, tmp_path, rank):
    """Two epochs in one go; one, a kill that leaves half a line, and one; and in other batches: the same, to the bit
    or to rounding."""
    options = {"lora_rank": rank, "train__learning_rate": 1e-3, "train__ema_decay": 0.9}
    start = ["--choices", choices, "--model", tiny]
    train(*start, run_dir=tmp_path / "whole", **options)
    train(*start, run_dir=tmp_path / "parts", **options, num_epochs=1)
    with open(tmp_path / "parts/metrics.jsonl", "a") as f:
        f.write('{"epoch": 1, "loss": 1}\n{"epoch": 2, "lo')
    train(resume=tmp_path / "parts", num_epochs=2)
    whole, parts = (lines(tmp_path / name) for name in ("whole", "parts"))
    assert [line["loss"] for line in whole] == [line["loss"] for line in parts] and len(parts) == 2
    assert [line["grad_norm"] for line in whole] == [line["grad_norm"] for line in parts]
    states = [torch.load(tmp_path / name / "checkpoints/epoch_0002/state.pt") for name in ("whole", "parts")]
    for a, b in (s["weights"] for s in states), (s["ema"]["shadow_params"] for s in states):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    train(*start, run_dir=tmp_path / "batches", **options, train__batch_size=3)
    for ours, theirs in zip(lines(tmp_path / "batches"), whole):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)


def test_what_a_run_leaves_is_what_the_scripts_read(tiny, choices, tmp_path):
    folder = tmp_path / "run"
    train("--choices", choices, "--model", tiny, run_dir=folder, evaluate__every=1,
          evaluate__rewards="jpeg_compressibility", held_out_choices=0.25, train__learning_rate=0.05)  # fmt: skip
    assert {"loss", "accuracy", "margin", "grad_norm", "epoch"} <= lines(folder)[0].keys()
    evaluations = lines(folder, "evaluation")
    assert len(evaluations) == 3 and evaluations[0]["choices, held_out"]["accuracy"] == 0.5
    assert "jpeg_compressibility" in evaluations[2]["seen, stochastic"]
    assert (folder / "prompts.txt").read_text() == "a cat\na dog\n"
    assert sorted(p.name for p in (folder / "images").iterdir()) == ["epoch_0000.png", "epoch_0002.png"]
    for script, *arguments in (
        ("sample", "--run", folder, "--count", "1", "--rl_scale", "2"),
        ("evaluate", "--run", folder, "--count", "2", "--limit", "2", "--rewards", "jpeg_compressibility"),
        ("plot", folder, "--key", "accuracy", "--output", tmp_path / "curve.png"),
        ("publish", "--run", folder, "--repo", "me/model", "--dry-run"),
    ):
        result = run([sys.executable, f"scripts/{script}.py", *map(str, arguments)])
        assert result.returncode == 0, result.stderr
    card = (folder / "publish/README.md").read_text()
    assert "Diffusion-DPO" in card and "reward queries" not in card and str(choices) not in card
    result = run([sys.executable, "scripts/evaluate.py", "--run", str(folder)])
    assert result.returncode == 1 and "was trained without a reward" in result.stderr


def test_the_baseline_finetunes_on_the_chosen(tiny, choices, tmp_path):
    """Its loss is the denoising error; no base model is asked."""
    train("--choices", choices, "--model", tiny, "--loss", "sft", run_dir=tmp_path / "run", num_epochs=1)
    (line,) = lines(tmp_path / "run")
    assert 0.5 < line["loss"] < 2 and "accuracy" not in line
    assert json.loads((tmp_path / "run/config.json").read_text())["choices_loss"] == "sft"


def test_new_choices_are_predicted(choices, tmp_path):
    """The embedded model, trained on a noisy rater's choices: its implicit reward, at first indifferent, orders pairs
    that nobody has seen as the rater's taste does. By chance 28 of 40 would be right in one case of a hundred."""
    train("--choices", choices, "--config", "config/dpo.py", run_dir=tmp_path / "run", sample__num_steps=2,
          num_epochs=1, sample__images_per_epoch=192, train__updates_per_epoch=12, train__batch_size=8,
          train__learning_rate=1e-3, lora_rank=16)  # fmt: skip
    rng, votes = np.random.default_rng(1), []
    for i in range(40):
        names, scenes = (
            [tmp_path / f"{i}{letter}.png" for letter in "ab"],
            [scene(rng.uniform(0, 255, 3)) for _ in "ab"],
        )
        for name, picture in zip(names, scenes):
            picture.save(name)
        a, b = (taste(picture)["taste"] for picture in scenes)
        votes.append(vote(*names, "left" if a > b else "right", ["a cat", "a dog"][i % 2]))
    config, policy, folder = open_run(tmp_path / "run")
    policy.keep_base()
    names = [vote[side] for vote in votes for side in ("left", "right")]
    pairs = Pairs(policy, votes, encode_files(policy, names, 64, 64), config.train)
    load_weights(policy, folder)
    measured = pairs.measure(8)
    assert measured["accuracy"] >= 0.7 and measured["loss"] < math.log(2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "--choices names the files"),
        (("--choices", "no/such.jsonl"), "cannot read no/such.jsonl"),
        (("--choices", "CHOICES", "--loss", "kto"), "invalid choice: 'kto'"),
        (
            ("--choices", "CHOICES", "--config.sample.images_per_epoch=8"),
            "groups of sample.images_per_prompt = 2: use 16",
        ),
        (("--choices", "CHOICES", "--config.held_out_choices=0.999"), "leaves none in"),
        (("--choices", "CHOICES", "--config.train.dpo_beta=0"), "train.dpo_beta = 0.0 must be greater than 0"),
        (("--choices", "CHOICES", "--config.dpo_beta=1"), "unknown option dpo_beta. Did you mean train.dpo_beta?"),
    ],
)
def test_mistakes(tiny, choices, tmp_path, arguments, message):
    arguments = [str(choices) if word == "CHOICES" else word for word in arguments]
    command = [sys.executable, "scripts/train_dpo.py", *arguments]
    result = run([*command, f"--config.model={tiny}", f"--config.run_dir={tmp_path / 'run'}", "--config.threads=1"])
    assert result.returncode != 0 and message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_picture_that_cannot_be_read_is_named(tiny, tmp_path):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(InputError, match="a.png cannot be read"):
        pairs_of(tiny, [vote(tmp_path / "a.png", tmp_path / "a.png")])
