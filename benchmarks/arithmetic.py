"""What a quantized model's arithmetic costs in accuracy: how far its predictions are from those in f32.

    python -m benchmarks.arithmetic MODEL TEXT [--documents auto] [--tokens 20000] [--json NAME]

MODEL is a folder, or "bundled". Every prediction over the text is compared with the same model's in f32: the mean
of KL(f32 || other) in nats, its 99th percentile, the share of positions with the same likeliest token, and the loss.
"""

from __future__ import annotations

import argparse
import json

import exl
from benchmarks.disk import machine
from benchmarks.report import RESULTS
from exl.evaluate import Evaluation, evaluate, read_documents
from exl.layout.cpu_steps import ARITHMETIC

ARITHMETICS = [name for name in ARITHMETIC if name != "f32"]


def measure(model: str | None, text: str, documents: str, num_tokens: int) -> dict[str, Evaluation]:
    with exl.load(model, device="cpu", kv_cache="f32", arithmetic="f32", progress=False) as exact:
        chosen, total = [], 0
        for ids in read_documents(text, exact.tokenizer, documents):
            if total >= num_tokens:
                break
            chosen.append(ids)
            total += len(ids)
        found = {}
        for arithmetic in ARITHMETICS:
            with exl.load(model, device="cpu", kv_cache="f32", arithmetic=arithmetic, progress=False) as other:
                found[arithmetic] = evaluate(other, chosen, exact)
        return found


def table(found: dict[str, Evaluation]) -> str:
    lines = ["| arithmetic | KL to f32 | 99th percentile | same likeliest token | loss | loss in f32 |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, result in found.items():
        against = result.against
        lines.append(
            f"| {name} | {against.kl_mean:.1e} | {against.kl_99th:.1e} | {100 * against.top1_agreement:.2f} % "
            f"| {result.loss:.5f} | {against.reference_loss:.5f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--documents", default="auto")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--json", metavar="NAME")
    options = parser.parse_args()
    model = None if options.model == "bundled" else options.model
    found = measure(model, options.text, options.documents, options.tokens)
    print(table(found))
    if options.json:
        rows = {name: vars(result) | {"against": vars(result.against)} for name, result in found.items()}
        path = RESULTS / f"{options.json}.json"
        path.write_text(json.dumps({"machine": machine(), "model": options.model, "arithmetic": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
