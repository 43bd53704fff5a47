"""Incompressibility at the paper's scale: Stable Diffusion 1.4 learns to make large JPEG files.

    accelerate launch train.py --config config/incompressibility.py            (LoRA, ddpo-pytorch's settings)
    accelerate launch train.py --config config/incompressibility.py:full       (the paper's settings)
    accelerate launch train.py --config config/incompressibility.py:one_gpu    (LoRA in short epochs: trl's post)
    accelerate launch train.py --config config/incompressibility.py:fast       (LoRA by DiffusionNFT)

All else as in compressibility.py. Not yet run on the real weights.
"""

from config import compressibility


def get_config(variant="lora"):
    config = compressibility.get_config(variant)
    config.reward = "jpeg_incompressibility"
    return config
