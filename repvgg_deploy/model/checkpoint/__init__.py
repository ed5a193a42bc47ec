"""A checkpoint file → a state dict in our names, without running any code of the file: `load.load_checkpoint`.

The stages, and where something new goes:

- `containers`: a file → its content as data. A new container: recognised in `_read`, with a reader beside the others.
- `places`: what is no such file (an address, a folder, a shard), by name; indexes of shards.
- `pickle`: a pickle as data. `objects`: what it describes; a new way to write tensors as a call: a line in `_HANDLERS`.
- `lazy`: a tensor whose bytes are still in the file.
- `candidates`: content → every state dict in it, under any key. A new way to keep a weight in parts: `_ways_to_fold`.
- `names`: names of a file → official names. A new family: a `Naming` in `_FAMILIES`.
- `structure`: official names and shapes → the architecture, and whether every tensor is there. `branches`: QARepVGG's
  branches without BatchNorm, completed.
- `facts`: what a pickled module tells beside its tensors: used, or refused by name.
- `identify`: one state dict → its architecture, and who said what tensors do not tell.
- `averages`: which keys mean an average (`_AVERAGES`), and averages in other shapes than a state dict's.
- `resolve`: content → one model, chosen among all that are complete.
- `hub`: a name (`hf-hub:`, `https:`) → a file on this machine. `told`: what its `config.json` says.
- `load`: the stages in order, the weights, and the result (`Checkpoint`); `build_model`, `write_deploy` and
  `describe_checkpoint`.
"""
