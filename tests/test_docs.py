"""README and docs: their blocks run, their links lead somewhere, and README is short enough to be read to the end.

Every ```python and ```sh block runs here, made small: train.py on the tiny model for an epoch, runs/NAME being such a
run. `pip install` and `pytest` are left to .ci/run. A block that needs what is not here says so in the line before it,
<!-- not run: why -->. The files, modules, presets and options of all of them must exist.
"""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, launch, run

from config.base import get_config
from ddpo.options import flatten, load_preset

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- not run: (.*?) -->\n)?```(\w*)\n(.*?)```", re.DOTALL)
PROGRAMS = ("pip", "pytest", "accelerate", "torchrun", "python", "transformers")
LESS = {  # what is appended to a script's command, so that it takes seconds and writes nothing here
    "scripts.sample": ["--count", "1"],
    "scripts.evaluate": ["--count", "2", "--limit", "1"],
    "scripts.plot": ["--output", "runs/curve.png"],
}


def blocks(language):
    """(why it is not run, text) of all blocks in a language."""
    found = [(page, *match) for page in PAGES for match in BLOCK.findall(page.read_text())]
    return [pytest.param(why, text, id=f"{page.stem}-{i}") for i, (page, why, lang, text) in enumerate(found)
            if lang == language]  # fmt: skip


def commands(text):
    """The words of each command of a shell block, without comments."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    words = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [command for command in words if command]


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """What runs/ is to the blocks: it holds the finished runs NAME, A and B, which are one."""
    folder = tmp_path_factory.mktemp("runs")
    launch(model=tiny, run_dir=folder / "NAME", num_epochs=1, direct=True)
    for name in "AB":
        shutil.copytree(folder / "NAME", folder / name)
    return folder


def train_small(script, arguments, tiny, run_dir):
    """Runs train.py, or a script that ends in it, with the given words of its command line: one epoch of the tiny
    model, of whose size and cost all is overridden that decides how long it takes."""
    small = SMALL | {"model": tiny, "run_dir": run_dir, "num_epochs": 1}
    given = {word.split("=")[0].removeprefix("--config.") for word in arguments}
    less = [
        f"--config.{key}={value}" for key, value in small.items() if key not in given or key in ("model", "run_dir")
    ]
    result = run([sys.executable, str(script), *arguments, *less])
    assert result.returncode == 0, result.stdout + result.stderr
    assert (Path(run_dir) / "metrics.jsonl").read_text().count("\n") == 1


def check(words):
    """That the program, files, modules, presets, options and flags of a command exist, and the options' values fit."""
    assert words[0] in PROGRAMS, words
    preset = words[words.index("--config") + 1] if "--config" in words else "config/emoji.py"
    options = flatten(load_preset(preset))  # raises if there is no such file or variant
    for key, value in (match.groups() for match in map(re.compile(r"--config\.([^=]+)=(.*)").match, words) if match):
        assert key in options, key
        assert value in ("True", "False") if isinstance(options[key], bool) else type(options[key])(value) is not None
    if "-m" in words:
        source = (ROOT / (words[words.index("-m") + 1].replace(".", "/") + ".py")).read_text()
        for flag in (word.split("=")[0] for word in words if re.match("--[a-z_]+(=|$)", word)):
            assert f'"{flag}"' in source, flag
    for word in words:
        if re.fullmatch(r"[\w/]*[\w-]+\.(py|txt)", word) or word.startswith(("tests/", "models/")):
            assert (ROOT / word).exists(), word


def test_blocks_say_their_language():
    for page in PAGES:
        assert all(language in ("python", "sh") for _, language, _ in BLOCK.findall(page.read_text())), page


@pytest.mark.parametrize("why, text", blocks("python"))
def test_python_blocks_run(why, text, tiny, runs, tmp_path):
    """And where a comment names an option, # --config.KEY=VALUE, train.py runs with it behind the block."""
    assert not why
    options, text = re.findall(r"# (--config\.\S+)", text), text.replace("runs/", f"{runs}/")
    block = tmp_path / "block.py"
    block.write_text(text + "import runpy\nrunpy.run_path('train.py', run_name='__main__')\n" * bool(options))
    if options:
        options = [option.replace("runs/", f"{runs}/") for option in options]
        train_small(block, options, tiny, tmp_path / "run")
    else:
        result = run([sys.executable, str(block)])
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("why, text", blocks("sh"))
def test_shell_blocks_run(why, text, tiny, runs, tmp_path):
    for words in commands(text):
        check(words)
    for words in [] if why else commands(text):
        arguments = [word.replace("runs/", f"{runs}/") for word in words[3:]]
        if words[:3] == ["accelerate", "launch", "train.py"]:
            train_small("train.py", arguments, tiny, tmp_path / "run")
        elif words[0] == "python":
            less = [word.replace("runs/", f"{runs}/") for word in LESS.get(words[2], ())]
            result = run([sys.executable, words[2].replace(".", "/") + ".py", *arguments, *less])
            assert result.returncode == 0, result.stdout + result.stderr
        else:
            assert words[0] in ("pip", "pytest"), words


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_readme_links_every_page_once():
    linked = re.findall(r"\(docs/([\w.]+)\)", README.read_text())
    assert sorted(linked) == sorted(page.name for page in PAGES[1:])


def test_readme_is_read_to_the_end():
    """At most 1,400 words, tables included, code blocks aside; the bars between a table's cells are no words."""
    text = re.sub(r"```.*?```", "", README.read_text(), flags=re.DOTALL)
    assert len(re.findall(r"\S*\w\S*", text)) <= 1400


def test_no_page_speaks_of_rounds():
    """ "Epoch" is the word, in README, docs and what the program says."""
    for page in PAGES:
        assert not re.search(r"\brounds?\b(?!ing|ed)", page.read_text()), page


def test_files_named_in_pages_exist():
    for page in PAGES:
        for path in re.findall(r"`((?:ddpo|config|scripts|tests|docs|models|results)/[\w/.-]+)`", page.read_text()):
            assert (ROOT / path).exists() or "NAME" in path and (ROOT / path).parent.exists(), f"{page.name}: {path}"


def test_options_named_in_pages_exist():
    """In `code`; of docs/migrating.md only the column that is ours."""
    options = flatten(get_config())
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        if page.stem == "migrating":
            text = re.sub(r"^\|.*\|(.*)\|$", r"\1", text, flags=re.MULTILINE)
        for key in re.findall(
            r"`(?:--config\.)?((?:sample|train|stats|evaluate|reward_options)\.(?!py\b)[a-z_0-9]+)(?![\w*])", text
        ):
            assert key in options, f"{page.name}: {key}"


def test_pytest_expressions_in_pages_name_tests():
    """`pytest tests -k "this or that"`: each of them is in some test's name, each file exists."""
    names = "\n".join(
        re.findall(r"^def (test_\w+)", "\n".join(f.read_text() for f in ROOT.glob("tests/test_*.py")), re.M)
    )
    for page in PAGES:
        for command in re.findall(r"`(pytest [^`]+)`", page.read_text()):
            words = shlex.split(command)
            check([word for word in words if word != "tests"])
            for name in words[words.index("-k") + 1].split(" or ") if "-k" in words else ():
                assert name in names, f"{page.name}: {command}"
