"""The templates for CI systems: valid, and run for real step by step as a runner would."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import torch
import yaml

from bitquota.candidates.table import Candidate
from bitquota.ci.lock import Limits, make_lock
from bitquota.models.load import load_model
from bitquota.plan import MeasuredLoss, Plan
from format_networks import plan_with, samples

LOCK = "bitquota.lock.json"


@pytest.fixture(scope="module")
def plan() -> Plan:
    """A plan of a tiny network, with a measured loss."""
    model = load_model("format_networks:tiny_net")
    made = plan_with(model, (torch.from_numpy(samples()[0]),), target="ref-int", bits=(3, 4, 8))
    measured = MeasuredLoss(mean=0.1, standard_error=0.001, n_samples=100)
    return replace(made, measured=measured)


def at(plan: Plan, bits: int) -> Plan:
    """Return the plan with every layer at one width."""
    return replace(
        plan,
        assignments=tuple(
            replace(a, candidate=Candidate.of(a.layer, bits, a.candidate.scheme))
            for a in plan.assignments
        ),
    )


@pytest.fixture
def clone(tmp_path, plan):
    """Return a clone of a repository whose main branch holds a lock file at 3 bits."""
    origin, work = tmp_path / "origin", tmp_path / "work"
    git(tmp_path, "init", "--quiet", "--initial-branch=main", str(origin))
    make_lock(at(plan, 3), limits=Limits(max_kl=0.2)).save(origin / LOCK)
    git(origin, "add", LOCK)
    git(origin, "commit", "--quiet", "--message=Plan")
    git(tmp_path, "clone", "--quiet", str(origin), str(work))
    return work


def git(folder: Path, *arguments: str) -> None:
    identity = {f"GIT_{who}_{what}": "x@y" for who in ("AUTHOR", "COMMITTER")
                for what in ("NAME", "EMAIL")}  # fmt: skip
    subprocess.run(["git", *arguments], cwd=folder, check=True, env=os.environ | identity)


def environment(tmp_path: Path) -> dict[str, str]:
    """Return the variables of a runner, with the bitquota under test on the PATH."""
    wanted = {k: v for k, v in os.environ.items() if not k.startswith(("GITHUB_", "BITQUOTA_"))}
    wanted["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{wanted['PATH']}"
    wanted["RUNNER_TEMP"] = str(tmp_path)
    return wanted


class Runner:
    """Runs the steps of a composite action as GitHub does."""

    def __init__(self, action: Path, work: Path, tmp_path: Path) -> None:
        """Read the action; its own folder is where GitHub would have put it."""
        self.action = yaml.safe_load(action.read_text())
        self.context = {"github.action_path": str(action.parent)}
        self.work = work
        self.summary = tmp_path / "summary.md"
        self.output = tmp_path / "output"
        self.environment = environment(tmp_path) | {"GITHUB_STEP_SUMMARY": str(self.summary)}

    def resolve(self, text: str) -> str:
        """Put values in the place of ``${{ … }}``; an unknown name is empty, as on GitHub."""
        return re.sub(
            r"\$\{\{ *([\w.-]+) *\}\}", lambda found: self.context.get(found[1], ""), text
        )

    def run(self, **inputs: str) -> dict[str, str]:
        """Run every step; return the action's outputs and the exit code of its last step."""
        known = {name: spec.get("default", "") for name, spec in self.action["inputs"].items()}
        given = {name.replace("_", "-"): value for name, value in inputs.items()}
        assert given.keys() <= known.keys()
        self.context |= {f"inputs.{k}": v for k, v in (known | given).items()}
        code = 0
        for step in self.action["runs"]["steps"]:
            condition = re.fullmatch(r"([\w.-]+) != '(.*)'", step.get("if", "inputs.lock != ''"))
            if self.context[condition[1]] == condition[2]:
                continue
            assert code == 0, "a step follows a failed one"
            self.output.write_text("")
            done = subprocess.run(
                ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", step["run"]],
                cwd=self.work,
                env=self.environment
                | {name: self.resolve(text) for name, text in step.get("env", {}).items()}
                | {"GITHUB_OUTPUT": str(self.output)},
                capture_output=True,
                text=True,
                check=False,
            )
            code = done.returncode
            print(done.stdout, done.stderr)  # noqa: T201  # shown when a test fails
            for line in self.output.read_text().splitlines():
                name, _, value = line.partition("=")
                self.context[f"steps.{step['id']}.outputs.{name}"] = value
        found = {k: self.resolve(o["value"]) for k, o in self.action["outputs"].items()}
        return found | {"code": str(code)}


