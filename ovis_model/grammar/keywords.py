"""The table of JSON Schema's keywords (draft 2020-12): what is compiled, what is ignored and what is refused.

`SUPPORTED` is a schema of schemas. A `title` completes the sentence "... must be". Keywords without a row are refused.
"""

from __future__ import annotations

from typing import Any

MAX_COUNT = 1_000_000
MAX_SAFE_INTEGER = 2**53 - 1  # RFC 8259, section 6: what all readers of JSON agree about
MAX_DIGITS = 15  # of a decimal number that survive any reader

_DATE = (
    r"(?:[12][0-9]{3}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    r"|02-(?:0[1-9]|1[0-9]|2[0-8]))|(?:[12][0-9](?:0[48]|[2468][048]|[13579][26])|(?:12|16|20|24|28)00)-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,28}[A-Za-z0-9])?"
_STEP = "/(?:[^~/\\x00-\\x1f\\x7f]|~[01])*"
# Years 1000 to 2999, no leap seconds: what every calendar library reads. llguidance has a 29 February in every year.
DATE_PATTERN = _DATE
EXACT_FORMATS = {
    "date": f"^{_DATE}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "time": f"^{_TIME}$",
    "hostname": rf"^{_LABEL}(?:\.{_LABEL}){{0,3}}$",
    "json-pointer": f"^(?:{_STEP})*$",
    "relative-json-pointer": f"^(?:0|[1-9][0-9]{{0,3}})(?:#|(?:{_STEP})*)$",
    "regex": "^[A-Za-z0-9 _,:;/-]*$",  # texts that any engine takes for a pattern
    "byte": "^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$",
}
FORMATS = sorted({*EXACT_FORMATS, "duration", "email", "ipv4", "ipv6", "uri", "uuid"})
STRICTER_FORMATS = {  # each text of the second is one of the first
    **dict.fromkeys(("uri-reference", "iri", "iri-reference", "uri-template", "url"), "uri"),
    "idn-email": "email",
    "idn-hostname": "hostname",
    "host-name": "hostname",
    "base64": "byte",
    "datetime": "date-time",
    "guid": "uuid",
    "ip-address": "ipv4",
}
PYDANTIC_DECIMAL = "^(?!^[-+.]*$)"  # begins the pattern of a Decimal
DECIMAL_DIGITS, DECIMAL_PLACES = 18, 10  # before and after the point of a Decimal


def make_decimal_pattern(max_digits: int, max_places: int) -> str:
    """Return the pattern of decimal numbers without an exponent and without leading zeros."""
    digits, places = min(max_digits, DECIMAL_DIGITS), min(max_places, DECIMAL_PLACES)
    whole = f"(?:0|[1-9][0-9]{{0,{digits - 1}}})" if digits else "0"
    return rf"^-?{whole}(?:\.[0-9]{{1,{places}}})?$" if places else f"^-?{whole}$"


_TYPES = ["array", "boolean", "integer", "null", "number", "object", "string"]

