"""Modules import each other in one direction, and inside functions only for a reason."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter

import pytest

START = "start-up: a command loads what it runs, and no torch, numba or web server before"
LIMITED = "an evaluator limits itself and renews its kernels before it loads torch and numba"
OPTIONAL = "the extra 'service': without it an error says what to install"

LATE = {
    START: {
        "cli.comparing": {"search.compare"},
        "cli.estimating": {"search.estimating"},
        "cli.evaluating": {"evaluate.scoring", "models.factory", "models.load", "models.loaded"},
        "cli.exporting": {"exports.export", "models.load"},
        "cli.gating": {"evaluate.scoring", "models.load", "models.loaded", "models.samples"},
        "cli.here": {"models.load", "models.mixing", "models.running"},
        "cli.importing": {"solver", "solver.files", "solver.posed_problem"},
        "cli.inspecting": {"models.inspection", "models.lean_transformers", "models.load"},
        "cli.loading": {"models.samples", "models.text"},
        "cli.options": {"solver.backends"},
        "cli.planning": {"search.allocate"},
        "cli.profiling": {
            "exports.energy",
            "exports.profile",
            "exports.profile_files",
            "exports.profile_fit",
            "exports.profile_order",
            "models.load",
        },
        "cli.quickstart": {"exports.export_report"},
        "cli.remote": {"client", "client.sources", "models.gguf_folder", "solver.files"},
        "cli.sandboxed": {"service.security.sandbox"},
        "cli.serving": {"cli.demo", "service"},
        "cli.solving": {
            "json_schema",
            "solver",
            "solver.archive",
            "solver.document",
            "solver.files",
            "solver.problem_document",
            "solver.verify",
        },
        "cli.training": {
            "quantizers.channel_fit",
            "training.distributed",
            "training.learn",
            "training.nested_plans",
            "training.qat",
            "training.robust",
        },
        "cli.training_options": {
            "models.factory",
            "models.load",
            "models.running",
            "sensitivity.losses",
        },
        "report.charts": {"solver"},
        "service": {"service.run"},
        "service.admin_commands": {
            "service.api.schemas",
            "service.doctor",
            "service.jobs.job_store",
            "service.jobs.quotas",
            "service.jobs.usage",
            "service.jobs.webhooks",
            "service.security.keys",
            "service.store.database",
            "service.store.migrate",
            "service.worker.maintenance",
        },
        "service.api.solve_task": {
            "solver",
            "solver.document",
            "solver.posed_problem",
            "solver.problem_document",
        },
        "service.jobs.kinds.compare": {"search.compare"},
        "service.jobs.kinds.estimate": {"search.estimating"},
        "service.jobs.kinds.evaluate": {"evaluate.scoring"},
        "service.jobs.kinds.export": {"exports.export"},
        "service.jobs.kinds.finetune": {
            "quantizers.channel_fit",
            "training.nested_plans",
            "training.qat",
        },
        "service.jobs.kinds.frontier": {"solver.document"},
        "service.jobs.kinds.learn": {"training.learn", "training.qat"},
        "service.jobs.kinds.measure": {"search.allocate"},
        "service.jobs.kinds.plan": {"search.allocate"},
        "service.jobs.kinds.solve": {"solver.document"},
        "service.jobs.kinds.solving_request": {"solver"},
        "service.jobs.kinds.training_request": {"training.qat", "training.saved"},
        "service.jobs.work": {"models.load", "models.loaded", "models.samples"},
        "service.store.database": {"service.store.migrate"},
        "solver.backends.own": {"solver.native"},
    },
    LIMITED: {
        "service.worker.evaluator": {
            "quantizers.column_kernels",
            "quantizers.scale_kernels",
            "models.calibration",
            "models.loaded",
            "search.allocate",
            "search.portfolio",
            "sensitivity.measures.parts",
            "measurement_setup",
            "solver.loading",
        },
        "service.worker.forkserver": {"models.load", "models.samples"},
    },
    OPTIONAL: {
        "service.run": {
            "service.api.connections",
            "service.app",
            "service.logs",
            "service.security.keys",
            "service.store.database",
        },
    },
}
"""Who may import what inside a function: reason, then importer, then imported."""


def modules(repository) -> dict[str, ast.Module]:
    """Every module of the package by its name."""
    root = repository / "src" / "bitquota"
    found = {}
    folders = [root]
    while folders:
        folder = folders.pop()
        for path in folder.iterdir():
            if path.is_dir():  # also through a link
                folders.append(path)
            elif path.suffix == ".py":
                parts = path.relative_to(root.parent).with_suffix("").parts
                name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                found[name] = ast.parse(path.read_text())
    return found


def imports(tree: ast.Module, known, *, inside_functions: bool) -> set[str]:
    """Own modules that ``tree`` imports: at its top (for type checkers too), or in functions."""
    found: set[str] = set()
    todo: list[tuple[ast.AST, bool]] = [(tree, False)]
    while todo:
        node, inside = todo.pop()
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        todo += [(child, inside) for child in ast.iter_child_nodes(node)]
        if inside != inside_functions:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are written in full"
            full = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else str(node.module) for name in full.values()}
    return found & set(known)


@pytest.fixture(scope="module")
def trees(repository):
    return modules(repository)


def test_no_ring(trees):
    """Not through imports for type checkers, and not through those inside functions."""
    order = {
        name: imports(tree, trees, inside_functions=False)
        | imports(tree, trees, inside_functions=True)
        for name, tree in trees.items()
    }
    try:
        TopologicalSorter(order).prepare()
    except CycleError as ring:
        pytest.fail(" -> ".join(ring.args[1]))


def test_a_ring_would_be_seen():
    """The walk finds an import wherever it stands."""
    late = ast.parse("def f():\n    from bitquota.b import x\n")
    typed = ast.parse("if TYPE_CHECKING:\n    import bitquota.a\n")
    known = {"bitquota.a", "bitquota.b"}
    assert {"bitquota.b"} == imports(late, known, inside_functions=True)
    assert set() == imports(late, known, inside_functions=False)
    assert {"bitquota.a"} == imports(typed, known, inside_functions=False)


def test_imports_inside_functions_are_listed(trees):
    """One that buys neither start-up time nor an optional package stands at the top of its file."""
    found = {}
    for name, tree in trees.items():
        late = imports(tree, trees, inside_functions=True)
        if late:
            found[name.removeprefix("bitquota.")] = {m.removeprefix("bitquota.") for m in late}
    listed = {name: late for part in LATE.values() for name, late in part.items()}
    assert listed == found
