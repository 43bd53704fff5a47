"""Stable Diffusion 3.x and FLUX.1: their own pipelines' images, what a run saves, and training end to end."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import launch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from safetensors.torch import load_file
from test_policy import disturb
from test_train import metrics

import train
from config.base import get_config
from config.emoji import TASKS
from config.emoji_flow import get_config as emoji_flow
from ddpo.errors import InputError
from ddpo.likelihood import draw_timesteps_and_noise, noised
from ddpo.models import use_joint_attention
from ddpo.options import check, load_preset
from ddpo.pipeline_logprob import encode, predict_noise, sample_with_logprob
from ddpo.policy import load_policy, load_weights, save_weights
from scripts.publish import is_transformer

NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}
PIPELINES = {
    "tiny_sd3": (StableDiffusion3Pipeline, SD3Transformer2DModel, {}),
    "tiny_sd35": (StableDiffusion3Pipeline, SD3Transformer2DModel, NO_T5),
    "tiny_flux": (FluxPipeline, FluxTransformer2DModel, {}),
}
SIZE = {"sample__height": 32, "sample__width": 32}


def sample_options(**options):
    sample = get_config().sample
    sample.update({"height": 32, "width": 32, "num_steps": 4, **options})
    return sample


def inputs(policy, count=3):
    latents = torch.randn(count, *policy.latent_shape(32, 32), generator=torch.Generator().manual_seed(2))
    return latents, torch.tensor([990.0, 500.0, 20.0])[:count], policy.embed(["a cat", "a dog", "an ant"][:count])


@torch.no_grad()
def guided(policy, scale=4.0):
    latents, t, embeds = inputs(policy)
    return predict_noise(policy, latents, t, embeds, policy.embed([""]), scale)


@pytest.mark.parametrize("model", PIPELINES)
@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_without_noise_the_sampler_is_diffusers_pipeline(request, model, kind):
    """Another height than width, guided: by two passes, by FLUX as the network is told."""
    policy = load_policy(request.getfixturevalue(model), 0, "fp32", "cpu")
    sample = sample_options(height=32, width=48, step_kind=kind, guidance_scale=4.0)
    policy.prepare_sampling(sample)
    noise = torch.randn(2, *policy.noise_shape(sample), generator=torch.Generator().manual_seed(0))
    prompts = ["a cat", "a dog"]
    ours = sample_with_logprob(policy, prompts, noise.__getitem__, 4.0, 0.0, keep_steps=True)
    latents = noise[:, 0]
    if model == "tiny_flux":
        latents = FluxPipeline._pack_latents(latents, *latents.shape)
    theirs = policy.pipe(
        prompts, height=32, width=48, num_inference_steps=4, guidance_scale=4.0, latents=latents, output_type="np"
    ).images
    assert ours.images[0].size == (48, 32) and not ours.log_probs.any()
    np.testing.assert_allclose(np.stack([np.asarray(i) for i in ours.images]), theirs * 255, atol=1.01)
    drawn = sample_with_logprob(policy, prompts, noise.__getitem__, 4.0, sample.noise_level, keep_steps=True)
    assert (drawn.latents[:, -1] - ours.latents[:, -1]).abs().max() > 0.1  # with noise another image


def test_one_token_stands_for_all_that_are_in_t5s_place(tiny_sd35):
    """Output and gradient are those of diffusers' transformer, told all of them; the weights are large enough that the
    tokens matter."""
    policy = load_policy(tiny_sd35, 0, "fp32", "cpu")
    plain = StableDiffusion3Pipeline.from_pretrained(tiny_sd35, **NO_T5)
    for network in (policy.denoiser, plain.transformer):
        network.double().requires_grad_(True)
        generator = torch.Generator().manual_seed(0)
        for p in network.parameters():
            p.data += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    latents, t, embeds = inputs(policy)
    latents, embeds = latents.double(), embeds.to(torch.float64)
    prompts = ["a cat", "a dog", "an ant"]
    states, _, pooled, _ = plain.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
    assert embeds.tensors["states"].shape[1] == 24 + 1 and states.shape[1] == 24 + 256
    ours = policy.family.call(policy.denoiser, latents, t, embeds, 1.0)
    theirs = plain.transformer(latents, states.double(), pooled.double(), t).sample
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # the text encoders are float32
    without = plain.transformer(latents, embeds.tensors["states"], pooled.double(), t).sample
    assert (without - theirs).abs().max() > 0.1
    for output in (ours, theirs):
        output.square().sum().backward()
    for p, q in zip(policy.denoiser.parameters(), plain.transformer.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3 * float(q.grad.abs().max()))


@pytest.mark.parametrize("model", PIPELINES)
@pytest.mark.parametrize("rank", [0, 4])
def test_what_is_saved_gives_the_trainers_predictions(request, tmp_path, model, rank):
    """In a fresh pipeline, and in another policy of the same kind, into the weights that its optimizer holds."""
    folder, (pipeline, transformer, absent) = request.getfixturevalue(model), PIPELINES[model]
    policy = load_policy(folder, rank, "fp32", "cpu")
    before = guided(policy)
    disturb(policy)
    save_weights(policy, tmp_path)
    pipe = pipeline.from_pretrained(folder, dtype=torch.float32, **absent)
    if rank:
        pipe.load_lora_weights(str(tmp_path / "lora"))
    else:
        pipe.transformer = transformer.from_pretrained(tmp_path / "transformer", dtype=torch.float32)
    pipe.transformer.to(memory_format=torch.channels_last)
    if model == "tiny_sd35":
        use_joint_attention(pipe.transformer)
    latents, t, embeds = inputs(policy)
    with torch.no_grad():
        theirs = policy.family.call(pipe.transformer, latents, t, embeds, 4.0)
        ours = policy.forward(latents, t, embeds, 4.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # sums go another way round
    assert (guided(policy) - before).abs().max() > 1e-2
    other = load_policy(folder, rank, "fp32", "cpu")
    held = other.trainable_parameters()
    load_weights(other, tmp_path)
    assert torch.equal(guided(other), guided(policy))
    assert all(a is b for a, b in zip(held, other.trainable_parameters(), strict=True))


@pytest.mark.parametrize("model", PIPELINES)
@pytest.mark.parametrize("rank", [0, 4])
def test_base_and_precision(request, model, rank):
    """The base model stays reachable; the trained weights are float32 in bf16, whose output is close to float32's."""
    folder = request.getfixturevalue(model)
    exact, policy = (load_policy(folder, rank, precision, "cpu") for precision in ("fp32", "bf16"))
    config = get_config()
    config.train.kl_weight = 1.0
    policy.prepare_training(config.train)
    assert {p.dtype for p in policy.trainable_parameters()} == {torch.float32}
    start = guided(policy)
    assert 0 < (start - guided(exact)).norm() / start.norm() < 0.1
    disturb(policy)
    with policy.base():
        assert torch.equal(guided(policy), start)
    assert not torch.equal(guided(policy), start)


