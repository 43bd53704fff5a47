"""Mistakes users make: each ends, before any long work, with one line that says what is wrong and what to do."""

import functools
import importlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, launch, run
from safetensors.torch import load_file, save_file

OVERLONG = "a very " + "long " * 40 + "prompt"
MISTAKES = {
    "unknown reward": ({"reward": "jpeg_compresibility"}, ["unknown reward", "Did you mean jpeg_compressibility?"]),
    "unknown prompts": ({"prompts": "animals"}, ["unknown prompt set 'animals'", "imagenet_animals"]),
    "unknown algorithm": ({"algorithm": "ppo"}, ["unknown algorithm 'ppo'", "ddpo_is"]),
    "unknown precision": ({"precision": "fp8"}, ["unknown precision 'fp8'", "fp32, tf32, bf16, fp16"]),
    "misspelled key": ({"train__lerning_rate": 1}, ["train.lerning_rate", "Did you mean train.learning_rate?"]),
    "wrong type": ({"train__learning_rate": "fast"}, ["train.learning_rate=fast", "could not convert"]),
    "does not divide": ({"sample__images_per_epoch": 9}, ["= 9", "train.updates_per_epoch = 2", "use 8 or 10"]),
    "groups do not divide": ({"sample__images_per_prompt": 3}, ["sample.images_per_prompt = 3", "use 6 or 12"]),
    "updates for ddpo_sf": ({"algorithm": "ddpo_sf"}, ["ddpo_sf makes one update an epoch, not 2", "=1"]),
    "a group of one": ({"advantage": "per_group"}, ["advantage per_group", "sample.images_per_prompt to 2"]),
    "unknown advantage": ({"advantage": "per_grup"}, ["unknown advantage 'per_grup'", "Did you mean per_group?"]),
    "unknown timesteps": ({"train__timestep_choice": "last"}, ["unknown timestep choice 'last'", "window"]),
    "a limit that nothing is compared with": (
        {"algorithm": "rwr", "train__target_kl": 0.1},
        ["train.target_kl = 0.1", "rwr does not know the policy that sampled: use 0"],
    ),
    "pairs in groups of one": ({"algorithm": "dpo"}, ["algorithm dpo compares", "sample.images_per_prompt to 2"]),
    "pairs over two updates": (
        {"algorithm": "dpo", "sample__images_per_prompt": 4, "sample__images_per_epoch": 12},
        ["= 12", "sample.images_per_prompt = 4", "use 8 or 16"],
    ),
    "no draws": ({"algorithm": "awm", "train__draws": 0}, ["train.draws = 0", "at least 1"]),
    "an average that is not kept": (
        {"algorithm": "nft", "sample__averaged": True},
        ["sample.averaged = True", "set train.ema_decay"],
    ),
    "an average that took no steps": (
        {"sample__averaged": True, "train__ema_decay": 0.9},
        ["sample.averaged = True", "ddpo_is compares what was sampled"],
    ),
    "an average of nothing": ({"train__ema_decay": 1.5}, ["train.ema_decay = 1.5", "at most 1"]),
    "no such model folder": ({"model": "./models/emojy"}, ["'./models/emojy'", "no such folder"]),
    "no such model": ({"model": "models/emojy"}, ["'models/emojy'", "could not be loaded from the hub"]),
    "not a model folder": ({"model": "ddpo"}, ["'ddpo'", "not a StableDiffusionPipeline folder"]),
    "deterministic": ({"sample__eta": 0.0}, ["sample.eta = 0.0: ddpo_is needs 0 < eta <= 1"]),
    "more noise than there is": ({"algorithm": "awm", "sample__eta": 1.5}, ["sample.eta = 1.5", "0 to 1"]),
    "two guidances": ({"train__guidance_scale": 1.0}, ["train.guidance_scale", "sample.guidance_scale"]),
    "the peers' switch": ({"train__cfg": False}, ["train.cfg", "sample.guidance_scale"]),
    "no timestep left": ({"train__timestep_fraction": 0.1}, ["train.timestep_fraction = 0.1", "use 0.333 to 1"]),
    "no prompt file": ({"prompts": "nowhere/prompts.txt"}, ["nowhere/prompts.txt"]),
    "nothing to resume": ({"resume": "runs/nowhere"}, ["nothing to resume", "runs/nowhere/config.json"]),
    "unknown LoRA target": ({"lora_targets": "to_z"}, ["no module 'to_z'"]),
    "a LoRA target that holds others": ({"lora_targets": "attn1"}, ["lora_targets attn1: ", "only holds other"]),
    "no LoRA target": ({"lora_targets": ""}, ["no module ''", "Common: to_q"]),
    "more steps than the model has": (
        {"sample__num_steps": 1000},
        ["num_steps = 1000", "model has 1000"],
    ),
    "a run folder in a file": ({"run_dir": "README.md/run"}, ["run_dir 'README.md/run' cannot be made"]),
    "momentum above 1": ({"train__adam_beta1": 1.5}, ["train.adam_beta1 = 1.5", "less than 1"]),
    "negative weight decay": ({"train__adam_weight_decay": -1.0}, ["train.adam_weight_decay = -1.0", "at least 0"]),
    "unknown tracker": ({"tracker": "mlflow"}, ["unknown tracker 'mlflow'", "wandb or tensorboard"]),
    "statistics never used": ({"stats__min_count": 50}, ["stats.min_count = 50", "stats.buffer_size = 32"]),
    "negative rank": ({"lora_rank": -1}, ["lora_rank = -1", "at least 0"]),
    "no precision": ({"precision": ""}, ["unknown precision ''", "fp32, tf32, bf16, fp16"]),
    "no update": ({"train__updates_per_epoch": 0}, ["train.updates_per_epoch = 0", "at least 1"]),
    "no batch": ({"train__batch_size": -1}, ["train.batch_size = -1", "at least 0"]),
    "clip range 0": ({"train__clip_range": 0.0}, ["train.clip_range = 0.0", "greater than 0"]),
    "guidance below 1": ({"sample__guidance_scale": 0.5}, ["sample.guidance_scale = 0.5", "at least 1"]),
    "guidance that is no number": ({"sample__guidance_scale": float("nan")}, ["guidance_scale = nan", "at least 1"]),
    "an infinite rate": ({"train__learning_rate": float("inf")}, ["train.learning_rate = inf", "finite"]),
    "a rate that is no number": ({"train__learning_rate": float("nan")}, ["train.learning_rate = nan"]),
    "an infinite penalty": ({"train__kl_weight": float("inf")}, ["train.kl_weight = inf"]),
    "a timeout that is no number": ({"reward_timeout": float("nan")}, ["reward_timeout = nan", "at least 0"]),
    "a timeout beyond all clocks": ({"reward_timeout": float("inf")}, ["reward_timeout = inf", "at most 1e+06"]),
    "no time for a request": ({"reward_options__timeout": 0.0}, ["reward_options.timeout = 0.0", "greater than 0"]),
    "no requests at a time": ({"reward_options__concurrency": 0}, ["reward_options.concurrency = 0", "at least 1"]),
    "a reward's empty batch": ({"reward_options__batch_size": 0}, ["reward_options.batch_size = 0", "at least 1"]),
    "a negative seed": ({"seed": -1}, ["seed = -1", "at least 0"]),
    "a seed too large": ({"seed": 2**64}, ["seed = 18446744073709551616", "below 2^64"]),
    "more than all timesteps": ({"train__timestep_fraction": 1.5}, ["train.timestep_fraction = 1.5", "0.333 to 1"]),
    "a size that cannot be drawn": ({"sample__width": 30}, ["sample.width = 30", "use 28 or 32"]),
    "a file for a model": ({"model": "./README.md"}, ["'./README.md'", "no such folder"]),
    "an empty prompt file": ({"prompts": "FOLDER/empty.txt"}, ["empty.txt", "no prompt"]),
    "an overlong prompt": (
        {"prompts": "FOLDER/long.txt"},
        ["'a very long", "...' has", "the text encoder takes 24"],
    ),
    "a weight that is no number": ({"reward": "nan*jpeg_compressibility"}, ["the weight 'nan' is not a number"]),
    "a broken address": (
        {"prompts": "counting", "reward": "counting:http://[::1"},
        ["'http://[::1' is not an"],
    ),
    "an address without a port": ({"prompts": "counting", "reward": "counting:http://a:b"}, ["http://a:b' is not an"]),
    "a UNet without all weights": ({"model": "FOLDER/half"}, ["unet lacks 1 weights, conv_norm_out.weight the first"]),
    "a CLIP without all weights": (
        {"reward": "clipscore:FOLDER/clip"},
        ["lack 1 weights, visual_projection"],
    ),
    "an empty folder to resume": ({"resume": "FOLDER/empty"}, ["nothing to resume", "empty/config.json"]),
    "a damaged config to resume": ({"resume": "FOLDER/damaged"}, ["damaged/config.json does not fit"]),
    "misspelled in a preset": ({"preset": "train.lerning_rate = 1.0"}, ["lerning_rate", "Did you mean learning_rate?"]),
    "wrong type in a preset": ({"preset": 'train.learning_rate = "fast"'}, ["learning_rate", "cannot be casted"]),
    "one NaN reward": ({"sabotage": "one NaN"}, ["returned nan for the prompt 'a"]),
    "all rewards NaN": ({"sabotage": "all NaN"}, ["returned nan for the prompt 'a"]),
    "an infinite reward": ({"sabotage": "infinite"}, ["returned inf for the prompt 'a"]),
    "too few rewards": ({"sabotage": "too few"}, ["returned shape (3,) for 4 images"]),
    "a reward without info": ({"sabotage": "not a pair"}, ["must return a pair (rewards, info dict), not list"]),
    "a reward of words": ({"sabotage": "text"}, ["must return numbers"]),
    "a reward that raises": ({"sabotage": "raises"}, ["reward raises raised ZeroDivisionError: oh no"]),
}


