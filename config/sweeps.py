"""What is run for the figures: `python -m scripts.sweep NAME` runs a sweep, `python -m scripts.figures NAME` draws it.

A sweep is a function without arguments that returns {"PANEL-CURVE": options}, by their place in the figure; options are
those of train.py's command line, by dotted name, "config" being the preset. Every learning rate of a tuple is tried on
the first seed, and the best (JUDGED says by what) is run on the other seeds. A job is called
PANEL-CURVE-lrRATE-seedSEED.

All start from the working point of config/emoji.py: guided in sampling and training, on the noisier half of the steps.
"""

SEEDS = (0, 1, 2)
RUN = {
    "precision": "bf16", "grid_every": 0, "grid_images": 6, "save_every": 4, "keep_checkpoints": 1, "num_epochs": 12,
    "sample.batch_size": 128, "train.batch_size": 80,
    "evaluate.every": 4, "evaluate.limit": 45, "evaluate.clip": "",
}  # fmt: skip
EIGHT_UPDATES = {"train.updates_per_epoch": 8, "train.warmup_updates": 16, "train.kl_weight": 0.01}
ONE_UPDATE = {"train.updates_per_epoch": 1, "train.warmup_updates": 2}
TASKS = ("compressibility", "incompressibility", "aesthetic")
GROUPS = {"sample.images_per_prompt": 4}
# On the finished image.
FORWARD = {**ONE_UPDATE, "train.kl_weight": 0.0, "train.prompt_dropout": 0.0, "train.draws": 4}
# RWR and its kind: more updates, with as many passes with gradient in an epoch as DDPO makes.
REGRESSION = {"train.kl_weight": 0.0, "train.draws": 10}
PAPER = {  # curve of fig4 -> learning rates, options
    "ddpo_is": ((1e-4, 3e-4), {}),
    "ddpo_sf": ((1e-4, 3e-4), ONE_UPDATE),
    "rwr": ((1e-5, 3e-5), REGRESSION),
    "rwr_sparse": (
        (1e-5, 3e-5),
        {**REGRESSION, "train.updates_per_epoch": 1, "train.inner_epochs": 10, "train.warmup_updates": 20},
    ),
}
NEWER = {  # curve of newer -> learning rates, options; the rates are those of results/working_point
    "nft": ((3e-4,), FORWARD),
    "awm": ((3e-4,), FORWARD),
    "ram": ((3e-4,), {**FORWARD, "train.ram_scale": 4.0}),
    "dpo": ((1e-4,), {**FORWARD, **GROUPS}),
}
ABLATIONS = {  # panel -> what the default is called, and the options of each other value
    "clip_range": ("0.002", {"0.01": {"train.clip_range": 1e-2}}),
    "updates": ("8", {"1": ONE_UPDATE}),
    "warmup_updates": ("16", {"0": {"train.warmup_updates": 0}}),
    "guidance": ("both", {
        "none": {"sample.guidance_scale": 1.0},
        "sampling": {"train.guidance": False},
    }),
    "advantage": ("per_prompt", {
        "per_group": {"advantage": "per_group", **GROUPS},
        "leave_one_out": {"advantage": "leave_one_out", **GROUPS},
        "whole_epoch": {"advantage": "whole_epoch"},
    }),
    "timestep_fraction": ("0.5", {"1": {"train.timestep_fraction": 1.0}}),
    "kl_weight": ("0.01", {"0": {"train.kl_weight": 0.0}}),
    "shrinkage": ("3", {"0": {"stats.shrinkage": 0.0}}),
}  # fmt: skip


def by_task(algorithms):
    """{"TASK-ALGORITHM": options} of full finetuning on each reward."""
    curves = {}
    for task in TASKS:
        for name, (rates, options) in algorithms.items():
            # 1.9 per standard deviation of the first epoch's rewards: 0.58, or 0.38 kB.
            tilt = {"train.inverse_temperature": 3.3 if task == "aesthetic" else 5.0}
            curves[f"{task}-{name}"] = {
                **RUN, **EIGHT_UPDATES, "config": f"config/emoji.py:{task},full", "algorithm": name,
                "train.learning_rate": rates, **(tilt if name == "rwr" else {}), **options,
            }  # fmt: skip
    return curves