def test_told_guidance_is_one_pass_and_matters(tiny_flux):
    policy = load_policy(tiny_flux, 0, "fp32", "cpu")
    latents, t, embeds = inputs(policy)
    with torch.no_grad():
        assert torch.equal(guided(policy, 4.0), policy.forward(latents, t, embeds, 4.0))
    assert not torch.equal(guided(policy, 4.0), guided(policy, 1.0))


def test_shift_depends_on_the_size_or_is_given(tiny_flux, tiny_sd3):
    """FLUX shifts large images more, as its pipeline does; `sample.shift` is s k / (1 + (s - 1) k) of even k."""
    flux, sd3 = (load_policy(folder, 0, "fp32", "cpu") for folder in (tiny_flux, tiny_sd3))
    first = {}
    for side in (32, 512):
        flux.prepare_sampling(sample_options(height=side, width=side))
        first[side] = float(flux.scheduler.sigmas[1])
    assert first[32] < first[512]
    even = torch.tensor([1, 0.75, 0.5, 0.25, 0])
    for policy in (flux, sd3):
        policy.prepare_sampling(sample_options(shift=3.0))
        torch.testing.assert_close(policy.scheduler.sigmas, 3 * even / (1 + 2 * even))
    own = FlowMatchEulerDiscreteScheduler.from_pretrained(tiny_sd3, subfolder="scheduler")
    own.set_timesteps(4)
    sd3.prepare_sampling(sample_options())
    assert torch.equal(sd3.scheduler.sigmas, own.sigmas)


