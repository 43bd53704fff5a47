"""The reward for counts, colours and positions: answers about known scenes, to the questions as they are asked."""

import json
import re

import numpy as np
import pytest

from ddpo import geneval, prompts
from ddpo.errors import InputError
from ddpo.prompts import english

NUMBERS = {"two": 2, "three": 3, "four": 4}


def scene_of(prompt):
    """What an image that is true to its prompt holds, by the prompt's text alone: {noun: count}, {noun: colour} and
    (noun, place, noun) or None."""
    text = prompt.removeprefix("a photo of ")
    phrase = r"(\w+) (?:(\w+) )?(\w+)"  # a red dog
    place = re.fullmatch(r"an? (\w+) (left of|right of|above|below) an? (\w+)", text)
    if place:
        return {place[1]: 1, place[3]: 1}, {}, place.groups()
    counts, colours = {}, {}
    for part in text.split(" and "):
        number, colour, noun = re.fullmatch(phrase, part).groups()
        counts[english().singular_noun(noun) or noun if number in NUMBERS else noun] = NUMBERS.get(number, 1)
        if colour:
            colours[noun] = colour
    return counts, colours, None


def answer(question, counts, colours, placed):
    """A true answer to a question about a scene."""
    if how_many := re.match(r"How many (\w+) are there in this image\?", question):
        noun = english().singular_noun(how_many[1]) or how_many[1]
        return str(counts.get(noun, counts.get(how_many[1], 0)))
    if colour := re.match(r"What color is the (\w+) in this image\?", question):
        return colours.get(colour[1], "gray").capitalize() + "."
    first, second = re.match(r"In this image, is the (\w+) left of, .* the (\w+)\?", question).groups()
    return placed[1].removesuffix(" of") if placed and (first, second) == (placed[0], placed[2]) else "none"


PROMPTS = prompts.geneval()


@pytest.mark.parametrize(
    "change, most", [("nothing", 1), ("one more of each", 0.75), ("mirrored", 1), ("repainted", 1)]
)
def test_a_true_picture_has_all_terms_and_a_false_one_has_not(change, most):
    """On every prompt of the set; so its metadata say what its text says."""
    mirror = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    paint = dict(zip(prompts.COLORS, prompts.COLORS[1:] + prompts.COLORS[:1]))
    for prompt, metadata in PROMPTS:
        counts, colours, placed = scene_of(prompt)
        changed = change == "one more of each"
        if changed:
            counts = {noun: count + 1 for noun, count in counts.items()}
        if change == "mirrored" and placed:
            placed, changed = (placed[0], mirror[placed[1]], placed[2]), True
        if change == "repainted" and colours:
            colours, changed = {noun: paint[colour] for noun, colour in colours.items()}, True
        questions = geneval.questions_of(metadata)
        value = geneval.score(questions, [answer(q.text, counts, colours, placed) for q in questions])
        assert value <= 0.75 if changed else value == 1, (prompt, value)


def test_the_set_has_each_kind():
    kinds = [
        (len(m["include"]), any("position" in o for o in m["include"]), any("color" in o for o in m["include"]))
        for _, m in PROMPTS
    ]
    sizes = {kind: kinds.count(kind) for kind in set(kinds)}
    positions, pairs = (2, True, False), (2, False, False)
    assert sizes == {positions: 160, (1, False, False): 120, (2, False, True): 80, (1, False, True): 40, pairs: 40}
    assert all(len({o["class"] for o in m["include"]}) == len(m["include"]) for _, m in PROMPTS)
    assert len({prompt for prompt, _ in PROMPTS}) == 440


def score(include, *answers):
    return geneval.score(geneval.questions_of({"include": include}), answers)


def test_counts():
    """1 - |n - count| / count, not below 0."""
    values = [score([{"class": "dog", "count": 3}], str(n)) for n in range(8)]
    np.testing.assert_allclose(values, [0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3, 0, 0], atol=1e-12)
    assert score([{"class": "dog", "count": 1}], "There is no dog.") == 0
    assert score([{"class": "sheep", "count": 2}], "I see two sheep and a dog") == 1
    assert (
        score([{"class": "dog", "count": 2}], "several") == score([{"class": "dog", "count": 2}], "two or three") == 0
    )