@pytest.fixture(scope="module")
def outcomes(tiny, tmp_path_factory):
    """{mistake: what the command line did}."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "empty").mkdir()
    (folder / "damaged").mkdir()
    (folder / "damaged/config.json").write_text('{"seed": ')
    (folder / "empty.txt").write_text("\n")
    for source, target, file, key in (
        (tiny, "half", "unet/diffusion_pytorch_model.safetensors", "conv_norm_out.weight"),
        (ROOT / "models/emoji/clip", "clip", "model.safetensors", "visual_projection.weight"),
    ):
        shutil.copytree(source, folder / target)
        weights = load_file(folder / target / file)
        del weights[key]
        save_file(weights, folder / target / file, {"format": "pt"})
    (folder / "long.txt").write_text(f"a cat\n\n{OVERLONG}\n")

    def run(mistake):
        options = {"model": tiny, "run_dir": folder / mistake.replace(" ", "-"), **MISTAKES[mistake][0]}
        options = {k: v.replace("FOLDER", str(folder)) if isinstance(v, str) else v for k, v in options.items()}
        if line := options.pop("preset", None):
            preset = folder / f"{len(line)}.py"
            lines = ("from config.base import get_config as base", "def get_config():", "    config = base()")
            preset.write_text("\n".join([*lines, f"    config.{line}", "    return config"]))
            return launch("--config", str(preset), check=False, direct=True, **options)
        if sabotage := options.pop("sabotage", None):
            options |= {"reward": "sabotaged", "script": "tests/saboteur.py", "env": {"SABOTAGE": sabotage}}
        return launch(check=False, direct=True, **options)

    return {mistake: run(mistake) for mistake in MISTAKES}, folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(outcomes, mistake):
    (results, folder), fragments = outcomes, MISTAKES[mistake][1]
    result = results[mistake]
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert all(f in lines[0] for f in fragments), lines[0]
    assert "Traceback" not in result.stderr
    assert not list(folder.glob("*/metrics.jsonl"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config", "config/nowhere.py"], "--config does not name a file"),
        (["--config", "config/emoji.py:nonsense"], "unknown variant 'nonsense'"),
        (["stray"], "'stray' is not an option"),
        (["--confg=config/emoji.py"], "confg"),
    ],
)
def test_mistakes_beside_the_config(tmp_path, arguments, message):
    result = launch(*arguments, check=False, direct=True, run_dir=tmp_path / "run")
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert any(line.startswith("error: ") and message in line for line in result.stderr.splitlines()), result.stderr


def test_home_in_paths(tiny, tmp_path):
    """~ is the home folder; run and model are found there, and no folder of that name is made."""
    (tmp_path / "model").symlink_to(tiny)
    launch(env={"HOME": str(tmp_path)}, direct=True, model="~/model", run_dir="~/run", num_epochs=1)
    result = launch(env={"HOME": str(tmp_path)}, direct=True, check=False, resume="~/run", num_epochs=1)
    assert "has done 1 epochs" in result.stderr and not (ROOT / "~").exists()


def test_traceback_when_asked_for(tiny):
    result = launch(check=False, direct=True, env={"DDPO_TRACEBACK": "1"}, model=tiny, reward="nothing")
    assert "Traceback" in result.stderr


def test_config_may_stand_behind_the_options_it_is_changed_by(tmp_path):
    result = launch("--config.seed=1", "--config", "config/emoji.py:nonsense", check=False, direct=True)
    assert "unknown variant 'nonsense'" in result.stderr
    result = launch("--config.seed=1", check=False, direct=True, num_epochs=0)
    assert "num_epochs = 0 must be at least 1" in result.stderr


PRESETS = {
    "imports nothing there is": ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    "has no get_config": ("", "has no attribute 'get_config'"),
    "is not Python": ("def get_config(:", "SyntaxError"),
    "fails": ("def get_config(): return 1 / 0", "ZeroDivisionError"),
    "returns nothing": ("def get_config(): pass", "NoneType"),
    "has options of its own": (
        "from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'seed': 1})", "has no option"
    ),
}  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_that_are_none(tmp_path, preset):
    code, message = PRESETS[preset]
    (tmp_path / "preset.py").write_text(code)
    result = run([sys.executable, "train.py", f"--config={tmp_path}/preset.py"])
    assert result.returncode == 1 and "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert f"the preset {tmp_path}/preset.py" in line and message in line


def script(name, *arguments):
    return run([sys.executable, f"scripts/{name}.py", *map(str, arguments)])


def assert_one_line(result, message, code=1):
    assert result.returncode == code and "Traceback" not in result.stderr, result.stderr
    assert message in result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("plot", "x", "--output", "README.md/x.png"), "nothing can be written in 'README.md'"),
        (("plot", "x", "--output", "docs"), "the name must end in .png"),
        (("plot", "x", "--output", "x.xyz"), "'x.xyz': the name must end in .png"),
        (("plot", "README.md", "requirements.jsonl"), "README.md"),
        (("figures", "fig4", "--output", "README.md/x"), "nothing can be written in 'README.md/x'"),
        (("sweep", "fig4", "--results", "README.md/x"), "nothing can be written in 'README.md/x'"),
        (("train_reward", "--choices", "x", "--output", "README.md"), "nothing can be written in 'README.md'"),
        (("train_reward", "--choices", "x", "--output", "runs/x", "--cache", "README.md"), "'README.md'"),
        (("make_random_model", "tiny", "README.md/x"), "nothing can be written in 'README.md/x'"),
        (("simulate_rater", "plot", "--results", "README.md"), "README.md, line 1 is not JSON"),
        (("publish", "--run", "x", "--repo", "a b/.."), "--repo 'a b/..' must be USER/NAME"),
    ],
)
def test_scripts_say_in_one_line_what_cannot_be_read_or_written(arguments, message):
    assert_one_line(script(*arguments), message)


def test_a_finished_run_and_what_cannot_be_made_of_it(tiny, tmp_path):
    """Before any image is drawn; and a line of metrics.jsonl that no run has written."""
    folder = tmp_path / "run"
    launch(model=tiny, run_dir=folder, num_epochs=1, direct=True)
    sample = "sample", "--run", folder, "--count", 1
    assert_one_line(script(*sample, "--output", "README.md/x.png"), "nothing can be written in 'README.md'")
    assert_one_line(script(*sample, "--output", "x.xyz"), "'x.xyz': the name must end in .png")
    assert_one_line(script(*sample, "--eta", 7), "--eta 7 must be at most 1")
    assert_one_line(script("evaluate", "--run", folder, "--output", "README.md/x"), "'README.md'")
    with open(folder / "metrics.jsonl", "a") as f:
        f.write("garbage\n")
    assert_one_line(script("plot", folder, "--output", tmp_path / "x.png"), "metrics.jsonl, line 2 is not JSON")
    result = launch(resume=folder, num_epochs=2, direct=True, check=False)
    assert_one_line(result, "metrics.jsonl has a line that is not an epoch's metrics: remove it")
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2  # nothing is lost


@pytest.mark.parametrize("name", ["bench_trl", "peer_ratio"])
def test_help_without_the_peer(name):
    result = script(f"dev/{name}", "--help")
    assert result.returncode == 0 and "usage: " in result.stdout


@pytest.mark.parametrize("moment", ["imports", "work"])
def test_ctrl_c_leaves_no_traceback(tmp_path, moment):
    folder, log = tmp_path / "model", tmp_path / "log"
    command = [sys.executable, "-X", "importtime", "-m", "scripts.make_random_model", "sd15", str(folder)]
    with open(log, "w") as f:
        heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # which a shell's background jobs do not
        process = subprocess.Popen(command, cwd=ROOT, stdout=f, stderr=f, preexec_fn=heed)
    last = "| scripts\n" if moment == "imports" else "| ddpo.errors\n"  # that and the network's making take seconds
    while last not in log.read_text():
        assert process.poll() is None, log.read_text()[-1000:]
        time.sleep(0.02)
    time.sleep(0 if moment == "imports" else 0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait() in (-signal.SIGINT, 128 + signal.SIGINT)
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ("scripts.sample", "--run", "x", "--seed", str(2**64)),
            "must be below 4294967296",
        ),
        (("scripts.sample", "--run", "x", "--guidance_scale", "inf"), "argument --guidance_scale: inf must be finite"),
        (("scripts.sample", "--run", "x", "--count", "0"), "argument --count: 0 must be at least 1"),
        (("scripts.sample", "--run", "x", "--eta", "nan"), "argument --eta: nan must be at least -1"),
        (("scripts.sweep", "fig4", "--jobs", "0"), "argument --jobs: 0 must be at least 1"),
        (("scripts.train_reward", "--seed", "many"), "argument --seed: invalid int value: 'many'"),
    ],
)
def test_numbers_that_scripts_cannot_take(arguments, message, monkeypatch, capsys):
    name, *arguments = arguments
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(name).main()
    assert capsys.readouterr().err.strip().splitlines()[-1].endswith(message)
