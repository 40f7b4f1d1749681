"""The fusion experiment: whole, stopped and resumed, on CIFAR-100 in small, and its mistakes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from experiments import fuse, fuse_report
from kdflax import models
from kdflax.objectives import evaluate

pytestmark = [pytest.mark.usefixtures("compile_cache"), pytest.mark.xdist_group("fuse")]  # one cache, in one process

TINY = fuse.Config(
  dataset="overlaid_digits",
  pair=("mlp-8", "mlp-4"),
  labels=20,
  methods=("joint", "composite"),
  balancers=("UPGrad",),
  seeds=2,
  teacher_steps=4,
  student_steps=4,
  batch_size=16,
  save_every=2,
)


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_with_the_same_numbers(whole_and_stopped):
  run, first, second = whole_and_stopped(fuse.main, TINY, 10, "students, composite stopped at step 3 of 4")
  for result in (*first.values(), *second.values()):
    del result["microseconds"]
  assert first == second
  assert list(first) == ["joint", "composite", "composite UPGrad"]
  differences = json.loads((run / "differences.json").read_text())
  assert [(line["method"], line["against"]) for line in differences] == [
    ("composite", "joint"),
    ("composite UPGrad", "composite"),
  ]
  for name in ("results.md", "differences.md", "accuracy.png", "learning_curves.png"):
    assert (run / name).stat().st_size > 0


@pytest.mark.slow
def test_cifar_100_has_fine_and_coarse_classes_as_tasks(tmp_path, cifar100):
  small = {"dataset": "cifar100", "path": str(cifar100), "pair": ("convnet-2-3", "convnet-2-3")}
  small |= {"held_out": 8, "seeds": 1}
  small |= {"methods": ("multi-task teacher",), "balancers": (), "batch_size": 4}
  small |= {"teacher_steps": 1, "student_steps": 1, "save_every": 1}
  fuse.main(dataclasses.replace(TINY, run=str(tmp_path / "run"), **small))
  results = json.loads((tmp_path / "run" / "results.json").read_text())["multi-task teacher"]
  assert results["score"].keys() == {"fine", "coarse"}
  image = {"image": jnp.zeros((1, 32, 32, 3))}
  encoder, _ = models.convnet((2, 3), None).init(jax.random.key(0), image)
  assert results["parameters"] == models.count_parameters(encoder) + (100 + 20) * (3 + 1)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"methods": ("jointly",)}, "methods must be of .*independent taught.*; got .'jointly'"),
    ({"balancers": ("Krum",)}, r"unknown balancers \['Krum'\]; for 2 tasks there are random weights"),
    ({"pair": ("mlp-8", "vgg16")}, "no network 'vgg16': name mlp-256"),
    ({"temperature": 0.0}, "temperature must be positive; got 0.0"),
    ({"labels": 8}, "batch_size=16 is larger than the labelled data: 8 images"),
    ({"weights": fuse.Weights(soft=-1.0)}, "weights must be at least 0"),
    ({"held_out": 5}, "held_out=5 is for cifar"),
    ({"held_out": -1}, "held_out must be at least 0; got -1"),
    ({"pair": ("mlp-8", "mlp-0")}, "no network 'mlp-0'"),
    (
      {"dataset": "digits"},
      "dataset='digits' is not for this experiment, which takes glyphs, overlaid_digits, cifar100",
    ),
    ({"dataset": "cifar100"}, "dataset='cifar100' needs path: a folder with train.bin and test.bin"),
  ],
)
def test_settings_that_make_no_sense_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(TINY, **changes).checked()


def test_more_labels_than_images_are_refused_before_anything_is_written(tmp_path):
  with pytest.raises(ValueError, match=r"num_labelled=5000 must be between 10 .* and 2000"):
    fuse.main(dataclasses.replace(TINY, run=str(tmp_path / "run"), labels=5000))
  assert list(tmp_path.iterdir()) == []


def test_all_balancers_that_work_for_two_tasks_are_compared_with_the_plain_sum():
  compared = fuse.Config(dataset="overlaid_digits").checked().compared()
  balanced = [name for name, method in compared.items() if method.balancer]
  assert len(balanced) == len(fuse.BALANCERS) - 2
  assert all(
    fuse_report.meaningful(name, "composite") and not fuse_report.meaningful(name, "joint") for name in balanced
  )
  assert fuse_report.meaningful("composite", "joint") and not fuse_report.meaningful("joint", "joint")


def test_the_old_name_of_a_data_set_forwards_for_now():
  with pytest.warns(FutureWarning, match=r"--cifar goes with version 0.3: --dataset cifar100 --path there"):
    config = dataclasses.replace(TINY, cifar="there").checked()
  assert config == dataclasses.replace(TINY, dataset="cifar100", path="there").checked()


def test_a_regression_is_learned_from_labels_and_teachers_by_squared_errors():
  weight = fuse.Config().tasks["weight"]
  context = {"student": {"logits": jnp.array([1.0, 2.0])}, "teacher": {"logits": jnp.array([0.0, 5.0])}}
  context |= {"batch": {"label": jnp.array([3.0, 9.0]), "labelled": jnp.array([True, False])}}
  hard = fuse.hard_term(weight, "student.logits", "batch.label", where="batch.labelled")
  soft = fuse.soft_term(fuse.Config(), weight, "student.logits", "teacher.logits")
  values, _ = evaluate({"hard": hard, "soft": soft}, context)
  assert values["hard"] == pytest.approx(4.0)  # of the labelled image alone
  assert values["soft"] == pytest.approx((1 + 9) / 2)


def test_glyphs_are_three_tasks_whose_weights_are_standardised():
  config = fuse.Config(balancers=("Krum",)).checked()
  assert list(config.compared())[-1] == "composite Krum"
  labels = fuse.load(config)["train"]["label"]
  assert list(labels) == ["character", "italic", "weight"]
  assert labels["weight"].mean() == pytest.approx(0, abs=1e-5) and labels["weight"].std() == pytest.approx(1, rel=1e-5)
  assert set(labels["italic"].tolist()) == {0, 1}


def test_the_score_of_a_regression_is_the_variance_explained():
  assert fuse_report.titles(fuse.Config().tasks) == {
    "character": "character: accuracy (%)",
    "italic": "italic: accuracy (%)",
    "weight": "weight: R² (%)",
  }
