"""Harvest that comes early: one thread beside the training step, which does piece after piece as long as there are any.

What a piece is, and how far ahead of the run there may be some, the stream says; the thread speaks to no other rank,
and stands still while anything else uses the language model or the tokenizer. Results never depend on it: what it has
not done in time is done by who waits for it, and what it has done too early is in no checkpoint.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


def _keep_to(threads: int, *, others: int) -> None:
    """Give this thread that many of torch's, and threads that begin later `others`, which torch would change alike."""
    torch.get_num_threads()  # else this thread's first work would set all of it again
    torch.set_num_threads(threads)
    helper = threading.Thread(target=torch.set_num_threads, args=(others,))
    helper.start()
    helper.join()


class Outcome(Generic[T]):
    """What some work came to: a value, or an error that is raised where the value is asked for."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._error: BaseException | None = None
        try:
            self._value = work()
        except BaseException as error:  # memory, disk, text: whoever needs the value has to do with it
            self._error = error

    @property
    def failed(self) -> bool:
        return self._error is not None

    def get(self) -> T:
        """Return the value.

        Raises:
            BaseException: what the work ran into.
        """
        if self._error is not None:
            raise self._error
        return self._value


class Prefetcher:
    """The thread; it starts with the first change, and only if it may ever be ahead.

    Attributes:
        seconds: how long it has worked.
        blocked: how long others have waited for a piece of it to end.
    """

    def __init__(
        self,
        find: Callable[[], Callable[[], None] | None],
        *,
        is_on: bool,
        device: torch.device,
        threads: int | None = None,
    ) -> None:
        """Begin nothing yet.

        Args:
            find: returns the next piece of work, None while there is nothing to do; no change happens during the call.
            is_on: false: never start it.
            device: where the work is done.
            threads: of torch's on the CPU for it; None: as many as anything else. Threads of its own make those of the
                step sleep between any two operations, as OpenMP then sees more of them than cores.
        """
        self._find, self._is_on, self._device, self._threads = find, is_on, device, threads
        self._condition = threading.Condition(threading.RLock())
        self._thread: threading.Thread | None = None
        self._step_threads = 0  # of the thread that starts ours, known then
        self._pauses, self._working, self._closed = 0, False, False
        self._error: BaseException | None = None
        self.seconds = self.blocked = 0.0

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Change inside what `find` looks at; afterwards the thread looks again.

        Raises:
            BaseException: what ended the thread, if anything has.
        """
        with self._condition:
            self._raise()
            yield
            if self._is_on and not self._closed and self._thread is None:
                self._step_threads = torch.get_num_threads()  # and fixes them for who calls
                self._thread = threading.Thread(target=self._run, name="harvest", daemon=True)
                self._thread.start()
            self._condition.notify_all()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Wait for the piece under way to end, and let none begin inside.

        Raises:
            BaseException: what ended the thread, if anything has.
        """
        with self._condition:
            self._pauses += 1
        try:
            with self._condition:
                began, waits = time.perf_counter(), self._working
                self._condition.wait_for(lambda: not self._working)
                self.blocked += time.perf_counter() - began if waits else 0.0
                self._raise()
            yield
        finally:
            with self._condition:
                self._pauses -= 1
                self._condition.notify_all()

    def close(self) -> None:
        """End the thread, once the piece under way has ended."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # not of a piece's work, which is an Outcome's: of the bookkeeping around it
            self._error = error
        finally:
            with self._condition:
                self._working = False
                self._condition.notify_all()

    def _work(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # of a thread of its own
        if self._threads is not None:
            _keep_to(self._threads, others=self._step_threads)
        while True:
            with self._condition:
                piece = None
                while not self._closed and (self._pauses or (piece := self._find()) is None):
                    self._condition.wait()
                if piece is None or self._closed:
                    return
                self._working = True
            began = time.perf_counter()
            piece()
            with self._condition:
                self.seconds += time.perf_counter() - began
                self._working = False
                self._condition.notify_all()
