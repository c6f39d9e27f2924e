"""The whole site as it is built: every link leads somewhere, nothing is loaded from elsewhere, every picture
of the notebooks has its place. In a browser no page is too wide, none has an error, and all can be used
without a mouse. The quick form opens a page of every kind, `make test-deep` all of them.
"""

import json
import os
import re
from collections import Counter

import pytest

from refimpl.pages import layouts
from refimpl.pages.scaled import SCALED
from refimpl.tiny import GGUF_DIR
from tests.browser import OVERFLOW, WIDTHS, browser, watched
from tests.sites import Page, broken_links, once, served
from tests.test_docs import tool

DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "deep"
PARTS = 16 if DEEP else 1
"""Tests that share the pages, so that processes can share the tests."""
WAYS = [("desktop", "light"), ("desktop", "dark"), ("phone", "dark"), ("phone", "light")]
"""Each differs from the one before it, and the first from the last, in one thing."""
KINDS = (
    "index.html",
    "touch.html",
    "formats.html",
    "formats/q4_k.html",
    "blocks/q4_k.html",
    "blocks/e4m3.html",
    "blocks/walk.html",
    "notebooks/01_floats_in_a_byte.html",
    "model.html",
    "arithmetic.html",
    "field.html",
    "errors.html",
    "api/refimpl.ops.html",
    "source/refimpl/ops.py.html",
)
SPOKEN = ("formats/q4_k.html", "blocks/q4_0.html", "notebooks/01_floats_in_a_byte.html")
"""What axe reads in the quick form; it takes seconds for a page of many buttons."""
WCAG = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]
COLOURS = {"type": "rule", "values": ["color-contrast", "link-in-text-block"]}
"""The rules of WCAG whose answer depends on the scheme."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return once(tmp_path_factory)


@pytest.fixture(scope="module")
def pages(site):
    return {p.relative_to(site).as_posix(): Page(p.read_text()) for p in sorted(site.rglob("*.html"))}


# --- without a browser --------------------------------------------------------------------------------------


def test_every_link_and_every_place_is_there(site, pages):
    assert len(pages) > 300 and broken_links(site, pages) == []


def test_a_broken_link_would_be_found(tmp_path):
    (tmp_path / "a.html").write_text("")
    there = {
        "a.html": Page(
            '<a href="a.html#x" id="y"></a><a href="#y"></a><a href="b.html"></a><img src="c.png">'
        )
    }
    assert broken_links(tmp_path, there) == [
        "a.html: a.html#x is no place",
        "a.html: b.html is no file",
        "a.html: c.png is no file",
    ]


def test_nothing_is_loaded_from_elsewhere(site, pages):
    assert [(name, load) for name, page in pages.items() for load in page.loads if "//" in load] == []
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//", sheet.read_text()), sheet
    ours = [p for p in site.rglob("*.js") if "assets" not in p.relative_to(site).parts]
    assert ours and not any(
        re.search(r"https?://|fetch\(|XMLHttpRequest|WebSocket", p.read_text()) for p in ours
    )


def test_a_page_has_one_title_its_language_and_words_for_its_pictures(pages):
    for name, page in pages.items():
        assert page.lang == "en" and page.headings.count(1) == 1 and not page.unspoken, name
        assert not [i for i, count in Counter(page.ids).items() if count > 1], name


def test_every_format_has_a_page_to_touch_that_its_page_leads_to(pages):
    for name in (*layouts.BLOCKS, *layouts.FLOATS):
        told, touched = f"formats/{name.lower()}.html", f"blocks/{name.lower()}.html"
        assert touched in pages["touch.html"].links
        if name not in SCALED:  # FP8 with its scales has no page of the formats
            assert f"../{touched}" in pages[told].links and f"../{told}" in pages[touched].links
    assert "blocks/walk.html" in pages["touch.html"].links


def test_every_picture_of_the_notebooks_has_its_place_or_a_reason(pages):
    notebooks = tool("notebooks")
    used = [number for numbers in notebooks.PICTURES.values() for number in numbers]
    assert Counter([*used, *notebooks.NOT_USED]) == Counter(list(notebooks.pictures())) and all(
        notebooks.NOT_USED.values()
    )
    for page, numbers in notebooks.PICTURES.items():
        html = page.replace(".md", ".html")
        shown = {load.rsplit("/", 1)[-1] for load in pages[html].loads}
        assert {notebooks.pictures()[n].path.rsplit("/", 1)[-1] for n in numbers} <= shown, page


def test_a_notebook_s_page_has_its_cells_outputs_and_formulas(site):
    for path in tool("notebooks").stored():
        html = (site / "notebooks" / f"{path.stem}.html").read_text()
        cells = json.loads(path.read_text())["cells"]
        drawn = sum("image/png" in o.get("data", {}) for c in cells for o in c.get("outputs", ()))
        assert html.count('<img class="picture"') == drawn > 0
        assert html.count("<pre") >= sum(c["cell_type"] == "code" for c in cells)
        assert "\\(" not in re.sub(r"<pre.*?</pre>|<code.*?</code>|<script.*?</script>", "", html, flags=re.S)
    assert "<mfrac>" in (site / "notebooks" / "01_floats_in_a_byte.html").read_text()


def test_a_definition_leads_to_its_lines(site, pages):
    source = (site / "source" / "refimpl" / "ops.py.html").read_text()
    line = re.search(
        r'href="\.\./source/refimpl/ops\.py\.html#L(\d+)"[^>]*>refimpl/ops\.py:\1<',
        (site / "api" / "refimpl.ops.html").read_text(),
    )
    shown = re.search(rf'<span id="L{line[1]}">(.*?)\n', source)[1]
    assert "class" in re.sub("<[^>]+>", "", shown) and "Op" in shown


# --- in a browser -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opened(site):
    """(browser, address of the site), with nothing in the index of its search: each page that is opened
    reads all of it, which takes as long as everything else of a page.
    """
    path = "search/search_index.json"
    index = json.dumps(json.loads((site / path).read_text()) | {"docs": []}).encode()
    with browser() as found, served(site, {path: index}) as base:
        yield found, base


@pytest.mark.parametrize("part", range(PARTS))
def test_no_page_is_too_wide_and_none_has_an_error(opened, pages, part):
    """A page is loaded once, in one of four ways by turns, and then looked at in all four."""
    found, base = opened
    context, bad = found.new_context(reduced_motion="reduce"), {}
    page, wrong = watched(context, base)
    for n, name in enumerate((sorted(pages) if DEEP else KINDS)[part::PARTS]):
        for width, scheme in WAYS[n % 4 :] + WAYS[: n % 4]:
            page.set_viewport_size(dict(zip(("width", "height"), WIDTHS[width])))
            page.emulate_media(color_scheme=scheme)
            if page.url != base + name:
                page.goto(base + name)
            wrong += [f"{width} {scheme}: {what}" for what in page.evaluate(OVERFLOW)]
        if wrong:
            bad[name] = wrong[:]
            wrong.clear()
    context.close()
    assert bad == {}


def test_a_page_from_the_disk_has_no_search_and_no_error(opened, site):
    found, _ = opened
    context = found.new_context()
    page, wrong = watched(context, "file:")
    page.goto((site / "formats" / "q4_k.html").as_uri())
    assert page.locator("[data-md-component=search]").count() == 0 and page.inner_text("h1").startswith(
        "Q4_K"
    )
    page.click("text=Touch its bits")
    page.click('#bits a[href="#quirks"]')
    assert "96 bits" in page.inner_text("#quirks") and "an expert of the embedded model" in page.inner_text(
        "#note"
    )
    page.click('[aria-label^="byte 40 bit 2:"]')
    assert "changed 1 of 256 weights" in page.inner_text("#told") and not wrong
    page.set_input_files("#file", str(next(GGUF_DIR.glob("*.gguf"))))
    page.locator("#list").wait_for()
    page.select_option("#tensor", "output.weight")
    page.locator("#told", has_text="the tensor output.weight in the file").wait_for()
    assert page.is_hidden("#note") and page.is_visible("text=Pages to touch")  # the way back stays
    assert "What is odd about Q6_K" in page.inner_text("#quirks") and not wrong
    context.close()


def test_the_search_finds_a_page(opened, site):
    found, _ = opened
    context = found.new_context(reduced_motion="reduce")
    with served(site) as base:
        page, wrong = watched(context, base)
        page.goto(base + "index.html")
        page.keyboard.press("/")
        page.keyboard.type("six bits in twelve bytes")
        page.locator(".md-search-result__link").first.wait_for(timeout=20_000)
        assert "03_inside_q4_k" in " ".join(
            link.get_attribute("href") for link in page.locator(".md-search-result__link").all()[:5]
        )
        assert not wrong
        context.close()


@pytest.mark.parametrize("name", KINDS if DEEP else SPOKEN)
def test_pages_can_be_used_with_a_keyboard_and_a_screen_reader(opened, name):
    """By axe-core's rules of WCAG 2 A and AA: names, roles, contrast, focus; colours in both schemes."""
    sync = pytest.importorskip("axe_playwright_python.sync_playwright", reason="the extra `test` has axe")
    found, base = opened
    context, bad = found.new_context(color_scheme="light", reduced_motion="reduce"), {}
    page = context.new_page()
    page.goto(base + name)
    for scheme, rules in (("light", WCAG), ("dark", COLOURS)):
        page.emulate_media(color_scheme=scheme)
        told = sync.Axe().run(page, options={"runOnly": rules}).response
        assert "color-contrast" in [p["id"] for p in told["passes"]]
        bad[scheme] = [
            (v["id"], len(v["nodes"]), v["nodes"][0]["html"][:160], v["nodes"][0]["failureSummary"][:300])
            for v in told["violations"]
        ]
    context.close()
    assert bad == {"light": [], "dark": []}
