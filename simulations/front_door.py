"""What a library user calls: :func:`invert`, :func:`audit`, :func:`simulate`; handed on by :mod:`fedattack`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from torch import Tensor, nn

from adversaries import Attack, ReconstructionAttack
from adversaries.base import Progress, no_progress
from adversaries.needs import Facts
from adversaries.refusals import applicable
from fedattack.audit import AuditResult, audit_reconstruction, headline
from fedattack.audit.image_scores import check_metrics
from fedattack.config import Config, ModelConfig
from fedattack.data.arrays import Layout, as_images, as_labels, listing_of
from fedattack.data.load import held
from fedattack.errors import ConfigError, NotApplicable, RunFailed
from fedattack.groundtruth import GroundTruth
from fedattack.metrics import build_metrics
from fedattack.models import dry_run, live, resolve
from fedattack.models.updates import After, read_update
from fedattack.observation import Auxiliary, Observation, Reconstruction, Scenario, UpdateKind
from fedattack.reporting.report import write_results
from fedattack.rng import adversary_seed
from fedattack.storage.records import summary_document
from simulations.engine.environment import cpu_threads
from simulations.experiments.choose import choose_attacks
from simulations.experiments.executor import choose_device
from simulations.experiments.victims import Victims
from simulations.pipeline import RunResult, open_run_folder, with_threats
from simulations.pipeline import simulate as run_pipeline

Model = nn.Module | type[nn.Module] | Callable[..., nn.Module]
Protocol = Literal["gradient", "delta"]

EXACT = ("analytic", "spear", "rgap")
"""Attacks that say of their answer whether it is certain, in the order in which "auto" asks them."""

SEARCHING = ("gauss-newton", "ig")
"""Attacks that search: the first that applies is asked where none of :data:`EXACT` is certain."""


@dataclass(frozen=True)
class Inversion:
    """What attacks made of one update.

    Attributes
    ----------
    answers : dict of str to Reconstruction
        Attack -> its images, labels, objective (`loss`), certificate, floors and details.
    chosen : str
        The attack whose answer :attr:`images` is: the only one, or the one that is certain of it by its own
        certificate; "" where several answered and none is. The truth has no say in it.
    failed, left_out : dict of str to str
        Attack -> why it has no answer, or was not asked.
    notes : tuple of str
        What to know before believing anything.
    observation : Observation
        What the attacks were given.
    auto : bool
        Whether the attacks were left to choose.
    """

    answers: dict[str, Reconstruction]
    chosen: str
    failed: dict[str, str]
    left_out: dict[str, str]
    notes: tuple[str, ...]
    observation: Observation = field(repr=False)
    auto: bool = False

    def __getitem__(self, attack: str) -> Reconstruction:
        """One attack's answer; KeyError where it has none."""
        return self.answers[attack]

    @property
    def answer(self) -> Reconstruction:
        """The chosen answer; ConfigError where several answered and none is certain."""
        if not self.chosen:
            raise ConfigError(
                f"{', '.join(self.answers)} answered, and none is certain of its answer: name one, as "
                f"found[{next(iter(self.answers))!r}].images; what tells them apart is in their certificates"
            )
        return self.answers[self.chosen]

    @property
    def images(self) -> Tensor:
        """Reconstructed images, float32 (B, C, S, S) in [0, 1]."""
        return self.answer.images

    @property
    def labels(self) -> Tensor:
        """Their inferred labels, int64 (B,)."""
        return self.answer.labels

    @property
    def floors(self) -> dict[str, Tensor]:
        """What the same attacker would have answered without the update, (B, C, S, S) each."""
        return self.answer.floors

    @property
    def objective(self) -> float:
        """The attack's own final objective, which falls as it succeeds."""
        return self.answer.loss

    @property
    def certificate(self) -> float | None:
        """The attack's own measure of how well the answer explains the update: its residual; None: it has none."""
        return certificate_of(self.answer)

    @property
    def certified(self) -> bool:
        """Whether the attack is certain: nothing else explains the update as well."""
        return self.answer.details.get("status") == "certified"

    def __str__(self) -> str:
        lines = []
        for name, answer in self.answers.items():
            residual = certificate_of(answer)
            said = "no certificate" if residual is None else f"certificate {residual:.2g}"
            status = answer.details.get("status")
            lines.append(
                f"{name}: {len(answer.images)} image(s), labels {answer.labels.tolist()}, {said}"
                + (f", {status}" if status else "")
            )
        lines += [f"{name} failed: {why}" for name, why in self.failed.items()]
        if self.auto:
            lines.append(f"not asked: {', '.join(self.left_out) or 'none'} (left_out says why)")
        else:
            lines += [f"{name} is left out: {why}" for name, why in self.left_out.items()]
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True)
class Audit:
    """What an update gives away, scored against the truth.

    Attributes
    ----------
    audits : dict of str to AuditResult
        Attack -> scores, floors, verdict.
    inversion : Inversion
        What the attacks answered.
    folder : Path or None
        The run folder, where one was asked for.
    summary : dict
        As ``summary.json``.
    """

    audits: dict[str, AuditResult]
    inversion: Inversion
    folder: Path | None
    summary: dict[str, Any] = field(repr=False)

    def __getitem__(self, attack: str) -> AuditResult:
        """One attack's scores."""
        return self.audits[attack]

    @property
    def report(self) -> Path | None:
        """The page that opens from disk; None where no folder was asked for."""
        return None if self.folder is None else self.folder / "report.html"

    @property
    def headline(self) -> str:
        """The worst that was found, in a sentence."""
        found = headline(list(self.audits.values()))
        return "" if found is None else str(found["text"])

    def __str__(self) -> str:
        return "\n".join([self.headline, *(f"{name}: {one.verdict}" for name, one in self.audits.items())])


