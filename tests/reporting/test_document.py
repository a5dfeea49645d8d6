"""The two forms of a report, with hostile names in all places."""

import re
from html.parser import HTMLParser

import pytest

from bdclean.reporting.document import (
    Cell,
    Document,
    Section,
    Strip,
    Table,
    to_html,
    to_markdown,
)

EVIL = "<script>alert(1)</script> **x** [a](http://evil) `b` | c\n# d & \x1b[31m"


@pytest.fixture
def document():
    row = (Cell(EVIL), Cell(EVIL, EVIL, alarm=True))
    return Document(
        f"title {EVIL}",
        (EVIL,),
        (
            Section(EVIL, (EVIL,), Table(("", EVIL), (row,)), points=(EVIL,)),
            Section("pictures", strips=(Strip((EVIL,), ((EVIL, b"png"),)),)),
            Section("facts", facts=((EVIL, EVIL),)),
            Section("code", code="load('```<b>')"),
        ),
        "a mark",
    )


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.names, self.attributes = [], []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]


def test_the_page_holds_no_foreign_markup_and_asks_for_nothing(document):
    page = to_html(document)
    tags = Tags()
    tags.feed(page)
    allowed = "html head meta title style body h1 h2 div p table thead tbody tr th td small span"
    assert set(tags.names) <= {
        *allowed.split(),
        *["ul", "li", "pre", "figure", "figcaption", "img", "br", "dl", "dt", "dd"],
    }
    assert "\x1b" not in page
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert ("meta", "content", policy) in tags.attributes
    assert ("meta", "content", "width=device-width, initial-scale=1") in tags.attributes
    places = [value for _, key, value in tags.attributes if key in ("src", "href")]
    assert places == ["data:image/png;base64,cG5n"]
    assert "://" not in page.replace("http://evil", "")
    assert "<!-- a mark -->" in page
    assert page.count("alert(1)") == 15  # shown as text, everywhere


def test_markdown_makes_nothing_of_names(document):
    text = to_markdown(document)
    assert "<script>" not in text.replace("\\<script\\>", "")
    assert "\x1b" not in text
    lines = text.splitlines()
    assert next(line for line in lines if line.startswith("# ")).startswith("# title")
    assert len([line for line in lines if line.startswith("#")]) == 4  # no `# d` of its own
    assert "http://" not in text
    assert not re.search(r"(?<!\\)\[a", text)
    assert "png" not in text
    table = [line for line in lines if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {3}
    assert "````python\nload('```<b>')\n````" in text
    assert "\n- \\<script\\>" in text


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("82.7 %", "82.7 %"), ("3. x", "3\\. x"), ("- x", "\\- x"), ("www.x.org", "www&#46;x.org")],
)
def test_starts_of_lists_are_text(text, wanted):
    assert wanted in to_markdown(Document("t", (text,), (), "m")).splitlines()
