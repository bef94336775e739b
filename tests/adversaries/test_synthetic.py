"""Attacks on synthetic data: against recorded figures, closed forms, scikit-learn and computations apart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from membership_scenes import as_update, top_k
from scipy.optimize import minimize
from scipy.special import logsumexp
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn
from torch.func import functional_call

from adversaries import ATTACKS
from adversaries.membership.knowledge import Knowledge
from adversaries.membership.synthetic import neighbours
from adversaries.membership.synthetic.base import SyntheticAttack
from adversaries.membership.synthetic.neighbours import nearest, within
from adversaries.membership.synthetic.release import Release
from adversaries.membership.view import RoundView
from adversaries.needs import Facts
from adversaries.refusals import attack_refusals
from fedattack.config import CompressionConfig, Config, ModelConfig, TrainingConfig
from fedattack.errors import NotApplicable
from fedattack.models import build_model, initial_weights
from fedattack.observation import EVERYONE, Candidates, Observation, Scenario
from simulations.bench.neighbours import run
from simulations.pipeline import attack_folder, simulate

CPU = torch.device("cpu")
SYNTHETIC = [name for name in ATTACKS.names() if issubclass(ATTACKS.get(name), SyntheticAttack)]
SCENE = Scenario(
    ModelConfig(name="wgan-gp-mlp", classes=10, channels=1, image_size=4, width=8),
    TrainingConfig(task="wgan-gp", protocol="fedavg", local_steps=5, batch_size=4, learning_rate=1e-3),
    CompressionConfig(name="none"),
)


def draw(count: int, seed: int, *shape: int) -> Tensor:
    return torch.rand(count, *(shape or (1, 4, 4)), generator=torch.Generator().manual_seed(seed))


def scored(name: str, release: Release, images: Tensor, **settings: object) -> Tensor:
    attack = ATTACKS.get(name)(**settings)
    assert isinstance(attack, SyntheticAttack)
    found = attack.about(release, images, 3, CPU)
    assert found.shape == (len(images),)
    assert found.dtype == torch.float64
    assert found.isfinite().all()
    return found


# ---------------------------------------------------------------------- against recorded figures


def test_full_black_box_and_monte_carlo_on_recorded_images(shared_dir: Path) -> None:
    folder = shared_dir / "checks" / "membership"
    stored, told = np.load(folder / "fbb.npz"), np.load(folder / "fbb_scores.npz")
    expected = json.loads((folder / "fbb_expected.json").read_text())
    parts = {name: torch.tensor(stored[name])[:, None] / 255 for name in stored.files if name != "noise"}
    release = Release(parts["generated_r01"], reference=Release(parts["reference_generated_r01"]))
    images, member = torch.cat([parts["pos"], parts["neg"]]), np.arange(600) < 300

    def both(name: str) -> np.ndarray:
        return np.concatenate([told[name.format("pos")], told[name.format("neg")]])

    found, places = nearest(release.images, images, 5, CPU)
    assert np.abs(2 * found.numpy() - both("victim_{}_dist")).max() < 1e-3
    assert (places.numpy() == both("victim_{}_idx")).all()
    scores = {
        "fbb_1nn": scored("full-black-box", release, images),
        "fbb_mean5nn": scored("full-black-box", release, images, neighbours=5),
        "fbb_1nn_calibrated(d_victim-d_reference)": scored("full-black-box-calibrated", release, images),
    }
    wanted = both("reference_{}_dist")[:, 0] - both("victim_{}_dist")[:, 0]
    assert np.abs(scores["fbb_1nn_calibrated(d_victim-d_reference)"].numpy() - wanted).max() < 2e-3
    counts = (scored("monte-carlo", release, images) * 2000).floor().numpy()
    assert (counts == both("MC_{}") * 2000).all()
    scores["MC_count_median_eps"] = torch.tensor(counts)
    for name, one in scores.items():
        assert roc_auc_score(member, one) == pytest.approx(expected[name]["auc"], abs=1e-4)
    # The published loop, in batches of ten, loses seven of these.
    some = scored("full-black-box", release, images[:297])
    assert torch.equal(some, scores["fbb_1nn"][:297])


# ---------------------------------------------------------------------- neighbours


def test_neighbours_are_scikit_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks that split both sets unevenly; the first of equal ones, and no distance where images are alike."""
    monkeypatch.setattr(neighbours, "_POINTS", 64)
    monkeypatch.setattr(neighbours, "_QUERIES", 7)
    points, asked = draw(333, 1, 1, 28, 28), draw(30, 2, 1, 28, 28)
    points[[70, 200, 332]] = points[5].clone()
    asked[[0, 8, 29]] = points[[5, 128, 331]]
    found, places = nearest(points, asked, 6, CPU)
    search = NearestNeighbors(n_neighbors=6, algorithm="brute").fit(points.flatten(1).double())
    wanted, which = search.kneighbors(asked.flatten(1).double())
    assert np.abs(found.numpy() - wanted).max() < 2e-6  # scikit-learn's, in double precision, of images alike
    assert (places[1:].numpy() == which[1:])[~np.isin(which[1:], (5, 70, 200, 332))].all()
    assert places[0, :4].tolist() == [5, 70, 200, 332]
    assert found[[0, 8, 29], 0].max() < 1e-6
    radius = float(np.median(wanted[:, 0]))
    far = np.linalg.norm(asked.flatten(1).double()[:, None] - points.flatten(1).double(), axis=2)
    assert np.abs(found.numpy() - np.sort(far)[:, :6]).max() < 1e-9
    assert (within(points, asked, radius, CPU).numpy() == (far <= radius + 1e-9).sum(1)).all()
    with pytest.raises(NotApplicable, match="3 synthetic images, and 6 nearest"):
        nearest(points[:3], asked, 6, CPU)


