"""README and docs: their blocks run, their links lead somewhere, and README is short enough to be read to the end."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, run

from config.base import get_config
from ddpo.options import flatten

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- not run: (.*?) -->\n)?```(\w*)\n(.*?)```", re.DOTALL)


def blocks(language):
    """(page, why it is not run, text) of all blocks in a language."""
    found = [(page, *match) for page in PAGES for match in BLOCK.findall(page.read_text())]
    return [pytest.param(page, why, text, id=f"{page.stem}-{i}") for i, (page, why, lang, text) in enumerate(found)
            if lang == language]  # fmt: skip


def commands(text):
    """The words of each command line of a shell block, without comments."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [
        shlex.split(part, comments=True) for line in lines for part in line.split("&&") if part.split("#")[0].strip()
    ]


def test_blocks_say_their_language():
    for page in PAGES:
        assert all(language in ("python", "sh") for _, language, _ in BLOCK.findall(page.read_text())), page


@pytest.mark.parametrize("page, why, text", blocks("python"))
def test_python_blocks_run(page, why, text, tmp_path):
    assert not why
    (tmp_path / "block.py").write_text(f"import os\nos.chdir({str(ROOT)!r})\n{text.replace('runs/', f'{tmp_path}/')}")
    result = run([sys.executable, str(tmp_path / "block.py")])
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page, why, text", blocks("sh"))
def test_shell_blocks_run(page, why, text, tiny, tmp_path):
    """Those that need a GPU, a download or a person at least name modules, files and options that exist."""
    options = flatten(get_config())
    for words in commands(text):
        for word in words:
            if option := re.match(r"--config\.([^=]+)=", word):
                assert option[1] in options, word
        module = words[words.index("-m") + 1] if "-m" in words else ""
        if module.startswith("scripts."):
            source = ROOT / (module.replace(".", "/") + ".py")
            flags = {word.split("=")[0] for word in words if word.startswith("--") and "." not in word}
            assert source.exists() and all(f'"{flag}"' in source.read_text() for flag in flags), words
        for word in words:
            if word.endswith((".py", ".txt")) and "/" in word + "/":
                assert (ROOT / word).exists(), word
    if why:
        return
    for words in commands(text):
        if words[0] == "pytest":  # it is what runs this
            assert all((ROOT / word).exists() for word in words[1:] if word.startswith("tests/")), words
            continue
        if words[:3] == ["accelerate", "launch", "train.py"]:
            small = SMALL | {"model": tiny, "run_dir": tmp_path / "run", "num_epochs": 1}
            command = [sys.executable, "train.py", *words[3:], *(f"--config.{k}={v}" for k, v in small.items())]
        else:
            assert words[:2] == ["python", "-m"] and words[2].startswith("scripts."), words
            arguments = [word.replace("runs/", f"{tmp_path}/") for word in words[3:]]
            command = [sys.executable, words[2].replace(".", "/") + ".py", *arguments]
        result = run(command)
        assert result.returncode == 0, result.stdout + result.stderr


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_is_linked_from_readme():
    readme = PAGES[0].read_text()
    assert all(f"(docs/{page.name})" in readme for page in PAGES[1:])


def test_readme_is_read_to_the_end():
    """At most 1,400 words, code blocks aside."""
    assert len(re.sub(r"```.*?```", "", PAGES[0].read_text(), flags=re.DOTALL).split()) <= 1400


def test_no_page_speaks_of_rounds():
    """ "Epoch" is the word, in README, docs and what the program says."""
    for page in PAGES:
        assert not re.search(r"\brounds?\b(?!ing|ed)", page.read_text()), page


def test_modules_named_in_pages_exist():
    for page in PAGES:
        for path in re.findall(r"`((?:ddpo|config|scripts|tests|docs|models|results)/[\w/.-]+)`", page.read_text()):
            assert (ROOT / path).exists() or (ROOT / Path(path).parent).exists() and "NAME" in path, (
                f"{page.name}: {path}"
            )
