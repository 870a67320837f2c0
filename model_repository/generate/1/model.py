"""generate: prompts in, text out as it is written. Decoupled: the engine batches, the service's threads send."""

from backend.config import EngineConfig
from backend.generation.service import Service
from backend.triton import Asked, Exporter, reporter


class TritonPythonModel:
    def initialize(self, args):
        self.service = Service(EngineConfig.from_triton(args), reporter(args["model_name"]), model=args["model_name"])
        self.service.start()
        self.exporter = Exporter(args, self.service.tally, self.service.close)

    def execute(self, requests):  # returns at once; each request is answered as its text comes
        self.service.serve([Asked(request) for request in requests])

    def is_ready(self):  # asked by Triton 26.03 and later
        return self.service.healthy

    def finalize(self):
        self.service.close()
        self.exporter.close()
