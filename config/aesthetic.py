"""Aesthetic quality at the paper's scale: Stable Diffusion 1.4 learns to please the LAION aesthetic predictor.

    accelerate launch train.py --config config/aesthetic.py            (LoRA, ddpo-pytorch's settings)
    accelerate launch train.py --config config/aesthetic.py:full       (the paper's settings)
    accelerate launch train.py --config config/aesthetic.py:one_gpu    (LoRA in short epochs: trl's post)
    accelerate launch train.py --config config/aesthetic.py:fast       (LoRA by DiffusionNFT)

Prompts: the 45 common animals. Needs openai/clip-vit-large-patch14 and the head in trl-lib/ddpo-aesthetic-predictor of
the hub, or `--config.reward=aesthetic:HEAD.pth`. A reward model of your own: `--config.reward=learned:FOLDER`.

256 images an epoch, in 2 updates (LoRA, 200 epochs) or 4 (full, 200 epochs); `one_gpu`: 24 in 8, 200 epochs. Not yet
run on the real weights; the reward has been tested with the real head.
"""

from config import compressibility


def get_config(variant="lora"):
    config = compressibility.get_config(variant)
    config.reward = "aesthetic"
    config.prompts = "common_animals"
    if variant == "lora":
        config.num_epochs = 200
        config.train.updates_per_epoch = 2
        config.stats.buffer_size = 32
    return config