def fig4():
    """Reward against reward queries for the paper's algorithms, at the best learning rate for each reward."""
    return by_task(PAPER)


def newer():
    """The same for the newer algorithms."""
    return by_task(NEWER)


def flow():
    """Compressibility on the flow model: Flow-GRPO's step, CPS's, and two losses on the finished image."""
    preset = {**RUN, "config": "config/emoji_flow.py:compressibility,full", "sample.step_kind": "sde"}
    return {
        "flow-ddpo_is": {**preset, "train.learning_rate": (5e-5, 1e-4)},
        "flow-cps": {**preset, "sample.step_kind": "cps", "train.learning_rate": (5e-5, 1e-4)},
        "flow-nft": {**preset, **FORWARD, "algorithm": "nft", "train.learning_rate": (1e-4, 3e-4)},
        "flow-awm": {**preset, **FORWARD, "algorithm": "awm", "train.learning_rate": (1e-4, 3e-4)},
    }


def fig5():
    """Alignment with a third of the animal-activity pairs held out, evaluated on both; fig6 draws it too."""
    options = {"num_epochs": 16, "held_out": 1 / 3, "grid_every": 4, "train.learning_rate": (1e-3,)}
    return {"alignment-ddpo_is": {**RUN, "config": "config/emoji.py:alignment", **options}}


def fig7():
    """Compressibility with a third of the animals held out: the preset, which fig6 draws too, and what it prevents."""
    clip = "models/emoji/clip"
    options = {"held_out": 1 / 3, "grid_every": 4, "evaluate.clip": clip, "evaluate.rewards": f"clipscore:{clip}"}
    preset = {**RUN, "config": "config/emoji.py:compressibility,full", **options, "train.learning_rate": (1e-4,)}
    careless = {**preset, "train.learning_rate": (3e-4,), "train.kl_weight": 0.0}
    return {"compressibility-preset": preset, "compressibility-careless": careless}


def lora():
    """LoRA of several ranks and full finetuning."""
    common = {**RUN, "num_epochs": 8}
    preset = {**common, "config": "config/emoji.py:compressibility,lora", "train.learning_rate": (2e-3, 4e-3)}
    full = {**common, "config": "config/emoji.py:compressibility,full", "train.learning_rate": (1e-4,)}
    return {f"compressibility-rank_{rank}": {**preset, "lora_rank": rank} for rank in (1, 4, 16, 64)} | {
        "compressibility-full": full
    }


def ablations():
    """Panels of ABLATIONS, a curve per value that is not the default, which makes eight updates an epoch, so that there
    is something to clip."""
    common = {
        **RUN, **EIGHT_UPDATES, "config": "config/emoji.py:compressibility,full", "train.learning_rate": (1e-4,),
        "num_epochs": 6, "evaluate.every": 6,
    }  # fmt: skip
    curves = {"default-default": common}
    for panel, (_, values) in ABLATIONS.items():
        curves |= {f"{panel}-{value}": {**common, **options} for value, options in values.items()}
    return curves


SWEEPS = {
    "fig4": fig4, "newer": newer, "flow": flow, "fig5": fig5, "fig7": fig7, "lora": lora, "ablations": ablations,
}  # fmt: skip
JUDGED = ("fig4", "newer", "flow", "lora")  # where a learning rate must keep the animals to be the best
PICTURED = ("fig4", "newer", "flow", "fig5", "fig7")  # whose figures show images


def job_of(curve, options, rate, seed):
    """(name, options) of a single run."""
    return f"{curve}-lr{rate:g}-seed{seed}", {**options, "train.learning_rate": rate, "seed": seed}


def tuning_jobs(curves):
    """{name: options} of all learning rates on the first seed."""
    return dict(job_of(c, o, rate, SEEDS[0]) for c, o in curves.items() for rate in o["train.learning_rate"])


def seed_jobs(curves, best):
    """{name: options} of the best learning rates on the other seeds. best: {curve: learning rate}."""
    return dict(job_of(c, curves[c], rate, seed) for seed in SEEDS[1:] for c, rate in best.items())
