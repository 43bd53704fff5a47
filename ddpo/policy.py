"""The policy: a base model, LoRA or full, in some precision. The only file that knows which base model it is.

Stable Diffusion 1.x and 2.x, or any folder or hub name that diffusers loads as a `StableDiffusionPipeline`; and SDXL,
as a `StableDiffusionXLPipeline`.

Precision. Trainable weights and the optimizer are always float32; in "bf16" and "fp16" the network holds them, and its
frozen ones, rounded to half precision, see ddpo/masters.py. "tf32" is float32 with TensorFloat-32 matrix products. The
VAE is float32 in every mode: it runs once per picture, and in half precision it overflows.
"""

import contextlib
import copy
import os
from functools import partial

import diffusers
import torch
import transformers
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import EMAModel
from diffusers.utils.logging import disable_progress_bar
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from ddpo.ddim_logprob import ddim_step_mean_std
from ddpo.errors import InputError, choose
from ddpo.fewer_kernels import use_fewer_kernels
from ddpo.masters import Masters

transformers.logging.set_verbosity_warning()
disable_progress_bar()  # of loading a pipeline's parts; downloads keep theirs
PRECISIONS = {
    "fp32": None,
    "tf32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}  # the network's, if not float32
KEPT_EMBEDDINGS = 1024  # prompts, the newest: 0.24 GB of host memory for Stable Diffusion 1.x, 0.7 GB for SDXL
LORA_FILE = "pytorch_lora_weights.safetensors"


class Policy:
    """The parts of a base model, with what sampling and training need of them."""

    def __init__(self, pipe, device, precision, lora_rank):
        self.pipe, self.device, self.lora_rank = pipe, torch.device(device), lora_rank
        self.dtype = choose("precision", precision, PRECISIONS)
        self.is_xl = isinstance(pipe, StableDiffusionXLPipeline)
        self.unet, self.vae, self.scheduler = pipe.unet, pipe.vae, pipe.scheduler
        self.masters = Masters(self.unet, self.dtype)
        self.ema = self._base_unet = None
        self.samples_averaged = False
        self.passes = 0  # of one latent through the network, a backward pass counting as two
        self.rl_scale = 1.0  # see `forward`; training needs 1
        self._compiled = False
        self._embeddings, self._time_ids = {}, {}

    def forward(self, latents, timesteps, prompt_embeds):
        """The UNet's output (B, C, H, W) in float32, computed in the policy's precision. Sampling and training both
        come through here: another precision, or train mode in one of them, would bias every importance ratio.

        With `rl_scale` s other than 1 it is base + s (finetuned - base), reinforcement learning guidance (RLG, arXiv
        2508.21016): the score of p_base^(1 - s) p_finetuned^s, so s < 1 strengthens the tie to the base model that the
        finetuned one was trained with, and s > 1 weakens it. Needs `keep_base`."""
        if self.rl_scale == 1:
            return self._forward(latents, timesteps, prompt_embeds)
        with self.base():
            base = self._forward(latents, timesteps, prompt_embeds)
        if self.rl_scale == 0:
            return base
        return base + self.rl_scale * (self._forward(latents, timesteps, prompt_embeds) - base)

    def _forward(self, latents, timesteps, prompt_embeds):
        dtype, conditions = self.dtype or torch.float32, None
        prompt_embeds = prompt_embeds.to(dtype)
        if self.is_xl:  # the picture's size and crop, and the pooled embedding (see `embed`)
            height, width = (side * self.pipe.vae_scale_factor for side in latents.shape[-2:])
            if (height, width) not in self._time_ids:  # copied to the device once: a copy would wait for it each time
                ids = torch.tensor([height, width, 0.0, 0.0, height, width], device=latents.device)
                self._time_ids[height, width] = ids
            time_ids = self._time_ids[height, width]
            pooled = prompt_embeds[:, -1, : self.pipe.text_encoder_2.config.projection_dim]
            conditions = {"text_embeds": pooled, "time_ids": time_ids.expand(len(latents), -1)}
            prompt_embeds = prompt_embeds[:, :-1]
        # Compiled without gradients the network would be another program, with other roundings: none of those then.
        with_gradient = torch.is_grad_enabled()
        self.passes += len(latents) * (3 if with_gradient else 1)
        self.masters.copy_to_network()
        with torch.set_grad_enabled(with_gradient or self._compiled):
            output = self.unet(latents.to(dtype), timesteps, prompt_embeds, added_cond_kwargs=conditions).sample.float()
        return output if with_gradient else output.detach()

    def compile(self, rows, height=0, width=0, **options):
        """Compiles the UNet with torch.compile, anew for each size of batch when it first comes, and makes sure on a
        batch of `rows` latents that it still has its gradient. (On a CPU torch 2.13's had not: with the right output,
        the middle block got none. The importance ratio does not see that.) Raises InputError if it has not."""
        shape = (rows, *self.latent_shape(height, width))
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        timesteps = torch.linspace(1, 999, len(latents), device=self.device).long()
        embeds, parameters = self.embed([""] * len(latents)), self.masters.weights

        def gradient():
            output = self.forward(latents, timesteps, embeds)
            return torch.autograd.grad(output.square().sum() / output.numel() ** 0.5, parameters)

        plain = gradient()
        torch._dynamo.config.recompile_limit = 64  # programs: beyond, it would run the plain network without a word
        self.unet.compile(dynamic=False, **options)
        self._compiled = True
        try:
            compiled = gradient()
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).split("\n\n")[0].split())
            raise InputError(f"torch.compile failed ({reason}): leave --config.compile out") from error
        least = 1e-3 * torch.stack([g.norm() for g in plain]).norm()  # of all: tensors with less are left to rounding
        errors = torch.stack([(c - p).norm() / (p.norm() + least) for c, p in zip(compiled, plain)])
        if not errors.max() < 0.3:  # half precision's rounding is well below
            raise InputError(
                f"torch.compile's gradient is wrong here, by {float(errors.max()):.0%} in one of the tensors: leave "
                "--config.compile out"
            )

    @torch.no_grad()
    def embed(self, prompts):
        """(B, L, D) text embeddings. Each prompt is encoded once, and alone, so that no batch changes its bits.

        SDXL takes a pooled embedding besides: it is appended as one more row, filled up with zeros. Its empty prompt is
        all zeros, as in its pipeline (unless the model's files say otherwise)."""
        for prompt in set(prompts) - self._embeddings.keys():
            if self.is_xl:
                states, _, pooled, _ = self.pipe.encode_prompt(
                    prompt, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
                )
                pooled = torch.nn.functional.pad(pooled, (0, states.shape[-1] - pooled.shape[-1]))
                states = torch.cat([states[0], pooled])
                if prompt == "" and self.pipe.config.force_zeros_for_empty_prompt:
                    states = torch.zeros_like(states)
            else:
                states = self.pipe.encode_prompt(prompt, self.device, 1, False)[0][0]
            self._embeddings[prompt] = states.float().cpu()
        embeddings = torch.stack([self._embeddings[prompt] for prompt in prompts]).to(self.device)
        for prompt in list(self._embeddings)[:-KEPT_EMBEDDINGS]:
            del self._embeddings[prompt]
        return embeddings

    def set_timesteps(self, num_steps):
        """Sets the scheduler to `num_steps` denoising steps. Raises InputError if the model has not as many."""
        trained = self.scheduler.config.num_train_timesteps
        if num_steps <= trained:
            self.scheduler.set_timesteps(num_steps)
        if num_steps > trained or int(self.scheduler.timesteps.max()) >= trained:  # by an offset
            raise InputError(f"sample.num_steps = {num_steps}: the model has {trained} timesteps, so fewer than those")

    def step_mean_std(self, model_output, timesteps, latents, eta):
        """The policy's step from `latents` x_t: a Gaussian of mean (B, C, H, W) and std (B, 1, 1, 1)."""
        return ddim_step_mean_std(self.scheduler, model_output, timesteps, latents, eta)

    def step_stds(self, eta):
        """(T,) float32: the standard deviations of the T steps."""
        zeros = torch.zeros(len(self.scheduler.timesteps), 1, device=self.device)
        return self.step_mean_std(zeros, self.scheduler.timesteps.to(self.device), zeros, eta)[1].flatten()

    def trainable_parameters(self):
        """The float32 masters of the weights that are trained."""
        return self.masters.parameters

    def prepare_training(self, options, needs_base=False, samples_averaged=False):
        """Called before any weight changes. options: `config.train`. needs_base: for another use than a KL.
        samples_averaged: `sampling_weights` are the moving average."""
        self.samples_averaged = samples_averaged
        if options.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        if needs_base or options.kl_weight:
            self.keep_base()
        if options.ema_decay:
            self.start_ema(options.ema_decay)

    def keep_base(self):
        """Keeps what `base` gives, before any weight changes: for full finetuning a copy of the UNet in the policy's
        precision, while a LoRA can just be left out."""
        if not self.lora_rank:
            self._base_unet = copy.deepcopy(self.unet).requires_grad_(False)

    def start_ema(self, decay):
        """Begins a moving average of the trained weights as they are; over the first n updates it decays by
        (1 + n) / (10 + n) if that is less than `decay`."""
        self.ema = EMAModel(self.trainable_parameters(), decay=decay)

    def update_ema(self):
        """Carries the moving average on, if there is one; to be called after every update."""
        if self.ema:
            self.ema.step(self.trainable_parameters())

    @contextlib.contextmanager
    def base(self):
        """Within it, `forward` is the base model's."""
        trained = self.unet
        if self.lora_rank:
            trained.disable_adapters()
        else:
            self.unet = self._base_unet
        try:
            yield
        finally:
            if self.lora_rank:
                trained.enable_adapters()
            self.unet = trained

    def sampling_weights(self):
        """Within it, the trained weights are those that sample: themselves, or their moving average."""
        return self.averaged() if self.samples_averaged else contextlib.nullcontext()

    @contextlib.contextmanager
    def averaged(self):
        """Within it, the trained weights are their moving average, if there is one."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.trainable_parameters())
        self.ema.copy_to(self.trainable_parameters())
        try:
            yield
        finally:
            self.ema.restore(self.trainable_parameters())

    def latent_shape(self, height=0, width=0):
        """(C, H, W) of the latent of a picture of height x width pixels; 0 is the model's own size."""
        factor = self.pipe.vae_scale_factor
        size = self.unet.config.sample_size
        own = (size, size) if isinstance(size, int) else tuple(size)
        pixels = [given or s * factor for given, s in zip((height, width), own)]
        for name, value in zip(("height", "width"), pixels):
            if value % factor:
                below, above = value // factor * factor, (value // factor + 1) * factor
                raise InputError(f"sample.{name} = {value} is not a multiple of {factor}: use {below} or {above}")
        return (self.unet.config.in_channels, *(p // factor for p in pixels))

    def noise_shape(self, sample):
        """(T + 1, C, H, W) of the noise that a picture takes: the first latent, and T steps. sample: a config's."""
        return (sample.num_steps + 1, *self.latent_shape(sample.height, sample.width))


def load_policy(model, lora_rank, precision, device, lora_targets="to_q,to_k,to_v,to_out.0", lora_seed=0):
    """Loads a base model and makes it trainable.

    Args:
        model: a folder, or a name on the hub, that holds a StableDiffusionPipeline or StableDiffusionXLPipeline.
        lora_rank: 0 for full finetuning of the UNet, else the rank of the LoRA on the modules that `lora_targets`
            names, comma-separated. Its alpha equals its rank, so its scale is 1 for every rank.
        precision: fp32, tf32, bf16 or fp16.
        device: where it runs.
        lora_seed: of the LoRA's initial weights.
    Raises:
        InputError if there is no such model, or `lora_targets` name none of its modules.
    """
    dtype = choose("precision", precision, PRECISIONS)
    lora_targets = lora_targets.replace(" ", "").split(",")
    pipe = load_pipeline(model)
    pipe.vae.requires_grad_(False)
    for name in ("text_encoder", "text_encoder_2"):
        if name in pipe.components:
            pipe.components[name].requires_grad_(False)
    pipe.unet.requires_grad_(not lora_rank)
    pipe.to(device)
    for network in (pipe.unet, pipe.vae):  # what convolutions want, on a CPU and in half precision on a GPU
        network.to(memory_format=torch.channels_last)
    # On the device for good: to copy them there in every step would make each wait for the device.
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod.to(device)
    pipe.scheduler.final_alpha_cumprod = torch.as_tensor(pipe.scheduler.final_alpha_cumprod, device=device)
    if lora_rank:
        modules = [name for name, _ in pipe.unet.named_modules()]
        for target in lora_targets:
            if not any(name and f".{name}".endswith(f".{target}") for name in modules):
                raise InputError(f"lora_targets: the UNet has no module {target!r}. Common: to_q,to_k,to_v,to_out.0")
        torch.manual_seed(lora_seed)
        lora = LoraConfig(r=lora_rank, lora_alpha=lora_rank, init_lora_weights="gaussian", target_modules=lora_targets)
        try:
            pipe.unet.add_adapter(lora)
        except ValueError as error:
            raise InputError(
                f"lora_targets {','.join(lora_targets)}: one of them only holds other modules; a LoRA goes on linear "
                "layers and convolutions. Common: to_q,to_k,to_v,to_out.0"
            ) from error
    use_fewer_kernels(pipe.unet)
    on_cpu = torch.device(device).type == "cpu"
    if on_cpu and dtype is not None:  # whose kernel for half precision is slower
        for module in pipe.unet.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.forward = partial(_norm_in_float32, module)
    # The CPU's fused attention has a backward pass in half precision that takes longer than all the rest.
    torch.backends.cuda.enable_flash_sdp(not on_cpu or dtype is None)
    # cuDNN's attention is another graph with gradients than without, so the importance ratio may not be 1. What is left
    # (flash for half precision, else memory-efficient) is one kernel for both.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if not on_cpu:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    pipe.unet.eval()
    return Policy(pipe, device, precision, lora_rank)


def _norm_in_float32(norm, x):
    """A GroupNorm's output, computed in float32, as a GPU does inside its kernel."""
    weight, bias = norm.weight.float(), norm.bias.float()
    return torch.nn.functional.group_norm(x.float(), norm.num_groups, weight, bias, norm.eps).to(x.dtype)


def load_pipeline(model):
    """The pipeline at a folder or hub name, in float32, with a DDIM scheduler. Raises InputError."""
    if not os.path.isdir(model) and (model.startswith((".", "/", "~")) or model.count("/") != 1):
        raise InputError(f"model {model!r}: there is no such folder, and it is not a name on the hub (OWNER/NAME)")
    try:
        index = DiffusionPipeline.load_config(model)
        options = load_networks(model, index) | {"dtype": torch.float32}
        if index.get("_class_name", "").startswith("StableDiffusionXL"):
            pipe = StableDiffusionXLPipeline.from_pretrained(model, add_watermarker=False, **options)
        else:
            options |= {"safety_checker": None, "requires_safety_checker": False}
            pipe = StableDiffusionPipeline.from_pretrained(model, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        where = "is not a StableDiffusionPipeline folder" if os.path.isdir(model) else (
            "is not a folder here and could not be had from the hub")  # fmt: skip
        raise InputError(f"model {model!r} {where}: {str(error).strip().splitlines()[0]}") from error
    if None in (pipe.text_encoder, pipe.tokenizer) or pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
        raise InputError(f"model {model!r} is not a text-to-image model (an inpainting model, or SDXL's refiner?)")
    # DDIM with the noise schedule of whatever sampler the model came with; what its file leaves unsaid is as in SD 1.x.
    config = pipe.scheduler.config
    said = {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}
    pipe.scheduler = DDIMScheduler.from_config(config, **{k: config.get(k, v) for k, v in said.items()})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_networks(model, index):
    """{name: network} of a pipeline, in float32. index: its model_index.json. Loaded one by one, since a pipeline fills
    weights that its files lack with random numbers: raises ValueError if there are any."""
    networks = {}
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        library, kind = index.get(name) or (None, None)
        if kind is None or library not in ("diffusers", "transformers"):
            continue
        kind = getattr({"diffusers": diffusers, "transformers": transformers}[library], kind)
        networks[name] = load_network(kind, model, subfolder=name)
    return networks


def load_network(kind, folder, **options):
    """kind.from_pretrained(folder), in float32. Raises ValueError if its files lack weights."""
    network, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    missing = sorted(info["missing_keys"])
    if missing:
        part = options.get("subfolder", "its folder")
        raise ValueError(f"{part} lacks {len(missing)} weights, {missing[0]} the first of them")
    return network


def save_weights(policy, folder):
    """Writes the trained weights: FOLDER/lora for `pipe.load_lora_weights`, or FOLDER/unet for `from_pretrained`."""
    with policy.masters.in_network():
        if policy.lora_rank:
            type(policy.pipe).save_lora_weights(
                os.path.join(folder, "lora"), get_peft_model_state_dict(policy.unet), weight_name=LORA_FILE
            )
        else:
            policy.unet.save_pretrained(os.path.join(folder, "unet"))


def load_weights(policy, folder):
    """Reads what `save_weights` wrote into the weights that the policy already has, and the optimizer holds: loading
    an adapter the usual way would add a second one that nothing trains. Raises InputError if they do not fit."""
    kind = "lora" if policy.lora_rank else "unet"
    path = os.path.join(folder, kind)
    if not os.path.isdir(path):
        raise InputError(f"{folder} has no {kind}/ folder: was it trained with another lora_rank?")
    if policy.lora_rank:
        state = load_file(os.path.join(path, LORA_FILE))
        state = {key.removeprefix("unet."): value for key, value in state.items()}
        expected = get_peft_model_state_dict(policy.unet)
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in expected.items()}:
            raise InputError(f"the LoRA in {path} has other modules or another rank than this run's")
        with policy.masters.in_network():
            set_peft_model_state_dict(policy.unet, state)
    else:
        with policy.masters.in_network():
            policy.unet.load_state_dict(load_network(UNet2DConditionModel, path).state_dict())
