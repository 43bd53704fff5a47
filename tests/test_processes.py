"""Processes and machines change nothing."""

import os
import subprocess

import numpy as np
import pytest
from conftest import ROOT, command_line, launch
from PIL import Image
from test_train import metrics, weights

from ddpo import prompts

# An image has 8 bits: a pixel that stands between two values may go either way, and its JPEG file with it by a byte.
# So what must not depend on batches or processes is compared under a reward that does not look at the image.
BY_PROMPT = {"reward": "sabotaged", "script": "tests/saboteur.py", "env": {"SABOTAGE": "by prompt"}}
BY_PROMPT |= {"train__learning_rate": 1e-3, "save_every": 1}


def distance(ours, theirs):
    """Relative norm of the difference of two lists of tensors."""
    difference = sum((a - b).double().square().sum() for a, b in zip(ours, theirs, strict=True))
    return float((difference / sum(b.double().square().sum() for b in theirs)).sqrt())


def assert_same_run(one, two, epoch=2):
    """Two LoRA runs that may differ by rounding. Adam's first steps are learning rate * sign(gradient), so a weight
    whose gradient is as small as rounding may go either way: weights are compared by their norm, with room for some."""
    for ours, theirs in zip(metrics(one), metrics(two), strict=True):
        for key in {"reward_mean", "reward_std", "grad_norm", "loss", "approx_kl"} & theirs.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-7), key
        assert ours["ratio_error"] == 0
    a, b = weights(one, epoch), weights(two, epoch)
    moved = [k for k in b if "lora_B" in k]  # they began as 0, so their norm is how far training went
    assert distance([a[k] for k in moved], [b[k] for k in moved]) < 1e-3


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """One process, undisturbed."""
    run = tmp_path_factory.mktemp("alone") / "run"
    launch(model=tiny, run_dir=run, direct=True, **BY_PROMPT)
    return run


def test_four_processes_equal_one(tiny, tmp_path, alone):
    """Also in the grid of two images, which two of them draw."""
    run = tmp_path / "run"
    launch(model=tiny, run_dir=run, processes=4, direct=True, **BY_PROMPT)
    assert_same_run(run, alone)
    ours, theirs = (np.asarray(Image.open(r / "images/epoch_0002.png")).astype(int) for r in (run, alone))
    assert abs(ours - theirs).mean() < 0.1 < theirs.std()


def test_one_process_saves_and_two_resume(tiny, tmp_path, alone):
    run = tmp_path / "run"
    launch(model=tiny, run_dir=run, num_epochs=1, direct=True, **BY_PROMPT)
    launch(model=tiny, resume=run, processes=2, **BY_PROMPT)  # by torchrun; other tests spare its imports
    assert_same_run(run, alone)


