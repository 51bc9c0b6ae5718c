"""Every package that an installation brings in has one pinned version, and a reason."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from itertools import chain

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRA = re.compile(r"^bitquota\[(.*)\]$")


@pytest.fixture(scope="module")
def project(repository):
    return tomllib.loads((repository / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def pins(repository):
    lines = (repository / "constraints.txt").read_text().splitlines()
    wanted = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in wanted}


def needed(project) -> dict[str, str]:
    """Packages that ``bitquota[dev]`` brings in here, directly or not, and their versions."""
    todo = [Requirement(text) for text in [*project["dependencies"], "bitquota[dev]"]]
    found: dict[str, str] = {}
    seen = set()
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        key = (name, frozenset(wanted.extras))
        if key in seen:
            continue
        seen.add(key)
        if name == "bitquota":
            extras = project["optional-dependencies"]
            todo += [Requirement(text) for extra in wanted.extras for text in extras[extra]]
            continue
        installed = metadata.distribution(wanted.name)
        found[name] = installed.version.partition("+")[0]
        for text in installed.requires or []:
            further = Requirement(text)
            active = [{"extra": extra} for extra in (*wanted.extras, "")]
            if further.marker is None or any(further.marker.evaluate(e) for e in active):
                todo.append(further)
    return found


def test_everything_installed_is_pinned(project, pins):
    """At the version that these tests run with; ``make constraints`` renews the file."""
    expected = needed(project)
    assert expected == {name: pins.get(name) for name in expected}


def test_every_pin_is_exact(repository):
    for line in (repository / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"#.*|[\w.-]+==[\w.!]+", line), line


def test_every_direct_dependency_is_within_its_bounds(project, pins):
    direct = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    for text in direct:
        if not EXTRA.match(text):
            wanted = Requirement(text)
            assert pins[canonicalize_name(wanted.name)] in wanted.specifier, text


def test_every_dependency_says_who_needs_it(repository):
    """A comment behind each line of a dependency list."""
    text = (repository / "pyproject.toml").read_text()
    lists = text[text.index("\ndependencies = [") : text.index("[project.scripts]")]
    lines = [line for line in lists.splitlines() if line.startswith('    "')]
    assert len(lines) > 20
    for line in lines:
        assert re.search(r'",\s+# \S', line) or EXTRA.match(line.strip(' ",')), line


def test_highspy_can_share_a_process_with_ortools(pins):
    """From 1.14 on it cannot; both are loaded by one worker."""
    assert tuple(map(int, pins["highspy"].split(".")))[:2] < (1, 14)
