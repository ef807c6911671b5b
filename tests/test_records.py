"""Committed records, the registry that makes them again, and the page that shows them."""

import math
import re
from pathlib import Path

import pytest
import render_pareto
from registry import RECORDS, RESULTS

pytestmark = pytest.mark.newest

ROOT = Path(__file__).parent.parent


def test_every_record_has_a_command_and_its_tables():
    assert {f"{record.name}.jsonl" for record in RECORDS} == {file.name for file in RESULTS.glob("*.jsonl")}
    for record in RECORDS:
        assert (RESULTS / f"{record.name}.md").exists(), record.name
        assert (ROOT / "docs" / f"{record.page}.md").exists(), record.name
        assert all((ROOT / "benchmarks" / words[0]).exists() for words in record.lines("DIR", "OUT"))


def test_commands_get_folder_and_output():
    record = next(record for record in RECORDS if record.name == "gradual_resnet20")
    assert record.lines("DIR", "OUT") == [["gradual.py", "--dataset", "cifar10", "--data-dir", "DIR", "--json", "OUT"]]
    record = next(record for record in RECORDS if record.name == "scale")
    assert record.lines("DIR", "OUT") == [["scale.py", "--json", "OUT"]]


def test_the_page_shows_every_record():
    page = (RESULTS / "README.md").read_text()
    assert [f"## {record.title}" for record in RECORDS] == re.findall(r"^## (?!What).*", page, flags=re.MULTILINE)
    for picture in re.findall(r"!\[.*\]\((.*)\)", page):
        assert (RESULTS / picture).exists(), picture


def test_a_front_is_what_nothing_beats():
    points = [(3.0, 0.9), (1.0, 0.5), (2.0, 0.4), (1.0, 0.7), (4.0, 0.9)]
    assert render_pareto.front(points, 1) == [(1.0, 0.7), (3.0, 0.9)]
    assert render_pareto.front(points, -1) == [(1.0, 0.5), (2.0, 0.4)]


def test_seconds_and_accuracies_of_the_front_are_those_of_the_record():
    found = render_pareto.means(RESULTS / "one_shot_mlpnet.jsonl", 0.95, "accuracy")
    assert found["Magnitude"][1] == pytest.approx(83.64, abs=0.005)  # as in the table
    assert all(seconds > 0 and math.isfinite(accuracy) for seconds, accuracy in found.values())
