"""The reward `geneval`: whether the image has the prompt's objects, in its numbers, colours and places.

The metadata of a prompt are GenEval's (Ghosh et al., arXiv 2310.11513), so that its files of prompts serve as they are:

    {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "color": "red", "position": ["above", 0]}]}

a list of objects; "color" and "position" are optional, the latter relative to the object of that number in the list:
"left of", "right of", "above" or "below".

The reward is Flow-GRPO's (arXiv 2505.05470): the mean of these terms. For each object 1 - |n - count| / count, n being
how many there are; for its colour, and for its position, 1 or 0, which needs the numbers to be right.

Deviations: a vision-language model answers a question for each term; theirs counts and places what a detector finds
(Mask2Former) and tells colours by a CLIP. So the two rewards mean the same, but each has errors of its own. A count's
term is not below 0. One answer gives the colour, or the place, of all objects of a kind. "exclude" is not read, as in
Flow-GRPO's reward: one object too many is wrong in any case.
"""

from typing import NamedTuple

import numpy as np

from ddpo.errors import InputError, shorten
from ddpo.prompts import COLORS, english
from ddpo.vlm import affirmed, check_usable, count_in, fill, load_asked, words_of

PLACES = {"left": "left of", "right": "right of", "above": "above", "over": "above", "top": "above", "below": "below",
          "under": "below", "beneath": "below", "underneath": "below", "bottom": "below"}  # fmt: skip
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


class Question(NamedTuple):
    kind: str  # "count", "color" or "position"
    text: str
    expected: int | str
    needs: tuple  # the objects, by number, whose counts must be right


def questions_of(metadata):
    """The Questions of a prompt, a term of its reward each; the counts first, in the order of its objects. Raises
    ValueError, KeyError, TypeError or AttributeError if the metadata are not GenEval's."""
    objects = metadata["include"]
    names, counts = [entry["class"].strip().lower() for entry in objects], [int(entry["count"]) for entry in objects]
    if not all(names) or min(counts) < 1:  # min of nothing is a ValueError, too
        raise ValueError("an object without a name, or without number")
    plurals = [english().plural_noun(name) for name in names]
    nouns = [name if count == 1 else plural for name, count, plural in zip(names, counts, plurals)]
    questions = [
        Question("count", f"How many {plural} are there in this image? Answer with a number.", count, (i,))
        for i, (plural, count) in enumerate(zip(plurals, counts))
    ]
    for i, entry in enumerate(objects):
        verb = "is" if counts[i] == 1 else "are"
        if "color" in entry:
            text = f"What color {verb} the {nouns[i]} in this image? Answer with one word."
            questions.append(Question("color", text, entry["color"].lower(), (i,)))
        if "position" in entry:
            place, other = entry["position"]
            if place not in OPPOSITE or other not in range(len(objects)) or other == i:
                raise ValueError("no such place")
            text = (
                f"In this image, {verb} the {nouns[i]} left of, right of, above or below the {nouns[other]}? "
                "Answer with one word: left, right, above or below."
            )
            questions.append(Question("position", text, place, (i, other)))
    return questions


def value(question, answer):
    """The term of a question, in [0, 1], from an answer's text: as if all counts that it needs were right."""
    words = words_of(answer)
    if question.kind == "count":
        counted = count_in(words, question.text.lower())
        return 0.0 if counted is None else max(0.0, 1 - abs(counted - question.expected) / question.expected)
    if question.kind == "color":
        return float(affirmed(words, {*COLORS, question.expected})[:1] == [question.expected])
    places = {PLACES[word] for word in affirmed(words, PLACES)}
    return float(question.expected in places and OPPOSITE[question.expected] not in places)


def score(questions, answers):
    """The reward, in [0, 1], of an image from the answers to its questions, as texts."""
    terms = [value(question, answer) for question, answer in zip(questions, answers)]
    counts = [term for question, term in zip(questions, terms) if question.kind == "count"]
    return np.mean([
        term if question.kind == "count" or all(counts[i] == 1 for i in question.needs) else 0.0
        for question, term in zip(questions, terms)
    ])  # fmt: skip


def load_geneval(model, device, options):
    """Flow-GRPO's reward for counts, colours and positions, by the answers of a vision-language model (ddpo/vlm.py)."""
    ask = load_asked(model, device, options)

    def check(prompt_set):
        for prompt, metadata in prompt_set:
            try:
                questions_of(metadata)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(
                    'it needs prompts with GenEval\'s metadata, {"include": [{"class": "cat", "count": 2}]}, like the '
                    f"set geneval; not {shorten(prompt)}"
                ) from error

    def geneval(images, prompts, metadata):
        """The mean of an image's terms; geneval_correct: whether all are 1, GenEval's accuracy."""
        check(list(zip(prompts, metadata)))
        questions = [questions_of(m) for m in metadata]
        asked = [(image, question.text) for image, own in zip(images, questions) for question in own]
        said = iter(ask(*map(list, zip(*asked))))
        answers = [[next(said) for _ in own] for own in questions]
        usable = check_usable(answers, options.max_unusable)
        values = [score(q, [a.text for a in own]) for q, own, use in zip(questions, answers, usable) if use]
        correct = fill([float(v == 1) for v in values], usable)
        return fill(values, usable), {"geneval_correct": correct, "vlm_unusable": ~usable}

    geneval.check = check
    return geneval
