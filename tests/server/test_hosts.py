"""Who may call the server by which name, and what those are told who speak no HTTP."""

from __future__ import annotations

import json
import socket

import httpx
import pytest
from server.serving import serve
from server.test_process import process

from hasten import LLM
from hasten.cli.serve import local_names
from hasten.server.middleware import host_name


def test_other_names_are_refused_where_only_this_machine_may_ask() -> None:
    with process() as (_, url):
        port = url.rpartition(":")[2]
        for path in ("/", "/v1/models", "/metrics", "/health"):
            for host in (
                "evil.example",
                f"evil.example:{port}",
                "127.0.0.1.evil.example",
                "[::2]:80",
                "localhost.",
                "",
            ):
                answer = httpx.get(url + path, headers={"Host": host})
                assert answer.status_code == 403, (path, host)
                error = answer.json()["error"]
                assert (error["code"], error["param"], error["type"]) == ("unknown_host", "host", "permission_error")
            for host in ("localhost", f"LOCALHOST:{port}", "127.0.0.1:1", "[::1]", f"[::1]:{port}"):
                assert httpx.get(url + path, headers={"Host": host}).status_code == 200, (path, host)


def test_with_keys_any_name_will_do() -> None:
    with process(HASTEN_API_KEY="one") as (_, url):
        headers = {"Host": "my.example", "Authorization": "Bearer one"}
        assert httpx.get(url + "/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("host", "address", "names"),
    [
        ("0.0.0.0", "0.0.0.0", set()),
        ("::", "::", set()),
        ("10.0.0.1", "10.0.0.1", set()),
        ("Box.local", "127.0.1.1", {"localhost", "127.0.0.1", "::1", "box.local", "127.0.1.1"}),
        ("::1", "::1", {"localhost", "127.0.0.1", "::1"}),
    ],
)
def test_names_of_an_address(host: str, address: str, names: set[str]) -> None:
    assert local_names(host, address) == names


def test_names_in_host_headers() -> None:
    given = ("A.b:80", "a.b", "[::1]", "[::1]:8000", "", "[::1", ":80")
    assert [host_name(value) for value in given] == ["a.b", "a.b", "::1", "::1", "", "", ""]


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nBad Header\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n",
    ],
)
def test_what_is_no_http_is_told_so(llm: LLM, sent: bytes) -> None:
    with serve(llm) as server, socket.create_connection(server.address, 10) as connection:
        connection.sendall(sent)
        head, _, body = b"".join(iter(lambda: connection.recv(4096), b"")).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert b"content-type: application/json" in head.lower()
        error = json.loads(body)["error"]
        assert (error["type"], error["message"]) == ("invalid_request_error", "Invalid HTTP request received.")
        assert server.get("/health").status_code == 200
