"""Batch sizes found by the run, and what happens where memory does not suffice."""

import json

import pytest
from conftest import launch
from test_train import metrics

ZERO = {"sample__batch_size": 0, "train__batch_size": 0, "direct": True}


def sizes(run):
    config = json.loads((run / "config.json").read_text())
    return config["sample"]["batch_size"], config["train"]["batch_size"]


def test_batch_sizes_are_found(tiny, tmp_path):
    """All four samples of an update at once; what is computed is what those sizes, given, compute."""
    launch(model=tiny, run_dir=tmp_path / "found", **ZERO)
    launch(model=tiny, run_dir=tmp_path / "given", direct=True)
    assert sizes(tmp_path / "found") == sizes(tmp_path / "given") == (4, 4)
    assert metrics(tmp_path / "found") == metrics(tmp_path / "given")


FOUR = {"sample__batch_size": 4, "train__batch_size": 0, "direct": True}


@pytest.mark.parametrize("given, library", [(ZERO, ""), (FOUR, " in cuBLAS")])
def test_out_of_memory_lowers_them(tiny, tmp_path, given, library):
    """Memory for two rows (no guidance here), in torch's words or in a library's."""
    options = {"script": "tests/saboteur.py", "env": {"SABOTAGE": f"memory for 2{library}"}, "grid_images": 1}
    result = launch(model=tiny, run_dir=tmp_path / "run", **options, **given)
    assert "out of memory with sample.batch_size = 4 and train.batch_size = 4" in result.stdout
    assert "batch sizes: 2 images when sampling, 2 transitions when training" in result.stdout
    assert sizes(tmp_path / "run") == (2, 2) and metrics(tmp_path / "run")[0]["ratio_error"] == 0


def test_out_of_memory_with_one_image_or_later(tiny, tmp_path):
    options = {"model": tiny, "script": "tests/saboteur.py", "check": False, "grid_images": 1, **ZERO}
    for limit, message in (("0", "error: out of memory with one image"), ("4 then less", "error: out of memory: CUDA")):
        result = launch(run_dir=tmp_path / limit, env={"SABOTAGE": f"memory for {limit}"}, **options)
        assert result.returncode == 1 and result.stderr.count("error: ") == 1 and message in result.stderr
