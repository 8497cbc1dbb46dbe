"""Word and HTML to Markdown: mammoth reads Word as HTML, markdownify writes HTML as Markdown. Pages lose their navigation."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from bs4 import BeautifulSoup
from markdownify import MarkdownConverter

from r1ray.errors import UnknownFormat

__all__ = ["html_to_markdown", "word_to_markdown"]

_NO_CONTENT = ("script", "style", "noscript", "template", "nav", "footer", "aside", "form", "iframe", "svg", "button")
_BLANK_LINES = re.compile(r"\n{3,}")


def word_to_markdown(path: Path) -> str:
    """Headings by their Word styles, tables with their first row as head; pictures are left out.

    Raises:
        UnknownFormat: it is no Word file, or a broken one.
    """
    import mammoth

    try:
        with path.open("rb") as file:
            images = mammoth.images.img_element(_no_image)
            html = mammoth.convert_to_html(file, style_map="p[style-name='Title'] => h1:fresh", convert_image=images)
    except (zipfile.BadZipFile, KeyError, ValueError, OSError, AttributeError) as error:
        raise UnknownFormat(f"{path} is no readable Word file: {error}. Open it in Word and save it again.") from error
    return _markdown(BeautifulSoup(html.value, "html.parser"))


def html_to_markdown(path: Path) -> str:
    """The page's main part, else its body; the encoding is the one it declares."""
    page = BeautifulSoup(path.read_bytes(), "html.parser")
    title = page.title.get_text(" ", strip=True) if page.title else ""
    for element in page(_NO_CONTENT):
        element.decompose()
    body = page.find("main") or page.find("article") or page.body or page
    text = _markdown(body)
    return f"# {title}\n\n{text}" if title and not re.search(r"^# ", text, re.M) else text


def _markdown(tree: object) -> str:
    converter = MarkdownConverter(heading_style="ATX", bullets="-", table_infer_header=True, strip=["img", "a"], wrap=False)
    text: str = converter.convert_soup(tree)
    return _BLANK_LINES.sub("\n\n", "\n".join(line.rstrip() for line in text.splitlines())).strip()


def _no_image(_image: object) -> dict[str, str]:
    return {}
