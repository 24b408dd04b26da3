"""images: shapes drawn from a seed, and a folder of one's own by class."""

import hashlib
import json
import re

import numpy as np
import pytest
from highrank.tasks.images import SHAPES, _inside, drawn
from PIL import Image

from highrank.base.registry import load
from highrank.data.images import noise, read_image
from highrank.data.scoring import prediction_rows

RUN = ["task=images", "model=tiny_vit", "method=lora", "r=2", "max_steps=2", "batch_size=4"]


def task(**fields):
    cls = load("tasks", "images")
    return cls(cls.config(**fields), 0)


@pytest.fixture
def own(tmp_path):
    """A folder with two classes, each known by its colour, three images to train on and two to test on."""
    folder = tmp_path / "own"
    for split, n in (("train", 3), ("test", 2)):
        for label, name in enumerate(("1", "true")):
            (folder / split / name).mkdir(parents=True)
            for i in range(n):
                colour = (40 * i, 200 * label, 90 if split == "train" else 100)
                Image.new("RGB", (20, 12), colour).save(folder / split / name / f"{i}.png")
    return folder


# Shapes


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ("circle", ["..#..", ".###.", "#####", ".###.", "..#.."]),
        ("square", ["#####"] * 5),
        ("triangle", ["..#..", "..#..", ".###.", ".###.", "#####"]),
        ("cross", ["..#..", "..#..", "#####", "..#..", "..#.."]),
    ],
)
def test_a_shape_is_what_it_is_called(shape, rows):
    dy, dx = np.mgrid[-4:5, -4:5]
    found = ["".join(".#"[covered] for covered in row) for row in _inside(shape, dx, dy, 2).astype(int)]
    assert found == ["." * 9] * 2 + [f"..{row}.." for row in rows] + ["." * 9] * 2


def test_an_image_is_the_same_on_every_machine():
    record = drawn("train", 0, 2)
    pixels = np.asarray(record.image)
    assert (record.id, record.label, SHAPES[record.label]) == ("train-0-2", 2, "triangle")
    assert (pixels.shape, pixels.dtype) == ((32, 32, 3), np.uint8)
    assert record.sha256 == hashlib.sha256(pixels.tobytes()).hexdigest()
    assert record.sha256 == "5e8ad920baafb4932600cdd944dd6526e26b7f1153acd5681cfcfe705dcb10f4"


def test_sets_are_balanced_distinct_and_each_the_beginning_of_a_longer_one():
    short, whole, other = task(n_train=8, n_test=4), task(), task(data_seed=1)
    assert (len(whole.train()), len(whole.test()["images"])) == (512, 200)
    assert list(short.train()) == list(whole.train()[:8])
    assert [record.label for record in short.train()] == [0, 1, 2, 3] * 2
    images = [record.sha256 for each in (whole, other) for record in (*each.train(), *each.test()["images"])]
    assert len(set(images)) == len(images)
    assert short.num_labels == 4
    assert [source["rows"] for source in short.sources()] == [8, 4]
    assert short.sources() == task(n_train=8, n_test=4).sources() != task(n_train=8, n_test=4, data_seed=1).sources()


# A folder


def test_a_folder_is_read_class_by_class(own):
    (own / "train" / ".hidden").mkdir()
    for name in (".cache.png", "notes.txt"):
        (own / "train" / "1" / name).write_text("no image")
    (own / "train" / "true" / "0.png").rename(own / "train" / "true" / "9.PNG")
    found = task(folder=str(own))
    assert (found.cfg.classes, found.num_labels) == (["1", "true"], 2)
    records = found.train()
    assert [(record.id, record.label) for record in records] == [
        *((f"train/1/{i}.png", 0) for i in range(3)),
        *((f"train/true/{name}", 1) for name in ("1.png", "2.png", "9.PNG")),
    ]
    assert [record.sha256 for record in records] == [
        hashlib.sha256(record.image.read_bytes()).hexdigest() for record in records
    ]
    assert read_image(records[1].image).getpixel((0, 0)) == (40, 0, 90)
    assert [len(rows) for rows in found.test().values()] == [4]
    drawn_at_random = task(folder=str(own), n_train=4).train()
    assert drawn_at_random == task(folder=str(own), n_train=4).train()
    assert len(drawn_at_random) == 4
    assert all(record in records for record in drawn_at_random)
    assert task(folder=str(own), classes=["true", "1"]).train()[0].id == "train/true/1.png"


