"""Options that several commands share: one list, one set of defaults."""

from __future__ import annotations

import inspect

import pytest

from bitquota.cli import comparing, planning
from bitquota.cli import options as opt
from bitquota.errors import InvalidInput
from bitquota.request import PlanRequest
from bitquota.storage import Granularity

COMMANDS = [planning.plan, planning.measure, comparing.compare]


class TestWithOptions:
    def test_defaults_are_those_of_a_request(self):
        """A command without options orders exactly ``PlanRequest()``."""
        seen = []

        @opt.with_options()
        def command(model: str, request: PlanRequest, here: opt.Here, extra: int = 3) -> None:
            seen.append((model, request, here, extra))

        values = {
            name: parameter.default
            for name, parameter in inspect.signature(command).parameters.items()
            if name != "model"
        }
        command(model="m", **values)
        (model, request, here, extra) = seen[0]

        assert (model, extra) == ("m", 3)
        assert request == PlanRequest()
        assert here.device == "auto"
        assert here.imatrix is None

    @pytest.mark.parametrize("command", COMMANDS)
    def test_same_defaults_everywhere(self, command):
        """What two commands both offer has one default and one help text."""
        own = inspect.signature(command).parameters
        shared = [n for n in own if n in {**opt._REQUEST, **opt._HERE}]
        assert len(shared) > 15
        for name in shared:
            annotation, default = {**opt._REQUEST, **opt._HERE}[name]
            assert own[name].default == default
            assert own[name].annotation is annotation

    def test_options_become_the_request(self):
        """Texts are parsed, the scheme is put together, what is left out has its given value."""
        seen = []

        @opt.with_options(budgets=("3 bits",), refine=False)
        def command(request: PlanRequest) -> None:
            seen.append(request)

        parameters = inspect.signature(command).parameters
        assert "budgets" not in parameters
        values = {name: parameter.default for name, parameter in parameters.items()}
        command(**values | {
            "bits": "2,4", "fix": ["a*=8"], "tie": ["q,k"], "granularity": Granularity.GROUP,
            "group_size": 32, "precision": "bf16", "measure_name": "empirical_fisher",
        })  # fmt: skip
        (request,) = seen

        assert request.budgets == ("3 bits",)
        assert request.weight_bits == (2, 4)
        assert request.fixed == {"a*": 8}
        assert request.ties == (("q", "k"),)
        assert request.scheme.group_size == 32
        assert (request.precision, request.measure) == ("bf16", "empirical_fisher")
        assert not request.refine
        with pytest.raises(InvalidInput, match="separated by commas"):
            command(**values | {"bits": "2;4"})
