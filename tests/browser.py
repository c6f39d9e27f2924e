"""A headless Chromium for tests of pages, where there is one: apt's, or the file that CHROMIUM names."""

import os
import shutil
from contextlib import contextmanager

import pytest

WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}


def chromium() -> str | None:
    return os.environ.get("CHROMIUM") or next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None
    )


@contextmanager
def browser():
    """A browser that can reach nothing but files of this machine; skips, and says why, where there is
    none.
    """
    path = chromium()
    if path is None:
        pytest.skip("no Chromium here: apt-get install chromium, or name its file in CHROMIUM")
    playwright = pytest.importorskip("playwright.sync_api", reason="the extra `test` has playwright")
    with playwright.sync_playwright() as p:
        found = p.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--allow-file-access-from-files"]
        )
        try:
            yield found
        finally:
            found.close()


def watched(context, own):
    """A page, and what goes wrong in it: errors of scripts, of its console, and every request whose
    address does not begin with `own`, or that is answered with an error.
    """
    page, wrong = context.new_page(), []
    page.on(
        "console", lambda m: wrong.append(f"console: {m.text}") if m.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda e: wrong.append(f"script: {e}"))
    page.on(
        "request",
        lambda r: None if r.url.startswith((own, "data:", "blob:")) else wrong.append(f"asks {r.url}"),
    )
    page.on("response", lambda r: wrong.append(f"{r.status} {r.url}") if r.status >= 400 else None)
    return page, wrong


@contextmanager
def page_of(found, width="desktop", scheme="light"):
    """A page that keeps what went wrong in it: errors of scripts, of its console, and every request that is
    no file.
    """
    size = WIDTHS[width]
    context = found.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, reduced_motion="reduce"
    )
    page, wrong = watched(context, "file:")
    page.on("requestfailed", lambda r: wrong.append(f"failed {r.url}"))
    try:
        yield page, wrong
    finally:
        context.close()


# What sticks out of the window to the right, and is not in a box that scrolls by itself.
OVERFLOW = """() => {
  if (document.documentElement.scrollWidth <= window.innerWidth) return [];
  const scrolls = (e) => e && e !== document.documentElement && e !== document.body &&
    (/auto|scroll|hidden|clip/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  return [...document.querySelectorAll("body *")]
    .filter((e) => e.getBoundingClientRect().right > window.innerWidth + 1 && !scrolls(e.parentElement))
    .map((e) => `${e.tagName}.${e.className} ${(e.textContent || "").slice(0, 40)}`).slice(0, 5)
    .concat(`scrollWidth ${document.documentElement.scrollWidth}`);
}"""
