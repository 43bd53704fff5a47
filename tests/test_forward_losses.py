"""The losses on the finished image against their formulas, written out in float64 sample by sample, and what the
formulas imply."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from config.base import get_config
from ddpo.batches import plan_updates
from ddpo.likelihood import Draws, Rollout, must_rescore
from ddpo.losses import ALGORITHMS
from ddpo.pipeline_logprob import Trajectories
from ddpo.policy import load_policy

OPTIONS = SimpleNamespace(
    clip_range=0.05, advantage_clip=2.0, anchor_weight=0.3, nft_beta=0.7, ram_scale=0.4, dpo_beta=6.0
)
ADVANTAGES = torch.tensor([0.5, -0.5, 3.0, -3.0, 0.0, 0.0], dtype=torch.float64)  # two beyond the advantage clip
SHAPE = (6, 4, 3, 3)
FORWARD = ("awm", "nft", "ram", "dpo")


def draws(seed=0, apart=0.3):
    """Draws of 6 samples whose output differs from the old and the base model's by `apart`, or equals them at 0."""
    generator = torch.Generator().manual_seed(seed)
    output, target, old, base = (torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(4))
    scale = torch.rand(6, 1, 1, 1, generator=generator, dtype=torch.float64) + 0.5
    return Draws(output.requires_grad_(), target, output.detach() + apart * old, output.detach() + apart * base, scale)


def gradient(name, terms, advantages):
    loss, _ = ALGORITHMS[name].loss(terms, advantages, OPTIONS)
    return loss.detach(), torch.autograd.grad(loss.sum(), terms.output)[0]


def by_hand(name, terms, advantages):
    """(losses, gradient of their sum) by NumPy, the gradient by the derivative worked out on paper."""
    output, target, old, base, scale = (x.detach().numpy() for x in terms)
    A, d = advantages.numpy(), output[0].size
    losses, gradients = np.zeros(6), np.zeros(SHAPE)
    for i in range(6):
        error, old_error = ((output - target)[i] ** 2).mean(), ((old - target)[i] ** 2).mean()
        if name == "awm":
            ratio, low, high = np.exp(old_error - error), 0.95, 1.05
            losses[i] = -min(A[i] * ratio, A[i] * min(max(ratio, low), high)) + 0.3 * ((output - old)[i] ** 2).mean()
            if (A[i] > 0 and ratio < high) or (A[i] < 0 and ratio > low):
                gradients[i] = A[i] * ratio * 2 * (output - target)[i] / d
            gradients[i] += 0.3 * 2 * (output - old)[i] / d
        elif name == "nft":
            r, b = min(max(A[i] / 4 + 0.5, 0), 1), 0.7
            plus, minus = (1 - b) * old[i] + b * output[i], (1 + b) * old[i] - b * output[i]
            for weight, implied, sign in ((r, plus, 1), (1 - r, minus, -1)):
                e = scale[i] * (implied - target[i])
                losses[i] += 2 / b * weight * (e**2).mean() / np.abs(e).mean()
                gradients[i] += 2 / b * weight * 2 * e * scale[i] * sign * b / d / np.abs(e).mean()
        elif name == "ram":
            aim = base[i] + 0.4 * A[i] * (target[i] - old[i])
            losses[i] = ((output[i] - aim) ** 2).mean()
            gradients[i] = 2 * (output[i] - aim) / d
    if name == "dpo":
        excess = ((output - target) ** 2).mean((1, 2, 3)) - ((base - target) ** 2).mean((1, 2, 3))
        for i in range(0, 6, 2):
            best, worst = (i, i + 1) if A[i] > 0 else (i + 1, i)
            margin = excess[best] - excess[worst]
            pair = np.log1p(np.exp(3.0 * margin))  # -log sigmoid(-beta / 2 margin)
            share = 3.0 / (1 + np.exp(-3.0 * margin))
            losses[[i, i + 1]] = np.abs(A[[i, i + 1]]) * pair
            for j, sign in ((best, 1), (worst, -1)):
                gradients[j] = 2 * np.abs(A[j]) * share * sign * 2 * (output - target)[j] / d
    return losses, gradients


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_are_the_formulas(name, seed):
    terms = draws(seed)
    loss, got = gradient(name, terms, ADVANTAGES)
    expected, expected_gradient = by_hand(name, terms, ADVANTAGES)
    torch.testing.assert_close(loss, torch.tensor(expected))
    torch.testing.assert_close(got, torch.tensor(expected_gradient))


