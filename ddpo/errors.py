"""Errors that end in one line, and choices by name."""

import argparse
import difflib
import math
import sys


class InputError(ValueError):
    """What the user gave cannot work. The message is one line that says what is wrong and what to do."""


def nearest(name, choices):
    """ " Did you mean X?", or nothing if no choice is near."""
    found = difflib.get_close_matches(str(name), list(choices), n=1, cutoff=0.5)
    return f" Did you mean {found[0]}?" if found else ""


def choose(kind, name, choices):
    """choices[name]; or an InputError that names the nearest choice, and all."""
    if name not in choices:
        raise InputError(f"unknown {kind} {name!r}.{nearest(name, choices)} There is: {', '.join(choices)}")
    return choices[name]


def shorten(text, length=80):
    """A text in quotes, cut to fit in a message of one line."""
    return repr(text if len(text) <= length else text[: length - 3] + "...")


def at_least(lowest, number=int):
    """A `type` of argparse's add_argument: a number that is not below `lowest`, nor nan."""

    def convert(text):
        value = number(text)
        if not value >= lowest:
            raise argparse.ArgumentTypeError(f"{text} must be at least {lowest}")
        return value

    convert.__name__ = number.__name__  # of which argparse says that a text is none
    return convert


def finite(text):
    """A `type` of argparse's add_argument: a number that is neither nan nor infinite."""
    if not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"{text} must be finite")
    return float(text)


def run_script(main):
    """Runs a script's main(); an InputError ends it with its one line and exit code 1."""
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
