"""Attacks on weightregions.cost: against what a study really does, against torch and
transformers, and by arithmetic."""

import json
import math
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForSequenceClassification

from weightregions.bases import tiny_base
from weightregions.corpora import load_corpora
from weightregions.finetuning import Recipe
from weightregions.cost import (
    DEVICES,
    KEYS,
    SHAPES,
    STAGES,
    Device,
    Outline,
    Planned,
    ModelShape,
    Stage,
    checkpoint_bytes,
    main_zoo,
    measure_device,
    outline_of,
    outlines,
    plan_of,
    plan_text,
    run_cost,
    model_shape,
    sub_samples,
    the_starts,
    the_walks,
    this_device,
    visits,
)
from weightregions.registry import hub_names, hub_sizes
from weightregions.scales import SCALES, choose
from weightregions.walks import TraversalBudget, PathSpec
from weightregions.building import build_zoo


def outline(name="lamps", family="topic", train=1000, test=200, tokens=20.0):
    return Outline(name, family, range(train), range(test), tokens)


def planned(scale="tiny", n=4, **sizes):
    "A plan for some made-up datasets of two families."
    scale = SCALES[scale] if isinstance(scale, str) else scale
    return Planned(
        scale,
        SHAPES["tiny"],
        {f"d{i}": outline(f"d{i}", "topic" if i % 2 else "nli", **sizes) for i in range(n)},
        False,
    )


# The model and the machine


@settings(max_examples=12)
@given(
    layers=st.integers(1, 4),
    width=st.integers(1, 4),
    inner=st.integers(1, 200),
    vocab=st.integers(10, 500),
    rows=st.integers(1, 3),
    tokens=st.integers(2, 60),
    kind=st.sampled_from(["bert", "roberta"]),
)
def test_weights_and_operations_are_those_of_the_real_model(
    layers, width, inner, vocab, rows, tokens, kind
):
    shape = ModelShape(layers, 8 * width, inner, vocab, 70, 2)
    config = AutoConfig.for_model(
        kind,
        **{KEYS[k]: v for k, v in vars(shape).items()},
        num_attention_heads=2,
        num_labels=2,
        pad_token_id=1,
    )
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == shape.weights + 2 * (shape.hidden + 1)
    with FlopCounterMode(display=False) as counter:
        model.base_model(torch.zeros(rows, tokens, dtype=torch.long, device="meta"))
    pooler = 2 * rows * shape.hidden**2 if kind == "bert" else 0
    assert counter.get_total_flops() == pytest.approx(rows * shape.forward(tokens) + pooler)


def test_training_takes_three_times_the_forward_pass_and_bitfit_two():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "roberta",
        num_hidden_layers=4,
        hidden_size=64,
        intermediate_size=256,
        vocab_size=100,
        num_attention_heads=4,
        max_position_embeddings=80,
        type_vocab_size=1,
    )
    shape = ModelShape(4, 64, 256, 100, 80, 1)
    model = AutoModelForSequenceClassification.from_config(config)
    for trains, passes in (("all", 3), ("bitfit", 2)):
        for name, p in model.named_parameters():
            p.requires_grad = (
                trains == "all" or name.endswith("bias") or name.startswith("classifier")
            )
        with FlopCounterMode(display=False) as counter:
            model(
                torch.full((8, 40), 7), labels=torch.zeros(8, dtype=torch.long)
            ).loss.backward()
        assert counter.get_total_flops() == pytest.approx(
            8 * passes * shape.forward(40), rel=0.05
        )
        assert run_cost(
            shape, outline(test=0, tokens=40), Recipe(steps=1, batch_size=8, trains=trains)
        ).flops == 8 * passes * shape.forward(40)


