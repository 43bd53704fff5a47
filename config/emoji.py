"""The embedded model: the paper's four tasks on a CPU, in minutes.

    accelerate launch train.py --config config/emoji.py                            (compressibility)
    accelerate launch train.py --config config/emoji.py:incompressibility
    accelerate launch train.py --config config/emoji.py:compressibility,lora       (any task, lora or full)
    accelerate launch train.py --config config/emoji.py:aesthetic                  (a reward learned from choices)
    accelerate launch train.py --config config/emoji.py:alignment                  (the embedded CLIP)

128 images of 10 steps per epoch, sampled and trained with a guidance scale of 3. Training on the noisier half of the
steps is faster. Guidance, a small KL penalty, small updates and a warm-up keep the animals recognisable. One
update per epoch does as well as eight, or better: every ratio is then 1, and there is nothing to clip. Alignment uses
5 steps without guidance, since with guidance the base model already draws what the prompt says. How the settings were
found: results/working_point/README.md. Results on seeds not used for that: results/emoji/README.md.
"""

from config.base import choose_variant
from config.base import get_config as base

TASKS = {  # name -> reward, prompts, epochs, and the method used
    "compressibility": ("jpeg_compressibility", "common_animals", 12, "full"),
    "incompressibility": ("jpeg_incompressibility", "common_animals", 12, "full"),
    "aesthetic": ("learned:models/emoji-taste", "common_animals", 8, "lora"),
    "alignment": ("clipscore:models/emoji/clip", "animal_activities", 16, "lora"),
}

ONE_UPDATE = {  # task, method -> learning rate and KL weight with one update per epoch; the others make eight
    ("compressibility", "full"): (1e-4, 0.01),
    ("compressibility", "lora"): (2e-3, 0.02),
    ("incompressibility", "full"): (1e-4, 0.02),
    ("incompressibility", "lora"): (3e-3, 0.01),
    ("aesthetic", "full"): (1e-4, 0.01),
    ("alignment", "full"): (1e-4, 0.05),
}


def get_config(variant="compressibility"):
    """variant: a key of TASKS, with ",lora" or ",full" behind it for another method than the task's own."""
    task, _, method = variant.partition(",")
    config = base()
    config.model = "models/emoji"
    config.reward, config.prompts, config.num_epochs, usual_method = choose_variant(task, TASKS)
    config.grid_every = 2
    config.evaluate.clip = "models/emoji/clip"
    config.evaluate.classifier = "models/emoji/classifier"
    config.sample.images_per_epoch = 128
    config.sample.batch_size = 16
    config.sample.num_steps = 10
    config.sample.guidance_scale = 3.0
    config.stats.shrinkage = 3.0  # variance of JPEG sizes within a prompt / variance between prompts
    config.train.batch_size = 16  # so transitions are trained in the batch they were sampled in
    config.train.clip_range = 2e-3  # 2 nats of a step's log-ratio in 1,024 dimensions; Stable Diffusion: 1e-4
    config.train.timestep_choice = "first"  # the noisier half of the steps: faster, see docs/algorithms.md
    config.train.timestep_fraction = 0.5
    config.train.kl_weight = 0.01
    config.train.ema_decay = 0.9
    if task == "alignment":
        config.sample.guidance_scale = 1.0
        config.sample.num_steps = 5
        config.train.timestep_fraction = 0.6
        config.train.kl_weight = 0.05
    method = choose_variant(method or usual_method, {"lora": "lora", "full": "full"})
    config.lora_rank = 0
    if method == "lora":
        config.lora_rank = 16
        config.lora_targets = "to_q,to_k,to_v,to_out.0,proj,net.2,conv1,conv2"  # attention, feed-forward, convolutions
    if (task, method) in ONE_UPDATE:
        config.train.updates_per_epoch = 1
        config.train.warmup_updates = 2
        config.train.learning_rate, config.train.kl_weight = ONE_UPDATE[task, method]
    else:
        config.train.updates_per_epoch = 8
        config.train.warmup_updates = 16
        config.train.learning_rate = 1e-3
    return config