@pytest.mark.parametrize("model", PIPELINES)
def test_noised_samples_are_rectified_flows(request, model):
    """x_s = (1 - s) x_0 + s noise at the s that the network is told; from its target x_0 follows, and from another
    output one that is x_0_scale times as far off as the output."""
    policy = load_policy(request.getfixturevalue(model), 4, "fp32", "cpu")
    x_0, _, embeds = inputs(policy)
    options = SimpleNamespace(draws=200, inner_epochs=1, prompt_dropout=0.0, timestep_choice="random")
    t, dropped, noise = draw_timesteps_and_noise(policy, [(0, 0, i) for i in range(3)], x_0.shape[1:], options)
    assert t.shape == (3, 200) and 0 < t.min() < 20 and 980 < t.max() <= 1000 and not dropped.any()
    t, noise = t[:, 120], noise[:, 120]
    s = (t / 1000)[:, None, None, None]
    x_s, target, x_0_scale = noised(policy.scheduler, x_0, noise, t)
    torch.testing.assert_close(x_s, (1 - s) * x_0 + s * noise)
    torch.testing.assert_close(x_s - s * target, x_0, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        output = policy.forward(x_s, t, embeds)
    torch.testing.assert_close(x_s - s * output - x_0, x_0_scale * (target - output), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["tiny_sd3", "tiny_flux"])
def test_sizes_and_steps_that_the_model_cannot_draw(request, model):
    policy = load_policy(request.getfixturevalue(model), 0, "fp32", "cpu")
    with pytest.raises(InputError, match="sample.width = 36 is not a multiple of 8: use 32 or 40"):
        policy.latent_shape(32, 36)
    with pytest.raises(InputError, match="sample.num_steps = 1001: the model has 1000 timesteps"):
        policy.prepare_sampling(sample_options(num_steps=1001))


RUNS = [
    ("tiny_sd3", 4, "fp32", {"sample__guidance_scale": 4.0}),
    ("tiny_sd35", 0, "bf16", {"sample__step_kind": "cps", "sample__noise_level": 0.8}),
    ("tiny_sd35", 4, "bf16", {"sample__guidance_scale": 4.0, "train__kl_weight": 0.1, "algorithm": "ddpo_mask"}),
    ("tiny_flux", 4, "bf16", {"sample__guidance_scale": 3.5, "sample__step_kind": "dance", "sample__shift": 3.0}),
    ("tiny_flux", 0, "fp32", {"train__kl_weight": 0.1}),
    ("tiny_flux", 4, "fp32", {"algorithm": "nft", "train__ema_decay": 0.9}),
]


@pytest.mark.parametrize("model, rank, precision, options", RUNS)
def test_end_to_end(request, tmp_path, model, rank, precision, options):
    """Two epochs in one go, and one and one: the same bits, a ratio of 1 before any update, and weights that load."""
    folder, (pipeline, transformer, absent) = request.getfixturevalue(model), PIPELINES[model]
    options = {"model": folder, "lora_rank": rank, "precision": precision, "direct": True, **SIZE, **options}
    options |= {"train__learning_rate": 1e-3}
    launch(run_dir=tmp_path / "whole", **options)
    launch(run_dir=tmp_path / "parts", num_epochs=1, **options)
    launch(resume=tmp_path / "parts", **options)
    lines = metrics(tmp_path / "whole")
    assert lines == metrics(tmp_path / "parts") and [line["epoch"] for line in lines] == [0, 1]
    assert all(np.isfinite(value) for line in lines for value in line.values())
    assert all(line["ratio_error"] == 0 and line["grad_norm"] > 0 for line in lines)
    if options.get("algorithm") != "nft":
        assert all(line["kl_old"] > 0 for line in lines)
    saved = tmp_path / "whole/checkpoints/epoch_0002"
    assert is_transformer(saved)
    if rank:
        pipe = pipeline.from_pretrained(folder, dtype=torch.float32, **absent)
        pipe.load_lora_weights(str(saved / "lora"))
        state = load_file(saved / "lora/pytorch_lora_weights.safetensors")
        assert all(key.startswith("transformer.") for key in state)
        assert any(value.any() for key, value in state.items() if "lora_B" in key)
    else:
        old = transformer.from_pretrained(folder, subfolder="transformer").state_dict()
        new = transformer.from_pretrained(saved / "transformer").state_dict()
        assert any(not torch.equal(old[key], new[key]) for key in old)


@pytest.mark.parametrize(
    "preset, model",
    [("sd3:grpo", "tiny_sd35"), ("sd3:fast", "tiny_sd35"), ("flux:lora", "tiny_flux"), ("flux:full", "tiny_flux")],
)
def test_presets_fit_their_models(request, preset, model):
    """Their numbers work for 1 to 8 processes, their LoRA's modules exist, and their options are those of a flow."""
    config = load_preset("config/" + preset.replace(":", ".py:"))
    for processes in (1, 2, 8):
        check(config, processes)
    policy = load_policy(request.getfixturevalue(model), config.lora_rank, "fp32", "cpu", config.lora_targets)
    config.sample.height = config.sample.width = 32
    policy.prepare_sampling(config.sample)
    assert len(policy.step_stds(policy.noise_level(config.sample))) == config.sample.num_steps
    if config.lora_rank:
        names = [n for n, p in policy.denoiser.named_parameters() if p.requires_grad]
        assert all(any(f"{target}.lora" in n for n in names) for target in config.lora_targets.split(","))


def test_options_of_the_other_family(tiny, tiny_sd3, tmp_path):
    """One line each, which names the option that is meant."""
    for model, options, words in (
        (tiny, {"sample__noise_level": 0.5}, ("sample.noise_level = 0.5", "a DDIM model", "sample.eta")),
        (tiny, {"sample__step_kind": "cps"}, ("sample.step_kind = cps", "a DDIM model", "sample.eta")),
        (tiny_sd3, {"sample__eta": 0.5}, ("sample.eta = 0.5", "a flow-matching model", "sample.noise_level")),
        (tiny_sd3, {"sample__step_kind": "csp"}, ("unknown kind of flow step 'csp'", "Did you mean cps?")),
        (tiny_sd3, {"sample__noise_level": 0.0}, ("sample.noise_level = 0.0 must be greater than 0",)),
        (tiny_sd3, {"sample__true_cfg_scale": 4.0}, ("sample.true_cfg_scale", "guidance is one setting")),
    ):
        result = launch(model=model, run_dir=tmp_path / "run", check=False, direct=True, **options)
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and all(w in lines[0] for w in words) and "Traceback" not in result.stderr, result.stderr


def test_a_pipeline_that_is_not_supported_names_those_that_are(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "PixArtSigmaPipeline"}))
    with pytest.raises(InputError, match="PixArtSigmaPipeline, which is not supported. There is: .*FluxPipeline"):
        load_policy(str(tmp_path), 4, "fp32", "cpu")


