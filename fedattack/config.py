"""The settings of a run: one validated model, filled from the command line, a TOML file or Flower's run-config.

Three spellings reach the same setting:

* dotted, as in ``config.toml`` and ``--set``: ``compression.rate``;
* short, as on the command line and in Flower's flat run-config: ``compression``, ``learning-rate``
  (the table :data:`SHORT_NAMES`);
* an attack's own parameters: ``hcgla.iterations`` or, for every selected attack that has it, ``attack.iterations``;
* a defence's: ``defense.clip-noise.noise`` or, for every selected defence that has it, ``defense.noise``;
* a mechanism's: ``unlearning.federaser.calibration`` or ``mechanism.calibration``;
* a gate's: ``gates.rate.share`` or, for every selected gate that has it, ``gates.share``;
* a metric's: ``metric.semsim.checkpoint`` or, for every selected metric that has it, ``metric.checkpoint``.

A preset and a scenario (:mod:`fedattack.presets`) say what is meant by settings that are left open.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args, get_origin

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from fedattack.errors import ConfigError, quoted, unknown_name
from fedattack.presets import PRESETS, SCENARIOS
from fedattack.reading import Unreadable, read_toml
from fedattack.registry import check_names_of_file, written

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Strength = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, lt=1)]
PluginOptions = dict[str, dict[str, Any]]


def _ranges(value: Any) -> Any:
    """Numbers and ranges as written, one text each; the source's name of a series, hsf_4, is 4."""
    parts = (
        value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    )
    texts = [re.sub(r"^hsf_?", "", str(part).strip().lower()) for part in parts if part not in (None, "")]
    for text in texts:
        bounds = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text)
        if bounds is None or int(bounds[2] or bounds[1]) < int(bounds[1]):
            raise ValueError(f"{text!r} is neither a number nor a range; accepted: 4 or 0,4 or 2100-2349")
    return tuple(texts)


Ranges = Annotated[tuple[str, ...], BeforeValidator(_ranges)]
"""Whole numbers from 0 and ranges of them, both ends included: "0,4" or "2100-2349"; none: all."""


def _numbers(value: Any) -> Any:
    """A number, several with commas, or a sequence of them, as numbers."""
    parts = value.split(",") if isinstance(value, str) else value
    try:
        return tuple(float(part) for part in (parts if isinstance(parts, list | tuple) else [parts]))
    except (TypeError, ValueError):
        raise ValueError(
            "accepted: a number, or one for each channel with commas, as 0.5 or 0.49,0.48,0.45"
        ) from None


Numbers = Annotated[tuple[float, ...], BeforeValidator(_numbers)]
"""Finite numbers, one for all channels or one for each: "0.5" or "0.49,0.48,0.45"."""


