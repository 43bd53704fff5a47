"""The simulated rater has the taste and noise that it claims, and the committed reward model has learned from it."""

import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from config.emoji import get_config
from ddpo import rewards
from ddpo.errors import InputError
from scripts.simulate_rater import TEMPERATURE, TIE, choose, main, taste


def scene(background, busy=0, size=24):
    """A dark square of `size` pixels on a background colour, with noise of `busy` grey levels."""
    pixels = np.tile(np.array(background, dtype=float), (64, 64, 1))
    pixels += busy * np.random.default_rng(0).uniform(-1, 1, (64, 64, 1))
    pixels[32 - size // 2 : 32 + size // 2, 32 - size // 2 : 32 + size // 2] = 40
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def test_the_taste_is_what_it_says():
    orange, blue = taste(scene((230, 140, 60))), taste(scene((60, 140, 230)))
    busy, large = taste(scene((230, 140, 60), busy=40)), taste(scene((230, 140, 60), size=40))
    assert (
        orange["warm"] > blue["warm"] + 2 and orange["calm"] > busy["calm"] + 2 and large["large"] > orange["large"] + 1
    )
    assert large["taste"] > orange["taste"] > max(blue["taste"], busy["taste"])


def test_the_noise_is_bradley_and_terrys():
    rng, draws = np.random.default_rng(0), 4000
    for difference in (-1.0, 0.0, 0.3):
        votes = [choose(difference, rng) for _ in range(draws)]
        for vote, sign in (("left", 1), ("right", -1)):
            expected = 1 / (1 + np.exp((TIE - sign * difference) / TEMPERATURE))
            assert abs(votes.count(vote) / draws - expected) < 4 * (expected * (1 - expected) / draws) ** 0.5


def test_the_committed_reward_model_likes_warm_backgrounds():
    config = get_config("aesthetic")
    path = config.reward.removeprefix("learned:")
    reward = rewards.get_reward(f"learned:{ROOT / path}", options=config.reward_options)
    pictures = [scene(colour) for colour in ((240, 168, 92), (222, 100, 96), (112, 158, 224), (128, 192, 118))]
    values, _ = reward(pictures, ["a cat"] * 4, [{}] * 4)
    assert values[:2].min() > values[2:].max()


def test_no_clicks_are_overwritten(tmp_path, monkeypatch):
    """A person's, in the file that is the default."""
    scene((230, 140, 60)).save(tmp_path / "a.png")
    (tmp_path / "pairs.jsonl").write_text('{"pair": 0, "prompt": "a cat", "images": ["a.png", "a.png"]}\n')
    for what, name in (("choose", "choices.jsonl"), ("rate", "ratings.csv")):
        (tmp_path / name).write_text("dear\n")
        monkeypatch.setattr(sys, "argv", ["simulate_rater", what, "--pairs", str(tmp_path), "--count", "1"])
        with pytest.raises(InputError, match=f"{name} is there already: choose another --output"):
            main()
        assert (tmp_path / name).read_text() == "dear\n"
