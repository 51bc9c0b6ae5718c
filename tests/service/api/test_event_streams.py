from __future__ import annotations

import contextlib

import httpx

from live_server import LiveServer, folder_zip, npz
from waiting import PATIENCE_S, wait_for


class TestEventStreams:
    def test_one_key_has_only_so_many(self, tmp_path):
        """And may open another once one of them is closed."""
        settings = {"slots": 0, "max_event_streams": 2}
        with (
            LiveServer(tmp_path / "data", **settings) as server,
            httpx.Client(base_url=server.url, timeout=PATIENCE_S) as http,
            contextlib.ExitStack() as opened,
        ):
            job = order(http)
            streams = [
                opened.enter_context(http.stream("GET", f"/v1/jobs/{job}/events")) for _ in range(2)
            ]
            lines = [stream.iter_lines() for stream in streams]  # one that is dropped closes it
            assert [next(one) for one in lines] == ["id: 1", "id: 1"]
            refused = http.get(f"/v1/jobs/{job}/events")
            assert refused.status_code == 429
            assert "at most 2 event streams" in refused.json()["detail"]
            assert http.get(f"/v1/jobs/{job}").status_code == 200
            streams[0].close()

            def may_open():
                with http.stream("GET", f"/v1/jobs/{job}/events") as again:
                    return again.status_code == 200

            wait_for(may_open, "another stream")


def order(http):
    """Return the id of a job that waits."""
    body = {
        "kind": "plan",
        "model": http.put("/v1/models", content=folder_zip()).json()["id"],
        "dataset": http.put("/v1/datasets", content=npz()).json()["id"],
        "request": {"budgets": ["3 bits"]},
    }
    return http.post("/v1/jobs", json=body).json()["id"]
