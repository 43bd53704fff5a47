"""Features of pictures: what they depend on, what they know, and what has none."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from PIL import Image

from ddpo import reward_model, rewards
from ddpo.errors import InputError
from ddpo.features import FEATURES, load_features

NETWORKS = {
    "embedding": ROOT / "models/emoji/clip",
    "layers": ROOT / "models/emoji/clip",
    "unet": ROOT / "models/emoji",
}


def pictures(count, seed=0):
    """Images of one colour with noise on it, and how much of it each has."""
    rng, made = np.random.default_rng(seed), []
    amount = rng.uniform(0, 1, count)
    for part in amount:
        colour, noise = rng.uniform(60, 190, 3), rng.normal(size=(64, 64, 1)) * 60 * part
        made.append(Image.fromarray((colour + noise).clip(0, 255).astype(np.uint8)))
    return made, amount


@pytest.mark.parametrize("kind", FEATURES)
def test_a_pictures_features_are_its_own(kind):
    """Neither the batch nor who came before changes them; size and mode are brought to what the network takes."""
    images, _ = pictures(5)
    embed, _ = load_features(kind, NETWORKS[kind])
    together = embed(images, 5)
    assert together.dtype == torch.float32 and together.isfinite().all()
    for batch_size in (1, 2):
        torch.testing.assert_close(embed(images[::-1], batch_size).flip(0), together, atol=1e-4, rtol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.01
    large = [image.resize((128, 128), Image.Resampling.NEAREST).convert("RGBA") for image in images]
    assert embed(large + [Image.new("L", (30, 70))], 6).shape == (6, together.shape[1])


def test_the_unet_sees_what_an_embedding_does_not():
    """Textures, of whatever colour: half of the images teach the other half."""
    images, amount = pictures(120)
    score = {}
    for kind, network in NETWORKS.items():
        features = load_features(kind, network)[0](images, 60)
        head, _, _ = reward_model.learn(features[:60], torch.arange(60), amount[:60])
        score[kind] = np.corrcoef(head(features[60:]).squeeze(1), amount[60:])[0, 1]
    assert score["unet"] > 0.95 and score["layers"] > 0.95


def test_a_reward_is_the_same_when_saved_and_loaded(tmp_path):
    """To the bit, and also with the fixed noise of another process."""
    images, amount = pictures(40)
    features = load_features("unet", NETWORKS["unet"])[0](images, 32)
    index, votes = torch.arange(40).reshape(20, 2), torch.tensor(amount[::2] > amount[1::2]).float()
    head, _, _ = reward_model.learn(features, index, votes)
    reward_model.save_reward_model(str(tmp_path / "model"), head, "unet", str(NETWORKS["unet"]), {})
    (values, _), expected = (
        rewards.get_reward(f"learned:{tmp_path / 'model'}")(images, [""] * 40, [{}] * 40),
        head(features),
    )
    np.testing.assert_array_equal(values, expected.squeeze(1).numpy())
    images[0].save(tmp_path / "picture.png")
    code = (
        "import sys; from PIL import Image; from ddpo.rewards import get_reward; folder, image = sys.argv[1:]\n"
        "print(float(get_reward(f'learned:{folder}')([Image.open(image)], [''], [{}])[0][0]))"
    )
    result = run([sys.executable, "-c", code, tmp_path / "model", tmp_path / "picture.png"])
    assert float(result.stdout) == pytest.approx(float(values[0]), abs=1e-3), result.stderr


def test_other_families_and_half_precision(tiny_xl, tiny_v, tiny_sd3):
    images, _ = pictures(3)
    for model in (tiny_xl, tiny_v):
        full, half = (load_features("unet", model, "cpu", precision)[0](images, 3) for precision in ("fp32", "bf16"))
        assert full.isfinite().all() and half.dtype == torch.float32
        torch.testing.assert_close(half, full, atol=0.1, rtol=0.1)
    with pytest.raises(InputError, match="StableDiffusion3Pipeline, which has no UNet"):
        load_features("unet", tiny_sd3)


@pytest.mark.parametrize(
    "features, encoder, message",
    [
        ("unets", "models/emoji", "unknown features 'unets'. Did you mean unet\\? There is: embedding, layers, unet"),
        ("unet", "models/emoji/clip", "models/emoji/clip' is not a StableDiffusionPipeline folder"),
        ("layers", "models/emoji", "models/emoji' does not hold such a model"),
        ("layers", "models/emoji/clip", "its head does not fit"),
    ],
)
def test_reward_models_that_cannot_work(tmp_path, features, encoder, message):
    reward_model.save_reward_model(str(tmp_path), reward_model.make_head(7), features, str(ROOT / encoder), {})
    with pytest.raises(InputError, match=message) as error:
        rewards.get_reward(f"learned:{tmp_path}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "features, message",
    [("unet", "--features unet needs --model"), ("unets", "unknown features 'unets'. Did you mean unet? There is: ")],
)
def test_mistakes_end_with_one_line(tmp_path, features, message):
    options = ["--choices", "x", "--features", "layers", features, "--output", tmp_path]
    result = run([sys.executable, "scripts/train_reward.py", *options])
    assert result.stderr.splitlines()[-1].startswith(f"error: {message}"), result.stderr


def test_older_reward_models_load(tmp_path):
    """One hidden layer, and no word of features."""
    head = reward_model.make_head(64, 8).requires_grad_(False)
    reward_model.save_reward_model(str(tmp_path), head, "", str(NETWORKS["embedding"]), {})
    described = {"encoder": str(NETWORKS["embedding"]), "hidden": 8}
    (tmp_path / "reward.json").write_text(json.dumps(described))
    images, _ = pictures(2)
    values, _ = rewards.get_reward(f"learned:{tmp_path}")(images, [""] * 2, [{}] * 2)
    expected = head(load_features("embedding", NETWORKS["embedding"])[0](images, 2))
    np.testing.assert_array_equal(values, expected.squeeze(1).numpy())
