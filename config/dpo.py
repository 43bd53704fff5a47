"""Choices between two images, without a reward model: the embedded model on a CPU.

    python -m scripts.train_dpo --choices runs/annotations-emoji/choices.jsonl                        (LoRA of rank 16)
    python -m scripts.train_dpo --choices runs/annotations-emoji/choices.jsonl --config config/dpo.py:full

An epoch is 256 images, 128 pairs, in 8 updates, whatever the number of choices. 8 epochs did well with 50 to 1,500
choices; 16 lost animals with 150. All numbers: results/preferences/README.md.
"""

from config.emoji import get_config as emoji


def get_config(variant="lora"):
    """variant: lora or full."""
    config = emoji(f"aesthetic,{variant}")
    config.num_epochs = 8
    config.save_every = 4
    config.sample.images_per_epoch = 256
    config.train.updates_per_epoch = 8
    config.train.batch_size = 16
    config.train.timestep_choice, config.train.timestep_fraction = "random", 1.0
    config.train.dpo_beta = 300.0
    return config
