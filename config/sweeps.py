"""What was run for the figures: `python -m scripts.sweep NAME` runs a sweep, `python -m scripts.figures NAME` draws it.

A sweep is a function without arguments that returns {job: options}; options are those of train.py's command line, by
dotted name, "config" being the preset. A job's name ends in -seedN.

The settings are small, for two CPU cores: 24 images of 5 steps a round instead of the presets' 128 of 10.
"""

SMALL = {
    "stop_reward": "inf", "grid_every": 0, "grid_images": 9, "save_every": 1, "keep_checkpoints": 1, "num_epochs": 6,
    "sample.num_steps": 5, "sample.images_per_epoch": 24, "sample.batch_size": 12, "train.batch_size": 12,
}  # fmt: skip

# Every algorithm gets 24 x 5 network evaluations with gradient a round, and the same learning rates to choose from.
ALGORITHMS = {
    "ddpo_is": {"train.updates_per_epoch": 2},
    "ddpo_sf": {"train.updates_per_epoch": 1},
    "rwr": {"train.updates_per_epoch": 2, "train.inner_epochs": 5},
    "rwr_sparse": {"train.updates_per_epoch": 1, "train.inner_epochs": 20, "train.keep_percentile": 75.0},
}
LEARNING_RATES = (1e-4, 3e-4)
BEST = {}  # algorithm -> the learning rate with the highest mean reward over the last two rounds, seed 0


def fig4():
    """Reward against reward queries for each algorithm. The learning rate is chosen on compressibility, seed 0; the
    best is run on the other seeds, and on incompressibility."""
    jobs = {}

    def add(task, algorithm, rate, seed):
        jobs[f"{task}-{algorithm}-lr{rate:g}-seed{seed}"] = {
            "config": f"config/emoji.py:{task}", "algorithm": algorithm, "train.learning_rate": rate, "seed": seed,
            **SMALL, **ALGORITHMS[algorithm],
        }  # fmt: skip

    for rate in LEARNING_RATES:
        for algorithm in ALGORITHMS:
            add("compressibility", algorithm, rate, 0)
    for task, seeds in (("compressibility", (1, 2)), ("incompressibility", (0, 1, 2))):
        for seed in seeds:
            for algorithm, rate in BEST.items():
                add(task, algorithm, rate, seed)
    return jobs


SWEEPS = {"fig4": fig4}
