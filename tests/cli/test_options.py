"""Options that several commands share: one list, one set of defaults."""

from __future__ import annotations

import inspect
import shlex
import sys

import pytest
import typer
from rich.text import Text

from bitquota.candidates.storage import Granularity
from bitquota.cli import app, comparing, main, planning, training
from bitquota.cli import options as opt
from bitquota.cli.bundles import Bundle, with_bundles
from bitquota.cli.examples import EXAMPLES
from bitquota.cli.here import Here
from bitquota.cli.training_options import SETTINGS_OPTIONS, TRAINING_OPTIONS, Training
from bitquota.errors import InvalidInput
from bitquota.request import EFFORTS, PlanRequest
from bitquota.training.settings import TrainingSettings

COMMANDS = [planning.plan, planning.measure, comparing.compare]


class TestWithOptions:
    def test_defaults_are_those_of_a_request(self):
        """A command without options orders exactly ``PlanRequest()``, but for the budgets."""
        seen = []

        @opt.with_options()
        def command(
            model: str, calibration: str, request: PlanRequest, here: Here, extra: int = 3
        ) -> None:
            seen.append((model, calibration, request, here, extra))

        values = {
            name: parameter.default
            for name, parameter in inspect.signature(command).parameters.items()
        }
        named = {"model": "m:model", "calibration": "m:samples", "budgets": ["3 bits"]}
        command(**values | named)
        (model, calibration, request, here, extra) = seen[0]

        assert (model, calibration, extra) == ("m:model", "m:samples", 3)
        assert request == PlanRequest(budgets=("3 bits",))
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


class TestWithBundles:
    def test_options_stand_in_the_parameters_place(self):
        """The command is called with what they make; a bundle that it does not name is ignored."""
        seen = []
        pair = Bundle(options={"a": (int, 1), "b": (int, 2)}, make=lambda v: (v["a"], v["b"]))

        @with_bundles(pair=pair, other=pair)
        def command(first: str, *, pair: tuple[int, int], last: str = "z") -> None:
            seen.append((first, pair, last))

        assert ["first", "a", "b", "last"] == list(inspect.signature(command).parameters)
        command(first="x", a=5, b=2, last="z")
        assert [("x", (5, 2), "z")] == seen


class TestWithTraining:
    @pytest.mark.parametrize("command", [training.finetune, training.learn])
    def test_commands_that_train_share_their_options(self, command):
        """One default and one help text for both."""
        own = inspect.signature(command).parameters
        for name, (annotation, default) in TRAINING_OPTIONS.items():
            assert own[name].annotation is annotation
            assert own[name].default == default

    def test_what_is_given_holds_and_the_rest_is_the_methods_own(self):
        """Options are members of ``TrainingSettings``; without one, a recipe's value stays."""
        values = {name: default for name, (_, default) in TRAINING_OPTIONS.items()}
        own = TrainingSettings(learning_rate=0.5, quantizer_learning_rate=0.25, seed=0)
        assert own == Training.of(values).settings(own)
        found = Training.of(values | {"learning_rate": 0.125, "epochs": 3}).settings(own)
        assert (0.125, 0.25, 3) == (
            found.learning_rate, found.quantizer_learning_rate, found.epochs,
        )  # fmt: skip
        assert set(SETTINGS_OPTIONS) <= set(TrainingSettings.__dataclass_fields__)


class TestHelp:
    def test_nothing_is_swallowed_as_markup(self):
        """Typer prints help through rich, to which words in square brackets are styles."""
        commands = [(app.info.name or "bitquota", typer.main.get_command(app))]
        seen = 0
        while commands:
            name, command = commands.pop()
            commands += [(f"{name} {k}", v) for k, v in getattr(command, "commands", {}).items()]
            texts = [command.help, *(getattr(p, "help", None) for p in command.params)]
            for text in filter(None, texts):
                seen += 1
                assert text == Text.from_markup(text).plain, name
        assert seen > 100


class TestExamples:
    def test_every_command_ends_with_one_that_parses(self):
        """Arguments and options are the command's own, with values of their types."""
        groups = [("", typer.main.get_command(app))]
        seen = set()
        while groups:
            prefix, group = groups.pop()
            for name, command in group.commands.items():
                if hasattr(command, "commands"):
                    groups.append((f"{prefix}{name} ", command))
                    continue
                seen.add(f"{prefix}{name}")
                example = f"Example: bitquota {prefix}{name} "
                assert command.epilog is not None, name
                assert f"{command.epilog} ".startswith(example)
                arguments = shlex.split(f"{command.epilog} "[len(example) :])
                with command.make_context(name, arguments) as context:
                    assert not context.args, name
        assert set(EXAMPLES) == seen


class TestCompletion:
    @pytest.mark.parametrize(
        ("line", "offered"),
        [
            ("bitquota quick", ["quickstart"]),
            ("bitquota plan m c --target ort-", ["ort-cpu", "ort-cpu-integer", "ort-genai"]),
            ("bitquota plan m c --effort ", list(EFFORTS)),
            ("bitquota admin keys ro", ["rotate"]),
        ],
    )
    def test_what_a_shell_gets(self, monkeypatch, capsys, line, offered):
        """As bash asks: commands, options, and values that are names."""
        words = line.split(" ")
        monkeypatch.setenv("_BITQUOTA_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        monkeypatch.setattr(sys, "argv", ["bitquota"])
        with pytest.raises(SystemExit):
            main()
        assert offered == capsys.readouterr().out.split()


class TestMix:
    @staticmethod
    def here(**values):
        """The options of a command that were given, and defaults of all others."""
        defaults = {name: default for name, (_, default) in opt._HERE.items()}
        return Here(**defaults | values)

    def test_shares_of_two_texts(self, llama_folder, tmp_path):
        """Of the shorter one for its share all windows are taken."""
        for name in ("a", "b"):
            (tmp_path / f"{name}.txt").write_text(name * 600)
        chosen = self.here(tokenizer="bytes", length=8, mix=[str(tmp_path / "b.txt")], shares="3,1")
        _, samples = chosen.load(str(llama_folder), str(tmp_path / "a.txt"))
        first = [chr(row[0]) for row in samples.inputs[0].tolist()]
        assert ["a"] * 75 + ["b"] * 25 == first

    @pytest.mark.parametrize("shares", ["1", "1,2,3", "1,0", "1,x", "inf,1"])
    def test_shares_that_do_not_fit(self, llama_folder, tmp_path, shares):
        """Told before anything is loaded."""
        (tmp_path / "a.txt").write_text("a" * 600)
        chosen = self.here(tokenizer="bytes", mix=[str(tmp_path / "a.txt")], shares=shares)
        with pytest.raises(InvalidInput, match="each --mix, here 2"):
            chosen.check(str(llama_folder), str(tmp_path / "a.txt"))

    def test_on_this_machine_only(self, tmp_path):
        with pytest.raises(InvalidInput, match="--mix is used on this machine only"):
            self.here(mix=["b.txt"], server="http://127.0.0.1:1")
