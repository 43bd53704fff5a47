"""The algorithms against the policy gradient and against closed forms.

The toy is a Gaussian policy N(theta, s^2) on one dimension. With the reward r(x) = -(x - a)^2 the objective is
J(theta) = -(theta - a)^2 - s^2, its gradient -2 (theta - a). With r(x) = b x, weighing samples by exp(beta r) shifts
their mean by beta b s^2; keeping those above a quantile gives a truncated normal.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import Normal

from ddpo import losses
from ddpo.batches import TIMESTEPS, window_of_steps
from ddpo.likelihood import Draws, Transitions
from ddpo.losses import ALGORITHMS, ddpo_is, ddpo_mask, ddpo_sf, ddpo_smooth
from ddpo.stat_tracking import leave_one_out, per_group

CONFIG = SimpleNamespace(
    clip_range=1e-2,
    kl_range=0.5,
    advantage_clip=1e9,
    inverse_temperature=0.7,
    keep_percentile=90.0,
    weight_per_prompt=False,
)
WHOLE = SimpleNamespace(train=CONFIG, sample=SimpleNamespace(images_per_prompt=4))
THETA, S, A, B = 0.4, 0.8, 1.5, 1.3
NO_CLIP = SimpleNamespace(clip_range=1e9, kl_range=1e9)


def draw(count, theta=THETA):
    return Normal(theta, S).sample((count,)).double()


def gradients(x, theta, algorithm, weight, old_theta=None, config=CONFIG):
    """Minus the gradient of each sample's loss with respect to theta."""
    theta = torch.full((len(x),), theta, dtype=torch.float64, requires_grad=True)
    old_theta = theta.detach() if old_theta is None else torch.tensor(old_theta, dtype=torch.float64)
    log_prob, old = Normal(theta, S).log_prob(x), Normal(old_theta, S).log_prob(x)
    kl_old = (theta - old_theta) ** 2 / (2 * S**2)
    # The denoising error (theta - x)^2 is -2 s^2 log p but for a constant.
    draws = Draws(theta[:, None], x[:, None])
    terms = draws if algorithm is losses.rwr else Transitions(log_prob, old, kl_old)
    loss, _ = algorithm(terms, torch.as_tensor(weight), config)
    return -torch.autograd.grad(loss.sum(), theta)[0]


def assert_mean(values, expected):
    """The mean lies within four standard errors of the closed form, and they are small enough to mean something."""
    error = values.std() / len(values) ** 0.5
    assert abs(values.mean() - expected) < 4 * error < 0.2 * abs(expected)


def weigh(name, rewards, prompts=None):
    return ALGORITHMS[name].weigh(np.asarray(rewards), np.asarray(rewards), prompts or ["a"] * len(rewards), WHOLE)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", ["ddpo_is", "ddpo_mask", "ddpo_smooth", "ddpo_sf"])
def test_policy_gradient_has_its_closed_form(name):
    x = draw(200_000)
    weight = weigh(name, -((x - A) ** 2))
    assert_mean(gradients(x, THETA, ALGORITHMS[name].loss, weight), -2 * (THETA - A))


def test_importance_ratio_corrects_for_older_samples():
    """Samples of N(theta', s^2), gradient at theta: the unclipped ratio gives that of J at theta, the score function
    another, which is why it is allowed one update."""
    older = THETA - 0.2
    x = draw(400_000, older)
    reward = -((x - A) ** 2)
    assert_mean(gradients(x, THETA, ddpo_is, reward, older, NO_CLIP), -2 * (THETA - A))
    assert_mean(gradients(x, THETA, ddpo_mask, reward, older, NO_CLIP), -2 * (THETA - A))
    wrong = gradients(x, THETA, ddpo_sf, reward, older)
    assert abs(wrong.mean() + 2 * (THETA - A)) > 20 * wrong.std() / len(x) ** 0.5


@pytest.mark.parametrize("advantage, share", [(leave_one_out, 1), (per_group, 3 / 4)])
def test_baselines_of_a_group(advantage, share, monkeypatch):
    """Leave-one-out is unbiased. The group's own mean takes 1/K off, since it includes the sample (here K = 4, without
    the division by the standard deviation, whose effect has no closed form)."""
    monkeypatch.setattr("ddpo.stat_tracking._normalise", lambda rewards, reference: rewards - reference.mean())
    x = draw(40_000)
    rewards = -((x - A) ** 2)
    groups = [advantage(["a"] * 4, r.numpy(), None) for r in rewards.reshape(-1, 4)]
    values = gradients(x, THETA, ddpo_sf, np.concatenate(groups))
    assert_mean(values.reshape(-1, 4).mean(1), -2 * (THETA - A) * share)


