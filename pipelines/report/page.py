"""Render the report as one HTML file that loads nothing and runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources
from string import Template
from typing import Any

_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def render(data: dict[str, Any]) -> bytes:
    """The page that shows `data`, UTF-8.

    What strangers wrote is in it only as JSON that holds no markup, and gets onto the page as text. Should one of both
    fail, the page's policy lets nothing run, load or be sent: scripts and styles are named by their hashes.
    """
    folder = resources.files("pipelines.report")
    skeleton, style, script = (folder.joinpath(f"page.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    page = Template(skeleton).substitute(
        policy=_build_policy(style, script), style=style, script=script, data=encode_for_html(data)
    )
    # Half of a surrogate pair, as in a file name that is no text, becomes JSON's escape for it.
    return page.encode("utf-8", "backslashreplace")


def encode_for_html(data: Any) -> str:
    """JSON that ends no element and opens none."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(_ESCAPES)


def _build_policy(style: str, script: str) -> str:
    ours = f"script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:"
    none = "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    return f"default-src 'none'; {ours}; {none}"


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
