"""The picture of a circuit: its numbers against sums over edges, its places, what files hold, hostile text."""

import builtins
import re
from itertools import combinations
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from circuitsae.cli import main
from circuitsae.graph import AttributionGraph, NodeKind, Supernode
from circuitsae.report import CircuitPicture, circuit_picture
from circuitsae.report.circuit_diagram import Arrow, Box, Diagram, check_columns
from circuitsae.report.circuit_of_heads import ANSWER, Look, heads_picture
from circuitsae.report.circuit_shapes import LOWERS, RAISES, way
from circuitsae.report.lettering import width, wrapped
from tests.sample_graphs import small_graph, whole_graph
from transcoders.errors import InputError

TOKENS = ("<s>", " The", " cat", " sat", " on", " the", " mat")
HOSTILE = ("$x_1$ \\frac{1}{2}", "<script>&\"'", "\x00\u2028\ufffe", "\u202eשלום", "漢字🙂" * 3, "y" * 10_000, "%\\")
VERDICTS = ("confirmed", "reversed", "null", "undecided")


def _tested(tokens: tuple[str, ...] = TOKENS) -> AttributionGraph:
    """A graph of which every third edge was tested."""
    graph = whole_graph(tokens)
    tested = graph.edges_frame()[["source", "target"]].iloc[::3].reset_index(drop=True)
    verdicts = [VERDICTS[row % 4] for row in range(len(tested))]
    return graph.annotate(pd.DataFrame(tested.assign(graph_verdict=verdicts, graph_measured=1.0)))


GROUPS = [Supernode("early and late", ("0.1@1", "2.141@1")), Supernode("$middle$", ("1.74@4", "2.144@4"))]


@pytest.fixture(scope="module")
def graph() -> AttributionGraph:
    return _tested()


@pytest.fixture(scope="module", params=[1, 2], ids=["one column", "two columns"])
def picture(graph: AttributionGraph, request: pytest.FixtureRequest) -> CircuitPicture:
    return circuit_picture(graph, supernodes=GROUPS, columns=request.param)


def members(graph: AttributionGraph, box: Box) -> list[str]:
    """Ids of the nodes that a box stands for."""
    own = {group.name: list(group.members) for group in GROUPS}
    inside = {name for names in own.values() for name in names}
    if box.id.startswith("error@"):
        pos = int(box.id.removeprefix("error@"))
        return [n.id for n in graph.nodes if n.kind is NodeKind.ERROR and n.pos == pos and n.id not in inside]
    return own.get(box.id, [box.id])


def test_every_weight_is_the_sum_of_the_edges_between_two_boxes(graph: AttributionGraph, picture: CircuitPicture):
    edges = {(s, t): w for s, t, w in graph.edges_frame()[["source", "target", "weight"]].itertuples(index=False)}
    boxes = {box.id: members(graph, box) for box in picture.boxes}
    assert {"early and late", "$middle$"} <= boxes.keys()
    assert len(picture.arrows) >= 10
    for arrow in picture.arrows:
        wanted = sum(edges.get((s, t), 0.0) for s in boxes[arrow.source] for t in boxes[arrow.target])
        assert arrow.weight == pytest.approx(wanted, rel=1e-9)


def test_shown_share_is_the_influence_of_the_edges_drawn(graph: AttributionGraph, picture: CircuitPicture):
    importance = np.nan_to_num(graph.influence) + graph.start
    boxes = {box.id: [graph.position[m] for m in members(graph, box)] for box in picture.boxes}
    dense = np.abs(graph.weights.toarray())
    held = sum(
        importance[t] * dense[t, s] / graph.inputs[t]
        for arrow in picture.arrows
        for s in boxes[arrow.source]
        for t in boxes[arrow.target]
    )
    targets = [row for row in np.flatnonzero(graph.inputs > 0) if graph.nodes[row].is_target]
    assert picture.diagram.shown == pytest.approx(held / importance[targets].sum(), rel=1e-9)
    assert f"hold {100 * picture.diagram.shown:.0f} % of the influence" in picture.sentences[2]


