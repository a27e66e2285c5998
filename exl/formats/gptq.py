"""GPTQ tensors -> ``QuantizedMatrix``. The layout is AutoGPTQ's; ``docs/formats.md`` has it with its traps.

``qweight`` i32 [K * bits / 32, N], packed along K; ``qzeros`` i32 [G, N * bits / 32], packed along N; ``scales``
[G, N]; ``g_idx`` i32 [K], optional; ``bias`` [N], optional. G is ceil(K / group size): the last group may be shorter.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from exl.checkpoint.checkpoint import Checkpoint
from exl.checkpoint.quant.gptq import GptqConfig
from exl.checkpoint.quant.values import SUPPORTED_BITS
from exl.errors import CheckpointError, warn_user
from exl.formats.codes import unpack_codes, unpack_planes
from exl.formats.format import Format
from exl.formats.groups import QuantizedShape, num_groups, read_order, read_scales
from exl.formats.matrix import DenseMatrix, QuantizedMatrix
from exl.formats.tensors import FLOAT_DTYPES, expect_shape, read_bias, require_tensor, to_float
from exl.layout.specs import MatrixSpec

K_MULTIPLE = 32  # 32 codes of any width fill whole words


def gptq_spec(checkpoint: Checkpoint, name: str, quant: GptqConfig) -> MatrixSpec:
    """Shapes of one module, from headers and, where there is one, ``g_idx``. ``quant`` is the module's own.

    Raises ``CheckpointError`` that names the tensor, what was found and what was expected.
    """
    shape = _read_shape(checkpoint, name, quant)
    return shape.spec(checkpoint, name, quant.bits, symmetric=quant.sym, scales=f"{name}.scales")


def load_gptq(checkpoint: Checkpoint, name: str, quant: GptqConfig) -> QuantizedMatrix:
    """One module with its scales and zeros in memory. Codes are read at the first use and unpacked by block.

    Raises as :func:`gptq_spec`, also for scales that are not finite; warns (``ExlWarning``) where symmetric zeros show
    that the file is not of the ``checkpoint_format`` that it claims.
    """
    shape = _read_shape(checkpoint, name, quant)
    words: list[NDArray[np.int32]] = []  # read once, kept as long as the matrix

    def read_words() -> NDArray[np.uint32]:
        if not words:
            words.append(checkpoint.read(f"{name}.qweight"))
        return words[0].view(np.uint32)

    def read_codes(start: int, stop: int) -> NDArray[np.uint8]:
        if not 0 <= start <= stop <= shape.N:
            raise ValueError(f"columns {start}:{stop} of {name}, which has {shape.N}")
        codes = _unpack(read_words()[:, start:stop], quant)
        return codes if shape.order is None else codes[shape.order]

    return QuantizedMatrix(
        bits=quant.bits,
        group_size=shape.group_size,
        K=shape.K,
        N=shape.N,
        scales=read_scales(checkpoint, f"{name}.scales"),
        scale_dtype=checkpoint.info(f"{name}.scales").dtype,
        zeros=_read_zeros(checkpoint, name, quant),
        order=shape.order,
        bias=read_bias(checkpoint, f"{name}.bias", shape.N),
        read_codes=read_codes,
        read_words=None if _in_planes(quant) else read_words,
    )


def load_gptq_table(checkpoint: Checkpoint, name: str, quant: GptqConfig) -> DenseMatrix:
    """A quantized embedding, dequantized as its rows are read. GPTQModel packs it along the vocabulary: a token is an
    input, groups are of tokens, and a channel is an output. Raises as :func:`load_gptq`.

    Values are f32: ``code - zero`` has 9 bits, so that products with f16 and bf16 scales are exact; those with f32
    scales are rounded once.
    """
    shape = _read_shape(checkpoint, name, quant)
    scales = to_float(read_scales(checkpoint, f"{name}.scales"), "f16")
    zeros = _read_zeros(checkpoint, name, quant).astype(np.float32)
    group = np.arange(shape.K, dtype=np.int32) // np.int32(shape.group_size)
    if shape.order is not None:
        sorted_group, group = group, np.empty_like(group)
        group[shape.order] = sorted_group

    def read_rows(start: int, stop: int) -> NDArray[np.float32]:
        first, last = start // K_MULTIPLE, -(-stop // K_MULTIPLE)  # blocks of whole words
        words = checkpoint.read_rows(f"{name}.qweight", first * quant.bits, last * quant.bits)
        codes = _unpack(words, quant)[start - first * K_MULTIPLE :][: stop - start]
        rows = group[start:stop]
        return (codes - zeros[rows]) * scales[rows]

    return DenseMatrix(dtype="f32", K=shape.N, N=shape.K, bias=None, bias_dtype=None, read_rows=read_rows)


def gptq_fits(checkpoint: Checkpoint, name: str, quant: GptqConfig) -> bool:
    """Whether a module's shapes and ``g_idx`` are those of the bits and the group size that ``quant`` says."""
    try:
        _read_shape(checkpoint, name, quant)
        return True
    except CheckpointError:
        return False


