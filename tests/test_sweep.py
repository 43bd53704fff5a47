"""A sweep that was stopped, and the figure of its results."""

import json
import sys

import numpy as np
import pytest
from conftest import ROOT, SMALL, launch
from PIL import Image
from test_train import metrics

from config.sweeps import PICTURED, SWEEPS, seed_jobs, tuning_jobs
from ddpo import prompts
from ddpo.errors import InputError
from ddpo.images import image_grid
from ddpo.options import flatten, load_preset
from scripts import figures, sweep
from scripts.results import add_pictures, gain_while_named, read_pictures, read_results


def command(monkeypatch, capsys, main, *arguments):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    main()
    return capsys.readouterr().out


def test_a_stopped_sweep_goes_on_and_its_results_are_drawn(tiny, tmp_path, monkeypatch, capsys):
    """Two learning rates, two seeds. One job done but not collected, one stopped after its first epoch: the sweep
    resumes the one, collects both, runs the better rate on the other seed, and has nothing left to do when it is
    started again."""
    options = {**SMALL, "model": tiny, "save_every": 1, "config": "config/emoji.py"}
    options |= {"evaluate.every": 1, "evaluate.limit": 2, "evaluate.count": 1, "evaluate.clip": ""}
    curves = {"task-ddpo_is": {**options, "train.learning_rate": (1e-3, 3e-3)}}
    monkeypatch.setattr(sweep, "SWEEPS", {"fig4": lambda: curves})
    monkeypatch.setattr(figures, "SWEEPS", {"fig4": lambda: curves})
    monkeypatch.setattr("config.sweeps.SEEDS", (0, 1))
    runs, results = tmp_path / "runs", tmp_path / "results"
    jobs = tuning_jobs(curves)
    for job, epochs in zip(jobs, (2, 1), strict=True):
        given = {k.replace(".", "__"): v for k, v in jobs[job].items() if k != "config"}
        launch(direct=True, run_dir=runs / "fig4" / job, **given | {"num_epochs": epochs})
    path = runs / "fig4/task-ddpo_is-lr0.003-seed0/config.json"
    path.write_text(path.read_text().replace('"num_epochs": 1', '"num_epochs": 2'))

    arguments = monkeypatch, capsys, sweep.main, "fig4", "--runs", runs, "--results", results
    out = command(*arguments)
    assert "2 jobs, 0 of them done" in out and "[2/2] task-ddpo_is-lr0.003-seed0" in out and "left" in out
    lines = read_results(results / "fig4.jsonl")
    rewards = {
        rate: [e["seen, stochastic"]["reward_mean"] for e in lines[f"task-ddpo_is-lr{rate}-seed0"]["evaluations"]]
        for rate in (0.001, 0.003)
    }
    best = max(rewards, key=lambda rate: rewards[rate][-1] - rewards[rate][0])
    assert f"task-ddpo_is {best}" in out and f"[1/1] task-ddpo_is-lr{best}-seed1" in out
    assert lines.keys() == {*jobs, f"task-ddpo_is-lr{best}-seed1"}
    for job, line in lines.items():
        for epoch, expected in enumerate(metrics(runs / "fig4" / job)):
            assert {key: line["metrics"][key][epoch] for key in expected} == pytest.approx(expected, rel=1e-5)
        assert len(line["metrics"]["epoch"]) == 2 and line["options"]["sample.num_steps"] == 3
        assert line.keys() >= {"command", "commit", "hardware", "threads", "seconds", "weights_mb"}
        assert f"seed={job[-1]}" in line["command"] and line["weights_mb"] > 0
    images = runs / f"fig4/task-ddpo_is-lr{best}-seed0/images"
    grids = {int(path.stem[-4:]): Image.open(path).convert("RGB") for path in images.glob("epoch_*.png")}
    assert {0, 2} <= grids.keys()
    assert read_pictures(results / "fig4.png") == {"task-ddpo_is": grids}
    assert command(*arguments).count("0 steps to make") == 2

    other = {"task-ddpo_is": {**curves["task-ddpo_is"], "sample.num_steps": 2}}
    monkeypatch.setattr(sweep, "SWEEPS", {"fig4": lambda: other})
    for folder, where in ((results, results), (tmp_path / "none", runs)):
        with pytest.raises(InputError, match=f"{where}.*lr0.001-seed0 was made with other .*num_steps 3, now 2"):
            command(monkeypatch, capsys, sweep.main, "fig4", "--runs", runs, "--results", folder)

    arguments = "fig4", "--results", results, "--output", tmp_path
    out = command(monkeypatch, capsys, figures.main, *arguments)
    assert out.count("*") == 2 and f"task ddpo_is lr {best}* seed 1" in out
    assert "task ddpo_is: +" in out or "task ddpo_is: -" in out
    assert Image.open(tmp_path / "fig4.png").size[0] > 500
    with pytest.raises(InputError, match="no finished job: run python -m scripts.sweep fig4"):
        command(monkeypatch, capsys, figures.main, "fig4", "--results", tmp_path / "none")


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "results/figures").glob("*.png")))
def test_figures_are_drawn_from_what_is_committed(name, tmp_path, monkeypatch, capsys):
    """Every figure that the repo holds, from results/sweeps alone."""
    out = command(monkeypatch, capsys, figures.main, name, "--output", tmp_path)
    assert "* seed 2: " in out or name in ("frontier", "fig4", "newer", "flow")
    committed = Image.open(ROOT / f"results/figures/{name}.png")
    assert Image.open(tmp_path / f"{name}.png").size == committed.size and committed.size[0] > 900


