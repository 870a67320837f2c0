"""Where tritonserver and its Python backend are, and how it is called. It does not start it.

Sources: the option list of `tritonserver --help` (2.51), Triton's secure-deployment guide.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from ctypes.util import find_library
from dataclasses import dataclass
from pathlib import Path

from backend.errors import LoadError
from backend.spans import VARIABLE

SAFE_RELEASE = "26.07"
"""The first Triton release without a published remote-code-execution CVE; the PyPI server is 24.10."""

SHARED_MEMORY_PREFIX = "tritonspeed_"
"""Files of ours in /dev/shm are this, the launcher's process id, an underscore and anything."""

_FORWARDED = "(?i)^(traceparent|tracestate|x-request-id)$"
"""Headers that become parameters of the request."""

_PROTECTED = "shared-memory,model-repository,model-config,trace,logging"
"""The APIs that change the server or reach past a model; behind a key wherever others can connect."""


@dataclass(frozen=True)
class Ports:
    """Where one server listens."""

    host: str
    grpc: int
    http: int
    metrics: int
    health: int = 0
    """The launcher's own."""

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    @property
    def local(self) -> str:
        """The address by which this machine reaches it."""
        return "127.0.0.1" if self.host in ("0.0.0.0", "") else self.host  # noqa: S104


@dataclass(frozen=True)
class Installation:
    """A tritonserver executable and, where it does not know them itself, its backends."""

    executable: Path
    backends: Path | None
    """A folder for --backend-directory; None: the server's own default."""
    bundled: Path | None
    """The PyPI wheel's folder pytriton/tritonserver, if that is what this is."""


def find(environment: Mapping[str, str] = os.environ) -> Installation:
    """$TRITONSERVER, else the one on PATH, else the PyPI wheel's. LoadError says how to get one."""
    named = environment.get("TRITONSERVER") or "tritonserver"
    found = shutil.which(named, path=environment.get("PATH"))
    if found is None and "TRITONSERVER" in environment:
        raise LoadError(f"TRITONSERVER names no executable: {named}")
    executable = Path(found) if found else _wheel() / "bin" / "tritonserver"
    if not executable.is_file():
        raise LoadError(
            "no tritonserver: none on PATH; on one machine alone `pip install --no-deps nvidia-pytriton` will do"
        )
    given = environment.get("TRITON_BACKENDS")
    folder = executable.resolve().parent.parent
    bundled = folder if (folder / "python_backend_stubs").is_dir() else None
    return Installation(executable.resolve(), Path(given) if given else None, bundled)


def _wheel() -> Path:
    return Path(sysconfig.get_path("purelib")) / "pytriton" / "tritonserver"


def check_host(installation: Installation, ports: Ports, environment: Mapping[str, str] = os.environ) -> None:
    """LoadError where a server with known security holes would listen beyond this machine."""
    if ports.loopback:
        return
    release = environment.get("NVIDIA_TRITON_SERVER_VERSION", "")
    if installation.bundled:
        raise LoadError(f"--host {ports.host}: the PyPI tritonserver (24.10) has known security holes: loopback only")
    if not release:
        raise LoadError(
            f"--host {ports.host}: NVIDIA_TRITON_SERVER_VERSION does not say which Triton this is; set it if that is"
            f" {SAFE_RELEASE} or later"
        )
    if _release(release) < _release(SAFE_RELEASE):
        raise LoadError(
            f"--host {ports.host}: Triton {release} has known security holes; {SAFE_RELEASE} or later is safe"
        )


