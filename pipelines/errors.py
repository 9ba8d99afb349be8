"""Every exception of the pipelines, as a table of contents.

    ValueError      the user can fix it: exit 2, before anything is started
      SourceError     INPUT cannot be listed
      RunError        OUTPUT cannot take this run
      LeaseError      another driver writes to OUTPUT
      ResourceError   the cluster cannot hold the run
      StoreError      a URI cannot be used
    ValueError      one row: an error row, the others continue
      MediaError      its media cannot be decoded
      RowError        it cannot be prepared; names the stage
    OSError         one attempt to read
      FinalFault      retrying cannot change it
      BusyFault       the store asks to come back later
    RuntimeError    the run stops: exit 1, resumable
      StoreFault      a store does not answer
      LeaseLost       another driver has taken over
      EverythingFails most rows are errors
      StageFailed     an actor raised what is not the fault of a row
      RowsLost        rows of the manifest are missing from the output

Errors of the model (`CheckpointError`, `RequestError`, `EngineDied` ...) are in `ovis_model`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that decoding an image does not load Arrow
    from pipelines.schema import Stage


class SourceError(ValueError):
    """An INPUT that cannot be listed, and what to do about it."""


class NoValue(LookupError):  # noqa: N818  (the name says what happened)
    """The row has nothing in a column that the prompt names; the argument is the column."""


class RunError(ValueError):
    """OUTPUT cannot take this run, and what to do about it."""


class LeaseError(ValueError):
    """This driver cannot write to OUTPUT, because another one does or for another reason."""


class LeaseLost(RuntimeError):  # noqa: N818
    """Another driver has taken over."""


class ResourceError(ValueError):
    """The cluster cannot hold the run, and what to do about it."""


class StoreError(ValueError):
    """A URI that cannot be used, and what to do about it."""


class FinalFault(OSError):  # noqa: N818  (the name says what happened)
    """What trying again cannot change."""


class BusyFault(OSError):  # noqa: N818
    """The store asks to come back, after `retry_after_s` if it says when."""

    def __init__(self, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class StoreFault(RuntimeError):  # noqa: N818
    """A store that did not answer however often it was asked.

    No OSError: no fault of the row, and the next would fare no better.
    """


class MediaError(ValueError):
    """The row's media cannot be decoded; the message is one sentence that says why."""


class RowError(ValueError):
    """This row cannot be prepared, others can."""

    def __init__(self, stage: Stage, reason: str) -> None:
        super().__init__(reason)
        self.stage = stage


class EverythingFails(RuntimeError):  # noqa: N818  (the name says what happened)
    """So many rows are errors that the rest would be as well."""


class StageFailed(RuntimeError):  # noqa: N818
    """An actor raised what is no row's fault; the message is the actor's own, the cause its trace."""


class RowsLost(RuntimeError):  # noqa: N818  (the name says what happened)
    """Rows of the manifest are not in the output: a fault of ours or of the store."""
