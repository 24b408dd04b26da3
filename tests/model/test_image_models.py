"""Models that classify images: every method that changes weights trains on them, with no change of its own."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from model_types import move
from PIL import Image
from transformers import AutoConfig, ViTImageProcessorPil

from highrank.base.errors import UserError
from highrank.base.registry import available, load
from highrank.model.adapters import attach
from highrank.model.backbones import DTYPES, empty_model, head_modules, load_backbone
from highrank.model.images import num_patches
from highrank.model.placement import PLACEMENTS, resolve
from highrank.model.tiny import tiny_config, tiny_image_processor
from highrank.model.weights import find_source
from highrank.train.objectives import OBJECTIVES

KIND = "classify_images"
TINY = {"name": "tiny_vit", "dtype": "float32"}
REAL = {"name": "hf:someone/vit", "dtype": "float32"}
OBJECTIVE = OBJECTIVES[KIND]
BATCH = {
    "pixel_values": torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1,
    "labels": torch.tensor([0, 1, 2, 3]),
    "index": torch.arange(4),
}
METHODS = sorted(available("methods"))
OF_TEXTS = ("prompt_tuning", "p_tuning", "prefix")


def built():
    """Returns a tiny model with matrices that are large enough for every part to tell."""
    model = load_backbone(TINY, None, KIND, 4).model
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2, generator=generator)
    return model


def adapted(method, model=None):
    model, cls = built() if model is None else model, load("methods", method)
    views = resolve(model, "all") if cls.family.placed or cls.family.changes_weights else []
    return attach(model, views, cls, cls.config(**cls.examples[0]), heads=head_modules(model))


def logits(model):
    with torch.no_grad():
        return model.eval()(pixel_values=BATCH["pixel_values"]).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder as the Hub has them: a model of five classes and its image processor."""
    folder = tmp_path_factory.mktemp("models") / "vit"
    load_backbone(TINY, None, KIND, 5).model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.4] * 3, image_std=[0.2] * 3).save_pretrained(
        folder
    )
    return folder


# Placement


@pytest.mark.parametrize("placement", [name for name in PLACEMENTS if name not in ("gate", "experts")])
def test_every_placement_finds_query_key_value_and_dense(placement):
    paths = {"q": "attention.q_proj", "k": "attention.k_proj", "v": "attention.v_proj", "o": "attention.o_proj"}
    paths |= {"up": "mlp.fc1", "down": "mlp.fc2"}
    shapes = {"up": (32, 16), "down": (16, 32)}
    views = resolve(empty_model(AutoConfig.for_model(**tiny_config("vit")), KIND, 4), placement)
    parts = [part for part in PLACEMENTS[placement] if part != "gate"]
    assert [(view.layer, view.part, view.path, view.shape) for view in views] == [
        (layer, part, f"vit.layers.{layer}.{paths[part]}", shapes.get(part, (16, 16)))
        for layer in range(2)
        for part in parts
    ]


def test_what_a_model_of_images_has_none_of_is_named():
    with pytest.raises(UserError, match="placement: vit has no part gate, got placement=gate; it has: q, k, v, o, up"):
        resolve(built(), "gate")


@pytest.mark.parametrize("kin", ["beit", "deit", "dinov2", "swin", "vit_msn"])
def test_kin_have_their_parts_too(kin):
    model = empty_model(AutoConfig.for_model(kin, architectures=[]), KIND, 4)
    assert Counter(view.part for view in resolve(model, "all")) == dict.fromkeys(("q", "k", "v", "o", "up", "down"), 12)
    assert head_modules(model) == ["classifier"]


# Methods


@pytest.mark.parametrize("method", [name for name in METHODS if name not in OF_TEXTS])
def test_a_method_learns_acts_and_is_read_again(method, tmp_path):
    adapters = adapted(method)
    model = adapters.model
    move(adapters)  # from where each of its tensors tells
    parameters = [p for p in model.parameters() if p.requires_grad]
    before, _ = OBJECTIVE.loss(model, BATCH)
    gradients = torch.autograd.grad(before, parameters)
    assert all(bool(gradient.isfinite().all()) and bool(gradient.any()) for gradient in gradients)
    slope = sum(float(gradient.square().sum()) for gradient in gradients)
    step = 1e-3 / slope  # a loss that is lower by 1e-3, but for its curvature
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(step * gradient)
    after, num_targets = OBJECTIVE.loss(model, BATCH)
    assert num_targets == 4
    assert float((before - after).detach()) == pytest.approx(1e-3, rel=0.2)
    found = logits(model)
    adapters.save(tmp_path / "adapter")
    again = adapted(method)
    again.load(tmp_path / "adapter")
    assert torch.equal(logits(again.model), found)


@pytest.mark.parametrize("method", [name for name in METHODS if load("methods", name).mergeable])
def test_a_method_is_merged_and_taken_out_again(method):
    model = built()
    base = logits(model)
    adapters = adapted(method, model)
    move(adapters)
    found = logits(model)
    assert not torch.allclose(found, base, atol=1e-3)
    adapters.merge()
    torch.testing.assert_close(logits(model), found, rtol=1e-3, atol=1e-3 * float(found.std()))  # fp32 sums
    if adapters.keeps_base:
        adapters.unmerge()
        assert torch.equal(logits(model), found)


