"""Stable Diffusion's UNet, computed as diffusers and PEFT do, in fewer kernels that move fewer bytes. Otherwise a GPU
would spend half of its time not in convolutions and matrix products but in passes over activations between them."""

from types import MethodType

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from peft.tuners.lora.layer import Conv2d as LoraConv2d
from peft.tuners.lora.layer import Linear as LoraLinear
from torch.nn.functional import gelu, linear, scaled_dot_product_attention, silu

from ddpo.group_norm import norm_alone, norm_and_silu


def use_fewer_kernels(unet):
    """Replaces the forward passes of a UNet2DConditionModel's modules, of those kinds that are known here."""
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D) and _is_plain_resnet(module):
            module.forward = MethodType(resnet, module)
        elif isinstance(module, GEGLU) and isinstance(module.proj, torch.nn.Linear) and module.proj.bias is not None:
            module.forward = MethodType(geglu, module)
        elif isinstance(module, torch.nn.GroupNorm):
            module.forward = MethodType(norm_alone, module)
        elif isinstance(module, Transformer2DModel) and _is_plain_transformer(module):
            module._operate_on_continuous_inputs = MethodType(to_tokens, module)
            module._get_output_for_continuous_inputs = MethodType(from_tokens, module)
        elif isinstance(module, LoraLinear):
            module.forward = MethodType(lora_linear, module)
        elif isinstance(getattr(module, "processor", None), AttnProcessor2_0) and _is_plain_attention(module):
            module.set_processor(Attention())


def _is_plain_resnet(block):
    resampled = block.upsample is not None or block.downsample is not None
    timed = block.time_emb_proj is not None and block.time_embedding_norm == "default" and not block.skip_time_act
    return timed and not resampled and block.output_scale_factor == 1 and isinstance(block.nonlinearity, torch.nn.SiLU)


def _is_plain_transformer(block):
    """Without a LoRA on its convolutions of single pixels, which takes images and not tokens."""
    return block.is_input_continuous and not any(isinstance(p, LoraConv2d) for p in (block.proj_in, block.proj_out))


def _is_plain_attention(attn):
    norms = attn.group_norm, attn.spatial_norm, attn.norm_cross, attn.norm_q, attn.norm_k
    return not any(norms) and not attn.residual_connection and attn.rescale_output_factor == 1


def resnet(block, x, temb):
    """A ResnetBlock2D without its division by an output scale of 1."""
    h = block.conv1(norm_and_silu(block.norm1, x)) + block.time_emb_proj(silu(temb))[:, :, None, None]
    h = block.conv2(norm_and_silu(block.norm2, h))
    return h + (x if block.conv_shortcut is None else block.conv_shortcut(x))


def to_tokens(block, x):
    """An image (B, C, H, W) to tokens (B, H W, C'), which is a view where channels come last in memory; and C'."""
    x = project(block.proj_in, block.norm(x).permute(0, 2, 3, 1).flatten(1, 2))
    return x, x.shape[-1]


def from_tokens(block, hidden_states, residual, batch_size, height, width, inner_dim):
    """Back, and added to the image; a sum has the layout of what comes first."""
    return residual + project(block.proj_out, hidden_states).unflatten(1, (height, width)).permute(0, 3, 1, 2)


def project(layer, x):
    """A linear layer of tokens, or a convolution of single pixels, which is one."""
    return linear(x, layer.weight.flatten(1), layer.bias) if isinstance(layer, torch.nn.Conv2d) else layer(x)


class Attention:
    """An AttnProcessor2_0 without its division by an output scale of 1. Nothing here has masks."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        return attn.to_out[0](scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def geglu(module, x):
    """A GEGLU as two products, whose outputs are contiguous, where halves of one are not: kernels on such are slow, and
    their gradients would be copied together."""
    (weight, gate_weight), (bias, gate_bias) = module.proj.weight.chunk(2), module.proj.bias.chunk(2)
    return linear(x, weight, bias) * gelu(linear(x, gate_weight, gate_bias))


def lora_linear(layer, x):
    """W x + B A x, the second product added to the first as it is computed. The LoRA's scale is 1, without dropout."""
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    rows = x.flatten(0, -2)
    output = layer.base_layer(rows)  # rows even without the LoRA: slices of tokens would be rounded differently
    if not layer.disable_adapters:
        output.addmm_(rows @ down.T, up.T)
    return output.unflatten(0, x.shape[:-1])
