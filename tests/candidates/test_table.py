"""Layers, ties, exclusions and the table of what each group may become."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitquota.candidates.layers import Inventory, Layer, LayerKind, UnquantizedTensor, match_layers
from bitquota.candidates.storage import Scheme, storage_size
from bitquota.candidates.table import (
    RESOURCES,
    Candidate,
    CandidateTable,
    Row,
    enumerate_candidates,
)
from bitquota.canonical import canonical_json
from bitquota.errors import InvalidInput, InvalidModel, UnknownLayer
from refusals import refused
from vocabulary_strategies import WIDTHS, choices, inventories, layers, schemes, tables


def layer(name: str, rows: int = 4, columns: int = 8, **members) -> Layer:
    return Layer(
        name=name,
        kind=LayerKind.LINEAR,
        weight_name=f"{name}.weight",
        weight_shape=(rows, columns),
        rows=rows,
        columns=columns,
        n_weights=rows * columns,
        **members,
    )


def inventory(*names: str) -> Inventory:
    return Inventory(model_digest="sha256:00", layers=tuple(layer(name) for name in names))


TRANSFORMER = inventory(
    *(f"h.{i}.attn.{p}" for i in range(2) for p in ("q_proj", "k_proj", "v_proj")), "lm_head"
)


def groups(found: Inventory) -> list[str]:
    return [la.group for la in found.layers]


class TestLayer:
    def test_is_its_own_group(self):
        assert layer("a").group == "a"
        assert layer("a", group="g").group == "g"

    def test_weights_are_the_product_of_the_shape(self):
        with pytest.raises(InvalidModel, match=r"'a': n_weights must be the product.*got 31"):
            replace(layer("a"), n_weights=31)

    def test_rows_times_columns_are_the_weights(self):
        with pytest.raises(InvalidModel, match="must equal n_weights=32; got 4 x 7"):
            replace(layer("a"), columns=7)

    def test_an_empty_weight_is_refused(self):
        with pytest.raises(InvalidModel, match="at least 1; got 0"):
            layer("a", 0, 8)

    @given(layers())
    def test_survives_json(self, found):
        assert found == Layer.from_json(found.to_json())
        canonical_json(found.to_json())


class TestUnquantizedTensor:
    def test_survives_json(self):
        found = UnquantizedTensor(name="b", shape=(3, 1), format="fp16", size_bits=48, reason="r")
        assert found == UnquantizedTensor.from_json(found.to_json())


class TestInventory:
    def test_needs_a_layer(self):
        with pytest.raises(InvalidModel, match="at least one quantizable layer"):
            inventory()

    def test_names_are_unique(self):
        with refused(InvalidModel, layers=["a"]):
            inventory("a", "b", "a")

    def test_full_precision_bits(self):
        """32 weights in fp32, 32 in fp16, and a bias of four fp32 values."""
        bias = UnquantizedTensor(name="bias", shape=(4,), format="fp32", size_bits=128)
        found = Inventory(
            model_digest="",
            layers=(layer("a"), layer("b", weight_format_bits=16)),
            unquantized=(bias,),
        )
        assert 32 * 32 + 32 * 16 + 128 == found.full_precision_bits
        assert (64, 128) == (found.n_weights, found.unquantized_bits)

    @given(inventories())
    def test_survives_json(self, found):
        assert found == Inventory.from_json(found.to_json())
        canonical_json(found.to_json())

    def test_layer_by_name(self):
        assert TRANSFORMER.layer("lm_head") is TRANSFORMER.layers[-1]

    def test_unknown_layer_names_the_nearest(self):
        with refused(UnknownLayer, pattern="lm_haed", nearest=["lm_head"]) as got:
            TRANSFORMER.layer("lm_haed")
        assert "lm_head" in got.value.details["nearest"]


class TestExclude:
    def test_moves_layers_to_the_unquantized(self):
        found = inventory("a", "b", "c").exclude(["b"])
        assert ["a", "c"] == [la.name for la in found.layers]
        (moved,) = found.unquantized
        assert ("b.weight", (4, 8), "fp32", 1024) == (
            moved.name,
            moved.shape,
            moved.format,
            moved.size_bits,
        )

    @given(inventories(), st.data())
    def test_keeps_the_full_precision_size(self, found, data):
        """What is excluded still ships."""
        names = [la.name for la in found.layers][1:]
        out = data.draw(st.lists(st.sampled_from(names), unique=True)) if names else []
        left = found.exclude(out)
        assert found.full_precision_bits == left.full_precision_bits
        assert len(found.layers) - len(out) == len(left.layers)

    def test_twice_matched_is_moved_once(self):
        assert len(inventory("a", "b").exclude(["a", "re:a"]).unquantized) == 1

    def test_everything_is_refused(self):
        with pytest.raises(InvalidModel, match="check the model, or the exclusions"):
            inventory("a", "b").exclude(["*"])

    def test_unknown_pattern_is_refused(self):
        with pytest.raises(UnknownLayer):
            inventory("a", "b").exclude(["conv*"])


class TestTie:
    def test_last_parts_tie_within_each_block(self):
        one = "h.0.attn.q_proj+h.0.attn.k_proj+h.0.attn.v_proj"
        other = "h.1.attn.q_proj+h.1.attn.k_proj+h.1.attn.v_proj"
        expected = [one] * 3 + [other] * 3 + ["lm_head"]
        assert expected == groups(TRANSFORMER.tie([["v_proj", "q_proj", "k_proj"]]))

    def test_full_names_tie_across_blocks(self):
        tied = TRANSFORMER.tie([["h.0.attn.q_proj", "h.1.attn.q_proj"]])
        assert groups(tied)[0] == groups(tied)[3] == "h.0.attn.q_proj+h.1.attn.q_proj"

    def test_a_wildcard_makes_one_group(self):
        assert len(set(groups(TRANSFORMER.tie([["h.*"]])))) == 2

    def test_a_regular_expression_makes_one_group(self):
        tied = TRANSFORMER.tie([[r"re:h\.[01]\.attn\.k_proj"]])
        assert len(set(groups(tied))) == 6

    def test_overlapping_ties_merge(self):
        """a-b and b-c are one group of three, called after all of them."""
        tied = inventory("a", "b", "c", "d").tie([["a", "b"], ["b", "c"]])
        assert ["a+b+c"] * 3 + ["d"] == groups(tied)

    def test_order_of_patterns_does_not_matter(self):
        one = TRANSFORMER.tie([["q_proj", "k_proj"], ["k_proj", "v_proj"]])
        assert one == TRANSFORMER.tie([["v_proj", "k_proj"], ["k_proj", "q_proj"]])

    @pytest.mark.parametrize("tie", [["lm_head"], ["q_proj"], ["lm_head", "lm_head"]])
    def test_of_fewer_than_two_layers_is_refused(self, tie):
        """It would have no effect, which nobody who writes a tie wants."""
        with pytest.raises(InvalidInput, match="must join at least two layers"):
            TRANSFORMER.tie([tie])

    def test_unknown_pattern_is_refused(self):
        with refused(UnknownLayer, pattern="o_proj"):
            TRANSFORMER.tie([["q_proj", "o_proj"]])

    @given(inventories())
    def test_changes_nothing_but_groups(self, found):
        tied = found.tie([])
        assert found == tied


class TestMatchLayers:
    @pytest.mark.parametrize(
        ("pattern", "expected"),
        [
            ("b.fc", ["b.fc"]),
            ("fc", ["a.fc", "b.fc"]),
            ("a.*", ["a.fc", "a.out"]),
            ("?.fc", ["a.fc", "b.fc"]),
            ("re:.*c", ["a.fc", "b.fc"]),
            ("*", ["a.fc", "a.out", "b.fc"]),
        ],
    )
    def test_in_module_order(self, pattern, expected):
        assert expected == match_layers(pattern, inventory("a.fc", "a.out", "b.fc").layers)

    def test_a_regular_expression_matches_the_whole_name(self):
        with pytest.raises(UnknownLayer):
            match_layers("re:a", inventory("a.fc").layers)

    def test_case_matters(self):
        with pytest.raises(UnknownLayer):
            match_layers("FC", inventory("a.fc").layers)

    def test_a_broken_regular_expression_is_refused(self):
        with refused(InvalidInput, pattern="re:("):
            match_layers("re:(", inventory("a").layers)


class TestCandidate:
    @given(layers(), WIDTHS, schemes(), st.none() | st.integers(1, 16))
    def test_counts_its_sizes(self, found, bits, scheme, activation_bits):
        candidate = Candidate.of(found, bits, scheme, activation_bits)
        activation = 32 if activation_bits is None else activation_bits
        assert found.n_macs * bits * activation == candidate.bit_ops
        assert found.n_inputs * activation == candidate.activation_size_bits
        size = storage_size(
            found.rows, found.columns, bits, scheme, full_precision_bits=found.weight_format_bits
        )
        assert size.total == candidate.size_bits

    @given(layers(), WIDTHS, schemes(), st.none() | st.integers(1, 16))
    def test_survives_json(self, found, bits, scheme, activation_bits):
        candidate = Candidate.of(found, bits, scheme, activation_bits)
        assert candidate == Candidate.from_json(candidate.to_json())
        canonical_json(candidate.to_json())

    def test_label(self):
        assert Candidate.of(layer("a"), 4, Scheme()).label == "W4"
        assert Candidate.of(layer("a"), 4, Scheme(), 8).label == "W4A8"

    @pytest.mark.parametrize("bits", [-1, 9, 33])
    def test_an_impossible_width_is_refused(self, bits):
        data = Candidate.of(layer("a"), 4, Scheme()).to_json()
        with pytest.raises(InvalidInput, match=f"'a': weight_bits must be one of .*; got {bits}"):
            Candidate.from_json(data | {"weight_bits": bits})

    @pytest.mark.parametrize("bits", [0, -8, 33])
    def test_an_impossible_activation_width_is_refused(self, bits):
        with pytest.raises(InvalidInput, match=f"activation_bits .* 1 and 32.*got {bits}"):
            Candidate.of(layer("a"), 4, Scheme(), bits)


def row(group: str, *bits: int) -> Row:
    names = [f"{group}{k}" for k in range(len(bits))]
    made = [Candidate.of(layer(n), b, Scheme()) for n, b in zip(names, bits, strict=True)]
    return Row(group=group, candidates=tuple(made))


class TestRow:
    def test_label_joins_what_differs(self):
        assert row("g", 4, 4).label == "W4"
        assert row("g", 4, 8).label == "W4/W8"

    def test_needs_a_candidate(self):
        with pytest.raises(InvalidInput, match="'g' has none"):
            row("g")


class TestCandidateTable:
    def test_needs_a_row(self):
        with pytest.raises(InvalidInput, match="at least one row"):
            CandidateTable(rows=())

    def test_groups_are_contiguous(self):
        with pytest.raises(InvalidInput, match="'g' appears twice"):
            CandidateTable(rows=(row("g", 2), row("h", 2), row("g", 4)))

    def test_rows_are_distinct(self):
        with pytest.raises(InvalidInput, match="'g' has W2"):
            CandidateTable(rows=(row("g", 2), row("g", 4), row("g", 2)))

    def test_offsets(self):
        table = CandidateTable(rows=(row("g", 2), row("g", 4), row("h", 2), row("i", 8)))
        assert [0, 2, 3, 4] == table.offsets.tolist()
        assert [0, 0, 1, 2] == table.group_of_row.tolist()
        assert ("g", "h", "i") == table.groups

    @given(tables())
    def test_offsets_delimit_the_groups(self, table):
        for g, group in enumerate(table.groups):
            own = table.rows[table.offsets[g] : table.offsets[g + 1]]
            assert own
            assert {group} == {r.group for r in own}
        assert len(table.rows) == table.offsets[-1]
        assert np.array_equal(
            np.repeat(np.arange(len(table.groups)), np.diff(table.offsets)), table.group_of_row
        )

    @given(tables())
    def test_costs_sum_over_the_layers_of_a_row(self, table):
        for resource, of_one, join in (
            ("size_bits", lambda c: c.size.total, sum),
            ("code_bits", lambda c: c.size.codes, sum),
            ("bit_ops", lambda c: c.bit_ops, sum),
            ("activation_bits_max", lambda c: c.activation_size_bits, max),
        ):
            expected = [join([of_one(c) for c in r.candidates]) for r in table.rows]
            found = table.costs(resource)
            assert expected == found.tolist()
            assert found.dtype == np.int64

    def test_what_is_computed_once_cannot_be_changed(self):
        """Every solve gets the same arrays."""
        table = enumerate_candidates(inventory("a", "b"), weight_bits=(2, 4))
        for found in (table.costs("size_bits"), table.offsets, table.group_of_row):
            with pytest.raises(ValueError, match="read-only"):
                found[0] = 1
        assert table.costs("size_bits") is table.costs("size_bits")

    def test_costs_are_covered_for_every_resource(self):
        table = CandidateTable(rows=(row("g", 2),))
        assert all(len(table.costs(resource)) == 1 for resource in RESOURCES)

    def test_an_unknown_resource_is_refused(self):
        with refused(InvalidInput, resource="energy"):
            CandidateTable(rows=(row("g", 2),)).costs("energy")

    @given(st.data())
    def test_decode_names_every_layer_once(self, data):
        found = data.draw(inventories())
        table = enumerate_candidates(found, [2, 4, 8])
        chosen = table.decode(data.draw(choices(table)))
        assert sorted(la.name for la in found.layers) == sorted(c.layer for c in chosen)

    @pytest.mark.parametrize("choice", [(), (0,), (0, 0, 0)])
    def test_decode_wants_one_row_per_group(self, choice):
        table = CandidateTable(rows=(row("g", 2), row("g", 4), row("h", 2)))
        with pytest.raises(InvalidInput, match=f"each of 2 groups; got {len(choice)}"):
            table.decode(choice)

    @pytest.mark.parametrize(("choice", "bad"), [((2, 0), "'g'"), ((0, 1), "'h'"), ((-1, 0), "g")])
    def test_decode_stays_inside_the_group(self, choice, bad):
        """Negative indices do not wrap around."""
        table = CandidateTable(rows=(row("g", 2), row("g", 4), row("h", 2)))
        with pytest.raises(InvalidInput, match=bad):
            table.decode(choice)

    @given(tables())
    def test_survives_json(self, table):
        again = CandidateTable.from_json(table.to_json())
        assert table == again
        assert table.digest() == again.digest()

    def test_digest_tells_tables_apart(self):
        one, other = CandidateTable(rows=(row("g", 2),)), CandidateTable(rows=(row("g", 4),))
        assert one.digest() != other.digest()


class TestEnumerateCandidates:
    @given(inventories(), st.lists(WIDTHS, min_size=1, max_size=6))
    def test_every_group_gets_every_width_once(self, found, widths):
        table = enumerate_candidates(found, widths)
        for group in table.groups:
            bits = [r.candidates[0].weight_bits for r in table.rows if r.group == group]
            assert sorted(set(widths)) == bits

    @given(inventories())
    def test_order_of_widths_does_not_matter(self, found):
        assert enumerate_candidates(found, [8, 2, 4]) == enumerate_candidates(found, [2, 4, 8, 4])

    def test_groups_stand_where_their_first_layer_does(self):
        tied = inventory("a", "b", "c", "d").tie([["b", "d"]])
        assert ("a", "b+d", "c") == enumerate_candidates(tied, [4]).groups

    def test_layers_of_a_group_take_one_width(self):
        tied = inventory("a", "b").tie([["a", "b"]])
        table = enumerate_candidates(tied, [2, 8])
        assert [(2, 2), (8, 8)] == [tuple(c.weight_bits for c in r.candidates) for r in table.rows]

    def test_fixed_layers_get_only_their_width(self):
        """Also one that is not on offer."""
        table = enumerate_candidates(inventory("a", "b"), [2, 4], fixed={"b": 8})
        assert [("a", 2), ("a", 4), ("b", 8)] == [
            (r.group, r.candidates[0].weight_bits) for r in table.rows
        ]

    def test_fixing_one_layer_fixes_its_group(self):
        tied = inventory("a", "b").tie([["a", "b"]])
        (only,) = enumerate_candidates(tied, [2, 4], fixed={"b": 8}).rows
        assert [8, 8] == [c.weight_bits for c in only.candidates]

    def test_a_tie_cannot_be_fixed_to_two_widths(self):
        tied = inventory("a", "b").tie([["a", "b"]])
        with pytest.raises(InvalidInput, match=r"'a\+b' must be fixed to one .*got 4 and 8"):
            enumerate_candidates(tied, [2, 4], fixed={"a": 4, "b": 8})

    def test_scheme_and_activations_reach_every_candidate(self):
        scheme = Scheme(row_alignment_bits=32)
        table = enumerate_candidates(inventory("a"), [2, 4], scheme=scheme, activation_bits=8)
        assert {(scheme, 8)} == {
            (c.scheme, c.activation_bits) for r in table.rows for c in r.candidates
        }

    def test_no_width_is_refused(self):
        with pytest.raises(InvalidInput, match="at least one bit-width"):
            enumerate_candidates(inventory("a"), [])

    def test_an_impossible_width_is_refused(self):
        with refused(InvalidInput, weight_bits=[9, 12]):
            enumerate_candidates(inventory("a"), [12, 4, 9])

    def test_an_impossible_fixed_width_is_refused(self):
        with refused(InvalidInput, pattern="a", weight_bits=9):
            enumerate_candidates(inventory("a"), [4], fixed={"a": 9})

    def test_an_unknown_fixed_layer_is_refused(self):
        with refused(UnknownLayer, pattern="heads", nearest=["head"]):
            enumerate_candidates(inventory("head"), [4], fixed={"heads": 8})