def test_rwr_shifts_the_mean_as_the_tilted_gaussian():
    """The gradient of E_w[log p] is (E_w[x] - theta) / s^2, with E_w[x] = theta + beta b s^2."""
    x = draw(200_000)
    weight = weigh("rwr", B * x)
    assert weight.mean() == pytest.approx(1)
    gradient = gradients(x, THETA, ALGORITHMS["rwr"].loss, weight) / (2 * S**2)  # of log p, see `gradients`
    assert_mean(gradient, CONFIG.inverse_temperature * B)


def test_rwr_sparse_is_the_truncated_gaussian():
    """E[x | x > q] = theta + s pdf(z) / (1 - cdf(z)), z the standard normal's quantile at 0.9."""
    x = draw(200_000)
    weight = weigh("rwr_sparse", B * x)
    assert len(np.unique(weight)) == 2 and (weight > 0).mean() == pytest.approx(0.1, rel=1e-3)
    assert weight.mean() == pytest.approx(1)
    unit = Normal(0.0, 1.0)
    pdf = unit.log_prob(unit.icdf(torch.tensor(0.9))).exp()
    gradient = gradients(x, THETA, ALGORITHMS["rwr_sparse"].loss, weight) / (2 * S**2)
    assert_mean(gradient, float(pdf) / 0.1 / S)


def test_inverse_temperature_zero_weighs_all_alike(monkeypatch):
    monkeypatch.setattr(CONFIG, "inverse_temperature", 0.0)
    assert np.array_equal(weigh("rwr", np.random.default_rng(0).normal(size=20)), np.ones(20))


def test_weights_within_a_prompt(monkeypatch):
    """Each prompt as if it were an epoch of its own, however far apart the prompts' rewards are."""
    monkeypatch.setattr(CONFIG, "weight_per_prompt", True)
    rewards = np.random.default_rng(0).normal(size=40)
    prompts = ["a", "b"] * 20
    for name in ("rwr", "rwr_sparse"):
        together = weigh(name, rewards + 1000 * (np.arange(40) % 2), prompts)
        for i in (0, 1):
            np.testing.assert_allclose(together[i::2], weigh(name, rewards[i::2]), rtol=1e-9)


def transitions(theta, old_theta, x):
    """The terms of B samples x (B, d) of N(old_theta, I), means over the d dimensions."""
    log_prob, old_log_prob = (-((x - t) ** 2 / 2).mean(dim=1) for t in (theta, old_theta))
    kl_old = ((theta - old_theta) ** 2 / 2).mean().expand(len(x))
    return Transitions(log_prob, old_log_prob.detach(), kl_old)


@pytest.mark.parametrize("algorithm", [ddpo_is, ddpo_mask, ddpo_smooth, ddpo_sf])
def test_gradient_before_any_update_is_the_policy_gradient(algorithm):
    """At the old policy grad loss = -E[A grad log p], which for unit Gaussians is -A (x - theta): so all three agree,
    sample by sample."""
    theta = torch.randn(8, requires_grad=True)
    x, advantage = torch.randn(5, 8), torch.randn(5)
    loss, info = algorithm(transitions(theta, theta.detach(), x), advantage, CONFIG)
    (gradient,) = torch.autograd.grad(loss.mean(), theta)
    expected = -(advantage[:, None] * (x - theta) / 8).mean(dim=0)
    torch.testing.assert_close(gradient, expected.detach())
    assert not any(value.any() for value in info.values())


@pytest.mark.parametrize("name", ["ddpo_is", "ddpo_mask", "ddpo_smooth", "ddpo_sf"])
def test_advantages_are_clipped_on_both_sides(name):
    config = SimpleNamespace(train=SimpleNamespace(advantage_clip=2.0))
    clipped = ALGORITHMS[name].weigh(None, np.array([-3.0, -1.0, 1.5, 7.0]), None, config)
    assert clipped.tolist() == [-2.0, -1.0, 1.5, 2.0]


