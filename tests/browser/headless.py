"""A headless Chromium, if there is one, driven by its command line: nothing is installed or downloaded."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
"""Path of the browser, or None."""
AXE = os.environ.get("AXE_CORE")
"""Path of axe.min.js of the npm package axe-core, or None."""
_TIMEOUT_S, _LOADING_MS = 120, 120_000  # the latter by the clock of the page, which runs ahead
_DARK = "--blink-settings=preferredColorScheme=0"


def screenshot(page: Path, image: Path, width: int, height: int, dark: bool = False) -> None:
    """Save what a window of this size shows; a narrow page is framed, as windows have a minimum width."""
    _chromium(
        _framed(page, width, height).as_uri(),
        f"--screenshot={image}",
        f"--window-size={max(width, 500)},{height}",
        *([_DARK] if dark else []),
    )


def visited(url: str, image: Path, width: int = 1500, height: int = 1000) -> str:
    """Open a page of a server, save what its window shows, and return its elements as HTML."""
    options = (f"--virtual-time-budget={_LOADING_MS}", f"--window-size={width},{height}")
    _chromium(url, *options, f"--screenshot={image}")
    return _chromium(url, *options, "--dump-dom")


def printed(page: Path, pdf: Path) -> None:
    """Print a page."""
    _chromium(page.as_uri(), f"--print-to-pdf={pdf}", "--no-pdf-header-footer")


def measured(page: Path, width: int, script: str, dark: bool = False) -> Any:
    """Return the value of an asynchronous function body in a page of this width, as JSON."""
    copy = page.with_name(f"{page.stem}-script.html")
    run = f"<script>(async () => {{ {script} }})().then(value => document.body.dataset.result = JSON.stringify(value))"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{run}</script></body>"), encoding="utf-8")
    options = ("--dump-dom", "--virtual-time-budget=30000", f"--window-size={width},900", *([_DARK] if dark else []))
    dom = _chromium(copy.as_uri(), *options)
    found = re.search(r'data-result="([^"]*)"', dom)
    assert found, dom[-2000:]
    return json.loads(html.unescape(found[1]))


def violations(page: Path, axe: Path, dark: bool = False) -> list[str]:
    """Return what axe-core finds in a page."""
    with_axe = page.with_name(f"{page.stem}-axe.html")
    source = axe.read_text(encoding="utf-8").replace("</script", "<\\/script")
    text = page.read_text(encoding="utf-8")
    with_axe.write_text(text.replace("</head>", f"<script>{source}</script></head>"), encoding="utf-8")
    script = (
        "const found = await axe.run(document, {resultTypes: ['violations']});"
        "return found.violations.map(v => v.id + ': ' + v.nodes.slice(0, 3).map(n => n.html.slice(0, 200)).join(' | '))"
    )
    result: list[str] = measured(with_axe, 1200, script, dark)
    return result


def _framed(page: Path, width: int, height: int) -> Path:
    if width >= 500:
        return page
    frame = page.with_name(f"{page.stem}-{width}.html")
    style = f"border: 0; width: {width}px; height: {height}px"
    frame.write_text(
        f'<meta name="color-scheme" content="light dark"><body style="margin: 0"><iframe src="{page.name}" '
        f'style="{style}"></iframe>'
    )
    return frame


def _chromium(url: str, *options: str) -> str:
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *options, url]
    run = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout
