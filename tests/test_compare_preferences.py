"""The comparison of the ways from choices to a model: its steps, its merged models, its table."""

import json
import sys
from argparse import Namespace

import pytest
import torch
from test_policy import disturb

from ddpo.policy import load_policy, save_weights
from scripts import compare_preferences, jobs
from scripts.compare_preferences import merge


def test_each_round_learns_from_all_choices_so_far(tmp_path):
    """The first on images of the base model, the next on those of the run as it is by then; the same run goes on."""
    args = Namespace(folder=tmp_path, epochs=[6], options=[], pictures=4)
    step = compare_preferences.run_step("dpo_rounds", 300, 2, args)
    assert step.needs == ()
    draws = [c[-1] for c in step.commands if "scripts.annotate" in c]
    assert [draw[draw.index("--pairs") + 1] for draw in draws] == [100] * 3
    assert ["--config" in draw for draw in draws] == [True, False, False]
    assert [draw[draw.index("--run") + 1] for draw in draws[1:]] == [step.run] * 2
    votes = [c[1] for c in step.commands if c[0] is compare_preferences.vote]
    trained = [c for c in step.commands if c[0] is jobs.train]
    assert [c[2:4] for c in trained] == [(step.run, 2), (step.run, 4), (step.run, 6)]
    assert [c[4][1 : k + 2] for k, c in enumerate(trained)] == [votes[:1], votes[:2], votes[:3]]
    order = [c[0].__name__ if c[0] is not jobs.module else c[1] for c in step.commands]
    assert order == ["scripts.annotate", "vote", "train"] * 3 + ["scripts.simulate_rater"]


def test_a_merged_model_predicts_what_the_policy_does(tiny, tmp_path):
    policy = load_policy(tiny, 4, "fp32", "cpu")
    generator, t = torch.Generator().manual_seed(0), torch.tensor([9, 700])
    latents = torch.randn(2, *policy.latent_shape(), generator=generator)

    def predict(policy):
        with torch.no_grad():
            return policy.forward(latents, t, policy.embed(["a cat", "a dog"]))

    base = predict(policy)
    disturb(policy)
    save_weights(policy, tmp_path / "checkpoints/epoch_0003")
    (tmp_path / "config.json").write_text(json.dumps({"model": str(tiny)}))
    merge(tmp_path, "epoch_0003", tmp_path / "merged")
    merged, expected = predict(load_policy(tmp_path / "merged", 0, "fp32", "cpu")), predict(policy)
    assert (expected - base).abs().max() > 1e-3
    assert torch.allclose(merged, expected, atol=1e-2 * float((expected - base).abs().max()))


def test_the_table_counts_in_the_base_models_standard_deviations(tmp_path, monkeypatch, capsys):
    """Also for a run that began from another model, which DPO had made; its seconds are those of all its parts."""
    parts = {"warm": 1.0, "calm": 0.0, "large": 0.5}

    def line(method, base, after, before):
        base, after = ({"taste": t, "taste_std": 2.0, "classifier_accuracy": 0.75, **parts} for t in (base, after))
        return {
            "run": f"{method}-50-rater0", "method": method, "choices": 50, "rater": 0, "seconds_before": before,
            "taste": {"2": {"base": base, "finetuned": after}}, "metrics": {"seconds": [10.0, 20.0, 40.0]},
        }  # fmt: skip

    lines = [line("dpo", 1.0, 4.0, {}), line("dpo_ddpo", 4.0, 5.0, {"dpo": 30.0, "reward": 2.0})]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    paths = ["--results", str(tmp_path / "runs.jsonl"), "--figure", str(tmp_path / "figure.png")]
    monkeypatch.setattr(sys, "argv", ["compare_preferences", "--draw", *paths])
    compare_preferences.main()
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in capsys.readouterr().out.splitlines()[2:4]]
    assert [row[:5] for row in rows] == [
        ["50", "DPO", "2", "+1.50", "+1.50"],
        ["50", "DPO, then DDPO", "2", "+2.00", "+2.00"],
    ]
    assert [(row[-2], float(row[-1])) for row in rows] == [("75%", pytest.approx(30)), ("75%", pytest.approx(62))]
    assert (tmp_path / "figure.png").stat().st_size > 1000
