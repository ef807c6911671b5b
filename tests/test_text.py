"""The embedded text: its splits."""

import hashlib
import platform
import sys
from pydoc_data.topics import topics

import numpy as np
import pytest

from woodjax.datasets import load_text


def paragraphs(text):
    return {" ".join(paragraph.split()) for paragraph in bytes(text).decode().split("\n\n")} - {""}


def test_splits_share_no_paragraph_and_leave_none_out():
    text = load_text("python-reference")
    train, validation = paragraphs(text.train), paragraphs(text.validation)
    assert not train & validation
    assert train | validation == {" ".join(p.split()) for topic in topics.values() for p in topic.split("\n\n")} - {""}
    held_out = [t for t in topics if hashlib.sha256(t.encode()).hexdigest()[:2] < "20"]
    assert validation == {" ".join(p.split()) for topic in held_out for p in topics[topic].split("\n\n")} - {""}
    assert 0.03 < len(text.validation) / len(text.train) < 0.4
    assert text.source == f"Python {platform.python_version()}"


def test_rows_of_a_split():
    text = load_text()
    rows = text.rows("validation", 100)
    np.testing.assert_array_equal(rows.ravel(), text.validation[: rows.size])
    assert rows.dtype == np.uint8
    assert len(text.validation) - rows.size < 100
    with pytest.raises(ValueError, match="split is 'test'"):
        text.rows("test", 100)
    with pytest.raises(ValueError, match="length is 0"):
        text.rows("train", 0)


def test_what_is_not_there(monkeypatch):
    with pytest.raises(ValueError, match="Unknown text 'novel'"):
        load_text("novel")
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ImportError, match="has no pydoc_data"):
        load_text()
