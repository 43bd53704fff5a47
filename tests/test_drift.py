"""DrPO: the force against its formula, written out with loops, what the formula implies, and the command line on a
random generator of one step."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import launch

from config.base import get_config
from config.turbo import get_config as turbo
from ddpo.drift import FLOOR, RADII, drift, pool
from ddpo.errors import InputError
from ddpo.likelihood import Generated, Rollout
from ddpo.losses import ALGORITHMS
from ddpo.options import check
from ddpo.pipeline_logprob import draw_noise, sample_with_logprob
from ddpo.policy import load_policy
from scripts.make_random_model import make_random_model
from scripts.sample import open_run

OPTIONS = SimpleNamespace(reference_weight=0.2)
APART = ~torch.eye(6, dtype=torch.bool)
SIGN = torch.tensor([[1.0, -1, -1, 1, 1, -1], [-1.0, 1, 0, 1, -1, 0]])


@pytest.fixture(scope="module")
def tiny_turbo(tmp_path_factory):
    """A random generator of one step."""
    folder = make_random_model("tiny", tmp_path_factory.mktemp("tiny") / "turbo")
    path = Path(folder, "scheduler/scheduler_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"timestep_spacing": "trailing"}))
    return folder


def points(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def halves_of(sign):
    return (sign > 0).double(), (sign < 0).double()


def by_hand(x, y, attracts, repels, apart):
    """The force on the images of one prompt and its unit, point by point."""
    n, k, d = len(x), len(y), x.shape[1]
    distance = np.array([[np.linalg.norm(x[i] - y[j]) for j in range(k)] for i in range(n)])
    scale = np.mean([distance[i, j] for i in range(n) for j in range(k) if apart[i, j]])
    total = np.zeros((n, d))
    for radius in RADII:
        e = np.exp(-distance / (radius * scale)) * apart
        force = np.zeros((n, d))
        for i in range(n):
            a = [apart[i, j] * max(FLOOR, np.sqrt(e[i, j] / e[i].sum() * e[i, j] / e[:, j].sum())) for j in range(k)]
            pull = sum(attracts[j] * a[j] * (y[j] - x[i]) for j in range(k))
            push = sum(repels[j] * a[j] * (y[j] - x[i]) for j in range(k))
            force[i] = pull * np.dot(repels, a) - push * np.dot(attracts, a)
        total += force / np.sqrt((force**2).mean())
    return total, scale / np.sqrt(d)


@pytest.mark.parametrize("itself", [True, False])
def test_the_force_is_the_formula(itself):
    x, y = points(2, 6, 5), points(2, 6, 5) if itself else points(2, 4, 5, seed=1)
    attracts, repels = halves_of(SIGN[:, : y.shape[1]])
    apart = APART if itself else torch.ones(6, 4, dtype=torch.bool)
    force, unit = drift(x, y, attracts, repels, apart)
    for g in range(2):
        expected, size = by_hand(x[g].numpy(), y[g].numpy(), attracts[g].numpy(), repels[g].numpy(), apart.numpy())
        np.testing.assert_allclose(force[g], expected, atol=1e-4)
        assert float(unit[g]) == pytest.approx(size)


def test_no_force_where_the_better_and_the_worse_coincide():
    x, y = points(1, 6, 5), points(1, 4, 5, seed=1)
    both = torch.cat([y, y.flip(1)], 1)
    first, second = torch.tensor([[1.0] * 4 + [0] * 4]), torch.tensor([[0.0] * 4 + [1] * 4])
    assert drift(x, both, first, second)[0].abs().max() < 1e-6
    assert drift(x, x, torch.ones(1, 6), torch.ones(1, 6), APART)[0].abs().max() < 1e-6
    assert drift(x, x, torch.zeros(1, 6), torch.zeros(1, 6), APART)[0].abs().max() == 0  # rewards that are all equal
    same = torch.ones(1, 6, 5)
    assert drift(same, same, *halves_of(SIGN[:1]), APART)[0].abs().max() == 0


def test_the_force_has_the_symmetries_of_space():
    """Candidates in another order have the same forces; turned, moved and magnified features have turned ones."""
    x, (attracts, repels) = points(2, 6, 5), halves_of(SIGN)
    force, unit = drift(x, x, attracts, repels, APART)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted, _ = drift(x[:, order], x[:, order], attracts[:, order], repels[:, order], APART)
    torch.testing.assert_close(permuted, force[:, order], atol=1e-5, rtol=0)
    turn = torch.linalg.qr(points(5, 5, seed=2))[0]
    moved = 7 * x @ turn + points(5, seed=3)
    turned, new_unit = drift(moved, moved, attracts, repels, APART)
    torch.testing.assert_close(turned, (force.double() @ turn).float(), atol=1e-4, rtol=0)
    torch.testing.assert_close(new_unit, 7 * unit)


def test_swapping_the_halves_turns_the_force_around():
    x, (attracts, repels) = points(2, 6, 5), halves_of(SIGN)
    force = drift(x, x, attracts, repels, APART)[0]
    torch.testing.assert_close(drift(x, x, repels, attracts, APART)[0], -force, atol=1e-5, rtol=0)


def test_points_that_drift_climb_a_reward():
    """Particles, each moved by its force again and again: they all come near the best place, wherever they began."""
    best, x = torch.tensor([1.5, -1.0, 0.5]), points(1, 16, 3).float()
    apart, before = ~torch.eye(16, dtype=torch.bool), float((x - best).norm(dim=-1).mean())
    for _ in range(60):
        order = (x - best).norm(dim=-1).argsort(1).argsort(1)
        force, unit = drift(x, x, (order < 8).float(), (order >= 8).float(), apart)
        x = x + 0.1 * unit * force
    assert float((x.mean(1) - best).norm()) < 0.3 * before


def generated(shape=(12, 7), seed=0, apart=0.3):
    features = [points(*shape, seed=seed).requires_grad_(), points(shape[0], 3, seed=seed + 1).requires_grad_()]
    base = [(f + apart * points(*f.shape, seed=seed + 2)).detach() for f in features]
    return Generated(points(12, 2, 2, 2), features, 6, points(12, 2, 2, 2, seed=5), base)


def test_the_loss_pulls_features_along_the_force():
    """Its gradient, that of a distance from fixed targets, is -2 / (unit D) times the forces, and finite differences of
    that distance agree; nothing flows through the targets."""
    terms, sign = generated(), SIGN.flatten()
    loss, info = ALGORITHMS["drpo"].loss(terms, sign, OPTIONS)
    assert loss.shape == (12,)
    np.testing.assert_allclose(info["kl_base"], ((terms.x_0 - terms.base) ** 2).mean((1, 2, 3)))
    for f, base, gradient in zip(terms.features, terms.base_features, torch.autograd.grad(loss.sum(), terms.features)):
        x, both = (
            f.detach().view(2, 6, -1),
            torch.cat([f, base]).detach().view(2, 2, 6, -1).transpose(0, 1).flatten(1, 2),
        )
        force, unit = drift(x, x, *halves_of(SIGN), APART)
        own, others = torch.ones(2, 6), torch.zeros(2, 6)
        pull, far = drift(x, both, torch.cat([others, own], 1), torch.cat([own, others], 1))
        expected = -2 * (force / unit + 0.2 * pull / far) / x.shape[-1]
        torch.testing.assert_close(gradient, expected.flatten(0, 1).double(), atol=1e-5, rtol=1e-4)

        def distance(x):
            fixed = ((x / unit - (f.detach().view(2, 6, -1) / unit + force)) ** 2).mean(-1)
            return float((fixed + 0.2 * ((x / far - (f.detach().view(2, 6, -1) / far + pull)) ** 2).mean(-1)).sum())

        step = 1e-4 * points(*x.shape, seed=9)
        slope = (distance(x + step) - distance(x - step)) / 2
        assert slope == pytest.approx(float((gradient.view_as(x) * step).sum()), rel=1e-3)


def test_the_base_model_is_no_force_away_from_itself():
    """Before any update, without a difference in reward: nothing to do."""
    terms = generated(apart=0.0)
    loss, _ = ALGORITHMS["drpo"].loss(terms, torch.zeros(12), OPTIONS)
    assert all(g.abs().max() < 1e-6 for g in torch.autograd.grad(loss.sum(), terms.features))


def test_halves():
    config = get_config()
    config.sample.images_per_prompt = 5
    rewards = np.array([3.0, 9, 1, 4, 2, 7, 7, 7, 7, 7, 0, 0, 0, 0, 1])
    sign = ALGORITHMS["drpo"].weigh(rewards, None, None, config)
    np.testing.assert_array_equal(sign[:10], [0, 1, -1, 1, -1, 0, 0, 0, 0, 0])
    assert sorted(sign[10:]) == [-1, -1, 0, 1, 1] and sign[14] == 1
    np.testing.assert_array_equal(sign, ALGORITHMS["drpo"].weigh(1000 * rewards - 3, None, None, config))


def test_flat_features_have_a_finite_gradient():
    x = torch.ones(2, 3, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(pool(x).sum(), x)
    assert pool(x).shape == (2, 3 * (1 + 1 + 16)) and gradient.isfinite().all()


@pytest.mark.parametrize("rank", [0, 4])
def test_a_picture_is_drawn_again_with_its_gradient(tiny_turbo, rank):
    """What training draws is what was sampled; the gradient is that of finite differences, the targets held fixed."""
    config = get_config()
    config.update({"algorithm": "drpo", "model": str(tiny_turbo)})
    config.sample.update({"num_steps": 1, "images_per_prompt": 4, "eta": 0.0, "guidance_scale": 1.5})
    policy = load_policy(tiny_turbo, rank, "fp32", "cpu")
    policy.prepare_sampling(config.sample)
    policy.prepare_training(config.train, needs_base=True)
    prompts, shape = ["a cat"] * 4, policy.noise_shape(config.sample)
    drawn = sample_with_logprob(policy, prompts, lambda i: draw_noise(shape, 0, 0, i), 1.5, 0.0, keep_steps=True)
    rollout = Rollout(policy, config, ALGORITHMS["drpo"], 0, range(4), prompts, drawn)
    sample, step, sign = torch.arange(4), torch.zeros(4, dtype=torch.long), torch.tensor([1.0, -1, 1, -1])
    terms = rollout.score(sample, step)
    torch.testing.assert_close(terms.x_0, drawn.latents[:, -1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(terms.base, terms.x_0, atol=1e-5, rtol=1e-5)
    loss, _ = ALGORITHMS["drpo"].loss(terms, sign, SimpleNamespace(reference_weight=0.0))
    parameters = policy.trainable_parameters()
    gradient = torch.autograd.grad(loss.sum(), parameters, allow_unused=True)
    gradient = [torch.zeros_like(p) if g is None else g for g, p in zip(gradient, parameters)]
    norm = torch.stack([g.norm() for g in gradient]).norm()
    assert norm > 0
    apart = ~torch.eye(4, dtype=torch.bool)
    with torch.no_grad():
        moves = [drift(f[None], f[None], *halves_of(sign[None]), apart) for f in terms.features]
        targets = [(f / unit[0] + force[0], unit[0]) for f, (force, unit) in zip(terms.features, moves)]

        def distance(h):
            for p, g in zip(parameters, gradient):
                p += h * g / norm
            features = rollout.score(sample, step).features
            for p, g in zip(parameters, gradient):
                p -= h * g / norm
            return float(sum(((f / unit - aim) ** 2).mean(1).sum() for f, (aim, unit) in zip(features, targets)))

        assert (distance(2e-3) - distance(-2e-3)) / 4e-3 == pytest.approx(float(norm), rel=0.05)


TURBO = {"algorithm": "drpo", "sample__num_steps": 1, "sample__eta": 0.0, "sample__images_per_prompt": 4}


def test_a_run_of_the_command_line(tiny_turbo, tmp_path):
    """Memory knobs change nothing, a resumed run is the run that was not stopped, and only the LoRA has moved."""
    options = TURBO | {"model": tiny_turbo, "sample__images_per_epoch": 16}
    launch(direct=True, run_dir=tmp_path / "whole", **options)
    launch(direct=True, run_dir=tmp_path / "small", train__batch_size=1, sample__batch_size=3, **options)
    launch(direct=True, run_dir=tmp_path / "stopped", **options | {"num_epochs": 1})
    launch(direct=True, resume=tmp_path / "stopped", **options)
    metrics = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "small", "stopped")
    ]
    assert [line["epoch"] for line in metrics[0]] == [0, 1]
    for others in metrics[1:]:
        for a, b in zip(metrics[0], others, strict=True):
            assert a["reward_mean"] == pytest.approx(b["reward_mean"], rel=1e-3)
            assert a["kl_base"] == pytest.approx(b["kl_base"], rel=0.05, abs=1e-9)
    assert metrics[0][0]["kl_base"] < metrics[0][1]["kl_base"] and metrics[0][0]["ratio_error"] == 0
    assert metrics[0][1]["updates"] == 2
    config, policy, folder = open_run(str(tmp_path / "whole"))
    assert config.algorithm == "drpo" and policy.lora_rank == 4


def test_a_reward_that_is_no_number_stops_it(tiny_turbo, tmp_path):
    options = TURBO | {"reward": "sabotaged", "model": tiny_turbo, "run_dir": tmp_path / "run"}
    result = launch(direct=True, check=False, script="tests/saboteur.py", env={"SABOTAGE": "one NaN"}, **options)
    assert result.returncode == 1 and "returned nan for the prompt" in result.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("run/checkpoints/epoch*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 10}, "one step, not sample.num_steps = 10: set it to 1"),
        ({"eta": 1.0}, "sample.eta = 1.0 must be 0"),
        ({"images_per_prompt": 2}, "sample.images_per_prompt = 2: drpo compares .* at least 4"),
        ({"images_per_epoch": 40}, "images_per_epoch = 40 does not split .* use 32 or 48"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    config = get_config()
    config.algorithm = "drpo"
    sample = {"num_steps": 1, "eta": 0.0, "images_per_prompt": 4, "images_per_epoch": 32} | options
    config.sample.update(sample)
    with pytest.raises(InputError, match=message):
        check(config)


@pytest.mark.parametrize("variant", ["emoji", "emoji,incompressibility", "sd", "sdxl"])
def test_the_presets_hold_together(variant):
    config = turbo(variant)
    check(config)
    groups = config.sample.images_per_epoch // config.train.updates_per_epoch // config.sample.images_per_prompt
    assert groups >= 4 and config.algorithm == "drpo" and config.lora_rank == 16
    if variant == "sdxl":
        check(config, processes=8)


def test_a_model_of_many_steps_is_refused(tiny, tmp_path):
    result = launch(direct=True, check=False, run_dir=tmp_path / "run", model=tiny, **TURBO)
    assert result.returncode == 1 and "timestep_spacing trailing" in result.stderr.splitlines()[-1]


def test_features_of_a_model_without_a_unet_are_refused(tiny_turbo, tiny_sd3, tmp_path):
    options = TURBO | {"model": tiny_turbo, "train__drift_model": tiny_sd3, "run_dir": tmp_path / "run"}
    result = launch(direct=True, check=False, **options)
    assert result.returncode == 1 and "which has no UNet" in result.stderr.splitlines()[-1]
