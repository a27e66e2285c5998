"""The model that ships with exl tells a story through exl's CUDA kernels, without a GPU: the sources that a GPU would
run, compiled by g++ for this machine's CPU; and then through torch, which must tell the same.

python -m scripts.kernels_demo [--prompt TEXT] [--tokens N]

Exit status: 0 if both stories are the same, word for word; 1 if they differ; 2 if the kernels cannot be compiled here.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence

from exl.checkpoint.generation_config import GenerationDefaults
from exl.checkpoint.hub import BUNDLED_MODEL
from exl.engine.build import load_engine
from exl.errors import ExlError
from exl.kernels.launch import Backend
from exl.kernels.spec import KernelSpec
from exl.layout.specs import Target
from exl.llm import LLM, Completion
from exl.planning.options import EngineOptions
from exl.text.tokenizer import Tokenizer
from tests.host.build import COMPILER
from tests.host.shim import HostShim, ShimBackend

PROMPT, TOKENS = "Once upon a time, there was a little girl", 80
CONTEXT, MAX_TOKENS = 256, 128
# torch's own 4-bit kernel rounds activations to bf16, the CUDA kernels round them to f16. So that words can be
# compared, torch multiplies what the codes mean, in f32.
F32_PANELS = Target("cpu")


class AnnouncedLibrary(HostShim):
    """Says which kernel is compiled, and counts."""

    def __init__(self) -> None:
        super().__init__("plain")
        self.num_kernels, self.seconds = 0, 0.0

    def load(self, spec: KernelSpec):
        start = time.perf_counter()
        kernel = super().load(spec)
        seconds = time.perf_counter() - start
        self.num_kernels, self.seconds = self.num_kernels + 1, self.seconds + seconds
        print(f"  {self.num_kernels:2}. cuda/{spec.source}: {spec.entry}, {seconds:.1f} s")
        return kernel


def load(backend: Backend | None) -> LLM:
    """The bundled model as ``exl.load`` makes it, with the kernels on ``backend``; None: through torch."""
    options = {"device": "cpu"} if backend is None else {"vram": "2GB"}
    options = EngineOptions(context=CONTEXT, **options)
    engine = load_engine(BUNDLED_MODEL, options, backend=backend, cpu=F32_PANELS)
    defaults = GenerationDefaults.from_folder(BUNDLED_MODEL)
    bos_id = engine.config.bos_id if defaults.bos_id is None else defaults.bos_id
    tokenizer = Tokenizer.from_folder(BUNDLED_MODEL, bos_id=bos_id, eos_ids=tuple(engine.generator.eos_ids))
    return LLM._of(BUNDLED_MODEL, engine, tokenizer, defaults)


def through_kernels(prompt: str, num_tokens: int) -> Completion:
    """Compiles what the story needs, then tells it as it comes."""
    print(
        f"Compiling exl's CUDA kernels with {COMPILER}, for this machine's CPU (kept under build/ for the next time):"
    )
    library = AnnouncedLibrary()
    with load(ShimBackend(library)) as llm:
        llm.generate(prompt, min(num_tokens, 2), temperature=0)  # a prompt and a step load all kernels
        print(f"{library.num_kernels} kernels in {library.seconds:.1f} s. The story through them:\n")
        print(prompt, end="", flush=True)
        stream = llm.stream(prompt, num_tokens, temperature=0)
        for piece in stream:
            print(piece, end="", flush=True)
        print("\n")
        return stream.completion


def through_torch(prompt: str, num_tokens: int) -> Completion:
    with load(None) as llm:
        return llm.generate(prompt, num_tokens, temperature=0)


def compare(kernels: Completion, torchs: Completion, seconds: tuple[float, float]) -> bool:
    """Says whether both are the same, or where they part."""
    if kernels.token_ids == torchs.token_ids and kernels.text == torchs.text:
        print(
            f"{kernels.num_tokens} tokens in {seconds[0]:.1f} s through the CUDA kernels on this CPU, in "
            f"{seconds[1]:.1f} s through torch: the same, word for word."
        )
        return True
    pairs = zip(kernels.token_ids, torchs.token_ids, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(kernels.num_tokens, torchs.num_tokens))
    print(f"THEY DIFFER after {same} tokens. Through torch it goes:\n\n...{torchs.text}\n")
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--prompt", default=PROMPT, help=f"how the story begins (default: {PROMPT!r})")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"how far it goes (default: {TOKENS})")
    asked = parser.parse_args(arguments)
    if not 1 <= asked.tokens <= MAX_TOKENS:
        parser.error(f"--tokens: found {asked.tokens}, expected 1 to {MAX_TOKENS}")
    if shutil.which(COMPILER) is None:
        print(
            f"error: {COMPILER} is not installed, which compiles the kernels here: version 12 or newer", file=sys.stderr
        )
        return 2
    try:
        start = time.perf_counter()
        kernels = through_kernels(asked.prompt, asked.tokens)
        between = time.perf_counter()
        torchs = through_torch(asked.prompt, asked.tokens)
    except ExlError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if compare(kernels, torchs, (between - start, time.perf_counter() - between)) else 1


if __name__ == "__main__":
    sys.exit(main())
