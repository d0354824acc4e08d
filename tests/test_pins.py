"""Bytes that must not move: a small zoo, its products, its centre, its paths and the recorded claims.

Weights are whole numbers of twelve bits over 2**14. Products and differences of those are exact in
`float64`, in whatever order a processor adds them up, so that their bytes are the same everywhere.
Where `float32` rounds (a point at 0.3), the reference is `torch.lerp` itself, in the same process:
processors with and without fused multiply-add round that otherwise.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import RobertaConfig, RobertaForSequenceClassification

from weightregions.centering import Centroid, centroid, save_centroid
from weightregions.checkpoints import open_checkpoint, write_checkpoint
from weightregions.region import locate, region_of
from weightregions.results import Study
from weightregions.similarity import cross_similarity, gram, sketch
from weightregions.space import kind_of, layer_of
from weightregions.traversal import (
    ScratchModel,
    average,
    hull,
    line,
    load_in_memory,
    plane,
    ray,
    save_point,
)

RECORDED = Path(__file__).resolve().parent.parent / "nbs" / "study" / "recorded"


def classifier(seed):
    "A tiny RoBERTa whose weights are whole numbers over 2**14, the same on every machine."
    sizes = dict(num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    config = RobertaConfig(vocab_size=97, hidden_size=24, max_position_embeddings=20, **sizes)
    model = RobertaForSequenceClassification(config)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            p.copy_(torch.from_numpy(rng.integers(-2048, 2048, tuple(p.shape)) / 2**14))
    return model.eval()


def moved(base, seed):
    "A state dict: the base, moved by whole numbers of seven bits over 2**14."
    rng = np.random.default_rng([1, seed])
    return {
        n: t + torch.from_numpy(rng.integers(-64, 64, tuple(t.shape)) / 2**14).float()
        for n, t in base.tensors()
    }


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    "Folder, base and four models of it, all of them read from files."
    here = tmp_path_factory.mktemp("zoo")
    live = open_checkpoint(classifier(0), name="base")
    base = open_checkpoint(write_checkpoint(live.state(), live, here / "base"))
    for seed in range(4):
        write_checkpoint(moved(base, seed), live, here / f"m{seed}")
    return here, base, [open_checkpoint(here / f"m{seed}") for seed in range(4)]


def digest(*parts):
    "The first sixteen digits of a hash of bytes, texts, arrays and tensors."
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            part = part.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        if isinstance(part, np.ndarray):
            part = np.ascontiguousarray(part).tobytes()
        sha.update(part.encode() if isinstance(part, str) else part)
    return sha.hexdigest()[:16]


def digest_of_folder(folder):
    "One hash of a checkpoint's files; the version of transformers in its configuration aside."
    parts = []
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        if file.name == "config.json":
            about = json.loads(data)
            about.pop("transformers_version")
            data = json.dumps(about).encode()
        parts += [file.name, data]
    return digest(*parts)


def body(weights):
    "The bytes of all tensors of a body."
    return digest(*(weights[n] for n in weights.layout.names))


def test_a_written_model_has_the_same_bytes(zoo):
    here, base, models = zoo
    assert PINS["models"] == [digest_of_folder(here / n) for n in ("base", "m0", "m3")]
    assert PINS["sha256"] == [c.sha256()[:16] for c in (base, models[0])]
    bare = write_checkpoint(models[1].state(), models[1], here / "bare", head="drop")
    assert PINS["bare"] == digest_of_folder(bare)


def test_products_and_cosines_have_the_same_bytes(zoo):
    _, base, models = zoo
    found = gram(models, base, by=lambda n: (layer_of(n), kind_of(n)), progress=False)
    assert PINS["gram"] == digest(repr(list(found.cells)), *found.cells.values())
    tables = found.cosine(), found.cosine_raw(), found.euclidean()
    assert PINS["cosines"] == [digest(t.to_numpy()) for t in tables]
    small = gram(models, base, progress=False, block=100, threads=3).products()
    assert digest(small) == digest(gram(models, base, progress=False).products())
    grown = gram(models[:2], base, progress=False).extended(
        models[2:], models[:2], base, progress=False
    )
    assert digest(grown.products()) == digest(small)
    cross = cross_similarity(models[:2], models[1:], base, progress=False)
    assert PINS["cross"] == digest(cross.round(12).to_csv())
    projected = sketch(models, base, 256, progress=False)
    assert PINS["sketch"] == digest(projected.values, projected.norms)


def test_a_centroid_has_the_same_bytes(zoo):
    here, base, models = zoo
    three, mean = models[:3], centroid(models[:3])
    assert PINS["centroid"] == digest(*(mean[n] for n in base.layout.names))
    folder = centroid(three, out=here / "centre", weights=[1, 2, 4], block=100, threads=2)
    assert PINS["written centroid"] == digest_of_folder(folder)
    half = centroid(three, out=here / "half", dtype=torch.bfloat16, like=base)
    assert PINS["half"] == digest_of_folder(half)
    shares = np.array([0.25, 0.25, 0.5])
    saved = save_centroid(Centroid("of three", three, shares), here / "saved", like=base)
    assert PINS["saved centroid"] == digest_of_folder(saved)


def test_points_of_paths_have_the_same_bytes(zoo):
    here, base, (a, b, c, d) = zoo
    on_line = {p.coordinates["alpha"]: p for _, p in line(a, b, [-0.5, 0, 0.25, 0.5, 1, 3])}
    assert PINS["line"] == [body(p) for p in on_line.values()]
    assert PINS["ray"] == [body(p) for _, p in ray(base, c, [0.5, 2])]
    assert PINS["average"] == body(average([a, b, c, d]))
    scratch = ScratchModel(base)
    for point in (on_line[0.25], average([a, b, c, d])):
        scratch.load(point)
        assert body(point) == digest(*(scratch.body[n] for n in point.layout.names))
    folder = save_point(on_line[0.25], here / "point", head="average")
    assert PINS["point"] == digest_of_folder(folder)
    assert load_in_memory(on_line[0.25]).sha256()[:16] == PINS["point in memory"]


def test_points_where_float32_rounds_are_torchs_own(zoo):
    _, base, (a, b, c, d) = zoo
    for (_, point), alpha in zip(line(a, b, [0.3, 0.7]), (0.3, 0.7)):
        near, far, share = (a, b, alpha) if alpha < 0.5 else (b, a, 1 - alpha)
        for name in base.layout.names:
            assert torch.equal(point[name], torch.lerp(near[name], far[name], share))
    for coordinates, point in hull([a, b, c], 3, seed=5):
        weights = list(coordinates.values())
        first, second, third = sorted(range(3), key=lambda i: -weights[i])
        for name in base.layout.names:
            t = [m[name] for m in (a, b, c)]
            made = torch.lerp(t[first], t[second], weights[second])
            made.add_(t[third] - t[first], alpha=weights[third])
            assert torch.equal(point[name], made)


def test_a_plane_has_the_same_points(zoo):
    _, base, (a, b, c, d) = zoo
    whole = plane(a, b, c, 3)
    places = [(point.name, point.weights) for _, point in whole]
    assert PINS["plane"] == digest(repr(places))
    assert PINS["marks"] == digest(whole.marks({"d": d}).round(9).to_csv())
    corner = whole.at(0, 0)
    assert body(corner) == body(average([a]))


def test_a_region_and_its_answers_are_the_same(zoo):
    here, base, models = zoo
    region = region_of(models[:3], base, "three")
    folder = region.save(here / "region")
    assert PINS["region"] == digest((folder / "centre.safetensors").read_bytes())
    assert PINS["located"] == digest(locate(models[3], [region]).round(9).to_csv())


def test_the_recorded_claims_are_the_same():
    "This pin changes with a new recording, with targets of a claim and with its words."
    claims = Study(RECORDED).claims().to_csv(index=False, float_format="%.4g")
    assert claims == (RECORDED / "claims.csv").read_text(encoding="utf-8")
    assert PINS["claims"] == digest(claims)


PINS = {
    "models": ["1393f50a1a682019", "dc7e68a56088e639", "82d2d82b971caebb"],
    "sha256": ["7b214f7a40e8260c", "ec18cad0f14a23b3"],
    "bare": "ead67545d16ba711",
    "gram": "98fd38a5c015137c",
    "cosines": ["4091ab1c7c4ae4cf", "9315b03d2eb90088", "ab84f918dfc21713"],
    "cross": "9cfc39563925e835",
    "sketch": "ec6042f48789c1d5",
    "centroid": "5c23fbfae6a59934",
    "written centroid": "f964a8d7ec13bd92",
    "half": "230e54e1c08c66b2",
    "saved centroid": "06213212ab626253",
    "line": [
        "cef46da5230173cc",
        "9fe75e1302bac31e",
        "d79447ee698d2948",
        "4aa6e530c04ea083",
        "ba4c02a2d96ca7e9",
        "3116f974fe4cc612",
    ],
    "ray": ["96a5fe2b3685e564", "6e72198ad6659eae"],
    "average": "70c570cd17bfd54c",
    "point": "7652c1610cb66f60",
    "point in memory": "a2e2a43041d5e3b4",
    "plane": "770ad108a8b2040e",
    "marks": "b7849cb60298bda4",
    "region": "65f86c7fff390f02",
    "located": "4aae92442af95b14",
    "claims": "fa72cb60d4f59e0d",
}
