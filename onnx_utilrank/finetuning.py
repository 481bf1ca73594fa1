"""Train a compressed model after its original's outputs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnx_utilrank.calibration.collect import Progress, silent
from onnx_utilrank.calibration.data import DataSource
from onnx_utilrank.calibration.labels import Labels
from onnx_utilrank.calibration.survey import survey
from onnx_utilrank.comparison import check_alike, compare
from onnx_utilrank.config import FinetuneConfig, FinetuneMethod, ValidateConfig
from onnx_utilrank.errors import ModelError
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.model.replaced import with_arrays
from onnx_utilrank.model.store import ModelSource, ModelStore
from onnx_utilrank.results import FinetuneResult
from onnx_utilrank.runtime.sessions import Session
from onnx_utilrank.statistics.divergence import OutputLoss
from onnx_utilrank.surgery.rewrite import check_contract
from onnx_utilrank.torch_graph.graph import TorchGraph
from onnx_utilrank.training.adaptive import factor_pairs, pair_subspace
from onnx_utilrank.training.blocks import between_blocks
from onnx_utilrank.training.form import trainable_form
from onnx_utilrank.training.history import History
from onnx_utilrank.training.labels import LabelledSamples
from onnx_utilrank.training.loop import Recipe
from onnx_utilrank.training.objective import Objective
from onnx_utilrank.training.setting import DEFAULT_STEPS, Schedule, Setting, make_trainer
from onnx_utilrank.training.student import Student
from onnx_utilrank.training.teacher import Teacher
from onnx_utilrank.training.weights import Part, changed_names, plain_parts, trainable_names
from onnx_utilrank.validation.divergence import (
    Divergence,
    OutputRecorder,
    find_losses,
    open_judged,
)

__all__ = ["finetune", "finetuned"]

# The highest learning rate of each method, a share of each tensor's own size, for students that
# diverge by FAR and more. Steps of that size stray by what they may gain where a student is near:
# what random steps cost grows with their square, so that the rate falls with the root.
RATES = {"factors": 1e-3, "biases": 3e-3, "oialr": 1e-3}
FAR = 0.03
# What is trained already has found its bases: OIALR needs no delay.
SCHEDULE = Schedule(share=0.1, delay=0.0)
# Looks, of 20, without a better student after which training ends: while the rate is high, a
# student may well be worse than it began.
PATIENCE = 16
# What the original gives may take so many times the memory budget, in temporary files.
KEPT_OUTPUTS = 4


def finetune(
    reference: ModelSource,
    candidate: ModelSource,
    data: DataSource,
    config: FinetuneConfig | None = None,
    *,
    progress: Progress = silent,
) -> FinetuneResult:
    """Train a compressed model so that its outputs follow the original's; no labels are needed.

    Three parts of the samples are kept apart: those that are trained on, some that tell when to
    stop, and those held back, which decide: where the outputs diverge less on them than before,
    the new weights are kept, and else the candidate stays as it is. With labels, what training
    makes small decides, in which they count.

    Args:
        reference: The original: path, proto or store.
        candidate: The compressed model.
        data: Samples.
        config: Options.
        progress: Called with the stage, what is done of it, how much there is and how it goes.

    Raises:
        UtilrankError: One of its children, by what is wrong: options, models, data, provider.
    """
    config = config or FinetuneConfig()
    original, small = ModelStore.load(reference), ModelStore.load(candidate)
    check_alike(original, small)
    setting = Setting.open(original, data, config)
    return finetuned(original, small, setting, config, progress)


def finetuned(
    original: ModelStore,
    small: ModelStore,
    setting: Setting,
    config: FinetuneConfig,
    progress: Progress,
    losses: tuple[OutputLoss, ...] = (),
) -> FinetuneResult:
    """See `finetune`; the samples are parted already, and what counts may be known."""
    teacher_session = open_judged(original, setting.provider, losses)
    setting.check_finite(original, teacher_session)
    if not losses:
        losses = find_losses(original, teacher_session, setting.looked_at, config.weighting)
    if not losses:
        raise ModelError(f"{original.label}: no output holds floating values to follow")
    candidate_session = open_judged(small, setting.provider, losses)
    held = OutputRecorder(teacher_session, losses, setting.feeds(setting.held))
    before = held.compare(candidate_session)
    form = trainable_form(small)
    graph = setting.graph(form)
    parts = _parts(graph, original, config)
    store, history, found = small, History(), _Verdict(after=before)
    if parts:
        objective = _objective(original, teacher_session, graph, parts, losses, setting, config)
        judged = OutputRecorder(teacher_session, losses, setting.feeds(setting.judged))
        made, history = _trained(
            original,
            form,
            setting.student(graph, parts),
            setting,
            config,
            objective,
            judge=_judge(objective, judged, teacher_session),
            rate=config.learning_rate
            or _rate(config.method, judged.compare(candidate_session).mean),
            progress=progress,
        )
        made_session = open_judged(made, setting.provider, losses)
        found = _verdict(objective, held, before, teacher_session, candidate_session, made_session)
        reason = f"On the samples held back the {found.lost} no less than before"
        if history.best.step == 0:
            # Bases and averages change the last bits of weights that no step has changed.
            found = replace(found, better=False)
            reason = "No step made it better on the samples that tell when to stop"
        store = made if found.better else small
    else:
        reason = f"Nothing of it is there to train by {config.method}"
    progress("validating", 0, 0)
    report = compare(
        original,
        store,
        setting.data,
        setting.held,
        setting.batch,
        [setting.provider],
        ValidateConfig(providers=(setting.provider.key,)),
    )
    return FinetuneResult(
        store=store,
        kept=found.better,
        method=config.method,
        before=before,
        after=found.after,
        accuracy_before=found.accuracy_before,
        accuracy=found.accuracy,
        history=tuple(history.looks),
        dropped=history.dropped,
        seconds=history.seconds,
        samples=len(setting.fitted),
        validation=report,
        notes=(
            *found.notes,
            *([] if found.better else [f"{reason}: the candidate stays as it is."]),
        ),
    )


def _trained(
    original: ModelStore,
    form: ModelStore,
    student: Student,
    setting: Setting,
    config: FinetuneConfig,
    objective: Objective,
    *,
    judge: Callable[[Student], float],
    rate: float,
    progress: Progress,
) -> tuple[ModelStore, History]:
    """The candidate with the weights of the best student, and how training went."""
    budget = KEPT_OUTPUTS * config.memory_budget
    teacher = Teacher(original, objective.wanted, setting.provider, budget=budget)
    trainer = make_trainer(
        student,
        objective,
        setting.batches(original, config, objective.losses, teacher),
        judge,
        Recipe(
            steps=config.steps or DEFAULT_STEPS,
            learning_rate=rate,
            patience=PATIENCE,
            # Bases turn on the way: means over turns would be of nothing.
            averaged=config.method != "oialr",
        ),
        config,
        SCHEDULE,
        cache=setting.cache(form, config),
        key=("finetune", original.fingerprint(), config.method, objective),
        progress=progress,
    )
    history = trainer.run()
    made = with_arrays(form, student.arrays())
    check_contract(form, made)
    return made, history


@dataclass(frozen=True, slots=True, kw_only=True)
class _Verdict:
    """What the samples held back say of the trained model; without labels, none of accuracy."""

    after: Divergence
    better: bool = False
    lost: str = "outputs diverge"
    accuracy_before: float | None = None
    accuracy: float | None = None
    notes: tuple[str, ...] = ()


def _verdict(
    objective: Objective,
    held: OutputRecorder,
    before: Divergence,
    original: Session,
    candidate: Session,
    made: Session,
) -> _Verdict:
    after = held.compare(made)
    if objective.labels is None:
        return _Verdict(after=after, better=after.mean < before.mean)
    labelled = LabelledSamples(objective, held.feeds, original)
    assert objective.classes is not None
    return _Verdict(
        after=after,
        better=labelled.loss(made) < labelled.loss(candidate),
        lost="outputs and labels together lose",
        accuracy_before=labelled.accuracy(candidate),
        accuracy=labelled.accuracy(made),
        notes=objective.labels.notes(objective.classes, objective.losses),
    )


def _judge(
    objective: Objective, recorder: OutputRecorder, original: Session
) -> Callable[[Student], float]:
    """What tells how good a student is on the samples of a recorder: lower is better."""
    if objective.labels is None:
        return lambda student: recorder.compare(student).mean
    return LabelledSamples(objective, recorder.feeds, original).loss


def _rate(method: FinetuneMethod, divergence: float) -> float:
    """The highest learning rate of a method for a student that diverges so much.

    It is rounded: a checkpoint is looked up by it, and the last bits of a divergence are chance.
    """
    rate = RATES[method] * (math.sqrt(divergence / FAR) if divergence < FAR else 1.0)
    return float(f"{rate:.2g}")


def _parts(graph: TorchGraph, original: ModelStore, config: FinetuneConfig) -> list[Part]:
    """What a method trains; nothing, where the candidate is the original."""
    source = trainable_form(original)
    changed = changed_names(graph, source)
    names = trainable_names(graph)
    parts: list[Part] = []
    if graph.store.fingerprint() == source.fingerprint():
        return parts
    biases = trainable_names(graph, "biases")
    if config.method == "biases":
        return plain_parts(graph, biases)
    if not changed.intersection(names):
        return parts
    if config.method == "oialr":
        for first, second in factor_pairs(GraphIndex.build(graph.store)):
            pair = first.weight, second.weight
            if changed.issuperset(pair) and graph.parameters.keys() >= set(pair):
                tensors = graph.parameters[pair[0]], graph.parameters[pair[1]]
                parts.append(pair_subspace(first, second, tensors))
                names = [name for name in names if name not in pair]
        if not parts:
            return parts
    chosen = [name for name in names if name in changed or name in biases]
    return parts + plain_parts(graph, chosen)


def _objective(
    original: ModelStore,
    session: Session,
    graph: TorchGraph,
    parts: Sequence[Part],
    losses: tuple[OutputLoss, ...],
    setting: Setting,
    config: FinetuneConfig,
) -> Objective:
    blocks: dict[str, float] = {}
    if config.blocks:
        made = {name for node in original.proto.graph.node for name in node.output}
        trained = {name for part in parts for name in part.made()}
        names = [name for name in between_blocks(graph, trained) if name in made]
        shown = survey(original, names, setting.looked_at[0], setting.provider)
        for name, value in shown.items():
            if np.issubdtype(value.dtype, np.floating):
                blocks[name] = max(float(value.astype(np.float64).var()), 1e-12)
    if config.labels is None:
        return Objective(losses=losses, blocks=blocks)
    labels = Labels.parse(config.labels)
    classes = setting.classes(labels, session, losses)
    return Objective(losses=losses, blocks=blocks, labels=labels, classes=classes)
