"""The report: what is written is read again, and what is no report is refused in one line."""

from __future__ import annotations

import json

import pytest

from diffoundry.bench.report import SCHEMA_VERSION, from_json, load, save, to_json
from diffoundry.common.errors import BenchError, DiffoundryError
from diffoundry.tests.bench.reports import report


def written(change=None):
    value = json.loads(json.dumps(to_json(report())))
    if change:
        change(value)
    return value


def test_a_report_is_read_as_it_was_written(tmp_path):
    save(report(), tmp_path / "report.json")
    assert load(tmp_path / "report.json") == report()
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_newer_version_may_add_fields():
    assert from_json(written(lambda value: value.update(more=1)), "x.json") == report()


WRONG = {
    "a text for a number": (lambda v: v["request"].update(steps="20"), "request.steps must be a whole number"),
    "not a number": (lambda v: v["systems"][0]["turns"][0].update(seconds=float("nan")), "systems[0].turns[0].seconds"),
    "below 0": (lambda v: v["systems"][0]["turns"][0].update(seconds=-1), "must be 0 or more"),
    "a field is missing": (lambda v: v["machine"].pop("cores"), "machine.cores is missing"),
    "a list for an object": (lambda v: v.update(machine=[]), "machine must be an object"),
    "an unknown scenario": (lambda v: v["scenario"].update(name="x"), "scenario.name must be one of"),
    "no version": (lambda v: v.pop("schema_version"), "no schema_version"),
    "a version that is no number": (lambda v: v.update(schema_version="1"), "no schema_version"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_field_is_named_with_its_file(case):
    change, expected = WRONG[case]
    with pytest.raises(BenchError) as refused:
        from_json(written(change), "folder/x.json")
    assert expected in str(refused.value) and "folder/x.json" in str(refused.value) and "\n" not in str(refused.value)


def test_a_newer_schema_is_refused_with_what_helps():
    with pytest.raises(BenchError, match=r"schema version 99.*upgrade diffoundry"):
        from_json(written(lambda value: value.update(schema_version=SCHEMA_VERSION + 98)), "x.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"a": ' * 100_000, "\x00\xff"])
def test_a_file_that_is_no_report_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(DiffoundryError) as refused:
        load(path)
    assert "x.json" in str(refused.value) and "\n" not in str(refused.value)


def test_a_report_that_was_cut_off_is_refused(tmp_path):
    save(report(), tmp_path / "x.json")
    whole = (tmp_path / "x.json").read_text()
    (tmp_path / "x.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(DiffoundryError, match=r"x\.json"):
        load(tmp_path / "x.json")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DiffoundryError, match=r"missing.*x\.json"):
        load(tmp_path / "x.json")
