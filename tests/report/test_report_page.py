from __future__ import annotations

import base64
import hashlib
import json
import re

import pytest

from bitquota.errors import InvalidInput, MissingDependency
from bitquota.report import charts
from bitquota.report.comparison_plot import check_plot
from bitquota.report.image import draw_report
from bitquota.report.page import SCRIPTS, render_html
from seeded_jobs import inventory_of, matrix_of, plan_of

HOSTILE = "</script><script>window.hurt=1</script><!--"


@pytest.fixture(scope="module")
def document():
    inventory = inventory_of(4, prefix=HOSTILE)
    matrix = matrix_of(inventory, widths=(2, 4))
    plan = plan_of(inventory, matrix, "3 bits")
    found = charts.document(
        title=HOSTILE,
        plans=[plan],
        matrix=matrix,
        frontier=charts.frontier_of(matrix, points=3),
    )
    return found, charts.maps_of(matrix, plan)


class TestRenderHtml:
    def test_everything_is_inside(self, document):
        text = render_html(*document)
        ours = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
        assert not re.search(r"(?:src|href|url)\s*[=(]", ours)
        assert "<link" not in ours

    def test_policy_names_the_hash_of_every_script(self, document):
        """A script that is not ours has no hash there, so that browsers do not run it."""
        text = render_html(*document)
        policy = re.search(r'content="(default-src[^"]+)"', text)[1]
        scripts = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
        assert len(SCRIPTS) + 1 == len(scripts)
        for script in scripts:
            digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in policy
        assert "unsafe" not in policy

    def test_foreign_text_ends_no_element(self, document):
        text = render_html(*document)
        assert HOSTILE not in text
        data = re.search(r'id="data">(.*?)</script>', text, flags=re.DOTALL)[1]
        assert f"{HOSTILE}.0.attn.q" in json.loads(data)["layers"]["names"]

    def test_equal_documents_give_equal_files(self, document):
        assert render_html(*document) == render_html(*document)


class TestDrawReport:
    @pytest.fixture(autouse=True)
    def _needs_matplotlib(self, tmp_path):
        try:
            check_plot(tmp_path / "x.png")
        except MissingDependency as missing:
            pytest.skip(str(missing))

    @pytest.mark.parametrize(("name", "start"), [("r.png", b"\x89PNG"), ("r.svg", b"<?xml")])
    def test_equal_documents_give_equal_files(self, document, tmp_path, name, start):
        again = tmp_path / f"again-{name}"
        draw_report(document[0], tmp_path / name)
        draw_report(document[0], again)
        assert (tmp_path / name).read_bytes().startswith(start)
        assert (tmp_path / name).read_bytes() == again.read_bytes()

    def test_nothing_to_draw_is_an_error(self, tmp_path):
        with pytest.raises(InvalidInput, match="nothing|none"):
            draw_report(charts.document(title="empty"), tmp_path / "r.png")
