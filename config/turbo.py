"""Generators of one step, whose deterministic step has no likelihood: DrPO (docs/algorithms.md).

    python -m scripts.make_turbo_model      # writes the embedded one, runs/emoji-turbo
    accelerate launch train.py --config config/turbo.py                             (small JPEG size)
    accelerate launch train.py --config config/turbo.py:emoji,incompressibility     (or another task of config/emoji.py)
    accelerate launch train.py --config config/turbo.py:sd        (SD-Turbo, not run on the real weights)
    accelerate launch train.py --config config/turbo.py:sdxl      (SDXL-Turbo, not run on the real weights)

The embedded model's settings keep most of the animals, for a small gain: results/turbo/README.md. The other two have
those of DrPO's authors for rank, learning rate, radii and reference, with 16 images of each of 32 prompts to an
update, PickScore and our prompts.
"""

from config.base import choose_variant
from config.base import get_config as base
from config.emoji import get_config as emoji


def get_config(variant="emoji"):
    """variant: sd, sdxl, or emoji, with a task of config/emoji.py behind a comma."""
    name, _, task = variant.partition(",")
    config = emoji(f"{task or 'compressibility'},lora") if name == "emoji" else base()
    config.algorithm = "drpo"
    config.model, config.train.drift_model, config.train.learning_rate = choose_variant(name, {
        "emoji": ("runs/emoji-turbo", "models/emoji", 1e-3),
        "sd": ("stabilityai/sd-turbo", "", 1e-4),
        "sdxl": ("stabilityai/sdxl-turbo", "", 1e-5),
    })  # fmt: skip
    config.sample.num_steps, config.sample.guidance_scale, config.sample.eta = 1, 1.0, 0.0
    config.sample.images_per_prompt = 16
    config.train.timestep_choice, config.train.timestep_fraction = "random", 1.0
    config.train.kl_weight = 0.0
    config.train.batch_size = 16
    if name == "emoji":
        config.num_epochs = 8
        config.train.kl_weight = 10.0
        config.sample.images_per_epoch, config.sample.images_per_prompt = 64, 8
        config.sample.batch_size = 64
        config.train.updates_per_epoch, config.train.warmup_updates = 2, 4
        return config
    config.lora_rank = 16
    config.precision = "bf16"
    config.reward = "pickscore"
    config.num_epochs = 1000
    config.sample.images_per_epoch = 512
    config.sample.batch_size = 16
    config.train.updates_per_epoch = 1
    config.train.adam_weight_decay = 1e-2
    config.train.gradient_checkpointing = True
    return config
