"""The pages of models, data loaders and data sets without a browser: for scripts, and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from dist_train.config.loading import parse_config, to_yaml
from dist_train.user_code.library import Kind, Version, add_empty, add_zip, entries, library_root
from support.page import SAME_ORIGIN, client_of
from support.processes import ROOT
from support.tus import PATCH, VERSION

JSON = {**SAME_ORIGIN, "accept": "application/json"}
MODEL = (ROOT / "tests/bundles/mnist_bks/bks_model.py").read_text()


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIST_TRAIN_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    return client_of(tmp_path / "runs", tmp_path)[0]


def zipped(archive: Path, **files: str) -> Path:
    with zipfile.ZipFile(archive, "w") as file:
        for name, text in files.items():
            file.writestr(name, text)
    return archive


def uploaded(client: TestClient, content: bytes, length: int | None = None) -> str:
    """Upload, and return the id that the form names."""
    length = len(content) if length is None else length
    answer = client.post("/uploads", headers={**SAME_ORIGIN, **VERSION, "upload-length": str(length)})
    url: str = answer.headers["location"]
    client.patch(f"/{url}", content=content, headers={**SAME_ORIGIN, **PATCH, "upload-offset": "0"})
    return url.rpartition("/")[2]


def model(tmp_path: Path, name: str = "bks", source: str = MODEL) -> Version:
    return add_zip(Kind.MODELS, name, zipped(tmp_path / "model.zip", **{"bks_model.py": source}))


def test_script_uploads_and_adds(client: TestClient, tmp_path: Path) -> None:
    archive = zipped(tmp_path / "m.zip", **{"bks_model.py": MODEL})
    form = {"name": "bks", "upload": uploaded(client, archive.read_bytes())}
    answer = client.post("/models", data=form, headers=JSON)  # it comes when all is done
    assert answer.status_code == 201
    [version] = entries(Kind.MODELS)[0].versions
    expected = {
        "name": "bks", "version": version.version, "path": str(version.path), "created": version.created,
        "bytes": len(MODEL), "files": 1, "digest": version.digest, "source": None, "weights": None,
        "check": "UserModel: loss, metrics", "problems": [], "jobs": [],
    }  # fmt: skip
    assert answer.json() == expected
    assert client.get("/models", headers=JSON).json() == [expected]
    assert list((library_root() / ".uploads").iterdir()) == []
    gone = client.post("/models", data=form, headers=JSON)
    assert (gone.status_code, gone.json()["error"]) == (
        404,
        "There is no such upload, or not any more. Begin it again.",
    )


def test_failure_is_one_line_and_keeps_the_upload(client: TestClient, tmp_path: Path) -> None:
    form = {"name": "bks", "upload": uploaded(client, b"no zip")}
    answer = client.post("/loaders", data=form, headers=JSON)
    assert answer.status_code == 409
    told = "The zip of bks is not a readable zip: it has no directory at its end. Pack it again, or give a folder."
    assert answer.json()["error"] == told
    assert f"bks was not added. {told}" in client.get("/loaders").text
    assert len(list((library_root() / ".uploads").iterdir())) == 2
    assert client.post("/loaders/bks/cancel", headers=SAME_ORIGIN).status_code == 303
    assert "was not added" not in client.get("/loaders").text


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ({"name": "-x", "path": "/etc"}, "'-x' is no name"),
        ({"name": "--weights", "path": "/etc"}, "'--weights' is no name"),
        ({"path": "/etc"}, "'' is no name"),
        ({"name": "x"}, "Choose a zip, or give the path"),
        ({"name": "x", "path": "etc"}, "Choose a zip, or give the path"),
        ({"name": "x", "path": "~nobody/x"}, "Choose a zip, or give the path"),
        ({"name": "x", "path": "/etc\0"}, "Choose a zip, or give the path"),
        ({"name": "x", "path": "/no/such/file"}, "/no/such/file is neither a zip nor a folder of this machine."),
        ({"name": "x", "path": "--help"}, "Choose a zip, or give the path"),
        ({"name": "x", "upload": "../../etc"}, "There is no such upload"),
        ({"name": "x", "empty": "1"}, "Choose a zip, or give the path"),
    ],
)
def test_wrong_form_is_refused_at_once(form: dict[str, str], told: str, client: TestClient) -> None:
    answer = client.post("/models", data=form, headers=JSON)
    assert answer.status_code in (404, 409)
    assert told in answer.json()["error"]


def test_unfinished_upload_is_not_added(client: TestClient) -> None:
    form = {"name": "x", "upload": uploaded(client, b"half", length=8)}
    answer = client.post("/datasets", data=form, headers=JSON)
    assert answer.json()["error"] == "The upload has 4 of 8 bytes only. Finish it first."


def test_folder_of_this_machine_and_empty_set_are_added(client: TestClient, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/1.png").touch()
    form = {"name": "images", "path": str(tmp_path / "images")}
    assert client.post("/datasets", data=form, headers=JSON).json()["source"] == str(tmp_path / "images")
    assert client.post("/datasets", data={"name": "none", "empty": "1"}, headers=JSON).json()["check"] == "empty"
    assert str(tmp_path / "images") in client.get("/datasets").text


def test_used_version_cannot_be_deleted(client: TestClient, tmp_path: Path) -> None:
    old, new = model(tmp_path), model(tmp_path, source=MODEL + "# edited\n")
    run = tmp_path / "runs/first"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(parse_config({"model": {"bundle": str(old.path)}})))
    assert [each["jobs"] for each in client.get("/models", headers=JSON).json()] == [[], ["first"]]
    for address in (f"/models/bks/{old.version}/delete", "/models/bks/delete"):
        answer = client.post(address, headers=JSON)
        assert (answer.status_code, "is used by first" in answer.json()["error"]) == (409, True)
        assert client.post(address).status_code == 403  # from another site
    answer = client.post(f"/models/bks/{new.version}/delete", headers=SAME_ORIGIN)
    assert (answer.status_code, answer.headers["location"]) == (303, "../../../models?done=remove")
    assert entries(Kind.MODELS)[0].versions == (old,)
    assert client.post("/models/none/delete", headers=JSON).status_code == 409


def test_poll_is_empty_until_something_changes(client: TestClient, tmp_path: Path) -> None:
    def since(text: str) -> str:
        return text.split("since=", 1)[1].split('"', 1)[0]

    seen = since(client.get("/datasets").text)
    assert client.get(f"/datasets?since={seen}").status_code == 204
    add_empty("mnist")  # in a shell
    answer = client.get(f"/datasets?since={seen}")
    assert "mnist" in answer.text
    assert "<html" not in answer.text
    assert client.get(f"/datasets?since={since(answer.text)}").status_code == 204


def test_download_holds_all_files(client: TestClient, tmp_path: Path) -> None:
    files = {"a/b.py": "x = 1", ".hidden": "y", "bks_model.py": MODEL}
    version = add_zip(Kind.MODELS, "net", zipped(tmp_path / "n.zip", **files))
    answer = client.get(f"/models/net/{version.version}.zip")
    (tmp_path / "out.zip").write_bytes(answer.content)
    with zipfile.ZipFile(tmp_path / "out.zip") as file:
        assert {name: file.read(name).decode() for name in file.namelist()} == files
    assert add_zip(Kind.MODELS, "net", tmp_path / "out.zip") == version
    for address in ("/models/net/1.zip", "/models/../net/1.zip", "/loaders/net/1.zip", "/models/%2e%2e/x.zip"):
        assert client.get(address).status_code == 404


def test_pages_need_login_and_change_nothing(tmp_path: Path, data: Path) -> None:
    client, access = client_of(tmp_path / "runs", tmp_path, logged_in=False)
    for kind in Kind:
        for method in ("GET", "POST"):
            assert client.request(method, f"/{kind}", headers=SAME_ORIGIN).status_code == 403
    client.cookies.set(access.cookie, access.open_session())
    for kind in Kind:
        assert client.get(f"/{kind}").status_code == 200
        assert client.post(f"/{kind}", headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert not data.exists()


def test_names_in_source_are_text(client: TestClient, tmp_path: Path) -> None:
    attack = "<script>alert(1)</script>"
    add_zip(Kind.DATASETS, "set", zipped(tmp_path / "s.zip", **{attack.replace("/", ""): ""}))
    text = client.get("/datasets").text
    assert "<script>alert" not in text
    assert "&lt;script&gt;" in text


# A bundle whose import writes a file is uploaded, looked at, downloaded and linked, in one process.
EVERYTHING = """
import json, sys
from pathlib import Path
from support.page import SAME_ORIGIN, client_of
from support.tus import PATCH, VERSION
folder, archive = map(Path, sys.argv[1:])
client, _ = client_of(folder / "runs", folder)
content = archive.read_bytes()
wanted = {**SAME_ORIGIN, "accept": "application/json"}
for kind in ("models", "loaders"):
    headers = {**SAME_ORIGIN, **VERSION, "upload-length": str(len(content))}
    url = client.post("/uploads", headers=headers).headers["location"]
    client.patch(f"/{url}", content=content, headers={**SAME_ORIGIN, **PATCH, "upload-offset": "0"})
    form = {"name": "bks", "upload": url.rpartition("/")[2]}
    added = client.post(f"/{kind}", data=form, headers=wanted)
    assert (added.status_code, added.json()["problems"]) == (201, []), added.text
    assert client.get(f"/{kind}").status_code == 200
    assert client.get(f"/{kind}/bks/{added.json()['version']}.zip").status_code == 200
