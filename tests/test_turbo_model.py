"""The embedded model of one step: the script that makes it, and what it draws."""

import torch
from conftest import ROOT

from ddpo.evaluation import load_classifier, named_animals
from ddpo.pipeline_logprob import draw_noise, sample_with_logprob
from ddpo.policy import load_policy
from ddpo.prompts import common_animals
from scripts import make_turbo_model


def make(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["make_turbo_model", "--threads", "1", *map(str, arguments)])
    make_turbo_model.main()


def draw(model, prompts):
    """Latents of one deterministic step, and their images."""
    policy = load_policy(model, 4, "fp32", "cpu")
    policy.set_timesteps(1)
    shape = (2, *policy.latent_shape())
    drawn = sample_with_logprob(policy, prompts, lambda i: draw_noise(shape, 1, 0, i), 1.0, 0.0)
    return drawn.latents[:, -1], drawn.images


def test_distilling_brings_the_pictures_closer(tiny, tmp_path, monkeypatch):
    """To the teacher's of the same noise; and the LoRA alone makes the same model again."""
    small = ["--base", tiny, "--lora", tmp_path / "lora", "--pairs", 6, "--batch", 3, "--teacher_steps", 2]
    prompts, latents = ["a cat", "a dog"], []
    for steps in (1, 40):
        make(monkeypatch, *small, "--output", tmp_path / str(steps), "--distil", "--steps", steps)
        latents.append(draw(tmp_path / str(steps), prompts)[0])
    make(monkeypatch, *small, "--output", tmp_path / "again")
    torch.testing.assert_close(draw(tmp_path / "again", prompts)[0], latents[1])
    teacher = load_policy(tiny, 4, "fp32", "cpu")
    teacher.set_timesteps(2)
    shape = (2, *teacher.latent_shape())  # the noise of `draw`, and any for the second step, which takes none
    aim = sample_with_logprob(teacher, prompts, lambda i: draw_noise(shape, 1, 0, i)[[0, 1, 1]], 3.0, 0.0)
    before, after = ((x - aim.latents[:, -1]).square().mean() for x in latents)
    assert after < 0.95 * before


def test_the_embedded_generator_draws_the_animals(tmp_path, monkeypatch):
    """In one step, 45 of them. By chance it would be one."""
    monkeypatch.chdir(ROOT)
    make(monkeypatch, "--output", tmp_path / "turbo")
    prompts = [prompt for prompt, _ in common_animals()]
    named = named_animals(draw(tmp_path / "turbo", prompts)[1], load_classifier(ROOT / "models/emoji/classifier"))
    assert sum(name == prompt.split()[-1] for name, prompt in zip(named, prompts)) >= 36
