from __future__ import annotations

import ipaddress
import socket

import pytest

from bitquota.errors import InvalidInput
from bitquota.service.security.public_addresses import check_url, is_public, resolve

PUBLIC = [
    "1.1.1.1", "93.184.215.14", "100.63.255.255", "100.128.0.0", "172.15.0.1", "172.32.0.1",
    "192.0.1.1", "192.167.0.1", "198.17.0.1", "198.20.0.1", "223.255.255.255",
    "2606:4700::1111", "2a00:1450:4001::1", "2001:4860:4860::8888", "2003::1",
    "64:ff9b::101:101",
]  # fmt: skip
NOT_PUBLIC = {
    "this network": ["0.0.0.1", "0.255.255.255", "::"],
    "private": ["10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "fc00::1", "fdff::1"],
    "carrier-grade NAT": ["100.64.0.0", "100.127.255.255"],
    "loopback": ["127.0.0.1", "127.255.255.254", "::1"],
    "link-local": ["169.254.169.254", "fe80::1", "febf::1"],
    "site-local": ["fec0::1"],
    "protocol assignments": [*(f"192.0.0.{k}" for k in (0, 1, 8, 9, 10, 170, 171, 255)), "2001::1"],
    "documentation": ["192.0.2.1", "198.51.100.1", "203.0.113.1", "2001:db8::1", "3fff::1"],
    "relays": ["192.88.99.1"],
    "benchmarking": ["198.18.0.1", "198.19.255.255", "2001:2::1"],
    "multicast": ["224.0.0.1", "239.255.255.255", "ff02::1", "ff0e::1"],
    "reserved": ["240.0.0.1", "255.255.255.255", "100::1", "4000::1"],
    "IPv4-mapped": ["::ffff:127.0.0.1", "::ffff:1.1.1.1", "::ffff:0:7f00:1"],
    "IPv4-compatible": ["::127.0.0.1", "::7f00:1", "::1.1.1.1"],
    "NAT64": ["64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b::c000:9"],
    "local NAT64": ["64:ff9b:1::1", "64:ff9b:1::101:101", "64:ff9b:1:ffff::1"],
    "6to4": ["2002:7f00:1::", "2002:101:101::1"],
    "Teredo": ["2001:0:4136:e378:8000:63bf:3fff:fdd2"],
    "ORCHID": ["2001:10::1", "2001:20::1"],
}


class TestIsPublic:
    @pytest.mark.parametrize("text", PUBLIC)
    def test_public(self, text):
        assert is_public(ipaddress.ip_address(text))

    @pytest.mark.parametrize(
        "text",
        [pytest.param(t, id=f"{why}: {t}") for why, some in NOT_PUBLIC.items() for t in some],
    )
    def test_not_public(self, text):
        assert not is_public(ipaddress.ip_address(text))


class TestCheckUrl:
    @pytest.mark.parametrize(
        "url",
        ["http://example.org/", "ftp://example.org/", "https://", "https://./", "example.org",
         "https://u:p@e.org/", "https://[::1", "https://e.org:0x50/", "https://e.org:65536/"],
    )  # fmt: skip
    def test_what_is_no_url_of_https(self, url):
        with pytest.raises(InvalidInput, match="webhook must be"):
            check_url(url, allow_private=False)

    @pytest.mark.parametrize(
        "host",
        ["127.0.0.1", "127.0.0.1.", "169.254.169.254", "[::1]", "[::ffff:127.0.0.1]",
         "[::7f00:1]", "[64:ff9b:1::1]", "[2002:7f00:1::]", "[2a00:1450:4001::1%25eth0]"],
    )  # fmt: skip
    def test_address_that_is_not_public(self, host):
        with pytest.raises(InvalidInput, match="public address"):
            check_url(f"https://{host}/", allow_private=False)

    @pytest.mark.parametrize(
        "host",
        ["2130706433", "0x7f000001", "0x7f.1", "127.1", "017700000001", "0177.0.0.1", "0", "127.1.",
         "127.0.0.01", "16843009", "1.1"],
    )  # fmt: skip
    def test_odd_ways_to_write_an_address(self, host):
        """Also of public ones: nobody needs them."""
        with pytest.raises(InvalidInput, match="four decimal numbers"):
            check_url(f"https://{host}/", allow_private=False)

    @pytest.mark.parametrize("port", [0, 1, 22, 25, 80, 442, 444, 1023])
    def test_port_of_another_service(self, port):
        with pytest.raises(InvalidInput, match="port 443 or one from 1024"):
            check_url(f"https://example.org:{port}/", allow_private=False)

    @pytest.mark.parametrize(
        "url",
        ["https://example.org/x?y=1", "https://example.org./", "https://93.184.215.14:8443/",
         "https://example.org:443/", "https://example.org:1024/", "https://[2606:4700::1111]/"],
    )  # fmt: skip
    def test_taken(self, url):
        check_url(url, allow_private=False)

    @pytest.mark.parametrize("url", ["http://127.0.0.1:80/", "https://10.0.0.1/", "http://127.1/"])
    def test_operator_may_allow_all(self, url):
        check_url(url, allow_private=True)


class TestResolve:
    @pytest.mark.parametrize(
        "host", ["localhost", "127.1", "2130706433", "0x7f000001", "１２７.0.0.1"]
    )
    def test_every_way_to_write_this_machine(self, host):
        with pytest.raises(InvalidInput, match="public address|must be found"):
            resolve(host, 443, allow_private=False)

    @pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 64 + ".org", "a..org"])
    def test_unknown_name(self, host):
        with pytest.raises(InvalidInput, match="must be found"):
            resolve(host, 443, allow_private=False)

    def test_address_to_call(self):
        assert resolve("127.0.0.1", 443, allow_private=True) == "127.0.0.1"

    def test_an_answer_without_addresses(self, monkeypatch):
        """Some resolvers know a name and no address of it."""
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [])
        with pytest.raises(InvalidInput, match="must have an address"):
            resolve("example.org", 443, allow_private=False)
