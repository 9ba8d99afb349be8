"""Render the report as one HTML file that loads nothing and runs only its own script."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources
from string import Template
from typing import Any

_SCRIPTS = ("elements", "summary", "filters", "sheet", "export", "row", "start")
"""The files in script/, in their order; together they are one function, which the page runs."""
_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def render(data: dict[str, Any]) -> bytes:
    """Return the page that shows `data`, as UTF-8.

    Untrusted text is in the file only as JSON without markup, and the script inserts it only as text nodes. If either
    fails, the page's Content Security Policy still blocks running, loading and sending anything: it allows only the
    hashes of the page's own script and style.
    """
    folder = resources.files("pipelines.report")
    skeleton, style = (folder.joinpath(f"page.{kind}").read_text("utf-8") for kind in ("html", "css"))
    parts = [folder.joinpath(f"script/{name}.js").read_text("utf-8") for name in _SCRIPTS]
    script = "\n".join(['"use strict";', "(() => {", *parts, "})();", ""])
    page = Template(skeleton).substitute(
        policy=_build_policy(style, script), style=style, script=script, data=encode_for_html(data)
    )
    # A lone surrogate, as in a file name that is not valid text, becomes a JSON escape.
    return page.encode("utf-8", "backslashreplace")


def encode_for_html(data: Any) -> str:
    """Encode as JSON that cannot open or close an HTML element."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(_ESCAPES)


def _build_policy(style: str, script: str) -> str:
    ours = f"script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:"
    none = "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    return f"default-src 'none'; {ours}; {none}"


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
