"""The tensor attack: whole batches from one gradient of a wide two-layer head."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from scipy.fft import dct
from torch import Tensor

from adversaries.base import Progress
from adversaries.inversion.evidence import one_gradient
from adversaries.inversion.evidence.first_layer import is_complete
from adversaries.inversion.gradients.activations import ACTIVATIONS, homogeneous, is_polynomial, stein_order
from adversaries.inversion.solvers.span import largest
from adversaries.needs import Block, Facts, Needs
from adversaries.reconstruction.base import CERTIFIED, OneByOne, armable, failed, status_of
from adversaries.reconstruction.tensor import by_class, certificate, from_entries, from_gradient, from_steps
from adversaries.reconstruction.tensor.arming import armed
from adversaries.reconstruction.tensor.decompose import Decomposer
from adversaries.reconstruction.tensor.from_gradient import Estimate
from adversaries.reconstruction.tensor.head import (
    Labelled,
    TwoLayerHead,
    fix_scales,
    read_labels,
    residuals_of,
)
from adversaries.reconstruction.tensor.refine import refine, relu_masks, settle
from adversaries.reconstruction.tensor.stem import invert_stem
from adversaries.seats import MaliciousServer
from fedattack.config import Positive, Strength
from fedattack.defenses import hides_clients
from fedattack.errors import NotApplicable
from fedattack.models.armable.two_layer import TwoLayer
from fedattack.models.normalise import attach, normaliser, pixels
from fedattack.observation import EVERYONE, Auxiliary, Candidates, Observation, Reconstruction, Scenario
from fedattack.rng import torch_rng

SPARE = 1.2
"""Equations per unknown from which on a small residual singles out the batch."""

_RUNGS = (0.28, 0.42, 0.57)
"""Shares of an image's frequencies, each way, that sparse entries are solved in first."""

_LEAST_SIDE = 16
"""Smaller images are solved at once."""

_NEAR = 1e-2
"""Residual of an answer whose labels can be believed in a last refinement."""

NO_TRACE = "a sample's label leaves too little trace in the head's gradient to be read"


