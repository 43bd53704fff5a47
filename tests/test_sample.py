"""Base and finetuned model side by side, and the dial between them."""

import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, launch, run
from PIL import Image, ImageFont
from test_policy import disturb, guided

from ddpo.images import LINES, image_grid
from ddpo.pipeline_logprob import sample_with_logprob
from ddpo.policy import load_policy
from scripts.sample import draw_at_scales, open_run


class GaussianUNet(torch.nn.Module):
    """The exact noise prediction for data x_0 ~ N(mean, variance I)."""

    def __init__(self, mean, variance, alphas):
        super().__init__()
        self.mean, self.variance, self.alphas = mean, variance, alphas

    def forward(self, x_t, t, embeds, added_cond_kwargs=None):
        alpha = self.alphas[t][:, None, None, None]
        score = (alpha.sqrt() * self.mean - x_t) / (alpha * self.variance + 1 - alpha)
        return SimpleNamespace(sample=-((1 - alpha).sqrt()) * score)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_dial_is_the_geometric_mean(tiny, scale, eta):
    """For N(m0, v) and N(m1, v), p0^(1 - s) p1^s is N(m0 + s (m1 - m0), v): the dial draws what that one draws."""
    policy = load_policy(tiny, 0, "fp32", "cpu")
    policy.set_timesteps(20)
    alphas, noise = policy.scheduler.alphas_cumprod, torch.randn(200, 21, *policy.latent_shape())
    policy._base, policy.denoiser = (GaussianUNet(mean, 0.5, alphas) for mean in (-1.0, 2.0))

    def latents():
        drawn = sample_with_logprob(policy, ["a cat"] * 200, noise.__getitem__, 1.0, eta, on_images=lambda *_: None)
        return drawn.latents[:, -1]

    policy.rl_scale = scale
    dialled = latents()
    policy.rl_scale, policy.denoiser = 1.0, GaussianUNet(-1.0 + 3 * scale, 0.5, alphas)
    torch.testing.assert_close(dialled, latents(), rtol=1e-4, atol=1e-3)
    assert float(dialled.mean()) == pytest.approx(-1.0 + 3 * scale, rel=0.1)


@pytest.mark.parametrize("rank, precision", [(0, "fp32"), (4, "fp32"), (0, "bf16"), (4, "bf16")])
def test_its_ends_are_base_and_finetuned_to_the_bit(tiny, rank, precision):
    """Guided predictions; and between the ends, the straight line through them."""
    policy = load_policy(tiny, rank, precision, "cpu")
    base = guided(policy)
    policy.keep_base()
    disturb(policy)
    finetuned = guided(policy)
    for scale, expected in ((0, base), (1, finetuned)):
        policy.rl_scale = scale
        assert torch.equal(guided(policy), expected)
    policy.rl_scale = 1.7
    torch.testing.assert_close(guided(policy), base + 1.7 * (finetuned - base), rtol=1e-4, atol=1e-4)
    assert not torch.equal(base, finetuned)


def test_the_code_in_docs_draws_the_same(tiny, tmp_path):
    """The ten lines of docs/algorithms.md in plain diffusers, without the sampler's noise, from the same latent."""
    folder = tmp_path / "run"
    launch(model=tiny, run_dir=folder, num_epochs=1, train__learning_rate=0.05, direct=True)
    text = (ROOT / "docs/algorithms.md").read_text()
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "def mixed" in b]
    code, names = block.replace("runs/NAME", str(folder)).rsplit("image = ", 1)[0], {}
    exec(code, names)
    config, policy, checkpoint = open_run(folder)
    config.sample.num_steps, config.sample.guidance_scale, config.sample.eta = 6, 3.0, 0.0
    ((_, (ours,)),) = draw_at_scales(policy, checkpoint, ["a cat"], config.sample, 7, [names["s"]])
    x_T = torch.randn(policy.noise_shape(config.sample), generator=torch.Generator().manual_seed(7))[:1]
    names["pipe"].safety_checker = None
    theirs = names["pipe"]("a cat", latents=x_T, num_inference_steps=6, guidance_scale=3.0, eta=0.0).images[0]
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max() <= 1


