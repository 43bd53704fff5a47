"""The embedded flow-matching model: the paper's four tasks by Flow-GRPO's step, on a CPU, in minutes.

    accelerate launch train.py --config config/emoji_flow.py                       (compressibility)
    accelerate launch train.py --config config/emoji_flow.py:incompressibility
    accelerate launch train.py --config config/emoji_flow.py:compressibility,lora  (any task, lora or full)
    accelerate launch train.py --config config/emoji_flow.py:aesthetic             (a reward learned from choices)
    accelerate launch train.py --config config/emoji_flow.py:alignment             (the embedded CLIP)

The tasks, epochs and images of config/emoji.py, so that the two can be compared. What a flow model needs differs:
Flow-GRPO's noise level of 0.7; a shift of 3 towards noise, as in Stable Diffusion 3, without which the last step would
be tiny; and a smaller learning rate with a larger KL weight, which were tried on one task and one seed
(results/working_point/README.md). LoRA's rate is ten times that of full finetuning, and has not been tried. All tasks
make one update per epoch.
"""

from config.emoji import get_config as emoji


def get_config(variant="compressibility"):
    """variant: as for config/emoji.py."""
    config = emoji(variant)
    config.model = "models/emoji-flow"
    config.sample.step_kind = "sde"
    config.sample.noise_level = 0.7
    config.sample.shift = 3.0
    config.train.updates_per_epoch = 1
    config.train.warmup_updates = 2
    config.train.kl_weight = 0.05
    config.train.learning_rate = 5e-4 if config.lora_rank else 5e-5
    if config.lora_rank:
        # Attention and feed-forward, of image and text.
        config.lora_targets = "to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out,net.0.proj,net.2"
    return config
