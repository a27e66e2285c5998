from __future__ import annotations

import json
from typing import Annotated

import typer

from exl.commands.options import Debug


def info(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
    debug: Debug = False,
) -> None:
    """Versions, the GPU, where compiled kernels are kept, and what is missing.

    exl info
    """
    from exl.commands.system_info import describe_system

    facts = describe_system()
    if as_json:
        print(json.dumps(facts))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
