"""What pip is told to install."""

import ast
import re
import sys
from importlib.metadata import packages_distributions

from conftest import ROOT


def listed(file):
    """The names of a requirements file's packages, as in "ml-collections"."""
    names = re.findall(r"^([\w-]+)==", (ROOT / file).read_text(), re.MULTILINE)
    return {name.lower().replace("_", "-") for name in names}


def imported(path):
    """The top-level names that a file imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


def test_users_install_what_is_imported_and_no_more():
    files = [ROOT / "train.py", *(f for folder in ("config", "ddpo", "scripts") for f in ROOT.glob(f"{folder}/*.py"))]
    names = set().union(*map(imported, files)) - set(sys.stdlib_module_names) - {"config", "ddpo", "scripts"}
    names.discard("triton")  # torch for GPUs brings it; ddpo/group_norm.py does without on a CPU
    names -= {"rapidocr", "onnxruntime"}  # of the reward ocr alone, which says so
    distributions = packages_distributions()
    needed = {name.lower().replace("_", "-") for module in names for name in distributions[module]}
    assert listed("requirements.txt") == needed | {"wandb", "tensorboard"}  # which accelerate imports, if asked


def test_the_tests_need_what_users_need_and_more():
    assert "\n-r requirements.txt\n" in (ROOT / "requirements-test.txt").read_text()
    assert not listed("requirements-test.txt") & listed("requirements.txt")
