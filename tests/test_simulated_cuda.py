"""Training, evaluation and resume on a simulated GPU, see simulated_cuda.py: nothing lies on the wrong device, no
kernel gets mixed precisions, and no step waits for the device."""

import shutil

import pytest
import simulated_cuda
from conftest import launch
from test_train import metrics

SHORT = {
    "script": "tests/simulated_cuda.py", "num_epochs": 1, "grid_images": 1, "sample__images_per_epoch": 4,
    "sample__num_steps": 2, "sample__batch_size": 2, "train__batch_size": 2, "train__updates_per_epoch": 1,
    "sample__guidance_scale": 5.0,
}  # fmt: skip
RUNS = {
    "LoRA, bf16": {"precision": "bf16", "train__kl_weight": 0.1, "train__ema_decay": 0.9},
    "LoRA, fp16, recomputing": {"precision": "fp16", "train__gradient_checkpointing": True, "algorithm": "ddpo_mask"},
    "LoRA, tf32, scoring again": {"precision": "tf32", "train__batch_size": 1, "algorithm": "ddpo_smooth"},
    "full, fp32": {"lora_rank": 0, "precision": "fp32", "train__kl_weight": 0.1, "train__ema_decay": 0.9},
    "full, bf16": {"lora_rank": 0, "precision": "bf16", "algorithm": "ddpo_sf", "train__guidance": False},
    "full, fp16": {"lora_rank": 0, "precision": "fp16", "train__kl_weight": 0.1, "train__sigma_weighting": True},
    "RWR": {"precision": "bf16", "algorithm": "rwr_sparse", "train__inner_epochs": 2, "train__kl_weight": 0.1},
    "AWM": {"precision": "bf16", "algorithm": "awm", "sample__averaged": True, "train__ema_decay": 0.9},
    "RAM": {"lora_rank": 0, "precision": "fp32", "algorithm": "ram", "sample__guidance_scale": 1.0},
    "DPO": {"precision": "fp16", "algorithm": "dpo", "sample__images_per_prompt": 2},
    "SDXL": {"precision": "bf16", "train__target_kl": 1.0, "train__timestep_fraction": 0.5},
}


@pytest.fixture(scope="session")
def gpu(tmp_path_factory):
    """The environment of a simulated GPU."""
    if shutil.which("g++") is None:
        pytest.skip("the simulated GPU needs a C++ compiler, g++")
    library = tmp_path_factory.mktemp("gpu") / "simulated_cuda.so"
    simulated_cuda.build(library)
    return {"SIMULATED_CUDA": str(library)}


@pytest.mark.parametrize("name", RUNS)
def test_it_trains(request, tmp_path, gpu, name):
    model = request.getfixturevalue("tiny_xl" if name == "SDXL" else "tiny")
    launch(model=model, run_dir=tmp_path / "run", direct=True, env=gpu, **SHORT | RUNS[name])
    assert metrics(tmp_path / "run")[0]["ratio_error"] == 0


@pytest.mark.parametrize("rank", [0, 4])
def test_it_evaluates_and_resumes(tiny, tmp_path, gpu, rank):
    options = SHORT | {"precision": "bf16", "lora_rank": rank, "train__ema_decay": 0.9, "direct": True, "env": gpu}
    launch(model=tiny, run_dir=tmp_path / "run", evaluate__every=1, evaluate__limit=1, held_out=0.5, **options)
    del options["num_epochs"]
    launch(resume=tmp_path / "run", num_epochs=2, **options)
    assert len(metrics(tmp_path / "run")) == 2


@pytest.mark.parametrize(
    "mistake, message",
    [
        ("a CPU tensor", "found at least two devices"),
        ("a wait", "error: waits within a step: reading a value"),
        ("mixed precision", "mixed dtypes"),
    ],
)
def test_it_finds_mistakes(tiny, tmp_path, gpu, mistake, message):
    env = gpu | {"SIMULATE": mistake}
    result = launch(model=tiny, run_dir=tmp_path / "run", direct=True, env=env, check=False, **SHORT)
    assert result.returncode and message in result.stderr


def test_two_processes(tiny, tmp_path, gpu):
    """With collectives that take, as NCCL, only what is on a GPU."""
    launch(model=tiny, run_dir=tmp_path / "run", processes=2, env=gpu, **SHORT)
    assert metrics(tmp_path / "run")[0]["ratio_error"] == 0


def test_more_processes_than_gpus(tiny, tmp_path, gpu):
    env = gpu | {"LOCAL_WORLD_SIZE": "2", "SIMULATED_GPUS": "1"}
    result = launch(model=tiny, run_dir=tmp_path / "run", direct=True, env=env, check=False, **SHORT)
    assert result.returncode and "error: 2 processes for 1 GPU(s)" in result.stderr