def certificate_of(answer: Reconstruction) -> float | None:
    """An answer's certificate, or the relative residual that stands for one."""
    if answer.certificate is not None:
        return answer.certificate
    residual = answer.details.get("residual")
    return None if residual is None else float(residual)


@dataclass(frozen=True)
class _Asked:
    """One request, ready to be carried out: the observation, its configuration and the attacks that apply."""

    observation: Observation
    config: Config
    attacks: dict[str, ReconstructionAttack]
    left_out: dict[str, str]
    notes: tuple[str, ...]
    auto: bool


def invert(
    model: Model | Sequence[nn.Module],
    update: Any = None,
    *,
    image_shape: Sequence[int],
    attack: str | Sequence[str] = "auto",
    classes: int | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    num_examples: int | None = None,
    labels: Any = None,
    protocol: Protocol | None = None,
    learning_rate: float | None = None,
    local_steps: int = 1,
    batch_size: int | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    batch_norm: Literal["train", "eval"] | None = None,
    auxiliary: Any = None,
    weights: Mapping[str, Any] | None = None,
    layout: Layout | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
    threads: int = 1,
    progress: Progress = no_progress,
) -> Inversion:
    """Rebuild the images of a batch from its gradient, or from a weight change, of your own model.

    Parameters
    ----------
    model
        The module that was sent out, with the weights it had then; or ``[before, after]``, whose difference is the
        update. Its forward pass takes images (B, C, S, S) and answers logits (B, classes).
    update
        Gradients as a list in the order of ``model.parameters()`` or as a dict by name, of any number type, None
        for frozen parameters; a weight change by name; or the module after training.
    image_shape
        (C, S, S): 1 or 3 channels, square.
    attack
        Names of reconstruction attacks, with commas or as a sequence. "auto": those that solve exactly where they
        apply, until one certifies its answer; else ``gauss-newton``, or ``ig`` where that does not apply.
    classes
        None: as many as the model answers.
    mean, std
        What is taken off images in [0, 1], and what they are divided by then, before your model sees them; one
        number or one for each channel. None: your model takes images in [0, 1], or normalises them itself.
    num_examples
        Images in the batch, as the client declares; None: as many as `labels`, or 1.
    labels
        Labels, where the client declares them; None: they are inferred from the update.
    protocol : {"gradient", "delta"}, optional
        Gradient of the mean cross-entropy, or new weights minus old ones; None: "delta" where two models or two
        state dicts are given, or a `learning_rate`.
    learning_rate, local_steps, batch_size, momentum, weight_decay
        Of the client's SGD, for a weight change; `batch_size` of each local step, None: all images in each.
    batch_norm : {"train", "eval"}, optional
        Whether BatchNorm used the batch's statistics or the running ones; None: as the model stands
        (``model.training``).
    auxiliary
        Public images that the attacker has, as an array, or (images, labels).
    weights
        State dict that was sent out; None: the model's own.
    layout : {"NCHW", "NHWC"}, optional
        Where arrays of images have their channels; None: where there are 1 or 3.
    options
        Settings of attacks: ``{"gauss-newton.products": 4000}``.
    seed
        Of the attacks' own draws.
    device, threads
        Where attacks compute.
    progress
        Called with (share done, text).

    Raises
    ------
    BadRequest
        In one sentence, before anything is computed, where the request cannot be carried out.
    RunFailed
        If no attack came to an answer.
    """
    given = {name: value for name, value in locals().items() if name != "progress"}
    with _asked(**given) as asked:
        found, _ = _inverted(asked, progress)
    if not found.answers:
        why = "; ".join(f"{name}: {text}" for name, text in found.failed.items())
        raise RunFailed(f"no attack came to an answer: {why}")
    return found


