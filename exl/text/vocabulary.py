"""Whether two models speak of the same tokens."""

from __future__ import annotations

from exl.errors import ConfigError
from exl.text.tokenizer import Tokenizer


def check_same_vocabulary(target: Tokenizer, draft: Tokenizer) -> None:
    """Raises ``ConfigError`` unless every id has the same bytes in both and is special in both or neither.

    Spelling, merges and templates may differ: drafts are ids. So may the rows of the models' matrices beyond the
    tokens.
    """
    for token_id in range(max(target.vocab_size, draft.vocab_size)):
        wanted, found = _told(target, token_id), _told(draft, token_id)
        if wanted != found:
            raise ConfigError(
                f"draft model: found another vocabulary than the model's, expected the same: token id {token_id} is"
                f" {found} there, and {wanted} in the model"
            )


def _told(tokenizer: Tokenizer, token_id: int) -> str:
    if tokenizer.id_to_token(token_id) is None:
        return "no token"
    kind = "the special token" if token_id in tokenizer.special_ids else "the token"
    return f"{kind} {tokenizer.token_bytes(token_id)!r}"
