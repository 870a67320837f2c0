"""Lifecycle: the thread that has a model's ranks loaded, serves with them, and loads them again after they failed.

It knows neither requests nor what the ranks compute: its owner's hooks do.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from backend.blame import tell
from backend.config import EngineConfig
from backend.errors import EngineDown, ServingError, serving
from backend.ranks.group import RankGroup, Report
from backend.ranks.restarts import Restarts
from backend.tally import ENDED, FAILED, STARTING, Tally

log = logging.getLogger("tritonspeed")

IDLE_CHECK = 0.5
"""Seconds between looks at the ranks' health, or at what came, while there is nothing to do."""
CLOSING = 5.0
"""Seconds for a step under way to come to its end before the ranks are killed."""
STUCK = 15.0
"""Seconds beyond step_timeout after which a thread that serves and does not go on has no heartbeat any more."""
UNLOADED = "is being unloaded"


@dataclass(frozen=True)
class Hooks:
    """What the owner does, all on the lifecycle's thread."""

    load: Callable[[], str]
    """Make ready ranks that have just started; what to report of them."""
    serve: Callable[[], None]
    """Serve, for a while or until the end; what it raises is a failure of the ranks."""
    fail_begun: Callable[[ServingError], None]
    """End the requests that the ranks had begun."""
    fail_all: Callable[[ServingError], None]
    """End every request."""
    meanwhile: Callable[[], None] | None = None
    """Called now and then while the ranks are down."""


class Lifecycle:
    """One model's. `start`, then `close`, from any thread."""

    def __init__(self, config: EngineConfig, group: RankGroup, tally: Tally, report: Report, hooks: Hooks) -> None:
        self.closing = threading.Event()
        """Set once the model is to end."""
        self._ranks, self._group, self._tally, self._report = config.tensor_parallel, group, tally, report
        self._hooks = hooks
        self._why = "is loading"
        self._restarts = Restarts(config, self.closing, report)
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="lifecycle", daemon=True)

    def start(self) -> None:
        """Load and begin to serve; LoadError with a one-line reason otherwise."""
        self._thread.start()
        self._started.result()

    @property
    def down(self) -> str:
        """Why the model does not serve now; empty: it does."""
        return UNLOADED if self.closing.is_set() else self._why

    @property
    def restarting(self) -> bool:
        """Whether it has served, and does not now."""
        return self._started.done() and bool(self.down)

    def check(self) -> None:
        """EngineDown unless the model serves now."""
        if down := self.down:
            raise EngineDown(f"the model {down}; try again later")

    def close(self) -> None:
        """End the ranks and every request still open."""
        self.closing.set()
        if self._why:
            self._group.kill()  # a start may take minutes
        if self._thread.ident:
            self._thread.join(CLOSING)
            self._group.kill()  # a rank that hangs
            self._thread.join()

    # ---- its thread

    def _run(self) -> None:
        try:
            self._load()
            self._started.set_result(None)
        except BaseException as error:
            self._started.set_exception(error)
            return
        try:
            while not self.closing.is_set():
                try:
                    self._hooks.serve()
                except Exception as error:
                    self._mend(error)
        finally:
            self.closing.set()
            self._tally.down(ENDED)
            self._hooks.fail_all(unloaded())
            self._group.close()

    def _load(self) -> None:
        start = time.monotonic()
        self._tally.restarts += self._started.done()
        self._group.start()
        try:
            ready = self._hooks.load()
        except BaseException:
            self._group.close()
            raise
        seconds = time.monotonic() - start
        self._tally.up(self._ranks, seconds)
        self._why = ""
        self._restarts.served()
        self._report(f"ready in {seconds:.1f} s{ready}")

    def _mend(self, error: Exception) -> None:
        """After the ranks failed: start them again, or tell whoever comes why the model does not serve any more."""
        reason = str(serving(error))
        try:
            mended = self.closing.is_set() or self._recover(reason) or self.closing.is_set()
        except Exception as second:  # a hook's own fault must not leave a model that neither serves nor says so
            tell(log, "the ranks could not be started again", second)
            mended = False
        if not mended:
            self._lose(reason)

    def _recover(self, reason: str) -> bool:
        """End what the ranks had and start them again, slower each time; False where that was given up."""
        self._report(f"down: {reason}")
        self._why = f"is restarting ({reason})"
        self._tally.down(STARTING)
        self._group.close()
        self._hooks.fail_begun(EngineDown(f"{reason}; the model is restarting, try again later"))
        return self._restarts.again(self._load, self._hooks.meanwhile)

    def _lose(self, reason: str) -> None:
        """Until the end: every request gets the reason."""
        self._why = f"has failed for good ({reason})"
        self._tally.down(FAILED)
        self._report(self._why)
        while not self.closing.is_set():
            try:
                self._hooks.fail_all(EngineDown(f"the model {self._why}"))
            except Exception as error:
                tell(log, "requests could not be failed", error)
            self.closing.wait(IDLE_CHECK)


def unloaded() -> EngineDown:
    """What ends whatever is open when the model is unloaded."""
    return EngineDown(f"the model {UNLOADED}")
