"""A picture shows the weights that the program multiplies, in its order, and all bytes that it moves, and overlaps
nothing."""

import itertools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh
from PIL import Image

from meshloom.models.config import DecoderConfig, MoEConfig
from meshloom.models.decoder import Decoder
from meshloom.sharding import derive
from meshloom.sharding.flow import Flow, flow
from meshloom.sharding.picture import draw, save_picture
from meshloom.sharding.sketch import Cut, Sketch
from meshloom.sharding.sketch_flow import sketch
from meshloom.sharding.trace import trace
from tests.command_line import run
from tests.sharding import modules, test_vision

SIZES = {"vocab_size": 64, "d_model": 32, "n_layers": 4, "n_heads": 8, "n_kv_heads": 4, "head_dim": 8, "d_ff": 64}
TOKENS = jax.ShapeDtypeStruct((8, 16), jnp.int32)
HIDDEN = jax.ShapeDtypeStruct((8, 16, modules.D), jnp.float32)
IMAGES = jax.ShapeDtypeStruct((8, 16, 16, 3), jnp.float32)
DENSE = DecoderConfig(**SIZES, scan_layers=True)
CONFIG = DecoderConfig(**SIZES, moe=MoEConfig(4, 2, 32), scan_layers=True)
CASES = {
    "experts": (lambda: Decoder(CONFIG, rngs=nnx.Rngs(0)), TOKENS, ("fsdp", "expert")),
    "tokens": (lambda: Decoder(DENSE, rngs=nnx.Rngs(0)), TOKENS, ("fsdp", "context")),
    "vision": (test_vision.VisionTransformer, IMAGES, ("fsdp", "tensor")),
    "residual network": (test_vision.ResidualNetwork, IMAGES, ("fsdp", "tensor")),
    "latent attention": (modules.LatentAttention, HIDDEN, ("fsdp", "tensor")),
    "reused names": (modules.ReusedNames, TOKENS, ("fsdp", "tensor")),
    "no residual": (modules.DeepMLP, jax.ShapeDtypeStruct((8, 6, 64), jnp.float32), ("fsdp", "tensor")),
}


def flow_of(case: str) -> Flow:
    make, example, axes = CASES[case]
    module = nnx.eval_shape(make)
    mesh = AbstractMesh((4, 2), axes)
    return flow(trace(module, (example,)), derive(module, mesh, example))


@pytest.fixture(scope="module")
def flows():
    return {case: flow_of(case) for case in CASES}


def order(shown: Sketch) -> list[tuple[str, int, list[list[str]]]]:
    """Title, repeats and weights by column of every branch."""
    return [
        (branch.title, frame.repeats, [[weight.name for weight in column.weights] for column in branch.columns])
        for frame in shown.frames
        for branch in frame.branches
    ]


def weight(shown: Sketch, name: str):
    columns = (column for frame in shown.frames for branch in frame.branches for column in branch.columns)
    return next(each for column in columns for each in column.weights if each.name == name)


# -- what is shown --


def test_a_scanned_decoder_is_one_layer_between_embedding_and_unembedding(flows):
    assert order(sketch(flows["experts"])) == [
        ("embedding", 1, [["embed"]]),
        ("attention", 4, [["attention.q", "attention.k", "attention.v"], ["attention.out"]]),
        ("experts", 4, [["mlp.router"], ["mlp.gate", "mlp.up"], ["mlp.down"]]),
        ("unembedding", 1, [["embed"]]),
    ]


def test_equal_layers_that_are_not_scanned_are_shown_once(flows):
    shown = order(sketch(flows["vision"]))
    assert [(title, repeats) for title, repeats, _ in shown] == [
        ("convolutions", 1),
        ("attention", 2),
        ("MLP", 2),
        ("unembedding", 1),
    ]
    assert shown[1][2] == [["attention.query", "attention.key", "attention.value"], ["attention.out"]]


def test_names_decide_nothing_but_captions(flows):
    """One name closes both branches; what branches are is dataflow's to say."""
    titles = [(title, columns) for title, _, columns in order(sketch(flows["reused names"]))]
    assert titles == [
        ("embedding", [["wte"]]),
        ("attention", [["attn.c_attn"], ["attn.c_proj"]]),
        ("MLP", [["mlp.c_fc"], ["mlp.c_proj"]]),
        ("unembedding", [["wte"]]),
    ]


def test_without_a_residual_stream_it_is_one_chain(flows):
    shown = sketch(flows["no residual"])
    assert shown.stream == ""
    assert [len(column) for _, _, columns in order(shown) for column in columns] == [1, 1, 1, 1]


def test_a_weight_shows_its_sides_by_role_and_its_cuts_by_rule(flows):
    down = weight(sketch(flows["reused names"]), "mlp.c_proj")
    assert (down.down.text, down.down.cuts) == ("residual 32", (Cut("fsdp", 4, "store"),))
    assert (down.across.text, down.across.cuts) == ("inner 64", (Cut("tensor", 2, "pair"),))
    assert (down.down.piece, down.across.piece, down.bytes) == (8, 32, 4 * 8 * 32)
    assert weight(sketch(flows["experts"]), "attention.q").across.text.startswith("8 heads")
    assert weight(sketch(flows["experts"]), "attention.k").across.text.startswith("4 kv heads")
    experts = weight(sketch(flows["experts"]), "mlp.down")
    assert experts.sheets is not None
    assert (experts.sheets.text, experts.sheets.cuts) == ("4 experts", (Cut("expert", 2, "pair"),))