def audit(
    model: Model | Sequence[nn.Module],
    update: Any = None,
    *,
    images: Any,
    labels: Any,
    folder: Path | str | None = None,
    declare_labels: bool = False,
    metrics: str | Sequence[str] | None = None,
    console: Console | None = None,
    **request: Any,
) -> Audit:
    """:func:`invert`, scored against the truth: what this update gives away, beside its floors.

    Parameters
    ----------
    images, labels
        The private batch: (B, C, S, S) or (B, S, S, C), uint8 or floats in [0, 1], and (B,). Attacks are not given
        them.
    folder
        Where to leave the report (``report.html``), pictures and records; None: nowhere.
    declare_labels
        Whether the client declares its labels to the server.
    metrics
        By what images are scored (``fedattack list metrics``); None: psnr, ssim, regcorr.
    console
        Where progress goes; None: nowhere.
    **request
        As for :func:`invert`; `image_shape` and `num_examples` are those of the images where left open.

    Raises
    ------
    BadRequest, RunFailed
        As :func:`invert`.
    """
    layout = request.get("layout")
    shape = request.get("image_shape")
    private = as_images(images, "images", layout, None if shape is None else _shape(shape))
    shape = tuple(private.shape[1:])
    classes = request.get("classes")
    named = as_labels(labels, len(private), classes)
    if request.get("num_examples") not in (None, len(private)):
        raise ConfigError(
            f"num_examples = {request['num_examples']}, and there are {len(private)} private images; leave it open"
        )
    request |= {"image_shape": shape, "num_examples": len(private)}
    if declare_labels:
        request["labels"] = named
    with _asked(model, update, more=_metric_settings(metrics), **request) as asked:
        model_classes = asked.observation.scenario.model.resolved[2]
        as_labels(named, len(private), model_classes)
        truth = GroundTruth(1, 0, private, named, tuple(range(len(private))))
        return _audited(asked, truth, folder, console or Console(quiet=True))


