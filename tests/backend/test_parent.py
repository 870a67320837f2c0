"""A process sees that the one that started it is gone."""

import os
import subprocess
import sys
import time

from backend import parent

CHILD = """
import time
from backend import parent
print(parent.lives(), flush=True)
while parent.lives():
    time.sleep(0.01)
print("gone", flush=True)
"""
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}])"


def test_a_killed_parent_is_noticed():
    process = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "True\n"
        process.kill()
        assert process.stdout.readline() == "gone\n"  # though nobody has waited for it: it is a zombie
    finally:
        process.kill()
        process.communicate()


def test_a_process_leaves_with_its_parent_though_its_main_thread_waits():
    stuck = "import threading; from backend import parent; parent.leave_with(); print(1, flush=True);"
    stuck += "threading.Event().wait()"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {stuck!r}])"
    process = subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "1\n"
        process.kill()
        assert process.stdout.read() == ""  # closed by both
    finally:
        process.kill()
        process.communicate()


def test_this_process_is_no_stub():
    assert not parent.is_triton()


def test_a_process_that_ends_is_dead_before_it_is_gone(monkeypatch):
    monkeypatch.setattr(parent, "_PARENT", os.getppid())
    assert parent.lives()
    child = subprocess.Popen([sys.executable, "-c", ""])
    monkeypatch.setattr(parent, "_PARENT", child.pid)
    monkeypatch.setattr(parent.os, "getppid", lambda: child.pid)
    while parent.lives():
        time.sleep(0.01)
    assert child.returncode is None  # not yet waited for
    child.wait()
    assert not parent.lives()
