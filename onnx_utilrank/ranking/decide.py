"""Turn measurements into a plan: offer moves, let the method allocate, give every reason."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from onnx_utilrank.config import CompressConfig
from onnx_utilrank.errors import ConfigError, TargetMissedError
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.moves.low_rank import LOW_RANK
from onnx_utilrank.moves.move import MoveKind
from onnx_utilrank.moves.moves import MOVES, find_move
from onnx_utilrank.moves.shrink import FAST_CHANNELS, SHRINK, can_be_both
from onnx_utilrank.moves.two_convs import TwoConvs
from onnx_utilrank.ranking.budget import allocate, spend
from onnx_utilrank.ranking.cost import Ledger, count_parameters, shrunk_parameters
from onnx_utilrank.ranking.entries import dense_parameters, hidden_entry, site_entry
from onnx_utilrank.ranking.joint import Bundle, Option, bundled
from onnx_utilrank.ranking.method import (
    Choice,
    Measured,
    Method,
    Move,
    candidate_ranks,
    fast_multiple,
)
from onnx_utilrank.ranking.plan import RankPlan
from onnx_utilrank.ranking.skipped import skipped_nodes, unfactorable
from onnx_utilrank.ranking.then import ThenEntry
from onnx_utilrank.ranking.two_sided import TWO_SIDED, TwoSidedSite
from onnx_utilrank.ranking.utilized_rank import at_energy
from onnx_utilrank.sites.hidden import Hidden
from onnx_utilrank.sites.site import Site, Skip

__all__ = ["Decision", "Offers", "kinds_offered"]

# Weights that shrink are offered at so many ranks from one power of two to the next. With all sizes
# of hidden features there would be too many pairs to look at.
RANKS_AN_OCTAVE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What is done to every site.

    Attributes:
        moves: One a site.
        shrunk: What is done to hidden features, by key, where they shrink.
        error: What is lost, all together.
    """

    moves: list[Move]
    shrunk: Mapping[str, Option]
    error: float

    @classmethod
    def of(cls, moves: list[Move]) -> "Decision":
        """Moves that sites make by themselves."""
        return cls(moves=moves, shrunk={}, error=sum(m.error for m in moves))


