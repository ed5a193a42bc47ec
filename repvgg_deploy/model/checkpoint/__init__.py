"""A checkpoint file → a state dict in our names, without running any code of the file: `load.load_checkpoint`.

The stages, and where something new goes:

- `containers`: a file → its content as data. A new container: recognised in `_read`, with a reader beside the others.
- `pickle`: a pickle as data, its callables names only. A new way to write tensors as a call: a line in `_HANDLERS`.
- `lazy`: a tensor whose bytes are still in the file.
- `resolve`: content → one model. A new wrapper: a key in `_PLAIN_KEYS`, or `_EMA_KEYS` for averaged weights. A new fact
  of a pickled module: read in `_walk_module` by `_attributes`, carried in `Candidate`, used or refused in `_identify`.
- `names`: names of a file → official names. A new family: a `Naming` in `_FAMILIES`.
- `structure`: official names and shapes → the architecture, and whether every tensor is there.
- `load`: the stages in order, the weights, and the result (`Checkpoint`); `build_model`, `write_deploy` and
  `describe_checkpoint`.
"""
