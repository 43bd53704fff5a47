"""The base models that a policy can be. What tells one family from another is here, and nowhere else:

    StableDiffusion     1.x, 2.x and XL: a UNet that predicts noise, v or x_0, sampled by DDIM
    StableDiffusion3    3.x: a transformer on latents, a flow
    Flux                FLUX.1: a transformer on latents packed into tokens, a flow; FLUX.1-dev is told the guidance

Each class has what `ddpo.policy.Policy` asks of a family: `denoiser` (the pipeline's part that is trained),
`noise_option` (the option of config.sample that makes a step a distribution), `unit` (pixels that sides are multiples
of), `told_guidance` (whether guidance is an input of the network instead of a second pass), and the methods of
StableDiffusion. Packing is a permutation, which neither a step nor its log-prob sees: latents are (B, C, H, W) for all,
and packed where the network is called.
"""

import math
import os

import diffusers
import torch
import transformers
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.utils.logging import disable_progress_bar
from safetensors import SafetensorError
from torch.nn.functional import pad, scaled_dot_product_attention

from ddpo.clip import complete
from ddpo.ddim_logprob import ddim_step_mean_std, gaussian_log_prob
from ddpo.errors import InputError
from ddpo.flow_logprob import flow_log_prob, flow_step_mean_std

disable_progress_bar()  # of loading a pipeline's parts; downloads keep theirs
T5_TOKENS = 256  # of SD3's pipeline, if it is not told otherwise


class Conditions:
    """What the network is told of B prompts: `tensors` {name: (B, ...)}. Indexed, like a tensor, by its rows."""

    def __init__(self, tensors):
        self.tensors = tensors

    def __len__(self):
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows):
        return Conditions({name: value[rows] for name, value in self.tensors.items()})

    def to(self, dtype):
        return Conditions({name: value.to(dtype) for name, value in self.tensors.items()})

    def expand(self, count):
        """Those of one prompt, `count` times."""
        return Conditions({name: value.expand(count, *value.shape[1:]) for name, value in self.tensors.items()})

    def join(self, other):
        """These and then `other`."""
        return Conditions({name: torch.cat([value, other.tensors[name]]) for name, value in self.tensors.items()})

    def replace(self, mask, other):
        """Where mask (B,) is true, those of `other`, one prompt."""
        masks = {name: mask.reshape(-1, *[1] * (value.ndim - 1)) for name, value in self.tensors.items()}
        return Conditions({n: torch.where(masks[n], other.tensors[n], value) for n, value in self.tensors.items()})


