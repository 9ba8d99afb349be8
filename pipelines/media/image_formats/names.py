"""Name the format of a file by its first bytes."""

from __future__ import annotations

import re

_SUPPORTED = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG",
    "GIF": rb"GIF8",
    "BMP": rb"BM",
    "WebP": rb"RIFF....WEBP",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "AVIF": rb"....ftyp(avi[fs]|(mif1|msf1).{4}(....){0,8}avi[fs])",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "netpbm": rb"P[1-6]\s",
    "ICO": rb"\0\0\x01\0[^\0]\0",
}
# HEIF's brands: HEVC in heic, heix, hevc, hevx, heim, heis; other codecs in mif1 and msf1.
_OPTIONAL = {
    "HEIC": rb"....ftyp(he[iv][cxms]|mif1|msf1)",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n",
}
_OTHER_IMAGES = {
    "Photoshop (PSD)": rb"8BP[SB]",
    "PDF": rb"\s{0,16}%PDF-",
    "EPS or PostScript": rb"%!PS|\xc5\xd0\xd3\xc6",
    "DDS": rb"DDS ",
    "SVG": rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!DOCTYPE svg[^>]*>\s*)?<svg[\s>]",
    "QOI": rb"qoif",
    "OpenEXR": rb"v/1\x01",
    "Radiance HDR": rb"#\?(RADIANCE|RGBE)",
    "farbfeld": rb"farbfeld",
    "PAM": rb"P7\n",
    "PFM": rb"P[Ff]\n",
    "PCX": rb"\n[\0\x02-\x05]\x01[\x01\x02\x04\x08]",
    "SGI": rb"\x01\xda[\0\x01][\x01\x02]",
    "Apple icon (ICNS)": rb"icns",
    "cursor (CUR)": rb"\0\0\x02\0[^\0]\0",
    "JPEG XR": rb"II\xbc\x01",
    "Canon raw (CR3)": rb"....ftypcrx ",
    "Fujifilm raw (RAF)": rb"FUJIFILMCCD-RAW",
    "Panasonic raw (RW2)": rb"IIU\0",
    "Olympus raw (ORF)": rb"IIR[OS]|MMOR",
    "DICOM": rb".{128}DICM",
    "FITS": rb"SIMPLE  =",
    "GIMP (XCF)": rb"gimp xcf ",
    "Windows metafile": rb"\xd7\xcd\xc6\x9a|\x01\0\0\0.{36} EMF",
    "DjVu": rb"AT&TFORM",
    "BPG": rb"BPG\xfb",
    "FLIF": rb"FLIF",
    "KTX texture": rb"\xabKTX ",
}
_OTHER_FILES = {
    "HTML page": rb"\s*(<!--.*?-->\s*)*<(!doctype html|html|head|body)\b",
    "XML": rb"\s*(\xef\xbb\xbf)?<\?xml",
    "JSON": rb'\s*(\{\s*["}]|\[\s*[\[{"\d\]])',
    "Git LFS pointer": rb"version https://git-lfs",
    "ZIP archive": rb"PK\x03\x04|PK\x05\x06",
    "gzip file": rb"\x1f\x8b\x08",
    "zstd file": rb"\x28\xb5\x2f\xfd",
    "7z archive": rb"7z\xbc\xaf\x27\x1c",
    "RAR archive": rb"Rar!\x1a\x07",
    "Parquet file": rb"PAR1",
    "audio file (MP3)": rb"ID3",
}
_START_BYTES = 4096  # with the comments before the first element of an SVG
_IGNORE_CASE = ("HTML page", "SVG")
_ALL = {**_SUPPORTED, **_OPTIONAL, **_OTHER_IMAGES, **_OTHER_FILES}
_PATTERNS = {
    name: re.compile(pattern, re.DOTALL | (re.IGNORECASE if name in _IGNORE_CASE else 0))
    for name, pattern in _ALL.items()
}


def name_format(data: bytes) -> str | None:
    """Return the name of the format that the first bytes have, None if they are of no known one."""
    start = data[:_START_BYTES]
    return next((name for name, pattern in _PATTERNS.items() if pattern.match(start)), None)


def is_image(name: str) -> bool:
    """Return whether a format, by its name here, is one of images or documents that can be drawn."""
    return name not in _OTHER_FILES
