"""Clients of older services find their shapes, and the same manners."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest
from fakes import picture
from PIL import Image
from servants import Servant, service, setup

from replan.rules import load_rules, matrix, phase_rules
from replan.serve import wire
from replan.serve.adapters import rows
from replan.serve.limits import Problem

ANSWER = (
    "<think>left</think><gen_image>keep the rest</gen_image>"
    '<region>[{"bbox_2d": [4, 4, 12, 16], "hint": "a red cup"}]</region>'
)


@pytest.fixture(scope="module")
def servant() -> Servant:
    return Servant()


@pytest.fixture(scope="module")
def url(servant: Servant) -> Iterator[str]:
    with service(servant) as address:
        yield address


def generation(**changes: object) -> dict:
    return {"image_base64": wire.encode(picture()), "instruction": "make it red", "response": ANSWER} | changes


def shown(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_the_first_edit_server(url: str, servant: Servant):
    reply = httpx.post(url + "/v1/images/generations", json=generation())
    assert reply.status_code == 200
    assert list(reply.json()) == ["data"]
    assert shown(reply.json()["data"][0]["final_image_base64"]).size == (32, 24)
    _, plan, config = servant.now
    assert [(region.box.as_tuple(), region.hint) for region in plan.regions] == [((4, 4, 12, 16), "a red cup")]
    assert (plan.prompt, config.mask.expand, config.mask.mutual, config.mask.rules) == ("keep the rest", 0.15, True, ())


def test_its_switches(url: str, servant: Servant):
    fields = {
        "expand_value": 3, "expand_mode": "pixels", "bboxes_attend_to_each_other": False, "delete_main_prompt": True,
        "replace_global_prompt": True, "custom_global_prompt_text": "as before", "seed": 5,
        "attention_rules": {"Hint 1, BBox 1": True, "Background, Background": True},
    }  # fmt: skip
    assert httpx.post(url + "/v1/images/generations", json=generation(**fields)).status_code == 200
    request, plan, config = servant.now
    assert plan.regions[0].box.as_tuple() == (1, 1, 15, 19)
    assert (plan.prompt, request.seed) == ("as before", 5)
    assert (config.mask.expand, config.mask.mutual, config.mask.hide_main) == (0.0, False, True)
    assert config.mask.rules[0].rows == ("hint 1: +region 1", "background: +background")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"response": "I cannot do that"}, "response"),
        ({"image_base64": "AAAA"}, "image_base64"),
        ({"attention_rules": {"Hat 1, BBox 1": True}}, "attention_rules"),
        ({"attention_rules": {"Hint 1": True}}, "attention_rules"),
        ({"attention_rules": {"Hint " + "9" * 5000 + ", BBox 1": True}}, "attention_rules"),
        ({"expand_mode": "percent"}, "expand_mode"),
        ({"expand_value": math.inf}, "expand_value"),
    ],
)
def test_its_mistakes(url: str, changes: dict, field: str):
    body = json.dumps(generation(**changes))  # Infinity included, which is no JSON but often sent
    reply = httpx.post(url + "/v1/images/generations", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 422
    assert reply.json()["error"]["field"] == field


def test_old_rules_mean_what_they_meant(tmp_path):
    """Absent = not read; a later false takes nothing away; split and joined names may be mixed."""
    old = {"Main Prompt, Main Prompt": True, "BBox 1, Hint 1": True, "Noise BBox 1, Image Background": True,
           "Image BBox 1, Hint 1": False, "Hint 1, Image BBox 1": True}  # fmt: skip
    file = tmp_path / "rules.yaml"
    file.write_text("\n".join(rows(old)))
    (phase,) = load_rules(file)
    from replan.backbones import default_config

    names, table = matrix(phase_rules(phase, 1, default_config("mini").mask), vision=False)
    read = {(names[q], names[k]) for q, row in enumerate(table) for k, allowed in enumerate(row) if allowed}
    assert read - {(name, name) for name in names} == {
        ("noise region 1", "hint 1"), ("ref region 1", "hint 1"), ("noise region 1", "ref background"),
        ("hint 1", "ref region 1"),
    }  # fmt: skip
    with pytest.raises(Problem, match="Nose BBox 1"):
        rows({"Nose BBox 1, Hint 1": True})


def test_the_neighbours_json(url: str, servant: Servant):
    call = {"image": wire.encode(picture()), "prompt": "make it red", "seed": 11, "num_inference_steps": 4,
            "guidance_scale": 2.5, "enhance_prompt": True}  # fmt: skip
    reply = httpx.post(url + "/edit", json=call)
    assert reply.status_code == 200
    answer = reply.json()
    assert set(answer) == {
        "success", "task_id", "edited_image", "seed", "original_prompt", "enhanced_prompt", "gpu_id",
        "processing_time", "error",
    }  # fmt: skip
    assert (answer["success"], answer["seed"], answer["original_prompt"]) == (True, 11, "make it red")
    assert "original_image" not in answer
    assert shown(answer["edited_image"]).size == (32, 24)
    request, _, config = servant.now
    assert (request.seed, config.steps, config.guidance) == (11, 4, 2.5)


@pytest.mark.parametrize(
    ("model", "fields", "steps", "guidance"),
    [
        ("flux-kontext-dev", {"num_inference_step": 8, "guidance_scale": 2.5, "seed": 0}, 8, 2.5),
        ("qwen-image-edit", {"num_inference_step": 9, "guidance_scale": 5.0}, 9, 5.0),
        (
            "omnigen2-edit",
            {"num_inference_step": 7, "text_guidance_scale": 5.0, "image_guidance_scale": 1.5, "negative_prompt": "",
             "seed": 0},
            7, 5.0,
        ),
        (
            "longcat-image-edit",
            {"num_inference_step": 6, "guidance_scale": 4.5, "negative_prompt": "", "num_images_per_prompt": 1,
             "seed": 0},
            6, 4.5,
        ),
    ],
)  # fmt: skip
def test_what_the_neighbours_clients_really_send(
    url: str, servant: Servant, model: str, fields: dict, steps: int, guidance: float
):
    """Their client writes one name differently from their services, and always a size."""
    del model
    given = {"prompt": "make it red", "width": 1024, "height": 1024, "enhance_prompt": False} | fields
    content = base64.b64decode(wire.encode(picture()))
    for way in ("/edit", "/edit-upload"):
        if way == "/edit":
            reply = httpx.post(url + way, json=given | {"image": wire.encode(picture())})
        else:
            form = {name: str(value) for name, value in given.items()}
            reply = httpx.post(url + way, data=form, files={"image_file": ("x.png", content)})
        assert reply.status_code == 200, reply.text
        assert shown(reply.json()["edited_image"]).size == (32, 24)
        _, _, config = servant.now
        assert (config.steps, config.guidance, config.negative_prompt) == (steps, guidance, "")


def test_more_than_one_picture_and_unknown_fields_are_refused_alike(url: str):
    content = base64.b64decode(wire.encode(picture()))
    for name, value in (("num_images_per_prompt", 2), ("hat", 1)):
        plain = httpx.post(url + "/edit", json={"image": wire.encode(picture()), "prompt": "x", name: value})
        form = httpx.post(url + "/edit-upload", data={"prompt": "x", name: value}, files={"image_file": content})
        for reply in (plain, form):
            assert (reply.status_code, reply.json()["error"]["field"]) == (422, name)
            assert name == "hat" or "one picture per call" in reply.json()["detail"]


def test_without_a_planner_they_edit_by_the_bare_prompt():
    """As the services do whose shape it is; their clients know no plans."""
    servant = Servant()
    with service(servant, made=replace(setup(), planner=None)) as url:
        reply = httpx.post(url + "/edit", json={"image": wire.encode(picture()), "prompt": "make it red"})
        assert reply.status_code == 200, reply.text
        assert reply.json()["enhanced_prompt"] == "make it red"
        content = base64.b64decode(wire.encode(picture()))
        form = httpx.post(url + "/edit-upload", data={"prompt": "x"}, files={"image_file": content})
        assert form.status_code == 200, form.text


def test_a_seed_that_is_drawn_is_named_and_repeats(url: str):
    call = {"image": wire.encode(picture()), "prompt": "make it red"}
    first, second = (httpx.post(url + "/edit", json=call).json() for _ in range(2))
    assert first["seed"] != second["seed"]
    again = httpx.post(url + "/edit", json=call | {"seed": first["seed"]}).json()
    assert again["edited_image"] == first["edited_image"] != second["edited_image"]


def test_the_neighbours_upload(url: str):
    content = base64.b64decode(wire.encode(picture()))
    fields = {"prompt": "make it red", "seed": "11"}
    reply = httpx.post(url + "/edit-upload", data=fields, files={"image_file": ("../../x.png", content)})
    assert reply.status_code == 200
    same = httpx.post(url + "/edit", json={"image": wire.encode(picture()), "prompt": "make it red", "seed": 11})
    assert reply.json()["edited_image"] == same.json()["edited_image"]
    missing = httpx.post(url + "/edit-upload", data={"prompt": "x"})
    assert (missing.status_code, missing.json()["error"]["field"]) == (422, "image_file")
    empty = httpx.post(url + "/edit-upload", data={"prompt": "x"}, files={"image_file": ("x.png", b"")})
    assert (empty.status_code, empty.json()["error"]["field"]) == (422, "image_file")


def test_failures_have_the_detail_that_those_clients_read(url: str):
    reply = httpx.post(url + "/edit", json={"image": wire.encode(picture())})
    assert reply.status_code == 422
    assert "prompt" in reply.json()["detail"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"num_inference_steps": 900}, "num_inference_steps"),
        ({"num_inference_step": 900}, "num_inference_step"),
        ({"prompt": " "}, "prompt"),
        ({"image": "AAAA"}, "image"),
    ],
)
def test_mistakes_are_told_in_the_callers_words(url: str, changes: dict, field: str):
    call = {"image": wire.encode(picture()), "prompt": "make it red"} | changes
    reply = httpx.post(url + "/edit", json=call)
    assert (reply.status_code, reply.json()["error"]["field"]) == (422, field)


def test_an_upload_that_is_no_picture(url: str):
    reply = httpx.post(url + "/edit-upload", data={"prompt": "x"}, files={"image_file": ("x.png", b"hello")})
    assert (reply.status_code, reply.json()["error"]["field"]) == (422, "image_file")


def test_health_and_status(url: str):
    health, status = httpx.get(url + "/health").json(), httpx.get(url + "/status").json()
    assert (health["status"], health["gpu_manager_ready"]) == ("ready", True)
    assert health["timestamp"] > 0
    assert status == {
        "active_workers": 1, "task_queue_size": 0, "result_queue_size": 0, "pending_tasks": 0, "total_gpus": 0,
        "system_ready": True,
    }  # fmt: skip
