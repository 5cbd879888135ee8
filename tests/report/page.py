"""What a browser would see of a page, without one: is it well-formed, self-contained, and inert?"""

import base64
import hashlib
import re
from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "input", "link", "source", "wbr", "base", "col"}
HARMLESS = {
    *("html", "head", "meta", "title", "style", "body", "a", "header", "main", "footer", "nav", "section", "h1", "h2"),
    *("h3", "p", "ul", "li", "dl", "dt", "dd", "div", "span", "strong", "details", "summary", "figure", "figcaption"),
    *("table", "thead", "tbody", "tr", "th", "td", "svg", "g", "line", "rect", "circle", "polyline", "text"),
    *("tfoot", "wbr", "script"),
}


class Page(HTMLParser):
    """Everything in a page that a test asks for; `wrong` says what no page may have."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.wrong: list[str] = []
        self.ids: list[str] = []
        self.refers: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.focusable = 0
        self.policy = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        self.wrong += [f"never closed: {tag}" for tag in self._open]
        self.wrong += [f"id twice: {name}" for name in self.ids if self.ids.count(name) > 1]
        self.wrong += [f"refers to no id: {name}" for name in self.refers if name not in self.ids]

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._element(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._element(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open[-1] != tag:
            self.wrong.append(f"</{tag}> closes {self._open[-1:] or 'nothing'} at {self.getpos()}")
        else:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if "script" in self._open:  # the policy has to know it, so that no other one runs
            digest = base64.b64encode(hashlib.sha256(data.encode()).digest()).decode()
            if f"script-src 'sha256-{digest}'" not in self.policy:
                self.wrong.append(f"a script that the policy does not name: {data[:80]}")
            return
        self.texts.append(data)
        if "style" in self._open and re.search(r"url\(|@import|expression\(", data):
            self.wrong.append(f"style loads something: {data[:80]}")

    def _element(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in HARMLESS:
            self.wrong.append(f"<{tag}> at {self.getpos()}")
        if len({name for name, _ in attrs}) != len(attrs):
            self.wrong.append(f"<{tag}> has an attribute twice at {self.getpos()}")
        for name, value in attrs:
            value = value or ""
            if name.startswith("on") or name in ("src", "srcset", "action", "formaction", "xlink:href", "background"):
                self.wrong.append(f"{name}={value!r}")
            if re.search(r"(?i)(https?:|^//|javascript:|data:|url\()", value) and name != "content":
                self.wrong.append(f"{name}={value!r} points outside")
            if name == "content" and "default-src" in value:
                self.policy = value
            if name == "href":
                self.refers.append(value.removeprefix("#"))
                if not value.startswith("#"):
                    self.wrong.append(f"href={value!r}")
            if name in ("aria-labelledby", "aria-describedby"):
                self.refers += value.split()
            if name == "id":
                self.ids.append(value)
            self.focusable += (name, value) == ("tabindex", "0") or (tag, name) == ("a", "href")
        self.focusable += tag == "summary"
