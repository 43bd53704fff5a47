"""The annotation page in a real browser, driven through the real command line, killed and started again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT, run
from PIL import Image

from config.base import get_config
from ddpo import prompts
from ddpo.errors import InputError
from ddpo.policy import load_policy
from ddpo.reward_model import read_choices, read_jsonl
from scripts.annotate import draw_pairs, pair_up, read_pairs

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


def serve(*arguments):
    """Starts the real server; returns the process and its address, once it listens."""
    command = [sys.executable, "-u", "-m", "scripts.annotate", "--port", "0", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert line.startswith("http://127.0.0.1:"), line + process.stderr.read()
    return process, line.split()[0]


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.fixture
def pictures(tmp_path):
    """12 pictures of two captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.new("RGB", (40, 40), tuple(rng.integers(0, 256, 3).tolist())).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a cat" if i < 6 else "a dog & <b>its</b> bone")
    return folder


@pytest.fixture
def browser(tmp_path):
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs Debian's chromium and chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
                 "disable-background-networking", "disable-component-update", "window-size=1100,900",
                 f"user-data-dir={tmp_path / 'profile'}"):  # fmt: skip
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def test_clicks_keys_undo_and_a_killed_server(browser, pictures, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    output = tmp_path / "out"
    process, address = serve("--images", pictures, "--output", output, "--pairs", 6)
    port = address.rsplit(":", 1)[1]

    def shown():
        return browser.find_element(By.ID, "ask").get_attribute("data-pair")

    def wait(condition):
        WebDriverWait(browser, 10).until(lambda _: condition())

    def after(action):
        """Does it, and waits until the page shows another pair."""
        before = shown()
        action()
        wait(lambda: shown() != before)

    def click(name):
        browser.find_element(By.ID, name).click()

    def press(key):
        browser.find_element(By.TAG_NAME, "body").send_keys(key)

    browser.get(address)
    browser.find_element(By.ID, "name").send_keys("Ann" + Keys.ENTER)
    wait(lambda: shown() == "0")
    seen = []  # (pair, choice) as the browser knows it
    for choice, action in (("left", lambda: click("left")), ("right", lambda: press(Keys.ARROW_RIGHT)),
                           ("tie", lambda: press(Keys.ARROW_DOWN))):  # fmt: skip
        seen.append((int(shown()), choice))
        after(action)
    after(lambda: press("u"))
    assert shown() == "2"  # the tie is taken back
    after(lambda: click("skip"))
    seen[2] = (2, "skip")
    sources = [browser.find_element(By.CSS_SELECTOR, f"#{side} img") for side in ("left", "right")]
    wait(lambda: all(s.get_property("naturalWidth") == 40 for s in sources))
    screenshot = os.environ.get("DDPO_SCREENSHOT")
    if screenshot:
        browser.save_screenshot(screenshot)

    kill(process)  # halfway, without a word; and as if in the middle of a line
    with open(output / "choices.jsonl", "a") as f:
        f.write('{"pair": 3, "choi')
    click("left")
    wait(lambda: "not saved" in browser.find_element(By.ID, "error").text)
    process, again = serve("--images", pictures, "--output", output, "--pairs", 6, "--port", port)
    try:
        assert again == address
        browser.refresh()  # same rater, from the address
        wait(lambda: shown() == "3")
        assert browser.find_element(By.ID, "count").text == "Ann: 3 of 6"
        for key, choice in ((Keys.ARROW_LEFT, "left"), ("s", "skip"), (Keys.ARROW_RIGHT, "right")):
            seen.append((int(shown()), choice))
            after(lambda key=key: press(key))
        assert "All done" in browser.find_element(By.ID, "prompt").text
        browser.get(address + "/?rater=Bob%20%C3%A9")  # another rater begins at the beginning
        wait(lambda: shown() == "0")
        browser.find_element(By.ID, "left").click()
        wait(lambda: shown() == "1")
    finally:
        kill(process)

    votes = read_choices([output / "choices.jsonl"])
    assert [(v["pair"], v["choice"]) for v in votes if v["rater"] == "Ann"] == seen
    assert [(v["pair"], v["choice"]) for v in votes if v["rater"] == "Bob é"] == [(0, "left")]
    pairs = read_jsonl(output / "pairs.jsonl")
    assert len(pairs) == 6 and {p["prompt"] for p in pairs} == {"a cat", "a dog & <b>its</b> bone"}
    for vote in votes:
        pair = pairs[vote["pair"]]
        assert vote["prompt"] == pair["prompt"] and {vote["left"], vote["right"]} == set(pair["images"])


def post(address, body, kind="application/json"):
    request = urllib.request.Request(f"{address}/choice", json.dumps(body).encode(), {"Content-Type": kind})
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def test_the_server_without_a_browser(pictures, tmp_path):
    output = tmp_path / "out"
    process, address = serve("--images", pictures, "--output", output, "--pairs", 4)
    try:
        state = post(address, {"rater": "a", "pair": 0, "choice": "left"})
        assert (state["done"], state["total"], state["pair"]) == (1, 4, 1)
        assert post(address, {"rater": "a", "pair": 0, "choice": "right"})["done"] == 1  # a double click counts once
        assert read_choices([output / "choices.jsonl"])[0]["choice"] == "left"
        picture = urllib.request.urlopen(address + state["left"]).read()
        names = [p["images"] for p in read_jsonl(output / "pairs.jsonl")][1]
        assert picture in [open(name, "rb").read() for name in names]
        for body, kind in (({"rater": "", "pair": 0, "choice": "left"}, "application/json"),
                           ({"rater": "a", "pair": "0", "choice": "left"}, "application/json"),
                           ({"rater": "a", "pair": 1, "choice": "both"}, "application/json"),
                           ({"rater": "a", "pair": 1, "choice": "left"}, "text/plain")):  # fmt: skip
            with pytest.raises(urllib.error.HTTPError):
                post(address, body, kind)
        for path in ("/image/0/2", "/image/99/0", "/../choices.jsonl", "/choices.jsonl", "/image/..%2f..%2fetc/0"):
            with pytest.raises(urllib.error.HTTPError):
                urllib.request.urlopen(address + path)
        taken = [sys.executable, "-m", "scripts.annotate", "--images", str(pictures), "--output", str(output)]
        taken += ["--port", address.rsplit(":", 1)[1]]
        result = subprocess.run(taken, cwd=ROOT, capture_output=True, text=True)
        assert "error: cannot listen on 127.0.0.1" in result.stderr and "Traceback" not in result.stderr
        os.remove(names[0])
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(address + "/image/1/0")
    finally:
        kill(process)


def test_pairs_of_a_folder_can_be_enlarged(pictures, tmp_path):
    path = tmp_path / "pairs.jsonl"
    for count, expected in ((4, 4), (9, 9), (1000, 30)):  # 15 pairs of six cats, and as many of dogs
        before = read_pairs(path)
        pair_up(pictures, tmp_path, before, count)
        pairs = read_pairs(path)
        assert pairs[: len(before)] == before and len(pairs) <= expected
        assert len(pairs) == expected or len(pairs) > 20  # "(nearly) all there are"
        assert len({tuple(sorted(pair["images"])) for pair in pairs}) == len(pairs)
        used = Counter(name for pair in pairs for name in pair["images"])
        assert len(used) == (8 if count == 4 else 12)  # none twice before all have been used
        assert len({pair["prompt"] for pair in pairs[:4]}) == 2  # captions are mixed
    os.remove(pairs[7]["images"][1])
    with pytest.raises(InputError, match=f"the picture {pairs[7]['images'][1]} of pair 7 is not there"):
        read_pairs(path)


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        '{"pair": 0}',
        '{"pair": 1, "prompt": "", "images": ["0.png", "1.png"]}',
        '{"pair": 0, "prompt": "", "images": ["0.png"]}',
        '{"pair": 0, "prompt": "", "images": 5}',
    ],
)
def test_pairs_that_are_none_are_named(pictures, line):
    (pictures / "pairs.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match="is not a pair of scripts.annotate"):
        read_pairs(pictures / "pairs.jsonl")


def test_pairs_of_a_preset_with_another_model(tiny, tmp_path):
    command = [sys.executable, "scripts/annotate.py", "--model", tiny, "--output", tmp_path, "--draw_only", "--pairs"]
    result = run([*command, 2, "--config", "config/emoji.py:alignment"])
    assert result.returncode == 0, result.stderr
    pairs = read_pairs(tmp_path / "pairs.jsonl")
    known = {prompt for prompt, _ in prompts.animal_activities()}
    assert len(pairs) == 2 and {pair["prompt"] for pair in pairs} <= known
    result = run([*command, 2, "--config", "config/emoji.py"])  # which has other prompts
    assert result.returncode == 1 and "another config, 'config/emoji.py:alignment': choose another" in result.stderr
    assert read_pairs(tmp_path / "pairs.jsonl") == pairs
    result = run([*command, 3, "--output", tmp_path / "other", "--config", "config/emojy.py"])
    assert result.returncode == 1 and "error: --config config/emojy.py: no preset can be read there" in result.stderr


def test_pairs_of_a_model_can_be_enlarged(tiny, tmp_path):
    """Pairs 0 to 2, then 3 and 4: the same as 0 to 4 at once. Two pictures of a pair differ."""
    policy, sample = load_policy(tiny, 0, "fp32", "cpu"), get_config().sample
    sample.num_steps = 3
    policy.scheduler.set_timesteps(3)
    for output, counts in (("once", [0, 5]), ("twice", [0, 3, 5])):
        for first, count in zip(counts, counts[1:]):
            draw_pairs(policy, [("a cat", {}), ("a dog", {})], tmp_path / output, first, count, sample)
    once, twice = (read_jsonl(tmp_path / name / "pairs.jsonl") for name in ("once", "twice"))
    assert once == twice and [p["pair"] for p in once] == list(range(5))
    for name in [name for pair in once for name in pair["images"]]:
        a, b = (np.asarray(Image.open(tmp_path / folder / name)).astype(int) for folder in ("once", "twice"))
        assert abs(a - b).max() <= 1  # batches are composed otherwise, which moves the last bits
    assert len({Image.open(tmp_path / "once" / n).tobytes() for p in once for n in p["images"]}) == 10
