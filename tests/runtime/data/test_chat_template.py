"""Chat templates are programs from elsewhere: they reach nothing outside their text, and end in time."""

from __future__ import annotations

import signal
import threading

import pytest

from meft.runtime.data import chat_template
from meft.runtime.data.chat_template import TemplateError, rendered

TURN = [{"role": "user", "content": "hello"}]


def render(tokenizer, template: str) -> str:
    tokenizer.chat_template = template
    return rendered(tokenizer, TURN, add_generation_prompt=False)


@pytest.fixture
def tokenizer():
    from glass import load_glass_tokenizer

    return load_glass_tokenizer()


def test_a_template_is_rendered(tokenizer) -> None:
    assert render(tokenizer, "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}") == "user: hello"


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append({'role': 'user'}) }}",
        "{{ raise_exception('no') }}",
        "{% include '/etc/passwd' %}",
        "\ud800",
    ],
)
def test_a_template_reaches_nothing_outside_itself(tokenizer, template, tmp_path) -> None:
    marker = tmp_path / "marker"
    with pytest.raises(TemplateError):
        render(tokenizer, template.replace("MARKER", str(marker)))
    assert not marker.exists()
    assert len(TURN) == 1


def test_a_template_that_goes_on_is_ended(tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(chat_template, "LIMIT_SECONDS", 0.2)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateError, match=r"takes more than 0\.2 s"):
        render(tokenizer, loops)


def test_somebody_elses_alarm_stays(tokenizer) -> None:
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(True))
    try:
        signal.setitimer(signal.ITIMER_REAL, 3600)
        render(tokenizer, "x")
        remaining, _ = signal.setitimer(signal.ITIMER_REAL, 0)
        assert 0 < remaining <= 3600
        signal.raise_signal(signal.SIGALRM)
        assert rung == [True]
    finally:
        signal.signal(signal.SIGALRM, before)


def test_other_threads_render_without_the_limit(tokenizer) -> None:
    said = []
    thread = threading.Thread(target=lambda: said.append(render(tokenizer, "x")))
    thread.start()
    thread.join()
    assert said == ["x"]