@dataclass
class TensorAttack(MaliciousServer, OneByOne):
    """Tensor: a malicious server sends a wide two-layer head and reads the whole batch off one gradient.

    The gradient of the wide layer spans the batch, and its third moment over the Gaussian neurons is a symmetric
    tensor whose components are the samples (Wang, Lee, Lei 2023). The moments are not averaged, as published, but
    solved for by least squares inside the span, which is exact for the cubic activation; other activations are
    finished by Gauss-Newton on the gradient itself. The answer is put through the model: the residual of the update
    tells "certified" (10^-5 at most), "approximate" and "failed" apart without the truth. A certificate needs more
    than a residual: no other batch may explain the update as well (:mod:`.certificate`); the notes say what speaks
    against one. Black pictures leave nothing but a gap in the declared number, and are answered without labels (-1),
    outside the certificate, as `details["inferred"]` says. The global model skips an armed round, from which a server
    learns the batch and nothing else.

    Parameters
    ----------
    method : {"exact", "published"}
        "published": averages over the neurons as in the paper, whose error falls with the square root of the width.
    view : {"full", "last_layer"}
        "last_layer" looks at the head's gradient only.
    batch : int, optional
        Samples in the batch (of all clients together under secure aggregation); None: as many as stand out of the
        gradient's noise, the declared number at most.
    decomposer : {"simdiag", "jennrich", "als", "tensorly_power"}
        The last two are tensorly's, as a cross-check.
    refine : {"auto", "off"}
        "auto": taken only where it brings the residual to rounding level, or down tenfold, as noise does not allow.
    whiten_weights : bool, optional
        Draw the neurons with the inverse second moment of the public images, which spreads similar samples apart.
        None: where the first estimate is not exact (other activations than the cubic) and behind a stem.
    scale : float, optional
        Typical size of w.x; None: 1, and 2 for GELU, whose fourth moment is larger there.
    head_signs : bool, optional
        Random signs in the head's row, which keep its output small where its entries are larger than 1/m, and these
        keep the head from turning in several local steps; None: under several local steps.
    head_strength : float, optional
        Size of the head's entries; None: 1/m, or 1/sqrt(m) with signs.
    restarts : int
        Starts tried where single entries are solved for (top-k, last layer); the classes of a whole last layer are
        solved one by one before that, from as many starts as their size allows.

    References
    ----------
    Wang, Lee, Lei, "Reconstructing Training Data from Model Gradient, Provably", AISTATS 2023.
    """

    needs: ClassVar[Needs] = Needs(
        update="steps",
        sums="dense",
        fresh=True,
        block=Block(TwoLayer, "a wide two-layer head", "two-layer or lenet-two-layer"),
        helped=True,
    )

    method: Literal["exact", "published"] = "exact"
    view: Literal["full", "last_layer"] = "full"
    batch: Positive | None = None
    decomposer: Decomposer = "simdiag"
    refine: Literal["auto", "off"] = "auto"
    whiten_weights: bool | None = None
    scale: Strength | None = None
    head_signs: bool | None = None
    head_strength: Strength | None = None
    restarts: Positive = 4

    def probe(self, scenario: Scenario, facts: Facts) -> None:
        """Refuse what cannot be identified: activation, width, or too few entries."""
        model, training = scenario.model, scenario.training
        module = armable(scenario, TwoLayer)
        assert model.activation is not None
        order = stein_order(ACTIVATIONS[model.activation])
        if self.method == "published" and order != 3:
            raise NotApplicable(
                f"model.activation = {model.activation!r} has a zero third Hermite coefficient, and method "
                "'published' averages third moments; use poly3 or method 'exact'"
            )
        batch = self.batch or _fewest_samples(scenario, facts)
        if not batch:
            return  # all of a client's samples: known when it declares them
        m, d = module.wide.weight.shape
        if self.view == "last_layer" or not is_complete(scenario):
            _check_entries(self.view, scenario, module, batch)
        elif self.method == "exact":
            several = training.steps(batch) > 1
            needed = from_gradient.feature_count(batch, order if several else order - 1)
            steps = f" (in {training.steps(batch)} local steps)" if several else ""
            if batch > d:
                where = "training.batch_size" if batch == training.batch_size else "samples of an update"
                raise NotApplicable(
                    f"{where} = {batch}{steps} > input dimension {d}: the samples' span is the whole space"
                )
            if m < needed:
                closed = order == 3 and not several
                what = f"(B+1)(B+2)/2 = {needed}" if closed else f"at least {needed}"
                raise NotApplicable(
                    f"model.width = {m} < {needed}: regression with {model.activation} needs {what} neurons for B = "
                    f"{batch} samples{steps}; raise --width or lower --batch-size"
                    + (" or --local-steps" if several else "")
                )

    def arm(
        self,
        scenario: Scenario,
        weights: dict[str, Tensor],
        seed: int,
        auxiliary: Auxiliary | None,
        candidates: Candidates | None = None,
        turn: int = 0,
    ) -> dict[str, Tensor]:
        """The weights to send: Gaussian neurons, and a head of one constant row; see :func:`.arming.armed`."""
        activation = scenario.model.activation
        assert activation is not None
        return armed(
            scenario,
            weights,
            seed,
            auxiliary,
            scale=self.scale or (2.0 if activation == "gelu" else 1.0),
            signs=scenario.training.local_steps > 1 if self.head_signs is None else self.head_signs,
            strength=self.head_strength,
            whiten=self.whiten_weights,
            spread=not is_polynomial(activation) or scenario.model.name != "two-layer",
        )

    def one(
        self, observation: Observation, seed: int, device: torch.device, progress: Progress
    ) -> Reconstruction:
        """Rebuild, label, certify."""
        try:
            return _Victim(self, observation, seed, device, progress).answer()
        except NotApplicable as reason:
            return failed("tensor", observation, str(reason), residual=None)


