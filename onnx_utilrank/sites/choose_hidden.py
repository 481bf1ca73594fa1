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
    places = {site.key: k for k, site in enumerate(sites)}
    sets = [[places[key] for key in hidden.sites] for hidden in found]
    worth = []
    for hidden, own in zip(found, sets, strict=True):
        held = sum(sites[place].parameters for place in own)
        # Units that became one go together.
        features = hidden.size if hidden.units else hidden.size * len(hidden.made)
        worth.append(held * features / (features + held / features))
    return tuple(found[k] for k in most_worth(sets, worth))


def most_worth(sets: Sequence[Collection[int]], worth: Sequence[float]) -> tuple[int, ...]:
    """Numbers of the sets that share nothing and are worth most together, in their order.

    Sets that are tied by none are chosen among apart. Of those that are, in the order of what they
    take first, choices differ for what comes later in what they take of it: in a chain of layers,
    where each set shares a weight with the next, by one weight. With more than `CHOICES` of them
    the best go on. Of those that are worth the same, the one that takes earlier sets.

    Args:
        sets: What each set takes, by its place in the graph; not empty.
        worth: What it is worth, not negative.
    """
    tied: list[tuple[set[int], list[int]]] = []
    for k in sorted(range(len(sets)), key=lambda k: (min(sets[k]), k)):
        together, members = set(sets[k]), [k]
        for other in [each for each in tied if not each[0].isdisjoint(together)]:
            tied.remove(other)
            together |= other[0]
            members = other[1] + members
        tied.append((together, members))
    ordered = [sorted(members, key=lambda k: (min(sets[k]), k)) for _, members in tied]
    return tuple(sorted(k for members in ordered for k in _of_tied(members, sets, worth)))


def _of_tied(
    members: Sequence[int], sets: Sequence[Collection[int]], worth: Sequence[float]
) -> tuple[int, ...]:
    later: list[frozenset[int]] = [frozenset()]
    for k in reversed(members):
        later.append(later[-1].union(sets[k]))
    # What they take of later sets, with what they are worth and who they are.
    choices: dict[frozenset[int], tuple[float, tuple[int, ...]]] = {frozenset(): (0.0, ())}
    for k, wanted in zip(members, later[-2::-1], strict=True):
        further: dict[frozenset[int], tuple[float, tuple[int, ...]]] = {}
        for taken, (total, chosen) in choices.items():
            ways = [(taken, total, chosen)]
            if taken.isdisjoint(sets[k]):
                ways.insert(0, (taken.union(sets[k]), total + worth[k], (*chosen, k)))
            for held, value, numbers in ways:
                rest = held & wanted
                if rest not in further or value > further[rest][0]:
                    further[rest] = (value, numbers)
        best = sorted(further.items(), key=lambda choice: -choice[1][0])
        choices = dict(best[:CHOICES])
    return max(choices.values(), key=lambda choice: choice[0])[1]