def test_rows_go_to_experts_when_it_is_known_who_wants_them(flows):
    """Beside one another: the router, whose choice it is, gate and up, and down, after which the sums go back."""
    [experts] = [b for frame in sketch(flows["experts"]).frames for b in frame.branches if b.title == "experts"]
    moved = [[(each.collective, each.axes, each.cause) for each in column.moved] for column in experts.columns]
    assert moved == [[("all_gather", ("expert",), "pair")], [], [("reduce_scatter", ("expert",), "pair")]]


def test_what_a_pair_produces_is_split_between_its_weights_and_summed_after_them(flows):
    [mlp] = [b for frame in sketch(flows["reused names"]).frames for b in frame.branches if b.title == "MLP"]
    first, last = mlp.columns
    assert (first.split, first.moved) == (("tensor",), ())
    assert [(each.collective, each.axes, each.cause) for each in last.moved] == [("all_reduce", ("tensor",), "pair")]
    [gathered] = last.weights[0].moved
    assert (gathered.collective, gathered.bytes) == ("all_gather", 4 * 32 * 32)


def test_a_ring_of_keys_and_values_is_shown_between_what_makes_them_and_what_follows(flows):
    shown = sketch(flows["tokens"])
    attention = next(branch for frame in shown.frames for branch in frame.branches if branch.title == "attention")
    first, last = attention.columns
    assert [weight.name for weight in last.weights] == ["attention.out"]
    keys_and_values = 2 * (8 // 4) * (16 // 2) * 4 * 8 * 4
    assert [(each.collective, each.axes, each.bytes) for each in first.moved] == [
        ("collective_permute", ("context",), keys_and_values)
    ]


def test_a_scanned_weight_is_counted_for_one_layer(flows):
    known = flows["experts"]
    row = known.layout.row("layers.scanned.0.attention.q.weight")
    shown = weight(sketch(known), "attention.q")
    assert (shown.bytes, shown.moved[0].bytes) == (row.bytes_per_device / 4, row.bytes_total / 4)


@pytest.mark.parametrize("case", [case for case in CASES if case != "vision"])  # whose positions are in no product
def test_the_bytes_shown_are_all_that_a_forward_pass_moves(case, flows):
    shown = sketch(flows[case])
    total = 0
    for frame in shown.frames:
        for column in (column for branch in frame.branches for column in branch.columns):
            of_weights = [each for one in column.weights for each in one.moved]
            total += frame.repeats * sum(each.bytes for each in (*column.moved, *of_weights))
    assert total == flows[case].total_bytes > 0


def test_what_is_not_drawn_is_named(flows):
    assert sketch(flows["vision"]).others == ("positions",)
    assert sketch(flows["experts"]).vectors == 3


# -- the picture --


@pytest.mark.parametrize("case", CASES)
def test_no_texts_overlap_and_none_leaves_the_picture(case, flows):
    figure = draw(sketch(flows[case]), case)
    renderer = figure.canvas.get_renderer()
    boxes = [(each.get_text(), each.get_window_extent(renderer)) for each in figure.axes[0].texts if each.get_text()]
    width, height = figure.canvas.get_width_height()
    assert len(boxes) > 10
    for text, box in boxes:
        assert 0 <= box.x0 < box.x1 <= width, text
        assert 0 <= box.y0 < box.y1 <= height, text
    for (text, one), (other, two) in itertools.combinations(boxes, 2):
        apart = one.x1 <= two.x0 + 1 or two.x1 <= one.x0 + 1 or one.y1 <= two.y0 + 1 or two.y1 <= one.y0 + 1
        assert apart, (text, other)
    assert width <= 1600


def test_a_picture_is_small_enough_for_a_page(flows, tmp_path):
    save_picture(flows["experts"], tmp_path / "p.png", "experts")
    assert (tmp_path / "p.png").stat().st_size < 150_000
    with Image.open(tmp_path / "p.png") as image:
        assert image.size[0] <= 1600


def test_the_pictures_of_the_docs_are_small_and_made_by_commands_that_are_shown():
    docs = pathlib.Path(__file__).parents[2] / "docs"
    text = (docs / "sharding.md").read_text()
    shown = re.findall(r"!\[[^]]*\]\(images/([^)]*)\)", text)
    assert sorted(shown) == sorted(each.name for each in (docs / "images").iterdir())
    for name in shown:
        assert f"--picture docs/images/{name}" in text
        assert (docs / "images" / name).stat().st_size < 150_000


# -- the command --


def test_plan_draws_and_stays_one_json_object(capsys, tmp_path):
    path = tmp_path / "plan.svg"
    asked = f"plan tiny --devices cpu:8 --picture {path} --explain embed.weight --json"
    status, out, _ = run(capsys, *asked.split())
    assert status == 0
    plan = json.loads(out)
    assert plan["picture"] == str(path)
    assert plan["explanation"].startswith("embed.weight")
    assert b"<svg" in path.read_bytes()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("--picture plan.xyz", "cannot write the picture to plan.xyz: end it in .png"),
        ("--picture /no/plan.png", "there is no folder /no to write to"),
        ("--picture p.png --batch-tokens 4096", "--picture: of a layout, and this is a training plan"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused(asked, message, capsys):
    status, _, err = run(capsys, "plan", "tiny", "--devices", "cpu:8", *asked.split())
    assert status == 2
    assert message in err
