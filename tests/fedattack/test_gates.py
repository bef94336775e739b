"""Each gate alone, before a desk whose figures are known, and whose settings are read as those of other plug-ins."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedattack.config import CompressionConfig, Config, ModelConfig, TrainingConfig
from fedattack.errors import ConfigError, NotApplicable
from fedattack.models import build_model, initial_weights
from fedattack.observation import Auxiliary, Scenario
from fedattack.unlearning import Deletion, Registered, Weights
from fedattack.unlearning.federaser import FedEraser
from fedattack.unlearning.gates import GATES, Desk, build_gates, judge_after, judge_before
from fedattack.unlearning.gates.cap import Cap
from fedattack.unlearning.gates.digest import Digest
from fedattack.unlearning.gates.guard import Guard
from fedattack.unlearning.gates.label import Label
from fedattack.unlearning.gates.loss import Loss
from fedattack.unlearning.gates.ownership import Ownership
from fedattack.unlearning.gates.rate import Rate

MODEL = ModelConfig(name="mlp", classes=4, channels=1, image_size=6, activation="relu")
SCENARIO = Scenario(MODEL, TrainingConfig(), CompressionConfig(name="none"))
IMAGES = torch.rand(10, 1, 6, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(10) % 4
SALT = b"of client 1"
WEIGHTS = initial_weights(MODEL, 0)
LOSSES = [1.0] * 8 + [5.0, 9.0]
"""Of the client's samples, as it says."""


def mean_loss(client: int, positions) -> float | None:
    left = [loss for position, loss in enumerate(LOSSES) if position not in positions]
    return sum(left) / len(left) if left else None


def moved(by: float) -> Weights:
    """A model at that distance from :data:`WEIGHTS`."""
    weights = dict(WEIGHTS)
    name = next(name for name in weights if name.endswith("weight"))
    step = torch.zeros_like(weights[name])
    step.view(-1)[3] = by
    return weights | {name: weights[name] + step}


def desk(**changes) -> Desk:
    registered = Registered.of(IMAGES, LABELS, SALT)
    facts = {
        "round": 3,
        "scenario": SCENARIO,
        "weights": WEIGHTS,
        "forgotten": {1: frozenset({9})},
        "sizes": [30, 10],
        "registered": lambda client: registered,
        "mean_loss": mean_loss,
        "control": lambda deletions: moved(2.0),
    }
    return Desk(**(facts | changes))


def brought(places: list[int], images: Tensor = IMAGES, labels: Tensor = LABELS) -> Deletion:
    return Deletion(1, images=images[places], labels=labels[places])


def test_digests_are_salted_and_of_pixels_alone() -> None:
    mine, others = Registered.of(IMAGES, LABELS, SALT), Registered.of(IMAGES, LABELS, b"another")
    salt = SALT.ljust(16, b"\0")
    wanted = hashlib.blake2b(IMAGES[4].numpy().tobytes(), digest_size=16, salt=salt).digest()
    assert mine.pixels[4] == wanted
    assert not set(mine.pixels) & set(others.pixels)
    assert mine.digests(IMAGES[[4]].clone()) == [wanted]
    assert mine.find(IMAGES[[4, 4, 9, 2]], LABELS[[4, 4, 9, 2]], {9}) == [4, None, None, 2]


CHANGED = IMAGES.clone()
CHANGED[2, 0, 0, 0] += 1 / 255
WRONG = (LABELS + 1) % 4


