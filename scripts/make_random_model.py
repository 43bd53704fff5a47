"""Saves a Stable Diffusion, SDXL, SD3.x or FLUX.1 with random weights: for tests, and for memory and speed at true
size.

    python -m scripts.make_random_model sd15 runs/sd15-random

Its images are noise; its shapes, memory and speed are those of the real model. The tokenizer is the embedded model's.
"""

import argparse
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from ddpo.errors import check_folder, run_script

TOKENIZER = Path(__file__).parent.parent / "models/emoji/tokenizer"
SD_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512}
SIZES = {
    "tiny": {  # 32x32 pixels
        "unet": {
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
        },
        "vae": {"block_out_channels": (8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 32},
        "text": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 24,
            "vocab_size": 1000,
        },
    },
    "sd15": {  # 512x512 pixels, 860M weights in the UNet
        "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        "vae": SD_VAE,
        "text": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    },
    "sd21": {  # 768x768 pixels, 866M weights in the UNet
        "unet": {
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        "vae": SD_VAE,
        "text": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "hidden_act": "gelu",
        },
    },
    "sdxl": {  # 1024x1024 pixels, 2.57B weights in the UNet
        "unet": {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae": SD_VAE | {"sample_size": 1024, "scaling_factor": 0.13025},
        "text": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        "text_2": {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
            "hidden_act": "gelu",
            "projection_dim": 1280,
        },
    },
}
TINY = SIZES["tiny"]
SIZES["tiny_xl"] = {  # SDXL of 32x32 pixels
    "unet": {**TINY["unet"], "cross_attention_dim": 32, "transformer_layers_per_block": (1, 2),
             "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
             "projection_class_embeddings_input_dim": 8 + 6 * 8},
    "vae": TINY["vae"],
    "text": TINY["text"],
    "text_2": TINY["text"] | {"projection_dim": 8},
}  # fmt: skip
FLOW_VAE = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
TINY_FLOW_VAE = TINY["vae"] | FLOW_VAE | {"latent_channels": 4, "scaling_factor": 1.5, "shift_factor": 0.06}
TINY_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
SIZES["tiny_sd3"] = {  # SD3, with T5, of 32x32 pixels
    "sd3": {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8,
            "num_attention_heads": 2, "joint_attention_dim": 32, "caption_projection_dim": 16,
            "pooled_projection_dim": 16, "pos_embed_max_size": 12},
    "vae": TINY_FLOW_VAE,
    "text": TINY["text"] | {"projection_dim": 8},
    "text_2": TINY["text"] | {"projection_dim": 8},
    "t5": TINY_T5,
}  # fmt: skip
SIZES["tiny_sd35"] = {  # SD3.5, without T5
    **{part: SIZES["tiny_sd3"][part] for part in ("vae", "text", "text_2")},
    "sd3": SIZES["tiny_sd3"]["sd3"] | {"dual_attention_layers": (0,), "qk_norm": "rms_norm"},
}
SIZES["tiny_flux"] = {  # FLUX.1-dev; its pipelines have no size of their own but 128 latents
    "flux": {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8,
             "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 16,
             "axes_dims_rope": (2, 2, 4), "guidance_embeds": True},
    "vae": TINY_FLOW_VAE,
    "text": TINY["text"],
    "t5": TINY_T5,
}  # fmt: skip
SIZES["sd35"] = {  # SD3.5-medium without T5: 1024x1024 pixels, 2.2B weights in the transformer
    "sd3": {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"},
    "vae": SD_VAE | FLOW_VAE | {"sample_size": 1024, "scaling_factor": 1.5305, "shift_factor": 0.0609},
    "text": SIZES["sdxl"]["text"] | {"projection_dim": 768},
    "text_2": SIZES["sdxl"]["text_2"],
}  # fmt: skip


def make_unet(size):
    """The UNet of one of SIZES. SDXL has attention on the lower levels only, Stable Diffusion on all but the lowest."""
    config = SIZES[size]["unet"]
    levels = len(config.get("block_out_channels", (320, 640, 1280, 1280)))
    plain = [level == (0 if "text_2" in SIZES[size] else levels - 1) for level in range(levels)]
    return UNet2DConditionModel(
        down_block_types=["DownBlock2D" if p else "CrossAttnDownBlock2D" for p in plain],
        up_block_types=["UpBlock2D" if p else "CrossAttnUpBlock2D" for p in reversed(plain)],
        **config,
    )


def make_scheduler(prediction_type="epsilon"):
    """DDIM with Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def make_t5_tokenizer():
    """A T5 tokenizer whose words are letters."""
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    words += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    return T5TokenizerFast(vocab=words, extra_ids=0, model_max_length=512)


def make_random_model(size, folder, prediction_type="epsilon"):
    """Saves a pipeline of one of SIZES to `folder`; returns the folder. prediction_type: of DDIM models."""
    torch.manual_seed(0)
    vae, text, text_2, t5 = (SIZES[size].get(part) for part in ("vae", "text", "text_2", "t5"))
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=text.get("max_position_embeddings", 77))
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vae_blocks = len(vae["block_out_channels"])
    parts = {
        "vae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * vae_blocks,
            up_block_types=("UpDecoderBlock2D",) * vae_blocks,
            **vae,
        ),
        "tokenizer": tokenizer,
    }

    def text_encoder(kind, config):
        return kind(CLIPTextConfig(**({"vocab_size": 49408} | config), **special)) if config else None

    t5_parts = (T5EncoderModel(T5Config(**t5)), make_t5_tokenizer()) if t5 else (None, None)
    if "sd3" in SIZES[size]:
        pipe = StableDiffusion3Pipeline(
            **parts, transformer=SD3Transformer2DModel(**SIZES[size]["sd3"]),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), tokenizer_2=tokenizer,
            text_encoder=text_encoder(CLIPTextModelWithProjection, text),
            text_encoder_2=text_encoder(CLIPTextModelWithProjection, text_2),
            text_encoder_3=t5_parts[0], tokenizer_3=t5_parts[1],
        )  # fmt: skip
        pipe.save_pretrained(folder)
        return str(folder)
    if "flux" in SIZES[size]:
        pipe = FluxPipeline(
            **parts, transformer=FluxTransformer2DModel(**SIZES[size]["flux"]),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            text_encoder=text_encoder(CLIPTextModel, text), text_encoder_2=t5_parts[0], tokenizer_2=t5_parts[1],
        )  # fmt: skip
        pipe.save_pretrained(folder)
        return str(folder)
    parts |= {
        "text_encoder": text_encoder(CLIPTextModel, text),
        "unet": make_unet(size),
        "scheduler": make_scheduler(prediction_type),
        "feature_extractor": None,
    }
    if text_2:
        encoder = text_encoder(CLIPTextModelWithProjection, text_2)
        pipe = StableDiffusionXLPipeline(**parts, text_encoder_2=encoder, tokenizer_2=tokenizer, add_watermarker=False)
    else:
        pipe = StableDiffusionPipeline(**parts, safety_checker=None, requires_safety_checker=False)
    pipe.save_pretrained(folder)
    return str(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder")
    parser.add_argument("--prediction_type", default="epsilon", choices=("epsilon", "v_prediction", "sample"))
    args = parser.parse_args()
    check_folder(args.folder)
    print(make_random_model(args.size, args.folder, args.prediction_type))


if __name__ == "__main__":
    run_script(main)
