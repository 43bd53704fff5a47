"""Loading, precision, and whether what a run saves is what it trained."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from test_processes import distance

import train
from config.base import get_config
from ddpo.checkpoint import save_checkpoint
from ddpo.ddim_logprob import ddim_step_with_logprob
from ddpo.errors import InputError
from ddpo.likelihood import Draws, Rollout, draw_timesteps_and_noise, noised
from ddpo.losses import ALGORITHMS
from ddpo.models import StableDiffusion
from ddpo.pipeline_logprob import Trajectories, predict_noise, sample_with_logprob
from ddpo.policy import load_policy, load_weights, save_weights

MODES = [(r, p) for r in (0, 4) for p in ("fp32", "bf16")]


def disturb(policy, scale=0.05):
    generator = torch.Generator().manual_seed(1)
    for p in policy.trainable_parameters():
        p.data += scale * torch.randn(p.shape, generator=generator)


def inputs(policy, count=3):
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(count, *policy.latent_shape(), generator=generator)
    return latents, torch.tensor([1, 500, 999])[:count], policy.embed(["a cat", "a dog", "an ant"][:count])


@torch.no_grad()
def guided(policy, guidance_scale=5.0):
    latents, t, embeds = inputs(policy)
    return predict_noise(policy, latents, t, embeds, policy.embed([""]), guidance_scale)


@pytest.mark.parametrize("rank, precision", MODES)
def test_trainable_weights_are_float32(tiny, rank, precision):
    policy = load_policy(tiny, rank, precision, "cpu")
    assert {p.dtype for p in policy.trainable_parameters()} == {torch.float32}
    trainable = {n for n, p in policy.denoiser.named_parameters() if p.requires_grad}
    assert all("lora" in n for n in trainable) if rank else len(trainable) == len(list(policy.denoiser.parameters()))
    assert guided(policy).dtype == torch.float32


@pytest.mark.parametrize("rank, precision", MODES)
def test_what_is_saved_gives_the_trainers_predictions(tiny, tmp_path, rank, precision):
    """A fresh pipeline with the saved LoRA, or the saved UNet: to rounding."""
    policy = load_policy(tiny, rank, precision, "cpu")
    before = guided(policy)
    disturb(policy)
    save_weights(policy, tmp_path)
    latents, t, embeds = inputs(policy)
    with torch.no_grad():
        ours = policy.forward(latents, t, embeds)
        pipe = StableDiffusionPipeline.from_pretrained(tiny, dtype=torch.float32)
        if rank:
            pipe.load_lora_weights(str(tmp_path / "lora"))
        else:
            pipe.unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet", dtype=torch.float32)
        pipe.unet.to(memory_format=torch.channels_last)  # as the trainer's is; else sums go another way round
        theirs = pipe.unet(latents, t, embeds.tensors["states"]).sample
    if precision == "fp32":
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # sums go another way round
    else:
        assert (ours - theirs).norm() / theirs.norm() < 2e-2  # bfloat16 has 8 bits
    assert (guided(policy) - before).abs().max() > 1e-2  # the disturbance shows, so the comparison means something


@pytest.mark.parametrize("rank", [0, 4])
def test_loading_goes_into_the_weights_that_the_optimizer_holds(tiny, tmp_path, rank):
    one = load_policy(tiny, rank, "fp32", "cpu")
    disturb(one)
    save_weights(one, tmp_path)
    two = load_policy(tiny, rank, "fp32", "cpu")
    held = two.trainable_parameters()
    load_weights(two, tmp_path)
    assert torch.equal(guided(one), guided(two))
    now = two.trainable_parameters()
    assert len(held) == len(now) and all(a is b for a, b in zip(held, now))
    with pytest.raises(InputError):
        load_weights(load_policy(tiny, 2 if rank else 4, "fp32", "cpu"), tmp_path)


@pytest.mark.parametrize("rank", [0, 2])
def test_checkpoints_have_the_users_permissions(tiny, tmp_path, rank):
    policy, nothing = load_policy(tiny, rank, "fp32", "cpu"), SimpleNamespace(state_dict=dict)
    before = os.umask(0o027)
    try:
        save_checkpoint(str(tmp_path), 1, policy, nothing, nothing, keep=1)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 1 and {path.stat().st_mode & 0o777 for path in files} == {0o640}


def test_lora_starts_as_the_base_model(tiny):
    base, lora = load_policy(tiny, 0, "fp32", "cpu"), load_policy(tiny, 4, "fp32", "cpu")
    assert torch.equal(guided(base), guided(lora))
    disturb(lora)
    assert not torch.equal(guided(base), guided(lora))


def test_lora_starts_from_its_seed_in_every_precision(tiny):
    def start(precision, seed):
        return load_policy(tiny, 4, precision, "cpu", lora_seed=seed).trainable_parameters()

    assert all(torch.equal(a, b) for a, b in zip(start("fp32", 1), start("bf16", 1)))
    assert not all(torch.equal(a, b) for a, b in zip(start("fp32", 1), start("fp32", 2)))


@pytest.mark.parametrize("targets", ["to_q", "to_k, conv1,time_emb_proj"])
def test_lora_targets(tiny, targets):
    policy = load_policy(tiny, 2, "fp32", "cpu", lora_targets=targets)
    targets = targets.replace(" ", "").split(",")
    names = [n for n, p in policy.denoiser.named_parameters() if p.requires_grad]
    assert names and all(any(f".{t}.lora" in n for t in targets) for n in names)
    assert all(any(f".{t}.lora" in n for n in names) for t in targets)


@pytest.mark.parametrize("rank, precision", MODES)
def test_updates_smaller_than_half_precision_arrive(tiny, rank, precision):
    """AdamW steps of 2e-5 on weights near 1, where bfloat16 numbers are 2^-7 apart: 100 of them move by 2e-3."""
    policy = load_policy(tiny, rank, precision, "cpu")
    parameters = policy.trainable_parameters()
    for p in parameters:
        p.data.fill_(1.0)
    optimizer = torch.optim.AdamW(parameters, 2e-5, weight_decay=0)
    for _ in range(100):
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
    for p in parameters:
        torch.testing.assert_close(p.data, torch.full_like(p, 1 - 2e-3), rtol=0, atol=1e-5)


def test_every_pass_is_by_the_masters_as_they_are(tiny, tmp_path, monkeypatch):
    """Through a run with a moving average that samples, evaluations, saves and a resume: at each pass the network
    holds its masters' newest values, though they are not copied before each."""
    passes, copies, seen = [], [], set()
    forward, copy = StableDiffusion.call, torch._foreach_copy_

    def checked(family, network, *inputs):
        for weight, master in zip(masters[0].weights, masters[0].parameters, strict=True):
            assert weight.dtype == torch.bfloat16 and torch.equal(weight, master.bfloat16())
        seen.add(float(sum(master.detach().double().sum() for master in masters[0].parameters)))
        passes.append(len(passes))
        return forward(family, network, *inputs)

    def counted(targets, sources):
        copies.append(len(targets))
        copy(targets, sources)

    def load(*args):
        policy = load_policy(*args)
        masters[:] = [policy.masters]
        return policy

    masters = []
    monkeypatch.setattr(StableDiffusion, "call", checked)
    monkeypatch.setattr(torch, "_foreach_copy_", counted)
    monkeypatch.setattr(train, "load_policy", load)
    monkeypatch.setattr("ddpo.run.lock_run", lambda folder: None)  # one process runs it twice
    monkeypatch.setattr("ddpo.interrupt.signal.signal", lambda *_: None)  # pytest keeps its Ctrl-C
    config = get_config()
    config.update_from_flattened_dict({
        **SMALL, "model": tiny, "run_dir": str(tmp_path / "run"), "lora_rank": 0, "precision": "bf16", "num_epochs": 2,
        "train.ema_decay": 0.5, "sample.averaged": True, "evaluate.every": 1, "evaluate.limit": 1,
        "algorithm": "awm", "train.batch_size": 2, "train.learning_rate": 1e-2,
    })  # fmt: skip
    train.train(config, "test")
    config.update_from_flattened_dict({"resume": str(tmp_path / "run"), "num_epochs": 3})
    train.train(config, "test")
    assert len(seen) >= 8  # of six updates; the weights themselves train, and their average samples
    assert len(copies) < 0.5 * len(passes)


