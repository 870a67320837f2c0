"""The launcher: `python -m backend.server` serves models on this machine until it is told to stop.

It composes a repository, watches one tritonserver and cleans up; it knows neither what a model computes nor how a
request looks.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from types import FrameType

from backend import repository, samples
from backend.config import EngineConfig
from backend.devices import free_gpu_memory
from backend.errors import ServingError
from backend.launcher import detach, leftovers, run_folder, tritonserver
from backend.launcher.child import Child
from backend.launcher.dismissal import Dismissal
from backend.launcher.greeting import greeting
from backend.launcher.health import Health, ready, served
from backend.launcher.log import Log
from backend.launcher.options import check, parse
from backend.launcher.output import Output
from backend.launcher.ports import require_free
from backend.launcher.repair import GRPC_KEY, Repair, looking, reach
from backend.launcher.tritonserver import Options, Ports
from client import local
from client.arguments import settings
from client.errors import Error as ClientError

_DEAF_SECONDS = 20.0
"""From when the server says that it listens until it answers: usually far less than one."""
_POLL_SECONDS = 0.2
_SHARED_FRACTION = "0.6"
"""generate's share of a GPU's free memory where other models are served beside it; alone it takes 0.9."""
_KILL_SECONDS = 5
"""After the drain: 2.51 can outlast its own exit timeout while a gRPC stream is open."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 after a stop that was asked for, 1 with one line on standard error otherwise."""
    options = parse(arguments)
    try:
        if options.detach:
            given = sys.argv[1:] if arguments is None else arguments
            return detach.start([argument for argument in given if argument != "--detach"], run_folder.run())
        return serve(options)
    except (ServingError, ClientError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def serve(options: argparse.Namespace) -> int:
    """From the checks that cost nothing to the last process gone."""
    check(options)
    signal.signal(signal.SIGTERM, _interrupt)  # until the child is there to be stopped in order
    installation = tritonserver.find()
    names = ("port", "http_port", "metrics_port", "health_port")
    wanted = {f"--{name.replace('_', '-')}": getattr(options, name) for name in names}
    ports = Ports(options.host, *require_free(options.host, wanted).values())
    tritonserver.check_host(installation, ports)
    leftovers.sweep()
    with ExitStack() as stack:
        folder = stack.enter_context(run_folder.run_folder())
        models = options.repository.absolute() if options.repository else compose(options, folder / "models")
        behaviour = _behaviour(options, ports)
        backends = tritonserver.link_backends(installation, folder / "backends")
        line = tritonserver.command(installation.executable, models, backends, ports, behaviour)
        (folder / "cwd").mkdir()  # the stubs' first place to import from: it must hold nothing
        (folder / "tmp").mkdir()  # for what stubs that are killed would leave in the machine's own
        environment = tritonserver.environment(run_folder.cache(), folder / "tmp", otel=options.otel)
        stack.callback(leftovers.remove, os.getpid())
        for starts in (1, 2):
            log = Log(run_folder.run() / f"{ports.grpc}.log", options.log_mib << 20, options.log_files)
            output = Output(log, options.verbose)
            child = Child(line, environment, folder / "cwd", output.read)
            stack.callback(child.kill)
            with served(Health(ports, models, output.states), ports.host, ports.health):
                status = watch(child, output, ports, behaviour, models, folder / "tmp", last=starts == 2)
            if status is not None:
                return status
            _say("tritonserver came to nothing while it started: starting it once more")
            child.kill()
            leftovers.remove(os.getpid())
    raise AssertionError("the last start has a status")


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def compose(options: argparse.Namespace, models: Path) -> Path:
    """A repository of the models that the options name; the error names a parameter that does not exist."""
    given = {"tensor_parallel": options.tensor_parallel, "dtype": options.dtype}
    parameters = {key: str(value) for key, value in given.items() if value is not None}
    parameters |= settings(options.set, vars(options))
    EngineConfig.from_parameters({"model": "-", **parameters})
    wanted = _tasks(options)
    found = [samples.locate(options.model, wanted[0])] if len(wanted) == 1 else samples.fetch_all(wanted)
    models.mkdir(parents=True)
    for task, folder in zip(wanted, found, strict=True):
        own = {"kv_cache_fraction": _SHARED_FRACTION} if len(wanted) > 1 and task == "generate" and _on_gpu() else {}
        repository.write(models, task, options.name or task, {**own, **parameters, "model": str(folder)})
    return models


def _tasks(options: argparse.Namespace) -> list[str]:
    """What is served: all that has a sample, the task that is named, or the two that most people try first."""
    if options.all:
        return [task for task in samples.SAMPLES if task in repository.tasks()]
    if options.task or options.model or options.name:
        return [options.task or "generate"]
    return ["generate", "embed"]


def _on_gpu() -> bool:
    return bool(free_gpu_memory())


def _behaviour(options: argparse.Namespace, ports: Ports) -> Options:
    key = os.environ.get("TRITONSPEED_ADMIN_KEY", "") if not ports.loopback else ""
    if not ports.loopback and not key:
        key = secrets.token_urlsafe(16)
        _say(
            "the server's own APIs (model repository, shared memory, ...) need a key in the header admin-key, "
            f"over gRPC in {GRPC_KEY}: {key}"
        )
    drain, cache = options.drain_seconds, options.cache_mib
    repair = options.repair_minutes if options.explicit else 0.0
    return Options(options.explicit, options.keep_going, options.verbose, drain, key, cache, options.otel, repair)


def watch(
    child: Child, output: Output, ports: Ports, behaviour: Options, models: Path, temporary: Path, last: bool
) -> int | None:
    """Until the server ends, or a signal asks for its end.

    None where it is worth another start, unless this is the last: 2.51 may abort (lock_exception) when a model fails to
    load on a busy machine, and one start in some fifty loses a file descriptor that it waits at, and never answers.
    """
    begin = time.monotonic()
    while not ready(ports):
        if child.wait(_POLL_SECONDS):
            return _stop(child, output, behaviour)
        if not last and (child.ended() == -signal.SIGABRT or output.deaf(_DEAF_SECONDS)):
            return None
        if child.ended() is not None:
            return _failed(child, output, "did not start")
    local.announce(ports.grpc, ports.http, models, behaviour.explicit, ports.health, ports.local)
    try:
        for line in greeting(ports, models, time.monotonic() - begin):
            _say(line)
        detach.tell_ready()
        with _care(output, ports, behaviour, models, temporary):
            while child.ended() is None:
                if child.wait(3600):
                    return _stop(child, output, behaviour)
        return _failed(child, output, "ended")
    finally:
        local.withdraw(ports.grpc)


def _care(
    output: Output, ports: Ports, behaviour: Options, models: Path, temporary: Path
) -> AbstractContextManager[None]:
    """For models that come and go by hand: what Triton itself does not see to."""
    if not behaviour.explicit:
        return nullcontext()
    way, pause = reach(ports, behaviour.admin_key), 60 * behaviour.repair_minutes
    looks = [Dismissal(way, temporary).look]
    if behaviour.repair_minutes:
        looks.append(Repair(output.states, way, lambda name: (models / name).is_dir(), pause, _say).look)
    return looking(*looks)


def _stop(child: Child, output: Output, behaviour: Options) -> int:
    _say("stopping; requests in flight may finish (a second signal ends them)")
    if not child.stop(behaviour.drain_seconds + _KILL_SECONDS):
        _say("stopped without waiting any longer")
    output.log.clear()
    return 0


def _failed(child: Child, output: Output, what: str) -> int:
    status = child.ended()
    child.kill()
    how = f"signal {-status}" if status is not None and status < 0 else f"status {status}"
    reason = "; ".join(output.failures) or f"tritonserver {what} ({how})"
    _say(f"error: {reason} (all it said: {output.log.path})")
    return 1


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
