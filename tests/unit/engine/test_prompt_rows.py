"""What is asked of a prompt's rows after its pass, over a device without a model: logits of whole texts, and
log-probabilities of the prompt, pooled states."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from exl.batch import PAGE_SIZE
from exl.engine.request import Outcome, TokenRequest
from exl.engine.ticket import Ticket
from exl.errors import ConfigError
from exl.sampling_params import SamplingParams
from tests.unit.engine.fake_device import FakeDevice
from tests.unit.engine.fake_requests import World, alone, results
from tests.unit.engine.test_scheduler import DEVICES, prompt, request, run_all

CONTEXT = 6 * PAGE_SIZE


def whole(ids: list[int]) -> TokenRequest:
    return TokenRequest(ids, SamplingParams(max_tokens=0), reuse_prefix=False, wants_all=True)


def logits_of(world: World, ticket: Ticket) -> torch.Tensor:
    return torch.cat([event.logits for event in world.events[ticket] if event.logits is not None])


def alone_logits(world: World, ids: list[int]) -> torch.Tensor:
    device = world.device
    own = World(FakeDevice(64, chunk=device.chunk, invariant_rows=device.invariant_rows), CONTEXT)
    ticket = own.submit(whole(ids))
    own.run()
    return logits_of(own, ticket)


@pytest.mark.parametrize(("keeps_all_rows", "steps"), [(True, 2), (False, 5)])
def test_a_text_takes_as_many_chunks_in_a_step_as_a_prompt(keeps_all_rows: bool, steps: int) -> None:
    world = World(FakeDevice(16, chunk=32, step_tokens=96, keeps_all_rows=keeps_all_rows))
    ticket = world.submit(whole(prompt(150)))
    world.run()
    assert world.device.log.count("step") == steps
    sizes = [len(event.logits) for event in world.events[ticket] if event.logits is not None]
    assert sum(sizes) == 150
    assert max(sizes) == world.device.max_logit_rows == 24


@pytest.mark.parametrize("keeps_all_rows", [True, False])
@pytest.mark.parametrize("runs_ahead", [True, False])
@pytest.mark.parametrize("invariant_rows", DEVICES)
def test_texts_and_requests_in_one_batch(invariant_rows: int, runs_ahead: bool, keeps_all_rows: bool) -> None:
    """Each gets what it gets alone, and nobody waits until a text is done."""
    device = FakeDevice(24, chunk=32, invariant_rows=invariant_rows, runs_ahead=runs_ahead, max_sequences=6)
    device.keeps_all_rows = keeps_all_rows
    world = World(device, CONTEXT)
    texts = [prompt(200), prompt(3, 1), prompt(60, 2), [5]]
    first = [world.submit(whole(ids)) for ids in texts[:2]]
    requests = [request(prompt(20 + i, i), 12, seed=i, num_choices=1 + i) for i in range(2)]
    tickets = [world.submit(one) for one in requests]
    first += [world.submit(whole(ids)) for ids in texts[2:]]
    while not first[0].ended:
        world.scheduler.step()
        world.check()
        assert first[0].ended or world.stats.steps < 12
    run_all(world, requests)
    for ids, ticket in zip(texts, first, strict=True):
        assert ticket.error is None
        assert torch.equal(logits_of(world, ticket), alone_logits(world, ids)), len(ids)
    assert all(ticket.ended for ticket in tickets)


def test_a_text_has_the_bits_of_a_prompt() -> None:
    """Its chunks are those of a prompt: whoever begins like it reuses them, and goes on as if it had computed them."""
    for invariant_rows in DEVICES:
        world = World(FakeDevice(24, chunk=64, invariant_rows=invariant_rows), CONTEXT)
        ticket = world.submit(whole(prompt(150)))
        world.run()
        (answered,) = run_all(world, [request(prompt(150), 5, temperature=0.0)])
        assert answered.answers[0].num_reused >= 128
        assert answered.answers[0].token_ids[0] == int(logits_of(world, ticket)[-1].argmax())


@pytest.mark.parametrize("keeps_all_rows", [True, False])
def test_the_logits_of_one_step_wait_for_their_reader_and_no_more(keeps_all_rows: bool) -> None:
    device = FakeDevice(16, chunk=32, step_tokens=96, keeps_all_rows=keeps_all_rows)
    world = World(device, CONTEXT)
    ticket = world.submit(whole(prompt(200)), most_unread=1)
    waiting = 96 if keeps_all_rows else 32
    for taken in range(0, 200, waiting):
        for _ in range(3):
            world.scheduler.step()
        assert ticket.num_put - ticket.num_taken == min(waiting, 200 - taken)
        event = ticket.outbox.get_nowait()  # one slice of several
        world.events[ticket].append(event)
        ticket.num_taken += event.num_tokens
        assert ticket.ended or not world.scheduler.step()
        world.take(ticket)
    assert ticket.ended
    assert torch.equal(logits_of(world, ticket), alone_logits(world, prompt(200)))


@pytest.mark.parametrize("runs_ahead", [True, False])
def test_a_head_that_fails_ends_its_request_alone(runs_ahead: bool) -> None:
    world = World(FakeDevice(16, chunk=32, runs_ahead=runs_ahead), CONTEXT)
    ticket = world.submit(whole(prompt(50)))
    head, calls = world.device.prompt_logits, []

    def broken(chunk: int, rows: range) -> torch.Tensor:
        calls.append(rows)
        if len(calls) == 2:
            raise RuntimeError("head")
        return head(chunk, rows)

    world.device.prompt_logits = broken
    run_all(world, [request(prompt(20 + i, i), 12, seed=i) for i in range(2)])
    assert str(ticket.error) == "head"
    assert world.pool.num_free == 16


# ---- log-probabilities


def expected_logprobs(world: World, ids: list[int], count: int) -> list:
    """By the definition, from the logits of the whole text."""
    rows = torch.log_softmax(alone_logits(world, ids).double(), -1)
    found: list = [None]
    for row, token_id in zip(rows, ids[1:], strict=False):
        top = row.topk(count)
        found.append([(token_id, float(row[token_id])), *zip(top.indices.tolist(), top.values.tolist(), strict=True)])
    return found


def check_logprobs(world: World, ticket: Ticket) -> None:
    assert ticket.error is None
    request = ticket.request
    for answer in ticket.answers:
        assert len(answer.prompt_ranked) == len(request.prompt_ids)
        expected = expected_logprobs(world, request.prompt_ids, request.prompt_logprobs)
        for ranked, wanted in zip(answer.prompt_ranked, expected, strict=True):
            assert (ranked is None) == (wanted is None)
            for (token_id, value), (other, right) in zip(ranked or (), wanted or (), strict=True):
                assert token_id == other
                assert abs(value - right) < 1e-9


@pytest.mark.parametrize("keeps_all_rows", [True, False])
@pytest.mark.parametrize("runs_ahead", [True, False])
@pytest.mark.parametrize("invariant_rows", DEVICES)
def test_log_probabilities_of_prompts_in_company(invariant_rows: int, runs_ahead: bool, keeps_all_rows: bool) -> None:
    """Long ones and some that run as decode rows, alone and with several choices, with an answer and without; answers
    are those without them."""
    device = FakeDevice(24, chunk=32, invariant_rows=invariant_rows, runs_ahead=runs_ahead, max_sequences=5)
    device.keeps_all_rows, device.step_tokens = keeps_all_rows, 96 if keeps_all_rows else 32
    world, requests = World(device), []
    for i, (length, num_choices, most) in enumerate(
        [(150, 1, 5), (40, 3, 6), (3, 2, 5), (70, 3, 0), (1, 1, 4), (9, 1, 1)]
    ):
        asked = {"prompt_logprobs": 2, "num_choices": num_choices, "speculate": "prompt" if i % 2 else None}
        requests += [request(prompt(length, i), most, seed=i, **asked), request(prompt(20, i), 12, seed=i)]
    tickets = run_all(world, requests)
    for ticket in tickets[::2]:
        check_logprobs(world, ticket)
        plain = World(FakeDevice(24, chunk=32, invariant_rows=invariant_rows))
        (without,) = run_all(plain, [replace(ticket.request, prompt_logprobs=None)])
        assert [a.token_ids for a in without.answers] == [a.token_ids for a in ticket.answers]
    scored = tickets[6]
    assert {str(answer.outcome) for answer in scored.answers} == {str(Outcome("length", limit="max_tokens"))}
    assert [answer.token_ids for answer in scored.answers] == [[], [], []]
    assert world.device.rows["prompt"] + world.device.rows["decode"] > 150 + 40 + 70


def test_log_probabilities_take_nothing_from_the_cache_and_leave_it_to_others() -> None:
    world = World(FakeDevice(16))
    for reuse in (True, "exact"):
        (ticket,) = run_all(world, [request(prompt(150), 2, prompt_logprobs=1, reuse_prefix=reuse)])
        assert ticket.answers[0].num_reused == 0
        check_logprobs(world, ticket)
    (ticket,) = run_all(world, [request(prompt(150), 2)])
    assert ticket.answers[0].num_reused == 149


@pytest.mark.parametrize("invariant_rows", DEVICES)
def test_log_probabilities_come_once_though_their_prompt_is_paused(invariant_rows: int) -> None:
    world = World(FakeDevice(4, chunk=32, step_tokens=32, invariant_rows=invariant_rows))
    ticket = world.submit(request(prompt(100), 3, prompt_logprobs=1))
    for _ in range(2):
        world.scheduler.step()
    assert len(ticket.answers[0].prompt_ranked) == 65
    world.scheduler.lineup.pause(ticket.sequences[0])
    world.pool.clear()
    world.run()
    check_logprobs(world, ticket)
    assert results(world, ticket) == alone(ticket.request, world.device)


def test_a_prompt_that_fills_the_context_is_scored() -> None:
    world = World(FakeDevice(2), context=2 * PAGE_SIZE)
    ticket = world.submit(request(prompt(2 * PAGE_SIZE - 1), 9, prompt_logprobs=0, num_choices=2))
    world.run()
    assert len(ticket.answers[1].prompt_ranked) == 2 * PAGE_SIZE - 1
    full = World(FakeDevice(3), context=2 * PAGE_SIZE)
    ticket = full.submit(request(prompt(2 * PAGE_SIZE), 9, prompt_logprobs=0))
    full.run()
    assert ticket.answers[0].outcome == Outcome("length", limit="context")
    assert len(ticket.answers[0].prompt_ranked) == 2 * PAGE_SIZE


def score(context: list[int], continuation: list[int]) -> TokenRequest:
    return TokenRequest(
        [*context, *continuation][:-1], SamplingParams(max_tokens=0), scored_ids=continuation, reuse_prefix="exact"
    )


def check_score(world: World, ticket: Ticket) -> None:
    """By the definition, from the logits of the whole text."""
    assert ticket.error is None
    request = ticket.request
    rows = torch.log_softmax(alone_logits(world, list(request.prompt_ids)).double(), -1)[-len(request.scored_ids) :]
    found = ticket.answers[0].prompt_ranked
    assert len(found) == len(request.scored_ids)
    for ranked, row, token_id in zip(found, rows, request.scored_ids, strict=True):
        (own, value), (best, highest) = ranked
        assert (own, best) == (token_id, int(row.argmax()))
        assert abs(value - float(row[token_id])) < 1e-9
        assert abs(highest - float(row.max())) < 1e-9


@pytest.mark.parametrize("runs_ahead", [True, False])
@pytest.mark.parametrize("invariant_rows", DEVICES)
def test_scores_of_continuations_in_company(invariant_rows: int, runs_ahead: bool) -> None:
    """Beside answers, and beside others of the same context, which is computed once."""
    device = FakeDevice(24, chunk=32, invariant_rows=invariant_rows, runs_ahead=runs_ahead, max_sequences=5)
    world, shared = World(device), prompt(150)
    requests = [score(shared, prompt(length, length)) for length in (1, 3, 40, 1, 100)]
    requests += [request(prompt(20 + i, i), 12, seed=i) for i in range(2)]
    requests += [score([3], [4]), score([3], prompt(70, 2)), score(shared[:1], shared[1:])]
    tickets = run_all(world, requests)
    for ticket in [*tickets[:5], *tickets[7:]]:
        check_score(world, ticket)
        assert ticket.answers[0].num_reused <= len(ticket.request.prompt_ids) - len(ticket.request.scored_ids)
    assert [ticket.answers[0].num_reused for ticket in tickets[7:]] == [0, 0, 0]
    assert sum(ticket.answers[0].num_reused >= 128 for ticket in tickets[:5]) == 4


@pytest.mark.parametrize("invariant_rows", DEVICES)
def test_a_score_comes_once_though_its_prompt_is_paused(invariant_rows: int) -> None:
    world = World(FakeDevice(4, chunk=32, step_tokens=32, invariant_rows=invariant_rows))
    ticket = world.submit(score(prompt(40), prompt(60, 1)))
    for _ in range(2):
        world.scheduler.step()
    assert len(ticket.answers[0].prompt_ranked) == 64 - 39
    world.scheduler.lineup.pause(ticket.sequences[0])
    world.pool.clear()
    world.run()
    check_score(world, ticket)


def test_a_score_takes_the_whole_context() -> None:
    """The last token of the continuation is only predicted."""
    world = World(FakeDevice(2), context=2 * PAGE_SIZE)
    ticket = world.submit(score(prompt(100), prompt(29, 1)))
    world.run()
    assert len(ticket.request.prompt_ids) == 2 * PAGE_SIZE
    check_score(world, ticket)
    assert ticket.answers[0].outcome == Outcome("stop")
    with pytest.raises(ConfigError, match="continuation: found token id -1"):
        world.submit(score(prompt(5), [3, -1]))


@pytest.mark.parametrize("most", [0, 5])
def test_a_row_of_a_prompt_that_is_no_number_ends_its_request_alone(most: int) -> None:
    world = World(FakeDevice(16, chunk=32, step_tokens=32))
    other = world.submit(request(prompt(20, 1), 12, seed=1))
    world.scheduler.step()
    ticket = world.submit(request(prompt(100), most, prompt_logprobs=1))
    world.device.nan_row = 20  # of the first chunk's rows
    world.run()
    assert "nan" in str(ticket.error)
    assert world.device.zeroed
    assert results(world, other) == alone(other.request, world.device)


# ---- pooled states


def pooling(ids: list[int], how: str) -> TokenRequest:
    return TokenRequest(ids, SamplingParams(max_tokens=0), reuse_prefix=False, pooling=how)


def check_state(world: World, ticket: Ticket) -> None:
    """By the definition, with sums in the order of the tokens; the device's states are its logits."""
    assert ticket.error is None
    states = alone_logits(world, ticket.request.prompt_ids).double().numpy()
    total = states[0]
    for state in states[1:]:
        total = total + state
    expected = states[-1] if ticket.request.pooling == "last" else total / len(states)
    assert ticket.answers[0].embedding.tolist() == expected.astype(np.float32).tolist()


