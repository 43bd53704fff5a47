"""Starts train.py many times but imports torch, diffusers and the rest once: that takes far longer than most tests.

Reads one JSON request per line: {"script", "arguments", "env", "stdout", "stderr", "file_limit", "processes"}. For each
it forks; the child becomes `python SCRIPT ARGUMENTS` and ends as that would. Answers with the exit code. This process
itself computes nothing, so that nothing (threads, random state) is inherited. Several `processes` find each other as
torchrun's would, and the first that fails ends the others. With SIMULATED_CUDA, see simulated_cuda.py.
"""

import ctypes
import gc
import json
import os
import resource
import runpy
import signal
import socket
import sys

if "SIMULATED_CUDA" in os.environ:  # before torch, which asks at once whether there is a GPU
    ctypes.CDLL(os.environ["SIMULATED_CUDA"], ctypes.RTLD_GLOBAL)

import accelerate  # noqa: F401
import diffusers.loaders  # noqa: F401
import peft  # noqa: F401
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

import train  # noqa: F401


def wait(children):
    """The exit code of the first child that fails, or 0."""
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:
            for other in children:
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
            return os.waitstatus_to_exitcode(status)
    return 0


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


gc.freeze()  # a child that ends would look through all of this once more, for a second
while line := sys.stdin.readline():
    request = json.loads(line)
    processes, port, children = request["processes"], free_port(), []
    while len(children) < processes and children[-1:] != [0]:
        children.append(os.fork())
    if children[-1]:
        print(wait(children), flush=True)
        continue
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in ((1, request["stdout"]), (2, request["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(request["env"])
    if processes > 1:
        rank, count = str(len(children) - 1), str(processes)
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=count, LOCAL_WORLD_SIZE=count)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if request["file_limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"],) * 2)
    sys.argv = [request["script"], *request["arguments"]]
    runpy.run_path(request["script"], run_name="__main__")
    break
