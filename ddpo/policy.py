"""The policy: a base model of ddpo/models.py, LoRA or full, in some precision.

Precision. Trainable weights and the optimizer are always float32; in "bf16" and "fp16" the network holds them, and its
frozen ones, rounded to half precision, see ddpo/masters.py. "tf32" is float32 with TensorFloat-32 matrix products. The
VAE is float32 in every mode: it runs once per image, and in half precision it overflows.
"""

import contextlib
import copy
import os
from functools import partial

import torch
import transformers
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import T5EncoderModel

from config.base import get_config
from ddpo.errors import InputError, choose
from ddpo.fewer_kernels import use_fewer_kernels
from ddpo.flow_logprob import check_noise
from ddpo.masters import Masters
from ddpo.models import Conditions, load_model, load_network
from ddpo.sharding import Sharding, class_of, gather_network, is_sharded, shard, spread

transformers.logging.set_verbosity_warning()
# The network's dtype, if not float32.
PRECISIONS = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
KEPT_EMBEDDINGS = 1024  # prompts, the newest: 0.24 GB of host memory for Stable Diffusion 1.x, 0.7 GB for SDXL
LORA_FILE = "pytorch_lora_weights.safetensors"


class Policy:
    """The parts of a base model, with what sampling and training need of them."""

    def __init__(self, pipe, family, device, precision, lora_rank, sharding=None):
        self.pipe, self.family, self.device, self.lora_rank = pipe, family, torch.device(device), lora_rank
        self.dtype = choose("precision", precision, PRECISIONS)
        self.denoiser, self.vae = getattr(pipe, family.denoiser), pipe.vae
        self.step_kind = get_config().sample.step_kind  # of flow models
        self.sharding = sharding
        self._shares_t5 = bool(sharding) and any(isinstance(part, T5EncoderModel) for part in pipe.components.values())
        # Sharded weights are float32, and rounded as they are gathered: they are their own masters.
        self.masters = Masters(self.denoiser, None if sharding and not lora_rank else self.dtype)
        self.ema = self._base = None
        self.samples_averaged = False
        self.passes = 0  # of one latent through the network, a backward pass counting as two
        self.rl_scale = 1.0  # see `forward`; training needs 1
        self._compiled = False
        self._embeddings = {}

    @property
    def scheduler(self):
        return self.pipe.scheduler

    def forward(self, latents, timesteps, conditions, guidance=1.0):
        """The denoiser's output (B, C, H, W) in float32, computed in the policy's precision. Sampling and training both
        come through here: another precision, or train mode in one of them, would bias every importance ratio.

        guidance: for a network that is told it (FLUX.1-dev); others take a second pass, see `predict_noise`.

        With `rl_scale` s other than 1 it is base + s (finetuned - base), reinforcement learning guidance (RLG, arXiv
        2508.21016): the score of p_base^(1 - s) p_finetuned^s, so s < 1 strengthens the tie to the base model that the
        finetuned one was trained with, and s > 1 weakens it. Needs `keep_base`."""
        given = (latents, timesteps, conditions, guidance)
        if self.rl_scale == 1:
            return self._forward(*given)
        with self.base():
            base = self._forward(*given)
        if self.rl_scale == 0:
            return base
        return base + self.rl_scale * (self._forward(*given) - base)

    def _forward(self, latents, timesteps, conditions, guidance):
        # Compiled without gradients the network would be another program, with other roundings: none of those then.
        with_gradient = torch.is_grad_enabled()
        self.passes += len(latents) * (3 if with_gradient else 1)
        self.masters.copy_to_network()
        dtype = self.dtype or torch.float32
        with torch.set_grad_enabled(with_gradient or self._compiled):
            output = self.family.call(
                self.denoiser, latents.to(dtype), timesteps, conditions.to(dtype), guidance
            ).float()
        return output if with_gradient else output.detach()

    def compile(self, rows, height=0, width=0, **options):
        """Compiles the denoiser with torch.compile, again for each new batch size, and compares its gradient on a batch
        of `rows` latents of height x width pixels with the uncompiled one's. (On a CPU, torch 2.13's output was right
        but the middle block got no gradient, which the importance ratio does not show.) options: torch.compile's.
        Raises InputError if it cannot be compiled or the gradient is wrong."""
        shape = (rows, *self.latent_shape(height, width))
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        timesteps = torch.linspace(1, 999, len(latents), device=self.device).long()
        embeds, parameters = self.embed([""] * len(latents)), self.masters.weights

        def gradient():
            output = self.forward(latents, timesteps, embeds)
            return torch.autograd.grad(output.square().sum() / output.numel() ** 0.5, parameters)

        plain = gradient()
        torch._dynamo.config.recompile_limit = 64  # programs; beyond them it would silently run the uncompiled network
        self.denoiser.compile(dynamic=False, **options)
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
        """The Conditions of B prompts. Each is encoded once, and alone, so that no batch changes its bits."""
        new = set(prompts) - self._embeddings.keys()
        if self._shares_t5:  # all processes encode what any of them needs
            new = set().union(*gather_object([new]))
        for prompt in sorted(new):
            encoded = self.family.encode(prompt, self.device)
            self._embeddings[prompt] = {name: value[0].float().cpu() for name, value in encoded.items()}
        rows = [self._embeddings[prompt] for prompt in prompts]
        conditions = {name: torch.stack([row[name] for row in rows]).to(self.device) for name in rows[0]}
        for prompt in list(self._embeddings)[:-KEPT_EMBEDDINGS]:
            del self._embeddings[prompt]
        return Conditions(conditions)

    def prepare_sampling(self, sample):
        """Sets number and kind of the denoising steps. sample: a config's. Raises InputError if the model has not as
        many timesteps, or if an option was changed that belongs to another family of models."""
        defaults = get_config().sample
        others = ("noise_level", "step_kind", "shift") if self.family.noise_option == "eta" else ("eta",)
        for name in others:
            if sample[name] != defaults[name]:
                kind, its_own = ("a DDIM", "eta") if name != "eta" else ("a flow-matching", "noise_level and step_kind")
                raise InputError(
                    f"sample.{name} = {sample[name]} means nothing to {type(self.pipe).__name__}, {kind} model: leave "
                    f"it out; the noise of its steps is sample.{its_own}"
                )
        if "eta" in others:
            check_noise(sample.noise_level, sample.step_kind)
        self.step_kind = sample.step_kind
        self.set_timesteps(sample.num_steps, sample.height, sample.width, sample.shift)

    def set_timesteps(self, num_steps, height=0, width=0, shift=0.0):
        """Sets the scheduler to `num_steps` denoising steps of an image of height x width pixels (0: the model's own;
        some flows have other noise levels for large images). shift: of a flow's noise levels, 0 for the model's own.
        Raises InputError if the model has not as many timesteps."""
        self.family.set_timesteps(num_steps, *self.latent_shape(height, width)[1:], shift, self.device)

    def noise_level(self, sample):
        """The option of a config's `sample` that is the noise of this model's steps: eta, or noise_level."""
        return sample[self.family.noise_option]

    def step_mean_std(self, model_output, timesteps, latents, noise_level):
        """The policy's step from `latents` x_t: a Gaussian of mean (B, C, H, W) and std (B, 1, 1, 1)."""
        return self.family.step_mean_std(model_output, timesteps, latents, noise_level, self.step_kind)

    def step_log_prob(self, value, mean, std):
        """(B,): the log-prob of such a step, a mean over the latent's dimensions."""
        return self.family.log_prob(value, mean, std, self.step_kind)

    def step_stds(self, noise_level):
        """(T,) float32: the standard deviations of the T steps."""
        zeros = torch.zeros(len(self.scheduler.timesteps), 1, device=self.device)
        return self.step_mean_std(zeros, self.scheduler.timesteps.to(self.device), zeros, noise_level)[1].flatten()

    def trainable_parameters(self):
        """The float32 masters of the weights that are trained."""
        return self.masters.parameters

    def prepare_training(self, options, needs_base=False, samples_averaged=False):
        """Called before any weight changes. options: `config.train`. needs_base: for another use than a KL.
        samples_averaged: `sampling_weights` are the moving average."""
        self.samples_averaged = samples_averaged
        if options.gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        if needs_base or options.kl_weight:
            self.keep_base()
        if options.ema_decay:
            self.start_ema(options.ema_decay)

    def keep_base(self):
        """Keeps what `base` gives, before any weight changes: for full finetuning a copy of the denoiser in the
        policy's precision, while a LoRA can just be left out. Of a sharded one, which has no copies, the weights."""
        if self.sharding and not self.lora_rank:
            self._base = [p.detach().to(self.dtype or p.dtype, copy=True) for p in self.trainable_parameters()]
        elif not self.lora_rank:
            self._base = copy.deepcopy(self.denoiser).requires_grad_(False)

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
        trained = self.denoiser
        if self.lora_rank:
            trained.disable_adapters()
        elif self.sharding:
            own = [p.detach().clone() for p in self.trainable_parameters()]
            self._set_weights(self._base)
        else:
            self.denoiser = self._base
        try:
            yield
        finally:
            if self.lora_rank:
                trained.enable_adapters()
            elif self.sharding:
                self._set_weights(own)
            self.denoiser = trained

    @torch.no_grad()
    def _set_weights(self, values):
        for p, value in zip(self.trainable_parameters(), values, strict=True):
            p.copy_(value)

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
        """(C, H, W) of the latent of an image of height x width pixels; 0 is the model's own size."""
        factor, unit = self.pipe.vae_scale_factor, self.family.unit
        pixels = [given or side * factor for given, side in zip((height, width), self.family.own_size)]
        for name, value in zip(("height", "width"), pixels):
            if value % unit:
                below, above = value // unit * unit, (value // unit + 1) * unit
                raise InputError(f"sample.{name} = {value} is not a multiple of {unit}: use {below} or {above}")
        return (self.vae.config.latent_channels, *(p // factor for p in pixels))

    def noise_shape(self, sample):
        """(T + 1, C, H, W) of the noise that an image takes: the first latent, and T steps. sample: a config's."""
        return (sample.num_steps + 1, *self.latent_shape(sample.height, sample.width))


def load_policy(
    model, lora_rank, precision, device, lora_targets="to_q,to_k,to_v,to_out.0", lora_seed=0, sharding=None
):
    """Loads a base model and makes it trainable: returns a Policy.

    Args:
        model: a folder, or a name on the hub, that holds one of `ddpo.models.PIPELINES`.
        lora_rank: 0 for full finetuning of the denoiser, else the rank of the LoRA on the modules that `lora_targets`
            names, comma-separated. Its alpha equals its rank, so its scale is 1 for every rank.
        precision: fp32, tf32, bf16 or fp16.
        device: where it runs.
        lora_seed: of the LoRA's initial weights.
        sharding: of `ddpo.sharding.requested`, or None.
    Raises:
        InputError if there is no such model, or `lora_targets` name none of its modules.
    """
    dtype = choose("precision", precision, PRECISIONS)
    lora_targets = lora_targets.replace(" ", "").split(",")
    pipe, family = load_model(model, device)
    denoiser = getattr(pipe, family.denoiser)
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(name == family.denoiser and not lora_rank)
        if isinstance(part, T5EncoderModel) and dtype is not None:  # 19 GB of float32, to encode each prompt once
            part.to(dtype)
    # What convolutions want, on a CPU and in half precision on a GPU. FSDP takes no such weights.
    for network in (pipe.vae,) if sharding else (denoiser, pipe.vae):
        network.to(memory_format=torch.channels_last)
    if lora_rank:
        add_lora(denoiser, lora_rank, lora_targets, lora_seed)
        for p in denoiser.parameters():  # before they are moved: FLUX.1 is 48 GB in float32
            p.data = p.data.to(dtype if dtype and not p.requires_grad else p.dtype)
    if sharding:
        trained = [p for p in denoiser.parameters() if p.requires_grad]
        shard(denoiser, sharding, device, dtype, trained if lora_rank else [])
        for part in (part for part in pipe.components.values() if isinstance(part, T5EncoderModel)):
            shard(part, Sharding(()), device, None, [])
    pipe.to(device, silence_dtype_warnings=True)
    use_fewer_kernels(denoiser)
    on_cpu = torch.device(device).type == "cpu"
    if on_cpu and dtype is not None:  # whose kernel for half precision is slower
        for module in denoiser.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.forward = partial(_norm_in_float32, module)
    # The CPU's fused attention has a backward pass in half precision that takes longer than all the rest.
    torch.backends.cuda.enable_flash_sdp(not on_cpu or dtype is None)
    # cuDNN's attention is another graph with gradients than without, so the importance ratio may not be 1. What is left
    # (flash for half precision, otherwise memory-efficient) is one kernel for both.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if not on_cpu:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    denoiser.eval()
    return Policy(pipe, family, device, precision, lora_rank, sharding)


def add_lora(denoiser, rank, targets, seed):
    """Puts a new LoRA, which adds nothing yet, on the modules named. Raises InputError if there are none."""
    modules, network = [name for name, _ in denoiser.named_modules()], type(denoiser).__name__
    for target in targets:
        if not any(name and f".{name}".endswith(f".{target}") for name in modules):
            raise InputError(f"lora_targets: {network} has no module {target!r}. Common: to_q,to_k,to_v,to_out.0")
    torch.manual_seed(seed)
    lora = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets)
    try:
        denoiser.add_adapter(lora)
    except ValueError as error:
        raise InputError(
            f"lora_targets {','.join(targets)}: one of them only holds other modules; a LoRA goes on linear layers and "
            "convolutions. Common: to_q,to_k,to_v,to_out.0"
        ) from error


def _norm_in_float32(norm, x):
    """A GroupNorm's output, computed in float32, as a GPU does inside its kernel."""
    weight, bias = norm.weight.float(), norm.bias.float()
    return torch.nn.functional.group_norm(x.float(), norm.num_groups, weight, bias, norm.eps).to(x.dtype)


def save_weights(policy, folder):
    """Writes the trained weights: FOLDER/lora for `pipe.load_lora_weights`, or FOLDER/unet (FOLDER/transformer, if it
    is one) for `from_pretrained`. A sharded denoiser is gathered: all processes call it then, but only one of them with
    a folder."""
    with policy.masters.in_network():
        if policy.lora_rank:
            type(policy.pipe).save_lora_weights(
                os.path.join(folder, "lora"), get_peft_model_state_dict(policy.denoiser), weight_name=LORA_FILE
            )
        else:
            sharded = is_sharded(policy.trainable_parameters())
            whole = gather_network(policy.denoiser) if sharded else policy.denoiser
            if folder:
                whole.save_pretrained(os.path.join(folder, policy.family.denoiser))


def load_weights(policy, folder):
    """Reads what `save_weights` wrote into the weights that the policy already has, and the optimizer holds: loading
    an adapter the usual way would add a second one that nothing trains. Raises InputError if they do not fit."""
    kind = "lora" if policy.lora_rank else policy.family.denoiser
    path = os.path.join(folder, kind)
    if not os.path.isdir(path):
        raise InputError(f"{folder} has no {kind}/ folder: was it trained with another lora_rank?")
    if policy.lora_rank:
        state = load_file(os.path.join(path, LORA_FILE))
        state = {key.removeprefix(policy.family.denoiser + "."): value for key, value in state.items()}
        expected = get_peft_model_state_dict(policy.denoiser)
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in expected.items()}:
            raise InputError(f"the LoRA in {path} has other modules or another rank than this run's")
        with policy.masters.in_network():
            set_peft_model_state_dict(policy.denoiser, state)
    else:
        whole = load_network(class_of(policy.denoiser), path).state_dict()
        own = policy.denoiser.state_dict()
        if is_sharded(policy.trainable_parameters()):
            whole = {name: spread(value, own[name]) for name, value in whole.items()}
        with policy.masters.in_network():
            policy.denoiser.load_state_dict(whole)