def cells(path, columns, rows):
    """The images of a grid, as arrays: squares, as wide as their column, with heads above and labels below them."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    side = pixels.shape[1] // columns - 2
    line = sum(ImageFont.load_default(max(13, side // 16)).getmetrics())
    row = side + 2 + LINES * line
    head = pixels.shape[0] - rows * row
    assert head in (0, line)
    return [[pixels[head + y * row :, x * (side + 2) :][:side, :side] for x in range(columns)] for y in range(rows)]


def test_heads_stand_over_the_columns():
    red, blue = (Image.new("RGB", (96, 96), colour) for colour in ("red", "blue"))
    plain = image_grid([red, blue] * 2, ["a", "b"] * 2, 2)
    headed = np.asarray(image_grid([red, blue] * 2, ["a", "b"] * 2, 2, heads=["s = 0", "s = 1"]))
    head, half = len(headed) - plain.height, plain.width // 2
    assert head > 0 and np.array_equal(headed[head:], np.asarray(plain))
    assert all((headed[:head, x : x + half] < 128).any() for x in (0, half))


@pytest.mark.parametrize("rank", [0, 4])
def test_the_command_line(tiny, tmp_path, rank):
    """A row along s holds the two images that the command draws without a scale, at 0 and 1."""
    folder = tmp_path / "run"
    launch(model=tiny, run_dir=folder, num_epochs=1, lora_rank=rank, train__learning_rate=0.05, direct=True)

    def sample(*arguments):
        command = [sys.executable, "scripts/sample.py", "--run", folder, "--count", "2", *arguments]
        result = run(list(map(str, command)))
        assert result.returncode == 0, result.stderr
        return folder / "images/samples.png"

    (base, finetuned), two = cells(sample("--prompts", "a cat"), 2, 2), range(2)
    rows = cells(sample("--prompts", "a cat", "--rl_scale", "0", "0.5", "1", "2"), 4, 2)
    for i in two:
        assert np.array_equal(rows[i][0], base[i]) and np.array_equal(rows[i][2], finetuned[i])
        assert abs(rows[i][2] - rows[i][0]).mean() > 1 and abs(rows[i][3] - rows[i][2]).mean() > 0.5
        between = [abs(rows[i][1] - rows[i][k]).mean() for k in (0, 2)]
        assert 0 < min(between) and max(between) < 1.2 * abs(rows[i][2] - rows[i][0]).mean()
    single = cells(sample("--prompts", "a cat", "--rl_scale", "2"), 2, 2)
    assert all(np.array_equal(single[0][i], base[i]) and np.array_equal(single[1][i], rows[i][3]) for i in two)


def test_the_frontier(tiny, tmp_path):
    """scripts.evaluate along s: its ends are what it says without, and the image is there."""
    folder = tmp_path / "run"
    launch(model=tiny, run_dir=folder, num_epochs=1, train__learning_rate=0.1, direct=True)
    command = [sys.executable, "scripts/evaluate.py", "--run", folder, "--count", "2", "--limit", "2"]
    measured = []
    for scales in ([], ["--rl_scale", "0", "0.5", "1"]):
        result = run(list(map(str, [*command, *scales])))
        assert result.returncode == 0, result.stderr
        measured.append(json.loads((folder / "evaluation.json").read_text()))
        assert (folder / "images/frontier.png").exists() == bool(scales)
    for section in ("seen, stochastic", "held_out, deterministic"):
        plain, along = (m[section] for m in measured)
        assert list(along) == ["base", "s = 0.5", "finetuned"]
        assert plain == {name: along[name] for name in ("base", "finetuned")}
        assert along["s = 0.5"]["reward_mean"] not in (plain["base"]["reward_mean"], plain["finetuned"]["reward_mean"])
