from __future__ import annotations

import re
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

    def test_addresses_in_the_readme_are_served(self, tmp_path):
        """What a new user is told to open is there."""
        app = create_app(Settings(data_dir=tmp_path))
        text = (PAGE.parents[1] / "README.md").read_text()
        named = re.findall(r"`(/[a-z0-9/._-]+)`", text.partition("## Service")[2])
        assert "/v1/openapi.json" in named
        assert set(named) <= {getattr(route, "path", "") for route in app.routes}

    @pytest.mark.parametrize("name", sorted(commands(get_command(admin_commands.app))))
    def test_every_admin_command_is_named(self, name):
        words = name.removeprefix("bitquota admin ").split()
        text = PAGE.read_text()
        assert name in text or all(word in text for word in words), name