@pytest.mark.parametrize("name", FORWARD)
def test_no_advantage_no_gradient(name):
    """At the base model, with the weights that sampled, advantages of zero leave the weights alone."""
    _, got = gradient(name, draws(apart=0), torch.zeros(6, dtype=torch.float64))
    assert got.abs().max() < 1e-12


@pytest.mark.parametrize("name", FORWARD)
def test_a_first_step_lowers_the_error_of_good_samples_and_raises_that_of_bad_ones(name):
    terms = draws(apart=0)
    _, got = gradient(name, terms, ADVANTAGES)
    along = (got * (terms.output - terms.target).detach()).sum((1, 2, 3))  # > 0: descent lowers the error
    assert torch.equal(along.sign(), ADVANTAGES.sign())


@pytest.mark.parametrize("name", FORWARD)
def test_terms_that_are_to_be_constants_have_no_gradient(name):
    """Only through the output: the old and the base model's are other networks' outputs."""
    terms = draws()
    terms = terms._replace(old=terms.old.requires_grad_(), base=terms.base.requires_grad_())
    loss, info = ALGORITHMS[name].loss(terms, ADVANTAGES, OPTIONS)
    assert loss.requires_grad and not any(value.requires_grad for value in info.values())


def test_in_velocity_and_in_noise_it_is_one_loss_up_to_a_weight():
    """With x_t fixed, velocity = noise / alpha + a constant, so distances of velocities are those of noises divided by
    alpha^2, for any two predictions; nft, in x_0, does not change at all."""
    alpha, sigma = 0.6, 0.8
    noise_terms, x_t = draws(), torch.randn(SHAPE, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    def velocity(noise):  # v = alpha noise - sigma x_0, with x_0 = (x_t - sigma noise) / alpha
        return alpha * noise - sigma * (x_t - sigma * noise) / alpha

    v_terms = Draws(*(velocity(x) for x in noise_terms[:4]), torch.full((6, 1, 1, 1), sigma, dtype=torch.float64))
    noise_terms = noise_terms._replace(x_0_scale=torch.full((6, 1, 1, 1), sigma / alpha, dtype=torch.float64))
    torch.testing.assert_close(v_terms.error, noise_terms.error / alpha**2)
    torch.testing.assert_close(v_terms.kl_base, noise_terms.kl_base / alpha**2)
    for name, weight in (("nft", 1), ("ram", alpha**2)):
        losses = [ALGORITHMS[name].loss(t, ADVANTAGES, OPTIONS)[0] for t in (noise_terms, v_terms)]
        torch.testing.assert_close(losses[0], losses[1] * weight)


def test_the_loss_of_a_pair_depends_only_on_which_is_better():
    """-log sigmoid of the same margin, whichever of the two comes first; log 2 at the base model."""
    terms, weights = draws(), torch.tensor([1.0, -1, 1, -1, 1, -1], dtype=torch.float64)
    turned = Draws(*(None if x is None else x.view(3, 2, *x.shape[1:]).flip(1).flatten(0, 1) for x in terms))
    one, other = (ALGORITHMS["dpo"].loss(t, w, OPTIONS)[0] for t, w in ((terms, weights), (turned, -weights)))
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(
        ALGORITHMS["dpo"].loss(draws(apart=0), weights, OPTIONS)[0], torch.full((6,), np.log(2.0), dtype=torch.float64)
    )


def test_best_of_a_group():
    config = SimpleNamespace(sample=SimpleNamespace(images_per_prompt=3))
    rewards = np.array([1.0, 3, 2, 5, 5, 5, -1, -3, -2])
    weight = ALGORITHMS["best_of_n"].weigh(rewards, None, None, config)
    assert weight.tolist() == [0, 3, 0, 0, 0, 0, 3, 0, 0]
    assert ALGORITHMS["dpo"].weigh(rewards, None, None, config).tolist() == [-1.5, 1.5, 0, 0, 0, 0, 1.5, -1.5, 0]


def test_pairs_stay_together():
    """In every minibatch a pair's two samples follow one another, with the same draw, whatever the batch size; a group
    of equal rewards is left out."""
    weights = torch.tensor([0.0, 2, -2, 0, 0, 0, 0, 0, -2, 0, 0, 2, 2, 0, -2, 0])  # groups of 4; the second is of ties
    pairs = {(1, 2), (8, 11), (12, 14)}
    for batch_size in (1, 2, 3, 5, 8):
        train = SimpleNamespace(inner_epochs=2, updates_per_epoch=2, batch_size=batch_size, draws=3,
                                timestep_choice="random")  # fmt: skip
        config = SimpleNamespace(train=train, sample=SimpleNamespace(num_steps=5))
        seen = []
        for minibatches in plan_updates(config, ALGORITHMS["dpo"], 0, weights):
            for sample, step in minibatches:
                assert len(sample) % 2 == 0 and torch.equal(step[::2], step[1::2])
                seen += [(pair, int(k)) for pair, k in zip(zip(*sample.view(-1, 2).T.tolist()), step[::2])]
        assert sorted(seen) == sorted((pair, k) for pair in pairs for k in range(6))


@pytest.mark.parametrize("averaged", [False, True])
def test_old_outputs_are_those_of_the_weights_that_sampled(tiny, averaged):
    """Scored before the updates, in training's batches: equal to the output to the bit until a weight changes, and then
    as they were; or those of the moving average."""
    policy, config = load_policy(tiny, 0, "fp32", "cpu"), get_config()
    config.update_from_flattened_dict({
        "algorithm": "awm", "train.draws": 3, "train.batch_size": 2, "train.updates_per_epoch": 2,
        "train.ema_decay": 0.9,
        "sample.averaged": averaged, "sample.num_steps": 3, "sample.guidance_scale": 1.0,
    })  # fmt: skip
    policy.set_timesteps(3)
    policy.prepare_training(config.train, samples_averaged=averaged)

    def move():
        with torch.no_grad():
            for p in policy.trainable_parameters():
                p += 0.02 * torch.randn_like(p)

    if averaged:
        move()  # away from the average
    algorithm = ALGORITHMS["awm"]
    x_0 = torch.randn(4, 1, *policy.latent_shape())
    rollout = Rollout(policy, config, algorithm, 0, [0, 1, 2, 3], ["a cat"] * 4,
                      Trajectories([], x_0, None, None, policy.scheduler.timesteps))  # fmt: skip
    plan = plan_updates(config, algorithm, 0, torch.ones(4))
    assert sum(len(sample) for minibatches in plan for sample, _ in minibatches) == 4 * 3

    def terms():
        with torch.no_grad():
            return [rollout.score(sample, step) for minibatches in plan for sample, step in minibatches]

    with policy.sampling_weights():
        expected = [t.output for t in terms()]
        rollout.rescore(plan)
    before = terms()
    assert all(torch.equal(t.old, e) for t, e in zip(before, expected))
    assert all(torch.equal(t.old, t.output) != averaged for t in before)
    move()
    after = terms()
    assert all(torch.equal(t.old, e) and not torch.equal(t.old, t.output) for t, e in zip(after, expected))


def test_images_of_a_pair_are_noised_alike(tiny):
    """dpo: those of one group get the same timesteps and noise, other groups others; awm: every image its own."""
    policy, config = load_policy(tiny, 4, "fp32", "cpu"), get_config()
    policy.set_timesteps(3)
    config.sample.images_per_prompt, config.train.draws = 2, 3
    for name, alike in (("dpo", [True, False, True]), ("awm", [False, False, False])):
        trajectories = Trajectories([], torch.randn(4, 1, *policy.latent_shape()), None, None, None)
        rollout = Rollout(policy, config, ALGORITHMS[name], 0, [2, 3, 6, 7], ["a cat"] * 4, trajectories)
        t, _, noise = rollout.draws
        for i, same in enumerate(alike):
            assert torch.equal(noise[i], noise[i + 1]) == same and torch.equal(t[i], t[i + 1]) == same


def test_when_old_outputs_take_a_pass_of_their_own():
    """Not for a single update of the weights that sampled, nor for a loss that does not compare."""
    config = get_config()
    for name, updates, averaged, expected in (
        ("awm", 1, False, False), ("awm", 2, False, True), ("awm", 1, True, True),
        ("rwr", 2, False, False), ("dpo", 2, True, False),
    ):  # fmt: skip
        config.train.updates_per_epoch, config.sample.averaged = updates, averaged
        assert must_rescore(config, ALGORITHMS[name], 8) == expected
