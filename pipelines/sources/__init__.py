"""INPUT -> rows that are references, listed once and without reading more payload than the format forces."""

from pipelines.errors import SourceError
from pipelines.sources.ids import KnownRows
from pipelines.sources.listing import Listing, list_rows

__all__ = ["KnownRows", "Listing", "SourceError", "list_rows"]
