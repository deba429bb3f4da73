"""Ends a run on SIGTERM or SIGINT: after the running update while it trains, and at once otherwise."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Stopped(Exception):
    """The run was told to stop, and what it has is saved; `exit_status` is 128 + the signal's number."""

    def __init__(self, signum: int):
        """Remember the signal."""
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_status = 128 + signum


class StopSignals:
    """While installed, SIGTERM and SIGINT raise `Stopped`, or are kept for later inside `deferred()`.

    Whatever a run writes outside the training loop appears in one piece or not at all, so it may stop
    anywhere there. A second signal does not wait.
    """

    def __init__(self) -> None:
        """Start without a signal."""
        self._deferring = False
        self._received: int | None = None

    @property
    def received(self) -> bool:
        """Whether a signal came that was kept for later."""
        return self._received is not None

    @contextlib.contextmanager
    def installed(self) -> Iterator["StopSignals"]:
        """Handle the signals inside the block, and leave them as they were after it."""
        previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Keep a signal until the block looks at `received` and ends; then raise it.

        Raises:
            Stopped: at the end of the block, if a signal came in it.
        """
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self._received is not None:
            raise Stopped(self._received)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if not self._deferring or self._received is not None:
            raise Stopped(signum)
        self._received = signum