@pytest.mark.parametrize("rank", [0, 4])
def test_half_precisions_gradient_is_as_near_to_float32s_as_autocasts(tiny, rank, monkeypatch):
    """The gradient of a step's log-prob without autocast, against that of diffusers' network under it."""

    def gradient(precision, autocast=False):
        if autocast:
            monkeypatch.setattr("ddpo.policy.use_fewer_kernels", lambda unet: None)
        policy = load_policy(tiny, rank, precision, "cpu")
        disturb(policy)
        latents, t, embeds = inputs(policy)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = predict_noise(policy, latents, t, embeds, policy.embed([""]), 5.0).float()
        for weight, part in zip((1.0, -1.0, 0.5), output.square().mean((1, 2, 3))):  # as minibatches, which are summed
            (weight * part).backward(retain_graph=True)
        assert all(p.grad.dtype == torch.float32 for p in policy.trainable_parameters())
        return torch.cat([p.grad.flatten() for p in policy.trainable_parameters()]).double()

    exact, ours, autocasts = gradient("fp32"), gradient("bf16"), gradient("fp32", autocast=True)
    errors = [float((g - exact).norm() / exact.norm()) for g in (ours, autocasts)]
    assert torch.nn.functional.cosine_similarity(ours, exact, dim=0) > 0.99
    assert errors[0] < 1.5 * errors[1] < 0.3


