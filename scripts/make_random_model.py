"""Saves a Stable Diffusion or SDXL with random weights: for tests, and for memory and speed at true size.

    python -m scripts.make_random_model sd15 runs/sd15-random

Its pictures are noise; its shapes, memory and speed are those of the real model. The tokenizer is the embedded model's.
"""

import argparse
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

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


def make_random_model(size, folder, prediction_type="epsilon"):
    """Saves a pipeline of one of SIZES, StableDiffusionPipeline or StableDiffusionXLPipeline, to `folder`; returns the
    folder."""
    torch.manual_seed(0)
    vae, text, text_2 = (SIZES[size].get(part) for part in ("vae", "text", "text_2"))
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=text.get("max_position_embeddings", 77))
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vae_blocks = len(vae["block_out_channels"])
    parts = {
        "vae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * vae_blocks,
            up_block_types=("UpDecoderBlock2D",) * vae_blocks,
            latent_channels=4,
            **vae,
        ),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**({"vocab_size": 49408} | text), **special)),
        "tokenizer": tokenizer,
        "unet": make_unet(size),
        "scheduler": make_scheduler(prediction_type),
        "feature_extractor": None,
    }
    if text_2:
        encoder = CLIPTextModelWithProjection(CLIPTextConfig(**({"vocab_size": 49408} | text_2), **special))
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