@pytest.mark.parametrize(
    ("deletion", "ownership", "digest", "label"),
    [
        (brought([1, 5]), None, None, None),
        (brought([1, 2], CHANGED), "1 of 2 samples were not registered", "1 of 2 samples are none", None),
        (
            brought([1, 2], IMAGES, WRONG),
            None,
            "2 of 2 samples are none",
            "2 of 2 samples were registered under another",
        ),
        (brought([1, 1]), None, "1 of 2 samples are none", None),
        (brought([1, 9]), None, "1 of 2 samples are none", None),  # 9 is forgotten
        (Deletion(1, frozenset({1, 2})), None, None, None),
    ],
    ids=["own", "one pixel", "wrong labels", "the same twice", "forgotten", "positions"],
)
def test_what_was_registered(
    deletion: Deletion, ownership: str | None, digest: str | None, label: str | None
) -> None:
    for gate, wanted in ((Ownership(), ownership), (Digest(), digest), (Label(), label)):
        said = gate.before(deletion, desk())
        assert said is None if wanted is None else wanted in said, type(gate).__name__


def test_rates_count_what_was_granted() -> None:
    def said(gate: Rate, count: int, **granted: int) -> str | None:
        earlier = {int(client.removeprefix("c")): number for client, number in granted.items()}
        return gate.before(Deletion(1, frozenset(range(count))), desk(granted=earlier))

    assert said(Rate(least=0, share=0.3, total=1), 3) is None
    assert (
        said(Rate(least=0, share=0.3, total=1), 4)
        == "4 of this client's 10 samples; gates.rate.share lets a share of 0.3 go"
    )
    assert said(Rate(least=0, share=0.3, total=1), 2, c1=1) is None
    assert "3 of this" not in str(said(Rate(least=0, share=0.3, total=1), 3, c1=1))
    assert "4 of this client's 10" in said(Rate(least=0, share=0.3, total=1), 3, c1=1)
    assert said(Rate(least=0, share=1, total=0.1), 4) is None
    assert (
        said(Rate(least=0, share=1, total=0.1), 4, c0=1)
        == "5 of all 40 samples; gates.rate.total lets a share of 0.1 go"
    )
    assert said(Rate(share=0.1, total=0.01, least=3), 3) is None
    assert "4 of this client's 10" in said(Rate(share=0.1, least=3), 4)
    assert said(Rate(share=1, total=1, limit=2), 3) == "3 samples of this client; gates.rate.limit lets 2 go"


def test_unusual_losses() -> None:
    # Of positions it has the client's word: 9 is forgotten, 8 has a loss of 5 and the others 1.
    assert Loss(factor=3).before(Deletion(1, frozenset({0, 3})), desk()) is None
    said = Loss(factor=3).before(Deletion(1, frozenset({0, 8})), desk(forgotten={}))
    assert said is None, "mean 3 of the requested, 2 of the others"
    said = Loss(factor=3).before(Deletion(1, frozenset({8})), desk())
    assert said == "mean loss 5, that of the client's others 1; gates.loss.factor is 3"
    assert Loss(factor=6).before(Deletion(1, frozenset({8})), desk()) is None
    assert "no other samples" in Loss().before(Deletion(1, frozenset(range(9))), desk())
    # Of samples that are brought it computes the loss itself.
    model = build_model(MODEL).eval()
    model.load_state_dict(WEIGHTS)
    with torch.no_grad():
        mine = float(functional.cross_entropy(model(IMAGES[[1, 2]]), LABELS[[1, 2]]))
    others = mean_loss(1, {9})
    assert others is not None
    for factor, refused in ((0.99 * mine / others, True), (1.01 * mine / others, False)):
        said = Loss(factor=factor).before(brought([1, 2]), desk())
        assert (said is not None) is refused
    assert f"mean loss {mine:.3g}," in Loss(factor=0.5 * mine / others).before(brought([1, 2]), desk())


def test_caps_on_the_way_of_the_weights() -> None:
    some = [Deletion(1, frozenset({1}))]
    assert Cap(factor=2).after(some, moved(3.9), desk()) is None
    said = Cap(factor=2).after(some, moved(4.1), desk())
    assert said == (
        "the weights would move by 4.1, by 2 if as many random samples were forgotten; gates.cap.factor is 2"
    )

    def control(deletions):
        raise AssertionError("an absolute limit asks for no comparison")

    assert Cap(limit=1).after(some, moved(0.99), desk(control=control)) is None
    assert Cap(limit=1).after(some, moved(1.01), desk(control=control)).endswith("1.01; gates.cap.limit is 1")


