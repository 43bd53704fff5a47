"""Makes the embedded models from nothing: a small Stable Diffusion, a tiny CLIP and a classifier of the emoji world.

    apt-get install fonts-noto-color-emoji
    python -m scripts.make_emoji_model

Images, tokenizer, classifier, VAE, latents, UNet with its text encoder, CLIP, one after another. What takes time is
kept in --work: a finished stage is not done again, and a stopped one goes on. Then everything is saved under --output
in half precision, with grids to look at, and the figures of that folder's README are measured and printed
(--report_only: just those).

Batch k of a stage is drawn by a generator seeded with (seed, k), so a stopped run continues exactly.
"""

import argparse
import functools
import json
import math
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel, compute_snr
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from tqdm import tqdm
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    ResNetConfig,
    ResNetForImageClassification,
)

from ddpo.errors import at_least, check_folder, run_script, seed
from ddpo.hardware import cpu_cores, use_cpu
from ddpo.models import T5_TOKENS, use_joint_attention
from scripts import emoji_world as world
from scripts.make_random_model import make_scheduler

MAX_TOKENS = 24  # the longest caption has 9
FLOW_TOKENS = 15  # of emoji-flow, where a token of text costs as much as a patch of the image
VALIDATION_SEED = 1_000_000  # images drawn with this seed are never trained on
ANIMALS = list(world.ANIMALS)
TO_CLIP = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # the [-1, 1] of the VAE, for CLIP and classifier too


# ---------------------------------------------------------------------------------------------------- images, words


def draw_picture(index, seed):
    """Scene and (SIZE, SIZE, 3) uint8 image number `index` of the data set of that seed."""
    rng = np.random.default_rng((seed, index))
    scene = world.sample_scene(rng)
    return scene, np.asarray(world.render(scene, rng))


def draw_pictures(count, seed):
    """(count, SIZE, SIZE, 3) uint8 images and their scenes, drawn by all cores."""
    with multiprocessing.Pool() as pool:
        jobs = pool.imap(functools.partial(draw_picture, seed=seed), range(count), chunksize=64)
        scenes, pictures = zip(*tqdm(jobs, "pictures", count))
    return np.stack(pictures), scenes


def all_captions():
    """Every caption of the world: what the tokenizer is trained on."""
    animals = [f"{world.article(a)} {a}" for a in ANIMALS]
    backgrounds = [f"on a {t} {c} background" for t in world.TEXTURES for c in world.COLOURS]
    return animals + [f"{a} {rest}" for a in animals for rest in (*world.ACTIVITIES, *backgrounds)]


