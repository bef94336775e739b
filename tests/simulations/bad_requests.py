"""Requests that cannot be carried out as they are put: a table, most of it made from the settings themselves."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel

from fedattack.config import Config


@dataclass(frozen=True)
class Request:
    """A command line, words that the answer must have, and files that it finds."""

    arguments: tuple[str, ...]
    words: tuple[str, ...]
    files: dict[str, str | bytes | None] = field(default_factory=dict)  # None: a folder

    def __str__(self) -> str:
        return " ".join(self.arguments)


SMALL = (
    "--dataset",
    "digits",
    "--model",
    "mlp",
    "--limit",
    "120",
    "--engine",
    "inline",
    "--compressor",
    "none",
)


def kinds_of(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    if get_origin(annotation) in (Union, types.UnionType):
        return set().union(*(kinds_of(one) for one in get_args(annotation)))
    if get_origin(annotation) is Literal:
        return {Literal}
    if hasattr(annotation, "__metadata__"):
        return kinds_of(annotation.__origin__)
    return {get_origin(annotation) or annotation}


def leaves() -> Iterator[tuple[str, Any]]:
    """Dotted setting and its field, of every setting of a run."""
    for section, info in Config.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from ((f"{section}.{leaf}", one) for leaf, one in kind.model_fields.items())
        else:
            yield section, info


def of_settings() -> Iterator[Request]:
    """Wrong types, values out of range, NaN, infinities and huge values of every setting of a run."""
    for name, info in leaves():
        kinds = kinds_of(info.annotation)
        if Literal in kinds:
            wrong = ["no-such-choice"]
        elif bool in kinds:
            wrong = ["maybe"]
        elif int in kinds:
            wrong = ["many", "nan", "1.5", "-1"]
        elif float in kinds:
            wrong = ["many", "nan", "inf", "-1"]
        elif dict in kinds and name not in ("data.where",):
            wrong = ["nonsense", "[1]"]
        elif tuple in kinds and not name.endswith("names"):
            wrong = ["x-y"]
        else:
            continue
        for value in wrong:
            engine = () if name == "engine.name" else ("--engine", "inline")
            yield Request((*engine, "--set", f"{name}={value}"), (name, value.strip("[]")))


def of_plugins() -> Iterator[Request]:
    """NaN and text for numbers of attacks, defences, mechanisms, gates and metrics."""
    from adversaries import ATTACKS
    from fedattack.defenses import DEFENSES
    from fedattack.metrics import METRICS
    from fedattack.registry import plugin_options
    from fedattack.unlearning import MECHANISMS
    from fedattack.unlearning.gates import GATES

    kinds: list[tuple[Any, str, str]] = [
        (ATTACKS, "attack", ""), (DEFENSES, "defense", "defense."), (MECHANISMS, "mechanism", "unlearning."),
        (GATES, "gates", "gates."), (METRICS, "metrics", "metric."),
    ]  # fmt: skip
    for registry, option, prefix in kinds:
        for name in registry:
            cls = registry.get(name)
            hints = get_type_hints(cls)
            numbers = {one: kinds_of(hints[one]) for one in plugin_options(cls) if one in hints}
            floats = [one for one, found in numbers.items() if float in found and str not in found]
            others = [
                one for one, found in numbers.items() if int in found and not found & {str, bool, float}
            ]
            for wanted, values in ((floats[:1], ["nan", "lots"]), (others[:1], ["lots"])):
                for one in wanted:
                    for value in values:
                        setting = f"{prefix}{name}.{one}"
                        yield Request(
                            (*SMALL, f"--{option}", name, "--set", f"{setting}={value}"), (setting, value)
                        )


NAMED = {
    "--attack": "hcgal", "--dataset": "facse", "--model": "lenet", "--strategy": "fedavgg", "--compressor": "topq",
    "--partition": "idd", "--defense": "clip-nose", "--mechanism": "retrian", "--gates": "digset",
    "--metrics": "pnsr", "--task": "classifi", "--preset": "mnist-logistics",
}  # fmt: skip


def of_names() -> Iterator[Request]:
    """Unknown names of plug-ins and of settings."""
    for option, name in NAMED.items():
        yield Request((option, name, "--engine", "inline"), (name,))
    for name in ("hcgla.itrations", "fedration", "seeed", "data.nam", "data.name.x", "x.y.z", "attack"):
        yield Request((*SMALL, "--attack", "hcgla", "--set", f"{name}=1"), (name,))


def of_runs() -> Iterator[Request]:
    """Contradictions, malformed values, and what only the data tell."""
    small = [
        (("--set", "nonsense"), ("nonsense", "NAME=VALUE")),
        (("--set", "=1"), ("NAME=VALUE",)),
        (("--set", "seed=1", "--set", "seed=2"), ("seed", "'1'", "'2'")),
        (("--seed", "1", "--seed", "2"), ("--seed", "1, 2")),
        (("--seed", "1", "--set", "seed=2"), ("seed", "twice")),
        (("--clients", "4", "--clients", "5"), ("--clients",)),
        (("--config", "no-such.toml"), ("no-such.toml",)),
        (("--attack", "hcgla,hcgla"), ("attack.names", "hcgla")),
        (("--defense", "prune,prune"), ("prune", "once")),
        (("--metrics", "psnr,psnr"), ("psnr", "once")),
        (("--gates", "rate,rate"), ("rate", "once")),
        (("--attack", "hcgla:x:y"), ("hcgla:x:y",)),
        (("--attack", "no.module:Thing"), ("no.module:Thing",)),
        (("--attack", "fedattack.config:Config"), ("fedattack.config:Config",)),
        (("--model", "fedattack.config:NoSuch"), ("fedattack.config:NoSuch",)),
        (("--attack", ","), ("attack.names",)),
        (("--clients", "5000"), ("5000",)),
        (("--clients", "0"), ("federation.clients", "0")),
        (("--victims", "9"), ("attack.victims", "9")),
        (("--rounds", "1", "--attack-rounds", "2"), ("attack.rounds", "2")),
        (("--attack-rounds", "0"), ("attack.rounds", "0")),
        (("--attack-rounds", ""), ("attack.rounds",)),
        (("--compression", "0"), ("compression.rate", "0")),
        (("--compression", "2"), ("compression.rate", "2")),
        (("--alpha", "inf", "--partition", "dirichlet"), ("partition.alpha", "inf")),
        (("--alpha", "1e300", "--partition", "dirichlet"), ("partition.alpha", "1e300")),
        (("--set", "training.weight_decay=inf"), ("training.weight_decay", "inf")),
        (("--learning-rate", "1e400"), ("training.learning_rate", "1e400")),
        (("--learning-rate", "nan"), ("training.learning_rate", "nan")),
        (("--local-steps", "5"), ("local_steps", "fedavg")),
        (("--batch-size", "-1"), ("training.batch_size", "-1")),
        (("--seed", "-1"), ("seed", "-1")),
        (("--seed", "1" * 400), ("seed",)),
        (("--rounds", "1e3"), ("federation.rounds", "1e3")),
        (("--device", "cuda:77"), ("engine.device", "cuda:77")),
        (("--device", "tpu"), ("engine.device", "tpu")),
        (("--threads", "0"), ("engine.threads", "0")),
        (("--engine", "slurm"), ("engine.name", "slurm")),
        (("--scenario", "central", "--clients", "3"), ("federation.clients", "3")),
        (("--set", "attack.malicious_clients=9"), ("attack.malicious_clients", "9")),
        (("--set", "unlearning.round=7"), ("unlearning.round", "7")),
        (("--targets", "99", "--attack", "fedmia"), ("attack.targets", "99")),
        (("--targets", "[1", "--attack", "fedmia"), ("attack.targets", "[1")),
        (("--set", "federation.strategy_options={"), ("federation.strategy_options", "{")),
        (("--set", "federation.strategy_options=[1]"), ("federation.strategy_options",)),
        (("--set", 'federation.strategy_options={"x": NaN}'), ("federation.strategy_options", "x")),
        (("--set", "data.where={index = }"), ("data.where",)),
        (("--set", "hcgla.schedule=1,x", "--attack", "hcgla"), ("hcgla.schedule", "1,x")),
        (("--set", "hcgla.schedule={", "--attack", "hcgla"), ("hcgla.schedule", "{")),
        (("--set", "hcgla.iterations=3"), ("hcgla", "attack.names")),
        (("--set", "defense.prune.share=0.5"), ("prune", "defense.names")),
        (("--set", "defense.prune.share=2", "--defense", "prune"), ("share", "2")),
        (("--set", "attack.iterations=3", "--attack", "fedmia"), ("attack.iterations",)),
        (("--strategy", "krum", "--set", "federation.strategy_options.num_malicious_nodes=50", "--clients", "4"),
         ("num_malicious_nodes", "50", "4")),
        (("--strategy", "multikrum", "--set", "federation.strategy_options.num_malicious_nodes=2", "--clients", "4"),
         ("num_malicious_nodes", "2")),
        (("--strategy", "multikrum", "--set", "federation.strategy_options.num_malicious_nodes=0",
          "--set", "federation.strategy_options.num_nodes_to_select=9", "--clients", "4"),
         ("num_nodes_to_select", "9")),
        (("--strategy", "bulyan", "--set", "federation.strategy_options.num_malicious_nodes=3", "--clients", "4"),
         ("num_malicious_nodes", "3")),
        (("--strategy", "krum", "--set", "federation.strategy_options.num_malicious_nodes=-1"),
         ("num_malicious_nodes", "-1")),
        (("--strategy", "krum", "--set", "federation.strategy_options.num_malicious_nodes=x"),
         ("num_malicious_nodes", "x")),
        (("--strategy", "fedtrimmedavg", "--set", "federation.strategy_options.beta=0.7"), ("beta", "0.7")),
        (("--strategy", "fedtrimmedavg", "--set", "federation.strategy_options.beta=-1"), ("beta", "-1")),
        (("--strategy", "fedavgm", "--set", "federation.strategy_options.server_momentum=nan"),
         ("server_momentum", "nan")),
        (("--strategy", "fedavgm", "--set", "federation.strategy_options.server_learning_rate=inf"),
         ("server_learning_rate", "inf")),
        (("--strategy", "fedadam", "--set", "federation.strategy_options.eta=nan"), ("eta", "nan")),
        (("--strategy", "fedadam", "--set", "federation.strategy_options.beta_1=inf"), ("beta_1", "inf")),
        (("--strategy", "fedyogi", "--set", "federation.strategy_options.tau=nan"), ("tau", "nan")),
        (("--strategy", "fedprox", "--set", "federation.strategy_options.proximal_mu=nan", "--protocol", "fedavg"),
         ("proximal_mu", "nan")),
        (("--strategy", "qfedavg", "--set", "federation.strategy_options.q=nan"), ("q", "nan")),
        (("--strategy", "fedavg", "--set", "federation.strategy_options.nothing=1"), ("nothing",)),
        (("--strategy", "fedavg", "--set", "federation.strategy_options.fraction_train=1"), ("fraction_train",)),
        (("--defense", "secure-aggregation", "--strategy", "krum"), ("krum",)),
        (("--dataset", "mnist"), ("data.dir",)),
        (("--dataset", "mnist", "--data-dir", "no/such/folder"), ("no/such/folder",)),
        (("--dataset", "image-folder", "--data-dir", "empty"), ("empty",)),
        (("--dataset", "image-folder"), ("data.dir",)),
        (("--image-size", "2"), ("data.image_size", "2")),
        (("--image-size", "100000"), ("data.image_size", "100000")),
        (("--limit", "0"), ("data.limit", "0")),
        (("--limit", "3"), ("federation.clients", "8")),
        (("--classes", "3"), ("model.classes", "3")),
        (("--width", "0"), ("model.width", "0")),
        (("--model", "lenet-zhu", "--width", "9"), ("model.width", "9")),
        (("--set", "model.kernel_sets=3"), ("model.kernel_sets", "3")),
        (("--activation", "swish"), ("model.activation", "swish")),
        (("--weights", "no.safetensors"), ("no.safetensors",)),
        (("--weights", "empty"), ("empty",)),
        (("--weights", "text.txt"), ("text.txt",)),
        (("--auxiliary", "no-such"), ("no-such",)),
        (("--auxiliary", "text.txt"), ("text.txt",)),
        (("--auxiliary-size", "100000"), ("100000",)),
        (("--set", "data.nonmembers=100000"), ("100000",)),
        (("--set", "data.part=third"), ("data.part", "third")),
        (("--set", "data.group_by=person"), ("data.group_by", "person")),
        (("--set", "data.series=x"), ("data.series", "x")),
        (("--set", "data.writers=9-3"), ("data.writers", "9-3")),
        (("--partition", "natural"), ("partition.name", "natural")),
        (("--partition", "shards", "--set", "partition.shards_per_client=9999"), ("shards_per_client", "9999")),
        (("--run-dir", "text.txt"), ("output.run_dir", "text.txt")),
        (("--run-dir", "full"), ("output.run_dir", "full")),
        (("--run-dir", "text.txt/below"), ("output.run_dir", "text.txt")),
        (("--canaries", "10"), ("canaries.count", "10")),
        (("--requests", "0"), ("attack.requests", "0")),
        (("--references", "-3"), ("attack.references", "-3")),
        (("--fail-on", "everything"), ("--fail-on", "everything")),
        (("--fail-on", "leak"), ("--fail-on", "leak")),
        (("--quiet", "--verbose"), ("--quiet",)),
        (("--attack", "spear", "--compressor", "sign"), ("spear", "sign")),
        (("--attack", "imprint,loki"), ("imprint", "loki")),
        (("--attack", "tensor"), ("tensor", "mlp")),
        (("--no-such-option",), ("--no-such-option",)),
        (("positional",), ("positional",)),
    ]  # fmt: skip
    extra: dict[str, str | bytes | None] = {"empty": None, "text.txt": "text", "full/file": "x"}
    for arguments, words in small:
        options = [one for one in arguments if one.startswith("--")]
        rest = [
            part
            for name, value in zip(SMALL[::2], SMALL[1::2], strict=True)
            if name not in options
            for part in (name, value)
        ]
        yield Request((*rest, *arguments), words, extra)


def of_files() -> Iterator[Request]:
    """Files that are malformed, missing, of another kind, or name code; sub-commands."""
    toml: list[tuple[str | bytes, tuple[str, ...]]] = [
        ("= 3", ("c.toml",)),
        (b"\xff\xfe\x00", ("c.toml",)),
        ("nonsense = 1", ("nonsense",)),
        ("data = 3", ("data", "3")),
        ("[data]\nnam = 'x'", ("data.nam",)),
        ("[data]\nname = 3", ("data.name", "3")),
        ("[federation]\nclients = 1.5", ("federation.clients", "1.5")),
        ("[federation]\nclients = [1]", ("federation.clients", "1")),
        ("[attack]\nnames = 'evil.module:Attack'", ("evil.module:Attack", "--trust")),
        ("[attack]\nnames = ['hcgla', 'evil.module:Attack']", ("evil.module:Attack", "--trust")),
        ("[model]\nname = 'evil:Net'", ("evil:Net", "--trust")),
        ("[data]\nname = 'evil:data'", ("evil:data", "--trust")),
        ("[attack]\nnames = ['ig']\n[attack.options.ig]\nobjective = 'evil:MINE'", ("evil:MINE", "--trust")),
        (
            "[attack]\nnames = ['ig']\n[attack.options.ig]\nlayers = '[\"\\u0065vil:X\"]'",
            ("evil:X", "--trust"),
        ),
        ("[partition]\nalpha = inf", ("partition.alpha", "inf")),
        ("[federation.strategy_options]\nx = nan", ("federation.strategy_options", "x")),
    ]
    for text, words in toml:
        yield Request(("--config", "c.toml", "--engine", "inline"), words, {"c.toml": text})
    yield Request(("--config", "folder", "--engine", "inline"), ("folder",), {"folder": None})
    sweeps: list[tuple[str, tuple[str, ...]]] = [
        ("", ("axes",)),
        ("[axes]\nseeed = [1, 2]", ("seeed",)),
        ("[axes]\n\"hcgla.itrations\" = [1]\n[settings]\nattack = 'hcgla'", ("hcgla.itrations",)),
        ("[axes]\nseed = 3", ("seed", "3")),
        ("[axes]\nseed = []", ("seed", "[]")),
        ("[axes]\nseed = [1, 1]", ("seed", "1")),
        ("[axes]\nseed = ['x']", ("seed", "x")),
        ("[axes]\nattack = ['hcgal']", ("hcgal",)),
        ("[axes]\ndataset = ['facse']", ("facse",)),
        ("[axes]\nmodel = ['lenet']", ("lenet",)),
        ("[axes]\nstrategy = ['fedavgg']", ("fedavgg",)),
        ("[axes]\ndefense = ['noise']", ("noise",)),
        ("[axes]\ncompressor = ['topq']", ("topq",)),
        ("[axes]\nattack = ['evil:Attack']", ("evil:Attack", "--trust")),
        ("[axes]\nseed = [1]\n[settings]\nclientz = 3", ("clientz",)),
        ("[axes]\nseed = [1]\n[setings]\nclients = 3", ("setings",)),
        ("settings = 3\n[axes]\nseed = [1]", ("settings", "3")),
        ("[axes]\nalpha = [inf]", ("partition.alpha", "inf")),
        ("[axes]\ncompression = [0.1, 7.0]", ("compression.rate", "7")),
    ]
    for text, words in sweeps:
        yield Request(("sweep", "s.toml", "--engine", "inline"), words, {"s.toml": text})
    fine = "[axes]\nseed = [1]"
    yield Request(("sweep", "none.toml"), ("none.toml",))
    yield Request(("sweep", "s.toml", "--out", "file"), ("file",), {"s.toml": fine, "file": "x"})
    yield Request(("sweep", "s.toml", "--engine", "slurm"), ("slurm",), {"s.toml": fine})
    for command in (
        ("hcgla", "collect-pairs"), ("hcgla", "train-generator"), ("semsim", "labeller"),
    ):  # fmt: skip
        yield Request((*command, "--out", "folder", *SMALL), ("--out", "folder"), {"folder": None})
        yield Request((*command, "--out", "file/below", *SMALL), ("--out", "file/below"), {"file": "x"})
    others: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
        (("attack", "none", "--attack", "hcgla"), ("none",)),
        (("attack", "folder", "--attack", "hcgla"), ("folder",)),
        (("attack", "file", "--attack", "hcgla"), ("file",)),
        (("attack", "folder"), ("attack.names",)),
        (("attack", "folder", "--attack", "unlearn-max-loss"), ("unlearn-max-loss",)),
        (("attack", "folder", "--attack", "hcgla", "--fail-on", "leak"), ("--fail-on", "--truth")),
        (("attack", "folder", "--attack", "hcgla", "--truth", "none"), ("--truth", "none")),
        (("attack", "folder", "--attack", "hcgla", "--clients", "3"), ("--clients",)),
        (("score", "none"), ("none",)),
        (("score", "folder"), ("folder",)),
        (("score", "folder", "folder", "folder"), ("folder",)),
        (("score", "folder", "--metrics", "pnsr"), ("pnsr",)),
        (("list", "atacks"), ("atacks", "attacks")),
        (("show", "hcgal"), ("hcgal", "hcgla")),
        (("show", "evil.module:Thing"), ("evil.module:Thing",)),
        (("settings", "hcgal"), ("hcgal", "hcgla")),
        (("hcgla", "train-denoiser", "none", "--out", "o"), ("none",)),
        (("hcgla", "train-denoiser", "file", "--out", "o"), ("file",)),
        (("hcgla", "test-denoiser", "file", "file"), ("file",)),
        (("hcgla", "test-generator", "file", *SMALL), ("file",)),
        (("hcgla", "collect-pairs", "--count", "1", "--out", "o"), ("--count", "1")),
        (("hcgla", "collect-pairs"), ("--out",)),
        (("gan", "sample", "none", "--out", "o"), ("none",)),
        (("gan", "sample", "file", "--out", "o"), ("file",)),
        (("gan", "attack"), ("--synthetic",)),
        (("gan", "attack", "none", "--attack", "full-black-box"), ("none",)),
        (("unlearning", "audit", "--mechanism", "retrian"), ("retrian",)),
        (("unlearning", "audit", "--shadows", "-3"), ("shadows", "-3")),
        (("semsim", "train", "none", "--out", "o"), ("none",)),
        (("semsim", "train", "file", "--out", "o", "--rule", "maybe"), ("maybe",)),
        (("semsim", "evaluate", "file", "file"), ("file",)),
        (("semsim", "benchmark", "--preset", "tiny"), ("tiny",)),
        (("semsim", "benchmark", "--preset", "none.toml"), ("none.toml",)),
        (("annotate", "none", "--annotator", "a1", "--protocol", "match"), ("none",)),
        (("annotations", "report", "none"), ("none",)),
        (("annotations", "votes", "file", "--out", "o.csv"), ("file",)),
        (("--seed", "3", "list"), ("sub-command",)),
    ]
    for arguments, words in others:
        yield Request(arguments, words, {"folder": None, "file": "x"})
    tables = (
        "[[models]]",
        "label='a'",
        "model='evil:Net'",
        "[[policies]]",
        "label='n'",
        "[[attacks]]",
        "label='i'",
    )
    benchmark = "\n".join([*tables, "attack='ig'"])
    asked = ("semsim", "benchmark", "--preset", "b.toml")
    yield Request(asked, ("evil:Net", "--trust"), {"b.toml": benchmark})


def requests() -> list[Request]:
    """The table."""
    return [*of_settings(), *of_plugins(), *of_names(), *of_runs(), *of_files()]


def write_files(request: Request, folder: Path) -> None:
    """Make the files that a request finds."""
    for name, content in request.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
