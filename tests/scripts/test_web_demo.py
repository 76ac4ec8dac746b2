"""The web page in a real browser: Chromium from the system, driven by playwright."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from test_export import random_weights
from tiny_models import save_tower

import eval_vlm
from common.errors import UsageError
from common.paths import BUILTIN_TOKENIZER_DIR, ROOT

pytest.importorskip("gradio", reason="no gradio: pip install -r scripts/requirements-demo.txt")
web_page = pytest.importorskip("scripts.demo.page")
FileResponse = pytest.importorskip("starlette.responses").FileResponse
TestClient = pytest.importorskip("starlette.testclient").TestClient
sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -r tests/requirements.txt")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
TOKENS = 12
QUESTION, MILLISECONDS = "#question textarea", 240_000  # beside other tests everything takes long


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The page's address, its folders and its log, of tiny random weights."""
    folder = tmp_path_factory.mktemp("web")
    tower = save_tower(folder / "tower")
    random_weights(folder / "out", tower)
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
        upload(address, folder / "red.png")
        server.terminate()
        assert server.wait(30) == 128 + signal.SIGTERM
        assert not [path for path in (folder / "tmp").rglob("*") if path.is_file()], "an upload is still on disk"
    finally:
        server.kill()
        server.wait(30)


def upload(address: str, file: Path, **headers) -> tuple[int, str]:
    """Sends a file as a form does; returns the status, and where it lies."""
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="' + file.name.encode() + b'"\r\n\r\n'
    headers |= {"Content-Type": "multipart/form-data; boundary=x"}
    body += file.read_bytes() + b"\r\n--x--\r\n"
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{address}/gradio_api/upload", body, headers)) as answer:
            return answer.status, json.load(answer)[0]
    except urllib.error.HTTPError as error:
        return error.code, ""


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def context(browser):
    """A browser's profile: its tabs load gradio's scripts from one cache."""
    context = browser.new_context(locale="en-US", viewport={"width": 1200, "height": 900})
    context.set_default_timeout(MILLISECONDS)
    yield context
    context.close()


@pytest.fixture
def page(site, context):
    tab = context.new_page()
    tab.goto(site[0])
    tab.wait_for_selector("#examples img")
    tab.wait_for_selector(".talk .note")
    yield tab
    tab.close()


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


