"""The embedded flow-matching model: the paper's four tasks by Flow-GRPO's step, on a CPU, in minutes.

    accelerate launch train.py --config config/emoji_flow.py                       (compressibility)
    accelerate launch train.py --config config/emoji_flow.py:incompressibility
    accelerate launch train.py --config config/emoji_flow.py:compressibility,lora  (any task, lora or full)
    accelerate launch train.py --config config/emoji_flow.py:aesthetic             (a reward learned from choices)
    accelerate launch train.py --config config/emoji_flow.py:alignment             (the embedded CLIP)

The tasks, epochs, images and updates of config/emoji.py, so that the two can be compared. What differs is what a flow
asks for: Flow-GRPO's noise level 0.7, and a shift of 3 towards noise, as Stable Diffusion 3's own, without which the
last of the steps would be next to none.
"""

from config.base import choose_variant
from config.emoji import TASKS
from config.emoji import get_config as emoji


def get_config(variant="compressibility"):
    """variant: a key of TASKS, with ",lora" or ",full" behind it for another method than the task's own."""
    task, _, method = variant.partition(",")
    *_, usual_method = choose_variant(task, TASKS)
    config = emoji(variant)
    config.model = "models/emoji-flow"
    config.sample.step_kind = "sde"
    config.sample.noise_level = 0.7
    config.sample.shift = 3.0
    if choose_variant(method or usual_method, {"lora": True, "full": False}):
        # Attention and feed-forward, of picture and text.
        config.lora_targets = "to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out,net.0.proj,net.2"
    return config
