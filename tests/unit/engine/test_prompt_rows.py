"""What is asked of a prompt's rows after its pass, over a device without a model: logits of whole texts."""

from __future__ import annotations

import pytest
import torch

from exl.batch import PAGE_SIZE
from exl.engine.request import TokenRequest
from exl.engine.ticket import Ticket
from exl.sampling_params import SamplingParams
from tests.unit.engine.fake_device import FakeDevice
from tests.unit.engine.fake_requests import World
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
