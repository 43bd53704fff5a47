"""Makes the embedded model a generator of one step.

    python -m scripts.make_turbo_model              # models/emoji with the LoRA of models/emoji-turbo: runs/emoji-turbo
    python -m scripts.make_turbo_model --distil     # makes that LoRA again

In one step, the model itself draws a blur. Distillation trains it to draw in one step what its deterministic sampler
draws in ten, with guidance, from the same noise. The loss is the squared distance of the latents plus that of the
frozen UNet's features, down to its middle block. The generator predicts v instead of the noise: from pure noise, an
error of the predicted noise becomes one of the image that is 15 times as large. The prompts are the 45 animals.
"""

import argparse
import itertools
import os

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from safetensors.torch import load_file, save_file
from tqdm import trange

from ddpo.errors import InputError, at_least, check_folder, run_script, seed
from ddpo.features import load_blocks
from ddpo.hardware import cpu_cores, use_cpu
from ddpo.likelihood import mean_square
from ddpo.pipeline_logprob import draw_noise, sample_with_logprob
from ddpo.policy import LORA_FILE, PRECISIONS, load_policy, save_weights
from ddpo.prompts import common_animals
from ddpo.seeds import torch_generator

RANK = 16
EPOCH = 777  # the "epoch" whose noise the pairs have
TARGETS = (
    "to_q,to_k,to_v,to_out.0,proj,net.2,proj_in,proj_out,conv1,conv2,conv_shortcut,time_emb_proj,conv,conv_in,conv_out"
)
ONE_STEP = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "set_alpha_to_one": True}


def teach(args, policy):
    """(noises, latents) (N, C, H, W) and N prompts: what the model draws in ten deterministic steps with guidance."""
    animals = [prompt for prompt, _ in common_animals()]
    prompts = list(itertools.islice(itertools.cycle(animals), args.pairs))
    policy.set_timesteps(args.teacher_steps)
    shape = (1, *policy.latent_shape())
    steps = torch.zeros(args.teacher_steps, *shape[1:])  # which take no noise
    latents = []
    for i in trange(0, args.pairs, args.batch, desc="the teacher's images"):
        part = prompts[i : i + args.batch]
        latents.append(sample_with_logprob(
            policy, part, lambda k: torch.cat([draw_noise(shape, args.seed, EPOCH, i + k), steps]),
            args.guidance_scale, 0.0, on_images=lambda start, images: None,
        ).latents[:, -1])  # fmt: skip
    noises = torch.stack([draw_noise(shape, args.seed, EPOCH, i)[0] for i in range(args.pairs)])
    return noises, torch.cat(latents), prompts


def distil(args):
    """Trains the LoRA and writes it, in half precision, to --lora."""
    teacher = load_policy(args.base, 0, args.precision, "cpu")
    teacher.denoiser.requires_grad_(False)
    noises, aims, prompts = teach(args, teacher)
    see = load_blocks(args.base, "cpu", PRECISIONS[args.precision] or torch.float32, to_middle=True)[0]
    with torch.no_grad():
        looks = [torch.cat(parts) for parts in zip(*map(see, aims.split(args.batch)))]
    sizes = [look.std(0).mean() for look in looks]
    student = load_policy(args.base, RANK, args.precision, "cpu", TARGETS, args.seed)
    student.pipe.scheduler = DDIMScheduler.from_config(student.scheduler.config, **ONE_STEP)
    student.set_timesteps(1)
    conditions, parameters = student.embed(prompts), student.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 50))
    generator = torch_generator("pairs", args.seed)
    bar = trange(args.steps, desc="distilling")
    for _ in bar:
        rows = torch.randint(args.pairs, (args.batch,), generator=generator)
        t = student.scheduler.timesteps.expand(args.batch)
        output = student.forward(noises[rows], t, conditions[rows])
        x_0, _ = student.step_mean_std(output, t, noises[rows], 0.0)
        apart = sum(mean_square((a - b[rows]) / size).mean() for a, b, size in zip(see(x_0), looks, sizes)) / len(sizes)
        error = mean_square(x_0 - aims[rows]).mean()
        optimizer.zero_grad()
        (error + apart).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rate.step()
        bar.set_postfix(latent=f"{float(error.detach()):.3f}", features=f"{float(apart.detach()):.3f}")
    save_weights(student, args.lora)
    path = os.path.join(args.lora, "lora", LORA_FILE)
    save_file({name: value.half().contiguous() for name, value in load_file(path).items()}, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="models/emoji")
    parser.add_argument("--lora", default="models/emoji-turbo", help="folder of the LoRA")
    parser.add_argument("--output", default="runs/emoji-turbo", help="where the generator goes")
    parser.add_argument("--distil", action="store_true", help="make the LoRA again")
    parser.add_argument("--pairs", type=at_least(1), default=4096, help="noises and images from the teacher")
    parser.add_argument("--teacher_steps", type=at_least(1), default=10)
    parser.add_argument("--guidance_scale", type=at_least(1, float), default=3.0, help="of the teacher")
    parser.add_argument("--steps", type=at_least(1), default=240)
    parser.add_argument("--batch", type=at_least(1), default=16)
    parser.add_argument("--learning_rate", type=at_least(0, float), default=2e-3)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="bf16 is faster if the CPU supports it")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--threads", type=at_least(1), default=cpu_cores(), help="CPU threads of torch")
    args = parser.parse_args()
    use_cpu(args.threads, 1)
    check_folder(args.output)
    if args.distil:
        check_folder(args.lora)
        distil(args)
    pipe = DiffusionPipeline.from_pretrained(args.base)
    try:
        pipe.load_lora_weights(os.path.join(args.lora, "lora"))
    except (OSError, ValueError) as error:
        raise InputError(f"--lora {args.lora} has no LoRA that can be read: --distil makes one") from error
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **ONE_STEP)
    pipe.save_pretrained(args.output)
    print(args.output)


if __name__ == "__main__":
    run_script(main)
