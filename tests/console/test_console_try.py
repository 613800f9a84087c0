"""The console's view "try it" in headless Chromium: forms, drawings, pictures, results, and the call elsewhere."""

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import model_zoo
import numpy as np
import openvino
import pytest
from browser import PHONE, open_page, screenshot
from digit_strokes import OPEN_FOUR, STROKES, WIDE_SEVEN, draw
from model_zoo import ELEMENT_TYPES
from openvino import Type, opset15
from service import ROOT, serve

from ovms_rest.demo.drawings import render
from ovms_rest.protocol.datatypes import DATATYPES as ROWS

DEMO = ROOT / "ovms_rest" / "demo"
NUMBER = DEMO / "samples" / "number-65902.png"
HOSTILE = '<img src=x onerror=alert(1)> "a" & b'
DATATYPES = [*ELEMENT_TYPES, "BYTES"]
DTYPES = {name: row.dtype for name, row in ROWS.items()}


def scaled():
    """Return a model of a colour image: image FP32 [1,3,16,16] -> picture = image, brightness FP32 [1,3]."""
    image = model_zoo.parameter("image", (1, 3, 16, 16), Type.f32)
    brightness = opset15.reduce_mean(image, opset15.constant(np.int64([2, 3])), keep_dims=False)
    return model_zoo.model_of({"picture": opset15.relu(image), "brightness": brightness}, [image])


def detecting():
    """Return a model of an image UINT8 [1,16,16,3] and its detections FP32 [1,1,-1,7], which it returns."""
    image = model_zoo.parameter("image", (1, 16, 16, 3), Type.u8)
    found = model_zoo.parameter("found", (1, 1, -1, 7), Type.f32)
    return openvino.Model([opset15.result(image), opset15.result(found)], [image, found], "model")


def labelled():
    """Return a model of an image FP32 [1,32,32,3] -> scores FP32 [1,3], the mean of each channel."""
    image = model_zoo.parameter("image", (1, 32, 32, 3), Type.f32)
    mean = opset15.reduce_mean(image, opset15.constant(np.int64([1, 2])), keep_dims=False)
    return model_zoo.model_of({"scores": mean}, [image])


def write_config(directory: Path) -> Path:
    """Write a config of the demo and of models of all kinds of inputs; return its path."""
    types = {**ELEMENT_TYPES, "BYTES": Type.string}
    models = {
        "every": model_zoo.passthrough(**{name.lower(): (types[name], (-1, 3)) for name in DATATYPES}),
        "scaled": scaled(),
        "detecting": detecting(),
        "labelled": labelled(),
        "product": model_zoo.product(),
        "wide": model_zoo.relu((-1, -1)),
        "hostile": model_zoo.add(),
        "softmax": model_zoo.model_of(
            {"shares": opset15.softmax(x := model_zoo.parameter("x", (2, 20), Type.f32), 1)}, [x]
        ),
    }
    for name, model in models.items():
        model_zoo.save(model, directory / name)
    model_zoo.save(model_zoo.add((1, 2)), directory / "hostile", version=2)
    (directory / "labelled" / "1" / "labels.txt").write_text('blue\ngreen & "red"\n<i>red</i>\n')
    keys = {"hostile": {"name": HOSTILE, "model_version_policy": {"all": {}}}, "labelled": {"layout": "NHWC"}}
    entries = [{"config": {"name": name, "base_path": name, **keys.get(name, {})}} for name in models]
    demo = json.loads((DEMO / "config.json").read_text())
    demo["model_config_list"][0]["config"]["base_path"] = str(DEMO / "digits")
    demo["custom_node_library_config_list"][0]["base_path"] = str(DEMO / "find_digits.py")
    for servable in (demo["model_config_list"][0]["config"], demo["pipeline_config_list"][0]):
        servable["example"] = str(DEMO / servable["example"])
    demo["model_config_list"] += entries
    (directory / "config.json").write_text(json.dumps(demo))
    return directory / "config.json"


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    directory = tmp_path_factory.mktemp("try")
    with serve(directory, "-w", "1", config=write_config(directory)) as service:
        yield service


@pytest.fixture
def show(browser, service):
    """Return a function that opens the view for a model, "" for the one that it chooses; it gives a context manager."""

    def show(model="", expected=(), **options):
        return open_page(browser, f"http://127.0.0.1:{service.port}/console#try/{model}", expected, **options)

    return show


def send(page):
    """Press the button; return the response once it is shown."""
    with page.expect_response("**/infer") as answered:
        page.click(".try-send")
    answered.value.finished()
    page.wait_for_selector(".try-calls pre")
    return answered.value


def headline(page, output):
    """Return the values of an output that are shown large, in one string."""
    return " ".join(page.locator(f'[data-output="{output}"] .try-headline b').all_inner_texts())


def read_outputs(response):
    """Decode a response whose outputs are binary, by a reader of its own."""
    body = response.body()
    end = int(response.headers["inference-header-content-length"])
    outputs, offset = {}, end
    for output in json.loads(body[:end])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        outputs[output["name"]] = (output["shape"], body[offset : offset + size])
        offset += size
    assert offset == len(body)
    return outputs


def split_strings(data):
    strings = []
    while data:
        end = 4 + int.from_bytes(data[:4], "little")
        strings.append(data[4:end].decode())
        data = data[end:]
    return strings


