"""The error tree is what its picture says, and its members behave as exceptions."""

from __future__ import annotations

import copy
import re

import pytest

from bitquota import errors
from bitquota.errors import BitquotaError


def tree(root=BitquotaError):
    """All classes of the tree, the root first."""
    return [root, *(found for child in root.__subclasses__() for found in tree(child))]


CLASSES = [cls for cls in tree() if cls.__module__ == errors.__name__]


def drawn():
    """Lines of the picture: indentation, name, and the text behind it."""
    picture = errors.__doc__.split("\n\n")[1]
    return re.findall(r"^([│├└─ ]*)(\w+)(.*)$", picture, re.MULTILINE)


class TestPicture:
    def test_holds_every_class(self):
        """The picture at the top of the file is complete and has nothing else."""
        assert {cls.__name__ for cls in CLASSES} == {name for _, name, _ in drawn()}

    def test_shows_the_parents(self):
        """Indentation is inheritance."""
        stack = []
        for indent, name, _ in drawn():
            depth = len(indent) // 4
            del stack[depth:]
            parent = stack[-1] if stack else "Exception"
            assert parent == getattr(errors, name).__bases__[0].__name__
            stack.append(name)

    def test_shows_the_builtin_parents(self):
        """A builtin in brackets is the second base."""
        for _, name, text in drawn():
            builtin = re.match(r"\((\w+)\)", text)
            bases = [base.__name__ for base in getattr(errors, name).__bases__[1:]]
            assert ([builtin[1]] if builtin else []) == bases

    def test_shows_exit_codes_and_statuses(self):
        """The codes in the picture are the codes of the classes, and of what inherits them."""
        for _, name, text in drawn():
            cls = getattr(errors, name)
            if found := re.search(r"exit (\d)", text):
                assert int(found[1]) == cls.exit_code
            if found := re.search(r"HTTP (\d+)", text):
                assert int(found[1]) == cls.http_status


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
class TestBitquotaError:
    def test_reads_as_its_sentence(self, cls):
        """Also where a builtin base, such as LookupError, would quote it."""
        assert str(cls("what must hold")) == "what must hold"

    def test_carries_the_values(self, cls):
        error = cls("too big", limit=9, got="x")
        assert {"limit": 9, "got": "x"} == error.details
        assert error.message == "too big"

    def test_survives_a_copy(self, cls):
        """Exceptions cross process borders by what ``copy`` uses too."""
        error = copy.copy(cls("too big", limit=9))
        assert (cls, "too big", {"limit": 9}) == (type(error), error.message, error.details)

    def test_has_codes_of_an_error(self, cls):
        assert cls.exit_code in {1, 2, 3, 4, 5}
        assert 400 <= cls.http_status < 600

    def test_slug_is_its_name(self, cls):
        """Kebab case of the class name, so that nobody has to look it up."""
        expected = re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()
        assert cls.slug == ("error" if cls is BitquotaError else expected)


def test_slugs_are_unique():
    slugs = [cls.slug for cls in CLASSES]
    assert sorted(set(slugs)) == sorted(slugs)


@pytest.mark.parametrize(
    ("cls", "builtin"),
    [
        (errors.InvalidBudget, ValueError),
        (errors.UnknownLayer, LookupError),
        (errors.UnknownLayer, ValueError),
        (errors.BudgetTooSmall, ValueError),
        (errors.MeasurementFailed, RuntimeError),
        (errors.MissingDependency, ImportError),
        (errors.ServiceTimeout, TimeoutError),
    ],
)
def test_is_caught_as_the_builtin(cls, builtin):
    """Code that knows nothing of Bitquota catches what it expects."""
    with pytest.raises(builtin):
        raise cls("a sentence", value=1)
