"""Imports the large libraries of a `kedro run`, some of which import most of themselves when they are first used.

Not Kedro, which reads the logging configuration of the current folder when it is imported, and nothing of this project.
"""

import gc

import diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion  # noqa: F401
import dynaconf  # noqa: F401
import flask  # noqa: F401
import git  # noqa: F401
import IPython  # noqa: F401
import matplotlib.backends.backend_svg
import matplotlib.figure
import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
import omegaconf  # noqa: F401
import pandas
import pathspec  # noqa: F401
import PIL.Image
import plotly.express
import pyarrow.parquet  # noqa: F401
import re2  # noqa: F401
import rich.console  # noqa: F401
import torch._dynamo
import torch.distributed.nn  # noqa: F401
import transformers.models.clip.modeling_clip

PIL.Image.init()
plotly.express.line(pandas.DataFrame({"x": [0, 1], "y": [0, 1]}), x="x", y="y").add_hline(1).to_html()
matplotlib.backends.backend_svg.FigureCanvasSVG(matplotlib.figure.Figure())
transformers.logging.set_verbosity_warning()
gc.freeze()  # programs need not look for garbage here