def test_the_benchmark_of_neighbours_compares() -> None:
    figures = run(quick=True)
    assert figures["same"] == 1
    assert figures["apart"] < 5e-6
    assert figures["duplicate"] < 1e-6
    assert figures["seconds"] > 0
    assert figures["sklearn_seconds"] > 0


# ---------------------------------------------------------------------- searches of latents


class Linear(nn.Module):
    """Latents to images, in closed form."""

    def __init__(self, latent: int, seed: int) -> None:
        super().__init__()
        self.axes = 0.1 * draw(latent, seed, 16)

    def forward(self, latents: Tensor) -> Tensor:
        return (0.5 + latents @ self.axes).reshape(-1, 1, 4, 4)


def of_linear(latent: int, seed: int = 1) -> tuple[Release, Linear]:
    generator, latents = Linear(latent, seed), draw(40, seed + 50, latent) - 0.5
    return Release(generator(latents), latents, generator), generator


def residuals(generator: Linear, images: Tensor) -> np.ndarray:
    """Mean squared differences, in [-1, 1], to the nearest image that the generator could make."""
    axes = generator.axes.double().numpy().T
    wanted = (images.flatten(1).double().numpy() - 0.5).T
    apart = wanted - axes @ np.linalg.lstsq(axes, wanted, rcond=None)[0]
    return 4 * np.square(apart).mean(0)


def test_searches_find_what_a_linear_generator_comes_nearest_to() -> None:
    (release, generator), images = of_linear(3), draw(6, 9)
    release = replace(release, reference=of_linear(3, seed=2)[0])
    settings = {"partial-black-box": {"evaluations": 3000, "iterations": 30}, "white-box": {"penalty": 0.0}}
    for name, these in settings.items():
        found = scored(name, release, images, **these)
        assert np.allclose(-found.numpy(), residuals(generator, images), atol=1e-5)
        # A search does not hang on who else is asked about.
        assert torch.equal(scored(name, release, images[2:3], **these), found[2:3])
        both = scored(f"{name}-calibrated", release, images, **these)
        wanted = residuals(Linear(3, 2), images) - residuals(generator, images)
        assert np.allclose(both.numpy(), wanted, atol=2e-5)


def test_white_box_holds_latents_at_a_likely_length_and_does_not_count_it() -> None:
    (release, generator), images, weight = of_linear(3), draw(5, 9), 0.05
    axes, start = generator.axes.double().numpy(), release.latents
    assert start is not None
    found = scored("white-box", release, images, penalty=weight)
    places = nearest(release.images, images, 1, CPU)[1][:, 0]
    for image, place, score in zip(images.flatten(1).double().numpy(), places, found, strict=True):

        def difference(z: np.ndarray, image: np.ndarray = image) -> float:
            return float(4 * np.square(0.5 + z @ axes - image).mean())

        def loss(z: np.ndarray, difference: object = difference) -> float:
            return difference(z) + weight * (z @ z - 3) ** 2  # type: ignore[operator]

        best = minimize(loss, start[place].double().numpy(), method="L-BFGS-B", options={"ftol": 1e-14})
        assert -float(score) == pytest.approx(difference(best.x), abs=1e-4)
        assert difference(best.x) > residuals(generator, torch.tensor(image)[None])[0] + 1e-3


