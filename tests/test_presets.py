"""The presets at the paper's scale: that they load, mean what they should, and train."""

import importlib
import json

import numpy as np
import pytest

import train
from config.sweeps import SEEDS, SWEEPS, seed_jobs, tuning_jobs
from ddpo.errors import InputError
from ddpo.options import check

# images per epoch, updates per epoch, epochs, learning rate, rank, rewards kept per prompt, advantage clip
LORA, FULL, ONE_GPU = (256, 4, 100, 3e-4, 4, 16, 5), (256, 4, 200, 1e-5, 0, 32, 10), (24, 8, 200, 3e-4, 4, 32, 5)
FAST = (256, 1, 100, 3e-4, 4, 16, 5)
INTENDED = {
    "compressibility:lora": LORA, "compressibility:full": FULL, "compressibility:one_gpu": ONE_GPU,
    "incompressibility:lora": LORA, "incompressibility:full": FULL, "incompressibility:one_gpu": ONE_GPU,
    "aesthetic:lora": (256, 2, 200, 3e-4, 4, 32, 5), "aesthetic:full": FULL, "aesthetic:one_gpu": ONE_GPU,
    "alignment:lora": (288, 2, 200, 3e-4, 4, 32, 5), "alignment:full": FULL, "alignment:one_gpu": ONE_GPU,
    "compressibility:fast": FAST, "incompressibility:fast": FAST, "aesthetic:fast": FAST,
    "alignment:fast": (256, 1, 100, 3e-4, 4, 32, 5),
}  # fmt: skip


def load(preset):
    module, _, variant = preset.partition(":")
    return importlib.import_module(f"config.{module}").get_config(variant)


@pytest.mark.parametrize("preset", INTENDED)
def test_settings_are_those_of_the_sources(preset):
    config = load(preset)
    sample, opt = config.sample, config.train
    numbers = sample.images_per_epoch, opt.updates_per_epoch, config.num_epochs, opt.learning_rate
    assert (*numbers, config.lora_rank, config.stats.buffer_size, opt.advantage_clip) == INTENDED[preset]
    steps = 20 if preset.endswith("fast") else 50
    assert (sample.num_steps, sample.guidance_scale, sample.eta, opt.clip_range) == (steps, 5.0, 1.0, 1e-4)
    assert config.algorithm == ("nft" if preset.endswith("fast") else "ddpo_is")
    assert (opt.adam_weight_decay, opt.adam_beta1, opt.adam_beta2, opt.adam_epsilon) == (1e-4, 0.9, 0.999, 1e-8)
    assert opt.max_grad_norm == 1.0 and opt.inner_epochs == 1 and config.precision == "bf16"
    for processes in (1, 2, 8):
        if preset.endswith("one_gpu") and processes > 1:
            with pytest.raises(InputError, match="does not split"):
                check(config, processes)
            continue
        check(config, processes)
        share = sample.images_per_epoch // opt.updates_per_epoch // processes  # samples of an update on each
        assert share * processes * opt.updates_per_epoch == sample.images_per_epoch
        most = 16 if preset.endswith("fast") else 8  # without guidance in training twice as many fit
        assert 1 <= min(opt.batch_size, share) <= most and 1 <= sample.batch_size <= most


@pytest.mark.parametrize("variant, kl_weight", [("grpo", 0.001), ("ocr", 0.004), ("geneval", 0.004)])
def test_flow_grpos_settings(variant, kl_weight):
    """Its weights of the KL are 0.01 for PickScore and four times that for the others; a tenth of it here."""
    config = load(f"sd3:{variant}")
    for processes in (1, 2, 8, 32):
        check(config, processes)
    sample, opt = config.sample, config.train
    assert (sample.num_steps, sample.guidance_scale, sample.noise_level, sample.images_per_prompt) == (10, 4.5, 0.7, 24)
    assert (opt.learning_rate, opt.clip_range, opt.updates_per_epoch, opt.kl_weight) == (3e-4, 1e-4, 2, kl_weight)
    if variant != "grpo":
        assert config.reward == config.prompts == variant


@pytest.mark.parametrize("preset", INTENDED)
def test_an_epoch_on_a_tiny_model(tiny, tmp_path, monkeypatch, preset):
    """As the preset has it, but for the model, the judges whose weights are not here, and the number of steps."""
    config = load(preset)
    config.update_from_flattened_dict({
        "model": tiny, "run_dir": str(tmp_path), "num_epochs": 1, "grid_images": 1, "threads": 1,
        "sample.num_steps": 2, "sample.images_per_epoch": max(2, config.train.updates_per_epoch),
    })  # fmt: skip
    if not config.reward.startswith("jpeg"):
        config.reward = "jpeg_compressibility"
    monkeypatch.setattr("ddpo.interrupt.signal.signal", lambda *_: None)  # pytest keeps its Ctrl-C
    train.train(config, "preset")
    (line,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(value) for value in line.values()) and line["grad_norm"] > 0 and line["ratio_error"] == 0


@pytest.mark.parametrize("name", SWEEPS)
def test_sweeps_name_options_that_exist(name):
    curves = SWEEPS[name]()
    best = {curve: options["train.learning_rate"][-1] for curve, options in curves.items()}
    tuned, others = tuning_jobs(curves), seed_jobs(curves, best)
    assert len(others) == len(curves) * (len(SEEDS) - 1) and not others.keys() & tuned.keys()
    for job, options in (tuned | others).items():
        options = dict(options)
        module, _, variant = options.pop("config").removeprefix("config/").partition(".py:")
        config = load(f"{module}:{variant}")
        config.update_from_flattened_dict({k: float(v) if v == "inf" else v for k, v in options.items()})
        check(config)
        assert job.endswith(f"-seed{config.seed}")
