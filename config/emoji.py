"""The embedded model: the paper's four tasks on a CPU, in minutes.

    accelerate launch train.py --config config/emoji.py                            (compressibility)
    accelerate launch train.py --config config/emoji.py:incompressibility
    accelerate launch train.py --config config/emoji.py:compressibility,lora       (any task, lora or full)
    accelerate launch train.py --config config/emoji.py:aesthetic                  (a reward learned from choices)
    accelerate launch train.py --config config/emoji.py:alignment                  (the embedded CLIP)

128 images of 10 steps a round. No guidance: it would double the time, and the animals are right without.
Mean JPEG size from the first to the last round, seeds 0, 1, 2: compressibility
2.26 to 1.64, 2.22 to 1.65, 2.21 to 1.61; incompressibility 2.26 to 2.94, 2.22 to 3.17, 2.21 to 2.83 kB.
aesthetic: the true taste of a simulated person, which the reward has only learned from 500 choices, rises by 1.1, 1.6
and 1.4 standard deviations in 4 rounds. alignment (seed 0): none in 6 rounds, 2.06 before and after on the same noise;
pictures drawn right get 2.12.
Runs, pictures and what falls short: results/emoji/README.md and results/preferences/README.md.
"""

from config.base import choose_variant
from config.base import get_config as base

TASKS = {  # name -> reward, prompts, epochs, and the method used
    "compressibility": ("jpeg_compressibility", "common_animals", 16, "full"),
    "incompressibility": ("jpeg_incompressibility", "common_animals", 10, "full"),
    "aesthetic": ("learned:models/emoji-taste", "common_animals", 4, "lora"),
    "alignment": ("clipscore:models/emoji/clip", "animal_activities", 12, "lora"),
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
    config.sample.guidance_scale = 1.0
    config.train.batch_size = 16  # the samples of an update: so transitions are trained in the batch they came from
    config.train.updates_per_epoch = 8
    config.train.clip_range = 1e-2  # the latent has 1,024 dimensions, not Stable Diffusion's 16,384: see README
    if choose_variant(method or usual_method, {"lora": True, "full": False}):
        config.lora_rank = 16
        config.lora_targets = "to_q,to_k,to_v,to_out.0,proj,net.2,conv1,conv2"  # attention, feed-forward, convolutions
        config.train.learning_rate = 5e-3
    else:
        config.lora_rank = 0
        config.train.learning_rate = 3e-4
    return config
