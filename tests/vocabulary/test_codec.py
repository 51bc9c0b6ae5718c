"""The codec: strict reading, errors that name the place, and what a form adds to annotations."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from bitquota.codec import Document, Form, LowerBound, Seal, UpperBound
from bitquota.errors import InvalidInput, InvalidPlan
from refusals import refused


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf(Document):
    FORM: ClassVar[Form] = Form(what="a leaf", names={"colour": "color"}, unwritten=("secret",))

    colour: Colour = Colour.RED
    size: int
    secret: int = 0

    def __post_init__(self):
        if self.size < 0:
            msg = f"a size must not be negative; got {self.size}"
            raise InvalidInput(msg, size=self.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree(Document):
    FORM: ClassVar[Form] = Form(
        what="a tree",
        error=InvalidPlan,
        schema="tree/1",
        advice="grow one",
        derived=("total", "least"),
        left_out=("note",),
        seal=Seal(leaves_out=("weather",), remedy="grow it anew"),
    )

    leaves: tuple[Leaf, ...]
    by_name: dict[str, Leaf] = field(default_factory=dict)
    pair: tuple[int, str] = (0, "")
    kinds: frozenset[Colour] = frozenset()
    share: float = 0.5
    bound: LowerBound = -math.inf
    mode: Literal["wet", "dry"] = "dry"
    chosen: NDArray[np.int64] | None = None
    note: str | None = None
    weather: str = ""

    @property
    def total(self) -> int:
        return sum(leaf.size for leaf in self.leaves)

    @property
    def least(self) -> UpperBound:
        return min((leaf.size for leaf in self.leaves), default=math.inf)


def tree(**members) -> Tree:
    return Tree(**{"leaves": (Leaf(size=2), Leaf(size=3, colour=Colour.BLUE))} | members)


def unsealed(**changes) -> dict:
    """A document whose digest is not in the way of other errors."""
    return tree().to_json() | changes


class TestToJson:
    def test_is_plain_json(self):
        made = tree(kinds=frozenset(Colour), chosen=np.array([1, 2]), pair=(3, "x"))
        data = made.to_json()
        assert data == json.loads(json.dumps(data))
        assert ["blue", "red"] == data["kinds"]
        assert [1, 2] == data["chosen"]
        assert [3, "x"] == data["pair"]
        assert {"color": "red", "size": 2} == data["leaves"][0]
        assert "tree/1" == data["schema"]
        assert (5, 2) == (data["total"], data["least"])
        assert "note" not in data

    def test_what_is_infinite_is_null(self):
        data = tree(leaves=()).to_json()
        assert data["bound"] is None
        assert data["least"] is None

    def test_texts_are_plain(self):
        """A member of an enum would be shown by its class in a log."""
        assert type(tree().to_json()["leaves"][0]["color"]) is str


class TestFromJson:
    @pytest.mark.parametrize(
        "members",
        [
            {},
            {"note": "n", "weather": "rain", "share": 1, "by_name": {"a": Leaf(size=1)}},
            {"bound": 0.1 + 0.2, "mode": "wet", "pair": (1, "é"), "kinds": frozenset(Colour)},
        ],
    )
    def test_same_value_and_bytes(self, members):
        made = tree(**members)
        text = json.dumps(made.to_json())
        again = Tree.from_json(json.loads(text))
        assert made == again
        assert text == json.dumps(again.to_json())

    def test_arrays_have_their_type(self):
        again = Tree.from_json(tree(chosen=np.array([1, 2])).to_json())
        assert np.dtype(np.int64) == again.chosen.dtype

    def test_members_with_defaults_may_be_missing(self):
        assert Leaf(size=3) == Leaf.from_json({"size": 3})

    @pytest.mark.parametrize(
        ("changes", "place", "must"),
        [
            ({"leaves": [{"size": "2"}]}, "leaves[0].size", "an integer"),
            ({"leaves": [{"size": True}]}, "leaves[0].size", "an integer"),
            ({"leaves": [{"size": 2.0}]}, "leaves[0].size", "an integer"),
            ({"leaves": [{}]}, "leaves[0].size", "is missing"),
            ({"leaves": [{"size": 1, "age": 2}]}, "leaves[0]", "got also age"),
            ({"leaves": [{"size": 1, "color": "green"}]}, "leaves[0].color", "red, blue"),
            ({"leaves": [[]]}, "leaves[0]", "an object"),
            ({"leaves": "ab"}, "leaves", "a list"),
            ({"leaves": {}}, "leaves", "a list"),
            ({"by_name": {"a": {"size": None}}}, "by_name['a'].size", "an integer"),
            ({"by_name": []}, "by_name", "an object"),
            ({"pair": [1, 2]}, "pair[1]", "text"),
            ({"share": "0.5"}, "share", "a number"),
            ({"share": False}, "share", "a number"),
            ({"bound": "x"}, "bound", "a number or null"),
            ({"mode": "damp"}, "mode", "wet, dry"),
            ({"chosen": ["1"]}, "chosen", "a list of numbers"),
            ({"note": 3}, "note", "text"),
            ({"kinds": ["green"]}, "kinds", "red, blue"),
            ({"total": 6}, "", "total that its members give, 5; got 6"),
            ({"leaves": [{"size": -1}]}, "leaves[0]", "must not be negative; got -1"),
        ],
    )
    def test_says_where_and_what(self, changes, place, must):
        with pytest.raises(InvalidPlan) as caught:
            Tree.from_json(unsealed(**changes))
        assert must in caught.value.message
        assert caught.value.details["at"].startswith(place)
        assert place in caught.value.message

    def test_values_of_an_invariant_stay_on_the_error(self):
        with pytest.raises(InvalidPlan) as caught:
            Tree.from_json(unsealed(leaves=[{"size": -1}]))
        assert {"size": -1, "at": "leaves[0]"} == caught.value.details

    def test_own_error_comes_as_it_is(self):
        with refused(InvalidInput, size=-1):
            Leaf.from_json({"size": -1})

    @pytest.mark.parametrize("data", [None, [], "x", 3, {}, {"schema": "tree/2"}])
    def test_other_schema(self, data):
        with pytest.raises(InvalidPlan, match="schema 'tree/1'.*: grow one"):
            Tree.from_json(data)

    def test_long_values_are_cut(self):
        with pytest.raises(InvalidInput) as caught:
            Leaf.from_json({"size": "x" * 10_000})
        assert len(caught.value.message) < 200


class TestSeal:
    def test_edited(self):
        with pytest.raises(InvalidPlan, match="this one was edited: grow it anew"):
            Tree.from_json(unsealed(share=0.25))

    def test_what_it_leaves_out_may_change(self):
        assert "sun" == Tree.from_json(unsealed(weather="sun")).weather

    def test_missing(self):
        data = tree().to_json()
        del data["digest"]
        with pytest.raises(InvalidPlan, match="digest"):
            Tree.from_json(data)