@pytest.fixture
def by_eval(site, monkeypatch, capsys):
    """Returns the answer that eval_vlm.py prints."""

    def answer(prompt: str, *pictures: Path) -> str:
        flags = [*site[2], "--image", *pictures, "--prompt", prompt, "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["eval_vlm.py", *map(str, flags)])
        eval_vlm.main()
        lines = capsys.readouterr().out.split(f"{prompt}\n", 1)[1].split(f"    {TOKENS} tokens", 1)[0]
        return re.sub(r"\s+", " ", lines).strip()

    return answer


def test_turns_and_pictures_are_answered_as_eval_vlm_answers(by_eval, site, page):
    _, folder, _ = site
    red, blue = folder / "red.png", folder / "blue.png"
    ask(page, "What is it?", red)
    assert answers(page) == [by_eval("What is it?", red)]
    ask(page, "And here?")
    assert len(answers(page)) == 2
    page.click("#new")
    page.wait_for_function("document.querySelectorAll('.turn').length == 0")
    ask(page, "Compare", red, blue)
    assert answers(page) == [by_eval("Compare", red, blue)]
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


def set_length(page, tokens: int):
    """Sets the longest answer. Settings that open set their initial values once more: typed before that, it is lost."""
    label = page.get_by_label("Longest answer, tokens")
    number, slider = label.and_(page.locator("[type=number]")), label.and_(page.locator("[type=range]"))
    for _ in range(100):
        number.fill(str(tokens))
        number.press("Tab")
        page.wait_for_timeout(200)
        if number.input_value() == slider.input_value() == str(tokens):
            return
    pytest.fail(f"the page does not take a length of {tokens}")


def test_an_answer_can_be_stopped(site, page):
    _, folder, _ = site
    page.get_by_text("Settings", exact=True).click()
    set_length(page, 1000)
    page.locator("#question input[type=file]").set_input_files(str(folder / "red.png"))
    page.wait_for_selector("#question .thumbnail-item")
    page.fill(QUESTION, "Go on and on")
    page.press(QUESTION, "Enter")
    page.wait_for_selector(".words")
    page.locator("#stop").dispatch_event("click")  # at once
    page.wait_for_function("document.querySelector('.answer .note').innerText")
    tokens = int(re.match(r"\d+", page.locator(".answer .note").inner_text())[0])
    assert 0 < tokens < 1000


def test_errors_are_told_in_the_pages_words_and_cost_no_conversation(site, page):
    _, folder, _ = site
    ask(page, "", folder / "red.png")
    assert "There is no question" in page.locator(".error").inner_text()
    ask(page, "x" * 4001)
    assert "longer than 4,000 characters" in page.locator(".error").last.inner_text()
    ask(page, "What is it?")  # the picture is still there
    assert len(answers(page)) == 1 and page.locator(".question img").count() == 1
    ask(page, "What is it?", folder / "broken.png")
    assert "broken.png cannot be read as a picture" in page.locator(".error").last.inner_text()
    assert len(answers(page)) == 1 and not page.locator("text=Traceback").count()


def test_a_click_on_an_example_describes_it(page):
    page.locator("#examples img").first.click()
    page.wait_for_selector(".answer .note")
    assert len(answers(page)) == 1 and page.locator(".question").inner_text().strip() == "Describe this image."


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
        connection.sendall(b"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_a_second_request_waits_for_the_first(site, page):
    """A click on an example while an answer is generated: the two do not mix."""
    page.get_by_text("Settings", exact=True).click()
    set_length(page, 400)
    page.fill(QUESTION, "Go on and on")
    page.press(QUESTION, "Enter")
    page.wait_for_selector(".words")
    set_length(page, 8)
    page.locator("#examples img").first.click()
    page.wait_for_function("document.querySelectorAll('.question').length == 2")
    assert re.match(r"\d+ tokens", page.locator(".answer .note").first.inner_text())  # the first has ended
    page.wait_for_selector(".answer:last-child .mask", state="attached")
    assert [int(note.split()[0]) for note in page.locator(".answer .note").all_inner_texts()] == [400, 8]
    questions = [text.strip() for text in page.locator(".question").all_inner_texts()]
    assert questions == ["Go on and on", "Describe this image."]


def test_two_visitors_may_send_the_same_picture(site, page):
    """Its upload lies on the disk until both have asked; one that is gone is said to be."""
    address, folder, _ = site
    status, path = upload(address, folder / "blue.png")
    assert status == 200
    ask(page, "What is it?", folder / "blue.png")
    assert Path(path).is_file()
    assert len(answers(page)) == 1
    page.locator("#question input[type=file]").set_input_files(str(folder / "red.png"))
    page.wait_for_selector("#question .thumbnail-item")
    for upload_of_red in (folder / "tmp").rglob("red.png"):
        upload_of_red.unlink()  # as one that is too old
    ask(page, "What is it?")
    assert "red.png is no longer here" in page.locator(".error").inner_text()


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("localhost", None, 200),
        ("LOCALHOST", "http://LOCALHOST", 200),
        ("127.0.0.1", "http://127.0.0.1", 200),
        ("evil.com", None, 400),
        ("evil.com", "http://evil.com", 400),
        ("localhost.evil.com", None, 400),
        ("127.0.0.1", "http://evil.com", 403),
        ("127.0.0.1", "http://localhost", 403),
        ("127.0.0.1", "null", 403),
        ("[", None, 400),
    ],
)
def test_other_sites_and_names_are_refused(site, host, origin, status):
    address, folder, _ = site
    port = address.rsplit(":", 1)[1]
    headers = {"Host": f"{host}:{port}"} | ({"Origin": f"{origin}:{port}"} if origin else {})
    got, path = upload(address, folder / "red.png", **headers)
    assert got == status and bool(path) == (status == 200)


