"""Options that belong together: one parameter of a command that stands for several options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """The options that one parameter stands for.

    Attributes:
        options: Annotation and default of each, by name, in order.
        make: Returns the parameter's value, given those of its options by name.
    """

    options: Mapping[str, tuple[Any, Any]]
    make: Callable[[dict[str, Any]], object]


def with_bundles(**bundles: Bundle) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of each of its parameters that is named here.

    The options stand in the parameter's place; the command is called with what they make.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters
        keyword = inspect.Parameter.KEYWORD_ONLY
        given: list[inspect.Parameter] = []
        for name, parameter in own.items():
            if name in bundles:
                given += [
                    inspect.Parameter(option, keyword, default=default, annotation=annotation)
                    for option, (annotation, default) in bundles[name].options.items()
                ]
            else:
                given.append(parameter.replace(kind=keyword))

        @functools.wraps(command)
        def run(**values: Any) -> None:  # noqa: ANN401  # whatever the options hold
            for name, bundle in bundles.items():
                if name in own:
                    values[name] = bundle.make({o: values.pop(o) for o in bundle.options})
            command(**values)

        # Typer reads the signature; ``inspect`` takes it from here.
        run.__signature__ = inspect.Signature(given)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in given}
        return run

    return decorate
