"""Attacks of the tests, named as ``rigged_attacks:Class``."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.functional import cross_entropy

from adversaries.membership.base import MembershipAttack, RoundStatistic
from adversaries.needs import Needs
from adversaries.reconstruction.algebra.analytic import Analytic
from adversaries.seats import MaliciousClient
from fedattack.defenses import ClientDefenses, build_defenses


class Diary(MaliciousClient, MembershipAttack):
    """Trains on black images with label 0, sends the update doubled, and remembers what it saw."""

    keeps_memory = True

    def see(self, view):
        """Count the rounds, and keep their number, its seed and one weight."""
        assert self.asks_early or view.question is None
        seen = view.memory.get("seen", torch.zeros(0, 3, dtype=torch.float64))
        weight = float(next(iter(view.weights.values())).flatten()[0])
        row = torch.tensor([[view.round, view.seed % 2**40, weight]], dtype=torch.float64)
        view.memory["seen"] = torch.cat([seen, row])

    def poison(self, view, images, labels):
        """Black images of class 0."""
        return torch.zeros_like(images), torch.zeros_like(labels)

    def reply(self, view, update):
        """Twice the update."""
        return {name: 2 * tensor for name, tensor in update.items()}

    def answer(self, view, question):
        """The diary, and nothing about the question."""
        return {"scores": torch.zeros(len(question.labels), dtype=torch.float64), "seen": view.memory["seen"]}


class Told(Diary):
    """Has the question before it, and remembers it."""

    asks_early = True

    def see(self, view):
        """As the diary, and the labels of the question."""
        super().see(view)
        view.memory["told"] = view.question.labels

    def answer(self, view, question):
        """What it was told."""
        return super().answer(view, question) | {"told": view.memory["told"]}


class Failing(RoundStatistic):
    """Cannot read what it sees."""

    def measure(self, view):
        """Nothing."""
        raise ValueError("too odd to read")


class SecondRound(RoundStatistic):
    """Cannot read the second round."""

    def measure(self, view):
        """Cosines."""
        if view.round == 2:
            raise ValueError("the second round is too odd")
        return view.cosines


class OfSome(RoundStatistic):
    """Concludes nothing about client 4, and nonsense about client 5."""

    def measure(self, view):
        """Cosines."""
        return view.cosines

    def scores(self, rounds, target, knowledge):
        """NaN about client 5."""
        if target == 4:
            raise ValueError("nobody knows client 4")
        found = super().scores(rounds, target, knowledge)
        return replace(found, scores=found.scores * float("nan")) if target == 5 else found


class AgainstReferences(RoundStatistic):
    """How far the mean loss under the reference models that never saw a candidate lies above the client's."""

    needs = Needs(references=4)

    def measure(self, view):
        """Minus the losses under the clients' models."""
        return -view.client_losses

    def scores(self, rounds, target, knowledge):
        """Above their mean loss; `details` tell how many there were."""
        found, held = super().scores(rounds, target, knowledge), knowledge.references
        labels = knowledge.candidates.labels.expand(len(held), -1)
        losses = cross_entropy(held.logits.transpose(1, 2), labels, reduction="none")
        never = ~held.trained_on
        easy = (losses * never).sum(0) / never.sum(0)
        return replace(found, scores=found.scores + easy.double(), details={"references": len(held)})


class Silent(Diary):
    """Has no answer."""

    def answer(self, view, question):
        """None."""
        raise KeyError("nothing to say")


class Undeclared(Diary):
    """Keeps memory and does not say so."""

    keeps_memory = False


class Shortening(MaliciousClient, MembershipAttack):
    """Trains on fewer samples than it was given."""

    def poison(self, view, images, labels):
        """All but the first."""
        return images[1:], labels[1:]


class SeedOracle(Analytic):
    """Draws the client's noise again from what it is handed, takes it off, and divides."""

    def run(self, observations, seed, device, progress=None):
        """Attack what is left when the noise is subtracted."""
        cleaned = []
        for o in observations:
            dense = {name: torch.zeros_like(tensor) for name, tensor in o.update.dense().items()}
            defended = ClientDefenses(
                list(build_defenses(o.scenario.defense).values()), seed, o.round, o.client
            )
            noise = torch.cat([tensor.flatten() for tensor in defended.update(dense).values()])
            cleaned.append(_with_values(o, o.update.values - noise))
        return super().run(cleaned, seed, device)


def _with_values(observation, values):
    return replace(observation, update=replace(observation.update, values=values))