class Section(BaseModel):
    """A group of settings; immutable, closed to unknown keys, and without NaN and infinities."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PluginSection(Section):
    """Names of plug-ins and their parameters; those of ``package.module:Class`` may be set as those of ``Class``."""

    @model_validator(mode="before")
    @classmethod
    def _full_names(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        names = data.get("names") or [data.get("mechanism") or ""]
        options: Any = data.get("options") or {}
        if not (isinstance(options, Mapping) and all(isinstance(one, Mapping) for one in options.values())):
            return data  # refused, each by its type
        full: dict[str, dict[str, Any]] = {}
        for asked, chosen in options.items():
            meant = [name for name in names if asked == name.partition(":")[2] and asked not in names] or [
                asked
            ]
            if len(meant) > 1:
                raise ValueError(
                    f"parameters of {asked!r} may be those of {' or '.join(meant)}; name one in full"
                )
            full[meant[0]] = {**full.get(meant[0], {}), **chosen}
        return {**data, "options": full} if full else data


class DataConfig(Section):
    """Which images are trained on, and how they are cut into disjoint pools."""

    name: str = "faces"
    dir: str | None = Field(None, description="folder that holds the data set")
    download: bool = False
    image_size: int | None = Field(None, ge=4, le=1024, description="square side in pixels; None: as stored")
    mean: Numbers | None = Field(
        None, description="what the model takes off each channel of images in [0, 1], as 0.49,0.48,0.45"
    )
    std: Numbers | None = Field(None, description="what it divides each channel by then, as 0.25,0.24,0.26")
    part: str | None = Field(
        None,
        description="part of a set that has several: train, test (mnist, fashion-mnist, emnist-*); train, test, "
        "test10k, test50k, nist (qmnist); digits, uppers, lowers (sd19); None: the first",
    )
    series: Ranges = Field(
        (), description="only samples of these series of writers, as 0,4 or hsf_0,hsf_4; none: all"
    )
    writers: Ranges = Field((), description="only samples of these writers, as 2100-2349; none: all")
    where: dict[str, Ranges] = Field(
        default_factory=dict,
        description="only samples of which the source says so: fact -> values, as data.where.index=0-49",
    )
    duplicates: Literal["drop", "keep"] = Field(
        "drop", description="samples that the source, or an equal picture (sd19), calls duplicates"
    )
    group_by: str | None = Field(
        None, description="the fact that makes samples one group: series, class, ...; None: the person"
    )
    groups: Literal["none", "folder"] = Field(
        "none", description="image-folder: whether a folder is a person as well, whose pictures stay together"
    )
    limit: int | None = Field(None, ge=1, description="use at most this many samples (seeded draw)")
    labels: Literal["natural", "random"] = Field(
        "natural", description="random: a seeded draw from the model's classes, distinct while they last"
    )
    auxiliary: str = Field(
        "split", description="'split': cut from the same data; else an .npz/.tar.xz/folder of public images"
    )
    auxiliary_size: Count | None = Field(
        None, description="images granted to the adversary; None: all of a file, half of a split"
    )
    nonmembers: Count | None = Field(
        None,
        description="held-out samples, or people (nonmember_unit): evaluation and membership non-members; "
        "None: a tenth",
    )
    nonmember_unit: Literal["sample", "group"] = Field(
        "sample", description="group: hold out whole people (groups), of whom no client has a sample"
    )
    nonmember_series: Ranges = Field(
        (),
        description="hold out samples or people of these series only, members from data.series (or the others): "
        "measures a shift too; none: of the members' series",
    )
    withheld: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of each person's samples that no client gets, to ask about the person",
    )


class PartitionConfig(Section):
    """How the clients' pool is dealt out."""

    name: str = Field("iid", description="iid, dirichlet, shards, natural, or flwr_datasets' 'module:Class'")
    alpha: float = Field(0.5, gt=0, le=1e100, description="Dirichlet concentration; small is unequal")
    shards_per_client: Positive = 2
    groups_per_client: Positive | None = Field(
        None, description="natural: people at each client, the others at none; None: all are dealt out"
    )
    options: dict[str, Any] = Field(default_factory=dict)


class ModelConfig(Section):
    """The classifier that the federation trains. Public: every seat knows it."""

    name: str = "lenet-zhu"
    classes: Positive | None = Field(None, description="width of the head; None: the model's published head")
    channels: Positive | None = Field(None, description="None: the data set's")
    image_size: Positive | None = Field(None, description="None: the data set's")
    activation: Literal["sigmoid", "relu", "tanh", "gelu", "softplus", "poly3", "other"] | None = Field(
        None,
        description="None: the model's published one; other: several, or none of these, in a model of your own",
    )
    width: Positive | None = Field(
        None, description="hidden neurons, of models whose width is free; None: the model's default"
    )
    kernel_sets: Positive | None = Field(
        None, description="model 'loki': sets of kernels that keep clients apart; None: 8"
    )
    bottleneck: Positive | None = Field(
        None, description="width of a bottleneck before the head; defence 'precode' sets it"
    )
    nets: Literal["both", "generator"] | None = Field(
        None, description="of a generator and a critic, what is sent; 'gan.share' sets it"
    )
    initialisation: Literal["published", "kaiming"] = Field(
        "published",
        description="what first weights are drawn from; kaiming: uniform (He et al. 2015), biases 0, in place of a "
        "published draw that cannot be trained",
    )
    weights: str | None = Field(
        None,
        description="safetensors or .pt file of initial weights; None: seeded random, or a live model's own",
    )
    mean: Numbers | None = Field(None, description="set by 'data.mean'")
    std: Numbers | None = Field(None, description="set by 'data.std'")

    @property
    def resolved(self) -> tuple[int, int, int]:
        """Channels, image side and classes; :func:`fedattack.models.resolve` sees to it that they are set."""
        found = self.channels, self.image_size, self.classes
        assert None not in found, "resolve the model configuration first"
        return cast(tuple[int, int, int], found)


