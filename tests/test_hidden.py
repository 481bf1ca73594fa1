"""Features of attention heads: where they are found, and models in which they shrink."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
import pytest
from builders import MICROSOFT, Feed, constants, index, model, noise, run
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from onnx_utilrank import (
    CompressConfig,
    ModelError,
    RankPlan,
    TargetMissedError,
    UtilrankError,
    compress,
)
from onnx_utilrank.calibration.survey import survey
from onnx_utilrank.model.graph import GraphIndex
from onnx_utilrank.moves.shrink import Basis, Shrinking, can_be_both
from onnx_utilrank.ranking.budget import allocate
from onnx_utilrank.ranking.cost import count_parameters, hidden_cost
from onnx_utilrank.ranking.inner import Heads
from onnx_utilrank.ranking.joint import bundled
from onnx_utilrank.ranking.method import Choice, Move
from onnx_utilrank.ranking.two_sided import TwoSidedSite
from onnx_utilrank.runtime.providers import CPU
from onnx_utilrank.sites.find import find_sites, site_kind, site_matrix
from onnx_utilrank.sites.find_hidden import find_hidden
from onnx_utilrank.sites.follow_units import values_followed
from onnx_utilrank.sites.hidden import Hidden, Part
from onnx_utilrank.sites.site import Site
from onnx_utilrank.statistics.factorize import (
    Decomposition,
    Factors,
    Metric,
    grouped,
    optimal,
    plain_svd,
)
from onnx_utilrank.statistics.moments import SecondMoment
from onnx_utilrank.surgery.rewrite import check_contract, rewrite

# A shared machine may stall for longer than any deadline.
law = settings(deadline=None, max_examples=60)
SEEDS = st.integers(0, 2**32 - 1)
EPS = float(np.finfo(np.float32).eps)

D, H, N, T = 12, 2, 4, 5  # inputs, heads, features of each, positions
ALL = H * N
QK, VO, FUSED = {"wq", "wk"}, {"wv", "wo"}, {"w", "wo"}


@dataclass(frozen=True, kw_only=True)
class Style:
    """One way to write attention in ONNX.

    Attributes:
        body: The nodes.
        found: The weights around each set of features that can shrink.
        signature: Inputs and outputs.
        batches: Samples of a run that are tried.
    """

    body: str
    found: tuple[set[str], ...] = (QK, VO)
    signature: str = f"(float[n,{T},{D}] x) => (float[n,{T},{D}] y)"
    batches: tuple[int, ...] = (1, 3)
    header: Mapping[str, object] = field(default_factory=dict)

    def proto(self) -> onnx.ModelProto:
        held = {
            "wq": noise(1, D, ALL),
            "wk": noise(2, D, ALL),
            "wv": noise(3, D, ALL),
            "wo": noise(4, ALL, D),
            "w": noise(5, D, 3 * ALL),
            "single_q": noise(1, D, N),
            "single_k": noise(2, D, N),
            "single_v": noise(3, D, N),
            "single_o": noise(4, N, D),
            **{f"b{k}": noise(j, ALL) for j, k in enumerate("qkv", 6)},
            "bo": noise(9, D),
            "b": noise(10, 3 * ALL),
            "scale": np.array(N**-0.5),
            "cos": noise(11, T, N),
            "sin": noise(12, T, N),
            "gain": noise(13, N),
            "other": noise(15, ALL, 3),
            "wq4": noise(16, D, 2 * ALL),
            "wo4": noise(17, 2 * ALL, D),
        }
        for value in held.values():
            if value.ndim == 2:
                value /= math.sqrt(len(value))
        held |= {f"w{k}t": held[f"w{k}"].T for k in "qkvo"}
        cast = {name: value.astype(np.float32) for name, value in held.items()}
        cast |= {
            "split_1": np.array([-1, T, H, N]),
            "split_0": np.array([0, 0, H, N]),
            "split_3": np.array([0, 0, 3, H, N]),
            "split_4": np.array([0, 0, 2 * H, N]),
            "split_2_2": np.array([0, T, H, 2, N]),
            "grouped": np.array([0, 2 * H, -1, N]),
            "merge_4": np.array([0, 0, 2 * ALL]),
            "merge_2_2": np.array([0, T, 2 * ALL]),
            "every": np.array([H, 2, T, N]),
            "pairs": np.array([1, 1, 2, 1, 1]),
            "twice": np.repeat(np.arange(H), 2),
            "merge_0": np.array([0, 0, ALL]),
            "merge_free": np.array([0, 0, -1]),
            "split_free": np.array([0, 0, H, -1]),
            "merge_rows": np.array([-1, ALL]),
            "rows": np.array([-1, D]),
            "back_all": np.array([-1, T, ALL]),
            "back": np.array([-1, T, D]),
            "i0": np.array(0),
            "i1": np.array(1),
            "i2": np.array(2),
            "i3": np.array(3),
            "a0": np.array([0]),
            "a1": np.array([1]),
            "a2": np.array([2]),
            "a3": np.array([3]),
            "heads": np.array([H]),
            "features": np.array([N]),
            "half": np.array([N // 2]),
            "whole": np.array([N]),
            "flat_q": np.array([-1, T, N]),
            "flat_k": np.array([-1, N, T]),
            "unflat": np.array([-1, H, T, N]),
            "thirds": np.array([ALL] * 3),
            "c1": np.array([ALL]),
            "c2": np.array([2 * ALL]),
            "c3": np.array([3 * ALL]),
            "first": np.arange(ALL),
            "second": np.arange(ALL) + ALL,
            "third": np.arange(ALL) + 2 * ALL,
        }
        words = set("".join(c if c.isalnum() or c == "_" else " " for c in self.body).split())
        cast = {name: value for name, value in cast.items() if name in words}
        return model(self.signature, self.body, **self.header, **cast)

    def feed(self, batch: int) -> Feed:
        x = 0.5 + noise(20 + batch, batch, T, D).astype(np.float32)
        return {"x": x if self.signature.count(",") > 3 else x[0]}


SEPARATE = """
    qm = MatMul(x, wq) qb = Add(qm, bq) km = MatMul(x, wk) kb = Add(bk, km)
    vm = MatMul(x, wv) vb = Add(vm, bv)
"""
SPLIT = """
    qr = Reshape(qb, {0}) q = Transpose<perm=[0,2,1,3]>(qr)
    kr = Reshape(kb, {0}) k = Transpose<perm=[0,2,3,1]>(kr)
    vr = Reshape(vb, {0}) v = Transpose<perm=[0,2,1,3]>(vr)
"""
ATTEND = """
    s = MatMul(q, k) t = Mul(s, scale) p = Softmax<axis=-1>(t) c = MatMul(p, v)
"""
MERGE = "ct = Transpose<perm=[0,2,1,3]>(c) cr = Reshape(ct, {}) "
OUT = "o = MatMul(cr, wo) y = Add(o, bo)"
PLAIN = SEPARATE + SPLIT.format("split_0") + ATTEND + MERGE.format("merge_0") + OUT
STACKED = """
    m = MatMul(x, w) mb = Add(m, b) mr = Reshape(mb, split_3) z = Transpose<perm=[2,0,3,1,4]>(mr)
"""
UNSTACKED = "k = Transpose<perm=[0,1,3,2]>(ks)" + ATTEND + MERGE.format("merge_0") + OUT
GEMMS = """
    xr = Reshape(x, rows)
    qb = Gemm(xr, wq, bq) kb = Gemm<beta=0.5>(xr, wk, bk) vb = Gemm(xr, wv, bv)
"""
TARGETS = """
    xs = Shape(x) n0 = Gather(xs, i0) n1 = Gather(xs, i1) n0u = Unsqueeze(n0, a0)
    n1u = Unsqueeze(n1, a0) target = Concat<axis=0>(n0u, n1u, heads, features)
"""
MERGED = """
    ct = Transpose<perm=[0,2,1,3]>(c) cs = Shape(ct) g0 = Gather(cs, a0) g1 = Gather(cs, a1)
    g2 = Gather(cs, a2) g3 = Gather(cs, a3) g = Mul(g2, g3) ts = Concat<axis=0>(g0, g1, g)
    cr = Reshape(ct, ts)
"""
SCALED = """
    qs = Shape(q) last = Gather(qs, i3) lf = Cast<to=1>(last) root = Sqrt(lf)
    s = MatMul(q, k) t = Div(s, root) p = Softmax<axis=-1>(t) c = MatMul(p, v)
