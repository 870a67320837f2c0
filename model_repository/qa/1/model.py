"""qa: questions and contexts in, answers out. Triton's dynamic batcher gathers requests; the service makes batches."""

from backend.config import EngineConfig
from backend.tasks.service import Service
from backend.triton import Asked, Exporter, reporter

TASK = "qa"


class TritonPythonModel:
    def initialize(self, args):
        self.service = Service(
            TASK, EngineConfig.from_triton(args), reporter(args["model_name"]), model=args["model_name"]
        )
        self.service.start()
        self.exporter = Exporter(args, self.service.tally, self.service.close)

    def execute(self, requests):  # answers later, so that the next batch is prepared while this one is computed
        self.service.serve([Asked(request) for request in requests])

    def is_ready(self):  # asked by Triton 26.03 and later
        return self.service.healthy

    def finalize(self):
        self.service.close()
        self.exporter.close()
