"""The avatars' classes, and a training of a few steps on pictures made here: none of it needs dicebear."""

import json

import pytest
import torch

from amskv_kernels.schedule import ScaleSchedule
from examples.avatars import attributes, data, model, train


def noise(count, seed=0):
    """As many "avatars" of random pixels and attributes."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, data.SIDE, data.SIDE), generator=rng, dtype=torch.uint8)
    columns = [torch.randint(len(values), (count,), generator=rng) for values in attributes.ATTRIBUTES.values()]
    return data.Avatars(images, torch.stack(columns, 1))


def test_classes_and_attributes_are_each_others_inverse():
    classes = torch.arange(attributes.NUM_CLASSES)
    asked = attributes.asked_of(classes)
    assert attributes.class_of(asked).equal(classes)
    assert [int(column.max()) + 1 for column in asked.T] == [len(values) for values in attributes.ASKED.values()]


def test_every_body_and_colour_is_known_from_other_pairs():
    pairs = attributes.HELD_OUT
    for side, values in zip(
        zip(*pairs, strict=True), (attributes.ASKED["body"], attributes.ASKED["colour"]), strict=True
    ):
        assert sorted(side) == list(range(len(values)))
    for held_out in (False, True):
        asked = attributes.asked_of(attributes.some_classes(300, 5, held_out))
        assert attributes.is_held_out(asked).tolist() == [held_out] * 300
        assert {tuple(pair) for pair in asked[:, :2].tolist()}.isdisjoint(pairs) is not held_out


def test_the_exported_table_is_the_sum_that_was_trained():
    embedding = model.SummedEmbedding(8)
    torch.nn.init.normal_(embedding.nothing)
    table = embedding.table()
    labels = torch.tensor([0, 5, attributes.NUM_CLASSES - 1, attributes.NUM_CLASSES])
    assert table.weight.shape == (attributes.NUM_CLASSES + 1, 8)
    assert table(labels).equal(embedding(labels)) and table(labels[-1]).equal(embedding.nothing)
    parts = [
        part.weight[column] for part, column in zip(embedding.parts, attributes.asked_of(labels[1:2])[0], strict=True)
    ]
    assert torch.allclose(table(labels[1]), sum(parts))


def test_the_training_runs_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "avatars", lambda part, count, *_: noise(count))
    train.main(["--quick", "--out", str(tmp_path)])
    var, vae = model.load(weights=tmp_path)
    assert var.config.schedule == vae.config.schedule == ScaleSchedule.named("var-256")
    assert var.config.depth >= 12 and var.config.head_dim == 64
    log = json.loads((tmp_path / "training.json").read_text(encoding="utf-8"))
    assert log["steps"] == {"vqvae": log["plan"]["vae_steps"], "var": log["plan"]["var_steps"]}
    train.main(["--quick", "--out", str(tmp_path)])  # finished: goes on from the last checkpoint and changes nothing
    for name, value in model.load(weights=tmp_path)[0].state_dict().items():
        assert value.equal(var.state_dict()[name]), name


def test_avatars_are_what_they_say(tmp_path):
    """Two that differ in colour alone differ in pixels; the generator sees no held-out pair."""
    pytest.importorskip("dicebear")
    pytest.importorskip("resvg_py")
    pixels, values = data.draw(3)
    again, same = data.draw(3)
    assert (pixels == again).all() and values == same
    ours = data.avatars("generator", 30, tmp_path)
    assert ours.images.shape == (30, 3, 64, 64) and not attributes.is_held_out(ours.values[:, :4]).any()
    corner = torch.tensor([[int(v[i : i + 2], 16) for i in (1, 3, 5)] for v in attributes.ATTRIBUTES["background"]])
    assert ours.images[:, :, 0, 0].equal(corner[ours.values[:, 4]].to(torch.uint8))


def test_what_ships_is_small_and_of_the_size_it_says():
    files = list(model.WEIGHTS.glob("*.safetensors"))
    assert len(files) == 3 and sum(file.stat().st_size for file in files) <= 20e6
    var, vae = model.load()
    assert var.config.depth >= 12 and var.config.head_dim == 64 and var.config.schedule.total == 680
    assert vae.config.patch * vae.config.schedule.sizes[-1][0] == data.SIDE
    assert len(var.class_emb.weight) == attributes.NUM_CLASSES + 1
