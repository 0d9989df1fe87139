"""CompressionSchedule: texts, dicts, counts, and what it refuses."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
from cases.plans import schedules
from hypothesis import given, settings

from adsc_kernels import Boundary, CompressionSchedule


def test_parse():
    schedule = CompressionSchedule.parse("16:0.25,8:1/2@center@renumber", num_layers=32)
    assert schedule.boundaries == (Boundary(8, Fraction(1, 2)), Boundary(16, Fraction(1, 4)))
    assert (schedule.pattern, schedule.positions) == ("center", "renumber")
    assert str(schedule) == "8:1/2,16:1/4@center@renumber"
    assert schedule.num_stages == 3
    assert [schedule.stage_of_layer(layer) for layer in (0, 7, 8, 15, 16, 31)] == [0, 0, 1, 1, 2, 2]
    assert [schedule.layers_of_stage(s) for s in range(3)] == [
        range(8),
        range(8, 16),
        range(16, 32),
    ]
    assert schedule.kept(576) == (576, 288, 72)
    assert schedule.kept(7) == (7, 4, 1)
    assert schedule.kept(0) == (0, 0, 0)


def test_parse_grid():
    schedule = CompressionSchedule.parse("8:1/2x1/3@grid@renumber", num_layers=32)
    assert schedule.boundaries == (Boundary(8, Fraction(1, 6), Fraction(1, 2), Fraction(1, 3)),)
    assert schedule.kept(20, 5, 4) == (20, 6)
    with pytest.raises(ValueError, match="pattern 'grid' needs both"):
        schedule.kept(20)
    with pytest.raises(ValueError, match="pattern 'grid' needs both"):
        schedule.kept(20, 4, 4)


def test_dense():
    for schedule in (CompressionSchedule.dense(4), CompressionSchedule.parse("", 4)):
        assert schedule.num_stages == 1
        assert schedule.kept(576) == (576,)
        assert str(schedule) == ""


def test_boundary_at_the_first_layer():
    schedule = CompressionSchedule.parse("0:0", 2)
    assert schedule.layers_of_stage(0) == range(0)
    assert schedule.stage_of_layer(0) == 1
    assert schedule.kept(5) == (5, 0)


@settings(deadline=None)
@given(schedules())
def test_round_trips(schedule):
    assert CompressionSchedule.parse(str(schedule), schedule.num_layers) == schedule
    data = json.loads(json.dumps(schedule.to_dict()))
    assert CompressionSchedule.from_dict(data) == schedule
    assert hash(CompressionSchedule.from_dict(data)) == hash(schedule)
    for kept in (data, str(schedule)):
        assert CompressionSchedule.of_config(kept, schedule.num_layers) == schedule


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("8", "at character 2 expected ':'"),
        ("x:1/4", "at character 1 expected a layer number, got 'x:1/4'"),
        ("-1:1/4", "at character 1 expected a layer number"),
        ("8:1/4,", "at character 7 expected a layer number, got the end"),
        ("8:1/4,,9:1/2", "at character 7 expected a layer number"),
        ("8:", "at character 3 expected a keep share"),
        ("8:-1/4", "at character 3 expected a keep share"),
        ("8:5/4", "at character 3 expected a keep share in \\[0, 1\\], got '5/4'"),
        ("8:1.01", "at character 3 expected a keep share in \\[0, 1\\]"),
        ("8:1/0", "at character 3 .* denominator above 0"),
        ("8:1/", "at character 4 expected ',', '@' or the end, got '/'"),
        ("8:1/4 ,9:1/2", "at character 6 expected ',', '@' or the end"),
        ("8:1/4@stride", "at character 7 expected one of start, center, linspace, grid"),
        ("8:1/4@start@center", "at character 13 expected one of original, renumber"),
        ("8:1/4@start@original@start", "at character 22 expected the end"),
        ("8:1/4@", "at character 7 expected one of start"),
        ("32:1/4", "expected 0 to 31 for a decoder of 32 layers, got 32"),
        ("8:1/4,8:1/2", "each layer at most once, got 8 twice"),
        ("8:1/2x1/2", "pattern 'grid' takes rows x columns"),
        ("8:1/4@grid", "pattern 'grid' takes rows x columns"),
        ("8:1/2x@grid", "at character 7 expected a keep share"),
        ("8:1/4294967296", "denominator below 2\\^31"),
    ],
)
def test_bad_text(text, match):
    with pytest.raises(ValueError, match=match):
        CompressionSchedule.parse(text, 32)


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        ({}, ValueError, "expected the keys"),
        ({"num_layers": 4, "layers": []}, ValueError, "expected the keys"),
        ({"num_layers": "4"}, TypeError, "num_layers: expected an int, got '4'"),
        ({"num_layers": 0}, ValueError, "num_layers"),
        ({"num_layers": 4, "pattern": "x"}, ValueError, "pattern: expected one of"),
        ({"num_layers": 4, "positions": "x"}, ValueError, "positions: expected one of"),
        ({"num_layers": 4, "boundaries": [{"layer": 1}]}, ValueError, "boundaries: expected"),
        (
            {"num_layers": 4, "boundaries": [{"layer": "1", "keep": "1/4"}]},
            TypeError,
            "boundary layer: expected an int",
        ),
        (
            {"num_layers": 4, "boundaries": [{"layer": 1, "keep": "1/4,"}]},
            ValueError,
            "expected the end of the keep share",
        ),
        ("8:1/4", TypeError, "expected a mapping"),
    ],
)
def test_bad_dict(data, error, match):
    with pytest.raises(error, match=match):
        CompressionSchedule.from_dict(data)


@pytest.mark.parametrize(
    ("kept", "match"),
    [
        ("9:1/2", "boundary layer: expected 0 to 3"),
        ({"num_layers": 8}, "^adsc_schedule: expected a schedule for 4 layers, got 8$"),
        (3, "^adsc_schedule: expected text or a mapping, got 3$"),
    ],
)
def test_a_config_that_holds_no_schedule_for_this_depth(kept, match):
    with pytest.raises(ValueError, match=match):
        CompressionSchedule.of_config(kept, 4)


def test_out_of_range():
    schedule = CompressionSchedule.parse("2:1/2", 4)
    for call in (
        lambda: schedule.stage_of_layer(4),
        lambda: schedule.stage_of_layer(-1),
        lambda: schedule.layers_of_stage(2),
        lambda: schedule.kept(-1),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()


def test_grid_factors_must_agree():
    with pytest.raises(ValueError, match="keep_rows \\* keep_columns"):
        Boundary(1, Fraction(1, 3), Fraction(1, 2), Fraction(1, 2))
    with pytest.raises(ValueError, match="keep_rows and keep_columns, or neither"):
        Boundary(1, Fraction(1, 2), Fraction(1, 2))
