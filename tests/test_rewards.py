"""Rewards, and what happens to one that misbehaves."""

import io

import numpy as np
import pytest
import torch
from conftest import launch
from PIL import Image
from test_train import metrics

from ddpo import rewards
from ddpo.errors import InputError

PROMPTS, METADATA = ["a cat", "a dog"], [{}, {}]


@pytest.fixture
def images():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return [Image.new("RGB", (64, 64), "blue"), Image.fromarray(noise)]


def test_jpeg_rewards_are_file_sizes(images, tmp_path):
    up, info = rewards.compute_rewards(rewards.jpeg_incompressibility, images, PROMPTS, METADATA)
    down, _ = rewards.compute_rewards(rewards.jpeg_compressibility, images, PROMPTS, METADATA)
    sizes = []
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.jpg", quality=95)
        sizes.append((tmp_path / f"{i}.jpg").stat().st_size / 1000)
    np.testing.assert_allclose(up, sizes, rtol=1e-6)
    assert np.array_equal(down, -up) and up.dtype == np.float32 and info["jpeg_kb"].shape == (2,)
    assert up[1] > 3 * up[0]
    assert Image.open(io.BytesIO((tmp_path / "0.jpg").read_bytes())).size == (64, 64)


def test_integer_rewards_become_floats(images):
    values, _ = rewards.compute_rewards(lambda i, p, m: ([1, 2], {}), images, PROMPTS, METADATA)
    assert values.dtype == np.float32


@pytest.mark.parametrize(
    "returned, message",
    [
        (([1.0, float("nan")], {}), "nan for the prompt 'a dog'"),
        (([float("inf"), 1.0], {}), "inf for the prompt 'a cat'"),
        (([1.0], {}), r"shape \(1,\) for 2 images"),
        (([[1.0, 2.0]], {}), r"shape \(1, 2\) for 2 images"),
        ([1.0, 2.0], "must return a pair"),
        ((["high", "low"], {}), "must return numbers"),
    ],
)
def test_bad_returns_are_named(images, returned, message):
    def my_reward(images, prompts, metadata):
        return returned

    with pytest.raises(InputError, match=message) as error:
        rewards.compute_rewards(my_reward, images, PROMPTS, METADATA)
    assert "my_reward" in str(error.value)


def test_a_reward_that_raises_is_named(images):
    def my_reward(images, prompts, metadata):
        raise ZeroDivisionError("oh no")

    here = rf"at tests/test_rewards.py:{my_reward.__code__.co_firstlineno + 1} "
    with pytest.raises(InputError, match="my_reward raised ZeroDivisionError: oh no, " + here):
        rewards.compute_rewards(my_reward, images, PROMPTS, METADATA)


def test_a_reward_without_memory_is_not_blamed_on_a_prompt(images):
    def my_reward(images, prompts, metadata):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(InputError, match=r"my_reward ran out of memory .*reward_options.batch_size") as error:
        rewards.compute_rewards(my_reward, images, PROMPTS, METADATA)
    assert PROMPTS[0] not in str(error.value)


def test_scores_may_come_after_the_next_batch(tiny, tmp_path):
    """A GPU scores a batch while it samples the next. Here each epoch scores its first batch only once the second
    has been sampled: the same run comes out."""
    runs = {}
    for sabotage in ("by prompt", "scores come late"):
        folder = tmp_path / sabotage.replace(" ", "-")
        options = {"model": tiny, "reward": "sabotaged", "script": "tests/saboteur.py", "direct": True}
        launch(run_dir=folder, env={"SABOTAGE": sabotage}, **options)
        runs[sabotage] = metrics(folder)
    assert runs["by prompt"] == runs["scores come late"] and all(line["reward_std"] > 0 for line in runs["by prompt"])


@pytest.mark.parametrize("timeout", [0, 60])
def test_rewards_run_without_gradients(images, timeout):
    """In this thread, and in that of a timeout."""
    weight = torch.ones((), requires_grad=True)

    def my_reward(images, prompts, metadata):
        assert not (weight * 2).requires_grad
        return [float(weight * 2)] * len(images), {}

    assert torch.is_grad_enabled()
    values, _ = rewards.compute_rewards(my_reward, images, ["a"] * len(images), [{}] * len(images), timeout)
    assert (values == 2).all() and torch.is_grad_enabled()
