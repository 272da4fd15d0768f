"""Wikipedia dump -> plain article text."""

from __future__ import annotations

import bz2
import html
import io
import re
from xml.etree import ElementTree

_COMMENT = re.compile(r"<!--.*?-->", re.S)
_DROPPED_TAGS = re.compile(
    r"<(ref|math|gallery|table|timeline|source|score|imagemap|div)\b[^>]*?(/>|>.*?</\1\s*>)", re.S | re.I
)
_TAG = re.compile(r"</?[a-zA-Z][^>]*>")
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\|).)*?\|\}", re.S)
_FILE_LINK = re.compile(r"\[\[(?:File|Image|Category|[a-z-]{2,12}):[^\[\]]*(?:\[\[[^\[\]]*\]\][^\[\]]*)*\]\]", re.I)
_LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]")
_WEB_LINK = re.compile(r"\[(?:https?|ftp)://\S+\s*([^\]]*)\]")
_HEADING = re.compile(r"^=+\s*(.*?)\s*=+\s*$", re.M)
_LAST_SECTIONS = re.compile(
    r"^==\s*(See also|References|Notes|External links|Further reading|Bibliography|Footnotes)\s*==.*",
    re.M | re.S,
)
_QUOTES = re.compile(r"'{2,5}")
_BULLET = re.compile(r"^[*#:;|!]+\s*", re.M)
_BLANK_LINES = re.compile(r"\n\s*\n+")


def articles(dump: bytes, at_least_chars: int = 1500) -> list[tuple[str, str]]:
    """(title, plain text) of every article of a bz2 dump that is not a redirect or a stub, in dump order."""
    pages: list[tuple[str, str]] = []
    for _, element in ElementTree.iterparse(io.BytesIO(bz2.decompress(dump)), events=("end",)):
        if element.tag.rpartition("}")[2] != "page":
            continue
        title = _child_text(element, "title")
        source = _child_text(element, "text")
        element.clear()
        if ":" in title or source.lstrip().lower().startswith("#redirect"):
            continue
        text = plain_text(source)
        if len(text) >= at_least_chars:
            pages.append((title, text))
    return pages


def plain_text(source: str) -> str:
    """Prose of one article: no templates, tables, references, markup or closing link sections."""
    text = _DROPPED_TAGS.sub("", _COMMENT.sub("", source))
    text = _LAST_SECTIONS.sub("", text)
    text = _until_stable(_TEMPLATE, text)
    text = _until_stable(_TABLE, text)
    text = _FILE_LINK.sub("", text)
    text = _until_stable(_LINK, text, r"\1")
    text = _QUOTES.sub("", _WEB_LINK.sub(r"\1", text))
    text = _BULLET.sub("", _HEADING.sub(r"\1", _TAG.sub("", text)))
    text = html.unescape(html.unescape(text)).replace("\xa0", " ").replace("()", "")
    return _BLANK_LINES.sub("\n\n", text).strip()


def _until_stable(pattern: re.Pattern[str], text: str, replacement: str = "") -> str:
    while (shorter := pattern.sub(replacement, text)) != text:
        text = shorter
    return text


def _child_text(page: ElementTree.Element, name: str) -> str:
    return next((child.text or "" for child in page.iter() if child.tag.rpartition("}")[2] == name), "")