# --- The pad


def test_a_seven_drawn_one_click_after_the_start_is_read(browser, service):
    with open_page(browser, f"http://127.0.0.1:{service.port}/console") as page:
        page.click("text=Try it")
        page.wait_for_selector(".try-pad")
        draw(page, 7)
        page.wait_for_selector(".try-headline")
        assert headline(page, "digit") == "7"
        page.wait_for_function("document.querySelector('.try-times').textContent.includes('In the service')")
        assert "inference" in page.inner_text(".try-times")
        assert "ms for the round trip" in page.inner_text(".try-times")
        first = page.locator('[data-output="probabilities"] .try-bars tr').first
        assert first.locator("th").inner_text() == "7"
        assert page.locator(".try-status").inner_text() == "digit: 7"
        assert page.locator(".try-read").inner_text() == "7"
        screenshot(page, "try-seven")


def test_drawn_digits_are_read(show):
    with show("digits") as page:
        page.uncheck("text=send after each stroke")
        read = []
        for drawing in (*range(10), WIDE_SEVEN, OPEN_FOUR):
            draw(page, drawing)
            assert send(page).status == 200
            read.append(headline(page, "digit"))
            page.click("text=Clear")
        assert " ".join(read) == "0 1 2 3 4 5 6 7 8 9 7 4"


def test_the_pad_renders_like_the_drawings_that_the_demo_model_was_trained_on(show):
    drawings = [[np.array(stroke) for stroke in STROKES[digit]] for digit in range(10)]
    with show("digits") as page:
        levels = page.evaluate(
            """async (drawings) => {
                const { renderLevels } = await import("/console/pad.js");
                const toStrokes = (drawing) => drawing.map((stroke) => stroke.map(([x, y]) => ({ x, y })));
                const size = { height: 8, width: 8 };
                return drawings.map((drawing) => [...renderLevels(toStrokes(drawing), size, null)]);
            }""",
            [[stroke.tolist() for stroke in drawing] for drawing in drawings],
        )
    trained = np.stack([render(drawing).ravel() / 255 for drawing in drawings])
    np.testing.assert_allclose(levels, trained, atol=0.05)


def test_the_pad_is_used_and_cleared_by_keyboard(show):
    with show("digits") as page:
        page.focus(".try-pad")
        page.keyboard.press("Space")
        for _ in range(8):
            page.keyboard.press("ArrowDown")
        page.keyboard.press("Space")
        page.wait_for_selector(".try-headline")
        assert headline(page, "digit") == "1"
        page.keyboard.press("Delete")
        page.wait_for_function("!document.querySelector('.try-headline')")
        page.click(".try-send")
        assert page.inner_text(".try-input .try-error") == "nothing is drawn yet"


def test_an_undone_stroke_leaves_the_ones_before(show):
    with show("digits") as page:
        page.uncheck("text=send after each stroke")
        draw(page, 1)
        first = send(page).request.post_data_buffer
        draw(page, 0)
        page.click("text=Undo")
        assert send(page).request.post_data_buffer == first


def test_a_request_that_is_overtaken_by_clearing_leaves_no_trace(show):
    with show("digits") as page:
        page.route("**/infer", lambda route: None)  # never answered
        with page.expect_request("**/infer"):
            draw(page, 7)
        page.click("text=Clear")
        page.unroute("**/infer")
        draw(page, 1)
        page.wait_for_selector(".try-headline")
        assert page.inner_text(".try-status") == "digit: 1"
        page.click("text=Clear")
        assert page.locator(".try-failure").count() == 0
        assert page.inner_text(".try-status") == "Draw, and the answer comes here."


def test_a_pipeline_that_finds_nothing_says_so(show):
    with show("number") as page:
        page.click("text=Values")
        page.locator(".try-dim").nth(1).fill("20")
        page.locator(".try-dim").nth(2).fill("20")
        page.click("text=Zeros")
        page.click(".try-send")
        page.wait_for_selector(".try-failure")
        assert page.inner_text(".try-failure").startswith("204: the answer is empty")


def test_digits_drawn_side_by_side_are_found_by_the_pipeline(show):
    with show("number") as page:
        page.click("text=Draw")
        page.uncheck("text=send after each stroke")
        for digit, left in ((7, 0.02), (3, 0.35), (0, 0.68)):
            draw(page, digit, left, 0.3)
        send(page)
        assert headline(page, "digits") == "7 3 0"
        assert page.locator(".try-boxes text").all_text_contents() == list("730")
        assert page.inner_text(".try-status") == "digits: 7 3 0"
        assert page.inner_text(".try-read") == "7 3 0"
        screenshot(page, "try-drawn-number")


# --- Pictures


