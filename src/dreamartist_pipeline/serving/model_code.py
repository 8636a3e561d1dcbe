"""The code of an MLflow model of a concept ("models from code"); MLflow copies this file into the model and runs it."""

from mlflow.models import set_model

from dreamartist_pipeline.serving.model import ConceptModel

set_model(ConceptModel())
