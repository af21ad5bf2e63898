"""The demo in a real browser: headless Chromium clicks, types, drags and uploads; two tabs see nothing of each other."""

from __future__ import annotations

import io
import re
import shutil
import struct
import tempfile
import threading
import time
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]

from PIL import Image

import vtprune
from demo.asking import make
from demo.keeper import Keeper
from demo.serving import start
from vtprune import embedded
from vtprune.cli import running
from vtprune.cli.demoing import Limits

expect = playwright.expect
# cores are shared while tests run
PATIENCE = 300_000
expect.set_options(timeout=PATIENCE)
QUESTION = "What shape is the white object?"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
# what a screen reader would call a control
NAMED = (
    "e => e.ariaLabel || e.labels?.length || e.innerText.trim() || e.title || e.placeholder || "
    "e.querySelector('img')?.alt || e.type == 'file'"
)
SECRET = "/root/secret/weights.bin"


@dataclass
class Broken(vtprune.Pruner):
    """Raises what nobody foresaw, with a path in it."""

    keep: int = 1
    name = "broken"

    def select(self, view):
        raise RuntimeError(f"cannot read {SECRET}")


def made(column, loaded):
    return Broken() if column.pruner == "broken" else make(column, loaded, True, loaded.model.config.model_type != "llava")


def talkative():
    """The embedded model, made to go on talking, so that there is a middle of an answer."""
    loaded = running.load(None, "cpu", "auto", "sdpa", False)
    loaded.model.generation_config.min_new_tokens = 400
    return loaded


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=PATIENCE)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def blocks():
    keeper = Keeper()
    demo, _ = start(limits=Limits(megapixels=20, megabytes=5), block=False, keeper=keeper, made=made)
    keeper.get()
    yield demo
    demo.close()


@pytest.fixture(scope="module")
def server(blocks):
    return blocks.local_url


@pytest.fixture(scope="module")
def slow_server():
    keeper = Keeper(load=talkative)
    demo, address = start(limits=Limits(new_tokens=400), block=False, keeper=keeper, made=made)
    keeper.get()
    yield address
    demo.close()


