"""Takes the README's picture of a report: the page at desktop width, in Debian's Chromium.

    python scripts/making/report_picture.py output/demo/report.html docs/report.png

Needs what scripts/making/install_browser.sh installs.
"""

import argparse
import base64
import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

FLAGS = "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run " + (
    "--disable-background-networking --disable-component-update --disable-sync --hide-scrollbars"
)
WAIT_FOR_PICTURES = """
const done = arguments[arguments.length - 1];
document.getElementById("tab-redundant")?.click();
document.querySelectorAll("img").forEach(picture => { picture.loading = "eager"; });
Promise.all([...document.images].map(picture => picture.decode())).then(() => done());
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--height", type=int, default=1780)
    parser.add_argument("--dark", action="store_true")
    arguments = parser.parse_args()
    picture = screenshot(arguments.page, arguments.height, arguments.dark)
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    # 256 colors are enough for a page, and a quarter of the bytes.
    picture.quantize(256, dither=Image.Dither.NONE).save(arguments.picture, optimize=True)
    print(f"{arguments.picture}: {arguments.picture.stat().st_size / 1000:.0f} kB")


def screenshot(page: Path, height: int, dark: bool) -> Image.Image:
    """The first ``height`` pixels of the page, 1280 wide."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    with tempfile.TemporaryDirectory() as profile:
        for flag in [*FLAGS.split(), f"--user-data-dir={profile}", "--window-size=1280,900"]:
            options.add_argument(flag)
        service = Service(shutil.which("chromedriver"))
        with webdriver.Chrome(options=options, service=service) as browser:
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
            browser.get(page.resolve().as_uri())
            browser.execute_async_script(WAIT_FOR_PICTURES)
            clip = {"x": 0, "y": 0, "width": 1280, "height": height, "scale": 1}
            taken = browser.execute_cdp_cmd(
                "Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip}
            )
    return Image.open(io.BytesIO(base64.b64decode(taken["data"]))).convert("RGB")


if __name__ == "__main__":
    main()
