"""What trl 0.23.1's DDPOTrainer makes of its importance ratio before any update, and of a reward that is NaN.

    python -m scripts.dev.bench --against trl --model tiny --repetitions 1      (makes the environment that trl runs in)
    runs/bench/trl/bin/python -m scripts.dev.peer_ratio bf16                    (no, bf16 or fp16: its mixed_precision)

Two epochs of 4 images of 10 steps, guidance 5 and LoRA, one update each; the embedded model, on a CPU. In the second
epoch one of the rewards is NaN. Ours for the ratio is `ratio_error` in metrics.jsonl.
"""

import argparse
import tempfile

import torch
from accelerate import PartialState

from ddpo.errors import InputError, run_script


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("precision", choices=("no", "bf16", "fp16"))
    precision = parser.parse_args().precision
    PartialState(cpu=True)  # its pipeline logs before its trainer has made one
    torch.set_num_threads(1)
    try:
        from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
    except ImportError as error:
        raise InputError(f"trl 0.23.1 is not installed here, see --help ({error})") from error

    config = DDPOConfig(
        mixed_precision=precision, sample_num_steps=10, sample_guidance_scale=5.0, sample_batch_size=4,
        sample_num_batches_per_epoch=1, train_batch_size=4, per_prompt_stat_tracking=False, allow_tf32=False,
        save_freq=10**9, project_kwargs={"project_dir": tempfile.mkdtemp()},
    )  # fmt: skip
    rewards = torch.arange(4.0)
    pipeline = DefaultDDPOStableDiffusionPipeline("models/emoji", use_lora=True)
    trainer = DDPOTrainer(config, lambda *_: (rewards.clone(), {}), lambda: ("a cat", {}), pipeline)
    calculate_loss, seen = trainer.calculate_loss, []

    def recorded(*args):
        loss, approx_kl, clip_fraction = calculate_loss(*args)
        seen.append((float(approx_kl.detach()), float(clip_fraction.detach())))
        return loss, approx_kl, clip_fraction

    trainer.calculate_loss = recorded
    step = trainer.step(0, 0)
    approx_kl, clip_fraction = torch.tensor(seen).mean(0).tolist()  # approx_kl is half the squared log-ratio
    print(f"{precision}: before any update {clip_fraction:.1%} of the terms are clipped; log-ratio "
          f"{(2 * approx_kl) ** 0.5:.2g} (root mean square), clip range {config.train_clip_range:g}")  # fmt: skip
    rewards[0] = torch.nan
    trainer.step(1, step)
    trained = [p for p in pipeline.unet.parameters() if p.requires_grad]
    finite = sum(bool(p.isfinite().all()) for p in trained)
    print(f"one reward of 4 is NaN: after the update {finite} of {len(trained)} trained tensors are finite")


if __name__ == "__main__":
    run_script(main)
