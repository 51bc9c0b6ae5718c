"""A real uvicorn with a small application, and clients that are too slow or too many."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import threading
import time
from functools import partial

import pytest
import uvicorn

from bitquota.service.api import connections
from bitquota.service.api.connections import Connection, Connections
from bitquota.service.settings import Settings
from waiting import PATIENCE_S, wait_for

GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


class App:
    """Answers with how many bytes it got; ``/endless`` never ends."""

    def __init__(self):
        self.began, self.ended = threading.Event(), threading.Event()
        self.may_read = threading.Event()
        self.may_read.set()

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return
        self.began.set()
        try:
            while not self.may_read.is_set():  # noqa: ASYNC110  # another thread sets it
                await asyncio.sleep(0.01)
            size, more = 0, True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                size += len(message.get("body", b""))
                more = message.get("more_body", False)
            endless = scope["path"] == "/endless"
            body = str(size).encode()
            headers = [] if endless else [(b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            while endless and not await gone(receive):
                piece = {"type": "http.response.body", "body": bytes(2**16), "more_body": True}
                await send(piece)
            await send({"type": "http.response.body", "body": body})
        finally:
            self.ended.set()


async def gone(receive):
    """Return whether the client has gone, without waiting for it."""
    asking = asyncio.ensure_future(receive())
    await asyncio.sleep(0)
    if not asking.done():
        asking.cancel()
        return False
    return asking.result()["type"] == "http.disconnect"


class Server:
    """One uvicorn in a thread."""

    def __init__(self, **settings):
        self.app = App()
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port = self._listening.getsockname()[1]
        held = Connections(Settings(**settings))
        config = uvicorn.Config(
            self.app, http=partial(Connection, held), ws="none", lifespan="off",
            log_level="warning", timeout_graceful_shutdown=1,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._listening]}
        )

    def connect(self, source="127.0.0.1"):
        connection = socket.create_connection(
            ("127.0.0.1", self.port), timeout=PATIENCE_S, source_address=(source, 0)
        )
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.should_exit = True
        self._thread.join()


def answer(connection):
    """Return status and body of all that comes until the server hangs up."""
    said = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(2**16):
            said += piece
    connection.close()
    head, _, body = said.partition(b"\r\n\r\n")
    return int(head[9:12]) if head else None, body


def first_answer(connection):
    """Return the status of an answer after which the connection stays."""
    said = b""
    while b"\r\n\r\n" not in said or len(said.partition(b"\r\n\r\n")[2]) < length_of(said):
        piece = connection.recv(2**16)
        if not piece:
            raise ConnectionError
        said += piece
    return int(said[9:12])


def length_of(said):
    return int(re.search(rb"content-length: (\d+)", said)[1])


class TestHead:
    @pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nhost: x\r\n"], ids=["none", "half"])
    def test_that_does_not_arrive_is_told_so(self, sent):
        with Server(header_timeout_s=0.2) as server, server.connect() as connection:
            connection.sendall(sent)
            status, body = answer(connection)
        assert status == 408
        assert "within 0.2 s" in json.loads(body)["detail"]
        assert not server.app.began.is_set()

    @pytest.mark.parametrize("drip", [b"x: y\r\n", b"\r\n"], ids=["headers", "empty lines"])
    def test_dripping_does_not_help(self, drip):
        """Nor after a request that was answered."""
        with Server(header_timeout_s=1) as server, server.connect() as connection:
            connection.sendall(GET)
            assert first_answer(connection) == 200
            if drip.strip():
                connection.sendall(b"GET / HTTP/1.1\r\n")
            with contextlib.suppress(OSError):
                for _ in range(1000):
                    connection.sendall(drip)
                    time.sleep(0.02)
                pytest.fail("the server never hung up")

    def test_idle_between_requests_is_no_head_that_is_late(self):
        with Server(header_timeout_s=0.5) as server, server.connect() as kept:
            kept.sendall(GET)
            assert first_answer(kept) == 200
            with server.connect() as late:
                late.sendall(b"GET")
                assert answer(late)[0] == 408  # so much time has passed
            kept.sendall(GET)
            assert first_answer(kept) == 200

    def test_without_end_is_cut_off(self):
        with Server() as server, server.connect() as connection:
            connection.sendall(b"GET / HTTP/1.1\r\n")
            with contextlib.suppress(OSError):
                for _ in range(1000):
                    connection.sendall(b"x: " + b"y" * 2**12 + b"\r\n")
                    time.sleep(0.001)
                pytest.fail("the server never hung up")


class TestBody:
    HEAD = b"PUT / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n"

    def test_that_comes_too_slowly_is_told_so(self, monkeypatch):
        monkeypatch.setattr(connections, "_WINDOW_S", 0.5)
        with Server(min_body_rate=1000) as server, server.connect() as connection:
            connection.sendall(self.HEAD + b"x")
            status, body = answer(connection)
            assert server.app.ended.wait(PATIENCE_S)
        assert status == 408
        assert "1,000 bytes a second" in json.loads(body)["detail"]

    def test_slow_link_that_keeps_the_rate_goes_on(self, monkeypatch):
        monkeypatch.setattr(connections, "_WINDOW_S", 2)
        with Server(min_body_rate=1000) as server, server.connect() as connection:
            connection.sendall(self.HEAD)
            for _ in range(50):
                connection.sendall(bytes(20_000))
                time.sleep(0.05)
            assert first_answer(connection) == 200

    def test_server_that_is_slow_itself_blames_nobody(self, monkeypatch):
        monkeypatch.setattr(connections, "_WINDOW_S", 0.2)
        with Server(min_body_rate=10**9) as server, server.connect() as connection:
            server.app.may_read.clear()
            sending = threading.Thread(target=connection.sendall, args=(self.HEAD + bytes(10**6),))
            sending.start()
            with server.connect() as late:  # a second and more goes by
                late.sendall(self.HEAD)
                assert answer(late)[0] == 408
            server.app.may_read.set()
            sending.join()
            assert first_answer(connection) == 200


class TestAnswer:
    def test_that_nobody_reads_ends(self, monkeypatch):
        monkeypatch.setattr(connections, "_UNREAD_S", 0.2)
        with Server() as server, server.connect() as connection:
            connection.sendall(GET.replace(b"/ ", b"/endless ", 1))
            assert server.app.began.wait(PATIENCE_S)
            assert server.app.ended.wait(PATIENCE_S)


class TestMany:
    def test_of_one_address_leave_others_alone(self):
        with Server(max_connections_per_address=3) as server:
            held = [server.connect("127.0.0.2") for _ in range(3)]
            with server.connect("127.0.0.2") as more:
                status, body = answer(more)
            assert status == 429
            assert "at most 3 connections" in json.loads(body)["detail"]
            with server.connect() as other:
                other.sendall(GET)
                assert first_answer(other) == 200
            for connection in held:
                connection.close()

            def is_served():
                with server.connect("127.0.0.2") as again, contextlib.suppress(ConnectionError):
                    again.sendall(GET)
                    return first_answer(again) == 200
                return False

            wait_for(is_served, "room for one more")

    def test_the_oldest_half_request_makes_room(self):
        with Server(max_connections=2) as server:
            first, second = server.connect(), server.connect()
            with server.connect() as third:
                third.sendall(GET)
                assert first_answer(third) == 200
            assert answer(first)[0] == 408
            second.sendall(GET)
            assert first_answer(second) == 200
            second.close()

    def test_nobody_makes_room_who_is_being_served(self):
        with Server(max_connections=1) as server, server.connect() as first:
            first.sendall(GET)
            assert first_answer(first) == 200
            assert answer(server.connect())[0] == 503


class TestNetwork:
    @pytest.mark.parametrize(
        ("host", "expected"),
        [("192.0.2.7", "192.0.2.7"), ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"), ("x", "x")],
    )
    def test_what_one_client_has_to_itself(self, host, expected):
        assert connections._network(host) == expected
