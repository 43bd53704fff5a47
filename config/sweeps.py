"""What is run for the figures: `python -m scripts.sweep NAME` runs a sweep, `python -m scripts.figures NAME` draws it.

A sweep is a function without arguments that returns {"PANEL-CURVE": options}, by their place in the figure; options are
those of train.py's command line, by dotted name, "config" being the preset. Every learning rate of a tuple is tried on
the first seed, and the best (JUDGED says by what) is run on the other seeds. A job is called
PANEL-CURVE-lrRATE-seedSEED.

fig4 is guided and trains on the noisier half of the steps, as config/emoji.py does. The others are older and smaller:
32 images of 5 steps an epoch instead of 128 of 10, no guidance, all steps, no KL penalty.
"""

SEEDS = (0, 1, 2)
COMMON = {
    "precision": "bf16", "grid_every": 0, "grid_images": 6, "save_every": 4, "keep_checkpoints": 1, "num_epochs": 12,
    "sample.batch_size": 128, "train.batch_size": 80,
    "evaluate.every": 4, "evaluate.limit": 45, "evaluate.clip": "",
    "train.updates_per_epoch": 8, "train.warmup_updates": 16, "train.kl_weight": 0.01,
}  # fmt: skip
TASKS = ("compressibility", "incompressibility", "aesthetic")
ONE_UPDATE = {"train.updates_per_epoch": 1, "train.warmup_updates": 2}
GROUPS = {"sample.images_per_prompt": 4}
# On the finished picture, with the settings of config/contestants.py.
FORWARD = {**ONE_UPDATE, "train.kl_weight": 0.0, "train.prompt_dropout": 0.0, "train.draws": 4}
# RWR and its kind: more updates, with as many passes with gradient in an epoch as DDPO makes.
REGRESSION = {"train.kl_weight": 0.0, "train.draws": 10}
ALGORITHMS = {  # curve of fig4 -> learning rates, options
    "ddpo_is": ((1e-4, 3e-4), {}),
    "ddpo_sf": ((1e-4, 3e-4), ONE_UPDATE),
    "rwr": ((1e-5, 3e-5, 1e-4), REGRESSION),
    "rwr_sparse": (
        (1e-5, 3e-5, 1e-4),
        {**REGRESSION, "train.updates_per_epoch": 1, "train.inner_epochs": 10, "train.warmup_updates": 20},
    ),
    "nft": ((3e-4,), FORWARD),
    "awm": ((3e-4,), FORWARD),
    "ram": ((3e-4,), {**FORWARD, "train.ram_scale": 4.0}),
    "dpo": ((1e-4,), {**FORWARD, **GROUPS}),
}


def fig4():
    """Reward against reward queries for each algorithm, at the best of its learning rates for each reward."""
    curves = {}
    for task in TASKS:
        for name, (rates, options) in ALGORITHMS.items():
            # 1.9 per standard deviation of the first epoch's rewards: 0.58, or 0.38 kB.
            tilt = {"train.inverse_temperature": 3.3 if task == "aesthetic" else 5.0}
            curves[f"{task}-{name}"] = {
                **COMMON, "config": f"config/emoji.py:{task},full", "algorithm": name, "train.learning_rate": rates,
                **(tilt if name == "rwr" else {}), **options,
            }  # fmt: skip
    return curves


# --- older: before the working point was found