def make_tokenizer():
    """A CLIPTokenizer whose byte-pair vocabulary has one token for each word of the world, and single bytes."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    backend = CLIPTokenizer().backend_tokenizer
    single_letters = [a + b for a in "abcdefghijklmnopqrstuvwxyz0123456789-'" for b in ("", " ", a)]
    trainer = BpeTrainer(
        vocab_size=10_000,
        special_tokens=[start, end],
        initial_alphabet=ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        min_frequency=2,
        show_progress=False,
    )
    backend.train_from_iterator(all_captions() + single_letters, trainer)
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(m) for m in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=MAX_TOKENS)


def tokenize(tokenizer, texts, length=MAX_TOKENS):
    """(len(texts), length) token ids, padded as the pipeline pads."""
    return tokenizer(texts, padding="max_length", max_length=length, return_tensors="pt").input_ids


def to_tensor(pictures, device):
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


# ------------------------------------------------------------------------------------------------------ training loop


def train(stage, modules, loss_fn, args, learning_rate, weight_decay=0.0, ema_decay=0.999, minutes=0):
    """Minimises `loss_fn(rng, generator)` over the parameters of `modules` with AdamW, a cosine schedule and an EMA.

    Leaves the EMA weights in the modules. Saves its state every --save_every steps and resumes from it. minutes: if
    given, they end the training and set the pace of the schedule instead of the number of steps.
    """
    path, steps = os.path.join(args.work, f"{stage}.pt"), getattr(args, f"{stage}_steps")
    parameters = torch.nn.ModuleList(modules)
    optimizer = torch.optim.AdamW(parameters.parameters(), learning_rate, weight_decay=weight_decay, fused=True)
    ema = EMAModel(parameters.parameters(), decay=ema_decay, foreach=True)
    step, seconds = 0, 0.0
    if os.path.exists(path):
        state = torch.load(path, map_location=args.device, weights_only=True)
        parameters.load_state_dict(state["parameters"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        ema.to(args.device)
        step, seconds = state["step"], state["seconds"]
    parameters.train()
    average, start = None, time.time() - seconds
    progress = tqdm(desc=stage, total=steps, initial=step)

    def done():
        return (time.time() - start) / (60 * minutes) if minutes else step / steps

    now = done()
    while now < 1:
        warmup = min(1.0, (step + 1) / 200)
        optimizer.param_groups[0]["lr"] = learning_rate * warmup * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * now)))
        generator = torch.Generator(args.device).manual_seed(args.seed * 10**7 + step)
        with torch.autocast(args.device, torch.bfloat16):
            loss = loss_fn(np.random.default_rng((args.seed, step)), generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(parameters.parameters())
        loss = loss.detach()  # read once in a while: a GPU would be waited for
        average = loss if average is None else 0.98 * average + 0.02 * loss
        step += 1
        progress.update()
        now = done()  # once, so that the last step is saved whenever it is that the time is up
        if step % args.save_every == 0 or now >= 1:
            progress.write(f"{stage} step {step}: loss {average.item():.4f}, {time.time() - start:.0f} s")
            state = {
                "parameters": parameters.state_dict(),
                "optimizer": optimizer.state_dict(),
                "ema": ema.state_dict(),
                "step": step,
                "seconds": time.time() - start,
            }
            torch.save(state, path + ".tmp")
            os.replace(path + ".tmp", path)
    progress.close()
    ema.copy_to(parameters.parameters())
    return parameters.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------- stages


def make_classifier(args, pictures, scenes):
    """A ResNet that names the animal: it judges the diffusion model, and is never a reward."""
    torch.manual_seed(args.seed)
    config = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 96],
        depths=[1, 1, 1],
        layer_type="basic",
        id2label=dict(enumerate(ANIMALS)),
        label2id={a: i for i, a in enumerate(ANIMALS)},
    )
    classifier = ResNetForImageClassification(config).to(args.device)
    labels = torch.tensor([ANIMALS.index(s.animal) for s in scenes], device=args.device)

    def loss_fn(rng, generator):
        index = rng.integers(len(pictures), size=64)
        x = to_tensor(pictures[index], args.device)
        # Generated images are softer than drawn ones: train on blurred and noisy images too.
        small = F.interpolate(x, size=int(rng.integers(20, 65)), mode="area")
        x = F.interpolate(small, size=world.SIZE, mode="bilinear")
        x = x + rng.uniform(0, 0.2) * torch.randn(x.shape, generator=generator, device=args.device)
        logits = classifier(x).logits.float()
        return F.cross_entropy(logits, labels[torch.from_numpy(index)], label_smoothing=0.1)

    train("classifier", [classifier], loss_fn, args, learning_rate=3e-3, weight_decay=1e-2, ema_decay=0.99)
    return classifier


def make_vae(args, pictures):
    torch.manual_seed(args.seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=world.SIZE,
    ).to(args.device)

    def loss_fn(rng, generator):
        x = to_tensor(pictures[rng.integers(len(pictures), size=32)], args.device)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample(generator)).sample.float()
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).float().mean()
        return F.l1_loss(y, x) + F.mse_loss(y, x) + 1e-4 * kl

    train("vae", [vae], loss_fn, args, learning_rate=2e-3)
    return vae


@torch.no_grad()
def encode(vae, pictures, args):
    """(2, B, C, H, W) float16: mean and standard deviation of the latents of all images, computed once and kept in
    --work. Sets the VAE's scaling factor, which makes the latents' standard deviation 1."""
    path = os.path.join(args.work, "latents.pt")
    if os.path.exists(path):
        moments = torch.load(path, map_location=args.device)
    else:
        moments = []
        for i in tqdm(range(0, len(pictures), 64), "latents"):
            posterior = vae.encode(to_tensor(pictures[i : i + 64], args.device)).latent_dist
            moments.append(torch.stack([posterior.mean, posterior.std]).half())
        moments = torch.cat(moments, dim=1)
        torch.save(moments, path + ".tmp")
        os.replace(path + ".tmp", path)
    mean, std = moments.float()
    vae.register_to_config(scaling_factor=1 / (mean.var() + std.square().mean()).sqrt().item())
    return moments


def make_unet(args, moments, scenes, scale, tokenizer):
    torch.manual_seed(args.seed)
    text_encoder = CLIPTextModel(text_config(tokenizer)).to(args.device)
    # The 16x16 level has no attention: it costs half of all time there and the world's images do not need it.
    unet = UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 96, 96),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    ).to(args.device)
    scheduler = make_scheduler()
    empty = tokenize(tokenizer, [""])
    tokens = {c: t for c, t in zip(all_captions(), tokenize(tokenizer, all_captions()))}

    def loss_fn(rng, generator):
        index = rng.integers(moments.shape[1], size=args.unet_batch)
        mean, std = moments[:, torch.from_numpy(index)].float()
        noise = torch.randn((2, *mean.shape), generator=generator, device=args.device)
        latents = (mean + std * noise[0]) * scale
        timesteps = torch.randint(0, 1000, (len(index),), generator=generator, device=args.device)
        ids = torch.stack([tokens[world.caption(scenes[i], rng)] for i in index])
        ids[torch.from_numpy(rng.random(len(index)) < 0.1)] = empty  # for classifier-free guidance
        embeddings = text_encoder(ids.to(args.device)).last_hidden_state
        prediction = unet(scheduler.add_noise(latents, noise[1], timesteps), timesteps, embeddings).sample.float()
        # Min-SNR-5 weighting (arXiv 2303.09556): without it the nearly clean timesteps take most of the gradient.
        snr = compute_snr(scheduler, timesteps)
        weight = snr.clamp(max=5) / snr
        return (weight * (prediction - noise[1]).square().mean(dim=(1, 2, 3))).mean()

    processors = unet.attn_processors
    if args.device == "cpu":  # the fused attention's bfloat16 backward is ten times slower there than the plain one
        unet.set_attn_processor(AttnProcessor())
    train("unet", [unet, text_encoder], loss_fn, args, learning_rate=1e-3, weight_decay=1e-2, ema_decay=0.9995)
    unet.set_attn_processor(processors)
    return unet, text_encoder


@torch.no_grad()
def flow_data(args, vae, tokenizer):
    """What the flow is trained on, computed once and kept in --work, so that another machine needs neither the font nor
    the pictures: latents (N, C, H, W) in float16, the posteriors' means (their standard deviation is 0.6% of that of
    the latents), and tokens (N, 2, FLOW_TOKENS), the caption without and with the background."""
    path = os.path.join(args.work, "flow_data.pt")
    if not os.path.exists(path):
        pictures, scenes = load_pictures(args)
        batches = tqdm(range(0, len(pictures), 64), "latents")
        latents = [
            vae.encode(to_tensor(pictures[i : i + 64], args.device)).latent_dist.mean.half().cpu() for i in batches
        ]
        captions = [c for scene in scenes for c in world.captions(scene)]
        tokens = tokenize(tokenizer, captions, FLOW_TOKENS).short().unflatten(0, (-1, 2))
        torch.save({"latents": torch.cat(latents), "tokens": tokens}, path + ".tmp")
        os.replace(path + ".tmp", path)
    data = torch.load(path, map_location=args.device, weights_only=True)
    return data["latents"], data["tokens"].long()


def make_flow(args, latents, tokens, scale, tokenizer):
    """A small MMDiT and its two text encoders, trained together by rectified flow (arXiv 2403.03206): to predict
    noise - x_0 at x_s = (1 - s) x_0 + s noise, s logit-normal."""
    torch.manual_seed(args.seed)
    # The width of the two together is that of the tokens that the transformer takes, so none of it is padding.
    widths, special = (64, 32), text_config(tokenizer).to_dict()
    encoders = [
        CLIPTextModelWithProjection(
            CLIPTextConfig(
                **special
                | {"hidden_size": width, "projection_dim": width, "intermediate_size": 2 * width}
                | {"num_attention_heads": width // 16, "max_position_embeddings": FLOW_TOKENS}
            )
        ).to(args.device)
        for width in widths
    ]
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=5,
        attention_head_dim=32,
        num_attention_heads=4,
        caption_projection_dim=128,
        joint_attention_dim=sum(widths),
        pooled_projection_dim=sum(widths),
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    ).to(args.device)
    use_joint_attention(transformer)
    # As in DiT (arXiv 2212.09748): at first each block is the identity, and the output zero.
    modulations = [getattr(b, n).linear for b in transformer.transformer_blocks for n in ("norm1", "norm1_context")]
    for linear in (*modulations, transformer.norm_out.linear, transformer.proj_out):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    network, weights = torch.nn.ModuleList([transformer, *encoders]), os.path.join(args.work, "flow_weights.pt")
    if os.path.exists(weights):
        network.load_state_dict(torch.load(weights, map_location=args.device, weights_only=True)["network"])
        return network.eval().requires_grad_(False)
    if args.flow_from:
        for module, folder in zip(network, ("transformer", "text_encoder", "text_encoder_2"), strict=True):
            trained = type(module).from_pretrained(args.flow_from, subfolder=folder, dtype=torch.float32)
            module.load_state_dict(trained.state_dict())
    empty = tokenize(tokenizer, [""], FLOW_TOKENS).to(args.device)

    def loss_fn(rng, generator):
        def uniform():
            return torch.rand(args.flow_batch, generator=generator, device=args.device)

        index = torch.randint(len(latents), (args.flow_batch,), generator=generator, device=args.device)
        x = latents[index].float() * scale
        ids = tokens[index, (uniform() < world.NAMED_BACKGROUND_FREQUENCY).long()]
        ids = torch.where((uniform() < 0.1)[:, None], empty, ids)  # for classifier-free guidance
        outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
        states = torch.cat([o.hidden_states[-2] for o in outputs], dim=-1)
        pooled = torch.cat([o.text_embeds for o in outputs], dim=-1)
        noise = torch.randn(x.shape, generator=generator, device=args.device)
        sigma = torch.randn(len(x), generator=generator, device=args.device).sigmoid()
        s = sigma[:, None, None, None]
        velocity = transformer(
            (1 - s) * x + s * noise,
            F.pad(states, (0, 0, 0, 1)),
            pooled,
            sigma * 1000,
            joint_attention_kwargs={"repeats": T5_TOKENS},
        ).sample
        return F.mse_loss(velocity.float(), noise - x)

    minutes = args.flow_minutes
    train("flow", network, loss_fn, args, args.flow_learning_rate, weight_decay=1e-2, ema_decay=0.999, minutes=minutes)
    state = torch.load(os.path.join(args.work, "flow.pt"), map_location="cpu", weights_only=True)
    made = {"network": network.state_dict(), "step": state["step"], "seconds": state["seconds"]}
    torch.save(made, weights + ".tmp")
    os.replace(weights + ".tmp", weights)
    return network


def make_clip(args, pictures, scenes, tokenizer):
    torch.manual_seed(args.seed)
    vision = {
        "hidden_size": 80,
        "intermediate_size": 320,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": world.SIZE,
        "patch_size": 8,
    }
    text = text_config(tokenizer).to_dict()
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)).to(args.device)
    tokens = {c: t for c, t in zip(all_captions(), tokenize(tokenizer, all_captions()))}

    def loss_fn(rng, generator):
        index = rng.integers(len(pictures), size=128)
        captions = [world.caption(scenes[i], rng) for i in index]
        x = to_tensor(pictures[index], args.device)
        x = x + rng.uniform(0, 0.1) * torch.randn(x.shape, generator=generator, device=args.device)
        ids = torch.stack([tokens[c] for c in captions]).to(args.device)
        logits = clip(input_ids=ids, pixel_values=x).logits_per_image.float()
        # Two images of one batch may carry the same caption: both are right answers then.
        _, which = np.unique(captions, return_inverse=True)
        same = torch.from_numpy(which[:, None] == which[None]).to(args.device).float()
        target = same / same.sum(1, keepdim=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    train("clip", [clip], loss_fn, args, learning_rate=1e-3, weight_decay=1e-2, ema_decay=0.998)
    return clip


def text_config(tokenizer):
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


# ------------------------------------------------------------------------------------------------------------- report


@torch.no_grad()
def report(args):
    """Measures the saved models on images and noises that training never saw, and draws the grids."""
    pipe = StableDiffusionPipeline.from_pretrained(args.output, torch_dtype=torch.float32).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    classifier = ResNetForImageClassification.from_pretrained(f"{args.output}/classifier", dtype=torch.float32)
    clip = CLIPModel.from_pretrained(f"{args.output}/clip", dtype=torch.float32).to(args.device)
    processor = CLIPProcessor.from_pretrained(f"{args.output}/clip")
    classifier = classifier.to(args.device).eval()
    pictures, scenes = draw_pictures(1000, VALIDATION_SEED)
    labels = torch.tensor([ANIMALS.index(s.animal) for s in scenes])

    def named(x):  # the animal the classifier names, for (B, 3, H, W) in [-1, 1]
        return classifier(x).logits.argmax(1).cpu()

    result = {}
    x = to_tensor(pictures, args.device)
    y = torch.cat([pipe.vae.decode(pipe.vae.encode(b).latent_dist.mode()).sample for b in x.split(50)]).clamp(-1, 1)
    mse = ((x - y) / 2).square().mean(dim=(1, 2, 3))
    result["vae_psnr_db"] = (-10 * mse.log10()).mean().item()
    result["classifier_on_pictures"] = (named(x) == labels).float().mean().item()
    result["classifier_on_reconstructions"] = (named(y) == labels).float().mean().item()

    inputs = processor(
        text=[f"{world.article(a)} {a}" for a in ANIMALS],
        images=[Image.fromarray(p) for p in pictures],
        return_tensors="pt",
        padding=True,
    ).to(args.device)
    logits = clip(**inputs).logits_per_image
    result["clip_names_animal"] = (logits.argmax(1).cpu() == labels).float().mean().item()
    busy = [i for i, s in enumerate(scenes) if s.activity]
    texts = [f"{world.article(scenes[i].animal)} {scenes[i].animal} {a}" for i in busy for a in world.ACTIVITIES]
    inputs = processor(
        text=texts, images=[Image.fromarray(pictures[i]) for i in busy], return_tensors="pt", padding=True
    ).to(args.device)
    logits = clip(**inputs).logits_per_image.reshape(len(busy), len(busy), len(world.ACTIVITIES))
    choice = logits[range(len(busy)), range(len(busy))].argmax(1).tolist()
    activities = list(world.ACTIVITIES)
    right = [activities[c] == scenes[i].activity for c, i in zip(choice, busy)]
    result["clip_names_activity"] = float(np.mean(right))

    drawings = judge_drawings(pipe, classifier, args, result, eta=0.0)
    drawings["reconstructions.jpg"] = [p for pair in zip(pictures[:30], to_uint8(y[:30])) for p in pair], 12
    for name, (grid, columns) in drawings.items():
        save_grid(grid, columns, os.path.join(args.output, name))
    result["megabytes"] = folder_size(args.output) / 1e6
    for stage in ("classifier", "vae", "unet", "clip"):
        path = os.path.join(args.work, f"{stage}.pt")
        if os.path.exists(path):
            state = torch.load(path, map_location="cpu", weights_only=True)
            result[f"{stage}_steps"], result[f"{stage}_minutes"] = state["step"], state["seconds"] / 60
    print(json.dumps(result, indent=1))
    return result


@torch.no_grad()
def report_flow(args):
    """Measures the saved flow model on noises that training never saw, and draws the grids."""
    pipe = StableDiffusion3Pipeline.from_pretrained(
        args.output, dtype=torch.float32, text_encoder_3=None, tokenizer_3=None
    ).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    classifier = ResNetForImageClassification.from_pretrained(f"{args.base}/classifier", dtype=torch.float32)
    use_joint_attention(pipe.transformer)  # the pipeline's own images in a third of the time
    few_tokens = {"max_sequence_length": 1, "joint_attention_kwargs": {"repeats": T5_TOKENS}}
    result = {}
    drawings = judge_drawings(pipe, classifier.to(args.device).eval(), args, result, **few_tokens)
    for name, (grid, columns) in drawings.items():
        save_grid(grid, columns, os.path.join(args.output, name))
    result["megabytes"] = folder_size(args.output) / 1e6
    path = os.path.join(args.work, "flow_weights.pt")
    if os.path.exists(path):
        state = torch.load(path, map_location="cpu", weights_only=True)
        result["flow_steps"], result["flow_minutes"] = state["step"], state["seconds"] / 60
    print(json.dumps(result, indent=1))
    return result


def judge_drawings(pipe, classifier, args, result, **options):
    """Draws each animal 8 times, and 15 with each activity. Adds to `result` what the classifier names; returns grids,
    {file name: (images, columns)}."""

    def draw(prompts, seed):
        generator = torch.Generator(args.device).manual_seed(seed)
        options.update(num_inference_steps=20, guidance_scale=args.guidance_scale, generator=generator)
        return [image for i in range(0, len(prompts), 45) for image in pipe(prompts[i : i + 45], **options).images]

    images = draw([f"{world.article(a)} {a}" for a in ANIMALS] * 8, seed=1 + args.seed)
    x = to_tensor(np.stack([np.asarray(i) for i in images]), args.device)
    hits = classifier(x).logits.argmax(1).cpu().reshape(8, 45) == torch.arange(45)
    result["classifier_on_generated"] = hits.float().mean().item()
    result["worst_animals"] = {ANIMALS[i]: int(hits[:, i].sum()) for i in hits.sum(0).argsort()[:8]}
    result["guidance_scale"] = args.guidance_scale
    busy = [f"{world.article(a)} {a} {d}" for a in ANIMALS[:15] for d in world.ACTIVITIES]
    return {"animals.jpg": (images[:90], 15), "activities.jpg": (draw(busy, seed=2 + args.seed), 15)}


def folder_size(folder):
    """Bytes."""
    return sum(os.path.getsize(os.path.join(d, f)) for d, _, files in os.walk(folder) for f in files)


def to_uint8(x):
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def save_grid(images, columns, path):
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * world.SIZE, rows * world.SIZE), "white")
    for i, image in enumerate(images):
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        grid.paste(image, (i % columns * world.SIZE, i // columns * world.SIZE))
    grid.save(path, quality=88)


# --------------------------------------------------------------------------------------------------------------- main


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flow", action="store_true", help="make models/emoji-flow, from the VAE of --base")
    parser.add_argument("--output", help="where the finished models go (models/emoji or models/emoji-flow)")
    parser.add_argument("--work", help="where unfinished work is kept (runs/emoji-model or runs/emoji-flow-model)")
    parser.add_argument("--base", default="models/emoji", help="of a flow: whose VAE, tokenizer and classifier serve")
    parser.add_argument("--seed", type=seed, default=0, help="of the training, and of the noises of the report")
    parser.add_argument("--pictures", type=at_least(1), default=40_000)
    parser.add_argument("--classifier_steps", type=at_least(1), default=1500)
    parser.add_argument("--vae_steps", type=at_least(1), default=1800)
    parser.add_argument("--unet_steps", type=at_least(1), default=5_000)
    parser.add_argument("--unet_batch", type=at_least(1), default=64)
    parser.add_argument("--clip_steps", type=at_least(1), default=1200)
    parser.add_argument("--flow_from", help="a flow model to train further, in place of new weights")
    parser.add_argument("--flow_steps", type=at_least(1), default=10_000)
    parser.add_argument("--flow_minutes", type=at_least(0, float), default=0, help="train so long instead")
    parser.add_argument("--flow_batch", type=at_least(1), default=512)
    parser.add_argument("--flow_learning_rate", type=at_least(0, float), default=1e-3)
    parser.add_argument("--save_every", type=at_least(1), default=250)
    parser.add_argument("--threads", type=at_least(1), default=cpu_cores(), help="CPU threads of torch")
    parser.add_argument("--guidance_scale", type=at_least(1, float), default=3.0, help="of the report's images")
    parser.add_argument("--report_only", action="store_true", help="measure what stands in --output")
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    use_cpu(args.threads, 1)
    name = "emoji-flow" if args.flow else "emoji"
    args.output, args.work = args.output or f"models/{name}", args.work or f"runs/{name}-model"
    if args.report_only:
        return report_flow(args) if args.flow else report(args)
    for folder in (args.work, args.output):
        check_folder(folder)
    os.makedirs(args.work, exist_ok=True)
    if args.flow:
        return main_flow(args)

    pictures, scenes = load_pictures(args)
    tokenizer = make_tokenizer()
    classifier = make_classifier(args, pictures, scenes)
    vae = make_vae(args, pictures)
    moments = encode(vae, pictures, args)
    unet, text_encoder = make_unet(args, moments, scenes, vae.config.scaling_factor, tokenizer)
    clip = make_clip(args, pictures, scenes, tokenizer)

    pipe = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, make_scheduler(), None, None, requires_safety_checker=False
    )
    pipe.to(torch.float16).save_pretrained(args.output)
    classifier.half().save_pretrained(f"{args.output}/classifier")
    clip.half().save_pretrained(f"{args.output}/clip")
    load_in_float32(args.output, "text_encoder", "classifier", "clip")
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": world.SIZE},
        crop_size={"height": world.SIZE, "width": world.SIZE},
        **TO_CLIP,
    )
    CLIPProcessor(image_processor, tokenizer).save_pretrained(f"{args.output}/clip")
    with open(f"{args.output}/report.json", "w") as f:
        json.dump(report(args), f, indent=1)


def main_flow(args):
    """The same for the flow model: images, latents, transformer with its text encoders."""
    # SD3's pipeline adds the VAE's shift, which Stable Diffusion's does not know.
    vae = AutoencoderKL.from_pretrained(args.base, subfolder="vae", dtype=torch.float32).to(args.device)
    vae.register_to_config(shift_factor=0.0)
    tokenizer = CLIPTokenizer.from_pretrained(f"{args.base}/tokenizer", model_max_length=FLOW_TOKENS)
    latents, tokens = flow_data(args, vae, tokenizer)
    transformer, *encoders = make_flow(args, latents, tokens, vae.config.scaling_factor, tokenizer)
    pipe = StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(), vae, encoders[0], tokenizer, encoders[1], tokenizer, None, None
    )
    pipe.to(torch.float16).save_pretrained(args.output)
    load_in_float32(args.output, "text_encoder", "text_encoder_2")
    with open(f"{args.output}/report.json", "w") as f:
        json.dump(report_flow(args), f, indent=1)


def load_in_float32(output, *folders):
    """Makes files of half size load in float32: transformers would load them as they are, unlike diffusers."""
    for folder in folders:
        path = Path(output, folder, "config.json")
        path.write_text(path.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))


def load_pictures(args):
    """The training images and scenes, drawn once and kept in --work."""
    path = os.path.join(args.work, f"pictures-{args.seed}-{args.pictures}.npz")
    if not os.path.exists(path):
        pictures, scenes = draw_pictures(args.pictures, args.seed)
        words = np.array([[s.animal, s.activity, s.texture, s.colour] for s in scenes])
        np.savez(path + ".tmp.npz", pictures=pictures, words=words)
        os.replace(path + ".tmp.npz", path)
    data = np.load(path)
    return data["pictures"], [world.Scene(*map(str, w)) for w in data["words"]]


if __name__ == "__main__":
    run_script(main)