def test_the_digits_of_an_uploaded_picture_are_shown_with_their_boxes(show):
    with show("number") as page:
        page.set_input_files(".try-file", NUMBER)
        page.wait_for_selector("text=number-65902.png: 248 x 72 pixels, sent as the file")
        request = send(page).request
        assert request.post_data_buffer.endswith(NUMBER.read_bytes())
        assert headline(page, "digits") == "6 5 9 0 2"
        assert page.locator(".try-boxes text").all_text_contents() == list("65902")
        assert page.locator(".try-boxes").get_attribute("aria-label") == "5 boxes: 6, 5, 9, 0, 2"
        boxes = page.locator(".try-boxes rect").evaluate_all(
            "all => all.map((box) => ['x', 'y', 'width', 'height'].map((name) => Number(box.getAttribute(name))))"
        )
        assert boxes[:2] == [[12, 7, 33, 42], [59, 15, 34, 42]]
        screenshot(page, "try-number")
        page.select_option(".try-overlay ~ .try-row select", "xyxy")
        assert page.locator(".try-boxes rect").first.get_attribute("width") == "21"


@pytest.mark.parametrize("action", ["drop", "paste"])
def test_a_picture_is_dropped_or_pasted(show, action):
    give = """([action, base64]) => {
        const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], "given.png", {type: "image/png"}));
        const zone = document.querySelector(".try-zone");
        const options = {bubbles: true, cancelable: true};
        zone.dispatchEvent(action === "drop" ? new DragEvent("drop", {...options, dataTransfer: data})
            : new ClipboardEvent("paste", {...options, clipboardData: data}));
    }"""
    with show("number") as page:
        page.wait_for_selector(".try-picture")
        page.evaluate(give, [action, base64.b64encode(NUMBER.read_bytes()).decode()])
        page.wait_for_selector("text=given.png")
        send(page)
        assert headline(page, "digits") == "6 5 9 0 2"


def test_a_colour_picture_is_converted_for_a_grey_input(show, tmp_path):
    file = tmp_path / "dark on light.png"
    cv2.imwrite(str(file), cv2.cvtColor(255 - cv2.imread(str(NUMBER), 0), cv2.COLOR_GRAY2BGR))
    with show("number") as page:
        page.set_input_files(".try-file", file)
        page.click("text=How pixels become values >> visible=true")
        page.check("text=inverted >> visible=true")
        page.wait_for_selector("text=sent as FP32 [1,72,248,1]")
        send(page)
        assert headline(page, "digits") == "6 5 9 0 2"
        assert len(page.locator(".try-boxes rect").all()) == 5


def test_a_picture_is_resized_and_converted_for_an_input_that_takes_no_files(show, tmp_path):
    image = np.zeros((32, 32, 3), np.uint8)
    image[...] = (255, 0, 51)  # blue, green, red
    cv2.imwrite(str(tmp_path / "flat.png"), image)
    with show("scaled") as page:
        page.click("text=Picture")
        page.set_input_files(".try-file", tmp_path / "flat.png")
        page.click("text=How pixels become values >> visible=true")
        page.select_option('label:has-text("Range"):visible select', "1")
        page.select_option('label:has-text("Colours"):visible select', "BGR")
        shape, data = read_outputs(send(page))["brightness"]
        assert shape == [1, 3]
        assert np.frombuffer(data, np.float32) == pytest.approx([1, 0, 0.2], abs=0.005)
        canvas = page.locator('[data-output="picture"] canvas')
        pixel = canvas.evaluate("(canvas) => Array.from(canvas.getContext('2d').getImageData(3, 3, 1, 1).data)")
        assert pixel == pytest.approx([255, 0, 51, 255], abs=1)  # as the values lie: the first channel is red
        page.check("text=blue first (BGR)")
        pixel = canvas.evaluate("(canvas) => Array.from(canvas.getContext('2d').getImageData(3, 3, 1, 1).data)")
        assert pixel == pytest.approx([51, 0, 255, 255], abs=1)


def test_a_picture_of_another_size_is_sent_as_its_file_where_the_service_resizes(show, tmp_path):
    image = np.zeros((40, 60, 3), np.uint8)
    image[...] = (200, 90, 10)
    cv2.imwrite(str(tmp_path / "flat.jpg"), image)
    with show("labelled") as page:
        page.set_input_files(".try-file", tmp_path / "flat.jpg")
        page.wait_for_selector("text=flat.jpg: 60 x 40 pixels, sent as the file of")
        assert send(page).request.post_data_buffer.endswith((tmp_path / "flat.jpg").read_bytes())
        assert page.locator(".try-bars th").all_text_contents() == ["blue", 'green & "red"', "<i>red</i>"]


def test_a_photo_that_is_stored_turned_is_sent_upright(show, tmp_path):
    image = np.zeros((20, 64), np.uint8)
    image[:, :32] = 255
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"  # turn clockwise
    encoded = cv2.imencode(".jpg", image)[1].tobytes()
    marker = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big")
    (tmp_path / "photo.jpg").write_bytes(encoded[:2] + marker + exif + encoded[2:])
    with show("labelled") as page:
        page.set_input_files(".try-file", tmp_path / "photo.jpg")
        page.wait_for_selector("text=photo.jpg: 20 x 64 pixels, sent as the file of")
        sent = send(page).request.post_data_buffer
        upright = cv2.imdecode(np.frombuffer(sent[sent.index(b"\xff\xd8") :], np.uint8), cv2.IMREAD_UNCHANGED)
        assert upright.shape == (64, 20, 3)
        assert upright[:30].min() > 230
        assert upright[34:].max() < 25


