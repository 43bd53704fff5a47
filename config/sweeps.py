"""What is run for the figures: `python -m scripts.sweep NAME` runs a sweep, `python -m scripts.figures NAME` draws it.

A sweep is a function without arguments that returns {"PANEL-CURVE": options}, by their place in the figure; options are
those of train.py's command line, by dotted name, "config" being the preset. Every learning rate of a tuple is tried on
the first seed, and the best (scripts/sweep.py: best_rates) is run on the other seeds. A job is called
PANEL-CURVE-lrRATE-seedSEED.

All are on the working point of config/emoji.py. Batches are a GPU's, on which sixteen jobs ran side by side.
"""

SEEDS = (0, 1, 2)
COMMON = {
    "precision": "bf16", "grid_every": 0, "grid_images": 6, "save_every": 4, "keep_checkpoints": 1, "num_epochs": 12,
    "sample.batch_size": 128, "train.batch_size": 80,
    "evaluate.every": 4, "evaluate.limit": 45, "evaluate.clip": "",
}  # fmt: skip
TASKS = ("compressibility", "incompressibility", "aesthetic")
ONE_UPDATE = {"train.updates_per_epoch": 1, "train.warmup_updates": 2}
GROUPS = {"sample.images_per_prompt": 4}
# On the finished picture, with the settings of config/contestants.py.
FORWARD = {**ONE_UPDATE, "train.kl_weight": 0.0, "train.prompt_dropout": 0.0, "train.draws": 4}
REGRESSION = {"train.kl_weight": 0.0, "train.draws": 4}  # RWR and its kind: more updates with less of each picture
ALGORITHMS = {  # curve of fig4 -> learning rates, options
    "ddpo_is": ((1e-4, 3e-4), {}),
    "ddpo_sf": ((1e-4, 3e-4), ONE_UPDATE),
    "rwr": ((1e-5, 3e-5, 1e-4), REGRESSION),
    "rwr_sparse": (
        (1e-5, 3e-5, 1e-4),
        {**REGRESSION, "train.updates_per_epoch": 1, "train.inner_epochs": 10, "train.warmup_updates": 20},
    ),
    "best_of_n": (
        (1e-5, 3e-5, 1e-4),
        {**REGRESSION, **GROUPS, "train.updates_per_epoch": 2, "train.inner_epochs": 4},
    ),
    "nft": ((1e-4, 3e-4), FORWARD),
    "awm": ((1e-4, 3e-4), FORWARD),
    "ram": ((1e-4, 3e-4), {**FORWARD, "train.ram_scale": 4.0}),
    "dpo": ((3e-5, 1e-4), {**FORWARD, **GROUPS}),
}
ABLATIONS = {  # panel -> what the default is called, and the options of each other value
    "clip_range": ("0.002", {
        "5e-4": {"train.clip_range": 5e-4}, "none": {"train.clip_range": 1.0},
        "target_kl": {"train.clip_range": 1.0, "train.target_kl": 2e-3},
    }),
    "updates": ("8", {"1": {**ONE_UPDATE, "train.learning_rate": (3e-4,)}}),
    "warmup_updates": ("16", {"0": {"train.warmup_updates": 0}}),
    "guidance": ("both", {"none": {"sample.guidance_scale": 1.0}, "sampling": {"train.guidance": False}}),
    "advantage": ("per_prompt", {
        "per_group": {"advantage": "per_group", **GROUPS}, "leave_one_out": {"advantage": "leave_one_out", **GROUPS},
        "whole_epoch": {"advantage": "whole_epoch"},
    }),
    "shrinkage": ("3", {"0": {"stats.shrinkage": 0.0}}),
    "timesteps": ("first half", {"all": {"train.timestep_choice": "random", "train.timestep_fraction": 1.0}}),
    "kl_weight": ("0.01", {"0": {"train.kl_weight": 0.0}, "0.1": {"train.kl_weight": 0.1}}),
    "ema": ("0.9", {"0": {"train.ema_decay": 0.0}}),
}  # fmt: skip


def fig4():
    """Reward against reward queries for each algorithm, at the best of its learning rates for each reward."""
    curves = {}
    for task in TASKS:
        for name, (rates, options) in ALGORITHMS.items():
            tilt = {"train.inverse_temperature": 1.5 if task == "aesthetic" else 5.0}  # 1.5 a standard deviation
            curves[f"{task}-{name}"] = {
                **COMMON, "config": f"config/emoji.py:{task},full", "algorithm": name, "train.learning_rate": rates,
                **(tilt if name == "rwr" else {}), **options,
            }  # fmt: skip
    return curves


def fig5():
    """Alignment with a third of the animal-activity pairs held out, evaluated on both; fig6 draws it too."""
    return {"alignment-ddpo_is": {
        **COMMON, "config": "config/emoji.py:alignment", "num_epochs": 16, "held_out": 1 / 3, "grid_every": 4,
        "train.learning_rate": (1e-3,),
    }}  # fmt: skip


def fig7():
    """Compressibility with a third of the animals held out and nothing that holds the policy: no guidance, no KL
    penalty; fig6 draws it too."""
    return {"compressibility-ddpo_is": {
        **COMMON, "config": "config/emoji.py:compressibility", "num_epochs": 16, "held_out": 1 / 3, "grid_every": 4,
        "train.learning_rate": (1e-4,), "sample.guidance_scale": 1.0, "train.kl_weight": 0.0,
        "evaluate.rewards": "clipscore:models/emoji/clip", "evaluate.clip": "models/emoji/clip",
    }}  # fmt: skip


def lora():
    """LoRA of several ranks, each at its best learning rate; full finetuning beside it is fig4's ddpo_is."""
    preset = {**COMMON, "config": "config/emoji.py:compressibility,lora", "train.learning_rate": (1e-3, 3e-3)}
    return {f"compressibility-rank_{rank}": {**preset, "lora_rank": rank} for rank in (1, 4, 16, 64)}


def ablations():
    """Panels of ABLATIONS, a curve per value that is not the default's; all else as in config/emoji.py, 8 epochs."""
    common = {
        **COMMON, "config": "config/emoji.py:compressibility,full", "train.learning_rate": (1e-4,), "num_epochs": 8,
    }  # fmt: skip
    curves = {"default-default": common}
    for panel, (_, values) in ABLATIONS.items():
        curves |= {f"{panel}-{value}": {**common, **options} for value, options in values.items()}
    return curves


SWEEPS = {"fig4": fig4, "fig5": fig5, "fig7": fig7, "lora": lora, "ablations": ablations}
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
