"""List INPUT once as rows that refer to their media; payload is read only where the format forces it."""

from pipelines.errors import SourceError
from pipelines.sources.ids import KnownRows
from pipelines.sources.listing import Listing, RowListing, list_rows

__all__ = ["KnownRows", "Listing", "RowListing", "SourceError", "list_rows"]
