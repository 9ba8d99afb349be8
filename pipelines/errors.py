"""Every exception of the pipelines, as a table of contents.

    ValueError      the user can fix it: exit 2, before the run starts
      SourceError     INPUT cannot be listed
      RunError        OUTPUT does not accept this run
      LeaseError      this driver cannot get the lease of OUTPUT
      ResourceError   the cluster is too small for the run
      StoreError      a URI cannot be used
    ValueError      one row fails: it becomes an error row, the others continue
      MediaError      its media cannot be decoded
      RowError        it cannot be prepared; names the stage
    LookupError     one row fails in the same way
      NoValue         a column that its prompt names is empty
    ValueError      one table fails: what is read of it are error rows
      TableError      its content cannot be read
    OSError         one attempt to access a store fails
      FinalFault      retrying cannot help
        CredentialsRefused  a store gets no credentials that it accepts
      CheckpointDamaged a file of a training checkpoint differs from what was written
      BusyFault       the store asks for a later retry
    RuntimeError    the run stops: exit 1, resumable
      StoreFault      a store still fails after all retries
      LeaseLost       another driver has taken the lease
      EverythingFails too many rows are errors
      StageFailed     an actor raised an error that no single row caused
      ProcessesDie    an actor's processes died again and again, and no row was finished
      RowsLost        rows of the manifest are missing from the output
      LibraryError    a library raised an exception that no other entry covers
      ClusterChanged  after nodes were lost, the cluster no longer fits the run
      RayNotStarted   Ray does not start on this machine
      EngineNotStarted  a replica's engine does not start, and the user can fix it: exit 2
      WorkersDied     a worker of a training run died; all start again from the last checkpoint

The model's exceptions (`CheckpointError`, `RequestError`, `EngineDied` ...) are in `ovis_model`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # at run time, decoding an image must not import Arrow
    from pipelines.schema import Stage


class SourceError(ValueError):
    """INPUT cannot be listed; the message includes the remedy."""


class NoValue(LookupError):  # noqa: N818  (the name says what happened)
    """A column that the prompt names is empty in this row; the argument is the column's name."""


class RunError(ValueError):
    """OUTPUT does not accept this run; the message includes the remedy."""


class LeaseError(ValueError):
    """This driver cannot get the lease of OUTPUT, usually because another driver holds it."""


class LeaseLost(RuntimeError):  # noqa: N818
    """Another driver has taken the lease of OUTPUT."""


class ResourceError(ValueError):
    """The cluster is too small for the run; the message includes the remedy."""


class StoreError(ValueError):
    """A URI cannot be used; the message includes the remedy."""


class FinalFault(OSError):  # noqa: N818  (the name says what happened)
    """A fault that a retry cannot fix."""


class CredentialsRefused(FinalFault):
    """A store gets no credentials that it accepts; the message names the settings."""


class BusyFault(OSError):  # noqa: N818
    """The store is busy and asks for a retry; `retry_after_s` is 0 if it does not say when."""

    def __init__(self, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class CheckpointDamaged(OSError):  # noqa: N818
    """A file of a checkpoint is missing or differs from what was written."""


class StoreFault(RuntimeError):  # noqa: N818
    """A store still fails after all retries.

    Not an OSError: the cause is the store, not the row, so the next row would fail too.
    """


class MediaError(ValueError):
    """The row's media cannot be decoded; the message gives the reason in one sentence."""


class RowError(ValueError):
    """This row cannot be prepared, in `stage`; other rows are unaffected."""

    def __init__(self, stage: Stage, reason: str) -> None:
        super().__init__(reason)
        self.stage = stage


class TableError(ValueError):
    """The content of a table cannot be read; the message gives the reason in one sentence."""


class EverythingFails(RuntimeError):  # noqa: N818  (the name says what happened)
    """The share of error rows is so high that the run stops."""


class StageFailed(RuntimeError):  # noqa: N818
    """An actor raised an error that no single row caused. The message is the actor's, the cause is its trace."""


class ProcessesDie(RuntimeError):  # noqa: N818  (the name says what happened)
    """The processes of an actor died again and again while no row was finished; the message gives the last reason."""


class NodeIncomplete(RuntimeError):  # noqa: N818  (the name says what happened)
    """A node of the cluster lacks a package that an actor imports; the message names both."""


class EngineNotStarted(RuntimeError):  # noqa: N818  (the name says what happened)
    """A replica's engine does not start on its node with this model; the message includes the remedy."""


class RowsLost(RuntimeError):  # noqa: N818  (the name says what happened)
    """Rows of the manifest are missing from the output: a bug, or a fault of the store."""


class ClusterChanged(RuntimeError):  # noqa: N818  (the name says what happened)
    """After nodes were lost, the cluster no longer fits the run; the message gives the reason."""


class LibraryError(RuntimeError):
    """A library raised an exception of its own; the message has its type and first line."""


class RayNotStarted(RuntimeError):  # noqa: N818
    """Ray does not start on this machine; the message says why and where Ray's logs are."""


class WorkersDied(RuntimeError):  # noqa: N818
    """The process of a training worker died, or its node; the message gives the reason."""
