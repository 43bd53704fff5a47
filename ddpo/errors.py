"""Errors that end in one line, and choices by name."""

import argparse
import difflib
import math
import os
import signal
import sys
import tempfile


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


def one_line(error):
    """What an exception says, in one line, with its type where its text does not stand alone."""
    text = " ".join(str(error).split())
    return text if isinstance(error, (InputError, OSError)) and text else f"{type(error).__name__}: {text}"


def at_least(lowest, number=int, below=math.inf):
    """A `type` of argparse's add_argument: a finite number that is not below `lowest`, but below `below`."""

    def convert(text):
        value = number(text)
        if not value >= lowest:
            raise argparse.ArgumentTypeError(f"{text} must be at least {lowest}")
        if not value < below:
            limit = "finite" if below == math.inf else f"below {below}"
            raise argparse.ArgumentTypeError(f"{text} must be {limit}")
        return value

    convert.__name__ = number.__name__  # of which argparse says that a text is none
    return convert


def finite(text):
    """A `type` of argparse's add_argument: a number that is neither nan nor infinite."""
    if not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"{text} must be finite")
    return float(text)


seed = at_least(0, below=2**32)  # whatever is made of it then fits a generator's 64 bits


def check_folder(folder):
    """Raises InputError if no file can be written in a folder, or it cannot be made: before the work, not after it."""
    existing = os.path.abspath(folder or ".")
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise InputError(f"nothing can be written in {folder or '.'!r}: {error.strerror}") from error


def check_output(path, endings=()):
    """Makes a file's folder and raises InputError if it cannot be written. endings: those that its name may have."""
    if endings and not path.lower().endswith(endings):
        raise InputError(f"{path!r}: the name must end in {', '.join(endings)}")
    if os.path.isdir(path):
        raise InputError(f"{path!r} is a folder: name a file")
    check_folder(os.path.dirname(path))
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    if os.path.exists(path) and not os.access(path, os.W_OK):
        raise InputError(f"{path!r} cannot be written: its permissions forbid it")


PICTURES = (".png", ".jpg", ".jpeg", ".webp")  # endings of files that Pillow reads and writes
DRAWINGS = (".png", ".svg", ".pdf", ".jpg")  # endings of files that matplotlib writes


def run_script(main):
    """Runs a script's main(); an InputError, or a file that cannot be read or written, ends it with one line and exit
    code 1. So does Ctrl-C, with the signal's own exit code."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # see scripts/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except (InputError, OSError) as error:
        if os.environ.get("DDPO_TRACEBACK"):
            raise
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
