"""Any options of config/base.py: a run of one tiny epoch ends with finite metrics, or with one line that says what is
wrong, and writes nothing but its folder. Hypothesis draws the options."""

import json
import math
import os
import shutil
from collections import Counter

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import ROOT, SMALL
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import train
from config.base import get_config
from ddpo.batches import TIMESTEPS
from ddpo.errors import InputError
from ddpo.losses import ALGORITHMS
from ddpo.options import expand_home, flatten
from ddpo.policy import PRECISIONS
from ddpo.stat_tracking import ADVANTAGES

# Examples drawn, and their seed: none draws the same ones in each run. `HYPOTHESIS_EXAMPLES=1000 HYPOTHESIS_SEED=1
# pytest -n 0 tests/test_properties.py` looks for more.
EXAMPLES, SEED = int(os.environ.get("HYPOTHESIS_EXAMPLES", 25)), os.environ.get("HYPOTHESIS_SEED")
# What a run of a second cannot have: programs compiled, processes of a tracker, sizes that take hours.
LEFT_OUT = ("run_dir", "resume", "tracker", "compile", "threads", "num_epochs", "model")
TEXTS = {
    "precision": sorted(PRECISIONS), "prompts": ["counting", "animal_activities", "common_animals"],
    "algorithm": sorted(ALGORITHMS), "advantage": sorted(ADVANTAGES),
    "reward": ["jpeg_incompressibility", "2*jpeg_compressibility - 0.5*jpeg_incompressibility", "counting:http://",
               "nan*jpeg_compressibility", "clipscore:models/emoji/clip", "learned:models/emoji"],
    "lora_targets": ["to_q", "to_q, to_v", "conv1", "attn1", "proj_in,to_k"],
    "train.timestep_choice": sorted(TIMESTEPS), "evaluate.rewards": ["jpeg_incompressibility", ","],
    "evaluate.prompts": ["animal_activities", "common_animals"], "evaluate.clip": ["models/emoji/clip", "ddpo"],
    "evaluate.classifier": ["models/emoji/classifier"], "reward_options.precision": ["bf16", "fp16"],
}  # fmt: skip
NOTHING = st.sampled_from(["", " ", "x", "../x", "a/b/c", "~", "\n", "é" * 200, "%s{}"])
INTEGERS = st.sampled_from([-(2**70), -3, -1, 0, 1, 2, 3, 4, 6, 8, 10, 16, 32]) | st.integers(-1, 12)
SPECIAL = [math.nan, math.inf, -math.inf, -1.0, -0.0, 0.0, 1e-300, 1e-12, 1e-6, 1e-3, 1.5, 1e9, 1e300]
FLOATS = st.sampled_from(SPECIAL) | st.integers(0, 100).map(lambda percent: percent / 100)
LARGE = {"seed": [2**32, 2**63, 2**64 - 1, 2**64, 2**70]}  # elsewhere, a large number is a request for a large run


def values(key, default):
    """Some values of an option's type, by its default."""
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, int):
        return INTEGERS | st.sampled_from(LARGE[key]) if key in LARGE else INTEGERS
    if isinstance(default, float):
        return FLOATS | st.just(default)
    return st.sampled_from(TEXTS.get(key, ["x"])) | NOTHING


DEFAULTS = {key: value for key, value in flatten(get_config()).items() if key not in LEFT_OUT}
OPTIONS = st.lists(
    st.sampled_from(sorted(DEFAULTS)).flatmap(lambda key: st.tuples(st.just(key), values(key, DEFAULTS[key]))),
    min_size=1, max_size=4, unique_by=lambda pair: pair[0],
).map(dict)  # fmt: skip


def files():
    """All files of the repo, but those that git and Python keep for themselves."""
    skipped = {".git", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis", "runs"}
    return {path for top in ROOT.iterdir() if top.name not in skipped for path in (top, *top.rglob("*"))
            if not skipped & set(path.parts)}  # fmt: skip


@pytest.fixture(scope="module")
def alone():
    """train.py's own process sets these for good; here others come after."""
    threads, flash = torch.get_num_threads(), torch.backends.cuda.flash_sdp_enabled()
    yield
    torch.set_num_threads(threads)
    torch.backends.cuda.enable_flash_sdp(flash)
    torch.set_flush_denormal(False)


def run(options):
    """What one run comes to: None, or the message of its InputError. Any other exception is a traceback's."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    config = get_config()
    config.update_from_flattened_dict(SMALL | {"num_epochs": 1, "grid_images": 1, "evaluate.limit": 1} | options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddpo.interrupt.signal.signal", lambda *_: None)  # pytest keeps its Ctrl-C
        try:
            expand_home(config)
            train.train(config, "test")
        except InputError as error:
            return str(error)


def test_a_run_ends_with_finite_metrics_or_one_line(tiny, alone, tmp_path_factory):
    before, ends = files(), Counter()

    @settings(max_examples=EXAMPLES, derandomize=SEED is None, deadline=None, database=None, print_blob=False,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(OPTIONS)
    def check(options):
        parent = tmp_path_factory.mktemp("drawn")
        message = run({"model": tiny, "run_dir": str(parent / "run")} | options)
        ends["error" if message else "run"] += 1
        if message is None:
            (line,) = (parent / "run/metrics.jsonl").read_text().splitlines()
            assert all(math.isfinite(value) for value in json.loads(line).values())
        else:
            assert message and "\n" not in message and len(message) < 600
        assert {path.name for path in parent.iterdir()} <= {"run"}
        shutil.rmtree(parent)

    (seed(int(SEED))(check) if SEED else check)()
    assert files() == before
    assert min(ends["run"], ends["error"]) >= EXAMPLES // 10  # else it proves little