def test_powell_makes_no_more_images_than_allowed() -> None:
    (release, generator), images = of_linear(3), draw(2, 9)
    asked = 0

    class Counting(nn.Module):
        def forward(self, latents: Tensor) -> Tensor:
            nonlocal asked
            asked += len(latents)
            made: Tensor = generator(latents)
            return made

    scored("partial-black-box", replace(release, generator=Counting()), images, evaluations=40)
    assert 40 <= asked <= 2 * 60  # Powell ends the line search that it is in


# ---------------------------------------------------------------------- densities


def whitened(release: Release, images: Tensor, count: int) -> list[np.ndarray]:
    """Synthetic, public and asked-about images on the first principal components of the two former."""
    assert release.public is not None
    sets = [one.flatten(1).double().numpy() for one in (release.images, release.public, images)]
    known = np.concatenate(sets[:2])
    centre = known - known.mean(0)
    axes = np.linalg.svd(centre, full_matrices=False)[2][:count]
    spread = np.sqrt(np.square(centre @ axes.T).sum(0) / (len(known) - 1))
    return [(one - known.mean(0)) @ axes.T / spread for one in sets]


def test_domias_is_a_ratio_of_densities() -> None:
    release, images = Release(draw(80, 1), public=draw(50, 2).square()), draw(9, 3)
    made, real, asked = whitened(release, images, 5)

    def kernels(points: np.ndarray) -> np.ndarray:
        width = len(points) ** (-1 / (points.shape[1] + 4))
        squares = np.square(asked[:, None] - points).sum(2) / width**2
        logs: np.ndarray = logsumexp(-squares / 2, axis=1) - np.log(len(points)) - 5 * np.log(width)
        return logs

    def near(points: np.ndarray) -> np.ndarray:
        first = NearestNeighbors(n_neighbors=1).fit(points).kneighbors(asked)[0][:, 0]
        logs: np.ndarray = -np.log(len(points)) - 5 * np.log(first)
        return logs

    for density, log in (("kde", kernels), ("knn", near)):
        found = scored("domias", release, images, density=density, components=5)
        assert np.allclose(found, log(made) - log(real), atol=2e-3)
    # A generator that makes one image alone has a density all the same.
    scored("domias", replace(release, images=release.images[:1].repeat(30, 1, 1, 1)), images)
    with pytest.raises(NotApplicable, match="public images"):
        scored("domias", replace(release, public=None), images)


def test_monte_carlo_ranks_those_with_none_near_and_takes_components() -> None:
    release, images = Release(draw(200, 1), public=draw(60, 2)), draw(31, 3)
    found = scored("monte-carlo", release, images)
    assert len(found.unique()) == 31
    none = (found * 200) < 1
    order = scored("full-black-box", release, images)[none].argsort()
    assert torch.equal(found[none].argsort(), order)
    axes = np.linalg.svd(draw(60, 2).flatten(1) - draw(60, 2).flatten(1).mean(0))[2][:4]
    made, asked = ((one.flatten(1) @ axes.T).double() for one in (release.images, images))
    far = torch.cdist(asked, made)
    counts = (far <= float(np.median(far.min(1).values)) * (1 + 1e-6)).sum(1)
    assert torch.equal((scored("monte-carlo", release, images, components=4) * 200).floor().long(), counts)
    with pytest.raises(NotApplicable, match="'components' = 61 needs as many public images, and 60"):
        scored("monte-carlo", release, images, components=61)


# ---------------------------------------------------------------------- critics


def seen(rounds: dict[int, list[int]], sparse: bool = False) -> list[Observation]:
    """Clients' answers, of random changes to weights that differ from round to round; in 3 also by client."""
    found, names = [], dict(build_model(SCENE.model).named_parameters())
    for number, clients in rounds.items():
        for client in clients:
            sent = initial_weights(SCENE.model, number + client * (number == 3))
            draws = torch.Generator().manual_seed(100 * number + client)
            change = {
                name: 0.05 * torch.randn(sent[name].shape, generator=draws) for name in names
            }  # in the model's order, as a client sends them
            update = as_update(change, "delta")
            found.append(
                Observation(number, client, SCENE, sent, top_k(update, 0.3) if sparse else update, 1)
            )
    return found


