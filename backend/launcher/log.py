"""Log: a server's lines in files of bounded size, the newest last. It does not know what they say."""

from __future__ import annotations

import logging
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path


class Log:
    """`PORT.log`, and beside it `PORT.1.log` (the one before), `PORT.2.log` and so on."""

    def __init__(self, path: Path, size: int = 0, files: int = 2) -> None:
        """A file gets no longer than `size` bytes (0: any length), and no more than `files` of them are kept."""
        self.path = path
        self.clear()
        self._file = _File(path, maxBytes=size, backupCount=max(1, files - 1), encoding="utf-8", errors="replace")
        self._file.namer = lambda name: f"{path.with_suffix('')}{Path(name).suffix}{path.suffix}"

    def write(self, line: str) -> None:
        """Whatever becomes of it: a full disk must not stop who prints."""
        self._file.emit(logging.makeLogRecord({"msg": line.rstrip("\n")}))

    def close(self) -> None:
        self._file.close()

    def clear(self) -> None:
        """Remove all of them."""
        for path in [self.path, *self.path.parent.glob(f"{self.path.stem}.[0-9]*{self.path.suffix}")]:
            path.unlink(missing_ok=True)


class _File(RotatingFileHandler):
    _told = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Say once what is wrong; later lines may come through again."""
        if not self._told:
            print(f"the log {self.baseFilename} cannot be written: {sys.exc_info()[1]}", file=sys.stderr, flush=True)
        self._told = True
