"""The command line `tritonspeed`. It does not know gRPC, nor more of the server than deploy and the launcher offer."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

from client import commands
from client.arguments import add_flags, chosen, command, settings, task_command, where, words
from client.deploy import deploy, models, undeploy
from client.errors import Error
from client.generate import Generate, Prompt
from client.packages import missing
from client.sampling import KEYS
from client.tasks import TASKS, pipeline

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
    verbs = top.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(verbs)
    commands.add(verbs)
    _add_deploy(verbs)
    _add_list(verbs)
    _add_undeploy(verbs)
    verbs.add_parser("serve", help="serve models on this machine (see `tritonspeed serve --help`)", add_help=False)
    return top


def _add_generate(verbs: Any) -> None:
    made = task_command(verbs, "generate", _generate, "complete text, written out as it comes")
    made.add_argument("prompt", nargs="*", help="default, and for '-': standard input")
    made.add_argument("--chat", action="store_true", help="the prompt is a user's message, not the start of a text")
    add_flags(made.add_argument_group("sampling (default: the model's own)"), KEYS)


def _add_deploy(verbs: Any) -> None:
    made = command(verbs, "deploy", _deploy, "check a model and have the server load it")
    made.add_argument("model", metavar="MODEL", help="Hugging Face folder or hub id")
    made.add_argument("--task", choices=sorted(TASKS), default="generate")
    made.add_argument("--name", help="the model's name in the server; default: the task's")
    made.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="ranks; on CUDA one per GPU")
    made.add_argument("--dtype", help="auto, float32, bfloat16 or float16")
    made.add_argument("--max-model-len", type=int, metavar="N", help="longest prompt plus completion, tokens")
    made.add_argument("--kv-cache-fraction", type=float, metavar="F", help="share of the memory left after loading")
    made.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="any parameter of EngineConfig")
    made.add_argument("--repository", metavar="DIR", help="the folder that the server serves, where it is not known")
    made.add_argument("--replace", action="store_true", help="also a directory that deploy has not written")
    made.add_argument("--timeout", type=float, default=1800.0, metavar="S", help="seconds (default 1800)")


def _add_list(verbs: Any) -> None:
    made = command(verbs, "list", _list, "the server's models and their states")
    made.add_argument("--json", action="store_true", help="one JSON line for each")


def _add_undeploy(verbs: Any) -> None:
    made = command(verbs, "undeploy", _undeploy, "unload a model and remove the directory that deploy wrote")
    made.add_argument("name", metavar="NAME")
    made.add_argument("--repository", metavar="DIR", help="the folder that the server serves, where it is not known")
    made.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds (default 120)")


def _generate(options: argparse.Namespace) -> None:
    sampling = chosen(options, KEYS)
    with pipeline("generate", options.name, timeout=options.timeout, **where(options)) as pipe:
        for text in words(options.prompt):
            prompt: Prompt = [{"role": "user", "content": text}] if options.chat else text
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
    names = ("task", "name", "tensor_parallel", "dtype", "max_model_len", "kv_cache_fraction", "repository", "replace")
    own = {name: getattr(options, name) for name in (*names, "timeout")} | where(options) | {"tell": _tell}
    parameters: dict[str, Any] = settings(options.set, {"model", *own})
    with deploy(options.model, **own, **parameters) as pipe:
        verb, what = options.task.replace("_", "-"), commands.example(options.task)
        _tell(f"{pipe.name}: ready; try: tritonspeed {verb} --name {pipe.name} --port {options.port} {what}")


def _list(options: argparse.Namespace) -> None:
    for model in models(**where(options)):
        if options.json:
            print(json.dumps(asdict(model), ensure_ascii=False))
        else:
            print(f"{model.name:24} {model.state or 'not loaded':12} {model.reason}".rstrip())


def _undeploy(options: argparse.Namespace) -> None:
    undeploy(options.name, repository=options.repository, timeout=options.timeout, **where(options))


def _serve(arguments: list[str]) -> int:
    try:
        from backend.server import main as serve
    except ImportError as error:
        raise missing("serving", error) from None
    return serve(arguments)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
