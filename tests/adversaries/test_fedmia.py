"""FedMIA on a small federation that is really trained: sklearn's digits with 20 % wrong labels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from membership_scenes import as_update, build_as, gradients, top_k
from scipy.stats import norm
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional

from adversaries.membership.knowledge import Knowledge
from adversaries.membership.updates.fedmia import FedMIA, _not_outlying, one_tailed
from adversaries.membership.view import RoundView, client_model, same_weights
from fedattack.config import CompressionConfig, ModelConfig, TrainingConfig
from fedattack.errors import NotApplicable, PayloadError
from fedattack.models import build_model, initial_weights
from fedattack.observation import Candidates, Observation, Scenario

CPU = torch.device("cpu")
CLIENTS, EACH, ROUNDS, STEPS, BATCH, RATE = 10, 120, 25, 20, 20, 0.3
OBSERVED = (5, 10, 15, 20, 25)


@dataclass
class Federation:
    """The recorded run: what the server saw, the clients' samples, and samples nobody trained on."""

    observations: list[Observation]
    parts: list[Candidates]
    held_out: Candidates


def joined(*parts: Candidates) -> Candidates:
    return Candidates(torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]))


@pytest.fixture(scope="module")
def federation() -> Federation:
    digits = load_digits()
    rng = np.random.default_rng(0)
    order = rng.permutation(len(digits.target))
    labels = np.where(rng.random(len(order)) < 0.2, rng.integers(0, 10, len(order)), digits.target)
    images = torch.tensor(digits.images[order], dtype=torch.float32)[:, None] / 16
    targets = torch.tensor(labels[order], dtype=torch.int64)
    parts = [
        Candidates(images[k * EACH : (k + 1) * EACH], targets[k * EACH : (k + 1) * EACH])
        for k in range(CLIENTS)
    ]
    held_out = Candidates(images[CLIENTS * EACH :], targets[CLIENTS * EACH :])

    scenario = Scenario(
        ModelConfig(name="mlp", classes=10, channels=1, image_size=8, activation="relu"),
        TrainingConfig(protocol="fedavg", batch_size=BATCH, local_steps=STEPS, learning_rate=RATE),
        CompressionConfig(name="none"),
    )
    model = build_model(scenario.model)
    weights = initial_weights(scenario.model, seed=0)
    observations = []
    for round_number in range(1, ROUNDS + 1):
        deltas = []
        for k, part in enumerate(parts):
            model.load_state_dict(weights)
            optimiser = torch.optim.SGD(model.parameters(), RATE)
            for _ in range(STEPS):
                batch = rng.choice(EACH, BATCH, replace=False)
                optimiser.zero_grad()
                functional.cross_entropy(model(part.images[batch]), part.labels[batch]).backward()
                optimiser.step()
            deltas.append({n: p.detach() - weights[n] for n, p in model.named_parameters()})
            if round_number in OBSERVED:
                update = as_update(deltas[-1], "delta")
                observations.append(Observation(round_number, k, scenario, weights, update, STEPS * BATCH))
        weights = {n: w + torch.stack([d[n] for d in deltas]).mean(0) for n, w in weights.items()}
    return Federation(observations, parts, held_out)


