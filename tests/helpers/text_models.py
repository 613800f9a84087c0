"""Small models for text: a tokenizer, an encoder of its tokens, and both as one."""

import numpy as np

import ovms_rest.models  # noqa: F401  isort: skip  before openvino, which without it would send usage statistics
import openvino
from openvino import Type, opset15
from openvino_tokenizers import connect_models
from openvino_tokenizers import tokenizer_pipeline as steps

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = ("a", "hello", "world", "##ly", "##s", "!", ",", "the", "cat", "sat")
VOCABULARY = [*SPECIAL, *WORDS]
WIDTH = 8
MAX_TOKENS = 16


def tokenizer(vocabulary=VOCABULARY, max_tokens=MAX_TOKENS):
    """Return a tokenizer like BERT's: text BYTES [n] -> input_ids, attention_mask, token_type_ids INT64 [n,longest]."""
    ids = {word: number for number, word in enumerate(vocabulary)}
    start, end = (steps.AddToken(token, ids[token], 0) for token in ("[CLS]", "[SEP]"))
    pipeline = steps.TokenizerPipeline()
    pipeline.vocab = vocabulary
    pipeline.add_steps(
        [
            steps.SpecialTokensSplit.from_string_iter(SPECIAL),
            steps.NormalizeUnicode("NFD"),
            steps.CaseFoldStep(),
            steps.RegexNormalizationStep.strip_accents_regex(),
            steps.RegexNormalizationStep.del_control_chars_regex(),
            steps.RegexNormalizationStep.handle_chinese_chars_regex(),
            steps.RegexSplitStep.bert_whitespace_splitter(),
            steps.RegexSplitStep.bert_keep_delimeters_splitter(),
            steps.WordPieceTokenizationStep(vocabulary),
            steps.TruncationStep(max_tokens - 2, truncation=True),
            steps.CombineSegmentsStep(inputs=[start, steps.Sequence(0), end]),
            steps.PaddingStep(token="[PAD]", _token_id=ids["[PAD]"], token_type_id=0),  # noqa: S106
        ]
    )
    model = pipeline.get_tokenizer_ov_subgraph()
    model.inputs[0].get_tensor().set_names({"text"})
    for result in model.get_results():
        source = result.input_value(0)
        names = source.get_names()
        converted = opset15.convert(source, "i64")
        converted.output(0).set_names(names)
        source.set_names(set())
        result.input(0).replace_source_output(converted.output(0))
    model.validate_nodes_and_infer_types()
    return model


def encoder(vocabulary=VOCABULARY, width=WIDTH, seed=0):
    """Return the mean of tokens' vectors: input_ids, attention_mask INT64 [n,longest] -> embedding FP32 [n,width]."""
    vectors = np.random.default_rng(seed).standard_normal((len(vocabulary), width), np.float32)
    ids, mask = (
        opset15.parameter(openvino.PartialShape([-1, -1]), Type.i64, name=name)
        for name in ("input_ids", "attention_mask")
    )
    for node in (ids, mask):
        node.output(0).set_names({node.get_friendly_name()})
    gathered = opset15.gather(opset15.constant(vectors), ids, opset15.constant(0))
    weights = opset15.unsqueeze(opset15.convert(mask, "f32"), opset15.constant(2))
    total = opset15.reduce_sum(opset15.multiply(gathered, weights), opset15.constant([1]), keep_dims=False)
    mean = opset15.divide(total, opset15.reduce_sum(weights, opset15.constant([1]), keep_dims=False))
    mean.output(0).set_names({"embedding"})
    return openvino.Model([opset15.result(mean)], [ids, mask], "encoder")


def combined():
    """Return both as one model: text BYTES [n] -> embedding FP32 [n,width]."""
    first = tokenizer()
    (unused,) = (each for each in first.get_results() if "token_type_ids" in each.input_value(0).get_names())
    first.remove_result(unused)
    model = connect_models(first, encoder())
    model.add_sinks(first.get_sinks())  # the length limit is a variable, which connect_models leaves out
    return model


def compute(model, texts):
    """Infer in this process with OpenVINO alone; return the outputs by name."""
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    request = compiled.create_infer_request()
    results = request.infer({0: texts})
    return {output.get_any_name(): np.array(results[output]) for output in compiled.outputs}