def test_marks_count_the_tested_edges_within_an_arrow(graph: AttributionGraph, picture: CircuitPicture):
    notes = graph.edge_notes
    assert notes is not None
    verdicts = {(s, t): v for s, t, v in notes[["source", "target", "graph_verdict"]].itertuples(index=False)}
    boxes = {box.id: members(graph, box) for box in picture.boxes}
    held = tested = 0
    for arrow in picture.arrows:
        found = [verdicts[s, t] for s in boxes[arrow.source] for t in boxes[arrow.target] if (s, t) in verdicts]
        held, tested = held + found.count("confirmed"), tested + len(found)
        assert (arrow.note == "") == (not found)
        if found:
            assert arrow.note[1:] == f"{found.count('confirmed')}/{len(found)}"
            assert found.count(
                {"✓": "confirmed", "⇄": "reversed", "○": "null", "?": "undecided"}[arrow.note[0]]
            ) == max(map(found.count, found))
    assert f"Of {tested} tested edges within the arrows {held} held" in picture.sentences[2]


def test_the_first_sentence_says_shares_of_the_answers_input(graph: AttributionGraph, picture: CircuitPicture):
    answer = graph.position[graph.top_logits()[0].id]
    share = np.abs(graph.weights[[answer]].toarray()[0]) / graph.inputs[answer]
    tokens = share[graph.mask(NodeKind.TOKEN)].sum()
    assert f"{100 * tokens:.0f} % from tokens directly" in picture.sentences[0]
    assert (
        f"{100 * share[graph.mask(NodeKind.ERROR)].sum():.0f} % from what the dictionaries miss" in picture.sentences[0]
    )


def test_nothing_overlaps(picture: CircuitPicture):
    shapes = picture.shapes
    boxes = [one.rectangle for one in shapes.layout.placed]
    for a, b in combinations(boxes, 2):
        assert not (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])
    for left, bottom, right, top in boxes:
        assert left >= -1e-6
        assert right <= shapes.layout.width + 1e-6
        assert 0 <= bottom < top <= shapes.layout.height + 1e-6
    assert len(shapes.labels) == len(picture.arrows)  # every weight has found a place
    down = shapes.height - shapes.layout.height - 3.0
    labels = [
        (x0 - 3, y0 - down, x1 - 3, y1 - down) for x0, y0, x1, y1 in (w.rectangle for w in shapes.labels.values())
    ]
    for a, b in [*combinations(labels, 2), *((a, b) for a in labels for b in boxes)]:
        assert not (a[0] < b[2] - 1e-6 and b[0] < a[2] - 1e-6 and a[1] < b[3] - 1e-6 and b[1] < a[3] - 1e-6)


def test_arrows_run_upward_around_the_boxes(picture: CircuitPicture):
    for route in picture.shapes.layout.routes:
        points = way(route.points)
        for one in picture.shapes.layout.placed:
            left, bottom, right, top = one.rectangle
            inside = (points[:, 0] > left + 0.01) & (points[:, 0] < right - 0.01)
            assert not (inside & (points[:, 1] > bottom + 0.01) & (points[:, 1] < top - 0.01)).any()
    rows = {one.box.id: one.y for one in picture.shapes.layout.placed}
    order = {box.id: box.order for box in picture.boxes}
    for arrow in picture.arrows:
        if order[arrow.source] < order[arrow.target]:
            assert rows[arrow.source] < rows[arrow.target]


def test_arrows_against_the_order_of_layers_point_down():
    boxes = (Box("late", "late", "group", 2.0), Box("early", "early", "group", 1.0), Box("a", "a", "answer", 3.0))
    pairs = (("early", "late"), ("late", "early"), ("late", "a"))
    shapes = CircuitPicture(Diagram(boxes, tuple(Arrow(s, t, 1.0, 0.5) for s, t in pairs))).shapes
    at = {one.box.id: one for one in shapes.layout.placed}
    assert at["early"].y < at["late"].y < at["a"].y
    assert at["early"].rectangle[1] == 0  # no empty row below
    lift = shapes.height - shapes.layout.height - 3.0
    heads = {
        shape.path[0][1][0][1] - lift: shape.path[1][1][0][1] - lift for shape in shapes.outlines if not shape.stroke
    }
    assert heads[at["late"].rectangle[1]] < at["late"].rectangle[1]  # from below
    assert heads[at["early"].rectangle[3]] > at["early"].rectangle[3]  # from above