def test_a_picture_is_taken_by_the_camera(show):
    camera = """() => {
        const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [64, 48];
        const context = canvas.getContext("2d");
        const paint = () => { context.fillStyle = "#fff"; context.fillRect(20, 10, 8, 30); };
        paint();
        setInterval(paint, 30);
        window.stream = canvas.captureStream(30);
        navigator.mediaDevices.getUserMedia = async () => window.stream;
    }"""
    with show("number") as page:
        page.evaluate(camera)
        page.click("text=Camera")
        page.wait_for_function("document.querySelector('.try-video').videoWidth === 64")
        page.click("text=Take the picture")
        page.wait_for_selector("text=camera.jpg: 64 x 48 pixels, sent as FP32 [1,48,64,1]")
        assert page.evaluate("window.stream.getTracks().every(({readyState}) => readyState === 'ended')")
        send(page)
        assert len(page.locator(".try-boxes rect").all()) == 1


def test_a_camera_that_cannot_be_used_is_explained(show):
    with show("number") as page:
        page.evaluate("Object.defineProperty(navigator, 'mediaDevices', {value: undefined})")
        page.click("text=Camera")
        assert "https:// and on localhost" in page.inner_text(".try-input .try-error")


# --- Values


def test_random_values_of_every_datatype_with_dynamic_dims_are_inferred(show):
    with show("every") as page:
        for name in DATATYPES:
            field = page.locator(f'[data-input="{name.lower()}"]')
            field.locator(".try-dim").first.fill("2")
            field.get_by_text("Random").click()
        texts = {name: page.locator(f'[data-input="{name.lower()}"] textarea').input_value() for name in DATATYPES}
        response = send(page)
        assert response.status == 200
        outputs = read_outputs(response)
        for name in DATATYPES:
            shape, data = outputs[name.lower()]
            assert shape == [2, 3]
            sent = np.array(json.loads(texts[name]))
            assert sent.shape == (2, 3)
            if name == "BYTES":
                assert split_strings(data) == sent.ravel().tolist()
            else:
                assert data == sent.astype(DTYPES[name]).tobytes(), name


def test_values_are_taken_flat_and_nested_and_keep_all_digits(show):
    texts = {
        "int64": "[[-9223372036854775808, 9223372036854775807, 1234567890123456789]]",
        "uint64": "[18446744073709551615, 0, 1]",
        "fp64": "[0.1, -2.5e-3, 1e300]",
        "fp16": "[0.1, 65504, 6e-8]",
        "bf16": "[0.1, -3, 1e38]",
        "bytes": '["caf\\u00e9", {"b64": "AP8="}, ""]',
        "bool": "[true, false, true]",
    }
    with show("every") as page:
        for name, text in texts.items():
            page.locator(f'[data-input="{name}"] textarea').fill(text)
        for name in DATATYPES:
            if name.lower() not in texts:
                page.locator(f'[data-input="{name.lower()}"] >> text=Zeros').click()
        outputs = read_outputs(send(page))
        for name, text in texts.items():
            if name != "bytes":
                expected = np.array(json.loads(text), DTYPES[name.upper()])
                assert outputs[name] == ([1, 3], expected.tobytes()), name
        assert outputs["bytes"][1] == b"\5\0\0\0caf\xc3\xa9\2\0\0\0\0\xff\0\0\0\0"
        assert page.locator('[data-output="int64"] .try-headline').inner_text().split() == [
            *("-9223372036854775808", "9223372036854775807", "1234567890123456789")
        ]


@pytest.mark.parametrize("batch", [3, 0])
def test_a_batch_of_images_is_taken_as_values(show, batch):
    with show("digits") as page:
        page.click("text=Values")
        page.locator(".try-dim").first.fill(str(batch))
        page.click("text=Zeros")
        assert send(page).status == 200
        assert page.inner_text('[data-output="probabilities"] header code') == f"FP32 [{batch},10]"
        assert page.locator(".try-error:visible").count() == 0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("uint8", "[1, 2", "invalid JSON"),
        ("uint8", "[1, 300, 2]", "element 1 is 300; expected a whole number from 0 to 255 for UINT8"),
        ("int32", "[1, 2.5, 2]", "element 1 is 2.5; expected a whole number"),
        ("int64", "[1, 2, 9223372036854775808]", "element 2 is 9223372036854775808; expected a whole number"),
        ("fp16", "[1, 70000, 2]", "element 1 is 70000; expected a number from -65504 to 65504 for FP16"),
        ("fp32", '[1, "a", 2]', 'element 1 is "a"; expected a number for FP32'),
        ("fp32", "[1, null, 2]", "element 1 is null; expected a number"),
        ("bool", "[1, 0, 1]", "element 0 is 1; expected true or false"),
        ("fp32", "[1, 2, 3, 4]", "the data has 4 elements, but the shape [1,3] needs 3"),
        ("fp32", "[[1, 2], [3, 4]]", "dimension 1 is 2, but the input takes 3"),
        ("fp32", "", "the values are missing"),
        ("bytes", '["a", {"b64": "?"}, "c"]', 'element 1: the value of "b64" is not base64'),
    ],
)
def test_wrong_values_are_explained_beside_their_field(every, name, text, message):
    field = every.locator(f'[data-input="{name}"]')
    before = field.locator("textarea").input_value()
    field.locator("textarea").fill(text)
    every.click(".try-send")
    error = field.locator(".try-error")
    error.wait_for()
    assert message in error.inner_text()
    assert field.locator("textarea").get_attribute("aria-invalid") == "true"
    assert every.locator(".try-error:visible").count() == 1
    assert every.evaluate("document.activeElement.closest('[data-input]').dataset.input") == name
    field.locator("textarea").fill(before)
    assert error.is_hidden()