def stored_sizes(checkpoint: Checkpoint, name: str) -> tuple[int, int, int] | None:
    """Bits, inputs and groups that a module's shapes show, whatever a configuration says; None: they contradict each
    other. A row of qzeros has one zero for each of the N outputs, which qweight has too: that gives the bits."""
    shapes = [checkpoint.tensors.get(f"{name}.{part}") for part in ("qweight", "qzeros", "scales")]
    if any(info is None or len(info.shape) != 2 or 0 in info.shape for info in shapes):
        return None
    (num_rows, N), (G, num_words), scales_shape = (info.shape for info in shapes)
    bits, rest = divmod(num_words * 32, N)
    if rest or bits not in SUPPORTED_BITS or num_rows % bits or scales_shape != (G, N):
        return None
    K, g_idx = num_rows * 32 // bits, checkpoint.tensors.get(f"{name}.g_idx")
    return (bits, K, G) if g_idx is None or g_idx.shape == (K,) else None


def _stored_sizes_shown(checkpoint: Checkpoint, name: str, quant: GptqConfig) -> str:
    """What the shapes show, if that is something else than ``quant`` says; for the end of a message."""
    sizes = stored_sizes(checkpoint, name)
    if sizes is None:
        return ""
    bits, K, G = sizes
    if (bits, G) == (quant.bits, num_groups(K, quant.group_size)):
        return ""
    return f"; the shapes of all its tensors are those of {bits} bits and {K} inputs in {G} group{'s' * (G > 1)}"


