"""Text: strings in, tokens or embeddings out, by the operations of openvino-tokenizers."""

import json
import os
import re
import subprocess
import sys

import model_zoo
import numpy as np
import pytest
import text_models
from opened_models import open_model
from service import ROOT, serve

from ovms_rest.errors import InvalidRequestError, LoadError
from ovms_rest.models import extensions
from ovms_rest.protocol.strings import BytesArray

TEXTS = ["Hello, world!", "a", "The cats sat; hello hello hello!", "", "Zürich \N{CJK UNIFIED IDEOGRAPH-4E16}"]
LIBRARY = extensions.find_tokenizers()
README = (ROOT / "ovms_rest" / "models" / "README.md").read_text()
EXAMPLE, SCRIPT = re.search(
    r"^## Text\n.*?^```json\n(.*?)^```.*?^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL
).groups()


def infer(model, texts, name="text"):
    strings = BytesArray.of([text if isinstance(text, bytes) else text.encode() for text in texts], (len(texts),))
    return {name: tensor.array.copy() for name, tensor in model.infer({name: strings}).items()}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return open_model(text_models.tokenizer(), tmp_path_factory.mktemp("tokenizer"))


def test_tokenizer_pads_like_openvino(tokenizer):
    for texts in (TEXTS, TEXTS[:1], TEXTS[1:3]):
        expected = text_models.compute(text_models.tokenizer(), texts)
        found = infer(tokenizer, texts)
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            assert np.array_equal(found[name], array), name


def test_texts_are_cut_at_the_length_of_the_tokenizer(tokenizer):
    (ids,) = infer(tokenizer, ["hello " * 100_000])["input_ids"].tolist()
    assert ids == [2, *[5] * (text_models.MAX_TOKENS - 2), 3]


@pytest.mark.parametrize("text", [b"\xff\xfe", b"hello \xc3", b"hello\0world", b"\0"])
def test_bytes_that_are_not_utf8_are_unknown_tokens_and_do_not_affect_others(tokenizer, text):
    ids = infer(tokenizer, [text, b"hello"])["input_ids"].tolist()
    assert ids[0][0] == 2
    assert ids[1][:3] == [2, 5, 3]


@pytest.mark.parametrize("texts", [[], [""], ["", ""], ["   "]])
def test_texts_without_a_token_are_refused_instead_of_returning_others(tokenizer, texts):
    """OpenVINO alone would return the tokens of the previous inference."""
    infer(tokenizer, TEXTS)
    with pytest.raises(InvalidRequestError, match="gets a tensor without elements"):
        infer(tokenizer, texts)


def test_forked_process_makes_tokens(tokenizer):
    """The extension is inherited like a model that is compiled for one thread."""
    expected = infer(tokenizer, TEXTS)["input_ids"].tolist()
    for _ in range(10):
        pid = os.fork()
        if pid == 0:
            tokenizer.open(lambda: None)
            os._exit(7 if infer(tokenizer, TEXTS)["input_ids"].tolist() == expected else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


# --- Libraries


def test_advice_names_the_package_if_it_is_missing(tmp_path, monkeypatch):
    """The library has not been loaded in this process."""
    model_zoo.save(text_models.tokenizer(), tmp_path)
    code = (
        "import sys; from pathlib import Path\n"
        "from ovms_rest.models import extensions, runtime\n"
        "runtime.find_tokenizers = lambda: None\n"
        "from ovms_rest.models.compilation import plan_compilation\n"
        "try: runtime.Model('m', 1, Path(sys.argv[1]), plan_compilation('CPU', {}, 2))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "1"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("LoadError cannot read "), done
    assert "pip install 'ovms_rest[text]'" in done.stdout


def test_library_named_in_the_config_is_loaded(tmp_path):
    opened = open_model(text_models.tokenizer(), tmp_path, cpu_extension=LIBRARY)
    assert infer(opened, ["hello"])["input_ids"].tolist() == [[2, 5, 3]]


def test_file_that_is_not_an_extension_fails_its_model(tmp_path):
    wrong = tmp_path / "wrong.so"
    wrong.write_bytes(b"not a library")
    with pytest.raises(LoadError, match=r"^cpu_extension: .*wrong\.so cannot be loaded as an extension of OpenVINO: "):
        open_model(model_zoo.relu(), tmp_path / "m", cpu_extension=str(wrong))


def test_process_that_has_imported_the_package_serves_strings(tmp_path):
    """A pipeline's Python node may import it; the package then replaces StringTensorPack by a node of its own."""
    text_models.tokenizer()
    opened = open_model(model_zoo.strings([-1]), tmp_path)
    for texts in ([b"a", b"bc"], [b"", b""], []):
        (found,) = opened.infer({"text": BytesArray.of(texts, (len(texts),))}).values()
        assert found.array.elements() == texts


# --- Served


def make_config(directory):
    """Write the config of the README's example, with the combined model that its script makes."""
    model_zoo.save(text_models.tokenizer(), directory / "models" / "tokenizer")
    model_zoo.save(text_models.encoder(), directory / "models" / "encoder")
    subprocess.run([sys.executable, "-c", SCRIPT], cwd=directory, check=True)
    config = json.loads(EXAMPLE)
    config["model_config_list"].append({"config": {"name": "combined", "base_path": "models/combined"}})
    for entry in config["model_config_list"]:
        entry["config"]["plugin_config"] = {"INFERENCE_PRECISION_HINT": "f32"}
    path = directory / "config.json"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    directory = tmp_path_factory.mktemp("text")
    with serve(directory, "-w", "2", config=make_config(directory)) as running:
        yield running


def request(*texts):
    return {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": texts}]}


def ask(service, model, *texts):
    response = service.infer(model, request(*texts))
    assert response.status == 200, response.body
    return {output["name"]: np.array(output["data"]).reshape(output["shape"]) for output in response.json()["outputs"]}


def test_pipeline_and_combined_model_return_the_same_embeddings(service):
    for texts in (TEXTS, TEXTS[:1], TEXTS[1:3]):
        expected = text_models.compute(text_models.combined(), texts)["embedding"]
        for model in ("embed", "combined"):
            found = ask(service, model, *texts)
            assert list(found) == ["embedding"]
            assert found["embedding"].shape == (len(texts), text_models.WIDTH)
            assert np.allclose(found["embedding"], expected, rtol=0, atol=1e-5)


def test_metadata_of_text_models_has_strings(service):
    metadata = service.get("/v2/models/embed").json()
    assert metadata["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
    assert metadata["outputs"] == [{"name": "embedding", "datatype": "FP32", "shape": [-1, text_models.WIDTH]}]


def test_tokenizer_alone_returns_tokens(service):
    found = ask(service, "tokenizer", *TEXTS)
    for name, array in text_models.compute(text_models.tokenizer(), TEXTS).items():
        assert found[name].tolist() == array.tolist()


def test_texts_without_a_token_are_answered_400(service):
    for model in ("embed", "combined", "tokenizer"):
        response = service.infer(model, request(""))
        assert response.status == 400
        assert "gets a tensor without elements" in response.json()["error"]
