"""The command line `tritonspeed`. It does not know gRPC, nor more of the server than deploy and the launcher offer."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

from client.deploy import deploy, models, undeploy
from client.errors import Error, InvalidInput
from client.generate import Generate, Prompt
from client.sampling import KEYS
from client.tasks import TASKS, pipeline
from client.values import Key

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 with one line on standard error, 2 for wrong usage, 130 after Ctrl-C."""
    given = [*(sys.argv[1:] if arguments is None else arguments)]
    try:
        if given[:1] == ["serve"]:
            return _serve(given[1:])
        options = parser().parse_args(given)
        options.run(options)
        sys.stdout.flush()
    except Error as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(prog="tritonspeed", description="Models served by Triton and DeepSpeed.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_deploy(commands)
    _add_list(commands)
    _add_undeploy(commands)
    commands.add_parser("serve", help="serve models on this machine (see `tritonspeed serve --help`)", add_help=False)
    return top


def _add_generate(commands: Any) -> None:
    command = _command(commands, "generate", _generate, "complete text, written out as it comes")
    command.add_argument("prompt", nargs="*", help="default, and for '-': standard input")
    command.add_argument("--name", default="generate", help="the model's name in the server")
    command.add_argument("--chat", action="store_true", help="the prompt is a user's message, not the start of a text")
    command.add_argument("--json", action="store_true", help="one JSON line for each result, once it is whole")
    command.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds (default 600)")
    sampling = command.add_argument_group("sampling (default: the model's own)")
    for key in KEYS.values():
        if key.help:
            sampling.add_argument(f"--{key.name.replace('_', '-')}", help=key.help, **_flag(key))


def _flag(key: Key) -> dict[str, Any]:
    if key.kind == "bool":
        return {"action": argparse.BooleanOptionalAction}
    kind = {"int32": int, "int32s": int, "uint64": int, "fp32": float}.get(key.kind, str)
    return {"type": kind, "metavar": "N" if kind is not str else "TEXT", "action": "append" if _many(key) else "store"}


def _many(key: Key) -> bool:
    return key.kind in ("int32s", "strings")


def _add_deploy(commands: Any) -> None:
    command = _command(commands, "deploy", _deploy, "check a model and have the server load it")
    command.add_argument("model", metavar="MODEL", help="Hugging Face folder or hub id")
    command.add_argument("--task", choices=sorted(TASKS), default="generate")
    command.add_argument("--name", help="the model's name in the server; default: the task's")
    command.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="ranks; on CUDA one per GPU")
    command.add_argument("--dtype", help="auto, float32, bfloat16 or float16")
    command.add_argument("--max-model-len", type=int, metavar="N", help="longest prompt plus completion, tokens")
    command.add_argument("--kv-cache-fraction", type=float, metavar="F", help="share of the memory left after loading")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any parameter of EngineConfig"
    )
    command.add_argument("--repository", metavar="DIR", help="the folder that the server serves, where it is not known")
    command.add_argument("--replace", action="store_true", help="also a directory that deploy has not written")
    command.add_argument("--timeout", type=float, default=1800.0, metavar="S", help="seconds (default 1800)")


def _add_list(commands: Any) -> None:
    command = _command(commands, "list", _list, "the server's models and their states")
    command.add_argument("--json", action="store_true", help="one JSON line for each")


def _add_undeploy(commands: Any) -> None:
    command = _command(commands, "undeploy", _undeploy, "unload a model and remove the directory that deploy wrote")
    command.add_argument("name", metavar="NAME")
    command.add_argument("--repository", metavar="DIR", help="the folder that the server serves, where it is not known")
    command.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds (default 120)")


def _command(commands: Any, name: str, run: Any, about: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=about, description=f"{about[0].upper()}{about[1:]}."
    )
    where = command.add_argument_group("the server")
    where.add_argument("--host", default="localhost")
    where.add_argument("--port", type=int, default=8001, metavar="N", help="gRPC (default 8001)")
    where.add_argument("--tls", action="store_true", help="with the system's certificates")
    where.add_argument("--header", action="append", default=[], metavar="NAME=VALUE", help="sent with each request")
    command.set_defaults(run=run)
    return command


def _generate(options: argparse.Namespace) -> None:
    sampling = {name: getattr(options, name) for name in KEYS if getattr(options, name, None) is not None}
    with pipeline("generate", options.name, timeout=options.timeout, **_where(options)) as pipe:
        for text in options.prompt or ["-"]:
            words = _stdin() if text == "-" else text
            prompt: Prompt = [{"role": "user", "content": words}] if options.chat else words
            _write(pipe, prompt, sampling, options.json)


def _write(pipe: Generate, prompt: Prompt, sampling: Mapping[str, Any], as_json: bool) -> None:
    if as_json or "n" in sampling:
        found = pipe(prompt, **sampling)
        for one in found if isinstance(found, list) else [found]:
            print(json.dumps(asdict(one), ensure_ascii=False) if as_json else one.text, flush=True)
        return
    with closing(pipe.stream(prompt, **sampling)) as deltas:
        for delta in deltas:
            print(delta, end="", flush=True)
    print()


def _deploy(options: argparse.Namespace) -> None:
    own = ("task", "name", "tensor_parallel", "dtype", "max_model_len", "kv_cache_fraction", "repository", "replace")
    given = {name: getattr(options, name) for name in (*own, "timeout")}
    more: dict[str, Any] = dict(_pairs("--set", options.set))
    if twice := sorted(more.keys() & {*given, "model"}):
        raise InvalidInput(f"--set {twice[0]}: that has an option of its own")
    with deploy(options.model, **given, **_where(options), tell=_tell, **more) as pipe:
        _tell(f"{pipe.name}: ready; try: tritonspeed generate --name {pipe.name} --port {options.port} 'Hello'")


def _list(options: argparse.Namespace) -> None:
    for model in models(**_where(options)):
        if options.json:
            print(json.dumps(asdict(model), ensure_ascii=False))
        else:
            print(f"{model.name:24} {model.state or 'not loaded':12} {model.reason}".rstrip())


def _undeploy(options: argparse.Namespace) -> None:
    undeploy(options.name, repository=options.repository, timeout=options.timeout, **_where(options))


def _serve(arguments: list[str]) -> int:
    try:
        from backend.server import main as serve
    except ImportError as error:
        raise InvalidInput(
            f"serving needs the server's packages ({error}): pip install 'tritonspeed[server]'"
        ) from None
    return serve(arguments)


def _where(options: argparse.Namespace) -> dict[str, Any]:
    headers = dict(_pairs("--header", options.header))
    return {"host": options.host, "port": options.port, "tls": options.tls, "headers": headers}


def _pairs(flag: str, texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise InvalidInput(f"{flag} takes NAME=VALUE, not {text!r}")
        yield name, value


def _stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"standard input is not UTF-8: byte {error.start}") from None


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
