"""How a job behaves as a process of a shell: its standard streams, and the signals that stop it."""

from __future__ import annotations

from jobs.shell.signals import leave_when_signalled


def prepare_process() -> None:
    """Prepare the streams and signals of this process, which does nothing but run a job."""
    leave_when_signalled()  # first, as it imports least
    from jobs.shell.streams import open_streams

    open_streams()
