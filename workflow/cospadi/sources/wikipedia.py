"""Articles of a MediaWiki export as plain prose.

The markup is parsed by mwparserfromhell; what is kept or dropped is decided here, node by node, so that the result
reads like running text: no references, tables, infoboxes, captions, formulas, headings or bare lists.
"""

from __future__ import annotations

import bz2
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import mwparserfromhell
from mwparserfromhell import nodes
from mwparserfromhell.wikicode import Wikicode

from cospadi.errors import ArtifactError
from cospadi.files import explaining

# less is what remains of a disambiguation page
_SHORTEST_ARTICLE = 400  # characters
# marks put into the text: a formula was here; a list item starts here
_HOLE, _ITEM = "\x00", "\x01"

_DROPPED_TAGS = {"ref", "references", "table", "gallery", "timeline", "imagemap", "source", "syntaxhighlight", "pre"}
_DROPPED_TAGS |= {"score", "chem", "hiero", "s", "del", "graph", "mapframe", "templatestyles", "ol", "ul"}
_LINK_NAMESPACES = {"file", "image", "media", "category", "template", "special", "portal", "wikipedia", "help"}
_LANGUAGE_LINK = re.compile(r"[a-z]{2,3}(-[a-z-]+)?$")
_END_SECTIONS = {"references", "external links", "see also", "further reading", "notes", "bibliography", "footnotes"}
_END_SECTIONS |= {"sources", "citations", "works cited", "notes and references", "references and notes", "gallery"}
_END_SECTIONS |= {"footnotes and references", "cited sources", "primary sources", "secondary sources", "works"}
_END_SECTIONS |= {"selected works", "publications", "filmography", "discography", "selected bibliography"}

# templates that stand for text: position of the argument shown (from 1; -1 is the last)
_SHOWN_ARGUMENT = {
    **dict.fromkeys(("lang", "script", "rtl-lang"), 2),
    **dict.fromkeys(("transl", "transliteration"), -1),
    **dict.fromkeys(("nowrap", "nobr", "small", "smaller", "big", "sc", "smallcaps", "vanchor", "visible anchor"), 1),
    **dict.fromkeys(("nihongo", "abbr", "math", "mvar", "sub", "sup", "em", "strong", "ipa", "angbr", "railgauge"), 1),
    **dict.fromkeys(("quote", "blockquote", "cquote", "quotation", "ill", "interlanguage link"), 1),
}
_NDASH, _MDASH = "\u2013", "\u2014"
_FIXED_TEXT = {
    **dict.fromkeys(("ndash", "dash"), _NDASH),
    **dict.fromkeys(("snd", "spnd", "spaced ndash"), f" {_NDASH} "),
    **dict.fromkeys(("mdash", "mdashb"), _MDASH),
    **dict.fromkeys(("nbsp", "thinsp"), " "),
    **{"'s": "'s", "'": "'", "' \"": "'\"", "=": "=", "eqm": "?", "carbon": "C", "hydrogen": "H"},
}
_RANGE_WORDS = {"to": " to ", "and": " and ", "or": " or ", "by": " by ", "x": " by ", "-": _NDASH, _NDASH: _NDASH}


def read_articles(path: str | Path) -> Iterator[tuple[str, str]]:
    """Stream the articles of a bz2-compressed MediaWiki export; redirects and other namespaces are left out.

    Parameters
    ----------
    path : path-like

    Yields
    ------
    title, text : str
        Text as paragraphs, one a line, separated by blank lines; articles of less than 400 characters are left out.

    Raises
    ------
    ArtifactError
        If the file is not complete bz2 or XML.
    """
    try:
        with explaining(path), bz2.open(path) as file:
            for _, element in ElementTree.iterparse(file):
                if _local_name(element) != "page":
                    continue
                fields = {_local_name(child): child for child in element.iter()}
                if "redirect" not in fields and fields["ns"].text == "0":
                    text = clean_markup(fields["text"].text or "")
                    if len(text) >= _SHORTEST_ARTICLE:
                        yield fields["title"].text or "", text
                element.clear()
    except (OSError, EOFError, ElementTree.ParseError, KeyError) as error:
        raise ArtifactError(path, f"not a complete MediaWiki export ({error})", "Fetch it again") from error