@pytest.mark.parametrize(("invariant_rows", "steps"), [(DEVICES[0], 2), (DEVICES[1], 2), (DEVICES[2], 6)])
def test_states_of_short_texts_come_from_one_batch_where_it_does_not_show(invariant_rows: int, steps: int) -> None:
    world = World(FakeDevice(16, chunk=64, step_tokens=64, max_sequences=4, invariant_rows=invariant_rows))
    tickets = [world.submit(pooling(prompt(12 + i, i), ("mean", "last")[i % 2])) for i in range(6)]
    world.run()
    assert world.stats.steps == steps
    for ticket in tickets:
        check_state(world, ticket)


@pytest.mark.parametrize("keeps_all_rows", [True, False])
@pytest.mark.parametrize("invariant_rows", DEVICES)
def test_states_in_company_and_after_a_pause(invariant_rows: int, keeps_all_rows: bool) -> None:
    device = FakeDevice(12, chunk=32, step_tokens=32, invariant_rows=invariant_rows, keeps_all_rows=keeps_all_rows)
    world = World(device, CONTEXT)
    tickets = [world.submit(pooling(prompt(150 + i, i), how)) for i, how in enumerate(("mean", "last"))]
    others = [request(prompt(20 + i, i), 12, seed=i) for i in range(2)]
    asked = [world.submit(one) for one in others]
    for _ in range(3):
        world.scheduler.step()
    world.scheduler.lineup.pause(tickets[0].sequences[0])
    world.pool.clear()
    world.run()
    for ticket in tickets:
        check_state(world, ticket)
    for ticket in asked:
        assert results(world, ticket) == alone(ticket.request, device)


def test_a_state_that_is_no_number_ends_its_request_alone() -> None:
    world = World(FakeDevice(16, chunk=32, step_tokens=32))
    other = world.submit(request(prompt(20, 1), 12, seed=1))
    world.scheduler.step()
    ticket = world.submit(pooling(prompt(100), "mean"))
    world.device.nan_row = 20
    world.run()
    assert "embed: found a hidden state of nan" in str(ticket.error)
    assert world.device.zeroed
    assert results(world, other) == alone(other.request, world.device)