class StableDiffusion:
    denoiser, noise_option, told_guidance = "unet", "eta", False

    def __init__(self, pipe, device):
        self.pipe, self.is_xl, self._time_ids = pipe, isinstance(pipe, StableDiffusionXLPipeline), {}
        self.unit = pipe.vae_scale_factor
        size = pipe.unet.config.sample_size
        self.own_size = (size, size) if isinstance(size, int) else tuple(size)  # (H, W) of its latents
        # DDIM with the noise schedule of whatever sampler it came with; what its file leaves unsaid is as in SD 1.x.
        config = pipe.scheduler.config
        said = {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}
        pipe.scheduler = DDIMScheduler.from_config(config, **{k: config.get(k, v) for k, v in said.items()})
        # On the device for good: to copy them there in every step would make each wait for the device.
        pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod.to(device)
        pipe.scheduler.final_alpha_cumprod = torch.as_tensor(pipe.scheduler.final_alpha_cumprod, device=device)

    def encode(self, prompt, device):
        """{name: (1, ...)}: what the network is told of a prompt. For XL the empty one is all zeros, as in its pipeline
        (unless the model's files say otherwise)."""
        if not self.is_xl:
            return {"states": self.pipe.encode_prompt(prompt, device, 1, False)[0]}
        states, _, pooled, _ = self.pipe.encode_prompt(
            prompt, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        encoded = {"states": states, "pooled": pooled}
        if prompt == "" and self.pipe.config.force_zeros_for_empty_prompt:
            encoded = {name: torch.zeros_like(value) for name, value in encoded.items()}
        return encoded

    def call(self, network, latents, timesteps, conditions, guidance):
        """The network's output (B, C, H, W) for latents (B, C, H, W), timesteps (B,), B Conditions and, if
        `told_guidance`, the guidance scale."""
        told, added = conditions.tensors, None
        if self.is_xl:  # the image's size and crop, and the pooled embedding
            height, width = (side * self.pipe.vae_scale_factor for side in latents.shape[-2:])
            if (height, width) not in self._time_ids:  # copied to the device once: a copy would wait for it each time
                ids = torch.tensor([height, width, 0.0, 0.0, height, width], device=latents.device)
                self._time_ids[height, width] = ids
            time_ids = self._time_ids[height, width]
            added = {"text_embeds": told["pooled"], "time_ids": time_ids.expand(len(latents), -1)}
        return network(latents, timesteps, told["states"], added_cond_kwargs=added).sample

    def set_timesteps(self, num_steps, height, width, shift, device):
        """Sets the scheduler to `num_steps` steps of a latent of height x width."""
        trained = self.pipe.scheduler.config.num_train_timesteps
        if num_steps <= trained:
            self.pipe.scheduler.set_timesteps(num_steps)
        if num_steps > trained or int(self.pipe.scheduler.timesteps.max()) >= trained:  # by an offset
            raise InputError(f"sample.num_steps = {num_steps}: the model has {trained} timesteps, so fewer than those")
        if num_steps == 1 and int(self.pipe.scheduler.timesteps[0]) < trained - 1:
            raise InputError(
                f"sample.num_steps = 1: the scheduler of this model puts its only step at timestep "
                f"{int(self.pipe.scheduler.timesteps[0])}, where there is little noise, so it draws none of it in one "
                "step; the scheduler of a model made for one has timestep_spacing trailing"
            )

    def step_mean_std(self, output, timesteps, latents, noise_level, kind):
        """The step from `latents`: a Gaussian of mean (B, C, H, W) and std (B, 1, 1, 1)."""
        return ddim_step_mean_std(self.pipe.scheduler, output, timesteps, latents, noise_level)

    def log_prob(self, value, mean, std, kind):
        """Of such a step; (B,)."""
        return gaussian_log_prob(value, mean, std)

    def training_timesteps(self, t):
        """Integers from 0 to num_train_timesteps - 1, rising with the noise, as the network takes them."""
        return t


class Flow:
    """What flow-matching models have in common."""

    denoiser, noise_option, told_guidance = "transformer", "noise_level", False

    def __init__(self, pipe, device):
        self.pipe, self.unit = pipe, 2 * pipe.vae_scale_factor  # the network sees patches of 2 x 2
        self.own_size = (pipe.default_sample_size,) * 2
        self.config = pipe.scheduler.config
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.config)
        self.trained_sigmas = pipe.scheduler.sigmas.flip(0).to(device)  # (1000,), rising, by static shift if any

    def set_timesteps(self, num_steps, height, width, shift, device):
        trained = self.config.num_train_timesteps
        if num_steps > trained:
            raise InputError(f"sample.num_steps = {num_steps}: the model has {trained} timesteps, so at most those")
        options = {"shift": shift, "use_dynamic_shifting": False} if shift else {}
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.config, **options)
        dynamic = scheduler.config.use_dynamic_shifting
        mu = calculate_shift(
            (height // 2) * (width // 2), self.config.base_image_seq_len, self.config.max_image_seq_len,
            self.config.base_shift, self.config.max_shift,
        )  # fmt: skip
        # As the pipelines do it: SD3's scheduler shifts its own smallest sigma again, FLUX's starts from even sigmas.
        even = torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64).tolist()
        sigmas = even if self.even_sigmas or shift else None
        scheduler.set_timesteps(num_steps, device, sigmas=sigmas, mu=mu if dynamic else None)
        self.pipe.scheduler = scheduler

    def step_mean_std(self, output, timesteps, latents, noise_level, kind):
        return flow_step_mean_std(self.pipe.scheduler, output, timesteps, latents, noise_level, kind)

    def log_prob(self, value, mean, std, kind):
        return flow_log_prob(value, mean, std, kind)

    def training_timesteps(self, t):
        return self.trained_sigmas[t] * self.config.num_train_timesteps


