"""Who takes part in `python -m scripts.time_to_reward`: {name: options of train.py's command line, "config" being the
preset}. The names that begin with "trl" are settings of trl 0.23.1's DDPOTrainer, run by scripts/dev/trl_run.py."""

from config.sweeps import FORWARD, ONE_UPDATE

JUDGE = {  # of all, whatever they train with
    "grid_every": 0, "grid_images": 1, "save_every": 1, "keep_checkpoints": 1,
    "evaluate.every": 1, "evaluate.limit": 45, "evaluate.count": 2, "evaluate.clip": "",
}  # fmt: skip
PRESET = {"config": "config/emoji.py:compressibility,full"}
LARGE_UPDATE = {**ONE_UPDATE, "train.learning_rate": 3e-4}
NEWER = {**PRESET, **FORWARD, "train.learning_rate": 3e-4}
TRL = {  # it samples and trains with guidance, on all steps; it has no KL penalty, no warm-up and no moving average
    "model": "models/emoji", "prompts": "common_animals", "reward": "jpeg_compressibility", "sample.num_steps": 10,
    "sample.guidance_scale": 3.0, "precision": "fp32",
}  # fmt: skip
TRL_BATCH = {"sample.images_per_epoch": 128, "sample.batch_size": 16, "train.batch_size": 16, "train.clip_range": 2e-3}

CONTESTANTS = {
    "ddpo_is": {**PRESET, "train.updates_per_epoch": 8, "train.warmup_updates": 16, "num_epochs": 8},
    "ddpo_is_one_update": {**PRESET, **LARGE_UPDATE, "num_epochs": 5},
    "nft": {**NEWER, "algorithm": "nft", "num_epochs": 4},
    "nft_64": {**NEWER, "algorithm": "nft", "sample.images_per_epoch": 64, "num_epochs": 5},
    "awm": {**NEWER, "algorithm": "awm", "num_epochs": 4},
    # The best of three that were tried on seed 10; the other two follow, and one that was not run.
    "trl_tuned": {**TRL, **TRL_BATCH, **LARGE_UPDATE, "lora_rank": 0, "num_epochs": 6},
    "trl_full_1e-3": {**TRL, **TRL_BATCH, **LARGE_UPDATE, "train.learning_rate": 1e-3, "lora_rank": 0, "num_epochs": 5},
    "trl_full_eight": {
        **TRL, **TRL_BATCH, "train.updates_per_epoch": 8, "train.learning_rate": 1e-4, "lora_rank": 0, "num_epochs": 5,
    },
    "trl_lora": {**TRL, **TRL_BATCH, **LARGE_UPDATE, "train.learning_rate": 3e-3, "lora_rank": 4, "num_epochs": 5},
    # Its post's: LoRA of rank 4, 24 images an epoch in batches of 6, 8 updates of 3.
    "trl_post": {
        **TRL, "lora_rank": 4, "train.learning_rate": 3e-4, "train.clip_range": 1e-4, "sample.images_per_epoch": 24,
        "sample.batch_size": 6, "train.batch_size": 3, "train.updates_per_epoch": 8, "num_epochs": 30,
        "evaluate.every": 5,
    },
    # Its own defaults: 2 images an epoch in batches of 1, 2 updates; LoRA, which its examples use.
    "trl_defaults": {
        **TRL, "lora_rank": 4, "train.learning_rate": 3e-4, "train.clip_range": 1e-4, "sample.images_per_epoch": 2,
        "sample.batch_size": 1, "train.batch_size": 1, "train.updates_per_epoch": 2, "num_epochs": 300,
        "evaluate.every": 100,
    },
}  # fmt: skip