def _fewest_samples(scenario: Scenario, facts: Facts) -> int:
    """The fewest samples that an update to be attacked may hold; 0: not known before a client declares them.

    All samples that the local steps go through leave a part in one update, and those of all clients in a sum.
    """
    training = scenario.training

    def seen(count: int) -> int:
        size = training.batch_size
        return min(count, size * training.steps(count)) if size else count

    if facts.samples:
        found = min(map(seen, facts.samples))
    else:
        found = training.batch_size * training.local_steps
    return found * (facts.drawn or 1) if hides_clients(scenario.defense) else found


def _check_entries(view: str, scenario: Scenario, module: TwoLayer, batch: int) -> None:
    """Refuse fewer equations than unknowns, as far as the settings tell."""
    (m, d), classes = module.wide.weight.shape, module.head.out_features
    unknowns = batch * d
    if not is_complete(scenario):
        compression = scenario.compression
        entries = round(compression.rate * m * (d + classes))
        if view == "last_layer":
            entries = min(entries, m * classes)
        if compression.warmup_rounds:
            return
        what = "kept entries"
    else:
        entries, what = m * min(batch, classes - 1), "independent entries of the head"
    if entries < unknowns:
        raise NotApplicable(
            f"{what} {entries} < unknowns {unknowns}: underdetermined for B = {batch}; raise --width (now {m}), keep "
            "more, or lower --batch-size"
        )


@dataclass
class _Answer:
    """Inputs of the wide layer, what the labels are, and why a small residual would not vouch for them."""

    inputs: Tensor
    labelled: Labelled
    residual: float
    parts: dict[str, float] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)
    error: float | None = None
    hidden: int = 0
    """Samples that only the declared number tells of,"""
    brightness: float = 0.0
    """and how bright they may be, root mean square over their pixels."""

    @property
    def certified(self) -> bool:
        """Whether the answer explains the update to rounding and nothing else would."""
        return self.residual <= CERTIFIED and not self.doubts


