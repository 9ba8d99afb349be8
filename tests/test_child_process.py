"""A child process talks to its parent over a private socket and ends with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ovis_model.child_process import ChildProcess
from tests.support.processes import is_alive
from tests.support.roots import ROOT

CHILD = """
import os, socket, sys
from pathlib import Path
from ovis_model.child_process import end_with_parent
fd, parent, left = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
end_with_parent(parent, left.touch)
link = socket.socket(fileno=fd)
while data := link.recv(100):
    link.sendall(b" ".join([data, os.environ["GREETING"].encode(), str(parent).encode()]))
left.with_suffix(".closed").touch()
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "a_child.py").write_text(CHILD)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "a_child"


def test_a_child_answers_until_it_is_closed(module: str, tmp_path: Path) -> None:
    child = ChildProcess(module, tmp_path / "left", environment={"GREETING": "by test"})
    child.socket.sendall(b"hello")
    assert child.socket.recv(100) == f"hello by test {os.getpid()}".encode()
    os.kill(child.pid, signal.SIGINT)  # the child ignores it: Ctrl-C is the parent's to handle
    child.socket.sendall(b"still there?")
    assert child.socket.recv(100).startswith(b"still there?")
    assert child.poll() is None
    child.close()
    assert child.poll() == -signal.SIGKILL
    assert not (tmp_path / "left").exists()


def test_a_child_ends_when_its_socket_is_closed(module: str, tmp_path: Path) -> None:
    child = ChildProcess(module, tmp_path / "left", environment={"GREETING": ""})
    child.socket.close()
    assert child.wait() == 0
    assert (tmp_path / "left.closed").exists()


def test_a_child_cleans_up_and_ends_when_its_parent_is_killed(module: str, tmp_path: Path) -> None:
    """It does so even if another process still holds the parent's end of the socket."""
    program = (
        "import os, sys, time\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "from ovis_model.child_process import ChildProcess\n"
        f"child = ChildProcess({module!r}, {str(tmp_path / 'left')!r}, environment={{'GREETING': ''}})\n"
        "child.socket.sendall(b'x'); child.socket.recv(100)\n"
        "holder = os.fork() or time.sleep(30)\n"
        "print(child.pid, holder, flush=True)\n"
        "time.sleep(30)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child, holder = map(int, parent.stdout.readline().split())
        parent.kill()
        deadline_s = time.monotonic() + 20
        while is_alive(child):
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        os.kill(holder, signal.SIGKILL)
    assert (tmp_path / "left").exists()
