"""What a deletion request says on the wire, and what a desk keeps of it."""

from __future__ import annotations

import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fedattack.config import CompressionConfig, ModelConfig, TrainingConfig
from fedattack.observation import Scenario, UnlearningRequest
from strategies.forgetting import MAX_RECORDS, MAX_WAITING, DeletionDesk, deletion_records, parted
from strategies.messages import tag_of

SCENARIO = Scenario(
    ModelConfig(name="mlp", classes=4, channels=1, image_size=6), TrainingConfig(), CompressionConfig()
)
SIZE = 10
IMAGES = torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 3, 1])
KINDS = [
    UnlearningRequest(4, (7, 2), "moving out"),
    UnlearningRequest(4, images=IMAGES, labels=LABELS),
    UnlearningRequest(4, label=3),
    UnlearningRequest(4, everything=True),
]


def desk() -> DeletionDesk:
    return DeletionDesk(SCENARIO, {4: SIZE, 5: SIZE})


def named(position: int, tag: str = "a") -> ConfigRecord:
    return ConfigRecord({"client": 4, "kind": "positions", "positions": [position], "tag": tag})


def test_all_kinds_arrive_as_they_were_sent() -> None:
    records = deletion_records([(f"tag {n}", one) for n, one in enumerate(KINDS)])
    reply = RecordDict({"metrics": MetricRecord({"loss": 1.0}), **records})
    rest, asked = parted(reply)
    assert list(rest) == ["metrics"]
    assert asked == records
    at = desk()
    at.take(1, 4, asked)
    waiting = at.close(1)
    assert [(tag, sender) for tag, sender, _ in waiting] == [(f"tag {n}", 4) for n in range(4)]
    assert [request for _, _, request in waiting] == KINDS
    _, _, brought = waiting[1]
    assert torch.equal(brought.images, IMAGES)
    assert torch.equal(brought.labels, LABELS)
    assert not at.verdicts
    assert parted(RecordDict({"metrics": MetricRecord({"loss": 1.0})}))[1] == {}


def test_who_speaks_is_whose_message_it_is() -> None:
    at = desk()
    at.take(2, 5, deletion_records([("tag", KINDS[0])]))
    at.take(3, 6, deletion_records([("tag", UnlearningRequest(6, (1,)))]))
    assert not at.close(3)
    assert [(one.round, one.client, one.tag) for one in at.verdicts] == [(2, 5, "tag"), (3, 6, "tag")]
    assert [one.reason for one in at.verdicts] == [
        "names client 4; a client may only speak for itself",
        "the sender registered no samples",
    ]


def test_what_waits_is_bounded_over_rounds_and_tags() -> None:
    at = desk()
    for round in range(2 * MAX_WAITING):
        at.take(round, 4, {"deletion.0": named(round % SIZE, f"tag {round % (2 * MAX_RECORDS)}")})
    reasons = {one.reason for one in at.verdicts}
    assert len(at.close(0)) == MAX_WAITING
    assert reasons == {
        f"{MAX_RECORDS} tags of this client's requests are known; no more are taken",
        f"{MAX_WAITING} requests of this client wait already; no more are taken",
    }
    at = desk()
    for round in range(SIZE + 5):
        at.take(round, 4, {"deletion.0": named(round % SIZE)})
    assert [request.positions for _, _, request in at.close(0)] == [(position,) for position in range(SIZE)]


def test_a_desk_that_closed_says_when() -> None:
    at = desk()
    at.take(1, 4, {"deletion.0": named(1)})
    assert len(at.close(3)) == 1
    at.take(4, 4, {"deletion.0": named(2)})
    assert [one.reason for one in at.verdicts] == ["requests were served after round 3; it comes too late"]


def test_a_tag_tells_nothing_and_differs() -> None:
    tags = {tag_of(seed, name) for seed in (0, 1) for name in ("unlearn-max-loss", "fedmia")}
    assert len(tags) == 4
    assert all("unlearn" not in tag and "mia" not in tag for tag in tags)
