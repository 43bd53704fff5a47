"""Saves a Stable Diffusion of a known architecture with random weights: for tests, memory and speed at true size.

    python -m scripts.make_random_model sd15 runs/sd15-random

Its pictures are noise; its shapes, memory and speed are those of the real model. The tokenizer is the embedded model's.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TOKENIZER = Path(__file__).parent.parent / "models/emoji/tokenizer"
SD_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512}
SIZES = {
    "tiny": {  # 32x32 pixels
        "unet": {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "cross_attention_dim": 16,
                 "attention_head_dim": 2, "norm_num_groups": 4},
        "vae": {"block_out_channels": (8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 32},
        "text": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                 "max_position_embeddings": 24, "vocab_size": 1000},
    },
    "sd15": {  # 512x512 pixels, 860M weights in the UNet
        "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        "vae": SD_VAE,
        "text": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    },
    "sd21": {  # 768x768 pixels, 866M weights in the UNet
        "unet": {"sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
                 "use_linear_projection": True},
        "vae": SD_VAE,
        "text": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
                 "hidden_act": "gelu"},
    },
}  # fmt: skip


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
    """Saves a StableDiffusionPipeline of one of SIZES to `folder`; returns the folder."""
    torch.manual_seed(0)
    unet, vae, text = (SIZES[size][part] for part in ("unet", "vae", "text"))
    levels = len(unet.get("block_out_channels", (320, 640, 1280, 1280)))
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=text.get("max_position_embeddings", 77))
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vae_blocks = len(vae["block_out_channels"])
    StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * vae_blocks,
            up_block_types=("UpDecoderBlock2D",) * vae_blocks,
            latent_channels=4,
            **vae,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(**({"vocab_size": 49408} | text), **special)),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
            **unet,
        ),
        scheduler=make_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return str(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder")
    parser.add_argument("--prediction_type", default="epsilon", choices=("epsilon", "v_prediction", "sample"))
    args = parser.parse_args()
    print(make_random_model(args.size, args.folder, args.prediction_type))


if __name__ == "__main__":
    main()