def critics(observations: list[Observation], images: Tensor) -> dict[tuple[int, int], np.ndarray]:
    """(round, client) -> standardised scores of the client's own critic, apart from the view."""
    model, found = build_model(SCENE.model), {}
    for one in observations:
        flat = torch.zeros(one.update.numel)
        flat[one.update.indices if one.update.indices is not None else slice(None)] = one.update.values
        sizes = [int(np.prod(shape)) for shape in one.update.shapes]
        parts = zip(one.update.names, one.update.shapes, flat.split(sizes), strict=True)
        own = {**one.weights, **{n: one.weights[n] + p.reshape(s) for n, s, p in parts}}
        scores = functional_call(model, own, (images,)).detach()[:, 0].double().numpy()
        found[one.round, one.client] = (scores - scores.mean()) / scores.std()
    return found


@pytest.mark.parametrize("sparse", [False, True])
def test_client_critic_is_each_critic_against_the_mean_of_the_others(sparse: bool) -> None:
    """Clients missing in some rounds, two in the last; the mean is over those who answered."""
    answered = {1: [0, 1, 2, 3], 2: [0, 2, 3], 3: [1, 2]}
    candidates, observations = Candidates(draw(12, 5), torch.zeros(12).long()), seen(answered, sparse)
    told = critics(observations, candidates.images)
    for target in range(4):
        wanted = np.zeros(12)
        for number, clients in answered.items():
            if target in clients:
                others = [told[number, c] for c in clients if c != target]
                wanted += told[number, target] - np.mean(others, axis=0)
        found = ATTACKS.get("client-critic")().run(observations, target, candidates, 0, CPU)
        assert np.allclose(found.scores, wanted, atol=1e-4)
        assert found.details["rounds"] == [n for n, clients in answered.items() if target in clients]


def test_critic_series_is_the_mean_over_rounds_of_the_global_critics() -> None:
    candidates, wanted, figures = Candidates(draw(12, 5), torch.zeros(12).long()), [], {}
    attack = ATTACKS.get("critic-series")()
    for number in (1, 2, 4):
        after = initial_weights(SCENE.model, 20 + number)
        told = seen({number: [0]})[0]
        still = replace(told, weights=after, update=replace(told.update, values=0 * told.update.values))
        wanted.append(critics([still], candidates.images)[number, 0])
        view = RoundView([told], Knowledge(candidates), CPU, after)
        figures[number] = attack.watch(view, 0)
    found = attack.scores(figures, EVERYONE, Knowledge(candidates)).scores
    assert np.allclose(found, np.mean(wanted, axis=0), atol=1e-4)


def test_critic_says_what_the_released_critic_does() -> None:
    candidates = Candidates(draw(12, 5), torch.zeros(12).long())
    after, attack = initial_weights(SCENE.model, 7), ATTACKS.get("critic")()
    view = RoundView(seen({2: [0, 1]}), Knowledge(candidates), CPU, after)
    found = attack.scores({2: attack.watch(view, 0)}, EVERYONE, view.knowledge).scores
    layers = [name for name in after if name.startswith("scorer") and name.endswith("weight")]
    hidden = candidates.images.flatten(1)
    for name in layers:
        hidden = hidden @ after[name].T + after[name.replace("weight", "bias")]
        hidden = torch.where(hidden > 0, hidden, 0.2 * hidden) if name != layers[-1] else hidden
    assert torch.allclose(found, hidden[:, 0].double(), atol=1e-6)


# ---------------------------------------------------------------------- what is released


def test_one_reference_generator_serves_all_and_comes_from_public_images_alone() -> None:
    candidates = Candidates(draw(12, 5), torch.zeros(12).long())
    public = Candidates(draw(20, 6).square(), torch.zeros(20).long())
    after, observations = initial_weights(SCENE.model, 7), seen({2: [0, 1]})

    def view(**changes: object) -> RoundView:
        given = {"candidates": candidates, "public": public} | changes
        return RoundView(observations, Knowledge(**given), CPU, after)  # type: ignore[arg-type]

    one = view()
    release, more = one.release(30, True, 3), one.release(40, True, 3)
    assert release.reference is not None
    assert more.reference is not None
    assert torch.equal(release.reference.images, more.reference.images[:30])
    assert one.release(30, True, 3) is release
    plain = one.release(30, False, 3)
    assert torch.equal(plain.images, release.images)
    assert plain.reference is None
    generator = build_model(SCENE.model)
    generator.load_state_dict(after)
    assert release.latents is not None
    assert torch.allclose(generator.generator(release.latents), release.images)
    asked_otherwise = view(candidates=replace(candidates, images=draw(12, 8))).release(30, True, 3)
    assert asked_otherwise.reference is not None
    assert torch.equal(asked_otherwise.reference.images, release.reference.images)
    other = view(public=replace(public, images=draw(20, 9))).release(30, True, 3)
    assert other.reference is not None
    assert not torch.equal(other.reference.images, release.reference.images)
    with pytest.raises(NotApplicable, match=r"data\.auxiliary_size"):
        view(public=None).release(30, True, 3)