"""
STYLES = {
    "gemm": Style(
        body=GEMMS
        + SPLIT.format("split_1")
        + ATTEND
        + MERGE.format("merge_rows")
        + "o = Gemm(cr, wo, bo) y = Reshape(o, back)"
    ),
    "gemm of turned weights": Style(
        body=GEMMS.replace("<beta=0.5>", "")
        .replace("Gemm(", "Gemm<transB=1>(")
        .replace("wq,", "wqt,")
        .replace("wk,", "wkt,")
        .replace("wv,", "wvt,")
        + SPLIT.format("split_1")
        + ATTEND
        + MERGE.format("merge_rows")
        + "o = Gemm<transB=1>(cr, wot, bo) y = Reshape(o, back)",
        found=({"wqt", "wkt"}, {"wvt", "wot"}),
    ),
    "matmul": Style(body=PLAIN),
    "a Concat of one value": Style(
        body=PLAIN.replace(
            "ct = Transpose<perm=[0,2,1,3]>(c)",
            "one = Concat<axis=0>(c) ct = Transpose<perm=[0,2,1,3]>(one)",
        )
    ),
    "no bias": Style(
        body="qb = MatMul(x, wq) kb = MatMul(x, wk) vb = MatMul(x, wv)"
        + SPLIT.format("split_free")
        + ATTEND
        + MERGE.format("merge_free")
        + "y = MatMul(cr, wo)"
    ),
    "targets at run time": Style(
        body=TARGETS + SEPARATE + SPLIT.format("target") + ATTEND + MERGED + OUT
    ),
    "stacked, split": Style(
        body=STACKED
        + "qs, k_, vs = Split<axis=0>(z) q = Squeeze(qs, a0) ks = Squeeze(k_, a0) "
        + "v = Squeeze(vs, a0) "
        + UNSTACKED,
        found=(FUSED,),
    ),
    "stacked, gathered": Style(
        body=STACKED
        + "q = Gather<axis=0>(z, i0) ks = Gather<axis=0>(z, i1) v = Gather<axis=0>(z, i2) "
        + UNSTACKED,
        found=(FUSED,),
    ),
    "stacked, sliced": Style(
        body=STACKED
        + "qs = Slice(z, a0, a1, a0) k_ = Slice(z, a1, a2, a0) vs = Slice(z, a2, a3, a0) "
        + "q = Squeeze(qs, a0) ks = Squeeze(k_, a0) v = Squeeze(vs, a0) "
        + UNSTACKED,
        found=(FUSED,),
    ),
    "scale at run time": Style(
        body=SEPARATE + SPLIT.format("split_0") + SCALED + MERGE.format("merge_0") + OUT
    ),
    "biases behind a Reshape": Style(
        body="xr = Reshape(x, rows)"
        + "".join(
            f" {k}m = MatMul(xr, w{k}) {k}w = Reshape({k}m, back_all) {k}b = Add({k}w, b{k})"
            for k in "qkv"
        )
        + SPLIT.format("split_0")
        + ATTEND
        + MERGE.format("merge_0")
        + OUT
    ),
    "scaled before": Style(
        body=PLAIN.replace("s = MatMul(q, k)", "q2 = Mul(q, scale) s = MatMul(q2, k)")
    ),
    "batch and heads merged": Style(
        body=SEPARATE
        + SPLIT.format("split_0")
        + """
            q3 = Reshape(q, flat_q) k3 = Reshape(k, flat_k) v3 = Reshape(v, flat_q)
            s = MatMul(q3, k3) t = Mul(s, scale) p = Softmax<axis=-1>(t) cm = MatMul(p, v3)
            c = Reshape(cm, unflat)
        """
        + MERGE.format("merge_0")
        + OUT
    ),
    "one head": Style(
        body="""
            q = MatMul(x, single_q) k_ = MatMul(x, single_k) v = MatMul(x, single_v)
            k = Transpose<perm=[1,0]>(k_)
        """
        + ATTEND
        + "o = MatMul(c, single_o) y = Add(o, bo)",
        found=({"single_q", "single_k"}, {"single_v", "single_o"}),
        signature=f"(float[n,{D}] x) => (float[n,{D}] y)",
        batches=(1,),
    ),
}
# Attention in one node.
CONTRIB = {"domains": MICROSOFT}
NEWEST = {"opset": 23, "ir": 11}
IN_FOURS = """
    qr = Reshape(qb, split_0) q = Transpose<perm=[0,2,1,3]>(qr)
    kr = Reshape(kb, split_0) k = Transpose<perm=[0,2,1,3]>(kr)
    vr = Reshape(vb, split_0) v = Transpose<perm=[0,2,1,3]>(vr) c = Attention(q, k, v)
"""
MULTI_HEAD = "cr = com.microsoft.MultiHeadAttention<num_heads=2{}>(qb, kb, vb) "
STYLES |= {
    "multi-head attention": Style(body=SEPARATE + MULTI_HEAD.format("") + OUT, header=CONTRIB),
    "multi-head attention with a scale": Style(
        body=SEPARATE + MULTI_HEAD.format(", scale=0.3") + OUT, header=CONTRIB
    ),
    "packed attention": Style(
        body="cr = com.microsoft.Attention<num_heads=2>(x, w, b) " + OUT,
        found=(FUSED,),
        header=CONTRIB,
    ),
    "attention of three axes": Style(
        body=SEPARATE + "cr = Attention<q_num_heads=2, kv_num_heads=2>(qb, kb, vb) " + OUT,
        header=NEWEST,
    ),
    "attention of four axes": Style(
        body=SEPARATE + IN_FOURS + MERGE.format("merge_0") + OUT, header=NEWEST
    ),
}
# Products of heads as Einsum, by axes of its own choice; the second is how Keras writes them.
EINSUM = """
    q = Reshape(qb, split_0) k = Reshape(kb, split_0) v = Reshape(vb, split_0)
    s = Einsum<equation="{}">({}) t = Mul(s, scale) p = Softmax<axis=-1>(t)
    c = Einsum<equation="{}">({}) cr = Reshape(c, merge_0)
"""
STYLES |= {
    f"einsum {k}": Style(body=SEPARATE + EINSUM.format(*parts) + OUT)
    for k, parts in enumerate(
        [
            ("bqhd,bkhd->bhqk", "q, k", "bhqk,bkhd->bqhd", "p, v"),
            ("aecd,abcd->acbe", "k, q", "acbe,aecd->abcd", "p, v"),
            ("bqhd, bkhd -> bhqk", "q, k", "bkhd,bhqk->bqhd", "v, p"),
        ]
    )
}
# Positions last, as images have them; values come first there.
STYLES["features before positions"] = Style(
    body=SEPARATE
    + """
        qr = Reshape(qb, split_0) q = Transpose<perm=[0,2,1,3]>(qr)
        kr = Reshape(kb, split_0) k = Transpose<perm=[0,2,3,1]>(kr)
        vr = Reshape(vb, split_0) v = Transpose<perm=[0,2,3,1]>(vr)
        s = MatMul(q, k) t = Mul(s, scale) p = Softmax<axis=-1>(t)
        pt = Transpose<perm=[0,1,3,2]>(p) c = MatMul(v, pt)
        ct = Transpose<perm=[0,3,1,2]>(c) cr = Reshape(ct, merge_0)
    """
    + OUT
)
# Fused weights whose outputs are told apart along the features themselves.
FEATURES = {
    "split in equal parts": "qb, kb, vb = Split<axis=2>(mb) ",
    "split by sizes": "qb, kb, vb = Split<axis=2>(mb, thirds) ",
    "sliced": "qb = Slice(mb, a0, c1, a2) kb = Slice(mb, c1, c2, a2) vb = Slice(mb, c2, c3, a2) ",
    # As PyTorch's TorchScript exporter writes a chunk.
    "sliced at run time": "ms = Shape(mb) mw = Gather(ms, a2) mt = Add(mw, a2) "
    "one = Div(mt, a3) two = Mul(one, a2) all = Mul(one, a3) "
    "qb = Slice(mb, a0, one, a2) kb = Slice(mb, one, two, a2) vb = Slice(mb, two, all, a2) ",
    "gathered": "qb = Gather<axis=2>(mb, first) kb = Gather<axis=2>(mb, second) "
    "vb = Gather<axis=2>(mb, third) ",
}
FEATURES_STYLES = {
    f"features {name}": Style(
        body="m = MatMul(x, w) mb = Add(m, b) "
        + parts
        + SPLIT.format("split_0")
        + ATTEND
        + MERGE.format("merge_0")
        + OUT,
        found=(FUSED,),
    )
    for name, parts in FEATURES.items()
}


SLICED_STYLES = {name: style for name, style in FEATURES_STYLES.items() if "sliced" in name}
TWO_OUTPUTS = f"(float[n,{T},{D}] x) => (float[n,{T},{D}] y, float[{{}}] z)"
# Keys and values of a head for two of queries, and a context for two weights.
FOUR = """
    q4 = MatMul(x, wq4) qr = Reshape(q4, split_4) q = Transpose<perm=[0,2,1,3]>(qr)
    km = MatMul(x, wk) kb = Add(bk, km) kr = Reshape(kb, split_0) k2 = Transpose<perm=[0,2,1,3]>(kr)
    vm = MatMul(x, wv) vb = Add(vm, bv) vr = Reshape(vb, split_0) v2 = Transpose<perm=[0,2,1,3]>(vr)
