"""Teachers that JAX cannot trace: ONNX files, PyTorch modules, any NumPy function; recorded, or live in the step.

A teacher of another runtime is a function `batch -> outputs` of NumPy arrays, and that is all that `record_from` wants.
`live` makes a model of it that the jitted step calls back, so the same Terms serve it.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.buffer_callback import buffer_callback

from kdflax.extras import extra
from kdflax.model import Model, lookup
from kdflax.numerics.trees import nest_names

PyTree = Any
Prepare = Callable[[Mapping[str, Any]], np.ndarray]
Inputs = Mapping[str, str | Prepare]
_KINDS = {"float": "float32", "double": "float64"}  # of ONNX Runtime, where they are not those of NumPy


@dataclasses.dataclass(frozen=True)
class External:
  """A teacher of another runtime: call it with a batch of NumPy arrays, or take its `model`.

  Attributes:
    function: `batch -> outputs`, nested dicts of NumPy arrays `[batch, ...]`.
    source: JSON that says what it is, for `record_from`.
    reads: context paths of what it reads of a batch; None for all.
  """

  function: Callable[[Mapping[str, Any]], PyTree]
  source: Mapping[str, Any]
  reads: tuple[str, ...] | None = None

  def __call__(self, batch: Mapping[str, Any]) -> PyTree:
    """Returns what it says about a batch."""
    return self.function(batch)

  @property
  def model(self) -> Model:
    """The live teacher, called from the jitted step."""
    return live(self.function, self.reads)


def live(function: Callable[[Mapping[str, Any]], PyTree], reads: Sequence[str] | None = None) -> Model:
  """Makes a model of any NumPy function, called by the jitted step while it runs.

  The function waits for the device and the device for it, so a record is faster wherever an example is seen twice. When
  a step is traced, the function is called once with zeros, to learn the shapes of its outputs. It must not use JAX, and
  it has no derivatives.

  Args:
    function: `batch -> outputs`, nested dicts of NumPy arrays `[batch, ...]`, without side effects.
    reads: what it reads of a batch, as context paths such as `"image"`; only that is brought to the host. By default
      everything.

  Returns:
    A model without params, a frozen teacher with the variables `({}, {})`.

  Examples:
    >>> teacher = live(lambda batch: {"logits": batch["x"] * 2})
    >>> said, _ = jax.jit(lambda batch: teacher.apply({}, {}, batch, train=False))({"x": np.ones((2, 1), np.float32)})
    >>> said["logits"].tolist()
    [[2.0], [2.0]]
  """
  known: dict[Any, PyTree] = {}  # shapes of the outputs by those of the inputs

  def call(batch: PyTree) -> PyTree:
    return jax.tree.map(_canonical, dict(function(jax.tree.map(np.asarray, batch))))

  def fill(context: Any, results: PyTree, batch: PyTree) -> None:
    del context
    jax.tree.map(lambda result, said: np.copyto(np.asarray(result), said), results, call(batch))

  def apply(params: PyTree, state: PyTree, batch: Any, *, train: bool, key: Any = None) -> tuple[Any, PyTree]:
    del params, train, key
    batch = dict(batch) if reads is None else nest_names({path: lookup(batch, path) for path in reads}, ".")
    shapes = tuple((str(path), x.shape, str(x.dtype)) for path, x in jax.tree.leaves_with_path(batch))
    if shapes not in known:
      said = call(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), batch))
      known[shapes] = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), said)
    # On a CPU `pure_callback` copies its arguments in a thread that may be the one that waits for it: with one core it
    # never ends (JAX issue 24255). A buffer callback is handed the memory itself, which on a GPU is not the host's.
    in_place = buffer_callback(fill, known[shapes], vmap_method="sequential")
    copied = functools.partial(jax.pure_callback, call, known[shapes], vmap_method="sequential")
    return jax.lax.platform_dependent(jax.lax.stop_gradient(batch), cpu=in_place, default=copied), state

  return Model(lambda key, example: ({}, {}), apply)


def from_onnx(
  path: str | pathlib.Path,
  *,
  outputs: Mapping[str, str] | None = None,
  inputs: Inputs | None = None,
  providers: Sequence[Any] | None = None,
  threads: int = 0,
) -> External:
  """Reads a teacher from an ONNX file; ONNX Runtime runs it.

  A file for batches of one fixed size is given batches of any size in pieces. Needs `pip install "kdflax[onnx]"`.

  Args:
    path: the file.
    outputs: which tensors of the graph to return under which context path, such as `{"logits": "output",
      "features.last": "/layer4/Relu_output_0"}`: outputs of the graph or anything inside of it. By default the outputs
      of the graph, the only one as `logits`, several by their names.
    inputs: for each input of the graph where it is in the batch, or a function of the batch that makes it, such as
      `image_input(...)`. By default by its name; an only input is also found as `image`.
    providers: of ONNX Runtime, in the order of preference; by default the CPU.
    threads: of one operation; 0 leaves it to ONNX Runtime.

  Returns:
    The teacher: `record_from(teacher, batches, directory, source=teacher.source)` or `teacher.model`.

  Raises:
    ImportError: onnxruntime is missing, or onnx where a tensor inside of the graph is asked for.
    FileNotFoundError: there is no such file.
    ValueError: it is no ONNX file, or has no such input or output, and what it has; when called, if an input has
      another shape or type.
  """
  path = pathlib.Path(path)
  content = path.read_bytes()
  session = _session(path, None, providers, threads)
  of_graph = [output.name for output in session.get_outputs()]
  if outputs is None:
    outputs = {"logits": of_graph[0]} if len(of_graph) == 1 else {_as_name(name): name for name in of_graph}
  inside = [tensor for tensor in outputs.values() if tensor not in of_graph]
  if inside:
    session = _session(path, _with_outputs(path, inside), providers, threads)
  wanted, paths = list(outputs.values()), list(outputs)
  arguments = {node.name: node for node in session.get_inputs()}
  inputs = _inputs_of(path, list(arguments), inputs)

  def function(batch: Mapping[str, Any]) -> PyTree:
    feed = {name: _made(where, batch) for name, where in inputs.items()}
    for name, array in feed.items():
      feed[name] = _checked(path, arguments[name], array)
    said = _in_pieces(lambda part: list(session.run(wanted, part)), feed, arguments)
    return nest_names(dict(zip(paths, said, strict=True)), ".")

  source = {"onnx": path.name, "sha256": hashlib.sha256(content).hexdigest(), "outputs": dict(outputs)}
  return External(function, source, _reads(inputs))


def onnx_inputs(path: str | pathlib.Path) -> dict[str, tuple[str, list[int | None]]]:
  """What an ONNX file takes: type and shape of each input by name, None for an axis that is open.

  Args:
    path: the file.

  Raises:
    ImportError: onnxruntime is missing.
    ValueError: it is no ONNX file.
  """
  session = _session(pathlib.Path(path))
  shape = lambda node: [n if isinstance(n, int) else None for n in node.shape]
  return {node.name: (_dtype_of(node), shape(node)) for node in session.get_inputs()}


def from_torch(
  module: Any, *, outputs: Mapping[str, str | int] | None = None, inputs: Inputs | None = None, source: str = ""
) -> External:
  """Makes a teacher of a PyTorch module, on the device where its parameters are, in evaluation mode.

  Args:
    module: a `torch.nn.Module` with its weights; it is put into evaluation mode.
    outputs: what to return under which context path, such as `{"logits": "logits", "features.last": "layer4"}`: a key
      or attribute of what the module returns, a position in it, `""` for itself, or the name of a submodule, for what
      that returns. By default a tensor is `logits`, and what returns several keeps their names.
    inputs: for each argument of the module where it is in the batch, or a function of the batch that makes it, such as
      `image_input(...)`. By default one argument, `image`.
    source: says which module it is; the record keeps it, with a digest of the weights.

  Returns:
    The teacher: `record_from(teacher, batches, directory, source=teacher.source)` or `teacher.model`.

  Raises:
    ImportError: torch is missing.
    ValueError: it returns no such output, and has no submodule of that name.
  """
  with extra("torch", "a PyTorch teacher"):
    import torch  # pyright: ignore[reportMissingImports]
  module = module.eval()
  place = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
  submodules = dict(module.named_modules())
  inputs = inputs or {"": "image"}

  def function(batch: Mapping[str, Any]) -> PyTree:
    # A copy: arrays of JAX are read-only, and PyTorch takes no such memory.
    made = {name: torch.from_numpy(np.array(_made(where, batch))).to(place) for name, where in inputs.items()}
    tapped: dict[str, Any] = {}
    taps = [name for name in (outputs or {}).values() if isinstance(name, str) and name and name in submodules]
    hooks = [submodules[name].register_forward_hook(_tap(tapped, name)) for name in taps]
    try:
      with torch.no_grad():
        said = module(made.pop("")) if set(made) == {""} else module(**made)
    finally:
      for hook in hooks:
        hook.remove()
    found = _named(said) if outputs is None else {p: _picked(said, name, tapped) for p, name in outputs.items()}
    return nest_names({name: _to_numpy(tensor) for name, tensor in found.items()}, ".")

  weights = hashlib.sha256()
  for name, tensor in module.state_dict().items():
    weights.update(name.encode() + _to_numpy(tensor).tobytes())
  facts = {"torch": source or type(module).__name__, "weights": weights.hexdigest()}
  return External(function, facts | ({"outputs": dict(outputs)} if outputs else {}), _reads(inputs))


def image_input(
  size: int | tuple[int, int] | None = None,
  *,
  path: str = "image",
  mean: Sequence[float] = (0.0,),
  deviation: Sequence[float] = (1.0,),
  channels: int | None = None,
  channels_first: bool = True,
) -> Prepare:
  """Makes an input of a teacher from images: another size, normalised, its channels where the teacher wants them.

  Args:
    size: height and width, or one number for both; images of bytes are resized by Pillow, bilinear with anti-aliasing.
      None leaves the size.
    path: context path of the images, `[batch, height, width, channels]`; bytes are divided by 255.
    mean: of each channel, where white is 1; subtracted.
    deviation: of each channel; divided by.
    channels: 3 repeats grey images, 1 takes the mean of three; None leaves them.
    channels_first: `[batch, channels, height, width]`, as PyTorch and most ONNX files have it.

  Returns:
    A function of a batch that returns float32.
  """

  def prepare(batch: Mapping[str, Any]) -> np.ndarray:
    image = np.asarray(lookup(batch, path))
    if size is not None:
      image = _resized(image, (size, size) if isinstance(size, int) else size)
    scaled = image / np.float32(255) if image.dtype == np.uint8 else image.astype(np.float32)
    if channels == 1 and scaled.shape[-1] == 3:
      scaled = scaled.mean(axis=-1, keepdims=True)
    if channels == 3 and scaled.shape[-1] == 1:
      scaled = np.repeat(scaled, 3, axis=-1)
    normal = (scaled - np.asarray(mean, np.float32)) / np.asarray(deviation, np.float32)
    return np.ascontiguousarray(np.moveaxis(normal, -1, 1) if channels_first else normal)

  return prepare


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  if image.shape[1:3] == tuple(size):
    return image
  if image.dtype != np.uint8:
    raise ValueError(
      f"images of {image.dtype} with {list(image.shape[1:3])} pixels; to be made {list(size)}, give bytes"
    )
  with extra("images", "resizing images"):
    from PIL import Image
  flat = lambda pixels: pixels[..., 0] if pixels.shape[-1] == 1 else pixels
  of_one = lambda pixels: np.asarray(
    Image.fromarray(flat(pixels)).resize((size[1], size[0]), Image.Resampling.BILINEAR)
  )
  return np.stack([of_one(pixels).reshape(*size, image.shape[-1]) for pixels in image])


def _session(
  path: pathlib.Path, graph: bytes | None = None, providers: Sequence[Any] | None = None, threads: int = 0
) -> Any:
  """ONNX Runtime with a file, or with what became of its graph."""
  with extra("onnx", "an ONNX teacher"):
    import onnxruntime  # pyright: ignore[reportMissingImports]
  path.stat()  # a file that is missing is named by the system
  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = threads
  options.log_severity_level = 3  # errors: warnings of its optimizer say nothing to a user
  try:
    return onnxruntime.InferenceSession(graph or str(path), options, providers=providers or ["CPUExecutionProvider"])
  except Exception as error:  # of classes that ONNX Runtime does not export
    raise ValueError(f"{path} is no ONNX file that ONNX Runtime {onnxruntime.__version__} reads: {error}") from error


def _dtype_of(argument: Any) -> str:
  """The name in NumPy of the type of an input."""
  kind = str(argument.type).removeprefix("tensor(").removesuffix(")")
  return _KINDS.get(kind) or kind


def _with_outputs(path: pathlib.Path, tensors: Sequence[str]) -> bytes:
  """The graph with more outputs: tensors inside of it."""
  with extra("onnx", "a tensor inside of an ONNX graph"):
    import onnx  # pyright: ignore[reportMissingImports]
  model = onnx.load(str(path))  # with weights that lie in other files
  there = [name for node in model.graph.node for name in node.output if name]
  missing = [tensor for tensor in tensors if tensor not in there]
  if missing:
    of_graph = [output.name for output in model.graph.output]
    raise ValueError(f"{path} has no tensor {missing}; its outputs are {of_graph}, inside are {_few(there)}")
  model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(tensor) for tensor in dict.fromkeys(tensors))
  return model.SerializeToString()


def _inputs_of(path: pathlib.Path, names: Sequence[str], inputs: Inputs | None) -> Inputs:
  if inputs is None:
    only = lambda batch: batch.get(names[0], batch.get("image"))
    return {names[0]: only} if len(names) == 1 else {name: name for name in names}
  if set(inputs) != set(names):
    raise ValueError(f"inputs={sorted(inputs)}, but {path} has {sorted(names)}; say where each of them comes from")
  return inputs


def _reads(inputs: Inputs) -> tuple[str, ...] | None:
  """What is read of a batch, if it is known."""
  return tuple(dict.fromkeys(map(str, inputs.values()))) if all(isinstance(i, str) for i in inputs.values()) else None


def _made(where: str | Prepare, batch: Mapping[str, Any]) -> np.ndarray:
  found = lookup(batch, where) if isinstance(where, str) else where(batch)
  if found is None:
    raise ValueError(f"the batch has none of the teacher's inputs; it has {sorted(batch)}: say where by inputs={{...}}")
  return np.asarray(found)


def _checked(path: pathlib.Path, argument: Any, array: np.ndarray) -> np.ndarray:
  expected = np.dtype(_dtype_of(argument).replace("string", "O"))
  shape = [n if isinstance(n, int) else None for n in argument.shape]
  fits = array.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape[1:], array.shape[1:], strict=True))
  same_kind = array.dtype == expected or (array.dtype.kind in "iu" and expected.kind in "iu")
  if not fits or not same_kind:
    raise ValueError(
      f"{path} wants {argument.name!r} as {expected}{list(argument.shape)}, the batch has {array.dtype}"
      f"{list(array.shape)}; inputs={{{argument.name!r}: teachers.image_input(...)}} or a function of yours makes it"
    )
  return array.astype(expected, copy=False)


def _in_pieces(
  run: Callable[[dict[str, np.ndarray]], list[Any]], feed: dict[str, np.ndarray], arguments: Any
) -> list[Any]:
  """Runs a graph of a fixed batch size as often as the batch needs, the last piece filled up with its first row."""
  sizes = {node.shape[0] for node in arguments.values() if node.shape and isinstance(node.shape[0], int)}
  rows = len(next(iter(feed.values())))
  if not sizes or sizes == {rows}:
    return run(feed)
  (size,) = sizes
  said = []
  for start in range(0, rows, size):
    at = np.minimum(np.arange(start, start + size), rows - 1)
    said.append([part[: rows - start] for part in run({name: array[at] for name, array in feed.items()})])
  return [np.concatenate(parts) for parts in zip(*said, strict=True)]


def _tap(tapped: dict[str, Any], name: str) -> Callable[..., None]:
  def hook(module: Any, arguments: Any, said: Any) -> None:
    del module, arguments
    tapped[name] = said[0] if isinstance(said, tuple) else said

  return hook


def _picked(said: Any, name: str | int, tapped: Mapping[str, Any]) -> Any:
  """A part of what a module returned."""
  if name == "":
    return said
  if name in tapped:
    return tapped[str(name)]
  try:
    return said[name] if isinstance(said, Mapping | tuple | list) else getattr(said, str(name))  # pyright: ignore
  except (LookupError, AttributeError, TypeError) as error:
    there = sorted(said) if isinstance(said, Mapping) else type(said).__name__
    raise ValueError(f"the module returns no {name!r} and has no submodule of that name; it returns {there}") from error


def _named(said: Any) -> dict[str, Any]:
  if isinstance(said, Mapping):
    return dict(said)
  if isinstance(said, tuple | list):
    raise ValueError(f"the module returns {len(said)} things; name them: outputs={{'logits': 0, ...}}")
  return {"logits": said}


def _to_numpy(tensor: Any) -> np.ndarray:
  tensor = tensor.detach().cpu()
  return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()


def _canonical(array: Any) -> np.ndarray:
  array = np.asarray(array)
  return array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)


def _as_name(tensor: str) -> str:
  """The name of a tensor without dots, which separate names."""
  return tensor.replace(".", "_")


def _few(names: Sequence[str]) -> str:
  return ", ".join(names if len(names) <= 20 else [*names[:10], "...", *names[-10:]])
