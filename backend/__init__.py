"""tritonspeed's server side: everything behind a model repository's model.py."""
