"""The emoji world: small images with captions, on which the embedded Stable Diffusion was trained.

One of the paper's 45 common animals, drawn with its glyph from a colour emoji font, stands on a background of a named
texture and colour; in some images it also does one of the paper's three activities, shown by a second glyph. The
caption may leave the background unsaid, so "a cat" covers every background: a policy that is paid for small files
can learn to choose plain ones, one that is paid for large files textured ones.

Only `scripts.make_emoji_model` draws images, and only that needs the font (Debian: fonts-noto-color-emoji). The names
below are also the embedded model's vocabulary.
"""

import functools
import os
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"  # SIL Open Font License 1.1
FONT_SIZE = 109  # the one size at which the bitmaps of this font exist
SIZE = 64  # pixels a side

ANIMALS = {
    "cat": "🐱", "dog": "🐶", "horse": "🐴", "monkey": "🐵", "rabbit": "🐰", "zebra": "🦓", "spider": "🕷", "bird": "🐦",
    "sheep": "🐑", "deer": "🦌", "cow": "🐮", "goat": "🐐", "lion": "🦁", "tiger": "🐯", "bear": "🐻", "raccoon": "🦝",
    "fox": "🦊", "wolf": "🐺", "lizard": "🦎", "beetle": "🐞", "ant": "🐜", "butterfly": "🦋", "fish": "🐠",
    "shark": "🦈", "whale": "🐳", "dolphin": "🐬", "squirrel": "🐿", "mouse": "🐭", "rat": "🐀", "snake": "🐍",
    "turtle": "🐢", "frog": "🐸", "chicken": "🐔", "duck": "🦆", "goose": "🪿", "bee": "🐝", "pig": "🐷",
    "turkey": "🦃", "fly": "🪰", "llama": "🦙", "camel": "🐫", "bat": "🦇", "gorilla": "🦍", "hedgehog": "🦔",
    "kangaroo": "🦘",
}  # fmt: skip
ACTIVITIES = {"riding a bike": "🚲", "playing chess": "♟", "washing the dishes": "🍽"}
TEXTURES = {"plain": 0.26, "gradient": 0.2, "striped": 0.18, "dotted": 0.18, "checkered": 0.18}  # name -> frequency
COLOURS = {
    "white": (240, 240, 240), "gray": (150, 152, 156), "red": (222, 100, 96), "orange": (240, 168, 92),
    "yellow": (244, 222, 110), "green": (128, 192, 118), "blue": (112, 158, 224), "purple": (168, 126, 204),
    "pink": (240, 168, 196), "brown": (164, 124, 96),
}  # fmt: skip

# Animal x activity pairs that no training image shows: five per activity, to test generalisation on.
HELD_OUT = {
    "riding a bike": ("cat", "tiger", "duck", "bear", "pig"),
    "playing chess": ("dog", "rabbit", "snake", "lion", "bee"),
    "washing the dishes": ("monkey", "fox", "frog", "raccoon", "turtle"),
}

ACTIVITY_FREQUENCY = 0.3  # share of images with a second object
NAMED_BACKGROUND_FREQUENCY = 0.35  # share of captions that say the background, if there is no activity


@dataclass(frozen=True)
class Scene:
    """What an image shows. `activity` is "" for an animal alone."""

    animal: str
    activity: str
    texture: str
    colour: str


def sample_scene(rng, held_out=False):
    """Draws a scene. `rng` is a numpy Generator; `held_out=True` draws one of the pairs training never shows."""
    if held_out:
        activity = str(rng.choice(list(ACTIVITIES)))
        animal = str(rng.choice(HELD_OUT[activity]))
    else:
        activity = str(rng.choice(list(ACTIVITIES))) if rng.random() < ACTIVITY_FREQUENCY else ""
        animal = str(rng.choice([a for a in ANIMALS if a not in HELD_OUT.get(activity, ())]))
    texture = str(rng.choice(list(TEXTURES), p=list(TEXTURES.values())))
    return Scene(animal, activity, texture, str(rng.choice(list(COLOURS))))


def caption(scene, rng):
    """A caption in the paper's wording: "a cat", "a cat riding a bike" or "a cat on a plain blue background"."""
    plain, full = captions(scene)
    return full if not scene.activity and rng.random() < NAMED_BACKGROUND_FREQUENCY else plain