class TrainingConfig(Section):
    """What a client does with the weights it gets."""

    task: str = Field(
        "classify", description="what is trained and measured: a task by name, or 'module:Class'"
    )
    protocol: Literal["fedsgd", "fedavg"] = Field(
        "fedsgd", description="gradient of one batch, or weight delta"
    )
    batch_size: Count = Field(1, description="0: all of the client's samples")
    local_steps: Positive = Field(1, description="optimiser steps a round under fedavg")
    local_epochs: Positive | None = Field(
        None,
        description="passes over the client's own samples a round, in place of local_steps; None: local_steps",
    )
    learning_rate: float = Field(0.1, gt=0)
    server_learning_rate: float | None = Field(
        None, gt=0, description="step of the server on the mean gradient under fedsgd; None: learning_rate"
    )
    momentum: Fraction = 0.0
    weight_decay: float = Field(0.0, ge=0)
    batch_norm: Literal["train", "eval"] = Field(
        "train",
        description="statistics of the client's batch, or the running ones as they were sent (frozen)",
    )

    @model_validator(mode="after")
    def _one_gradient(self) -> TrainingConfig:
        if self.protocol == "fedsgd" and self.local_steps != 1:
            raise ValueError("local_steps must be 1 under protocol 'fedsgd'; use protocol 'fedavg'")
        if self.protocol == "fedsgd" and self.local_epochs is not None:
            raise ValueError(
                f"local_epochs = {self.local_epochs}: a client takes no passes under protocol 'fedsgd'; use protocol "
                "'fedavg'"
            )
        return self

    def steps(self, samples: int) -> int:
        """Optimiser steps a round of a client that has, or declares, so many samples."""
        if self.local_epochs is None or samples < 1:
            return self.local_steps
        return self.local_epochs * -(-samples // (self.batch_size or samples))

    def of(self, samples: int) -> TrainingConfig:
        """What is agreed, as a client of so many samples carries it out: its `local_steps`, and no `local_epochs`."""
        if self.local_epochs is None:
            return self
        return self.model_copy(update={"local_steps": self.steps(samples), "local_epochs": None})


class GanConfig(Section):
    """How task wgan-gp trains a generator and a critic; public."""

    critic_steps: Positive = Field(
        5,
        description="steps of the critic for each of the generator's; training.local_steps counts the critic's",
    )
    penalty: Weight = Field(10.0, description="weight of the gradient penalty")
    beta1: Share = Field(
        0.5, description="Adam's decay of the mean gradient; training.learning_rate is its step"
    )
    beta2: Share = Field(0.9, description="Adam's decay of the mean square")
    share: Literal["both", "generator"] = Field(
        "both",
        description="nets that clients send; generator: critics stay at home, and learn from nobody else",
    )


class CompressionConfig(Section):
    """What of an update is sent. `rate` is the kept share, so 0.001 is the paper's 0.1 %."""

    name: str = Field("topk", description="none, topk, randomk, sign, qsgd, topk-qsgd, dgc")
    rate: float = Field(0.001, gt=0, le=1, description="kept share of all entries")
    scope: Literal["global", "layer"] = Field(
        "global", description="choose entries over all layers or in each"
    )
    error_feedback: bool = False
    levels: int = Field(127, ge=1, le=127, description="qsgd, topk-qsgd: levels per sign")
    norm: Literal["max", "l2"] = Field("max", description="qsgd, topk-qsgd: each tensor's scale")
    momentum: Fraction = Field(0.9, description="DGC momentum correction")
    clip_norm: float | None = Field(None, gt=0, description="DGC: clip the gradient to this L2 norm first")
    warmup_rounds: Count = Field(0, description="DGC: rounds over which the rate falls from 25 % to `rate`")


class DefenseConfig(PluginSection):
    """What clients do against leakage, in the agreed order. Names and parameters are public."""

    names: tuple[str, ...] = Field(
        (),
        description="clip-noise, prune, soteria, precode, transform, secure-aggregation; several with commas",
    )
    options: PluginOptions = Field(default_factory=dict, description="defence name -> parameters")
    shared_options: dict[str, Any] = Field(
        default_factory=dict, description="parameters for every selected defence that has them"
    )

    @model_validator(mode="after")
    def _each_once(self) -> DefenseConfig:
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"names {', '.join(self.names)}: name each defence once")
        return self