@dataclass(frozen=True, slots=True, kw_only=True)
class Offers:
    """What can be done to every site, at which cost: all that a plan is chosen from.

    Attributes:
        index: The model.
        fingerprint: Its fingerprint.
        choices: The sites with their moves.
        bundles: The same, those around hidden features joined; empty where none may shrink.
        skips: Nodes that are no sites.
        method: What measured them, and allocates.
        config: The options.
        ledger: What ratios are of.
    """

    index: GraphIndex
    fingerprint: str
    choices: tuple[Choice, ...]
    bundles: tuple[Bundle, ...]
    skips: tuple[Skip, ...]
    method: Method
    config: CompressConfig
    ledger: Ledger

    @classmethod
    def of(
        cls,
        index: GraphIndex,
        measured: Sequence[Measured],
        hidden: Sequence[Hidden],
        skips: Sequence[Skip],
        method: Method,
        config: CompressConfig,
        ledger: Ledger,
    ) -> "Offers":
        """Collect the moves of all sites.

        Raises:
            ConfigError: The options name a move that there is not, or none of the method's.
        """
        for key in config.moves or ():
            if key != SHRINK:
                find_move(key)
        own = method.moves
        if config.moves is not None and own is not None and not set(own) & set(config.moves):
            raise ConfigError(
                f"method {method.key} makes none of the moves {', '.join(config.moves)}; it has "
                f"{', '.join(own)}"
            )
        choices = tuple(_choice(index, m, method, config, ledger) for m in measured)

        sites = {m.site.key: m.site for m in measured}

        # Those that are asked for by name may be slower.
        channels = FAST_CHANNELS if config.moves is None else 1

        def shrunk(each: Hidden, choice: Choice, kept: int, *, ranks: bool) -> list[Move]:
            # Time is known of either move by itself.
            both = ranks and ledger.latency is None
            return _shrunk(index, each, sites, choice, kept, ledger, ranks=both)

        return cls(
            index=index,
            fingerprint=index.source.fingerprint(),
            choices=choices,
            bundles=tuple(
                bundled(choices, hidden, shrunk, config.multiple, channels)
                if hidden or any(m.site.tied for m in measured)
                else ()
            ),
            skips=tuple(skips),
            method=method,
            config=config,
            ledger=ledger,
        )

    @property
    def rest(self) -> float:
        """What the model costs without the weights of its sites."""
        whole = self.ledger.total if self.ledger.dense_total is None else self.ledger.dense_total
        return whole - sum(self.ledger.dense(c.measured.site) for c in self.choices)

    @property
    def least(self) -> float:
        """The least share of its cost that can be kept, every site at its cheapest."""
        offered: Sequence[Bundle | Choice] = self.bundles or self.choices
        cheapest = sum(min(m.cost for m in offer.moves) for offer in offered)
        return (self.rest + cheapest) / max(self.ledger.total, 1)

    def allocate(self, ratio: float) -> Decision | None:
        """One move a site for a share of the cost to keep; None where it cannot be reached."""
        # The room is for the binary fraction of a ratio such as 0.7.
        budget = self.ledger.total * ratio + 1e-6 - self.rest
        if not self.bundles:
            moves = self.method.allocate(self.choices, budget)
            return None if moves is None else Decision.of(moves)
        options = allocate(self.bundles, budget)
        if options is None:
            return None
        taken: dict[int, Move] = {}
        kept = {}
        apart: list[int] = []
        for bundle, option in zip(self.bundles, options, strict=True):
            taken.update(zip(bundle.members, option.moves, strict=True))
            if option.kept is not None:
                assert bundle.hidden is not None
                kept[bundle.hidden.key] = option
            elif not bundle.tied:
                apart += bundle.members
        error = sum(option.error for option in options)
        # Bundles have but the corners of what their weights can do each by itself.
        left = budget - sum(option.cost for option in options)
        before = [taken[k] for k in apart]
        after = spend([self.choices[k] for k in apart], before, left)
        taken.update(zip(apart, after, strict=True))
        gained = sum(a.error - b.error for a, b in zip(before, after, strict=True))
        moves = [taken[k] for k in range(len(self.choices))]
        return Decision(moves=moves, shrunk=kept, error=error - gained)

    def counted(self, ratio: float) -> float:
        """The share of the cost that the plan for a ratio keeps, by this count: at most the ratio.

        The ratio must be one that can be reached.
        """
        decided = self.allocate(ratio)
        assert decided is not None
        return (self.rest + sum(m.cost for m in decided.moves)) / max(self.ledger.total, 1)

    def predicted(self, ratio: float) -> float | None:
        """The loss that is expected at a ratio; None where the method does not know, or it cannot
        be reached.
        """
        decided = self.allocate(ratio) if self.method is TWO_SIDED else None
        return None if decided is None else decided.error

    def reach(self, loss: float) -> float | None:
        """The least ratio, to a thousandth, that is predicted to lose at most so much.

        None where the method does not know, or where no ratio loses more.
        """
        low, high = self.least, 1.0
        at_least = self.predicted(low + 1e-3)
        if at_least is None or at_least <= loss:
            return None
        while high - low > 1e-3:
            middle = (low + high) / 2
            predicted = self.predicted(middle)
            far = predicted is None or predicted > loss
            low, high = (middle, high) if far else (low, middle)
        return high

    def plan(self, ratio: float | None) -> RankPlan:
        """Choose a move for every site.

        Args:
            ratio: Share of the model's cost to keep; None goes by the energy of the options.

        Raises:
            TargetMissedError: No choice is as cheap as was asked for.
        """
        if ratio is None:
            assert self.config.energy is not None
            decided: Decision | None = Decision.of(at_energy(self.choices, self.config.energy))
        else:
            decided = self.allocate(ratio)
        if decided is None and not self.choices:
            raise TargetMissedError(unfactorable(self.index.store.label, self.skips))
        if decided is None:
            outside = self.rest / max(self.ledger.total, 1)
            raise TargetMissedError(
                f"{self.index.store.label}: a ratio of {ratio:g} of its {self.ledger.unit} cannot "
                f"be reached: with every site at its least, {self.least:.4f} is kept "
                f"({outside:.4f} lies outside the {len(self.choices)} weights that can be factored)"
            )
        entries = tuple(
            site_entry(self.index, c.measured, m, self.ledger)
            for c, m in zip(self.choices, decided.moves, strict=True)
        )
        parameters = count_parameters(self.index.source)
        saved = sum(e.parameters_before - e.parameters_after for e in entries)
        two_sided = self.method is TWO_SIDED
        return RankPlan(
            model_sha256=self.fingerprint,
            method=self.method.key,
            target=self.config.target,
            parameters_before=parameters,
            parameters_after=parameters - saved,
            predicted_divergence=decided.error if two_sided else None,
            weighting=self.config.weighting,
            refit=self.config.refit and two_sided,
            augment=self.config.augment and two_sided,
            entries=entries,
            hidden=tuple(
                hidden_entry(b, decided.shrunk.get(b.hidden.key))
                for b in self.bundles
                if b.hidden is not None
            ),
            skipped=skipped_nodes(self.skips),
            then=ThenEntry(scheme=self.config.then, repair_rank=self.config.repair_rank)
            if self.config.then is not None
            else None,
        )