WARMUP_EPOCHS = 4  # of a rising learning rate: Adam's first updates would else cost more than a short run gains
SMALL = {
    "grid_every": 0, "grid_images": 6, "save_every": 1, "keep_checkpoints": 1, "num_epochs": 12,
    "sample.num_steps": 5, "sample.images_per_epoch": 32, "sample.batch_size": 8, "train.batch_size": 8,
    "train.updates_per_epoch": 4, "train.warmup_updates": 4 * WARMUP_EPOCHS, "sample.guidance_scale": 1.0,
    "train.clip_range": 1e-2, "train.timestep_choice": "random", "train.timestep_fraction": 1.0, "train.kl_weight": 0.0,
    "train.ema_decay": 0.0, "stats.shrinkage": 0.0,
}  # fmt: skip
LONG = {
    "num_epochs": 20, "train.learning_rate": (3e-4,), "held_out": 1 / 3, "evaluate.every": 5, "grid_every": 5,
}  # fmt: skip
ABLATIONS = {  # panel -> what the default is called, and the options of each other value
    "clip_range": ("0.01", {"0.001": {"train.clip_range": 1e-3}}),
    "updates": ("4", {"1": {"train.updates_per_epoch": 1}}),
    "warmup_updates": ("0", {"16": {"train.warmup_updates": 16}}),
    "guidance": ("none", {
        "both": {"sample.guidance_scale": 3.0},
        "sampling": {"sample.guidance_scale": 3.0, "train.guidance": False},
    }),
    "advantage": ("per_prompt", {
        "per_group": {"advantage": "per_group", **GROUPS},
        "leave_one_out": {"advantage": "leave_one_out", **GROUPS},
        "whole_epoch": {"advantage": "whole_epoch"},
    }),
    "timestep_fraction": ("1", {"0.2": {"train.timestep_fraction": 0.2}}),
    "kl_weight": ("0", {"10": {"train.kl_weight": 10.0}}),
}  # fmt: skip


def fig5():
    """Alignment with a third of the animal-activity pairs held out, evaluated on both; fig6 draws it too."""
    # In 3 steps: in 5 the base model's alignment, 2.04, is near that of pictures drawn right, 2.12. Groups of a prompt,
    # small steps and a warm-up, since pictures that are right are easily spoilt; the last of 3 steps has little noise.
    options = {
        "config": "config/emoji.py:alignment,full", "evaluate.limit": 45, "sample.num_steps": 3, **GROUPS,
        "advantage": "per_group", "sample.images_per_epoch": 64, "sample.batch_size": 16, "train.batch_size": 16,
        "train.sigma_weighting": True,
    }  # fmt: skip
    return {"alignment-ddpo_is": {**SMALL, **LONG, **options, "train.learning_rate": (1e-4,)}}


def fig7():
    """Compressibility with a third of the animals held out, and no stop; fig6 draws it too."""
    options = {"config": "config/emoji.py:compressibility,full", "evaluate.rewards": "clipscore:models/emoji/clip"}
    return {"compressibility-ddpo_is": {**SMALL, **LONG, **options}}


def lora():
    """LoRA of several ranks and full finetuning, each at its best learning rate."""
    preset = {**SMALL, "config": "config/emoji.py:compressibility,lora", "train.learning_rate": (1e-3, 5e-3)}
    preset |= {"num_epochs": 6, "evaluate.every": 6}
    full = {"config": "config/emoji.py:compressibility,full", "train.learning_rate": (3e-4,)}
    curves = {f"compressibility-rank_{rank}": {**preset, "lora_rank": rank} for rank in (1, 4, 16, 64)}
    return curves | {"compressibility-full": {**SMALL, **full, "evaluate.every": 12}}


def ablations():
    """Panels of ABLATIONS, a curve per value that is not the default; 5 epochs, no warm-up."""
    common = {
        **SMALL, "config": "config/emoji.py:compressibility,full", "train.learning_rate": (3e-4,), "num_epochs": 5,
        "train.warmup_updates": 0, "evaluate.every": 5, "evaluate.rewards": "clipscore:models/emoji/clip",
    }  # fmt: skip
    curves = {"default-default": common}
    for panel, (_, values) in ABLATIONS.items():
        curves |= {f"{panel}-{value}": {**common, **options} for value, options in values.items()}
    return curves


SWEEPS = {"fig4": fig4, "fig5": fig5, "fig7": fig7, "lora": lora, "ablations": ablations}
JUDGED = ("fig4",)  # where a learning rate must keep the animals to be the best
PICTURED = ("fig4", "fig5", "fig7")  # whose figures show pictures


def job_of(curve, options, rate, seed):
    """(name, options) of a single run."""
    return f"{curve}-lr{rate:g}-seed{seed}", {**options, "train.learning_rate": rate, "seed": seed}


def tuning_jobs(curves):
    """{name: options} of all learning rates on the first seed."""
    return dict(job_of(c, o, rate, SEEDS[0]) for c, o in curves.items() for rate in o["train.learning_rate"])


def seed_jobs(curves, best):
    """{name: options} of the best learning rates on the other seeds. best: {curve: learning rate}."""
    return dict(job_of(c, curves[c], rate, seed) for seed in SEEDS[1:] for c, rate in best.items())