def test_what_cannot_work_is_refused_before_anything_is_trained() -> None:
    def said(name: str, auxiliary: int, **settings: object) -> list[str]:
        return attack_refusals(ATTACKS.get(name)(**settings), SCENE, Facts(auxiliary=auxiliary))

    assert said("full-black-box", 0) == []
    assert "more than 100 images" in said("full-black-box", 0, samples=100, neighbours=101)[0]
    for name in (*(n for n in SYNTHETIC if "calibrated" in n), "domias"):
        assert "1 auxiliary images, and this attack needs at least 2" in said(name, 1)[0]
        assert said(name, 2) == []
    assert "needs at least 2" in said("critic", 1, calibrated=True)[0]
    assert "needs at least 40" in said("monte-carlo", 39, components=40)[0]


@pytest.mark.parametrize("name", SYNTHETIC)
def test_images_alone_and_images_of_another_kind(name: str) -> None:
    """What a release lacks, its size, its scale and broken pixels are each said in a sentence."""
    attack = ATTACKS.get(name)()
    images, made = draw(8, 1), draw(50, 2)
    release = Release(made, public=draw(50, 3), reference=Release(draw(50, 4), public=draw(50, 3)))
    if attack.access == "samples":
        scored(name, release, images)
    else:
        with pytest.raises(NotApplicable, match="of what is released"):
            attack.about(release, images, 0, CPU)
    generator = build_model(SCENE.model)
    parts = {"latents": torch.randn(50, 32), "generator": generator.generator, "critic": generator.critic}
    release = replace(release, **parts)
    broken = images.clone()
    broken[3, 0, 1, 1] = torch.nan
    for given, asked, says in (
        (release, draw(8, 1, 1, 5, 5), "candidates: 1 x 5 x 5 .* synthetic images 1 x 4 x 4"),
        (release, draw(8, 1, 3, 4, 4), "candidates: 3 x 4 x 4"),
        (release, 255 * images, "candidates: pixels from .* accepted: 0 to 1"),
        (release, images / 255, "candidates: no pixel above 0.00.* another scale"),
        (release, 2 * images - 1, "candidates: pixels from -0.9"),
        (release, broken, "candidates: pixels hold NaN"),
        (release, images[:0], "at least one"),
        (replace(release, images=made * torch.nan), images, "synthetic images: pixels hold NaN"),
        (replace(release, images=made / 255), images, "synthetic images: no pixel above"),
        (replace(release, public=draw(9, 1, 1, 3, 3)), images, "public images: 1 x 3 x 3"),
        (replace(release, reference=Release(draw(9, 1) * 255)), images, "reference images: pixels from"),
    ):
        with pytest.raises(NotApplicable, match=says):
            attack.about(given, asked, 0, CPU)


# ---------------------------------------------------------------------- in a federation


def test_a_federation_is_attacked_at_its_end_and_later_from_disk(tmp_path: Path) -> None:
    """The same scores; attacks on a release read the last round alone, and all scores beside one another."""
    every, last = ["client-critic", "critic-series"], ["critic", "full-black-box-calibrated", "white-box"]
    training = (
        "task=wgan-gp dataset=digits engine=inline clients=3 rounds=2 width=16 local-steps=5 batch-size=8"
    )
    named: dict[str, object] = dict(one.split("=") for one in training.split())
    named |= {"limit": 120, "candidates": 8, "data.nonmembers": 24, "save-observations": True}
    named |= {"attack": ",".join(every + last), "attack.samples": 60, "attack.iterations": 5}

    def settings(folder: str) -> Config:
        return Config.from_mapping({**named, "run-dir": str(tmp_path / folder)})

    ran = simulate(settings("run"))
    assert set(ran.audits) == {*every, *last}
    truth = tmp_path / "run" / "truth"
    later = attack_folder(tmp_path / "run" / "observations", settings("later"), truth=truth)
    for name in (*every, *last):
        assert later.audits[name].records == ran.audits[name].records
        for folder in ("run", "later"):
            kept = {path.stem for path in (tmp_path / folder / "parts" / name).glob("round-*")}
            assert kept == ({"round-00001", "round-00002"} if name in every else {"round-00002"})
    assert {r["client"] for r in ran.audits["critic"].records} == {EVERYONE}
    assert {r["client"] for r in ran.audits["client-critic"].records} == {0, 1, 2}
