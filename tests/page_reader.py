"""Reads a self-contained page as a browser would, and a prompt that would break a careless one."""

from __future__ import annotations

from html.parser import HTMLParser

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\" onload='x' | **b** <!-- `c` &amp;"


class Page(HTMLParser):
    """Tags with their attributes, the text outside scripts and styles, and what lies in data scripts."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.inside, self.data = [], "", None, ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = dict(attributes).get("type", tag) if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside is None:
            self.text += data
        elif self.inside == "application/json":
            self.data += data