@pytest.fixture(scope="module")
def every(browser, service):
    """A page that shows the model of every datatype and never sends a request."""
    with open_page(browser, f"http://127.0.0.1:{service.port}/console#try/every") as page:
        sent = []
        page.on("request", lambda request: sent.append(request.url))
        page.wait_for_selector(".try-send")
        yield page
        assert not [url for url in sent if url.endswith("/infer")]


def test_a_whole_request_is_taken_where_values_are_pasted(show):
    request = {
        "inputs": [
            {"name": "left", "datatype": "FP32", "shape": [2, 1], "data": [1, 2]},
            {"name": "right", "datatype": "FP32", "shape": [1, 2], "data": [[3, 4]]},
        ]
    }
    with show("product") as page:
        page.locator('[data-input="right"] textarea').fill(json.dumps(request))
        shape, data = read_outputs(send(page))["product"]
        assert shape == [2, 2]
        assert np.frombuffer(data, np.float32).tolist() == [3, 4, 6, 8]
        request["inputs"][0]["name"] = "up"
        page.locator('[data-input="right"] textarea').fill(json.dumps(request))
        error = page.inner_text('[data-input="right"] .try-error')
        assert error == "the request has an input 'up', but 'product' takes 'left', 'right'"


def test_an_error_of_the_service_is_shown_as_it_says(show):
    with show("product", ["400 (Bad Request)"]) as page:
        page.locator('[data-input="left"] textarea').fill("[[1, 2]]")
        page.locator('[data-input="right"] textarea').fill("[[1, 2]]")
        response = send(page)
        assert response.status == 400
        assert page.inner_text(".try-failure") == f"400: {response.json()['error']}"


def test_more_elements_than_the_page_makes_are_refused(show):
    with show("wide") as page:
        field = page.locator('[data-input="x"]')
        field.locator(".try-dim").first.wait_for()
        for dim in field.locator(".try-dim").all():
            dim.fill("4000")
        field.get_by_text("Random").click()
        expected = "[4000,4000] has 16,000,000 elements; this page makes up to 10,000,000"
        assert field.locator(".try-error").inner_text() == expected


def test_large_values_are_sent_and_a_long_output_is_cut(show):
    with show("wide") as page:
        field = page.locator('[data-input="x"]')
        field.locator(".try-dim").first.wait_for()
        for dim, size in zip(field.locator(".try-dim").all(), ["500", "200"], strict=True):
            dim.fill(size)
        field.get_by_text("Random").click()
        assert field.locator(".try-hint").inner_text() == "100,000 values, random"
        response = send(page)
        shape, data = read_outputs(response)["y"]
        assert shape == [500, 200]
        assert data == response.request.post_data_buffer[-400_000:]
        assert "of 100,000 values; from " in page.inner_text('[data-output="y"] .try-numbers')


def test_a_dimension_outside_its_range_is_refused(show):
    with show("wide") as page:
        page.locator(".try-dim").first.fill("-1")
        page.click("text=Zeros")
        expected = "dimension 0 is -1; expected a whole number from 0 up"
        assert page.inner_text(".try-input .try-error") == expected


def test_only_the_chosen_outputs_are_asked_for(show):
    with show("digits") as page:
        page.click("text=Values")
        page.uncheck("fieldset >> text=probabilities")
        assert list(read_outputs(send(page))) == ["digit"]
        page.uncheck("fieldset >> text=digit")
        page.click(".try-send")
        assert page.inner_text("fieldset .try-error") == "choose at least one output"


def test_a_request_in_progress_is_cancelled(show):
    with show("wide") as page:
        page.route("**/infer", lambda route: None)  # never answered
        page.click(".try-send")
        page.click("text=Cancel")
        page.wait_for_selector(".try-failure")
        assert page.inner_text(".try-failure") == "Cancelled."
        page.unroute("**/infer")
        assert send(page).status == 200
        assert page.locator(".try-failure").count() == 0


def test_a_service_that_does_not_answer_is_named(show, service):
    with show("wide", ["ERR_FAILED"]) as page:
        page.route("**/infer", lambda route: route.abort())
        page.click(".try-send")
        page.wait_for_selector(".try-failure")
        assert page.inner_text(".try-failure") == f"The service at http://127.0.0.1:{service.port} did not answer."


# --- Results


def test_scores_that_add_up_to_one_are_ranked(show):
    scores = np.zeros((2, 20))
    scores[0, 12], scores[1, 3] = 5, 4
    with show("softmax") as page:
        page.locator("textarea").fill(json.dumps(scores.tolist()))
        send(page)
        ranks = page.locator(".try-bars")
        assert [table.locator("th").first.inner_text() for table in ranks.all()] == ["12", "3"]
        share = np.exp(5) / (np.exp(5) + 19)
        assert ranks.first.locator(".try-score").first.inner_text() == f"{100 * share:.1f} %"
        assert ranks.first.locator("tr").count() == 5


