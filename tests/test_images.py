"""Grids of pictures: large enough to see, with headings that fit."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from ddpo.images import LINES, image_grid, wrap

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [32, 64, 100, 512])
def test_pictures_are_large_enough_to_see(size):
    grid = image_grid([PICTURE.resize((size, size))] * 4, columns=4)
    assert grid.width // 4 - 2 >= 192 and (grid.width // 4 - 2) % size == 0
    shown = grid.crop((0, 0, grid.width // 4 - 2, grid.width // 4 - 2)).resize((size, size), Image.Resampling.BOX)
    assert abs(np.asarray(shown, float) - np.asarray(PICTURE.resize((size, size)), float)).mean() < 20  # unmoved


def test_headings_fit_and_say_when_they_are_cut():
    font = ImageFont.load_default(13)
    for text in ("a cat", "a mouse " * 4, "a mouse " * 40, "W" * 200, "a " + "W" * 200, ""):
        lines = wrap(text, 192, font).split("\n")
        assert len(lines) <= LINES and all(font.getlength(line) <= 192 for line in lines)
        whole = " ".join(lines) == text.strip()
        assert whole == (not lines[-1].endswith("...")) and whole == (len(text) < 40)
    assert wrap("a mouse " * 40, 192, font).startswith("a mouse")


def test_a_heading_runs_on_under_pictures_of_its_own_row_only():
    """Where its neighbour has a heading, nothing may be drawn under that; else the text goes on."""
    text = "a dog riding a bike and then a horse"
    for labels, free in (([text, "", text, ""], True), ([text, " ", text, " "], False)):
        grid = np.asarray(image_grid([PICTURE] * 4, labels, 2).convert("L"))
        under = grid[194 : grid.shape[0] // 2, 194:]
        assert (under.min() < 128) == free
        assert grid[grid.shape[0] // 2 + 194 :, :194].min() < 128
