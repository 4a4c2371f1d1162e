"""What the site adds to the pages: links out of them. `make docs` builds it without warnings."""

import logging
import re
import shutil
import subprocess
from types import SimpleNamespace

import pytest

from tests.helpers import ROOT, script
from tests.helpers.pages import PAGES, text_of

links = script("docs/hooks/links.py")


@pytest.fixture(autouse=True)
def heard(monkeypatch):
    """import-linter, which another test runs in this process, disables the loggers that are there before it."""
    monkeypatch.setattr(links.log, "disabled", False)


def test_every_page_has_its_place():
    placed = re.findall(r"^ +- .+: (\S+\.md)$", text_of("mkdocs.yml"), re.MULTILINE)
    assert sorted(f"docs/{path}" for path in placed) == [page for page in PAGES if page.startswith("docs/")]


@pytest.mark.parametrize(
    ("page", "link", "led"),
    [
        ("cpu.md", "[a](../CONTRIBUTING.md)", "[a]({address}/blob/main/CONTRIBUTING.md)"),
        ("cpu.md", "[a](../README.md#speed)", "[a]({address}/blob/main/README.md#speed)"),
        ("notes/a.md", "[a](../../tests)", "[a]({address}/blob/main/tests)"),
        ("notes/a.md", "[a](../cpu.md#speed)", "[a](../cpu.md#speed)"),
    ],
)
def test_links_out_of_the_pages(page, link, led, caplog, monkeypatch):
    monkeypatch.setattr(links.Path, "exists", lambda path: True)
    of = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    found = links.on_page_markdown(link, of, None, None)
    assert found == led.format(address=links.address())
    assert not caplog.records


def test_a_link_to_a_file_that_is_missing_is_told(caplog):
    of = SimpleNamespace(file=SimpleNamespace(src_uri="a.md"))
    links.on_page_markdown("[a](../no/such.md)", of, None, None)
    assert [(record.levelno, record.message) for record in caplog.records] == [
        (logging.WARNING, "a.md links to no/such.md, which the repository has not")
    ]


FRAME = """
globalThis.window = globalThis
window.Worker = "the browser's"
window.location = { protocol: process.argv[1] }
const scope = new EventTarget()
scope.MessageEvent = MessageEvent
scope.document = { createElement: () => ({}), body: { append: (script) => script.onload(console.log(script.src)) } }
window.document = { createElement: () => ({ contentWindow: scope }), body: { append() {} } }
require("vm").runInThisContext(require("fs").readFileSync(process.argv[2], "utf8"))
if (Worker === "the browser's") console.log(Worker)
else {
  const worker = new Worker("worker.js")
  scope.addEventListener("message", (event) => scope.postMessage("answer to " + event.data))
  worker.addEventListener("message", (event) => console.log(event.data))
  worker.postMessage("query")
}
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="the script runs in node")
@pytest.mark.parametrize(
    ("protocol", "said"), [("https:", "the browser's\n"), ("file:", "worker.js\nanswer to query\n")]
)
def test_pages_that_were_opened_as_files_have_a_worker_for_the_search(protocol, said):
    (name,) = re.findall(r"^  polyfills: \[(.+?)\]", text_of("mkdocs.yml"), re.MULTILINE)
    command = ["node", "-e", FRAME, protocol, str(ROOT / "docs" / name)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == said


@pytest.mark.parametrize(
    ("html", "told"),
    [
        ('<script src="https://elsewhere.org/a.js"></script>', True),
        ('<script src="//elsewhere.org/a.js"></script>', True),
        ('<img alt="" src="http://elsewhere.org/a.png">', True),
        ('<link rel="stylesheet" href="https://elsewhere.org/a.css">', True),
        ('<script src="assets/a.js"></script><link rel="stylesheet" href="a.css">', False),
        ('<a href="https://elsewhere.org">elsewhere</a>', False),
    ],
)
def test_what_a_page_would_load_from_another_host_is_told(html, told, caplog):
    links.on_post_page(html, SimpleNamespace(file=SimpleNamespace(src_uri="a.md")), None)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * told


def test_the_address_of_the_readme_is_the_repository_s():
    assert re.findall(r"git clone (\S+)", text_of("README.md")) == [links.address()]