def test_only_addresses_of_this_machine_alone_are_loopback():
    assert not any(map(web_page.is_loopback, ("0.0.0.0", "192.168.0.7", "::")))
    assert all(map(web_page.is_loopback, ("::1", "127.0.0.2", "localhost", "LOCALHOST")))


def test_a_file_deleted_while_the_page_asks_for_it_is_not_found_and_other_errors_pass(tmp_path):
    async def app(scope, receive, send):
        if scope["path"] == "/file=gone":
            await FileResponse(tmp_path / "gone")(scope, receive, send)
        if scope["path"] == "/file=begun":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            raise FileNotFoundError("deleted since its headers were sent")
        raise RuntimeError("another")

    client = TestClient(web_page.Guard(app, web_page.Uploads(tmp_path), 100, False))
    assert client.get("/file=gone").status_code == 404
    assert client.get("/file=begun").content == b""  # no error in the log
    with pytest.raises(RuntimeError, match="another"):
        client.get("/file=other")


def test_uploads_are_bounded_and_nothing_else_is_deleted(tmp_path, monkeypatch):
    uploads, other = web_page.Uploads(tmp_path / "uploads"), tmp_path / "example.jpg"
    other.touch()
    files = [uploads.folder / str(number) / "a.jpg" for number in range(6)]
    for number, file in enumerate(files):
        file.parent.mkdir(parents=True)
        file.write_bytes(bytes(10))
        os.utime(file, (number, number))
    uploads.add(json.dumps([*map(str, files), str(files[5]), str(other), 7]).encode())
    uploads.add(b"too large")
    uploads.add(b'{"detail": "too large"}')
    for path in (other, uploads.folder / ".." / "example.jpg", tmp_path, uploads.folder, Path("a"), files[5]):
        uploads.use(path)
    assert other.exists() and files[5].exists()
    uploads.use(files[5])
    assert not files[5].exists()
    monkeypatch.setattr(web_page, "MOST_FILES", 4)
    uploads.enforce_bounds()
    assert [file.exists() for file in files] == [False, True, True, True, True, False]
    monkeypatch.setattr(web_page, "MOST_BYTES", 25)
    uploads.enforce_bounds()
    assert [file.exists() for file in files] == [False, False, False, True, True, False]


def test_a_question_that_the_chat_template_refuses_is_not_called_too_long():
    def turn(*_):
        raise UsageError("the template changes a turn") from ValueError()

    handlers = web_page.Handlers(SimpleNamespace(turn=turn), {}, [], None)
    assert handlers.new_turn([], "Go on", [], 8, web_page.TEXTS["en"]).error == "the template changes a turn"


def test_the_page_says_which_model_it_is_and_what_it_was_trained_on(page):
    assert page.locator("#about .note").inner_text().startswith("You talk to out/sft_vlm_64.pth. No file beside")
    sidecar = {"stage": "sft", "rows": 12345, "pictures": 678, "arguments": {"data_path": "/home/me/photos.jsonl"}}
    weights = SimpleNamespace(sidecar=sidecar, has_projection=True, path=Path("/home/me/out/mine.pth"))
    assistant = SimpleNamespace(loaded=SimpleNamespace(knows_only_scenes=False, weights=weights))
    _, _, said = web_page.Handlers(assistant, {}, [], None).start([], SimpleNamespace(headers={}))
    expected = "You talk to out/mine.pth. It was trained on 12,345 rows and 678 pictures of photos.jsonl (stage sft)."
    assert said == f'<p class="note">{expected}</p>'
    assert web_page.TEXTS["en"].keys() == web_page.TEXTS["zh"].keys()