"""
REPEATS = {
    "by Expand": "{0}u = Unsqueeze({0}2, a2) {0}e = Expand({0}u, every) "
    "{0}4 = Reshape({0}e, grouped) ",
    "by Expand to extents of 1": "{0}u = Unsqueeze({0}2, a2) {0}e = Expand({0}u, pairs) "
    "{0}4 = Reshape({0}e, grouped) ",
    "by Expand to a shape of its own": "{0}u = Unsqueeze({0}2, a2) {0}s = Shape({0}u) "
    "{0}w = Mul({0}s, pairs) {0}e = Expand({0}u, {0}w) {0}4 = Reshape({0}e, grouped) ",
    "by Tile": "{0}u = Unsqueeze({0}2, a2) {0}e = Tile({0}u, pairs) {0}4 = Reshape({0}e, grouped) ",
    "by Gather": "{0}4 = Gather<axis=1>({0}2, twice) ",
}
ATTEND_4 = "k = Transpose<perm=[0,1,3,2]>(k4) v = Identity(v4)" + ATTEND
MERGE_4 = MERGE.format("merge_4") + "o = MatMul(cr, wo4) y = Add(o, bo)"
SHARED_STYLES = {
    **{
        f"repeated {name}": Style(
            body=FOUR + repeat.format("k") + repeat.format("v") + ATTEND_4 + MERGE_4,
            found=({"wq4", "wk"}, {"wv", "wo4"}),
        )
        for name, repeat in REPEATS.items()
    },
    "met by broadcasting": Style(
        body=FOUR.replace("split_4", "split_2_2").replace(
            "q = Transpose<perm=[0,2,1,3]>", "q = Transpose<perm=[0,2,3,1,4]>"
        )
        + "ku = Unsqueeze(k2, a2) k = Transpose<perm=[0,1,2,4,3]>(ku) v = Unsqueeze(v2, a2)"
        + ATTEND
        + "ct = Transpose<perm=[0,3,1,2,4]>(c) cr = Reshape(ct, merge_2_2) "
        + "o = MatMul(cr, wo4) y = Add(o, bo)",
        found=({"wq4", "wk"}, {"wv", "wo4"}),
    ),
    "two weights read a context": Style(
        body=PLAIN + " z = MatMul(cr, other)",
        found=(QK, {"wv", "wo", "other"}),
        signature=TWO_OUTPUTS.format(f"n,{T},3"),
    ),
}


def hidden_of(proto: onnx.ModelProto, feed: Feed) -> tuple[GraphIndex, dict[str, Site], list]:
    graph = index(proto)
    sites, _ = find_sites(graph)
    values = survey(graph.store, values_followed(graph), feed, CPU)
    return graph, {s.key: s for s in sites}, list(find_hidden(graph, sites, values))


def found_in(style: Style, batch: int = 1) -> list[set[str]]:
    _, _, hidden = hidden_of(style.proto(), style.feed(batch))
    return sorted((set(h.sites) for h in hidden if not h.units), key=sorted)


# --- finding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STYLES)
def test_heads_are_found_however_they_are_written(name: str):
    style = STYLES[name]
    for batch in style.batches:
        _, sites, hidden = hidden_of(style.proto(), style.feed(batch))
        assert sorted((set(h.sites) for h in hidden), key=sorted) == sorted(style.found, key=sorted)
        for each in hidden:
            fused = 2 if "w" in each.sites else 1
            heads = 1 if name == "one head" else H
            assert each.size == N
            assert len(each.groups) == heads * fused
            assert list(each.sites) == [key for key in sites if key in each.sites]
            for kept in range(1, N):
                for key in each.sites:
                    rows = each.rows(key, sites[key].m, kept)
                    columns = each.columns(key, sites[key].d, kept)
                    expected = (sites[key].m, sites[key].d * kept // N)
                    if "o" not in key:
                        expected = (sites[key].m * kept // N, sites[key].d)
                    assert (rows, columns) == expected


@pytest.mark.parametrize("name", FEATURES_STYLES)
def test_fused_features_are_found_or_left_alone(name: str):
    found = found_in(FEATURES_STYLES[name])
    assert found == ([] if "gathered" in name else [FUSED])


@pytest.mark.parametrize("name", SHARED_STYLES)
def test_features_that_several_meet_are_found(name: str):
    style = SHARED_STYLES[name]
    for batch in style.batches:
        _, sites, hidden = hidden_of(style.proto(), style.feed(batch))
        assert sorted((set(h.sites) for h in hidden), key=sorted) == sorted(style.found, key=sorted)
        for each in hidden:
            (maker,) = {g.made.site for g in each.groups}
            assert maker in ("wk", "wv", "wq")
            assert len(each.makers(maker)) == H
            for key in each.sites:
                rows, columns = each.rows(key, sites[key].m, 1), each.columns(key, sites[key].d, 1)
                full = sites[key].m, sites[key].d
                whole = full[0], full[1] // N
                assert (rows, columns) == (whole if "o" in key else (full[0] // N, full[1]))


BIASED = """
    qb = MatMul(x, wq) kb = MatMul(x, wk) vb = MatMul(x, wv)
    cr = com.microsoft.MultiHeadAttention<num_heads=2>(qb, kb, vb, b)
"""


def test_a_bias_within_attention_shrinks_with_its_heads():
    style = Style(body=BIASED + OUT, header=CONTRIB)
    graph, sites, found = hidden_of(style.proto(), style.feed(1))
    assert sorted(set(h.sites) for h in found) == [QK, VO]
    untouched = rewrite(graph, [], [])
    assert untouched.proto.SerializeToString() == style.proto().SerializeToString()
    bases = [(h, bases_of(h, 2, 50)) for h in found]
    store = rewrite(graph, [], [shrinking(graph, sites, h, b) for h, b in bases])
    # The same, where the bias is added before.
    plain = Style(body=PLAIN)
    proto, bias = plain.proto(), constants(style.proto())["b"]
    for tensor in proto.graph.initializer:
        if tensor.name in ("bq", "bk", "bv"):
            k = "qkv".index(tensor.name[1])
            values = bias[k * ALL : (k + 1) * ALL]
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    other, others, same = hidden_of(proto, plain.feed(1))
    expected = rewrite(other, [], [shrinking(other, others, h, bases_of(h, 2, 50)) for h in same])
    for batch in (1, 3):
        feed = style.feed(batch)
        assert_close(run(store, feed)["y"], run(expected, feed)["y"])


@pytest.mark.parametrize(
    "body",
    [
        # Keys of earlier steps come on top.
        SEPARATE + "cr, past_k, past_v = com.microsoft.MultiHeadAttention<num_heads=2>(qb, kb, vb)",
        # Fewer heads of keys than of queries.
        "qb = MatMul(x, wq) kb = MatMul(x, single_k) vb = MatMul(x, single_v) "
        "cr = Attention<q_num_heads=2, kv_num_heads=1>(qb, kb, vb) ",
        # Keys and values of four axes, which have to be of one size.
        "qb = MatMul(x, wq) km = MatMul(x, wk) vm = MatMul(x, wv) "
        "kr = Reshape(km, split_0) k = Transpose<perm=[0,2,1,3]>(kr) "
        "vr = Reshape(vm, split_0) v = Transpose<perm=[0,2,1,3]>(vr) "
        "cr = com.microsoft.MultiHeadAttention<num_heads=2>(qb, k, v) ",
        # Queries that are keys.
        "qb = MatMul(x, wq) vb = MatMul(x, wv) "
        "cr = com.microsoft.MultiHeadAttention<num_heads=2>(qb, qb, vb) ",
    ],
    ids=["past", "grouped", "four axes", "one weight for both"],
)
def test_attention_whose_queries_and_keys_stay(body: str):
    header = NEWEST if " Attention<" in body else CONTRIB
    found = found_in(Style(body=body + OUT, header=header))
    assert QK not in found
    assert (VO in found) == ("vb" in body and "single_v" not in body and "past" not in body)


def test_pairs_without_rows_between_are_not_taken():
    body = "h = MatMul(x, wq) t = Add(h, bq) u = MatMul(t, wo) y = Add(u, bo)"
    assert found_in(Style(body=body)) == []


ROTARY = """
    {0}1, {0}2 = Split<axis=3>({0}z, halves) {0}n = Neg({0}2) {0}t = Concat<axis=3>({0}n, {0}1)
    {0}c = Mul({0}z, cos) {0}s = Mul({0}t, sin) {1} = Add({0}c, {0}s)
