"""The annotation server through the real command line, and its page in a real browser."""

import http.client
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run
from PIL import Image

from config.base import get_config
from ddpo import prompts
from ddpo.errors import InputError
from ddpo.policy import load_policy
from ddpo.reward_model import read_choices, read_jsonl
from scripts.annotate import Votes, append_line, draw_pairs, list_questions, pair_up, read_pairs, shown, summarize

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
LONG = "a dog & <b>its</b> bone, " + "oil on canvas, by an unknown master, " * 30


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


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """12 images of two captions, each of one colour."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.new("RGB", (40, 40), tuple(rng.integers(0, 256, 3).tolist())).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a cat" if i < 6 else LONG)
    return folder


@pytest.fixture(scope="module")
def server(pictures, tmp_path_factory):
    """(process, address, output) of a server with 25 pairs that most tests share, each with raters of its own."""
    output = tmp_path_factory.mktemp("out")
    process, address = serve("--images", pictures, "--output", output, "--pairs", 25)
    yield process, address, output
    kill(process)


def send(address, path="/choice", body=None, kind="application/json", **headers):
    """(status, answer) to a POST of a body, or to a GET."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    if body is not None:
        body, headers = json.dumps(body), {"Content-Type": kind} | headers
    connection.request("GET" if body is None else "POST", path, body, headers)
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response.status, json.loads(text) if response.headers["Content-Type"] == "application/json" else text


def look(address, rater):
    return send(address, f"/state?rater={rater}")[1]


def vote(address, rater, choice, state=None):
    state = state or look(address, rater)
    return send(address, body={"rater": rater, "pair": state["pair"], "ticket": state["ticket"], "choice": choice})


def votes_of(output, rater, **options):
    return [v for v in read_choices([output / "choices.jsonl"], **options) if v["rater"] == rater]


# ------------------------------------------------------------------------------------------------- without a browser
def test_votes_undo_and_what_is_served(server, pictures):
    process, address, output = server
    pairs = read_jsonl(output / "pairs.jsonl")
    state = vote(address, "a", "left")[1]
    assert (state["done"], state["total"], state["pair"]) == (1, 26, 1)  # pair 0 is asked again after pair 20
    assert send(address, state["left"])[1] in [Path(name).read_bytes() for name in pairs[1]["images"]]
    vote(address, "a", "tie")
    assert vote(address, "a", "undo")[1]["pair"] == 1 and vote(address, "a", "right")[1]["pair"] == 2
    assert [(v["pair"], v["choice"]) for v in votes_of(output, "a")] == [(0, "left"), (1, "right")]
    good = {"rater": "b", "pair": 0, "choice": "left"}
    bad = [{"rater": rater} for rater in (" ", "x" * 61, 5)] + [{"pair": pair} for pair in ("0", 0.5, True)]
    bad += [{"choice": "both"}]
    assert [send(address, body=good | change)[0] for change in bad] == [422] * len(bad)
    assert send(address, body=good, kind="text/plain")[0] == 422  # which a foreign page can send unasked
    for path in ("/image/0/2", "/image/99/0", "/image/-1/0", "/../choices.jsonl", "/image/..%2f..%2fetc/0", "/docs"):
        assert send(address, path)[0] in (404, 422)
    assert not votes_of(output, "b") and send(address, body=good)[0] == 200  # no ticket, as a script may
    port = address.rsplit(":", 1)[1]
    taken = ["python", "scripts/annotate.py", "--images", pictures, "--pairs", 2, "--port", port, "--output"]
    result = run([*taken, output / "other"])
    assert result.returncode == 1 and "error: cannot listen on 127.0.0.1" in result.stderr


