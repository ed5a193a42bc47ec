"""The project's description for a package index, where links and pictures of the README's own folder lead nowhere.

All else stands in pyproject.toml. With an address under `Repository` in `[project.urls]` the links lead there; without
one, as now, only their texts stay.
"""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
_PICTURE = re.compile(r'<picture>.*?<img alt="([^"]*)" src="([^"]*)".*?</picture>\n\n', re.S)
_LINK = re.compile(r"\[([^\]]*)\]\((?!https?://|#)([^)\s]+)\)")
_COMMENT = re.compile(r"^<!--.*?-->\n", re.M | re.S)


def describe(readme: str, address: str | None) -> str:
    """The README as a package index can show it.

    Args:
        readme: Its Markdown.
        address: Where the repository's files can be read, or None.
    """
    text = _COMMENT.sub("", readme)
    if address is None:
        return _LINK.sub(r"\1", _PICTURE.sub("", text))
    base = address.rstrip("/")
    text = _LINK.sub(rf"[\1]({base}/blob/HEAD/\2)", text)
    return _PICTURE.sub(rf"![\1]({base}/raw/HEAD/\2)\n\n", text)


if __name__ == "__main__":
    found = re.search(r'^Repository = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    setup(
        long_description=describe((ROOT / "README.md").read_text(encoding="utf-8"), found[1] if found else None),
        long_description_content_type="text/markdown",
    )