def test_clipping_stops_the_gradient_only_where_it_would_overshoot():
    shift = torch.tensor([0.015, 0.015, -0.015, -0.015, 0.005, -0.005], requires_grad=True)  # log ratio
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    loss, info = ddpo_is(Transitions(shift, torch.zeros(6), torch.zeros(6)), advantage, CONFIG)
    (gradient,) = torch.autograd.grad(loss.sum(), shift)
    # Further up with a positive advantage, or down with a negative one, beyond the range: no gradient.
    assert (gradient != 0).tolist() == [False, True, True, False, True, True]
    assert info["clip_fraction"].tolist() == [1, 1, 1, 1, 0, 0]
    moving = gradient != 0
    torch.testing.assert_close(gradient[moving], (-advantage * shift.exp())[moving].detach())


def test_the_penalty_has_its_closed_form():
    """Samples of N(theta', s^2), gradient at theta: that of J, less E|A| / kl_range * (theta - theta') / s^2."""
    older = THETA - 0.2
    x = draw(400_000, older)
    reward = -((x - A) ** 2)
    pull = float(reward.abs().mean()) / CONFIG.kl_range * (THETA - older) / S**2
    assert_mean(gradients(x, THETA, ddpo_smooth, reward, older), -2 * (THETA - A) - pull)


def climb(algorithm, options, steps=400):
    """D after each of many updates on the same samples of a Gaussian policy in 8 dimensions."""
    theta, x = torch.zeros(8, requires_grad=True), torch.randn(64, 8)
    advantage = x[:, 0] - x[:, 0].mean()
    divergences = []
    for _ in range(steps):
        loss, info = algorithm(transitions(theta, torch.zeros(8), x), advantage, options)
        (gradient,) = torch.autograd.grad(loss.mean(), theta)
        with torch.no_grad():
            theta -= 0.05 * gradient
        divergences.append(float(info["kl_old"].mean()))
    return divergences


def test_mask_and_penalty_bound_the_divergence():
    """Many updates on the same samples: without a bound D runs away; the mask holds it near
    `kl_range`; the penalty holds it where the two gradients
    balance, which for a small range is in proportion to its square."""
    free = climb(ddpo_mask, NO_CLIP)
    options = [SimpleNamespace(clip_range=1e-2, kl_range=limit) for limit in (3e-2, 1e-2)]
    assert free[-1] > 0.01
    for masked in options:
        assert 0.9 * masked.kl_range < max(climb(ddpo_mask, masked)) < 1.5 * masked.kl_range
    wide, narrow = (climb(ddpo_smooth, o) for o in options)
    assert wide[-1] < 0.1 * free[-1] and wide[-1] / narrow[-1] == pytest.approx(9, rel=0.05)
    assert wide[-1] == pytest.approx(wide[-50], rel=0.01)  # it has come to rest


def test_the_mask_drops_only_what_would_go_further():
    """Terms beyond the limit, in the direction of their advantage; the others have the policy gradient."""
    log_ratio = torch.tensor([0.1, 0.1, -0.1, -0.1, 0.1, -0.1], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    kl_old = torch.tensor([0.6, 0.6, 0.6, 0.6, 0.4, 0.4])
    loss, info = ddpo_mask(Transitions(log_ratio, torch.zeros(6), kl_old), advantage, CONFIG)
    (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
    assert (gradient != 0).tolist() == [False, True, True, False, True, True]
    assert info["clip_fraction"].tolist() == [1, 0, 0, 1, 0, 0]
    kept = gradient != 0
    torch.testing.assert_close(gradient[kept], (-advantage * log_ratio.exp())[kept].detach())


def test_approx_kl_is_what_the_exact_divergence_makes_it():
    """In d dimensions the mean log-ratio has mean -D and variance 2 D / d, so approx_kl is D / d + D^2 / 2."""
    theta, x = torch.full((64,), 0.2), torch.randn(100_000, 64)
    _, info = ddpo_is(transitions(theta, torch.zeros(64), x), torch.ones(len(x)), CONFIG)
    divergence = float(info["kl_old"].mean())
    assert divergence == pytest.approx(0.02)
    error = float(info["approx_kl"].std()) / len(x) ** 0.5
    assert abs(float(info["approx_kl"].mean()) - (divergence / 64 + divergence**2 / 2)) < 4 * error


def test_timestep_choices():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        for name, rule in TIMESTEPS.items():
            steps = rule(rng, 10, 4)
            assert len(set(steps)) == 4 and (np.diff(steps) > 0).all() and 0 <= steps[0] and steps[-1] < 10
            assert name == "random" or steps[-1] - steps[0] == 3
            assert name != "first" or steps[0] == 0
    starts = {int(window_of_steps(np.random.default_rng(s), 10, 4)[0]) for s in range(100)}
    assert starts == set(range(7))
