"""Stable Diffusion 3.5-medium with Flow-GRPO's settings (arXiv 2505.05470). Not run on the real weights.

    accelerate launch train.py --config config/sd3.py            (Flow-GRPO: guidance 4.5, KL)
    accelerate launch train.py --config config/sd3.py:fast       (without guidance and KL, CPS steps, the noisier half)
    accelerate launch train.py --config config/sd3.py:ocr        (as grpo, for text in images)
    accelerate launch train.py --config config/sd3.py:geneval    (as grpo, for numbers, colours and positions)

PickScore on images of 512x512. 48 prompts x 24 images an epoch in 2 updates, since groups of 12 and 6 were found to
collapse; LoRA of rank 32 on all projections of the attention. Theirs reached a PickScore of 23.31 from 21.72, with
`ocr` an accuracy of 0.92 from 0.59, with `geneval` GenEval's score of 0.95 from 0.63 (see docs/rewards.md).

Deviations. Advantages are divided by the group's standard deviation, theirs by the epoch's. Their LoRA has twice the
scale (alpha 64). Their KL loss, |mean - mean_base|^2 / (2 g^2), is -dt times the KL of a step, on average a tenth of it
in 10 steps: so their weight 0.01 (0.04 for GenEval and OCR) is 0.001 (0.004) here, but weighs the steps otherwise.
Their last step, whose std is 0.006, is left out here by training on the 9 noisiest. `fast` samples with noise in all
steps, where theirs has 3 noisy ones among the first 5, and trains on the first 5. `ocr` reads with another package,
`geneval` asks a vision-language model, and the prompts of both are fewer than theirs.

An epoch of `grpo` is 1,152 x 10 steps x 2 (guidance) = 23,040 forward passes to sample, and 20,736 with their backward
passes to train. Memory in bf16, computed from the numbers of weights: 4.5 GB for the transformer (2.24B) and 0.9 GB for
its table of positions, 9.5 GB for T5 (a folder saved without it spares them), 3.3 GB for the CLIPs and 0.3 GB for the
VAE in float32, 0.4 GB for the LoRA (24M) with gradients and moments; beside activations, which are not measured.
Loading takes 14 GB of host memory, 33 with T5.
"""

from config.base import choose_variant
from config.base import get_config as base


def get_config(variant="grpo"):
    config = base()
    config.model = "stabilityai/stable-diffusion-3.5-medium"
    config.precision = "bf16"
    config.lora_rank = 32
    config.lora_targets = "to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out"
    config.reward = "pickscore"
    config.prompts = "imagenet_animals"  # theirs: 25,000 of Pick-a-Pic's, as a file of one prompt a line
    config.advantage = "per_group"
    config.num_epochs = 1000
    config.sample.images_per_epoch = 1152
    config.sample.images_per_prompt = 24
    config.sample.height = config.sample.width = 512
    config.sample.num_steps = 10
    config.train.updates_per_epoch = 2
    config.train.learning_rate = 3e-4
    config.train.adam_weight_decay = 1e-4
    config.train.advantage_clip = 5.0
    config.train.ema_decay = 0.9
    config.train.timestep_choice = "first"
    return choose_variant(variant, {"grpo": grpo, "fast": fast, "ocr": ocr, "geneval": geneval})(config)


def grpo(config):
    config.sample.guidance_scale = 4.5
    config.sample.step_kind = "sde"
    config.sample.noise_level = 0.7
    config.train.clip_range = 1e-4
    config.train.timestep_fraction = 0.9
    config.train.kl_weight = 0.001
    return config


def fast(config):
    config.sample.guidance_scale = 1.0
    config.sample.step_kind = "cps"
    config.sample.noise_level = 0.8
    config.train.clip_range = 1e-5
    config.train.timestep_fraction = 0.5
    return config


def ocr(config):
    config = grpo(config)
    config.reward = config.prompts = "ocr"
    config.train.kl_weight = 0.004
    return config


def geneval(config):
    config = grpo(config)
    config.reward = config.prompts = "geneval"  # geneval:http://HOST:PORT/v1 leaves the model to a server
    config.reward_options.precision = "bf16"
    config.train.kl_weight = 0.004
    return config
