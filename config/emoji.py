"""The embedded model: the paper's compressibility experiments on a CPU, in minutes.

    accelerate launch train.py --config config/emoji.py                       (compressibility, full finetuning)
    accelerate launch train.py --config config/emoji.py:incompressibility
    accelerate launch train.py --config config/emoji.py:compressibility,lora

Lab note to come.
"""

from config.base import get_config as base
from ddpo import choose

REWARDS = {"compressibility": "jpeg_compressibility", "incompressibility": "jpeg_incompressibility"}


def get_config(variant="compressibility"):
    """variant: a key of REWARDS; behind it ",lora" for LoRA, else full finetuning."""
    task, _, method = variant.partition(",")
    config = base()
    config.model = "models/emoji"
    config.prompts = "common_animals"
    config.reward = choose("variant", task, REWARDS)
    config.num_epochs = 14
    config.grid_every = 2
    config.sample.images_per_epoch = 128
    config.sample.batch_size = 64
    config.sample.num_steps = 10
    config.sample.guidance_scale = 1.0
    config.train.batch_size = 64
    config.train.updates_per_epoch = 4
    config.train.clip_range = 1e-2  # the latent has 1,024 dimensions, not Stable Diffusion's 16,384: see README
    if choose("method", method, {"": False, "full": False, "lora": True}):
        config.lora_rank = 16
        config.lora_targets = "to_q,to_k,to_v,to_out.0,proj,net.2,conv1,conv2"  # attention, feed-forward, convolutions
        config.train.learning_rate = 5e-3
    else:
        config.lora_rank = 0
        config.train.learning_rate = 3e-4
    return config
