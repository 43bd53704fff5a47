"""What a learned reward sees of a picture: features (B, D) of a frozen network.

    embedding   a CLIP's unit embedding
    layers      mean and standard deviation over the patches, at four depths of a CLIP's vision model
    unet        mean and standard deviation over the pixels, after every block of a diffusion model's UNet

An embedding says what an image shows, and little of how it looks. The layers below it, and the UNet, know textures,
too. The UNet sees the image's latent under a little noise, always the same, with the empty prompt. Baranchuk et al.
(arXiv 2112.03126) found that such features of a diffusion model tell the parts of an image apart with few labels.
"""

import contextlib
import functools

import torch

from ddpo.clip import DTYPES, embed_images, image_pixels, load_clip
from ddpo.errors import InputError, choose
from ddpo.models import Conditions, load_model
from ddpo.pipeline_logprob import encode
from ddpo.seeds import torch_generator

DEPTHS = 4  # of a CLIP's layers
NOISE = 0.05  # the UNet's timestep, as a share of all


def load_features(kind, network, device="cpu", precision="fp32"):
    """The function (PIL images, batch_size) -> (B, D) float32 on the device, and the tensors that it depends on.

    Args:
        kind: a key of FEATURES.
        network: hub name or folder: of a CLIP or, for `unet`, of a Stable Diffusion.
    Raises:
        InputError if `kind` is unknown, or `network` is none that has such features.
    """
    return choose("features", kind, FEATURES)(str(network), str(device), precision)


def in_batches(embed, images, batch_size=32):
    """embed(images) (B, D), of `batch_size` images at a time."""
    return torch.cat([embed(images[i : i + batch_size]) for i in range(0, len(images), batch_size)])


def mean_std(x, dim):
    return torch.cat([x.mean(dim), x.std(dim, correction=0)], 1)


def clip_tensors(clip):
    """What CLIP's features depend on. The preprocessing is text, here as bytes."""
    text = repr(clip[1].image_processor.to_dict()).encode()
    return [torch.tensor(list(text)), *clip[0].vision_model.parameters(), clip[0].visual_projection.weight]


def load_embedding(network, device, precision):
    clip = load_clip(network, device, precision)
    return functools.partial(embed_images, clip), clip_tensors(clip)


def load_layers(network, device, precision):
    clip = load_clip(network, device, precision)
    last = clip[0].config.vision_config.num_hidden_layers  # 0 is what enters the first of them
    depths = sorted({round(i * last / (DEPTHS - 1)) for i in range(DEPTHS)})

    @torch.no_grad()
    def embed(images):
        states = clip[0].vision_model(pixel_values=image_pixels(clip, images), output_hidden_states=True).hidden_states
        return torch.cat([mean_std(states[i][:, 1:].float(), 1) for i in depths], 1)  # the first token is no patch

    return functools.partial(in_batches, embed), clip_tensors(clip)


class Enough(Exception):
    """Ends a forward pass at the middle block."""


def load_blocks(name, device, dtype, to_middle=False):
    """A frozen UNet of a hub name or folder: (function of latents (B, C, h, w) that returns [(B, C', h', w') float32
    after every block, or `to_middle` alone] and passes gradients on; VAE of the latents; its images' (height, width);
    tensors that the outputs depend on). Raises InputError if the model has no UNet."""
    pipe, family = load_model(name, device)
    if family.denoiser != "unet":
        raise InputError(f"model {name!r} is a {type(pipe).__name__}, which has no UNet: use other features")
    with torch.no_grad():
        empty = Conditions({name: value.float().to(device) for name, value in family.encode("", "cpu").items()})
    pipe.text_encoder = pipe.text_encoder_2 = None  # which are large, and done
    # The VAE overflows in half precision, see ddpo/policy.py. The plain `to`: diffusers' warns of half precision.
    for network, precise in ((pipe.unet, dtype), (pipe.vae, torch.float32)):
        torch.nn.Module.to(network, device, precise, memory_format=torch.channels_last)
    unet, vae = (network.eval().requires_grad_(False) for network in (pipe.unet, pipe.vae))
    t = round(NOISE * pipe.scheduler.config.num_train_timesteps)
    signal, noise_scale = pipe.scheduler.alphas_cumprod[t].sqrt(), (1 - pipe.scheduler.alphas_cumprod[t]).sqrt()
    outputs = []

    @functools.cache
    def noise(shape):
        return noise_scale * torch.randn(1, *shape, generator=torch_generator("features", 0)).to(device)

    def keep(block, given, output):
        outputs.append(output[0] if isinstance(output, tuple) else output)
        if to_middle and block is unet.mid_block:
            raise Enough

    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        block.register_forward_hook(keep)

    def blocks(latents):
        x_t = (signal * latents + noise(latents.shape[1:])).to(dtype)
        outputs.clear()
        with contextlib.suppress(Enough):
            family.call(unet, x_t, torch.full((len(x_t),), t, device=device), empty.expand(len(x_t)).to(dtype), 1.0)
        found = [output.float() for output in outputs]
        outputs.clear()
        return found

    size = tuple(side * pipe.vae_scale_factor for side in family.own_size)
    own_noise = noise((vae.config.latent_channels, *family.own_size))
    return blocks, vae, size, [*unet.parameters(), *vae.parameters(), *empty.tensors.values(), own_noise]


@functools.lru_cache(maxsize=1)
def load_unet(name, device, precision):
    blocks, vae, (height, width), tensors = load_blocks(
        name, device, choose("reward_options.precision", precision, DTYPES)
    )

    @torch.no_grad()
    def embed(images):
        return torch.cat([mean_std(output.flatten(2), 2) for output in blocks(encode(vae, images, width, height))], 1)

    return functools.partial(in_batches, embed), tensors


# kind -> load(network, device, precision), which returns what `load_features` does.
FEATURES = {"embedding": load_embedding, "layers": load_layers, "unet": load_unet}
