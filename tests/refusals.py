"""How tests look at an error: by its kind and the values that it carries, not by its sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from bitquota.errors import BitquotaError


def refused(kind: type[BitquotaError], /, **details: object) -> pytest.RaisesExc[BitquotaError]:
    """Expect an error of this very kind, no heir of it, with at least these details."""

    def fits(error: BitquotaError) -> bool:
        assert kind.slug == error.slug
        assert details.items() <= error.details.items(), f"{error.details}: {error}"
        return True

    return pytest.raises(kind, check=fits)
