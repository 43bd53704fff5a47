"""The bench's command lines; what they measure is not asserted."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from peft import LoraConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from scripts.dev.bench_memory import Peak, step_memory
from scripts.dev.roofline import Simulated
from scripts.make_random_model import make_unet
from scripts.time_to_reward import cost_to, measure


def test_bench(tiny, tmp_path):
    """One epoch with a profile of another, and what is written of it."""
    sizes = ("sample.images_per_epoch=4", "sample.num_steps=2", "train.updates_per_epoch=1", "train.batch_size=4")
    command = [sys.executable, "-m", "scripts.dev.bench", "--model", tiny, "--repetitions", "1", "--threads", "1"]
    command += ["--profile", "--set", *sizes, "sample.batch_size=4", "--json", str(tmp_path / "bench.json")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    (row,) = found["rows"]
    assert "aten::" in found["profiles"]["ours"] and "| ours |" in result.stdout
    assert row["sampled_rows"] == row["trained_rows"] == 4  # of an image: two steps, each with and without its prompt
    assert row["images_per_second_training"][0] > row["images_per_second"][0] > 0


def test_gpu_check(tmp_path):
    """It runs to its end without a GPU, and says of what a CPU's attention cannot do that it is not available."""
    command = [sys.executable, "-m", "scripts.gpu_check", "--size", "tiny", "--batch_sizes", "1", "2"]
    command += ["--precisions", "bf16", "fp32"]
    result = subprocess.run([*command, "--output", tmp_path / "found.json"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert not [name for name, value in found.items() if str(value).startswith("failed")]
    for precision in ("bf16", "fp32"):
        backends = found[f"ratio_error, {precision}"]
        assert not any(backends["default"]["ratio_errors"] + backends["default, again"]["ratio_errors"])
    assert found["ratio_error, fp32"]["cudnn"].startswith("not available") or torch.cuda.is_available()
    small = next(value for name, value in found.items() if name.startswith("LoRA 4") and name.endswith("batch 1"))
    large = found["LoRA 4, bf16, channels_last, batch 2"]
    assert small["images_per_second"] > 0 and large["ratio_error"] == 0
    lora, full = found["LoRA 4, bf16, channels_last, batch 2, details"], found["full, bf16, batch 2"]
    assert lora["train_kernels"] > lora["sample_kernels"] > 0 < lora["train_tflop"] and lora["train_longest_ms"]
    assert full["images_per_second"] > 0 == full["ratio_error"]
    assert found["gradient in fp32, again"]["step 0"]["cosine"] == pytest.approx(1)
    assert 0.9 < found["gradient in bf16"]["step 0"]["cosine"] < 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_check_without_a_gpu():
    result = subprocess.run([sys.executable, "-m", "scripts.gpu_check"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "--size tiny" in result.stderr.strip().splitlines()[-1]


def test_peak_memory_is_counted():
    """Three tensors, of which two live at a time; a view holds no memory of its own."""
    with Peak() as peak:
        a = torch.ones(1000)
        b = a.view(10, 100) * 2
        del a
        b = b + 1
        assert (peak.now, peak.most) == (4000, 8000)
    del b


@pytest.mark.parametrize("rank, precision", [(4, "bf16"), (0, "fp32")])
def test_step_memory(rank, precision):
    """Twice the batch is twice the activations, so memory is a line in it; checkpointing lowers it."""
    one, two, three = (step_memory("tiny", rank, precision, b, False) for b in (8, 16, 24))
    assert three - two == pytest.approx(two - one, rel=0.05)
    assert step_memory("tiny", rank, precision, 16, True) < two


def test_roofline():
    """A denoising step's FLOPs are those that torch counts of diffusers' own network; twice the batch is twice the
    FLOPs in as many kernels; a training pass is the same forward pass, and more than as much to go back."""
    unet = make_unet("tiny").requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        unet(torch.zeros(4, 4, 8, 8), torch.zeros(4), torch.zeros(4, 77, 16))
    two, four = (Simulated("tiny", 4, "bf16", batch_size) for batch_size in (2, 4))
    sampling, training, twice = two.sampling_step(), two.training_pass(), four.sampling_step()
    assert sampling.flops.total() == counter.get_total_flops()
    assert twice.flops.total() == 2 * sampling.flops.total() and twice.kernels == sampling.kernels
    assert sampling.kernels["group norm"] == 3 * sum(isinstance(m, torch.nn.GroupNorm) for m in unet.modules())
    assert all(training.kernels[kind] >= number for kind, number in sampling.kernels.items() if kind != "copy_")
    assert training.kernels.total() > 2 * sampling.kernels.total()
    assert sampling.kernels["copy for a convolution"] == 1  # of the latents: from there on channels are last


def write_run(folder, sizes, named):
    """A run's files: an evaluation before each of its epochs of 10 s, 8 s of CPU, 4 queries and 100 passes, and one
    at the end."""
    folder.mkdir()
    costs = {"seconds": 10.0, "cpu_seconds": 8.0, "network_passes": 100}
    lines = [{"epoch": i, "reward_queries": 4 * (i + 1), **costs} for i in range(len(sizes) - 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    judged = [{"reward_mean": -size, "classifier_accuracy": share} for size, share in zip(sizes, named)]
    lines = [{"epoch": i, "seen, stochastic": line} for i, line in enumerate(judged)]
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_cost_of_a_reward(tmp_path):
    """-15% of 2 kB is 1.7, three quarters of the way from 2.0 to 1.6 in the second epoch; not if the animals are gone
    by then, nor if it never comes."""
    reached = cost_to(0.15, measure(write_run(tmp_path / "a", [2.0, 2.0, 1.6], [1.0, 1.0, 0.96])))
    expected = {"seconds": 17.5, "cpu_seconds": 14.0, "reward_queries": 7.0, "network_passes": 175.0}
    assert reached == pytest.approx(expected)
    assert cost_to(0.15, measure(write_run(tmp_path / "b", [2.0, 2.0, 1.6], [1.0, 1.0, 0.9]))) is None
    assert cost_to(0.15, measure(write_run(tmp_path / "c", [2.0, 1.9, 1.8], [1.0, 1.0, 1.0]))) is None
