"""The zoo: whole, stopped and resumed, tuned, on CIFAR-100 in small, and its mistakes."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import zoo, zoo_pairs

pytestmark = [pytest.mark.usefixtures("compile_cache"), pytest.mark.xdist_group("zoo")]  # one cache, in one process

TINY = zoo.Config(
  dataset="digits",
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
def test_tuning_keeps_the_best_setting_of_the_validation_split(tmp_path):
  weights = tmp_path / "weights.json"
  config = dataclasses.replace(TINY, run=str(tmp_path / "run"), methods=("reverse_kl", "crd"), weights=str(weights))
  zoo.main(dataclasses.replace(config, tune=True, tune_seeds=2))
  tuned = json.loads(weights.read_text())["digits"]
  assert tuned.keys() == {"baseline", "reverse_kl", "crd"}
  assert [len(tuned[name]["validation accuracy"]) for name in tuned] == [2, 4 * 2 * 2, 4 * 2]
  for entry in tuned.values():
    best = next(
      row for row in entry["validation accuracy"] if all(entry[key] == row[key] for key in row.keys() & entry)
    )
    assert best["accuracy"] == max(row["accuracy"] for row in entry["validation accuracy"])
  assert (tmp_path / "run" / "sweeps.png").stat().st_size > 0
  assert "| crd | " in (tmp_path / "run" / "results.md").read_text()
  checked = config.checked()
  found = {key: tuned["crd"][key] for key in ("weight", "rate")}
  assert zoo.setting_of(checked, "crd") == (found, "tuned, 0.8 published")
  assert zoo.setting_of(checked, "baseline") == ({"rate": tuned["baseline"]["rate"]}, "tuned")
  longer = dataclasses.replace(checked, student_steps=5)
  assert zoo.setting_of(longer, "crd")[1] == "tuned on convnet-4-6 to convnet-2-3, 4 steps, 0.8 published"
  assert zoo.setting_of(checked, "dkd") == ({"weight": 1.0}, "published")
  assert zoo.setting_of(checked, "nkd") == ({"weight": 1.0}, "untuned")


def test_temperatures_are_tuned_where_a_method_has_one():
  config = TINY.checked()
  with_one = {name for name in zoo.METHODS if "temperature" in zoo.grid_of(config, name)}
  assert {"kl_soft_targets", "dkd", "dist", "standardize_logits", "reverse_kl"} <= with_one
  assert not {"hint", "crd", "info_nce", "hard_targets", "ctkd", "mlkd"} & with_one
  assert zoo.grid_of(config, "baseline").keys() == {"rate"}
  np.testing.assert_allclose(np.unique(zoo.grid_of(config, "hint")["weight"]), [0.1, 1.0, 10.0, 100.0])


@pytest.mark.parametrize("name", zoo.METHODS)
def test_every_method_learns_on_the_pair(name, bench):
  """One step, shapes only: connectors, paths and losses fit, and the method reaches the student."""
  warm = {"temperature": 2.0} if "temperature" in zoo.grid_of(bench.session.config, name) else {}
  learner, _ = zoo.program(bench, name, {"weight": 1.0, "rate": 0.1, **warm})
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
    ({"methods": ("kd",)}, r"methods has no \['kd'\]; there are all, kl_soft_targets"),
    ({"pair": ("resnet56", "vgg8")}, "no network 'vgg8'"),
    ({"pair": ("mlp-8", "mlp-4")}, "mlp-8 has fewer than two stages"),
    ({"pair": ("convnet-8", "convnet-2-3")}, "convnet-8 has fewer than two stages"),
    ({"learning_rate": 0.0}, "learning_rate must be positive"),
    ({"held_out": 5}, "held_out=5 is for cifar"),
    ({"dataset": "cifar100", "path": "somewhere", "tune": True}, "tune needs a validation split"),
    ({"dataset": "wine"}, "dataset='wine' is not for this experiment, which takes glyphs, digits, cifar100"),
    (
      {"dataset": "cifar100"},
      "dataset='cifar100' needs path: a folder with train.bin and test.bin; of glyphs, digits, cifar100",
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
    '{"digits": {"hint": {"weight": 1.0, "rate": -1.0, "pair": ["a", "b"], "steps": 1}}}',
    '{"digits": {"hint": {"rate": 1.0, "pair": ["a", "b"], "steps": 1}}}',
  ],
)
def test_a_foreign_file_of_weights_is_refused_before_anything_is_trained(tmp_path, content, tune):
  file = tmp_path / "weights.json"
  file.write_text(content)
  with pytest.raises(ValueError, match=r"weights: .*weights\.json is not a file that --tune writes \(\w+: "):
    dataclasses.replace(TINY, weights=str(file), tune=tune).checked()
  assert file.read_text() == content


def test_glyphs_are_a_choice_of_methods_on_networks_that_keep_positions():
  config = zoo.Config().checked()
  assert config.methods == tuple(name for name in zoo.METHODS if name in zoo_pairs.CHOSEN)
  assert zoo.Config(methods=("all",)).checked().methods == tuple(zoo.METHODS)
  student = zoo_pairs.classifier(config.pair[1], "glyphs")
  images = {"image": np.zeros((2, 20, 20, 1), np.uint8)}
  outputs = jax.eval_shape(
    lambda key: student.apply(*student.init(key, images), images, train=False)[0], jax.random.key(0)
  )
  last = outputs["features"]["stage3"].shape
  assert last[:3] == (2, 5, 5) and outputs["embedding"].shape == (2, 25 * last[3])
