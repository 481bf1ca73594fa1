"""Train a model with labels so that it comes out of low rank."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from onnx_utilrank.calibration.collect import Progress, silent
from onnx_utilrank.calibration.data import DataSource
from onnx_utilrank.calibration.labels import Labels
from onnx_utilrank.config import TrainConfig
from onnx_utilrank.errors import ModelError
from onnx_utilrank.model.graph import GraphIndex, captured_names
from onnx_utilrank.model.replaced import with_arrays
from onnx_utilrank.model.store import ModelSource, ModelStore
from onnx_utilrank.ranking.cost import count_parameters
from onnx_utilrank.results import TrainResult
from onnx_utilrank.sites.find import find_sites
from onnx_utilrank.statistics.divergence import OutputLoss
from onnx_utilrank.statistics.factorize import factored
from onnx_utilrank.surgery.rewrite import Replacement, check_contract, rewrite
from onnx_utilrank.training.adaptive import dense_subspace, eligible
from onnx_utilrank.training.form import trainable_form
from onnx_utilrank.training.labels import LabelledSamples
from onnx_utilrank.training.loop import Recipe
from onnx_utilrank.training.objective import Objective
from onnx_utilrank.training.setting import DEFAULT_STEPS, Schedule, Setting, make_trainer
from onnx_utilrank.training.student import Student
from onnx_utilrank.training.subspaces import Subspace
from onnx_utilrank.training.weights import plain_parts, trainable_names
from onnx_utilrank.validation.divergence import find_losses, open_judged

__all__ = ["train"]

# The authors' configuration of a small vision transformer; β and, as a share of all steps, the
# delay are theirs too.
RATE, CLIP = 3e-4, 5.0
SCHEDULE = Schedule(share=0.15, delay=0.2)


def train(
    model: ModelSource,
    data: DataSource,
    config: TrainConfig,
    *,
    progress: Progress = silent,
) -> TrainResult:
    """Train a model with labels so that it comes out of low rank (OIALR, arXiv 2401.08505).

    After a delay all weights but the last go into bases that are frozen, and what mixes them is
    trained; from time to time the bases turn, and directions of small singular values go. In the
    end weights that are smaller as two factors become two nodes.

    Nodes are trained as they are: a batch normalization of an exported model keeps its mean and
    variance, a dropout does nothing.

    Args:
        model: Path, proto or store, with weights that are trained already or drawn at random; it
            is not changed.
        data: Samples with labels.
        config: Options.
        progress: Called with the stage, what is done of it, how much there is and how it goes.

    Raises:
        UtilrankError: One of its children, by what is wrong: options, model, data, provider.
    """
    assert config.labels is not None
    source = trainable_form(ModelStore.load(model))
    setting = Setting.open(source, data, config)
    session = open_judged(source, setting.provider)
    setting.check_finite(source, session)
    losses = find_losses(source, session, setting.looked_at)
    labels = Labels.parse(config.labels)
    classes = replace(setting.classes(labels, session, losses), weighting="softmax")
    graph = setting.graph(source)
    needed = _behind(source, classes.output)
    names = [name for name in trainable_names(graph) if name in needed]
    if not names:
        raise ModelError(
            f"{source.label}: no operator before {classes.output!r} reads a floating weight that "
            "could be trained"
        )
    student = setting.student(graph, plain_parts(graph, names))
    trainable = student.trained
    found, _ = find_sites(GraphIndex.build(source))
    sites, left = eligible([site for site in found if site.weight in needed], names)
    into: dict[str, Callable[[torch.Tensor], Subspace]] = {
        site.weight: partial(dense_subspace, site) for site in sites
    }
    if config.method == "oialr" and not into:
        raise ModelError(f"{source.label}: no weight goes into bases. {' '.join(left)}")
    objective = Objective(labels=labels, classes=classes)
    judged = LabelledSamples(objective, setting.feeds(setting.judged))
    trainer = make_trainer(
        student,
        objective,
        setting.batches(source, config, losses, None),
        judged.loss,
        Recipe(
            steps=config.steps or DEFAULT_STEPS,
            learning_rate=config.learning_rate or RATE,
            relative=False,
            clip=CLIP,
            patience=None,
        ),
        config,
        SCHEDULE,
        cache=setting.cache(source, config),
        key=("train", config.method),
        progress=progress,
        into=into if config.method == "oialr" else None,
    )
    history = trainer.run()
    dense = with_arrays(source, student.arrays())
    store = _factored(dense, student)
    check_contract(source, store)
    held = LabelledSamples(objective, setting.feeds(setting.held))
    sessions = (open_judged(each, setting.provider, [classes]) for each in (source, store))
    right = [held.accuracy(session) for session in sessions]
    return TrainResult(
        store=store,
        method=config.method,
        accuracy_before=right[0],
        accuracy=right[1],
        held=len(setting.held),
        ranks={
            part.name: (part.rank, *part.shape)
            for part in student.parts
            if isinstance(part, Subspace)
        },
        trained=student.trained,
        trainable=trainable,
        parameters_before=count_parameters(source),
        parameters=count_parameters(store),
        history=tuple(history.looks),
        dropped=history.dropped,
        seconds=history.seconds,
        samples=len(setting.fitted),
        notes=(
            *labels.notes(classes, losses),
            f"{trainable:,} of {count_parameters(source):,} parameters were trained.",
            *(left if config.method == "oialr" else ()),
            *_others(source, labels, classes, names),
        ),
    )


def _behind(model: ModelStore, output: str) -> set[str]:
    """All values that one is made of, and itself."""
    needed = {output}
    for node in reversed(model.proto.graph.node):
        if not needed.isdisjoint(node.output):
            needed.update(node.input, captured_names(node))
    return needed


def _others(
    model: ModelStore, labels: Labels, classes: OutputLoss, trained: Sequence[str]
) -> tuple[str, ...]:
    """A sentence on outputs that labels say nothing of, and that change with what is trained."""
    own = {classes.output, classes.decides}
    names = [o.name for o in model.outputs if o.name not in own]
    changed = [name for name in names if not _behind(model, name).isdisjoint(trained)]
    if not changed:
        return ()
    return (f"Outputs that labels {labels.key!r} say nothing of change too: {', '.join(changed)}.",)


def _factored(dense: ModelStore, student: Student) -> ModelStore:
    """The trained model with two nodes for each weight that is smaller so."""
    parts = {part.name: part for part in student.parts if isinstance(part, Subspace)}
    index = GraphIndex.build(dense)
    found = {site.weight: site for site in find_sites(index)[0]}
    replacements = []
    for name, part in parts.items():
        site = found[name]
        if part.rank <= site.break_even_rank:
            left = (part.left.double() @ part.core.detach().double()).numpy(force=True)
            factors = factored(left, part.right.double().numpy(force=True))
            replacements.append(Replacement(site=site, factors=factors, lost_mean=None))
    return rewrite(index, replacements) if replacements else dense
