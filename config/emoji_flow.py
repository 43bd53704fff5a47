"""The embedded flow-matching model: the paper's four tasks by Flow-CPS's step, on a CPU, in minutes.

    accelerate launch train.py --config config/emoji_flow.py                       (compressibility)
    accelerate launch train.py --config config/emoji_flow.py:incompressibility
    accelerate launch train.py --config config/emoji_flow.py:compressibility,lora  (any task, lora or full)
    accelerate launch train.py --config config/emoji_flow.py:aesthetic             (a reward learned from choices)
    accelerate launch train.py --config config/emoji_flow.py:alignment             (the embedded CLIP)

The tasks, epochs and images of config/emoji.py, so that the two can be compared. What a flow model needs differs: a
shift of 3 towards noise, as in Stable Diffusion 3, without which the last step would be tiny; a larger KL weight; and
the step of Flow-CPS, since that of Flow-GRPO (`sample.step_kind=sde`) leaves visible noise in images of ten steps. All
tasks make one update per epoch. How the settings were found: results/working_point/README.md; what came of it:
results/emoji/README.md.
"""

from config.emoji import get_config as emoji


def get_config(variant="compressibility"):
    """variant: as for config/emoji.py."""
    config = emoji(variant)
    config.model = "models/emoji-flow"
    config.sample.step_kind = "cps"
    config.sample.noise_level = 0.7
    config.sample.shift = 3.0
    config.train.updates_per_epoch = 1
    config.train.warmup_updates = 2
    config.train.kl_weight = 0.05
    config.train.learning_rate = 1e-3 if config.lora_rank else 1e-4
    if config.lora_rank:
        # Attention and feed-forward, of image and text.
        config.lora_targets = "to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out,net.0.proj,net.2"
    return config