"""


def rotary() -> str:
    turned = (
        ROTARY.format("q", "q").replace(", halves", "")
        + ROTARY.format("k", "kz2").replace(", halves", "")
        + "k = Transpose<perm=[0,1,3,2]>(kz2)"
    )
    split = SPLIT.format("split_0").replace(" q = ", " qz = ").replace(" k = ", " kz = ")
    split = split.replace("perm=[0,2,3,1]", "perm=[0,2,1,3]")
    attend = ATTEND.replace("s = MatMul", "sc = MatMul").replace("Mul(s,", "Mul(sc,")
    return SEPARATE + split + turned + attend + MERGE.format("merge_0") + OUT


NOT_ALL = {
    "a bias behind attention": Style(
        body=PLAIN.replace("vb = Add(vm, bv)", "vb = Identity(vm)").replace(
            "o = MatMul(cr", "ch = Add(cr, bv) o = MatMul(ch"
        ),
        found=(QK,),
    ),
    "rotary embedding": Style(body=rotary(), found=(VO,)),
    "a norm on queries": Style(
        body=PLAIN.replace(
            "s = MatMul(q, k)", "qn = LayerNormalization<axis=-1>(q, gain) s = MatMul(qn, k)"
        ),
        found=(VO,),
    ),
    "queries are an output": Style(
        body=PLAIN.replace("qb", "z"), found=(VO,), signature=TWO_OUTPUTS.format(f"n,{T},{ALL}")
    ),
    "queries of heads are an output": Style(
        body=PLAIN.replace("(q, k)", "(z, k)").replace(" q = ", " z = "),
        found=(VO,),
        signature=TWO_OUTPUTS.format(f"n,{H},{T},{N}"),
    ),
    "a context is an output": Style(
        body=PLAIN.replace("cr", "z"), found=(QK,), signature=TWO_OUTPUTS.format(f"n,{T},{ALL}")
    ),
    "queries have a second reader": Style(
        body=PLAIN + " z = Neg(qb)", found=(VO,), signature=TWO_OUTPUTS.format(f"n,{T},{ALL}")
    ),
    "queries and keys share a weight": Style(body=PLAIN.replace("wk", "wq"), found=(VO,)),
    "a weight has another reader": Style(
        body=PLAIN + " z = ReduceSum<keepdims=1>(wq)",
        found=(VO,),
        signature=TWO_OUTPUTS.format("1,1"),
    ),
    "queries are curved": Style(
        body=PLAIN.replace("s = MatMul(q, k)", "qt = Tanh(q) s = MatMul(qt, k)"), found=(VO,)
    ),
    "features are scaled each": Style(
        body=PLAIN.replace("s = MatMul(q, k)", "qt = Mul(q, gain) s = MatMul(qt, k)"), found=(VO,)
    ),
    "values are curved": Style(
        body=PLAIN.replace("o = MatMul(cr", "ch = Tanh(cr) o = MatMul(ch"), found=(QK,)
    ),
    "a residual of the context": Style(
        body=PLAIN.replace("o = MatMul(cr", "ch = Add(cr, qb) o = MatMul(ch"), found=()
    ),
}


@pytest.mark.parametrize("name", NOT_ALL)
def test_features_that_something_mixes_stay(name: str):
    style = NOT_ALL[name]
    proto = style.proto()
    onnx.checker.check_model(proto, full_check=True)
    for batch in (1, 2):
        assert found_in(style, batch) == sorted(style.found, key=sorted)


# Bounds that are computed in another type than shapes have; and a cut within a head.
NOT_STATED = {
    "type": "ms = Shape(mb) mw = Gather(ms, a2) mi = Cast<to=6>(mw) mt = Add(mi, two_) "
    "one = Div(mt, three_) two = Mul(one, two_) all = Mul(one, three_) qb = Slice(mb, zero_, one, "
    "two_) kb = Slice(mb, one, two, two_) vb = Slice(mb, two, all, two_) ",
    "place": "qb = Slice(mb, a0, c1, a2) kb = Slice(mb, c1, c2, a2) ve = Slice(mb, c2, c3, a2) "
    "ho = Slice(ve, a0, half, a2) hu = Slice(ve, half, c1, a2) vb = Concat<axis=2>(hu, ho) ",
}


@pytest.mark.parametrize("why", NOT_STATED)
def test_slices_that_cannot_be_stated_anew_are_left(why: str):
    body = "m = MatMul(x, w) mb = Add(m, b) " + NOT_STATED[why] + SPLIT.format("split_0") + ATTEND
    style = Style(body=body + MERGE.format("merge_0") + OUT)
    proto = style.proto()
    for value, name in ((0, "zero_"), (2, "two_"), (3, "three_")):
        if name in style.body:
            held = numpy_helper.from_array(np.array([value], np.int32), name)
            proto.graph.initializer.append(held)
    run(proto, style.feed(2))
    assert hidden_of(proto, style.feed(2))[2] == []


def test_one_constant_may_be_a_bound_and_the_axis():
    style = Style(
        body="m = MatMul(x, w2) l = Slice(m, a0, a2, a2) r = Slice(m, a2, four, a2) "
        "k = Transpose<perm=[0,2,1]>(r) s = MatMul(l, k) p = Softmax(s) y = MatMul(p, x)"
    )
    proto = style.proto()
    for name, value in (("w2", noise(30, D, 4).astype(np.float32)), ("four", np.array([4]))):
        proto.graph.initializer.append(numpy_helper.from_array(value, name))
    graph, sites, (hidden,) = hidden_of(proto, style.feed(1))
    assert hidden.size == 2
    bases = bases_of(hidden, 1, 50)
    store = rewrite(graph, [], [shrinking(graph, sites, hidden, bases)])
    onnx.checker.check_model(store.proto, full_check=True)
    expected = projected(graph, sites, [(hidden, bases)])
    assert_close(run(store, style.feed(3))["y"], run(expected, style.feed(3))["y"])
    site = sites["w2"]
    change = hidden_cost(graph, hidden, sites, 1) + hidden.rows("w2", site.m, 1) * site.d
    assert count_parameters(store) - count_parameters(graph.store) == change - site.parameters


@pytest.mark.parametrize(
    "product", ["t = Transpose<perm=[0,2,1]>(m) c = MatMul(t, z)", "c = MatMul(z, m)"]
)
@pytest.mark.parametrize("vector", ["z = ReduceMean<axes=[0,2], keepdims=0>(x)", "z = Neg(line)"])
def test_products_with_a_vector_have_no_heads(product: str, vector: str):
    proto = model(
        f"(float[n,{T},{D}] x) => (float[n,{D}] y)",
        f"m = MatMul(x, wv) {vector} {product} y = MatMul(c, wo)",
        wv=noise(2, D, ALL).astype(np.float32),
        wo=noise(3, ALL, D).astype(np.float32),
        line=noise(4, T).astype(np.float32),
    )
    feed = {"x": noise(5, 3, T, D).astype(np.float32)}
    run(proto, feed)
    assert all(h.units for h in hidden_of(proto, feed)[2])


@pytest.mark.parametrize("first", ["Conv", "MatMul"])
def test_conv_of_several_taps_reads_no_features(first: str):
    body = f"h = {first}(x, V) i = Identity(h) y = Conv(i, W)"
    proto = model(
        "(float[n,6,7,8] x) => (float[n,4,o,p] y)",
        body,
        V=noise(1, *((6, 6, 3, 3) if first == "Conv" else (8, 5))).astype(np.float32),
        W=noise(2, 4, 6, 3, 3).astype(np.float32),
    )
    _, sites, hidden = hidden_of(proto, {"x": noise(3, 1, 6, 7, 8).astype(np.float32)})
    assert set(sites) == {"V", "W"}
    assert all(h.units for h in hidden)


def test_sizes_of_a_split_that_are_an_attribute_are_not_restated():
    body = FEATURES_STYLES["features split in equal parts"].body
    style = Style(
        body=body.replace("<axis=2>(mb)", f"<axis=2, split=[{ALL}, {ALL}, {ALL}]>(mb)"), found=()
    )
    proto = style.proto()
    proto.opset_import[0].version = 11
    onnx.checker.check_model(proto, full_check=True)
    assert hidden_of(proto, style.feed(2))[2] == []
    config = CompressConfig(param_ratio=0.7)
    result = compress(proto, {"x": noise(3, 40, T, D).astype(np.float32)}, config)
    onnx.checker.check_model(result.model, full_check=True)
    assert not result.plan.hidden


def test_values_without_rows_are_not_followed():
    for name in ("matmul", "gemm"):
        _, _, hidden = hidden_of(STYLES[name].proto(), {"x": np.zeros((0, T, D), np.float32)})
        assert hidden == []


# --- shrinking ----------------------------------------------------------------------------------


def bases_of(hidden: Hidden, kept: int, seed: int) -> list[Basis]:
    """Random orthonormal directions, none of them of length 1, so that K is not L^T."""
    made = {}
    for k, part in enumerate(dict.fromkeys(g.made for g in hidden.groups)):
        q, _ = np.linalg.qr(noise(seed + k, hidden.size, hidden.size))
        scale = np.linspace(0.8, 1.3, kept)
        made[part] = Basis(expand=q[:, :kept] * scale, reduce=(q[:, :kept] / scale).T)
    return [made[g.made] for g in hidden.groups]


def projected(
    graph: GraphIndex,
    sites: dict[str, Site],
    what: Sequence[tuple[Hidden, list[Basis]]],
    factors: Mapping[str, Factors] | None = None,
) -> onnx.ModelProto:
    """The model with L K multiplied into weights and biases of those that make features.

    Of weights that are factored too, into their product.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.store.proto)
    held = {t.name: t for t in proto.graph.initializer}

    def put(name: str, values: np.ndarray) -> None:
        old = numpy_helper.to_array(held[name])
        held[name].CopyFrom(
            numpy_helper.from_array(values.reshape(old.shape).astype(old.dtype), name)
        )

    for hidden, bases in what:
        turns = {key: np.eye(sites[key].m) for key in hidden.sites}
        for group, basis in zip(hidden.groups, bases, strict=True):
            rows = slice(group.made.start, group.made.start + hidden.size)
            turns[group.made.site][rows, rows] = basis.expand @ basis.reduce
        for key, turn in turns.items():
            (use,) = sites[key].uses
            kind, old = site_kind(sites[key].op_type), numpy_helper.to_array(held[use.weight])
            matrix = site_matrix(graph, sites[key])
            if factors and key in factors:
                matrix = factors[key].product
            put(use.weight, kind.stored(use, old, turn @ matrix))
            if use.bias.kind == "input":
                put(use.bias.name, turn @ numpy_helper.to_array(held[use.bias.name]).ravel())
        for vector in hidden.vectors:
            line = numpy_helper.to_array(held[vector.name]).ravel()
            pieces = [
                turns[part.site][part.start : part.start + hidden.size]
                @ np.pad(
                    line[k * hidden.size : (k + 1) * hidden.size],
                    (part.start, sites[part.site].m - part.start - hidden.size),
                )
                for k, part in enumerate(vector.parts)
            ]
            put(vector.name, np.concatenate(pieces))
    return proto


