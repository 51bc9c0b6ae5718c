"""What an operator installs beside the service names what the service has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
import yaml

from bitquota.service.api.metrics import Metrics
from bitquota.service.settings import PREFIX, Settings
from bitquota.service.store.database import Database


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Every name that /metrics exports, and the states of jobs among its labels."""
    database = Database(f"sqlite:///{tmp_path_factory.mktemp('metrics') / 'empty.db'}")
    database.create()
    metrics = Metrics()
    metrics.observe("GET", "/healthz", 200, 0.1)
    text = metrics.collect(database, 0.0, 1).decode()
    database.close()
    return (
        set(re.findall(r"^(\w+)", re.sub(r"(?m)^#.*$", "", text), re.MULTILINE)),
        set(re.findall(r'bitquota_jobs\{status="(\w+)"\}', text)),
    )


def expressions(repository):
    """Return the PromQL of every alert and every panel."""
    rules = yaml.safe_load((repository / "deploy/alerts.yml").read_text())
    found = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    board = json.loads((repository / "deploy/grafana-dashboard.json").read_text())
    return found + [t["expr"] for panel in board["panels"] for t in panel["targets"]]


class TestMetricNames:
    def test_are_exported(self, repository, exported):
        names, states = exported
        asked = expressions(repository)
        assert len(asked) > 12
        for text in asked:
            assert set(re.findall(r"\bbitquota_\w+", text)) <= names, text
            for values in re.findall(r'bitquota_jobs\{status=~?"([\w|]+)"', text):
                assert set(values.split("|")) <= states, text

    def test_panels_do_not_overlap(self, repository):
        board = json.loads((repository / "deploy/grafana-dashboard.json").read_text())
        places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]]
        assert len(set(places)) == len(places)

    def test_rules_are_promql(self, repository):
        if shutil.which("promtool") is None:
            pytest.skip("no promtool (Debian's package prometheus)")
        checked = ["promtool", "check", "rules", str(repository / "deploy/alerts.yml")]
        assert subprocess.run(checked, check=False).returncode == 0


class TestProxyExample:
    def test_sets_what_the_server_believes(self, repository):
        """Never appended: a client's own header would be believed."""
        text = (repository / "deploy/nginx.conf").read_text()
        assert "proxy_set_header X-Forwarded-For $remote_addr;" in text
        assert "proxy_set_header X-Forwarded-Proto $scheme;" in text
        assert "$proxy_add_x_forwarded_for" not in text
        assert text.count("{") == text.count("}")


@pytest.fixture(scope="module")
def chart(repository):
    return repository / "deploy" / "helm" / "bitquota"


class TestChart:
    """No helm is to be had here: what can be told without it."""

    def test_values_that_templates_name_are_there(self, chart):
        """And each value is used."""
        values = yaml.safe_load((chart / "values.yaml").read_text())
        used = {
            path
            for file in (chart / "templates").iterdir()
            for path in re.findall(r"\.Values\.([\w.]+)", file.read_text())
        }
        for path in used:
            held = values
            for part in path.split("."):
                assert part in held, path
                held = held[part]

        def leaves(held, prefix=""):
            for name, value in held.items():
                deeper = isinstance(value, dict) and value and f"{prefix}{name}" not in used
                yield from leaves(value, f"{prefix}{name}.") if deeper else [f"{prefix}{name}"]

        assert set(leaves(values)) == used

    def test_settings_and_templates_exist(self, chart):
        """Variables are the service's own; what is included is defined; blocks are closed."""
        text = "".join(file.read_text() for file in (chart / "templates").iterdir())
        known = {PREFIX + name.upper() for name in Settings.__dataclass_fields__}
        assert set(re.findall(r"name: (BITQUOTA_\w+)", text)) <= known
        defined = set(re.findall(r'define "([\w.]+)"', text))
        assert defined == set(re.findall(r'include "([\w.]+)"', text))
        opened = len(re.findall(r"\{\{-? (?:if|range|define) ", text))
        assert opened == len(re.findall(r"\{\{-? end ", text))

    @pytest.mark.parametrize("name", ["api", "worker", "storage", "service"])
    def test_is_yaml_around_its_templates(self, chart, name):
        """Control lines left out, values replaced: what remains is a document of its kind."""
        text = (chart / "templates" / f"{name}.yaml").read_text()
        lines = [
            re.sub(r"\{\{.*?\}\}", "x", line)
            for line in text.splitlines()
            if not re.fullmatch(r"\s*\{\{.*\}\}", line)
        ]
        kinds = [document["kind"] for document in yaml.safe_load_all("\n".join(lines))]
        assert kinds
        assert set(kinds) <= {
            "Deployment", "PersistentVolumeClaim", "Service", "Ingress",
        }  # fmt: skip

    def test_models_run_in_a_sandbox(self, chart):
        """As in compose: the profile of the code, no capability, no root."""
        text = (chart / "templates" / "worker.yaml").read_text()
        for needed in (
            "BITQUOTA_SANDBOX, value: require", "procMount: Unmasked", "drop: [ALL]",
            "localhostProfile: bitquota/seccomp.json", "runAsNonRoot: true",
            "allowPrivilegeEscalation: false",
        ):  # fmt: skip
            assert needed in text
