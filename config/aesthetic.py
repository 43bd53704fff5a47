"""Aesthetic quality at the paper's scale: Stable Diffusion 1.4 learns to please the LAION aesthetic predictor.

    accelerate launch train.py --config config/aesthetic.py            (LoRA, the port's settings)
    accelerate launch train.py --config config/aesthetic.py:full       (the paper's settings)
    accelerate launch train.py --config config/aesthetic.py:one_gpu    (LoRA in small rounds: trl's post)

Prompts: the 45 common animals. Needs openai/clip-vit-large-patch14 and the head in trl-lib/ddpo-aesthetic-predictor of
the hub, or `--config.reward=aesthetic:HEAD.pth`. A reward model of your own: `--config.reward=learned:FOLDER`.

Not yet run on the real weights; the reward has been tested with the real head.
"""

from config import compressibility
from ddpo import choose


def get_config(variant="lora"):
    method = choose("variant", variant, {"lora": "lora", "full": "full", "one_gpu": "lora"})
    config = compressibility.get_config(method)
    config.reward = "aesthetic"
    config.prompts = "common_animals"
    if variant == "lora":
        config.num_epochs = 200
        config.train.updates_per_epoch = 2
        config.stats.buffer_size = 32
    if variant == "one_gpu":
        one_gpu(config)
    return config


def one_gpu(config):
    """24 images a round, in 8 updates of 3, for 200 rounds: a small batch that a single GPU gets through."""
    config.num_epochs = 200
    config.stats.buffer_size = 32
    config.stats.max_age = 0  # at half an image per prompt and round, ten rounds would never gather min_count
    config.sample.images_per_epoch = 24  # 4 batches of 6
    config.sample.batch_size = 6
    config.train.updates_per_epoch = 8
    config.train.batch_size = 3
    config.train.learning_rate = 3e-4