def test_two_processes_save_and_one_resumes(tiny, tmp_path):
    """With RWR-sparse, of which a few samples count, perhaps none of a process's own, and an average of the weights."""
    options = {**BY_PROMPT, "algorithm": "rwr_sparse", "train__keep_percentile": 80, "train__ema_decay": 0.5}
    launch(model=tiny, run_dir=tmp_path / "one", direct=True, **options)
    launch(model=tiny, run_dir=tmp_path / "two", num_epochs=1, processes=2, direct=True, **options)
    launch(model=tiny, resume=tmp_path / "two", direct=True, **options)
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_a_flow_of_two_processes_goes_on_in_one(tiny_sd35, tmp_path):
    """With guidance and a KL to the base model."""
    options = {**BY_PROMPT, "model": tiny_sd35, "sample__guidance_scale": 3.0, "train__kl_weight": 0.1}
    launch(run_dir=tmp_path / "one", direct=True, **options)
    launch(run_dir=tmp_path / "two", num_epochs=1, processes=2, direct=True, **options)
    launch(resume=tmp_path / "two", direct=True, **options)
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_accelerate_launch_is_refused_what_it_would_not_do(tiny, tmp_path):
    """It starts one process where there is no GPU, and what else it is told would be ignored without a word."""
    several = ("accelerate.commands.launch", "--quiet", "--cpu", "--num_processes", "2")
    fsdp = ("accelerate.commands.launch", "--use_fsdp", "--num_processes", "1")
    (tmp_path / "home/accelerate").mkdir(parents=True)
    settings = ("compute_environment: LOCAL_MACHINE", "distributed_type: 'NO'", "mixed_precision: bf16")
    settings += ("use_cpu: true", "num_processes: 1", "num_machines: 1", "debug: false")
    (tmp_path / "home/accelerate/default_config.yaml").write_text("\n".join(settings))
    for launcher, env, message in (
        (several, {}, "starts only one process without a GPU, whatever --num_processes or its default_config.yaml say"),
        (several[:2], {"HF_HOME": str(tmp_path / "home")}, "launch with --mixed_precision no if accelerate's default_"),
        ((), {"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed precision (bf16) does nothing here"),
        (fsdp, {}, "fsdp_version = 1 is not supported: launch with --fsdp_version 2"),
        ((), {"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed does nothing here: use --use_fsdp --fsdp_version 2"),
        ((), {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "'s parallelism config"),
        ((), {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo backend does nothing here"),
    ):
        options = {"launcher": launcher} if launcher else {"direct": True}
        result = launch(model=tiny, run_dir=tmp_path / "run", check=False, env=env, **options)
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert result.returncode != 0 and len(errors) == 1 and message in errors[0], result.stderr
    assert not (tmp_path / "run").exists()


def test_processes_that_drift_apart_are_named(tiny, tmp_path):
    result = launch(
        model=tiny, run_dir=tmp_path / "run", script="tests/saboteur.py", processes=2, direct=True,
        env={"SABOTAGE": "ranks drift apart"}, check=False,
    )  # fmt: skip
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "before epoch 1, process(es) 1 hold other weights than process 0" in errors[0]


@pytest.fixture
def two_machines():
    """Two network namespaces joined by a cable: the command prefixes that run something in either."""
    names = [f"ddpo{os.getpid()}{side}" for side in "ab"]
    setup = [f"ip netns add {name}" for name in names]
    setup += [f"ip link add {names[0]} type veth peer name {names[1]}"]
    for i, name in enumerate(names):
        inside = f"ip netns exec {name} ip"
        setup += [f"ip link set {name} netns {name}", f"{inside} addr add 10.77.0.{i + 1}/24 dev {name}"]
        setup += [f"{inside} link set {name} up", f"{inside} link set lo up"]
    try:
        for command in setup:
            if subprocess.run(command.split(), capture_output=True).returncode:
                pytest.skip(f"no network namespaces here: {command}")
        yield {name: ["ip", "netns", "exec", name] for name in names}
    except FileNotFoundError:
        pytest.skip("no network namespaces here: there is no ip command")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def test_two_machines_equal_one(tiny, tmp_path, alone, two_machines):
    run, processes = tmp_path / "run", []
    for rank, (interface, prefix) in enumerate(two_machines.items()):
        launcher = ("torch.distributed.run", "--nnodes", "2", "--node_rank", str(rank), "--nproc_per_node", "1")
        launcher += ("--master_addr", "10.77.0.1", "--master_port", "29577")
        options = {k: v for k, v in BY_PROMPT.items() if k != "env"}
        command = command_line(model=tiny, run_dir=run, launcher=launcher, **options)
        env = {**os.environ, **BY_PROMPT["env"], "GLOO_SOCKET_IFNAME": interface}
        processes.append(subprocess.Popen([*prefix, *command], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    assert_same_run(run, alone)


def test_a_gradient_that_is_not_finite_is_found_in_another_process(tiny, tmp_path):
    """Process 0, whose gradients are fine, must not name a transition of its own."""
    result = launch(
        model=tiny, run_dir=tmp_path / "run", algorithm="not_finite", check=False, processes=2, direct=True,
        script="tests/saboteur.py", env={"SABOTAGE": "the gradient is not finite"},
    )  # fmt: skip
    assert result.returncode != 0
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    update, prompt = int(error.split("update ")[1][0]), error.split("'")[1]
    drawn = [prompts.draw_prompt(prompts.common_animals(), 0, 0, i)[0] for i in range(8)]  # 2 updates, 2 processes
    assert prompt in drawn[update * 4 + 2 : update * 4 + 4] and prompt not in drawn[update * 4 : update * 4 + 2]