def _release(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def link_backends(installation: Installation, folder: Path) -> Path | None:
    """The folder for --backend-directory; for the PyPI wheel one of symlinks, made at `folder`.

    Links, because a copy of the stub no longer finds the wheel's libraries beside it.
    """
    if installation.backends or not installation.bundled:
        return installation.backends
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = installation.bundled / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise LoadError(f"the PyPI tritonserver has no stub for Python {version}: use Python 3.11 or 3.12")
    python = folder / "python"
    python.mkdir(parents=True)
    for source in [stub, *(installation.bundled / "backends" / "python").iterdir()]:
        (python / source.name).symlink_to(source)
    return folder


@dataclass(frozen=True)
class Options:
    """How the server behaves, beyond where it listens."""

    explicit: bool = False
    keep_going: bool = False
    verbose: bool = False
    drain_seconds: int = 30
    admin_key: str = ""
    cache_mib: int = 0
    """Memory for answers of models whose config.pbtxt says `response_cache`; 0: no cache."""
    otel: str = ""
    """Where an OpenTelemetry collector takes traces over HTTP; empty: nothing is traced."""
    repair_minutes: float = 0.0
    """Between two tries of loading anew a model that has failed for good; 0: none."""


def command(executable: Path, repository: Path, backends: Path | None, ports: Ports, options: Options) -> list[str]:
    """The whole command line; values that Triton defaults to are left out."""
    line = [
        str(executable),
        f"--model-repository={repository}",
        "--disable-auto-complete-config",  # it would import every model.py twice
        f"--exit-timeout-secs={options.drain_seconds}",
        f"--backend-config=python,shm-region-prefix-name={SHARED_MEMORY_PREFIX}{os.getpid()}_",
        *_addresses(ports),
        *(f"--{way}-header-forward-pattern={_FORWARDED}" for way in ("grpc", "http")),
    ]
    if backends:
        line.append(f"--backend-directory={backends}")
    if options.explicit:
        line.append("--model-control-mode=explicit")
        if any(repository.iterdir()):
            line.append("--load-model=*")
    if options.keep_going:
        line += ["--exit-on-error=false", "--strict-readiness=false"]
    line += _cache(executable, options.cache_mib)
    line += _traces(options.otel)
    if options.verbose:
        line.append("--log-verbose=1")
    if not ports.loopback:
        line.append(f"--grpc-restricted-protocol={_PROTECTED}:admin-key={options.admin_key}")
        line.append(f"--http-restricted-api={_PROTECTED}:admin-key={options.admin_key}")
    return line


def _cache(executable: Path, mib: int) -> list[str]:
    """For the response cache, where this installation has one: without its library the server would not start."""
    caches = executable.parent.parent / "caches"
    if not mib or not (caches / "local" / "libtritoncache_local.so").is_file():
        return []
    return [f"--cache-directory={caches}", f"--cache-config=local,size={mib << 20}"]


def _traces(url: str) -> list[str]:
    """Every request's span to the collector; a caller's traceparent is joined where its header is forwarded."""
    settings = (
        "mode=opentelemetry",
        f"opentelemetry,url={url}",
        "opentelemetry,bsp_schedule_delay=500",
        "level=TIMESTAMPS",
        "rate=1",
    )
    return [f"--trace-config={setting}" for setting in settings] if url else []


def _addresses(ports: Ports) -> list[str]:
    ways = {"grpc": ports.grpc, "http": ports.http, "metrics": ports.metrics}
    return [f"--{way}-{what}" for way, port in ways.items() for what in (f"address={ports.host}", f"port={port}")]


def environment(
    cache: Path, temporary: Path, inherited: Mapping[str, str] = os.environ, otel: str = ""
) -> dict[str, str]:
    """What stubs and ranks need: a stub takes its packages from the first python3 on PATH and knows no PYTHONPATH.

    Files that they make for a while come to `temporary`, which the launcher removes.
    """
    folder = str(Path(sys.executable).parent)
    libraries = [path for path in (inherited.get("LD_LIBRARY_PATH"), _libpython()) if path]
    return {
        "OMP_NUM_THREADS": "1",  # for the stub; each rank sets its own number
        "TORCH_EXTENSIONS_DIR": str(cache / "torch_extensions"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "torchinductor"),  # else in the folder for temporary files
        "TRITON_CACHE_DIR": str(cache / "triton"),  # compiled kernels; else in the home, which a container may lack
        **inherited,
        "PATH": f"{folder}{os.pathsep}{inherited.get('PATH', os.defpath)}",
        **({"LD_LIBRARY_PATH": os.pathsep.join(libraries)} if libraries else {}),
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": str(temporary),
        **({VARIABLE: otel} if otel else {}),
        "TRITONSPEED_PYTHON": sys.executable,
    }


def _libpython() -> str:
    """Folder of the interpreter's shared library, which stubs load, where the system does not know it (pyenv, say)."""
    known = find_library(f"python{sys.version_info.major}.{sys.version_info.minor}")
    shared = sysconfig.get_config_var("Py_ENABLE_SHARED") and not known
    return str(sysconfig.get_config_var("LIBDIR")) if shared else ""