assert client.post("/models", data={"name": "linked", "path": added.json()["path"]}, headers=wanted).status_code == 201
assert client.post("/models/bks/delete", headers=SAME_ORIGIN).status_code == 303
heavy = ("torch", "numpy", "accelerate", "bks_model", "bks_dataset", "helper", "dist_train.training")
print(json.dumps(sorted(name for name in sys.modules if name.startswith(heavy))))
"""


def test_user_code_is_never_run_and_torch_never_loaded(tmp_path: Path) -> None:
    hit = tmp_path / "hit"
    attack = f"import pathlib\npathlib.Path({str(hit)!r}).touch()\n"
    dataset = (ROOT / "tests/bundles/mnist_bks/bks_dataset.py").read_text()
    files = {"bks_model.py": f"import helper\n{attack}{MODEL}", "bks_dataset.py": f"import helper\n{attack}{dataset}",
             "helper.py": attack, "sitecustomize.py": attack, "conftest.py": attack, "__init__.py": attack}  # fmt: skip
    archive = zipped(tmp_path / "bks.zip", **files)
    done = subprocess.run(
        [sys.executable, "-c", EVERYTHING, str(tmp_path), str(archive)],
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
    assert not hit.exists()
    exec(compile(attack, "attack", "exec"), {})
    assert hit.exists()
