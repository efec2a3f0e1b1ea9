"""The guard of the page: nobody without the token or a session, no other site, no other host name; strict headers."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from dist_train.web.access import Access
from dist_train.web.app import make_app
from dist_train.web.guard import HEADERS
from support.page import HOST, OF_TABLE, SAME_ORIGIN, client_of, write_run

TABLE, COLUMNS = OF_TABLE
PAGES = ["/", "/rows", "/compare", "/machines", "/bin", "/jobs/run", "/jobs/run/live", "/jobs/run/files/config.yaml",
         "/jobs/run/outputs.zip", "/jobs/run/points", "/jobs/nothing"]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_run(tmp_path / "runs", "run")
    return tmp_path / "runs"


@pytest.mark.parametrize("page", PAGES)
def test_no_page_without_session(page: str, folder: Path, tmp_path: Path) -> None:
    client, access = client_of(folder, tmp_path, logged_in=False)
    for cookies in ({}, {access.cookie: "guessed"}, {access.cookie: ""}):
        client.cookies = cookies
        answer = client.get(page)
        assert answer.status_code == 403
        assert "Log in" in answer.text
        assert (
            "run" not in answer.text.replace("prints", "").split("<main", 1)[1].split("</main>")[0].split("/login")[0]
        )


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "[::2]:8080", ""])
def test_another_host_name_is_refused_even_with_session(host: str, folder: Path, tmp_path: Path) -> None:
    client, _ = client_of(folder, tmp_path)
    assert client.get("/", headers={"host": host}).status_code == 403


@pytest.mark.parametrize(
    "host", ["127.0.0.1:1", "localhost", "localhost:8080", "[::1]:8080", "LOCALHOST:80", "gateway.example:443"]
)
def test_local_and_allowed_host_names_are_answered(host: str, folder: Path, tmp_path: Path) -> None:
    client, _ = client_of(folder, tmp_path, hosts=frozenset({"Gateway.example:443"}))
    assert client.get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({"sec-fetch-site": "same-origin"}, True),
        ({"sec-fetch-site": "none"}, True),
        ({"sec-fetch-site": "cross-site"}, False),
        ({"sec-fetch-site": "same-site"}, False),
        ({"sec-fetch-site": "cross-site", "origin": HOST}, False),
        ({"origin": HOST}, True),
        ({"origin": "http://127.0.0.1:9999"}, False),
        ({"origin": "null"}, False),
        ({"origin": "https://evil.example"}, False),
        ({"origin": "http://[evil"}, False),
        ({}, False),
    ],
)
def test_changes_need_same_origin(headers: dict[str, str], allowed: bool, folder: Path, tmp_path: Path) -> None:
    client, _ = client_of(folder, tmp_path)
    answer = client.post("/jobs/run/delete", headers=headers)
    assert (answer.status_code == 303) is allowed
    assert (folder / "run").exists() is not allowed


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE", "OPTIONS", "QUERY", "POST"])
def test_origin_counts_for_each_method_but_get(method: str, folder: Path, tmp_path: Path) -> None:
    client, _ = client_of(folder, tmp_path)
    assert client.request(method, "/jobs/run/predict").status_code == 403


def test_scripts_pass_with_token_in_header(folder: Path, tmp_path: Path) -> None:
    client, access = client_of(folder, tmp_path, logged_in=False)
    for kind in ("token", "Bearer"):
        headers = {"authorization": f"{kind} {access.token}", "accept": "application/json"}
        assert [row["run"] for row in client.get("/rows", headers=headers).json()] == ["run"]
    assert client.get("/rows", headers={"authorization": "token guessed"}).status_code == 403
    assert client.post("/jobs/run/delete", headers=headers).status_code == 303
    assert not (folder / "run").exists()


def test_token_in_address_opens_session_without_redirect(folder: Path, tmp_path: Path) -> None:
    client, access = client_of(folder, tmp_path, logged_in=False)
    assert client.get("/", params={"token": "guessed"}).status_code == 403
    answer = client.get("/", params={"token": access.token}, headers={"sec-fetch-site": "cross-site"})
    assert answer.status_code == 200
    assert 'http-equiv="refresh"' in answer.text
    assert access.token not in answer.text
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()
    assert "path" not in cookie.lower()  # the browser takes that of the page, whatever prefix a proxy adds
    assert client.get("/").status_code == 200


def test_login_form_opens_session(folder: Path, tmp_path: Path) -> None:
    client, access = client_of(folder, tmp_path, logged_in=False)
    assert client.post("/login", data={"token": "guessed"}, headers=SAME_ORIGIN).status_code == 403
    assert client.post("/login", data={"token": access.token}).status_code == 403  # from another site
    assert client.post("/login", data={"token": access.token}, headers=SAME_ORIGIN).status_code == 200
    assert client.get("/").status_code == 200


def test_session_survives_restart_ends_after_12_hours_can_be_revoked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, access = client_of(folder, tmp_path)
    restarted = TestClient(make_app(folder, Access(tmp_path / "web.json")), base_url=HOST, cookies=client.cookies)
    assert restarted.get("/").status_code == 200
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 12 * 3600 - 60)
    assert restarted.get("/").status_code == 200
    monkeypatch.setattr(time, "time", lambda: now + 12 * 3600 + 60)
    assert restarted.get("/").status_code == 403
    monkeypatch.setattr(time, "time", lambda: now)
    old = access.token
    Access(tmp_path / "web.json").revoke()  # as `dist-train web --logout` does, in another process
    assert restarted.get("/").status_code == 403
    assert restarted.get("/rows", headers={"authorization": f"token {old}"}).status_code == 403


def test_state_file_holds_no_session_and_is_private(tmp_path: Path) -> None:
    access = Access(tmp_path / "deep" / "web.json")
    session = access.open_session()
    assert stat.S_IMODE((tmp_path / "deep" / "web.json").stat().st_mode) == 0o600
    assert session not in (tmp_path / "deep" / "web.json").read_text()
    assert access.is_session(session)


STATE = '{"name": %s, "token": %s, "sessions": %s}'


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"token": 5}',
        '{"name": "a", "sessions": {}}',
        "\x00" * 40,
        STATE % ("5", '"a"', "{}"),
        STATE % ('"a;b"', f'"{"t" * 43}"', "{}"),
        STATE % ('"a"', '""', "{}"),
        STATE % ('"a"', f'"{"t" * 43}"', '{"x": "y"}'),
    ],
)
def test_damaged_state_file_is_replaced(content: str, tmp_path: Path) -> None:
    (tmp_path / "web.json").write_text(content)
    access = Access(tmp_path / "web.json")
    assert len(access.token) > 40
    assert json.loads((tmp_path / "web.json").read_text())["token"] == access.token


@pytest.mark.parametrize("page", [*PAGES, "/static/page.js", "/login"])
def test_each_answer_has_headers(page: str, folder: Path, tmp_path: Path) -> None:
    client, _ = client_of(folder, tmp_path)
    headers = client.get(page).headers
    assert {name: headers[name] for name in HEADERS} == HEADERS
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["cache-control"] == "no-store"


def test_reading_changes_nothing(folder: Path, tmp_path: Path) -> None:
    client, _ = client_of(folder, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for page in PAGES:
        client.get(page)
        client.head(page)
    for action in ("stop", "save", "resume", "delete"):
        assert client.get(f"/jobs/run/{action}").status_code in (404, 405)
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert after == before


PARTS = st.one_of(
    st.text(max_size=30),
    st.sampled_from([
        "..", "../../secret", "../secret", "/etc/passwd", "....//secret", "run\0", "run/../../secret", "-1", "9" * 40,
        "config.yaml", "run", "<script>alert(1)</script>", "'\"><script>alert(1)</script>",
    ]),
)  # fmt: skip
SHAPES = [
    "/{}", "/jobs/{}", "/jobs/{}/live", "/jobs/{}/settings", "/jobs/run/{}", "/jobs/run/files/{}",
    "/jobs/run/files/logs/{}", "/jobs/run/pictures/{}.png", "/static/{}", "/jobs/run/checkpoints/{}.safetensors",
    "/jobs/run/live?since={}", "/jobs/run/log?name={}", "/jobs/run/log?name=x&offset={}",
    "/jobs/run/points?from={}&cut={}", "/jobs/run/outputs.zip?checkpoints={}", "/rows?since={}", "/?q={}&page={}",
    "/?sort={}&state={}", "/?done={}", "/?token={}", "/compare?run={}&sort={}", "/compare.{}",
    "POST /{}", "POST /jobs/{}/stop", "POST /jobs/{}/delete", "POST /jobs/run/{}", "POST /act/{}", "POST /bin/{}",
    "POST /login?{}",
]  # fmt: skip
FIELDS = ("run", "entry", "token")  # of forms


@pytest.mark.parametrize("shape", SHAPES)
def test_any_request_is_answered_and_reaches_no_other_file(
    shape: str, folder: Path, tmp_path: Path, count: Callable[..., int], row: Callable[..., None]
) -> None:
    """No 500 for any parameter, and no file from outside the run; also percent-encoded twice."""
    (tmp_path / "secret").write_text("CONTENT OF A FILE")
    client, access = client_of(folder, tmp_path)
    method, _, address = shape.rpartition(" ")
    examples = count(2000, 8)

    @settings(max_examples=examples)
    @given(
        parts=st.lists(PARTS, min_size=2, max_size=2), encode=st.sampled_from([quote, lambda text: quote(quote(text))])
    )
    def ask(parts: list[str], encode: Callable[[str], str]) -> None:
        client.cookies.set(access.cookie, access.open_session())  # a form may have opened another
        if not (folder / "run").exists():  # deleted by the last example
            write_run(folder, "run")
        path = address.format(*map(encode, parts))
        form = dict.fromkeys(FIELDS, parts[0]) if method else None
        answer = client.request(method or "GET", path, data=form, headers=SAME_ORIGIN)
        assert answer.status_code < 500, path
        assert "CONTENT OF A FILE" not in answer.text
        assert "root:x:" not in answer.text
        assert "<script>alert" not in answer.text
        assert (tmp_path / "secret").exists()

    ask()
    row(f"any text in `{shape}`", examples, "no 500, no other file, no script")
