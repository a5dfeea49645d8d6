"""Text and code in Markdown, of which nothing is taken for markup."""

import re

from bdclean.printable import printable


def plain(text: object) -> str:
    """One line of text of which Markdown makes nothing."""
    one_line = " ".join(printable(text).split())
    escaped = re.sub(r"([\\`*_\[\]<>|~#])", r"\\\1", one_line).replace("&", "&amp;")
    escaped = re.sub(r":(?=//)", "&#58;", re.sub(r"(?i)\b(www)\.", r"\1&#46;", escaped))
    return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", re.sub(r"^([-+=])", r"\\\1", escaped))


def code_block(code: str) -> str:
    """Lines of Python, fenced by more backticks than they hold."""
    ticks = [len(run) for run in re.findall("`+", code)]
    fence = "`" * max(3, 1 + max(ticks, default=0))
    return f"{fence}python\n{code}\n{fence}"
