"""Prompt sets.

A set is a function without arguments that returns its full list of `(prompt, metadata)` pairs; training draws from
that list uniformly. The metadata is a dict for the reward function, empty when it needs none.

To add a set: write one such function, and put it in `PROMPT_SETS` below.
"""

import functools
import json
from pathlib import Path

from ddpo.errors import InputError, choose, shorten
from ddpo.seeds import numpy_generator

ASSETS = Path(__file__).parent / "assets"
ACTIVITIES = ("washing the dishes", "riding a bike", "playing chess")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")  # GenEval's
# Some of the 80 classes of COCO that GenEval takes its objects from.
OBJECTS = (
    "airplane apple backpack banana bear bench bicycle bird boat book bottle bowl bus cake car cat chair clock couch "
    "cow cup dog donut elephant fork giraffe horse kite laptop motorcycle pizza sandwich sheep skateboard spoon "
    "suitcase train umbrella vase zebra"
).split()
SURFACES = (
    "A sign", "A neon sign", "A street sign", "A wooden board", "A shop window", "A film poster", "A book cover",
    "A birthday cake", "A coffee mug", "A T-shirt", "A chalkboard", "A stone tablet", "A newspaper", "A balloon",
    "A bus", "A phone screen",
)  # fmt: skip
WRITINGS = (
    "Open", "Closed", "Sale", "Exit", "Hello", "Welcome", "Thank You", "Good Morning", "Stop", "Slow", "One Way",
    "Bakery", "Fresh Fish", "Book Fair", "Happy Birthday", "Mind the Step", "No Parking", "Lost Cat", "Coming Soon",
    "Free Hugs", "Summer", "Winter Tales", "Jazz Night", "Quiet Please", "Be Kind", "Dream Big", "Wet Paint", "Push",
    "Library", "Platform Nine", "Garden", "To the Moon", "Keep Left", "Hot Soup", "Puzzle", "Beware of the Dog",
    "Zebra Crossing", "Sold Out", "New York", "Est 1987",
)  # fmt: skip


@functools.cache
def english():
    """The grammar of words. Importing it takes seconds, so only those who need it do."""
    import inflect

    return inflect.engine()


def imagenet_animals():
    """The 398 animal classes of ImageNet-1k (class ids 0 to 397): "a tench"."""
    return from_file(ASSETS / "imagenet_animals.txt")


def common_animals():
    """The DDPO paper's 45 common animals: "a cat"."""
    return from_file(ASSETS / "common_animals.txt")


def animal_activities():
    """Each common animal doing each of three things that animals do not do: "a cat washing the dishes"."""
    return [
        (f"{prompt} {activity}", {"animal": prompt.split()[-1], "activity": activity})
        for prompt, _ in common_animals()
        for activity in ACTIVITIES
    ]


def counting():
    """Two to eight of each common animal, with questions about the image and their answers: "three cats"."""
    pairs = []
    for prompt, _ in common_animals():
        animal = prompt.split()[-1]
        plural = english().plural_noun(animal)
        questions = [f"How many {plural} are there in this image?", "What animal is in this image?"]
        for count in range(2, 9):
            number = english().number_to_words(count)
            pairs.append((f"{number} {plural}", {"questions": list(questions), "answers": [number, animal]}))
    return pairs


def ocr():
    """Each of 40 short texts on each of 16 things, for the reward ocr: 'A street sign that says "Slow"', the form of
    Flow-GRPO's prompts."""
    return [(f'{surface} that says "{text}"', {}) for surface in SURFACES for text in WRITINGS]


