"""The emoji world, and the embedded models trained on it."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, launch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from safetensors.torch import load_file
from test_train import metrics
from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer

from config.base import get_config
from ddpo import prompts
from ddpo.evaluation import load_classifier, named_animals
from ddpo.pipeline_logprob import sample_with_logprob
from ddpo.policy import load_policy
from scripts import emoji_world as world
from scripts import make_emoji_model

MODEL, FLOW = str(ROOT / "models/emoji"), str(ROOT / "models/emoji-flow")


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


def draw(model, texts, num_steps, guidance_scale):
    """Without noise but the first: its images, and that first noise."""
    policy, sample = load_policy(model, 0, "fp32", "cpu"), get_config().sample
    sample.num_steps = num_steps
    policy.prepare_sampling(sample)
    noise = torch.randn(len(texts), *policy.noise_shape(sample), generator=torch.Generator().manual_seed(0))
    return sample_with_logprob(policy, texts, noise.__getitem__, guidance_scale, 0.0).images, noise[:, 0]


@pytest.fixture(scope="module")
def drawn():
    return draw(MODEL, [p for p, _ in prompts.common_animals()], 10, 3.0)[0]


def share_named(images):
    named = named_animals(images, load_classifier(f"{MODEL}/classifier"))
    return np.mean([a == b for a, b in zip(named, world.ANIMALS, strict=True)])


def test_the_embedded_model_draws_the_animals(drawn):
    assert share_named(drawn) > 0.8


def test_the_embedded_flow_draws_the_animals():
    assert share_named(draw(FLOW, [p for p, _ in prompts.common_animals()], 10, 3.0)[0]) > 0.8


def test_plain_diffusers_draws_the_embedded_flow_alike():
    """All 256 tokens of zeros in T5's place, of which the policy has one."""
    pipe = StableDiffusion3Pipeline.from_pretrained(FLOW, text_encoder_3=None, tokenizer_3=None)
    texts = ["a cat", "an ant riding a bike"]
    ours, latents = draw(FLOW, texts, 4, 3.0)
    theirs = pipe(texts, num_inference_steps=4, guidance_scale=3.0, latents=latents, output_type="np").images
    np.testing.assert_allclose(np.stack([np.asarray(i) for i in ours]), theirs * 255, atol=1.01)
    assert theirs.std() > 0.1


def test_the_embedded_flow_trains(tmp_path):
    """The preset's command, its LoRA and its guidance, on few images of few steps."""
    options = {"sample__guidance_scale": 3.0, "train__learning_rate": 1e-3, "train__kl_weight": 0.01}
    options |= {"lora_rank": 16, "model": FLOW, "direct": True}
    launch("--config", "config/emoji_flow.py:compressibility,lora", run_dir=tmp_path / "run", **options)
    lines = metrics(tmp_path / "run")
    assert len(lines) == 2 and all(np.isfinite(value) for line in lines for value in line.values())
    assert all(line["ratio_error"] == 0 and line["grad_norm"] > 0 and line["kl_old"] > 0 for line in lines)


def test_making_the_flow_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """To the bit, on another day: stopped in the fourth of four updates, when two were saved."""
    clip_grad_norm_, updates = torch.nn.utils.clip_grad_norm_, []

    def stopped_in_the_fourth(*arguments):
        updates.append(arguments)
        if len(updates) == 4 + 4:
            raise KeyboardInterrupt
        return clip_grad_norm_(*arguments)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", stopped_in_the_fourth)
    tokenizer = CLIPTokenizer.from_pretrained(f"{FLOW}/tokenizer")
    captions = make_emoji_model.all_captions()[:6]
    tokens = make_emoji_model.tokenize(tokenizer, captions, make_emoji_model.FLOW_TOKENS).unflatten(0, (3, 2))
    latents = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0)).half()
    options = {"seed": 0, "device": "cpu", "save_every": 2, "flow_steps": 4, "flow_minutes": 0, "flow_batch": 2}
    options |= {"flow_learning_rate": 1e-3, "flow_from": ""}

    def make(work, **others):
        work.mkdir(exist_ok=True)
        args = SimpleNamespace(work=str(work), **options | others)
        return make_emoji_model.make_flow(args, latents, tokens, 1.0, tokenizer).state_dict()

    whole = make(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "parts")
    torch.manual_seed(1)  # another day
    parts = make(tmp_path / "parts")
    assert len(updates) == 4 + 4 + 2
    assert parts.keys() == whole.keys() and all(torch.equal(parts[key], whole[key]) for key in whole)
    again = make(tmp_path / "parts")  # its weights are there
    assert len(updates) == 4 + 4 + 2 and all(torch.equal(again[key], whole[key]) for key in whole)
    further = make(tmp_path / "further", flow_from=FLOW, flow_learning_rate=0.0, flow_steps=1)
    trained = load_file(f"{FLOW}/transformer/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(further[f"0.{key}"], trained[key].float()) for key in trained)


def test_the_embedded_clip_agrees(drawn):
    clip = CLIPModel.from_pretrained(f"{MODEL}/clip", dtype=torch.float32)
    processor = CLIPProcessor.from_pretrained(f"{MODEL}/clip")
    texts = [p for p, _ in prompts.common_animals()]
    with torch.no_grad():
        logits = clip(**processor(text=texts, images=drawn, return_tensors="pt", padding=True)).logits_per_image
    assert (logits.argmax(1) == torch.arange(45)).float().mean() > 0.7


def test_the_embedded_models_are_small():
    for model, most in ((MODEL, 12e6), (FLOW, 8e6)):
        assert make_emoji_model.folder_size(model) < most