def interval(truth: np.ndarray, scores: Tensor) -> tuple[float, float, float]:
    """AUC and its 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    values = scores.numpy()
    draws = []
    while len(draws) < 400:
        pick = rng.integers(0, len(truth), len(truth))
        if 0 < truth[pick].sum() < len(pick):
            draws.append(roc_auc_score(truth[pick], values[pick]))
    low, high = np.percentile(draws, [2.5, 97.5])
    return roc_auc_score(truth, values), low, high


def asked(federation: Federation, client: int) -> tuple[Candidates, np.ndarray]:
    mine = federation.parts[client]
    truth = np.r_[np.ones(len(mine.labels)), np.zeros(len(federation.held_out.labels))]
    return joined(mine, federation.held_out), truth


@pytest.mark.parametrize("statistic", ["cosine", "loss"])
def test_members_of_the_target_stand_out(federation: Federation, statistic: str) -> None:
    pooled, truths = [], []
    for target in range(4):
        candidates, truth = asked(federation, target)
        answer = FedMIA(statistic).run(federation.observations, target, candidates, 0, CPU)
        assert answer.scores.dtype == torch.float64
        assert answer.scores.shape == truth.shape
        assert answer.details["rounds"] == list(OBSERVED)
        assert answer.details["shadows"] == [CLIENTS - 1] * len(OBSERVED)
        pooled.append(answer.scores)
        truths.append(truth)
    auc, low, high = interval(np.concatenate(truths), torch.cat(pooled))
    print(f"FedMIA {statistic}: AUC {auc:.3f} [{low:.3f}, {high:.3f}]")
    assert low > 0.6


@pytest.mark.parametrize("statistic", ["cosine", "loss"])
def test_control_that_trained_on_other_data(federation: Federation, statistic: str) -> None:
    """Client 0's samples against clients that never had them, client 0's own answers set aside: chance."""
    others = [o for o in federation.observations if o.client != 0]
    candidates, truth = asked(federation, 0)
    truths, pooled = [], []
    for target in range(1, 6):
        pooled.append(FedMIA(statistic).run(others, target, candidates, 0, CPU).scores)
        truths.append(truth)
    auc = roc_auc_score(np.concatenate(truths), torch.cat(pooled).numpy())
    assert abs(auc - 0.5) < 0.05


def test_sparse_updates_leak_less_but_still_leak(federation: Federation) -> None:
    def auc(rate: float) -> float:
        sent = [replace(o, update=top_k(o.update, rate)) for o in federation.observations]
        truths, pooled = [], []
        for target in range(4):
            candidates, truth = asked(federation, target)
            pooled.append(FedMIA().run(sent, target, candidates, 0, CPU).scores)
            truths.append(truth)
        return float(roc_auc_score(np.concatenate(truths), torch.cat(pooled).numpy()))

    tenth, thousandth = auc(0.1), auc(0.001)
    print(f"FedMIA-II under top-k: 10 % {tenth:.3f}, 0.1 % {thousandth:.3f}")
    assert tenth > 0.6
    assert thousandth < tenth


def literal(
    observations: list[Observation], target: int, candidates: Candidates, statistic: str
) -> np.ndarray:
    """FedMIA sample by sample with autograd, NumPy and SciPy, all entries dense."""
    scores = []
    for round_number in sorted({o.round for o in observations}):
        answers = [o for o in observations if o.round == round_number]
        model = build_model(answers[0].scenario.model).double().eval()
        table = np.zeros((len(answers), len(candidates.labels)))
        for i, (x, y) in enumerate(zip(candidates.images.double(), candidates.labels, strict=True)):
            for k, o in enumerate(answers):
                dense = {n: t.double() for n, t in o.update.dense().items()}
                state = {n: t.double() for n, t in o.weights.items()}
                sign = 1 if o.update.kind == "gradient" else -1
                if statistic == "loss":
                    step = sign * -(
                        o.scenario.training.server_learning_rate or o.scenario.training.learning_rate
                    )
                    step = step if sign == 1 else 1
                    model.load_state_dict({n: t + step * dense[n] for n, t in state.items()})
                    with torch.no_grad():
                        table[k, i] = -functional.cross_entropy(model(x[None]), y[None])
                else:
                    model.load_state_dict(state)
                    loss = functional.cross_entropy(model(x[None]), y[None])
                    g = torch.cat(
                        [t.flatten() for t in torch.autograd.grad(loss, list(model.parameters()))]
                    ).numpy()
                    u = torch.cat([dense[n].flatten() for n, _ in model.named_parameters()]).numpy()
                    table[k, i] = sign * g @ u / (np.linalg.norm(g) * np.linalg.norm(u))
        own = [o.client for o in answers].index(target)
        others = np.delete(table, own, axis=0)
        scores.append(norm.cdf(table[own], others.mean(0), np.sqrt(others.var(0) + 1e-8)))
    return np.mean(scores, axis=0)


@pytest.mark.parametrize("statistic", ["cosine", "loss"])
@pytest.mark.parametrize("rate", [None, 0.02])
def test_equals_the_literal_computation(federation: Federation, statistic: str, rate: float | None) -> None:
    observations = [o for o in federation.observations if o.round in (5, 25) and o.client < 5]
    if rate is not None:
        observations = [replace(o, update=top_k(o.update, rate)) for o in observations]
    candidates = Candidates(federation.parts[2].images[:12], federation.parts[2].labels[:12])
    answer = FedMIA(statistic).run(observations, 2, candidates, 0, CPU).scores.numpy()
    # In float32 a z-score is off by the rounding of s over its spread (about 1e-7 / 1e-2).
    np.testing.assert_allclose(answer, literal(observations, 2, candidates, statistic), atol=1e-5, rtol=0)


def test_sign_follows_the_kind_of_update(federation: Federation) -> None:
    observations = [o for o in federation.observations if o.round == 5]
    flipped = [
        replace(o, update=replace(o.update, values=-o.update.values, kind="gradient")) for o in observations
    ]
    candidates = Candidates(federation.held_out.images[:30], federation.held_out.labels[:30])
    as_delta = FedMIA().run(observations, 0, candidates, 0, CPU).scores
    as_gradient = FedMIA().run(flipped, 0, candidates, 0, CPU).scores
    assert torch.equal(as_delta, as_gradient)

    # The gradient of one sample has cosine 1 with that sample's own gradient, and that is what a member shows.
    model = build_model(observations[0].scenario.model).eval()
    own = gradients(build_as(model, torch.float64), observations[0].weights, candidates)[4].float()
    update = replace(observations[0].update, values=own, kind="gradient")
    table = cosines([replace(observations[0], update=update)], candidates)
    assert float(table[0, 4]) == pytest.approx(1, abs=1e-5)
    assert int(table[0].argmax()) == 4


def test_model_of_a_client_that_sent_a_gradient(federation: Federation) -> None:
    o = federation.observations[0]
    gradient = replace(o.update, kind="gradient")
    for server_rate, step in ((None, 0.3), (2.0, 2.0)):
        training = TrainingConfig(protocol="fedsgd", learning_rate=0.3, server_learning_rate=server_rate)
        seen = replace(o, update=gradient, scenario=replace(o.scenario, training=training))
        for name, tensor in client_model(seen).items():
            torch.testing.assert_close(tensor, o.weights[name] - step * gradient.dense()[name])


def test_asks_in_one_order_and_ignores_what_it_must(federation: Federation) -> None:
    candidates, _ = asked(federation, 0)
    plain = FedMIA().run(federation.observations, 0, candidates, 0, CPU).scores
    order = torch.randperm(len(plain), generator=torch.Generator().manual_seed(0))
    shuffled = Candidates(candidates.images[order], candidates.labels[order])
    mixed = [federation.observations[i] for i in torch.randperm(len(federation.observations)).tolist()]
    again = FedMIA().run(mixed, 0, shuffled, 99, CPU).scores
    torch.testing.assert_close(again, plain[order], atol=1e-5, rtol=0)


def test_personal_weights_are_each_client_s_own(federation: Federation) -> None:
    """A server that sent client 3 another model: its gradient is taken at that model."""
    observations = [o for o in federation.observations if o.round == 5 and o.client < 5]
    other = next(o.weights for o in federation.observations if o.round == 25)
    observations[3] = replace(observations[3], weights=other)
    candidates = Candidates(federation.parts[0].images[:10], federation.parts[0].labels[:10])
    answer = FedMIA().run(observations, 0, candidates, 0, CPU).scores.numpy()
    np.testing.assert_allclose(answer, literal(observations, 0, candidates, "cosine"), atol=1e-5, rtol=0)


def test_rounds_without_the_target_are_passed_over(federation: Federation) -> None:
    candidates = Candidates(federation.parts[0].images[:5], federation.parts[0].labels[:5])
    thinned = [
        o
        for o in federation.observations
        if not (o.round == 10 and o.client == 0) and not (o.round == 15 and o.client > 1)
    ]
    answer = FedMIA().run(thinned, 0, candidates, 0, CPU)
    assert answer.details["rounds"] == [5, 20, 25]
    assert answer.details["rounds_passed_over"] == [10, 15]
    kept = [o for o in federation.observations if o.round in (5, 20, 25)]
    assert torch.equal(answer.scores, FedMIA().run(kept, 0, candidates, 0, CPU).scores)


def test_refuses_what_it_cannot_do(federation: Federation) -> None:
    candidates = Candidates(federation.parts[0].images[:5], federation.parts[0].labels[:5])
    two = [o for o in federation.observations if o.client < 2]
    with pytest.raises(NotApplicable, match="at least 3 are needed"):
        FedMIA().run(two, 0, candidates, 0, CPU)
    with pytest.raises(NotApplicable, match="client 77"):
        FedMIA().run(federation.observations, 77, candidates, 0, CPU)
    with pytest.raises(NotApplicable, match="no candidate"):
        FedMIA().run(
            federation.observations, 0, Candidates(candidates.images[:0], candidates.labels[:0]), 0, CPU
        )
    o = federation.observations[0]
    renamed = replace(o, update=replace(o.update, names=tuple(reversed(o.update.names))))
    with pytest.raises(PayloadError):
        FedMIA().run([renamed, *federation.observations[1:10]], 0, candidates, 0, CPU)


def test_one_silent_client_is_a_shadow_without_direction(federation: Federation) -> None:
    observations = [o for o in federation.observations if o.round == 5]
    silent = replace(observations[4].update, values=torch.zeros(observations[4].update.numel))
    observations[4] = replace(observations[4], update=silent)
    candidates = Candidates(federation.parts[0].images[:5], federation.parts[0].labels[:5])
    assert torch.equal(cosines(observations, candidates)[4], torch.zeros(5, dtype=torch.float64))
    assert torch.isfinite(FedMIA().run(observations, 0, candidates, 0, CPU).scores).all()


def test_outlying_shadows_can_be_dropped(federation: Federation) -> None:
    """A shadow that has the very sample hides the member, unless it is left out."""
    observations = [o for o in federation.observations if o.round == 5]
    more = [replace(o, client=o.client + 10) for o in observations if o.client > 0]  # 18 shadows
    candidates = Candidates(federation.parts[0].images[:1], federation.parts[0].labels[:1])
    model = build_model(observations[0].scenario.model).eval()
    own = gradients(build_as(model, torch.float64), observations[0].weights, candidates)[0].float()
    more[-1] = replace(more[-1], update=replace(more[-1].update, values=-own))
    plain = FedMIA().run(observations + more, 0, candidates, 0, CPU)
    strict = FedMIA(drop_members=True).run(observations + more, 0, candidates, 0, CPU)
    assert strict.details["dropped"] == pytest.approx(1 / 18)
    assert plain.details["dropped"] == 0
    s = cosines(observations + more, candidates)
    np.testing.assert_allclose(
        strict.scores,
        norm.cdf(s[0], s[1:-1].mean(0), (s[1:-1].var(0, correction=0) + 1e-8).sqrt()),
        atol=1e-12,
    )


# ---------------------------------------------------------------------- the rules, on numbers small enough to check


def small_answers(
    *rounds: tuple[int, ...], kind: str = "delta", server_rate: float | None = None
) -> list[Observation]:
    """Answers of the named clients in rounds 1, 2, ...: random updates of norm about .02 to a model of 3 classes."""
    config = ModelConfig(name="mlp", classes=3, channels=1, image_size=2, activation="relu")
    training = TrainingConfig(learning_rate=0.3, server_learning_rate=server_rate)
    scenario = Scenario(config, training, CompressionConfig(name="none"))
    weights = initial_weights(config, seed=1)
    generator = torch.Generator().manual_seed(0)
    size = 0.02 / sum(t.numel() for t in weights.values()) ** 0.5
    return [
        Observation(
            number,
            client,
            scenario,
            weights,
            as_update(
                {n: size * torch.randn(t.shape, generator=generator) for n, t in weights.items()}, kind
            ),
            8,
        )
        for number, clients in enumerate(rounds, 1)
        for client in clients
    ]


def cosines(seen: list[Observation], candidates: Candidates) -> Tensor:
    return RoundView(seen, Knowledge(candidates), CPU).cosines


def small_candidates(count: int = 6) -> Candidates:
    generator = torch.Generator().manual_seed(2)
    return Candidates(torch.rand(count, 1, 2, 2, generator=generator), torch.arange(count) % 3)


@pytest.mark.parametrize("server_rate", [None, 0.7])
@pytest.mark.parametrize("kind", ["delta", "gradient"])
@pytest.mark.parametrize("statistic", ["cosine", "loss"])
def test_scores_and_their_details(statistic: str, kind: str, server_rate: float | None) -> None:
    """The target stands first, in the middle and last among those that answered; round 4 is without it."""
    seen = small_answers((3, 5, 8), (1, 2, 3, 9), (3, 0, 2), (1, 2, 8), kind=kind, server_rate=server_rate)
    told: list[tuple[float, str]] = []
    candidates = small_candidates()
    answer = FedMIA(statistic).run(seen, 3, candidates, 0, CPU, lambda *args: told.append(args))
    wanted = literal([o for o in seen if o.round < 4], 3, candidates, statistic)
    np.testing.assert_allclose(answer.scores, wanted, atol=2e-4, rtol=0)
    assert answer.statistic == {"cosine": "fedmia-ii (cosine)", "loss": "fedmia-i (loss)"}[statistic]
    assert {key: value for key, value in answer.details.items() if key != "saturated"} == {
        "rounds": [1, 2, 3],
        "rounds_passed_over": [4],
        "shadows": [2, 3, 2],
        "dropped": 0.0,
    }
    assert told == [(number / 4, f"round {number + 1}") for number in range(4)]


def test_values_that_cannot_be_ranked_are_counted() -> None:
    """All shadows alike: where the target differs a value is 0 or 1 exactly, where it is one of them 1/2."""
    seen = small_answers(*4 * [(0, 1, 2)])
    common = seen[1].update
    turned = replace(common, values=-common.values)
    seen = [replace(o, update=turned if o.client == 0 and o.round < 3 else common) for o in seen]
    answer = FedMIA().run(seen, 0, small_candidates(), 0, CPU)
    assert sorted({round(4 * value, 5) for value in answer.scores.tolist()}) == [1, 3]
    assert answer.details["saturated"] == 0.5


def test_the_share_dropped_is_a_mean_over_rounds_and_nothing_is_unless_asked_for() -> None:
    """The last of 11 shadows points the other way in round 1: above, for some candidates. In round 2 none does."""
    seen = small_answers(tuple(range(12)), tuple(range(12)))
    common = seen[0].update
    turned = replace(common, values=-common.values)
    seen = [replace(o, update=turned if (o.round, o.client) == (1, 11) else common) for o in seen]
    table = cosines(seen[:12], small_candidates())
    above = (table[11] > table[0]).double().mean()
    assert 0 < above < 1
    strict = FedMIA(drop_members=True).run(seen, 0, small_candidates(), 0, CPU)
    assert strict.details["dropped"] == pytest.approx(above / 11 / 2)
    assert FedMIA().run(seen, 0, small_candidates(), 0, CPU).details["dropped"] == 0


def test_two_others_are_enough_and_the_same_client_twice_is_one() -> None:
    candidates = small_candidates(1)
    assert FedMIA.needs.clients == 3
    assert FedMIA().run(small_answers((4, 6, 7)), 6, candidates, 0, CPU).details["shadows"] == [2]
    for clients in ((4, 6), (4, 4, 6)):
        with pytest.raises(
            NotApplicable, match=f"at most {len(set(clients))} clients .* at least 3 are needed"
        ):
            FedMIA().run(small_answers(clients), 6, candidates, 0, CPU)
    with pytest.raises(NotApplicable, match="client 5, the target, answered in none of 2 observed rounds"):
        FedMIA().run(small_answers((4, 6, 7), (4, 6, 7)), 5, candidates, 0, CPU)


def test_nothing_sent_has_no_direction_and_length_does_not_matter() -> None:
    seen = small_answers((0, 1, 2))
    model = build_model(seen[0].scenario.model).eval()
    plain = cosines(seen, small_candidates())
    own = gradients(build_as(model, torch.float64), seen[1].weights, small_candidates())
    torch.testing.assert_close(plain[1], -functional.cosine_similarity(own, plain_values(1)[None].double()))
    for factor, row in ((1e-6, plain[1]), (1e6, plain[1]), (0.0, torch.zeros(6).double())):
        seen[1] = replace(seen[1], update=replace(seen[1].update, values=factor * plain_values(1)))
        table = cosines(seen, small_candidates())
        torch.testing.assert_close(table[1], row, atol=1e-6, rtol=0)
        assert torch.equal(table[[0, 2]], plain[[0, 2]])


def plain_values(client: int) -> Tensor:
    return small_answers((0, 1, 2))[client].update.values


def test_models_are_told_apart_by_what_is_in_them() -> None:
    """The same object, an equal copy, and a model that differs in one number."""
    seen = small_answers((0, 1, 2, 3))
    copied = {name: tensor.clone() for name, tensor in seen[0].weights.items()}
    other = {**copied, "1.bias": copied["1.bias"] + torch.eye(len(copied["1.bias"]))[0]}
    seen[1], seen[2] = replace(seen[1], weights=other), replace(seen[2], weights=copied)
    assert same_weights(seen) == [[0, 2, 3], [1]]


def test_the_client_s_model_has_the_buffers_that_it_sent() -> None:
    o = replace(small_answers((0,))[0], buffers={"bn.running_mean": torch.ones(2)})
    state = client_model(replace(o, weights={**o.weights, "bn.running_mean": torch.zeros(2)}))
    assert torch.equal(state["bn.running_mean"], torch.ones(2))
    for name, change in o.update.dense().items():
        assert torch.equal(state[name], o.weights[name] + change)


@pytest.mark.parametrize(("shadows", "kept"), [(9, 9), (10, 10), (11, 10), (16, 15)])
def test_a_shadow_is_dropped_beyond_three_deviations(shadows: int, kept: int) -> None:
    """One of n far above the others lies sqrt(n - 1) deviations out; exactly three, of ten, still counts."""
    others = torch.zeros(shadows, 3, dtype=torch.float64)
    others[4] = torch.tensor([10.0, 0.0, -10.0])
    others[:, 1] = torch.arange(shadows)
    assert _not_outlying(others).sum(0).tolist() == [kept, shadows, shadows]
    assert bool(_not_outlying(others)[4, 0]) == (kept == shadows)


@pytest.mark.parametrize("keep", [[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 0, 1]])
def test_one_tailed_is_the_normal_distribution_function(keep: list[int]) -> None:
    own = torch.tensor([0.3, -0.2, 1e-4]).double()
    others = torch.tensor([[0.1, 0.2, 0], [0.3, -0.4, 0], [0.5, 0.0, 0], [0.2, 0.3, 0]]).double()
    chosen = np.array(keep, dtype=bool)
    counted = others.numpy()[chosen]
    wanted = norm.cdf(own, counted.mean(0), np.sqrt(counted.var(0) + 1e-8))
    assert wanted[2] == pytest.approx(norm.cdf(1))
    values = one_tailed(own, others, torch.tensor(chosen)[:, None].expand(4, 3))
    np.testing.assert_allclose(values, wanted, atol=1e-14)
