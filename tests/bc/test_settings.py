"""Settings: what is read, and errors that name the field in one line."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc.errors import UserError, unknown
from bc.settings import PRESETS, Bits, Compensation, build_dataclass


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("w4", Bits(4)),
        ("w3g64", Bits(3, 16, 64)),
        ("w8a8", Bits(8, 8)),
        ("w4a8g128", Bits(4, 8, 128)),
        ("w1", Bits(1)),
        ("float", Bits(16, 16, -1)),
        ("w2g1", Bits(2, 16, 1)),
    ],
)
def test_bits_are_read(text, expected):
    assert Bits.parse(text) == expected
    assert expected.label == text
    assert Bits.parse(expected) is expected


widths = st.one_of(st.integers(1, 8), st.just(16))


@given(widths, st.one_of(st.integers(2, 8), st.just(16)), st.one_of(st.just(-1), st.integers(1, 4096)))
def test_labels_are_read_back(weight, activation, group):
    bits = Bits(weight, activation, group)
    if bits.label != "float":
        assert Bits.parse(bits.label) == bits
    else:
        assert (weight, activation) == (16, 16)


@pytest.mark.parametrize(
    "text", ["", "4", "w", "4w", "w4g", "w4a", "w4g-1", "w4 g64", "W4", "w4g64a8", "w4.5", "w-4", "int4", "w4g64 "]
)
def test_bits_that_are_not_understood(text):
    with pytest.raises(UserError, match=r"^bits:") as caught:
        Bits.parse(text)
    assert repr(text) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("w0", "bits.weight"),
        ("w9", "bits.weight"),
        ("w4a1", "bits.activation"),
        ("w4a9", "bits.activation"),
        ("w4g0", "bits.group_size"),
    ],
)
def test_bits_out_of_range_name_the_field(text, field):
    with pytest.raises(UserError, match=f"^{field}"):
        Bits.parse(text)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ((17,), "bits.weight"),
        ((0,), "bits.weight"),
        ((4, 1), "bits.activation"),
        ((4, 16, 0), "bits.group_size"),
        ((4, 16, -2), "bits.group_size"),
    ],
)
def test_bits_made_directly_are_checked_too(values, field):
    with pytest.raises(UserError, match=f"^{field}"):
        Bits(*values)


def test_the_presets_are_the_documented_ones():
    assert " ".join(PRESETS) == (
        "off channel sink positional paper search auto shrink lowrank affine linear classic readout"
    )
    assert Compensation.parse("off") == Compensation() and not Compensation.parse("off").enabled
    for name in ("channel", "sink", "positional"):
        found = Compensation.parse(name)
        assert (found.scope, found.granularity, found.stream, found.enabled) == (("layer",), name, "float", True)
    paper = Compensation.parse("paper")
    assert (paper.scope, paper.granularity, paper.stream) == (("layer", "block"), "positional", "float")
    assert PRESETS["sink"].sink_positions == 1
    own = Compensation(("block",))
    assert Compensation.parse(own) is own


def test_the_order_of_scopes_does_not_matter():
    assert Compensation(("model", "layer")) == Compensation(("layer", "model"))
    assert Compensation(("block", "mlp", "attention")).scope == ("attention", "mlp", "block")


@pytest.mark.parametrize(
    ("values", "field", "hint"),
    [
        ({"scope": ("layers",)}, "bc.scope", "layer"),
        ({"scope": ("layer", "layer")}, "bc.scope", "twice"),
        ({"scope": ("layer",), "granularity": "chanel"}, "bc.granularity", "channel"),
        ({"scope": ("model", "readout")}, "bc.scope", "leave model out"),
        ({"scope": ("model", "readout"), "method": "linear"}, "bc.scope", "leave model out"),
        ({"scope": ("layer", "readout"), "method": "linear"}, "bc.scope", "[block]"),
        ({"stream": "quantised"}, "bc.stream", "quantized"),
        ({"dtype": "float8"}, "bc.dtype", "float16"),
        ({"sink_positions": -1}, "bc.sink_positions", "1 or more"),
    ],
)
def test_compensation_errors_name_the_field(values, field, hint):
    with pytest.raises(UserError, match=f"^{field}") as caught:
        Compensation(**values)
    assert hint in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_preset_lists_those_known():
    with pytest.raises(UserError, match="did you mean 'paper'") as caught:
        Compensation.parse("papr")
    assert all(name in str(caught.value) for name in PRESETS)


def test_settings_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        Bits(4).weight = 3  # type: ignore[misc]


@dataclass(frozen=True)
class Example:
    size: int
    share: float = 0.5
    exact: bool = False
    kind: Literal["a", "b"] = "a"
    label: str | None = None


@pytest.mark.parametrize(
    "values",
    [
        {"size": 1},
        {"size": 0, "share": 1},
        {"size": 1, "exact": True, "kind": "b", "label": "x", "share": 2.5},
        {"size": 1, "label": None},
    ],
)
def test_dataclasses_are_built(values):
    assert build_dataclass(Example, values, "example") == Example(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"example\.size: is missing"),
        ({"size": 1, "sise": 2}, r"example option: 'sise' is not known.*did you mean 'size'"),
        ({"size": "1"}, r"example\.size: '1' is a str; a int is needed"),
        ({"size": 1.0}, r"example\.size: 1\.0 is a float"),
        ({"size": True}, r"example\.size: True is a bool"),
        ({"size": None}, r"example\.size: None"),
        ({"size": 1, "share": "half"}, r"example\.share: 'half'"),
        ({"size": 1, "share": True}, r"example\.share: True"),
        ({"size": 1, "exact": 1}, r"example\.exact: 1 is a int; a bool"),
        ({"size": 1, "kind": "c"}, r"example\.kind: 'c' is not known; allowed: a, b"),
        ({"size": 1, "kind": None}, r"example\.kind: None"),
        ({"size": 1, "kind": ["a"]}, r"example\.kind"),
        ({"size": 1, "label": 3}, r"example\.label: 3"),
    ],
)
def test_dataclass_errors_name_the_field(values, message):
    with pytest.raises(UserError, match=message) as caught:
        build_dataclass(Example, values, "example")
    assert "\n" not in str(caught.value)


def test_errors_of_closed_sets():
    assert str(unknown("x.y", 3, [1, 2])) == "x.y: 3 is not known; allowed: 1, 2"