def test_only_the_own_page_under_an_own_name_may_ask(server):
    """DNS rebinding: a foreign page's name is made to lead here, and its script then asks under that name."""
    _, address, output = server
    port, body = address.rsplit(":", 1)[1], {"rater": "origin", "pair": 0, "choice": "left"}
    for host in (f"evil.example:{port}", "evil.example", "", "[::1", "127.0.0.1.evil.example"):
        assert send(address, "/state?rater=a", Host=host)[0] == 403 and send(address, body=body, Host=host)[0] == 403
    for host in ("127.0.0.1", "localhost", "192.168.1.7", socket.gethostname(), "[::1]"):
        assert send(address, "/state?rater=a", Host=f"{host}:{port}")[0] == 200
    for origin in ("http://evil.example", "http://127.0.0.1:1", "null", f"http://localhost:{port}", "http://["):
        assert send(address, body=body, Origin=origin)[0] == 403
    assert not votes_of(output, "origin") and send(address, body=body, Origin=address)[0] == 200


def status(process, key):
    """A number of /proc/PID/status."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_is_refused_and_not_kept(server, chunked):
    process, address, _ = server
    before = status(process, "VmRSS")
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    megabytes = (b" " * 2**20 for _ in range(200))
    headers = {"Content-Type": "application/json"} | ({} if chunked else {"Content-Length": str(200 * 2**20)})
    try:
        connection.request("POST", "/choice", megabytes, headers, encode_chunked=chunked)
    except OSError:  # it no longer listened, and has said why
        pass
    assert connection.getresponse().status == 413
    assert status(process, "VmHWM") < before + 50 * 2**10
    assert send(address, "/state?rater=a")[0] == 200


def test_a_hundred_votes_at_once(server):
    """All of them wait in the queue of a server that is stopped, as if they came at the same moment."""
    process, address, output = server
    raters, connections = [f"parallel {i}" for i in range(100)], []
    os.kill(process.pid, signal.SIGSTOP)
    try:
        for rater in raters:
            connections.append(http.client.HTTPConnection(address.removeprefix("http://"), timeout=5))
            body = json.dumps({"rater": rater, "pair": 0, "choice": "tie"})
            connections[-1].request("POST", "/choice", body, {"Content-Type": "application/json"})
            connections[-1].sock.settimeout(60)
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert [connection.getresponse().status for connection in connections] == [200] * 100
    assert all(len(votes_of(output, rater)) == 1 for rater in raters)


def test_connections_are_bounded(server):
    process, address, _ = server
    host, port = address.removeprefix("http://").split(":")
    threads = status(process, "Threads")
    idle = [socket.create_connection((host, port)) for _ in range(600)]
    try:
        assert send(address, "/state?rater=a")[0] == 503
        assert status(process, "Threads") < threads + 50
    finally:
        for connection in idle:
            connection.close()
    until(lambda: send(address, "/state?rater=a")[0] == 200)


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_a_stale_page_is_told_that_its_vote_did_not_count(server):
    _, address, output = server
    stale = look(address, "stale")
    newer = vote(address, "stale", "left")[1]
    for choice in ("right", "undo"):
        code, answer = vote(address, "stale", choice, stale)
        assert code == 409 and "did not count" in answer["message"] and answer["pair"] == 1
    assert [v["choice"] for v in votes_of(output, "stale")] == ["left"]
    assert vote(address, "stale", "left", newer | {"ticket": "of another folder"})[0] == 409


def test_a_full_disk_is_told_and_loses_nothing(server):
    """The limit on the file's size leaves room for half a line, as a full disk does."""
    process, address, output = server
    vote(address, "full", "left")
    before = (output / "choices.jsonl").read_bytes()
    limits = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (len(before) + 30, limits[1]))
    try:
        code, answer = vote(address, "full", "right")
        assert code == 507 and "cannot save this choice: No space left" in answer["detail"]
        assert (output / "choices.jsonl").read_bytes() == before
    finally:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limits)
    assert look(address, "full")["pair"] == 1 and vote(address, "full", "tie")[0] == 200
    assert [v["choice"] for v in votes_of(output, "full")] == ["left", "tie"]


