"""ZeroShotImage: images and labels in, which label fits each image out. It does not know how requests travel."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypedDict, Unpack, cast, overload

import numpy as np
from numpy.typing import NDArray

from client.classify import OUTPUTS, Label, labels
from client.errors import InvalidInput
from client.pipeline import AsyncPipeline, Call, Pipeline
from client.rows import call, is_many, listed, texts
from client.values import table, tensors

OPTIONS = table(("hypothesis_template", "string", "what each label is put into, in the place of {}"))


class Picture(Protocol):
    """An image of PIL."""

    def save(self, fp: Any, format: str) -> None: ...  # noqa: A002


Image: TypeAlias = str | Path | bytes | Picture | NDArray[np.uint8]
"""A file's path, its content (PNG, JPEG, WebP ...), an image of PIL, or uint8 pixels, [height, width(, 3)]."""


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
    many = is_many(image) and not _is_pixels(image)
    files = [[read(each)] for each in (image if many else [image])]
    columns = {"image": files, "labels": [wanted] * len(files)}
    return call(columns, tensors(OPTIONS, options), labels, OUTPUTS, many)


def _is_pixels(image: Any) -> bool:
    """Whether it is one image as an array; arrays of more or fewer dimensions are lists of images."""
    return isinstance(image, np.ndarray) and image.ndim in (2, 3)


def read(image: Image, name: str = "image") -> bytes:
    """The content of an image's file; pixels and PIL's images become PNG. InvalidInput: a file that cannot be read."""
    if isinstance(image, np.ndarray):
        image = pixels(image, name)
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | Path):
        try:
            return Path(image).expanduser().read_bytes()
        except OSError as error:
            raise InvalidInput(f"cannot read the image {str(image)!r}: {error.strerror}") from None
    if not hasattr(image, "save"):
        raise InvalidInput(f"{name} must be a path, bytes, an image of PIL or pixels, not {type(image).__name__}")
    content = io.BytesIO()
    image.save(content, format="PNG")
    return content.getvalue()


def pixels(image: NDArray[Any], name: str) -> Picture:
    """An image of PIL; InvalidInput unless the array is one image."""
    if image.dtype != np.uint8 or image.ndim < 2 or image.shape[2:] not in ((), (3,), (4,)) or not image.size:
        raise InvalidInput(f"{name} must be of uint8, [height, width, 3] or [height, width]")
    return cast(Picture, pillow().fromarray(image))


def pillow() -> Any:
    """PIL.Image; InvalidInput says how to get it where it is missing."""
    try:
        from PIL import Image
    except ImportError as error:
        raise InvalidInput(f"images need Pillow ({error}): pip install pillow") from None
    return Image
