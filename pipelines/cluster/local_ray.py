"""Start Ray on this machine; if it does not start, say why and where its logs are."""

from __future__ import annotations

import logging
import os
import resource
import secrets
import signal
import traceback
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.cluster.lean_ray import start_without_services
from pipelines.cluster.process_limits import RAY_TASKS, check_process_limit, list_descendants
from pipelines.errors import RayNotStarted, ResourceError

if TYPE_CHECKING:
    from ray._private.worker import RayContext

logger = logging.getLogger(__name__)

_OPTIONS = {
    "address": "local",
    "num_cpus": max(2, os.cpu_count() or 2),
    "include_dashboard": False,
    "logging_level": logging.CRITICAL,
    "log_to_driver": False,
}
# A Unix socket's path has at most 107 bytes; Ray's longest has this many after the temporary directory.
_MAX_ROOT_BYTES = 107 - len("/ray/session_2000-01-01_00-00-00_000000_4194304/sockets/plasma_store")


def start_local_ray() -> RayContext:
    """Start Ray and return its context, with a second attempt if the first one takes longer than Ray's 30 s.

    Raise ResourceError if no directory is suitable, RayNotStarted if Ray cannot start. Call it in the main thread:
    Ray's processes end with the thread that started them.
    """
    check_process_limit()
    directory = choose_ray_directory(os.environ)
    _provide_token(os.environ)
    try:
        return _init_ray(directory)
    except TimeoutError as error:
        logger.warning("%s; trying once more", error)
        try:
            return _init_ray(directory)
        except TimeoutError as again:
            raise RayNotStarted(f"{again}; tried twice. {_describe_limits()}") from again


def choose_ray_directory(environment: Mapping[str, str]) -> str:
    """Return the directory for Ray's sessions: Ray's own choice if Ray can use it, else one below /tmp or /var/tmp.

    Raise ResourceError if none is writable and short enough for Unix sockets.
    """
    roots = _list_roots(environment)
    usable = next(filter(_is_usable, roots), None)
    if usable is None:
        raise ResourceError(
            f"Ray can use none of {', '.join(roots)} for its sockets; set RAY_TMPDIR to a writable directory whose "
            f"path has at most {_MAX_ROOT_BYTES} bytes"
        )
    if usable != roots[0]:
        logger.warning(
            "Ray runs in %s/ray: %s is not writable or longer than %d bytes; RAY_TMPDIR sets another directory",
            *(usable, roots[0], _MAX_ROOT_BYTES),
        )
    return str(Path(usable) / "ray")


def _list_roots(environment: Mapping[str, str]) -> list[str]:
    preferred = environment.get("RAY_TMPDIR") or environment.get("TMPDIR") or "/tmp"
    return list(dict.fromkeys((str(Path(preferred).absolute()), "/tmp", "/var/tmp")))


def _is_usable(root: str) -> bool:
    """Report whether Ray's sockets fit below `root` and Ray's directory there, which is created, is writable."""
    if len(os.fsencode(root)) > _MAX_ROOT_BYTES:
        return False
    return _is_writable(Path(root) / "ray")


def _is_writable(directory: Path) -> bool:
    """Create a directory if needed -> whether files can be created in it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(directory, os.W_OK | os.X_OK)


def _provide_token(environment: MutableMapping[str, str]) -> None:
    """Give Ray a token for this run if it has none and cannot save one in the home directory, where it keeps it."""
    if environment.get("RAY_AUTH_TOKEN") or environment.get("RAY_AUTH_TOKEN_PATH"):
        return
    with suppress(RuntimeError):  # no home
        place = Path.home() / ".ray"
        if os.access(place / "auth_token", os.R_OK) or _is_writable(place):
            return
    environment["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _init_ray(directory: str) -> RayContext:
    """Start Ray once. Raise TimeoutError if it was too slow, RayNotStarted for other reasons."""
    import ray

    try:
        with start_without_services():
            return ray.init(**_OPTIONS, _temp_dir=directory)
    except Exception as error:  # Ray raises Exception itself if a process does not respond
        logs = _end_processes(error) or directory
        reason = f"Ray does not start on this machine ({_get_first_line(error)}); its logs are in {logs}"
        if type(error) in (Exception, RuntimeError):
            raise TimeoutError(reason) from error
        raise RayNotStarted(reason) from error


def _end_processes(error: Exception) -> str | None:
    """End the processes of a Ray that did not start -> its log directory. Ray itself leaves them until Python exits."""
    from ray._private.node import Node

    for local in _list_selves(error):
        if isinstance(local, Node):
            started = [info.process.pid for infos in local.all_processes.values() for info in infos]
            descendants = list_descendants(*started)
            local.kill_all_processes(check_alive=False)
            for pid in descendants:  # an agent without threads does not see that its parent has ended
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            return str(local.get_logs_dir_path())
    return None


def _list_selves(error: Exception) -> Iterator[object]:
    """Yield the objects whose methods the exception left: Ray returns no handle of a node that did not start."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        yield frame.f_locals.get("self")


def _get_first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def _describe_limits() -> str:
    """Return a sentence with the limits that can keep Ray from starting."""
    limits = {"ulimit -u": resource.RLIMIT_NPROC, "ulimit -n": resource.RLIMIT_NOFILE}
    soft = {name: resource.getrlimit(limit)[0] for name, limit in limits.items()}
    shown = [f"{name} is {'unlimited' if n == resource.RLIM_INFINITY else n}" for name, n in soft.items()]
    return (
        f"The machine is too busy, or a limit is too low: {', '.join(shown)}; Ray needs {RAY_TASKS} processes and "
        "threads"
    )