def test_a_second_process_in_the_folder_is_refused(server, pictures):
    _, _, output = server
    before = (output / "pairs.jsonl").read_text()
    command = ["python", "scripts/annotate.py", "--images", pictures, "--output", output, "--draw_only", "--pairs", 29]
    result = run(command)
    assert result.returncode == 1 and f"{output} is being written by another process" in result.stderr
    assert (output / "pairs.jsonl").read_text() == before


def test_a_folder_from_elsewhere_shows_no_other_files(pictures, tmp_path):
    (tmp_path / "secret.png").write_text("")
    output = tmp_path / "out"
    output.mkdir()
    (output / "link.png").symlink_to(tmp_path / "secret.png")
    Image.new("RGB", (8, 8)).save(output / "a.png")
    command = ["python", "scripts/annotate.py", "--config", "config/emoji.py", "--pairs", 1, "--output", output]
    for name in ("../secret.png", str(tmp_path / "secret.png"), "link.png", str(pictures / "0.png")):
        pair = {"pair": 0, "prompt": "", "images": ["a.png", name]}
        (output / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
        result = run([*command, "--port", 99999])  # which ends it, were it to come so far
        assert result.returncode == 1 and "of pair 0 lies outside" in result.stderr, result.stderr


def work(function):
    """How many lines of Python it takes: a measure of its cost that depends on no clock."""
    lines = 0

    def trace(frame, event, argument):
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return lines


def test_a_vote_costs_the_same_at_20_000_as_at_20(tmp_path):
    """In lines run and in bytes read."""
    pairs = [{"pair": i, "prompt": "", "images": ["a.png", "b.png"]} for i in range(20_100)]
    costs = []
    for done in (10, 20_000):
        output = tmp_path / str(done)
        output.mkdir()
        line = {"prompt": "", "left": "a.png", "right": "b.png", "choice": "left", "rater": "x"}
        questions = list_questions(len(pairs), 10)[:done]
        text = "".join(json.dumps({"pair": i, **line, "repeat": again}) + "\n" for i, again in questions)
        (output / "choices.jsonl").write_text(text)
        votes = Votes(output, pairs)
        votes.state("x")
        read = [int(Path("/proc/self/io").read_text().split()[1])]
        lines = work(lambda: [(votes.state("x"), votes.record("x", "left")) for _ in range(5)])
        read.append(int(Path("/proc/self/io").read_text().split()[1]))
        costs.append((lines, read[1] - read[0]))
        assert votes.state("x")["done"] == done + 5
    (few, few_bytes), (many, many_bytes) = costs
    assert 0 < many <= few + 10 and many_bytes < few_bytes + 1000


def test_repeats_come_later_with_the_sides_swapped():
    for count, every in ((25, 10), (100, 10), (100, 3), (100, 0), (5, 1)):
        questions = list_questions(count, every)
        assert [pair for pair, again in questions if not again] == list(range(count))
        again = [pair for pair, again in questions if again]
        assert again == ([p for p in range(count - 20) if p % every == 0] if every else [])
        places = {question: i for i, question in enumerate(questions)}
        assert all(places[pair, True] > places[pair, False] + 20 for pair in again)
        assert list_questions(count + 7, every)[: len(questions)] == questions  # as a folder is enlarged
    pair = {"pair": 3, "images": ["a", "b"]}
    assert shown(pair, "x") == shown(pair, "x", repeat=True)[::-1]


def test_what_repeats_say_and_that_no_training_sees_them(server):
    """A hand that always presses left, a rater who looks, and one who takes a repeat back."""
    _, address, output = server
    pairs = read_pairs(output / "pairs.jsonl")
    for rater, choose in (
        ("hand", lambda names: "left"),
        ("eye", lambda names: ("right", "left")[names[0] < names[1]]),
    ):
        state = look(address, rater)
        while state["pair"] is not None:
            sides = [pairs[state["pair"]]["images"][int(state[side][-1])] for side in ("left", "right")]
            state = vote(address, rater, choose(sides), state)[1]
        same = {"hand": "0 (0%)", "eye": "1 (100%)"}[rater]
        assert f"Of 1 pairs asked twice, {same} were answered the same way" in " ".join(state["summary"])
        assert state["done"] == state["total"] == 26
        assert [v["pair"] for v in votes_of(output, rater)] == list(range(25))
        assert [v["pair"] for v in votes_of(output, rater, repeats=True) if v.get("repeat")] == [0]
    for _ in range(5):
        state = vote(address, "eye", "undo")[1]
    assert state["pair"] == 0 and state["done"] == 21  # the repeat; the first answer to pair 0 stands
    assert [v["pair"] for v in votes_of(output, "eye", repeats=True)] == list(range(21))


def test_summary():
    assert summarize({}) == []
    answers = {(i, False): "left" for i in range(4)} | {(4, False): "skip", (5, False): "tie"}
    assert "100% of 4 clear choices" in summarize(answers)[0] and len(summarize(answers)) == 1
    again = {(i, True): choice for i, choice in enumerate(("right", "left", "tie", "skip", "left", "tie"))}
    assert "Of 4 pairs asked twice, 2 (50%)" in summarize(answers | again)[1]  # 0 and 5, but not 1 and 2


def test_a_line_cut_short_gets_its_end(tmp_path):
    path = tmp_path / "lines.jsonl"
    append_line(path, {"a": 1})
    with open(path, "a") as f:
        f.write('{"cut')
    append_line(path, {"b": 2})
    assert read_jsonl(path) == [{"a": 1}, {"b": 2}]


# --------------------------------------------------------------------------------------------------------- in a browser
@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs Debian's chromium and chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
                 "disable-background-networking", "disable-component-update", "window-size=1100,900",
                 f"user-data-dir={tmp_path_factory.mktemp('profile')}"):  # fmt: skip
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """What a person sees and does in the browser."""

    def __init__(self, driver):
        self.driver = driver

    def find(self, name):
        return self.driver.find_element("id", name)

    def text(self, name):
        return self.find(name).text

    def pair(self):
        """The pair that can be answered now."""
        return self.find("ask").get_attribute("data-pair")

    def open(self, address, rater, pair):
        self.driver.get(f"{address}/?rater={rater}")
        until(lambda: self.pair() == str(pair))

    def click(self, name):
        self.find(name).click()

    def press(self, key):
        from selenium.webdriver.common.keys import Keys

        self.driver.find_element("tag name", "body").send_keys(getattr(Keys, key, key))

    def after(self, action, *arguments):
        """Does it, and waits until another pair can be answered."""
        before = self.pair()
        action(*arguments)
        until(lambda: self.pair() not in (before, ""))


