import pytest
import torch

from bitquota.errors import InvalidInput, InvalidModel
from bitquota.models.calibration import CalibrationSet
from bitquota.models.discovery import discover
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.metrics import METRICS
from bitquota.sensitivity.registry import measure_by_name, measures
from bitquota.sensitivity.runners.make import make_runner
from contracts.measure import MeasureContract
from refusals import refused
from sensitivity_networks import Residual, build, inventory_of, samples, table_of

KL = loss_by_name("kl")


class TestEveryMeasure(MeasureContract):
    @pytest.fixture(params=[name for name in measures() if name != "tangent"])
    def measure(self, request):
        return measure_by_name(request.param)


class TestTangents(MeasureContract):
    engine = "graph"  # it differentiates the graph

    @pytest.fixture
    def measure(self):
        return measure_by_name("tangent")


class TestEveryMetric:
    @pytest.fixture(params=list(METRICS))
    def metric(self, request):
        return METRICS[request.param]

    def test_is_listed_under_its_own_name(self, metric):
        """The map's keys are the names, and users are told what they know it as."""
        assert metric is METRICS[metric.name]
        assert metric.known_as
        assert not metric.has_cross_terms

    def test_does_not_depend_on_the_engine(self, metric):
        """The exported graph and the module give the same bits."""
        found = []
        for engine in ("graph", "eager"):
            module = build(Residual)
            inventory = inventory_of(module)
            runner = make_runner(module, inventory, samples(Residual), chunk_size=5, engine=engine)
            found.append(metric.measure(runner, table_of(inventory), KL))

        assert (found[0].diagonal == found[1].diagonal).all()

    def test_refuses_a_base_point(self, metric):
        """Metrics are defined around full precision."""
        module = build(Residual)
        inventory = inventory_of(module)
        runner = make_runner(module, inventory, samples(Residual), engine="eager")
        with pytest.raises(InvalidInput, match="full precision"):
            metric.measure(runner, table_of(inventory), KL, base_point=(0, 0, 0, 0))

    def test_refuses_a_runner_without_a_module(self, metric):
        """A model that only runs cannot be looked into; the error names what can be used."""

        class Forward:
            inventory = inventory_of(build(Residual))
            calibration = samples(Residual)
            batch_norm, engine = "eval", "onnx"
            chunks = (range(12),)

        with refused(InvalidModel, engine="onnx"):
            metric.measure(Forward(), table_of(Forward.inventory), KL)

    def test_a_model_outside_torch_is_refused_or_right(self, metric, tmp_path):
        """ONNX Runtime: what looks at weights alone works, everything else says what to use."""
        pytest.importorskip("onnxruntime")
        from bitquota.models.load import load_model
        from onnx_graphs import image_graph

        model = load_model(str(image_graph(tmp_path / "m.onnx")))
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(6, 3, 8, 8, generator=generator)
        data = CalibrationSet(inputs=(x,), labels=torch.arange(6))
        inventory = discover(model.module, (x[:2],), model_digest=model.digest)
        runner = make_runner(model.module, inventory, data)
        if metric.needs_data:
            with refused(InvalidModel, engine="onnxruntime"):
                metric.measure(runner, table_of(inventory), KL)
        else:
            assert (metric.measure(runner, table_of(inventory), KL).diagonal > 0).all()


class TestMeasureByName:
    def test_unknown_name(self):
        """The error lists what there is."""
        with refused(InvalidInput, measure="magic"):
            measure_by_name("magic")