def simulate(
    model: Model | str | None = None,
    data: Any = None,
    attack: str | Sequence[str] | None = None,
    *,
    groups: Any = None,
    class_names: Sequence[str] | None = None,
    layout: Layout | None = None,
    folder: Path | str | None = None,
    console: Console | None = None,
    **settings: Any,
) -> RunResult:
    """Train a federation on your own model and data, attack it, and report what leaked.

    Parameters
    ----------
    model
        A module (its weights are the first ones), a class or function that makes one, or the name of a model.
    data
        (images, labels): uint8 or floats in [0, 1], (N, C, S, S) or (N, S, S, C), and whole numbers (N,); a torch
        data set whose items are (image, label); or the name of a data set.
    attack
        Names of attacks, with commas or as a sequence; None: none.
    groups
        Whose each sample is, (N,), for partitions and membership by person.
    class_names
        None: the numbers of the labels.
    layout : {"NCHW", "NHWC"}, optional
        Where arrays have their channels; None: where there are 1 or 3.
    folder
        Run folder, which holds the report; None: a new one below ``runs/``.
    console
        Where progress and the table go; None: nowhere.
    **settings
        Any setting by its short name with underscores, or by its dotted name: ``batch_size=4``,
        ``**{"ig.iterations": 300}``; as on the command line (``fedattack settings``). `engine` is "inline", and
        where model and data are names "ray", unless given.

    Raises
    ------
    BadRequest
        In one sentence, before anything starts.
    RunFailed
        If a run that had started could not be finished.
    """
    chosen: dict[str, Any] = {_setting(name): value for name, value in settings.items()}
    with ExitStack() as stack:
        if model is not None and not isinstance(model, str):
            _refuse_text(model)
            chosen["model"] = stack.enter_context(live.held(model))
        elif model is not None:
            chosen["model"] = model
        if data is not None and not isinstance(data, str):
            listing = listing_of(data, layout, groups, class_names)
            chosen["dataset"] = stack.enter_context(held(listing))
        elif groups is not None or class_names is not None:
            raise ConfigError("groups and class_names go with data in memory; a named data set has its own")
        elif data is not None:
            chosen["dataset"] = data
        in_memory = {"model": model, "data": data}
        if any(value is not None and not isinstance(value, str) for value in in_memory.values()):
            chosen.setdefault("engine", "inline")
            if chosen["engine"] != "inline":
                raise ConfigError(
                    f"engine = {chosen['engine']!r}: model and data in memory are known in this process alone; use "
                    "engine='inline', or names that other processes can import"
                )
        if attack is not None:
            chosen["attack"] = attack if isinstance(attack, str) else list(attack)
        if folder is not None:
            chosen["run-dir"] = str(folder)
        config = Config.from_mapping(chosen)
        return run_pipeline(config, console=console, command="fedattack.simulate(...), called from Python")


def _setting(name: str) -> str:
    """A setting as it is written elsewhere: batch_size is batch-size."""
    return name if "." in name else name.replace("_", "-")


def _refuse_text(model: Any) -> None:
    if not isinstance(model, nn.Module) and not callable(model):
        raise ConfigError(f"model is a {type(model).__name__}; {live.CONTRACT}, or the name of one")


def _shape(image_shape: Any) -> tuple[int, int, int]:
    """A square (C, S, S); ConfigError where it is something else."""
    accepted = "accepted: (C, S, S) with 1 or 3 channels and a side of 4 to 1024, as (3, 32, 32)"
    try:
        shape = tuple(int(side) for side in image_shape)
    except (TypeError, ValueError):
        raise ConfigError(f"image_shape = {image_shape!r}: {accepted}") from None
    if len(shape) != 3 or shape[0] not in (1, 3) or shape[1] != shape[2] or not 4 <= shape[1] <= 1024:
        raise ConfigError(f"image_shape = {shape}: {accepted}")
    return shape


def _metric_settings(metrics: str | Sequence[str] | None) -> dict[str, Any]:
    return {} if metrics is None else {"metrics": metrics if isinstance(metrics, str) else ",".join(metrics)}


