"""Images as text: `data:` URIs and base64 are decoded, told from paths, and never shown in full."""

from __future__ import annotations

import base64
import io
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipelines.media.inline import decode_inline, is_inline, shorten_inline
from pipelines.media.readers import LongerThanAllowed

ENOUGH = 1 << 20


def encode_image(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), (9, 90, 200)).save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000"])
def test_the_base64_of_an_image_is_recognized_and_decoded(form: str) -> None:
    data = encode_image(form)
    plain, urlsafe = base64.b64encode(data).decode(), base64.urlsafe_b64encode(data).decode()
    wrapped = base64.encodebytes(data).decode()
    for text in (plain, urlsafe, wrapped, plain.rstrip("="), f"\n{plain}"):
        assert is_inline(text) and decode_inline(text, ENOUGH) == data


@given(st.binary(min_size=1), st.sampled_from(["image/png", "", "image/svg+xml;charset=utf-8"]))
def test_each_form_of_a_data_uri_is_decoded(data: bytes, type_: str) -> None:
    packed = base64.b64encode(data).decode()
    uris = [
        f"data:{type_};base64,{packed}",
        f"DATA:{type_};Base64,{quote(packed, safe='')}",
        f"data:{type_},{quote(data)}",
    ]
    for uri in uris:
        assert is_inline(uri) and decode_inline(uri, ENOUGH) == data


@pytest.mark.parametrize(
    "path",
    [
        "a.png",
        "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAgGBgcGBQgHBwcJCQgKDBQ.jpg",
        "iVBORw0KGgo",
        "https://host/iVBORw0KGgoAAAANSUhEUgAAAAMAAAACCAIAAAASFvFNAAAAEklE",
        "images/of/a/very/long/path/without/any/suffix/at/all/0000000000000001",
        "",
    ],
)
def test_a_path_or_url_is_not_taken_for_base64(path: str) -> None:
    assert not is_inline(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("data:image/png;base64", "comma"),
        ("data:image/png;base64,", "no data"),
        ("data:image/png;base64,iVBO*w0K", "cannot be decoded"),
        ("data:image/png;base64,iVBOR", "cannot be decoded"),
        ("é" * 50, "cannot be decoded"),
    ],
)
def test_an_invalid_text_is_an_error_in_one_sentence(text: str, reason: str) -> None:
    with pytest.raises(OSError, match=reason):
        decode_inline(text, ENOUGH)


def test_the_size_is_bounded_before_decoding() -> None:
    for text in (base64.b64encode(bytes(1000)).decode(), "data:," + "x" * 1000):
        assert len(decode_inline(text, 1000)) == 1000
        with pytest.raises(LongerThanAllowed):
            decode_inline(text, 999)


def test_a_message_never_shows_the_payload() -> None:
    packed = base64.b64encode(encode_image("PNG")).decode()
    for text in (
        packed,
        f"{packed[:60]}*{packed[60:]}",
        f"data:image/png;base64,{packed}",
        f"data:image/png;base64,{packed}*",
    ):
        assert len(shorten_inline(text)) < 60 and packed[20:] not in shorten_inline(text)
    assert shorten_inline("images/1.png") == "images/1.png" and len(shorten_inline("x" * 9999)) < 110