def test_guidance_is_the_extrapolation_and_scale_one_is_the_prompt_alone(tiny):
    policy = load_policy(tiny, 0, "fp32", "cpu")
    latents, t, embeds = inputs(policy)
    with torch.no_grad():
        cond = policy.forward(latents, t, embeds)
        uncond = policy.forward(latents, t, policy.embed([""]).expand(3))
    torch.testing.assert_close(guided(policy, 5.0), uncond + 5 * (cond - uncond), rtol=1e-4, atol=1e-5)
    assert torch.equal(guided(policy, 1.0), cond)


@pytest.mark.parametrize("model", ["tiny", "tiny_xl"])
def test_sampler_equals_diffusers_pipeline(model, request):
    """Deterministic sampling with our sampler gives the images of the model's own pipeline, which for SDXL has the
    empty prompt as zeros."""
    policy = load_policy(request.getfixturevalue(model), 0, "fp32", "cpu")
    policy.scheduler.set_timesteps(6)
    shape = policy.latent_shape(40, 24)
    assert shape == (4, 10, 6)
    prompts = ["a cat", "a dog"]
    noise = [torch.randn(7, *shape, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    ours = sample_with_logprob(policy, prompts, noise.__getitem__, guidance_scale=4.0, eta=0.0, keep_steps=True)
    latents = torch.stack([n[0] for n in noise])
    theirs = policy.pipe(
        prompts, height=40, width=24, num_inference_steps=6, guidance_scale=4.0, eta=0.0, latents=latents,
        output_type="np",
    ).images  # fmt: skip
    assert ours.latents.shape == (2, 7, *shape) and ours.means.shape == (2, 6, *shape)
    assert ours.log_probs.shape == (2, 6) and len(ours.timesteps) == 6
    final = sample_with_logprob(policy, prompts, noise.__getitem__, guidance_scale=4.0, eta=0.0).latents
    assert torch.equal(final, ours.latents[:, -1:])  # all that is kept otherwise
    assert [i.size for i in ours.images] == [(24, 40)] * 2
    np.testing.assert_allclose(np.stack([np.asarray(i) for i in ours.images]), theirs * 255, atol=1.01)


def test_latents_of_odd_size(tiny):
    policy = load_policy(tiny, 0, "fp32", "cpu")
    policy.scheduler.set_timesteps(2)
    shape = policy.latent_shape(52, 36)
    assert shape == (4, 13, 9)  # the UNet halves it all the same
    drawn = sample_with_logprob(policy, ["a cat"], lambda i: torch.randn(3, *shape), 5.0, 1.0)
    assert drawn.images[0].size == (36, 52) and drawn.log_probs.isfinite().all()


def test_sampling_does_not_depend_on_the_batch_size(tiny):
    """Up to rounding, which guidance enlarges."""
    policy = load_policy(tiny, 4, "fp32", "cpu")
    policy.scheduler.set_timesteps(4)
    prompts = ["a cat", "a dog", "a cat", "an ant", "a bee"]

    def noise(i):
        return torch.randn(5, *policy.latent_shape(), generator=torch.Generator().manual_seed(i))

    whole = sample_with_logprob(policy, prompts, noise, 5.0, 1.0, keep_steps=True)
    for batch_size in (1, 2, 4):
        parts = sample_with_logprob(policy, prompts, noise, 5.0, 1.0, batch_size, keep_steps=True)
        assert distance([parts.latents], [whole.latents]) < 1e-5
        assert distance([parts.log_probs], [whole.log_probs]) < 1e-5


def test_ratio_is_one_before_any_update(tiny):
    """Recorded transitions scored again: exactly 1 in like batches, always; in others to float32's rounding."""
    for rank, precision in MODES + [(4, "fp16"), (0, "fp16")]:
        policy = load_policy(tiny, rank, precision, "cpu")
        policy.scheduler.set_timesteps(5)
        noise = torch.randn(6, 6, *policy.latent_shape(), generator=torch.Generator().manual_seed(0))
        prompts = ["a cat", "a dog", "an ant", "a bee", "a cat", "a cow"]
        drawn = sample_with_logprob(policy, prompts, noise.__getitem__, 5.0, 1.0, keep_steps=True)
        latents, log_probs, timesteps = drawn.latents, drawn.log_probs, drawn.timesteps
        embeds, negative = policy.embed(prompts), policy.embed([""])
        for rows in (slice(0, 6), slice(0, 4)):
            for step in range(5):
                x_t, x_next, t = (
                    latents[rows, step],
                    latents[rows, step + 1],
                    timesteps[step].expand(len(embeds[rows])),
                )
                output = predict_noise(policy, x_t, t, embeds[rows], negative, 5.0)  # with gradients, as in training
                _, again = ddim_step_with_logprob(policy.scheduler, output, t, x_t, 1.0, prev_sample=x_next)
                error = torch.expm1(again - log_probs[rows, step]).abs().max()
                if rows == slice(0, 6):
                    assert error == 0, (rank, precision, step)
                elif precision == "fp32":
                    assert error < 1e-6, (rank, precision, step)


def test_sizes_that_the_model_cannot_draw(tiny):
    policy = load_policy(tiny, 0, "fp32", "cpu")
    with pytest.raises(InputError, match="sample.width = 30 is not a multiple of 4: use 28 or 32"):
        policy.latent_shape(32, 30)


def test_a_misspelled_lora_target_is_not_dropped(tiny):
    with pytest.raises(InputError, match="no module 'to_z'"):
        load_policy(tiny, 2, "fp32", "cpu", lora_targets="to_q,to_z")


@pytest.mark.parametrize("said", [{}, {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}])
def test_scheduler_of_another_sampler_becomes_ddim(tiny, tmp_path, said):
    """Stable Diffusion 1.x comes with PNDM. Its schedule is kept, and what its file leaves out is as there."""
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    pndm = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({**pndm, "skip_prk_steps": True, **said}))
    ours, theirs = load_policy(str(folder), 0, "fp32", "cpu").scheduler, load_policy(tiny, 0, "fp32", "cpu").scheduler
    assert type(ours) is type(theirs) is DDIMScheduler
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    for key in ("clip_sample", "steps_offset", "set_alpha_to_one", "prediction_type", "timestep_spacing"):
        assert ours.config[key] == theirs.config[key], key


@pytest.mark.parametrize("rank, precision", MODES)
def test_base_is_the_base_model_whatever_has_been_trained(tiny, rank, precision):
    policy = load_policy(tiny, rank, precision, "cpu")
    config = get_config()
    config.train.kl_weight = 1.0
    policy.prepare_training(config.train)
    start = guided(policy)
    disturb(policy)
    trained = guided(policy)
    with policy.base():
        assert torch.equal(guided(policy), start)
    assert torch.equal(guided(policy), trained) and not torch.equal(trained, start)
    assert {p.dtype for p in policy.trainable_parameters()} == {torch.float32}


@pytest.mark.parametrize("rank", [0, 4])
def test_kl_to_the_base_model_starts_at_zero_and_leads_back(tiny, rank):
    """It is 0 at the base model; from elsewhere, following its gradient lowers it."""
    policy = load_policy(tiny, rank, "fp32", "cpu")
    policy.scheduler.set_timesteps(10)
    config = get_config()
    config.train.kl_weight = 1.0
    policy.prepare_training(config.train)
    latents = torch.randn(3, 11, *policy.latent_shape())
    trajectories = Trajectories([], latents, latents[:, 1:], torch.zeros(3, 10), policy.scheduler.timesteps)
    rollout = Rollout(policy, config, ALGORITHMS["ddpo_is"], 0, [0, 1, 2], ["a cat", "a dog", ""], trajectories)

    def kl():
        return rollout.score(torch.arange(3), torch.arange(3)).kl_base.mean()

    assert kl() == 0
    disturb(policy)
    before = kl()
    before.backward()
    with torch.no_grad():
        squared = sum(p.grad.square().sum() for p in policy.trainable_parameters())
        for p in policy.trainable_parameters():
            p -= 1e-3 * before / squared * p.grad
    assert float((kl() / before).detach()) == pytest.approx(
        1 - 1e-3, abs=3e-5
    )  # a first-order step of a thousandth of its value


def draw_options(**options):
    return SimpleNamespace(**{"draws": 1, "inner_epochs": 1, "prompt_dropout": 0.0, "timestep_choice": "random",
                              "timestep_fraction": 0.5, **options})  # fmt: skip


@pytest.mark.parametrize("model, prediction_type", [("tiny", "epsilon"), ("tiny_v", "v_prediction")])
def test_denoising_error_is_diffusers_training_loss(request, model, prediction_type):
    """The loss that diffusers' own training scripts compute; and the scale is the derivative of x_0."""
    model = request.getfixturevalue(model)
    policy = load_policy(model, 4, "fp32", "cpu")
    disturb(policy)
    x_0, t, embeds = inputs(policy)
    noise = torch.randn_like(x_0)
    scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    x_t, target, x_0_scale = noised(policy.scheduler, x_0, noise, t)
    torch.testing.assert_close(x_t, scheduler.add_noise(x_0, noise, t), rtol=1e-5, atol=1e-5)
    expected = noise if prediction_type == "epsilon" else scheduler.get_velocity(x_0, noise, t)
    torch.testing.assert_close(target, expected, rtol=1e-5, atol=1e-5)
    output = policy.denoiser(x_t, t, embeds.tensors["states"]).sample
    loss = torch.nn.functional.mse_loss(output, expected, reduction="none").mean((1, 2, 3))
    torch.testing.assert_close(Draws(policy.forward(x_t, t, embeds), target).error, loss, rtol=1e-4, atol=1e-5)
    for i, step in enumerate(t.tolist()):  # what diffusers' step takes x_0 to be, for the output and for the target

        def implied(output, step=step, i=i):
            return scheduler.step(output[i : i + 1], step, x_t[i : i + 1]).pred_original_sample

        difference = (implied(output) - implied(target)).abs()
        scaled = (x_0_scale * (output - target)).abs()[i : i + 1]
        torch.testing.assert_close(difference, scaled, rtol=1e-3, atol=1e-4)


def test_draws_are_stratified_and_a_function_of_their_keys(tiny):
    """A key alone decides; draw k comes from the k-th part of the timesteps, or of their noisier half; a share loses
    its prompt."""
    policy = load_policy(tiny, 4, "fp32", "cpu")
    keys, shape = [(0, 1, i) for i in range(50)], policy.latent_shape()
    t, dropped, noise = draw_timesteps_and_noise(policy, keys, shape, draw_options(draws=4, inner_epochs=2))
    assert t.shape == dropped.shape == (50, 8) and noise.shape == (50, 8, *shape) and not dropped.any()
    assert torch.equal(t // 250, torch.arange(4).repeat(2).expand(50, 8)) and 950 < t.max() < 1000
    assert len(set(noise[:, :, 0, 0, 0].flatten().tolist())) == 400 and noise.std() == pytest.approx(1, abs=0.02)
    alone = draw_timesteps_and_noise(policy, keys[7:8], shape, draw_options(draws=4, inner_epochs=2))
    assert torch.equal(alone[0][0], t[7]) and torch.equal(alone[2][0], noise[7])
    half = draw_options(draws=200, timestep_choice="first", prompt_dropout=0.3)
    t, dropped, _ = draw_timesteps_and_noise(policy, keys, (1, 1, 1), half)
    assert 500 <= t.min() < 505 and t.float().mean() == pytest.approx(749.5, abs=3)
    assert dropped.float().mean() == pytest.approx(0.3, abs=0.02)


def test_dropped_prompts_are_the_empty_prompt(tiny):
    policy, config, seen = load_policy(tiny, 4, "fp32", "cpu"), get_config(), []
    policy.set_timesteps(3)
    config.train.prompt_dropout, config.train.draws = 0.5, 20
    forward = policy.forward
    policy.forward = lambda *arguments: seen.append(arguments) or forward(*arguments)
    trajectories = Trajectories([], torch.randn(1, 1, *policy.latent_shape()), None, None, policy.scheduler.timesteps)
    rollout = Rollout(policy, config, ALGORITHMS["rwr"], 0, [0], ["a cat"], trajectories)
    rollout.score(torch.zeros(20).long(), torch.arange(20))
    empty, cat = (policy.embed([text]).tensors["states"][0] for text in ("", "a cat"))
    given = [torch.equal(row, empty) for row in seen[0][2].tensors["states"]]
    assert given == rollout.draws[1][0].tolist() and 0 < sum(given) < 20
    assert all(torch.equal(row, empty if dropped else cat) for row, dropped in zip(seen[0][2].tensors["states"], given))


def test_moving_average(tiny):
    """After n updates: the recursion a <- d a + (1 - d) w, d = min(decay, (1 + k) / (10 + k)), written out."""
    policy = load_policy(tiny, 4, "fp32", "cpu")
    policy.start_ema(0.2)
    expected, parameters = None, policy.trainable_parameters()
    for n in range(5):
        disturb(policy)
        policy.update_ema()
        decay = min(0.2, (1 + n) / (10 + n)) if n else 0.0
        new = [p.detach().clone() for p in parameters]
        expected = new if expected is None else [decay * a + (1 - decay) * w for a, w in zip(expected, new)]
    with policy.averaged():
        for p, a in zip(parameters, expected):
            torch.testing.assert_close(p.detach(), a)
    assert all(torch.equal(p, w) for p, w in zip(parameters, new))


def test_compiled_it_is_one_program_for_sampling_and_training(tiny):
    """One that differs from the plain one by no bit here, as this backend leaves out the code generation."""
    plain, policy = (load_policy(tiny, 4, "fp32", "cpu") for _ in range(2))
    latents, t, embeds = inputs(policy)
    programs = []

    def backend(graph, example):
        programs.append(graph)
        return graph

    policy.compile(6, backend=backend)
    compiled = len(programs)
    sampled = guided(policy)
    trained = predict_noise(policy, latents, t, embeds, policy.embed([""]), 5.0)
    assert len(programs) == compiled > 0
    assert trained.requires_grad and not sampled.requires_grad
    assert torch.equal(sampled, trained) and torch.equal(sampled, guided(plain))


def test_a_compiler_that_loses_gradients_is_refused(tiny):
    """As torch 2.13's on a CPU did, with the output right; and one that fails ends with one line."""
    policy = load_policy(tiny, 4, "fp32", "cpu")

    def loses(graph, example):
        return lambda *args: [0.5 * out + 0.5 * out.detach() for out in graph(*args)]

    def fails(graph, example):
        raise RuntimeError("no C++ compiler")

    with pytest.raises(InputError, match=r"gradient is wrong here, by 50% in one"):
        policy.compile(2, backend=loses)
    with pytest.raises(InputError, match="torch.compile failed .*no C.. compiler"):
        load_policy(tiny, 4, "fp32", "cpu").compile(2, backend=fails)


def test_embeddings_of_many_prompts_do_not_fill_the_memory(tiny, monkeypatch):
    policy = load_policy(tiny, 4, "fp32", "cpu")
    words = ["a cat", "a dog", "an ant", "a cat"]
    all_kept = policy.embed(words).tensors["states"]
    monkeypatch.setattr("ddpo.policy.KEPT_EMBEDDINGS", 2)
    for word, embedding in zip(words, all_kept, strict=True):
        assert torch.equal(policy.embed([word]).tensors["states"][0], embedding)
    assert torch.equal(policy.embed(words).tensors["states"], all_kept) and len(policy._embeddings) == 2