def _positive(name: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} = {value!r}: a whole number from {least} is accepted")
    return value


@contextmanager
def _asked(
    model: Any,
    update: Any,
    *,
    image_shape: Any,
    attack: str | Sequence[str] = "auto",
    classes: int | None = None,
    mean: Any = None,
    std: Any = None,
    num_examples: int | None = None,
    labels: Any = None,
    protocol: Protocol | None = None,
    learning_rate: float | None = None,
    local_steps: int = 1,
    batch_size: int | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    batch_norm: Literal["train", "eval"] | None = None,
    auxiliary: Any = None,
    weights: Mapping[str, Any] | None = None,
    layout: Layout | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
    threads: int = 1,
    more: Mapping[str, Any] | None = None,
) -> Iterator[_Asked]:
    """Check a request and put it into the house's terms; the model is known inside the block."""
    shape = _shape(image_shape)
    kind = _kind(model, update, protocol, learning_rate)
    module, after = _sent_and_after(model, update)
    if kind == "delta" and learning_rate is None:
        raise ConfigError(
            "learning_rate is not given: a weight change is the gradient times the client's learning rate; say it"
        )
    if kind == "gradient" and local_steps != 1:
        raise ConfigError(f"local_steps = {local_steps}: a gradient is of one step; use protocol='delta'")
    read = read_update(module, after, kind, weights)
    count = _count(num_examples, labels)
    _positive("local_steps", local_steps)
    each = count if local_steps == 1 else (0 if batch_size is None else _positive("batch_size", batch_size))
    mode = batch_norm or ("train" if module.training else "eval")
    settings: dict[str, Any] = {
        "protocol": "fedsgd" if kind == "gradient" else "fedavg",
        "batch-size": each,
        "local-steps": local_steps,
        "training.momentum": momentum,
        "training.weight_decay": weight_decay,
        "training.batch_norm": mode,
        "compressor": "none",
        "engine": "inline",
        "clients": 1,
        "seed": seed,
        "device": device,
        "threads": threads,
        "dataset": "given",
        "image-size": shape[1],
    }
    if learning_rate is not None:
        settings["learning-rate"] = learning_rate
    for setting, value in (("mean", mean), ("std", std)):
        if value is not None:
            settings[setting] = (
                value if isinstance(value, int | float | str) else [float(one) for one in value]
            )
    names, auto = _names(attack)
    with live.held(read.module) as name:
        config = Config.from_mapping(
            {**settings, "model": name, "attack": names, **dict(options or {}), **dict(more or {})}
        )
        given = ModelConfig(name=name, mean=config.data.mean, std=config.data.std)
        resolved = resolve(
            given, shape[0], shape[1], 1 if classes is None else _positive("classes", classes, 2)
        )
        scenario = Scenario(resolved, config.training, config.compression)
        notes = [*read.notes, *dry_run(min(count, 16), scenario, seed)]
        public = _auxiliary(auxiliary, shape, scenario.model.resolved[2], layout)
        declared = None if labels is None else as_labels(labels, count, scenario.model.resolved[2])
        state = {name: tensor.detach().clone() for name, tensor in read.module.state_dict().items()}
        observation = Observation(
            1, 0, scenario, state, read.update, count, auxiliary=public, buffers=read.buffers, labels=declared
        )
        choose_device(device)
        facts = Facts(
            rounds=(1,),
            clients=1,
            drawn=1,
            samples=(count,),
            auxiliary=0 if public is None else len(public),
            labelled=None if public is None else public.labels is not None,
        )
        attacks = _reconstructing(choose_attacks(config))
        with cpu_threads(threads):
            chosen, left_out = applicable(attacks, scenario, facts)
        yield _Asked(observation, config, chosen, left_out, tuple(notes), auto)


