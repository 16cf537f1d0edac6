"""A training with workers that persist, for test_lent_model: the program must end by itself."""

import json
import sys
from pathlib import Path

from tiny import random_rows
from trainer_runs import trainer

folder, how = Path(sys.argv[1]), sys.argv[2]
run = trainer(
    folder, rows=random_rows(20), eval_dataset=random_rows(8), max_steps=3, dataloader_num_workers=2,
    dataloader_persistent_workers=how != "fails", dataloader_multiprocessing_context="fork",
)  # fmt: skip
if how == "fails":

    def fail(*args, **kwargs):
        raise RuntimeError("in the middle of an epoch")

    run._get_grad_norm = fail
    try:
        run.train()
    except RuntimeError as error:
        assert "in the middle" in str(error)
        kept = error  # and with it the frames that hold the loader
else:
    run.train()
    if how == "evaluates":
        run.evaluate()
(folder / "done.json").write_text(json.dumps(how))