def captions(scene):
    """What `caption` chooses from: without the background, and with it (the same if there is an activity)."""
    words = f"{article(scene.animal)} {scene.animal}"
    if scene.activity:
        return (f"{words} {scene.activity}",) * 2
    return words, f"{words} on a {scene.texture} {scene.colour} background"


def article(noun):
    """ "a" or "an"."""
    return "an" if noun[0] in "aeiou" else "a"


def render(scene, rng):
    """Draws a scene at a random size, place and flip. Returns an RGB PIL image, SIZE x SIZE."""
    image = Image.fromarray(background(scene.texture, COLOURS[scene.colour], rng))
    if not scene.activity:
        width = rng.uniform(38, 60)
        centre = SIZE / 2 + rng.uniform(-1, 1, 2) * (2 + (60 - width) / 4)  # a small animal may stand further out
        _paste(image, ANIMALS[scene.animal], rng, width, centre)
        return image
    # The animal stands above and to one side, the object below to the other, a little in front of it.
    side = rng.choice([-1, 1])
    animal_at = (32 - side * rng.uniform(4, 10), rng.uniform(22, 26))
    object_at = (32 + side * rng.uniform(8, 13), rng.uniform(44, 48))
    _paste(image, ANIMALS[scene.animal], rng, width=rng.uniform(36, 44), centre=animal_at)
    _paste(image, ACTIVITIES[scene.activity], rng, width=rng.uniform(26, 34), centre=object_at)
    return image


def background(texture, colour, rng):
    """(SIZE, SIZE, 3) uint8: the named colour, jittered, alone or mixed with a lighter or darker one by a pattern."""
    base = np.asarray(colour, dtype=np.float64) + rng.uniform(-10, 10, 3)
    other = base * rng.uniform(0.55, 0.7) if rng.random() < 0.5 else base + (255 - base) * rng.uniform(0.55, 0.8)
    if base.min() > 200:  # white: a lighter colour would not show
        other = base * rng.uniform(0.55, 0.7)
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float64)
    angle, period = rng.uniform(0, np.pi), rng.uniform(8, 13)
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    phase = rng.uniform(0, period, 2)
    if texture == "plain":
        mix = np.zeros((SIZE, SIZE))
    elif texture == "gradient":
        mix = (along - along.min()) / np.ptp(along)
    elif texture == "striped":
        mix = _smooth_step(np.sin(2 * np.pi * (along + phase[0]) / period))
    elif texture == "dotted":
        u, v = (np.mod(along + phase[0], period) - period / 2), (np.mod(across + phase[1], period) - period / 2)
        mix = _smooth_step(0.32 * period - np.hypot(u, v), width=0.7)
    elif texture == "checkered":
        waves = np.sin(np.pi * (x + phase[0]) / period) * np.sin(np.pi * (y + phase[1]) / period)
        mix = _smooth_step(waves)
    else:
        raise ValueError(f"unknown texture {texture!r}: one of {', '.join(TEXTURES)}")
    return np.clip(base + (other - base) * mix[..., None], 0, 255).astype(np.uint8)


def _smooth_step(x, width=0.3):
    return np.clip(x / (2 * width) + 0.5, 0, 1)  # anti-aliased edge where x crosses 0


def _paste(image, glyph, rng, width, centre):
    picture = _glyph(glyph)
    scale = width / max(picture.size)
    picture = picture.resize([max(1, round(s * scale)) for s in picture.size], Image.Resampling.BOX)
    if rng.random() < 0.5:
        picture = ImageOps.mirror(picture)
    left, top = (round(c - s / 2) for c, s in zip(centre, picture.size))
    image.paste(picture, (left, top), picture)


@functools.cache
def _glyph(character):
    """The glyph as an RGBA image, cropped to what is not transparent. Raises FileNotFoundError without the font."""
    if not os.path.exists(FONT):
        raise FileNotFoundError(
            f"{FONT} is not there: install the Noto Color Emoji font (Debian: apt-get install fonts-noto-color-emoji)"
        )
    image = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(image).text((8, 8), character, font=ImageFont.truetype(FONT, FONT_SIZE), embedded_color=True)
    return image.crop(image.getbbox())
