"""The built site for tests: built once a run, served on this machine, its links read without a browser."""

import functools
import os
import re
import threading
from contextlib import contextmanager
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

SITE = Path(__file__).parent.parent / "docs" / "site"


def built(folder: Path) -> Path:
    """The site in `folder`; strict: a warning of the build is an error."""
    for name, extra in (("material", "docs"), ("nbconvert", "docs"), ("latex2mathml", "docs")):
        pytest.importorskip(name, reason=f"the extra `{extra}`")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFIMPL_CACHE", str(folder / "cache"))
        build(load_config(str(SITE / "mkdocs.yml"), site_dir=str(folder / "site")))
    return folder / "site"


def once(tmp_path_factory) -> Path:
    """The site, built by the first process of a run that asks, for all of them."""
    from filelock import FileLock

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "whole-site"
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            built(folder)
            (folder / "done").touch()
    return folder / "site"


@contextmanager
def served(folder: Path, instead: dict[str, bytes] | None = None):
    """The address of a server of these files, on this machine alone; `instead` are {path: other content}."""

    class Quiet(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # one connection for many files

        def do_GET(self):
            other = (instead or {}).get(self.path.lstrip("/"))
            if other is None:
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Type", self.guess_type(self.path))
            self.send_header("Content-Length", str(len(other)))
            self.end_headers()
            self.wfile.write(other)

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_):
            """Nothing: a browser that leaves a page takes no more of its files."""

    server = Server(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Page(HTMLParser):
    """What a page has: ids, what it links to and loads, pictures without a text, headings."""

    LOADS = (("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("link", "href"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loads: list[str] = []
        self.unspoken: list[str] = []
        self.headings: list[int] = []
        self.lang = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if found.get("id"):
            self.ids.append(found["id"])
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        self.loads += [found[key] for kind, key in self.LOADS if tag == kind and found.get(key)]
        if tag == "img" and not found.get("alt"):
            self.unspoken.append(found.get("src", ""))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "html":
            self.lang = found.get("lang", "")


def broken_links(folder: Path, pages: dict[str, Page]) -> list[str]:
    """Links and loads of the site that lead to no file, or to no place in it."""
    wrong = []
    for name, page in pages.items():
        for target in [*page.links, *page.loads]:
            url = urlsplit(urljoin(f"http://here.invalid/{name}", target))
            if url.netloc != "here.invalid":
                continue
            path = unquote(url.path).lstrip("/") or "index.html"
            path += "index.html" if path.endswith("/") else ""
            anchor = unquote(url.fragment)
            if not (folder / path).is_file():
                wrong.append(f"{name}: {target} is no file")
            elif anchor and path in pages and anchor not in pages[path].ids and anchor != "top":
                wrong.append(f"{name}: {target} is no place")
    return wrong
