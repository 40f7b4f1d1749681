"""The language experiment: whole, stopped and resumed, on a user's checkpoints, and its mistakes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import language
from experiments.language_report import verdicts
from experiments.language_text import continued, end_of, examples_of, with_labels
from kdflax import data, models

pytestmark = [pytest.mark.usefixtures("compile_cache"), pytest.mark.xdist_group("language")]

SENTENCE = "the student reads what the teacher writes, line {} of {}\n"
TINY = language.Config(
  vocabulary=270,
  length=16,
  methods=("alone", "JSD", "sequence-level", "on-policy reverse KL"),
  seeds=2,
  teacher_width=16,
  teacher_depth=2,
  student_width=8,
  student_depth=1,
  teacher_steps=4,
  student_steps=4,
  batch_size=4,
  prompt=5,
  greedy_rows=6,
  test_rows=8,
  save_every=2,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp("text")
  for name in ("one", "two"):
    (folder / name).write_text("".join(SENTENCE.format(number, name) for number in range(100)))
  return str(folder / "one"), str(folder / "two")


@pytest.mark.slow
def test_a_run_that_was_stopped_while_the_student_writes_ends_with_the_same_numbers(whole_and_stopped, files):
  config, message = dataclasses.replace(TINY, text=files), "students, on-policy reverse KL stopped at step 3 of 4"
  run, first, second = whole_and_stopped(language.main, config, 18, message)
  for results in (first, second):
    for found in results["students"].values():
      del found["tokens per second"]
  assert first == second
  assert list(first["students"]) == list(TINY.methods)
  for name in ("results.md", "samples.md", "metrics.png", "learning_curves.png"):
    assert (run / name).stat().st_size > 0


@pytest.mark.slow
def test_checkpoints_of_the_user_are_distilled_and_come_out_as_checkpoints(tmp_path, files):
  tokenizer = data.byte_pairs((SENTENCE.format(1, "one"),), 257)
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  sizes = {"teacher": (16, 260), "student": (8, 264)}  # filled up to other numbers of rows
  for name, (width, rows) in sizes.items():
    config = models.DecoderConfig(vocabulary=rows, width=width, depth=1, heads=2)
    params, _ = models.decoder(config).init(jax.random.key(0), {"tokens": jnp.zeros((1, 1), int)})
    models.save_pretrained(tmp_path / name, config, params)
  given = {name: str(tmp_path / name) for name in sizes}
  given |= {"tokenizer": str(tmp_path / "tokenizer.json"), "text": files, "run": str(tmp_path / "run")}
  language.main(dataclasses.replace(TINY, methods=("alone", "forward KL"), **given))
  before = models.load_pretrained(tmp_path / "student").variables[0]
  for name in ("alone", "forward-KL"):
    directory = tmp_path / "run" / "students" / name
    after = models.load_pretrained(directory)
    assert after.config.vocabulary == 264
    assert not np.array_equal(after.variables[0]["head"], before["head"])
    assert data.read_tokenizer(directory / "tokenizer.json").to_str() == tokenizer.to_str()


def test_a_token_foretells_the_next_one_of_its_document():
  packed = data.pack(data.byte_pairs(["x"], 257), ["ab", "cde"], 8)
  packed = {name: array[:, :7] if array.ndim == 2 else array for name, array in packed.items()}
  rows = examples_of("test", packed)
  assert rows["where"].tolist() == [[True, True, False, True, True, True, False]]
  counted = rows["where"][0]
  assert rows["labels"][0][counted].tolist() == [*packed["tokens"][0, 1:3], *packed["tokens"][0, 4:7]]
  assert (rows["bytes"][0] * counted).sum() == 3  # b, d and e: an end has no bytes, and nothing foretells c


def test_a_model_goes_on_with_the_document_that_the_prompt_ends_in():
  config = models.DecoderConfig(vocabulary=9, width=8, depth=1, heads=2)
  params, _ = models.decoder(config).init(jax.random.key(0), {"tokens": jnp.zeros((1, 1), int)})
  sample = models.make_sampler(config, new_tokens=3, temperature=0.0)
  rows = {"tokens": jnp.array([[7, 1, 2, 3, 4, 5]]), "segments": jnp.array([[1, 2, 2, 3, 3, 3]])}
  made = continued(sample, params, rows, 3, jax.random.key(0))
  alone = sample(params, jnp.array([[1, 2]]), jax.random.key(0))
  assert made["tokens"][0, :5].tolist() == alone.tokens[0].tolist()
  assert made["where"].tolist() == [[False, True, True, True, False, False]]


def test_labels_of_padding_do_not_count():
  made = with_labels(jnp.array([[1, 2, 3, 0]]), jnp.array([[1, 1, 1, 0]]))
  assert made["where"].tolist() == [[True, True, False, False]]


def test_the_end_of_a_document_is_known_by_its_usual_names():
  assert end_of(data.byte_pairs(["x"], 257)) == 0


def test_verdicts_name_what_is_beyond_noise():
  same = {metric: [1.0, 1.1, 1.2] for metric in ("bits per byte", "forward KL", "reverse KL", "acceptance")}
  better = {metric: [value - 0.5 for value in values] for metric, values in same.items()}
  lines = verdicts({"alone": same, "equal": same, "lower": better})
  assert lines[0] == "- bits per byte, against alone: better: lower; not beyond noise: equal."
  assert lines[3] == "- acceptance, against alone: worse: lower; not beyond noise: equal."


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"methods": ("JSD",)}, "methods must be of .* with alone among them; got .'JSD'"),
    ({"prompt": 16}, "prompt=16 must be shorter than a row, length=16"),
    ({"share": 0.0}, "share must be above 0 and at most 1; got 0.0"),
    ({"beta": 1.0}, r"beta must be in \(0, 1\) and alpha in"),
    ({"temperature": 0.0}, "temperature must be positive; got 0.0"),
    ({"teacher": "there"}, "a checkpoint needs its vocabulary and text"),
    ({"tokenizer": "there"}, "tokenizer='there' needs text"),
  ],
)
def test_settings_that_make_no_sense_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(TINY, **changes).checked()


def test_text_too_short_for_a_batch_is_refused_before_anything_is_written(tmp_path, files):
  with pytest.raises(ValueError, match=r"batch_size=5000 is more than the \d+ rows of text"):
    language.main(dataclasses.replace(TINY, run=str(tmp_path / "run"), text=files, batch_size=5000))
  assert list(tmp_path.iterdir()) == []
