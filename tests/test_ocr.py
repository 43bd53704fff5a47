"""The reward that reads text in images, on images of known text. What reads is an optional package: where it is not
installed, tests that need it are skipped."""

import itertools
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, launch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw, ImageFont
from test_train import metrics

from ddpo import ocr, prompts, rewards
from ddpo.errors import InputError


def drawn(text, size=(512, 512), height=80, ink="black", paper="white"):
    """An image with a text in its middle."""
    image = Image.new("RGB", size, paper)
    place = size[0] // 2, size[1] // 2
    ImageDraw.Draw(image).text(place, text, fill=ink, font=ImageFont.load_default(height), anchor="mm", align="center")
    return image


@pytest.fixture(scope="module")
def reader():
    pytest.importorskip("rapidocr", reason="the ocr reward needs rapidocr and onnxruntime")
    return rewards.get_reward("ocr")


def test_edit_distance_is_the_shortest_way_of_single_edits():
    """By the definition: breadth-first search among all strings of at most four letters, between which a step inserts,
    deletes or replaces one. No shortest way needs a longer string than its ends."""
    words = ["".join(letters) for n in range(5) for letters in itertools.product("ab", repeat=n)]

    def edits(word):
        for i in range(len(word) + 1):
            yield from (word[:i] + letter + word[i:] for letter in "ab")
            yield word[:i] + word[i + 1 :]
            yield from (word[:i] + letter + word[i + 1 :] for letter in "ab" if i < len(word))

    for start in words:
        distances, frontier = {start: 0}, [start]
        while frontier:
            found = {(w, distances[v] + 1) for v in frontier for w in edits(v) if w in words and w not in distances}
            distances |= dict(found)
            frontier = [w for w, _ in found]
        assert distances == {word: ocr.edit_distance(start, word) for word in words}


def test_edit_distances_that_are_known():
    pairs = {
        ("kitten", "sitting"): 3,
        ("saturday", "sunday"): 3,
        ("", "abc"): 3,
        ("flaw", "lawn"): 2,
        ("été", "ete"): 2,
    }
    assert {pair: ocr.edit_distance(*pair) for pair in pairs} == pairs


@pytest.mark.parametrize(
    "prompt, metadata, text",
    [
        ('A sign that says "Mind the Step"', {}, "mindthestep"),
        ('"One" and "two"', {}, "one"),
        ("A sign that says “Größe”", {}, "größe"),
        ("a cake", {"text": "Happy  Birthday"}, "happybirthday"),
        ('a "cake"', {"text": "pie"}, "pie"),
        ("a 'cake'", {}, ""),
        ('a " " cake', {}, ""),
        ('an inch is 1"', {}, ""),
    ],
)
def test_the_text_that_is_wanted(prompt, metadata, text):
    assert ocr.wanted_text(prompt, metadata) == text


def test_the_reward_of_what_is_read():
    """1 - min(d, n) / n; what else is written costs nothing once the text is there (Flow-GRPO's code)."""
    reads = {"planet": 1, "planes": 5 / 6, "plane": 5 / 6, "plates": 4 / 6, "plat": 4 / 6, "pen": 2 / 6, "": 0}
    reads |= {"theplanetmars": 1, "xxxxxxxxxxxxxxxxxx": 0}
    assert {read: pytest.approx(ocr.legibility(read, "planet")) for read in reads} == reads


def test_prompts_without_a_quoted_text_are_refused(monkeypatch):
    monkeypatch.setattr(ocr, "load_reader", lambda threads: lambda image: "Open")
    own = prompts.get_prompts("ocr")
    rewards.get_reward("ocr", prompt_set=own)
    for prompt in ("a cat", 'a sign that says ""'):
        with pytest.raises(InputError, match="^reward ocr: it needs prompts that quote the text") as error:
            rewards.get_reward("ocr", prompt_set=[*own, (prompt, {})])
        assert "\n" not in str(error.value) and prompt in str(error.value)
    with pytest.raises(InputError, match="it needs prompts that quote"):
        rewards.compute_rewards(rewards.get_reward("ocr"), [drawn("")], ["a cat"], [{}])
    with pytest.raises(InputError, match="takes no model"):
        rewards.get_reward("ocr:models")


@pytest.mark.parametrize("package", ["rapidocr", "onnxruntime"])
def test_a_missing_package_is_named(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match="^reward ocr: .*pip install rapidocr onnxruntime$") as error:
        rewards.get_reward("ocr + jpeg_compressibility")
    assert "\n" not in str(error.value)


def test_text_in_pictures(reader):
    """Of several sizes, colours and modes; the same image for texts at a growing edit distance; no text."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    planet = drawn("Planet")
    cases = [
        (planet, "Planet", 1),
        (planet, "PLANET", 1),
        (planet, "planets", 6 / 7),
        (planet, "plates", 4 / 6),
        (planet, "dog", 0),
        (drawn("Slow", (300, 160), 40, "yellow", "navy"), "Slow", 1),
        (drawn("Fresh\nFish", (400, 300)).convert("RGBA"), "Fresh Fish", 1),
        (drawn("BEE", (64, 64), 26).convert("L"), "bee", 1),  # the emoji world's size
        (drawn(""), "Open", 0),
        (Image.fromarray(noise), "Open", 0),
        (Image.new("RGB", (8, 8)), "Open", 0),
    ]
    images, texts, expected = zip(*cases)
    values, info = rewards.compute_rewards(reader, images, [f'A sign: "{t}"' for t in texts], [{}] * len(cases))
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    assert info["ocr_exact"].tolist() == [value == 1 for value in expected]


def test_the_embedded_vae_leaves_words_readable(reader):
    """So a model that drew words in its latents could be rewarded for them."""
    vae = AutoencoderKL.from_pretrained(ROOT / "models/emoji/vae")
    for word in ("cat", "SUN", "fox"):
        pixels = torch.tensor(np.asarray(drawn(word, (64, 64), 26))).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        assert (decoded - pixels).abs().max() > 0.05  # it is not the image itself
        image = ((decoded[0] / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        values, _ = reader([Image.fromarray(image)], [f'"{word}"'], [{}])
        assert values == 1


def test_the_channels_are_not_swapped(monkeypatch, reader):
    """The package takes blue, green, red."""
    import rapidocr

    seen = []
    monkeypatch.setattr(rapidocr.RapidOCR, "__call__", lambda self, pixels: seen.append(pixels[0, 0].tolist()))
    with pytest.raises(AttributeError):  # nothing was read
        ocr.load_reader(1)(Image.new("RGB", (16, 16), (1, 2, 3)))
    assert seen == [[3, 2, 1]]


def test_the_command_line_trains_on_it(reader, tiny, tmp_path):
    (tmp_path / "words.txt").write_text('a "cat"\na "dog"\n')
    options = {"num_epochs": 1, "sample__images_per_epoch": 4, "prompts": tmp_path / "words.txt", "reward": "ocr"}
    launch(model=tiny, run_dir=tmp_path / "run", direct=True, **options)
    (line,) = metrics(tmp_path / "run")
    assert 0 <= line["ocr_exact"] <= line["reward_mean"] <= 1
