"""What the commands of the command line share: the server's options, flags of a task's options, standard input.

It knows no command.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from client.errors import InvalidInput
from client.values import Key


def command(commands: Any, name: str, run: Any, about: str) -> argparse.ArgumentParser:
    """A command that talks to a server; `run` gets what was given."""
    made: argparse.ArgumentParser = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
    server = made.add_argument_group("the server")
    server.add_argument("--host", default="localhost")
    server.add_argument("--port", type=int, default=8001, metavar="N", help="gRPC (default 8001)")
    server.add_argument("--tls", action="store_true", help="with the system's certificates")
    server.add_argument("--header", action="append", default=[], metavar="NAME=VALUE", help="sent with each request")
    made.set_defaults(run=run)
    return made


def task_command(commands: Any, task: str, run: Any, about: str) -> argparse.ArgumentParser:
    """A command that asks a served model."""
    made = command(commands, task.replace("_", "-"), run, about)
    made.add_argument("--name", default=task, help="the model's name in the server")
    made.add_argument("--json", action="store_true", help="one JSON line for each result, once it is whole")
    made.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds (default 600)")
    return made


def add_flags(group: Any, keys: Mapping[str, Key]) -> None:
    """A flag for each option that has a line of help."""
    for key in keys.values():
        if key.help:
            group.add_argument(f"--{key.name.replace('_', '-')}", help=key.help, **_flag(key))


def chosen(options: argparse.Namespace, names: Mapping[str, Key]) -> dict[str, Any]:
    """What was given of a task's options."""
    return {name: getattr(options, name) for name in names if getattr(options, name, None) is not None}


def where(options: argparse.Namespace) -> dict[str, Any]:
    """The server, as `pipeline` and `deploy` take it."""
    headers = dict(pairs("--header", options.header))
    return {"host": options.host, "port": options.port, "tls": options.tls, "headers": headers}


def pairs(flag: str, texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names and values of "NAME=VALUE"."""
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise InvalidInput(f"{flag} takes NAME=VALUE, not {text!r}")
        yield name, value


def settings(texts: Sequence[str], own: Iterable[str]) -> dict[str, str]:
    """A model's parameters, as --set gives them; none of `own`, which the command gives itself."""
    given = dict(pairs("--set", texts))
    if twice := sorted(given.keys() & set(own)):
        raise InvalidInput(f"--set {twice[0]}: that has an option of its own")
    return given


def words(texts: Sequence[str]) -> list[str]:
    """Texts; standard input where there are none, and for '-'."""
    return [stdin() if text == "-" else text for text in texts or ["-"]]


def stdin() -> str:
    """All of standard input."""
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"standard input is not UTF-8: byte {error.start}") from None


def _flag(key: Key) -> dict[str, Any]:
    if key.kind == "bool":
        return {"action": argparse.BooleanOptionalAction}
    kind = {"int32": int, "int32s": int, "uint64": int, "fp32": float}.get(key.kind, str)
    many = key.kind in ("int32s", "strings")
    return {"type": kind, "metavar": "N" if kind is not str else "TEXT", "action": "append" if many else "store"}