@pytest.fixture
def page(browser):
    return Page(browser)


def test_clicks_keys_undo_and_a_killed_server(page, pictures, tmp_path):
    output = tmp_path / "out"
    process, address = serve("--images", pictures, "--output", output, "--pairs", 6)
    port = address.rsplit(":", 1)[1]
    page.driver.get(address)
    assert "same name" in page.text("enter") and "skip" in page.text("enter")
    page.find("name").send_keys("Ann\n")
    until(lambda: page.pair() == "0")
    assert page.text("question") == "Which picture do you like better?"
    assert {kbd.text for kbd in page.driver.find_elements("css selector", "#ask kbd")} == {"←", "→", "↓", "S", "U"}
    seen = []  # (pair, choice) as the browser knows it
    for choice, action, what in (("left", page.click, "left"), ("right", page.press, "ARROW_RIGHT"),
                                 ("tie", page.press, "ARROW_DOWN")):  # fmt: skip
        seen.append((int(page.pair()), choice))
        page.after(action, what)
    page.after(page.press, "u")
    assert page.pair() == "2"  # the tie is taken back
    page.after(page.click, "skip")
    seen[2] = (2, "skip")

    kill(process)  # halfway, without a word; and as if in the middle of a line
    with open(output / "choices.jsonl", "a") as f:
        f.write('{"pair": 3, "choi')
    page.click("left")
    until(lambda: "may not be saved" in page.text("message"))
    process, again = serve("--images", pictures, "--output", output, "--pairs", 6, "--port", port)
    try:
        assert again == address
        page.driver.refresh()  # same rater, from the address
        until(lambda: page.pair() == "3")
        assert page.text("count") == "Ann: 3 of 6"
        for key, choice in (("ARROW_LEFT", "left"), ("S", "skip"), ("ARROW_RIGHT", "right")):  # S: with Caps Lock
            seen.append((int(page.pair()), choice))
            page.after(page.press, key)
        assert "All done" in page.text("question") and "of 4 clear choices" in page.text("summary")
        page.after(page.press, "u")
        page.after(page.press, "ARROW_RIGHT")
        page.open(address, "Bob%20%C3%A9", 0)  # another rater begins at the beginning
        page.after(page.click, "left")
        os.kill(process.pid, signal.SIGINT)
        said = process.communicate(timeout=30)
        assert process.returncode == 0 and said[1] == "" and "'Ann': 6 answers. The left image" in said[0]
    finally:
        kill(process)

    votes = read_choices([output / "choices.jsonl"])
    assert [(v["pair"], v["choice"]) for v in votes if v["rater"] == "Ann"] == seen
    assert [(v["pair"], v["choice"]) for v in votes if v["rater"] == "Bob é"] == [(0, "left")]
    pairs = read_jsonl(output / "pairs.jsonl")
    assert len(pairs) == 6 and {p["prompt"] for p in pairs} == {"a cat", LONG.strip()}
    for one in votes:
        pair = pairs[one["pair"]]
        assert one["prompt"] == pair["prompt"] and {one["left"], one["right"]} == set(pair["images"])


