"""The model as MLflow serves it: one row of input is one sample.

MLflow runs this file (models-from-code) where Genus is not installed. What draws lies beside the weights, in
code/runtime.py; here its refusals become MLflow's, which a server answers with 400.
"""

import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PyFuncModel, PythonModel, PythonModelContext


class Sampler(PythonModel):
    """Draws the sample that belongs to a seed, the same whatever else is in the request."""

    genus = True  # by which the guard below knows its own

    def load_context(self, context: PythonModelContext) -> None:
        _refuse_the_unknown()
        code = Path(context.artifacts["code"])
        spec: Any = importlib.util.spec_from_file_location("genus_package_runtime", code / "runtime.py")
        runtime: Any = importlib.util.module_from_spec(spec)
        compiled, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # the package stays as it was made
        try:
            spec.loader.exec_module(runtime)
        finally:
            sys.dont_write_bytecode = compiled
        self.runtime = runtime.Runtime(code.parent)

    def predict(self, context, model_input: pd.DataFrame, params=None):
        """``model_input``: columns ``seed``; ``label``, which models without labels refuse; ``prompt``, which a model
        of text begins with. ``params``: what the family's sample() takes. Stored values [rows, *shape], uint8 for
        images; of text a string a row.

        Where the model translates, ``model_input`` are stored images [rows, *shape], and ``to`` of ``params`` names
        the class.
        """
        knobs = dict(params or {})
        try:
            if self.runtime.domains:
                return self.runtime.translate(model_input, **knobs)
            if "prompt" in model_input:  # where a row has none, the one for all
                usual = knobs.get("prompt", self.runtime.knobs.get("prompt", ""))
                knobs["prompt"] = [usual if pd.isna(prompt) else prompt for prompt in model_input["prompt"]]
            return self.runtime.sample(model_input["seed"], model_input.get("label"), **knobs)
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error

    def check(self, data, params):
        """``data`` as it may go on. Raises MlflowException for params and columns that MLflow would drop in silence."""
        columns = set(data.columns) if isinstance(data, pd.DataFrame) else set(data) if isinstance(data, dict) else ()
        known = ("seed", "label", "prompt") if "prompt" in self.runtime.knobs else ("seed", "label")
        unknown = sorted(str(name) for name in columns if name not in known)
        if unknown:
            raise MlflowException.invalid_parameter_value(f"no column '{unknown[0]}' is known: {', '.join(known)}")
        try:
            self.runtime.check(params or {})
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        for name in ("label", "prompt"):
            if isinstance(data, pd.DataFrame) and name in data and data[name].isna().all():
                data = data.drop(columns=name)  # so Spark sends an optional column that it was not given
        return data


def _refuse_the_unknown() -> None:
    """MLflow drops params and columns that the signature has not, before a model can see them: a misspelt temperature
    would draw as if none had been asked for. So models like ours are asked before that. Other models are untouched.
    Spark's ``spark_udf`` drops params on its driver, where no package is loaded: there MLflow's warning is all.
    """
    plain: Any = PyFuncModel.predict
    if hasattr(plain, "genus"):
        return

    @functools.wraps(plain)
    def asked(self, data, params=None):
        model: Any = getattr(getattr(self, "_model_impl", None), "python_model", None)
        if getattr(model, "genus", False):
            data = model.check(data, params)
        return plain(self, data, params=params)

    guarded: Any = PyFuncModel
    guarded.predict = asked
    guarded.predict.genus = True


set_model(Sampler())
