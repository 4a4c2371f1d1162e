"""The pages of the documentation: what they link to, their tables, and the code that they print."""

import re
import string
from pathlib import Path
from typing import NamedTuple

from tests.helpers import ROOT

PLACES = ("*.md", ".github/*.md", "docs/**/*.md", "examples/*.md", "fastlstm/**/*.md", "csrc/*.md", "tests/**/*.md")
PAGES = sorted(path.relative_to(ROOT).as_posix() for place in PLACES for path in ROOT.glob(place) if path.is_file())
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    language: str
    text: str

    @property
    def first(self) -> str:
        """The comment in its first line, which may say how it is meant."""
        line = self.text.partition("\n")[0]
        return line.removeprefix("# ") if line.startswith("# ") else ""

    @property
    def file(self) -> str | None:
        """The name of the module that it is: its first line is `# name.py`."""
        found = re.fullmatch(r"\w+\.py", self.first)
        return found and found[0]

    @property
    def elsewhere(self) -> bool:
        """Whether it runs in a process of its own: its first line is `# in another process`."""
        return self.first == "in another process"

    @property
    def unrun(self) -> str | None:
        """Why it is not run, for readers too: its first line is `# not run here: reason`."""
        found = re.fullmatch(r"not run here: (\w.+)", self.first)
        return found and found[1]


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page in their order."""
    return [Block(*found) for found in FENCE.findall(text_of(page))]


def said(found: list[Block]) -> str:
    """What blocks say that they print: behind a call of print, or in a block of text after one of Python."""
    lines = []
    for before, (language, text) in zip([None, *found], found, strict=False):
        if language == "python":
            lines += re.findall(r"^ *print\(.*\)  # (.*)$", text, re.MULTILINE)
        elif language == "text" and before is not None and before.language in ("python", "text"):
            lines += text.splitlines()
    return "".join(f"{line}\n" for line in lines)


def rows(page: str, head: str) -> list[list[str]]:
    """The cells of the table whose first line begins so."""
    table = text_of(page).partition(f"\n{head}")[2].partition("\n\n")[0]
    return [[each.strip() for each in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", text_of(page))


def links(page: str) -> list[tuple[str, str]]:
    """(path, anchor) of each link into the repository. The path is relative to the page, and empty for itself."""
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    found = re.findall(r"\]\((?!\w+:)([^)\s#]*)(?:#([^)\s]+))?\)", text)
    found += [(path, "") for path in re.findall(r'src(?:set)?="(?!\w+:)([^"]+)"', text)]
    return [(path, anchor) for path, anchor in found if path or anchor]


KEPT = {*string.ascii_lowercase, *string.digits, *"-_ "}


def anchors(page: str) -> set[str]:
    """The anchors of a page: those that GitHub makes of its headings, and the names that `::: name` documents."""
    found, text = set(), prose(page)
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = "".join(c for c in plain if c in KEPT or c.isalpha()).replace(" ", "-")
        found.add(anchor if anchor not in found else f"{anchor}-1")
    return found | set(documented(page))


def documented(page: str) -> list[str]:
    """The names whose docstrings a page shows."""
    return re.findall(r"^(?:#+ )?::: ([\w.]+)$", text_of(page), re.MULTILINE)


def relative(page: str, path: str) -> Path:
    """The file or folder that a link of a page leads to."""
    return ((ROOT / page).parent / path).resolve()
