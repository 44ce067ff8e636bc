"""Nothing that a user types or uploads becomes a path, markup or script, and nobody reads what is another's."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from visitors import Demo, Visitor, wait_until

from replan.demo.boxes import read_canvas
from replan.demo.notice import notice
from replan.demo.settings import safe_name
from replan.demo.uploads import read_picture
from replan.errors import ImageError, PlanError
from replan.types import Size

Visit = Callable[..., Visitor]
SCRIPT = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>${alert(1)}{{7*7}}`"
NAME = "..%2f<img src=x onerror=document.title='owned'>.png"


def test_markup_in_hints_names_and_instructions_stays_text(visit: Visit, demo: Demo, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "green").save(tmp_path / NAME.replace("/", ""))
    one = visit()
    page = one.page
    page.set_input_files("#left input[type=file]", str(tmp_path / NAME))
    page.wait_for_selector(".bx[data-empty=false]")
    page.fill("#instruction textarea", SCRIPT)
    page.fill("#prompt textarea", SCRIPT)
    one.drag((8, 8), (40, 40))
    page.keyboard.insert_text(SCRIPT)
    page.keyboard.press("Enter")
    page.click("#edit")
    one.done()
    page.click("#plan")  # the fake planner repeats the instruction as its hint
    one.notice("1 region")
    for tab in ("History", "Plan file", "Attention"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(150)
    page.fill("#instruction textarea", "nonsense " + SCRIPT)
    page.click("#plan")
    one.notice("other words")
    assert page.title() == "RePlan"
    assert page.locator("#desk script, #desk img[src=x]").count() == 0
    assert demo.backbone.plans[-1].regions[0].hint == SCRIPT  # type: ignore[union-attr]
    assert [hint for hint, _ in one.regions()] == [SCRIPT]


def test_what_is_no_picture_is_refused_in_place(visit: Visit, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("this is no picture")
    (tmp_path / "page.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>")
    Image.new("1", (12_001, 20)).save(tmp_path / "long.png")
    one = visit().pick()
    before = one.page.locator(".bx-image").get_attribute("href")
    for name, told in (("text.png", "not a picture"), ("page.svg", "not a picture"), ("long.png", "at most 12000")):
        one.page.set_input_files("#left input[type=file]", str(tmp_path / name))
        text = one.notice(told)
        assert "Choose another file" in text
        assert "/" not in text.replace("12001x20", "")
    one.shot("no_picture")
    assert one.page.locator(".bx-image").get_attribute("href") == before


def test_uploads_leave_no_file_and_routes_give_none(visit: Visit, demo: Demo, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "green").save(tmp_path / "mine.png")
    one = visit()
    urls: list[str] = []
    one.page.on("response", lambda response: urls.append(response.url))
    one.page.set_input_files("#left input[type=file]", str(tmp_path / "mine.png"))
    one.page.wait_for_selector(".bx[data-empty=false]")
    one.drag((8, 8), (40, 40))
    one.page.keyboard.type("a star")
    one.page.keyboard.press("Enter")
    one.page.click("#edit")
    one.done()
    left = [path for path in Path(demo.folder).rglob("*") if path.is_file() and path.stat().st_size]
    assert left == []  # neither upload nor result
    assert os.stat(demo.folder).st_mode & 0o077 == 0
    assert not [url for url in urls if "/file=" in url]  # no picture was ever fetched by a path

    for path in (
        "/etc/passwd",
        str(tmp_path / "mine.png"),
        "pyproject.toml",
        f"{demo.folder}/../../etc/passwd",
        "replan/plan.py",
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{demo.url}gradio_api/file={path}", timeout=10)
        assert refused.value.code in (403, 404)


def test_no_upload_can_be_fetched_by_its_path(demo: Demo) -> None:
    """Not even by someone who knows the bytes, and with them the folder that Gradio names after their hash."""
    form = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nsecret\r\n--b--\r\n'
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    with urllib.request.urlopen(urllib.request.Request(f"{demo.url}gradio_api/upload", form, kind), timeout=10) as sent:
        (path,) = json.load(sent)
    assert Path(path).read_text() == "secret"  # it waits for a handler; what nobody claims is swept later
    try:
        for route in ("gradio_api/file=", "gradio_api/file/", "file=", "gradio_api/%66ile="):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"{demo.url}{route}{path}", timeout=10)
            assert refused.value.code == 404, route
    finally:
        Path(path).unlink()


def test_a_file_that_is_too_large_is_refused_in_place(visit: Visit, tmp_path: Path) -> None:
    from replan.demo.uploads import MOST_BYTES

    (tmp_path / "large.png").write_bytes(bytes(MOST_BYTES + 500_000))
    one = visit().pick()
    one.page.set_input_files("#left input[type=file]", str(tmp_path / "large.png"))
    assert "25.5 MB: at most 25 MB. Make it smaller" in one.notice("MB")
    assert one.page.get_by_test_id("toast-body").count() == 0


def test_a_session_goes_after_its_page(visit: Visit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gc

    from replan.demo.session import Session

    def kept() -> int:
        gc.collect()
        return sum(type(one) is Session and one.name == "mine-alone.png" for one in gc.get_objects())

    monkeypatch.setenv("GRADIO_IS_E2E_TEST", "1")  # one second instead of an hour after the page has gone
    Image.new("RGB", (64, 64), "green").save(tmp_path / "mine-alone.png")
    one = visit()
    one.page.set_input_files("#left input[type=file]", str(tmp_path / "mine-alone.png"))
    one.page.wait_for_selector(".bx[data-empty=false]")
    one.page.wait_for_timeout(2500)
    assert kept() == 1  # as long as the page is open
    one.page.context.close()
    wait_until(lambda: kept() == 0, 30)


def test_no_handler_is_an_open_endpoint(demo: Demo) -> None:
    with urllib.request.urlopen(f"{demo.url}gradio_api/info", timeout=10) as answer:
        info = json.load(answer)
    assert info["named_endpoints"] == {}
    assert info["unnamed_endpoints"] == {}


def test_it_listens_on_loopback_only(demo: Demo) -> None:
    assert demo.url.startswith("http://127.0.0.1:")
    port = int(demo.url.rstrip("/").rpartition(":")[2])
    listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    hosts = {row[1].split(":")[0] for row in listening if row[3] == "0A" and int(row[1].split(":")[1], 16) == port}
    assert hosts == {"0100007F"}


def test_a_taken_port_is_a_users_mistake() -> None:
    import socket

    from replan.demo.serve import Place, running
    from replan.demo.studio import Studio
    from replan.errors import ConfigError

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} .*--port"), running(Studio({}, {}, {}), Place(port=port)):
            pass
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1"), running(Studio({}, {}, {}), Place("192.0.2.1", 0)):
        pass


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("../../etc/passwd", "passwd.png"), ("a b<script>.jpg", "a-b-script.png"), ("..\\..\\x.png", "x.png"),
        ("", "picture.png"), ("…", "picture.png"), ("-rf.png", "rf.png"), ("$(id).png", "id.png"),
        ("n" * 300 + ".png", "n" * 40 + ".png"),
    ],
)  # fmt: skip
def test_file_names_are_reduced(name: str, safe: str) -> None:
    assert safe_name(name) == safe


@pytest.mark.parametrize(
    "value",
    [
        None, [], {"regions": "x"}, {"regions": [1]}, {"regions": [{"id": 1, "box": [0, 0, 4, 4], "hint": 5}]},
        {"regions": [{"id": 1, "box": ["<b>", 0, 4, 4], "hint": "a"}]},
        {"regions": [{"id": 1, "box": [0, 0, 4, 4], "hint": "a" * 501}]},
        {"regions": [{"id": 0, "box": [0, 0, 4, 4], "hint": "a"}]},
        {"regions": [{"id": 1, "box": [0, 0, 4, 4], "hint": "a"}] * 2},
        {"regions": [{"id": n, "box": [0, 0, 4, 4], "hint": "a"} for n in range(1, 21)]},
        {"regions": [{"id": 1, "box": [0, 0, float("nan"), 4], "hint": "a"}]},
    ],
)  # fmt: skip
def test_a_forged_canvas_is_refused(value: object) -> None:
    with pytest.raises(PlanError):
        read_canvas(value, Size(96, 96))


def test_a_notice_is_text() -> None:
    assert "<script>" not in notice(SCRIPT, "error")


def test_an_upload_is_removed_even_when_it_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "upload"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"^This file: not a picture"):
        read_picture(str(folder / "a.png"))
    assert not folder.exists()
