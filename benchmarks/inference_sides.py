"""The sides of the comparison in inference.py: herd_jax, transformers and llama.cpp, each in a process of its own, answer the same prompt as often as they are
asked to. inference.py starts them.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

PROMPT = "The history of the city begins with a small settlement on the bank of the river, where"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=["ours", "transformers", "llama_cpp"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    parser.add_argument("--concurrent", type=int, nargs="+", required=True)
    args = parser.parse_args()
    answer({"ours": ours, "transformers": transformers, "llama_cpp": llama_cpp}[args.side](args), args)


def answer(sides, args):
    """Answers each number on stdin with the seconds of a run and the first answer's ids."""
    about, run = sides
    for number in args.concurrent:
        run(number)
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        ids = run(int(line))
        print(json.dumps({"seconds": time.perf_counter() - start, "ids": ids}), flush=True)


def ours(args):
    import jax
    import jax.numpy as jnp

    import herd_jax
    from herd_jax.inference.engine.requests import Request
    from herd_jax.inference.sampling import Sampling

    model = herd_jax.load(args.model, dtype="float32")
    ids = model.text_tokenizer().encode(PROMPT)
    engine = model.engine(max_sequences=max(args.concurrent), max_length=512, max_tokens_in_cache=256 * max(args.concurrent))
    weights = model.weights.apart()
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(weights)) - weights["ends"]["embed"]["table"].nbytes
    v, w = jnp.ones((1, 4096)), jnp.ones((4096, 16384))
    product = jax.jit(jnp.matmul).lower(v, w).compile()
    bandwidth = w.nbytes / min(seconds_of(lambda: product(v, w).block_until_ready()) for _ in range(20))

    def run(number):
        requests = [Request(ids, Sampling(args.new_tokens, ignore_eos=True), salt=str(time.perf_counter_ns())) for _ in range(number)]
        return list(next(a for a in list(engine.generate(requests)) if a.ticket == 0).ids)

    return {"what": f"herd_jax on jax {jax.__version__}", "prompt": len(ids), "bytes": num_bytes, "bandwidth": bandwidth}, run


def transformers(args):
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids

    def run(number):
        with torch.inference_mode():
            options = {"do_sample": False, "max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens, "use_cache": True}
            out = model.generate(ids.repeat(number, 1), attention_mask=torch.ones_like(ids.repeat(number, 1)), **options)
        return out[0, ids.shape[1] :].tolist()

    return {"what": f"transformers {transformers.__version__} on torch {torch.__version__}"}, run


def llama_cpp(args):
    """llama.cpp's own batches, through the functions of its library: one sequence each, all in one batch a step."""
    import ctypes

    import llama_cpp as lib
    import numpy as np

    path = write_gguf(args.model)
    most = max(args.concurrent)
    lib.llama_backend_init()
    silent = lib.llama_log_callback(lambda *_: None)  # which the library does not keep alive
    lib.llama_log_set(silent, ctypes.c_void_p(0))
    model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
    assert model, f"llama.cpp does not read {path}"
    settings = lib.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_seq_max, settings.n_threads, settings.n_threads_batch = 256 * most, 2048, most, os.cpu_count(), os.cpu_count()
    settings.type_k = settings.type_v = 0  # F32, as the other sides
    settings.flash_attn_type = 0
    settings.kv_unified = False
    context = lib.llama_init_from_model(model, settings)
    import tokenizers

    ids = tokenizers.Tokenizer.from_file(f"{args.model}/tokenizer.json").encode(PROMPT).ids
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    batch = lib.llama_batch_init(2048, 0, 1)

    def step(rows):
        """Computes (id, position, sequence, whether its logits are wanted) in one batch."""
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = sequence
        assert lib.llama_decode(context, batch) == 0
        wanted = [i for i, row in enumerate(rows) if row[3]]
        return [int(np.argmax(np.ctypeslib.as_array(lib.llama_get_logits_ith(context, i), (vocabulary,)))) for i in wanted]

    def run(number):
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        last = step([(token, i, row, i == len(ids) - 1) for row in range(number) for i, token in enumerate(ids)])
        answers = [[token] for token in last]
        for at in range(1, args.new_tokens):
            last = step([(token, len(ids) + at - 1, row, True) for row, token in enumerate(last)])
            for row, token in zip(answers, last):
                row.append(token)
        return answers[0]

    return {"what": f"llama.cpp of llama-cpp-python {lib.__version__}"}, run


def write_gguf(directory: str) -> str:
    """Writes the Hugging Face directory as a GGUF file of F32 (q and k with adjacent RoPE pairs, as the format has them); returns its path."""
    import gguf
    import numpy as np
    import tokenizers
    from safetensors.numpy import load_file

    config = json.loads((Path(directory) / "config.json").read_text())
    weights = {name: array for file in Path(directory).glob("*.safetensors") for name, array in load_file(file).items()}
    layers, dim, heads, groups = (config[name] for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"))
    path = f"{directory}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(dim)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config).get("rope_theta", 1e4))
    writer.add_rope_dimension_count(dim // heads)
    vocabulary = tokenizers.Tokenizer.from_file(f"{directory}/tokenizer.json")
    size = config["vocab_size"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([vocabulary.id_to_token(i) or f"<unused {i}>" for i in range(size)])
    writer.add_token_types([1] * size)
    merges = json.loads(Path(f"{directory}/tokenizer.json").read_text())["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])

    def pairs(array, number):
        half = array.shape[0] // number // 2
        return array.reshape(number, 2, half, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)

    names = {
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    writer.add_tensor("token_embd.weight", np.float32(weights["model.embed_tokens.weight"]))
    writer.add_tensor("output_norm.weight", np.float32(weights["model.norm.weight"]))
    if "lm_head.weight" in weights:
        writer.add_tensor("output.weight", np.float32(weights["lm_head.weight"]))
    for layer in range(layers):
        for ours_, theirs in names.items():
            array = np.float32(weights[f"model.layers.{layer}.{ours_}.weight"])
            array = pairs(array, {"attn_q": heads, "attn_k": groups}[theirs]) if theirs in ("attn_q", "attn_k") else array
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def seconds_of(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
