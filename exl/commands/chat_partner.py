"""Whom a chat in the terminal talks with: a model that is loaded here, or one of a server. What the terminal needs of
either, and no more; torch is imported by those who load a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from exl.commands.prompt_status import PromptStatus
from exl.units import format_bytes

if TYPE_CHECKING:
    from exl.chat import Chat
    from exl.llm import LLM
    from exl.remote_chat import RemoteChat, RemoteModel


class AnyCompletion(Protocol):
    """Of an answer that has ended."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def tokens_per_second(self) -> float: ...

    @property
    def prompt_seconds(self) -> float: ...

    @property
    def limit(self) -> str | None: ...


class AnyStream(Protocol):
    """Pieces of an answer; ``close`` keeps those that were handed out."""

    def __iter__(self) -> Iterator[str]: ...

    def close(self) -> None: ...

    @property
    def completion(self) -> AnyCompletion: ...


class AnyChat(Protocol):
    """A conversation, as ``exl.Chat``."""

    system: str | None

    @property
    def messages(self) -> list[dict[str, Any]]: ...

    @property
    def notice(self) -> str | None: ...

    @property
    def written_with(self) -> str | None: ...

    @property
    def num_tokens(self) -> int | None: ...

    @property
    def num_forgotten(self) -> int: ...

    def stream(self, text: str | None, **options: Any) -> AnyStream: ...

    def stream_retry(self, **options: Any) -> AnyStream: ...

    def stream_continue(self, **options: Any) -> AnyStream: ...

    def undo(self) -> str: ...

    def reset(self) -> None: ...

    def save(self, path: str) -> None: ...


class Partner(Protocol):
    """Who answers."""

    @property
    def name(self) -> str:
        """Of the model."""

    @property
    def context(self) -> int | None:
        """Tokens that a conversation may have; None: not known."""

    def new_chat(self, system: str | None, overflow: str) -> AnyChat: ...

    def load_chat(self, path: str, overflow: str) -> AnyChat: ...

    def describe(self) -> str:
        """One line for the start of a chat."""

    def memory(self) -> list[str]:
        """Of the status line; empty: not known."""

    def facts(self) -> list[str]:
        """More lines for /stats."""

    def watched(self, status: PromptStatus) -> dict[str, Any]:
        """Options of a request that let ``status`` tell what is waited for, and end it."""


class LocalModel:
    """A model that is loaded in this process."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    @property
    def name(self) -> str:
        return self.llm.folder.name

    @property
    def context(self) -> int:
        return self.llm.context

    def new_chat(self, system: str | None, overflow: str) -> Chat:
        return self.llm.chat(system, overflow=overflow)

    def load_chat(self, path: str, overflow: str) -> Chat:
        from exl.chat import Chat

        return Chat.load(self.llm, path, overflow=overflow)

    def describe(self) -> str:
        llm = self.llm
        kind = "dense" if llm.quant is None else f"{llm.quant.bits}-bit"
        where = " and ".join(llm.plan.devices)
        return " | ".join([self.name, f"{kind} {llm.config.family}", where, *self.memory(), f"context {llm.context}"])

    def memory(self) -> list[str]:
        return [f"memory {format_bytes(self.llm.plan.num_bytes)}"]

    def facts(self) -> list[str]:
        return self.llm.plan.table().splitlines()

    def watched(self, status: PromptStatus) -> dict[str, Any]:
        return {"prompt_progress": status.update}


class ServerModel:
    """A model of a server."""

    def __init__(self, remote: RemoteModel) -> None:
        self.remote = remote

    @property
    def name(self) -> str:
        return self.remote.name

    @property
    def context(self) -> int | None:
        return self.remote.context

    def new_chat(self, system: str | None, overflow: str) -> RemoteChat:
        return self.remote.chat(system, overflow=overflow)

    def load_chat(self, path: str, overflow: str) -> RemoteChat:
        return self.remote.load_chat(path, overflow=overflow)

    def describe(self) -> str:
        context = [] if self.context is None else [f"context {self.context}"]
        return " | ".join([self.name, self.remote.url, *context])

    def memory(self) -> list[str]:
        return []

    def facts(self) -> list[str]:
        return [f"{self.name} at {self.remote.url}"]

    def watched(self, status: PromptStatus) -> dict[str, Any]:
        return {"on_wait": status.wait}