def test_an_image_is_seen_upright_in_rgb(tmp_path):
    file = tmp_path / "image.png"

    def read(image, **options):
        image.save(file, **options)
        return read_image(file)

    image = Image.new("RGB", (2, 1), (255, 0, 0))
    image.putpixel((1, 0), (0, 0, 255))
    turned = Image.Exif()
    turned[0x0112] = 6  # Orientation: to be turned by a quarter, clockwise
    found = read(image, exif=turned)
    assert (found.size, found.getpixel((0, 0)), found.getpixel((0, 1))) == ((1, 2), (255, 0, 0), (0, 0, 255))
    assert read(Image.new("L", (1, 1), 7)).getpixel((0, 0)) == (7, 7, 7)
    assert read(Image.new("RGBA", (1, 1), (1, 2, 3, 0))).getpixel((0, 0)) == (1, 2, 3)
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([9, 8, 7])
    assert read(palette, transparency=b"\x00").getpixel((0, 0)) == (9, 8, 7)
    assert [image.tobytes() for image in noise(2)] == [image.tobytes() for image in noise(2)]


# Bad input


def spoil(folder, how):
    train, test = folder / "train", folder / "test"

    def remove(place):
        for file in sorted(place.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        place.rmdir()

    if how == "empty class":
        remove(train / "true")
        (train / "true").mkdir()
    elif how == "only a text":
        remove(test / "1")
        (test / "1").mkdir()
        (test / "1" / "notes.txt").write_text("no image")
    elif how == "no image":
        (train / "1" / "2.png").write_text("no image")
    elif how == "16 bits":
        Image.new("I;16", (4, 4), 40000).save(test / "true" / "0.png")
    elif how == "one class":
        remove(train / "1")
        remove(test / "1")
    elif how == "other classes":
        (test / "1").rename(test / "one")
    else:
        remove(folder / how)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("", r"task images: folder must be an existing folder with train/CLASS .*, got task\.folder=.*own"),
        ("train", r"task images: folder must be an existing folder with train/CLASS .*, got task\.folder=.*own"),
        ("test", r"task images: a folder of classes is needed, got none at .*own/test"),
        (
            "one class",
            r"task images: there must be two classes to tell apart, got true in .*own/train; make a folder per",
        ),
        ("empty class", r"task images: a class must hold an image \(png, .*\), got none in .*own/train/true"),
        ("only a text", r"task images: a class must hold an image \(png, .*\), got none in .*own/test/1"),
        ("no image", r"image: a file must hold an image of 8 bits a channel, got .*train/1/2\.png \(.*cannot identify"),
        ("16 bits", r"image: a file must hold an image of 8 bits a channel, got .*test/true/0\.png \(.*mode I;16\)"),
        (
            "other classes",
            r"task images: train and test must hold the same classes.*, got one too many and 1 missing in .*own/test",
        ),
    ],
)
def test_a_folder_that_is_none_of_images_is_refused_before_weights_load(run_cli, own, monkeypatch, how, said):
    spoil(own, how)
    monkeypatch.setattr("highrank.train.build.load_backbone", None)
    for words in ([], ["dry_run=true"]):
        status, _, err = run_cli(*RUN, f"task.folder={own}", *words)
        assert status == 2
        assert re.search(f"^error: {said}", err), err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["task.n_train=0"], r"task images: n_train must be >= 1, got n_train=0"),
        (["task.classes=[a,b]"], r"task images: classes are those of a folder, got classes=.* without task\.folder"),
        (
            ["task.folder={own}", "task.classes=[1,no]"],
            r"the same classes.*, got true too many and no missing in .*train",
        ),
        (["packing=true"], r"run: packing is for language models .*, got task=images"),
        (
            ["general_text={own}/text.txt"],
            r"run: general_text is what a model of texts may forget, got .* with task=images",
        ),
        (
            ["eval_also=[wordmath]"],
            r"run: eval_also takes tasks of the run's kind, got wordmath \(generate\) beside images",
        ),
        (["method=prompt_tuning"], r"prompt_tuning: virtual tokens need a causal language model, got ViTForImage"),
        (["model=tiny_llama"], r"model: a task of images needs a model that classifies images, got llama"),
        (["task=wordmath"], r"model: a task of texts needs a model of texts, got vit, which reads images"),
        (["placement=gate"], r"placement: vit has no part gate"),
    ],
)
def test_what_does_not_go_with_images_is_refused(run_cli, own, words, said):
    (own / "text.txt").write_text("A text.\n")
    chosen = [word for word in RUN if word.split("=")[0] not in [w.split("=")[0] for w in words]]
    if "method=prompt_tuning" in words:
        chosen.remove("r=2")
    status, _, err = run_cli(*chosen, *(word.format(own=own) for word in words))
    assert status == 2
    assert re.search(f"^error: .*{said}", err), err
    assert err.count("\n") == 1


