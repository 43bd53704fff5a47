"""A sweep that was stopped, and the figure of its results."""

import json
import signal
import sys

import pytest
from conftest import SMALL, launch
from PIL import Image
from test_train import metrics

from ddpo import InputError
from scripts import figures, sweep


def test_a_stopped_sweep_goes_on_and_its_results_are_drawn(tiny, tmp_path, monkeypatch, capsys):
    """One job done but not collected, one stopped after its first epoch: the sweep resumes the one, collects both, and
    has nothing left to do when it is started again."""
    options = {**SMALL, "model": tiny, "save_every": 1, "config": "config/emoji.py", "train.learning_rate": 1e-3}
    jobs = {f"task-ddpo_is-lr0.001-seed{seed}": {**options, "seed": seed} for seed in (0, 1)}
    monkeypatch.setattr(sweep, "SWEEPS", {"fig4": lambda: jobs})
    monkeypatch.setattr(sweep.signal, "signal", lambda *_: None)  # pytest keeps its own
    runs, results = tmp_path / "runs", tmp_path / "results"
    for job, epochs in zip(jobs, (2, 1)):
        given = {k.replace(".", "__"): v for k, v in jobs[job].items() if k != "config"}
        launch(direct=True, run_dir=runs / "fig4" / job, **given | {"num_epochs": epochs})
    path = runs / "fig4/task-ddpo_is-lr0.001-seed1/config.json"
    path.write_text(path.read_text().replace('"num_epochs": 1', '"num_epochs": 2'))

    def command(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
        main()
        return capsys.readouterr().out

    arguments = ("fig4", "--runs", runs, "--results", results)
    out = command(sweep.main, *arguments)
    assert "2 jobs, 0 of them done" in out and "[2/2] task-ddpo_is-lr0.001-seed1" in out and "left" in out
    for job in jobs:
        assert metrics(results / "fig4" / job) == metrics(runs / "fig4" / job)
        assert [line["epoch"] for line in metrics(results / "fig4" / job)] == [0, 1]
        facts = json.loads((results / "fig4" / job / "job.json").read_text())
        assert facts.keys() == {"command", "commit", "hardware", "threads", "seconds"} and f"seed={job[-1]}" in str(
            facts
        )
        assert list((results / "fig4" / job).glob("epoch_0002.png"))
    monkeypatch.setattr(sweep, "start", None)  # nothing may be started
    assert "2 jobs, 2 of them done" in command(sweep.main, *arguments)

    monkeypatch.setattr(figures, "BEST", {"fig4": {"ddpo_is": 1e-3}})
    out = command(figures.main, "fig4", "--results", results, "--output", tmp_path)
    assert out.count("task ddpo_is lr 0.001 seed") == 2
    assert (
        "DDPO-IS (2 seeds)" in (tmp_path / "fig4.svg").read_text() and Image.open(tmp_path / "fig4.png").size[0] > 600
    )
    monkeypatch.setattr(figures, "BEST", {"fig4": {"ddpo_is": 3e-3}})  # another was better: not drawn
    command(figures.main, "fig4", "--results", results, "--output", tmp_path)
    assert "DDPO-IS" not in (tmp_path / "fig4.svg").read_text()
    with pytest.raises(InputError, match="no finished job: run python -m scripts.sweep"):
        command(figures.main, "fig4", "--results", tmp_path / "none")


def test_a_sweep_that_is_stopped_tells_its_jobs_and_waits_for_them(tmp_path, monkeypatch):
    heard = []

    class Job:
        def poll(self):
            return None

        def send_signal(self, number):
            heard.append(number)

        def wait(self):
            heard.append("waited")

    def sleep(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "SWEEPS", {"fig4": lambda: {"a": {}, "b": {}, "c": {}}})
    monkeypatch.setattr(sweep, "start", lambda *arguments: Job())
    monkeypatch.setattr(sweep.time, "sleep", sleep)
    monkeypatch.setattr(sweep.signal, "signal", lambda *_: None)  # pytest keeps its own
    monkeypatch.setattr(sys, "argv", ["sweep", "fig4", "--jobs", "2", "--results", str(tmp_path)])
    with pytest.raises(SystemExit):
        sweep.main()
    assert heard == [signal.SIGINT, signal.SIGINT, "waited", "waited"]
