"""FLUX.1-dev with DanceGRPO's settings (arXiv 2505.07818). Not run on the real weights.

    accelerate launch train.py --config config/flux.py           (LoRA)
    accelerate launch train.py --config config/flux.py:full      (all 12B weights, as theirs: does not fit on one GPU)

HPSv2 on images of 720x720: 16 steps of constant noise 0.3, noise levels shifted by 3, the guidance 3.5 told to the
network, 12 images a prompt, 60% of the steps trained on, drawn anew for each update.

Deviations. Theirs starts the 12 images of a prompt from the same noise; here every image has its own. Their log-prob
leaves out the normaliser, which cancels in the ratio. How many images make an update is not theirs, nor is the learning
rate of `lora`, as they trained all weights.

An epoch is 96 x 16 = 1,536 forward passes to sample and 960 with their backward passes to train. Memory in bf16,
computed from the numbers of weights: 23.8 GB for the transformer (11.9B), 9.5 GB for T5, 0.5 GB for CLIP and 0.3 GB for
the VAE in float32, 0.8 GB for the LoRA (52M) with gradients and moments; beside activations, which are not measured.
Loading takes 67 GB of host memory. `full` holds masters, gradients and two moments in float32: 190 GB.
"""

from config.base import choose_variant
from config.base import get_config as base


def get_config(variant="lora"):
    config = base()
    config.model = "black-forest-labs/FLUX.1-dev"
    config.precision = "bf16"
    config.reward = "hpsv2"
    config.prompts = "imagenet_animals"  # theirs: HPDv2's, as a file of one prompt a line
    config.advantage = "per_group"
    config.num_epochs = 300
    config.sample.images_per_epoch = 96
    config.sample.images_per_prompt = 12
    config.sample.height = config.sample.width = 720
    config.sample.num_steps = 16
    config.sample.guidance_scale = 3.5
    config.sample.step_kind = "dance"
    config.sample.noise_level = 0.3
    config.sample.shift = 3.0
    config.sample.batch_size = config.train.batch_size = 1
    config.train.updates_per_epoch = 4
    config.train.adam_weight_decay = 1e-4
    config.train.max_grad_norm = 1.0
    config.train.advantage_clip = 5.0
    config.train.clip_range = 1e-4
    config.train.timestep_fraction = 0.6
    config.train.gradient_checkpointing = True
    return choose_variant(variant, {"lora": lora, "full": full})(config)


def lora(config):
    config.lora_rank = 32
    config.lora_targets = "to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out"
    config.train.learning_rate = 1e-4
    return config


def full(config):
    config.lora_rank = 0
    config.train.learning_rate = 1e-5
    return config
