"""tritonspeed's client: served models as Python calls. It needs no GPU, no torch and no model files."""

from client.channel import Tls
from client.control import Model
from client.deploy import deploy, models, undeploy
from client.errors import Cancelled, DeadlineExceeded, Error, InvalidInput, Overloaded, ServerError, Unavailable
from client.generate import AsyncGenerate, Delta, Generate, Generated
from client.pipeline import AsyncPipeline, Pipeline
from client.tasks import async_pipeline, pipeline
from client.transport import Transport

__all__ = [
    "AsyncGenerate",
    "AsyncPipeline",
    "Cancelled",
    "DeadlineExceeded",
    "Delta",
    "Error",
    "Generate",
    "Generated",
    "InvalidInput",
    "Model",
    "Overloaded",
    "Pipeline",
    "ServerError",
    "Tls",
    "Transport",
    "Unavailable",
    "async_pipeline",
    "deploy",
    "models",
    "pipeline",
    "undeploy",
]