def cut(graph: GraphIndex, sites: Sequence[Site], rank: int) -> dict[str, Factors]:
    """The weights of some sites, of a rank that shrinking leaves them."""
    return {
        s.key: plain_svd(site_matrix(graph, s)).factors(site_matrix(graph, s), rank) for s in sites
    }


def shrinking(
    graph: GraphIndex,
    sites: dict[str, Site],
    hidden: Hidden,
    bases: list[Basis],
    factors: Mapping[str, Factors] | None = None,
) -> Shrinking:
    own = {key: sites[key] for key in hidden.sites}
    factors = {key: f for key, f in (factors or {}).items() if key in own}
    weights = {key: site_matrix(graph, site) for key, site in own.items()}
    return Shrinking(
        hidden=hidden,
        sites=own,
        bases=bases,
        weights=weights | {key: pair.product for key, pair in factors.items()},
        factors=factors,
        biases={},
        lost={},
    )


def assert_close(made: np.ndarray, expected: np.ndarray) -> None:
    """Sums of D, N and T products after each other; softmax makes errors of scores relative."""
    size = 4 * math.sqrt(D + ALL + N + T) * (1 + float(np.abs(expected).max()))
    np.testing.assert_allclose(made, expected, rtol=0, atol=8 * EPS * size)


def check_shrunk(
    style: Style, proto: onnx.ModelProto, kept: int, seed: int = 50, rank: int | None = None
) -> None:
    graph, sites, found = hidden_of(proto, style.feed(1))
    assert found
    of_hidden = {key: h for h in found for key in h.sites}
    both = [sites[key] for key, h in of_hidden.items() if rank and can_be_both(h, sites[key])]
    factors = cut(graph, both, rank or 0)
    before = proto.SerializeToString(), graph.store.proto.SerializeToString()
    what = [(h, bases_of(h, kept, seed)) for h in found]
    store = rewrite(graph, [], [shrinking(graph, sites, h, b, factors) for h, b in what])
    assert (proto.SerializeToString(), graph.store.proto.SerializeToString()) == before
    check_contract(graph.store, store)
    onnx.checker.check_model(store.proto, full_check=True)
    expected = projected(graph, sites, what, factors)
    assert count_parameters(store) < count_parameters(graph.store)
    for site in both:
        hidden = of_hidden[site.key]
        rows, columns = hidden.rows(site.key, site.m, kept), hidden.columns(site.key, site.d, kept)
        sizes = [math.prod(t.dims) for t in store.proto.graph.initializer]
        assert {rank * rows, rank * columns} <= set(sizes)
    for batch in style.batches:
        feed = style.feed(batch)
        assert_close(run(store, feed)["y"], run(expected, feed)["y"])
        assert np.abs(run(expected, feed)["y"] - run(proto, feed)["y"]).max() > 1e-3


@pytest.mark.parametrize("kept", [3, 2, 1])
@pytest.mark.parametrize("name", STYLES | SHARED_STYLES)
def test_shrunk_model_is_the_projected_one(name: str, kept: int):
    style = (STYLES | SHARED_STYLES)[name]
    check_shrunk(style, style.proto(), kept)


@pytest.mark.parametrize("name", STYLES | SHARED_STYLES)
def test_what_is_left_may_be_of_low_rank_too(name: str):
    style = (STYLES | SHARED_STYLES)[name]
    check_shrunk(style, style.proto(), 2, rank=3)


@pytest.mark.parametrize("name", FEATURES_STYLES)
def test_fused_features_shrink_if_they_are_found(name: str):
    style = FEATURES_STYLES[name]
    if found_in(style):
        check_shrunk(style, style.proto(), 2)


@pytest.mark.parametrize("name", STYLES | SHARED_STYLES)
def test_shapes_that_a_model_declares_of_its_values_do_not_lie(name: str):
    """Exporters write down the shape of every value."""
    style = (STYLES | SHARED_STYLES)[name]
    declared = onnx.shape_inference.infer_shapes(style.proto())
    assert declared.graph.value_info or name == "packed attention"  # of which nothing is known
    check_shrunk(style, declared, 2)


@pytest.mark.parametrize("kept", [3, 2, 1])
@pytest.mark.parametrize("name", STYLES | SHARED_STYLES | SLICED_STYLES)
def test_cost_is_what_the_model_stores(name: str, kept: int):
    style = (STYLES | SHARED_STYLES | SLICED_STYLES)[name]
    graph, sites, found = hidden_of(style.proto(), style.feed(1))
    for hidden in found:
        what = shrinking(graph, sites, hidden, bases_of(hidden, kept, 50))
        takes = {k: s.m for k, s in what.sites.items() if s.bias in ("input", "add")}
        lost = {key: np.ones(m) for key, m in takes.items() if hidden.rows(key, m, kept) == m}
        store = rewrite(graph, [], [replace(what, lost=lost)])
        change = hidden_cost(graph, hidden, sites, kept)
        for key in hidden.sites:
            site = sites[key]
            change += hidden.rows(key, site.m, kept) * hidden.columns(key, site.d, kept)
            change -= site.parameters
        assert count_parameters(store) - count_parameters(graph.store) == change


