"""tritonspeed's client: served models as Python calls. It needs no GPU, no torch and no model files."""

from client.channel import Tls
from client.classify import AsyncClassify, Classify, Label
from client.control import Model
from client.deploy import deploy, models, undeploy
from client.embed import AsyncEmbed, Embed
from client.errors import Cancelled, DeadlineExceeded, Error, InvalidInput, Overloaded, ServerError, Unavailable
from client.fill_mask import AsyncFillMask, Filled, FillMask
from client.generate import AsyncGenerate, Delta, Generate, Generated
from client.pipeline import AsyncPipeline, Pipeline
from client.qa import Answer, AsyncQuestionAnswering, QuestionAnswering
from client.rerank import AsyncRerank, Ranked, Rerank
from client.tasks import async_pipeline, pipeline
from client.text_to_image import AsyncTextToImage, TextToImage
from client.token_classification import AsyncTokenClassification, Entity, TokenClassification
from client.transport import Transport
from client.zero_shot_image import AsyncZeroShotImage, ZeroShotImage

__all__ = [
    "Answer",
    "AsyncClassify",
    "AsyncEmbed",
    "AsyncFillMask",
    "AsyncGenerate",
    "AsyncPipeline",
    "AsyncQuestionAnswering",
    "AsyncRerank",
    "AsyncTextToImage",
    "AsyncTokenClassification",
    "AsyncZeroShotImage",
    "Cancelled",
    "Classify",
    "DeadlineExceeded",
    "Delta",
    "Embed",
    "Entity",
    "Error",
    "FillMask",
    "Filled",
    "Generate",
    "Generated",
    "InvalidInput",
    "Label",
    "Model",
    "Overloaded",
    "Pipeline",
    "QuestionAnswering",
    "Ranked",
    "Rerank",
    "ServerError",
    "TextToImage",
    "Tls",
    "TokenClassification",
    "Transport",
    "Unavailable",
    "ZeroShotImage",
    "async_pipeline",
    "deploy",
    "models",
    "pipeline",
    "undeploy",
]