def test_detections_are_drawn_from_a_score_up(show):
    rows = [[0, 1, 0.9, 0.25, 0.25, 0.5, 0.75], [0, 2, 0.1, 0, 0, 1, 1], [-1, 0, 0, 0, 0, 0, 0]]
    with show("detecting") as page:
        page.locator('[data-input="image"] [data-value="values"]').click()
        page.locator('[data-input="image"] >> text=Random').click()
        page.locator('[data-input="found"] textarea').fill(json.dumps([[rows]]))
        send(page)
        boxes = page.locator(".try-boxes rect")
        shape = boxes.evaluate("(box) => ['x', 'y', 'width', 'height'].map((name) => Number(box.getAttribute(name)))")
        assert shape == [4, 4, 4, 8]
        assert page.locator(".try-boxes text").all_text_contents() == ["1 0.90"]
        page.locator("input[type=range]").fill("0.05")
        assert page.locator(".try-boxes text").all_text_contents() == ["1 0.90", "2 0.10"]


def test_an_output_is_copied_as_json(show):
    with show("digits", permissions=["clipboard-read", "clipboard-write"]) as page:
        page.click("text=Values")
        page.click("text=Example")
        answer = send(page)
        page.locator('[data-output="probabilities"] >> text=Copy JSON').click()
        page.wait_for_selector("text=Copied")
        copied = json.loads(page.evaluate("navigator.clipboard.readText()"))
        assert copied["name"] == "probabilities"
        assert copied["shape"] == [1, 10]
        assert np.float32(copied["data"]).tobytes() == read_outputs(answer)["probabilities"][1]


def test_names_are_shown_as_text_and_each_version_can_be_chosen(show):
    with show() as page:
        page.wait_for_selector(".try-send")
        options = page.locator(".try-head option").all_text_contents()
        assert f"{HOSTILE}, version 1" in options
        page.select_option(".try-head select", label=f"{HOSTILE}, version 1")
        page.locator('[data-input="left"] textarea').fill("[1, 2, 3]")
        page.locator('[data-input="right"] textarea').fill("[5, 5, 5]")
        response = send(page)
        assert response.url.endswith("/versions/1/infer")
        assert np.frombuffer(read_outputs(response)["sum"][1], np.float32).tolist() == [6, 7, 8]
        page.select_option(".try-head select", label=HOSTILE)
        page.locator('[data-input="left"] textarea').fill("[1, -2]")
        assert read_outputs(send(page))["sum"][0] == [1, 2]
        address = page.url
        page.goto(address)
        assert page.locator(".try-head option:checked").inner_text() == HOSTILE
        assert page.locator("img").count() == 0


# --- The same call elsewhere


