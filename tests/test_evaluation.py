"""Evaluation, in a run and after it."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, launch, make_clip
from PIL import Image
from test_train import metrics

import train
from config.base import get_config
from ddpo import prompts, rewards
from ddpo.errors import InputError
from ddpo.evaluation import (
    choose_prompts,
    diversity,
    evaluate,
    load_classifier,
    named_animals,
    score,
    split_prompts,
)
from ddpo.policy import load_policy

EVERY = {
    "held_out": 0.4, "evaluate__every": 1, "evaluate__limit": 3, "evaluate__rewards": "jpeg_incompressibility",
    "evaluate__classifier": "", "train__learning_rate": 0.1,
}  # fmt: skip


def evaluations(run):
    return [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(make_clip(tmp_path_factory.mktemp("clip"), projection_dim=16))


@pytest.fixture(scope="module")
def evaluated(tiny, clip, tmp_path_factory):
    """A run of two epochs that is evaluated before and after each."""
    run = tmp_path_factory.mktemp("evaluated") / "run"
    launch(model=tiny, run_dir=run, direct=True, evaluate__clip=clip, **EVERY)
    return run


def test_diversity_is_the_mean_distance_over_all_pairs():
    e = torch.nn.functional.normalize(torch.randn(4 * 3, 8), dim=-1)  # 4 images of each of 3 prompts
    pairs = [1 - float(e[i] @ e[j]) for i in range(12) for j in range(i) if i % 3 == j % 3]
    assert diversity(e.numpy(), 4) == pytest.approx(np.mean(pairs), abs=1e-6)
    assert diversity(e[:3].repeat(4, 1).numpy(), 4) == pytest.approx(0, abs=1e-6)


def test_each_prompt_gets_its_own_mean_and_each_judge_small_batches(tiny):
    """By judges that see nothing but prompt and metadata."""
    policy = load_policy(tiny, 0, "fp32", "cpu")
    policy.scheduler.set_timesteps(2)
    sample = get_config().sample
    sample.num_steps, sample.batch_size, sample.guidance_scale = 2, 4, 1.0
    asked = []

    def length(images, prompts, metadata):
        asked.append(len(images))
        return np.array([len(prompt) for prompt in prompts]), {"metadata": np.array([m["n"] for m in metadata])}

    pairs = [("a cat", {"n": 1}), ("a zebra", {"n": 2}), ("an old ant", {"n": 6})]
    sets = {"seen": pairs[:2], "held_out": pairs}
    result, shown = evaluate(policy, sets, 3, {"reward_mean": length}, sample)
    assert asked == [4, 2, 4, 4, 1] * 2
    for section, measured in result.items():
        chosen = pairs[: 2 + section.startswith("held_out")]
        assert measured["by_prompt"] == {prompt: len(prompt) for prompt, _ in chosen}
        assert measured["metadata"] == pytest.approx(np.mean([m["n"] for _, m in chosen]))
        assert len(shown[section]) == min(8, 3 * len(chosen))


def test_the_classifier_is_asked_for_what_it_can_name():
    classifier = load_classifier(ROOT / "models/emoji/classifier")
    pairs = [("a cat", {}), ("a cat on a mat", {}), ("two cats", {"animal": "cat"}), ("a sofa", {})]
    images = [Image.new("RGB", (64, 64))] * 4
    named = named_animals(images, classifier)[0]
    right = score(images, pairs, {}, None, classifier, 0)["classifier_accuracy"]
    expected = float(named == "cat")
    np.testing.assert_array_equal(right, [expected, np.nan, expected, np.nan])


def test_held_out_prompts_are_the_others():
    pairs = prompts.animal_activities()
    trained_on, held_out = split_prompts(pairs, 0.3)
    assert len(held_out) == 40 and sorted(p for p, _ in trained_on + held_out) == sorted(p for p, _ in pairs)
    assert (trained_on, held_out) == split_prompts(pairs, 0.3)
    assert split_prompts(pairs, 0) == (pairs, [])
    for share, message in ((0.999, "leaves none to train on"), (0.001, "holds none out")):
        with pytest.raises(InputError, match=f"held_out = {share} of 135 prompts {message}"):
            split_prompts(pairs, share)
    twice = split_prompts(pairs + pairs, 0.3)  # a file may repeat lines
    assert twice == (trained_on * 2, held_out * 2) and choose_prompts(twice[1], 135) == held_out
    others = choose_prompts(pairs, 10, seen=trained_on)
    assert len(others) == 10 and all(pair in held_out for pair in others)


def test_equal_prompts_with_other_metadata_are_kept_apart(tiny):
    """Each is judged with its own metadata; the same pair twice is judged once."""
    pairs = [("a cat", {"want": 1}), ("a cat", {"want": 3}), ("a dog", {"want": 5}), ("a cat", {"want": 1})]
    chosen = choose_prompts(pairs, 10)
    assert chosen == pairs[:3]

    def judge(images, prompts, metadata):
        return [m["want"] for m in metadata], {}

    policy, sample = load_policy(tiny, 0, "fp32", "cpu"), get_config().sample
    sample.num_steps, sample.guidance_scale = 2, 1.0
    policy.set_timesteps(2)
    measured, _ = evaluate(policy, {"seen": chosen}, 1, {"reward_mean": judge}, sample)
    assert measured["seen, stochastic"]["by_prompt"] == {"a cat": 2, "a dog": 5}
    assert measured["seen, stochastic"]["reward_mean"] == 3


def test_a_run_is_evaluated_as_the_script_evaluates_it(evaluated, clip):
    """Of the three evaluations the first is the base model's and the last the finetuned one's: so says the script too,
    which reads the checkpoint."""
    lines = evaluations(evaluated)
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    command = ["--run", evaluated, "--limit", 3, "--count", 2, "--rewards", "jpeg_incompressibility", "--clip", clip]
    command = [sys.executable, "-m", "scripts.evaluate", *map(str, command), "--classifier", ""]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    script = json.loads((evaluated / "evaluation.json").read_text())
    for line, name in ((lines[0], "base"), (lines[-1], "finetuned")):
        sections = line.keys() - {"epoch"}
        assert sections == {f"{k}, {s}" for k in ("seen", "held_out") for s in ("stochastic", "deterministic")}
        for section in sections:
            ours, theirs = line[section], script[section][name]
            assert ours.keys() == theirs.keys() >= {"reward_mean", "jpeg_incompressibility", "diversity", "by_prompt"}
            for key in ours:
                # Rounding may move one JPEG file by a byte; and diversity is a small difference of large numbers.
                tolerance = 6e-4 if key == "by_prompt" else 2e-4
                assert ours[key] == pytest.approx(theirs[key], abs=tolerance), (section, key)
            assert ours["reward_mean"] == pytest.approx(-ours["jpeg_incompressibility"], rel=1e-6)
            assert np.mean(list(ours["by_prompt"].values())) == pytest.approx(ours["reward_mean"], rel=1e-5)
    first, last = (line["seen, stochastic"]["reward_mean"] for line in (lines[0], lines[-1]))
    assert abs(first - last) > 5e-4 and last != lines[-1]["seen, deterministic"]["reward_mean"]


def test_evaluation_changes_nothing_and_held_out_prompts_are_not_trained_on(tiny, tmp_path, evaluated):
    """The same run without evaluation, and its prompts from a file of those that are left: the same numbers."""
    launch(model=tiny, run_dir=tmp_path / "plain", direct=True, train__learning_rate=0.1, held_out=0.4)
    left, held_out = split_prompts(prompts.common_animals(), 0.4)
    (tmp_path / "left.txt").write_text("\n".join(prompt for prompt, _ in left))
    launch(model=tiny, run_dir=tmp_path / "file", direct=True, train__learning_rate=0.1, prompts=tmp_path / "left.txt")
    assert metrics(tmp_path / "plain") == metrics(tmp_path / "file") == metrics(evaluated)
    for line in evaluations(evaluated):
        assert line["held_out, stochastic"]["by_prompt"].keys() <= {prompt for prompt, _ in held_out}
        assert line["seen, stochastic"]["by_prompt"].keys() <= {prompt for prompt, _ in left}


def test_a_resumed_run_in_two_processes_evaluates_the_same(tiny, clip, tmp_path, evaluated):
    """An epoch by two processes, which share the images; a line that a kill cut short; the rest by one."""
    run = tmp_path / "run"
    launch(model=tiny, run_dir=run, num_epochs=1, processes=2, direct=True, evaluate__clip=clip, **EVERY)
    with open(run / "evaluation.jsonl", "a") as f:
        f.write(json.dumps({"epoch": 2}) + "\n" + '{"epoch": 3, "se')
    launch(model=tiny, resume=run, direct=True, evaluate__clip=clip, **EVERY)
    lines = evaluations(run)
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    for line, alone in zip(lines, evaluations(evaluated)):
        for section in line.keys() - {"epoch"}:
            for key in line[section]:
                assert line[section][key] == pytest.approx(alone[section][key], rel=1e-3), (section, key)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"held_out": 1.0}, "held_out = 1 of 45 prompts leaves none to train on"),
        ({"evaluate__every": 1, "evaluate__prompts": "common_animals"}, "all of them are trained on"),
        ({"held_out": -0.1}, "held_out = -0.1 must be at least 0, at most 1"),
        ({"evaluate__every": 1, "evaluate__rewards": "jpeg_compresibility"}, "jpeg_compressibility"),
        (
            {"evaluate__every": 1, "evaluate__clip": "models/emoji/clip", "evaluate__count": 1},
            "evaluate.count = 1 must",
        ),
        ({"evaluate__every": 1, "evaluate__classifier": "no/such/folder"}, "no/such/folder"),
    ],
)
def test_mistakes(tiny, tmp_path, options, message):
    result = launch(model=tiny, run_dir=tmp_path / "run", direct=True, check=False, **options)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode != 0 and len(errors) == 1 and message in errors[0]


def test_a_judge_that_fails_costs_no_weights(tiny, tmp_path, monkeypatch):
    """A judge that is there at the start and gone after the first epoch: the epoch is saved all the same."""
    calls = []

    def fickle(images, prompts, metadata):
        calls.append(len(images))
        if len(calls) > 4:  # two sections of the first evaluation, each of two batches
            raise ConnectionError("the server went away")
        return np.zeros(len(images)), {}

    monkeypatch.setitem(rewards.REWARDS, "fickle", fickle)
    monkeypatch.setattr("ddpo.interrupt.signal.signal", lambda *_: None)  # pytest keeps its Ctrl-C
    config = get_config()
    own = {"model": tiny, "run_dir": str(tmp_path / "run"), "evaluate.every": 1, "evaluate.rewards": "fickle"}
    config.update_from_flattened_dict({**SMALL, **own, "evaluate.limit": 4, "save_every": 10})
    with pytest.raises(InputError, match="fickle raised ConnectionError: the server went away"):
        train.train(config, "test")
    assert [line["epoch"] for line in evaluations(tmp_path / "run")] == [0]
    assert (tmp_path / "run/checkpoints/epoch_0001/state.pt").exists()
