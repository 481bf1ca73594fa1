"""Choose among features that could shrink, where they share weights."""

from collections.abc import Collection, Sequence

from onnx_utilrank.sites.hidden import Hidden
from onnx_utilrank.sites.site import Site

__all__ = ["choose_hidden", "most_worth"]

# Choices that are looked at side by side.
CHOICES = 1000


def choose_hidden(found: Sequence[Hidden], sites: Sequence[Site]) -> tuple[Hidden, ...]:
    """Those that are worth most together, and of which no two share a weight.

    n features are worth P n / (n + w), with the P parameters around them in w rows and columns
    each. A share of the features is that share of the parameters; and the more of them there are
    beside the values that they are made of and that are made of them, the larger a share follows
    from the others: many units of few inputs do, few of many do not.

    Args:
        found: All that could shrink.
        sites: The weights.
    """
    parameters = {site.key: site.parameters for site in sites}
    worth = []
    for hidden in found:
        held = sum(parameters[key] for key in hidden.sites)
        features = hidden.size * len(hidden.made)
        worth.append(held * features / (features + held / features))
    return tuple(found[k] for k in most_worth([hidden.sites for hidden in found], worth))


def most_worth(sets: Sequence[Collection[str]], worth: Sequence[float]) -> tuple[int, ...]:
    """Numbers of the sets that share nothing and are worth most together, in their order.

    Choices differ for what comes later in what they take of it: in a chain of layers, where each
    set shares a weight with the next, by one weight. With more than `CHOICES` of them the best go
    on. Of those that are worth the same, the one that takes earlier sets.

    Args:
        sets: What each set takes.
        worth: What it is worth, not negative.
    """
    later: list[frozenset[str]] = [frozenset()]
    for taken in reversed(sets):
        later.append(later[-1].union(taken))
    # What they take of later sets, with what they are worth and who they are.
    choices: dict[frozenset[str], tuple[float, tuple[int, ...]]] = {frozenset(): (0.0, ())}
    for k, (own, wanted) in enumerate(zip(sets, later[-2::-1], strict=True)):
        further: dict[frozenset[str], tuple[float, tuple[int, ...]]] = {}
        for taken, (total, chosen) in choices.items():
            ways = [(taken, total, chosen)]
            if taken.isdisjoint(own):
                ways.insert(0, (taken.union(own), total + worth[k], (*chosen, k)))
            for held, value, numbers in ways:
                rest = held & wanted
                if rest not in further or value > further[rest][0]:
                    further[rest] = (value, numbers)
        best = sorted(further.items(), key=lambda choice: -choice[1][0])
        choices = dict(best[:CHOICES])
    return max(choices.values(), key=lambda choice: choice[0])[1]
