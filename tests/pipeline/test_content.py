"""The first look at a source, while its reader does something else."""

from __future__ import annotations

import threading

import pytest

from qtool.checkpoint.open import open_checkpoint
from qtool.errors import NumericsError
from qtool.pipeline import content
from qtool.pipeline.content import read_content, reading_beside


def test_reading_goes_on_beside_and_is_asked_for_once(tiny_checkpoint, monkeypatch):
    model = open_checkpoint(str(tiny_checkpoint("llama")))
    threads, real = [], content.read_tensor
    monkeypatch.setattr(content, "read_tensor", lambda *args: threads.append(threading.current_thread()) or real(*args))
    with reading_beside(model) as checksum:
        found = checksum()
        assert checksum() == found
    assert len(threads) == len(model.names())
    assert threading.current_thread() not in threads
    assert found == read_content(model)


def test_whoever_fails_meanwhile_waits_for_no_more_than_what_is_begun(tiny_checkpoint, monkeypatch):
    model = open_checkpoint(str(tiny_checkpoint("llama")))
    begun, may_end, read = threading.Event(), threading.Event(), []

    def slow(_, name):
        read.append(name)
        begun.set()
        may_end.wait(60)
        return name

    monkeypatch.setattr(content, "read_tensor", slow)
    monkeypatch.setattr(content, "shares", lambda _: (1, 1))
    with pytest.raises(NumericsError, match="meanwhile"), reading_beside(model):
        assert begun.wait(60)
        threading.Timer(0.2, may_end.set).start()
        raise NumericsError("meanwhile")
    assert len(read) == 1 < len(model.names())