class CanaryConfig(Section):
    """Units that are there or not by a coin flip, by which the auditor measures what ``clip-noise`` promises."""

    count: Count = Field(
        0, description="canaries planted to measure epsilon under defence clip-noise; 0: none"
    )
    kind: Literal["gradient", "mislabelled", "client"] | None = Field(
        None,
        description="gradient: a random direction in place of a sample's gradient; mislabelled: a sample with a "
        "wrong label; client: a random direction in place of a client's update; None: as the unit of clip-noise",
    )
    guesses: float = Field(
        0.1,
        gt=0,
        le=1,
        description="share of the canaries that the lower bounds guess about, fixed beforehand",
    )
    others_known: bool = Field(
        True,
        description="take out what other samples add, without noise, as SGD makes it: the clients' work once more",
    )


class FederationConfig(Section):
    """Who takes part and how the server aggregates."""

    clients: Positive = 8
    rounds: Positive = 1
    pretrain: Count = Field(
        0,
        description="honest rounds before round 1, which nobody attacks: a trained model is what round 1 sends",
    )
    participation: float = Field(1.0, gt=0, le=1, description="share of clients drawn each round")
    dropout: float = Field(0.0, ge=0, lt=1, description="chance that a drawn client does not answer")
    max_examples: Positive | None = Field(
        None, description="most samples a client may declare; None: as many as it registered"
    )
    max_norm: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="longest change of the weights (L2 norm) that is taken of a client; None: any",
    )
    strategy: str = Field("fedavg", description="a Flower strategy by name, or 'module:Class'")
    strategy_options: dict[str, Any] = Field(default_factory=dict)
    evaluate: bool = True


class AttackConfig(PluginSection):
    """Which adversaries sit in the run."""

    names: tuple[str, ...] = ()
    victims: Positive | None = Field(
        None, description="clients whose updates are reconstructed; None: 8, or all where there are fewer"
    )
    rounds: tuple[Positive, ...] = Field(
        (1,), description="rounds whose updates are reconstructed: numbers, or last, with commas"
    )
    victims_per_task: Positive = Field(4, description="victims reconstructed in one batched optimisation")
    state_seconds: float = Field(
        10.0, ge=0, description="least seconds between two states of an attack at work"
    )
    candidates: Positive = Field(64, description="membership: members of each target that are asked about")
    targets: tuple[Count, ...] | None = Field(None, description="membership: clients asked about; None: all")
    others: Count = Field(
        0, description="membership: members of each client that is no target, to stand in the list"
    )
    negatives: Literal["held-out", "others", "both"] = Field(
        "held-out",
        description="membership: members stand beside held-out samples, other clients' members, or both",
    )
    unit: Literal["sample", "group"] = Field(
        "sample", description="membership: ask about samples, or about people, by samples nobody trained on"
    )
    references: Count = Field(0, description="membership: reference models that the adversary trains")
    requests: Positive = Field(4, description="unlearning: samples whose deletion is requested")
    malicious_clients: tuple[Count, ...] = Field(
        (0,), description="clients that carry out the attacks of a client's seat"
    )
    options: PluginOptions = Field(default_factory=dict, description="attack name -> parameters")
    shared_options: dict[str, Any] = Field(
        default_factory=dict, description="parameters for every selected attack that has them"
    )

    @model_validator(mode="after")
    def _each_once(self) -> AttackConfig:
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"setting 'attack.names' = {', '.join(self.names)}: name each attack once")
        return self


class UnlearningConfig(PluginSection):
    """What the honest server does when it is asked to forget."""

    mechanism: str = "retrain"
    round: Positive | None = Field(
        None, description="round after which clients ask for deletions; None: the last"
    )
    checkpoint_every: Positive = Field(1, description="rounds between what the server keeps to forget later")
    times: Positive = Field(
        1, description="deletion requests of each attack, each made when the one before has been answered"
    )
    seeds: Positive = Field(
        5, description="whole trainings over which damage is measured; the first is the run itself"
    )
    draws: Literal["kept", "anew"] = Field(
        "kept",
        description="batches after a deletion. kept: as they were, the deleted left out, so that other draws do not "
        "drown the damage; anew: drawn from what is left, as real clients do, and all else that clients draw as well",
    )
    forgotten: bool = Field(
        False,
        description="show what forgetting leaks: rebuild the forgotten from what is seen before and after, and tell "
        "who was in the data; clients draw anew",
    )
    options: PluginOptions = Field(default_factory=dict, description="mechanism name -> parameters")
    shared_options: dict[str, Any] = Field(default_factory=dict, description="parameters of the mechanism")


