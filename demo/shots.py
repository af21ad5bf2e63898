"""Screenshots and a short film of the demo, taken in headless Chromium: `python demo/shots.py [FOLDER]`, default assets/."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from vtprune.cli.demoing import folder, load

PATIENCE = 600_000
expect.set_options(timeout=PATIENCE)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
START = "picture=scene-0&question=What+shape+is+the+white+object%3F&column=none:576&column=flowcut:64&column=fastv:192"
PHONE = "picture=scene-1&question=What+does+the+text+say%3F&column=flowcut:64&column=random:64"
CLIP = "picture=needle&question=What+color+is+the+star%3F&column=none:1152&column=quota:288&column=fastv:432"


def main(target: Path) -> None:
    """Start the demo, take all pictures, write them into `target`."""
    serving = load(folder())
    _, address = serving.start(block=False)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS, timeout=PATIENCE)

        def visit(query: str, width: int, height: int, **options) -> Page:
            page = browser.new_context(viewport={"width": width, "height": height}, **options).new_page()
            page.set_default_timeout(PATIENCE)
            page.goto(f"{address}?{query}", timeout=PATIENCE)
            expect(page.locator("#status")).to_contain_text("Done", timeout=PATIENCE)
            # pictures further down are loaded when they come into sight
            for part in ("#column1", "#story", "#ask"):
                page.locator(part).scroll_into_view_if_needed()
                page.wait_for_timeout(400)
            page.evaluate("scrollTo(0, 0)")
            page.wait_for_timeout(400)
            return page

        desktop = visit(START + "&column=visionzip:64&stage=16", 1400, 1780)
        keep(desktop.screenshot(), target / "demo-desktop.png")
        keep(visit(START + "&stage=10", 1200, 1780, color_scheme="dark").screenshot(), target / "demo-dark.png")
        phone = visit(PHONE, 390, 844, device_scale_factor=2, has_touch=True)
        keep(phone.screenshot(full_page=True), target / "demo-phone.png", width=390)
        clip = visit(CLIP, 1200, 1560)
        to_the_columns(clip)
        keep(clip.screenshot(), target / "demo-clip.png", width=1000)
        film(visit(START, 1100, 900), target / "demo.gif")
        browser.close()


def film(page: Page, path: Path) -> None:
    """The stage slider from the encoder to the cache, then the budget of one column."""
    to_the_columns(page)
    frames: list[Image.Image] = []

    def snap() -> None:
        page.wait_for_function("[...document.querySelectorAll('.vt-overlay img')].every(image => image.complete)")
        page.wait_for_timeout(500)
        frames.append(Image.open(io.BytesIO(page.screenshot())).convert("RGB").resize((733, 600), Image.Resampling.LANCZOS))

    for stage in (0, 2, 4, 6, 8, 10, 12, 16):
        write(page, "stage", stage)
        title = f"after vision block {stage}" if stage < 8 else f"at decoder layer {stage - 9}"
        for column in range(3):
            expect(page.locator(f"#caption{column}")).to_contain_text("entering" if stage == 8 else title, timeout=PATIENCE)
        snap()
    for budget in (32, 16, 8, 4):
        write(page, "keep1", budget)
        expect(page.locator("#figures1")).to_contain_text(f"{budget} of 576", timeout=PATIENCE)
        snap()
    # one palette for all, so that what does not change costs nothing
    palette = frames[6].quantize(255, method=Image.Quantize.MEDIANCUT, kmeans=2)
    small = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    small[0].save(path, save_all=True, append_images=small[1:], duration=[700] * 11 + [2500], loop=0, optimize=True)
    print(path, path.stat().st_size // 1000, "kB")


def to_the_columns(page: Page) -> None:
    """Scroll to the stage slider and what is below it."""
    page.locator("#stage").evaluate("element => scrollBy(0, element.getBoundingClientRect().top - 12)")


def write(page: Page, slider: str, value: int) -> None:
    box = page.locator(f"#{slider} input[type=number]")
    box.fill(str(value))
    box.press("Tab")


def keep(shot: bytes, path: Path, width: int | None = None) -> None:
    """Save with a palette of the picture's own, mixed where it lacks a colour: greys stay grey."""
    picture = Image.open(io.BytesIO(shot)).convert("RGB")
    if width is not None and picture.width > width:
        picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    picture.quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=2).save(path, optimize=True)
    print(path, path.stat().st_size // 1000, "kB", picture.size)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1] / "assets")