@pytest.mark.parametrize("shared", [False, True])
def test_cost_counts_the_sizes_of_a_split(shared: bool):
    style = FEATURES_STYLES["features split by sizes"]
    if shared:  # the old sizes stay for another reader
        outputs = f"(float[n,{T},{D}] y, int64[3] z)"
        signature = f"(float[n,{T},{D}] x) => {outputs}"
        style = replace(style, body=style.body + " z = Neg(thirds)", signature=signature)
    graph, sites, (hidden,) = hidden_of(style.proto(), style.feed(1))
    assert hidden.splits
    for kept in (3, 1):
        store = rewrite(graph, [], [shrinking(graph, sites, hidden, bases_of(hidden, kept, 50))])
        assert ("thirds" in {t.name for t in store.proto.graph.initializer}) == shared
        change = hidden_cost(graph, hidden, sites, kept)
        for key in hidden.sites:
            site = sites[key]
            rows, columns = hidden.rows(key, site.m, kept), hidden.columns(key, site.d, kept)
            change += rows * columns - site.parameters
        # The reader has its bias in the Add behind it, which keeps its size.
        assert count_parameters(store) - count_parameters(graph.store) == change


def test_lost_mean_goes_into_the_bias_of_the_reader():
    for name in ("gemm", "matmul", "stacked, split"):
        style = STYLES[name]
        graph, sites, found = hidden_of(style.proto(), style.feed(1))
        (hidden,) = (h for h in found if "wo" in h.sites)
        what = shrinking(graph, sites, hidden, bases_of(hidden, 2, 50))
        lost = noise(70, D)
        plain, moved = (rewrite(graph, [], [w]) for w in (what, replace(what, lost={"wo": lost})))
        feed = style.feed(3)
        assert_close(run(moved, feed)["y"], run(plain, feed)["y"] + lost.astype(np.float32))
        assert count_parameters(moved) == count_parameters(plain)