class GatesConfig(PluginSection):
    """What a deletion request must pass before the server forgets, and the model after it."""

    names: tuple[str, ...] = Field(
        (), description="ownership, digest, label, rate, loss, cap, guard; several with commas"
    )
    options: PluginOptions = Field(default_factory=dict, description="gate name -> parameters")
    shared_options: dict[str, Any] = Field(
        default_factory=dict, description="parameters for every selected gate that has them"
    )

    @model_validator(mode="after")
    def _each_once(self) -> GatesConfig:
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"names {', '.join(self.names)}: name each gate once")
        return self


class MetricConfig(PluginSection):
    """By what reconstructed images are scored, beside what a verdict rests on."""

    names: tuple[str, ...] = Field(
        ("psnr", "ssim", "regcorr"),
        description="psnr, ssim, regcorr, ... (`fedattack list metrics`); several with commas",
    )
    options: PluginOptions = Field(default_factory=dict, description="metric name -> parameters")
    shared_options: dict[str, Any] = Field(
        default_factory=dict, description="parameters for every selected metric that has them"
    )

    @model_validator(mode="after")
    def _each_once(self) -> MetricConfig:
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"names {', '.join(self.names)}: name each metric once")
        return self


class EngineConfig(Section):
    """Where the clients and the attacks run. Only `device` and `threads` can touch a result's last bits."""

    name: Literal["ray", "inline"] = "ray"
    actors: Positive = 2
    cpus_per_actor: float = Field(1.0, ge=0)
    gpus_per_actor: float = Field(0.0, ge=0)
    ray_address: str | None = Field(None, description="join this Ray cluster; None: a private local one")
    deadline: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="seconds a client has to answer, then the round goes on without it; results then depend on the "
        "machine; None: as long as it takes",
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N, mps")
    # On small networks a second thread gains little when the machine is quiet, and where several processes share it
    # the threads wait for each other: several times slower than one. Large products (a wide two-layer head) gain.
    threads: Positive = Field(1, description="CPU threads of one attack; clients always use one")


class OutputConfig(Section):
    """What a run leaves behind."""

    run_dir: str | None = None
    save_observations: bool = False
    checkpoint_every: Count = Field(
        0, description="rounds between generators that are kept in generators/; 0: the last one alone"
    )
    cache_dir: str | None = Field(
        None,
        description="folder for what later runs can use again (reference models); None: beside the run folder",
    )