def geneval():
    """Prompts of GenEval's kinds (arXiv 2310.11513) with its metadata, for the reward geneval. For each of 40 objects
    four of positions, three of numbers, two of two coloured objects, one of a colour and one of two objects: near the
    7 : 5 : 3 : 1 : 1 of Flow-GRPO. Some may be among GenEval's own 553: leave those out before you report its score."""
    pairs, a = [], english().a
    for i, name in enumerate(OBJECTS):
        others = [OBJECTS[(i + step) % len(OBJECTS)] for step in (1, 6, 11, 16, 21, 26, 31)]
        for place, other in zip(("left of", "right of", "above", "below"), others):
            objects = [{"class": other, "count": 1}, {"class": name, "count": 1, "position": [place, 0]}]
            pairs.append((f"{a(name)} {place} {a(other)}", objects))
        for count in (2, 3, 4):
            counted = f"{english().number_to_words(count)} {english().plural_noun(name)}"
            pairs.append((counted, [{"class": name, "count": count}]))
        for k, other in enumerate(others[4:6]):
            color, second = COLORS[(i + k) % 10], COLORS[(i + 4 * k + 3) % 10]
            objects = [{"class": name, "count": 1, "color": color}, {"class": other, "count": 1, "color": second}]
            pairs.append((f"{a(f'{color} {name}')} and {a(f'{second} {other}')}", objects))
        color = COLORS[(i + 5) % 10]
        pairs.append((a(f"{color} {name}"), [{"class": name, "count": 1, "color": color}]))
        pairs.append((f"{a(name)} and {a(others[6])}", [{"class": c, "count": 1} for c in (name, others[6])]))
    return [(f"a photo of {text}", {"include": objects}) for text, objects in pairs]


def from_file(path):
    """The prompts of a UTF-8 text file, one a line; or of JSON lines (*.jsonl), each {"prompt": ..., and the metadata}.
    Blank lines are ignored."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # -sig: some editors begin the file with a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"cannot read the prompt file {str(path)!r}: {reason}") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise InputError(f"the prompt file {str(path)!r} has no prompts: it needs one per line")
    if str(path).endswith(".jsonl"):
        return [_from_json(line, f"{path}, line {number}") for number, line in lines]
    if lines[0][1].startswith('{"'):
        raise InputError(f"the prompt file {str(path)!r} looks like JSON lines: let its name end in .jsonl")
    return [(line, {}) for _, line in lines]


def _from_json(line, where):
    """The (prompt, metadata) of a JSON line."""
    try:
        metadata = json.loads(line)
        prompt = metadata.pop("prompt").strip()
    except (ValueError, KeyError, AttributeError, TypeError):
        prompt = ""
    if not prompt:
        raise InputError(f'{where}: a line must be a JSON object with a text "prompt", such as {{"prompt": "a cat"}}')
    return prompt, metadata


PROMPT_SETS = {
    "imagenet_animals": imagenet_animals,
    "common_animals": common_animals,
    "animal_activities": animal_activities,
    "counting": counting,
    "geneval": geneval,
    "ocr": ocr,
}


def is_file(name):
    """Whether the name of a prompt set is meant as a file's path."""
    return "/" in name or name.endswith((".txt", ".jsonl"))


def get_prompts(name):
    """The `(prompt, metadata)` pairs of the set called `name`, or of the file at the path `name`."""
    if is_file(name):
        return from_file(name)
    return choose("prompt set", name, PROMPT_SETS)()


def check_length(prompts, tokenizer):
    """Refuse prompts longer than `tokenizer.model_max_length`: what goes beyond would be cut without a word.

    Args:
        prompts: the prompts, as strings.
        tokenizer: the text encoder's tokenizer. The start and end tokens that it adds count.
    """
    prompts, limit = list(prompts), tokenizer.model_max_length
    lengths = [len(ids) for ids in tokenizer(prompts, verbose=False).input_ids]
    too_long = [(prompt, length) for prompt, length in zip(prompts, lengths, strict=True) if length > limit]
    if too_long:
        prompt, length = too_long[0]
        raise InputError(
            f"the prompt {shorten(prompt)} has {length} tokens and the text encoder takes {limit}; shorten it "
            f"({len(too_long)} of {len(lengths)} prompts are too long)"
        )


def draw_prompt(prompt_set, seed, epoch, index):
    """The (prompt, metadata) of sample `index` of an epoch."""
    return prompt_set[numpy_generator("prompt", seed, epoch, index).integers(len(prompt_set))]
