"""The launcher's command line: its grammar, and what is wrong with it by itself. It starts nothing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backend import repository
from backend.errors import LoadError


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; exits with a usage message where options do not go together."""
    parser = argparse.ArgumentParser(prog="serve", description="Serve a model with tritonserver until Ctrl-C.")
    _add_model(parser.add_argument_group("what is served"))
    _add_where(parser.add_argument_group("where"))
    _add_how(parser.add_argument_group("how"))
    options = parser.parse_args(arguments)
    model_options = [options.model, options.name, options.tensor_parallel, options.dtype, *options.set]
    if options.all and any((options.model, options.name, options.task, options.repository)):
        parser.error("--all serves the samples: --model, --name, --task and --repository do not go with it")
    if options.repository and any(value is not None for value in model_options):
        parser.error(
            "--repository is served as it is: --model, --name, --tensor-parallel, --dtype and --set do not go with it"
        )
    if options.health_port is None:
        options.health_port = 8003 if options.port == 8001 else 0
    return options


def check(options: argparse.Namespace) -> None:
    """LoadError names a number that is too small."""
    for name in ("drain_seconds", "cache_mib", "log_mib", "repair_minutes"):
        value = getattr(options, name)
        if not value >= 0:  # nan too
            raise LoadError(f"--{name.replace('_', '-')} must not be negative, not {value}")
    if options.log_files < 2:
        raise LoadError(f"--log-files must be at least 2, not {options.log_files}")


def _add_model(group: Any) -> None:
    group.add_argument("--model", metavar="PATH_OR_ID", help="Hugging Face folder or hub id; default: a small sample")
    group.add_argument("--task", choices=repository.tasks(), help="default: generate and embed, generate with --model")
    group.add_argument("--all", action="store_true", help="every task that has a sample; some are trained once")
    group.add_argument("--name", help="the model's name in the server; default: the task's")
    group.add_argument("--tensor-parallel", metavar="N", type=int, help="ranks; on CUDA one per GPU (default 1)")
    group.add_argument("--dtype", help="auto, float32, bfloat16 or float16")
    group.add_argument("--set", metavar="NAME=VALUE", action="append", default=[], help="any parameter of EngineConfig")
    group.add_argument("--repository", metavar="DIR", type=Path, help="serve this model repository as it is instead")


def _add_where(group: Any) -> None:
    group.add_argument("--host", default="127.0.0.1", help="anything but loopback needs a Triton of 26.07 or later")
    group.add_argument("--port", metavar="N", type=int, default=8001, help="gRPC (default 8001; 0: any free one)")
    group.add_argument("--http-port", metavar="N", type=int, default=8000, help="default 8000; 0: any free one")
    group.add_argument("--metrics-port", metavar="N", type=int, default=8002, help="default 8002; 0: any free one")
    group.add_argument(
        "--health-port", metavar="N", type=int, help="GET /health (default 8003, with another --port any free one)"
    )


def _add_how(group: Any) -> None:
    group.add_argument(
        "--explicit", action="store_true", help="models can be deployed into, and taken out of, the running server"
    )
    group.add_argument(
        "--repair-minutes",
        metavar="M",
        type=float,
        default=10,
        help="with --explicit: minutes between tries of loading anew what has failed for good (default 10; 0: none)",
    )
    group.add_argument("--keep-going", action="store_true", help="serve the other models when one fails to load")
    group.add_argument(
        "--drain-seconds", metavar="S", type=int, default=30, help="for requests in flight at the end (default 30)"
    )
    group.add_argument(
        "--cache-mib",
        metavar="N",
        type=int,
        default=0,  # Triton 2.51 keeps failures too, and answers them again as a success without outputs
        help="memory for answers that repeat (default 0: none; Triton 2.51 also keeps failures, as empty answers)",
    )
    group.add_argument(
        "--otel", metavar="URL", default="", help="send traces there, e.g. http://127.0.0.1:4318/v1/traces"
    )
    group.add_argument(
        "--log-mib", metavar="N", type=int, default=64, help="size of a file of the log (default 64; 0: any)"
    )
    group.add_argument(
        "--log-files", metavar="N", type=int, default=4, help="files of the log that are kept (default 4; at least 2)"
    )
    group.add_argument("--detach", action="store_true", help="return once it is ready, and leave it running")
    group.add_argument("--verbose", action="store_true", help="everything that tritonserver prints")
