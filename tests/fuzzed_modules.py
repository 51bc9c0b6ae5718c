"""Random torch modules on their way through inspect, plan and export; see ``model_fuzzer``."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from model_fuzzer import TOLERANCE, GraphRun, Invalid, compare, planned, run_file, written_samples

if TYPE_CHECKING:
    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.loaded import LoadedModel
    from bitquota.plan import Plan


class ModuleRun(GraphRun):
    """One random module, as a factory returns it or as a ``.pt2``."""

    def go(self) -> None:
        """Take the module through all stages; raises what ``GraphRun.go`` raises."""
        from bitquota.models.load import load_model
        from bitquota.models.outputs import named_outputs, outputs_of
        from random_modules import random_module

        made = random_module(self.seed)
        self.features = made.features
        rng = np.random.default_rng(self.seed + 1)
        with torch.no_grad():
            truth = {k: v.numpy() for k, v in named_outputs(made.module(*made.inputs)).items()}
        spec = "random_modules:current"
        if rng.random() < 0.4:
            spec = self._exported(made.module, made.inputs)
        self.stage = "load"
        model = load_model(spec)
        names = [] if spec.endswith(".pt2") else ["x", "scale"]
        inputs = {names[k] if names else ("x" if len(made.inputs) == 1 else f"in{k}"): t.numpy()
                  for k, t in enumerate(made.inputs)}  # fmt: skip
        samples = written_samples(self.folder, inputs, rng, ordered=True)
        n = 7
        plain = outputs_of(model.module, tuple(t[:n] for t in made.inputs))
        expected = list(truth.values())
        found = {str(k): v.numpy() for k, v in enumerate(plain.values())}
        compare("full precision", found, {str(k): v[:n] for k, v in enumerate(expected)}, TOLERANCE)
        target = str(rng.choice(["ref-int", "ref-int", "ort-cpu", ""])) or None
        plan, _, model = planned(self, model, samples, target, rng)
        self.planned = True
        self._export(model, plan, samples, target)

    def _exported(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> str:
        """Return the name of the file that torch writes; torch may refuse the module."""
        from format_networks import write_pt2

        self.features.append("pt2")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return str(write_pt2(module, inputs, self.folder / "model.pt2"))
        except Exception as err:  # torch raises whatever it meets
            msg = f"torch.export: {str(err).splitlines()[0]}"
            raise Invalid(msg) from err

    def _export(
        self, model: LoadedModel, plan: Plan, samples: CalibrationSet, target: str | None
    ) -> None:
        from bitquota.exports.export import export_plan, open_export
        from bitquota.models.binding import bound
        from bitquota.models.outputs import named_outputs, outputs_of
        from bitquota.quantizers.planned import quantized_module

        self.stage = "export"
        form = None if target else "onnx-qdq"
        folder = self.folder / "out"
        export_plan(model, plan, folder, target=target, format_name=form, samples=samples)
        few = bound(model, samples).first(7)
        ours: Any = quantized_module(model, plan, fit_data=samples)
        expected = [v.numpy() for v in outputs_of(ours, few.inputs).values()]
        if target == "ref-int":
            module, _, _ = open_export(model, folder)
            with torch.no_grad():
                found = [v.numpy() for v in named_outputs(module(*few.inputs)).values()]
        else:
            path = folder / "model.onnx"
            given = [v.name for v in _inputs_of(path)]
            feed = dict(zip(given, (t.numpy() for t in few.inputs), strict=True))
            found = list(run_file(path, feed).values())
        pairs = ({str(k): v for k, v in enumerate(values)} for values in (found, expected))
        compare("export", *pairs, TOLERANCE)


def _inputs_of(path: Any) -> list[Any]:
    import onnx

    graph = onnx.load(path).graph
    held = {t.name for t in graph.initializer}
    return [v for v in graph.input if v.name not in held]