HAMMER = """
// Presses a key every 10 ms until the left image has the colour given, and notes what was to be seen each time.
window.sights = [];
const colour = side => {
  const image = document.querySelector(`#${side} img`), canvas = new OffscreenCanvas(1, 1).getContext("2d");
  if (!image || getComputedStyle(image).visibility !== "visible") return null;
  canvas.drawImage(image, 0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).join();
};
const timer = setInterval(() => {
  const prompt = document.getElementById("prompt");
  const text = getComputedStyle(prompt).visibility === "visible" ? prompt.textContent : null;
  sights.push([text, colour("left"), colour("right")]);
  if (sights.at(-1)[1] === arguments[0]) { window.over = true; return clearInterval(timer); }
  document.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
}, 10);
"""


def test_no_key_counts_before_both_pictures_are_seen(page, server):
    """With 0.7 s of latency: neither a vote for the pair that loads, nor its prompt above the old images."""
    _, address, output = server
    pairs = read_pairs(output / "pairs.jsonl")
    i = next(i for i in range(25) if pairs[i]["prompt"] != pairs[i + 1]["prompt"])
    for _ in range(i):
        vote(address, "slow", "tie")
    colours = []
    for pair in pairs[i : i + 2]:
        sides = [Image.open(output / name).getpixel((0, 0)) for name in shown(pair, "slow")]
        colours.append([",".join(map(str, side)) for side in sides])
    page.open(address, "slow", i)
    page.driver.set_network_conditions(offline=False, latency=700, throughput=10**7)
    try:
        page.driver.execute_script(HAMMER, colours[1][0])
        until(lambda: page.driver.execute_script("return window.over"))
        time.sleep(1)  # for a vote under way
    finally:
        page.driver.delete_network_conditions()
    assert [v["pair"] for v in votes_of(output, "slow")] == list(range(i + 1))
    sights = {tuple(sight) for sight in page.driver.execute_script("return sights")} - {(None, None, None)}
    assert sights == {(pair["prompt"], *sides) for pair, sides in zip(pairs[i:], colours)}