@contextmanager
def tab(browser, address, query="", **options):
    context = browser.new_context(viewport={"width": 1300, "height": 1000}, **options)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    failures = []
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.on("dialog", lambda dialog: (failures.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.goto(f"{address}?{query}" if query else address)
    expect(page.locator("#ask")).to_be_visible(timeout=PATIENCE)
    try:
        yield page
        assert not failures
    finally:
        context.close()


@pytest.fixture
def page(browser, server):
    with tab(browser, server) as page:
        done(page)
        yield page


def done(page, text="Done"):
    expect(page.locator("#status")).to_contain_text(text, timeout=PATIENCE)


def ask(page, question):
    """Type a question, press Ask, wait for the news that follow."""
    page.locator("#question textarea, #question input").fill(question)
    page.locator("#ask").click()


def answer(page, n):
    return page.locator(f"#answer{n} textarea, #answer{n} input")


def says(page, n, text):
    expect(answer(page, n)).to_have_value(text, timeout=PATIENCE)


def caption(page, n):
    return page.locator(f"#caption{n}")


def choose(page, name, value):
    box = page.locator(f"#{name} input")
    box.click()
    box.fill(value)
    box.press("Enter")


def slide(page, name, value):
    """Write a slider's number, as one does with the keyboard."""
    box = page.locator(f"#{name} input[type=number]")
    box.fill(str(value))
    box.press("Tab")


def upload(page, name, data, where="upload"):
    page.locator(f"#{where} input[type=file]").set_input_files({"name": name, "mimeType": "image/png", "buffer": data})


def png(size=(60, 40), colour=(200, 30, 30)):
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


def bomb(width=20_000, height=10_000):
    """A PNG of 200 megapixels in a few hundred kilobytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, rows = zlib.compressobj(9), b"\0" * (width // 8 + 1)
    pixels = b"".join(packer.compress(rows) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def gif():
    stream = io.BytesIO()
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue", "green")]
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    return stream.getvalue()


def clip_without_frames():
    """A whole MP4 of zero length."""
    av, stream = pytest.importorskip("av"), io.BytesIO()
    with av.open(stream, "w", format="mp4") as box:
        track = box.add_stream("mpeg4", rate=5)
        track.width, track.height, track.pix_fmt = 64, 64, "yuv420p"
        box.start_encoding()
    return stream.getvalue()


def until(held, what):
    """Wait for something that no page shows."""
    end = time.monotonic() + PATIENCE / 1000
    while not held():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def test_the_start_page_answers_by_itself(page):
    says(page, 0, "triangle")
    says(page, 1, "triangle")
    expect(page.locator("#figures1")).to_contain_text("64 of 576")
    expect(page.locator("#figures0")).to_contain_text("6.89 MiB")
    for n in range(3):
        assert "patches kept by" in page.locator(f"#image{n} img").get_attribute("alt")
    assert "picture=scene-0" in page.url and "column=flowcut%3A64" in page.url


def test_a_gallery_example_is_asked_and_the_link_restores_it(page, browser, server):
    page.locator("#gallery button").nth(1).click()
    expect(page.locator("#question textarea")).to_have_value("How many objects are there?", timeout=PATIENCE)
    says(page, 0, "5")
    page.get_by_label("reading: What does the text say?").click()
    says(page, 0, "fish")
    page.wait_for_url(re.compile("picture=scene-1.*text"))
    with tab(browser, server, page.url.partition("?")[2]) as other:
        expect(other.locator("#question textarea")).to_have_value("What does the text say?", timeout=PATIENCE)
        says(other, 0, "fish")


def test_an_upload_is_asked_about(page):
    upload(page, "mine.png", embedded.pictures()["scene-2"].read_bytes())
    done(page, "mine.png is ready")
    ask(page, "What word is written in the picture?")
    says(page, 0, "blue")
    page.get_by_role("tab", name="Keep and share").click()
    expect(page.locator("#command")).to_contain_text("vtprune ask mine.png")


def test_another_strategy_and_budget_run_again(page):
    choose(page, "pruner2", "visionzip")
    says(page, 2, "triangle")
    expect(page.locator("#figures2")).to_contain_text("merged")
    slide(page, "keep2", 8)
    expect(page.locator("#figures2")).to_contain_text("8 of 576", timeout=PATIENCE)
    page.locator("#count").get_by_label("4", exact=True).click()
    expect(page.locator("#column3")).to_be_visible()


def test_scrubbing_through_the_layers(page):
    choose(page, "pruner1", "flowcut+fastv+evict")
    expect(page.locator("#figures1")).to_contain_text("128 of 576", timeout=PATIENCE)
    counts = []
    for stage in (0, 8, 10, 16, 17):
        slide(page, "stage", stage)
        place = page.locator("#place textarea, #place input")
        titles = ["vision block 0", "", "", "", "", "", "", "", "entering", "", "decoder layer 1"]
        expect(place).to_have_value(re.compile([*titles, *[""] * 5, "decoder layer 7", "cache"][stage]), timeout=PATIENCE)
        expect(caption(page, 1)).to_contain_text(place.input_value())
        counts.append(int(caption(page, 1).inner_text().split()[0]))
    assert counts[0] == 576 and counts[1] == 128 and counts == sorted(counts, reverse=True) and counts[-1] < counts[-2]
    page.get_by_label("attention").click()
    expect(caption(page, 1)).to_contain_text("Attention that the strategy saw", timeout=PATIENCE)


def test_a_patch_tells_its_story(page):
    page.locator("#image1 img").click(position={"x": 6, "y": 200})
    expect(page.locator("#story")).to_contain_text("flowcut, budget 64: dropped after vision block", timeout=PATIENCE)
    expect(page.locator("#story")).to_contain_text("of 576")
    page.locator("#row input").fill("30")
    page.locator("#look").click()
    done(page, "Rows go from 0 to 23")
    page.locator("#row input").fill("22")
    page.locator("#col input").fill("11")
    page.locator("#look").click()
    expect(page.locator("#story")).to_contain_text("row 22, column 11", timeout=PATIENCE)
    expect(page.locator("#story")).to_contain_text("flowcut, budget 64: stayed to the end")


def test_the_smallest_budget_is_found(page):
    page.locator("#find1").click()
    expect(page.locator("#found1")).to_contain_text("visual tokens are enough for flowcut", timeout=2 * PATIENCE)
    found = int(re.search(r"(\d+) of 576 visual tokens", page.locator("#found1").inner_text())[1])
    expect(page.locator("#keep1 input[type=number]")).to_have_value(str(found))
    expect(page.locator("#figures1")).to_contain_text(f"{found} of 576", timeout=PATIENCE)
    says(page, 1, "triangle")


def test_a_chat_of_two_turns_and_a_new_picture(page):
    page.get_by_role("tab", name="Chat over the pruned cache").click()
    for text, news in ((QUESTION, "Of 576 new visual tokens 128 stayed"), ("What color is the circle?", "No new picture")):
        page.locator("#chat_text textarea").fill(text)
        page.locator("#chat_send").click()
        expect(page.locator("#chat_status")).to_contain_text(news, timeout=PATIENCE)
    expect(page.locator("#chat_log")).to_contain_text(
        re.compile(r"white object\?\s*triangle\s*What color is the circle\?\s*\w+")
    )
    upload(page, "more.png", png(), "chat_file")
    expect(page.locator("#chat_file")).to_contain_text("more", timeout=PATIENCE)
    page.locator("#chat_text textarea").fill("Is there a red star?")
    page.locator("#chat_send").click()
    expect(page.locator("#chat_status")).to_contain_text("Of 576 new visual tokens 128 stayed", timeout=PATIENCE)


def test_a_clip_is_asked_about_and_shown_as_a_strip(page):
    page.locator("#gallery button").last.click()
    expect(page.locator("#question textarea")).to_have_value("What color is the star?", timeout=PATIENCE)
    for n in (0, 1):
        says(page, n, "purple")
    done(page)
    expect(page.locator("#figures1")).to_contain_text("288 of 1152")
    assert "over 32 frames" in page.locator("#image1 img").get_attribute("alt")
    # back to a picture, the strategies follow
    page.locator("#gallery button").first.click()
    expect(page.locator("#figures1")).to_contain_text("64 of 576", timeout=PATIENCE)


def test_card_and_report_are_offered(page):
    page.get_by_role("tab", name="Keep and share").click()
    page.locator("#save").click()
    expect(page.locator("#files")).to_contain_text("vtprune-report", timeout=PATIENCE)
    with page.expect_download() as waiting:
        page.locator("#files a[download]").last.click()
    assert '"pruner": "flowcut"' in Path(waiting.value.path()).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "data", "news"),
    [
        ("bomb.png", bomb, "megapixels"),
        ("notes.png", lambda: b"these are only words\n" * 20, "not a picture"),
        ("empty.png", lambda: b"", "empty"),
        ("cut.png", lambda: png((400, 400))[:200], "cannot be decoded"),
        ("moving.gif", gif, "has 3 frames; the first is used"),
        ("nothing.mp4", lambda: b"", "empty"),
        ("words.mp4", lambda: b"these are only words" * 20, "words.mp4"),
        ("still.mp4", clip_without_frames, "has no video stream"),
    ],
)
def test_bad_pictures_are_refused_in_words(page, name, data, news):
    upload(page, name, data())
    expect(page.locator("#status")).to_contain_text(news, timeout=PATIENCE)
    nothing_leaks(page)
    ask(page, QUESTION)
    done(page)


@pytest.mark.parametrize(
    ("question", "news"),
    [("   ", "The question is empty"), ("x" * 10_000, "10000 characters"), ("what is <image> here?", "marks a picture")],
)
def test_bad_questions_are_refused_in_words(page, question, news):
    ask(page, question)
    where = page.locator("#status") if "image" not in question else page.locator("#figures0")
    expect(where).to_contain_text(news, timeout=PATIENCE)
    nothing_leaks(page)


def test_html_stays_text(page):
    """Neither as a question, nor as a strategy, nor in a chat does it become markup; a dialog would fail the tab."""
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script><b>bold</b>"
    choose(page, "pruner2", evil)
    expect(page.locator("#figures2")).to_contain_text("unknown strategy", timeout=PATIENCE)
    expect(page.locator("#figures2")).to_contain_text("<b>bold</b>")
    ask(page, evil)
    done(page)
    page.get_by_role("tab", name="Keep and share").click()
    expect(page.locator("#command")).to_contain_text("<b>bold</b>")
    page.get_by_role("tab", name="Chat over the pruned cache").click()
    page.locator("#chat_text textarea").fill(evil)
    page.locator("#chat_send").click()
    expect(page.locator("#chat_log")).to_contain_text("<b>bold</b>", timeout=PATIENCE)
    expect(page.locator("#chat_status")).to_contain_text("MiB", timeout=PATIENCE)
    assert page.locator("#chat_log b, #figures2 b, #chat_log img[src=x], #command img").count() == 0


def test_a_strategy_that_raises_fails_alone(page):
    choose(page, "pruner1", "broken")
    expect(page.locator("#figures1")).to_contain_text("Did not run", timeout=PATIENCE)
    page.locator("#ask").click()
    expect(page.locator("#figures1")).to_contain_text("incident", timeout=PATIENCE)
    says(page, 0, "triangle")
    expect(page.locator("#figures2")).to_contain_text("64 of 576")
    nothing_leaks(page)


def test_two_tabs_see_nothing_of_each_other(browser, server):
    with tab(browser, server) as one, tab(browser, server, "picture=scene-1&question=What+does+the+text+say%3F") as two:
        done(one)
        done(two)
        one.locator("#gallery button").nth(2).click()
        upload(two, "confidential7731.png", png())
        done(two, "confidential7731.png is ready")
        expect(one.locator("#question textarea")).to_have_value(re.compile("blue square"), timeout=PATIENCE)
        one.locator("#question textarea").fill("What word is written in the picture?")
        two.locator("#question textarea").fill("Is there a red star?")
        one.locator("#ask").click()
        two.locator("#ask").click()
        says(one, 0, "blue")
        expect(answer(two, 0)).not_to_have_value("", timeout=PATIENCE)
        done(two)
        assert "confidential7731" not in one.content() and "scene-2" not in two.url


def test_a_run_is_stopped_in_the_middle(browser, slow_server):
    with tab(browser, slow_server) as page:
        expect(answer(page, 0)).to_have_value(re.compile(r"\w+ \w+ \w+"), timeout=PATIENCE)
        page.locator("#stop").click()
        done(page, "Stopped.")
        # figures come when a run is over
        expect(page.locator("#figures0")).to_contain_text("576 of 576")
        so_far = answer(page, 0).input_value()
        assert 3 <= len(so_far.split()) < 400
        # no later column was asked
        assert answer(page, 1).input_value() == answer(page, 2).input_value() == ""
        # and the page goes on to serve
        page.locator("#ask").click()
        expect(answer(page, 0)).not_to_have_value(so_far, timeout=PATIENCE)
        page.locator("#stop").click()
        done(page, "Stopped.")


def test_a_run_that_waits_says_so_and_is_stopped(browser, slow_server):
    """The second tab's question leaves the line; the first tab's answer goes on."""
    with tab(browser, slow_server) as one, tab(browser, slow_server) as two:
        expect(answer(one, 0)).to_have_value(re.compile(r"\w+ \w+ \w+"), timeout=PATIENCE)
        done(two, "Waiting: 1 other run is before yours")
        two.locator("#stop").click()
        done(two, "Stopped.")
        # on a busy machine its first column may be complete by now
        so_far = [answer(one, n).input_value() for n in range(3)]
        until(lambda: [answer(one, n).input_value() for n in range(3)] != so_far, "the first tab's answers do not go on")
        assert answer(two, 0).input_value() == ""
        # a chat waits in the same line
        two.get_by_role("tab", name="Chat over the pruned cache").click()
        two.locator("#chat_text textarea").fill(QUESTION)
        two.locator("#chat_send").click()
        expect(two.locator("#chat_status")).to_contain_text("Waiting: 1 other run")
        two.locator("#stop").click()
        expect(two.locator("#chat_status")).to_contain_text("Stopped.")
        expect(two.locator("#chat_text textarea")).to_have_value(QUESTION)
        one.locator("#stop").click()
        done(one, "Stopped.")
        two.locator("#ask").click()
        expect(answer(two, 0)).to_have_value(re.compile(r"\w+ \w+ \w+"), timeout=PATIENCE)
        two.locator("#stop").click()
        done(two, "Stopped.")


def test_the_model_loads_behind_a_progress_bar(browser):
    there = threading.Event()
    keeper = Keeper(load=lambda: there.wait(PATIENCE) and running.load(None, "cpu", "auto", "sdpa", False))
    demo, address = start(block=False, keeper=keeper)
    try:
        with tab(browser, address) as page:
            expect(page.locator("#loading progress")).to_have_attribute("max", "100")
            expect(page.locator("#loading")).to_contain_text("Loading the model")
            done(page, "The model is being loaded")
            there.set()
            says(page, 0, "triangle")
            expect(page.locator("#loading progress")).to_have_count(0)
    finally:
        there.set()
        demo.close()


def test_a_closed_tab_leaves_nothing(browser, blocks):
    """Neither its upload nor gradio's copy of its page."""
    held = blocks.state_holder.session_data
    until(lambda: not held, "tabs of other tests are still there")
    with tab(browser, blocks.local_url) as page:
        done(page)
        upload(page, "secret4711.png", png())
        done(page, "secret4711.png is ready")
        assert len(held) == 1 and uploads("secret4711.png")
    until(lambda: not held and not uploads("secret4711.png"), "the upload of a closed tab is still there")


def uploads(name):
    """Where files of this name lie in sessions' folders."""
    return list(Path(tempfile.gettempdir()).glob(f"vtprune-demo-*/*/{name}"))


def test_the_keyboard_is_enough(page):
    """Everything has a name; Tab reaches the question, Enter asks, arrows move the slider."""
    question = page.locator("#question textarea")
    question.focus()
    question.fill("What word is written in the picture?")
    page.keyboard.press("Enter")
    says(page, 0, "open")
    page.locator("#stage input[type=range]").focus()
    before = page.locator("#place textarea, #place input").input_value()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#place textarea, #place input")).not_to_have_value(before)
    for control in page.locator("button:visible, input:visible, textarea:visible").all():
        assert control.evaluate(NAMED), control.evaluate("e => e.outerHTML.slice(0, 300)")


def test_a_phone_has_room_for_all(browser, server):
    with tab(browser, server, device_scale_factor=2, has_touch=True, color_scheme="dark") as page:
        page.set_viewport_size({"width": 375, "height": 800})
        done(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
        assert page.locator("#image0").bounding_box()["width"] > 250


def nothing_leaks(page):
    """No path of the server and no traceback; gradio's own addresses of the pictures it shows name its cache."""
    assert "/tmp/" not in page.locator("body").inner_text()
    for word in ("Traceback", "site-packages", SECRET, "vtprune-demo-", str(Path.home()), str(Path(__file__).parents[1])):
        assert word not in page.content(), word
