from __future__ import annotations

from pathlib import Path

import pytest
from typer.main import get_command

from bitquota.service import admin_commands
from bitquota.service.app import create_app
from bitquota.service.settings import Settings, documentation

PAGE = Path(__file__).parents[2] / "docs" / "service.md"


def commands(group, prefix="bitquota admin"):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}"


class TestServicePage:
    def test_settings_are_those_of_the_code(self):
        """Regenerate with ``bitquota.service.settings.documentation``."""
        assert documentation() in PAGE.read_text()

    def test_every_endpoint_is_named(self, tmp_path):
        text = PAGE.read_text()
        for path in create_app(Settings(data_dir=tmp_path)).openapi()["paths"]:
            last = "/" + path.rpartition("/")[2]
            assert path in text or last.replace("{job_id}", "{id}") in text, path

    @pytest.mark.parametrize("name", sorted(commands(get_command(admin_commands.app))))
    def test_every_admin_command_is_named(self, name):
        words = name.removeprefix("bitquota admin ").split()
        text = PAGE.read_text()
        assert name in text or all(word in text for word in words), name
