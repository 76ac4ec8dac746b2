"""The web page in a real browser: Chromium from the system, driven by playwright."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image
from test_export import random_weights
from tiny_models import save_tower

from common.paths import BUILTIN_TOKENIZER_DIR, ROOT

gradio = pytest.importorskip("gradio", reason="no gradio: pip install -r scripts/requirements-demo.txt")
sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -r tests/requirements.txt")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
pytest_plugins = ["tiny"]
TOKENS = 12
QUESTION, SECONDS = "#question textarea", 60_000


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The page's address, its folders and its log, of tiny random weights."""
    folder = tmp_path_factory.mktemp("web")
    tower = save_tower(folder / "tower")
    random_weights(folder / "out", tower)
    shutil.copy(folder / "out" / "sft_vlm_64.pth", folder / "out" / "other_64.pth")
    (folder / "out" / "broken_64.pth").write_bytes(b"no weights")
    for name, colour in (("red", "red"), ("blue", "blue")):
        Image.new("RGB", (300, 200), colour).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--save_dir", folder / "out", "--vision_model_path", tower, "--tokenizer_path", BUILTIN_TOKENIZER_DIR]
    flags += ["--temperature", 0, "--max_new_tokens", TOKENS]
    command = [sys.executable, ROOT / "scripts" / "web_demo_vlm.py", *flags, "--port", port, "--device", "cpu"]
    (folder / "tmp").mkdir()
    environment = os.environ | {"TMPDIR": str(folder / "tmp"), "no_proxy": "127.0.0.1"}
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen(list(map(str, command)), stdout=log, stderr=subprocess.STDOUT, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert server.poll() is None, (folder / "log").read_text()
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield address, folder, flags
        assert "Traceback" not in (folder / "log").read_text()
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(site, browser):
    context = browser.new_context(locale="en-US", viewport={"width": 1200, "height": 900})
    tab = context.new_page()
    tab.set_default_timeout(SECONDS)
    tab.goto(site[0])
    tab.wait_for_selector("#examples img")
    tab.wait_for_selector(".talk .note")
    yield tab
    context.close()


def ask(page, question: str, *pictures: Path):
    """Types a question, adds pictures to it, sends it, and waits for the answer or the error."""
    turns = page.locator(".turn:not(.question)").count()
    if pictures:
        page.locator("#question input[type=file]").set_input_files([str(path) for path in pictures])
        page.wait_for_function(f"document.querySelectorAll('#question .thumbnail-item').length == {len(pictures)}")
    page.fill(QUESTION, question)
    page.press(QUESTION, "Enter")
    page.wait_for_function(f"document.querySelectorAll('.turn:not(.question)').length == {turns + 1}")
    page.wait_for_selector(".error:last-child, .answer:last-child .mask", state="attached")


def answers(page) -> list[str]:
    return [re.sub(r"\s+", " ", text).strip() for text in page.locator(".words").all_inner_texts()]


def by_eval(world, site, prompt: str, *pictures: Path) -> str:
    """Returns the answer that eval_vlm.py prints."""
    _, _, flags = site
    result = world.run(
        ROOT / "eval_vlm.py", *flags, "--image", *pictures, "--prompt", prompt, "--device", "cpu"
    ).passed()
    lines = result.out.split(f"{prompt}\n", 1)[1].split(f"    {TOKENS} tokens", 1)[0]
    return re.sub(r"\s+", " ", lines).strip()


def test_turns_and_pictures_are_answered_as_eval_vlm_answers(world, site, page):
    _, folder, _ = site
    red, blue = folder / "red.png", folder / "blue.png"
    ask(page, "What is it?", red)
    assert answers(page) == [by_eval(world, site, "What is it?", red)]
    ask(page, "And here?")
    assert len(answers(page)) == 2
    page.click("#new")
    page.wait_for_function("document.querySelectorAll('.turn').length == 0")
    ask(page, "Compare", red, blue)
    assert answers(page) == [by_eval(world, site, "Compare", red, blue)]
    assert page.locator(".answer .seen img").count() == 2
    left = [path for path in (folder / "tmp").rglob("*") if path.name in ("red.png", "blue.png")]
    assert not left, "an upload is still on disk"


def test_pointing_at_a_word_shows_its_map(site, page):
    _, folder, _ = site
    ask(page, "What is it?", folder / "red.png")
    page.wait_for_selector(".word .mask", state="attached")
    word, seen = page.locator(".word").first, page.locator(".seen").first.bounding_box()
    mask = word.locator(".mask")
    assert not mask.is_visible()
    word.hover()
    assert mask.is_visible() and mask.get_attribute("src").startswith("data:image/png;base64,")
    box = mask.bounding_box()
    assert all(abs(box[side] - seen[side]) < 1 for side in box)  # it lies on the picture
    page.mouse.move(0, 0)
    word.focus()  # as tapping it does
    assert mask.is_visible()


def test_an_answer_can_be_stopped(site, page):
    _, folder, _ = site
    page.get_by_text("Settings", exact=True).click()
    page.get_by_label("Longest answer, tokens").first.fill("1000")
    page.locator("#question input[type=file]").set_input_files(str(folder / "red.png"))
    page.wait_for_selector("#question .thumbnail-item")
    page.fill(QUESTION, "Go on and on")
    page.press(QUESTION, "Enter")
    page.wait_for_selector(".words")
    page.click("#stop")
    page.wait_for_function("document.querySelector('.answer .note').innerText")
    tokens = int(re.match(r"\d+", page.locator(".answer .note").inner_text())[0])
    assert 0 < tokens < 900


def test_errors_are_told_in_the_pages_words_and_cost_no_conversation(site, page):
    _, folder, _ = site
    ask(page, "", folder / "red.png")
    assert "There is no question" in page.locator(".error").inner_text()
    ask(page, "x" * 4001)
    assert "longer than 4,000 characters" in page.locator(".error").last.inner_text()
    ask(page, "What is it?")  # the picture is still there
    assert len(answers(page)) == 1 and page.locator(".question img").count() == 1
    ask(page, "What is it?", folder / "broken.png")
    assert "broken.png is no picture that can be read" in page.locator(".error").last.inner_text()
    assert len(answers(page)) == 1 and not page.locator("text=Traceback").count()


def test_examples_other_weights_and_a_conversation_too_long(site, page):
    page.locator("#examples img").first.click()
    page.wait_for_selector(".answer .note")
    assert len(answers(page)) == 1
    page.get_by_text("Settings", exact=True).click()
    page.locator("#weights input").click()
    options = page.locator("#weights [role=option]").all_inner_texts()
    assert [re.sub(r"\W", "", option) for option in options] == ["sft_vlm_64", "broken_64", "other_64"]
    page.get_by_role("option", name="broken_64").click()
    page.wait_for_function("document.querySelectorAll('.turn').length == 0")
    ask(page, "Hello")
    assert "These weights cannot be used" in page.locator(".error").inner_text()


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1200, "light")])
def test_a_chinese_browser_gets_a_chinese_page_that_fits(site, browser, width, scheme):
    context = browser.new_context(locale="zh-CN", viewport={"width": width, "height": 844}, color_scheme=scheme)
    tab = context.new_page()
    tab.goto(site[0])
    tab.wait_for_selector("text=停止")
    tab.wait_for_selector("text=拖入、粘贴或选择一张图片")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    context.close()


def test_a_request_that_is_too_large_is_refused(site):
    address, *_ = site
    with socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1]))) as connection:
        connection.sendall(b"POST /gradio_api/upload HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
