"""INPUT -> rows that are references, listed once and without reading more payload than the format forces."""

from pipelines.sources.ids import Known
from pipelines.sources.listing import Listing, list_rows
from pipelines.sources.rows import SourceError

__all__ = ["Known", "Listing", "SourceError", "list_rows"]
