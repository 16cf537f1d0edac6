"""Imported once, by the process that Workers are forked from."""

import gc
import importlib
import sys

sys.modules["bitsandbytes"] = None  # peft would import it, and it Inductor, for a second and more

for name in (
    "torch", "transformers.models.llama.modeling_llama", "datasets", "peft", "accelerate.utils",
    "torch.distributed.fsdp", "fastdpo.trainer.dpo", "fastdpo.reference", "tiny", "cache_folders",
):  # fmt: skip
    importlib.import_module(name)

# Else a collection in a forked process would look at all of it, and so copy it.
gc.collect()
gc.freeze()