IGNORED_AT_ROOT = ("$id", "$schema")
IGNORED = (
    *("$comment", "contentEncoding", "contentMediaType", "default", "deprecated", "description", "discriminator"),
    *("examples", "readOnly", "title", "writeOnly", "contentSchema"),
)
# Words of dialects that `dialects.py` translates, and keywords that change which values are valid but are not compiled.
TRANSLATED = {"additionalItems", "nullable", "propertyNames", "unevaluatedItems", "unevaluatedProperties"}
REFUSED = {
    *("not", "if", "then", "else", "contains", "minContains", "maxContains", "dependentRequired", "dependentSchemas"),
    *("dependencies", "$dynamicRef", "$recursiveRef", "$id", "x-guidance"),
}
MEANT = {  # words of older drafts and of other languages that change which values are valid
    "divisibleBy": "multipleOf",
    "disallow": "not",
    "extends": "allOf",
    "min": "minimum",
    "max": "maximum",
    "regex": "pattern",
}
# Words that only look like keywords.
HARMLESS = {"id", "example", "readonly", "writeonly", "defaults", "titles", "descriptions", "format_", "$anchor"}
_COUNT = {"title": f"a whole number from 0 to {MAX_COUNT}", "type": "integer", "minimum": 0, "maximum": MAX_COUNT}
_NUMBER = {"title": f"a number within ±{MAX_SAFE_INTEGER} of at most {MAX_DIGITS} digits", "format": "decimal"}
_MULTIPLE = {
    "title": "a whole number: multiples of others are not exact in binary",
    "type": "integer",
    "exclusiveMinimum": 0,
    "maximum": MAX_SAFE_INTEGER,
}
_WRITABLE = {
    "title": "a string without control characters and lone surrogates",
    "pattern": r"^[^\x00-\x07\x0b\x0e-\x1f\x7f\ud800-\udfff]*\Z",
}
_TEXT = {**_WRITABLE, "type": "string"}
_PATTERN = {**_TEXT, "format": "pattern"}
_LIST = {"title": "a list that is not empty", "type": "array", "minItems": 1}
_SCHEMA = {"$ref": "#"}
_SCHEMA_MAP = {"title": "an object of schemas", "type": "object", "additionalProperties": _SCHEMA}
_VALUE = {"$ref": "#/$defs/value"}
_REFERENCE = {
    "title": "a path in this schema, such as #/$defs/name; others are not fetched",
    "type": "string",
    "pattern": r"^#(?:/|\Z)",
}
_TYPE = {
    "title": f"one of {', '.join(_TYPES)}, or a list of them",
    "anyOf": [{"enum": _TYPES}, {**_LIST, "items": {"enum": _TYPES}}],
}

_COUNTABLE = {  # llguidance counts a name that is not listed as often as it is written; readers keep one of each
    "title": "closed (additionalProperties: false, no patternProperties) for 'minProperties' over 1",
    "anyOf": [
        {"properties": {"minProperties": {"maximum": 1}}},
        {
            "properties": {"additionalProperties": {"const": False}, "patternProperties": False},
            "required": ["additionalProperties"],
        },
    ],
}
_ROWS: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (True, IGNORED),
    (_SCHEMA, ("additionalProperties", "items")),
    ({**_LIST, "items": _SCHEMA}, ("allOf", "anyOf", "oneOf", "prefixItems")),
    ({**_SCHEMA_MAP, "propertyNames": _TEXT}, ("$defs", "definitions", "properties")),
    ({**_SCHEMA_MAP, "propertyNames": _PATTERN}, ("patternProperties",)),
    (_REFERENCE, ("$ref",)),
    (_TYPE, ("type",)),
    (_VALUE, ("const",)),
    ({**_LIST, "items": _VALUE}, ("enum",)),
    (_COUNT, ("maxItems", "maxLength", "maxProperties", "minItems", "minLength", "minProperties")),
    ({**_NUMBER, "type": "number", "maximum": MAX_SAFE_INTEGER}, ("minimum", "exclusiveMinimum")),
    ({**_NUMBER, "type": "number", "minimum": -MAX_SAFE_INTEGER}, ("maximum", "exclusiveMaximum")),
    (_MULTIPLE, ("multipleOf",)),
    (_PATTERN, ("pattern",)),
    ({"title": f"a supported format: {', '.join(FORMATS)}", "enum": FORMATS}, ("format",)),
    ({"title": "true or false", "type": "boolean"}, ("uniqueItems",)),
    ({"title": "a list of names", "type": "array", "items": _TEXT}, ("required",)),
)
SUPPORTED: dict[str, Any] = {
    "title": "a schema: an object, true or false",
    "type": ["object", "boolean"],
    "properties": {keyword: row for row, keywords in _ROWS for keyword in keywords},
    "additionalProperties": False,
    "allOf": [_COUNTABLE],
    "$defs": {
        "value": {
            "allOf": [_WRITABLE, {**_NUMBER, "minimum": -MAX_SAFE_INTEGER, "maximum": MAX_SAFE_INTEGER}],
            "propertyNames": _TEXT,
            **dict.fromkeys(("items", "additionalProperties"), _VALUE),
        }
    },
}
