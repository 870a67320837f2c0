"""echo: x back as y; at its start it tells in the launcher's format which Python runs it, and starts a child."""

import os
import subprocess
import sys
import time

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        print(f"tritonspeed | {args['model_name']} | python {os.environ['TRITONSPEED_PYTHON']}", flush=True)
        if args["model_name"] == "broken":
            raise pb_utils.TritonModelException("LoadError: no such model: /nowhere")
        self.child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # a rank that hangs

    def execute(self, requests):
        read = pb_utils.get_input_tensor_by_name
        return [self.answer(read(request, "x").as_numpy()) for request in requests]

    def answer(self, x):
        time.sleep(float(x[0]))
        return pb_utils.InferenceResponse([pb_utils.Tensor("y", x)])