def _read_shape(checkpoint: Checkpoint, name: str, quant: GptqConfig) -> QuantizedShape:
    qweight = require_tensor(checkpoint, f"{name}.qweight", ("i32",), 2)
    num_rows, N = qweight.shape
    K = num_rows * 32 // quant.bits
    shown = _stored_sizes_shown(checkpoint, name, quant)
    if not K or not N or num_rows % quant.bits:
        raise CheckpointError(
            f"{qweight.file}: {qweight.name}: found shape {list(qweight.shape)}, expected [K / 32 * {quant.bits}, N] "
            f"with K a multiple of {K_MULTIPLE} at {quant.bits} bits ({quant.source}){shown}"
        )
    scales = require_tensor(checkpoint, f"{name}.scales", FLOAT_DTYPES, 2)
    one_group = quant.group_size == -1 or quant.group_size >= K
    group_size = K if one_group else quant.group_size
    G = num_groups(K, group_size)
    reason = f"{K} inputs, group size {quant.group_size} and {quant.bits} bits ({quant.source}){shown}"
    expect_shape(scales, (G, N), reason)
    qzeros = require_tensor(checkpoint, f"{name}.qzeros", ("i32",), 2)
    if N * quant.bits % 32 or (quant.bits == 3 and N % 32):
        raise CheckpointError(
            f"{qweight.file}: {name}: {N} outputs, whose {quant.bits}-bit zeros do not fill whole words of qzeros"
        )
    expect_shape(qzeros, (G, N * quant.bits // 32), reason)
    return QuantizedShape(K, N, group_size, read_order(checkpoint, f"{name}.g_idx", K, group_size, quant.source))


def _read_zeros(checkpoint: Checkpoint, name: str, quant: GptqConfig) -> NDArray[np.uint8]:
    """True zeros u8 [G, N]: as the file's writer has turned them into words."""
    stored = _stored_zeros(checkpoint, name, quant)
    checkpoint_format = quant.checkpoint_format
    if checkpoint_format == "gptq_p":
        return stored
    found = _format_of(stored, quant.bits) if quant.sym else None
    if found is not None:
        checkpoint_format = found
        if checkpoint_format != quant.checkpoint_format:
            warn_user(
                f"{quant.source}: checkpoint_format: found {quant.checkpoint_format}, but symmetric {quant.bits}-bit "
                f"zeros are stored as {stored[0, 0]}, which is {checkpoint_format}; going by the data"
            )
    if checkpoint_format == "gptq_v2":
        return stored
    if quant.borrowed and found is None and quant.bits != 3:  # 3 bits straddle words: even these writers part them
        words = checkpoint.read(f"{name}.qzeros").view(np.uint32) + np.uint32(_ones(quant.bits))
        return np.ascontiguousarray(unpack_codes(words.T, quant.bits).T)
    # Field by field: arithmetic on whole words would borrow from neighbours. 15 + 1 can only mean 0.
    return (stored + np.uint8(1)) & np.uint8((1 << quant.bits) - 1)


def _ones(bits: int) -> int:
    """A word with 1 in each field: 0x11111111 at 4 bits."""
    return sum(1 << shift for shift in range(0, 32, bits))


def _stored_zeros(checkpoint: Checkpoint, name: str, quant: GptqConfig) -> NDArray[np.uint8]:
    """As the file has them, u8 [G, N]."""
    words = checkpoint.read(f"{name}.qzeros")
    bits = quant.bits
    codes = unpack_codes(words[:1, :3].T, bits)
    if bits != 3 and (words == words[0, 0]).all() and (codes == codes[0]).all():  # symmetric: one zero for all
        return np.full((len(words), words.shape[1] * 32 // bits), codes[0, 0])
    return np.ascontiguousarray(_unpack(words.T, quant).T)


def _unpack(words: NDArray[np.int32] | NDArray[np.uint32], quant: GptqConfig) -> NDArray[np.uint8]:
    return unpack_planes(words) if _in_planes(quant) else unpack_codes(words, quant.bits)


def _in_planes(quant: GptqConfig) -> bool:
    """Whether words are not the bit stream of all other files: at 2, 4 and 8 bits planes are that, too."""
    return quant.checkpoint_format == "gptq_p" and quant.bits == 3


def _format_of(stored: NDArray[np.uint8], bits: int) -> str | None:
    """The ``checkpoint_format`` that symmetric zeros show: all are 2**(bits - 1), or one less in the first format."""
    middle = 1 << (bits - 1)  # the zero of symmetric codes: 8 at 4 bits
    if stored.min() != stored.max() or stored[0, 0] not in (middle - 1, middle):
        return None
    return "gptq" if stored[0, 0] == middle - 1 else "gptq_v2"


def format_of_zeros(checkpoint: Checkpoint, name: str, quant: GptqConfig) -> str | None:
    """The ``checkpoint_format`` that a module's zeros show; None: they are not symmetric."""
    return _format_of(_stored_zeros(checkpoint, name, quant), quant.bits)


FORMAT = Format("qweight", ("qweight", "qzeros", "scales", "g_idx", "bias"), gptq_spec, load_gptq)