class Config(Section):
    """All settings of a run."""

    seed: int = Field(0, ge=0, lt=2**63)
    scenario: Literal["federated", "central"] = Field(
        "federated", description="central: one holder of all data, who is the server"
    )
    preset: str | None = Field(
        None, description="a whole set-up by name (`fedattack list presets`), for settings that are left open"
    )
    data: DataConfig = DataConfig()
    partition: PartitionConfig = PartitionConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    gan: GanConfig = GanConfig()
    defense: DefenseConfig = DefenseConfig()
    canaries: CanaryConfig = CanaryConfig()
    compression: CompressionConfig = CompressionConfig()
    federation: FederationConfig = FederationConfig()
    attack: AttackConfig = AttackConfig()
    unlearning: UnlearningConfig = UnlearningConfig()
    gates: GatesConfig = GatesConfig()
    metric: MetricConfig = MetricConfig()
    engine: EngineConfig = EngineConfig()
    output: OutputConfig = OutputConfig()

    @model_validator(mode="before")
    @classmethod
    def _last_round(cls, data: Any) -> Any:
        """With the number of the last round in the place of its name."""
        attack, federation = data.get("attack"), data.get("federation", {})
        rounds = attack.get("rounds") if isinstance(attack, Mapping) else None
        rounds = [rounds] if isinstance(rounds, str) else rounds
        if not isinstance(rounds, list | tuple):
            return data
        odd = [one for one in rounds if isinstance(one, str) and one != "last" and not one.isdecimal()]
        if odd:
            raise ValueError(
                f"setting 'attack.rounds' = {odd[0]!r}: accepted: numbers of rounds from 1, and last, with commas"
            )
        if "last" in rounds:
            last = (federation.get("rounds") or 1) if isinstance(federation, Mapping) else federation.rounds
            named = [int(one) if isinstance(one, str) and one != "last" else one for one in rounds]
            known = list(dict.fromkeys(last if one == "last" else one for one in named))
            return {**data, "attack": {**attack, "rounds": known}}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        victims, clients = self.attack.victims, self.federation.clients
        if self.training.local_epochs is not None and self.training.local_steps != 1:
            raise ValueError(
                f"settings 'training.local_epochs' = {self.training.local_epochs} and 'training.local_steps' = "
                f"{self.training.local_steps} say two things; accepted: epochs with local_steps 1, or steps alone"
            )
        if self.scenario == "central" and clients != 1:
            raise ValueError(
                f"setting 'federation.clients' = {clients}: scenario 'central' is one holder of all data, who is the "
                "server; accepted: 1, or several with --scenario federated"
            )
        if victims is not None and victims > clients:
            raise ValueError(f"setting 'attack.victims' = {victims}: the federation has {clients} clients")
        absent = [number for number in self.attack.malicious_clients if number >= clients]
        if absent or not self.attack.malicious_clients:
            raise ValueError(
                f"setting 'attack.malicious_clients' = {list(self.attack.malicious_clients)}: accepted: some of "
                f"0 to {clients - 1}"
            )
        late = [number for number in self.attack.rounds if number > self.federation.rounds]
        if late:
            raise ValueError(
                f"setting 'attack.rounds' = {late}: the federation has {self.federation.rounds} round(s)"
            )
        if self.federation.pretrain and (self.canaries.count or self.unlearning.forgotten):
            what = "canaries.count" if self.canaries.count else "unlearning.forgotten"
            raise ValueError(
                f"setting 'federation.pretrain' = {self.federation.pretrain}: {what!r} is about all rounds in which "
                "clients train; accepted: 0, and more rounds (--rounds)"
            )
        if self.request_round > self.federation.rounds:
            raise ValueError(
                f"setting 'unlearning.round' = {self.request_round}: the federation has {self.federation.rounds} "
                "round(s)"
            )
        return self

    @property
    def request_round(self) -> int:
        """The round after which clients ask for deletions."""
        return self.unlearning.round or self.federation.rounds

    @property
    def victims(self) -> int:
        """How many clients' updates are reconstructed: clients 0 to victims - 1."""
        return self.attack.victims or min(8, self.federation.clients)

    @classmethod
    def from_mapping(
        cls,
        settings: Mapping[str, Any],
        base: Mapping[str, Any] | None = None,
        left_open: Mapping[str, Any] | None = None,
    ) -> Config:
        """Build from a flat or nested mapping of short or dotted names or sections, over nested `base` settings.

        `left_open`, nested: what is meant where neither says, unless they name another task than it does.

        Values may be strings as typed in a shell; an empty string stands for "not set" (Flower's run-config cannot
        hold null). Raises ConfigError, which names the setting, its value and what would be accepted.
        """
        tree: dict[str, Any] = _deep_copy(base or {})
        for key, value in settings.items():
            _assign(tree, _resolve(key), value)
        _fill_named(tree, "preset", {name: one.settings for name, one in PRESETS.items()})
        _fill_named(tree, "scenario", SCENARIOS)
        meant = left_open or {}
        task = meant.get("training", {}).get("task")
        if task in (None, tree.get("training", {}).get("task", task)):
            _fill(tree, meant)
        if task := TASK_SETTINGS.get(str(tree.get("training", {}).get("task", ""))):
            _fill(tree, task)
            _fill(tree, MODEL_SETTINGS.get(str(tree["model"]["name"]), {}))
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise ConfigError(_explain(error)) from None

    @classmethod
    def from_toml(
        cls,
        path: str | Path,
        overrides: Mapping[str, Any] | None = None,
        left_open: Mapping[str, Any] | None = None,
    ) -> Config:
        """Read a TOML file of nested sections, then apply `overrides` (short or dotted names); see from_mapping."""
        try:
            base = read_toml(path)
        except Unreadable as error:
            what = "does not exist" if error.absent else f"is not readable TOML: {error.reason}"
            raise ConfigError(f"configuration file {str(path)!r} {what}") from None
        check_names_of_file(base, f"configuration file {str(path)!r}")
        return cls.from_mapping(overrides or {}, base, left_open)

    def to_toml(self) -> str:
        """TOML text that :meth:`from_toml` reads back to an equal configuration."""
        tree = self.model_dump(mode="json", exclude_none=True)
        if self.preset in PRESETS:  # what was given as "not set" is not to be filled again
            _fill(tree, _blank(PRESETS[self.preset].settings))
        return tomli_w.dumps(_without_none(tree))

    def result_settings(self) -> dict[str, Any]:
        """The settings that can change a result: not the engine's, the output's nor what a preset was called."""
        return self.model_dump(mode="json", exclude={"engine", "output", "preset"})