def run_calls(page, directory):
    """Save the files that the calls read, and run the calls in three processes at once; return what they print."""
    for button in page.locator(".try-calls >> text=/^Save /").all():
        with page.expect_download() as saved:
            button.click()
        saved.value.save_as(directory / saved.value.suggested_filename)
    processes = {}
    for language in ("curl", "tritonclient", "requests"):
        page.click(f'.try-calls [data-value="{language}"]')
        code = page.locator(".try-calls pre").text_content()
        command = ["sh", "-c", code] if language == "curl" else [sys.executable, "-c", code]
        environment = {**os.environ, "no_proxy": "*"}
        processes[language] = subprocess.Popen(
            command, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    printed = {}
    for language, process in processes.items():
        out, error = process.communicate(timeout=60)
        assert process.returncode == 0, error
        printed[language] = out
    return printed


def same_call(page, directory, expected):
    """Check that the three calls give the same outputs, {name: (shape, bytes)} by datatypes of `expected`."""
    shown = read_outputs(send(page))
    printed = run_calls(page, directory)
    answer = json.loads(printed["curl"])
    assert {output["name"] for output in answer["outputs"]} == set(expected)
    for output in answer["outputs"]:
        name = output["name"]
        shape, data = shown[name]
        assert (output["shape"], output["datatype"]) == (shape, expected[name])
        if output["datatype"] == "BYTES":
            assert output["data"] == split_strings(data)
        else:
            assert np.array(output["data"]).astype(DTYPES[output["datatype"]]).tobytes() == data
    parsed = eval(printed["requests"])  # a dict as Python prints it
    assert parsed["outputs"] == answer["outputs"]
    for line in printed["tritonclient"].splitlines():
        name, _, values = line.partition(" ")
        _, data = shown[name]
        found = np.array(eval(values), object if expected[name] == "BYTES" else None)
        if expected[name] == "BYTES":
            assert [value.decode() for value in found.ravel()] == split_strings(data)
        else:
            assert found.astype(DTYPES[expected[name]]).tobytes() == data, name
    assert len(printed["tritonclient"].splitlines()) == len(expected)


pytestmark_curl = pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")


@pytestmark_curl
def test_the_calls_of_values_give_the_same_outputs(show, tmp_path):
    with show("every") as page:
        page.locator('[data-input="bytes"] textarea').fill('["it\'s", "a \\"b\\" \\\\ $c", "caf\\u00e9\\n"]')
        same_call(page, tmp_path, {name.lower(): name for name in DATATYPES})
        assert not list(tmp_path.iterdir())


@pytestmark_curl
def test_the_calls_of_a_picture_give_the_same_outputs(show, tmp_path):
    (tmp_path / "it's a number.png").write_bytes(NUMBER.read_bytes())
    with show("number") as page:
        page.set_input_files(".try-file", tmp_path / "it's a number.png")
        page.wait_for_selector("text=it's a number.png")
        (tmp_path / "it's a number.png").unlink()
        same_call(page, tmp_path, {"boxes": "INT32", "digits": "INT64"})
        assert [file.name for file in tmp_path.iterdir()] == ["it's a number.png"]


@pytestmark_curl
def test_the_calls_of_large_values_give_the_same_outputs(show, tmp_path):
    with show("every") as page:
        for name in DATATYPES:
            field = page.locator(f'[data-input="{name.lower()}"]')
            field.locator(".try-dim").first.fill("400")
            field.get_by_text("Random").click()
        same_call(page, tmp_path, {name.lower(): name for name in DATATYPES})
        assert [file.name for file in tmp_path.iterdir()] == ["request.bin"]


@pytestmark_curl
def test_the_calls_ask_for_the_chosen_outputs_of_the_chosen_version(show, tmp_path):
    with show() as page:
        page.wait_for_selector(".try-send")
        page.select_option(".try-head select", label=f"{HOSTILE}, version 1")
        page.uncheck("fieldset >> text=sum")
        same_call(page, tmp_path, {"difference": "FP32"})


# --- Modules by themselves


@pytest.fixture(scope="module")
def modules(browser, service):
    """A page of the console; run(module, code, argument) evaluates code with the module `m` and the argument `a`."""
    with open_page(browser, f"http://127.0.0.1:{service.port}/console#log") as page:

        def run(module, code, argument=None):
            return page.evaluate(
                f"async (a) => {{ const m = await import('/console/{module}.js'); return {code}; }}", argument
            )

        yield run


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_floats_of_16_bits_are_rounded_as_by_numpy(modules, datatype):
    random = np.random.default_rng(5)
    values = np.concatenate(
        [
            random.standard_normal(500) * 10.0 ** random.integers(-9, 5, 500),
            [
                0.0,
                1 + 2**-11,
                1 + 3 * 2**-11,
                1 + 2**-8,
                1 + 3 * 2**-8,
                65504,
                6e-8,
                2**-24,
                2**-25,
                2**-14,
                9e-41,
                1e38,
            ],
        ]
    )
    values = values[np.abs(values) < (65504 if datatype == "FP16" else 3e38)]
    code = "[m.encodeHalf, m.decodeHalf].reduce((all, step) => all.map((x) => step(x, m.DATATYPES[a[0]].half)), a[1])"
    assert (
        modules("tensors", code, [datatype, values.tolist()]) == values.astype(DTYPES[datatype]).astype(float).tolist()
    )
    bits = modules("tensors", "a[1].map((x) => m.encodeHalf(x, m.DATATYPES[a[0]].half))", [datatype, values.tolist()])
    assert bits == values.astype(DTYPES[datatype]).view(np.uint16).tolist()


@pytest.mark.parametrize("datatype", ["FP16", "BF16", "FP32"])
def test_values_are_shown_in_a_form_that_reads_back(modules, datatype):
    values = np.random.default_rng(6).standard_normal(200).astype(DTYPES[datatype])
    texts = modules("tensors", "a[1].map((x) => m.showValue(x, a[0]))", [datatype, values.astype(float).tolist()])
    assert np.array(list(map(float, texts))).astype(DTYPES[datatype]).tolist() == values.tolist()
    assert modules("tensors", "m.showValue(Math.fround(0.1), 'FP32')") == "0.1"


def test_responses_in_json_are_decoded_with_null_for_numbers_that_json_lacks(modules):
    response = '{"outputs":[{"name":"y","datatype":"FP32","shape":[2],"data":[null,1.5]},' + (
        '{"name":"i","datatype":"INT64","shape":[1],"data":[9007199254740993]}]}'
    )
    code = "m.decodeResponse(new TextEncoder().encode(a), null).outputs.map(({values}) => Array.from(values, String))"
    assert modules("tensors", code, response) == [["NaN", "1.5"], ["9007199254740993"]]


@pytest.mark.parametrize(
    ("dims", "layout", "axes"),
    [
        (["-1", 8, 8, 1], None, [1, 2, 3]),
        ([1, 3, 224, 224], None, [2, 3, 1]),
        ([1, 224, 224, 3], "NHWC", [1, 2, 3]),
        ([1, 3, "32:640", 640], "NCHW", [2, 3, 1]),
        ([3, 32, 32], None, [1, 2, 0]),
        (["-1", "-1", "-1", 3], None, [1, 2, 3]),
        ([1, 1, "-1", 7], None, None),
        ([1, 1, "-1", 512], None, None),
        ([2, 3, 224, 224], None, None),
        ([1, 12, 128, 64], None, None),
        ([1, 10], None, None),
    ],
)
def test_shapes_of_images_are_recognized(modules, dims, layout, axes):
    found = modules("pictures", "m.findAxes(...a)", [dims, layout])
    assert found == (axes and dict(zip(("height", "width", "channels"), axes, strict=True)))


@pytest.mark.parametrize(
    ("datatype", "shape", "expected"),
    [
        ("UINT8", [1, 32, 32, 3], True),
        ("FP32", [1, 3, 32, 32], True),
        ("FP32", [4, 3, 32, 32], True),
        ("FP32", [0, 3, 32, 32], False),
        ("FP32", [1, 21, 32, 32], False),
        ("INT64", [1, 32, 32], True),
        ("INT64", [32, 8], False),
        ("FP32", [32, 32], False),
    ],
)
def test_outputs_that_are_pictures_or_classes_by_pixel_are_recognized(modules, datatype, shape, expected):
    assert modules("pictures", "m.isPicture({datatype: a[0], shape: a[1]})", [datatype, shape]) is expected


@pytest.mark.parametrize(
    ("suffix", "shape", "flags", "channels"),
    [
        (".png", (20, 30), [], 1),
        (".png", (20, 30, 3), [], 3),
        (".png", (20, 30, 4), [], None),
        (".jpg", (20, 30), [], 1),
        (".jpg", (20, 30, 3), [], 3),
        (".jpg", (20, 30), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1], 1),
        (".bmp", (20, 30), [], None),
    ],
)
def test_channels_of_files_are_counted(modules, suffix, shape, flags, channels):
    encoded = cv2.imencode(suffix, np.full(shape, 90, np.uint8), flags)[1]
    assert modules("pictures", "m.countChannels(Uint8Array.from(a))", encoded.tolist()) == channels


