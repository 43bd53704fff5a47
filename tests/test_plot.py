"""Reward curves of several runs."""

import json
import subprocess
import sys

from conftest import ROOT


def plot(*arguments):
    command = [sys.executable, "-m", "scripts.plot", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_run_without_the_key_is_left_out(tmp_path):
    for run, keys in {"a-seed0": ("jpeg_kb",), "b-seed0": ()}.items():
        (tmp_path / run).mkdir()
        lines = [{"reward_queries": 8 * i, "reward_mean": 1.0 * i, **dict.fromkeys(keys, 2.0)} for i in (1, 2)]
        (tmp_path / run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs, picture = (tmp_path / "a-seed0", tmp_path / "b-seed0"), tmp_path / "curve.png"
    result = plot(*runs, "--key", "jpeg_kb", "--output", picture)
    assert result.returncode == 0 and picture.exists()
    assert "left out, without jpeg_kb: " in result.stdout and "b-seed0" in result.stdout
    result = plot(*runs, "--key", "jpeg_kb", "--only", "*/a-*", "--output", picture)
    assert result.returncode == 0 and "left out" not in result.stdout
    result = plot(*runs, "--only", "c-*", "--output", picture)
    assert result.returncode == 1 and "no run is called c-*" in result.stderr
    result = plot(*runs, "--key", "nonsense", "--output", picture)
    assert result.returncode == 1 and "no run has 'nonsense'" in result.stderr.strip().splitlines()[-1]
