"""Wheel, source distribution and editable install hold the same package, and only it."""

from __future__ import annotations

import email
import re
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import PurePosixPath

import pytest

import bitquota
from bitquota.canonical import digest_bytes

from .conftest import build, run

FOLDERS = ("solver", "sensitivity", "quantizers", "models", "exports", "training", "service")


def members(wheel) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packaged(tracked) -> dict[str, str]:
    """What git tracks of the package: place in the wheel to path in the repository."""
    found = {}
    for path in map(PurePosixPath, tracked):
        if path.parts[0] in FOLDERS:
            found[f"bitquota/{path}"] = str(path)
        elif path.parts[0] == "src" and path.name not in FOLDERS:
            found[str(path.relative_to("src"))] = str(path)
    return found


class TestWheel:
    def test_holds_only_bitquota(self, wheel):
        """Anything else would land beside other people's packages."""
        info = f"bitquota-{bitquota.__version__}.dist-info"
        assert {"bitquota", info} == {name.split("/")[0] for name in members(wheel)}

    def test_holds_every_tracked_file_once(self, wheel, tracked):
        """No module is forgotten, and none is there twice through its link."""
        names = [n for n in members(wheel) if n.startswith("bitquota/")]
        assert sorted(packaged(tracked)) == sorted(names)

    def test_holds_them_byte_for_byte(self, wheel, tracked, source):
        inside = members(wheel)
        for place, path in packaged(tracked).items():
            assert (source / path).read_bytes() == inside[place], path

    @pytest.mark.parametrize("folder", FOLDERS)
    def test_every_folder_is_a_package(self, wheel, folder):
        assert f"bitquota/{folder}/__init__.py" in members(wheel)

    def test_is_typed(self, wheel):
        """Type checkers of users read our annotations only with this marker."""
        assert "bitquota/py.typed" in members(wheel)

    def test_runs_anywhere(self, wheel):
        assert wheel.name == f"bitquota-{bitquota.__version__}-py3-none-any.whl"

    def test_metadata(self, wheel, source):
        info = f"bitquota-{bitquota.__version__}.dist-info"
        inside = members(wheel)
        metadata = email.message_from_bytes(inside[f"{info}/METADATA"])
        assert ("bitquota", bitquota.__version__) == (metadata["Name"], metadata["Version"])
        assert (">=3.11", "Apache-2.0") == (
            metadata["Requires-Python"],
            metadata["License-Expression"],
        )
        assert (source / "LICENSE").read_bytes() == inside[f"{info}/licenses/LICENSE"]
        extras = tomllib.loads((source / "pyproject.toml").read_text())["project"]
        assert sorted(extras["optional-dependencies"]) == sorted(metadata.get_all("Provides-Extra"))
        assert b"bitquota = bitquota.cli:main" in inside[f"{info}/entry_points.txt"]

    def test_licence_is_complete(self, wheel):
        """The whole Apache text, not a notice."""
        info = f"bitquota-{bitquota.__version__}.dist-info"
        text = members(wheel)[f"{info}/licenses/LICENSE"].decode()
        assert all(f"\n   {n}. " in text for n in range(1, 10))
        assert "END OF TERMS AND CONDITIONS" in text

    def test_can_be_imported_where_it_was_unpacked(self, wheel, tmp_path):
        """Without any link: every folder comes from inside the package."""
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tmp_path)
        assert_imports_from(tmp_path, tmp_path / "bitquota", addsite=False)


class TestSdist:
    def test_gives_the_same_wheel(self, wheel, unpacked_sdist, tmp_path):
        """What pip builds from PyPI is what we built here, whole file."""
        again = build("--wheel", unpacked_sdist, tmp_path)
        assert members(wheel) == members(again)
        assert digest_bytes([wheel.read_bytes()]) == digest_bytes([again.read_bytes()])

    def test_holds_no_tests_and_no_data(self, unpacked_sdist):
        allowed = {*FOLDERS, "src", "README.md", "LICENSE", "CHANGELOG.md"}
        allowed |= {"pyproject.toml", "constraints.txt", "PKG-INFO", ".gitignore"}
        assert {path.name for path in unpacked_sdist.iterdir()} <= allowed


class TestEditable:
    def test_imports_the_working_tree(self, source, tmp_path):
        """The wheel that ``pip install -e`` asks for leads to the folders themselves."""
        hook = "import sys; from hatchling.build import build_editable; build_editable(sys.argv[1])"
        built = run(sys.executable, "-c", hook, tmp_path, cwd=source)
        assert built.returncode == 0, built.stderr
        (wheel,) = tmp_path.glob("*.whl")
        site = tmp_path / "site"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
        assert_imports_from(site, source / "src" / "bitquota", addsite=True)

    @pytest.mark.parametrize("folder", FOLDERS)
    def test_link_is_committed_and_relative(self, repository, tracked, folder):
        link = repository / "src" / "bitquota" / folder
        assert link.relative_to(repository) in tracked
        assert str(link.readlink()) == f"../../{folder}"


def assert_imports_from(site, package, *, addsite: bool) -> None:
    """Import the package with only ``site`` and the dependencies on the path.

    ``-S`` keeps the path files of this environment out, which would offer the working tree.
    """
    code = f"""
import importlib, pkgutil, site, sys
sys.path.append({str(sysconfig.get_path("purelib"))!r})
if {addsite}:
    site.addsitedir({str(site)!r})
else:
    sys.path.insert(0, {str(site)!r})
for name in ("", *{FOLDERS}):
    module = importlib.import_module("bitquota" + ("." + name if name else ""))
    print(module.__file__)
print(importlib.import_module("bitquota.cli.app").__file__)
"""
    done = run(sys.executable, "-S", "-c", code, cwd=site)
    assert done.returncode == 0, done.stderr
    expected = [package / "__init__.py"]
    expected += [package / folder / "__init__.py" for folder in FOLDERS]
    expected += [package / "cli" / "app.py"]
    assert [str(path) for path in expected] == done.stdout.split()


def test_version_is_in_the_changelog(repository):
    text = (repository / "CHANGELOG.md").read_text()
    assert re.search(rf"^## {re.escape(bitquota.__version__)}\b", text, re.MULTILINE)
