"""Models whose weights stay in files, run from end to end: a module has its weights while it runs.

Every module that has weights of its own gets them in float32 before it is called, from the
checkpoint or from whatever replaces them, and gives them back afterwards. So no more than the
largest of them is in memory, in any architecture, and outputs are those of the loaded model to the
last bit. A walk part by part (``stack``) reads every weight once for all samples; this reads it
once for each call. ``replaced_in`` says what such a module is made of, so that it can be walked.

Design: docs/design/language-models.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from bitquota.models.identity import HALF_TYPES
from bitquota.models.running import tensor_of
from bitquota.models.sharing import sharing_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from bitquota.models.loaded import LoadedModel
    from bitquota.models.pages import Pages


def on_demand(
    model: LoadedModel, readers: Mapping[str, Callable[[], Tensor]] | None = None
) -> nn.Module:
    """Return a model whose weights stay in their files as a module that computes in float32.

    Args:
        model: From ``load_within``, with ``pages``.
        readers: What takes the place of tensors, by name: functions that return them in the shape
            of the tensor. A tied tensor may go by any of its names.

    Raises:
        InvalidModel: A name that the model does not have.
    """
    pages = model.pages
    assert pages is not None  # noqa: S101  # others have their weights
    module = sharing_weights(model.module)
    module.__dict__[_MADE_OF] = _MadeOf(dict(readers or {}))
    read = {id(tensor_of(module, name)): reader for name, reader in (readers or {}).items()}
    for part in module.modules():
        # Those of the loaded model let go what nothing has read yet.
        part._forward_hooks.clear()  # noqa: SLF001
        part._forward_pre_hooks.clear()  # noqa: SLF001
        own = [*part._parameters.values(), *part._buffers.values()]  # noqa: SLF001
        held = [_Held(t, pages, read.get(id(t))) for t in own if t is not None]
        held = [one for one in held if one.reader is not None or one.mapped.dtype in HALF_TYPES]
        if type(part) is nn.Embedding and all(one.reader is None for one in held):
            # Rows are looked up where they lie.
            part.register_forward_hook(_rows(pages))
        elif held:
            bring, take_back = _visits(held)
            part.register_forward_pre_hook(bring)
            part.register_forward_hook(take_back, always_call=True)
    return module


def replaced_in(module: object) -> Mapping[str, Callable[[], Tensor]] | None:
    """Return the readers of a module from ``on_demand``, by name; ``None`` of any other."""
    made_of = vars(module).get(_MADE_OF) if isinstance(module, nn.Module) else None
    return made_of.readers if isinstance(made_of, _MadeOf) else None


_MADE_OF = "_made_of"


class _MadeOf:
    """The readers of a module; copies of the module share them."""

    def __init__(self, readers: Mapping[str, Callable[[], Tensor]]) -> None:
        self.readers = readers

    def __deepcopy__(self, memo: object) -> _MadeOf:
        return self


class _Held:
    """A tensor of the module, what it is between calls, and where its values come from."""

    def __init__(self, tensor: Tensor, pages: Pages, reader: Callable[[], Tensor] | None) -> None:
        self.tensor, self.mapped, self.pages, self.reader = tensor, tensor.data, pages, reader

    def bring(self) -> None:
        """Read the values."""
        if self.reader is not None:
            self.tensor.data = self.reader().float()
        else:
            self.tensor.data = self.mapped.float()
            self.pages.release_tensor(self.mapped)

    def take_back(self) -> None:
        """Let the values go."""
        self.tensor.data = self.mapped


# Hooks are functions, not objects: copies of the module share them instead of copying files.


def _visits(held: list[_Held]) -> tuple[Any, Any]:
    """Return what happens before and after a module runs."""

    def bring(_part: nn.Module, _args: object) -> None:
        for one in held:
            one.bring()

    def take_back(_part: nn.Module, _args: object, _output: object) -> None:
        for one in held:
            one.take_back()

    return bring, take_back


def _rows(pages: Pages) -> Any:  # noqa: ANN401  # a hook
    def widen(part: nn.Module, _args: object, output: Tensor) -> Tensor:
        pages.release(part, read_bytes=output.numel() * output.element_size())
        return output.float()

    return widen


__all__ = ["on_demand", "replaced_in"]
