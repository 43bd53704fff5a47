"""Who takes part in `python -m scripts.time_to_reward`: {name: options of train.py's command line, "config" being the
preset}. The names that begin with "trl" are settings of trl 0.23.1's DDPOTrainer, run by scripts/dev/trl_run.py."""

JUDGE = {  # of all, whatever they train with
    "grid_every": 0, "grid_images": 1, "save_every": 1, "keep_checkpoints": 1,
    "evaluate.every": 1, "evaluate.limit": 45, "evaluate.count": 2, "evaluate.clip": "",
}  # fmt: skip
PRESET = {"config": "config/emoji.py:compressibility,full"}
FORWARD = {**PRESET, "train.kl_weight": 0.0, "train.prompt_dropout": 0.0, "num_epochs": 8}
TRL = {
    "model": "models/emoji", "prompts": "common_animals", "reward": "jpeg_compressibility", "sample.num_steps": 10,
    "sample.guidance_scale": 3.0, "precision": "fp32", "num_epochs": 8,
}  # fmt: skip

CONTESTANTS = {
    "ddpo_is": {**PRESET, "num_epochs": 8},
    # Its post's settings, but for the number of steps and guidance: LoRA of rank 4, batches of 6 and 3, 4 of them.
    "trl, its post": {
        **TRL, "lora_rank": 4, "train.learning_rate": 3e-4, "train.clip_range": 1e-4, "sample.images_per_epoch": 24,
        "sample.batch_size": 6, "train.batch_size": 3, "train.updates_per_epoch": 8, "num_epochs": 30,
    },
}  # fmt: skip
