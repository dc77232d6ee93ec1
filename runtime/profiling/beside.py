"""What is left of the host's rates while Python launches beside its kernels: threads wherever the system puts them, and
bound to cores of their own (:mod:`meft.runtime.host.cores`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import torch

from meft.planner.base.errors import UsageError
from meft.planner.records.profile_file import Measurement
from meft.runtime.host.cores import CoreShares, bind_thread, shares_of, usable_cores
from meft.runtime.host.kernels import HostKernels
from meft.runtime.profiling.host_rates import RowWork
from meft.runtime.profiling.measure import Sample, measurement, sample

BUSY, BOUND = "host rates beside Python", "host rates beside Python, cores bound"
OPERATORS_AT_A_TIME = 64


def rates_beside_python() -> Iterator[Measurement]:
    """Shares of the rates alone, of rows gathered and gradients added up; that of bound threads where the system binds
    any and there are two cores."""
    work = RowWork()
    with closing(HostKernels()) as kernels:
        alone = sample(lambda: work.run(kernels)).median
        with _python_at_work():
            yield _share(BUSY, alone, sample(lambda: work.run(kernels)), work.detail)
    shares = _shares()
    if shares is None:
        return
    with closing(HostKernels(cores=shares.kernels)) as kernels, _python_at_work(shares.lanes):
        taken = _on_cores(shares.kernels, lambda: sample(lambda: work.run(kernels)))
        yield _share(BOUND, alone, taken, f"{work.detail}; {shares}")


def _share(name: str, alone: float, beside: Sample, detail: str) -> Measurement:
    return measurement(name, "of those alone", detail, [min(1.0, alone / seconds) for seconds in beside.seconds])


def _shares() -> CoreShares | None:
    try:
        return shares_of(usable_cores())
    except UsageError:
        return None


@contextmanager
def _python_at_work(cores: frozenset[int] | None = None) -> Iterator[None]:
    """A thread that launches small operators one after the other until the end."""
    ended = threading.Event()

    def launch() -> None:
        if cores is not None:
            bind_thread(cores)
        small = torch.ones(16)
        while not ended.is_set():
            for _ in range(OPERATORS_AT_A_TIME):
                small = small * 1.0

    thread = threading.Thread(target=launch, name="meft-launching", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _on_cores(cores: frozenset[int], work: Callable[[], Sample]) -> Sample:
    """Done by a thread of its own that is bound to these, as the host's lane is."""
    with ThreadPoolExecutor(1, initializer=bind_thread, initargs=(cores,)) as pool:
        return pool.submit(work).result()
