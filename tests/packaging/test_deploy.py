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

    def test_rules_are_promql_and_fire(self, repository):
        if shutil.which("promtool") is None:
            pytest.skip("no promtool (Debian's package prometheus)")
        for what, file in (("check", "alerts.yml"), ("test", "alerts_test.yml")):
            checked = ["promtool", what, "rules", str(repository / "deploy" / file)]
            assert subprocess.run(checked, check=False).returncode == 0, file

    def test_every_alert_is_tested(self, repository):
        rules = yaml.safe_load((repository / "deploy/alerts.yml").read_text())
        named = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
        text = (repository / "deploy/alerts_test.yml").read_text()
        assert set(re.findall(r'alertname="(\w+)"', text)) == named


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
    """What can be told without helm; ``TestRendered`` needs it."""

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


TOOLS = "build/deploy-tools/bin"
"""Where ``make deploy-tools`` puts helm and the checker of Kubernetes' schemas."""

POSTGRES = (
    "database.url=postgresql+psycopg://bitquota@db/bitquota", "database.secret=bitquota-database"
)  # fmt: skip
INGRESS = ("ingress.enabled=true", "trustedProxies=10.42.0.0/16")
VALUES = {
    "one pod": (),
    "many pods": (*POSTGRES, *INGRESS, "workers.replicas=3", "storage.accessMode=ReadWriteMany"),
    "first key": (*POSTGRES, "firstKey.tenant=vision-team", "settings.BITQUOTA_MAX_JOB_S=3600"),
}


@pytest.fixture(scope="module")
def tool(repository):
    """The path of a program of ``make deploy-tools``, or a reason to skip."""

    def find(name):
        if found := shutil.which(name, path=str(repository / TOOLS)) or shutil.which(name):
            return found
        return pytest.skip(f"no {name} (make deploy-tools)")

    return find


@pytest.fixture(scope="module")
def helm(tool, chart):
    program = tool("helm")

    def call(command, values=(), name=()):
        told = [word for value in values for word in ("--set", value)]
        return subprocess.run(
            [program, command, *name, str(chart), *told],
            check=False, capture_output=True, text=True,
        )  # fmt: skip

    return call


class TestRendered:
    """By helm itself; Kubernetes 1.33 is the first with user namespaces switched on."""

    @pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
    def test_keeps_the_schemas(self, helm, tool, tmp_path, values):
        """Strictly: a field that no version knows is refused as well as a value of another type."""
        checker = tool("kubernetes-validate")
        linted = helm("lint", values)
        assert linted.returncode == 0, linted.stdout
        rendered = helm("template", values, ["bitquota"])
        assert rendered.returncode == 0, rendered.stderr
        (tmp_path / "chart.yaml").write_text(rendered.stdout)
        checked = subprocess.run(
            [checker, "-k", "1.33", "--strict", str(tmp_path / "chart.yaml")],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        assert checked.returncode == 0, checked.stdout + checked.stderr

        # What no schema says: names that refer to each other do, and no variable is set twice.
        documents = [d for d in yaml.safe_load_all(rendered.stdout) if d]
        names = {(d["kind"], d["metadata"]["name"]) for d in documents}
        pods = [d["spec"]["template"] for d in documents if d["kind"] == "Deployment"]
        for pod in pods:
            volumes = {v["name"] for v in pod["spec"]["volumes"]}
            claims = [v.get("persistentVolumeClaim", {}) for v in pod["spec"]["volumes"]]
            claimed = {c["claimName"] for c in claims if c}
            assert claimed
            assert {("PersistentVolumeClaim", name) for name in claimed} <= names
            for container in (*pod["spec"]["containers"], *pod["spec"].get("initContainers", ())):
                variables = [v["name"] for v in container["env"]]
                assert len(set(variables)) == len(variables)
                assert {m["name"] for m in container["volumeMounts"]} == volumes
        service = next(d for d in documents if d["kind"] == "Service")
        wanted = service["spec"]["selector"].items()
        assert sum(wanted <= pod["metadata"]["labels"].items() for pod in pods) == 1

    @pytest.mark.parametrize(
        ("values", "said"),
        [
            (["settings.BITQUOTA_SLOTS=2"], "only variables that the chart does not set itself"),
            (POSTGRES[:1], "database.url needs database.secret"),
        ],
    )
    def test_contradictions_are_refused(self, helm, values, said):
        refused = helm("template", values, ["bitquota"])
        assert refused.returncode != 0
        assert said in refused.stderr