class TestGithubAction:
    @pytest.fixture
    def runner(self, repository, clone, tmp_path) -> Runner:
        return Runner(repository / "action.yml", clone, tmp_path)

    def test_schema(self, repository):
        """The action keeps GitHub's schema."""
        check_schema("vendor.github-actions", repository / "action.yml")

    def test_nothing_is_pasted_into_scripts(self, runner):
        """Inputs reach scripts through the environment: a title cannot become a command."""
        steps = runner.action["runs"]["steps"]
        assert [s["name"] for s in steps if "${{" in s.get("run", "")] == []
        used = " ".join(str(s.get("env", "")) + str(s.get("with", "")) for s in steps)
        used += str(runner.action["outputs"]) + " ".join(s.get("if", "") for s in steps)
        assert [name for name in runner.action["inputs"] if f"inputs.{name}" not in used] == []

    def test_every_limit_is_an_input(self, runner, bitquota_help):
        """What ``bitquota check`` takes, the action takes."""
        options = set(re.findall(r"--([a-z-]+)", bitquota_help("check")))
        missing = (
            options - set(runner.action["inputs"]) - {"json", "help", "summary", "device", "log-to"}
        )
        assert missing == set()

    def test_passes(self, runner):
        """A push: no base branch, exit 0, the table in the job summary."""
        found = runner.run(install="false")
        assert (found["code"], found["result"], found["exit-code"]) == ("0", "passed", "0")
        assert "bitquota.lock.json passed" in runner.summary.read_text()
        assert ET.parse(runner.work / found["junit"]).getroot().tag == "testsuites"  # noqa: S314

    def test_grown_model_in_a_pull_request(self, runner, clone, plan):
        """The base branch's lock comes from git; a larger model fails, and the diff says where."""
        make_lock(at(plan, 8), limits=Limits(max_kl=0.2)).save(clone / LOCK)
        runner.environment["GITHUB_BASE_REF"] = "main"
        found = runner.run(install="false")
        assert (found["code"], found["result"]) == ("1", "failed")
        text = runner.summary.read_text()
        assert "the base branch is" in text
        assert "#### Against the base branch" in text
        assert f"| `{plan.assignments[0].layer.name}` | W3" in text

    def test_first_lock_file(self, runner, clone):
        """A base branch without a lock file is nothing to compare with."""
        runner.environment["GITHUB_BASE_REF"] = "main"
        (clone / "new.lock.json").write_bytes((clone / LOCK).read_bytes())
        assert runner.run(install="false", lock="new.lock.json")["result"] == "passed"

    def test_changed_model(self, runner, clone):
        """Stale, 4."""
        (clone / "changed.py").write_text(
            "from format_networks import tiny_net\n\ndef model():\n    return tiny_net(seed=1)\n"
        )
        tests = Path(__file__).parents[1]
        runner.environment["PYTHONPATH"] = f"{clone}{os.pathsep}{tests}"
        found = runner.run(install="false", model="changed:model")
        assert (found["code"], found["result"]) == ("4", "stale")

    def test_values_with_spaces_and_quotes(self, runner):
        """A size with a space arrives whole; a hostile value is one argument, and refused."""
        assert runner.run(install="false", max_size="1 MiB")["result"] == "passed"
        found = runner.run(install="false", max_size="1 MiB'; touch owned; '")
        assert (found["code"], found["result"]) == ("2", "error")
        assert not (runner.work / "owned").exists()


class TestGitlabTemplate:
    @pytest.fixture
    def template(self, repository):
        return repository / "ci" / "bitquota.gitlab-ci.yml"

    def test_schema(self, template):
        """The template keeps GitLab's schema."""
        check_schema("vendor.gitlab-ci", template, "--data-transform", "gitlab-ci")

    @pytest.mark.parametrize(("bits", "code"), [(3, 0), (8, 1)])
    def test_merge_request(self, template, clone, plan, tmp_path, bits, code):
        """The script runs as it stands, and fails where the model grows."""
        make_lock(at(plan, bits), limits=Limits(max_kl=0.2)).save(clone / LOCK)
        done = run_gitlab(template, clone, tmp_path, "--max-kl=0.3")
        assert done.returncode == code, done.stderr
        assert (clone / "bitquota-junit.xml").exists()
        assert "Bitquota check" in (clone / "bitquota-summary.md").read_text()
        assert bool((clone / "bitquota-diff.md").read_text()) is (bits != 3)


def run_gitlab(template: Path, clone: Path, tmp_path: Path, arguments: str):
    """Run the job's script as GitLab's runner does: one bash, line after line, -e and pipefail."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!reference", lambda loader, node: loader.construct_sequence(node))
    document = yaml.load(template.read_text(), Loader)  # noqa: S506  # a safe loader
    job = document["bitquota-check"]
    lines = []
    for line in (*job["before_script"], *job["script"]):
        lines += document[line[0]] if isinstance(line, list) else [line]
    return subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", "\n".join(lines)],
        cwd=clone,
        env=environment(tmp_path)
        | document["variables"]
        | {
            "BITQUOTA_REQUIREMENT": "none",
            "BITQUOTA_CHECK_ARGUMENTS": arguments,
            "CI_MERGE_REQUEST_TARGET_BRANCH_NAME": "main",
        },
        capture_output=True,
        text=True,
        check=False,
    )


class TestPreCommitHook:
    def test_hook(self, repository, clone, plan, tmp_path):
        """The hook's pattern finds lock files, and its command takes several of them."""
        (hook,) = yaml.safe_load((repository / ".pre-commit-hooks.yaml").read_text())
        (clone / "other").mkdir()
        make_lock(at(plan, 8), limits=Limits(max_kl=0.01)).save(clone / "other" / LOCK)
        files = [LOCK, f"other/{LOCK}", "plan.json", "my-bitquota.lock.json"]
        matching = [name for name in files if re.search(hook["files"], name)]
        assert matching == files[:2]
        command = [*shlex.split(hook["entry"]), *hook["args"]]
        for names, code in ((matching[:1], 0), (matching, 1)):
            done = subprocess.run(
                [*command, *names], cwd=clone, env=environment(tmp_path), check=False
            )
            assert done.returncode == code


@pytest.fixture
def bitquota_help(tmp_path):
    """Return a function that gives the help of a command."""

    def show(command: str) -> str:
        done = subprocess.run(
            ["bitquota", command, "--help"],
            env=environment(tmp_path) | {"COLUMNS": "200", "NO_COLOR": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    return show


def check_schema(schema: str, path: Path, *arguments: str) -> None:
    """Hold a file to one of the schemas that check-jsonschema brings along."""
    program = Path(sys.executable).with_name("check-jsonschema")
    done = subprocess.run(
        [program, "--builtin-schema", schema, *arguments, path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
