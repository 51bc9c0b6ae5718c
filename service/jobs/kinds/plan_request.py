"""A plan request as pydantic and OpenAPI see it, and what can be checked without a model."""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import TypeAdapter
from pydantic_core import core_schema

from bitquota.candidates.budget import check_budgets
from bitquota.candidates.cost_table import CostTable
from bitquota.candidates.targets import target_by_name
from bitquota.candidates.targets.format_names import agreed_bits
from bitquota.request import PlanRequest

if TYPE_CHECKING:
    from pydantic import GetJsonSchemaHandler
    from pydantic.json_schema import JsonSchemaValue
    from pydantic_core import CoreSchema

    from bitquota.canonical import JsonObject


class _AsPlanRequest:
    """Pydantic annotation: OpenAPI describes the dataclass, types are held to strictly."""

    def __get_pydantic_core_schema__(self, _source: object, _handler: object) -> CoreSchema:
        """Return the schema of a function that checks the whole value."""
        return core_schema.no_info_plain_validator_function(_checked)

    def __get_pydantic_json_schema__(
        self, _schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Return the schema of the dataclass, which knows no further members."""
        made = handler(_adapter().core_schema)
        described = handler.resolve_ref_schema(made)
        described["additionalProperties"] = False
        widths = described["properties"]["weight_bits"]
        widths["items"] = {"anyOf": [widths["items"], {"type": "string"}]}
        widths["description"] = "Bit-widths, or names: int4, w8a8, formats of the target."
        return made


@cache
def _adapter() -> TypeAdapter[PlanRequest]:
    # Making one takes longer than everything else that a submission costs.
    return TypeAdapter(PlanRequest)


def _checked(value: Any) -> JsonObject:  # noqa: ANN401  # whatever a client sent
    value = _without_names(value)
    # As JSON, because only there a list may stand for a tuple while "3" is no number.
    _adapter().validate_json(json.dumps(value), strict=True)
    return PlanRequest.from_json(value).to_json()


def _without_names(value: Any) -> Any:  # noqa: ANN401  # whatever a client sent
    """Return the request with bit-widths in place of names of formats among ``weight_bits``.

    Anything that has another form stays, for the check of types.
    """
    asked = value.get("weight_bits") if isinstance(value, dict) else None
    if not isinstance(asked, list) or not any(isinstance(bits, str) for bits in asked):
        return value
    target, inputs = value.get("target"), value.get("activation_bits")
    several = inputs if isinstance(inputs, list) and inputs else [inputs]
    plain = all(type(bits) in (int, str) for bits in asked)
    plain = plain and all(type(bits) is int or inputs is None for bits in several)
    if not plain or not isinstance(target, str | None):
        return value
    widths, inputs = agreed_bits(
        [str(bits) for bits in asked],
        None if target is None else target_by_name(target),
        tuple(inputs) if isinstance(inputs, list) else inputs,
        "weight_bits",
        "activation_bits",
    )
    inputs = list(inputs) if isinstance(inputs, tuple) else inputs
    return value | {"weight_bits": list(widths), "activation_bits": inputs}


PlanRequestBody = Annotated[dict[str, Any], _AsPlanRequest()]
"""A plan request as JSON with every member."""


def with_budgets(request: JsonObject) -> JsonObject:
    """Return a plan request after reading what needs no model: target and budgets.

    Raises:
        InvalidBudget: One cannot be read.
        InvalidInput: There is none, or no such target.
    """
    if request["target"] is not None:
        target = target_by_name(request["target"])
        if request.get("row_widths", 1) > 1:
            target.require_rows()
        target.require_zero_bits(request.get("allow", ()))
    tables = [CostTable.from_json(table) for table in request.get("tables", ())]
    check_budgets(request["budgets"], tables)
    return request
