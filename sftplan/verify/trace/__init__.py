"""The real model's step without a GPU: fake tensors, every storage's birth and death written down.

`stand_in` makes a processor behave as CUDA does where memory can tell, `recorder` writes the events,
`scratch` knows what kernels take besides, `run` traces a plan's own step, `compare` holds it against
the tape.
"""
