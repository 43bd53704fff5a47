"""What is run for the figures: `python -m scripts.sweep NAME` runs a sweep, `python -m scripts.figures NAME` draws it.

A sweep is a function without arguments that returns {job: options}; options are those of train.py's command line, by
dotted name, "config" being the preset. A job is called PANEL-CURVE-lrRATE-seedSEED, by its place in the figure.

The settings are small, for two CPU cores: 24 images of 5 steps a round instead of the preset's 128 of 10. Learning
rates are chosen on seed 0 by the mean reward of the last two rounds; the best of each curve is run on the other seeds.
"""

SMALL = {
    "stop_reward": "inf", "grid_every": 0, "grid_images": 9, "save_every": 1, "keep_checkpoints": 1, "num_epochs": 6,
    "sample.num_steps": 5, "sample.images_per_epoch": 24, "sample.batch_size": 12, "train.batch_size": 12,
    "train.updates_per_epoch": 2,
}  # fmt: skip
SEEDS = (0, 1, 2)
LEARNING_RATES = (1e-4, 3e-4)
BEST = {"fig4": {"ddpo_is": 3e-4, "ddpo_sf": 1e-4, "rwr": 1e-4, "rwr_sparse": 1e-4}}  # sweep -> curve -> learning rate


def jobs_of(panel, curve, rates, seeds, **options):
    """{job: options} of one curve in one panel."""
    return {
        f"{panel}-{curve}-lr{rate:g}-seed{seed}": {**SMALL, **options, "train.learning_rate": rate, "seed": seed}
        for rate in rates
        for seed in seeds
    }


def rates_of(sweep, curve):
    """[the best learning rate of a curve], empty as long as it has not been chosen."""
    return [BEST[sweep][curve]] if curve in BEST.get(sweep, {}) else []


def tuned(sweep, panel, curve, rates, options):
    """The jobs of a curve on the panel that its learning rate is chosen on: all rates on seed 0, the best on all."""
    return jobs_of(panel, curve, rates, SEEDS[:1], **options) | jobs_of(
        panel, curve, rates_of(sweep, curve), SEEDS, **options
    )


def fig4():
    """Reward against reward queries for each algorithm. Each gets 24 x 5 network evaluations with gradient a round. The
    learning rate is chosen on compressibility, and used for incompressibility as well. "unweighted" is RWR with all
    weights 1, to show what training on one's own samples does without any reward."""
    algorithms = {
        "ddpo_is": {},
        "ddpo_sf": {"train.updates_per_epoch": 1},
        "rwr": {"train.inner_epochs": 5},
        "rwr_sparse": {"train.updates_per_epoch": 1, "train.inner_epochs": 20, "train.keep_percentile": 75.0},
    }
    jobs, preset = (
        {},
        {task: {"config": f"config/emoji.py:{task}"} for task in ("compressibility", "incompressibility")},
    )
    for name, options in algorithms.items():
        options = {"algorithm": name, **options}
        jobs |= tuned("fig4", "compressibility", name, LEARNING_RATES, preset["compressibility"] | options)
        for rate in rates_of("fig4", name):
            jobs |= jobs_of("incompressibility", name, [rate], SEEDS, **preset["incompressibility"], **options)
    for rate in rates_of("fig4", "rwr"):
        options = {"algorithm": "rwr", **algorithms["rwr"], "train.inverse_temperature": 0.0}
        jobs |= jobs_of("compressibility", "unweighted", [rate], SEEDS[:1], **preset["compressibility"], **options)
    return dict(sorted(jobs.items(), key=lambda job: job[1]["seed"]))


def lora():
    """LoRA of several ranks against full finetuning, each at its best learning rate."""
    jobs = {}
    for rank in (1, 4, 16, 64):
        options = {"config": "config/emoji.py:compressibility,lora", "lora_rank": rank}
        jobs |= tuned("lora", "compressibility", f"rank_{rank}", (1e-3, 3e-3, 1e-2), options)
    options = {"config": "config/emoji.py:compressibility,full"}
    return jobs | tuned("lora", "compressibility", "full", (1e-4, 3e-4, 1e-3), options)


def ablations():
    """A panel per option, a curve per value; all else as for ddpo_is in fig4."""
    rate = BEST.get("fig4", {}).get("ddpo_is", LEARNING_RATES[0])
    panels = {
        "clip_range": {v: {"train.clip_range": v} for v in (1e-3, 1e-2, 1e-1)},
        "updates": {v: {"train.updates_per_epoch": v} for v in (1, 2, 4)},
        "guidance": {
            "none": {},
            "both": {"sample.guidance_scale": 3.0},
            "sampling": {"sample.guidance_scale": 3.0, "train.guidance": False},
        },
        "advantage": {
            v: {"advantage": v, "sample.images_per_prompt": 4}
            for v in ("per_prompt", "per_group", "leave_one_out", "whole_round")
        },
        "timesteps": {v: {"train.timestep_fraction": v} for v in (0.2, 0.6, 1.0)},
        "kl_weight": {v: {"train.kl_weight": v} for v in (0.0, 0.1, 1.0)},
    }
    jobs = {}
    for panel, curves in panels.items():
        for curve, options in curves.items():
            jobs |= jobs_of(panel, curve, [rate], SEEDS, config="config/emoji.py:compressibility", **options)
    return jobs


SWEEPS = {"fig4": fig4, "lora": lora, "ablations": ablations}
