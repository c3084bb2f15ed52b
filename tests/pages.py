"""What a page would load, and where its links lead: for tests of pages."""

import re
from html.parser import HTMLParser


def external_requests(page: str) -> list[str]:
    """Every address that a browser would load to show `page`, as `tag attribute: address`; links do not count."""
    scanner = _Scanner()
    scanner.feed(page)
    scanner.close()
    return scanner.requests


def missing_anchors(page: str) -> list[str]:
    """Targets of links within `page` that no element of it bears as `id`."""
    scanner = _Scanner()
    scanner.feed(page)
    scanner.close()
    return sorted(scanner.anchors - scanner.ids)


class _Scanner(HTMLParser):
    # What an element loads, beyond `src` of whatever has one.
    LOADING = {("link", "href"), ("object", "data"), ("video", "poster"), ("body", "background")}
    LOADING |= {("image", "href"), ("image", "xlink:href"), ("use", "href"), ("use", "xlink:href")}

    def __init__(self):
        super().__init__()
        self.requests: list[str] = []
        self.anchors: set[str] = set()
        self.ids: set[str] = set()
        self._inside = ""

    def handle_starttag(self, tag, attrs):
        self._inside = tag
        attributes = {name: value or "" for name, value in attrs}
        for name, value in attributes.items():
            if name == "src" or (tag, name) in self.LOADING:
                self._add(f"{tag} {name}", value)
            elif name == "srcset":
                for part in re.split(r",\s+", value):
                    self._add(f"{tag} srcset", part.split()[0] if part.split() else "")
            elif name == "style":
                self._css(f"{tag} style", value)
        if tag == "meta" and attributes.get("http-equiv", "").lower() == "refresh":
            self._add("meta refresh", attributes.get("content", "").partition("=")[2])
        if tag == "a" and attributes.get("href", "").startswith("#"):
            self.anchors.add(attributes["href"][1:])
        self.ids |= {attributes[name] for name in ("id", "name") if name in attributes}

    handle_startendtag = handle_starttag

    def handle_data(self, data):
        if self._inside == "style":
            self._css("style", data)
        elif self._inside == "script":
            for found in re.findall(r"(?:https?:)?//[\w.-]+\.\w[^\s\"')]*", data):
                self._add("script", found)

    def handle_endtag(self, tag):
        self._inside = ""

    def _css(self, where: str, text: str):
        for address in re.findall(r"url\(\s*['\"]?(.*?)['\"]?\s*\)", text):
            self._add(f"{where} url", address)
        for address in re.findall(r"@import\s+['\"](.*?)['\"]", text):
            self._add(f"{where} @import", address)

    def _add(self, where: str, address: str):
        if address.strip() and not address.strip().startswith(("data:", "#", "about:")):
            self.requests.append(f"{where}: {address.strip()}")
