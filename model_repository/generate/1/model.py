"""generate: prompts in, text out as it is written. Decoupled: the engine batches, Triton carries."""

import asyncio
from contextlib import aclosing

from backend.config import EngineConfig
from backend.generation.engine import Engine
from backend.generation.request import Request
from backend.triton import parameters, replying, reporter, rows


class TritonPythonModel:
    def initialize(self, args):
        self.engine = Engine(EngineConfig.from_triton(args), reporter(args["model_name"]))
        self.engine.start()

    async def execute(self, requests):
        await asyncio.gather(*map(self.serve, requests))

    async def serve(self, request):
        with replying(request) as reply:  # exactly one FINAL, errors included
            asked = await asyncio.to_thread(Request.parse, rows(request), parameters(request), self.engine)
            async with aclosing(self.engine.stream(asked.prompts, reply.cancelled)) as news:
                async for deltas in news:
                    if outputs := asked.answer(deltas):
                        reply.send(outputs)

    def is_ready(self):  # asked by Triton 26.03 and later
        return self.engine.healthy

    def finalize(self):
        self.engine.close()
