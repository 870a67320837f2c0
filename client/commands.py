"""The commands of the tasks of one answer a request, as a table. It does not know how requests travel."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from client import classify, embed, fill_mask, qa, rerank, token_classification, zero_shot_image
from client.arguments import add_flags, chosen, task_command, where, words
from client.drawing import TEXT_TO_IMAGE, add_drawing, draw
from client.errors import InvalidInput
from client.tasks import pipeline
from client.values import Key

Parser = argparse.ArgumentParser
Options = argparse.Namespace


@dataclass(frozen=True)
class Command:
    """One task on the command line."""

    task: str
    about: str
    add: Callable[[Parser], None]
    """Its own arguments."""
    keys: Mapping[str, Key]
    ask: Callable[[Any, Options, dict[str, Any]], Iterable[Any]]
    """From pipeline, arguments and the task's options: what there is to print."""
    example: str
    """Arguments to try."""


def _texts(parser: Parser) -> None:
    parser.add_argument("text", nargs="*", help="default, and for '-': standard input")


def _embed(parser: Parser) -> None:
    _texts(parser)
    parser.add_argument("--npy", type=Path, metavar="FILE", help="write the vectors there, for numpy.load")


def _classify(parser: Parser) -> None:
    _texts(parser)
    parser.add_argument("--pair", metavar="TEXT", help="the second text, for models of pairs")


def _qa(parser: Parser) -> None:
    parser.add_argument("--question", required=True, metavar="TEXT")
    parser.add_argument("--context", default="-", metavar="TEXT", help="default, and for '-': standard input")


def _rerank(parser: Parser) -> None:
    parser.add_argument("query", metavar="QUERY")
    _texts(parser)


def _zero_shot_image(parser: Parser) -> None:
    parser.add_argument("image", nargs="+", metavar="IMAGE", help="a file")
    parser.add_argument("--label", action="append", required=True, metavar="TEXT", help="may be given several times")


def _ask_texts(pipe: Any, options: Options, given: dict[str, Any]) -> Iterable[Any]:
    return cast(Iterable[Any], pipe(words(options.text), **given))


def _ask_embed(pipe: Any, options: Options, given: dict[str, Any]) -> Iterable[Any]:
    vectors = pipe(words(options.text), **given)
    if options.npy is None:
        return cast(Iterable[Any], vectors)
    try:
        with options.npy.open("wb") as file:
            np.save(file, vectors)
    except OSError as error:
        raise InvalidInput(f"cannot write {str(options.npy)!r}: {error.strerror}") from None
    return []


def _ask_classify(pipe: Any, options: Options, given: dict[str, Any]) -> Iterable[Any]:
    texts = words(options.text)
    return cast(Iterable[Any], pipe([(text, options.pair) for text in texts] if options.pair else texts, **given))


def _ask_qa(pipe: Any, options: Options, given: dict[str, Any]) -> Iterable[Any]:
    return [pipe(options.question, words([options.context])[0], **given)]


def _ask_rerank(pipe: Any, options: Options, given: dict[str, Any]) -> Iterable[Any]:
    return [pipe(options.query, words(options.text), **given)]


def _ask_zero_shot_image(pipe: Any, options: Options, given: dict[str, Any]) -> Iterable[Any]:
    return cast(Iterable[Any], pipe(options.image, options.label, **given))


COMMANDS = (
    Command("embed", "vectors of texts, a JSON list each", _embed, embed.OPTIONS, _ask_embed, "'Hello'"),
    Command("classify", "labels of texts, best first", _classify, classify.OPTIONS, _ask_classify, "'I love it'"),
    Command("qa", "answer a question from a context", _qa, qa.OPTIONS, _ask_qa,
            "--question 'Who wrote it?' --context 'Ada wrote it.'"),
    Command("rerank", "sort texts by how well they fit a query", _rerank, rerank.OPTIONS, _ask_rerank,
            "'What is fast?' 'A snail.' 'A hare.'"),
    Command("token_classification", "entities in texts", _texts, token_classification.OPTIONS, _ask_texts,
            "'Ada lives in London.'"),
    Command("fill_mask", "tokens for the mask in texts", _texts, fill_mask.OPTIONS, _ask_texts,
            "'Paris is the [MASK] of France.'"),
    Command("zero_shot_image", "which label fits an image", _zero_shot_image, zero_shot_image.OPTIONS,
            _ask_zero_shot_image, "IMAGE --label cat --label dog"),
    Command("text_to_image", "draw images of prompts", add_drawing, TEXT_TO_IMAGE, draw,
            "'a handwritten three' --output three.png"),
)  # fmt: skip


def add(commands: Any) -> None:
    """All of them."""
    for each in COMMANDS:
        parser = task_command(commands, each.task, _runner(each), each.about)
        each.add(parser)
        add_flags(parser.add_argument_group("the task (default: the model's own)"), each.keys)


def example(task: str) -> str:
    """Arguments to try a task with."""
    return next((each.example for each in COMMANDS if each.task == task), "'Hello'")


def show(result: Any) -> str:
    """A result for people: a line for each of its parts, with tabs between values; a vector, or text, as it is."""
    if isinstance(result, list):
        return "\n".join(map(show, result))
    if isinstance(result, str):
        return result
    if isinstance(result, np.ndarray):
        return json.dumps(result.tolist())
    values = asdict(result).values()
    return "\t".join(f"{each:.4f}" if isinstance(each, float) else " ".join(str(each).split()) for each in values)


def as_json(result: Any) -> str:
    """A result as one line of JSON."""
    return json.dumps(result, default=_plain, ensure_ascii=False)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else asdict(value)


def _runner(each: Command) -> Callable[[Options], None]:
    def run(options: Options) -> None:
        with pipeline(cast(Any, each.task), options.name, timeout=options.timeout, **where(options)) as pipe:
            for at, result in enumerate(each.ask(pipe, options, chosen(options, each.keys))):
                gap = "\n" if at and isinstance(result, list) else ""
                print(as_json(result) if options.json else gap + show(result), flush=True)

    return run