@pytest.mark.parametrize("variant", [f"{task},{method}" for task in TASKS for method in ("lora", "full")])
def test_the_presets_of_the_embedded_flow_train(tiny_sd35, tmp_path, monkeypatch, variant):
    """As they are, but for the model, the rewards that need the embedded model's images, and the numbers."""
    config = emoji_flow(variant)
    config.update_from_flattened_dict({
        "model": tiny_sd35, "run_dir": str(tmp_path), "num_epochs": 1, "grid_images": 1, "grid_every": 0, "threads": 1,
        "sample.images_per_epoch": 8, "sample.num_steps": 3, "reward": "jpeg_compressibility",
    })  # fmt: skip
    monkeypatch.setattr("ddpo.interrupt.signal.signal", lambda *_: None)  # pytest keeps its Ctrl-C
    train.train(config, "preset")
    (line,) = metrics(tmp_path)
    assert line["grad_norm"] > 0 and line["ratio_error"] == 0 and np.isfinite(line["loss"])


def test_pictures_become_latents_by_the_vaes_own_shift(tiny_sd3):
    """As diffusers' image processor and pipelines have it."""
    vae = load_policy(tiny_sd3, 0, "fp32", "cpu").vae
    vae.register_to_config(shift_factor=0.3)
    image = Image.effect_noise((40, 32), 80).convert("RGB")
    with torch.no_grad():
        mean = vae.encode(VaeImageProcessor().preprocess(image)).latent_dist.mean
    found = encode(vae, [image, image], 40, 32)
    torch.testing.assert_close(found, (mean - 0.3).expand(2, -1, -1, -1) * vae.config.scaling_factor)