TASK_SETTINGS: dict[str, dict[str, Any]] = {
    "wgan-gp": {
        "model": {"name": "wgan-gp-mlp"},
        "training": {"protocol": "fedavg", "local_steps": 100},
        "compression": {"name": "none"},
    }
}
"""Task -> what is meant by settings that are left open, where it differs from the defaults."""

# Those of wgan-gp are the published ones (Gulrajani et al., 2017, for digits). The small linear nets learn slowly at
# them: theirs were found on 4,000 MNIST images on which nothing is measured.
MODEL_SETTINGS: dict[str, dict[str, Any]] = {
    "wgan-gp": {"training": {"batch_size": 50, "learning_rate": 1e-4}},
    "wgan-gp-mlp": {"training": {"batch_size": 64, "learning_rate": 1e-3}},
}
"""Model -> the same, under a task that has such settings."""

SHORT_NAMES: dict[str, str] = {
    "seed": "seed",
    "scenario": "scenario",
    "preset": "preset",
    "dataset": "data.name",
    "data-dir": "data.dir",
    "download": "data.download",
    "image-size": "data.image_size",
    "mean": "data.mean",
    "std": "data.std",
    "limit": "data.limit",
    "labels": "data.labels",
    "auxiliary": "data.auxiliary",
    "auxiliary-size": "data.auxiliary_size",
    "partition": "partition.name",
    "alpha": "partition.alpha",
    "model": "model.name",
    "classes": "model.classes",
    "activation": "model.activation",
    "width": "model.width",
    "weights": "model.weights",
    "task": "training.task",
    "protocol": "training.protocol",
    "batch-size": "training.batch_size",
    "local-steps": "training.local_steps",
    "local-epochs": "training.local_epochs",
    "learning-rate": "training.learning_rate",
    "defense": "defense.names",
    "canaries": "canaries.count",
    "compression": "compression.rate",
    "compressor": "compression.name",
    "scope": "compression.scope",
    "error-feedback": "compression.error_feedback",
    "clients": "federation.clients",
    "rounds": "federation.rounds",
    "pretrain": "federation.pretrain",
    "participation": "federation.participation",
    "dropout": "federation.dropout",
    "strategy": "federation.strategy",
    "attack": "attack.names",
    "victims": "attack.victims",
    "attack-rounds": "attack.rounds",
    "candidates": "attack.candidates",
    "references": "attack.references",
    "targets": "attack.targets",
    "requests": "attack.requests",
    "mechanism": "unlearning.mechanism",
    "forgotten": "unlearning.forgotten",
    "gates": "gates.names",
    "metrics": "metric.names",
    "engine": "engine.name",
    "actors": "engine.actors",
    "cpus-per-actor": "engine.cpus_per_actor",
    "gpus-per-actor": "engine.gpus_per_actor",
    "ray-address": "engine.ray_address",
    "device": "engine.device",
    "threads": "engine.threads",
    "run-dir": "output.run_dir",
    "save-observations": "output.save_observations",
}
"""Command-line option or run-config key -> dotted setting."""


def field_type(dotted: str) -> tuple[Any, str]:
    """The annotation and description of a dotted setting, for building a command line."""
    section, _, leaf = dotted.rpartition(".")
    model = Config.model_fields[section].annotation if section else Config
    assert model is not None
    info = model.model_fields[leaf]
    return info.annotation, info.description or ""


