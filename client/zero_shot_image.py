"""ZeroShotImage: images and labels in, which label fits each image out. It does not know how requests travel."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypedDict, Unpack, overload

from client.classify import OUTPUTS, Label, labels
from client.errors import InvalidInput
from client.pipeline import AsyncPipeline, Call, Pipeline
from client.rows import call, is_many, listed, texts
from client.values import table, tensors

OPTIONS = table(("hypothesis_template", "string", "what each label is put into, in the place of {}"))


class Picture(Protocol):
    """An image of PIL."""

    def save(self, fp: Any, format: str) -> None: ...  # noqa: A002


Image: TypeAlias = str | Path | bytes | Picture
"""A file's path, its content (PNG, JPEG, WebP ...) or an image of PIL."""


class Options(TypedDict, total=False):
    """Keyword arguments, all optional."""

    hypothesis_template: str
    timeout: float | None
    """Seconds for each request; None: the pipeline's own."""


class ZeroShotImage(Pipeline):
    """Labels of images, blocking."""

    @overload
    def __call__(self, image: Image, labels: list[str], **options: Unpack[Options]) -> list[Label]: ...
    @overload
    def __call__(self, image: list[Image], labels: list[str], **options: Unpack[Options]) -> list[list[Label]]: ...
    def __call__(self, image: Any, labels: list[str], **options: Any) -> Any:
        """The labels with how well each fits the image, best first; of a list of images, those of each."""
        return self.ask(questions(image, labels, **options), options.get("timeout"))


class AsyncZeroShotImage(AsyncPipeline):
    """Labels of images for asyncio."""

    @overload
    async def __call__(self, image: Image, labels: list[str], **options: Unpack[Options]) -> list[Label]: ...
    @overload
    async def __call__(
        self, image: list[Image], labels: list[str], **options: Unpack[Options]
    ) -> list[list[Label]]: ...
    async def __call__(self, image: Any, labels: list[str], **options: Any) -> Any:
        """As `ZeroShotImage.__call__`."""
        return await self.ask(questions(image, labels, **options), options.get("timeout"))


def questions(image: Any, choices: Any, *, timeout: float | None = None, **options: Any) -> Call[Any]:
    """The task: one row an image, with all labels."""
    wanted = [each for (each,) in texts(listed(choices, "labels"), "label")]
    if not all(wanted) or not wanted:
        raise InvalidInput("labels must not be empty")
    files = [[read(each)] for each in (image if is_many(image) else [image])]
    columns = {"image": files, "labels": [wanted] * len(files)}
    return call(columns, tensors(OPTIONS, options), labels, OUTPUTS, is_many(image))


def read(image: Image) -> bytes:
    """The content of an image's file; PIL's images become PNG. InvalidInput names a file that cannot be read."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        try:
            return Path(image).expanduser().read_bytes()
        except OSError as error:
            raise InvalidInput(f"cannot read the image {str(image)!r}: {error.strerror}") from None
    if not hasattr(image, "save"):
        raise InvalidInput(f"image must be a path, bytes or an image of PIL, not {type(image).__name__}")
    content = io.BytesIO()
    image.save(content, format="PNG")
    return content.getvalue()
