"""A GGUF file in SmolLM2's form, some hundred kilobytes: a llama in Q4_1 with a Q8_0 embedding, byte-level BPE tokens,
the pre-tokenizer "smollm" and a chat template."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from scripts import fetch_smollm2

ROOT = Path(__file__).parents[3]
TEXTS = [  # tokens are learnt from them, and they have much that a tokenizer can get wrong
    (ROOT / "tests/data/tinystories-valid-30k.txt").read_text(encoding="utf-8")[:4000],
    (ROOT / "scripts/fetch_smollm2.py").read_text(encoding="utf-8"),
    "12345 3.14159 2026-11-26, x2y, ½ ² ٣٤٥ १२३ Ⅷ",
    "👩‍👩‍👧‍👦 🇩🇪 🤖 e\u0301 é Ünïcödé 日本語 中文 한국어 العربية \ufeff\u200b\u00a0",
    "  two  spaces\t\ttabs\n\n\nlines\r\nmore  \n it's we'll I'D they've",
    "<|im_start|>user\nHi 42<|im_end|>\n<|im_start|>assistant\n",
]
HIDDEN, HEADS, KV_HEADS, FFN, LAYERS = 64, 4, 2, 96, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SHAPES = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "attn_v": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (FFN, HIDDEN),
    "ffn_up": (FFN, HIDDEN),
    "ffn_down": (HIDDEN, FFN),
}


def write_gguf(path: Path, text: str) -> Path:
    """``text``: what the tokens are learnt from."""
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    num_tokens = _add_tokenizer(writer, text)
    rng = np.random.default_rng(1)

    def add(name: str, shape: tuple[int, ...], kind: GGMLQuantizationType | None) -> None:
        values = rng.normal(0, 0.1, shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", values if kind is None else quantize(values, kind), raw_dtype=kind)

    add("token_embd", (num_tokens, HIDDEN), GGMLQuantizationType.Q8_0)
    add("output_norm", (HIDDEN,), None)
    for i in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            add(f"blk.{i}.{norm}", (HIDDEN,), None)
        for name, shape in _SHAPES.items():
            add(f"blk.{i}.{name}", shape, GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: GGUFWriter, text: str) -> int:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # so that digits have merges, too
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator([text], trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    for name, i in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(i)
    writer.add_chat_template(TEMPLATE)
    return len(tokens)


def write_wheel(path: Path, gguf: Path) -> str:
    """A wheel that holds the file where the package does; returns its SHA-256."""
    with zipfile.ZipFile(path, "w") as package:
        package.write(gguf, fetch_smollm2.GGUF_NAME)
        package.writestr(fetch_smollm2.LICENSE_NAME, "the licence\n")
    return fetch_smollm2.sha256(path)