def _resolve(key: str) -> list[str]:
    """Path of a short, dotted or attack-parameter name in the nested settings."""
    if key in SHORT_NAMES:
        return SHORT_NAMES[key].split(".")
    parts = key.replace("-", "_").split(".")
    if parts[0] == "mechanism" and len(parts) == 2:
        return [SHORT_NAMES["mechanism"].partition(".")[0], "shared_options", parts[1]]
    section, rest = ("attack", key)
    fields: Mapping[str, FieldInfo] = {}
    if parts[0] in Config.model_fields:
        kind = Config.model_fields[parts[0]].annotation
        if len(parts) == 1:
            return parts
        fields = kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else {}
        if parts[1] in fields:
            if len(parts) > 2 and not _is_table(fields[parts[1]]):
                raise unknown_name("setting", key, [".".join(parts[:2])])
            return parts
        section, rest = parts[0], key.partition(".")[2]
        if len(parts) == 2 and "shared_options" in fields:
            return [section, "shared_options", parts[1]]
    # hcgla.iterations, defense.prune.share, package.module:Class.setting: the plug-in is looked up when it is built.
    name, _, option = rest.rpartition(".")
    plugins = section == "attack" or ("options" in fields and fields["options"].annotation == PluginOptions)
    if plugins and name and (":" in name or "." not in name):
        return [section, "options", name, option.replace("-", "_")]
    raise unknown_name(
        "setting", key, [f"{section}.{one}" for one in fields] or [*SHORT_NAMES, *Config.model_fields]
    )


_LISTS = (
    ["attack", "names"],
    ["attack", "rounds"],
    ["attack", "targets"],
    ["attack", "malicious_clients"],
    ["defense", "names"],
    ["gates", "names"],
    ["metric", "names"],
)
"""Settings that hold several values, written with commas."""


def _holds_several(path: list[str]) -> bool:
    """Whether a setting of a section is a list or a table."""
    kind = Config.model_fields[path[0]].annotation if path[0] in Config.model_fields else None
    fields = kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else {}
    info = fields.get(path[1])
    return info is not None and (_is_table(info) or tuple in _origins(info))


def _is_table(info: FieldInfo) -> bool:
    return dict in _origins(info)


def _origins(info: FieldInfo) -> set[Any]:
    return {get_origin(one) for one in (info.annotation, *get_args(info.annotation))}


def _without_none(tree: dict[str, Any]) -> dict[str, Any]:
    """`tree` with empty strings for None, which TOML lacks: plug-ins' parameters are read back so."""
    return {
        key: _without_none(value) if isinstance(value, dict) else "" if value is None else value
        for key, value in tree.items()
    }


def _assign(tree: dict[str, Any], path: list[str], value: Any) -> None:
    if value == "":
        value = None
    if isinstance(value, str) and (len(path) == 1 or _holds_several(path)):
        value = written(value)
    if path in _LISTS and isinstance(value, str):
        text, value = value, [part.strip() for part in value.split(",") if part.strip()]
        if not value:
            raise ConfigError(
                f"setting {'.'.join(path)!r} = {text!r} names nothing; accepted: values with commas"
            )
    if path in _LISTS and isinstance(value, int):
        value = [value]
    if path in _LISTS and path[-1] == "names" and value is None:
        value = []
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"setting {'.'.join(path)!r} has no section {part!r} to go into")
    if isinstance(value, Mapping) and isinstance(tree.get(path[-1]), dict):
        for key, inner in value.items():
            _assign(tree[path[-1]], [key], inner)
    else:
        tree[path[-1]] = value


def _fill(tree: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Put settings where `tree` has none."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            _fill(tree.setdefault(name, {}), value)
        else:
            tree.setdefault(name, value)


def _fill_named(tree: dict[str, Any], setting: str, known: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the settings that a name in `tree` stands for where it has none; ConfigError if it stands for nothing."""
    name = tree.get(setting)
    if name is None:
        return
    if name not in known:
        raise unknown_name(setting, str(name), known)
    _fill(tree, known[name])


def _blank(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings, each as a file says that it is not set."""
    return {name: _blank(value) if isinstance(value, Mapping) else "" for name, value in settings.items()}


def _deep_copy(value: Any) -> Any:
    """A copy in which the empty strings of a file are None."""
    if isinstance(value, Mapping):
        return {k: _deep_copy(v) for k, v in value.items()}
    return None if value == "" else value


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        place = [str(part) for part in item["loc"]]
        name = ".".join(place)
        if item["type"] == "extra_forbidden":
            section: Any = Config
            for part in place[:-1]:
                section = section.model_fields[part].annotation
            lines.append(
                str(unknown_name("setting", name, [".".join([*place[:-1], f]) for f in section.model_fields]))
            )
            continue
        message = item["msg"].removeprefix("Value error, ")
        lines.append(f"setting {quoted(name)} = {quoted(item['input'])}: {message}" if name else message)
    return "\n".join(lines)