def kinds_offered(
    index: GraphIndex, site: Site, method: Method, config: CompressConfig
) -> list[MoveKind]:
    """The moves that a site can make, and that the method and the options have."""
    return [
        kind
        for kind in MOVES
        if (config.moves is None or kind.key in config.moves)
        and (method.moves is None or kind.key in method.moves)
        and kind.applies(index, site)
    ]


def _choice(
    index: GraphIndex, measured: Measured, method: Method, config: CompressConfig, ledger: Ledger
) -> Choice:
    site = measured.site
    moves = []
    for kind in kinds_offered(index, site, method, config):
        ranks = candidate_ranks(
            site,
            kind.top_rank(site),
            config.multiple,
            force=config.force and kind is LOW_RANK,
            fast=fast_multiple(site, method, config),
        )
        for move in _offered(measured, kind, ranks):
            assert move.rank is not None
            # Those that are asked for by name may be slower, unless speed is asked for too.
            if (config.moves is None or ledger.latency) and not ledger.pays(site, kind, move.rank):
                continue
            stored = kind.parameters(site, move.rank) - LOW_RANK.parameters(site, move.rank)
            if site.tied is not None and not site.freed:  # its factors are those of the other
                stored -= LOW_RANK.parameters(site, move.rank)
            parameters = move.parameters + stored
            quantized = config.then is not None and not config.force
            if quantized and not ledger.shrinks(site, kind, move.rank, parameters):
                continue
            cost = ledger.factored(site, kind, move.rank, parameters)
            moves.append(replace(move, kind=kind.key, parameters=parameters, cost=cost))
    if not config.force or not moves:
        dense = Move(
            rank=None,
            bias=False,
            parameters=dense_parameters(site),
            error=0.0,
            cost=ledger.dense(site),
        )
        moves = [dense, *moves]
    return Choice(measured=measured, moves=tuple(moves))


def _offered(measured: Measured, kind: MoveKind, ranks: Sequence[int]) -> list[Move]:
    """What a kind of move loses at each rank; none where the site was not measured for it."""
    if not isinstance(kind, TwoConvs):
        return measured.moves(ranks)
    return measured.inner_moves(kind.key, ranks) if isinstance(measured, TwoSidedSite) else []


def _shrunk(
    index: GraphIndex,
    hidden: Hidden,
    sites: Mapping[str, Site],
    choice: Choice,
    kept: int,
    ledger: Ledger,
    *,
    ranks: bool,
) -> list[Move]:
    """A site whose hidden features shrink: fewer rows or columns, and of what is left some rank."""
    site = choice.measured.site
    rows, columns = hidden.rows(site.key, site.m, kept), hidden.columns(site.key, site.d, kept)
    whole = shrunk_parameters(index, hidden, sites, site, kept, None)
    extra = whole - rows * columns
    alone = Move(
        rank=None,
        bias=False,
        parameters=whole,
        error=0.0,
        kind=SHRINK,
        cost=ledger.shrunk(site, rows, columns, extra),
    )
    if not ranks or not can_be_both(hidden, site):
        return [alone]
    extra += rows if site.bias == "new" else 0
    return [
        alone,
        *(
            replace(
                move,
                kind=SHRINK,
                parameters=shrunk_parameters(index, hidden, sites, site, kept, move.rank),
                cost=ledger.shrunk(site, rows, columns, extra, move.rank),
            )
            for move in choice.moves
            if move.rank and move.kind == LOW_RANK.key
            if move.rank % max(2 ** (move.rank.bit_length() - 1) // RANKS_AN_OCTAVE, 1) == 0
            if ledger.shrinks_further(site, rows, columns, move.rank)
        ),
    ]