def test_bad_shapes_and_devices(tmp_path):
    with pytest.raises(
        ValueError,
        match=(
            "its shape is not known; name a folder with a config.json, or one of tiny, minilm,"
            " FacebookAI/roberta-base"
        ),
    ):
        model_shape(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({"num_hidden_layers": 2, "hidden_size": "wide"})
    )
    with pytest.raises(ValueError, match="config.json gives no number for hidden_size"):
        model_shape(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is no JSON object"):
        model_shape(tmp_path)
    for rate in (0, -1, math.nan):
        with pytest.raises(ValueError, match="device x: rate must be positive"):
            Device("x", rate, 1, 0, 0, "")
    with pytest.raises(ValueError, match="device x: start must not be negative"):
        Device("x", 1, 1, 0, math.nan, "")


def test_every_device_says_how_its_figures_are_known():
    assert all(
        d.source.startswith(("measured: ", "stated: ")) and d.name == name
        for name, d in DEVICES.items()
    )


# Stages


@given(
    st.lists(st.tuples(*[st.integers(0, 1000)] * 7), min_size=1, max_size=5), st.integers(0, 9)
)
def test_stages_add_up(parts, times):
    stages = [Stage("a", *part) for part in parts]
    total, core = sum(stages, Stage("all")), DEVICES["core"]
    assert total.name == "all" and total.hours(core) == pytest.approx(
        sum(s.hours(core) for s in stages)
    )
    assert (stages[0] * times).hours(core) == pytest.approx(times * stages[0].hours(core))


def test_a_run_by_hand():
    shape, recipe = SHAPES["tiny"], Recipe(steps=10, batch_size=4, max_length=12)
    stage = run_cost(shape, outline(test=100), recipe, looks=5, n_test=30)
    assert (stage.jobs, stage.models, stage.steps, stage.tokens) == (1, 1, 10, 12 * (40 + 35))
    assert (
        stage.flops == shape.forward(12) * (3 * 40 + 35)
        and stage.traffic == 10 * 40 * shape.weights
    )
    assert (
        stage.bytes == checkpoint_bytes(shape)
        and run_cost(shape, outline(), recipe, writes=False).bytes == 0
    )


@given(st.integers(1, 10**6), st.integers(1, 512), st.integers(1, 20))
def test_epochs_hold_every_row(rows, batch, epochs):
    steps = Recipe(epochs=epochs, batch_size=batch).steps_on(rows)
    assert epochs * rows <= steps * batch < epochs * (rows + batch)
    assert (
        run_cost(
            SHAPES["tiny"], outline(train=rows), Recipe(epochs=epochs, batch_size=batch)
        ).steps
        == steps
    )


def test_patience_costs_looks_and_rows():
    recipe = Recipe(steps=300, batch_size=4, patience=400)
    watched, free = (
        run_cost(SHAPES["tiny"], outline(train=1000), r)
        for r in (recipe, replace(recipe, patience=None))
    )
    assert (
        watched.steps == free.steps == 300 and watched.tokens - free.tokens == 20 * 6 * 100
    )  # 6 looks at a tenth of the rows
    assert run_cost(
        SHAPES["tiny"], outline(train=1000), replace(recipe, steps=150)
    ) == run_cost(
        SHAPES["tiny"], outline(train=1000), replace(recipe, steps=150, patience=None)
    )
    shorter = run_cost(
        SHAPES["tiny"], outline(train=1000), Recipe(epochs=10, batch_size=4, patience=400)
    )
    assert shorter.steps == 10 * 900 / 4
    assert (
        run_cost(
            SHAPES["tiny"], outline(train=1000), Recipe(epochs=10, batch_size=4, rows=40)
        ).steps
        == 100
    )


def test_sub_samples_larger_than_the_data_are_not_planned():
    assert (
        sub_samples(planned(train=70)).models == 2
    )  # the tiny scale: two datasets, sizes 50 and 100
    assert sub_samples(planned(train=101)).models == 4


def test_edges_and_planes_are_counted():
    count = lambda kind, points: visits(PathSpec("w", kind, ("a", "b"), ("t",), points))
    assert [
        count("hull", 16),
        count("line", 3),
        count("edges", 10),
        count("plane", 5),
        count("models", 0),
    ] == [16, 3, 18, 25, 3]


def test_recorded_walks_are_the_planned_ones(request):
    "Rows of the recorded study, kind by kind: what its plan says, from its sizes alone."
    rows = request.config.rootpath / "nbs/study/recorded/rows"
    known = pd.read_csv(rows / "datasets.csv")
    about = json.loads((rows.parent / "about.json").read_text())
    scale = SimpleNamespace(
        **{
            **vars(SCALES["full"]),
            "seeds": about["seeds"],
            "budget": TraversalBudget(**about["reach"]),
        }
    )
    p = Planned(
        scale,
        SHAPES["minilm"],
        {
            d["name"]: outline(d["name"], d["family"], d["n_train"], d["n_test"])
            for d in known.to_dict("records")
        },
        False,
    )
    found = pd.read_csv(rows / "points.csv").query("pooling == pooling[0]")
    assert main_zoo(p).models == len(pd.read_csv(rows / "models.csv").query("zoo == 'main'"))
    assert the_walks(p).jobs == pytest.approx(
        found.groupby(["kind", "walk"]).ngroups, rel=0.1
    )  # the real plan knows what was learned
    each = min(20, 40) * (about["reach"]["n_train"] + about["reach"]["n_test"])
    assert the_walks(p).tokens / each == pytest.approx(len(found), rel=0.1)


def test_starts_by_hand():
    contest = replace(
        SCALES["tiny"].contest,
        targets=2,
        sizes=(50, None),
        seeds=3,
        curve=(60,),
        curve_targets=1,
    )
    p = planned(replace(SCALES["tiny"], contest=contest), train=100, test=40)
    stage = the_starts(p)
    assert stage.jobs == 4 * (2 * 2 * 3 + 1) + 2 and stage.models == 4
    longer = planned(
        replace(SCALES["tiny"], contest=replace(contest, seeds=6)), train=100, test=40
    )
    assert (
        the_starts(longer).steps - stage.steps
        == stage.steps
        - the_starts(
            planned(
                replace(SCALES["tiny"], contest=replace(contest, seeds=0)), train=100, test=40
            )
        ).steps
    )


def test_a_size_that_one_target_lacks_is_not_tried():
    contest = replace(SCALES["tiny"].contest, targets=2, sizes=(50, 400), seeds=1, curve=())
    few, many = (
        the_starts(planned(replace(SCALES["tiny"], contest=contest), train=n)).jobs
        for n in (100, 500)
    )
    assert (few, many) == (2 * 4 + 2, 2 * 2 * 4 + 2)


# The whole


def test_what_is_planned_is_what_is_built(tmp_path):
    "A real zoo: models, steps, bytes."
    scale = replace(
        SCALES["tiny"], seeds=2, n_train=60, n_test=20, recipe=Recipe(steps=4, batch_size=4)
    )
    corpora = choose(
        load_corpora("builtin", ["films", "headlines"], n_train=60, n_test=20), None
    )
    base = tiny_base(tmp_path / "base", steps=2)
    build_zoo(tmp_path / "zoo", str(base), corpora, scale.recipe, [1, 2], 1)
    row = plan_of(scale, corpora, stages=[main_zoo]).loc["fine-tuning"]
    written = list((tmp_path / "zoo").glob("*/seed-*"))
    assert row.models == row.jobs == len(written) and row.steps == 4 * len(written)
    assert row.bytes == pytest.approx(
        sum(f.stat().st_size for folder in written for f in folder.iterdir()), rel=0.05
    )
    assert model_shape(base) == SHAPES["tiny"]


def test_outlines_agree_with_the_corpora():
    scale = SCALES["tiny"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a test row that is a training row too
        corpora = load_corpora("builtin", n_train=scale.n_train, n_test=scale.n_test)
    guessed = outlines("builtin", scale)
    assert list(guessed) == list(corpora)
    for name, corpus in corpora.items():
        exact = outline_of(corpus, scale.recipe.max_length)
        assert (guessed[name].train, guessed[name].test, guessed[name].family) == (
            exact.train,
            exact.test,
            exact.family,
        )
        assert (
            guessed[name].tokens == pytest.approx(exact.tokens, rel=0.2)
            and exact.tokens <= scale.recipe.max_length
        )


@pytest.mark.parametrize("scale", SCALES)
def test_plans_of_every_scale_need_no_download(scale, monkeypatch):
    import datasets

    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("a plan may load nothing")
    )
    for data in ("hub", "builtin"):
        table = plan_of(scale, data)
        assert (
            len(table) == len(STAGES) + 1
            and (table >= 0).all(axis=None)
            and table.attrs["scale"] == scale
        )
        for column in table:
            assert table[column].iloc[:-1].sum() == pytest.approx(table.loc["all", column])
        assert (
            table.loc["datasets", "bytes"] > 0
            if data == "hub"
            else table.loc["datasets", "bytes"] == 0
        )
        text = plan_text(table, 2)
        assert (
            all(stage in text for stage in table.index)
            and text.endswith(f"with 2 of them about {table.hours['all'] / 2:.2f} hours")
            and f"({data})" in text
        )


def test_the_paper_scale_has_the_groups_recipe_and_data():
    r = SCALES["paper"].recipe
    assert (
        r.learning_rate,
        r.batch_size,
        r.weight_decay,
        r.max_length,
        r.epochs,
        r.patience,
        r.looks,
    ) == (5e-5, 256, 0.01, 250, 10, 256_000, 20)
    assert {name: s.data for name, s in SCALES.items()} == {
        "tiny": "builtin",
        "laptop": "builtin",
        "full": "builtin",
        "paper": "hub",
        "lora": "builtin",
    }
    steps = [
        r.steps_on(n - len(r.held(n)))
        for n in (hub_sizes(name)["train"] for name in hub_names())
    ]
    assert plan_of("paper", stages=[main_zoo]).loc["fine-tuning", "steps"] == 5 * sum(steps)
    text = plan_text(plan_of("paper"))
    assert (
        "(hub)" in text
        and "10 epochs in steps of 256 rows, or until 256,000 rows bring no gain" in text
        and "10 epochs in steps of 32 rows, or until 8,000 rows" in plan_text(plan_of("full"))
    )


@pytest.mark.parametrize("epochs, stopped", [(9, False), (11, True)])
def test_what_is_planned_is_what_is_trained(tmp_path, epochs, stopped):
    "Steps of the plan and of the manifests; a plan does not count on an early end."
    corpora = load_corpora("builtin", ["films", "meals"], n_train=60, n_test=20)
    scale = replace(
        SCALES["tiny"],
        seeds=1,
        recipe=Recipe(
            epochs=epochs, batch_size=4, learning_rate=1e-9, head_rate=1e-9, patience=400
        ),
    )
    build_zoo(
        tmp_path / "zoo",
        str(tiny_base(tmp_path / "base", steps=2)),
        corpora,
        scale.recipe,
        [1],
        1,
    )
    trained = [
        json.loads(f.read_text())["metrics"]["steps"]
        for f in sorted((tmp_path / "zoo").glob("*/seed-1/manifest.json"))
    ]
    held = len(scale.recipe.held(60))
    assert (held, trained) == ((6, [150, 150]) if stopped else (0, [9 * 15] * 2))
    assert plan_of(scale, corpora, stages=[main_zoo]).loc[
        "fine-tuning", "steps"
    ] == 2 * epochs * math.ceil((60 - held) / 4)


def test_this_machine_is_timed():
    device = this_device(SCALES["tiny"])
    assert (
        device.rate > 0
        and device.source.startswith("measured: ")
        and (device.name == "core" or torch.cuda.is_available())
    )


def test_a_faster_device_is_faster_and_a_larger_base_dearer(tmp_path):
    slow, fast = (plan_of("full", "hub", device=d).loc["all"] for d in ("core", "H100"))
    assert fast.hours < slow.hours and fast.drop("hours").equals(slow.drop("hours"))
    config = {
        key: getattr(SHAPES["FacebookAI/roberta-base"], name) for name, key in KEYS.items()
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert plan_of("full", "hub", base=tmp_path).loc["all", "bytes"] > 4 * slow.bytes


def test_defaults_suit_the_scale():
    for scale, data, device in (("tiny", "builtin", "core"), ("paper", "hub", "H100")):
        about = plan_of(scale, stages=[main_zoo]).attrs
        assert (about["data"], about["device"]) == (data, device)


def test_bad_questions(tmp_path):
    with pytest.raises(
        ValueError, match="no scale 'weekend': there are tiny, laptop, full, paper"
    ):
        plan_of("weekend")
    with pytest.raises(ValueError, match="no device 'abacus': there are core"):
        plan_of(device="abacus")
    with pytest.raises(ValueError, match="dataset stsb: left out of the registry"):
        plan_of(names=["mnli", "stsb"])
    with pytest.raises(ValueError, match="at least one device is needed, not 0"):
        plan_text(plan_of(stages=[main_zoo]), 0)
    with pytest.raises(ValueError, match="a study needs at least two datasets"):
        plan_of(names="mnli")
    with pytest.raises(ValueError, match="a study needs at least two datasets"):
        plan_of(min_rows=10**9)
    with pytest.raises(ValueError, match="no dataset 'b': there are a"):
        plan_of(data={"a": outline("a")}, names=["b"])
    with pytest.raises(FileNotFoundError, match="neither 'builtin' nor 'hub' nor a folder"):
        plan_of(data=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="3 steps are too few to be timed"):
        measure_device("tiny", None, Recipe(steps=3))