def _kind(model: Any, update: Any, protocol: str | None, learning_rate: float | None) -> UpdateKind:
    """Whether the update is a gradient or a weight change."""
    differs = isinstance(model, list | tuple) or isinstance(update, nn.Module | After)
    if protocol not in (None, "gradient", "delta"):
        raise ConfigError(f"protocol = {protocol!r}: accepted: 'gradient', 'delta'")
    if protocol is None:
        return "delta" if differs or learning_rate is not None else "gradient"
    if protocol == "gradient" and differs:
        raise ConfigError(
            "protocol = 'gradient': the difference of two models is a weight change; use 'delta'"
        )
    return "gradient" if protocol == "gradient" else "delta"


def _sent_and_after(model: Any, update: Any) -> tuple[nn.Module, Any]:
    """The module that was sent out, and its update."""
    if isinstance(model, list | tuple):
        if len(model) != 2 or not all(isinstance(one, nn.Module) for one in model):
            raise ConfigError(
                f"model is a sequence of {len(model)}; accepted: a module, or [before, after] with both modules"
            )
        if update is not None:
            raise ConfigError(
                "two models and an update are given: their difference is the update; leave one out"
            )
        return model[0], model[1]
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise ConfigError(
            f"model is {what}; the module that was sent out is needed, for its weights: an nn.Module, or "
            "[before, after]"
        )
    if update is None:
        raise ConfigError("update is not given: the gradient, the weight change, or the model after training")
    return model, update


def _count(num_examples: int | None, labels: Any) -> int:
    """Images in the batch."""
    declared = None
    if labels is not None:
        try:
            declared = 1 if isinstance(labels, int) else len(labels)
        except TypeError:
            raise ConfigError(
                f"labels is a {type(labels).__name__}; whole numbers (B,) are accepted"
            ) from None
    if num_examples is None:
        return _positive("labels: their number", declared) if declared is not None else 1
    if declared not in (None, num_examples):
        raise ConfigError(
            f"num_examples = {num_examples}, and {declared} labels are declared; they must agree"
        )
    return _positive("num_examples", num_examples)


def _names(attack: str | Sequence[str]) -> tuple[list[str], bool]:
    """Names of attacks, and whether they were left to choose."""
    names = [part.strip() for part in attack.split(",")] if isinstance(attack, str) else list(attack)
    if names == ["auto"]:
        return [*EXACT, *SEARCHING], True
    if not names or not all(isinstance(name, str) and name for name in names) or "auto" in names:
        raise ConfigError(f"attack = {attack!r}: accepted: 'auto', or names of reconstruction attacks")
    return names, False


def _reconstructing(attacks: Mapping[str, Attack]) -> dict[str, ReconstructionAttack]:
    found: dict[str, ReconstructionAttack] = {}
    for name, attack in attacks.items():
        if not isinstance(attack, ReconstructionAttack):
            raise NotApplicable(
                f"attack {name!r} asks about {attack.family}, of a running federation: use fedattack.simulate; one "
                "update is read by reconstruction attacks, such as gauss-newton, ig, analytic"
            )
        found[name] = attack
    return found


def _auxiliary(
    given: Any, shape: tuple[int, int, int], classes: int, layout: Layout | None
) -> Auxiliary | None:
    if given is None:
        return None
    pair = isinstance(given, tuple | list) and len(given) == 2 and getattr(given[0], "ndim", 0) >= 3
    images = as_images(given[0] if pair else given, "auxiliary images", layout, shape)
    labels = as_labels(given[1], len(images), classes, "labels of auxiliary images") if pair else None
    return Auxiliary(images, labels, "given")