def drawn_texts(picture: CircuitPicture, kind: str = "svg") -> list[str]:
    root = ElementTree.fromstring(picture.drawn(kind))
    return ["".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")]


def test_files_hold_text_as_text_and_are_the_same_each_time(graph: AttributionGraph, tmp_path):
    picture = circuit_picture(graph, columns=1, boxes=3)
    files = [picture.save(tmp_path / f"circuit.{kind}") for kind in ("svg", "pdf", "png")]
    texts = drawn_texts(picture)
    assert sorted(texts) == sorted(words.text for words in picture.shapes.words)
    svg, pdf, png = (file.read_bytes() for file in files)
    assert svg == picture.drawn("svg")
    assert b"/Type3" not in pdf
    assert b"/CIDFontType2" in pdf or b"/TrueType" in pdf
    assert png.startswith(b"\x89PNG")
    inches = float(re.search(rb'width="([\d.]+)pt"', svg)[1]) / 72  # pyright: ignore[reportOptionalSubscript]
    assert inches == pytest.approx(3.4, abs=0.1)


def test_labels_are_inside_their_boxes_as_drawn(picture: CircuitPicture):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from circuitsae.report.circuit_drawing import _paint

    figure = Figure(figsize=(picture.shapes.width / 72, picture.shapes.height / 72), dpi=72)
    _paint(figure, picture.shapes)
    renderer = FigureCanvasAgg(figure).get_renderer()
    drawn = {}
    for text in figure.axes[0].texts:
        drawn.setdefault(text.get_text(), []).append(text.get_window_extent(renderer))
    down = picture.shapes.height - picture.shapes.layout.height - 3.0
    for one in picture.shapes.layout.placed:
        left, bottom, right, top = one.rectangle
        for line in (*one.title, *one.detail):
            assert any(
                e.x0 >= left + 3 and e.x1 <= right + 3 and e.y0 >= bottom + down - 1 and e.y1 <= top + down + 1
                for e in drawn[line]
            )


def test_hostile_text_is_shown_as_text(tmp_path):
    picture = circuit_picture(_tested(HOSTILE), supernodes=[Supernode("$\\bad{\x00", ("0.1@1",))])
    texts = drawn_texts(picture)
    assert any("$x_1$" in text for text in texts)  # no mathematics
    assert any("$\\bad{\\u0000" in text for text in texts)
    assert "script" not in {node.tag.rpartition("}")[2] for node in ElementTree.fromstring(picture.drawn()).iter()}
    assert not any(character in text for text in texts for character in "\x00\u2028\ufffe\u202e")
    assert max(map(len, texts)) < 200
    assert picture.drawn("pdf").startswith(b"%PDF")
    figure = picture.to_figure().to_json()
    assert figure is not None
    assert "<script" not in figure
    assert "&lt;script&gt;" in figure.replace("\\u003c", "<").replace("\\u0026", "&")


def test_the_figure_draws_what_the_file_draws(graph: AttributionGraph):
    picture, figure = circuit_picture(graph), graph.to_figure(style="circuit")
    assert len(figure.layout.shapes) == len(picture.shapes.outlines)
    assert len(figure.layout.annotations) == len(picture.shapes.words)
    colors = [shape.line.color for shape in figure.layout.shapes]
    assert {RAISES, LOWERS} <= set(colors)
    dashed = {shape.line.color for shape in figure.layout.shapes if shape.line.dash != "solid"}
    assert RAISES not in dashed  # sign by dash too, for those who see no colour


def test_groups_of_a_file_are_drawn(graph: AttributionGraph):
    carried = {"neuronpedia": {"document": {"qParams": {"supernodes": [["a name", "0_1_1", "2_141_1"]]}}}}
    from dataclasses import replace

    held = replace(graph, provenance={**graph.provenance, "carried": carried})
    assert "a name" in [box.title for box in circuit_picture(held).boxes]


def test_small_and_wrong(tmp_path, monkeypatch: pytest.MonkeyPatch):
    tiny = circuit_picture(small_graph())
    assert {box.kind for box in tiny.boxes} == {"token", "feature", "error", "answer"}
    assert [arrow.label for arrow in tiny.arrows if arrow.source == "0.7@1"] == ["+1.00 ✓1/1"]
    with pytest.raises(InputError, match=r"end it in \.svg"):
        tiny.save(tmp_path / "a.gif")
    with pytest.raises(InputError, match="columns=3"):
        check_columns(3)
    with pytest.raises(InputError, match="boxes=0"):
        circuit_picture(small_graph(), boxes=0)
    with pytest.raises(InputError, match=r"with \['columns'\] is no figure"):
        small_graph().to_figure(columns=1)
    with pytest.raises(InputError, match="no box"):
        Diagram((), ())
    box = Box("a", "a", "answer", 0.0)
    with pytest.raises(InputError, match="none of its boxes"):
        Diagram((box,), (Arrow("b", "a", 1.0, 1.0),))
    with pytest.raises(InputError, match="own id"):
        Diagram((box, box), ())
    own = builtins.__import__

    def without(name: str, *rest, **options):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return own(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install 'circuitsae\[pictures\]'"):
        tiny.save(tmp_path / "a.svg")
    assert not list(tmp_path.iterdir())
    assert len(tiny.to_figure().layout.annotations) > 4  # which needs no matplotlib


def test_command(graph: AttributionGraph, tmp_path, capsys: pytest.CaptureFixture[str]):
    graph.save(tmp_path / "g")
    main(["show", str(tmp_path / "g"), "--circuit"])
    assert (tmp_path / "g" / "circuit.svg").read_bytes().startswith(b"<?xml")
    assert "The arrows hold" in capsys.readouterr().out
    names = [str(tmp_path / name) for name in ("a.svg", "b.svg")]
    main(["show", str(tmp_path / "g"), "--columns", "1", "--circuit", *names])
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert not (tmp_path / "g" / "graph.html").exists()
    with pytest.raises(SystemExit, match="2"):
        main(["show", str(tmp_path / "g"), "--circuit", "a.gif"])


def test_many_boxes_and_columns_have_a_place():
    """Heads by role as in Wang et al. 2022, figure 2."""
    roles = {
        "previous token": ("S1+1", 2), "duplicate token": ("S2", 1), "induction": ("S2", 5), "s-inhibition": ("END", 8),
        "name mover": ("END", 9), "negative name mover": ("END", 10), "backup name mover": ("END", 11),
    }  # fmt: skip
    effects = [("previous token", "induction", 0.2, "k"), ("induction", "s-inhibition", 0.3, "v"),
               ("duplicate token", "s-inhibition", 0.1, "v"), ("s-inhibition", "name mover", 0.6, "q"),
               ("s-inhibition", "negative name mover", -0.3, "q"), ("name mover", ANSWER, 0.9, ""),
               ("negative name mover", ANSWER, -0.4, ""), ("backup name mover", ANSWER, 0.1, "")]  # fmt: skip
    diagram = heads_picture(
        {role: [f"a{layer}.h{head}" for head in range(3)] for role, (_, layer) in roles.items()},
        effects,
        positions={role: place for role, (place, _) in roles.items()},
        places={"IO": " Mary", "S1": " John", "S1+1": " went", "S2": " John", "END": " to"},
        looks=[Look("name mover", "IO", 0.59), Look("duplicate token", "S1", 0.8)],
        metric=("logit difference", 3.56),
        last="Third.",
    )
    assert "loses 90 % without “name mover” and 10 % without “backup name mover” and gains 40 %" in diagram.sentences[0]
    assert (
        "“induction” → “s-inhibition” → “name mover” → the answer; its weakest arrow is worth 2" in diagram.sentences[1]
    )
    for columns in (1, 2):
        picture = CircuitPicture(diagram, columns)
        test_nothing_overlaps(picture)
        test_arrows_run_upward_around_the_boxes(picture)
        at = {one.box.id: one.x for one in picture.shapes.layout.placed}
        assert at["place: IO"] < at["place: S1"] < at["place: S1+1"] < at["place: S2"] < at["place: END"]
        assert at["induction"] < at["s-inhibition"]  # columns from left to right


def test_lettering_is_as_wide_as_dejavu_at_least():
    from matplotlib.font_manager import FontProperties, findfont
    from matplotlib.ft2font import FT2Font

    for bold in (False, True):
        font = FT2Font(findfont(FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")))
        font.set_size(100, 72)
        for code in (*range(32, 127), *range(0xA1, 0x180), *map(ord, "→✓⇄○↵−…·–Σб我")):
            if chr(code) != "\xad" and code in font.get_charmap():
                advance = font.load_char(code).linearHoriAdvance / 65536
                assert advance <= width(chr(code), 100.0, bold=bold) * (1.0 + 0.06 * bold) + 1.0, chr(code)
    assert wrapped("one two three", 10.0, 30.0, lines=2) == ["one", "two…"]
    assert all(width(line, 7.0) <= 40 for line in wrapped("x" * 500, 7.0, 40.0, lines=3))