class _Victim:
    """One observation."""

    def __init__(
        self,
        attack: TensorAttack,
        observation: Observation,
        seed: int,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self._attack, self._observation, self._device = attack, observation, device
        self._progress, self._seed = progress, seed
        scenario = observation.scenario
        self._module = armable(scenario, TwoLayer).eval()
        self._module.load_state_dict(observation.weights)
        assert scenario.model.activation is not None
        weights = {name: tensor.to(device) for name, tensor in observation.weights.items()}
        self._head = TwoLayerHead.of(
            weights["wide.weight"], weights["head.weight"], scenario.model.activation
        )
        training = scenario.training.model_copy(update={"local_steps": 1})
        one_step = dataclasses.replace(scenario, training=training)
        one_gradient.check_received(dataclasses.replace(observation, scenario=one_step))
        self._update = one_gradient.mean_gradient(observation)
        self._samples = attack.batch or observation.num_examples
        self._generator = torch_rng(seed, "tensor", observation.round, observation.client)
        self._notes: list[str] = []
        self._figures: dict[str, Any] = {"kept": observation.update.kept}

    def answer(self) -> Reconstruction:
        complete = self._update.indices is None or self._update.kept == self._update.numel
        if self._observation.client == EVERYONE and not complete:
            raise NotApplicable(
                "secure aggregation of sparse updates: each entry is the sum over those clients that sent it, and no "
                "entry of one gradient; use compression.name 'none'"
            )
        several = self._observation.scenario.training.local_steps > 1
        if self._attack.method == "published":
            found, method = self._published(), "published"
        elif not complete or self._attack.view == "last_layer":
            found, method = self._from_entries(complete), "entries"
        elif several:
            found, method = self._from_steps(), "local steps"
        else:
            found, method = self._from_gradient(), "tensor"
        return self._finished(found, method)

    def _dense(self) -> tuple[Tensor, Tensor]:
        tensors = self._update.dense()
        wide, last = (tensors[name].to(self._device).double() for name in ("wide.weight", "head.weight"))
        return wide, last

    def _scaled(self, wide: Tensor) -> Tensor:
        """The wide layer's gradient as ``sum_i r_i s'(W x_i) x_i'``."""
        return wide * (self._samples / self._head.scale[:, None])

    def _from_gradient(self) -> _Answer:
        wide, last = self._dense()
        y = self._scaled(wide)
        self._progress(0.0, "span")
        bases, notes = from_gradient.find_span(
            self._head, y, self._attack.batch, self._observation.num_examples, self._generator
        )
        self._notes += notes
        best, reason = None, None
        notes, figures = list(self._notes), dict(self._figures)
        for basis in bases:
            self._notes, self._figures = list(notes), dict(figures)
            if best is not None:
                self._notes.append(f"rank {basis.shape[1]} explains the update better")
            try:
                found = self._in_span(basis, y, wide, last)
            except NotApplicable as error:
                reason = reason or error
                continue
            if best is None or self._prefers(found, best):
                best, best_notes, best_figures = found, self._notes, self._figures
            if found.certified:
                break
        if best is None:
            assert reason is not None
            raise reason
        self._notes, self._figures = best_notes, best_figures
        return best

    def _prefers(self, found: _Answer, best: _Answer) -> bool:
        """Whether an answer of lower rank is better: certified, of the declared number, or far smaller a residual."""
        told, known = (int(one.labelled.counts.sum()) == self._samples for one in (found, best))
        if found.certified or best.certified or told != known:
            return found.certified or (not best.certified and told and found.residual < 2 * best.residual)
        return found.residual < 0.1 * best.residual

    def _in_span(self, basis: Tensor, y: Tensor, wide: Tensor, last: Tensor) -> _Answer:
        self._progress(0.1, "tensor")
        estimate = from_gradient.from_wide(
            self._head, y, basis, self._attack.decomposer, self._generator, self._seed
        )
        self._take(estimate)
        self._progress(0.5, "labels")
        if homogeneous(self._head.name):
            return self._from_products(estimate, y, wide, last)
        found = self._labelled(estimate.inputs, wide, last)
        if self._attack.refine == "off" or found.certified:
            return found
        fit = refine(self._head, y, estimate.inputs, estimate.weights, progress=self._refining)
        found = self._better(found, self._labelled(fit.inputs, wide, last))
        if found.certified or found.residual > _NEAR or found.labelled.doubt > certificate.COUNT:
            return found
        before = dict(self._figures)
        settled = settle(self._head, y, found.inputs, found.labelled.counts.to(y.device))
        again = self._better(found, self._labelled(settled, wide, last))
        self._figures = self._figures | before | {"settled": again is not found}
        return again

    def _from_products(self, estimate: Estimate, y: Tensor, wide: Tensor, last: Tensor) -> _Answer:
        """ReLU: exact masks give r_i x_i, cross-entropy the scale."""

        def scaled(products: Tensor, signs: Tensor) -> _Answer:
            directions = products / products.norm(dim=1, keepdim=True).clamp_min(1e-300) * signs[:, None]
            norms = fix_scales(self._head, directions, last, self._samples)
            return self._labelled(directions * norms[:, None], wide, last)

        found = scaled(estimate.inputs, torch.ones_like(estimate.weights))
        if self._attack.refine == "off" or found.certified:
            return found
        basis = torch.linalg.qr(estimate.inputs.T).Q
        products, signs, explained = relu_masks(
            self._head, y, basis, estimate.inputs * estimate.weights[:, None]
        )
        self._figures["neurons_explained"] = explained
        return self._better(found, scaled(products, signs))

    def _from_steps(self) -> _Answer:
        wide, last = self._dense()
        if not float(wide.norm()) > 0:
            raise NotApplicable("the wide layer did not move: nothing of the batch is in the update")
        # The spectrum of several gradients has no clear end; the declared batch is believed.
        declared = self._observation.num_examples
        (basis,), notes = from_gradient.find_span(
            self._head, wide, self._attack.batch or declared, declared, self._generator
        )
        self._notes += notes
        self._notes.append(
            f"{self._observation.scenario.training.local_steps} local steps: span from the wide layer's change, "
            "tensor from the head's"
        )
        estimate = from_gradient.from_head(
            self._head, last * self._samples, basis, self._attack.decomposer, self._generator
        )
        self._take(estimate)
        found = self._labelled(estimate.inputs, wide, last)
        training = self._observation.scenario.training
        if self._observation.client == EVERYONE or not from_steps.replayable(training, self._samples):
            self._notes.append(
                "the client's order of batches (or its weight decay, or several clients' own steps) is not in the "
                "update: the steps cannot be played again, and the residual is that of one gradient"
            )
            return found
        positions, labels = found.labelled.expanded()
        if len(positions) != len(found.inputs):
            # The head's mean residuals are no residuals of one model: one sample each, by the most negative class.
            delta = residuals_of(self._head, found.inputs, last, self._samples)
            counts = torch.nn.functional.one_hot(delta.argmin(1), self._head.classes)
            found = dataclasses.replace(found, labelled=Labelled(counts, 0.5))
            positions, labels = found.labelled.expanded()
        raw = self._observation.update.dense()
        change = {n: raw[n].to(self._device).double() for n in ("wide.weight", "head.weight")}
        # New weights are float32: their rounding is all that is left of small changes.
        self._figures["rounding"] = max(
            2.0**-25 * float(weight.norm() / change[name].norm().clamp_min(1e-300))
            for name, weight in (("wide.weight", self._head.wide), ("head.weight", self._head.head))
        )
        labels = labels.to(self._device)
        found = self._replayed(found, found.inputs, labels, change)
        if self._attack.refine == "off":
            return found
        inputs = from_steps.fit(
            self._head,
            change["wide.weight"],
            change["head.weight"],
            found.inputs,
            labels,
            training,
            basis,
            progress=self._refining,
        )
        return self._better(found, self._replayed(found, inputs, labels, change))

    def _replayed(self, found: _Answer, inputs: Tensor, labels: Tensor, change: dict[str, Tensor]) -> _Answer:
        """The answer with the residual of the client's whole training played again."""
        wide, last = from_steps.play(
            self._head, self._head.wide, inputs, labels, self._observation.scenario.training
        )
        seen = change["wide.weight"], change["head.weight"]
        parts = {"head": _relative(seen[1], last), "wide": _relative(seen[0], wide)}
        # The certificate is that of one gradient, of which several small steps are a multiple.
        factor = 1.0 / one_gradient.gradient_unit(self._observation)
        left = factor * (seen[0] - wide), factor * (seen[1] - last)
        residual = max(parts.values())
        labelled = found.labelled
        if residual <= CERTIFIED:  # playing it again has tried the labels, whatever the mean residuals said
            labelled = dataclasses.replace(labelled, doubt=0.0)
        return self._weighed(_Answer(inputs, labelled, residual, parts), *left)

    def _from_entries(self, complete: bool) -> _Answer:
        entries = self._entries()
        unknowns = self._samples * self._head.inputs
        if complete and self._attack.view == "last_layer":
            equations = self._head.width * min(self._samples, self._head.classes - 1)
        else:
            equations = entries.count
        self._figures |= {"equations": equations, "unknowns": unknowns}
        if equations < unknowns:
            raise NotApplicable(
                f"kept entries {equations} < unknowns {unknowns}: underdetermined; a wider model or a "
                "smaller batch helps"
            )
        equations = min(equations, entries.independent(self._samples))
        if not float(from_entries.targets(entries).norm()) > 0:
            raise NotApplicable("the entries that were sent are zero: nothing of the batch is in them")
        gradient, first = entries.head_gradient(self._head), None
        if gradient is not None:
            first = by_class.solve(self._head, gradient, self._samples, self._generator)
        solution = from_entries.solve(
            self._head,
            entries,
            self._samples,
            self._attack.restarts,
            self._generator,
            CERTIFIED,
            certificate.SAFETY,
            ladder=self._ladder(),
            first=first,
            progress=lambda part: self._progress(part, "entries"),
        )
        counts = torch.nn.functional.one_hot(solution.labels, self._head.classes)
        answer = _Answer(
            solution.inputs, Labelled(counts, min(1.0, solution.residual)), solution.residual, solution.parts
        )
        if answer.residual <= CERTIFIED:
            self._figures["unseen"] = solution.unseen
            answer.error = solution.error
            answer.doubts = self._entry_doubts(answer, entries, solution.labels, equations)
        return answer

    def _entry_doubts(
        self, answer: _Answer, entries: from_entries.Entries, labels: Tensor, equations: int
    ) -> list[str]:
        unknowns = answer.inputs.numel()
        unseen = self._figures["unseen"]
        doubts = []
        if equations < SPARE * unknowns:
            doubts.append(
                f"{equations} independent equations for {unknowns} unknowns: too few to single out one batch"
            )
        if unseen > from_entries.UNSEEN:
            doubts.append(
                f"the entries that were sent leave {unseen:.1%} of a random change of the inputs unseen: they fit "
                "many batches"
            )
        trace = certificate.traces(self._head, entries, answer.inputs, labels)
        if not float(trace.min()) > certificate.TRACE * max(answer.parts["head"], 1e-8):
            doubts.append(NO_TRACE)
        return doubts + self._doubts(answer)

    def _ladder(self) -> list[Tensor]:
        """Cosine waves up to ever higher frequencies: what most of an image is made of."""
        channels, height, width = self._observation.scenario.image_shape
        if not isinstance(self._module.stem, torch.nn.Flatten) or min(height, width) < _LEAST_SIDE:
            return []
        down, across = (torch.from_numpy(dct(np.eye(n), axis=0, norm="ortho")) for n in (height, width))
        colours = torch.eye(channels, dtype=torch.float64)
        rungs = []
        for share in _RUNGS:
            planes = torch.kron(down[: math.ceil(share * height)], across[: math.ceil(share * width)])
            rungs.append(torch.kron(colours, planes).T.to(self._device))
        return rungs

    def _published(self) -> _Answer:
        if self._update.indices is not None:
            raise NotApplicable("method 'published' averages over all neurons: it needs a complete update")
        wide, last = self._dense()
        y = None if self._attack.view == "last_layer" else self._scaled(wide)
        g = (self._head.row @ last) * self._samples
        estimate = from_gradient.published(self._head, g, y, self._samples, self._generator)
        self._take(estimate)
        answer = self._labelled(estimate.inputs, wide, last)
        if y is None:
            answer.doubts.append("averages over the neurons leave no equations to check the inputs by")
        return answer

    def _entries(self) -> from_entries.Entries:
        found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for name, shape, positions, values in self._update.layers():
            if name in ("wide.weight", "head.weight"):
                at, values = positions.to(self._device), values.to(self._device).double()
                found[name] = at // shape[1], at % shape[1], values
        if self._attack.view == "last_layer":
            found["wide.weight"] = tuple(part[:0] for part in found["wide.weight"])  # type: ignore[assignment]
        return from_entries.Entries(*found["head.weight"], *found["wide.weight"])

    def _refining(self, share: float) -> None:
        self._progress(0.5 + 0.5 * share, "refinement")

    def _take(self, estimate: Estimate) -> None:
        self._notes += estimate.notes
        self._figures |= estimate.figures

    def _labelled(self, inputs: Tensor, wide: Tensor, last: Tensor) -> _Answer:
        """Labels from the head's gradient, and the residual of the whole answer put through the model."""
        if not bool(torch.isfinite(inputs).all()):
            raise NotApplicable("the decomposition is degenerate: the samples cannot be told apart")
        found = self._explained(inputs, wide, last)
        dark = self._head.activation.value(inputs.new_zeros(1)) != 0
        if found.residual > CERTIFIED and len(inputs) < self._samples and bool(dark):
            # A black picture is nothing to the wide layer, and something to the head.
            other = self._explained(torch.cat([inputs, torch.zeros_like(inputs[:1])]), wide, last)
            found = other if other.residual < found.residual else found
        return found

    def _explained(self, inputs: Tensor, wide: Tensor, last: Tensor) -> _Answer:
        delta = residuals_of(self._head, inputs, last, self._samples)
        labelled = read_labels(self._head, inputs, delta)
        positions, labels = (part.to(inputs.device) for part in labelled.expanded())
        share = len(positions) / self._samples  # samples without a gradient count in the client's mean
        model_wide, model_last = (share * part for part in self._head.gradient(inputs[positions], labels))
        parts = {"head": _relative(last, model_last)}
        if self._attack.view == "full":
            parts["wide"] = _relative(wide, model_wide)
        answer = _Answer(inputs, labelled, max(parts.values()), parts)
        return self._weighed(answer, wide - model_wide, last - model_last)

    def _weighed(self, answer: _Answer, wide: Tensor, last: Tensor) -> _Answer:
        """The answer with its doubts, from what it leaves of the gradients of the wide layer and of the head."""
        if answer.residual > CERTIFIED:
            return answer
        head, inputs = self._head, answer.inputs
        counts = answer.labelled.counts.to(inputs.device)
        delta = counts.sum(1, keepdim=True) * head.logits(inputs).softmax(1) - counts
        of_counts = certificate.count_errors(head, inputs, last, self._samples)
        weights, left = delta @ head.row, self._scaled(wide)
        errors = certificate.input_errors(head, inputs, weights, left)
        if homogeneous(head.name):
            of_norms = certificate.norm_errors(head, inputs, counts, of_counts)
            errors = errors + of_norms * inputs.square().mean(1).sqrt()
        merged = certificate.merged_errors(head, inputs, counts, left, answer.residual, self._generator)
        if normaliser(self._observation.scenario.model) is None:
            # Nothing but black lies on either side of black.
            merged = torch.where(inputs.any(1), merged, counts.sum(1) * errors)
        errors = errors + merged
        answer.error = float(errors.max())
        missing = self._samples - int(counts.sum())
        if missing > 0 and isinstance(self._module.stem, torch.nn.Flatten):
            answer.brightness = certificate.hidden_brightness(head, inputs, largest(left, self._generator))
            # What a dark picture leaves, the others' errors and the head's gradient take up.
            answer.error *= certificate.ABSORBED
            if answer.brightness <= certificate.DARK and answer.residual <= certificate.CLEAN:
                answer.hidden = missing
            else:
                answer.doubts.append(
                    f"{missing} of {self._samples} samples leave no trace, as pictures of brightness "
                    f"{answer.brightness:.0e} would"
                )
        if max(float(of_counts.max()), answer.labelled.doubt) > certificate.COUNT:
            answer.doubts.append(NO_TRACE)
        answer.doubts += self._doubts(answer)
        return answer

    def _doubts(self, answer: _Answer) -> list[str]:
        """What speaks against any route's answer."""
        doubts = []
        assert answer.error is not None
        if not answer.error <= certificate.UNCERTAIN:
            doubts.append(f"noise of the residual's size may move an input by {answer.error:.0e}")
        if self._samples != self._observation.num_examples:
            doubts.append(
                f"setting 'tensor.batch' = {self._samples}, and the client declares "
                f"{self._observation.num_examples} samples: equal ones count as one in a mean"
            )
        counts = answer.labelled.counts.to(answer.inputs.device)
        if certificate.has_twins(self._head, answer.inputs, counts):
            doubts.append(f"{self._head.name}: another brightness of a sample explains the update as well")
        if isinstance(self._module.stem, torch.nn.Flatten):
            # Root mean square over the worst input's entries.
            scenario = self._observation.scenario
            seen = pixels(answer.inputs.reshape(-1, *scenario.image_shape), scenario.model).flatten(1)
            outside = seen - seen.clamp(0, 1)
            off = float(outside.square().mean(1).sqrt().max())
            if off > certificate.UNCERTAIN:
                doubts.append(
                    f"the inputs leave the range of pixels by {off:.0e}: another batch explains the update"
                )
        return doubts

    def _better(self, found: _Answer, refined: _Answer) -> _Answer:
        taken = refined.residual <= CERTIFIED or refined.residual < 0.1 * found.residual
        self._figures["residual_before_refinement"] = found.residual
        self._figures["refined"] = bool(taken and refined.residual <= found.residual)
        return refined if self._figures["refined"] else found

    def _finished(self, found: _Answer, method: str) -> Reconstruction:
        positions, labels = found.labelled.expanded()
        inputs = found.inputs.cpu()[positions]
        norms = found.inputs.norm(dim=1).cpu()
        told = len(inputs) + found.hidden == self._samples
        status = status_of(found.residual, vouched=found.certified and told)
        reason = ""
        if status == "failed":
            reason = f"residual {found.residual:.0e}: the answer does not explain the update"
            reason += "".join(f"; {note}" for note in self._notes if "dependent" in note)
        self._notes += [
            f"residual {found.residual:.0e}, but not certified: {doubt}" for doubt in found.doubts
        ]
        if status != "certified" and not found.doubts:
            self._notes.append(
                f"residual {found.residual:.0e}: not certified; retry with another seed or more neurons"
            )
        if found.hidden:
            self._notes.append(
                f"{found.hidden} of {self._samples} samples leave no trace (black pictures, of brightness "
                f"{found.brightness:.0e} at most): their number is the declared one less the {len(inputs)} that are "
                "seen and vouched for; they are answered without labels (-1)"
            )
            inputs = torch.cat([inputs, inputs.new_zeros(found.hidden, inputs.shape[1])])
            labels = torch.cat([labels, labels.new_full((found.hidden,), -1)])
        elif not told:
            self._notes.append(f"{len(inputs)} samples found, {self._samples} in the batch")
        images = self._images(inputs, self._observation.scenario.image_shape)
        if "feature_residual" in self._figures:
            self._figures["features_status"] = status
            if status == "certified":
                # The residual vouches for the features; what the stem lost is the prior's guess.
                status = "approximate"
                self._notes.append(
                    "features certified; the images are the likeliest with these features, not the only ones"
                )
        self._progress(1.0, f"{status}, residual {found.residual:.0e}")
        return Reconstruction(
            images=images.clamp(0, 1).float(),
            labels=labels,
            loss=found.residual,
            label_confidence=max(0.0, 1.0 - 2 * found.labelled.doubt) * (1 - found.hidden / self._samples),
            method=f"tensor ({method})",
            details={
                "status": status,
                "reason": reason,
                "residual": found.residual,
                "residual_parts": found.parts,
                "predicted_error": found.error,
                "batch": len(found.inputs),
                "inferred": found.hidden,
                "inferred_error": found.brightness if found.hidden else None,
                "copies": found.labelled.counts.sum(1).tolist(),
                "norms": norms.tolist(),
                "notes": self._notes,
                **self._figures,
            },
        )

    def _images(self, inputs: Tensor, shape: tuple[int, int, int]) -> Tensor:
        if isinstance(self._module.stem, torch.nn.Flatten):
            return pixels(inputs.reshape(-1, *shape), self._observation.scenario.model)
        stem = attach(copy.deepcopy(self._module.stem), self._observation.scenario.model)
        images, figures = invert_stem(stem, inputs, shape, self._observation.auxiliary)
        self._figures |= figures
        return images


def _relative(seen: Tensor, model: Tensor) -> float:
    return float((seen - model).norm() / seen.norm().clamp_min(1e-300))