class JointAttention(JointAttnProcessor2_0):
    """The attention processor of SD3's transformer, where the last token of the text may stand for `repeats` equal ones
    (joint_attention_kwargs). Text has no positions here, so equal tokens stay equal in all blocks, and as keys n of
    them are one whose logit is larger by log n."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, repeats=1):
        def heads(x, norm):
            x = x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return norm(x) if norm is not None else x

        x, text, image = hidden_states, encoder_hidden_states, hidden_states.shape[1]
        if text is None:  # the image's attention to itself alone, in SD3.5-medium
            return super().__call__(attn, x)
        query, key = heads(attn.to_q(x), attn.norm_q), heads(attn.to_k(x), attn.norm_k)
        value = heads(attn.to_v(x), None)
        query = torch.cat([query, heads(attn.add_q_proj(text), attn.norm_added_q)], dim=2)
        key = torch.cat([key, heads(attn.add_k_proj(text), attn.norm_added_k)], dim=2)
        value = torch.cat([value, heads(attn.add_v_proj(text), None)], dim=2)
        bias = pad(query.new_zeros(1, 1, 1, key.shape[2] - 1), (0, 1), value=math.log(repeats))
        x = scaled_dot_product_attention(query, key, value, attn_mask=bias)
        x = x.transpose(1, 2).flatten(2)
        text = x[:, image:] if attn.context_pre_only else attn.to_add_out(x[:, image:])
        return attn.to_out[0](x[:, :image]), text


def use_joint_attention(transformer):
    """Makes the joint attention of an SD3Transformer2DModel take `repeats`."""
    transformer.set_attn_processor(JointAttention())


class StableDiffusion3(Flow):
    even_sigmas = False

    def __init__(self, pipe, device):
        super().__init__(pipe, device)
        # Without T5, which is larger than the model itself, the pipeline puts tokens of zeros in its place: one does.
        self.repeats = 1 if pipe.text_encoder_3 else T5_TOKENS
        if self.repeats > 1:
            use_joint_attention(pipe.transformer)

    def encode(self, prompt, device):
        states, _, pooled, _ = self.pipe.encode_prompt(
            prompt, None, None, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False,
            max_sequence_length=T5_TOKENS,
        )  # fmt: skip
        return {"states": states[:, : states.shape[1] + 1 - self.repeats], "pooled": pooled}

    def call(self, network, latents, timesteps, conditions, guidance):
        told, options = conditions.tensors, {"repeats": self.repeats} if self.repeats > 1 else None
        return network(latents, told["states"], told["pooled"], timesteps, joint_attention_kwargs=options).sample


class Flux(Flow):
    even_sigmas = True

    def __init__(self, pipe, device):
        super().__init__(pipe, device)
        self.told_guidance, self._image_ids = pipe.transformer.config.guidance_embeds, {}

    def encode(self, prompt, device):
        states, pooled, _ = self.pipe.encode_prompt(prompt, None, device=device, num_images_per_prompt=1)
        return {"states": states, "pooled": pooled}

    def call(self, network, latents, timesteps, conditions, guidance):
        told, (rows, channels, height, width) = conditions.tensors, latents.shape
        if (height, width) not in self._image_ids:  # made once: the pipeline's copies them from the CPU
            ids = FluxPipeline._prepare_latent_image_ids(rows, height // 2, width // 2, latents.device, torch.float32)
            self._image_ids[height, width] = ids
        output = network(
            FluxPipeline._pack_latents(latents, rows, channels, height, width),
            told["states"],
            told["pooled"],
            timesteps / self.config.num_train_timesteps,
            img_ids=self._image_ids[height, width],
            txt_ids=torch.zeros(told["states"].shape[1], 3, device=latents.device),
            guidance=latents.new_full((rows,), guidance) if self.told_guidance else None,
        ).sample
        return FluxPipeline._unpack_latents(output, height, width, vae_scale_factor=1)


PIPELINES = {  # as model_index.json names them -> pipeline, family, options of from_pretrained
    "StableDiffusionPipeline": (
        StableDiffusionPipeline, StableDiffusion, {"safety_checker": None, "requires_safety_checker": False}),
    "StableDiffusionXLPipeline": (StableDiffusionXLPipeline, StableDiffusion, {"add_watermarker": False}),
    "StableDiffusion3Pipeline": (StableDiffusion3Pipeline, StableDiffusion3, {}),
    "FluxPipeline": (FluxPipeline, Flux, {}),
}  # fmt: skip


def load_model(model, device):
    """(pipeline in float32, still on the CPU; its family) of a folder or hub name. Raises InputError."""
    if not os.path.isdir(model) and (model.startswith((".", "/", "~")) or model.count("/") != 1):
        raise InputError(f"model {model!r}: there is no such folder, and it is not a name on the hub (OWNER/NAME)")
    try:
        index = DiffusionPipeline.load_config(model)
        name = index.get("_class_name", "StableDiffusionPipeline")
        if name not in PIPELINES:
            raise InputError(f"model {model!r} is a {name}, which is not supported. There is: {', '.join(PIPELINES)}")
        pipeline, family, options = PIPELINES[name]
        options = options | absent_parts(index) | load_networks(model, index)
        pipe = pipeline.from_pretrained(model, dtype=torch.float32, **options)
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        where = "is not a StableDiffusionPipeline folder" if os.path.isdir(model) else (
            "is not a folder here and could not be loaded from the hub")  # fmt: skip
        raise InputError(f"model {model!r} {where}: {str(error).strip().splitlines()[0]}") from error
    channels, latent = getattr(pipe, family.denoiser).config.in_channels, pipe.vae.config.latent_channels
    packed = 4 if family is Flux else 1
    if None in (pipe.text_encoder, pipe.tokenizer) or channels != packed * latent:
        raise InputError(f"model {model!r} is not a text-to-image model (an inpainting model, or SDXL's refiner?)")
    pipe.set_progress_bar_config(disable=True)
    return pipe, family(pipe, device)


def absent_parts(index):
    """{name: None} of the text encoders that a model_index.json says are absent, as SD3's T5 may be: diffusers'
    from_pretrained wants to be told so."""
    text = [part for part in index if part.startswith(("text_encoder", "tokenizer"))]
    return {part: None for part in text if index[part][0] is None}


def load_networks(model, index):
    """{name: network} of a pipeline, in float32. index: its model_index.json. Loaded one by one, since a pipeline fills
    weights that its files lack with random numbers: raises ValueError if there are any."""
    networks = {}
    for name in ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        library, kind = index.get(name) or (None, None)
        if kind is None or library not in ("diffusers", "transformers"):
            continue
        kind = getattr({"diffusers": diffusers, "transformers": transformers}[library], kind)
        networks[name] = load_network(kind, model, subfolder=name)
    return networks


def load_network(kind, folder, **options):
    """kind.from_pretrained(folder), in float32. Raises ValueError if its files lack weights."""
    loaded = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    return complete(loaded, f"{options.get('subfolder', 'its folder')} lacks")