def test_the_guard_watches_its_own_images() -> None:
    model = build_model(MODEL).eval()
    model.load_state_dict(WEIGHTS)
    with torch.no_grad():
        right = model(IMAGES).argmax(1)
    public = Auxiliary(IMAGES, right)  # on which the model errs nowhere
    bias = next(name for name in WEIGHTS if name.endswith("bias") and len(WEIGHTS[name]) == 4)
    away = WEIGHTS | {bias: WEIGHTS[bias] + torch.tensor([0.0, 0.0, 0.0, 100.0])}  # now it calls all 3
    kept = float((right == 3).float().mean())
    assert kept < 0.9
    some = [Deletion(1, frozenset({1}))]
    said = Guard(drop=0.05).after(some, away, desk(auxiliary=public))
    assert said == (
        f"accuracy on the server's 10 images would fall from 1.000 to {kept:.3f}; gates.guard.drop is 0.05"
    )
    assert Guard(drop=1).after(some, away, desk(auxiliary=public)) is None
    assert Guard(drop=0).after(some, dict(WEIGHTS), desk(auxiliary=public)) is None
    for lacking in (None, Auxiliary(IMAGES), Auxiliary(IMAGES[:0], right[:0])):
        with pytest.raises(NotApplicable, match="gate 'guard' watches the accuracy"):
            Guard().check("guard", FedEraser(), lacking)
    Guard().check("guard", FedEraser(), public)


def test_all_gates_say_what_they_think_and_one_refusal_is_enough() -> None:
    gates = build_gates(
        Config.from_mapping(
            {"gates": "digest,rate,cap", "gates.rate.share": 0.3, "gates.rate.least": 0, "gates.total": 1}
        ).gates
    )
    at = desk()
    asked = [brought([1, 2], CHANGED), brought([1, 2]), brought([3, 4])]
    granted, verdicts = judge_before(gates, asked, at)
    assert granted == [asked[1]]
    assert [(one.gate, one.accepted) for one in verdicts] == [
        ("digest", False), ("rate", True), ("digest", True), ("rate", True), ("digest", True), ("rate", False)
    ]  # fmt: skip
    assert "4 of this client's 10" in verdicts[-1].reason, (
        "what was granted counts, what was refused does not"
    )
    assert {(one.round, one.client, one.samples) for one in verdicts} == {(3, 1, 2)}
    (said,) = judge_after(gates, granted, moved(100.0), at)
    assert (said.gate, said.accepted) == ("cap", False)


def test_settings_of_gates() -> None:
    assert set(GATES.names()) >= {"ownership", "digest", "label", "rate", "loss", "cap", "guard"}
    config = Config.from_mapping({"gates": "rate,cap", "gates.rate.limit": "7", "gates.cap.limit": ""})
    assert build_gates(config.gates) == {"rate": Rate(limit=7), "cap": Cap(limit=None)}
    assert Config.from_mapping({}, {"gates": {"names": ["rate"]}}).gates.names == ("rate",)
    for settings, reason in (
        ({"gates": "digset"}, "unknown gate 'digset'.*'digest'"),
        ({"gates": "rate", "gates.rate.limits": 3}, r"'gates.rate.limits'.*gates.rate.limit"),
        ({"gates": "rate", "gates.rate.share": 3}, r"'gates.rate.share' = 3"),
        ({"gates": "rate", "gates.cap.limit": 3}, "parameters of 'cap' are set, but it is not in"),
        ({"gates": "rate,rate"}, "name each gate once"),
    ):
        with pytest.raises(ConfigError, match=reason):
            build_gates(Config.from_mapping(settings).gates)
