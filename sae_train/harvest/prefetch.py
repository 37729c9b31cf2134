"""Prefetching: one background thread that harvests while the training step runs, one piece of work after another.

The stream chooses the pieces and limits their number. The thread takes part in no collective, and pauses while another
user needs the language model or the tokenizer. Results never depend on it. The caller does a piece that is late, and no
checkpoint holds a piece that came early.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


def _keep_to(threads: int, *, others: int) -> None:
    """Set the number of torch threads of this thread, and keep `others` for threads that start later.

    `torch.set_num_threads` also changes the number for threads that start later.
    """
    torch.get_num_threads()  # else this thread's first work would set all of it again
    torch.set_num_threads(threads)
    helper = threading.Thread(target=torch.set_num_threads, args=(others,))
    helper.start()
    helper.join()


class Result(Generic[T]):
    """The result of some work: a value, or an error that `get` raises.

    Background threads create it, and the thread that needs the value reads it.
    """

    def __init__(self, work: Callable[[], T]) -> None:
        self._error: BaseException | None = None
        try:
            self._value = work()
        except BaseException as error:  # memory, disk or text: `get` raises it where the value is needed
            self._error = error

    @property
    def failed(self) -> bool:
        return self._error is not None

    def get(self) -> T:
        """Return the value.

        Raises:
            BaseException: the error that ended the work.
        """
        if self._error is not None:
            raise self._error
        return self._value


class Prefetcher:
    """The background thread of a stream. It starts with the first change, and only if it is on.

    Attributes:
        seconds: time that the thread has worked.
        blocked: time that others have waited for its current piece to end.
    """

    def __init__(
        self,
        find: Callable[[], Callable[[], None] | None],
        *,
        is_on: bool,
        device: torch.device,
        threads: int | None = None,
    ) -> None:
        """Args:
        find: returns the next piece of work, or None while there is nothing to do. No change happens during the call.
        is_on: whether the thread may start.
        device: device of the work.
        threads: torch threads of the work on a CPU; None: as many as the step has. More threads than cores make the
            threads of the step sleep between any two operations.
        """
        self._find, self._is_on, self._device, self._threads = find, is_on, device, threads
        self._condition = threading.Condition(threading.RLock())
        self._thread: threading.Thread | None = None
        self._step_threads = 0  # torch threads of the step, set when the thread starts
        self._pauses, self._working, self._closed = 0, False, False
        self._error: BaseException | None = None
        self.seconds = self.blocked = 0.0

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Enter a block that changes state which `find` reads. The thread calls `find` again afterwards.

        Raises:
            BaseException: the error that ended the thread, if there was one.
        """
        with self._condition:
            self._raise()
            yield
            if self._is_on and not self._closed and self._thread is None:
                self._step_threads = torch.get_num_threads()  # this call also fixes the number for this thread
                self._thread = threading.Thread(target=self._run, name="harvest", daemon=True)
                self._thread.start()
            self._condition.notify_all()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Enter a block during which the thread does nothing, once its current piece has ended.

        Raises:
            BaseException: the error that ended the thread, if there was one.
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
        """End the thread, once its current piece has ended."""
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
        except BaseException as error:  # of the bookkeeping: errors of the work itself are in an Result
            self._error = error
        finally:
            with self._condition:
                self._working = False
                self._condition.notify_all()

    def _work(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # each thread has its own current device
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