@pytest.mark.parametrize(
    ("datatype", "boxes", "form"),
    [
        ("FP32", [[10, 20, 5, 8]], "xywh"),
        ("FP32", [[10, 20, 95, 48]], "xyxy"),
        ("FP32", [[10, 20, 40, 40]], "xyxy"),
        ("INT32", [[10, 20, 40, 40]], "xywh"),
        ("INT32", [[10, 20, 95, 48]], "xyxy"),
    ],
)
def test_the_form_of_boxes_is_guessed_from_their_numbers(modules, datatype, boxes, form):
    code = "m.guessForm({datatype: a[0], shape: [1, 4]}, a[1].map((box) => ({box})), {height: 100, width: 100})"
    assert modules("boxes", code, [datatype, boxes]) == form


def test_scores_are_ranked_with_the_first_of_equals_first(modules):
    scores = [0.1, 0.5, 0.2, 0.5, 0.3]
    assert modules("results", "m.rankScores(Float32Array.from(a), 3).map(({index}) => index)", scores) == [1, 3, 4]


# --- The page


def test_a_model_is_tried_by_keyboard_alone(show):
    def press_until(condition):
        for _ in range(60):
            if page.evaluate(f"(() => {{ const element = document.activeElement; return {condition}; }})()"):
                return
            page.keyboard.press("Tab")
        pytest.fail(f"nothing that is reached by Tab is {condition}")

    with show() as page:
        page.wait_for_selector(".try-send")
        press_until("element.tagName === 'SELECT'")
        page.keyboard.type("softmax")
        press_until("element.textContent === 'Zeros'")
        page.keyboard.press("Enter")
        press_until("element.textContent === 'Send'")
        page.keyboard.press("Enter")
        page.wait_for_selector(".try-bars")
        assert page.locator(".try-score").first.inner_text() == "5.0 %"


def test_the_view_fits_a_phone(show):
    with show("digits", viewport=PHONE, has_touch=True) as page:
        page.wait_for_selector(".try-pad")
        draw(page, 3)
        page.wait_for_selector(".try-calls pre")
        for model in ("digits", "number", "every"):
            if model != "digits":
                page.select_option(".try-head select", model)
                page.wait_for_selector(".try-picture" if model == "number" else "textarea:visible")
                send(page)
            assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], model
            screenshot(page, f"try-phone-{model}")


def test_the_view_is_shown_in_dark(show):
    with show("digits", color_scheme="dark") as page:
        page.wait_for_selector(".try-pad")
        draw(page, 5)
        page.wait_for_selector(".try-headline")
        light = page.evaluate("getComputedStyle(document.querySelector('.try-answer')).backgroundColor")
        assert max(map(int, light.removeprefix("rgb(").removesuffix(")").split(","))) < 80
        screenshot(page, "try-dark")


def test_inferences_go_to_the_service_where_the_console_is_on_the_control_address(browser, tmp_path):
    with serve(tmp_path, "-w", "1", OVMS_REST_CONTROL_BIND="127.0.0.1:0") as service:
        control = service.wait_for(lambda: find_console(service.log))
        with open_page(browser, f"{control}#try") as page:
            page.wait_for_selector(".try-pad")
            page.uncheck("text=send after each stroke")
            draw(page, 7)
            response = send(page)
            assert response.url == f"http://127.0.0.1:{service.port}/v2/models/digits/infer"
            assert headline(page, "digit") == "7"
            assert f"curl -s http://127.0.0.1:{service.port}/" in page.inner_text(".try-calls pre")


def find_console(log):
    """Return the address of the console in the log, None if it is not there yet."""
    found = [word.strip(";,") for line in log.splitlines() if "console: " in line for word in line.split()]
    return next((word for word in found if word.endswith("/console")), None)
