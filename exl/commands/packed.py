from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from exl.commands.common import say
from exl.commands.options import Debug
from exl.commands.usage import judge_numbers

packed_app = typer.Typer(
    help="Show or remove packed copies of models.",
    epilog="A packed copy is made when a model is streamed from disk.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
PackedFolder = Annotated[Path | None, typer.Option("--folder", help="Default: the user's cache folder.")]


@packed_app.command("list")
@judge_numbers
def packed_list(folder: PackedFolder = None, debug: Debug = False) -> None:
    """Show packed copies, last used first.

    A line has the copy's size in bytes, its model and its file.
    """
    from exl.weights.packed_store import list_packed

    for found in list_packed(folder):
        print(f"{found.num_bytes:>15,}  {found.source or 'damaged, or of another version'}  {found.path}")


@packed_app.command("clear")
@judge_numbers
def packed_clear(
    model: Annotated[Path | None, typer.Argument(help="Only the files of this model.")] = None,
    folder: PackedFolder = None,
    debug: Debug = False,
) -> None:
    """Remove packed copies. They are made again when they are needed."""
    from exl.weights.packed_store import clear_packed

    removed = clear_packed(folder, model)
    say(f"removed {len(removed)} packed files, {sum(found.num_bytes for found in removed):,} bytes")