@pytest.mark.parametrize("name", STYLES)
def test_both_sides_of_a_feature_are_of_one_size(name: str):
    """However the basis was scaled: half precision and training want weights of like size."""
    style = STYLES[name]
    graph, sites, found = hidden_of(style.proto(), style.feed(1))
    for hidden in found:
        bases = bases_of(hidden, 2, 50)
        scaled = [
            Basis(expand=b.expand / np.array([1e4, 1e-3]), reduce=b.reduce * [[1e4], [1e-3]])
            for b in bases
        ]
        plain, again = (
            rewrite(graph, [], [shrinking(graph, sites, hidden, each)]) for each in (bases, scaled)
        )
        for one, other in zip(plain.tensors(), again.tensors(), strict=True):
            values = plain.array(one)
            np.testing.assert_allclose(again.array(other), values, rtol=8 * EPS, atol=8 * EPS)
        after = index(plain.proto)
        small, _ = find_sites(after)
        matrices = {s.weight.removesuffix("/shrunk"): site_matrix(after, s) for s in small}
        group = hidden.groups[0]
        made = matrices[group.made.site][group.made.start // hidden.size * 2 :][:2]
        met = matrices[group.met.site]
        met = met if group.met.side == "rows" else met.T
        met = met[group.met.start // hidden.size * 2 :][:2]
        norms = np.linalg.norm(made, axis=1), np.linalg.norm(met, axis=1)
        np.testing.assert_allclose(*norms, rtol=(D + ALL) * EPS)


@pytest.mark.parametrize("name", SHARED_STYLES)
def test_makers_are_of_the_size_of_all_that_meets_their_features(name: str):
    style = SHARED_STYLES[name]
    graph, sites, found = hidden_of(style.proto(), style.feed(1))
    for hidden in found:
        what = shrinking(graph, sites, hidden, bases_of(hidden, 2, 50))
        after = index(rewrite(graph, [], [what]).proto)
        small, _ = find_sites(after)
        matrices = {s.weight.removesuffix("/shrunk"): site_matrix(after, s) for s in small}

        def squares(part: Part, matrices: dict[str, np.ndarray] = matrices) -> np.ndarray:
            matrix = matrices[part.site] if part.side == "rows" else matrices[part.site].T
            start = part.start // N * 2  # 2 of N features are kept
            return np.square(matrix[start : start + 2]).sum(1)

        for part in hidden.made:
            met = sum(squares(g.met) for g in hidden.groups if g.made == part)
            np.testing.assert_allclose(squares(part), met, rtol=2 * (D + ALL) * EPS)


def test_new_biases_of_makers_are_taken_into_the_new_basis():
    for name in ("gemm", "matmul"):
        style = STYLES[name]
        graph, sites, found = hidden_of(style.proto(), style.feed(1))
        (hidden,) = (h for h in found if "wv" in h.sites)
        bases = bases_of(hidden, 2, 50)
        fresh = noise(71, ALL)
        what = replace(shrinking(graph, sites, hidden, bases), biases={"wv": fresh})
        changed = style.proto()
        (held,) = (t for t in changed.graph.initializer if t.name == "bv")
        held.CopyFrom(numpy_helper.from_array(fresh.astype(np.float32), "bv"))
        expected = projected(index(changed), sites, [(hidden, bases)])
        feed = style.feed(3)
        assert_close(run(rewrite(graph, [], [what]), feed)["y"], run(expected, feed)["y"])


# --- bundles ------------------------------------------------------------------------------------

JOINT = Style(body=PLAIN)
GRAPH, SITES, FOUND = hidden_of(JOINT.proto(), JOINT.feed(1))


def measured(site: Site, errors: np.ndarray) -> TwoSidedSite:
    heads = Heads(
        groups=(),
        gammas=(),
        found=None,  # type: ignore[arg-type]
        errors=errors,
        seen=errors,
        mean=np.zeros(site.m),
        behind=np.zeros(site.m),
    )
    return TwoSidedSite(
        site=site,
        moment=SecondMoment.zero(1),
        found=None,  # type: ignore[arg-type]
        gamma=np.eye(1),
        errors=errors,
        seen=errors,
        bias_cost=0,
        heads=heads,
    )


@st.composite
def offers(draw: st.DrawFn) -> list[Choice]:
    """Moves of all sites, and what shrinking loses at each rank."""
    choices = []
    for site in SITES.values():
        count = draw(st.integers(0, 5))
        numbers = st.tuples(st.integers(1, 95), st.floats(0, 10))
        moves = [Move(rank=None, bias=False, parameters=96, error=0.0, cost=96.0)]
        moves += [
            Move(rank=1, bias=False, parameters=cost, error=error, cost=float(cost))
            for cost, error in draw(st.lists(numbers, min_size=count, max_size=count))
        ]
        falling = np.sort(draw(st.lists(st.floats(0, 5), min_size=9, max_size=9)))[::-1]
        choices.append(Choice(measured=measured(site, falling), moves=tuple(moves)))
    return choices


def shrunk(each: Hidden, choice: Choice, kept: int, *, ranks: bool = False) -> list[Move]:
    del ranks
    site = choice.measured.site
    cost = each.rows(site.key, site.m, kept) * each.columns(site.key, site.d, kept)
    return [
        Move(rank=None, bias=False, parameters=cost, error=0.0, cost=float(cost), kind="shrink")
    ]


def factored_too(each: Hidden, choice: Choice, kept: int, *, ranks: bool = True) -> list[Move]:
    assert ranks  # so few sizes are all looked at
    """What shrinks, or of what is left a rank."""
    (alone,) = shrunk(each, choice, kept)
    some = range(1, 1 + kept % 3)
    return [alone, *(replace(alone, rank=r, cost=alone.cost * r / 4, error=0.3**r) for r in some)]


def priced(moves: Sequence, price: float) -> float:
    return min(m.error + price * m.cost for m in moves)


@law
@given(choices=offers(), price=st.floats(0, 5))
def test_bundles_hold_what_every_price_picks(choices, price):
    """The best combination at a price is an option; no option is worse than what it stands for."""
    bundles = bundled(choices, FOUND, shrunk, 1)
    assert sorted(k for b in bundles for k in b.members) == list(range(len(choices)))
    for bundle in bundles:
        apart = sum(priced(choices[k].moves, price) for k in bundle.members)
        own = [o for o in bundle.moves if o.kept is None]
        assert priced(own, price) == pytest.approx(apart, rel=1e-12, abs=1e-12)
        for option in bundle.moves:
            assert len(option.moves) == len(bundle.members)
            assert option.cost == pytest.approx(sum(m.cost for m in option.moves))
            if option.kept is None:
                assert option.error == pytest.approx(sum(m.error for m in option.moves))
                for move, k in zip(option.moves, bundle.members, strict=True):
                    assert move in choices[k].moves
        if bundle.hidden is not None:
            kept = [o for o in bundle.moves if o.kept is not None]
            assert [o.kept for o in kept] == list(range(1, N))
            for option in kept:
                makers = [choices[k].measured for k in bundle.members]
                makers = [m for m in makers if bundle.hidden.makers(m.site.key)]
                errors = [m.heads.errors[option.kept * H] for m in makers]
                assert option.error == pytest.approx(sum(errors))


@law
@given(choices=offers(), price=st.floats(0, 5))
def test_bundles_hold_what_may_be_done_to_what_is_left(choices, price):
    for bundle in bundled(choices, FOUND, factored_too, 1):
        hidden, own = bundle.hidden, [choices[k] for k in bundle.members]
        if hidden is None:
            continue
        ways = [sum(priced(c.moves, price) for c in own)]
        lost = {k: sum(c.measured.shrunk_error(hidden, k) for c in own) for k in range(1, N)}
        for kept, error in lost.items():
            offered = [factored_too(hidden, c, kept) for c in own]
            ways.append(error + sum(priced(moves, price) for moves in offered))
        assert priced(bundle.moves, price) == pytest.approx(min(ways), rel=1e-12, abs=1e-12)
        for option in bundle.moves:
            assert option.cost == pytest.approx(sum(m.cost for m in option.moves))
            error = sum(m.error for m in option.moves) + lost.get(option.kept, 0.0)
            assert option.error == pytest.approx(error)


@law
@given(choices=offers(), share=st.floats(0, 1))
def test_allocation_keeps_the_budget(choices, share):
    bundles = bundled(choices, FOUND, shrunk, 1)
    least = sum(min(o.cost for o in b.moves) for b in bundles)
    most = sum(max(o.cost for o in b.moves) for b in bundles)
    budget = least + share * (most - least)
    taken = allocate(bundles, budget)
    assert sum(o.cost for o in taken) <= budget
    assert allocate(bundles, least - 1e-6) is None
    # What lies under the hull cannot be had; a step of the hull may be more than what is left.
    prices = [*np.geomspace(1e-4, 1e3, 60), 0.0]
    bound = max(sum(priced(b.moves, p) for b in bundles) - p * budget for p in prices)
    assert sum(o.error for o in taken) >= bound - 1e-9


@law
@given(choices=offers(), share=st.floats(0, 1))
def test_no_budget_is_worse_off_on_the_hull(choices, share):
    """Lagrange's bound of bundles is no higher than that of sites by themselves."""
    bundles = bundled(choices, FOUND, shrunk, 1)
    for price in np.geomspace(1e-3, 1e2, 12):
        together = sum(priced(b.moves, price) for b in bundles)
        apart = sum(priced(c.moves, price) for c in choices)
        assert together <= apart * (1 + 1e-12) + 1e-12
    del share


@law
@given(seed=SEEDS, share=st.floats(0.1, 1))
def test_bundles_lose_no_more_where_errors_are_convex(seed, share):
    """As those of a spectrum are: but for the last step, sites by themselves do no better."""
    rng = np.random.default_rng(seed)
    choices = []
    for site in SITES.values():
        tails = np.append(np.cumsum(np.sort(rng.exponential(size=8))), 0.0)
        falling = np.append(np.cumsum(np.sort(rng.exponential(size=8)))[::-1], 0.0)
        moves = [Move(rank=None, bias=False, parameters=96, error=0.0, cost=96.0)]
        for rank in range(1, 5):
            lost = float(falling[rank])
            moves.append(Move(rank=rank, bias=False, parameters=0, error=lost, cost=20.0 * rank))
        choices.append(Choice(measured=measured(site, np.sort(tails)[::-1]), moves=tuple(moves)))
    bundles = bundled(choices, FOUND, shrunk, 1)
    least = sum(min(m.cost for m in c.moves) for c in choices)
    budget = least + share * (4 * 96 - least)
    step = max(
        a.error - b.error
        for c in choices
        for a, b in itertools.pairwise(sorted(c.moves, key=lambda m: m.cost))
    )
    together = sum(o.error for o in allocate(bundles, budget))
    apart = sum(m.error for m in allocate(choices, budget))
    assert together <= apart + 2 * step


@pytest.mark.parametrize("multiple", [1, 2, 3, 4, 5])
def test_features_are_kept_in_multiples(multiple: int):
    moves = (Move(rank=None, bias=False, parameters=96, error=0.0, cost=96.0),)
    choices = [Choice(measured=measured(s, np.zeros(9)), moves=moves) for s in SITES.values()]
    for bundle in bundled(choices, FOUND, shrunk, multiple):
        kept = [o.kept for o in bundle.moves if o.kept is not None]
        assert kept == list(range(multiple, N, multiple))


def test_features_of_a_weight_that_was_not_measured_stay():
    sites = [s for s in SITES.values() if s.key != "wk"]
    moves = (Move(rank=None, bias=False, parameters=96, error=0.0, cost=96.0),)
    choices = [Choice(measured=measured(s, np.zeros(9)), moves=moves) for s in sites]
    bundles = bundled(choices, FOUND, shrunk, 1)
    assert [set(b.hidden.sites) for b in bundles if b.hidden is not None] == [VO]


# --- decompositions by groups -------------------------------------------------------------------


def spread(rng: np.random.Generator, m: int) -> np.ndarray:
    rows = rng.normal(size=(5 * m, m)) * rng.uniform(0.1, 2, m)
    return rows.T @ rows / len(rows)


@law
@given(seed=SEEDS, n=st.integers(1, 5), count=st.integers(1, 4), others=st.integers(0, 3))
def test_groups_are_decomposed_each(seed, n, count, others):
    rng = np.random.default_rng(seed)
    m = n * count + others
    gamma, second = spread(rng, m), spread(rng, m)
    starts = rng.permutation(count) * n + others
    groups = [slice(int(s), int(s) + n) for s in starts]
    found = grouped([gamma[rows, rows] for rows in groups], second, groups)
    assert found.errors.shape == (n * count + 1,)
    assert (np.diff(found.errors) <= 0).all()
    assert found.errors[-1] == 0
    assert found.errors[0] == pytest.approx(found.energy)
    identity = np.zeros((m, m))
    for rows in groups:
        identity[rows, rows] = np.eye(n)
    cond = max(np.linalg.cond(gamma[rows, rows]) for rows in groups)
    atol = 1e-12 * cond
    np.testing.assert_allclose(found.expand @ found.reduce, identity, rtol=0, atol=atol)
    for kept in range(n + 1):
        turn = found.expand[:, : kept * count] @ found.reduce[: kept * count]
        lost = 0.0
        for rows in groups:
            rest = np.eye(n) - turn[rows, rows]
            lost += float(np.trace(rest.T @ gamma[rows, rows] @ rest @ second[rows, rows]))
            assert np.linalg.matrix_rank(turn[rows, rows], tol=1e-9 * cond) == kept
            turn[rows, rows] = 0
        assert not turn.any()  # nothing outside of the groups
        expected = found.errors[kept * count]
        assert lost == pytest.approx(expected, rel=1e-9 * cond, abs=1e-12 * cond * found.energy)


@law
@given(seed=SEEDS, m=st.integers(1, 6))
def test_one_group_of_all_is_the_optimum(seed, m):
    rng = np.random.default_rng(seed)
    gamma = spread(rng, m)
    rows = rng.normal(size=(8 * m, m)) + rng.normal(size=m)
    moment = SecondMoment.of(rows)
    for centred in (True, False):
        second = moment.covariance if centred else moment.uncentred
        found = grouped([gamma], second, [slice(0, m)])
        best: Decomposition = optimal(np.eye(m), Metric.of(gamma), outputs=moment, centred=centred)
        np.testing.assert_allclose(found.errors, best.errors, atol=1e-10 * best.energy)
        # By the product: signs of directions are free.
        np.testing.assert_allclose(
            found.expand @ found.reduce, best.expand @ best.reduce, atol=1e-8
        )
        gaps = -np.diff(np.append(-np.diff(best.errors), 0.0))
        for rank in range(1, m):
            if gaps[rank - 1] > 1e-6 * best.energy:
                one, other = (f.expand[:, :rank] @ f.reduce[:rank] for f in (found, best))
                atol = 1e-6 * np.linalg.cond(gamma)
                np.testing.assert_allclose(one, other, rtol=0, atol=atol)


# --- end to end ---------------------------------------------------------------------------------


def data() -> Feed:
    """Positions that differ, in few directions more than in others."""
    x = noise(30, 240, T, D) * 0.8 ** np.arange(D) + 0.3
    return {"x": x.astype(np.float32)}


REPLAY = CompressConfig(moves=("shrink",))


E2E = ["matmul", "gemm", "stacked, split", "no bias", "biases behind a Reshape"]


@pytest.fixture(scope="module", params=E2E)
def made(request):
    style = STYLES[request.param]
    proto = style.proto()
    config = CompressConfig(param_ratio=0.75, moves=("shrink",))
    return proto, config, compress(proto, data(), config)


def test_ratio_is_met_and_counted(made):
    proto, config, result = made
    plan = result.plan
    assert plan.shrunk
    assert not plan.factored
    assert plan.param_ratio <= config.param_ratio
    stored = sum(value.size for value in constants(result.model).values())
    assert plan.parameters_after == stored
    assert plan.parameters_before == sum(value.size for value in constants(proto).values())
    shapes = {tuple(t.dims) for t in result.model.graph.initializer if len(t.dims) == 2}
    assert shapes != {tuple(t.dims) for t in proto.graph.initializer if len(t.dims) == 2}


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize(
    "name", ["repeated by Expand", "met by broadcasting", "two weights read a context"]
)
def test_loss_where_several_meet_features_is_foreseen(name: str, refit: bool):
    data = {"x": 0.3 + noise(9, 200, T, D).astype(np.float32)}
    config = CompressConfig(param_ratio=0.7, moves=("shrink",), refit=refit)
    result = compress(SHARED_STYLES[name].proto(), data, config)
    assert len(result.plan.shrunk) == 2
    assert result.plan.param_ratio <= 0.7
    assert 0.4 < result.plan.predicted_divergence / result.quality.divergence.mean < 2.5


def test_predicted_divergence_is_about_the_measured_one(made):
    _, _, result = made
    measured_loss = result.quality.divergence.mean
    assert 0.4 < result.plan.predicted_divergence / measured_loss < 2.5
    assert result.plan.predicted_divergence == pytest.approx(
        sum(h.predicted_error for h in result.plan.hidden)
    )


SCALED_VALUES = {
    "attention": PLAIN.replace(
        "p = Softmax<axis=-1>(t)", "ps = Softmax<axis=-1>(t) p = Mul(ps, scale)"
    ),
    "values": PLAIN.replace("MatMul(p, v)", "MatMul(p, vs)").replace(
        "s = MatMul(q, k)", "s = MatMul(q, k) vs = Mul(v, scale)"
    ),
    "context": PLAIN.replace("c = MatMul(p, v)", "cs = MatMul(p, v) c = Mul(cs, scale)"),
}


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("name", SCALED_VALUES)
def test_mean_that_is_scaled_on_its_way_is_made_up_for(name: str, refit: bool):
    config = CompressConfig(param_ratio=0.75, moves=("shrink",), refit=refit)
    result = compress(Style(body=SCALED_VALUES[name]).proto(), data(), config)
    assert VO in [set(h.sites) for h in result.plan.shrunk]
    assert result.quality.divergence.mean < 3 * result.plan.predicted_divergence


def test_plan_is_replayed(made, tmp_path):
    proto, _, result = made
    result.plan.save(tmp_path / "plan.json")
    plan = RankPlan.load(tmp_path / "plan.json")
    assert plan == result.plan
    again = compress(proto, data(), REPLAY, plan=plan)
    assert again.model.SerializeToString() == result.model.SerializeToString()


@pytest.mark.parametrize(
    "changes", [{"hidden": "w0"}, {"size": N + 1}, {"sites": ("wq", "wv")}, {"kept": N - 1}]
)
def test_plans_for_other_features_are_refused(made, changes):
    proto, _, result = made
    plan = result.plan
    hidden = tuple(replace(h, **changes) if h.kept is not None else h for h in plan.hidden)
    other = replace(plan, hidden=hidden)
    if changes == {"kept": N - 1}:  # what can be edited
        found = compress(proto, data(), replace(REPLAY, force=True), plan=other)
        assert all(h.kept == N - 1 for h in found.plan.shrunk)
        return
    with pytest.raises(ModelError, match="which the model does not have that way"):
        compress(proto, data(), REPLAY, plan=other)


def test_plans_that_contradict_themselves_are_refused(made):
    proto, _, result = made
    plan = result.plan
    (first, *_) = plan.shrunk
    factored = tuple(
        replace(e, rank=2, move="pivot", bias=False) if e.site == first.sites[0] else e
        for e in plan.entries
    )
    key = first.sites[-1]
    full = next(min(e.m, e.d) for e in plan.entries if e.site == key)
    unlike = [
        tuple(replace(e, **change) if e.site == key else e for e in plan.entries)
        for change in (
            {"rank": full, "move": "low-rank", "bias": True},  # more than is left
            {"rank": 1, "move": "low-rank", "bias": False},  # its mean would be lost
        )
    ]
    wrong = [
        *(replace(plan, entries=entries) for entries in unlike),
        replace(plan, entries=factored),  # what shrinks may be of low rank too, and no more
        replace(plan, hidden=(*plan.hidden, replace(first, kept=1 + first.kept % (N - 1)))),
        replace(plan, method="one-sided", refit=False),  # which knows of no hidden features
    ]
    for plan in wrong:
        with pytest.raises(UtilrankError):
            compress(proto, data(), CompressConfig(force=True), plan=plan)


def test_moves_of_a_replay_are_those_of_its_plan(made):
    proto, _, result = made
    again = compress(proto, data(), CompressConfig(moves=("low-rank",)), plan=result.plan)
    assert again.model.SerializeToString() == result.model.SerializeToString()


def test_weights_may_be_constant_nodes():
    for style in STYLES.values():
        proto = style.proto()
        moved = onnx.ModelProto()
        moved.CopyFrom(proto)
        nodes = [
            onnx.helper.make_node("Constant", [], [t.name], value=t)
            for t in proto.graph.initializer
        ]
        del moved.graph.node[:], moved.graph.initializer[:]
        moved.graph.node.extend([*nodes, *proto.graph.node])
        made = []
        for each in (proto, moved):
            graph, sites, found = hidden_of(each, style.feed(1))
            what = [shrinking(graph, sites, h, bases_of(h, 2, 50)) for h in found]
            made.append(rewrite(graph, [], what))
        check_contract(graph.store, made[1])
        feed = style.feed(style.batches[-1])
        assert_close(run(made[1], feed)["y"], run(made[0], feed)["y"])
        assert count_parameters(made[1]) == count_parameters(made[0])


def test_least_ratio_of_shrinking_is_told():
    config = CompressConfig(param_ratio=0.05, moves=("shrink",))
    with pytest.raises(TargetMissedError, match="cannot be reached"):
        compress(STYLES["matmul"].proto(), data(), config)


@pytest.mark.parametrize(("name", "ratio"), [("size_ratio", 0.9), ("flop_ratio", 0.6)])
def test_bytes_and_operations_are_met_by_shrinking(name: str, ratio: float):
    proto = STYLES["matmul"].proto()
    result = compress(proto, data(), CompressConfig(moves=("shrink",), **{name: ratio}))
    assert result.plan.shrunk
    figures = result.validation
    field = {"size_ratio": "file_bytes", "flop_ratio": "flops"}[name]
    assert getattr(figures.candidate, field) <= ratio * getattr(figures.reference, field)


def test_operations_between_features_are_spent():
    """Queries meet keys, and weights values, in products that take half of all operations."""
    width, length = 32, 64
    weights = {
        name: (noise(k, width, width) / math.sqrt(width)).astype(np.float32)
        for k, name in enumerate(("wq", "wk", "wv", "wo"))
    }
    proto = model(
        f"(float[n,{length},{width}] x) => (float[n,{length},{width}] y)",
        "q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) t = Transpose<perm = [0, 2, 1]>(k) "
        "s = MatMul(q, t) p = Softmax<axis = -1>(s) c = MatMul(p, v) y = MatMul(c, wo)",
        **weights,
    )
    feed = {"x": noise(9, 40, length, width).astype(np.float32)}
    config = CompressConfig(flop_ratio=0.6, moves=("shrink",))
    figures = compress(proto, feed, config).validation
    kept = figures.candidate.flops / figures.reference.flops
    # A feature less between one pair of weights is 1/32 of half of all.
    assert 0.6 - 1 / 64 - 0.005 < kept <= 0.6


def test_other_methods_do_not_shrink():
    proto = STYLES["matmul"].proto()
    result = compress(
        proto, data(), CompressConfig(param_ratio=0.9, method="one-sided", force=True)
    )
    assert result.plan.hidden == ()