def _inverted(asked: _Asked, progress: Progress = no_progress) -> tuple[Inversion, dict[str, float]]:
    """What the attacks came to, and their seconds: all that were named, or "auto" until one is certain."""
    observation, seed = asked.observation, adversary_seed(asked.config.seed, "attack")
    answers: dict[str, Reconstruction] = {}
    failed: dict[str, str] = {}
    left_out, seconds = dict(asked.left_out), dict[str, float]()
    with tempfile.TemporaryDirectory(prefix="fedattack-") as scratch:
        for name, attack in asked.attacks.items():
            if asked.auto and _enough(name, answers):
                left_out[name] = f"{', '.join(answers)} answered before it; name it to have its answer too"
                continue
            job = Victims(name, attack, [observation], Path(scratch) / name, 3600.0, seed)
            with cpu_threads(asked.config.engine.threads):
                (found,) = job.run(None, choose_device(asked.config.engine.device), progress)
            seconds[name] = found.seconds
            if isinstance(found.answer, str):
                failed[name] = found.answer
            elif not len(found.answer.images) or found.answer.details.get("status") == "failed":
                failed[name] = str(found.answer.details.get("reason") or "it did not explain the update")
            else:
                answers[name] = found.answer
    certain = [name for name, answer in answers.items() if answer.details.get("status") == "certified"]
    chosen = (certain or (list(answers) if len(answers) == 1 else [""]))[0]
    notes = list(asked.notes)
    for name, answer in answers.items():
        said = answer.details.get("notes") or []
        notes += [f"{name}: {one}" for one in ([said] if isinstance(said, str) else said)]
    return Inversion(answers, chosen, failed, left_out, tuple(notes), observation, asked.auto), seconds


def _enough(name: str, answers: Mapping[str, Reconstruction]) -> bool:
    """Whether "auto" need not ask one more attack: one is certain, or one that searches has answered."""
    if any(answer.details.get("status") == "certified" for answer in answers.values()):
        return True
    return name in SEARCHING and any(searched in answers for searched in SEARCHING)


def _audited(asked: _Asked, truth: GroundTruth, folder: Path | str | None, console: Console) -> Audit:
    """Attack, score and, where a folder is given, report."""
    observation, key = asked.observation, asked.observation.key
    with ExitStack() as stack:
        place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedattack-"))) / "run"
        output = asked.config.output.model_copy(update={"run_dir": str(place)})
        config = asked.config.model_copy(update={"output": output})
        metrics = build_metrics(config.metric)
        check_metrics(metrics, observation.scenario.image_shape)
        with open_run_folder(config, console) as (run, shown):
            inversion, seconds = _inverted(asked, lambda share, text: shown("attacks", share, text))
            # Of attacks that were left to choose those that failed are as those that were not asked.
            failed = {} if asked.auto and inversion.answers else inversion.failed
            sitting = {n: a for n, a in asked.attacks.items() if n in inversion.answers or n in failed}
            scored = {}
            for name in sitting:
                answer = inversion.answers.get(name)
                if answer is not None:
                    run.save_reconstruction(name, key, answer, seconds[name])
                scored[name] = audit_reconstruction(
                    name,
                    [observation],
                    [answer],
                    [truth],
                    [seconds[name]],
                    reasons={key: failed[name]} if name in failed else None,
                    seed=config.seed,
                    metrics=metrics,
                )
            results = with_threats(scored, sitting, observation.scenario, observation.auxiliary)
            missing = inversion.left_out | {n: w for n, w in inversion.failed.items() if n not in failed}
            summary = summary_document(config, results, None, missing)
            if folder is not None:
                shape = " x ".join(str(side) for side in observation.scenario.image_shape)
                what = "gradient" if observation.update.kind == "gradient" else "weight change"
                write_results(
                    run,
                    results,
                    None,
                    command="fedattack.audit(...), called from Python",
                    notes=inversion.notes,
                    left_out=missing,
                    about=f"one {what} of {observation.scenario.model.name}, {observation.num_examples} image(s) "
                    f"of {shape}, seed {config.seed}",
                    heading="How much does this update leak?",
                )
    found = {one.attack: one for one in results}
    return Audit(found, inversion, None if folder is None else Path(folder), summary)