def test_a_stale_tab_says_so(page, server):
    _, address, output = server
    page.open(address, "tabs", 0)
    vote(address, "tabs", "left")  # as in another tab
    page.after(page.press, "ARROW_RIGHT")
    assert "did not count" in page.text("message") and page.pair() == "1"
    assert [v["choice"] for v in votes_of(output, "tabs")] == ["left"]
    page.after(page.press, "ARROW_RIGHT")
    assert page.text("message") == ""


def test_a_full_disk_is_not_a_lost_server(page, server):
    process, address, output = server
    page.open(address, "disk", 0)
    limits = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, ((output / "choices.jsonl").stat().st_size + 9, limits[1]))
    try:
        page.press("ARROW_LEFT")
        until(lambda: "cannot save this choice: No space left" in page.text("message"))
    finally:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limits)
    page.after(page.press, "ARROW_LEFT")
    assert page.text("message") == ""


def test_a_damaged_and_a_missing_picture_can_only_be_skipped(page, server, pictures):
    _, address, output = server
    page.open(address, "holes", 0)
    pair = read_pairs(output / "pairs.jsonl")[1]
    kept = {name: Path(name).read_bytes() for name in pair["images"]}
    try:
        for bad in pair["images"]:
            os.remove(bad) if bad == pair["images"][0] else Path(bad).write_bytes(b"no image")
            page.after(page.press, "ARROW_LEFT")
            assert page.pair() == "1" and "skip it" in page.text("message") and "damaged" in page.text("pair")
            page.press("ARROW_LEFT")
            page.after(page.press, "u")
            Path(bad).write_bytes(kept[bad])
    finally:
        for name, content in kept.items():
            Path(name).write_bytes(content)
    assert [v["choice"] for v in votes_of(output, "holes")] == []


BOXES = """return [...document.querySelectorAll("#question, #prompt, img, #tie, #skip, #undo")].map(element => {
  const box = element.getBoundingClientRect(); return [box.left, box.top, box.right, box.bottom]; })"""


@pytest.mark.parametrize("width, height, side", [(1280, 800, 400), (390, 844, 240), (844, 390, 240), (360, 640, 140)])
def test_all_is_in_sight_on_a_desk_and_on_a_phone(page, server, width, height, side):
    """Without scrolling, nothing covered, and the images as large as `side`, under a prompt of 200 words."""
    _, address, output = server
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 1000}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": width < 1000})
    try:
        rater = f"screen-{width}"
        while look(address, rater)["prompt"] == "a cat":
            vote(address, rater, "skip")
        page.open(address, rater, look(address, rater)["pair"])
        if folder := os.environ.get("DDPO_SCREENSHOTS"):
            page.driver.save_screenshot(f"{folder}/{width}x{height}.png")
        boxes = page.driver.execute_script(BOXES)
        assert len(boxes) == 7 and page.driver.execute_script("return [innerWidth, innerHeight]") == [width, height]
        for i, (left, top, right, bottom) in enumerate(boxes):
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            for left2, top2, right2, bottom2 in boxes[:i]:
                assert right2 <= left or right <= left2 or bottom2 <= top or bottom <= top2
        assert all(min(r - x, b - y) >= side for x, y, r, b in boxes[2:4])
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})


# --------------------------------------------------------------------------------------------------------------- pairs
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
    with pytest.raises(InputError, match=f"the image {pairs[7]['images'][1]} of pair 7 is not there"):
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
    assert result.returncode == 1 and "no preset can be loaded from 'config/emojy.py'" in result.stderr


def test_pairs_of_a_model_can_be_enlarged(tiny, tmp_path):
    """Pairs 0 to 2, then 3 and 4: the same as 0 to 4 at once. Two images of a pair differ."""
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
