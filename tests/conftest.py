import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

ROOT = Path(__file__).parent.parent


def make_tiny_pipeline(folder, prediction_type="epsilon"):
    """Saves a StableDiffusionPipeline of Stable Diffusion's classes with few random weights: 32x32 pictures."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "models/emoji/tokenizer")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    pipe = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "epsilon")


@pytest.fixture(scope="session")
def tiny_v(tmp_path_factory):
    return make_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "v_prediction", "v_prediction")


SMALL = {  # a run of seconds
    "lora_rank": 4, "num_epochs": 2, "grid_images": 2, "prompts": "common_animals", "sample.num_steps": 3,
    "sample.images_per_epoch": 8, "sample.batch_size": 4, "train.batch_size": 4, "train.updates_per_epoch": 2,
}  # fmt: skip


def launch(*arguments, launcher=(), direct=False, check=True, env=None, **options):
    """Runs the real command line, accelerate launch train.py; or python train.py itself if `direct`, which starts
    sooner. `a__b=c` stands for --config.a.b=c."""
    options = SMALL | {k.replace("__", "."): v for k, v in options.items()}
    accelerate = ["-m", "accelerate.commands.launch", "--cpu", *(launcher or ("--num_processes", "1"))]
    command = [sys.executable, *([] if direct else accelerate), "train.py"]
    command += [*arguments, *(f"--config.{k}={v}" for k, v in options.items())]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **(env or {})})
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result
