"""The per-prompt tracker against a direct computation over the whole history."""

import numpy as np

from ddpo.stat_tracking import ADVANTAGES, PerPromptStatTracker


def direct(history, prompts, rewards, buffer_size, min_count, max_age, now):
    out = []
    for prompt, reward in zip(prompts, rewards):
        mine = [(when, r) for when, p, r in history if p == prompt][-buffer_size:]
        mine = [r for when, r in mine if not max_age or now - when < max_age]
        reference = mine if len(mine) >= min_count else rewards
        out.append((reward - np.mean(reference)) / (np.std(reference) + 1e-6))
    return out


def test_against_direct_computation():
    rng = np.random.default_rng(0)
    for max_age in (0, 3):
        tracker, history = PerPromptStatTracker(buffer_size=8, min_count=4, max_age=max_age), []
        for now in range(12):
            prompts = rng.choice(["a cat", "a dog", "an ant", "a bee"], size=10, p=[0.5, 0.3, 0.15, 0.05])
            rewards = rng.normal(size=10)
            history += [(now, p, r) for p, r in zip(prompts, rewards)]
            expected = direct(history, prompts, rewards, 8, 4, max_age, now)
            np.testing.assert_allclose(tracker.update(prompts, rewards), expected, rtol=1e-12)


def test_integer_rewards_give_fractional_advantages():
    advantages = PerPromptStatTracker(32, 16).update(["a"] * 4, np.array([1, 2, 3, 4]))
    np.testing.assert_allclose(advantages, (np.array([1, 2, 3, 4]) - 2.5) / (np.sqrt(1.25) + 1e-6))


def test_constant_rewards_give_zero_not_nan():
    assert np.array_equal(PerPromptStatTracker(32, 2).update(["a"] * 4, np.full(4, 7.0)), np.zeros(4))


def test_shrinkage_is_the_statistics_of_as_many_more_rewards():
    """Of the prompt's rewards, each counted s times over, and the epoch's, counted so that they make up the share."""
    rng = np.random.default_rng(0)
    prompts, rewards = ["a"] * 3 + ["b"] * 9, rng.normal(size=12) + np.repeat([5, 0], [3, 9])
    advantages = PerPromptStatTracker(32, 16, shrinkage=4.0).update(prompts, rewards)
    own, share = rewards[:3], 3 / 7
    mean = share * np.mean(own) + (1 - share) * np.mean(rewards)
    variance = share * np.var(own) + (1 - share) * np.var(rewards)
    np.testing.assert_allclose(advantages[:3], (own - mean) / (np.sqrt(variance) + 1e-6))


def test_shrinkage_lowers_the_variance_where_prompts_differ():
    """Rewards b + w, b of the prompt and w of the sample: the mean squared error of the baseline is lowest near
    shrinkage = var(w) / var(b), and below that of the prompt's own mean and of the epoch's."""
    rng = np.random.default_rng(0)
    prompts = [f"{i}" for i in range(400) for _ in range(3)]
    effects = np.repeat(rng.normal(scale=0.5, size=400), 3)
    rewards = effects + rng.normal(size=1200)
    errors = {}
    for shrinkage in (1e-6, 1.0, 4.0, 16.0, 1e6):
        tracker = PerPromptStatTracker(32, 16, shrinkage=shrinkage)
        ratio = tracker.update(prompts, rewards).reshape(400, 3)
        # Two samples of a prompt have one baseline and one std, which their advantages reveal.
        r = rewards.reshape(400, 3)
        std = (r[:, 0] - r[:, 1]) / (ratio[:, 0] - ratio[:, 1])
        errors[shrinkage] = np.mean((r[:, 0] - std * ratio[:, 0] - effects[::3]) ** 2)
    assert min(errors, key=errors.get) == 4.0


def test_state_restores_exactly():
    rng = np.random.default_rng(0)
    one = PerPromptStatTracker(8, 2, max_age=2)
    one.update(["a", "b"] * 5, rng.normal(size=10))
    two = PerPromptStatTracker(8, 2, max_age=2)
    two.load_state_dict(one.state_dict())
    rewards = rng.normal(size=10)
    assert np.array_equal(one.update(["a", "b"] * 5, rewards), two.update(["a", "b"] * 5, rewards))


def test_advantages_of_groups_sum_to_zero():
    rng = np.random.default_rng(0)
    prompts, rewards = np.array(["a", "b", "c"] * 4), rng.normal(size=12) * 5 + 3
    for name in ("per_group", "leave_one_out", "whole_epoch"):
        advantages = ADVANTAGES[name](prompts, rewards, None)
        groups = [prompts == p for p in "abc"] if name != "whole_epoch" else [np.full(12, True)]
        for group in groups:
            assert abs(advantages[group].sum()) < 1e-9
            if name != "leave_one_out":
                np.testing.assert_allclose(advantages[group].std(), 1, rtol=1e-5)


def test_leave_one_out_is_the_reward_less_the_others_mean():
    rewards = np.array([1, 2, 4, 10])
    expected = [r - np.delete(rewards, i).mean() for i, r in enumerate(rewards)]
    np.testing.assert_allclose(ADVANTAGES["leave_one_out"](["a"] * 4, rewards, None), expected)


def test_per_prompt_is_the_tracker():
    rewards, prompts = np.random.default_rng(0).normal(size=10), ["a", "b"] * 5
    one, two = PerPromptStatTracker(8, 2), PerPromptStatTracker(8, 2)
    assert np.array_equal(ADVANTAGES["per_prompt"](prompts, rewards, one), two.update(prompts, rewards))
    assert one.epoch == 1
