"""Dockerfile and compose file: linted, checked against the schema, and built where possible."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess

import pytest
import yaml

from bitquota.service.security.seccomp import container_profile
from bitquota.service.settings import Settings

from .conftest import run, tool


@pytest.fixture(scope="module")
def dockerfile(repository):
    return (repository / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def compose(repository):
    return yaml.safe_load((repository / "docker-compose.yml").read_text())


class TestDockerfile:
    def test_lints(self, repository):
        done = run(tool("hadolint"), "Dockerfile", cwd=repository)
        assert (0, "") == (done.returncode, done.stdout)

    @pytest.mark.parametrize("target", ["api", "worker", "ray"])
    def test_has_all_targets_without_root(self, dockerfile, target):
        """Each is built from the stage that sets the user, the health check and the volume."""
        assert f"FROM runtime AS {target}\n" in dockerfile
        runtime = dockerfile[dockerfile.index(" AS runtime") : dockerfile.index(" AS api\n")]
        assert "USER 10001:10001" in runtime
        assert "HEALTHCHECK" in runtime
        assert "/healthz" in runtime

    def test_copies_only_what_is_sent(self, repository, dockerfile):
        """Every COPY from the build context is let through by .dockerignore."""
        allowed = {
            line.removeprefix("!")
            for line in (repository / ".dockerignore").read_text().splitlines()
            if line.startswith("!")
        }
        copied = {
            name
            for line in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.MULTILINE)
            for name in line.split()
        }
        assert copied == allowed
        assert all((repository / name).exists() for name in copied)

    def test_installs_with_the_pins(self, dockerfile):
        installs = dockerfile.replace("\\\n", " ").split("pip install")[1:]
        assert len(installs) == 4
        assert all("--constraint" in text.split("\n")[0] for text in installs)


class TestCompose:
    def check(self, path, cwd):
        return run(
            tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", path, cwd=cwd
        )

    def test_follows_the_schema(self, repository):
        done = self.check("docker-compose.yml", repository)
        assert done.returncode == 0, done.stdout

    def test_the_schema_finds_a_mistyped_key(self, repository, compose, tmp_path):
        """The check above can fail."""
        path = tmp_path / "docker-compose.yml"
        wrong = compose | {"services": {"api": compose["services"]["api"] | {"portz": []}}}
        path.write_text(yaml.safe_dump(wrong))
        assert self.check(path, repository).returncode == 1

    def test_every_service_is_hardened(self, compose):
        for name, found in compose["services"].items():
            assert (True, ["ALL"]) == (found["read_only"], found["cap_drop"]), name
            assert "no-new-privileges:true" in found["security_opt"], name
            user = "999:999" if name == "postgres" else "10001:10001"
            assert found["user"] == user

    def test_every_service_is_limited_and_rotates_its_log(self, compose):
        for name, found in compose["services"].items():
            assert found["pids_limit"] >= 1024, name
            assert {"max-size", "max-file"} == set(found["logging"]["options"]), name
        limited = {name for name, found in compose["services"].items() if "mem_limit" in found}
        assert {"api", "worker", "postgres"} == limited

    @pytest.mark.parametrize("service", ["worker", "ray-worker"])
    def test_models_run_in_a_sandbox(self, compose, service):
        """With what bubblewrap needs in a container, and never with a capability."""
        found = compose["services"][service]
        assert {"seccomp=./deploy/seccomp.json", "systempaths=unconfined"} < set(
            found["security_opt"]
        )
        assert "cap_add" not in found
        assert "privileged" not in found
        asking = {"ray-worker": "ray-head"}.get(service, service)
        environment = compose["services"][asking]["environment"]
        assert environment["BITQUOTA_SANDBOX"] == "${BITQUOTA_SANDBOX:-require}"
        settings = Settings()
        assert found["pids_limit"] > 2 * settings.max_processes * settings.slots

    def test_profile_is_that_of_the_code(self, repository):
        """Regenerate with ``bitquota.service.security.seccomp.container_profile``."""
        written = json.loads((repository / "deploy" / "seccomp.json").read_text())
        assert container_profile() == written

    @pytest.mark.parametrize(
        ("service", "target"),
        [("api", "api"), ("worker", "worker"), ("ray-head", "ray"), ("ray-worker", "ray")],
    )
    def test_services_are_built_from_their_targets(self, compose, service, target):
        assert compose["services"][service]["build"]["target"] == target

    def test_the_api_alone_by_default(self, compose):
        """And it needs no file that is not there: no secret of another profile."""
        profiles = {name: s.get("profiles") for name, s in compose["services"].items()}
        assert profiles == {
            "api": None,
            "worker": ["worker"],
            "postgres": ["postgres"],
            "ray-head": ["ray"],
            "ray-worker": ["ray"],
        }
        assert "secrets" not in compose["services"]["api"]

    @pytest.mark.parametrize("service", ["api", "worker", "ray-head"])
    def test_servers_share_the_data(self, compose, service):
        assert "data:/data" in compose["services"][service]["volumes"]

    def test_every_service_is_looked_after(self, compose):
        """By a health check of its own, or by that of its image."""
        for name, found in compose["services"].items():
            if name in {"postgres", "ray-worker"}:
                assert "test" in found["healthcheck"]
            else:
                assert "healthcheck" not in found, "the image's asks the right port"
            assert found["restart"] == "unless-stopped"

    def test_secrets_are_files(self, compose):
        """No password and no token stands in a variable."""
        assert all(set(s) == {"file"} for s in compose["secrets"].values())
        for found in compose["services"].values():
            for name, value in found.get("environment", {}).items():
                secret = any(word in name for word in ("PASSWORD", "TOKEN", "SECRET", "KEY"))
                assert not secret or name.endswith(("_FILE", "_PATH")), name
                assert "${POSTGRES_PASSWORD" not in str(value)

    @pytest.mark.parametrize("service", ["ray-head", "ray-worker"])
    def test_nodes_of_ray_use_the_token(self, compose, service):
        """Whoever reaches a node without one would run anything there."""
        environment = compose["services"][service]["environment"]
        assert environment["RAY_AUTH_MODE"] == "token"
        assert environment["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"  # noqa: S105  # a path
        assert "ray_token" in compose["services"][service]["secrets"]

    def test_variables_are_settings(self, compose):
        """A mistyped one would be ignored."""
        known = Settings().to_environment()
        for name, found in compose["services"].items():
            for variable in found.get("environment", {}):
                assert not variable.startswith("BITQUOTA_") or variable in known, (name, variable)


@pytest.mark.docker
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", ["api", "worker", "ray"])
class TestBuild:
    """A real build with buildah: ``make docker-check``.

    ``BASE_IMAGE`` replaces the Python image where no registry can be reached, and ``BUILD_FLAGS``
    is passed on, such as a volume with a package index.
    """

    @pytest.fixture
    def image(self, repository, target):
        if "BITQUOTA_DOCKER_CHECK" not in os.environ:
            pytest.skip("downloads an image and torch; run make docker-check")
        if shutil.which("buildah") is None:
            pytest.skip("needs buildah")
        base = os.environ.get("BASE_IMAGE")
        arguments = ["--build-arg", f"PYTHON_IMAGE={base}"] if base else []
        arguments += os.environ.get("BUILD_FLAGS", "").split()
        tag = f"localhost/bitquota-{target}:check"
        command = ["buildah", "bud", "--layers", "--isolation", "chroot", "--format", "docker"]
        subprocess.run(
            [*command, *arguments, "--target", target, "--tag", tag, str(repository)], check=True
        )
        return tag

    def test_runs_as_a_user_and_answers(self, image, target, tmp_path):
        """Started as uid 10001; the API has no torch, the worker has."""
        config = run("buildah", "inspect", "--type", "image", image, cwd=tmp_path)
        docker = json.loads(config.stdout)["Docker"]["config"]
        assert docker["User"] == "10001:10001"
        assert "/healthz" in " ".join(docker["Healthcheck"]["Test"])
        container = run("buildah", "from", image, cwd=tmp_path).stdout.strip()
        try:
            code = (
                "import importlib.util as u, os, bitquota.service.app;"
                "print(os.getuid(), u.find_spec('torch') is not None)"
            )
            inside = ["buildah", "run", "--isolation", "chroot", container, "--"]
            done = run(*inside, "python3", "-c", code, cwd=tmp_path)
            assert done.stdout.split() == ["10001", str(target != "api")], done.stderr
            done = run(*inside, "bitquota", "--version", cwd=tmp_path)
            assert done.stdout.startswith("bitquota "), done.stderr
        finally:
            run("buildah", "rm", container, cwd=tmp_path)
