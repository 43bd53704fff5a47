"""Steps that are made one after another, several at a time."""

import os
import time

import pytest

from ddpo.errors import InputError
from scripts.jobs import Step, run_steps


def test_steps_run_in_order_and_once(tmp_path):
    """What needs a step that failed is left, the rest is made, and only what is left is tried again."""
    made, seen = tmp_path / "made", []
    steps = [
        Step("last", ("first",), [(os.mkdir, made / "a"), (os.mkdir, made / "a/b")]),
        Step("first", (), [(os.mkdir, made)]),
        Step("broken", ("first",), [(os.rmdir, tmp_path / "nothing")]),
        Step("stranded", ("broken",), [(os.mkdir, made / "c")]),
        Step("unasked", (), [(os.mkdir, tmp_path / "d")]),
    ]
    steps, wanted = {step.name: step for step in steps}, ["last", "stranded"]
    for expected in (["first", "last"], []):
        done, seen[:] = tuple(seen), []
        options = {"jobs": 2, "done": done, "start": "fork"}
        failed, left = run_steps(steps, wanted, tmp_path / "logs", collect=lambda s, _: seen.append(s.name), **options)
        assert (failed, left, seen) == (["broken"], ["stranded"], expected)
    assert (made / "a/b").is_dir() and not (made / "c").exists() and not (tmp_path / "d").exists()


def test_a_time_limit_stops_what_runs(tmp_path):
    steps = {name: Step(name, (), [(time.sleep, 60)]) for name in "ab"}
    options = {"minutes": 0.005, "start": "fork"}
    assert run_steps(steps, ["a", "b"], tmp_path, 1, None, **options) == ([], ["b", "a"])  # "a" began: a minute's sleep
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_step_that_cannot_be_collected_stops_the_others(tmp_path):
    """They are told as Ctrl-C does, and waited for."""

    def wait():
        try:
            (tmp_path / "began").touch()
            time.sleep(60)
        except KeyboardInterrupt:
            time.sleep(0.3)
            (tmp_path / "saved").touch()

    def until_the_other_began():
        while not (tmp_path / "began").exists():
            time.sleep(0.02)

    def collect(step, seconds):
        raise InputError("made with other options")

    steps = {"long": Step("long", (), [(wait,)]), "short": Step("short", (), [(until_the_other_began,)])}
    with pytest.raises(InputError, match="other options"):
        run_steps(steps, list(steps), tmp_path / "logs", 2, collect, start="fork")
    assert (tmp_path / "saved").exists()
