"""Alignment at the paper's scale: Stable Diffusion 1.4 learns to draw what the prompt says, as a vision-language model
sees it.

    accelerate launch train.py --config config/alignment.py            (LoRA, ddpo-pytorch's settings)
    accelerate launch train.py --config config/alignment.py:full       (the paper's settings)
    accelerate launch train.py --config config/alignment.py:one_gpu    (LoRA in short epochs: trl's post)
    accelerate launch train.py --config config/alignment.py:fast       (LoRA by DiffusionNFT)

Prompts: 45 animals washing the dishes, riding a bike or playing chess. By default LLaVA 1.5 13B runs in the
training process and takes 26 GB in half precision; `--config.reward=alignment:http://HOST:PORT/v1` leaves it to a
server.

288 images an epoch in 2 updates (LoRA) or 256 in 4 (full), 200 epochs; `one_gpu`: 24 in 8, 200 epochs. Not yet run on
the real weights; a server has been tested, with `transformers serve`.
"""

from config import compressibility


def get_config(variant="lora"):
    config = compressibility.get_config(variant)
    config.reward = "alignment"
    config.reward_options.precision = "bf16"
    config.prompts = "animal_activities"
    config.stats.buffer_size = 32
    if variant == "lora":
        config.num_epochs = 200
        config.sample.images_per_epoch = 288
        config.train.updates_per_epoch = 2
    return config
