"""The model as MLflow serves it: one row of input is one sample.

MLflow runs this file (models-from-code) where Genus is not installed. The model's own code lies beside the weights,
as a package whose name holds the hash of that code: versions with different code live in one process side by side.
"""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext


class Sampler(PythonModel):
    """Draws the sample that belongs to a seed, the same whatever else is in the request."""

    def load_context(self, context: PythonModelContext) -> None:
        import torch
        from safetensors.torch import load_file

        about = json.loads(Path(context.artifacts["model"]).read_text(encoding="utf-8"))
        code = Path(context.artifacts["code"])
        package = next(code.glob("genus_*")).name
        if str(code) not in sys.path:
            sys.path.append(str(code))
        importlib.invalidate_caches()
        compiled, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # the package stays as it was made
        try:
            spec = importlib.import_module(f"{package}.data.spec").DataSpec.from_json(about["spec"])
            family = importlib.import_module(f"{package}.families.{about['family'].replace('/', '.')}").Model
        finally:
            sys.dont_write_bytecode = compiled
        state = torch.random.get_rng_state()  # building draws weights that the stored ones replace: leave no trace
        self.model = family(spec, **about["params"])
        torch.random.set_rng_state(state)
        self.model.load_state_dict(load_file(context.artifacts["weights"]))
        self.model.eval()

    def predict(self, context, model_input: pd.DataFrame, params=None):
        """``model_input``: column ``seed``. ``params``: what the family's sample() takes. uint8 [rows, C, H, W]."""
        import torch

        knobs = {name: getattr(value, "item", lambda value=value: value)() for name, value in (params or {}).items()}
        spec, threads = self.model.spec, torch.get_num_threads()
        rows = np.zeros((len(model_input), *spec.shape), np.uint8 if spec.levels else np.float32)
        torch.set_num_threads(1)  # sums, and so bytes, depend on how many threads share them
        try:
            with torch.inference_mode():
                for row, seed in enumerate(model_input["seed"]):  # one by one: sums depend on the batch as well
                    generator = torch.Generator().manual_seed(int(seed))
                    x = self.model.sample(1, generator=generator, **knobs)
                    rows[row] = spec.to_stored(x.float())[0].numpy()
        finally:
            torch.set_num_threads(threads)
        return rows


set_model(Sampler())
