"""Report: figures as markdown tables on the screen and as JSON lines in a file; it does not know what they mean."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Report:
    """Where figures go: printed, and appended as JSON."""

    file: Path | None
    about: dict[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def row(self, cells: dict[str, Any], hidden: dict[str, Any] | None = None) -> None:
        """One line of a markdown table; `hidden` goes into the JSON alone."""
        print("| " + " | ".join(_shown(value) for value in cells.values()) + " |", flush=True)
        if self.file:
            with self.file.open("a") as out:
                out.write(json.dumps({**self.about, **cells, **(hidden or {})}) + "\n")

    def attempt(self, name: str, work: Callable[[], Any]) -> Any:
        """Its result; None, told on the screen, where it fails: the other figures are still wanted."""
        try:
            return work()
        except Exception:
            traceback.print_exc()
            self.failed.append(name)
            print(f"{name}: FAILED", flush=True)

    def head(self, title: str, *columns: str) -> None:
        print(f"\n{title}\n\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|", flush=True)


def _shown(value: Any) -> str:
    if isinstance(value, float) and abs(value) < 100:
        return f"{value:.3f}"
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value or "")
