"""Links out of the folder of pages lead to the repository, whose address stands in pyproject.toml alone.

Every page is looked through for what it would load from another host.
"""

import logging
import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\((\.\./[^)\s#]*)(#[^)\s]*)?\)")
LOADED = re.compile(
    r'<(?:script|img|iframe|source)\b[^>]*\bsrc="(?:https?:)?//[^"]*|<link\b[^>]*\bhref="https?://[^"]*'
)

log = logging.getLogger("mkdocs.hooks.links")


def address() -> str:
    """Return the repository's address."""
    (found,) = re.findall(r'^Repository = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    return found


def on_config(config):
    config.repo_url, config.repo_name = address(), address().split("/", 3)[3]
    return config


def on_page_markdown(markdown, page, config, files):
    folder = posixpath.dirname(page.file.src_uri)

    def led(match):
        path, anchor = posixpath.normpath(posixpath.join("docs", folder, match[1])), match[2] or ""
        if path.startswith("docs/"):
            return match[0]
        if not (ROOT / path).exists():
            log.warning("%s links to %s, which the repository has not", page.file.src_uri, path)
        return f"]({address()}/blob/main/{path}{anchor})"

    return LINK.sub(led, markdown)


def on_post_page(output, page, config):
    for found in LOADED.findall(output):
        log.warning("%s loads from another host: %s", page.file.src_uri, found)
    return output
