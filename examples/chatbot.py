"""A chatbot in the terminal: what `exl chat` does, as a script to copy and change.

python examples/chatbot.py --model path/to/model --system "You are brief."
echo "Tell me a story." | python examples/chatbot.py
"""

from __future__ import annotations

import argparse
import sys

import exl
from exl.commands.chat_partner import LocalModel
from exl.commands.standard_streams import standard_streams
from exl.commands.terminal import run_chat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hugging Face repository (default: the one that ships with exl)")
    parser.add_argument("--system", help="what the model should know before the conversation")
    parser.add_argument("--ram", help="how much RAM exl may use, such as 6GB; layers that do not fit are streamed")
    parser.add_argument("--kv-cache", default="f16", help="f32, f16, q8, k8v4 or q4 (default: f16)")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: the model's own, else greedy)")
    parser.add_argument("--max-tokens", type=int, default=512, help="at most this many per answer (default: 512)")
    args = parser.parse_args()

    settings = {"max_tokens": args.max_tokens}
    if args.temperature is not None:
        settings["temperature"] = args.temperature
    with exl.load(args.model, ram=args.ram, kv_cache=args.kv_cache) as llm:
        run_chat(LocalModel(llm), llm.chat(args.system, overflow="drop-oldest"), settings)


if __name__ == "__main__":
    try:
        with standard_streams():
            main()
    except exl.ExlError as error:
        sys.exit(f"error: {str(error).splitlines()[0]}")