@pytest.mark.parametrize("method", OF_TEXTS)
def test_what_acts_on_tokens_is_refused(method):
    with pytest.raises(UserError, match=rf"^{method}: virtual tokens need a causal language model, got ViTFor"):
        adapted(method)


# What is asked of a model


def test_an_answer_is_a_class_and_the_loss_on_the_right_one():
    model = built()
    found = logits(model)
    nats = F.cross_entropy(found, BATCH["labels"], reduction="none")
    with torch.no_grad():
        answers = OBJECTIVE.answers(model, BATCH, None, {}, 0)
        loss, n = OBJECTIVE.loss(model, BATCH)
    assert [answer for answer, _ in answers] == found.argmax(-1).tolist()
    assert [loss for _, loss in answers] == nats.tolist()
    assert (float(loss), n) == (pytest.approx(float(nats.mean())), 4)
    with torch.no_grad():
        model.classifier.bias[1] = torch.nan
        answers = OBJECTIVE.answers(model, BATCH, None, {}, 0)
    assert [answer for answer, _ in answers] == [-1] * 4
    assert all(loss != loss for _, loss in answers)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pixels_come_in_the_models_dtype(dtype):
    model = load_backbone({**TINY, "dtype": dtype}, None, KIND, 4).model
    with torch.no_grad():
        loss, _ = OBJECTIVE.loss(model, BATCH)
    assert loss.isfinite()


def test_tokens_are_patches():
    assert OBJECTIVE.num_tokens(built(), BATCH) == 4 * 4 * 4
    sizes = {"image_size": [32, 64], "patch_size": [8, 16]}
    assert num_patches(AutoConfig.for_model("vit", **sizes)) == 4 * 4
    assert num_patches(AutoConfig.for_model("vit", image_size=224, patch_size=16)) == 196
    assert num_patches(AutoConfig.for_model("llama")) == 1


# Folders


def test_a_folder_is_read_with_its_own_processor(saved):
    backbone = load_backbone(REAL, str(saved), KIND, 5)
    state = load_backbone(TINY, None, KIND, 5).model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in backbone.model.state_dict().items())
    pixels = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
    found = backbone.tokenizer(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
    right = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - 0.4) / 0.2
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    assert set(backbone.source.files) == {"config.json", "model.safetensors", "preprocessor_config.json"}


def test_other_classes_get_a_new_head_drawn_by_the_seed(saved):
    first, again, other = (load_backbone(REAL, str(saved), KIND, 3, seed).model.state_dict() for seed in (0, 0, 1))
    state = load_backbone(TINY, None, KIND, 5).model.state_dict()
    assert first["classifier.weight"].shape == (3, 16)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        if not name.startswith("classifier"):
            assert torch.equal(tensor, state[name])
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def test_a_folder_that_cannot_be_read_is_refused(saved, tmp_path):
    def copy(name, **changed):
        folder = tmp_path / name
        folder.mkdir()
        for file in saved.iterdir():
            content = file.read_bytes()
            if values := changed.get(file.stem):
                content = json.dumps(json.loads(content) | values).encode()
            (folder / file.name).write_bytes(content)
        return folder

    bare = copy("bare")
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"must hold a readable preprocessor_config\.json, got path=.*bare"):
        load_backbone(REAL, str(bare), KIND, 5)
    unlike = copy("unlike", preprocessor_config={"size": {"height": 16, "width": 16}})
    with pytest.raises(UserError, match=r"must take what its image processor gives, got model_type=vit .*fits its"):
        load_backbone(REAL, str(unlike), KIND, 5)
    grey = copy("grey", config={"num_channels": 1})
    with pytest.raises(UserError, match=r"three colours, got num_channels=1 in config\.json of a vit"):
        load_backbone(REAL, str(grey), KIND, 5)
    assert find_source(REAL, str(unlike)).files != find_source(REAL, str(saved)).files


@pytest.mark.parametrize(
    ("config", "kind", "said"),
    [
        (
            {"model_type": "llama"},
            KIND,
            "a task of images needs a model that classifies images, got llama; try model=tiny",
        ),
        ({"model_type": "vit"}, "generate", "a task of texts needs a model of texts, got vit, which reads images"),
        ({"model_type": "vit"}, "classify", "a task of texts needs a model of texts, got vit, which reads images"),
        ({"model_type": "siglip"}, KIND, "head of a model that classifies images must stand apart.*got siglip"),
    ],
)
def test_the_model_and_the_task_are_of_one_kind(config, kind, said):
    with pytest.raises(UserError, match=f"^model: .*{said}"):
        empty_model(AutoConfig.for_model(**config), kind)


def test_a_tiny_model_scales_any_image_to_its_size():
    image = Image.new("RGB", (50, 20), (255, 0, 127))
    pixels = tiny_image_processor()(image, return_tensors="pt")["pixel_values"]
    right = torch.tensor([1.0, -1.0, 127 / 127.5 - 1]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    torch.testing.assert_close(pixels, right, rtol=0, atol=1e-6)