def test_damaged_pixels_end_a_run_with_the_files_name(run_cli, own, tmp_path):
    file = own / "train" / "1" / "0.png"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    file.write_bytes(file.read_bytes()[:2000])  # its beginning is whole
    status, _, err = run_cli(*RUN, f"task.folder={own}", f"run_dir={tmp_path / 'run'}", "batch_size=6")
    assert status == 2
    assert re.search(r"^error: image: a file must hold an image of 8 bits a channel, got .*1/0\.png \(", err, re.M), err
    assert json.loads((tmp_path / "run" / "results.json").read_text())["status"] == "failed"


# Runs


def test_a_run_says_what_a_classifier_can(run_cli, tmp_path):
    run = tmp_path / "run"
    status, out, err = run_cli(*RUN, "task.n_train=16", "task.n_test=8", f"run_dir={run}", "protocol.num_validation=4")
    assert status == 0, err
    results = json.loads((run / "results.json").read_text())
    rows = [json.loads(line) for line in (run / "predictions" / "images.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"test-0-{i}" for i in range(8)]
    assert [row["gold"] for row in rows] == [0, 1, 2, 3] * 2
    assert all(row["correct"] == (row["output"] == row["gold"]) and row["target_tokens"] == 1 for row in rows)
    final = results["metrics"]["final"]["sets"]["images"]
    assert final["accuracy"] == 100 * sum(row["correct"] for row in rows) / 8
    assert final["loss"] == pytest.approx(sum(row["nats"] for row in rows) / 8)
    assert (final["n"], final["leaked"]) == (8, 0)
    assert results["metrics"]["before"]["sets"]["images"]["loss"] != final["loss"]
    assert results["validation"]["n"] == 4
    assert results["tokens"]["train"] == 2 * 4 * 16  # steps, images, patches
    assert results["params"]["head"] == 4 * 16 + 4
    assert "accuracy" in out


def test_an_image_trained_on_is_found_in_the_test_set(own):
    from highrank.config.build import protocol_for
    from highrank.data.batches import EvalData, hold_out

    (own / "test" / "true" / "0.png").write_bytes((own / "train" / "true" / "1.png").read_bytes())
    found = task(folder=str(own))
    protocol = protocol_for({"name": "p", "version": 1, "template": "{instruction}"}, "images")
    records = found.test()["images"]
    data = EvalData(found, protocol, None, hold_out(found.train(), protocol)[0])
    rows = prediction_rows(data, records, [(record.label, 0.5) for record in records])
    assert [row["leaked"] for row in rows] == [False, False, True, False]
