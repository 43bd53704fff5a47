"""Compressibility at the paper's scale: Stable Diffusion 1.4 learns to make small JPEG files.

    accelerate launch train.py --config config/compressibility.py            (LoRA, ddpo-pytorch's settings)
    accelerate launch train.py --config config/compressibility.py:full       (the paper's settings)
    accelerate launch train.py --config config/compressibility.py:one_gpu    (LoRA in short epochs: trl's post)
    accelerate launch train.py --config config/compressibility.py:fast       (LoRA by DiffusionNFT, see below)

Prompts: the 398 ImageNet animals. 256 images an epoch in 4 updates; 100 epochs (LoRA) or 200 (full; 51,200 reward
queries). `one_gpu`: 24 images an epoch in 8 updates, 200 epochs.

At 0.64 samples per prompt and epoch, the paper's buffer of 32 rewards spans 50 epochs, so an advantage mostly says how
much the policy has improved since. `:full` keeps that, to reproduce the paper; `lora` forgets rewards after 10 epochs,
so nearly all samples are normalised by their whole epoch.

An epoch of `lora` and `:full` is 256 x 50 steps x 2 (guidance) = 25,600 forward passes to sample and 25,600 more with
their backward passes to train; one of `one_gpu` takes 2,400 and 2,400. `:fast` is what needed the fewest on the
embedded model (results/bench), a loss on the finished image with one update per epoch: 10,240 and 2,048. Not yet run on
the real weights; steps of a network of the true size, with random weights, have been timed on an H100: docs/speed.md.
"""

from config.base import choose_variant
from config.base import get_config as base


def get_config(variant="lora"):
    config = base()
    config.model = "CompVis/stable-diffusion-v1-4"
    config.reward = "jpeg_compressibility"
    config.prompts = "imagenet_animals"
    config.sample.images_per_epoch = 256
    config.sample.num_steps = 50
    config.sample.guidance_scale = 5.0
    config.train.updates_per_epoch = 4
    config.train.clip_range = 1e-4
    return choose_variant(variant, {"lora": lora, "full": full, "one_gpu": one_gpu, "fast": fast})(config)


def lora(config):
    """ddpo-pytorch's, which uses fp16; here bf16, whose range needs no loss scaling."""
    config.lora_rank = 4
    config.precision = "bf16"
    config.num_epochs = 100
    config.train.learning_rate = 3e-4
    config.train.advantage_clip = 5.0
    config.stats.min_count = 16
    config.stats.buffer_size = 16
    return config


def full(config):
    """The paper's: every weight of the UNet. The network runs in bf16, its weights are float32: see docs/speed.md."""
    config.lora_rank = 0
    config.precision = "bf16"
    config.num_epochs = 200
    config.train.learning_rate = 1e-5
    config.train.advantage_clip = 10.0
    config.stats.min_count = 16
    config.stats.buffer_size = 32
    config.stats.max_age = 0
    return config


def one_gpu(config):
    """LoRA in short epochs that a single GPU gets through: 24 images in 8 updates of 3."""
    config = lora(config)
    config.num_epochs = 200
    config.stats.buffer_size = 32
    config.stats.max_age = 0  # with so few images per prompt and epoch, ten epochs would never gather min_count
    config.sample.images_per_epoch = 24
    config.sample.batch_size = 3  # trl's post: 6, but then old log-probs would be computed again before training
    config.train.updates_per_epoch = 8
    config.train.batch_size = 3
    return config


def fast(config):
    """DiffusionNFT on images of 20 steps, with its own learning rate for LoRA and KL weight; guidance as here."""
    config = lora(config)
    config.algorithm = "nft"
    config.sample.num_steps = 20
    config.sample.batch_size = 16
    config.train.batch_size = 16
    config.train.updates_per_epoch = 1
    config.train.warmup_updates = 2
    config.train.draws = 8
    config.train.prompt_dropout = 0.0
    config.train.kl_weight = 1e-4
    config.train.ema_decay = 0.9
    return config
