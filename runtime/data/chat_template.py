"""Chat templates: programs from elsewhere, run in transformers' sandbox and for a limited time.

transformers runs a template in Jinja's immutable sandbox, where it reaches no file, no module and no attribute that
begins with an underscore. A loop can still be long, so a rendering that takes more than :data:`LIMIT_SECONDS` is
ended, where the system has interval timers and this is the process's main thread, which alone receives signals.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

LIMIT_SECONDS = 10.0


class TemplateError(Exception):
    """A template that cannot be rendered; the text says why."""


def rendered(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    tools: Sequence[Any] = (),
) -> str:
    """A conversation as text, with the tools that it may use. Raises :class:`TemplateError`, whatever the template
    does.
    """
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
    if tools:
        options["tools"] = list(tools)
    try:
        with _limited():
            text = str(tokenizer.apply_chat_template(list(messages), **options))
        text.encode()  # half of a surrogate pair, which no tokenizer can read, is refused here
    except _TakesTooLong:
        raise TemplateError(f"it takes more than {LIMIT_SECONDS:g} s for one conversation") from None
    except Exception as error:  # it raises what it likes
        raise TemplateError(str(error)) from error
    return text


class _TakesTooLong(BaseException):
    """Not an Exception, which a template's own machinery might catch."""


@contextmanager
def _limited() -> Iterator[None]:
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise _TakesTooLong

    before, started = signal.signal(signal.SIGALRM, stop), time.monotonic()
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if remaining:  # somebody else's alarm goes off when it would have
            signal.setitimer(signal.ITIMER_REAL, max(remaining - time.monotonic() + started, 1e-3), interval)