def _local_name(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def clean_markup(markup: str) -> str:
    """Prose of a wiki page: paragraphs, one a line, separated by blank lines."""
    code = mwparserfromhell.parse(markup)
    text = "".join(_section_text(section) for section in code.get_sections(flat=True))
    return "\n\n".join(filter(None, map(_prose, _paragraphs(text))))


def _paragraphs(text: str) -> Iterator[str]:
    """Join wrapped lines as MediaWiki does: a blank line, a list item or the debris of a table ends a paragraph."""
    lines: list[str] = []
    for line in [*text.splitlines(), ""]:
        ends = not line.strip() or line.lstrip().startswith((_ITEM, "|", "!", "{|"))
        if ends:
            yield " ".join(lines)
            lines = []
        if line.strip():
            lines.append(line)


def _section_text(section: Wikicode) -> str:
    headings = section.filter_headings(recursive=False)
    if headings and _text(headings[0].title).strip().lower() in _END_SECTIONS:
        return ""
    return _text(section) + "\n"


def _text(code: Wikicode | None) -> str:
    return "".join(_node_text(node) for node in code.nodes) if code is not None else ""


def _node_text(node: nodes.Node) -> str:
    if isinstance(node, nodes.Text):
        return str(node.value)
    if isinstance(node, nodes.HTMLEntity):
        return node.normalize() or ""
    if isinstance(node, nodes.Wikilink):
        return _link_text(node)
    if isinstance(node, nodes.ExternalLink):
        return _text(node.title)
    if isinstance(node, nodes.Tag):
        return _tag_text(node)
    if isinstance(node, nodes.Template):
        return _template_text(node)
    return "\n" if isinstance(node, nodes.Heading) else ""


def _link_text(link: nodes.Wikilink) -> str:
    namespace, colon, _ = str(link.title).strip().partition(":")
    namespace = namespace.strip().lower()
    if colon and (namespace in _LINK_NAMESPACES or (link.text is None and _LANGUAGE_LINK.match(namespace))):
        return ""
    return _text(link.text if link.text is not None else link.title)


def _tag_text(tag: nodes.Tag) -> str:
    name = str(tag.tag).strip().lower()
    if name == "math":
        return _HOLE
    if name in ("li", "dd", "dt") and tag.self_closing:
        return _ITEM
    if name == "br":
        return "\n"
    return "" if name in _DROPPED_TAGS else _text(tag.contents)


def _template_text(template: nodes.Template) -> str:
    name = str(template.name).strip().replace("_", " ").lower()
    arguments = [_text(param.value).strip() for param in template.params if str(param.name).strip().isdigit()]
    if not arguments and template.has("text"):
        arguments = [_text(template.get("text").value).strip()]
    if name in _FIXED_TEXT:
        return _FIXED_TEXT[name]
    if name.startswith("lang-") and arguments:
        return arguments[0]
    if name in _SHOWN_ARGUMENT:
        position = _SHOWN_ARGUMENT[name]
        index = position - 1 if position > 0 else position
        return arguments[index] if len(arguments) >= abs(position) else ""
    if name in ("convert", "cvt"):
        return _quantity(arguments)
    if name in ("circa", "c.", "ca") and arguments:
        return f"c. {arguments[0]}"
    if name == "as of" and arguments:
        return ("as of " if template.has("lc") else "As of ") + arguments[0]
    if name in ("chem", "chem2"):
        return "".join(arguments)
    if name in ("frac", "sfrac") and arguments:
        *whole, numerator, denominator = arguments if len(arguments) > 1 else ["1", *arguments]
        return " ".join([*whole, f"{numerator}/{denominator}"])
    if name == "val":
        return _HOLE
    return ""


def _quantity(arguments: list[str]) -> str:
    """``{{convert|5|to|10|km}}`` reads "5 to 10 km"."""
    if len(arguments) >= 4 and arguments[1] in _RANGE_WORDS:
        return f"{arguments[0]}{_RANGE_WORDS[arguments[1]]}{arguments[2]} {arguments[3]}"
    return " ".join(arguments[:2])


# a lead-in ("the following are:") loses its list or formula, so it goes too
_UP_TO_LAST_SENTENCE = re.compile(r".*[.!?][\"')\u201d\u2019\u00bb]*(?=\s|$)")
_REPAIRS = [
    (re.compile(r"__[A-Z]+__|'{2,}"), ""),
    (re.compile(r"[ \t\u00a0\u2009]+"), " "),
    # what a dropped pronunciation leaves: "( ; from Greek)" and "( )"
    (re.compile(r"\(\s*(?:[;,:/]\s*)+"), "("),
    (re.compile(r"\s*[;,:]?\s*\)"), ")"),
    (re.compile(r"\s*\(\s*(?:or|and|from)?\s*\)"), ""),
    (re.compile(r"\(\s+"), "("),
    (re.compile(r",(?:\s*,)+"), ","),
    (re.compile(r"\s+([,.;:?!])(?=\s|$)"), r"\1"),
]


def _prose(paragraph: str) -> str:
    """The paragraph made tidy, up to its last full sentence; empty if it does not read as prose."""
    paragraph = paragraph.lstrip(_ITEM + " ")
    for pattern, replacement in _REPAIRS:
        paragraph = pattern.sub(replacement, paragraph)
    if any(mark in paragraph for mark in (_HOLE, _ITEM, "|", "{{", "}}", "[[", "]]", "<", ">", "ISBN")):
        return ""
    sentences = _UP_TO_LAST_SENTENCE.match(paragraph.strip())
    return sentences[0] if sentences and len(sentences[0].split()) >= 8 else ""