def leave_results(name, folder):
    """Writes what a sweep would leave, by the options of its jobs: made-up numbers, as each run would log them."""
    rng, curves = np.random.default_rng(0), SWEEPS[name]()
    best = {curve: options["train.learning_rate"][0] for curve, options in curves.items()}
    with open(folder / f"{name}.jsonl", "w") as f:
        for job, given in (tuning_jobs(curves) | seed_jobs(curves, best)).items():
            options = flatten(load_preset(given["config"])) | given
            epochs, every = options["num_epochs"], options["evaluate.every"]
            kinds = ("seen", "held_out") if options["held_out"] else ("seen",)
            measures = ["reward_mean", "classifier_accuracy", *filter(None, options["evaluate.rewards"].split(","))]
            measures += ["diversity"] * bool(options["evaluate.clip"])
            names = [prompt for prompt, _ in prompts.get_prompts(options["prompts"])][: options["evaluate.limit"]]

            def measured(names=names, measures=measures):
                return dict.fromkeys(measures, rng.random()) | {"by_prompt": dict(zip(names, rng.random(len(names))))}

            logged = ("reward_mean", "network_passes", "reward_queries", "cpu_seconds", "peak_memory_gb")
            line = {
                "run": job, "seconds": 1.0, "weights_mb": 1.0, "options": options,
                "metrics": {key: rng.random(epochs).tolist() for key in logged},
                "evaluations": [
                    {"epoch": epoch} | {f"{kind}, {how}": measured() for kind in kinds for how in
                                        ("stochastic", "deterministic")} for epoch in range(0, epochs + 1, every)
                ],
            }  # fmt: skip
            f.write(json.dumps(line) + "\n")
    if name in PICTURED:
        for curve, options in curves.items():
            epochs = range(0, options["num_epochs"] + 1, options["grid_every"] or options["num_epochs"])
            grid = image_grid([Image.new("RGB", (16, 16))] * options["grid_images"], ["a cat"] * options["grid_images"])
            add_pictures(str(folder / f"{name}.png"), curve, dict.fromkeys(epochs, grid))


@pytest.mark.parametrize("name", [name for name in figures.FIGURES if name != "frontier"])
def test_each_figure_can_be_drawn_once_its_sweep_has_run(name, tmp_path, monkeypatch, capsys):
    _, *sweeps = figures.FIGURES[name]
    for needed in sweeps:
        leave_results(needed, tmp_path)
    command(monkeypatch, capsys, figures.main, name, "--results", tmp_path, "--output", tmp_path / "figures")
    assert Image.open(tmp_path / f"figures/{name}.png").size[0] > 900


def test_pictures_come_back_as_they_were_added(tmp_path):
    """Curves with other numbers of grids, one of them replaced, which keeps its row."""
    path, grids = str(tmp_path / "x.png"), [Image.new("RGB", (6, 4), (shade, 0, 0)) for shade in range(6)]
    for curve, epochs in (("a", (0, 5)), ("b", (12,)), ("a", (0, 5, 10))):
        add_pictures(path, curve, {epoch: grids[epoch // 5 + len(epochs)] for epoch in epochs})
    assert read_pictures(path) == {"a": {0: grids[3], 5: grids[4], 10: grids[5]}, "b": {12: grids[3]}}
    assert list(read_pictures(path)) == ["a", "b"] and Image.open(path).size == (18, 8)
    assert read_pictures(tmp_path / "none.png") == {}
    large = Image.new("RGB", (9, 5), "blue")  # by a version that draws larger ones
    add_pictures(path, "b", {12: large})
    assert read_pictures(path) == {"a": {0: grids[3], 5: grids[4], 10: grids[5]}, "b": {12: large}}


def test_the_gain_at_a_share_of_animals_is_interpolated():
    def evaluations(named, rewards):
        pairs = zip(named, rewards)
        return [{"seen, stochastic": {"classifier_accuracy": n, "reward_mean": r}} for n, r in pairs]

    gain, fell = gain_while_named(evaluations([1.0, 0.97, 0.93, 0.5], [-2.0, -1.9, -1.8, -1.0]))
    assert gain == pytest.approx(0.15) and fell
    gain, fell = gain_while_named(evaluations([1.0, 0.99], [-2.0, -1.9]))
    assert gain == pytest.approx(0.1) and not fell
    gain, fell = gain_while_named(evaluations([0.9, 0.9, 0.81, 0.1], [-2.0, -1.9, -1.8, -1.0]))  # 0.855 is 95% of 0.9
    assert gain == pytest.approx(0.15) and fell


@pytest.mark.parametrize("minutes, code", [("0", 130), ("5", None)])
def test_a_sweep_that_is_interrupted_ends_as_the_signal_would_have(tmp_path, monkeypatch, minutes, code):
    """One whose --minutes are over has done what it was told."""
    monkeypatch.setattr(sweep, "run_steps", lambda *_: ([], ["a job"]))
    monkeypatch.setattr(sys, "argv", ["sweep", "fig4", "--minutes", minutes, "--results", str(tmp_path)])
    if code is None:
        return sweep.main()
    with pytest.raises(SystemExit) as stop:
        sweep.main()
    assert stop.value.code == code
