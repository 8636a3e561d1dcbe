"""The report in a real browser: light, dark, printed and on a phone; and what axe-core says of it.

`BROWSER_SHOTS=FOLDER` keeps the screenshots; `AXE_CORE=PATH/axe.min.js` names axe-core. Nothing is downloaded.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from headless import AXE, BROWSER, measured, printed, screenshot, violations

from report_pages import page

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no headless browser")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a report in a folder for pictures of it."""
    folder = Path(os.environ.get("BROWSER_SHOTS") or tmp_path_factory.mktemp("report"))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "report.html"
    file.write_text(page(), encoding="utf-8")
    return file


@pytest.mark.parametrize(("name", "dark"), [("light", False), ("dark", True)])
def test_the_page_is_as_light_as_the_user_wants_it(report: Path, name: str, dark: bool) -> None:
    image = report.with_name(f"{name}.png")
    screenshot(report, image, 1280, 1800, dark)
    corner = Image.open(image).convert("L").getpixel((2, 2))
    assert (corner < 60) == dark


def test_nothing_is_wider_than_a_phone(report: Path) -> None:
    screenshot(report, report.with_name("phone.png"), 390, 2400)
    script = (
        "const frame = document.createElement('iframe'); frame.style.width = '390px';"
        "frame.srcdoc = document.documentElement.outerHTML.replace(/<script[^]*?<\\/script>/g, '');"
        "await new Promise(done => { frame.onload = done; document.body.append(frame); });"
        "return frame.contentDocument.documentElement.scrollWidth"
    )
    assert measured(report, 1000, script) <= 390


def test_it_is_printed_on_pages(report: Path) -> None:
    pdf = report.with_name("report.pdf")
    printed(report, pdf)
    assert pdf.read_bytes().count(b"/Type /Page\n") + pdf.read_bytes().count(b"/Type /Page/") >= 4


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.skipif(AXE is None, reason="AXE_CORE does not name axe.min.js")
def test_axe_finds_nothing(report: Path, dark: bool) -> None:
    assert AXE is not None
    assert violations(report, Path(AXE), dark) == []
