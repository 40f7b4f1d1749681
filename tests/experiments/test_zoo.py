"""The zoo: whole, stopped and resumed, tuned, on CIFAR-100 in small, and its mistakes."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import zoo, zoo_pairs

pytestmark = [pytest.mark.usefixtures("compile_cache"), pytest.mark.xdist_group("zoo")]  # one cache, in one process

TINY = zoo.Config(
  pair=("convnet-4-6", "convnet-2-3"),
  methods=("kl_soft_targets", "crd"),
  seeds=2,
  teacher_steps=4,
  student_steps=4,
  batch_size=16,
  save_every=2,
)


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_with_the_same_numbers(whole_and_stopped):
  """Stopped in the memory of CRD as well."""
  run, first, second = whole_and_stopped(zoo.main, TINY, 10, "students, crd stopped at step 3 of 4")
  for document in (first, second):
    for student in document["students"]:
      del student["milliseconds"]
  assert first == second
  by_name = {student["method"]: student for student in first["students"]}
  assert by_name.keys() == {"baseline", "kl_soft_targets", "crd"}
  means = [np.mean(student["accuracy"]) for student in first["students"]]
  assert means == sorted(means, reverse=True)
  gain = np.subtract(by_name["crd"]["accuracy"], by_name["baseline"]["accuracy"])
  np.testing.assert_allclose(by_name["crd"]["difference"], gain)
  assert by_name["kl_soft_targets"]["extra parameters"] == 0 < by_name["crd"]["extra parameters"]
  for name in ("results.md", "ranking.png", "learning_curves.png"):
    assert (run / name).stat().st_size > 0


@pytest.mark.slow
def test_the_same_command_runs_on_files_of_cifar_100(tmp_path, cifar100):
  small = {
    "dataset": "cifar100",
    "path": str(cifar100),
    "pair": ("resnet8", "resnet8"),
    "teacher_steps": 1,
    "student_steps": 1,
  }
  small |= {"methods": ("kl_soft_targets",), "seeds": 1, "batch_size": 4, "save_every": 1}
  zoo.main(dataclasses.replace(TINY, run=str(tmp_path / "run"), **small))
  assert "resnet8 to resnet8 on cifar100" in (tmp_path / "run" / "results.md").read_text()


def test_published_numbers_are_those_of_the_pair():
  numbers = zoo_pairs.published(("resnet32x4", "resnet8x4"))
  assert (numbers["baseline"], numbers["kl_soft_targets"], numbers["dkd"]) == (72.50, 73.33, 76.32)
  assert zoo_pairs.published(("resnet8", "resnet8")) == {}


@pytest.mark.slow
def test_tuning_keeps_the_best_weight_of_the_validation_split(tmp_path):
  weights = tmp_path / "weights.json"
  config = dataclasses.replace(TINY, run=str(tmp_path / "run"), methods=("reverse_kl", "crd"), weights=str(weights))
  zoo.main(dataclasses.replace(config, tune=True, tune_seeds=1))
  tuned = json.loads(weights.read_text())["digits"]
  assert tuned.keys() == {"reverse_kl", "crd"}
  for name, grid in (("reverse_kl", zoo.GRID), ("crd", [0.8 * share for share in zoo.SHARES])):
    scores = tuned[name]["validation accuracy"]
    assert list(scores) == [f"{weight:g}" for weight in grid]
    assert scores[f"{tuned[name]['weight']:g}"] == max(scores.values())
  assert zoo.weight_of(config, "reverse_kl") == (tuned["reverse_kl"]["weight"], "tuned")
  assert zoo.weight_of(config, "crd") == (tuned["crd"]["weight"], "tuned, 0.8 published")
  longer = dataclasses.replace(config, student_steps=5)
  assert zoo.weight_of(longer, "crd")[1] == "tuned on convnet-4-6 to convnet-2-3, 4 steps, 0.8 published"
  assert zoo.weight_of(config, "dkd") == (1.0, "published") and zoo.weight_of(config, "nkd") == (1.0, "untuned")


@pytest.mark.parametrize("name", zoo.METHODS)
def test_every_method_learns_on_the_pair(name, bench):
  """One step, shapes only: connectors, paths and losses fit, and the method reaches the student."""
  learner, _ = zoo.program(bench, name, 1.0)
  arrays = next(iter(bench.feed.batches))
  frozen = {"teacher": bench.frozen_teacher}
  one_seed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), frozen)
  state = jax.eval_shape(learner.init, jax.random.key(0), arrays, one_seed)
  after, metrics = jax.eval_shape(learner.step, state, arrays, one_seed)
  assert jax.tree.structure(after) == jax.tree.structure(state)
  assert any(term.startswith("distil") for term in metrics)


@pytest.fixture(scope="module")
def bench():
  """What methods share, from a teacher that did not learn."""
  config = TINY.checked()
  arrays = zoo_pairs.load(config)["train"]
  teacher, student = (zoo_pairs.classifier(name, "digits") for name in config.pair)
  keys = jax.random.split(jax.random.key(0), config.seeds)
  frozen = jax.vmap(lambda key: teacher.init(key, arrays))(keys)
  session = zoo.phases.Session(config, None, None, None)
  sample = zoo.functools.partial(zoo_pairs.draw_augmented, size=config.batch_size, shift=0, flip=False)
  feed = zoo.phases.Feed([arrays], sample)
  pair = zoo_pairs.pair_of(student, teacher, arrays)
  return zoo.Bench(session, feed, student, teacher, frozen, [0.5, 0.5], pair, arrays["label"], None, None)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"methods": ("kd",)}, r"methods has no \['kd'\]; there are kl_soft_targets"),
    ({"pair": ("resnet56", "vgg8")}, "no network 'vgg8'"),
    ({"pair": ("mlp-8", "mlp-4")}, "mlp-8 has fewer than two stages"),
    ({"pair": ("convnet-8", "convnet-2-3")}, "convnet-8 has fewer than two stages"),
    ({"learning_rate": 0.0}, "learning_rate must be positive"),
    ({"held_out": 5}, "held_out=5 is for cifar"),
    ({"dataset": "cifar100", "path": "somewhere", "tune": True}, "tune needs a validation split"),
    ({"dataset": "wine"}, "dataset='wine' is not for this experiment, which takes digits, cifar100"),
    (
      {"dataset": "cifar100"},
      "dataset='cifar100' needs path: a folder with train.bin and test.bin; of digits, cifar100",
    ),
    ({"path": "somewhere"}, "path='somewhere' is for data read from files; digits needs none"),
    ({"weights": "typo.json"}, "weights: there is no file typo.json; --tune writes one"),
  ],
)
def test_settings_that_make_no_sense_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(TINY, **changes).checked()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"batch_size": 1001}, "batch_size=1001 is larger than the training data: 1000 images"),
    ({"pair": ("convnet-2-3-4", "convnet-2-3")}, "the maps of teacher and student must have the same sizes"),
  ],
)
def test_what_does_not_fit_the_data_is_refused_before_anything_is_written(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    zoo.main(dataclasses.replace(TINY, run=str(tmp_path / "run"), **changes))
  assert list(tmp_path.iterdir()) == []


def test_truncated_files_are_refused_before_anything_is_written(tmp_path, cifar100):
  folder = tmp_path / "cifar"
  folder.mkdir()
  (folder / "train.bin").write_bytes((cifar100 / "train.bin").read_bytes()[:-1])
  (folder / "test.bin").write_bytes((cifar100 / "test.bin").read_bytes())
  pair = ("resnet8", "resnet8")
  with pytest.raises(ValueError, match=r"train.bin"):
    zoo.main(dataclasses.replace(TINY, run=str(tmp_path / "run"), dataset="cifar100", path=str(folder), pair=pair))
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tune", [False, True])
@pytest.mark.parametrize(
  "content",
  [
    "weights: 1\n",
    "[1, 2]",
    '{"digits": {"hint": 3.0}}',
    '{"digits": {"hint": {"weight": "much", "pair": ["a", "b"], "steps": 1}}}',
    '{"digits": {"hint": {"weight": 1.0, "pair": ["a", "b"]}}}',
    '{"digits": {"hint": {"weight": NaN, "pair": ["a", "b"], "steps": 1}}}',
  ],
)
def test_a_foreign_file_of_weights_is_refused_before_anything_is_trained(tmp_path, content, tune):
  file = tmp_path / "weights.json"
  file.write_text(content)
  with pytest.raises(ValueError, match=r"weights: .*weights\.json is not a file that --tune writes \(\w+: "):
    dataclasses.replace(TINY, weights=str(file), tune=tune).checked()
  assert file.read_text() == content
