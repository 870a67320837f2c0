#!/usr/bin/env python3
"""Stands in for tritonserver: takes its options, answers the readiness probe, and misbehaves as $FAKE says.

ready: serves until SIGTERM.  deaf: also ignores SIGTERM.  broken: a model fails.  crash: serves, then dies at once.
sick: serves, and its model says that it is down.  loud: prints 3 MiB before it serves.
abort: aborts while it loads, each time; abort-once: the first time.  lost-once: never answers, the first time.
"""

import http.server
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

mode = os.environ["FAKE"]
options = dict(re.match("--([^=]+)=?(.*)", given).groups() for given in sys.argv[1:])
waits = "import time; time.sleep(600)" if mode == "deaf" else "import sys; sys.stdin.read()"  # until its parent is gone
child = subprocess.Popen([sys.executable, "-c", waits], stdin=subprocess.PIPE)
prefix = options["backend-config"].partition("shm-region-prefix-name=")[2]
Path(f"/dev/shm/{prefix}fake").write_bytes(b"x")
if log := os.environ.get("FAKE_LOG"):
    Path(log).write_text(f"{os.getpid()} {child.pid}\n{os.getcwd()}\n" + "\n".join(sys.argv[1:]))

print("tritonspeed | generate | rank 0 | loaded 40 %", flush=True)
print('I1123 07:00:08.464342 9802 model_lifecycle.cc:472] "loading: generate:1"', flush=True)

if mode == "loud":
    for number in range(3 << 10):
        print(f"{number:1023}", flush=number % 100 == 0)

if mode.startswith(("abort", "lost")):
    before = Path(os.environ["FAKE_STARTS"])
    before.write_text(before.read_text() + "x" if before.exists() else "x")
    if mode == "abort" or before.read_text() == "x":
        if mode == "lost-once":
            print(
                "E1123 19:14:28.7 1 ev_epoll1_linux.cc:373] encountered epoll_wait error: Bad file descriptor",
                flush=True,
            )
            signal.pause()
        os.abort()

if mode == "sick":
    print("I1123 07:00:08.464342 9802 model_lifecycle.cc:839] \"successfully loaded 'generate'\"", flush=True)
    print("tritonspeed | generate | ready in 1 s\ntritonspeed | generate | down: rank 0 was killed", flush=True)

if mode == "broken":
    why = r"Internal: TritonModelException: LoadError: no such model: /x\n\nAt:\n  /m/1/model.py(5): initialize\n"
    print(f"E1123 07:00:08.844978 9802 model_lifecycle.cc:642] \"failed to load 'generate' version 1: {why}\"")
    print("error: creating server: Internal - failed to load all models", flush=True)
    sys.exit(1)


class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        if mode == "crash":
            os.kill(os.getpid(), signal.SIGKILL)

    def log_message(self, *_):
        pass


if mode == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
http.server.HTTPServer((options["http-address"], int(options["http-port"])), Ready).serve_forever()
