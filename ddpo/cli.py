"""The command line of train.py: --config FILE[:VARIANT], --config.KEY=VALUE, and one clear line for a mistake."""

import errno
import json
import os
import re
import signal
import sys
import threading
import time

import torch
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from config.base import get_config as base_config
from ddpo.errors import InputError, nearest, one_line
from ddpo.hardware import out_of_memory
from ddpo.interrupt import die_with_launcher
from ddpo.options import expand_home, flatten
from ddpo.policy import PRECISIONS

CONFIG = config_flags.DEFINE_config_file("config", None, "A preset of config/, with its variant: FILE:NAME")
DEFAULT = "config/emoji.py"


def run(train):
    """Parses the command line and calls train(config, preset name). An InputError ends it with its one line."""

    def main(_):
        config = CONFIG.value
        expand_home(config)
        if config.resume:
            _take_options_of(config.resume, config)
        _check_launcher(config.precision)
        filename = config_flags.get_config_filename(flags.FLAGS["config"])
        train(config, os.path.basename(filename).replace(".py", "").replace(":", "-").replace(",", "-"))

    die_with_launcher()
    try:
        app.run(main, flags_parser=_parse)
    except (InputError, OSError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if os.environ.get("DDPO_TRACEBACK") or not (isinstance(error, InputError) or full):
            raise
        if int(os.environ.get("RANK", 0)):  # what every process finds, process 0 says: its end ends the others
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(15)
        print(f"error: {error} (DDPO_TRACEBACK=1 shows where)", file=sys.stderr, flush=True)
        if any(thread.name == "reward" for thread in threading.enumerate()):  # it hangs, and would hold up the exit
            os._exit(1)
        sys.exit(1)
    except RuntimeError as error:  # later than the batches that were tried at the start: rewards, a neighbour
        if os.environ.get("DDPO_TRACEBACK") or not out_of_memory(error):
            raise
        sys.exit(
            f"error: out of memory: {str(error).splitlines()[0]} Resume with smaller --config.sample.batch_size and "
            "--config.train.batch_size (DDPO_TRACEBACK=1 shows where)"
        )
    except KeyboardInterrupt:
        sys.exit("interrupted before the first epoch: there is nothing to save")


def _check_launcher(precision):
    """Refuses what `accelerate launch` (1.15.0) was asked for and this program would not do."""
    env = os.environ
    # Without a GPU it starts one process, whatever it is told, unless it is given MPI; of several it sets the address.
    several = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= env.keys()
    if several and not {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"} & env.keys():
        raise InputError(
            "accelerate launch starts only one process without a GPU, whatever --num_processes or its "
            "default_config.yaml say: use torchrun --nproc_per_node N train.py ..., or --num_processes 1"
        )
    processes, gpus = int(env.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if processes > gpus > 0 and env.get("ACCELERATE_USE_CPU", "").lower() != "true":
        raise InputError(f"{processes} processes for {gpus} GPU(s) of this machine: start one a GPU (--num_processes)")
    mixed = env.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed not in ("no", precision):
        raise InputError(
            f"accelerate launch's mixed precision ({mixed}) does nothing here: choose with --config.precision="
            f"{mixed if mixed in PRECISIONS else 'bf16'}, and launch with --mixed_precision no if accelerate's "
            "default_config.yaml asks for it"
        )
    sharding = {"PARALLELISM_CONFIG": "parallelism config", "DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}
    for name, title in sharding.items():
        if env.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise InputError(
                f"accelerate launch's {title} does nothing here: use --use_fsdp --fsdp_version 2 (docs/gpu.md) for a "
                "model that one GPU cannot hold; --config.lora_rank above 0, --config.precision=bf16 and "
                "--config.train.gradient_checkpointing=True need less memory"
            )
    if env.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper() != "NO":
        raise InputError("accelerate launch's dynamo backend does nothing here: leave it out, or --config.compile=True")


def _check_preset(preset, config):
    """Raises InputError unless a preset's config has the options of config/base.py, and no others."""
    if not isinstance(config, ConfigDict):
        raise InputError(f"the preset {preset} returns {type(config).__name__}: it must change config/base.py's config")
    known, own = flatten(base_config()), flatten(config)
    for key in sorted(known.keys() ^ own.keys()):
        what = "sets an unknown option" if key in own else "has no option"
        raise InputError(f"the preset {preset} {what} {key}: it must change config/base.py's config")


def _given(argv):
    """The dotted names of the options on the command line: --config.KEY=VALUE, or --noconfig.KEY for False."""
    return [match[1] for match in (re.match(r"-+(?:no)?config\.([^=]+)", a) for a in argv) if match]


def _take_options_of(run_dir, config):
    """A resumed run keeps the options in its config.json, except those given on the command line."""
    path, given = os.path.join(run_dir, "config.json"), _given(sys.argv)
    try:
        with open(path) as f:
            saved = flatten(json.load(f))
        config.update_from_flattened_dict({k: v for k, v in saved.items() if k not in given})
    except OSError as error:
        raise InputError(f"nothing to resume: there is no {path}") from error
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path} does not fit this version's options: {error}") from error


def _parse(argv):
    # absl wants --config before the options that change it; its place should not matter, nor should its absence.
    where = next((i for i, a in enumerate(argv) if a.lstrip("-").split("=")[0] == "config"), None)
    if where is None:
        first, rest = [f"--config={DEFAULT}"], argv[1:]
    else:
        end = where + 1 + ("=" not in argv[where])
        first, rest = argv[where:end], argv[1:where] + argv[end:]
    sys.argv = argv = [argv[0], *first, *rest]  # ml_collections reads the former
    preset = first[-1].removeprefix("--config=")
    try:
        rest = flags.FLAGS(argv)
        _check_preset(preset, CONFIG.value)  # a config that did not load fails only here
    except (AttributeError, KeyError) as error:  # what ml_collections raises for a key that does not exist
        known = flatten(base_config())
        unknown = next((key for key in _given(argv) if key not in known), None)
        if unknown is None:
            misspelled = re.search(r'Key "(\w+)" does not exist', str(error))
            if misspelled is None:
                raise InputError(f"the preset {preset} cannot be used: {one_line(error)}") from error
            keys = {key.split(".")[-1] for key in known}
            raise InputError(
                f"{preset} sets an unknown option {misspelled[1]}."
                f"{nearest(misspelled[1], keys)} All of them are in config/base.py"
            ) from error
        if "guidance" in unknown or "cfg" in unknown:
            raise InputError(
                f"unknown option {unknown}: guidance is one setting, sample.guidance_scale, for sampling and training, "
                "since with two the importance ratio would mean nothing. train.guidance=False trains without it, on "
                "old steps scored without it"
            ) from error
        raise InputError(
            f"unknown option {unknown}.{nearest(unknown, known)} All of them are in config/base.py"
        ) from error
    except flags.Error as error:
        # An error that a preset raises arrives inside a traceback, as text.
        raise InputError(str(error).strip().splitlines()[-1].split("ValueError: ")[-1]) from error
    except OSError as error:
        raise InputError(f"--config does not name a file: {' '.join(str(error).split())}") from error
    except InputError:
        raise
    except Exception as error:  # the preset's own
        raise InputError(f"the preset {preset} cannot be used: {one_line(error)}") from error
    if len(rest) > 1:
        raise InputError(f"{rest[1]!r} is not an option: they look like --config.seed=1")
    return rest