def test_colours_and_positions_count_only_with_the_right_numbers():
    colour = [{"class": "dog", "count": 2, "color": "red"}]
    assert score(colour, "2", "red") == 1 and score(colour, "2", "blue") == 0.5
    assert score(colour, "1", "red") == score(colour, "3", "red") == 0.25
    place = [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["above", 0]}]
    assert score(place, "1", "1", "above") == 1 and score(place, "1", "1", "below") == pytest.approx(2 / 3)
    assert score(place, "1", "0", "above") == score(place, "0", "1", "above") == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "kind, expected, right, wrong",
    [
        ("color", "red", ["red", "Red.", "The dog is red.", "red and white", "It isn't blue, it is bright red"],
         ["white and red", "not red", "blue", "", "The red-brown one", "gray"]),
        ("position", "left of", ["left", "Left.", "to the left of the cat", "above and left"],
         ["right", "left, right, above or below", "", "It is not left", "above", "next to it"]),
        ("position", "above", ["above", "over it", "on top of the cat"], ["below", "under it", "left"]),
        ("position", "below", ["below", "underneath", "beneath it", "at the bottom"], ["above", "on top"]),
        ("count", 1, ["1", "one", "There is one dog.", "a single dog"], ["2", "none", "one or two", ""]),
    ],
)  # fmt: skip
def test_answers_are_read_as_a_person_reads_them(kind, expected, right, wrong):
    text = "How many dogs are there in this image?" if kind == "count" else ""
    question = geneval.Question(kind, text, expected, (0,))
    assert [said for said in right if geneval.value(question, said) != 1] == []
    assert [said for said in wrong if geneval.value(question, said) == 1] == []


def test_genevals_own_file_serves(tmp_path):
    """Its form: a tag, objects to include and objects to exclude, the prompt last."""
    lines = [
        {"tag": "counting", "include": [{"class": "clock", "count": 2}], "exclude": [{"class": "clock", "count": 3}],
         "prompt": "a photo of two clocks"},
        {"tag": "position", "include": [{"class": "teddy bear", "count": 1}, {"class": "dog", "count": 1, "position":
         ["right of", 0]}], "prompt": "a photo of a dog right of a teddy bear"},
    ]  # fmt: skip
    (tmp_path / "geneval.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (counting, clocks), (_, bears) = prompts.get_prompts(str(tmp_path / "geneval.jsonl"))
    assert counting == "a photo of two clocks"
    assert [q.expected for q in geneval.questions_of(clocks)] == [2]
    questions = geneval.questions_of(bears)
    assert [q.text.split("?")[0] for q in questions] == [
        "How many teddy bears are there in this image",
        "How many dogs are there in this image",
        "In this image, is the dog left of, right of, above or below the teddy bear",
    ]
    assert geneval.score(questions, ["There is one teddy bear", "one", "right"]) == 1


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"include": []},
        {"include": "cat"},
        {"include": [{"class": "cat"}]},
        {"include": [{"class": " ", "count": 1}]},
        {"include": [{"class": 3, "count": 1}]},
        {"include": [{"class": "cat", "count": 0}]},
        {"include": [{"class": "cat", "count": None}]},
        {"include": [{"class": "cat", "count": 1, "color": 3}]},
        {"include": [{"class": "cat", "count": 1, "position": ["above", 0]}]},  # itself
        {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["above", 2]}]},
        {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["near", 0]}]},
        {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": "above"}]},
        {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": [["above"], 0]}]},
    ],
)
def test_other_metadata_are_refused(monkeypatch, metadata):
    monkeypatch.setattr(geneval, "load_asked", lambda *_: None)
    check = geneval.load_geneval("", "cpu", None).check
    check(PROMPTS)
    with pytest.raises(InputError, match="needs prompts with GenEval's metadata.*'a photo of 3 cats'") as error:
        check([*PROMPTS, ("a photo of 3 cats", metadata)])
    assert "\n" not in str(error.value)
