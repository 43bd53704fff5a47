"""The emoji world, and the embedded models trained on it."""

import os

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import StableDiffusionPipeline
from transformers import CLIPModel, CLIPProcessor

from ddpo import prompts
from ddpo.evaluation import load_classifier, named_animals
from ddpo.pipeline_logprob import sample_with_logprob
from ddpo.policy import load_policy
from scripts import emoji_world as world

MODEL = str(ROOT / "models/emoji")


def test_the_world_has_the_papers_animals_and_activities():
    assert [p for p, _ in prompts.common_animals()] == [f"{world.article(a)} {a}" for a in world.ANIMALS]
    assert set(prompts.ACTIVITIES) == set(world.ACTIVITIES) == set(world.HELD_OUT)


def test_held_out_pairs_are_never_trained_on():
    rng = np.random.default_rng(0)
    held_out = {(animal, activity) for activity, animals in world.HELD_OUT.items() for animal in animals}
    drawn = [world.sample_scene(rng) for _ in range(4000)]
    assert not held_out & {(s.animal, s.activity) for s in drawn}
    assert {s.animal for s in drawn} == set(world.ANIMALS) and {s.activity for s in drawn} == {
        "",
        *world.ACTIVITIES,
    }
    scene = world.sample_scene(rng, held_out=True)
    assert (scene.animal, scene.activity) in held_out


def test_captions():
    rng = np.random.default_rng(0)
    said = {world.caption(world.Scene("ant", "", "plain", "blue"), rng) for _ in range(50)}
    assert said == {"an ant", "an ant on a plain blue background"}
    assert world.caption(world.Scene("cat", "riding a bike", "plain", "blue"), rng) == "a cat riding a bike"


def test_textured_backgrounds_make_larger_files():
    """What the compressibility rewards can be earned with."""
    from PIL import Image

    from ddpo.rewards import jpeg_size

    rng = np.random.default_rng(0)
    size = {}
    for texture in world.TEXTURES:
        pictures = [world.background(texture, rgb, rng) for rgb in world.COLOURS.values()]
        size[texture] = jpeg_size([Image.fromarray(p) for p in pictures]).mean()
    assert size["plain"] < size["gradient"] < min(size["striped"], size["dotted"], size["checkered"])


def test_the_embedded_model_draws_after_a_plain_load():
    """transformers loads a text encoder in its file's precision, unless config.json says otherwise."""
    pipe = StableDiffusionPipeline.from_pretrained(MODEL)
    assert pipe("a cat", num_inference_steps=2).images[0].size == (64, 64)


@pytest.mark.skipif(not os.path.exists(world.FONT), reason="needs the Noto Color Emoji font")
def test_pictures_show_the_glyph():
    rng = np.random.default_rng(0)
    for animal in world.ANIMALS:
        image = world.render(world.Scene(animal, "", "plain", "white"), rng)
        assert image.size == (64, 64) and image.mode == "RGB"
        assert np.asarray(image).std() > 10, animal


@pytest.fixture(scope="module")
def drawn():
    policy = load_policy(MODEL, 0, "fp32", "cpu")
    policy.scheduler.set_timesteps(10)
    texts = [p for p, _ in prompts.common_animals()]
    noise = torch.randn(len(texts), 11, *policy.latent_shape(), generator=torch.Generator().manual_seed(0))
    return sample_with_logprob(policy, texts, noise.__getitem__, guidance_scale=3.0, eta=0.0).images


def test_the_embedded_model_draws_the_animals(drawn):
    named = named_animals(drawn, load_classifier(f"{MODEL}/classifier"))
    assert np.mean([a == b for a, b in zip(named, world.ANIMALS)]) > 0.8


def test_the_embedded_clip_agrees(drawn):
    clip = CLIPModel.from_pretrained(f"{MODEL}/clip", dtype=torch.float32)
    processor = CLIPProcessor.from_pretrained(f"{MODEL}/clip")
    texts = [p for p, _ in prompts.common_animals()]
    with torch.no_grad():
        logits = clip(**processor(text=texts, images=drawn, return_tensors="pt", padding=True)).logits_per_image
    assert (logits.argmax(1) == torch.arange(45)).float().mean() > 0.7


def test_the_embedded_models_are_small():
    size = sum(os.path.getsize(os.path.join(d, f)) for d, _, files in os.walk(ROOT / "models") for f in files)
    assert size < 12e6
